"""Servers and gateways whose clock and disk can be turned, by a library that is preloaded (shim.c).

It is compiled where it is needed: without a C compiler these scenarios cannot be run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.embedded import EmbeddedPostgres, EmbeddedRedis
from tests.servers import (
    PostgresForTests,
    initialise,
    release_shared_memory,
    temporary_directory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE: Final = Path(__file__).with_name("shim.c")
COMPILERS: Final = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S: Final = 60.0
SLOW_SYNC_S: Final = 0.05
"""By how much fsync is slower on a slow disk."""

_LAYOUT: Final = struct.Struct("=qqq")
_NS_PER_S: Final = 1_000_000_000


class NotPossible(Exception):
    """What a scenario needs does not exist here."""


class Turned:
    """The page that a process shares with us: its clock and its disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._clock_offset_s = 0
        self._sync_delay_s = 0.0
        self._disk_full = False

    @property
    def clock_offset_s(self) -> int:
        """By how much the process's clock is fast."""
        return self._clock_offset_s

    def set_clock(self, offset_s: int) -> None:
        """Move the clock so far from the true time."""
        self._clock_offset_s = offset_s
        self._write()

    def slow_disk(self, sync_delay_s: float) -> None:
        """Let every fsync take so much longer."""
        self._sync_delay_s = sync_delay_s
        self._write()

    def fill_disk(self, *, full: bool) -> None:
        """Refuse, or no longer, what makes a file longer."""
        self._disk_full = full
        self._write()

    def reset(self) -> None:
        """As it should be."""
        self._clock_offset_s, self._sync_delay_s, self._disk_full = 0, 0.0, False
        self._write()

    def close(self) -> None:
        """Let go of the page."""
        self._page.close()

    def _write(self) -> None:
        _LAYOUT.pack_into(
            self._page,
            0,
            self._clock_offset_s * _NS_PER_S,
            int(self._sync_delay_s * _NS_PER_S),
            self._disk_full,
        )


class Shims:
    """The library, and the pages of PostgreSQL, Redis and the gateways."""

    def __init__(self, library: Path, gateways: int) -> None:
        self.preload = {"LD_PRELOAD": str(library)}
        folder = library.parent
        self.postgres = Turned(folder / "postgres.page")
        self.redis = Turned(folder / "redis.page")
        self.gateways = [Turned(folder / f"gateway-{each}.page") for each in range(gateways)]

    @property
    def all(self) -> list[Turned]:
        """Every page."""
        return [self.postgres, self.redis, *self.gateways]

    def reset(self) -> None:
        """Everything as it should be."""
        for each in self.all:
            each.reset()


@contextmanager
def open_shims(gateways: int = 2) -> Iterator[Shims]:
    """Compile the library. Raises NotPossible."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NotPossible("no C compiler")
    with temporary_directory() as folder:
        library = folder / "shim.so"
        ended = subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
        if ended.returncode != 0:
            raise NotPossible(f"the C compiler fails: {ended.stderr.strip().splitlines()[-1:]}")
        shims = Shims(library, gateways)
        try:
            yield shims
        finally:
            for each in shims.all:
                each.close()


def _under(command: list[str], binary: Path, shims: Shims, page: Turned) -> list[str]:
    """The command line with the library preloaded to the server, and to nothing before it."""
    env = shutil.which("env")
    assert env is not None
    at = command.index(str(binary))
    preload = [f"{name}={value}" for name, value in shims.preload.items()]
    return [*command[:at], env, *preload, f"CHAOS_SHIM={page.path}", *command[at:]]


class _Postgres(EmbeddedPostgres):
    def __init__(self, directory: Path, shims: Shims) -> None:
        super().__init__(directory)
        self._shims = shims

    def _command(self, port: int) -> list[str]:
        command = super()._command(port)
        return _under(command, self._binary.path, self._shims, self._shims.postgres)


class _Redis(EmbeddedRedis):
    def __init__(self, directory: Path, shims: Shims) -> None:
        super().__init__(directory)
        self._shims = shims

    def _command(self, port: int) -> list[str]:
        command = super()._command(port)
        return _under(command, self._binary.path, self._shims, self._shims.redis)


@contextmanager
def shimmed_postgres(shims: Shims) -> Iterator[PostgresForTests]:
    """A PostgreSQL with the library, for as long as the context lasts."""
    with temporary_directory() as directory:
        server = _Postgres(directory / "postgres", shims)
        initialise(server)
        try:
            server.start()
            yield PostgresForTests(server)
        finally:
            shims.reset()
            server.stop()
            release_shared_memory(server)


@contextmanager
def shimmed_redis(shims: Shims) -> Iterator[EmbeddedRedis]:
    """A Redis with the library, for as long as the context lasts."""
    with temporary_directory() as directory:
        server = _Redis(directory / "redis", shims)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def serve(page: str) -> None:
    """`gateway serve` with a page of its own: the function that a gateway's process runs."""
    if ctypes.CDLL(None).chaos_attach(os.fsencode(page)) != 0:
        raise OSError(f"{page} cannot be shared")
    from tests.nursery import serve as serve_gateway  # noqa: PLC0415 - the child's side alone

    serve_gateway()
