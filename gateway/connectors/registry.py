"""Which connector serves whom. One connector for each mode until there is routing."""

from collections.abc import Sequence

from gateway.application.ports import Connector, Route
from gateway.domain.model import Mode


class ConnectorRegistry:
    """The connectors of this process, by name and by mode. Implements the Router port."""

    def __init__(self, connectors: Sequence[Connector]) -> None:
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
        """The connector of the mode, with the merchant's id as its account there."""
        connector = self._by_mode.get(mode)
        return None if connector is None else Route(connector, merchant_id)

    def connector(self, name: str) -> Connector | None:
        """The connector of this name, where this process has it."""
        return self._by_name.get(name)

    async def close(self) -> None:
        """Close the connectors' connections."""
        for connector in self._by_name.values():
            await connector.close()
