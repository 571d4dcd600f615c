from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from loadtest.bench import cli, report
from loadtest.bench.figures import FIGURES, GROUPS, NATIVE, OPEN_SECONDS_MIN, Figure, select
from loadtest.bench.generator import Load, OpenLoad
from loadtest.bench.measure import CONCURRENCIES, ORDER, STARTS, Rounds
from loadtest.bench.ratios import PAIRS_MIN

RATIO = Figure("a_over_b", "a ÷ b", "a", "b", target=0.9, aim=1.2, native=True)
RATE = Figure("a_rps", "a", "a")
OPEN = next(figure for figure in FIGURES if figure.side == "open_5000")


def rounds_of(rates: Sequence[float], failed: int = 0) -> Rounds:
    loads = [Load(rate, int(rate), 0, {"server": 100.0, "generator": 30.0}) for rate in rates]
    loads[-1] = Load(rates[-1], int(rates[-1]), failed, loads[-1].cpu_us)
    return Rounds(64, loads)


def both(ratio: float, pairs: int = PAIRS_MIN, failed: int = 0) -> dict[str, Rounds]:
    rates = [1000.0 + number for number in range(pairs)]
    return {"a": rounds_of([ratio * rate for rate in rates], failed), "b": rounds_of(rates)}


def open_load(p99_ms: float = 10.0, dropped: int = 0, failed: int = 0) -> OpenLoad:
    return OpenLoad(5000, 4990, dropped, failed, 2.0, p99_ms, 50.0, 300_000, p99_ms, failed, 1.0)


def test_a_ratio_at_its_target_meets_it_and_one_below_misses_it() -> None:
    assert report.evaluate(RATIO, both(0.9001)).verdict == "met"
    assert report.evaluate(RATIO, both(0.8999)).verdict == "MISSED"


def test_a_figure_without_a_target_is_printed() -> None:
    assert report.evaluate(RATE, both(1.0)).verdict == "printed"


def test_too_few_pairs_are_invalid_and_not_missed() -> None:
    assert report.evaluate(RATIO, both(0.1, pairs=PAIRS_MIN - 1)).verdict == "INVALID"


def test_a_side_whose_calls_failed_is_invalid() -> None:
    result = report.evaluate(RATIO, both(2.0, failed=3))
    assert result.verdict == "INVALID"
    assert result.problem.startswith("3 of ")


def test_the_open_loop_misses_by_its_latency_by_a_drop_and_by_a_failure() -> None:
    def verdict(load: OpenLoad) -> str:
        return report.evaluate_open(OPEN, load, OPEN_SECONDS_MIN).verdict

    assert verdict(open_load()) == "met"
    assert verdict(open_load(p99_ms=30.1)) == "MISSED"
    assert verdict(open_load(dropped=1)) == "MISSED"
    assert verdict(open_load(failed=1)) == "MISSED"


def test_a_short_open_loop_is_invalid() -> None:
    result = report.evaluate_open(OPEN, open_load(), OPEN_SECONDS_MIN - 1)
    assert result.verdict == "INVALID"
    assert result.problem == "59 s, not 60"


def test_the_exit_status_tells_missed_from_invalid_from_met() -> None:
    met = report.evaluate(RATIO, both(1.0))
    missed = report.evaluate(RATIO, both(0.5))
    invalid = report.evaluate(RATIO, both(1.0, pairs=1))
    assert report.exit_status([met], {}) == report.MET
    assert report.exit_status([met, invalid], {}) == report.INVALID
    assert report.exit_status([met, invalid, missed], {}) == report.MISSED
    assert report.exit_status([met], {"authorize": 1}) == report.MISSED


def test_a_figure_without_a_target_never_decides_the_exit_status() -> None:
    assert report.exit_status([report.evaluate(RATE, both(1.0, pairs=1))], {}) == report.MET


