"""gateway.telemetry.http: the port for metrics and probes, whoever asks there and however."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from gateway.telemetry import http
from gateway.telemetry.http import MetricsServer
from tests.harness import START_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

    from gateway.telemetry.merging import Encode

LONG = 64 * 1024 * 1024
"""Bytes that no buffer of a connection holds."""


@asynccontextmanager
async def _serving(metrics: bytes = b"metrics") -> AsyncIterator[MetricsServer]:
    async def render(_: Encode) -> bytes:
        return metrics

    async def ready() -> tuple[bool, str]:
        return True, "ready"

    server = MetricsServer(render, ready, "127.0.0.1:0")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def test_whoever_reads_nothing_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "SHUTDOWN_S", 0.01)
    async with _serving(bytes(LONG)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n")
        await reader.readline()
        async with asyncio.timeout(START_TIMEOUT_S):
            await server.stop()
        writer.close()
