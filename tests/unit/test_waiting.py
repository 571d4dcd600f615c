"""gateway.application: payments that wait for a customer, or for a PSP's later answer."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from gateway.application.ports import Capabilities, MethodRule
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    NextAction,
    OperationKind,
    OperationState,
    PaymentState,
    Verdict,
)
from tests.memory_store import (
    ACTION_MARGIN_S,
    ACTION_TIMEOUT_S,
    APPROVED,
    CAPABLE,
    DECLINED,
    FIRST_CHECK_S,
    INCAPABLE,
    LONG_S,
    LOST,
    MERCHANT,
    NO_ANSWER,
    PENDING,
    TRIES_MAX,
    UNSENT,
    WAITING_INTERVAL_S_MAX,
    Bench,
    ScriptedConnector,
    Step,
    answered,
)

K, S, P = OperationKind, OperationState, PaymentState
AUTOMATIC = CaptureMethod.AUTOMATIC

NEEDS_ACTION = replace(
    answered(Verdict.REQUIRES_ACTION), next_action=NextAction("https://psp.example/")
)


async def waiting(capabilities: Capabilities = CAPABLE, *first: Step) -> Bench:
    """A gateway with one payment, under the key `a`, whose customer has to act."""
    connector = ScriptedConnector(capabilities)
    connector.steps.extend(first or [Step(decides=NEEDS_ACTION)])
    gateway = Bench(connector)
    await gateway.payments.authorize(gateway.authorize("a", 100, AUTOMATIC))
    return gateway


def decide(gateway: Bench, answer: ConnectorAnswer) -> None:
    """What the PSP says from now on."""
    gateway.connector.effects[gateway.store.by_key("a").reference].answer = answer


async def overdue(gateway: Bench, seconds: float = 1.0) -> None:
    """Recovery looks, so long after it may cancel."""
    gateway.pass_time(ACTION_TIMEOUT_S + ACTION_MARGIN_S + seconds)
    await gateway.recovery.run_once()


async def test_what_the_customer_has_to_do_has_an_end_and_the_answer_is_frozen() -> None:
    gateway = await waiting()
    operation = gateway.store.by_key("a")
    assert operation.state is S.REQUIRES_ACTION
    assert operation.next_action is not None
    assert operation.next_action.redirect_url == "https://psp.example/"
    assert operation.next_action.expires_at is not None
    left = operation.next_action.expires_at - gateway.store.now
    assert abs(left - timedelta(seconds=ACTION_TIMEOUT_S)) < timedelta(seconds=60)
    payment = gateway.store.of_payment(operation.payment_id).payment
    assert (payment.state, payment.authorized_minor) == (P.REQUIRES_ACTION, 0)
    decide(gateway, APPROVED)
    gateway.pass_time(10)
    await gateway.recovery.run_once()
    repeated = await gateway.payments.authorize(gateway.authorize("a", 100, AUTOMATIC))
    assert repeated.replayed
    assert b"REQUIRES_ACTION" in repeated.response


async def test_the_psps_own_end_of_the_customers_time_counts() -> None:
    at = Bench().store.now + timedelta(days=3)
    action = NextAction("https://psp.example/", expires_at=at)
    gateway = await waiting(CAPABLE, Step(decides=replace(NEEDS_ACTION, next_action=action)))
    assert gateway.store.by_key("a").next_action == action
    await overdue(gateway)
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    assert gateway.connector.canceled == set()


@pytest.mark.parametrize("first", [Step(decides=NEEDS_ACTION), replace(LOST, decides=NEEDS_ACTION)])
async def test_a_customer_who_comes_back_is_noticed_without_a_notification(first: Step) -> None:
    gateway = await waiting(CAPABLE, first)
    gateway.pass_time(5)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    decide(gateway, APPROVED)
    gateway.pass_time(60)
    await gateway.recovery.run_once()
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.next_action) == (S.SUCCEEDED, None)
    payment = gateway.store.of_payment(operation.payment_id).payment
    assert (payment.state, payment.captured_minor) == (P.CAPTURED, 100)
    events = [event for event, _ in gateway.store.events]
    assert events[-3:] == ["authorize.requires_action", "authorize.succeeded", "capture.succeeded"]
    assert gateway.store.doubts == {}
    assert gateway.connector.canceled == set()


@pytest.mark.parametrize(
    ("told", "state"), [(APPROVED, S.SUCCEEDED), (DECLINED, S.DECLINED), (PENDING, S.PENDING)]
)
async def test_what_the_customer_did_may_take_effect_days_later(
    told: ConnectorAnswer, state: OperationState
) -> None:
    gateway = await waiting()
    decide(gateway, PENDING)
    gateway.pass_time(10)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.PENDING
    assert gateway.store.by_key("a").next_action is None
    for _ in range(3):
        await overdue(gateway)
    assert gateway.store.by_key("a").state is S.PENDING
    decide(gateway, told)
    await overdue(gateway)
    assert gateway.store.by_key("a").state is state
    assert gateway.connector.canceled == set()


@pytest.mark.parametrize("decides", [NEEDS_ACTION, PENDING])
async def test_the_psp_is_asked_at_growing_intervals(decides: ConnectorAnswer) -> None:
    far = Bench().store.now + timedelta(days=365)
    decides = replace(decides, next_action=NextAction(expires_at=far))
    gateway = await waiting(CAPABLE, Step(decides=decides))
    key = (MERCHANT, gateway.store.by_key("a").operation_id)
    pauses_s = []
    for _ in range(40):
        pause = gateway.store.doubts[key].check_at - gateway.store.now
        pauses_s.append(pause.total_seconds())
        gateway.pass_time(pause.total_seconds())
        assert await gateway.recovery.run_once() == 1
    assert pauses_s[10] > 2 * pauses_s[3] > 4 * pauses_s[1] / 2
    assert pauses_s[-1] <= 1.2 * WAITING_INTERVAL_S_MAX
    # An hour takes a few dozen questions, however long the day is.
    asked = sum(sum(pauses_s[:n]) < 3600 for n in range(len(pauses_s)))
    assert asked < 45


@pytest.mark.parametrize("decides", [NEEDS_ACTION, PENDING])
@pytest.mark.parametrize("tries", [0, TRIES_MAX, 100_000])
@pytest.mark.parametrize("capabilities", [CAPABLE, INCAPABLE])
async def test_what_waits_needs_nobody_however_often_it_was_looked_at(
    decides: ConnectorAnswer, tries: int, capabilities: Capabilities
) -> None:
    far = Bench().store.now + timedelta(days=365)
    action = NextAction(expires_at=far)
    gateway = await waiting(capabilities, Step(decides=replace(decides, next_action=action)))
    [doubt] = gateway.store.doubts.values()
    doubt.tries = tries
    gateway.pass_time(FIRST_CHECK_S)
    await gateway.recover()
    assert doubt.tries == tries + 1
    assert not doubt.needs_person
    assert doubt.check_at - gateway.store.now <= timedelta(seconds=1.2 * WAITING_INTERVAL_S_MAX)


async def test_no_look_is_put_off_beyond_the_customers_time() -> None:
    gateway = await waiting()
    key = (MERCHANT, gateway.store.by_key("a").operation_id)
    gateway.store.doubts[key].tries = 40
    gateway.pass_time(ACTION_TIMEOUT_S)
    await gateway.recovery.run_once()
    action = gateway.store.by_key("a").next_action
    assert action is not None
    assert action.expires_at is not None
    late = gateway.store.doubts[key].check_at - action.expires_at
    assert late <= timedelta(seconds=ACTION_MARGIN_S, microseconds=1)  # as a float rounds it


# --- the end of the customer's time ---------------------------------------------------------------


async def test_when_the_customers_time_is_over_the_psp_cancels_and_only_then_it_is_expired() -> (
    None
):
    gateway = await waiting()
    await overdue(gateway, -2.0)
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    assert gateway.connector.canceled == set()
    gateway.connector.asks.extend([NEEDS_ACTION, NO_ANSWER])
    gateway.pass_time(LONG_S)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    gateway.pass_time(LONG_S)
    await gateway.recovery.run_once()
    operation = gateway.store.by_key("a")
    assert operation.state is S.EXPIRED
    assert gateway.connector.canceled == {operation.reference}
    assert gateway.store.of_payment(operation.payment_id).payment.state is P.EXPIRED
    assert gateway.store.doubts == {}


async def test_a_psp_that_does_not_cancel_now_is_asked_again_after_a_pause() -> None:
    gateway = await waiting()
    gateway.connector.asks.extend([NEEDS_ACTION, NO_ANSWER])
    await overdue(gateway)
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    [doubt] = gateway.store.doubts.values()
    assert doubt.check_at > gateway.store.now


async def test_a_customer_who_paid_in_the_last_moment_has_paid() -> None:
    gateway = await waiting()
    decide(gateway, APPROVED)
    await overdue(gateway)
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.connector.canceled == set()


async def test_psp_that_ends_it_by_time_is_believed_at_once() -> None:
    gateway = await waiting()
    decide(gateway, answered(Verdict.EXPIRED))
    gateway.pass_time(10)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.EXPIRED


async def test_psp_that_can_cancel_but_not_be_asked_is_told_to_cancel() -> None:
    gateway = await waiting(replace(CAPABLE, query_by_reference=False))
    gateway.pass_time(10)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION
    await overdue(gateway)
    assert gateway.store.by_key("a").state is S.EXPIRED


async def test_without_a_proof_no_time_ends_it() -> None:
    gateway = await waiting(replace(CAPABLE, cancel_by_reference=False))
    for _ in range(5):
        await overdue(gateway)
    assert gateway.store.by_key("a").state is S.REQUIRES_ACTION


@pytest.mark.parametrize("passed_s", [0.0, ACTION_TIMEOUT_S + ACTION_MARGIN_S + 1])
async def test_void_of_what_waits_for_a_customer_cancels_it_soon(passed_s: float) -> None:
    gateway = await waiting()
    operation = gateway.store.by_key("a")
    gateway.store.doubts[MERCHANT, operation.operation_id].check_at += timedelta(days=300)
    gateway.pass_time(passed_s)
    void = await gateway.payments.void(gateway.void(operation.payment_id))
    assert b'"state": "PENDING"' in void.response
    for _ in range(3):
        gateway.pass_time(5)
        await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.CANCELED
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert gateway.connector.canceled == {operation.reference}
    assert gateway.store.doubts == {}


async def test_a_late_success_of_what_was_expired_is_reversed() -> None:
    gateway = await waiting()
    await overdue(gateway)
    operation = gateway.store.by_key("a")
    assert operation.state is S.EXPIRED
    await gateway.payments.outcomes.reverse(operation, 1, APPROVED)
    await gateway.recover(rounds=2)
    kinds = {
        other.kind: other.state
        for other in gateway.store.of_payment(operation.payment_id).operations
    }
    assert kinds == {K.AUTHORIZE: S.EXPIRED, K.REVERSAL: S.SUCCEEDED}


# --- methods --------------------------------------------------------------------------------------

IDEAL = {
    "ideal": MethodRule(
        frozenset({AUTOMATIC}), frozenset({"EUR"}), frozenset({"NL"}), frozenset({"customer_name"})
    )
}


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (Reason.METHOD_NOT_SUPPORTED, {"method": "pix"}),
        (Reason.COUNTRY_NOT_SUPPORTED, {"customer_country": "BR"}),
        (Reason.CURRENCY_NOT_SUPPORTED, {"currency": "USD"}),
        (Reason.FIELD_NOT_SUPPORTED, {"capture_method": CaptureMethod.MANUAL}),
        (Reason.FIELD_REQUIRED, {"method_fields": frozenset({"bank"})}),
        (Reason.METHOD_NOT_SUPPORTED, {"method": "card"}),
    ],
)
async def test_a_method_is_refused_for_what_the_connectors_rule_does_not_allow(
    reason: Reason, changes: dict[str, Any]
) -> None:
    gateway = Bench(ScriptedConnector(replace(CAPABLE, methods=IDEAL)))
    command = replace(
        gateway.authorize("a", 100, AUTOMATIC),
        method="ideal",
        method_fields=frozenset({"method_type", "customer_name"}),
        customer_country="NL",
    )
    with pytest.raises(GatewayError) as caught:
        await gateway.payments.authorize(replace(command, **changes))
    assert caught.value.reason is reason
    assert all(violation.field for violation in caught.value.violations)
    assert caught.value.violations
    assert gateway.store.operations == {}
    await gateway.payments.authorize(command)
    assert gateway.store.by_key("a").state is S.SUCCEEDED


async def test_secrets_go_to_the_psp_with_each_sending_and_nowhere_else() -> None:
    secrets = {"number": "4895370000000000003", "cryptogram": "A" * 28}
    connector = ScriptedConnector()
    connector.steps.append(replace(UNSENT, arrives=True, decides=DECLINED))
    gateway = Bench(connector)
    for _ in range(2):  # not sent at first, so the repeat executes
        await gateway.payments.authorize(replace(gateway.authorize("a"), secrets=secrets))
    assert [request.secrets for request in connector.sent] == [secrets, secrets]
    kept = repr((gateway.store.operations, gateway.store.payments, gateway.claims.frozen))
    assert not any(secret in kept + repr(connector.sent) for secret in secrets.values())


@pytest.mark.parametrize(
    ("told", "overdue_s", "state"),
    [
        (Verdict.APPROVED, -60.0, S.SUCCEEDED),
        (Verdict.CANCELED, -60.0, S.CANCELED),
        (Verdict.CANCELED, 1.0, S.EXPIRED),
    ],
)
async def test_what_a_notification_tells_is_looked_at_at_once(
    told: Verdict, overdue_s: float, state: OperationState
) -> None:
    gateway = await waiting()
    operation = gateway.store.by_key("a")
    gateway.store.doubts[MERCHANT, operation.operation_id].check_at += timedelta(days=1)
    gateway.pass_time(ACTION_TIMEOUT_S + overdue_s)
    assert await gateway.recovery.run_once() == 0
    # As Stripe's own notification of a cancellation says it, whoever asked for that.
    decide(gateway, answered(told))
    assert await gateway.store.add_evidence(operation, answered(told))
    assert await gateway.recovery.run_once() == 1
    assert gateway.store.by_key("a").state is state
