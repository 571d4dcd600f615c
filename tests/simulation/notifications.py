"""What PSPs tell of their own accord: made of their journals, sent at least once, late, twice and
in any order, kept in the simulated database, applied by the gateway's own code.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from gateway.application.notifications import (
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    Pending,
    Received,
)
from gateway.connectors.simulator.connector import _answered
from gateway.domain.model import Verdict
from tests.chaos.history import Disputed
from tests.memory_notifications import Key, MemoryNotifications, _key, within_share
from tests.simulation.loop import at_once

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence

    from gateway.application.notifications import Applied
    from gateway.connectors.simulator.journal import Record
    from gateway.domain.states import Event
    from tests.simulation.accounts import Account
    from tests.simulation.database import Database, SimulatedStore
    from tests.simulation.loop import SimulatedLoop

N = NotificationKind

KINDS: Final = {
    "authorize": N.AUTHORIZATION,
    "capture": N.CAPTURE,
    "void": N.VOID,
    "refund": N.REFUND,
    "increment": N.INCREMENT,
    "reversal": N.VOID,
}
_DELAYS_S: Final = ((0.0, 0.03), (0.0, 0.03), (0.0, 0.4), (0.2, 2.5), (2.0, 9.0))
"""Some come before the answer to the request, some when nobody thinks of it any more."""
_TWICE_SHARE: Final = 0.25
_RETRY_S: Final = (0.1, 1.5)
_CAPTURE_TOLD_SHARE: Final = 0.5
"""Charges whose PSP tells the capture too, under the authorization's reference."""
_OPEN: Final = frozenset({"pending", "requires_action"})
_DISPUTED_SHARE: Final = 0.5
"""Charges and captures that are disputed, where disputes are told."""
_D: Final = DisputeStatus
_ENDS_OF_DISPUTES: Final = (
    *((), (_D.WON,), (_D.LOST,), (_D.ACCEPTED,), (_D.CHALLENGED, _D.LOST)),
    *((_D.CHALLENGED, _D.WON), (_D.WON, _D.LOST), (_D.LOST, _D.WON), (_D.LOST, _D.EXPIRED)),
)
"""What follows the opening of a dispute; a second end is told when the first is appealed."""
_DISPUTE_PAUSE_S: Final = (0.0, 0.0, 1.5)


@dataclass(slots=True)
class _Row:
    apply_at: datetime
    lease_until: datetime | None = None
    tries: int = 0


class KeptNotifications(MemoryNotifications):
    """The table of notifications: each method is a transaction, at a moment of its clock."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__()
        self._now = now
        self.rows: dict[Key, _Row] = {}
        self.changes = 0

    async def keep(self, received: Sequence[Received]) -> int:
        """See the port."""
        self.changes += 1
        new = [each for each in received if _key(each) not in self.kept]
        for each in new:
            self.kept[_key(each)] = each
            self.rows[_key(each)] = _Row(self._now())
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
        now, busy = self._now(), [_key(each) for each in at_work]
        due = [
            key
            for key, row in self.rows.items()
            if row.apply_at <= now and (row.lease_until is None or row.lease_until <= now)
            if key not in busy
        ]
        due.sort(key=lambda key: self.rows[key].apply_at)
        taken = []
        self.changes += len(due)
        for key in within_share(due, limit, account_max, busy):
            row = self.rows[key]
            row.lease_until = now + timedelta(seconds=lease_s)
            taken.append(Pending(self.kept[key], row.tries))
            row.tries += 1
        return sorted(taken, key=_occurred_at)

    async def finish(self, received: Received, applied: Applied) -> None:
        """See the port."""
        self.changes += 1
        self.rows.pop(_key(received), None)
        self.applied.setdefault(_key(received), applied)

    async def put_off(self, received: Received, apply_after_s: float) -> None:
        """See the port."""
        row = self.rows.get(_key(received))
        if row is not None:
            row.apply_at = self._now() + timedelta(seconds=apply_after_s)
            row.lease_until = None


def _occurred_at(pending: Pending) -> datetime:
    at = pending.received.notification.occurred_at
    assert at is not None
    return at


class NotificationsOfGateway:
    """Implements `gateway.application.notifications.NotificationStore` over a gateway's store."""

    def __init__(self, store: SimulatedStore) -> None:
        self._store = store

    async def _run(self, work: Callable[[KeptNotifications], Coroutine[Any, Any, Any]]) -> Any:
        def transaction(database: Database) -> Any:
            return at_once(work(database.notifications))

        return await self._store._run(transaction)

    async def keep(self, received: Sequence[Received]) -> int:
        """See the port."""
        new: int = await self._run(lambda kept: kept.keep(received))
        return new

    async def lease(
        self,
        limit: int,
        lease_s: float,
        *,
        account_max: int | None = None,
        at_work: Collection[Received] = (),
    ) -> Sequence[Pending]:
        """See the port."""
        taken: Sequence[Pending] = await self._run(
            lambda kept: kept.lease(limit, lease_s, account_max=account_max, at_work=at_work)
        )
        return taken

    async def finish(self, received: Received, applied: Applied) -> None:
        """See the port."""
        await self._run(lambda kept: kept.finish(received, applied))

    async def put_off(self, received: Received, apply_after_s: float) -> None:
        """See the port."""
        await self._run(lambda kept: kept.put_off(received, apply_after_s))

    async def is_outdated(self, received: Received, event: Event, *, by_id: bool = False) -> bool:
        """See the port."""
        outdated: bool = await self._run(
            lambda kept: kept.is_outdated(received, event, by_id=by_id)
        )
        return outdated


