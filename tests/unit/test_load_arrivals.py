"""Schedules of intended sends: seeded, exact, and the same whole however many share them."""

from __future__ import annotations

from itertools import pairwise, zip_longest
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import (
    SPIKE_FACTOR,
    WARM_UP,
    Process,
    Profile,
    Schedule,
    Segment,
    segments_of,
    warm_up,
)

RATES = st.floats(0.1, 10_000)


@given(RATES, RATES, st.floats(0.1, 1000), st.floats(0, 1))
def test_time_of_an_arrival_is_the_inverse_of_the_expected_number(
    rate_from: float, rate_to: float, duration_s: float, share: float
) -> None:
    segment = Segment("any", duration_s, rate_from, rate_to)
    at = share * segment.arrivals
    t = segment.time_of(at)
    assert 0 <= t <= duration_s
    growth = (rate_to - rate_from) / duration_s
    assert rate_from * t + growth * t * t / 2 == pytest.approx(at, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("process", get_args(Process))
@pytest.mark.parametrize("profile", get_args(Profile))
def test_arrivals_are_ordered_within_their_segments_and_as_many_as_expected(
    profile: Profile, process: Process
) -> None:
    segments = warm_up(200, 5) + segments_of(profile, 200, 50)
    schedule = Schedule(segments, process, seed=7)
    arrivals = list(schedule.arrivals())
    assert all(a.at_s <= b.at_s and a.segment <= b.segment for a, b in pairwise(arrivals))
    begin_s = 0.0
    for number, segment in enumerate(segments):
        inside = [each for each in arrivals if each.segment == number]
        assert all(begin_s <= each.at_s <= begin_s + segment.duration_s for each in inside)
        # Six standard deviations of a Poisson count.
        assert len(inside) == pytest.approx(segment.arrivals, abs=6 * segment.arrivals**0.5)
        begin_s += segment.duration_s
    assert schedule.duration_s == pytest.approx(begin_s)


@given(st.integers(1, 9), st.sampled_from(get_args(Process)), st.integers(0, 5))
def test_shares_of_any_number_of_generators_are_the_same_whole(
    count: int, process: Process, seed: int
) -> None:
    schedule = Schedule(segments_of("ramp", 50, 4), process, seed)
    shares = [list(schedule.share(index, count)) for index in range(count)]
    woven = [each for row in zip_longest(*shares) for each in row if each is not None]
    assert woven == list(schedule.arrivals())


def test_same_seed_gives_the_same_arrivals_and_another_one_others() -> None:
    segments = segments_of("steady", 100, 5)
    assert list(Schedule(segments, seed=1).arrivals()) == list(
        Schedule(segments, seed=1).arrivals()
    )
    assert list(Schedule(segments, seed=1).arrivals()) != list(
        Schedule(segments, seed=2).arrivals()
    )


def test_constant_arrivals_are_equally_far_apart() -> None:
    arrivals = list(Schedule(segments_of("steady", 100, 3), "constant").arrivals())
    assert len(arrivals) == 300
    assert all(b.at_s - a.at_s == pytest.approx(0.01) for a, b in pairwise(arrivals))


def test_poisson_intervals_vary_as_much_as_they_last() -> None:
    arrivals = list(Schedule(segments_of("steady", 1000, 20), "poisson").arrivals())
    gaps = [b.at_s - a.at_s for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean == pytest.approx(1, abs=0.05)


def test_spike_overload_and_warm_up_have_the_rates_that_they_promise() -> None:
    by_name = {each.name: each for each in segments_of("spike", 100, 60)}
    assert by_name["spike"].rate_from == by_name["spike"].rate_to == SPIKE_FACTOR * 100
    assert by_name["before"].rate_to == by_name["after"].rate_from == 100
    overload = {each.name: each for each in segments_of("overload", 100, 60, overload_factor=1.5)}
    assert overload["overload"].rate_from == 150
    [warm] = warm_up(100, 5)
    assert (warm.name, warm.rate_to) == (WARM_UP, 100)
    assert warm_up(100, 0) == ()


@pytest.mark.parametrize("profile", get_args(Profile))
def test_measured_segments_last_as_long_as_they_should(profile: Profile) -> None:
    assert sum(each.duration_s for each in segments_of(profile, 10, 60)) == pytest.approx(60)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="duration"):
        Segment("a", 0, 1, 1)
    with pytest.raises(ValueError, match="rate"):
        Segment("a", 1, 0, 1)
    with pytest.raises(ValueError, match="rate"):
        Segment("a", 1, 1, float("nan"))
    with pytest.raises(ValueError, match="no share"):
        Schedule(segments_of("steady", 1, 1)).share(2, 2)
