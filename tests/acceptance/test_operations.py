"""What an operator sees: metrics, health that follows the database, refusals to start, draining."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.harness import calling, eventually, running_system
from tests.servers import fetch, free_port, postgres_server

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


TRANSPORTS = pytest.mark.parametrize("transport", ["grpcio", "native"])


@TRANSPORTS
async def test_metrics_tell_calls_claims_batches_and_psp_calls(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    port = free_port()
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            metrics_address=f"127.0.0.1:{port}", transport=transport, trusted_front=True
        )
        async with calling(gateway, system.shop.api_key) as caller:
            await caller.authorize()
            await caller.authorize(token="tok_declined_insufficient_funds")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/metrics") as answer,
        ):
            text = await answer.text()
    for line in (
        'gateway_rpc_requests_total{code="OK",method="AuthorizePayment",reason=""} 2.0',
        'gateway_claims_total{result="NEW"} 2.0',
        'delivery="ANSWERED",kind="AUTHORIZE",result="DECLINED"} 1.0',
        "gateway_operations_in_doubt 0.0",
        'gateway_batch_rows_count{lane="intents"}',
        "gateway_redis_up 1.0",
        "gateway_ready 1.0",
    ):
        assert line in text
    assert system.shop.merchant_id not in text


async def _health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        status: int = answer.status
        return status


@TRANSPORTS
async def test_health_follows_the_database(redis: EmbeddedRedis, transport: str) -> None:
    with postgres_server() as postgres, running_system(postgres, redis) as system:
        gateway = system.start_gateway(transport=transport, trusted_front=True)
        address = gateway.address
        assert await _health(address) == SERVING

        async def is_serving() -> bool:
            return bool(await _health(address) == SERVING)

        async def is_not_serving() -> bool:
            return bool(await _health(address) == NOT_SERVING)

        postgres.server.kill()
        await eventually(is_not_serving, "the gateway says that it does not serve")
        postgres.server.start()
        await eventually(is_serving, "the gateway says that it serves")
        async with calling(gateway, system.shop.api_key) as caller:
            answer = await caller.authorize()
            assert answer.payment.amounts.authorized_minor == 1000


async def test_health_follows_a_database_that_answers_and_cannot_be_served_from(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway()
        address = gateway.address
        assert await _health(address) == SERVING
        fetch(system.dsn, "ALTER TABLE schema_migrations RENAME COLUMN phase TO elsewhere")
        while await _health(address) != NOT_SERVING:
            pass
        fetch(system.dsn, "ALTER TABLE schema_migrations RENAME COLUMN elsewhere TO phase")
        while await _health(address) != SERVING:
            pass


async def _failed_counts(port: int) -> dict[str, float]:
    """How often what waits could not be counted, by what it is."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        text = await answer.text()
    found = re.findall(r'^gateway_count_failures_total{what="(\w+)"} (\S+)$', text, re.MULTILINE)
    return {what: float(times) for what, times in found}


async def test_what_waits_and_cannot_be_counted_takes_no_gateway_out_of_service(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    """The database is well, and only the counts do not come to their end within a time-out."""
    port = free_port()
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            metrics_address=f"127.0.0.1:{port}",
            notifications_address="127.0.0.1:0",
            postgres_statement_timeout_s=0.5,
            readiness_interval_s=0.05,
            recovery_enabled=False,  # it would wait for the same locks
        )
        async with calling(gateway, system.shop.api_key) as caller:
            await caller.authorize()
            holder = await asyncpg.connect(system.dsn)
            try:
                async with holder.transaction():
                    await holder.execute(
                        "LOCK TABLE doubts, pending_notifications IN ACCESS EXCLUSIVE MODE"
                    )
                    failed: dict[str, float] = {}
                    while min(failed.get(what, 0) for what in ("doubts", "notifications")) < 2:
                        assert await _health(gateway.address) == SERVING
                        failed = await _failed_counts(port)
                    assert "outbox" not in failed
                    answer = await caller.payment((await caller.authorize()).payment.payment_id)
                    assert answer.payment.amounts.authorized_minor == 1000
            finally:
                await holder.close()


async def test_serve_refuses_a_database_that_may_lose_commits(redis: EmbeddedRedis) -> None:
    with (
        postgres_server({"fsync": "off"}) as postgres,
        running_system(postgres, redis) as system,
    ):
        gateway = system.start_gateway()
        assert gateway.wait() == 1
        await eventually(lambda: "fsync" in gateway.log, "the refusal names the setting")


async def test_serve_refuses_a_database_without_the_schema_and_names_the_command(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        empty = postgres.create_database()
        gateway = system.start_gateway(postgres_dsn=empty)
        assert gateway.wait() == 1
        await eventually(lambda: "gateway migrate" in gateway.log, "the command is named")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"transport": "native"}, "GATEWAY_TRUSTED_FRONT"),
        (
            {"transport": "native", "trusted_front": True, "connection_age_max_s": 60},
            "GATEWAY_CONNECTION_AGE_MAX_S",
        ),
        (
            {"transport": "native", "trusted_front": True, "tls_certificate_file": "x"},
            "GATEWAY_TLS_CERTIFICATE_FILE",
        ),
        ({"listen_address": "nowhere"}, "GATEWAY_LISTEN_ADDRESS"),
        ({"tls_certificate_file": "/no/tls.crt", "tls_key_file": "/no/tls.key"}, "/no/tls.crt"),
    ],
)
async def test_serve_names_the_setting_that_it_refuses(
    postgres: PostgresForTests, redis: EmbeddedRedis, settings: dict[str, Any], named: str
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(**settings)
        assert gateway.wait() == 1
        await eventually(lambda: named in gateway.log, "the setting is named")


async def test_serve_names_an_address_that_is_taken_and_ends_without_a_trace(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, running_system(postgres, redis) as system:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        # The last that it opens: what serves already has to be closed.
        gateway = system.start_gateway(notifications_address=address)
        assert gateway.wait() == 1
        port = address.rpartition(":")[2]
        await eventually(lambda: port in gateway.log, "the address is named")
        assert "Traceback" not in gateway.log
