"""What the store tells about itself: doubts, the outbox, and the use of its connections."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from gateway.application.notifications import Notification, Received
from gateway.domain.model import OperationState
from storage.postgres import LaneLimits, PostgresStore
from storage.postgres.queries import queries, query, run
from storage.postgres.store import _ONLY_WAITS, DOUBT_AGE_BOUNDS_S
from tests.harness import eventually
from tests.outbox import connection_to, tell
from tests.servers import fetch
from tests.store_data import NEVER_S, authorize, outcome

S = OperationState
RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"


async def write(
    store: PostgresStore, state: OperationState, *, check_after_s: float = NEVER_S
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    after_s = None if state is S.SUCCEEDED else check_after_s
    await store.write_change(
        outcome(intent.operation, intent.payment, state, check_after_s=after_s)
    )


async def test_what_waits_for_a_later_answer_is_in_no_doubt(store: PostgresStore, dsn: str) -> None:
    await write(store, S.PENDING)
    assert fetch(dsn, "SELECT count(*) FROM doubts")[0][0] == 1
    assert (await store.count_doubts())[:2] == (0, 0.0)
    await write(store, S.IN_DOUBT)
    count, age_s, *_ = await store.count_doubts()
    assert (count, age_s > 0) == (1, True)


@pytest.mark.parametrize("state", [S.PENDING, S.REQUIRES_ACTION])
async def test_what_recovery_has_seen_waiting_is_counted_without_a_look_at_its_operation(
    store: PostgresStore, dsn: str, state: OperationState
) -> None:
    """Hundreds of thousands may wait, each of whose operations lies on a page of its own."""
    for _ in range(5):
        await write(store, state, check_after_s=-1)
    assert await _operations_looked_at(dsn) == 5
    for lease in await store.lease(100, NEVER_S):
        await store.postpone(lease.operation, NEVER_S)
    await write(store, S.IN_DOUBT)
    assert await _operations_looked_at(dsn) == 1
    assert (await store.count_doubts())[0] == 1


async def _operations_looked_at(dsn: str) -> int:
    """How many operations the count of doubts reads."""
    statement = queries("recovery")["count_doubts"]
    values = {
        "in_doubt": [S.PROCESSING, S.IN_DOUBT],
        "accepted": S.PENDING,
        "only_waits": _ONLY_WAITS,
        "age_bounds_s": DOUBT_AGE_BOUNDS_S,
    }
    async with connection_to(dsn) as connection:
        await run(connection, query("session", "plans"), transaction_timeout="20s", author="")
        told = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}",
            *(values[name] for name in statement.parameters),
        )
    looked = re.search(r'"Index Name": "operations_pkey".*?"Actual Loops": (\d+)', told, re.DOTALL)
    assert looked is not None, told
    return int(looked[1])


async def test_a_dead_sender_s_operation_is_in_doubt(store: PostgresStore) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    assert await store.expired(100) == 1
    assert (await store.count_doubts())[0] == 1


async def test_the_search_is_behind_by_what_is_older_than_its_horizon(
    store: PostgresStore, dsn: str
) -> None:
    assert await store.search_behind_s() == 0
    fetch(
        dsn,
        "UPDATE recovery_watermark SET created_before = now() - interval '1 hour',"
        " proposed_before = now() - interval '1 minute'",
    )
    behind_s = await store.search_behind_s()
    assert behind_s >= 3_600 - store._horizon_s
    await store.expired(10)
    await store.expired(10)
    assert await store.search_behind_s() < behind_s
    # A watermark that never came to be is as far behind as the first that was proposed.
    fetch(
        dsn,
        "UPDATE recovery_watermark SET created_before = '-infinity',"
        " proposed_before = now() - interval '1 hour'",
    )
    assert await store.search_behind_s() >= 3_600 - store._horizon_s


async def test_the_outbox_is_estimated_by_the_server_s_statistics(
    store: PostgresStore, dsn: str
) -> None:
    for _ in range(3):
        await write(store, S.SUCCEEDED)
    events = int(fetch(dsn, "SELECT count(*) FROM outbox")[0][0])
    assert events >= 3
    fetch(dsn, "ANALYZE outbox")
    assert await store.estimate_outbox() == events


async def test_a_lane_s_connections_are_open_and_busy_while_a_statement_runs(
    store: PostgresStore, dsn: str
) -> None:
    pool = store.pools["direct"]
    assert (pool.size, pool.connected, pool.busy) == (2, 2, 0)
    busy_s = pool.busy_s
    blocker = await asyncpg.connect(dsn)
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE doubts IN ACCESS EXCLUSIVE MODE")
            counting = asyncio.create_task(store.count_doubts())
            await eventually(
                lambda: fetch(dsn, "SELECT 1 FROM pg_locks WHERE NOT granted"), "it waits"
            )
            assert pool.busy == 1
            assert pool.busy_s == busy_s
        await counting
    finally:
        await blocker.close()
    assert pool.busy == 0
    assert pool.busy_s > busy_s


async def test_the_statements_of_runbooks_run_and_find_what_waits(dsn: str) -> None:
    async with PostgresStore(dsn, notifications=LaneLimits()) as store:
        await write(store, S.PENDING)
        await write(store, S.IN_DOUBT)
        await store.write_intent(authorize())
        told = Notification("stripe", "evt_1", "charge.refunded")
        assert await store.notifications.keep([Received("mer_1", "acc_1", told)]) == 1
    text = "".join(path.read_text("utf-8") for path in sorted(RUNBOOKS.glob("*.md")))
    statements = re.findall(r"^```\n(SELECT .*?)^```", text, re.MULTILINE | re.DOTALL)
    assert statements
    async with connection_to(dsn) as connection, connection.transaction():
        await tell(connection, "mer_1")  # which keeps other events back
        for statement in statements:
            assert len(fetch(dsn, statement)) == 1
