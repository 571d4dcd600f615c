"""Streams of events over an outbox in memory: what the tail keeps, and whom a stream is for."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from payments.v1 import event_service_pb2

from gateway.application.accounts import MerchantInfo, Principal, Scope
from gateway.application.admission import AdmissionLimits, open_gates
from gateway.application.events import (
    CHUNK_EVENTS_MAX,
    ORIGIN,
    Audience,
    Event,
    EventPage,
    Events,
    Position,
    PositionLost,
    Schedule,
)
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from gateway.rpc.events import EventService, StreamLimits
from gateway.rpc.service import PaymentService, RpcLimits

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.application.events import Cursor

HANG_S = 30.0
"""A wait that takes so long hangs; no rule is tested by this time."""
MERCHANTS = [f"mer_{number}" for number in range(20)]


class _Outbox:
    """An EventSource."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reads = 0

    def tell(self, merchant_id: str, payload_bytes: int = 100) -> Position:
        number = len(self.events) + 1
        position = Position(number, merchant_id, f"pay_{number}", 1, 0, f"evt_{number}")
        self.events.append(Event(position, b"x" * payload_bytes))
        return position

    async def read(
        self,
        after: Position,
        merchant_ids: frozenset[str] | None,
        rows_max: int,
        bytes_max: int,
    ) -> EventPage:
        if after != ORIGIN and self.events[after.xact_id - 1].position != after:
            raise PositionLost
        self.reads += 1
        rows = self.events[after.xact_id :][:rows_max]
        found = _of(rows, merchant_ids)
        assert sum(len(event.payload) for event in found) <= bytes_max
        return EventPage(found, rows[-1].position if rows else None, is_full=len(rows) == rows_max)

    async def latest(self) -> Position:
        return self.events[-1].position if self.events else ORIGIN

    async def find(self, cursor: Cursor) -> Position | None:
        raise NotImplementedError


def _of(events: Iterable[Event], merchant_ids: frozenset[str] | None) -> list[Event]:
    return [e for e in events if merchant_ids is None or e.position.merchant_id in merchant_ids]


def _streams(outbox: _Outbox, schedule: Schedule) -> Events:
    return Events(outbox, Mock(), lambda _payload, _merchant_id: Mode.TEST, schedule)


async def test_what_the_tail_keeps_is_found_at_once_however_many_looks_it_took() -> None:
    """A stream went through all that was kept, a piece for each look that had found something."""
    outbox = _Outbox()
    events = _streams(outbox, Schedule())
    await events._look()
    rng = random.Random(1)
    looks = 3_000
    for _ in range(looks):
        outbox.tell(rng.choice(MERCHANTS))
        assert await events._look() == (False, True)
    assert len(events._chunks) <= 2 * looks / CHUNK_EVENTS_MAX + 1

    before = outbox.reads
    for merchant_ids in (None, *(frozenset(rng.sample(MERCHANTS, n)) for n in (1, 5, 20))):
        audience = Audience(Mode.TEST, merchant_ids)
        for start in (0, looks - 1, looks, *(rng.randrange(looks) for _ in range(20))):
            position = outbox.events[start - 1].position if start else ORIGIN
            found: list[Event] = []
            while True:
                more, behind = await events._next(audience, position)
                assert len(more) <= CHUNK_EVENTS_MAX
                found += more
                if behind == position:
                    break
                position = behind
            assert found == _of(outbox.events[start:], merchant_ids)
    assert outbox.reads == before


async def test_the_tail_keeps_so_many_bytes_and_drops_the_oldest() -> None:
    outbox = _Outbox()
    kept_bytes_max = 10_000
    events = _streams(outbox, Schedule(kept_bytes_max=kept_bytes_max))
    await events._look()
    kept: list[Event] = []
    for _ in range(1_000):
        outbox.tell(MERCHANTS[0])
        await events._look()
        kept = [event for chunk in events._chunks for event in chunk.events]
        assert sum(len(event.payload) for event in kept) == events._kept_bytes <= kept_bytes_max
        assert kept == outbox.events[-len(kept) :]
    assert len(kept) * 100 > kept_bytes_max * 3 / 4
    assert events._begun == outbox.events[-len(kept) - 1].position


