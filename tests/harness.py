"""Whole systems for tests: gateway processes over real servers, and callers of the contract."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from payments.v1 import (
    money_pb2,
    payment_method_pb2,
    payment_service_pb2,
    payment_service_pb2_grpc,
)

from gateway.connectors.simulator.journal import Standing, standing_charges
from gateway.connectors.simulator.launch import SimulatorControl, SimulatorProcess
from storage.embedded import EmbeddedRedis
from storage.postgres.accounts import Accounts
from storage.postgres.migrate import migrate
from tests.nursery import SERVE, ForkedProcess, current, inherited_environment
from tests.servers import PostgresForTests, fetch, temporary_directory
from tests.simulators import running_simulator

START_TIMEOUT_S = 60.0
"""A gateway that has not said that it serves by then hangs."""
CALL_TIMEOUT_S = 30.0
"""The deadline of a call whose deadline is not the subject."""

SERVICE = payment_service_pb2.DESCRIPTOR.services_by_name["PaymentService"]
"""The contract's description of the service."""

WRITE_LOST = "Internal error from Core"
"""What grpc.aio's client makes of a stream that the server refused before it could write to it: the
server's status is lost, and nothing was sent."""

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_WITH_PARENT = (
    "import ctypes, os, sys;"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)});"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
"""Ends with the thread that started it, and becomes the program. Not by preexec_fn: that forks for
good, which a process with gRPC's threads may not survive."""


class GatewayProcess:
    """`gateway serve` in a process of its own, on a free port."""

    def __init__(self, process: subprocess.Popen[bytes] | ForkedProcess) -> None:
        self._process = process
        self.lines: list[str] = []
        """What it logged until now."""
        self._serving = threading.Event()
        self._address = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = raw.decode("utf-8", "replace")
            self.lines.append(line)
            if '"message":"serving"' in line:
                self._address = json.loads(line)["address"]
                self._serving.set()
        self._serving.set()

    @property
    def address(self) -> str:
        """Where it serves; waits until it does."""
        assert self._serving.wait(START_TIMEOUT_S), "the gateway does not say that it serves"
        assert self._address, "the gateway did not start:\n" + "".join(self.lines)
        return self._address

    async def serving(self) -> str:
        """The same, without blocking the loop."""
        return await asyncio.to_thread(lambda: self.address)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self._process.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended by itself; then the log is whole."""
        status = self._process.wait(START_TIMEOUT_S)
        self._reader.join(START_TIMEOUT_S)
        return status

    def stop(self) -> int:
        """SIGTERM, and wait for the drain; the exit status."""
        self._process.terminate()
        return self.wait()

    def end(self) -> None:
        """End it in whatever state it is."""
        if self.running:
            self.resume()
            self.kill()
        self._reader.join(START_TIMEOUT_S)
        assert self._process.stderr is not None
        self._process.stderr.close()

    @property
    def log(self) -> str:
        """What it logged until now."""
        return "".join(self.lines)


_SERVE = ("-m", "gateway", "serve")


def _execute(
    environment: Mapping[str, str], arguments: Sequence[str] = _SERVE
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-ISc", _WITH_PARENT, sys.executable, *arguments],
        env={**inherited_environment(), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@dataclass(slots=True)
class Shop:
    """A merchant with a key of its own."""

    organisation_id: str
    merchant_id: str
    api_key: str


@dataclass
class System:
    """A database, a Redis, a PSP and any number of gateways on them."""

    dsn: str
    redis_url: str
    simulator: SimulatorProcess
    shop: Shop
    settings: dict[str, str]
    directory: Path
    gateways: list[GatewayProcess] = field(default_factory=list)

    @property
    def control(self) -> SimulatorControl:
        return SimulatorControl(self.simulator.url)

    def start_gateway(self, **settings: object) -> GatewayProcess:
        """Start one more gateway; `settings` by field name, over the system's own."""
        if current() is not None:
            return self.fork_gateway(SERVE, **settings)
        gateway = GatewayProcess(_execute(self.settings | _environment(settings)))
        self.gateways.append(gateway)
        return gateway

    def fork_gateway(self, target: str, *arguments: str, **settings: object) -> GatewayProcess:
        """Start one more gateway by the function `target`; only within `forking`."""
        nursery = current()
        assert nursery is not None
        environment = self.settings | _environment(settings)
        gateway = GatewayProcess(nursery.fork(target, arguments, environment))
        self.gateways.append(gateway)
        return gateway

    def start_program(self, program: str, **settings: object) -> GatewayProcess:
        """Start a gateway by a program of its own."""
        environment = self.settings | _environment(settings)
        gateway = GatewayProcess(_execute(environment, ("-c", program)))
        self.gateways.append(gateway)
        return gateway

    def run_python(self, program: str) -> None:
        """Run a program with the system's settings; it fails where the program does."""
        subprocess.run(
            [sys.executable, "-c", program],
            env={**inherited_environment(), **self.settings},
            check=True,
            timeout=START_TIMEOUT_S,
        )

    def fetch(self, sql: str, *arguments: object) -> list[Any]:
        """The rows of a statement."""
        return fetch(self.dsn, sql, *arguments)

    def unfinished(self) -> list[Any]:
        """The operations without a definite outcome."""
        return self.fetch(
            "SELECT operation_id, kind, state FROM operations WHERE state IN (1, 2, 3, 8)"
        )

    def standing(self) -> list[Standing]:
        """What stands at the PSP, by its journal."""
        return standing_charges(self.simulator.records())


