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
import struct
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
from payments.v1 import payment_service_pb2 as rpc

from tests.harness import SERVICE, WRITE_LOST, authorize_request, eur, new_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

UNARY: Final = [method.name for method in SERVICE.methods if not method.server_streaming]
AT_ONCE: Final = 24
"""Fuzzed messages under way."""
OTHERS_AT_ONCE: Final = 2
"""Of each other attack by calls."""
OTHERS_PAUSE_S_MAX: Final = 0.2
"""Between two of the same: the fuzzed messages are the main thing."""
TIMEOUT_S: Final = 30.0
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

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS_FRAME: Final = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_HEADERS, _RST_STREAM = 0x1, 0x3
_END_HEADERS: Final = 0x4
_CANCEL: Final = struct.pack(">I", 8)


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


class Attack:
    """All attacks at once on one address."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._draw = random.Random(orders.seed)
        self._metadata = (("authorization", f"Bearer {orders.api_key}"),)
        self._left = orders.messages
        self.statuses: dict[str, Counter[str]] = {
            name: Counter()
            for name in ("fuzz", "stream", "message", "metadata", "deadline", "cancel", "reset")
        }

    async def run(self) -> None:
        """Carry out the orders."""
        orders = self._orders
        idle = await self._open_idle_connections()
        others = [
            asyncio.ensure_future(self._again(attack))
            for attack in (
                self._fuzz_stream,
                self._large_message,
                self._large_metadata,
                self._short_deadline,
                self._cancelled,
                self._resets,
            )
            for _ in range(OTHERS_AT_ONCE)
        ]
        async with self._channel() as self._shared:
            try:
                await asyncio.gather(*(self._fuzz() for _ in range(AT_ONCE)))
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

    async def _again(self, attack: Callable[[], Awaitable[None]]) -> None:
        # Asked for, since `_cancelled` cannot tell its own cancellation from ours.
        while self._left > 0:
            await attack()
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
        while self._left > 0:
            self._left -= 1
            call = self._unary(self._shared, self._draw.choice(UNARY))
            await self._count(
                "fuzz", call(self._mutant(), metadata=self._metadata, timeout=TIMEOUT_S)
            )

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
        data = bytearray(draw.choice(_VALID)())
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

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self._orders.address.rpartition(":")
        context = None
        if self._orders.certificate:
            context = ssl.create_default_context(cafile=self._orders.certificate)
            context.set_alpn_protocols(["h2"])
        return await asyncio.open_connection(host, int(port), ssl=context)

    async def _open_idle_connections(self) -> list[socket.socket]:
        """Connections on which nothing more will come: without TLS, which is no matter here."""
        host, _, port = self._orders.address.rpartition(":")
        room = asyncio.Semaphore(CONNECTIONS_AT_ONCE)
        loop = asyncio.get_running_loop()

        async def one(number: int) -> socket.socket:
            async with room:
                connection = socket.socket()
                connection.setblocking(False)
                await loop.sock_connect(connection, (host, int(port)))
                begun = _PREFACE + _SETTINGS_FRAME
                # Every other one stops in the middle of its first frame.
                await loop.sock_sendall(connection, begun if number % 2 else begun[:-4])
                return connection

        return list(await asyncio.gather(*map(one, range(self._orders.connections))))

    async def _resets(self) -> None:
        reader, writer = await self._connect()
        ended = "SURVIVED"
        try:
            writer.write(_PREFACE + _SETTINGS_FRAME)
            headers = b"".join(_header_block(self._orders.api_key))
            for stream in range(1, 2 * RESETS_OF_CONNECTION, 2):
                writer.write(_frame(_HEADERS, _END_HEADERS, stream, headers))
                writer.write(_frame(_RST_STREAM, 0, stream, _CANCEL))
            await writer.drain()
            await reader.read(1)
        except OSError:
            ended = "CUT"  # a server may take this for an attack
        finally:
            writer.transport.abort()
        self.statuses["reset"][ended] += RESETS_OF_CONNECTION


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


def _header_block(api_key: str) -> Iterator[bytes]:
    """The headers of a call, each a literal without indexing (RFC 7541, 6.2.2)."""
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/{SERVICE.full_name}/AuthorizePayment"),
        (":authority", "gateway"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("authorization", f"Bearer {api_key}"),
    ):
        yield b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def orders_text(orders: Orders) -> str:
    """For the standard input."""
    return json.dumps(asdict(orders))


def _may_open_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    _may_open_many_files()
    attack = Attack(Orders(**json.load(sys.stdin)))
    asyncio.run(attack.run())
    json.dump(attack.statuses, sys.stdout)
