"""What PSPs tell is applied once, in any order, and nothing that they tell can be refused."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from gateway.application.administration import answer_of_person
from gateway.application.applying import Applier, Schedule
from gateway.application.notifications import (
    Applied,
    Dispute,
    DisputeStage,
    DisputeStatus,
    NotificationKind,
    Pending,
    Received,
    Result,
)
from gateway.application.ports import Resolution, StoreUnavailable
from gateway.domain import invariants
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    DoubtOutcome,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Payment,
    PaymentState,
    Verdict,
)
from tests.memory_notifications import SCHEDULE, MemoryNotifications, NotifiedBench
from tests.memory_store import (
    ACTION_MARGIN_S,
    ACTION_TIMEOUT_S,
    APPROVED,
    CAPABLE,
    DECLINED,
    DROPPED,
    INCAPABLE,
    LEASE_S,
    LONG_S,
    LOST,
    MERCHANT,
    NO_ANSWER,
    PENDING,
    TAKEOVER_S,
    TRIES_MAX,
    UNSENT,
    Bench,
    Gate,
    JsonEncoder,
    ManyRoutes,
    ScriptedConnector,
    Step,
    answered,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.application.commands import Answer
    from gateway.application.ports import Capabilities, Found, Lease

K = OperationKind
S = OperationState
N = NotificationKind
FAILED = answered(Verdict.FAILED)
EXPIRED = answered(Verdict.EXPIRED)
ACTION = answered(Verdict.REQUIRES_ACTION)
MUTE = replace(CAPABLE, query_by_reference=False, cancel_by_reference=False)
"""A PSP that tells only by notifications."""
TELLING = replace(CAPABLE, tells_by_notification=True)
"""A PSP that says again what it answered at first, and tells outcomes by notifications."""


def bench(*steps: Step, capabilities: Capabilities = CAPABLE) -> NotifiedBench:
    connector = ScriptedConnector(capabilities)
    connector.steps.extend(steps)
    return NotifiedBench(connector)


def payment_of(gateway: NotifiedBench, payment_id: str) -> Payment:
    return gateway.store.of_payment(payment_id).payment


def only(gateway: NotifiedBench, payment_id: str, kind: K) -> Operation:
    [operation] = [
        each for each in gateway.store.of_payment(payment_id).operations if each.kind is kind
    ]
    return operation


def findings(gateway: NotifiedBench, payment_id: str) -> list[invariants.Kind]:
    """The rules of amounts, states and operations that do not hold; events are not kept here."""
    aggregate = gateway.store.of_payment(payment_id)
    kinds: dict[str, set[str]] = {}
    for each in gateway.store.discrepancies:
        kinds.setdefault(each.operation_id, set()).add(each.kind)
    stored = invariants.Stored(
        aggregate.payment,
        aggregate.operations,
        events=[],
        answers={},
        doubts=frozenset(operation_id for _, operation_id in gateway.store.doubts),
        discrepancies={each: frozenset(some) for each, some in kinds.items()},
    )
    of_rows = {
        invariants.Kind.AMOUNTS_OUT_OF_BOUNDS,
        invariants.Kind.AMOUNTS_DIFFER,
        invariants.Kind.RESERVATION_DIFFERS,
        invariants.Kind.PAYMENT_STATE_DIFFERS,
        invariants.Kind.DOUBT_NOT_LISTED,
        invariants.Kind.ALLOCATIONS_DIFFER,
        invariants.Kind.OPERATIONS_DIFFER,
    }
    return [each.kind for each in invariants.check(stored) if each.kind in of_rows]


async def captured(gateway: NotifiedBench, amount_minor: int = 100) -> str:
    payment_id = await gateway.authorized(100)
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=amount_minor))
    return payment_id


@pytest.mark.parametrize(
    ("kind", "references", "subject"),
    [
        (N.REFUND, ("op_2-1", "op_1-1"), "op_2-1"),
        (N.REFUND, ("", "op_1-1"), "tx-2"),
        (N.VOID, ("op_2-1", "op_1-1"), "op_2-1"),
        (N.VOID, ("", "op_1-1"), "op_1-1"),
        (N.VOID, ("", ""), "tx-2"),
    ],
)
def test_events_are_of_one_operation_by_its_reference_or_by_the_psps_id(
    kind: N, references: tuple[str, str], subject: str
) -> None:
    """Of a void elsewhere, by the authorization's: it is that which is gone."""
    answer = replace(APPROVED, connector_transaction_id="tx-2")
    own, payments = references
    told = bench().told(kind, answer, reference=own, payment_reference=payments)
    assert told.notification.subject == subject


# --- operations of ours ---------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", [CAPABLE, MUTE])
@pytest.mark.parametrize("first", [PENDING, ACTION])
@pytest.mark.parametrize("last", [APPROVED, DECLINED, FAILED, EXPIRED])
async def test_what_waits_for_the_psp_is_completed_by_its_notification(
    capabilities: Capabilities, first: ConnectorAnswer, last: ConnectorAnswer
) -> None:
    gateway = bench(Step(decides=first), capabilities=capabilities)
    answer = await gateway.payments.authorize(gateway.authorize())
    operation = gateway.store.by_key("a")
    assert operation.state in (S.PENDING, S.REQUIRES_ACTION)
    gateway.connector.effects[operation.reference].answer = last
    [applied] = await gateway.tell(
        gateway.told(N.AUTHORIZATION, last, reference=operation.reference)
    )
    assert applied is not None
    assert applied.payment_id == answer.payment_id
    expected = {
        Verdict.APPROVED: S.SUCCEEDED,
        Verdict.DECLINED: S.DECLINED,
        Verdict.FAILED: S.FAILED,
        Verdict.EXPIRED: S.EXPIRED,
    }
    assert gateway.store.by_key("a").state is expected[last.verdict]
    assert findings(gateway, answer.payment_id) == []


async def test_a_doubt_ends_by_a_notification_where_the_psp_cannot_be_asked() -> None:
    gateway = bench(LOST, capabilities=INCAPABLE)
    await gateway.payments.authorize(gateway.authorize())
    operation = gateway.store.by_key("a")
    assert operation.state is S.IN_DOUBT
    await gateway.tell(
        gateway.told(
            N.AUTHORIZATION, APPROVED, reference=operation.reference, transaction_id="tx-9"
        )
    )
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.attempt.connector_transaction_id) == (S.SUCCEEDED, "tx-9")


async def test_what_is_known_to_have_taken_effect_is_not_cancelled_for_want_of_a_query() -> None:
    gateway = bench(LOST, capabilities=replace(CAPABLE, query_by_reference=False))
    await gateway.payments.authorize(gateway.authorize())
    reference = gateway.store.by_key("a").reference
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference))
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.connector.standing(K.AUTHORIZE) == [reference]


async def test_a_sender_at_work_is_not_disturbed_and_the_notification_waits() -> None:
    gate = Gate()
    gateway = bench(Step(after=gate))
    call = asyncio.ensure_future(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    operation = gateway.store.by_key("a")
    told = gateway.told(N.AUTHORIZATION, APPROVED, reference=operation.reference)
    assert await gateway.tell(told, recover=False) == [None]
    assert gateway.store.doubts == {}
    assert gateway.store.by_key("a").epoch == 1
    gate.opened.set()
    assert b"SUCCEEDED" in (await call).response
    await gateway.applier.run_once()
    assert gateway.results.results == {Result.APPLIED: 1}
    assert not gateway.notifications.pending


async def test_a_capture_that_bounces_after_its_success_fails_and_gives_its_amount_back() -> None:
    gateway = bench()
    payment_id = await captured(gateway, 60)
    reference = only(gateway, payment_id, K.CAPTURE).reference
    told = gateway.told(N.CAPTURE, FAILED, reference=reference)
    await gateway.tell(told)
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert payment_of(gateway, payment_id).captured_minor == 0
    # Told again under another id, it has no effect.
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=reference))
    assert payment_of(gateway, payment_id).captured_minor == 0
    assert findings(gateway, payment_id) == []


async def test_audit_knows_of_bounced_captures_which_one_stays_in_the_books() -> None:
    # The first capture is reported with another amount, which is a discrepancy of its own.
    other = Step(decides=answered(Verdict.APPROVED, 41))
    gateway = bench(Step(), other)
    payment_id = await gateway.authorized(100, CaptureMethod.MANUAL_MULTIPLE)
    for key, amount_minor in (("first", 40), ("second", 60)):
        await gateway.payments.capture(gateway.capture(payment_id, key, amount_minor=amount_minor))
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=30))
    captures = [
        each for each in gateway.store.of_payment(payment_id).operations if each.kind is K.CAPTURE
    ]
    for capture, left in zip(captures, (60, 60), strict=True):
        await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=capture.reference))
        assert payment_of(gateway, payment_id).captured_minor == left
    assert [each.kind for each in gateway.store.discrepancies] == ["captured_amount"] * 2
    assert findings(gateway, payment_id) == []
    [stored] = gateway.store.payments.values()
    for wrong in (39, 59, 61, 101):
        stored.captured_minor = wrong
        assert invariants.Kind.AMOUNTS_DIFFER in findings(gateway, payment_id)


async def test_the_capture_of_an_automatic_payment_bounces_by_the_authorizations_reference() -> (
    None
):
    gateway = bench()
    payment_id = await gateway.authorized(100, CaptureMethod.AUTOMATIC)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=reference))
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert payment_of(gateway, payment_id).captured_minor == 0


async def followed(gateway: NotifiedBench, method: CaptureMethod = CaptureMethod.AUTOMATIC) -> str:
    """A payment whose first attempt was not sent, and whose second one succeeded."""
    gateway.connector.steps.appendleft(UNSENT)
    await gateway.payments.authorize(gateway.authorize(capture_method=method))
    answer = await gateway.payments.authorize(gateway.authorize(capture_method=method))
    assert gateway.store.by_key("a").attempt.number == 2
    return answer.payment_id


@pytest.mark.parametrize("last", [FAILED, DECLINED])
async def test_what_became_of_an_earlier_attempts_capture_is_nothing_of_the_present_one(
    last: ConnectorAnswer,
) -> None:
    gateway = bench()
    payment_id = await followed(gateway)
    earlier = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    [applied] = await gateway.tell(gateway.told(N.CAPTURE, last, reference=earlier))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert only(gateway, payment_id, K.CAPTURE).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).captured_minor == 100


@pytest.mark.parametrize("capabilities", [TELLING, MUTE])
async def test_an_earlier_attempt_that_charged_all_the_same_is_reversed_by_its_capture(
    capabilities: Capabilities,
) -> None:
    gateway = bench(capabilities=capabilities)
    payment_id = await followed(gateway)
    earlier = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    await gateway.tell(gateway.told(N.CAPTURE, APPROVED, reference=earlier), recover=False)
    assert only(gateway, payment_id, K.REVERSAL).note == earlier
    assert only(gateway, payment_id, K.CAPTURE).state is S.SUCCEEDED


async def test_a_charge_told_by_its_capture_alone_is_reversed_where_nothing_was_authorized() -> (
    None
):
    gateway = bench(Step(decides=DECLINED), capabilities=MUTE)
    answer = await gateway.payments.authorize(
        gateway.authorize(capture_method=CaptureMethod.AUTOMATIC)
    )
    reference = only(gateway, answer.payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.CAPTURE, APPROVED, reference=reference), recover=False)
    assert only(gateway, answer.payment_id, K.REVERSAL).note == reference


async def charge_voided_in_flight(capabilities: Capabilities) -> tuple[NotifiedBench, str]:
    """An automatic authorization that succeeded while a void had been asked for, and the void."""
    gate = Gate()
    gateway = bench(Step(after=gate), capabilities=capabilities)
    call = asyncio.ensure_future(
        gateway.payments.authorize(gateway.authorize(capture_method=CaptureMethod.AUTOMATIC))
    )
    await gate.reached.wait()
    await gateway.payments.void(gateway.void(None, authorize_key="a"))
    gate.opened.set()
    return gateway, (await call).payment_id


async def decided(
    gateway: NotifiedBench, operation: Operation, outcome: DoubtOutcome, attempt_number: int = 1
) -> Found | None:
    """What becomes of an operation by a person's decision."""
    decision = Resolution(attempt_number, outcome, "", None, "seen in the console", "key_1")
    found = await gateway.store.find_operation(operation.merchant_id, operation.operation_id)
    assert found is not None
    answer = answer_of_person(operation, decision)
    return await gateway.payments.outcomes.resolve(found, answer, decision)


@pytest.mark.parametrize("capabilities", [CAPABLE, TELLING])
@pytest.mark.parametrize("outcome", [DoubtOutcome.TOOK_EFFECT, DoubtOutcome.FAILED])
async def test_a_void_that_the_psp_never_confirms_needs_a_person_who_can_end_it(
    capabilities: Capabilities, outcome: DoubtOutcome
) -> None:
    gateway, payment_id = await charge_voided_in_flight(capabilities)
    gateway.connector.asks.extend([NO_ANSWER] * 100)
    await gateway.recover(rounds=TRIES_MAX + 1)
    void = only(gateway, payment_id, K.VOID)
    assert void.state is S.PENDING
    doubt = gateway.store.doubts[void.merchant_id, void.operation_id]
    assert doubt.needs_person
    resolved = await decided(gateway, void, outcome)
    assert resolved is not None
    took_effect = outcome is DoubtOutcome.TOOK_EFFECT
    assert resolved.operation.state is (S.SUCCEEDED if took_effect else S.FAILED)
    assert only(gateway, payment_id, K.CAPTURE).state is (S.FAILED if took_effect else S.SUCCEEDED)
    assert payment_of(gateway, payment_id).captured_minor == (0 if took_effect else 100)
    assert findings(gateway, payment_id) == []


