"""The connector to acquirers' hosts: its connections, its messages, and what answers mean."""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, cast

import pytest
import trustme

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.application.notifications import Notification, NotificationKind
from gateway.application.ports import ConnectorRequest
from gateway.connectors.iso8583.connector import Iso8583Connector, capabilities_of
from gateway.connectors.iso8583.host import (
    AcquirerHost,
    Event,
    HostAddress,
    HostLimits,
    _Link,
)
from gateway.connectors.iso8583.identity import identity_of
from gateway.connectors.iso8583.kind import Iso8583Kind, open_hosts
from gateway.connectors.iso8583.specification import (
    Specification,
    answer_mti,
    load_specification,
)
from gateway.connectors.kinds import AccountRefused
from gateway.connectors.simulator.launch import SimulatorProcess
from gateway.domain.errors import Reason
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    Mode,
    OperationKind,
    ResponseCode,
    Verdict,
)
from tests.addresses import resolving, swallowing
from tests.connector_conformance import SHORT_S, WAIT_S, is_doubt, outcome_of, request_of, send
from tests.foreign_host import ForeignHost, foreign_host
from tests.iso8583 import QUICK, ScriptedHost, scripted_host
from tests.simulators import running_simulator, standings_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

K = OperationKind
ONE = replace(QUICK, connections=1)
BINARY = (
    files("gateway.connectors.iso8583") / "specifications" / "reference-binary.toml"
).read_text()
TEXT = (files("gateway.connectors.iso8583") / "specifications" / "reference-text.toml").read_text()


@dataclass(slots=True)
class Acquirer:
    """A host that does what the test says, and a connector to it."""

    scripted: ScriptedHost
    host: AcquirerHost
    connector: Iso8583Connector
    events: Counter[Event]
    changed: asyncio.Event
    told: list[Notification]
    """What the connector was answered too late."""

    def start(
        self, request: ConnectorRequest, wait_s: float = WAIT_S
    ) -> asyncio.Task[ConnectorAnswer]:
        """Send in a task."""
        until = time.monotonic() + wait_s
        return asyncio.create_task(self.connector.send(request, until))

    async def counted(self, event: Event, count: int = 1) -> None:
        """Wait until an event was counted so often."""
        async with asyncio.timeout(WAIT_S):
            while self.events[event] < count:
                self.changed.clear()
                await self.changed.wait()


def connector_to(
    host: AcquirerHost,
    answer_timeout_s: float = WAIT_S,
    tell: Callable[[Notification], None] | None = None,
) -> Iso8583Connector:
    capabilities = capabilities_of(host.specification, Mode.TEST, answer_timeout_s)
    return Iso8583Connector(
        host, capabilities, terminal="TERM0001", merchant="MERCHANT1", tell=tell
    )


@asynccontextmanager
async def acquirer(
    specification: Specification | None = None,
    limits: HostLimits = ONE,
    answer_timeout_s: float = WAIT_S,
) -> AsyncIterator[Acquirer]:
    async with scripted_host() as (scripted, address):
        specification = specification or load_specification("reference-text")
        events: Counter[Event] = Counter()
        changed = asyncio.Event()

        def count(event: Event) -> None:
            events[event] += 1
            changed.set()

        host = AcquirerHost(address, specification, limits, count=count)
        told: list[Notification] = []
        connector = connector_to(host, answer_timeout_s, told.append)
        try:
            yield Acquirer(scripted, host, connector, events, changed, told)
        finally:
            await host.close()


def without_network_management() -> Specification:
    network = TEXT[TEXT.index("[network.sign_on]") : TEXT.index("[answers]")]
    return Specification("bare", TEXT.replace(network, ""))


def without_repeats() -> Specification:
    return Specification("once", TEXT.replace("repeats = true", "repeats = false"))


# --- connections ----------------------------------------------------------------------------------


async def test_connection_is_signed_on_before_anything_else_and_signed_off_at_the_end() -> None:
    async with acquirer() as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        assert [message["70"] for message in psp.scripted.network] == ["001"]
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        await psp.host.close()
        await line.lost.wait()
        assert [message["70"] for message in psp.scripted.network] == ["001", "002"]


async def test_refused_sign_on_and_no_host_at_all_are_requests_not_sent() -> None:
    async with acquirer() as psp:
        psp.scripted.sign_on_code = "91"
        answer = await psp.start(request_of(), SHORT_S)
        assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, Reason.CONNECT_FAILED)
        assert psp.scripted.requests.empty()
    nobody = HostAddress("127.0.0.1", 1, False, "reference-text", Mode.TEST)
    limits = replace(ONE, wait_timeout_s=SHORT_S)
    host = AcquirerHost(nobody, load_specification("reference-text"), limits)
    try:
        answer = await connector_to(host).send(request_of(), time.monotonic() + SHORT_S)
        assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, Reason.CONNECT_FAILED)
        # What may be sent at any time, as recovery sends a void, waits no longer for all that.
        for each in (request_of(), request_of(K.REVERSAL, target_reference=request_of().reference)):
            answer = await connector_to(host).send(each, math.inf)
            assert answer.reason == Reason.CONNECT_FAILED
        # That a reversal was not sent says nothing about what it was to take back.
        impatient = connector_to(host, SHORT_S)
        request = request_of()
        assert is_doubt(await impatient.cancel(K.AUTHORIZE, request.reference, request))
    finally:
        await host.close()


