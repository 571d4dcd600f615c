"""The money calls: claim the key, write the intent, ask the PSP, write the outcome, answer.

What has begun is detached from its caller: a cancellation or a deadline ends the waiting, never the
work, and every outcome is written. Nothing is held while a PSP is asked; what keeps two senders
apart is the operation's epoch in the database.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from gateway.application import suitability
from gateway.application.admission import Stage
from gateway.application.commands import (
    Answer,
    Authorize,
    Capture,
    Command,
    Increment,
    Refund,
    Void,
)
from gateway.application.outcomes import DatabaseClock, Outcomes, cache_answer, event_name
from gateway.application.ports import (
    ClaimOutcome,
    ClaimResult,
    Claims,
    Connector,
    Encoder,
    Found,
    Intent,
    ListFilter,
    Page,
    Router,
    Store,
    Stored,
    StoreUnavailable,
    make_change,
)
from gateway.application.requests import connector_request
from gateway.application.routing import Plan, Routing
from gateway.domain import decisions, ids
from gateway.domain.decisions import Begun, Origin
from gateway.domain.errors import GatewayError, Reason, refuse
from gateway.domain.model import (
    Aggregate,
    ConnectorAnswer,
    Delivery,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    Payment,
)
from gateway.routing import cascade

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_C = TypeVar("_C", bound=Command)

FollowUp = Capture | Void | Refund | Increment
"""The calls that act on an existing payment."""

_CONTENTION_PAUSE_S = 0.001
"""The step of the random pause before a follow-up begins anew."""

# For what every authorization goes through, as in `decisions`.
_CLAIM, _INTENT, _OUTCOME = Stage.CLAIM, Stage.INTENT, Stage.OUTCOME
_NEW = ClaimOutcome.NEW
_WRITTEN = Stored.WRITTEN
_PROCESSING = OperationState.PROCESSING


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of the use cases; times in seconds."""

    send_window_s: float
    """How long after its intent a request may still be sent to the PSP."""
    recover_margin_s: float
    """What recovery adds to the send window and the answer time-out before it takes over."""
    min_send_budget_s: float
    """No request is sent to the PSP when the caller's deadline is nearer than this."""
    wait_s_max: float
    """How long a duplicate waits for the first call's answer."""
    wait_margin_s: float
    """How long before its deadline a waiting duplicate is answered."""
    wait_poll_s_min: float
    """The first pause between two looks at the first call's operation; doubled up to the next."""
    wait_poll_s_max: float
    """The longest pause between two looks."""
    waiters_per_key_max: int
    """How many duplicates of one key may wait at once, in one process."""
    contention_tries_max: int
    """How often a follow-up begins anew because its payment changed meanwhile."""
    first_check_s: float
    """How soon recovery looks at an operation in doubt or pending."""
    operations_per_payment_max: int
    """How many operations a payment may have."""
    attempts_per_operation_max: int
    """How many attempts an operation may have when a repeat begins another one."""
    action_timeout_s: float
    """How long a customer has to act, where the PSP does not say it."""


class Observer(Protocol):
    """Counts what happens, for metrics."""

    def claimed(self, outcome: ClaimOutcome) -> None:
        """A claim was answered."""

    def replayed(self, source: str) -> None:
        """A frozen answer was repeated, from `redis` or `postgres`."""

    def connector_called(
        self, connector: str, kind: OperationKind, answer: ConnectorAnswer, seconds: float
    ) -> None:
        """A connector's `send` ended."""

    def cascaded(self, before: ConnectorAnswer, answer: ConnectorAnswer) -> None:
        """After `before` another account was asked, with this answer."""

    def answered(self, added_s: float) -> None:
        """A PSP's answer is written; so long was the call here, without the PSP's seconds.

        Not told of items: the objective of latency is about calls.
        """

    def outcome_lost(self, operation: Operation) -> None:
        """An outcome could not be written; recovery settles the operation."""


class Occupancy(Protocol):
    """What the calls of each merchant do: `gateway.application.admission.Gate`."""

    def leave(self, merchant_id: str) -> None:
        """A call begins to wait for its PSP, or for another call."""

    def come_back(self, merchant_id: str) -> None:
        """It goes on."""

    def carry(self, merchant_id: str) -> None:
        """A call goes on without its caller."""

    def release(self, merchant_id: str) -> None:
        """One that was carried has ended."""

    def passed(self, stage: Stage, seconds: float) -> None:
        """A call has passed a stage."""


