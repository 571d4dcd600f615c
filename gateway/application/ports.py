"""What the use cases need of the world: connectors, the store, claims, the contract's encoding."""

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

from gateway.application.accounts import RateLimit
from gateway.domain.making import maker
from gateway.domain.model import (
    SENT_KINDS,
    Aggregate,
    CaptureMethod,
    ConnectorAnswer,
    Discrepancy,
    DoubtCause,
    DoubtOutcome,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    Payment,
    PaymentState,
)
from gateway.domain.money import AMOUNT_MINOR_MAX

# --- connectors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AmountRule:
    """Which amounts of a currency a PSP can express."""

    step_minor: int = 1
    """An amount must be a multiple of this, in minor units."""
    amount_minor_max: int = AMOUNT_MINOR_MAX


CARD: Final = "card"
"""The method of tokens and stored methods that are cards."""
NETWORK_TOKEN: Final = "network_token"  # noqa: S105 - a method's name
"""The method of network tokens. Every other one has the contract's method_type as its name."""


@dataclass(frozen=True, slots=True)
class MethodRule:
    """What a PSP can do with a payment method."""

    capture_methods: AbstractSet[CaptureMethod] = frozenset(CaptureMethod)
    currencies: AbstractSet[str] | None = None
    """None: all that the PSP takes."""
    countries: AbstractSet[str] | None = None
    """The customers' countries, ISO 3166-1 alpha-2; None: all."""
    needs: AbstractSet[str] = frozenset()
    """The fields of the contract's message of the method that a request must have."""
    needs_notifications: bool = False
    """Its end is told by notification alone: an account that takes none cannot have it."""


CARDS_ONLY: Final[Mapping[str, MethodRule]] = MappingProxyType({CARD: MethodRule()})


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a connector declares about its PSP. Without means to settle a doubt, it stays one."""

    mode: Mode
    """LIVE or TEST: a credential of one mode never reaches a connector of the other."""
    idempotent_by_reference: bool
    """A second request with the same reference gets the first one's answer and has no effect."""
    key_validity_s: float | None
    """For how long the PSP remembers a reference, in seconds; None: for ever."""
    query_by_reference: bool
    """The PSP can be asked what became of a reference."""
    cancel_by_reference: bool
    """The PSP can make a reference unusable, and takes back what it had caused."""
    answer_timeout_s: float
    """How long to wait for an answer once the request was sent, in seconds."""
    supported_fields: frozenset[str]
    """The paths of the contract's request fields that the PSP can use beyond the amount, the
    capture method and what the gateway keeps to itself; others are refused."""
    operations: AbstractSet[OperationKind] = SENT_KINDS
    """What the PSP can do; others are refused."""
    capture_methods: AbstractSet[CaptureMethod] = frozenset(CaptureMethod)
    tells_by_notification: bool = False
    """The PSP tells outcomes by notification, as those of what it only accepts; what it answers to
    a question is no newer."""
    amounts: Mapping[str, AmountRule] | None = None
    """The currencies that the PSP takes, and which amounts of each; None: all."""
    methods: Mapping[str, MethodRule] = field(default_factory=lambda: CARDS_ONLY)
    """The payment methods that the PSP takes, by their names."""


@dataclass(slots=True)
class ConnectorRequest:
    """One attempt, as a connector sends it."""

    kind: OperationKind
    reference: str
    """Our reference, unique for the attempt; the PSP's idempotency key where it has one."""
    amount_minor: int
    currency: str
    connector_account_id: str
    payment_id: str
    payment_method_token: str = ""
    """For AUTHORIZE and VERIFY."""
    capture: bool = False
    """For AUTHORIZE: capture at once."""
    final: bool = False
    """For CAPTURE: release what it leaves."""
    target_transaction_id: str = ""
    """For all others: the PSP's id of what they act on. The authorization's for CAPTURE, VOID,
    INCREMENT and REVERSAL; the capture's, or the authorization's, for REFUND. Where an
    authorization or verification is asked about or cancelled: its own, should it be known."""
    target_reference: str = ""
    """Our reference of what they act on, for a REVERSAL without the PSP's id."""
    payment_transaction_id: str = ""
    """For those that act on an authorization: the PSP's id of it, whatever `target_transaction_id`
    is."""
    authorized_minor: int = 0
    """For INCREMENT: what is authorized before it, in minor units, as the PSP reported it."""
    captured_minor: int = 0
    """For VOID: what is captured, and so stays, in minor units, as the PSP reported it."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """The contract's fields that a connector must support, where they are used, and `customer_id`,
    in the JSON form of the contract with its field names."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What only the PSP may see and nobody keeps: `number` and `cryptogram` of a network token.
    Only the caller's own sending has them; whoever asks or cancels later does without."""
    is_repeat: bool = False
    """To be cancelled or reversed: the same may have been sent before, which a host wants to be
    told."""


