from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from loadtest.bench.generator import Load
from loadtest.bench.measure import Bench

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.bench.system import System


class Stores:
    """What the search needs of a system whose rounds are made up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def server(self, side: str) -> object:
        return object()

    def analyze(self) -> None:
        """Nothing to analyze."""


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({32: 50, 64: 80, 128: 100, 256: 90, 512: 80}, 128),
        ({32: 50, 64: 80, 128: 100, 256: 120, 512: 150}, 512),
        ({32: 50, 64: 80, 128: 100, 256: 102, 512: 150}, 128),
        ({32: 120, 64: 110, 128: 100, 256: 90, 512: 80}, 32),
        ({32: 50, 64: 0, 128: 0, 256: 70, 512: 0}, 32),
        ({32: 50, 64: 40, 128: 0, 256: 0, 512: 0}, 32),
        ({32: 50, 64: 80, 128: 100, 256: 0, 512: 0}, 128),
    ],
    ids=["middle", "more", "not_worth_it", "fewer", "refusing", "refusing_most", "refusing_more"],
)
def test_the_search_goes_uphill_and_away_from_refusals(
    rates: dict[int, float], chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(cast("System", Stores(tmp_path)), lambda _: None)

    def run_once(side: str, concurrency: int, seconds: int) -> Load:
        rate = rates[concurrency]
        return Load(rate, 100, 0 if rate else 10, {})

    monkeypatch.setattr(bench, "run_once", run_once)
    bench.prepare(["echo"], {}, search=True, warm_up=True)
    assert bench.concurrency == {"echo": chosen}
    assert bench.tries["echo"].items() <= rates.items()


def test_a_given_number_of_callers_is_taken_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(cast("System", Stores(tmp_path)), lambda _: None)
    ran: list[int] = []

    def run_once(side: str, concurrency: int, seconds: int) -> Load:
        ran.append(concurrency)
        return Load(1.0, 1, 0, {})

    monkeypatch.setattr(bench, "run_once", run_once)
    bench.prepare(["echo", "authorize"], {"echo": 7}, search=False, warm_up=True)
    assert bench.concurrency == {"echo": 7, "authorize": 256}
    assert ran == [7, 256]
    bench.prepare(["echo", "authorize"], {"echo": 7}, search=False, warm_up=False)
    assert ran == [7, 256]
