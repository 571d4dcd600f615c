"""Rules and cascades in the money calls: which connectors are asked, in what order, how often."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Final

import pytest

from gateway.application import usecases
from gateway.application.ports import ConnectorRequest, StoreUnavailable
from gateway.application.routing import (
    PAUSE_S_MAX,
    UNAVAILABLE_RETRY_S,
    ActiveRules,
    Routing,
    RuleBook,
)
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import (
    AdviceAction,
    ConnectorAnswer,
    Delivery,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    Outcome,
    ResponseCode,
    Verdict,
)
from gateway.routing import cascade, record
from gateway.routing.availability import AccountAvailability
from gateway.routing.breakers import BreakerKey, BreakerLimits, Breakers, BreakerState
from gateway.routing.cascade import Next, ReattemptLimit
from gateway.routing.model import Candidate, Exclusion, Scored, Segment
from gateway.routing.rules import Facts
from tests.memory_store import (
    CAPABLE,
    DROPPED,
    LIMITS,
    LOST,
    MERCHANT,
    NO_ANSWER,
    UNSENT,
    Bench,
    Counts,
    Gate,
    ManyRoutes,
    MemoryStore,
    ScriptedConnector,
    Step,
    answered,
)

pytestmark = pytest.mark.unit

S = OperationState

AT: Final = datetime(2026, 1, 1, tzinfo=UTC)


def declined(code: ResponseCode = ResponseCode.DO_NOT_HONOR, **outcome: Any) -> ConnectorAnswer:
    return ConnectorAnswer(
        Delivery.ANSWERED, Verdict.DECLINED, Outcome(response_code=code, **outcome)
    )


SOFT: Final = Step(decides=declined())

RULES: Final = """
format = 1
[[rule]]
name = "three"
attempts_max = 3
targets = [
    { account = "acc_a" },
    { account = "acc_b", priority = 2 },
    { account = "acc_c", priority = 3 },
]
"""


class Source:
    """Implements RuleSource with rules that the test sets."""

    def __init__(self, text: str, version: int = 4) -> None:
        self.active = [ActiveRules(MERCHANT, Mode.TEST, version, text, AT, 1)]

    async def active_since(self, since: object) -> Sequence[ActiveRules]:
        return self.active


class Budget:
    """Implements Reattempts with so many of them."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.asked: list[tuple[str, tuple[ReattemptLimit, ...]]] = []

    async def take(
        self, merchant_id: str, instrument: str, limits: Sequence[ReattemptLimit]
    ) -> bool:
        self.asked.append((instrument, tuple(limits)))
        self.left -= 1
        return self.left >= 0


class Closed:
    """Implements Availability with accounts that are out of use, or may not be begun with."""

    def __init__(self) -> None:
        self.refused: dict[str, Exclusion] = {}
        self.pauses_s: dict[str, float] = {}
        self.not_admitted: set[str] = set()
        self.given_back: list[str] = []

    def refusal(self, candidate: Candidate, method: str) -> Exclusion | None:
        return self.refused.get(candidate.connector_account_id)

    def admit(self, candidate: Candidate, method: str) -> Exclusion | None:
        if candidate.connector_account_id in self.not_admitted:
            return Exclusion.PROBES_TAKEN
        return self.refusal(candidate, method)

    def give_back(self, candidate: Candidate, method: str, seconds: float) -> None:
        assert seconds >= 0
        self.given_back.append(candidate.connector_account_id)

    def pause_s(self, candidate: Candidate, method: str) -> float | None:
        return self.pauses_s.get(candidate.connector_account_id)


class Backwards:
    """Implements Ranking by the account's name, the last first."""

    def rank(
        self, segment: Segment, candidates: Sequence[Candidate], amount_minor: int, draw: int
    ) -> Sequence[Scored]:
        ordered = sorted(candidates, key=lambda each: each.connector_account_id, reverse=True)
        return [Scored(each, float(-n)) for n, each in enumerate(ordered)]


