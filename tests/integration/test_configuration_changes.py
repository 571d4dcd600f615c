"""The record of what was changed of the configuration: all of it, by whom, and no secret."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from click.testing import CliRunner

from gateway.application.accounts import RateLimit
from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.application.events import ORIGIN, ConsumerName, Reset
from gateway.cli import main
from gateway.domain import ids
from gateway.domain.errors import GatewayError
from gateway.domain.model import Mode
from storage.postgres import (
    Accounts,
    ConfigurationChanges,
    ConnectorAccounts,
    OutboxEvents,
    PostgresStore,
    row_security,
    unrecorded_tables,
)
from storage.postgres import migrate as migrations
from storage.postgres.migrate import migrate, read_migrations
from storage.postgres.pool import ConnectionSettings, connect
from storage.postgres.queries import query, run
from tests.outbox import connection_to
from tests.servers import fetch, postgres_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from storage.postgres.changes import ConfigurationChange
    from tests.servers import PostgresForTests

ANN = "login:ann"
SEALED = Sealed(b"first-secret", WrappedKey("k1", b"first-wrapped"))
ROTATED = Sealed(b"second-secret", WrappedKey("k1", b"second-wrapped"))
CONSUMER = ConsumerName("org_1", Mode.TEST, "ledger")
REACH = frozenset({"mer_1"})
PLAIN_CONSUMER = (
    "INSERT INTO event_consumers (organisation_id, mode, name, at_xact_id, at_merchant_id,"
    " at_payment_id, at_payment_version, at_seq, at_event_id)"
    " VALUES ('org_1', 2, 'ledger', '500', 'mer_1', 'pay_1', 1, 0, 'evt_1')"
)
BEFORE = tuple(
    each
    for each in read_migrations(Path(migrations.__file__).parent / "migrations")
    if each.version < 15
)
FORGERY = (
    "INSERT INTO configuration_changes (author, database_user, action, table_name)"
    " VALUES ('a', 'a', 'a', 'a')"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    with postgres_server() as server:
        yield server


async def changes(dsn: str, **of: Any) -> list[ConfigurationChange]:
    """The oldest first."""
    async with ConfigurationChanges.connect(dsn) as store:
        return list(reversed(await store.list(**{"limit": 1000} | of)))


def told(found: Sequence[ConfigurationChange]) -> list[tuple[str, str, str]]:
    return [(each.action, each.table_name, each.row_id) for each in found]


async def merchant_of(dsn: str) -> tuple[str, str]:
    """A new organisation's id and that of a merchant of it."""
    async with Accounts.connect(dsn, ANN) as accounts:
        organisation_id = await accounts.create_organisation("one")
        return organisation_id, await accounts.create_merchant(organisation_id, "shop")


# --- what is recorded -----------------------------------------------------------------------------


async def test_every_change_of_who_may_call_is_recorded_with_its_author(dsn: str) -> None:
    organisation_id, merchant_id = await merchant_of(dsn)
    uri = "spiffe://example.org/till"
    grant: dict[str, Any] = {"scopes": ("payments:read",), "mode": Mode.LIVE}
    async with Accounts.connect(dsn, ANN) as accounts:
        await accounts.limit_merchant(merchant_id, RateLimit(5.0, 10))
        await accounts.limit_merchant(merchant_id, None)
        key = await accounts.create_key(organisation_id, **grant, name="till")
        await accounts.revoke_key(key.key_id)
        await accounts.add_identity(uri, organisation_id, **grant)
        await accounts.remove_identity(uri)
    found = await changes(dsn)
    assert told(found) == [
        ("INSERT", "organisations", organisation_id),
        ("INSERT", "merchants", merchant_id),
        ("UPDATE", "merchants", merchant_id),
        ("UPDATE", "merchants", merchant_id),
        ("INSERT", "api_keys", key.key_id),
        ("UPDATE", "api_keys", key.key_id),
        ("INSERT", "client_identities", uri),
        ("DELETE", "client_identities", uri),
    ]
    [user] = fetch(dsn, "SELECT session_user::text AS name")
    for each in found:
        assert (each.author, each.database_user) == (ANN, user["name"])
        assert each.client_address == "127.0.0.1"
        assert each.organisation_id == organisation_id
        assert each.merchant_id == (merchant_id if each.table_name == "merchants" else "")
    _, made, limited, freed, created, revoked, added, removed = found
    assert made.new_values == {
        "merchant_id": merchant_id,
        "organisation_id": organisation_id,
        "name": "shop",
        "pan_exempt_order_id": False,
    }
    no_limit, limit = (
        {"rate_limit_per_s": per_s, "rate_limit_burst": burst}
        for per_s, burst in ((None, None), (5.0, 10))
    )
    assert (limited.old_values, limited.new_values) == (no_limit, limit)
    assert (freed.old_values, freed.new_values) == (limit, no_limit)
    assert (created.mode, revoked.mode, added.mode) == (Mode.LIVE,) * 3
    assert created.new_values["scopes"] == ["payments:read"]
    assert revoked.old_values == {"revoked_at": None}
    assert re.fullmatch(r"\d{4}-.*\+00:00", revoked.new_values["revoked_at"])
    assert (removed.old_values, removed.new_values) == (added.new_values, {})