make_connector_request = maker(ConnectorRequest)


class Described(Protocol):
    """What is known of a connector without asking it."""

    @property
    def name(self) -> str:
        """The connector's name, as `simulator`."""

    @property
    def capabilities(self) -> Capabilities:
        """What the PSP can do."""


class Connector(Described, Protocol):
    """A payment service provider. No method raises for what the network or the PSP does."""

    async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Send one attempt and wait at most `answer_timeout_s` for its answer.

        `send_before` is a time of `time.monotonic()`; it is compared just before the request is
        written to the socket, and past it nothing is written and the delivery is NOT_SENT. The
        delivery of the answer is NOT_SENT only where surely nothing was written.
        """

    async def query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer | None:
        """Ask what became of a reference. None: the PSP does not know it, which proves nothing
        while a sender may be alive. Delivery MAY_HAVE_BEEN_SENT: the PSP did not answer now.
        Delivery NOT_SENT: it had no effect, and by asking was made unusable.

        `request` is the attempt as it was sent, for PSPs that cannot be asked by reference alone.
        """

    async def cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer:
        """Make a reference unusable. Verdict CANCELED: it had taken effect, which was taken back;
        delivery NOT_SENT: it had no effect and never will; DECLINED or FAILED: it had been refused
        before; APPROVED: it stands, and the PSP does not take it back, since later operations rest
        on it; PENDING: the PSP will take it back, and a notification tells whether it did, with the
        id that is answered; delivery MAY_HAVE_BEEN_SENT: the PSP did not answer, nothing is known.

        `request` as in `query`.
        """

    async def close(self) -> None:
        """Close the connections."""


@dataclass(slots=True)
class Route:
    """Where a merchant's payments of one mode go."""

    connector: Connector
    connector_account_id: str


class Served(NamedTuple):
    """An account of a merchant, as payments are routed to it."""

    account_id: str
    connector_name: str
    priority: int
    enabled: bool
    """Otherwise it takes no new payments."""
    connector: Described | None
    """None where the account cannot be used, as where its credentials cannot be opened."""


class Router(Protocol):
    """Chooses and finds connectors."""

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        """Where a new payment goes; None where no connector serves the merchant in this mode."""

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """What may serve the merchant in this mode, by account, the lowest priority number first;
        without accounts, what `route` gives.
        """

    def connector(self, name: str, connector_account_id: str) -> Connector | None:
        """The connector of an existing attempt, with the credentials of its account."""


# --- the store ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Intent:
    """A new operation, and its payment as it will be: inserted, or changed from a version."""

    operation: Operation
    payment: Payment
    recover_after_s: float
    """Recovery does not touch the operation before the database's now + this."""
    expected_version: int | None = None
    """The payment's version before; None where the payment is new."""


class Stored(Enum):
    """What became of an intent or a change."""

    WRITTEN = 1
    DUPLICATE_KEY = 2
    """The merchant has another operation with this idempotency key; nothing was written."""
    CONFLICT = 3
    """The payment or the operation is no longer as expected; nothing was written."""


@dataclass(slots=True)
class IntentResult:
    """What became of an intent, and the database's time of it."""

    stored: Stored
    at: datetime | None = None


@dataclass(slots=True)
class Doubt:
    """When recovery is to look at an operation again."""

    check_after_s: float


@dataclass(slots=True)
class Resolution:
    """A person's decision on an operation in doubt; with what it changed, its audit record."""

    attempt_number: int
    outcome: DoubtOutcome
    connector_transaction_id: str
    amount_reported_minor: int | None
    """The PSP's amount in minor units, where it differs from the operation's."""
    reason: str
    resolved_by: str
    """An API key's id, or `login:` and a name."""
    request_id: str = ""
    resolved_at: datetime | None = None
    """By the database's clock; None until it is written."""
    state_before: OperationState = OperationState.IN_DOUBT
    state_after: OperationState = OperationState.IN_DOUBT
    payment_state_before: PaymentState = PaymentState.IN_DOUBT
    payment_state_after: PaymentState = PaymentState.IN_DOUBT
    payment_version: int = 0
    """The payment's version that it made."""

    def same_decision(self, other: "Resolution") -> bool:
        """Whether both say the same of the same attempt, whoever said it and why."""
        return (
            self.attempt_number == other.attempt_number
            and self.outcome is other.outcome
            and self.connector_transaction_id == other.connector_transaction_id
            and self.amount_reported_minor == other.amount_reported_minor
        )


