"""The open-loop engine: sends at the intended times, however slowly the server answers."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from loadtest.arrivals import Arrival
from loadtest.calls import CONTRADICTED, DROPPED, SERVICE, UNKNOWN, Book, Call
from loadtest.mixes import Kind
from loadtest.samples import RECORD, acknowledged_lines

CHUNK_S: Final = 1.0
"""How often results are handed over, in seconds."""
BURST_SENDS_MAX: Final = 16
"""Sends without a pause before answers are looked at, where the engine is behind its schedule."""
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
START_S: Final = 0.2
"""Between the decision to start and the first intended time."""

_STATUS_DETAILS: Final = "grpc-status-details-bin"
_CODES: Final = {code: code.value[0] for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Target:
    """Where to call, and as whom."""

    address: str
    api_key: str = field(repr=False)
    tls: bool = False
    ca_certificate: bytes | None = field(default=None, repr=False)
    """The CA to trust in PEM; None: the system's."""
    connections: int = 4
    """Connections to the server; one carries as many calls at once as the server allows it."""
    retries: bool = False
    """Whether refusals are repeated, as the published service config says."""

    def channels(self) -> list[grpc.aio.Channel]:
        """Channels that share no connection."""
        options: tuple[tuple[str, Any], ...] = (
            ("grpc.use_local_subchannel_pool", 1),
            # A repeat by the client would hide a refusal.
            ("grpc.enable_retries", int(self.retries)),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        )
        if self.retries:
            published = files("payments.v1") / "service_config.json"
            options += (("grpc.service_config", published.read_text("utf-8")),)
        if not self.tls:
            return [
                grpc.aio.insecure_channel(self.address, options) for _ in range(self.connections)
            ]
        credentials = grpc.ssl_channel_credentials(self.ca_certificate)
        return [
            grpc.aio.secure_channel(self.address, credentials, options)
            for _ in range(self.connections)
        ]


@dataclass(slots=True)
class Chunk:
    """What happened since the last one."""

    samples: bytes
    """Records of `loadtest.samples`."""
    acknowledged: bytes
    """Lines of `loadtest.samples`."""
    reasons: dict[str, int]
    """Refusals by code and reason, with whether they said when to repeat."""
    in_flight: int
    due: int
    """Sends whose intended time has come since the start; each leaves one sample."""
    elapsed_s: float
    """Since the first intended time could come."""


