"""Deliberate faults in the gateway, each of which the simulation has to find.

Where a rule is in SQL, which the simulation does not run, the fault is put into the model of the
store that mirrors it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

from gateway.application import administration, outcomes, usecases
from gateway.application.applying import Applier, _NotYet
from gateway.application.notifications import Applied, Result
from gateway.application.outcomes import Outcomes
from gateway.application.ports import IntentResult, Stored
from gateway.application.recovery import Recovery
from gateway.application.requests import connector_request
from gateway.application.usecases import Payments
from gateway.connectors.simulator.connector import SimulatorConnector
from gateway.domain import decisions
from gateway.domain.errors import Reason
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    DoubtOutcome,
    OperationKind,
    OperationState,
)
from gateway.domain.model import Verdict as PspVerdict
from gateway.domain.states import FROZEN, Event
from gateway.routing import cascade
from storage.redis.claims import Claims
from tests.memory_store import MemoryStore
from tests.simulation.database import Database, SimulatedStore
from tests.simulation.loop import collected_by_hand
from tests.simulation.notifications import NotificationsOfGateway
from tests.simulation.world import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet
    from contextlib import AbstractContextManager

    _Patches = Sequence[AbstractContextManager[Any]]

    from gateway.application.notifications import Received
    from gateway.application.ports import Change, Found, Intent, Lease
    from gateway.domain.model import Operation, Payment, ResponseCode

HISTORIES_MAX: Final = 4_000
"""A mutant that lives longer is not caught."""
CHUNK: Final = 50


@dataclass(frozen=True, slots=True)
class Mutant:
    """A deliberate fault."""

    name: str
    meaning: str
    patches: Callable[[], Sequence[AbstractContextManager[Any]]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant."""

    name: str
    histories: int
    """Until it was caught; how many there were where it was not."""
    rules: tuple[str, ...]
    """By which it was caught; empty where it was not."""


def hunt(mutant: Mutant, seed: int, histories_max: int = HISTORIES_MAX) -> Verdict:
    """Run histories with the fault until one is violated."""
    with ExitStack() as stack:
        for each in mutant.patches():
            stack.enter_context(each)
        done = 0
        while done < histories_max:
            with collected_by_hand():
                for _ in range(min(CHUNK, histories_max - done)):
                    violations = simulate(seed + done).violations
                    done += 1
                    if violations:
                        rules = dict.fromkeys(str(each.rule) for each in violations)
                        return Verdict(mutant.name, done, tuple(rules))
        return Verdict(mutant.name, done, ())


MUTANTS: Final[dict[str, Mutant]] = {}


def _mutant(
    make: Callable[[], Sequence[AbstractContextManager[Any]]],
) -> Callable[[], Sequence[AbstractContextManager[Any]]]:
    name = make.__name__.strip("_").replace("_", "-")
    MUTANTS[name] = Mutant(name, (make.__doc__ or "").strip().rstrip("."), make)
    return make


_event_of = decisions.event_of
_settle = decisions.settle
_send = SimulatorConnector.send
_query = SimulatorConnector.query
_ask = Recovery._ask
_evidence = Recovery._evidence
_change = MemoryStore._change
_intend = MemoryStore._intend
_insert = MemoryStore._insert
_write_intent = SimulatedStore.write_intent
_write_change = SimulatedStore.write_change
_found = MemoryStore._found
_told = Database._told
_commit = Outcomes._commit


def _doubt(answer: ConnectorAnswer) -> bool:
    unanswered = answer.delivery is Delivery.MAY_HAVE_BEEN_SENT
    return unanswered and answer.verdict is PspVerdict.UNKNOWN


@_mutant
def _doubt_as_not_sent() -> _Patches:
    """what may have been sent and has no answer is NOT_SENT"""

    def mutated(answer: ConnectorAnswer) -> Event:
        return Event.NEVER_SENT if _doubt(answer) else _event_of(answer)

    return [patch.object(decisions, "event_of", mutated)]


