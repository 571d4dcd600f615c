"""The outbox as a stream: nothing is passed over, whatever order transactions commit in."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from gateway.application import events as application
from gateway.application.events import (
    CONSUMERS_MAX,
    ORIGIN,
    PAGE_BYTES_MAX,
    Audience,
    ConsumerName,
    Events,
    Reset,
    Schedule,
    encode_cursor,
)
from gateway.domain import ids
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from gateway.rpc.decoding import ContractDecoder
from storage.postgres import PostgresStore, row_security
from storage.postgres import events as storage_events
from tests.outbox import Told, connection_to, tell, write_at_once
from tests.servers import fetch, postgres_server
from tests.store_data import authorize, new_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.application.events import Batch, Event, EventMetrics, EventPage, Position

OURS, THEIRS = ids.new_merchant_id(), ids.new_merchant_id()
EVERYTHING = Audience(Mode.TEST, None)
OWN = Audience(Mode.TEST, frozenset({OURS}))
SCHEDULE = Schedule(poll_s_min=0.001, poll_s_max=0.01, heartbeat_s=60.0)
NAME = ConsumerName("org_1", Mode.TEST, "ledger")
REACH = frozenset({OURS})
RESET = Reset("key_1", "The ledger was restored.")
LIMIT_S = 30.0


@pytest.fixture
async def events(store: PostgresStore) -> AsyncIterator[Events]:
    """A gateway's streams, with the tail that they share."""
    async with tailing(store) as running:
        yield running


@asynccontextmanager
async def tailing(
    store: PostgresStore, metrics: EventMetrics | None = None, **schedule: Any
) -> AsyncIterator[Events]:
    running = Events(
        store.events,
        store.events,
        ContractDecoder().mode_of_event,
        replace(SCHEDULE, **schedule),
        metrics,
    )
    tail = asyncio.create_task(running.run())
    try:
        yield running
    finally:
        tail.cancel()
        await asyncio.gather(tail, return_exceptions=True)


def ids_of(events: list[Event]) -> list[str]:
    return [event.position.event_id for event in events]


async def collect(
    events: Events,
    audience: Audience,
    after: Position,
    *,
    count: int = 0,
    messages: int = 0,
) -> tuple[list[Event], Position]:
    """A stream's events: so many, those of so many messages, or those that there are now."""

    async def ask() -> Audience:
        return audience

    found: list[Event] = []
    position = after
    stream = events.stream(ask, after, until_current=not count and not messages)
    async with asyncio.timeout(LIMIT_S), aclosing(stream):
        number = 0
        async for batch in stream:
            found += batch.events
            position = batch.position
            number += 1
            if number == messages or (count and len(found) >= count):
                break
    return found, position


async def test_what_commits_late_is_not_passed_over(
    store: PostgresStore, dsn: str, events: Events
) -> None:
    async with connection_to(dsn) as early, connection_to(dsn) as late:
        transaction = early.transaction()
        await transaction.start()
        first = await tell(early, OURS)
        second = await tell(late, OURS)

        # The second is committed, and the first could still come before it.
        assert (await store.events.read(ORIGIN, None, 10, 1)).last is None
        assert await store.events.latest() == ORIGIN
        assert await store.events.held_back_s() > 0

        await transaction.commit()
        assert await store.events.held_back_s() == 0
        found, _ = await collect(events, OWN, ORIGIN)
        assert ids_of(found) == [first.event_id, second.event_id]


async def test_what_was_rolled_back_is_never_told(dsn: str, events: Events) -> None:
    async with connection_to(dsn) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await tell(connection, OURS)
        await transaction.rollback()
        stays = await tell(connection, OURS)
    found, _ = await collect(events, OWN, ORIGIN)
    assert ids_of(found) == [stays.event_id]


def check(found: list[Event], expected: list[Told]) -> None:
    """Each exactly once, and every payment's in the order of its versions."""
    assert Counter(ids_of(found)) == Counter(each.event_id for each in expected)
    latest: dict[str, int] = {}
    for event in found:
        _, _, payment_id, version, _, _ = event.position
        assert version == latest.get(payment_id, 0) + 1
        latest[payment_id] = version


