"""Held connections: a lane keeps its own, so that no write ever waits for a connection.

Also what a connection is told when it is opened, and what a server is asked before it is trusted.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from storage.postgres.errors import (
    CommitInDoubt,
    ConnectionUnavailable,
    NotDurable,
    keeps_connection,
)
from storage.postgres.queries import query

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    Connection: TypeAlias = asyncpg.Connection

T = TypeVar("T")

_CONNECT_ERRORS = (
    OSError,
    TimeoutError,
    ValueError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

_log = logging.getLogger(__name__)

_PLANS = query("session", "plans")
_GENERATION = query("session", "generation")
_DURABILITY = query("session", "durability")
_CONFIRM = query("session", "confirm")

_DURABLE_VALUES = {
    "fsync": {"on"},
    "full_page_writes": {"on"},
    "synchronous_commit": {"on", "remote_apply"},
}

RECONNECT_PAUSE_S_MIN = 0.02
RECONNECT_PAUSE_S_MAX = 1.0
"""While a server is away, each held connection is tried about so often."""
IDLE_IN_TRANSACTION_S_MAX = 10.0
"""A transaction of ours never waits for anything but its next statement."""
TRANSACTION_MARGIN_S = 8.0
"""How much longer than an answer is waited for the server lets a transaction last."""

NO_STANDBY = (
    "synchronous_standby_names is empty, so a committed payment is on one server alone;"
    " name a standby"
)
_REPLICATION_WAIT = "SyncRepWaitForLSN"
"""The function of PostgreSQL that warns of a commit that has not waited for its standbys. The text
is in the server's language, the SQLSTATE that of every warning."""


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """How to connect: to the server, or to a pooler that gives each client its own session."""

    dsn: str
    """A libpq URL; of several hosts, the first one that takes writes is the server."""
    application_name: str = "gateway"
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 10.0
    """The server ends a statement after this."""
    answer_margin_s: float = 2.0
    """How much longer than `statement_timeout_s` an answer is waited for."""
    role: str = ""
    """The role that statements run as; empty: the user's own."""
    prepared_statements: bool = True
    """Off for a pooler that cannot hold them."""
    author: str = ""
    """Who changes the configuration, for the record of it; empty: the record names the user."""

    @property
    def answer_timeout_s(self) -> float:
        """After this a connection is given up; what became of its statement is not known."""
        return self.statement_timeout_s + self.answer_margin_s


async def connect(settings: ConnectionSettings, name: str) -> Connection:
    """A connection to the primary, set up for the statements of a lane.

    Several hosts are asked at once, so that one that does not answer delays nobody. Where the
    server has synchronous standbys, they have all that it shows by now: a server that came back
    alone, or that was replaced and does not know it, gets no further.

    Raises ConnectionUnavailable.
    """
    return await _first(settings.dsn, lambda dsn: _connect_to(dsn, settings, name))


async def connect_once(dsn: str, timeout_s: float, **options: Any) -> Connection:
    """A connection to the primary for what people run, of several hosts as `connect`.

    `options` are asyncpg's. Raises OSError, asyncpg.PostgresError and asyncpg.InterfaceError.
    """

    async def attempt(host: str) -> Connection:
        try:
            connection: Connection = await asyncpg.connect(
                host,
                timeout=timeout_s,
                target_session_attrs=SessionAttribute.read_write,
                **options,
            )
        except asyncpg.InternalClientError as error:  # a standby, or an answer that is none
            raise ConnectionError("no host that takes writes") from error
        return connection

    return await _first(dsn, attempt)


async def _first(dsn: str, attempt: Callable[[str], Awaitable[Connection]]) -> Connection:
    """The first connection that an attempt at a host makes. Raises the first one's error."""
    hosts = _each_host(dsn)
    if len(hosts) == 1:
        return await attempt(dsn)
    failures: list[Exception] = []
    waiting = {asyncio.ensure_future(attempt(host)) for host in hosts}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for number, attempted in enumerate(done, 1):
                try:
                    connection = attempted.result()
                except (ConnectionUnavailable, *_CONNECT_ERRORS) as error:
                    failures.append(error)
                else:
                    waiting.update(list(done)[number:])
                    return connection
        raise failures[0]
    finally:
        for attempted in waiting:
            attempted.cancel()
        for unused in await asyncio.gather(*waiting, return_exceptions=True):
            if not isinstance(unused, BaseException):
                unused.terminate()


