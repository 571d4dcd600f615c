"""Recovery: takes over operations whose sender died or got no answer, and makes them definite.

It asks the PSP by reference, or cancels the reference; it never sends an authorization, a capture
or a refund. "Not found" alone proves nothing, since a paused sender may still send: only a
cancelled reference does. A cancellation is announced in the store first, and from then on nothing
but a cancellation settles the operation, since one may be on its way still. Voids and reversals,
which release money, are repeated until the PSP confirms them. What waits for a customer or for the
PSP's later answer is asked about at growing intervals; when the customer's time is over, it is
cancelled at the PSP, and only that ends it. Any number of gateways may run it: a
lease spreads the work, the operation's epoch keeps it right.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from gateway.application.outcomes import Outcomes
from gateway.application.ports import (
    Connector,
    ConnectorRequest,
    Encoder,
    Lease,
    Router,
    Store,
    StoreUnavailable,
)
from gateway.application.requests import connector_request
from gateway.domain import decisions, states
from gateway.domain.errors import Reason
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    DoubtCause,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Payment,
    Verdict,
)
from gateway.domain.states import Event

_log = logging.getLogger(__name__)

K = OperationKind
S = OperationState

_WAITING = frozenset({S.PENDING, S.REQUIRES_ACTION})
"""The PSP has acknowledged it: nothing is in doubt, and time alone is missing."""
_WAITING_GROWTH = 1.3
"""How much longer each pause in waiting is than the one before: a customer who comes back after t
seconds is noticed within about a quarter of t, and a day takes some thirty questions."""

_NO_ANSWER = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.RECOVERED)
_NOTHING_STANDS = frozenset(
    {Event.CANCELED, Event.NEVER_SENT, Event.DECLINED, Event.FAILED, Event.EXPIRED}
)
"""What a cancellation may find of a reference: taken back, or without effect."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The bounds of recovery."""

    interval_s: float
    """The pause between two looks, when there is nothing to do."""
    search_interval_s: float
    """The pause between two searches for what dead senders left. Each reads every operation of the
    store's horizon."""
    lease_s: float
    """For how long an operation is left to the recoverer that took it."""
    batch_max: int
    """How many operations are taken, and how many of dead senders are found, at once; never more
    are taken than have a place."""
    concurrency_max: int
    """How many operations are worked on at once: the places."""
    account_concurrency_max: int
    """How many of these are of one connector account: one whose PSP hangs leaves places to the
    others."""
    backoff_s_min: float
    """The first pause between two looks at one operation; doubled up to the next."""
    backoff_s_max: float
    """The longest pause."""
    tries_max: int
    """After so many looks at an operation in doubt, it needs a person."""
    person_interval_s: float
    """The pause between two looks at one that needs a person."""
    waiting_interval_s_max: float
    """The longest pause between two looks at one that waits for a customer, or that its PSP has
    accepted and not finished."""
    action_margin_s: float
    """How long after the end of a customer's time a payment is cancelled at the PSP."""


class _Overtaken(Exception):
    """The lease ran out, and another recoverer has the operation."""


class RecoveryObserver(Protocol):
    """Counts what recovery does, for metrics."""

    def recovered(self, kind: OperationKind, state: OperationState) -> None:
        """An operation was looked at; the state that it is in now."""

    def recovery_failed(self) -> None:
        """A look at the store or at an operation failed."""


