"""Rounds in which the sides take turns, and before them the search for each one's concurrency."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from loadtest.bench.generator import WARM_UP_S, Generator, Load, NoWindow, OpenLoad, Target
from loadtest.bench.ratios import turns
from loadtest.bench.system import AT_ONCE_MAX, CALLERS_MAX, System

Progress = Callable[[str], None]
"""Takes a line for the person who waits."""

ORDER: Final = (
    *("grpcio_tls", "grpcio_authorize", "echo", "production", "authorize", "delayed", "naive"),
    *("native_echo", "batch", "pgbench", "stream"),
)
"""The sides' order in a round: what is divided by each other stands close together in time."""
SEARCH_S: Final = 1
"""The window of one try of the search."""
TRIES_MAX: Final = 3
"""How often a round is tried whose window the machine was too busy to see."""
SEARCH_GAIN_MIN: Final = 1.03
"""More concurrency is taken only where it brings this much more."""
DELAYED_WARM_UP_S: Final = 2
"""With a delayed PSP the load is even only after the slowest answers to its first calls."""
OPEN_RATE: Final = 5_000
OPEN_WARM_UP_CALLERS: Final = 128
OPEN_CALLERS_MAX: Final = 1_000
"""Calls under way at once in the open loop: a stall of 0.2 s; beyond it sends are dropped."""

_UNARY: Final = (32, 64, 128, 256, CALLERS_MAX)
_BULK: Final = (1, 2, 4, 8, 16)
CONCURRENCIES: Final[Mapping[str, tuple[int, ...]]] = {
    **dict.fromkeys(ORDER, _UNARY),
    # Each 1,000 calls a second keep some 150 callers waiting for the PSP; the others are at work.
    "delayed": (400, 600, 800, 1000, 1500, 2000, AT_ONCE_MAX),
    "batch": _BULK,
    "stream": _BULK,
    "pgbench": (8, 16, 32, 64, 96),
}
"""What the search may choose for each side: the same for all sides of single calls."""
STARTS: Final[Mapping[str, int]] = {
    **{side: choices[2] for side, choices in CONCURRENCIES.items()},
    "authorize": 256,
    "production": 256,
}
"""Where the search begins, and what is taken without it."""


