"""The store under races and faults: other gateways, lost answers, a killed server, late commits."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import asyncpg
import pytest

from gateway.application.ports import Change, IntentResult, Stored, StoreUnavailable
from gateway.application.routing_administration import Author
from gateway.domain import ids
from gateway.domain.errors import Reason
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    Mode,
    Operation,
    OperationState,
    Payment,
    Verdict,
)
from gateway.routing.availability import Suspension, SuspensionKind
from storage.postgres import LaneLimits, PostgresStore, rows, search
from storage.postgres.lanes import LaneRow
from storage.postgres.pool import ConnectionSettings, connect
from storage.postgres.queries import query, run
from storage.postgres.store import _ADD_EVIDENCE, _UNFINISHED, DIRECT, _write_changes
from tests.memory_store import INCAPABLE, Bench, ScriptedConnector
from tests.servers import fetch, postgres_server
from tests.store_data import (
    MERCHANT,
    NEVER_S,
    authorize,
    authorized,
    capture,
    outcome,
    restarted,
    stored,
)

if TYPE_CHECKING:
    from storage.batching import Failure
    from tests.memory_store import MemoryStore
    from tests.servers import PostgresForTests

S = OperationState
T = TypeVar("T")
WAIT_S = 60.0
"""What is waited for here happens, or the rule is broken."""
OUTAGE = LaneLimits(connections=1, retry_s_max=WAIT_S)
"""For rows that are to outlast a restart of the server."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    with postgres_server() as server:
        yield server


class Failures:
    """What the lanes tell of failed batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Failure]] = []
        self.batches: list[int] = []

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        if lane == "changes":
            self.batches.append(rows)

    def batch_failed(self, lane: str, rows: int, failure: Failure) -> None:
        self.seen.append((lane, failure))


@asynccontextmanager
async def transaction(dsn: str) -> AsyncIterator[tuple[Any, Callable[[], Awaitable[None]]]]:
    """A connection as the store's are, within a transaction, and how to commit it."""
    connection = await connect(ConnectionSettings(dsn), "test")
    open_ = connection.transaction()
    await open_.start()
    try:
        yield connection, open_.commit
    finally:
        await connection.close()


# --- deadlocks ---


