"""What an account at Braintree needs, and what is refused without being shown."""

from collections.abc import Mapping

import pytest

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.connectors.braintree.kind import BRAINTREE_URL, SANDBOX_URL, BraintreeKind
from gateway.connectors.http import HttpClient
from gateway.connectors.kinds import AccountRefused
from gateway.domain.model import CaptureMethod, Mode, OperationKind

SECRET = "privatekey0123456789"
GOOD = {
    "public_key": "publickey12345",
    "private_key": SECRET,
    "merchant_accounts": "EUR=shop_eur KWD=shop-kwd",
}


@pytest.fixture
def opened() -> list[str]:
    """The addresses that were asked for."""
    return []


@pytest.fixture
def kind(opened: list[str]) -> BraintreeKind:
    def connect(url: str) -> HttpClient:
        opened.append(url)
        return HttpClient(url)

    return BraintreeKind(connect)


def account(mode: Mode, capabilities: Mapping[str, object] | None = None) -> ConnectorAccount:
    sealed = Sealed(b"", WrappedKey("", b""))
    return ConnectorAccount(
        "mer_1", "acc_1", mode, "braintree", sealed, capabilities=capabilities or {}
    )


def test_each_mode_has_its_own_address(kind: BraintreeKind, opened: list[str]) -> None:
    assert opened == [BRAINTREE_URL, SANDBOX_URL]
    for mode in Mode:
        assert kind.connect(account(mode), GOOD).capabilities.mode is mode


def test_account_takes_the_currencies_of_its_merchant_accounts(kind: BraintreeKind) -> None:
    capabilities = kind.connect(account(Mode.TEST), GOOD).capabilities
    assert set(capabilities.amounts or {}) == {"EUR", "KWD"}
    assert CaptureMethod.MANUAL_MULTIPLE not in capabilities.capture_methods
    told = {"capture_methods": ["MANUAL", "MANUAL_MULTIPLE"], "currencies": ["EUR"]}
    capabilities = kind.connect(account(Mode.TEST, told), GOOD).capabilities
    assert CaptureMethod.MANUAL_MULTIPLE in capabilities.capture_methods
    assert set(capabilities.amounts or {}) == {"EUR"}
    assert OperationKind.INCREMENT not in capabilities.operations


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"public_key": None}, "must be `public_key`"),
        ({"merchant_accounts": None}, "must be `public_key`"),
        ({"merchant_id": "shop"}, "must be `public_key`"),
        ({"public_key": "a|b&c|d e"}, "`public_key` is no API key"),
        ({"private_key": "x\r\nHost: elsewhere"}, "`private_key` is no API key"),
        ({"merchant_accounts": ""}, "names none"),
        ({"merchant_accounts": "shop_eur"}, "one for each currency"),
        ({"merchant_accounts": "EUR=a EUR=b"}, "one for each currency"),
        ({"merchant_accounts": "CLF=a"}, "one for each currency"),
        ({"merchant_accounts": "XXX=a"}, "one for each currency"),
        ({"webhook_secrets": "publickey12345privatekey01234"}, "pair of API keys"),
    ],
)
def test_credentials_that_are_none_are_refused_without_being_shown(
    kind: BraintreeKind, changed: Mapping[str, str | None], message: str
) -> None:
    credentials = {name: value for name, value in {**GOOD, **changed}.items() if value is not None}
    with pytest.raises(AccountRefused, match=message) as caught:
        kind.check(Mode.TEST, credentials, {})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "told",
    [{"operations": ["INCREMENT"]}, {"currencies": ["USD"]}, {"capture_methods": ["LATER"]}],
)
def test_capabilities_beyond_the_accounts_are_refused(
    kind: BraintreeKind, told: Mapping[str, object]
) -> None:
    with pytest.raises(AccountRefused):
        kind.check(Mode.TEST, GOOD, told)
