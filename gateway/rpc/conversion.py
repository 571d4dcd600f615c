"""Between the contract's messages and the gateway's values: requests to commands, values to bytes.

Answers are assembled from encoded parts, because the frozen answer of an operation must leave byte
for byte the same through AuthorizePayment, a batch and a stream.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status
from payments.v1 import money_pb2, outcome_pb2, payment_pb2
from payments.v1.payment_method_pb2 import (
    CHANNEL_ECOMMERCE,
    INITIATOR_CUSTOMER,
    CardType,
    Channel,
    NetworkToken,
    PaymentMethod,
    RedirectPaymentMethod,
)
from payments.v1.payment_service_pb2 import (
    AuthorizePaymentRequest,
    AuthorizePaymentResponse,
    CapturePaymentRequest,
    IncrementAuthorizationRequest,
    ListPaymentsRequest,
    RefundPaymentRequest,
    RefundReason,
    VoidPaymentRequest,
)

from gateway.application.accounts import RateLimit
from gateway.application.commands import (
    Answer,
    Authorize,
    Capture,
    Increment,
    Refund,
    Void,
    make_authorize,
)
from gateway.application.ports import CARD, NETWORK_TOKEN, Found, ListFilter
from gateway.domain.model import (
    Aggregate,
    Attempt,
    CaptureMethod,
    Mode,
    NextAction,
    Operation,
    OperationKind,
    Outcome,
    Payment,
    PaymentState,
)
from gateway.routing import record
from gateway.routing.model import RouteDecision
from gateway.routing.rules import Facts
from gateway.rpc.fingerprint import canonical, fingerprint, take_secrets
from gateway.rpc.wire import (
    EPOCH,
    OCTETS,
    Octets,
    length_delimited,
    octets_of,
    to_timestamp,
    writer,
)

EVENT_VERSION: Final = 1
"""The version of PaymentEvent that `ContractEncoder.event` writes."""
PAGE_SIZE_DEFAULT: Final = 50
"""What a page_size of 0 is taken as."""
DETAILS_CACHED_MAX: Final = 1024
"""How many payments' details are kept decoded: each is needed for the PSP, the answer and the
events, within milliseconds."""
ROUTES_CACHED_MAX: Final = 1024
"""How many route decisions are kept decoded: payments that were decided alike share one."""

# --- requests to commands -------------------------------------------------------------------------


@dataclass(slots=True)
class Caller:
    """Who makes a call, and until when: what every command has besides its request."""

    request_id: str = ""
    merchant_id: str = ""
    mode: Mode = Mode.TEST
    deadline: float | None = None
    """A time of `time.monotonic()`."""
    rate_limit: RateLimit | None = None
    """The merchant's."""


_NO_FIELDS: frozenset[str] = frozenset()


def _used_fields(request: AuthorizePaymentRequest, method: str | None) -> frozenset[str]:
    """The fields of the request that a connector must support, by their paths.

    Not among them: the amount, the capture method, the token, what is documented as the default,
    and what the gateway itself keeps or acts on (the merchant's ids, metadata, partial approval).
    `method` is the field of the payment method.
    """
    used: list[str] = []
    if request.channel not in (0, CHANNEL_ECOMMERCE):
        used.append("channel")
    if request.initiator not in (0, INITIATOR_CUSTOMER):
        used.append("initiator")
    if request.statement_descriptor:
        used.append("statement_descriptor")
    if request.statement_descriptor_suffix:
        used.append("statement_descriptor_suffix")
    if request.return_url:
        used.append("return_url")
    if request.HasField("stored_credential"):
        used.append("stored_credential")
    if request.HasField("three_ds"):
        used.append("three_ds")
    if request.HasField("billing_address"):
        used.append("billing_address")
    if request.HasField("amount_details"):
        used.append("amount_details")
    if method is not None and method != "token":
        used.append(f"payment_method.{method}")
        if method == "network_token" and request.payment_method.network_token.token_reference:
            used.append("payment_method.network_token.token_reference")
    return frozenset(used) if used else _NO_FIELDS


@dataclass(frozen=True, slots=True)
class _Method:
    """A payment method, as a connector's capabilities know it."""

    name: str = CARD
    fields: frozenset[str] = _NO_FIELDS
    country: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict)


_CARD = _Method()


