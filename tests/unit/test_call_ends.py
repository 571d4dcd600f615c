"""How calls end: counted out once, and nothing of them left, in the gates neither."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import grpc
import pytest
from payments.v1 import event_service_pb2, money_pb2, payment_method_pb2
from payments.v1 import payment_service_pb2 as pb

from gateway.application.accounts import MerchantInfo, Principal, Scope
from gateway.application.admission import AdmissionLimits, Stage, open_gates
from gateway.application.commands import Answer
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from gateway.rpc import conversion
from gateway.rpc.service import PaymentService, RpcLimits
from gateway.rpc.unary import Reply, Unary

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

REFUSED_ITEM = pb.StreamAuthorizePaymentsRequest(items=[pb.AuthorizePaymentItem(item_ref="a")])
"""Its result comes at once."""


AUTHORIZATION = pb.AuthorizePaymentRequest(
    idempotency_key="key",
    amount=money_pb2.Money(amount_minor=100, currency_code="EUR"),
    capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
    payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),
)


class _Aborted(Exception):
    """As the transports end a call that was refused."""


class _Context:
    """A call whose client does what it is told to."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.fails_to_write = False

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return (("authorization", "Bearer key"),)

    def time_remaining(self) -> float | None:
        return None

    async def read(self) -> Any:
        self.reads.set()
        message = await self.messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def write(self, message: bytes) -> None:
        del message
        if self.fails_to_write:
            raise RuntimeError("as a transport does where the client has gone")

    def set_trailing_metadata(self, trailers: object) -> None:
        pass

    async def abort(self, *_: object) -> None:
        raise _Aborted


class _Door:
    """Authenticator and observer."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str]] = []
        self.seconds = 0.0

    def remembered(self, _: object) -> Principal:
        merchants = {"mer_1": MerchantInfo("mer_1")}
        return Principal("key", "org", frozenset(Scope), Mode.TEST, merchants)

    def rpc_started(self, method: str) -> None:
        pass

    def rpc_finished(self, method: str, code: str, reason: str, seconds: float, *_: object) -> None:
        if not method.endswith("/item"):
            self.ends.append((code, reason))
            self.seconds = seconds


async def _until_set(event: asyncio.Event, call: asyncio.Future[Any]) -> None:
    """Until the event is set, or the call has ended without it."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting, call], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert event.is_set()


@pytest.mark.parametrize(
    ("end", "raised", "observed"),
    [
        ("half-closed", None, ("OK", "")),
        ("gone, read from", asyncio.CancelledError, ("CANCELLED", "")),
        ("gone, written to", asyncio.CancelledError, ("CANCELLED", "")),
        ("cancelled", asyncio.CancelledError, ("CANCELLED", "")),
        ("malformed", _Aborted, ("INVALID_ARGUMENT", "MESSAGE_MALFORMED")),
        ("drained", _Aborted, ("UNAVAILABLE", "DRAINING")),
    ],
)
async def test_a_stream_is_counted_out_once_however_it_ends(
    end: str, raised: type[BaseException] | None, observed: tuple[str, str]
) -> None:
    door: Any = _Door()
    context: Any = _Context()
    service = PaymentService(Mock(), door, door, RpcLimits())
    stream = asyncio.ensure_future(service._serve_stream(None, context))
    await _until_set(context.reads, stream)
    match end:
        case "half-closed":
            context.messages.put_nowait(grpc.aio.EOF)
        case "gone, read from":
            context.messages.put_nowait(RuntimeError("the client has gone"))
        case "gone, written to":
            context.fails_to_write = True
            context.messages.put_nowait(REFUSED_ITEM.SerializeToString())
        case "cancelled":
            stream.cancel()
        case "malformed":
            context.messages.put_nowait(b"\xff")
        case _:
            service.begin_drain()
    [ended] = await asyncio.gather(stream, return_exceptions=True)
    assert (None if ended is None else type(ended)) is raised
    assert door.ends == [observed]
    assert not service._streams
    await service.wait_idle()


async def test_a_stream_whose_key_is_being_read_when_the_drain_begins_is_not_read() -> None:
    known = asyncio.Event()

    class Reading(_Door):
        def remembered(self, _: object) -> Any:
            return super().remembered(_) if known.is_set() else None

        async def authenticate(self, presented: object) -> Principal:
            await known.wait()
            return super().remembered(presented)

    door: Any = Reading()
    context: Any = _Context()
    service = PaymentService(Mock(), door, door, RpcLimits())
    context.messages.put_nowait(grpc.aio.EOF)
    stream = asyncio.ensure_future(service._serve_stream(None, context))
    await asyncio.sleep(0)
    service.begin_drain()
    known.set()
    [ended] = await asyncio.gather(stream, return_exceptions=True)
    assert isinstance(ended, _Aborted)
    assert door.ends == [("UNAVAILABLE", "DRAINING")]
    assert not context.reads.is_set()


