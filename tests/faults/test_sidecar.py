"""The chart's side-car before a gateway on `native`: what one client does to another."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from storage.embedded import free_port
from tests.chaos.frames import (
    CANCEL,
    END_HEADERS,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    call_headers,
    frame,
)
from tests.envoys import CERTIFICATE, KEY, SERVICE, find_envoy, running_envoy, sidecar_config
from tests.harness import running_system

if TYPE_CHECKING:
    from pathlib import Path

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

RESETS: Final = 200
"""Of a connection, without a pause."""
CONNECTIONS: Final = 30
CALLERS: Final = 16


async def _reset_quickly(port: int) -> None:
    """Open streams and reset them at once, as CVE-2023-44487 has it."""
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    context.load_cert_chain(CERTIFICATE, KEY)
    context.set_alpn_protocols(["h2"])
    block = call_headers(f"/{SERVICE}/StreamAuthorizePayments", "no key", 1)
    for _ in range(CONNECTIONS):
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
        for stream in range(1, 2 * RESETS, 2):
            writer.write(frame(HEADERS, END_HEADERS, stream, block))
            writer.write(frame(RST_STREAM, 0, stream, CANCEL))
        try:
            await writer.drain()
            await reader.read(1)
        except OSError:
            pass  # it may take this for an attack
        finally:
            writer.transport.abort()


async def _call(stub: health_pb2_grpc.HealthStub, attack: asyncio.Future[None]) -> int:
    calls = 0
    while not attack.done():
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        calls += 1
    return calls


async def test_quick_resets_of_one_client_end_no_call_of_another(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    find_envoy()
    front, inner, admin = free_port(), free_port(), free_port()
    with ExitStack() as stack:
        system = stack.enter_context(running_system(postgres, redis))
        envoy = stack.enter_context(
            running_envoy(
                sidecar_config(front, inner, admin, tmp_path / "envoy"),
                f"localhost:{front}",
                admin,
                tmp_path / "envoy",
            )
        )
        gateway = system.start_gateway(
            transport="native", trusted_front=True, listen_address=f"127.0.0.1:{inner}"
        )
        await asyncio.gather(envoy.serving(), gateway.serving())
        credentials = grpc.ssl_channel_credentials(
            CERTIFICATE.read_bytes(), KEY.read_bytes(), CERTIFICATE.read_bytes()
        )
        async with grpc.aio.secure_channel(envoy.address, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            attack = asyncio.ensure_future(_reset_quickly(front))
            calls = await asyncio.gather(*(_call(stub, attack) for _ in range(CALLERS)))
            await attack
        assert min(calls) > 0