async def test_overlapping_batches_of_two_gateways_never_deadlock_and_lose_nothing(
    dsn: str,
) -> None:
    """Changes, captures, recovery's leases and evidence on the same payments, in all orders."""
    payments_, rounds, tasks = 24, 25, 24
    answer = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
    failures = Failures()
    written = dict.fromkeys(range(payments_), 0)
    limits = LaneLimits(connections=2, rows_max=20)

    async def change_all(store: PostgresStore, operations: list[Operation], seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(rounds):
            order = list(range(payments_))
            choice.shuffle(order)
            n = order[0]
            operation, payment = await stored(store, operations[n])
            kind = choice.randrange(4)
            if kind == 0:
                intent = capture(payment, 1)
                done = (await store.write_intent(intent)).stored
            elif kind == 1:
                done = await store.write_change(outcome(operation, payment, S.SUCCEEDED))
            else:
                change = outcome(operation, payment, S.PENDING, check_after_s=0)
                done = await store.write_change(change)
            if done is Stored.WRITTEN:
                written[n] += 1

    async def recover(store: PostgresStore, stop: asyncio.Event) -> None:
        while not stop.is_set():
            for lease in await store.lease(8, 0):
                await store.add_evidence(lease.operation, answer)
                await store.postpone(lease.operation, 0)
            await store.expired(8)

    async with (
        PostgresStore(dsn, changes=limits, follow_ups=limits, metrics=failures) as one,
        PostgresStore(dsn, changes=limits, follow_ups=limits, metrics=failures) as two,
    ):
        intents = [authorize(amount_minor=10_000) for _ in range(payments_)]
        for intent in intents:
            await one.write_intent(intent)
            await one.write_change(
                outcome(intent.operation, intent.payment, S.PENDING, check_after_s=0)
            )
        operations = [intent.operation for intent in intents]
        stop = asyncio.Event()
        recoverers = [asyncio.ensure_future(recover(store, stop)) for store in (one, two)]
        await asyncio.gather(
            *(change_all(store, operations, seed) for seed in range(tasks) for store in (one, two))
        )
        stop.set()
        await asyncio.gather(*recoverers)
        versions = [(await stored(one, operation))[1].version for operation in operations]
    assert versions == [2 + written[n] for n in range(payments_)]
    assert sum(written.values()) > payments_
    assert failures.seen == []
    [deadlocks] = fetch(
        dsn, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert deadlocks[0] == 0


async def test_batches_of_changes_in_opposite_orders_wait_and_are_all_written(dsn: str) -> None:
    rounds, payments_ = 20, 100
    failures = Failures()
    limits = LaneLimits(connections=2, rows_max=50)

    async def each_round(store: PostgresStore, operations: list[Operation]) -> int:
        """One batch after another over all payments, in this order; how many were written."""
        count = 0
        for _ in range(rounds):
            now = await asyncio.gather(*(stored(store, each) for each in operations))
            changes = [outcome(*each, S.PENDING) for each in now]
            results = await asyncio.gather(*map(store.write_change, changes))
            count += results.count(Stored.WRITTEN)
        return count

    async with (
        PostgresStore(dsn, changes=limits, metrics=failures) as one,
        PostgresStore(dsn, changes=limits, metrics=failures) as two,
    ):
        intents = [authorize() for _ in range(payments_)]
        await asyncio.gather(*(one.write_intent(intent) for intent in intents))
        operations = [intent.operation for intent in intents]
        counts = await asyncio.gather(
            each_round(one, operations), each_round(two, operations[::-1])
        )
        versions = [(await stored(one, operation))[1].version for operation in operations]
    assert sum(counts) == sum(version - 1 for version in versions)
    assert max(failures.batches) > 10
    assert failures.seen == []


# --- locks ---


@asynccontextmanager
async def locked(dsn: str, payment: Payment) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Somebody else's transaction that holds the payment's row until the block ends."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute(
                "SELECT FROM payments WHERE merchant_id = $1 AND payment_id = $2 FOR UPDATE",
                payment.merchant_id,
                payment.payment_id,
            )
            yield connection
    finally:
        await connection.close()


async def until_waiting(dsn: str, waiters: int = 1) -> None:
    """Return when so many sessions of the database wait for a lock."""
    connection = await asyncpg.connect(dsn)
    try:
        while True:
            found = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if found >= waiters:
                return
    finally:
        await connection.close()


@pytest.mark.parametrize("check_after_s", [None, 5.0], ids=["plain", "with doubt"])
@pytest.mark.parametrize("changed", [None, "version", "epoch"])
async def test_who_waited_for_a_payment_sees_it_as_it_is_then(
    dsn: str, check_after_s: float | None, changed: str | None
) -> None:
    async with PostgresStore(dsn) as store:
        intent = authorize()
        await store.write_intent(intent)
        change = outcome(intent.operation, intent.payment, S.PENDING, check_after_s=check_after_s)
        async with locked(dsn, intent.payment) as holder:
            waiting = asyncio.ensure_future(store.write_change(change))
            await until_waiting(dsn)
            if changed == "version":
                await holder.execute("UPDATE payments SET version = version + 1")
            elif changed == "epoch":
                await holder.execute("UPDATE operations SET epoch = epoch + 1")
        result = await asyncio.wait_for(waiting, WAIT_S)
        assert result is (Stored.CONFLICT if changed else Stored.WRITTEN)
        state = (await stored(store, intent.operation))[0].state
        assert state is (S.PROCESSING if changed else S.PENDING)


async def test_a_follow_up_that_waited_reserves_nothing_from_an_earlier_version(dsn: str) -> None:
    async with PostgresStore(dsn) as store:
        payment = await authorized(store)
        intent = capture(payment)
        async with locked(dsn, payment) as holder:
            waiting = asyncio.ensure_future(store.write_intent(intent))
            await until_waiting(dsn)
            await holder.execute("UPDATE payments SET version = version + 1, authorized_minor = 0")
        assert (await asyncio.wait_for(waiting, WAIT_S)).stored is Stored.CONFLICT
        assert await store.find_operation(MERCHANT, intent.operation.operation_id) is None


async def test_recovery_passes_over_a_payment_that_is_being_changed(dsn: str) -> None:
    async with PostgresStore(dsn) as store:
        busy, idle = authorize(recover_after_s=-1), authorize(recover_after_s=-1)
        for intent in (busy, idle):
            await store.write_intent(intent)
        async with locked(dsn, busy.payment):
            assert await store.expired(10) == 1
            [lease] = await store.lease(10, NEVER_S)
            assert lease.operation.operation_id == idle.operation.operation_id
        assert await store.expired(10) == 1
        [lease] = await store.lease(10, NEVER_S)
        assert lease.operation.operation_id == busy.operation.operation_id


async def test_evidence_waits_for_a_change_and_is_refused_by_its_definite_outcome(
    dsn: str,
) -> None:
    answer = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
    async with PostgresStore(dsn) as store:
        intent = authorize()
        await store.write_intent(intent)
        async with locked(dsn, intent.payment) as holder:
            adding = asyncio.ensure_future(store.add_evidence(intent.operation, answer))
            await until_waiting(dsn)
            await holder.execute("UPDATE operations SET state = $1", int(S.NOT_SENT))
        assert not await asyncio.wait_for(adding, WAIT_S)
        assert (await store.count_doubts())[0] == 0


async def test_what_recovery_forgets_is_never_an_attempt_that_begins_at_that_moment(
    dsn: str,
) -> None:
    async with PostgresStore(dsn) as store, transaction(dsn) as (holder, committed):
        intent = authorize(recover_after_s=-1)
        await store.write_intent(intent)
        assert await store.expired(10) == 1
        change = outcome(intent.operation, intent.payment, S.NOT_SENT)
        assert await store.write_change(change) is Stored.WRITTEN
        [lease] = await store.lease(10, NEVER_S)
        operation, payment = await stored(store, intent.operation)
        change = restarted(operation, payment, recover_after_s=-1)
        await _write_changes(holder, [LaneRow(change, time.monotonic() + WAIT_S)])
        forgetting = asyncio.ensure_future(store.forget(lease.operation))
        await until_waiting(dsn)
        await committed()
        await asyncio.wait_for(forgetting, WAIT_S)
        [found] = await store.lease(10, NEVER_S)
        assert (found.operation.state, found.operation.attempt.number) == (S.PROCESSING, 2)


async def test_that_an_attempt_was_being_cancelled_is_forgotten_with_it_whatever_comes_between(
    dsn: str,
) -> None:
    answer = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED, attempt_number=1)
    async with PostgresStore(dsn) as store, transaction(dsn) as (holder, committed):
        intent = authorize()
        await store.write_intent(intent)
        await store.write_change(
            outcome(intent.operation, intent.payment, S.IN_DOUBT, check_after_s=-1)
        )
        [lease] = await store.lease(10, NEVER_S)
        assert await store.begin_cancel(lease.operation)
        operation, payment = await stored(store, intent.operation)
        added = await run(
            holder,
            _ADD_EVIDENCE,
            merchant_id=operation.merchant_id,
            payment_id=operation.payment_id,
            operation_id=operation.operation_id,
            attempt_number=1,
            epoch=operation.epoch,
            evidence=rows.answer_json(answer),
            seen_to=[],
            unfinished=_UNFINISHED,
        )
        assert added
        settling = asyncio.ensure_future(
            store.write_change(outcome(operation, payment, S.NOT_SENT))
        )
        await until_waiting(dsn)
        await committed()
        assert await asyncio.wait_for(settling, WAIT_S) is Stored.WRITTEN
        # The client repeats, and the next attempt waits for its customer.
        operation, payment = await stored(store, operation)
        await store.write_change(restarted(operation, payment))
        operation, payment = await stored(store, operation)
        await store.write_change(outcome(operation, payment, S.REQUIRES_ACTION, check_after_s=-1))
        [lease] = await store.lease(10, NEVER_S)
        assert lease.operation.attempt.number == 2
        assert not lease.cancel_begun