async def test_address_that_swallows_everything_leaves_the_hosts_others() -> None:
    async with scripted_host() as (scripted, address):
        named = replace(address, host="acquirer.test")
        limits = replace(ONE, connect_timeout_s=WAIT_S)
        with (
            swallowing(address.port) as nowhere,
            resolving("acquirer.test", nowhere, "127.0.0.1"),
        ):
            host = AcquirerHost(named, scripted.specification, limits)
            try:
                sending = asyncio.create_task(send(connector_to(host), request_of()))
                line, request = await scripted.request()
                line.answer(request)
                assert (await sending).verdict is Verdict.APPROVED
                assert scripted.lines == [line]
            finally:
                await host.close()


async def test_host_without_network_management_gets_requests_at_once() -> None:
    async with acquirer(without_network_management()) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        assert psp.scripted.network == []


async def test_terminals_that_answers_do_not_tell_apart_take_turns_with_a_number() -> None:
    text = TEXT.replace('match = ["11", "37", "41"]', 'match = ["11"]')
    async with acquirer(Specification("few", text)) as psp:
        other = Iso8583Connector(
            psp.host, psp.connector.capabilities, terminal="TERM0002", merchant="MERCHANT1"
        )
        order = request_of()
        first = psp.start(order)
        line, request = await psp.scripted.request()
        second = asyncio.create_task(send(other, order))
        await asyncio.sleep(0)
        assert psp.scripted.requests.empty()
        line.answer(request)
        line, request = await psp.scripted.request()
        assert request["41"] == "TERM0002"
        line.answer(request)
        for answer in await asyncio.gather(first, second):
            assert answer.verdict is Verdict.APPROVED


async def test_answers_are_found_in_any_order() -> None:
    async with acquirer() as psp:
        requests = [request_of(amount_minor=100 + number) for number in range(20)]
        sending = [psp.start(request) for request in requests]
        heard = [await psp.scripted.request() for _ in requests]
        for line, told in reversed(heard):
            line.answer(told)
        for request, answer in zip(requests, await asyncio.gather(*sending), strict=True):
            assert answer.outcome is not None
            assert answer.outcome.amount_reported_minor == request.amount_minor
        assert len(psp.scripted.lines) == 1


@pytest.mark.parametrize(
    ("code", "amount_minor", "verdict"),
    [
        ("00", 1000, Verdict.APPROVED),
        ("00", 1300, Verdict.APPROVED),
        ("05", 1000, Verdict.DECLINED),
    ],
)
async def test_late_answer_is_told_as_a_fact_with_its_amount(
    code: str, amount_minor: int, verdict: Verdict
) -> None:
    async with acquirer(answer_timeout_s=SHORT_S) as psp:
        order = request_of()
        sending = psp.start(order)
        line, late = await psp.scripted.request()
        answer = await sending
        assert is_doubt(answer)
        assert answer.reason == Reason.ANSWER_TIMED_OUT
        line.answer(late, code, de4=f"{amount_minor:012}", de38="A00001")
        await psp.counted(Event.ANSWERED_LATE)
        line.answer(late, code, de4=f"{amount_minor:012}", de38="A00001")
        await psp.counted(Event.ANSWERED_LATE, 2)
        [told, again] = psp.told
        assert told.event_id == again.event_id
        assert (told.kind, told.event_type) == (NotificationKind.AUTHORIZATION, "0110")
        assert (told.reference, told.amount_minor) == (order.reference, amount_minor)
        assert told.answer is not None
        assert told.answer.verdict is verdict
        assert f"m0100s{late['11']}" in told.answer.connector_transaction_id
        assert told.answer.outcome is not None
        assert told.answer.outcome.amount_reported_minor == amount_minor


async def test_second_answer_is_told_only_where_it_says_something_else() -> None:
    async with acquirer() as psp:
        order = request_of()
        sending = psp.start(order)
        line, request = await psp.scripted.request()
        line.answer(request)
        line.answer(request)
        line.answer(request, "05")
        line.answer(request, de49="840")
        assert (await sending).verdict is Verdict.APPROVED
        await psp.counted(Event.ANSWERED_TWICE, 3)
        assert psp.events[Event.UNMATCHED] == 0
        # An answer in another currency settles nothing, the first time or later.
        [told] = psp.told
        assert told.reference == order.reference
        assert told.answer is not None
        assert told.answer.verdict is Verdict.DECLINED


async def test_late_and_repeated_answers_to_a_reversal_settle_nothing_by_themselves() -> None:
    async with acquirer(answer_timeout_s=SHORT_S) as psp:
        lost = request_of()
        assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, lost.reference, lost))
        line, first = await psp.scripted.request()
        line.answer(first)
        await psp.counted(Event.ANSWERED_LATE)
        cancelling = asyncio.create_task(psp.connector.cancel(K.AUTHORIZE, lost.reference, lost))
        line, second = await psp.scripted.request()
        assert second == first
        line.answer(second)
        line.answer(second)
        assert (await cancelling).verdict is Verdict.CANCELED
        await psp.counted(Event.ANSWERED_TWICE)
        assert psp.told == []


async def test_answer_may_come_on_another_connection() -> None:
    async with acquirer(limits=replace(ONE, connections=2)) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        await psp.counted(Event.CONNECTED, 2)
        [other] = [each for each in psp.scripted.lines if each is not line]
        other.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        line.answer(request)
        await psp.counted(Event.ANSWERED_TWICE)


