"""Merchants' accounts at PSPs, and where a gateway takes what PSPs tell, for tests."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gateway.application.connector_accounts import (
    PRIORITY_DEFAULT,
    ConnectorAccount,
    Sealed,
    WrappedKey,
)
from gateway.connectors.sealing import LocalKeys, new_wrapping_key, seal
from gateway.domain.ids import new_connector_account_id
from gateway.domain.model import Mode
from storage.postgres import ConnectorAccounts
from tests.harness import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.harness import GatewayProcess

KEY: Final = new_wrapping_key("k1")
"""What all credentials are sealed under: a gateway's `connector_keys`."""


async def add_account(
    dsn: str,
    merchant_id: str,
    connector: str,
    credentials: Mapping[str, str],
    *,
    priority: int = PRIORITY_DEFAULT,
    capabilities: Mapping[str, object] | None = None,
) -> str:
    """Add an account of the mode TEST; its id."""
    account = ConnectorAccount(
        merchant_id,
        new_connector_account_id(),
        Mode.TEST,
        connector,
        Sealed(b"", WrappedKey("", b"")),
        priority,
        capabilities=capabilities or {},
    )
    sealed = await seal(credentials, account.context, LocalKeys.parse(KEY))
    async with ConnectorAccounts.connect(dsn) as accounts:
        await accounts.add(replace(account, sealed=sealed))
    return account.account_id


async def notifications_url(gateway: GatewayProcess, connector: str, account_id: str) -> str:
    """Where a PSP tells of an account's payments, once the gateway listens."""

    def taken() -> list[str]:
        marked = '"message":"notifications are taken"'
        return [line for line in list(gateway.lines) if marked in line]

    line, *_ = await eventually(taken, "notifications are taken")
    return f"http://127.0.0.1:{json.loads(line)['port']}/v1/notifications/{connector}/{account_id}"
