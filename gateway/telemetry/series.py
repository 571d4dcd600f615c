"""Counters, gauges and histograms as plain dicts and lists, Prometheus' families when asked for.

One thread writes, that of the event loop, and a write is some dict and list operations: no lock, no
look-up of a labelled child, no search for a bucket. `collect` copies each dict and each histogram's
cell by one call of C code before it looks at them, so it may run on the loop or on another thread:
what it misses of a write under way, the next scrape has. A histogram's count is the sum of its
copied buckets, and so always agrees with them.
"""

import time
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sized
from enum import Enum
from typing import Final, Literal, TypeAlias

from prometheus_client.core import Metric
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from gateway.domain.pan import mask_pans
from gateway.telemetry.merging import OverWorkers

LABEL_SETS_MAX: Final = 1000
"""Combinations of label values of one metric; any further one is counted as `other`."""

LATEST_MAX: Final = 128
"""So many values of a histogram are added up together: in order, which costs less for each."""

Label: TypeAlias = str | Enum
"""A label's value; of an Enum that is no text its name, which is slow to ask for at every call."""
Labels: TypeAlias = tuple[Label, ...]

_OTHER: Final = "other"


def _texts(labels: Labels) -> tuple[str, ...]:
    """The values as they are shown. Two may be shown alike: card numbers of one length, masked."""
    return tuple(mask_pans(str(each) if isinstance(each, str) else each.name) for each in labels)


def _bounded(labels: Labels, known: Sized) -> Labels:
    """`labels`, which are not known yet, or those that stand for all beyond the limit."""
    return labels if len(known) < LABEL_SETS_MAX else tuple(_OTHER for _ in labels)


class Series(ABC):
    """One metric: its name, what it means, and a value for each combination of its labels."""

    kind: Literal["counter", "gauge", "histogram"]

    def __init__(
        self, name: str, text: str, *labels: str, over_workers: OverWorkers = "sum"
    ) -> None:
        self.name = name
        """As its family has it: a counter's samples end in `_total` besides."""
        self.text = text
        self.labels = labels
        self.over_workers: OverWorkers = over_workers
        """What the values of several workers make together."""

    @abstractmethod
    def collect(self) -> Metric:
        """Its family, with card numbers masked in the values of labels."""

    def _family(self) -> Metric:
        return Metric(self.name, self.text, self.kind)

    def _shown(self, texts: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(self.labels, texts, strict=True))


class _Scalar(Series):
    _suffix = ""

    def __init__(
        self, name: str, text: str, *labels: str, over_workers: OverWorkers = "sum"
    ) -> None:
        super().__init__(name, text, *labels, over_workers=over_workers)
        # Each value in a list of its own: to raise it, its labels are hashed once, not twice.
        self._values: dict[Labels, list[float]] = {} if labels else {(): [0]}

    def add(self, labels: Labels = (), by: float = 1) -> None:
        """Raise the value of these labels."""
        try:
            self._values[labels][0] += by
        except KeyError:
            self._values.setdefault(_bounded(labels, self._values), [0])[0] += by

    def set(self, value: float, labels: Labels = ()) -> None:
        """Replace it."""
        try:
            self._values[labels][0] = value
        except KeyError:
            self._values[_bounded(labels, self._values)] = [value]

    def remove(self, labels: Labels) -> None:
        """Show these labels no longer."""
        self._values.pop(labels, None)

    def labels_shown(self) -> list[Labels]:
        """The combinations that have a value."""
        return list(self._values)

    def value(self, labels: Labels = ()) -> float:
        """The value of these labels; 0 where there is none."""
        return self._values.get(labels, [0])[0]

    def collect(self) -> Metric:
        """See Series."""
        family = self._family()
        summed: dict[tuple[str, ...], float] = {}
        for labels, [value] in self._values.copy().items():
            texts = _texts(labels)
            summed[texts] = summed.get(texts, 0) + value
        for texts, value in summed.items():
            family.add_sample(self.name + self._suffix, self._shown(texts), value)
        return family


