"""Several worker processes on one port: the supervisor that keeps them, and each worker's side.

The supervisor serves no call and loads no gRPC server. It reserves the port (SO_REUSEPORT: the
kernel spreads connections over the workers), starts each worker as a fresh process, starts anew
what dies, and answers for all of them over HTTP: metrics merged, ready while one worker is, alive
while the supervisor is.

Each worker has a socket pair with its supervisor. The supervisor asks over it for readiness and
metrics; the kernel closes it when either side dies. A worker whose supervisor has gone drains and
ends. Frames are JSON behind a length of four bytes. docs/decisions/0007-workers.md says why.
"""

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
)
from pydantic import SecretStr

from gateway import __version__
from gateway.heap import share_one_heap
from gateway.settings import Settings, SettingsError, load_settings, split_address, variable
from gateway.telemetry.http import MetricsServer
from gateway.telemetry.logs import loop_exception_handler
from gateway.telemetry.merging import Encode, MergedMetrics, take_snapshot
from gateway.telemetry.setup import start_logging

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from gateway.composition import Gateway

ANSWER_S_MAX: Final = 1.0
"""How long a scrape or a probe waits for a worker; its last metrics are used where it is silent."""
PULSE_S: Final = 2.0
"""How often each worker is asked without a scrape. What a killed worker counted after that is
missing from the sums, which still never go backwards."""
START_S_MAX: Final = 60.0
"""A worker that does not serve by then hangs, and is killed."""
STEADY_S: Final = 10.0
"""A worker that served for so long did not die at once: the next one is started without a pause."""
RESTART_PAUSE_S_MIN: Final = 0.1
"""The pause after the first worker that died at once; after each further one it is doubled."""
RESTART_PAUSE_S_MAX: Final = 10.0
"""The longest such pause."""
FAILED_STARTS_MAX: Final = 5
"""When no worker serves and each has failed so often in succession, the supervisor gives up. Until
one has served for the first time, once is enough."""
STOP_MARGIN_S: Final = 10.0
"""What a drain may take beside its two graces (for calls, and for what they left) to flush."""
EXIT_S_MAX: Final = 10.0
"""How long a worker may take to end once it has closed its channel; more than its logs' flush."""

_FRAME_BYTES = struct.Struct("!I")
_SUPERVISOR = "supervisor"
_NAMESPACE = "gateway"

_log = logging.getLogger(__name__)


class WorkersFailed(Exception):
    """The workers cannot serve; the text says why and what to do."""


# --- the channel ----------------------------------------------------------------------------------


