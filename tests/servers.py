"""The test suite's own PostgreSQL and Redis: real servers in temporary directories.

Meant for session fixtures. Every pytest-xdist worker is a process of its own, so it gets servers
of its own; the servers end with the worker, even if that is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import shutil
import struct
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from storage.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer, free_port

__all__ = [
    "PostgresForTests",
    "fetch",
    "free_port",
    "initialise",
    "initialised_once",
    "postgres_server",
    "redis_server",
    "release_shared_memory",
    "temporary_directory",
]

STATEMENT_TIMEOUT_S = 60.0
DIRECTORY_VARIABLE = "TESTS_DIRECTORY"
"""The environment's name of the directory below which servers have theirs; without it they are
where the system has temporary files.
"""

T = TypeVar("T")


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end in a thread, so that it works below a running event loop as well."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


async def _fetch(
    dsn: str, sql: str, arguments: tuple[object, ...], wanted: SessionAttribute
) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(
        dsn,
        timeout=STATEMENT_TIMEOUT_S,
        target_session_attrs=wanted,
        ssl=False,  # or it would be asked for first
    )
    try:
        return await connection.fetch(sql, *arguments, timeout=STATEMENT_TIMEOUT_S)
    finally:
        await connection.close(timeout=STATEMENT_TIMEOUT_S)


def fetch(
    dsn: str, sql: str, *arguments: object, wanted: SessionAttribute = SessionAttribute.read_write
) -> list[asyncpg.Record]:
    """The rows of one statement, over a connection of its own to the host that is wanted."""
    return _run(_fetch(dsn, sql, arguments, wanted))


class PostgresForTests:
    """A running server, and fresh databases on it."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.server = server
        self._numbers = itertools.count(1)
        self._templates: set[str] = set()

    def create_database(self, template: str = "template1") -> str:
        """The DSN of a new database, a copy of the template."""
        name = f"test_{next(self._numbers)}"
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.dsn_of(name)

    def dsn_of(self, database: str) -> str:
        """For clients."""
        return self.server.dsn_of(database)

    def create_template(self, name: str, prepare: Callable[[str], Awaitable[object]]) -> str:
        """A database for `create_database` to copy, made once: `prepare(dsn)` fills it.

        `prepare` must close its connections. Returns the name.
        """
        if name not in self._templates:
            self._execute(f'CREATE DATABASE "{name}"')

            async def fill() -> None:
                await prepare(self.server.dsn_of(name))

            try:
                _run(fill())
            except BaseException:
                self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')
                raise
            self._templates.add(name)
        return name

    def drop_database(self, dsn: str) -> None:
        """Drop it, whoever is connected."""
        name = urlsplit(dsn).path.removeprefix("/")
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _execute(self, sql: str) -> None:
        fetch(self.server.dsn, sql)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    parent = os.environ.get(DIRECTORY_VARIABLE)
    path = Path(tempfile.mkdtemp(prefix=f"gateway-tests-{os.getpid()}-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def _running(server: EmbeddedServer) -> Iterator[None]:
    try:
        server.start()
        yield
    finally:
        server.stop()


@contextmanager
def postgres_server(settings: Mapping[str, str] | None = None) -> Iterator[PostgresForTests]:
    """A PostgreSQL for as long as the context lasts, as durable as the default set-up's.

    Pass `{"fsync": "off"}` where a test proves nothing about durability and writes a lot.
    """
    with temporary_directory() as directory:
        server = EmbeddedPostgres(directory / "postgres", settings=settings)
        initialise(server)
        try:
            with _running(server):
                yield PostgresForTests(server)
        finally:
            release_shared_memory(server)


_CHEAP_PASSWORD: Final = """
DO $$ BEGIN
    PERFORM set_config('scram_iterations', '1', true);
    ALTER USER CURRENT_USER PASSWORD '{password}';
END $$
"""
"""Each connection asks its client for so many hashes: the usual 4,096 are 2 ms of its time."""

_initialised: Path | None = None
"""Where `initialised_once` keeps the directory of a server that has run and was stopped."""


@contextmanager
def initialised_once() -> Iterator[None]:
    """For as long as the context lasts, servers that tests start for themselves begin with a copy
    of one that the first of them makes: an `initdb` takes ten times as long as a start.
    """
    global _initialised  # noqa: PLW0603 - every server of a process begins so, or none
    with temporary_directory() as directory:
        _initialised = directory / "initialised"
        try:
            yield
        finally:
            _initialised = None


def initialise(server: EmbeddedPostgres) -> None:
    """Make the directory of a server that has not run yet; without `initialised_once`, it makes its
    own when it starts.
    """
    if _initialised is None:
        return
    if not _initialised.exists():
        with EmbeddedPostgres(_initialised) as first:
            fetch(first.dsn, _CHEAP_PASSWORD.format(password=first.password))
    server.data_dir.mkdir(mode=0o700, parents=True)
    shutil.copy(_initialised / "password", server.data_dir / "password")
    shutil.copytree(_initialised / "pgdata", server.data_dir / "pgdata")


# --- what a killed PostgreSQL leaves --------------------------------------------------------------
#
# It leaves in the kernel what its next start in that directory would remove: the System V segment
# by which it knows itself to be alone, and the dynamic segments that this one leads to
# (PGShmemHeader in storage/pg_shmem.h; dsm_control_header in storage/ipc/dsm.c).

_SHARED_MEMORY_DIRECTORY: Final = Path("/dev/shm")
_SHMID_LINE: Final = 7
"""Of postmaster.pid: the segment's key and id (utils/pidfile.h)."""
_HEADER: Final = struct.Struct("@iiNNI")
"""Magic, creator, sizes, and the handle of the control segment."""
_CONTROL: Final = struct.Struct("@IIIxxxx")
"""Magic, items, items at most."""
_CONTROL_MAGIC: Final = 0x9A503D32
_ITEM: Final = struct.Struct("@IINNP?7x")
"""Handle, and what is known of that segment."""
_SHM_RDONLY: Final = 0o10000
_IPC_RMID: Final = 0


def release_shared_memory(server: EmbeddedPostgres) -> None:
    """Remove what a killed PostgreSQL has left in the kernel; harmless where it ended in order."""
    path = server.data_dir / "pgdata" / "postmaster.pid"
    lines = path.read_text("ascii").splitlines() if path.exists() else []
    if len(lines) < _SHMID_LINE:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    shmid = int(lines[_SHMID_LINE - 1].split()[1])
    address = libc.shmat(shmid, None, _SHM_RDONLY)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"shmat of segment {shmid} ({path})")
    *_, control = _HEADER.unpack(ctypes.string_at(address, _HEADER.size))
    libc.shmdt(ctypes.c_void_p(address))
    if libc.shmctl(shmid, _IPC_RMID, None) != 0:
        raise OSError(ctypes.get_errno(), f"shmctl of segment {shmid} ({path})")
    for handle in (*_dynamic_segments(control), control):
        _segment(handle).unlink(missing_ok=True)
    path.unlink()


def _dynamic_segments(control: int) -> Iterator[int]:
    """The handles in a control segment. Those in the server's main memory have no file."""
    data = _segment(control).read_bytes()
    magic, items, _ = _CONTROL.unpack_from(data)
    assert magic == _CONTROL_MAGIC, f"{_segment(control)} is no control segment"
    for number in range(items):
        handle, *_ = _ITEM.unpack_from(data, _CONTROL.size + number * _ITEM.size)
        yield handle


def _segment(handle: int) -> Path:
    return _SHARED_MEMORY_DIRECTORY / f"PostgreSQL.{handle}"


@contextmanager
def redis_server(settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedRedis]:
    """A Redis for as long as the context lasts."""
    with temporary_directory() as directory:
        server = EmbeddedRedis(directory / "redis", settings=settings)
        with _running(server):
            yield server