@dataclass(slots=True)
class Companion:
    """An operation that begins with a change of another one, and the event that tells it.

    The capture of an automatic authorization, or a reversal, which is PROCESSING and due for
    recovery at once (recover_after = now).
    """

    operation: Operation
    event_id: str
    event_type: str
    event: bytes


@dataclass(slots=True)
class Change:
    """A change of an operation and its payment, written whole or not at all (compare and set)."""

    operation: Operation
    payment: Payment
    expected_epoch: int
    expected_state: OperationState
    expected_version: int
    event_id: str
    """New for each decision to write, and the same in all tries of one write: it alone tells
    whether this very change was written, since two callers may decide on the same one."""
    event_type: str
    event: bytes
    """The outbox event's payload, which holds its id."""
    companions: list[Companion] = field(default_factory=list)
    discrepancies: list[Discrepancy] = field(default_factory=list)
    recover_after_s: float = 0.0
    """Where the operation is PROCESSING afterwards (a new attempt): as in Intent."""
    doubt: Doubt | None = None
    """With it recovery looks at the operation again; without it recovery forgets the operation."""
    resolution: Resolution | None = None
    """Where a person decided on it: recorded in the same transaction."""


make_change = maker(Change)


@dataclass(slots=True)
class Found:
    """An operation with its payment, as they are now."""

    operation: Operation
    payment: Payment


@dataclass(frozen=True, slots=True)
class ListFilter:
    """What ListPayments looks for."""

    merchant_id: str
    mode: Mode
    page_size: int
    states: tuple[PaymentState, ...] = ()
    created_from: datetime | None = None
    created_before: datetime | None = None
    merchant_order_id: str = ""
    after: tuple[datetime, str] | None = None
    """The sort key (created_at, payment_id) of the last payment of the page before."""


@dataclass(slots=True)
class Page:
    """A page of payments, the newest first."""

    payments: list[Payment]
    next_after: tuple[datetime, str] | None
    """Where the next page begins; None at the end."""


@dataclass(slots=True)
class Lease:
    """An operation that recovery took over, its epoch already raised, with all of its payment."""

    operation: Operation
    aggregate: Aggregate
    tries: int
    """How often recovery looked at it before."""
    evidence: ConnectorAnswer | None
    """A definite answer that came to a sender who had been fenced out."""
    cancel_begun: bool
    """Recovery has begun to cancel the reference, and the cancellation may be on its way still."""
    at: datetime
    """The database's time at which it was taken over."""


class StoreUnavailable(Exception):
    """The store did not take or give what was asked for; whether a write happened is not known."""


class Store(Protocol):
    """The durable store. Every method raises StoreUnavailable where the database is away, and
    GatewayError(OVERLOADED) where a bounded queue is full.
    """

    async def write_intent(self, intent: Intent) -> IntentResult:
        """Insert the operation and insert or change its payment in one transaction."""

    async def write_change(self, change: Change) -> Stored:
        """Write a change: WRITTEN also where an earlier try of this very change was committed.
        Never refused for lack of room.
        """

    async def find_by_key(self, merchant_id: str, idempotency_key: str) -> Found | None:
        """The operation that has this idempotency key."""

    async def find_operation(
        self, merchant_id: str, operation_id: str, *, for_outcome: bool = False
    ) -> Found | None:
        """The operation with this id. `for_outcome`: whoever asks has a PSP's answer in hand, so it
        is never refused for lack of room, and repeated for as long as a change is.
        """

    async def load(
        self, merchant_id: str, payment_id: str, *, for_outcome: bool = False
    ) -> Aggregate | None:
        """A payment with all its operations. `for_outcome`: see `find_operation`."""

    async def list_payments(self, filter_: ListFilter) -> Page:
        """A page of payments."""

    async def add_evidence(
        self, operation: Operation, answer: ConnectorAnswer, seen_to: Collection[int] = ()
    ) -> ConnectorAnswer | None:
        """Keep a definite answer to the operation's present attempt, whose number it has, for
        recovery; None where the operation has a definite outcome, another attempt or another epoch
        than was read, by now.

        One answer is kept: the one that is kept now. That is an answer to an earlier attempt where
        there is one, unless its number is in `seen_to`: recovery may not have looked at it yet.
        """

    async def expired(self, limit: int) -> int:
        """Put operations whose sender has died (PROCESSING past recover_after) on recovery's list;
        returns how many.
        """

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Operation] = (),
    ) -> Sequence[Lease]:
        """Take over operations that are due, those longest due first: their epoch is raised and
        committed, so that whoever held them before is fenced out.

        `at_work`: what the caller has taken over before and is at work on; none of that is taken.
        `account_max`: how many operations of one connector account the caller may have then, those
        at work included.
        """

    async def begin_cancel(self, operation: Operation) -> bool:
        """Say durably that the leased operation's reference will be cancelled at the PSP; False
        where another recoverer has taken the operation over, or it has a definite outcome.
        """

    async def postpone(
        self,
        operation: Operation,
        check_after_s: float,
        cause: DoubtCause = DoubtCause.UNSPECIFIED,
        *,
        needs_person: bool = False,
    ) -> None:
        """Look at a leased operation again later, and keep for people why it is not settled.

        Has no effect where another recoverer, or a new attempt, has taken the operation over.
        """

    async def hasten(self, operation: Operation) -> None:
        """Have an operation on recovery's list looked at now, unless a recoverer has it."""

    async def forget(self, operation: Operation) -> None:
        """Take an operation that has a definite outcome off recovery's list."""