async def test_every_answer_in_hand_is_kept_where_another_gateway_took_all_of_them_over(
    dsn: str,
) -> None:
    """More of them at once than the lane of rare calls has room for."""
    calls = DIRECT.queue_max + 50
    psp = ScriptedConnector(replace(INCAPABLE, answer_timeout_s=0.0))
    async with PostgresStore(dsn) as near, PostgresStore(dsn) as far:
        here, there = (Bench(psp, store=cast("MemoryStore", each)) for each in (near, far))
        reached, back = asyncio.Semaphore(0), asyncio.Event()
        write = near.write_change

        async def cut_off(change: Change) -> Stored:
            reached.release()
            await back.wait()
            return await write(change)

        near.write_change = cut_off  # type: ignore[method-assign]
        answers = [
            asyncio.ensure_future(here.payments.authorize(here.authorize(f"key-{number}")))
            for number in range(calls)
        ]
        for _ in range(calls):
            await reached.acquire()
        past = "now() - interval '1 second'"
        await asyncio.to_thread(fetch, dsn, f"UPDATE operations SET recover_after = {past}")
        while (await far.count_doubts())[0] < calls:
            await there.recovery.run_once()
        back.set()
        await asyncio.gather(*answers)  # which raises what one of them was refused for
        while await there.recovery.run_once():
            pass
        states = await asyncio.to_thread(fetch, dsn, "SELECT DISTINCT state FROM operations")
        assert [S(row["state"]) for row in states] == [S.SUCCEEDED]
        assert (await far.count_doubts())[0] == 0


# --- lost answers ---


class Proxy:
    """A TCP proxy that can cut a connection after the server's answer and before the client's."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._armed = False
        self.cuts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def cut_next_answer(self) -> None:
        self._armed = True

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """The port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(*self._target)

        async def forward() -> None:
            while data := await reader.read(65536):
                to_server.write(data)

        async def back() -> None:
            answer = b""
            while data := await from_server.read(65536):
                if not self._armed:
                    writer.write(data)
                    continue
                answer += data
                # ReadyForQuery outside a transaction: the server has committed.
                if answer.endswith(b"Z\x00\x00\x00\x05I"):
                    self._armed = False
                    self.cuts += 1
                    return

        halves = [asyncio.ensure_future(forward()), asyncio.ensure_future(back())]
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)
            writer.transport.abort()
            to_server.transport.abort()


