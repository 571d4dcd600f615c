"""Everything that a local load test runs: PostgreSQL, Redis, the simulator, gateways, all children.

Each run has a fresh database, merchants and journal of its own in the folder; the servers' data
directories are kept, so that the next start is quick.
"""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import asyncpg

from gateway.connectors.simulator.launch import SimulatorControl, SimulatorProcess
from storage.embedded import EmbeddedPostgres, EmbeddedRedis
from storage.postgres.accounts import Accounts
from storage.postgres.migrate import migrate

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 45.0
"""A gateway drains for up to GATEWAY_DRAIN_GRACE_S first."""
POLL_S: Final = 0.02
LOG_TAIL_LINES: Final = 12
PSP_LATENCY: Final = "120,380"
"""The simulator's median and 99th percentile in milliseconds, as of the SLO."""
RETAINED_DATABASES: Final = "load_%"

_PR_SET_PDEATHSIG: Final = 1
_WITH_PARENT: Final = (
    "import ctypes, os, sys;"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)});"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
"""Ends with the thread that started it, and becomes the program."""


class StackFailed(Exception):
    """A process of the load test did not start or did not stay up; the text says what it said."""


def launch(
    command: Sequence[str], output: IO[bytes] | None, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """A Python process that ends with us; without an `output` it writes where we do.

    In a session of its own: Ctrl-C is for us, who drain first.
    """
    return subprocess.Popen(
        [sys.executable, "-ISc", _WITH_PARENT, sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(environment),
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL where that does not end it. Harmless where it has ended."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Child:
    """A process with a log."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = launch(command, file, environment)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def line_with(self, text: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """The first line of its log with this text; waits for it. Raises StackFailed."""
        until = time.monotonic() + timeout_s
        while True:
            ended = self._process.poll() is not None
            for line in self.log.read_text("utf-8", "replace").splitlines():
                if text in line:
                    return line
            if ended or time.monotonic() > until:
                raise StackFailed(f"the {self.name} did not start:\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self) -> str:
        """The end of its log."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def check(self) -> None:
        """Raises StackFailed where it has ended."""
        status = self._process.poll()
        if status is not None:
            raise StackFailed(f"the {self.name} ended with status {status}:\n{self.tail()}")

    def stop(self) -> None:
        """End it, gently first."""
        stop(self._process)


def inherited(**more: str) -> dict[str, str]:
    """Our environment and what is added to it."""
    return {**os.environ, **more}


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to run."""

    folder: Path
    transport: str = "grpcio"
    workers: int = 0
    """Processes of the gateway; 0: one, without naming the option."""
    merchants: int = 100
    psp_latency: str = PSP_LATENCY
    command: tuple[str, ...] = ("-m", "gateway", "serve")
    """The gateway's, for a build of one's own."""


@dataclass
class Stack:
    """A whole system. Enter it in the main thread; everything ends with it."""

    options: StackOptions
    dsn: str = ""
    address: str = ""
    api_key: str = field(default="", repr=False)
    merchant_ids: list[str] = field(default_factory=list)
    pids: dict[str, int] = field(default_factory=dict)
    """The roots of the process trees that share the machine."""
    _exit: ExitStack = field(default_factory=ExitStack)
    _simulator: SimulatorProcess | None = None
    _gateway: Child | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    @property
    def simulator(self) -> SimulatorProcess:
        """The PSP."""
        assert self._simulator is not None
        return self._simulator

    @property
    def gateway(self) -> Child:
        """The gateway, or the supervisor of its workers."""
        assert self._gateway is not None
        return self._gateway

    def _start(self) -> None:
        folder = self.options.folder
        folder.mkdir(parents=True, exist_ok=True)
        postgres = EmbeddedPostgres(folder / "postgres")
        postgres.start()
        self._exit.callback(postgres.stop)
        redis = EmbeddedRedis(folder / "redis")
        redis.start()
        self._exit.callback(redis.stop)
        database = f"load_{secrets.token_hex(4)}"
        self.dsn = postgres.dsn_of(database)
        asyncio.run(self._prepare(postgres.dsn, database))
        journal = folder / "simulator.journal"
        journal.unlink(missing_ok=True)
        self._simulator = SimulatorProcess.start(journal, latency=self.options.psp_latency)
        self._exit.callback(self._simulator.stop)
        self._gateway = self._start_gateway(redis.url)
        self.pids = {
            "gateway": self._gateway.pid,
            "PostgreSQL": postgres.pid,
            "Redis": redis.pid,
            "simulator": self._simulator.pid,
        }

    def _start_gateway(self, redis_url: str) -> Child:
        settings = {
            "GATEWAY_LISTEN_ADDRESS": "127.0.0.1:0",
            "GATEWAY_METRICS_ADDRESS": "127.0.0.1:0",
            # What the caller's environment says of tuning stays, what the run decides does not.
            **{name: text for name, text in os.environ.items() if name.startswith("GATEWAY_")},
            "GATEWAY_POSTGRES_DSN": self.dsn,
            "GATEWAY_REDIS_URL": redis_url,
            "GATEWAY_SIMULATOR_URL": self.simulator.url,
            "GATEWAY_SIMULATOR_PROFILE": "idempotent",
            "GATEWAY_TRANSPORT": self.options.transport,
        }
        if self.options.transport == "native":
            settings["GATEWAY_TRUSTED_FRONT"] = "true"
        command = list(self.options.command)
        if self.options.workers:
            command += ["--workers", str(self.options.workers)]
        gateway = Child(
            "gateway", command, self.options.folder / "gateway.log", inherited(**settings)
        )
        self._exit.callback(gateway.stop)
        self.address = json.loads(gateway.line_with('"message":"serving"'))["address"]
        return gateway

    async def _prepare(self, dsn: str, database: str) -> None:
        """A fresh database with the merchants; those of earlier runs go."""
        server = await asyncpg.connect(dsn)
        try:
            stale = await server.fetch(
                "SELECT datname FROM pg_database WHERE datname LIKE $1", RETAINED_DATABASES
            )
            for row in stale:
                await server.execute(f'DROP DATABASE "{row["datname"]}" WITH (FORCE)')
            await server.execute(f'CREATE DATABASE "{database}"')
        finally:
            await server.close()
        await migrate(self.dsn)
        async with Accounts.connect(self.dsn) as accounts:
            organisation_id = await accounts.create_organisation("Load test")
            self.merchant_ids = [
                await accounts.create_merchant(organisation_id, f"Shop {number}")
                for number in range(1, self.options.merchants + 1)
            ]
            key = await accounts.create_key(
                organisation_id,
                scopes=("payments:read", "payments:write"),
                mode="test",
                merchant_ids=None,
            )
            self.api_key = key.text

    def reset_lateness(self) -> None:
        """Have the simulator measure its lateness from now on."""
        asyncio.run(_with_control(self.simulator.url, reset=True))

    def lateness(self) -> dict[str, float]:
        """The simulator's own, in milliseconds."""
        return asyncio.run(_with_control(self.simulator.url, reset=False))


async def _with_control(url: str, *, reset: bool) -> dict[str, float]:
    control = SimulatorControl(url)
    try:
        if reset:
            await control.reset_lateness()
        lateness: dict[str, float] = (await control.state())["lateness"]
        return lateness
    finally:
        await control.close()
