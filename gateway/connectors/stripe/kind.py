"""Stripe as a kind of connector: what an account needs, and the pool that all accounts share."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gateway.application.connector_accounts import ConnectorAccount
from gateway.application.ports import CARD, Capabilities
from gateway.connectors.http import HttpClient
from gateway.connectors.kinds import AccountRefused, PooledKind, check_names
from gateway.connectors.notifications import WEBHOOK_SECRETS, webhook_secrets
from gateway.connectors.stripe.connector import ANSWER_TIMEOUT_S, NAME, StripeConnector, widest
from gateway.domain.model import CaptureMethod, Mode, OperationKind

STRIPE_URL: Final = "https://api.stripe.com"

_SECRET_KEYS: Final = {
    Mode.TEST: re.compile(r"(?:sk|rk)_test_[A-Za-z0-9_]{8,247}"),
    Mode.LIVE: re.compile(r"(?:sk|rk)_live_[A-Za-z0-9_]{8,247}"),
}
_STRIPE_ACCOUNT: Final = re.compile(r"acct_[A-Za-z0-9]{1,64}")


class StripeKind(PooledKind):
    """Implements the ConnectorKind port.

    An account's usual capabilities leave out what has to be enabled for it at Stripe: several
    captures (`MANUAL_MULTIPLE`), INCREMENT, and every method but cards.
    """

    def __init__(
        self, http: HttpClient, *, url: str = STRIPE_URL, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        """`http` is closed with the kind; `url` is where it leads to."""
        super().__init__(NAME, widest, usual, answer_timeout_s)
        self._url = url.rstrip("/")
        self._pools[self._url] = http

    def check(
        self, mode: Mode, credentials: Mapping[str, str], capabilities: Mapping[str, object]
    ) -> None:
        """See the port. `secret_key` is needed, of the mode; `stripe_account` and the secrets that
        notifications are signed with may be given.
        """
        check_names(credentials, ("secret_key",), ("stripe_account", WEBHOOK_SECRETS))
        if _SECRET_KEYS[mode].fullmatch(credentials["secret_key"]) is None:
            raise AccountRefused(
                f"`secret_key` is no secret or restricted key of Stripe's {mode.name.lower()} mode"
            )
        stripe_account = credentials.get("stripe_account", "")
        if stripe_account and _STRIPE_ACCOUNT.fullmatch(stripe_account) is None:
            raise AccountRefused("`stripe_account` is no id of a connected account, acct_…")
        webhook_secrets(credentials)
        if mode is Mode.LIVE and self._url != STRIPE_URL:
            raise AccountRefused(f"live credentials go to {STRIPE_URL} alone")
        self._capabilities(mode, capabilities)

    def connect(self, account: ConnectorAccount, credentials: Mapping[str, str]) -> StripeConnector:
        """See the port."""
        self.check(account.mode, credentials, account.capabilities)
        return StripeConnector(
            self._pools[self._url],
            credentials["secret_key"],
            self._capabilities(account.mode, account.capabilities),
            stripe_account=credentials.get("stripe_account", ""),
        )


def usual(most: Capabilities) -> Capabilities:
    """What an account can do of which nothing else is known."""
    return replace(
        most,
        operations=most.operations - {OperationKind.INCREMENT},
        capture_methods=most.capture_methods - {CaptureMethod.MANUAL_MULTIPLE},
        methods={CARD: most.methods[CARD]},
    )
