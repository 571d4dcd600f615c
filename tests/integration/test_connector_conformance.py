"""The conformance suite of connectors, for each connector."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from gateway.application.ports import Connector
from gateway.connectors.simulator.connector import SimulatorConnector
from gateway.connectors.simulator.launch import SimulatorProcess
from gateway.connectors.simulator.profiles import PROFILES
from gateway.domain.model import OperationKind, ResponseCode
from tests.adyen_double import AdyenPsp, adyen_psp
from tests.connector_conformance import SHORT_S, WAIT_S, Conformance, Way, way_to
from tests.simulators import running_simulator, standings_of
from tests.stripe_double import StripePsp, stripe_psp

pytestmark = pytest.mark.integration

K = OperationKind


class SimulatorPsp:
    """The PSP simulator, in its idempotent profile."""

    declines: Mapping[str, ResponseCode] = {
        "tok_declined_do_not_honor": ResponseCode.DO_NOT_HONOR,
        "tok_declined_insufficient_funds": ResponseCode.INSUFFICIENT_FUNDS,
        "tok_declined_lost_card": ResponseCode.LOST_CARD,
        "tok_declined_other": ResponseCode.DECLINED_OTHER,
    }
    follow_up_decline: Mapping[K, str] = {
        kind: f"tok_{kind.name.lower()}_declined"
        for kind in (K.CAPTURE, K.VOID, K.REFUND, K.INCREMENT)
    }
    inexpressible: tuple[tuple[int, str], ...] = ()
    currencies: tuple[str, ...] = ("JPY", "EUR", "KWD", "CLF")

    def __init__(self, simulator: SimulatorProcess, way: Way, stack: AsyncExitStack) -> None:
        self.way = way
        self._simulator = simulator
        self._stack = stack
        self.connector: Connector = self._connect(WAIT_S)

    def _connect(self, answer_timeout_s: float) -> Connector:
        connector = SimulatorConnector(
            self.way.url, PROFILES["idempotent"], answer_timeout_s=answer_timeout_s
        )
        self._stack.push_async_callback(connector.close)
        return connector

    async def impatient(self) -> Connector:
        return self._connect(SHORT_S)

    async def effects(self, reference: str) -> int:
        return sum(
            record["type"] == "effect" and record.get("reference") == reference
            for record in self._simulator.records()
        )

    async def held_minor(self, reference: str) -> int:
        return sum(
            each.open_minor + each.net_minor for each in standings_of(self._simulator, reference)
        )

    def report_more(self, told: dict[str, Any]) -> None:
        told["amount_minor"] += 1

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        told["currency"] = "USD"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    with running_simulator(tmp_path_factory.mktemp("conformance")) as process:
        yield process


class TestSimulator(Conformance):
    """The PSP simulator's connector."""

    @pytest_asyncio.fixture
    async def psp(self, simulator: SimulatorProcess) -> AsyncIterator[SimulatorPsp]:
        async with AsyncExitStack() as stack, way_to(simulator.url) as way:
            yield SimulatorPsp(simulator, way, stack)
            await stack.aclose()


class TestStripe(Conformance):
    """Stripe's connector."""

    @pytest_asyncio.fixture
    async def psp(self) -> AsyncIterator[StripePsp]:
        async with stripe_psp() as psp:
            yield psp


class TestAdyen(Conformance):
    """Adyen's connector."""

    notified = frozenset({K.CAPTURE, K.VOID, K.REFUND, K.INCREMENT, K.REVERSAL})
    asking_uses_up = True

    @pytest_asyncio.fixture
    async def psp(self) -> AsyncIterator[AdyenPsp]:
        async with adyen_psp() as psp:
            yield psp
