"""How a stream of authorizations ends: counted out once, and nothing of it left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import grpc
import pytest
from payments.v1 import payment_service_pb2 as pb

from gateway.application.accounts import MerchantInfo, Principal, Scope
from gateway.domain.model import Mode
from gateway.rpc.service import PaymentService, RpcLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

REFUSED_ITEM = pb.StreamAuthorizePaymentsRequest(items=[pb.AuthorizePaymentItem(item_ref="a")])
"""Its result comes at once."""


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

    def remembered(self, _: object) -> Principal:
        merchants = {"mer_1": MerchantInfo("mer_1")}
        return Principal("key", "org", frozenset(Scope), Mode.TEST, merchants)

    def rpc_started(self, method: str) -> None:
        pass

    def rpc_finished(self, method: str, code: str, reason: str, *_: object) -> None:
        if not method.endswith("/item"):
            self.ends.append((code, reason))


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
    await context.reads.wait()
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
