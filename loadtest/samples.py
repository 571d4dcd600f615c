"""What a generator hands over: one record for each intended send, and what callers were told.

Both are files that several generators' parts can be appended to in any order, and that are read as
streams, so that an hour at full rate needs no memory.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from loadtest.calls import Acknowledged

SAMPLES_FILE: Final = "samples.bin"
ACKNOWLEDGED_FILE: Final = "acknowledged.tsv"
OUTCOME_FILE: Final = "generator.json"
"""The names of a run's files in its folder."""

RECORD: Final = struct.Struct("<ffffBBBx")
READ_RECORDS: Final = 10_000
"""Records that are read at once."""


class Sample(NamedTuple):
    """One intended send and what came of it."""

    at_s: float
    """When it was intended, in seconds since the start of the schedule."""
    late_ms: float
    """How much later it was sent, by the generator's fault."""
    latency_ms: float
    """From the intended time to the answer."""
    added_ms: float
    """The latency without the delay that the PSP drew for this call."""
    kind: int
    segment: int
    code: int


def read_samples(path: Path) -> Iterator[Sample]:
    """Every sample of a file. A torn last record is left out."""
    with path.open("rb") as file:
        while data := file.read(READ_RECORDS * RECORD.size):
            whole = len(data) - len(data) % RECORD.size
            yield from map(Sample._make, RECORD.iter_unpack(data[:whole]))


def unpack_samples(data: bytes) -> Iterator[Sample]:
    """The samples of whole records."""
    return map(Sample._make, RECORD.iter_unpack(data))


def acknowledged_lines(told: Iterable[Acknowledged]) -> bytes:
    """As lines of a file; no field can hold a tab or the end of a line."""
    return "".join(
        f"{each.kind}\t{each.merchant_id}\t{each.key}\t{each.operation_id}\t{each.payment_id}"
        f"\t{each.state}\t{each.amount_minor}\t{each.digest}\n"
        for each in told
    ).encode()


def read_acknowledged(path: Path) -> Iterator[Acknowledged]:
    """What callers were told, in the order of the file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            kind, merchant, key, operation, payment, state, amount, digest = line[:-1].split("\t")
            yield Acknowledged(
                kind, merchant, key, operation, payment, int(state), int(amount), digest
            )
