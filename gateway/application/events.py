"""Payments' events as streams: one reader of the outbox's end for all of a process's streams.

A stream is a position and nothing else. While what follows it is among the events that the tail
keeps in memory, it takes them from there; a stream that begins far back, or whose client reads
slowly, reads pages of its own until it has caught up. So a slow stream costs a page of memory,
holds up nobody, and loses nothing.

A database that was restored, or a standby that was behind, lacks what came last and gives out its
transactions' numbers again: what follows a lost position by number is not all that was told after
it. So no position is taken for good because it was good once. Every page is read together with the
look whether its position's event is there, and a stream takes from the tail only where the tail has
the very event that the stream stands at.
"""

import asyncio
import logging
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Final, NamedTuple, Protocol, TypeVar

from gateway.application.ports import StoreUnavailable
from gateway.domain.errors import GatewayError, Reason, Violation, refuse
from gateway.domain.model import Mode

CONSUMERS_MAX: Final = 50
"""How many consumers an organisation may have in a mode."""
LAG_EVENTS_MAX: Final = 10_000
"""So many events behind a consumer's position are counted; more are so many."""
PAGE_EVENTS_MAX: Final = 500
"""Rows that a page of the outbox looks at."""
SCAN_EVENTS_MAX: Final = 5_000
"""The same for a stream of few merchants, most of whose pages are other merchants'."""
PAGE_BYTES_MAX: Final = 512 * 1024
"""Payloads of a page, which its last event may exceed: a stream holds its page for as long as its
client takes to read it, and there are many streams."""
CHUNK_EVENTS_MAX: Final = 500
CHUNK_BYTES_MAX: Final = 256 * 1024
"""Pages that the tail has read are kept together up to these, so that there are few, however little
each look finds; one page may be more."""

CATCHING_UP_MAX: Final = 1
"""Streams that read pages of their own at a time: fewer than there are connections, so that the
tail and acknowledgements wait for none of them."""

_CURSOR_VERSION: Final = b"\x01"
_XACT_BYTES: Final = 8
DIGEST_BYTES: Final = 16
"""Of the SHA-256 of the event's id that a cursor names."""
_NO_EVENT: Final = bytes(DIGEST_BYTES)
"""The digest in the cursor that is before the first event."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Position(NamedTuple):
    """A place in the order of events: behind one of them. Positions compare as the events do."""

    xact_id: int = 0
    merchant_id: str = ""
    payment_id: str = ""
    payment_version: int = 0
    seq: int = 0
    event_id: str = ""
    """Only tells whether a database has the event; two events never differ in this alone."""


ORIGIN: Final = Position()
"""Before the first event."""


class Cursor(NamedTuple):
    """What callers hold of a position."""

    xact_id: int
    digest: bytes


@dataclass(slots=True)
class Event:
    """A row of the outbox."""

    position: Position
    payload: bytes
    """A PaymentEvent, encoded."""
    mode: Mode | None = None
    """Of its payment, once `readable` was asked for."""
    is_read: bool = False


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events that follow a position."""

    events: Sequence[Event]
    last: Position | None
    """How far was looked; None where nothing follows."""
    is_full: bool
    """Whether more may follow."""


@dataclass(frozen=True, slots=True)
class Audience:
    """Whose events a stream is of."""

    mode: Mode
    merchant_ids: frozenset[str] | None
    """None: every merchant there is."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The next events of a stream; none of them is a sign of life."""

    events: Sequence[Event]
    position: Position
    """Behind all that was delivered or passed over."""


class ConsumerName(NamedTuple):
    """Which consumer."""

    organisation_id: str
    """Empty: the operator's own."""
    mode: Mode
    name: str


@dataclass(frozen=True, slots=True)
class Consumer:
    """A named reader, and how far it has come."""

    name: ConsumerName
    merchant_ids: frozenset[str] | None
    """What was reached by whoever moved it last; None: every merchant there is."""
    position: Position
    created_at: datetime
    acknowledged_at: datetime
    reset_at: datetime | None
    reset_by: str
    reset_reason: str
    is_reached: bool
    """Whether the caller reaches all of its merchants."""
    events_behind: int = 0
    seconds_behind: float = 0.0


class Reset(NamedTuple):
    """Why a position is set back or forward, and by whom."""

    by: str
    reason: str


class PositionLost(Exception):
    """The database does not have the event of a position; what follows it cannot be told."""


