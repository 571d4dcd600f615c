"""What an account at Adyen needs, and where it is served."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.connectors.adyen.kind import ADYEN_TEST_URL, AdyenKind
from gateway.connectors.http import HttpClient
from gateway.connectors.kinds import AccountRefused
from gateway.domain.model import CaptureMethod, Mode, OperationKind

API_KEY = "AQEtestKEYtestKEYtestKEY"
TEST = {"api_key": API_KEY, "merchant_account": "TestCompanyECOM"}
LIVE = {**TEST, "live_url_prefix": "1797a841fbb37ca7-AdyenDemo"}
HMAC_KEY = "AB" * 32


class Pools:
    """Opens pools, and remembers where to."""

    def __init__(self, *, broken: bool = False) -> None:
        self.urls: list[str] = []
        self._broken = broken

    def __call__(self, url: str) -> HttpClient:
        if self._broken:
            raise ValueError("the CA file is away")
        self.urls.append(url)
        return HttpClient(url)


def account(mode: Mode, **capabilities: object) -> ConnectorAccount:
    sealed = Sealed(b"", WrappedKey("", b""))
    return ConnectorAccount("mer_1", "acc_1", mode, "adyen", sealed, capabilities=capabilities)


async def test_each_live_prefix_has_an_address_and_a_pool_of_its_own() -> None:
    pools = Pools()
    kind = AdyenKind(pools)
    assert pools.urls == []
    live = kind.connect(account(Mode.LIVE), LIVE)
    for _ in range(2):
        kind.connect(account(Mode.LIVE), LIVE)
        kind.connect(account(Mode.TEST), TEST)
        kind.connect(account(Mode.LIVE), {**LIVE, "live_url_prefix": "0123-Other"})
    assert pools.urls == [
        "https://1797a841fbb37ca7-AdyenDemo-checkout-live.adyenpayments.com",
        ADYEN_TEST_URL,
        "https://0123-Other-checkout-live.adyenpayments.com",
    ]
    assert live.capabilities.mode is Mode.LIVE
    await kind.close()


async def test_address_that_cannot_be_reached_refuses_the_account() -> None:
    with pytest.raises(AccountRefused, match="the CA file is away"):
        AdyenKind(Pools(broken=True)).connect(account(Mode.TEST), TEST)


@pytest.mark.parametrize(
    ("mode", "credentials"),
    [
        (Mode.TEST, {}),
        (Mode.TEST, {"api_key": API_KEY}),
        (Mode.TEST, {**TEST, "api_key": "short"}),
        (Mode.TEST, {**TEST, "api_key": API_KEY + "\r\nX: y"}),
        (Mode.TEST, {**TEST, "merchant_account": "a/b"}),
        (Mode.TEST, {**TEST, "colour": "blue"}),
        # An API key does not tell its mode: what names the live address is for LIVE alone.
        (Mode.TEST, LIVE),
        (Mode.LIVE, TEST),
        (Mode.LIVE, {**LIVE, "live_url_prefix": "evil.example/x"}),
        (Mode.LIVE, {**LIVE, "live_url_prefix": "no-prefix.example"}),
        (Mode.TEST, {**TEST, "webhook_secrets": "not hexadecimal, but long enough"}),
        (Mode.TEST, {**TEST, "webhook_secrets": "ABC" * 11}),
        (Mode.TEST, {**TEST, "webhook_secrets": " ".join([HMAC_KEY] * 5)}),
    ],
)
async def test_credentials_that_are_none_are_refused_without_being_shown(
    mode: Mode, credentials: Mapping[str, str]
) -> None:
    with pytest.raises(AccountRefused) as caught:
        AdyenKind(Pools()).check(mode, credentials, {})
    assert API_KEY not in str(caught.value)


async def test_webhook_secrets_may_be_given_and_be_two() -> None:
    kind = AdyenKind(Pools())
    kind.check(Mode.TEST, {**TEST, "webhook_secrets": f"{HMAC_KEY} {HMAC_KEY.lower()}"}, {})
    kind.check(Mode.LIVE, {**LIVE, "webhook_secrets": HMAC_KEY}, {})


async def test_method_that_ends_by_notification_alone_is_for_accounts_that_take_them() -> None:
    kind = AdyenKind(Pools())
    told = {"methods": ["card", "ideal"]}
    with pytest.raises(AccountRefused, match="ideal is told by notification alone"):
        kind.check(Mode.TEST, TEST, told)
    kind.check(Mode.TEST, {**TEST, "webhook_secrets": HMAC_KEY}, told)
    kind.check(Mode.TEST, TEST, {"methods": ["card"]})


async def test_increments_are_for_accounts_that_have_them_and_several_captures_for_none() -> None:
    kind = AdyenKind(Pools())
    usual = kind.connect(account(Mode.TEST), TEST).capabilities
    assert OperationKind.INCREMENT not in usual.operations
    assert CaptureMethod.MANUAL_MULTIPLE not in usual.capture_methods
    named = account(Mode.TEST, operations=["AUTHORIZE", "CAPTURE", "INCREMENT"])
    assert OperationKind.INCREMENT in kind.connect(named, TEST).capabilities.operations
    with pytest.raises(AccountRefused, match="MANUAL_MULTIPLE"):
        kind.check(Mode.TEST, TEST, {"capture_methods": ["MANUAL_MULTIPLE"]})
    with pytest.raises(AccountRefused, match="CLF"):
        kind.check(Mode.TEST, TEST, {"currencies": ["CLF"]})
    await kind.close()
