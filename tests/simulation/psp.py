"""The PSP, simulated: the simulator's own server, ledger and connector, over this network."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import TYPE_CHECKING, Any, Final, cast

from gateway.connectors.http import MaybeSent, NotSent, Response
from gateway.connectors.simulator.connector import SimulatorConnector
from gateway.connectors.simulator.latency import Latency
from gateway.connectors.simulator.ledger import Ledger
from gateway.connectors.simulator.server import Simulator
from gateway.domain.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.connectors.simulator.journal import Record
    from gateway.connectors.simulator.profiles import Profile
    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network

PSP: Final = "psp"
LATENCY: Final = Latency(20, 300)


class _Journal:
    """Keeps the records; a transaction of the simulated PSP is durable at once."""

    def __init__(self) -> None:
        self.run = 1
        self.records: list[Record] = []

    def append(self, record: Record) -> None:
        # What a record holds goes on changing in the ledger.
        self.records.append(dict(record))

    async def durable(self) -> None:
        pass


class _Connection:
    """The server's end of one exchange."""

    def __init__(self, loop: SimulatedLoop, tell: Callable[[Response | None], None]) -> None:
        self.connection_id = "simulated"
        self.gone = loop.create_future()
        self._tell = tell

    def reply(self, reply: Any) -> None:
        self._tell(Response(reply.status, reply.body))

    def abort(self) -> None:
        self._tell(None)


class PspServer:
    """The PSP's process."""

    def __init__(self, loop: SimulatedLoop, process: Process, profile: Profile, seed: int) -> None:
        self.loop = loop
        self.process = process
        self._journal = _Journal()
        ledger = Ledger(profile, [{"type": "start", "journal_id": "j51e"}])
        self._simulator = Simulator(
            cast("Any", self._journal), ledger, latency=LATENCY, source=random.Random(f"psp/{seed}")
        )

    @property
    def records(self) -> list[Record]:
        """The journal."""
        return self._journal.records

    def set_mode(self, mode: str) -> None:
        """The simulator's mode, docs/simulator.md."""
        self._simulator._mode = mode

    def serve(
        self, method: str, target: str, body: bytes, tell: Callable[[Response | None], None]
    ) -> Callable[[], None]:
        """Handle a request; what is returned tells that the client has gone."""
        connection = _Connection(self.loop, tell)
        self.loop.start(
            self.process,
            self._simulator._serve(cast("Any", connection), method, target, body),
        )

        def gone() -> None:
            if not connection.gone.done():
                connection.gone.set_result(None)

        return gone


class _Exchange:
    """A request on its way, and its answer."""

    def __init__(self, process: Process, psp: PspServer, fate: str, back_s: float) -> None:
        self._process = process
        self._psp = psp
        self._loop = psp.loop
        self._fate = fate
        self._back_s = back_s
        self._gone: Callable[[], None] | None = None
        self.told: asyncio.Future[Response] = psp.loop.create_future()

    def begin(self, method: str, target: str, body: bytes, there_s: float) -> None:
        """Send it."""
        fate, loop = self._fate, self._loop
        if fate in ("good", "answer_lost", "late"):
            late_s = self._back_s if fate == "late" else 0
            there = self._psp.process.context
            loop.call_later(there_s + late_s, self._arrive, method, target, body, context=there)
        if fate in ("lost", "late"):
            loop.call_later(there_s, self._answer, None, context=self._process.context)

    def end(self, there_s: float) -> None:
        """The client closes the connection, or gives it back."""
        self.told.cancel()
        self._loop.call_later(there_s, self._close, context=self._psp.process.context)

    def _arrive(self, method: str, target: str, body: bytes) -> None:
        self._gone = self._psp.serve(method, target, body, self._tell)
        if self.told.done() or not self._process.alive:
            self._gone()
        self._process.at_end.append(self._gone)

    def _tell(self, response: Response | None) -> None:
        if self._fate == "answer_lost":
            response = None
        if self._fate != "late":
            here = self._process.context
            self._loop.call_later(self._back_s, self._answer, response, context=here)

    def _answer(self, response: Response | None) -> None:
        if self.told.done():
            return
        if response is None:
            self.told.set_exception(MaybeSent(Reason.CONNECTION_LOST))
        else:
            self.told.set_result(response)

    def _close(self) -> None:
        if self._gone is not None:
            self._gone()


class HttpClient:
    """`gateway.connectors.http.HttpClient` over the simulated network: the same promises."""

    def __init__(self, network: Network, process: Process, psp: PspServer) -> None:
        self._network = network
        self._process = process
        self._psp = psp

    async def request(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        send_before: float,
        answer_timeout_s: float,
        answer_before: float = math.inf,
    ) -> Response:
        """See there."""
        # A connection has to be waited for, or made.
        await asyncio.sleep(self._network.latency_s())
        now = time.monotonic()
        if now >= send_before:
            raise NotSent(Reason.SEND_WINDOW_PASSED)
        fate, there_s, back_s = self._network.fate(self._process, PSP)
        if fate == "refused":
            raise NotSent(Reason.CONNECT_FAILED)
        exchange = _Exchange(self._process, self._psp, fate, back_s)
        exchange.begin(method, target, body, there_s)
        try:
            async with asyncio.timeout(min(answer_timeout_s, answer_before - now)):
                return await exchange.told
        except TimeoutError:
            raise MaybeSent(Reason.ANSWER_TIMED_OUT) from None
        finally:
            exchange.end(there_s)

    async def close(self) -> None:
        """Nothing is held."""


def connector(
    network: Network, process: Process, psp: PspServer, profile: Profile, answer_timeout_s: float
) -> SimulatorConnector:
    """The simulator's connector of one gateway."""
    made = SimulatorConnector("http://psp", profile, answer_timeout_s=answer_timeout_s)
    made._http = cast("Any", HttpClient(network, process, psp))
    return made
