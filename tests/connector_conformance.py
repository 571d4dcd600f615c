"""What every connector has to do, whatever PSP is behind it: a suite, and a disturbed way to a PSP.

A test class derives from `Conformance` and has a fixture `psp` that yields a `Psp`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any, Protocol
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web

from gateway.application.ports import Connector, ConnectorRequest
from gateway.domain.errors import Reason
from gateway.domain.ids import new_operation_id
from gateway.domain.model import (
    SENT_KINDS,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    OperationKind,
    Outcome,
    ResponseCode,
    Verdict,
)
from tests.http_server import http_server

K = OperationKind
WAIT_S = 30.0
SHORT_S = 0.3
"""For what never answers: nothing but the connector's own time-out ends the wait."""

BEFORE: Mapping[K, tuple[K, ...]] = {
    K.AUTHORIZE: (),
    K.VERIFY: (),
    K.CAPTURE: (K.AUTHORIZE,),
    K.VOID: (K.AUTHORIZE,),
    K.INCREMENT: (K.AUTHORIZE,),
    K.REVERSAL: (K.AUTHORIZE,),
    K.REFUND: (K.AUTHORIZE, K.CAPTURE),
}
"""What has to be done before an operation of a kind."""
KINDS = sorted(SENT_KINDS - {K.REVERSAL})


class Fault(Enum):
    """What happens to a request, or to its answer, on the way."""

    LOST = "reset without having arrived"
    RESET = "arrives, and the connection is reset"
    SWALLOWED = "never arrives, and is never answered"
    SILENT = "arrives, and is never answered"
    UNAVAILABLE = "status 503 without having arrived"
    ERROR = "arrives, and status 500 is answered"
    GARBAGE = "arrives, and no JSON is answered"
    CUT = "arrives, and half of the answer comes"
    EMPTY = "arrives, and {} is answered"
    OVERSIZE = "arrives, and the answer is larger than any limit"
    REDIRECT = "status 307 without having arrived"

    @property
    def arrives(self) -> bool:
        """Whether the PSP gets the request."""
        return self not in (Fault.LOST, Fault.SWALLOWED, Fault.UNAVAILABLE, Fault.REDIRECT)


DISTURBED = [
    (kind, fault)
    for kind in KINDS
    for fault in Fault
    # What an answer can look like is the same for all kinds; what it means differs.
    if kind is K.AUTHORIZE or fault in (Fault.LOST, Fault.RESET, Fault.SWALLOWED, Fault.SILENT)
]


