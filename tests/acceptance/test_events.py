"""EventService from outside: what happens to payments, to whom it may be told, and resumed."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import orjson
import pytest
from payments.v1 import event_service_pb2 as pb
from payments.v1 import event_service_pb2_grpc

from storage.postgres import Accounts, ConfigurationChanges
from tests.harness import (
    CALL_TIMEOUT_S,
    asyncio_run,
    calling,
    eventually,
    new_key,
    new_shop,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, Shop, System
    from tests.nursery import Nursery
    from tests.servers import PostgresForTests

TRANSPORTS = ("grpcio", "native")
STREAMS_MAX = 3
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "events.md").read_text("utf-8")
REASON = "The ledger was restored."


@pytest.fixture(scope="module")
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    """A gateway on each transport."""
    with running_system(
        postgres,
        redis,
        events_heartbeat_s=0.1,
        events_organisation_streams_max=STREAMS_MAX,
        auth_cache_life_s=0.1,
        auth_negative_life_s=0.1,
    ) as running:
        for transport in TRANSPORTS:
            running.start_gateway(transport=transport, trusted_front=True)
        yield running


async def _told(system: System) -> None:
    """Wait until readers are told of all that has happened until now.

    That is once every transaction has ended that began before an event's own did, those of
    recovery's searches too.
    """
    bound = "pg_snapshot_{}(pg_current_snapshot())::text::int8"
    [row] = system.fetch(f"SELECT {bound.format('xmax')} AS next")
    await eventually(
        lambda: system.fetch(f"SELECT WHERE {bound.format('xmin')} >= $1", row["next"]),
        "what began before has ended",
    )


class Consumer:
    """Who reads events, with a key."""

    def __init__(self, system: System, channel: grpc.aio.Channel, api_key: str) -> None:
        self._system = system
        self._stub = event_service_pb2_grpc.EventServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    def stream(self, **fields: Any) -> Any:
        return self._stub.StreamEvents(
            pb.StreamEventsRequest(**fields), metadata=self._metadata, timeout=CALL_TIMEOUT_S
        )

    async def read(self, **fields: Any) -> tuple[list[Any], str]:
        """What has happened until now, and the cursor behind it."""
        await _told(self._system)
        events: list[Any] = []
        cursor = ""
        async for message in self.stream(until_current=True, **fields):
            events += message.events
            cursor = message.cursor
        return events, cursor

    async def acknowledge(self, consumer: str, cursor: str, **fields: Any) -> Any:
        request = pb.AcknowledgeEventsRequest(consumer=consumer, cursor=cursor, **fields)
        return await self._stub.AcknowledgeEvents(
            request, metadata=self._metadata, timeout=CALL_TIMEOUT_S
        )

    async def consumers(self, **fields: Any) -> Sequence[Any]:
        answer = await self._stub.ListEventConsumers(
            pb.ListEventConsumersRequest(**fields),
            metadata=self._metadata,
            timeout=CALL_TIMEOUT_S,
        )
        consumers: Sequence[Any] = answer.consumers
        return consumers

    async def delete(self, consumer: str) -> None:
        await self._stub.DeleteEventConsumer(
            pb.DeleteEventConsumerRequest(consumer=consumer),
            metadata=self._metadata,
            timeout=CALL_TIMEOUT_S,
        )


async def new_api_key(
    system: System, shop: Shop, *scopes: str, mode: str = "test", everything: bool = False
) -> tuple[str, str]:
    """A key's text and id."""
    async with Accounts.connect(system.dsn) as accounts:
        key = await accounts.create_key(
            shop.organisation_id,
            scopes=scopes or ("events:read",),
            mode=mode,
            merchant_ids=None if everything else (shop.merchant_id,),
        )
    return key.text, key.key_id


@pytest.fixture(scope="module", params=range(len(TRANSPORTS)), ids=TRANSPORTS)
def address(system: System, request: pytest.FixtureRequest) -> str:
    number: int = request.param
    return system.gateways[number].address


@asynccontextmanager
async def shop_and_consumer(
    system: System, address: str
) -> AsyncIterator[tuple[Shop, Caller, Consumer]]:
    """A new merchant's, on one gateway."""
    shop = asyncio_run(lambda: new_shop(system.dsn))
    text, _ = await new_api_key(system, shop)
    async with calling(address, shop.api_key) as caller:
        yield shop, caller, Consumer(system, caller.channel, text)