async def test_answer_to_what_a_lost_connection_left_in_doubt_is_told() -> None:
    async with acquirer(without_repeats(), replace(ONE, connections=2)) as psp:
        order = request_of()
        sending = psp.start(order)
        line, request = await psp.scripted.request()
        await psp.counted(Event.CONNECTED, 2)
        [other] = [each for each in psp.scripted.lines if each is not line]
        line.transport.abort()
        assert is_doubt(await sending)
        other.answer(request)
        await psp.counted(Event.ANSWERED_LATE)
        assert [each.reference for each in psp.told] == [order.reference]


@pytest.mark.parametrize("changed", [{"de11": "999999"}, {"de37": "0" * 12}, {"de41": "OTHER"}])
async def test_answer_with_another_number_is_none(changed: dict[str, str]) -> None:
    async with acquirer(answer_timeout_s=SHORT_S) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.answer(request, **changed)
        assert is_doubt(await sending)
        assert psp.events[Event.UNMATCHED] == 1


async def test_lost_connection_is_repeated_as_a_repeat_with_the_same_numbers() -> None:
    async with acquirer() as psp:
        sending = psp.start(request_of())
        line, first = await psp.scripted.request()
        line.transport.abort()
        line, second = await psp.scripted.request()
        assert (first.pop("t"), second["t"]) == ("0100", "0101")
        assert first == {number: value for number, value in second.items() if number != "t"}
        line.answer(second)
        answer = await sending
        assert answer.verdict is Verdict.APPROVED
        assert "m0100s" in answer.connector_transaction_id


async def test_lost_connection_leaves_a_doubt_where_the_host_takes_no_repeats() -> None:
    async with acquirer(without_repeats()) as psp:
        sending = psp.start(request_of())
        line, _ = await psp.scripted.request()
        line.transport.abort()
        answer = await sending
        assert is_doubt(answer)
        assert answer.reason == Reason.CONNECTION_LOST
        # An advice has to be taken once, however often it comes.
        target = "m0100s000001t1121163158rABCDEF012345n1000aA00001"
        sending = psp.start(request_of(K.CAPTURE, target_transaction_id=target, final=True))
        line, request = await psp.scripted.request()
        line.transport.abort()
        line, request = await psp.scripted.request()
        assert request["t"] == "0121"
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED


async def test_requests_with_the_same_numbers_are_never_in_flight_together() -> None:
    async with acquirer() as psp:
        request = request_of()
        first, second = psp.start(request), psp.start(request)
        line, heard = await psp.scripted.request()
        answer = await psp.start(request, SHORT_S)
        assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, Reason.CONNECTOR_BUSY)
        assert psp.scripted.requests.empty()
        line.answer(heard)
        line, heard = await psp.scripted.request()
        line.answer(heard)
        for answer in await asyncio.gather(first, second):
            assert answer.verdict is Verdict.APPROVED


async def test_no_more_than_the_limit_is_in_flight_and_the_next_waits_its_turn() -> None:
    async with acquirer(limits=replace(ONE, in_flight_max=1, waiters_max=1)) as psp:
        first = psp.start(request_of())
        line, request = await psp.scripted.request()
        second = psp.start(request_of())
        await asyncio.sleep(0)
        refused = await psp.start(request_of())
        assert (refused.delivery, refused.reason) == (Delivery.NOT_SENT, Reason.CONNECTOR_BUSY)
        assert psp.scripted.requests.empty()
        line.answer(request)
        assert (await first).verdict is Verdict.APPROVED
        line, request = await psp.scripted.request()
        line.answer(request)
        assert (await second).verdict is Verdict.APPROVED


async def test_idle_connection_is_tested_and_kept_while_it_answers() -> None:
    async with acquirer(limits=replace(ONE, echo_interval_s=0.05)) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        await psp.counted(Event.ECHOED, 2)
        assert len(psp.scripted.lines) == 1


async def test_silent_connection_is_made_anew() -> None:
    limits = replace(ONE, echo_interval_s=0.05, network_timeout_s=0.1)
    async with acquirer(limits=limits) as psp:
        psp.scripted.answers_echoes = False
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.answer(request)
        await sending
        await line.lost.wait()
        await psp.counted(Event.CONNECTED, 2)


async def test_connection_that_says_nothing_takes_no_more_requests() -> None:
    async with acquirer(limits=replace(ONE, network_timeout_s=0.5)) as psp:
        psp.scripted.answers_echoes = False
        first = psp.start(request_of())
        line, _ = await psp.scripted.request()
        await asyncio.wait_for(psp.scripted.echoed.wait(), WAIT_S)
        second = psp.start(request_of())
        for _ in range(2):  # the second, and the first one's repeat
            other, request = await psp.scripted.request()
            assert other is not line
            other.answer(request)
        assert (await first).verdict is Verdict.APPROVED
        assert (await second).verdict is Verdict.APPROVED


async def test_host_that_takes_its_time_keeps_its_connection() -> None:
    async with acquirer(limits=replace(ONE, network_timeout_s=1.0)) as psp:
        first = psp.start(request_of())
        line, slow = await psp.scripted.request()
        await psp.counted(Event.ECHOED)
        second = psp.start(request_of())
        _, quick = await psp.scripted.request()
        line.answer(quick)
        line.answer(slow)
        assert (await first).verdict is Verdict.APPROVED
        assert (await second).verdict is Verdict.APPROVED
        assert psp.scripted.lines == [line]


async def test_connection_that_cannot_be_tested_ends_with_a_request_that_nothing_came_after() -> (
    None
):
    async with acquirer(without_network_management(), answer_timeout_s=SHORT_S) as psp:
        assert is_doubt(await psp.start(request_of()))
        line, _ = await psp.scripted.request()
        await asyncio.wait_for(line.lost.wait(), WAIT_S)
        await psp.counted(Event.CONNECTED, 2)


