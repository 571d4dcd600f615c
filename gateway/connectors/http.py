"""A lean HTTP/1.1 client (RFC 9112) that always knows whether a request may have been sent.

General clients connect, wait for a slot and write inside one call, so that nobody can say *when*
the first byte left. Here the time `send_before` is compared directly before the system call that
writes, and every failure says on which side of that call it happened. TLS runs in memory for the
same reason: a request is encrypted first, then the time is compared, then it is written. No
redirects, no pipelining, nothing sent again by itself.
"""

import asyncio
import logging
import math
import os
import re
import ssl
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Final, NamedTuple, cast
from urllib.parse import SplitResult, unquote, urlsplit

from gateway.connectors.reaching import reach
from gateway.domain.errors import Reason

HEAD_BYTES_MAX: Final = 16 * 1024
"""The largest head of an answer, and of the trailer of a chunked one."""
CHUNK_LINE_BYTES_MAX: Final = 256
"""The longest line that gives the size of a chunk, its extensions included."""
STALE_CONNECTIONS_MAX: Final = 3
"""How many connections may prove closed before a request was written until it is given up."""
KEEP_ALIVE_MARGIN_S: Final = 1.0
"""How long before the end that the other side announces a connection is no longer used."""
TLS_WARNING_INTERVAL_S: Final = 60.0
"""A client warns of a failing TLS handshake no more often than this."""
TLS_READ_BYTES: Final = 64 * 1024

JSON: Final = "application/json"
FORM: Final = "application/x-www-form-urlencoded"

_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
# RFC 9110 §5.5 and §5.6.2: nothing in a header may end its line.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?")
_TARGET = re.compile(r"/[\x21-\x7e]*")
# RFC 9110 §15.2: passed over, but for an offer of another protocol.
_INTERIM = re.compile(rb"HTTP/1\.1 1(?!01)[0-9]{2}[ \r]")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")
_KEEP_ALIVE_S = re.compile(r"(?:^|[,;\s])timeout=([0-9]{1,6})", re.IGNORECASE)

_log = logging.getLogger(__name__)


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
    headers: Mapping[str, str] = field(default_factory=dict)
    """By lower-case name; several of one name are joined by ", "."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a client; each has its own name."""

    connections_max: int = 512
    waiters_max: int = 8192
    """How many requests may wait for a free connection."""
    connect_timeout_s: float = 2.0
    """With the proxy's answer and the TLS handshake."""
    idle_s_max: float = 15.0
    """A connection idle for longer is not used again: the other side may be closing it."""
    body_bytes_max: int = 256 * 1024
    """The largest body of an answer, its chunks put together."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How a connection comes to speak HTTP with the other side."""

    tls: ssl.SSLContext | None
    server_name: str
    tunnel: bytes
    """The CONNECT request to a proxy; empty without one."""


