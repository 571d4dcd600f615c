"""`serve --workers N`: several processes on one port, kept by a supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from storage.embedded import free_port
from storage.postgres.store import EVENTS
from tests.faults.checker import Client, check, settled
from tests.harness import authorize_request, calling, eventually, running_system
from tests.servers import postgres_server
from tests.workers import (
    OK_CALLS,
    SUCCEEDED,
    TRANSPORTS,
    Http,
    call_two_workers,
    connections,
    events,
    transport_settings,
    until_logged,
    worker_pids,
)

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CALLERS: Final = 24
ANSWERS: Final = 100
"""So many calls are answered before and after what a test does."""


def is_running(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_metrics_and_readiness_say_which_worker_is_paused(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    http = Http(port := free_port())
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=2, metrics_address=f"127.0.0.1:{port}")
        calls = await call_two_workers(gateway, system.shop.api_key)
        assert await http.metric(OK_CALLS) == calls
        pids = worker_pids(gateway)
        try:
            os.kill(pids["1"], signal.SIGSTOP)
            assert await http.metric('gateway_worker_up{worker="1"}') == 0
            assert await http.metric('gateway_worker_up{worker="2"}') == 1
            assert await http.metric(OK_CALLS) == calls
            assert await http.get("/readyz") == (200, "ready\n")
            os.kill(pids["2"], signal.SIGSTOP)
            assert (await http.get("/readyz"))[0] == 503
            assert await http.metric(OK_CALLS) == calls
            assert (await http.get("/livez"))[0] == 200
        finally:
            for pid in pids.values():
                os.kill(pid, signal.SIGCONT)
        assert await http.get("/readyz") == (200, "ready\n")
        assert await http.metric('gateway_worker_up{worker="1"}') == 1
        assert await asyncio.to_thread(gateway.stop) == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_draining_gateway_is_alive_and_not_ready(
    postgres: PostgresForTests, redis: EmbeddedRedis, workers: int
) -> None:
    http = Http(port := free_port())
    with running_system(postgres, redis, simulator_answer_timeout_s=30) as system:
        gateway = system.start_gateway(workers=workers, metrics_address=f"127.0.0.1:{port}")
        control = system.control
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            assert await http.get("/readyz") == (200, "ready\n")
            await control.hold("before_answer")
            waiting = asyncio.ensure_future(caller.authorize())
            await control.await_held()
            stopping = asyncio.ensure_future(asyncio.to_thread(gateway.stop))
            await until_logged(gateway, "draining")
            assert (await http.get("/readyz"))[0] == 503
            assert await http.get("/livez") == (200, "alive\n")
            await control.release()
            assert (await waiting).operation.state == SUCCEEDED
            assert await stopping == 0
        await control.close()


async def test_a_worker_that_stays_silent_is_replaced(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=2, worker_silence_s_max=2)
        await gateway.serving()
        os.kill(worker_pids(gateway)["2"], signal.SIGSTOP)
        assert (await until_logged(gateway, "worker is silent"))["worker"] == "2"
        await until_logged(gateway, "worker serving", 3)
        assert await asyncio.to_thread(gateway.stop) == 0


@pytest.mark.parametrize(
    ("transport", "number"),
    [("grpcio", signal.SIGKILL), ("native", signal.SIGKILL), ("grpcio", signal.SIGTERM)],
    ids=["grpcio-killed", "native-killed", "grpcio-drained"],
)
async def test_the_end_of_a_worker_loses_no_payment_and_fails_no_call(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str, number: signal.Signals
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=2, **transport_settings(transport))
        control = system.control
        await control.latency(20, 100)  # so that calls are in flight when it strikes
        await control.close()
        async with connections(gateway, system.shop.api_key) as callers:
            client = Client(*callers)
            stop = asyncio.Event()
            # gRPC's own retries end with the headers of an answer. The native transport writes them
            # ahead of the rest, so that its clients have to repeat what dies between the two.
            send = client.call if transport == "grpcio" else client.until_answered

            async def call() -> None:
                while not stop.is_set():
                    await send("AuthorizePayment", authorize_request())

            calls = asyncio.gather(*(call() for _ in range(CALLERS)))
            await client.more(ANSWERS, calls)
            os.kill(worker_pids(gateway)["1"], number)
            await client.more(ANSWERS, calls)
            await until_logged(gateway, "worker serving", 3)
            await client.more(ANSWERS, calls)
            stop.set()
            await calls
        ended = await until_logged(gateway, "worker ended")
        drained = number == signal.SIGTERM
        assert ended["status"] == ("status 0" if drained else "SIGKILL")
        await settled(system)
        check(system, client)
        assert await asyncio.to_thread(gateway.stop) == 0


async def test_a_shutdown_drains_all_workers_and_a_second_signal_changes_nothing(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=30) as system:
        gateway = system.start_gateway(workers=2)
        await call_two_workers(gateway, system.shop.api_key)
        control = system.control
        async with connections(gateway, system.shop.api_key) as callers:
            client = Client(*callers)
            await control.hold("before_answer")
            calls = [
                asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
                for _ in range(CALLERS)
            ]
            await control.await_held(CALLERS)
            stopping = asyncio.ensure_future(asyncio.to_thread(gateway.stop))
            await until_logged(gateway, "draining", 3)  # the supervisor's and two workers'
            os.kill(gateway.pid, signal.SIGINT)
            await until_logged(gateway, "draining already")
            await control.release()
            for answer in await asyncio.gather(*calls):
                assert answer.operation.state == SUCCEEDED
        assert await stopping == 0
        assert [line["status"] for line in events(gateway, "worker drained")] == ["status 0"] * 2
        await control.close()
        # At once: nothing is left to recovery.
        assert system.unfinished() == []
        check(system, client)


async def test_every_call_that_a_shutdown_lets_begin_is_answered(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=10) as system:
        gateway = system.start_gateway(workers=2)
        control = system.control
        await control.latency(20, 100)
        await control.close()
        async with connections(gateway, system.shop.api_key) as callers:
            client = Client(*callers)

            async def call() -> None:
                while await client.attempt("AuthorizePayment", authorize_request()) is not None:
                    pass

            calls = asyncio.gather(*(call() for _ in range(CALLERS)))
            await client.more(ANSWERS, calls)
            assert await asyncio.to_thread(gateway.stop) == 0
            await calls
        assert system.unfinished() == []
        [row] = system.fetch("SELECT count(*) AS operations FROM operations")
        assert row["operations"] == len(client.told)
        check(system, client)


async def test_a_shutdown_does_not_wait_for_a_database_that_is_away_beyond_its_graces(
    redis: EmbeddedRedis,
) -> None:
    """The supervisor ends a worker that does, and tells it by its status."""
    long: dict[str, Any] = {"outcome_retry_s_max": 600, "simulator_answer_timeout_s": 60}
    with postgres_server() as own, running_system(own, redis, **long) as system:
        gateway = system.start_gateway(workers=2, drain_grace_s=0.5)
        async with calling(gateway, system.shop.api_key) as caller:
            await caller.authorize()
            await system.control.hold("before_answer")
            call = asyncio.ensure_future(caller.authorize())
            await system.control.await_held()
            own.server.kill()
            await system.control.release()
            try:
                tried = "no connection to PostgreSQL for changes"
                await eventually(lambda: tried in gateway.log, "the outcome is tried")
                assert await asyncio.to_thread(gateway.stop) == 0, gateway.log
                await asyncio.wait([call])
                assert call.exception() is not None
            finally:
                own.server.start()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_workers_drain_and_end_when_their_supervisor_is_killed(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=30) as system:
        gateway = system.start_gateway(workers=2, **transport_settings(transport))
        control = system.control
        async with connections(gateway, system.shop.api_key) as callers:
            client = Client(*callers)
            await control.hold("before_answer")
            calls = [
                asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
                for _ in range(CALLERS)
            ]
            await control.await_held(CALLERS)
            pids = worker_pids(gateway).values()
            assert len(pids) == 2
            gateway.kill()
            await until_logged(gateway, "the supervisor has gone", 2)
            await control.release()
            for answer in await asyncio.gather(*calls):
                assert answer.operation.state == SUCCEEDED
            await eventually(lambda: not any(map(is_running, pids)), "no worker is left")
        await control.close()
        assert system.unfinished() == []
        check(system, client)


async def test_a_worker_that_dies_again_and_again_is_started_after_growing_pauses(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=2)
        await gateway.serving()
        for serving in (3, 4, 5):
            os.kill(worker_pids(gateway)["1"], signal.SIGKILL)
            await until_logged(gateway, "worker serving", serving)
        assert [line["pause_s"] for line in events(gateway, "worker ended")] == [0.1, 0.2, 0.4]
        assert await asyncio.to_thread(gateway.stop) == 0


async def test_a_supervisor_whose_workers_can_no_longer_start_ends_and_says_why(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=2)
        await gateway.serving()
        postgres.drop_database(system.dsn)
        for pid in worker_pids(gateway).values():
            os.kill(pid, signal.SIGKILL)
        assert await asyncio.to_thread(gateway.wait) == 1
        await eventually(lambda: "Error: PostgreSQL does not answer" in gateway.log, "it says why")
        assert len(events(gateway, "worker could not start")) >= 5
        assert not any(is_running(line["worker_pid"]) for line in events(gateway, "worker started"))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("first", [1, 2], ids=["after-one", "after-several"])
async def test_a_used_port_is_refused_with_any_number_of_workers(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str, first: int
) -> None:
    settings = transport_settings(transport)
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=first, **settings)
        settings["listen_address"] = await gateway.serving()
        for workers in (1, 2):
            other = system.start_gateway(workers=workers, **settings)
            assert await asyncio.to_thread(other.wait) == 1
            await asyncio.to_thread(other.end)
            assert "cannot listen" in other.log
        async with calling(gateway, system.shop.api_key) as caller:
            assert (await caller.authorize()).operation.state == SUCCEEDED


@pytest.mark.parametrize(
    ("grpc", "notifications"),
    [
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "0.0.0.0"),
        ("127.0.0.1", "[::]"),
        ("localhost", "127.0.0.1"),
    ],
)
async def test_several_workers_serve_no_two_things_on_one_port(
    postgres: PostgresForTests, redis: EmbeddedRedis, grpc: str, notifications: str
) -> None:
    port = free_port()
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            workers=2,
            listen_address=f"{grpc}:{port}",
            notifications_address=f"{notifications}:{port}",
        )
        assert await asyncio.to_thread(gateway.wait) == 1
        await asyncio.to_thread(gateway.end)
        assert "it is GATEWAY_NOTIFICATIONS_ADDRESS, and gRPC is served there" in gateway.log


async def test_doctor_counts_the_connections_that_the_workers_hold(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=2)
        await gateway.serving()
        [row] = system.fetch(
            "SELECT count(*) AS held FROM pg_stat_activity"
            " WHERE application_name LIKE 'gateway-%' AND datname = current_database()"
        )
        environment = {name: v for name, v in os.environ.items() if not name.startswith("GATEWAY_")}

        def doctor(workers: int | None, *arguments: str) -> subprocess.CompletedProcess[str]:
            variables = {} if workers is None else {"GATEWAY_WORKERS": str(workers)}
            return subprocess.run(
                [sys.executable, "-m", "gateway", "doctor", *arguments],
                env=environment | system.settings | variables,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )

        # Those for streams of events are opened with the first stream.
        held = row["held"] // 2 + EVENTS.connections
        good = await asyncio.to_thread(doctor, 2)
        assert good.returncode == 0, good.stdout
        assert f"2 x {held} connections" in good.stdout
        bad = await asyncio.to_thread(doctor, 64)
        assert bad.returncode == 1
        assert f"64 x {held} connections" in bad.stdout
        # As of `serve --workers 64`, of which the environment knows nothing.
        bad = await asyncio.to_thread(doctor, None, "--workers", "64")
        assert (bad.returncode, f"64 x {held} connections" in bad.stdout) == (1, True), bad.stderr
