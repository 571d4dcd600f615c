"""Shutdown drains: a rolling restart fails no call of an ordinarily retrying client."""

from __future__ import annotations

import asyncio
import json
import socket
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import grpc
import pytest
from payments.v1 import payment_pb2

from storage.embedded import free_port
from tests.faults.checker import Client, check
from tests.harness import Caller, authorize_request, calling, eventually, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CALLERS: Final = 32
ANSWERS: Final = 150
"""So many calls are answered between two steps of the restart."""

RECONNECT_MS_MAX: Final = 300
"""Less than what four retries of the published policy wait for altogether."""

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED


def _service_config(policy: str) -> str:
    """The published one, over several addresses.

    It repeats CANCELLED too: so gRPC's servers end what they have not read when they shut down.
    """
    published = json.loads((files("payments.v1") / "service_config.json").read_text())
    return json.dumps({**published, "loadBalancingConfig": [{policy: {}}]})


@pytest.mark.parametrize("policy", ["pick_first", "round_robin"])
async def test_a_rolling_restart_under_load_fails_no_call(
    postgres: PostgresForTests, redis: EmbeddedRedis, policy: str
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=10) as system:
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        gateways = [system.start_gateway(listen_address=address) for address in addresses]
        assert [gateway.address for gateway in gateways] == addresses
        control = system.control
        await control.latency(20, 100)  # so that calls are in flight when it strikes
        await control.close()
        options = [
            ("grpc.service_config", _service_config(policy)),
            # A replaced gateway is found again within the pauses of the retries, however soon the
            # next one goes: gRPC's own default would leave its address alone for seconds.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
        ]
        async with grpc.aio.insecure_channel(
            f"ipv4:{','.join(addresses)}", options=options
        ) as channel:
            client = Client(Caller(channel, system.shop.api_key))
            stop = asyncio.Event()

            async def caller() -> None:
                while not stop.is_set():
                    answer = await client.call("AuthorizePayment", authorize_request())
                    assert answer.operation.state == SUCCEEDED

            callers = asyncio.gather(*(caller() for _ in range(CALLERS)))
            await client.more(ANSWERS, callers)
            for number, address in enumerate(addresses):
                assert await asyncio.to_thread(gateways[number].stop) == 0
                gateways[number] = gateway = system.start_gateway(listen_address=address)
                await asyncio.to_thread(getattr, gateway, "address")
                await client.more(ANSWERS, callers)
            stop.set()
            await callers
        for gateway in gateways:
            assert await asyncio.to_thread(gateway.stop) == 0
        # At once: a drained gateway leaves nothing to recovery.
        assert system.unfinished() == []
        check(system, client)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("transport", ["grpcio", "native"])
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
