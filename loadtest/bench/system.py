"""What is measured: PostgreSQL, Redis and one server process for each side."""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import asyncpg
import grpc
from payments.v1 import money_pb2, payment_method_pb2, payment_service_pb2, payment_service_pb2_grpc

from gateway.domain.model import OperationState
from loadtest.bench.generator import Target
from loadtest.children import Process, ProcessFailed, stopping
from loadtest.servers import REDIS_SETTINGS
from storage.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError
from storage.postgres.accounts import Accounts
from storage.postgres.migrate import migrate

CALL_TIMEOUT_S: Final = 20.0
DELAYS: Final = "120,380"
"""The PSP's delay where it has one: p50 and p99 in milliseconds."""

CALLERS_MAX: Final = 512
"""The most callers of single calls in a closed loop."""
AT_ONCE_MAX: Final = 3_000
"""The most calls, or items of batches and streams, under way at once in one: those that wait for a
delayed PSP."""

CANNOT_MEASURE: Final = (
    *(ProcessFailed, EmbeddedServerError, OSError),
    *(asyncpg.PostgresError, asyncpg.InterfaceError, grpc.RpcError),
)
"""What a benchmark ends with that could not measure."""

_NATIVE: Final = {"transport": "native", "trusted_front": "true"}
_CLOSED: Final = dict.fromkeys(("admission_calls_min", "admission_calls_max"), str(AT_ONCE_MAX))
"""A closed loop is its own bound. Admission would refuse calls where the machine has become slower
since the number of callers was chosen, and what refuses calls cannot be compared."""
_SERVERS: Final[dict[str, tuple[str, dict[str, str], tuple[str, ...]]]] = {
    "echo": ("loadtest.echo", {"transport": "grpcio"}, ()),
    "native_echo": ("loadtest.echo", _NATIVE, ()),
    "authorize": ("loadtest.bench.server", _NATIVE | _CLOSED, ()),
    "grpcio_authorize": ("loadtest.bench.server", {"transport": "grpcio"} | _CLOSED, ()),
    "grpcio_tls": ("loadtest.bench.server", {"transport": "grpcio"} | _CLOSED, ()),
    "delayed": ("loadtest.bench.server", _NATIVE | _CLOSED, ("--latency", DELAYS)),
    "open_5000": ("loadtest.bench.server", _NATIVE, ()),
    "overload_native": ("loadtest.bench.server", _NATIVE, ()),
    "overload_grpcio": ("loadtest.bench.server", {"transport": "grpcio"}, ()),
    "naive": ("loadtest.bench.naive", {"transport": "grpcio"}, ()),
}
"""Module, settings and arguments of each server."""
_ECHOES: Final = ("echo", "native_echo")
_SERVED_BY: Final = dict.fromkeys(("production", "batch", "stream"), "authorize")
"""Sides that another side's server serves."""


@dataclass(slots=True)
class Server:
    """A running server."""

    target: Target
    process: Process
    dsn: str = ""
    """Its database; empty for an echo."""
    acknowledged: int = 0
    """How many authorizations its callers were told."""


