"""The command line of the fault campaign."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from math import ceil
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from loadtest.environment import commit
from storage.embedded import EmbeddedServerError
from tests.chaos.history import History
from tests.chaos.oracle import Violation, judge
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.servers import Supply
from tests.chaos.shims import NotPossible
from tests.chaos.trial import PROFILES, Result, keep, run_trials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

CLEAN, VIOLATED, USAGE, NO_RESULT = 0, 1, 2, 3
INTERRUPTED: Final = 130
FOLDER: Final = Path(".local/chaos")
SUMMARY_FILE: Final = "summary.json"
TRIALS: Final = len(PROFILES)
TRIALS_MAX: Final = 100_000
PER_RUN: Final = 10
RATE: Final = 150.0
RATE_MAX: Final = 100_000.0
SHOWN_MAX: Final = 10
"""Violations of one trial that are printed; its folder has all."""

_EPILOG: Final = f"""\
PostgreSQL, Redis, the PSP simulator and two gateways (one on each transport) are started here, on
free ports of 127.0.0.1, and end with the campaign. A trial is a fault and the wait until all that
had been begun is settled; a run is one system under load, some trials long, judged whole. Run n
of a scenario has the seed S + n: it draws the payments, the moments and the length of the faults,
and the PSP ({" or ".join(PROFILES)}). So `--scenario NAME --trials T --per-run T --seed N`
does a run again, though processes never meet in exactly the same order twice.

The journals of a run with a violation stay in {FOLDER}/NAME-SEED/, with the gateways' logs.
`--judge` gives journals to the oracle anew.