class HttpClient:
    """Requests to one http:// or https:// host, over a bounded pool of kept connections."""

    def __init__(
        self,
        base_url: str,
        limits: Limits | None = None,
        more_headers: Callable[[], str] | None = None,
        *,
        ca_file: str = "",
        proxy_url: str = "",
    ) -> None:
        """Connects to nothing yet.

        `more_headers` gives further lines of a request's head, each ended by CR LF.

        The certificate of an https host must be valid for its name and come from a CA of `ca_file`
        (PEM), by default of the system. `proxy_url`, `http://[user:password@]host[:port]`, is asked
        to CONNECT; it sees nothing of what is said. Raises ValueError for another URL, and OSError
        for a CA file that cannot be read.
        """
        url, port = _split(base_url)
        if (
            url.scheme not in ("http", "https")
            or not url.hostname
            or port is None
            or url.path.strip("/")
            or url.query
            or url.fragment
            or "@" in url.netloc
        ):
            raise ValueError("the URL must be http://host:port or https://host:port")
        self._limits = limits or Limits()
        self._more_headers = more_headers
        self._host = url.hostname
        self._port = port or (443 if url.scheme == "https" else 80)
        self._host_header = url.netloc
        self._way = _Way(_tls_context(ca_file) if url.scheme == "https" else None, self._host, b"")
        self._peer = (self._host, self._port)
        if proxy_url:
            if url.scheme != "https":
                raise ValueError("a proxy serves https:// addresses only")
            self._peer, tunnel = _proxy(proxy_url, self._host, self._port)
            self._way = _Way(self._way.tls, self._host, tunnel)
        self._idle: dict[_Connection, None] = {}
        self._open: set[_Connection] = set()
        self._connecting = 0
        self._waiters: deque[asyncio.Future[_Connection | None]] = deque()
        self._closed = False
        self._warned_at = -math.inf

    async def request(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        send_before: float,
        answer_timeout_s: float,
        answer_before: float = math.inf,
        headers: Mapping[str, str] = _NO_HEADERS,
        content_type: str = JSON,
    ) -> Response:
        """Send one request and wait for its answer at most `answer_timeout_s` from then.

        `send_before` is a time of `time.monotonic()`: at or past it nothing is written.
        `answer_before` is one as well: past it no answer is waited for. Raises
        NotSent (CONNECT_FAILED, CONNECTOR_BUSY, SEND_WINDOW_PASSED) and MaybeSent
        (ANSWER_TIMED_OUT, CONNECTION_LOST, ANSWER_UNUSABLE), and ValueError for a header or a
        target that would not stay one line.
        """
        if _TARGET.fullmatch(target) is None:
            raise ValueError("the target is no path")
        more = "" if self._more_headers is None else self._more_headers()
        request = (
            f"{method} {target} HTTP/1.1\r\nHost: {self._host_header}\r\n{more}"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            f"{_header_lines(headers) if headers else ''}\r\n"
        ).encode("ascii") + body
        for _ in range(STALE_CONNECTIONS_MAX):
            connection = await self._acquire(send_before)
            if connection.closed:
                continue
            wire = connection.encode(request)
            # No await may stand between this comparison and the write.
            now = time.monotonic()
            if now >= send_before:
                if connection.encrypted:
                    connection.abort()  # what is encrypted counts as sent in its sequence
                else:
                    self._release(connection)
                raise NotSent(Reason.SEND_WINDOW_PASSED)
            answer = connection.write(wire)
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
        now = time.monotonic()
        while self._idle:
            # The one that was used last: the others age and are let go.
            connection, _ = self._idle.popitem()
            if now <= connection.idle_until and not connection.closed:
                return connection
            connection.abort()
        return None

    async def _connect(self, send_before: float) -> "_Connection":
        budget_s = send_before - time.monotonic()
        if budget_s <= 0:
            self._place_free()
            raise NotSent(Reason.SEND_WINDOW_PASSED)
        self._connecting += 1
        connection = _Connection(self, self._limits.body_bytes_max, self._way)
        try:
            async with asyncio.timeout(min(self._limits.connect_timeout_s, budget_s)):
                await reach(lambda: connection, *self._peer)
                await connection.ready
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            connection.abort()
            self._warn(error)
            raise NotSent(Reason.CONNECT_FAILED) from error
        except asyncio.CancelledError:
            connection.abort()
            raise
        finally:
            if not connection.made:
                self._connecting -= 1
                self._place_free()
            elif connection.closed:
                # Given up in the turn of the loop that made it, it is not told its end by uvloop.
                self.lost(connection)
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
        connection.idle_until = time.monotonic() + min(
            self._limits.idle_s_max, connection.keep_alive_s
        )
        self._idle[connection] = None

    def _warn(self, error: Exception) -> None:
        """Say why a host is not trusted, or a proxy refuses: nothing else would tell."""
        now = time.monotonic()
        if isinstance(error, (ssl.SSLError, ProxyRefused)) and (
            now >= self._warned_at + TLS_WARNING_INTERVAL_S
        ):
            self._warned_at = now
            _log.warning("no connection to %s: %s", self._host_header, error)

    def opened(self, connection: "_Connection") -> None:
        """Called by a connection that is made, which has its place among the open ones from now on,
        also while it asks a proxy and shakes hands.
        """
        self._connecting -= 1
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


class ProxyRefused(OSError):
    """The proxy does not connect to the host."""


class _Unusable(Exception):
    """The answer breaks a rule of HTTP, or a limit."""