@pytest.mark.parametrize("kept_bytes_max", [1, SCHEDULE.kept_bytes_max])
async def test_streams_see_each_event_once_and_in_order_while_transactions_commit_in_any(
    store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch, kept_bytes_max: int
) -> None:
    """From memory and, where the tail keeps next to nothing, from pages cut within transactions."""
    monkeypatch.setattr(application, "PAGE_EVENTS_MAX", 7)
    monkeypatch.setattr(application, "SCAN_EVENTS_MAX", 5)
    monkeypatch.setattr(application, "PAGE_BYTES_MAX", 500)  # of two or three events
    async with tailing(
        store, kept_bytes_max=kept_bytes_max, message_events_max=3, heartbeat_s=0.01
    ) as events:
        done = asyncio.Event()

        async def follow(audience: Audience) -> list[Event]:
            """In many short streams, each from where the one before was left."""
            rng = random.Random(1)
            position = ORIGIN
            found: list[Event] = []
            while not done.is_set():
                messages = rng.choice((0, 1, 20))
                more, position = await collect(events, audience, position, messages=messages)
                found += more
            more, position = await collect(events, audience, position)
            return found + more

        readers = [asyncio.create_task(follow(each)) for each in (OWN, EVERYTHING)]
        told = await write_at_once(dsn, (OURS, THEIRS), writers=6, rounds=25, seed=1)
        done.set()
        own, everything = await asyncio.gather(*readers)
    check(own, told[OURS])
    check(everything, told[OURS] + told[THEIRS])
    positions = [event.position for event in everything]
    assert positions == sorted(positions)


async def test_a_stream_that_is_not_read_loses_nothing_and_holds_up_nobody(
    store: PostgresStore, dsn: str
) -> None:
    async with tailing(store, kept_bytes_max=5_000, message_events_max=1) as events:

        async def ask() -> Audience:
            return OWN

        slow = events.stream(ask, ORIGIN)
        async with aclosing(slow), connection_to(dsn) as connection:
            told = [await tell(connection, OURS, payload_bytes=500)]
            first = await anext(slow)  # and now its client reads no more
            quick = asyncio.create_task(collect(events, OWN, ORIGIN, count=40))
            told += [await tell(connection, OURS, payload_bytes=500) for _ in range(39)]
            assert ids_of((await quick)[0]) == [each.event_id for each in told]
            rest = [await anext(slow) for _ in told[1:]]
        assert ids_of([*first.events, *(e for batch in rest for e in batch.events)]) == [
            each.event_id for each in told
        ]


@pytest.mark.parametrize("bytes_max", [1, 5_000, 12_000, 1_000_000])
async def test_a_page_ends_with_the_event_that_fills_it(
    store: PostgresStore, dsn: str, bytes_max: int
) -> None:
    """What is another merchant's does not count."""
    sizes = [2_000, 100, 9_000, 100, 4_000, 100, 100]
    told = []
    async with connection_to(dsn) as connection:
        for size in sizes:
            await tell(connection, THEIRS, payload_bytes=3_000)
            told.append(await tell(connection, OURS, payload_bytes=size))
        beyond = await tell(connection, THEIRS)
    position, found, pages = ORIGIN, [], 0
    while True:
        page = await store.events.read(position, REACH, 100, bytes_max)
        lengths = [len(event.payload) for event in page.events]
        assert sum(lengths[:-1]) < bytes_max
        found += ids_of(list(page.events))
        pages += 1
        assert page.last is not None
        position = page.last
        assert page.is_full is (sum(lengths) >= bytes_max)
        if not page.is_full:
            break
        assert position.event_id == found[-1]
    assert found == [each.event_id for each in told]
    assert position.event_id == beyond.event_id
    assert pages == {1: 8, 5_000: 2, 12_000: 2, 1_000_000: 1}[bytes_max]