class Seen:
    """Implements Observer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Delivery]] = []
        self.then: Callable[[], None] = lambda: None

    def observed(
        self,
        segment: Segment,
        candidate: Candidate,
        kind: OperationKind,
        answer: ConnectorAnswer,
        seconds: float,
    ) -> None:
        assert seconds >= 0
        self.calls.append((segment.method, candidate.connector_account_id, answer.delivery))
        self.then()


class Unseen:
    """Implements BreakerObserver."""

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        """Nobody looks."""


class Routed(Bench):
    """A gateway with accounts at the connectors a, b and c, and rules."""

    def __init__(
        self, rules: str | None = RULES, reattempts: int = 10, store: MemoryStore | None = None
    ) -> None:
        self.a, self.b, self.c = (ScriptedConnector(CAPABLE, name) for name in "abc")
        self.routes = ManyRoutes(self.a, self.b, self.c)
        self.budget, self.closed, self.seen = Budget(reattempts), Closed(), Seen()
        self.book = None if rules is None else RuleBook(Source(rules))
        self.routing = Routing(
            self.routes,
            rules=self.book,
            availability=self.closed,
            ranking=Backwards(),
            observer=self.seen,
            reattempts=self.budget,
        )
        super().__init__(router=self.routes, routing=self.routing, store=store)

    async def pay(self, key: str = "a", **more: Any) -> Operation:
        """The operation of an authorization that was made, or repeated."""
        if self.book is not None:
            await self.book.refresh()
        await self.payments.authorize(self.authorize(key, **more))
        return self.operation(key)

    def operation(self, key: str = "a") -> Operation:
        return next(each for each in self.store.operations.values() if each.idempotency_key == key)

    def sent(self) -> list[str]:
        """Which connectors received how many authorizations."""
        return [
            each.name
            for each in (self.a, self.b, self.c)
            for request in each.sent
            if request.kind is OperationKind.AUTHORIZE
        ]

    def standing(self) -> list[str]:
        """The authorizations that stand at all PSPs."""
        return [
            reference
            for each in (self.a, self.b, self.c)
            for reference in each.standing(OperationKind.AUTHORIZE)
        ]


async def refused(call: Coroutine[Any, Any, object]) -> GatewayError:
    with pytest.raises(GatewayError) as raised:
        await call
    return raised.value


# --- what may follow an answer --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "follows"),
    [
        (ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED), Next.ANOTHER),
        (ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECTOR_BUSY), Next.ANOTHER),
        (ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.SEND_WINDOW_PASSED), Next.NOTHING),
        (ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.DEADLINE_TOO_SHORT), Next.NOTHING),
        (ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT), Next.NOTHING),
        (replace(declined(), delivery=Delivery.MAY_HAVE_BEEN_SENT), Next.NOTHING),
        (ConnectorAnswer(Delivery.ANSWERED), Next.NOTHING),
        (answered(Verdict.APPROVED), Next.NOTHING),
        (answered(Verdict.PENDING), Next.NOTHING),
        (answered(Verdict.REQUIRES_ACTION), Next.NOTHING),
        (answered(Verdict.CANCELED), Next.NOTHING),
        (declined(), Next.REATTEMPT),
        (declined(ResponseCode.ISSUER_UNAVAILABLE), Next.REATTEMPT),
        (declined(ResponseCode.REJECTED_BY_CONNECTOR), Next.ANOTHER),
        (declined(ResponseCode.REJECTED_BY_CONNECTOR, network_code="05"), Next.REATTEMPT),
        (declined(ResponseCode.INSUFFICIENT_FUNDS), Next.NOTHING),
        (declined(ResponseCode.STOLEN_CARD), Next.NOTHING),
        (declined(ResponseCode.SUSPECTED_FRAUD), Next.NOTHING),
        (declined(ResponseCode.AUTHENTICATION_REQUIRED), Next.NOTHING),
        (declined(ResponseCode.DECLINED_OTHER), Next.NOTHING),
        *(
            (declined(advice_action=action), Next.NOTHING)
            for action in AdviceAction
            if action is not AdviceAction.UNSPECIFIED
        ),
        (declined(network_code="R1", network_code_scheme="visa"), Next.NOTHING),
        (declined(network_code="05", network_code_scheme="visa"), Next.REATTEMPT),
        # Nobody says whose code it is.
        (
            declined(
                ResponseCode.REJECTED_BY_CONNECTOR,
                network_code="12",
                network_code_scheme="iso8583_1987",
            ),
            Next.NOTHING,
        ),
        (declined(network_code="R1"), Next.NOTHING),
        (declined(network_code="12", network_code_scheme="mastercard"), Next.REATTEMPT),
        (ConnectorAnswer(Delivery.ANSWERED, Verdict.DECLINED), Next.NOTHING),
    ],
)
def test_only_what_surely_took_no_effect_and_is_not_final_is_tried_elsewhere(
    answer: ConnectorAnswer, follows: Next
) -> None:
    assert cascade.after(answer) is follows


def test_a_decline_that_a_rule_does_not_name_is_final() -> None:
    assert cascade.after(declined(), frozenset()) is Next.NOTHING


def test_a_card_of_an_unknown_scheme_has_the_strictest_limits() -> None:
    for limits in cascade.REATTEMPT_LIMITS.values():
        for limit in limits:
            strict = min(
                (each for each in cascade.limits_of("") if each.window_s >= limit.window_s),
                key=lambda each: each.reattempts_max,
            )
            assert strict.reattempts_max <= limit.reattempts_max


# --- a cascade ------------------------------------------------------------------------------------


async def test_after_a_soft_decline_the_next_account_is_asked_with_a_reference_of_its_own() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay()
    assert operation.state is S.SUCCEEDED
    assert gateway.sent() == ["a", "b"]
    [first] = operation.superseded_attempts
    assert (first.connector, first.connector_account_id) == ("a", "acc_a")
    assert first.delivery is Delivery.ANSWERED
    assert first.outcome is not None
    assert first.outcome.response_code is ResponseCode.DO_NOT_HONOR
    assert (operation.attempt.connector, operation.attempt.number) == ("b", 2)
    assert gateway.counts.cascades == [(Verdict.DECLINED, Verdict.APPROVED)]
    references = [request.reference for each in (gateway.a, gateway.b) for request in each.sent]
    assert references == [f"{operation.operation_id}-1", f"{operation.operation_id}-2"]
    payment = gateway.store.payments[MERCHANT, operation.payment_id]
    assert (payment.connector, payment.connector_account_id) == ("b", "acc_b")


async def test_what_was_surely_not_sent_goes_to_the_next_account_and_counts_no_reattempt() -> None:
    gateway = Routed(reattempts=0)
    gateway.a.steps.append(UNSENT)
    operation = await gateway.pay()
    assert (operation.state, gateway.sent()) == (S.SUCCEEDED, ["b"])
    assert operation.superseded_attempts[0].delivery is Delivery.NOT_SENT
    assert gateway.budget.asked == []


async def test_an_account_that_was_removed_meanwhile_is_passed_over_and_is_no_attempt() -> None:
    gateway = Routed(RULES.replace("attempts_max = 3", "attempts_max = 2"))
    gateway.a.steps.append(SOFT)

    def remove() -> None:
        gateway.routes.by_name.pop("b", None)

    gateway.seen.then = remove
    operation = await gateway.pay()
    assert (operation.state, gateway.sent()) == (S.SUCCEEDED, ["a", "c"])


@pytest.mark.parametrize("step", [LOST, DROPPED])
async def test_after_what_may_have_been_sent_nobody_else_is_asked(step: Step) -> None:
    gateway = Routed()
    gateway.a.steps.append(step)
    operation = await gateway.pay()
    assert operation.state is S.IN_DOUBT
    assert not gateway.b.sent
    assert not gateway.c.sent


async def test_a_cascade_ends_after_its_attempts_and_tells_the_last_decline() -> None:
    gateway = Routed(RULES.replace("attempts_max = 3", "attempts_max = 2"))
    gateway.a.steps.append(SOFT)
    gateway.b.steps.append(Step(decides=declined(ResponseCode.ISSUER_UNAVAILABLE)))
    operation = await gateway.pay()
    assert len(gateway.counts.cascades) == 1
    assert (operation.state, gateway.sent()) == (S.DECLINED, ["a", "b"])
    outcome = operation.attempt.outcome
    assert outcome is not None
    assert outcome.response_code is ResponseCode.ISSUER_UNAVAILABLE


async def test_a_decline_stands_where_the_next_account_cannot_be_reached() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    gateway.b.steps.append(UNSENT)
    gateway.c.steps.append(UNSENT)
    operation = await gateway.pay()
    assert operation.state is S.DECLINED
    assert operation.response is not None
    repeat = await gateway.payments.authorize(gateway.authorize("a"))
    assert (repeat.replayed, repeat.response) == (True, operation.response)
    assert gateway.sent() == ["a"]


async def test_nothing_sent_anywhere_is_not_sent_and_a_repeat_is_decided_anew() -> None:
    gateway = Routed()
    for each in (gateway.a, gateway.b, gateway.c):
        each.steps.append(UNSENT)
    assert (await gateway.pay()).state is S.NOT_SENT
    gateway.routes.disabled.add("acc_a")
    operation = await gateway.pay()
    assert (operation.state, gateway.sent()) == (S.SUCCEEDED, ["b"])
    assert [each.number for each in operation.superseded_attempts] == [1, 2, 3]
    assert (operation.epoch, operation.attempt.number) == (4, 4)
    payment = gateway.store.payments[MERCHANT, operation.payment_id]
    assert payment.connector == "b"


async def test_a_repeat_of_a_cascade_gets_its_final_answer() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    first = await gateway.payments.authorize(gateway.authorize("a"))
    assert not first.replayed  # without rules read yet, by the usual way
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay()
    repeat = await gateway.payments.authorize(gateway.authorize("a"))
    assert (repeat.replayed, repeat.response) == (True, operation.response)
    assert gateway.sent() == ["a", "b"]


async def test_no_reattempt_is_begun_where_the_networks_limits_or_redis_do_not_let_it() -> None:
    gateway = Routed(reattempts=1)
    for each in (gateway.a, gateway.b):
        each.steps.append(SOFT)
    facts = Facts(scheme="visa", instrument="tok_1")
    operation = await gateway.pay(facts=facts)
    assert (operation.state, gateway.sent()) == (S.DECLINED, ["a", "b"])
    assert gateway.budget.asked == [("tok_1", cascade.limits_of("visa"))] * 2


async def test_no_reattempt_is_counted_where_no_account_may_be_asked() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)

    def kill() -> None:
        gateway.closed.refused["acc_b"] = Exclusion.KILLED
        gateway.routes.by_name.pop("c", None)

    gateway.seen.then = kill
    operation = await gateway.pay()
    assert (operation.state, gateway.sent()) == (S.DECLINED, ["a"])
    assert gateway.budget.asked == []


async def test_no_reattempt_is_counted_where_no_account_is_left() -> None:
    gateway = Routed()
    for each in (gateway.a, gateway.b, gateway.c):
        each.steps.append(SOFT)
    operation = await gateway.pay()
    assert (operation.state, gateway.sent()) == (S.DECLINED, ["a", "b", "c"])
    assert len(gateway.budget.asked) == 2


@pytest.mark.parametrize(
    ("steps", "asked"), [([], 1), ([SOFT, SOFT], 3), ([SOFT, UNSENT], 3), ([UNSENT], 2)]
)
@pytest.mark.parametrize("item", [False, True])
async def test_added_time_is_that_of_a_call_without_all_psps_that_it_asked(
    steps: list[Step], asked: int, item: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    added: list[float] = []

    class Slow(ScriptedConnector):
        async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
            nonlocal now_s
            now_s += 1
            return await super().send(request, send_before)

    monkeypatch.setattr(usecases, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(Counts, "answered", lambda _, added_s: added.append(added_s))
    gateway = Routed()
    for name, step in zip("abc", [*steps, Step(), Step()], strict=False):
        slow = gateway.routes.by_name[name] = Slow(CAPABLE, name)
        slow.steps.append(step)
    assert gateway.book is not None
    await gateway.book.refresh()
    command = gateway.authorize()
    command.begun_at, command.item = now_s - 0.5, item
    await gateway.payments.authorize(command)
    assert now_s == 1000 + asked
    assert added == ([] if item else [0.5])


async def test_a_decline_stands_where_the_next_attempt_comes_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(usecases, "time", SimpleNamespace(monotonic=lambda: now_s))
    gateway = Routed()
    gateway.a.steps.append(SOFT)

    async def take_long(method: str) -> None:
        nonlocal now_s
        if method == "write_change":
            now_s += LIMITS.send_window_s + 1

    gateway.store.before = take_long
    operation = await gateway.pay()
    assert (operation.state, operation.attempt.number) == (S.DECLINED, 2)
    assert gateway.sent() == ["a"]


async def test_a_call_whose_deadline_is_far_is_tried_elsewhere() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay(deadline=time.monotonic() + 3600)
    assert (operation.state, gateway.sent()) == (S.SUCCEEDED, ["a", "b"])


async def test_an_attempt_that_cannot_be_written_is_an_outcome_lost() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)

    async def away(method: str) -> None:
        if method == "write_change":
            raise StoreUnavailable("the database is away")

    gateway.store.before = away
    error = await refused(gateway.pay())
    assert error.reason is Reason.STORE_UNAVAILABLE
    assert (gateway.counts.lost, gateway.sent()) == (1, ["a"])
    assert gateway.operation().state is S.PROCESSING


async def test_a_network_tokens_cryptogram_is_for_one_authorization() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    assert gateway.book is not None
    await gateway.book.refresh()
    command = gateway.authorize()
    command.secrets = {"number": "4000000000000002", "cryptogram": "c"}
    await gateway.payments.authorize(command)
    assert (gateway.operation().state, gateway.sent()) == (S.DECLINED, ["a"])
    assert gateway.budget.asked == []


async def test_no_card_is_tried_again_where_nobody_counts_how_often() -> None:
    gateway = Routed()
    gateway.routing.reattempts = None
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay()
    assert (operation.state, gateway.sent()) == (S.DECLINED, ["a"])


async def test_a_card_that_nobody_can_recognise_is_not_tried_again() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay(facts=Facts())
    assert (operation.state, gateway.sent()) == (S.DECLINED, ["a"])


async def test_no_attempt_is_begun_that_the_callers_deadline_leaves_no_time_for() -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)
    assert gateway.book is not None
    await gateway.book.refresh()
    command = gateway.authorize("a", deadline=time.monotonic() + 60)

    def pass_the_time() -> None:
        command.deadline = time.monotonic() + LIMITS.min_send_budget_s

    gateway.seen.then = pass_the_time
    await gateway.payments.authorize(command)
    assert (gateway.operation().state, gateway.sent()) == (S.DECLINED, ["a"])
    assert gateway.operation().attempt.number == 1


async def test_a_void_during_the_first_attempt_ends_the_cascade() -> None:
    gateway = Routed()
    gate = Gate()
    gateway.a.steps.append(replace(SOFT, after=gate))
    assert gateway.book is not None
    await gateway.book.refresh()
    call = asyncio.create_task(gateway.payments.authorize(gateway.authorize("a")))
    await gate.reached.wait()
    await gateway.payments.void(gateway.void(None, authorize_key="a"))
    gate.opened.set()
    await call
    assert (gateway.operation().state, gateway.sent()) == (S.DECLINED, ["a"])
    await gateway.recover(2)
    assert gateway.standing() == []


async def test_each_attempt_is_counted_for_its_account() -> None:
    gateway = Routed()
    gateway.a.steps.append(UNSENT)
    operation = await gateway.pay()
    await gateway.payments.capture(gateway.capture(operation.payment_id))
    assert gateway.seen.calls == [
        ("card", "acc_a", Delivery.NOT_SENT),
        ("card", "acc_b", Delivery.ANSWERED),
        ("", "acc_b", Delivery.ANSWERED),
    ]


# --- a gateway that dies --------------------------------------------------------------------------


async def _die_after(work: Coroutine[Any, Any, Any], steps: int) -> bool:
    """Whether the work came to its end within so many suspensions; otherwise it goes no further."""
    for _ in range(steps):
        try:
            waits_for = work.send(None)
        except StopIteration:
            return True
        if waits_for is None:
            await asyncio.sleep(0)
        else:
            waits_for._asyncio_future_blocking = False
            await asyncio.wait([waits_for])
    work.close()
    return False


@pytest.mark.parametrize("first", [SOFT, UNSENT])
async def test_a_gateway_that_dies_anywhere_in_a_cascade_leaves_at_most_one_charge(
    first: Step,
) -> None:
    for steps in range(1, 200):
        gateway = Routed()
        gateway.a.steps.append(first)
        assert gateway.book is not None
        await gateway.book.refresh()
        work = gateway.payments._new_authorization(gateway.authorize("a"))
        ended = await _die_after(work, steps)
        await gateway.recover(3)
        if gateway.store.operations:
            operation = gateway.operation()
            assert operation.state in (S.SUCCEEDED, S.DECLINED, S.NOT_SENT), steps
            assert len(gateway.standing()) == (operation.state is S.SUCCEEDED)
            numbers = [each.number for each in operation.superseded_attempts]
            assert numbers == list(range(1, operation.attempt.number))
        again = await gateway.pay()
        assert again.state in (S.SUCCEEDED, S.DECLINED)
        assert len(gateway.standing()) == (again.state is S.SUCCEEDED)
        if ended:
            assert gateway.sent() == (["a", "b"] if first is SOFT else ["b"])
            return
    raise AssertionError("the work has more suspensions than this test steps through")


async def test_a_late_success_of_an_attempt_elsewhere_is_reversed_where_it_was_made() -> None:
    """What a PSP said was never sent took effect after all, and another PSP was asked meanwhile."""
    gateway = Routed()
    gateway.a.steps.append(UNSENT)
    operation = await gateway.pay()
    late = answered(Verdict.APPROVED)
    late.connector_transaction_id = "tx-late"
    await gateway.payments.outcomes.reverse(operation, 1, late)
    await gateway.recover(1)
    [reversal] = [
        each for each in gateway.store.operations.values() if each.kind is OperationKind.REVERSAL
    ]
    assert (reversal.attempt.connector, reversal.attempt.connector_account_id) == ("a", "acc_a")
    assert reversal.state is S.SUCCEEDED
    assert gateway.a.canceled == {f"{operation.operation_id}-1"}
    [asked_with] = gateway.a.asked_with
    assert asked_with is not None
    assert (asked_with.kind, asked_with.reference) == (
        OperationKind.AUTHORIZE,
        f"{operation.operation_id}-1",
    )
    assert (asked_with.connector_account_id, asked_with.target_transaction_id) == (
        "acc_a",
        "tx-late",
    )
    assert gateway.b.canceled == set()
    assert gateway.standing() == [f"{operation.operation_id}-2"]


# --- the decision ---------------------------------------------------------------------------------


async def test_a_merchant_without_rules_goes_to_its_first_account_and_no_other() -> None:
    gateway = Routed(rules=None)
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay()
    assert (operation.state, gateway.sent(), operation.note) == (S.DECLINED, ["a"], "")


async def test_where_no_rule_holds_a_payment_goes_the_usual_way_and_says_so() -> None:
    gateway = Routed(RULES.replace('name = "three"', 'name = "three"\nwhen = { currency = "USD" }'))
    gateway.a.steps.append(SOFT)
    operation = await gateway.pay()
    assert gateway.sent() == ["a"]
    told = record.decode(operation.note)
    assert told is not None
    assert (told.rules_version, told.rule) == (4, "")


async def test_accounts_that_cannot_be_asked_are_left_out_and_the_operation_says_why() -> None:
    gateway = Routed()
    gateway.routes.disabled.add("acc_a")
    gateway.closed.refused["acc_b"] = Exclusion.BREAKER_OPEN
    operation = await gateway.pay()
    assert gateway.sent() == ["c"]
    told = record.decode(operation.note)
    assert told is not None
    assert [each.connector for each in told.candidates] == ["c"]
    assert [(each.connector, reason) for each, reason in told.excluded] == [
        ("a", Exclusion.DISABLED),
        ("b", Exclusion.BREAKER_OPEN),
    ]


async def test_an_account_that_does_not_suit_leaves_nothing_to_the_collector() -> None:
    """A cycle of its refusal would hold the payment, secrets too, and halt the event loop later."""
    gateway = Routed()
    fields = frozenset({"three_ds"})
    gateway.a.capabilities = replace(CAPABLE, supported_fields=frozenset())
    gateway.b.capabilities = gateway.c.capabilities = replace(CAPABLE, supported_fields=fields)
    assert gateway.book is not None
    await gateway.book.refresh()

    def plan() -> None:
        made = gateway.routing.plan(gateway.authorize("a", used_fields=fields), "pay_1")
        assert made.decision.excluded

    plan()
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            plan()
        assert gc.collect() == 0
    finally:
        gc.enable()


async def test_an_account_that_cannot_use_the_request_is_left_out() -> None:
    gateway = Routed()
    gateway.a.capabilities = replace(CAPABLE, supported_fields=frozenset())
    gateway.b.capabilities = replace(CAPABLE, amounts={})
    fields = frozenset({"billing_address"})
    gateway.c.capabilities = replace(CAPABLE, supported_fields=fields)
    operation = await gateway.pay(used_fields=fields)
    told = record.decode(operation.note)
    assert told is not None
    assert gateway.sent() == ["c"]
    assert [reason for _, reason in told.excluded] == [
        Exclusion.FIELD_NOT_SUPPORTED,
        Exclusion.FIELD_NOT_SUPPORTED,
    ]


async def test_where_every_account_is_out_of_use_nothing_is_written_and_a_pause_is_told() -> None:
    gateway = Routed()
    for account_id in ("acc_a", "acc_b", "acc_c"):
        gateway.closed.refused[account_id] = Exclusion.BREAKER_OPEN
    error = await refused(gateway.pay())
    assert error.reason is Reason.CONNECTOR_UNAVAILABLE
    assert error.metadata["exclusion"] == "BREAKER_OPEN"
    assert error.retry_after_s
    assert gateway.store.operations == {}


@pytest.mark.parametrize(
    ("pause_s", "told_s"),
    [
        (120.0, 120.0),
        (10 * PAUSE_S_MAX, PAUSE_S_MAX),
        (None, UNAVAILABLE_RETRY_S),
    ],
)
@pytest.mark.parametrize("exclusion", [Exclusion.MAINTENANCE, Exclusion.BREAKER_OPEN])
async def test_the_pause_is_until_a_windows_end_or_a_breakers_next_probe_where_that_is_known(
    exclusion: Exclusion, pause_s: float | None, told_s: float
) -> None:
    for rules in (RULES, None):
        gateway = Routed(rules)
        operation = await gateway.pay("before")
        for account_id in ("acc_a", "acc_b", "acc_c"):
            gateway.closed.refused[account_id] = exclusion
            if pause_s is not None:
                gateway.closed.pauses_s[account_id] = pause_s
        for call in (
            gateway.pay(),
            gateway.payments.capture(gateway.capture(operation.payment_id)),
        ):
            error = await refused(call)
            assert error.metadata["exclusion"] == exclusion
            assert error.retry_after_s == told_s


async def test_of_several_accounts_out_of_use_the_pause_is_that_of_the_first_to_come_back() -> None:
    gateway = Routed()
    for account_id, pause_s in (("acc_a", 300.0), ("acc_b", 60.0), ("acc_c", 600.0)):
        gateway.closed.refused[account_id] = Exclusion.MAINTENANCE
        gateway.closed.pauses_s[account_id] = pause_s
    error = await refused(gateway.pay())
    assert (error.metadata["connector"], error.retry_after_s) == ("b", 60.0)
    gateway.closed.refused["acc_c"] = Exclusion.PROBES_TAKEN
    del gateway.closed.pauses_s["acc_c"]
    error = await refused(gateway.pay())
    assert (error.metadata["connector"], error.retry_after_s) == ("c", UNAVAILABLE_RETRY_S)


async def test_where_no_account_can_use_the_request_the_first_ones_refusal_is_told() -> None:
    gateway = Routed()
    error = await refused(gateway.pay(used_fields=frozenset({"three_ds"})))
    assert error.reason is Reason.FIELD_NOT_SUPPORTED
    assert error.metadata == {"connector": "a"}


async def test_without_rules_the_only_account_is_not_asked_while_its_breaker_is_open() -> None:
    gateway = Routed(rules=None)
    gateway.closed.refused["acc_a"] = Exclusion.BREAKER_OPEN
    error = await refused(gateway.pay())
    assert (error.reason, gateway.sent()) == (Reason.CONNECTOR_UNAVAILABLE, [])


async def test_a_follow_up_is_refused_before_its_intent_while_its_account_is_out_of_use() -> None:
    gateway = Routed()
    operation = await gateway.pay()
    gateway.closed.refused["acc_a"] = Exclusion.KILLED
    error = await refused(gateway.payments.capture(gateway.capture(operation.payment_id)))
    assert error.reason is Reason.CONNECTOR_UNAVAILABLE
    assert len(gateway.store.operations) == 1


async def test_an_account_whose_probes_are_taken_is_passed_over() -> None:
    gateway = Routed()
    gateway.closed.not_admitted.add("acc_a")
    await gateway.pay()
    assert gateway.sent() == ["b"]
    gateway.closed.not_admitted |= {"acc_b", "acc_c"}
    error = await refused(gateway.pay("other"))
    assert error.reason is Reason.CONNECTOR_UNAVAILABLE
    assert error.metadata["exclusion"] == "PROBES_TAKEN"
    assert error.retry_after_s == UNAVAILABLE_RETRY_S
    gateway.closed.pauses_s = {"acc_a": 60.0, "acc_b": 2.0, "acc_c": 30.0}  # breakers since opened
    error = await refused(gateway.pay("another"))
    assert (error.metadata["connector"], error.retry_after_s) == ("b", 2.0)


@pytest.mark.parametrize("kind", [OperationKind.AUTHORIZE, OperationKind.CAPTURE])
@pytest.mark.parametrize("late", ["before its intent", "after its intent"])
async def test_a_call_that_is_too_late_to_be_sent_keeps_no_place_of_a_probe(
    kind: OperationKind, late: str
) -> None:
    psp = ScriptedConnector(CAPABLE, "a")
    routes, breaker, now = ManyRoutes(psp), BreakerLimits(probes_max=1), 0.0
    breakers = Breakers(breaker, Unseen(), lambda: now)
    routing = Routing(routes, availability=AccountAvailability(breakers), observer=breakers)
    gateway = Bench(router=routes, routing=routing)
    payment_id = await gateway.authorized()
    method = "card" if kind is OperationKind.AUTHORIZE else ""
    for _ in range(breaker.calls_min):
        segment = Segment(MERCHANT, Mode.TEST, method)
        breakers.observed(segment, Candidate("a", "acc_a"), kind, NO_ANSWER, 0.1)
    now += breaker.pause_s_min

    async def call(gateway: Bench, key: str, deadline: float | None = None) -> None:
        if kind is OperationKind.AUTHORIZE:
            await gateway.payments.authorize(gateway.authorize(key, deadline=deadline))
            return
        command = gateway.capture(payment_id, key, 10)
        command.deadline = deadline
        await gateway.payments.capture(command)

    if late == "before its intent":
        error = await refused(call(gateway, "late", time.monotonic()))
        assert error.reason is Reason.DEADLINE_TOO_SHORT
    else:
        without_time = replace(LIMITS, send_window_s=0.0)
        slow = Bench(router=routes, routing=routing, store=gateway.store, limits=without_time)
        await call(slow, "late")
        assert gateway.store.by_key("late").state is S.NOT_SENT
    await call(gateway, "in time")
    assert gateway.store.by_key("in time").state is S.SUCCEEDED


@pytest.mark.parametrize("kind", [OperationKind.AUTHORIZE, OperationKind.CAPTURE])
@pytest.mark.parametrize("why", ["a duplicate", "the store is away"])
async def test_a_call_that_is_not_sent_keeps_no_place_of_a_probe(
    kind: OperationKind, why: str
) -> None:
    psp = ScriptedConnector(CAPABLE, "a")
    routes, breaker, now = ManyRoutes(psp), BreakerLimits(probes_max=1), 0.0
    breakers = Breakers(breaker, Unseen(), lambda: now)
    routing = Routing(routes, availability=AccountAvailability(breakers), observer=breakers)
    gateway = Bench(router=routes, routing=routing)
    payment_id = await gateway.authorized()

    async def call(key: str) -> None:
        if kind is OperationKind.AUTHORIZE:
            await gateway.payments.authorize(gateway.authorize(key))
        else:
            await gateway.payments.capture(gateway.capture(payment_id, key, 10))

    gate = Gate()
    psp.steps.append(Step(before=gate))
    first = asyncio.ensure_future(call("first"))
    await gate.reached.wait()
    for _ in range(breaker.calls_min):
        segment = Segment(MERCHANT, Mode.TEST, "card" if kind is OperationKind.AUTHORIZE else "")
        breakers.observed(segment, Candidate("a", "acc_a"), kind, NO_ANSWER, 0.1)
    now += breaker.pause_s_min + breaker.pause_s_max

    is_waiting = asyncio.Event()

    async def look(method: str) -> None:
        if method == "write_intent" and why == "the store is away":
            raise StoreUnavailable("away")
        if method == "find_by_key":
            is_waiting.set()

    calls = [first]
    usual, gateway.store.before = gateway.store.before, look
    gateway.claims.available = False
    if why == "the store is away":
        assert (await refused(call("lost"))).reason is Reason.STORE_UNAVAILABLE
    else:
        calls.append(asyncio.ensure_future(call("first")))
        await is_waiting.wait()
    gateway.store.before = usual
    await call("in time")
    assert gateway.store.by_key("in time").state is S.SUCCEEDED
    gate.opened.set()
    await asyncio.gather(*calls)


async def test_a_repeat_that_is_not_sent_keeps_no_place_of_a_probe() -> None:
    gateway = Routed()
    gateway.a.steps.append(UNSENT)
    gateway.closed.not_admitted |= {"acc_b", "acc_c"}
    await gateway.pay()

    async def fail(method: str) -> None:
        if method == "write_change":
            raise StoreUnavailable("away")

    gateway.store.before = fail
    assert (await refused(gateway.pay())).reason is Reason.STORE_UNAVAILABLE
    # That of the intent, whose key was taken, and that of the next attempt.
    assert (gateway.sent(), gateway.closed.given_back) == ([], ["acc_a", "acc_a"])


@pytest.mark.parametrize("is_away", [False, True])
async def test_an_account_of_a_cascade_that_is_not_asked_has_its_place_back(is_away: bool) -> None:
    gateway = Routed()
    gateway.a.steps.append(SOFT)

    usual = gateway.store.before

    async def change(method: str) -> None:
        if method == "write_change":
            gateway.store.before = usual
            if is_away:
                raise StoreUnavailable("away")
            gateway.store.payments[MERCHANT, gateway.operation().payment_id].version += 1

    gateway.store.before = change
    if is_away:
        assert (await refused(gateway.pay())).reason is Reason.STORE_UNAVAILABLE
    else:
        await gateway.pay()
    assert (gateway.sent(), gateway.closed.given_back) == (["a"], ["acc_b"])


async def test_a_rule_with_a_learned_order_asks_the_ranking_within_a_priority() -> None:
    gateway = Routed(
        """
        format = 1
        [[rule]]
        name = "learned"
        order = "learned"
        targets = [
            { account = "acc_a" }, { account = "acc_b" }, { connector = "c", priority = 2 },
        ]
        """
    )
    operation = await gateway.pay()
    told = record.decode(operation.note)
    assert told is not None
    assert [each.connector for each in told.candidates] == ["b", "a", "c"]
    assert [(each.candidate.connector, each.score) for each in told.scores] == [
        ("b", 0.0),
        ("a", -1.0),
    ]


# --- the book of rules ----------------------------------------------------------------------------


async def test_rules_that_cannot_be_read_leave_those_before_in_force(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source(RULES)
    book = RuleBook(source)
    await book.refresh()
    later = AT.replace(year=AT.year + 1)
    source.active = [ActiveRules(MERCHANT, Mode.TEST, 5, "format = 9", later, 2)]
    await book.refresh()
    found = book.find(MERCHANT, Mode.TEST)
    assert found is not None
    assert found[0] == 4
    assert "cannot be read" in caplog.text
    assert book.find(MERCHANT, Mode.LIVE) is None


async def test_rules_that_were_put_out_of_force_decide_nothing() -> None:
    source = Source(RULES)
    book = RuleBook(source)
    await book.refresh()
    later = AT.replace(year=AT.year + 1)
    source.active = [ActiveRules(MERCHANT, Mode.TEST, 0, "", later, 2)]
    await book.refresh()
    assert book.find(MERCHANT, Mode.TEST) is None
