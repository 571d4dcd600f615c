"""A client of Redis for the hot path: one connection, everything pipelined, RESP2.

The claims send a few scripts for thousands of payments. A general client takes a connection from a
pool, watches each command with time-outs, retries and hooks, and so costs ten times what the round
trip does (`docs/performance.md`). Parsing is hiredis'.
"""

import asyncio
import ssl
from collections import deque
from typing import Any, Final, TypeAlias, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import hiredis

Part: TypeAlias = bytes | str | int
"""A part of a command."""

_PORT: Final = 6379
_ELSEWHERE: Final = frozenset({"READONLY", "MASTERDOWN", "MOVED"})
_TLS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})


class RedisAway(Exception):
    """No usable answer in time: no connection, a lost one, or silence.

    Whether the command was executed is not known.
    """


class RedisRefused(Exception):
    """Redis answered with an error, whose first word is its code, as NOSCRIPT."""

    @property
    def code(self) -> str:
        """The error's code."""
        return str(self).partition(" ")[0]

    @property
    def is_elsewhere(self) -> bool:
        """Whether another server takes the writes by now: this one is a replica, or has no such
        keys.
        """
        return self.code in _ELSEWHERE


class RedisClient:
    """Commands to one Redis, all over one connection that is made when it is needed.

    A command that is not answered in time ends the connection and with it all that wait: their
    answers would have come after it. So does a refusal of a server that is not the one that takes
    the writes any more: a failover need not close connections, and the address leads to another by
    now, or soon. Made inside a running event loop.

    Args:
        url: `redis://[[user][:password]@]host[:port][/db]`, `rediss://…` with TLS, or
            `unix://[[user][:password]@]/path[?db=n]`. TLS takes `?ssl_ca_certs=`, `ssl_certfile=`
            and `ssl_keyfile=`, paths of PEM files; the server's name is always verified.
        timeout_ms: longest wait for a reply, connecting included.
        connect_timeout_ms: longest wait for a connection.

    Raises:
        ValueError: no such address, or an option that is not known.
    """

    def __init__(self, url: str, *, timeout_ms: float, connect_timeout_ms: float) -> None:
        self._address = _Address(url)
        self._timeout_s = timeout_ms / 1000
        self._connect_timeout_s = connect_timeout_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def execute(self, *command: Part, until: float | None = None) -> Any:
        """What Redis answers: bytes, an int, None, or a list of these.

        Args:
            command: its name and arguments.
            until: a time of the event loop's clock up to which to wait, instead of `timeout_ms`.

        Raises:
            RedisAway: as it says.
            RedisRefused: an error is the answer.
        """
        if until is None:
            until = self._loop.time() + self._timeout_s
        connection = self._connection
        if connection is None or connection.lost:
            connection = await self._connected(until)
        return await connection.send(_packed(command), until)

    async def connect(self) -> None:
        """Have a connection; to make one may take `connect_timeout_ms`, not only `timeout_ms`.

        Raises:
            RedisAway: there is none.
            RedisRefused: Redis does not know who asks.
        """
        if self._connection is None or self._connection.lost:
            await self._connected(self._loop.time() + self._connect_timeout_s)

    async def close(self) -> None:
        """Close the connection; what waits for an answer ends with RedisAway. Safe to repeat."""
        self._closed = True
        if self._connection is not None:
            self._connection.end()

    async def _connected(self, until: float) -> "_Connection":
        try:
            async with asyncio.timeout_at(until):
                await self._connecting.acquire()
        except TimeoutError as error:
            raise RedisAway("no connection in time") from error
        try:
            if self._connection is not None and not self._connection.lost:
                return self._connection  # another command has made it meanwhile
            if self._closed:
                raise RedisAway("the client is closed")
            by = min(until, self._loop.time() + self._connect_timeout_s)
            try:
                async with asyncio.timeout_at(by):
                    connection = await self._address.connect()
            except (OSError, TimeoutError) as error:
                raise RedisAway(f"cannot connect: {type(error).__name__}") from error
            try:
                for command in self._address.greeting:
                    await connection.send(_packed(command), by)
                if self._closed:  # meanwhile
                    raise RedisAway("the client is closed")
            except BaseException:
                connection.end()
                raise
            self._connection = connection
            return connection
        finally:
            self._connecting.release()


