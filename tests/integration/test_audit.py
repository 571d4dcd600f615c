"""The audit against a real database: a good one is clean, and each corruption is reported."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from payments.v1 import payment_pb2

from gateway.application.administration import AdminFilter
from gateway.application.verification import Audit, Progress, Summary
from gateway.connectors.simulator.book import JournalBook
from gateway.connectors.simulator.journal import JournalError
from gateway.domain.invariants import Finding, Kind
from gateway.domain.model import OperationKind
from gateway.rpc.decoding import ContractDecoder
from storage.postgres import open_reader
from tests.harness import asyncio_run, calling, running_system
from tests.servers import fetch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from storage.embedded import EmbeddedRedis
    from storage.postgres import PostgresStore
    from tests.harness import System
    from tests.servers import PostgresForTests

EVERYTHING = AdminFilter(None, None, 0)


@pytest.fixture(scope="module")
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    """A database with payments of every kind, and the gateway that wrote them stopped."""
    with running_system(postgres, redis) as running:
        gateway = running.start_gateway()
        asyncio_run(lambda: _trade(running, gateway.address))
        gateway.stop()
        yield running


async def _trade(system: System, address: str) -> None:
    async with calling(address, system.shop.api_key) as caller:
        several = (await caller.authorize()).payment.payment_id
        await caller.capture(several, 300)
        await caller.capture(several, 200)
        await caller.refund(several, 400)
        await caller.void(several)
        await caller.authorize(capture_method="AUTOMATIC")
        await caller.authorize(token="tok_declined_do_not_honor")
        await caller.authorize(token="tok_partial_approval")
        await caller.authorize(token="tok_partial_approval", allow_partial_approval=True)
        await caller.authorize(amount_minor=0, capture_method="MANUAL")
        voided = (await caller.authorize()).payment.payment_id
        await caller.void(voided)
        whole = (await caller.authorize()).payment.payment_id
        await caller.capture(whole)
        await caller.refund(whole)
    from tests.faults.checker import settled  # noqa: PLC0415 - it needs nothing of this module

    await settled(system)


@pytest.fixture
def dsn(system: System, postgres: PostgresForTests) -> Iterator[str]:
    """A copy of that database, to be spoilt."""
    name = system.dsn.rpartition("/")[2]
    copy = postgres.create_database(name)
    yield copy
    postgres.drop_database(copy)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    async with open_reader(dsn) as opened:
        yield opened


async def audit(
    store: PostgresStore, book: JournalBook | None = None, **options: Any
) -> tuple[list[Finding], Summary]:
    findings = []
    async for each in Audit(store.audit, ContractDecoder(), EVERYTHING, book, **options).run():
        match each:
            case Finding():
                findings.append(each)
            case Summary():
                return findings, each
            case Progress():
                pass
    raise AssertionError("no summary")


async def test_a_good_database_is_clean_whatever_the_size_of_a_page(
    system: System, store: PostgresStore, tmp_path: Path
) -> None:
    payments = fetch(system.dsn, "SELECT count(*) FROM payments")[0][0]
    for size in (1, 3, 200):
        with JournalBook(system.directory / "journal.jsonl", tmp_path / f"{size}.sqlite") as book:
            findings, summary = await audit(store, book, payments_per_page=size)
        assert findings == []
        assert (summary.payments, summary.findings) == (payments, 0)


_SUCCEEDED_CAPTURE = f"kind = {OperationKind.CAPTURE:d} AND origin = 1 AND amount_minor = 300"
_CAPTURED = "payment_id = (SELECT payment_id FROM operations WHERE " + _SUCCEEDED_CAPTURE + ")"
_REFUND = f"kind = {OperationKind.REFUND:d} AND amount_minor = 400"
_PLAIN = "payment_id = (SELECT max(payment_id) FROM payments WHERE state = 9)"


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        (
            (
                "ALTER TABLE payments DROP CONSTRAINT captures_within_authorized;"
                f"UPDATE payments SET captured_minor = 1001 WHERE {_CAPTURED}"
            ),
            Kind.AMOUNTS_OUT_OF_BOUNDS,
        ),
        (f"UPDATE payments SET voided_minor = 501 WHERE {_CAPTURED}", Kind.AMOUNTS_OUT_OF_BOUNDS),
        (f"UPDATE payments SET captured_minor = 499 WHERE {_CAPTURED}", Kind.AMOUNTS_DIFFER),
        (f"UPDATE payments SET refunded_minor = 399 WHERE {_CAPTURED}", Kind.AMOUNTS_DIFFER),
        (f"UPDATE payments SET authorized_minor = 1001 WHERE {_CAPTURED}", Kind.AMOUNTS_DIFFER),
        (
            f"UPDATE payments SET refund_pending_minor = 1 WHERE {_CAPTURED}",
            Kind.RESERVATION_DIFFERS,
        ),
        (f"UPDATE payments SET state = 5 WHERE {_CAPTURED}", Kind.PAYMENT_STATE_DIFFERS),
        (f"UPDATE operations SET state = 6 WHERE {_SUCCEEDED_CAPTURE}", Kind.PATH_NOT_ALLOWED),
        (f"UPDATE operations SET state = 99 WHERE {_SUCCEEDED_CAPTURE}", Kind.ROW_UNREADABLE),
        (
            f"DELETE FROM outbox WHERE payment_version = 4 AND {_CAPTURED}",
            Kind.EVENT_MISSING,
        ),
        (
            (
                "DELETE FROM outbox WHERE seq = 0 AND (merchant_id, payment_id, payment_version) IN"
                " (SELECT merchant_id, payment_id, payment_version FROM outbox WHERE seq = 1)"
            ),
            Kind.EVENT_MISSING,
        ),
        (
            (
                "INSERT INTO outbox SELECT merchant_id, payment_id, payment_version + 90, xact_id,"
                f" created_at, seq, event_id, event_type, payload FROM outbox WHERE {_CAPTURED}"
                " AND payment_version = 2"
            ),
            Kind.EVENT_UNEXPECTED,
        ),
        (f"UPDATE outbox SET payload = '\\xff' WHERE {_CAPTURED}", Kind.EVENT_UNREADABLE),
        (f"UPDATE payments SET version = version + 1 WHERE {_CAPTURED}", Kind.EVENT_MISSING),
        (
            f"UPDATE operations SET response = NULL WHERE {_SUCCEEDED_CAPTURE}",
            Kind.ANSWER_MISSING,
        ),
        (
            f"UPDATE operations SET response = '\\xff' WHERE {_SUCCEEDED_CAPTURE}",
            Kind.ANSWER_UNREADABLE,
        ),
        (
            (
                "UPDATE operations SET response = (SELECT response FROM operations WHERE"
                f" {_REFUND}) WHERE {_SUCCEEDED_CAPTURE}"
            ),
            Kind.ANSWER_DIFFERS,
        ),
        (f"UPDATE operations SET state = 7 WHERE {_SUCCEEDED_CAPTURE}", Kind.ANSWER_UNEXPECTED),
        (f"UPDATE operations SET state = 8 WHERE {_SUCCEEDED_CAPTURE}", Kind.DOUBT_NOT_LISTED),
        (
            (
                "UPDATE operations SET state = 1, recover_after = now() - interval '1 hour'"
                f" WHERE {_SUCCEEDED_CAPTURE}"
            ),
            Kind.DOUBT_NOT_LISTED,
        ),
        (
            f"UPDATE operations SET attempt_number = 2 WHERE {_SUCCEEDED_CAPTURE}",
            Kind.ATTEMPTS_DIFFER,
        ),
        (f"UPDATE operations SET allocations = '[]' WHERE {_REFUND}", Kind.ALLOCATIONS_DIFFER),
        (
            "UPDATE operations SET allocations = '[[\"op_none\", 400]]'" + f" WHERE {_REFUND}",
            Kind.ALLOCATIONS_DIFFER,
        ),
        (
            f"UPDATE operations SET parent_operation_id = 'op_none' WHERE {_REFUND}",
            Kind.OPERATIONS_DIFFER,
        ),
        (f"UPDATE operations SET currency = 'USD' WHERE {_REFUND}", Kind.OPERATIONS_DIFFER),
        (f"DELETE FROM operations WHERE {_CAPTURED}", Kind.OPERATIONS_DIFFER),
        (f"DELETE FROM operations WHERE kind = 1 AND {_CAPTURED}", Kind.OPERATIONS_DIFFER),
        (f"DELETE FROM payments WHERE {_CAPTURED}", Kind.ORPHAN),
        (
            (
                "INSERT INTO outbox (merchant_id, payment_id, payment_version, event_id,"
                " event_type, payload) VALUES ('mer_x', 'pay_x', 1, 'evt_x', 'x', '')"
            ),
            Kind.ORPHAN,
        ),
        ("INSERT INTO doubts VALUES ('mer_x', 'op_x', 'pay_x', now(), now())", Kind.ORPHAN),
        (
            "INSERT INTO superseded_attempts VALUES ('mer_x', 'op_x', 1, 1, NULL, 'c', 'a', '')",
            Kind.ORPHAN,
        ),
        (
            (
                "INSERT INTO resolutions VALUES ('mer_x', 'op_x', 1, 'pay_x', now(), 'w', 1, '',"
                " NULL, 'r', '', 8, 4, 4, 5, 2)"
            ),
            Kind.ORPHAN,
        ),
        (
            (
                "INSERT INTO discrepancies (merchant_id, payment_id, operation_id, kind, expected,"
                " reported) VALUES ('mer_x', 'pay_x', 'op_x', 'k', '', '')"
            ),
            Kind.ORPHAN,
        ),
    ],
)
async def test_a_corruption_is_reported(
    dsn: str, store: PostgresStore, sql: str, kind: Kind
) -> None:
    for statement in sql.split(";"):
        fetch(dsn, statement)
    findings, summary = await audit(store)
    assert kind in {each.kind for each in findings}
    assert summary.by_kind[kind] == sum(each.kind is kind for each in findings)


async def test_a_state_that_no_move_of_the_table_leads_to_is_reported(
    dsn: str, store: PostgresStore
) -> None:
    """An event that tells SUCCEEDED after a decline; the row agrees with it."""
    [row] = fetch(
        dsn,
        "SELECT merchant_id, payment_id, payload FROM outbox JOIN operations"
        " USING (merchant_id, payment_id)"
        " WHERE operations.state = 5 AND event_type LIKE '%declined'"
        " AND NOT EXISTS (SELECT FROM outbox AS more WHERE more.payment_id = outbox.payment_id"
        " AND (more.payment_version, more.seq) <> (outbox.payment_version, outbox.seq))"
        " LIMIT 1",
    )
    event = payment_pb2.PaymentEvent.FromString(row["payload"])
    event.operation.state = payment_pb2.OPERATION_STATE_SUCCEEDED
    event.payment.version += 1
    fetch(
        dsn,
        "INSERT INTO outbox (merchant_id, payment_id, payment_version, event_id, event_type,"
        " payload) VALUES ($1, $2, $3, 'evt_x', 'x', $4)",
        row["merchant_id"],
        row["payment_id"],
        event.payment.version,
        event.SerializeToString(),
    )
    fetch(
        dsn,
        "UPDATE payments SET version = version + 1 WHERE merchant_id = $1 AND payment_id = $2",
        row["merchant_id"],
        row["payment_id"],
    )
    findings, _ = await audit(store)
    moves = [each.detail for each in findings if each.kind is Kind.PATH_NOT_ALLOWED]
    assert "DECLINED to SUCCEEDED" in moves


async def test_findings_beyond_the_limit_are_counted_and_not_told(
    dsn: str, store: PostgresStore
) -> None:
    fetch(dsn, "UPDATE payments SET increment_pending_minor = 1")
    payments = fetch(dsn, "SELECT count(*) FROM payments")[0][0]
    findings, summary = await audit(store, findings_max=2)
    assert len(findings) == 2
    assert summary.by_kind == {Kind.RESERVATION_DIFFERS: payments}


# --- against the PSP's journal --------------------------------------------------------------------


def spoilt(system: System, directory: Path, change: Any) -> Path:
    """The journal with some of its records changed; `change` gives None for one that goes."""
    path = directory / "journal.jsonl"
    lines = []
    for number, record in enumerate(system.simulator.records()):
        lines += [json.dumps(each) + "\n" for each in change(number, record)]
    path.write_text("".join(lines), "utf-8")
    return path


def _is_authorization(record: dict[str, Any]) -> bool:
    return bool(record["type"] == "effect" and record["effect"] == "authorization")


def _twice(number: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    if not _is_authorization(record):
        return [record]
    again = {**record, "authorization_id": f"again-{number}", "reference": f"again-{number}-1"}
    return [record, again]


def _strange(number: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    if not _is_authorization(record):
        return [record]
    other = {**record, "authorization_id": f"new-{number}", "payment_id": f"pay_new_{number}"}
    return [record, other]


def _dearer(_: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    if record["type"] == "effect" and record["effect"] == "capture":
        return [{**record, "amount_minor": record["amount_minor"] + 1}]
    return [record]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_twice, Kind.CHARGED_TWICE),
        (_strange, Kind.CHARGE_UNRECORDED),
        (_dearer, Kind.CHARGE_DIFFERS),
    ],
)
async def test_a_journal_that_contradicts_is_reported(
    system: System, store: PostgresStore, tmp_path: Path, change: Any, kind: Kind
) -> None:
    with JournalBook(spoilt(system, tmp_path, change), tmp_path / "book.sqlite") as book:
        findings, _ = await audit(store, book)
    assert kind in {each.kind for each in findings}


async def test_a_success_that_the_psp_does_not_have_is_reported(
    system: System, store: PostgresStore, dsn: str, tmp_path: Path
) -> None:
    [row] = fetch(
        dsn, "SELECT payment_id FROM payments WHERE state = 7 AND capture_method = 1 LIMIT 1"
    )

    def lost(_: int, record: dict[str, Any]) -> list[dict[str, Any]]:
        theirs = record["type"] == "effect" and record.get("payment_id") == row["payment_id"]
        return [] if theirs else [record]

    with JournalBook(spoilt(system, tmp_path, lost), tmp_path / "book.sqlite") as book:
        findings, _ = await audit(store, book)
    assert [(each.kind, each.payment_id) for each in findings] == [
        (Kind.SUCCESS_WITHOUT_CHARGE, row["payment_id"])
    ]


async def test_a_charge_of_a_declined_payment_is_reported(
    system: System, store: PostgresStore, dsn: str, tmp_path: Path
) -> None:
    [declined] = fetch(
        dsn,
        "SELECT payment_id FROM payments WHERE state = 11 AND NOT EXISTS (SELECT FROM operations"
        " WHERE operations.payment_id = payments.payment_id AND kind = 7)",
    )

    def charged(number: int, record: dict[str, Any]) -> list[dict[str, Any]]:
        if not _is_authorization(record):
            return [record]
        theirs = {"authorization_id": f"x-{number}", "payment_id": declined["payment_id"]}
        return [record] if number > first else [record, {**record, **theirs}]

    first = next(i for i, each in enumerate(system.simulator.records()) if _is_authorization(each))
    with JournalBook(spoilt(system, tmp_path, charged), tmp_path / "book.sqlite") as book:
        findings, _ = await audit(store, book)
    assert [(each.kind, each.payment_id) for each in findings] == [
        (Kind.CHARGE_WITHOUT_SUCCESS, declined["payment_id"])
    ]


def test_a_malformed_line_is_an_error_and_a_torn_last_one_is_not(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b'{"type":"start"}\n{"type":"eff')
    JournalBook(journal, tmp_path / "1.sqlite").close()
    for data in (b"{\n", b"[]\n"):
        journal.write_bytes(data)
        with pytest.raises(JournalError):
            JournalBook(journal, tmp_path / f"{len(data)}{data[:1]!r}.sqlite")
