"""A synchronous standby: what was acknowledged survives the primary, and nothing else is told."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from payments.v1 import payment_pb2

from gateway import doctor
from gateway.cli import main
from gateway.doctor import examine
from gateway.local import LocalState
from gateway.settings import load_settings
from storage.postgres import row_security
from storage.postgres.errors import ConnectionUnavailable
from storage.postgres.migrate import migrate
from storage.postgres.pool import ConnectionSettings, connect, system_generation
from tests.faults.checker import Client, check, settled
from tests.faults.transports import alternating, start_on_both
from tests.harness import (
    Caller,
    authorize_request,
    bytes_without_replay,
    calling,
    eventually,
    running_system,
)
from tests.servers import fetch
from tests.standby import replicated_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests
    from tests.standby import ReplicatedPostgres

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED
OPEN = {payment_pb2.OPERATION_STATE_PROCESSING, payment_pb2.OPERATION_STATE_IN_DOUBT}
UNKNOWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
PAYMENTS = 20
LONG_S = 120.0
"""A time-out that no test waits for."""
SHORT_S = 1.0
UNANSWERED_S = 3.0
"""The deadline of a call that is not to be answered."""
SHORT_TIMES: dict[str, Any] = {"postgres_statement_timeout_s": 2}


@pytest.fixture
def pair() -> Iterator[ReplicatedPostgres]:
    """A primary and its synchronous standby, which the test may kill."""
    with replicated_postgres() as running:
        yield running


async def test_after_the_standby_was_promoted_all_that_was_acknowledged_is_there_and_clients_go_on(
    pair: ReplicatedPostgres, redis: EmbeddedRedis
) -> None:
    with running_system(pair, redis) as system:
        gateways = start_on_both(system)
        async with (
            calling(gateways[0], system.shop.api_key) as first,
            calling(gateways[1], system.shop.api_key) as second,
        ):
            client = Client(first, second)
            requests = [authorize_request() for _ in range(PAYMENTS)]
            answers = [await client.until_answered("AuthorizePayment", each) for each in requests]
            pair.server.kill()
            pair.promote()
            for request, before in zip(requests, answers, strict=True):
                after = await client.until_answered("AuthorizePayment", request)
                assert bytes_without_replay(after) == bytes_without_replay(before)
            later = await client.until_answered("AuthorizePayment", authorize_request())
            assert later.operation.state == SUCCEEDED
        await settled(system)
        check(system, client)


@alternating(held=("intent", "outcome"))
async def test_a_commit_whose_wait_for_the_standby_was_cancelled_is_not_told_as_done(
    pair: ReplicatedPostgres, redis: EmbeddedRedis, held: str, transport: str
) -> None:
    """Were it told, the promotion would make it unsaid."""
    with running_system(pair, redis, transport=transport, trusted_front=True, **SHORT_TIMES) as (
        system
    ):
        gateway = system.start_gateway()
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            await client.until_answered("AuthorizePayment", authorize_request())
            control = system.control
            await control.hold("before_answer")
            request = authorize_request()
            if held == "intent":
                pair.standby.pause()
            call = asyncio.ensure_future(
                caller.call("AuthorizePayment", request, timeout_s=UNANSWERED_S)
            )
            if held == "outcome":
                await control.await_held()
                pair.standby.pause()
            await control.release()
            await control.close()
            await eventually(lambda: _cancel_waits(pair), "a commit waits for the standby")
            try:
                told = await call
            except grpc.aio.AioRpcError as error:
                assert error.code() in UNKNOWN  # noqa: PT017 - or it is answered without an outcome
            else:
                assert told.operation.state in OPEN
            pair.server.kill()
            pair.standby.resume()
            pair.promote()
            answer = await client.until_answered("AuthorizePayment", request)
            assert answer.operation.state == SUCCEEDED
        await settled(system)
        check(system, client)


def _cancel_waits(pair: ReplicatedPostgres) -> bool:
    """Cancel the commits that wait for the standby, as a person might."""
    waiting = fetch(
        pair.server.dsn,
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        " AND application_name IN ('gateway-intents', 'gateway-changes')",
    )
    return bool(waiting)


async def test_an_answer_of_a_lost_primary_is_no_longer_replayed_from_the_cache(
    pair: ReplicatedPostgres, redis: EmbeddedRedis
) -> None:
    """An asynchronous standby may lose what was acknowledged; the cache must not tell otherwise."""
    pair.commit_alone()
    pair.await_standby("async")
    with running_system(pair, redis) as system:
        gateway = system.start_gateway()
        async with calling(gateway, system.shop.api_key) as caller:
            pair.standby.stop()
            request = authorize_request()
            before = await caller.call("AuthorizePayment", request)
            pair.server.kill()
            pair.standby.start()
            pair.promote()
            client = Client(caller)
            # Until the gateway has seen the new primary, it does not know that there is one.
            await client.until_answered("AuthorizePayment", authorize_request())
            after = await client.until_answered("AuthorizePayment", request)
            assert after.operation.operation_id != before.operation.operation_id
            assert not after.replay.replayed


async def test_a_promotion_makes_another_generation(pair: ReplicatedPostgres) -> None:
    settings = ConnectionSettings(pair.dsn_of("gateway"), connect_timeout_s=LONG_S)
    before = await connect(settings, "test")
    generation = await system_generation(before)
    before.terminate()
    pair.server.kill()
    pair.promote()
    after = await connect(settings, "test")
    assert await system_generation(after) != generation
    after.terminate()


async def test_a_host_that_does_not_answer_does_not_delay_the_others(
    postgres: PostgresForTests,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for hosts in ("{silent},{server}", "{server},{silent}"):
            named = hosts.format(
                silent=f"127.0.0.1:{silent.getsockname()[1]}",
                server=f"127.0.0.1:{postgres.server.port}",
            )
            dsn = postgres.server.dsn.replace(f"127.0.0.1:{postgres.server.port}", named)
            # One after the other, they would have to share the time.
            connection = await connect(ConnectionSettings(dsn, connect_timeout_s=LONG_S), "test")
            connection.terminate()


async def test_what_people_run_and_a_start_behind_row_security_ask_all_hosts_at_once_too(
    postgres: PostgresForTests,
) -> None:
    server = f"@127.0.0.1:{postgres.server.port}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        both = f"@127.0.0.1:{silent.getsockname()[1]},{server[1:]}"
        dsn = postgres.create_database().replace(server, both)
        await migrate(dsn)
        await row_security.enable(dsn)
        assert await row_security.problems(dsn) == []
        findings = await examine(load_settings(postgres_dsn=dsn), LocalState())
    about_it = [each for each in findings if each.text.startswith("PostgreSQL")]
    assert about_it
    assert all(each.good for each in about_it), about_it


async def test_a_command_that_finds_a_standby_alone_says_so_in_one_line(
    pair: ReplicatedPostgres,
) -> None:
    alone = {"GATEWAY_POSTGRES_DSN": pair.standby.dsn}
    for command in (["migrate"], ["row-security", "enable"]):
        ran = await asyncio.to_thread(CliRunner().invoke, main, command, env=alone)
        assert ran.exit_code == 1
        assert ran.stderr == "Error: ConnectionError: no host that takes writes\n"


async def test_row_security_is_enabled_at_the_primary_whichever_host_is_named_first(
    pair: ReplicatedPostgres,
) -> None:
    await migrate(pair.dsn_of("gateway"))
    pair.server.kill()
    pair.promote()
    pair.build_standby()
    dsn = pair.dsn_of("gateway")
    assert dsn.index(f":{pair.standby.port}") < dsn.index(f":{pair.server.port}")
    await row_security.enable(dsn)
    assert await row_security.problems(dsn) == []


async def test_a_primary_whose_standby_is_away_is_not_served_from(
    pair: ReplicatedPostgres,
) -> None:
    """It may be one that was replaced and does not know it."""
    settings = ConnectionSettings(pair.dsn_of("gateway"), connect_timeout_s=SHORT_S)
    pair.standby.pause()
    with pytest.raises(ConnectionUnavailable):
        await connect(settings, "test")
    # Nobody waits for the standby any more: each such connection would be held for ever.
    sql = "SELECT FROM pg_stat_activity WHERE application_name = 'gateway-test'"
    await eventually(lambda: not fetch(pair.server.dsn, sql), "the server is left alone")
    pair.standby.resume()
    connection = await connect(
        ConnectionSettings(pair.dsn_of("gateway"), connect_timeout_s=LONG_S), "test"
    )
    connection.terminate()


async def test_a_server_without_a_standby_is_refused_where_one_is_required(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis, postgres_standby_required=True) as system:
        gateway = system.start_gateway()
        assert gateway.wait() != 0
        assert "synchronous_standby_names is empty" in gateway.log


async def test_a_gateway_is_ready_only_while_the_standby_has_what_is_committed(
    pair: ReplicatedPostgres, redis: EmbeddedRedis
) -> None:
    with running_system(pair, redis, postgres_standby_required=True, **SHORT_TIMES) as system:
        gateway = system.start_gateway()
        async with calling(gateway, system.shop.api_key) as caller:
            assert await _serves(caller)
            pair.standby.pause()
            await _until(caller, serves=False)
            pair.standby.resume()
            await _until(caller, serves=True)
            answer = await caller.call("AuthorizePayment", authorize_request())
            assert answer.operation.state == SUCCEEDED


async def _serves(caller: Caller) -> bool:
    stub = health_pb2_grpc.HealthStub(caller.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=LONG_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _until(caller: Caller, *, serves: bool) -> None:
    stub = health_pb2_grpc.HealthStub(caller.channel)
    wanted = health_pb2.HealthCheckResponse.SERVING
    async with asyncio.timeout(LONG_S):
        async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
            if (answer.status == wanted) is serves:
                return


async def test_the_doctor_says_of_a_standby_what_readiness_asks_of_it(
    pair: ReplicatedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def found(good: bool, text: str) -> bool:
        settings = load_settings(postgres_dsn=pair.server.dsn, postgres_standby_required=True)
        findings = await examine(settings, LocalState())
        return any(each.good is good and text in each.text for each in findings)

    assert await found(True, "a synchronous standby has what PostgreSQL commits")
    pair.standby.pause()
    with monkeypatch.context() as patched:
        patched.setattr(doctor, "CHECK_TIMEOUT_S", SHORT_S)
        assert await found(False, "no synchronous standby confirms a commit")
    pair.standby.resume()
    pair.commit_alone()
    assert await found(False, "synchronous_standby_names is empty")
