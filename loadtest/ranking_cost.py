"""What a routing decision costs: `python -m loadtest.ranking_cost`, some seconds.

Three candidates: whether each may be asked (with another account's breaker open and a maintenance
window elsewhere, so that nothing is skipped), what success and costs say of them, and what came of
the call. In CPU time of this process, beside a loop of a thousand additions, which costs about what
a decision may (22 to 30 µs where this was written): the gate is on their paired ratio, since
machines differ and the loop differs with them.
"""

import logging
import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.availability import AccountAvailability, Suspension, SuspensionKind
from gateway.routing.breakers import BreakerKey, BreakerLimits, Breakers, BreakerState
from gateway.routing.costs import CostBook, parse_costs
from gateway.routing.learning import LearningLimits, SuccessRanking
from gateway.routing.model import Candidate, Segment
from loadtest.bench.costs import Gate, cost_command, cpu_side, take_turns
from loadtest.bench.ratios import Measured, measured, paired

RATIO_MAX: Final = 1.0
"""A decision costs at most so many loops of a thousand additions."""

SEGMENT: Final = Segment("mer_1", Mode.TEST, "card", "visa", "EUR", "DE", "ECOMMERCE")
CANDIDATES: Final = [Candidate("psp", f"acc_{number}") for number in range(3)]
_ANSWERS: Final = (
    ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED),
    ConnectorAnswer(Delivery.ANSWERED, Verdict.DECLINED),
)
_FAILED: Final = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED)
_COSTS: Final = "\n".join(
    f"""
[[fee]]
account = "acc_{number}"
currency = "EUR"
percentage = "0.{number + 1}"
fixed_minor = 10
[[fee.interchange]]
scheme = "visa"
issuer_countries = ["DE"]
percentage = "0.2"
[[fee.interchange]]
percentage = "1.5"
"""
    for number in range(3)
)


class _Nobody:
    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        pass


class Decisions:
    """The parts, warm."""

    def __init__(self) -> None:
        self._breakers = Breakers(BreakerLimits(), _Nobody())
        self._availability = AccountAvailability(self._breakers)
        book = CostBook()
        book.put(SEGMENT.merchant_id, parse_costs(_COSTS))
        self._ranking = SuccessRanking(LearningLimits(), book)
        self._random = random.Random(1)
        now = datetime.now(UTC)
        window = Suspension(
            *("sus_1", SuspensionKind.MAINTENANCE, "", "elsewhere", "", "", "why", "login:ann"),
            begins_at=now,
            ends_at=now + timedelta(hours=1),
            begins_in_s=0.0,
            ends_in_s=3600.0,
        )
        self._availability.suspend([window], time.monotonic())
        elsewhere = Candidate("psp", "acc_elsewhere")
        for _ in range(BreakerLimits().calls_min):
            self._breakers.observed(SEGMENT, elsewhere, OperationKind.AUTHORIZE, _FAILED, 0.1)
        assert self._availability.refusal(elsewhere, "card") is not None
        for _ in range(1000):
            self.observe(self._random.choice(CANDIDATES))

    def decide(self) -> Candidate:
        """One decision."""
        method = SEGMENT.method
        refusal = self._availability.refusal
        there = [each for each in CANDIDATES if refusal(each, method) is None]
        ranked = self._ranking.rank(SEGMENT, there, 4990, self._random.getrandbits(64))
        chosen = ranked[0].candidate
        self._availability.admit(chosen, method)
        return chosen

    def observe(self, candidate: Candidate) -> None:
        """What came of it."""
        answer = _ANSWERS[self._random.random() < 0.1]
        self._ranking.observed(SEGMENT, candidate, OperationKind.AUTHORIZE, answer, 0.3)
        self._breakers.observed(SEGMENT, candidate, OperationKind.AUTHORIZE, answer, 0.3)


def _additions() -> int:
    total = 0
    for number in range(1000):
        total += number
    return total


async def measure(rounds: int) -> dict[str, Measured]:
    """The paired ratio, and each side in microseconds."""
    logging.getLogger("gateway.routing").setLevel(logging.ERROR)
    decisions = Decisions()
    sides = {
        "decision_us": cpu_side(decisions.decide),
        "loop_us": cpu_side(_additions),
        "observation_us": cpu_side(lambda: decisions.observe(CANDIDATES[0])),
    }
    spent = await take_turns(sides, rounds)
    return {
        "ratio": paired(spent["decision_us"], spent["loop_us"]),
        **{name: measured(values) for name, values in spent.items()},
    }


main = cost_command(
    measure,
    Gate("ratio", most=RATIO_MAX),
    {
        "decision_us": "a decision among three accounts, microseconds",
        "observation_us": "what came of a call, microseconds",
        "loop_us": "a loop of a thousand additions, microseconds",
        "ratio": "the decision, of the loop",
    },
    Path(".local/bench/ranking.json"),
)


if __name__ == "__main__":
    main()
