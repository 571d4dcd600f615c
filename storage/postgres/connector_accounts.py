"""Merchants' accounts at PSPs in PostgreSQL; their credentials come and go encrypted."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import asyncpg
import orjson

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from storage.postgres.direct import OVERLAP_S, DirectStore, readable
from storage.postgres.queries import Query, query

_ADD = query("connector_accounts", "add")
_LIST = query("connector_accounts", "list")
_FIND = query("connector_accounts", "find")
_CHANGED_SINCE = query("connector_accounts", "changed_since")
_CHANGE = query("connector_accounts", "change")
_REPLACE_CREDENTIALS = query("connector_accounts", "replace_credentials")
_REMOVE = query("connector_accounts", "remove")
_REWRAP = query("connector_accounts", "rewrap")


class ConnectorAccounts(DirectStore):
    """Implements the AccountSource port, and what the command line does."""

    NAME = "connector_accounts"

    async def add(self, account: ConnectorAccount) -> None:
        """Raises GatewayError(INVALID_REQUEST) without the merchant."""
        rows = await self._lane.fetch(
            _ADD,
            merchant_id=account.merchant_id,
            account_id=account.account_id,
            mode=account.mode,
            connector=account.connector,
            priority=account.priority,
            capabilities=orjson.dumps(dict(account.capabilities)).decode("utf-8"),
            **_columns(account.sealed),
        )
        if not rows:
            raise GatewayError(
                Reason.INVALID_REQUEST, f"There is no merchant {account.merchant_id}."
            )

    async def list(self, merchant_id: str | None = None) -> Sequence[ConnectorAccount]:
        """Those of a merchant, or all; without removed ones."""
        records = await self._lane.fetch(_LIST, merchant_id=merchant_id)
        return readable("a connector account", _account, records)

    async def find(self, merchant_id: str, account_id: str) -> ConnectorAccount | None:
        """The account, unless it was removed."""
        return _only(await self._select(_FIND, merchant_id=merchant_id, account_id=account_id))

    async def changed_since(self, since: datetime | None) -> Sequence[ConnectorAccount]:
        """See the port."""
        records = await self._lane.fetch(_CHANGED_SINCE, since=since, overlap_s=OVERLAP_S)
        return readable("a connector account", _account, records)

    async def change(
        self,
        merchant_id: str,
        account_id: str,
        *,
        enabled: bool | None = None,
        priority: int | None = None,
    ) -> ConnectorAccount | None:
        """Change what is given; None without the account."""
        rows = await self._select(
            _CHANGE,
            merchant_id=merchant_id,
            account_id=account_id,
            enabled=enabled,
            priority=priority,
        )
        return _only(rows)

    async def replace_credentials(
        self, merchant_id: str, account_id: str, sealed: Sealed
    ) -> ConnectorAccount | None:
        """None without the account."""
        rows = await self._select(
            _REPLACE_CREDENTIALS,
            merchant_id=merchant_id,
            account_id=account_id,
            **_columns(sealed),
        )
        return _only(rows)

    async def remove(self, merchant_id: str, account_id: str) -> ConnectorAccount | None:
        """Remove the account and delete its credentials; None without it."""
        return _only(await self._select(_REMOVE, merchant_id=merchant_id, account_id=account_id))

    async def rewrap(self, account: ConnectorAccount, sealed: Sealed) -> bool:
        """Whether the account still had the credentials that were unwrapped."""
        rows = await self._lane.fetch(
            _REWRAP,
            merchant_id=account.merchant_id,
            account_id=account.account_id,
            wrapping_key_id=sealed.data_key.key_id,
            wrapped_data_key=sealed.data_key.ciphertext,
            expected_wrapped=account.sealed.data_key.ciphertext,
        )
        return bool(rows)

    async def _select(self, statement: Query, **values: object) -> Sequence[ConnectorAccount]:
        return [_account(record) for record in await self._lane.fetch(statement, **values)]


def _only(accounts: Sequence[ConnectorAccount]) -> ConnectorAccount | None:
    return accounts[0] if accounts else None


def _columns(sealed: Sealed) -> dict[str, object]:
    return {
        "credentials": sealed.ciphertext,
        "wrapping_key_id": sealed.data_key.key_id,
        "wrapped_data_key": sealed.data_key.ciphertext,
    }


def _account(record: asyncpg.Record) -> ConnectorAccount:
    capabilities: Mapping[str, object] = orjson.loads(record["capabilities"])
    return ConnectorAccount(
        merchant_id=record["merchant_id"],
        account_id=record["account_id"],
        mode=Mode(record["mode"]),
        connector=record["connector"],
        sealed=Sealed(
            record["credentials"],
            WrappedKey(record["wrapping_key_id"], record["wrapped_data_key"]),
        ),
        priority=record["priority"],
        enabled=record["enabled"],
        capabilities=capabilities,
        version=record["version"],
        removed=record["removed_at"] is not None,
        updated_at=record["updated_at"],
    )
