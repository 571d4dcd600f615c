"""gateway.telemetry.http: the port for metrics and probes, whoever asks there and however."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from gateway.telemetry import http
from gateway.telemetry.http import MetricsServer
from tests.harness import START_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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


async def _answer(server: MetricsServer, request: bytes) -> bytes:
    """All that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(request)
        async with asyncio.timeout(START_TIMEOUT_S):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics", b"200"),
        ("GET /livez", b"200"),
        ("HEAD /readyz", b"200"),
        ("GET /", b"404"),
        ("POST /metrics", b"405"),
    ],
)
async def test_only_what_there_is_can_be_read(request_line: str, status: bytes) -> None:
    head = f"{request_line} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n"
    async with _serving() as server:
        answer = await _answer(server, head.encode())
    assert answer.split()[1] == status


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /metrics HTTP/1.1\r\nHost: gateway\r\nno header\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: gateway\r\nno: " + b"header" * 2000 + b"\r\n\r\n",
        b"no header",
    ],
    ids=["no header", "a long header", "no request"],
)
async def test_what_is_no_http_is_neither_logged_nor_sent_back(
    request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with _serving() as server:
        answer = await _answer(server, request_ + b"\r\n\r\n")
    assert answer.split()[1] == b"400"
    assert b"header" not in answer
    assert not caplog.records


@pytest.mark.parametrize("version", ["", "beta", '"1.0.0"', "\u00b2", "\t1.0.0", "1..0"])
async def test_a_version_that_is_no_number_is_answered_in_plain_text(version: str) -> None:
    accept = f"Accept: application/openmetrics-text;version={version}\r\n"
    head = f"GET /metrics HTTP/1.1\r\nHost: gateway\r\n{accept}Connection: close\r\n\r\n"
    async with _serving() as server:
        answer = await _answer(server, head.encode())
    assert answer.split()[1] == b"200"
    assert b"Content-Type: text/plain" in answer


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


async def test_one_connection_too_many_closes_the_oldest_and_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 3)
    head = b"GET /livez HTTP/1.1\r\nHost: gateway\r\n\r\n"
    async with _serving() as server, asyncio.timeout(START_TIMEOUT_S):
        opened = []
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head)
            assert b"200" in await reader.readline()
            opened.append((reader, writer))
        for reader, _ in opened[:2]:
            await reader.read()  # to its end
        for reader, writer in opened[2:]:
            writer.write(head)
            await reader.readuntil(b"alive\n")
            assert b"200" in await reader.readline()
        for _, writer in opened:
            writer.close()
