"""When a load test intends to send: seeded schedules, pure, without a clock.

An open-loop generator sends at times that were fixed beforehand, however slowly the server answers;
its latencies count from these times, so that a stalled server cannot hide its stall by stalling the
generator (coordinated omission).
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, NamedTuple

RATE_MAX: Final = 100_000.0
"""Arrivals a second; no generator of ours comes near it."""
DURATION_S_MAX: Final = 86_400.0
WARM_UP: Final = "warm-up"
"""The segment that is sent and audited, and not measured."""
SPIKE_FACTOR: Final = 3.0
"""How many times the rate a spike is."""
RAMP_FROM: Final = 0.1
"""The share of the rate with which a ramp begins and ends."""

Process = Literal["poisson", "constant"]
Profile = Literal["steady", "ramp", "spike", "soak", "overload"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a schedule, whose rate changes linearly."""

    name: str
    duration_s: float
    rate_from: float
    """Arrivals a second at its beginning."""
    rate_to: float
    """Arrivals a second at its end."""

    def __post_init__(self) -> None:
        if not 0 < self.duration_s <= DURATION_S_MAX:
            raise ValueError(f"a duration must be above 0 and at most {DURATION_S_MAX:g} s")
        for rate in (self.rate_from, self.rate_to):
            if not 0 < rate <= RATE_MAX:
                raise ValueError(f"a rate must be above 0 and at most {RATE_MAX:g} a second")

    @property
    def arrivals(self) -> float:
        """How many arrivals are expected."""
        return self.duration_s * (self.rate_from + self.rate_to) / 2

    def time_of(self, arrivals: float) -> float:
        """After how many seconds so many arrivals are expected; at most `duration_s`."""
        # The root of rate_from t + growth t²/2 = arrivals, in the form that loses no digits where
        # growth is small.
        growth = (self.rate_to - self.rate_from) / self.duration_s
        root = math.sqrt(max(0.0, self.rate_from**2 + 2 * growth * arrivals))
        return min(2 * arrivals / (self.rate_from + root), self.duration_s)


class Arrival(NamedTuple):
    """One intended send."""

    at_s: float
    """Seconds since the start of the run."""
    segment: int
    """The segment's place in the schedule."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Segments one after the other, and the seed that draws the same arrivals every time."""

    segments: Sequence[Segment]
    process: Process = "poisson"
    seed: int = 1

    @property
    def duration_s(self) -> float:
        """The length of the whole."""
        return sum(segment.duration_s for segment in self.segments)

    def share(self, index: int, count: int) -> Iterator[Arrival]:
        """Every `count`-th arrival from the `index`-th on: what one of `count` generators sends.

        All shares together are the whole schedule, whatever `count` is. Raises ValueError.
        """
        if not 0 <= index < count:
            raise ValueError(f"no share {index} of {count}")
        return islice(self.arrivals(), index, None, count)

    def arrivals(self) -> Iterator[Arrival]:
        """Every arrival in its order.

        A process of rate 1 is carried through the inverse of the expected number of arrivals, which
        gives the Poisson process of a rate that changes (its intervals are exponential where the
        rate is constant), and equal steps for a constant one.
        """
        source = random.Random(self.seed)
        poisson = self.process == "poisson"
        begin_s = 0.0
        expected_before = 0.0
        at = source.expovariate(1.0) if poisson else 0.5
        for index, segment in enumerate(self.segments):
            expected_after = expected_before + segment.arrivals
            while at < expected_after:
                yield Arrival(begin_s + segment.time_of(at - expected_before), index)
                at += source.expovariate(1.0) if poisson else 1.0
            begin_s += segment.duration_s
            expected_before = expected_after


def segments_of(
    profile: Profile, rate: float, duration_s: float, *, overload_factor: float = 3.0
) -> tuple[Segment, ...]:
    """The segments of a profile without its warm-up. Raises ValueError for a bad rate or duration.

    `rate` is the steady one: what a ramp rises to, what a spike rises from, the capacity that an
    overload exceeds by `overload_factor`.
    """
    low = RAMP_FROM * rate
    match profile:
        case "steady" | "soak":
            return (Segment(profile, duration_s, rate, rate),)
        case "ramp":
            return (
                Segment("up", 0.5 * duration_s, low, rate),
                Segment("top", 0.3 * duration_s, rate, rate),
                Segment("down", 0.2 * duration_s, rate, low),
            )
        case "spike":
            return (
                Segment("before", 0.4 * duration_s, rate, rate),
                Segment("spike", 0.1 * duration_s, SPIKE_FACTOR * rate, SPIKE_FACTOR * rate),
                Segment("after", 0.5 * duration_s, rate, rate),
            )
        case "overload":
            beyond = overload_factor * rate
            return (
                Segment("base", 0.3 * duration_s, rate, rate),
                Segment("overload", 0.4 * duration_s, beyond, beyond),
                Segment("recovery", 0.3 * duration_s, rate, rate),
            )


def warm_up(rate: float, duration_s: float) -> tuple[Segment, ...]:
    """From a tenth of the rate to the rate; nothing where the duration is 0."""
    return (Segment(WARM_UP, duration_s, RAMP_FROM * rate, rate),) if duration_s > 0 else ()
