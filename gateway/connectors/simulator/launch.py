"""Starts a simulator as a child process, and steers one: for the demo and for tests."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeAlias

import orjson

from gateway.connectors.http import HttpClient, Limits
from gateway.connectors.simulator.journal import Record, read_journal

STOP_TIMEOUT_S: Final = 10.0
CONTROL_TIMEOUT_S: Final = 40.0


class SimulatorFailed(Exception):
    """The simulator did not start, or did not do what it was told."""


class Process(Protocol):
    """What is needed of a child process; the part of subprocess.Popen's interface."""

    @property
    def pid(self) -> int:
        """The process id."""

    def terminate(self) -> None:
        """SIGTERM; harmless where it has ended."""

    def kill(self) -> None:
        """SIGKILL; harmless where it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. Raises subprocess.TimeoutExpired."""


Run: TypeAlias = Callable[[Sequence[str], int], Process]
"""Starts the simulator's command line with these arguments, its standard output a descriptor."""


def execute(arguments: Sequence[str], stdout: int) -> Process:
    """`python -m gateway.connectors.simulator`."""
    # In a session of its own: Ctrl-C is for the launcher, which may need the PSP to drain.
    return subprocess.Popen(
        [sys.executable, "-m", "gateway.connectors.simulator", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        start_new_session=True,
    )


class SimulatorProcess:
    """A running simulator. It also ends when the thread that started it does."""

    def __init__(self, process: Process, url: str, journal: Path, iso8583_url: str = "") -> None:
        self._process = process
        self.url = url
        self.journal = journal
        self.iso8583_url = iso8583_url
        """As GATEWAY_ISO8583_HOSTS takes it; empty where it is no acquirer's host."""

    @classmethod
    def start(
        cls,
        journal: Path,
        profile: str = "idempotent",
        *,
        listen: str = "127.0.0.1:0",
        latency: str = "0",
        seed: int = 1,
        iso8583_specification: str = "",
        run: Run = execute,
    ) -> Self:
        """Start one and wait until it listens; blocks. Raises SimulatorFailed."""
        arguments = [
            *("--exit-with-parent", "--listen", listen),
            *("--journal", str(journal), "--profile", profile),
            *("--latency", latency, "--seed", str(seed)),
        ]
        if iso8583_specification:
            arguments += ["--iso8583", "--iso8583-specification", iso8583_specification]
        said, stdout = os.pipe()
        with os.fdopen(said, "rb") as lines:
            try:
                process = run(arguments, stdout)
            finally:
                os.close(stdout)
            line = lines.readline()
        if not line:
            process.kill()
            raise SimulatorFailed(f"the simulator ended with status {process.wait()}")
        told = orjson.loads(line)
        return cls(process, told["url"], journal, told.get("iso8583", ""))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        try:
            self._process.wait(0)
        except subprocess.TimeoutExpired:
            return True
        return False

    def records(self) -> list[Record]:
        """The journal's records until now."""
        return read_journal(self.journal)

    def received(self, method: str = "send") -> list[Record]:
        """The requests that were received until now."""
        return [
            record
            for record in self.records()
            if record["type"] == "received" and record["method"] == method
        ]

    def effects(self) -> list[Record]:
        """The effects that were made until now."""
        return [record for record in self.records() if record["type"] == "effect"]

    def stop(self) -> int:
        """SIGTERM, and wait; returns the exit status. Harmless where it has ended."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SimulatorFailed("the simulator did not stop") from None

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self._process.wait()


class SimulatorControl:
    """Steers a running simulator over its control resources."""

    def __init__(self, url: str) -> None:
        self._http = HttpClient(url, Limits(connections_max=8, waiters_max=64))

    async def hold(
        self,
        point: str = "before_effect",
        *,
        method: str = "send",
        kind: str = "",
        reference_prefix: str = "",
    ) -> None:
        """Stop matching requests at `before_effect` (received, nothing done) or `before_answer`."""
        await self._do(
            "hold", point=point, method=method, kind=kind, reference_prefix=reference_prefix
        )

    async def await_held(self, count: int = 1) -> list[dict[str, str]]:
        """Wait until so many requests are held; raises SimulatorFailed after 30 s."""
        held: list[dict[str, str]] = (await self._do("await_held", count=count))["held"]
        if len(held) < count:
            raise SimulatorFailed(f"{len(held)} requests are held, not {count}")
        return held

    async def release(self, reference: str = "") -> None:
        """Let the held requests of a reference go on; without one all, and hold no more."""
        await self._do("release", reference=reference)

    async def latency(self, p50_ms: float, p99_ms: float) -> None:
        """Set the latency, in milliseconds."""
        await self._do("latency", p50_ms=p50_ms, p99_ms=p99_ms)

    async def mode(self, mode: str) -> None:
        """`up`, `down` (status 503), `hang` or `reset`; requests are journalled all the same."""
        await self._do("mode", mode=mode)

    async def advance_clock(self, seconds: int) -> None:
        """Set the simulator's clock ahead, so that keys expire."""
        await self._do("advance_clock", seconds=seconds)

    async def close_idle(self) -> None:
        """Close every connection on which no request is under way."""
        await self._do("close_idle")

    async def notify(
        self,
        url: str,
        secret: str = "",
        *,
        p50_ms: float = 0,
        p99_ms: float = 0,
        duplicate_percent: int = 0,
    ) -> None:
        """Tell what comes of operations from now on; nothing with an empty `url`."""
        await self._do(
            "notify",
            url=url,
            secret=secret,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            duplicate_percent=duplicate_percent,
        )

    async def operate(self, kind: str, reference: str, amount_minor: int = 0) -> dict[str, Any]:
        """Refund, capture or void the authorization with a reference, as in the PSP's console; what
        the PSP says of it.
        """
        told = await self._do("operate", kind=kind, reference=reference, amount_minor=amount_minor)
        answer: dict[str, Any] = told["answer"]
        return answer

    async def dispute(
        self, reference: str, amount_minor: int, status: str = "OPENED", stage: str = ""
    ) -> None:
        """Have a customer dispute an authorization, or a dispute go on."""
        await self._do(
            "dispute", reference=reference, amount_minor=amount_minor, status=status, stage=stage
        )

    async def reset_lateness(self) -> None:
        """Begin to measure the answers' lateness anew."""
        await self._do("reset_lateness")

    async def state(self) -> dict[str, Any]:
        """`journal`, `mode`, `requests`, `in_flight`, `connections`, `lateness`, `held`.

        `lateness` has `count`, `p50_ms`, `p99_ms`, `p999_ms` and `max_ms`, of the answers to first
        requests with a delay.
        """
        return await self._do("state")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _do(self, action: str, **body: object) -> dict[str, Any]:
        response = await self._http.request(
            "POST",
            f"/control/{action}",
            orjson.dumps(body),
            send_before=time.monotonic() + CONTROL_TIMEOUT_S,
            answer_timeout_s=CONTROL_TIMEOUT_S,
        )
        if response.status != 200:
            raise SimulatorFailed(f"{action}: status {response.status}, {response.body[:200]!r}")
        state: dict[str, Any] = orjson.loads(response.body)
        return state
