"""gateway.application: the money calls and recovery, over a store and a PSP in memory."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.application import usecases
from gateway.application.administration import answer_of_person
from gateway.application.admission import Stage
from gateway.application.commands import Answer
from gateway.application.ports import (
    AmountRule,
    Capabilities,
    ClaimOutcome,
    ConnectorRequest,
    Found,
    Intent,
    IntentResult,
    Lease,
    ListFilter,
    Resolution,
    StoreUnavailable,
)
from gateway.application.routing import Routing
from gateway.application.usecases import Payments
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    DoubtCause,
    DoubtOutcome,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    PaymentState,
    Verdict,
)
from gateway.domain.states import UNFINISHED
from gateway.routing.model import Candidate
from tests.memory_store import (
    APPROVED,
    BACKOFF_S_MAX,
    CAPABLE,
    DECLINED,
    DROPPED,
    FIRST_CHECK_S,
    INCAPABLE,
    LEASE_S,
    LIMITS,
    LONG_S,
    LOST,
    MERCHANT,
    NO_ANSWER,
    NOT_SENT,
    PENDING,
    SCHEDULE,
    TAKEOVER_S,
    TRIES_MAX,
    UNSENT,
    Bench,
    Gate,
    JsonEncoder,
    MemoryStore,
    OneRoute,
    ScriptedConnector,
    Step,
    answered,
)

K, S, P = OperationKind, OperationState, PaymentState
AUTOMATIC, MANUAL, MULTIPLE = CaptureMethod

QUERY_ONLY = replace(CAPABLE, idempotent_by_reference=False, cancel_by_reference=False)
CANCEL_ONLY = replace(CAPABLE, idempotent_by_reference=False, query_by_reference=False)
NON_IDEMPOTENT = replace(CAPABLE, idempotent_by_reference=False)
IDEMPOTENT_ONLY = replace(INCAPABLE, idempotent_by_reference=True)
TELLING = replace(IDEMPOTENT_ONLY, tells_by_notification=True)


def bench(capabilities: Capabilities = CAPABLE, *steps: Step, **kwargs: Any) -> Bench:
    connector = ScriptedConnector(capabilities)
    connector.steps.extend(steps)
    return Bench(connector, **kwargs)


async def refused(reason: Reason, call: Coroutine[Any, Any, object]) -> GatewayError:
    with pytest.raises(GatewayError) as error:
        await call
    assert error.value.reason is reason
    return error.value


def in_background(call: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
    return asyncio.get_running_loop().create_task(call)


async def waiters(gateway: Bench, number: int) -> None:
    """Until so many duplicates wait for the answer to the key `a`."""
    for _ in range(1000):
        if gateway.payments._waiting.get((MERCHANT, "a")) == number:
            return
        await asyncio.sleep(0)
    pytest.fail(f"there are {gateway.payments._waiting} waiters")


def operations_of(gateway: Bench, payment_id: str, kind: OperationKind) -> list[Operation]:
    operations = gateway.store.of_payment(payment_id).operations
    return [operation for operation in operations if operation.kind is kind]


def failing(method: str, times: int = 1) -> Callable[[str], Coroutine[Any, Any, None]]:
    """The store is away for the next `times` calls of a method."""
    left = times

    async def fail(name: str) -> None:
        nonlocal left
        await asyncio.sleep(0)
        if name == method and left:
            left -= 1
            raise StoreUnavailable("the database is away")

    return fail


# --- the plain way --------------------------------------------------------------------------------


async def test_payment_is_authorized_captured_and_refunded() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=60))
    await gateway.payments.refund(gateway.refund(payment_id, amount_minor=10))
    await gateway.payments.void(gateway.void(payment_id))
    aggregate = await gateway.payments.get_payment(MERCHANT, Mode.TEST, payment_id)
    payment = aggregate.payment
    assert (payment.captured_minor, payment.refunded_minor, payment.voided_minor) == (60, 10, 40)
    assert [sent.kind for sent in gateway.connector.sent] == [
        K.AUTHORIZE,
        K.CAPTURE,
        K.REFUND,
        K.VOID,
    ]
    assert gateway.store.doubts == {}


async def test_the_psp_is_told_which_capture_is_the_last_one() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 60))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 30, final=True))
    assert [sent.final for sent in gateway.connector.sent] == [False, False, True]


async def test_an_increment_is_on_top_of_what_the_psp_says_is_authorized() -> None:
    gateway = bench(CAPABLE, Step(decides=answered(Verdict.APPROVED, 120)))
    payment_id = await gateway.authorized(100)
    await gateway.payments.increment(gateway.increment(payment_id, 10))
    assert gateway.connector.sent[-1].authorized_minor == 120


async def test_a_claim_goes_back_where_a_repeat_may_be_answered_otherwise() -> None:
    gateway = bench(CAPABLE, LOST)
    await gateway.payments.authorize(gateway.authorize())
    assert gateway.store.by_key("a").state is S.IN_DOUBT
    assert gateway.claims.claims == {}


async def test_intent_is_durable_before_the_psp_is_asked() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    assert gateway.store.by_key("a").state is S.PROCESSING
    gate.opened.set()
    await call
    assert gateway.store.by_key("a").state is S.SUCCEEDED


async def test_times_are_the_databases() -> None:
    gateway = bench()
    began = gateway.store.now
    payment_id = await gateway.authorized()
    gateway.store.advance(3600)
    await gateway.payments.capture(gateway.capture(payment_id))
    ended = gateway.store.now
    held = gateway.store.of_payment(payment_id)
    payment = held.payment
    assert payment.created_at == began
    assert [each.created_at for each in held.operations] == [began, ended]
    # What was carried on by the local clock since is much less than an hour.
    assert payment.updated_at is not None
    for changed_at in (payment.updated_at, gateway.payments.outcomes.now()):
        assert ended <= changed_at < ended + timedelta(hours=1)


async def test_new_attempt_changes_the_operation_and_its_payment_when_it_begins() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, UNSENT, Step(before=gate))
    await gateway.payments.authorize(gateway.authorize())
    gateway.pass_time(3600)
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    operation = gateway.store.by_key("a")
    payment = gateway.store.of_payment(operation.payment_id).payment
    for changed_at in (operation.updated_at, payment.updated_at):
        assert changed_at is not None
        assert changed_at >= gateway.store.now
    gate.opened.set()
    await call


async def test_refund_of_one_capture_names_that_capture_at_the_psp() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 60))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 40))
    await gateway.payments.refund(gateway.refund(payment_id, "r1", 10))
    await gateway.payments.refund(gateway.refund(payment_id, "r2", 80))
    first, second = gateway.connector.sent[-2:]
    capture = gateway.store.by_key("c1")
    assert first.target_transaction_id == f"tx-{capture.reference}"
    authorization = gateway.store.by_key("a")
    assert second.target_transaction_id == f"tx-{authorization.reference}"
    for sent in gateway.connector.sent[1:]:
        assert sent.payment_transaction_id == f"tx-{authorization.reference}"


async def test_increment_tells_the_psp_what_is_authorized_before_it() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.increment(gateway.increment(payment_id, 10, "i1"))
    await gateway.payments.increment(gateway.increment(payment_id, 5, "i2"))
    assert [sent.authorized_minor for sent in gateway.connector.sent] == [0, 100, 110]


async def test_reads_find_only_the_merchants_own_of_the_same_mode() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    payments = gateway.payments
    operation_id = gateway.store.by_key("a").operation_id
    found = await payments.get_operation(MERCHANT, Mode.TEST, idempotency_key="a")
    assert found.operation.operation_id == operation_id
    for merchant, mode in ((MERCHANT, Mode.LIVE), ("mer_2", Mode.TEST)):
        await refused(Reason.PAYMENT_NOT_FOUND, payments.get_payment(merchant, mode, payment_id))
        for how, may_come in (
            ({"operation_id": operation_id}, False),
            ({"idempotency_key": "a"}, True),
        ):
            call = payments.get_operation(merchant, mode, **how)
            error = await refused(Reason.OPERATION_NOT_FOUND, call)
            assert ("yet" in error.message) is may_come
        page = await payments.list_payments(ListFilter(merchant, mode, page_size=10))
        assert page.payments == []
    await refused(
        Reason.PAYMENT_NOT_FOUND,
        payments.capture(replace(gateway.capture(payment_id), mode=Mode.LIVE)),
    )
    await refused(
        Reason.PAYMENT_NOT_FOUND,
        payments.void(replace(gateway.void(None, authorize_key="a"), mode=Mode.LIVE)),
    )


async def test_payments_are_listed_newest_first_page_by_page() -> None:
    gateway = bench()
    for number in range(5):
        await gateway.payments.authorize(gateway.authorize(f"k{number}"))
        gateway.store.advance(1)
    pages, after = [], None
    while True:
        filter_ = ListFilter(MERCHANT, Mode.TEST, page_size=2, after=after)
        page = await gateway.payments.list_payments(filter_)
        pages.append([payment.created_at for payment in page.payments])
        after = page.next_after
        if after is None:
            break
    assert [len(page) for page in pages] == [2, 2, 1]
    flat = [created_at for page in pages for created_at in page]
    assert flat == sorted(flat, key=str, reverse=True)


async def test_call_without_a_connector_for_its_mode_or_its_fields_is_refused() -> None:
    gateway = bench()
    await refused(
        Reason.CONNECTOR_UNAVAILABLE,
        gateway.payments.authorize(gateway.authorize(mode=Mode.LIVE)),
    )
    error = await refused(
        Reason.FIELD_NOT_SUPPORTED,
        gateway.payments.authorize(gateway.authorize(used_fields=frozenset({"three_ds"}))),
    )
    assert [violation.field for violation in error.violations] == ["three_ds"]
    assert gateway.store.operations == {}
    assert gateway.claims.claims == {}


async def test_what_the_connector_cannot_express_is_refused_before_the_intent() -> None:
    gateway = bench(
        replace(
            CAPABLE,
            operations=frozenset(OperationKind) - {OperationKind.VERIFY, OperationKind.INCREMENT},
            capture_methods={CaptureMethod.MANUAL},
            amounts={"EUR": AmountRule(step_minor=10, amount_minor_max=2000)},
        )
    )
    for reason, fields, more in (
        (Reason.CURRENCY_NOT_SUPPORTED, ["amount.currency_code"], {"currency": "USD"}),
        (Reason.AMOUNT_NOT_SUPPORTED, ["amount.amount_minor"], {"amount_minor": 1005}),
        (Reason.AMOUNT_NOT_SUPPORTED, ["amount.amount_minor"], {"amount_minor": 2010}),
        (Reason.OPERATION_NOT_SUPPORTED, [], {"amount_minor": 0}),
        (Reason.FIELD_NOT_SUPPORTED, ["capture_method"], {"capture_method": AUTOMATIC}),
    ):
        command = replace(gateway.authorize("a", 100, MANUAL), **more)
        error = await refused(reason, gateway.payments.authorize(command))
        assert [violation.field for violation in error.violations] == fields
    assert gateway.store.operations == {}
    answer = await gateway.payments.authorize(gateway.authorize("a", 2000, MANUAL))
    payment_id = answer.payment_id
    await refused(
        Reason.OPERATION_NOT_SUPPORTED,
        gateway.payments.increment(gateway.increment(payment_id, 10)),
    )
    await refused(
        Reason.AMOUNT_NOT_SUPPORTED,
        gateway.payments.capture(gateway.capture(payment_id, amount_minor=15)),
    )
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=20))
    assert [request.amount_minor for request in gateway.connector.sent] == [2000, 20]


# --- idempotency ----------------------------------------------------------------------------------


@pytest.mark.parametrize("redis", [True, False])
async def test_hundred_concurrent_duplicates_over_two_gateways_cause_one_request(
    redis: bool,
) -> None:
    first = bench()
    second = Bench(first.connector, store=first.store, claims=first.claims)
    first.claims.available = redis
    calls = [
        gateway.payments.authorize(gateway.authorize())
        for gateway in (first, second)
        for _ in range(50)
    ]
    answers = await asyncio.gather(*calls)
    assert len(first.connector.sent) == 1
    assert len({answer.response for answer in answers}) == 1
    originals = [answer for answer in answers if not answer.replayed]
    assert len(originals) == 1
    [request_id] = {answer.first_request_id for answer in answers if answer.replayed}
    assert request_id == first.store.by_key("a").request_id


@pytest.mark.parametrize("decision", [APPROVED, DECLINED, PENDING])
@pytest.mark.parametrize("source", ["redis", "postgres"])
async def test_frozen_answer_is_replayed_byte_for_byte(
    source: str, decision: ConnectorAnswer
) -> None:
    gateway = bench(CAPABLE, Step(decides=decision))
    first = await gateway.payments.authorize(gateway.authorize())
    # What happens to the payment later does not change the answer.
    if decision is APPROVED:
        await gateway.payments.void(gateway.void(first.payment_id))
    if source == "postgres":
        gateway.claims.flush()
    again = await gateway.payments.authorize(gateway.authorize())
    assert (again.response, again.replayed, again.frozen) == (first.response, True, True)
    assert gateway.counts.replays[source] == 1


async def test_no_answer_is_cached_while_nobody_knows_whose_commits_redis_speaks_of() -> None:
    gateway = bench()
    gateway.claims.generation = None
    await gateway.payments.authorize(gateway.authorize())
    assert gateway.claims.frozen == {}


async def test_answer_that_postgresql_had_is_in_redis_for_the_next_repeat() -> None:
    gateway = bench()
    first = await gateway.payments.authorize(gateway.authorize())
    gateway.claims.flush()
    for _ in range(2):
        again = await gateway.payments.authorize(gateway.authorize())
        assert (again.response, again.replayed) == (first.response, True)
    assert gateway.counts.replays == {"postgres": 1, "redis": 1}


@pytest.mark.parametrize("generation", ["g1", None], ids=["known", "unknown"])
async def test_claim_goes_back_in_the_generation_that_it_was_made_in(
    generation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = bench(CAPABLE, UNSENT)
    gateway.claims.generation = generation
    told: list[str | None] = []

    def release(*_: object, generation: str | None = None) -> None:
        told.append(generation)
        gateway.claims.generation = "g2"  # a failover in between, at the latest

    monkeypatch.setattr(gateway.claims, "release", release)
    await gateway.payments.authorize(gateway.authorize())
    assert told == [generation]


@pytest.mark.parametrize("flushed", [False, True])
async def test_same_key_with_another_payload_never_executes(flushed: bool) -> None:
    gateway = bench()
    await gateway.payments.authorize(gateway.authorize())
    if flushed:
        gateway.claims.flush()
    await refused(
        Reason.IDEMPOTENCY_KEY_REUSED,
        gateway.payments.authorize(gateway.authorize(amount_minor=101)),
    )
    assert len(gateway.connector.sent) == 1


async def test_changed_payload_is_refused_while_the_first_call_is_in_flight() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    await refused(
        Reason.IDEMPOTENCY_KEY_REUSED,
        gateway.payments.authorize(gateway.authorize(amount_minor=101)),
    )
    gate.opened.set()
    await call


async def test_key_of_an_authorization_cannot_be_used_for_another_call() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await refused(
        Reason.IDEMPOTENCY_KEY_REUSED, gateway.payments.capture(gateway.capture(payment_id, "a"))
    )
    gateway.claims.flush()
    await refused(
        Reason.IDEMPOTENCY_KEY_REUSED, gateway.payments.capture(gateway.capture(payment_id, "a"))
    )


async def test_claim_whose_owner_died_before_the_intent_stops_nobody() -> None:
    gateway = bench()
    gateway.claims.claims[MERCHANT, "a"] = b"dead"
    answer = await gateway.payments.authorize(gateway.authorize())
    assert gateway.counts.claims[ClaimOutcome.IN_FLIGHT] == 1
    assert not answer.replayed


async def test_repeat_of_a_call_in_doubt_tells_the_present_and_freezes_nothing() -> None:
    gateway = bench(CAPABLE, LOST)
    answer = await gateway.payments.authorize(gateway.authorize())
    assert b"IN_DOUBT" in answer.response
    assert not answer.frozen
    repeated = await gateway.payments.authorize(gateway.authorize())
    assert (repeated.replayed, repeated.frozen) == (True, False)
    await gateway.recover()
    later = await gateway.payments.authorize(gateway.authorize())
    assert b"SUCCEEDED" in later.response
    assert (later.replayed, later.frozen) == (True, True)
    assert len(gateway.connector.sent) == 1


async def test_repeat_of_a_refused_call_executes_when_the_state_allows_it() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await refused(
        Reason.AMOUNT_EXCEEDS_CAPTURED, gateway.payments.refund(gateway.refund(payment_id))
    )
    await gateway.payments.capture(gateway.capture(payment_id))
    answer = await gateway.payments.refund(gateway.refund(payment_id))
    assert not answer.replayed


async def test_repeat_is_answered_even_where_the_state_would_refuse_it_now() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    first = await gateway.payments.capture(gateway.capture(payment_id))
    gateway.claims.flush()
    again = await gateway.payments.capture(gateway.capture(payment_id))
    assert (again.response, again.replayed) == (first.response, True)


# --- not sent -------------------------------------------------------------------------------------


async def test_repeat_of_what_was_not_sent_executes_as_attempt_two_under_the_next_epoch() -> None:
    gateway = bench(CAPABLE, UNSENT)
    first = await gateway.payments.authorize(gateway.authorize())
    assert b"NOT_SENT" in first.response
    assert not first.frozen
    again = await gateway.payments.authorize(gateway.authorize())
    assert not again.replayed
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.epoch, operation.attempt.number) == (S.SUCCEEDED, 2, 2)
    assert [sent.reference for sent in gateway.connector.sent] == [f"{operation.operation_id}-2"]
    assert [attempt.number for attempt in operation.superseded_attempts] == [1]


async def test_follow_up_that_was_not_sent_begins_by_the_payment_as_it_is_now() -> None:
    gateway = bench(CAPABLE, Step(), UNSENT)
    payment_id = await gateway.authorized()
    command = gateway.capture(payment_id)
    await gateway.payments.capture(command)
    await gateway.payments.capture(gateway.capture(payment_id, "other", 30))
    await gateway.payments.capture(command)
    operation = gateway.store.by_key("c")
    assert (operation.amount_minor, operation.attempt.number, operation.state) == (
        70,
        2,
        S.SUCCEEDED,
    )
    assert gateway.store.of_payment(payment_id).payment.captured_minor == 100


async def test_repeat_of_a_follow_up_is_refused_where_the_state_forbids_it_now() -> None:
    gateway = bench(CAPABLE, Step(), UNSENT)
    payment_id = await gateway.authorized()
    command = gateway.capture(payment_id)
    await gateway.payments.capture(command)
    await gateway.payments.void(gateway.void(payment_id))
    await refused(Reason.PAYMENT_NOT_AUTHORIZED, gateway.payments.capture(command))
    assert gateway.store.by_key("c").state is S.NOT_SENT


@pytest.mark.parametrize("kind", ["authorize", "capture"])
@pytest.mark.parametrize("redis", [True, False])
async def test_concurrent_repeats_of_what_was_not_sent_send_once(kind: str, redis: bool) -> None:
    gateway = bench(CAPABLE, *([UNSENT] if kind == "authorize" else [Step(), UNSENT]))
    gateway.claims.available = redis

    def call() -> Coroutine[Any, Any, Answer]:
        if kind == "authorize":
            return gateway.payments.authorize(gateway.authorize())
        return gateway.payments.capture(gateway.capture(payment_id))

    payment_id = (await gateway.payments.authorize(gateway.authorize())).payment_id
    if kind == "capture":
        await call()
    sent = len(gateway.connector.sent)
    answers = await asyncio.gather(*(call() for _ in range(30)))
    assert len(gateway.connector.sent) == sent + 1
    assert len({answer.response for answer in answers}) == 1


@pytest.mark.parametrize("amount_minor", [None, 30], ids=["no room left", "room left"])
async def test_repeat_that_a_quicker_repeat_overtakes_is_answered_with_its_outcome(
    amount_minor: int | None,
) -> None:
    gateway = bench(CAPABLE, Step(), UNSENT)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=amount_minor))
    gateway.claims.claims[MERCHANT, "c"] = b"somebody else's"
    gate, loads = Gate(), 0

    async def hold_the_first_load(method: str) -> None:
        nonlocal loads
        await asyncio.sleep(0)
        loads += method == "load"
        if method == "load" and loads == 1:
            await gate.wait()

    gateway.store.before = hold_the_first_load
    again = gateway.capture(payment_id, amount_minor=amount_minor)
    slow = in_background(gateway.payments.capture(again))
    await gate.reached.wait()
    quick = await gateway.payments.capture(replace(again, request_id="quick"))
    gate.opened.set()
    assert (await slow).response == quick.response
    assert len(gateway.connector.standing(K.CAPTURE)) == 1


async def test_repeat_of_a_refund_is_of_the_captures_that_are_left_now() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 60))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 40))
    gateway.connector.steps.append(UNSENT)
    await gateway.payments.refund(gateway.refund(payment_id, "r1", 30))
    await gateway.payments.refund(gateway.refund(payment_id, "r2", 60))
    await gateway.payments.refund(gateway.refund(payment_id, "r1", 30))
    refund, capture = gateway.store.by_key("r1"), gateway.store.by_key("c2")
    assert (refund.state, refund.attempt.number) == (S.SUCCEEDED, 2)
    assert refund.allocations == ((capture.operation_id, 30),)
    assert refund.parent_operation_id == capture.operation_id


async def test_deadline_that_is_too_near_costs_no_intent_and_no_read() -> None:
    gateway = bench()
    deadline = time.monotonic() + LIMITS.min_send_budget_s / 2
    called: list[str] = []

    async def note(method: str) -> None:
        await asyncio.sleep(0)
        called.append(method)

    gateway.store.before = note
    await refused(
        Reason.DEADLINE_TOO_SHORT, gateway.payments.authorize(gateway.authorize(deadline=deadline))
    )
    assert called == []
    gateway.store.before = failing("none")
    answer = await gateway.payments.authorize(gateway.authorize())
    assert not answer.replayed


@pytest.mark.parametrize("is_claimed", [False, True])
async def test_repeat_whose_deadline_is_too_near_begins_no_other_attempt(is_claimed: bool) -> None:
    gateway = bench(CAPABLE, UNSENT)
    await gateway.payments.authorize(gateway.authorize())
    if is_claimed:
        await gateway.claims.claim(MERCHANT, "a", b"")  # of another repeat, which has died
    deadline = time.monotonic() + LIMITS.min_send_budget_s / 2
    again = gateway.payments.authorize(gateway.authorize(deadline=deadline))
    await refused(Reason.DEADLINE_TOO_SHORT, again)
    assert gateway.store.by_key("a").attempt.number == 1
    assert gateway.connector.sent == []


async def test_follow_up_whose_deadline_is_too_near_writes_nothing() -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    deadline = time.monotonic() + LIMITS.min_send_budget_s / 2
    command = gateway.capture(payment_id)
    command.deadline = deadline
    await refused(Reason.DEADLINE_TOO_SHORT, gateway.payments.capture(command))
    assert operations_of(gateway, payment_id, K.CAPTURE) == []


async def test_intent_that_outlasts_the_deadline_is_not_sent() -> None:
    gateway = bench()
    command = gateway.authorize(deadline=time.monotonic() + 60)

    async def outlast(method: str) -> None:
        if method == "write_intent":
            command.deadline = time.monotonic() + LIMITS.min_send_budget_s

    gateway.store.after = outlast
    answer = await gateway.payments.authorize(command)
    assert b"NOT_SENT" in answer.response
    assert gateway.store.by_key("a").reason == Reason.DEADLINE_TOO_SHORT
    assert gateway.connector.sent == []


@pytest.mark.parametrize("deadline_s", [None, 3600.0])
async def test_intent_that_took_longer_than_the_send_window_is_not_sent(
    deadline_s: float | None,
) -> None:
    gateway = bench(limits=replace(LIMITS, send_window_s=0.0))
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    await gateway.payments.authorize(gateway.authorize(deadline=deadline))
    assert gateway.store.by_key("a").reason == Reason.SEND_WINDOW_PASSED
    assert gateway.connector.sent == []


@pytest.mark.parametrize("deadline_s", [None, 2.0, 3600.0])
async def test_request_is_sent_within_its_window_and_its_callers_time(
    deadline_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    class Noting(ScriptedConnector):
        async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
            told.append(send_before)
            return await super().send(request, send_before)

    gateway, clock = Bench(Noting()), Clock(monkeypatch)
    deadline = None if deadline_s is None else clock.now_s + deadline_s
    await gateway.payments.authorize(gateway.authorize(deadline=deadline))
    left_s = math.inf if deadline_s is None else deadline_s - LIMITS.min_send_budget_s
    assert told == [clock.now_s + min(LIMITS.send_window_s, left_s)]


async def test_what_only_the_psp_may_see_goes_with_the_callers_own_sending() -> None:
    gateway = bench()
    command = gateway.authorize()
    command.secrets = {"number": "4000000000000002", "cryptogram": "c"}
    await gateway.payments.authorize(command)
    [request] = gateway.connector.sent
    assert request.secrets == command.secrets


async def test_refusal_for_overload_reads_nothing() -> None:
    gateway = bench()
    called: list[str] = []

    async def overloaded(method: str) -> None:
        await asyncio.sleep(0)
        called.append(method)
        if method == "write_intent":
            raise GatewayError(Reason.OVERLOADED, "later", retry_after_s=1)

    gateway.store.before = overloaded
    await refused(Reason.OVERLOADED, gateway.payments.authorize(gateway.authorize()))
    assert called == ["write_intent"]


# --- callers that wait or go ----------------------------------------------------------------------


async def test_cancelled_caller_leaves_the_work_to_be_finished() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert gateway.payments.in_flight == 1
    gate.opened.set()
    await gateway.payments.drain()
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.payments.in_flight == 0


class Places:
    """Implements Occupancy: writes down what the calls do."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stages: list[tuple[Stage, float]] = []

    def leave(self, merchant_id: str) -> None:
        self.done.append(f"leave {merchant_id}")

    def come_back(self, merchant_id: str) -> None:
        self.done.append(f"come back {merchant_id}")

    def carry(self, merchant_id: str) -> None:
        self.done.append(f"carry {merchant_id}")

    def release(self, merchant_id: str) -> None:
        self.done.append(f"release {merchant_id}")

    def passed(self, stage: Stage, seconds: float) -> None:
        self.stages.append((stage, seconds))


