"""Gateways that kill themselves at a chosen wait, forked quickly from a nursery.

Run as a process, it is the nursery: it imports the gateway once and forks a gateway for every
request that comes over its socket. `Nursery` is the test's side.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.faults import stepping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CALLS: Final = "calls"
"""The scope of what a caller waits for: the call itself, the work detached from it, its batches."""
RECOVERY: Final = "recovery"
"""The scope of recovery: its loop, each operation that it took, its batches."""
NOTHING: Final = ""

START_TIMEOUT_S: Final = 60.0
REQUEST_BYTES_MAX: Final = 64 * 1024

_CALLS: Final = ("authorize", "capture", "void", "refund", "increment")
_FLOWS: Final = {
    CALLS: frozenset({"Payments._guarded", "Payments._restart"}),
    RECOVERY: frozenset({"Recovery.run", "Recovery.run_once.<locals>.one"}),
    NOTHING: frozenset[str](),
}
_LANES: Final = {
    # Not those of Redis: what a claim may have done is done, or not, when its waiter goes on, and
    # nobody waits for a settlement.
    CALLS: frozenset({"intents", "follow_ups", "changes", "reads"}),
    RECOVERY: frozenset({"direct", "changes", "reads"}),
    NOTHING: frozenset[str](),
}
_PR_SET_PDEATHSIG: Final = 1


class CrashingGateway:
    """A forked gateway."""

    def __init__(self, nursery: Nursery, pid: int, log: int, visits: Path) -> None:
        self._nursery = nursery
        self._pid = pid
        self._log = os.fdopen(log, "rb")
        self._visits = visits
        self._status: int | None = None
        self.lines: list[str] = []
        """What it logged, as far as it was read."""

    async def address(self) -> str:
        """Where it serves, once it does; empty where it died before."""
        while line := await asyncio.to_thread(self._log.readline):
            self.lines.append(line.decode("utf-8", "replace"))
            if b'"message":"serving"' in line:
                address: str = json.loads(line)["address"]
                return address
        return ""

    async def died(self, timeout_s: float = START_TIMEOUT_S) -> bool:
        """Wait until it has ended by itself; whether it was by SIGKILL. False where it goes on."""
        rest = asyncio.ensure_future(asyncio.to_thread(self._log.read))
        await asyncio.wait([rest], timeout=timeout_s)
        ended = rest.done()
        if not ended:
            self.kill()  # which ends the reading
        self.lines += (await rest).decode("utf-8", "replace").splitlines(keepends=True)
        return self._reap() == signal.SIGKILL and ended

    @property
    def log(self) -> str:
        """What it logged, as far as it was read."""
        return "".join(self.lines)

    def visits(self) -> list[str]:
        """The sites that it came by until now, in order."""
        return self._visits.read_text().splitlines() if self._visits.exists() else []

    def kill(self) -> None:
        """SIGKILL, and wait. Harmless where it has ended."""
        if self._status is None:
            # Even when it has ended it is a zombie of the nursery's, and its pid nobody else's.
            os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def end(self) -> None:
        """Kill it, and let go of its log."""
        self.kill()
        self._log.close()

    def _reap(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(self._nursery.reap(self._pid))
        return -self._status


class Nursery:
    """The process that forks gateways; ends, with them, at the end of `open`."""

    def __init__(self, directory: Path, channel: socket.socket) -> None:
        self._directory = directory
        self._channel = channel
        self._started = 0

    @classmethod
    @contextmanager
    def open(cls, directory: Path) -> Iterator[Nursery]:
        """Start one; `directory` takes the lists of visits."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.crashing_gateway", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_inherited(),
                cwd=Path(__file__).resolve().parents[2],
                start_new_session=True,
            )
            theirs.close()
            try:
                yield cls(directory, ours)
            finally:
                ours.close()  # which ends it
                process.wait(START_TIMEOUT_S)

    def start(
        self, environment: Mapping[str, str], scope: str = NOTHING, kill_at: str = ""
    ) -> CrashingGateway:
        """Fork a gateway with these settings that writes down the sites of `scope` that it comes
        by, and kills itself at the site `kill_at`.
        """
        self._started += 1
        visits = self._directory / f"visits-{self._started}"
        reader, writer = os.pipe()
        request = {
            "environment": dict(environment),
            "scope": scope,
            "kill_at": kill_at,
            "visits": str(visits),
        }
        socket.send_fds(self._channel, [json.dumps(request).encode()], [writer])
        os.close(writer)
        return CrashingGateway(self, self._answer(), reader, visits)

    def reap(self, pid: int) -> int:
        """The wait status of a gateway that has ended or is about to."""
        self._channel.send(json.dumps({"reap": pid}).encode())
        return self._answer()

    def _answer(self) -> int:
        answer = self._channel.recv(REQUEST_BYTES_MAX)
        assert answer, "the nursery is gone"
        return int(answer)


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}


# --- the nursery's side ---------------------------------------------------------------------------


def _serve_nursery(channel: socket.socket) -> None:
    import gateway.composition  # noqa: F401, PLC0415 - what the children need is imported once

    gc.collect()
    gc.freeze()  # or a child's first collection would copy every page
    while True:
        message, fds, _, _ = socket.recv_fds(channel, REQUEST_BYTES_MAX, 1)
        if not message:
            return
        request = json.loads(message)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            channel.send(str(status).encode())
            continue
        [log] = fds
        pid = os.fork()
        if pid == 0:
            channel.close()
            os.dup2(log, 2)
            os.close(log)
            _run_gateway(request)
        os.close(log)
        channel.send(str(pid).encode())


def _run_gateway(request: dict[str, Any]) -> None:
    from gateway.application.usecases import Payments  # noqa: PLC0415
    from gateway.composition import run_server  # noqa: PLC0415
    from gateway.settings import load_settings  # noqa: PLC0415

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        os.environ.update(request["environment"])
        scope = request["scope"]
        visit = stepping.Visitor(Path(request["visits"]), request["kill_at"])
        if scope == CALLS:
            for name in _CALLS:
                stepping.step_method(Payments, name, visit)

        def prepare(loop: asyncio.AbstractEventLoop) -> None:
            stepping.install(loop, visit, flows=_FLOWS[scope], lanes=_LANES[scope])

        run_server(load_settings(), prepare)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork must never go back into the nursery's loop
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as nursery_channel:
        _serve_nursery(nursery_channel)
