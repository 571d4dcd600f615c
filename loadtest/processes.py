"""What the processes of a run use: CPU and memory of each process tree, second by second."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import psutil

SAMPLE_S: Final = 1.0
TREE_S: Final = 5.0
"""How often it is looked for new children."""
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
        self._roots = [psutil.Process(pid) for pid in pids]
        self._members: list[psutil.Process] = []
        self._looked_at = -TREE_S
        self._cpu_s: dict[int, float] = {}

    def usage(self, elapsed_s: float) -> Usage:
        now = time.monotonic()
        if now - self._looked_at >= TREE_S:
            self._looked_at = now
            self._members = [each for root in self._roots for each in _tree(root)]
        used_s, own, shared, largest = 0.0, 0, 0, 0
        for process in self._members:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess), process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
                total_s = times.user + times.system
                # A process that is new to us counts from its next interval on.
                used_s += total_s - self._cpu_s.get(process.pid, total_s)
                self._cpu_s[process.pid] = total_s
                own += memory.rss - memory.shared
                shared = max(shared, memory.shared)
                largest = max(largest, memory.rss)
        return Usage(
            cpu_percent=round(100 * used_s / elapsed_s, 1),
            memory_mb=round((own + shared) / MB, 1),
            largest_mb=round(largest / MB, 1),
        )


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


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
