"""The durable store: every write through a lane, every lane on connections of its own."""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import asyncpg

from gateway.application.administration import (
    AdminFilter,
    DiscrepancyPage,
    DoubtPage,
    RecordedDiscrepancy,
)
from gateway.application.ports import (
    Change,
    Found,
    Intent,
    IntentResult,
    Lease,
    ListFilter,
    Page,
    Resolution,
    Stored,
    StoreUnavailable,
)
from gateway.domain.model import (
    Aggregate,
    ConnectorAnswer,
    DoubtCause,
    Operation,
    OperationState,
)
from gateway.domain.states import UNFINISHED
from storage.batching import LaneMetrics, LaneTracer
from storage.postgres import rows
from storage.postgres.accounts import Accounts
from storage.postgres.audit import PostgresAudit
from storage.postgres.connector_accounts import ConnectorAccounts
from storage.postgres.errors import NotDurable, SchemaError
from storage.postgres.events import OutboxEvents
from storage.postgres.lanes import DirectLane, LaneLimits, LaneRow, PostgresLane
from storage.postgres.migrate import check_schema
from storage.postgres.notifications import Notifications, keeping_lane
from storage.postgres.pool import Connection, ConnectionSettings, HeldConnections, durability
from storage.postgres.queries import Query, query, run
from storage.postgres.routing import RoutingRules
from storage.postgres.routing_controls import RoutingControls
from storage.postgres.row_security import (
    READER,
    RECOVERER,
    WRITER,
    Write,
    read_as_merchant,
    within_merchant,
    within_merchants,
)
from storage.postgres.search import Search

T = TypeVar("T")

_log = logging.getLogger(__name__)

_AUTHORIZE_INTENT = query("writes", "authorize_intent")
_FOLLOWUP_INTENT = query("writes", "followup_intent")
_WRITTEN_INTENTS = query("writes", "written_intents")
_CHANGE = query("writes", "change")
_CHANGE_WITH_MORE = query("writes", "change_with_more")
_WRITTEN_CHANGES = query("writes", "written_changes")
_FIND_BY_KEY = query("reads", "find_by_key")
_FIND_OPERATION = query("reads", "find_operation")
_LOAD = query("reads", "load")
_LIST_PAYMENTS = query("reads", "list_payments")
_SEARCH_BEHIND = query("recovery", "search_behind")
_READ_IN_ORDER = query("recovery", "read_in_order")
_LOCK_DUE = query("recovery", "lock_due")
_LEASE = query("recovery", "lease")
_UNWEIGHED = query("recovery", "unweighed")
_BEGIN_CANCEL = query("recovery", "begin_cancel")
_POSTPONE = query("recovery", "postpone")
_HASTEN = query("recovery", "hasten")
_FORGET = query("recovery", "forget")
_ADD_EVIDENCE = query("recovery", "add_evidence")
_COUNT_DOUBTS = query("recovery", "count_doubts")
_ESTIMATE_OUTBOX = query("recovery", "estimate_outbox")
_LIST_DOUBTS = query("reads", "list_doubts")
_LIST_DISCREPANCIES = query("admin", "list_discrepancies")
_FIND_RESOLUTION = query("admin", "find_resolution")

# For what every authorization goes through, as in `gateway.domain.decisions`.
_WRITTEN: Final = Stored.WRITTEN
_PROCESSING: Final = OperationState.PROCESSING

_UNFINISHED: Final = sorted(UNFINISHED)
_OF_UNKNOWN_OUTCOME: Final = [OperationState.PROCESSING, OperationState.IN_DOUBT]
_WAITING: Final = [OperationState.REQUIRES_ACTION, OperationState.PENDING]
_ONLY_WAITS: Final = -1
"""In the place of a DoubtCause in `doubts.cause`, where there is no doubt: no list shows it."""

INTENTS: Final = LaneLimits(connections=2, rows_max=500, queue_max=5_000, retry_s_max=1.0)
FOLLOW_UPS: Final = LaneLimits(connections=1, rows_max=200, queue_max=5_000, retry_s_max=1.0)
CHANGES: Final = LaneLimits(connections=2, rows_max=500, queue_max=5_000, retry_s_max=30.0)
READS: Final = LaneLimits(connections=1, rows_max=200, queue_max=5_000, retry_s_max=1.0)
DIRECT: Final = LaneLimits(connections=2, rows_max=1, queue_max=200, retry_s_max=1.0)
EVENTS: Final = LaneLimits(connections=2, rows_max=1, queue_max=500, retry_s_max=1.0)
NOTIFICATIONS: Final = LaneLimits(connections=1, rows_max=200, queue_max=1_000, retry_s_max=1.0)