async def test_a_charge_is_gone_when_a_person_says_so_of_its_void_in_doubt() -> None:
    gate = Gate()
    gateway = bench(Step(after=gate))
    call = asyncio.ensure_future(
        gateway.payments.authorize(gateway.authorize(capture_method=CaptureMethod.AUTOMATIC))
    )
    await gate.reached.wait()

    async def died(method: str) -> None:
        if method == "write_change":
            raise StoreUnavailable("the sender dies before the void is accepted")

    gateway.store.before = died
    with pytest.raises(GatewayError):
        await gateway.payments.void(gateway.void(None, authorize_key="a"))
    gateway.store.before = Bench().store.before
    gate.opened.set()
    payment_id = (await call).payment_id
    gateway.connector.asks.extend([NO_ANSWER] * 10)
    await gateway.recover(rounds=3)
    void = only(gateway, payment_id, K.VOID)
    assert void.state is S.IN_DOUBT
    resolved = await decided(gateway, void, DoubtOutcome.TOOK_EFFECT)
    assert resolved is not None
    assert resolved.operation.state is S.SUCCEEDED
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert payment_of(gateway, payment_id).captured_minor == 0
    assert findings(gateway, payment_id) == []


async def test_a_charge_that_is_taken_back_leaves_what_was_refunded_elsewhere() -> None:
    gateway, payment_id = await charge_voided_in_flight(CAPABLE)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told = gateway.told(
        N.REFUND, APPROVED, payment_reference=reference, amount_minor=30, transaction_id="re_1"
    )
    await gateway.tell(told, recover=False)
    await gateway.recover()
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert only(gateway, payment_id, K.REFUND).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).refunded_reported_minor == 30


async def test_a_decision_on_a_void_that_is_not_in_doubt_takes_no_charge_back() -> None:
    gateway, payment_id = await charge_voided_in_flight(CAPABLE)
    void = only(gateway, payment_id, K.VOID)
    assert await decided(gateway, void, DoubtOutcome.TOOK_EFFECT, attempt_number=2) is None
    assert await decided(gateway, void, DoubtOutcome.FAILED) is not None
    assert await decided(gateway, void, DoubtOutcome.TOOK_EFFECT) is None
    assert only(gateway, payment_id, K.VOID).state is S.FAILED
    assert payment_of(gateway, payment_id).captured_minor == 100
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("void", [LOST, Step(decides=PENDING)], ids=["in doubt", "pending"])
async def test_a_persons_word_on_a_void_of_the_rest_leaves_what_was_captured(void: Step) -> None:
    gateway = bench()
    payment_id = await captured(gateway, 30)
    gateway.connector.steps.append(void)
    await gateway.payments.void(gateway.void(payment_id))
    operation = only(gateway, payment_id, K.VOID)
    assert await decided(gateway, operation, DoubtOutcome.TOOK_EFFECT) is not None
    payment = payment_of(gateway, payment_id)
    assert (payment.captured_minor, payment.voided_minor) == (30, 70)
    assert findings(gateway, payment_id) == []


async def test_a_persons_word_on_a_refund_takes_no_charge_back() -> None:
    gateway, payment_id = await charge_voided_in_flight(CAPABLE)
    await decided(gateway, only(gateway, payment_id, K.VOID), DoubtOutcome.FAILED)
    gateway.connector.steps.append(LOST)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=40))
    refund = only(gateway, payment_id, K.REFUND)
    assert await decided(gateway, refund, DoubtOutcome.TOOK_EFFECT) is not None
    assert only(gateway, payment_id, K.CAPTURE).state is S.SUCCEEDED
    payment = payment_of(gateway, payment_id)
    assert (payment.captured_minor, payment.refunded_minor) == (100, 40)
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("can_be_asked", [False, True])
async def test_what_took_effect_after_a_void_that_failed_is_not_taken_back_for_that_void(
    can_be_asked: bool,
) -> None:
    capabilities = replace(CAPABLE, query_by_reference=can_be_asked)
    gateway, payment_id = await charge_voided_in_flight(capabilities)
    await decided(gateway, only(gateway, payment_id, K.VOID), DoubtOutcome.FAILED)
    gate = Gate()
    gateway.connector.steps.append(Step(after=gate))
    call = asyncio.ensure_future(gateway.payments.refund(gateway.refund(payment_id)))
    await gate.reached.wait()
    gateway.store.advance(TAKEOVER_S + 1)
    await gateway.store.expired(10)
    await gateway.store.lease(10, LEASE_S)  # by a recoverer that died
    gate.opened.set()
    await call
    await gateway.recover()
    assert gateway.store.by_key("r").state is S.SUCCEEDED
    assert only(gateway, payment_id, K.CAPTURE).state is S.SUCCEEDED
    assert len(gateway.connector.standing(K.REFUND)) == 1


async def test_a_void_that_waits_for_its_authorization_needs_nobody() -> None:
    gateway = bench(Step(decides=ACTION), capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    await gateway.payments.void(gateway.void(payment_id))
    gateway.connector.asks.extend([NO_ANSWER] * 1000)
    await gateway.recover(rounds=TRIES_MAX + 1)
    void = only(gateway, payment_id, K.VOID)
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.REQUIRES_ACTION
    assert not gateway.store.doubts[void.merchant_id, void.operation_id].needs_person


async def test_no_refund_starts_beside_the_void_that_gives_the_whole_charge_back() -> None:
    gateway, payment_id = await charge_voided_in_flight(CAPABLE)
    assert payment_of(gateway, payment_id).state is PaymentState.CAPTURED
    for amount_minor in (None, 40):
        refund = gateway.refund(payment_id, amount_minor=amount_minor)
        with pytest.raises(GatewayError) as refused:
            await gateway.payments.refund(refund)
        assert refused.value.reason is Reason.OPERATION_IN_PROGRESS
    await gateway.recover()
    assert only(gateway, payment_id, K.VOID).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).captured_minor == 0
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("capabilities", [CAPABLE, TELLING])
async def test_the_capture_of_a_charge_that_was_voided_in_flight_is_no_news(
    capabilities: Capabilities,
) -> None:
    gateway, payment_id = await charge_voided_in_flight(capabilities)
    await gateway.recover()
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    [applied] = await gateway.tell(gateway.told(N.CAPTURE, APPROVED, reference=reference))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    kinds = [each.kind for each in gateway.store.operations.values()]
    assert K.REVERSAL not in kinds


async def test_a_capture_that_stands_again_after_it_had_bounced_is_shown_to_a_person() -> None:
    gateway = bench()
    payment_id = await gateway.authorized(100, CaptureMethod.AUTOMATIC)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=reference, after_s=1))
    [applied] = await gateway.tell(
        gateway.told(N.CAPTURE, APPROVED, reference=reference, after_s=2)
    )
    assert applied is not None
    assert applied.result is Result.RECORDED
    assert [each.kind for each in gateway.store.discrepancies] == ["late_success"]
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED


@pytest.mark.parametrize("end", [APPROVED, EXPIRED])
@pytest.mark.parametrize("second", [PENDING, APPROVED])
async def test_that_an_earlier_attempt_is_gone_ends_nothing_of_the_present_one(
    second: ConnectorAnswer, end: ConnectorAnswer
) -> None:
    gateway = bench(Step(decides=second), capabilities=TELLING)
    payment_id = await followed(gateway, CaptureMethod.MANUAL)
    before = only(gateway, payment_id, K.AUTHORIZE)
    earlier = before.operation_id + "-1"
    [applied] = await gateway.tell(gateway.told(N.VOID, end, payment_reference=earlier))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert only(gateway, payment_id, K.AUTHORIZE).state is before.state
    assert not payment_of(gateway, payment_id).voided_minor
    assert len(gateway.store.operations) == 1


async def test_a_charge_that_has_ended_since_is_not_reversed_for_its_capture() -> None:
    gateway = bench(Step(decides=ACTION), capabilities=TELLING)
    answer = await gateway.payments.authorize(
        gateway.authorize(capture_method=CaptureMethod.AUTOMATIC)
    )
    reference = only(gateway, answer.payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference, after_s=2))
    assert only(gateway, answer.payment_id, K.AUTHORIZE).state is S.CANCELED
    [applied] = await gateway.tell(
        gateway.told(N.CAPTURE, APPROVED, reference=reference, after_s=1)
    )
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert len(gateway.store.operations) == 1


async def test_that_an_earlier_attempt_is_gone_is_no_answer_to_a_void_of_the_present_one() -> None:
    gateway = bench(capabilities=TELLING)
    payment_id = await followed(gateway, CaptureMethod.MANUAL)
    earlier = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    gateway.connector.steps.append(LOST)
    await gateway.payments.void(gateway.void(payment_id))
    assert only(gateway, payment_id, K.VOID).state is S.IN_DOUBT
    [applied] = await gateway.tell(
        gateway.told(N.VOID, APPROVED, payment_reference=earlier), recover=False
    )
    assert applied is not None
    assert applied.result is Result.NO_NEWS


@pytest.mark.parametrize("second", [APPROVED, PENDING], ids=["succeeded", "is under way"])
async def test_the_reversal_of_an_earlier_attempt_ends_when_that_is_gone(
    second: ConnectorAnswer,
) -> None:
    gateway = bench(Step(decides=second), capabilities=TELLING)
    payment_id = await followed(gateway, CaptureMethod.MANUAL)
    state = only(gateway, payment_id, K.AUTHORIZE).state
    earlier = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    accepted = replace(PENDING, connector_transaction_id="tx-reversal")
    gateway.connector.asks.extend([accepted] * 4)
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=earlier))
    await gateway.recover()
    assert only(gateway, payment_id, K.REVERSAL).state is S.PENDING
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=earlier))
    assert only(gateway, payment_id, K.REVERSAL).state is S.SUCCEEDED
    assert only(gateway, payment_id, K.AUTHORIZE).state is state
    assert not payment_of(gateway, payment_id).voided_minor


@pytest.mark.parametrize(
    "capabilities", [CAPABLE, TELLING, replace(CAPABLE, query_by_reference=False)]
)
async def test_a_senders_late_word_that_a_customer_has_to_act_does_not_keep_the_payment_open(
    capabilities: Capabilities,
) -> None:
    gate = Gate()
    gateway = bench(Step(decides=ACTION, after=gate), capabilities=capabilities)
    call = asyncio.ensure_future(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    operation = gateway.store.by_key("a")
    [lease] = await _leased(gateway)
    await gateway.payments.outcomes.write(lease.operation, lease.aggregate.payment, ACTION)
    gate.opened.set()
    await call
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    gateway.pass_time(ACTION_TIMEOUT_S + ACTION_MARGIN_S + 1)
    await gateway.recover(rounds=2)
    assert operation.reference in gateway.connector.canceled
    assert gateway.store.by_key("a").state is S.EXPIRED


async def _leased(gateway: NotifiedBench) -> Sequence[Lease]:
    """What recovery takes over when its sender has had its time."""
    gateway.pass_time(TAKEOVER_S + 1)
    await gateway.store.expired(1)
    return await gateway.store.lease(1, 0.0)


async def test_a_void_elsewhere_is_not_taken_for_the_reversal_of_an_earlier_attempt() -> None:
    gateway = bench(capabilities=TELLING)
    payment_id = await followed(gateway, CaptureMethod.MANUAL)
    operation_id = only(gateway, payment_id, K.AUTHORIZE).operation_id
    gateway.connector.asks.append(replace(PENDING, connector_transaction_id="tx-reversal"))
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=f"{operation_id}-1"))
    await gateway.recover()
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=f"{operation_id}-2"))
    assert only(gateway, payment_id, K.REVERSAL).state is S.PENDING
    assert only(gateway, payment_id, K.VOID).origin is OperationOrigin.PSP
    assert payment_of(gateway, payment_id).state is PaymentState.VOIDED


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_events_of_a_refund_lead_to_the_same_end_in_every_order(
    order: tuple[int, ...],
) -> None:
    gateway = bench(Step(), Step(), Step(decides=PENDING), capabilities=MUTE)
    payment_id = await captured(gateway)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=40))
    reference = only(gateway, payment_id, K.REFUND).reference
    events = [
        gateway.told(N.REFUND, PENDING, reference=reference, after_s=1),
        gateway.told(N.REFUND, APPROVED, reference=reference, after_s=2),
        gateway.told(N.REFUND, FAILED, reference=reference, after_s=3),
    ]
    for number in order:
        await gateway.tell(events[number])
    refund, payment = only(gateway, payment_id, K.REFUND), payment_of(gateway, payment_id)
    assert refund.state is S.FAILED
    assert (payment.refunded_minor, payment.refund_pending_minor) == (0, 0)
    assert [each for each in gateway.store.operations.values() if each.kind is K.REVERSAL] == []
    assert findings(gateway, payment_id) == []


async def test_events_that_come_together_are_applied_in_the_order_of_the_psps_clock() -> None:
    gateway = bench(Step(), Step(), Step(decides=PENDING), capabilities=MUTE)
    payment_id = await captured(gateway)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=40))
    reference = only(gateway, payment_id, K.REFUND).reference
    await gateway.tell(
        gateway.told(N.REFUND, FAILED, reference=reference, after_s=3),
        gateway.told(N.REFUND, APPROVED, reference=reference, after_s=2),
    )
    assert only(gateway, payment_id, K.REFUND).state is S.FAILED


