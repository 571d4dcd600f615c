"""The test suite's own PostgreSQL and Redis: real servers in temporary directories.

Meant for session fixtures. Every pytest-xdist worker is a process of its own, so it gets servers
of its own; the servers end with the worker, even if that is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from storage.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer, free_port

__all__ = [
    "PostgresForTests",
    "fetch",
    "free_port",
    "postgres_server",
    "redis_server",
    "release_shared_memory",
    "temporary_directory",
]

STATEMENT_TIMEOUT_S = 60.0

T = TypeVar("T")


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end in a thread, so that it works below a running event loop as well."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


async def _fetch(
    dsn: str, sql: str, arguments: tuple[object, ...], wanted: SessionAttribute
) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(
        dsn, timeout=STATEMENT_TIMEOUT_S, target_session_attrs=wanted
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
    path = Path(tempfile.mkdtemp(prefix=f"gateway-tests-{os.getpid()}-"))
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
        try:
            with _running(server):
                yield PostgresForTests(server)
        finally:
            release_shared_memory(server)


def release_shared_memory(server: EmbeddedPostgres) -> None:
    """What a killed PostgreSQL leaves in the kernel, its next start in that directory removes."""
    if (server.data_dir / "pgdata" / "postmaster.pid").exists():
        server.start()
        server.stop()


@contextmanager
def redis_server(settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedRedis]:
    """A Redis for as long as the context lasts."""
    with temporary_directory() as directory:
        server = EmbeddedRedis(directory / "redis", settings=settings)
        with _running(server):
            yield server