_ROLES: Final = {
    "intents": WRITER,
    "follow_ups": WRITER,
    "changes": WRITER,
    "reads": READER,
    "direct": RECOVERER,
    "events": RECOVERER,
    "notifications": WRITER,
}

_UNTOLD_DIGITS: Final = 8
"""Of a payment's id: random ones (RFC 9562 §5.7), so that no two payments differ in them alone."""
LIST_SCAN_MAX: Final = 2_000
"""How many payments a page of ListPayments looks at; where a filter matches few, it ends early."""
RECOVERY_HORIZON_S_MIN: Final = 60.0
"""How far behind now the scan for dead senders begins, where nothing else is said."""
LOCKED_DUE_MAX: Final = 100
"""How many doubts that are due may have a payment that is being changed without hiding those that
are due after them."""

DOUBT_AGE_BOUNDS_S: Final = (10.0, 60.0, 300.0, 900.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0)
"""The ages up to which doubts are counted, in seconds."""


class DoubtCount(NamedTuple):
    """The operations whose outcome is unknown."""

    operations: int
    oldest_age_s: float
    needs_person: int
    """How many of them recovery has given up asking often."""
    by_age: tuple[tuple[float, int], ...]
    """(age in seconds, how many are at most so old)."""


class PostgresStore:
    """`gateway.application.ports.Store` on PostgreSQL.

    Args:
        dsn: a libpq URL of the primary; with several hosts, of those that may be it.
        intents, follow_ups, changes, reads, direct: what each lane may take and hold; `direct`
            serves ListPayments and recovery. Without `notifications` none are kept. Streams of
            events have a lane of their own (EVENTS), which connects when there is one.
            `changes.retry_s_max` is for how long an outcome is
            repeated while the database is away; recovery settles what could not be written.
        connection: how to connect; `dsn` comes first.
        retry_after_s: what a caller who met a full queue is told, in seconds.
        list_scan_max: see LIST_SCAN_MAX.
        row_security: whether each lane runs as its role of `storage.postgres.row_security`.
        recovery_horizon_s: how far behind now the scan for dead senders begins; more than a
            statement may take, and more than the pause between two scans.
        metrics: what the lanes tell.
        standby_required: whether `check` refuses a server without a synchronous standby.
        tracer: makes spans of the lanes' batches.
        on_generation: called with the server's generation at every new connection.
    """

    def __init__(
        self,
        dsn: str,
        *,
        intents: LaneLimits = INTENTS,
        follow_ups: LaneLimits = FOLLOW_UPS,
        changes: LaneLimits = CHANGES,
        reads: LaneLimits = READS,
        direct: LaneLimits = DIRECT,
        notifications: LaneLimits | None = None,
        application_name: str = "gateway",
        connect_timeout_s: float = 5.0,
        statement_timeout_s: float = 10.0,
        prepared_statements: bool = True,
        retry_after_s: float = 0.5,
        list_scan_max: int = LIST_SCAN_MAX,
        recovery_horizon_s: float | None = None,
        standby_required: bool = False,
        row_security: bool = False,
        metrics: LaneMetrics | None = None,
        tracer: LaneTracer | None = None,
        on_generation: Callable[[str], None] | None = None,
    ) -> None:
        if recovery_horizon_s is None:
            recovery_horizon_s = max(RECOVERY_HORIZON_S_MIN, 2 * statement_timeout_s)
        if recovery_horizon_s <= statement_timeout_s:
            raise ValueError("recovery_horizon_s must be more than statement_timeout_s")
        self._connection_settings = ConnectionSettings(
            dsn,
            application_name=application_name,
            connect_timeout_s=connect_timeout_s,
            statement_timeout_s=statement_timeout_s,
            prepared_statements=prepared_statements,
        )
        self._limits = {
            "intents": intents,
            "follow_ups": follow_ups,
            "changes": changes,
            "reads": reads,
            "direct": direct,
            "events": EVENTS,
        }
        if notifications is not None:
            self._limits["notifications"] = notifications
        self._outcome_retry_s_max = changes.retry_s_max
        self._retry_after_s = retry_after_s
        self._list_scan_max = list_scan_max
        self._row_security = row_security
        self._horizon_s = recovery_horizon_s
        self._standby_required = standby_required
        self._metrics = metrics
        self._tracer = tracer
        self._on_generation = on_generation

    async def open(self, *, connect: bool = True) -> None:
        """Make the lanes in the running loop and connect what can be connected now.

        What cannot, and without `connect` everything, is connected with its first use.
        """
        held = self.pools = {
            name: HeldConnections(
                replace(self._connection_settings, role=_ROLES[name] if self._row_security else ""),
                name,
                limits.connections,
                self._set_generation,
            )
            for name, limits in self._limits.items()
        }
        write_authorize_intents: Write[Intent, IntentResult] = _write_authorize_intents
        write_followup_intents: Write[Intent, IntentResult] = _write_followup_intents
        write_changes: Write[Change, Stored] = _write_changes
        read: Write[_Read, _Loaded] = _read
        if self._row_security:
            write_authorize_intents = within_merchants(write_authorize_intents, _merchant_of)
            write_followup_intents = within_merchants(write_followup_intents, _merchant_of)
            write_changes = within_merchants(write_changes, _merchant_of)
            read = within_merchant(read, lambda wanted: wanted[1])
        self._intents: PostgresLane[Intent, IntentResult] = PostgresLane(
            "intents",
            held["intents"],
            self._limits["intents"],
            write_authorize_intents,
            retry_after_s=self._retry_after_s,
            metrics=self._metrics,
            tracer=self._tracer,
        )
        self._follow_ups: PostgresLane[Intent, IntentResult] = PostgresLane(
            "follow_ups",
            held["follow_ups"],
            self._limits["follow_ups"],
            write_followup_intents,
            retry_after_s=self._retry_after_s,
            exclusive=lambda intent: (intent.payment.merchant_id, intent.payment.payment_id),
            metrics=self._metrics,
            tracer=self._tracer,
        )
        self._changes: PostgresLane[Change, Stored] = PostgresLane(
            "changes",
            held["changes"],
            self._limits["changes"],
            write_changes,
            retry_after_s=self._retry_after_s,
            partition=_is_plain,
            exclusive=lambda change: (change.payment.merchant_id, change.payment.payment_id),
            metrics=self._metrics,
            tracer=self._tracer,
        )
        self._reads: PostgresLane[_Read, Aggregate | None] = PostgresLane(
            "reads",
            held["reads"],
            self._limits["reads"],
            read,
            retry_after_s=self._retry_after_s,
            # One merchant in a batch where the session is held to one.
            partition=(lambda wanted: (wanted[0].name, wanted[1]))
            if self._row_security
            else (lambda wanted: wanted[0].name),
            metrics=self._metrics,
            tracer=self._tracer,
        )
        self._direct, self._events_lane = (
            DirectLane(
                name,
                held[name],
                self._limits[name],
                retry_after_s=self._retry_after_s,
                metrics=self._metrics,
                tracer=self._tracer,
            )
            for name in ("direct", "events")
        )
        self.queues: dict[str, PostgresLane[Any, Any] | DirectLane] = {
            "intents": self._intents,
            "follow_ups": self._follow_ups,
            "changes": self._changes,
            "reads": self._reads,
            "direct": self._direct,
            "events": self._events_lane,
        }
        keeping = None
        if "notifications" in held:
            keeping = self.queues["notifications"] = keeping_lane(
                held["notifications"],
                self._limits["notifications"],
                retry_after_s=self._retry_after_s,
                row_security=self._row_security,
                metrics=self._metrics,
            )
        self._search = Search(self._direct)
        self.notifications = Notifications(self._direct, keeping)
        self.accounts = Accounts(self._direct)
        self.audit = PostgresAudit(self._direct, _load_aggregates)
        self.connector_accounts = ConnectorAccounts(self._direct)
        self.routing_rules = RoutingRules(self._direct)
        self.routing_controls = RoutingControls(self._direct)
        self.events = OutboxEvents(self._events_lane)
        self.event_lag = OutboxEvents(self._direct)
        """The same, for what is asked where nobody streams."""
        if connect:
            opened = (connections for name, connections in held.items() if name != "events")
            await asyncio.gather(*(connections.open() for connections in opened))

    def _set_generation(self, generation: str) -> None:
        self._search.set_generation(generation)
        if self._on_generation is not None:
            self._on_generation(generation)

    async def close(self) -> None:
        """Write all that was taken, then close. Close after everybody who writes has finished."""
        await self._intents.close()
        await self._follow_ups.close()
        await self._changes.close()
        await self._reads.close()
        if "notifications" in self.queues:
            await self.queues["notifications"].close()
        await self._events_lane.close()
        await self._direct.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def check(self) -> None:
        """Whether this database can be served from now: commits, to its standbys too.

        Raises StoreUnavailable, NotDurable or SchemaError.
        """

        async def check(connection: Connection) -> Exception | None:
            return await _check(connection, self._standby_required)

        await self._direct.run(check, reserved=True)

    # --- writes ---

    def write_intent(self, intent: Intent) -> Coroutine[Any, Any, IntentResult]:
        """See Store. Raises ValueError for a new payment that already holds something."""
        if intent.expected_version is None:
            rows.check_new_payment(intent)
            return self._intents.put(intent)
        return self._follow_ups.put(intent)

    def write_change(self, change: Change) -> Coroutine[Any, Any, Stored]:
        """See Store. Raises ValueError where the operation is not one of the payment."""
        operation, payment = change.operation, change.payment
        if (
            operation.merchant_id != payment.merchant_id
            or operation.payment_id != payment.payment_id
        ):
            raise ValueError("the operation is not one of the payment")
        return self._changes.put(change, reserved=True)

    # --- reads ---

    async def find_by_key(self, merchant_id: str, idempotency_key: str) -> Found | None:
        """See Store."""
        return _found(await self._reads.put((_FIND_BY_KEY, merchant_id, idempotency_key)))

    async def find_operation(
        self, merchant_id: str, operation_id: str, *, for_outcome: bool = False
    ) -> Found | None:
        """See Store."""
        return _found(
            await self._look_up(
                (_FIND_OPERATION, merchant_id, operation_id), for_outcome=for_outcome
            )
        )

    async def load(
        self, merchant_id: str, payment_id: str, *, for_outcome: bool = False
    ) -> Aggregate | None:
        """See Store."""
        return await self._look_up((_LOAD, merchant_id, payment_id), for_outcome=for_outcome)

    async def _look_up(self, read: "_Read", *, for_outcome: bool) -> Aggregate | None:
        retry_s_max = self._outcome_retry_s_max if for_outcome else None
        return await self._reads.put(read, reserved=for_outcome, retry_s_max=retry_s_max)

    async def list_payments(self, filter_: ListFilter) -> Page:
        """See Store. A page may be short, or empty, and yet not be the last one: what cannot be
        read, as a newer version's, is left out.
        """
        scan_max = max(self._list_scan_max, filter_.page_size + 1)
        after_created_at, after_payment_id = filter_.after or (None, "")

        async def select(connection: Connection) -> list[asyncpg.Record]:
            if not self._row_security:
                return await page(connection)
            async with connection.transaction():
                await read_as_merchant(connection, filter_.merchant_id)
                return await page(connection)

        async def page(connection: Connection) -> list[asyncpg.Record]:
            return await run(
                connection,
                _LIST_PAYMENTS,
                merchant_id=filter_.merchant_id,
                mode=filter_.mode,
                states=list(filter_.states),
                merchant_order_id=filter_.merchant_order_id,
                created_from=filter_.created_from,
                created_before=filter_.created_before,
                after_created_at=after_created_at,
                after_payment_id=after_payment_id,
                scan_max=scan_max,
                page_size=filter_.page_size,
            )

        records = await self._direct.run(select)
        first = records[0]
        found = [record for record in records if record["payment_payment_id"] is not None]
        payments = _readable("a payment", rows.payment_of, found[: filter_.page_size], "payment_")
        if len(found) > filter_.page_size:
            last = found[filter_.page_size - 1]
            return Page(payments, (last["payment_created_at"], last["payment_payment_id"]))
        if first["scanned"] == scan_max:
            last_id: str = first["last_payment_id"]
            if not first["last_is_told"]:
                # Of the other mode: it is not named, and the next page begins with it once more.
                last_id = last_id[:-_UNTOLD_DIGITS] + "f" * _UNTOLD_DIGITS
            return Page(payments, (first["last_created_at"], last_id))
        return Page(payments, None)

    # --- recovery ---

    async def add_evidence(
        self, operation: Operation, answer: ConnectorAnswer, seen_to: Collection[int] = ()
    ) -> ConnectorAnswer | None:
        """See Store. Repeated for as long as an outcome is, and as an outcome never refused.

        What stays and cannot be read, as a newer version's, has no room beside it: then this is
        unavailable.
        """

        async def add(connection: Connection) -> str | None:
            kept = await run(
                connection,
                _ADD_EVIDENCE,
                merchant_id=operation.merchant_id,
                payment_id=operation.payment_id,
                operation_id=operation.operation_id,
                attempt_number=operation.attempt.number,
                epoch=operation.epoch,
                evidence=rows.answer_json(answer),
                seen_to=list(seen_to),
                unfinished=_UNFINISHED,
            )
            return kept[0]["evidence"] if kept else None

        kept = await self._direct.run(add, reserved=True, retry_s_max=self._outcome_retry_s_max)
        try:
            return rows.answer_of(kept)
        except _UNREADABLE as error:
            raise StoreUnavailable("evidence of an earlier attempt cannot be read") from error

    async def expired(self, limit: int) -> int:
        """See Store. 0 also while another gateway is looking."""
        return await self._search.put_expired(limit, self._horizon_s)

    async def search_behind_s(self) -> float:
        """How much older than the horizon that is, in seconds, up to which the search for dead
        senders can have missed nothing. What was created since may be looked at all the same.

        Raises as DirectLane.run.
        """
        [found] = await self._direct.fetch(_SEARCH_BEHIND)
        return max(float(found["behind_s"]) - self._horizon_s, 0.0)

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Operation] = (),
    ) -> Sequence[Lease]:
        """See Store. An operation whose payment is being changed at this moment is passed over."""

        async def take(connection: Connection) -> Sequence[Lease]:
            async with connection.transaction():
                await run(connection, _READ_IN_ORDER, sorts="off")
                due = await _lock_due(connection, limit, account_max, at_work)
                await run(connection, _READ_IN_ORDER, sorts="on")
                if not due:
                    return []
                leased = await run(
                    connection,
                    _LEASE,
                    merchant_id=[record["merchant_id"] for record in due],
                    operation_id=[record["operation_id"] for record in due],
                    lease_s=lease_s,
                    unfinished=_UNFINISHED,
                )
                payments = sorted({(each["merchant_id"], each["payment_id"]) for each in leased})
                # Under the locks: the epochs are those that were just raised, and no others'.
                aggregates = await _aggregates(connection, _LOAD, payments)
                by_payment = dict(zip(payments, aggregates, strict=True))
                leases, unread = [], []
                for record in leased:
                    aggregate = by_payment[record["merchant_id"], record["payment_id"]]
                    lease = _lease_of(record, aggregate)
                    if lease is None:
                        unread.append(record)
                    else:
                        leases.append(lease)
                # What cannot be read holds up nobody, and is looked at again.
                if unread:
                    await run(
                        connection,
                        _UNWEIGHED,
                        merchant_id=[record["merchant_id"] for record in unread],
                        operation_id=[record["operation_id"] for record in unread],
                    )
            return leases

        return await self._direct.run(take)

    async def begin_cancel(self, operation: Operation) -> bool:
        """See Store."""

        async def update(connection: Connection) -> bool:
            begun = await run(
                connection,
                _BEGIN_CANCEL,
                merchant_id=operation.merchant_id,
                payment_id=operation.payment_id,
                operation_id=operation.operation_id,
                epoch=operation.epoch,
                unfinished=_UNFINISHED,
            )
            return bool(begun)

        return await self._direct.run(update)

    async def postpone(
        self,
        operation: Operation,
        check_after_s: float,
        cause: DoubtCause = DoubtCause.UNSPECIFIED,
        *,
        needs_person: bool = False,
    ) -> None:
        """See Store."""
        await self._direct.fetch(
            _POSTPONE,
            merchant_id=operation.merchant_id,
            payment_id=operation.payment_id,
            operation_id=operation.operation_id,
            epoch=operation.epoch,
            unfinished=_UNFINISHED,
            check_after_s=check_after_s,
            cause=cause,
            needs_person=needs_person,
            waiting=_WAITING,
            only_waits=_ONLY_WAITS,
        )

    async def hasten(self, operation: Operation) -> None:
        """See Store."""
        await self._direct.fetch(
            _HASTEN, merchant_id=operation.merchant_id, operation_id=operation.operation_id
        )

    async def forget(self, operation: Operation) -> None:
        """See Store. Has no effect on an operation that is unfinished, or has new evidence."""
        await self._direct.fetch(
            _FORGET,
            merchant_id=operation.merchant_id,
            payment_id=operation.payment_id,
            operation_id=operation.operation_id,
            unfinished=_UNFINISHED,
        )

    async def count_doubts(self) -> DoubtCount:
        """How many operations' outcome is unknown, of all merchants, and for how long."""

        async def count(connection: Connection) -> DoubtCount:
            [counted] = await run(
                connection,
                _COUNT_DOUBTS,
                in_doubt=_OF_UNKNOWN_OUTCOME,
                accepted=OperationState.PENDING,
                only_waits=_ONLY_WAITS,
                age_bounds_s=DOUBT_AGE_BOUNDS_S,
            )
            return DoubtCount(
                counted["doubts"],
                counted["oldest_age_s"] or 0.0,
                counted["needs_person"],
                tuple(zip(DOUBT_AGE_BOUNDS_S, counted["by_age"], strict=True)),
            )

        return await self._direct.run(count)

    # --- administration ---

    async def list_doubts(self, filter_: AdminFilter, *, needs_person_only: bool) -> DoubtPage:
        """See AdminStore."""
        after_at, after_id = filter_.after or (None, "")
        records = await self._direct.fetch(
            _LIST_DOUBTS,
            all_merchants=filter_.merchant_ids is None,
            merchant_ids=sorted(filter_.merchant_ids or ()),
            mode=filter_.mode,
            states=_OF_UNKNOWN_OUTCOME,
            accepted=OperationState.PENDING,
            needs_person_only=needs_person_only,
            after_since=after_at,
            after_operation_id=after_id,
            page_size=filter_.page_size,
        )
        doubts = _readable("a doubt", rows.doubt_of, records[: filter_.page_size])
        if len(records) <= filter_.page_size:
            return DoubtPage(doubts, None)
        last = records[filter_.page_size - 1]
        return DoubtPage(doubts, (last["since"], last["operation_id"]))

    async def list_discrepancies(self, filter_: AdminFilter) -> DiscrepancyPage:
        """See AdminStore."""
        after_at, after_id = filter_.after or (None, "")
        records = await self._direct.fetch(
            _LIST_DISCREPANCIES,
            all_merchants=filter_.merchant_ids is None,
            merchant_ids=sorted(filter_.merchant_ids or ()),
            mode=filter_.mode,
            after_created_at=after_at,
            after_discrepancy_id=after_id,
            page_size=filter_.page_size,
        )
        found = [RecordedDiscrepancy(**record) for record in records[: filter_.page_size]]
        if len(records) <= filter_.page_size:
            return DiscrepancyPage(found, None)
        return DiscrepancyPage(found, (found[-1].created_at, found[-1].discrepancy_id))

    async def find_resolution(
        self, merchant_id: str, operation_id: str, attempt_number: int
    ) -> Resolution | None:
        """See AdminStore."""
        records = await self._direct.fetch(
            _FIND_RESOLUTION,
            merchant_id=merchant_id,
            operation_id=operation_id,
            attempt_number=attempt_number,
        )
        return rows.resolution_of(records[0]) if records else None

    async def estimate_outbox(self) -> int:
        """About how many events the outbox holds, as of the server's latest statistics."""

        async def estimate(connection: Connection) -> int:
            [estimated] = await run(connection, _ESTIMATE_OUTBOX)
            return int(estimated["events"])

        return await self._direct.run(estimate)