@pytest.mark.parametrize("asked", [True, False])
async def test_a_success_told_after_not_sent_is_reversed_once(asked: bool) -> None:
    gateway = bench(
        UNSENT, capabilities=CAPABLE if asked else replace(CAPABLE, query_by_reference=False)
    )
    answer = await gateway.payments.authorize(gateway.authorize())
    operation = gateway.store.by_key("a")
    assert operation.state is S.NOT_SENT
    if asked:
        gateway.connector.asks.extend([APPROVED, APPROVED])
    told = [gateway.told(N.AUTHORIZATION, APPROVED, reference=operation.reference)] * 2
    for each in told:
        await gateway.tell(each, recover=False)
        gateway.notifications.pending[next(iter(gateway.notifications.kept))] = 0
    await gateway.applier.run_once()
    assert only(gateway, answer.payment_id, K.REVERSAL).note == operation.reference


async def followed_elsewhere(
    first: Capabilities, second: Capabilities
) -> tuple[NotifiedBench, ScriptedConnector, ScriptedConnector, str]:
    """A payment whose first attempt was not sent, and whose second one succeeded at another PSP."""
    a, b = ScriptedConnector(first, "a"), ScriptedConnector(second, "b")
    routes = ManyRoutes(a, b)
    gateway = NotifiedBench(a, router=routes)
    a.steps.append(UNSENT)
    await gateway.payments.authorize(gateway.authorize())
    routes.disabled.add("acc_a")
    await gateway.payments.authorize(gateway.authorize())
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.attempt.connector) == (S.SUCCEEDED, "b")
    return gateway, a, b, operation.payment_id


@pytest.mark.parametrize("can_be_asked", [True, False])
async def test_a_late_success_of_an_attempt_is_asked_for_where_that_attempt_was_sent(
    can_be_asked: bool,
) -> None:
    first = CAPABLE if can_be_asked else replace(CAPABLE, query_by_reference=False)
    gateway, a, b, payment_id = await followed_elsewhere(first, CAPABLE)
    reference = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    if can_be_asked:
        a.asks.append(APPROVED)
    told = gateway.told(
        N.AUTHORIZATION, APPROVED, account="acc_a", reference=reference, transaction_id="tx-late"
    )
    await gateway.tell(told, recover=False)
    assert (a.queried, b.queried) == ([reference] if can_be_asked else [], [])
    for request in a.asked_with:
        assert request is not None
        assert (request.reference, request.connector_account_id) == (reference, "acc_a")
        assert request.target_transaction_id == "tx-late"
    reversal = only(gateway, payment_id, K.REVERSAL)
    assert (reversal.note, reversal.attempt.connector_account_id) == (reference, "acc_a")


async def test_a_late_success_is_reversed_though_its_account_is_not_configured_here() -> None:
    gateway, a, _, payment_id = await followed_elsewhere(CAPABLE, CAPABLE)
    assert isinstance(gateway.router, ManyRoutes)
    del gateway.router.by_name["a"]
    reference = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    told = gateway.told(N.AUTHORIZATION, APPROVED, account="acc_a", reference=reference)
    await gateway.tell(told, recover=False)
    assert a.queried == []
    assert only(gateway, payment_id, K.REVERSAL).note == reference


async def test_an_old_success_of_what_was_cancelled_is_not_reversed_where_the_psp_denies_it() -> (
    None
):
    gateway = bench(UNSENT)
    await gateway.payments.authorize(gateway.authorize())
    operation = gateway.store.by_key("a")
    gateway.connector.asks.append(answered(Verdict.CANCELED))
    [applied] = await gateway.tell(
        gateway.told(N.AUTHORIZATION, APPROVED, reference=operation.reference)
    )
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert [each.kind for each in gateway.store.operations.values()] == [K.AUTHORIZE]


@pytest.mark.parametrize("answer", [None, NO_ANSWER], ids=["not found", "no answer"])
async def test_a_success_of_what_is_over_waits_until_the_psp_can_say_whether_it_stands(
    answer: ConnectorAnswer | None,
) -> None:
    gateway = bench(UNSENT)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    gateway.connector.asks.append(answer)
    told = gateway.told(N.AUTHORIZATION, APPROVED, reference=reference)
    [applied] = await gateway.tell(told, recover=False)
    assert applied is None
    assert len(gateway.store.operations) == 1


def changed_meanwhile(gateway: NotifiedBench, payment_id: str) -> None:
    """Somebody else changes the payment just before the next change of it is written."""
    left = 1

    async def change(method: str) -> None:
        nonlocal left
        if method == "write_change" and left:
            left -= 1
            payment = payment_of(gateway, payment_id)
            payment.version += 1
            gateway.store.payments[payment.merchant_id, payment_id] = payment

    gateway.store.before = change


async def test_who_has_a_psps_answer_in_hand_is_refused_no_read() -> None:
    gateway = bench(UNSENT, capabilities=MUTE)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    operation = only(gateway, payment_id, K.AUTHORIZE)
    outcomes = gateway.payments.outcomes
    reads: list[bool] = []
    for method in ("load", "find_operation"):
        read = getattr(gateway.store, method)

        async def noted(*given: Any, read: Any = read, for_outcome: bool = False) -> Any:
            reads.append(for_outcome)
            return await read(*given)

        setattr(gateway.store, method, noted)
    await outcomes.contradict(operation, DECLINED)
    await outcomes.reverse(operation, 1, APPROVED)
    assert not await outcomes.record(MERCHANT, payment_id, lambda *_: None)
    assert reads == [True, True, True]


async def test_a_late_success_is_reversed_though_its_payment_changes_meanwhile() -> None:
    gateway = bench(UNSENT, capabilities=MUTE)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    changed_meanwhile(gateway, payment_id)
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference), recover=False)
    assert only(gateway, payment_id, K.REVERSAL).note == reference


async def test_a_bounce_is_written_though_its_payment_changes_meanwhile() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    capture = only(gateway, payment_id, K.CAPTURE)
    changed_meanwhile(gateway, payment_id)
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=capture.reference))
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert findings(gateway, payment_id) == []


async def test_what_was_done_elsewhere_is_recorded_though_the_payment_changes_meanwhile() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    changed_meanwhile(gateway, payment_id)
    await gateway.tell(
        gateway.told(
            N.REFUND, APPROVED, payment_reference=reference, amount_minor=30, transaction_id="re_1"
        )
    )
    assert only(gateway, payment_id, K.REFUND).origin is OperationOrigin.PSP
    assert payment_of(gateway, payment_id).refunded_reported_minor == 30


async def test_a_decision_is_written_though_its_payment_changes_meanwhile() -> None:
    gateway = bench(LOST)
    payment_id = await gateway.authorized()
    operation = only(gateway, payment_id, K.AUTHORIZE)
    changed_meanwhile(gateway, payment_id)
    assert await decided(gateway, operation, DoubtOutcome.NO_EFFECT) is not None
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.NOT_SENT


async def test_each_attempt_that_succeeded_late_is_reversed() -> None:
    gateway = bench(UNSENT, UNSENT, capabilities=MUTE)
    await gateway.payments.authorize(gateway.authorize())
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    operation_id = only(gateway, payment_id, K.AUTHORIZE).operation_id
    references = [f"{operation_id}-{number}" for number in (1, 2)]
    for reference in references:
        told = gateway.told(N.AUTHORIZATION, APPROVED, reference=reference)
        await gateway.tell(told, recover=False)
    assert references == [
        each.note
        for each in gateway.store.of_payment(payment_id).operations
        if each.kind is K.REVERSAL
    ]


async def test_no_note_of_a_callers_is_taken_for_a_reversal() -> None:
    gateway = bench(Step(decides=PENDING), capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.payments.void(replace(gateway.void(payment_id), note=reference))
    await gateway.tell(gateway.told(N.AUTHORIZATION, DECLINED, reference=reference))
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference, after_s=1))
    assert only(gateway, payment_id, K.REVERSAL).note == reference


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("by_reference", [True, False])
async def test_an_authorization_expires_when_what_is_being_captured_is_settled(
    final: bool, by_reference: bool
) -> None:
    gateway = bench(Step(), Step(decides=PENDING), capabilities=MUTE)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=30, final=final))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    if by_reference:
        expired = gateway.told(N.AUTHORIZATION, EXPIRED, reference=reference)
    else:
        expired = gateway.told(N.VOID, EXPIRED, payment_reference=reference)
    [applied] = await gateway.tell(expired)
    assert applied is None
    waits = next(iter(gateway.notifications.pending))
    capture = only(gateway, payment_id, K.CAPTURE).reference
    await gateway.tell(gateway.told(N.CAPTURE, DECLINED, reference=capture))
    gateway.notifications.pending[waits] = 0
    await gateway.applier.run_once()
    payment = payment_of(gateway, payment_id)
    assert (payment.state, payment.capture_closed) == (PaymentState.EXPIRED, True)


async def test_an_expiry_sees_the_capture_that_begins_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    gateway = bench(Step(), Step(before=gate, decides=DECLINED))
    payment_id = await gateway.authorized(100)
    outcomes = gateway.applier._outcomes
    captures: list[asyncio.Future[Answer]] = []
    commit = outcomes._commit

    async def overtaken(*args: Any, **more: Any) -> Any:
        if not captures:
            capture = gateway.payments.capture(gateway.capture(payment_id))
            captures.append(asyncio.ensure_future(capture))
            await gate.reached.wait()
        return await commit(*args, **more)

    monkeypatch.setattr(outcomes, "_commit", overtaken)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told = gateway.told(N.VOID, EXPIRED, payment_reference=reference)
    await gateway.tell(told, recover=False)
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.SUCCEEDED
    gate.opened.set()
    await captures[0]
    assert only(gateway, payment_id, K.CAPTURE).state is S.DECLINED
    await gateway.applier.run_once()
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.EXPIRED
    assert payment_of(gateway, payment_id).state is PaymentState.EXPIRED
    assert findings(gateway, payment_id) == []


async def test_what_ended_by_time_at_the_psp_is_no_return_of_a_capture() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.CAPTURE).reference
    [applied] = await gateway.tell(gateway.told(N.CAPTURE, EXPIRED, reference=reference))
    assert applied is not None
    assert applied.result is Result.RECORDED
    assert only(gateway, payment_id, K.CAPTURE).state is S.SUCCEEDED


async def test_what_contradicts_a_success_is_shown_to_a_person_and_changes_nothing() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    [applied] = await gateway.tell(gateway.told(N.AUTHORIZATION, DECLINED, reference=reference))
    assert applied is not None
    assert applied.result is Result.RECORDED
    assert payment_of(gateway, payment_id).state is PaymentState.AUTHORIZED
    assert [each.kind for each in gateway.store.discrepancies] == ["late_refusal"]


@pytest.mark.parametrize(
    ("amount_minor", "currency", "shown"),
    [
        (100, "EUR", None),
        (100, "", None),
        (130, "EUR", ("100", "130")),
        (70, "EUR", ("100", "70")),
        (100, "USD", ("EUR", "USD")),
    ],
)
async def test_another_amount_of_what_had_succeeded_is_shown_to_a_person(
    amount_minor: int, currency: str, shown: tuple[str, str] | None
) -> None:
    gateway = bench()
    payment_id = await gateway.authorized(100)
    before = payment_of(gateway, payment_id)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told: dict[str, Any] = {"amount_minor": amount_minor, "currency": currency}
    [applied] = await gateway.tell(
        gateway.told(N.AUTHORIZATION, APPROVED, reference=reference, **told)
    )
    assert applied is not None
    assert applied.result is (Result.NO_NEWS if shown is None else Result.RECORDED)
    found = [(each.kind, each.expected, each.reported) for each in gateway.store.discrepancies]
    assert found == ([] if shown is None else [("late_amount", *shown)])
    after = payment_of(gateway, payment_id)
    assert (after.state, after.authorized_minor) == (before.state, before.authorized_minor)
    assert findings(gateway, payment_id) == []


async def test_a_success_of_unknown_time_is_reversed_though_it_may_have_been_taken_back() -> None:
    gateway = bench(LOST, capabilities=replace(CAPABLE, query_by_reference=False))
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    await gateway.recover()
    operation = only(gateway, payment_id, K.AUTHORIZE)
    assert operation.state is S.CANCELED
    told = gateway.told(N.AUTHORIZATION, APPROVED, reference=operation.reference)
    told = replace(told, notification=replace(told.notification, occurred_at=None))
    await gateway.tell(told, recover=False)
    assert only(gateway, payment_id, K.REVERSAL).note == operation.reference


async def test_a_success_of_what_had_no_effect_when_it_was_cancelled_is_reversed() -> None:
    gate = Gate()
    step = Step(answer=NO_ANSWER, arrives=False, after=gate)
    gateway = bench(step, capabilities=replace(CAPABLE, query_by_reference=False))
    call = asyncio.ensure_future(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    await gateway.payments.void(gateway.void(None, authorize_key="a"))
    gate.opened.set()
    payment_id = (await call).payment_id
    await gateway.recover()
    operation = only(gateway, payment_id, K.AUTHORIZE)
    assert (operation.state, operation.attempt.delivery) == (S.CANCELED, Delivery.NOT_SENT)
    assert operation.updated_at is not None
    told = gateway.told(N.AUTHORIZATION, APPROVED, reference=operation.reference)
    at = operation.updated_at - timedelta(seconds=60)
    told = replace(told, notification=replace(told.notification, occurred_at=at))
    await gateway.tell(told, recover=False)
    assert only(gateway, payment_id, K.REVERSAL).note == operation.reference


@pytest.mark.parametrize("after_s", [-60, 60])
async def test_a_success_told_before_it_was_taken_back_is_no_news_and_later_is_reversed(
    after_s: float,
) -> None:
    reverses = replace(CAPABLE, query_by_reference=False)
    gateway = bench(LOST, capabilities=reverses)
    answer = await gateway.payments.authorize(gateway.authorize())
    await gateway.recover()
    operation = gateway.store.by_key("a")
    assert operation.state is S.CANCELED
    assert operation.updated_at is not None
    told = gateway.told(N.AUTHORIZATION, APPROVED, reference=operation.reference)
    at = operation.updated_at + timedelta(seconds=after_s)
    told = replace(told, notification=replace(told.notification, occurred_at=at))
    await gateway.tell(told, recover=False)
    kinds = [each.kind for each in gateway.store.of_payment(answer.payment_id).operations]
    assert kinds == [K.AUTHORIZE] + [K.REVERSAL] * (after_s > 0)


async def test_a_capture_of_ours_stands_though_its_authorization_has_expired_since() -> None:
    gateway = bench(capabilities=MUTE)
    payment_id = await captured(gateway, 30)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.AUTHORIZATION, EXPIRED, reference=reference))
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.EXPIRED
    told = gateway.told(N.CAPTURE, APPROVED, reference=reference, after_s=1)
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.UNMATCHED
    assert only(gateway, payment_id, K.CAPTURE).state is S.SUCCEEDED
    assert K.REVERSAL not in {each.kind for each in gateway.store.operations.values()}