@asynccontextmanager
async def store_behind(
    proxy: Proxy, dsn: str, direct: LaneLimits | None = None
) -> AsyncIterator[PostgresStore]:
    one = LaneLimits(connections=1)
    async with proxy.serving() as port:
        through = dsn.replace(f":{urlsplit(dsn).port}/", f":{port}/")
        async with PostgresStore(
            through, intents=one, follow_ups=one, changes=one, reads=one, direct=direct or one
        ) as store:
            yield store


def proxy_to(dsn: str) -> Proxy:
    parts = urlsplit(dsn)
    assert parts.hostname is not None
    assert parts.port is not None
    return Proxy(parts.hostname, parts.port)


async def test_intents_whose_commit_is_not_answered_are_written_once_and_said_to_be(
    dsn: str,
) -> None:
    proxy = proxy_to(dsn)
    async with store_behind(proxy, dsn) as store:
        await store.write_intent(authorize(key="taken"))
        intents = [authorize() for _ in range(10)]
        duplicate = authorize(key="taken")
        proxy.cut_next_answer()
        results = await asyncio.gather(
            *(store.write_intent(intent) for intent in [*intents, duplicate])
        )
        assert proxy.cuts == 1
        assert [result.stored for result in results[:-1]] == [Stored.WRITTEN] * 10
        assert results[-1].stored is Stored.DUPLICATE_KEY
        for intent, result in zip(intents, results[:-1], strict=True):
            operation, _ = await stored(store, intent.operation)
            assert operation.created_at == result.at
    assert fetch(dsn, "SELECT count(*) FROM operations")[0][0] == 11


async def test_a_reservation_whose_commit_is_not_answered_is_made_once(dsn: str) -> None:
    proxy = proxy_to(dsn)
    async with store_behind(proxy, dsn) as store:
        first, second = await authorized(store), await authorized(store)
        await store.write_intent(capture(second))
        intent = capture(first, 6_000)
        proxy.cut_next_answer()
        assert (await store.write_intent(intent)).stored is Stored.WRITTEN
        assert proxy.cuts == 1
        _, payment = await stored(store, intent.operation)
        assert (payment.capture_pending_minor, payment.version) == (6_000, first.version + 1)


@pytest.mark.parametrize("check_after_s", [None, 5.0], ids=["plain", "with doubt"])
async def test_an_outcome_whose_commit_is_not_answered_is_written_once(
    dsn: str, check_after_s: float | None
) -> None:
    proxy = proxy_to(dsn)
    async with store_behind(proxy, dsn) as store:
        intents = [authorize() for _ in range(3)]
        for intent in intents:
            await store.write_intent(intent)
        changes = [
            outcome(intent.operation, intent.payment, S.PENDING, check_after_s=check_after_s)
            for intent in intents
        ]
        await store.write_change(changes[0])
        proxy.cut_next_answer()
        results = await asyncio.gather(*map(store.write_change, changes[1:]))
        assert proxy.cuts == 1
        assert [result.name for result in results] == ["WRITTEN", "WRITTEN"]
        for change in changes:
            assert (await stored(store, change.operation))[1].version == 2
    assert fetch(dsn, "SELECT count(*) FROM outbox")[0][0] == 3


async def test_costs_that_are_put_at_once_get_versions_of_their_own(
    store: PostgresStore, dsn: str
) -> None:
    merchant_id = await store.accounts.create_merchant(
        await store.accounts.create_organisation("o"), "m"
    )
    other = await asyncpg.connect(dsn)
    try:
        async with other.transaction():
            await other.execute(
                "INSERT INTO routing_costs (merchant_id, version, body, reason, created_by)"
                " VALUES ($1, 1, 'theirs', 'ticket 1', 'login:ben')",
                merchant_id,
            )
            put = asyncio.ensure_future(
                store.routing_controls.put_costs(
                    merchant_id, "ours", reason="ticket 2", created_by="login:ann"
                )
            )
            await until_waiting(dsn)
        assert (await asyncio.wait_for(put, WAIT_S)).version == 2
    finally:
        await other.close()
    versions = await store.routing_controls.costs_of(merchant_id, 10)
    assert [each.body for each in versions] == ["ours", "theirs"]


# --- a server that goes away ---


