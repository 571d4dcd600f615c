"""An acquirer's host for tests: the simulator, behind a disturbed way that knows frames."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, cast
from urllib.parse import urlencode

from gateway.application.ports import Connector
from gateway.connectors.iso8583.connector import Iso8583Connector, capabilities_of
from gateway.connectors.iso8583.framing import FrameReader
from gateway.connectors.iso8583.host import AcquirerHost, HostAddress, HostLimits
from gateway.connectors.iso8583.specification import (
    Fields,
    Specification,
    answer_mti,
    load_specification,
)
from gateway.connectors.simulator.launch import SimulatorProcess
from gateway.domain.model import Mode, ResponseCode
from tests.connector_conformance import SHORT_S, WAIT_S, Fault
from tests.simulators import SimulatorBooks


class FrameWay:
    """A proxy before a host: what it does to the next messages, network management left out.

    What `Fault` says in the words of HTTP: UNAVAILABLE and ERROR end the connection in order, EMPTY
    is an empty frame, REDIRECT the answer to another request, without having arrived.
    """

    def __init__(self, specification: Specification, upstream: HostAddress) -> None:
        self._specification = specification
        self._upstream = upstream
        self.address = upstream
        self.fault: Fault | None = None
        self.times = 0
        self.alter: Callable[[dict[str, Any]], None] | None = None
        self.seen: list[Fields] = []
        """Every message that came from the gateway, those that were lost too."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """As GATEWAY_ISO8583_HOSTS takes it."""
        told = {"specification": self.address.specification, "mode": "test"}
        return f"tcp://{self.address.host}:{self.address.port}?{urlencode(told)}"

    def disturb(self, fault: Fault, times: int = 1000) -> None:
        self.fault, self.times = fault, times

    def clear(self) -> None:
        self.fault, self.times, self.alter = None, 0, None

    def accept(self, down_in: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        """A connection of the gateway's."""
        task = asyncio.get_running_loop().create_task(self._serve(down_in, down))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, down_in: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        ways: list[asyncio.Task[None]] = []
        ends = [down]
        try:
            up_in, up = await asyncio.open_connection(self._upstream.host, self._upstream.port)
            ends.append(up)
            faults: dict[str, Fault] = {}
            ways = [
                asyncio.create_task(self._requests(down_in, down, up, faults)),
                asyncio.create_task(self._answers(up_in, down, faults)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in ends:
                end.close()
                end.transport.abort()
            await asyncio.gather(*ways, return_exceptions=True)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # lets the transports go

    async def _requests(
        self,
        down_in: asyncio.StreamReader,
        down: asyncio.StreamWriter,
        up: asyncio.StreamWriter,
        faults: dict[str, Fault],
    ) -> None:
        reader = FrameReader(self._specification.framing)
        while data := await down_in.read(65536):
            for message in reader.feed(data):
                fields = self._specification.decode(message)
                self.seen.append(fields)
                fault = None
                if fields["t"][1] != "8" and self.times:
                    self.times -= 1
                    fault = self.fault
                if fault is not None and not fault.arrives:
                    if not self._lose(fault, fields, down):
                        return
                    continue
                if fault is not None:
                    faults[fields["11"]] = fault
                up.write(self._specification.framing.pack(message))

    def _lose(self, fault: Fault, request: Fields, down: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        if fault is Fault.LOST:
            down.transport.abort()
        elif fault is Fault.UNAVAILABLE:
            down.close()
        elif fault is Fault.REDIRECT:
            other = f"{int(request['11']) % 999_999 + 1:06}"
            mti = f"{request['t'][:2]}{int(request['t'][2]) + 1}0"
            told = {**request, "t": mti, "11": other, "39": "00"}
            down.write(self._pack(told))
        return fault in (Fault.SWALLOWED, Fault.REDIRECT)

    async def _answers(
        self, up_in: asyncio.StreamReader, down: asyncio.StreamWriter, faults: dict[str, Fault]
    ) -> None:
        framing = self._specification.framing
        reader = FrameReader(framing)
        while data := await up_in.read(65536):
            for message in reader.feed(data):
                fields = self._specification.decode(message)
                fault = faults.pop(fields["11"], None)
                if fault is None:
                    if self.alter is not None and fields["t"][1] != "8":
                        self.alter(fields)
                    down.write(self._pack(fields))
                elif fault is Fault.GARBAGE:
                    down.write(framing.pack(b"<html><body>Service temporarily approved"))
                elif fault is Fault.EMPTY:
                    down.write(b"\0\0")
                elif fault is Fault.OVERSIZE:
                    down.write(b"\xff\xff" + b" " * 100_000)
                elif fault is not Fault.SILENT:
                    if fault is Fault.CUT:
                        down.write(framing.pack(message)[: len(message) // 2])
                    if fault is Fault.RESET:
                        down.transport.abort()
                    down.close()
                    return

    def _pack(self, fields: Fields) -> bytes:
        return self._specification.framing.pack(self._specification.encode(fields))


@asynccontextmanager
async def frame_way_to(url: str) -> AsyncIterator[FrameWay]:
    """A proxy for as long as the context lasts."""
    upstream = HostAddress.parse(url)
    way = FrameWay(load_specification(upstream.specification), upstream)
    server = await asyncio.start_server(way.accept, "127.0.0.1", 0)
    try:
        way.address = replace(upstream, port=server.sockets[0].getsockname()[1])
        yield way
    finally:
        server.close()
        await way.close()


QUICK = HostLimits(reconnect_s_min=0.01, reconnect_s_max=0.05)


class Iso8583Psp(SimulatorBooks):
    """The simulator as an acquirer's host."""

    declines: Mapping[str, ResponseCode] = {
        "tok_declined_do_not_honor": ResponseCode.DO_NOT_HONOR,
        "tok_declined_insufficient_funds": ResponseCode.INSUFFICIENT_FUNDS,
        "tok_declined_lost_card": ResponseCode.LOST_CARD,
        "tok_declined_authentication_required": ResponseCode.AUTHENTICATION_REQUIRED,
        "tok_declined_other": ResponseCode.DECLINED_OTHER,
    }
    inexpressible: tuple[tuple[int, str], ...] = ((10**12, "EUR"), (100, "XTS"))
    currencies: tuple[str, ...] = ("JPY", "EUR", "KWD", "CLF")

    def __init__(self, simulator: SimulatorProcess, way: FrameWay, stack: AsyncExitStack) -> None:
        super().__init__(simulator)
        self.way = way
        self.specification = load_specification(way.address.specification)
        self._stack = stack
        self.host = self.new_host()
        self.connector: Connector = self.connect(self.host)

    def new_host(self, limits: HostLimits = QUICK) -> AcquirerHost:
        """Connections of their own."""
        host = AcquirerHost(self.way.address, self.specification, limits)
        self._stack.push_async_callback(host.close)
        return host

    def connect(self, host: AcquirerHost, answer_timeout_s: float = WAIT_S) -> Connector:
        """A connector over them."""
        capabilities = capabilities_of(self.specification, Mode.TEST, answer_timeout_s)
        return Iso8583Connector(host, capabilities, terminal="TERM0001", merchant="MERCHANT1")

    async def impatient(self) -> Connector:
        return self.connect(self.new_host(), SHORT_S)

    def report_more(self, told: dict[str, Any]) -> None:
        told["4"] = f"{int(told['4']) + 1:012}"

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        told["49"] = "840"


class ScriptedHost:
    """A host that answers network management by itself, and everything else as the test says."""

    def __init__(self, specification: Specification) -> None:
        self.specification = specification
        self.lines: list[ScriptedLine] = []
        self.requests: asyncio.Queue[tuple[ScriptedLine, Fields]] = asyncio.Queue()
        self.network: list[Fields] = []
        self.sign_on_code = "00"
        self.answers_echoes = True
        self.echoed = asyncio.Event()
        """An echo came."""
        self.answered = asyncio.Event()
        """The gateway has answered a network management request."""

    async def request(self) -> tuple[ScriptedLine, Fields]:
        """The next request."""
        async with asyncio.timeout(WAIT_S):
            return await self.requests.get()


class ScriptedLine(asyncio.Protocol):
    """One connection to it."""

    def __init__(self, host: ScriptedHost) -> None:
        self._host = host
        self._reader = FrameReader(host.specification.framing)
        self.transport: asyncio.Transport
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._host.lines.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost.set()

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            fields = self._host.specification.decode(message)
            if fields["t"][1] != "8":
                self._host.requests.put_nowait((self, fields))
                continue
            self._host.network.append(fields)
            if fields["t"] == "0810":
                self._host.answered.set()
            is_echo = fields.get("70") == "301"
            if is_echo:
                self._host.echoed.set()
            if fields["t"] == "0800" and (self._host.answers_echoes or not is_echo):
                self.write({**fields, "t": "0810", "39": self._host.sign_on_code})

    def encoded(self, fields: Fields) -> bytes:
        """A message without its frame."""
        return self._host.specification.encode(fields)

    def write(self, fields: Fields) -> None:
        """Write a message."""
        self.transport.write(self._host.specification.framing.pack(self.encoded(fields)))

    def answer(self, request: Fields, code: str = "00", **changes: str) -> None:
        """Answer a request; `de4="…"` and the like change what comes back."""
        told = {"t": answer_mti(request["t"]), "39": code}
        told |= {n: request[n] for n in ("3", "4", "11", "37", "41", "49") if n in request}
        self.write(told | {name.removeprefix("de"): value for name, value in changes.items()})


@asynccontextmanager
async def scripted_host(
    specification: str = "reference-text", tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ScriptedHost, HostAddress]]:
    """One for as long as the context lasts, and its address."""
    host = ScriptedHost(load_specification(specification))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ScriptedLine(host), "127.0.0.1", 0, ssl=tls)
    try:
        port = server.sockets[0].getsockname()[1]
        name = "localhost" if tls is not None else "127.0.0.1"
        yield host, HostAddress(name, port, tls is not None, specification, Mode.TEST)
    finally:
        server.close()
        for line in host.lines:
            line.transport.abort()
        await asyncio.sleep(0)  # lets the transports go