async def test_connection_that_is_lost_as_often_as_it_is_made_is_made_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(pause_s: float) -> None:
        pauses.append(pause_s)
        await sleep(0)

    limits = HostLimits(connections=1)
    async with acquirer(without_repeats(), limits) as psp:
        monkeypatch.setattr(asyncio, "sleep", noted)
        monkeypatch.setattr(random, "uniform", lambda _, most: most)
        for count in (1, 5):
            # One that was of use is missed at once.
            sending = psp.start(request_of())
            line, request = await psp.scripted.request()
            line.answer(request)
            assert (await sending).verdict is Verdict.APPROVED
            for lost in range(count, count + 4):
                # As of a host in maintenance, which takes the sign-on and ends the connection.
                psp.scripted.lines[-1].transport.abort()
                await psp.counted(Event.CONNECTED, lost + 1)
        assert pauses == [limits.reconnect_s_min * factor for factor in (1, 2, 4, 8)] * 2


async def test_host_that_signs_off_gets_no_more_and_may_answer_what_it_has() -> None:
    async with acquirer(limits=QUICK) as psp:
        first = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.write({"t": "0800", "7": "1121163158", "11": "000007", "70": "002"})
        await asyncio.wait_for(psp.scripted.answered.wait(), WAIT_S)
        second = psp.start(request_of())
        other, heard = await psp.scripted.request()
        assert other is not line
        line.answer(request)
        other.answer(heard)
        assert (await first).verdict is Verdict.APPROVED
        assert (await second).verdict is Verdict.APPROVED
        await line.lost.wait()
        told = [message for message in psp.scripted.network if message["t"] == "0810"]
        assert [(message["11"], message["39"]) for message in told] == [("000007", "00")]


async def test_host_that_signs_off_may_answer_on_another_connection() -> None:
    async with acquirer(limits=QUICK) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        await psp.counted(Event.CONNECTED, 2)
        [other] = [each for each in psp.scripted.lines if each is not line]
        line.write({"t": "0800", "7": "1121163158", "11": "000007", "70": "002"})
        await asyncio.wait_for(psp.scripted.answered.wait(), WAIT_S)
        other.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        await line.lost.wait()
        assert psp.events[Event.UNMATCHED] == 0


async def test_hosts_own_echo_is_answered() -> None:
    async with acquirer() as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.write({"t": "0800", "7": "1121163158", "11": "000009", "70": "301"})
        line.answer(request)
        await sending
        await asyncio.wait_for(psp.scripted.answered.wait(), WAIT_S)
        assert psp.scripted.network[-1]["t"] == "0810"
        assert psp.scripted.network[-1]["11"] == "000009"


async def test_garbage_between_answers_is_passed_over_and_a_frame_too_long_ends_the_line() -> None:
    async with acquirer(without_repeats()) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.transport.write(b"\x00\x05<html" + b"\x00\x00")
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        assert psp.events[Event.UNDECODABLE] == 1
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.transport.write(b"\xff\xff")
        answer = await sending
        assert (is_doubt(answer), answer.reason) == (True, Reason.CONNECTION_LOST)
        await line.lost.wait()


@pytest.mark.parametrize("unanswerable", [{"t": "080X"}, {"t": "0800", "11": "      "}])
async def test_network_request_that_no_answer_can_be_written_to_is_passed_over(
    unanswerable: dict[str, str],
) -> None:
    async with acquirer(without_repeats()) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        echo = {"t": "0800", "7": "1121163158", "11": "000009", "70": "301"}
        framing, encoded = psp.scripted.specification.framing, line.encoded(echo)
        for name, text in unanswerable.items():
            encoded = encoded.replace(echo[name].encode(), text.encode(), 1)
        line.transport.write(framing.pack(encoded))
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        assert psp.events[Event.UNDECODABLE] == 1
        assert not line.lost.is_set()


async def test_answer_counts_that_came_whole_before_the_stream_broke() -> None:
    async with acquirer(without_repeats()) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        told = {**request, "t": "0110", "39": "00"}
        answer = psp.scripted.specification.framing.pack(line.encoded(told))
        line.transport.write(answer + b"\xff\xff")
        assert (await sending).verdict is Verdict.APPROVED
        await line.lost.wait()
        assert psp.events[Event.UNDECODABLE] == 1


async def test_line_of_nothing_but_garbage_is_given_up() -> None:
    async with acquirer(without_repeats()) as psp:
        sending = psp.start(request_of())
        line, _ = await psp.scripted.request()
        line.transport.write(b"\x00\x05<html" * 20)
        assert is_doubt(await sending)
        await line.lost.wait()


async def test_half_an_answer_is_no_answer() -> None:
    async with acquirer(without_repeats()) as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        frame = psp.scripted.specification.framing.pack(
            psp.scripted.specification.encode({**request, "t": "0110", "39": "00"})
        )
        line.transport.write(frame[:-1])
        line.transport.close()
        assert is_doubt(await sending)


async def test_cancelled_caller_leaves_the_connection_to_the_others() -> None:
    async with acquirer() as psp:
        sending = psp.start(request_of())
        line, late = await psp.scripted.request()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        line.answer(late)
        await psp.counted(Event.ANSWERED_LATE)
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.answer(request)
        assert (await sending).verdict is Verdict.APPROVED
        assert len(psp.scripted.lines) == 1


