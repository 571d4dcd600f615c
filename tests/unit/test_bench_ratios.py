from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.bench.ratios import IQR_MAX, NOTHING, PAIRS_MIN, measured, paired, turns

RATES = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=30)


def test_quartiles_are_those_of_the_rounds_themselves() -> None:
    got = measured([7.0, 1.0, 3.0, 5.0, 2.0, 6.0, 4.0])
    assert (got.q1, got.median, got.q3, got.rounds) == (2.5, 4.0, 5.5, 7)


def test_one_round_is_its_own_median_and_quartiles() -> None:
    got = measured([3.0])
    assert (got.q1, got.median, got.q3, got.rounds) == (3.0, 3.0, 3.0, 1)


@given(RATES)
def test_quartiles_enclose_the_median_and_lie_within_the_rounds(rates: list[float]) -> None:
    got = measured(rates)
    assert min(rates) <= got.q1 <= got.median <= got.q3 <= max(rates)
    assert math.isclose(got.median, statistics.median(rates))


def test_a_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians() -> None:
    # The machine was four times as fast in the second round.
    got = paired([100.0, 400.0, 90.0], [100.0, 400.0, 180.0])
    assert got.median == 1.0
    assert statistics.median([100.0, 400.0, 90.0]) / statistics.median([100.0, 400.0, 180.0]) < 0.6


@given(RATES, st.floats(0.1, 10), st.data())
def test_a_machine_that_changes_its_speed_changes_no_ratio(
    rates: list[float], ratio: float, data: st.DataObject
) -> None:
    speeds = data.draw(st.lists(st.floats(0.1, 10), min_size=len(rates), max_size=len(rates)))
    slow = [rate * speed for rate, speed in zip(rates, speeds, strict=True)]
    got = paired([rate * ratio for rate in slow], slow)
    assert math.isclose(got.median, ratio)
    assert got.spread < 1e-9


def test_rounds_that_do_not_match_are_not_paired() -> None:
    with pytest.raises(ValueError, match="2 rounds cannot be paired with 1"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("numerators", "denominators"), [([], []), ([1.0, 0.0], [1.0, 1.0]), ([1.0], [0.0])]
)
def test_a_round_that_measured_nothing_makes_the_figure_invalid(
    numerators: list[float], denominators: list[float]
) -> None:
    got = paired(numerators, denominators)
    assert got == NOTHING
    assert got.problem()


def test_fewer_pairs_than_the_least_are_invalid() -> None:
    assert not measured([100.0] * PAIRS_MIN).problem()
    assert measured([100.0] * (PAIRS_MIN - 1)).problem() == "6 rounds, not 7"


def test_an_interquartile_range_above_the_limit_is_invalid() -> None:
    def with_spread(spread: float) -> str:
        half = 50 * spread
        return measured([100 - half] * 4 + [100.0] * 3 + [100 + half] * 4).problem()

    assert not with_spread(IQR_MAX)
    assert with_spread(IQR_MAX + 0.01) == "interquartile range 21% above 20%"


def test_sides_take_turns_there_and_back() -> None:
    assert turns(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert turns(["a", "b", "c"], 1) == ["c", "b", "a"]
    assert turns(["a", "b", "c"], 2) == ["a", "b", "c"]
