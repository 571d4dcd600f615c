"""The metrics of several processes as those of one: pure functions on what each of them counted."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

OverWorkers: TypeAlias = Literal["sum", "max", "min", "apart"]
"""What the values of several workers make together; `apart`: each keeps its own, by a label."""
Snapshot: TypeAlias = list[list[Any]]
"""What one process counted, as JSON can hold it: of each family its name, its help text, its type,
its OverWorkers, and its samples, each a name, labels, a value and, where there is one, an exemplar:
its labels, its value and its time."""
Encode: TypeAlias = Callable[[Collector], bytes]
"""A text format for metrics."""

WORKER_LABEL: Final = "worker"
_GROWING: Final = frozenset({"counter", "histogram", "summary"})
"""Types whose values only grow: those of a worker that has gone stay in the sums."""
_PROCESS: Final = "process_"
"""What the families of `ProcessCollector` begin with: of a process, and so never summed. They tell
which worker is busy, since SO_REUSEPORT spreads connections, not calls."""

_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and labels."""


def take_snapshot(registry: Collector, over_workers: Mapping[str, OverWorkers]) -> Snapshot:
    """What a registry holds now. Families that `over_workers` does not name are summed."""
    return [
        [
            family.name,
            family.documentation,
            family.type,
            "apart" if family.name.startswith(_PROCESS) else over_workers.get(family.name, "sum"),
            [
                [sample.name, dict(sample.labels), sample.value]
                + ([list(sample.exemplar)] if sample.exemplar is not None else [])
                for sample in family.samples
            ],
        ]
        for family in registry.collect()
    ]


@dataclass(slots=True)
class _Family:
    text: str
    kind: str
    over_workers: OverWorkers
    samples: dict[_Key, float] = field(default_factory=dict)
    exemplars: dict[_Key, Exemplar] = field(default_factory=dict)

    def add(self, key: _Key, value: float, over_workers: OverWorkers) -> None:
        known = self.samples.get(key)
        if known is None:
            self.samples[key] = value
        elif over_workers == "max":
            self.samples[key] = max(known, value)
        elif over_workers == "min":
            self.samples[key] = min(known, value)
        else:
            self.samples[key] = known + value

    def show(self, key: _Key, exemplar: Exemplar) -> None:
        """Keep the latest exemplar of a sample."""
        known = self.exemplars.get(key)
        if known is None or _time(known) < _time(exemplar):
            self.exemplars[key] = exemplar

    def copy(self) -> "_Family":
        """One that may be added to."""
        samples, exemplars = dict(self.samples), dict(self.exemplars)
        return _Family(self.text, self.kind, self.over_workers, samples, exemplars)


def _time(exemplar: Exemplar) -> float:
    return float(exemplar.timestamp or 0)


class MergedMetrics:
    """The metrics of all workers, those that have gone included.

    A worker is named by its place. Whoever takes a place later continues the counters of the one
    before, so that no sum ever goes backwards. What is kept apart is its process's own and ends
    with it, as of any process that is started anew.
    """

    def __init__(self) -> None:
        self._last: dict[str, Snapshot] = {}
        self._gone: dict[str, _Family] = {}

    def update(self, worker: str, snapshot: Snapshot) -> None:
        """The latest that the worker counted."""
        self._last[worker] = snapshot

    def retire(self, worker: str) -> None:
        """The worker has ended: what it counted stays in sums, what it measured goes."""
        snapshot = self._last.pop(worker, [])
        counted = (each for each in snapshot if each[2] in _GROWING and each[3] != "apart")
        _merge(self._gone, worker, counted)

    def render(self, encode: Encode = generate_latest) -> bytes:
        """All in Prometheus' text format, or another one."""
        families = {name: gone.copy() for name, gone in self._gone.items()}
        for worker, snapshot in self._last.items():
            _merge(families, worker, snapshot)
        return encode(_Rendered(families))


class _Rendered(Collector):
    def __init__(self, families: Mapping[str, _Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            metric = Metric(name, family.text, family.kind)
            for key, value in family.samples.items():
                sample, labels = key
                exemplar = family.exemplars.get(key)
                metric.add_sample(sample, dict(labels), value, exemplar=exemplar)
            yield metric


def _merge(families: dict[str, _Family], worker: str, snapshot: Iterable[list[Any]]) -> None:
    for name, text, kind, over_workers, samples in snapshot:
        family = families.get(name)
        if family is None:
            family = families[name] = _Family(text, kind, over_workers)
        for sample, labels, value, *exemplars in samples:
            own = {**labels, WORKER_LABEL: worker} if over_workers == "apart" else labels
            key = (sample, tuple(sorted(own.items())))
            family.add(key, math.nan if value is None else value, over_workers)
            for exemplar in exemplars:
                family.show(key, Exemplar(*exemplar))