class Recovery:
    """The loop."""

    def __init__(
        self,
        store: Store,
        router: Router,
        encoder: Encoder,
        outcomes: Outcomes,
        schedule: Schedule,
        observer: RecoveryObserver,
    ) -> None:
        self._store = store
        self._router = router
        self._encoder = encoder
        self._outcomes = outcomes
        self._schedule = schedule
        self._observer = observer
        self._search_at = -math.inf
        self._at_work: dict[tuple[str, str], Operation] = {}
        """By merchant and id: what has a place now."""
        self._woken = asyncio.Event()
        """Something may be due, or have a place, that was not or had none."""

    async def run(self) -> None:
        """Look for work until cancelled; a place that comes free is filled again at once."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._search_forever())
            while True:
                self._woken.clear()
                has_more = False
                try:
                    room = self._room
                    leases = await self._take(room)
                except Exception as error:  # noqa: BLE001 - the loop outlives whatever one look meets
                    self._failed("recovery could not look for work", error)
                else:
                    has_more = len(leases) == room > 0
                    for lease in leases:
                        tasks.create_task(self._settle(lease))
                if not has_more:
                    pause_s = self._schedule.interval_s * random.uniform(0.8, 1.2)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await self._woken.wait()

    async def run_once(self) -> int:
        """One round: search, take over what is due and has a place, and try to settle it; how many
        operations were looked at. Raises StoreUnavailable where nothing could be taken over.
        """
        await self._search()
        leases = await self._take(self._room)
        await asyncio.gather(*(self._settle(lease) for lease in leases))
        return len(leases)

    @property
    def _room(self) -> int:
        """How many operations may be taken now."""
        free = self._schedule.concurrency_max - len(self._at_work)
        return min(free, self._schedule.batch_max)

    async def _take(self, limit: int) -> Sequence[Lease]:
        """Take over what is due; every operation of it has a place from now on."""
        if limit <= 0:
            return []
        leases = await self._store.lease(
            limit,
            self._schedule.lease_s,
            account_max=self._schedule.account_concurrency_max,
            at_work=tuple(self._at_work.values()),
        )
        for lease in leases:
            operation = lease.operation
            self._at_work[operation.merchant_id, operation.operation_id] = operation
        if leases:
            # A customer's time is judged by it, also where no call has come here yet.
            self._outcomes.observe(leases[-1].at)
        return leases

    async def _settle(self, lease: Lease) -> None:
        operation = lease.operation
        try:
            await self._guarded(lease)
        finally:
            del self._at_work[operation.merchant_id, operation.operation_id]
            self._woken.set()

    async def _search_forever(self) -> None:
        while True:
            await self._search()
            if self._search_at > -math.inf:
                pause_s = max(self._search_at - time.monotonic(), self._schedule.interval_s)
                await asyncio.sleep(pause_s)

    async def _search(self) -> None:
        """Put what dead senders left on the list; at once again where there may be more. One that
        fails stops nothing else.
        """
        now = time.monotonic()
        if now < self._search_at:
            return
        self._search_at = now + self._schedule.search_interval_s * random.uniform(0.8, 1.2)
        try:
            found = await self._store.expired(self._schedule.batch_max)
        except Exception as error:  # noqa: BLE001 - what is on the list does not depend on it
            self._failed("recovery could not search for what dead senders left", error)
            return
        if found >= self._schedule.batch_max:
            self._search_at = -math.inf
        if found:
            self._woken.set()

    def _failed(self, what: str, error: Exception) -> None:
        self._observer.recovery_failed()
        _log.warning("%s: %s", what, error, exc_info=not isinstance(error, StoreUnavailable))

    async def _guarded(self, lease: Lease) -> None:
        operation = lease.operation
        try:
            state = await self._resolve(lease)
            self._observer.recovered(operation.kind, state)
        except _Overtaken:
            _log.info("another recoverer has taken an operation over")
        except Exception as error:  # noqa: BLE001 - one operation must not stop the others
            # The lease runs out, and the operation is looked at again.
            self._observer.recovery_failed()
            _log.warning(
                "recovery could not settle an operation",
                exc_info=not isinstance(error, StoreUnavailable),
                extra={
                    "merchant_id": operation.merchant_id,
                    "payment_id": operation.payment_id,
                    "operation_id": operation.operation_id,
                },
            )

    async def _resolve(self, lease: Lease) -> OperationState:
        operation, payment = lease.operation, lease.aggregate.payment
        if operation.state not in states.UNFINISHED:
            await self._absorb_late(lease)
            return operation.state
        evidence = await self._evidence(lease)
        attempt = operation.attempt
        connector = self._router.connector(attempt.connector, attempt.connector_account_id)
        answer, decided = None, False
        if connector is not None:
            decided = evidence is not None and _is_last_word(lease, connector, evidence)
            if not decided:
                answer = await self._ask(lease, connector)
        if answer is None and evidence is not None and (decided or _may_decide(lease, evidence)):
            # The PSP comes first: who left evidence was fenced out by a recoverer, and that one may
            # have cancelled since what the evidence says.
            await self._bounce_what_was_voided(lease, evidence)
            answer = evidence
        if answer is None or not _is_news(payment, operation, answer, self._outcomes.now()):
            if operation.state is not S.PROCESSING:
                await self._postpone(lease, connector)
                return operation.state
            answer = _NO_ANSWER
        found = await self._outcomes.write(operation, payment, answer)
        return found.operation.state

    async def _postpone(self, lease: Lease, connector: Connector | None) -> None:
        """Look again later; seldom where recovery has asked often enough, and a person has to."""
        operation, schedule = lease.operation, self._schedule
        cause = _cause(lease, connector)
        is_overdue = decisions.is_unconfirmed(operation) and cause is not (
            DoubtCause.WAITS_FOR_OPERATION
        )
        is_given_up = lease.tries + 1 >= schedule.tries_max and (
            operation.state is S.IN_DOUBT or is_overdue
        )
        needs_person = is_given_up or (
            operation.state is S.IN_DOUBT and cause is DoubtCause.NO_MEANS
        )
        pause_s = self._backoff_s(lease.tries)
        if is_given_up:
            pause_s = max(pause_s, schedule.person_interval_s)
        elif operation.state in _WAITING and operation.kind is not K.VOID:
            pause_s = self._waiting_s(lease)
        await self._store.postpone(operation, pause_s, cause, needs_person=needs_person)

    async def _evidence(self, lease: Lease) -> ConnectorAnswer | None:
        """The evidence, where it is of the present attempt.

        A success of an attempt that another one has replaced is reversed.
        """
        operation, evidence = lease.operation, lease.evidence
        if evidence is None:
            return None
        number = evidence.attempt_number or operation.attempt.number
        if number != operation.attempt.number:
            if decisions.event_of(evidence) is Event.APPROVED:
                await self._outcomes.reverse(operation, number, evidence)
            return None
        return evidence

    async def _absorb_late(self, lease: Lease) -> None:
        operation = lease.operation
        evidence = await self._evidence(lease)
        if evidence is not None:
            await self._outcomes.absorb(operation, operation.attempt.number, evidence)
        await self._store.forget(operation)

    async def _ask(self, lease: Lease, connector: Connector) -> ConnectorAnswer | None:
        """What the PSP says of the operation now; None where it says nothing that settles it."""
        operation = lease.operation
        if operation.kind is K.REVERSAL:
            return await self._reverse(lease, connector)
        if operation.kind is K.VOID:
            return await self._void(lease, connector)
        request = self._request(lease, operation)
        if operation.kind in (K.AUTHORIZE, K.VERIFY) and not request.target_transaction_id:
            request.target_transaction_id = _id_in_evidence(lease)
        capabilities = connector.capabilities
        overdue = self._overdue_s(operation) >= 0
        # A cancellation that was begun may take effect after whatever the PSP says before it.
        wanted = not lease.cancel_begun and not (
            operation.kind is K.AUTHORIZE and lease.aggregate.payment.cancel_requested
        )
        if capabilities.query_by_reference and (wanted or not capabilities.cancel_by_reference):
            answer = await connector.query(operation.kind, operation.reference, request)
            if answer is not None and not (overdue and answer.verdict is Verdict.REQUIRES_ACTION):
                return answer
        if not capabilities.cancel_by_reference:
            return None
        if operation.state in _WAITING and wanted and not overdue:
            # The PSP acknowledged it: it is waited for, not cancelled.
            return None
        if not await self._store.begin_cancel(operation):
            raise _Overtaken
        request.is_repeat = lease.cancel_begun
        answer = await connector.cancel(operation.kind, operation.reference, request)
        # What the PSP will take back stands until it tells that it did.
        return _NO_ANSWER if decisions.event_of(answer) is Event.ACCEPTED else answer

    async def _void(self, lease: Lease, connector: Connector) -> ConnectorAnswer | None:
        payment = lease.aggregate.payment
        authorization = next(
            other for other in lease.aggregate.operations if other.kind is K.AUTHORIZE
        )
        if authorization.state in states.UNFINISHED:
            if authorization.state in _WAITING:
                # Its next look, which cancels it, may be far off.
                await self._store.hasten(authorization)
            return None
        if authorization.state is not S.SUCCEEDED:
            # Nothing stands that could be voided: what the caller wanted is so.
            return ConnectorAnswer(Delivery.NOT_SENT, Verdict.APPROVED)
        if _is_release(lease.operation):
            return await self._release(lease, connector)
        capabilities = connector.capabilities
        charged = decisions.takes_charge_back(payment)
        acknowledged = lease.operation.attempt.delivery is Delivery.ANSWERED
        if capabilities.tells_by_notification and acknowledged and not charged:
            return None  # a notification tells
        captured = payment.captured_minor or payment.captured_reported_minor
        # Without a query, taken back as a whole it is void whatever an earlier sending did.
        blind = not (captured or capabilities.query_by_reference)
        if charged or (capabilities.cancel_by_reference and blind):
            return await self._take_back(lease, authorization, connector)
        return await self._repeat_void(lease, connector)

    async def _release(self, lease: Lease, connector: Connector) -> ConnectorAnswer | None:
        """Void what a capture gave back to a closed payment, once that surely stays closed."""
        if _waits_for(lease, K.CAPTURE, K.REVERSAL):
            return ConnectorAnswer(Delivery.NOT_SENT, Verdict.PENDING)
        if not lease.aggregate.payment.capture_closed:
            # The final capture had no effect: what came back may be captured again.
            return ConnectorAnswer(Delivery.NOT_SENT, Verdict.CANCELED)
        return await self._repeat_void(lease, connector)

    async def _repeat_void(self, lease: Lease, connector: Connector) -> ConnectorAnswer | None:
        """Send a void anew, where the PSP does not know it; None where it settles nothing."""
        operation, capabilities = lease.operation, connector.capabilities
        answer = await self._repeat(lease, connector)
        event = decisions.event_of(answer)
        if event is Event.NEVER_SENT:
            # That this sending failed says nothing about an earlier one.
            return None
        waited = operation.state is S.PENDING and operation.attempt.delivery is Delivery.NOT_SENT
        may_be_second = not waited or lease.tries > 0
        if event is Event.APPROVED or not may_be_second:
            return answer
        # A refusal proves nothing where another sending may be the reason for it. It may have come
        # after the query before this one: from a recoverer whose lease ran out, or from a sender
        # that was stopped.
        if capabilities.query_by_reference:
            request = self._request(lease, operation)
            return await connector.query(operation.kind, operation.reference, request) or answer
        return answer if capabilities.idempotent_by_reference else None

    async def _take_back(
        self, lease: Lease, authorization: Operation, connector: Connector
    ) -> ConnectorAnswer | None:
        """The authorization is taken back as a whole, with its capture where it was automatic."""
        if connector.capabilities.cancel_by_reference:
            request = self._request(lease, authorization)
            answer = await connector.cancel(authorization.kind, authorization.reference, request)
            if decisions.event_of(answer) not in _NOTHING_STANDS:
                return None
        else:
            answer = await self._repeat(lease, connector, K.REVERSAL)
            if decisions.event_of(answer) is not Event.APPROVED:
                return None
        await self._outcomes.bounce_captures(lease.aggregate, answer)
        return ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED, answer.outcome)

    async def _bounce_what_was_voided(self, lease: Lease, evidence: ConnectorAnswer) -> None:
        """The charge of an automatic authorization that was voided in flight is gone too."""
        is_void = lease.operation.kind is K.VOID and decisions.event_of(evidence) is Event.APPROVED
        if is_void and decisions.takes_charge_back(lease.aggregate.payment):
            await self._outcomes.bounce_captures(lease.aggregate, evidence)

    async def _reverse(self, lease: Lease, connector: Connector) -> ConnectorAnswer | None:
        operation = lease.operation
        if operation.state is S.PENDING:
            return None  # the PSP will do it, and a notification tells when it did
        target = next(
            other
            for other in lease.aggregate.operations
            if other.operation_id == operation.parent_operation_id
        )
        if connector.capabilities.cancel_by_reference:
            request = self._request(lease, target)
            request.reference = operation.note
            request.connector_account_id = operation.attempt.connector_account_id
            if target.kind in (K.AUTHORIZE, K.VERIFY):
                request.target_transaction_id = operation.attempt.connector_transaction_id
            answer = await connector.cancel(target.kind, operation.note, request)
            event = decisions.event_of(answer)
            if event is Event.ACCEPTED:
                return answer
            if event not in _NOTHING_STANDS:
                return None
            return ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED, answer.outcome)
        repeated = await self._repeat(lease, connector)
        # A reversal that the PSP refuses stays open: a person has to see to it.
        return repeated if decisions.event_of(repeated) is Event.APPROVED else None

    async def _repeat(
        self, lease: Lease, connector: Connector, kind: OperationKind | None = None
    ) -> ConnectorAnswer:
        """Send a void or reversal, anew where the PSP does not say what became of it.

        With `kind` the operation's request goes out as one of another kind.
        """
        operation = lease.operation
        request = self._request(lease, operation)
        request.kind = kind or operation.kind
        if connector.capabilities.query_by_reference:
            answer = await connector.query(request.kind, operation.reference, request)
            if answer is not None:
                return answer
        return await connector.send(request, send_before=math.inf)

    def _request(self, lease: Lease, operation: Operation) -> ConnectorRequest:
        """The present attempt of an operation of the lease's payment, as it was sent."""
        aggregate = lease.aggregate
        request = connector_request(self._encoder, operation, aggregate.payment, aggregate)
        if operation.kind in (K.AUTHORIZE, K.VERIFY):
            request.target_transaction_id = operation.attempt.connector_transaction_id
        request.is_repeat = lease.tries > 0
        return request

    def _overdue_s(self, operation: Operation) -> float:
        """For how long an operation should have been cancelled since its customer did not act, in
        seconds; negative while it should not.
        """
        overdue_s = decisions.action_overdue_s(operation, self._outcomes.now())
        return overdue_s - self._schedule.action_margin_s

    def _waiting_s(self, lease: Lease) -> float:
        """The pause before the next look at what is waited for; not beyond the customer's time."""
        schedule = self._schedule
        pause_s: float = schedule.backoff_s_min * _WAITING_GROWTH ** min(lease.tries, 100)
        pause_s = min(pause_s, schedule.waiting_interval_s_max) * random.uniform(0.8, 1.2)
        left_s = -self._overdue_s(lease.operation)
        return min(pause_s, left_s) if left_s > 0 else pause_s

    def _backoff_s(self, tries: int) -> float:
        schedule = self._schedule
        pause_s: float = schedule.backoff_s_min * 2 ** min(tries, 30)
        return min(pause_s, schedule.backoff_s_max) * random.uniform(0.8, 1.2)