class _Connection(asyncio.Protocol):
    """One connection: at most one request under way."""

    def __init__(self, client: HttpClient, body_bytes_max: int, way: _Way) -> None:
        self._client = client
        self._body_bytes_max = body_bytes_max
        self._way = way
        self._tunnelling = bool(way.tunnel)
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._tls: ssl.SSLObject | None = None
        self._cipher_in = ssl.MemoryBIO()
        self._cipher_out = ssl.MemoryBIO()
        self._answer: asyncio.Future[Response] | None = None
        self._buffer = bytearray()
        self._head: _Head | None = None
        self._body_at = 0
        self._whole = 0
        """The length of the whole answer once its head is read, otherwise 0."""
        self._chunks: _Chunks | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when requests can be written; it fails with an OSError."""
        self.closed = False
        self.reusable = False
        self.keep_alive_s = math.inf
        """For how long the other side keeps the connection while idle, by what it last said."""
        self.idle_until = 0.0

    # --- what the client does ---------------------------------------------------------------------

    @property
    def made(self) -> bool:
        """Whether it was ever open."""
        return self._transport is not None

    @property
    def encrypted(self) -> bool:
        """Whether the connection speaks TLS."""
        return self._tls is not None

    def encode(self, request: bytes) -> bytes:
        """The request as it goes onto the wire; with TLS, it must be written or never followed."""
        if self._tls is None:
            return request
        try:
            self._tls.write(request)
        except ssl.SSLError:
            self.abort()
            return b""
        return self._cipher_out.read()

    def write(self, wire: bytes) -> "asyncio.Future[Response] | None":
        """Write now, by the system call itself; None: the other side is gone, no byte was taken.

        Transports may keep a write for a later moment of the loop's turn (uvloop's do).
        """
        transport = self._transport
        if transport is None or transport.is_closing() or self.closed:
            return None
        self._answer = asyncio.get_running_loop().create_future()
        self._buffer.clear()
        self._head = None
        self._chunks = None
        self._whole = 0
        self.reusable = False
        try:
            written = os.write(self._fd, wire)
        except BlockingIOError:
            written = 0
        except OSError:
            self._answer = None
            return None
        if written < len(wire):
            transport.write(wire[written:])
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
        if self.closed:  # given up meanwhile
            self._transport.abort()
        elif self._tunnelling:
            self._transport.write(self._way.tunnel)
        else:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        self.closed = True
        self.reusable = False
        if not self.ready.done():
            self._not_ready(ConnectionError("closed before it could be used"))
        self.fail(Reason.CONNECTION_LOST)
        self._client.lost(self)

    def eof_received(self) -> bool:
        self.closed = True
        if self._tls is None:  # where TLS ends it says so before
            self._end()
        return False

    def data_received(self, data: bytes) -> None:
        if self._tunnelling:
            self._read_tunnel(data)
        elif self._tls is not None:
            self._decrypt(self._tls, data)
        else:
            self._read(data)

    # --- the way to HTTP --------------------------------------------------------------------------

    def _begin(self) -> None:
        """The other side can be spoken to: greet it in TLS, or go on at once."""
        if self._way.tls is None:
            self.ready.set_result(None)
            return
        self._tls = self._way.tls.wrap_bio(
            self._cipher_in, self._cipher_out, server_hostname=self._way.server_name
        )
        self._shake_hands(self._tls)

    def _not_ready(self, error: OSError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # looked at: whoever waited may have given up
        self.abort()

    def _read_tunnel(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 and len(self._buffer) <= HEAD_BYTES_MAX:
            return
        # Nothing may follow: the host speaks only when it is spoken to.
        line = bytes(self._buffer[: self._buffer.find(b"\r\n")])
        if end != len(self._buffer) - 4 or re.match(rb"HTTP/1\.[01] 2[0-9][0-9]\b", line) is None:
            self._not_ready(ProxyRefused("the proxy does not connect"))
            return
        self._tunnelling = False
        self._buffer.clear()
        self._begin()

    def _shake_hands(self, tls: ssl.SSLObject) -> None:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # the alert
            self._not_ready(error)
        else:
            self._flush()
            self.ready.set_result(None)

    def _flush(self) -> None:
        """Write what TLS itself has to say."""
        if self._transport is not None and self._cipher_out.pending:
            self._transport.write(self._cipher_out.read())

    def _decrypt(self, tls: ssl.SSLObject, data: bytes) -> None:
        self._cipher_in.write(data)
        if not self.ready.done():
            self._shake_hands(tls)
        if not self.ready.done() or self.closed:
            return
        ended = farewell = False
        plain = bytearray()
        try:
            while part := tls.read(TLS_READ_BYTES):
                plain += part
            ended = farewell = True
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError:  # bytes that are none of the other side's
            ended = True
        if ended:
            self.closed = True
        if plain:
            self._read(bytes(plain))
        if farewell:
            self._end()
        if ended:
            self.abort()

    # --- answers ----------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        if self._answer is None:
            # Bytes that nobody asked for: what follows could be taken for another answer.
            self.abort()
            return
        try:
            response = self._parse(data)
        except _Unusable:
            self.fail(Reason.ANSWER_UNUSABLE)
            return
        if response is not None:
            self._done(response)

    def _end(self) -> None:
        """The other side says nothing more: an answer that had but to end is whole."""
        head = self._head
        if self._answer is not None and head is not None and head.length == _TO_THE_END:
            self._done(Response(head.status, bytes(self._buffer[self._body_at :]), head.headers))

    def _done(self, response: Response) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(response)

    def _parse(self, data: bytes) -> Response | None:
        """The answer, once it is whole."""
        if self._chunks is not None and self._head is not None:
            return self._finish_chunked(self._head, self._chunks, data)
        self._buffer += data
        head = self._head
        if head is None:
            head = self._read_head()
            if head is None:
                return None
            if head.length == _CHUNKED:
                self._chunks = _Chunks(self._body_bytes_max)
                return self._finish_chunked(
                    head, self._chunks, bytes(self._buffer[self._body_at :])
                )
        if head.length == _TO_THE_END:
            if len(self._buffer) - self._body_at > self._body_bytes_max:
                raise _Unusable
            return None
        if len(self._buffer) < self._whole:
            return None
        self.reusable = head.keep and len(self._buffer) == self._whole and self._is_quiet()
        return Response(head.status, bytes(self._buffer[self._body_at : self._whole]), head.headers)

    def _finish_chunked(self, head: "_Head", chunks: "_Chunks", data: bytes) -> Response | None:
        if not chunks.feed(data):
            return None
        self.reusable = head.keep and not chunks.surplus and self._is_quiet()
        return Response(head.status, bytes(chunks.body), head.headers)

    def _is_quiet(self) -> bool:
        """Whether it is open and all that was to be written is: who answers before it has read the
        whole request would find the next one in the midst of it.
        """
        transport = self._transport
        return transport is not None and not self.closed and transport.get_write_buffer_size() == 0

    def _read_head(self) -> "_Head | None":
        end = self._buffer.find(b"\r\n\r\n")
        while 0 <= end <= HEAD_BYTES_MAX and _INTERIM.match(self._buffer):
            del self._buffer[: end + 4]
            end = self._buffer.find(b"\r\n\r\n")
        if max(end, 0) > HEAD_BYTES_MAX or (end < 0 and len(self._buffer) > HEAD_BYTES_MAX):
            raise _Unusable
        if end < 0:
            return None
        head = _parse_head(bytes(self._buffer[:end]))
        if head is None or head.length > self._body_bytes_max:
            raise _Unusable
        self._head = head
        self._body_at = end + 4
        self._whole = self._body_at + max(head.length, 0)
        self.keep_alive_s = head.keep_alive_s
        return head


_CHUNKED: Final = -1
_TO_THE_END: Final = -2
"""The body ends with the connection (RFC 9112 §6.3, the last rule). A body that was cut off is no
JSON, and in TLS the end is signed."""


class _Head(NamedTuple):
    """The head of an answer."""

    status: int
    length: int
    """Of the body, in bytes, or one of the two below 0."""
    keep: bool
    """Whether the connection is kept."""
    keep_alive_s: float
    headers: Mapping[str, str]


def _parse_head(head: bytes) -> _Head | None:
    """None: unusable."""
    lines = head.decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    status = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not _is_number(status) or status < "200":
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if not colon or _HEADER_NAME.fullmatch(name) is None:
            return None
        # Two lengths, or a length and a coding, are how answers get confused (RFC 9112 §6.3).
        if name in headers and name in ("content-length", "transfer-encoding"):
            return None
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    length = _body_length(headers, version)
    if length is None:
        return None
    tokens = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    match = _KEEP_ALIVE_S.search(headers.get("keep-alive", ""))
    return _Head(
        int(status),
        0 if status in ("204", "304") else length,
        version == "HTTP/1.1" and "close" not in tokens and length != _TO_THE_END,
        math.inf if match is None else max(0.0, int(match[1]) - KEEP_ALIVE_MARGIN_S),
        headers,
    )


def _body_length(headers: Mapping[str, str], version: str) -> int | None:
    """None: told in another way than the client knows."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        usable = coding.lower() == "chunked" and length is None and version == "HTTP/1.1"
        return _CHUNKED if usable else None
    if length is None:
        return _TO_THE_END
    return int(length) if _is_number(length) else None