@_mutant
def _timeout_as_failure() -> _Patches:
    """a time-out of the PSP is a failure"""

    def mutated(answer: ConnectorAnswer) -> Event:
        late = answer.reason == Reason.ANSWER_TIMED_OUT and _doubt(answer)
        return Event.FAILED if late else _event_of(answer)

    return [patch.object(decisions, "event_of", mutated)]


@_mutant
def _not_sent_after_maybe_sent() -> _Patches:
    """the connector says NOT_SENT where the connection broke after the request was written"""

    async def mutated(self: SimulatorConnector, *args: Any) -> ConnectorAnswer:
        answer = await _send(self, *args)
        if answer.reason == Reason.CONNECTION_LOST and _doubt(answer):
            return replace(answer, delivery=Delivery.NOT_SENT)
        return answer

    return [patch.object(SimulatorConnector, "send", mutated)]


@_mutant
def _not_found_as_not_charged() -> _Patches:
    """recovery takes "not found" for not charged"""

    async def mutated(self: SimulatorConnector, *args: Any) -> ConnectorAnswer | None:
        answer = await _query(self, *args)
        return answer or ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.RECOVERED)

    return [patch.object(SimulatorConnector, "query", mutated)]


@_mutant
def _recovery_sends_again() -> _Patches:
    """recovery repeats the request of an operation in doubt, idempotent or not"""

    async def mutated(self: Recovery, lease: Lease, connector: Any) -> ConnectorAnswer | None:
        operation = lease.operation
        if operation.kind in (OperationKind.VOID, OperationKind.REVERSAL):
            return await _ask(self, lease, connector)
        request = connector_request(
            self._encoder, operation, lease.aggregate.payment, lease.aggregate
        )
        answer: ConnectorAnswer = await connector.send(request, float("inf"))
        return answer

    return [patch.object(Recovery, "_ask", mutated)]


@_mutant
def _recovery_does_not_wait() -> _Patches:
    """recovery takes over at once, not after `recover_after`"""

    def mutated(self: MemoryStore, operation: Operation, recover_after_s: float) -> None:
        _insert(self, operation, 0.0)

    return [patch.object(MemoryStore, "_insert", mutated)]


@_mutant
def _intent_after_send() -> _Patches:
    """an authorization's intent is written with its outcome, after the PSP was called"""
    held: dict[str, Intent] = {}

    async def intend(self: SimulatedStore, intent: Intent) -> IntentResult:
        if intent.expected_version is not None:
            return await _write_intent(self, intent)
        held[intent.operation.operation_id] = intent
        return IntentResult(Stored.WRITTEN)

    async def change(self: SimulatedStore, change: Change) -> Stored:
        intent = held.pop(change.operation.operation_id, None)
        if intent is not None:
            await _write_intent(self, intent)
        return await _write_change(self, change)

    return [
        patch.object(SimulatedStore, "write_intent", intend),
        patch.object(SimulatedStore, "write_change", change),
    ]


@_mutant
def _answer_before_durable() -> _Patches:
    """an outcome is answered before it is written"""

    async def mutated(self: SimulatedStore, change: Change) -> Stored:
        import asyncio  # noqa: PLC0415

        task = asyncio.ensure_future(_write_change(self, change))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return Stored.WRITTEN

    return [patch.object(SimulatedStore, "write_change", mutated)]


@_mutant
def _outcome_in_two_transactions() -> _Patches:
    """the operation's outcome and the payment's are two transactions"""

    def first(self: Database, change: Change) -> Stored:
        key = (change.operation.merchant_id, change.operation.operation_id)
        before = self.operations[key]
        held = self.payments[change.payment.merchant_id, change.payment.payment_id]
        if (before.epoch, before.state, held.version) != (
            change.expected_epoch,
            change.expected_state,
            change.expected_version,
        ):
            return Stored.CONFLICT
        self.operations[key] = change.operation.copy_with(epoch=before.epoch)
        return Stored.WRITTEN

    async def mutated(self: SimulatedStore, change: Change) -> Stored:
        if await self._run(lambda database: first(database, change)) is not Stored.WRITTEN:
            return Stored.CONFLICT
        second = replace(change, expected_state=change.operation.state)
        return await _write_change(self, second)

    return [patch.object(SimulatedStore, "write_change", mutated)]


