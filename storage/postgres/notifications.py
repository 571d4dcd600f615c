"""PSPs' notifications in PostgreSQL: kept in batches on a lane of their own, applied by lease."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import IntEnum
from typing import Any, Final

import asyncpg
import orjson

from gateway.application.notifications import (
    Applied,
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    Pending,
    PendingCount,
    Received,
    Result,
)
from gateway.domain.decisions import event_of
from gateway.domain.model import Mode
from gateway.domain.states import Event
from storage.batching import LaneMetrics
from storage.postgres.direct import DirectStore
from storage.postgres.lanes import DirectLane, LaneLimits, LaneRow, PostgresLane
from storage.postgres.pool import Connection, HeldConnections
from storage.postgres.queries import query, run
from storage.postgres.row_security import Write, within_merchants
from storage.postgres.rows import answer_json, answer_of, clean

_log = logging.getLogger(__name__)

_KEEP = query("notifications", "keep")
_LEASE = query("notifications", "lease")
_FINISH = query("notifications", "finish")
_PUT_OFF = query("notifications", "put_off")
_IS_OUTDATED = query("notifications", "is_outdated")
_COUNT_PENDING = query("notifications", "count_pending")
_LIST = query("notifications", "list")
_PART_OF_LIST = query("notifications", "part_of_list")
_LIST_PENDING = query("notifications", "list_pending")
_FIND = query("notifications", "find")
_APPLY_AGAIN = query("notifications", "apply_again")

DEFINITE: Final = (
    Event.APPROVED,
    Event.DECLINED,
    Event.FAILED,
    Event.CANCELED,
    Event.EXPIRED,
)
"""Events that say how something ended."""
ENDS: Final = (Event.APPROVED, Event.EXPIRED)
"""Of these, those of a VOID: nothing is held any more."""

LIST_SCAN_MAX: Final = 100_000
"""About how many notifications one statement looks at for those of one result: read at once, a long
list in which they are rare would take longer than a statement may."""

_Key = tuple[str, str, str]
_Row = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A notification as it is stored, for people: also one that only a newer version can read."""

    event_id: str
    connector: str
    connector_account_id: str
    event_type: str
    kind: str
    """By its name; by its number where this version has none."""
    content: dict[str, Any]
    """As `notification_json` makes it."""
    received_at: datetime
    result: str
    """By its name; empty until it was applied."""
    applied_at: datetime | None
    payment_id: str
    operation_id: str