class _Unlimited:
    """For use cases that nobody limits."""

    def leave(self, merchant_id: str) -> None:
        pass

    def come_back(self, merchant_id: str) -> None:
        pass

    def carry(self, merchant_id: str) -> None:
        pass

    def release(self, merchant_id: str) -> None:
        pass

    def passed(self, stage: Stage, seconds: float) -> None:
        pass


class Payments:
    """The use cases of PaymentService."""

    def __init__(
        self,
        store: Store,
        claims: Claims,
        router: Router,
        encoder: Encoder,
        limits: Limits,
        observer: Observer,
        occupancy: Occupancy | None = None,
        routing: Routing | None = None,
    ) -> None:
        self._routing = Routing(router) if routing is None else routing
        self._occupancy = _Unlimited() if occupancy is None else occupancy
        self._store = store
        self._claims = claims
        self._router = router
        self._encoder = encoder
        self._limits = limits
        self._observer = observer
        self._waiting: dict[tuple[str, str], int] = {}
        self._detached: set[asyncio.Task[Any]] = set()
        self._clock = DatabaseClock()
        self._outcomes = Outcomes(
            store,
            claims,
            encoder,
            self._clock,
            limits.first_check_s,
            self._takeover_after_s,
            limits.action_timeout_s,
            self._is_told_of,
        )

    @property
    def outcomes(self) -> Outcomes:
        """The writer of outcomes, which recovery shares."""
        return self._outcomes

    @property
    def in_flight(self) -> int:
        """How many calls have begun and not ended, those without a caller included."""
        return len(self._detached)

    async def drain(self) -> None:
        """Wait until every call that has begun has ended, those without a caller included."""
        while self._detached:
            await asyncio.wait(self._detached)

    # --- money calls ---

    def authorize(self, command: Authorize) -> Coroutine[Any, Any, Answer]:
        """Authorize or verify. Raises GatewayError where the call is refused."""
        return self._idempotent(command, self._new_authorization)

    def capture(self, command: Capture) -> Coroutine[Any, Any, Answer]:
        """Capture. Raises GatewayError where the call is refused."""
        return self._idempotent(command, self._new_follow_up)

    def void(self, command: Void) -> Coroutine[Any, Any, Answer]:
        """Void. Raises GatewayError where the call is refused."""
        return self._idempotent(command, self._new_follow_up)

    def refund(self, command: Refund) -> Coroutine[Any, Any, Answer]:
        """Refund. Raises GatewayError where the call is refused."""
        return self._idempotent(command, self._new_follow_up)

    def increment(self, command: Increment) -> Coroutine[Any, Any, Answer]:
        """Raise the authorized amount. Raises GatewayError where the call is refused."""
        return self._idempotent(command, self._new_follow_up)

    # --- reads ---

    async def get_payment(self, merchant_id: str, mode: Mode, payment_id: str) -> Aggregate:
        """A payment with its operations. Raises GatewayError(PAYMENT_NOT_FOUND)."""
        aggregate = await self._reading(self._store.load(merchant_id, payment_id))
        if aggregate is None or aggregate.payment.mode is not mode:
            raise refuse(Reason.PAYMENT_NOT_FOUND, "The merchant has no such payment.")
        return aggregate

    async def get_operation(
        self,
        merchant_id: str,
        mode: Mode,
        *,
        operation_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Found:
        """An operation with its payment. Raises GatewayError(OPERATION_NOT_FOUND)."""
        if operation_id is not None:
            found = await self._reading(self._store.find_operation(merchant_id, operation_id))
        else:
            key = idempotency_key or ""
            found = await self._reading(self._store.find_by_key(merchant_id, key))
        if found is None or found.payment.mode is not mode:
            raise refuse(
                Reason.OPERATION_NOT_FOUND,
                "The merchant has no such operation."
                if operation_id is not None
                else "The merchant has no operation with this key yet.",
            )
        return found

    async def list_payments(self, filter_: ListFilter) -> Page:
        """A page of payments."""
        return await self._reading(self._store.list_payments(filter_))

    # --- idempotency ---

    async def _idempotent(
        self, command: _C, start: Callable[[_C], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """Answer from the key's operation where there is one, else start a new one, detached."""
        began = time.monotonic()
        claim = await self._claims.claim(
            command.merchant_id,
            command.idempotency_key,
            command.fingerprint,
            command.rate_limit,
        )
        self._occupancy.passed(_CLAIM, time.monotonic() - began)
        self._observer.claimed(claim.outcome)
        if claim.outcome is not _NEW:
            answer = await self._answer_claimed(command, claim)
            if answer is not None:
                return answer
        return await self._detach(command, self._guarded(command, start, claim))

    async def _answer_claimed(self, command: Command, claim: ClaimResult) -> Answer | None:
        """What a claim that is not new answers; None: nothing, PostgreSQL decides."""
        if claim.outcome is ClaimOutcome.REPLAY:
            self._observer.replayed("redis")
            return Answer(claim.response, True, claim.first_request_id, "")
        if claim.outcome is ClaimOutcome.CONFLICT:
            raise _key_reused()
        if claim.outcome is ClaimOutcome.RATE_LIMITED:
            raise GatewayError(
                Reason.RATE_LIMITED,
                "The merchant's rate limit is used up.",
                retry_after_s=claim.retry_after_s,
            )
        if claim.outcome is ClaimOutcome.IN_FLIGHT:
            # The claim alone proves nothing: its owner may have died before the intent.
            found = await self._find_by_key(command)
            if found is not None:
                return await self._answer_existing(command, found)
        return None

    def _detach(
        self, command: Command, work: Coroutine[Any, Any, Answer]
    ) -> Coroutine[Any, Any, Answer]:
        """What comes of `work`, which goes on where its caller is cancelled."""
        return self._here(work) if command.item else self._apart(command.merchant_id, work)

    async def _here(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """What comes of `work` in the present task, which nobody cancels."""
        task = asyncio.current_task()
        assert task is not None
        if task in self._detached:  # whose work began this, and goes on after it
            return await work
        self._detached.add(task)
        try:
            return await work
        finally:
            self._detached.discard(task)

    async def _apart(self, merchant_id: str, work: Coroutine[Any, Any, Answer]) -> Answer:
        """What comes of `work` in a task of its own.

        As asyncio.shield, but its caller goes on a turn of the event loop earlier: not by a
        callback of the task's.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Answer] = loop.create_future()
        # With a name, or one would be made up.
        task = asyncio.Task(_tell(told, work), loop=loop, name="payment")
        self._detached.add(task)
        task.add_done_callback(self._detached.discard)
        try:
            return await told
        except asyncio.CancelledError:
            if told.cancelled():  # or both ended in the same turn
                self._occupancy.carry(merchant_id)
                task.add_done_callback(lambda _: self._occupancy.release(merchant_id))
            raise

    async def _guarded(
        self,
        command: _C,
        start: Callable[[_C], Coroutine[Any, Any, Answer]],
        claim: ClaimResult,
    ) -> Answer:
        try:
            answer = await start(command)
        except StoreUnavailable as error:
            raise _store_unavailable() from error
        except GatewayError as refusal:
            self._release(command, claim)
            if refusal.reason in _NOT_BY_STATE:
                raise
            # The state may refuse just because an earlier call with this key took effect, or
            # reserved for a while what is free again since it was NOT_SENT.
            found = await self._find_by_key(command)
            if found is None:
                raise
            return await self._answer_existing(command, found)
        if not answer.frozen:
            self._release(command, claim)
        return answer

    def _release(self, command: Command, claim: ClaimResult) -> None:
        self._claims.release(
            command.merchant_id,
            command.idempotency_key,
            claim.nonce,
            generation=claim.generation or None,
        )

    async def _find_by_key(self, command: Command) -> Found | None:
        generation = self._claims.generation
        found = await self._reading(
            self._store.find_by_key(command.merchant_id, command.idempotency_key)
        )
        if found is not None:
            cache_answer(self._claims, found.operation, generation)
        return found

    async def _reading(self, read: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await read
        except StoreUnavailable as error:
            raise _store_unavailable() from error

    async def _answer_existing(self, command: Command, found: Found) -> Answer:
        """The answer to a repeat: the frozen one, the present state, or a new attempt."""
        operation = found.operation
        if not _same_call(command, operation):
            raise _key_reused()
        if operation.state is OperationState.PROCESSING:
            operation, payment = await self._wait(command)
            found = Found(operation, payment)
        if operation.response is not None:
            self._observer.replayed("postgres")
            return Answer(operation.response, True, operation.request_id, operation.payment_id)
        if operation.state is OperationState.NOT_SENT:
            if operation.attempt.number >= self._limits.attempts_per_operation_max:
                raise refuse(
                    Reason.TOO_MANY_ATTEMPTS,
                    "The operation was not sent as often as an operation may be tried.",
                    attempts=str(operation.attempt.number),
                )
            return await self._detach(command, self._restart(command, found))
        return Answer(
            self._encoder.response(operation, found.payment),
            True,
            operation.request_id,
            operation.payment_id,
            frozen=False,
        )

    async def _wait(self, command: Command) -> tuple[Operation, Payment]:
        """Wait for the first call's outcome, by PostgreSQL. Raises GatewayError(IN_FLIGHT)."""
        limits = self._limits
        key = (command.merchant_id, command.idempotency_key)
        waiting = self._waiting.get(key, 0)
        if waiting >= limits.waiters_per_key_max:
            raise _in_flight()
        until = time.monotonic() + limits.wait_s_max
        if command.deadline is not None:
            until = min(until, command.deadline - limits.wait_margin_s)
        self._waiting[key] = waiting + 1
        self._occupancy.leave(command.merchant_id)
        pause_s = limits.wait_poll_s_min
        try:
            while True:
                found = await self._find_by_key(command)
                if found is not None and found.operation.state is not OperationState.PROCESSING:
                    return found.operation, found.payment
                if time.monotonic() + pause_s >= until:
                    raise _in_flight()
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
                pause_s = min(2 * pause_s, limits.wait_poll_s_max)
        finally:
            self._occupancy.come_back(command.merchant_id)
            left = self._waiting[key] - 1
            if left:
                self._waiting[key] = left
            else:
                del self._waiting[key]

    # --- beginnings ---

    async def _new_authorization(self, command: Authorize) -> Answer:
        payment_id = ids.new_payment_id()
        plan = self._routing.plan(command, payment_id)
        started = time.monotonic()
        self._check_deadline(command, started)  # before it may take a probe's place
        candidate, connector = self._routing.first(plan)
        begun = decisions.begin_authorization(
            Origin(
                ids.new_operation_id(),
                command.idempotency_key,
                command.fingerprint,
                command.request_id,
                command.merchant_transaction_id,
            ),
            merchant_id=command.merchant_id,
            payment_id=payment_id,
            mode=command.mode,
            amount_minor=command.amount_minor,
            currency=command.currency,
            capture_method=command.capture_method,
            connector=candidate.connector,
            connector_account_id=candidate.connector_account_id,
            merchant_order_id=command.merchant_order_id,
            allow_partial_approval=command.allow_partial_approval,
            details=command.details,
            route=plan.note,
        )
        if await self._is_written(self._write_intent(begun, connector, None), plan, started):
            return await self._perform(command, begun, connector, None, started, plan)
        return await self._duplicate(command)

    async def _is_written(self, write: Awaitable[Stored], plan: Plan, started: float) -> bool:
        """Write an attempt at the account that was taken; else its place there is given back."""
        is_written = False
        try:
            is_written = await write is _WRITTEN
        finally:
            if not is_written:
                self._routing.give_back(plan, time.monotonic() - started)
        return is_written

    async def _new_follow_up(self, command: FollowUp, again: Operation | None = None) -> Answer:
        """Begin a follow-up by the payment as it is now, anew as often as it changes meanwhile.

        `again` is the operation of this call that was NOT_SENT, where there is one.
        """
        payment_id = await self._payment_id(command)
        origin = Origin(
            ids.new_operation_id(),
            command.idempotency_key,
            command.fingerprint,
            command.request_id,
            command.merchant_transaction_id,
        )
        admitted: Operation | None = None
        admitted_at = 0.0
        is_written = is_sent = False
        try:
            for tries in range(self._limits.contention_tries_max):
                aggregate = await self.get_payment(command.merchant_id, command.mode, payment_id)
                connector = self._connector(aggregate.payment)
                begun = _begin(command, aggregate, origin)
                suitability.check_follow_up(begun.operation, connector)
                started = time.monotonic()
                if not begun.cancel_request:
                    self._check_deadline(command, started)
                    if admitted is None:  # once: it may take a probe's place
                        self._routing.check_follow_up(begun.operation)
                        admitted, admitted_at = begun.operation, started
                if again is not None:
                    begun = decisions.begin_again(again, begun, command.request_id)
                stored = await self._write_follow_up(aggregate, begun, connector, again)
                if stored is _WRITTEN:
                    is_written, is_sent = True, not begun.cancel_request
                    break
                if stored is Stored.DUPLICATE_KEY:
                    break
                if again is not None:
                    found = await self._find_by_key(command)
                    if found is None or found.operation.epoch != again.epoch:
                        break
                await asyncio.sleep(random.uniform(0, _CONTENTION_PAUSE_S * min(tries + 1, 20)))
            else:
                raise GatewayError(
                    Reason.CONTENTION,
                    "Too many calls change this payment at once.",
                    retry_after_s=0.1,
                )
        finally:
            if admitted is not None and not is_sent:
                self._routing.give_back_follow_up(admitted, time.monotonic() - admitted_at)
        if is_written:
            return await self._perform(command, begun, connector, aggregate, started)
        return await self._duplicate(command)

    async def _write_follow_up(
        self, aggregate: Aggregate, begun: Begun, connector: Connector, again: Operation | None
    ) -> Stored:
        if again is not None:
            return await self._write_again(again, begun, connector)
        if len(aggregate.operations) >= self._limits.operations_per_payment_max:
            raise refuse(Reason.TOO_MANY_OPERATIONS, "The payment has too many operations.")
        return await self._write_intent(begun, connector, aggregate.payment.version)

    async def _duplicate(self, command: Command) -> Answer:
        """Another call has this key: answer from its operation."""
        found = await self._find_by_key(command)
        if found is None:
            raise _in_flight()
        return await self._answer_existing(command, found)

    async def _restart(self, command: Command, found: Found) -> Answer:
        """A repeat of a call that had surely no effect executes, under the next epoch."""
        try:
            if not isinstance(command, Authorize):
                assert isinstance(command, FollowUp)
                return await self._new_follow_up(command, again=found.operation)
            plan = self._routing.plan(command, found.payment.payment_id)
            started = time.monotonic()
            self._check_deadline(command, started)
            candidate, connector = self._routing.first(plan)
            begun = decisions.restart(
                found.payment,
                found.operation,
                command.request_id,
                connector=candidate.connector,
                connector_account_id=candidate.connector_account_id,
                route=plan.note,
            )
            write = self._write_again(found.operation, begun, connector)
            if await self._is_written(write, plan, started):
                return await self._perform(command, begun, connector, None, started, plan)
            return await self._duplicate(command)
        except StoreUnavailable as error:
            raise _store_unavailable() from error
        except GatewayError as refusal:
            if refusal.reason in _NOT_BY_STATE:
                raise
            # The state may refuse just because another repeat of this call was quicker.
            current = await self._find_by_key(command)
            if current is None or current.operation.epoch == found.operation.epoch:
                raise
            return await self._answer_existing(command, current)

    def _check_deadline(self, command: Command, now: float) -> None:
        """Write no intent of what could not be sent. Raises GatewayError(DEADLINE_TOO_SHORT)."""
        if command.deadline is not None and now >= command.deadline - (
            self._limits.min_send_budget_s
        ):
            raise GatewayError(
                Reason.DEADLINE_TOO_SHORT,
                "The deadline is too near to ask the PSP; nothing was sent.",
            )

    async def _write_intent(
        self, begun: Begun, connector: Connector, expected_version: int | None
    ) -> Stored:
        operation, payment = begun.operation, begun.payment
        result = await self._store.write_intent(
            Intent(operation, payment, self._recover_after_s(connector), expected_version)
        )
        if result.at is not None:
            self._clock.observe(result.at)
            operation.created_at = operation.updated_at = payment.updated_at = result.at
            if payment.created_at is None:
                payment.created_at = result.at
        return result.stored

    async def _write_again(self, before: Operation, begun: Begun, connector: Connector) -> Stored:
        operation, payment = begun.operation, begun.payment
        operation.updated_at = payment.updated_at = self._clock.after(payment.updated_at)
        event_id, event_type = ids.new_event_id(), event_name(operation)
        return await self._store.write_change(
            make_change(
                operation=operation,
                payment=payment,
                expected_epoch=before.epoch,
                expected_state=before.state,
                expected_version=payment.version - 1,
                event_id=event_id,
                event_type=event_type,
                event=self._encoder.change(event_id, event_type, operation, payment)[1],
                recover_after_s=self._recover_after_s(connector),
            )
        )

    async def _payment_id(self, command: FollowUp) -> str:
        if not isinstance(command, Void) or command.payment_id is not None:
            return command.payment_id or ""
        key = command.authorize_idempotency_key or ""
        found = await self._store.find_by_key(command.merchant_id, key)
        if (
            found is None
            or found.operation.kind is not OperationKind.AUTHORIZE
            or found.payment.mode is not command.mode
        ):
            raise refuse(
                Reason.PAYMENT_NOT_FOUND, "The merchant has no authorization with this key yet."
            )
        return found.payment.payment_id

    def _connector(self, payment: Payment) -> Connector:
        connector = self._router.connector(payment.connector, payment.connector_account_id)
        if connector is None:
            raise refuse(
                Reason.CONNECTOR_UNAVAILABLE,
                "The payment's connector is not configured here.",
                connector=payment.connector,
            )
        return connector

    def _recover_after_s(self, connector: Connector) -> float:
        return (
            self._limits.send_window_s
            + connector.capabilities.answer_timeout_s
            + self._limits.recover_margin_s
        )

    def _takeover_after_s(self, operation: Operation) -> float:
        attempt = operation.attempt
        connector = self._router.connector(attempt.connector, attempt.connector_account_id)
        if connector is None:
            return self._limits.first_check_s
        return self._recover_after_s(connector)

    def _is_told_of(self, operation: Operation) -> bool:
        attempt = operation.attempt
        connector = self._router.connector(attempt.connector, attempt.connector_account_id)
        return connector is not None and connector.capabilities.tells_by_notification

    # --- the PSP and the outcome ---

    async def _perform(
        self,
        command: Command,
        begun: Begun,
        connector: Connector,
        aggregate: Aggregate | None,
        started: float,
        plan: Plan | None = None,
    ) -> Answer:
        """Send the attempt (or accept a cancel request), write what came of it, and answer."""
        command.executes = True
        psp_s: float | None = None
        if begun.cancel_request:
            found = await self._outcomes.accept_cancel_request(begun.operation, begun.payment)
        else:
            answer, psp_s = await self._ask(command, begun, connector, aggregate, started, plan)
            while plan is not None and plan.more:
                again = await self._elsewhere(command, begun, answer, plan)
                if again is None:
                    break
                (begun, connector, started), before_s, before = again, psp_s, answer
                answer, psp_s = await self._ask(command, begun, connector, None, started, plan)
                self._observer.cascaded(before, answer)
                if before_s is not None:
                    psp_s = before_s + (psp_s or 0.0)
            operation, payment = begun.operation, begun.payment
            now = time.monotonic()
            try:
                found = await self._outcomes.write(operation, payment, answer)
            except StoreUnavailable:
                self._observer.outcome_lost(operation)
                raise
            ended = time.monotonic()
            self._occupancy.passed(_OUTCOME, ended - now)
            if psp_s is not None and not command.item:
                self._observer.answered(ended - command.begun_at - psp_s)
        operation = found.operation
        response = operation.response or self._encoder.response(operation, found.payment)
        frozen = operation.response is not None
        # Fenced out, and a repeat has executed since: the answer is that call's.
        replayed = operation.attempt.number != begun.operation.attempt.number
        first_request_id = operation.request_id if replayed else ""
        return Answer(response, replayed, first_request_id, operation.payment_id, frozen)

    async def _ask(
        self,
        command: Command,
        begun: Begun,
        connector: Connector,
        aggregate: Aggregate | None,
        started: float,
        plan: Plan | None,
    ) -> tuple[ConnectorAnswer, float | None]:
        """Send the attempt, unless it is too late; the answer, and the seconds that it took.

        `started` is when its write began.
        """
        operation = begun.operation
        send_before = window_ends = started + self._limits.send_window_s
        if command.deadline is not None:
            send_before = min(window_ends, command.deadline - self._limits.min_send_budget_s)
        sent = time.monotonic()
        self._occupancy.passed(_INTENT, sent - started)
        if sent >= send_before:
            by_window = send_before == window_ends
            late = Reason.SEND_WINDOW_PASSED if by_window else Reason.DEADLINE_TOO_SHORT
            answer = ConnectorAnswer(Delivery.NOT_SENT, reason=late)
            self._routing.observed(plan, command.mode, operation, answer, 0.0)
            return answer, None
        request = connector_request(self._encoder, operation, begun.payment, aggregate)
        if isinstance(command, Authorize):
            request.secrets = command.secrets
        self._occupancy.leave(command.merchant_id)
        try:
            answer = await connector.send(request, send_before)
        finally:
            self._occupancy.come_back(command.merchant_id)
        psp_s = time.monotonic() - sent
        self._observer.connector_called(operation.attempt.connector, operation.kind, answer, psp_s)
        self._routing.observed(plan, command.mode, operation, answer, psp_s)
        return answer, psp_s

    async def _elsewhere(
        self, command: Command, begun: Begun, answer: ConnectorAnswer, plan: Plan
    ) -> tuple[Begun, Connector, float] | None:
        """The next attempt of a cascade, durable, whom it asks, and when its write began; None
        where the answer stands.

        What the last attempt came to is written with it, so that whoever finds the operation finds
        one attempt that may have an effect, the latest.
        """
        follows = cascade.after(answer, plan.soft)
        now = time.monotonic()
        if follows is cascade.Next.NOTHING or (
            command.deadline is not None
            and now >= command.deadline - self._limits.min_send_budget_s
        ):
            return None
        if follows is cascade.Next.REATTEMPT and not await self._may_reattempt(command, plan):
            return None
        taken = self._routing.take(plan)
        if taken is None:
            return None
        candidate, connector = taken
        again = decisions.cascade(
            begun.payment,
            begun.operation,
            answer,
            connector=candidate.connector,
            connector_account_id=candidate.connector_account_id,
        )
        started = time.monotonic()
        write = self._write_again(begun.operation, again, connector)
        try:
            is_written = await self._is_written(write, plan, started)
        except StoreUnavailable:
            self._observer.outcome_lost(begun.operation)
            raise
        # Otherwise somebody changed the payment, as by a void: the answer stands.
        return (again, connector, started) if is_written else None

    async def _may_reattempt(self, command: Command, plan: Plan) -> bool:
        """Whether the networks' limits let the card be tried again; no where nobody knows."""
        facts, reattempts = plan.facts, self._routing.reattempts
        if facts is None or reattempts is None or not facts.instrument:
            return False
        if not self._routing.may_take(plan):
            return False  # and none is counted
        if isinstance(command, Authorize) and command.secrets:
            return False  # a network token's cryptogram is for one authorization
        limits = cascade.limits_of(facts.scheme)
        return await reattempts.take(command.merchant_id, facts.instrument, limits)


async def _tell(told: "asyncio.Future[Answer]", work: Coroutine[Any, Any, Answer]) -> None:
    """Do the work, and tell its caller what came of it, where there still is one."""
    try:
        answer = await work
    except asyncio.CancelledError:
        told.cancel()
        raise
    except Exception as error:  # noqa: BLE001 - its caller's
        if not told.done():
            told.set_exception(error)
        elif not isinstance(error, GatewayError):
            _log.exception("a call that went on without its caller failed")
    else:
        if not told.done():
            told.set_result(answer)


_NOT_BY_STATE = frozenset(
    {
        Reason.IDEMPOTENCY_KEY_REUSED,
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT,
        Reason.STORE_UNAVAILABLE,
        Reason.CONTENTION,
        Reason.OVERLOADED,
        Reason.DEADLINE_TOO_SHORT,
    }
)
"""Refusals that say nothing about the payment's state: no earlier call can be behind them."""


def _begin(command: FollowUp, aggregate: Aggregate, origin: Origin) -> Begun:
    match command:
        case Capture():
            return decisions.begin_capture(
                aggregate, origin, command.amount_minor, command.currency, command.final
            )
        case Void():
            return decisions.begin_void(aggregate, origin, command.note)
        case Refund():
            return decisions.begin_refund(
                aggregate,
                origin,
                command.amount_minor,
                command.currency,
                command.capture_operation_id,
                command.note,
            )
        case Increment():
            return decisions.begin_increment(
                aggregate, origin, command.amount_minor, command.currency
            )


def _same_call(command: Command, operation: Operation) -> bool:
    return operation.fingerprint == command.fingerprint


def _key_reused() -> GatewayError:
    return refuse(
        Reason.IDEMPOTENCY_KEY_REUSED, "The idempotency key was used with another payload."
    )


def _in_flight() -> GatewayError:
    return GatewayError(
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT,
        "A call with this idempotency key is in progress.",
        retry_after_s=0.2,
    )


def _store_unavailable() -> GatewayError:
    return GatewayError(
        Reason.STORE_UNAVAILABLE,
        "The store is away; whether the call took effect is not known: repeat it with its key.",
        retry_after_s=1.0,
    )
