"""What came of an attempt, written whatever else happens to its payment meanwhile.

Its sender, recovery, what a PSP tells and a person's decision all write it here, in the same way.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from gateway.application.ports import (
    Claims,
    Companion,
    Doubt,
    Encoder,
    Found,
    Resolution,
    Store,
    Stored,
    StoreUnavailable,
    make_change,
)
from gateway.domain import decisions, ids, states
from gateway.domain.decisions import Settled
from gateway.domain.model import (
    Aggregate,
    ConnectorAnswer,
    Delivery,
    NextAction,
    Operation,
    OperationKind,
    OperationState,
    Payment,
    Verdict,
)
from gateway.domain.states import Event

# For what every authorization goes through, as in `decisions`.
_WRITTEN = Stored.WRITTEN
_PROCESSING = OperationState.PROCESSING
_REQUIRES_ACTION = Verdict.REQUIRES_ACTION

_WITHOUT_EFFECT = frozenset(
    {
        OperationState.NOT_SENT,
        OperationState.CANCELED,
        OperationState.DECLINED,
        OperationState.FAILED,
        OperationState.EXPIRED,
    }
)
_TAKEN_BACK = frozenset({OperationState.CANCELED, OperationState.EXPIRED})
_EVENT_NAMES = {
    (kind, state): f"{kind.name}.{state.name}".lower()
    for kind in OperationKind
    for state in OperationState
}


class DatabaseClock:
    """The database's time, carried on by the local monotonic clock from the latest time it told."""

    __slots__ = ("_at", "_monotonic")

    def __init__(self) -> None:
        self._at = datetime.now(UTC)
        self._monotonic = time.monotonic()

    def observe(self, at: datetime) -> None:
        """Take over a time that the database has just told."""
        self._at = at
        self._monotonic = time.monotonic()

    def after(self, at: datetime | None) -> datetime:
        """The database's time now as far as it can be told without asking, and not before `at`."""
        now = self._at + timedelta(0, time.monotonic() - self._monotonic)
        return now if at is None or now > at else at