def _method(method: PaymentMethod, name: str) -> _Method:
    """The method of that field. What of it may not be kept is taken out of the message."""
    message = getattr(method, name)
    fields = frozenset(each.name for each, _ in message.ListFields())
    if isinstance(message, NetworkToken):
        return _Method(NETWORK_TOKEN, fields, secrets=take_secrets(message))
    if isinstance(message, RedirectPaymentMethod):
        return _Method(message.method_type, fields, message.country_code)
    return _Method(message.method_type or CARD, fields)


# Looked up once: in Python 3.11 a member costs as much as a call, by its number as much as five.
_AUTHORIZE: Final = OperationKind.AUTHORIZE
_CAPTURE_METHODS: Final[Mapping[int, CaptureMethod]] = {each.value: each for each in CaptureMethod}


def to_authorize(request: AuthorizePaymentRequest, caller: Caller) -> Authorize:
    """The command of a valid request. The request is used up: see `fingerprint.canonical`."""
    idempotency_key = request.idempotency_key
    amount, payment_method = request.amount, request.payment_method
    which = payment_method.WhichOneof("method")
    method = _CARD if which in (None, "token") else _method(payment_method, which)
    details = canonical(request)
    return make_authorize(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(
            _AUTHORIZE, caller.mode, caller.merchant_id, details, method.secrets
        ),
        request_id=caller.request_id,
        deadline=caller.deadline,
        rate_limit=caller.rate_limit,
        amount_minor=amount.amount_minor,
        currency=amount.currency_code,
        capture_method=_CAPTURE_METHODS[request.capture_method],
        payment_method_token=payment_method.token,
        allow_partial_approval=request.allow_partial_approval,
        merchant_order_id=request.merchant_order_id,
        merchant_transaction_id=request.merchant_transaction_id,
        details=details,
        used_fields=_used_fields(request, which),
        method=method.name,
        method_fields=method.fields,
        customer_country=method.country,
        secrets=method.secrets,
        facts=partial(_facts, request, method.name),
    )


_CARD_TYPES: Final[Mapping[int, str]] = {
    number: "" if not number else name.removeprefix("CARD_TYPE_").lower()
    for name, number in CardType.items()
}
_CHANNELS: Final[Mapping[int, str]] = {
    number: name.removeprefix("CHANNEL_") for name, number in Channel.items()
}


def _facts(request: AuthorizePaymentRequest, method_name: str) -> Facts:
    method = request.payment_method
    hints = method.card_hints
    return Facts(
        method_name,
        hints.scheme,
        hints.bin,
        hints.issuer_country,
        _CARD_TYPES[hints.card_type],
        _CHANNELS[request.channel],
        request.customer_id,
        request.metadata,
        method.token
        or method.stored.stored_payment_method_id
        or method.network_token.token_reference,
    )


def facts_of(details: bytes) -> Facts:
    """What a past payment's request told that routing looks at."""
    request = AuthorizePaymentRequest.FromString(details)
    which = request.payment_method.WhichOneof("method")
    named = _CARD if which in (None, "token") else _method(request.payment_method, which)
    return _facts(request, named.name)


def to_capture(request: CapturePaymentRequest, caller: Caller) -> Capture:
    """The command of a valid request. The request is used up."""
    idempotency_key = request.idempotency_key
    encoding = canonical(request)
    has_amount = request.HasField("amount")
    return Capture(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(OperationKind.CAPTURE, caller.mode, caller.merchant_id, encoding),
        request_id=caller.request_id,
        deadline=caller.deadline,
        rate_limit=caller.rate_limit,
        payment_id=request.payment_id,
        amount_minor=request.amount.amount_minor if has_amount else None,
        currency=request.amount.currency_code if has_amount else None,
        final=request.final,
        merchant_transaction_id=request.merchant_transaction_id,
    )


def to_void(request: VoidPaymentRequest, caller: Caller) -> Void:
    """The command of a valid request. The request is used up."""
    idempotency_key = request.idempotency_key
    encoding = canonical(request)
    by_id = request.WhichOneof("target") == "payment_id"
    return Void(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(OperationKind.VOID, caller.mode, caller.merchant_id, encoding),
        request_id=caller.request_id,
        deadline=caller.deadline,
        rate_limit=caller.rate_limit,
        payment_id=request.payment_id if by_id else None,
        authorize_idempotency_key=None if by_id else request.authorize_idempotency_key,
        note=request.reason,
        merchant_transaction_id=request.merchant_transaction_id,
    )


