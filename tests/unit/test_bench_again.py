from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, cast

from loadtest.bench import report
from loadtest.bench.cli import _run_again
from loadtest.bench.figures import Figure
from loadtest.bench.generator import Load
from loadtest.bench.measure import Bench, Rounds
from loadtest.children import ProcessFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

STEADY, WIDE = [100.0] * 7, [50.0, 60.0, 80.0, 100.0, 120.0, 140.0, 150.0]
A_OVER_ECHO = Figure("a_over_echo", "", "authorize", "echo", target=0.9)
A_OVER_NAIVE = Figure("a_over_naive", "", "authorize", "naive", target=0.9)
NAIVE = Figure("naive_rps", "", "naive")


class Rerun:
    """A bench whose rounds are all at 200/s, and take a second."""

    def __init__(self, failure: ProcessFailed | None = None) -> None:
        self.sides: list[str] = []
        self._failure = failure

    def round_s(self, side: str) -> float:
        return 1.0

    def alternate(
        self, sides: Sequence[str], pairs: int, seconds: int, what: str, until: float
    ) -> dict[str, Rounds]:
        self.sides = [*sides]
        if self._failure is not None:
            raise self._failure
        return {side: rounds_of([200.0] * pairs) for side in sides}


def rounds_of(rates: list[float]) -> Rounds:
    return Rounds(1, [Load(rate, 1, 0, {}) for rate in rates])


def again(
    naive: list[float], time_left_s: float, failure: ProcessFailed | None = None
) -> tuple[list[report.Result], list[str], dict[str, Rounds]]:
    rounds = {
        "authorize": rounds_of(STEADY),
        "echo": rounds_of(STEADY),
        "naive": rounds_of(naive),
    }
    results = [report.evaluate(each, rounds) for each in (A_OVER_ECHO, A_OVER_NAIVE, NAIVE)]
    bench = Rerun(failure)
    options = argparse.Namespace(pairs=7, seconds=1)
    until = time.monotonic() + time_left_s
    results, rounds = _run_again(cast("Bench", bench), results, options, until, lambda _: None)
    return results, bench.sides, rounds


def test_only_invalid_figures_are_run_again_and_the_others_keep_their_rounds() -> None:
    results, sides, rounds = again(WIDE, 1000)
    assert [*rounds] == ["authorize", "naive"]
    assert [result.again for result in results] == [False, True, False]
    assert sides == ["authorize", "naive"]
    assert [result.verdict for result in results] == ["met", "met", "INVALID"]
    assert results[0].value.rounds == 7
    assert results[1].value.median == 1.0
    assert results[2].value.median == 100.0  # without a target nothing hangs on it


def test_nothing_is_run_again_where_all_is_valid() -> None:
    results, sides, rounds = again(STEADY, 1000)
    assert sides == []
    assert rounds == {}
    assert [result.verdict for result in results] == ["met", "met", "printed"]


def test_nothing_is_run_again_where_there_is_no_time() -> None:
    results, sides, rounds = again(WIDE, 13)
    assert sides == []
    assert rounds == {}
    assert results[1].verdict == "INVALID"


def test_a_second_run_that_fails_loses_nothing_of_the_first() -> None:
    results, sides, rounds = again(WIDE, 1000, ProcessFailed("gone"))
    assert sides == ["authorize", "naive"]
    assert [result.verdict for result in results] == ["met", "INVALID", "INVALID"]
    assert rounds == {}
