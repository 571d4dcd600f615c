"""The embedded PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from storage.embedded._binaries import Binary, find_postgres
from storage.embedded._errors import DataDirectoryInUseError, EmbeddedServerError
from storage.embedded._process import (
    all_processes,
    is_alive,
    launch_command,
    run_to_end,
    sync_directory,
)
from storage.embedded._server import HOST, EmbeddedServer

USER = "gateway"
DATABASE = "gateway"

DEFAULT_SETTINGS: Mapping[str, str] = {
    # Durability is the product: said here so that no edited file can take it away.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # Two gateways with their lanes and pools, the simulator, psql, and a test suite's clients.
    "max_connections": "200",
    # Holds the working set of a laptop's run; an idle server does not touch it.
    "shared_buffers": "128MB",
    # One segment: a burst of batches is buffered while the flush before it is on its way.
    "wal_buffers": "16MB",
    # Bounds the log to replay after a crash to a few seconds of work.
    "max_wal_size": "1GB",
    # Short statements never earn back the compiling of their plans.
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    # Without DETAIL lines: they would copy the values of rows into the log.
    "log_error_verbosity": "terse",
}

RESERVED_SETTINGS = frozenset(
    {
        "config_file",
        "data_directory",
        "external_pid_file",
        "hba_file",
        "ident_file",
        "lc_messages",
        "listen_addresses",
        "log_destination",
        "log_min_messages",
        "logging_collector",
        "port",
        "unix_socket_directories",
    }
)


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL on 127.0.0.1 with data checksums, UTF-8 and SCRAM passwords.

    `settings` are those of postgresql.conf and win over `DEFAULT_SETTINGS`; a reserved one is
    refused with ValueError. There is no Unix socket: nothing to leave behind, no path too long.
    """

    title: ClassVar[str] = "PostgreSQL"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # "fast": sessions are ended
    ready_line: ClassVar[str] = "database system is ready to accept"  # read-only ones, too
    reserved_settings: ClassVar[frozenset[str]] = RESERVED_SETTINGS

    @property
    def dsn(self) -> str:
        """Of the database `gateway`, with the password."""
        return self.dsn_of(DATABASE)

    def dsn_of(self, database: str) -> str:
        return f"postgresql://{USER}:{self.password}@{HOST}:{self.port}/{database}"

    @property
    def bin_dir(self) -> Path:
        """Where psql, pg_basebackup and the other programs of this server lie."""
        return self._binary.path.parent

    @property
    def _cluster(self) -> Path:
        return self.data_dir / "pgdata"

    def _prepare(self, lock_fd: int) -> None:
        self._clear_stale_pid_file()
        binary = self._found = find_postgres(self.data_dir, self._cluster)
        owner = binary.identity.owner
        if self._cluster.exists():
            if not self._password_path.exists():
                raise EmbeddedServerError(
                    f"{self._password_path} is missing, and the data beside it cannot be opened "
                    "without it. Put it back, or remove the directory to begin anew."
                )
            if owner is not None:
                _hand_over(self._cluster, owner)
        else:
            self._initialise(binary, lock_fd)

    def _clear_stale_pid_file(self) -> None:
        """Refuse a server that others started here; forget one whose pid went to a stranger.

        The lock has shown that no server of ours lives. PostgreSQL itself sees through the pid of
        a dead process, but not through one that another program got, as is usual in containers.
        """
        path = self._cluster / "postmaster.pid"
        try:
            pid = abs(int(path.read_text(encoding="utf-8", errors="replace").split("\n")[0]))
        except FileNotFoundError:
            return
        except ValueError:
            # Of a start that ended before it wrote its pid; PostgreSQL would wait for a person.
            if not any(_serves(pid, self._cluster) for pid in all_processes()):
                path.unlink()
            return
        if is_alive(pid) and _serves(pid, self._cluster):
            raise DataDirectoryInUseError(
                f"{self.data_dir} is in use by process {pid} (PostgreSQL, not started by us). "
                "Stop that one first, or choose another data directory."
            )
        if Path(f"/proc/{pid}").exists():  # a zombie too: PostgreSQL would take it for alive
            path.unlink()

    def _initialise(self, binary: Binary, lock_fd: int) -> None:
        """Build the cluster beside its place and move it there whole."""
        self._ensure_password()
        draft = self._cluster.with_name("pgdata.new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        if binary.identity.owner is not None:
            os.chown(draft, *binary.identity.owner)
            os.chown(self._password_path, *binary.identity.owner)
        initdb: list[str | Path] = [
            binary.path.with_name("initdb"),
            f"--pgdata={draft}",
            f"--username={USER}",
            f"--pwfile={self._password_path}",
            "--auth=scram-sha-256",
            "--data-checksums",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-instructions",
        ]
        run_to_end(binary.identity, self.data_dir, initdb, lock_fd=lock_fd)
        # Alone, before there is a server: the whole set-up is done, or none of it.
        single: list[str | Path] = [binary.path, "--single", "-D", draft, "postgres"]
        create = f"CREATE DATABASE {DATABASE} OWNER {USER};\n"
        printed = run_to_end(binary.identity, self.data_dir, single, stdin=create, lock_fd=lock_fd)
        if "ERROR:" in printed:
            raise EmbeddedServerError(f"The database {DATABASE} was not created:\n{printed}")
        draft.rename(self._cluster)
        sync_directory(self.data_dir)

    def _command(self, port: int) -> list[str]:
        settings = {
            **DEFAULT_SETTINGS,
            **self.settings,
            "listen_addresses": HOST,
            "port": str(port),
            "unix_socket_directories": "",
            "lc_messages": "C",  # `ready_line` is English
        }
        options = [part for item in settings.items() for part in ("-c", "{}={}".format(*item))]
        return launch_command(
            self._binary.identity,
            self.data_dir,
            self.stop_signal,
            [self._binary.path, "-D", self._cluster, *options],
        )


def _serves(pid: int, cluster: Path) -> bool:
    """Whether a living process is a PostgreSQL server of that directory."""
    process = Path(f"/proc/{pid}")
    try:
        try:
            return cluster.samefile(process / "cwd")  # every PostgreSQL process works there
        except PermissionError:
            # Another user's process: take it for one if it has the name.
            name = (process / "comm").read_text(encoding="utf-8", errors="replace")
            return "postgres" in name
    except (FileNotFoundError, ProcessLookupError):
        return False


def _hand_over(cluster: Path, owner: tuple[int, int]) -> None:
    """Give the files to the user that the server will be, where they are not his yet."""
    if cluster.stat().st_uid == owner[0]:
        return
    for directory, _, names in os.walk(cluster, topdown=False):
        for name in names:
            os.chown(Path(directory, name), *owner, follow_symlinks=False)
        # The top directory last: until then, an interrupted hand-over is taken up again.
        os.chown(directory, *owner)
