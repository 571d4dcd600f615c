"""Gateways with several workers: what they log, their metrics, and callers spread over them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import grpc
from payments.v1 import payment_pb2

from tests.harness import Caller, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.harness import GatewayProcess

SUCCEEDED: Final = payment_pb2.OPERATION_STATE_SUCCEEDED
CHANNELS: Final = 12
"""Connections; with so many, the chance that all of them get the same one of two workers is 1 in
2,048, and then a test opens more."""
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
