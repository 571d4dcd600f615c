"""The command line of the simulation."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadtest.environment import commit
from tests.simulation.elsewhere import ELSEWHERE, caught_by
from tests.simulation.loop import collected_by_hand
from tests.simulation.mutants import MUTANTS, Verdict, hunt
from tests.simulation.world import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.simulation.world import Result

CLEAN, VIOLATED, USAGE = 0, 1, 2
INTERRUPTED: Final = 130
FOLDER: Final = Path(".local/simulation")
SUMMARY_FILE: Final = "summary.json"
HISTORIES: Final = 2_000
HISTORIES_MAX: Final = 100_000_000
JOBS_MAX: Final = 64
CHUNK: Final = 50
"""Histories of one piece of work; garbage is collected between them."""
SHOWN_MAX: Final = 10
PROGRESS_S: Final = 10.0

_EPILOG: Final = f"""\
History n has the seed S + n, which determines all of it: payments, latencies, faults, and in which
order processes take turns. `--replay N` does the same again, step by step, in any process.

The journals of a history with a violation stay in {FOLDER}/SEED/;
`python -m tests.chaos --judge` gives them to the oracle anew.

exit status:
  0  no violation (with --mutants: every mutant was caught)
  1  a violation (with --mutants: one was not caught)
  2  the options make no sense
"""


@dataclass(slots=True)
class _Piece:
    """What came of some histories."""

    histories: int = 0
    steps: int = 0
    acked: int = 0
    simulated_s: float = 0.0
    profiles: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, list[str]]] = field(default_factory=list)

    def add(self, other: _Piece) -> None:
        """Take the figures of another one too."""
        self.histories += other.histories
        self.steps += other.steps
        self.acked += other.acked
        self.simulated_s += other.simulated_s
        self.profiles += other.profiles
        self.bad += other.bad


def main(argv: Sequence[str] | None = None) -> int:
    """Run histories; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(argv)
    if not 0 <= given.seed < 2**63:
        parser.error("--seed must be from 0 to 2^63 - 1")
    if not 1 <= given.histories <= HISTORIES_MAX:
        parser.error(f"--histories must be from 1 to {HISTORIES_MAX}")
    if not 1 <= given.jobs <= JOBS_MAX:
        parser.error(f"--jobs must be from 1 to {JOBS_MAX}")
    try:
        if given.replay is not None:
            return _replay(given.replay, given.folder)
        if given.mutants:
            return _mutants(given.seed, given.jobs, given.folder)
        return _run(given.seed, given.histories, given.jobs, given.folder)
    except KeyboardInterrupt:
        sys.stderr.write("simulation: interrupted\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="The real application in simulated time, over a simulated network, PostgreSQL,"
        " Redis and PSP, under faults; the campaign's oracle judges every history.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="default 1")
    parser.add_argument(
        "--histories", type=int, default=HISTORIES, metavar="N", help=f"default {HISTORIES}"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, JOBS_MAX),
        metavar="N",
        help="processes (default: one for each core)",
    )
    parser.add_argument("--replay", type=int, metavar="SEED", help="one history, told in full")
    parser.add_argument(
        "--mutants", action="store_true", help="deliberate faults, each of which must be caught"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"{FOLDER}")
    return parser


# --- histories ------------------------------------------------------------------------------------


def _work(piece: tuple[int, int, Path]) -> _Piece:
    first, count, folder = piece
    done = _Piece()
    with collected_by_hand():
        for seed in range(first, first + count):
            result = simulate(seed)
            done.histories += 1
            done.steps += result.steps
            done.acked += result.acked
            done.simulated_s += result.simulated_s
            done.profiles[result.history.profile] += 1
            if result.violations:
                result.history.save(folder / str(seed))
                done.bad.append((seed, [str(each) for each in result.violations]))
    return done


def _run(first: int, histories: int, jobs: int, folder: Path) -> int:
    begun_s = told_s = time.monotonic()
    total = _Piece()
    pieces = [
        (seed, min(CHUNK, first + histories - seed), folder)
        for seed in range(first, first + histories, CHUNK)
    ]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done in pool.imap_unordered(_work, pieces):
            total.add(done)
            for seed, violations in done.bad:
                _show(seed, violations, folder)
            if time.monotonic() - told_s > PROGRESS_S:
                told_s = time.monotonic()
                print(f"{total.histories:,} histories, {len(total.bad)} bad", flush=True)
    lasted_s = time.monotonic() - begun_s
    summary = {
        "histories": total.histories,
        "violated": len(total.bad),
        "seeds": sorted(seed for seed, _ in total.bad),
        "seed": first,
        "jobs": jobs,
        "acked": total.acked,
        "steps": total.steps,
        "simulated_s": round(total.simulated_s),
        "profiles": dict(sorted(total.profiles.items())),
        "duration_s": round(lasted_s, 1),
        "commit": commit(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    verdict = f"{len(total.bad)} WITH VIOLATIONS" if total.bad else "no violation"
    print(
        f"{total.histories:,} histories, seeds {first} to {first + histories - 1}: {verdict};"
        f" {total.acked:,} calls acknowledged, {total.steps:,} steps,"
        f" {total.simulated_s / 3600:,.1f} h simulated in {lasted_s:,.0f} s"
        f" ({60 * total.histories / lasted_s:,.0f} a minute, {jobs} processes)"
    )
    return VIOLATED if total.bad else CLEAN


def _show(seed: int, violations: Sequence[str], folder: Path) -> None:
    print(f"seed {seed}: {len(violations)} violations, journals in {folder / str(seed)}")
    for violation in violations[:SHOWN_MAX]:
        print(f"  {violation}")
    if len(violations) > SHOWN_MAX:
        print(f"  and {len(violations) - SHOWN_MAX} more")
    sys.stdout.flush()


def _replay(seed: int, folder: Path) -> int:
    with collected_by_hand():
        result: Result = simulate(seed)
    print(f"seed {seed}: {result.history.profile}, {result.steps} steps, {result.acked} calls")
    for fault in result.faults:
        print(f"  {fault}")
    print(f"trace {result.trace}")
    if result.violations:
        result.history.save(folder / str(seed))
        _show(seed, [str(each) for each in result.violations], folder)
    return VIOLATED if result.violations else CLEAN


# --- mutants --------------------------------------------------------------------------------------


def _hunt(task: tuple[str, int]) -> Verdict:
    name, seed = task
    gc.collect()
    return hunt(MUTANTS[name], seed)


def _mutants(seed: int, jobs: int, folder: Path) -> int:
    verdicts = []
    print(f"{'mutant':<36}{'histories':>10}  found by")
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for verdict in pool.imap(_hunt, [(name, seed) for name in MUTANTS]):
            verdicts.append(verdict)
            caught = verdict.histories if verdict.rules else "NOT CAUGHT"
            print(f"{verdict.name:<36}{caught:>10}  {', '.join(verdict.rules)}", flush=True)
    for name in ELSEWHERE:
        tests = caught_by(name)
        verdicts.append(Verdict(name, 0, (tests,) if tests else ()))
        print(f"{name:<36}{'-' if tests else 'NOT CAUGHT':>10}  {tests}", flush=True)
    missed = [each.name for each in verdicts if not each.rules]
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "mutants": [
            {"name": each.name, "histories": each.histories, "rules": each.rules}
            for each in verdicts
        ],
        "seed": seed,
        "commit": commit(),
    }
    (folder / "mutants.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} mutants caught")
    return VIOLATED if missed else CLEAN
