"""A gateway's process: real use cases, recovery, claims, lanes and connector, over this world."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from payments.v1 import payment_service_pb2 as rpc

from gateway.application.ports import Route, Served, StoreUnavailable
from gateway.application.recovery import Recovery, Schedule
from gateway.application.usecases import Limits, Payments
from gateway.domain.errors import GatewayError
from gateway.domain.model import Mode, OperationKind
from gateway.rpc import conversion, error_map
from gateway.rpc.conversion import Caller, ContractEncoder
from storage.redis.claims import Claims
from tests.memory_store import Counts
from tests.simulation import psp as psp_module
from tests.simulation.database import Link, SimulatedStore
from tests.simulation.redis import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.connectors.simulator.connector import SimulatorConnector
    from gateway.connectors.simulator.profiles import Profile
    from tests.simulation.database import Database
    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network
    from tests.simulation.psp import PspServer
    from tests.simulation.redis import RedisServer

MERCHANT: Final = "mer_" + "5" * 32
ANSWER_TIMEOUT_S: Final = 1.0
LIMITS: Final = Limits(
    send_window_s=1.0,
    recover_margin_s=0.5,
    min_send_budget_s=0.05,
    wait_s_max=1.0,
    wait_margin_s=0.05,
    wait_poll_s_min=0.02,
    wait_poll_s_max=0.2,
    waiters_per_key_max=10,
    contention_tries_max=20,
    first_check_s=0.3,
    operations_per_payment_max=50,
    action_timeout_s=5.0,
)
SCHEDULE: Final = Schedule(
    interval_s=0.5,
    search_interval_s=1.0,
    lease_s=1.0,
    batch_max=20,
    concurrency_max=4,
    backoff_s_min=0.3,
    backoff_s_max=1.5,
    tries_max=100_000,
    person_interval_s=60.0,
    waiting_interval_s_max=1.5,
    action_margin_s=0.5,
)
TAKEOVER_S: Final = LIMITS.send_window_s + ANSWER_TIMEOUT_S + LIMITS.recover_margin_s
"""Recovery leaves an intent alone for so long."""
CLAIM_LIFE_MS: Final = 1000
CACHE_LIFE_S: Final = 600
READINESS_INTERVAL_S: Final = 1.0

OK: Final = "OK"
Told = tuple[str, str, bytes]
"""gRPC status, reason, response."""

_CONVERSIONS: Final[dict[OperationKind, tuple[Callable[..., Any], str]]] = {
    OperationKind.AUTHORIZE: (conversion.to_authorize, "authorize"),
    OperationKind.CAPTURE: (conversion.to_capture, "capture"),
    OperationKind.VOID: (conversion.to_void, "void"),
    OperationKind.REFUND: (conversion.to_refund, "refund"),
    OperationKind.INCREMENT: (conversion.to_increment, "increment"),
}


class _Router:
    """Implements `gateway.application.ports.Router` with one connector."""

    def __init__(self, only: SimulatorConnector) -> None:
        self._only = only

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        return Route(self._only, "account-1")

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        return {"account-1": Served("account-1", self._only.name, 1, True, self._only)}

    def connector(self, name: str, connector_account_id: str) -> SimulatorConnector | None:
        return self._only if name == self._only.name else None


class Gateway:
    """Made in the context of its process."""

    def __init__(
        self,
        loop: SimulatedLoop,
        process: Process,
        network: Network,
        database: Database,
        redis: RedisServer,
        psp: PspServer,
        profile: Profile,
    ) -> None:
        self.process = process
        self.ready = False
        self._claims = Claims(
            cast("Any", Client(network, process, redis)),
            buckets=1,
            claim_life_ms=CLAIM_LIFE_MS,
            cache_life_s=CACHE_LIFE_S,
            rows_max=8,
            queue_max=100,
        )
        self.store = SimulatedStore(Link(network, process, database), self._claims.set_generation)
        router = _Router(psp_module.connector(network, process, psp, profile, ANSWER_TIMEOUT_S))
        encoder = ContractEncoder()
        counts = Counts()
        self.payments = Payments(self.store, self._claims, router, encoder, LIMITS, counts)
        self.recovery = Recovery(
            self.store, router, encoder, self.payments.outcomes, SCHEDULE, counts
        )

    async def run(self) -> None:
        """Serve for as long as the process lives."""
        await self._claims.start()
        recovering = asyncio.create_task(self.recovery.run())
        while True:
            try:
                await self.store.check()
                self.ready = True
            except StoreUnavailable:
                self.ready = False
            await asyncio.sleep(READINESS_INTERVAL_S)
            assert not recovering.done()

    async def serve(self, kind: OperationKind, message: bytes, deadline: float) -> Told:
        """What a call is answered with."""
        convert, method = _CONVERSIONS[kind]
        if not self.ready:
            return "UNAVAILABLE", "", b""
        request = REQUESTS[kind].FromString(message)
        caller = Caller("req_1", MERCHANT, Mode.TEST, deadline)
        try:
            answer = await getattr(self.payments, method)(convert(request, caller))
        except GatewayError as error:
            return error_map.status_code(error.reason).name, error.reason.value, b""
        except Exception as error:  # noqa: BLE001 - as the handlers answer it
            return "INTERNAL", f"INTERNAL {error!r}", b""
        return OK, "", conversion.encode_answer(answer)


REQUESTS: Final[dict[OperationKind, Any]] = {
    OperationKind.AUTHORIZE: rpc.AuthorizePaymentRequest,
    OperationKind.CAPTURE: rpc.CapturePaymentRequest,
    OperationKind.VOID: rpc.VoidPaymentRequest,
    OperationKind.REFUND: rpc.RefundPaymentRequest,
    OperationKind.INCREMENT: rpc.IncrementAuthorizationRequest,
}