def to_refund(request: RefundPaymentRequest, caller: Caller) -> Refund:
    """The command of a valid request. The request is used up."""
    idempotency_key = request.idempotency_key
    encoding = canonical(request)
    has_amount = request.HasField("amount")
    reason = RefundReason.Name(request.reason).removeprefix("REFUND_REASON_")
    return Refund(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(OperationKind.REFUND, caller.mode, caller.merchant_id, encoding),
        request_id=caller.request_id,
        deadline=caller.deadline,
        rate_limit=caller.rate_limit,
        payment_id=request.payment_id,
        amount_minor=request.amount.amount_minor if has_amount else None,
        currency=request.amount.currency_code if has_amount else None,
        capture_operation_id=request.capture_operation_id or None,
        note=reason if request.reason else "",
        merchant_transaction_id=request.merchant_transaction_id,
    )


def to_increment(request: IncrementAuthorizationRequest, caller: Caller) -> Increment:
    """The command of a valid request. The request is used up."""
    idempotency_key = request.idempotency_key
    encoding = canonical(request)
    return Increment(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(OperationKind.INCREMENT, caller.mode, caller.merchant_id, encoding),
        request_id=caller.request_id,
        deadline=caller.deadline,
        rate_limit=caller.rate_limit,
        payment_id=request.payment_id,
        amount_minor=request.additional_amount.amount_minor,
        currency=request.additional_amount.currency_code,
        merchant_transaction_id=request.merchant_transaction_id,
    )


def to_list_filter(
    request: ListPaymentsRequest, caller: Caller, after: tuple[datetime, str] | None
) -> ListFilter:
    """The filter of a valid request; `after` is what its page token says."""
    return ListFilter(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        page_size=request.page_size or PAGE_SIZE_DEFAULT,
        states=tuple(sorted(map(PaymentState, request.states))),
        created_from=(
            _to_datetime(request.created_from) if request.HasField("created_from") else None
        ),
        created_before=(
            _to_datetime(request.created_before) if request.HasField("created_before") else None
        ),
        merchant_order_id=request.merchant_order_id,
        after=after,
    )


