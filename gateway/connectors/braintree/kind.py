"""Braintree as a kind of connector: what an account needs, and the pools that accounts share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from gateway.application.connector_accounts import ConnectorAccount
from gateway.application.ports import AmountRule, Capabilities
from gateway.connectors.braintree.amounts import RULES
from gateway.connectors.braintree.connector import (
    ANSWER_TIMEOUT_S,
    NAME,
    BraintreeConnector,
    widest,
)
from gateway.connectors.http import HttpClient
from gateway.connectors.kinds import AccountRefused, PooledKind, check_names
from gateway.connectors.notifications import WEBHOOK_SECRETS, webhook_secrets
from gateway.domain.model import CaptureMethod, Mode

BRAINTREE_URL: Final = "https://payments.braintree-api.com"
"""Where LIVE accounts are, and nowhere else."""
SANDBOX_URL: Final = "https://payments.sandbox.braintree-api.com"

_KEY: Final = re.compile(r"[A-Za-z0-9]{8,128}")
_PAIR: Final = re.compile(r"[A-Za-z0-9]{8,120}\|[A-Za-z0-9]{8,120}")
_MERCHANT_ACCOUNT: Final = re.compile(r"([A-Z]{3})=([A-Za-z0-9_-]{1,64})")


class BraintreeKind(PooledKind):
    """Implements the ConnectorKind port.

    The keys of Braintree do not tell their environment: each mode has an address of its own, where
    the keys of the other one are refused. An account takes the currencies of its merchant accounts.
    Its usual capabilities leave out several captures (`MANUAL_MULTIPLE`), which Braintree has for
    PayPal and Venmo alone.
    """

    def __init__(
        self,
        connect: Callable[[str], HttpClient],
        *,
        sandbox_url: str = SANDBOX_URL,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`connect` gives the pool to an address; each is closed with the kind."""
        super().__init__(NAME, widest, usual, answer_timeout_s)
        self._urls = {Mode.LIVE: BRAINTREE_URL, Mode.TEST: sandbox_url}
        self._pools = {url: connect(url) for url in dict.fromkeys(self._urls.values())}

    def check(
        self, mode: Mode, credentials: Mapping[str, str], capabilities: Mapping[str, object]
    ) -> None:
        """See the port. `public_key`, `private_key` and `merchant_accounts` are needed, the last as
        `EUR=shop_eur USD=shop_usd`; `webhook_secrets` may be given.
        """
        check_names(
            credentials, ("public_key", "private_key", "merchant_accounts"), (WEBHOOK_SECRETS,)
        )
        for name in ("public_key", "private_key"):
            if _KEY.fullmatch(credentials[name]) is None:
                raise AccountRefused(f"`{name}` is no API key of Braintree")
        if not all(_PAIR.fullmatch(each) for each in webhook_secrets(credentials)):
            raise AccountRefused(
                f"each of `{WEBHOOK_SECRETS}` is a pair of API keys, `public_key|private_key`"
            )
        self._capabilities(mode, capabilities, _amounts(_merchant_accounts(credentials)))

    def connect(
        self, account: ConnectorAccount, credentials: Mapping[str, str]
    ) -> BraintreeConnector:
        """See the port."""
        self.check(account.mode, credentials, account.capabilities)
        merchant_accounts = _merchant_accounts(credentials)
        return BraintreeConnector(
            self._pools[self._urls[account.mode]],
            credentials["public_key"],
            credentials["private_key"],
            merchant_accounts,
            self._capabilities(account.mode, account.capabilities, _amounts(merchant_accounts)),
        )


def usual(most: Capabilities) -> Capabilities:
    """What an account can do of which nothing else is known."""
    return replace(most, capture_methods=most.capture_methods - {CaptureMethod.MANUAL_MULTIPLE})


def _amounts(merchant_accounts: Mapping[str, str]) -> dict[str, AmountRule]:
    return {code: RULES[code] for code in merchant_accounts}


def _merchant_accounts(credentials: Mapping[str, str]) -> dict[str, str]:
    """The ids of merchant accounts by currency. Raises AccountRefused."""
    found: dict[str, str] = {}
    for each in credentials["merchant_accounts"].split():
        match = _MERCHANT_ACCOUNT.fullmatch(each)
        if match is None or match[1] not in RULES or match[1] in found:
            raise AccountRefused(
                "`merchant_accounts` are one for each currency, as `EUR=shop_eur USD=shop_usd`"
            )
        found[match[1]] = match[2]
    if not found:
        raise AccountRefused("`merchant_accounts` names none")
    return found
