"""The use cases without servers: a store and claims in memory, a scripted PSP, and their wiring.

The store compares and sets as PostgreSQL does, holds its CHECKs, and copies every value on its way
in and out, so that nothing is shared that a real database would not share.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from gateway.application.accounts import RateLimit
from gateway.application.commands import Authorize, Capture, Increment, Refund, Void
from gateway.application.ports import (
    Capabilities,
    Change,
    ClaimOutcome,
    ClaimResult,
    ConnectorRequest,
    Found,
    Intent,
    IntentResult,
    Lease,
    ListFilter,
    Page,
    Route,
    Served,
    Stored,
)
from gateway.application.recovery import Recovery, Schedule
from gateway.application.routing import Routing
from gateway.application.usecases import Limits, Payments
from gateway.domain import states
from gateway.domain.errors import Reason
from gateway.domain.model import (
    Aggregate,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Discrepancy,
    DoubtCause,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    Outcome,
    Payment,
    ResponseCode,
    Verdict,
)
from gateway.routing.rules import Facts

MERCHANT: Final = "mer_1"
CURRENCY: Final = "EUR"
SEND_WINDOW_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 10.0
RECOVER_MARGIN_S: Final = 1.0
FIRST_CHECK_S: Final = 1.0
LEASE_S: Final = 30.0
BACKOFF_S_MAX: Final = 60.0
TRIES_MAX: Final = 50
ACTION_TIMEOUT_S: Final = 900.0
ACTION_MARGIN_S: Final = 60.0
WAITING_INTERVAL_S_MAX: Final = 120.0
PERSON_INTERVAL_S: Final = 3600.0
TAKEOVER_S: Final = SEND_WINDOW_S + ANSWER_TIMEOUT_S + RECOVER_MARGIN_S
"""How long after an intent recovery may take over."""
LONG_S: Final = TAKEOVER_S + LEASE_S + 2 * BACKOFF_S_MAX
"""After this, whatever is unfinished is due."""

Key = tuple[str, str]


class CheckViolated(Exception):
    """PostgreSQL would have refused this write by a CHECK."""


def check_amounts(payment: Payment) -> None:
    """The CHECKs of the payments table. Raises CheckViolated."""
    amounts = {
        "requested": payment.requested_minor,
        "authorized": payment.authorized_minor,
        "capture_pending": payment.capture_pending_minor,
        "captured": payment.captured_minor,
        "refund_pending": payment.refund_pending_minor,
        "refunded": payment.refunded_minor,
        "voided": payment.voided_minor,
        "increment_pending": payment.increment_pending_minor,
    }
    for name, amount_minor in amounts.items():
        if amount_minor < 0:
            raise CheckViolated(f"{name} is {amount_minor}")
    if payment.captured_minor + payment.capture_pending_minor > payment.authorized_minor:
        raise CheckViolated(f"captured + capture_pending > authorized: {amounts}")
    if payment.refunded_minor + payment.refund_pending_minor > payment.captured_minor:
        raise CheckViolated(f"refunded + refund_pending > captured: {amounts}")


# --- the store ------------------------------------------------------------------------------------


@dataclass(slots=True)
class DoubtRow:
    """A row of recovery's list."""

    check_at: datetime
    lease_until: datetime | None = None
    tries: int = 0
    evidence: ConnectorAnswer | None = None
    evidence_leased: bool = False
    cause: DoubtCause = DoubtCause.UNSPECIFIED
    needs_person: bool = False
    cancel_begun: bool = False

    @property
    def has_unseen_evidence(self) -> bool:
        """Whether evidence came since the last lease."""
        return self.evidence is not None and not self.evidence_leased

    def is_evidence_for_more_than(self, operation: Operation) -> bool:
        """Whether it outlasts an outcome of the operation: unseen, or of an earlier attempt."""
        return self.evidence is not None and (
            not self.evidence_leased
            or self.evidence.attempt_number not in (None, operation.attempt.number)
        )


def owned(operation: Operation) -> Operation:
    """A copy of an operation that shares nothing with it that anybody changes."""
    attempt = copy.copy(operation.attempt)
    attempt.outcome = copy.copy(attempt.outcome)
    return operation.copy_with(attempt=attempt)


def owned_intent(intent: Intent) -> Intent:
    """The same of an intent."""
    return replace(intent, operation=owned(intent.operation), payment=intent.payment.copy_with())