class NoLookup:
    """Implements ReferenceLookup of PSPs that tell our references."""

    async def reference_of(
        self, connector_account_id: str, connector_transaction_id: str
    ) -> str | None:
        """See the port."""
        return None


class Notifier:
    """The PSP's sender of one account."""

    def __init__(
        self,
        loop: SimulatedLoop,
        account: Account,
        merchant_id: str,
        draw: random.Random,
        deliver: Callable[[Received], Coroutine[Any, Any, bool]],
        disputes: random.Random | None = None,
        disputed: list[Disputed] | None = None,
    ) -> None:
        """`deliver` takes one to a gateway; whether that has kept it. With `disputes` customers
        dispute what was charged, which is entered into `disputed`.
        """
        self._disputes = disputes
        self._disputed = [] if disputed is None else disputed
        self._references: dict[str, str] = {}
        """Of authorizations, by the PSP's ids."""
        self._loop = loop
        self._account = account
        self._merchant_id = merchant_id
        self._draw = draw
        self._deliver = deliver
        self._numbers: Iterator[int] = itertools.count(1)
        self._canceled: set[str] = set()
        self.undelivered = 0

    def told(self, record: Record) -> None:
        """The PSP has decided or done something."""
        for notification in self._made_of(record):
            received = Received(self._merchant_id, self._account.account_id, notification)
            self.undelivered += 1
            self._start(self._send(received))
        if record["type"] == "effect" and "takes_back" not in record:
            self._maybe_disputed(record)
        if record.get("answer", {}).get("result") in _OPEN:
            self._start(self._look_later(record["kind"], record["reference"]))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._loop.start(self._account.psp.process, work)

    async def _send(self, received: Received) -> None:
        draw = self._draw
        await asyncio.sleep(draw.uniform(*draw.choice(_DELAYS_S)))
        while not await self._deliver(received):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(draw.uniform(*_RETRY_S))
        self.undelivered -= 1
        if draw.random() < _TWICE_SHARE:
            await asyncio.sleep(draw.uniform(*draw.choice(_DELAYS_S)))
            await self._deliver(received)

    async def _look_later(self, kind: str, reference: str) -> None:
        """What is open at the PSP ends there whether anybody asks or not."""
        for _ in range(2):
            await asyncio.sleep(self._draw.uniform(0.2, 4.0))
            self._account.psp.look(kind, reference)

    def _maybe_disputed(self, record: Record) -> None:
        draw, effect = self._disputes, record["effect"]
        if effect in ("authorization", "charge"):
            self._references[record["authorization_id"]] = record["reference"]
        if draw is None or effect not in ("charge", "capture") or draw.random() > _DISPUTED_SHARE:
            return
        statuses = [_D.OPENED, *draw.choice(_ENDS_OF_DISPUTES)]
        reference = self._references[record["authorization_id"]]
        dispute_id = f"dispute_{record['transaction_id']}"
        self._disputed.append(
            Disputed(
                dispute_id, reference, record["amount_minor"], [each.name for each in statuses]
            )
        )
        told_at = record["t"]
        for number, status in enumerate(statuses):
            notification = Notification(
                connector=self._account.name,
                event_id=f"evt_{dispute_id}_{number}",
                event_type=f"dispute.{status.name.lower()}",
                kind=N.DISPUTE,
                occurred_at=datetime.fromtimestamp(told_at + number, UTC),
                payment_reference=reference,
                amount_minor=record["amount_minor"],
                currency=record["currency"],
                dispute=Dispute(dispute_id, DisputeStage.ACTIVE_DISPUTE, status),
            )
            self.undelivered += 1
            pause_s = draw.choice(_DISPUTE_PAUSE_S) * number
            received = Received(self._merchant_id, self._account.account_id, notification)
            self._start(self._send_later(received, pause_s))

    async def _send_later(self, received: Received, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        await self._send(received)

    def _made_of(self, record: Record) -> Iterator[Notification]:
        kind, reference = KINDS.get(record["kind"]), record["reference"]
        if kind is None:
            return
        if record["method"] == "cancel":
            if record["answer"].get("had") == "effect" and reference not in self._canceled:
                self._canceled.add(reference)
                yield self._notification(record, kind, reference, canceled=True)
            return
        yield self._notification(record, kind, reference)
        charged = record["type"] == "effect" and record["effect"] == "charge"
        if charged and self._draw.random() < _CAPTURE_TOLD_SHARE:
            yield self._notification(record, N.CAPTURE, reference)

    def _notification(
        self, record: Record, kind: N, reference: str, *, canceled: bool = False
    ) -> Notification:
        answer = _answered(record["answer"], "http://psp")
        payment_reference = ""
        if canceled and kind is N.AUTHORIZATION:
            # As of what is gone of a payment, whoever did it.
            kind, reference, payment_reference = N.VOID, "", reference
            answer = replace(answer, verdict=Verdict.APPROVED)
        approved = answer.verdict is Verdict.APPROVED and kind is not N.VOID
        return Notification(
            connector=self._account.name,
            event_id=f"evt_{self._account.account_id}_{next(self._numbers)}",
            event_type=f"{record['kind']}.{answer.verdict.name.lower()}",
            kind=kind,
            occurred_at=datetime.fromtimestamp(record["t"], UTC),
            reference=reference,
            payment_reference=payment_reference,
            answer=answer,
            amount_minor=record["answer"].get("amount_minor") if approved else None,
            currency=record["answer"].get("currency", "") if approved else "",
        )
