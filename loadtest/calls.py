"""The calls of a load test: requests made from prebuilt bytes, answers read as far as needed.

The generator shares two cores with what it measures, so a request is a few byte strings joined: a
message's fields may come in any order, and only the key and the amount change.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from payments.v1.money_pb2 import Money
from payments.v1.payment_method_pb2 import (
    CAPTURE_METHOD_MANUAL,
    CHANNEL_ECOMMERCE,
    INITIATOR_CUSTOMER,
    PaymentMethod,
)
from payments.v1.payment_pb2 import OperationState, Payment
from payments.v1.payment_service_pb2 import (
    AuthorizePaymentRequest,
    AuthorizePaymentResponse,
    BatchAuthorizePaymentsResponse,
    CapturePaymentRequest,
    GetOperationRequest,
    GetOperationResponse,
    GetPaymentRequest,
    GetPaymentResponse,
    IncrementAuthorizationRequest,
    ListPaymentsRequest,
    ListPaymentsResponse,
    RefundPaymentRequest,
    StreamAuthorizePaymentsResponse,
    VoidPaymentRequest,
)

from loadtest.mixes import Draw, Kind, Mix, zipf_weights

SERVICE: Final = "payments.v1.PaymentService"
CURRENCY: Final = "EUR"
AMOUNTS_MINOR: Final = range(1000, 16_001, 250)
"""The amounts that are drawn; none of them means anything to the simulator."""
INCREMENT_MINOR: Final = 100
REMEMBERED_MAX: Final = 10_000
"""Payments and calls that are kept for captures, replays and reads, of each kind."""
LIST_PAGE_SIZE: Final = 20

METHODS: Final = {
    Kind.AUTHORIZE: "AuthorizePayment",
    Kind.DECLINE: "AuthorizePayment",
    Kind.VERIFY: "AuthorizePayment",
    Kind.CAPTURE: "CapturePayment",
    Kind.VOID: "VoidPayment",
    Kind.REFUND: "RefundPayment",
    Kind.INCREMENT: "IncrementAuthorization",
    Kind.GET_PAYMENT: "GetPayment",
    Kind.GET_OPERATION: "GetOperation",
    Kind.LIST_PAYMENTS: "ListPayments",
    Kind.BATCH: "BatchAuthorizePayments",
    Kind.STREAM: "StreamAuthorizePayments",
}
"""A replay calls what it repeats."""

OK: Final = 0
"""gRPC's own codes are 0 to 16; beyond them stand ours."""
UNKNOWN: Final = 2
DROPPED: Final = 100
"""Not sent: as many calls as may be were in flight."""
UNEXPECTED: Final = 101
"""Answered, with another state than the test token asks for."""
CONTRADICTED: Final = 102
"""Answered about another key or amount than was sent."""

SUCCEEDED: Final = OperationState.OPERATION_STATE_SUCCEEDED
DECLINED: Final = OperationState.OPERATION_STATE_DECLINED
NEVER_FROZEN: Final = frozenset(
    {
        OperationState.OPERATION_STATE_PROCESSING,
        OperationState.OPERATION_STATE_IN_DOUBT,
        OperationState.OPERATION_STATE_NOT_SENT,
    }
)
"""Answers that a later look may replace."""

T = TypeVar("T")


class Acknowledged(NamedTuple):
    """What a caller was told about an operation, or that it was told nothing."""

    kind: str
    merchant_id: str
    key: str
    operation_id: str
    payment_id: str
    state: int
    """OperationState; where no answer came, the status code, negative."""
    amount_minor: int
    digest: str
    """Of the answer without its replay field; empty where its bytes are not at hand."""


class Answer(NamedTuple):
    """What is measured of an answer."""

    code: int
    processing_ms: float
    """The delay that the PSP drew for this call; 0 where it was not asked."""


@dataclass(slots=True)
class Call:
    """A request that is ready to be sent, and what its answer must say."""

    kind: Kind
    method: str
    data: bytes
    read: Callable[["Call", bytes], Answer]
    key: str = ""
    merchant_id: str = ""
    amount_minor: int = 0
    payment_id: str = ""
    items: tuple["Call", ...] = ()
    repeats: Kind | None = None
    """For a replay: what is repeated."""


@dataclass(frozen=True, slots=True)
class _Payment:
    merchant: int
    payment_id: str
    amount_minor: int