@_mutant
def _no_epoch_in_the_compare() -> _Patches:
    """an outcome is written whatever the operation's epoch is"""

    def mutated(self: MemoryStore, change: Change) -> Stored:
        key = (change.operation.merchant_id, change.operation.operation_id)
        change.expected_epoch = self.operations[key].epoch
        return _change(self, change)

    return [patch.object(MemoryStore, "_change", mutated)]


@_mutant
def _no_version_in_the_compare() -> _Patches:
    """a reservation is written whatever the payment's version is"""

    def mutated(self: MemoryStore, intent: Intent) -> IntentResult:
        current = self.payments.get((intent.payment.merchant_id, intent.payment.payment_id))
        if intent.expected_version is not None and current is not None:
            intent.expected_version = current.version
            intent.payment.version = current.version + 1
        return _intend(self, intent)

    return [patch.object(MemoryStore, "_intend", mutated)]


@_mutant
def _keys_are_not_unique() -> _Patches:
    """two operations may have the same idempotency key"""

    def mutated(self: MemoryStore, intent: Intent) -> IntentResult:
        with patch.object(MemoryStore, "_with_key", lambda *_: None):
            return _intend(self, intent)

    return [patch.object(MemoryStore, "_intend", mutated)]


@_mutant
def _event_of_a_fenced_out_outcome() -> _Patches:
    """the outbox gets a row for an outcome that lost the comparison"""

    def mutated(self: Database, change: Change) -> Stored:
        stored = _database_change(self, change)
        if stored is Stored.CONFLICT:
            self._told(change)
        return stored

    return [patch.object(Database, "change", mutated)]


_database_change = Database.change


@_mutant
def _reservation_released_on_doubt() -> _Patches:
    """a capture or refund in doubt gives its reservation back"""

    def mutated(payment: Payment, operation: Operation, answer: ConnectorAnswer, *args: Any) -> Any:
        settled = _settle(payment, operation, answer, *args)
        if settled is not None and _event_of(answer) is Event.DOUBTED:
            changed = settled.payment
            if operation.kind is OperationKind.CAPTURE:
                changed.capture_pending_minor -= operation.amount_minor
            elif operation.kind is OperationKind.REFUND:
                changed.refund_pending_minor -= operation.amount_minor
        return settled

    return [patch.object(decisions, "settle", mutated)]


@_mutant
def _fingerprint_not_compared() -> _Patches:
    """a key's operation answers every call with the key"""
    return [
        patch.object(usecases, "_same_call", lambda command, operation: True),
    ]


@_mutant
def _cache_not_tied_to_the_generation() -> _Patches:
    """cached answers outlive a failover"""
    set_generation = Claims.set_generation

    def mutated(self: Claims, generation: str) -> None:
        set_generation(self, "always")

    return [patch.object(Claims, "set_generation", mutated)]


@_mutant
def _answer_not_frozen() -> _Patches:
    """a repeat is told the present state, not the first answer"""

    def mutated(self: MemoryStore, operation: Operation | None) -> Any:
        found = _found(self, operation)
        if found is not None:
            found.operation.response = None
        return found

    return [patch.object(MemoryStore, "_found", mutated)]


@_mutant
def _restart_of_a_doubt() -> _Patches:
    """a repeat of a call that is in doubt executes again, as one that was NOT_SENT"""
    answer_existing = Payments._answer_existing

    async def mutated(self: Payments, command: Any, found: Any) -> Any:
        if found.operation.state.name == "IN_DOUBT":
            return await self._detach(command, self._restart(command, found))
        return await answer_existing(self, command, found)

    return [patch.object(Payments, "_answer_existing", mutated)]


@_mutant
def _sends_after_a_conflict() -> _Patches:
    """a duplicate that lost the unique key asks the PSP all the same"""

    async def mutated(self: SimulatedStore, intent: Intent) -> IntentResult:
        result = await _write_intent(self, intent)
        if result.stored is Stored.DUPLICATE_KEY:
            return replace(result, stored=Stored.WRITTEN)
        return result

    return [patch.object(SimulatedStore, "write_intent", mutated)]


