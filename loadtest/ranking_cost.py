"""What a routing decision costs: `python -m loadtest.ranking_cost`, some seconds.

Three candidates: whether each may be asked (with another account's breaker open and a maintenance
window elsewhere, so that nothing is skipped), what success and costs say of them, and what came of
the call. In CPU time of this process, beside a loop of a thousand additions, which costs about what
a decision may (22 to 30 µs where this was written): the gate is on their paired ratio, since
machines differ and the loop differs with them.
"""

import json
import logging
import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click

from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.availability import AccountAvailability, Suspension, SuspensionKind
from gateway.routing.breakers import BreakerKey, BreakerLimits, Breakers, BreakerState
from gateway.routing.costs import CostBook, parse_costs
from gateway.routing.learning import LearningLimits, SuccessRanking
from gateway.routing.model import Candidate, Segment
from loadtest.bench.ratios import PAIRS_MIN, measured, paired

RATIO_MAX: Final = 1.0
"""A decision costs at most so many loops of a thousand additions."""
DECISIONS_PER_ROUND: Final = 2_000
SUMMARY: Final = Path(".local/bench/ranking.json")

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


def _us(work: Callable[[], object]) -> float:
    """The CPU time of one, in microseconds."""
    began = time.process_time()
    for _ in range(DECISIONS_PER_ROUND):
        work()
    return 1e6 * (time.process_time() - began) / DECISIONS_PER_ROUND


@click.command()
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(PAIRS_MIN))
def main(rounds: int) -> None:
    """Measure, print, write the summary; exit with 1 where the gate fails."""
    logging.getLogger("gateway.routing").setLevel(logging.ERROR)
    decisions = Decisions()
    loops: list[float] = []
    decided: list[float] = []
    observed: list[float] = []
    for number in range(rounds):
        sides = [(loops, _additions), (decided, decisions.decide)]
        for figures, work in sides if number % 2 else reversed(sides):
            figures.append(_us(work))
        observed.append(_us(lambda: decisions.observe(CANDIDATES[0])))
    ratio = paired(decided, loops)
    problem = ratio.problem()
    if not problem and ratio.median > RATIO_MAX:
        problem = f"ratio {ratio.median:.2f} above {RATIO_MAX}"
    values = {
        "ratio": ratio,
        "decision_us": measured(decided),
        "observation_us": measured(observed),
        "loop_us": measured(loops),
    }
    for name, figure in values.items():
        click.echo(f"{figure.median:8.2f} [{figure.q1:.2f}, {figure.q3:.2f}]  {name}")
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    told = {name: [each.q1, each.median, each.q3] for name, each in values.items()}
    summary = {"rounds": rounds, "figures": told, "gate": RATIO_MAX, "problem": problem}
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if problem:
        click.echo(f"FAILED: {problem}")
        sys.exit(1)


if __name__ == "__main__":
    main()
