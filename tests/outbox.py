"""Rows of the outbox that tests write by themselves, in transactions that end as the test says."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg
from payments.v1 import payment_pb2

from gateway.domain import ids
from gateway.domain.model import Mode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from storage.postgres.pool import Connection

_INSERT = (
    "INSERT INTO outbox (merchant_id, payment_id, payment_version, event_id, event_type, payload)"
    " VALUES ($1, $2, $3, $4, 'authorize.succeeded', $5)"
)


@dataclass(frozen=True, slots=True)
class Told:
    """An event, as whoever reads the stream knows it."""

    payment_id: str
    version: int
    event_id: str


async def tell(
    connection: Connection,
    merchant_id: str,
    *,
    payment_id: str = "",
    version: int = 2,
    mode: Mode = Mode.TEST,
    payload_bytes: int = 0,
) -> Told:
    """Write an event in the connection's transaction."""
    told = Told(payment_id or ids.new_payment_id(), version, ids.new_event_id())
    event = payment_pb2.PaymentEvent(
        event_version=1,
        event_type="authorize.succeeded",
        event_id=told.event_id,
        payment=payment_pb2.Payment(
            merchant_id=merchant_id,
            payment_id=told.payment_id,
            mode=payment_pb2.Mode.ValueType(mode),
            version=version,
            statement_descriptor="x" * payload_bytes,
        ),
    )
    await connection.execute(
        _INSERT, merchant_id, told.payment_id, version, told.event_id, event.SerializeToString()
    )
    return told


@asynccontextmanager
async def connection_to(dsn: str) -> AsyncIterator[Connection]:
    """A connection of the test's own."""
    connection: Connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def write_at_once(
    dsn: str, merchant_ids: Sequence[str], *, writers: int, rounds: int, seed: int
) -> dict[str, list[Told]]:
    """Transactions side by side that begin, write and end in a random order; by merchant.

    Each writer has payments of its own, whose versions it writes one after the other.
    """
    told: dict[str, list[Told]] = {merchant_id: [] for merchant_id in merchant_ids}

    async def one(number: int, connection: Connection) -> None:
        rng = random.Random(seed + number)
        versions: Counter[tuple[str, str]] = Counter()
        payments = [(rng.choice(merchant_ids), ids.new_payment_id()) for _ in range(3)]
        for _ in range(rounds):
            transaction = connection.transaction()
            await transaction.start()
            written = []
            for merchant_id, payment_id in rng.sample(payments, rng.randint(1, 3)):
                versions[merchant_id, payment_id] += 1
                version = versions[merchant_id, payment_id]
                event = await tell(connection, merchant_id, payment_id=payment_id, version=version)
                written.append((merchant_id, event))
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                await transaction.rollback()
                versions.subtract((m, e.payment_id) for m, e in written)
                continue
            await transaction.commit()
            for merchant_id, event in written:
                told[merchant_id].append(event)

    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connection_to(dsn)) for _ in range(writers)]
        await asyncio.gather(*(one(n, each) for n, each in enumerate(connections)))
    return told