def watched(*steps: Step) -> tuple[Bench, Places]:
    """A gateway, and what its calls do at the door."""
    places, gateway = Places(), bench(CAPABLE, *steps)
    gateway.payments = Payments(
        gateway.store,
        gateway.claims,
        gateway.router,
        JsonEncoder(),
        LIMITS,
        gateway.counts,
        places,
    )
    return gateway, places


async def test_a_call_gives_its_place_up_while_its_psp_is_asked() -> None:
    gate = Gate()
    gateway, places = watched(Step(before=gate))
    began = time.monotonic()
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    assert places.done == [f"leave {MERCHANT}"]
    gate.opened.set()
    await call
    assert gateway.counts.calls == 1
    passed = time.monotonic() - began
    assert places.done == [f"leave {MERCHANT}", f"come back {MERCHANT}"]
    assert [stage for stage, _ in places.stages] == [Stage.CLAIM, Stage.INTENT, Stage.OUTCOME]
    assert all(0 <= seconds <= passed for _, seconds in places.stages)


async def test_a_duplicate_gives_its_place_up_while_it_waits() -> None:
    gate = Gate()
    gateway, places = watched(Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    again = in_background(gateway.payments.authorize(gateway.authorize()))
    await waiters(gateway, 1)
    assert places.done == [f"leave {MERCHANT}"] * 2
    gate.opened.set()
    await asyncio.gather(call, again)
    assert places.done[2:] == [f"come back {MERCHANT}"] * 2


async def test_a_call_whose_caller_has_gone_is_carried_to_its_end() -> None:
    gate = Gate()
    gateway, places = watched(Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert places.done == [f"leave {MERCHANT}", f"carry {MERCHANT}"]
    gate.opened.set()
    await gateway.payments.drain()
    assert places.done[2:] == [f"come back {MERCHANT}", f"release {MERCHANT}"]


@pytest.mark.parametrize("error", [StoreUnavailable("away"), ValueError("a defect")])
async def test_a_defect_in_a_call_whose_caller_has_gone_is_logged(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async def broken(method: str) -> None:
        await asyncio.sleep(0)
        if method == "write_change":
            raise error

    gateway.store.before = broken
    gate.opened.set()
    await gateway.payments.drain()
    is_defect = isinstance(error, ValueError)
    told = ["a call that went on without its caller failed"] if is_defect else []
    assert [record.getMessage() for record in caplog.records] == told
    assert all(record.exc_info for record in caplog.records)


async def test_work_of_a_task_of_its_own_begins_no_other_and_is_waited_for() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    command = gateway.authorize()
    command.item = True
    call = in_background(gateway.payments.authorize(command))
    await gate.reached.wait()
    assert asyncio.all_tasks() == {asyncio.current_task(), call}
    assert gateway.payments.in_flight == 1
    draining = asyncio.ensure_future(gateway.payments.drain())
    gate.opened.set()
    await draining
    assert call.done()
    assert gateway.payments.in_flight == 0


async def test_caller_does_not_outwait_work_that_was_cancelled() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    [work] = asyncio.all_tasks() - {asyncio.current_task(), call}
    work.cancel()
    async with asyncio.timeout(60):
        with pytest.raises(asyncio.CancelledError):
            await call
    assert gateway.payments.in_flight == 0


async def test_item_is_waited_for_to_its_end_though_its_new_attempt_is_refused() -> None:
    gateway = bench(CAPABLE, UNSENT)
    await gateway.payments.authorize(gateway.authorize())
    in_flight: list[int] = []

    async def lose_the_route(method: str) -> None:
        if method == "find_by_key":
            in_flight.append(gateway.payments.in_flight)
            gateway.router.only = None  # type: ignore[union-attr]

    gateway.store.before = lose_the_route
    command = gateway.authorize()
    command.item = True
    await refused(Reason.CONNECTOR_UNAVAILABLE, gateway.payments.authorize(command))
    assert len(in_flight) > 1
    assert set(in_flight) == {1}
    assert gateway.payments.in_flight == 0


async def test_failure_in_the_turn_of_its_callers_cancellation_is_nobodys_surprise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    told: list[str] = []
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    gateway = bench(CAPABLE)

    async def write_intent(_: Intent) -> IntentResult:
        # In the next turn: after the work has ended, and before its caller has heard of it.
        loop.call_soon(calls[0].cancel)
        raise StoreUnavailable("away")

    monkeypatch.setattr(gateway.store, "write_intent", write_intent)
    calls = [in_background(gateway.payments.authorize(gateway.authorize()))]
    await asyncio.wait(calls)
    assert calls.pop().cancelled()  # and gone, with its frames, which hold the work
    assert gateway.payments.in_flight == 0
    gc.collect()
    assert told == []


async def test_cancelled_duplicate_does_not_disturb_the_first_call() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    first = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    waiting = in_background(gateway.payments.authorize(gateway.authorize()))
    await waiters(gateway, 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.opened.set()
    assert b"SUCCEEDED" in (await first).response
    await gateway.payments.drain()
    assert gateway.payments._waiting == {}


async def test_waiters_of_one_key_are_limited() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate), limits=replace(LIMITS, waiters_per_key_max=3))
    calls = [in_background(gateway.payments.authorize(gateway.authorize()))]
    await gate.reached.wait()
    calls += [in_background(gateway.payments.authorize(gateway.authorize())) for _ in range(3)]
    await waiters(gateway, 3)
    error = await refused(
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT, gateway.payments.authorize(gateway.authorize())
    )
    assert error.retry_after_s
    gate.opened.set()
    assert len({answer.response for answer in await asyncio.gather(*calls)}) == 1


async def test_duplicate_gives_up_before_its_deadline() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    deadline = time.monotonic() + 2 * LIMITS.wait_margin_s
    await refused(
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT,
        gateway.payments.authorize(gateway.authorize(deadline=deadline)),
    )
    gate.opened.set()
    await call


class Clock:
    """The use cases' monotonic clock, which their pauses alone move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = time.monotonic()
        self.pauses_s: list[float] = []
        monkeypatch.setattr(usecases, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        paused = SimpleNamespace(**{**vars(asyncio), "sleep": self._sleep})
        monkeypatch.setattr(usecases, "asyncio", paused)

    async def _sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize("deadline_s", [None, 1.0, 2 * LIMITS.wait_s_max])
async def test_duplicate_waits_as_long_as_it_may_and_its_deadline_lets_it(
    deadline_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    clock = Clock(monkeypatch)
    deadline = None if deadline_s is None else clock.now_s + deadline_s
    until = clock.now_s + LIMITS.wait_s_max
    if deadline is not None:
        until = min(until, deadline - LIMITS.wait_margin_s)
    await refused(
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT,
        gateway.payments.authorize(gateway.authorize(deadline=deadline)),
    )
    longest_s = LIMITS.wait_poll_s_max
    assert until - longest_s <= clock.now_s < until + 0.2 * longest_s
    for number, pause_s in enumerate(clock.pauses_s):
        usual_s = min(LIMITS.wait_poll_s_min * 2 ** min(number, 10), longest_s)
        assert 0.8 * usual_s <= pause_s <= 1.2 * usual_s
    gate.opened.set()
    await call


# --- contention and a store that is away ----------------------------------------------------------


async def test_racing_captures_never_exceed_the_authorized_amount() -> None:
    gateway = bench()
    payment_id = await gateway.authorized(100)
    calls = [
        gateway.payments.capture(gateway.capture(payment_id, f"c{number}", 10))
        for number in range(25)
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    reasons = {result.reason for result in results if isinstance(result, GatewayError)}
    assert reasons == {Reason.AMOUNT_EXCEEDS_AUTHORIZED}
    assert len([sent for sent in gateway.connector.sent if sent.kind is K.CAPTURE]) == 10
    assert gateway.store.of_payment(payment_id).payment.captured_minor == 100


@pytest.mark.parametrize("is_repeat", [False, True])
async def test_call_begins_anew_a_limited_number_of_times_and_takes_one_probes_place(
    is_repeat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector, admitted, given_back = ScriptedConnector(), [], []

    class Open:
        """Implements Availability: everything is."""

        def refusal(self, candidate: Candidate, method: str) -> None:
            """See the port."""

        def admit(self, candidate: Candidate, method: str) -> None:
            admitted.append(method)

        def give_back(self, candidate: Candidate, method: str, seconds: float) -> None:
            given_back.append(method)

        def pause_s(self, candidate: Candidate, method: str) -> None:
            """See the port."""

    routing = Routing(OneRoute(connector), availability=Open())
    gateway = Bench(connector, routing=routing)
    payment_id = await gateway.authorized()
    if is_repeat:
        connector.steps.append(UNSENT)
        await gateway.payments.capture(gateway.capture(payment_id))
        await gateway.claims.claim(MERCHANT, "c", b"")  # of another repeat, which has died
    admitted.clear()

    async def change(method: str) -> None:
        await asyncio.sleep(0)
        if method in ("write_intent", "write_change"):
            gateway.store.payments[MERCHANT, payment_id].version += 1

    gateway.store.before = change
    clock = Clock(monkeypatch)
    await refused(Reason.CONTENTION, gateway.payments.capture(gateway.capture(payment_id)))
    assert admitted == given_back == [""]
    assert len(clock.pauses_s) == LIMITS.contention_tries_max
    for number, pause_s in enumerate(clock.pauses_s):
        assert 0 <= pause_s <= 0.001 * min(number + 1, 20)


async def test_payment_that_changes_all_the_time_is_contention() -> None:
    gateway = bench(limits=replace(LIMITS, contention_tries_max=3))
    payment_id = await gateway.authorized()

    async def change(method: str) -> None:
        await asyncio.sleep(0)
        if method == "write_intent":
            payment = gateway.store.payments[MERCHANT, payment_id]
            payment.version += 1

    gateway.store.before = change
    error = await refused(Reason.CONTENTION, gateway.payments.capture(gateway.capture(payment_id)))
    assert error.retry_after_s
    assert operations_of(gateway, payment_id, K.CAPTURE) == []


async def test_operation_is_tried_a_limited_number_of_times() -> None:
    limits = replace(LIMITS, attempts_per_operation_max=3)
    gateway = bench(CAPABLE, UNSENT, UNSENT, UNSENT, limits=limits)
    for number in (1, 2, 3):
        await gateway.payments.authorize(gateway.authorize())
        assert gateway.store.by_key("a").attempt.number == number
    refusal = await refused(
        Reason.TOO_MANY_ATTEMPTS, gateway.payments.authorize(gateway.authorize())
    )
    assert refusal.metadata == {"attempts": "3"}
    assert gateway.store.by_key("a").state is S.NOT_SENT


async def test_payment_takes_a_limited_number_of_operations() -> None:
    gateway = bench(limits=replace(LIMITS, operations_per_payment_max=2))
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 10))
    await refused(
        Reason.TOO_MANY_OPERATIONS, gateway.payments.capture(gateway.capture(payment_id, "c2", 10))
    )


async def test_intent_that_could_not_be_written_is_not_sent() -> None:
    gateway = bench()
    gateway.store.before = failing("write_intent")
    await refused(Reason.STORE_UNAVAILABLE, gateway.payments.authorize(gateway.authorize()))
    assert gateway.connector.sent == []
    assert not (await gateway.payments.authorize(gateway.authorize())).replayed


async def test_intent_whose_commit_was_lost_is_settled_by_recovery_before_a_repeat() -> None:
    gateway = bench()
    gateway.store.after = failing("write_intent")
    await refused(Reason.STORE_UNAVAILABLE, gateway.payments.authorize(gateway.authorize()))
    assert gateway.store.by_key("a").state is S.PROCESSING
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.NOT_SENT
    await gateway.payments.authorize(gateway.authorize())
    assert len(gateway.connector.standing(K.AUTHORIZE)) == 1


async def test_outcome_that_could_not_be_written_is_found_by_recovery() -> None:
    gateway = bench()
    gateway.store.before = failing("write_change")
    await refused(Reason.STORE_UNAVAILABLE, gateway.payments.authorize(gateway.authorize()))
    assert gateway.counts.lost == 1
    await gateway.recover()
    answer = await gateway.payments.authorize(gateway.authorize())
    assert b"SUCCEEDED" in answer.response
    assert len(gateway.connector.sent) == 1


# --- recovery: doubts -----------------------------------------------------------------------------


async def test_recovery_leaves_a_sender_its_time() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    gateway.store.advance(TAKEOVER_S - 1)
    assert await gateway.recovery.run_once() == 0
    gate.opened.set()
    await call


async def test_dead_senders_are_searched_at_intervals_and_at_once_while_there_are_more() -> None:
    store = MemoryStore()
    searches = []

    async def expired(limit: int) -> int:
        searches.append(limit)
        return found.pop()

    store.expired = expired  # type: ignore[method-assign]
    recovery = Bench(store=store, schedule=replace(SCHEDULE, search_interval_s=math.inf)).recovery
    most = SCHEDULE.batch_max
    found = [most - 1, most, most]
    for _ in range(5):
        await recovery.run_once()
    assert searches == [most] * 3


async def test_doubt_that_took_effect_is_found_by_query() -> None:
    gateway = bench(CAPABLE, LOST)
    await gateway.payments.authorize(gateway.authorize())
    assert gateway.store.by_key("a").state is S.IN_DOUBT
    gateway.store.advance(FIRST_CHECK_S)
    assert await gateway.recovery.run_once() == 1
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.store.doubts == {}


@pytest.mark.parametrize("capabilities", [CAPABLE, NON_IDEMPOTENT, CANCEL_ONLY])
async def test_doubt_that_the_psp_does_not_know_is_cancelled_before_it_is_not_sent(
    capabilities: Capabilities,
) -> None:
    gateway = bench(capabilities, DROPPED)
    await gateway.payments.authorize(gateway.authorize())
    await gateway.recover()
    operation = gateway.store.by_key("a")
    assert operation.state is S.NOT_SENT
    assert gateway.connector.canceled == {operation.reference}


async def test_doubt_at_a_psp_that_can_only_cancel_is_taken_back() -> None:
    gateway = bench(CANCEL_ONLY, LOST)
    await gateway.payments.authorize(gateway.authorize())
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.CANCELED
    assert gateway.connector.standing(K.AUTHORIZE) == []


@pytest.mark.parametrize("step", [LOST, DROPPED])
async def test_doubt_that_nobody_can_settle_stays(step: Step) -> None:
    gateway = bench(INCAPABLE, step)
    answer = await gateway.payments.authorize(gateway.authorize())
    await gateway.recover(rounds=5)
    assert gateway.store.by_key("a").state is S.IN_DOUBT
    assert len(gateway.store.doubts) == 1
    repeated = await gateway.payments.authorize(gateway.authorize())
    assert repeated.payment_id == answer.payment_id
    assert len(gateway.connector.sent) == (1 if step is LOST else 0)


async def test_not_found_without_a_cancellation_proves_nothing() -> None:
    gateway = bench(QUERY_ONLY, DROPPED)
    await gateway.payments.authorize(gateway.authorize())
    await gateway.recover(rounds=3)
    assert gateway.store.by_key("a").state is S.IN_DOUBT


async def test_psp_that_does_not_answer_recovery_leaves_the_doubt() -> None:
    gateway = bench(CAPABLE, LOST)
    await gateway.payments.authorize(gateway.authorize())
    gateway.connector.asks.extend([NO_ANSWER, NO_ANSWER])
    await gateway.recover(rounds=2)
    assert gateway.store.by_key("a").state is S.IN_DOUBT
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.SUCCEEDED


async def test_a_doubt_needs_a_person_after_so_many_looks_and_is_never_guessed() -> None:
    doubtful = bench(CAPABLE, LOST)
    schedule = replace(SCHEDULE, tries_max=3, person_interval_s=100_000.0)
    gateway = Bench(doubtful.connector, store=doubtful.store, schedule=schedule)
    await gateway.payments.authorize(gateway.authorize())
    store = gateway.store
    gateway.connector.asks.extend([NO_ANSWER] * 8)
    [doubt] = store.doubts.values()
    for _ in range(2):
        await gateway.recover()
        assert (doubt.needs_person, doubt.cause) == (False, DoubtCause.NO_ANSWER)
    await gateway.recover()
    assert doubt.needs_person
    assert (doubt.check_at - store.now).total_seconds() == 100_000.0
    tries = doubt.tries
    await gateway.recover(rounds=5)
    assert doubt.tries == tries
    # Now and then it is still asked for, and an answer ends it.
    store.advance(100_000.0)
    await gateway.recover()
    assert doubt.tries == tries + 1
    assert store.by_key("a").state is S.IN_DOUBT
    gateway.connector.asks.clear()
    store.advance(100_000.0)
    await gateway.recover()
    assert store.by_key("a").state is S.SUCCEEDED
    assert store.doubts == {}


@pytest.mark.parametrize("tries", [20, 100_000])
async def test_the_pauses_between_looks_at_a_doubt_or_a_void_do_not_grow_beyond_their_longest(
    tries: int,
) -> None:
    gateway = bench(CAPABLE, LOST, Step(), Step(decides=PENDING))
    await gateway.payments.authorize(gateway.authorize("doubt"))
    payment_id = await gateway.authorized()
    await gateway.payments.void(gateway.void(payment_id))
    gateway.connector.asks.extend([NO_ANSWER, PENDING])
    for row in gateway.store.doubts.values():
        row.tries = tries
    schedule = replace(SCHEDULE, tries_max=tries + 2)
    again = Bench(gateway.connector, store=gateway.store, schedule=schedule)
    await again.recover()
    assert {gateway.store.by_key(key).state for key in ("doubt", "v")} == {S.IN_DOUBT, S.PENDING}
    for row in gateway.store.doubts.values():
        pause = row.check_at - gateway.store.now
        assert 0.8 * BACKOFF_S_MAX <= pause.total_seconds() <= 1.2 * BACKOFF_S_MAX


async def test_a_doubt_at_a_psp_that_can_be_asked_nothing_needs_a_person_at_once() -> None:
    gateway = bench(INCAPABLE, LOST)
    await gateway.payments.authorize(gateway.authorize())
    await gateway.recover()
    [doubt] = gateway.store.doubts.values()
    assert (doubt.needs_person, doubt.cause) == (True, DoubtCause.NO_MEANS)


@pytest.mark.parametrize(
    ("capabilities", "cause"),
    [
        (QUERY_ONLY, DoubtCause.NO_ANSWER),
        (CANCEL_ONLY, DoubtCause.NO_ANSWER),
        (None, DoubtCause.CONNECTOR_MISSING),
    ],
)
async def test_a_doubt_at_a_psp_that_may_yet_tell_needs_nobody_at_first(
    capabilities: Capabilities | None, cause: DoubtCause
) -> None:
    gateway = bench(capabilities or INCAPABLE, LOST)
    await gateway.payments.authorize(gateway.authorize())
    if capabilities is None:
        router = gateway.router
        assert isinstance(router, OneRoute)
        router.only = None
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.recover()
    [doubt] = gateway.store.doubts.values()
    assert (doubt.needs_person, doubt.cause) == (False, cause)


async def test_an_automatic_capture_is_told_beside_its_authorization() -> None:
    gateway = bench(CAPABLE, Step(decides=APPROVED))
    await gateway.payments.authorize(gateway.authorize("a", 100, AUTOMATIC))
    [(first, version), (second, same_version)] = gateway.store.events
    assert (first, second) == ("authorize.succeeded", "capture.succeeded")
    assert version == same_version


async def test_pending_outcome_is_finished_by_query_and_never_cancelled() -> None:
    gateway = bench(CAPABLE, Step(decides=PENDING))
    await gateway.payments.authorize(gateway.authorize())
    await gateway.recover(rounds=2)
    operation = gateway.store.by_key("a")
    assert operation.state is S.PENDING
    gateway.connector.asks.append(None)
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.PENDING
    assert gateway.connector.canceled == set()
    gateway.connector.effects[operation.reference].answer = APPROVED
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.SUCCEEDED


@pytest.mark.parametrize("first", [PENDING, answered(Verdict.REQUIRES_ACTION)])
async def test_first_answer_stays_the_one_that_repeats_get_when_the_end_is_known(
    first: ConnectorAnswer,
) -> None:
    gateway = bench(CAPABLE, Step(decides=first))
    answer = await gateway.payments.authorize(gateway.authorize())
    reference = gateway.store.by_key("a").reference
    gateway.connector.effects[reference].answer = APPROVED
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    gateway.claims.flush()
    again = await gateway.payments.authorize(gateway.authorize())
    assert (again.response, again.replayed, again.frozen) == (answer.response, True, True)


@pytest.mark.parametrize("kind", [K.CAPTURE, K.REFUND, K.VOID, K.INCREMENT])
@pytest.mark.parametrize("step", [LOST, DROPPED])
async def test_every_follow_up_in_doubt_becomes_definite(kind: OperationKind, step: Step) -> None:
    gateway = bench(NON_IDEMPOTENT)
    payment_id = await gateway.authorized()
    payments = gateway.payments
    if kind is K.REFUND:
        await payments.capture(gateway.capture(payment_id))
    gateway.connector.steps.append(step)
    match kind:
        case K.CAPTURE:
            await payments.capture(gateway.capture(payment_id, "k"))
        case K.REFUND:
            await payments.refund(gateway.refund(payment_id, "k"))
        case K.VOID:
            await payments.void(gateway.void(payment_id, "k"))
        case _:
            await payments.increment(gateway.increment(payment_id, 50, "k"))
    assert gateway.store.by_key("k").state is S.IN_DOUBT
    await gateway.recover()
    operation = gateway.store.by_key("k")
    # A void releases money: it is sent again. Everything else is only asked for.
    wanted = S.SUCCEEDED if step is LOST or kind is K.VOID else S.NOT_SENT
    assert operation.state is wanted
    assert gateway.connector.standing(kind) == (
        [operation.reference] if wanted is S.SUCCEEDED else []
    )
    assert gateway.store.doubts == {}


async def test_two_recoverers_settle_a_doubt_once() -> None:
    gateway = bench(CAPABLE, LOST)
    second = Bench(gateway.connector, store=gateway.store, claims=gateway.claims)
    await gateway.payments.authorize(gateway.authorize())
    gateway.store.advance(LONG_S)
    await asyncio.gather(gateway.recovery.run_once(), second.recovery.run_once())
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert [event for event, _ in gateway.store.events].count("authorize.succeeded") == 1


# --- recovery: senders that were fenced out -------------------------------------------------------


async def paused(gateway: Bench, gate: Gate) -> asyncio.Task[Answer]:
    """A call whose sender stands still at a gate, so that its time is over."""
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    gateway.store.advance(LONG_S)
    return call


async def take_over(gateway: Bench) -> Sequence[Lease]:
    """What a recoverer takes over now; a test says what becomes of it."""
    await gateway.store.expired(SCHEDULE.batch_max)
    return await gateway.store.lease(SCHEDULE.batch_max, SCHEDULE.lease_s)


async def test_sender_that_wakes_after_its_reference_was_cancelled_charges_nothing() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.NOT_SENT
    gate.opened.set()
    assert b"NOT_SENT" in (await call).response
    assert gateway.connector.standing(K.AUTHORIZE) == []
    again = await gateway.payments.authorize(gateway.authorize())
    assert b"SUCCEEDED" in again.response
    assert len(gateway.connector.standing(K.AUTHORIZE)) == 1


async def test_sender_that_wakes_after_recovery_found_its_success_changes_nothing() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate))
    call = await paused(gateway, gate)
    gateway.connector.asks.append(APPROVED)
    await gateway.recovery.run_once()
    found = gateway.store.by_key("a")
    assert found.state is S.SUCCEEDED
    gate.opened.set()
    assert (await call).response == found.response
    assert [each.kind for each in gateway.store.operations.values()] == [K.AUTHORIZE]
    assert gateway.store.discrepancies == []


async def test_sender_that_was_fenced_out_is_told_the_answer_that_repeats_get() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate))
    call = await paused(gateway, gate)
    gateway.connector.asks.extend([PENDING, APPROVED])
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.PENDING
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    gate.opened.set()
    answer = await call
    assert (answer.replayed, answer.first_request_id) == (False, "")
    gateway.claims.flush()
    again = await gateway.payments.authorize(gateway.authorize())
    assert (again.response, again.replayed) == (answer.response, True)


@pytest.mark.parametrize("is_configured", [True, False])
async def test_success_found_after_its_reference_was_taken_back_is_reversed(
    is_configured: bool,
) -> None:
    gate = Gate()
    gateway = bench(CANCEL_ONLY, Step(after=gate))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.CANCELED
    if not is_configured:
        gateway.router.only = None  # type: ignore[union-attr]
    gate.opened.set()
    payment_id = (await call).payment_id
    assert len(operations_of(gateway, payment_id, K.REVERSAL)) == 1


async def test_answer_of_a_sender_that_was_fenced_out_is_kept_as_evidence() -> None:
    gate = Gate()
    gateway = bench(INCAPABLE, Step(after=gate))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.IN_DOUBT
    gate.opened.set()
    assert b"IN_DOUBT" in (await call).response
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.store.doubts == {}


async def test_answer_of_a_sender_is_kept_though_recovery_takes_the_doubt_meanwhile() -> None:
    gate = Gate()
    gateway = bench(INCAPABLE, Step(after=gate))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    looks = 0

    async def take_at_first(method: str) -> None:
        nonlocal looks
        if method == "add_evidence":
            looks += 1
            if looks == 1:
                gateway.store.advance(LONG_S)
                await gateway.store.lease(10, LEASE_S)

    gateway.store.before = take_at_first
    gate.opened.set()
    await call
    assert looks == 2
    [doubt] = gateway.store.doubts.values()
    assert doubt.evidence is not None
    assert doubt.evidence.verdict is Verdict.APPROVED


async def test_recoverer_that_was_overtaken_while_it_asked_cancels_nothing() -> None:
    gateway = bench(CAPABLE, LOST)
    payment_id = await gateway.authorized()
    other = Bench(gateway.connector, store=gateway.store, claims=gateway.claims)
    ask = gateway.connector.query

    async def ask_before_it_arrives(
        kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer | None:
        gateway.connector.query = ask  # type: ignore[method-assign]
        await other.recover()
        return None

    gateway.connector.query = ask_before_it_arrives  # type: ignore[method-assign]
    await gateway.recover()
    [authorization] = operations_of(gateway, payment_id, K.AUTHORIZE)
    assert authorization.state is S.SUCCEEDED
    assert gateway.connector.standing(K.AUTHORIZE) == [authorization.reference]


async def test_what_recovery_has_begun_to_cancel_is_settled_by_a_cancellation_only() -> None:
    gateway = bench(CAPABLE, LOST)
    payment_id = await gateway.authorized()
    # Not found yet, and the answer to the cancellation is lost: it may arrive at any later time.
    gateway.connector.asks.extend([None, NO_ANSWER])
    await gateway.recover(rounds=2)
    [authorization] = operations_of(gateway, payment_id, K.AUTHORIZE)
    assert authorization.state is S.CANCELED
    assert gateway.connector.standing(K.AUTHORIZE) == []


async def test_a_doubt_is_asked_about_by_the_id_that_a_late_answer_told() -> None:
    gate = Gate()
    gateway = bench(QUERY_ONLY, Step(after=gate, decides=PENDING))
    call = await paused(gateway, gate)
    gateway.connector.asks.extend([NO_ANSWER, NO_ANSWER])
    await gateway.recovery.run_once()
    gate.opened.set()
    await call
    await gateway.recover()
    ids = [each and each.target_transaction_id for each in gateway.connector.asked_with]
    assert ids == ["", f"tx-{gateway.store.by_key('a').reference}"]


async def test_a_cancellation_is_a_repeat_once_one_was_begun() -> None:
    gateway = bench(CAPABLE, LOST)
    await gateway.payments.authorize(gateway.authorize())
    # No answer to the question; then not found, and no answer to the cancellation.
    gateway.connector.asks.extend([NO_ANSWER, None, NO_ANSWER])
    await gateway.recover(rounds=3)
    assert gateway.store.by_key("a").state is S.CANCELED
    cancellations = gateway.connector.asked_with[2:]
    assert [each and each.is_repeat for each in cancellations] == [False, True]


async def test_evidence_of_pending_does_not_keep_recovery_from_asking_later() -> None:
    gate = Gate()
    gateway = bench(QUERY_ONLY, Step(after=gate, decides=PENDING))
    call = await paused(gateway, gate)
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.recovery.run_once()
    gate.opened.set()
    await call
    await gateway.recover()
    operation = gateway.store.by_key("a")
    assert operation.state is S.PENDING
    gateway.connector.effects[operation.reference].answer = DECLINED
    await gateway.recover(rounds=2)
    assert gateway.store.by_key("a").state is S.DECLINED


async def test_what_was_begun_to_be_cancelled_is_an_attempt_and_not_the_next_one() -> None:
    gate = Gate()
    unsent = Step(arrives=False, answer=UNSENT.answer, after=gate)
    gateway = bench(CAPABLE, unsent, Step(decides=PENDING))
    call = await paused(gateway, gate)
    cancel = gateway.connector.cancel

    async def cancel_while_the_sender_answers(
        kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer:
        gate.opened.set()
        await call
        return await cancel(kind, reference, request)

    gateway.connector.cancel = cancel_while_the_sender_answers  # type: ignore[method-assign]
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.NOT_SENT
    assert b"PENDING" in (await gateway.payments.authorize(gateway.authorize())).response
    await gateway.recover(rounds=2)
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.attempt.number) == (S.PENDING, 2)


async def test_evidence_of_a_success_does_not_outweigh_a_cancellation_after_it() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate))
    call = await paused(gateway, gate)
    # A recoverer took it over, cancelled it at the PSP, and died before it could write that.
    [lease] = await take_over(gateway)
    await gateway.connector.cancel(K.AUTHORIZE, lease.operation.reference)
    gate.opened.set()
    await call
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.CANCELED
    assert gateway.connector.standing(K.AUTHORIZE) == []


async def test_evidence_of_a_success_does_not_outweigh_a_cancellation_whose_psp_is_missing() -> (
    None
):
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate))
    call = await paused(gateway, gate)
    # Not found, and the answer to its cancellation is lost.
    gateway.connector.asks.extend([None, NO_ANSWER])
    await gateway.recovery.run_once()
    gate.opened.set()
    await call
    router = gateway.router
    assert isinstance(router, OneRoute)
    router.only = None  # as while an account's credentials cannot be opened
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.IN_DOUBT
    router.only = gateway.connector
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.CANCELED


async def test_a_late_refusal_ends_what_was_being_cancelled_though_its_psp_is_missing() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate, decides=DECLINED))
    call = await paused(gateway, gate)
    gateway.connector.asks.extend([None, NO_ANSWER])
    await gateway.recovery.run_once()
    gate.opened.set()
    await call
    router = gateway.router
    assert isinstance(router, OneRoute)
    router.only = None
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.DECLINED


async def test_a_late_success_does_not_end_what_was_begun_to_be_cancelled() -> None:
    gate = Gate()
    gateway = bench(CANCEL_ONLY, Step(after=gate))
    call = await paused(gateway, gate)
    gateway.connector.asks.append(NO_ANSWER)  # to the cancellation, which may have arrived
    await gateway.recovery.run_once()
    gate.opened.set()
    await call
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.CANCELED
    assert gateway.connector.standing(K.AUTHORIZE) == []


async def test_what_the_psp_does_not_take_back_has_taken_effect() -> None:
    gateway = bench(CAPABLE, LOST)
    payment_id = await gateway.authorized()
    # Not found yet, so it is cancelled; it has arrived since, and something rests on it.
    gateway.connector.asks.extend([None, APPROVED])
    await gateway.recover()
    [authorization] = operations_of(gateway, payment_id, K.AUTHORIZE)
    assert authorization.state is S.SUCCEEDED
    assert gateway.store.doubts == {}


async def test_what_the_psp_will_take_back_stands_until_it_did() -> None:
    gateway = bench(CAPABLE, LOST)
    payment_id = await gateway.authorized()
    gateway.connector.asks.extend([None, PENDING])
    await gateway.recover()
    [authorization] = operations_of(gateway, payment_id, K.AUTHORIZE)
    assert authorization.state is S.IN_DOUBT
    await gateway.recover()
    [authorization] = operations_of(gateway, payment_id, K.AUTHORIZE)
    assert authorization.state is S.CANCELED


@pytest.mark.parametrize("capabilities", [CAPABLE, CANCEL_ONLY])
async def test_hold_that_comes_back_to_a_closed_payment_is_released_until_the_psp_confirms(
    capabilities: Capabilities,
) -> None:
    gateway = bench(capabilities)
    payment_id = await gateway.authorized()
    gateway.connector.steps.append(LOST)
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 30))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 40, final=True))
    if capabilities.query_by_reference:
        gateway.connector.asks.append(None)  # it is not found yet, and cancelled
    await gateway.recover()
    [release] = operations_of(gateway, payment_id, K.VOID)
    assert gateway.store.by_key("c1").state is S.CANCELED
    assert (release.amount_minor, release.state) == (60, S.PROCESSING)
    gateway.connector.steps.append(UNSENT)
    await gateway.recover(rounds=3)
    [release] = operations_of(gateway, payment_id, K.VOID)
    assert release.state is S.SUCCEEDED
    assert gateway.connector.standing(K.VOID) == [release.reference]
    assert gateway.store.doubts == {}
    amounts = gateway.store.of_payment(payment_id).payment
    assert (amounts.captured_minor, amounts.voided_minor) == (40, 60)


async def test_release_that_is_refused_stays_open() -> None:
    gateway = bench(CANCEL_ONLY)
    payment_id = await gateway.authorized()
    refusal = Step(answered(Verdict.FAILED), arrives=False)
    gateway.connector.steps.extend([LOST, Step(), refusal])
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 30))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 40, final=True))
    await gateway.recover(rounds=2)
    [release] = operations_of(gateway, payment_id, K.VOID)
    assert release.state is S.IN_DOUBT
    await gateway.recover()
    [release] = operations_of(gateway, payment_id, K.VOID)
    assert release.state is S.SUCCEEDED


@pytest.mark.parametrize("took_effect", [True, False])
async def test_release_waits_for_the_final_capture_and_is_dropped_where_that_has_no_effect(
    took_effect: bool,
) -> None:
    gateway = bench(CANCEL_ONLY)
    payment_id = await gateway.authorized()
    gateway.connector.steps.extend([LOST, Step(decides=PENDING)])
    await gateway.payments.capture(gateway.capture(payment_id, "c1", 30))
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 40, final=True))
    await gateway.recover(rounds=2)
    [release] = operations_of(gateway, payment_id, K.VOID)
    assert (gateway.store.by_key("c2").state, release.state) == (S.PENDING, S.PENDING)
    doubt = gateway.store.doubts[MERCHANT, release.operation_id]
    doubt.tries = TRIES_MAX
    await gateway.recover()
    assert (doubt.needs_person, doubt.cause) == (False, DoubtCause.WAITS_FOR_OPERATION)
    final = gateway.store.by_key("c2")
    payment = gateway.store.of_payment(payment_id).payment
    answer = APPROVED if took_effect else DECLINED
    await gateway.payments.outcomes.write(final, payment, answer)
    await gateway.recover()
    [release] = operations_of(gateway, payment_id, K.VOID)
    sent = [release.reference] if took_effect else []
    assert release.state is (S.SUCCEEDED if took_effect else S.CANCELED)
    assert gateway.connector.standing(K.VOID) == sent
    if not took_effect:
        await gateway.payments.capture(gateway.capture(payment_id, "c3", 100))
        assert gateway.store.by_key("c3").state is S.SUCCEEDED


async def test_release_waits_for_the_reversal_that_gives_the_hold_back() -> None:
    gate = Gate()
    gateway = bench(CANCEL_ONLY, Step(), Step(after=gate, arrives=False, answer=APPROVED))
    payment_id = await gateway.authorized()
    call = in_background(gateway.payments.capture(gateway.capture(payment_id, "c1", 30)))
    await gate.reached.wait()
    await gateway.recover()
    await gateway.payments.capture(gateway.capture(payment_id, "c2", 40, final=True))
    gate.opened.set()
    await call
    gateway.connector.asks.extend([NO_ANSWER, NO_ANSWER])
    await gateway.recover(rounds=2)
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    [release] = operations_of(gateway, payment_id, K.VOID)
    assert (reversal.state, release.state) == (S.IN_DOUBT, S.PENDING)
    cause = gateway.store.doubts[MERCHANT, release.operation_id].cause
    assert cause is DoubtCause.WAITS_FOR_OPERATION
    assert gateway.connector.standing(K.VOID) == []
    await gateway.recover(rounds=3)
    assert gateway.connector.standing(K.VOID) == [release.reference]


async def test_refusal_of_an_attempt_is_no_contradiction_of_the_repeat_that_succeeded() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate, arrives=False, answer=NOT_SENT))
    first = asyncio.ensure_future(gateway.payments.authorize(gateway.authorize("a")))
    await gate.reached.wait()
    await gateway.recover()
    assert gateway.store.by_key("a").state is S.NOT_SENT
    looks = 0

    async def repeat(method: str) -> None:
        nonlocal looks
        looks += method == "find_operation"
        # After the lost comparison and as a fenced-out sender it looks before it contradicts.
        if method == "find_operation" and looks == 3:
            await gateway.payments.authorize(gateway.authorize("a"))

    gateway.store.before = repeat
    gate.opened.set()
    await first
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.store.discrepancies == []


@pytest.mark.parametrize("refused_first", [True, False])
async def test_late_refusal_of_what_a_person_took_for_done_is_recorded_at_once(
    refused_first: bool,
) -> None:
    gate = Gate()
    gateway = bench(INCAPABLE, Step(after=gate, decides=DECLINED))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    if refused_first:  # it is kept, and nobody has looked at it when the person decides
        gate.opened.set()
        await call
    operation = gateway.store.by_key("a")
    found = await gateway.store.find_operation(MERCHANT, operation.operation_id)
    assert found is not None
    decision = Resolution(1, DoubtOutcome.TOOK_EFFECT, "tx-1", None, "seen", "key_1")
    answer = answer_of_person(operation, decision)
    resolved = await gateway.payments.outcomes.resolve(found, answer, decision)
    assert resolved is not None
    # So a recoverer that is still asking has lost the operation.
    assert resolved.operation.epoch == operation.epoch + 1
    gate.opened.set()
    await call
    await gateway.recover()
    [told] = gateway.store.discrepancies
    assert (told.kind, told.expected, told.reported) == ("late_refusal", "SUCCEEDED", "DECLINED")
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.store.doubts == {}


@pytest.mark.parametrize("outcome", [DoubtOutcome.TOOK_EFFECT, DoubtOutcome.FAILED])
@pytest.mark.parametrize("method", [CaptureMethod.MANUAL, CaptureMethod.AUTOMATIC])
async def test_a_person_ends_the_doubt_of_an_authorization_before_the_void_that_waits_for_it(
    method: CaptureMethod, outcome: DoubtOutcome
) -> None:
    gateway = bench(INCAPABLE, LOST)
    payment_id = await gateway.authorized(capture_method=method)
    await gateway.payments.void(gateway.void(payment_id))

    async def decide(key: str, outcome: DoubtOutcome, psp_id: str = "") -> Found | None:
        operation = gateway.store.by_key(key)
        found = await gateway.store.find_operation(MERCHANT, operation.operation_id)
        assert found is not None
        decision = Resolution(1, outcome, psp_id, None, "seen", "key_1")
        answer = answer_of_person(operation, decision)
        return await gateway.payments.outcomes.resolve(found, answer, decision)

    error = await refused(Reason.OPERATION_IN_PROGRESS, decide("v", outcome))
    assert error.metadata["operation_id"] == gateway.store.by_key("a").operation_id
    assert gateway.store.by_key("v").state is S.PENDING
    assert await decide("a", DoubtOutcome.TOOK_EFFECT, "tx-1")
    assert await decide("v", outcome)
    gone = outcome is DoubtOutcome.TOOK_EFFECT
    payment = gateway.store.of_payment(payment_id).payment
    if method is CaptureMethod.MANUAL:
        assert payment.voided_minor == (100 if gone else 0)
    else:
        assert payment.captured_minor == (0 if gone else 100)


@pytest.mark.parametrize("capabilities", [CAPABLE, replace(CAPABLE, cancel_by_reference=False)])
async def test_success_found_after_not_sent_is_reversed_until_the_psp_confirms(
    capabilities: Capabilities,
) -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate, arrives=False, answer=APPROVED))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.NOT_SENT
    gateway.connector.capabilities = capabilities
    gate.opened.set()
    payment_id = (await call).payment_id
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    operation = gateway.store.by_key("a")
    assert (reversal.note, reversal.state) == (operation.reference, S.PROCESSING)
    assert [found.kind for found in gateway.store.discrepancies] == ["late_success"]

    gateway.connector.steps.extend([UNSENT, Step(answer=DECLINED, arrives=False)])
    gateway.connector.asks.extend([NO_ANSWER])
    gateway.store.advance(1)
    await gateway.recovery.run_once()
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.IN_DOUBT
    await gateway.recover(rounds=4)
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.SUCCEEDED
    assert gateway.store.doubts == {}
    assert None not in {key for _, key in gateway.claims.frozen}  # it is no caller's


async def late_success() -> tuple[Bench, str]:
    """What was taken for not sent has succeeded after all; its payment."""
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate, arrives=False, answer=APPROVED))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    gate.opened.set()
    return gateway, (await call).payment_id


async def test_reversal_that_the_psp_accepted_waits_for_its_outcome_and_is_not_sent_again() -> None:
    gateway, payment_id = await late_success()
    accepted = replace(PENDING, connector_transaction_id="tx-reversal")
    gateway.connector.asks.append(accepted)
    await gateway.recover()
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.PENDING
    assert reversal.attempt.connector_transaction_id == "tx-reversal"
    gateway.connector.asks.append(DECLINED)  # nobody is asked
    await gateway.recover(rounds=3)
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.PENDING
    assert len(gateway.connector.asks) == 1


async def test_a_reversal_is_a_repeat_from_its_second_sending_on() -> None:
    gateway, payment_id = await late_success()
    gateway.connector.asked_with.clear()
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.recover(rounds=2)
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.SUCCEEDED
    assert [each and each.is_repeat for each in gateway.connector.asked_with] == [False, True]


async def test_reversal_is_open_while_the_psp_says_that_the_charge_stands() -> None:
    gateway, payment_id = await late_success()
    gateway.connector.asks.append(APPROVED)
    await gateway.recover()
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.IN_DOUBT
    await gateway.recover()
    [reversal] = operations_of(gateway, payment_id, K.REVERSAL)
    assert reversal.state is S.SUCCEEDED


async def test_late_success_of_the_first_attempt_leaves_the_second_one_alone() -> None:
    first, second = Gate(), Gate()
    gateway = bench(CAPABLE, Step(after=first, arrives=False, answer=APPROVED), Step(before=second))
    call = await paused(gateway, first)
    await gateway.recovery.run_once()
    again = in_background(gateway.payments.authorize(gateway.authorize()))
    await second.reached.wait()
    first.opened.set()
    await call
    # The second sender keeps all of its time.
    gateway.store.advance(TAKEOVER_S - 1)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("a").state is S.PROCESSING
    second.opened.set()
    assert b"SUCCEEDED" in (await again).response
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.attempt.number) == (S.SUCCEEDED, 2)
    [reversal] = operations_of(gateway, operation.payment_id, K.REVERSAL)
    assert reversal.note == f"{operation.operation_id}-1"
    await gateway.recover()
    assert gateway.connector.standing(K.AUTHORIZE) == [f"{operation.operation_id}-2"]


async def test_first_caller_who_is_told_what_a_repeat_has_executed_is_told_a_replay() -> None:
    first = Gate()
    gateway = bench(CAPABLE, Step(before=first))
    call = await paused(gateway, first)
    await gateway.recovery.run_once()
    again = await gateway.payments.authorize(gateway.authorize())
    first.opened.set()
    late = await call
    assert (late.response, again.replayed, late.replayed) == (again.response, False, True)
    assert late.first_request_id == gateway.store.by_key("a").request_id


async def second_attempt(gateway: Bench, first: Gate, second: Gate) -> asyncio.Task[Answer]:
    """The call's repeat, at its gate: the first one's reference was cancelled, and what its sender
    was told is evidence.
    """
    call = await paused(gateway, first)
    [lease] = await take_over(gateway)
    gone = await gateway.connector.cancel(K.AUTHORIZE, lease.operation.reference)
    first.opened.set()
    await call
    await gateway.payments.outcomes.write(lease.operation, lease.aggregate.payment, gone)
    again = in_background(gateway.payments.authorize(gateway.authorize()))
    await second.reached.wait()
    return again


async def test_the_second_attempt_is_not_asked_for_by_the_first_ones_id() -> None:
    first, second = Gate(), Gate()
    told = replace(APPROVED, connector_transaction_id="tx-first")
    gateway = bench(
        CAPABLE, Step(after=first, arrives=False, answer=told), replace(LOST, after=second)
    )
    again = await second_attempt(gateway, first, second)
    gateway.connector.asked_with.clear()
    await gateway.recover()
    second.opened.set()
    await again
    operation = gateway.store.by_key("a")
    ids = {
        each.target_transaction_id
        for each in gateway.connector.asked_with
        if each is not None and each.reference == operation.reference
    }
    assert ids == {""}


@pytest.mark.parametrize("told", [APPROVED, DECLINED])
async def test_evidence_of_the_first_attempt_is_no_answer_to_the_second(
    told: ConnectorAnswer,
) -> None:
    first, second = Gate(), Gate()
    gateway = bench(CAPABLE, Step(after=first, arrives=False, answer=told), Step(before=second))
    again = await second_attempt(gateway, first, second)
    assert gateway.store.by_key("a").attempt.number == 2
    # The second sender keeps all of its time.
    gateway.store.advance(TAKEOVER_S - 1)
    await gateway.recovery.run_once()
    second.opened.set()
    assert b"SUCCEEDED" in (await again).response
    gateway.store.advance(1)
    await gateway.recover(rounds=2)
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.attempt.number) == (S.SUCCEEDED, 2)
    assert gateway.connector.standing(K.AUTHORIZE) == [operation.reference]
    reversed_ = [each.note for each in operations_of(gateway, operation.payment_id, K.REVERSAL)]
    assert reversed_ == ([f"{operation.operation_id}-1"] if told is APPROVED else [])


async def test_evidence_of_the_second_attempt_does_not_hide_the_success_of_the_first() -> None:
    first, second = Gate(), Gate()
    gateway = bench(CAPABLE, Step(after=first, arrives=False, answer=APPROVED), Step(after=second))
    again = await second_attempt(gateway, first, second)
    gateway.store.advance(TAKEOVER_S)
    assert await take_over(gateway)  # by a recoverer that dies before it acts on the evidence
    second.opened.set()
    await again  # its answer is evidence now, too
    gateway.store.advance(TAKEOVER_S)
    await gateway.recover(rounds=3)
    operation = gateway.store.by_key("a")
    assert (operation.state, operation.attempt.number) == (S.SUCCEEDED, 2)
    [reversal] = operations_of(gateway, operation.payment_id, K.REVERSAL)
    assert (reversal.note, reversal.state) == (f"{operation.operation_id}-1", S.SUCCEEDED)
    assert gateway.connector.standing(K.AUTHORIZE) == [operation.reference]


async def test_answer_without_news_of_a_sender_that_was_fenced_out_is_dropped() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate, answer=NO_ANSWER))
    call = await paused(gateway, gate)
    await gateway.recovery.run_once()
    gate.opened.set()
    assert b"SUCCEEDED" in (await call).response
    assert gateway.store.doubts == {}


# --- voids as cancel requests ---------------------------------------------------------------------


@pytest.mark.parametrize("method", CaptureMethod)
@pytest.mark.parametrize("step", [LOST, DROPPED])
async def test_void_of_an_authorization_in_doubt_makes_sure_that_nothing_stands(
    step: Step, method: CaptureMethod
) -> None:
    gateway = bench(CAPABLE, step)
    await gateway.authorized(100, method)
    answer = await gateway.payments.void(gateway.void(None, authorize_key="a"))
    assert b'"state": "PENDING"' in answer.response
    await gateway.recover(rounds=2)
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert gateway.store.by_key("a").state is S.CANCELED
    assert gateway.connector.standing(K.AUTHORIZE) == []
    # The void's answer is frozen as it was, and a repeat of the authorization executes nothing.
    repeated = await gateway.payments.void(gateway.void(None, authorize_key="a"))
    assert repeated.response == answer.response
    late = await gateway.payments.authorize(gateway.authorize("a", 100, method))
    assert b"CANCELED" in late.response
    assert gateway.connector.standing(K.AUTHORIZE) == []
    assert gateway.store.doubts == {}


async def void_in_flight(gateway: Bench, gate: Gate, method: CaptureMethod) -> str:
    """An authorization that succeeds after a void has asked to cancel it."""
    call = in_background(gateway.payments.authorize(gateway.authorize("a", 100, method)))
    await gate.reached.wait()
    await gateway.payments.void(gateway.void(None, authorize_key="a"))
    gate.opened.set()
    return (await call).payment_id


async def test_authorization_that_is_to_be_cancelled_is_whatever_a_late_answer_says() -> None:
    gate = Gate()
    gateway = bench(CANCEL_ONLY, Step(after=gate))
    call = await paused(gateway, gate)
    await gateway.payments.void(gateway.void(None, authorize_key="a"))
    await take_over(gateway)  # by a recoverer that died
    gate.opened.set()
    await call
    await gateway.recover(rounds=2)
    assert gateway.store.by_key("a").state is S.CANCELED
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert gateway.connector.standing(K.AUTHORIZE) == []


async def test_authorization_that_is_to_be_cancelled_is_asked_about_where_it_cannot_be() -> None:
    gateway = bench(QUERY_ONLY, LOST)
    payment_id = await gateway.authorized()
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover(rounds=2)
    payment = gateway.store.of_payment(payment_id).payment
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert (payment.state, payment.voided_minor) == (P.VOIDED, 100)


async def test_void_of_a_manual_authorization_in_flight_is_sent_when_it_has_succeeded() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    payment_id = await void_in_flight(gateway, gate, MULTIPLE)
    await gateway.recover()
    payment = gateway.store.of_payment(payment_id).payment
    assert (payment.state, payment.voided_minor) == (P.VOIDED, 100)
    assert [sent.kind for sent in gateway.connector.sent] == [K.AUTHORIZE, K.VOID]


async def die_between_the_bounce_and_the_voids_outcome(gateway: Bench) -> None:
    """A recoverer that takes a charge back bounces its capture first."""
    written = 0

    async def die(method: str) -> None:
        nonlocal written
        await asyncio.sleep(0)
        written += method == "write_change"
        if method == "write_change" and written == 2:
            raise StoreUnavailable("killed")

    gateway.store.before = die
    gateway.store.advance(LONG_S)
    await gateway.recovery.run_once()
    assert gateway.store.by_key("v").state is S.PENDING
    gateway.counts.failures = 0


async def test_a_charge_that_was_reversed_is_not_voided_after_that() -> None:
    """The PSP would refuse it, and the void would have failed though nothing stands."""
    gate = Gate()
    gateway = bench(replace(CAPABLE, cancel_by_reference=False), Step(before=gate))
    await void_in_flight(gateway, gate, AUTOMATIC)
    await die_between_the_bounce_and_the_voids_outcome(gateway)
    await gateway.recover()
    void = gateway.store.by_key("v")
    assert void.state is S.SUCCEEDED
    asked_with = [
        each.kind
        for each in gateway.connector.asked_with
        if each is not None and each.reference == void.reference
    ]
    assert asked_with == [K.REVERSAL, K.REVERSAL]
    assert [sent.kind for sent in gateway.connector.sent] == [K.AUTHORIZE, K.REVERSAL]


@pytest.mark.parametrize("dies", [False, True])
async def test_void_of_an_automatic_authorization_in_flight_takes_the_charge_back(
    dies: bool,
) -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    payment_id = await void_in_flight(gateway, gate, AUTOMATIC)
    if dies:
        await die_between_the_bounce_and_the_voids_outcome(gateway)
    await gateway.recover()
    payment = gateway.store.of_payment(payment_id).payment
    assert (payment.state, payment.captured_minor, payment.voided_minor) == (P.VOIDED, 0, 100)
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert gateway.connector.standing(K.AUTHORIZE, K.VOID) == []
    [capture] = operations_of(gateway, payment_id, K.CAPTURE)
    assert capture.state is S.FAILED


async def test_own_sender_that_did_not_send_a_cancelled_authorization_leaves_it_cancelled() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate, arrives=False, answer=NOT_SENT))
    payment_id = await void_in_flight(gateway, gate, AUTOMATIC)
    assert gateway.store.of_payment(payment_id).payment.state is P.CANCELED
    await gateway.recover()
    assert gateway.store.by_key("v").state is S.SUCCEEDED


async def test_declined_authorization_leaves_nothing_to_void() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate, decides=DECLINED))
    payment_id = await void_in_flight(gateway, gate, MANUAL)
    await gateway.recover()
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert gateway.store.of_payment(payment_id).payment.state is P.DECLINED
    assert [sent.kind for sent in gateway.connector.sent] == [K.AUTHORIZE]


async def cancel_request_held(gateway: Bench) -> tuple[asyncio.Task[Answer], Gate]:
    """A void of an authorization in flight, just before its acceptance is written."""
    held = Gate()

    async def hold_the_first(method: str) -> None:
        if method == "write_change" and not held.reached.is_set():
            await held.wait()

    gateway.store.before = hold_the_first
    void = in_background(gateway.payments.void(gateway.void(None, authorize_key="a")))
    await held.reached.wait()
    return void, held


async def test_cancel_request_is_accepted_though_its_authorization_ends_meanwhile() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    void, held = await cancel_request_held(gateway)
    gate.opened.set()
    await call
    held.opened.set()
    assert b"PENDING" in (await void).response
    assert gateway.store.by_key("v").state is S.PENDING


async def test_cancel_request_that_recovery_has_taken_over_is_answered_as_it_stands() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(after=gate))
    call = in_background(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    void, held = await cancel_request_held(gateway)
    gateway.store.advance(LONG_S)
    await gateway.store.expired(10)
    await gateway.store.lease(10, LEASE_S)
    gate.opened.set()
    await call
    held.opened.set()
    answer = await void
    assert b"PROCESSING" in answer.response
    assert not answer.frozen
    assert gateway.store.by_key("v").state is S.PROCESSING


@pytest.mark.parametrize("key", ["nobody", "c"], ids=["unknown", "a capture's"])
async def test_void_by_a_key_of_no_authorization_is_not_found(key: str) -> None:
    gateway = bench()
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=60))
    await refused(
        Reason.PAYMENT_NOT_FOUND, gateway.payments.void(gateway.void(None, authorize_key=key))
    )


@pytest.mark.parametrize("told", [PENDING, APPROVED], ids=["to be taken back", "stands"])
async def test_void_of_a_charge_in_flight_waits_until_the_psp_has_taken_it_back(
    told: ConnectorAnswer,
) -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate))
    payment_id = await void_in_flight(gateway, gate, AUTOMATIC)
    gateway.connector.asks.append(told)
    await gateway.recover()
    [capture] = operations_of(gateway, payment_id, K.CAPTURE)
    assert (gateway.store.by_key("v").state, capture.state) == (S.PENDING, S.SUCCEEDED)
    await gateway.recover()
    [capture] = operations_of(gateway, payment_id, K.CAPTURE)
    assert (gateway.store.by_key("v").state, capture.state) == (S.SUCCEEDED, S.FAILED)


# --- voids in doubt -------------------------------------------------------------------------------


async def test_later_void_of_the_rest_does_not_take_back_what_was_captured() -> None:
    gate = Gate()
    gateway = bench(CAPABLE, Step(before=gate), Step(decides=DECLINED))
    payment_id = await void_in_flight(gateway, gate, MULTIPLE)
    await gateway.recover()  # the cancel request: the PSP declines the void
    assert gateway.store.by_key("v").state is S.DECLINED
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=30))
    gateway.connector.steps.append(LOST)
    await gateway.payments.void(gateway.void(payment_id, "v2"))
    await gateway.recover()
    payment = gateway.store.of_payment(payment_id).payment
    assert (payment.captured_minor, payment.voided_minor) == (30, 70)
    assert len(gateway.connector.standing(K.AUTHORIZE)) == 1


@pytest.mark.parametrize("capabilities", [IDEMPOTENT_ONLY, NON_IDEMPOTENT, CANCEL_ONLY])
@pytest.mark.parametrize("step", [LOST, DROPPED])
async def test_void_in_doubt_is_repeated_until_the_psp_confirms(
    step: Step, capabilities: Capabilities
) -> None:
    gateway = bench(capabilities)
    payment_id = await gateway.authorized()
    gateway.connector.steps.append(step)
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover()
    payment = gateway.store.of_payment(payment_id).payment
    assert (payment.state, payment.voided_minor) == (P.VOIDED, 100)


@pytest.mark.parametrize(
    ("first", "state"), [(Step(decides=DECLINED), S.DECLINED), (LOST, S.PENDING)]
)
async def test_refusal_of_a_void_that_had_to_wait_is_believed_where_it_was_sent_once(
    first: Step, state: OperationState
) -> None:
    gate = Gate()
    gateway = bench(INCAPABLE, Step(before=gate), first)
    await void_in_flight(gateway, gate, MULTIPLE)
    await gateway.recover(rounds=2)
    assert gateway.store.by_key("v").state is state


async def test_void_in_doubt_is_not_not_sent_because_recovery_could_not_send_it_again() -> None:
    gateway = bench(IDEMPOTENT_ONLY)
    payment_id = await gateway.authorized()
    gateway.connector.steps.extend([LOST, UNSENT])
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover()
    assert gateway.store.by_key("v").state is S.IN_DOUBT
    await gateway.recover()
    assert gateway.store.by_key("v").state is S.SUCCEEDED
    assert [sent.kind for sent in gateway.connector.sent] == [K.AUTHORIZE, K.VOID, K.VOID]


async def test_void_that_is_refused_since_another_one_arrived_meanwhile_has_succeeded() -> None:
    gateway = bench(NON_IDEMPOTENT)
    payment_id = await gateway.authorized()
    gateway.connector.steps.append(LOST)
    await gateway.payments.void(gateway.void(payment_id))
    gateway.connector.asks.append(None)  # it is not found yet, and sent again
    await gateway.recover()
    assert [sent.kind for sent in gateway.connector.sent] == [K.AUTHORIZE, K.VOID, K.VOID]
    assert gateway.store.by_key("v").state is S.SUCCEEDED


@pytest.mark.parametrize("capabilities", [NON_IDEMPOTENT, IDEMPOTENT_ONLY])
async def test_refusal_of_a_repeated_void_is_an_answer_where_no_other_can_be_its_reason(
    capabilities: Capabilities,
) -> None:
    gateway = bench(capabilities)
    payment_id = await gateway.authorized()
    gateway.connector.steps.extend([DROPPED, Step(decides=DECLINED)])
    await gateway.payments.void(gateway.void(payment_id))
    if capabilities.query_by_reference:
        gateway.connector.asks.extend([None, None])  # this PSP keeps nothing of what it refuses
    await gateway.recover()
    assert gateway.store.by_key("v").state is S.DECLINED


async def test_refusal_of_a_repeated_void_is_no_answer_where_the_first_may_be_its_reason() -> None:
    gateway = bench(INCAPABLE)
    payment_id = await gateway.authorized()
    refusal = Step(answer=answered(Verdict.FAILED))
    gateway.connector.steps.extend([LOST, refusal, refusal])
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover(rounds=2)
    assert gateway.store.by_key("v").state is S.IN_DOUBT


@pytest.mark.parametrize("capabilities", [CANCEL_ONLY, INCAPABLE])
async def test_refusal_of_a_void_that_was_accepted_before_is_no_answer(
    capabilities: Capabilities,
) -> None:
    gateway = bench(capabilities)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=30))
    gateway.connector.steps.append(Step(decides=PENDING))
    await gateway.payments.void(gateway.void(payment_id))
    await gateway.recover()
    assert len(gateway.connector.sent) == 4  # the second void is refused beside the first
    assert gateway.store.by_key("v").state is S.PENDING


@pytest.mark.parametrize("capabilities", [CANCEL_ONLY, INCAPABLE, IDEMPOTENT_ONLY, TELLING])
@pytest.mark.parametrize("is_sent", [True, False], ids=["refused", "not sent"])
async def test_what_became_of_a_stopped_senders_void_says_nothing_of_recoverys_own(
    is_sent: bool, capabilities: Capabilities
) -> None:
    gate = Gate()
    gateway = bench(capabilities)
    payment_id = await gateway.authorized()
    await gateway.payments.capture(gateway.capture(payment_id, amount_minor=30))
    stopped = Step(before=gate) if is_sent else Step(NOT_SENT, arrives=False, before=gate)
    # Recovery's takes effect, and its answer is lost; then it is not sent for a while.
    gateway.connector.steps.extend([stopped, LOST])
    call = in_background(gateway.payments.void(gateway.void(payment_id)))
    await gate.reached.wait()
    await gateway.recover()
    gate.opened.set()
    await call
    gateway.connector.steps.append(UNSENT)
    await gateway.recover(rounds=2)
    is_known = capabilities.idempotent_by_reference  # a second sending tells of the first
    assert gateway.store.by_key("v").state is (S.SUCCEEDED if is_known else S.IN_DOUBT)


# --- partial approvals ----------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", [CAPABLE, IDEMPOTENT_ONLY, QUERY_ONLY])
async def test_partial_approval_that_was_not_allowed_is_declined_and_taken_back(
    capabilities: Capabilities,
) -> None:
    gateway = bench(capabilities, Step(decides=answered(Verdict.APPROVED, 40)))
    answer = await gateway.payments.authorize(gateway.authorize())
    assert b"DECLINED" in answer.response
    await gateway.recover()
    [reversal] = operations_of(gateway, answer.payment_id, K.REVERSAL)
    assert reversal.state is S.SUCCEEDED
    if capabilities.cancel_by_reference:
        assert gateway.connector.standing(K.AUTHORIZE) == []
    else:
        sent = gateway.connector.sent[-1]
        authorization = gateway.store.by_key("a")
        assert (sent.kind, sent.amount_minor) == (K.REVERSAL, 40)
        assert sent.target_reference == authorization.reference
        assert sent.target_transaction_id == f"tx-{authorization.reference}"


# --- every ending ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", [CAPABLE, NON_IDEMPOTENT, CANCEL_ONLY])
@pytest.mark.parametrize("lost_at", range(1, 5))
async def test_repeats_through_lost_answers_cause_one_standing_charge(
    lost_at: int, capabilities: Capabilities
) -> None:
    steps = [(LOST, DROPPED, UNSENT, LOST)[(lost_at + number) % 4] for number in range(4)]
    gateway = bench(capabilities, *steps)
    for _ in range(6):
        await gateway.payments.authorize(gateway.authorize("a", 100, AUTOMATIC))
        await gateway.recover(rounds=2)
    operation = gateway.store.by_key("a")
    stands = gateway.connector.standing(K.AUTHORIZE)
    assert len(stands) == (operation.state is S.SUCCEEDED)
    assert operation.state in (S.SUCCEEDED, S.CANCELED)
    assert gateway.store.doubts == {}


# --- our books and the PSP's ----------------------------------------------------------------------

STEPS = {
    "works": Step(),
    "answer lost": LOST,
    "request lost": DROPPED,
    "not sent": UNSENT,
    "declined": Step(decides=DECLINED),
}
CALLS: dict[str, Callable[[Bench, str], Coroutine[Any, Any, Answer]]] = {
    "capture 30": lambda gateway, id_: gateway.payments.capture(gateway.capture(id_, "c1", 30)),
    "capture 50": lambda gateway, id_: gateway.payments.capture(gateway.capture(id_, "c2", 50)),
    "capture the rest": lambda gateway, id_: gateway.payments.capture(
        gateway.capture(id_, "c3", final=True)
    ),
    "void": lambda gateway, id_: gateway.payments.void(gateway.void(id_, "v1")),
    "void again": lambda gateway, id_: gateway.payments.void(gateway.void(id_, "v2")),
    "refund 40": lambda gateway, id_: gateway.payments.refund(gateway.refund(id_, "r1", 40)),
    "refund the rest": lambda gateway, id_: gateway.payments.refund(gateway.refund(id_, "r2")),
    "increment": lambda gateway, id_: gateway.payments.increment(gateway.increment(id_, 25)),
}


async def carry_out(
    capabilities: Capabilities,
    method: CaptureMethod,
    rounds: list[tuple[list[str], list[str], bool]],
) -> None:
    """Rounds of concurrent calls, each with what becomes of its requests and of recovery."""
    gateway = bench(capabilities)
    command = gateway.authorize("a", 100, method)
    for calls, steps, recovered in rounds:
        gateway.connector.steps.extend(STEPS[step] for step in steps)
        authorized = await gateway.payments.authorize(command)
        results = await asyncio.gather(
            *(CALLS[call](gateway, authorized.payment_id) for call in calls),
            return_exceptions=True,
        )
        assert all(isinstance(result, Answer | GatewayError) for result in results), results
        if recovered:
            await gateway.recover()
    gateway.connector.steps.clear()
    await gateway.recover(rounds=4)
    compare_books(gateway, gateway.store.by_key("a").payment_id)


def compare_books(gateway: Bench, payment_id: str) -> None:
    """What we hold to have succeeded stands at the PSP, once, and nothing else does."""
    aggregate = gateway.store.of_payment(payment_id)
    payment = aggregate.payment
    assert gateway.store.doubts == {}
    assert not [each for each in aggregate.operations if each.state in UNFINISHED]
    for kind in (K.AUTHORIZE, K.CAPTURE, K.REFUND, K.INCREMENT):
        ours = [
            operation
            for operation in aggregate.operations
            if (operation.kind, operation.state) == (kind, S.SUCCEEDED)
            and operation.idempotency_key is not None
        ]
        theirs = gateway.connector.standing(kind)
        if kind is K.AUTHORIZE and payment.state is P.VOIDED and not theirs:
            continue  # taken back as a whole
        assert sorted(operation.reference for operation in ours) == sorted(theirs)
        amounts = {
            K.CAPTURE: payment.captured_minor,
            K.REFUND: payment.refunded_minor,
            K.INCREMENT: payment.authorized_minor - payment.requested_minor,
        }
        if kind in amounts and payment.authorized_minor and payment.capture_method is not AUTOMATIC:
            assert sum(operation.amount_minor for operation in ours) == amounts[kind]
    pending = (payment.capture_pending_minor, payment.refund_pending_minor)
    assert (*pending, payment.increment_pending_minor) == (0, 0, 0)


@settings(max_examples=150)
@given(
    st.sampled_from([CAPABLE, NON_IDEMPOTENT]),
    st.sampled_from(CaptureMethod),
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(sorted(CALLS)), max_size=4),
            st.lists(st.sampled_from(sorted(STEPS)), max_size=4),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_our_books_are_the_psps_whatever_is_called_at_once_and_lost(
    capabilities: Capabilities,
    method: CaptureMethod,
    rounds: list[tuple[list[str], list[str], bool]],
) -> None:
    asyncio.run(carry_out(capabilities, method, rounds))
