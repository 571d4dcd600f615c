"""Circuit breakers: when calls are refused, and what lets them pass again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.availability import AccountAvailability
from gateway.routing.breakers import (
    PROBE_RIGHT_S,
    BreakerKey,
    BreakerLimits,
    Breakers,
    BreakerState,
    ExchangeUnavailable,
    Report,
    ReportKind,
    Shared,
)
from gateway.routing.model import Candidate, Exclusion, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

PSP = Candidate("psp", "acc_1")
KEY = BreakerKey("psp", "acc_1", "card")
SEGMENT = Segment("mer_1", Mode.TEST, "card")
LIMITS = BreakerLimits()

APPROVED = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
DECLINED = ConnectorAnswer(Delivery.ANSWERED, Verdict.DECLINED)
TIMED_OUT = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)
NO_CONNECTION = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED)
TOO_LATE = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.DEADLINE_TOO_SHORT)


class _Seen:
    def __init__(self) -> None:
        self.states: list[BreakerState] = []

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        self.states.append(state)


class _World:
    """Breakers of one process, and its clock."""

    def __init__(self, limits: BreakerLimits = LIMITS, breakers_max: int = 100) -> None:
        self.now = 1000.0
        self.seen = _Seen()
        self.breakers = Breakers(limits, self.seen, lambda: self.now, breakers_max)

    def call(
        self, answer: ConnectorAnswer, times: int = 1, seconds: float = 0.1, psp: Candidate = PSP
    ) -> None:
        for _ in range(times):
            kind = OperationKind.AUTHORIZE
            self.breakers.observed(SEGMENT, psp, kind, answer, seconds)

    def probe(self, answer: ConnectorAnswer, seconds: float = 0.1) -> Exclusion | None:
        refusal = self.breakers.admit(PSP, "card")
        if refusal is None:
            self.now += seconds
            self.call(answer, seconds=seconds)
        return refusal

    def refusal(self) -> Exclusion | None:
        return self.breakers.refusal(PSP, "card")

    def state(self) -> BreakerState:
        return self.breakers.state(KEY)

    @property
    def pause_s(self) -> float:
        """What is left of it."""
        return self.breakers._breakers[KEY].open_until - self.now

    def pass_pause(self) -> None:
        self.now += self.pause_s + 0.001


@pytest.mark.parametrize("answer", [TIMED_OUT, NO_CONNECTION], ids=["time-out", "no connection"])
def test_failures_of_the_psp_open_the_breaker(answer: ConnectorAnswer) -> None:
    world = _World()
    world.call(answer, LIMITS.calls_min - 1)
    assert world.refusal() is None
    world.call(answer)
    assert world.refusal() is Exclusion.BREAKER_OPEN
    assert world.pause_s == pytest.approx(LIMITS.pause_s_min)


@pytest.mark.parametrize("answer", [DECLINED, TOO_LATE], ids=["decline", "not sent by us"])
def test_what_is_no_failure_of_the_psp_opens_nothing(answer: ConnectorAnswer) -> None:
    world = _World()
    world.call(answer, 10 * LIMITS.calls_min)
    assert world.refusal() is None


def test_failures_below_the_share_open_nothing() -> None:
    world = _World()
    for _ in range(100):
        world.call(APPROVED, 2)
        world.call(TIMED_OUT)
    assert world.refusal() is None


def test_failures_that_have_left_the_window_no_longer_count() -> None:
    world = _World()
    for _ in range(10):
        world.call(TIMED_OUT, LIMITS.calls_min - 1)
        world.now += LIMITS.window_s + 1
    assert world.refusal() is None


def test_a_part_of_the_window_leaves_it_at_a_time() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min // 2)
    world.now += LIMITS.window_s / 2
    world.call(TIMED_OUT, LIMITS.calls_min // 2 - 1)
    world.now += LIMITS.window_s / 2 + LIMITS.window_s / 10
    world.call(TIMED_OUT)  # the first half has left, the second is still there
    assert world.refusal() is None
    world.call(TIMED_OUT, LIMITS.calls_min // 2)
    assert world.refusal() is Exclusion.BREAKER_OPEN


def test_a_place_that_is_given_back_is_free_at_once_unless_an_opening_took_it() -> None:
    world = _World(BreakerLimits(probes_max=2))
    world.breakers.give_back(PSP, "card", 0.1)
    world.call(TIMED_OUT, LIMITS.calls_min)
    world.pass_pause()
    world.now += 1.0
    assert world.breakers.admit(PSP, "card") is None
    assert world.breakers.admit(PSP, "card") is None
    assert world.refusal() is Exclusion.PROBES_TAKEN
    world.now += 0.5
    world.breakers.give_back(PSP, "card", 0.5)
    assert world.refusal() is None
    world.call(TIMED_OUT, seconds=0.1)  # the other probe
    world.pass_pause()
    assert world.breakers.admit(PSP, "card") is None
    assert world.breakers.admit(PSP, "card") is None
    world.breakers.give_back(PSP, "card", 60.0)  # from before
    assert world.refusal() is Exclusion.PROBES_TAKEN


def test_methods_and_accounts_have_breakers_of_their_own() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    assert world.breakers.refusal(PSP, "ideal") is None
    assert world.breakers.refusal(PSP, "") is None
    assert world.breakers.refusal(PSP._replace(connector_account_id="acc_2"), "card") is None


def test_an_account_far_slower_than_it_was_is_left_alone() -> None:
    world = _World()
    for _ in range(100):
        world.now += 2
        world.call(APPROVED, seconds=0.2)
    world.call(APPROVED, LIMITS.calls_min * 10, seconds=2.5)
    assert world.refusal() is Exclusion.BREAKER_OPEN


def test_an_account_that_has_always_been_slow_is_no_outlier() -> None:
    world = _World()
    for _ in range(300):
        world.now += 2
        world.call(APPROVED, seconds=2.5)
    # Its first calls, before anything was known of it, are slow by the largest limit alone.
    assert world.seen.states == []


def test_the_pause_that_is_told_lasts_until_the_next_probe() -> None:
    world = _World()
    available = AccountAvailability(world.breakers, lambda: world.now)
    assert available.pause_s(PSP, "card") is None
    world.call(TIMED_OUT, LIMITS.calls_min)
    assert available.pause_s(PSP, "card") == pytest.approx(LIMITS.pause_s_min)
    assert available.pause_s(PSP, "ideal") is None
    world.now += LIMITS.pause_s_min / 4
    assert available.pause_s(PSP, "card") == pytest.approx(LIMITS.pause_s_min * 3 / 4)
    assert available.refusal(PSP, "card") is Exclusion.BREAKER_OPEN
    world.pass_pause()
    assert available.pause_s(PSP, "card") is None
    assert available.refusal(PSP, "card") is None


def test_half_open_lets_a_limited_number_of_probes_through() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    assert world.breakers.admit(PSP, "card") is Exclusion.BREAKER_OPEN
    world.pass_pause()
    for _ in range(LIMITS.probes_max):
        assert world.refusal() is None  # it only looks
        assert world.breakers.admit(PSP, "card") is None
    assert world.refusal() is Exclusion.PROBES_TAKEN
    assert world.breakers.admit(PSP, "card") is Exclusion.PROBES_TAKEN


def test_good_probes_close_the_breaker() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    world.pass_pause()
    for _ in range(LIMITS.probes_good):
        assert world.state() is BreakerState.HALF_OPEN
        assert world.probe(DECLINED) is None  # an answer as good as any
    assert world.state() is BreakerState.CLOSED
    world.call(TIMED_OUT, LIMITS.calls_min - 1)  # its window began anew
    assert world.refusal() is None
    assert world.seen.states == [BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED]


def test_each_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    pauses_s = []
    for _ in range(6):
        pauses_s.append(round(world.pause_s))
        world.pass_pause()
        assert world.probe(TIMED_OUT) is None
        assert world.state() is BreakerState.OPEN
    assert pauses_s == [5, 10, 20, 40, 60, 60]


def test_a_slow_probe_is_no_good_one() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    world.pass_pause()
    assert world.probe(APPROVED, LIMITS.slow_s_max + 1) is None
    assert world.state() is BreakerState.OPEN


def test_what_was_sent_before_the_pause_was_over_is_no_probe() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    world.pass_pause()
    assert world.breakers.admit(PSP, "card") is None
    world.call(TIMED_OUT, seconds=30.0)
    assert world.state() is BreakerState.HALF_OPEN
    world.call(APPROVED, LIMITS.probes_good, seconds=30.0)
    assert world.state() is BreakerState.HALF_OPEN


def test_a_probe_that_nobody_observes_gives_its_place_back() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    world.pass_pause()
    for _ in range(LIMITS.probes_max):
        assert world.breakers.admit(PSP, "card") is None
    world.now += LIMITS.probe_life_s + 1
    assert world.refusal() is None


def test_a_probe_that_was_never_sent_gives_its_place_back() -> None:
    world = _World()
    world.call(TIMED_OUT, LIMITS.calls_min)
    world.pass_pause()
    for _ in range(LIMITS.probes_max + 1):
        assert world.probe(TOO_LATE) is None
    assert world.state() is BreakerState.HALF_OPEN


def test_breakers_in_memory_are_bounded_and_open_ones_are_kept() -> None:
    world = _World(breakers_max=10)
    world.call(TIMED_OUT, LIMITS.calls_min)
    for number in range(50):
        world.call(APPROVED, psp=Candidate("psp", f"acc_other_{number}"))
    assert world.refusal() is Exclusion.BREAKER_OPEN
    assert len(world.breakers._breakers) == 10


# --- several processes ----------------------------------------------------------------------------


class _Exchange:
    """A stand-in for what is between processes; Redis' own is tested with Redis."""

    def __init__(self, shared: Sequence[Shared] = (), *, away: bool = False) -> None:
        self.shared = shared
        self.reports: list[Report] = []
        self.away = away

    async def exchange(self, reports: Sequence[Report]) -> Sequence[Shared]:
        if self.away:
            raise ExchangeUnavailable("away")
        self.reports += reports
        return self.shared