async def test_every_change_of_an_account_at_a_psp_is_recorded_without_its_credentials(
    dsn: str,
) -> None:
    organisation_id, merchant_id = await merchant_of(dsn)
    account = ConnectorAccount(
        merchant_id, ids.new_connector_account_id(), Mode.TEST, "stripe", SEALED
    )
    of = (merchant_id, account.account_id)
    async with ConnectorAccounts.connect(dsn, ANN) as accounts:
        await accounts.add(account)
        await accounts.change(*of, enabled=False)
        await accounts.change(*of, enabled=False)  # changes nothing
        await accounts.change(*of, priority=7)
        await accounts.replace_credentials(*of, ROTATED)
        rotated = await accounts.find(*of)
        assert rotated is not None
        assert await accounts.rewrap(rotated, Sealed(b"", WrappedKey("k2", b"third-wrapped")))
        await accounts.remove(*of)
    found = [each for each in await changes(dsn) if each.table_name == "connector_accounts"]
    assert {(each.author, each.row_id, each.mode) for each in found} == {
        (ANN, account.account_id, Mode.TEST)
    }
    assert {(each.organisation_id, each.merchant_id) for each in found} == {
        (organisation_id, merchant_id)
    }
    added, *changed = found
    assert added.new_values["credentials"] == "***"
    removed = changed.pop()
    assert [(each.old_values, each.new_values) for each in changed] == [
        ({"enabled": True}, {"enabled": False}),
        ({"priority": 100}, {"priority": 7}),
        (*[{"credentials": "***", "wrapped_data_key": "***"}] * 2,),
        (
            {"wrapping_key_id": "k1", "wrapped_data_key": "***"},
            {"wrapping_key_id": "k2", "wrapped_data_key": "***"},
        ),
    ]
    assert removed.new_values.keys() == {"removed_at", "credentials", "wrapped_data_key"}


async def test_no_secret_and_no_hash_of_one_stands_in_the_record(dsn: str) -> None:
    organisation_id, merchant_id = await merchant_of(dsn)
    async with Accounts.connect(dsn) as accounts:
        key = await accounts.create_key(organisation_id, scopes=("admin",), mode=Mode.TEST)
    async with ConnectorAccounts.connect(dsn) as connector_accounts:
        account = ConnectorAccount(merchant_id, "acc_1", Mode.TEST, "stripe", SEALED)
        await connector_accounts.add(account)
        await connector_accounts.replace_credentials(merchant_id, "acc_1", ROTATED)
    fetch(dsn, "UPDATE api_keys SET secret_hash = sha256('other') RETURNING 1")
    fetch(dsn, "ALTER TABLE api_keys ADD COLUMN added_later text")
    fetch(dsn, "UPDATE api_keys SET added_later = 'of-a-later-version' RETURNING 1")
    rows = fetch(dsn, "SELECT change::text FROM configuration_changes AS change")
    everything = "\n".join(row["change"] for row in rows)
    hashes = fetch(dsn, "SELECT secret_hash FROM api_keys")
    secrets = [SEALED.ciphertext, SEALED.data_key.ciphertext, ROTATED.ciphertext]
    secrets += [ROTATED.data_key.ciphertext, key.secret_hash, hashes[0]["secret_hash"]]
    for secret in secrets:
        assert secret.hex() not in everything
    assert key.text not in everything
    assert "of-a-later-version" not in everything
    *_, rehashed, later = await changes(dsn)
    assert rehashed.new_values == {"secret_hash": "***"}
    # That a column changed which this version does not know is told.
    assert (later.old_values, later.new_values) == ({"added_later": "***"},) * 2