def _frame(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return _FRAME_BYTES.pack(len(data)) + data


async def _receive(reader: "StreamReader") -> dict[str, Any] | None:
    """The next message; None when the other side has gone."""
    try:
        (length,) = _FRAME_BYTES.unpack(await reader.readexactly(_FRAME_BYTES.size))
        message: dict[str, Any] = json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def _receive_now(channel: socket.socket) -> dict[str, Any] | None:
    """The same before there is an event loop."""
    head = channel.recv(_FRAME_BYTES.size, socket.MSG_WAITALL)
    if len(head) < _FRAME_BYTES.size:
        return None
    (length,) = _FRAME_BYTES.unpack(head)
    data = channel.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        return None
    message: dict[str, Any] = json.loads(data)
    return message


# --- the port -------------------------------------------------------------------------------------


def reserve(address: str) -> tuple[list[socket.socket], str]:
    """Bind the address for processes to share; the sockets that keep it, and it with its port.

    Port 0 becomes a free one. The sockets do not listen, so they get no connection; they keep the
    port from others while no worker has it. Raises OSError, also where a server listens there
    already: SO_REUSEPORT alone would share the port with it in silence.
    """
    host, port = split_address(address)
    kept: list[socket.socket] = []
    missing: OSError | None = None
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, target in dict.fromkeys((each[0], each[4]) for each in found):
        try:
            keeper = _bound(family, (target[0], port, *target[2:]))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for each in kept:
                    each.close()
                raise
            missing = error  # `localhost` may name a family that this host does not have
        else:
            kept.append(keeper)
            port = keeper.getsockname()[1]
    if missing is not None and not kept:
        raise missing
    return kept, f"{address.rpartition(':')[0]}:{port}"


def _bound(family: int, target: tuple[Any, ...]) -> socket.socket:
    if target[1]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Passes over connections that a former server left, but over no listener.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    keeper = socket.socket(family, socket.SOCK_STREAM)
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(target)
    except OSError:
        keeper.close()
        raise
    return keeper


def _overlap(one: socket.socket, other: socket.socket) -> bool:
    """Whether a connection may reach either: SO_REUSEPORT would share the port among them."""
    (host, port), (other_host, other_port) = one.getsockname()[:2], other.getsockname()[:2]
    if port != other_port:
        return False
    of_one_family = (":" in host) == (":" in other_host)
    every = {"::"} if not of_one_family else {"::", "0.0.0.0"}  # noqa: S104 - compared only
    return host == other_host or host in every or other_host in every


# --- the supervisor -------------------------------------------------------------------------------


class Process(Protocol):
    """What is needed of a worker's process; the part of asyncio.subprocess.Process."""

    @property
    def pid(self) -> int:
        """The process id."""

    def send_signal(self, signal: int) -> None:
        """Raises ProcessLookupError where it has ended."""

    async def wait(self) -> int:
        """Wait for the exit status, negative for a signal."""


async def execute(channel: int) -> Process:
    """`python -m gateway worker`, which gets this descriptor. Raises OSError."""
    # In a session of its own: Ctrl-C is for the supervisor, which drains all together.
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "worker", str(channel)),
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=[channel],
        start_new_session=True,
    )