@pytest.mark.parametrize("merchant_ids", [None, REACH], ids=["everybody", "own"])
async def test_a_stream_and_the_tail_hold_a_page_of_large_events_and_no_more(
    store: PostgresStore, dsn: str, merchant_ids: frozenset[str] | None
) -> None:
    held: list[int] = []
    pages = store.events.read

    async def read(*arguments: Any) -> EventPage:
        page = await pages(*arguments)
        held.append(sum(len(event.payload) for event in page.events))
        return page

    size_bytes = 25_000
    async with connection_to(dsn) as connection:
        await connection.execute("BEGIN")
        for _ in range(60):
            await tell(connection, OURS, payload_bytes=size_bytes)
        await connection.execute("COMMIT")
    with patch.object(store.events, "read", read):
        async with tailing(store) as events:
            found, _ = await collect(events, Audience(Mode.TEST, merchant_ids), ORIGIN)
    assert len(found) == 60
    assert max(held) < PAGE_BYTES_MAX + 2 * size_bytes
    assert max(held) >= PAGE_BYTES_MAX


class _Counted:
    """How often the outbox was looked at, for whom."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()

    def events_read(self, events: int, reader: str) -> None:
        self.reads[reader] += 1

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        self.reads[lane] += 1

    def batch_failed(self, lane: str, rows: int, failure: object) -> None:
        raise AssertionError(lane, failure)


async def test_the_outbox_is_read_once_for_all_streams(store: PostgresStore, dsn: str) -> None:
    counted = _Counted()
    async with tailing(store, counted) as events, connection_to(dsn) as connection:
        seen = asyncio.Semaphore(0)

        async def ask() -> Audience:
            return OWN

        async def follow() -> None:
            async with aclosing(events.stream(ask, ORIGIN)) as stream:
                async for batch in stream:
                    for _ in batch.events:
                        seen.release()

        async def all_see(event: object) -> None:
            async with asyncio.timeout(LIMIT_S):
                for _ in streams:
                    await seen.acquire()

        streams = [asyncio.create_task(follow()) for _ in range(50)]
        for _ in range(3):  # each one is on the tail once it has seen what the tail has read
            await all_see(await tell(connection, OURS))
        before = counted.reads["stream"]
        for _ in range(10):
            await all_see(await tell(connection, OURS))
        assert counted.reads["stream"] == before
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def test_without_streams_the_outbox_is_not_looked_at(dsn: str) -> None:
    counted = _Counted()
    async with PostgresStore(dsn, metrics=counted) as store, tailing(store) as events:
        await asyncio.sleep(0.05)  # many times the tail's pause
        assert counted.reads["events"] == 0
        await collect(events, OWN, ORIGIN)
        while (before := counted.reads["events"]) != await _a_little_later(counted):
            assert before < 1_000
    assert store.pools["events"].connected == 0


async def _a_little_later(counted: _Counted) -> int:
    await asyncio.sleep(0.05)
    return counted.reads["events"]


async def test_another_mode_s_events_are_not_told(dsn: str, events: Events) -> None:
    async with connection_to(dsn) as connection:
        await tell(connection, OURS, mode=Mode.LIVE)
        test = await tell(connection, OURS)
    found, _ = await collect(events, OWN, ORIGIN)
    assert ids_of(found) == [test.event_id]


async def test_a_payload_that_is_another_merchant_s_is_not_told(
    dsn: str, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the row says: the wall holds where a statement of ours would be wrong."""
    async with connection_to(dsn) as connection:
        theirs = await tell(connection, THEIRS)
        fetch(dsn, "UPDATE outbox SET merchant_id = $1", OURS)
        good = await tell(connection, OURS)
    found, _ = await collect(events, OWN, ORIGIN)
    assert ids_of(found) == [good.event_id]
    [record] = caplog.records
    assert vars(record)["event_id"] == theirs.event_id


