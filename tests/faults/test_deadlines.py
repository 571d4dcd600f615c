"""Callers that go away, at every stage: the work goes on, and repeats get its one answer."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
from payments.v1 import payment_pb2
from payments.v1.payment_service_pb2 import CapturePaymentRequest, RefundPaymentRequest

from gateway.domain.model import OperationState as S
from storage.postgres.queries import query
from tests.faults.checker import Client, check, settled
from tests.faults.proxies import Action, Interception, postgres_proxy
from tests.faults.transports import alternating, start_on_both
from tests.harness import (
    authorize_request,
    bytes_without_replay,
    calling,
    eur,
    eventually,
    new_key,
    running_system,
)
from tests.servers import redis_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.connectors.simulator.launch import SimulatorControl
    from storage.embedded import EmbeddedRedis
    from tests.faults.proxies import PostgresProxy
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

CALLS: Final = 60
DEADLINES_S: Final = (0.001, 0.050)
"""The shortest and the longest."""

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED

STATEMENTS: Final = {
    "intent_under_way": ("authorize_intent", Action.HOLD_STATEMENT),
    "intent_committed": ("authorize_intent", Action.HOLD_ANSWER),
    "outcome_under_way": ("change", Action.HOLD_STATEMENT),
    "outcome_committed": ("change", Action.HOLD_ANSWER),
}
AT_PSP: Final = {"at_the_psp": "before_effect", "charged_by_the_psp": "before_answer"}

PROFILES: Final = ("idempotent", "non_idempotent")
profiles = pytest.mark.parametrize("profile", PROFILES)


class _Stage:
    """Stops a call at a stage of its way."""

    def __init__(self, name: str, proxy: PostgresProxy, control: SimulatorControl) -> None:
        self._point = AT_PSP.get(name)
        self._control = control
        self._interception: Interception | None = None
        if name in STATEMENTS:
            statement, action = STATEMENTS[name]
            self._interception = proxy.intercept(query("writes", statement).text, action)

    async def begin(self) -> None:
        """Hold what comes."""
        if self._point is not None:
            await self._control.hold(self._point)

    async def reached(self) -> None:
        """Wait until a call is there."""
        if self._interception is not None:
            await self._interception.reached()
        else:
            await self._control.await_held()

    async def end(self) -> None:
        """Let it go on."""
        if self._interception is not None:
            self._interception.release()
        else:
            await self._control.release()


async def _leave_by_cancelling(client: Client, stage: _Stage) -> list[Any]:
    """Call, and cancel the call at the stage; the request."""
    request = authorize_request()
    call = asyncio.ensure_future(client.call("AuthorizePayment", request))
    await stage.reached()
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    return [request]


async def _leave_by_deadline(client: Client, stage: _Stage) -> list[Any]:
    """Call with the longest of the deadlines until one is at the stage; all requests."""
    reached = asyncio.ensure_future(stage.reached())
    requests = []
    while not reached.done():
        requests.append(authorize_request())
        await client.attempt("AuthorizePayment", requests[-1], DEADLINES_S[1])
    return requests


def _knows(gateway: GatewayProcess) -> bool:
    """Whether a gateway has noticed that a caller left; its own clock may be a little slow."""
    return "CANCELLED" in gateway.log or "DEADLINE_EXCEEDED" in gateway.log


@alternating(
    leave=(_leave_by_cancelling, _leave_by_deadline),
    stage=(*STATEMENTS, *AT_PSP),
    profile=PROFILES,
)
async def test_a_call_without_its_caller_goes_on_and_its_repeats_get_its_answer(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    profile: str,
    stage: str,
    leave: Callable[[Client, _Stage], Awaitable[list[Any]]],
    transport: str,
) -> None:
    with (
        running_system(
            postgres,
            redis,
            profile=profile,
            simulator_answer_timeout_s=30,
            send_window_s=30,
            min_send_budget_s=0,
        ) as system,
        postgres_proxy(system.dsn) as proxy,
    ):
        gateway = system.start_gateway(
            transport=transport, trusted_front=True, postgres_dsn=proxy.dsn
        )
        control = system.control
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            stopped = _Stage(stage, proxy, control)
            await stopped.begin()
            requests = await leave(client, stopped)
            await eventually(partial(_knows, gateway), "the gateway knows it")
            repeats = asyncio.ensure_future(client.authorize_all(requests))
            await stopped.end()
            answers = await repeats
            assert {answer.operation.state for answer in answers} == {SUCCEEDED}
            again = await client.authorize_all(requests)
            for answer, repeated in zip(answers, again, strict=True):
                assert bytes_without_replay(repeated) == bytes_without_replay(answer)
        await control.close()
        assert len(system.simulator.received()) == len(requests)
        await settled(system)
        check(system, client)


async def _spray(client: Client, method: str, requests: Sequence[Any]) -> None:
    """Call at once, with deadlines of 1 to 50 ms."""
    source = random.Random(1)
    await asyncio.gather(
        *(client.attempt(method, request, source.uniform(*DEADLINES_S)) for request in requests)
    )


async def _one_answer_for_each(client: Client, method: str, requests: Sequence[Any]) -> None:
    """Repeats without haste get one answer for each key, and that is a success."""
    for _ in range(2):
        answers = await asyncio.gather(
            *(client.until_answered(method, request) for request in requests)
        )
        assert {answer.operation.state for answer in answers} == {SUCCEEDED}
    for request in requests:
        succeeded = [
            answer
            for answer in client.told[request.idempotency_key]
            if answer.operation.state == SUCCEEDED
        ]
        assert len({bytes_without_replay(answer) for answer in succeeded}) == 1


@profiles
async def test_deadlines_of_1_to_50_ms_leave_one_charge_for_each_key(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    with running_system(postgres, redis, profile=profile, min_send_budget_s=0) as system:
        async with AsyncExitStack() as stack:
            client = await _client_of_two(stack, system)
            control = system.control
            await control.latency(10, 40)
            await control.close()
            requests = [authorize_request() for _ in range(CALLS)]
            await _spray(client, "AuthorizePayment", requests)
            await _one_answer_for_each(client, "AuthorizePayment", requests)
        await settled(system)
        check(system, client)
        assert len([one for one in system.standing() if one.stands]) == CALLS


@profiles
async def test_deadlines_of_1_to_50_ms_while_redis_is_stopped_leave_one_charge_for_each_key(
    postgres: PostgresForTests, profile: str
) -> None:
    with (
        redis_server() as own_redis,
        running_system(postgres, own_redis, profile=profile, min_send_budget_s=0) as system,
    ):
        async with AsyncExitStack() as stack:
            client = await _client_of_two(stack, system)
            await client.call("AuthorizePayment", authorize_request())
            await asyncio.to_thread(own_redis.pause)
            requests = [authorize_request() for _ in range(CALLS)]
            await _spray(client, "AuthorizePayment", requests)
            await _one_answer_for_each(client, "AuthorizePayment", requests)
        await settled(system)
        check(system, client)
        assert len([one for one in system.standing() if one.stands]) == CALLS + 1


@profiles
async def test_captures_and_refunds_with_deadlines_of_1_to_50_ms_move_money_once_for_each_key(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    with running_system(postgres, redis, profile=profile, min_send_budget_s=0) as system:
        async with AsyncExitStack() as stack:
            client = await _client_of_two(stack, system)
            answers = await client.authorize_all([authorize_request() for _ in range(CALLS // 3)])
            payment_ids = [answer.payment.payment_id for answer in answers]
            for method, make in (
                ("CapturePayment", CapturePaymentRequest),
                ("RefundPayment", RefundPaymentRequest),
            ):
                requests = [
                    make(idempotency_key=new_key(), payment_id=payment_id, amount=eur(100))
                    for payment_id in payment_ids * 3
                ]
                await _spray(client, method, requests)
                await _one_answer_for_each(client, method, requests)
        await settled(system)
        check(system, client)
        for standing in system.standing():
            assert (standing.captured_minor, standing.refunded_minor) == (300, 300)


@profiles
async def test_nothing_is_sent_where_the_deadline_is_nearer_than_the_send_budget(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    with running_system(
        postgres, redis, profile=profile, min_send_budget_s=DEADLINES_S[1]
    ) as system:
        async with AsyncExitStack() as stack:
            client = await _client_of_two(stack, system)
            requests = [authorize_request() for _ in range(CALLS)]
            await _spray(client, "AuthorizePayment", requests)
            # A call may still be begun at the gateway after its caller has gone.
            await eventually(
                lambda: _states(system) <= {S.NOT_SENT}, "every operation that began is NOT_SENT"
            )
            assert system.simulator.received() == []
            await _one_answer_for_each(client, "AuthorizePayment", requests)
        await settled(system)
        check(system, client)
        assert len(system.simulator.received()) == CALLS


def _states(system: System) -> set[S]:
    return {S(row["state"]) for row in system.fetch("SELECT DISTINCT state FROM operations")}


async def _client_of_two(stack: AsyncExitStack, system: System) -> Client:
    return Client(
        *[
            await stack.enter_async_context(calling(gateway, system.shop.api_key))
            for gateway in start_on_both(system)
        ]
    )