async def test_a_merchant_is_told_of_its_payments_in_their_order_and_of_no_other_s(
    system: System, address: str
) -> None:
    async with (
        shop_and_consumer(system, address) as (shop, caller, consumer),
        shop_and_consumer(system, address) as (_, other, _),
    ):
        paid = await caller.authorize(amount_minor=700)
        await other.authorize()
        captured = await caller.capture(paid.payment.payment_id)
        events, cursor = await consumer.read()
        assert [event.event_type for event in events] == [
            "authorize.succeeded",
            "capture.succeeded",
        ]
        assert events[-1].payment == captured.payment
        assert events[-1].operation == captured.operation
        assert {event.payment.merchant_id for event in events} == {shop.merchant_id}
        assert len({event.event_id for event in events}) == 2

        # On from there, and live.
        stream = consumer.stream(cursor=cursor)
        refunded = await caller.refund(paid.payment.payment_id)
        async for message in stream:
            if message.events:
                break
        assert [event.operation for event in message.events] == [refunded.operation]
        stream.cancel()
        assert await consumer.read(cursor=message.cursor) == ([], message.cursor)
        assert await consumer.read(start=pb.EVENTS_START_LATEST) == ([], message.cursor)


async def test_an_operator_s_key_is_told_of_every_merchant_and_a_live_key_of_no_test_payment(
    system: System, address: str
) -> None:
    async with (
        shop_and_consumer(system, address) as (shop, caller, _),
        shop_and_consumer(system, address) as (_, other, _),
    ):
        operator, _ = await new_api_key(system, shop, "events:read", "events:read_all")
        everything = Consumer(system, caller.channel, operator)
        _, before = await everything.read()
        wanted = [(await each.authorize()).payment.payment_id for each in (caller, other)]
        events, cursor = await everything.read(cursor=before)
        assert [event.payment.payment_id for event in events] == wanted

        live, _ = await new_api_key(system, shop, "events:read", "events:read_all", mode="live")
        assert (await Consumer(system, caller.channel, live).read())[0] == []
        # Its consumers are its own.
        await everything.acknowledge("relay", cursor)
        assert [each.consumer for each in await everything.consumers()] == ["relay"]
        await everything.delete("relay")


async def test_a_consumer_goes_on_at_its_stored_position(system: System, address: str) -> None:
    async with shop_and_consumer(system, address) as (shop, caller, consumer):
        await caller.authorize()
        [first], cursor = await consumer.read(consumer="ledger")
        assert (await consumer.read(consumer="ledger"))[0] == [first]  # not acknowledged yet

        answer = await consumer.acknowledge("ledger", cursor)
        assert (answer.moved, answer.cursor) == (True, cursor)
        assert not (await consumer.acknowledge("ledger", cursor)).moved
        await caller.authorize()
        [second], cursor = await consumer.read(consumer="ledger")
        assert second.event_id != first.event_id
        [listed] = await consumer.consumers()
        assert listed.consumer == "ledger"
        assert listed.merchant_ids == [shop.merchant_id]
        assert (listed.events_behind, listed.seconds_behind > 0) == (1, True)

        await consumer.acknowledge("ledger", cursor)
        assert [each.events_behind for each in await consumer.consumers()] == [0]
        reason = f"{REASON}\nin two lines"
        await consumer.acknowledge("ledger", "", reset_reason=reason)
        assert (await consumer.read(consumer="ledger"))[0] == [first, second]
        [listed] = await consumer.consumers()
        assert listed.reset_reason == reason
        assert listed.reset_by.startswith("key_")
        await consumer.delete("ledger")
        assert not await consumer.consumers()
        async with ConfigurationChanges.connect(system.dsn) as changes:
            removed, reset, *_ = await changes.list(organisation_id=shop.organisation_id, limit=3)
        assert (removed.action, reset.action) == ("DELETE", "UPDATE")
        assert removed.author == reset.author == listed.reset_by


async def test_an_idle_stream_gets_signs_of_life_whose_cursor_moves(
    system: System, address: str
) -> None:
    async with (
        shop_and_consumer(system, address) as (_, _, consumer),
        shop_and_consumer(system, address) as (_, other, _),
    ):
        _, begin = await consumer.read()
        stream = consumer.stream(cursor=begin)
        await other.authorize()
        async for message in stream:
            assert not message.events
            if message.cursor != begin:
                break
        else:
            raise AssertionError
        stream.cancel()


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call or stream is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), reason_of(refused.value)


