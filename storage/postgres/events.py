"""The outbox as a stream, and its consumers, in PostgreSQL."""

from collections.abc import Sequence

import asyncpg

from gateway.application.events import (
    CONSUMERS_MAX,
    DIGEST_BYTES,
    LAG_EVENTS_MAX,
    ORIGIN,
    Consumer,
    ConsumerName,
    Cursor,
    Event,
    EventPage,
    Position,
    PositionLost,
    Reset,
)
from gateway.domain.model import Mode
from storage.postgres.direct import DirectStore
from storage.postgres.queries import query

_READ = query("events", "read")
_LATEST = query("events", "latest")
_FIND = query("events", "find")
_ADD_CONSUMER = query("events", "add_consumer")
_FIND_CONSUMER = query("events", "find_consumer")
_ACKNOWLEDGE = query("events", "acknowledge")
_DELETE_CONSUMER = query("events", "delete_consumer")
_CONSUMERS = query("events", "consumers")
_HELD_BACK = query("events", "held_back")


class OutboxEvents(DirectStore):
    """Implements the ports EventSource and ConsumerStore."""

    NAME = "events"

    async def read(
        self,
        after: Position,
        merchant_ids: frozenset[str] | None,
        rows_max: int,
        bytes_max: int,
    ) -> EventPage:
        """See the port."""
        rows = await self._lane.fetch(
            _READ,
            **_key(after),
            event_id=after.event_id,
            merchant_ids=_sorted(merchant_ids),
            rows_max=rows_max,
            bytes_max=bytes_max,
        )
        if after.event_id:
            if not rows or not rows[0]["is_position"]:
                raise PositionLost("PostgreSQL does not have the event of a position")
            del rows[0]
        if not rows:
            return EventPage((), None, is_full=False)
        return EventPage(
            [Event(_position(row), row["payload"]) for row in rows if row["is_wanted"]],
            _position(rows[-1]),
            is_full=rows[-1]["is_full"],
        )

    async def latest(self) -> Position:
        """See the port."""
        rows = await self._lane.fetch(_LATEST)
        return _position(rows[0]) if rows else ORIGIN

    async def find(self, cursor: Cursor) -> Position | None:
        """See the port."""
        rows = await self._lane.fetch(
            _FIND, xact_id=cursor.xact_id, digest=cursor.digest, digest_bytes=DIGEST_BYTES
        )
        return _position(rows[0]) if rows else None

    async def add_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, position: Position
    ) -> bool:
        """See the port."""
        rows = await self._lane.fetch(
            _ADD_CONSUMER,
            **_name(name),
            **_key(position),
            event_id=position.event_id,
            merchant_ids=_sorted(merchant_ids),
            consumers_max=CONSUMERS_MAX,
        )
        return bool(rows)

    async def find_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None
    ) -> Consumer | None:
        """See the port."""
        rows = await self._lane.fetch(
            _FIND_CONSUMER, **_name(name), merchant_ids=_sorted(merchant_ids)
        )
        return _consumer(rows[0]) if rows else None

    async def acknowledge(
        self,
        name: ConsumerName,
        merchant_ids: frozenset[str] | None,
        position: Position,
        reset: Reset | None,
    ) -> bool:
        """See the port."""
        rows = await self._lane.fetch(
            _ACKNOWLEDGE,
            **_name(name),
            **_key(position),
            event_id=position.event_id,
            merchant_ids=_sorted(merchant_ids),
            reset_by="" if reset is None else reset.by,
            reset_reason="" if reset is None else reset.reason,
        )
        return bool(rows)

    async def delete_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, deleted_by: str
    ) -> bool:
        """See the port."""
        rows = await self._lane.fetch(
            _DELETE_CONSUMER,
            **_name(name),
            merchant_ids=_sorted(merchant_ids),
            deleted_by=deleted_by,
        )
        return bool(rows)

    async def consumers(
        self, of: tuple[str, Mode] | None, merchant_ids: frozenset[str] | None, consumers_max: int
    ) -> Sequence[Consumer]:
        """See the port."""
        organisation_id, mode = of or (None, None)
        rows = await self._lane.fetch(
            _CONSUMERS,
            organisation_id=organisation_id,
            mode=mode,
            merchant_ids=_sorted(merchant_ids),
            consumers_max=consumers_max,
            rows_max=LAG_EVENTS_MAX,
        )
        return [_consumer(row, row["events_behind"], row["seconds_behind"]) for row in rows]

    async def held_back_s(self) -> float:
        """The age of the oldest event that waits for a transaction that still runs, in seconds."""
        [row] = await self._lane.fetch(_HELD_BACK, rows_max=LAG_EVENTS_MAX)
        age_s: float = row["age_s"]
        return age_s


def _key(position: Position) -> dict[str, object]:
    return {
        "xact_id": position.xact_id,
        "merchant_id": position.merchant_id,
        "payment_id": position.payment_id,
        "payment_version": position.payment_version,
        "seq": position.seq,
    }


def _name(name: ConsumerName) -> dict[str, object]:
    return {"organisation_id": name.organisation_id, "mode": name.mode, "name": name.name}


def _sorted(merchant_ids: frozenset[str] | None) -> list[str] | None:
    return None if merchant_ids is None else sorted(merchant_ids)


def _position(row: asyncpg.Record) -> Position:
    return Position(
        row["xact_id"],
        row["merchant_id"],
        row["payment_id"],
        row["payment_version"],
        row["seq"],
        row["event_id"],
    )


def _consumer(row: asyncpg.Record, events_behind: int = 0, seconds_behind: float = 0.0) -> Consumer:
    merchants = row["merchant_ids"]
    return Consumer(
        ConsumerName(row["organisation_id"], Mode(row["mode"]), row["name"]),
        None if merchants is None else frozenset(merchants),
        _position(row),
        row["created_at"],
        row["acknowledged_at"],
        row["reset_at"],
        row["reset_by"],
        row["reset_reason"],
        row["is_reached"],
        events_behind,
        seconds_behind,
    )