async def test_a_change_by_plain_sql_is_recorded_by_the_user_who_made_it(
    postgres: PostgresForTests, dsn: str
) -> None:
    organisation_id, merchant_id = await merchant_of(dsn)
    login = f"clerk_{ids.new_key_id()[-8:]}"
    fetch(dsn, f"CREATE ROLE {login} LOGIN PASSWORD 'test'")
    try:
        fetch(dsn, f"GRANT SELECT, UPDATE ON merchants, organisations TO {login}")
        own = re.sub(r"//[^@]+@", f"//{login}:test@", dsn)
        fetch(own, "UPDATE merchants SET pan_exempt_order_id = true RETURNING 1")
        async with connection_to(own) as connection:
            # Who says to be somebody else is seen to have said so.
            await connection.execute(f"SET gateway.author = '{ANN}'")
            await connection.execute("UPDATE organisations SET name = 'two'")
            for refused in (
                FORGERY,
                "DELETE FROM configuration_changes",
                "SELECT * FROM configuration_changes",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(refused)
            # Nor may a table of their own write there.
            await connection.execute("CREATE TEMPORARY TABLE mine (organisation_id text)")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(
                    "CREATE TRIGGER forged AFTER INSERT ON mine FOR EACH ROW"
                    " EXECUTE FUNCTION record_configuration_change()"
                )
    finally:
        fetch(dsn, f"DROP OWNED BY {login}")
        fetch(dsn, f"DROP ROLE {login}")
    *_, exempted, renamed = await changes(dsn)
    assert told([exempted, renamed]) == [
        ("UPDATE", "merchants", merchant_id),
        ("UPDATE", "organisations", organisation_id),
    ]
    assert (exempted.author, exempted.database_user) == (f"database:{login}", login)
    assert (renamed.author, renamed.database_user) == (ANN, login)
    assert renamed.old_values == {"name": "one"}


async def test_tables_that_are_emptied_are_recorded(dsn: str) -> None:
    await merchant_of(dsn)
    fetch(dsn, "TRUNCATE organisations, event_consumers CASCADE")
    _, _, *emptied = await changes(dsn)
    assert {(each.action, each.table_name) for each in emptied} == {
        ("TRUNCATE", name)
        for name in (
            "organisations",
            "merchants",
            "api_keys",
            "client_identities",
            "connector_accounts",
            "event_consumers",
        )
    }


async def test_a_statement_that_is_repeated_or_fails_is_recorded_once_or_never(dsn: str) -> None:
    create = query("accounts", "create_organisation")
    async with connection_to(dsn) as connection:
        for _ in range(2):  # as after a commit whose answer was lost
            await run(connection, create, organisation_id="org_1", name="one")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("UPDATE organisations SET name = 'two'; SELECT 1 / 0")
    assert told(await changes(dsn)) == [("INSERT", "organisations", "org_1")]


# --- consumers of events --------------------------------------------------------------------------


async def test_a_consumer_is_recorded_when_it_is_reset_or_removed_and_not_when_it_acknowledges(
    store: PostgresStore, dsn: str
) -> None:
    later = ORIGIN._replace(
        xact_id=700, merchant_id="mer_1", payment_id="pay_1", payment_version=1, event_id="evt_7"
    )
    earlier = later._replace(xact_id=600, event_id="evt_6")
    events = store.events
    assert await events.add_consumer(CONSUMER, REACH, ORIGIN)
    for position in (earlier, later):
        assert await events.acknowledge(CONSUMER, REACH, position, None)
    assert await changes(dsn) == []
    assert await events.acknowledge(CONSUMER, REACH, earlier, Reset("key_1", "It was restored."))
    assert await events.acknowledge(CONSUMER, REACH, later, Reset("key_2", "It was not."))
    assert await events.delete_consumer(CONSUMER, REACH, "key_3")
    assert not await events.delete_consumer(CONSUMER, REACH, "key_4")
    found = await changes(dsn)
    assert [(each.author, each.action) for each in found] == [
        ("key_1", "UPDATE"),
        ("key_2", "UPDATE"),
        ("key_3", "DELETE"),
    ]
    assert {(each.organisation_id, each.row_id, each.mode) for each in found} == {
        ("org_1", "ledger", Mode.TEST)
    }
    assert (found[0].old_values["at_xact_id"], found[0].new_values["at_xact_id"]) == ("700", "600")
    # The first reset is known although the consumer remembers the second alone.
    assert found[0].new_values["reset_reason"] == "It was restored."
    assert found[2].old_values["at_event_id"] == "evt_7"


async def test_the_author_of_a_call_is_not_that_of_the_next_one_on_its_connection(dsn: str) -> None:
    reset = Reset("key_1", "It was restored.")
    async with OutboxEvents.connect(dsn) as events:
        assert await events.add_consumer(CONSUMER, REACH, ORIGIN)
        assert await events.acknowledge(CONSUMER, REACH, ORIGIN, reset)
        await Accounts(events._lane).create_organisation("one")
        assert await events.delete_consumer(CONSUMER, REACH, "key_2")
        await Accounts(events._lane).create_organisation("two")
    authors = [each.author.partition(":")[0] for each in await changes(dsn)]
    assert authors == ["key_1", "database", "key_2", "database"]


async def test_a_consumer_that_is_set_back_by_plain_sql_is_recorded(dsn: str) -> None:
    fetch(dsn, f"{PLAIN_CONSUMER} RETURNING 1")
    fetch(dsn, "UPDATE event_consumers SET at_xact_id = '501', acknowledged_at = now() RETURNING 1")
    assert await changes(dsn) == []
    fetch(dsn, "UPDATE event_consumers SET at_xact_id = '400' RETURNING 1")
    fetch(dsn, "UPDATE event_consumers SET name = 'other' RETURNING 1")
    back, renamed = await changes(dsn)
    assert back.new_values == {"at_xact_id": "400"}
    assert renamed.old_values == {"name": "ledger"}


# --- the record is kept ---------------------------------------------------------------------------


async def test_an_entry_is_never_changed_and_goes_after_a_year_at_the_earliest(dsn: str) -> None:
    await merchant_of(dsn)
    # Written by hand, as those of another age cannot be waited for.
    fetch(
        dsn,
        "INSERT INTO configuration_changes"
        " (changed_at, author, database_user, action, table_name)"
        " SELECT now() - days * interval '1 day', 'a', 'a', 'DELETE', 'api_keys'"
        " FROM unnest('{360, 370}'::int[]) AS days RETURNING 1",
    )
    for refused in (
        "UPDATE configuration_changes SET author = 'nobody'",
        "DELETE FROM configuration_changes WHERE change_id = 3",  # that of 360 days
        "DELETE FROM configuration_changes",
        "TRUNCATE configuration_changes",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="are kept"):
            fetch(dsn, refused)
    assert len(await changes(dsn)) == 4
    old = "DELETE FROM configuration_changes WHERE changed_at < now() - interval '1 year'"
    assert len(fetch(dsn, f"{old} RETURNING 1")) == 1


async def test_a_trigger_that_is_missing_or_switched_off_is_found(dsn: str) -> None:
    async with connection_to(dsn) as connection:
        assert await unrecorded_tables(connection) == []
        for statement in (
            "ALTER TABLE merchants DISABLE TRIGGER configuration_change",
            "DROP TRIGGER configuration_change_by_update ON event_consumers",
            "ALTER TABLE configuration_changes DISABLE TRIGGER kept",
        ):
            await connection.execute(statement)
        assert await unrecorded_tables(connection) == [
            "configuration_changes",
            "event_consumers",
            "merchants",
        ]


async def test_the_lanes_roles_change_what_is_recorded_and_cannot_touch_the_record(
    dsn: str,
) -> None:
    await merchant_of(dsn)
    await row_security.enable(dsn)
    assert await row_security.problems(dsn) == []
    async with PostgresStore(dsn, row_security=True) as store:
        assert await store.events.add_consumer(CONSUMER, REACH, ORIGIN)
        assert await store.events.delete_consumer(CONSUMER, REACH, "key_1")
    *_, deleted = await changes(dsn)
    assert (deleted.author, deleted.action) == ("key_1", "DELETE")
    for role in (row_security.READER, row_security.WRITER, row_security.RECOVERER):
        connection = await asyncpg.connect(dsn, server_settings={"role": role})
        try:
            for statement in (
                "SELECT * FROM configuration_changes",
                "UPDATE configuration_changes SET author = 'nobody'",
                "DELETE FROM configuration_changes",
                FORGERY,
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        finally:
            await connection.close()


async def test_an_owner_with_no_other_rights_records_in_a_schema_of_its_own(
    postgres: PostgresForTests, dsn: str
) -> None:
    owner = f"own_{ids.new_key_id()[-8:]}"
    database = postgres.create_database()
    try:
        fetch(database, f"CREATE ROLE {owner} LOGIN PASSWORD 'test'")
        fetch(database, f"CREATE SCHEMA {owner} AUTHORIZATION {owner}")  # in its search_path
        own = re.sub(r"//[^@]+@", f"//{owner}:test@", database)
        await migrate(own)
        _, merchant_id = await merchant_of(own)
        async with ConnectorAccounts.connect(own, ANN) as accounts:
            await accounts.add(ConnectorAccount(merchant_id, "acc_1", Mode.TEST, "stripe", SEALED))
        assert {each.database_user for each in await changes(own)} == {owner}
        assert len(await changes(own)) == 3
    finally:
        postgres.drop_database(database)
        fetch(dsn, f"DROP ROLE {owner}")


async def test_every_table_of_people_s_decisions_is_recorded_or_names_its_authors(
    dsn: str,
) -> None:
    """A table that a later migration adds belongs to one of these, or to the payments' own."""
    of_payments = {
        "payments",
        "operations",
        "superseded_attempts",
        "outbox",
        "discrepancies",
        "doubts",
        "notifications",
        "pending_notifications",
        "recovery_watermark",
    }
    unnamed = fetch(
        dsn,
        "SELECT class.relname FROM pg_class AS class"
        " WHERE class.relkind = 'r' AND class.relnamespace = 'public'::regnamespace"
        " AND NOT EXISTS (SELECT FROM pg_attribute AS attribute"
        " WHERE attribute.attrelid = class.oid AND NOT attribute.attisdropped"
        " AND attribute.attname IN ('created_by', 'activated_by', 'resolved_by'))"
        " AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = class.oid"
        " AND tgname = 'configuration_change')",
    )
    assert {row["relname"] for row in unnamed} == of_payments | {
        "configuration_changes",
        "schema_migrations",
    }


# --- how it is read -------------------------------------------------------------------------------


async def test_pages_are_those_of_a_merchant_an_organisation_or_all_the_newest_first(
    dsn: str,
) -> None:
    organisation_id, merchant_id = await merchant_of(dsn)
    other, _ = await merchant_of(dsn)
    account = ConnectorAccount(merchant_id, "acc_1", Mode.TEST, "stripe", SEALED)
    async with ConnectorAccounts.connect(dsn) as accounts:
        await accounts.add(account)
    assert told(await changes(dsn, merchant_id=merchant_id)) == [
        ("INSERT", "merchants", merchant_id),
        ("INSERT", "connector_accounts", "acc_1"),
    ]
    of_organisation = await changes(dsn, organisation_id=organisation_id)
    assert [each.table_name for each in of_organisation] == [
        "organisations",
        "merchants",
        "connector_accounts",
    ]
    assert len(await changes(dsn, organisation_id=other)) == 2
    async with ConfigurationChanges.connect(dsn) as store:
        pages: list[ConfigurationChange] = []
        while page := await store.list(limit=2, before=pages[-1].change_id if pages else None):
            assert len(page) <= 2
            pages += page
        with pytest.raises(GatewayError):
            await store.list(limit=2, before=10**9)
    assert [each.change_id for each in pages] == [5, 4, 3, 2, 1]
    assert await changes(dsn, since=pages[1].changed_at) == [pages[1], pages[0]]
    assert await changes(dsn, since=datetime.now(UTC) + timedelta(days=1)) == []


@pytest.mark.parametrize(
    ("name", "index", "condition"),
    [
        ("list_all", "configuration_changes_in_order", ()),
        ("list_of_organisation", "configuration_changes_organisation", ("of_organisation",)),
        ("list_of_merchant", "configuration_changes_merchant", ("of_merchant",)),
    ],
)
async def test_a_page_is_read_along_its_index_and_no_further(
    dsn: str, name: str, index: str, condition: tuple[str, ...]
) -> None:
    fetch(
        dsn,
        "INSERT INTO configuration_changes (author, database_user, action, table_name,"
        " of_organisation, of_merchant)"
        " SELECT 'a', 'a', 'INSERT', 'merchants', 'org_' || n % 10, 'mer_' || n % 10"
        " FROM generate_series(1, 10000) AS n RETURNING 1",
    )
    statement = query("changes", name)
    values: dict[str, object] = {
        "organisation_id": "org_1",
        "merchant_id": "mer_1",
        "since": datetime.now(UTC) - timedelta(days=1),
        "before_time": datetime.now(UTC),
        "before_id": 5000,
        "limit": 50,
    }
    connection = await connect(ConnectionSettings(dsn), "test")
    try:
        explained = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}", *statement.arguments(values)
        )
    finally:
        await connection.close()
    plan = json.loads(explained)[0]["Plan"]
    assert plan["Node Type"] == "Limit"
    [scan] = plan["Plans"]
    assert (scan["Index Name"], scan["Actual Rows"]) == (index, 50)
    assert "Filter" not in scan
    for column in (*condition, "changed_at", "change_id"):
        assert column in scan["Index Cond"]