async def test_what_a_person_makes_is_made_once_where_its_commit_is_not_answered(dsn: str) -> None:
    proxy = proxy_to(dsn)
    tables = ("organisations", "merchants", "api_keys", "connector_suspensions")
    async with store_behind(proxy, dsn, direct=OUTAGE) as store:

        async def make_twice(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
            await make()  # its statement is prepared: the next answer is that of a commit
            proxy.cut_next_answer()
            return await make()

        accounts = store.accounts
        of = await make_twice(lambda: accounts.create_organisation("o"))
        await make_twice(lambda: accounts.create_merchant(of, "m"))
        await make_twice(lambda: accounts.create_key(of, scopes=["payments:read"], mode="test"))
        await make_twice(
            lambda: store.routing_controls.suspend(
                SuspensionKind.KILL, "stripe", reason="ticket 1", created_by="login:ann"
            )
        )
        assert proxy.cuts == len(tables)
    for table in tables:
        assert fetch(dsn, f"SELECT count(*) FROM {table}")[0][0] == 2, table


async def test_what_a_person_changes_of_routing_is_changed_though_its_commit_is_not_answered(
    dsn: str,
) -> None:
    proxy = proxy_to(dsn)
    async with store_behind(proxy, dsn, direct=OUTAGE) as store:
        merchant_id = await store.accounts.create_merchant(
            await store.accounts.create_organisation("o"), "m"
        )
        rules, controls = store.routing_rules, store.routing_controls
        author = Author("login:ann", "It was better before, ticket 2.")

        async def put(text: str) -> int:
            return await rules.put(merchant_id, Mode.TEST, text, author)

        async def activate(version: int, expected: int) -> bool:
            return await rules.activate(merchant_id, Mode.TEST, version, expected, author)

        async def kill() -> str:
            kind, reason = SuspensionKind.KILL, author.reason
            killed = await controls.suspend(kind, "stripe", reason=reason, created_by=author.name)
            return killed.suspension_id

        async def revive(suspension_id: str) -> Suspension | None:
            return await controls.end_suspension(
                suspension_id, reason=author.reason, ended_by=author.name
            )

        async def put_costs(body: str) -> int:
            put = await controls.put_costs(
                merchant_id, body, reason=author.reason, created_by=author.name
            )
            return put.version

        # Each statement is prepared by a first call: the next answer is that of a commit.
        first, switches = await put("one"), [await kill(), await kill()]
        proxy.cut_next_answer()
        second = await put("two")
        assert (first, second) == (1, 2)
        await activate(first, 0)
        proxy.cut_next_answer()
        assert await activate(second, first)
        assert not await activate(first, 0)
        await revive(switches[0])
        proxy.cut_next_answer()
        assert await revive(switches[1]) is not None
        await put_costs("one")
        proxy.cut_next_answer()
        assert await put_costs("two") == 2
        assert proxy.cuts == 4
        assert await rules.active(merchant_id, Mode.TEST) == second
        assert await controls.suspensions() == []
    for table in ("routing_rules", "routing_activations", "routing_costs"):
        assert fetch(dsn, f"SELECT count(*) FROM {table}")[0][0] == 2, table


async def test_no_write_that_was_confirmed_is_lost_when_the_server_is_killed(
    postgres: PostgresForTests, dsn: str
) -> None:
    confirmed: list[Operation] = []
    enough = asyncio.Event()
    stop = asyncio.Event()

    async def pay(store: PostgresStore) -> None:
        while not stop.is_set():
            intent = authorize()
            result = await store.write_intent(intent)
            assert result.stored is Stored.WRITTEN
            change = outcome(intent.operation, intent.payment)
            assert await store.write_change(change) is Stored.WRITTEN
            confirmed.append(change.operation)
            if len(confirmed) % 300 == 0:
                enough.set()

    async with PostgresStore(
        dsn, intents=OUTAGE, changes=OUTAGE, reads=OUTAGE, connect_timeout_s=WAIT_S
    ) as store:
        writers = [asyncio.ensure_future(pay(store)) for _ in range(40)]
        for _ in range(2):
            await asyncio.wait_for(enough.wait(), WAIT_S)
            postgres.server.kill()
            postgres.server.start()
            enough.clear()
        await asyncio.wait_for(enough.wait(), WAIT_S)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*writers), WAIT_S)
        for operation in confirmed:
            found = await store.find_operation(MERCHANT, operation.operation_id)
            assert found is not None
            assert found.operation.state is S.SUCCEEDED
            assert found.payment.version == 2
    assert fetch(dsn, "SELECT count(*) FROM operations")[0][0] == len(confirmed)
    assert fetch(dsn, "SELECT count(*) FROM outbox")[0][0] == len(confirmed)