class Notifications(DirectStore):
    """Implements the NotificationStore port, and what the command line does.

    What arrives goes through a lane with connections and a queue of its own, so that a flood takes
    nothing from the payments'; what applies it goes through `lane`, beside recovery.
    """

    NAME = "notifications"

    def __init__(
        self, lane: DirectLane, keeping: PostgresLane[Received, bool] | None = None
    ) -> None:
        """Both are the caller's to close. Without `keeping` nothing can be kept."""
        super().__init__(lane)
        self._keeping = keeping

    async def keep(self, received: Sequence[Received]) -> int:
        """See the port."""
        assert self._keeping is not None, "a store for the command line keeps nothing"
        new = await asyncio.gather(*(self._keeping.put(each) for each in received))
        return sum(new)

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Received] = (),
    ) -> Sequence[Pending]:
        """See the port.

        An account whose share is used up is left out, and what is due of others is looked for
        again: so a long list of one hides nobody else's.
        """
        share = limit + len(at_work) if account_max is None else account_max
        accounts = [each.connector_account_id for each in at_work]
        leased: list[Pending] = []
        while len(leased) < limit:
            full = {each for each, count in Counter(accounts).items() if count >= share}
            records = await self._lane.fetch(
                _LEASE,
                limit=limit - len(leased),
                lease_s=lease_s,
                account_max=share,
                at_work=[each.notification.event_id for each in at_work],
                busy_accounts=accounts,
                full_accounts=list(full),
            )
            leased += _readable(records)
            new = [record["connector_account_id"] for record in records]
            accounts += new
            if all(accounts.count(each) < share for each in new):
                break  # nobody was left out
        return leased

    async def finish(self, received: Received, applied: Applied) -> None:
        """See the port."""
        await self._lane.fetch(
            _FINISH,
            **_key(received),
            result=applied.result,
            payment_id=applied.payment_id,
            operation_id=applied.operation_id,
        )

    async def put_off(self, received: Received, apply_after_s: float) -> None:
        """See the port."""
        await self._lane.fetch(_PUT_OFF, **_key(received), apply_after_s=apply_after_s)

    async def is_outdated(self, received: Received, event: Event, *, by_id: bool = False) -> bool:
        """See the port."""
        notification = received.notification
        [found] = await self._lane.fetch(
            _IS_OUTDATED,
            merchant_id=received.merchant_id,
            connector_account_id=received.connector_account_id,
            subject=notification.subject,
            kind=notification.kind,
            event=event,
            definite=list(DEFINITE),
            ends_by=NotificationKind.VOID if _may_be_ended(notification, event) else None,
            ends=list(ENDS),
            occurred_at=notification.occurred_at,
            transaction_id=notification.transaction_id if by_id else None,
        )
        return bool(found["is_outdated"])

    async def count_pending(self) -> PendingCount:
        """What is yet to be applied, of all merchants."""
        [counted] = await self._lane.fetch(_COUNT_PENDING)
        return PendingCount(counted["pending"], counted["oldest_age_s"] or 0.0)

    async def list(
        self, merchant_id: str, *, limit: int, pending_only: bool = False, result: int | None = None
    ) -> Sequence[Kept]:
        """A merchant's, the newest first."""
        if pending_only:
            records = await self._lane.fetch(_LIST_PENDING, merchant_id=merchant_id, limit=limit)
            return [_kept_of(record) for record in records]
        found: list[Kept] = []
        before = None
        while True:
            since = None if result is None else await self._part_of_list(merchant_id, before)
            records = await self._lane.fetch(
                _LIST,
                merchant_id=merchant_id,
                received_from=since,
                received_before=before,
                result=result,
                limit=limit - len(found),
            )
            found += map(_kept_of, records)
            if since is None or len(found) >= limit:
                return found
            before = since

    async def _part_of_list(self, merchant_id: str, before: datetime | None) -> datetime | None:
        """Where the next part of the list begins; None where that is the rest."""
        records = await self._lane.fetch(
            _PART_OF_LIST, merchant_id=merchant_id, received_before=before, rows=LIST_SCAN_MAX
        )
        return records[0]["received_at"] if records else None

    async def find(self, merchant_id: str, event_id: str) -> Sequence[Kept]:
        """By the PSP's id; one for each account that has it."""
        records = await self._lane.fetch(_FIND, merchant_id=merchant_id, event_id=event_id)
        return [_kept_of(record) for record in records]

    async def apply_again(self, merchant_id: str, event_id: str) -> bool:
        """Have it applied now, whatever became of it before; False without it."""
        records = await self._lane.fetch(_APPLY_AGAIN, merchant_id=merchant_id, event_id=event_id)
        return bool(records)


async def _keep(connection: Connection, batch: Sequence[LaneRow[Received]]) -> Sequence[bool]:
    records = await run(connection, _KEEP, notifications=[_row(row.value) for row in batch])
    new: set[_Key] = {tuple(record) for record in records}
    results = []
    for row in batch:
        key = tuple(_key(row.value).values())
        results.append(key in new)
        new.discard(key)  # of two equal ones in a batch, one is new
    return results


def _key(received: Received) -> dict[str, str]:
    return {
        "merchant_id": received.merchant_id,
        "connector_account_id": received.connector_account_id,
        "event_id": received.notification.event_id,
    }