@asynccontextmanager
async def open_reader(dsn: str) -> AsyncIterator[PostgresStore]:
    """A store for a few reads: one connection to each lane that is used."""
    store = PostgresStore(
        dsn, application_name="gateway-reader", reads=replace(READS, retry_s_max=0)
    )
    await store.open(connect=False)
    try:
        yield store
    finally:
        await store.close()


_Read = tuple[Query, str, str]
"""A statement of reads.sql, the merchant, and what is looked for."""

_Loaded = Aggregate | Exception | None
"""What was found, or why a row of it cannot be read: one that a newer version wrote, or nobody."""


_UNREADABLE: Final = (ValueError, TypeError, KeyError)
"""What is raised where such a row is read."""


def _readable(
    what: str,
    read: Callable[[asyncpg.Record], T],
    records: Sequence[asyncpg.Record],
    prefix: str = "",
) -> list[T]:
    """Those of a list that this version can read; the others are said."""
    found = []
    for record in records:
        try:
            found.append(read(record))
        except _UNREADABLE as error:
            _tell_unreadable(what, error, record, prefix)
    return found


def _tell_unreadable(what: str, error: Exception, record: asyncpg.Record, prefix: str = "") -> None:
    _log.error(
        "%s cannot be read: %s",
        what,
        type(error).__name__,
        extra={
            "merchant_id": record[prefix + "merchant_id"],
            "payment_id": record[prefix + "payment_id"],
            "operation_id": record.get("operation_id"),
        },
    )