exit status:
  0  no violation
  1  a violation
  2  the options make no sense
  3  no result: a server did not start, or the journals cannot be read
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        if given.list:
            for scenario in SCENARIOS.values():
                print(f"{scenario.name:<24}{scenario.trials:>4}  {scenario.meaning}")
            return CLEAN
        if given.judge is not None:
            return _judge_again(given.judge)
        names = _names(parser, given)
        return _run(names, given)
    except (EmbeddedServerError, OSError) as error:
        sys.stderr.write(f"chaos: no result: {error}\n")
        return NO_RESULT
    except KeyboardInterrupt:
        sys.stderr.write("chaos: interrupted, no result\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="The fault campaign: faults while calls are under way, and an oracle that"
        " compares what clients were told, what the PSP did and what the database holds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--scenario",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="only these; --list names them (default: all)",
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help=f"of each scenario (default {TRIALS}, one a PSP)"
    )
    parser.add_argument(
        "--per-run",
        type=int,
        metavar="T",
        help=f"trials of a run (default: {PER_RUN} at most, and two runs at least)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="default 1")
    parser.add_argument(
        "--rate", type=float, default=RATE, metavar="R", help=f"calls a second (default {RATE:g})"
    )
    parser.add_argument(
        "--full", action="store_true", help="as many trials as --list says: about an hour"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one trial of each, in about three minutes"
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios, and end")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="judge kept journals, and end")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"{FOLDER}")
    return parser


def _names(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    unknown = [name for name in given.scenario if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    if given.quick + given.full + (given.trials is not None) > 1:
        parser.error("--quick is --trials 1, and --full another number for each: take one of them")
    if given.trials is None and not given.full:
        given.trials = 1 if given.quick else TRIALS
    if given.trials is not None and not 1 <= given.trials <= TRIALS_MAX:
        parser.error(f"--trials must be from 1 to {TRIALS_MAX}")
    if given.per_run is not None and not 1 <= given.per_run <= TRIALS_MAX:
        parser.error(f"--per-run must be from 1 to {TRIALS_MAX}")
    if not 0 <= given.seed < 2**63:
        parser.error("--seed must be from 0 to 2^63 - 1")
    if not 1 <= given.rate <= RATE_MAX:
        parser.error(f"--rate must be from 1 to {RATE_MAX:g}")
    return list(dict.fromkeys(given.scenario)) or list(SCENARIOS)


def _run(names: Sequence[str], given: argparse.Namespace) -> int:
    results: dict[str, list[Result]] = defaultdict(list)
    begun_s = time.monotonic()
    not_run: dict[str, str] = {}
    with Supply() as supply:
        for name in names:
            scenario = SCENARIOS[name]
            total = given.trials or scenario.trials
            try:
                servers = supply.servers(scenario.needs)
            except NotPossible as error:
                not_run[name] = str(error)
                print(f"{name}: not run: {error}", flush=True)
                continue
            for number, trials in enumerate(plan(total, given.per_run)):
                result = run_trials(
                    servers,
                    scenario,
                    given.seed + number,
                    rate=given.rate,
                    trials=trials,
                    full=given.full,
                )
                results[name].append(result)
                _report(result, trials, total, results[name], given.folder)
                result.drop_journals()
                _save(results, not_run, given)  # a campaign that is interrupted has its figures
    rows = _save(results, not_run, given)
    print("\n" + "\n".join(_table(rows)))
    for name, reason in not_run.items():
        print(f"{name:<24}not run: {reason}")
    violations = sum(row["violations"] for row in rows)
    verdict = f"{violations} VIOLATIONS" if violations else "no violation"
    print(
        f"\n{verdict} in {time.monotonic() - begun_s:.0f} s   summary"
        f"  {given.folder / SUMMARY_FILE}"
    )
    return VIOLATED if violations else CLEAN


def _save(
    results: Mapping[str, Sequence[Result]], not_run: Mapping[str, str], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Write the summary of what was run until now; its rows."""
    rows = [_row(name, of_scenario) for name, of_scenario in results.items()]
    summary = {
        "scenarios": rows,
        "not_run": [{"name": name, "reason": reason} for name, reason in not_run.items()],
        "seed": given.seed,
        "commit": commit(),
    }
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    return rows


def plan(trials: int, per_run: int | None) -> list[int]:
    """How many trials each run has; without `per_run` at least two runs, for the PSPs in turn."""
    runs = ceil(trials / (per_run or PER_RUN))
    if per_run is None:
        runs = max(runs, min(trials, len(PROFILES)))
    each, rest = divmod(trials, runs)
    return [each + (number < rest) for number in range(runs)]


def _report(
    result: Result, planned: int, total: int, of_scenario: Sequence[Result], folder: Path
) -> None:
    """A line for a run; all about one with violations."""
    done = sum(each.trials for each in of_scenario)
    recovery = _span(result.recoveries_s)
    if result.outages_s:
        recovery += f", answered again after {_span(result.outages_s)}"
    others = ", ".join(
        f"{count} {status}" for status, count in result.statuses.most_common() if status != "OK"
    )
    print(
        f"{result.scenario} {done}/{total}: seed {result.seed}, {result.history.profile},"
        f" {result.trials} of {planned} trials, {result.acked} acknowledged,"
        f" recovered in {recovery}, {result.duration_s:.1f} s,"
        f" {len(result.violations)} violations; tries not OK: {others or 'none'}",
        flush=True,
    )
    for note in result.notes:
        print(f"  {note}", flush=True)
    if result.violations:
        kept = folder / f"{result.scenario}-{result.seed}"
        keep(result, kept)
        _show(result.violations)
        print(
            f"  journals in {kept}; again with --scenario {result.scenario}"
            f" --trials {planned} --per-run {planned} --seed {result.seed}",
            flush=True,
        )


def _span(times_s: Sequence[float]) -> str:
    """The median and the longest."""
    return f"{median(times_s):.1f} s, at most {max(times_s):.1f} s" if times_s else "-"


def _show(violations: Sequence[Violation]) -> None:
    for violation in violations[:SHOWN_MAX]:
        print(f"  {violation}")
    if len(violations) > SHOWN_MAX:
        print(f"  and {len(violations) - SHOWN_MAX} more")


def _judge_again(folder: Path) -> int:
    try:
        history = History.load(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"chaos: no result: {folder} holds no journals of a trial: {error}\n")
        return NO_RESULT
    violations = judge(history)
    for violation in violations:
        print(violation)
    print(f"{len(violations)} violations")
    return VIOLATED if violations else CLEAN


def _row(name: str, results: Sequence[Result]) -> dict[str, Any]:
    recoveries = [each for result in results for each in result.recoveries_s]
    outages = [each for result in results for each in result.outages_s]
    return {
        "name": name,
        "trials": sum(each.trials for each in results),
        "acked": sum(each.acked for each in results),
        "lost_acks": sum(each.lost_acks for each in results),
        "double_charges": sum(each.double_charges for each in results),
        "unresolved": sum(each.unresolved for each in results),
        "violations": sum(len(each.violations) for each in results),
        "recovery_p50_s": _rounded(median, recoveries),
        "recovery_max_s": _rounded(max, recoveries),
        "rto_p50_s": _rounded(median, outages),
        "rto_max_s": _rounded(max, outages),
    }


def _rounded(figure: Callable[[list[float]], float], times_s: list[float]) -> float | None:
    return round(figure(times_s), 3) if times_s else None


def _table(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    heads = (
        *("scenario", "trials", "acked", "lost acks", "double charges", "unresolved"),
        *("violations", "recovery p50 s", "max s", "RTO p50 s", "max s"),
    )
    yield f"{heads[0]:<24}" + "".join(f"{head:>{len(head) + 2}}" for head in heads[1:])
    for row in rows:
        name, *cells = row.values()
        yield f"{name:<24}" + "".join(
            f"{_cell(cell):>{len(head) + 2}}" for head, cell in zip(heads[1:], cells, strict=True)
        )


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