class EventSource(Protocol):
    """The outbox. Every method raises StoreUnavailable where the database is away."""

    async def read(
        self,
        after: Position,
        merchant_ids: frozenset[str] | None,
        rows_max: int,
        bytes_max: int,
    ) -> EventPage:
        """What follows a position among the events that nothing can come before any more.

        At most `rows_max` rows are looked at, and the page ends with the event whose payload makes
        its payloads `bytes_max` bytes or more.

        Raises PositionLost where the position's event is not there, as of the same moment.
        """

    async def latest(self) -> Position:
        """Behind the last of those."""

    async def find(self, cursor: Cursor) -> Position | None:
        """The position of a cursor; None where this database does not have its event."""


class ConsumerStore(Protocol):
    """Where consumers are kept. Every method raises StoreUnavailable."""

    async def add_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, position: Position
    ) -> bool:
        """False where it exists, or where there are CONSUMERS_MAX already."""

    async def find_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None
    ) -> Consumer | None:
        """A consumer, without what it has not acknowledged."""

    async def acknowledge(
        self,
        name: ConsumerName,
        merchant_ids: frozenset[str] | None,
        position: Position,
        reset: Reset | None,
    ) -> bool:
        """Move a consumer forward, or wherever a reset says; False where nothing moved."""

    async def delete_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, deleted_by: str
    ) -> bool:
        """False where there was none that the caller reaches; otherwise recorded."""

    async def consumers(
        self, of: tuple[str, Mode] | None, merchant_ids: frozenset[str] | None, consumers_max: int
    ) -> Sequence[Consumer]:
        """Those of an organisation and mode (None: all), with what they have not acknowledged."""


class EventMetrics(Protocol):
    """What is counted."""

    def events_read(self, events: int, reader: str) -> None:
        """A page was read, by the `tail` or by a `stream` that is behind it."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The times and bounds of the tail, in seconds."""

    poll_s_min: float = 0.025
    """The pause between two looks while events come."""
    poll_s_max: float = 0.5
    """While none come."""
    heartbeat_s: float = 10.0
    """The pause after which an idle stream gets a sign of life."""
    kept_bytes_max: int = 8 * 1024 * 1024
    """Payloads that the tail keeps in memory."""
    message_events_max: int = 100
    message_bytes_max: int = 512 * 1024
    """The size at which a batch ends; never within an event."""


# --- cursors --------------------------------------------------------------------------------------


def encode_cursor(position: Position) -> str:
    """What callers hold of a position: opaque and versioned. Hexadecimal, as page tokens are.

    It names an event by the hash of its id, since the last one that a stream has passed over may
    be another merchant's.
    """
    digest = (
        sha256(position.event_id.encode()).digest()[:DIGEST_BYTES]
        if position.event_id
        else _NO_EVENT
    )
    return (_CURSOR_VERSION + position.xact_id.to_bytes(_XACT_BYTES) + digest).hex()


def decode_cursor(text: str) -> Cursor:
    """Raises GatewayError(EVENT_CURSOR_INVALID) for what is no cursor."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    head = len(_CURSOR_VERSION)
    if (
        len(data) != head + _XACT_BYTES + DIGEST_BYTES
        or not data.startswith(_CURSOR_VERSION)
        or data.hex() != text
    ):
        raise refuse(
            Reason.EVENT_CURSOR_INVALID,
            "The cursor is none that was given out.",
            violation=Violation("cursor", "is none that was given out"),
        )
    xact_id = int.from_bytes(data[head : head + _XACT_BYTES])
    return Cursor(xact_id, data[head + _XACT_BYTES :])


# --- the tail -------------------------------------------------------------------------------------


def _position_of(event: Event) -> Position:
    return event.position


@dataclass(slots=True)
class _Chunk:
    """Pages of the tail, their events by merchant too, so that a stream looks at its own only."""

    events: list[Event] = field(default_factory=list)
    """In order; at least one, once it is the tail's."""
    size_bytes: int = 0
    """Of the payloads."""
    by_merchant: dict[str, list[Event]] = field(default_factory=dict)

    @property
    def last(self) -> Position:
        """Behind its last event."""
        return self.events[-1].position

    def takes(self, events: Sequence[Event], size_bytes: int, bytes_max: int) -> bool:
        """Whether a page is small enough to be added."""
        return (
            len(self.events) + len(events) <= CHUNK_EVENTS_MAX
            and self.size_bytes + size_bytes <= bytes_max
        )

    def add(self, events: Sequence[Event], size_bytes: int) -> None:
        """Add a page that follows."""
        self.events += events
        self.size_bytes += size_bytes
        for event in events:
            self.by_merchant.setdefault(event.position.merchant_id, []).append(event)

    def has(self, position: Position) -> bool:
        """Whether one of its events is that of a position, and not just of its place."""
        index = bisect_left(self.events, position, key=_position_of)
        return index < len(self.events) and self.events[index].position == position

    def of(self, merchant_ids: frozenset[str] | None, after: Position) -> list[Event]:
        """The merchants' events behind a position, in order."""
        behind = bisect_right(self.events, after, key=_position_of)
        if merchant_ids is None:
            return self.events[behind:]
        if len(self.events) - behind <= len(merchant_ids):  # as where a stream follows closely
            return [e for e in self.events[behind:] if e.position.merchant_id in merchant_ids]
        found = []
        for merchant_id in self.by_merchant.keys() & merchant_ids:
            own = self.by_merchant[merchant_id]
            found += own[bisect_right(own, after, key=_position_of) :]
        found.sort(key=_position_of)
        return found