class Outcomes:
    """Writes what came of an attempt, whatever else happens to its payment meanwhile.

    Without `claims`, for commands that reach no Redis, no answer is cached: PostgreSQL has it.
    """

    def __init__(
        self,
        store: Store,
        claims: Claims | None,
        encoder: Encoder,
        clock: DatabaseClock,
        first_check_s: float,
        takeover_after_s: Callable[[Operation], float],
        action_timeout_s: float = 0.0,
        is_told_of: Callable[[Operation], bool] = lambda _: False,
    ) -> None:
        """`is_told_of`: whether the PSP of an operation tells outcomes by notification."""
        self._store = store
        self._claims = claims
        self._encoder = encoder
        self._clock = clock
        self._first_check_s = first_check_s
        self._takeover_after_s = takeover_after_s
        self._action_timeout_s = action_timeout_s
        self._is_told_of = is_told_of

    def now(self) -> datetime:
        """The database's time, as far as it can be told without asking."""
        return self._clock.after(None)

    def observe(self, at: datetime) -> None:
        """Take over a time that the database has just told."""
        self._clock.observe(at)

    async def write(self, operation: Operation, payment: Payment, answer: ConnectorAnswer) -> Found:
        """Settle an operation that this caller owns (by its epoch); the operation as it is stored.

        Where another owner took over meanwhile, the answer is kept as evidence, or reversed should
        it be a success that must not stand. Raises StoreUnavailable.
        """
        owned = operation
        if answer.verdict is _REQUIRES_ACTION:
            answer = self._with_an_end(answer)
        while True:
            settled = decisions.settle(
                payment,
                operation,
                answer,
                self._clock.after(payment.updated_at),
                ids.new_operation_id(),
            )
            if settled is None:
                return await self._fenced_out(owned, answer)
            if await self._commit(operation, payment, settled) is _WRITTEN:
                return Found(settled.operation, settled.payment)
            found = await self._present(owned)
            operation, payment = found.operation, found.payment
            if (operation.epoch, operation.attempt.number) != (owned.epoch, owned.attempt.number):
                return await self._fenced_out(owned, answer)

    async def resolve(
        self, found: Found, answer: ConnectorAnswer, resolution: Resolution
    ) -> Found | None:
        """End an operation's doubt by a person's decision, whoever owns it: the raised epoch fences
        out a live recoverer, whose answer then is as late as any other. None where the attempt is
        not in doubt any more. A void of a whole charge that took effect bounces its capture first,
        as recovery does. Raises StoreUnavailable, and GatewayError(OPERATION_IN_PROGRESS) for a
        void that waits for its authorization.
        """
        operation = found.operation
        if operation.kind is OperationKind.VOID and _is_of_doubt(resolution, operation):
            aggregate = await self._whole(operation.merchant_id, operation.payment_id)
            decisions.check_authorization_ended(aggregate)
            if answer.verdict is Verdict.APPROVED and decisions.takes_charge_back(
                aggregate.payment
            ):
                await self.bounce_captures(aggregate, answer)
                found = await self._present(operation)
        while True:
            operation, payment = found.operation, found.payment
            if not _is_of_doubt(resolution, operation):
                return None
            settled = decisions.settle(
                payment,
                operation,
                answer,
                self._clock.after(payment.updated_at),
                ids.new_operation_id(),
            )
            if settled is None:
                return None
            settled.operation.epoch = operation.epoch + 1
            record = replace(
                resolution,
                state_before=operation.state,
                state_after=settled.operation.state,
                payment_state_before=payment.state,
                payment_state_after=settled.payment.state,
                payment_version=settled.payment.version,
            )
            if await self._commit(operation, payment, settled, record) is Stored.WRITTEN:
                return Found(settled.operation, settled.payment)
            found = await self._present(operation)

    async def accept_cancel_request(self, operation: Operation, payment: Payment) -> Found:
        """Make a void of an unfinished authorization PENDING. Raises StoreUnavailable."""
        owned = operation
        while True:
            settled = decisions.accept_cancel_request(
                payment, operation, self._clock.after(payment.updated_at)
            )
            if await self._commit(operation, payment, settled) is Stored.WRITTEN:
                return Found(settled.operation, settled.payment)
            found = await self._present(owned)
            operation, payment = found.operation, found.payment
            if operation.epoch != owned.epoch or operation.state is not OperationState.PROCESSING:
                return found

    async def reverse(
        self, operation: Operation, attempt_number: int, answer: ConnectorAnswer
    ) -> None:
        """Begin the durable reversal of a success that must not stand, once for each attempt."""
        while True:
            aggregate = await self._whole(operation.merchant_id, operation.payment_id)
            reference = f"{operation.operation_id}-{attempt_number}"
            if any(
                other.kind is OperationKind.REVERSAL and other.note == reference
                for other in aggregate.operations
            ):
                return
            current = next(
                other
                for other in aggregate.operations
                if other.operation_id == operation.operation_id
            )
            settled = decisions.reverse_late_success(
                aggregate.payment,
                current,
                attempt_number,
                answer,
                self._clock.after(aggregate.payment.updated_at),
                (ids.new_operation_id(), ids.new_operation_id()),
            )
            if await self._commit(current, aggregate.payment, settled) is Stored.WRITTEN:
                return

    async def keep(self, operation: Operation, answer: ConnectorAnswer) -> bool:
        """Keep a definite answer to the operation's present attempt as evidence, for recovery to
        weigh; False where the operation is not any more as it was read. A success of an earlier
        attempt that was kept in its place, and may still stand, is reversed first.
        """
        number = operation.attempt.number
        evidence = replace(answer, attempt_number=number)
        seen_to: list[int] = []
        while True:
            kept = await self._store.add_evidence(operation, evidence, seen_to)
            if kept is None:
                return False
            if kept.attempt_number in (None, number):
                return True
            if decisions.event_of(kept) is Event.APPROVED:
                await self.reverse(operation, kept.attempt_number, kept)
            seen_to.append(kept.attempt_number)

    async def bounce(self, operation: Operation, answer: ConnectorAnswer) -> None:
        """A capture or refund that had succeeded was returned."""
        await self._add(operation, answer, decisions.bounce)

    async def bounce_captures(self, aggregate: Aggregate, answer: ConnectorAnswer) -> None:
        """A whole charge was taken back: what was captured of it is gone, too."""
        for capture in aggregate.operations:
            if capture.kind is OperationKind.CAPTURE and capture.state is OperationState.SUCCEEDED:
                await self.bounce(capture, answer)

    async def contradict(self, operation: Operation, answer: ConnectorAnswer) -> None:
        """Record an answer that denies the operation's success, should it do so."""
        await self._add(operation, answer, decisions.contradict)

    async def _add(
        self,
        operation: Operation,
        answer: ConnectorAnswer,
        decide: Callable[[Payment, Operation, ConnectorAnswer, datetime], Settled | None],
    ) -> None:
        """Write what a later answer makes of an operation, whoever owns it, where it does."""
        while True:
            found = await self._present(operation)
            if found.operation.attempt.number != operation.attempt.number:
                return  # a repeat has executed since, and this is nothing of its attempt
            settled = decide(
                found.payment, found.operation, answer, self._clock.after(found.payment.updated_at)
            )
            if settled is None:
                return
            if await self._commit(found.operation, found.payment, settled) is Stored.WRITTEN:
                return

    async def record(
        self,
        merchant_id: str,
        payment_id: str,
        decide: Callable[[Aggregate, datetime, str], Settled | None],
    ) -> bool:
        """Write what `decide` makes of a payment as it is, of the time and of a new operation's id;
        False where that is nothing. Raises StoreUnavailable.
        """
        while True:
            aggregate = await self._whole(merchant_id, payment_id)
            at = self._clock.after(aggregate.payment.updated_at)
            settled = decide(aggregate, at, ids.new_operation_id())
            if settled is None:
                return False
            before = next(
                other
                for other in aggregate.operations
                if other.operation_id == settled.operation.operation_id
            )
            if await self._commit(before, aggregate.payment, settled) is Stored.WRITTEN:
                return True

    def _with_an_end(self, answer: ConnectorAnswer) -> ConnectorAnswer:
        """No customer is waited for without an end."""
        action = answer.next_action or NextAction()
        if action.expires_at is None:
            end = self.now() + timedelta(seconds=self._action_timeout_s)
            action = replace(action, expires_at=end)
        return replace(answer, next_action=action)

    async def _commit(
        self,
        before: Operation,
        payment: Payment,
        settled: Settled,
        resolution: Resolution | None = None,
    ) -> Stored:
        operation = settled.operation
        event_id, event_type = ids.new_event_id(), event_name(operation)
        response, event = self._encoder.change(event_id, event_type, operation, settled.payment)
        if operation.response is None and operation.state in states.FROZEN:
            operation.response = response
        # Still PROCESSING where an earlier attempt of it is reversed: its sender keeps its time.
        sending = operation.state is _PROCESSING
        unfinished = operation.state in states.UNFINISHED
        generation = None if self._claims is None else self._claims.generation
        stored = await self._store.write_change(
            make_change(
                operation=operation,
                payment=settled.payment,
                expected_epoch=before.epoch,
                expected_state=before.state,
                expected_version=payment.version,
                companions=self._companions(settled) if settled.companions else [],
                discrepancies=settled.discrepancies,
                event_id=event_id,
                event_type=event_type,
                event=event,
                recover_after_s=self._takeover_after_s(operation) if sending else 0.0,
                doubt=Doubt(self._first_check_s) if unfinished and not sending else None,
                resolution=resolution,
            )
        )
        if stored is _WRITTEN:
            cache_answer(self._claims, operation, generation)
        return stored

    def _companions(self, settled: Settled) -> list[Companion]:
        return [self._companion(each, settled.payment) for each in settled.companions]

    async def _present(self, operation: Operation) -> Found:
        """The operation as it is now. Raises StoreUnavailable."""
        found = await self._store.find_operation(
            operation.merchant_id, operation.operation_id, for_outcome=True
        )
        if found is None:
            raise StoreUnavailable("the operation's row is missing")
        return found

    async def _whole(self, merchant_id: str, payment_id: str) -> Aggregate:
        """The payment as it is now. Raises StoreUnavailable."""
        aggregate = await self._store.load(merchant_id, payment_id, for_outcome=True)
        if aggregate is None:
            raise StoreUnavailable("the payment's row is missing")
        return aggregate

    def _companion(self, operation: Operation, payment: Payment) -> Companion:
        event_id, event_type = ids.new_event_id(), event_name(operation)
        _, event = self._encoder.change(event_id, event_type, operation, payment)
        return Companion(operation, event_id, event_type, event)

    async def _fenced_out(self, owned: Operation, answer: ConnectorAnswer) -> Found:
        """Another owner has the operation. A definite answer is a fact, and is never dropped."""
        event = decisions.event_of(answer)
        while True:
            found = await self._present(owned)
            current = found.operation
            if event is Event.DOUBTED:
                return found
            same_attempt = current.attempt.number == owned.attempt.number
            if same_attempt and current.state in states.UNFINISHED:
                if await self.keep(current, answer):
                    return found
                continue
            await self.absorb(current, owned.attempt.number, answer)
            return found

    async def absorb(
        self, operation: Operation, attempt_number: int, answer: ConnectorAnswer
    ) -> None:
        """An answer came after a definite outcome, or after another attempt: a success that must
        not stand is reversed, what denies a success is recorded.
        """
        same_attempt = operation.attempt.number == attempt_number
        if (
            same_attempt
            and operation.state in _TAKEN_BACK
            and operation.attempt.delivery is Delivery.ANSWERED
            and self._is_told_of(operation)
        ):
            return  # the PSP has told the end of what it answered here, and would tell nothing more
        approved = decisions.event_of(answer) is Event.APPROVED
        if approved and (not same_attempt or operation.state in _WITHOUT_EFFECT):
            await self.reverse(operation, attempt_number, answer)
        elif same_attempt:
            await self.contradict(operation, answer)


def _is_of_doubt(resolution: Resolution, operation: Operation) -> bool:
    """Whether a person's decision is of the present attempt, and that is in doubt."""
    is_open = operation.state is OperationState.IN_DOUBT or decisions.is_unconfirmed(operation)
    return is_open and operation.attempt.number == resolution.attempt_number


def cache_answer(claims: Claims | None, operation: Operation, generation: str | None) -> None:
    """Cache a frozen answer that is committed; `generation` is from before the commit or read."""
    if (
        claims is not None
        and operation.response is not None
        and operation.idempotency_key is not None
        and generation is not None
    ):
        claims.cache(
            operation.merchant_id,
            operation.idempotency_key,
            fingerprint=operation.fingerprint or b"",
            first_request_id=operation.request_id,
            response=operation.response,
            generation=generation,
        )


def event_name(operation: Operation) -> str:
    """What the events of its changes are called, `capture.succeeded` say."""
    return _EVENT_NAMES[operation.kind, operation.state]
