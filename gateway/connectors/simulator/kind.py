"""Simulators as accounts of a merchant: several PSPs to route between, without a PSP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import orjson

from gateway.application.connector_accounts import ConnectorAccount
from gateway.application.ports import Capabilities
from gateway.connectors.http import Limits
from gateway.connectors.kinds import AccountRefused, check_names, narrowed
from gateway.connectors.notifications import WEBHOOK_SECRETS, webhook_secrets
from gateway.connectors.simulator.connector import ANSWER_TIMEOUT_S, SimulatorConnector
from gateway.connectors.simulator.profiles import UnknownProfile, find_profile
from gateway.domain.model import Mode

NAME: Final = "simulator"


class SimulatorKind:
    """Implements the ConnectorKind port. TEST accounts only.

    Credentials: `url`, `http://host:port` of a simulator; `profile`, the one that it runs, by
    default `idempotent`; `token`, which is sent in the place of every payment's own, so that two
    accounts can answer differently to the same payment; `webhook_secrets`, which its notifications
    are signed with.
    """

    def __init__(
        self, limits: Limits | None = None, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self._limits = limits
        self._answer_timeout_s = answer_timeout_s
        self._connectors: dict[tuple[bytes, bytes], SimulatorConnector] = {}

    @property
    def name(self) -> str:
        """The connector's name."""
        return NAME

    @property
    def widest(self) -> Capabilities:
        """The most that an account can do."""
        return self._connected({"url": "http://127.0.0.1"}, {}).capabilities

    def described(self, mode: Mode, capabilities: Mapping[str, object]) -> Capabilities:
        """See the port."""
        return replace(narrowed(self.widest, self.widest, capabilities), mode=mode)

    def check(
        self, mode: Mode, credentials: Mapping[str, str], capabilities: Mapping[str, object]
    ) -> None:
        """See the port."""
        if mode is not Mode.TEST:
            raise AccountRefused("a simulator moves no money: its accounts are of the mode test")
        check_names(credentials, ("url",), ("profile", "token", WEBHOOK_SECRETS))
        webhook_secrets(credentials)
        self._connected(credentials, capabilities)

    def connect(
        self, account: ConnectorAccount, credentials: Mapping[str, str]
    ) -> SimulatorConnector:
        """See the port."""
        self.check(account.mode, credentials, account.capabilities)
        return self._connected(credentials, account.capabilities)

    async def close(self) -> None:
        """Close the connections."""
        for connector in self._connectors.values():
            await connector.close()

    def _connected(
        self, credentials: Mapping[str, str], told: Mapping[str, object]
    ) -> SimulatorConnector:
        """One for all accounts that are set up alike; it connects with its first use."""
        own = {name: each for name, each in credentials.items() if name != WEBHOOK_SECRETS}
        key = (orjson.dumps(own), orjson.dumps(dict(told)))
        connector = self._connectors.get(key)
        if connector is None:
            try:
                connector = SimulatorConnector(
                    credentials["url"],
                    find_profile(credentials.get("profile", "idempotent")),
                    answer_timeout_s=self._answer_timeout_s,
                    limits=self._limits,
                    token=credentials.get("token", ""),
                    told=told,
                )
            except (UnknownProfile, ValueError) as error:
                raise AccountRefused(str(error)) from None
            self._connectors[key] = connector
        return connector