@dataclass(slots=True)
class System:
    """The stores, and the servers that have been started until now."""

    folder: Path
    postgres: EmbeddedPostgres
    redis: EmbeddedRedis
    stack: ExitStack
    _servers: dict[str, Server] = field(default_factory=dict)
    _proxy: tuple[Process, Target] | None = None
    _files: dict[str, Path] = field(default_factory=dict)

    def server(self, side: str) -> Server:
        """The server behind a side, started on first use. Raises ProcessFailed."""
        name = _SERVED_BY.get(side, side)
        if name not in self._servers:
            self._servers[name] = self._start(name)
        return self._servers[name]

    def target(self, side: str) -> Target:
        """Where a side is called. Raises ProcessFailed."""
        return self._front()[1] if side == "production" else self.server(side).target

    def watched(self, side: str) -> dict[str, int]:
        """The processes that work for a side, by name."""
        server = self.server(side)
        pids = {"server": server.process.pid}
        if side == "production":
            pids["envoy"] = self._front()[0].pid
        if server.dsn:
            pids |= {"postgres": self.postgres.pid, "redis": self.redis.pid}
        return pids

    def forget_logs(self) -> None:
        """Empty the servers' logs: a run of ten minutes would fill a disk with them."""
        for server in self._servers.values():
            server.process.forget_log()

    def analyze(self) -> None:
        """Give the planner statistics of the databases, as autovacuum does within a minute.

        Plans that were made for empty tables are made anew then, on every side.
        """
        for server in self._servers.values():
            if server.dsn:
                asyncio.run(_analyze(server.dsn))

    def missing(self) -> dict[str, int]:
        """Acknowledged authorizations that are not in the database, by server: there are none.

        Raises ProcessFailed where PostgreSQL or Redis has ended: gateways go on without Redis, and
        what they did then is no figure.
        """
        for each in (self.postgres, self.redis):
            if not each.running:
                raise ProcessFailed(f"{each.title} ended while it was measured")
        missing = {}
        for name, server in self._servers.items():
            if server.dsn:
                stored = asyncio.run(_authorized(server.dsn))
                if stored < server.acknowledged:
                    missing[name] = server.acknowledged - stored
        return missing

    def new_database(self, name: str) -> str:
        """The DSN of a new database with the gateway's tables."""
        return asyncio.run(_new_database(self.postgres, name))

    def _start(self, name: str) -> Server:
        module, settings, arguments = _SERVERS[name]
        values = {
            "listen_address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            **settings,
        }
        tls = name == "grpcio_tls"
        if tls:
            certificate, key = self._certificate()
            values |= {"tls_certificate_file": str(certificate), "tls_key_file": str(key)}
        if name in _ECHOES:
            arguments = (str(self._response()),)
            dsn, api_key = "", "the echo asks nobody"
        else:
            dsn = self.new_database(name)
            api_key = asyncio.run(_new_key(dsn))
            values |= {"postgres_dsn": dsn, "redis_url": self.redis.url}
        environment = {f"GATEWAY_{key.upper()}": value for key, value in values.items()}
        process = Process.python(name, ["-m", module, *arguments], environment, self.folder)
        self.stack.enter_context(stopping(process))
        return Server(Target(process.await_serving(), api_key, tls), process, dsn)

    def _front(self) -> tuple[Process, Target]:
        """The proxy that terminates TLS before the native server."""
        if self._proxy is None:
            upstream = self.server("production").target
            process, address = _envoy().start_envoy(
                self.folder, upstream.address, *self._certificate()
            )
            self.stack.enter_context(stopping(process))
            self._proxy = process, Target(address, upstream.api_key, tls=True)
        return self._proxy

    def _certificate(self) -> tuple[Path, Path]:
        if "certificate" not in self._files:
            certificate, key = _envoy().write_certificate(self.folder)
            self._files |= {"certificate": certificate, "key": key}
        return self._files["certificate"], self._files["key"]

    def _response(self) -> Path:
        """A file with the bytes of an authorization's answer, as a gateway gave them."""
        if "response" not in self._files:
            server = self.server("authorize")
            path = self._files["response"] = self.folder / "response.bin"
            path.write_bytes(asyncio.run(_authorize(server.target)))
            server.acknowledged += 1
        return self._files["response"]


def _envoy() -> ModuleType:
    """Loaded late, since it needs packages of the group `bench`. Raises ProcessFailed."""
    try:
        from loadtest.bench import envoy  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        raise ProcessFailed(f"{error}: `make bench` installs it") from error
    return envoy


async def _new_database(postgres: EmbeddedPostgres, name: str) -> str:
    connection = await asyncpg.connect(postgres.dsn)
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
    dsn = postgres.dsn_of(name)
    await migrate(dsn)
    return dsn


async def _new_key(dsn: str) -> str:
    """The key of a new merchant."""
    async with Accounts.connect(dsn) as accounts:
        organisation_id = await accounts.create_organisation("Benchmark")
        merchant_id = await accounts.create_merchant(organisation_id, "Benchmark")
        key = await accounts.create_key(
            organisation_id,
            scopes=("payments:read", "payments:write"),
            mode="test",
            merchant_ids=(merchant_id,),
        )
    return key.text


@contextmanager
def running_system() -> Iterator[System]:
    """PostgreSQL and Redis as a load test has them, in a folder that goes with them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        postgres = EmbeddedPostgres(folder / "postgres")
        postgres.start()
        stack.callback(postgres.stop)
        redis = EmbeddedRedis(folder / "redis", settings=REDIS_SETTINGS)
        redis.start()
        stack.callback(redis.stop)
        yield System(folder, postgres, redis, stack)


async def _authorize(target: Target) -> bytes:
    request = payment_service_pb2.AuthorizePaymentRequest(
        idempotency_key="the echo's answer, 36 characters.....",
        amount=money_pb2.Money(amount_minor=1000, currency_code="EUR"),
        capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL_MULTIPLE,
        payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),  # noqa: S106 - a test token
    )
    async with grpc.aio.insecure_channel(target.address) as channel:
        stub: Any = payment_service_pb2_grpc.PaymentServiceStub(channel)
        answer = await stub.AuthorizePayment(
            request,
            metadata=(("authorization", f"Bearer {target.api_key}"),),
            timeout=CALL_TIMEOUT_S,
        )
    data: bytes = answer.SerializeToString()
    return data


async def _analyze(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


async def _authorized(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        count = await connection.fetchval(
            "SELECT count(*) FROM operations WHERE state = $1", int(OperationState.SUCCEEDED)
        )
    finally:
        await connection.close()
    return int(count)
