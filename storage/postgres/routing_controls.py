"""Suspensions of accounts and merchants' costs in PostgreSQL."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import asyncpg

from gateway.application.routing_controls import StoredCosts, StoredSuspension
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_suspension_id
from gateway.routing.availability import Suspension, SuspensionKind
from storage.postgres.direct import OVERLAP_S, DirectStore
from storage.postgres.pool import Connection
from storage.postgres.queries import query, run
from storage.postgres.routing import PUT_TRIES_MAX

_SUSPEND = query("routing_controls", "suspend")
_END_SUSPENSION = query("routing_controls", "end_suspension")
_CURRENT_SUSPENSIONS = query("routing_controls", "current_suspensions")
_ALL_SUSPENSIONS = query("routing_controls", "all_suspensions")
_PUT_COSTS = query("routing_controls", "put_costs")
_COSTS_OF = query("routing_controls", "costs_of")
_CHANGED_COSTS = query("routing_controls", "changed_costs")

_KINDS: Final = {kind.value: kind for kind in SuspensionKind}


class RoutingControls(DirectStore):
    """Implements the port `RoutingSource`, and what the command line does."""

    NAME = "routing_controls"

    async def suspend(
        self,
        kind: SuspensionKind,
        connector: str,
        *,
        merchant_id: str = "",
        account_id: str = "",
        method: str = "",
        begins_at: datetime | None = None,
        ends_at: datetime | None = None,
        reason: str,
        created_by: str,
    ) -> Suspension:
        """Send nothing to an account, or without one to none of the connector's.

        It begins now unless `begins_at` says when, and without `ends_at` does not end by itself.
        Raises GatewayError(INVALID_REQUEST) without the account.
        """
        rows = await self._lane.fetch(
            _SUSPEND,
            merchant_id=merchant_id,
            suspension_id=new_suspension_id(),
            kind=kind,
            connector=connector,
            account_id=account_id,
            method=method,
            begins_at=begins_at,
            ends_at=ends_at,
            reason=reason,
            created_by=created_by,
        )
        if not rows:
            raise GatewayError(
                Reason.INVALID_REQUEST,
                f"The merchant {merchant_id} has no account {account_id} at {connector}.",
            )
        return _suspension(rows[0])

    async def end_suspension(
        self, suspension_id: str, *, reason: str, ended_by: str
    ) -> Suspension | None:
        """None without one of this id that is or is to come."""
        tries = 0

        async def end(connection: Connection) -> list[asyncpg.Record]:
            nonlocal tries
            tries += 1
            return await run(
                connection,
                _END_SUSPENSION,
                suspension_id=suspension_id,
                reason=reason,
                ended_by=ended_by,
                again=tries > 1,
            )

        rows = await self._lane.run(end)
        return _suspension(rows[0]) if rows else None

    async def suspensions(self) -> Sequence[Suspension]:
        """See the port."""
        return [_suspension(row) for row in await self._lane.fetch(_CURRENT_SUSPENSIONS)]

    async def all_suspensions(self, limit: int) -> Sequence[StoredSuspension]:
        """The latest first, those that are over too."""
        return [
            StoredSuspension(
                _suspension(row),
                row["created_at"],
                row["ended_at"],
                row["ended_by"],
                row["ended_reason"],
            )
            for row in await self._lane.fetch(_ALL_SUSPENSIONS, limit=limit)
        ]

    async def put_costs(
        self, merchant_id: str, body: str, *, reason: str, created_by: str
    ) -> StoredCosts:
        """Store the next version; an empty text ends the merchant's costs.

        Raises GatewayError: INVALID_REQUEST without the merchant, CONTENTION where others were
        faster every time.
        """
        for _ in range(PUT_TRIES_MAX):
            rows = await self._lane.fetch(
                _PUT_COSTS, merchant_id=merchant_id, body=body, reason=reason, created_by=created_by
            )
            if not rows:
                raise GatewayError(Reason.INVALID_REQUEST, f"There is no merchant {merchant_id}.")
            if rows[0]["version"] is not None:
                return _costs(rows[0])
        raise GatewayError(Reason.CONTENTION, "Others put costs at the same time.")

    async def costs_of(self, merchant_id: str, limit: int) -> Sequence[StoredCosts]:
        """A merchant's versions, the latest first."""
        rows = await self._lane.fetch(_COSTS_OF, merchant_id=merchant_id, limit=limit)
        return [_costs(row) for row in rows]

    async def changed_costs(self, since: datetime | None) -> Sequence[StoredCosts]:
        """See the port."""
        rows = await self._lane.fetch(_CHANGED_COSTS, since=since, overlap_s=OVERLAP_S)
        return [_costs(row) for row in rows]


def _suspension(row: asyncpg.Record) -> Suspension:
    return Suspension(
        suspension_id=row["suspension_id"],
        kind=_KINDS.get(row["kind"], SuspensionKind.UNKNOWN),
        merchant_id=row["merchant_id"],
        connector=row["connector"],
        account_id=row["account_id"],
        method=row["method"],
        reason=row["reason"],
        created_by=row["created_by"],
        begins_at=row["begins_at"],
        ends_at=row["ends_at"],
        begins_in_s=row["begins_in_s"],
        ends_in_s=row["ends_in_s"],
    )


def _costs(row: asyncpg.Record) -> StoredCosts:
    return StoredCosts(
        row["merchant_id"],
        row["version"],
        row["body"],
        row["reason"],
        row["created_by"],
        row["created_at"],
    )
