"""Which connector serves whom: a merchant's own account, or the connector of the mode."""

from collections.abc import Mapping, Sequence

from gateway.application.connector_accounts import PRIORITY_DEFAULT
from gateway.application.ports import Connector, Route, Served
from gateway.connectors.accounts import AccountBook
from gateway.domain.ids import is_account_id
from gateway.domain.model import Mode


class ConnectorRegistry:
    """The connectors of this process. Implements the Router port.

    A merchant with accounts of a mode is served by them alone; the connectors given here (the
    simulator, for TEST) serve those who have none.
    """

    def __init__(
        self, connectors: Sequence[Connector], accounts: AccountBook | None = None
    ) -> None:
        self._accounts = accounts
        self._by_name = {connector.name: connector for connector in connectors}
        if len(self._by_name) != len(connectors):
            raise ValueError("two connectors have the same name")
        self._by_mode: dict[Mode, Connector] = {}
        for connector in connectors:
            mode = connector.capabilities.mode
            if mode in self._by_mode:
                raise ValueError(f"two connectors serve the mode {mode.name}")
            self._by_mode[mode] = connector

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        """To the merchant's enabled account of the lowest priority number; without accounts of
        the mode, to the connector of the mode, with the merchant's id as its account there.
        """
        if self._accounts is not None and self._accounts.has(merchant_id, mode):
            return self._accounts.route(merchant_id, mode)
        connector = self._by_mode.get(mode)
        return None if connector is None else Route(connector, merchant_id)

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """The merchant's accounts of the mode; without any, the connector of the mode."""
        if self._accounts is not None and self._accounts.has(merchant_id, mode):
            return self._accounts.served(merchant_id, mode)
        connector = self._by_mode.get(mode)
        if connector is None:
            return {}
        served = Served(merchant_id, connector.name, PRIORITY_DEFAULT, True, connector)
        return {merchant_id: served}

    def connector(self, name: str, connector_account_id: str) -> Connector | None:
        """The connector of this name and account, where this process has it."""
        if self._accounts is not None:
            connector = self._accounts.connector(connector_account_id)
            if connector is not None:
                return connector if connector.name == name else None
        # An account that has gone is not another PSP of the same name.
        return None if is_account_id(connector_account_id) else self._by_name.get(name)

    async def close(self) -> None:
        """Close the connectors' connections."""
        for connector in self._by_name.values():
            await connector.close()