async def test_tls_is_verified_and_carries_the_messages(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    async with scripted_host(tls=context) as (scripted, address):
        host = AcquirerHost(address, scripted.specification, ONE, ca_file=str(ca_file))
        stranger = AcquirerHost(address, scripted.specification, ONE)
        try:
            sending = asyncio.create_task(send(connector_to(host), request_of()))
            line, request = await scripted.request()
            line.answer(request)
            assert (await sending).verdict is Verdict.APPROVED
            answer = await connector_to(stranger).send(request_of(), time.monotonic() + SHORT_S)
            assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, Reason.CONNECT_FAILED)
            # The connection that is lost in TLS is made again.
            line.transport.close()
            sending = asyncio.create_task(send(connector_to(host), request_of()))
            line, request = await scripted.request()
            line.answer(request)
            assert (await sending).verdict is Verdict.APPROVED
        finally:
            await host.close()
            await stranger.close()


# --- messages -------------------------------------------------------------------------------------


async def test_answer_counts_that_came_whole_before_tls_broke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    of_nobody = b"\x17\x03\x03\x00\x20" + bytes(32)
    decrypt = _Link._decrypt
    async with scripted_host(tls=context) as (scripted, address):
        host = AcquirerHost(address, scripted.specification, ONE, ca_file=str(ca_file))
        try:
            sending = asyncio.create_task(send(connector_to(host), request_of()))
            line, request = await scripted.request()
            monkeypatch.setattr(
                _Link, "_decrypt", lambda link, data: decrypt(link, data + of_nobody)
            )
            line.answer(request)
            assert (await sending).verdict is Verdict.APPROVED
            await line.lost.wait()
        finally:
            await host.close()


async def test_authorization_tells_the_acquirers_token_and_no_card_number() -> None:
    async with acquirer() as psp:
        order = request_of(fields={"channel": "CHANNEL_MAIL_ORDER"})
        sending = psp.start(order)
        line, request = await psp.scripted.request()
        identity = identity_of(order.reference, "alphanumeric")
        assert request == {
            "t": "0100",
            "3": "000000",
            "4": "000000001000",
            "7": identity.time,
            "11": identity.stan,
            "12": identity.time[4:],
            "13": identity.time[:4],
            "22": "010",
            "25": "08",
            "37": identity.rrn,
            "41": "TERM0001",
            "42": "MERCHANT1",
            "47": "tok_visa",
            "48": order.reference,
            "49": "978",
            "62": "pay_1",
        }
        line.answer(request, de38="A1B2C3")
        answer = await sending
        expected = (
            f"y{identity.year}m0100s{identity.stan}t{identity.time}r{identity.rrn}n1000aA1B2C3"
        )
        assert answer.connector_transaction_id == expected
        assert answer.outcome is not None
        assert answer.outcome.retrieval_reference_number == identity.rrn


async def test_follow_ups_name_the_authorization_by_its_numbers_and_its_code() -> None:
    target = "m0100s000042t1121163158rABCDEF012345n1000aA1B2C3"
    original = "01000000421121163158" + "0" * 22
    async with acquirer() as psp:
        for kind, mti, final, told in (
            (K.CAPTURE, "0120", True, {"60": "FINAL", "38": "A1B2C3"}),
            (K.CAPTURE, "0120", False, {"60": "MORE"}),
            (K.VOID, "0400", False, {"38": "A1B2C3"}),
            (K.REFUND, "0200", False, {"3": "200000"}),
            (K.INCREMENT, "0100", False, {"60": "INCREMENT"}),
        ):
            sending = psp.start(request_of(kind, 300, target_transaction_id=target, final=final))
            line, request = await psp.scripted.request()
            assert (request["t"], request["90"], request["4"]) == (mti, original, f"{300:012}")
            assert told.items() <= request.items()
            line.answer(request)
            assert (await sending).verdict is Verdict.APPROVED
        answer = await send(psp.connector, request_of(K.CAPTURE, target_transaction_id="pi_1"))
        assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, Reason.INVALID_REQUEST)


@pytest.mark.parametrize(
    ("code", "verdict", "response_code"),
    [
        ("00", Verdict.APPROVED, ResponseCode.APPROVED),
        ("08", Verdict.APPROVED, ResponseCode.APPROVED),
        ("10", Verdict.APPROVED, ResponseCode.PARTIALLY_APPROVED),
        ("51", Verdict.DECLINED, ResponseCode.INSUFFICIENT_FUNDS),
        ("91", Verdict.DECLINED, ResponseCode.ISSUER_UNAVAILABLE),
        ("Z9", Verdict.DECLINED, ResponseCode.DECLINED_OTHER),
        ("30", Verdict.FAILED, ResponseCode.REJECTED_BY_CONNECTOR),
    ],
)
async def test_codes_of_answers(code: str, verdict: Verdict, response_code: ResponseCode) -> None:
    async with acquirer() as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        line.answer(request, code, de4=f"{600:012}")
        answer = await sending
        assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, verdict)
        assert answer.outcome is not None
        assert answer.outcome.response_code is response_code
        assert (answer.outcome.connector_code, answer.outcome.amount_reported_minor) == (code, 600)


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "09"},
        {"code": "94"},
        {"de49": "840"},
        {"de49": "000"},
        {"de48": "op_of_another_request-1"},
        {"de39": ""},
        {"code": "10", "de4": ""},
        # Approved, and nothing of it.
        {"de4": "0" * 12},
        {"code": "10", "de4": "0" * 12},
    ],
)
async def test_answer_that_settles_nothing_leaves_a_doubt(changes: dict[str, str]) -> None:
    async with acquirer() as psp:
        sending = psp.start(request_of())
        line, request = await psp.scripted.request()
        for number in [key for key in changes if not changes[key]]:
            request.pop(number.removeprefix("de"), None)
        told = {key: value for key, value in changes.items() if value and key != "code"}
        if "de39" in changes:
            answer = {n: request[n] for n in ("11", "37", "41")}
            line.write({"t": "0110", **answer})
        else:
            line.answer(request, changes.get("code", "00"), **told)
        answer_ = await sending
        assert (is_doubt(answer_), answer_.reason) == (True, Reason.ANSWER_UNUSABLE)


