"""The accounts of all merchants in memory, each with its connector; read anew in the background."""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from gateway.application.connector_accounts import (
    AccountSource,
    ConnectorAccount,
    KeyService,
    KeyServiceError,
)
from gateway.application.notifications import LookupUnavailable
from gateway.application.ports import Connector, Route, Served
from gateway.application.refreshing import refresh_forever
from gateway.connectors.kinds import AccountRefused, ConnectorKind
from gateway.connectors.notifications import NotificationSource, ReferenceTeller
from gateway.connectors.sealing import SealBroken, unseal
from gateway.domain.model import Mode

_log = logging.getLogger(__name__)


class NotifiedAccount(NamedTuple):
    """What it takes to believe a notification."""

    merchant_id: str
    account_id: str
    connector: str
    mode: Mode
    secrets: Sequence[str]
    """What its notifications may be signed with; empty where it takes none."""


class _Opened(NamedTuple):
    """What an account's credentials gave."""

    connector: Connector
    teller: ReferenceTeller | None
    secrets: Sequence[str]


class _Entry(NamedTuple):
    account: ConnectorAccount
    opened: _Opened | None
    """None where the account cannot be used, as one whose credentials cannot be opened."""

    @property
    def connector(self) -> Connector | None:
        return None if self.opened is None else self.opened.connector


def _served(entry: _Entry) -> Served:
    account = entry.account
    return Served(
        account.account_id, account.connector, account.priority, account.enabled, entry.connector
    )


class AccountBook:
    """Which account serves a merchant, and the connector of each account.

    An account that cannot be used is warned of once for each of its versions, and serves nobody:
    no other one, and no simulator, stands in for it unless it is enabled too.
    """

    def __init__(
        self,
        source: AccountSource,
        kinds: Sequence[ConnectorKind],
        keys: KeyService | None,
        around: Callable[[Connector], Connector] | None = None,
        notified: Sequence[NotificationSource] = (),
    ) -> None:
        """`around` puts something around each account's connector, as a trace. `notified` are those
        whose notifications are taken.
        """
        self._notified = {source.connector: source for source in notified}
        self._source = source
        self._kinds = {kind.name: kind for kind in kinds}
        self._keys = keys
        self._around = around
        self._entries: dict[str, _Entry] = {}
        self._of_merchant: dict[tuple[str, Mode], list[str]] = {}
        self._routes: dict[tuple[str, Mode], Route] = {}
        self._served: dict[tuple[str, Mode], Mapping[str, Served]] = {}
        self._latest: datetime | None = None
        self._unopened: dict[str, ConnectorAccount] = {}
        """Those that no wrapping key opened: a key service may be away for a while."""

    def has(self, merchant_id: str, mode: Mode) -> bool:
        """Whether the merchant has an account of the mode, an enabled one or not."""
        return (merchant_id, mode) in self._of_merchant

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        """To the enabled account of the lowest priority number."""
        return self._routes.get((merchant_id, mode))

    def served(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """All accounts of the merchant and mode, the lowest priority number first."""
        return self._served.get((merchant_id, mode), {})

    def connector(self, account_id: str) -> Connector | None:
        """The connector of an account, with its present credentials; a disabled one's too."""
        entry = self._entries.get(account_id)
        return None if entry is None else entry.connector

    def notified(self, account_id: str) -> NotifiedAccount | None:
        """What believes an account's notifications; a disabled one's too."""
        entry = self._entries.get(account_id)
        if entry is None or entry.opened is None:
            return None
        account = entry.account
        return NotifiedAccount(
            account.merchant_id,
            account_id,
            account.connector,
            account.mode,
            entry.opened.secrets,
        )

    async def reference_of(
        self, connector_account_id: str, connector_transaction_id: str
    ) -> str | None:
        """See gateway.application.notifications.ReferenceLookup."""
        entry = self._entries.get(connector_account_id)
        if entry is None or entry.opened is None:
            raise LookupUnavailable("the account cannot be used")
        teller = entry.opened.teller
        return None if teller is None else await teller.reference_of(connector_transaction_id)

    async def run(self, interval_s: float) -> None:
        """Read what has changed, again and again, until cancelled."""
        await refresh_forever("the connector accounts", self.refresh, interval_s)

    async def refresh(self) -> None:
        """Read what has changed. Raises StoreUnavailable."""
        for account in await self._source.changed_since(self._latest):
            if account.updated_at is not None:
                self._latest = max(account.updated_at, self._latest or account.updated_at)
            await self._take(account)
        for account in list(self._unopened.values()):
            await self._take(account)

    async def close(self) -> None:
        """Close the connections of all kinds."""
        for kind in self._kinds.values():
            await kind.close()

    async def _take(self, account: ConnectorAccount) -> None:
        known = self._entries.get(account.account_id)
        retried = self._unopened.get(account.account_id) is account
        if known is not None and known.account.version >= account.version and not retried:
            return
        if not account.removed:
            opened = await self._open(account, warned=retried)
            self._entries[account.account_id] = _Entry(account, opened)
        elif known is not None:
            del self._entries[account.account_id]
            self._unopened.pop(account.account_id, None)
        self._route_anew(account)

    async def _open(self, account: ConnectorAccount, *, warned: bool) -> _Opened | None:
        self._unopened.pop(account.account_id, None)
        try:
            kind = self._kinds.get(account.connector)
            if kind is None:
                raise AccountRefused(f"there is no connector {account.connector!r} here")
            if self._keys is None:
                raise KeyServiceError("no wrapping keys are set")
            credentials: Mapping[str, str] = await unseal(
                account.sealed, account.context, self._keys
            )
            connector = kind.connect(account, credentials)
            source = self._notified.get(account.connector)
            return _Opened(
                connector if self._around is None else self._around(connector),
                connector if isinstance(connector, ReferenceTeller) else None,
                () if source is None else tuple(source.secrets(credentials)),
            )
        except (AccountRefused, KeyServiceError, SealBroken) as error:
            if isinstance(error, KeyServiceError):
                self._unopened[account.account_id] = account
            if warned:
                return None
            _log.warning(
                "a connector account cannot be used: %s",
                error,
                extra={
                    "merchant_id": account.merchant_id,
                    "connector": account.connector,
                    "connector_account_id": account.account_id,
                },
            )
            return None

    def _route_anew(self, account: ConnectorAccount) -> None:
        """Choose again among the accounts of the merchant and mode of one that changed."""
        key = account.merchant_id, account.mode
        ids = {*self._of_merchant.get(key, ()), account.account_id} & self._entries.keys()
        self._routes.pop(key, None)
        self._served.pop(key, None)
        if not ids:
            self._of_merchant.pop(key, None)
            return
        ordered = sorted(ids, key=lambda each: (self._entries[each].account.priority, each))
        self._of_merchant[key] = ordered
        self._served[key] = {each: _served(self._entries[each]) for each in ordered}
        for account_id in ordered:
            entry = self._entries[account_id]
            if entry.account.enabled and entry.connector is not None:
                self._routes[key] = Route(entry.connector, account_id)
                return
