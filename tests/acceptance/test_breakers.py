"""A PSP that is down costs nothing once its breaker is open; switches hold everything back."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from payments.v1 import payment_pb2

from gateway.routing.availability import SuspensionKind
from storage.postgres import RoutingControls
from tests.acceptance.test_rate_limits import pause_s
from tests.harness import START_TIMEOUT_S, calling, eventually, reason_of, running_system

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from gateway.connectors.simulator.launch import SimulatorControl
    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, System
    from tests.servers import PostgresForTests

CALLS_MIN = 5


@pytest.fixture
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    with running_system(
        postgres,
        redis,
        breaker_enabled=True,
        breaker_calls_min=CALLS_MIN,
        breaker_pause_s_min=0.5,
        breaker_pause_s_max=0.5,
        routing_exchange_interval_s=0.05,
        connector_accounts_interval_s=0.1,
    ) as system:
        yield system


def sent(system: System) -> int:
    return len(system.simulator.received("send"))


def written(system: System) -> int:
    return int(system.fetch("SELECT count(*) AS n FROM operations")[0]["n"])


async def refusal(caller: Caller) -> grpc.aio.AioRpcError | None:
    """Of a new payment; None where it is taken."""
    try:
        await caller.authorize()
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def until(caller: Caller, *, refused: bool) -> None:
    """Call until new payments are refused, or are no longer: nobody tells a caller."""
    async with asyncio.timeout(START_TIMEOUT_S):
        error = await refusal(caller)
        while (error is not None) is not refused:
            await asyncio.sleep(0.02)
            error = await refusal(caller)
    assert error is None or reason_of(error) == "CONNECTOR_UNAVAILABLE"


@asynccontextmanager
async def steering(system: System) -> AsyncIterator[SimulatorControl]:
    control = system.control
    yield control
    await control.close()


async def test_a_dead_psp_is_sent_nothing_until_probes_find_it_alive(system: System) -> None:
    one, other = system.start_gateway(), system.start_gateway()
    key = system.shop.api_key
    async with (
        steering(system) as psp,
        calling(await one.serving(), key) as caller,
        calling(await other.serving(), key) as neighbour,
    ):
        standing = (await caller.authorize()).payment
        await psp.mode("down")
        for _ in range(CALLS_MIN - 1):
            answer = await caller.authorize()
            assert answer.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
        # The breaker is open: the next payment is neither written nor sent.
        before = sent(system), written(system)
        error = await refusal(caller)
        assert error is not None
        assert reason_of(error) == "CONNECTOR_UNAVAILABLE"
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert pause_s(error) > 0
        assert (sent(system), written(system)) == before
        # Another process that has seen nothing itself has heard of it, or hears of it now.
        await until(neighbour, refused=True)
        # What is done to existing payments has a breaker of its own.
        await psp.mode("up")
        assert (await neighbour.capture(standing.payment_id)).operation.state == (
            payment_pb2.OPERATION_STATE_SUCCEEDED
        )

        await until(caller, refused=False)
        await until(neighbour, refused=False)
        # Nothing was lost on the way: recovery settles what the dead PSP left.
        await eventually(lambda: not system.unfinished(), "no doubt is left")


async def test_a_killed_connector_is_sent_nothing_until_it_is_revived(system: System) -> None:
    gateway = system.start_gateway()
    async with (
        calling(await gateway.serving(), system.shop.api_key) as caller,
        RoutingControls.connect(system.dsn) as controls,
    ):
        payment_id = (await caller.authorize()).payment.payment_id
        killed = await controls.suspend(
            SuspensionKind.KILL, "simulator", reason="a drill of ours", created_by="login:test"
        )
        await until(caller, refused=True)
        before = sent(system), written(system)
        for call in (caller.authorize(), caller.capture(payment_id)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert reason_of(caught.value) == "CONNECTOR_UNAVAILABLE"
        assert (sent(system), written(system)) == before
        await controls.end_suspension(
            killed.suspension_id, reason="the drill is over", ended_by="login:test"
        )
        await until(caller, refused=False)
        captured = await caller.capture(payment_id)
        assert captured.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
