"""What a load test decides before it sends, and what its report shows of a long run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.calls import OK
from loadtest.charts import POINTS_MAX
from loadtest.measures import Analysis, Second
from loadtest.plan import Plan
from loadtest.report import series
from loadtest.runner import Options, Step, control_of, control_p99_ms, controlled_rates
from loadtest.samples import Sample
from loadtest.slo import SLO_FILE


@pytest.mark.parametrize("profile", ["steady", "ramp", "spike", "soak", "overload"])
def test_control_is_the_same_schedule_in_less_time(profile: str) -> None:
    plan = Plan(rate=40, duration=60, profile=profile, overload_factor=2, mix="realistic")
    control = control_of(plan, 20)
    assert control.control
    for mine, theirs in zip(control.schedule.segments, plan.schedule.segments, strict=True):
        assert (mine.name, mine.rate_from, mine.rate_to) == (
            theirs.name,
            theirs.rate_from,
            theirs.rate_to,
        )
    assert control.schedule.duration_s == pytest.approx(20 + plan.warm_up)
    assert control_of(plan, 90).duration == 60


@pytest.mark.parametrize(
    ("control_s", "remote", "controlled"),
    [(20.0, False, True), (0.0, False, False), (20.0, True, False)],
)
def test_generators_elsewhere_have_no_control(
    control_s: float, *, remote: bool, controlled: bool
) -> None:
    options = Options(
        Plan(),
        "steady",
        Path("folder"),
        SLO_FILE,
        generators=2,
        remote_generators=remote,
        control_s=control_s,
    )
    assert options.controlled == controlled


@pytest.mark.parametrize(
    ("knee", "tried", "rates"),
    [
        (100.0, [(100, True), (150, False), (122, False)], [100, 122]),
        (100.0, [(200, False), (100, True), (141, False)], [100, 141]),
        (150.0, [(100, True), (150, True)], [150]),
        (0.0, [(20, False), (13.3, False)], [13.3]),
    ],
)
def test_knee_is_controlled_on_both_of_its_sides(
    knee: float, tried: list[tuple[float, bool]], rates: list[float]
) -> None:
    steps: list[dict[str, Any]] = [{"rate": rate, "held": held} for rate, held in tried]
    assert controlled_rates({"rate": knee, "steps": steps}) == rates


def control_step(sends: int) -> Step:
    plan = Plan(rate=0.01, duration=1, warm_up=0)
    sample = Sample(0.5, 0.0, latency_ms=2.0, added_ms=2.0, kind=0, segment=0, code=OK)
    analysis = Analysis([sample] * sends, plan.schedule.segments)
    return Step(plan, Path("folder"), analysis, [], 0.0, {}, None)


def test_control_that_sent_nothing_shows_nothing() -> None:
    assert control_p99_ms([]) is None
    assert control_p99_ms([control_step(0)]) is None
    # More than was intended: what is not accounted for counts as never answered.
    assert control_p99_ms([control_step(1)]) == 15_000


def test_sends_of_a_stopped_run_that_were_never_due_are_not_missed() -> None:
    step = replace(control_step(1), plan=Plan(rate=100, duration=60), stopped="interrupted")
    assert replace(step, due=1).unaccounted == 0
    assert replace(step, due=3).unaccounted == 2


def test_outage_in_a_long_run_is_in_the_chart_of_answers() -> None:
    timeline = [
        Second(at_s, 100, 0 if at_s == 777 else 100, 0, 0, 1.0, 1.0, 1.0, 1.0, 1.0)
        for at_s in range(3600)
    ]
    assert (777, 0.0) in series(timeline, "answered")
    assert len(series(timeline, "offered")) <= POINTS_MAX
