"""`[::]` is every address of both families, for whatever the gateway serves over HTTP."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from gateway.connectors.simulator.launch import SimulatorProcess
from gateway.listening import listen
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

needs_ipv6 = pytest.mark.skipif(
    not socket.has_dualstack_ipv6(), reason="not run: this host has no IPv6"
)


@pytest.fixture
async def runner() -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    yield runner
    await runner.cleanup()


def reached(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


@needs_ipv6
@pytest.mark.parametrize("reuse_port", [False, True])
async def test_every_address_is_one_of_both_families(
    runner: web.AppRunner, reuse_port: bool
) -> None:
    await listen(runner, "::", 0, reuse_port=reuse_port)
    port = runner.addresses[0][1]
    assert reached("127.0.0.1", port)
    assert reached("::1", port)


async def test_another_address_is_itself_alone(runner: web.AppRunner) -> None:
    await listen(runner, "127.0.0.1", 0)
    [(host, port, *_)] = runner.addresses
    assert host == "127.0.0.1"
    assert not reached("127.0.0.2", port)


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "127.0.0.1"])
async def test_an_address_that_is_taken_is_refused(runner: web.AppRunner, host: str) -> None:
    port = free_port()
    await listen(runner, host, port)
    with pytest.raises(OSError, match="in use"):
        await listen(runner, host, port)


@needs_ipv6
def test_the_simulator_of_a_pod_is_reached_by_both_families(tmp_path: Path) -> None:
    simulator = SimulatorProcess.start(tmp_path / "journal", listen="[::]:0")
    try:
        port = int(simulator.url.rpartition(":")[2])
        assert reached("127.0.0.1", port)
        assert reached("::1", port)
    finally:
        simulator.stop()
