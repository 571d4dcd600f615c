"""What the samples of a run say: counts, and HdrHistogram percentiles up to the maximum."""

import math
from array import array
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import grpc
from hdrh.histogram import HdrHistogram

from loadtest.arrivals import WARM_UP, Segment
from loadtest.calls import CONTRADICTED, DROPPED, OK, UNEXPECTED
from loadtest.mixes import Kind
from loadtest.samples import Sample

LATE_MS: Final = 10.0
"""A send that leaves so much later than intended is counted as late."""
UNIT_MS: Final = 0.01
"""The histograms' resolution; three digits are kept above it."""
HIGHEST_MS: Final = 3_600_000.0
DIGITS: Final = 3
CURVE_PERCENTILES: Final = (
    *(0, 10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 96, 97, 98, 98.5, 99),
    *(99.25, 99.5, 99.75, 99.9, 99.95, 99.99, 99.995, 99.999, 100),
)

RESOURCE_EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]

_CODE_NAMES: Final = {
    **{code.value[0]: code.name for code in grpc.StatusCode},
    DROPPED: "dropped",
    UNEXPECTED: "unexpected state",
    CONTRADICTED: "contradicted",
}


def code_name(code: int) -> str:
    """A sample's code for people."""
    return _CODE_NAMES.get(code, str(code))


class Distribution:
    """Durations in milliseconds."""

    def __init__(self) -> None:
        self._waiting: Counter[int] = Counter()
        self._histogram = HdrHistogram(1, int(HIGHEST_MS / UNIT_MS), DIGITS)
        self.max_ms = 0.0
        """Exact."""

    def record(self, value_ms: float) -> None:
        """Count a duration."""
        self._waiting[int(value_ms / UNIT_MS + 0.5)] += 1
        self.max_ms = max(self.max_ms, value_ms)

    @property
    def count(self) -> int:
        """How many were recorded."""
        self._fold()
        return int(self._histogram.get_total_count())

    def percentile(self, percent: float) -> float:
        """The value that so many percent do not exceed, in milliseconds; 0 without any value."""
        self._fold()
        if percent >= 100:
            return self.max_ms
        # The histogram gives the upper end of a bucket, which may lie above the largest value.
        value_ms: float = self._histogram.get_value_at_percentile(percent) * UNIT_MS
        return min(value_ms, self.max_ms)

    def curve(self) -> list[tuple[float, float]]:
        """Percentiles with their values, up to the maximum."""
        return [(percent, self.percentile(percent)) for percent in CURVE_PERCENTILES]

    def _fold(self) -> None:
        # Equal values together: the histogram is not fast.
        for value, count in self._waiting.items():
            self._histogram.record_value(value, count)
        self._waiting.clear()


@dataclass(slots=True)
class Stats:
    """Counts and distributions of some of a run's intended sends."""

    offered: int = 0
    ok: int = 0
    dropped: int = 0
    errors: int = 0
    """Neither answered as expected nor dropped."""
    late: int = 0
    latency: Distribution = field(default_factory=Distribution)
    """Of what was answered as expected, from the intended time."""
    added: Distribution = field(default_factory=Distribution)
    """The same without the PSP's delay."""
    codes: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        """Count a sample."""
        self.offered += 1
        self.late += sample.late_ms > LATE_MS
        self.codes[sample.code] += 1
        if sample.code == OK:
            self.ok += 1
            self.latency.record(sample.latency_ms)
            self.added.record(sample.added_ms)
        elif sample.code == DROPPED:
            self.dropped += 1
        else:
            self.errors += 1

    def figures(self) -> dict[str, Any]:
        """For a summary."""
        return {
            "offered": self.offered,
            "ok": self.ok,
            "errors": self.errors,
            "dropped": self.dropped,
            "late": self.late,
            **_percentiles(self.latency, ""),
            **_percentiles(self.added, "added_"),
        }


def _percentiles(distribution: Distribution, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}p50_ms": round(distribution.percentile(50), 3),
        f"{prefix}p99_ms": round(distribution.percentile(99), 3),
        f"{prefix}p999_ms": round(distribution.percentile(99.9), 3),
        f"{prefix}max_ms": round(distribution.max_ms, 3),
    }


@dataclass(frozen=True, slots=True)
class Second:
    """What was intended in one second, and what was answered in it."""

    at_s: int
    offered: int
    answered: int
    errors: int
    dropped: int
    added_p50_ms: float
    added_p99_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    latency_max_ms: float


