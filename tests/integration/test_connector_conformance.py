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
from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, OperationKind, ResponseCode, Verdict
from tests.adyen_double import AdyenPsp, adyen_psp
from tests.braintree_double import BraintreePsp, braintree_psp
from tests.connector_conformance import (
    DISTURBED,
    SHORT_S,
    WAIT_S,
    Conformance,
    Fault,
    Way,
    is_doubt,
    prepared,
    request_of,
    send,
    way_to,
)
from tests.doubles import DoubleConformance
from tests.iso8583 import Iso8583Psp, frame_way_to
from tests.simulators import SimulatorBooks, running_simulator
from tests.stripe_double import StripePsp, stripe_psp

K = OperationKind


class SimulatorPsp(SimulatorBooks):
    """The PSP simulator, in its idempotent profile."""

    declines: Mapping[str, ResponseCode] = {
        "tok_declined_do_not_honor": ResponseCode.DO_NOT_HONOR,
        "tok_declined_insufficient_funds": ResponseCode.INSUFFICIENT_FUNDS,
        "tok_declined_lost_card": ResponseCode.LOST_CARD,
        "tok_declined_other": ResponseCode.DECLINED_OTHER,
    }
    inexpressible: tuple[tuple[int, str], ...] = ()
    currencies: tuple[str, ...] = ("JPY", "EUR", "KWD", "CLF")

    def __init__(self, simulator: SimulatorProcess, way: Way, stack: AsyncExitStack) -> None:
        super().__init__(simulator)
        self.way = way
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

    def report_more(self, told: dict[str, Any]) -> None:
        told["amount_minor"] += 1

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        told["currency"] = "USD"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    with running_simulator(tmp_path_factory.mktemp("conformance")) as process:
        yield process


@pytest.fixture(scope="module")
def acquirer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    directory = tmp_path_factory.mktemp("acquirer")
    with running_simulator(directory, iso8583_specification="reference-text") as process:
        yield process


class TestSimulator(Conformance):
    """The PSP simulator's connector."""

    @pytest_asyncio.fixture
    async def psp(self, simulator: SimulatorProcess) -> AsyncIterator[SimulatorPsp]:
        async with way_to(simulator.url) as way, AsyncExitStack() as stack:
            yield SimulatorPsp(simulator, way, stack)


class TestIso8583(Conformance):
    """The connector to acquirers' hosts, with the simulator as the host."""

    @pytest_asyncio.fixture
    async def psp(self, acquirer: SimulatorProcess) -> AsyncIterator[Iso8583Psp]:
        async with frame_way_to(acquirer.iso8583_url) as way, AsyncExitStack() as stack:
            yield Iso8583Psp(acquirer, way, stack)


class TestStripe(DoubleConformance):
    """Stripe's connector."""

    @pytest_asyncio.fixture
    async def psp(self) -> AsyncIterator[StripePsp]:
        async with stripe_psp() as psp:
            yield psp


class TestAdyen(DoubleConformance):
    """Adyen's connector."""

    notified = frozenset({K.CAPTURE, K.VOID, K.REFUND, K.INCREMENT, K.REVERSAL})
    asking_uses_up = True

    @pytest_asyncio.fixture
    async def psp(self) -> AsyncIterator[AdyenPsp]:
        async with adyen_psp() as psp:
            yield psp


class TestBraintree(DoubleConformance):
    """Braintree's connector: nothing proves an absence there, so that a doubt stays one until its
    effect is found.
    """

    unkeyed = frozenset(
        {
            "test_request_that_is_disturbed_once_is_repeated_by_its_sender",
            "test_second_request_with_a_reference_has_no_effect",
            "test_concurrent_requests_with_a_reference_take_effect_once",
        }
    )
    """What a verification cannot do, since Braintree takes no key for it."""

    @pytest_asyncio.fixture
    async def psp(self, request: pytest.FixtureRequest) -> AsyncIterator[BraintreePsp]:
        params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        if params.get("kind") is K.INCREMENT:
            pytest.skip("the connector has no such operation")
        if params.get("kind") is K.VERIFY and request.node.originalname in self.unkeyed:
            pytest.skip("a verification has no key at Braintree")
        async with braintree_psp() as psp:
            yield psp

    @pytest.mark.parametrize(("kind", "fault"), DISTURBED)
    async def test_disturbed_request_is_in_doubt_and_becomes_what_the_psp_did(
        self, psp: Any, kind: K, fault: Fault
    ) -> None:
        request = await prepared(psp, kind)
        psp.way.disturb(fault)
        assert is_doubt(await send(await psp.impatient(), request))
        psp.way.clear()
        assert await psp.effects(request.reference) == fault.arrives
        found = await psp.connector.query(kind, request.reference, request)
        if not fault.arrives or kind is K.VERIFY:
            # Not found, and that proves nothing: nobody says that it was not sent.
            assert found is None
        else:
            assert found is not None
            assert found.verdict is Verdict.APPROVED
        if kind is K.VOID:  # releases money, so it is repeated until it is confirmed
            assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
            assert await psp.effects(request.reference) == 1

    async def test_cancelled_authorization_holds_nothing(self, psp: Any) -> None:
        for capture in (False, True):
            charge = request_of(capture=capture)
            answer = await send(psp.connector, charge)
            doubted = await psp.connector.cancel(K.AUTHORIZE, charge.reference, charge)
            assert doubted == ConnectorAnswer(doubted.delivery, reason=Reason.RECOVERED)
            assert await psp.held_minor(charge.reference) == 1000
            # What a cancellation would do is a reversal's part.
            target = answer.connector_transaction_id
            for _ in range(2):
                reversal = request_of(K.REVERSAL, target_transaction_id=target)
                assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
            assert await psp.held_minor(charge.reference) == 0

    async def test_cancelled_capture_is_given_back(self, psp: Any) -> None:
        capture = await prepared(psp, K.CAPTURE)
        await send(psp.connector, capture)
        target = capture.target_transaction_id
        reversal = request_of(K.REVERSAL, target_transaction_id=target)
        assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
        (transaction,) = psp.double.transactions()
        assert psp.double.standing_minor(transaction) == 0
