"""What PSPs tell of their own accord, as values, and the port of where it is kept."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

from gateway.domain.model import ConnectorAnswer, Mode
from gateway.domain.states import Event


class NotificationKind(IntEnum):
    """What a notification is about."""

    UNKNOWN = 0
    """Nothing that the gateway acts on: kept and counted."""
    AUTHORIZATION = 1
    """An authorization, or a verification."""
    CAPTURE = 2
    VOID = 3
    REFUND = 4
    INCREMENT = 5
    DISPUTE = 6
    REVERSAL = 7
    """What takes an attempt of ours back: `reference` is that attempt's, or its own, where it was
    sent under that."""


class DisputeStage(IntEnum):
    """How far a dispute has gone."""

    PRE_DISPUTE = 1
    ACTIVE_DISPUTE = 2
    PRE_ARBITRATION = 3


class DisputeStatus(IntEnum):
    """What became of a dispute."""

    OPENED = 1
    CHALLENGED = 2
    WON = 3
    LOST = 4
    ACCEPTED = 5
    CANCELLED = 6
    EXPIRED = 7


@dataclass(frozen=True, slots=True)
class Dispute:
    """What a notification says of a dispute."""

    dispute_id: str
    """The PSP's."""
    stage: DisputeStage
    status: DisputeStatus
    reason: str = ""
    """The PSP's or the network's code."""


@dataclass(frozen=True, slots=True)
class Notification:
    """One event as a PSP tells it. All texts are bounded and printable, none holds card data."""

    connector: str
    event_id: str
    """The PSP's, the same each time it sends this event. Where it has none, what is the same of the
    event each time, as its type with the PSP's id and verdict."""
    event_type: str
    """As the PSP calls it."""
    kind: NotificationKind = NotificationKind.UNKNOWN
    occurred_at: datetime | None = None
    """By the PSP's clock, which orders the events of one operation."""
    mode: Mode | None = None
    """Where it says so: one of the other mode than the account's is refused."""
    reference: str = ""
    """Our reference of the attempt that it is about, where the PSP tells it; empty for what was
    done elsewhere, as in the PSP's console."""
    payment_reference: str = ""
    """Our reference of the authorization that it belongs to, where the PSP tells it. The same as
    `reference` where the PSP does not tell whose that is."""
    payment_transaction_id: str = ""
    """The PSP's id of the authorization that it belongs to."""
    answer: ConnectorAnswer | None = None
    """What it says of the operation, as an answer to its request would: the verdict, the PSP's own
    id, `outcome.amount_reported_minor`. A capture or refund that bounces is FAILED. None for
    UNKNOWN and DISPUTE."""
    amount_minor: int | None = None
    """In minor units of ISO 4217, where it names an amount: of what it is about, not a total."""
    currency: str = ""
    dispute: Dispute | None = None
    """For DISPUTE."""

    @property
    def subject(self) -> str:
        """What the events of one operation have in common; empty where nothing tells. What is gone
        of a payment is its authorization.
        """
        if self.kind is NotificationKind.VOID and not self.reference:
            return self.payment_reference or self.transaction_id
        return self.reference or self.transaction_id

    @property
    def transaction_id(self) -> str:
        """The PSP's id of what it is about."""
        return self.answer.connector_transaction_id if self.answer else ""


class Receipt(StrEnum):
    """What became of a request."""

    KEPT = "kept"
    REPEATED = "repeated"
    """Every event of it was kept before."""
    BAD_SIGNATURE = "bad-signature"
    UNUSABLE = "unusable"
    UNKNOWN_ACCOUNT = "unknown-account"
    BAD_REQUEST = "bad-request"
    """Of another method, path or content type, or cut off."""
    TOO_LARGE = "too-large"
    TOO_SLOW = "too-slow"
    RATE_LIMITED = "rate-limited"
    OVERLOADED = "overloaded"
    STORE_UNAVAILABLE = "store-unavailable"


class Result(IntEnum):
    """What became of a notification."""

    APPLIED = 1
    """It changed an operation."""
    NO_NEWS = 2
    """What it tells is so already, or was overtaken by what happened later."""
    RECORDED = 3
    """Something done elsewhere: an operation of the PSP's, a dispute, a discrepancy."""
    UNKNOWN = 4
    """Of a kind that the gateway does not act on."""
    UNMATCHED = 5
    """Of no payment of the account's merchant."""


@dataclass(frozen=True, slots=True)
class Received:
    """A notification, and whose account it came to."""

    merchant_id: str
    connector_account_id: str
    notification: Notification


@dataclass(frozen=True, slots=True)
class Pending:
    """One that is to be applied."""

    received: Received
    tries: int
    """How often that was tried before."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one, and what it was about."""

    result: Result
    payment_id: str | None = None
    operation_id: str | None = None


class PendingCount(NamedTuple):
    """What is yet to be applied."""

    notifications: int
    oldest_age_s: float


class NotificationStore(Protocol):
    """Where notifications are kept. Every method raises StoreUnavailable."""

    async def keep(self, received: Sequence[Received]) -> int:
        """Keep them, each once by merchant, account and event; how many are new.

        Raises GatewayError(OVERLOADED) where the queue is full.
        """

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Received] = (),
    ) -> Sequence[Pending]:
        """Take some that are due, each account's in the order of the PSP's clock: none that the
        caller is at work on, and of an account, with those, `account_max` at most.
        """

    async def finish(self, received: Received, applied: Applied) -> None:
        """It is done with."""

    async def put_off(self, received: Received, apply_after_s: float) -> None:
        """Apply it later."""

    async def is_outdated(self, received: Received, event: Event, *, by_id: bool = False) -> bool:
        """Whether the PSP told another definite event of the same thing that happened later, or of
        an approved authorization its end. Of what happened at the same time, what can follow the
        other counts (`gateway.domain.states`): a success comes before whatever ends it.

        `by_id`: the same thing has the same id at the PSP, too. Several may be told under their
        payment's reference, where they were done elsewhere.
        """


class LookupUnavailable(Exception):
    """The PSP does not tell now what it was asked."""


class ReferenceLookup(Protocol):
    """Asks PSPs what their notifications leave out."""

    async def reference_of(
        self, connector_account_id: str, connector_transaction_id: str
    ) -> str | None:
        """Our reference of an authorization by the PSP's id; None for one that is not ours, and at
        PSPs that cannot be asked. Raises LookupUnavailable.
        """