def _to_datetime(timestamp: Timestamp) -> datetime:
    # Rounded up to the database's microseconds: a row is at or past a time of finer grain exactly
    # where it is at or past the next microsecond.
    microseconds = timestamp.seconds * 1_000_000 + -(-timestamp.nanos // 1000)
    return from_microseconds(microseconds)


def from_microseconds(microseconds: int) -> datetime:
    """The time so many microseconds after 1970; the latest one where it is past the year 9999."""
    seconds, rest = divmod(microseconds, 1_000_000)
    if seconds >= _SECONDS_MAX:
        return datetime.max.replace(tzinfo=UTC)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


_SECONDS_MAX = int(datetime.max.replace(tzinfo=UTC).timestamp())


def to_microseconds(at: datetime) -> int:
    """Microseconds after 1970."""
    since = at - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


# --- values to messages ---------------------------------------------------------------------------


_write_duration = writer(Duration, "seconds", "nanos")


def _duration(microseconds: int) -> Octets:
    seconds, rest = divmod(microseconds, 1_000_000)
    return _write_duration(seconds, rest * 1000)


# The numbers of the domain's enums are those of the contract, and so are the names of its
# attributes; tests compare both.

_write_advice = writer(
    outcome_pb2.Advice,
    "retry_after",
    of=Outcome,
    names={"action": "advice_action", "code": "advice_code", "scheme": "advice_scheme"},
)
_write_outcome = writer(outcome_pb2.Outcome, "advice", of=Outcome)
_write_attempt = writer(
    payment_pb2.Attempt,
    "connector_reference",
    "outcome",
    "connector_processing_time",
    of=Attempt,
)
_write_money = writer(money_pb2.Money, of=Operation, names={"currency_code": "currency"})
_write_allocation = writer(payment_pb2.RefundAllocation, "capture_operation_id", "amount_minor")
_write_operation = writer(
    payment_pb2.Operation,
    "amount",
    "outcome",
    "attempts",
    "allocations",
    "next_action",
    "route",
    of=Operation,
)


def _outcome(outcome: Outcome) -> Octets:
    advice = None
    if outcome.advice_action or outcome.advice_code:
        retry_after_s = outcome.advice_retry_after_s
        advice = _write_advice(
            outcome,
            None if retry_after_s is None else _duration(retry_after_s * 1_000_000),
        )
    return _write_outcome(outcome, advice)


def _attempt(operation_id: str, attempt: Attempt, outcome: Octets | None) -> Octets:
    """An attempt with its encoded outcome."""
    took_ms = attempt.processing_ms
    return _write_attempt(
        attempt,
        f"{operation_id}-{attempt.number}",
        outcome,
        None if took_ms is None else _duration(round(took_ms * 1000)),
    )


def _next_action(action: NextAction) -> Octets:
    message = payment_pb2.NextAction(expires_at=to_timestamp(action.expires_at))
    if action.redirect_url:
        message.redirect_url = action.redirect_url
    elif action.qr_code is not None:
        code = action.qr_code
        message.qr_code.data = code.data
        message.qr_code.image_url = code.image_url
        message.qr_code.page_url = code.page_url
    elif action.voucher is not None:
        voucher = action.voucher
        message.voucher.number = voucher.number
        message.voucher.entity = voucher.entity
        message.voucher.page_url = voucher.page_url
    elif action.await_approval:
        message.await_approval.SetInParent()
    return octets_of(message)


def _operation(operation: Operation) -> Octets:
    attempts: list[Octets] = []
    latest: Octets | None = None
    for attempt in (*operation.superseded_attempts, operation.attempt):
        outcome = None
        if attempt.outcome is not None:
            latest = outcome = _outcome(attempt.outcome)
        attempts.append(_attempt(operation.operation_id, attempt, outcome))
    action = operation.next_action
    return _write_operation(
        operation,
        _write_money(operation),
        latest,
        attempts,
        [_write_allocation(*allocation) for allocation in operation.allocations],
        None if action is None else _next_action(action),
        _route(operation),
    )


def encode_operation(operation: Operation) -> bytes:
    """An operation as the contract's Operation."""
    return _operation(operation).encode(OCTETS)


def _route(operation: Operation) -> Octets | None:
    if not operation.note or operation.kind not in _ROUTED:
        return None
    return _decode_route(operation.note)


_ROUTED: Final = (OperationKind.AUTHORIZE, OperationKind.VERIFY)


@lru_cache(maxsize=ROUTES_CACHED_MAX)
def _decode_route(note: str) -> Octets | None:
    decision = record.decode(note)
    return None if decision is None else octets_of(route_message(decision))


def route_message(decision: RouteDecision) -> payment_pb2.Route:
    """A decision as the contract's Route."""
    scores = {each.candidate.connector_account_id: each for each in decision.scores}
    route = payment_pb2.Route(
        rules_version=decision.rules_version,
        rule=decision.rule,
        experiment=decision.experiment,
        arm=decision.arm,
    )
    for candidate in decision.candidates:
        scored = scores.get(candidate.connector_account_id)
        learned = None if scored is None else scored.learned
        route.candidates.add(
            connector=candidate.connector,
            connector_account_id=candidate.connector_account_id,
            score=None if scored is None else scored.score,
            learned=None if learned is None else payment_pb2.LearnedScore(**learned._asdict()),
        )
    for candidate, reason in decision.excluded:
        route.candidates.add(
            connector=candidate.connector,
            connector_account_id=candidate.connector_account_id,
            excluded_reason=reason,
        )
    return route


_write_amounts = writer(money_pb2.PaymentAmounts, of=Payment, names={"currency_code": "currency"})
# What is as in the request has the highest field numbers, so the two parts are one encoding.
_write_own_fields = writer(
    payment_pb2.Payment,
    "amounts",
    of=Payment,
    numbers=range(1, payment_pb2.Payment.PAYMENT_METHOD_FIELD_NUMBER),
)


def _payment(payment: Payment) -> Octets:
    own_fields = _write_own_fields(payment, _write_amounts(payment))
    return own_fields + _decode_details(payment.details).echo


def encode_payment(payment: Payment) -> bytes:
    """A payment as the contract's Payment."""
    return _payment(payment).encode(OCTETS)


# --- details: what a payment keeps of its request -------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Details:
    echo: Octets
    """The fields of Payment that are as in the request."""
    payment_method_token: str
    connector_fields: Mapping[str, object]


_ECHOED_MESSAGES: Final = (
    "payment_method",
    "stored_credential",
    "three_ds",
    "billing_address",
    "amount_details",
)
_write_echo = writer(
    payment_pb2.Payment,
    *_ECHOED_MESSAGES,
    of=AuthorizePaymentRequest,
    numbers=range(
        payment_pb2.Payment.PAYMENT_METHOD_FIELD_NUMBER,
        payment_pb2.Payment.METADATA_FIELD_NUMBER,
    ),
)
_NO_CONNECTOR_FIELDS: Mapping[str, object] = MappingProxyType({})


@lru_cache(maxsize=DETAILS_CACHED_MAX)
def _decode_details(details: bytes) -> _Details:
    request = AuthorizePaymentRequest.FromString(details)
    echo = _write_echo(
        request,
        *(
            octets_of(getattr(request, name)) if request.HasField(name) else None
            for name in _ECHOED_MESSAGES
        ),
    )
    if request.metadata:
        # The highest field, and the only one whose order is not given.
        metadata = payment_pb2.Payment(metadata=request.metadata)
        echo += metadata.SerializeToString(deterministic=True).decode(OCTETS)
    used = _used_fields(request, request.payment_method.WhichOneof("method"))
    fields = _NO_CONNECTOR_FIELDS
    if used or request.customer_id:
        told: dict[str, object] = {}
        if request.customer_id:
            told["customer_id"] = request.customer_id  # of use to some, and refused by none
        if used:
            names = {path.partition(".")[0] for path in used}
            everything = MessageToDict(request, preserving_proto_field_name=True)
            told |= {name: everything[name] for name in sorted(names)}
        fields = MappingProxyType(told)
    return _Details(
        echo,
        request.payment_method.token,
        fields,
    )


# --- answers --------------------------------------------------------------------------------------

# The five money responses have the same field numbers, and so has GetOperationResponse but for
# `replay`: one encoding serves them all.
_write_response = writer(
    AuthorizePaymentResponse,
    "operation",
    "payment",
    numbers=range(1, AuthorizePaymentResponse.REPLAY_FIELD_NUMBER),
)
_write_event = writer(
    payment_pb2.PaymentEvent, "event_version", "event_type", "payment", "operation", "event_id"
)


def encode_found(found: Found) -> bytes:
    """An operation with its payment: a money response without `replay`, or GetOperationResponse."""
    return _write_response(_operation(found.operation), _payment(found.payment)).encode(OCTETS)


def encode_answer(answer: Answer) -> bytes:
    """A money response: the stored bytes, with the `replay` field appended to a repeat."""
    if not answer.replayed:
        return answer.response
    replay = payment_pb2.Replay(replayed=True, first_request_id=answer.first_request_id)
    return answer.response + length_delimited(
        AuthorizePaymentResponse.REPLAY_FIELD_NUMBER, replay.SerializeToString()
    )


def encode_aggregate(aggregate: Aggregate) -> bytes:
    """A GetPaymentResponse."""
    operations = [length_delimited(2, encode_operation(each)) for each in aggregate.operations]
    return length_delimited(1, encode_payment(aggregate.payment)) + b"".join(operations)


def encode_page(payments: Iterable[bytes], next_page_token: str) -> bytes:
    """A ListPaymentsResponse of encoded payments."""
    page = b"".join([length_delimited(1, payment) for payment in payments])
    return page + length_delimited(2, next_page_token.encode()) if next_page_token else page


def encode_result(item_ref: str, response: bytes) -> bytes:
    """An AuthorizePaymentResult with the bytes of a response, as one of a batch's or stream's."""
    result = length_delimited(2, response)
    if item_ref:
        result = length_delimited(1, item_ref.encode()) + result
    return length_delimited(1, result)


def encode_error_result(item_ref: str, error: Status) -> bytes:
    """An AuthorizePaymentResult with an error, as one of a batch's or stream's."""
    result = length_delimited(3, error.SerializeToString())
    if item_ref:
        result = length_delimited(1, item_ref.encode()) + result
    return length_delimited(1, result)


class ContractEncoder:
    """Implements `gateway.application.ports.Encoder`."""

    def response(self, operation: Operation, payment: Payment) -> bytes:
        """A money response without its `replay` field."""
        return _write_response(_operation(operation), _payment(payment)).encode(OCTETS)

    def change(
        self, event_id: str, event_type: str, operation: Operation, payment: Payment
    ) -> tuple[bytes, bytes]:
        """A money response without its `replay` field, and a PaymentEvent."""
        written_operation, written_payment = _operation(operation), _payment(payment)
        response = _write_response(written_operation, written_payment)
        event = _write_event(
            EVENT_VERSION, event_type, written_payment, written_operation, event_id
        )
        return response.encode(OCTETS), event.encode(OCTETS)

    def connector_fields(self, payment: Payment) -> tuple[str, Mapping[str, object]]:
        """The payment method's token (empty for another method) and the fields of the request that
        are the connector's, in the JSON form of the contract with its field names.
        """
        details = _decode_details(payment.details)
        return details.payment_method_token, details.connector_fields
