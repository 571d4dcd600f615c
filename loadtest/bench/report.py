"""What came out: the table for people, the summary for programs, the exit status for both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from loadtest import environment
from loadtest.bench.figures import NATIVE, OPEN_SECONDS_MIN, Figure
from loadtest.bench.generator import Load, OpenLoad
from loadtest.bench.measure import Rounds
from loadtest.bench.ratios import Measured, measured, paired

Verdict = Literal["met", "MISSED", "INVALID", "printed"]

MET, MISSED, INVALID, BROKEN = 0, 1, 3, 4
"""Exit statuses; 2 is a wrong command line."""
AGAIN: Final = "run again"


@dataclass(frozen=True, slots=True)
class Result:
    """A figure's value."""

    figure: Figure
    value: Measured
    problem: str
    """Why it is invalid; empty where it is valid."""
    remark: str = ""
    """Why it misses its target whatever its value; empty where nothing is wrong."""
    again: bool = False
    """Whether it is of the rounds that were run again."""

    @property
    def verdict(self) -> Verdict:
        """What to say of it."""
        if self.problem:
            return "INVALID"
        if self.remark:
            return "MISSED"
        figure, median = self.figure, self.value.median
        if figure.target is None:
            return "printed"
        reached = median <= figure.target if figure.lower_is_better else median >= figure.target
        return "met" if reached else "MISSED"


def evaluate(figure: Figure, rounds: Mapping[str, Rounds]) -> Result:
    """A figure of the rounds."""
    sides = [rounds[side] for side in (figure.side, figure.over) if side]
    value = paired(sides[0].rates, sides[1].rates) if figure.over else measured(sides[0].rates)
    failed = sum(side.failed for side in sides)
    answered = sum(load.calls for side in sides for load in side.loads)
    problem = value.problem()
    if failed:
        problem = f"{failed:,} of {answered + failed:,} calls failed"
    return Result(figure, value, problem)


def evaluate_open(figure: Figure, load: OpenLoad, seconds: int) -> Result:
    """The figure of the open loop: one run, so no quartiles."""
    value = Measured(load.p99_ms, load.p99_ms, load.p99_ms, 1)
    remark = ""
    if load.dropped or load.failed:
        remark = f"{load.dropped:,} dropped, {load.failed:,} failed"
    problem = ""
    if seconds < OPEN_SECONDS_MIN:
        problem = f"{seconds} s, not {OPEN_SECONDS_MIN}"
    return Result(figure, value, problem, remark)


def exit_status(results: Sequence[Result], missing: Mapping[str, int]) -> int:
    """MISSED where a valid figure misses its target or an authorization is lost, else INVALID
    where a figure with a target is invalid, else MET.
    """
    verdicts = {result.verdict for result in results if result.figure.target is not None}
    if missing or "MISSED" in verdicts:
        return MISSED
    return INVALID if "INVALID" in verdicts else MET


# --- the table ------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """The figures, each with its target and aim."""
    lines = [("figure", "median", "quartiles", "target", "aim", "", "")]
    for result in results:
        figure, value = result.figure, result.value
        sign = "≤" if figure.lower_is_better else "≥"
        quartiles = f"{_number(value.q1)} – {_number(value.q3)}" if value.rounds > 1 else ""
        lines.append(
            (
                figure.title + (" *" if figure.native else ""),
                _number(value.median),
                quartiles,
                "" if figure.target is None else f"{sign} {_number(figure.target)}",
                "" if figure.aim is None else _number(figure.aim),
                result.verdict,
                ", ".join(filter(None, (result.problem or result.remark, result.again * AGAIN))),
            )
        )
    text = _columns(lines, right={1})
    if any(result.figure.native for result in results):
        text += f"\n\n* {NATIVE}"
    return text


def costs(rounds: Mapping[str, Rounds]) -> str:
    """Each side's concurrency, and the CPU that each process spends on a call or an item."""
    names = ("server", "envoy", "postgres", "redis", "generator")
    lines = [("side", "callers", "per s", *(f"{name} µs" for name in names))]
    for side, each in rounds.items():
        if each.loads:
            cpu_us = [_cpu_us(each.loads, name) for name in names]
            shown = ("" if value is None else f"{value:.0f}" for value in cpu_us)
            rate = _number(measured(each.rates).median)
            lines.append((side, str(each.concurrency), rate, *shown))
    return _columns(lines, right=set(range(1, 3 + len(names))))


def _cpu_us(loads: Sequence[Load], name: str) -> float | None:
    values = [load.cpu_us[name] for load in loads if name in load.cpu_us]
    return measured(values).median if values else None


def _columns(lines: Sequence[tuple[str, ...]], right: set[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


# --- the summary ----------------------------------------------------------------------------------


def summary(
    results: Sequence[Result],
    rounds: Mapping[str, Rounds],
    again: Mapping[str, Rounds],
    tries: Mapping[str, Mapping[int, float]],
    open_load: OpenLoad | None,
    missing: Mapping[str, int],
) -> dict[str, Any]:
    """All of it, for a file. The figures that were run again are of the rounds in `again`."""
    return {
        "rounds": max((len(each.loads) for each in rounds.values()), default=0),
        **{result.figure.name: result.value.median for result in results},
        "quartiles": {
            result.figure.name: [result.value.q1, result.value.median, result.value.q3]
            for result in results
            if result.value.rounds > 1
        },
        "verdicts": {result.figure.name: result.verdict for result in results},
        "invalid": {result.figure.name: result.problem for result in results if result.problem},
        "targets": {
            result.figure.name: result.figure.target
            for result in results
            if result.figure.target is not None
        },
        **_of_rounds(rounds),
        "again": {
            "figures": [result.figure.name for result in results if result.again],
            **_of_rounds(again),
        },
        "concurrency": {side: each.concurrency for side, each in rounds.items()},
        "concurrency_tried": {side: dict(seen) for side, seen in tries.items()},
        "open_5000": None if open_load is None else asdict(open_load),
        "acknowledged_missing": dict(missing),
        "native_does_not_promise": NATIVE,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }


def _of_rounds(rounds: Mapping[str, Rounds]) -> dict[str, Any]:
    return {
        "rates": {side: each.rates for side, each in rounds.items()},
        "cpu_us": {
            side: {
                name: _cpu_us(each.loads, name) for load in each.loads[:1] for name in load.cpu_us
            }
            for side, each in rounds.items()
        },
    }
