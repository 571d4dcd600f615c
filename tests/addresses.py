"""Hosts with several addresses, some of which lead nowhere."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest


@contextmanager
def swallowing(port: int) -> Iterator[str]:
    """An address of this machine where connections to a port are neither made nor refused."""
    with ExitStack() as stack:
        address = "127.0.0.2"
        full = stack.enter_context(socket.socket())
        full.bind((address, port))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect((address, port))
        yield address


@contextmanager
def resolving(host: str, *addresses: str) -> Iterator[None]:
    """A resolver that knows one host, and addresses."""
    resolve: Any = asyncio.get_running_loop().getaddrinfo

    async def getaddrinfo(asked: str, port: int, **how: Any) -> Any:
        if asked != host:
            return await resolve(asked, port, **{**how, "flags": socket.AI_NUMERICHOST})
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (address, port)) for address in addresses]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        yield
