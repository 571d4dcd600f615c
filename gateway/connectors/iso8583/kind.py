"""Acquirers' hosts as a kind of connector: what an account needs, and what accounts share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from gateway.application.connector_accounts import ConnectorAccount
from gateway.application.notifications import Notification, Received
from gateway.application.ports import Capabilities
from gateway.connectors.iso8583.connector import NAME, Iso8583Connector, capabilities_of
from gateway.connectors.iso8583.host import AcquirerHost, HostAddress, HostLimits
from gateway.connectors.iso8583.specification import load_specification
from gateway.connectors.kinds import AccountRefused, check_names, narrowed
from gateway.domain.model import Mode

_HOST_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TERMINAL: Final = re.compile(r"[0-9A-Za-z]{1,8}")
_MERCHANT: Final = re.compile(r"[0-9A-Za-z]{1,15}")
_ACQUIRER: Final = re.compile(r"[0-9]{1,11}")


def open_hosts(
    text: str,
    limits: HostLimits | None = None,
    *,
    ca_file: str = "",
    count_event: Callable[[str, str], None] | None = None,
) -> dict[str, AcquirerHost]:
    """The hosts of `NAME=ADDRESS`, separated by commas. Connects to nothing yet.

    `count_event` gets the name of a host and of an event. Raises ValueError for what cannot be
    used, and OSError for an unusable CA file.
    """
    hosts: dict[str, AcquirerHost] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, url = entry.partition("=")
        if _HOST_NAME.fullmatch(name) is None or name in hosts:
            raise ValueError(f"{name!r} names no host, or a second one")
        address = HostAddress.parse(url)
        specification = load_specification(address.specification)
        count = None if count_event is None else partial(count_event, name)
        hosts[name] = AcquirerHost(address, specification, limits, ca_file=ca_file, count=count)
    return hosts


class Iso8583Kind:
    """Implements the ConnectorKind port.

    An account is a terminal at one of the hosts that the settings name; it can do what the host's
    specification has messages for.
    """

    def __init__(
        self, hosts: Mapping[str, AcquirerHost], tell: Callable[[Received], None] | None = None
    ) -> None:
        """`hosts` by name; they are closed with the kind. `tell` keeps answers that come too
        late.
        """
        self._hosts = dict(hosts)
        self._tell = tell

    @property
    def name(self) -> str:
        """The connector's name."""
        return NAME

    @property
    def widest(self) -> Capabilities:
        """The most that an account can do."""
        return widest()

    def described(self, mode: Mode, capabilities: Mapping[str, object]) -> Capabilities:
        """See the port: which host it is at, the credentials tell."""
        most = replace(self.widest, mode=mode)
        return narrowed(most, most, capabilities)

    def check(
        self, mode: Mode, credentials: Mapping[str, str], capabilities: Mapping[str, object]
    ) -> None:
        """See the port. `host`, `terminal_id` (DE 41) and `merchant_id` (DE 42) are needed;
        `acquirer_id` (DE 32) may be given.
        """
        check_names(credentials, ("host", "terminal_id", "merchant_id"), ("acquirer_id",))
        for key, pattern, told in (
            ("terminal_id", _TERMINAL, "1 to 8 letters and digits"),
            ("merchant_id", _MERCHANT, "1 to 15 letters and digits"),
            ("acquirer_id", _ACQUIRER, "1 to 11 digits"),
        ):
            if key in credentials and pattern.fullmatch(credentials[key]) is None:
                raise AccountRefused(f"`{key}` must be {told}")
        host = self._hosts.get(credentials["host"])
        if host is None:
            known = ", ".join(self._hosts) or "none"
            raise AccountRefused(f"`host` must be a host of the settings: {known}")
        if host.address.mode is not mode:
            raise AccountRefused(f"the host serves {host.address.mode.name.lower()} accounts")
        self._capabilities(host, mode, capabilities)

    def connect(
        self, account: ConnectorAccount, credentials: Mapping[str, str]
    ) -> Iso8583Connector:
        """See the port."""
        self.check(account.mode, credentials, account.capabilities)
        host, tell = self._hosts[credentials["host"]], self._tell

        def told(notification: Notification) -> None:
            if tell is not None:
                tell(Received(account.merchant_id, account.account_id, notification))

        return Iso8583Connector(
            host,
            self._capabilities(host, account.mode, account.capabilities),
            terminal=credentials["terminal_id"],
            merchant=credentials["merchant_id"],
            acquirer=credentials.get("acquirer_id", ""),
            tell=told,
        )

    async def close(self) -> None:
        """Sign off and close the connections."""
        for host in self._hosts.values():
            await host.close()

    def _capabilities(
        self, host: AcquirerHost, mode: Mode, told: Mapping[str, object]
    ) -> Capabilities:
        most = capabilities_of(host.specification, mode)
        return narrowed(most, most, told)


def widest() -> Capabilities:
    """The most that an account can do: what the specification `reference-text` has."""
    return capabilities_of(load_specification("reference-text"), Mode.TEST)