def owned_change(change: Change) -> Change:
    """The same of a change."""
    return replace(
        change,
        operation=owned(change.operation),
        payment=change.payment.copy_with(),
        companions=[replace(each, operation=owned(each.operation)) for each in change.companions],
        discrepancies=[copy.copy(each) for each in change.discrepancies],
    )


async def _yield(_: str) -> None:
    await asyncio.sleep(0)


class MemoryStore:
    """Implements `gateway.application.ports.Store`. Its time moves by `advance` alone."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.payments: dict[Key, Payment] = {}
        self.operations: dict[Key, Operation] = {}
        self.recover_after: dict[Key, datetime] = {}
        self.doubts: dict[Key, DoubtRow] = {}
        self.discrepancies: list[Discrepancy] = []
        self.events: list[tuple[str, int]] = []
        """(event type, payment's version) in the order of the commits."""
        self.before: Callable[[str], Awaitable[None]] = _yield
        """Awaited with the method's name before it does anything; may raise StoreUnavailable."""
        self.after: Callable[[str], Awaitable[None]] = _yield
        """The same after it was done: raising here loses the answer to a write that took place."""

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    def of_payment(self, payment_id: str, merchant_id: str = MERCHANT) -> Aggregate:
        """A payment with its operations, now."""
        return Aggregate(
            self.payments[merchant_id, payment_id].copy_with(),
            [
                owned(operation)
                for operation in self.operations.values()
                if (operation.merchant_id, operation.payment_id) == (merchant_id, payment_id)
            ],
        )

    def by_key(self, idempotency_key: str, merchant_id: str = MERCHANT) -> Operation:
        """The operation with this idempotency key, now."""
        operation = self._with_key(merchant_id, idempotency_key)
        assert operation is not None
        return owned(operation)

    # --- writes ---

    async def write_intent(self, intent: Intent) -> IntentResult:
        """See the port."""
        await self.before("write_intent")
        result = self._intend(owned_intent(intent))
        await self.after("write_intent")
        return result

    def _intend(self, intent: Intent) -> IntentResult:
        operation, payment = intent.operation, intent.payment
        key = (payment.merchant_id, payment.payment_id)
        if intent.expected_version is not None:
            current = self.payments.get(key)
            if current is None or current.version != intent.expected_version:
                return IntentResult(Stored.CONFLICT)
            payment.created_at = current.created_at
        else:
            payment.created_at = self.now
        assert operation.idempotency_key is not None
        if self._with_key(operation.merchant_id, operation.idempotency_key) is not None:
            return IntentResult(Stored.DUPLICATE_KEY)
        check_amounts(payment)
        payment.updated_at = self.now
        self.payments[key] = payment
        self._insert(operation, intent.recover_after_s)
        return IntentResult(Stored.WRITTEN, self.now)

    def _insert(self, operation: Operation, recover_after_s: float) -> None:
        key = (operation.merchant_id, operation.operation_id)
        assert key not in self.operations
        operation.created_at = operation.updated_at = self.now
        if operation.amount_minor < 0:
            raise CheckViolated(f"the operation's amount is {operation.amount_minor}")
        self.operations[key] = operation
        self.recover_after[key] = self.now + timedelta(seconds=recover_after_s)

    async def write_change(self, change: Change) -> Stored:
        """See the port."""
        await self.before("write_change")
        stored = self._change(owned_change(change))
        await self.after("write_change")
        return stored

    def _change(self, change: Change) -> Stored:
        operation, payment = change.operation, change.payment
        key = (operation.merchant_id, operation.operation_id)
        before = self.operations[key]
        held = self.payments[payment.merchant_id, payment.payment_id]
        if (before.epoch, before.state, held.version) != (
            change.expected_epoch,
            change.expected_state,
            change.expected_version,
        ):
            return Stored.CONFLICT
        assert payment.version == held.version + 1
        assert (operation.kind, operation.origin, operation.idempotency_key) == (
            before.kind,
            before.origin,
            before.idempotency_key,
        )
        check_amounts(payment)
        self.operations[key] = operation
        self.payments[payment.merchant_id, payment.payment_id] = payment
        for companion in change.companions:
            self._insert(companion.operation, 0)
        self.discrepancies += [e for e in change.discrepancies if e not in self.discrepancies]
        types = [change.event_type, *(each.event_type for each in change.companions)]
        self.events += [(event_type, payment.version) for event_type in types]
        self._schedule(key, change)
        return Stored.WRITTEN

    def _schedule(self, key: Key, change: Change) -> None:
        check_after_s = change.doubt.check_after_s if change.doubt else None
        if change.operation.state is OperationState.PROCESSING:
            self.recover_after[key] = self.now + timedelta(seconds=change.recover_after_s)
            if check_after_s is None:
                check_after_s = change.recover_after_s
        row = self.doubts.get(key)
        if check_after_s is None:
            if row is not None and not row.is_evidence_for_more_than(change.operation):
                del self.doubts[key]
            return
        check_at = self.now + timedelta(seconds=check_after_s)
        if row is None:
            self.doubts[key] = DoubtRow(check_at)
        else:
            sending = change.operation.state is OperationState.PROCESSING
            row.check_at = self.now if row.has_unseen_evidence and not sending else check_at
            row.lease_until = None
            if change.operation.epoch != change.expected_epoch:
                row.tries, row.cancel_begun = 0, False
                row.cause, row.needs_person = DoubtCause.UNSPECIFIED, False

    # --- reads ---

    def _with_key(self, merchant_id: str, idempotency_key: str) -> Operation | None:
        for operation in self.operations.values():
            if (operation.merchant_id, operation.idempotency_key) == (merchant_id, idempotency_key):
                return operation
        return None

    def _found(self, operation: Operation | None) -> Found | None:
        if operation is None:
            return None
        payment = self.payments[operation.merchant_id, operation.payment_id]
        return Found(owned(operation), payment.copy_with())

    async def find_by_key(self, merchant_id: str, idempotency_key: str) -> Found | None:
        """See the port."""
        await self.before("find_by_key")
        return self._found(self._with_key(merchant_id, idempotency_key))

    async def find_operation(
        self,
        merchant_id: str,
        operation_id: str,
        *,
        for_outcome: bool = False,
    ) -> Found | None:
        """See the port."""
        await self.before("find_operation")
        return self._found(self.operations.get((merchant_id, operation_id)))

    async def load(
        self,
        merchant_id: str,
        payment_id: str,
        *,
        for_outcome: bool = False,
    ) -> Aggregate | None:
        """See the port."""
        await self.before("load")
        if (merchant_id, payment_id) not in self.payments:
            return None
        return self.of_payment(payment_id, merchant_id)

    async def list_payments(self, filter_: ListFilter) -> Page:
        """See the port."""
        await self.before("list_payments")

        def sort_key(payment: Payment) -> tuple[datetime, str]:
            assert payment.created_at is not None
            return payment.created_at, payment.payment_id

        def is_listed(payment: Payment) -> bool:
            created_at, _ = sort_key(payment)
            return (
                (payment.merchant_id, payment.mode) == (filter_.merchant_id, filter_.mode)
                and (not filter_.states or payment.state in filter_.states)
                and (filter_.created_from is None or created_at >= filter_.created_from)
                and (filter_.created_before is None or created_at < filter_.created_before)
                and filter_.merchant_order_id in ("", payment.merchant_order_id)
                and (filter_.after is None or sort_key(payment) < filter_.after)
            )

        listed = sorted(filter(is_listed, self.payments.values()), key=sort_key, reverse=True)
        page = [payment.copy_with() for payment in listed[: filter_.page_size]]
        more = len(listed) > len(page)
        return Page(page, sort_key(page[-1]) if page and more else None)

    # --- recovery ---

    async def add_evidence(
        self, operation: Operation, answer: ConnectorAnswer, seen_to: Collection[int] = ()
    ) -> ConnectorAnswer | None:
        """See the port."""
        await self.before("add_evidence")
        key = (operation.merchant_id, operation.operation_id)
        now = self.operations[key]
        is_as_read = (now.epoch, now.attempt.number) == (operation.epoch, operation.attempt.number)
        if now.state not in states.UNFINISHED or not is_as_read:
            return None
        row = self.doubts.setdefault(key, DoubtRow(self.now))
        kept = row.evidence.attempt_number if row.evidence else None
        if kept is None or kept >= operation.attempt.number or kept in seen_to:
            row.evidence, row.evidence_leased = copy.deepcopy(answer), False
        row.check_at = min(row.check_at, self.now)
        return copy.deepcopy(row.evidence)

    async def expired(self, limit: int) -> int:
        """See the port."""
        await self.before("expired")
        due = [
            key
            for key, operation in self.operations.items()
            if operation.state is OperationState.PROCESSING
            and self.recover_after[key] < self.now
            and key not in self.doubts
        ][:limit]
        self.doubts |= {key: DoubtRow(self.now) for key in due}
        return len(due)

    def _due(
        self, account_max: int | None, at_work: Collection[Operation]
    ) -> Iterator[tuple[Key, DoubtRow]]:
        taken = Counter(operation.attempt.connector_account_id for operation in at_work)
        worked_on = {(operation.merchant_id, operation.operation_id) for operation in at_work}
        for key, row in self.doubts.items():
            is_leased = row.lease_until is not None and row.lease_until > self.now
            account = self.operations[key].attempt.connector_account_id
            is_full = account_max is not None and taken[account] >= account_max
            if row.check_at <= self.now and not (is_leased or is_full or key in worked_on):
                taken[account] += 1
                yield key, row

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Operation] = (),
    ) -> Sequence[Lease]:
        """See the port."""
        await self.before("lease")
        leases = []
        for key, row in list(itertools.islice(self._due(account_max, at_work), limit)):
            row.lease_until = self.now + timedelta(seconds=lease_s)
            row.tries += 1
            row.evidence_leased = True
            operation = self.operations[key]
            if operation.state in states.UNFINISHED:
                operation = self.operations[key] = operation.copy_with(epoch=operation.epoch + 1)
            aggregate = self.of_payment(operation.payment_id, operation.merchant_id)
            evidence = copy.deepcopy(row.evidence)
            leases.append(
                Lease(
                    owned(operation), aggregate, row.tries - 1, evidence, row.cancel_begun, self.now
                )
            )
        return leases

    async def begin_cancel(self, operation: Operation) -> bool:
        """See the port."""
        await self.before("begin_cancel")
        key = (operation.merchant_id, operation.operation_id)
        row, now = self.doubts.get(key), self.operations[key]
        if row is None or now.epoch != operation.epoch or now.state not in states.UNFINISHED:
            return False
        row.cancel_begun = True
        await self.after("begin_cancel")
        return True

    async def postpone(
        self,
        operation: Operation,
        check_after_s: float,
        cause: DoubtCause = DoubtCause.UNSPECIFIED,
        *,
        needs_person: bool = False,
    ) -> None:
        """See the port."""
        await self.before("postpone")
        key = (operation.merchant_id, operation.operation_id)
        row, now = self.doubts.get(key), self.operations[key]
        is_owner = now.epoch == operation.epoch and now.state in states.UNFINISHED
        if row is not None and is_owner:
            wait_s = 0.0 if row.has_unseen_evidence else check_after_s
            row.check_at, row.lease_until = self.now + timedelta(seconds=wait_s), None
            row.cause, row.needs_person = cause, needs_person

    async def hasten(self, operation: Operation) -> None:
        """See the port."""
        await self.before("hasten")
        row = self.doubts.get((operation.merchant_id, operation.operation_id))
        if row is not None and row.lease_until is None:
            row.check_at = min(row.check_at, self.now)

    async def forget(self, operation: Operation) -> None:
        """See the port."""
        await self.before("forget")
        key = (operation.merchant_id, operation.operation_id)
        row = self.doubts.get(key)
        unfinished = self.operations[key].state in states.UNFINISHED
        if row is not None and not row.has_unseen_evidence and not unfinished:
            del self.doubts[key]