class _Address:
    """Where Redis is, and how to introduce oneself."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._path = self._host = ""
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "unix":
            self._path, database = unquote(parts.path), options.pop("db", "")
        elif parts.scheme in ("redis", "rediss"):
            self._host, self._port = parts.hostname or "localhost", parts.port or _PORT
            database = parts.path.strip("/") or options.pop("db", "")
        else:
            raise ValueError("Redis' address begins with redis://, rediss:// or unix://")
        if parts.scheme == "rediss":
            given = {name: options.pop(name, None) for name in _TLS_OPTIONS}
            self._tls = _tls(given["ssl_ca_certs"], given["ssl_certfile"], given["ssl_keyfile"])
        if options:
            raise ValueError(f"Redis' address has an option that is not known: {min(options)}")
        if database and not database.isdecimal():
            raise ValueError("the database of Redis' address is a number")
        self.greeting: list[tuple[Part, ...]] = []
        """The commands that a connection begins with."""
        if parts.username or parts.password:
            names = (unquote(parts.username),) if parts.username else ()
            self.greeting.append(("AUTH", *names, unquote(parts.password or "")))
        if database and int(database):
            self.greeting.append(("SELECT", int(database)))

    async def connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        if self._path:
            _, connection = await loop.create_unix_connection(_Connection, self._path)
        else:
            _, connection = await loop.create_connection(
                _Connection, self._host, self._port, ssl=self._tls
            )
        return connection


def _packed(command: tuple[Part, ...]) -> bytes:
    # hiredis' stub knows commands of one part only.
    return cast("bytes", hiredis.pack_command(cast("tuple[Part]", command)))


def _tls(ca_file: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"a TLS file of Redis' address cannot be used: {error}") from error
    return context


class _Connection(asyncio.Protocol):
    """Commands in their order, and their replies in the same."""

    def __init__(self) -> None:
        self.lost = False
        """Whether no command can be sent any more."""
        self._loop = asyncio.get_running_loop()
        self._replies = hiredis.Reader(replyError=RedisRefused, notEnoughData=_NO_REPLY)
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._watched_until = 0.0

    def send(self, command: bytes, until: float) -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self.lost:
            answer.set_exception(RedisAway("the connection was lost"))
            return answer
        self._waiting.append((answer, until))
        self._transport.write(command)
        if self._watch is None or until < self._watched_until:
            # One timer for all: most fire for nothing, and seldom.
            self._watch_until(until)
        return answer

    def end(self) -> None:
        self._end("closed")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._replies.feed(data)
        while True:
            try:
                reply = self._replies.gets()
            except hiredis.ProtocolError:
                self._end("an answer that is none")
                return
            if reply is _NO_REPLY:
                return
            if not self._waiting:
                self._end("an answer to nothing")
                return
            answer, _ = self._waiting.popleft()
            refused = isinstance(reply, RedisRefused)
            if answer.done():
                pass  # its caller was cancelled
            elif refused:
                answer.set_exception(reply)
            else:
                answer.set_result(reply)
            if refused and reply.is_elsewhere:
                self._end("another server takes the writes")
                return

    def connection_lost(self, _: Exception | None) -> None:
        self._end("the connection was lost")

    def _watch_until(self, until: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watched_until = until
        self._watch = self._loop.call_at(until, self._look)

    def _look(self) -> None:
        self._watch = None
        if not self._waiting:
            return
        # Not the first one's: it may wait longer, as what a connection begins with may.
        until = min([until for _, until in self._waiting])
        if until <= self._loop.time():
            self._end("no answer in time")
        else:
            self._watch_until(until)

    def _end(self, why: str) -> None:
        self.lost = True
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._waiting:
            answer, _ = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(RedisAway(why))


_NO_REPLY: Final = object()
