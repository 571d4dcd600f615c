"""Payments, operations and attempts as values.

The numbers of the enums are those of the contract.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import IntEnum
from typing import Any, TypeVar, cast

from gateway.domain.making import copier, maker

_T = TypeVar("_T")


class Mode(IntEnum):
    """Whether real money moves."""

    LIVE = 1
    TEST = 2


class CaptureMethod(IntEnum):
    """When authorized money is captured."""

    AUTOMATIC = 1
    MANUAL = 2
    MANUAL_MULTIPLE = 3


class OperationKind(IntEnum):
    """What an operation does."""

    AUTHORIZE = 1
    CAPTURE = 2
    VOID = 3
    REFUND = 4
    INCREMENT = 5
    VERIFY = 6
    REVERSAL = 7
    DISPUTE = 8


SENT_KINDS = frozenset(OperationKind) - {OperationKind.DISPUTE}
"""What a connector sends; the others are told by the PSP only."""


class OperationOrigin(IntEnum):
    """Who started an operation."""

    CLIENT = 1
    PSP = 2
    GATEWAY = 3


class OperationState(IntEnum):
    """The state of an operation; `gateway.domain.states` holds the allowed moves."""

    PROCESSING = 1
    REQUIRES_ACTION = 2
    PENDING = 3
    SUCCEEDED = 4
    DECLINED = 5
    FAILED = 6
    NOT_SENT = 7
    IN_DOUBT = 8
    CANCELED = 9
    EXPIRED = 10


class PaymentState(IntEnum):
    """The state of a payment, derived from its operations."""

    PROCESSING = 1
    REQUIRES_ACTION = 2
    PENDING = 3
    IN_DOUBT = 4
    AUTHORIZED = 5
    PARTIALLY_CAPTURED = 6
    CAPTURED = 7
    PARTIALLY_REFUNDED = 8
    REFUNDED = 9
    VOIDED = 10
    DECLINED = 11
    FAILED = 12
    NOT_SENT = 13
    CANCELED = 14
    EXPIRED = 15
    VERIFIED = 16


class Delivery(IntEnum):
    """How far an attempt came on its way to the PSP."""

    NOT_SENT = 1
    MAY_HAVE_BEEN_SENT = 2
    ANSWERED = 3


class Verdict(IntEnum):
    """What a PSP's answer says about an operation."""

    APPROVED = 1
    DECLINED = 2
    PENDING = 3
    REQUIRES_ACTION = 4
    FAILED = 5
    CANCELED = 6
    EXPIRED = 7
    UNKNOWN = 8


class DoubtCause(IntEnum):
    """Why recovery has not settled an operation."""

    UNSPECIFIED = 0
    SENDER_SILENT = 1
    NO_ANSWER = 2
    NO_MEANS = 3
    CONNECTOR_MISSING = 4
    WAITS_FOR_OPERATION = 5


class DoubtOutcome(IntEnum):
    """What a person found out about an operation in doubt."""

    TOOK_EFFECT = 1
    NO_EFFECT = 2
    DECLINED = 3
    FAILED = 4
    CANCELED = 5


class ResponseCode(IntEnum):
    """The unified response code (the contract's ResponseCode names the ISO 8583 codes)."""

    UNSPECIFIED = 0
    APPROVED = 1
    PARTIALLY_APPROVED = 2
    REFER_TO_ISSUER = 3
    INVALID_MERCHANT = 4
    PICK_UP_CARD = 5
    DO_NOT_HONOR = 6
    INVALID_TRANSACTION = 7
    INVALID_AMOUNT = 8
    INVALID_CARD_NUMBER = 9
    REENTER_TRANSACTION = 10
    LOST_CARD = 11
    STOLEN_CARD = 12
    INSUFFICIENT_FUNDS = 13
    EXPIRED_CARD = 14
    WRONG_PIN = 15
    NOT_PERMITTED = 16
    SUSPECTED_FRAUD = 17
    EXCEEDS_AMOUNT_LIMIT = 18
    RESTRICTED_CARD = 19
    SECURITY_VIOLATION = 20
    EXCEEDS_FREQUENCY_LIMIT = 21
    ISSUER_UNAVAILABLE = 22
    SYSTEM_MALFUNCTION = 23
    AUTHENTICATION_REQUIRED = 24
    INVALID_PAYMENT_METHOD = 25
    PARTIAL_APPROVAL_REVERSED = 26
    REJECTED_BY_CONNECTOR = 27
    REFERENCE_CANCELED = 28
    DECLINED_OTHER = 29