class Analysis:
    """Of a whole run. Every sample is looked at once."""

    def __init__(
        self,
        samples: Iterable[Sample],
        segments: Sequence[Segment],
        *,
        until_s: float = float("inf"),
    ) -> None:
        """`until_s`: where the schedule was left, in seconds since its start."""
        self.segments = segments
        self.whole = Stats()
        """Of what is measured: all but the warm-up."""
        self.of_segment = {segment.name: Stats() for segment in segments}
        self.of_kind: dict[str, Stats] = defaultdict(Stats)
        self.answered: Counter[str] = Counter()
        """Answers as expected by the segment in which they came, whenever they were sent; what came
        after the last segment is in none."""
        self.served: Counter[str] = Counter()
        """Sends of a segment that were answered as expected before its end, the PSP's delay left
        out: what a segment leaves to the next one, or refuses, is more than the server can do."""
        self.refusals = Distribution()
        """Latencies of what was refused with RESOURCE_EXHAUSTED."""
        self._added: dict[int, array[float]] = defaultdict(lambda: array("f"))
        self._latencies: dict[int, array[float]] = defaultdict(lambda: array("f"))
        self._counts: dict[str, Counter[int]] = defaultdict(Counter)
        ends_s = accumulate(segment.duration_s for segment in segments)
        self._ends_s = [min(each, until_s) for each in ends_s]
        measured = [segment.name != WARM_UP for segment in segments]
        for sample in samples:
            self.of_segment[segments[sample.segment].name].add(sample)
            self._add_to_timeline(sample)
            if not measured[sample.segment]:
                continue
            self.whole.add(sample)
            self.of_kind[Kind(sample.kind).name.lower()].add(sample)
            if sample.code == RESOURCE_EXHAUSTED:
                self.refusals.record(sample.latency_ms)

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """Each segment's name, beginning and end, as far as it was sent."""
        names = [each.name for each in self.segments]
        return list(zip(names, [0.0, *self._ends_s[:-1]], self._ends_s, strict=True))

    @property
    def duration_s(self) -> float:
        """Of what is measured."""
        return sum(end - begin for name, begin, end in self.spans if name != WARM_UP)

    def offered_rps(self) -> float:
        """Intended sends a second of all that is measured; 0 where that took no time."""
        return self.whole.offered / self.duration_s if self.duration_s else 0.0

    def answered_rps(self, name: str = "") -> float:
        """Answers as expected a second that came in a segment, or in all that is measured; 0 where
        that took no time.
        """
        names = {name} if name else self.of_segment.keys() - {WARM_UP}
        duration_s = sum(end - begin for each, begin, end in self.spans if each in names)
        return sum(self.answered[each] for each in names) / duration_s if duration_s else 0.0

    def _add_to_timeline(self, sample: Sample) -> None:
        second = int(sample.at_s)
        self._counts["offered"][second] += 1
        if sample.code == OK:
            self._added[second].append(sample.added_ms)
            self._latencies[second].append(sample.latency_ms)
            if sample.at_s + sample.added_ms / 1000 < self._ends_s[sample.segment]:
                self.served[self.segments[sample.segment].name] += 1
            answered_s = sample.at_s + sample.latency_ms / 1000
            self._counts["answered"][int(answered_s)] += 1
            segment = bisect(self._ends_s, answered_s)
            if segment < len(self.segments):
                self.answered[self.segments[segment].name] += 1
        else:
            self._counts["dropped" if sample.code == DROPPED else "errors"][second] += 1

    def timeline(self) -> list[Second]:
        """Second by second, the warm-up too."""
        counts = self._counts
        last = max((max(each) for each in counts.values() if each), default=-1)
        return [self._second(at_s) for at_s in range(last + 1)]

    def _second(self, at_s: int) -> Second:
        added = sorted(self._added.get(at_s, ()))
        latencies = sorted(self._latencies.get(at_s, ()))
        return Second(
            at_s=at_s,
            offered=self._counts["offered"][at_s],
            answered=self._counts["answered"][at_s],
            errors=self._counts["errors"][at_s],
            dropped=self._counts["dropped"][at_s],
            added_p50_ms=quantile(added, 0.5),
            added_p99_ms=quantile(added, 0.99),
            latency_p50_ms=quantile(latencies, 0.5),
            latency_p99_ms=quantile(latencies, 0.99),
            latency_max_ms=latencies[-1] if latencies else 0.0,
        )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value of ordered ones that such a share does not exceed (nearest rank); 0 of none."""
    if not ordered:
        return 0.0
    return ordered[min(max(math.ceil(share * len(ordered)), 1), len(ordered)) - 1]