async def test_the_automatic_capture_told_by_the_payments_reference_is_none_from_elsewhere() -> (
    None
):
    gateway = bench()
    payment_id = await gateway.authorized(100, CaptureMethod.AUTOMATIC)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(
        gateway.told(
            N.CAPTURE,
            APPROVED,
            reference=reference,
            payment_reference=reference,
            transaction_id="ch-1",
            amount_minor=100,
        )
    )
    assert only(gateway, payment_id, K.CAPTURE).origin is OperationOrigin.GATEWAY
    assert payment_of(gateway, payment_id).captured_reported_minor is None
    assert gateway.store.discrepancies == []


async def test_a_capture_told_by_the_reference_of_a_refund_is_none_of_that() -> None:
    gateway = bench(capabilities=MUTE)
    payment_id = await gateway.authorized(100, CaptureMethod.AUTOMATIC)
    gateway.connector.steps.append(Step(decides=DECLINED))
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=30))
    refund = only(gateway, payment_id, K.REFUND)
    assert refund.state is S.DECLINED
    told = gateway.told(N.CAPTURE, APPROVED, reference=refund.reference)
    assert await gateway.tell(told) == [Applied(Result.UNMATCHED)]
    assert K.REVERSAL not in {each.kind for each in gateway.store.operations.values()}


async def test_an_earlier_attempt_that_charged_is_reversed_while_the_present_one_is_open() -> None:
    gateway = bench(UNSENT, Step(decides=PENDING), capabilities=MUTE)
    automatic = CaptureMethod.AUTOMATIC
    await gateway.payments.authorize(gateway.authorize(capture_method=automatic))
    answer = await gateway.payments.authorize(gateway.authorize(capture_method=automatic))
    payment_id = answer.payment_id
    authorization = only(gateway, payment_id, K.AUTHORIZE)
    assert (authorization.state, authorization.attempt.number) == (S.PENDING, 2)
    earlier = authorization.operation_id + "-1"
    await gateway.tell(gateway.told(N.CAPTURE, APPROVED, reference=earlier), recover=False)
    assert only(gateway, payment_id, K.REVERSAL).note == earlier


async def test_the_automatic_capture_bounces_though_an_earlier_attempt_has_a_reversal() -> None:
    gateway = bench(UNSENT, capabilities=MUTE)
    command = gateway.authorize(capture_method=CaptureMethod.AUTOMATIC)
    payment_id = (await gateway.payments.authorize(command)).payment_id
    operation_id = only(gateway, payment_id, K.AUTHORIZE).operation_id
    earlier = gateway.told(N.AUTHORIZATION, APPROVED, reference=f"{operation_id}-1")
    await gateway.tell(earlier, recover=False)
    await gateway.payments.authorize(gateway.authorize(capture_method=CaptureMethod.AUTOMATIC))
    kinds = [each.kind for each in gateway.store.of_payment(payment_id).operations]
    assert kinds == [K.AUTHORIZE, K.REVERSAL, K.CAPTURE]
    told = gateway.told(N.CAPTURE, FAILED, reference=f"{operation_id}-2")
    await gateway.tell(told, recover=False)
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED


@pytest.mark.parametrize(("again", "after_s"), [(FAILED, 3), (APPROVED, 1)])
async def test_an_automatic_capture_that_bounced_is_no_late_success_by_that_or_by_what_was_before(
    again: ConnectorAnswer, after_s: float
) -> None:
    gateway = bench()
    payment_id = await gateway.authorized(100, CaptureMethod.AUTOMATIC)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=reference, after_s=2))
    told = gateway.told(N.CAPTURE, again, reference=reference, after_s=after_s)
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert gateway.store.discrepancies == []


async def test_the_amount_that_a_psp_names_with_a_void_is_compared_with_nothing() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.void(gateway.void(payment_id))
    reference = only(gateway, payment_id, K.VOID).reference
    told = gateway.told(N.VOID, APPROVED, reference=reference, amount_minor=0)
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert gateway.store.discrepancies == []


async def test_a_psp_is_asked_for_no_reference_that_it_has_told() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    capture = only(gateway, payment_id, K.CAPTURE)
    told = gateway.told(
        N.CAPTURE, FAILED, reference=capture.reference, payment_transaction_id="unknown for now"
    )
    [applied] = await gateway.tell(told, recover=False)
    assert applied is not None
    assert applied.result is Result.APPLIED


async def test_one_that_fails_is_counted_and_stops_no_other() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    capture = only(gateway, payment_id, K.CAPTURE)
    failing = gateway.told(N.REFUND, APPROVED, payment_transaction_id="tx-1")

    async def fail(connector_account_id: str, connector_transaction_id: str) -> str | None:
        raise ValueError("unforeseen")

    gateway.reference_of = fail  # type: ignore[method-assign]
    told = gateway.told(N.CAPTURE, FAILED, reference=capture.reference)
    await gateway.notifications.keep([failing, told])
    await gateway.applier.run_once()
    assert gateway.results.failures == 1
    assert gateway.results.results == {Result.APPLIED: 1}
    assert list(gateway.notifications.pending.values()) == [1]


async def test_notifications_of_nothing_of_ours_are_unmatched() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    gateway.references["tx-else"] = None
    strange = [
        gateway.told(N.AUTHORIZATION, DECLINED, reference="order-1"),
        gateway.told(N.AUTHORIZATION, DECLINED, reference=f"{reference}-refund"),
        gateway.told(N.AUTHORIZATION, DECLINED, reference=f"{reference}9"),
        gateway.told(N.AUTHORIZATION, DECLINED, reference=f"{reference[:-1]}x"),
        gateway.told(N.AUTHORIZATION, DECLINED, reference=f"{reference[:-1]}²"),
        gateway.told(N.AUTHORIZATION, DECLINED, reference=reference, account="account-2"),
        gateway.told(N.AUTHORIZATION, DECLINED, reference=reference, merchant="mer_2"),
        gateway.told(N.CAPTURE, DECLINED, reference="op_" + 32 * "a" + "-1"),
        gateway.told(N.REFUND, APPROVED, payment_transaction_id="tx-else", amount_minor=5),
        gateway.told(N.REFUND, APPROVED, amount_minor=5),
        gateway.told(N.REFUND, APPROVED, reference=reference, amount_minor=5),
    ]
    assert await gateway.tell(*strange) == [Applied(Result.UNMATCHED)] * len(strange)
    assert payment_of(gateway, payment_id).state is PaymentState.AUTHORIZED


async def test_unknown_kinds_are_kept_and_done_with() -> None:
    gateway = bench()
    assert await gateway.tell(gateway.told(N.UNKNOWN, None)) == [Applied(Result.UNKNOWN)]


# --- a PSP that tells outcomes by notification ----------------------------------------------------


@pytest.mark.parametrize("last", [APPROVED, FAILED])
async def test_what_a_psp_only_received_ends_by_its_notification(last: ConnectorAnswer) -> None:
    gateway = bench(Step(), Step(decides=PENDING), capabilities=TELLING)
    payment_id = await captured(gateway)
    assert only(gateway, payment_id, K.CAPTURE).state is S.PENDING
    await gateway.recover(rounds=2)  # asked, it says again that it received it
    reference = only(gateway, payment_id, K.CAPTURE).reference
    await gateway.tell(gateway.told(N.CAPTURE, last, reference=reference))
    expected = S.SUCCEEDED if last is APPROVED else S.FAILED
    assert only(gateway, payment_id, K.CAPTURE).state is expected
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("last", [APPROVED, FAILED])
async def test_a_void_that_was_received_is_not_sent_again_and_ends_by_its_notification(
    last: ConnectorAnswer,
) -> None:
    gateway = bench(Step(), Step(decides=PENDING), capabilities=TELLING)
    payment_id = await gateway.authorized()
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover(rounds=2)
    assert [sent.kind for sent in gateway.connector.sent] == [K.AUTHORIZE, K.VOID]
    assert gateway.connector.queried == []
    void = only(gateway, payment_id, K.VOID)
    assert void.state is S.PENDING
    await gateway.tell(gateway.told(N.VOID, last, reference=void.reference))
    expected = S.SUCCEEDED if last is APPROVED else S.FAILED
    assert only(gateway, payment_id, K.VOID).state is expected
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("step", [LOST, DROPPED])
async def test_a_void_that_nobody_acknowledged_is_sent_again_whoever_tells_its_outcome(
    step: Step,
) -> None:
    gateway = bench(Step(), Step(), step, capabilities=TELLING)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=30))
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover()
    assert only(gateway, payment_id, K.VOID).state is S.SUCCEEDED


async def test_a_void_of_a_doubt_ends_when_the_psp_tells_that_it_took_it_back() -> None:
    gateway = bench(LOST, capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    await gateway.payments.void(gateway.void(payment_id))
    gateway.connector.asks.extend([PENDING] * 3)  # it will take it back
    await gateway.recover()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.IN_DOUBT
    # The success is older than the cancellation, whenever it is told.
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference))
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.IN_DOUBT
    gateway.notifications.pending.clear()
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.CANCELED
    await gateway.recover()
    assert only(gateway, payment_id, K.VOID).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).state is PaymentState.CANCELED


