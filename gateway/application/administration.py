"""What people do: look at doubts and discrepancies, and end a doubt by what they found out."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from gateway.application.outcomes import Outcomes
from gateway.application.ports import Found, Resolution, StoreUnavailable
from gateway.domain.errors import GatewayError, Reason, Violation, refuse
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    DoubtCause,
    DoubtOutcome,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    Outcome,
    PaymentState,
    Verdict,
)

PAGE_SIZE_DEFAULT: Final = 50
"""What a page_size of 0 is taken as."""

_VERDICTS: Final = {
    DoubtOutcome.TOOK_EFFECT: Verdict.APPROVED,
    DoubtOutcome.NO_EFFECT: Verdict.UNKNOWN,  # with the delivery NOT_SENT: never sent
    DoubtOutcome.DECLINED: Verdict.DECLINED,
    DoubtOutcome.FAILED: Verdict.FAILED,
    DoubtOutcome.CANCELED: Verdict.CANCELED,
}


@dataclass(frozen=True, slots=True)
class AdminFilter:
    """Whose rows a list is about."""

    merchant_ids: frozenset[str] | None
    """None: all merchants there are."""
    mode: Mode | None
    """None: both."""
    page_size: int
    after: tuple[datetime, str] | None = None
    """The sort key (time, id) of the last row of the page before."""


@dataclass(slots=True)
class DoubtEntry:
    """An operation whose outcome is unknown, and what recovery does about it."""

    operation: Operation
    mode: Mode
    payment_state: PaymentState
    since: datetime
    tries: int
    next_check_at: datetime
    leased_until: datetime | None
    cause: DoubtCause
    needs_person: bool


@dataclass(slots=True)
class DoubtPage:
    """A page of doubts, the oldest first."""

    doubts: list[DoubtEntry]
    next_after: tuple[datetime, str] | None
    """Where the next page begins; None at the end."""


@dataclass(frozen=True, slots=True)
class RecordedDiscrepancy:
    """A fact that a PSP reported and that contradicts the books, as it is stored."""

    merchant_id: str
    discrepancy_id: str
    payment_id: str
    operation_id: str
    kind: str
    expected: str
    reported: str
    created_at: datetime


@dataclass(slots=True)
class DiscrepancyPage:
    """A page of discrepancies, the oldest first."""

    discrepancies: list[RecordedDiscrepancy]
    next_after: tuple[datetime, str] | None
    """Where the next page begins; None at the end."""


@dataclass(slots=True)
class Resolved:
    """A doubt that a person ended."""

    found: Found
    resolution: Resolution
    replayed: bool = False
    """The same decision had been taken before; nothing was done now."""


class AdminStore(Protocol):
    """What administration needs of the store. Every method raises StoreUnavailable where the
    database is away, and GatewayError(OVERLOADED) where a bounded queue is full.
    """

    async def find_operation(self, merchant_id: str, operation_id: str) -> Found | None:
        """The operation with this id."""

    async def list_doubts(self, filter_: AdminFilter, *, needs_person_only: bool) -> DoubtPage:
        """A page of the operations whose outcome is unknown."""

    async def list_discrepancies(self, filter_: AdminFilter) -> DiscrepancyPage:
        """A page of what PSPs contradicted."""

    async def find_resolution(
        self, merchant_id: str, operation_id: str, attempt_number: int
    ) -> Resolution | None:
        """The decision that was taken on an attempt."""


@dataclass(slots=True)
class Administration:
    """The use cases of AdminService but for the audit. Each raises GatewayError."""

    store: AdminStore
    outcomes: Outcomes

    async def list_doubts(self, filter_: AdminFilter, *, needs_person_only: bool) -> DoubtPage:
        """A page of the operations whose outcome is unknown, the oldest first."""
        try:
            return await self.store.list_doubts(filter_, needs_person_only=needs_person_only)
        except StoreUnavailable as error:
            raise _store_unavailable() from error

    async def list_discrepancies(self, filter_: AdminFilter) -> DiscrepancyPage:
        """A page of what PSPs contradicted, the oldest first."""
        try:
            return await self.store.list_discrepancies(filter_)
        except StoreUnavailable as error:
            raise _store_unavailable() from error

    async def resolve(
        self, merchant_id: str, mode: Mode | None, operation_id: str, decision: Resolution
    ) -> Resolved:
        """End a doubt by a person's decision; the same decision again changes nothing.

        Raises OPERATION_NOT_FOUND, OPERATION_NOT_IN_DOUBT, OPERATION_IN_PROGRESS,
        OUTCOME_NOT_ALLOWED, INVALID_REQUEST.
        """
        try:
            return await self._resolve(merchant_id, mode, operation_id, decision)
        except StoreUnavailable as error:
            raise _store_unavailable() from error

    async def _resolve(
        self, merchant_id: str, mode: Mode | None, operation_id: str, decision: Resolution
    ) -> Resolved:
        found = await self.store.find_operation(merchant_id, operation_id)
        if found is None or mode not in (None, found.payment.mode):
            raise refuse(Reason.OPERATION_NOT_FOUND, "The merchant has no such operation.")
        answer = answer_of_person(found.operation, decision)
        after = await self.outcomes.resolve(found, answer, decision)
        recorded = await self.store.find_resolution(
            merchant_id, operation_id, decision.attempt_number
        )
        if recorded is None or not recorded.same_decision(decision):
            raise _not_in_doubt(found.operation)
        if after is not None:
            return Resolved(after, recorded)
        current = await self.store.find_operation(merchant_id, operation_id)
        return Resolved(current or found, recorded, replayed=True)


def answer_of_person(operation: Operation, decision: Resolution) -> ConnectorAnswer:
    """The answer that the PSP would have given, by what a person found out.

    Raises GatewayError: OUTCOME_NOT_ALLOWED for an outcome that operations of the kind cannot have,
    INVALID_REQUEST for fields that do not go with the outcome.
    """
    outcome, kind = decision.outcome, operation.kind
    took_effect = outcome is DoubtOutcome.TOOK_EFFECT
    if kind is OperationKind.REVERSAL and not took_effect:
        # Nobody would begin another one, and the charge that must not stand would stand.
        raise refuse(
            Reason.OUTCOME_NOT_ALLOWED,
            "A reversal is repeated until it took effect; nothing else can be said of it.",
            operation_kind=kind.name,
        )
    if outcome is DoubtOutcome.NO_EFFECT and operation.state is OperationState.PENDING:
        # It was accepted, so that a repeat of the call does not execute it again.
        raise refuse(
            Reason.OUTCOME_NOT_ALLOWED,
            "The void was accepted: it is FAILED where it has no effect.",
            operation_kind=kind.name,
        )
    begins = kind in (OperationKind.AUTHORIZE, OperationKind.VERIFY)
    if begins and took_effect and not decision.connector_transaction_id:
        raise _violation("connector_transaction_id", "is required where a payment took effect")
    if outcome is DoubtOutcome.NO_EFFECT and decision.connector_transaction_id:
        # What the PSP has an id of it has, and a repeat of the call would be a second one.
        raise _violation("connector_transaction_id", "does not go with NO_EFFECT: the PSP has it")
    if decision.amount_reported_minor is not None and not took_effect:
        raise _violation("amount_reported_minor", "goes with TOOK_EFFECT only")
    return ConnectorAnswer(
        Delivery.NOT_SENT if outcome is DoubtOutcome.NO_EFFECT else Delivery.ANSWERED,
        _VERDICTS[outcome],
        Outcome(amount_reported_minor=decision.amount_reported_minor) if took_effect else None,
        connector_transaction_id=decision.connector_transaction_id,
        reason=Reason.RESOLVED_BY_PERSON,
    )


def _violation(field_path: str, description: str) -> GatewayError:
    return GatewayError(
        Reason.INVALID_REQUEST,
        f"{field_path} {description}.",
        violations=[Violation(field_path, description)],
    )


def _not_in_doubt(operation: Operation) -> GatewayError:
    return refuse(
        Reason.OPERATION_NOT_IN_DOUBT,
        "The attempt is not in doubt, or another decision was taken on it.",
        operation_state=operation.state.name,
        attempt_number=str(operation.attempt.number),
    )


def _store_unavailable() -> GatewayError:
    return GatewayError(
        Reason.STORE_UNAVAILABLE,
        "The store is away; whether the call took effect is not known: repeat it.",
        retry_after_s=1.0,
    )
