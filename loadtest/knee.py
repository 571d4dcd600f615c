"""The search for the knee: the highest rate that holds the SLO. Pure."""

from dataclasses import dataclass, field
from typing import Final

GROWTH: Final = 1.5
"""From a rate that holds to the next one, while none has failed."""
PRECISION: Final = 0.05
"""The search ends when the failing rate is at most so much above the holding one."""
STEPS_MAX: Final = 12
RATE_MIN: Final = 10.0


@dataclass(slots=True)
class KneeSearch:
    """Asks for one rate after the other."""

    rate: float
    """What to try next, in sends a second."""
    holding: float = 0.0
    """The highest rate that held; 0: none did."""
    failing: float = 0.0
    """The lowest rate above it that did not; 0: none yet."""
    steps: int = 0
    tried: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the knee is known as exactly as wanted, or not to be found."""
        if self.steps >= STEPS_MAX or self.rate < RATE_MIN:
            return True
        return bool(
            self.holding and self.failing <= self.holding * (1 + PRECISION) and self.failing
        )

    def record(self, *, held: bool) -> None:
        """Whether `rate` held; sets the next one."""
        self.tried.append((self.rate, held))
        self.steps += 1
        if held:
            self.holding = self.rate
        else:
            self.failing = self.rate
        if self.holding and self.failing:
            # The mean of the ratios: the precision is a ratio too.
            self.rate = (self.holding * self.failing) ** 0.5
        else:
            self.rate = self.rate * GROWTH if held else self.rate / GROWTH
