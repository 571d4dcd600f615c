"""Shutdown drains: a rolling restart fails no call of an ordinarily retrying client.

So it is promised on grpcio, and on native behind a proxy that takes clients away first. What native
does by itself, as docs/transports.md says, is here too.
"""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from payments.v1 import payment_pb2

from tests.faults.checker import REPEAT_AFTER_S, TRIES_MAX, Client, check
from tests.faults.transports import TRANSPORTS
from tests.harness import (
    Caller,
    authorize_request,
    calling,
    eventually,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

CALLERS: Final = 32
ANSWERS: Final = 150
"""So many calls are answered between two steps of the restart."""

RECONNECT_MS_MAX: Final = 300
"""Less than what four retries of the published policy wait for altogether."""

AGED_S_MAX: Final = 60.0
"""A connection that was not asked to go by then never is."""

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED


def _channel(
    gateways: Sequence[GatewayProcess], policy: str, *, retries: bool = True
) -> grpc.aio.Channel:
    """With the published service config, over several addresses.

    It repeats CANCELLED too: so gRPC's servers end what they have not read when they shut down.
    """
    published = json.loads((files("payments.v1") / "service_config.json").read_text())
    options = [
        ("grpc.service_config", json.dumps({**published, "loadBalancingConfig": [{policy: {}}]})),
        ("grpc.enable_retries", int(retries)),
        # A replaced gateway is found again within the pauses of the retries, however soon the
        # next one goes: gRPC's own default would leave its address alone for seconds.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
        # That of such a target is the list of addresses, which native takes for no authority.
        ("grpc.default_authority", "payments"),
    ]
    addresses = ",".join(gateway.address for gateway in gateways)
    return grpc.aio.insecure_channel(f"ipv4:{addresses}", options=options)


async def _restart_one_by_one(
    system: System, client: Client, gateways: list[GatewayProcess], call: Callable[[Any], Any]
) -> None:
    """Replace each gateway under load, and check the books; `call` makes one call to its end."""
    control = system.control
    await control.latency(20, 100)  # so that calls are in flight when it strikes
    await control.close()
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            answer = await call(authorize_request())
            assert answer.operation.state == SUCCEEDED

    callers = asyncio.gather(*(caller() for _ in range(CALLERS)))
    await client.more(ANSWERS, callers)
    for number, gateway in enumerate(gateways):
        assert await asyncio.to_thread(gateway.stop) == 0
        gateways[number] = system.start_gateway(listen_address=gateway.address)
        await gateways[number].serving()
        await client.more(ANSWERS, callers)
    stop.set()
    await callers
    for gateway in gateways:
        assert await asyncio.to_thread(gateway.stop) == 0
    # At once: a drained gateway leaves nothing to recovery.
    assert system.unfinished() == []
    check(system, client)


@pytest.mark.parametrize("policy", ["pick_first", "round_robin"])
async def test_a_rolling_restart_under_load_fails_no_call(
    postgres: PostgresForTests, redis: EmbeddedRedis, policy: str
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=10) as system:
        gateways = [system.start_gateway() for _ in range(2)]
        async with _channel(gateways, policy) as channel:
            client = Client(Caller(channel, system.shop.api_key))
            await _restart_one_by_one(
                system, client, gateways, partial(client.call, "AuthorizePayment")
            )


async def test_a_rolling_restart_on_native_fails_calls_as_unavailable_alone_and_repeats_succeed(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(
        postgres, redis, simulator_answer_timeout_s=10, transport="native", trusted_front=True
    ) as system:
        gateways = [system.start_gateway() for _ in range(2)]
        async with _channel(gateways, "round_robin", retries=False) as channel:
            client = Client(Caller(channel, system.shop.api_key))

            async def until_available(request: Any) -> Any:
                for _ in range(TRIES_MAX):
                    try:
                        return await client.call("AuthorizePayment", request)
                    except grpc.aio.AioRpcError as error:
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            raise
                    await asyncio.sleep(REPEAT_AFTER_S)
                raise AssertionError("no gateway is available")

            await _restart_one_by_one(system, client, gateways, until_available)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_draining_gateway_sends_its_clients_to_another_one_but_on_native_keeps_them(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(
        postgres, redis, simulator_answer_timeout_s=30, transport=transport, trusted_front=True
    ) as system:
        gateways = [system.start_gateway() for _ in range(2)]
        control = system.control
        async with _channel(gateways, "pick_first") as channel:
            client = Client(Caller(channel, system.shop.api_key))
            await control.hold("before_answer")
            waiting = asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
            [first] = await control.await_held()
            stopping = asyncio.ensure_future(asyncio.to_thread(gateways[0].stop))
            await eventually(lambda: '"draining"' in gateways[0].log, "the gateway drains")
            next_call = asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
            if transport == "native":
                # No GOAWAY: the connection stays, and every retry of the policy is refused.
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await next_call
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
                assert reason_of(refused.value) == "DRAINING"
                await control.release(first["reference"])
                assert (await waiting).operation.state == SUCCEEDED
                await control.release()
            else:
                await control.await_held(2)
                assert not waiting.done()
                await control.release()
                assert (await next_call).operation.state == SUCCEEDED
                assert (await waiting).operation.state == SUCCEEDED
            assert await stopping == 0
            after = await client.call("AuthorizePayment", authorize_request())
            assert after.operation.state == SUCCEEDED
        await control.close()
        assert system.unfinished() == []
        check(system, client)


async def test_a_connection_is_asked_to_go_at_its_age_and_no_call_is_lost_by_it(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(
        postgres, redis, simulator_answer_timeout_s=30, connection_age_max_s=1
    ) as system:
        gateway, control = system.start_gateway(), system.control
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            client = Client(caller)
            await control.hold("before_answer")
            old = asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
            await control.await_held()
            # The channel leaves its connection, on which the call goes on.
            async with asyncio.timeout(AGED_S_MAX):
                await caller.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            new = asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
            await control.await_held(2)
            assert not old.done()
            await control.release()
            assert (await old).operation.state == SUCCEEDED
            assert (await new).operation.state == SUCCEEDED
        await control.close()
        check(system, client)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_drain_finishes_what_is_in_flight_with_and_without_a_caller(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=30) as system:
        gateway = system.start_gateway(transport=transport, trusted_front=True)
        control = system.control
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            await control.hold("before_answer")
            waiting = asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
            [first] = await control.await_held()
            abandoned = asyncio.ensure_future(client.call("AuthorizePayment", authorize_request()))
            await control.await_held(2)
            abandoned.cancel()
            await asyncio.wait([abandoned])
            await eventually(lambda: "CANCELLED" in gateway.log, "the gateway knows it")
            stopping = asyncio.ensure_future(asyncio.to_thread(gateway.stop))
            await eventually(lambda: '"draining"' in gateway.log, "the gateway drains")
            await control.release(first["reference"])
            assert (await waiting).operation.state == SUCCEEDED
            await eventually(lambda: not _listens(gateway.address), "nobody can call any more")
            await control.release()
            assert await stopping == 0
        await control.close()
        assert system.unfinished() == []
        check(system, client)
        assert len([one for one in system.standing() if one.stands]) == 2