def _row(received: Received) -> _Row:
    """A received_notification."""
    notification = received.notification
    return (
        *_key(received).values(),
        notification.connector,
        clean(notification.event_type),
        notification.kind,
        None if notification.answer is None else event_of(notification.answer),
        notification.occurred_at,
        notification.subject,
        notification_json(notification),
    )


def _may_be_ended(notification: Notification, event: Event) -> bool:
    return notification.kind is NotificationKind.AUTHORIZATION and event is Event.APPROVED


def notification_json(notification: Notification) -> str:
    """By field names, defaults left out."""
    document: dict[str, Any] = {}
    for field in fields(Notification):
        value = getattr(notification, field.name)
        if value == field.default:
            continue
        document[field.name] = _plain(value)
    if notification.answer is not None:
        document["answer"] = orjson.loads(answer_json(notification.answer))
    if notification.dispute is not None:
        dispute = notification.dispute
        document["dispute"] = {
            each.name: _plain(getattr(dispute, each.name)) for each in fields(Dispute)
        }
    return orjson.dumps(document).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, IntEnum):
        return int(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return clean(value) if isinstance(value, str) else value


def notification_of(text: str) -> Notification:
    """The notification of a column."""
    document = orjson.loads(text)
    document["kind"] = NotificationKind(document.get("kind", NotificationKind.UNKNOWN))
    if "mode" in document:
        document["mode"] = Mode(document["mode"])
    if "occurred_at" in document:
        document["occurred_at"] = datetime.fromisoformat(document["occurred_at"])
    if "answer" in document:
        document["answer"] = answer_of(orjson.dumps(document["answer"]).decode())
    if "dispute" in document:
        dispute = document["dispute"]
        document["dispute"] = Dispute(
            dispute["dispute_id"],
            DisputeStage(dispute["stage"]),
            DisputeStatus(dispute["status"]),
            dispute.get("reason", ""),
        )
    return Notification(**document)


def _received_of(record: asyncpg.Record) -> Received:
    return Received(
        record["merchant_id"],
        record["connector_account_id"],
        notification_of(record["content"]),
    )


def _readable(records: Sequence[asyncpg.Record]) -> list[Pending]:
    """Those of the leased that this version can read; the others are said."""
    leased = []
    for record in records:
        try:
            leased.append(Pending(_received_of(record), record["tries"]))
        except (ValueError, TypeError, KeyError) as error:
            # A newer version's, which can read it when this lease has run out.
            _log.error(
                "a notification cannot be read: %s",
                type(error).__name__,
                extra={
                    "merchant_id": record["merchant_id"],
                    "connector_account_id": record["connector_account_id"],
                    "event_id": record["event_id"],
                },
            )
    return leased


def _kept_of(record: asyncpg.Record) -> Kept:
    result = record["result"]
    return Kept(
        event_id=record["event_id"],
        connector=record["connector"],
        connector_account_id=record["connector_account_id"],
        event_type=record["event_type"],
        kind=_name(NotificationKind, record["kind"]),
        content=orjson.loads(record["content"]),
        received_at=record["received_at"],
        result="" if result is None else _name(Result, result),
        applied_at=record["applied_at"],
        payment_id=record["payment_id"] or "",
        operation_id=record["operation_id"] or "",
    )


def _name(kinds: type[IntEnum], number: int) -> str:
    try:
        return kinds(number).name
    except ValueError:
        return str(number)


def keeping_lane(
    connections: HeldConnections,
    limits: LaneLimits,
    *,
    retry_after_s: float,
    row_security: bool,
    metrics: LaneMetrics | None,
) -> PostgresLane[Received, bool]:
    """A lane that keeps what it is given; for each, whether it is new."""
    write: Write[Received, bool] = _keep
    if row_security:
        write = within_merchants(write, lambda each: each.merchant_id)
    return PostgresLane(
        "notifications",
        connections,
        limits,
        write,
        retry_after_s=retry_after_s,
        metrics=metrics,
    )