async def _check(connection: Connection, standby_required: bool) -> Exception | None:
    # Returned, for the lane to raise: what was found out is an answer, not a failure of the call.
    try:
        await durability(connection, standby_required=standby_required)
        await check_schema(connection)
    except (NotDurable, SchemaError) as error:
        return error
    return None


# --- batches --------------------------------------------------------------------------------------


async def _write_authorize_intents(
    connection: Connection, batch: Sequence[LaneRow[Intent]]
) -> Sequence[IntentResult]:
    intents = [rows.authorize_row(row.value) for row in batch]
    [answer] = await run(connection, _AUTHORIZE_INTENT, intents=intents)
    return await _intent_results(connection, batch, answer, locked=None)


async def _write_followup_intents(
    connection: Connection, batch: Sequence[LaneRow[Intent]]
) -> Sequence[IntentResult]:
    intents = [rows.followup_row(row.value) for row in batch]
    [answer] = await run(connection, _FOLLOWUP_INTENT, intents=intents)
    return await _intent_results(connection, batch, answer, locked=set(answer["locked"]))


async def _intent_results(
    connection: Connection,
    batch: Sequence[LaneRow[Intent]],
    answer: asyncpg.Record,
    locked: set[str] | None,
) -> Sequence[IntentResult]:
    """`locked`: the operations whose payment was as expected; None where the payments are new."""
    inserted, at = set(answer["inserted"]), answer["at"]
    lost = [
        row.value.operation
        for row in batch
        if row.is_retry and row.value.operation.operation_id not in inserted
    ]
    earlier = {}
    if lost:
        found = await run(
            connection,
            _WRITTEN_INTENTS,
            merchant_id=[operation.merchant_id for operation in lost],
            operation_id=[operation.operation_id for operation in lost],
        )
        earlier = {record["operation_id"]: record["created_at"] for record in found}
    written_now = IntentResult(_WRITTEN, at)
    results = []
    for row in batch:
        operation_id = row.value.operation.operation_id
        if operation_id in inserted:
            results.append(written_now)
        elif operation_id in earlier:
            results.append(IntentResult(_WRITTEN, earlier[operation_id]))
        elif locked is None or operation_id in locked:
            results.append(IntentResult(Stored.DUPLICATE_KEY))
        else:
            results.append(IntentResult(Stored.CONFLICT))
    return results


