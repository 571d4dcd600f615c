"""A gateway's process: real use cases, recovery, claims, lanes and connector, over this world."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from payments.v1 import payment_service_pb2 as rpc

from gateway.application.administration import Administration
from gateway.application.applying import Applier
from gateway.application.applying import Schedule as ApplyingSchedule
from gateway.application.ports import StoreUnavailable
from gateway.application.recovery import Recovery, Schedule
from gateway.application.usecases import Limits, Payments
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode, OperationKind
from gateway.rpc import conversion, error_map
from gateway.rpc.conversion import Caller, ContractEncoder
from storage.redis.claims import Claims
from tests.memory_store import Counts
from tests.simulation.accounts import AccountsOfGateway, routing_of
from tests.simulation.database import Link, SimulatedStore
from tests.simulation.loop import at_once
from tests.simulation.notifications import NoLookup, NotificationsOfGateway
from tests.simulation.redis import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.application.notifications import NotificationKind, Received, Result
    from gateway.application.ports import Resolution
    from tests.simulation.accounts import Account
    from tests.simulation.database import Database
    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network
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
    attempts_per_operation_max=50,
    action_timeout_s=5.0,
)
SCHEDULE: Final = Schedule(
    interval_s=0.5,
    search_interval_s=1.0,
    lease_s=1.0,
    batch_max=20,
    concurrency_max=4,
    account_concurrency_max=3,
    backoff_s_min=0.3,
    backoff_s_max=1.5,
    tries_max=100_000,
    person_interval_s=60.0,
    waiting_interval_s_max=1.5,
    action_margin_s=0.5,
)
APPLYING: Final = ApplyingSchedule(
    interval_s=0.5,
    lease_s=1.0,
    batch_max=20,
    concurrency_max=4,
    account_concurrency_max=3,
    backoff_s_min=0.2,
    backoff_s_max=1.5,
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


class _ApplyingCounts:
    """Implements ApplyingObserver."""

    def notification_applied(self, connector: str, kind: NotificationKind, result: Result) -> None:
        pass

    def applying_failed(self) -> None:
        pass


class Gateway:
    """Made in the context of its process."""

    def __init__(
        self,
        loop: SimulatedLoop,
        process: Process,
        network: Network,
        database: Database,
        redis: RedisServer,
        accounts: Sequence[Account],
        rules: str,
    ) -> None:
        """Without `rules` payments go to the first account."""
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
        self.router = router = AccountsOfGateway(accounts, network, process, ANSWER_TIMEOUT_S)
        self.routing = at_once(routing_of(loop, MERCHANT, router, rules))
        encoder = ContractEncoder()
        counts = Counts()
        self.payments = Payments(
            self.store, self._claims, router, encoder, LIMITS, counts, routing=self.routing
        )
        self.recovery = Recovery(
            self.store, router, encoder, self.payments.outcomes, SCHEDULE, counts
        )
        self.administration = Administration(cast("Any", self.store), self.payments.outcomes)
        self.notifications = NotificationsOfGateway(self.store)
        self.applier = Applier(
            self.notifications,
            self.store,
            router,
            NoLookup(),
            encoder,
            self.payments.outcomes,
            APPLYING,
            _ApplyingCounts(),
        )
        self._applies = any(each.notifies for each in accounts)

    async def run(self) -> None:
        """Serve for as long as the process lives."""
        await self._claims.start()
        recovering = asyncio.create_task(self.recovery.run())
        if self._applies:
            applying = asyncio.create_task(self.applier.run())
            applying.add_done_callback(_never)
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

    async def look(self, operation_id: str) -> tuple[int, int, int] | None:
        """States of an operation and its payment, and the payment's version; None without an
        answer.
        """
        if not self.ready:
            return None
        try:
            found = await self.payments.get_operation(
                MERCHANT, Mode.TEST, operation_id=operation_id
            )
        except GatewayError:
            return None
        return found.operation.state, found.payment.state, found.payment.version

    async def decide(self, operation_id: str, decision: Resolution) -> str | None:
        """End a doubt by a person's decision; the reason of a refusal, empty for none, and None
        without an answer.
        """
        if not self.ready:
            return None
        try:
            await self.administration.resolve(MERCHANT, Mode.TEST, operation_id, decision)
        except GatewayError as error:
            known = error.reason not in (Reason.STORE_UNAVAILABLE, Reason.OVERLOADED)
            return error.reason.value if known else None
        return ""

    async def receive(self, received: Received) -> bool:
        """Keep what a PSP tells; whether it is kept."""
        if not self.ready:
            return False
        try:
            await self.notifications.keep([received])
        except StoreUnavailable:
            return False
        self.applier.wake()
        return True


def _never(applying: asyncio.Task[None]) -> None:
    """Nothing ends an applier but the end of its process."""
    if not applying.cancelled():
        applying.result()


REQUESTS: Final[dict[OperationKind, Any]] = {
    OperationKind.AUTHORIZE: rpc.AuthorizePaymentRequest,
    OperationKind.CAPTURE: rpc.CapturePaymentRequest,
    OperationKind.VOID: rpc.VoidPaymentRequest,
    OperationKind.REFUND: rpc.RefundPaymentRequest,
    OperationKind.INCREMENT: rpc.IncrementAuthorizationRequest,
}
