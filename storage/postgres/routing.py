"""Routing rules of merchants in PostgreSQL, every version, and which was in force when."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import asyncpg

from gateway.application.routing import ActiveRules
from gateway.application.routing_administration import (
    Author,
    PastPayment,
    RulesVersion,
)
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode, OperationKind
from storage.postgres.direct import OVERLAP_S, DirectStore, readable
from storage.postgres.queries import query

PUT_TRIES_MAX: Final = 5
"""How often a version is tried anew because another call took its number."""

_PUT = query("routing", "put")
_ACTIVATE = query("routing", "activate")
_ACTIVE = query("routing", "active")
_LIST = query("routing", "list")
_ACTIVE_SINCE = query("routing", "active_since")
_PAST_PAYMENTS = query("routing", "past_payments")


class RoutingRules(DirectStore):
    """Implements the RuleSource and RuleStore ports."""

    NAME = "routing"
    STATEMENT_TIMEOUT_S = 30.0

    async def put(self, merchant_id: str, mode: Mode, text: str, author: Author) -> int:
        """See the port."""
        for _ in range(PUT_TRIES_MAX):
            rows = await self._lane.fetch(
                _PUT,
                merchant_id=merchant_id,
                mode=mode,
                rules=text,
                reason=author.reason,
                created_by=author.name,
                request_id=author.request_id,
            )
            if not rows:
                raise GatewayError(Reason.INVALID_REQUEST, f"There is no merchant {merchant_id}.")
            version: int | None = rows[0]["version"]
            if version is not None:
                return version
        raise GatewayError(Reason.CONTENTION, "Others put rules at the same time.")

    async def active(self, merchant_id: str, mode: Mode) -> int:
        """See the port."""
        rows = await self._lane.fetch(_ACTIVE, merchant_id=merchant_id, mode=mode)
        return int(rows[0]["version"]) if rows else 0

    async def activate(
        self, merchant_id: str, mode: Mode, version: int, expected: int, author: Author
    ) -> bool:
        """See the port."""
        rows = await self._lane.fetch(
            _ACTIVATE,
            merchant_id=merchant_id,
            mode=mode,
            version=version,
            expected=expected,
            reason=author.reason,
            activated_by=author.name,
            request_id=author.request_id,
        )
        return bool(rows)

    async def find(self, merchant_id: str, mode: Mode, version: int) -> RulesVersion | None:
        """See the port."""
        found = await self._list(merchant_id, mode, version=version, before=None, page_size=1)
        return found[0] if found else None

    async def versions(
        self, merchant_id: str, mode: Mode, *, before_version: int | None, page_size: int
    ) -> Sequence[RulesVersion]:
        """See the port."""
        return await self._list(
            merchant_id, mode, version=None, before=before_version, page_size=page_size
        )

    async def active_since(self, since: datetime | None) -> Sequence[ActiveRules]:
        """See the port."""
        rows = await self._lane.fetch(_ACTIVE_SINCE, since=since, overlap_s=OVERLAP_S)
        return readable("routing rules", _active_rules, rows)

    async def past_payments(
        self, merchant_id: str, mode: Mode, *, days: int, payments_max: int
    ) -> Sequence[PastPayment]:
        """See the port."""
        rows = await self._lane.fetch(
            _PAST_PAYMENTS,
            merchant_id=merchant_id,
            mode=mode,
            days=days,
            payments_max=payments_max,
            kinds=[OperationKind.AUTHORIZE, OperationKind.VERIFY],
        )
        return [
            PastPayment(
                row["payment_id"],
                row["requested_minor"],
                row["currency"],
                row["details"],
                row["connector"],
                row["connector_account_id"],
            )
            for row in rows
        ]

    async def _list(
        self,
        merchant_id: str,
        mode: Mode,
        *,
        version: int | None,
        before: int | None,
        page_size: int,
    ) -> Sequence[RulesVersion]:
        rows = await self._lane.fetch(
            _LIST,
            merchant_id=merchant_id,
            mode=mode,
            version=version,
            before_version=before,
            page_size=page_size,
        )
        return [
            RulesVersion(
                version=row["version"],
                text=row["rules"],
                reason=row["reason"],
                created_by=row["created_by"],
                created_at=row["created_at"],
                active=row["active"],
                activated_at=row["activated_at"],
                activated_by=row["activated_by"] or "",
                activation_reason=row["activation_reason"] or "",
            )
            for row in rows
        ]


def _active_rules(row: asyncpg.Record) -> ActiveRules:
    return ActiveRules(
        row["merchant_id"],
        Mode(row["mode"]),
        row["version"],
        row["rules"],
        row["activated_at"],
        row["number"],
    )
