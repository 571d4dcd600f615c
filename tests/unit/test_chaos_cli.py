"""The command line of the fault campaign: clear words for bad options, figures that add up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.chaos.cli import _row, _table, main, plan
from tests.chaos.history import History
from tests.chaos.oracle import Rule, Violation
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.trial import PROFILES, Result, profile_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--scenario", "earthquake"), "no scenario earthquake; there are gateway-sigkill"),
        (("--scenario",), "expected at least one argument"),
        (("--trials", "0"), "--trials must be from 1"),
        (("--trials", "many"), "invalid int value: 'many'"),
        (("--quick", "--trials", "3"), "take one of them"),
        (("--quick", "--full"), "take one of them"),
        (("--per-run", "0"), "--per-run must be from 1"),
        (("--seed", "-1"), "--seed must be from 0"),
        (("--rate", "0"), "--rate must be from 1"),
        (("--rate", "nan"), "--rate must be from 1"),
        (("--scen", "redis-flush"), "unrecognized arguments"),
    ],
)
def test_bad_option_is_refused_with_its_reason(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SCENARIOS)


def test_judging_a_history_without_fault_ends_with_0(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    History("idempotent").save(tmp_path)
    assert main(["--judge", str(tmp_path)]) == 0
    (tmp_path / "clients.json").write_text(json.dumps({"profile": "idempotent"}), "utf-8")
    assert main(["--judge", str(tmp_path)]) == 3
    assert "holds no journals" in capsys.readouterr().err


def test_figures_of_a_scenario_are_those_of_its_trials() -> None:
    lost = Violation(Rule.ACKNOWLEDGED_IS_DURABLE, "pay_1", "op_1", "nothing", "a row")
    double = Violation(Rule.AT_MOST_ONE_CHARGE, "pay_1", "op_1", "two", "one")
    results = [
        Result("redis-flush", 1, History("idempotent"), 2, [], 100, 0, [1.0, 2.0], [0.5]),
        Result("redis-flush", 2, History("idempotent"), 0, [lost, double], 50, 2),
        Result("redis-flush", 3, History("idempotent"), 1, [lost], 20, 0, [3.0]),
    ]
    row = _row("redis-flush", results)
    assert row == {
        "name": "redis-flush",
        "trials": 3,
        "acked": 170,
        "lost_acks": 2,
        "double_charges": 1,
        "unresolved": 2,
        "violations": 3,
        "recovery_p50_s": 2.0,
        "recovery_max_s": 3.0,
        "rto_p50_s": 0.5,
        "rto_max_s": 0.5,
    }
    heads, line = _table([row])
    cells = ["redis-flush", "3", "170", "2", "1", "2", "3", "2.00", "3.00", "0.50", "0.50"]
    assert line.split() == cells
    assert len(heads) == len(line)


def test_each_scenario_meets_both_psps_in_turn() -> None:
    for scenario in SCENARIOS.values():
        assert {profile_of(scenario, seed) for seed in (7, 8)} == set(PROFILES)


@pytest.mark.parametrize(
    ("trials", "per_run", "runs"),
    [
        (1, None, [1]),
        (2, None, [1, 1]),
        (20, None, [10, 10]),
        (25, None, [9, 8, 8]),
        (7, 7, [7]),
        (5, 2, [2, 2, 1]),
    ],
)
def test_trials_are_spread_over_runs_and_over_both_psps_where_nothing_else_is_said(
    trials: int, per_run: int | None, runs: list[int]
) -> None:
    assert plan(trials, per_run) == runs
