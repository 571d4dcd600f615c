"""Simulators as accounts of a merchant: what an account needs, and what it may not be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.connectors.kinds import AccountRefused
from gateway.connectors.registry import ConnectorRegistry
from gateway.connectors.simulator.connector import SimulatorConnector
from gateway.connectors.simulator.kind import SimulatorKind
from gateway.connectors.simulator.profiles import PROFILES
from gateway.domain.ids import new_connector_account_id
from gateway.domain.model import Mode, OperationKind

pytestmark = pytest.mark.unit

URL = "http://127.0.0.1:8100"


@pytest.fixture
async def kind() -> AsyncIterator[SimulatorKind]:
    kind = SimulatorKind()
    yield kind
    await kind.close()


def account(capabilities: Mapping[str, object] | None = None) -> ConnectorAccount:
    return ConnectorAccount(
        "mer_1",
        new_connector_account_id(),
        Mode.TEST,
        "simulator",
        Sealed(b"", WrappedKey("", b"")),
        capabilities=capabilities or {},
    )


@pytest.mark.parametrize(
    ("mode", "credentials", "capabilities"),
    [
        (Mode.LIVE, {"url": URL}, {}),
        (Mode.TEST, {}, {}),
        (Mode.TEST, {"url": URL, "secret": "x"}, {}),
        (Mode.TEST, {"url": "ftp://127.0.0.1"}, {}),
        (Mode.TEST, {"url": URL, "profile": "none"}, {}),
        (Mode.TEST, {"url": URL}, {"colour": []}),
    ],
)
async def test_an_account_that_cannot_be_used_is_refused(
    kind: SimulatorKind,
    mode: Mode,
    credentials: Mapping[str, str],
    capabilities: Mapping[str, object],
) -> None:
    with pytest.raises(AccountRefused):
        kind.check(mode, credentials, capabilities)


async def test_an_account_has_the_profile_and_the_capabilities_that_it_tells(
    kind: SimulatorKind,
) -> None:
    plain = kind.connect(account(), {"url": URL, "profile": "no_query"})
    assert not plain.capabilities.query_by_reference
    narrow = kind.connect(account({"operations": ["AUTHORIZE"]}), {"url": URL})
    assert narrow.capabilities.operations == {OperationKind.AUTHORIZE}
    assert narrow.capabilities.query_by_reference
    assert kind.connect(account(), {"url": URL, "profile": "no_query"}) is plain


async def test_an_account_that_has_gone_is_not_another_psp_of_the_same_name() -> None:
    simulator = SimulatorConnector(URL, PROFILES["idempotent"])
    registry = ConnectorRegistry([simulator])
    assert registry.connector("simulator", "mer_1") is simulator
    assert registry.connector("simulator", new_connector_account_id()) is None
    await registry.close()