EVERY_MESSAGE = Schedule(heartbeat_s=0.0, message_events_max=1)
"""The time to ask again has always come, and a page is many messages."""
ONE, OTHER = (frozenset({merchant_id}) for merchant_id in MERCHANTS[:2])


class _Key:
    """What an audience is asked of."""

    def __init__(self, merchant_ids: frozenset[str] | None) -> None:
        self.merchant_ids = merchant_ids
        self.is_revoked = False
        self.asked = 0

    async def audience(self) -> Audience:
        self.asked += 1
        if self.is_revoked:
            raise GatewayError(Reason.CREDENTIAL_INVALID, "It was revoked.")
        return Audience(Mode.TEST, self.merchant_ids)


def _both_in_turn(count: int) -> _Outbox:
    outbox = _Outbox()
    for number in range(count):
        outbox.tell(MERCHANTS[number % 2])
    return outbox


async def test_a_revoked_key_gets_no_more_of_the_page_that_was_read_for_it() -> None:
    """However many messages that has, and however slowly its client takes them."""
    key = _Key(None)
    stream = _streams(_both_in_turn(200), EVERY_MESSAGE).stream(key.audience, ORIGIN)
    async with aclosing(stream):
        for _ in range(3):
            assert (await anext(stream)).events
        key.is_revoked = True
        with pytest.raises(GatewayError) as ended:
            await anext(stream)
    assert ended.value.reason is Reason.CREDENTIAL_INVALID


@pytest.mark.parametrize(
    ("before", "after"), [(None, ONE), (ONE, None), (ONE, OTHER), (ONE | OTHER, ONE)]
)
async def test_what_is_left_of_a_page_is_for_whom_the_key_reaches_now(
    before: frozenset[str] | None, after: frozenset[str] | None
) -> None:
    """Nothing of another's is told, and nothing of what it reaches is passed over."""
    outbox = _both_in_turn(200)
    key = _Key(before)
    stream = _streams(outbox, EVERY_MESSAGE).stream(key.audience, ORIGIN, until_current=True)
    async with aclosing(stream):
        first = [event for _ in range(10) for event in (await anext(stream)).events]
        key.merchant_ids = after
        rest = [event async for batch in stream for event in batch.events]
    assert first == _of(outbox.events, before)[:10]
    told = outbox.events.index(first[-1]) + 1
    assert rest == _of(outbox.events[told:], after)


async def test_a_key_is_not_asked_again_for_each_message() -> None:
    key = _Key(None)
    schedule = Schedule(heartbeat_s=3_600.0, message_events_max=1)
    stream = _streams(_both_in_turn(200), schedule).stream(key.audience, ORIGIN, until_current=True)
    async with aclosing(stream):
        assert len([batch async for batch in stream]) == 200
    assert key.asked == 1


async def test_a_drain_ends_a_stream_within_its_page() -> None:
    events = _streams(_both_in_turn(200), EVERY_MESSAGE)
    stream = events.stream(_Key(None).audience, ORIGIN)
    async with aclosing(stream):
        await anext(stream)
        events.close()
        with pytest.raises(GatewayError) as ended:
            await anext(stream)
    assert ended.value.reason is Reason.DRAINING


# --- the calls ------------------------------------------------------------------------------------


class _Caller:
    """A call's context; its stream is read as long as it is not cut."""

    def __init__(self, organisation_id: str) -> None:
        self._organisation_id = organisation_id
        self.told = asyncio.Event()
        self.is_cut = False
        self.refusal = ""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return (("authorization", self._organisation_id),)

    def time_remaining(self) -> float | None:
        return None

    async def write(self, message: bytes) -> None:
        del message
        self.told.set()
        if self.is_cut:
            raise RuntimeError("as the transport does where the client has gone")

    def set_trailing_metadata(self, trailers: object) -> None:
        pass

    async def abort(self, _code: object, _text: str, trailers: Sequence[tuple[str, Any]]) -> None:
        self.refusal = str(trailers)
        raise RuntimeError("as the transport does")


