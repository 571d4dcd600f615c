"""The simulator's journal by payment, for the audit: in SQLite on the disk, however long it is."""

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

import orjson

from gateway.connectors.simulator.journal import JournalError, Record, Standing, apply_effect
from gateway.domain.invariants import Charge

_SCHEMA: Final = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE effects (
    authorization_id TEXT NOT NULL, number INTEGER NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (authorization_id, number)
) WITHOUT ROWID;
CREATE TABLE charges (
    payment_id TEXT NOT NULL, authorization_id TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (payment_id, number)
) WITHOUT ROWID;
"""


class JournalBook:
    """Implements `gateway.application.verification.PspBook`.

    Reads the journal once, as a stream, into a scratch file. Raises JournalError for a malformed
    line (the last one, without its end, was never durable) and OSError.
    """

    def __init__(self, journal: Path, scratch: Path) -> None:
        self._database = sqlite3.connect(scratch, isolation_level=None)
        self._database.executescript(_SCHEMA)
        self._database.execute("BEGIN")
        try:
            with journal.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.endswith(b"\n"):
                        self._enter(number, _record(number, line))
        except BaseException:
            self._database.close()
            raise
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Close the scratch file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, number: int, record: Record) -> None:
        if record["type"] != "effect":
            return
        if record["effect"] in ("authorization", "charge"):
            self._database.execute(
                "INSERT INTO charges VALUES (?, ?, ?)",
                (record["payment_id"], record["authorization_id"], number),
            )
        data = orjson.dumps(record)
        for authorization_id in _authorizations(record):
            self._database.execute(
                "INSERT INTO effects VALUES (?, ?, ?)", (authorization_id, number, data)
            )

    def charges(self, payment_id: str) -> Sequence[Charge]:
        """See PspBook."""
        rows = self._database.execute(
            "SELECT authorization_id FROM charges WHERE payment_id = ? ORDER BY number",
            (payment_id,),
        ).fetchall()
        standings = [self._standing(authorization_id) for (authorization_id,) in rows]
        return [
            Charge(each.reference, each.open_minor, each.captured_minor, each.refunded_minor)
            for each in standings
            if not each.reversed
        ]

    def standing_payments(self, chunk: int) -> Iterator[Sequence[str]]:
        """See PspBook."""
        last = ""
        while True:
            rows = self._database.execute(
                "SELECT DISTINCT payment_id FROM charges WHERE payment_id > ?"
                " ORDER BY payment_id LIMIT ?",
                (last, chunk),
            ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield [payment_id for (payment_id,) in rows if self._stands(payment_id)]

    def _stands(self, payment_id: str) -> bool:
        return any(
            each.open_minor or each.captured_minor > each.refunded_minor
            for each in self.charges(payment_id)
        )

    def _standing(self, authorization_id: str) -> Standing:
        standings: dict[str, Standing] = {}
        for (data,) in self._database.execute(
            "SELECT record FROM effects WHERE authorization_id = ? ORDER BY number",
            (authorization_id,),
        ):
            apply_effect(standings, _of_one(orjson.loads(data), authorization_id))
        return standings[authorization_id]


def _record(number: int, line: bytes) -> Record:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise JournalError(f"line {number} of the journal is malformed") from error
    if not isinstance(record, dict) or "type" not in record:
        raise JournalError(f"line {number} of the journal is no record")
    return record


def _authorizations(record: Record) -> set[str]:
    """The authorizations that an effect changes."""
    if "takes_back" in record:
        return {item["authorization_id"] for item in record["takes_back"]}
    return {record["authorization_id"]} if record["effect"] != "verify" else set()


def _of_one(record: Record, authorization_id: str) -> dict[str, Any]:
    """The part of an effect that is about one authorization."""
    if "takes_back" not in record:
        return record
    items = [each for each in record["takes_back"] if each["authorization_id"] == authorization_id]
    return {**record, "takes_back": items}
