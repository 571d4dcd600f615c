"""Sends BatchAuthorizePayments or StreamAuthorizePayments as ready bytes, and counts the items.

A process of its own; it prints one line of JSON. Messages are joined from bytes that were encoded
once, and answers are counted by the frames of their items, so that an item costs the sender a few
microseconds: a generator that builds and reads each item as JSON costs as much as the gateway.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import uvloop
from payments.v1 import money_pb2, payment_method_pb2, payment_service_pb2
from uuid_utils import uuid4

SERVICE: Final = "payments.v1.PaymentService"
API_KEY_VARIABLE: Final = "BENCH_API_KEY"
KEY_LENGTH: Final = 32
CALL_TIMEOUT_S: Final = 30.0
_OPTIONS: Final = (("grpc.max_receive_message_length", 64 * 1024 * 1024),)


class UnexpectedAnswer(Exception):
    """An answer is not what the contract says."""


class Items:
    """Encodes messages of items, each item with a new idempotency key."""

    def __init__(self, count: int) -> None:
        self._pieces = []
        request: Any
        for number in range(count):
            key = f"{number:0{KEY_LENGTH}d}"
            request = payment_service_pb2.BatchAuthorizePaymentsRequest()
            item = request.items.add(item_ref=str(number))
            item.authorization.CopyFrom(
                payment_service_pb2.AuthorizePaymentRequest(
                    idempotency_key=key,
                    amount=money_pb2.Money(amount_minor=1000, currency_code="EUR"),
                    capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL_MULTIPLE,
                    payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),  # noqa: S106 - a test token
                )
            )
            # The requests of the two methods have the same field of items.
            before, after = request.SerializeToString().split(key.encode())
            self._pieces.append((before, after))

    def encode(self) -> bytes:
        """A message in which every key is new."""
        parts: list[bytes] = []
        for before, after in self._pieces:
            parts += (before, uuid4().hex.encode(), after)
        return b"".join(parts)


def count_results(message: bytes) -> tuple[int, int]:
    """How many items are answered in a message, and how many are refused, by the results' frames.

    Raises UnexpectedAnswer where the frames are not those of results.
    """
    answered, refused, at, end = 0, 0, 0, len(message)
    while at < end:
        if message[at] != _RESULTS:
            raise UnexpectedAnswer(f"field {message[at] >> 3} in an answer")
        size, at = _varint(message, at + 1)
        # item_ref comes first in a result, and after it the response or the error.
        if message[at] == _ITEM_REF:
            ref_size, inner = _varint(message, at + 1)
            inner += ref_size
        else:
            inner = at
        at += size
        if inner >= at:
            raise UnexpectedAnswer("a result without an answer")
        if message[inner] == _RESPONSE:
            answered += 1
        else:
            refused += 1
    return answered, refused


_RESULTS: Final = 1 << 3 | 2
_ITEM_REF: Final = 1 << 3 | 2
_RESPONSE: Final = 2 << 3 | 2


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 varint (protobuf's encoding, "Base 128 Varints") and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


@dataclass(slots=True)
class Counter:
    """What came of the items, until now."""

    answered: int = 0
    refused: int = 0

    def add(self, message: bytes) -> int:
        """Count the results of an answer; returns how many they are."""
        answered, refused = count_results(message)
        if refused and not self.refused:
            print(f"refused: {_first_refusal(message)}")
        self.answered += answered
        self.refused += refused
        return answered + refused


def _first_refusal(message: bytes) -> str:
    answer = payment_service_pb2.BatchAuthorizePaymentsResponse.FromString(message)
    return next(each.error.message for each in answer.results if each.HasField("error"))


async def _batches(channel: grpc.aio.Channel, call: "Call", counter: Counter) -> None:
    multi: Any = channel.unary_unary(f"/{SERVICE}/BatchAuthorizePayments")
    items = Items(call.items)
    while not call.ended():
        answer = await multi(items.encode(), metadata=call.metadata, timeout=CALL_TIMEOUT_S)
        counter.add(answer)


async def _stream(channel: grpc.aio.Channel, call: "Call", counter: Counter) -> None:
    """One stream that keeps `ahead` messages unanswered."""
    multi: Any = channel.stream_stream(f"/{SERVICE}/StreamAuthorizePayments")
    items = Items(call.items)
    answered = sent = 0
    room = asyncio.Event()

    async def send() -> AsyncIterator[bytes]:
        nonlocal sent
        while not call.ended():
            while sent - answered >= call.ahead * call.items:
                room.clear()
                await room.wait()
            sent += call.items
            yield items.encode()

    async for message in multi(send(), metadata=call.metadata):
        answered += counter.add(message)
        room.set()
    if answered != sent:
        raise UnexpectedAnswer(f"{answered} results for {sent} items")


@dataclass(frozen=True, slots=True)
class Call:
    """How to call."""

    items: int
    ahead: int
    metadata: tuple[tuple[str, str], ...]
    ended: Callable[[], bool]


async def _run(options: argparse.Namespace) -> dict[str, float]:
    began = time.monotonic()
    until = began + options.warm_up + options.seconds
    call = Call(
        options.items,
        options.ahead,
        (("authorization", f"Bearer {os.environ[API_KEY_VARIABLE]}"),),
        lambda: time.monotonic() >= until,
    )
    counter = Counter()
    serve = _batches if options.method == "batch" else _stream
    async with (
        grpc.aio.insecure_channel(options.target, options=_OPTIONS) as channel,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(options.concurrency):
            group.create_task(serve(channel, call, counter))
        await asyncio.sleep(options.warm_up)
        first, first_at, first_cpu_s = counter.answered, time.monotonic(), time.process_time()
        await asyncio.sleep(until - time.monotonic())
        items, seconds = counter.answered - first, time.monotonic() - first_at
        cpu_s = time.process_time() - first_cpu_s
    return {
        "items_per_s": items / seconds,
        "answered": counter.answered,
        "refused": counter.refused,
        "cpu_us_per_item": 1e6 * cpu_s / max(items, 1),
    }


def main() -> None:
    """Send, and print what came of it. The API key comes by the environment."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.bulk", description=__doc__)
    parser.add_argument("method", choices=["batch", "stream"])
    parser.add_argument("target", help="host:port")
    parser.add_argument("--concurrency", type=int, default=4, help="calls or streams at once")
    parser.add_argument("--items", type=int, default=100, help="items of a message")
    parser.add_argument("--ahead", type=int, default=2, help="messages unanswered on a stream")
    parser.add_argument("--warm-up", type=float, default=1.0, metavar="S")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(_run(options))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
