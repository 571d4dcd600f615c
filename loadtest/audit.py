"""The audit after a run: what callers were told against PostgreSQL and the PSP's journal.

Callers' answers are the reference: each has to stand in the database once, with the very answer
that was given. What was told and what is stored are held to the PSP, operation by operation: a
success was done once, what did not happen was not done. A call without an answer is unknown, never
a failure: it may have been charged, once, as the database has it. Books and comparison are in
SQLite on the disk (`audit.sql`), and both sides are read as streams.
"""

import asyncio
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

import asyncpg
import grpc
import orjson
from payments.v1.payment_service_pb2 import GetOperationRequest, GetOperationResponse

from loadtest.calls import SERVICE, Acknowledged
from loadtest.engine import Target

CHUNK_ROWS: Final = 5_000
CALLS_MAX: Final = 64
"""GetOperation calls at once, where there is no database to read."""
CALL_TIMEOUT_S: Final = 15.0
SETTLE_TIMEOUT_S: Final = 30.0
"""How long unfinished operations are waited for."""
SETTLE_POLL_S: Final = 0.2

# Each index serves a condition of its own collation only: the key's, then the payment's.
# PROCESSING and IN_DOUBT are unfinished, whichever operation of the payment it is.
_STORED_SQL: Final = """
SELECT o.idempotency_key, o.operation_id, o.payment_id, o.state, o.amount_minor,
    coalesce(encode(sha256(o.response), 'hex'), '') AS digest,
    told.merchant_id, o.created_at,
    ARRAY(
        SELECT other.operation_id FROM operations other
        WHERE other.payment_id = o.payment_id
            AND other.merchant_id COLLATE "default" = told.merchant_id
            AND other.state IN (1, 8)
    ) AS unfinished
FROM unnest($1::text[], $2::text[]) AS told (merchant_id, key)
JOIN operations o
    ON o.idempotency_key = told.key AND o.merchant_id COLLATE "POSIX" = told.merchant_id
"""
# Reversals without a definite outcome. What is taken back of a run came after its first operation.
_REVERSING_SQL: Final = """
SELECT DISTINCT payment_id FROM operations
WHERE created_at >= $1 AND kind = 7 AND state IN (1, 2, 3, 8)
"""
_DISCREPANCIES_SQL: Final = "SELECT payment_id FROM discrepancies WHERE created_at >= $1"

_STATEMENTS: Final = frozenset({"schema", "indexes", "only_merchant"})
"""The parts of audit.sql that are no questions."""

_DOING: Final = frozenset(
    {"authorization", "charge", "capture", "void", "refund", "increment", "verify"}
)
"""The journal's effects that do something; the others only take back."""

Stored = tuple[str, str, str, int, int, str]
STORED_COLUMNS: Final = 6


@dataclass(frozen=True, slots=True)
class Audit:
    """What the comparison found. None: the book for it was not at hand."""

    acked: int
    """Authorizations that a caller was told about."""
    acked_operations: int
    """The same, captures and all else too."""
    missing: int
    """Acknowledged authorizations and operations that are not in the database, and successes
    that the PSP has not done."""
    missing_rows: int
    repeated_rows: int
    contradicted: int
    unkept: int | None
    uncharged: int | None
    """Successes of any kind, told or stored, that the PSP has not done with their amount."""
    charged_declines: int | None
    """What was declined, failed, not sent or cancelled, told or stored, and stands at the PSP."""
    charged_refusals: int | None
    duplicate_charges: int | None
    repeated_effects: int | None
    """Captures, voids, refunds and increments that the PSP did beyond the first of each."""
    unrecorded_charges: int | None
    unknown: int
    """Calls without an answer, whose outcome is open. No failure."""
    unknown_recorded: int
    unfinished: int | None
    """Operations of these payments that had no definite outcome after all the waiting."""
    discrepancies: int | None
    """Where the PSP reported something else of these payments than was asked for."""
    source: str
    """What was compared with."""

    @property
    def clean(self) -> bool:
        """Whether nothing contradicts what callers were told."""
        return not any(
            getattr(self, each.name) for each in fields(self) if each.name not in _NO_FAULT
        )

    def figures(self) -> dict[str, Any]:
        """For a summary."""
        return {**asdict(self), "clean": self.clean}


_NO_FAULT: Final = frozenset(
    {
        *("acked", "acked_operations", "unknown", "unknown_recorded", "unfinished"),
        *("discrepancies", "source"),
    }
)
_CHARGES: Final = (
    *("uncharged", "charged_declines", "charged_refusals"),
    *("duplicate_charges", "repeated_effects", "unrecorded_charges"),
)


