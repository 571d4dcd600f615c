"""The store against a real PostgreSQL: what it writes, refuses, finds and keeps apart."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from gateway.application.accounts import parse_key
from gateway.application.administration import AdminFilter
from gateway.application.ports import (
    Companion,
    ListFilter,
    Resolution,
    Stored,
    StoreUnavailable,
)
from gateway.domain import ids
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import (
    Aggregate,
    Attempt,
    ConnectorAnswer,
    Delivery,
    Discrepancy,
    DoubtCause,
    DoubtOutcome,
    Mode,
    NextAction,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    PaymentState,
    QrCode,
    Verdict,
    Voucher,
)
from gateway.domain.states import UNFINISHED
from storage.postgres import (
    Accounts,
    LaneLimits,
    NotDurable,
    PostgresStore,
    RowRefused,
    SchemaError,
    durability_problems,
    open_reader,
)
from storage.postgres.pool import ConnectionSettings, connect
from storage.postgres.queries import queries, query, run
from storage.postgres.rows import answer_json
from storage.postgres.store import DIRECT, FOLLOW_UPS, INTENTS, LOCKED_DUE_MAX, READS
from tests.servers import fetch, postgres_server
from tests.store_data import (
    MERCHANT,
    NEVER_S,
    OUTCOME,
    authorize,
    authorized,
    capture,
    outcome,
    restarted,
    stored,
)

if TYPE_CHECKING:
    from gateway.application.ports import Change, Lease, Page
    from storage.postgres.pool import Connection
    from tests.servers import PostgresForTests

S = OperationState
EXPIRES_AT = datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    with postgres_server() as server:
        yield server


@pytest.fixture
async def other_store(dsn: str) -> AsyncIterator[PostgresStore]:
    """Another gateway's."""
    async with PostgresStore(dsn) as opened:
        yield opened


def count(dsn: str, table: str) -> int:
    return int(fetch(dsn, f"SELECT count(*) FROM {table}")[0][0])


# --- what is written is what is read ---


async def test_everything_of_an_operation_and_its_payment_comes_back_as_it_was_written(
    store: PostgresStore,
) -> None:
    intent = authorize(
        merchant_order_id="order-1", allow_partial_approval=True, details=b"\x00\xff details"
    )
    result = await store.write_intent(intent)
    operation, payment = await stored(store, intent.operation)
    assert result.at is not None
    assert operation == intent.operation.copy_with(created_at=result.at, updated_at=result.at)
    assert payment == intent.payment.copy_with(created_at=result.at, updated_at=result.at)

    change = outcome(
        operation,
        payment,
        changed_operation={
            "amount_minor": 9_999,
            "final": True,
            "request_id": "req_2",
            "note": "a note",
            "reason": "RECOVERED",
            "next_action": NextAction("https://psp.example/3ds", expires_at=EXPIRES_AT),
            "allocations": (("op_1", 7), ("op_2", 8)),
        },
        changed_payment={
            "requested_minor": 20_000,
            "capture_pending_minor": 1,
            "captured_minor": 2_000,
            "refund_pending_minor": 3,
            "refunded_minor": 4,
            "voided_minor": 5,
            "increment_pending_minor": 6,
            "authorized_reported_minor": 10_001,
            "captured_reported_minor": 0,
            "refunded_reported_minor": -1,
            "capture_closed": True,
            "cancel_requested": True,
            "connector": "other",
            "connector_account_id": "acct_2",
            "connector_transaction_id": "ch_1",
            "auth_code": "A1B2C3",
            "network_transaction_id": "ntx-1",
            "authorization_expires_at": datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        },
    )
    assert await store.write_change(change) is Stored.WRITTEN
    assert await stored(store, operation) == (change.operation, change.payment)


async def test_a_payment_keeps_a_time_of_its_own(store: PostgresStore) -> None:
    intent = authorize()
    assert (await store.write_intent(intent)).stored is Stored.WRITTEN
    change = outcome(*await stored(store, intent.operation))
    change.payment.updated_at = EXPIRES_AT
    assert await store.write_change(change) is Stored.WRITTEN
    assert await stored(store, intent.operation) == (change.operation, change.payment)


def test_every_field_of_a_payment_that_can_change_is_tried_above(dsn: str) -> None:
    never = {"merchant_id", "payment_id", "mode", "currency", "capture_method"}
    never |= {"merchant_order_id", "allow_partial_approval", "details", "created_at"}
    everything = {field.name for field in fields(Payment)} - never
    columns = {
        attribute
        for (attribute,) in fetch(
            dsn, "SELECT attname FROM pg_attribute WHERE attrelid = 'payment_change'::regclass"
        )
    }
    renamed = {"version", "state", "updated_at", "connector", "connector_account_id"}
    renamed |= {"connector_transaction_id"}
    for name in everything:
        assert (f"payment_{name}" if name in renamed else name) in columns


BROUGHT_ALONG = (
    *("operations", "outbox", "doubts"),
    *("superseded_attempts", "discrepancies", "resolutions"),
)
"""Tables in which a change may write rows."""


def told_by(companion: Operation) -> Companion:
    return Companion(companion, ids.new_event_id(), "companion.began", b"event")


def with_all_that_it_may_bring_along(operation: Operation, payment: Payment) -> Change:
    first = Attempt(1, "simulator", "acct_1", Delivery.ANSWERED, "ch_0", OUTCOME, 1.5)
    companion = operation.copy_with(
        operation_id=ids.new_operation_id(),
        kind=OperationKind.CAPTURE,
        origin=OperationOrigin.GATEWAY,
        idempotency_key=None,
        fingerprint=None,
        parent_operation_id=operation.operation_id,
    )
    return outcome(
        operation,
        payment,
        check_after_s=5.0,
        changed_operation={
            "superseded_attempts": (first,),
            "attempt": Attempt(2, "simulator", "acct_1"),
        },
        companions=[Companion(companion, "evt_2", "capture.succeeded", b"capture")],
        discrepancies=[
            Discrepancy(
                MERCHANT, payment.payment_id, operation.operation_id, "captured_amount", "1", "2"
            )
        ],
        resolution=Resolution(2, DoubtOutcome.TOOK_EFFECT, "ch_1", None, "seen", "key_1"),
    )