async def test_while_the_server_is_away_intents_are_refused_and_outcomes_wait(
    postgres: PostgresForTests, dsn: str
) -> None:
    quick = LaneLimits(connections=1, retry_s_max=0)
    async with PostgresStore(dsn, intents=quick, reads=quick, changes=OUTAGE) as store:
        intent = authorize()
        await store.write_intent(intent)
        postgres.server.stop()
        outcome_ = asyncio.ensure_future(
            store.write_change(outcome(intent.operation, intent.payment))
        )
        with pytest.raises(StoreUnavailable):
            await store.write_intent(authorize())
        with pytest.raises(StoreUnavailable):
            await store.load(MERCHANT, ids.new_payment_id())
        with pytest.raises(StoreUnavailable):
            await store.check()
        assert not outcome_.done()
        postgres.server.start()
        assert await asyncio.wait_for(outcome_, WAIT_S) is Stored.WRITTEN


async def test_a_store_opens_without_its_server_and_serves_when_it_is_there(
    postgres: PostgresForTests, dsn: str
) -> None:
    postgres.server.stop()
    async with PostgresStore(dsn, intents=OUTAGE) as store:
        writing = asyncio.ensure_future(store.write_intent(authorize()))
        await asyncio.sleep(0)
        assert not writing.done()
        postgres.server.start()
        result: IntentResult = await asyncio.wait_for(writing, WAIT_S)
    assert result.stored is Stored.WRITTEN


# --- the scan for dead senders ---


async def test_an_intent_that_commits_after_many_looks_is_found_all_the_same(dsn: str) -> None:
    """Its created_at is when its transaction began: a watermark by time alone would have passed."""
    late = authorize(recover_after_s=-1)
    async with PostgresStore(dsn) as store:
        store._horizon_s = 0.0  # so that the transaction below is older than it
        for _ in range(3):
            assert await store.expired(10) == 0
        await store.write_intent(late)
        async with locked(dsn, (await authorized(store, ids.new_merchant_id()))) as connection:
            await connection.execute(
                "INSERT INTO operations SELECT (o).* FROM (SELECT jsonb_populate_record("
                "o, jsonb_build_object('operation_id', $1::text, 'idempotency_key', $1::text,"
                " 'created_at', now())) AS o FROM operations AS o WHERE state = 1) AS copy",
                ids.new_operation_id(),
            )
            began = await connection.fetchval("SELECT now()")
            assert await store.expired(10) == 1
            for _ in range(20):
                assert await store.expired(10) == 0
            [mark] = fetch(dsn, "SELECT created_before FROM recovery_watermark")
            assert mark[0] <= began
        assert await store.expired(10) == 1
        # And with nothing in the way the watermark goes on.
        for _ in range(3):
            await store.expired(10)
        [mark] = fetch(dsn, "SELECT created_before FROM recovery_watermark")
        assert mark[0] > began


async def test_the_watermark_waits_for_a_sender_that_may_yet_die(dsn: str) -> None:
    async with PostgresStore(dsn) as store:
        store._horizon_s = 0.0
        alive = authorize(recover_after_s=NEVER_S)
        created_at = (await store.write_intent(alive)).at
        for _ in range(5):
            assert await store.expired(10) == 0
        [mark] = fetch(dsn, "SELECT created_before FROM recovery_watermark")
        assert mark[0] <= created_at
        fetch(dsn, "UPDATE operations SET recover_after = now() - interval '1 second'")
        assert await store.expired(10) == 1


async def test_a_clock_that_was_set_back_hides_no_dead_sender(dsn: str) -> None:
    async with PostgresStore(dsn) as store:
        fetch(
            dsn,
            "UPDATE recovery_watermark SET created_before = now() + interval '1 hour',"
            " proposed_before = now() + interval '1 hour'",
        )
        await store.write_intent(authorize(recover_after_s=-1))
        assert await store.expired(10) == 1
        [mark] = fetch(dsn, "SELECT created_before < now() FROM recovery_watermark")
        assert mark[0]


async def test_many_gateways_looking_at_once_find_every_dead_sender_once(dsn: str) -> None:
    async with PostgresStore(dsn) as one, PostgresStore(dsn) as two:
        intents = [authorize(recover_after_s=-1) for _ in range(200)]
        found = 0

        async def look(store: PostgresStore) -> None:
            nonlocal found
            while found < len(intents):
                put = await store.expired(7)
                found += put

        await asyncio.wait_for(
            asyncio.gather(*(one.write_intent(intent) for intent in intents), look(one), look(two)),
            WAIT_S,
        )
        assert found == len(intents)
        assert (await one.count_doubts())[0] == len(intents)


async def test_a_gateway_that_stops_between_preparing_and_using_a_statement_keeps_no_locks(
    dsn: str,
) -> None:
    """Nothing of ours is idle then to PostgreSQL: the whole transaction has a limit of its own."""
    connection = await connect(ConnectionSettings(dsn), "stopped")
    ended = asyncio.Event()
    connection.add_termination_listener(lambda _: ended.set())
    limit = "SELECT setting::int FROM pg_settings WHERE name = 'transaction_timeout'"
    assert await connection.fetchval(limit) > 0
    await connection.execute("SET transaction_timeout = '200ms'")
    await connection.execute("BEGIN")
    await connection.prepare("SELECT 1")  # and never again a word
    async with asyncio.timeout(30):  # it hangs otherwise
        await ended.wait()