@_mutant
def _cascade_after_a_doubt() -> _Patches:
    """another account is asked after one that may have got the request"""
    after = cascade.after

    def mutated(answer: ConnectorAnswer, soft: AbstractSet[ResponseCode]) -> cascade.Next:
        return cascade.Next.ANOTHER if _doubt(answer) else after(answer, soft)

    return [patch.object(cascade, "after", mutated)]


@_mutant
def _cascade_is_not_recorded() -> _Patches:
    """another account is asked though its attempt could not be recorded"""
    write_again = Payments._write_again

    async def mutated(self: Payments, before: Operation, begun: Any, connector: Any) -> Stored:
        stored = await write_again(self, before, begun, connector)
        return Stored.WRITTEN if before.state is OperationState.PROCESSING else stored

    return [patch.object(Payments, "_write_again", mutated)]


@_mutant
def _earlier_attempt_as_the_present() -> _Patches:
    """what a PSP tells of an earlier attempt counts for the present one"""
    ours = Applier._ours

    async def mutated(
        self: Applier,
        received: Received,
        found: Found,
        number: int,
        answer: ConnectorAnswer,
        tries: int,
    ) -> Applied:
        number = found.operation.attempt.number
        return await ours(self, received, found, number, answer, tries)

    return [patch.object(Applier, "_ours", mutated)]


@_mutant
def _older_notifications_count() -> _Patches:
    """of two things that a PSP told of one operation the one that comes last counts"""

    async def mutated(
        self: NotificationsOfGateway, received: Received, event: Event, *, by_id: bool = False
    ) -> bool:
        return False

    return [patch.object(NotificationsOfGateway, "is_outdated", mutated)]


@_mutant
def _notification_done_before_recovery() -> _Patches:
    """a notification is done with though its account's operation is still being sent"""
    apply = Applier.apply

    async def mutated(self: Applier, received: Received, tries: int = 0) -> Applied:
        try:
            return await apply(self, received, tries)
        except _NotYet:
            return Applied(Result.APPLIED)

    return [patch.object(Applier, "apply", mutated)]


@_mutant
def _customer_is_not_waited_for() -> _Patches:
    """recovery cancels what waits for a customer"""
    return [patch.object(Recovery, "_overdue_s", lambda self, operation: 1.0)]


@_mutant
def _expiry_by_our_own_clock() -> _Patches:
    """a customer's time is over by the gateway's clock, whatever the PSP says"""

    async def mutated(self: Recovery, lease: Lease, connector: Any) -> ConnectorAnswer | None:
        if self._overdue_s(lease.operation) >= 0:
            return ConnectorAnswer(Delivery.ANSWERED, PspVerdict.EXPIRED)
        return await _ask(self, lease, connector)

    return [patch.object(Recovery, "_ask", mutated)]


@_mutant
def _accepted_as_done() -> _Patches:
    """what a PSP has only accepted has succeeded"""

    def mutated(answer: ConnectorAnswer) -> Event:
        event = _event_of(answer)
        return Event.APPROVED if event is Event.ACCEPTED else event

    return [patch.object(decisions, "event_of", mutated)]


@_mutant
def _cascade_keeps_the_payments_account() -> _Patches:
    """the payment stays with the account that was asked first"""
    moved = decisions.cascade

    def mutated(payment: Payment, *given: Any, **named: Any) -> Any:
        begun = moved(payment, *given, **named)
        begun.payment.connector = payment.connector
        begun.payment.connector_account_id = payment.connector_account_id
        return begun

    return [patch.object(decisions, "cascade", mutated)]


@_mutant
def _doubts_are_not_told() -> _Patches:
    """the outbox gets no row for an operation that is in doubt"""

    def mutated(self: Database, change: Change) -> None:
        if change.operation.state is not OperationState.IN_DOUBT:
            _told(self, change)

    return [patch.object(Database, "_told", mutated)]


