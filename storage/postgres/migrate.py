"""The schema, forward only: numbered SQL files in two phases, before and after a deploy.

`NNNN_name.pre.sql` is what new code needs and old code bears: it runs before the deploy.
`NNNN_name.post.sql` takes away what only old code needed: it runs when no old code is left.
A file runs in a transaction with its entry in schema_migrations, so that it happens once or not at
all. One that begins with `-- no transaction` (an index built CONCURRENTLY) runs statement by
statement, each ending with a `;` at a line's end, and must bear to be run again.
"""

import asyncio
import hashlib
import re
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal

from storage.postgres.errors import SchemaError
from storage.postgres.pool import Connection, connect_once

Phase = Literal["pre", "post"]

LOCK_KEY = 0x6761746577617973
"""Of the advisory lock that one migration at a time holds: "gateways" in ASCII."""
LOCK_POLL_S = 0.05
LOCK_WAIT_S_MAX = 600.0
"""How long one run waits for another."""
TABLE_LOCK_WAIT_S_MAX = 5.0
"""A statement that waits longer for a table gives up, since all traffic waits behind it."""
CONNECT_TIMEOUT_S = 10.0

_NAME = re.compile(r"(\d{4})_(\w+)\.(pre|post)\.sql")
_NO_TRANSACTION = "-- no transaction"

_CREATE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version integer NOT NULL,
    phase text NOT NULL,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (version, phase)
)
"""
_SELECT = "SELECT version, phase, checksum FROM schema_migrations"
_INSERT = (
    "INSERT INTO schema_migrations (version, phase, name, checksum) VALUES ($1, $2, $3, $4) "
    "ON CONFLICT DO NOTHING"
)


class MigrationChanged(Exception):
    """A file differs from what was once applied under its number."""


class MigrationBusy(Exception):
    """Another run has held the lock for too long."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file."""

    version: int
    phase: Phase
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def in_transaction(self) -> bool:
        """Whether it runs in one."""
        return not self.sql.startswith(_NO_TRANSACTION)


@cache
def _ours() -> tuple[Migration, ...]:
    return read_migrations(resources.files(__package__).joinpath("migrations"))


def read_migrations(directory: Traversable) -> tuple[Migration, ...]:
    """The files of a directory in their order; raises ValueError for a name of another form."""
    found = []
    for path in directory.iterdir():
        if not path.name.endswith(".sql"):
            continue
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path.name} is not named NNNN_name.pre.sql or NNNN_name.post.sql")
        phase: Phase = "pre" if match[3] == "pre" else "post"
        found.append(Migration(int(match[1]), phase, match[2], path.read_text("utf-8")))
    # All that comes before a deploy comes before what follows one.
    return tuple(sorted(found, key=lambda each: (each.phase != "pre", each.version)))


def required_version() -> int:
    """The number of the latest migration that this version of the code needs."""
    return max(each.version for each in _ours() if each.phase == "pre")


async def migrate(
    dsn: str,
    phase: Phase | Literal["all"] = "all",
    *,
    migrations: tuple[Migration, ...] | None = None,
) -> list[str]:
    """Apply what is missing; returns the names of what was applied. Safe to repeat and to run twice
    at once.

    Raises MigrationChanged, MigrationBusy, or asyncpg's and OSError's errors.
    """
    wanted = [
        each
        for each in (_ours() if migrations is None else migrations)
        if phase in ("all", each.phase)
    ]
    connection = await connect_once(
        dsn,
        CONNECT_TIMEOUT_S,
        server_settings={
            "application_name": "gateway-migrate",
            "lock_timeout": str(int(TABLE_LOCK_WAIT_S_MAX * 1000)),
        },
    )
    try:
        await _lock(connection)
        await connection.execute(_CREATE)
        return [each.name for each in wanted if await _apply(connection, each)]
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)  # and the lock goes with it


async def _lock(connection: Connection) -> None:
    # By asking again and again: a session that waits in PostgreSQL holds a snapshot, and an index
    # that the lock's holder builds CONCURRENTLY would wait for it.
    until_s = time.monotonic() + LOCK_WAIT_S_MAX
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
        if time.monotonic() > until_s:
            raise MigrationBusy("Another migration runs; try again when it has ended.")
        await asyncio.sleep(LOCK_POLL_S)


async def _apply(connection: Connection, migration: Migration) -> bool:
    """Whether it had to be applied."""
    applied = {
        (record["version"], record["phase"]): record["checksum"]
        for record in await connection.fetch(_SELECT)
    }
    checksum = applied.get((migration.version, migration.phase))
    if checksum is not None:
        if checksum != migration.checksum:
            raise MigrationChanged(
                f"{migration.version:04}_{migration.name}.{migration.phase}.sql differs from what "
                "was applied to this database. Applied migrations are never edited: add a new one."
            )
        return False
    entry = (migration.version, migration.phase, migration.name, migration.checksum)
    if migration.in_transaction:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(_INSERT, *entry)
    else:
        for statement in re.split(r";[ \t]*\n", migration.sql + "\n"):
            if re.sub(r"--.*", "", statement).strip():
                await connection.execute(statement)
        await connection.execute(_INSERT, *entry)
    return True


async def check_schema(connection: Connection) -> None:
    """Raise SchemaError for a database that lacks what this version of the code needs, or from
    which a newer version's `post` phase has removed it.

    A newer database is right until then: its `pre` phase is made to be borne by the code before.
    """
    present = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
    applied = await connection.fetch(_SELECT) if present else []
    done = {(record["version"], record["phase"]) for record in applied}
    known = {each.version for each in _ours()}
    newer = sorted({v for v, phase in done if phase == "post" and v not in known})
    if newer:
        raise SchemaError(
            f"The database is a newer version's: its migration {newer[-1]:04} (post) has removed"
            " what this one may need. Run the version that brought it; the schema does not go back."
        )
    missing = [
        f"{each.version:04}_{each.name}"
        for each in _ours()
        if each.phase == "pre" and (each.version, each.phase) not in done
    ]
    if missing:
        raise SchemaError(
            f"The database lacks {', '.join(missing)}. Run `gateway migrate` before the gateway."
        )
