"""What persons say of accounts, read in the background: suspensions, and what accounts cost."""

import logging
import time
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from gateway.application.refreshing import refresh_forever
from gateway.routing.availability import AccountAvailability, Suspension, SuspensionKind
from gateway.routing.costs import CostBook, CostsRefused, parse_costs

_log = logging.getLogger(__name__)


class StoredSuspension(NamedTuple):
    """A suspension with its end, for people."""

    suspension: Suspension
    created_at: datetime
    ended_at: datetime | None
    """When a person ended it."""
    ended_by: str
    ended_reason: str


class StoredCosts(NamedTuple):
    """A version of a merchant's costs."""

    merchant_id: str
    version: int
    body: str
    """As `gateway.routing.costs` reads it; empty: the merchant has none any more."""
    reason: str
    created_by: str
    created_at: datetime


class RoutingSource(Protocol):
    """Where they are kept. Both methods raise StoreUnavailable."""

    async def suspensions(self) -> Sequence[Suspension]:
        """Those that are, or are to come."""

    async def changed_costs(self, since: datetime | None) -> Sequence[StoredCosts]:
        """Each merchant's latest costs that were put at or after `since`, or shortly before; None:
        those of all that have some.
        """


class RoutingControls:
    """Takes over what has changed. What is known holds while the store is away."""

    def __init__(
        self, source: RoutingSource, availability: AccountAvailability, costs: CostBook
    ) -> None:
        self._source = source
        self._availability = availability
        self._costs = costs
        self._latest: datetime | None = None
        self._known: dict[str, int] = {}
        """The latest version of each merchant's costs that was read, usable or not."""
        self._unknown: set[str] = set()
        """The suspensions of a kind that this version does not know."""

    async def run(self, interval_s: float) -> None:
        """Read again and again, until cancelled."""
        await refresh_forever("suspensions and costs", self.refresh, interval_s)

    async def refresh(self) -> None:
        """Read what has changed. Raises StoreUnavailable."""
        asked_at = time.monotonic()
        suspensions = await self._source.suspensions()
        self._availability.suspend(suspensions, asked_at)
        self._tell_unknown(suspensions)
        for stored in await self._source.changed_costs(self._latest):
            self._latest = max(stored.created_at, self._latest or stored.created_at)
            if stored.version > self._known.get(stored.merchant_id, 0):
                self._known[stored.merchant_id] = stored.version
                self._take(stored)

    def _tell_unknown(self, suspensions: Sequence[Suspension]) -> None:
        """Each once."""
        before, self._unknown = self._unknown, set()
        for each in suspensions:
            if each.kind is not SuspensionKind.UNKNOWN:
                continue
            self._unknown.add(each.suspension_id)
            if each.suspension_id not in before:
                _log.warning(
                    "a suspension of an unknown kind is taken for a kill switch",
                    extra={
                        "suspension_id": each.suspension_id,
                        "merchant_id": each.merchant_id,
                        "connector": each.connector,
                        "connector_account_id": each.account_id,
                    },
                )

    def _take(self, stored: StoredCosts) -> None:
        if not stored.body:
            self._costs.forget(stored.merchant_id)
            return
        try:
            self._costs.put(stored.merchant_id, parse_costs(stored.body))
        except CostsRefused as error:
            # It was looked at when it was put, by a gateway that knows more than this one.
            _log.warning(
                "costs cannot be used, those before stay: %s",
                error,
                extra={"merchant_id": stored.merchant_id},
            )