# --- claims ---------------------------------------------------------------------------------------


class MemoryClaims:
    """Implements `gateway.application.ports.Claims`; `available` turns Redis off."""

    def __init__(self) -> None:
        self.available = True
        self.generation: str | None = "g1"
        self.claims: dict[Key, bytes] = {}
        self.frozen: dict[Key, tuple[bytes, str, bytes]] = {}
        self.counted: Counter[str] = Counter()
        self._nonces = itertools.count(1)

    def flush(self) -> None:
        """Lose everything."""
        self.claims.clear()
        self.frozen.clear()

    async def claim(
        self,
        merchant_id: str,
        idempotency_key: str,
        fingerprint: bytes,
        rate_limit: RateLimit | None = None,
    ) -> ClaimResult:
        """See the port; a limit is only its burst here."""
        await asyncio.sleep(0)
        if not self.available:
            return ClaimResult(ClaimOutcome.UNAVAILABLE)
        key = (merchant_id, idempotency_key)
        frozen = self.frozen.get(key)
        if frozen is not None:
            same = frozen[0] == fingerprint
            outcome = ClaimOutcome.REPLAY if same else ClaimOutcome.CONFLICT
            return ClaimResult(
                outcome, response=frozen[2] if same else b"", first_request_id=frozen[1]
            )
        if key in self.claims:
            return ClaimResult(ClaimOutcome.IN_FLIGHT)
        if rate_limit is not None:
            if self.counted[merchant_id] >= rate_limit.burst:
                return ClaimResult(ClaimOutcome.RATE_LIMITED, retry_after_s=1 / rate_limit.per_s)
            self.counted[merchant_id] += 1
        nonce = self.claims[key] = str(next(self._nonces)).encode()
        return ClaimResult(ClaimOutcome.NEW, nonce, self.generation or "")

    def release(
        self, merchant_id: str, idempotency_key: str, nonce: bytes, *, generation: str | None = None
    ) -> None:
        """See the port."""
        key = (merchant_id, idempotency_key)
        if nonce and self.claims.get(key) == nonce:
            del self.claims[key]

    def cache(
        self,
        merchant_id: str,
        idempotency_key: str,
        fingerprint: bytes,
        first_request_id: str,
        response: bytes,
        *,
        generation: str | None = None,
    ) -> None:
        """See the port."""
        if self.available and generation == self.generation:
            key = (merchant_id, idempotency_key)
            self.claims.pop(key, None)
            self.frozen.setdefault(key, (fingerprint, first_request_id, response))