def test_the_table_says_target_aim_verdict_and_what_native_does_not_promise() -> None:
    text = report.table([report.evaluate(RATIO, both(1.0)), report.evaluate(RATE, both(1.0))])
    line = next(line for line in text.splitlines() if line.startswith("a ÷ b *"))
    assert line.split() == [
        "a",
        "÷",
        "b",
        "*",
        "1.00",
        "1.00",
        "–",
        "1.00",
        "≥",
        "0.90",
        "1.20",
        "met",
    ]
    assert text.endswith(NATIVE)
    assert NATIVE not in report.table([report.evaluate(RATE, both(1.0))])


def test_the_summary_has_every_key_that_is_promised() -> None:
    rates = [100.0 + number for number in range(PAIRS_MIN)]
    rounds = {side: rounds_of(rates) for side in ORDER}
    load = open_load()
    results = [
        report.evaluate_open(figure, load, OPEN_SECONDS_MIN)
        if figure.side == "open_5000"
        else report.evaluate(figure, rounds)
        for figure in FIGURES
    ]
    got = json.loads(json.dumps(report.summary(results, rounds, {}, {}, load, {})))
    promised = (
        *("rounds", "echo_rps", "authorize_rps"),
        *("naive_rps", "authorize_over_echo", "authorize_over_native_echo"),
        *("grpcio_authorize_rps", "grpcio_authorize_over_echo", "production_over_echo"),
        *("grpcio_tls_over_echo", "delayed_over_instant", "authorize_over_naive"),
        *("batch_items_per_s", "stream_items_per_s", "pgbench_tps"),
        *("batch_over_pgbench", "open_5000_p99_ms", "quartiles"),
        *("machine", "versions", "commit"),
    )
    assert set(promised) <= got.keys()
    assert got["rounds"] == PAIRS_MIN
    assert got["authorize_over_echo"] == 1.0
    assert got["open_5000_p99_ms"] == 10.0
    assert got["quartiles"]["echo_rps"] == [101.5, 103.0, 104.5]
    assert got["cpu_us"]["echo"] == {"server": 100.0, "generator": 30.0}


def test_every_figure_and_group_names_sides_that_are_measured() -> None:
    for figure in FIGURES:
        assert figure.side in {*ORDER, "open_5000"}
        assert figure.over in {*ORDER, ""}
    assert set(CONCURRENCIES) == set(ORDER)
    assert all(STARTS[side] in CONCURRENCIES[side] for side in ORDER)
    assert all(select([name]) for name in GROUPS)


def test_figures_are_chosen_by_name_and_by_group() -> None:
    assert select([]) == list(FIGURES)
    assert [figure.name for figure in select(["naive", "pgbench_tps"])] == [
        "authorize_rps",
        "naive_rps",
        "authorize_over_naive",
        "pgbench_tps",
    ]
    with pytest.raises(ValueError, match="no figure 'nothing'"):
        select(["nothing"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "nothing"],
        ["--pairs", "0"],
        ["--concurrency", "nobody=3"],
        ["--concurrency", "echo=0"],
        ["--concurrency", "echo"],
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_figures_that_were_run_again_are_told_with_the_rates_they_are_of() -> None:
    rounds = both(1.0)
    again = {side: rounds_of([2000.0] * PAIRS_MIN) for side in ("a", "b")}
    results = [
        report.evaluate(RATE, rounds),
        replace(report.evaluate(RATIO, again), again=True),
    ]
    got = report.summary(results, rounds, again, {}, None, {})
    assert got["rates"]["a"] == rounds["a"].rates
    assert got["again"]["figures"] == ["a_over_b"]
    assert got["again"]["rates"] == {"a": again["a"].rates, "b": again["b"].rates}
    assert got["again"]["cpu_us"]["a"] == {"server": 100.0, "generator": 30.0}
    lines = report.table(results).splitlines()
    assert [report.AGAIN in line for line in lines[:3]] == [False, False, True]
