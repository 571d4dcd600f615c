"""What the command line knows of accounts, whose credentials it does not open."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from payments.v1 import money_pb2, payment_method_pb2
from payments.v1 import payment_service_pb2 as pb

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.application.routing import Routing
from gateway.application.routing_administration import PastPayment
from gateway.connectors.configured import configured_kinds
from gateway.domain.model import CaptureMethod, Mode, OperationKind
from gateway.routing.rules import Rules
from gateway.routing_report import DescribedAccounts, describe, simulate
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


def test_past_payments_of_a_newer_version_are_left_out_of_a_simulation() -> None:
    account = ConnectorAccount("mer_1", "acc_1", Mode.TEST, "simulator", SEALED)
    accounts = DescribedAccounts([account], configured_kinds(Settings()), "idempotent")
    known = pb.AuthorizePaymentRequest(
        amount=money_pb2.Money(amount_minor=100, currency_code="EUR"),
        capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
        payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),
    )
    newer = [pb.AuthorizePaymentRequest() for _ in range(4)]
    for request in newer:
        request.CopyFrom(known)
    newer[0].capture_method = 99  # type: ignore[assignment]
    newer[1].channel = 99  # type: ignore[assignment]
    newer[2].payment_method.card_hints.card_type = 99  # type: ignore[assignment]
    newer[3].payment_method.ClearField("method")  # as a method that this version does not have
    past = [
        PastPayment(f"pay_{number}", 100, "EUR", each.SerializeToString(), "simulator", "acc_1")
        for number, each in enumerate((known, *newer))
    ]
    simulated = simulate(Rules(()), Routing(accounts), "mer_1", Mode.TEST, past)
    assert (simulated.payments, simulated.unreadable, simulated.moved) == (1, 4, 0)
    assert "4 more are of a newer version" in "\n".join(describe(simulated))
