"""The embedded Redis: Valkey, or a Redis found on the PATH."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from storage.embedded._binaries import find_redis
from storage.embedded._errors import EmbeddedServerError, PortTakenError
from storage.embedded._process import SELF, launch_command, write_private
from storage.embedded._server import HOST, EmbeddedServer

DEFAULT_SETTINGS: Mapping[str, str] = {
    # Claims and cached answers only: PostgreSQL decides, so nothing here is worth an fsync.
    "appendonly": "no",
    # No snapshots on the way: a fork of the server would cost latency for data that may be lost.
    "save": "",
    # But an orderly stop keeps the cache for the next run.
    "shutdown-on-sigterm": "save force",
    "maxmemory": "256mb",
    # Refuse writes when full. Evicting would drop a claim in silence, while an error sends the
    # request to PostgreSQL and shows in a metric.
    "maxmemory-policy": "noeviction",
    "maxclients": "1000",
    "tcp-keepalive": "60",
}

RESERVED_SETTINGS = frozenset(
    {
        "bind",
        "daemonize",
        "dbfilename",
        "dir",
        "include",
        "logfile",
        "loglevel",
        "pidfile",
        "port",
        "requirepass",
        "supervised",
        "unixsocket",
    }
)

EMPTY_VALUE = '""'

_SNAPSHOT = "dump.rdb"


class EmbeddedRedis(EmbeddedServer):
    """Redis on 127.0.0.1 with a password; a cache and a lock, which may lose everything.

    `settings` are those of redis.conf, each value as it would stand there, and win over
    `DEFAULT_SETTINGS`; a reserved one is refused with ValueError. After an orderly stop the keys
    are there again; after a crash it starts empty, never with an older run's keys.
    """

    title: ClassVar[str] = "Redis"
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    ready_line: ClassVar[str] = "Ready to accept connections"
    reserved_settings: ClassVar[frozenset[str]] = RESERVED_SETTINGS

    @property
    def url(self) -> str:
        """Of database 0, with the password."""
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def _prepare(self, lock_fd: int) -> None:  # noqa: ARG002 (nothing runs before the server)
        self._found = find_redis(self.data_dir)
        self._ensure_password()

    def _command(self, port: int) -> list[str]:
        settings = {
            **DEFAULT_SETTINGS,
            **self.settings,
            "bind": HOST,
            "port": str(port),
            # Relative to the working directory, so that no path needs quoting here.
            "dir": ".",
            "dbfilename": _SNAPSHOT,
            "logfile": "",
            "loglevel": "notice",
            "daemonize": "no",
            "requirepass": self.password,
        }
        lines = [f"{name} {value or EMPTY_VALUE}\n" for name, value in settings.items()]
        # In a file, since every user of the machine can read a command line.
        write_private(self.data_dir / "redis.conf", "".join(lines))
        command: list[str | Path] = [self._binary.path, "redis.conf"]
        return launch_command(SELF, self.data_dir, self.stop_signal, command)

    def _launch(self, port: int, lock_fd: int) -> None:
        try:
            super()._launch(port, lock_fd)
        except PortTakenError:
            raise
        except EmbeddedServerError:
            # It may be the keys: of a newer server, or damaged. They are a cache.
            snapshot = self.data_dir / _SNAPSHOT
            if not snapshot.exists():
                raise
            snapshot.unlink()
            super()._launch(port, lock_fd)

    def _on_ready(self) -> None:
        # Loaded, so used up: a crash must not bring back keys that were released since.
        (self.data_dir / _SNAPSHOT).unlink(missing_ok=True)
