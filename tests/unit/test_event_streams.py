"""Streams of events over an outbox in memory: what the tail keeps, and whom a stream is for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING
from unittest.mock import Mock

from gateway.application.events import (
    CHUNK_EVENTS_MAX,
    ORIGIN,
    Audience,
    Event,
    EventPage,
    Events,
    Position,
    PositionLost,
    Schedule,
)
from gateway.domain.model import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.application.events import Cursor

MERCHANTS = [f"mer_{number}" for number in range(20)]


class _Outbox:
    """An EventSource."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reads = 0

    def tell(self, merchant_id: str, payload_bytes: int = 100) -> Position:
        number = len(self.events) + 1
        position = Position(number, merchant_id, f"pay_{number}", 1, 0, f"evt_{number}")
        self.events.append(Event(position, b"x" * payload_bytes))
        return position

    async def read(
        self,
        after: Position,
        merchant_ids: frozenset[str] | None,
        rows_max: int,
        bytes_max: int,
    ) -> EventPage:
        if after != ORIGIN and self.events[after.xact_id - 1].position != after:
            raise PositionLost
        self.reads += 1
        rows = self.events[after.xact_id :][:rows_max]
        found = _of(rows, merchant_ids)
        assert sum(len(event.payload) for event in found) <= bytes_max
        return EventPage(found, rows[-1].position if rows else None, is_full=len(rows) == rows_max)

    async def latest(self) -> Position:
        return self.events[-1].position if self.events else ORIGIN

    async def find(self, cursor: Cursor) -> Position | None:
        raise NotImplementedError


def _of(events: Iterable[Event], merchant_ids: frozenset[str] | None) -> list[Event]:
    return [e for e in events if merchant_ids is None or e.position.merchant_id in merchant_ids]


def _streams(outbox: _Outbox, schedule: Schedule) -> Events:
    return Events(outbox, Mock(), lambda _payload, _merchant_id: Mode.TEST, schedule)


async def test_what_the_tail_keeps_is_found_at_once_however_many_looks_it_took() -> None:
    """A stream went through all that was kept, a piece for each look that had found something."""
    outbox = _Outbox()
    events = _streams(outbox, Schedule())
    await events._look()
    rng = random.Random(1)
    looks = 3_000
    for _ in range(looks):
        outbox.tell(rng.choice(MERCHANTS))
        assert await events._look() == (False, True)
    assert len(events._chunks) <= 2 * looks / CHUNK_EVENTS_MAX + 1

    before = outbox.reads
    for merchant_ids in (None, *(frozenset(rng.sample(MERCHANTS, n)) for n in (1, 5, 20))):
        audience = Audience(Mode.TEST, merchant_ids)
        for start in (0, looks - 1, looks, *(rng.randrange(looks) for _ in range(20))):
            position = outbox.events[start - 1].position if start else ORIGIN
            found: list[Event] = []
            while True:
                more, behind = await events._next(audience, position)
                assert len(more) <= CHUNK_EVENTS_MAX
                found += more
                if behind == position:
                    break
                position = behind
            assert found == _of(outbox.events[start:], merchant_ids)
    assert outbox.reads == before


async def test_the_tail_keeps_so_many_bytes_and_drops_the_oldest() -> None:
    outbox = _Outbox()
    kept_bytes_max = 10_000
    events = _streams(outbox, Schedule(kept_bytes_max=kept_bytes_max))
    await events._look()
    kept: list[Event] = []
    for _ in range(1_000):
        outbox.tell(MERCHANTS[0])
        await events._look()
        kept = [event for chunk in events._chunks for event in chunk.events]
        assert sum(len(event.payload) for event in kept) == events._kept_bytes <= kept_bytes_max
        assert kept == outbox.events[-len(kept) :]
    assert len(kept) * 100 > kept_bytes_max * 3 / 4
    assert events._begun == outbox.events[-len(kept) - 1].position
