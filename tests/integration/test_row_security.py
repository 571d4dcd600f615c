"""Row-level security: with the first wall taken away, the second one holds."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from gateway.application.notifications import Notification, Received
from gateway.application.ports import ListFilter, Stored
from gateway.domain import ids
from gateway.domain.model import Mode
from storage.postgres import LaneLimits, PostgresStore, RowRefused, row_security, rows
from storage.postgres import notifications as notifications_module
from storage.postgres import store as store_module
from storage.postgres.queries import Query
from tests.servers import fetch, postgres_server
from tests.store_data import authorize, authorized, capture, outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.servers import PostgresForTests

VICTIM, THIEF = ids.new_merchant_id(), ids.new_merchant_id()


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    with postgres_server() as server:
        yield server


@asynccontextmanager
async def opened(dsn: str, *, walled: bool = True) -> AsyncIterator[PostgresStore]:
    if walled:
        await row_security.enable(dsn)
    notifications = LaneLimits(connections=2)
    async with PostgresStore(dsn, row_security=walled, notifications=notifications) as store:
        yield store


def without(query: Query, *conditions: str) -> Query:
    """The statement without these conditions: as somebody may write it one day."""
    text = query.text
    for condition in conditions:
        # Parameters stay, or PostgreSQL would not know their types.
        changed = re.sub(
            condition, lambda found: f"{found[1]} IS NOT NULL" if found.groups() else "true", text
        )
        assert changed != text, condition
        text = changed
    return replace(query, text=text)


def rows_of(dsn: str, merchant_id: str) -> list[Any]:
    return [
        fetch(dsn, f"SELECT * FROM {table} WHERE merchant_id = $1 ORDER BY 2", merchant_id)
        for table in ("payments", "operations", "outbox")
    ]


# --- the first wall is taken away ---------------------------------------------------------------


@pytest.mark.parametrize("walled", [False, True])
async def test_a_read_that_forgot_its_merchant_finds_another_ones_payment_or_none(
    dsn: str, monkeypatch: pytest.MonkeyPatch, walled: bool
) -> None:
    async with opened(dsn, walled=walled) as store:
        payment_id = (await authorized(store, VICTIM)).payment_id
        forgetful = without(
            store_module._LOAD,
            r"payment\.merchant_id = input\.merchant_id",
            r'operation\.merchant_id COLLATE "default" = payment\.merchant_id',
        )
        monkeypatch.setattr(store_module, "_LOAD", forgetful)
        found = await store.load(THIEF, payment_id)
        # Without the wall the very same statement gives it away.
        assert (found is None) is walled
        assert await store.load(VICTIM, payment_id) is not None


@pytest.mark.parametrize("walled", [False, True])
async def test_a_list_that_forgot_its_merchant_shows_others_payments_or_none(
    dsn: str, monkeypatch: pytest.MonkeyPatch, walled: bool
) -> None:
    async with opened(dsn, walled=walled) as store:
        await authorized(store, VICTIM)
        forgetful = without(store_module._LIST_PAYMENTS, r"merchant_id = (\$\d+::text)")
        monkeypatch.setattr(store_module, "_LIST_PAYMENTS", forgetful)
        page = await store.list_payments(ListFilter(THIEF, Mode.TEST, page_size=10))
        assert (page.payments == []) is walled


@pytest.mark.parametrize("walled", [False, True])
async def test_a_write_that_forgot_its_merchant_changes_another_ones_payment_or_nothing(
    dsn: str, monkeypatch: pytest.MonkeyPatch, walled: bool
) -> None:
    async with opened(dsn, walled=walled) as store:
        victims = await authorized(store, VICTIM)
        before = rows_of(dsn, VICTIM)
        forgetful = without(
            store_module._FOLLOWUP_INTENT,
            r"payment\.merchant_id = input\.merchant_id",
            r"payment\.merchant_id = source\.merchant_id",
        )
        monkeypatch.setattr(store_module, "_FOLLOWUP_INTENT", forgetful)
        intent = capture(victims)
        intent.payment.merchant_id = intent.operation.merchant_id = THIEF
        result = await store.write_intent(intent)
        if walled:
            assert result.stored is Stored.CONFLICT
        assert (rows_of(dsn, VICTIM) == before) is walled


async def test_a_row_of_a_merchant_outside_of_the_batch_is_refused(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(dsn) as store:
        authorize_row = rows.authorize_row
        # What a batch of another merchant's would meet: a row that slipped in.
        monkeypatch.setattr(
            rows, "authorize_row", lambda intent: (VICTIM, *authorize_row(intent)[1:])
        )
        with pytest.raises(RowRefused, match="42501"):
            await store.write_intent(authorize(THIEF))
    assert rows_of(dsn, VICTIM) == [[], [], []]


# --- what holds a session -------------------------------------------------------------------------


async def test_the_roles_of_the_lanes_see_nothing_until_they_are_told_for_whom(dsn: str) -> None:
    async with opened(dsn) as store:
        await authorized(store, VICTIM)
        for role in (row_security.READER, row_security.WRITER):
            connection = await asyncpg.connect(dsn, server_settings={"role": role})
            try:
                assert await connection.fetchval("SELECT count(*) FROM payments") == 0
                assert await connection.fetchval("SELECT current_user") == role
            finally:
                await connection.close()
        reader = await asyncpg.connect(dsn, server_settings={"role": row_security.READER})
        try:
            for statement in (
                "DELETE FROM payments",
                "UPDATE payments SET version = version",
                "SELECT * FROM api_keys",
                "SELECT * FROM merchants",
                "ALTER TABLE payments DISABLE ROW LEVEL SECURITY",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await reader.execute(statement)
        finally:
            await reader.close()


async def test_every_table_of_merchants_rows_is_protected_and_a_new_one_is_missed(
    dsn: str,
) -> None:
    assert any("is not protected" in each for each in await row_security.problems(dsn))
    await row_security.enable(dsn)
    await row_security.enable(dsn)
    assert await row_security.problems(dsn) == []
    fetch(dsn, "CREATE TABLE later (merchant_id text PRIMARY KEY)")
    assert await row_security.problems(dsn) == ["the table later is not protected"]
    await row_security.enable(dsn)
    assert await row_security.problems(dsn) == []
    await row_security.disable(dsn)
    assert len(await row_security.problems(dsn)) > 1


async def test_a_user_who_owns_nothing_serves_with_the_roles_alone(dsn: str, login: str) -> None:
    await row_security.enable(dsn, login)
    own = re.sub(r"//[^@]+@", f"//{login}:test@", dsn)
    assert await row_security.problems(own) == []
    async with PostgresStore(own, row_security=True) as store:
        await authorized(store, VICTIM)
        assert await store.expired(10) == 0
    other = await asyncpg.connect(own)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await other.fetch("SELECT * FROM payments")
    finally:
        await other.close()


@pytest.fixture
def login(postgres: PostgresForTests, dsn: str) -> Iterator[str]:
    """A user who owns nothing."""
    name = f"app_{ids.new_key_id()[-8:]}"
    fetch(dsn, f"CREATE ROLE {name} LOGIN PASSWORD 'test'")
    yield name
    fetch(dsn, f"DROP OWNED BY {name}")
    fetch(dsn, f"DROP ROLE {name}")


def logins_of(dsn: str, table: str) -> list[str]:
    rows = fetch(
        dsn,
        "SELECT roles[1] AS role FROM pg_policies"
        " WHERE tablename = $1 AND policyname = 'gateway_login'",
        table,
    )
    return [row["role"] for row in rows]


async def test_a_new_table_is_protected_for_the_same_user_and_the_others_are_not_locked(
    dsn: str, login: str
) -> None:
    await row_security.enable(dsn, login)
    fetch(dsn, "CREATE TABLE later (merchant_id text PRIMARY KEY)")
    reader = await asyncpg.connect(dsn)
    try:
        async with reader.transaction():
            await reader.fetch("SELECT FROM payments")  # as a gateway that is at work
            await row_security.enable(dsn, new_tables_only=True)
    finally:
        await reader.close()
    assert await row_security.problems(dsn) == []
    assert logins_of(dsn, "later") == logins_of(dsn, "payments") == [login]


async def test_for_another_user_every_table_is_protected_anew(dsn: str, login: str) -> None:
    await row_security.enable(dsn)
    assert logins_of(dsn, "payments") != [login]
    await row_security.enable(dsn, login, new_tables_only=True)
    assert logins_of(dsn, "payments") == [login]


async def test_an_owner_who_may_create_no_roles_protects_what_it_adds(
    postgres: PostgresForTests, dsn: str, login: str
) -> None:
    await row_security.enable(dsn, login)  # by somebody with more rights, once
    owner = f"own_{login}"
    fetch(dsn, f"CREATE ROLE {owner} LOGIN PASSWORD 'test'")
    try:
        [row] = fetch(dsn, "SELECT current_database() AS name")
        fetch(dsn, f'ALTER DATABASE "{row["name"]}" OWNER TO {owner}')
        for table in fetch(dsn, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
            fetch(dsn, f"ALTER TABLE {table['tablename']} OWNER TO {owner}")
        own = re.sub(r"//[^@]+@", f"//{owner}:test@", dsn)
        fetch(own, "CREATE TABLE later (merchant_id text PRIMARY KEY)")
        await row_security.enable(own, new_tables_only=True)
        assert await row_security.problems(dsn) == []
        assert logins_of(dsn, "later") == [login]
    finally:
        fetch(dsn, f"REASSIGN OWNED BY {owner} TO CURRENT_USER")
        fetch(dsn, f"DROP ROLE {owner}")


# --- nothing else changes -------------------------------------------------------------------------


async def test_merchants_of_one_batch_are_written_and_read_each_with_its_own(dsn: str) -> None:
    async with opened(dsn) as store:
        merchants = [ids.new_merchant_id() for _ in range(20)]
        intents = [authorize(each) for each in merchants for _ in range(3)]
        results = await asyncio.gather(*(store.write_intent(each) for each in intents))
        assert {each.stored for each in results} == {Stored.WRITTEN}
        changes = [outcome(intent.operation, intent.payment) for intent in intents]
        written = await asyncio.gather(*(store.write_change(each) for each in changes))
        assert set(written) == {Stored.WRITTEN}
        found = await asyncio.gather(
            *(store.load(each.payment.merchant_id, each.payment.payment_id) for each in intents)
        )
        assert [each and each.payment.payment_id for each in found] == [
            each.payment.payment_id for each in intents
        ]
        # A repeat whose first answer was lost is found again.
        again = await asyncio.gather(*(store.write_intent(each) for each in intents))
        assert {each.stored for each in again} == {Stored.DUPLICATE_KEY}


async def test_the_conditions_of_the_wall_choose_no_index(dsn: str) -> None:
    await row_security.enable(dsn)
    connection = await asyncpg.connect(dsn, server_settings={"role": row_security.READER})
    try:
        for statement in ("plan_cache_mode = force_generic_plan", "enable_seqscan = off"):
            await connection.execute(f"SET {statement}")
        plan = "\n".join(
            record[0]
            for record in await connection.fetch(
                "EXPLAIN SELECT * FROM payments"
                " WHERE merchant_id = 'mer_1' AND payment_id = 'pay_1'"
            )
        )
        assert "payments_pkey" in plan
        [condition] = re.findall(r"Index Cond: (.*)", plan)
        assert "merchant_id = 'mer_1'" in condition
        assert "current_setting" not in condition
        assert re.search(r"Filter: .*InitPlan", plan), plan
    finally:
        await connection.close()


async def test_notifications_of_many_merchants_are_kept_behind_the_wall_and_no_others(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(merchant_id: str) -> Received:
        return Received(merchant_id, "acc_1", Notification("psp", "evt_1", "event"))

    async with opened(dsn) as store:
        new = await asyncio.gather(
            *(store.notifications.keep([told(each)]) for each in (VICTIM, THIEF, VICTIM))
        )
        assert sum(new) == 2
        leased = await store.notifications.lease(10, 60)
        assert {each.received.merchant_id for each in leased} == {VICTIM, THIEF}
        monkeypatch.setattr(
            notifications_module, "_row", lambda each: ("mer_else", *_row_of(each)[1:])
        )
        with pytest.raises(RowRefused):
            await store.notifications.keep([told(ids.new_merchant_id())])


_row_of = notifications_module._row