def _environment(settings: Mapping[str, object]) -> dict[str, str]:
    return {
        f"GATEWAY_{name.upper()}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in settings.items()
    }


def asyncio_run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in a thread of its own, below a running loop as well."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(make()))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


async def new_shop(dsn: str) -> Shop:
    """A merchant in an organisation of its own, with a key."""
    async with Accounts.connect(dsn) as accounts:
        organisation_id = await accounts.create_organisation("Test")
        merchant_id = await accounts.create_merchant(organisation_id, "Shop")
        key = await accounts.create_key(
            organisation_id,
            scopes=("payments:read", "payments:write"),
            mode="test",
            merchant_ids=(merchant_id,),
        )
    return Shop(organisation_id, merchant_id, key.text)


@contextmanager
def running_system(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    *,
    profile: str = "idempotent",
    **settings: object,
) -> Iterator[System]:
    """A system on a fresh database of `postgres`, without a gateway yet; ends all it started.

    Times of recovery are short, so that tests need not wait for the defaults.
    """
    template = postgres.create_template("migrated", migrate)
    dsn = postgres.create_database(template)
    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        simulator = stack.enter_context(running_simulator(directory, profile))
        system = System(
            dsn=dsn,
            redis_url=redis.url,
            simulator=simulator,
            shop=asyncio_run(lambda: new_shop(dsn)),
            settings={},
            directory=directory,
        )
        values: dict[str, object] = {
            "postgres_dsn": dsn,
            "redis_url": redis.url,
            "simulator_url": simulator.url,
            "simulator_profile": profile,
            "simulator_answer_timeout_s": 2,
            "listen_address": "127.0.0.1:0",
            "metrics_address": "127.0.0.1:0",
            # Long beside what a busy machine takes for a step, short beside a test.
            "send_window_s": 3,
            "recover_margin_s": 1,
            "recovery_interval_ms": 50,
            "recovery_search_interval_ms": 0,
            "recovery_first_check_s": 0.1,
            "recovery_backoff_s_min": 0.1,
            "recovery_backoff_s_max": 1,
            "recovery_waiting_interval_s_max": 1,
            "recovery_tries_max": 100_000,
            "recovery_lease_s": 2,
            # Tests of failures make more of them than a breaker would let through.
            "breaker_enabled": False,
            "readiness_interval_s": 0.2,
            # Each database has a system of its own on the shared Redis: apart by merchant ids.
            **settings,
        }
        system.settings = _environment(values)
        try:
            yield system
        finally:
            for gateway in system.gateways:
                gateway.end()
            postgres.drop_database(dsn)


