"""The audit's reads: pages of everything, each in one snapshot, on a lane of single calls."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from gateway.application.verification import OrphanPage, PaymentRows, Position
from gateway.domain.model import Aggregate, OperationState
from gateway.domain.states import UNFINISHED
from storage.postgres.lanes import DirectLane
from storage.postgres.pool import Connection
from storage.postgres.queries import query, run

_PAYMENTS = query("audit", "audit_payments")
_EVENTS = query("audit", "audit_events")
_UNFINISHED_OPERATIONS = query("audit", "audit_unfinished")
_DISCREPANCIES = query("audit", "audit_discrepancies")
_EXISTING = query("audit", "existing_payments")
_ORPHANS: Final = {
    table: query("audit", f"orphans_of_{table}")
    for table in (
        "operations",
        "outbox",
        "superseded_attempts",
        "doubts",
        "resolutions",
        "discrepancies",
    )
}

_LAST_TEXT: Final = "\U0010ffff"
"""Greater than every merchant's id, which compare by bytes."""

_Key = tuple[str, str]
Load = Callable[[Connection, Sequence[_Key]], Awaitable[list[Aggregate | Exception | None]]]


class PostgresAudit:
    """Implements `gateway.application.verification.AuditStore`.

    `load` reads payments with their operations; it gives an exception for one of which a row holds
    what no version of the gateway writes.
    """

    def __init__(self, lane: DirectLane, load: Load) -> None:
        self._lane = lane
        self._load = load

    @property
    def orphan_tables(self) -> Sequence[str]:
        """See AuditStore."""
        return tuple(_ORPHANS)

    async def audit_page(
        self, merchant_id: str | None, after: Position, limit: int, overdue_s: float
    ) -> Sequence[PaymentRows]:
        """See AuditStore."""

        async def read(connection: Connection) -> Sequence[PaymentRows]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                page = await run(
                    connection,
                    _PAYMENTS,
                    after_merchant_id=after[0],
                    after_id=after[1],
                    until_merchant_id=merchant_id or _LAST_TEXT,
                    limit=limit,
                )
                keys = [(record["merchant_id"], record["payment_id"]) for record in page]
                return await self._rows(connection, keys, overdue_s) if keys else []

        return await self._lane.run(read)

    async def _rows(
        self, connection: Connection, keys: Sequence[_Key], overdue_s: float
    ) -> list[PaymentRows]:
        named: dict[str, Any] = {
            "merchant_id": [merchant_id for merchant_id, _ in keys],
            "payment_id": [payment_id for _, payment_id in keys],
        }
        found = {key: PaymentRows(*key, aggregate=None) for key in keys}
        await self._aggregates(connection, found)
        events: dict[_Key, list[tuple[int, int, bytes]]] = defaultdict(list)
        for record in await run(connection, _EVENTS, **named):
            key = (record["merchant_id"], record["payment_id"])
            events[key].append((record["payment_version"], record["seq"], record["payload"]))
        doubts: dict[_Key, set[str]] = defaultdict(set)
        overdue: dict[_Key, set[str]] = defaultdict(set)
        for record in await run(
            connection,
            _UNFINISHED_OPERATIONS,
            **named,
            processing=OperationState.PROCESSING,
            unfinished=sorted(UNFINISHED),
            overdue_s=overdue_s,
        ):
            key = (record["merchant_id"], record["payment_id"])
            if record["listed"]:
                doubts[key].add(record["operation_id"])
            if record["overdue"]:
                overdue[key].add(record["operation_id"])
        kinds: dict[_Key, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for record in await run(connection, _DISCREPANCIES, **named):
            key = (record["merchant_id"], record["payment_id"])
            kinds[key][record["operation_id"]].add(record["kind"])
        for key, rows in found.items():
            rows.events = events[key]
            rows.doubts, rows.overdue = frozenset(doubts[key]), frozenset(overdue[key])
            rows.discrepancies = {each: frozenset(names) for each, names in kinds[key].items()}
        return list(found.values())

    async def _aggregates(self, connection: Connection, found: dict[_Key, PaymentRows]) -> None:
        aggregates = await self._load(connection, list(found))
        for rows, aggregate in zip(found.values(), aggregates, strict=True):
            if isinstance(aggregate, Exception):
                rows.unreadable = True
            else:
                rows.aggregate = aggregate

    async def orphans(
        self, table: str, merchant_id: str | None, after: Position, limit: int
    ) -> OrphanPage:
        """See AuditStore."""
        records = await self._lane.fetch(
            _ORPHANS[table],
            after_merchant_id=after[0],
            after_id=after[1],
            until_merchant_id=merchant_id or _LAST_TEXT,
            limit=limit,
        )
        orphans = [
            (record["merchant_id"], record["payment_id"], record["operation_id"])
            for record in records
            if record["is_orphan"]
        ]
        if not records or not records[-1]["whole"]:
            return OrphanPage(orphans, None)
        return OrphanPage(orphans, (records[-1]["merchant_id"], records[-1]["id"]))

    async def existing_payments(self, payment_ids: Sequence[str]) -> frozenset[str]:
        """See AuditStore."""
        return frozenset(
            record["payment_id"]
            for record in await self._lane.fetch(_EXISTING, payment_ids=list(payment_ids))
        )
