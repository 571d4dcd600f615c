"""Connector accounts in a real database, and the book that routes by them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.connectors.accounts import AccountBook
from gateway.connectors.http import HttpClient
from gateway.connectors.kinds import AccountRefused
from gateway.connectors.registry import ConnectorRegistry
from gateway.connectors.sealing import LocalKeys, new_wrapping_key, rewrap, seal
from gateway.connectors.simulator.connector import SimulatorConnector
from gateway.connectors.simulator.profiles import PROFILES
from gateway.connectors.stripe.connector import StripeConnector
from gateway.connectors.stripe.kind import STRIPE_URL, StripeKind
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_connector_account_id, new_merchant_id
from gateway.domain.model import CaptureMethod, Mode, OperationKind
from storage.postgres import ConnectorAccounts, PostgresStore
from tests.servers import fetch

pytestmark = pytest.mark.integration

KEYS = LocalKeys.parse(new_wrapping_key("k1"))
TEST_KEY, LIVE_KEY = "sk_test_abcdefgh1234", "sk_live_abcdefgh1234"


@pytest.fixture
async def merchant_id(store: PostgresStore) -> str:
    organisation_id = await store.accounts.create_organisation("o")
    return await store.accounts.create_merchant(organisation_id, "m")


@pytest.fixture
def accounts(store: PostgresStore) -> ConnectorAccounts:
    return store.connector_accounts


def kind() -> StripeKind:
    return StripeKind(HttpClient(STRIPE_URL))


def book_of(accounts: ConnectorAccounts, keys: LocalKeys | None = KEYS) -> AccountBook:
    return AccountBook(accounts, [kind()], keys)


async def add(
    accounts: ConnectorAccounts,
    merchant_id: str,
    mode: Mode = Mode.TEST,
    *,
    priority: int = 100,
    secret_key: str = "",
    connector: str = "stripe",
    capabilities: Mapping[str, object] | None = None,
) -> str:
    account = ConnectorAccount(
        merchant_id,
        new_connector_account_id(),
        mode,
        connector,
        Sealed(b"", WrappedKey("", b"")),
        priority=priority,
        capabilities=capabilities or {},
    )
    credentials = {"secret_key": secret_key or (TEST_KEY if mode is Mode.TEST else LIVE_KEY)}
    sealed = await seal(credentials, account.context, KEYS)
    await accounts.add(replace(account, sealed=sealed))
    return account.account_id


def authorization_of(connector: object) -> str:
    assert isinstance(connector, StripeConnector)
    return connector._headers["Authorization"]


async def test_new_payments_go_to_the_enabled_account_of_the_lowest_number(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    second = await add(accounts, merchant_id, priority=20)
    first = await add(accounts, merchant_id, priority=10)
    book = book_of(accounts)
    await book.refresh()

    def routed() -> str | None:
        route = book.route(merchant_id, Mode.TEST)
        return None if route is None else route.connector_account_id

    assert routed() == first
    await accounts.change(merchant_id, first, enabled=False)
    assert routed() == first
    await book.refresh()
    assert routed() == second
    assert book.connector(first) is not None
    await accounts.change(merchant_id, first, enabled=True, priority=30)
    await book.refresh()
    assert routed() == second
    await accounts.remove(merchant_id, second)
    await book.refresh()
    assert routed() == first
    assert book.connector(second) is None
    await book.close()


async def test_rotated_credentials_are_taken_over_without_a_restart(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    account_id = await add(accounts, merchant_id)
    book = book_of(accounts)
    await book.refresh()
    before = book.connector(account_id)
    await book.refresh()
    assert book.connector(account_id) is before
    account = await accounts.find(merchant_id, account_id)
    assert account is not None
    sealed = await seal({"secret_key": "sk_test_rotated1234"}, account.context, KEYS)
    await accounts.replace_credentials(merchant_id, account_id, sealed)
    await book.refresh()
    assert authorization_of(book.connector(account_id)) == "Bearer sk_test_rotated1234"
    assert authorization_of(before) == f"Bearer {TEST_KEY}"
    await book.close()


async def test_a_removal_is_read_though_the_databases_clock_was_set_back(
    accounts: ConnectorAccounts, merchant_id: str, dsn: str
) -> None:
    account_id = await add(accounts, merchant_id)
    ahead = "UPDATE connector_accounts SET updated_at = now() + interval '1 hour' RETURNING 1"
    fetch(dsn, ahead)
    book = book_of(accounts)
    await book.refresh()
    assert book.connector(account_id) is not None
    await accounts.remove(merchant_id, account_id)
    await book.refresh()
    assert book.connector(account_id) is None
    await book.close()


async def test_modes_and_merchants_are_kept_apart(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    test_id = await add(accounts, merchant_id, Mode.TEST)
    live_id = await add(accounts, merchant_id, Mode.LIVE)
    book = book_of(accounts)
    await book.refresh()
    for mode, account_id, key in (
        (Mode.TEST, test_id, TEST_KEY),
        (Mode.LIVE, live_id, LIVE_KEY),
    ):
        route = book.route(merchant_id, mode)
        assert route is not None
        assert route.connector_account_id == account_id
        assert route.connector.capabilities.mode is mode
        assert authorization_of(route.connector) == f"Bearer {key}"
    assert not book.has(new_merchant_id(), Mode.TEST)
    await book.close()


@pytest.mark.parametrize(
    ("mode", "key"),
    [(Mode.TEST, LIVE_KEY), (Mode.LIVE, TEST_KEY), (Mode.LIVE, "rk_test_abcdefgh12")],
)
async def test_credentials_of_the_other_mode_serve_nobody(
    accounts: ConnectorAccounts,
    merchant_id: str,
    mode: Mode,
    key: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    account_id = await add(accounts, merchant_id, mode, secret_key=key)
    book = book_of(accounts)
    for _ in range(2):
        await book.refresh()
    assert book.has(merchant_id, mode)
    assert book.route(merchant_id, mode) is None
    assert book.connector(account_id) is None
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert key not in record.getMessage()
    await book.close()


async def test_account_without_its_wrapping_key_serves_nobody_until_the_key_is_there(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    account_id = await add(accounts, merchant_id)
    for keys in (None, LocalKeys.parse(new_wrapping_key("k1"))):
        book = book_of(accounts, keys)
        await book.refresh()
        assert book.has(merchant_id, Mode.TEST)
        assert book.connector(account_id) is None
        book._keys = KEYS
        await book.refresh()
        assert book.connector(account_id) is not None
        await book.close()


async def test_account_at_an_unknown_connector_serves_nobody(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    await add(accounts, merchant_id, connector="elsewhere")
    book = book_of(accounts)
    await book.refresh()
    assert book.route(merchant_id, Mode.TEST) is None
    await book.close()


async def test_an_account_of_a_mode_that_only_a_newer_version_knows_hides_no_other_one(
    accounts: ConnectorAccounts, merchant_id: str, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    newer = await add(accounts, merchant_id)
    account_id = await add(accounts, merchant_id)
    fetch(dsn, "UPDATE connector_accounts SET mode = 99 WHERE account_id = $1 RETURNING 1", newer)
    book = book_of(accounts)
    await book.refresh()
    assert list(book.served(merchant_id, Mode.TEST)) == [account_id]
    assert [each.account_id for each in await accounts.list()] == [account_id]
    assert "a connector account cannot be read: 99 is not a valid Mode" in caplog.text
    await book.close()


async def test_the_simulator_serves_those_without_an_account_of_the_mode(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    simulator = SimulatorConnector("http://127.0.0.1:9", PROFILES["idempotent"])
    book = book_of(accounts)
    registry = ConnectorRegistry([simulator], book)
    other = new_merchant_id()

    def serves(merchant: str, mode: Mode) -> str | None:
        route = registry.route(merchant, mode)
        return None if route is None else route.connector.name

    assert serves(merchant_id, Mode.TEST) == "simulator"
    account_id = await add(accounts, merchant_id)
    await book.refresh()
    assert serves(merchant_id, Mode.TEST) == "stripe"
    assert serves(merchant_id, Mode.LIVE) is None
    assert serves(other, Mode.TEST) == "simulator"
    # Payments made with the simulator before are still the simulator's.
    assert registry.connector("simulator", merchant_id) is simulator
    stripe = registry.connector("stripe", account_id)
    assert stripe is not None
    assert stripe.name == "stripe"
    assert registry.connector("simulator", account_id) is None
    assert registry.connector("stripe", merchant_id) is None
    # An account that is switched off is not replaced by a simulator that approves.
    await accounts.change(merchant_id, account_id, enabled=False)
    await book.refresh()
    assert serves(merchant_id, Mode.TEST) is None
    await accounts.remove(merchant_id, account_id)
    await book.refresh()
    assert serves(merchant_id, Mode.TEST) == "simulator"
    await registry.close()
    await book.close()


async def test_removal_deletes_the_credentials_and_leaves_the_row(
    accounts: ConnectorAccounts, merchant_id: str, dsn: str
) -> None:
    account_id = await add(accounts, merchant_id)
    assert await accounts.remove(merchant_id, account_id) is not None
    (row,) = fetch(dsn, "SELECT credentials, wrapped_data_key, enabled FROM connector_accounts")
    assert tuple(row) == (b"", b"", False)
    assert await accounts.find(merchant_id, account_id) is None
    assert await accounts.list() == []
    assert await accounts.remove(merchant_id, account_id) is None
    assert await accounts.change(merchant_id, account_id, enabled=True) is None


async def test_account_of_another_merchant_cannot_be_changed(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    account_id = await add(accounts, merchant_id)
    other = new_merchant_id()
    assert await accounts.find(other, account_id) is None
    assert await accounts.change(other, account_id, enabled=False) is None
    assert await accounts.remove(other, account_id) is None
    with pytest.raises(GatewayError) as caught:
        await add(accounts, other)
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_rewrapping_does_not_overwrite_credentials_that_were_rotated_meanwhile(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    account_id = await add(accounts, merchant_id)
    before = await accounts.find(merchant_id, account_id)
    assert before is not None
    keys = LocalKeys({"k2": b"2" * 32, "k1": KEYS._keys["k1"]})
    moved = await rewrap(before.sealed, before.context, keys)
    rotated = await seal({"secret_key": "sk_test_rotated1234"}, before.context, KEYS)
    await accounts.replace_credentials(merchant_id, account_id, rotated)
    assert not await accounts.rewrap(before, moved)
    now = await accounts.find(merchant_id, account_id)
    assert now is not None
    assert now.sealed == rotated
    assert await accounts.rewrap(now, await rewrap(now.sealed, now.context, keys))
    book = book_of(accounts, keys)
    await book.refresh()
    assert authorization_of(book.connector(account_id)) == "Bearer sk_test_rotated1234"
    await book.close()


async def test_account_can_do_what_it_tells_and_otherwise_the_usual(
    accounts: ConnectorAccounts, merchant_id: str
) -> None:
    plain = await add(accounts, merchant_id)
    special = await add(
        accounts,
        merchant_id,
        capabilities={
            "operations": ["AUTHORIZE", "CAPTURE", "INCREMENT"],
            "capture_methods": ["MANUAL", "MANUAL_MULTIPLE"],
            "currencies": ["EUR", "BHD"],
        },
    )
    book = book_of(accounts)
    await book.refresh()
    usual, told = book.connector(plain), book.connector(special)
    assert usual is not None
    assert told is not None
    assert OperationKind.INCREMENT not in usual.capabilities.operations
    assert CaptureMethod.MANUAL_MULTIPLE not in usual.capabilities.capture_methods
    assert told.capabilities.operations == {
        OperationKind.AUTHORIZE,
        OperationKind.CAPTURE,
        OperationKind.INCREMENT,
    }
    assert CaptureMethod.MANUAL_MULTIPLE in told.capabilities.capture_methods
    assert told.capabilities.amounts is not None
    assert sorted(told.capabilities.amounts) == ["BHD", "EUR"]
    await book.close()


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ({"colour": 1}, "no capability 'colour'"),
        ({"operations": "CAPTURE"}, "list"),
        ({"operations": ["DANCE"]}, "DANCE"),
        ({"capture_methods": ["NEVER"]}, "NEVER"),
        ({"currencies": ["EUR", "CLF"]}, "CLF"),
        ({"currencies": [1]}, "list"),
        ({"currencies": []}, "empty"),
        ({"operations": []}, "empty"),
    ],
)
async def test_capabilities_beyond_the_connectors_are_refused(
    capabilities: Mapping[str, object], message: str
) -> None:
    stripe = kind()
    with pytest.raises(AccountRefused, match=message):
        stripe.check(Mode.TEST, {"secret_key": TEST_KEY}, capabilities)
    await stripe.close()


@pytest.mark.parametrize(
    "credentials",
    [
        {},
        {"secret_key": ""},
        {"secret_key": "pk_test_abcdefgh1234"},
        {"secret_key": TEST_KEY + "\r\nX: y"},
        {"secret_key": TEST_KEY, "stripe_account": "mer_1"},
        {"secret_key": TEST_KEY, "colour": "blue"},
    ],
)
async def test_credentials_that_are_none_are_refused_without_being_shown(
    credentials: dict[str, str],
) -> None:
    stripe = kind()
    with pytest.raises(AccountRefused) as caught:
        stripe.check(Mode.TEST, credentials, {})
    assert TEST_KEY not in str(caught.value)
    await stripe.close()


async def test_live_credentials_go_to_stripe_alone() -> None:
    double = StripeKind(HttpClient("http://127.0.0.1:9"), url="http://127.0.0.1:9")
    with pytest.raises(AccountRefused, match="live credentials go to"):
        double.check(Mode.LIVE, {"secret_key": LIVE_KEY}, {})
    double.check(Mode.TEST, {"secret_key": TEST_KEY}, {})
    await double.close()
