"""The audit of the whole database, page by page: progress, findings, and a summary at the end."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from gateway.application.administration import AdminFilter
from gateway.application.ports import StoreUnavailable
from gateway.domain import invariants
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.invariants import Charge, Finding, Kind, StoredEvent, Told
from gateway.domain.model import Aggregate

PAYMENTS_PER_PAGE: Final = 200
"""What is held in memory at once: so many payments with their operations and events."""
ROWS_PER_PAGE: Final = 5_000
"""How many rows are looked at for orphans at once."""
FINDINGS_MAX: Final = 1_000
"""Findings that are told one by one; further ones are counted."""
OVERDUE_S: Final = 60.0
"""How long after its time an operation may still be unknown to recovery."""

Position: TypeAlias = tuple[str, str]
"""(merchant, id): the last row of a page."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an audit is."""

    payments: int
    findings: int


@dataclass(frozen=True, slots=True)
class Summary:
    """How an audit ended."""

    payments: int
    findings: int
    by_kind: Mapping[Kind, int]


@dataclass(slots=True)
class PaymentRows:
    """A payment with all rows about it, as they stand at one moment."""

    merchant_id: str
    payment_id: str
    aggregate: Aggregate | None
    """None: its rows cannot be read, or it has no operations."""
    unreadable: bool = False
    events: Sequence[tuple[int, int, bytes]] = ()
    """(version, number, payload)."""
    doubts: frozenset[str] = frozenset()
    overdue: frozenset[str] = frozenset()
    discrepancies: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(slots=True)
class OrphanPage:
    """A page of a table's rows: those whose payment or operation does not exist."""

    orphans: Sequence[tuple[str, str, str]]
    """(merchant, payment or empty, operation or empty)."""
    next_after: Position | None


class AuditStore(Protocol):
    """What the audit reads. Every method raises StoreUnavailable where the database is away."""

    @property
    def orphan_tables(self) -> Sequence[str]:
        """The tables whose rows belong to a payment or operation."""

    async def audit_page(
        self, merchant_id: str | None, after: Position, limit: int, overdue_s: float
    ) -> Sequence[PaymentRows]:
        """The payments after a position, of one merchant or of all, in one snapshot."""

    async def orphans(
        self, table: str, merchant_id: str | None, after: Position, limit: int
    ) -> OrphanPage:
        """Looks at a page of a table."""

    async def existing_payments(self, payment_ids: Sequence[str]) -> frozenset[str]:
        """Those of the payments that the database has, of whatever merchant."""


class Decoder(Protocol):
    """Reads the contract's bytes; None for what is none."""

    def answer(self, data: bytes) -> Told | None:
        """A stored answer of whatever kind of operation."""

    def event(self, data: bytes) -> Told | None:
        """An event of the outbox."""


class PspBook(Protocol):
    """What a PSP's journal says, by payment."""

    def charges(self, payment_id: str) -> Sequence[Charge]:
        """The authorizations of a payment that were not taken back."""

    def standing_payments(self, chunk: int) -> Iterator[Sequence[str]]:
        """The payments of which something stands, so many at a time."""