class Book:
    """Makes the calls of one generator, and learns from their answers what can be called next."""

    def __init__(
        self,
        mix: Mix,
        merchant_ids: Sequence[str],
        *,
        run_id: str,
        share: int = 0,
        seed: int = 1,
        batch_items: int = 20,
        echoed: bool = False,
    ) -> None:
        """`merchant_ids` may be one empty text: the key's only merchant.

        `echoed`: every answer is the same, as of a control run's server; it is read and not
        compared.
        """
        source = random.Random(f"{seed}/{share}")
        self._merchant_ids = merchant_ids
        self._draw_kind = Draw(list(mix.weights), list(mix.weights.values()), source)
        self._draw_merchant = Draw(
            range(len(merchant_ids)), zipf_weights(len(merchant_ids), mix.zipf_exponent), source
        )
        self._source = source
        self._batch_items = batch_items
        self._echoed = echoed
        # A letter before each number: digits alone may look like a card number, and are refused.
        self._key_prefix = f"load-r{run_id}-g{share:03d}-n"
        self._number = 0
        self._amounts = [
            (amount_minor, _field(3, _money(amount_minor).SerializeToString()))
            for amount_minor in AMOUNTS_MINOR
        ]
        self._heads = {
            kind: [_authorization(kind, merchant_id) for merchant_id in merchant_ids]
            for kind in (Kind.AUTHORIZE, Kind.DECLINE, Kind.VERIFY)
        }
        self._nothing = _field(3, _money(0).SerializeToString())
        self._authorized: deque[_Payment] = deque(maxlen=REMEMBERED_MAX)
        self._captured: deque[_Payment] = deque(maxlen=REMEMBERED_MAX)
        self._known: deque[tuple[_Payment, str]] = deque(maxlen=REMEMBERED_MAX)
        self._repeatable: deque[Call] = deque(maxlen=REMEMBERED_MAX)
        self._merchant_numbers = {each: number for number, each in enumerate(merchant_ids)}
        # Where nothing follows an authorization, nothing is remembered of it.
        self._follows = bool(mix.weights.keys() - {Kind.AUTHORIZE, Kind.DECLINE, Kind.VERIFY})
        self.acknowledged: list[Acknowledged] = []
        """What callers were told since this was last emptied."""
        self._makers: dict[Kind, Callable[[], Call | None]] = {
            Kind.AUTHORIZE: lambda: self._authorize(Kind.AUTHORIZE),
            Kind.DECLINE: lambda: self._authorize(Kind.DECLINE),
            Kind.VERIFY: lambda: self._authorize(Kind.VERIFY),
            Kind.CAPTURE: self._capture,
            Kind.VOID: self._void,
            Kind.REFUND: self._refund,
            Kind.INCREMENT: self._increment,
            Kind.REPLAY: self._replay,
            Kind.GET_PAYMENT: self._get_payment,
            Kind.GET_OPERATION: self._get_operation,
            Kind.LIST_PAYMENTS: self._list_payments,
            Kind.BATCH: lambda: self._several(Kind.BATCH),
            Kind.STREAM: lambda: self._several(Kind.STREAM),
        }

    def next(self) -> Call:
        """The next call. One that needs a payment is an authorization while there is none."""
        call = self._makers[self._draw_kind()]()
        return self._authorize(Kind.AUTHORIZE) if call is None else call

    def unanswered(self, call: Call, code: int) -> None:
        """No answer came but a status code, which the records keep: a time-out is no failure."""
        for each in call.items or (call,):
            if each.key:
                kind = each.repeats if each.repeats is not None else each.kind
                self.acknowledged.append(
                    Acknowledged(
                        kind.name, each.merchant_id, each.key, "", "", -code, each.amount_minor, ""
                    )
                )

    # --- requests ---------------------------------------------------------------------------------

    def _key(self) -> tuple[str, bytes]:
        self._number += 1
        key = f"{self._key_prefix}{self._number:08d}"
        return key, _field(2, key.encode())

    def _authorize(self, kind: Kind) -> Call:
        merchant = self._draw_merchant()
        key, key_field = self._key()
        if kind is Kind.VERIFY:
            amount_minor, amount = 0, self._nothing
        else:
            amount_minor, amount = self._amounts[int(self._source.random() * len(self._amounts))]
        return Call(
            kind,
            "AuthorizePayment",
            self._heads[kind][merchant] + key_field + amount,
            self._read_money,
            key,
            self._merchant_ids[merchant],
            amount_minor,
        )

    def _several(self, kind: Kind) -> Call:
        items = tuple(self._authorize(Kind.AUTHORIZE) for _ in range(self._batch_items))
        data = b"".join(
            _field(1, _field(1, item.key.encode()) + _field(2, item.data)) for item in items
        )
        return Call(kind, METHODS[kind], data, self._read_several, items=items)

    def _capture(self) -> Call | None:
        payment = _oldest(self._authorized)
        if payment is None:
            return None
        request = CapturePaymentRequest(payment_id=payment.payment_id)
        return self._on_payment(Kind.CAPTURE, payment, request, payment.amount_minor)

    def _void(self) -> Call | None:
        payment = _oldest(self._authorized)
        if payment is None:
            return None
        request = VoidPaymentRequest(payment_id=payment.payment_id)
        return self._on_payment(Kind.VOID, payment, request, payment.amount_minor)

    def _refund(self) -> Call | None:
        payment = _oldest(self._captured)
        if payment is None:
            return None
        # A half, so that it is a partial refund as often as not.
        amount_minor = payment.amount_minor // 2 or payment.amount_minor
        request = RefundPaymentRequest(payment_id=payment.payment_id, amount=_money(amount_minor))
        return self._on_payment(Kind.REFUND, payment, request, amount_minor)

    def _increment(self) -> Call | None:
        payment = _oldest(self._authorized)
        if payment is None:
            return None
        request = IncrementAuthorizationRequest(
            payment_id=payment.payment_id, additional_amount=_money(INCREMENT_MINOR)
        )
        return self._on_payment(Kind.INCREMENT, payment, request, INCREMENT_MINOR)

    def _on_payment(self, kind: Kind, payment: _Payment, request: Any, amount_minor: int) -> Call:
        key, key_field = self._key()
        merchant_id = request.merchant_id = self._merchant_ids[payment.merchant]
        return Call(
            kind,
            METHODS[kind],
            request.SerializeToString() + key_field,
            self._read_money,
            key,
            merchant_id,
            amount_minor,
            payment.payment_id,
        )

    def _replay(self) -> Call | None:
        first = _oldest(self._repeatable)
        return first and Call(
            Kind.REPLAY,
            first.method,
            first.data,
            self._read_money,
            first.key,
            first.merchant_id,
            first.amount_minor,
            first.payment_id,
            repeats=first.kind,
        )

    def _get_payment(self) -> Call | None:
        if not self._known:
            return None
        payment, _ = self._source.choice(self._known)
        request = GetPaymentRequest(
            merchant_id=self._merchant_ids[payment.merchant], payment_id=payment.payment_id
        )
        return Call(
            Kind.GET_PAYMENT,
            METHODS[Kind.GET_PAYMENT],
            request.SerializeToString(),
            _read_payment,
            payment_id=payment.payment_id,
        )

    def _get_operation(self) -> Call | None:
        if not self._known:
            return None
        payment, key = self._source.choice(self._known)
        request = GetOperationRequest(
            merchant_id=self._merchant_ids[payment.merchant], idempotency_key=key
        )
        return Call(
            Kind.GET_OPERATION,
            METHODS[Kind.GET_OPERATION],
            request.SerializeToString(),
            _read_operation,
            payment_id=payment.payment_id,
        )

    def _list_payments(self) -> Call:
        request = ListPaymentsRequest(
            merchant_id=self._merchant_ids[self._draw_merchant()], page_size=LIST_PAGE_SIZE
        )
        return Call(
            Kind.LIST_PAYMENTS,
            METHODS[Kind.LIST_PAYMENTS],
            request.SerializeToString(),
            _read_list,
        )

    # --- answers ----------------------------------------------------------------------------------

    def _read_money(self, call: Call, data: bytes) -> Answer:
        # Every money response has the same fields.
        response = AuthorizePaymentResponse.FromString(data)
        replayed = call.kind is Kind.REPLAY
        if response.HasField("replay"):
            tail = _field(3, response.replay.SerializeToString())
            if not replayed or not data.endswith(tail):
                return Answer(CONTRADICTED, 0.0)
            data = data[: -len(tail)]
        elif replayed:
            return Answer(UNEXPECTED, 0.0)
        digest = hashlib.sha256(data).hexdigest()
        if self._echoed:
            return Answer(OK, 0.0)
        return self._learn(call, response, digest)

    def _read_several(self, call: Call, data: bytes) -> Answer:
        # A batch's answer, and the answers of a stream one after the other, which make one message.
        if call.kind is Kind.BATCH:
            results = BatchAuthorizePaymentsResponse.FromString(data).results
        else:
            results = StreamAuthorizePaymentsResponse.FromString(data).results
        open_items = {item.key: item for item in call.items}
        code, processing_ms = OK, 0.0
        for result in results:
            item = open_items.pop(result.item_ref, None)
            if item is None:
                return Answer(CONTRADICTED, 0.0)
            if result.HasField("error"):
                self.unanswered(item, result.error.code)
                code = code or result.error.code
                continue
            answer = self._learn(item, result.response, "")
            code = code or answer.code
            processing_ms = max(processing_ms, answer.processing_ms)
        for item in open_items.values():
            self.unanswered(item, UNKNOWN)
        return Answer(code or (UNEXPECTED if open_items else OK), processing_ms)

    def _learn(self, call: Call, response: AuthorizePaymentResponse, digest: str) -> Answer:
        operation = response.operation
        state = operation.state
        kind = call.repeats if call.repeats is not None else call.kind
        if (
            operation.idempotency_key != call.key
            or operation.amount.amount_minor != call.amount_minor
            or response.payment.payment_id != operation.payment_id
            or (call.payment_id and call.payment_id != operation.payment_id)
        ):
            return Answer(CONTRADICTED, 0.0)
        self.acknowledged.append(
            Acknowledged(
                kind.name,
                operation.merchant_id,
                call.key,
                operation.operation_id,
                operation.payment_id,
                state,
                operation.amount.amount_minor,
                "" if state in NEVER_FROZEN else digest,
            )
        )
        if state != (DECLINED if kind is Kind.DECLINE else SUCCEEDED):
            return Answer(UNEXPECTED, 0.0)
        if call.kind is Kind.REPLAY:
            return Answer(OK, 0.0)  # the PSP was not asked again
        if self._follows:
            self._remember(call, response.payment)
        drawn_ms = 0.0
        for attempt in operation.attempts:
            time = attempt.connector_processing_time
            drawn_ms += time.seconds * 1e3 + time.nanos / 1e6
        return Answer(OK, drawn_ms)

    def _remember(self, call: Call, told: Payment) -> None:
        payment = _Payment(
            self._merchant_numbers[call.merchant_id],
            told.payment_id,
            told.amounts.authorized_minor,
        )
        if call.kind in (Kind.AUTHORIZE, Kind.INCREMENT):
            self._authorized.append(payment)
        elif call.kind is Kind.CAPTURE:
            self._captured.append(payment)
        self._known.append((payment, call.key))
        self._repeatable.append(call)


