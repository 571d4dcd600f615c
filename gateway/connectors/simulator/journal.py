"""The simulator's durable journal, and what follows from it: the oracle of the tests.

JSON lines, only ever appended. A line is durable before anything that depends on it happens; lines
that come together share one fdatasync (group commit).
"""

import asyncio
import contextlib
import fcntl
import os
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import orjson

JOURNAL_VERSION: Final = 1

Record = dict[str, Any]


class JournalError(Exception):
    """The journal cannot be read or written."""


# --- reading --------------------------------------------------------------------------------------


def read_journal(path: str | Path) -> list[Record]:
    """The records of a journal, the oldest first; also while a simulator writes to it.

    A last line without its end was never durable, and is left out. Raises JournalError for a
    malformed line elsewhere.
    """
    return _parse(Path(path).read_bytes())


def _parse(data: bytes) -> list[Record]:
    lines = data.split(b"\n")
    del lines[-1]  # empty, or torn by a crash
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise JournalError(f"line {number} of the journal is malformed") from error
        if not isinstance(record, dict):
            raise JournalError(f"line {number} of the journal is no record")
        records.append(record)
    return records


@dataclass(slots=True)
class Standing:
    """What one authorization at the PSP amounts to, in minor units of its currency."""

    authorization_id: str
    reference: str
    """The reference of the authorization."""
    payment_id: str
    """The gateway's id of the payment, as its requests gave it."""
    account: str
    currency: str
    token: str
    authorized_minor: int = 0
    captured_minor: int = 0
    refunded_minor: int = 0
    voided_minor: int = 0
    reversed: bool = False
    """The whole was taken back, by a reversal or by cancelling its reference."""

    @property
    def open_minor(self) -> int:
        """Authorized, and neither captured nor voided."""
        return self.authorized_minor - self.captured_minor - self.voided_minor

    @property
    def net_minor(self) -> int:
        """Captured and not refunded."""
        return self.captured_minor - self.refunded_minor

    @property
    def stands(self) -> bool:
        """Whether the customer's money is held or was taken."""
        return self.open_minor > 0 or self.net_minor > 0


def standing_charges(records: Iterable[Record]) -> list[Standing]:
    """Every authorization that was ever made, the oldest first, with what stands of it now."""
    standings: dict[str, Standing] = {}
    for record in records:
        if record["type"] == "effect":
            apply_effect(standings, record)
    return list(standings.values())


def apply_effect(standings: dict[str, Standing], record: Mapping[str, Any]) -> None:
    """Bring what stands up to date with one record of the type `effect`."""
    effect = record["effect"]
    if effect in ("authorization", "charge"):
        standings[record["authorization_id"]] = standing = Standing(
            authorization_id=record["authorization_id"],
            reference=record["reference"],
            payment_id=record["payment_id"],
            account=record["account"],
            currency=record["currency"],
            token=record["token"],
        )
        standing.authorized_minor = record["amount_minor"]
        if effect == "charge":
            standing.captured_minor = record["amount_minor"]
    elif effect in ("cancel", "reversal", "bounce"):
        for item in record["takes_back"]:
            _change(standings, item, -1)
    elif effect != "verify":
        _change(standings, record, 1)


def _change(standings: dict[str, Standing], change: Mapping[str, Any], sign: int) -> None:
    effect = change["effect"]
    if effect == "verify":
        return
    standing = standings[change["authorization_id"]]
    amount_minor = sign * change["amount_minor"]
    if effect in ("authorization", "charge"):
        # Only ever taken back, and whole, whatever was captured or refunded since.
        standing.reversed = True
        standing.authorized_minor = standing.captured_minor = 0
        standing.refunded_minor = standing.voided_minor = 0
    elif standing.reversed:
        return
    elif effect == "capture":
        standing.captured_minor += amount_minor
        standing.voided_minor += sign * change["released_minor"]
    elif effect == "void":
        standing.voided_minor += amount_minor
    elif effect == "refund":
        standing.refunded_minor += amount_minor
    elif effect == "increment":
        standing.authorized_minor += amount_minor
    else:
        raise JournalError(f"the journal has an unknown effect {effect!r}")


# --- writing --------------------------------------------------------------------------------------


class Journal:
    """The writing end: appends from the event loop, commits in a thread of its own."""

    def __init__(self, path: Path, fd: int, run: int) -> None:
        self.path = path
        self.run = run
        """How many times a simulator was started on this journal, this one included."""
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._lines: list[bytes] = []
        self._next: asyncio.Future[None] | None = None
        """Done when what is in `_lines` is durable."""
        self._committing: asyncio.Future[None] | None = None
        self._batches: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._commit, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: str | Path) -> tuple[Self, list[Record]]:
        """Open or create a journal; returns its records too. A torn last line is cut off.

        Blocks, and needs a running event loop. Raises JournalError, also where another simulator
        has it.
        """
        path = Path(path).absolute()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"cannot open the journal: {error.strerror}") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise JournalError("another simulator has this journal") from error
            data = path.read_bytes()
            records = _parse(data)
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.ftruncate(fd, whole)
            os.fsync(fd)
            _sync_directory(path.parent)
        except BaseException:
            os.close(fd)
            raise
        run = 1 + sum(record["type"] == "start" for record in records)
        return cls(path, fd, run), records

    def append(self, record: Record) -> None:
        """Add a record; it is durable when the next `durable()` returns."""
        self._lines.append(orjson.dumps(record) + b"\n")
        if self._next is None:
            self._next = self._loop.create_future()
            if self._committing is None:
                # Whatever else this turn of the loop appends goes along.
                self._loop.call_soon(self._start)

    async def durable(self) -> None:
        """Wait until every record appended so far is on the disk.

        Waiters share one future, unshielded for speed: cancel one only where all are.
        """
        future = self._next or self._committing
        if future is not None:
            await future

    async def close(self) -> None:
        """Commit what is left and close the file."""
        await self.durable()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)
        os.close(self._fd)

    def _start(self) -> None:
        if self._lines and self._committing is None:
            self._committing, self._next = self._next, None
            self._batches.put(b"".join(self._lines))
            self._lines.clear()

    def _committed(self) -> None:
        done, self._committing = self._committing, None
        self._start()
        if done is not None and not done.done():
            done.set_result(None)

    def _commit(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                _write_all(self._fd, batch)
                os.fdatasync(self._fd)
            except OSError as error:
                # An oracle that cannot write must not answer: there is no way back from here.
                os.write(2, f"the journal cannot be written: {error.strerror}\n".encode())
                os._exit(1)
            with contextlib.suppress(RuntimeError):  # the loop was closed without close()
                self._loop.call_soon_threadsafe(self._committed)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
