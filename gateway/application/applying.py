"""Applies what PSPs told: a notification is evidence for an attempt, or a fact from elsewhere.

An unfinished operation is left to recovery, which has one way to settle it: the notification is its
evidence, and stays until the operation is definite. What had ended is moved along the transition
table, or reversed. What nobody asked the gateway for, as a refund in the PSP's console, becomes an
operation of the PSP's origin. Events may come in any order: of those of one thing the latest by the
PSP's clock counts. Any number of gateways may run it, and a notification that is applied twice has
one effect: a lease spreads the work, the payment's version keeps it right.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, Protocol

from gateway.application.notifications import (
    Applied,
    DisputeStage,
    DisputeStatus,
    LookupUnavailable,
    Notification,
    NotificationKind,
    NotificationStore,
    Pending,
    Received,
    ReferenceLookup,
    Result,
)
from gateway.application.outcomes import Outcomes
from gateway.application.ports import (
    Capabilities,
    Connector,
    Encoder,
    Found,
    Router,
    Store,
    StoreUnavailable,
)
from gateway.application.requests import connector_request
from gateway.domain import decisions, states
from gateway.domain.ids import is_operation_id
from gateway.domain.model import (
    Aggregate,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    Verdict,
)
from gateway.domain.states import Event

_log = logging.getLogger(__name__)

K = OperationKind
S = OperationState
N = NotificationKind

_KINDS: Final = {
    N.AUTHORIZATION: frozenset({K.AUTHORIZE, K.VERIFY}),
    N.CAPTURE: frozenset({K.CAPTURE}),
    N.VOID: frozenset({K.VOID, K.REVERSAL}),
    N.REFUND: frozenset({K.REFUND}),
    N.INCREMENT: frozenset({K.INCREMENT}),
}
_ELSEWHERE: Final = {N.CAPTURE: K.CAPTURE, N.REFUND: K.REFUND}
_DEFINITE: Final = frozenset(
    {Event.APPROVED, Event.DECLINED, Event.FAILED, Event.CANCELED, Event.EXPIRED}
)
_RETURNED: Final = frozenset({Event.DECLINED, Event.FAILED, Event.CANCELED})
_TAKEN_BACK: Final = frozenset({S.CANCELED, S.EXPIRED})
_DISPUTED: Final = {
    DisputeStatus.OPENED: Verdict.PENDING,
    DisputeStatus.CHALLENGED: Verdict.PENDING,
    DisputeStatus.WON: Verdict.FAILED,
    DisputeStatus.CANCELLED: Verdict.FAILED,
    DisputeStatus.LOST: Verdict.APPROVED,
    DisputeStatus.ACCEPTED: Verdict.APPROVED,
    DisputeStatus.EXPIRED: Verdict.APPROVED,
}
_NO_NEWS: Final = Applied(Result.NO_NEWS)
_UNMATCHED: Final = Applied(Result.UNMATCHED)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The bounds of applying; times in seconds."""

    interval_s: float
    """The pause between two looks, when there is nothing to do and nobody wakes it."""
    lease_s: float
    """For how long a notification is left to the applier that took it."""
    batch_max: int
    """How many are taken at once; never more are taken than have a place."""
    concurrency_max: int
    """How many are at work at once: the places."""
    account_concurrency_max: int
    """How many of these are of one connector account: one whose PSP hangs leaves places to the
    others."""
    backoff_s_min: float
    """The first pause where one cannot be applied yet; doubled up to the next."""
    backoff_s_max: float
    """The longest pause."""


class ApplyingObserver(Protocol):
    """Counts what was applied, for metrics."""

    def notification_applied(self, connector: str, kind: NotificationKind, result: Result) -> None:
        """One is done with."""

    def applying_failed(self) -> None:
        """A look at the store or at a notification failed."""


class _NotYet(Exception):
    """It cannot be applied now; the text says why."""


