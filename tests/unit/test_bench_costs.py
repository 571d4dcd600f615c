"""loadtest.bench.costs: sides take turns, and a gate that fails ends the command so."""

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtest.bench.costs import Gate, cost_command, take_turns
from loadtest.bench.ratios import NOTHING, Measured, measured


async def test_sides_take_turns_there_and_back_after_one_round_that_does_not_count() -> None:
    order: list[str] = []
    numbers = itertools.count()

    async def side(name: str) -> float:
        order.append(name)
        return next(numbers)

    given = await take_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert given == {"a": [2, 5], "b": [3, 4]}


@pytest.mark.parametrize(
    ("gate", "figure", "problem"),
    [
        (Gate("ratio", most=1.0), measured([1.0] * 7), ""),
        (Gate("ratio", most=1.0), measured([1.01] * 7), "ratio 1.010 above 1.0"),
        (Gate("ratio", least=0.95), measured([0.95] * 7), ""),
        (Gate("ratio", least=0.95), measured([0.94] * 7), "ratio 0.940 below 0.95"),
        (Gate("ratio", most=1.0), measured([0.5] * 6), "6 rounds, not 7"),
        (Gate("ratio", most=1.0), NOTHING, "0 rounds, not 7"),
    ],
)
def test_the_command_tells_and_fails_as_its_gate_does(
    tmp_path: Path, gate: Gate, figure: Measured, problem: str
) -> None:
    async def measure(rounds: int) -> dict[str, Measured]:
        assert rounds == 25
        return {"ratio": figure}

    summary = tmp_path / "bench" / "cost.json"
    command = cost_command(measure, gate, {"ratio": "the one of the other"}, summary)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == bool(problem)
    assert "the one of the other" in result.output
    assert (f"FAILED: {problem}" in result.output) == bool(problem)
    told = json.loads(summary.read_text("utf-8"))
    assert told["problem"] == problem
    assert told["figures"] == {"ratio": [figure.q1, figure.median, figure.q3]}
