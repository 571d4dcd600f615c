"""Clients that mean harm, as a process of their own: `python -m tests.chaos.bad_clients`.

It reads its orders as JSON from the standard input, attacks one address until they are carried out,
and prints as JSON how often each kind of attack met each gRPC status.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import ssl
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import uvloop
from payments.v1 import payment_service_pb2 as rpc

from tests.chaos.frames import (
    CANCEL,
    END_HEADERS,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    Connection,
    call_headers,
    frame,
)
from tests.harness import SERVICE, WRITE_LOST, authorize_request, eur, new_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

UNARY: Final = [method.name for method in SERVICE.methods if not method.server_streaming]
CONNECTIONS_OF_FUZZ: Final = 2
AT_ONCE: Final = 12
"""Fuzzed messages under way on each of them."""
SEEDS: Final = 64
"""Valid messages that are made once, to be mutated."""
KINDS: Final = ("fuzz", "idle", "stream", "message", "metadata", "deadline", "cancel", "reset")
"""Of attacks."""
KIND_AT_ONCE: Final = 6
"""Attacks under way where there are none of another kind."""
OTHERS_AT_ONCE: Final = 2
"""Of each other attack by calls."""
MESSAGES_BETWEEN: Final = 200
"""Fuzzed ones between two of the same, so that the mix is the same however slow the machine is."""
OTHERS_PAUSE_S_MAX: Final = 0.05
TIMEOUT_S: Final = 30
"""Of a call whose deadline is not the subject."""
DEADLINES_S: Final = (0.001, 0.05)
METADATA_BYTES: Final = 40_000
MESSAGE_BYTES: Final = 3_000_000
CONNECTIONS_AT_ONCE: Final = 50
"""While idle connections are opened."""
RESETS_OF_CONNECTION: Final = 200
"""Streams that are opened and reset on one connection, without a pause."""
GARBAGE_BYTES_MAX: Final = 40
STREAMED_MAX: Final = 50
"""Fuzzed messages on one stream, as far as it lasts."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What to attack, and how much."""

    address: str
    api_key: str
    seed: int
    messages: int
    """Fuzzed ones; the other attacks go on until these are sent."""
    connections: int
    """That are opened and left idle, half of them in the middle of a frame."""
    certificate: str = ""
    """A PEM file, where the address speaks TLS."""
    storm: int = 0
    """Connections that open and reset streams all at once, before the rest."""