class AdviceAction(IntEnum):
    """What may be done after a decline."""

    UNSPECIFIED = 0
    DO_NOT_RETRY = 1
    RETRY_LATER = 2
    RETRY_AFTER = 3
    RETRY_AFTER_INSTRUMENT_UPDATE = 4
    STOP_RECURRING = 5


class AvsResult(IntEnum):
    """The result of the address verification, normalised."""

    UNSPECIFIED = 0
    FULL_MATCH = 1
    FULL_MATCH_ZIP9 = 2
    ADDRESS_ONLY = 3
    POSTAL_CODE_ONLY = 4
    ZIP9_ONLY = 5
    NO_MATCH = 6
    UNAVAILABLE = 7
    RETRY = 8
    UNSUPPORTED = 9
    GLOBAL_UNAVAILABLE = 10


class CvvResult(IntEnum):
    """The result of the card verification value check, normalised."""

    UNSPECIFIED = 0
    MATCH = 1
    NO_MATCH = 2
    NOT_PROCESSED = 3
    SHOULD_BE_PRESENT = 4
    ISSUER_NOT_PARTICIPATING = 5


@dataclass(slots=True)
class Outcome:
    """What was answered: unified code, the connector's raw codes, the network's raw codes."""

    response_code: ResponseCode = ResponseCode.UNSPECIFIED
    connector_code: str = ""
    connector_message: str = ""
    network_code: str = ""
    network_code_scheme: str = ""
    advice_action: AdviceAction = AdviceAction.UNSPECIFIED
    advice_retry_after_s: int | None = None
    advice_code: str = ""
    advice_scheme: str = ""
    avs_result: AvsResult = AvsResult.UNSPECIFIED
    avs_code: str = ""
    cvv_result: CvvResult = CvvResult.UNSPECIFIED
    cvv_code: str = ""
    auth_code: str = ""
    network_transaction_id: str = ""
    retrieval_reference_number: str = ""
    system_trace_audit_number: str = ""
    acquirer_reference_number: str = ""
    amount_reported_minor: int | None = None

    def told(self) -> dict[str, Any]:
        """The fields that are not at their defaults, by name."""
        return _told_of_outcome(self)


@dataclass(frozen=True, slots=True)
class QrCode:
    """A code for the customer to scan."""

    data: str = ""
    """What it says."""
    image_url: str = ""
    page_url: str = ""


@dataclass(frozen=True, slots=True)
class Voucher:
    """A number to pay by."""

    number: str = ""
    entity: str = ""
    """Whom it pays, where the method has such a number."""
    page_url: str = ""


@dataclass(frozen=True, slots=True)
class NextAction:
    """What the customer has to do: at most one thing; none where the PSP does not say what."""

    redirect_url: str = ""
    qr_code: QrCode | None = None
    voucher: Voucher | None = None
    await_approval: bool = False
    expires_at: datetime | None = None
    """Until when; None in a PSP's answer that does not say it."""


@dataclass(slots=True)
class ConnectorAnswer:
    """What came of asking a PSP for one attempt: by sending it, by querying or by cancelling it."""

    delivery: Delivery
    verdict: Verdict = Verdict.UNKNOWN
    outcome: Outcome | None = None
    connector_transaction_id: str = ""
    currency: str = ""
    """The currency that the PSP reported; empty where it reports none."""
    processing_ms: float | None = None
    """How long the PSP said that it worked on the request, in milliseconds."""
    next_action: NextAction | None = None
    """With REQUIRES_ACTION, as far as the PSP says it."""
    authorization_expires_at: datetime | None = None
    reason: str = ""
    """Where there is no answer: a Reason."""
    attempt_number: int | None = None
    """Where it is kept as evidence: the attempt that it is the answer to."""


@dataclass(slots=True)
class Attempt:
    """One try of an operation at one PSP."""

    number: int
    connector: str
    connector_account_id: str
    delivery: Delivery = Delivery.MAY_HAVE_BEEN_SENT
    connector_transaction_id: str = ""
    outcome: Outcome | None = None
    processing_ms: float | None = None


