"""The record of what was changed of the configuration, by whom: written by triggers, read here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from storage.postgres.direct import DirectStore
from storage.postgres.pool import Connection
from storage.postgres.queries import query, run

_LIST_ALL = query("changes", "list_all")
_LIST_OF_ORGANISATION = query("changes", "list_of_organisation")
_LIST_OF_MERCHANT = query("changes", "list_of_merchant")
_FIND_TIME = query("changes", "find_time")
_UNRECORDED = query("changes", "unrecorded")


@dataclass(frozen=True, slots=True)
class ConfigurationChange:
    """One row of one table that was made, changed or removed."""

    change_id: int
    changed_at: datetime
    author: str
    """What the session said of itself: `login:…`, a credential; else `database:…`."""
    database_user: str
    """As whom it had logged in."""
    client_address: str
    """From where; empty for a Unix socket."""
    action: str
    """INSERT, UPDATE, DELETE or TRUNCATE."""
    table_name: str
    row_id: str
    """Empty where all rows went."""
    mode: Mode | None
    organisation_id: str
    merchant_id: str
    old_values: Mapping[str, Any]
    """Of the columns that changed; "***" for what must not be read."""
    new_values: Mapping[str, Any]


class ConfigurationChanges(DirectStore):
    """Who changed what."""

    NAME = "changes"

    async def list(
        self,
        *,
        organisation_id: str | None = None,
        merchant_id: str | None = None,
        since: datetime | None = None,
        before: int | None = None,
        limit: int,
    ) -> Sequence[ConfigurationChange]:
        """The newest first: of a merchant, of an organisation and its merchants, or all.

        `before` is the change after which the page goes on. Raises GatewayError(INVALID_REQUEST)
        where it does not exist.
        """
        before_time = None if before is None else await self._time_of(before)
        page: dict[str, object] = {
            "since": since,
            "before_time": before_time,
            "before_id": before,
            "limit": limit,
        }
        if merchant_id is not None:
            rows = await self._lane.fetch(_LIST_OF_MERCHANT, merchant_id=merchant_id, **page)
        elif organisation_id is not None:
            rows = await self._lane.fetch(
                _LIST_OF_ORGANISATION, organisation_id=organisation_id, **page
            )
        else:
            rows = await self._lane.fetch(_LIST_ALL, **page)
        return [_change(row) for row in rows]

    async def _time_of(self, change_id: int) -> datetime:
        rows = await self._lane.fetch(_FIND_TIME, change_id=change_id)
        if not rows:
            raise GatewayError(Reason.INVALID_REQUEST, f"There is no change {change_id}.")
        time: datetime = rows[0]["changed_at"]
        return time


async def unrecorded_tables(connection: Connection) -> list[str]:
    """Tables of the configuration of which a change would not be recorded."""
    return [row["table_name"] for row in await run(connection, _UNRECORDED)]


def _change(row: asyncpg.Record) -> ConfigurationChange:
    return ConfigurationChange(
        change_id=row["change_id"],
        changed_at=row["changed_at"],
        author=row["author"],
        database_user=row["database_user"],
        client_address="" if row["client_address"] is None else str(row["client_address"]),
        action=row["action"],
        table_name=row["table_name"],
        row_id=row["row_id"] or "",
        mode=None if row["mode"] is None else Mode(row["mode"]),
        organisation_id=row["of_organisation"] or "",
        merchant_id=row["of_merchant"] or "",
        old_values=orjson.loads(row["old_values"] or "{}"),
        new_values=orjson.loads(row["new_values"] or "{}"),
    )
