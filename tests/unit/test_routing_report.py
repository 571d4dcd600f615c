"""What the command line knows of accounts, whose credentials it does not open."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.connectors.configured import configured_kinds
from gateway.domain.model import CaptureMethod, Mode, OperationKind
from gateway.routing_report import DescribedAccounts
from gateway.settings import Settings

pytestmark = pytest.mark.unit

SEALED = Sealed(b"", WrappedKey("", b""))


def methods_of(connector: str, told: Mapping[str, object]) -> set[str]:
    account = ConnectorAccount("mer_1", "acc_1", Mode.TEST, connector, SEALED, capabilities=told)
    accounts = DescribedAccounts([account], configured_kinds(Settings()), "idempotent")
    described = accounts.accounts("mer_1", Mode.TEST)["acc_1"].connector
    assert described is not None
    assert described.capabilities.mode is Mode.TEST
    more = {CaptureMethod.MANUAL_MULTIPLE} & described.capabilities.capture_methods
    assert (OperationKind.INCREMENT in described.capabilities.operations) == bool(more)
    return set(described.capabilities.methods)


@pytest.mark.parametrize("connector", ["stripe", "adyen", "braintree"])
def test_account_can_do_no_more_than_a_gateway_will_find(connector: str) -> None:
    assert methods_of(connector, {}) == {"card"}


@pytest.mark.parametrize("connector", ["stripe", "adyen"])
def test_account_can_do_what_it_says(connector: str) -> None:
    assert methods_of(connector, {"methods": ["card", "ideal"]}) == {"card", "ideal"}


def test_simulators_and_hosts_can_do_all_that_they_have() -> None:
    assert "ideal" in methods_of("simulator", {})
    assert methods_of("iso8583", {}) == {"card"}
