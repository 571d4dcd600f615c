"""Streams of events through the loss of a gateway, its drain, and the loss of the primary."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from payments.v1 import event_service_pb2 as pb
from payments.v1 import event_service_pb2_grpc

from storage.postgres import Accounts
from tests.faults.transports import TRANSPORTS, start_on_both
from tests.harness import CALL_TIMEOUT_S, asyncio_run, eventually, reason_of, running_system
from tests.outbox import connection_to, tell, write_at_once
from tests.servers import fetch
from tests.standby import replicated_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests
    from tests.standby import ReplicatedPostgres

KILLS = 3
LOST_XACTS = 300
SETTINGS: dict[str, Any] = {"events_heartbeat_s": 0.2, "events_kept_bytes_max": 4096}


class Reader:
    """A consumer that begins again elsewhere, at its cursor, whenever its stream ends."""

    def __init__(self, system: System, gateways: Sequence[GatewayProcess]) -> None:
        async def make() -> str:
            async with Accounts.connect(system.dsn) as accounts:
                key = await accounts.create_key(
                    system.shop.organisation_id,
                    scopes=("events:read",),
                    mode="test",
                    merchant_ids=(system.shop.merchant_id,),
                )
            return key.text

        self._metadata = (("authorization", f"Bearer {asyncio_run(make)}"),)
        self.gateways = gateways
        self.events: list[Any] = []
        self.cursor = ""
        self.streams = 0
        self.endings: list[tuple[grpc.StatusCode, str]] = []
        self.moved = asyncio.Event()

    async def run(self) -> None:
        """Without end."""
        for number in itertools.count():
            gateway = self.gateways[number % len(self.gateways)]
            if gateway.running:
                self.streams += 1
                try:
                    await self._read(await gateway.serving())
                except grpc.aio.AioRpcError as error:
                    self.endings.append((error.code(), reason_of(error)))
            await asyncio.sleep(0.01)

    async def _read(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stream = event_service_pb2_grpc.EventServiceStub(channel).StreamEvents(
                pb.StreamEventsRequest(cursor=self.cursor)
                if self.cursor
                else pb.StreamEventsRequest(),
                metadata=self._metadata,
                timeout=CALL_TIMEOUT_S,
            )
            async for message in stream:
                self.events += message.events
                self.cursor = message.cursor
                self.moved.set()

    async def until(self, event_ids: set[str]) -> None:
        """Wait until all of these have come."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            while not event_ids <= {event.event_id for event in self.events}:
                self.moved.clear()
                await self.moved.wait()


async def test_a_tailing_consumer_sees_each_event_once_and_in_order_while_gateways_are_killed(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis, **SETTINGS) as system:
        gateways = start_on_both(system)
        for each in gateways:
            await each.serving()
        reader = Reader(system, gateways)
        reading = asyncio.create_task(reader.run())
        merchants = (system.shop.merchant_id, "mer_another")
        own = merchants[0]
        told = []
        async with connection_to(system.dsn) as early:
            for number in range(KILLS):
                # Begun before all others of its round, and ended after them.
                transaction = early.transaction()
                await transaction.start()
                first = await tell(early, own, version=1)
                written = await write_at_once(
                    system.dsn, merchants, writers=4, rounds=10, seed=100 * number
                )
                victim = gateways[number % 2]
                await asyncio.to_thread(victim.kill)
                await transaction.commit()
                round_ = [first, *written[own]]
                told += round_
                await reader.until({each.event_id for each in round_})
                fresh = system.start_gateway(transport=TRANSPORTS[number % 2], trusted_front=True)
                await fresh.serving()
                gateways[number % 2] = fresh
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert Counter(event.event_id for event in reader.events) == Counter(
            each.event_id for each in told
        )
        versions: Counter[str] = Counter()
        for event in reader.events:
            versions[event.payment.payment_id] += 1
            assert event.payment.version == versions[event.payment.payment_id]
        assert reader.streams > 1


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_drain_ends_streams_with_a_reason_and_their_consumers_go_on_elsewhere(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis, **SETTINGS) as system:
        gateways = [system.start_gateway(transport=transport, trusted_front=True) for _ in range(2)]
        reader = Reader(system, gateways)
        reading = asyncio.create_task(reader.run())
        async with connection_to(system.dsn) as connection:
            before = await tell(connection, system.shop.merchant_id)
            await reader.until({before.event_id})
            assert await asyncio.to_thread(gateways[0].stop) == 0
            after = await tell(connection, system.shop.merchant_id)
            await reader.until({after.event_id})
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert [event.event_id for event in reader.events] == [before.event_id, after.event_id]
        assert reader.endings[0] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


