"""What rounds prove: medians, quartiles, paired ratios, and when a figure is worth nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PAIRS_MIN: Final = 7
"""Fewer alternating pairs prove nothing."""
IQR_MAX: Final = 0.20
"""The widest interquartile range of a figure, as a part of its median."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure over several rounds."""

    q1: float
    median: float
    q3: float
    rounds: int

    @property
    def spread(self) -> float:
        """The interquartile range as a part of the median."""
        return (self.q3 - self.q1) / self.median if self.median else float("inf")

    def problem(self, rounds_min: int = PAIRS_MIN) -> str:
        """Why the figure is invalid; empty where it is valid."""
        if self.rounds < rounds_min:
            return f"{self.rounds} rounds, not {rounds_min}"
        if self.spread > IQR_MAX:
            return f"interquartile range {self.spread:.0%} above {IQR_MAX:.0%}"
        return ""


NOTHING: Final = Measured(0.0, 0.0, 0.0, 0)
"""Where a round measured nothing at all."""


def measured(values: Sequence[float]) -> Measured:
    """Median and quartiles, of the values as all there are; NOTHING where one of them is 0."""
    if not values or not all(values):
        return NOTHING
    if len(values) == 1:
        return Measured(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Measured(q1, median, q3, len(values))


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Measured:
    """The ratio of two sides that took turns, round by round; NOTHING where a rate is 0.

    A machine that is slower for a minute is so for both rounds of a pair: that changes their ratio
    little, and the ratio of two medians much. Raises ValueError where the rounds do not match.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} rounds cannot be paired with {len(denominators)}")
    if not all(denominators):
        return NOTHING
    return measured([n / d for n, d in zip(numerators, denominators, strict=True)])


def turns(sides: Sequence[str], round_number: int) -> list[str]:
    """The order of the sides in a round: there and back, so that no side profits from its place."""
    return list(sides) if round_number % 2 == 0 else list(reversed(sides))
