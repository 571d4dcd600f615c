"""Notifications in memory, as PostgreSQL keeps them, and an applier over a gateway in memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from gateway.application.applying import Applier, Schedule
from gateway.application.notifications import (
    Applied,
    LookupUnavailable,
    Notification,
    NotificationKind,
    Pending,
    Received,
    Result,
)
from gateway.domain.decisions import event_of
from gateway.domain.states import Event
from storage.postgres.notifications import DEFINITE, ENDS
from tests.memory_store import MERCHANT, Bench, JsonEncoder

if TYPE_CHECKING:
    from gateway.domain.model import ConnectorAnswer

ACCOUNT: Final = "account-1"
"""Of the bench's payments."""
AT: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)

SCHEDULE: Final = Schedule(
    interval_s=1.0,
    lease_s=30.0,
    batch_max=100,
    concurrency_max=100,
    account_concurrency_max=100,
    backoff_s_min=1.0,
    backoff_s_max=60.0,
)

Key = tuple[str, str, str]


def _key(received: Received) -> Key:
    notification = received.notification
    return received.merchant_id, received.connector_account_id, notification.event_id


def within_share(
    due: Iterable[Key], limit: int, account_max: int | None, busy: Iterable[Key]
) -> Iterator[Key]:
    """The first of those that are due, without what is beyond an account's share."""
    accounts = Counter(account for _, account, _ in busy)
    for key in due:
        if limit and (account_max is None or accounts[key[1]] < account_max):
            limit -= 1
            accounts[key[1]] += 1
            yield key


@dataclass(slots=True)
class MemoryNotifications:
    """Implements NotificationStore; everything pending is due at once, and nobody else leases."""

    kept: dict[Key, Received] = field(default_factory=dict)
    pending: dict[Key, int] = field(default_factory=dict)
    """The tries of each."""
    applied: dict[Key, Applied] = field(default_factory=dict)

    async def keep(self, received: Sequence[Received]) -> int:
        """See the port."""
        new = [each for each in received if _key(each) not in self.kept]
        for each in new:
            self.kept[_key(each)] = each
            self.pending[_key(each)] = 0
        return len(new)

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Received] = (),
    ) -> Sequence[Pending]:
        """See the port."""
        busy = [_key(each) for each in at_work]
        due = [key for key in self.pending if key not in busy]
        taken = []
        for key in within_share(due, limit, account_max, busy):
            taken.append(Pending(self.kept[key], self.pending[key]))
            self.pending[key] += 1
        return sorted(taken, key=lambda each: each.received.notification.occurred_at or AT)

    async def finish(self, received: Received, applied: Applied) -> None:
        """See the port."""
        del self.pending[_key(received)]
        self.applied[_key(received)] = applied

    async def put_off(self, received: Received, apply_after_s: float) -> None:
        """See the port."""
        assert apply_after_s > 0

    async def is_outdated(self, received: Received, event: Event, *, by_id: bool = False) -> bool:
        """See the port."""
        own = received.notification
        may_be_ended = own.kind is NotificationKind.AUTHORIZATION and event is Event.APPROVED
        for other in (each.notification for each in self.kept.values()):
            if other.answer is None or not own.subject or other.subject != own.subject:
                continue
            if own.occurred_at is None or other.occurred_at is None:
                continue
            told = event_of(other.answer)
            if may_be_ended and other.kind is NotificationKind.VOID:
                if told in ENDS and other.occurred_at >= own.occurred_at:
                    return True
            elif (
                other.kind is own.kind
                and not (by_id and other.transaction_id != own.transaction_id)
                and told is not event
                and told in DEFINITE
                and (other.occurred_at, told) > (own.occurred_at, event)
            ):
                return True
        return False


@dataclass(slots=True)
class _Counts:
    results: Counter[Result] = field(default_factory=Counter)
    failures: int = 0

    def notification_applied(self, connector: str, kind: NotificationKind, result: Result) -> None:
        self.results[result] += 1

    def applying_failed(self) -> None:
        self.failures += 1


class NotifiedBench(Bench):
    """A gateway in memory that PSPs tell things."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.notifications = MemoryNotifications()
        self.references: dict[str, str | None] = {}
        """What the PSP knows: its ids of authorizations, and our references."""
        self.results = _Counts()
        self.applier = Applier(
            self.notifications,
            self.store,
            self.router,
            self,
            JsonEncoder(),
            self.payments.outcomes,
            SCHEDULE,
            self.results,
        )
        self._numbers: Iterator[int] = itertools.count(1)

    async def reference_of(
        self, connector_account_id: str, connector_transaction_id: str
    ) -> str | None:
        """See ReferenceLookup."""
        if connector_transaction_id not in self.references:
            raise LookupUnavailable("the PSP is away")
        return self.references[connector_transaction_id]

    def told(
        self,
        kind: NotificationKind,
        answer: ConnectorAnswer | None,
        *,
        account: str = ACCOUNT,
        merchant: str = MERCHANT,
        after_s: float = 0,
        transaction_id: str = "",
        **more: Any,
    ) -> Received:
        """A notification."""
        number = next(self._numbers)
        if answer is not None and transaction_id:
            answer = replace(answer, connector_transaction_id=transaction_id)
        notification = Notification(
            connector="psp",
            event_id=f"evt_{number}",
            event_type="psp.event",
            kind=kind,
            occurred_at=AT + timedelta(seconds=after_s),
            answer=answer,
            **more,
        )
        return Received(merchant, account, notification)

    async def tell(self, *received: Received, recover: bool = True) -> list[Applied | None]:
        """Keep and apply; what became of each, after recovery where one waits for it."""
        await self.notifications.keep(received)
        await self.applier.run_once()
        if recover and self.notifications.pending:
            await self.recover()
            await self.applier.run_once()
        assert self.results.failures == 0
        return [self.notifications.applied.get(_key(each)) for each in received]