class Applier:
    """The loop."""

    def __init__(
        self,
        notifications: NotificationStore,
        store: Store,
        router: Router,
        lookup: ReferenceLookup,
        encoder: Encoder,
        outcomes: Outcomes,
        schedule: Schedule,
        observer: ApplyingObserver,
    ) -> None:
        self._notifications = notifications
        self._store = store
        self._router = router
        self._lookup = lookup
        self._encoder = encoder
        self._outcomes = outcomes
        self._schedule = schedule
        self._observer = observer
        self._at_work: list[Received] = []
        """What has a place now."""
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Something was kept: look now."""
        self._woken.set()

    async def run(self) -> None:
        """Look for work until cancelled; a place that comes free is filled again at once."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._woken.clear()
                has_more = False
                try:
                    room = self._room
                    lines = await self._take(room)
                except Exception as error:  # noqa: BLE001 - the loop outlives whatever one look meets
                    self._observer.applying_failed()
                    _log.warning(
                        "notifications could not be looked for: %s",
                        error,
                        exc_info=not isinstance(error, StoreUnavailable),
                    )
                else:
                    has_more = sum(map(len, lines)) == room > 0
                    for line in lines:
                        tasks.create_task(self._apply_line(line))
                if not has_more:
                    pause_s = self._schedule.interval_s * random.uniform(0.8, 1.2)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await self._woken.wait()

    async def run_once(self) -> int:
        """Apply what is due and has a place; how many were looked at."""
        lines = await self._take(self._room)
        await asyncio.gather(*(self._apply_line(line) for line in lines))
        return sum(map(len, lines))

    @property
    def _room(self) -> int:
        """How many may be taken now."""
        free = self._schedule.concurrency_max - len(self._at_work)
        return min(free, self._schedule.batch_max)

    async def _take(self, limit: int) -> Sequence[Sequence[Pending]]:
        """Take what is due; each has a place from now on."""
        if limit <= 0:
            return []
        schedule = self._schedule
        pending = await self._notifications.lease(
            limit,
            schedule.lease_s,
            account_max=schedule.account_concurrency_max,
            at_work=tuple(self._at_work),
        )
        self._at_work += [each.received for each in pending]
        # Those of one thing one after the other, in the order of the PSP's clock.
        lines: dict[tuple[str, str], list[Pending]] = {}
        for each in pending:
            received = each.received
            line = received.connector_account_id, _line_of(received.notification)
            lines.setdefault(line, []).append(each)
        return list(lines.values())

    async def _apply_line(self, line: Sequence[Pending]) -> None:
        for each in line:
            try:
                await self._guarded(each)
            finally:
                self._at_work.remove(each.received)
                self._woken.set()

    async def _guarded(self, pending: Pending) -> None:
        received = pending.received
        notification = received.notification
        try:
            try:
                applied = await self.apply(received, tries=pending.tries)
            except (_NotYet, LookupUnavailable) as reason:
                _log.info("a notification has to wait: %s", reason)
                await self._notifications.put_off(received, self._backoff_s(pending.tries))
                return
            await self._notifications.finish(received, applied)
            self._observer.notification_applied(
                notification.connector, notification.kind, applied.result
            )
        except Exception as error:  # noqa: BLE001 - one must not stop the others
            # The lease runs out, and it is looked at again.
            self._observer.applying_failed()
            _log.warning(
                "a notification could not be applied",
                exc_info=not isinstance(error, StoreUnavailable),
                extra={
                    "merchant_id": received.merchant_id,
                    "connector": notification.connector,
                    "connector_account_id": received.connector_account_id,
                },
            )

    def _backoff_s(self, tries: int) -> float:
        schedule = self._schedule
        pause_s: float = schedule.backoff_s_min * 2 ** min(tries, 30)
        return min(pause_s, schedule.backoff_s_max) * random.uniform(0.8, 1.2)

    # --- one notification ---

    async def apply(self, received: Received, tries: int = 0) -> Applied:
        """Do what it calls for. `tries`: how often it had to wait.

        Raises _NotYet where that cannot be done now, LookupUnavailable and StoreUnavailable.
        """
        notification = received.notification
        if notification.kind is N.UNKNOWN:
            return Applied(Result.UNKNOWN)
        if notification.kind is not N.DISPUTE and notification.answer is None:
            return Applied(Result.UNKNOWN)
        named = await self._find(received)
        if named is None:
            return _UNMATCHED
        found, number = named
        operation = found.operation
        if _attempt_of(notification.reference) is None:
            result = await self._from_elsewhere(received, operation, number, tries)
        elif notification.kind is N.REVERSAL:
            result = await self._of_reversal(received, found, number, tries)
        elif operation.kind in _KINDS.get(notification.kind, ()):
            assert notification.answer is not None
            result = await self._ours(received, found, number, notification.answer, tries)
        else:
            result = await self._otherwise(received, found, number, tries)
            if result is _UNMATCHED:
                return result
        return replace(
            result,
            payment_id=operation.payment_id,
            operation_id=result.operation_id or operation.operation_id,
        )

    async def _otherwise(
        self, received: Received, found: Found, number: int, tries: int
    ) -> Applied:
        """What has the reference of an operation of another kind."""
        notification, operation = received.notification, found.operation
        result = _UNMATCHED
        if notification.kind is N.CAPTURE and operation.kind is K.AUTHORIZE:
            result = await self._automatic_capture(received, found, number)
        if result is _UNMATCHED and notification.payment_reference == notification.reference:
            # The payment's: what was done elsewhere has none of its own.
            return await self._from_elsewhere(received, operation, number, tries)
        return result

    async def _find(self, received: Received) -> tuple[Found, int] | None:
        """The operation that it names, or the authorization of the payment that it belongs to, and
        which attempt of it.

        None where that is not one of the account.
        """
        notification = received.notification
        reference = notification.reference or notification.payment_reference
        if not reference and notification.payment_transaction_id:
            reference = (
                await self._lookup.reference_of(
                    received.connector_account_id, notification.payment_transaction_id
                )
                or ""
            )
        number = _attempt_of(reference)
        if number is None:
            return None
        operation_id = reference.rpartition("-")[0]
        found = await self._store.find_operation(received.merchant_id, operation_id)
        if found is None:
            return None
        operation = found.operation
        for attempt in (operation.attempt, *operation.superseded_attempts):
            if attempt.number == number:
                of_account = attempt.connector_account_id == received.connector_account_id
                return (found, number) if of_account else None
        return None

    async def _ours(
        self, received: Received, found: Found, number: int, answer: ConnectorAnswer, tries: int
    ) -> Applied:
        """What is told of an operation of ours."""
        operation = found.operation
        event = decisions.event_for(found.payment, operation, answer, self._outcomes.now())
        if event not in _DEFINITE or await self._notifications.is_outdated(received, event):
            return _NO_NEWS
        if operation.attempt.number != number:
            return await self._late(received, found, number, answer, event)
        if operation.state is S.PROCESSING:
            raise _NotYet("its operation is being sent")
        if operation.state in states.UNFINISHED:
            if states.next_state(operation.kind, operation.state, event) is None:
                return _NO_NEWS
            await self._outcomes.keep(operation, answer)
            raise _NotYet("recovery weighs it")
        if operation.state is not S.SUCCEEDED:
            return await self._late(received, found, number, answer, event)
        if event is not Event.APPROVED:
            return await self._ended(found, answer, event)
        return await self._confirmed(received.notification, found, tries)

    async def _of_reversal(
        self, received: Received, found: Found, number: int, tries: int
    ) -> Applied:
        """What became of the taking back of an attempt: of its reversal, or of the void for which
        a charge in flight is taken back. A refusal ends it, and what returns after its success is
        shown to a person: the customer has no money.
        """
        notification, target = received.notification, found.operation
        assert notification.answer is not None
        aggregate = await self._store.load(target.merchant_id, target.payment_id)
        if aggregate is None:
            raise StoreUnavailable("the payment's row is missing")
        event = decisions.event_of(notification.answer)
        takings_back = [
            each
            for each in aggregate.operations
            if (each.kind is K.REVERSAL and each.note == notification.reference)
            or (each.kind in (K.REVERSAL, K.VOID) and each.reference == notification.reference)
        ]
        is_charge = target.kind is K.AUTHORIZE and target.attempt.number == number
        if not takings_back and is_charge and event in _RETURNED:
            # Of a charge that was voided in flight. That it is gone is told as a void.
            takings_back = [each for each in aggregate.operations if each.kind is K.VOID]
        for operation in takings_back:
            taking_back = Found(operation, aggregate.payment)
            if operation.state in states.UNFINISHED:
                applied = await self._ours(
                    received, taking_back, operation.attempt.number, notification.answer, tries
                )
            elif operation.state is not S.SUCCEEDED or event not in _RETURNED:
                continue
            else:
                applied = await self._came_back(received, taking_back, event)
            return replace(applied, operation_id=operation.operation_id)
        # In doubt, or after its customer's time, recovery takes it back without an operation.
        by_recovery = target.attempt.number == number and target.state in _TAKEN_BACK
        if by_recovery and not takings_back and event in _RETURNED:
            return await self._came_back(received, found, event)
        return _NO_NEWS

    async def _came_back(self, received: Received, taken_back: Found, event: Event) -> Applied:
        """What was taken back is not, after all."""
        if await self._notifications.is_outdated(received, event):
            return _NO_NEWS
        state = taken_back.operation.state.name
        await self._report(taken_back, "reversal_failed", state, event.name)
        return Applied(Result.RECORDED)

    async def _automatic_capture(self, received: Received, found: Found, number: int) -> Applied:
        """What is told of the capture that came with an authorization, under its reference."""
        authorization, payment, answer = (
            found.operation,
            found.payment,
            received.notification.answer,
        )
        assert answer is not None
        is_present = authorization.attempt.number == number
        if is_present and authorization.state in states.UNFINISHED:
            raise _NotYet("its payment is not authorized yet")
        automatic = payment.capture_method is CaptureMethod.AUTOMATIC
        if automatic and (not is_present or authorization.state is not S.SUCCEEDED):
            # Whatever was charged there is the attempt's, which is over.
            event = decisions.event_of(answer)
            told = replace(received.notification, kind=N.AUTHORIZATION)
            if await self._notifications.is_outdated(replace(received, notification=told), event):
                return _NO_NEWS
            return await self._late(received, found, number, answer, event)
        aggregate = await self._store.load(authorization.merchant_id, authorization.payment_id)
        for operation in aggregate.operations if aggregate else ():
            if (
                operation.kind is K.CAPTURE
                and operation.origin is OperationOrigin.GATEWAY
                and operation.parent_operation_id == authorization.operation_id
            ):
                capture = Found(operation, payment)
                applied = await self._its_capture(received, capture, answer)
                return replace(applied, operation_id=operation.operation_id)
        return _UNMATCHED

    async def _its_capture(
        self, received: Received, capture: Found, answer: ConnectorAnswer
    ) -> Applied:
        """The PSP knows it by its authorization's reference alone, so there is nothing that could
        be asked for or reversed by itself.
        """
        operation = capture.operation
        event = decisions.event_of(answer)
        if event is not Event.APPROVED or operation.state is S.SUCCEEDED:
            return await self._ours(received, capture, operation.attempt.number, answer, 0)
        taken_back = capture.payment.cancel_requested
        if taken_back or await self._notifications.is_outdated(received, event):
            return _NO_NEWS
        await self._report(capture, "late_success", operation.state.name, event.name)
        return Applied(Result.RECORDED)

    async def _ended(self, found: Found, answer: ConnectorAnswer, event: Event) -> Applied:
        """Something that had succeeded has not, or no longer."""
        operation = found.operation
        bounces = states.next_state(operation.kind, operation.state, Event.BOUNCED) is not None
        if bounces and event in _RETURNED:
            await self._outcomes.bounce(operation, answer)
            return Applied(Result.APPLIED)
        if states.next_state(operation.kind, operation.state, event) is not None:
            return await self._expired(found.payment, answer)
        if operation.kind in (K.VOID, K.REVERSAL):
            return _NO_NEWS  # of several sendings, all but one are refused
        await self._outcomes.contradict(operation, answer)
        return Applied(Result.RECORDED)

    async def _confirmed(self, notification: Notification, found: Found, tries: int) -> Applied:
        """What succeeded did succeed; another amount than was told before is shown to a person."""
        operation = found.operation
        expected = told = ""
        if notification.currency not in ("", operation.currency):
            expected, told = operation.currency, notification.currency
        elif notification.kind is not N.VOID and notification.amount_minor is not None:
            expected, told = str(decisions.told_of(operation)), str(notification.amount_minor)
        if expected != told:
            await self._report(found, "late_amount", expected, told)
            return Applied(Result.RECORDED)
        return Applied(Result.APPLIED) if tries else _NO_NEWS

    async def _report(self, found: Found, kind: str, expected: str, reported: str) -> None:
        operation = found.operation
        await self._outcomes.record(
            operation.merchant_id,
            operation.payment_id,
            lambda aggregate, at, _: decisions.report(
                aggregate.payment,
                next(
                    each
                    for each in aggregate.operations
                    if each.operation_id == operation.operation_id
                ),
                kind,
                expected,
                reported,
                at,
            ),
        )

    async def _late(
        self, received: Received, found: Found, number: int, answer: ConnectorAnswer, event: Event
    ) -> Applied:
        """A success of what is over must not stand; everything else is no news.

        The event may be older than the end: whoever can be asked is asked before.
        """
        operation = found.operation
        if event is not Event.APPROVED:
            return _NO_NEWS
        reference = received.notification.reference
        attempts = (operation.attempt, *operation.superseded_attempts)
        attempt = next(each for each in attempts if each.number == number)
        connector = self._router.connector(attempt.connector, attempt.connector_account_id)
        if connector is not None and _was_taken_back(received, operation, number, connector):
            return _NO_NEWS
        if connector is not None and _can_deny(connector.capabilities):
            aggregate = await self._store.load(operation.merchant_id, operation.payment_id)
            request = connector_request(self._encoder, operation, found.payment, aggregate)
            request.reference = reference
            request.connector_account_id = attempt.connector_account_id
            if operation.kind in (K.AUTHORIZE, K.VERIFY):
                request.target_transaction_id = answer.connector_transaction_id
            told = await connector.query(operation.kind, reference, request)
            if told is None or decisions.event_of(told) is Event.DOUBTED:
                raise _NotYet("the PSP does not confirm it now")
            if decisions.event_of(told) is not Event.APPROVED:
                return _NO_NEWS
        await self._outcomes.reverse(operation, number, answer)
        return Applied(Result.APPLIED)

    # --- done elsewhere ---

    async def _from_elsewhere(
        self, received: Received, named: Operation, number: int, tries: int
    ) -> Applied:
        """What is told of a payment of ours, without a reference of ours of its own, by that of an
        attempt of its authorization, or of what followed, which was done to the present one.
        """
        notification = received.notification
        aggregate = await self._store.load(received.merchant_id, named.payment_id)
        if aggregate is None:
            raise StoreUnavailable("the payment's row is missing")
        authorization = _authorization(aggregate)
        if named.kind not in (K.AUTHORIZE, K.VERIFY, K.REVERSAL):
            number = authorization.attempt.number
        if notification.kind is N.VOID:
            return await self._voided(received, aggregate, number, tries)
        if authorization.state in states.UNFINISHED:
            raise _NotYet("its payment is not authorized yet")
        if notification.kind is N.DISPUTE:
            return await self._disputed(received, aggregate)
        kind, answer = _ELSEWHERE.get(notification.kind), notification.answer
        if kind is None or answer is None:
            return _UNMATCHED
        ours = [
            each
            for each in aggregate.operations
            if each.kind is kind and each.origin is not OperationOrigin.PSP
        ]
        told_id = answer.connector_transaction_id
        for operation in ours:
            if told_id and operation.attempt.connector_transaction_id == told_id:
                found = Found(operation, aggregate.payment)
                return await self._ours(received, found, operation.attempt.number, answer, tries)
        if any(
            each.state in states.UNFINISHED and not each.attempt.connector_transaction_id
            for each in ours
        ):
            raise _NotYet("it may be an operation of ours that has no answer yet")
        return await self._recorded(received, aggregate, kind, number, answer)

    async def _recorded(
        self,
        received: Received,
        aggregate: Aggregate,
        kind: OperationKind,
        number: int,
        answer: ConnectorAnswer,
    ) -> Applied:
        notification, payment = received.notification, aggregate.payment
        event = decisions.event_of(answer)
        if event not in _DEFINITE:
            return _NO_NEWS
        known = decisions.done_elsewhere(aggregate, kind, answer.connector_transaction_id)
        is_outdated = await self._notifications.is_outdated(received, event, by_id=True)
        if event is not Event.APPROVED:
            ended = event in _RETURNED and not is_outdated
            return await self._ended_elsewhere(known if ended else None, answer)
        if is_outdated:
            # Whoever was told its end may have found it not recorded yet.
            return await self._ended_elsewhere(known, answer)
        if known is not None:
            return Applied(Result.NO_NEWS, operation_id=known.operation_id)
        amount, currency = notification.amount_minor, notification.currency
        authorization = _authorization(aggregate)
        is_present = number == authorization.attempt.number
        if amount is None or amount < 0 or currency not in ("", payment.currency) or not is_present:
            # What an earlier attempt had taken is none of the payment's money.
            of_attempt = "" if is_present else f" of attempt {number}"
            reported = f"{kind.name} {amount} {currency}{of_attempt}"
            found = Found(authorization, payment)
            await self._report(found, "elsewhere", payment.currency, reported)
            return Applied(Result.RECORDED)
        await self._outcomes.record(
            payment.merchant_id,
            payment.payment_id,
            lambda now, at, new_id: decisions.record_elsewhere(
                now, kind, amount, answer, at, new_id
            ),
        )
        if await self._notifications.is_outdated(received, event, by_id=True):
            raise _NotYet("its end was told meanwhile")
        return Applied(Result.RECORDED)

    async def _ended_elsewhere(self, known: Operation | None, answer: ConnectorAnswer) -> Applied:
        if known is None or known.state is not S.SUCCEEDED:
            return _NO_NEWS
        await self._outcomes.bounce(known, answer)
        return Applied(Result.APPLIED, operation_id=known.operation_id)

    async def _voided(
        self, received: Received, aggregate: Aggregate, number: int, tries: int
    ) -> Applied:
        """The authorization is gone: by a void of ours, by time, or by somebody elsewhere.

        Of an attempt that another one has followed, it ends the reversal alone.
        """
        answer, payment = received.notification.answer, aggregate.payment
        authorization = _authorization(aggregate)
        if answer is None or decisions.event_of(answer) not in (Event.APPROVED, Event.EXPIRED):
            return _NO_NEWS
        expired = answer.verdict is Verdict.EXPIRED
        is_present = number == authorization.attempt.number
        if is_present and authorization.state in states.UNFINISHED:
            over = replace(answer, verdict=Verdict.EXPIRED if expired else Verdict.CANCELED)
            return await self._ours(received, Found(authorization, payment), number, over, tries)
        done = replace(answer, verdict=Verdict.APPROVED)
        reference = f"{authorization.operation_id}-{number}"
        reversals = [
            each
            for each in aggregate.operations
            if each.kind is K.REVERSAL and each.note == reference
        ]
        voids = [each for each in aggregate.operations if each.kind is K.VOID and is_present]
        for operation in (*voids, *reversals):
            if operation.state in states.UNFINISHED:
                found = Found(operation, payment)
                return await self._ours(received, found, operation.attempt.number, done, tries)
        is_open = payment.captured_minor < payment.authorized_minor and not payment.voided_minor
        stands = is_present and is_open and authorization.state is S.SUCCEEDED
        if not stands or reversals:
            return _NO_NEWS
        if expired:
            return await self._expired(payment, answer)
        return await self._voided_elsewhere(aggregate, done)

    async def _expired(self, payment: Payment, answer: ConnectorAnswer) -> Applied:
        """What is left of an authorization has expired.

        A capture under way may open the payment again when it fails, as one that was to be the
        last: the end is written after it.
        """

        def expire(aggregate: Aggregate, at: datetime, new_id: str) -> decisions.Settled | None:
            if aggregate.payment.capture_pending_minor:
                raise _NotYet("a capture of it is under way")
            present = _authorization(aggregate)
            return decisions.settle(aggregate.payment, present, answer, at, new_id)

        recorded = await self._outcomes.record(payment.merchant_id, payment.payment_id, expire)
        return Applied(Result.APPLIED) if recorded else _NO_NEWS

    async def _voided_elsewhere(self, aggregate: Aggregate, answer: ConnectorAnswer) -> Applied:
        payment = aggregate.payment
        open_minor = payment.authorized_minor - payment.captured_minor
        recorded = await self._outcomes.record(
            payment.merchant_id,
            payment.payment_id,
            lambda now, at, new_id: decisions.record_elsewhere(
                now, K.VOID, open_minor, answer, at, new_id
            ),
        )
        return Applied(Result.RECORDED) if recorded else _NO_NEWS

    async def _disputed(self, received: Received, aggregate: Aggregate) -> Applied:
        notification, payment = received.notification, aggregate.payment
        dispute = notification.dispute
        if dispute is None:
            return Applied(Result.UNKNOWN)
        verdict = _DISPUTED[dispute.status]
        if dispute.stage is DisputeStage.PRE_DISPUTE and dispute.status is DisputeStatus.EXPIRED:
            verdict = Verdict.PENDING  # a question that had no answer: no money was demanded yet
        answer = ConnectorAnswer(
            Delivery.ANSWERED,
            verdict,
            Outcome(
                connector_code=dispute.reason,
                connector_message=f"{dispute.stage.name} {dispute.status.name}",
            ),
            connector_transaction_id=dispute.dispute_id,
            currency=notification.currency,
        )
        recorded = await self._outcomes.record(
            payment.merchant_id,
            payment.payment_id,
            lambda now, at, new_id: decisions.record_dispute(
                now,
                received.connector_account_id,
                max(0, notification.amount_minor or 0),
                answer,
                at,
                new_id,
            ),
        )
        known = decisions.done_elsewhere(aggregate, K.DISPUTE, dispute.dispute_id)
        if known is None:
            return Applied(Result.RECORDED) if recorded else _NO_NEWS
        result = Result.APPLIED if recorded else Result.NO_NEWS
        return Applied(result, operation_id=known.operation_id)