@pytest.mark.parametrize(("end", "state"), [(APPROVED, S.CANCELED), (EXPIRED, S.EXPIRED)])
@pytest.mark.parametrize("before_s", [0, 60])
async def test_a_success_that_is_told_after_its_end_and_is_not_newer_is_no_news(
    end: ConnectorAnswer, state: S, before_s: float
) -> None:
    gateway = bench(LOST, capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    gateway.connector.asks.extend([NO_ANSWER] * 5)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(
        gateway.told(N.VOID, end, payment_reference=reference, transaction_id="tx-end")
    )
    assert only(gateway, payment_id, K.AUTHORIZE).state is state
    told = gateway.told(N.AUTHORIZATION, APPROVED, reference=reference, after_s=-before_s)
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert not gateway.store.discrepancies
    # What happened after the end is another matter: it must not stand.
    later = gateway.told(N.AUTHORIZATION, APPROVED, reference=reference, after_s=1)
    [applied] = await gateway.tell(later)
    assert applied is not None
    assert applied.result is Result.APPLIED
    assert [each.kind for each in gateway.store.discrepancies] == ["late_success"]


@pytest.mark.parametrize(
    ("end", "state"), [(EXPIRED, S.EXPIRED), (DECLINED, S.DECLINED), (FAILED, S.FAILED)]
)
async def test_what_is_being_cancelled_ends_where_the_psp_tells_that_nothing_stands(
    end: ConnectorAnswer, state: S
) -> None:
    gateway = bench(Step(decides=ACTION), capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    await gateway.payments.void(gateway.void(payment_id))
    gateway.connector.asks.extend([NO_ANSWER] * 5)  # it cannot say that nobody will come back
    await gateway.recover()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.REQUIRES_ACTION
    await gateway.tell(gateway.told(N.AUTHORIZATION, end, reference=reference))
    assert only(gateway, payment_id, K.AUTHORIZE).state is state


async def test_a_charge_that_was_voided_in_flight_is_gone_when_the_psp_tells_so() -> None:
    gateway, payment_id = await charge_voided_in_flight(TELLING)
    gateway.connector.asks.append(PENDING)
    await gateway.recover()
    assert only(gateway, payment_id, K.VOID).state is S.PENDING
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    assert only(gateway, payment_id, K.VOID).state is S.SUCCEEDED
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert payment_of(gateway, payment_id).captured_minor == 0
    assert findings(gateway, payment_id) == []


async def test_a_charge_voided_in_flight_is_gone_though_only_the_notification_tells_so() -> None:
    gateway, payment_id = await charge_voided_in_flight(CAPABLE)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    # The PSP did what recovery asked for, and the answer was lost.
    gateway.connector.asks.extend([NO_ANSWER] * 2)
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    await gateway.recover()
    assert only(gateway, payment_id, K.VOID).state is S.SUCCEEDED
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    payment = payment_of(gateway, payment_id)
    assert (payment.captured_minor, payment.voided_minor) == (0, 100)


async def partial_approval_taken_back() -> tuple[NotifiedBench, str, str]:
    """A payment that was approved for less than asked, whose reversal its PSP has received, and the
    reference of what is reversed.
    """
    gateway = bench(Step(decides=answered(Verdict.APPROVED, 40)), capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    gateway.connector.asks.append(PENDING)
    await gateway.recover()
    assert only(gateway, payment_id, K.REVERSAL).state is S.PENDING
    return gateway, payment_id, only(gateway, payment_id, K.AUTHORIZE).reference


async def test_a_reversal_that_the_psp_refuses_in_the_end_is_shown_to_a_person() -> None:
    gateway, payment_id, reference = await partial_approval_taken_back()
    await gateway.tell(gateway.told(N.REVERSAL, FAILED, reference=reference))
    assert only(gateway, payment_id, K.REVERSAL).state is S.FAILED
    [discrepancy] = gateway.store.discrepancies
    assert discrepancy.operation_id == only(gateway, payment_id, K.REVERSAL).operation_id
    assert (discrepancy.kind, discrepancy.reported) == ("reversal_failed", "FAILED")
    assert payment_of(gateway, payment_id).state is PaymentState.DECLINED
    assert findings(gateway, payment_id) == []
    # It is told again, by another event of the same: there is nothing left to do.
    await gateway.tell(gateway.told(N.REVERSAL, FAILED, reference=reference))
    assert len(gateway.store.discrepancies) == 1


@pytest.mark.parametrize("told", [PENDING, ACTION, NO_ANSWER])
async def test_what_ends_nothing_is_no_evidence(told: ConnectorAnswer) -> None:
    gateway = bench(LOST, capabilities=MUTE)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    [applied] = await gateway.tell(gateway.told(N.AUTHORIZATION, told, reference=reference))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert [row.evidence for row in gateway.store.doubts.values()] == [None]


async def test_no_note_of_a_callers_void_makes_it_a_reversal() -> None:
    gateway = bench(capabilities=MUTE)
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    gateway.connector.steps.append(LOST)
    await gateway.payments.void(replace(gateway.void(payment_id), note=reference))
    [applied] = await gateway.tell(gateway.told(N.REVERSAL, APPROVED, reference=reference))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert only(gateway, payment_id, K.VOID).state is S.IN_DOUBT


async def test_the_end_of_one_attempts_reversal_is_not_that_of_anothers() -> None:
    gateway = bench(UNSENT, UNSENT, capabilities=TELLING)
    await gateway.payments.authorize(gateway.authorize())
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    operation_id = only(gateway, payment_id, K.AUTHORIZE).operation_id
    for number in (1, 2):
        told = gateway.told(N.AUTHORIZATION, APPROVED, reference=f"{operation_id}-{number}")
        await gateway.tell(told, recover=False)
    gateway.connector.asks.extend([PENDING, PENDING])
    await gateway.recover()
    told = gateway.told(N.REVERSAL, FAILED, reference=f"{operation_id}-2")
    await gateway.tell(told)
    operations = gateway.store.of_payment(payment_id).operations
    assert [each.state for each in operations if each.kind is K.REVERSAL] == [S.PENDING, S.FAILED]


async def test_a_reversal_that_took_effect_after_its_refusal_is_not_reversed_itself() -> None:
    gateway = bench(UNSENT, capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference), recover=False)
    slow_recoverer = Gate()

    async def hold_the_first(method: str) -> None:
        if method == "write_change" and not slow_recoverer.reached.is_set():
            await slow_recoverer.wait()

    gateway.store.before = hold_the_first
    gateway.connector.asks.extend([answered(Verdict.CANCELED), PENDING])
    gateway.store.advance(LONG_S)
    slow = asyncio.ensure_future(gateway.recovery.run_once())
    await slow_recoverer.reached.wait()
    other = Bench(gateway.connector, store=gateway.store)
    await other.recover()
    await gateway.tell(gateway.told(N.REVERSAL, FAILED, reference=reference), recover=False)
    await other.recover()
    assert only(gateway, payment_id, K.REVERSAL).state is S.FAILED
    slow_recoverer.opened.set()
    await slow
    assert only(gateway, payment_id, K.REVERSAL).state is S.FAILED
    kinds = [each.kind for each in gateway.store.discrepancies]
    assert kinds == ["late_success", "reversal_failed", "late_success"]


@pytest.mark.parametrize("told_as", [N.VOID, N.REVERSAL])
async def test_a_reversal_whose_money_comes_back_after_its_success_is_shown_to_a_person(
    told_as: N,
) -> None:
    gateway, payment_id, reference = await partial_approval_taken_back()
    of: dict[str, Any] = {
        "payment_reference" if told_as is N.VOID else "reference": reference,
    }
    await gateway.tell(gateway.told(told_as, APPROVED, **of))
    assert only(gateway, payment_id, K.REVERSAL).state is S.SUCCEEDED
    assert not gateway.store.discrepancies
    returned = gateway.told(N.REVERSAL, FAILED, reference=reference, after_s=60)
    [applied] = await gateway.tell(returned)
    assert applied is not None
    reversal = only(gateway, payment_id, K.REVERSAL)
    assert applied == Applied(Result.RECORDED, payment_id, reversal.operation_id)
    assert reversal.state is S.SUCCEEDED
    assert [each.kind for each in gateway.store.discrepancies] == ["reversal_failed"]
    # What is older than the success says nothing against it.
    older = gateway.told(N.REVERSAL, FAILED, reference=reference, after_s=-60)
    [applied] = await gateway.tell(older)
    assert applied is not None
    # Events of two kinds have no order: then it is told, and known.
    assert applied.result is (Result.RECORDED if told_as is N.VOID else Result.NO_NEWS)
    assert len(gateway.store.discrepancies) == 1


@pytest.mark.parametrize("last", [APPROVED, FAILED])
async def test_the_reversal_of_a_capture_ends_by_what_became_of_its_refund(
    last: ConnectorAnswer,
) -> None:
    gateway = bench(Step(), Step(decides=PENDING), capabilities=TELLING)
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.CAPTURE).reference
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=reference))
    gateway.connector.asks.append(PENDING)
    await gateway.tell(gateway.told(N.CAPTURE, APPROVED, reference=reference, after_s=1))
    await gateway.recover()
    assert only(gateway, payment_id, K.REVERSAL).state is S.PENDING
    await gateway.tell(gateway.told(N.REVERSAL, last, reference=reference, after_s=2))
    expected = S.SUCCEEDED if last is APPROVED else S.FAILED
    assert only(gateway, payment_id, K.REVERSAL).state is expected
    assert only(gateway, payment_id, K.CAPTURE).state is S.FAILED
    assert findings(gateway, payment_id) == []


async def test_a_void_in_flight_fails_where_its_charge_could_not_be_taken_back() -> None:
    gateway, payment_id = await charge_voided_in_flight(TELLING)
    gateway.connector.asks.extend([PENDING] * 5)
    await gateway.recover()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.REVERSAL, FAILED, reference=reference))
    await gateway.recover()
    assert only(gateway, payment_id, K.VOID).state is S.FAILED
    assert payment_of(gateway, payment_id).state is PaymentState.CAPTURED
    assert payment_of(gateway, payment_id).captured_minor == 100
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("kind", [K.AUTHORIZE, K.CAPTURE])
async def test_what_recovery_took_back_in_doubt_and_comes_back_is_shown_to_a_person(
    kind: K,
) -> None:
    gateway = bench(*[Step()] * (kind is K.CAPTURE), LOST)
    if kind is K.CAPTURE:
        payment_id = await captured(gateway)
    else:
        payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    gateway.connector.asks.append(None)  # not found yet, so it is cancelled, and was done
    await gateway.recover()
    operation = only(gateway, payment_id, kind)
    assert operation.state is S.CANCELED
    told = gateway.told(N.REVERSAL, FAILED, reference=operation.reference, after_s=60)
    [applied] = await gateway.tell(told)
    assert applied == Applied(Result.RECORDED, payment_id, operation.operation_id)
    [discrepancy] = gateway.store.discrepancies
    assert discrepancy.operation_id == operation.operation_id
    assert (discrepancy.kind, discrepancy.expected) == ("reversal_failed", "CANCELED")
    assert only(gateway, payment_id, kind).state is S.CANCELED
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("kind", [K.REVERSAL, K.VOID])
async def test_what_was_taken_back_under_its_own_reference_and_comes_back_is_shown_to_a_person(
    kind: K,
) -> None:
    """Where no reference can be cancelled, the reversal or void itself is sent, under its own."""
    asked = replace(CAPABLE, cancel_by_reference=False)
    if kind is K.VOID:
        gateway, payment_id = await charge_voided_in_flight(asked)
    else:
        gateway = bench(Step(decides=answered(Verdict.APPROVED, 40)), capabilities=asked)
        payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    await gateway.recover()
    taking_back = only(gateway, payment_id, kind)
    assert taking_back.state is S.SUCCEEDED
    assert gateway.connector.sent[-1].reference == taking_back.reference
    told = gateway.told(N.REVERSAL, FAILED, reference=taking_back.reference, after_s=60)
    [applied] = await gateway.tell(told)
    assert applied == Applied(Result.RECORDED, payment_id, taking_back.operation_id)
    [discrepancy] = gateway.store.discrepancies
    assert discrepancy.operation_id == taking_back.operation_id
    assert (discrepancy.kind, discrepancy.reported) == ("reversal_failed", "FAILED")
    assert only(gateway, payment_id, kind).state is S.SUCCEEDED


async def test_the_refusal_to_give_a_capture_back_says_nothing_of_a_void_of_the_rest() -> None:
    gateway = bench(Step(), Step(decides=PENDING), Step(decides=PENDING), capabilities=TELLING)
    payment_id = await captured(gateway, 40)
    reference = only(gateway, payment_id, K.CAPTURE).reference
    await gateway.tell(gateway.told(N.CAPTURE, FAILED, reference=reference))
    await gateway.payments.void(gateway.void(payment_id))
    gateway.connector.asks.extend([PENDING] * 20)
    await gateway.tell(gateway.told(N.CAPTURE, APPROVED, reference=reference, after_s=1))
    await gateway.recover()
    for after_s in (2, 3):  # once for the reversal, and once for nothing
        told = gateway.told(N.REVERSAL, FAILED, reference=reference, after_s=after_s)
        await gateway.tell(told)
        assert only(gateway, payment_id, K.REVERSAL).state is S.FAILED
        assert only(gateway, payment_id, K.VOID).state is S.PENDING
    kinds = [each.kind for each in gateway.store.discrepancies]
    assert sorted(kinds) == ["late_success", "reversal_failed"]


@pytest.mark.parametrize("of", [K.CAPTURE, K.AUTHORIZE])
async def test_a_refusal_to_give_something_else_back_says_nothing_of_a_void(of: K) -> None:
    gateway = bench(capabilities=TELLING)
    payment_id = await followed(gateway, CaptureMethod.MANUAL_MULTIPLE)
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=40))
    gateway.connector.steps.append(Step(decides=PENDING))
    await gateway.payments.void(gateway.void(payment_id))
    # The capture's one attempt, or the authorization's first one; neither has a reversal.
    reference = only(gateway, payment_id, of).operation_id + "-1"
    await gateway.tell(gateway.told(N.REVERSAL, FAILED, reference=reference))
    assert only(gateway, payment_id, K.VOID).state is S.PENDING


async def test_the_taking_back_of_what_has_no_reversal_is_no_news() -> None:
    gateway = bench(Step(), capabilities=TELLING)
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    for answer in (APPROVED, FAILED, PENDING):
        [applied] = await gateway.tell(gateway.told(N.REVERSAL, answer, reference=reference))
        assert applied is not None
        assert applied.result is Result.NO_NEWS
    assert payment_of(gateway, payment_id).state is PaymentState.AUTHORIZED


async def test_what_was_looked_at_before_the_end_was_told_reverses_nothing_after_it() -> None:
    gateway = bench(Step(decides=ACTION), capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    slow = {"add_evidence": Gate(), "write_change": Gate()}
    waiting = dict(slow)

    async def be_slow(method: str) -> None:
        gate = waiting.pop(method, None)
        if gate is not None:
            gate.reached.set()
            await gate.opened.wait()

    gateway.store.before = be_slow
    approved = gateway.told(N.AUTHORIZATION, APPROVED, reference=reference)
    applying = asyncio.ensure_future(gateway.tell(approved, recover=False))
    await slow["add_evidence"].reached.wait()
    ended = gateway.told(N.VOID, APPROVED, payment_reference=reference, after_s=1)
    await gateway.tell(ended, recover=False)
    recovering = asyncio.ensure_future(gateway.recovery.run_once())
    await slow["write_change"].reached.wait()
    slow["add_evidence"].opened.set()
    await applying
    slow["write_change"].opened.set()
    await recovering
    await gateway.recover()
    assert only(gateway, payment_id, K.AUTHORIZE).state is S.CANCELED
    assert K.REVERSAL not in {each.kind for each in gateway.store.operations.values()}


async def overtaken(
    answering: Gate,
) -> tuple[NotifiedBench, asyncio.Future[Answer], Operation]:
    """A sender that stands still before it hears its PSP's answer, and what recovery found of it:
    nothing.
    """
    gateway = bench(Step(after=answering), capabilities=TELLING)
    call = asyncio.ensure_future(gateway.payments.authorize(gateway.authorize()))
    await answering.reached.wait()
    [operation] = gateway.store.operations.values()
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.recover()
    return gateway, call, operation


@pytest.mark.parametrize("is_kept", [False, True], ids=["told to nobody", "kept as evidence"])
async def test_a_late_answer_reverses_nothing_that_the_psp_told_to_have_taken_back(
    is_kept: bool,
) -> None:
    answering = Gate()
    gateway, call, operation = await overtaken(answering)
    if is_kept:
        answering.opened.set()
        await call
    ended = gateway.told(N.VOID, APPROVED, payment_reference=operation.reference, after_s=1)
    await gateway.tell(ended)
    answering.opened.set()
    await call
    await gateway.recover(rounds=2)
    assert only(gateway, operation.payment_id, K.AUTHORIZE).state is S.CANCELED
    assert K.REVERSAL not in {each.kind for each in gateway.store.operations.values()}


async def test_a_psp_is_asked_by_the_id_it_told_first_whatever_a_notification_leaves_out() -> None:
    gateway = bench(Step(decides=PENDING))
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.tell(gateway.told(N.AUTHORIZATION, DECLINED, reference=reference))
    [asked, *_] = gateway.connector.asked_with
    assert asked is not None
    assert asked.target_transaction_id == f"tx-{reference}"


async def test_a_late_answer_that_comes_while_the_end_is_written_reverses_nothing() -> None:
    answering = Gate()
    gateway, call, operation = await overtaken(answering)
    ended = gateway.told(N.VOID, APPROVED, payment_reference=operation.reference, after_s=1)
    await gateway.tell(ended, recover=False)

    async def answer_first(method: str) -> None:
        await asyncio.sleep(0)
        if method == "write_change" and not answering.opened.is_set():
            answering.opened.set()
            await call

    gateway.store.before = answer_first
    await gateway.recover(rounds=2)
    assert call.done()
    assert only(gateway, operation.payment_id, K.AUTHORIZE).state is S.CANCELED
    assert gateway.store.doubts == {}
    assert K.REVERSAL not in {each.kind for each in gateway.store.operations.values()}


async def test_a_late_answer_to_an_earlier_attempt_is_reversed_though_the_present_one_is_gone() -> (
    None
):
    answering = Gate()
    gateway, call, operation = await overtaken(answering)
    gateway.connector.asks.append(UNSENT.answer)
    await gateway.recover()
    assert only(gateway, operation.payment_id, K.AUTHORIZE).state is S.NOT_SENT
    gateway.connector.steps.append(Step(decides=PENDING))
    await gateway.payments.authorize(gateway.authorize())
    present = only(gateway, operation.payment_id, K.AUTHORIZE)
    assert (present.state, present.attempt.number) == (S.PENDING, 2)
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=present.reference))
    assert only(gateway, operation.payment_id, K.AUTHORIZE).state is S.CANCELED
    answering.opened.set()
    await call
    assert only(gateway, operation.payment_id, K.REVERSAL).note == operation.reference


