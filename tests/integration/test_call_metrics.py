"""The metrics of calls: what begins is counted in and counted out once, however it ends."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from payments.v1 import payment_service_pb2 as pb

from tests.harness import authorize_request, call_bytes, calling, eventually, running_system
from tests.servers import free_port

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

UNARY, BATCH, STREAM = "AuthorizePayment", "BatchAuthorizePayments", "StreamAuthorizePayments"
BATCH_ITEM, STREAM_ITEM = f"{BATCH}/item", f"{STREAM}/item"


def _samples(port: int, name: str) -> list[tuple[dict[str, str], int]]:
    """The labels and the value of every sample of a metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return [
        (dict(re.findall(r'(\w+)="([^"]*)"', labels)), int(float(value)))
        for labels, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
    ]


def _in_flight(port: int) -> dict[str, int]:
    """How many calls and items are in flight, by method; without those that have none."""
    samples = _samples(port, "gateway_rpc_in_flight")
    return {labels["method"]: value for labels, value in samples if value}


def _ended(port: int) -> Counter[tuple[str, str]]:
    """How many calls and items have ended, by method and code."""
    counter: Counter[tuple[str, str]] = Counter()
    for labels, value in _samples(port, "gateway_rpc_requests_total"):
        counter[labels["method"], labels["code"]] += value
    return counter


def _items(count: int) -> list[pb.AuthorizePaymentItem]:
    return [
        pb.AuthorizePaymentItem(item_ref=str(number), authorization=authorize_request())
        for number in range(count)
    ]


async def _cancelled(call: Any) -> None:
    call.cancel()
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await call.code()


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_every_call_and_item_is_counted_in_and_out_once_whatever_ends_it(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    port = free_port()
    with running_system(postgres, redis, simulator_answer_timeout_s=60) as system:
        gateway = system.start_gateway(
            transport=transport,
            trusted_front=transport == "native",
            metrics_address=f"127.0.0.1:{port}",
        )
        control = system.control
        async with calling(gateway, system.shop.api_key) as caller:
            stub, metadata = caller.stub, caller.metadata
            await control.hold()
            unary = stub.AuthorizePayment(authorize_request(), metadata=metadata)
            items = [*_items(2), pb.AuthorizePaymentItem(item_ref="bad")]
            batch = stub.BatchAuthorizePayments(
                pb.BatchAuthorizePaymentsRequest(items=items), metadata=metadata
            )
            stream = stub.StreamAuthorizePayments(metadata=metadata)
            await stream.write(pb.StreamAuthorizePaymentsRequest(items=_items(3)))
            await control.await_held(6)
            at_psp = {BATCH_ITEM: 2, STREAM_ITEM: 3}
            assert _in_flight(port) == {UNARY: 1, BATCH: 1, STREAM: 1, **at_psp}
            assert _ended(port) == {(BATCH_ITEM, "INVALID_ARGUMENT"): 1}

            # What their callers leave is over; the items are not, until the PSP has answered.
            for call in (unary, batch, stream):
                await _cancelled(call)
            await eventually(lambda: _in_flight(port) == at_psp, "the calls are over")
            await control.release()
            await eventually(partial(_is_idle, port), "the items are over")

            await caller.authorize()
            answer = await caller.call(BATCH, pb.BatchAuthorizePaymentsRequest(items=_items(2)))
            assert [each.HasField("response") for each in answer.results] == [True, True]
            second = stub.StreamAuthorizePayments(metadata=metadata)
            await second.write(pb.StreamAuthorizePaymentsRequest(items=_items(2)))
            await second.done_writing()
            assert sum([len(message.results) async for message in second]) == 2
            for method, headers in ((UNARY, ()), (BATCH, ()), (UNARY, metadata), ("None", ())):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call_bytes(caller.channel, method, b"\xff", headers)
        await control.close()
        await eventually(partial(_is_idle, port), "no call is in flight")
        assert _ended(port) == {
            (UNARY, "CANCELLED"): 1,
            (BATCH, "CANCELLED"): 1,
            (STREAM, "CANCELLED"): 1,
            (BATCH_ITEM, "INVALID_ARGUMENT"): 1,
            (UNARY, "OK"): 1,
            (BATCH, "OK"): 1,
            (STREAM, "OK"): 1,
            (BATCH_ITEM, "OK"): 2 + 2,
            (STREAM_ITEM, "OK"): 3 + 2,
            (UNARY, "UNAUTHENTICATED"): 1,
            (BATCH, "UNAUTHENTICATED"): 1,
            (UNARY, "INVALID_ARGUMENT"): 1,
            ("unknown", "UNIMPLEMENTED"): 1,
        }


def _is_idle(port: int) -> bool:
    return _in_flight(port) == {}
