"""What is refused takes no memory with it (P12)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.chaos.attack import resident_bytes
from tests.harness import authorize_request, calling, running_system
from tests.workers import TRANSPORTS

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

MESSAGE_BYTES = 3_000_000
MESSAGES = 60
"""Few enough that the collector of cycles does not come between."""


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

            for _ in range(5):  # buffers grow
                await refused()
            before = resident_bytes(gateway.pid)
            for _ in range(MESSAGES):
                await refused()
            kept = resident_bytes(gateway.pid) - before
    assert kept < MESSAGES * size / 2