def _can_deny(capabilities: Capabilities) -> bool:
    """Whether the PSP's answer to a question is newer than what it told before."""
    return capabilities.query_by_reference and not capabilities.tells_by_notification


def _was_taken_back(
    received: Received, operation: Operation, number: int, connector: Connector
) -> bool:
    """Whether a success was told before the answer that it was taken back, by a PSP that answers
    reversals with what they did and cannot be asked.
    """
    capabilities, told_at = connector.capabilities, received.notification.occurred_at
    return (
        capabilities.cancel_by_reference
        and not (capabilities.query_by_reference or capabilities.tells_by_notification)
        and operation.state is S.CANCELED
        and operation.attempt.number == number
        and operation.attempt.delivery is Delivery.ANSWERED
        and told_at is not None
        and operation.updated_at is not None
        and told_at <= operation.updated_at
    )


def _line_of(notification: Notification) -> str:
    """What is applied one after the other."""
    dispute = notification.dispute
    return notification.subject or (dispute.dispute_id if dispute else "") or notification.event_id


def _attempt_of(reference: str) -> int | None:
    """The attempt's number in a reference of ours; None in anything else."""
    operation_id, _, number = reference.rpartition("-")
    if not is_operation_id(operation_id) or not (number.isascii() and number.isdigit()):
        return None
    return int(number)


def _authorization(aggregate: Aggregate) -> Operation:
    return next(each for each in aggregate.operations if each.kind in (K.AUTHORIZE, K.VERIFY))
