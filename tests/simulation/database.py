"""PostgreSQL, simulated: the model of the store with crashes and failovers, behind real lanes."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.application.ports import IntentResult, Stored
from gateway.domain.model import DoubtCause, OperationOrigin, OperationState
from storage.postgres import pool
from storage.postgres.lanes import DirectLane, LaneLimits, LaneRow, PostgresLane
from storage.postgres.pool import HeldConnections
from storage.postgres.store import _is_plain
from tests.memory_store import MemoryStore, owned_change, owned_intent
from tests.simulation.loop import EPOCH_S, at_once
from tests.simulation.notifications import KeptNotifications

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from gateway.application.ports import (
        Change,
        Found,
        Intent,
        Lease,
        ListFilter,
        Page,
        Resolution,
    )
    from gateway.domain.model import Aggregate, ConnectorAnswer, Operation
    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network

T = TypeVar("T")

POSTGRES = "postgres"
STATEMENT_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 2.0
WRITE_RETRY_S = 1.0
OUTCOME_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Event:
    """A row of the outbox."""

    merchant_id: str
    payment_id: str
    payment_version: int
    seq: int
    event_id: str
    payload: bytes


async def _go_on(_: str) -> None:
    """Nothing happens before or after a method of the model: the network is around it."""


class Database(MemoryStore):
    """What is durable. Each method of the model is one transaction, at one moment."""

    def __init__(self, loop: SimulatedLoop, takeover_s: float) -> None:
        self._loop = loop
        self._takeover_s = takeover_s
        self.step_s = 0.0
        """How far its clock has been moved."""
        self.stepped_s = 0.0
        """And by how much in all, to and fro."""
        super().__init__()
        self.before = self.after = _go_on
        self.up = True
        self.session = 1
        """Changes with every crash: connections of before are broken."""
        self.timeline = 1
        """Changes with every failover."""
        self.outbox: list[Event] = []
        self.notifications = KeptNotifications(lambda: self.now)
        self.resolutions: dict[tuple[str, str, int], Resolution] = {}
        """What persons decided, by merchant, operation and attempt."""
        self.wrong: list[str] = []
        """Broken promises that only the database sees."""
        self._begun_s: dict[tuple[str, str, int], float] = {}
        """When a sender wrote its intent, by operation and attempt; true time."""
        self._undo: tuple[Any, ...] | None = None

    @property
    def now(self) -> datetime:
        """The time by its own clock."""
        return datetime.fromtimestamp(EPOCH_S, UTC) + timedelta(
            seconds=self._loop.now_s + self.step_s
        )

    @now.setter
    def now(self, _: datetime) -> None:
        """The model sets it once."""

    @property
    def generation(self) -> str:
        """System identifier and timeline."""
        return f"7000000000000000001-{self.timeline}"

    def crash(self) -> None:
        """Every connection breaks; what was committed stays."""
        self.up = False
        self.session += 1

    def fail_over(self) -> None:
        """The standby takes over, with all that was committed."""
        self.crash()
        self.timeline += 1
        self.up = True

    # --- transactions -----------------------------------------------------------------------------

    def check(self, session: int) -> None:
        """Raises ConnectionResetError for a connection that does not stand."""
        if not self.up or session != self.session:
            raise ConnectionResetError("the server has gone")

    def intend(self, intent: Intent, *, is_retry: bool) -> IntentResult:
        """Write an intent; one that an earlier try has written is written."""
        key = (intent.operation.merchant_id, intent.operation.operation_id)
        if is_retry and key in self.operations:
            return IntentResult(Stored.WRITTEN, self.operations[key].created_at)
        result = self._intend(owned_intent(intent))
        if result.stored is Stored.WRITTEN:
            self._begun_s[(*key, 1)] = self._loop.now_s
        return result

    def change(self, change: Change) -> Stored:
        """Write a change; one that an earlier try has written is written."""
        if any(event.event_id == change.event_id for event in self.outbox):
            return Stored.WRITTEN
        # What a failover to a standby that lacks this very change leads back to.
        key = (change.operation.merchant_id, change.operation.operation_id)
        payment_key = (change.payment.merchant_id, change.payment.payment_id)
        before = (
            change.event_id,
            key,
            self.operations[key],
            self.payments[payment_key],
            copy.copy(self.doubts.get(key)),
            self.recover_after[key],
            len(self.outbox),
            self.notifications.changes,
        )
        stored = self._change(owned_change(change))
        if stored is Stored.WRITTEN:
            decided = change.resolution
            if decided is not None:
                assert (*key, decided.attempt_number) not in self.resolutions
                self.resolutions[*key, decided.attempt_number] = decided
            self._undo = None if change.companions or decided is not None else before
            self._told(change)
            operation = change.operation
            if operation.state is OperationState.PROCESSING:
                self._begun_s[(*key, operation.attempt.number)] = self._loop.now_s
        return stored

    def _told(self, change: Change) -> None:
        payment = change.payment
        told = [(change.event_id, change.event)]
        told += [(each.event_id, each.event) for each in change.companions]
        for seq, (event_id, payload) in enumerate(told):
            self.outbox.append(
                Event(
                    payment.merchant_id,
                    payment.payment_id,
                    payment.version,
                    seq,
                    event_id,
                    payload,
                )
            )

    def begun_s(self, operation: Operation) -> float:
        """When the sender of an operation's attempt wrote its intent, by true time; 0: it has none
        or nobody knows.
        """
        key = (operation.merchant_id, operation.operation_id, operation.attempt.number)
        return self._begun_s.get(key, 0.0)

    def forget_last(self, event_id: str) -> bool:
        """Lose the latest change, if it is this one; False: it is not."""
        if self._undo is None or self._undo[0] != event_id:
            return False
        _, key, operation, payment, doubt, recover_after, events, told = self._undo
        now = self.payments[operation.merchant_id, operation.payment_id]
        if len(self.outbox) != events + 1 or now.version != payment.version + 1:
            return False
        if told != self.notifications.changes:
            return False
        if self.operations[key].epoch != operation.epoch:
            return False
        self.operations[key] = operation
        self.payments[operation.merchant_id, operation.payment_id] = payment
        self.recover_after[key] = recover_after
        if doubt is None:
            self.doubts.pop(key, None)
        else:
            self.doubts[key] = doubt
        del self.outbox[events:]
        self._undo = None
        return True

    def take(
        self, limit: int, lease_s: float, account_max: int | None, at_work: Collection[Operation]
    ) -> Sequence[Lease]:
        """Lease; a sender that may still send is left alone."""
        leases = at_once(
            MemoryStore.lease(self, limit, lease_s, account_max=account_max, at_work=at_work)
        )
        for lease in leases:
            operation = lease.operation
            if operation.state is not OperationState.PROCESSING:
                continue
            if operation.origin is OperationOrigin.GATEWAY:
                continue  # it was begun with an outcome, and has no sender
            since_s = self._loop.now_s - self.begun_s(operation)
            if since_s < self._takeover_s and not self.step_s:
                self.wrong.append(
                    f"{operation.operation_id} was taken over {since_s:.1f} s after its intent"
                )
        return leases


class Link:
    """How a gateway reaches the database: what the pool takes for its settings."""

    def __init__(self, network: Network, process: Process, database: Database) -> None:
        self.network = network
        self.process = process
        self.database = database
        self.connect_timeout_s = CONNECT_TIMEOUT_S
        # Never reached: a transaction has its own limit here.
        self.answer_timeout_s = 2 * STATEMENT_TIMEOUT_S


class _Connection:
    """A session."""

    def __init__(self, link: Link, session: int, generation: str) -> None:
        self._link = link
        self._session = session
        self._open = True
        self.generation = generation

    def is_closed(self) -> bool:
        return not self._open

    def terminate(self) -> None:
        self._open = False

    def add_log_listener(self, _: Callable[..., None]) -> None:
        """There is no standby here whose absence would be told."""

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - asyncpg's
        self._open = False

    async def transaction(self, work: Callable[[Database], T]) -> T:
        """One transaction. Raises ConnectionResetError, TimeoutError."""
        link = self._link

        def run() -> T:
            link.database.check(self._session)
            return work(link.database)

        async with asyncio.timeout(STATEMENT_TIMEOUT_S):
            return await link.network.call(link.process, POSTGRES, run)


async def connect(settings: Any, _: str) -> Any:
    """What the pool calls, in place of asyncpg."""
    link: Link = settings

    def accept() -> _Connection:
        database = link.database
        database.check(database.session)
        return _Connection(link, database.session, database.generation)

    async with asyncio.timeout(link.connect_timeout_s):
        return await link.network.call(link.process, POSTGRES, accept)


async def system_generation(connection: Any, _: float | None = None) -> str:
    """What the pool asks a new connection for."""
    generation: str = connection.generation
    return generation


REPLACED = ((pool, "connect", connect), (pool, "system_generation", system_generation))
"""What stands in the pool's place while a history runs."""