def sample_request(merchant_id: str, key: str) -> bytes:
    """One authorization of the SLO's mix."""
    return (
        _authorization(Kind.AUTHORIZE, merchant_id)
        + _field(2, key.encode())
        + _field(3, _money(AMOUNTS_MINOR[0]).SerializeToString())
    )


def _read_payment(call: Call, data: bytes) -> Answer:
    told = GetPaymentResponse.FromString(data).payment.payment_id
    return Answer(OK if told == call.payment_id else CONTRADICTED, 0.0)


def _read_operation(call: Call, data: bytes) -> Answer:
    told = GetOperationResponse.FromString(data).operation.payment_id
    return Answer(OK if told == call.payment_id else CONTRADICTED, 0.0)


def _read_list(_: Call, data: bytes) -> Answer:
    ListPaymentsResponse.FromString(data)
    return Answer(OK, 0.0)


def _authorization(kind: Kind, merchant_id: str) -> bytes:
    """A request of the size that a shop sends, without key and amount."""
    token = "tok_declined_insufficient_funds" if kind is Kind.DECLINE else "tok_visa"
    return AuthorizePaymentRequest(
        merchant_id=merchant_id,
        capture_method=CAPTURE_METHOD_MANUAL,
        payment_method=PaymentMethod(token=token),
        customer_id="cus_load_000001",
        merchant_order_id="order-load-000001",
        channel=CHANNEL_ECOMMERCE,
        initiator=INITIATOR_CUSTOMER,
        statement_descriptor="LOAD TEST",
        metadata={"cart": "load-test"},
    ).SerializeToString()


def _money(amount_minor: int) -> Money:
    return Money(amount_minor=amount_minor, currency_code=CURRENCY)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field on the wire."""
    length, encoded = len(data), bytearray()
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes((number << 3 | 2,)) + encoded + data


def _oldest(queue: deque[T]) -> T | None:
    return queue.popleft() if queue else None