# --- reversals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["9" * 25, "9" * 5000, "much", str(2**50 + 1)], ids=len)
async def test_amount_that_no_amount_can_be_is_not_taken_for_one(told: str) -> None:
    text = TEXT.replace('amount = "4"', 'amount = "62"')
    text = text.replace('62 = "ans ...255"', '62 = "ans ....9999"')
    async with acquirer(Specification("amounts-elsewhere", text)) as psp:
        psp.scripted.specification = psp.host.specification
        for code, is_usable in (("00", True), ("10", False)):
            sending = psp.start(request_of())
            line, request = await psp.scripted.request()
            line.answer(request, code, de62=told)
            answer = await sending
            if is_usable:
                assert answer.verdict is Verdict.APPROVED
                assert outcome_of(answer).amount_reported_minor is None
            else:  # approved in part, and nobody knows how much
                assert is_doubt(answer)


async def test_reversal_names_the_lost_request_and_is_repeated_with_the_same_numbers() -> None:
    async with acquirer(answer_timeout_s=SHORT_S) as psp:
        order = request_of()
        sending = psp.start(order)
        _, lost = await psp.scripted.request()
        assert is_doubt(await sending)
        seen, told = [], None
        for is_repeat, code in ((False, None), (True, "00")):
            # As another process would: from the reference and the operation alone.
            order.is_repeat = is_repeat
            other = connector_to(psp.host, SHORT_S)
            cancelling = asyncio.create_task(other.cancel(K.AUTHORIZE, order.reference, order))
            line, request = await psp.scripted.request()
            seen.append(request)
            if code is not None:
                line.answer(request, code)
            told = await cancelling
            assert is_doubt(told) == (code is None)
        assert told is not None
        assert told.verdict is Verdict.CANCELED
        assert (seen[0]["t"], seen[1]["t"]) == ("0420", "0421")
        assert seen[0] | {"t": "0421"} == seen[1]
        assert seen[0]["90"] == f"0100{lost['11']}{lost['7']}{'0' * 22}"
        assert seen[0]["37"] == lost["37"]
        assert seen[0]["48"] == lost["48"]
        assert seen[0]["4"] == lost["4"]
        assert seen[0]["11"] != lost["11"]


@pytest.mark.parametrize("refuses_late", [True, False])
@pytest.mark.parametrize("code", ["00", "21", "25", "12", "96", "94"])
async def test_only_what_the_host_promises_settles_a_reversal(
    code: str, refuses_late: bool
) -> None:
    text = TEXT.replace(
        "refuses_late_originals = true", f"refuses_late_originals = {str(refuses_late).lower()}"
    )
    async with acquirer(Specification("changed", text)) as psp:
        order = request_of(capture=True)
        cancelling = asyncio.create_task(psp.connector.cancel(K.AUTHORIZE, order.reference, order))
        line, request = await psp.scripted.request()
        assert request["90"].startswith("0200")
        line.answer(request, code)
        told = await cancelling
        if code == "00":
            assert (told.delivery, told.verdict) == (Delivery.ANSWERED, Verdict.CANCELED)
        elif code in ("21", "25") and refuses_late:
            assert (told.delivery, told.reason) == (Delivery.NOT_SENT, Reason.REFERENCE_CANCELED)
        else:
            assert is_doubt(told)


async def test_what_released_money_is_not_taken_back() -> None:
    async with acquirer() as psp:
        for kind in (K.VOID, K.REVERSAL):
            request = request_of(kind)
            assert is_doubt(await psp.connector.cancel(kind, request.reference, request))
        assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, "op_1-1", None))
        assert psp.scripted.lines == []


# --- the simulator as a host ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    directory = tmp_path_factory.mktemp("binary")
    with running_simulator(directory, iso8583_specification="reference-binary") as process:
        yield process


@asynccontextmanager
async def connected(simulator: SimulatorProcess) -> AsyncIterator[Iso8583Connector]:
    hosts = open_hosts(f"sim={simulator.iso8583_url}", ONE)
    try:
        yield connector_to(hosts["sim"])
    finally:
        await hosts["sim"].close()