class _Chunks:
    """Puts the chunks of a body together (RFC 9112 §7.1). Raises _Unusable."""

    def __init__(self, body_bytes_max: int) -> None:
        self.body = bytearray()
        self._body_bytes_max = body_bytes_max
        self._buffer = bytearray()
        self._size = 0
        """Of the chunk whose bytes come next; 0: the line with its size comes next."""
        self._trailer_bytes = -1
        """What was read of the trailer; -1: it has not begun."""

    @property
    def surplus(self) -> bool:
        """Whether bytes came that are not the answer's."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> bool:
        """Whether the body is whole now."""
        self._buffer += data
        while self._trailer_bytes < 0:
            if not (self._take_chunk() if self._size else self._take_size()):
                return False
        return self._skip_trailer()

    def _take_line(self, bytes_max: int) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end > bytes_max or (end < 0 and len(self._buffer) > bytes_max):
            raise _Unusable
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _take_size(self) -> bool:
        line = self._take_line(CHUNK_LINE_BYTES_MAX)
        if line is None:
            return False
        digits = line.partition(b";")[0].rstrip(b" \t")
        if _CHUNK_SIZE.fullmatch(digits) is None:
            raise _Unusable
        self._size = int(digits, 16)
        if len(self.body) + self._size > self._body_bytes_max:
            raise _Unusable
        if not self._size:
            self._trailer_bytes = 0
        return True

    def _take_chunk(self) -> bool:
        size = self._size
        if len(self._buffer) < size + 2:
            return False
        if self._buffer[size : size + 2] != b"\r\n":
            raise _Unusable
        self.body += self._buffer[:size]
        del self._buffer[: size + 2]
        self._size = 0
        return True

    def _skip_trailer(self) -> bool:
        while (line := self._take_line(HEAD_BYTES_MAX - self._trailer_bytes)) is not None:
            if not line:
                return True
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > HEAD_BYTES_MAX:
                raise _Unusable
        return False


def _header_lines(headers: Mapping[str, str]) -> str:
    for name, value in headers.items():
        if _HEADER_NAME.fullmatch(name) is None or _HEADER_VALUE.fullmatch(value) is None:
            raise ValueError(f"the header {name!r} is not one printable line")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _tls_context(ca_file: str) -> ssl.SSLContext:
    """Verifies the chain and the name; TLS 1.2 or newer."""
    return _new_tls_context(ca_file) if ca_file else public_tls_context()


@cache
def public_tls_context() -> ssl.SSLContext:
    """That of all who trust the system's authorities: to read them takes 20 ms of a processor."""
    return _new_tls_context("")


