"""The command line of the benchmarks."""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from loadtest.bench import report
from loadtest.bench.figures import FIGURES, GROUPS, OPEN_SECONDS_MIN, Figure, select
from loadtest.bench.generator import OpenLoad
from loadtest.bench.measure import CONCURRENCIES, Bench, Progress, Rounds
from loadtest.bench.ratios import PAIRS_MIN
from loadtest.bench.report import Result
from loadtest.bench.system import CANNOT_MEASURE, running_system
from loadtest.children import INTERRUPTED, ProcessFailed, interrupted_by_sigterm

SUMMARY: Final = Path(".local/bench/summary.json")
BUDGET_S: Final = 570
"""All of it ends within ten minutes; figures that are invalid are run again while this allows."""
CLOSING_S: Final = 15
"""For looking through the databases and stopping everything."""
OPEN: Final = "open_5000"
QUICK: Final = {"pairs": 3, "seconds": 1, "open_seconds": 10}

_DESCRIPTION: Final = """\
Measures the gateway side by side with an empty echo, with a straightforward baseline and with
pgbench, and prints each figure with its target. The sides take turns; a figure is the median of the
paired ratios, and INVALID where its interquartile range is above 20 %.
"""
_EPILOG: Final = f"""\
groups:   {", ".join(GROUPS)}
figures:  {", ".join(figure.name for figure in FIGURES)}
sides:    {", ".join(CONCURRENCIES)}

exit status: {report.MET} every target met, {report.MISSED} a valid figure misses its target or an \
acknowledged
authorization is missing, {report.INVALID} nothing missed but a figure with a target is invalid, \
{report.BROKEN} it could not be measured,
{INTERRUPTED} interrupted; what was measured until then is told, once there was a round.

examples:
  python -m loadtest.bench                                  all of it, nine minutes
  python -m loadtest.bench --only authorize --seconds 5 --pairs 3
  python -m loadtest.bench --only authorize_over_echo --concurrency authorize=256 --no-search
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m loadtest.bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--only",
        default=[],
        type=_names,
        metavar="NAME,…",
        help="these groups and figures alone",
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help="few, short rounds and no search: a look, no proof; every figure is INVALID",
    )
    options.add_argument(
        "--pairs", type=_positive, default=PAIRS_MIN, help="rounds (default %(default)s)"
    )
    options.add_argument(
        "--seconds",
        type=_positive,
        default=2,
        help="measured in a round, after its warm-up (default %(default)s)",
    )
    options.add_argument(
        "--open-seconds",
        type=_positive,
        default=OPEN_SECONDS_MIN,
        help="how long the open loop lasts (default %(default)s)",
    )
    options.add_argument(
        "--concurrency",
        action="append",
        default=[],
        type=_concurrency,
        metavar="SIDE=N",
        help="callers of a side, instead of searching for the best number; may be repeated",
    )
    options.add_argument("--no-search", action="store_true", help="default numbers of callers")
    options.add_argument(
        "--no-warm-up",
        action="store_true",
        help="no round of each side before those that count: to see that it can be measured at all",
    )
    options.add_argument(
        "--budget",
        type=_positive,
        default=BUDGET_S,
        metavar="S",
        help="what is invalid is run once again while there is time (default %(default)s)",
    )
    options.add_argument(
        "--summary", type=Path, default=SUMMARY, help="where it goes (default %(default)s)"
    )
    return options


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    try:
        select(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _concurrency(text: str) -> tuple[str, int]:
    side, _, number = text.partition("=")
    if side not in CONCURRENCIES:
        raise argparse.ArgumentTypeError(f"no side {side!r}: one of {', '.join(CONCURRENCIES)}")
    return side, _positive(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = parser().parse_args(arguments)
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
        options.no_search = True
    try:
        options.summary.parent.mkdir(parents=True, exist_ok=True)
        # Or what this run does not come to would be taken for its result.
        options.summary.unlink(missing_ok=True)
    except OSError as error:
        parser().error(f"--summary: {error}")
    began = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    interrupted_by_sigterm()
    if importlib.util.find_spec("k9") is None:
        print("bench: the load generator is missing: `make bench` installs it", file=sys.stderr)
        return report.BROKEN
    try:
        return _measure(options, began + options.budget, progress)
    except CANNOT_MEASURE as error:
        print(f"bench: {error}", file=sys.stderr)
        return report.BROKEN
    except KeyboardInterrupt:
        print("bench: interrupted, no result", file=sys.stderr)
        return INTERRUPTED


@dataclass(slots=True)
class _Found:
    """What has been measured until now."""

    rounds: dict[str, Rounds] = field(default_factory=dict)
    again: dict[str, Rounds] = field(default_factory=dict)
    open_load: OpenLoad | None = None
    results: list[Result] = field(default_factory=list)


def _measure(options: argparse.Namespace, until: float, progress: Progress) -> int:
    figures = select(options.only)
    interrupted = False
    with running_system() as system:
        bench = Bench(system, progress)
        found = _Found()
        try:
            _find(found, bench, figures, options, until, progress)
        except KeyboardInterrupt:
            found.rounds = found.rounds or bench.rounds
            if not any(each.loads for each in found.rounds.values()) and found.open_load is None:
                raise
            progress("interrupted: what was measured until then follows; once more ends it all")
            interrupted = True
        progress("looking for every acknowledged authorization in the databases")
        missing = system.missing()
    results = found.results or _evaluated(figures, found.rounds)
    if found.open_load is not None:
        results += [
            report.evaluate_open(figure, found.open_load, options.open_seconds)
            for figure in figures
            if figure.side == OPEN
        ]
    print(report.table(results))
    print(f"\n{report.costs(found.rounds)}")
    if found.again:
        print(f"\nthe rounds that were run again:\n{report.costs(found.again)}")
    for name, count in missing.items():
        print(f"\nLOST: {count:,} acknowledged authorizations of {name} are not in its database")
    summary = report.summary(
        results, found.rounds, found.again, bench.tries, found.open_load, missing
    )
    summary["interrupted"] = interrupted
    options.summary.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(f"\nsummary: {options.summary}")
    return INTERRUPTED if interrupted else report.exit_status(results, missing)


def _find(
    found: _Found,
    bench: Bench,
    figures: Sequence[Figure],
    options: argparse.Namespace,
    until: float,
    progress: Progress,
) -> None:
    in_open = any(figure.side == OPEN for figure in figures)
    sides = [side for figure in figures if figure.side != OPEN for side in _sides(figure)]
    bench.prepare(
        sides,
        dict(options.concurrency),
        search=not options.no_search,
        warm_up=not options.no_warm_up,
    )
    open_s = options.open_seconds + CLOSING_S if in_open else 0
    found.rounds = bench.alternate(sides, options.pairs, options.seconds, "round", until - open_s)
    # Before the rest of the time is spent on what is invalid.
    found.open_load = bench.open_loop(options.open_seconds) if in_open else None
    found.results = _evaluated(figures, found.rounds)
    if options.pairs >= PAIRS_MIN:
        found.results, found.again = _run_again(
            bench, found.results, options, until - CLOSING_S, progress
        )


def _evaluated(figures: Sequence[Figure], rounds: Mapping[str, Rounds]) -> list[Result]:
    """The figures of all the sides that had a round."""
    had = {side for side, each in rounds.items() if each.loads}
    return [report.evaluate(figure, rounds) for figure in figures if had.issuperset(_sides(figure))]


def _sides(figure: Figure) -> list[str]:
    return [side for side in (figure.side, figure.over) if side]


def _run_again(
    bench: Bench,
    results: Sequence[Result],
    options: argparse.Namespace,
    until: float,
    progress: Progress,
) -> tuple[list[Result], dict[str, Rounds]]:
    """The results, those that were invalid from rounds of their own where there is time for them;
    and these rounds.

    The others stay as they are: a round's sides are compared with each other alone.
    """
    again: list[Figure] = []
    sides: list[str] = []
    for result in results:
        # A ratio can be valid where the rates beside it are not: both sides were slowed alike.
        if result.verdict != "INVALID" or result.figure.target is None:
            continue
        wanted = [*sides, *(side for side in _sides(result.figure) if side not in sides)]
        if time.monotonic() + options.pairs * sum(map(bench.round_s, wanted)) > until:
            progress(f"no time is left to run {result.figure.name} again")
            continue
        again.append(result.figure)
        sides = wanted
    if not again:
        return [*results], {}
    try:
        rounds = bench.alternate(sides, options.pairs, options.seconds, "again, round", until)
    except ProcessFailed as error:
        progress(f"running them again failed, so they stay invalid: {error}")
        return [*results], {}
    return [
        replace(report.evaluate(result.figure, rounds), again=True)
        if result.figure in again
        else result
        for result in results
    ], rounds