def _merchant_of(value: Intent | Change) -> str:
    return value.payment.merchant_id


def _is_plain(change: Change) -> bool:
    """Whether the change is nothing but an operation, its payment and an event.

    The first outcome of its own sender leaves no doubt to forget: at most the scan for dead senders
    was quicker, and then recovery finds a definite operation and forgets it.
    """
    return (
        change.doubt is None
        and not change.companions
        and not change.discrepancies
        and not change.operation.superseded_attempts
        and change.expected_epoch == 1
        and change.expected_state is _PROCESSING
        and change.operation.state is not _PROCESSING
    )


async def _write_changes(
    connection: Connection, batch: Sequence[LaneRow[Change]]
) -> Sequence[Stored]:
    changes = [row.value for row in batch]
    change_rows = [rows.change_row(change) for change in changes]
    if _is_plain(changes[0]):  # and so are all: the lane is partitioned by it
        [answer] = await run(connection, _CHANGE, changes=change_rows)
    else:
        [answer] = await run(
            connection,
            _CHANGE_WITH_MORE,
            changes=change_rows,
            companions=rows.companion_rows(changes),
            superseded=rows.superseded_rows([change.operation for change in changes]),
            discrepancies=rows.discrepancy_rows(changes),
            resolutions=rows.resolution_rows(changes),
        )
    written = set(answer["changed"])
    missing = [c for c in changes if c.operation.operation_id not in written]
    if missing:
        found = await run(
            connection,
            _WRITTEN_CHANGES,
            merchant_id=[change.payment.merchant_id for change in missing],
            payment_id=[change.payment.payment_id for change in missing],
            operation_id=[change.operation.operation_id for change in missing],
            payment_version=[change.payment.version for change in missing],
            event_id=[change.event_id for change in missing],
        )
        written.update(record["operation_id"] for record in found)
    return [
        _WRITTEN if change.operation.operation_id in written else Stored.CONFLICT
        for change in changes
    ]