class _Place:
    """One of the N workers: the process that has the place now, and what is known of it."""

    def __init__(self, number: int) -> None:
        self.name = str(number)
        self.process: Process | None = None
        self.serving_since = 0.0
        """On the monotonic clock; 0: it does not serve."""
        self.tried = False
        """Whether a first worker has served or ended."""
        self.failure = ""
        """What the last worker said that could not start."""
        self.failed_starts = 0
        self.quick_deaths = 0
        self.pulses_missed = 0
        self._writer: StreamWriter | None = None
        self._turn = asyncio.Lock()
        self._asked: asyncio.Future[dict[str, Any] | None] | None = None

    @property
    def serving(self) -> bool:
        return self.serving_since > 0

    def begin(self, process: Process, writer: "StreamWriter") -> None:
        """A process has taken the place."""
        self.process, self._writer = process, writer
        self.failure = ""
        self.pulses_missed = 0

    def served(self) -> None:
        """It accepts calls."""
        self.tried = True
        self.serving_since = time.monotonic()
        self.failed_starts = 0
        self.pulses_missed = 0

    def end(self) -> None:
        """It has ended; how soon decides when the next one is started."""
        self.tried = True
        if not self.serving:
            self.failed_starts += 1
        steady = self.serving and time.monotonic() - self.serving_since >= STEADY_S
        self.quick_deaths = 0 if steady else self.quick_deaths + 1
        self.serving_since = 0.0
        self.process = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.answered(None)

    @property
    def pause_s(self) -> float:
        """How long the place stays empty."""
        if self.quick_deaths == 0:
            return 0.0
        doublings = min(self.quick_deaths - 1, 16)  # far beyond the longest pause
        return min(RESTART_PAUSE_S_MAX, RESTART_PAUSE_S_MIN * float(1 << doublings))

    async def ask(self, what: str) -> dict[str, Any] | None:
        """What the worker answers, `ready` and with `metrics` a `snapshot`; None if it is silent.

        At most one question is open: a paused worker does not find a pile of them.
        """
        try:
            async with asyncio.timeout(ANSWER_S_MAX), self._turn:
                if self._asked is not None:
                    await asyncio.shield(self._asked)  # a late answer, to an older question
                if self._writer is None or not self.serving:
                    return None
                self._asked = asyncio.get_running_loop().create_future()
                self._writer.write(_frame({"ask": what}))
                return await asyncio.shield(self._asked)
        except TimeoutError:
            return None

    def answered(self, message: dict[str, Any] | None) -> None:
        """It answered the open question; None: it will not."""
        if self._asked is not None:
            self._asked.set_result(message)
            self._asked = None

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal, if there is one."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """Keeps `settings.workers` workers on one port until SIGTERM or SIGINT, then drains them all.

    A second signal changes nothing: draining is bounded already, and cutting it short would leave
    calls to recovery. `announce` is called once with the address, when the workers serve.
    """

    def __init__(self, settings: Settings, announce: Callable[[str], None]) -> None:
        self._settings = settings
        self._announce = announce
        self._places = [_Place(number + 1) for number in range(settings.workers)]
        self._merged = MergedMetrics()
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._up = self._gauge("worker_up", "Whether the worker answered this scrape: 1 or 0.")
        self._ready = self._gauge("worker_ready", "Whether the worker serves calls: 1 or 0.")
        self._restarts = Counter(
            "worker_restarts",
            "Workers started in the place of one that ended.",
            ["worker"],
            namespace=_NAMESPACE,
            registry=self._registry,
        )
        for place in self._places:
            self._restarts.labels(place.name)
        self._addresses: dict[str, str] = {}
        """Those that the workers share, by their settings' names."""
        self._stop = asyncio.Event()
        self._announced = False
        self._given_up = ""
        self._undrained: list[str] = []

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["worker"], namespace=_NAMESPACE, registry=self._registry)

    async def run(self) -> None:
        """Supervise. Raises WorkersFailed where workers cannot serve, or did not drain."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(loop_exception_handler)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain)
        http = MetricsServer(self._render, self._readiness, self._settings.metrics_address)
        kept: list[socket.socket] = []
        try:
            for name in ("listen_address", "notifications_address"):
                address: str = getattr(self._settings, name)
                if not address:
                    continue
                try:
                    keepers, self._addresses[name] = reserve(address)
                except OSError as error:
                    raise WorkersFailed(
                        f"The gateway cannot listen on {address}: {error}"
                    ) from error
                shared = any(_overlap(one, other) for one in kept for other in keepers)
                kept += keepers
                if shared:
                    raise WorkersFailed(
                        f"The gateway cannot listen on {address}: it is {variable(name)}, and gRPC"
                        " is served there"
                    )
            try:
                await http.start()
            except OSError as error:
                raise WorkersFailed(f"The gateway cannot listen: {error}") from error
            await self._supervise()
        finally:
            await http.stop()
            for keeper in kept:
                keeper.close()
        if self._given_up:
            raise WorkersFailed(self._given_up)
        if self._undrained:
            raise WorkersFailed(f"Not drained: {', '.join(self._undrained)}")

    async def _supervise(self) -> None:
        keepers = [asyncio.create_task(self._keep(place)) for place in self._places]
        pulses = [asyncio.create_task(self._pulse(place)) for place in self._places]
        all_kept = asyncio.gather(*keepers)
        stopping = asyncio.create_task(self._stop.wait())
        either: list[asyncio.Future[Any]] = [all_kept, stopping]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                grace_s = 2 * self._settings.drain_grace_s + STOP_MARGIN_S
                await asyncio.wait([all_kept], timeout=grace_s)
                for place in self._places:
                    if place.process is not None:
                        _log.error("worker does not drain", extra=self._about(place))
                        place.signal(signal.SIGKILL)
            await all_kept
        finally:
            for task in (stopping, *pulses, *keepers):
                task.cancel()

    def _drain(self) -> None:
        if self._stop.is_set():
            _log.info("draining already")
            return
        _log.info("draining")
        self._stop_workers()

    def _stop_workers(self) -> None:
        self._stop.set()
        for place in self._places:
            place.signal(signal.SIGTERM)

    async def _keep(self, place: _Place) -> None:
        """Have a worker in the place until the end."""
        while not self._stop.is_set():
            try:
                process, reader = await self._start(place)
            except OSError as error:  # no process, no descriptor, no memory
                place.failure = f"No worker can be started: {error}"
                self._ended(place, 1)
            else:
                self._ended(place, await self._attend(place, process, reader))
            if not self._stop.is_set():
                self._restarts.labels(place.name).inc()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), place.pause_s)

    async def _attend(self, place: _Place, process: Process, reader: "StreamReader") -> int:
        """Hear the worker out; its exit status."""
        while (message := await _receive(reader)) is not None:
            self._heard(place, message)
        try:
            async with asyncio.timeout(EXIT_S_MAX):
                return await process.wait()
        except TimeoutError:
            place.signal(signal.SIGKILL)
            return await process.wait()

    async def _start(self, place: _Place) -> tuple[Process, "StreamReader"]:
        ours, theirs = socket.socketpair()
        try:
            process = await execute(theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        # Over the channel, for the settings hold secrets that a command line would show.
        settings = _plain(self._settings) | self._addresses
        writer.write(_frame({"worker": place.name, "settings": settings}))
        place.begin(process, writer)
        _log.info("worker started", extra=self._about(place))
        if self._stop.is_set():
            place.signal(signal.SIGTERM)
        return process, reader

    def _about(self, place: _Place) -> dict[str, Any]:
        return {"worker": place.name, "worker_pid": place.process and place.process.pid}

    def _heard(self, place: _Place, message: dict[str, Any]) -> None:
        if "snapshot" in message:
            self._merged.update(place.name, message["snapshot"])
        if "ready" in message:
            place.answered(message)
        elif "serving" in message:
            place.served()
            _log.info("worker serving", extra=self._about(place))
            self._announce_once()
        elif "failed" in message:
            place.failure = message["failed"]

    def _ended(self, place: _Place, status: int) -> None:
        about, served = self._about(place), place.serving
        about["uptime_s"] = round(time.monotonic() - place.serving_since, 3) if served else 0.0
        about["status"] = _status(status)
        place.end()
        self._merged.retire(place.name)
        if self._stop.is_set():
            # Before a worker serves, SIGTERM just ends it, and nothing is lost.
            if status == 0 or not served:
                _log.info("worker drained", extra=about)
            else:
                _log.error("worker did not drain", extra=about)
                self._undrained.append(f"worker {place.name} ({about['status']})")
            return
        about["pause_s"] = place.pause_s
        if served:
            _log.log(logging.ERROR if status else logging.INFO, "worker ended", extra=about)
        else:
            if self._announced or any(each.serving for each in self._places):
                # Otherwise it is what the supervisor itself may end with.
                about["reason"] = place.failure
            _log.error("worker could not start", extra=about)
        self._announce_once()
        limit = FAILED_STARTS_MAX if self._announced else 1
        if all(not each.serving and each.failed_starts >= limit for each in self._places):
            reasons = {each.failure: None for each in self._places if each.failure}
            self._given_up = "\n".join(reasons) or (
                f"Workers end before they serve, the last with {about['status']}."
            )
            self._stop_workers()

    def _announce_once(self) -> None:
        """Once every place has had its first worker, and one of them serves."""
        if self._announced or not all(place.tried for place in self._places):
            return
        if any(place.serving for place in self._places):
            self._announced = True
            self._announce(self._addresses["listen_address"])

    async def _pulse(self, place: _Place) -> None:
        """Keep the worker's last metrics fresh, and end it where it is silent for too long.

        Counted in questions, not by a clock: a supervisor that was paused itself blames no worker.
        """
        while not self._stop.is_set():
            await asyncio.sleep(PULSE_S)
            if await place.ask("metrics") is not None or place.process is None:
                place.pulses_missed = 0
                continue
            place.pulses_missed += 1
            limit_s = self._settings.worker_silence_s_max if place.serving else START_S_MAX
            if 0 < limit_s <= place.pulses_missed * PULSE_S and not self._stop.is_set():
                _log.error("worker is silent", extra=self._about(place))
                place.signal(signal.SIGKILL)

    # What is served over HTTP.

    async def _render(self, encode: Encode) -> bytes:
        answers = await asyncio.gather(*(place.ask("metrics") for place in self._places))
        for place, answer in zip(self._places, answers, strict=True):
            self._up.labels(place.name).set(answer is not None)
            self._ready.labels(place.name).set(answer is not None and answer["ready"])
        self._merged.update(_SUPERVISOR, take_snapshot(self._registry, {}))
        return self._merged.render(encode)

    async def _readiness(self) -> tuple[bool, str]:
        if self._stop.is_set():
            return False, "draining"
        asks = [asyncio.create_task(place.ask("ready")) for place in self._places]
        try:
            for first in asyncio.as_completed(asks):
                answer = await first
                if answer is not None and answer["ready"]:
                    return True, "ready"
        finally:
            for task in asks:
                task.cancel()
        return False, "no worker is ready"


def _plain(settings: Settings) -> dict[str, Any]:
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in settings
    }


def _status(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def run_workers(settings: Settings, announce: Callable[[str], None]) -> None:
    """Supervise until SIGTERM or SIGINT. Raises WorkersFailed.

    Call it in the main thread; logging is configured already.
    """

    async def run() -> None:
        await Supervisor(settings, announce).run()

    asyncio.run(run())


def serve_with_workers(settings: Settings) -> None:
    """`gateway serve` with several workers. Raises WorkersFailed."""
    start_logging(settings)

    def announce(address: str) -> None:
        _log.info(
            "serving",
            extra={
                "version": __version__,
                "address": address,
                "transport": settings.transport,
                "workers": settings.workers,
            },
        )

    run_workers(settings, announce)


# --- a worker -------------------------------------------------------------------------------------


def work(descriptor: int) -> int:
    """`gateway worker`: serve as one of several; the exit status.

    `descriptor` is the worker's end of its channel, which also brings the settings.
    """
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    job = _receive_now(channel)
    if job is None:
        return 1  # the supervisor has gone before it said what to do
    try:
        settings = load_settings(**job["settings"])
    except SettingsError as error:
        channel.sendall(_frame({"failed": str(error)}))
        return 1
    share_one_heap()
    logs = start_logging(settings)

    def mark(record: logging.LogRecord) -> bool:
        record.worker = job["worker"]
        return True

    logs.writer.addFilter(mark)
    from gateway import composition  # noqa: PLC0415 - the supervisor must not load gRPC

    return composition.run_loop(_work(channel, settings))


async def _work(channel: socket.socket, settings: Settings) -> int:
    from gateway import composition  # noqa: PLC0415 - as above

    reader, writer = await asyncio.open_unix_connection(sock=channel)
    stop = asyncio.Event()
    serving: list[Gateway] = []

    def announce(gateway: "Gateway") -> None:
        serving.append(gateway)
        writer.write(_frame({"serving": gateway.server.address}))

    async def obey() -> None:
        while (message := await _receive(reader)) is not None:
            [gateway] = serving
            answer: dict[str, Any] = {"ready": gateway.ready}
            if message["ask"] == "metrics":
                answer["snapshot"] = gateway.metrics.snapshot()
            writer.write(_frame(answer))
        _log.warning("the supervisor has gone")
        # Nobody is left to end a worker that cannot drain. The signal's default does.
        signal.alarm(int(2 * settings.drain_grace_s + STOP_MARGIN_S) + 1)
        stop.set()

    obeying = asyncio.create_task(obey())
    status = 0
    try:
        await composition.serve(settings, announce, stop)
    except composition.StartError as error:
        writer.write(_frame({"failed": str(error)}))
        status = 1
    obeying.cancel()
    if serving:
        # The last counts, those of the drain among them.
        writer.write(_frame({"snapshot": serving[0].metrics.snapshot()}))
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return status
