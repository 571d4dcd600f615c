"""What a failure of a call proves, by the side of the write that it was on."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from gateway.connectors.adyen import connector as adyen
from gateway.connectors.base import (
    AccountConnector,
    Call,
    HttpConnector,
    Unusable,
    asking_first,
    in_steps,
    sendable,
)
from gateway.connectors.braintree import connector as braintree
from gateway.connectors.http import HttpClient, MaybeSent, NotSent, Response
from gateway.connectors.stripe import connector as stripe
from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind
from tests.connector_conformance import request_of
from tests.memory_store import CAPABLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import ModuleType

    from gateway.application.ports import ConnectorRequest

BUSY = NotSent(Reason.CONNECTOR_BUSY)
LOST = MaybeSent(Reason.CONNECTION_LOST)
SENT_MAYBE, SENT_NOT = Delivery.MAY_HAVE_BEEN_SENT, Delivery.NOT_SENT


class Failing(AccountConnector):
    def __init__(
        self, error: Exception, within: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__("failing", CAPABLE)
        self._error = error
        self._within = within

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        with self._within():
            raise self._error
        raise AssertionError

    async def _query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        raise self._error

    async def _cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer:
        raise self._error


@pytest.mark.parametrize(
    ("error", "within", "delivery", "reason"),
    [
        (BUSY, nullcontext, SENT_NOT, Reason.CONNECTOR_BUSY),
        (LOST, nullcontext, SENT_MAYBE, Reason.CONNECTION_LOST),
        (Unusable(), nullcontext, SENT_MAYBE, Reason.ANSWER_UNUSABLE),
        # A question before it changes nothing.
        (BUSY, asking_first, SENT_NOT, Reason.CONNECTOR_BUSY),
        (LOST, asking_first, SENT_NOT, Reason.CONNECT_FAILED),
        (Unusable(), asking_first, SENT_NOT, Reason.CONNECT_FAILED),
        # Of several requests the first may have been sent.
        (BUSY, in_steps, SENT_MAYBE, Reason.CONNECTOR_BUSY),
        (LOST, in_steps, SENT_MAYBE, Reason.CONNECTION_LOST),
    ],
)
async def test_a_request_was_not_sent_only_where_nothing_can_have_been_written(
    error: Exception,
    within: Callable[[], AbstractContextManager[None]],
    delivery: Delivery,
    reason: Reason,
) -> None:
    answer = await Failing(error, within).send(request_of(), 0.0)
    assert (answer.delivery, answer.reason) == (delivery, reason)


@pytest.mark.parametrize(
    ("psp", "is_cancelled", "is_told"),
    [(stripe, True, False), (adyen, True, True), (braintree, False, False)],
)
def test_recovery_goes_by_what_each_psp_can_be_asked_and_tells(
    psp: ModuleType, is_cancelled: bool, is_told: bool
) -> None:
    """Only Braintree has nothing that makes a reference unusable; only Adyen answers for good what
    it answered at first.
    """
    capabilities = psp.widest(Mode.LIVE)
    assert capabilities.mode is Mode.LIVE
    assert capabilities.idempotent_by_reference
    assert capabilities.query_by_reference
    assert capabilities.cancel_by_reference == is_cancelled
    assert capabilities.tells_by_notification == is_told


@pytest.mark.parametrize("error", [BUSY, LOST, Unusable()])
async def test_a_question_or_cancellation_that_fails_leaves_the_doubt_that_it_is_about(
    error: NotSent | MaybeSent,
) -> None:
    connector = Failing(error, nullcontext)
    told = [
        await connector.query(OperationKind.CAPTURE, "op_1-1"),
        await connector.cancel(OperationKind.CAPTURE, "op_1-1"),
    ]
    for answer in told:
        assert answer is not None
        assert (answer.delivery, answer.reason) == (SENT_MAYBE, error.reason)


class Recorded(HttpConnector):
    """One that notes how long its requests may take."""

    def __init__(self) -> None:
        http = HttpClient("http://127.0.0.1:1")
        super().__init__("recorded", http, CAPABLE, {}, repeat_pause_s=0.0)
        self.times: list[tuple[float, float]] = []
        self.keys: list[str | None] = []

        async def noted(*_: object, **more: Any) -> Response:
            self.times.append((more["send_before"], more["answer_before"]))
            self.keys.append(more["headers"].get("Idempotency-Key"))
            return Response(200, b"")

        http.request = noted  # type: ignore[method-assign]

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        raise AssertionError


async def test_a_request_has_the_answers_time_unless_another_is_given() -> None:
    connector = Recorded()
    now = time.monotonic()
    await connector._request("GET", "/")
    await connector._post(Call("/", b""), "key", 1.0, 2.0)
    (send_before, answer_before), given = connector.times
    assert send_before == answer_before >= now + CAPABLE.answer_timeout_s
    assert given == (1.0, 2.0)
    assert connector.keys == [None, "key"]


@pytest.mark.parametrize(
    ("currency", "reason"),
    [("EUR", Reason.AMOUNT_NOT_SUPPORTED), ("XTS", Reason.CURRENCY_NOT_SUPPORTED)],
)
def test_what_cannot_be_written_is_not_sent_for_its_amount_or_its_currency(
    currency: str, reason: Reason
) -> None:
    with pytest.raises(NotSent) as raised:
        sendable(None, currency, {"EUR"})
    assert raised.value.reason is reason
    assert sendable(0, currency, {"EUR"}) == 0
