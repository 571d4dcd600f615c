"""What is refused takes no memory with it (P12)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from payments.v1 import payment_service_pb2 as pb

from tests.chaos.attack import resident_bytes
from tests.chaos.bad_clients import Attack, Orders
from tests.harness import authorize_request, calling, running_system
from tests.workers import TRANSPORTS, until_logged, worker_pids

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

MESSAGE_BYTES = 3_000_000
ITEM_BYTES = 1_900_000
MESSAGES = 60
"""Few enough that the collector of cycles does not come between."""
STORM: Final = 20
"""Connections that reset their streams at once: more calls than grpc core lets wait."""
HEAP_BYTES: Final = 64 * 1024 * 1024
"""The addresses that glibc sets aside, aligned alike, for each heap but the first."""


def further_heaps(pid: int) -> int:
    """How many heaps a process has beside its first, by its mappings; proc(5)."""
    count, begun, ended = 0, 0, 0
    for line in Path(f"/proc/{pid}/maps").read_text("ascii").splitlines():
        addresses, access, *_ = line.split()
        start, end = (int(each, 16) for each in addresses.split("-"))
        if access == "rw-p" and start % HEAP_BYTES == 0:
            begun, ended = start, end
        # Above what is in use, the rest is set aside.
        elif access == "---p" and start == ended and end == begun + HEAP_BYTES:
            count += 1
    return count


async def growth(pid: int, refused: Callable[[], Awaitable[None]]) -> int:
    """By how many bytes a process is larger after MESSAGES refused calls."""
    for _ in range(5):  # buffers grow
        await refused()
    before = resident_bytes(pid)
    for _ in range(MESSAGES):
        await refused()
    return resident_bytes(pid) - before


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [MESSAGE_BYTES, MESSAGE_BYTES // 2], ids=["too long", "malformed"])
async def test_messages_that_are_refused_do_not_pile_up(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str, size: int
) -> None:
    with running_system(postgres, redis, trusted_front=True) as system:
        gateway = await asyncio.to_thread(system.start_gateway, transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            request = authorize_request(metadata={"a": "x" * size})

            async def refused() -> None:
                with pytest.raises(grpc.aio.AioRpcError):
                    await caller.call("AuthorizePayment", request)

            kept = await growth(gateway.pid, refused)
    assert kept < MESSAGES * size / 2


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("method", "has_key"),
    [
        ("payments.v1.PaymentService/AuthorizePayment", True),
        ("payments.v1.PaymentService/StreamAuthorizePayments", True),
        ("payments.v1.EventService/StreamEvents", False),
        ("grpc.health.v1.Health/Check", False),
        ("grpc.health.v1.Health/Watch", False),
        ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", False),
    ],
)
async def test_bytes_that_are_no_message_do_not_pile_up(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str, method: str, has_key: bool
) -> None:
    with running_system(postgres, redis, trusted_front=True) as system:
        gateway = await asyncio.to_thread(system.start_gateway, transport=transport)
        metadata = [("authorization", f"Bearer {system.shop.api_key}")] if has_key else []
        async with grpc.aio.insecure_channel(await gateway.serving()) as channel:
            call: Any = channel.stream_stream(f"/{method}")
            message = b"\xff" * (MESSAGE_BYTES // 2)

            async def refused() -> None:
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(iter([message]), metadata=metadata).read()

            kept = await growth(gateway.pid, refused)
    assert kept < MESSAGES * len(message) / 2


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_items_that_are_refused_do_not_keep_their_batch(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis, trusted_front=True) as system:
        gateway = await asyncio.to_thread(system.start_gateway, transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            item = pb.AuthorizePaymentItem(
                item_ref="a", authorization=authorize_request(customer_id="x" * ITEM_BYTES)
            )
            request = pb.BatchAuthorizePaymentsRequest(items=[item])

            async def refused() -> None:
                [result] = (await caller.call("BatchAuthorizePayments", request)).results
                assert result.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]

            kept = await growth(gateway.pid, refused)
    assert kept < MESSAGES * ITEM_BYTES / 2


@pytest.mark.parametrize(
    ("transport", "workers"), [*((each, 1) for each in TRANSPORTS), ("grpcio", 2)]
)
async def test_what_calls_took_on_one_thread_is_of_use_to_all_when_they_are_reset(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str, workers: int
) -> None:
    with running_system(postgres, redis, trusted_front=True) as system:
        gateway = await asyncio.to_thread(
            system.start_gateway, transport=transport, workers=workers
        )
        address = await gateway.serving()
        if workers > 1:
            await until_logged(gateway, "worker serving", workers)
        await Attack(Orders(address, system.shop.api_key, 1, 0, 0, storm=STORM)).run()
        for pid in worker_pids(gateway).values() or (gateway.pid,):
            assert further_heaps(pid) == 0