async def _lock_due(
    connection: Connection,
    limit: int,
    account_max: int | None,
    at_work: Collection[Operation],
) -> list[asyncpg.Record]:
    """Up to `limit` doubts that are due, with no account over its share; their payments are locked.

    An account whose share is used up is left out, and what is due of others is looked for again:
    so a long list of one hides nobody else's.
    """
    taken = Counter(operation.attempt.connector_account_id for operation in at_work)
    operation_ids = [operation.operation_id for operation in at_work]
    locked: list[asyncpg.Record] = []
    while len(locked) < limit:
        room = limit - len(locked)
        due = await run(
            connection,
            _LOCK_DUE,
            limit=room,
            account_limit=room if account_max is None else min(room, account_max),
            full_accounts=[
                account for account, count in taken.items() if count >= (account_max or math.inf)
            ],
            at_work=operation_ids,
            locked_max=LOCKED_DUE_MAX,
        )
        for record in due:
            account = record["connector_account_id"]
            if account_max is None or taken[account] < account_max:
                taken[account] += 1
                operation_ids.append(record["operation_id"])
                locked.append(record)
        if len(due) < room:
            break
    return locked


def _lease_of(record: asyncpg.Record, aggregate: "_Loaded") -> Lease | None:
    """None where its payment or its evidence cannot be read."""
    if not isinstance(aggregate, Aggregate):
        return None
    try:
        evidence = rows.answer_of(record["evidence"])
    except _UNREADABLE as error:
        _tell_unreadable("evidence", error, record)
        return None
    for operation in aggregate.operations:
        if operation.operation_id == record["operation_id"]:
            tries, cancel_begun, at = record["tries"], record["cancel_begun"], record["at"]
            return Lease(operation, aggregate, tries, evidence, cancel_begun, at)
    return None


