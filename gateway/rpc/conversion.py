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
from payments.v1.payment_method_pb2 import CaptureMethod as CaptureMethodPb
from payments.v1.payment_service_pb2 import (
    AuthorizePaymentRequest,
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

EVENT_VERSION: Final = 1
"""The version of PaymentEvent that `ContractEncoder.event` writes."""
PAGE_SIZE_DEFAULT: Final = 50
"""What a page_size of 0 is taken as."""
DETAILS_CACHED_MAX: Final = 1024
"""How many payments' details are kept decoded: each is needed for the PSP, the answer and the
events, within milliseconds."""
TIMES_CACHED_MAX: Final = 256
"""How many times are kept as messages: those of an operation and its payment are the same, and all
of a batch have the same intent's time."""

ROUTES_CACHED_MAX: Final = 1024
"""How many route decisions are kept decoded: payments that were decided alike share one."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# --- wire format ----------------------------------------------------------------------------------
# https://protobuf.dev/programming-guides/encoding: a length-delimited field is its number shifted
# by three with the type 2, the length as a varint, the bytes.


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


LENGTHS_KEPT: Final = 4096
"""Lengths below this are not encoded anew each time: those of nearly all parts of an answer."""
_LENGTHS = tuple(_varint(length) for length in range(LENGTHS_KEPT))
_TAGS = tuple(bytes((field_number << 3 | 2,)) for field_number in range(16))


def length_delimited(field_number: int, payload: bytes) -> bytes:
    """A length-delimited field: a string, bytes or a message. Field numbers up to 15."""
    length = len(payload)
    encoded_length = _LENGTHS[length] if length < LENGTHS_KEPT else _varint(length)
    return _TAGS[field_number] + encoded_length + payload


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


def to_authorize(request: AuthorizePaymentRequest, caller: Caller) -> Authorize:
    """The command of a valid request. The request is used up: see `fingerprint.canonical`."""
    idempotency_key = request.idempotency_key
    which = request.payment_method.WhichOneof("method")
    method = _CARD if which in (None, "token") else _method(request.payment_method, which)
    details = canonical(request)
    return make_authorize(
        merchant_id=caller.merchant_id,
        mode=caller.mode,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(
            OperationKind.AUTHORIZE, caller.mode, caller.merchant_id, details, method.secrets
        ),
        request_id=caller.request_id,
        deadline=caller.deadline,
        rate_limit=caller.rate_limit,
        amount_minor=request.amount.amount_minor,
        currency=request.amount.currency_code,
        capture_method=CaptureMethod(request.capture_method),
        payment_method_token=request.payment_method.token,
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


def _facts(request: AuthorizePaymentRequest, method_name: str) -> Facts:
    method = request.payment_method
    hints = method.card_hints
    return Facts(
        method=method_name,
        scheme=hints.scheme,
        bin=hints.bin,
        issuer_country=hints.issuer_country,
        channel=Channel.Name(request.channel).removeprefix("CHANNEL_"),
        customer_id=request.customer_id,
        metadata=request.metadata,
        card_type=_CARD_TYPES[hints.card_type],
        instrument=method.token
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
    since = at - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


# --- values to messages ---------------------------------------------------------------------------


@lru_cache(maxsize=TIMES_CACHED_MAX)
def to_timestamp(at: datetime | None) -> Timestamp | None:
    """For reading only: it is copied where it is assigned."""
    if at is None:
        return None
    seconds, microseconds = divmod(to_microseconds(at), 1_000_000)
    return Timestamp(seconds=seconds, nanos=microseconds * 1000)


# The numbers of the domain's enums are those of the contract, which a test compares; to the type
# checker, `ValueType` makes one the other.


_ADVICE = ("advice_action", "advice_code", "advice_scheme", "advice_retry_after_s")


def _outcome(outcome: Outcome) -> outcome_pb2.Outcome:
    told = outcome.told()
    for name in _ADVICE:
        told.pop(name, None)
    # The contract's names are the domain's, which a test compares.
    message = outcome_pb2.Outcome(**told)
    if outcome.advice_action or outcome.advice_code:
        advice = message.advice
        advice.action = outcome_pb2.AdviceAction.ValueType(outcome.advice_action)
        advice.code = outcome.advice_code
        advice.scheme = outcome.advice_scheme
        if outcome.advice_retry_after_s is not None:
            advice.retry_after.seconds = outcome.advice_retry_after_s
    return message


def _duration(milliseconds: float) -> Duration:
    seconds, microseconds = divmod(round(milliseconds * 1000), 1_000_000)
    return Duration(seconds=seconds, nanos=microseconds * 1000)


# Some messages are joined as bytes, in the order of their fields' numbers as protobuf writes them:
# each is encoded once, where messages that are assigned to messages are copied each time.
_ATTEMPT_OUTCOME, _ATTEMPT_PROCESSING_TIME = 7, 8
_OPERATION_OUTCOME, _OPERATION_ATTEMPTS = 12, 13
_EVENT_PAYMENT, _EVENT_OPERATION, _EVENT_ID = 3, 4, 5


def _encode_attempt(operation_id: str, attempt: Attempt, outcome: bytes | None) -> bytes:
    """An attempt with its encoded outcome."""
    encoded = payment_pb2.Attempt(
        number=attempt.number,
        connector=attempt.connector,
        connector_account_id=attempt.connector_account_id,
        connector_reference=f"{operation_id}-{attempt.number}",
        delivery=payment_pb2.Delivery.ValueType(attempt.delivery),
        connector_transaction_id=attempt.connector_transaction_id,
    ).SerializeToString()
    if outcome is not None:
        encoded += length_delimited(_ATTEMPT_OUTCOME, outcome)
    if attempt.processing_ms is not None:
        duration = _duration(attempt.processing_ms).SerializeToString()
        encoded += length_delimited(_ATTEMPT_PROCESSING_TIME, duration)
    return encoded


def _next_action(action: NextAction | None) -> payment_pb2.NextAction | None:
    if action is None:
        return None
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
    return message


def encode_operation(operation: Operation) -> bytes:
    """An operation as the contract's Operation."""
    attempts: list[bytes] = []
    latest: bytes | None = None
    for attempt in (*operation.superseded_attempts, operation.attempt):
        outcome = None
        if attempt.outcome is not None:
            latest = outcome = _outcome(attempt.outcome).SerializeToString()
        encoded = _encode_attempt(operation.operation_id, attempt, outcome)
        attempts.append(length_delimited(_OPERATION_ATTEMPTS, encoded))
    return b"".join(
        (
            payment_pb2.Operation(
                operation_id=operation.operation_id,
                payment_id=operation.payment_id,
                merchant_id=operation.merchant_id,
                parent_operation_id=operation.parent_operation_id or "",
                kind=payment_pb2.OperationKind.ValueType(operation.kind),
                origin=payment_pb2.OperationOrigin.ValueType(operation.origin),
                state=payment_pb2.OperationState.ValueType(operation.state),
                amount=money_pb2.Money(
                    amount_minor=operation.amount_minor, currency_code=operation.currency
                ),
                idempotency_key=operation.idempotency_key or "",
                epoch=operation.epoch,
                final=operation.final,
            ).SerializeToString(),
            b"" if latest is None else length_delimited(_OPERATION_OUTCOME, latest),
            *attempts,
            payment_pb2.Operation(
                allocations=[
                    payment_pb2.RefundAllocation(
                        capture_operation_id=capture_id, amount_minor=part_minor
                    )
                    for capture_id, part_minor in operation.allocations
                ],
                next_action=_next_action(operation.next_action),
                reason=operation.reason,
                merchant_transaction_id=operation.merchant_transaction_id,
                created_at=to_timestamp(operation.created_at),
                updated_at=to_timestamp(operation.updated_at),
                route=_route(operation),
            ).SerializeToString(),
        )
    )


def _route(operation: Operation) -> payment_pb2.Route | None:
    if not operation.note or operation.kind not in (OperationKind.AUTHORIZE, OperationKind.VERIFY):
        return None
    return _decode_route(operation.note)


@lru_cache(maxsize=ROUTES_CACHED_MAX)
def _decode_route(note: str) -> payment_pb2.Route | None:
    decision = record.decode(note)
    return None if decision is None else route_message(decision)


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


def encode_payment(payment: Payment) -> bytes:
    """A payment as the contract's Payment."""
    # What is as in the request has the highest field numbers, so the two parts are one encoding.
    return _encode_own_fields(payment) + _decode_details(payment.details).echo


def _encode_own_fields(payment: Payment) -> bytes:
    return payment_pb2.Payment(
        payment_id=payment.payment_id,
        merchant_id=payment.merchant_id,
        mode=payment_pb2.Mode.ValueType(payment.mode),
        state=payment_pb2.PaymentState.ValueType(payment.state),
        version=payment.version,
        amounts=money_pb2.PaymentAmounts(
            currency_code=payment.currency,
            requested_minor=payment.requested_minor,
            authorized_minor=payment.authorized_minor,
            capture_pending_minor=payment.capture_pending_minor,
            captured_minor=payment.captured_minor,
            refund_pending_minor=payment.refund_pending_minor,
            refunded_minor=payment.refunded_minor,
            voided_minor=payment.voided_minor,
            increment_pending_minor=payment.increment_pending_minor,
            authorized_reported_minor=payment.authorized_reported_minor,
            captured_reported_minor=payment.captured_reported_minor,
            refunded_reported_minor=payment.refunded_reported_minor,
        ),
        capture_method=CaptureMethodPb.ValueType(payment.capture_method),
        capture_closed=payment.capture_closed,
        cancel_requested=payment.cancel_requested,
        authorization_expires_at=to_timestamp(payment.authorization_expires_at),
        connector=payment.connector,
        connector_account_id=payment.connector_account_id,
        connector_transaction_id=payment.connector_transaction_id,
        auth_code=payment.auth_code,
        network_transaction_id=payment.network_transaction_id,
        created_at=to_timestamp(payment.created_at),
        updated_at=to_timestamp(payment.updated_at),
    ).SerializeToString(deterministic=True)


# --- details: what a payment keeps of its request -------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Details:
    echo: bytes
    """The fields of Payment that are as in the request, encoded."""
    payment_method_token: str
    connector_fields: Mapping[str, object]


_ECHOED_MESSAGES: Final = (
    "payment_method",
    "stored_credential",
    "three_ds",
    "billing_address",
    "amount_details",
)
_NO_CONNECTOR_FIELDS: Mapping[str, object] = MappingProxyType({})


@lru_cache(maxsize=DETAILS_CACHED_MAX)
def _decode_details(details: bytes) -> _Details:
    request = AuthorizePaymentRequest.FromString(details)
    echo = payment_pb2.Payment(
        customer_id=request.customer_id,
        profile_id=request.profile_id,
        merchant_transaction_id=request.merchant_transaction_id,
        merchant_order_id=request.merchant_order_id,
        channel=request.channel,
        initiator=request.initiator,
        statement_descriptor=request.statement_descriptor,
        statement_descriptor_suffix=request.statement_descriptor_suffix,
        allow_partial_approval=request.allow_partial_approval,
        return_url=request.return_url,
        metadata=request.metadata,
    )
    for name in _ECHOED_MESSAGES:
        if request.HasField(name):
            getattr(echo, name).CopyFrom(getattr(request, name))
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
        echo.SerializeToString(deterministic=True), request.payment_method.token, fields
    )