async def test_host_of_another_make_is_spoken_to_by_its_specification(
    binary: SimulatorProcess,
) -> None:
    """Packed decimals behind a TPDU; it knows requests by nothing but their numbers."""
    async with connected(binary) as connector:
        order = request_of()
        answer = await send(connector, order)
        assert answer.verdict is Verdict.APPROVED
        target = answer.connector_transaction_id
        capture = request_of(K.CAPTURE, 600, target_transaction_id=target, final=True)
        assert (await send(connector, capture)).verdict is Verdict.APPROVED
        refund = request_of(K.REFUND, 100, target_transaction_id=target)
        assert (await send(connector, refund)).verdict is Verdict.APPROVED
        assert _held(binary, order) == 500
        assert (await connector.cancel(K.REFUND, refund.reference, refund)).verdict is (
            Verdict.CANCELED
        )
        assert _held(binary, order) == 600

        voided = request_of()
        target = (await send(connector, voided)).connector_transaction_id
        void = request_of(K.VOID, 1000, target_transaction_id=target)
        assert (await send(connector, void)).verdict is Verdict.APPROVED
        assert _held(binary, voided) == 0

        never = request_of()
        told = await connector.cancel(K.AUTHORIZE, never.reference, never)
        assert (told.delivery, told.reason) == (Delivery.NOT_SENT, Reason.REFERENCE_CANCELED)
        assert (await send(connector, never)).verdict is not Verdict.APPROVED

        for kind in (K.INCREMENT, K.CAPTURE):  # which it has no message for
            request = request_of(kind, target_transaction_id=target)
            answer = await send(connector, request)
            assert answer.reason == Reason.OPERATION_NOT_SUPPORTED


@pytest.mark.parametrize("currency", ["000", "999"])
async def test_host_charges_nothing_in_no_currency(binary: SimulatorProcess, currency: str) -> None:
    text = BINARY.replace('49 = "$currency"', f'49 = "{currency}"')
    address = HostAddress.parse(str(binary.iso8583_url))
    host = AcquirerHost(address, Specification("no-currency", text), ONE)
    try:
        order = request_of()
        assert (await send(connector_to(host), order)).delivery is Delivery.MAY_HAVE_BEEN_SENT
    finally:
        await host.close()
    assert _held(binary, order) == 0


def _held(simulator: SimulatorProcess, order: ConnectorRequest) -> int:
    identity = identity_of(order.reference, "date")
    reference = f"TERM0001-{identity.stan}-{identity.time}"
    return sum(each.open_minor + each.net_minor for each in standings_of(simulator, reference))


async def test_host_knows_after_a_restart_what_it_knew(tmp_path: Path) -> None:
    with running_simulator(tmp_path, iso8583_specification="reference-text") as simulator:
        async with connected(simulator) as connector:
            order = request_of()
            target = (await send(connector, order)).connector_transaction_id
    with running_simulator(tmp_path, iso8583_specification="reference-text") as simulator:
        async with connected(simulator) as connector:
            void = request_of(K.VOID, 1000, target_transaction_id=target)
            assert (await send(connector, void)).verdict is Verdict.APPROVED
        (standing,) = standings_of(simulator, order.reference)
        assert (standing.account, standing.payment_id) == ("TERM0001", "pay_1")
        assert not standing.stands


class ApprovingInPart:
    """A host that approves 6.00 of whatever is asked for."""

    def __init__(self, specification: Specification, code: str) -> None:
        self.specification = specification
        self.sent: list[dict[str, str]] = []
        self._code = code

    async def exchange(self, fields: dict[str, str], **_: object) -> dict[str, str]:
        """Implements AcquirerHost."""
        self.sent.append(fields)
        kept = ("11", "37", "41", "49")
        echoed: dict[str, str] = {each: fields[each] for each in kept if each in fields}
        return {**echoed, "t": answer_mti(fields["t"]), "39": self._code, "4": f"{600:012}"}


@pytest.mark.parametrize(
    ("specification", "code", "told"),
    [
        ("reference-binary", "10", {"95": "{:012}000000000000D00000000D00000000"}),
        ("reference-1993", "002", {"4": "{:012}"}),
    ],
)
@pytest.mark.parametrize("captured_minor", [0, 200])
async def test_a_void_says_what_stands_afterwards_whatever_was_approved_of_the_original_amount(
    specification: str, code: str, told: dict[str, str], captured_minor: int
) -> None:
    host = ApprovingInPart(load_specification(specification), code)
    connector = connector_to(cast("AcquirerHost", host), WAIT_S)
    approved = await send(connector, request_of(amount_minor=1000))
    assert approved.outcome is not None
    assert approved.outcome.amount_reported_minor == 600
    target = approved.connector_transaction_id
    void = request_of(
        K.VOID,
        600 - captured_minor,
        target_transaction_id=target,
        captured_minor=captured_minor,
    )
    await send(connector, void)
    expected = {number: text.format(captured_minor) for number, text in told.items()}
    assert {number: host.sent[-1][number] for number in told} == expected


async def test_the_host_refuses_a_void_that_says_something_else_of_what_stands(
    binary: SimulatorProcess,
) -> None:
    async with connected(binary) as connector:
        target = (await send(connector, request_of())).connector_transaction_id
        for captured_minor, verdict in ((1, Verdict.FAILED), (0, Verdict.APPROVED)):
            void = request_of(K.VOID, target_transaction_id=target, captured_minor=captured_minor)
            assert (await send(connector, void)).verdict is verdict


async def test_partial_approval_and_another_amount_are_told(binary: SimulatorProcess) -> None:
    async with connected(binary) as connector:
        for token, code, amount_minor, avs_code in (
            ("tok_partial_approval", ResponseCode.PARTIALLY_APPROVED, 500, ""),
            ("tok_wrong_amount", ResponseCode.APPROVED, 1001, ""),
            ("tok_avs_z", ResponseCode.APPROVED, 1000, "Z"),
        ):
            answer = await send(connector, request_of(payment_method_token=token))
            assert answer.verdict is Verdict.APPROVED
            assert answer.outcome is not None
            assert answer.outcome.response_code is code
            assert answer.outcome.amount_reported_minor == amount_minor
            assert answer.outcome.avs_code == avs_code
        advised = await send(connector, request_of(payment_method_token="tok_advice_retry_later"))
        assert advised.outcome is not None
        told = (advised.outcome.advice_scheme, advised.outcome.advice_code)
        assert told == ("mastercard", "02")