class Engine:
    """Sends a schedule's share and hands over what comes of it, chunk by chunk."""

    def __init__(
        self,
        target: Target,
        book: Book,
        arrivals: Iterator[Arrival],
        *,
        in_flight_max: int,
        deadline_s: float,
    ) -> None:
        self._target = target
        self._book = book
        self._arrivals = arrivals
        self._in_flight_max = in_flight_max
        self._deadline_s = deadline_s
        self._metadata = (("authorization", f"Bearer {target.api_key}"),)
        self._unary: list[dict[str, Any]] = []
        self._streams: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._samples = bytearray()
        self._reasons: Counter[str] = Counter()
        self._start = 0.0
        self._due = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sending: asyncio.Task[None] | None = None
        self._stopping = False

    async def run(self, hand_over: Callable[[Chunk], object]) -> None:
        """Send everything and wait for every answer, at most `deadline_s` each.

        `hand_over` gets what happened, chunk by chunk. Raises ConnectionError where the server
        cannot be reached at the start.
        """
        channels = self._target.channels()
        try:
            await _connect(channels, self._target.address, self._deadline_s)
            self._prepare(channels)
            # Deadlines of both clocks are monotonic; this is the one of all intended times.
            self._start = time.monotonic() + START_S
            handing_over = asyncio.create_task(self._hand_over_regularly(hand_over))
            self._loop = asyncio.get_running_loop()
            self._sending = asyncio.create_task(self._send_all())
            try:
                await self._sending
            except asyncio.CancelledError:
                if not self._stopping:
                    raise
            while self._tasks:
                await asyncio.wait(set(self._tasks))
            handing_over.cancel()
            await asyncio.gather(handing_over, return_exceptions=True)
            hand_over(self._chunk())
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))

    def stop(self) -> None:
        """Send no more; what is in flight is still waited for. Any thread may say so."""
        self._stopping = True
        if self._loop is not None and self._sending is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._sending.cancel)

    def _prepare(self, channels: Sequence[grpc.aio.Channel]) -> None:
        methods = (
            "AuthorizePayment",
            "CapturePayment",
            "VoidPayment",
            "RefundPayment",
            "IncrementAuthorization",
            "GetPayment",
            "GetOperation",
            "ListPayments",
            "BatchAuthorizePayments",
        )
        # Without (de)serializers: bytes go in and come out.
        self._unary = [
            {method: channel.unary_unary(f"/{SERVICE}/{method}") for method in methods}
            for channel in channels
        ]
        self._streams = [
            channel.stream_stream(f"/{SERVICE}/StreamAuthorizePayments") for channel in channels
        ]

    async def _send_all(self) -> None:
        burst = 0
        create_task = asyncio.get_running_loop().create_task
        for number, arrival in enumerate(self._arrivals):
            # Before the pause, too: nobody could end it while there was no task.
            if self._stopping:
                return
            due = self._start + arrival.at_s
            wait_s = due - time.monotonic()
            if wait_s > 0:
                burst = 0
                await asyncio.sleep(wait_s)
            elif (burst := burst + 1) >= BURST_SENDS_MAX:
                burst = 0
                await asyncio.sleep(0)
            self._due += 1
            call = self._book.next()
            if len(self._tasks) >= self._in_flight_max:
                self._record(arrival, call, max(0.0, time.monotonic() - due), 0.0, 0.0, DROPPED)
                continue
            task = create_task(self._send(call, arrival, due, number % len(self._unary)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, call: Call, arrival: Arrival, due: float, channel: int) -> None:
        sent = time.monotonic()
        processing_ms = 0.0
        try:
            if call.kind is Kind.STREAM:
                data = await self._stream(call, channel)
            else:
                data = await self._unary[channel][call.method](
                    call.data, timeout=self._deadline_s, metadata=self._metadata
                )
            latency_ms = 1000 * (time.monotonic() - due)
            try:
                code, processing_ms = call.read(call, data)
            except (ValueError, DecodeError) as error:
                code = CONTRADICTED
                self._book.unanswered(call, UNKNOWN)
                self._reasons[f"an answer that does not parse: {error}"] += 1
        except grpc.aio.AioRpcError as error:
            latency_ms = 1000 * (time.monotonic() - due)
            code = _CODES[error.code()]
            self._reasons[reason_of(error)] += 1
            self._book.unanswered(call, code)
        self._record(
            arrival, call, sent - due, latency_ms, max(0.0, latency_ms - processing_ms), code
        )

    async def _stream(self, call: Call, channel: int) -> bytes:
        stream = self._streams[channel](timeout=self._deadline_s, metadata=self._metadata)
        await stream.write(call.data)
        await stream.done_writing()
        # Messages with one repeated field, joined, are one message with all of its elements.
        return b"".join([message async for message in stream])

    def _record(
        self,
        arrival: Arrival,
        call: Call,
        late_s: float,
        latency_ms: float,
        added_ms: float,
        code: int,
    ) -> None:
        self._samples += RECORD.pack(
            arrival.at_s, 1000 * late_s, latency_ms, added_ms, call.kind, arrival.segment, code
        )

    async def _hand_over_regularly(self, hand_over: Callable[[Chunk], object]) -> None:
        while True:
            await asyncio.sleep(CHUNK_S)
            hand_over(self._chunk())

    def _chunk(self) -> Chunk:
        told, self._book.acknowledged = self._book.acknowledged, []
        samples, self._samples = self._samples, bytearray()
        reasons, self._reasons = self._reasons, Counter()
        return Chunk(
            samples=bytes(samples),
            acknowledged=acknowledged_lines(told),
            reasons=dict(reasons),
            in_flight=len(self._tasks),
            due=self._due,
            elapsed_s=time.monotonic() - self._start,
        )


async def _connect(channels: Sequence[grpc.aio.Channel], address: str, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
    except TimeoutError:
        raise ConnectionError(f"no gRPC server answers at {address}") from None


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """`CODE REASON`, and ` RetryInfo` where the refusal says when to repeat."""
    text = error.code().name
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_DETAILS:
            try:
                text += _details(value if isinstance(value, bytes) else value.encode())
            except (ValueError, DecodeError):
                text += ", details that do not parse"
    return text


def _details(data: bytes) -> str:
    text = ""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(data).details:
        if detail.Unpack(info):
            text += f" {info.reason}"
        elif detail.Unpack(retry):
            text += " RetryInfo"
    return text