@pytest.fixture
def run_command(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("GATEWAY_POSTGRES_DSN", dsn)
    monkeypatch.setenv("LOGNAME", "ann")

    def call(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == status, result.output
        return result.output.strip()

    return call


def test_the_command_line_s_changes_are_its_login_s_and_it_lists_them(
    dsn: str, run_command: Callable[..., str]
) -> None:
    organisation = run_command("organisations", "create", "--name", "o")
    merchant = run_command("merchants", "create", "--organisation", organisation, "--name", "m")
    run_command("merchants", "limit", merchant, "--per-second", "5", "--burst", "9")
    fetch(dsn, f"{PLAIN_CONSUMER} RETURNING 1")
    of_consumer = ("ledger", "--mode", "test", "--organisation", "org_1")
    run_command("events", "reset", *of_consumer, "--to", "beginning", "--reason", "It was lost.")
    run_command("events", "delete", *of_consumer)
    run_command(
        "keys", "create", "--organisation", organisation, "--mode", "test", "--scope", "admin"
    )
    # A name is what somebody wrote: it begins no line of its own.
    fetch(dsn, "UPDATE organisations SET name = $1 RETURNING 1", "two\nlines\u2028\x1b[2J")
    lines = run_command("changes", "list").splitlines()
    assert [line.split("  ")[0] for line in lines] == [*"7654321"]
    [user] = fetch(dsn, "SELECT session_user::text AS name")
    assert [line.split("  ")[2] for line in lines] == [
        f"database:{user['name']}",
        *["login:ann"] * 6,
    ]
    limited = lines[4].split("  ")
    assert limited[3:] == [
        f"{user['name']}@127.0.0.1",
        "changed",
        "merchants",
        merchant,
        merchant,
        "-",
        "rate_limit_burst: null -> 9, rate_limit_per_s: null -> 5",
    ]
    assert "\x1b" not in lines[0]
    assert run_command("changes", "list", "--merchant", merchant).splitlines() == lines[4:6]
    of_organisation = run_command("changes", "list", "--organisation", organisation).splitlines()
    assert of_organisation == [*lines[:2], *lines[4:]]
    assert run_command("changes", "list", "--limit", "1", "--before", "3") == lines[5]
    assert run_command("changes", "list", "--since", "2999-01-01T00:00Z") == ""
    both = ("--merchant", merchant, "--organisation", organisation)
    run_command("changes", "list", *both, status=2)
    run_command("changes", "list", "--since", "yesterday", status=1)
    run_command("changes", "list", "--before", "99", status=1)
    # What was removed is still told of.
    fetch(dsn, "DELETE FROM merchants RETURNING 1")
    assert "removed" in run_command("changes", "list", "--merchant", merchant).splitlines()[0]


def test_a_login_without_a_name_is_its_number(
    run_command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 65532")

    monkeypatch.setattr("getpass.getuser", nameless)
    monkeypatch.setattr("os.getuid", lambda: 65532)
    run_command("organisations", "create", "--name", "o")
    assert "  login:65532  " in run_command("changes", "list")


# --- upgrades -------------------------------------------------------------------------------------


async def test_a_gateway_of_the_version_before_goes_on_and_its_changes_are_recorded(
    postgres: PostgresForTests,
) -> None:
    database = postgres.create_database()
    try:
        await migrate(database, migrations=BEFORE)
        async with connection_to(database) as connection:
            delete = "DELETE FROM event_consumers WHERE name = $1 RETURNING name"
            prepared = await connection.prepare(delete)
            assert await prepared.fetchval("ledger") is None
            assert "configuration_changes" in await migrate(database)
            await connection.execute(PLAIN_CONSUMER)
            assert await prepared.fetchval("ledger") == "ledger"
        [change] = await changes(database)
        assert (change.action, change.row_id) == ("DELETE", "ledger")
        assert change.author.startswith("database:")
    finally:
        postgres.drop_database(database)
