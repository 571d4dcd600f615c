"""Migrations against a real PostgreSQL: whole, once, in their order, by one at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from storage.postgres import PostgresStore, SchemaError, check_schema, required_version
from storage.postgres import migrate as migrations
from storage.postgres.migrate import MigrationChanged, migrate, read_migrations
from tests.servers import fetch, postgres_server
from tests.store_data import authorize, outcome, stored

if TYPE_CHECKING:
    from tests.servers import PostgresForTests

REPOSITORY = Path(__file__).parents[2]
OURS = read_migrations(Path(migrations.__file__).parent / "migrations")
TABLES = (
    "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def dsn(postgres: PostgresForTests) -> Iterator[str]:
    database = postgres.create_database()
    yield database
    postgres.drop_database(database)


def tables(dsn: str) -> set[str]:
    return {record["relname"] for record in fetch(dsn, TABLES)}


def files(directory: Path, **texts: str) -> Path:
    """A directory of migrations; a name's double underscore stands for the dot of the phase."""
    for name, text in texts.items():
        number, phase = name.removeprefix("m").split("__")
        (directory / f"{number}.{phase}.sql").write_text(text)
    return directory


async def is_complete(dsn: str) -> bool:
    connection = await asyncpg.connect(dsn)
    try:
        await check_schema(connection)
    except SchemaError:
        return False
    finally:
        await connection.close()
    return True


async def test_an_empty_database_gets_everything_and_a_second_run_does_nothing(dsn: str) -> None:
    assert not await is_complete(dsn)
    assert await migrate(dsn) == [each.name for each in OURS]
    assert await is_complete(dsn)
    before = fetch(dsn, "SELECT * FROM schema_migrations")
    assert await migrate(dsn) == []
    assert fetch(dsn, "SELECT * FROM schema_migrations") == before


async def test_a_newer_database_is_served_from_until_its_post_phase_has_run(
    dsn: str, tmp_path: Path
) -> None:
    await migrate(dsn)
    number = required_version() + 1
    newer = read_migrations(
        files(
            tmp_path,
            **{
                f"m{number:04}_next__pre": "CREATE TABLE next_added (id int);",
                f"m{number:04}_next__post": "DROP TABLE next_added;",
            },
        )
    )
    await migrate(dsn, "pre", migrations=newer)
    assert await is_complete(dsn)
    await migrate(dsn, "post", migrations=newer)
    async with PostgresStore(dsn) as store:
        with pytest.raises(SchemaError, match=f"{number:04}.*Run the version that brought it"):
            await store.check()


async def test_every_payment_of_the_previous_version_is_still_there(dsn: str) -> None:
    previous = tuple(each for each in OURS if each.version < required_version())
    assert previous
    await migrate(dsn, migrations=previous)
    assert not await is_complete(dsn)
    # The previous version had no recovery, so its writes are the plain ones.
    async with PostgresStore(dsn) as store:
        intents = [authorize(recover_after_s=-1) for _ in range(20)]
        for intent in intents:
            await store.write_intent(intent)
        change = outcome(intents[0].operation, intents[0].payment)
        await store.write_change(change)
        before = [await stored(store, intent.operation) for intent in intents]

        assert await migrate(dsn) == [each.name for each in OURS[len(previous) :]]
        assert await is_complete(dsn)
        assert [await stored(store, intent.operation) for intent in intents] == before
        # What it left unfinished is found.
        assert await store.expired(100) == 19


def test_two_processes_at_once_apply_everything_once(dsn: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from storage.postgres.migrate import migrate\n"
        "sys.stdin.readline()\n"
        "print(*asyncio.run(migrate(sys.argv[1])))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, dsn],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    applied = [name for process in processes for name in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert applied == [each.name for each in OURS]


async def test_before_a_deploy_runs_what_new_code_needs_and_after_it_the_rest(
    dsn: str, tmp_path: Path
) -> None:
    directory = files(
        tmp_path,
        m0001_one__pre="CREATE TABLE one (a int);",
        m0001_one__post="CREATE TABLE one_after (a int);",
        m0002_two__pre="CREATE TABLE two (a int);",
    )
    found = read_migrations(directory)
    assert await migrate(dsn, "pre", migrations=found) == ["one", "two"]
    assert tables(dsn) == {"schema_migrations", "one", "two"}
    assert await migrate(dsn, "post", migrations=found) == ["one"]
    assert tables(dsn) == {"schema_migrations", "one", "two", "one_after"}


async def test_a_migration_that_fails_leaves_nothing_and_runs_again(
    dsn: str, tmp_path: Path
) -> None:
    directory = files(tmp_path, m0001_one__pre="CREATE TABLE one (a int); SELECT 1 / 0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(dsn, migrations=read_migrations(directory))
    assert tables(dsn) == {"schema_migrations"}
    files(tmp_path, m0001_one__pre="CREATE TABLE one (a int);")
    assert await migrate(dsn, migrations=read_migrations(directory)) == ["one"]


async def test_a_migration_that_was_edited_after_it_was_applied_is_refused(
    dsn: str, tmp_path: Path
) -> None:
    directory = files(tmp_path, m0001_one__pre="CREATE TABLE one (a int);")
    await migrate(dsn, migrations=read_migrations(directory))
    files(tmp_path, m0001_one__pre="CREATE TABLE one (b int);")
    with pytest.raises(MigrationChanged, match="0001_one"):
        await migrate(dsn, migrations=read_migrations(directory))


def test_an_index_is_built_concurrently_while_another_run_waits(dsn: str, tmp_path: Path) -> None:
    """Such an index waits for every open snapshot: one who waits for the lock must hold none."""
    directory = files(
        tmp_path,
        m0001_one__pre="CREATE TABLE one (a int);",
        m0002_index__pre=(
            "-- no transaction\n"
            "DROP INDEX CONCURRENTLY IF EXISTS one_a;\n"
            "-- A comment; with a semicolon.\n"
            "CREATE INDEX CONCURRENTLY one_a ON one (a);\n"
        ),
    )
    program = (
        "import asyncio, pathlib, sys\n"
        "from storage.postgres.migrate import migrate, read_migrations\n"
        "found = read_migrations(pathlib.Path(sys.argv[2]))\n"
        "print(*asyncio.run(migrate(sys.argv[1], migrations=found)))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, dsn, str(directory)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    applied = [name for process in processes for name in process.communicate(timeout=60)[0].split()]
    assert applied == ["one", "index"]
    [valid] = fetch(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'one_a'::regclass")
    assert valid[0]


def test_a_file_with_another_name_is_a_defect(tmp_path: Path) -> None:
    (tmp_path / "0001-one.sql").write_text("SELECT 1;")
    with pytest.raises(ValueError, match=r"0001-one\.sql"):
        read_migrations(tmp_path)


def test_the_numbers_of_our_migrations_have_no_gaps() -> None:
    numbers = [each.version for each in OURS if each.phase == "pre"]
    assert numbers == list(range(1, required_version() + 1))