async def test_what_another_process_saw_is_taken_over() -> None:
    world = _World()
    exchange = _Exchange([Shared(KEY, 7, 5.0, 1, False)])
    await world.breakers.synchronize(exchange)
    assert world.refusal() is Exclusion.BREAKER_OPEN
    exchange.shared = ()
    await world.breakers.synchronize(exchange)
    assert world.refusal() is None


async def test_only_the_process_that_was_granted_the_probes_tries() -> None:
    world = _World()
    exchange = _Exchange([Shared(KEY, 7, 0.0, 1, False)])
    await world.breakers.synchronize(exchange)
    assert world.refusal() is Exclusion.BREAKER_OPEN  # wanted now
    await world.breakers.synchronize(exchange)
    assert exchange.reports == [Report(ReportKind.WANTS_PROBES, KEY, PROBE_RIGHT_S, version=7)]
    exchange.shared = [Shared(KEY, 7, 0.0, 1, True)]
    await world.breakers.synchronize(exchange)
    for _ in range(LIMITS.probes_good):
        assert world.probe(APPROVED) is None
    exchange.reports.clear()
    exchange.shared = ()
    await world.breakers.synchronize(exchange)
    assert exchange.reports == [Report(ReportKind.CLOSED, KEY, version=7)]


async def test_calls_that_come_when_the_right_to_probe_has_lapsed_close_a_breaker_too() -> None:
    world = _World()
    others, mine = ([Shared(KEY, 7, 0.0, 1, each)] for each in (False, True))
    exchange = _Exchange(others)
    await world.breakers.synchronize(exchange)
    tried = []
    for _ in range(LIMITS.probes_good):
        tried.append(world.probe(APPROVED))
        for exchange.shared in (mine, others):  # granted, and lapsed before the next call
            await world.breakers.synchronize(exchange)
            world.now += PROBE_RIGHT_S
        tried.append(world.probe(APPROVED))
    await world.breakers.synchronize(exchange)
    assert tried == [Exclusion.BREAKER_OPEN, None] * LIMITS.probes_good
    assert exchange.reports[-1].kind is ReportKind.CLOSED