_WRITES = LaneLimits(connections=2, rows_max=8, queue_max=100, retry_s_max=WRITE_RETRY_S)
_FOLLOW_UPS = LaneLimits(connections=1, rows_max=8, queue_max=100, retry_s_max=WRITE_RETRY_S)
_CHANGES = LaneLimits(connections=2, rows_max=8, queue_max=100, retry_s_max=OUTCOME_RETRY_S)
_READS = LaneLimits(connections=1, rows_max=8, queue_max=100, retry_s_max=WRITE_RETRY_S)

_Read = tuple[str, str, str]


class SimulatedStore:
    """Implements `gateway.application.ports.Store` as the real one does: by lanes and connections.

    In place of SQL its batches are transactions of the model.
    """

    def __init__(self, link: Link, on_generation: Callable[[str], None]) -> None:
        self._intents = self._lane("intents", _WRITES, _write_intents, link, on_generation)
        self._follow_ups = self._lane(
            "follow_ups",
            _FOLLOW_UPS,
            _write_intents,
            link,
            on_generation,
            exclusive=lambda intent: intent.payment.payment_id,
        )
        self._changes = self._lane(
            "changes",
            _CHANGES,
            _write_changes,
            link,
            on_generation,
            partition=_is_plain,
            exclusive=lambda change: change.payment.payment_id,
        )
        self._reads = self._lane(
            "reads", _READS, _read, link, on_generation, partition=lambda read: read[0]
        )
        self._direct = DirectLane(
            "direct", HeldConnections(_settings(link), "direct", 2, on_generation), _WRITES
        )

    @staticmethod
    def _lane(
        name: str,
        limits: LaneLimits,
        write: Callable[[Any, Sequence[LaneRow[Any]]], Awaitable[Sequence[Any]]],
        link: Link,
        on_generation: Callable[[str], None],
        **more: Any,
    ) -> PostgresLane[Any, Any]:
        held = HeldConnections(_settings(link), name, limits.connections, on_generation)
        return PostgresLane(name, held, limits, write, retry_after_s=0.2, **more)

    async def write_intent(self, intent: Intent) -> IntentResult:
        """See the port."""
        lane = self._intents if intent.expected_version is None else self._follow_ups
        result: IntentResult = await lane.put(intent)
        return result

    async def write_change(self, change: Change) -> Stored:
        """See the port."""
        stored: Stored = await self._changes.put(change, reserved=True)
        return stored

    async def find_by_key(self, merchant_id: str, idempotency_key: str) -> Found | None:
        """See the port."""
        found: Found | None = await self._reads.put(("by_key", merchant_id, idempotency_key))
        return found

    async def find_operation(
        self, merchant_id: str, operation_id: str, *, for_outcome: bool = False
    ) -> Found | None:
        """See the port."""
        read = ("operation", merchant_id, operation_id)
        found: Found | None = await self._reads.put(read, reserved=for_outcome)
        return found

    async def load(
        self, merchant_id: str, payment_id: str, *, for_outcome: bool = False
    ) -> Aggregate | None:
        """See the port."""
        read = ("load", merchant_id, payment_id)
        loaded: Aggregate | None = await self._reads.put(read, reserved=for_outcome)
        return loaded

    async def list_payments(self, filter_: ListFilter) -> Page:
        """See the port."""
        return await self._run(lambda database: at_once(database.list_payments(filter_)))

    async def add_evidence(
        self, operation: Operation, answer: ConnectorAnswer, seen_to: Collection[int] = ()
    ) -> ConnectorAnswer | None:
        """See the port."""
        return await self._run(
            lambda database: at_once(database.add_evidence(operation, answer, seen_to)),
            OUTCOME_RETRY_S,
        )

    async def expired(self, limit: int) -> int:
        """See the port."""
        return await self._run(lambda database: at_once(database.expired(limit)))

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Operation] = (),
    ) -> Sequence[Lease]:
        """See the port."""
        return await self._run(lambda database: database.take(limit, lease_s, account_max, at_work))

    async def begin_cancel(self, operation: Operation) -> bool:
        """See the port."""
        return await self._run(lambda database: at_once(database.begin_cancel(operation)))

    async def postpone(
        self,
        operation: Operation,
        check_after_s: float,
        cause: DoubtCause = DoubtCause.UNSPECIFIED,
        *,
        needs_person: bool = False,
    ) -> None:
        """See the port."""
        await self._run(
            lambda database: at_once(
                database.postpone(operation, check_after_s, cause, needs_person=needs_person)
            )
        )

    async def hasten(self, operation: Operation) -> None:
        """See the port."""
        await self._run(lambda database: at_once(database.hasten(operation)))

    async def forget(self, operation: Operation) -> None:
        """See the port."""
        await self._run(lambda database: at_once(database.forget(operation)))

    async def find_resolution(
        self, merchant_id: str, operation_id: str, attempt_number: int
    ) -> Resolution | None:
        """See AdminStore."""
        key = (merchant_id, operation_id, attempt_number)
        return await self._run(lambda database: database.resolutions.get(key))

    async def check(self) -> None:
        """Whether the database answers. Raises StoreUnavailable."""
        await self._run(lambda _: None)

    async def _run(self, work: Callable[[Database], T], retry_s_max: float | None = None) -> T:
        async def call(connection: Any) -> T:
            result: T = await connection.transaction(work)
            return result

        return await self._direct.run(call, retry_s_max=retry_s_max)


def _settings(link: Link) -> Any:
    return link


async def _write_intents(
    connection: Any, batch: Sequence[LaneRow[Intent]]
) -> Sequence[IntentResult]:
    results: Sequence[IntentResult] = await connection.transaction(
        lambda database: [database.intend(row.value, is_retry=row.is_retry) for row in batch]
    )
    return results


async def _write_changes(connection: Any, batch: Sequence[LaneRow[Change]]) -> Sequence[Stored]:
    results: Sequence[Stored] = await connection.transaction(
        lambda database: [database.change(row.value) for row in batch]
    )
    return results


async def _read(connection: Any, batch: Sequence[LaneRow[_Read]]) -> Sequence[Any]:
    def look(database: Database) -> list[Any]:
        methods: dict[str, Any] = {
            "by_key": database.find_by_key,
            "operation": database.find_operation,
            "load": database.load,
        }
        return [at_once(methods[what](merchant, wanted)) for what, merchant, wanted in values]

    values = [row.value for row in batch]
    results: Sequence[Any] = await connection.transaction(look)
    return results
