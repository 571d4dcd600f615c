"""The door for notifications over real sockets: what it takes, what it refuses, and how early."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from aiohttp import web_protocol

from gateway.application.notifications import Notification, Receipt, Received
from gateway.application.ports import StoreUnavailable
from gateway.connectors.accounts import NotifiedAccount
from gateway.connectors.notifications import BadSignature, UnusableNotification
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_connector_account_id
from gateway.domain.model import Mode
from gateway.receiver import EVENTS_MAX, Receiver, ReceiverLimits

ACCOUNT = new_connector_account_id()
OTHER = new_connector_account_id()
BARE = new_connector_account_id()
PATH = f"/v1/notifications/psp/{ACCOUNT}"
OTHERS_PATH = f"/v1/notifications/psp/{OTHER}"
LIMITS = ReceiverLimits(
    body_bytes_max=2000,
    timeout_s=20,
    connections_max=20,
    in_flight_max=10,
    per_s_max=1000,
    retry_after_s=7,
)
WAIT_S = 30.0


class Source:
    """A PSP whose body is its event's id, signed by naming a secret."""

    connector = "psp"
    acknowledgement = b"[accepted]"
    told: list[Notification] | None = None

    def secrets(self, credentials: Mapping[str, str]) -> Sequence[str]:
        return ()

    def verify_and_parse(
        self, headers: Mapping[str, str], body: bytes, secrets: Sequence[str], now: datetime
    ) -> list[Notification]:
        if headers.get("x-signature") not in secrets:
            raise BadSignature("its signature does not hold")
        if body == b"garbage":
            raise UnusableNotification("it is no event")
        if body == b"defect":
            raise KeyError
        event = Notification("psp", body.decode(), "event", mode=Mode.TEST)
        if body == b"live":
            return [replace(event, mode=Mode.LIVE)]
        if body == b"many":
            return [replace(event, event_id=str(n)) for n in range(EVENTS_MAX + 1)]
        return [replace(event, event_id=each) for each in body.decode().split(",")]