class Caller:
    """A caller with a key: the stub, and requests with sane defaults."""

    def __init__(self, channel: grpc.aio.Channel, api_key: str) -> None:
        self.channel = channel
        self.stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
        self.metadata = (("authorization", f"Bearer {api_key}"),)

    async def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call a method by its name."""
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=timeout_s)

    async def authorize(self, timeout_s: float = CALL_TIMEOUT_S, **fields: Any) -> Any:
        return await self.call("AuthorizePayment", authorize_request(**fields), timeout_s)

    async def capture(self, payment_id: str, amount_minor: int | None = None, **fields: Any) -> Any:
        return await self.call(
            "CapturePayment",
            payment_service_pb2.CapturePaymentRequest(
                idempotency_key=fields.pop("idempotency_key", new_key()),
                payment_id=payment_id,
                amount=eur(amount_minor),
                **fields,
            ),
        )

    async def refund(self, payment_id: str, amount_minor: int | None = None, **fields: Any) -> Any:
        return await self.call(
            "RefundPayment",
            payment_service_pb2.RefundPaymentRequest(
                idempotency_key=fields.pop("idempotency_key", new_key()),
                payment_id=payment_id,
                amount=eur(amount_minor),
                **fields,
            ),
        )

    async def void(self, payment_id: str, **fields: Any) -> Any:
        return await self.call(
            "VoidPayment",
            payment_service_pb2.VoidPaymentRequest(
                idempotency_key=fields.pop("idempotency_key", new_key()),
                payment_id=payment_id,
                **fields,
            ),
        )

    async def operation(self, **target: str) -> Any:
        return await self.call("GetOperation", payment_service_pb2.GetOperationRequest(**target))

    async def until_state(self, *states: int, **target: str) -> Any:
        """The answer about an operation, once it is in one of the states."""

        async def look() -> Any:
            told = await self.operation(**target)
            return told if told.operation.state in states else None

        return await eventually(look, f"{target} in one of the states {states}")

    async def payment(self, payment_id: str) -> Any:
        return await self.call(
            "GetPayment", payment_service_pb2.GetPaymentRequest(payment_id=payment_id)
        )


@asynccontextmanager
async def calling(gateway: GatewayProcess | str, api_key: str) -> AsyncIterator[Caller]:
    """A caller of a gateway (or of an address)."""
    address = gateway if isinstance(gateway, str) else gateway.address
    async with grpc.aio.insecure_channel(address) as channel:
        yield Caller(channel, api_key)


def new_key() -> str:
    """An idempotency key that nobody has used."""
    return uuid.uuid4().hex


def eur(amount_minor: int | None) -> money_pb2.Money | None:
    """An amount in EUR; None for None."""
    if amount_minor is None:
        return None
    return money_pb2.Money(amount_minor=amount_minor, currency_code="EUR")


def authorize_request(
    *,
    amount_minor: int = 1000,
    token: str = "tok_visa",
    capture_method: str = "MANUAL_MULTIPLE",
    idempotency_key: str | None = None,
    **fields: Any,
) -> payment_service_pb2.AuthorizePaymentRequest:
    """A valid request with a new key."""
    return payment_service_pb2.AuthorizePaymentRequest(
        idempotency_key=idempotency_key or new_key(),
        amount=eur(amount_minor),
        capture_method=getattr(payment_method_pb2, f"CAPTURE_METHOD_{capture_method}"),
        payment_method=payment_method_pb2.PaymentMethod(token=token),
        **fields,
    )


def request_types() -> dict[str, type[Message]]:
    """The request's type of every method of PaymentService, by the method's name."""
    return {
        method.name: message_factory.GetMessageClass(method.input_type)
        for method in SERVICE.methods
    }


async def call_bytes(
    channel: grpc.aio.Channel,
    method: str,
    data: bytes,
    metadata: Sequence[tuple[str, str]] = (),
    timeout_s: float = CALL_TIMEOUT_S,
) -> bytes:
    """Call any method with bytes; the bytes of the answer, those of a stream's messages joined."""
    path = f"/{SERVICE.full_name}/{method}"
    described = SERVICE.methods_by_name.get(method)
    if described is None or not described.server_streaming:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        return await unary(data, metadata=tuple(metadata), timeout=timeout_s)
    stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
    while True:
        call = stream(iter([data]), metadata=tuple(metadata), timeout=timeout_s)
        try:
            return b"".join([message async for message in call])
        except grpc.aio.AioRpcError as error:
            if error.details() != WRITE_LOST:
                raise


def field_paths(message: Message, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a message's type by its path, those of its messages too; maps as a whole."""
    for described in message.DESCRIPTOR.fields:
        path = prefix + described.name
        yield path, described
        nested = described.message_type
        if nested is not None and not nested.GetOptions().map_entry:
            yield from field_paths(getattr(message, described.name), path + ".")


def holder_of(message: Any, path: str) -> tuple[Any, str]:
    """The message in which a path's last field stands, and that field's name."""
    *outer, name = path.split(".")
    for each in outer:
        message = getattr(message, each)
    return message, name


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason of a refusal, empty where it has none; a wrong request has a wrong field."""
    status = rpc_status.from_call(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in () if status is None else status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    reason: str = info.reason
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT and reason != "MESSAGE_MALFORMED":
        assert bad.field_violations, f"{reason} names no field"
    return reason


def bytes_without_replay(response: Any) -> bytes:
    """An answer's bytes without its `replay` field."""
    copy = type(response)()
    copy.CopyFrom(response)
    copy.ClearField("replay")
    data: bytes = copy.SerializeToString(deterministic=True)
    return data


async def eventually(
    condition: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S
) -> Any:
    """Wait for a condition (its value is returned); for what no event announces.

    It is looked at in a thread, a coroutine function's in the loop, and again after a tenth of the
    time that was waited, since looking is work for others too.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while True:
        value = await asyncio.to_thread(condition)
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        waited_s = loop.time() - begun
        assert waited_s < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01 + waited_s / 10)
