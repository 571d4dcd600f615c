"""Sentry as it receives what a gateway did not expect, and nothing else."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.collectors import Sentry, closed_port
from tests.harness import calling, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

_BROKEN = """
from gateway.application.ports import Capabilities
from gateway.composition import run_server
from gateway.domain.model import Mode
from gateway.settings import load_settings

class Broken:
    name = "broken"
    capabilities = Capabilities(Mode.TEST, True, None, True, True, 1.0, frozenset())

    async def send(self, request, send_before):
        raise ZeroDivisionError(f"card 4111 1111 1111 1111, cvv=123 of {request.kind.name}")

    async def query(self, kind, reference):
        return None

    async def close(self):
        pass

run_server(load_settings(simulator_url="", recovery_enabled=False), connectors=[Broken()])
"""


async def test_an_unexpected_exception_is_reported_scrubbed_and_a_refusal_is_not(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    sentry = Sentry()
    with ExitStack() as stack:
        stack.enter_context(sentry.running())
        system = stack.enter_context(running_system(postgres, redis))
        gateway = system.start_program(_BROKEN, sentry_dsn=sentry.dsn)
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            with pytest.raises(grpc.aio.AioRpcError, match="no such payment"):
                await caller.payment("pay_none")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await caller.authorize(idempotency_key="key-of-a-customer")
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert await asyncio.to_thread(gateway.stop) == 0
        assert "a call failed unexpectedly" in gateway.log
    [event] = sentry.events
    [exception] = event["exception"]["values"]
    assert exception["type"] == "ZeroDivisionError"
    assert event["extra"]["method"] == "AuthorizePayment"
    assert event["extra"]["merchant_id"] == system.shop.merchant_id
    for secret in ("4111 1111", "cvv=123", "key-of-a-customer", "tok_visa", "gwk_"):
        assert secret not in sentry.text, secret
    assert "AUTHORIZE" in json.dumps(event)


async def test_a_sentry_that_is_away_neither_fails_a_call_nor_holds_up_the_drain(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with ExitStack() as stack:
        system = stack.enter_context(running_system(postgres, redis))
        dsn = f"http://0123456789abcdef@127.0.0.1:{closed_port()}/1"
        gateway = system.start_program(_BROKEN, sentry_dsn=dsn)
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            for _ in range(10):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await caller.authorize()
                assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert await asyncio.to_thread(gateway.stop) == 0