def _is_last_word(lease: Lease, connector: Connector, evidence: ConnectorAnswer) -> bool:
    """Whether the evidence decides: since the PSP cannot be asked and nothing was cancelled yet (to
    cancel now would take back what is known to have taken effect), or since the PSP tells outcomes
    by notification. Where a cancellation was begun, those decide that say that nothing stands.
    """
    capabilities = connector.capabilities
    tells = capabilities.tells_by_notification
    event = decisions.event_of(evidence)
    if lease.operation.state in _WAITING and event in (Event.ACCEPTED, Event.ACTION_REQUIRED):
        return False  # it ends nothing, and the PSP has more to say by now
    if _is_release(lease.operation) and _waits_for(lease, K.CAPTURE, K.REVERSAL):
        return False  # what it releases is known after them
    if lease.operation.kind in (K.VOID, K.REVERSAL):
        # That one sending of it had no effect says nothing of another.
        return tells and event not in (Event.NEVER_SENT, Event.ACCEPTED)
    requested = lease.aggregate.payment.cancel_requested
    if lease.cancel_begun or (requested and lease.operation.kind is K.AUTHORIZE):
        return tells and event in _NOTHING_STANDS
    return tells or not capabilities.query_by_reference


def _may_decide(lease: Lease, evidence: ConnectorAnswer) -> bool:
    """Whether evidence that is not the last word decides where the PSP says nothing."""
    denies = decisions.event_of(evidence) in _NOTHING_STANDS
    if lease.operation.kind is K.VOID:
        return not denies  # that one sending of it had no effect says nothing of another
    return denies or not lease.cancel_begun


