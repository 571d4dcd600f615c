"""People who end doubts: they look at the PSP's books, and say what they saw.

They are careful: nothing that was sent may still be on its way. Recovery is at work meanwhile, and
two of them may decide at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gateway.application.ports import Resolution
from gateway.domain import decisions
from gateway.domain.model import DoubtOutcome, OperationKind, OperationState
from tests.chaos.history import Decision
from tests.chaos.oracle import standing_effects

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from gateway.domain.model import Operation
    from tests.chaos.history import History, Row
    from tests.simulation.database import Database

K = OperationKind

AGE_S: Final = 12.0
"""How old an attempt is at least, by true time: longer than a stopped sender, its window, and the
slowest message take.
"""
PAUSE_S: Final = (0.2, 3.0)
THINKS_S: Final = (0.0, 0.5)
"""Between the look at the PSP's books and the decision."""
BOTH_SHARE: Final = 0.3
"""Decisions that two take at once."""
OTHERWISE_SHARE: Final = 0.3
"""Of those without effect, what one calls a failure."""

_ENDS: Final = {
    "declined": DoubtOutcome.DECLINED,
    "rejected": DoubtOutcome.FAILED,
    "failed": DoubtOutcome.FAILED,
    "expired": DoubtOutcome.FAILED,
    "canceled": DoubtOutcome.CANCELED,
    "refused": DoubtOutcome.CANCELED,
}
_OPEN: Final = frozenset({"pending", "requires_action"})


class People:
    """Those who see to what recovery does not settle."""

    def __init__(
        self,
        history: History,
        database: Database,
        draw: random.Random,
        decide: Callable[[str, Resolution], Awaitable[str | None]],
        now_s: Callable[[], float],
    ) -> None:
        """`decide` says it to a gateway; the reason of a refusal, None without an answer."""
        self._history = history
        self._database = database
        self._draw = draw
        self._decide = decide
        self._now_s = now_s
        self.over = False

    async def work(self) -> None:
        """Look for doubts until it is `over`."""
        while not self.over:
            await asyncio.sleep(self._draw.uniform(*PAUSE_S))
            doubts = [each for each in self._database.operations.values() if self._may_end(each)]
            if doubts:
                await self._end(self._draw.choice(doubts))

    def _may_end(self, operation: Operation) -> bool:
        begun_s = self._database.begun_s(operation)
        is_open = operation.state is OperationState.IN_DOUBT or decisions.is_unconfirmed(operation)
        return is_open and self._now_s() - begun_s >= AGE_S

    async def _end(self, operation: Operation) -> None:
        seen = self._seen(operation)
        if seen is None:
            return
        await asyncio.sleep(self._draw.uniform(*THINKS_S))
        said = [seen]
        if self._draw.random() < BOTH_SHARE:
            other = seen
            if seen.outcome is DoubtOutcome.NO_EFFECT and self._draw.random() < OTHERWISE_SHARE:
                other = replace(seen, outcome=DoubtOutcome.FAILED)
            said.append(other)
        await asyncio.gather(*(self._say(operation, each) for each in said))

    async def _say(self, operation: Operation, decision: Resolution) -> None:
        told = await self._decide(operation.operation_id, decision)
        self._history.decisions.append(
            Decision(
                operation.operation_id,
                decision.attempt_number,
                decision.outcome.name,
                decision.amount_reported_minor,
                told,
            )
        )

    def _seen(self, operation: Operation) -> Resolution | None:
        """What the PSP's books say of an attempt; None where that decides nothing."""
        reference = operation.reference
        if operation.kind in (K.VOID, K.REVERSAL):
            return self._seen_of_release(operation)
        standing = standing_effects(self._history.psp)
        for effect in standing.values():
            if effect["reference"] == reference:
                return self._resolution(operation, DoubtOutcome.TOOK_EFFECT, effect)
        last = self._last(reference)
        result = last.get("answer", {}).get("result") if last else None
        if result in _OPEN:
            return None
        if last and "takes_back" in last:
            return self._resolution(operation, DoubtOutcome.CANCELED)
        return self._resolution(operation, _ENDS.get(result or "", DoubtOutcome.NO_EFFECT))

    def _last(self, reference: str) -> Row | None:
        """The PSP's latest word of a reference."""
        records = self._history.psp
        decided = [each for each in records if each["type"] in ("effect", "outcome")]
        return next((each for each in reversed(decided) if each["reference"] == reference), None)

    def _seen_of_release(self, operation: Operation) -> Resolution | None:
        """That what was to be released is. Recovery may send it again: nothing else is sure."""
        standing = standing_effects(self._history.psp).values()
        of_payment = [
            each
            for each in self._database.operations.values()
            if each.payment_id == operation.payment_id
        ]
        if operation.kind is K.REVERSAL:
            is_done = all(each["reference"] != operation.note for each in standing)
            return self._resolution(operation, DoubtOutcome.TOOK_EFFECT) if is_done else None
        authorization = next(each for each in of_payment if each.kind is K.AUTHORIZE)
        if authorization.state is not OperationState.SUCCEEDED:
            return None
        stands = any(each["reference"] == authorization.reference for each in standing)
        for effect in standing:
            if effect["reference"] == operation.reference:
                return self._resolution(operation, DoubtOutcome.TOOK_EFFECT, effect)
        return None if stands else self._resolution(operation, DoubtOutcome.TOOK_EFFECT)

    @staticmethod
    def _resolution(
        operation: Operation, outcome: DoubtOutcome, effect: Row | None = None
    ) -> Resolution:
        differs = effect is not None and effect["amount_minor"] != operation.amount_minor
        return Resolution(
            operation.attempt.number,
            outcome,
            effect["transaction_id"] if effect else "",
            effect["amount_minor"] if effect and differs else None,
            "the books say so",
            "login:person",
        )
