"""What the processes of a run use: CPU and memory of each process tree, second by second."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import psutil

from loadtest.children import child_pids

SAMPLE_S: Final = 1.0
MB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process tree in one interval."""

    cpu_percent: float
    """100 is one core."""
    memory_mb: float
    """Resident, what processes share counted once."""
    largest_mb: float
    """Resident memory of its largest process."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Of everything in one interval."""

    at: float
    """Its end, in seconds since 1970."""
    machine_percent: float
    """Of all cores: 100 where none is idle."""
    of: Mapping[str, Usage]


class _Trees:
    """The process trees below some roots, as one."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._roots = [*pids]
        self._members: dict[int, psutil.Process] = {}
        self._cpu_s: dict[int, float] | None = None
        """What each had used at the last look; None before the first one."""

    def usage(self, elapsed_s: float) -> Usage:
        members: dict[int, psutil.Process] = {}
        for pid in (each for root in self._roots for each in _tree(root)):
            with contextlib.suppress(psutil.NoSuchProcess):
                members[pid] = self._members.get(pid) or psutil.Process(pid)
        self._members = members
        before, self._cpu_s = self._cpu_s, {}
        used_s, own, shared, largest = 0.0, 0, 0, 0
        for pid, process in members.items():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess), process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
                total_s = self._cpu_s[pid] = times.user + times.system
                # What is new since the last look has used all of it since then.
                used_s += 0.0 if before is None else total_s - before.get(pid, 0.0)
                own += memory.rss - memory.shared
                shared = max(shared, memory.shared)
                largest = max(largest, memory.rss)
        return Usage(
            cpu_percent=round(100 * used_s / elapsed_s, 1),
            memory_mb=round((own + shared) / MB, 1),
            largest_mb=round(largest / MB, 1),
        )


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in child_pids(pid):
        yield from _tree(child)


class Observer:
    """Watches process trees in a thread until it is stopped."""

    def __init__(self, pids: Mapping[str, Iterable[int]]) -> None:
        """By their name, the roots of the trees that are watched as one."""
        self._trees = {name: _Trees(each) for name, each in pids.items()}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.observations: list[Observation] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator["Observer"]:
        """Watch while the context lasts."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            self._thread.join()

    def _watch(self) -> None:
        psutil.cpu_percent()
        before = time.monotonic()
        # The first look is what the second one is compared with.
        for tree in self._trees.values():
            tree.usage(1.0)
        while not self._stopped.wait(SAMPLE_S):
            now = time.monotonic()
            elapsed_s, before = now - before, now
            self.observations.append(
                Observation(
                    at=time.time(),
                    machine_percent=psutil.cpu_percent(),
                    of={name: tree.usage(elapsed_s) for name, tree in self._trees.items()},
                )
            )


def busiest(observations: list[Observation]) -> list[tuple[str, float]]:
    """Process trees by their mean CPU, the busiest first, in percent of a core."""
    if not observations:
        return []
    names = observations[0].of
    means = {
        name: sum(each.of[name].cpu_percent for each in observations) / len(observations)
        for name in names
    }
    return sorted(((name, round(mean, 1)) for name, mean in means.items()), key=lambda x: -x[1])