class Books:
    """Both sides, on the disk."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._queries = _queries(Path(__file__).with_name("audit.sql").read_text("utf-8"))
        self._database = sqlite3.connect(path, isolation_level=None)
        # A scratch file: nothing of it has to survive a crash.
        self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
        self._database.executescript(self._queries["schema"])

    def tell(self, told: Iterable[Acknowledged]) -> None:
        """Enter what callers were told."""
        self._enter("INSERT INTO told VALUES (?, ?, ?, ?, ?, ?, ?, ?)", told)
        # A call that named no merchant and was not answered is of the key's only one.
        self._database.execute(self._queries["only_merchant"])

    def store(self, rows: Iterable[Stored]) -> None:
        """Enter what the gateway has."""
        self._enter("INSERT INTO stored VALUES (?, ?, ?, ?, ?, ?)", rows)

    def charge(self, journal: Path) -> None:
        """Enter what the PSP's journal says."""
        self._enter("INSERT INTO effects VALUES (?, ?, ?, ?, ?)", _done(journal))
        self._enter("INSERT OR IGNORE INTO taken_back VALUES (?)", _taken_back(journal))

    def reverse(self, payment_ids: Iterable[str]) -> None:
        """Enter the payments of which something is being taken back."""
        self._enter("INSERT OR IGNORE INTO reversing VALUES (?)", ((each,) for each in payment_ids))

    def concerned(self, payment_ids: Iterable[str]) -> int:
        """How many of these are of payments that were entered as stored."""
        # The index on them comes with the comparison.
        known = self._database.execute("SELECT DISTINCT payment_id FROM stored")
        asked = Counter(payment_ids)
        return sum(asked[payment_id] for (payment_id,) in known) if asked else 0

    def portions(self) -> Iterator[list[tuple[str, str]]]:
        """Merchants and keys of every call, in portions."""
        last = 0
        while True:
            rows = self._database.execute(
                "SELECT max(rowid), merchant_id, key FROM told WHERE rowid > ? AND rowid <= ?"
                " GROUP BY merchant_id, key",
                (last, last + CHUNK_ROWS),
            ).fetchall()
            if not rows:
                return
            last += CHUNK_ROWS
            yield [(merchant_id, key) for _, merchant_id, key in rows]

    def compare(
        self,
        source: str,
        *,
        answers: bool,
        charges: bool,
        unfinished: int | None,
        discrepancies: int | None,
    ) -> Audit:
        """The result; `answers` says whether frozen answers were entered, `charges` the journal."""
        # A key's rows may have come once for each portion that names it: equal ones are one.
        self._database.executescript(
            "CREATE TABLE once AS SELECT DISTINCT * FROM stored; DROP TABLE stored;"
            "ALTER TABLE once RENAME TO stored;"
        )
        self._database.executescript(self._queries["indexes"])
        found: dict[str, Any] = {
            name: self._database.execute(sql).fetchone()[0]
            for name, sql in self._queries.items()
            if name not in _STATEMENTS
        }
        if not answers:
            found["unkept"] = None
        if not charges:
            found |= dict.fromkeys(_CHARGES)
        return Audit(
            missing=found["missing_rows"] + (found["uncharged"] or 0),
            unfinished=unfinished,
            discrepancies=discrepancies,
            source=source,
            **found,
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _enter(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        self._database.execute("BEGIN")
        self._database.executemany(statement, rows)
        self._database.execute("COMMIT")


def check_database(dsn: str) -> None:
    """Whether the books can be read there. Raises asyncpg's errors and OSError."""
    asyncio.run(_look(dsn))


def audit_by_database(
    told: Iterable[Acknowledged],
    dsn: str,
    journal: Path | None,
    scratch: Path,
    *,
    settle_s: float = SETTLE_TIMEOUT_S,
) -> Audit:
    """Compare with PostgreSQL, and with the simulator's journal where there is one.

    Waits up to `settle_s` seconds for operations without a definite outcome. Raises asyncpg's
    errors and OSError.
    """
    with closing(Books(scratch)) as books:
        books.tell(told)
        unfinished, discrepancies = asyncio.run(_read_database(books, dsn, settle_s))
        if journal is not None:
            books.charge(journal)
        source = "PostgreSQL" if journal is None else "PostgreSQL and the simulator's journal"
        return books.compare(
            source,
            answers=True,
            charges=journal is not None,
            unfinished=unfinished,
            discrepancies=discrepancies,
        )


def audit_by_calls(told: Iterable[Acknowledged], target: Target, scratch: Path) -> Audit:
    """Compare with what GetOperation says of every key: where no database is within reach.

    Ids, amounts and states are compared, frozen answers and charges cannot be. Raises AioRpcError.
    """
    with closing(Books(scratch)) as books:
        books.tell(told)
        asyncio.run(_ask_all(books, target))
        return books.compare(
            "GetOperation", answers=False, charges=False, unfinished=None, discrepancies=None
        )


async def _look(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.fetch(_STORED_SQL, [], [])
        await connection.fetch(_DISCREPANCIES_SQL, datetime.now(UTC))
    finally:
        await connection.close()


async def _read_database(books: Books, dsn: str, settle_s: float) -> tuple[int, int]:
    """Enter what is stored; how many operations stay unfinished, and how many discrepancies.

    Only what was told of is asked for, since others may use this database too.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + settle_s
    unfinished: set[str] = set()
    began: list[datetime] = []
    connection = await asyncpg.connect(dsn)
    try:
        for portion in books.portions():
            waiting = portion
            while waiting:
                is_last = clock() >= until
                rows = await connection.fetch(
                    _STORED_SQL,
                    [merchant_id for merchant_id, _ in waiting],
                    [key for _, key in waiting],
                )
                definite = [row for row in rows if is_last or not row["unfinished"]]
                books.store(tuple(row)[:STORED_COLUMNS] for row in definite)
                began = sorted([*began, *(row["created_at"] for row in definite)])[:1]
                waiting = [
                    (row["merchant_id"], row["idempotency_key"])
                    for row in rows
                    if row["unfinished"]
                ]
                if is_last:
                    unfinished.update(*(row["unfinished"] for row in rows))
                    break
                if waiting:
                    await asyncio.sleep(SETTLE_POLL_S)
        if not began:
            return len(unfinished), 0
        reversing = await connection.fetch(_REVERSING_SQL, *began)
        books.reverse(row["payment_id"] for row in reversing)
        discrepancies = await connection.fetch(_DISCREPANCIES_SQL, *began)
        return len(unfinished), books.concerned(row["payment_id"] for row in discrepancies)
    finally:
        await connection.close()


async def _ask_all(books: Books, target: Target) -> None:
    # A limit of the target's, or what it still has to do of the run, must not end the audit.
    channels = replace(target, retries=True).channels()
    calls: list[Any] = [channel.unary_unary(f"/{SERVICE}/GetOperation") for channel in channels]
    metadata = (("authorization", f"Bearer {target.api_key}"),)
    room = asyncio.Semaphore(CALLS_MAX)

    async def ask(number: int, merchant_id: str, key: str) -> Stored | None:
        request = GetOperationRequest(merchant_id=merchant_id, idempotency_key=key)
        async with room:
            try:
                data = await calls[number % len(calls)](
                    request.SerializeToString(), metadata=metadata, timeout=CALL_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return None
                raise
        operation = GetOperationResponse.FromString(data).operation
        return (
            operation.idempotency_key,
            operation.operation_id,
            operation.payment_id,
            operation.state,
            operation.amount.amount_minor,
            "",
        )

    try:
        for portion in books.portions():
            answers = await asyncio.gather(
                *(ask(number, *each) for number, each in enumerate(portion))
            )
            books.store(answer for answer in answers if answer is not None)
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


def _effects(journal: Path) -> Iterator[dict[str, Any]]:
    """The effects of a journal, line by line. A last line without its end was never durable."""
    with journal.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and b'"type":"effect"' in line:
                yield orjson.loads(line)


def _done(journal: Path) -> Iterator[tuple[str, str, str, str, int]]:
    for effect in _effects(journal):
        if effect["effect"] in _DOING:
            # The reference of an attempt is its operation's id, a dash and its number.
            operation_id = effect["reference"].rpartition("-")[0]
            yield (
                effect["transaction_id"],
                effect["effect"],
                operation_id,
                effect["payment_id"],
                effect["amount_minor"],
            )


def _taken_back(journal: Path) -> Iterator[tuple[str]]:
    for effect in _effects(journal):
        for item in effect.get("takes_back", ()):
            yield (item["transaction_id"],)


def _queries(text: str) -> dict[str, str]:
    """The named parts of audit.sql."""
    parts = re.split(r"^-- (\w+)(?::.*)?\n", text, flags=re.MULTILINE)
    return dict(zip(islice(parts, 1, None, 2), islice(parts, 2, None, 2), strict=True))
