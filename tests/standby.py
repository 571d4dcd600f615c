"""A PostgreSQL with a standby: streaming replication between two embedded servers, and failover."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

from asyncpg.connect_utils import SessionAttribute

from storage.embedded import EmbeddedPostgres
from tests.servers import (
    PostgresForTests,
    fetch,
    initialise,
    release_shared_memory,
    temporary_directory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STANDBY_NAME: Final = "standby"
BACKUP_TIMEOUT_S: Final = 120.0
REPLICATION_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.01


class ReplicatedPostgres(PostgresForTests):
    """A primary, and a standby that takes its place at `promote`. Its DSNs name both hosts."""

    def __init__(self, primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> None:
        """The primary runs; the standby's directory may hold anything."""
        super().__init__(primary)
        self.standby = standby
        self._hosts = (primary, standby)

    def dsn_of(self, database: str) -> str:
        """With both hosts, always in the same order."""
        url = urlsplit(self.server.dsn_of(database))
        credentials = url.netloc.rpartition("@")[0]
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self._hosts)
        return urlunsplit((url.scheme, f"{credentials}@{hosts}", url.path, "", ""))

    def build_standby(self, *, synchronous: bool = True) -> None:
        """Make the standby a copy of the primary and let it follow; return when it does."""
        self.commit_alone()
        cluster = self.standby.data_dir / "pgdata"
        shutil.rmtree(cluster, ignore_errors=True)
        self.standby.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(self.server.data_dir / "password", self.standby.data_dir / "password")
        self._back_up(cluster)
        self.standby.start()
        if synchronous:
            self._execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY_NAME}'")
            self._execute("SELECT pg_reload_conf()")
        self.await_standby("sync" if synchronous else "async")

    def await_standby(self, sync_state: str = "sync") -> None:
        """Wait until the standby follows the primary."""
        until_s = time.monotonic() + REPLICATION_TIMEOUT_S
        sql = "SELECT FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = $1"
        while not fetch(self.server.dsn, sql, sync_state):
            assert time.monotonic() < until_s, "the standby does not follow the primary"
            time.sleep(POLL_S)

    def commit_alone(self) -> None:
        """Let commits of the primary wait for nobody."""
        self._execute("ALTER SYSTEM RESET synchronous_standby_names")
        self._execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make the standby the primary; the old one must be dead, and becomes the standby."""
        assert not self.server.running, "two primaries"
        sql = "SELECT pg_promote() AS done"
        [row] = fetch(self.standby.dsn, sql, wanted=SessionAttribute.standby)
        assert row["done"]
        self.server, self.standby = self.standby, self.server

    def drop_database(self, dsn: str) -> None:
        """See PostgresForTests; whether or not the standby follows."""
        self.commit_alone()
        super().drop_database(dsn)

    def _back_up(self, cluster: Path) -> None:
        conninfo = (
            f"host=127.0.0.1 port={self.server.port} user={urlsplit(self.server.dsn).username}"
            f" application_name={STANDBY_NAME}"
        )
        subprocess.run(
            [
                *(self.server.bin_dir / "pg_basebackup", "--pgdata", cluster, "--no-password"),
                *("--dbname", conninfo, "--write-recovery-conf", "--checkpoint", "fast"),
            ],
            env={**os.environ, "PGPASSWORD": self.server.password},
            timeout=BACKUP_TIMEOUT_S,
            check=True,
            capture_output=True,
        )


@contextmanager
def replicated_postgres() -> Iterator[ReplicatedPostgres]:
    """A primary with a synchronous standby, for as long as the context lasts."""
    with temporary_directory() as directory:
        servers = [EmbeddedPostgres(directory / name) for name in ("a", "b")]
        try:
            initialise(servers[0])
            servers[0].start()
            pair = ReplicatedPostgres(*servers)
            pair.build_standby()
            yield pair
        finally:
            for server in servers:
                server.resume()
                server.kill()
                release_shared_memory(server)