@dataclass(slots=True)
class Rounds:
    """What was measured of one side."""

    concurrency: int
    loads: list[Load] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Calls or items a second, round by round."""
        return [load.per_s for load in self.loads]

    @property
    def failed(self) -> int:
        """Calls that were not answered with OK."""
        return sum(load.failed for load in self.loads)


class Bench:
    """Measures the sides of one system. Every method raises ProcessFailed."""

    def __init__(self, system: System, progress: Progress) -> None:
        self._system = system
        self._progress = progress
        self._generator = Generator(system.folder)
        self._pgbench: dict[str, str] | None = None
        self._took_s: dict[str, float] = {}
        self.concurrency: dict[str, int] = {}
        """The number of callers of each side."""
        self.tries: dict[str, dict[int, float]] = {}
        """What the search saw: calls or items a second by concurrency, for each side."""
        self.rounds: dict[str, Rounds] = {}
        """What `alternate` has measured until now, in whole rounds."""

    def run_once(self, side: str, concurrency: int, seconds: int) -> Load:
        """One round of a side."""
        if side == "pgbench":
            return self._run_pgbench(concurrency, seconds)
        system = self._system
        server, target, watched = system.server(side), system.target(side), system.watched(side)
        if side in ("batch", "stream"):
            load = self._generator.bulk(side, target, concurrency, seconds, watched=watched)
        else:
            load = self._single_calls(side, target, concurrency, seconds, watched)
        server.acknowledged += load.calls
        system.forget_logs()
        return load

    def _single_calls(
        self, side: str, target: Target, concurrency: int, seconds: int, watched: Mapping[str, int]
    ) -> Load:
        warm_up_s = DELAYED_WARM_UP_S if side == "delayed" else WARM_UP_S

        def run() -> Load:
            return self._generator.closed(
                target, concurrency, seconds, warm_up_s=warm_up_s, watched=watched
            )

        for _ in range(TRIES_MAX - 1):
            try:
                return run()
            except NoWindow:
                self._progress(f"{side}: the window was missed; once more")
        return run()

    def _run_pgbench(self, clients: int, seconds: int) -> Load:
        postgres = self._system.postgres
        if self._pgbench is None:
            dsn = urlsplit(self._system.new_database("pgbench"))
            self._pgbench = {
                "PGHOST": str(dsn.hostname),
                "PGPORT": str(dsn.port),
                "PGUSER": str(dsn.username),
                "PGPASSWORD": str(dsn.password),
                "PGDATABASE": dsn.path.removeprefix("/"),
            }
        return self._generator.pgbench(
            postgres.bin_dir / "pgbench", self._pgbench, clients, seconds + WARM_UP_S
        )

    def prepare(
        self, sides: Sequence[str], fixed: Mapping[str, int], *, search: bool, warm_up: bool
    ) -> None:
        """Start the sides, warm them up and settle their concurrency; what is searched is warm."""
        for side in self.ordered(sides):
            if search and side not in fixed:
                concurrency = self._search(side)
            else:
                concurrency = fixed.get(side, STARTS[side])
                if warm_up:
                    self.run_once(side, concurrency, SEARCH_S)
            self.concurrency[side] = concurrency
        self._system.analyze()

    def _search(self, side: str) -> int:
        """The concurrency at which the side does most: uphill by steps from where it begins."""
        choices = CONCURRENCIES[side]
        seen: dict[int, float] = {}

        def rate(index: int) -> float:
            concurrency = choices[index]
            if concurrency not in seen:
                load = self.run_once(side, concurrency, SEARCH_S)
                # What refuses calls cannot be compared.
                seen[concurrency] = 0.0 if load.failed else load.per_s
            return seen[concurrency]

        index = choices.index(STARTS[side])
        for step, gain_min in ((1, SEARCH_GAIN_MIN), (-1, 1.0)):
            # Fewer callers are better where they do as much; more have to earn their place. Where
            # calls are refused, there are too many callers.
            while 0 <= index + step < len(choices):
                if not rate(index):
                    if step > 0:
                        break
                elif rate(index + step) <= gain_min * rate(index):
                    break
                index += step
        self.tries[side] = seen
        shown = ", ".join(f"{each}: {seen[each]:,.0f}/s" for each in sorted(seen))
        self._progress(f"concurrency of {side}: {choices[index]} ({shown})")
        return choices[index]

    def alternate(
        self, sides: Sequence[str], pairs: int, seconds: int, what: str, until: float
    ) -> dict[str, Rounds]:
        """What `pairs` rounds measured, in which each side has its turn.

        Windows become shorter where the rounds would not end before `until` (time.monotonic()).
        """
        measured = {side: Rounds(self.concurrency[side]) for side in self.ordered(sides)}
        self.rounds = measured
        for number in range(pairs):
            began = time.monotonic()
            shown = []
            loads: dict[str, Load] = {}
            for side in turns([*measured], number):
                started = time.monotonic()
                load = loads[side] = self.run_once(side, measured[side].concurrency, seconds)
                self._took_s[side] = time.monotonic() - started
                failed = f" ({load.failed:,} failed)" if load.failed else ""
                shown.append(f"{side} {load.per_s:,.0f}{failed}")
            for side, load in loads.items():
                measured[side].loads.append(load)
            took_s = time.monotonic() - began
            self._progress(f"{what} {number + 1}/{pairs} ({took_s:.0f} s): {', '.join(shown)}")
            left = pairs - number - 1
            if seconds > SEARCH_S and time.monotonic() + left * took_s > until:
                seconds = SEARCH_S
                self._progress(f"time is short: windows of {seconds} s from here on")
        return measured

    def ordered(self, sides: Sequence[str]) -> list[str]:
        """Sides in the order of a round."""
        return [side for side in ORDER if side in sides]

    def round_s(self, side: str) -> float:
        """How long a round of a side took, in seconds."""
        return self._took_s.get(side, 0.0)

    def open_loop(self, seconds: int) -> OpenLoad:
        """Calls at a constant rate, native."""
        server = self._system.server("open_5000")
        self.run_once("open_5000", OPEN_WARM_UP_CALLERS, SEARCH_S)
        self._system.analyze()
        self._progress(f"open loop: {OPEN_RATE:,}/s for {seconds} s")
        load = self._generator.open(server.target, OPEN_RATE, seconds, OPEN_CALLERS_MAX)
        server.acknowledged += load.calls
        self._system.forget_logs()
        return load