# --- answers --------------------------------------------------------------------------------------

# The five money responses have the same field numbers, and so has GetOperationResponse but for
# `replay`: one encoding serves them all.
_OPERATION, _PAYMENT, _REPLAY = 1, 2, 3


def encode_found(found: Found) -> bytes:
    """An operation with its payment: a money response without `replay`, or GetOperationResponse."""
    return length_delimited(_OPERATION, encode_operation(found.operation)) + length_delimited(
        _PAYMENT, encode_payment(found.payment)
    )


def encode_answer(answer: Answer) -> bytes:
    """A money response: the stored bytes, with the `replay` field appended to a repeat."""
    if not answer.replayed:
        return answer.response
    replay = payment_pb2.Replay(replayed=True, first_request_id=answer.first_request_id)
    return answer.response + length_delimited(_REPLAY, replay.SerializeToString())


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
        return length_delimited(_OPERATION, encode_operation(operation)) + length_delimited(
            _PAYMENT, encode_payment(payment)
        )

    def change(
        self, event_id: str, event_type: str, operation: Operation, payment: Payment
    ) -> tuple[bytes, bytes]:
        """A money response without its `replay` field, and a PaymentEvent."""
        encoded_operation, encoded_payment = encode_operation(operation), encode_payment(payment)
        response = length_delimited(_OPERATION, encoded_operation) + length_delimited(
            _PAYMENT, encoded_payment
        )
        head = payment_pb2.PaymentEvent(event_version=EVENT_VERSION, event_type=event_type)
        event = b"".join(
            (
                head.SerializeToString(),
                length_delimited(_EVENT_PAYMENT, encoded_payment),
                length_delimited(_EVENT_OPERATION, encoded_operation),
                length_delimited(_EVENT_ID, event_id.encode()),
            )
        )
        return response, event

    def connector_fields(self, payment: Payment) -> tuple[str, Mapping[str, object]]:
        """The payment method's token (empty for another method) and the fields of the request that
        are the connector's, in the JSON form of the contract with its field names.
        """
        details = _decode_details(payment.details)
        return details.payment_method_token, details.connector_fields