# --- the PSP --------------------------------------------------------------------------------------


class Gate:
    """A place where something waits until a test lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def wait(self) -> None:
        """Be reached, and wait until it is opened."""
        self.reached.set()
        await self.opened.wait()


@dataclass(slots=True)
class Step:
    """What becomes of one call to the PSP, other than usual."""

    answer: ConnectorAnswer | None = None
    """What the gateway is told; None: what the PSP really answers."""
    arrives: bool = True
    """Whether the PSP gets the request at all."""
    decides: ConnectorAnswer | None = None
    """What the PSP decides on the request; None: it approves."""
    before: Gate | None = None
    """Waited for before the PSP gets the request."""
    after: Gate | None = None
    """Waited for after the PSP answered."""


def answered(verdict: Verdict, amount_reported_minor: int | None = None) -> ConnectorAnswer:
    """An answer of the PSP."""
    approved = verdict is Verdict.APPROVED
    code = ResponseCode.APPROVED if approved else ResponseCode.DECLINED_OTHER
    return ConnectorAnswer(
        Delivery.ANSWERED,
        verdict,
        Outcome(response_code=code, amount_reported_minor=amount_reported_minor),
    )


APPROVED: Final = answered(Verdict.APPROVED)
DECLINED: Final = answered(Verdict.DECLINED)
PENDING: Final = answered(Verdict.PENDING)
NOT_SENT: Final = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED)
NO_ANSWER: Final = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)

LOST: Final = Step(answer=NO_ANSWER)
"""The PSP did it, and its answer was lost."""
DROPPED: Final = Step(answer=NO_ANSWER, arrives=False)
"""It may have been sent, and the PSP never got it."""
UNSENT: Final = Step(answer=NOT_SENT, arrives=False)
"""It was surely not sent."""

CAPABLE: Final = Capabilities(
    mode=Mode.TEST,
    idempotent_by_reference=True,
    key_validity_s=None,
    query_by_reference=True,
    cancel_by_reference=True,
    answer_timeout_s=ANSWER_TIMEOUT_S,
    supported_fields=frozenset(),
)
INCAPABLE: Final = replace(
    CAPABLE,
    idempotent_by_reference=False,
    query_by_reference=False,
    cancel_by_reference=False,
)


@dataclass(slots=True)
class Effect:
    """What the PSP did for a reference."""

    request: ConnectorRequest
    answer: ConnectorAnswer
    times: int = 1
    """How often it took effect: more than once where the PSP is not idempotent."""
    taken_back: bool = False


class ScriptedConnector:
    """Implements `gateway.application.ports.Connector` with a PSP behind it that keeps books.

    It approves everything unless `steps` says otherwise, and answers queries and cancellations by
    its books; `asks` overrides those answers in turn.
    """

    def __init__(self, capabilities: Capabilities = CAPABLE, name: str = "psp") -> None:
        self.name = name
        self.capabilities = capabilities
        self.steps: deque[Step] = deque()
        self.asks: deque[ConnectorAnswer | None] = deque()
        self.sent: list[ConnectorRequest] = []
        """What the PSP received."""
        self.queried: list[str] = []
        self.asked_with: list[ConnectorRequest | None] = []
        """What queries and cancellations were asked with."""
        self.canceled: set[str] = set()
        self.effects: dict[str, Effect] = {}

    def standing(self, *kinds: OperationKind) -> list[str]:
        """The references of these kinds that took effect and were not taken back, each as often
        as it did.
        """
        return [
            reference
            for reference, effect in self.effects.items()
            if effect.request.kind in kinds
            and effect.answer.verdict is Verdict.APPROVED
            and not effect.taken_back
            for _ in range(effect.times)
        ]

    async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """See the port."""
        step = self.steps.popleft() if self.steps else Step()
        await asyncio.sleep(0)
        if step.before is not None:
            await step.before.wait()
        real = self._receive(request, step.decides or APPROVED) if step.arrives else NO_ANSWER
        if step.after is not None:
            await step.after.wait()
        return copy.deepcopy(step.answer or real)

    def _receive(self, request: ConnectorRequest, decision: ConnectorAnswer) -> ConnectorAnswer:
        self.sent.append(request)
        reference = request.reference
        if reference in self.canceled:
            return answered(Verdict.CANCELED)
        known = self.effects.get(reference)
        if known is None:
            answer = copy.deepcopy(decision)
            if answer.verdict is not Verdict.DECLINED:
                answer.connector_transaction_id = f"tx-{reference}"
            self.effects[reference] = Effect(request, answer)
            return answer
        if not self.capabilities.idempotent_by_reference:
            if request.kind in (OperationKind.VOID, OperationKind.REVERSAL):
                return answered(Verdict.FAILED)  # nothing is left to release
            known.times += 1
        return known.answer

    async def query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer | None:
        """See the port."""
        assert self.capabilities.query_by_reference
        self.asked_with.append(request)
        await asyncio.sleep(0)
        self.queried.append(reference)
        if self.asks:
            return copy.deepcopy(self.asks.popleft())
        effect = self.effects.get(reference)
        if reference in self.canceled:
            return self._canceled(effect)
        return None if effect is None else copy.deepcopy(effect.answer)

    async def cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer:
        """See the port."""
        assert self.capabilities.cancel_by_reference
        self.asked_with.append(request)
        await asyncio.sleep(0)
        if self.asks:
            told = self.asks.popleft()
            assert told is not None
            return copy.deepcopy(told)
        effect = self.effects.get(reference)
        if effect is not None and effect.answer.verdict is Verdict.DECLINED:
            return copy.deepcopy(effect.answer)
        self.canceled.add(reference)
        if effect is not None:
            effect.taken_back = True
        return self._canceled(effect)

    @staticmethod
    def _canceled(effect: Effect | None) -> ConnectorAnswer:
        if effect is None:
            return ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.REFERENCE_CANCELED)
        return answered(Verdict.CANCELED)

    async def close(self) -> None:
        """See the port."""


# --- the wiring -----------------------------------------------------------------------------------


class JsonEncoder:
    """Implements `gateway.application.ports.Encoder` readably."""

    def response(self, operation: Operation, payment: Payment) -> bytes:
        """See the port."""
        told = {
            "operation": operation.operation_id,
            "kind": operation.kind.name,
            "state": operation.state.name,
            "epoch": operation.epoch,
            "attempt": operation.attempt.number,
            "payment": payment.payment_id,
            "payment_state": payment.state.name,
            "version": payment.version,
        }
        return json.dumps(told).encode()

    def change(
        self, event_id: str, event_type: str, operation: Operation, payment: Payment
    ) -> tuple[bytes, bytes]:
        """See the port."""
        return self.response(
            operation, payment
        ), f"{event_id} {event_type}".encode() + b" " + self.response(operation, payment)

    def connector_fields(self, payment: Payment) -> tuple[str, Mapping[str, object]]:
        """See the port."""
        return "tok_visa", {}


class OneRoute:
    """Implements `gateway.application.ports.Router` with one connector, or none."""

    def __init__(self, connector: ScriptedConnector | None) -> None:
        self.only = connector

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        """See the port."""
        if self.only is None or self.only.capabilities.mode is not mode:
            return None
        return Route(self.only, "account-1")

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """See the port."""
        if self.route(merchant_id, mode) is None or self.only is None:
            return {}
        return {"account-1": Served("account-1", self.only.name, 1, True, self.only)}

    def connector(self, name: str, connector_account_id: str) -> ScriptedConnector | None:
        """See the port."""
        return self.only if self.only is not None and self.only.name == name else None


class ManyRoutes:
    """Implements `gateway.application.ports.Router` with an account at each of several connectors:
    `acc_` and the connector's name. Accounts in `disabled` take no new payments.
    """

    def __init__(self, *connectors: ScriptedConnector) -> None:
        self.by_name = {connector.name: connector for connector in connectors}
        self.disabled: set[str] = set()

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        """See the port."""
        for account_id, served in self.accounts(merchant_id, mode).items():
            if served.enabled:
                return Route(self.by_name[served.connector_name], account_id)
        return None

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """See the port."""
        return {
            f"acc_{name}": Served(
                f"acc_{name}", name, 1, f"acc_{name}" not in self.disabled, connector
            )
            for name, connector in self.by_name.items()
        }

    def connector(self, name: str, connector_account_id: str) -> ScriptedConnector | None:
        """See the port."""
        return self.by_name.get(name)


@dataclass(slots=True)
class Counts:
    """Implements the observers."""

    claims: Counter[ClaimOutcome] = field(default_factory=Counter)
    replays: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    cascades: list[tuple[Verdict, Verdict]] = field(default_factory=list)
    lost: int = 0
    recovered_states: Counter[OperationState] = field(default_factory=Counter)
    failures: int = 0

    def claimed(self, outcome: ClaimOutcome) -> None:
        """See Observer."""
        self.claims[outcome] += 1

    def replayed(self, source: str) -> None:
        """See Observer."""
        self.replays[source] += 1

    def connector_called(
        self, connector: str, kind: OperationKind, answer: ConnectorAnswer, seconds: float
    ) -> None:
        """See Observer."""
        self.calls += 1

    def cascaded(self, before: ConnectorAnswer, answer: ConnectorAnswer) -> None:
        """See Observer."""
        self.cascades.append((before.verdict, answer.verdict))

    def answered(self, added_s: float) -> None:
        """See Observer."""

    def outcome_lost(self, operation: Operation) -> None:
        """See Observer."""
        self.lost += 1

    def recovered(self, kind: OperationKind, state: OperationState) -> None:
        """See RecoveryObserver."""
        self.recovered_states[state] += 1

    def recovery_failed(self) -> None:
        """See RecoveryObserver."""
        self.failures += 1


LIMITS: Final = Limits(
    send_window_s=SEND_WINDOW_S,
    recover_margin_s=RECOVER_MARGIN_S,
    min_send_budget_s=0.5,
    wait_s_max=30.0,
    wait_margin_s=0.05,
    wait_poll_s_min=0.001,
    wait_poll_s_max=0.01,
    waiters_per_key_max=200,
    contention_tries_max=50,
    first_check_s=FIRST_CHECK_S,
    operations_per_payment_max=100,
    attempts_per_operation_max=100,
    action_timeout_s=ACTION_TIMEOUT_S,
)

SCHEDULE: Final = Schedule(
    interval_s=1.0,
    search_interval_s=0.0,
    lease_s=LEASE_S,
    batch_max=100,
    concurrency_max=10,
    account_concurrency_max=8,
    backoff_s_min=1.0,
    backoff_s_max=BACKOFF_S_MAX,
    tries_max=TRIES_MAX,
    waiting_interval_s_max=WAITING_INTERVAL_S_MAX,
    action_margin_s=ACTION_MARGIN_S,
    person_interval_s=PERSON_INTERVAL_S,
)


class Bench:
    """A gateway in memory: its use cases, its recovery, and short calls for tests.

    A second `Bench` on the same store and connector is a second gateway.
    """

    def __init__(
        self,
        connector: ScriptedConnector | None = None,
        *,
        store: MemoryStore | None = None,
        claims: MemoryClaims | None = None,
        limits: Limits = LIMITS,
        schedule: Schedule = SCHEDULE,
        router: ManyRoutes | None = None,
        routing: Routing | None = None,
    ) -> None:
        self.connector = connector or ScriptedConnector()
        self.store = store or MemoryStore()
        self.claims = claims or MemoryClaims()
        self.router = router or OneRoute(self.connector)
        self.counts = Counts()
        encoder = JsonEncoder()
        self.payments = Payments(
            self.store, self.claims, self.router, encoder, limits, self.counts, routing=routing
        )
        self.recovery = Recovery(
            self.store, self.router, encoder, self.payments.outcomes, schedule, self.counts
        )
        self._requests: Iterator[int] = itertools.count(1)

    async def recover(self, rounds: int = 1) -> None:
        """Let everything unfinished become due, and recovery look at it, `rounds` times."""
        for _ in range(rounds):
            self.store.advance(LONG_S)
            await self.recovery.run_once()
        assert self.counts.failures == 0

    def pass_time(self, seconds: float) -> None:
        """Let time pass, in the database and by what the gateway knows of it."""
        self.store.advance(seconds)
        self.payments._clock.observe(self.store.now)

    def _request_id(self) -> str:
        return f"req_{next(self._requests)}"

    def authorize(
        self,
        key: str = "a",
        amount_minor: int = 100,
        capture_method: CaptureMethod = CaptureMethod.MANUAL_MULTIPLE,
        *,
        deadline: float | None = None,
        allow_partial_approval: bool = False,
        used_fields: frozenset[str] = frozenset(),
        mode: Mode = Mode.TEST,
        facts: Facts | None = None,
    ) -> Authorize:
        """An authorization; its fingerprint changes with its payload."""
        payload = f"authorize {amount_minor} {capture_method.name} {allow_partial_approval}"
        return Authorize(
            merchant_id=MERCHANT,
            mode=mode,
            idempotency_key=key,
            fingerprint=payload.encode(),
            request_id=self._request_id(),
            deadline=deadline,
            amount_minor=amount_minor,
            currency=CURRENCY,
            capture_method=capture_method,
            payment_method_token="tok_visa",
            allow_partial_approval=allow_partial_approval,
            merchant_order_id="",
            merchant_transaction_id="",
            details=b"",
            used_fields=used_fields,
            facts=lambda: Facts(instrument="tok_visa") if facts is None else facts,
        )

    async def authorized(
        self,
        amount_minor: int = 100,
        capture_method: CaptureMethod = CaptureMethod.MANUAL_MULTIPLE,
    ) -> str:
        """The id of a payment that was authorized with the key `a`."""
        answer = await self.payments.authorize(self.authorize("a", amount_minor, capture_method))
        return answer.payment_id

    def capture(
        self,
        payment_id: str,
        key: str = "c",
        amount_minor: int | None = None,
        *,
        final: bool = False,
    ) -> Capture:
        """A capture."""
        return Capture(
            merchant_id=MERCHANT,
            mode=Mode.TEST,
            idempotency_key=key,
            fingerprint=f"capture {payment_id} {amount_minor} {final}".encode(),
            request_id=self._request_id(),
            deadline=None,
            payment_id=payment_id,
            amount_minor=amount_minor,
            currency=CURRENCY if amount_minor is not None else None,
            final=final,
        )

    def void(
        self, payment_id: str | None, key: str = "v", *, authorize_key: str | None = None
    ) -> Void:
        """A void."""
        return Void(
            merchant_id=MERCHANT,
            mode=Mode.TEST,
            idempotency_key=key,
            fingerprint=f"void {payment_id} {authorize_key}".encode(),
            request_id=self._request_id(),
            deadline=None,
            payment_id=payment_id,
            authorize_idempotency_key=authorize_key,
        )

    def refund(self, payment_id: str, key: str = "r", amount_minor: int | None = None) -> Refund:
        """A refund."""
        return Refund(
            merchant_id=MERCHANT,
            mode=Mode.TEST,
            idempotency_key=key,
            fingerprint=f"refund {payment_id} {amount_minor}".encode(),
            request_id=self._request_id(),
            deadline=None,
            payment_id=payment_id,
            amount_minor=amount_minor,
            currency=CURRENCY if amount_minor is not None else None,
            capture_operation_id=None,
        )

    def increment(self, payment_id: str, amount_minor: int, key: str = "i") -> Increment:
        """An increment."""
        return Increment(
            merchant_id=MERCHANT,
            mode=Mode.TEST,
            idempotency_key=key,
            fingerprint=f"increment {payment_id} {amount_minor}".encode(),
            request_id=self._request_id(),
            deadline=None,
            payment_id=payment_id,
            amount_minor=amount_minor,
            currency=CURRENCY,
        )
