"""For how long the simulated PSP takes."""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

LATENCY_MS_MAX: Final = 60_000.0
"""No drawn latency is longer."""

_P99: Final = NormalDist().inv_cdf(0.99)


@dataclass(frozen=True, slots=True)
class Latency:
    """A log-normal distribution of the time that the PSP works, in milliseconds."""

    p50_ms: float = 0.0
    p99_ms: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.p50_ms <= self.p99_ms <= LATENCY_MS_MAX:
            raise ValueError(f"latency must hold 0 <= p50 <= p99 <= {LATENCY_MS_MAX:g} ms")
        if self.p50_ms == 0 and self.p99_ms > 0:
            raise ValueError("a latency with a p99 needs a p50 above 0")

    @classmethod
    def parse(cls, text: str) -> "Latency":
        """From "p50,p99" or one number for both; raises ValueError."""
        p50, _, p99 = text.partition(",")
        return cls(float(p50), float(p99 or p50))

    def draw(self, source: random.Random) -> float:
        """One duration in milliseconds."""
        if self.p50_ms == 0:
            return 0.0
        sigma = math.log(self.p99_ms / self.p50_ms) / _P99
        drawn = self.p50_ms if sigma == 0 else source.lognormvariate(math.log(self.p50_ms), sigma)
        return min(drawn, LATENCY_MS_MAX)