class Kept:
    """What was kept; fails or waits as told to."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Semaphore(0)
        """Released by each that waits."""

    async def keep(self, received: Sequence[Received]) -> int:
        if self.gate is not None:
            self.waiting.release()
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        new = [each.notification.event_id for each in received]
        new = [each for each in new if each not in self.events]
        self.events += new
        return len(new)


class Door:
    """A running receiver, and what it told."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.receipts: Counter[Receipt] = Counter()
        self.port = 0

    def notification_received(self, connector: str, receipt: Receipt) -> None:
        self.receipts[receipt] += 1

    async def ask(self, raw: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send bytes on a connection of their own; the answer."""
        async with self.connected() as (reader, writer):
            writer.write(raw)
            return await answer(reader)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection, for at most WAIT_S."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(WAIT_S):
                yield reader, writer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def post(self, body: bytes = b"evt_1", **more: Any) -> int:
        """Send a notification; the status."""
        return (await self.ask(request(body, **more)))[0]


def request(
    body: bytes = b"evt_1",
    *,
    method: str = "POST",
    path: str = PATH,
    secret: str = "secret-1",
    content_type: str = "application/json; charset=utf-8",
    headers: str = "",
    length: int | None = None,
) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Signature: {secret}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n{headers}\r\n"
    ).encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return (
        int(first.split()[1]),
        headers,
        await reader.readexactly(int(headers["content-length"])),
    )


def account_of(account_id: str) -> NotifiedAccount | None:
    secrets = {
        ACCOUNT: ("secret-1", "secret-2"),
        OTHER: ("secret-1",),
        BARE: (),
    }.get(account_id)
    if secrets is None:
        return None
    return NotifiedAccount("mer_1", account_id, "psp", Mode.TEST, secrets)


@asynccontextmanager
async def opened(**limits: Any) -> AsyncIterator[Door]:
    door = Door()
    receiver = Receiver(
        account_of,
        [Source()],
        door.kept.keep,
        replace(LIMITS, **limits),
        door,
        "127.0.0.1:0",
    )
    await receiver.start()
    door.port = receiver.port
    try:
        yield door
    finally:
        await receiver.stop()


async def test_a_genuine_notification_is_kept_and_answered_as_its_psp_expects() -> None:
    async with opened() as door:
        status, _, body = await door.ask(request(b"evt_1,evt_2", secret="secret-2"))
        assert (status, body) == (200, b"[accepted]")
        assert door.kept.events == ["evt_1", "evt_2"]
        assert await door.post(b"evt_2") == 200
        assert door.receipts == {Receipt.KEPT: 1, Receipt.REPEATED: 1}


@pytest.mark.parametrize(
    ("more", "status", "receipt"),
    [
        ({"secret": "secret-3"}, 400, Receipt.BAD_SIGNATURE),
        ({"body": b"garbage"}, 400, Receipt.UNUSABLE),
        ({"body": b"live"}, 400, Receipt.UNUSABLE),
        ({"body": b"many"}, 400, Receipt.UNUSABLE),
        ({"body": b""}, 400, Receipt.UNUSABLE),
        ({"body": b"e" * 256}, 400, Receipt.UNUSABLE),
        ({"body": b"defect"}, 503, Receipt.STORE_UNAVAILABLE),
        ({"path": "/v1/notifications/psp/acc_1"}, 404, Receipt.BAD_REQUEST),
        ({"path": PATH + "/more"}, 404, Receipt.BAD_REQUEST),
        ({"path": "/"}, 404, Receipt.BAD_REQUEST),
        (
            {"path": f"/v1/notifications/psp/{new_connector_account_id()}"},
            404,
            Receipt.UNKNOWN_ACCOUNT,
        ),
        ({"path": f"/v1/notifications/other/{ACCOUNT}"}, 404, Receipt.UNKNOWN_ACCOUNT),
        ({"path": f"/v1/notifications/psp/{BARE}"}, 404, Receipt.UNKNOWN_ACCOUNT),
        ({"method": "GET"}, 405, Receipt.BAD_REQUEST),
        ({"method": "PUT"}, 405, Receipt.BAD_REQUEST),
        ({"content_type": "text/html"}, 415, Receipt.BAD_REQUEST),
        ({"headers": "Content-Encoding: gzip\r\n"}, 415, Receipt.BAD_REQUEST),
        ({"body": b"x" * 2001}, 413, Receipt.TOO_LARGE),
        ({"body": b"", "length": 10**9}, 413, Receipt.TOO_LARGE),
    ],
)
async def test_what_is_not_a_notification_is_refused_and_nothing_is_kept(
    more: dict[str, Any], status: int, receipt: Receipt
) -> None:
    async with opened() as door:
        assert await door.post(**more) == status
        assert door.receipts == {receipt: 1}
        assert door.kept.events == []
        assert await door.post(b"evt_9") == 200


async def test_a_chunked_body_is_cut_off_at_its_limit() -> None:
    async with opened() as door:
        head = request().partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
        chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
        assert (await door.ask(head + b"5\r\nevt_1\r\n0\r\n\r\n"))[0] == 200
        assert (await door.ask(head + 3 * chunk))[0] == 413


@pytest.mark.parametrize(
    ("failure", "receipt"),
    [
        (StoreUnavailable("PostgreSQL is away"), Receipt.STORE_UNAVAILABLE),
        (GatewayError(Reason.OVERLOADED, "too much"), Receipt.OVERLOADED),
        (RuntimeError("a defect"), Receipt.STORE_UNAVAILABLE),
    ],
)
async def test_what_is_not_stored_is_not_acknowledged(failure: Exception, receipt: Receipt) -> None:
    async with opened() as door:
        door.kept.failure = failure
        status, headers, _ = await door.ask(request())
        assert (status, headers["retry-after"]) == (503, "7")
        assert door.receipts == {receipt: 1}


async def flood(door: Door, **more: Any) -> None:
    """Send until one is too many."""
    for _ in range(1000):
        status, headers, _ = await door.ask(request(**more))
        if status == 429:
            assert headers["retry-after"] == "7"
            return
    raise AssertionError("nothing is too many")


async def test_a_flood_is_refused_before_its_signatures_are_looked_at() -> None:
    async with opened(per_s_max=2) as door:
        await flood(door, secret="forged")
        assert door.receipts[Receipt.RATE_LIMITED] == 1
        assert door.receipts[Receipt.BAD_SIGNATURE] >= 2


async def test_a_flood_of_those_who_know_no_account_keeps_nobody_out() -> None:
    async with opened(per_s_max=2) as door:
        await flood(door, path=f"{PATH}x")
        assert await door.post() == 200


@pytest.mark.parametrize("more", [{"secret": "forged"}, {"method": "GET"}])
async def test_a_flood_of_forgeries_for_one_account_leaves_half_of_the_rate_to_the_others(
    more: dict[str, Any],
) -> None:
    async with opened(per_s_max=8) as door:
        await flood(door, **more)
        assert [await door.post(path=OTHERS_PATH) for _ in range(2)] == [200] * 2


async def test_bodies_that_do_not_come_keep_no_other_account_out() -> None:
    async with opened(in_flight_max=3) as door, AsyncExitStack() as senders:
        for _ in range(3):
            _, writer = await senders.enter_async_context(door.connected())
            writer.write(request(length=100))
        async with asyncio.timeout(WAIT_S):
            while await door.post(b"evt_1") != 503:
                pass  # the server has yet to read the heads of all three
        assert await door.post(b"evt_2", path=OTHERS_PATH) == 200


async def test_connections_that_bring_nothing_keep_nobody_out() -> None:
    async with opened(connections_max=2) as door, AsyncExitStack() as senders:
        for sent in (b"", b"POST ", request(length=100), b"", b"POST "):
            _, writer = await senders.enter_async_context(door.connected())
            writer.write(sent)
        assert await door.post() == 200


async def test_only_so_many_are_worked_on_at_once() -> None:
    async with opened(in_flight_max=2) as door:
        door.kept.gate = asyncio.Event()
        first = [asyncio.ensure_future(door.post(f"evt_{n}".encode())) for n in range(2)]
        async with asyncio.timeout(WAIT_S):
            await door.kept.waiting.acquire()
            await door.kept.waiting.acquire()
        assert await door.post(b"evt_9") == 503
        door.kept.gate.set()
        assert await asyncio.gather(*first) == [200, 200]
        assert await door.post(b"evt_9") == 200


async def test_connections_too_many_are_told_so_and_those_that_are_open_go_on() -> None:
    async with opened(connections_max=2) as door, door.connected() as (reader, writer):
        async with door.connected() as (other_reader, other_writer):
            # Both are with the server once they are answered.
            for read, write in ((reader, writer), (other_reader, other_writer)):
                write.write(request())
                assert (await answer(read))[0] == 200
            assert (await door.ask(b""))[0] == 503
            writer.write(request(b"evt_2"))
            assert (await answer(reader))[0] == 200
        async with asyncio.timeout(WAIT_S):
            while await door.post(b"evt_3") != 200:
                pass  # the server has yet to see that the other one has gone


@pytest.mark.parametrize("sent", [b"", b"POST ", request(length=100)])
async def test_a_sender_who_does_not_go_on_is_left(sent: bytes) -> None:
    async with opened(timeout_s=0.2) as door:
        async with door.connected() as (reader, writer):
            writer.write(sent)
            told = await reader.read()
        assert told[:12] in (b"", b"HTTP/1.1 408")
        async with asyncio.timeout(WAIT_S):
            while await door.post(b"evt_2") != 200:
                pass  # on a stalled machine nobody goes on in time


async def test_junk_is_no_500_and_nothing_of_it_is_logged_or_sent_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with opened() as door:
        for junk in (
            b"\x16\x03\x01\r\n\r\n",
            b"GET\r\n\r\n",
            b"POST / HTTP/9.9\r\n\r\n",
            request(path="http://[what-it-holds"),
            request(headers="Transfer-Encoding: chunked\r\n"),
        ):
            status, _, body = await door.ask(junk)
            assert (status, body) == (400, b"")
        assert door.receipts == {Receipt.BAD_REQUEST: 5}
        assert not caplog.records
        long_head = request(headers=f"X-Long: {'x' * 20_000}\r\n")
        assert (await door.ask(long_head))[0] == 400
        assert await door.post() == 200


async def test_what_has_begun_is_finished_when_the_door_closes() -> None:
    async with opened() as door:
        door.kept.gate = asyncio.Event()
        call = asyncio.ensure_future(door.post())
        async with asyncio.timeout(WAIT_S):
            await door.kept.waiting.acquire()
        asyncio.get_running_loop().call_later(0.05, door.kept.gate.set)
    assert await call == 200
    assert door.kept.events == ["evt_1"]


async def test_the_end_waits_for_what_has_begun_no_longer_than_a_drain_may_take() -> None:
    """However long a request may: the supervisor and Kubernetes end who takes longer."""
    async with asyncio.timeout(WAIT_S):
        async with opened(timeout_s=10 * WAIT_S, stop_s_max=0.1) as door:
            door.kept.gate = asyncio.Event()
            call = asyncio.ensure_future(door.post())
            await door.kept.waiting.acquire()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await call
    assert door.kept.events == []


async def test_the_door_closes_in_the_time_that_a_request_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits_s: list[float] = []

    def over_at_once(delay: float) -> asyncio.Timeout:
        waits_s.append(delay)
        return asyncio.timeout(0)

    async with opened() as door:
        door.kept.gate = asyncio.Event()  # it never opens
        call = asyncio.ensure_future(door.post())
        async with asyncio.timeout(WAIT_S):
            await door.kept.waiting.acquire()
        monkeypatch.setattr(web_protocol, "ceil_timeout", over_at_once)
    with pytest.raises(asyncio.IncompleteReadError):
        await call
    assert 0 < sum(waits_s) <= LIMITS.timeout_s
