"""Gateways with a deliberate fault, which the campaign has to find; each function is a process.

`tests.nursery` runs them by name, as `tests.chaos.mutants:<function>`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from gateway.application.ports import Change, Intent, IntentResult, Stored
from gateway.domain import decisions
from gateway.domain.model import Delivery
from gateway.domain.states import Event
from storage.postgres.store import PostgresStore
from tests.nursery import serve

if TYPE_CHECKING:
    from gateway.domain.model import ConnectorAnswer

LATE_S: Final = 0.3
"""By how much a write is late that should have been waited for."""


def take_a_doubt_for_a_failure() -> None:
    """What may have been sent and has no answer is NOT_SENT."""
    event_of = decisions.event_of

    def mutated(answer: ConnectorAnswer) -> Event:
        event = event_of(answer)
        unanswered = answer.delivery is Delivery.MAY_HAVE_BEEN_SENT
        return Event.NEVER_SENT if event is Event.DOUBTED and unanswered else event

    decisions.event_of = mutated
    serve()


def write_the_intent_after_the_send() -> None:
    """The intent of an authorization becomes durable with its outcome only."""
    write_intent, write_change = PostgresStore.write_intent, PostgresStore.write_change
    held: dict[str, Intent] = {}

    async def mutated_intent(store: PostgresStore, intent: Intent) -> IntentResult:
        if intent.expected_version is not None:
            return await write_intent(store, intent)
        held[intent.operation.operation_id] = intent
        return IntentResult(Stored.WRITTEN)

    async def mutated_change(store: PostgresStore, change: Change) -> Stored:
        intent = held.pop(change.operation.operation_id, None)
        if intent is not None:
            await write_intent(store, intent)
        return await write_change(store, change)

    PostgresStore.write_intent = mutated_intent  # type: ignore[method-assign, assignment]
    PostgresStore.write_change = mutated_change  # type: ignore[method-assign, assignment]
    serve()


def answer_before_the_outcome_is_durable() -> None:
    """A change is told as written, and written later."""
    write_change = PostgresStore.write_change
    running: set[asyncio.Task[Stored]] = set()

    async def late(store: PostgresStore, change: Change) -> Stored:
        await asyncio.sleep(LATE_S)
        return await write_change(store, change)

    async def mutated(store: PostgresStore, change: Change) -> Stored:
        task = asyncio.ensure_future(late(store, change))
        running.add(task)
        task.add_done_callback(running.discard)
        return Stored.WRITTEN

    PostgresStore.write_change = mutated  # type: ignore[method-assign, assignment]
    serve()
