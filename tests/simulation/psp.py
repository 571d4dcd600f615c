"""The PSP, simulated: the simulator's own server, ledger and connector, over this network."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import TYPE_CHECKING, Any, Final, cast

from gateway.connectors.http import MaybeSent, NotSent, Response
from gateway.connectors.simulator.latency import Latency
from gateway.connectors.simulator.ledger import Ledger
from gateway.connectors.simulator.server import Simulator
from gateway.domain.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.connectors.simulator.journal import Record
    from gateway.connectors.simulator.profiles import Profile
    from gateway.domain.model import ConnectorAnswer
    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network

PSP: Final = "psp"
ASK: Final = "ASK"
"""The method of a question that uses up a reference which is not known."""
LATENCY: Final = Latency(20, 300)


class _Journal:
    """Keeps the records; a transaction of the simulated PSP is durable at once."""

    def __init__(self, account_id: str, records: list[Record]) -> None:
        self.run = 1
        self._account_id = account_id
        self._records = records
        self.on_record: Callable[[Record], None] | None = None
        """Called with what was decided or done."""

    def append(self, record: Record) -> None:
        # What a record holds goes on changing in the ledger.
        kept = {"account": self._account_id, **record}
        self._records.append(kept)
        if self.on_record is not None and record["type"] in ("effect", "outcome"):
            self.on_record(kept)

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

    def __init__(
        self,
        loop: SimulatedLoop,
        process: Process,
        account_id: str,
        profile: Profile,
        records: list[Record],
        draw: random.Random,
    ) -> None:
        """`records` is the journal that it shares with other PSPs."""
        self.loop = loop
        self.process = process
        self.name = process.name
        self._journal = _Journal(account_id, records)
        journal_id = f"j51e{process.number:x}"
        self.ledger = Ledger(profile, [{"type": "start", "journal_id": journal_id}])
        self._simulator = Simulator(
            cast("Any", self._journal), self.ledger, latency=LATENCY, source=draw
        )
        self.first_answers: dict[str, ConnectorAnswer] = {}
        """By reference, of a PSP that repeats them."""

    def on_record(self, told: Callable[[Record], None]) -> None:
        """Call `told` with whatever it decides or does from now on."""
        self._journal.on_record = told

    def look(self, kind: str, reference: str) -> None:
        """Let time do what it does to a transaction: what is pending settles, a page expires."""
        for record in self.ledger.query(kind, reference, self.ledger.request_count, time.time())[0]:
            self._journal.append(record)

    def set_mode(self, mode: str) -> None:
        """The simulator's mode, docs/simulator.md."""
        self._simulator._mode = mode

    def serve(
        self, method: str, target: str, body: bytes, tell: Callable[[Response | None], None]
    ) -> Callable[[], None]:
        """Handle a request; what is returned tells that the client has gone."""
        connection = _Connection(self.loop, tell)
        if method == ASK:
            reference = target.rpartition("/")[2]
            known = self.ledger.reference(reference)
            decided = known is not None and (known.transactions or known.canceled)
            is_known = decided or reference in self._simulator._working
            method, target = ("GET", target) if is_known else ("POST", f"{target}/cancel")
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
        fate, there_s, back_s = self._network.fate(self._process, self._psp.name)
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
