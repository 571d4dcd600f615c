"""The kinds of PSP that merchants can have accounts at, and what an account may set."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from enum import IntEnum
from typing import Final, Protocol, TypeVar

from gateway.application.connector_accounts import ConnectorAccount
from gateway.application.ports import AmountRule, Capabilities, Connector
from gateway.connectors.http import HttpClient
from gateway.domain.model import Mode

_E = TypeVar("_E", bound=IntEnum)

CAPABILITY_KEYS: Final = ("operations", "capture_methods", "currencies", "methods")


class AccountRefused(ValueError):
    """An account cannot be used as it is set up; the text says why and holds no credential."""


class ConnectorKind(Protocol):
    """What all accounts at one PSP share: how they are checked, and the pool of connections."""

    @property
    def name(self) -> str:
        """The connector's name, as `stripe`."""

    @property
    def widest(self) -> Capabilities:
        """The most that an account can do."""

    def described(self, mode: Mode, capabilities: Mapping[str, object]) -> Capabilities:
        """What an account can do, as far as that is known without its credentials. Raises
        AccountRefused.
        """

    def check(
        self, mode: Mode, credentials: Mapping[str, str], capabilities: Mapping[str, object]
    ) -> None:
        """Raises AccountRefused, for credentials of the other mode too. Asks nobody."""

    def connect(self, account: ConnectorAccount, credentials: Mapping[str, str]) -> Connector:
        """The connector of an account, over the kind's connections. Raises AccountRefused."""

    async def close(self) -> None:
        """Close the connections."""


class PooledKind:
    """Implements ConnectorKind but for what is the PSP's own: accounts share pools of HTTP."""

    def __init__(
        self,
        name: str,
        widest: Callable[[Mode, float], Capabilities],
        usual: Callable[[Capabilities], Capabilities],
        answer_timeout_s: float,
    ) -> None:
        """`widest` is the most that an account of a mode can do, with an answer's time in seconds;
        `usual` what one can do of that of which nothing else is known.
        """
        self._name = name
        self._widest = widest
        self._usual = usual
        self._answer_timeout_s = answer_timeout_s
        self._pools: dict[str, HttpClient] = {}
        """By address; closed with the kind."""

    @property
    def name(self) -> str:
        """The connector's name."""
        return self._name

    @property
    def widest(self) -> Capabilities:
        """The most that an account can do."""
        return self._widest(Mode.TEST, self._answer_timeout_s)

    def described(self, mode: Mode, capabilities: Mapping[str, object]) -> Capabilities:
        """See the port."""
        return self._capabilities(mode, capabilities)

    async def close(self) -> None:
        """Close the connections."""
        for pool in self._pools.values():
            await pool.close()

    def _capabilities(
        self,
        mode: Mode,
        told: Mapping[str, object],
        amounts: Mapping[str, AmountRule] | None = None,
    ) -> Capabilities:
        """An account's own; `amounts`, where they are given, are all that it takes. Raises
        AccountRefused.
        """
        most = self._widest(mode, self._answer_timeout_s)
        if amounts is not None:
            most = replace(most, amounts=amounts)
        return narrowed(self._usual(most), most, told)


def check_names(
    credentials: Mapping[str, str], needed: Sequence[str], optional: Sequence[str]
) -> None:
    """Raises AccountRefused where a credential is missing, or there is one too many."""
    if not set(needed) <= credentials.keys() <= {*needed, *optional}:
        raise AccountRefused(
            f"the credentials must be {_listed(needed)}, and may be {_listed(optional)}"
        )


def _listed(names: Sequence[str]) -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def narrowed(usual: Capabilities, widest: Capabilities, told: Mapping[str, object]) -> Capabilities:
    """An account's capabilities: the connector's usual ones, but for what the account tells.

    `told` may hold `operations` and `capture_methods`, lists of the contract's names, `currencies`,
    a list of codes, and `methods`, a list of payment methods; none may go beyond `widest`. Raises
    AccountRefused.
    """
    unknown = sorted(set(told) - set(CAPABILITY_KEYS))
    if unknown:
        raise AccountRefused(
            f"there is no capability {unknown[0]!r}; there are {', '.join(CAPABILITY_KEYS)}"
        )
    changed = usual
    if "operations" in told:
        changed = replace(changed, operations=_members("operations", told, widest.operations))
    if "capture_methods" in told:
        captures = _members("capture_methods", told, widest.capture_methods)
        changed = replace(changed, capture_methods=captures)
    if "currencies" in told:
        codes = _names("currencies", told)
        amounts = widest.amounts or {}
        beyond = [code for code in codes if code not in amounts]
        if beyond:
            raise AccountRefused(f"the connector does not take the currency {beyond[0]!r}")
        changed = replace(changed, amounts={code: amounts[code] for code in codes})
    if "methods" in told:
        methods = _names("methods", told)
        beyond = [name for name in methods if name not in widest.methods]
        if beyond:
            raise AccountRefused(
                f"the connector has no payment method {beyond[0]!r}: "
                f"{', '.join(sorted(widest.methods))}"
            )
        changed = replace(changed, methods={name: widest.methods[name] for name in methods})
    return changed


def check_notified(capabilities: Capabilities, *, is_notified: bool) -> None:
    """Raises AccountRefused where the account has a method whose end it would never be told."""
    for name, rule in capabilities.methods.items():
        if rule.needs_notifications and not is_notified:
            raise AccountRefused(
                f"the end of {name} is told by notification alone: `webhook_secrets` are needed"
            )


def _names(key: str, told: Mapping[str, object]) -> Sequence[str]:
    value = told[key]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AccountRefused(f"the capability {key!r} must be a list of names")
    if not value:
        raise AccountRefused(f"the capability {key!r} is empty: leave it out for the usual")
    return value


def _members(key: str, told: Mapping[str, object], widest: AbstractSet[_E]) -> frozenset[_E]:
    names = {member.name: member for member in widest}
    unknown = [name for name in _names(key, told) if name not in names]
    if unknown:
        raise AccountRefused(
            f"the connector has no {unknown[0]!r} among its {key}: {', '.join(sorted(names))}"
        )
    return frozenset(names[name] for name in _names(key, told))