async def test_a_late_approval_of_what_was_cancelled_without_effect_is_reversed() -> None:
    answering = Gate()
    gateway, call, operation = await overtaken(answering)
    await gateway.payments.void(gateway.void(operation.payment_id))
    gateway.connector.asks.append(UNSENT.answer)
    await gateway.recover()
    present = only(gateway, operation.payment_id, K.AUTHORIZE)
    assert (present.state, present.attempt.delivery) == (S.CANCELED, Delivery.NOT_SENT)
    answering.opened.set()
    await call
    assert only(gateway, operation.payment_id, K.REVERSAL).note == operation.reference


async def test_a_late_approval_of_what_the_psp_told_as_declined_is_reversed() -> None:
    answering = Gate()
    gateway, call, operation = await overtaken(answering)
    await gateway.tell(gateway.told(N.AUTHORIZATION, DECLINED, reference=operation.reference))
    await gateway.recover()
    assert only(gateway, operation.payment_id, K.AUTHORIZE).state is S.DECLINED
    answering.opened.set()
    await call
    assert only(gateway, operation.payment_id, K.REVERSAL).note == operation.reference


async def test_a_success_told_is_reversed_whatever_the_first_answer_was() -> None:
    gateway = bench(UNSENT, capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    gateway.connector.asks.append(replace(PENDING, connector_transaction_id="tx-reversal"))
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference))
    await gateway.recover()
    reversal = only(gateway, payment_id, K.REVERSAL)
    assert (reversal.state, reversal.note) == (S.PENDING, reference)
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    assert only(gateway, payment_id, K.REVERSAL).state is S.SUCCEEDED


async def test_a_reversal_in_doubt_that_is_told_is_not_asked_for_again() -> None:
    gateway = bench(UNSENT, capabilities=TELLING)
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference))
    await gateway.recover()
    assert only(gateway, payment_id, K.REVERSAL).state is S.IN_DOUBT
    gateway.connector.asked_with.clear()
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    assert only(gateway, payment_id, K.REVERSAL).state is S.SUCCEEDED
    assert gateway.connector.asked_with == []


async def test_a_refund_of_our_own_ends_though_a_void_was_asked_for_before() -> None:
    gateway = bench(Step(), Step(decides=PENDING), capabilities=TELLING)
    payment_id = await gateway.authorized(capture_method=CaptureMethod.AUTOMATIC)
    payment = payment_of(gateway, payment_id)
    payment.cancel_requested = True
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=10))
    reference = only(gateway, payment_id, K.REFUND).reference
    await gateway.tell(gateway.told(N.REFUND, APPROVED, reference=reference))
    assert only(gateway, payment_id, K.REFUND).state is S.SUCCEEDED


@pytest.mark.parametrize("kind", [N.REFUND, N.VOID, N.CAPTURE])
async def test_what_is_told_under_the_payments_reference_was_done_elsewhere(kind: N) -> None:
    gateway = bench(capabilities=TELLING)
    payment_id = await gateway.authorized()
    if kind is N.REFUND:
        await gateway.payments.capture(gateway.capture(payment_id))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    [applied] = await gateway.tell(
        gateway.told(
            kind,
            APPROVED,
            reference=reference,
            payment_reference=reference,
            amount_minor=5,
            transaction_id="tx-elsewhere",
        )
    )
    assert applied is not None
    assert applied.result is Result.RECORDED
    [done] = [
        each
        for each in gateway.store.of_payment(payment_id).operations
        if each.origin is OperationOrigin.PSP
    ]
    assert done.kind.name == kind.name


async def test_a_refund_of_ours_is_known_by_its_id_where_the_payments_reference_is_told() -> None:
    pending = replace(PENDING, connector_transaction_id="tx-refund")
    gateway = bench(Step(), Step(), Step(decides=pending), capabilities=TELLING)
    payment_id = await captured(gateway)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=10))
    transaction_id = only(gateway, payment_id, K.REFUND).attempt.connector_transaction_id
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(
        gateway.told(
            N.REFUND,
            APPROVED,
            reference=reference,
            payment_reference=reference,
            transaction_id=transaction_id,
        )
    )
    assert only(gateway, payment_id, K.REFUND).state is S.SUCCEEDED


# --- done elsewhere -------------------------------------------------------------------------------


async def test_a_refund_from_the_psps_console_is_an_operation_of_its_origin() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    authorization = only(gateway, payment_id, K.AUTHORIZE)
    gateway.references["tx-1"] = authorization.reference
    told: dict[str, Any] = {
        "payment_transaction_id": "tx-1",
        "amount_minor": 30,
        "transaction_id": "re-1",
    }
    [applied] = await gateway.tell(gateway.told(N.REFUND, APPROVED, **told))
    assert applied is not None
    assert (applied.result, applied.payment_id) == (Result.RECORDED, payment_id)
    refund, payment = only(gateway, payment_id, K.REFUND), payment_of(gateway, payment_id)
    assert (refund.origin, refund.state, refund.amount_minor) == (
        OperationOrigin.PSP,
        S.SUCCEEDED,
        30,
    )
    assert refund.attempt.connector_transaction_id == "re-1"
    assert refund.idempotency_key is None
    assert (payment.refunded_minor, payment.refunded_reported_minor) == (0, 30)
    assert [each.kind for each in gateway.store.discrepancies] == ["refund_elsewhere"]
    assert findings(gateway, payment_id) == []
    # What it took is not there for us.
    with pytest.raises(GatewayError) as refused:
        await gateway.payments.refund(gateway.refund(payment_id, amount_minor=71))
    assert refused.value.reason is Reason.AMOUNT_EXCEEDS_CAPTURED
    await gateway.payments.refund(gateway.refund(payment_id, "r2", amount_minor=70))
    payment = payment_of(gateway, payment_id)
    assert (payment.refunded_minor, payment.refunded_reported_minor) == (70, 100)
    assert findings(gateway, payment_id) == []


async def test_the_same_refund_told_many_times_and_ways_is_one_operation() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told: dict[str, Any] = {
        "payment_reference": reference,
        "amount_minor": 30,
        "transaction_id": "re-1",
    }
    same = [gateway.told(N.REFUND, APPROVED, after_s=n, **told) for n in range(8)]
    await asyncio.gather(*(gateway.applier.apply(each) for each in same))
    await gateway.tell(*same)
    assert only(gateway, payment_id, K.REFUND).amount_minor == 30
    assert payment_of(gateway, payment_id).refunded_reported_minor == 30


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_refund_from_elsewhere_that_fails_in_the_end_is_none(
    order: tuple[int, int],
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told: dict[str, Any] = {
        "payment_reference": reference,
        "amount_minor": 30,
        "transaction_id": "re-1",
    }
    events = [
        gateway.told(N.REFUND, APPROVED, after_s=1, **told),
        gateway.told(N.REFUND, FAILED, after_s=2, **told),
    ]
    for number in order:
        await gateway.tell(events[number])
    payment = payment_of(gateway, payment_id)
    assert (payment.refunded_minor, payment.refunded_reported_minor) == (0, None)
    states = {
        each.state
        for each in gateway.store.of_payment(payment_id).operations
        if each.kind is K.REFUND
    }
    assert states <= {S.FAILED}
    assert findings(gateway, payment_id) == []
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=100))
    assert payment_of(gateway, payment_id).state is PaymentState.REFUNDED


async def test_what_became_of_a_refund_from_elsewhere_says_nothing_of_another_one() -> None:
    """As Adyen tells those from its console: all of them under their payment's reference."""
    gateway = bench(capabilities=TELLING)
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told: dict[str, Any] = {
        "reference": reference,
        "payment_reference": reference,
        "amount_minor": 30,
    }
    await gateway.tell(
        gateway.told(N.REFUND, APPROVED, transaction_id="re-1", **told),
        gateway.told(N.REFUND, FAILED, after_s=1, transaction_id="re-2", **told),
    )
    assert only(gateway, payment_id, K.REFUND).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).refunded_reported_minor == 30
    await gateway.tell(
        gateway.told(N.REFUND, FAILED, after_s=2, transaction_id="re-1", **told),
        gateway.told(N.REFUND, APPROVED, after_s=3, transaction_id="re-3", **told),
    )
    refunds = {
        each.attempt.connector_transaction_id: each.state
        for each in gateway.store.of_payment(payment_id).operations
        if each.kind is K.REFUND
    }
    assert refunds == {"re-1": S.FAILED, "re-3": S.SUCCEEDED}
    assert payment_of(gateway, payment_id).refunded_reported_minor == 30
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("end", [DECLINED, FAILED, EXPIRED])
async def test_a_refund_from_elsewhere_that_fails_leaves_a_payment_without_success_as_it_is(
    end: ConnectorAnswer,
) -> None:
    gateway = bench(Step(decides=end))
    payment_id = await gateway.authorized()
    before = payment_of(gateway, payment_id).state
    told: dict[str, Any] = {
        "payment_reference": only(gateway, payment_id, K.AUTHORIZE).reference,
        "amount_minor": 30,
        "transaction_id": "re-1",
    }
    await gateway.tell(gateway.told(N.REFUND, APPROVED, after_s=1, **told))
    await gateway.tell(gateway.told(N.REFUND, FAILED, after_s=2, **told))
    assert only(gateway, payment_id, K.REFUND).state is S.FAILED
    assert payment_of(gateway, payment_id).state is before
    assert findings(gateway, payment_id) == []


async def test_more_than_we_captured_may_be_refunded_elsewhere() -> None:
    gateway = bench()
    payment_id = await captured(gateway, 50)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=50))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(
        gateway.told(
            N.REFUND,
            APPROVED,
            payment_reference=reference,
            amount_minor=10**12,
            transaction_id="re-9",
        )
    )
    payment = payment_of(gateway, payment_id)
    assert (payment.refunded_minor, payment.refunded_reported_minor) == (50, 50 + 10**12)
    assert findings(gateway, payment_id) == []


async def test_a_refund_of_ours_in_doubt_is_not_taken_for_one_from_elsewhere() -> None:
    gateway = bench(Step(), Step(), LOST)
    payment_id = await captured(gateway)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=30))
    refund = only(gateway, payment_id, K.REFUND)
    authorization = only(gateway, payment_id, K.AUTHORIZE)
    told = gateway.told(
        N.REFUND,
        APPROVED,
        payment_reference=authorization.reference,
        amount_minor=30,
        transaction_id=f"tx-{refund.reference}",
    )
    assert await gateway.tell(told, recover=False) == [None]
    await gateway.recover()
    await gateway.applier.run_once()
    assert only(gateway, payment_id, K.REFUND).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).refunded_reported_minor is None


async def test_a_refund_of_ours_that_fails_in_the_end_waits_for_no_other_in_doubt() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    gateway.connector.steps.append(LOST)
    await gateway.payments.refund(gateway.refund(payment_id, "r1", 30))
    await gateway.payments.refund(gateway.refund(payment_id, "r2", 20))
    authorization = only(gateway, payment_id, K.AUTHORIZE)
    second = gateway.store.by_key("r2")
    told = gateway.told(
        N.REFUND,
        FAILED,
        payment_reference=authorization.reference,
        transaction_id=second.attempt.connector_transaction_id,
        amount_minor=20,
        currency="EUR",
    )
    [applied] = await gateway.tell(told, recover=False)
    assert applied is not None
    assert gateway.store.by_key("r1").state is S.IN_DOUBT
    assert gateway.store.by_key("r2").state is S.FAILED


