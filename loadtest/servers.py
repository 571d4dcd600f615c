"""Everything that a local load test runs: PostgreSQL, Redis, the simulator, gateways, all children.

Each run has a fresh database, merchants and journal of its own in the folder; the servers' data
directories are kept, so that the next start is quick.
"""

import asyncio
import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import asyncpg

from gateway.connectors.http import MaybeSent, NotSent
from gateway.connectors.simulator.launch import (
    SimulatorControl,
    SimulatorFailed,
    SimulatorProcess,
)
from loadtest.children import Process, ProcessFailed
from storage.embedded import EmbeddedPostgres, EmbeddedRedis
from storage.postgres.accounts import Accounts
from storage.postgres.migrate import migrate

PSP_LATENCY: Final = "120,380"
"""The simulator's median and 99th percentile in milliseconds, as of the SLO."""
REDIS_SETTINGS: Final = {"maxmemory": "2gb"}
"""Room for the answers of a quarter of an hour at 1,500/s, as docs/deploy.md wants it."""
RETAINED_DATABASES: Final = "load_%"


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
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further GATEWAY_* variables of it."""


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
    _gateway: Process | None = None
    _servers: dict[str, EmbeddedPostgres | EmbeddedRedis | SimulatorProcess | Process] = field(
        default_factory=dict
    )

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
    def gateway(self) -> Process:
        """The gateway, or the supervisor of its workers."""
        assert self._gateway is not None
        return self._gateway

    @property
    def ended(self) -> list[str]:
        """The servers that have ended by themselves."""
        return [name for name, server in self._servers.items() if not server.running]

    @property
    def workers_ended(self) -> int:
        """How many workers of the gateway have ended; its supervisor replaces them."""
        return self.gateway.lines_with('"message":"worker ended"')

    def _start(self) -> None:
        folder = self.options.folder
        folder.mkdir(parents=True, exist_ok=True)
        postgres = EmbeddedPostgres(folder / "postgres")
        postgres.start()
        self._exit.callback(postgres.stop)
        redis = EmbeddedRedis(folder / "redis", settings=REDIS_SETTINGS)
        redis.start()
        self._exit.callback(redis.stop)
        database = f"load_{secrets.token_hex(4)}"
        self.dsn = postgres.dsn_of(database)
        asyncio.run(self._prepare(postgres.dsn, database))
        journal = folder / "simulator.journal"
        journal.unlink(missing_ok=True)
        try:
            self._simulator = SimulatorProcess.start(journal, latency=self.options.psp_latency)
        except SimulatorFailed as error:
            raise ProcessFailed(str(error)) from error
        self._exit.callback(self._simulator.stop)
        self._gateway = self._start_gateway(redis.url)
        self._servers = {
            "gateway": self._gateway,
            "PostgreSQL": postgres,
            "Redis": redis,
            "simulator": self._simulator,
        }
        self.pids = {name: server.pid for name, server in self._servers.items()}

    def _start_gateway(self, redis_url: str) -> Process:
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
            **self.options.settings,
        }
        if self.options.transport == "native":
            settings["GATEWAY_TRUSTED_FRONT"] = "true"
        command = list(self.options.command)
        if self.options.workers:
            command += ["--workers", str(self.options.workers)]
        gateway = Process.python("gateway", command, settings, self.options.folder)
        self._exit.callback(gateway.stop)
        self.address = gateway.await_serving()
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
        """Have the simulator measure its lateness from now on. Raises ProcessFailed."""
        asyncio.run(_with_control(self.simulator.url, reset=True))

    def lateness(self) -> dict[str, float]:
        """The simulator's own, in milliseconds. Raises ProcessFailed."""
        return asyncio.run(_with_control(self.simulator.url, reset=False))


async def _with_control(url: str, *, reset: bool) -> dict[str, float]:
    control = SimulatorControl(url)
    try:
        if reset:
            await control.reset_lateness()
        lateness: dict[str, float] = (await control.state())["lateness"]
    except (NotSent, MaybeSent, SimulatorFailed) as error:
        raise ProcessFailed(f"the simulator cannot be asked how late it was: {error}") from error
    else:
        return lateness
    finally:
        await control.close()