@pytest.mark.parametrize("statement_timeout_s", [10.0, 300.0])
async def test_no_transaction_is_ended_before_its_statement_may_be(
    dsn: str, statement_timeout_s: float
) -> None:
    settings = ConnectionSettings(dsn, statement_timeout_s=statement_timeout_s)
    connection = await connect(settings, "slow")
    [[limit_ms]] = await connection.fetch(
        "SELECT setting::int FROM pg_settings WHERE name = 'transaction_timeout'"
    )
    await connection.close()
    assert limit_ms / 1000 > settings.answer_timeout_s


# --- the scan by slices ---


_FINISHED_SINCE = """
INSERT INTO operations
SELECT (copy.operation).*
FROM (
    SELECT jsonb_populate_record(operation, jsonb_build_object(
        'operation_id', 'op_' || n, 'idempotency_key', 'key_' || n, 'state', $1::int2,
        'created_at', now() - n * interval '1 second'
    )) AS operation
    FROM operations AS operation, generate_series(1, $2::int8) AS n
) AS copy
"""


async def _finished_since(store: PostgresStore, dsn: str, seconds: int) -> None:
    """An operation for each of so many seconds until now, all of them with their outcome."""
    await store.write_intent(authorize(recover_after_s=NEVER_S))
    fetch(dsn, _FINISHED_SINCE, int(S.SUCCEEDED), seconds)
    fetch(dsn, "DELETE FROM operations WHERE state = 1 RETURNING 1")
    fetch(dsn, "SELECT brin_summarize_new_values('operations_created_at')")


@asynccontextmanager
async def open_transaction(dsn: str) -> AsyncIterator[None]:
    """Somebody's in another database of the server: it has an id, and does nothing."""
    elsewhere = await asyncpg.connect(urlsplit(dsn)._replace(path="/postgres").geturl())
    try:
        await elsewhere.execute("BEGIN")
        await elsewhere.fetchval("SELECT pg_current_xact_id()")
        yield
    finally:
        await elsewhere.close()


async def _read_by(store: PostgresStore, dsn: str, limit: int = 10) -> int:
    """How many operations a search reads."""
    flush = query("recovery", "search_behind")
    flush = replace(flush, text="SELECT pg_stat_force_next_flush()")
    reads = "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'operations'"
    await store._direct.fetch(flush)
    [[before]] = fetch(dsn, reads)
    await store.expired(limit)
    await store._direct.fetch(flush)
    [[after]] = fetch(dsn, reads)
    return int(after) - int(before)


async def _created_before(dsn: str) -> datetime:
    [[mark]] = fetch(dsn, "SELECT created_before FROM recovery_watermark")
    assert isinstance(mark, datetime)
    return mark


def test_however_large_operations_is_its_newest_part_is_soon_no_more_than_one_slice(
    dsn: str,
) -> None:
    """What BRIN does not cover yet is read by each slice; a vacuum covers it, of its own accord
    after so many new rows (PostgreSQL's manual, "Routine Vacuuming": never mind the table's size).
    """
    [row] = fetch(dsn, "SELECT reloptions FROM pg_class WHERE oid = 'operations'::regclass")
    options = dict(option.split("=") for option in row["reloptions"])
    assert float(options["autovacuum_vacuum_insert_scale_factor"]) == 0
    assert int(options["autovacuum_vacuum_insert_threshold"]) < search.SEARCH_ROWS_MAX


async def test_while_a_transaction_stays_open_a_search_reads_what_is_new_alone(dsn: str) -> None:
    async with PostgresStore(dsn) as store:
        async with open_transaction(dsn):
            await _finished_since(store, dsn, 7_200)
            for _ in range(3):
                await store.expired(10)
            assert await _read_by(store, dsn) < 1_000
            await store.write_intent(authorize(recover_after_s=-1))
            assert await store.expired(10) == 1
        assert await _read_by(store, dsn) > 7_000
        assert await _read_by(store, dsn) < 1_000


