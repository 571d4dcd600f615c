"""A TCP proxy that does to connections what networks do: cut, swallow, hold back, slow down.

It forwards bytes and knows no protocol. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES_MAX: Final = 64 * 1024
DELAY_S: Final = 0.08
"""What `DELAY` adds to each piece, in each direction."""
THROTTLE_BYTES_PER_S: Final = 50_000

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER on, zero seconds: closing sends RST."""

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Fault(enum.Enum):
    """What happens to connections through the proxy."""

    RESET = "reset"
    """All are reset, and so is every new one."""
    DROP = "drop"
    """A black hole: nothing arrives, in neither direction, until TCP repeats it afterwards."""
    DROP_REQUESTS = "drop-requests"
    """The same towards the server only."""
    DROP_ANSWERS = "drop-answers"
    """The same towards the client only: what was asked is done, and nobody hears of it."""
    HALF_OPEN = "half-open"
    """The server's ends are gone and the clients are not told, until they are reset at the end."""
    DELAY = "delay"
    """Every piece is late."""
    THROTTLE = "throttle"
    """A slow line."""
    DUPLICATE = "duplicate"
    """Every piece towards the client comes twice: where a piece is an answer, two answers."""


_HELD: Final = {
    Fault.DROP: (True, True),
    Fault.DROP_REQUESTS: (True, False),
    Fault.DROP_ANSWERS: (False, True),
}
"""Whether a fault holds back what goes to the server, and to the client."""


class TcpProxy:
    """A proxy in front of one address on 127.0.0.1."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._fault: Fault | None = None
        self._flows = (asyncio.Event(), asyncio.Event())
        self._links: dict[asyncio.Task[None], tuple[Callable[[], None], Callable[[], None]]] = {}
        self._server: asyncio.Server | None = None
        for flow in self._flows:
            flow.set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def strike(self, fault: Fault) -> None:
        """Let a fault begin; the one before ends."""
        await self.heal()
        self._fault = fault
        for flow, held in zip(self._flows, _HELD.get(fault, (False, False)), strict=True):
            if held:
                flow.clear()
        for reset_client, reset_server in list(self._links.values()):
            if fault is Fault.RESET:
                reset_client()
            if fault in (Fault.RESET, Fault.HALF_OPEN):
                reset_server()

    async def heal(self) -> None:
        """Let connections be as they should."""
        fault, self._fault = self._fault, None
        for flow in self._flows:
            flow.set()
        if fault is Fault.HALF_OPEN:
            for reset_client, _ in list(self._links.values()):
                reset_client()

    async def close(self) -> None:
        """Cut every connection, and listen no more."""
        if self._server is not None:
            self._server.close()
        for task in list(self._links):
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._fault is Fault.RESET:
            _reset(writer)
            return
        # Even of a half-open connection the client must be reset when the fault ends.
        self._links[task] = (lambda: _reset(writer), lambda: None)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by `close` alone
                await self._link(task, (reader, writer))
        finally:
            del self._links[task]
            writer.transport.abort()

    async def _link(self, task: asyncio.Task[None], client: _Streams) -> None:
        if self._is_half_open():
            await _swallow(client[0])
            return
        try:
            server = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(client[1])
            return
        self._links[task] = (lambda: _reset(client[1]), lambda: _reset(server[1]))
        to_server = asyncio.ensure_future(self._forward(client[0], server[1], 0))
        back = asyncio.ensure_future(self._forward(server[0], client[1], 1))
        try:
            await asyncio.wait([to_server, back], return_when=asyncio.FIRST_COMPLETED)
            if self._is_half_open() and not client[0].at_eof():
                to_server.cancel()
                await asyncio.gather(to_server, return_exceptions=True)
                await _swallow(client[0])
        finally:
            for direction in (to_server, back):
                direction.cancel()
            await asyncio.gather(to_server, back, return_exceptions=True)
            server[1].transport.abort()

    def _is_half_open(self) -> bool:
        return self._fault is Fault.HALF_OPEN

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: int
    ) -> None:
        """One direction, 0 to the server and 1 to the client, until one of the two ends."""
        flow = self._flows[direction]
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES_MAX):
                if self._fault is Fault.DELAY:
                    await asyncio.sleep(DELAY_S)
                elif self._fault is Fault.THROTTLE:
                    await asyncio.sleep(len(data) / THROTTLE_BYTES_PER_S)
                await flow.wait()
                if self._fault is Fault.DUPLICATE and direction == 1:
                    data *= 2
                writer.write(data)
                await writer.drain()
            # The end of a connection does not arrive either.
            await flow.wait()


async def _swallow(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(READ_BYTES_MAX):
            pass


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()