class Counter(_Scalar):
    """What only grows. `set` is for what is counted elsewhere and read when it is asked for."""

    kind = "counter"
    _suffix = "_total"


class Gauge(_Scalar):
    """What goes up and down."""

    kind = "gauge"


class Histogram(Series):
    """How often a value fell into each bucket, and the sum of all values."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> None:
        super().__init__(name, text, *labels)
        self.bounds = bounds
        """The buckets' upper bounds, inclusive, in ascending order; one without a bound follows."""
        # A cell: the sums, which are what fell into each bucket alone, the one without a bound, and
        # the sum of values; and the latest values, which are yet to be added to them. Sums do not
        # change: new ones take their place, by one call, with an empty list of latest values.
        self._cells: dict[Labels, list[list[float]]] = {} if labels else {(): self._cell()}

    def _cell(self) -> list[list[float]]:
        return [[0] * (len(self.bounds) + 2), []]

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count a value."""
        try:
            cell = self._cells[labels]
        except KeyError:
            cell = self._cells.setdefault(_bounded(labels, self._cells), self._cell())
        latest = cell[1]
        latest.append(value)
        if len(latest) == LATEST_MAX:
            cell[:] = self._added_up(cell), []

    def _added_up(self, cell: list[list[float]]) -> list[float]:
        """The sums of a cell with its latest values."""
        sums, latest = cell[0].copy(), cell[1].copy()
        sums[-1] = sum(latest, sums[-1])
        latest.sort()
        done = 0
        for index, bound in enumerate(self.bounds):
            until = bisect_right(latest, bound, done)
            sums[index] += until - done
            done = until
        sums[-2] += len(latest) - done
        return sums

    def collect(self) -> Metric:
        """See Series."""
        family = self._family()
        bounds = [*map(floatToGoString, self.bounds), "+Inf"]
        summed: dict[tuple[str, ...], list[float]] = {}
        for labels, cell in self._cells.copy().items():
            texts = _texts(labels)
            before = summed.get(texts, self._cell()[0])
            sums = self._added_up(cell.copy())
            summed[texts] = [a + b for a, b in zip(before, sums, strict=True)]
        exemplars = self._exemplars_shown()
        for texts, (*buckets, total) in summed.items():
            shown = self._shown(texts)
            count = 0.0
            for index, (bound, inside) in enumerate(zip(bounds, buckets, strict=True)):
                count += inside
                exemplar = exemplars.get((texts, index))
                labelled = {**shown, "le": bound}
                family.add_sample(f"{self.name}_bucket", labelled, count, exemplar=exemplar)
            family.add_sample(f"{self.name}_count", shown, count)
            family.add_sample(f"{self.name}_sum", shown, total)
        return family

    def _exemplars_shown(self) -> dict[tuple[tuple[str, ...], int], Exemplar]:
        """The exemplars by the labels as they are shown, and the bucket's place."""
        return {}


class ExemplarHistogram(Histogram):
    """A histogram that keeps of each bucket the latest value of a call that is traced.

    `trace_id` tells the running code's trace; empty where it is not traced.
    """

    def __init__(
        self,
        name: str,
        text: str,
        bounds: tuple[float, ...],
        *labels: str,
        trace_id: Callable[[], str],
    ) -> None:
        super().__init__(name, text, bounds, *labels)
        self._trace_id = trace_id
        self._exemplars: dict[Labels, dict[int, Exemplar]] = {}

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count a value, and keep it where it is of a traced call."""
        super().observe(value, labels)
        trace_id = self._trace_id()
        if trace_id:
            if labels not in self._cells:
                labels = tuple(_OTHER for _ in labels)
            exemplar = Exemplar({"trace_id": trace_id}, value, time.time())
            kept = self._exemplars.setdefault(labels, {})
            kept[bisect_left(self.bounds, value)] = exemplar

    def _exemplars_shown(self) -> dict[tuple[tuple[str, ...], int], Exemplar]:
        return {
            (_texts(labels), index): exemplar
            for labels, kept in self._exemplars.copy().items()
            for index, exemplar in kept.copy().items()
        }