class Way:
    """A proxy before a PSP: what it does to the next requests that change something (POST)."""

    def __init__(self, upstream: str, is_change: Callable[[bytes], bool]) -> None:
        self._upstream = upstream
        self._is_change = is_change
        self.url = ""
        self.fault: Fault | None = None
        self.times = 0
        """How many requests meet the fault yet."""
        self.alter: Callable[[dict[str, Any]], None] | None = None
        """Changes the object that is answered."""
        self._ended = asyncio.Event()

    def disturb(self, fault: Fault, times: int = 1000) -> None:
        """From now on, until `clear`."""
        self.fault, self.times = fault, times

    def clear(self) -> None:
        """Leave everything as it is."""
        self.fault, self.times, self.alter = None, 0, None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Any request."""
        fault = None
        sent = await request.read()
        changes = request.method == "POST" and self._is_change(sent)
        if changes and self.times:
            self.times -= 1
            fault = self.fault
        if fault is not None and not fault.arrives:
            return await self._answer(request, fault, b"", 503)
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method,
                f"{self._upstream}{request.path_qs}",
                data=sent,
                headers={
                    name: value
                    for name, value in request.headers.items()
                    if name.lower() not in ("host", "content-length")
                },
            ) as response,
        ):
            body = await response.read()
            headers = {
                name: response.headers[name] for name in _PASSED_ON if name in response.headers
            }
        if fault is not None:
            return await self._answer(request, fault, body, response.status)
        if self.alter is not None and changes and response.status == 200:
            told = json.loads(body)
            self.alter(told)
            body = json.dumps(told).encode()
        return web.Response(status=response.status, body=body, headers=headers)

    async def _answer(
        self, request: web.Request, fault: Fault, body: bytes, status: int
    ) -> web.StreamResponse:
        transport = request.transport
        if fault in (Fault.SWALLOWED, Fault.SILENT):
            await self._ended.wait()
        if fault in (Fault.SWALLOWED, Fault.SILENT, Fault.LOST, Fault.RESET):
            if transport is not None:
                transport.abort()
            return web.Response()
        if fault is Fault.CUT:
            response = web.StreamResponse(status=status)
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            if transport is not None:
                transport.abort()
            return response
        told, body = _TOLD[fault]
        return web.Response(status=told, body=body, headers={"Location": "/elsewhere"})


_PASSED_ON = ("Idempotent-Replayed", "transient-error")
"""What PSPs tell in headers."""
_TOLD = {
    Fault.UNAVAILABLE: (503, b"upstream away"),
    Fault.ERROR: (500, b'{"error": {"type": "api_error"}}'),
    Fault.GARBAGE: (200, b"<html>"),
    Fault.EMPTY: (200, b"{}"),
    Fault.OVERSIZE: (200, b" " * 8_000_000),
    Fault.REDIRECT: (307, b""),
}


@asynccontextmanager
async def way_to(
    upstream: str, is_change: Callable[[bytes], bool] = lambda _: True
) -> AsyncIterator[Way]:
    """A proxy for as long as the context lasts. `is_change` tells from the body of a POST whether
    it changes something.
    """
    way = Way(upstream, is_change)
    async with http_server(way.handle) as way.url:
        try:
            yield way
        finally:
            way._ended.set()


class Disturbance(Protocol):
    """A disturbed way to a PSP, as `Way` is for HTTP."""

    alter: Callable[[dict[str, Any]], None] | None

    def disturb(self, fault: Fault, times: int = 1000) -> None:
        """From now on, until `clear`."""

    def clear(self) -> None:
        """Leave everything as it is."""


class Psp(Protocol):
    """A PSP, a connector to it over a disturbed way, and its books."""

    @property
    def way(self) -> Disturbance:
        """The way."""

    connector: Connector
    declines: Mapping[str, ResponseCode]
    """Tokens whose authorizations are declined."""
    follow_up_decline: Mapping[K, str]
    """The token whose operations of a kind are declined; the authorization is approved."""
    inexpressible: tuple[tuple[int, str], ...]
    """Amounts in minor units, and currencies, that the PSP cannot take."""
    currencies: tuple[str, ...]
    """With 0, 2, 3 and 4 decimals, as far as the PSP has such."""

    async def impatient(self) -> Connector:
        """A connector that waits only SHORT_S for an answer."""

    async def effects(self, reference: str) -> int:
        """How often a reference took effect."""

    async def held_minor(self, reference: str) -> int:
        """What stands of an authorization: held, or captured and not refunded."""

    def report_more(self, told: dict[str, Any]) -> None:
        """Make an answer to an authorization tell one minor unit more."""

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        """Make an answer tell another currency."""


def request_of(kind: K = K.AUTHORIZE, amount_minor: int = 1000, **more: Any) -> ConnectorRequest:
    """A request with a reference of its own."""
    if kind in (K.AUTHORIZE, K.VERIFY):
        more.setdefault("payment_method_token", "tok_visa")
    values: dict[str, Any] = {
        "kind": kind,
        "reference": f"{new_operation_id()}-1",
        "amount_minor": 0 if kind is K.VERIFY else amount_minor,
        "currency": "EUR",
        "connector_account_id": "acct_1",
        "payment_id": "pay_1",
        "fields": {"customer_id": "cus_1"},
    }
    return ConnectorRequest(**(values | more))


async def send(connector: Connector, request: ConnectorRequest) -> ConnectorAnswer:
    """Send in time."""
    return await connector.send(request, time.monotonic() + WAIT_S)


async def prepared(psp: Psp, kind: K, token: str = "tok_visa", **more: Any) -> ConnectorRequest:
    """A request of a kind, with all done that must come before."""
    target = ""
    for step in BEFORE[kind]:
        request = request_of(step, target_transaction_id=target, **more)
        if step is K.AUTHORIZE:
            request.payment_method_token = token
        if step is K.CAPTURE:
            request.final = True
        answer = await send(psp.connector, request)
        assert answer.verdict in (Verdict.APPROVED, Verdict.PENDING)
        target = target or answer.connector_transaction_id
    request = request_of(kind, target_transaction_id=target, **more)
    if kind in (K.AUTHORIZE, K.VERIFY):
        request.payment_method_token = token
    if kind is K.CAPTURE:
        request.final = True
    return request


async def queried(psp: Psp, request: ConnectorRequest) -> list[ConnectorAnswer | None]:
    """The answer to a query; none at all where the PSP cannot be asked."""
    if not psp.connector.capabilities.query_by_reference:
        return []
    return [await psp.connector.query(request.kind, request.reference, request)]


async def settled(psp: Psp, request: ConnectorRequest) -> ConnectorAnswer:
    """What recovery makes of a doubt: ask, and where the PSP knows nothing, cancel."""
    for answer in await queried(psp, request):
        if answer is not None:
            return answer
    return await psp.connector.cancel(request.kind, request.reference, request)


def is_doubt(answer: ConnectorAnswer | None) -> bool:
    """Whether it may have been processed, and nobody says so."""
    return (
        answer is not None
        and answer.delivery is Delivery.MAY_HAVE_BEEN_SENT
        and answer.verdict is Verdict.UNKNOWN
        and bool(answer.reason)
    )


def outcome_of(answer: ConnectorAnswer | None) -> Outcome:
    """What the PSP said of it; there has to be something."""
    assert answer is not None
    assert answer.outcome is not None
    return answer.outcome


async def found_of(psp: Psp, request: ConnectorRequest) -> ConnectorAnswer:
    """The answer to a query, which has to find something."""
    found = await psp.connector.query(request.kind, request.reference, request)
    assert found is not None
    return found


def reference_made(seconds_ago: float) -> str:
    """A reference of an operation that began so long ago (UUIDv7, RFC 9562, section 5.7)."""
    milliseconds = int((time.time() - seconds_ago) * 1000)
    value = (milliseconds << 80) | (7 << 76) | (2 << 62) | 12345
    return f"op_{UUID(int=value).hex}-1"


class Conformance:
    """The suite, and in what a PSP may differ."""

    notified: frozenset[K] = frozenset()
    """What the PSP only accepts: a notification tells the outcome, amount and code."""
    asking_uses_up: bool = False
    """To be asked about a reference that had no effect makes it unusable."""

    @property
    def taken_back(self) -> Verdict:
        """What a cancellation is answered with that takes something back."""
        return Verdict.PENDING if K.REVERSAL in self.notified else Verdict.CANCELED

    def accepted(self, kind: K) -> Verdict:
        """What an operation that takes effect is answered with."""
        return Verdict.PENDING if kind in self.notified else Verdict.APPROVED

    @pytest.mark.parametrize("kind", sorted(SENT_KINDS))
    async def test_every_kind_of_operation_takes_effect_once(self, psp: Psp, kind: K) -> None:
        request = await prepared(psp, kind)
        answer = await send(psp.connector, request)
        assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, self.accepted(kind))
        assert answer.connector_transaction_id
        assert answer.currency in ("", request.currency)
        if kind not in (K.VOID, K.REVERSAL) and kind not in self.notified:
            assert answer.outcome is not None
            assert answer.outcome.response_code is ResponseCode.APPROVED
            assert answer.outcome.amount_reported_minor == request.amount_minor
        if kind is not K.REVERSAL:
            assert await psp.effects(request.reference) == 1

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not K.VERIFY])
    async def test_what_took_effect_is_found_by_query(self, psp: Psp, kind: K) -> None:
        if not psp.connector.capabilities.query_by_reference:
            pytest.skip("the PSP cannot be asked")
        request = await prepared(psp, kind)
        if not self.asking_uses_up:
            assert await psp.connector.query(kind, request.reference, request) is None
        await send(psp.connector, request)
        found = await psp.connector.query(kind, request.reference, request)
        if self.asking_uses_up and kind is K.VOID:
            # Not asked about: releases money, so it is repeated until it is confirmed.
            assert found is None
            return
        assert found is not None
        assert found.verdict is self.accepted(kind)
        if kind is not K.VOID and kind not in self.notified:
            assert found.outcome is not None
            assert found.outcome.amount_reported_minor == request.amount_minor

    async def test_capture_with_the_authorization_is_one_charge(self, psp: Psp) -> None:
        request = request_of(capture=True)
        assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
        assert await psp.effects(request.reference) == 1
        assert await psp.held_minor(request.reference) == 1000

    async def test_partial_captures_and_refunds_add_up(self, psp: Psp) -> None:
        request = request_of()
        target = (await send(psp.connector, request)).connector_transaction_id
        several = CaptureMethod.MANUAL_MULTIPLE in psp.connector.capabilities.capture_methods
        parts = ((300, False), (200, False), (100, True)) if several else ((600, True),)
        for part, final in parts:
            capture = request_of(K.CAPTURE, part, target_transaction_id=target, final=final)
            self.check_amount(capture, await send(psp.connector, capture))
            for found in await queried(psp, capture):
                self.check_amount(capture, found)
        assert await psp.held_minor(request.reference) == 600
        refunds = [request_of(K.REFUND, part, target_transaction_id=target) for part in (50, 60, 7)]
        for refund in refunds:
            self.check_amount(refund, await send(psp.connector, refund))
        for refund in refunds:
            for found in await queried(psp, refund):
                self.check_amount(refund, found)
        assert await psp.held_minor(request.reference) == 483

    def check_amount(self, request: ConnectorRequest, answer: ConnectorAnswer | None) -> None:
        """It took effect, by the amount that was asked for, as far as the PSP tells now."""
        assert answer is not None
        assert answer.verdict is self.accepted(request.kind)
        assert answer.outcome is not None
        if request.kind not in self.notified:
            assert answer.outcome.amount_reported_minor == request.amount_minor

    async def test_void_after_a_partial_capture_releases_the_rest(self, psp: Psp) -> None:
        if CaptureMethod.MANUAL_MULTIPLE not in psp.connector.capabilities.capture_methods:
            pytest.skip("the one capture leaves nothing")
        request = request_of()
        target = (await send(psp.connector, request)).connector_transaction_id
        part = request_of(K.CAPTURE, 300, target_transaction_id=target)
        await send(psp.connector, part)
        void = request_of(K.VOID, 700, target_transaction_id=target)
        assert (await send(psp.connector, void)).verdict is self.accepted(K.VOID)
        assert await psp.held_minor(request.reference) == 300

    # --- doubts ---

    @pytest.mark.parametrize(("kind", "fault"), DISTURBED)
    async def test_disturbed_request_is_in_doubt_and_becomes_what_the_psp_did(
        self, psp: Psp, kind: K, fault: Fault
    ) -> None:
        request = await prepared(psp, kind)
        psp.way.disturb(fault)
        impatient = await psp.impatient()
        assert is_doubt(await send(impatient, request))
        if not fault.arrives and kind is not K.VOID:
            # Nobody answers: nothing is known, and nothing is made up.
            assert is_doubt(await impatient.cancel(kind, request.reference, request))
        psp.way.clear()
        took_effect = await psp.effects(request.reference)
        assert took_effect == fault.arrives
        if kind is K.VOID:  # releases money, so it is repeated until it is confirmed
            assert (await send(psp.connector, request)).verdict is self.accepted(kind)
            assert await psp.effects(request.reference) == 1
            return
        told = await settled(psp, request)
        if took_effect and not psp.connector.capabilities.query_by_reference:
            assert told.verdict is Verdict.CANCELED
            if kind is K.AUTHORIZE:
                assert await psp.held_minor(request.reference) == 0
            return
        if took_effect:
            assert told.verdict is self.accepted(kind)
            return
        assert (told.delivery, told.verdict) == (Delivery.NOT_SENT, Verdict.UNKNOWN)
        assert told.reason == Reason.REFERENCE_CANCELED
        # Never again: a sender that was stopped all the while changes nothing.
        late = await send(psp.connector, request)
        assert late.verdict not in (Verdict.APPROVED, Verdict.PENDING)
        assert await psp.effects(request.reference) == 0

    @pytest.mark.parametrize("fault", [Fault.LOST, Fault.RESET, Fault.UNAVAILABLE])
    @pytest.mark.parametrize("kind", KINDS)
    async def test_request_that_is_disturbed_once_is_repeated_by_its_sender(
        self, psp: Psp, kind: K, fault: Fault
    ) -> None:
        request = await prepared(psp, kind)
        psp.way.disturb(fault, times=1)
        assert (await send(psp.connector, request)).verdict is self.accepted(kind)
        assert await psp.effects(request.reference) == 1

    @pytest.mark.parametrize("kind", sorted(SENT_KINDS))
    async def test_past_its_window_nothing_is_sent(self, psp: Psp, kind: K) -> None:
        request = await prepared(psp, kind)
        answer = await psp.connector.send(request, time.monotonic())
        assert (answer.delivery, answer.verdict) == (Delivery.NOT_SENT, Verdict.UNKNOWN)
        assert await psp.effects(request.reference) == 0

    async def test_cancelled_authorization_holds_nothing(self, psp: Psp) -> None:
        for capture in (False, True):
            request = request_of(capture=capture)
            await send(psp.connector, request)
            assert await psp.held_minor(request.reference) == 1000
            for _ in range(2):
                told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
                assert told.verdict is self.taken_back
            assert await psp.held_minor(request.reference) == 0

    async def test_cancelled_capture_is_given_back(self, psp: Psp) -> None:
        request = await prepared(psp, K.CAPTURE)
        await send(psp.connector, request)
        for _ in range(2):
            told = await psp.connector.cancel(K.CAPTURE, request.reference, request)
            assert told.verdict is self.taken_back

    # --- duplicates ---

    @pytest.mark.parametrize("kind", KINDS)
    async def test_second_request_with_a_reference_has_no_effect(self, psp: Psp, kind: K) -> None:
        request = await prepared(psp, kind)
        first = await send(psp.connector, request)
        second = await send(psp.connector, request)
        assert second.verdict is self.accepted(kind)
        assert second.connector_transaction_id == first.connector_transaction_id
        assert await psp.effects(request.reference) == 1
        assert psp.connector.capabilities.idempotent_by_reference

    @pytest.mark.parametrize("kind", KINDS)
    async def test_concurrent_requests_with_a_reference_take_effect_once(
        self, psp: Psp, kind: K
    ) -> None:
        request = await prepared(psp, kind)
        told = await asyncio.gather(*(send(psp.connector, request) for _ in range(5)))
        assert await psp.effects(request.reference) == 1
        accepted = self.accepted(kind)
        assert any(answer.verdict is accepted for answer in told)
        assert all(answer.verdict is accepted or is_doubt(answer) for answer in told)

    # --- declines ---

    async def test_every_decline_has_its_unified_code(self, psp: Psp) -> None:
        for token, code in psp.declines.items():
            request = request_of(payment_method_token=token)
            for answer in (await send(psp.connector, request), *await queried(psp, request)):
                assert answer is not None
                assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.DECLINED)
                assert answer.outcome is not None
                assert answer.outcome.response_code is code, token
                assert answer.outcome.connector_code
            assert await psp.held_minor(request.reference) == 0

    async def test_declined_follow_ups_leave_the_payment_as_it_was(self, psp: Psp) -> None:
        for kind, token in psp.follow_up_decline.items():
            request = await prepared(psp, kind, token)
            answer = await send(psp.connector, request)
            assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.DECLINED)
            assert answer.outcome is not None
            assert answer.outcome.response_code is ResponseCode.DO_NOT_HONOR

    # --- amounts ---

    async def test_amounts_are_reported_in_minor_units_of_every_currency(self, psp: Psp) -> None:
        for currency in psp.currencies:
            request = request_of(amount_minor=12_300, currency=currency)
            answer = await send(psp.connector, request)
            assert answer.verdict is Verdict.APPROVED, currency
            assert answer.currency == currency
            assert answer.outcome is not None
            assert answer.outcome.amount_reported_minor == 12_300, currency

    async def test_amount_that_the_psp_cannot_take_is_not_sent(self, psp: Psp) -> None:
        for amount_minor, currency in psp.inexpressible:
            request = request_of(amount_minor=amount_minor, currency=currency)
            answer = await send(psp.connector, request)
            assert (answer.delivery, answer.verdict) == (Delivery.NOT_SENT, Verdict.UNKNOWN)
            assert answer.reason in (Reason.AMOUNT_NOT_SUPPORTED, Reason.CURRENCY_NOT_SUPPORTED)
            assert await psp.effects(request.reference) == 0

    async def test_another_amount_than_was_asked_for_is_told(self, psp: Psp) -> None:
        psp.way.alter = psp.report_more
        answer = await send(psp.connector, request_of())
        assert answer.verdict is Verdict.APPROVED
        assert answer.outcome is not None
        assert answer.outcome.amount_reported_minor == 1001

    async def test_another_currency_than_was_asked_for_leaves_a_doubt(self, psp: Psp) -> None:
        psp.way.alter = psp.report_in_another_currency
        assert is_doubt(await send(psp.connector, request_of()))