def _new_tls_context(ca_file: str) -> ssl.SSLContext:
    context = verifying_context(ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


def verifying_context(ca_file: str) -> ssl.SSLContext:
    """Verifies the chain, by `ca_file` or else the system's authorities, and the name; TLS 1.2 or
    newer. Raises OSError, which names the file.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # ssl.SSLError is one
        raise OSError(error.errno, error.strerror, ca_file) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _split(url: str) -> tuple[SplitResult, int | None]:
    """A URL and its port: 0 where it has none, None for one that is none.

    The error of the standard library is not passed on: it shows what may be a part of a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return urlsplit(""), None
    return parts, port or 0


def _proxy(proxy_url: str, host: str, port: int) -> tuple[tuple[str, int], bytes]:
    """The proxy's address, and the request for a tunnel to the host (RFC 9110 §9.3.6)."""
    proxy, proxy_port = _split(proxy_url)
    if (
        proxy.scheme != "http"
        or not proxy.hostname
        or proxy_port is None
        or proxy.path.strip("/")
        or proxy.query
    ):
        # Not shown: it may hold a password.
        raise ValueError("the proxy's URL must be http://[user:password@]host[:port]")
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = {"Host": authority}
    if proxy.username is not None:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(pair.encode()).decode('ascii')}"
    request = f"CONNECT {authority} HTTP/1.1\r\n{_header_lines(headers)}\r\n"
    return (proxy.hostname, proxy_port or 80), request.encode("ascii")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