@pytest.mark.parametrize("kind", [N.REFUND, N.CAPTURE])
async def test_what_was_done_elsewhere_to_an_earlier_attempt_leaves_the_amounts_alone(
    kind: N,
) -> None:
    gateway = bench()
    payment_id = await followed(gateway)
    before = payment_of(gateway, payment_id)
    earlier = only(gateway, payment_id, K.AUTHORIZE).operation_id + "-1"
    [applied] = await gateway.tell(
        gateway.told(
            kind,
            APPROVED,
            payment_reference=earlier,
            transaction_id="re_1",
            amount_minor=100,
            currency="EUR",
        )
    )
    assert applied is not None
    assert applied.result is Result.RECORDED
    payment = payment_of(gateway, payment_id)
    assert payment.captured_reported_minor is None
    assert payment.refunded_reported_minor is None
    [discrepancy] = gateway.store.discrepancies
    told = f"{kind.name} 100 EUR of attempt 1"
    assert (discrepancy.kind, discrepancy.reported) == ("elsewhere", told)
    await gateway.payments.refund(gateway.refund(payment_id))
    assert payment_of(gateway, payment_id).refunded_minor == before.captured_minor


@pytest.mark.parametrize("unsent", [K.AUTHORIZE, K.CAPTURE])
async def test_a_refund_elsewhere_of_a_capture_is_the_payments_whichever_attempt_captured(
    unsent: K,
) -> None:
    """Some PSPs tell the capture's reference of it."""
    gateway = bench(*([UNSENT, Step()] if unsent is K.AUTHORIZE else [Step(), UNSENT]))
    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    if unsent is K.AUTHORIZE:
        await gateway.payments.authorize(gateway.authorize())
    for _ in range(1 + (unsent is K.CAPTURE)):
        await gateway.payments.capture(gateway.capture(payment_id))
    capture = only(gateway, payment_id, K.CAPTURE)
    assert capture.attempt.number != only(gateway, payment_id, K.AUTHORIZE).attempt.number
    told = gateway.told(
        N.REFUND,
        APPROVED,
        payment_reference=capture.reference,
        transaction_id="re_1",
        amount_minor=100,
    )
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.RECORDED
    assert only(gateway, payment_id, K.REFUND).origin is OperationOrigin.PSP
    assert payment_of(gateway, payment_id).refunded_reported_minor == 100
    with pytest.raises(GatewayError) as refused:
        await gateway.payments.refund(gateway.refund(payment_id))
    assert refused.value.reason is Reason.AMOUNT_EXCEEDS_CAPTURED


@pytest.mark.parametrize("kind", [N.AUTHORIZATION, N.INCREMENT, N.REVERSAL])
async def test_what_is_told_of_a_payment_and_is_no_refund_or_capture_is_unmatched(kind: N) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told = gateway.told(kind, APPROVED, payment_reference=reference, amount_minor=10)
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.UNMATCHED
    assert len(gateway.store.operations) == 2


async def test_what_is_told_without_an_id_is_no_evidence_for_a_refund_in_doubt() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    gateway.connector.steps.append(LOST)
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=30))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told = gateway.told(N.REFUND, APPROVED, payment_reference=reference, amount_minor=30)
    [applied] = await gateway.tell(told, recover=False)
    assert applied is None
    assert [row.evidence for row in gateway.store.doubts.values()] == [None]


async def test_a_refund_elsewhere_does_not_wait_for_one_of_ours_that_has_an_id() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    gateway.connector.steps.append(Step(decides=PENDING))
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=30))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told = gateway.told(
        N.REFUND, APPROVED, payment_reference=reference, transaction_id="re_1", amount_minor=20
    )
    [applied] = await gateway.tell(told, recover=False)
    assert applied is not None
    assert applied.result is Result.RECORDED
    assert payment_of(gateway, payment_id).refunded_reported_minor == 20


async def test_a_refund_elsewhere_does_not_wait_for_one_of_ours_that_was_declined() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    gateway.connector.steps.append(Step(decides=DECLINED))
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=30))
    assert only(gateway, payment_id, K.REFUND).attempt.connector_transaction_id == ""
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told = gateway.told(
        N.REFUND, APPROVED, payment_reference=reference, transaction_id="re_1", amount_minor=20
    )
    [applied] = await gateway.tell(told, recover=False)
    assert applied is not None
    assert applied.result is Result.RECORDED


@pytest.mark.parametrize("end", [APPROVED, EXPIRED])
async def test_that_an_authorization_is_gone_is_no_news_where_all_of_it_is_captured(
    end: ConnectorAnswer,
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    before = payment_of(gateway, payment_id)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    [applied] = await gateway.tell(gateway.told(N.VOID, end, payment_reference=reference))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert payment_of(gateway, payment_id) == before
    assert len(gateway.store.operations) == 2


@pytest.mark.parametrize(("later", "after_s"), [(FAILED, 1), (EXPIRED, 3)])
async def test_a_refund_elsewhere_stands_though_an_older_refusal_or_an_expiry_is_told_of_it(
    later: ConnectorAnswer, after_s: float
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    for answer, at_s in ((APPROVED, 2), (later, after_s)):
        told = gateway.told(
            N.REFUND,
            answer,
            payment_reference=reference,
            transaction_id="re_1",
            amount_minor=20,
            after_s=at_s,
        )
        await gateway.tell(told)
    assert only(gateway, payment_id, K.REFUND).state is S.SUCCEEDED
    assert payment_of(gateway, payment_id).refunded_reported_minor == 20


@pytest.mark.parametrize("refusal", [FAILED, DECLINED])
async def test_a_void_elsewhere_that_the_psp_refused_closes_nothing(
    refusal: ConnectorAnswer,
) -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    [applied] = await gateway.tell(gateway.told(N.VOID, refusal, payment_reference=reference))
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert payment_of(gateway, payment_id).state is PaymentState.AUTHORIZED
    assert len(gateway.store.operations) == 1


async def test_a_void_elsewhere_of_what_has_expired_is_no_news() -> None:
    gateway = bench(capabilities=MUTE)
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.AUTHORIZATION, EXPIRED, reference=reference))
    told = gateway.told(N.VOID, APPROVED, payment_reference=reference, after_s=1)
    [applied] = await gateway.tell(told)
    assert applied is not None
    assert applied.result is Result.NO_NEWS
    assert payment_of(gateway, payment_id).state is PaymentState.EXPIRED
    assert len(gateway.store.operations) == 1


async def test_a_capture_from_the_psps_console_is_reported() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(
        gateway.told(
            N.CAPTURE,
            APPROVED,
            payment_reference=reference,
            amount_minor=250,
            transaction_id="ch-1",
        )
    )
    payment = payment_of(gateway, payment_id)
    assert (payment.captured_minor, payment.captured_reported_minor) == (0, 250)
    assert only(gateway, payment_id, K.CAPTURE).origin is OperationOrigin.PSP
    assert findings(gateway, payment_id) == []


async def test_a_void_in_doubt_does_not_take_back_what_was_captured_elsewhere() -> None:
    gateway = bench(capabilities=replace(CAPABLE, query_by_reference=False))
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    told: dict[str, Any] = {"payment_reference": reference, "transaction_id": "cap-1"}
    await gateway.tell(gateway.told(N.CAPTURE, APPROVED, amount_minor=40, **told))
    gateway.connector.steps.append(LOST)
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover()
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert gateway.connector.standing(K.AUTHORIZE) == [reference]


async def test_what_has_no_amount_or_another_currency_is_shown_to_a_person() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    told: dict[str, Any] = {
        "payment_reference": only(gateway, payment_id, K.AUTHORIZE).reference,
        "transaction_id": "re-1",
    }
    await gateway.tell(
        gateway.told(N.REFUND, APPROVED, **told),
        gateway.told(N.REFUND, APPROVED, amount_minor=5, currency="USD", **told),
        gateway.told(N.REFUND, APPROVED, amount_minor=-5, **told),
    )
    assert [each.kind for each in gateway.store.discrepancies] == ["elsewhere"] * 3
    assert payment_of(gateway, payment_id).refunded_reported_minor is None


# --- voids ----------------------------------------------------------------------------------------


async def test_a_void_from_the_psps_console_closes_the_payment_once() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    for _ in range(2):
        await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    payment = payment_of(gateway, payment_id)
    assert (payment.state, payment.voided_minor) == (PaymentState.VOIDED, 100)
    assert only(gateway, payment_id, K.VOID).origin is OperationOrigin.PSP
    assert findings(gateway, payment_id) == []


async def test_a_void_from_elsewhere_beside_a_capture_under_way_leaves_the_amounts_alone() -> None:
    gateway = bench(Step(), LOST, capabilities=MUTE)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=60))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    payment = payment_of(gateway, payment_id)
    assert (payment.voided_minor, payment.capture_pending_minor) == (0, 60)
    assert findings(gateway, payment_id) == []


@pytest.mark.parametrize("last", [APPROVED, DECLINED])
@pytest.mark.parametrize("capabilities", [MUTE, TELLING])
async def test_a_void_that_is_told_beside_a_last_capture_under_way_ends_a_release_after_it(
    capabilities: Capabilities, last: ConnectorAnswer
) -> None:
    waits = Step(decides=PENDING)
    gateway = bench(Step(), waits, waits, capabilities=capabilities)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, "c1", amount_minor=60))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", amount_minor=30, final=True))
    given_back = gateway.store.by_key("c1").reference
    await gateway.tell(gateway.told(N.CAPTURE, answered(Verdict.CANCELED), reference=given_back))
    release = only(gateway, payment_id, K.VOID)
    assert release.origin is OperationOrigin.GATEWAY
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    await gateway.tell()
    payment = payment_of(gateway, payment_id)
    assert (payment.state, payment.voided_minor) == (PaymentState.AUTHORIZED, 0)
    assert findings(gateway, payment_id) == []
    final = gateway.store.by_key("c2").reference
    await gateway.tell(gateway.told(N.CAPTURE, last, reference=final))
    await gateway.tell()
    await gateway.tell()
    payment, kept = payment_of(gateway, payment_id), 30 if last is APPROVED else 0
    assert (payment.captured_minor, payment.voided_minor) == (kept, 100 - kept)
    assert payment.capture_closed
    assert findings(gateway, payment_id) == []


async def test_a_void_of_ours_in_doubt_ends_by_the_notification() -> None:
    gateway = bench(Step(), LOST)
    payment_id = await gateway.authorized()
    await gateway.payments.void(gateway.void(payment_id))
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.tell(gateway.told(N.VOID, APPROVED, payment_reference=reference))
    void = only(gateway, payment_id, K.VOID)
    assert (void.state, void.origin) == (S.SUCCEEDED, OperationOrigin.CLIENT)


@pytest.mark.parametrize("finished", [True, False])
async def test_an_authorization_that_has_expired_is_expired(finished: bool) -> None:
    gateway = bench(*([] if finished else [Step(decides=ACTION)]), capabilities=MUTE)
    answer = await gateway.payments.authorize(gateway.authorize())
    reference = gateway.store.by_key("a").reference
    await gateway.tell(gateway.told(N.VOID, EXPIRED, payment_reference=reference))
    assert gateway.store.by_key("a").state is S.EXPIRED
    assert payment_of(gateway, answer.payment_id).state is PaymentState.EXPIRED


@pytest.mark.parametrize("kind", [N.CAPTURE, N.REFUND])
async def test_the_end_of_what_is_being_recorded_from_elsewhere_is_not_lost(kind: N) -> None:
    gateway = bench()
    payment_id = await captured(gateway, 50)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    done, failed = (
        gateway.told(
            kind,
            answer,
            after_s=after_s,
            payment_reference=reference,
            amount_minor=10,
            transaction_id="tx-elsewhere",
        )
        for after_s, answer in enumerate([APPROVED, FAILED])
    )
    gate = Gate()

    async def held_up(method: str) -> None:
        if method == "write_change":
            await gate.wait()

    gateway.store.before = held_up
    await gateway.notifications.keep([done])
    recording = asyncio.ensure_future(gateway.applier.run_once())
    await gate.reached.wait()
    await gateway.notifications.keep([failed])
    # At another gateway:
    await gateway.notifications.finish(failed, await gateway.applier.apply(failed))
    gate.opened.set()
    await recording
    await gateway.applier.run_once()
    [elsewhere] = [
        each
        for each in gateway.store.of_payment(payment_id).operations
        if each.origin is OperationOrigin.PSP
    ]
    assert elsewhere.state is S.FAILED
    payment = payment_of(gateway, payment_id)
    assert (payment.captured_reported_minor, payment.refunded_reported_minor) == (None, None)
    assert not gateway.notifications.pending
    assert findings(gateway, payment_id) == []


# --- disputes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "end"),
    [
        ([DisputeStatus.OPENED], S.PENDING),
        ([DisputeStatus.OPENED, DisputeStatus.CHALLENGED, DisputeStatus.WON], S.FAILED),
        ([DisputeStatus.OPENED, DisputeStatus.LOST], S.SUCCEEDED),
        ([DisputeStatus.LOST, DisputeStatus.OPENED], S.SUCCEEDED),
    ],
)
async def test_a_dispute_is_an_operation_of_the_psps_origin(
    statuses: list[DisputeStatus], end: S
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    before = payment_of(gateway, payment_id)
    for status in statuses:
        await gateway.tell(
            gateway.told(
                N.DISPUTE,
                None,
                payment_reference=reference,
                amount_minor=100,
                currency="EUR",
                dispute=Dispute("dp_1", DisputeStage.ACTIVE_DISPUTE, status, "fraudulent"),
            )
        )
    dispute = only(gateway, payment_id, K.DISPUTE)
    assert (dispute.state, dispute.origin, dispute.amount_minor) == (end, OperationOrigin.PSP, 100)
    after = payment_of(gateway, payment_id)
    assert (after.captured_minor, after.refunded_minor) == (before.captured_minor, 0)
    assert [each.kind for each in gateway.store.discrepancies] == ["dispute"]
    assert findings(gateway, payment_id) == []
    # It hinders nothing.
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=10))
    assert payment_of(gateway, payment_id).refunded_minor == 10