def _each_host(dsn: str) -> list[str]:
    """The DSN once for each host in its authority (libpq's manual, 32.1.1.2)."""
    scheme, separator, rest = dsn.partition("://")
    authority, slash, path = rest.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    return [f"{scheme}{separator}{credentials}{at}{host}{slash}{path}" for host in hosts.split(",")]


async def _connect_to(dsn: str, settings: ConnectionSettings, name: str) -> Connection:
    confirmation = _CommitNotices()
    try:
        connection: Connection = await asyncpg.connect(
            dsn,
            timeout=settings.connect_timeout_s,
            statement_cache_size=100 if settings.prepared_statements else 0,
            max_cached_statement_lifetime=0,  # for as long as the connection lives
            max_cacheable_statement_size=0,  # of every length
            target_session_attrs=SessionAttribute.read_write,
            server_settings={
                "application_name": f"{settings.application_name}-{name}",
                "statement_timeout": _milliseconds(settings.statement_timeout_s),
                "idle_in_transaction_session_timeout": _milliseconds(IDLE_IN_TRANSACTION_S_MAX),
                "idle_session_timeout": "0",  # a lane's connection is held, however quiet it is
                "timezone": "UTC",
                **({"role": settings.role} if settings.role else {}),
            },
        )
    except _CONNECT_ERRORS as error:
        # The text of the error may quote the DSN.
        raise ConnectionUnavailable(f"PostgreSQL: {type(error).__name__}") from error
    try:
        transaction_timeout_s = settings.answer_timeout_s + TRANSACTION_MARGIN_S
        told = _PLANS.arguments(
            {
                "transaction_timeout": _milliseconds(transaction_timeout_s),
                "author": settings.author,
            }
        )
        await connection.fetch(_PLANS.text, *told, timeout=settings.connect_timeout_s)
        connection.add_log_listener(confirmation.notice)
        await connection.execute(_CONFIRM.text, timeout=settings.connect_timeout_s)
        confirmation.check()
        connection.remove_log_listener(confirmation.notice)
    except Exception as error:
        # Not cut: the wait for a standby has been cancelled, and would last for ever otherwise.
        await _close(connection, settings.connect_timeout_s)
        raise ConnectionUnavailable(f"PostgreSQL: {type(error).__name__}") from error
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _close(connection: Connection, timeout_s: float) -> None:
    try:
        await connection.close(timeout=timeout_s)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


async def system_generation(connection: Connection, timeout_s: float | None = None) -> str:
    """The server's system identifier and its timeline; another one after a failover or a restore.

    Works on a primary only. Raises ConnectionUnavailable where there is no answer within
    `timeout_s` seconds; without it, the caller sees to an end.
    """
    try:
        return str(await connection.fetchval(_GENERATION.text, timeout=timeout_s))
    except TimeoutError as error:
        raise ConnectionUnavailable(f"PostgreSQL: {type(error).__name__}") from error


async def durability_problems(connection: Connection) -> list[str]:
    """Why a commit on this server is not safe on disk; empty where it is."""
    return [
        f"{name} is {value}, so a committed payment could be lost; set {name} = on"
        for name, value in await connection.fetch(_DURABILITY.text)
        if value not in _DURABLE_VALUES[name]
    ]


async def has_standby(connection: Connection) -> bool:
    """Whether commits wait for a synchronous standby; then it has all that this server shows.

    Waits for the standby: for as long as the caller lets it.
    """
    return bool(await connection.fetchval(_CONFIRM.text))


async def durability(connection: Connection, *, standby_required: bool = False) -> None:
    """Raise NotDurable for a server on which a commit is not yet safe.

    Where commits wait for a standby, this waits for it too.
    """
    problems = await durability_problems(connection)
    if not await has_standby(connection) and standby_required:
        problems.append(NO_STANDBY)
    if problems:
        raise NotDurable(f"PostgreSQL: {'; '.join(problems)}.")


