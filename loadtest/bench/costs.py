"""What something costs beside a yardstick: sides that take turns, a gate on a ratio, the command.

All in CPU time of this process, which other work on the machine changes little.
"""

import json
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import uvloop

from loadtest.bench.ratios import IQR_MAX, PAIRS_MIN, Measured, turns

Side = Callable[[], Awaitable[float]]
Measure = Callable[[int], Coroutine[Any, Any, Mapping[str, Measured]]]

WORK_PER_ROUND: Final = 2_000
"""How often `cpu_side` does its work in a round."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The bound of a figure's median; a figure that is worth nothing does not pass."""

    figure: str
    least: float | None = None
    most: float | None = None

    def problem(self, measured: Measured) -> str:
        """Why it does not pass; empty where it does."""
        found = measured.problem()
        if not found and self.most is not None and measured.median > self.most:
            found = f"{self.figure} {measured.median:.3f} above {self.most}"
        if not found and self.least is not None and measured.median < self.least:
            found = f"{self.figure} {measured.median:.3f} below {self.least}"
        return found


def cpu_side(work: Callable[[], object]) -> Side:
    """The CPU time of one `work`, in microseconds."""

    async def side() -> float:
        began = time.process_time()
        for _ in range(WORK_PER_ROUND):
            work()
        return 1e6 * (time.process_time() - began) / WORK_PER_ROUND

    return side


async def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """What each side gave in each round, after one that warms it and does not count."""
    for side in sides.values():
        await side()
    given: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in turns(tuple(sides), number):
            given[name].append(await sides[name]())
    return given


def cost_command(
    measure: Measure, gate: Gate, figures: Mapping[str, str], summary: Path
) -> click.Command:
    """The command that measures, prints `figures` with what they are, and writes the summary.

    It ends with exit status 1 where the gate fails.
    """

    @click.command()
    @click.option("--rounds", default=25, show_default=True, type=click.IntRange(PAIRS_MIN))
    def main(rounds: int) -> None:
        """Measure, print, write the summary; exit with 1 where the gate fails."""
        tell(rounds, uvloop.run(measure(rounds)), gate, figures, summary)

    return main


def tell(
    rounds: int,
    measured: Mapping[str, Measured],
    gate: Gate,
    figures: Mapping[str, str],
    summary: Path,
) -> None:
    """Print `figures`, write the summary; exit with 1 where the gate fails."""
    problem = gate.problem(measured[gate.figure])
    click.echo(
        f"rounds {rounds}; median [quartiles]; a figure spread by more than {IQR_MAX:.0%}\n"
        "of its median is worth nothing"
    )
    for name, text in figures.items():
        each = measured[name]
        click.echo(f"{each.median:8.3f} [{each.q1:.3f}, {each.q3:.3f}]  {text}")
    summary.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "rounds": rounds,
        "figures": {name: [each.q1, each.median, each.q3] for name, each in measured.items()},
        "gate": gate.most if gate.least is None else gate.least,
        "problem": problem,
    }
    summary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if problem:
        click.echo(f"FAILED: {problem}")
        sys.exit(1)