class Attack:
    """All attacks at once on one address."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._draw = random.Random(orders.seed)
        self._metadata = (("authorization", f"Bearer {orders.api_key}"),)
        self._left = orders.messages
        self._seeds = [make() for make in _VALID for _ in range(SEEDS)]
        self._headers = [
            call_headers(f"/{SERVICE.full_name}/{name}", orders.api_key, TIMEOUT_S)
            for name in UNARY
        ]
        self._others: dict[str, Callable[[], Awaitable[None]]] = {
            "stream": self._fuzz_stream,
            "message": self._large_message,
            "metadata": self._large_metadata,
            "deadline": self._short_deadline,
            "cancel": self._cancelled,
            "reset": self._resets,
        }
        self.statuses: dict[str, Counter[str]] = {
            name: Counter() for name in ("fuzz", *self._others)
        }

    async def run(self) -> None:
        """Carry out the orders."""
        orders = self._orders
        idle = await self._open_idle_connections(orders.connections)
        await asyncio.gather(*(self._resets() for _ in range(orders.storm)))
        others = [
            asyncio.ensure_future(self._again(attack))
            for attack in self._others.values()
            for _ in range(OTHERS_AT_ONCE)
        ]
        async with self._channel() as self._shared:
            try:
                await asyncio.gather(*(self._fuzz() for _ in range(CONNECTIONS_OF_FUZZ)))
            finally:
                for task in others:
                    task.cancel()
                ended = await asyncio.gather(*others, return_exceptions=True)
                for each in idle:
                    each.close()
        assert len(idle) == orders.connections
        for end in ended:
            if isinstance(end, Exception):
                raise end

    async def repeat(self, kind: str, times: int) -> None:
        """Carry out attacks of one kind only: one of `KINDS`, so many times."""
        if kind == "idle":
            for each in await self._open_idle_connections(times):
                each.close()
            return
        self._left = times
        async with self._channel() as self._shared:
            if kind == "fuzz":
                await asyncio.gather(*(self._fuzz() for _ in range(CONNECTIONS_OF_FUZZ)))
            else:
                await asyncio.gather(*(self._spend(kind) for _ in range(KIND_AT_ONCE)))

    async def _spend(self, kind: str) -> None:
        while self._left > 0:
            self._left -= 1
            await self._others[kind]()

    async def _again(self, attack: Callable[[], Awaitable[None]]) -> None:
        # Asked for, since `_cancelled` cannot tell its own cancellation from ours.
        while self._left > 0:
            left = self._left
            await attack()
            while 0 < self._left > left - MESSAGES_BETWEEN:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(self._draw.uniform(0, OTHERS_PAUSE_S_MAX))

    def _channel(self) -> grpc.aio.Channel:
        orders = self._orders
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        if not orders.certificate:
            return grpc.aio.insecure_channel(orders.address, options=options)
        root = Path(orders.certificate).read_bytes()
        credentials = grpc.ssl_channel_credentials(root)
        return grpc.aio.secure_channel(orders.address, credentials, options=options)

    # --- by calls ---------------------------------------------------------------------------------

    async def _fuzz(self) -> None:
        """Fuzzed messages on connections of one's own, as long as there are any left."""
        host, port, context = self._endpoint()
        loop = asyncio.get_running_loop()
        while self._left > 0:
            _, connection = await loop.create_connection(
                lambda: Connection(self._next_call, self._fuzzed, AT_ONCE), host, port, ssl=context
            )
            await connection.ended

    def _next_call(self) -> tuple[bytes, bytes] | None:
        if self._left <= 0:
            return None
        self._left -= 1
        return self._draw.choice(self._headers), self._mutant()

    def _fuzzed(self, outcome: str) -> None:
        self.statuses["fuzz"][outcome] += 1

    async def _fuzz_stream(self) -> None:
        stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._shared.stream_stream(
            f"/{SERVICE.full_name}/StreamAuthorizePayments"
        )
        messages = (self._mutant() for _ in range(STREAMED_MAX))
        call = stream(messages, metadata=self._metadata, timeout=TIMEOUT_S)

        async def answers() -> None:
            async for _ in call:
                pass

        await self._count("stream", answers())

    async def _large_message(self) -> None:
        request = authorize_request(metadata={"a": "x" * MESSAGE_BYTES}).SerializeToString()
        await self._count("message", self._authorize(request, TIMEOUT_S))

    async def _large_metadata(self) -> None:
        # On a connection of its own: whoever refuses it may end the connection.
        async with self._channel() as channel:
            call = self._unary(channel, "AuthorizePayment")(
                b"",
                metadata=(*self._metadata, ("x-large", "x" * METADATA_BYTES)),
                timeout=TIMEOUT_S,
            )
            await self._count("metadata", call)

    async def _short_deadline(self) -> None:
        request = authorize_request().SerializeToString()
        await self._count("deadline", self._authorize(request, self._draw.uniform(*DEADLINES_S)))

    async def _cancelled(self) -> None:
        call = asyncio.ensure_future(
            self._authorize(authorize_request().SerializeToString(), TIMEOUT_S)
        )
        await asyncio.sleep(self._draw.uniform(*DEADLINES_S))
        call.cancel()
        try:
            await self._count("cancel", call)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            self.statuses["cancel"]["CANCELLED"] += 1

    async def _authorize(self, request: bytes, timeout_s: float) -> bytes:
        call = self._unary(self._shared, "AuthorizePayment")
        return await call(request, metadata=self._metadata, timeout=timeout_s)

    @staticmethod
    def _unary(
        channel: grpc.aio.Channel, name: str
    ) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        return channel.unary_unary(f"/{SERVICE.full_name}/{name}")

    async def _count(self, attack: str, call: Awaitable[object]) -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            told = error.details() or ""
            name = error.code().name
            if _HTTP_REFUSED in told:
                name = f"HTTP {_HTTP_REFUSED}"
            elif told == WRITE_LOST:
                name = "(status lost)"
            self.statuses[attack][name] += 1
        else:
            self.statuses[attack]["OK"] += 1

    def _mutant(self) -> bytes:
        """A message that was valid, or never was."""
        draw = self._draw
        data = bytearray(draw.choice(self._seeds))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(6):
                case 0 if data:
                    data[at % len(data)] ^= 1 << draw.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data[at:at] = draw.randbytes(draw.randint(1, GARBAGE_BYTES_MAX))
                case 3:
                    data[at:at] = data[: draw.randrange(len(data) + 1)]
                case 4:
                    # A length that the message does not have.
                    data[at:at] = b"\x0a\xff\xff\xff\x7f"
                case _:
                    data[at:at] = b"\x0b" * draw.randint(1, GARBAGE_BYTES_MAX)  # groups in groups
        return bytes(data)

    # --- by frames --------------------------------------------------------------------------------

    def _endpoint(self) -> tuple[str, int, ssl.SSLContext | None]:
        host, _, port = self._orders.address.rpartition(":")
        context = None
        if self._orders.certificate:
            context = ssl.create_default_context(cafile=self._orders.certificate)
            context.set_alpn_protocols(["h2"])
        return host, int(port), context

    async def _open_idle_connections(self, count: int) -> list[socket.socket]:
        """Connections on which nothing more will come: without TLS, which is no matter here."""
        host, port, _ = self._endpoint()
        room = asyncio.Semaphore(CONNECTIONS_AT_ONCE)
        loop = asyncio.get_running_loop()

        async def one(number: int) -> socket.socket:
            async with room:
                connection = socket.socket()
                connection.setblocking(False)
                await loop.sock_connect(connection, (host, port))
                begun = PREFACE + _NO_SETTINGS
                # Every other one stops in the middle of its first frame.
                await loop.sock_sendall(connection, begun if number % 2 else begun[:-4])
                return connection

        return list(await asyncio.gather(*map(one, range(count))))

    async def _resets(self) -> None:
        host, port, context = self._endpoint()
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        ended = "SURVIVED"
        try:
            writer.write(PREFACE + _NO_SETTINGS)
            for stream in range(1, 2 * RESETS_OF_CONNECTION, 2):
                writer.write(frame(HEADERS, END_HEADERS, stream, self._headers[0]))
                writer.write(frame(RST_STREAM, 0, stream, CANCEL))
            await writer.drain()
            await reader.read(1)
        except OSError:
            ended = "CUT"  # a server may take this for an attack
        finally:
            writer.transport.abort()
        self.statuses["reset"][ended] += RESETS_OF_CONNECTION


_NO_SETTINGS: Final = frame(SETTINGS, 0, 0, b"")
_HTTP_REFUSED: Final = "431"
"""Request Header Fields Too Large, RFC 6585: a proxy's answer, which gRPC clients call UNKNOWN."""

_VALID: Final[tuple[Callable[[], bytes], ...]] = (
    lambda: authorize_request(
        amount_minor=1234, merchant_order_id="order", metadata={"a": "b"}
    ).SerializeToString(),
    lambda: rpc.CapturePaymentRequest(
        idempotency_key=new_key(), payment_id="pay_1", amount=eur(5)
    ).SerializeToString(),
    lambda: rpc.BatchAuthorizePaymentsRequest(
        items=[rpc.AuthorizePaymentItem(item_ref="1")] * 3
    ).SerializeToString(),
    lambda: b"",
)


def orders_text(orders: Orders) -> str:
    """For the standard input."""
    return json.dumps(asdict(orders))


def _may_open_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    _may_open_many_files()
    attack = Attack(Orders(**json.load(sys.stdin)))
    uvloop.run(attack.run())
    json.dump(attack.statuses, sys.stdout)