async def _read(connection: Connection, batch: Sequence[LaneRow[_Read]]) -> Sequence["_Loaded"]:
    statement = batch[0].value[0]
    keys = [(merchant_id, wanted) for _, merchant_id, wanted in (row.value for row in batch)]
    return await _aggregates(connection, statement, keys)


async def _aggregates(
    connection: Connection, statement: Query, keys: Sequence[tuple[str, str]]
) -> "list[_Loaded]":
    """What the statement finds for each (merchant, wanted): a payment and its operations."""
    arrays = {
        "merchant_id": [merchant_id for merchant_id, _ in keys],
        "payment_id": [wanted for _, wanted in keys],
        "operation_id": [wanted for _, wanted in keys],
        "idempotency_key": [wanted for _, wanted in keys],
    }
    found: list[_Loaded] = [None] * len(keys)
    for record in await run(connection, statement, **arrays):
        number = record["number"] - 1
        aggregate = found[number]
        try:
            if aggregate is None:
                aggregate = found[number] = Aggregate(rows.payment_of(record))
            if isinstance(aggregate, Aggregate):
                aggregate.operations.append(rows.operation_of(record))
        except _UNREADABLE as error:
            found[number] = error
            _tell_unreadable("a payment", error, record)
    return found


async def _load_aggregates(
    connection: Connection, keys: Sequence[tuple[str, str]]
) -> "list[_Loaded]":
    return await _aggregates(connection, _LOAD, keys)


def _found(aggregate: Aggregate | None) -> Found | None:
    return None if aggregate is None else Found(aggregate.operations[0], aggregate.payment)
