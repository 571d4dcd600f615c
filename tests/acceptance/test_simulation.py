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
MUTANT_SEED: Final = 1
QUICK: Final = {
    "doubt-as-not-sent": 60,
    "timeout-as-failure": 60,
    "not-sent-after-maybe-sent": 100,
    "not-found-as-not-charged": 100,
    "recovery-sends-again": 60,
    "recovery-does-not-wait": 60,
    "intent-after-send": 60,
    "answer-before-durable": 60,
    "outcome-in-two-transactions": 60,
    "cache-not-tied-to-the-generation": 200,
    "keys-are-not-unique": 60,
    "no-version-in-the-compare": 60,
    "event-of-a-fenced-out-outcome": 200,
    "reservation-released-on-doubt": 100,
    "fingerprint-not-compared": 200,
    "answer-not-frozen": 60,
    "restart-of-a-doubt": 100,
    "sends-after-a-conflict": 60,
}
"""In how many histories each is caught at most."""
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


def test_every_mutant_has_its_limit() -> None:
    assert {*QUICK, *SLOW} == MUTANTS.keys()


@pytest.mark.parametrize("name", QUICK)
def test_mutant_is_caught(name: str) -> None:
    verdict = hunt(MUTANTS[name], MUTANT_SEED, QUICK[name])
    assert verdict.rules, f"{name} lived through {verdict.histories} histories"


def test_history_of_a_violation_happens_again_and_is_judged_the_same(tmp_path: Path) -> None:
    mutant = MUTANTS["intent-after-send"]
    seed = MUTANT_SEED + hunt(mutant, MUTANT_SEED).histories - 1
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