def _last_of(chunk: _Chunk) -> Position:
    return chunk.last


class Events:
    """All streams of a process, and the consumers' positions."""

    def __init__(
        self,
        source: EventSource,
        consumers: ConsumerStore,
        mode_of: Callable[[bytes, str], Mode | None],
        schedule: Schedule,
        metrics: EventMetrics | None = None,
    ) -> None:
        """`mode_of` reads a payload: the mode of its payment, which has to be the merchant's that
        is given; None where it cannot be read or is another's.
        """
        self._source = source
        self.consumer_store = consumers
        self._mode_of = mode_of
        self._schedule = schedule
        self._metrics = metrics
        self._chunks: list[_Chunk] = []
        self._kept_bytes = 0
        self._begun: Position | None = None
        self._end: Position | None = None
        """How far the tail has read; None while it does not."""
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._streams = 0
        self._catching_up = asyncio.Semaphore(CATCHING_UP_MAX)
        self._closed = False

    def close(self) -> None:
        """End every stream with DRAINING."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def run(self) -> None:
        """Read the outbox's end while there are streams, until cancelled."""
        pause_s = self._schedule.poll_s_min
        while True:
            await self._wanted.wait()
            is_full, found = False, False
            try:
                is_full, found = await self._look()
            except StoreUnavailable as error:
                _log.warning("the outbox could not be read: %s", error)
            except PositionLost:
                # A restore, or a failover to a standby that was behind. The next look begins anew;
                # each stream learns from a page of its own whether its position was lost too.
                _log.error("the database has lost events that were told: streams begin again")
                self._drop()
                self._wake()
            except Exception:  # noqa: BLE001 - without the tail all streams would stand still
                _log.exception("the outbox could not be read")
            if not self._streams:
                self._forget()
            if is_full:
                continue
            limits = self._schedule
            pause_s = limits.poll_s_min if found else min(2 * pause_s, limits.poll_s_max)
            await asyncio.sleep(pause_s)

    async def _look(self) -> tuple[bool, bool]:
        """Whether more may follow, and whether there was anything."""
        if self._end is None:
            self._begun = self._end = await self._source.latest()
            self._wake()
        page = await self._source.read(self._end, None, PAGE_EVENTS_MAX, PAGE_BYTES_MAX)
        if page.last is None:
            return False, False
        size_bytes = sum(len(event.payload) for event in page.events)
        # A part of what is kept: whole chunks are dropped.
        bytes_max = min(CHUNK_BYTES_MAX, self._schedule.kept_bytes_max // 8)
        if not self._chunks or not self._chunks[-1].takes(page.events, size_bytes, bytes_max):
            self._chunks.append(_Chunk())
        self._chunks[-1].add(page.events, size_bytes)
        self._kept_bytes += size_bytes
        self._end = page.last
        while self._kept_bytes > self._schedule.kept_bytes_max and len(self._chunks) > 1:
            dropped = self._chunks.pop(0)
            self._kept_bytes -= dropped.size_bytes
            self._begun = dropped.last
        if self._metrics is not None:
            self._metrics.events_read(len(page.events), "tail")
        self._wake()
        return page.is_full, True

    def _forget(self) -> None:
        self._wanted.clear()
        self._drop()

    def _drop(self) -> None:
        self._chunks.clear()
        self._kept_bytes = 0
        self._begun = self._end = None

    # --- streams ---

    async def stream(
        self,
        audience_of: Callable[[], Awaitable[Audience]],
        after: Position,
        *,
        until_current: bool = False,
    ) -> AsyncGenerator[Batch, None]:
        """What follows a position, without end, or to what is there now.

        `audience_of` is asked at the beginning and then every `heartbeat_s`, before what comes
        next; from then on the events are those of its answer. Ends by raising GatewayError:
        DRAINING after `close`, STORE_UNAVAILABLE, also where the database has lost the event that
        the stream stands at, and whatever `audience_of` raises.
        """
        loop = asyncio.get_running_loop()
        until = await told(self._source.latest()) if until_current else None
        audience, asked_at_s = await audience_of(), loop.time()
        self._streams += 1
        self._wanted.set()
        heartbeat_s = self._schedule.heartbeat_s
        try:
            told_at_s, told_position = loop.time(), None
            while True:
                self._check_open()
                changed = self._changed
                found, position = await self._next(audience, after)
                moved = position > after
                is_end = until is not None and position >= until
                for batch in self._batches(found, position):
                    # Before each message: how long its client takes for the one before is its own
                    # choice, and a page has many.
                    self._check_open()
                    if loop.time() - asked_at_s >= heartbeat_s:
                        now, asked_at_s = await audience_of(), loop.time()
                        if now != audience:  # whose events were found is not whom they are for
                            audience = now
                            break
                    idle_s = loop.time() - told_at_s
                    is_due = is_end and batch.position == position != told_position
                    if batch.events or is_due or idle_s >= heartbeat_s:
                        yield batch
                        told_at_s, told_position = loop.time(), batch.position
                    after = batch.position
                else:
                    if is_end:
                        return
                    if not moved:
                        due_at_s = min(told_at_s, asked_at_s) + heartbeat_s
                        await _wait(changed, due_at_s - loop.time())
        finally:
            self._streams -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise GatewayError(Reason.DRAINING, "This server is shutting down.")

    async def _next(self, audience: Audience, after: Position) -> tuple[list[Event], Position]:
        """Some of what follows a position, and how far that goes."""
        if self._end is not None and after >= self._end:
            return [], after  # what the tail reads next tells whether it stands there too
        chunk = self._chunk_behind(after)
        if chunk is not None:
            return self._readable(chunk.of(audience.merchant_ids, after), audience), chunk.last
        rows_max = PAGE_EVENTS_MAX if audience.merchant_ids is None else SCAN_EVENTS_MAX
        try:
            async with self._catching_up:
                page = await told(
                    self._source.read(after, audience.merchant_ids, rows_max, PAGE_BYTES_MAX)
                )
        except PositionLost:
            # Not EVENT_CURSOR_UNKNOWN: whoever begins again is told so if what it begins at is lost
            # too, and a consumer's position is often an earlier one.
            raise GatewayError(
                Reason.STORE_UNAVAILABLE,
                "The database has lost the event that the stream stands at; begin again.",
            ) from None
        if self._metrics is not None:
            self._metrics.events_read(len(page.events), "stream")
        return self._readable(page.events, audience), page.last or after

    def _chunk_behind(self, after: Position) -> _Chunk | None:
        """Where the tail has what follows a position; None unless it has the position's event."""
        index = 0
        if after != self._begun:
            index = bisect_left(self._chunks, after, key=_last_of)
            if index == len(self._chunks) or not self._chunks[index].has(after):
                return None
            if self._chunks[index].last == after:
                index += 1
        return self._chunks[index] if index < len(self._chunks) else None

    def _readable(self, events: Sequence[Event], audience: Audience) -> list[Event]:
        """Those for the audience, whatever the statement that found them was asked."""
        found = []
        reached = audience.merchant_ids
        for event in events:
            if reached is not None and event.position.merchant_id not in reached:
                continue
            if not event.is_read:
                event.mode = self._mode_of(event.payload, event.position.merchant_id)
                event.is_read = True
                if event.mode is None:
                    _log.error(
                        "an event is not delivered: its payload is not that of its row",
                        extra={"event_id": event.position.event_id},
                    )
            if event.mode is audience.mode:
                found.append(event)
        return found

    def _batches(self, found: Sequence[Event], position: Position) -> Iterator[Batch]:
        """What was found, in messages' sizes; the last one, perhaps empty, is at `position`."""
        limits = self._schedule
        batch: list[Event] = []
        room_bytes = limits.message_bytes_max
        for event in found:
            size_bytes = len(event.payload)
            if batch and (len(batch) == limits.message_events_max or size_bytes > room_bytes):
                yield Batch(batch, batch[-1].position)
                batch, room_bytes = [], limits.message_bytes_max
            batch.append(event)
            room_bytes -= size_bytes
        yield Batch(batch, position)

    # --- positions ---

    async def position_of(self, cursor: str) -> Position:
        """Raises GatewayError: EVENT_CURSOR_INVALID, EVENT_CURSOR_UNKNOWN."""
        wanted = decode_cursor(cursor)
        if wanted.digest == _NO_EVENT:
            return ORIGIN
        position = await told(self._source.find(wanted))
        if position is None:
            raise _unknown()
        return position

    async def latest(self) -> Position:
        """Behind the last event. Raises GatewayError(STORE_UNAVAILABLE)."""
        return await told(self._source.latest())

    async def consumer_position(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, *, begin_latest: bool
    ) -> Position:
        """A consumer's position; one that does not exist yet is made.

        Raises GatewayError: EVENT_CONSUMER_OUT_OF_REACH, EVENT_CONSUMERS_TOO_MANY, and
        EVENT_CURSOR_UNKNOWN where the database no longer has the event that it stands at.
        """
        consumer = await self._reached(name, merchant_ids)
        if consumer is None:
            position = await self.latest() if begin_latest else ORIGIN
            consumer = await self._make(name, merchant_ids, position)
        position = consumer.position
        if position.event_id and await self._find(position) != position:
            raise _unknown()
        return position

    async def _find(self, position: Position) -> Position | None:
        return await told(self._source.find(decode_cursor(encode_cursor(position))))

    async def _reached(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None
    ) -> Consumer | None:
        consumer = await told(self.consumer_store.find_consumer(name, merchant_ids))
        if consumer is not None and not consumer.is_reached:
            raise GatewayError(
                Reason.EVENT_CONSUMER_OUT_OF_REACH,
                "The consumer reads merchants that this call does not reach.",
            )
        return consumer

    async def _make(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, position: Position
    ) -> Consumer:
        await told(self.consumer_store.add_consumer(name, merchant_ids, position))
        consumer = await self._reached(name, merchant_ids)
        if consumer is None:
            raise GatewayError(
                Reason.EVENT_CONSUMERS_TOO_MANY,
                f"There are {CONSUMERS_MAX} consumers already: delete one that nobody uses.",
            )
        return consumer

    async def acknowledge(
        self,
        name: ConsumerName,
        merchant_ids: frozenset[str] | None,
        cursor: str,
        reset: Reset | None,
    ) -> tuple[Position, bool]:
        """The consumer's position from now on, and whether it was moved.

        Raises GatewayError as `consumer_position` and `position_of` do.
        """
        if not cursor and reset is None:
            raise refuse(
                Reason.EVENT_CURSOR_INVALID,
                "The cursor is missing.",
                violation=Violation("cursor", "is missing"),
            )
        position = await self.position_of(cursor) if cursor else ORIGIN
        moved = await told(self.consumer_store.acknowledge(name, merchant_ids, position, reset))
        if not moved:
            consumer = await self._reached(name, merchant_ids)
            if consumer is not None:
                return consumer.position, False
            await self._make(name, merchant_ids, position)
        if reset is not None:
            _log.warning(
                "an event consumer was reset by %s: %s",
                reset.by,
                reset.reason,
                extra={"consumer": name.name, "organisation_id": name.organisation_id},
            )
        return position, True

    async def consumers(
        self, organisation_id: str, mode: Mode, merchant_ids: frozenset[str] | None
    ) -> list[Consumer]:
        """Those that the caller reaches."""
        found = await told(
            self.consumer_store.consumers((organisation_id, mode), merchant_ids, CONSUMERS_MAX)
        )
        return [consumer for consumer in found if consumer.is_reached]

    async def delete_consumer(
        self, name: ConsumerName, merchant_ids: frozenset[str] | None, deleted_by: str
    ) -> None:
        """Raises GatewayError: EVENT_CONSUMER_NOT_FOUND, EVENT_CONSUMER_OUT_OF_REACH."""
        if await told(self.consumer_store.delete_consumer(name, merchant_ids, deleted_by)):
            return
        await self._reached(name, merchant_ids)
        raise GatewayError(Reason.EVENT_CONSUMER_NOT_FOUND, "There is no consumer of this name.")


async def told(call: Awaitable[T]) -> T:
    """What the store gives; where it is away, GatewayError(STORE_UNAVAILABLE)."""
    try:
        return await call
    except StoreUnavailable:
        raise GatewayError(
            Reason.STORE_UNAVAILABLE, "The database did not answer; repeat the call."
        ) from None


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _unknown() -> GatewayError:
    return GatewayError(
        Reason.EVENT_CURSOR_UNKNOWN,
        "This database does not have the event that the position names.",
    )