async def test_all_that_a_change_brings_along_is_written_with_it(
    store: PostgresStore, dsn: str
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    change = with_all_that_it_may_bring_along(*await stored(store, intent.operation))
    payment, companion = change.payment, change.companions[0].operation
    assert await store.write_change(change) is Stored.WRITTEN
    aggregate = await store.load(MERCHANT, payment.payment_id)
    assert aggregate is not None
    assert aggregate.payment == change.payment
    again, begun = aggregate.operations
    assert again == change.operation
    assert begun == companion.copy_with(created_at=begun.created_at, updated_at=begun.updated_at)
    assert [count(dsn, table) for table in BROUGHT_ALONG] == [2, 2, 1, 1, 1, 1]
    events = fetch(
        dsn, "SELECT payment_version, seq, event_id, event_type, payload FROM outbox ORDER BY seq"
    )
    assert [tuple(event) for event in events] == [
        (2, 0, change.event_id, "payment.changed", change.event),
        (2, 1, "evt_2", "capture.succeeded", b"capture"),
    ]


async def test_a_discrepancy_that_is_told_again_is_recorded_once(
    store: PostgresStore, dsn: str
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    for kind, expected, reported in (
        ("late_success", "1", "2"),
        ("late_success", "1", "2"),
        ("late_success", "1", "3"),
        ("late_success", "0", "2"),
        ("late_refusal", "1", "2"),
    ):
        operation, payment = await stored(store, intent.operation)
        told = Discrepancy(
            MERCHANT, payment.payment_id, operation.operation_id, kind, expected, reported
        )
        change = outcome(operation, payment, discrepancies=[told])
        assert await store.write_change(change) is Stored.WRITTEN
    other = authorize()
    await store.write_intent(other)
    operation, payment = await stored(store, other.operation)
    told = Discrepancy(
        MERCHANT, payment.payment_id, operation.operation_id, "late_success", "1", "2"
    )
    await store.write_change(outcome(operation, payment, discrepancies=[told]))
    assert [
        tuple(each)
        for each in fetch(
            dsn,
            "SELECT operation_id, kind, expected, reported FROM discrepancies ORDER BY created_at",
        )
    ] == [
        (intent.operation.operation_id, "late_success", "1", "2"),
        (intent.operation.operation_id, "late_success", "1", "3"),
        (intent.operation.operation_id, "late_success", "0", "2"),
        (intent.operation.operation_id, "late_refusal", "1", "2"),
        (other.operation.operation_id, "late_success", "1", "2"),
    ]


async def test_a_new_payment_that_already_holds_something_is_a_defect(store: PostgresStore) -> None:
    intent = authorize()
    intent.payment.authorized_minor = 1
    with pytest.raises(ValueError, match="authorized_minor"):
        await store.write_intent(intent)


# --- idempotency keys ---


async def test_fifty_concurrent_intents_with_one_key_over_two_gateways_write_one(
    store: PostgresStore, other_store: PostgresStore, dsn: str
) -> None:
    results = await asyncio.gather(
        *(
            each.write_intent(authorize(key="the-key"))
            for _ in range(25)
            for each in (store, other_store)
        )
    )
    outcomes = [result.stored for result in results]
    assert outcomes.count(Stored.WRITTEN) == 1
    assert outcomes.count(Stored.DUPLICATE_KEY) == 49
    assert (count(dsn, "operations"), count(dsn, "payments")) == (1, 1)


async def test_a_follow_up_with_a_used_key_leaves_the_payment_alone(store: PostgresStore) -> None:
    payment = await authorized(store)
    first = capture(payment, key="the-key")
    assert (await store.write_intent(first)).stored is Stored.WRITTEN
    _, now = await stored(store, first.operation)
    second = capture(now, key="the-key")
    assert (await store.write_intent(second)).stored is Stored.DUPLICATE_KEY
    assert (await stored(store, first.operation))[1] == now


async def test_merchants_do_not_share_keys(store: PostgresStore) -> None:
    other = ids.new_merchant_id()
    intents = [authorize(MERCHANT, "the-key"), authorize(other, "the-key")]
    results = [(await store.write_intent(intent)).stored for intent in intents]
    assert results == [Stored.WRITTEN, Stored.WRITTEN]
    for intent in intents:
        found = await store.find_by_key(intent.operation.merchant_id, "the-key")
        assert found is not None
        assert found.operation.operation_id == intent.operation.operation_id


async def test_reads_that_share_a_round_trip_each_get_their_own_answer(
    store: PostgresStore,
) -> None:
    intents = [authorize() for _ in range(5)]
    await asyncio.gather(*(store.write_intent(intent) for intent in intents))
    asked = [*intents[:3], authorize(), *intents[3:]]  # one is not there
    loaded = await asyncio.gather(
        *(store.load(each.payment.merchant_id, each.payment.payment_id) for each in asked)
    )
    found = [each and each.payment.payment_id for each in loaded]
    expected = [each.payment.payment_id if each in intents else None for each in asked]
    assert found == expected


# --- compare and set ---


@pytest.mark.parametrize(
    "stale",
    [
        {"expected_version": 7},
        {"expected_epoch": 2},
        {"expected_state": S.PENDING},
    ],
    ids=["version", "epoch", "state"],
)
@pytest.mark.parametrize(
    "make", [outcome, with_all_that_it_may_bring_along], ids=["plain", "with more"]
)
async def test_a_change_from_something_else_than_what_is_there_writes_nothing(
    store: PostgresStore, dsn: str, stale: dict[str, Any], make: Callable[..., Change]
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    before = await stored(store, intent.operation)
    change = replace(make(*before), **stale)
    assert await store.write_change(change) is Stored.CONFLICT
    assert await stored(store, intent.operation) == before
    assert [count(dsn, table) for table in BROUGHT_ALONG] == [1, 0, 0, 0, 0, 0]


async def test_a_follow_up_from_an_earlier_version_writes_nothing(
    store: PostgresStore, dsn: str
) -> None:
    payment = await authorized(store)
    stale = capture(payment.copy_with(version=payment.version - 1))
    assert (await store.write_intent(stale)).stored is Stored.CONFLICT
    assert count(dsn, "operations") == 1


async def test_a_repeated_change_is_written_once_and_says_so_each_time(
    store: PostgresStore, other_store: PostgresStore, dsn: str
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    change = outcome(*await stored(store, intent.operation))
    for each in (store, store, other_store):
        assert await each.write_change(change) is Stored.WRITTEN
    assert count(dsn, "outbox") == 1


async def test_a_lost_change_that_moves_no_state_is_not_taken_for_written(
    store: PostgresStore, dsn: str
) -> None:
    """As a reversal, which leaves its operation as it is: only its own event proves it."""
    intent = authorize()
    await store.write_intent(intent)
    operation, payment = await stored(store, intent.operation)
    await store.write_change(outcome(operation, payment, S.NOT_SENT))
    operation, payment = await stored(store, operation)

    def reversal() -> Change:
        companion = operation.copy_with(
            operation_id=ids.new_operation_id(), idempotency_key=None, kind=OperationKind.REVERSAL
        )
        change = outcome(operation, payment, S.NOT_SENT, companions=[told_by(companion)])
        return replace(change, operation=operation.copy_with(updated_at=datetime.now(UTC)))

    results = [await store.write_change(each) for each in (reversal(), reversal())]
    assert results == [Stored.WRITTEN, Stored.CONFLICT]
    assert count(dsn, "operations") == 2


async def test_of_callers_who_decide_on_the_very_same_change_one_has_written_it(
    store: PostgresStore, other_store: PostgresStore, dsn: str
) -> None:
    """As repeats of a call that was NOT_SENT: whoever is told WRITTEN goes on and sends."""
    intent = authorize()
    await store.write_intent(intent)
    change = outcome(*await stored(store, intent.operation))
    changes = [replace(change, event_id=ids.new_event_id()) for _ in range(20)]
    results = await asyncio.gather(
        *(store.write_change(each) for each in changes[:10]),
        *(other_store.write_change(each) for each in changes[10:]),
    )
    outcomes = sorted(result.name for result in results)
    assert outcomes == ["CONFLICT"] * 19 + ["WRITTEN"]
    assert count(dsn, "outbox") == 1


async def test_of_two_follow_ups_in_the_same_instant_one_is_written(store: PostgresStore) -> None:
    payment = await authorized(store)
    results = await asyncio.gather(*(store.write_intent(capture(payment)) for _ in range(20)))
    outcomes = sorted(result.stored.name for result in results)
    assert outcomes == ["CONFLICT"] * 19 + ["WRITTEN"]


async def test_two_changes_of_one_payment_in_the_same_instant_are_both_written_in_their_order(
    store: PostgresStore, dsn: str
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    first = outcome(*await stored(store, intent.operation), S.PENDING, check_after_s=NEVER_S)
    second = outcome(first.operation, first.payment)
    results = await asyncio.gather(store.write_change(first), store.write_change(second))
    assert [result.name for result in results] == ["WRITTEN", "WRITTEN"]
    assert await stored(store, intent.operation) == (second.operation, second.payment)
    assert count(dsn, "outbox") == 2


async def test_a_change_of_another_payment_than_its_operations_is_a_defect(
    store: PostgresStore,
) -> None:
    change = outcome(authorize().operation, authorize().payment)
    with pytest.raises(ValueError, match="not one of the payment"):
        await store.write_change(change)


# --- the last wall, and rows that PostgreSQL refuses ---


@pytest.mark.parametrize(
    "amounts",
    [
        {"captured_minor": 6_000, "capture_pending_minor": 4_001},
        {"captured_minor": 5_000, "refunded_minor": 2_000, "refund_pending_minor": 3_001},
        {"capture_pending_minor": -1},
        {"refunded_minor": -1},
    ],
    ids=["captures beyond authorized", "refunds beyond captured", "negative", "negative refund"],
)
async def test_the_database_itself_holds_what_we_request_to_what_is_there(
    store: PostgresStore, amounts: dict[str, int]
) -> None:
    payment = await authorized(store)
    intent = capture(payment)
    intent.payment = intent.payment.copy_with(**{"capture_pending_minor": 0, **amounts})
    with pytest.raises(RowRefused, match="SQLSTATE 23514"):
        await store.write_intent(intent)
    assert await store.find_operation(MERCHANT, intent.operation.operation_id) is None


async def test_no_fact_that_a_psp_reports_is_refused(store: PostgresStore) -> None:
    payment = await authorized(store)
    intent = capture(payment)
    await store.write_intent(intent)
    operation, payment = await stored(store, intent.operation)
    change = outcome(
        operation,
        payment,
        changed_payment={
            "capture_pending_minor": 0,
            "captured_minor": 1_000,
            "captured_reported_minor": 99_999,
            "authorized_reported_minor": 0,
            "refunded_reported_minor": 123_456,
        },
    )
    change.payment.auth_code = "a\x00b"
    change.operation.attempt.connector_transaction_id = "half \ud800 pair"
    change.operation.attempt.outcome = Outcome(connector_message="nul \x00 and \udfff")
    change.operation.next_action = NextAction("https://psp.example/\x00")
    assert await store.write_change(change) is Stored.WRITTEN
    operation, payment = await stored(store, operation)
    assert payment.captured_reported_minor == 99_999
    assert payment.auth_code == "a\ufffdb"
    assert operation.next_action == NextAction("https://psp.example/\ufffd")
    assert operation.attempt.connector_transaction_id == "half ? pair"
    assert operation.attempt.outcome == Outcome(connector_message="nul \ufffd and ?")


@pytest.mark.parametrize("poison", ["nul \x00", "half \ud800 pair"])
async def test_a_poisoned_row_fails_alone(store: PostgresStore, dsn: str, poison: str) -> None:
    intents = [authorize(merchant_order_id=poison if n == 17 else f"order-{n}") for n in range(40)]
    results = await asyncio.gather(
        *(store.write_intent(intent) for intent in intents), return_exceptions=True
    )
    refused = results.pop(17)
    assert isinstance(refused, RowRefused)
    assert "nul" not in str(refused)
    assert refused.__cause__ is None
    assert all(not isinstance(r, BaseException) and r.stored is Stored.WRITTEN for r in results)
    assert count(dsn, "payments") == 39


async def test_an_outcome_that_cannot_be_written_fails_alone(store: PostgresStore) -> None:
    intents = [authorize() for _ in range(40)]
    await asyncio.gather(*map(store.write_intent, intents))
    changes = [outcome(intent.operation, intent.payment) for intent in intents]
    changes[17].operation.attempt.outcome = Outcome(amount_reported_minor=2**64)
    results = await asyncio.gather(*map(store.write_change, changes), return_exceptions=True)
    assert isinstance(results.pop(17), RowRefused)
    assert results == [Stored.WRITTEN] * 39


async def test_a_row_that_cannot_be_read_fails_its_own_read_alone(
    store: PostgresStore, dsn: str
) -> None:
    intents = [authorize() for _ in range(10)]
    await asyncio.gather(*map(store.write_intent, intents))
    newer = "UPDATE operations SET origin = 99 WHERE operation_id = $1 RETURNING 1"
    fetch(dsn, newer, intents[3].operation.operation_id)
    found = await asyncio.gather(
        *(store.load(each.payment.merchant_id, each.payment.payment_id) for each in intents),
        return_exceptions=True,
    )
    assert isinstance(found.pop(3), RowRefused)
    assert all(isinstance(each, Aggregate) for each in found)


# --- limits ---


async def test_a_full_queue_refuses_intents_and_reads_but_no_outcome(dsn: str) -> None:
    limits = LaneLimits(connections=1, rows_max=1, queue_max=1)
    async with PostgresStore(dsn, intents=limits, changes=limits, reads=limits) as store:
        intents = [authorize() for _ in range(20)]
        results = await asyncio.gather(
            *(store.write_intent(intent) for intent in intents), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, GatewayError)]
        assert refused
        assert refused[0].reason is Reason.OVERLOADED
        assert refused[0].retry_after_s is not None
        written = [
            intent
            for intent, result in zip(intents, results, strict=True)
            if not isinstance(result, BaseException)
        ]
        assert len(written) + len(refused) == 20
        for _ in range(20 - len(written)):
            written.append(authorize())
            await store.write_intent(written[-1])
        changes = [outcome(intent.operation, intent.payment) for intent in written]
        assert set(await asyncio.gather(*map(store.write_change, changes))) == {Stored.WRITTEN}


async def test_what_was_taken_is_written_before_the_store_closes(dsn: str) -> None:
    store = PostgresStore(dsn, intents=LaneLimits(connections=1, rows_max=3))
    await store.open()
    writes = [asyncio.ensure_future(store.write_intent(authorize())) for _ in range(30)]
    await asyncio.sleep(0)
    await store.close()
    assert {(await write).stored for write in writes} == {Stored.WRITTEN}
    with pytest.raises(StoreUnavailable):
        await store.write_intent(authorize())


# --- tenants ---


async def test_another_merchants_ids_find_nothing_and_change_nothing(
    store: PostgresStore, dsn: str
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    operation, payment = await stored(store, intent.operation)
    foreign = ids.new_merchant_id()
    assert await store.find_by_key(foreign, operation.idempotency_key or "") is None
    assert await store.find_operation(foreign, operation.operation_id) is None
    assert await store.load(foreign, operation.payment_id) is None
    page = await store.list_payments(ListFilter(foreign, Mode.TEST, 10))
    assert page.payments == []

    theirs = operation.copy_with(merchant_id=foreign)
    their_payment = payment.copy_with(merchant_id=foreign)
    assert await store.write_change(outcome(theirs, their_payment)) is Stored.CONFLICT
    assert (await store.write_intent(capture(their_payment))).stored is Stored.CONFLICT
    answer = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
    assert not await store.add_evidence(theirs, answer)
    await store.postpone(theirs, 0)
    await store.forget(theirs)
    assert await stored(store, operation) == (operation, payment)
    assert (count(dsn, "outbox"), count(dsn, "doubts")) == (0, 0)


_TENANTS = "payments|operations|superseded_attempts|outbox|doubts|discrepancies|resolutions"
_ALL_TENANTS = {"put_expired", "lock_due", "count_doubts", "list_doubts"}
"""What recovery asks for all merchants at once, and a person for all that a credential reaches."""


_ROWS = ("intents", "changes")
"""Parameters whose rows name the merchant themselves, which the next test sees."""


def test_every_row_of_a_write_names_the_merchant(dsn: str) -> None:
    types = re.findall(
        r"::((?!text|int8)\w+)\[\]", "".join(each.text for each in queries("writes").values())
    )
    assert len(set(types)) == 7
    for name in types:
        assert fetch(
            dsn,
            "SELECT FROM pg_attribute "
            "WHERE attrelid = $1::text::regclass AND attname = 'merchant_id'",
            name,
        ), name


@pytest.mark.parametrize("file", ["writes", "reads", "recovery"])
def test_every_statement_on_a_merchants_data_names_the_merchant(file: str) -> None:
    for name, statement in queries(file).items():
        tables = re.findall(rf"\b(?:FROM|JOIN|UPDATE|INTO|USING) ({_TENANTS})\b", statement.text)
        if tables and name not in _ALL_TENANTS:
            assert {"merchant_id", *_ROWS} & set(statement.parameters), name
        # Each scan of a table is led by the merchant, as its primary key is.
        compared = len(re.findall(r"merchant_id(?:\)? =|, )", statement.text))
        assert compared >= len(tables) or name == "count_doubts", name


# --- lists ---


async def listed(store: PostgresStore, dsn: str) -> list[str]:
    """Ten payments, two of them created in the same microsecond; the newest first."""
    intents = [
        authorize(
            merchant_order_id="odd" if n % 2 else "",
            mode=Mode.LIVE if n == 9 else Mode.TEST,
        )
        for n in range(10)
    ]
    for intent in intents:
        await store.write_intent(intent)
    await store.write_change(outcome(intents[4].operation, intents[4].payment))
    fetch(
        dsn,
        "UPDATE payments SET created_at = (SELECT created_at FROM payments WHERE payment_id = $1)"
        " WHERE payment_id = $2",
        intents[2].payment.payment_id,
        intents[3].payment.payment_id,
    )
    return [intent.payment.payment_id for intent in reversed(intents)]


def filtered(**changes: Any) -> ListFilter:
    return replace(ListFilter(MERCHANT, Mode.TEST, 3), **changes)


async def pages(store: PostgresStore, filter_: ListFilter) -> list[Page]:
    found = [await store.list_payments(filter_)]
    while found[-1].next_after is not None:
        found.append(await store.list_payments(replace(filter_, after=found[-1].next_after)))
    return found


def ids_of(found: list[Page]) -> list[str]:
    return [payment.payment_id for page in found for payment in page.payments]


async def test_pages_hold_every_payment_of_the_mode_once_the_newest_first(
    store: PostgresStore, dsn: str
) -> None:
    newest_first = await listed(store, dsn)
    found = await pages(store, filtered())
    assert ids_of(found) == newest_first[1:]
    assert [len(page.payments) for page in found] == [3, 3, 3]
    assert ids_of(await pages(store, filtered(mode=Mode.LIVE))) == newest_first[:1]


async def test_filters_are_by_state_time_and_order(store: PostgresStore, dsn: str) -> None:
    newest_first = await listed(store, dsn)
    authorized_ = filtered(states=(PaymentState.AUTHORIZED, PaymentState.CAPTURED))
    assert ids_of(await pages(store, authorized_)) == [newest_first[5]]
    odd = filtered(merchant_order_id="odd")
    assert ids_of(await pages(store, odd)) == [newest_first[n] for n in (2, 4, 6, 8)]
    everything = [p for page in await pages(store, filtered()) for p in page.payments]
    begin, end = everything[6].created_at, everything[2].created_at
    between = filtered(created_from=begin, created_before=end)
    assert ids_of(await pages(store, between)) == [p.payment_id for p in everything[3:7]]


async def test_a_filter_that_matches_little_gives_short_pages_and_still_all(dsn: str) -> None:
    async with PostgresStore(dsn, list_scan_max=4) as store:
        newest_first = await listed(store, dsn)
        found = await pages(store, filtered(states=(PaymentState.AUTHORIZED,)))
    assert ids_of(found) == [newest_first[5]]
    assert [len(page.payments) for page in found] == [0, 1, 0]


async def test_a_payment_that_cannot_be_read_hides_no_other_from_a_list(
    store: PostgresStore, dsn: str
) -> None:
    newest_first = (await listed(store, dsn))[1:]
    newer = "UPDATE payments SET state = 99 WHERE payment_id = ANY ($1::text[]) RETURNING 1"
    fetch(dsn, newer, [newest_first[n] for n in (2, 3, 4, 5, 8)])  # the last of a page, and all
    found = await pages(store, filtered())
    assert ids_of(found) == [newest_first[n] for n in (0, 1, 6, 7)]
    assert [len(page.payments) for page in found] == [2, 0, 2]


async def test_a_doubt_that_cannot_be_read_hides_no_other_from_a_list(
    store: PostgresStore, dsn: str
) -> None:
    intents = [authorize() for _ in range(3)]
    for intent in intents:
        await store.write_intent(intent)
        change = outcome(intent.operation, intent.payment, S.IN_DOUBT, check_after_s=NEVER_S)
        await store.write_change(change)
    first, *others = (intent.operation.operation_id for intent in intents)
    newer = "UPDATE operations SET origin = 99 WHERE operation_id = $1 RETURNING 1"
    fetch(dsn, newer, first)
    filter_ = AdminFilter(None, None, 1)
    listed_: list[str] = []
    while True:
        page = await store.list_doubts(filter_, needs_person_only=False)
        listed_ += [doubt.operation.operation_id for doubt in page.doubts]
        if page.next_after is None:
            break
        filter_ = replace(filter_, after=page.next_after)
    assert listed_ == others


async def test_no_place_in_a_list_names_a_payment_of_the_other_mode(dsn: str) -> None:
    modes = [Mode.TEST, *[Mode.LIVE] * 12, Mode.TEST]
    intents = [authorize(mode=mode) for mode in modes]
    async with PostgresStore(dsn, list_scan_max=4) as store:
        for intent in intents:
            await store.write_intent(intent)
        # Of one transaction, as a batch's are: the ids alone are in order.
        fetch(dsn, "UPDATE payments SET created_at = (SELECT min(created_at) FROM payments)")
        found = await pages(store, filtered(page_size=1))
    assert ids_of(found) == [intents[n].payment.payment_id for n in (13, 0)]
    places = [page.next_after[1] for page in found if page.next_after is not None]
    assert len(places) > 2
    assert all(ids.is_payment_id(place) for place in places)
    assert not set(places) & {intent.payment.payment_id for intent in intents[1:13]}


# --- recovery's list ---


async def due(store: PostgresStore, *, limit: int = 100, lease_s: float = NEVER_S) -> list[Any]:
    return list(await store.lease(limit, lease_s))


async def test_a_dead_senders_operation_is_taken_over_once_and_its_epoch_raised(
    store: PostgresStore, other_store: PostgresStore
) -> None:
    dead, alive = authorize(recover_after_s=-1), authorize(recover_after_s=NEVER_S)
    for intent in (dead, alive):
        await store.write_intent(intent)
    assert await store.expired(100) == 1
    assert await store.expired(100) == 0
    [lease] = await due(store)
    assert lease.operation.operation_id == dead.operation.operation_id
    assert (lease.operation.epoch, lease.tries, lease.evidence) == (2, 0, None)
    assert lease.operation in lease.aggregate.operations
    assert lease.operation == (await stored(store, dead.operation))[0]
    assert await due(other_store) == []
    # Whoever held it before is fenced out; the new holder is not.
    assert await store.write_change(outcome(dead.operation, dead.payment)) is Stored.CONFLICT
    change = outcome(lease.operation, lease.aggregate.payment)
    assert await store.write_change(change) is Stored.WRITTEN
    assert (await store.count_doubts())[:2] == (0, 0.0)


async def test_an_operation_that_cannot_be_read_holds_up_no_other_s_recovery(
    store: PostgresStore, dsn: str
) -> None:
    intents = [authorize(recover_after_s=-1) for _ in range(3)]
    await asyncio.gather(*map(store.write_intent, intents))
    newer = "UPDATE operations SET origin = 99 WHERE operation_id = $1 RETURNING 1"
    unreadable, *others = (intent.operation.operation_id for intent in intents)
    fetch(dsn, newer, unreadable)
    assert await store.expired(10) == 3
    leased = {lease.operation.operation_id for lease in await store.lease(10, NEVER_S)}
    assert leased == set(others)


async def test_evidence_that_cannot_be_read_holds_up_no_other_s_recovery(
    store: PostgresStore, dsn: str
) -> None:
    intents = [authorize() for _ in range(3)]
    await asyncio.gather(*map(store.write_intent, intents))
    for intent in intents:
        assert await store.add_evidence(intent.operation, ANSWER)
    newer = """
        UPDATE doubts SET evidence = evidence || '{"verdict": 99}'
        WHERE operation_id = $1 RETURNING 1
    """
    unreadable, *others = (intent.operation.operation_id for intent in intents)
    fetch(dsn, newer, unreadable)
    leased = {lease.operation.operation_id for lease in await store.lease(10, NEVER_S)}
    assert leased == set(others)


@pytest.mark.parametrize("what", ["evidence", "operation"])
async def test_evidence_that_could_not_be_weighed_outlasts_an_outcome(
    store: PostgresStore, dsn: str, what: str
) -> None:
    """A version that can read it may find in it what must not stand."""
    intent = authorize()
    await store.write_intent(intent)
    assert await store.add_evidence(intent.operation, ANSWER)
    newer, known = {
        "evidence": (
            "evidence = evidence || '{\"verdict\": 99}'",
            f"evidence = '{answer_json(ANSWER)}'",
        ),
        "operation": ("origin = origin + 99", "origin = origin - 99"),
    }[what]
    table = {"evidence": "doubts", "operation": "operations"}[what]
    update = f"UPDATE {table} SET {{}} RETURNING 1"
    fetch(dsn, update.format(newer))
    assert await store.lease(10, 0) == []
    fetch(dsn, update.format(known))
    operation, payment = await stored(store, intent.operation)
    change = outcome(operation, payment, S.DECLINED)
    assert await store.write_change(change) is Stored.WRITTEN
    [lease] = await store.lease(10, 0)
    assert lease.evidence == ANSWER


async def test_evidence_that_stays_and_cannot_be_read_leaves_no_room_for_now(
    store: PostgresStore, dsn: str
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    assert await store.add_evidence(intent.operation, replace(ANSWER, attempt_number=1))
    change = outcome(intent.operation, intent.payment, S.NOT_SENT)
    assert await store.write_change(change) is Stored.WRITTEN
    operation, payment = await stored(store, intent.operation)
    assert await store.write_change(restarted(operation, payment)) is Stored.WRITTEN
    operation, _ = await stored(store, intent.operation)
    fetch(dsn, "UPDATE doubts SET evidence = evidence || '{\"verdict\": 99}' RETURNING 1")
    second = replace(ANSWER, attempt_number=2)
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        await store.add_evidence(operation, second)
    assert await store.add_evidence(operation, second, seen_to=[1]) == second


async def test_a_lease_that_runs_out_is_taken_again_and_the_epoch_raised_again(
    store: PostgresStore, other_store: PostgresStore
) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [first] = await due(store, lease_s=0)
    [second] = await due(other_store)
    assert [(each.operation.epoch, each.tries) for each in (first, second)] == [(2, 0), (3, 1)]


async def test_two_recoverers_share_what_is_due(
    store: PostgresStore, other_store: PostgresStore
) -> None:
    intents = [authorize(recover_after_s=-1) for _ in range(60)]
    await asyncio.gather(*(store.write_intent(intent) for intent in intents))
    assert await store.expired(50) == 50
    assert await other_store.expired(50) == 10
    leases: list[Any] = []
    while len(leases) < 60:
        taken = await asyncio.gather(*(due(each, limit=7) for each in (store, other_store) * 2))
        assert any(taken)
        leases += [lease for each in taken for lease in each]
    taken_ids = [lease.operation.operation_id for lease in leases]
    assert sorted(taken_ids) == sorted(intent.operation.operation_id for intent in intents)
    assert {lease.operation.epoch for lease in leases} == {2}


async def doubts_of(store: PostgresStore, account: str, number: int) -> list[Operation]:
    """So many operations in doubt of an account, all of them due."""
    changes = []
    for _ in range(number):
        intent = authorize()
        intent.payment.connector_account_id = account
        intent.operation.attempt.connector_account_id = account
        await store.write_intent(intent)
        changes.append(outcome(intent.operation, intent.payment, S.IN_DOUBT, check_after_s=-1))
        await store.write_change(changes[-1])
    return [change.operation for change in changes]


def accounts_of(leases: Sequence[Lease]) -> Counter[str]:
    return Counter(lease.operation.attempt.connector_account_id for lease in leases)


async def test_no_account_has_more_at_work_than_its_share_and_hides_nobody(
    store: PostgresStore,
) -> None:
    long = await doubts_of(store, "acc_long", 30)
    await doubts_of(store, "acc_short", 3)
    first = await store.lease(10, NEVER_S, account_max=4)
    assert accounts_of(first) == {"acc_long": 4, "acc_short": 3}
    at_work = [lease.operation for lease in first]
    await doubts_of(store, "acc_new", 1)
    second = await store.lease(10, NEVER_S, account_max=4, at_work=at_work)
    assert accounts_of(second) == {"acc_new": 1}
    # What is done makes room for as many, those longest due.
    third = await store.lease(10, NEVER_S, account_max=4, at_work=at_work[2:])
    assert accounts_of(third) == {"acc_long": 2}
    taken = {lease.operation.operation_id for lease in (*first, *second, *third)}
    oldest = [operation.operation_id for operation in long[:6]]
    assert taken.issuperset(oldest)


async def test_what_the_caller_is_at_work_on_is_not_taken_again_though_its_lease_ran_out(
    store: PostgresStore, other_store: PostgresStore
) -> None:
    await doubts_of(store, "acc_one", 1)
    [lease] = await store.lease(10, 0)
    assert await store.lease(10, 0, at_work=[lease.operation]) == []
    [again] = await other_store.lease(10, 0)
    assert again.operation.epoch == lease.operation.epoch + 1


async def test_a_payment_that_is_being_changed_hides_nobody_who_is_due_after_it(
    store: PostgresStore, dsn: str
) -> None:
    first, second = await doubts_of(store, "acc_one", 2)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("BEGIN")
        await connection.execute(
            "SELECT FROM payments WHERE payment_id = $1 FOR UPDATE", first.payment_id
        )
        [lease] = await store.lease(1, NEVER_S, account_max=1)
    finally:
        await connection.close()
    assert lease.operation.operation_id == second.operation_id


async def test_a_lease_tells_the_databases_time(store: PostgresStore, dsn: str) -> None:
    await doubts_of(store, "acc_one", 1)
    [[before]] = fetch(dsn, "SELECT clock_timestamp()")
    [lease] = await store.lease(1, NEVER_S)
    [[after]] = fetch(dsn, "SELECT clock_timestamp()")
    assert lease.at is not None
    assert before < lease.at < after


@pytest.mark.parametrize("since", ["leased", "put off"])
async def test_what_another_recoverer_has_had_since_it_was_found_due_is_not_leased(
    store: PostgresStore, other_store: PostgresStore, since: str
) -> None:
    """Both found it due, and the second one got the payment's lock when the first let go."""
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [first] = await due(other_store)
    if since == "put off":
        await other_store.postpone(first.operation, NEVER_S)
    leased = await store._direct.fetch(
        query("recovery", "lease"),
        merchant_id=[first.operation.merchant_id],
        operation_id=[first.operation.operation_id],
        lease_s=NEVER_S,
        unfinished=sorted(UNFINISHED),
    )
    assert leased == []
    assert (await stored(store, first.operation))[0].epoch == first.operation.epoch


async def test_a_doubt_is_looked_at_when_it_is_due(store: PostgresStore) -> None:
    intent = authorize()
    await store.write_intent(intent)
    change = outcome(intent.operation, intent.payment, S.IN_DOUBT, check_after_s=NEVER_S)
    await store.write_change(change)
    assert await due(store) == []
    await store.postpone(change.operation, 0)
    [lease] = await due(store)
    assert lease.operation.state is S.IN_DOUBT
    await store.postpone(lease.operation, NEVER_S)
    assert await due(store) == []
    doubts, age_s, *_ = await store.count_doubts()
    assert doubts == 1
    assert age_s > 0


async def test_evidence_makes_a_doubt_due_at_once(store: PostgresStore) -> None:
    intent = authorize()
    await store.write_intent(intent)
    change = outcome(intent.operation, intent.payment, S.IN_DOUBT, check_after_s=NEVER_S)
    await store.write_change(change)
    assert await store.add_evidence(change.operation, ANSWER)
    [lease] = await due(store)
    assert lease.evidence == ANSWER


async def test_a_new_attempt_of_an_old_operation_has_its_recovery_too(
    store: PostgresStore, dsn: str
) -> None:
    """The scan for dead senders has long passed the time at which the operation was created."""
    intent = authorize()
    await store.write_intent(intent)
    await store.write_change(outcome(intent.operation, intent.payment, S.NOT_SENT))
    operation, payment = await stored(store, intent.operation)
    restart = restarted(operation, payment, recover_after_s=-1.0)
    assert await store.write_change(restart) is Stored.WRITTEN
    fetch(dsn, "UPDATE recovery_watermark SET created_before = now()")
    [lease] = await due(store)
    assert lease.operation.operation_id == operation.operation_id
    assert lease.operation.epoch == 3


async def test_a_new_attempt_of_a_refund_has_the_first_capture_that_it_is_of_now_as_its_parent(
    store: PostgresStore,
) -> None:
    payment = await authorized(store)
    intent = capture(payment)
    refund = intent.operation.copy_with(
        kind=OperationKind.REFUND, parent_operation_id="op_a", allocations=(("op_a", 1_000),)
    )
    await store.write_intent(replace(intent, operation=refund))
    await store.write_change(outcome(refund, intent.payment, S.NOT_SENT))
    operation, payment = await stored(store, refund)
    again = restarted(operation, payment)
    again.operation.allocations = (("op_b", 400), ("op_c", 600))
    assert await store.write_change(again) is Stored.WRITTEN
    operation, payment = await stored(store, refund)
    assert (operation.parent_operation_id, operation.allocations[0]) == ("op_b", ("op_b", 400))
    await store.write_change(outcome(operation, payment))
    operation, _ = await stored(store, refund)
    assert operation.parent_operation_id == "op_b"


async def test_evidence_of_an_earlier_attempt_leaves_the_new_ones_sender_its_time(
    store: PostgresStore,
) -> None:
    intent = authorize(recover_after_s=-1)
    await store.write_intent(intent)
    await store.expired(100)
    [lease] = await due(store)
    assert await store.begin_cancel(lease.operation)
    assert await store.add_evidence(lease.operation, ANSWER)
    settled = outcome(lease.operation, lease.aggregate.payment, S.NOT_SENT)
    assert await store.write_change(settled) is Stored.WRITTEN
    operation, payment = await stored(store, intent.operation)
    assert await store.write_change(restarted(operation, payment)) is Stored.WRITTEN
    # An answer to an attempt that is over is no evidence for the present one: its sender, who held
    # the operation as it was, hears that, and reverses a success at once.
    assert not await store.add_evidence(lease.operation, ANSWER)
    assert await due(store) == []
    # It is kept meanwhile, and unseen as it is, goes before everything once anybody asks.
    present, _ = await stored(store, intent.operation)
    await store.postpone(present, NEVER_S)
    [lease] = await due(store)
    assert (lease.operation.attempt.number, lease.evidence) == (2, ANSWER)
    assert not lease.cancel_begun


async def test_a_new_attempt_has_nothing_of_what_recovery_tried_for_the_one_before(
    store: PostgresStore,
) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [lease] = await due(store)
    operation, payment = lease.operation, lease.aggregate.payment
    doubtful = outcome(operation, payment, S.IN_DOUBT, check_after_s=NEVER_S)
    assert await store.write_change(doubtful) is Stored.WRITTEN
    await store.postpone(lease.operation, -1, DoubtCause.NO_MEANS, needs_person=True)
    [lease] = await due(store)
    assert lease.tries == 1
    # It comes just before a person decides, and the row stays for it.
    assert await store.add_evidence(lease.operation, ANSWER)
    decided = outcome(lease.operation, lease.aggregate.payment, S.NOT_SENT)
    assert await store.write_change(decided) is Stored.WRITTEN
    operation, payment = await stored(store, lease.operation)
    restart = restarted(operation, payment, recover_after_s=-1.0)
    assert await store.write_change(restart) is Stored.WRITTEN
    assert (await store.count_doubts()).needs_person == 0
    [lease] = await due(store)
    assert (lease.operation.attempt.number, lease.tries, lease.evidence) == (2, 0, ANSWER)
    page = await store.list_doubts(AdminFilter(None, None, 10), needs_person_only=True)
    assert not page.doubts


async def test_an_operation_with_a_definite_outcome_is_leased_to_be_forgotten(
    store: PostgresStore,
) -> None:
    """Its sender was alive after all, and quicker than the recoverer."""
    intent = authorize(recover_after_s=-1)
    await store.write_intent(intent)
    await store.expired(100)
    change = outcome(intent.operation, intent.payment)
    assert await store.write_change(change) is Stored.WRITTEN
    [lease] = await due(store)
    assert (lease.operation.state, lease.operation.epoch) == (S.SUCCEEDED, 1)
    await store.forget(lease.operation)
    assert (await store.count_doubts())[0] == 0


ANSWER = ConnectorAnswer(
    Delivery.ANSWERED,
    Verdict.APPROVED,
    OUTCOME,
    "ch_1",
    "EUR",
    12.5,
    NextAction(qr_code=QrCode("0002", page_url="https://psp.example"), expires_at=EXPIRES_AT),
    datetime(2030, 1, 2, tzinfo=UTC),
    "RECOVERED",
)


async def test_a_fenced_out_senders_answer_is_handed_to_recovery(store: PostgresStore) -> None:
    intent = authorize()
    await store.write_intent(intent)
    assert await store.add_evidence(intent.operation, ANSWER)
    [lease] = await due(store, lease_s=0)
    assert lease.evidence == ANSWER
    # The recoverer died: the next one gets it too.
    [again] = await due(store)
    assert again.evidence == ANSWER
    await store.write_change(outcome(again.operation, again.aggregate.payment))
    assert (await store.count_doubts())[0] == 0
    assert not await store.add_evidence(again.operation, ANSWER)


async def test_evidence_of_an_attempt_outlasts_a_recoverer_that_died_and_the_next_ones_success(
    store: PostgresStore,
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    evidence = replace(ANSWER, attempt_number=1)
    assert await store.add_evidence(intent.operation, evidence)
    change = outcome(intent.operation, intent.payment, S.NOT_SENT)
    assert await store.write_change(change) is Stored.WRITTEN
    [seen] = await due(store, lease_s=0)  # by a recoverer that dies before it reverses it
    assert seen.evidence == evidence
    operation, payment = await stored(store, intent.operation)
    assert await store.write_change(restarted(operation, payment)) is Stored.WRITTEN
    operation, payment = await stored(store, intent.operation)
    assert await store.write_change(outcome(operation, payment)) is Stored.WRITTEN
    await store.hasten(operation)
    [again] = await due(store)
    assert (again.operation.state, again.operation.attempt.number) == (S.SUCCEEDED, 2)
    assert again.evidence == evidence
    await store.forget(again.operation)
    assert (await store.count_doubts())[0] == 0


async def test_evidence_of_an_earlier_attempt_stays_until_its_bringer_has_seen_to_it(
    store: PostgresStore,
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    first = replace(ANSWER, attempt_number=1)
    assert await store.add_evidence(intent.operation, first) == first
    change = outcome(intent.operation, intent.payment, S.NOT_SENT)
    assert await store.write_change(change) is Stored.WRITTEN
    operation, payment = await stored(store, intent.operation)
    assert await store.write_change(restarted(operation, payment)) is Stored.WRITTEN
    operation, _ = await stored(store, intent.operation)
    second = replace(ANSWER, attempt_number=2, connector_transaction_id="ch_2")
    assert await store.add_evidence(operation, second) == first
    [seen] = await due(store, lease_s=0)  # by a recoverer that dies before it acts on it
    assert await store.add_evidence(seen.operation, second) == first
    assert await store.add_evidence(seen.operation, second, seen_to=[1]) == second
    [lease] = await due(store, lease_s=0)
    assert lease.evidence == second
    newer = replace(second, reason="newer")
    assert await store.add_evidence(lease.operation, newer) == newer


async def test_evidence_is_refused_where_the_operation_was_taken_over_since_it_was_read(
    store: PostgresStore,
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    assert await store.add_evidence(intent.operation, ANSWER)
    [lease] = await due(store)
    assert not await store.add_evidence(intent.operation, replace(ANSWER, reason="outdated"))
    assert await store.add_evidence(lease.operation, ANSWER)


@pytest.mark.parametrize("ending", ["change", "forget", "postpone", "doubt"])
async def test_evidence_that_comes_after_the_lease_is_not_lost(
    store: PostgresStore, ending: str
) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [lease] = await due(store, lease_s=0)
    assert await store.add_evidence(lease.operation, ANSWER)
    operation, payment = lease.operation, lease.aggregate.payment
    if ending in ("change", "forget"):
        change = outcome(operation, payment, S.NOT_SENT)
        assert await store.write_change(change) is Stored.WRITTEN
        if ending == "forget":
            await store.forget(operation)
    elif ending == "postpone":
        await store.postpone(operation, NEVER_S)
    else:
        await store.write_change(outcome(operation, payment, S.IN_DOUBT, check_after_s=NEVER_S))
    [again] = await due(store)
    assert again.evidence == ANSWER


async def test_an_overtaken_recoverer_does_not_bring_forward_when_a_new_attempt_is_looked_at(
    store: PostgresStore,
) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [overtaken] = await due(store, lease_s=0)
    [present] = await due(store)
    await store.postpone(present.operation, NEVER_S)
    await store.postpone(overtaken.operation, -1)
    assert await due(store) == []


async def test_only_the_present_owner_announces_a_cancellation_and_the_next_one_knows(
    store: PostgresStore,
) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [overtaken] = await due(store, lease_s=0)
    [lease] = await due(store, lease_s=0)
    assert not lease.cancel_begun
    assert not await store.begin_cancel(overtaken.operation)
    assert await store.begin_cancel(lease.operation)
    [after] = await due(store)
    assert after.cancel_begun
    await store.write_change(outcome(after.operation, after.aggregate.payment))
    assert not await store.begin_cancel(after.operation)


async def test_what_was_accepted_and_is_never_confirmed_is_listed_once_it_needs_a_person(
    store: PostgresStore,
) -> None:
    intent = authorize()
    await store.write_intent(intent)
    await store.write_change(outcome(intent.operation, intent.payment, S.PENDING, check_after_s=-1))
    [lease] = await due(store)
    everything = AdminFilter(None, None, 10)
    for needs_person in (False, True):
        await store.postpone(lease.operation, NEVER_S, needs_person=needs_person)
        counted = await store.count_doubts()
        page = await store.list_doubts(everything, needs_person_only=False)
        assert (counted.operations, counted.needs_person) == (needs_person, needs_person)
        found = [doubt.operation.operation_id for doubt in page.doubts]
        assert found == ([intent.operation.operation_id] if needs_person else [])


async def test_recovery_never_forgets_what_is_unfinished(store: PostgresStore) -> None:
    await store.write_intent(authorize(recover_after_s=-1))
    await store.expired(100)
    [lease] = await due(store, lease_s=0)
    await store.forget(lease.operation)
    assert len(await due(store)) == 1


# --- the server ---


async def test_readiness_is_looked_at_however_many_calls_wait_before_it(dsn: str) -> None:
    """A list that is long is no database that is away."""
    direct = LaneLimits(connections=1, rows_max=1, queue_max=1)
    holder = await asyncpg.connect(dsn)
    try:
        async with PostgresStore(dsn, direct=direct) as store:
            async with holder.transaction():
                await holder.execute("LOCK TABLE organisations IN ACCESS EXCLUSIVE MODE")
                waiting = []
                for _ in range(2):  # one holds the connection, one fills the queue
                    waiting.append(asyncio.ensure_future(store.accounts.list_organisations()))
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                with pytest.raises(GatewayError, match="too much to do"):
                    await store.accounts.list_organisations()
                look = asyncio.ensure_future(store.check())
                await asyncio.sleep(0)
            await asyncio.gather(look, *waiting)
    finally:
        await holder.close()


async def test_the_store_serves_from_a_durable_database_with_its_schema(
    store: PostgresStore,
) -> None:
    await store.check()


async def test_a_database_without_the_schema_is_refused_with_the_command_to_run(
    postgres: PostgresForTests,
) -> None:
    async with PostgresStore(postgres.create_database()) as store:
        with pytest.raises(SchemaError, match="gateway migrate"):
            await store.check()


async def test_a_database_that_commits_asynchronously_is_refused(
    postgres: PostgresForTests, dsn: str
) -> None:
    name = dsn.rsplit("/", 1)[1]
    fetch(dsn, f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    async with PostgresStore(dsn) as store:
        with pytest.raises(NotDurable, match="synchronous_commit is off"):
            await store.check()
    # And the sessions of the lanes do not follow it meanwhile.
    async with lane_session(dsn) as connection:
        assert await connection.fetchval("SHOW synchronous_commit") == "on"


def test_a_server_that_may_lose_what_it_committed_is_refused() -> None:
    async def problems(dsn: str) -> list[str]:
        connection = await asyncpg.connect(dsn)
        try:
            return await durability_problems(connection)
        finally:
            await connection.close()

    with postgres_server({"fsync": "off", "full_page_writes": "off"}) as server:
        found = asyncio.run(problems(server.create_database()))
    assert [text.split(" is ")[0] for text in found] == ["fsync", "full_page_writes"]


async def test_the_generation_is_told_at_every_connection(dsn: str) -> None:
    told: list[str] = []
    async with PostgresStore(dsn, on_generation=told.append):
        lanes = [INTENTS, FOLLOW_UPS, READS, DIRECT]
        assert len(told) > sum(lane.connections for lane in lanes)
    assert len(set(told)) == 1
    assert re.fullmatch(r"\d+-[0-9A-F]{8}", told[0])


@asynccontextmanager
async def lane_session(dsn: str) -> AsyncIterator[Connection]:
    """A connection as the lanes have them. Left open, it would keep uvloop from closing."""
    # What fills the tables has its time, however busy the machine is.
    connection = await connect(ConnectionSettings(dsn, statement_timeout_s=300), "test")
    try:
        yield connection
    finally:
        await connection.close()


_EXPECTED_INDEXES = {
    ("writes", "followup_intent"): {"payments_pkey", "operations_idempotency_key"},
    ("writes", "change"): {"payments_pkey", "operations_pkey"},
    ("writes", "change_with_more"): {
        "payments_pkey",
        "operations_pkey",
        "doubts_pkey",
        "discrepancies_payment",
    },
    ("writes", "written_intents"): {"operations_pkey"},
    ("writes", "written_changes"): {"outbox_pkey"},
    ("reads", "find_by_key"): {
        "operations_idempotency_key",
        "payments_pkey",
        "superseded_attempts_pkey",
    },
    ("reads", "find_operation"): {
        "operations_pkey",
        "payments_pkey",
        "superseded_attempts_pkey",
    },
    ("reads", "load"): {"payments_pkey", "operations_payment", "superseded_attempts_pkey"},
    ("reads", "list_payments"): {
        "payments_newest_first",
        "payments_merchant_order",
        "payments_pkey",
    },
    ("recovery", "put_expired"): {
        "operations_created_at",
        "payments_pkey",
        "doubts_pkey",
    },
    ("recovery", "lock_due"): {"payments_pkey", "doubts_by_account"},
    ("recovery", "lease"): {"doubts_pkey", "operations_pkey"},
    ("recovery", "unweighed"): {"doubts_pkey"},
    ("recovery", "count_doubts"): {"doubts_check_at", "operations_pkey"},
    ("recovery", "postpone"): {"payments_pkey", "operations_pkey", "doubts_pkey"},
    ("recovery", "begin_cancel"): {"payments_pkey", "operations_pkey", "doubts_pkey"},
    ("notifications", "list"): {"notifications_newest_first"},
    ("notifications", "part_of_list"): {"notifications_newest_first"},
    ("notifications", "find"): {"notifications_pkey"},
    ("audit", "audit_discrepancies"): {"discrepancies_payment"},
    ("admin", "list_discrepancies"): {"discrepancies_oldest_first", "payments_pkey"},
    ("events", "read"): {"outbox_xact_id"},
    ("events", "latest"): {"outbox_xact_id"},
    ("events", "find"): {"outbox_xact_id"},
    ("events", "held_back"): {"outbox_xact_id"},
    ("connector_accounts", "changed_since"): {"connector_accounts_updated_at"},
    ("routing", "active_since"): {"routing_activations_activated_at", "routing_rules_pkey"},
    ("routing_controls", "changed_costs"): {"routing_costs_created_at"},
}


async def check_plans(dsn: str) -> None:
    """The plans that a connection makes now are those that are right for a full database."""
    async with lane_session(dsn) as connection:
        for (file, name), expected in _EXPECTED_INDEXES.items():
            statement = queries(file)[name]
            await connection.execute(f"PREPARE plan AS {statement.text}")
            nothing = ", ".join(["NULL"] * len(statement.parameters))
            nothing = nothing and f"({nothing})"
            plan = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE plan{nothing}")
            await connection.execute("DEALLOCATE plan")
            used = set(re.findall(r'"Index Name": "(\w+)"', plan))
            used |= set(re.findall(r'"Conflict Arbiter Indexes": \["(\w+)"\]', plan))
            assert used == expected, name
            assert "Seq Scan" not in plan, name
            # Each lookup has its whole key, not its first column alone.
            for index, condition in re.findall(
                r'"Index Name": "(\w+_pkey|operations_idempotency_key)",.*?'
                r'"Index Cond": "([^"]*)"',
                plan.replace('\\"', ""),
                re.DOTALL,
            ):
                assert " AND " in condition, (name, index)


async def test_the_plans_of_an_empty_database_are_those_of_a_full_one(dsn: str) -> None:
    """Plans are kept while the tables grow: one that scans would go on scanning."""
    await check_plans(dsn)


async def test_the_plans_of_every_small_database_are_those_of_a_full_one(
    store: PostgresStore, dsn: str
) -> None:
    """An index may have a page less than the right one for a while, with nothing analyzed yet."""
    fetch(dsn, "ALTER TABLE operations SET (autovacuum_enabled = off)")
    fetch(dsn, "ALTER TABLE payments SET (autovacuum_enabled = off)")
    for _ in range(60):
        await asyncio.gather(*(store.write_intent(authorize()) for _ in range(10)))
        await check_plans(dsn)


_MANY_DOUBTS = (
    (
        "INSERT INTO doubts (merchant_id, operation_id, payment_id, check_at, since)"
        " SELECT merchant_id, 'op_' || n, 'pay_' || n, now(), now() + n * interval '1 ms'"
        " FROM payments, generate_series(1, 10000) AS n"
    ),
    (
        "INSERT INTO operations SELECT (jsonb_populate_record(operation, jsonb_build_object("
        "'operation_id', 'op_' || n, 'payment_id', 'pay_' || n, 'idempotency_key', 'key_' || n"
        "))).* FROM operations AS operation, generate_series(1, 10000) AS n"
    ),
    (
        "INSERT INTO payments SELECT (jsonb_populate_record(payment, jsonb_build_object("
        "'payment_id', 'pay_' || n))).* FROM payments AS payment, generate_series(1, 10000) AS n"
    ),
    "ANALYZE doubts, operations, payments",
)


async def test_a_page_of_many_doubts_is_read_along_their_index(
    store: PostgresStore, dsn: str
) -> None:
    await store.write_intent(authorize())
    async with lane_session(dsn) as connection:
        for statement in _MANY_DOUBTS:
            await connection.execute(statement)
        page = queries("reads")["list_doubts"]
        await connection.execute(f"PREPARE plan AS {page.text}")
        nothing = ", ".join(["NULL"] * len(page.parameters))
        plan = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE plan({nothing})")
    assert "doubts_oldest_first" in plan
    assert '"Sort"' not in plan


@pytest.mark.parametrize("full_accounts", [[], ["acc_long"]])
async def test_a_lease_reads_no_more_of_an_accounts_list_than_it_may_take(
    store: PostgresStore, dsn: str, full_accounts: list[str]
) -> None:
    await doubts_of(store, "acc_long", 1)
    async with lane_session(dsn) as connection:
        for statement in _MANY_DOUBTS:
            await connection.execute(statement)
        await connection.execute("UPDATE doubts SET connector_account_id = 'acc_long'")
        await doubts_of(store, "acc_short", 1)
        await run(connection, query("recovery", "read_in_order"), sorts="off")
        lock_due = query("recovery", "lock_due")
        values = {
            "limit": 50,
            "account_limit": 16,
            "locked_max": LOCKED_DUE_MAX,
            "full_accounts": full_accounts,
            "at_work": [],
        }
        told = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {lock_due.text}", *lock_due.arguments(values)
        )
    nodes = [json.loads(told)[0]["Plan"]]
    read = 0
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node.get("Relation Name") == "doubts":
            removed = node.get("Rows Removed by Filter", 0)
            read += (node["Actual Rows"] + removed) * node["Actual Loops"]
    assert read < 2 * LOCKED_DUE_MAX


async def test_of_discrepancies_the_audit_reads_those_of_its_payments(dsn: str) -> None:
    payment_ids = [ids.new_payment_id() for _ in range(20)]
    put = (
        "INSERT INTO discrepancies"
        " (merchant_id, payment_id, operation_id, kind, expected, reported)"
        " SELECT $1, payment_id, 'op', 'kind', '', '' FROM unnest($2::text[]) AS payment_id"
        " RETURNING 1"
    )
    others = [ids.new_payment_id() for _ in range(1_000)]
    fetch(dsn, put, MERCHANT, payment_ids + others)
    statement = queries("audit")["audit_discrepancies"]
    values = {"merchant_id": [MERCHANT] * 20, "payment_id": payment_ids}
    async with lane_session(dsn) as connection:
        assert len(await run(connection, statement, **values)) == 20
        told = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}", *statement.arguments(values)
        )
    assert '"Index Name": "discrepancies_payment"' in told
    assert "Rows Removed by Filter" not in told


async def test_outcomes_touch_no_index(store: PostgresStore, dsn: str) -> None:
    intents = [authorize(details=b"d" * 300) for _ in range(2_000)]
    await asyncio.gather(*(store.write_intent(intent) for intent in intents))
    changes = [
        outcome(
            intent.operation,
            intent.payment,
            changed_operation={"response": b"r" * 400, "request_id": ids.new_request_id()},
        )
        for intent in intents
    ]
    await asyncio.gather(*(store.write_change(change) for change in changes))
    await store.close()
    updates = fetch(
        dsn,
        "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
        "WHERE relname IN ('operations', 'payments')",
    )
    for table, updated, hot in updates:
        assert updated == 2_000
        assert hot >= 0.95 * updated, table


# --- accounts ---


async def test_a_key_reaches_the_merchants_that_it_names_or_all_of_its_organisation(
    dsn: str,
) -> None:
    async with Accounts.connect(dsn) as accounts:
        ours, theirs = [await accounts.create_organisation(name) for name in ("ours", "theirs")]
        one = await accounts.create_merchant(ours, "one", pan_exempt_order_id=True)
        two = await accounts.create_merchant(ours, "two")
        foreign = await accounts.create_merchant(theirs, "foreign")
        all_ = await accounts.create_key(ours, scopes=["payments:write"], mode="test")
        some = await accounts.create_key(
            ours, scopes=["admin"], mode=Mode.LIVE, merchant_ids=[two], expires_in_days=1
        )
        later = await accounts.create_merchant(ours, "later")
        with pytest.raises(GatewayError):
            await accounts.create_key(ours, scopes=[], mode="test", merchant_ids=[one, foreign])
        with pytest.raises(GatewayError):
            await accounts.create_merchant("org_none", "none")

        record = await accounts.load_key(all_.key_id)
        assert record is not None
        assert set(record.merchants) == {one, two, later}
        assert record.merchants[one].pan_exempt_order_id
        assert not record.merchants[two].pan_exempt_order_id
        presented = parse_key(all_.text)
        assert presented is not None
        assert presented.secret_hash == record.secret_hash
        assert (record.mode, record.scopes) == (Mode.TEST, frozenset({"payments:write"}))
        assert record.expires_at is None

        limited = await accounts.load_key(some.key_id)
        assert limited is not None
        assert set(limited.merchants) == {two}
        assert limited.expires_at is not None
        in_a_day = datetime.now(UTC) + timedelta(days=1)
        assert abs(limited.expires_at - in_a_day) < timedelta(hours=1)
        assert await accounts.load_key(ids.new_key_id()) is None

        assert [each.name for each in await accounts.list_organisations()] == ["ours", "theirs"]
        assert [each.merchant_id for each in await accounts.list_merchants(theirs)] == [foreign]
        assert len(await accounts.list_merchants()) == 4
        assert [each.key_id for each in await accounts.list_keys(ours)] == [
            all_.key_id,
            some.key_id,
        ]
        assert all_.text not in str(fetch(dsn, "SELECT * FROM api_keys"))


async def test_a_key_is_revoked_once(dsn: str) -> None:
    async with Accounts.connect(dsn) as accounts:
        organisation = await accounts.create_organisation("ours")
        key = await accounts.create_key(organisation, scopes=["admin"], mode="live")
        assert [await accounts.revoke_key(key.key_id) for _ in range(2)] == [True, False]
        record = await accounts.load_key(key.key_id)
        assert record is not None
        assert record.revoked_at is not None
        assert not await accounts.revoke_key(ids.new_key_id())


async def test_an_identity_acts_for_merchants_of_its_organisation_alone(dsn: str) -> None:
    till, all_ = "spiffe://example.org/till", "spiffe://example.org/all"
    async with Accounts.connect(dsn) as accounts:
        ours = await accounts.create_organisation("ours")
        theirs = await accounts.create_organisation("theirs")
        one, two = [await accounts.create_merchant(ours, name) for name in ("one", "two")]
        foreign = await accounts.create_merchant(theirs, "foreign")
        with pytest.raises(GatewayError):
            await accounts.add_identity(
                till, ours, scopes=["payments:read"], mode="test", merchant_ids=[one, foreign]
            )
        await accounts.add_identity(
            till, ours, scopes=["payments:read"], mode="live", merchant_ids=[one], name="till"
        )
        await accounts.add_identity(all_, ours, scopes=[], mode="test")
        # Another organisation cannot take it over.
        for organisation_id in (theirs, ours, "org_none"):
            with pytest.raises(GatewayError):
                await accounts.add_identity(till, organisation_id, scopes=[], mode="test")
        found = await accounts.load_identity(till)
        assert found is not None
        assert (found.key_id, found.organisation_id, found.mode) == (till, ours, Mode.LIVE)
        assert found.scopes == {"payments:read"}
        assert set(found.merchants) == {one}
        later = await accounts.create_merchant(ours, "later")
        found = await accounts.load_identity(all_)
        assert found is not None
        assert set(found.merchants) == {one, two, later}
        assert await accounts.load_identity("spiffe://example.org/TILL") is None
        assert [each.uri for each in await accounts.list_identities(ours)] == [all_, till]
        assert await accounts.list_identities(theirs) == []
        assert [await accounts.remove_identity(till) for _ in range(2)] == [True, False]
        assert await accounts.load_identity(till) is None


async def test_merchants_are_those_of_the_organisation_and_of_the_names(dsn: str) -> None:
    async with Accounts.connect(dsn) as accounts:
        ours = await accounts.create_organisation("ours")
        theirs = await accounts.create_organisation("theirs")
        one = await accounts.create_merchant(ours, "one", pan_exempt_order_id=True)
        two = await accounts.create_merchant(ours, "two")
        foreign = await accounts.create_merchant(theirs, "foreign")
        found = await accounts.load_merchants(ours, None)
        assert {key: each.pan_exempt_order_id for key, each in found.items()} == {
            one: True,
            two: False,
        }
        assert set(await accounts.load_merchants(ours, [two, foreign])) == {two}
        assert await accounts.load_merchants(ours, []) == {}
        assert await accounts.load_merchants("org_none", None) == {}


async def test_a_reader_reads_over_one_connection(store: PostgresStore, dsn: str) -> None:
    payment = await authorized(store)
    async with AsyncExitStack() as stack:
        reader = await stack.enter_async_context(open_reader(dsn))
        aggregate = await reader.load(MERCHANT, payment.payment_id)
        sessions = fetch(
            dsn,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'gateway-reader%'",
        )
    assert aggregate is not None
    assert isinstance(aggregate.operations[0], Operation)
    assert sessions[0][0] == 1


# --- what a customer has to do ---


async def begun(store: PostgresStore) -> tuple[Operation, Payment]:
    intent = authorize()
    await store.write_intent(intent)
    return await stored(store, intent.operation)


@pytest.mark.parametrize(
    "action",
    [
        NextAction(),
        NextAction("https://psp.example/", expires_at=EXPIRES_AT),
        NextAction(qr_code=QrCode("0002", "https://psp.example/i", "https://psp.example/p")),
        NextAction(voucher=Voucher("123 456", "11249", "https://psp.example/v")),
        NextAction(await_approval=True, expires_at=EXPIRES_AT),
    ],
)
async def test_whatever_a_customer_has_to_do_comes_back_as_it_was_written(
    store: PostgresStore, action: NextAction
) -> None:
    operation, payment = await begun(store)
    change = outcome(
        operation, payment, changed_operation={"state": S.FAILED, "next_action": action}
    )
    assert await store.write_change(change) is Stored.WRITTEN
    operation, _ = await stored(store, operation)
    assert operation.next_action == action


async def test_an_address_of_before_typed_actions_is_a_redirect(
    store: PostgresStore, dsn: str
) -> None:
    operation, _ = await begun(store)
    fetch(
        dsn,
        f"UPDATE operations SET next_action_url = 'https://psp.example/'"
        f" WHERE operation_id = '{operation.operation_id}' RETURNING 1",
    )
    operation, _ = await stored(store, operation)
    assert operation.next_action == NextAction("https://psp.example/")


async def test_a_hastened_operation_is_due_unless_a_recoverer_has_it(
    store: PostgresStore, dsn: str
) -> None:
    operation, payment = await begun(store)
    change = outcome(operation, payment, changed_operation={"state": S.FAILED})
    await store.write_change(change)
    fetch(
        dsn,
        "INSERT INTO doubts (merchant_id, operation_id, payment_id, check_at)"
        f" VALUES ('{operation.merchant_id}', '{operation.operation_id}',"
        f" '{operation.payment_id}', now() + interval '1 day') RETURNING 1",
    )
    assert await store.lease(10, 60) == []
    await store.hasten(operation)
    [lease] = await store.lease(10, 60)
    assert lease.operation.operation_id == operation.operation_id
    fetch(dsn, "UPDATE doubts SET check_at = now() + interval '1 day' RETURNING 1")
    await store.hasten(operation)
    assert fetch(dsn, "SELECT check_at > now() FROM doubts")[0][0]