@dataclass(slots=True)
class Operation:
    """One thing done to a payment. Treat as a value: change a copy made by `copy_with`."""

    merchant_id: str
    operation_id: str
    payment_id: str
    kind: OperationKind
    origin: OperationOrigin
    state: OperationState
    amount_minor: int
    currency: str
    attempt: Attempt
    epoch: int = 1
    parent_operation_id: str | None = None
    final: bool = False
    idempotency_key: str | None = None
    fingerprint: bytes | None = None
    request_id: str = ""
    """The id of the request that started it; replays tell it as first_request_id."""
    merchant_transaction_id: str = ""
    note: str = ""
    """A void's or refund's reason, as the client gave it; the reference that a reversal takes back;
    why an authorization goes where it goes (`gateway.routing.record`), where rules decided."""
    reason: str = ""
    """Why it ended without an answer of the PSP: a Reason."""
    next_action: NextAction | None = None
    """While REQUIRES_ACTION."""
    allocations: tuple[tuple[str, int], ...] = ()
    """For a refund: (capture's operation id, part in minor units)."""
    superseded_attempts: tuple[Attempt, ...] = ()
    response: bytes | None = None
    """The frozen answer without its `replay` field; None until there is one."""
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def reference(self) -> str:
        """The reference of the present attempt at the PSP."""
        return f"{self.operation_id}-{self.attempt.number}"

    def copy(self) -> "Operation":
        """A copy, whose fields may be changed one by one: for less than `copy_with` costs."""
        return _copy_operation(self)

    def copy_with(self, **changes: Any) -> "Operation":
        """A copy in which the named fields are changed."""
        new = _copy_operation(self)
        for name, change in changes.items():
            setattr(new, name, change)
        return new


@dataclass(slots=True)
class Payment:
    """A payment. Treat as a value: change a copy made by `copy_with`. Amounts are minor units."""

    merchant_id: str
    payment_id: str
    mode: Mode
    state: PaymentState
    currency: str
    capture_method: CaptureMethod
    requested_minor: int
    connector: str
    connector_account_id: str
    version: int = 1
    authorized_minor: int = 0
    capture_pending_minor: int = 0
    captured_minor: int = 0
    refund_pending_minor: int = 0
    refunded_minor: int = 0
    voided_minor: int = 0
    increment_pending_minor: int = 0
    authorized_reported_minor: int | None = None
    captured_reported_minor: int | None = None
    refunded_reported_minor: int | None = None
    capture_closed: bool = False
    cancel_requested: bool = False
    connector_transaction_id: str = ""
    auth_code: str = ""
    network_transaction_id: str = ""
    authorization_expires_at: datetime | None = None
    merchant_order_id: str = ""
    allow_partial_approval: bool = False
    details: bytes = b""
    """The request's remaining fields, in the encoding of the contract; opaque here."""
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def copy(self) -> "Payment":
        """A copy, whose fields may be changed one by one: for less than `copy_with` costs."""
        return _copy_payment(self)

    def copy_with(self, **changes: Any) -> "Payment":
        """A copy in which the named fields are changed."""
        new = _copy_payment(self)
        for name, change in changes.items():
            setattr(new, name, change)
        return new


def _teller(cls: type[_T]) -> Callable[[_T], dict[str, Any]]:
    """A function that gives an instance's fields that are not at their defaults, which are all None
    or false: written out, since most of many fields are at their defaults.
    """
    lines = ["def tell(value):\n    told = {}\n"]
    for each in fields(cast("Any", cls)):
        condition = f"value.{each.name}" + (" is not None" if each.default is None else "")
        lines.append(f"    if {condition}:\n        told[{each.name!r}] = value.{each.name}\n")
    names: dict[str, Any] = {}
    exec("".join(lines) + "    return told\n", names)  # noqa: S102 (as in `making`)
    return cast("Callable[[_T], dict[str, Any]]", names["tell"])


_told_of_outcome = _teller(Outcome)
_copy_operation = copier(Operation)
_copy_payment = copier(Payment)

make_attempt = maker(Attempt)
make_operation = maker(Operation)
make_payment = maker(Payment)


@dataclass(slots=True)
class Discrepancy:
    """A fact that a PSP reported and that contradicts what the gateway holds; for a person."""

    merchant_id: str
    payment_id: str
    operation_id: str
    kind: str
    """What differs, as `captured_amount`."""
    expected: str
    reported: str


@dataclass(slots=True)
class Aggregate:
    """A payment with all its operations, the oldest first."""

    payment: Payment
    operations: list[Operation] = field(default_factory=list)