@pytest.mark.parametrize("number", [1, 2])
async def test_a_dispute_stands_under_the_account_of_the_attempt_that_it_names(number: int) -> None:
    gateway, *_, payment_id = await followed_elsewhere(CAPABLE, CAPABLE)
    connector = "ab"[number - 1]
    told = gateway.told(
        N.DISPUTE,
        None,
        account=f"acc_{connector}",
        payment_reference=f"{only(gateway, payment_id, K.AUTHORIZE).operation_id}-{number}",
        amount_minor=100,
        currency="EUR",
        dispute=Dispute("dp_1", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED),
    )
    await gateway.tell(told)
    attempt = only(gateway, payment_id, K.DISPUTE).attempt
    assert (attempt.connector, attempt.connector_account_id) == (connector, f"acc_{connector}")
    assert findings(gateway, payment_id) == []


def of_dispute(
    gateway: NotifiedBench, payment_id: str, status: DisputeStatus, after_s: float = 0
) -> Received:
    return gateway.told(
        N.DISPUTE,
        None,
        after_s=after_s,
        payment_reference=only(gateway, payment_id, K.AUTHORIZE).reference,
        amount_minor=100,
        currency="EUR",
        dispute=Dispute("dp_1", DisputeStage.ACTIVE_DISPUTE, status),
    )


@pytest.mark.parametrize(
    ("before", "statuses", "ends", "kinds"),
    [
        ([], ["OPENED", "LOST"], [S.SUCCEEDED], ["dispute"]),
        ([], ["LOST", "OPENED"], [S.SUCCEEDED], ["dispute"]),
        ([], ["OPENED", "WON"], [S.FAILED], ["dispute"]),
        (["OPENED"], ["LOST", "LOST"], [S.SUCCEEDED], ["dispute"]),
        (["OPENED"], ["WON", "LOST"], [S.SUCCEEDED, S.FAILED], ["dispute", "dispute_outcome"]),
        (["OPENED"], ["LOST", "WON"], [S.SUCCEEDED, S.FAILED], ["dispute", "dispute_outcome"]),
    ],
)
async def test_two_gateways_that_are_told_of_a_dispute_at_once_lose_nothing_of_it(
    before: list[str], statuses: list[str], ends: list[S], kinds: list[str]
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    for name in before:
        await gateway.tell(of_dispute(gateway, payment_id, DisputeStatus[name]))
    told = [of_dispute(gateway, payment_id, DisputeStatus[name]) for name in statuses]
    both, wrote = asyncio.Barrier(len(told)), 0

    async def meet(method: str) -> None:
        nonlocal wrote
        if method == "write_change" and wrote < len(told):
            wrote += 1
            await both.wait()  # each has decided by what it read before

    gateway.store.before = meet
    await asyncio.gather(*map(gateway.applier.apply, told))
    assert only(gateway, payment_id, K.DISPUTE).state in ends
    assert [each.kind for each in gateway.store.discrepancies] == kinds
    kinds_of_operations = [each.kind for each in gateway.store.of_payment(payment_id).operations]
    assert kinds_of_operations == [K.AUTHORIZE, K.CAPTURE, K.DISPUTE]


@pytest.mark.parametrize(
    ("statuses", "end"),
    [(["WON", "LOST"], S.FAILED), (["LOST", "WON"], S.SUCCEEDED)],
)
async def test_another_end_of_a_dispute_than_was_told_before_is_shown_to_a_person(
    statuses: list[str], end: S
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    for after_s, name in enumerate(["OPENED", *statuses, "CHALLENGED"]):
        await gateway.tell(of_dispute(gateway, payment_id, DisputeStatus[name], after_s))
    assert only(gateway, payment_id, K.DISPUTE).state is end
    reported = gateway.store.discrepancies[-1]
    assert (reported.kind, reported.expected, reported.reported) == (
        "dispute_outcome",
        end.name,
        f"ACTIVE_DISPUTE {statuses[1]}",
    )
    assert len(gateway.store.discrepancies) == 2


@pytest.mark.parametrize(
    ("status", "end"), [(DisputeStatus.WON, S.FAILED), (DisputeStatus.LOST, S.SUCCEEDED)]
)
async def test_a_request_for_information_that_expires_takes_no_money(
    status: DisputeStatus, end: S
) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    for told in (DisputeStatus.OPENED, DisputeStatus.EXPIRED):
        received = of_dispute(gateway, payment_id, told)
        asked = Dispute("dp_1", DisputeStage.PRE_DISPUTE, told)
        await gateway.tell(
            replace(received, notification=replace(received.notification, dispute=asked))
        )
        assert only(gateway, payment_id, K.DISPUTE).state is S.PENDING
    # The chargeback that follows has the same id at Adyen.
    await gateway.tell(of_dispute(gateway, payment_id, DisputeStatus.OPENED))
    await gateway.tell(of_dispute(gateway, payment_id, status))
    assert only(gateway, payment_id, K.DISPUTE).state is end
    assert [each.kind for each in gateway.store.discrepancies] == ["dispute"]


async def test_a_chargeback_whose_time_is_over_takes_the_money() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    for status in (DisputeStatus.OPENED, DisputeStatus.EXPIRED):
        await gateway.tell(of_dispute(gateway, payment_id, status))
    assert only(gateway, payment_id, K.DISPUTE).state is S.SUCCEEDED


@pytest.mark.parametrize("amount_minor", [None, -1])
async def test_a_dispute_without_an_amount_is_recorded_with_none(amount_minor: int | None) -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    received = of_dispute(gateway, payment_id, DisputeStatus.OPENED)
    told = replace(received.notification, amount_minor=amount_minor)
    await gateway.tell(replace(received, notification=told))
    assert only(gateway, payment_id, K.DISPUTE).amount_minor == 0


async def test_an_amount_of_another_currency_is_not_shown_as_one_of_the_payments() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    reference = only(gateway, payment_id, K.AUTHORIZE).reference
    disputed = Dispute("dp_1", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED, "fraudulent")
    told = gateway.told(
        N.DISPUTE,
        None,
        payment_reference=reference,
        amount_minor=9000,
        currency="JPY",
        dispute=disputed,
    )
    await gateway.tell(told)
    dispute = only(gateway, payment_id, K.DISPUTE)
    assert (dispute.amount_minor, dispute.currency) == (0, "EUR")
    assert findings(gateway, payment_id) == []
    assert [each.reported for each in gateway.store.discrepancies] == ["9000 JPY"]


async def test_a_psp_that_cannot_be_asked_now_is_asked_again() -> None:
    gateway = bench()
    payment_id = await captured(gateway)
    told = gateway.told(
        N.REFUND, APPROVED, payment_transaction_id="tx-1", amount_minor=1, transaction_id="re-1"
    )
    assert await gateway.tell(told, recover=False) == [None]
    gateway.references["tx-1"] = only(gateway, payment_id, K.AUTHORIZE).reference
    await gateway.applier.run_once()
    assert payment_of(gateway, payment_id).refunded_reported_minor == 1


async def test_delivery_counts_as_answered_for_what_the_psp_told() -> None:
    gateway = bench(Step(decides=PENDING), capabilities=MUTE)
    await gateway.payments.authorize(gateway.authorize())
    reference = gateway.store.by_key("a").reference
    await gateway.tell(gateway.told(N.AUTHORIZATION, APPROVED, reference=reference))
    assert gateway.store.by_key("a").attempt.delivery is Delivery.ANSWERED


def applier_of(
    gateway: NotifiedBench, notifications: MemoryNotifications, schedule: Schedule
) -> Applier:
    return Applier(
        notifications,
        gateway.store,
        gateway.router,
        gateway,
        JsonEncoder(),
        gateway.payments.outcomes,
        schedule,
        gateway.results,
    )


async def test_what_cannot_be_applied_yet_is_put_off_for_longer_each_time() -> None:
    pauses_s: list[float] = []

    class Notifications(MemoryNotifications):
        async def put_off(self, received: Received, apply_after_s: float) -> None:
            pauses_s.append(apply_after_s)

    gateway, notifications = bench(), Notifications()
    applier = applier_of(gateway, notifications, SCHEDULE)
    told = gateway.told(N.REFUND, APPROVED, payment_transaction_id="unknown for now")
    await notifications.keep([told])
    for number in range(10):
        assert await applier.run_once() == 1
        assert len(pauses_s) == number + 1
        usual_s = min(SCHEDULE.backoff_s_min * 2**number, SCHEDULE.backoff_s_max)
        assert 0.8 * usual_s <= pauses_s[-1] <= 1.2 * usual_s


@pytest.mark.parametrize(("places", "batch"), [(1, 10), (10, 3)])
async def test_a_place_that_comes_free_is_filled_at_once(places: int, batch: int) -> None:
    gateway = bench()
    limits: list[int] = []
    done = asyncio.Event()

    class Notifications(MemoryNotifications):
        async def lease(self, limit: int, *given: Any, **named: Any) -> Sequence[Pending]:
            limits.append(limit)
            return await super().lease(limit, *given, **named)

        async def finish(self, received: Received, applied: Applied) -> None:
            await super().finish(received, applied)
            if not self.pending:
                done.set()

    notifications = Notifications()
    schedule = replace(SCHEDULE, interval_s=3600, concurrency_max=places, batch_max=batch)
    applier = applier_of(gateway, notifications, schedule)
    await notifications.keep(
        [gateway.told(N.REFUND, APPROVED, reference="none-of-ours") for _ in range(7)]
    )
    applying = asyncio.ensure_future(applier.run())
    async with asyncio.timeout(60):
        await done.wait()
    assert max(limits) == min(places, batch)
    applying.cancel()
    await asyncio.wait([applying])


@pytest.mark.parametrize("error", [StoreUnavailable("away"), ValueError("a defect")])
async def test_a_look_that_failed_is_told_and_followed_by_a_pause(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = bench()
    looks = asyncio.Semaphore(0)

    class Notifications(MemoryNotifications):
        async def lease(self, limit: int, *given: Any, **named: Any) -> Sequence[Pending]:
            looks.release()
            raise error

    applier = applier_of(gateway, Notifications(), replace(SCHEDULE, interval_s=3600))
    applying = asyncio.ensure_future(applier.run())
    async with asyncio.timeout(60):
        for times in (1, 2):
            await looks.acquire()
            for _ in range(10):
                await asyncio.sleep(0)
            assert looks.locked()
            assert gateway.results.failures == times
            applier.wake()
    applying.cancel()
    await asyncio.wait([applying])
    for record in caplog.records:
        assert record.getMessage() == f"notifications could not be looked for: {error}"
        # That the database is away is no defect, and has no stack.
        assert bool(record.exc_info) is isinstance(error, ValueError)


@pytest.mark.parametrize("kind", [N.REFUND, N.DISPUTE])
@pytest.mark.parametrize("is_same", [True, False])
async def test_what_is_told_of_one_thing_is_applied_one_after_the_other(
    kind: N, is_same: bool
) -> None:
    gateway = bench()
    asked, goes_on = asyncio.Semaphore(0), asyncio.Event()
    under_way: list[int] = [0, 0]

    async def look_up(connector_account_id: str, connector_transaction_id: str) -> str | None:
        under_way[0] += 1
        under_way[1] = max(under_way)
        asked.release()
        await goes_on.wait()
        under_way[0] -= 1
        return None

    gateway.reference_of = look_up  # type: ignore[method-assign]
    told = []
    for thing in ("1", "1" if is_same else "2"):
        of_dispute_ = kind is N.DISPUTE
        dispute = Dispute(thing, DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED)
        told.append(
            gateway.told(
                kind,
                None if of_dispute_ else APPROVED,
                transaction_id=thing,
                payment_transaction_id="tx-1",
                dispute=dispute if of_dispute_ else None,
            )
        )
    await gateway.notifications.keep(told)
    applying = asyncio.ensure_future(gateway.applier.run_once())
    await asked.acquire()
    for _ in range(10):
        await asyncio.sleep(0)
    goes_on.set()
    assert await applying == 2
    assert under_way == [0, 1 if is_same else 2]


async def test_what_an_account_whose_psp_hangs_was_told_holds_up_nobody_elses() -> None:
    gateway = bench()
    hanging, applied = asyncio.Semaphore(0), asyncio.Event()

    async def hang(connector_account_id: str, connector_transaction_id: str) -> str | None:
        hanging.release()
        await asyncio.Event().wait()
        raise AssertionError

    class Notifications(MemoryNotifications):
        async def finish(self, received: Received, applied_: Applied) -> None:
            await super().finish(received, applied_)
            applied.set()

    notifications = Notifications()
    gateway.reference_of = hang  # type: ignore[method-assign]
    applier = applier_of(
        gateway,
        notifications,
        replace(SCHEDULE, interval_s=3600, concurrency_max=4, account_concurrency_max=2),
    )
    await notifications.keep(
        [
            gateway.told(N.REFUND, APPROVED, account="hangs", payment_transaction_id="tx-1")
            for _ in range(7)
        ]
    )
    applying = asyncio.ensure_future(applier.run())
    async with asyncio.timeout(60):
        await hanging.acquire()
        await hanging.acquire()
        other = gateway.told(N.REFUND, APPROVED, reference="none-of-ours")
        await notifications.keep([other])
        applier.wake()
        await applied.wait()
    assert hanging.locked()
    assert list(notifications.applied.values()) == [Applied(Result.UNMATCHED)]
    applying.cancel()
    await asyncio.wait([applying])