def _cause(lease: Lease, connector: Connector | None) -> DoubtCause:
    """Why a look did not settle the operation."""
    if connector is None:
        return DoubtCause.CONNECTOR_MISSING
    if lease.operation.kind is K.VOID and _waits_for(lease, K.AUTHORIZE, K.CAPTURE, K.REVERSAL):
        return DoubtCause.WAITS_FOR_OPERATION
    capabilities = connector.capabilities
    if not (capabilities.query_by_reference or capabilities.cancel_by_reference):
        return DoubtCause.NO_MEANS
    return DoubtCause.NO_ANSWER


def _is_release(operation: Operation) -> bool:
    """Whether it is the gateway's own void of what a capture gave back."""
    return operation.kind is K.VOID and operation.origin is OperationOrigin.GATEWAY


def _waits_for(lease: Lease, *kinds: OperationKind) -> bool:
    """Whether an operation of these kinds is unfinished on the lease's payment."""
    return any(
        other.kind in kinds and other.state in states.UNFINISHED
        for other in lease.aggregate.operations
    )


def _id_in_evidence(lease: Lease) -> str:
    """The PSP's id of the present attempt, where a late answer or a notification told it."""
    evidence, attempt = lease.evidence, lease.operation.attempt
    if evidence is None or (evidence.attempt_number or attempt.number) != attempt.number:
        return ""
    return evidence.connector_transaction_id


def _is_news(payment: Payment, operation: Operation, answer: ConnectorAnswer, at: datetime) -> bool:
    event = decisions.event_for(payment, operation, answer, at)
    after = states.next_state(operation.kind, operation.state, event)
    return after is not None and after is not operation.state
