"""A proxy between gateways and PostgreSQL that loses or holds back what a named statement answers.

It reads PostgreSQL's frontend/backend protocol 3.0 as far as it must: which statement a Bind
belongs to, and where the server says that a command is done. It runs in a thread of its own, so
that a test may block without holding up the gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

REACHED_TIMEOUT_S: Final = 60.0
"""A statement that was not run by then hangs."""

_LENGTH = struct.Struct("!I")


class Action(enum.Enum):
    """What happens to a statement."""

    LOSE_ANSWER = enum.auto()
    """The server runs it to its end, COMMIT included; then the connection is cut."""
    HOLD_ANSWER = enum.auto()
    """The server runs it to its end; its answer waits until it is released."""
    HOLD_STATEMENT = enum.auto()
    """It reaches the server only when it is released."""


class Interception:
    """What is to happen to the next runs of a statement."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, statement: str, action: Action, times: int
    ) -> None:
        self.statement = statement
        self.action = action
        self.left = times
        self._loop = loop
        self._reached = threading.Semaphore(0)
        self._released = asyncio.Event()

    async def reached(self) -> None:
        """Wait until a run of the statement is lost or held; each call waits for one more."""
        reached = await asyncio.to_thread(self._reached.acquire, timeout=REACHED_TIMEOUT_S)
        assert reached, f"nobody ran: {self.statement[:80]}"

    def release(self) -> None:
        """Let go on what is held, and hold no more."""
        self.left = 0
        self._loop.call_soon_threadsafe(self._released.set)

    def tell(self) -> None:
        """A run is lost or held now."""
        self._reached.release()

    async def wait(self) -> None:
        """Wait for the release, in the proxy's loop."""
        await self._released.wait()


class PostgresProxy:
    """The proxy; made by `postgres_proxy`."""

    def __init__(self, dsn: str) -> None:
        self._url = urlsplit(dsn)
        self._loop = asyncio.new_event_loop()
        self._interceptions: list[Interception] = []
        self._links: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="postgres-proxy")
        self._thread.start()
        assert self._listening.wait(REACHED_TIMEOUT_S)

    @property
    def dsn(self) -> str:
        """The database over the proxy."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        credentials = self._url.netloc.rpartition("@")[0]
        netloc = f"{credentials}@127.0.0.1:{port}"
        return urlunsplit(("postgresql", netloc, self._url.path, "sslmode=disable", ""))

    def intercept(self, statement: str, action: Action, times: int = 1) -> Interception:
        """Lose or hold the next runs of a statement, given by its exact text."""
        interception = Interception(self._loop, statement, action, times)
        self._interceptions.append(interception)
        return interception

    def close(self) -> None:
        """Cut every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        loop = self._loop
        self._server = loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0)
        )
        self._listening.set()
        try:
            loop.run_forever()
            loop.run_until_complete(self._stop())
        finally:
            loop.close()

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for link in list(self._links):
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by _stop alone
                await self._link(reader, writer)
        finally:
            self._links.discard(task)
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection(self._url.hostname, self._url.port)
        except OSError:
            return
        link = _Link(self, (reader, writer), server)
        directions = [asyncio.ensure_future(link.to_server()), asyncio.ensure_future(link.back())]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            server[1].transport.abort()

    def match(self, statement: str) -> Interception | None:
        """What is to happen to this run of a statement."""
        for interception in self._interceptions:
            if interception.left > 0 and interception.statement == statement:
                interception.left -= 1
                return interception
        return None


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One connection through the proxy. A lane runs one command at a time on it."""

    def __init__(self, proxy: PostgresProxy, client: _Streams, server: _Streams) -> None:
        self._proxy = proxy
        self._client, self._server = client, server
        self._statements: dict[bytes, str] = {}
        self._caught: Interception | None = None
        """What the command now under way has met."""

    async def to_server(self) -> None:
        """Forward what the gateway says."""
        reader, writer = self._client[0], self._server[1]
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            length = await reader.readexactly(4)  # the start-up message alone has no type
            writer.write(length + await reader.readexactly(_LENGTH.unpack(length)[0] - 4))
            while True:
                kind, message = await _read(reader)
                interception = self._look(kind, message[5:])
                if interception is not None:
                    self._caught = interception
                    if interception.action is Action.HOLD_STATEMENT:
                        interception.tell()
                        await interception.wait()
                        self._caught = None
                writer.write(message)

    def _look(self, kind: bytes, body: bytes) -> Interception | None:
        if kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            self._statements[name] = text.decode()
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            return self._proxy.match(self._statements.get(name, ""))
        elif kind == b"Q":
            return self._proxy.match(body.rstrip(b"\0").decode())
        return None

    async def back(self) -> None:
        """Forward what the server says, or what is due of it."""
        reader, writer = self._server[0], self._client[1]
        held = b""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                kind, message = await _read(reader)
                caught = self._caught
                if caught is None:
                    writer.write(message)
                    continue
                held += message
                if kind != b"Z":  # ReadyForQuery: the transaction of the command has ended
                    continue
                caught.tell()
                if caught.action is Action.LOSE_ANSWER:
                    return
                await caught.wait()
                self._caught = None
                writer.write(held)
                held = b""


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The type of the next message, and the message whole."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(_LENGTH.unpack(head[1:])[0] - 4)


@contextmanager
def postgres_proxy(dsn: str) -> Iterator[PostgresProxy]:
    """A proxy in front of a database, for as long as the context lasts."""
    proxy = PostgresProxy(dsn)
    try:
        yield proxy
    finally:
        proxy.close()