async def test_where_the_right_to_probe_has_lapsed_one_call_alone_is_a_probe() -> None:
    world = _World()
    for is_mine in (True, False):
        await world.breakers.synchronize(_Exchange([Shared(KEY, 7, 0.0, 1, is_mine)]))
    assert world.refusal() is None
    assert world.breakers.admit(PSP, "card") is None
    assert world.breakers.admit(PSP, "card") is Exclusion.BREAKER_OPEN


async def test_a_process_that_others_probe_for_waits_however_long_that_takes() -> None:
    world = _World()
    for _ in range(10):
        await world.breakers.synchronize(_Exchange([Shared(KEY, 7, 0.0, 1, False)]))
        assert world.refusal() is Exclusion.BREAKER_OPEN
        world.now += PROBE_RIGHT_S


async def test_a_probe_that_nobody_observes_keeps_the_right_no_longer_than_its_place() -> None:
    """Otherwise a process without calls would keep all others from the account."""
    world = _World()
    exchange = _Exchange([Shared(KEY, 7, 0.0, 1, True)])
    await world.breakers.synchronize(exchange)
    assert world.breakers.admit(PSP, "card") is None
    asked = []
    for passed_s in (0.0, LIMITS.probe_life_s - 1, 1.0, 1.0):
        world.now += passed_s
        exchange.reports.clear()
        await world.breakers.synchronize(exchange)
        asked.append([report.kind for report in exchange.reports])
    wants = [ReportKind.WANTS_PROBES]
    assert asked == [wants, wants, [], []]