class Audit:
    """One audit.

    Args:
        filter_: the merchants and the mode.
        book: a PSP's journal, of all merchants; without it only the database is looked at.
    """

    def __init__(
        self,
        store: AuditStore,
        decoder: Decoder,
        filter_: AdminFilter,
        book: PspBook | None = None,
        *,
        payments_per_page: int = PAYMENTS_PER_PAGE,
        findings_max: int = FINDINGS_MAX,
    ) -> None:
        self._store = store
        self._decoder = decoder
        self._filter = filter_
        self._book = book
        self._payments_per_page = payments_per_page
        self._findings_max = findings_max
        self._payments = 0
        self._by_kind: Counter[Kind] = Counter()

    async def run(self) -> AsyncIterator[Progress | Finding | Summary]:
        """Progress after each page, each finding, and the summary at the end.

        Raises GatewayError(STORE_UNAVAILABLE).
        """
        scope: Sequence[str | None] = [None]
        if self._filter.merchant_ids is not None:
            scope = sorted(self._filter.merchant_ids)
        try:
            for merchant_id in scope:
                async for each in self._merchant(merchant_id):
                    yield each
            if self._filter.merchant_ids is None and self._filter.mode is None:
                async for finding in self._unrecorded():
                    yield finding
        except StoreUnavailable as error:
            raise GatewayError(
                Reason.STORE_UNAVAILABLE, "The store is away; begin the audit anew."
            ) from error
        yield Summary(self._payments, self._by_kind.total(), dict(self._by_kind))

    async def _merchant(self, merchant_id: str | None) -> AsyncIterator[Progress | Finding]:
        after = (merchant_id or "", "")
        while True:
            page = await self._store.audit_page(
                merchant_id, after, self._payments_per_page, OVERDUE_S
            )
            for each in page:
                for finding in self._counted(self._check(each)):
                    yield finding
            yield Progress(self._payments, self._by_kind.total())
            if len(page) < self._payments_per_page:
                break
            after = (page[-1].merchant_id, page[-1].payment_id)
        for table in self._store.orphan_tables:
            async for finding in self._orphans(table, merchant_id):
                yield finding

    def _check(self, rows: PaymentRows) -> list[Finding]:
        aggregate = rows.aggregate
        if aggregate is None:
            kind = Kind.ROW_UNREADABLE if rows.unreadable else Kind.OPERATIONS_DIFFER
            text = "its rows cannot be read" if rows.unreadable else "it has no operations"
            self._payments += 1
            return [Finding(kind, rows.merchant_id, rows.payment_id, "", text)]
        if self._filter.mode not in (None, aggregate.payment.mode):
            return []
        self._payments += 1
        stored = invariants.Stored(
            payment=aggregate.payment,
            operations=aggregate.operations,
            events=[
                StoredEvent(version, seq, self._decoder.event(payload))
                for version, seq, payload in rows.events
            ],
            answers={
                each.operation_id: self._decoder.answer(each.response)
                for each in aggregate.operations
                if each.response is not None
            },
            doubts=rows.doubts,
            overdue=rows.overdue,
            discrepancies=rows.discrepancies,
        )
        findings = invariants.check(stored)
        if self._book is not None:
            findings += invariants.check_charges(stored, self._book.charges(rows.payment_id))
        return findings

    async def _orphans(self, table: str, merchant_id: str | None) -> AsyncIterator[Finding]:
        after: Position | None = (merchant_id or "", "")
        while after is not None:
            page = await self._store.orphans(table, merchant_id, after, ROWS_PER_PAGE)
            found = [
                Finding(Kind.ORPHAN, merchant, payment_id, operation_id, f"a row of {table}")
                for merchant, payment_id, operation_id in page.orphans
            ]
            for finding in self._counted(found):
                yield finding
            after = page.next_after

    async def _unrecorded(self) -> AsyncIterator[Finding]:
        """What stands at the PSP for payments that nobody here knows."""
        if self._book is None:
            return
        for payment_ids in self._book.standing_payments(ROWS_PER_PAGE):
            known = await self._store.existing_payments(payment_ids)
            found = [
                Finding(Kind.CHARGE_UNRECORDED, "", payment_id, "", "a charge stands at the PSP")
                for payment_id in payment_ids
                if payment_id not in known
            ]
            for finding in self._counted(found):
                yield finding

    def _counted(self, findings: Sequence[Finding]) -> Iterator[Finding]:
        """Count all; those to tell."""
        for finding in findings:
            if self._by_kind.total() < self._findings_max:
                yield finding
            self._by_kind[finding.kind] += 1


AuditFactory: TypeAlias = Callable[[AdminFilter], Audit]