# --- claims ---------------------------------------------------------------------------------------


class ClaimOutcome(StrEnum):
    """What a claim met."""

    NEW = "NEW"
    """The claim is mine: go on to the intent."""
    IN_FLIGHT = "IN_FLIGHT"
    """Someone else claims the key. It proves nothing: ask PostgreSQL."""
    REPLAY = "REPLAY"
    """A frozen response to the same request."""
    CONFLICT = "CONFLICT"
    """A frozen response to another request under the same key."""
    RATE_LIMITED = "RATE_LIMITED"
    """The key is free, and the merchant's rate limit is used up: nothing was claimed."""
    UNAVAILABLE = "UNAVAILABLE"
    """Redis gave no usable answer: go on, PostgreSQL decides."""


@dataclass(slots=True)
class ClaimResult:
    """The answer to a claim."""

    outcome: ClaimOutcome
    nonce: bytes = b""
    """NEW and UNAVAILABLE: the claim's owner, for `Claims.release`. After UNAVAILABLE the claim may
    stand in Redis all the same. Empty when nothing can have been sent."""
    generation: str = ""
    """The generation that the key was claimed in, for `Claims.release` and `Claims.cache`."""
    response: bytes = b""
    """REPLAY: the frozen response, byte for byte."""
    first_request_id: str = ""
    """REPLAY and CONFLICT: the id of the request that the frozen response answered."""
    retry_after_s: float = 0.0
    """RATE_LIMITED: when there will be room."""


make_claim_result = maker(ClaimResult)


class Claims(Protocol):
    """The fast path of idempotency. Nothing here is the last word, and nothing here raises."""

    @property
    def generation(self) -> str | None:
        """The database (its system identifier and timeline) whose commits the cache speaks of."""

    async def claim(
        self,
        merchant_id: str,
        idempotency_key: str,
        fingerprint: bytes,
        rate_limit: RateLimit | None = None,
    ) -> ClaimResult:
        """Claim a key, or learn of a frozen answer. A new claim counts against the rate limit."""

    def release(
        self, merchant_id: str, idempotency_key: str, nonce: bytes, *, generation: str | None = None
    ) -> None:
        """Give up one's own claim, later."""

    def cache(
        self,
        merchant_id: str,
        idempotency_key: str,
        *,
        fingerprint: bytes,
        first_request_id: str,
        response: bytes,
        generation: str | None = None,
    ) -> None:
        """Keep a frozen answer that is committed, later. `generation` is the one that was present
        before the commit or the read: an answer that a failover lost must not reach the next.
        """


# --- the contract's encoding ----------------------------------------------------------------------


class Encoder(Protocol):
    """Turns values into the contract's bytes, deterministically."""

    def response(self, operation: Operation, payment: Payment) -> bytes:
        """A money response without its `replay` field."""

    def change(
        self, event_id: str, event_type: str, operation: Operation, payment: Payment
    ) -> tuple[bytes, bytes]:
        """What a change is told by: the money response, as `response` gives it, and the event."""

    def connector_fields(self, payment: Payment) -> tuple[str, Mapping[str, object]]:
        """The payment method's token and the request's remaining fields for a connector."""
