"""Adyen as a kind of connector: what an account needs, and the pools that accounts share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from gateway.application.connector_accounts import ConnectorAccount
from gateway.application.ports import CARD, Capabilities
from gateway.connectors.adyen.connector import (
    ANSWER_TIMEOUT_S,
    API_VERSION,
    NAME,
    AdyenConnector,
    widest,
)
from gateway.connectors.http import HttpClient
from gateway.connectors.kinds import AccountRefused, PooledKind, check_names, check_notified
from gateway.connectors.notifications import WEBHOOK_SECRETS, webhook_secrets
from gateway.domain.model import Mode, OperationKind

ADYEN_TEST_URL: Final = "https://checkout-test.adyen.com"
LIVE_HOST: Final = "-checkout-live.adyenpayments.com"
"""After the account's own prefix ("Live endpoints")."""

_API_KEY: Final = re.compile(r"[\x21-\x7e]{16,512}")
_MERCHANT_ACCOUNT: Final = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_LIVE_URL_PREFIX: Final = re.compile(r"[A-Za-z0-9]{4,32}-[A-Za-z0-9]{1,60}")
_HMAC_KEY: Final = re.compile(r"(?:[0-9A-Fa-f]{2}){16,128}")


class AdyenKind(PooledKind):
    """Implements the ConnectorKind port.

    Every live company account has an address of its own, and so a pool of its own. An account's
    usual capabilities leave out what has to be enabled for it: INCREMENT, and all but cards.
    """

    def __init__(
        self,
        connect: Callable[[str], HttpClient],
        *,
        test_url: str = ADYEN_TEST_URL,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`connect` opens the pool to an address, or raises ValueError; each is closed with the
        kind.
        """
        super().__init__(NAME, widest, usual, answer_timeout_s)
        self._connect = connect
        self._test_url = test_url

    def check(
        self, mode: Mode, credentials: Mapping[str, str], capabilities: Mapping[str, object]
    ) -> None:
        """See the port. `api_key` and `merchant_account` are needed, and for LIVE
        `live_url_prefix`: an API key does not tell its mode, the address does. `webhook_secrets`
        may be given.
        """
        needed = ["api_key", "merchant_account"]
        if mode is Mode.LIVE:
            needed.append("live_url_prefix")
        check_names(credentials, needed, (WEBHOOK_SECRETS,))
        for name, pattern in (
            ("api_key", _API_KEY),
            ("merchant_account", _MERCHANT_ACCOUNT),
            ("live_url_prefix", _LIVE_URL_PREFIX),
        ):
            if name in credentials and pattern.fullmatch(credentials[name]) is None:
                raise AccountRefused(f"`{name}` is none of Adyen's")
        secrets = webhook_secrets(credentials)
        if not all(map(_HMAC_KEY.fullmatch, secrets)):
            raise AccountRefused(f"`{WEBHOOK_SECRETS}` are HMAC keys in hexadecimal digits")
        check_notified(self._capabilities(mode, capabilities), is_notified=bool(secrets))

    def connect(self, account: ConnectorAccount, credentials: Mapping[str, str]) -> AdyenConnector:
        """See the port."""
        self.check(account.mode, credentials, account.capabilities)
        url, base_path = self._test_url, f"/{API_VERSION}"
        if account.mode is Mode.LIVE:
            url = f"https://{credentials['live_url_prefix']}{LIVE_HOST}"
            base_path = f"/checkout/{API_VERSION}"
        if url not in self._pools:
            try:
                self._pools[url] = self._connect(url)
            except ValueError as error:
                raise AccountRefused(f"there is no way to {url}: {error}") from error
        return AdyenConnector(
            self._pools[url],
            credentials["api_key"],
            credentials["merchant_account"],
            self._capabilities(account.mode, account.capabilities),
            base_path=base_path,
        )


def usual(most: Capabilities) -> Capabilities:
    """What an account can do of which nothing else is known."""
    return replace(
        most,
        operations=most.operations - {OperationKind.INCREMENT},
        methods={CARD: most.methods[CARD]},
    )
