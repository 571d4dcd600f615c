"""`serve --workers N` as an operator starts it: what none forked from a warm process can show."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from storage.embedded import free_port
from tests.harness import running_system
from tests.workers import (
    CHANNELS,
    OBSERVED,
    OK_CALLS,
    TRANSPORTS,
    Http,
    call_two_workers,
    connections,
    transport_settings,
    until_logged,
    worker_pids,
)

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

pytestmark = pytest.mark.executed


def maps_grpc(pid: int) -> bool:
    """Whether a process has loaded gRPC's core."""
    return "cygrpc" in Path(f"/proc/{pid}/maps").read_text()


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
        commands = [each.cmdline() for each in psutil.Process(process.pid).children()]
        assert sum(command[1:4] == ["-m", "gateway", "worker"] for command in commands) == 2
        demo = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "demo"), cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        assert await demo.wait() == 0
    finally:
        process.terminate()
        assert await process.wait() == 0