async def test_a_read_that_forgot_its_merchants_tells_nothing_of_another_s(
    store: PostgresStore, dsn: str, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall is not the statement alone, whose role sees every merchant."""
    condition = r'merchant_id COLLATE "default" = ANY \((\$\d+)::text\[\]\)'
    text, changed = re.subn(condition, r"\1::text[] IS NOT NULL", storage_events._READ.text)
    assert changed == 1
    monkeypatch.setattr(storage_events, "_READ", replace(storage_events._READ, text=text))
    async with connection_to(dsn) as connection:
        await tell(connection, THEIRS)
        own = await tell(connection, OURS)
    page = await store.events.read(ORIGIN, OWN.merchant_ids, 10, PAGE_BYTES_MAX)
    assert len(page.events) == 2
    found, _ = await collect(events, OWN, ORIGIN)
    assert ids_of(found) == [own.event_id]


async def test_streams_and_consumers_obey_row_level_security(dsn: str) -> None:
    await row_security.enable(dsn)
    async with (
        PostgresStore(dsn, row_security=True) as store,
        tailing(store) as events,
        connection_to(dsn) as connection,
    ):
        told = await tell(connection, OURS)
        await tell(connection, THEIRS)
        position = await events.consumer_position(NAME, REACH, begin_latest=False)
        found, last = await collect(events, OWN, position)
        assert ids_of(found) == [told.event_id]
        assert (await events.acknowledge(NAME, REACH, encode_cursor(last), None))[1]
        [consumer] = await store.event_lag.consumers(None, None, 10)
        assert (consumer.position, consumer.events_behind) == (last, 0)
        assert await store.event_lag.held_back_s() == 0
        await events.delete_consumer(NAME, REACH, "key_1")


async def test_an_idle_stream_s_cursor_moves_past_what_is_another_merchant_s(
    store: PostgresStore, dsn: str
) -> None:
    async with tailing(store, heartbeat_s=0.05) as events:

        async def ask() -> Audience:
            return OWN

        stream = events.stream(ask, ORIGIN)
        async with aclosing(stream), connection_to(dsn) as connection:
            theirs = await tell(connection, THEIRS)
            batch: Batch = await anext(stream)
            while batch.position.event_id != theirs.event_id:
                batch = await anext(stream)
            assert not batch.events


async def test_a_closed_server_s_streams_end_with_draining(events: Events) -> None:
    async def ask() -> Audience:
        return OWN

    async def read() -> None:
        async for _ in events.stream(ask, ORIGIN):
            raise AssertionError

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    events.close()
    with pytest.raises(GatewayError) as refused:
        await reading
    assert refused.value.reason is Reason.DRAINING


# --- cursors --------------------------------------------------------------------------------------


async def test_a_cursor_leads_back_to_its_place(dsn: str, events: Events) -> None:
    async with connection_to(dsn) as connection, connection.transaction():
        for _ in range(5):
            await tell(connection, OURS)
    found, last = await collect(events, OWN, ORIGIN)
    for number, event in enumerate(found, 1):
        position = await events.position_of(encode_cursor(event.position))
        assert position == event.position
        assert ids_of((await collect(events, OWN, position))[0]) == ids_of(found[number:])
    assert last == found[-1].position
    assert await events.position_of(encode_cursor(ORIGIN)) == ORIGIN
    assert found[0].position.event_id not in encode_cursor(found[0].position)


@pytest.mark.parametrize("text", ["", "x", "01", "00" * 25, "01" * 26, "0A" + "01" * 24, "é"])
async def test_what_is_no_cursor_is_refused(events: Events, text: str) -> None:
    with pytest.raises(GatewayError) as refused:
        await events.position_of(text)
    assert refused.value.reason is Reason.EVENT_CURSOR_INVALID


async def test_a_cursor_whose_event_the_database_has_lost_is_refused(
    dsn: str, events: Events
) -> None:
    """After a restore, or a failover to a standby that was behind, its number may be anybody's."""
    async with connection_to(dsn) as connection:
        await tell(connection, OURS)
    _, position = await collect(events, OWN, ORIGIN)
    assert await events.acknowledge(NAME, REACH, encode_cursor(position), None) == (position, True)
    # What a restored database would hold: other events under the same transaction's number.
    fetch(dsn, "UPDATE outbox SET event_id = $1", ids.new_event_id())

    for lost in (
        events.position_of(encode_cursor(position)),
        events.consumer_position(NAME, REACH, begin_latest=False),
    ):
        with pytest.raises(GatewayError) as refused:
            await lost
        assert refused.value.reason is Reason.EVENT_CURSOR_UNKNOWN
    assert await events.acknowledge(NAME, REACH, "", RESET) == (ORIGIN, True)
    assert await events.consumer_position(NAME, REACH, begin_latest=False) == ORIGIN


async def open_at(events: Events, after: Position, count: int) -> tuple[Any, list[Event]]:
    """A stream of everything that its client has read so many events of, and its next messages."""

    async def ask() -> Audience:
        return EVERYTHING

    stream = events.stream(ask, after)
    found: list[Event] = []
    async with asyncio.timeout(LIMIT_S):
        while len(found) < count:
            found += (await anext(stream)).events
    return stream, found


async def next_ends(stream: Any) -> None:
    """Its next message is none, and its client is to begin again."""
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(GatewayError) as ended:
            await anext(stream)
    assert ended.value.reason is Reason.STORE_UNAVAILABLE


async def test_streams_that_are_open_pass_over_nothing_when_the_database_is_set_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A copy of the files comes back on the same timeline: only the events tell it apart."""
    with postgres_server() as own:
        dsn, server = new_database(own), own.server
        cluster = server.data_dir / "pgdata"
        earlier = server.data_dir / "earlier"
        async with connection_to(dsn) as connection:
            kept = await tell(connection, OURS)
        server.stop()
        shutil.copytree(cluster, earlier)
        server.start()
        async with PostgresStore(dsn) as store, tailing(store) as events:
            behind, found = await open_at(events, ORIGIN, 1)
            assert ids_of(found) == [kept.event_id]
            async with connection_to(dsn) as connection:
                for _ in range(6):
                    await tell(connection, OURS)
            at_the_end, found = await open_at(events, ORIGIN, 7)
            lost = found[-1].position
            async with asyncio.timeout(LIMIT_S):
                while events._end != lost:  # the tail is there too
                    await events._changed.wait()

            server.stop()
            shutil.rmtree(cluster)
            earlier.rename(cluster)
            server.start()
            async with connection_to(dsn) as connection:
                told = [await tell(connection, OURS) for _ in range(10)]
            last = fetch(dsn, "SELECT max(xact_id::text::int8) AS xact_id FROM outbox")[0]
            assert last["xact_id"] > lost.xact_id

            async with aclosing(at_the_end), aclosing(behind):
                await next_ends(at_the_end)
                with pytest.raises(GatewayError) as refused:
                    await events.position_of(encode_cursor(lost))
                assert refused.value.reason is Reason.EVENT_CURSOR_UNKNOWN
                found = []
                async with asyncio.timeout(LIMIT_S):
                    while len(found) < len(told):
                        found += (await anext(behind)).events
                assert ids_of(found) == [each.event_id for each in told]
        assert "lost events that were told" in caplog.text


async def test_a_stream_that_was_ahead_of_the_tail_does_not_follow_it_into_other_events(
    store: PostgresStore, dsn: str
) -> None:
    """The tail stood at an event that the database has kept, and noticed nothing."""
    events = Events(store.events, store.events, ContractDecoder().mode_of_event, SCHEDULE)
    async with connection_to(dsn) as connection:
        await tell(connection, OURS)
        await events._look()
        for _ in range(2):
            await tell(connection, OURS)
        ahead, found = await open_at(events, ORIGIN, 3)
        again = found[1].position.xact_id
        await connection.execute("DELETE FROM outbox WHERE xact_id >= $1::int8::text::xid8", again)
        await tell(connection, OURS)
        await connection.execute(
            "UPDATE outbox SET xact_id = $1::int8::text::xid8 WHERE event_id = "
            "(SELECT event_id FROM outbox ORDER BY xact_id DESC LIMIT 1)",
            again,
        )
        await tell(connection, OURS)
    assert await events._look() == (False, True)
    async with aclosing(ahead):
        await next_ends(ahead)


# --- consumers ------------------------------------------------------------------------------------


async def test_a_consumer_s_position_never_goes_back_but_by_a_reset(
    store: PostgresStore, dsn: str, events: Events
) -> None:
    async with connection_to(dsn) as connection:
        for _ in range(3):
            await tell(connection, OURS)
    found, _ = await collect(events, OWN, ORIGIN)
    first, second, third = (event.position for event in found)

    assert await events.consumer_position(NAME, REACH, begin_latest=False) == ORIGIN
    assert await events.acknowledge(NAME, REACH, encode_cursor(second), None) == (second, True)
    assert await events.acknowledge(NAME, REACH, encode_cursor(second), None) == (second, False)
    assert await events.acknowledge(NAME, REACH, encode_cursor(first), None) == (second, False)
    assert await events.consumer_position(NAME, REACH, begin_latest=True) == second

    assert await events.acknowledge(NAME, REACH, encode_cursor(first), RESET) == (first, True)
    [consumer] = await events.consumers("org_1", Mode.TEST, REACH)
    assert (consumer.reset_by, consumer.reset_reason) == RESET
    assert consumer.reset_at is not None
    assert consumer.position == first
    await asyncio.gather(
        *(events.acknowledge(NAME, REACH, encode_cursor(each), None) for each in (third, second))
    )
    assert await events.consumer_position(NAME, REACH, begin_latest=False) == third


async def test_an_unknown_consumer_is_made_where_it_is_to_begin(dsn: str, events: Events) -> None:
    async with connection_to(dsn) as connection:
        await tell(connection, OURS)
    _, last = await collect(events, OWN, ORIGIN)
    live = NAME._replace(name="live")
    assert await events.consumer_position(live, REACH, begin_latest=True) == last
    acknowledged = NAME._replace(name="acknowledged")
    assert await events.acknowledge(acknowledged, REACH, encode_cursor(last), None) == (last, True)
    other_mode = live._replace(mode=Mode.LIVE)
    assert await events.consumer_position(other_mode, REACH, begin_latest=False) == ORIGIN


async def test_a_credential_that_reaches_less_neither_reads_nor_moves_nor_deletes_a_consumer(
    dsn: str, events: Events
) -> None:
    async with connection_to(dsn) as connection:
        await tell(connection, OURS)
    _, last = await collect(events, OWN, ORIGIN)
    both = frozenset({OURS, THEIRS})
    await events.acknowledge(NAME, both, encode_cursor(last), None)
    for refused in (
        events.consumer_position(NAME, REACH, begin_latest=False),
        events.acknowledge(NAME, REACH, encode_cursor(last), None),
        events.acknowledge(NAME, REACH, "", RESET),
        events.delete_consumer(NAME, REACH, "key_1"),
    ):
        with pytest.raises(GatewayError) as error:
            await refused
        assert error.value.reason is Reason.EVENT_CONSUMER_OUT_OF_REACH
    assert await events.consumers("org_1", Mode.TEST, REACH) == []
    assert await events.consumer_position(NAME, both, begin_latest=False) == last

    await events.delete_consumer(NAME, both, "key_1")
    with pytest.raises(GatewayError) as error:
        await events.delete_consumer(NAME, both, "key_1")
    assert error.value.reason is Reason.EVENT_CONSUMER_NOT_FOUND


async def test_an_organisation_has_so_many_consumers_and_no_more(events: Events) -> None:
    for number in range(CONSUMERS_MAX):
        name = NAME._replace(name=f"c{number}")
        await events.consumer_position(name, REACH, begin_latest=False)
    with pytest.raises(GatewayError) as refused:
        await events.consumer_position(NAME, REACH, begin_latest=False)
    assert refused.value.reason is Reason.EVENT_CONSUMERS_TOO_MANY
    other = NAME._replace(organisation_id="org_2")
    await events.consumer_position(other, REACH, begin_latest=False)


async def test_lag_is_the_age_and_the_number_of_what_is_not_acknowledged(
    store: PostgresStore, dsn: str, events: Events
) -> None:
    intent = authorize(OURS)
    await store.write_intent(intent)
    live = authorize(OURS, mode=Mode.LIVE)
    await store.write_intent(live)

    async def lag() -> tuple[int, bool]:
        [consumer] = await store.event_lag.consumers(None, None, 10)
        return consumer.events_behind, consumer.seconds_behind > 0

    await events.consumer_position(NAME, REACH, begin_latest=False)
    assert await lag() == (0, False)
    async with connection_to(dsn) as connection:
        await tell(connection, THEIRS)
        await tell(connection, OURS, payment_id=live.payment.payment_id, mode=Mode.LIVE)
        assert await lag() == (0, False)
        payment_id = intent.payment.payment_id
        await tell(connection, OURS, payment_id=payment_id)
        assert await lag() == (1, True)
        _, last = await collect(events, OWN, ORIGIN)
        await events.acknowledge(NAME, REACH, encode_cursor(last), None)
        assert await lag() == (0, False)
        # What waits for a transaction that still runs is not delivered, and so is behind.
        async with connection_to(dsn) as other, other.transaction():
            await tell(other, THEIRS)
            await tell(connection, OURS, payment_id=payment_id, version=3)
            assert await lag() == (1, True)