@pytest.fixture
def pair() -> Iterator[ReplicatedPostgres]:
    """A primary and its synchronous standby, which the test may kill."""
    with replicated_postgres() as running:
        yield running


async def test_a_cursor_leads_on_without_a_gap_after_the_standby_was_promoted(
    pair: ReplicatedPostgres, redis: EmbeddedRedis
) -> None:
    """The new primary gives out numbers of transactions that the old one had used for nothing."""
    with running_system(pair, redis, **SETTINGS) as system:
        reader = Reader(system, start_on_both(system))
        reading = asyncio.create_task(reader.run())
        own = system.shop.merchant_id
        async with connection_to(pair.server.dsn_of(_database(system))) as connection:
            told = [await tell(connection, own, version=1) for _ in range(3)]
            await reader.until({each.event_id for each in told})
            # An idle reader's cursor stands at another's event.
            await tell(connection, "mer_another")
            for _ in range(LOST_XACTS):
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("SELECT pg_current_xact_id()")
                await transaction.rollback()
        await eventually(lambda: _is_at_the_end(system, reader.cursor), "the idle cursor moves")
        pair.server.kill()
        pair.promote()
        async with connection_to(pair.server.dsn_of(_database(system))) as connection:
            told += [await tell(connection, own, version=1) for _ in range(3)]
        await reader.until({each.event_id for each in told})
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert [event.event_id for event in reader.events] == [each.event_id for each in told]


async def test_an_event_that_the_standby_lacks_is_not_told(
    pair: ReplicatedPostgres, redis: EmbeddedRedis
) -> None:
    """A commit whose wait was cancelled is seen by all, and lost with the primary."""
    with running_system(pair, redis, **SETTINGS) as system:
        gateway = system.start_gateway()
        await gateway.serving()
        reader = Reader(system, [gateway])
        reading = asyncio.create_task(reader.run())
        async with connection_to(pair.server.dsn_of(_database(system))) as connection:
            first = await tell(connection, system.shop.merchant_id)
            await reader.until({first.event_id})
            pair.standby.pause()
            telling = asyncio.create_task(tell(connection, system.shop.merchant_id))
            server = pair.server.dsn
            waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name"

            def read_waits() -> bool:
                # Of others too, as readiness: whichever began before keeps the event back.
                fetch(server, f"SELECT pg_cancel_backend(pid) {waiting} <> 'gateway-events'")
                return telling.done() and bool(
                    fetch(server, f"SELECT {waiting} = 'gateway-events'")
                )

            await eventually(read_waits, "the read's wait")
            second = await telling
            assert [event.event_id for event in reader.events] == [first.event_id]
            pair.standby.resume()
            await reader.until({second.event_id})
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _database(system: System) -> str:
    return system.dsn.rpartition("/")[2]


def _is_at_the_end(system: System, cursor: str) -> bool:
    """Whether a cursor names the outbox's last transaction."""
    [row] = fetch(system.dsn, "SELECT max(xact_id::text::bigint) AS xact_id FROM outbox")
    xact_id: int = row["xact_id"]
    return bytes.fromhex(cursor)[1:9] == xact_id.to_bytes(8)