class _CommitNotices:
    """Whether a commit was told as done that had not waited for its standbys."""

    __slots__ = ("in_doubt",)

    def __init__(self) -> None:
        self.in_doubt = False

    def notice(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        """What the server said beside its answers; asyncpg calls this before they are awaited."""
        if getattr(message, "server_source_function", None) == _REPLICATION_WAIT:
            self.in_doubt = True

    def check(self) -> None:
        """Raise CommitInDoubt where a commit had not waited."""
        if self.in_doubt:
            raise CommitInDoubt("PostgreSQL committed without waiting for its standbys")


class _Slot:
    """The place of one held connection."""

    __slots__ = ("commits", "connection", "failures", "retry_at_s")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.commits = _CommitNotices()
        """On that connection."""
        self.failures = 0
        self.retry_at_s = 0.0

    @property
    def is_connected(self) -> bool:
        return self.connection is not None and not self.connection.is_closed()

    def drop(self) -> None:
        if self.connection is not None:
            self.connection.terminate()
            self.connection = None


class HeldConnections:
    """`size` connections for at most `size` users at a time, opened again when they break."""

    def __init__(
        self,
        settings: ConnectionSettings,
        name: str,
        size: int,
        on_generation: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._answer_timeout_s = settings.answer_timeout_s
        self._name = name
        self._on_generation = on_generation
        self._free = [_Slot() for _ in range(size)]
        self._slots = tuple(self._free)
        self.busy_s = 0.0
        """For how long connections were in use, all together, in seconds, since the start."""

    @property
    def size(self) -> int:
        """How many it may hold."""
        return len(self._slots)

    @property
    def connected(self) -> int:
        """How many are open."""
        return sum(slot.is_connected for slot in self._slots)

    @property
    def busy(self) -> int:
        """How many are in use, those that are being connected included."""
        return len(self._slots) - len(self._free)

    async def open(self) -> None:
        """Connect what can be connected now; the rest follows with its first use."""
        await asyncio.gather(
            *(self._connected(slot) for slot in self._slots), return_exceptions=True
        )

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """`work` with a connection of its own.

        Raises ConnectionUnavailable at once where the server was away a moment ago, and
        CommitInDoubt where a commit had not waited for its standbys. Whatever leaves the connection
        in doubt ends it, and so does an answer that does not come within `answer_timeout_s`.
        """
        began_s = time.monotonic()
        slot = self._taken()
        try:
            connection = slot.connection
            if connection is None or connection.is_closed():
                connection = await self._connected(slot)
            # Cut, not cancelled: a commit whose wait for a standby is cancelled is seen by all, and
            # what was seen could be lost with the server.
            limit = asyncio.get_running_loop().call_later(
                self._answer_timeout_s, connection.terminate
            )
            try:
                result = await work(connection)
            finally:
                limit.cancel()
            slot.commits.check()
            return result  # noqa: TRY300 - what is raised above has to end the connection too
        except BaseException as error:
            if not keeps_connection(error):
                slot.drop()
            raise
        finally:
            self._free.append(slot)
            self.busy_s += time.monotonic() - began_s

    def _taken(self) -> _Slot:
        """A free place: the warmest that is connected, else one that may be connected by now.

        One whose connection cannot be made again is put back last, as all are. It must not be the
        next one's while another's connection is open: a server may refuse new connections and serve
        those it has.
        """
        free = self._free  # never empty: a lane has as many batches in flight
        for number in range(len(free) - 1, -1, -1):
            if free[number].is_connected:
                return free.pop(number)
        now_s = time.monotonic()
        for number in range(len(free) - 1, -1, -1):
            if now_s >= free[number].retry_at_s:
                return free.pop(number)
        return free.pop()

    async def _connected(self, slot: _Slot) -> Connection:
        if time.monotonic() < slot.retry_at_s:
            raise ConnectionUnavailable("PostgreSQL was away a moment ago")
        slot.drop()
        try:
            connection = slot.connection = await connect(self._settings, self._name)
            slot.commits = _CommitNotices()
            connection.add_log_listener(slot.commits.notice)
            if self._on_generation is not None:
                # Limited as every step of connecting is: a lane that waits here has no other end,
                # and a slot that is being connected is nobody's.
                timeout_s = self._settings.connect_timeout_s
                self._on_generation(await system_generation(connection, timeout_s))
        except Exception as error:
            pause_s = RECONNECT_PAUSE_S_MIN * 2 ** min(slot.failures, 10)
            slot.retry_at_s = time.monotonic() + random.uniform(0.5, 1.0) * min(
                pause_s, RECONNECT_PAUSE_S_MAX
            )
            slot.failures += 1
            if slot.failures == 1:
                _log.warning("no connection to PostgreSQL for %s: %s", self._name, error)
            slot.drop()
            raise
        if slot.failures:
            _log.info("PostgreSQL is back for %s", self._name)
        slot.failures = 0
        return connection

    async def close(self) -> None:
        """Close what is open; nobody may be using it."""
        for slot in self._slots:
            if slot.connection is not None:
                await _close(slot.connection, self._settings.connect_timeout_s)
                slot.connection = None
