"""gateway.application.admission: a simulated gateway, with its time, under loads of every kind."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

import pytest

from gateway.application.admission import (
    BASE_WINDOW_S,
    CALM_TICKS,
    FAIR_EXCESS,
    JITTER_STEPS,
    PATIENCE_TICKS,
    PRESSURE_LEVELS,
    TICK_S,
    TICK_S_MAX,
    AdmissionLimits,
    Gate,
    GateLimits,
    RefusedBy,
    Stage,
    Work,
    open_gates,
)
from gateway.domain.errors import GatewayError, Reason

STAGES: Final = (Stage.CLAIM, Stage.INTENT, Stage.OUTCOME)
LIMITS: Final = GateLimits(
    working_max=2000, working_min=32, in_flight_max=10_000, target_s=0.015, bulk_target_s=0.1
)
DECIDE_S, REFUSE_S, WORK_S, DATABASE_S = 40e-6, 20e-6, 60e-6, 1.5e-3
CLAIM_S: Final = 0.5e-3
CALLER: Final = "mer_caller"
CAPACITY: Final = 1 / (DECIDE_S + 2 * WORK_S)
"""Calls that the simulated gateway can serve in a second."""


@dataclass
class Simulation:
    """A gateway with one thread and two writes for each call, each with a database's delay.

    What waits for the thread waits in order, arrivals too: as on an event loop.
    """

    limits: GateLimits = LIMITS
    psp_s: Callable[[random.Random], float] = lambda _: 0.0
    database_s: float = DATABASE_S
    now: float = 0.0
    latencies: list[tuple[float, str, float]] = field(default_factory=list)
    """When a call was answered, its merchant, and how long it took without its PSP."""
    refusals: list[tuple[float, str]] = field(default_factory=list)
    engaged_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(1)
        self.gate = Gate(self.limits, STAGES, clock=lambda: self.now, uniform=self.random.random)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._thread: deque[tuple[float, Callable[[], None]]] = deque()
        self._busy = False
        self._stalled_until = 0.0
        self._callers_until = 0.0

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def arrive(
        self,
        rate: float,
        until: float,
        merchant: str = "mer_1",
        work: Work = Work.PAYMENT,
        start: float = 0.0,
    ) -> None:
        """Poisson arrivals of a merchant's calls."""

        def one() -> None:
            arrived = self.now
            self._run(DECIDE_S, lambda: self._decide(arrived, merchant, work))
            following = arrived + self.random.expovariate(rate)
            if following < until:
                self.at(following, one)

        self.at(start, one)

    def stall(self, when: float, seconds: float) -> None:
        """The database answers nothing for a while."""

        def begin() -> None:
            self._stalled_until = when + seconds

        self.at(when, begin)

    def run(self) -> None:
        """To the end of all that was begun."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
            if self.gate.engaged:
                self.engaged_at.append(self.now)

    def _run(self, cost_s: float, work: Callable[[], None]) -> None:
        self._thread.append((cost_s, work))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._thread)
        if self._thread:
            cost_s, work = self._thread.popleft()

            def done() -> None:
                work()
                self._next()

            self.at(self.now + cost_s, done)

    def _write(self, then: Callable[[], None]) -> None:
        delay_s = self.database_s * self.random.uniform(0.7, 1.5)
        self.at(max(self.now + delay_s, self._stalled_until), lambda: self._run(WORK_S, then))

    def call_in_turn(self, callers: int, until: float) -> None:
        """Callers that wait for their answers before they call again."""
        self._callers_until = until
        for _ in range(callers):
            self.at(self.now, lambda: self._decide(self.now, CALLER, Work.PAYMENT))

    def _decide(self, arrived: float, merchant: str, work: Work) -> None:
        try:
            self.gate.admit(merchant, work)
        except GatewayError:
            self.refusals.append((self.now, merchant))
            self._run(REFUSE_S, lambda: None)
            return
        admitted = self.now
        self.gate.passed(Stage.CLAIM, CLAIM_S)

        def intent_written() -> None:
            self.gate.passed(Stage.INTENT, self.now - admitted)
            self.gate.leave(merchant)
            psp_s = self.psp_s(self.random)
            self.at(self.now + psp_s, lambda: answered(psp_s))

        def answered(psp_s: float) -> None:
            self.gate.come_back(merchant)
            back = self.now
            self._write(lambda: outcome_written(psp_s, back))

        def outcome_written(psp_s: float, back: float) -> None:
            self.gate.passed(Stage.OUTCOME, self.now - back)
            self.gate.release(merchant)
            self.latencies.append((self.now, merchant, self.now - arrived - psp_s))
            if merchant == CALLER and self.now < self._callers_until:
                again = self.now
                self._run(DECIDE_S, lambda: self._decide(again, merchant, work))

        self._write(intent_written)

    # --- what came of it ---

    def answered(self, since: float = 0.0, merchant: str | None = None) -> int:
        return sum(when >= since and merchant in (None, name) for when, name, _ in self.latencies)

    def refused(self, since: float = 0.0, merchant: str | None = None) -> int:
        return sum(when >= since and merchant in (None, name) for when, name in self.refusals)

    def latency_s(self, part: float, since: float = 0.0) -> float:
        taken = sorted(seconds for when, _, seconds in self.latencies if when >= since)
        return taken[int(part * (len(taken) - 1))]


def simulate(**fields: Any) -> Simulation:
    return Simulation(**fields)


def enter(gate: Gate, merchant: str, then: Callable[[str], None] = lambda _: None) -> int:
    """Calls of a merchant enter until one is refused; how many did."""
    for entered in count():
        try:
            gate.admit(merchant, Work.PAYMENT)
        except GatewayError:
            return entered
        then(merchant)
    raise AssertionError


# --- below saturation -----------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_below_saturation_nothing_is_refused(load: float) -> None:
    gateway = simulate()
    gateway.arrive(load * CAPACITY, until=4)
    gateway.run()
    assert gateway.refused() == 0
    assert gateway.engaged_at == []


def test_thousands_of_calls_at_a_slow_psp_are_no_overload() -> None:
    gateway = simulate(psp_s=lambda source: source.uniform(2, 4))
    gateway.arrive(2000, until=5)
    gateway.at(4.0, lambda: inside.append((gateway.gate.in_flight, gateway.gate.working)))
    inside: list[tuple[int, int]] = []
    gateway.run()
    in_flight, working = inside[0]
    assert in_flight > 4000
    assert working < LIMITS.working_min
    assert gateway.refused() == 0
    assert gateway.engaged_at == []


def test_psp_that_becomes_slow_at_once_is_no_overload() -> None:
    gateway = simulate()
    gateway.psp_s = lambda _: 0.1 if gateway.now < 1 else 3.0
    gateway.arrive(2000, until=4)
    gateway.run()
    assert gateway.refused() == 0
    assert gateway.engaged_at == []


@pytest.mark.parametrize("stall_s", [0.1, 0.3])
def test_database_that_pauses_and_the_queue_that_it_leaves_are_no_overload(stall_s: float) -> None:
    gateway = simulate()
    gateway.arrive(0.6 * CAPACITY, until=4)
    gateway.stall(2.0, stall_s)
    gateway.run()
    assert gateway.latency_s(1.0) > 0.9 * stall_s
    assert gateway.refused() == 0


def test_slow_database_is_no_overload() -> None:
    gateway = simulate(database_s=0.025)
    gateway.arrive(0.7 * CAPACITY, until=4)
    gateway.run()
    assert gateway.refused() == 0


def test_many_callers_that_wait_for_their_answers_are_no_overload() -> None:
    gateway = simulate()
    gateway.arrive(1000, until=1)
    gateway.at(1.0, lambda: gateway.call_in_turn(300, until=4))
    gateway.run()
    assert gateway.latency_s(0.5, 1.5) > 2 * (LIMITS.target_s + 2 * gateway.gate.base_s)
    assert gateway.refused() == 0


@pytest.mark.parametrize(
    ("taken_s", "is_overload"),
    [(LIMITS.bulk_target_s / 2, False), (2 * LIMITS.bulk_target_s, True)],
)
def test_queue_that_does_not_grow_is_an_overload_only_beyond_the_larger_target(
    taken_s: float, is_overload: bool
) -> None:
    now = 0.0
    gate = Gate(LIMITS, STAGES, clock=lambda: now)
    for _ in range(100):
        gate.admit("mer_1", Work.PAYMENT)
    for number in range(2000):
        now += 0.001
        for stage in STAGES:
            gate.passed(stage, 0.001 if number < 500 else taken_s / len(STAGES))
        gate.release("mer_1")
        with suppress(GatewayError):
            gate.admit("mer_1", Work.PAYMENT)
        if gate.engaged:
            break
    assert gate.engaged is is_overload


def test_an_overload_begins_with_its_limit_and_does_not_end_with_its_first_calm() -> None:
    now = 0.0
    gate = Gate(LIMITS, STAGES, clock=lambda: now)
    gate._calm_ticks = CALM_TICKS  # as the last one left it

    def tick(stage_s: float) -> None:
        nonlocal now
        now += 2 * TICK_S_MAX
        for stage in STAGES:
            gate.passed(stage, stage_s)
        while gate.working:
            gate.release("mer_1")
        gate.admit("mer_1", Work.PAYMENT)

    tick(0.001)
    while not gate.engaged:
        assert now < 10 * PATIENCE_TICKS
        for _ in range(100):
            gate.admit("mer_1", Work.PAYMENT)
        tick(1.0)
    assert gate.limit == LIMITS.working_min
    tick(0.001)
    assert gate.engaged


@pytest.mark.parametrize(
    ("stage_s", "refuses", "ends"),
    [(0.0001, False, True), (0.0001, True, False), (1.0, False, False)],
)
def test_an_overload_ends_after_so_many_ticks_in_time_that_refused_nobody(
    stage_s: float, refuses: bool, ends: bool
) -> None:
    now = 0.0
    gate = Gate(replace(LIMITS, working_min=1), STAGES, clock=lambda: now)
    gate.engaged = True
    gate.admit("mer_1", Work.PAYMENT)
    for _ in range(CALM_TICKS):
        assert gate.engaged
        gate.limit = 2.0  # whatever it became
        if refuses:
            gate.admit("mer_1", Work.PAYMENT)
            with pytest.raises(GatewayError):
                gate.admit("mer_1", Work.PAYMENT)
            gate.release("mer_1")
        now += 2 * TICK_S_MAX
        for stage in STAGES:
            gate.passed(stage, stage_s)
        gate.release("mer_1")
        gate.admit("mer_1", Work.PAYMENT)
    assert gate.engaged is not ends


def test_what_is_taken_unhindered_is_the_least_of_one_window_to_two() -> None:
    now = 1_000.0
    gate = Gate(LIMITS, STAGES, clock=lambda: now)

    def pass_for(seconds: float, stage_s: float) -> None:
        nonlocal now
        until = now + seconds
        while now < until:
            now += TICK_S_MAX
            for stage in STAGES:
                gate.passed(stage, stage_s)
            gate.admit("mer_1", Work.PAYMENT)
            gate.release("mer_1")

    pass_for(1.0, 0.001)
    pass_for(BASE_WINDOW_S, 0.002)
    assert gate.base_s == pytest.approx(0.003)
    pass_for(BASE_WINDOW_S, 0.002)
    assert gate.base_s == pytest.approx(0.006)


def test_time_without_calls_does_not_change_what_is_taken_for_unhindered() -> None:
    gateway = simulate()
    gateway.arrive(1000, until=1)
    bases: list[float] = []
    gateway.at(1.0, lambda: bases.append(gateway.gate.base_s))
    gateway.arrive(1, until=20, start=2)
    gateway.run()
    assert gateway.gate.base_s > 0.8 * bases[0] > 0


# --- beyond ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [1.1, 1.5, 2.0])
def test_an_overload_is_held_far_below_the_time_that_began_it(load: float) -> None:
    limits = replace(LIMITS, target_s=0.1, bulk_target_s=1.0)
    gateway = simulate(limits=limits)
    gateway.arrive(load * CAPACITY, until=8)
    gateway.run()
    assert gateway.refused() > 0
    assert gateway.latency_s(1.0) > limits.target_s
    assert gateway.latency_s(0.95, 3.0) < 0.5 * limits.target_s


@pytest.mark.parametrize("load", [1.1, 1.5, 2.0])
def test_beyond_capacity_calls_are_refused_and_the_accepted_keep_their_latency(
    load: float,
) -> None:
    gateway = simulate()
    gateway.arrive(load * CAPACITY, until=6)
    gateway.run()
    # Once the limit has been found:
    assert gateway.refused(1.0) > 0
    assert gateway.latency_s(0.5, 1.0) < 4 * LIMITS.target_s
    # What is left of the thread when the refusals are paid.
    refusal_s = DECIDE_S + REFUSE_S
    left = 1 - load * CAPACITY * refusal_s
    possible = min(CAPACITY, left / (1 / CAPACITY - refusal_s))
    assert gateway.answered(1.0) / 5 > 0.85 * possible


def test_without_a_limit_the_same_load_would_be_answered_late() -> None:
    gateway = simulate(
        limits=replace(
            LIMITS, working_max=80_000, in_flight_max=100_000, target_s=1e6, bulk_target_s=1e6
        )
    )
    gateway.arrive(1.5 * CAPACITY, until=3)
    gateway.run()
    assert gateway.refused() == 0
    assert gateway.latency_s(0.5) > 20 * LIMITS.target_s


def test_limit_converges_on_what_holds_the_target() -> None:
    gateway = simulate()
    gateway.arrive(1.5 * CAPACITY, until=6)
    limits: list[float] = []
    for tick in range(40):
        gateway.at(4 + tick / 20, lambda: limits.append(gateway.gate.limit))
    gateway.run()
    assert max(limits) < 2 * min(limits)
    assert LIMITS.working_min < min(limits)
    assert max(limits) < LIMITS.working_max / 10


def test_limit_goes_off_after_the_overload() -> None:
    gateway = simulate()
    gateway.arrive(2 * CAPACITY, until=3)
    gateway.arrive(0.5 * CAPACITY, until=8, start=3)
    gateway.run()
    assert gateway.refused(2.0) > 0
    assert gateway.refused(4.0) == 0
    assert not gateway.gate.engaged
    assert gateway.gate.limit == LIMITS.working_max


def test_limit_goes_off_where_no_call_came_for_long() -> None:
    gateway = simulate()
    gateway.arrive(2 * CAPACITY, until=2)
    gateway.arrive(100, until=63, start=60)
    gateway.run()
    assert gateway.refused(2.0) > 0
    assert gateway.refused(60.0) == 0


@pytest.mark.parametrize(
    ("engaged", "stage_s", "tick_s"),
    [(False, 0.125, TICK_S), (True, 0.001, TICK_S), (True, 0.125, 0.375), (True, 8.0, TICK_S_MAX)],
)
def test_under_overload_a_tick_takes_as_long_as_what_it_controls_up_to_its_most(
    engaged: bool, stage_s: float, tick_s: float
) -> None:
    now = 0.0
    gate = Gate(LIMITS, STAGES, clock=lambda: now)
    gate.engaged = engaged
    for stage in STAGES:
        gate.passed(stage, stage_s)
    now = TICK_S_MAX
    gate.admit("mer_1", Work.PAYMENT)
    assert gate._next_tick == now + tick_s


def test_stages_that_have_become_slower_for_good_are_not_refused_for_ever() -> None:
    gateway = simulate()
    gateway.arrive(2000, until=40)

    def slow() -> None:
        gateway.database_s = 0.03

    gateway.at(2.0, slow)
    gateway.run()
    assert gateway.refused(35.0) < 0.02 * 2000 * 5


def test_calls_inside_never_exceed_the_bounds() -> None:
    limits = replace(LIMITS, working_max=100, in_flight_max=300)
    gateway = simulate(limits=limits, psp_s=lambda _: 1.0)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((gateway.gate.working, gateway.gate.in_flight))
        if gateway.now < 3:
            gateway.at(gateway.now + 0.001, look)

    for number in range(50):
        gateway.arrive(CAPACITY / 10, until=3, merchant=f"mer_{number}")
    gateway.at(0.0, look)
    gateway.run()
    assert max(in_flight for _, in_flight in seen) <= limits.in_flight_max
    bound = {by for _, by in gateway.gate.refused}
    assert RefusedBy.IN_FLIGHT in bound


# --- fairness -------------------------------------------------------------------------------------


def test_flood_of_one_merchant_leaves_the_calls_of_another_accepted() -> None:
    gateway = simulate()
    gateway.arrive(1.8 * CAPACITY, until=6, merchant="mer_flood")
    gateway.arrive(0.05 * CAPACITY, until=6, merchant="mer_small")
    gateway.run()
    assert gateway.refused(1.0, "mer_flood") > 0.2 * CAPACITY * 5
    small = gateway.answered(1.0, "mer_small")
    assert gateway.refused(1.0, "mer_small") <= 0.02 * small


def test_two_merchants_that_both_want_more_get_about_the_same() -> None:
    gateway = simulate()
    gateway.arrive(1.3 * CAPACITY, until=6, merchant="mer_flood")
    gateway.arrive(0.6 * CAPACITY, until=6, merchant="mer_other")
    gateway.run()
    flood, other = (gateway.answered(1.0, name) for name in ("mer_flood", "mer_other"))
    assert 0.6 < other / flood < 1.7


def test_merchant_with_a_slow_psp_leaves_room_for_others() -> None:
    limits = replace(LIMITS, in_flight_max=1000, working_max=500)
    gate = Gate(limits, STAGES, clock=lambda: 0.0)
    assert 500 < enter(gate, "mer_slow", gate.leave) < 1000
    for _ in range(50):
        gate.admit("mer_other", Work.PAYMENT)
        gate.leave("mer_other")
    assert gate.in_flight <= limits.in_flight_max


@pytest.mark.parametrize("in_flight_max", [8, 80])
def test_a_lone_merchant_leaves_an_eighth_to_newcomers(in_flight_max: int) -> None:
    limits = replace(LIMITS, working_max=1, working_min=1, in_flight_max=in_flight_max)
    gate = Gate(limits, STAGES, clock=lambda: 0.0)
    assert enter(gate, "mer_slow", gate.leave) == in_flight_max * 7 / 8
    assert enter(gate, "mer_other", gate.leave) == in_flight_max / 8
    assert gate.in_flight == in_flight_max
    with pytest.raises(GatewayError):
        gate.admit("mer_third", Work.PAYMENT)


def test_a_newcomer_s_first_call_enters_where_it_is_no_more_than_an_equal_share() -> None:
    limits = replace(LIMITS, working_max=1, working_min=1, in_flight_max=8)
    gate = Gate(limits, STAGES, clock=lambda: 0.0)
    for merchant, calls in (("mer_1", 3), ("mer_2", 2), ("mer_3", 2), ("mer_4", 1)):
        for _ in range(calls):
            gate.admit(merchant, Work.PAYMENT)
            gate.leave(merchant)


def test_at_the_bound_of_all_calls_a_merchant_has_an_equal_share_and_no_more() -> None:
    limits = replace(LIMITS, working_max=1, working_min=1, in_flight_max=81)
    gate = Gate(limits, STAGES, clock=lambda: 0.0)
    for merchant, calls in (("mer_1", 45), ("mer_2", 25)):
        for _ in range(calls):
            gate.admit(merchant, Work.PAYMENT)
            gate.leave(merchant)
    # A third of it: as if one more merchant were about to come.
    assert enter(gate, "mer_2", gate.leave) == 27 - 25


@pytest.mark.parametrize(
    ("working_max", "inside", "enters"), [(8, (4, 1, 1, 1, 1), 1), (8, (8,), 4), (2, (1, 1), 0)]
)
def test_at_the_limit_a_newcomer_has_an_equal_share_and_no_more(
    working_max: int, inside: tuple[int, ...], enters: int
) -> None:
    limits = replace(LIMITS, working_max=working_max, working_min=1)
    gate = Gate(limits, STAGES, clock=lambda: 0.0)
    for number, calls in enumerate(inside):
        for _ in range(calls):
            gate.admit(f"mer_{number}", Work.PAYMENT)
    assert enter(gate, "mer_new") == enters


def test_merchant_below_its_share_enters_where_one_above_is_refused() -> None:
    limits = replace(LIMITS, working_max=40, working_min=4)
    gate = Gate(limits, STAGES, clock=lambda: 0.0)
    for _ in range(40):
        gate.admit("mer_flood", Work.PAYMENT)
    with pytest.raises(GatewayError):
        gate.admit("mer_flood", Work.PAYMENT)
    assert enter(gate, "mer_other") == 20
    assert gate.working <= FAIR_EXCESS * limits.working_max


def test_items_leave_room_for_single_calls_under_overload() -> None:
    gateway = simulate()
    gateway.arrive(1.5 * CAPACITY, until=6, work=Work.ITEM)
    gateway.arrive(0.1 * CAPACITY, until=6, work=Work.PAYMENT)
    gateway.run()
    gate = gateway.gate
    items, calls = (
        gate.refused.get((work, RefusedBy.LIMIT), 0) for work in (Work.ITEM, Work.PAYMENT)
    )
    assert calls / gate.admitted[Work.PAYMENT] < 0.3 * items / gate.admitted[Work.ITEM]


def test_items_alone_may_take_longer_than_single_calls() -> None:
    delays_s = {}
    for work in (Work.ITEM, Work.PAYMENT):
        gateway = simulate()
        gateway.arrive(1.5 * CAPACITY, until=5, work=work)
        gateway.run()
        delays_s[work] = gateway.latency_s(0.5, 2.0)
    assert delays_s[Work.ITEM] > 2 * delays_s[Work.PAYMENT]
    assert delays_s[Work.ITEM] < 3 * LIMITS.bulk_target_s


def test_stage_that_nobody_passes_any_more_is_forgotten() -> None:
    now = 0.0
    gate = Gate(LIMITS, STAGES, clock=lambda: now)

    def pass_for(seconds: float, *stages: Stage) -> None:
        nonlocal now
        until = now + seconds
        while now < until:
            now += 0.001
            for stage in stages:
                gate.passed(stage, 0.2 if stage is Stage.OUTCOME else 0.001)
            gate.admit("mer_1", Work.PAYMENT)
            gate.release("mer_1")

    pass_for(1.0, *STAGES)
    assert gate.delay_s > 0.2
    pass_for(2.0, Stage.CLAIM)
    assert gate.delay_s < LIMITS.target_s


# --- accounts -------------------------------------------------------------------------------------


def test_merchants_that_have_left_cost_no_memory() -> None:
    gate = Gate(LIMITS, STAGES, clock=lambda: 0.0)
    for number in range(5000):
        merchant = f"mer_{number}"
        gate.admit(merchant, Work.PAYMENT)
        gate.leave(merchant)
        gate.come_back(merchant)
        gate.release(merchant)
        assert gate.merchants == 0
    assert (gate.working, gate.in_flight) == (0, 0)


def test_call_that_goes_on_without_its_caller_counts_until_it_ends() -> None:
    gate = Gate(LIMITS, STAGES, clock=lambda: 0.0)
    gate.admit("mer_1", Work.PAYMENT)
    gate.leave("mer_1")  # to its PSP
    gate.carry("mer_1")  # its caller goes
    gate.release("mer_1")
    assert (gate.working, gate.in_flight, gate.merchants) == (0, 1, 1)
    gate.come_back("mer_1")
    assert (gate.working, gate.in_flight) == (1, 1)
    gate.release("mer_1")
    assert (gate.working, gate.in_flight, gate.merchants) == (0, 0, 0)


def test_any_order_of_calls_leaves_nothing_behind() -> None:
    source = random.Random(7)
    gate = Gate(replace(LIMITS, working_max=60, in_flight_max=90), STAGES, clock=lambda: 0.0)
    calls: list[tuple[str, bool]] = []  # merchant, whether away
    for _ in range(20_000):
        if source.random() < 0.5 or not calls:
            merchant = f"mer_{source.randrange(12)}"
            try:
                gate.admit(merchant, Work.PAYMENT)
            except GatewayError:
                continue
            calls.append((merchant, False))
            continue
        index = source.randrange(len(calls))
        merchant, away = calls.pop(index)
        if away:
            gate.come_back(merchant)
            calls.append((merchant, False))
        elif source.random() < 0.5:
            gate.leave(merchant)
            calls.append((merchant, True))
        else:
            gate.release(merchant)
        inside = Counter(name for name, _ in calls)
        assert gate.merchants == len(inside)
        assert gate.in_flight == len(calls)
        assert gate.working == sum(not away for _, away in calls)
        working = Counter(name for name, away in calls if not away)
        assert gate._working_merchants == len(working)
        assert {name: share.working for name, share in gate._shares.items()} == {
            name: working[name] for name in inside
        }
    for merchant, away in calls:
        if away:
            gate.come_back(merchant)
        gate.release(merchant)
    assert (gate.working, gate.in_flight, gate.merchants) == (0, 0, 0)


def test_pauses_are_positive_spread_few_and_longer_under_more_pressure() -> None:
    def pauses(load: float) -> list[float]:
        now = 0.0
        gate = Gate(replace(LIMITS, working_max=1, working_min=1), STAGES, clock=lambda: now)
        gate.admit("mer_1", Work.PAYMENT)
        told: list[float] = []
        for number in range(5000):
            now += 0.001
            gate.passed(Stage.OUTCOME, 0.001)
            if number % load == 0:
                gate.release("mer_1")
                gate.admit("mer_1", Work.PAYMENT)
            with pytest.raises(GatewayError) as refused:
                gate.admit("mer_1", Work.PAYMENT)
            assert refused.value.reason is Reason.OVERLOADED
            assert refused.value.retry_after_s is not None
            told.append(refused.value.retry_after_s)
        return told[len(told) // 2 :]

    light, heavy = pauses(1), pauses(20)
    assert min(light) > 0
    assert len(set(light)) > JITTER_STEPS / 2
    assert sum(heavy) / len(heavy) > 2 * sum(light) / len(light)
    assert len(set(light + heavy)) <= JITTER_STEPS * (PRESSURE_LEVELS + 1)


@pytest.mark.parametrize(
    ("pressure", "doublings"),
    [(0.0, 0), (1.0, 0), (1.9, 0), (2.0, 1), (3.9, 1), (4.0, 2), (64.0, 6), (1e9, PRESSURE_LEVELS)],
)
def test_the_mean_pause_doubles_with_the_pressure_so_often_and_no_more(
    pressure: float, doublings: int
) -> None:
    gate = Gate(LIMITS, STAGES, uniform=lambda: 0.5)
    gate._pressure = pressure
    assert gate._pause_s() == LIMITS.retry_after_s * 2**doublings


@pytest.mark.parametrize("refused", [0, 1, 3, 30])
def test_the_pressure_is_how_many_calls_come_for_each_that_enters(refused: int) -> None:
    now = 0.0
    limits = replace(LIMITS, working_max=1, working_min=1)
    gate = Gate(limits, STAGES, clock=lambda: now)
    for _ in range(200):
        now += TICK_S_MAX
        gate.admit("mer_1", Work.PAYMENT)
        for _ in range(refused):
            with pytest.raises(GatewayError):
                gate.admit("mer_1", Work.PAYMENT)
        gate.release("mer_1")
    assert gate._pressure == pytest.approx(1 + refused)


def test_what_is_refused_is_counted_by_its_bound() -> None:
    gate = Gate(replace(LIMITS, working_max=2, working_min=1, in_flight_max=8), STAGES)
    gate.admit("mer_1", Work.PAYMENT)
    gate.admit("mer_1", Work.ITEM)
    with pytest.raises(GatewayError):
        gate.admit("mer_1", Work.ITEM)
    for _ in range(2):
        gate.leave("mer_1")
    taken = enter(gate, "mer_1", gate.leave)
    assert gate.admitted == {Work.PAYMENT: 1 + taken, Work.ITEM: 1}
    assert gate.refused == {
        (Work.ITEM, RefusedBy.LIMIT): 1,
        (Work.PAYMENT, RefusedBy.IN_FLIGHT): 1,
    }


@pytest.mark.parametrize(
    "wrong",
    [{"working_min": 0}, {"working_min": 2001}, {"in_flight_max": 1999}, {"target_s": 0.0}],
)
def test_limits_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must hold|positive"):
        Gate(replace(LIMITS, **wrong), STAGES)


@pytest.mark.parametrize("work", [Work.PAYMENT, Work.ITEM])
def test_the_least_bounds_let_one_call_in(work: Work) -> None:
    gate = Gate(replace(LIMITS, working_max=1, working_min=1, in_flight_max=1), STAGES)
    for _ in range(2):
        gate.admit("mer_1", work)
        with pytest.raises(GatewayError):
            gate.admit("mer_2", work)
        gate.release("mer_1")


def test_reads_lists_and_money_calls_have_gates_of_their_own() -> None:
    admission = open_gates(AdmissionLimits(lists_max=2, calls_min=1))
    for _ in range(2):
        admission.lists.admit("mer_1", Work.LIST)
    with pytest.raises(GatewayError):
        admission.lists.admit("mer_1", Work.LIST)
    admission.reads.admit("mer_1", Work.READ)
    admission.payments.admit("mer_1", Work.PAYMENT)