@_mutant
def _answer_frozen_anew() -> _Patches:
    """a change after the first answer freezes another one"""

    async def mutated(
        self: Outcomes, before: Operation, payment: Payment, settled: Any, *given: Any
    ) -> Stored:
        if settled.operation.state in FROZEN:
            settled.operation.response = None
        return await _commit(self, before, payment, settled, *given)

    return [patch.object(Outcomes, "_commit", mutated)]


@_mutant
def _answer_cached_that_lost() -> _Patches:
    """an answer is cached though its change lost the comparison"""

    async def mutated(
        self: Outcomes, before: Operation, payment: Payment, settled: Any, *given: Any
    ) -> Stored:
        generation = None if self._claims is None else self._claims.generation
        stored = await _commit(self, before, payment, settled, *given)
        if stored is Stored.CONFLICT:
            outcomes.cache_answer(self._claims, settled.operation, generation)
        return stored

    return [patch.object(Outcomes, "_commit", mutated)]


@_mutant
def _less_is_taken_for_asked() -> _Patches:
    """a partial approval counts though the call does not allow it"""

    def mutated(payment: Payment, *given: Any) -> Any:
        return _settle(payment.copy_with(allow_partial_approval=True), *given)

    return [patch.object(decisions, "settle", mutated)]


@_mutant
def _less_is_taken_for_the_whole() -> _Patches:
    """of a partial approval the amount that was asked for counts"""

    def mutated(payment: Payment, operation: Operation, answer: ConnectorAnswer, *args: Any) -> Any:
        if operation.kind is OperationKind.AUTHORIZE and answer.outcome is not None:
            outcome = replace(answer.outcome, amount_reported_minor=None)
            answer = replace(answer, outcome=outcome)
        return _settle(payment, operation, answer, *args)

    return [patch.object(decisions, "settle", mutated)]


@_mutant
def _refused_part_stands() -> _Patches:
    """a partial approval that the call does not allow is declined, and not taken back"""
    refuse = decisions._refuse_partial_approval

    def mutated(settled: Any, *given: Any) -> None:
        refuse(settled, *given)
        settled.companions.clear()

    return [patch.object(decisions, "_refuse_partial_approval", mutated)]


@_mutant
def _decision_is_not_recorded() -> _Patches:
    """a person's decision ends a doubt, and nobody knows who took it"""

    async def mutated(
        self: Outcomes, before: Operation, payment: Payment, settled: Any, resolution: object = None
    ) -> Stored:
        return await _commit(self, before, payment, settled)

    return [patch.object(Outcomes, "_commit", mutated)]


@_mutant
def _decision_is_taken_for_a_failure() -> _Patches:
    """what a person found to be without effect has failed: a repeat does not execute it"""
    verdicts = administration._VERDICTS | {DoubtOutcome.NO_EFFECT: PspVerdict.FAILED}
    return [patch.object(administration, "_VERDICTS", verdicts)]


@_mutant
def _first_word_of_a_dispute_counts() -> _Patches:
    """a dispute stays as it was recorded at first"""
    return [patch.object(decisions, "_dispute_goes_on", lambda *_: None)]


@_mutant
def _appeal_of_a_dispute_is_dropped() -> _Patches:
    """another end of a dispute than was told before is shown to nobody"""
    goes_on = decisions._dispute_goes_on

    def mutated(payment: Payment, dispute: Operation, *given: Any) -> Any:
        if dispute.state is not OperationState.PENDING:
            return None
        return goes_on(payment, dispute, *given)

    return [patch.object(decisions, "_dispute_goes_on", mutated)]


@_mutant
def _refunds_forget_what_was_given_back() -> _Patches:
    """refunds are divided among captures as if none were refunded yet"""

    def mutated(operations: Sequence[Operation]) -> list[tuple[str, int]]:
        return [
            (each.operation_id, each.amount_minor)
            for each in operations
            if each.kind is OperationKind.CAPTURE and each.state is OperationState.SUCCEEDED
        ]

    return [patch.object(decisions, "refundable_captures", mutated)]