# --- accounts -------------------------------------------------------------------------------------

CREDENTIALS = {"host": "acme", "terminal_id": "TERM0001", "merchant_id": "MERCHANT1"}


def kind() -> Iso8583Kind:
    url = "tcp://127.0.0.1:1?specification=reference-binary&mode=test"
    return Iso8583Kind(open_hosts(f"acme={url}"))


@pytest.mark.parametrize(
    ("mode", "changes", "told"),
    [
        (Mode.TEST, {"host": "other"}, "host of the settings"),
        (Mode.TEST, {"terminal_id": "TERMINAL1"}, "terminal_id"),
        (Mode.TEST, {"merchant_id": "a b"}, "merchant_id"),
        (Mode.TEST, {"acquirer_id": "12a"}, "acquirer_id"),
        (Mode.TEST, {"secret": "x"}, "the credentials must be"),
        (Mode.LIVE, {}, "serves test accounts"),
    ],
)
def test_account_that_the_host_cannot_serve_is_refused(
    mode: Mode, changes: dict[str, str], told: str
) -> None:
    with pytest.raises(AccountRefused, match=told):
        kind().check(mode, CREDENTIALS | changes, {})


def test_account_can_do_what_its_host_has_messages_for() -> None:
    account = ConnectorAccount(
        "mer_1", "acc_1", Mode.TEST, "iso8583", Sealed(b"", WrappedKey("", b""))
    )
    connector = kind().connect(account, CREDENTIALS)
    assert K.INCREMENT not in connector.capabilities.operations
    assert connector.capabilities.answer_timeout_s == 20
    narrow = replace(account, capabilities={"currencies": ["EUR"], "operations": ["AUTHORIZE"]})
    assert set(kind().connect(narrow, CREDENTIALS).capabilities.amounts or {}) == {"EUR"}
    with pytest.raises(AccountRefused, match="INCREMENT"):
        kind().check(Mode.TEST, CREDENTIALS, {"operations": ["INCREMENT"]})


# --- a host of another make -----------------------------------------------------------------------


@asynccontextmanager
async def foreign(
    answer_timeout_s: float = WAIT_S,
) -> AsyncIterator[tuple[ForeignHost, Iso8583Connector]]:
    async with foreign_host() as (host, port):
        url = f"tcp://127.0.0.1:{port}?specification=reference-1993&mode=test"
        hosts = open_hosts(f"other={url}", ONE)
        try:
            yield host, connector_to(hosts["other"], answer_timeout_s)
        finally:
            await hosts["other"].close()


async def test_host_of_another_make_and_edition_is_spoken_to_from_the_data_file_alone() -> None:
    async with foreign() as (host, connector):
        order = request_of(amount_minor=1000)
        answer = await send(connector, order)
        assert answer.verdict is Verdict.APPROVED
        assert answer.outcome is not None
        assert answer.outcome.retrieval_reference_number == "H00000000001"
        assert answer.outcome.network_code_scheme == "iso8583_1993"
        assert (answer.currency, answer.outcome.amount_reported_minor) == ("EUR", 1000)
        target = answer.connector_transaction_id
        capture = request_of(K.CAPTURE, 600, target_transaction_id=target, final=True)
        assert (await send(connector, capture)).verdict is Verdict.APPROVED
        assert host.standing_minor == 1000  # 400 are held yet
        refund = request_of(K.REFUND, 100, target_transaction_id=target)
        assert (await send(connector, refund)).verdict is Verdict.APPROVED
        assert host.standing_minor == 900
        assert (await connector.cancel(K.REFUND, refund.reference, refund)).verdict is (
            Verdict.CANCELED
        )
        assert host.standing_minor == 1000

        sale = request_of(capture=True, amount_minor=50)
        assert (await send(connector, sale)).verdict is Verdict.APPROVED
        voided = request_of(amount_minor=70)
        target = (await send(connector, voided)).connector_transaction_id
        void = request_of(K.VOID, 70, target_transaction_id=target)
        assert (await send(connector, void)).verdict is Verdict.APPROVED
        assert host.standing_minor == 1050
        verified = await send(connector, request_of(K.VERIFY, 0))
        assert verified.verdict is Verdict.APPROVED
        assert [message[0] for message in host.seen] == [
            *("1804", "1100", "1220", "1200", "1420", "1200", "1100", "1420", "1100")
        ]

        short = request_of(payment_method_token="tok_short")
        declined = await send(connector, short)
        assert declined.outcome is not None
        assert declined.outcome.response_code is ResponseCode.INSUFFICIENT_FUNDS


async def test_doubts_at_a_host_of_another_make_end_by_its_reversals() -> None:
    async with foreign(SHORT_S) as (host, connector):
        host.mute = 1
        lost = request_of()
        assert is_doubt(await send(connector, lost))
        assert host.standing_minor == 1000
        for _ in range(2):
            told = await connector.cancel(K.AUTHORIZE, lost.reference, lost)
            assert told.verdict is Verdict.CANCELED
        assert host.standing_minor == 0

        never = request_of()
        told = await connector.cancel(K.AUTHORIZE, never.reference, never)
        assert (told.delivery, told.reason) == (Delivery.NOT_SENT, Reason.REFERENCE_CANCELED)
        assert (await send(connector, never)).verdict is Verdict.FAILED
        assert host.standing_minor == 0
