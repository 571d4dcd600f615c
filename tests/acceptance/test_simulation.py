"""The simulation: the same seed is the same history, and deliberate faults are found."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from tests.chaos.history import History
from tests.chaos.oracle import judge
from tests.simulation import cli
from tests.simulation.loop import NoEnd, SimulatedLoop, collected_by_hand
from tests.simulation.mutants import MUTANTS, hunt
from tests.simulation.world import simulate

if TYPE_CHECKING:
    from pathlib import Path

SEEDS: Final = range(50)
REPLAYED_SEEDS: Final = (3, 10)
"""One with a storm, one with a gateway that is killed."""
FIRST_SEEDS: Final = {
    "doubt-as-not-sent": 6,
    "timeout-as-failure": 56,
    "not-sent-after-maybe-sent": 7,
    "not-found-as-not-charged": 6,
    "recovery-sends-again": 5,
    "recovery-does-not-wait": 3,
    "intent-after-send": 2,
    "answer-before-durable": 14,
    "outcome-in-two-transactions": 14,
    "cache-not-tied-to-the-generation": 226,
    "keys-are-not-unique": 4,
    "no-version-in-the-compare": 8,
    "event-of-a-fenced-out-outcome": 26,
    "reservation-released-on-doubt": 15,
    "fingerprint-not-compared": 63,
    "answer-not-frozen": 4,
    "restart-of-a-doubt": 7,
    "sends-after-a-conflict": 4,
    "cascade-after-a-doubt": 21,
    "cascade-is-not-recorded": 332,
    "earlier-attempt-as-the-present": 5,
    "older-notifications-count": 138,
    "notification-done-before-recovery": 155,
    "customer-is-not-waited-for": 14,
    "expiry-by-our-own-clock": 44,
    "accepted-as-done": 244,
    "cascade-keeps-the-payments-account": 8,
    "doubts-are-not-told": 6,
    "answer-frozen-anew": 5,
    "answer-cached-that-lost": 26,
    "less-is-taken-for-asked": 5,
    "less-is-taken-for-the-whole": 5,
    "refused-part-stands": 176,
    "decision-is-not-recorded": 24,
    "decision-is-taken-for-a-failure": 19,
    "first-word-of-a-dispute-counts": 12,
    "appeal-of-a-dispute-is-dropped": 12,
    "refunds-forget-what-was-given-back": 19,
}
"""With which history each is hunted first: one that was seen to catch it."""
QUICK_MAX: Final = 100
"""In how many histories each is caught at most, should what the seeds mean have changed."""
SLOW: Final = ("no-epoch-in-the-compare",)
"""Takes about a thousand histories: `make simulate ARGS=--mutants` hunts it."""


def replayed(seed: int, hash_seed: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--replay", str(seed), "--folder", str(folder)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("seed", REPLAYED_SEEDS)
def test_same_seed_is_the_same_history_in_every_process(seed: int, tmp_path: Path) -> None:
    first, second = (replayed(seed, hash_seed, tmp_path) for hash_seed in ("1", "2"))
    assert first == second
    with collected_by_hand():
        assert f"trace {simulate(seed).trace}" in first


def test_other_seeds_are_other_histories() -> None:
    with collected_by_hand():
        assert len({simulate(seed).trace for seed in range(5)}) == 5


def test_no_history_of_the_gateway_breaks_a_rule() -> None:
    with collected_by_hand():
        results = [simulate(seed) for seed in SEEDS]
    assert [(each.seed, str(each.violations[0])) for each in results if each.violations] == []
    assert all(each.acked for each in results)


def test_every_mutant_is_hunted() -> None:
    assert {*FIRST_SEEDS, *SLOW} == MUTANTS.keys()


@pytest.mark.parametrize("name", FIRST_SEEDS)
def test_mutant_is_caught(name: str) -> None:
    verdict = hunt(MUTANTS[name], FIRST_SEEDS[name], QUICK_MAX)
    assert verdict.rules, f"{name} lived through {verdict.histories} histories"


def test_history_of_a_violation_happens_again_and_is_judged_the_same(tmp_path: Path) -> None:
    mutant = MUTANTS["intent-after-send"]
    from_seed = FIRST_SEEDS["intent-after-send"]
    seed = from_seed + hunt(mutant, from_seed, QUICK_MAX).histories - 1
    with ExitStack() as stack, collected_by_hand():
        for each in mutant.patches():
            stack.enter_context(each)
        first, second = simulate(seed), simulate(seed)
    assert first.trace == second.trace
    first.history.save(tmp_path)
    assert judge(History.load(tmp_path)) == first.violations != []
    with collected_by_hand():
        assert simulate(seed).violations == []


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--histories", "0"])
    assert ended.value.code == cli.USAGE


def test_history_in_which_everything_waits_for_ever_ends() -> None:
    loop = SimulatedLoop(1)

    async def wait() -> None:
        await loop.create_future()

    with pytest.raises(NoEnd):
        loop.run(wait())