class _Door:
    """Authenticator and observer of a PaymentService."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.reached = MERCHANTS[:2]

    def remembered(self, organisation_id: str) -> Principal:
        merchants = {each: MerchantInfo(each) for each in self.reached}
        scopes = frozenset({Scope.EVENTS_READ})
        return Principal("key", organisation_id, scopes, Mode.TEST, merchants)

    def rpc_started(self, method: str) -> None:
        pass

    def rpc_finished(self, method: str, code: str, *told: object) -> None:
        self.ends.append(code)


class _Service:
    """An EventService of at most 3 streams, 2 for each organisation."""

    def __init__(self) -> None:
        self.door = _Door()
        door: Any = self.door
        self._door = PaymentService(Mock(), door, door, RpcLimits())
        outbox = _both_in_turn(1)
        self.events = _streams(outbox, EVERY_MESSAGE)
        gate = open_gates(AdmissionLimits()).lists
        self.service = EventService(self._door, gate, self.events, StreamLimits(3, 2))

    async def stream(
        self, organisation_id: str, **fields: Any
    ) -> tuple[_Caller, asyncio.Task[None]]:
        """One that has been told something, or was refused."""
        caller = _Caller(organisation_id)
        context: Any = caller
        data = event_service_pb2.StreamEventsRequest(**fields).SerializeToString()
        task = asyncio.ensure_future(self.service._serve_stream(data, context))
        told = asyncio.ensure_future(caller.told.wait())
        await asyncio.wait([told, task], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        return caller, task


async def test_there_are_so_many_streams_in_all_and_of_each_organisation() -> None:
    rig = _Service()
    tasks = []
    for organisation_id, is_open in (
        ("org_1", True),
        ("org_1", True),
        ("org_1", False),
        ("org_2", True),
        ("org_3", False),
    ):
        caller, task = await rig.stream(organisation_id)
        tasks.append(task)
        assert task.done() is not is_open
        assert ("EVENT_STREAMS_TOO_MANY" in caller.refusal) is not is_open
    assert rig.service.streams == 3
    rig.service.begin_drain()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("end", ["cancelled", "cut", "drained"])
async def test_a_stream_leaves_its_place_however_it_ends(end: str) -> None:
    rig = _Service()
    caller, task = await rig.stream("org_1")
    assert rig.service.streams == 1
    if end == "cancelled":
        task.cancel()
    elif end == "cut":
        caller.is_cut = True
    else:
        rig.service.begin_drain()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled() is (end != "drained")
    assert rig.door.ends == ["UNAVAILABLE" if end == "drained" else "CANCELLED"]
    assert rig.service.streams == 0
    assert not rig.service._streams


async def test_a_stream_to_what_is_there_now_is_answered_and_leaves_its_place() -> None:
    rig = _Service()
    _, task = await rig.stream("org_1", until_current=True)
    await task
    assert rig.door.ends == ["OK"]
    assert rig.service.streams == 0
    await rig._door.wait_idle()


async def test_a_stream_of_a_merchant_ends_where_its_key_reaches_it_no_more() -> None:
    rig = _Service()
    caller, task = await rig.stream("org_1", merchant_id=MERCHANTS[0])
    assert not task.done()
    rig.door.reached = MERCHANTS[1:2]
    await asyncio.wait([task], timeout=HANG_S)
    assert task.done()
    assert "MERCHANT_NOT_FOUND" in caller.refusal
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("size_bytes", "end"),
    [(RpcLimits().message_bytes_max + 1, "RESOURCE_EXHAUSTED"), (5, "INVALID_ARGUMENT")],
)
async def test_a_request_for_a_stream_is_no_longer_than_any(size_bytes: int, end: str) -> None:
    rig = _Service()
    caller: Any = _Caller("org_1")
    call = rig.service._serve_stream(b"\xff" * size_bytes, caller)
    await asyncio.gather(call, return_exceptions=True)
    assert rig.door.ends == [end]
