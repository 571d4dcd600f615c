"""`serve --workers N`: several processes on one port, kept by a supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import grpc
import pytest
from payments.v1 import payment_pb2

from storage.embedded import free_port
from tests.faults.checker import Client, check, settled
from tests.harness import Caller, authorize_request, calling, eventually, running_system

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

pytestmark = pytest.mark.executed

SUCCEEDED: Final = payment_pb2.OPERATION_STATE_SUCCEEDED
CHANNELS: Final = 12
"""Connections; with so many, the chance that all of them get the same one of two workers is 1 in
2,048, and then a test opens more."""
CALLERS: Final = 24
ANSWERS: Final = 100
"""So many calls are answered before and after what a test does."""

TRANSPORTS: Final = ("grpcio", "native")


def transport_settings(transport: str) -> dict[str, Any]:
    return {"transport": transport, "trusted_front": transport == "native"}


def events(gateway: GatewayProcess, message: str) -> list[dict[str, Any]]:
    """What was logged under a message, in its order."""
    marked = f'"message":"{message}"'
    return [json.loads(line) for line in list(gateway.lines) if marked in line]


async def until_logged(gateway: GatewayProcess, message: str, count: int = 1) -> dict[str, Any]:
    """Wait until so many lines have the message; the last of them."""
    await eventually(lambda: len(events(gateway, message)) >= count, f"{count} x {message!r}")
    return events(gateway, message)[count - 1]


def worker_pids(gateway: GatewayProcess) -> dict[str, int]:
    """The latest process of each worker that served."""
    return {line["worker"]: line["worker_pid"] for line in events(gateway, "worker serving")}


def is_running(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def maps_grpc(pid: int) -> bool:
    """Whether a process has loaded gRPC's core."""
    return "cygrpc" in Path(f"/proc/{pid}/maps").read_text()


def workers_of_calls(gateway: GatewayProcess) -> set[str]:
    return {line["worker"] for line in events(gateway, "call finished")}


@asynccontextmanager
async def connections(gateway: GatewayProcess, api_key: str) -> AsyncIterator[list[Caller]]:
    """Callers with a connection each, which retry as the published service config says."""
    config = (files("payments.v1") / "service_config.json").read_text()
    options = [
        ("grpc.service_config", config),
        ("grpc.use_local_subchannel_pool", 1),  # or all channels share one connection
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 300),
    ]
    async with contextlib.AsyncExitStack() as stack:
        callers = []
        for _ in range(CHANNELS):
            channel = grpc.aio.insecure_channel(await gateway.serving(), options=options)
            callers.append(Caller(await stack.enter_async_context(channel), api_key))
        yield callers


async def call_two_workers(gateway: GatewayProcess, api_key: str) -> int:
    """Call over new connections until more than one worker has answered; the number of calls."""
    calls = 0
    while True:
        async with connections(gateway, api_key) as callers:
            for answer in await asyncio.gather(*(caller.authorize() for caller in callers)):
                assert answer.operation.state == SUCCEEDED
        calls += CHANNELS
        await until_logged(gateway, "call finished", calls)
        if len(workers_of_calls(gateway)) > 1:
            return calls


class Http:
    """The supervisor's side for operators."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(self._address + path) as answer:
            return answer.status, await answer.text()

    async def metric(self, name: str) -> float:
        """The value of one sample."""
        status, text = await self.get("/metrics")
        assert status == 200
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not in\n{text}"
        return float(found[1])


OK_CALLS: Final = 'gateway_rpc_requests_total{code="OK",method="AuthorizePayment",reason=""}'
OBSERVED: Final = 'gateway_rpc_duration_seconds_count{method="AuthorizePayment"}'


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_workers_share_a_port_and_their_metrics_are_the_sums(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    http = Http(port := free_port())
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            workers=2, metrics_address=f"127.0.0.1:{port}", **transport_settings(transport)
        )
        calls = await call_two_workers(gateway, system.shop.api_key)
        assert await http.metric(OK_CALLS) == calls
        assert await http.metric(OBSERVED) == calls
        assert await http.metric("gateway_redis_up") == 1
        assert not maps_grpc(gateway.pid)
        assert all(maps_grpc(pid) for pid in worker_pids(gateway).values())

        number, pid = worker_pids(gateway).popitem()
        os.kill(pid, signal.SIGKILL)
        ended = await until_logged(gateway, "worker ended")
        assert (ended["worker"], ended["status"]) == (number, "SIGKILL")
        assert await http.metric(OK_CALLS) == calls
        assert await http.metric(OBSERVED) == calls
        await until_logged(gateway, "worker serving", 3)
        assert worker_pids(gateway)[number] != pid
        calls += await _more_calls(gateway, system)
        assert await http.metric(OK_CALLS) == calls
        assert await http.metric(f'gateway_worker_restarts_total{{worker="{number}"}}') == 1
        assert await http.metric(f'gateway_worker_up{{worker="{number}"}}') == 1
        assert await asyncio.to_thread(gateway.stop) == 0


async def _more_calls(gateway: GatewayProcess, system: System) -> int:
    async with connections(gateway, system.shop.api_key) as callers:
        await asyncio.gather(*(caller.authorize() for caller in callers))
    return CHANNELS


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


def serve(system: System, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """`serve` with arguments, to its end."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GATEWAY_")}
    environment |= system.settings
    environment |= {f"GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "gateway", "serve", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


async def test_workers_that_cannot_start_end_the_supervisor_with_their_message_once(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        empty = postgres.create_database()
        ran = await asyncio.to_thread(serve, system, "--workers", "3", postgres_dsn=empty)
        assert ran.returncode == 1
        assert ran.stderr.count("gateway migrate") == 1
        assert "Traceback" not in ran.stderr
        postgres.drop_database(empty)


async def test_settings_that_the_workers_refuse_are_named_once(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        native = await asyncio.to_thread(serve, system, "--workers", "2", transport="native")
        assert (native.returncode, native.stderr.count("GATEWAY_TRUSTED_FRONT")) == (1, 1)
        for workers in ("0", "65"):
            refused = await asyncio.to_thread(serve, system, "--workers", workers)
            assert refused.returncode == 2
            assert "--workers" in refused.stderr
        refused = await asyncio.to_thread(serve, system, workers=65)
        assert (refused.returncode, refused.stderr.count("GATEWAY_WORKERS")) == (1, 1)


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

        def doctor(workers: int) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "gateway", "doctor"],
                env=environment | system.settings | {"GATEWAY_WORKERS": str(workers)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )

        good = await asyncio.to_thread(doctor, 2)
        assert good.returncode == 0, good.stdout
        assert f"2 x {row['held'] // 2} connections" in good.stdout
        bad = await asyncio.to_thread(doctor, 64)
        assert bad.returncode == 1
        assert f"64 x {row['held'] // 2} connections" in bad.stdout


async def test_run_serves_with_several_workers(tmp_path: Path) -> None:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GATEWAY_")}
    environment["GATEWAY_LISTEN_ADDRESS"] = f"127.0.0.1:{free_port()}"
    environment["GATEWAY_METRICS_ADDRESS"] = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "run", "--workers", "2"),
        cwd=tmp_path,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if b"Stop with Ctrl-C" in line:
                break
        demo = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "demo"), cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        assert await demo.wait() == 0
    finally:
        process.terminate()
        assert await process.wait() == 0