async def test_who_may_not_read_events_is_refused(system: System, address: str) -> None:
    async with (
        shop_and_consumer(system, address) as (_, caller, consumer),
        shop_and_consumer(system, address) as (other_shop, _, _),
    ):
        scopeless = Consumer(system, caller.channel, caller.metadata[0][1].removeprefix("Bearer "))
        denied = grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"
        assert await refusal(scopeless.read()) == denied
        assert await refusal(scopeless.acknowledge("x", "", reset_reason=REASON)) == denied
        assert await refusal(scopeless.consumers()) == denied
        assert await refusal(scopeless.delete("x")) == denied
        not_found = grpc.StatusCode.NOT_FOUND, "MERCHANT_NOT_FOUND"
        other = other_shop.merchant_id
        assert await refusal(consumer.read(merchant_id=other)) == not_found
        assert await refusal(consumer.consumers(merchant_id=other)) == not_found
        assert await refusal(consumer.acknowledge("x", "", merchant_id=other)) == not_found
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        assert await refusal(consumer.read(cursor="no")) == (invalid, "EVENT_CURSOR_INVALID")
        assert await refusal(consumer.read(consumer="No!")) == (invalid, "INVALID_REQUEST")
        assert await refusal(consumer.acknowledge("x", "")) == (invalid, "EVENT_CURSOR_INVALID")
        assert await refusal(consumer.delete("none")) == (
            grpc.StatusCode.NOT_FOUND,
            "EVENT_CONSUMER_NOT_FOUND",
        )


async def test_a_revoked_key_s_stream_ends(system: System, address: str) -> None:
    async with shop_and_consumer(system, address) as (shop, caller, _):
        text, key_id = await new_api_key(system, shop)
        stream = Consumer(system, caller.channel, text).stream()
        await stream.read()
        async with Accounts.connect(system.dsn) as accounts:
            assert await accounts.revoke_key(key_id)

        async def to_its_end() -> None:
            while await stream.read() is not grpc.aio.EOF:
                pass

        assert await refusal(to_its_end()) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "CREDENTIAL_INVALID",
        )


async def test_an_organisation_has_so_many_streams_and_no_more(
    system: System, address: str
) -> None:
    async with shop_and_consumer(system, address) as (_, _, consumer):
        streams = [consumer.stream() for _ in range(STREAMS_MAX)]
        for stream in streams:
            await stream.read()  # it is open
        assert await refusal(consumer.stream().read()) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "EVENT_STREAMS_TOO_MANY",
        )
        for stream in streams:
            stream.cancel()

        async def has_room() -> bool:
            try:
                await consumer.read()
            except grpc.aio.AioRpcError as error:
                return error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
            return True

        await eventually(has_room, "the ended streams' room")


async def test_the_documents_program_prints_and_acknowledges_what_happens(system: System) -> None:
    snippet = re.search(r"<!-- snippet: events -->\n```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert snippet is not None
    address = system.gateways[0].address
    async with shop_and_consumer(system, address) as (shop, caller, consumer):
        text, _ = await new_api_key(system, shop)
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            snippet[1],
            env={**os.environ, "PAYMENTS_TARGET": address, "PAYMENTS_API_KEY": text},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            paid = await caller.authorize()
            assert program.stdout is not None
            async with asyncio.timeout(CALL_TIMEOUT_S):
                line = (await program.stdout.readline()).decode()
            assert line.split() == ["authorize.succeeded", paid.payment.payment_id, "2"]

            async def is_acknowledged() -> bool:
                [listed] = await consumer.consumers()
                return bool(listed.events_behind == 0)

            await eventually(is_acknowledged, "the acknowledgement")
        finally:
            program.kill()
            await program.wait()


async def test_the_command_line_tails_and_moves_consumers(system: System, nursery: Nursery) -> None:
    async with shop_and_consumer(system, system.gateways[0].address) as (shop, caller, _):
        paid = await caller.authorize()
        await _told(system)
        name = f"cli-{new_key()[:8]}"
        of_shop = "--mode", "test", "--merchant", shop.merchant_id

        async def command(*arguments: str) -> Any:
            environment = {"GATEWAY_POSTGRES_DSN": system.dsn}
            return await asyncio.to_thread(
                nursery.run, ("events", *arguments), environment, system.directory
            )

        async def tail(*arguments: str) -> list[Any]:
            run = await command("tail", *of_shop, *arguments)
            assert run.returncode == 0, run.stderr
            return [orjson.loads(line) for line in run.stdout.splitlines()]

        [line] = await tail("--consumer", name)
        assert line["event"]["payment"]["payment_id"] == paid.payment.payment_id
        assert await tail("--consumer", name) == []
        assert await tail() == [line]
        assert await tail("--from", line["cursor"]) == []

        of_mode = "--mode", "test"
        reset = ("reset", name, *of_mode, "--to", "beginning", "--reason", REASON)
        for arguments, said in (
            (("consumers",), f"operator  TEST  {name}  0 events"),
            (reset, f"{name} is at "),
            (("consumers",), f"operator  TEST  {name}  1 events"),
            (("delete", name, *of_mode), f"{name} is deleted"),
        ):
            run = await command(*arguments)
            assert said in run.stdout, run.stderr
        refused = await command("tail", *of_mode, "--consumer", "4111111111111111")
        assert "what looks like a card number" in refused.stderr
        wrong = await command("delete", name, *of_mode)
        assert wrong.returncode == 1
        assert f"There is no consumer {name}" in wrong.stderr