async def test_a_stream_s_items_that_are_looked_at_let_others_have_their_turn() -> None:
    """Texts that may hold a card number are looked at one by one."""
    begun, seen = 0, [0]

    async def authorize(_: object) -> Answer:
        nonlocal begun
        begun += 1
        return Answer(b"", False, "", "")

    async def other() -> None:
        while True:
            seen.append(begun)
            await asyncio.sleep(0)

    request = pb.StreamAuthorizePaymentsRequest()
    for number in range(40):
        authorization = request.items.add(item_ref=str(number)).authorization
        authorization.MergeFrom(AUTHORIZATION)
        for key in range(10):
            authorization.metadata[f"k{key}"] = "." * 500
    door: Any = _Door()
    context: Any = _Context()
    service = PaymentService(Mock(authorize=authorize), door, door, RpcLimits())
    context.messages.put_nowait(request.SerializeToString())
    context.messages.put_nowait(grpc.aio.EOF)
    others = asyncio.ensure_future(other())
    await service._serve_stream(None, context)
    others.cancel()
    assert begun == 40
    assert max(after - before for before, after in pairwise(seen)) <= 2


class _Rig:
    """A service whose calls wait until they are let go."""

    def __init__(self) -> None:
        self.door = _Door()
        self.gates = open_gates(AdmissionLimits())
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        payments: Any = Mock(authorize=self._authorize, get_payment=self._get_payment)
        door: Any = self.door
        self.service = PaymentService(payments, door, door, RpcLimits(), self.gates)
        self.refuses = False

    async def _wait(self) -> None:
        self.begun.set()
        await self.go.wait()
        if self.refuses:
            raise GatewayError(Reason.PAYMENT_NOT_FOUND, "none")

    async def _authorize(self, _: object) -> Answer:
        await self._wait()
        return Answer(b"", False, "", "")

    async def _get_payment(self, *_: object) -> object:
        await self._wait()
        return object()

    async def _list(self, *_: object) -> Reply:
        await self._wait()
        return Reply(b"")

    def call(self, method: str, data: bytes = b"") -> asyncio.Future[bytes]:
        context: Any = _Context()
        if method == "ListEventConsumers":
            request = event_service_pb2.ListEventConsumersRequest
            gate, scope = self.gates.lists, Scope.EVENTS_READ
            unary = Unary(self.service, gate, scope, method, request, self._list)
            return asyncio.ensure_future(unary.serve(data, context))
        handler: Any = self.service.method_handlers()[method]
        serve: Callable[..., Coroutine[Any, Any, bytes]] = handler.unary_unary
        if method == "AuthorizePayment":
            data = data or AUTHORIZATION.SerializeToString()
        elif method == "GetPayment":
            data = data or pb.GetPaymentRequest(payment_id="pay_1").SerializeToString()
        return asyncio.ensure_future(serve(data, context))


GATES = {"AuthorizePayment": "payments", "GetPayment": "reads", "ListEventConsumers": "lists"}


@pytest.mark.parametrize("method", GATES)
@pytest.mark.parametrize(
    ("end", "observed"),
    [
        ("answered", ("OK", "")),
        ("refused", ("NOT_FOUND", "PAYMENT_NOT_FOUND")),
        ("cancelled", ("CANCELLED", "")),
    ],
)
async def test_a_call_is_in_its_gate_until_it_ends_however_that_is(
    monkeypatch: pytest.MonkeyPatch, method: str, end: str, observed: tuple[str, str]
) -> None:
    monkeypatch.setattr(conversion, "encode_aggregate", lambda _: b"")
    rig = _Rig()
    gate = rig.gates.gates()[GATES[method]]
    call = rig.call(method)
    await _until_set(rig.begun, call)
    assert (gate.working, gate.in_flight, gate.merchants) == (1, 1, 1)
    if end == "cancelled":
        call.cancel()
    rig.refuses = end == "refused"
    rig.go.set()
    await asyncio.gather(call, return_exceptions=True)
    assert rig.door.ends == [observed]
    assert (gate.working, gate.in_flight, gate.merchants) == (0, 0, 0)
    await rig.service.wait_idle()


@pytest.mark.parametrize("method", ["GetPayment", "ListEventConsumers"])
async def test_a_gate_of_reads_is_told_how_long_they_took(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(conversion, "encode_aggregate", lambda _: b"")
    rig = _Rig()
    passed: list[tuple[Stage, float]] = []
    gate = rig.gates.gates()[GATES[method]]
    monkeypatch.setattr(gate, "passed", lambda *told: passed.append(told))
    rig.go.set()
    await rig.call(method)
    [(stage, seconds)] = passed
    assert stage is Stage.READ
    assert 0 <= seconds <= rig.door.seconds


@pytest.mark.parametrize("method", GATES)
async def test_what_is_too_large_does_not_get_to_a_gate(method: str) -> None:
    rig = _Rig()
    data = bytes(RpcLimits().message_bytes_max + 1)
    await asyncio.gather(rig.call(method, data), return_exceptions=True)
    assert rig.door.ends == [("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")]
    assert rig.gates.gates()[GATES[method]].admitted == {}