async def test_while_a_transaction_stays_open_who_dies_late_is_found_too(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SEARCH_ROWS_MAX", 3)
    async with PostgresStore(dsn) as store, open_transaction(dsn):
        store._horizon_s = 0.0
        await store.write_intent(authorize(recover_after_s=NEVER_S))
        for _ in range(10):
            intent = authorize()
            await store.write_intent(intent)
            await store.write_change(outcome(intent.operation, intent.payment))
            await store.expired(10)
        fetch(dsn, "UPDATE operations SET recover_after = now() - interval '1 s' WHERE state = 1")
        assert await store.expired(10) == 1


async def test_a_watermark_that_was_held_back_comes_forward_slice_by_slice(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_max = 100
    monkeypatch.setattr(search, "SEARCH_ROWS_MAX", rows_max)
    monkeypatch.setattr(search, "SEARCH_SLICES_BEHIND_MAX", 12)
    async with PostgresStore(dsn) as store:
        await _finished_since(store, dsn, 3_600)
        fetch(
            dsn,
            "UPDATE recovery_watermark SET created_before = now() - interval '1 hour',"
            " proposed_before = now() - interval '61 s' RETURNING 1",
        )
        marks = [await _created_before(dsn)]
        while marks[-1] < datetime.now(UTC) - timedelta(seconds=90):
            await store.expired(10)
            marks.append(await _created_before(dsn))
            assert marks[-1] > marks[-2]
        assert len(marks) > 3
        # Where there is no more to catch up with, no more is read than before.
        assert await _read_by(store, dsn) < 1_000


async def test_a_search_that_takes_too_long_reads_less_the_next_time(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too much is not known before: here more than 1,200 operations."""
    statement = search._PUT_EXPIRED

    async def limited(connection: Any, statement_: Any, /, **values: Any) -> Any:
        if statement_ is statement:
            created = values["created_from"], values["created_until"]
            rows = await connection.fetchval(
                "SELECT count(*) FROM operations WHERE created_at >= $1 AND created_at < $2",
                *created,
            )
            if min(rows, values["rows_max"] or rows) > 1_200:
                raise asyncpg.QueryCanceledError("canceling statement due to statement timeout")
        return await run(connection, statement_, **values)

    monkeypatch.setattr(search, "run", limited)
    async with PostgresStore(dsn, direct=replace(DIRECT, retry_s_max=0)) as store:
        await _finished_since(store, dsn, 7_200)
        await store.write_intent(authorize(recover_after_s=-1))
        with pytest.raises(StoreUnavailable):
            await store.expired(10)
        for _ in range(20):
            with suppress(StoreUnavailable):
                await store.expired(10)
        assert (await store.count_doubts())[0] == 1


class Senders:
    """Who begins operations and dies, some with the transaction still open."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._late: list[asyncpg.Connection[asyncpg.Record]] = []
        self.begun: set[str] = set()

    async def begin(self, *, ends: bool, recover_after_s: float) -> None:
        connection = await asyncpg.connect(self._dsn)
        operation_id = ids.new_operation_id()
        self.begun.add(operation_id)
        await connection.execute("BEGIN")
        await connection.execute(
            "INSERT INTO operations SELECT (copy.operation).* FROM ("
            " SELECT jsonb_populate_record(operation, jsonb_build_object("
            " 'operation_id', $1::text, 'idempotency_key', $1::text, 'state', 1,"
            " 'created_at', now(), 'recover_after', now() + $2::float8 * interval '1 s'"
            " )) AS operation FROM operations AS operation WHERE state <> 1) AS copy",
            operation_id,
            recover_after_s,
        )
        self._late.append(connection)
        if ends:
            await self.end(-1)

    async def end(self, number: int) -> None:
        if self._late:
            connection = self._late.pop(number % len(self._late))
            await connection.execute("COMMIT")
            await connection.close()

    async def end_all(self) -> None:
        while self._late:
            await self.end(-1)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_commits_late_and_whoever_holds_the_watermark_no_dead_sender_is_missed(
    dsn: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Three gateways that search by tiny slices, and begin anew now and then."""
    choice = random.Random(seed)
    monkeypatch.setattr(search, "SEARCH_ROWS_MAX", 3)
    monkeypatch.setattr(search, "SEARCH_SLICES_BEHIND_MAX", 4)
    senders = Senders(dsn)
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(PostgresStore(dsn)) for _ in range(3)]
        intent = authorize()
        await stores[0].write_intent(intent)
        await stores[0].write_change(outcome(intent.operation, intent.payment))
        for store in stores:
            store._horizon_s = 0.0
        for _ in range(60):
            kind = choice.randrange(10)
            if kind < 5:
                await senders.begin(
                    ends=kind < 3, recover_after_s=choice.choice((-1.0, -1.0, NEVER_S))
                )
            elif kind < 6:
                await senders.end(choice.randrange(10))
            elif kind < 7:
                choice.choice(stores)._search._seen_before = None
            else:
                await asyncio.gather(
                    *(store.expired(choice.randrange(1, 5)) for store in stores[: kind - 6])
                )
        await senders.end_all()
        fetch(dsn, "UPDATE operations SET recover_after = now() - interval '1 s' WHERE state = 1")
        for _ in range(3 * len(senders.begun)):
            if (await stores[0].count_doubts())[0] < len(senders.begun):
                await stores[0].expired(2)
    found = {each[0] for each in fetch(dsn, "SELECT operation_id FROM doubts")}
    assert found == senders.begun