async def test_a_right_to_probe_that_no_call_uses_is_left_to_others() -> None:
    """As where payments that could go there have other accounts before it, or are explained."""
    world = _World()
    exchange = _Exchange([Shared(KEY, 7, 0.0, 1, True)])
    await world.breakers.synchronize(exchange)
    for _ in range(3):
        assert world.refusal() is None
        await world.breakers.synchronize(exchange)
    assert exchange.reports == []
    assert world.probe(APPROVED) is None
    await world.breakers.synchronize(exchange)
    assert [report.kind for report in exchange.reports] == [ReportKind.WANTS_PROBES]


async def test_the_right_to_probe_is_asked_for_at_once_and_then_with_what_is_told() -> None:
    world = _World()
    exchange = _Exchange([Shared(KEY, 7, 0.0, 1, False)])
    await world.breakers.synchronize(exchange)
    told = world.breakers._told
    woken = []
    for _ in range(3):
        assert world.refusal() is Exclusion.BREAKER_OPEN
        woken.append(told.is_set())
        told.clear()
        await world.breakers.synchronize(exchange)
    assert woken == [True, False, False]
    assert [report.kind for report in exchange.reports] == [ReportKind.WANTS_PROBES] * 3


async def test_a_process_that_hears_of_nobody_probes_itself() -> None:
    world = _World()
    exchange = _Exchange([Shared(KEY, 7, 0.0, 1, False)])
    await world.breakers.synchronize(exchange)
    assert world.refusal() is Exclusion.BREAKER_OPEN
    exchange.away = True
    await world.breakers.synchronize(exchange)
    assert world.refusal() is None
    for _ in range(LIMITS.probes_good):
        assert world.probe(APPROVED) is None
    assert world.state() is BreakerState.CLOSED


async def test_an_opening_is_told_until_it_was_heard() -> None:
    world = _World()
    exchange = _Exchange(away=True)
    world.call(TIMED_OUT, LIMITS.calls_min)
    await world.breakers.synchronize(exchange)
    assert world.refusal() is Exclusion.BREAKER_OPEN
    exchange.away = False
    exchange.shared = [Shared(KEY, 8, 5.0, 1, False)]
    await world.breakers.synchronize(exchange)
    assert [report.kind for report in exchange.reports] == [ReportKind.OPENED]
    await world.breakers.synchronize(exchange)
    assert len(exchange.reports) == 1
    assert world.seen.states == [BreakerState.OPEN]


async def test_an_opening_that_is_told_late_is_told_with_what_is_left_of_its_pause() -> None:
    """Otherwise processes that have found the PSP well since would leave it alone anew."""
    for late_s, left_s in ((0.0, [5.0]), (2.0, [3.0]), (5.0, []), (600.0, [])):
        world = _World()
        exchange = _Exchange(away=True)
        world.call(TIMED_OUT, LIMITS.calls_min)
        await world.breakers.synchronize(exchange)
        world.now += late_s
        exchange.away = False
        for _ in range(2):
            await world.breakers.synchronize(exchange)
        assert [report.s for report in exchange.reports] == pytest.approx(left_s)
        assert world.state() is not BreakerState.CLOSED


async def test_an_opening_during_an_exchange_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, told = _World(), asyncio.Event()

    class Slow(_Exchange):
        async def exchange(self, reports: Sequence[Report]) -> Sequence[Shared]:
            if reports:
                told.set()
            else:
                world.call(TIMED_OUT, LIMITS.calls_min)
            return ()

    interval_s, pauses_s = 1e6, []

    async def pause(seconds: float) -> None:
        pauses_s.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    running = asyncio.create_task(world.breakers.run(Slow(), interval_s))
    try:
        async with asyncio.timeout(30):
            await told.wait()
    finally:
        running.cancel()
    assert pauses_s == [interval_s / 10]
