"""A lean HTTP/1.1 client (RFC 9112) that always knows whether a request may have been sent.

General clients connect, wait for a slot and write inside one call, so that nobody can say *when*
the first byte left. Here the time `send_before` is compared directly before the system call that
writes, and every failure says on which side of that call it happened. Plain HTTP only: bodies with
Content-Length, no redirects, no pipelining, nothing sent again by itself.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

from gateway.domain.errors import Reason

HEAD_BYTES_MAX: Final = 16 * 1024
"""The largest head of an answer."""
STALE_CONNECTIONS_MAX: Final = 3
"""How many connections may prove closed before a request was written until it is given up."""


class NotSent(Exception):
    """Not a byte of the request was written."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class MaybeSent(Exception):
    """The request may have been processed, and there is no usable answer."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a client; each has its own name."""

    connections_max: int = 512
    waiters_max: int = 8192
    """How many requests may wait for a free connection."""
    connect_timeout_s: float = 2.0
    idle_s_max: float = 15.0
    """A connection idle for longer is not used again: the other side may be closing it."""
    body_bytes_max: int = 256 * 1024
    """The largest body of an answer."""


class HttpClient:
    """Requests to one `http://host:port`, over a bounded pool of kept connections."""

    def __init__(
        self,
        base_url: str,
        limits: Limits | None = None,
        more_headers: Callable[[], str] | None = None,
    ) -> None:
        """Connects to nothing yet. Raises ValueError for anything but http://host[:port].

        `more_headers` gives further lines of a request's head, each ended by CR LF.
        """
        url = urlsplit(base_url)
        if url.scheme != "http" or not url.hostname or url.path.strip("/") or url.query:
            raise ValueError("the URL must be http://host:port")
        self._limits = limits or Limits()
        self._more_headers = more_headers
        self._host = url.hostname
        self._port = url.port or 80
        self._host_header = url.netloc.rpartition("@")[2]
        self._idle: dict[_Connection, None] = {}
        self._open: set[_Connection] = set()
        self._connecting = 0
        self._waiters: deque[asyncio.Future[_Connection | None]] = deque()
        self._closed = False

    async def request(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        send_before: float,
        answer_timeout_s: float,
        answer_before: float = math.inf,
    ) -> Response:
        """Send one request and wait for its answer at most `answer_timeout_s` from then.

        `send_before` is a time of `time.monotonic()`: at or past it nothing is written.
        `answer_before` is one as well: past it no answer is waited for. Raises
        NotSent (CONNECT_FAILED, CONNECTOR_BUSY, SEND_WINDOW_PASSED) and MaybeSent
        (ANSWER_TIMED_OUT, CONNECTION_LOST, ANSWER_UNUSABLE).
        """
        more = "" if self._more_headers is None else self._more_headers()
        request = (
            f"{method} {target} HTTP/1.1\r\nHost: {self._host_header}\r\n{more}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode("ascii") + body
        for _ in range(STALE_CONNECTIONS_MAX):
            connection = await self._acquire(send_before)
            if connection.closed:
                continue
            # No await may stand between this comparison and the write.
            now = time.monotonic()
            if now >= send_before:
                self._release(connection)
                raise NotSent(Reason.SEND_WINDOW_PASSED)
            answer = connection.write(request)
            if answer is not None:
                wait_s = min(answer_timeout_s, answer_before - now)
                return await self._answer(connection, answer, wait_s)
            # Nothing was written, so another connection may be tried (RFC 9112 §9.3.1).
            connection.abort()
        raise NotSent(Reason.CONNECT_FAILED)

    async def _answer(
        self,
        connection: "_Connection",
        answer: "asyncio.Future[Response]",
        wait_s: float,
    ) -> Response:
        timer = asyncio.get_running_loop().call_later(
            wait_s, connection.fail, Reason.ANSWER_TIMED_OUT
        )
        try:
            return await answer
        finally:
            timer.cancel()
            # After a failure, a cancellation too, the connection may still bring the old answer.
            if connection.reusable:
                self._release(connection)
            else:
                connection.abort()

    async def close(self) -> None:
        """Close every connection; requests still under way end as lost."""
        self._closed = True
        for connection in list(self._open):
            connection.fail(Reason.CONNECTION_LOST)
            connection.abort()
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(NotSent(Reason.CONNECTOR_BUSY))
        # One turn of the loop lets the transports go.
        await asyncio.sleep(0)

    # --- the pool ---------------------------------------------------------------------------------

    async def _acquire(self, send_before: float) -> "_Connection":
        if self._closed:
            raise NotSent(Reason.CONNECTOR_BUSY)
        if (connection := self._pop_idle()) is not None:
            return connection
        if len(self._open) + self._connecting < self._limits.connections_max:
            return await self._connect(send_before)
        if len(self._waiters) >= self._limits.waiters_max:
            raise NotSent(Reason.CONNECTOR_BUSY)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[_Connection | None] = loop.create_future()
        timer = loop.call_later(max(0.0, send_before - time.monotonic()), _give_up, waiter)
        self._waiters.append(waiter)
        try:
            handed = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # It was served and cancelled in the same turn: the place goes to the next one.
                given = waiter.result()
                if given is None:
                    self._connecting -= 1
                    self._place_free()
                else:
                    self._release(given)
            raise
        finally:
            timer.cancel()
        if handed is not None:
            return handed
        self._connecting -= 1  # the place that was kept for this waiter
        return await self._connect(send_before)

    def _pop_idle(self) -> "_Connection | None":
        oldest = time.monotonic() - self._limits.idle_s_max
        while self._idle:
            # The one that was used last: the others age and are let go.
            connection, _ = self._idle.popitem()
            if connection.idle_since >= oldest and not connection.closed:
                return connection
            connection.abort()
        return None

    async def _connect(self, send_before: float) -> "_Connection":
        budget_s = send_before - time.monotonic()
        if budget_s <= 0:
            self._place_free()
            raise NotSent(Reason.SEND_WINDOW_PASSED)
        self._connecting += 1
        try:
            async with asyncio.timeout(min(self._limits.connect_timeout_s, budget_s)):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self, self._limits.body_bytes_max), self._host, self._port
                )
        except (OSError, TimeoutError) as error:
            raise NotSent(Reason.CONNECT_FAILED) from error
        finally:
            self._connecting -= 1
            # The connection, if there is one, is in _open since connection_made.
            self._place_free()
        if self._closed:
            connection.abort()
        return connection

    def _release(self, connection: "_Connection") -> None:
        """A connection is free again: for the waiter longest in line, or for the next request."""
        if connection.closed or self._closed:
            connection.abort()
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        connection.idle_since = time.monotonic()
        self._idle[connection] = None

    def opened(self, connection: "_Connection") -> None:
        """Called by a connection that is made."""
        self._open.add(connection)

    def lost(self, connection: "_Connection") -> None:
        """Called by a connection that is gone."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._place_free()

    def _place_free(self) -> None:
        """Where there is room for one more connection, a waiter may make it."""
        while self._waiters and len(self._open) + self._connecting < self._limits.connections_max:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._connecting += 1
                waiter.set_result(None)


def _give_up(waiter: "asyncio.Future[_Connection | None]") -> None:
    if not waiter.done():
        waiter.set_exception(NotSent(Reason.CONNECTOR_BUSY))


class _Connection(asyncio.Protocol):
    """One connection: at most one request under way."""

    def __init__(self, client: HttpClient, body_bytes_max: int) -> None:
        self._client = client
        self._body_bytes_max = body_bytes_max
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._answer: asyncio.Future[Response] | None = None
        self._buffer = bytearray()
        self._status = 0
        self._body_at = 0
        self._whole = 0
        """The length of the whole answer once its head is read, otherwise 0."""
        self._keep = True
        self.closed = False
        self.reusable = False
        self.idle_since = 0.0

    # --- what the client does ---------------------------------------------------------------------

    def write(self, request: bytes) -> "asyncio.Future[Response] | None":
        """Write now, by the system call itself; None: the other side is gone, no byte was taken.

        Transports may keep a write for a later moment of the loop's turn (uvloop's do).
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return None
        self._answer = asyncio.get_running_loop().create_future()
        self._buffer.clear()
        self._whole = 0
        self.reusable = False
        try:
            written = os.write(self._fd, request)
        except BlockingIOError:
            written = 0
        except OSError:
            self._answer = None
            return None
        if written < len(request):
            transport.write(request[written:])
        return self._answer

    def fail(self, reason: Reason) -> None:
        """End the request under way, if there is one, without an answer."""
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(MaybeSent(reason))

    def abort(self) -> None:
        """Close at once."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # --- what the event loop calls ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._fd = transport.get_extra_info("socket").fileno()
        self._client.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        self.closed = True
        self.reusable = False
        self.fail(Reason.CONNECTION_LOST)
        self._client.lost(self)

    def eof_received(self) -> bool:
        self.closed = True
        return False

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            # Bytes that nobody asked for: what follows could be taken for another answer.
            self.abort()
            return
        self._buffer += data
        if not self._whole and not self._read_head():
            return
        if len(self._buffer) < self._whole:
            return
        answer, self._answer = self._answer, None
        self.reusable = self._keep and len(self._buffer) == self._whole
        if not answer.done():
            answer.set_result(Response(self._status, bytes(self._buffer[self._body_at :])))

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                self.fail(Reason.ANSWER_UNUSABLE)
            return False
        head = _parse_head(bytes(self._buffer[:end]))
        if head is None or end > HEAD_BYTES_MAX or head[1] > self._body_bytes_max:
            self.fail(Reason.ANSWER_UNUSABLE)
            return False
        self._status, length, self._keep = head
        self._body_at = end + 4
        self._whole = self._body_at + length
        return True


def _parse_head(head: bytes) -> tuple[int, int, bool] | None:
    """Status, length of the body in bytes, and whether the connection is kept. None: unusable."""
    lines = head.decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    status = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not _is_number(status) or status < "200":
        return None
    length = -1
    keep = version == "HTTP/1.1"
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if name == "content-length":
            # Two lengths, or a length and a coding, are how answers get confused (RFC 9112 §6.3).
            if length >= 0 or not _is_number(value):
                return None
            length = int(value)
        elif name == "transfer-encoding":
            return None
        elif name == "connection":
            keep = keep and value.lower() != "close"
    return None if length < 0 else (int(status), length, keep)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
