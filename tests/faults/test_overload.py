"""Promise P10: what is too much is refused at the door; what is accepted gets its answer.

The bounds are small here, and what fills them is held where it is, so that no test rests on how
fast a machine is.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from payments.v1 import payment_pb2
from payments.v1 import payment_service_pb2 as pb

from gateway.settings import Settings
from storage.postgres.queries import query
from tests.faults.checker import Client, check, settled
from tests.faults.proxies import Action, postgres_proxy
from tests.faults.transports import TRANSPORTS
from tests.harness import (
    Caller,
    asyncio_run,
    authorize_request,
    calling,
    eventually,
    new_shop,
    reason_of,
    running_system,
)
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

WORKING_MAX: Final = 8
"""Calls that these gateways work on at once."""
IN_FLIGHT_MAX: Final = 16
LONE_IN_FLIGHT: Final = 14
"""What one merchant alone may have in flight: the rest is for others."""
CALLS: Final = 40
LIMIT_WITHOUT_OVERLOAD: Final = Settings.model_fields["admission_calls_max"].default

SUCCEEDED: Final = payment_pb2.OPERATION_STATE_SUCCEEDED

transports = pytest.mark.parametrize("transport", TRANSPORTS)


def _start(system: System, transport: str, **settings: object) -> GatewayProcess:
    return system.start_gateway(
        transport=transport,
        trusted_front=transport == "native",
        admission_calls_min=1,
        intent_connections=1,
        **settings,
    )


@asynccontextmanager
async def _caller_of_another_merchant(
    system: System, gateway: GatewayProcess
) -> AsyncIterator[Client]:
    shop = await asyncio.to_thread(asyncio_run, lambda: new_shop(system.dsn))
    async with calling(gateway, shop.api_key) as caller:
        # Its key is read from the database now, not while that is held.
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.operation(idempotency_key="none")
        yield Client(caller)


def _begin(client: Client, count: int) -> dict[asyncio.Task[Any], Any]:
    """Authorizations that have begun, and their requests."""
    requests = [authorize_request() for _ in range(count)]
    return {
        asyncio.ensure_future(client.call("AuthorizePayment", request)): request
        for request in requests
    }


async def _refused(calls: dict[asyncio.Task[Any], Any], count: int) -> list[Any]:
    """Wait until so many of the calls are refused; the refusals."""
    refused: list[Any] = []
    waiting = set(calls)
    while len(refused) < count:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                call.result()
            refused.append(error.value)
            del calls[call]
    return refused


def _check_refusal(error: Any, transport: str) -> None:
    """It is RESOURCE_EXHAUSTED, says OVERLOADED, and when to come back."""
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(error) == "OVERLOADED"
    status = rpc_status.from_call(error)
    assert status is not None
    assert _pause_ms(status) > 0
    trailers = dict(error.trailing_metadata())
    assert trailers["x-request-id"]
    if transport == "grpcio":  # the native transport cannot send it
        assert int(trailers["grpc-retry-pushback-ms"]) == _pause_ms(status)


def _pause_ms(status: Any) -> int:
    info = error_details_pb2.RetryInfo()
    [found] = (detail for detail in status.details if detail.Is(info.DESCRIPTOR))
    found.Unpack(info)
    return int(info.retry_delay.ToMilliseconds())


def _keys(system: System) -> set[str]:
    return {row["idempotency_key"] for row in system.fetch("SELECT * FROM operations")}


@transports
async def test_calls_beyond_the_bound_are_refused_at_once_and_leave_nothing(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with (
        running_system(postgres, redis, send_window_s=30) as system,
        postgres_proxy(system.dsn) as proxy,
    ):
        gateway = _start(system, transport, admission_calls_max=WORKING_MAX, postgres_dsn=proxy.dsn)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            await client.call("AuthorizePayment", authorize_request())
            held = proxy.intercept(query("writes", "authorize_intent").text, Action.HOLD_STATEMENT)
            calls = _begin(client, CALLS)
            every = list(calls.values())
            for error in await _refused(calls, CALLS - WORKING_MAX):
                _check_refusal(error, transport)
            # Those that are accepted wait for the database, and so would a refusal that asked it.
            await held.reached()
            assert not any(call.done() for call in calls)
            health = health_pb2_grpc.HealthStub(caller.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            held.release()
            answers = await asyncio.gather(*calls)
            assert {answer.operation.state for answer in answers} == {SUCCEEDED}
            accepted = {request.idempotency_key for request in calls.values()}
            assert _keys(system) >= accepted
            assert not _keys(system) & {request.idempotency_key for request in every} - accepted
            # Repeated after the pause, with their keys, the refused ones are accepted too.
            repeated = await client.authorize_all(every)
            assert {answer.operation.state for answer in repeated} == {SUCCEEDED}
        await settled(system)
        check(system, client)


@transports
async def test_flood_by_one_merchant_leaves_the_calls_of_another_accepted(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with (
        running_system(postgres, redis, send_window_s=30) as system,
        postgres_proxy(system.dsn) as proxy,
    ):
        gateway = _start(system, transport, admission_calls_max=WORKING_MAX, postgres_dsn=proxy.dsn)
        async with (
            calling(gateway, system.shop.api_key) as caller,
            _caller_of_another_merchant(system, gateway) as other,
        ):
            flood = Client(caller)
            await flood.call("AuthorizePayment", authorize_request())
            held = proxy.intercept(query("writes", "authorize_intent").text, Action.HOLD_STATEMENT)
            flooding = _begin(flood, CALLS)
            await _refused(flooding, CALLS - WORKING_MAX)
            # Half of the bound is the other's share; beyond it, it is refused like the first.
            calls = _begin(other, WORKING_MAX)
            for error in await _refused(calls, WORKING_MAX // 2):
                _check_refusal(error, transport)
            again = _begin(flood, 1)
            await _refused(again, 1)
            held.release()
            answers = await asyncio.gather(*calls, *flooding)
            assert {answer.operation.state for answer in answers} == {SUCCEEDED}
        await settled(system)
        check(system, flood, other)


@transports
async def test_merchant_whose_psp_hangs_leaves_room_for_another(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=60) as system:
        gateway = _start(
            system,
            transport,
            admission_calls_max=IN_FLIGHT_MAX,
            admission_in_flight_max=IN_FLIGHT_MAX,
        )
        control = system.control
        async with (
            calling(gateway, system.shop.api_key) as caller,
            _caller_of_another_merchant(system, gateway) as other,
        ):
            flood = Client(caller)
            await control.hold()
            flooding = _begin(flood, CALLS)
            for error in await _refused(flooding, CALLS - LONE_IN_FLIGHT):
                _check_refusal(error, transport)
            await control.await_held(LONE_IN_FLIGHT)
            calls = _begin(other, IN_FLIGHT_MAX)
            await _refused(calls, LONE_IN_FLIGHT)
            await control.await_held(IN_FLIGHT_MAX)
            await control.release()
            answers = await asyncio.gather(*calls, *flooding)
            assert len(answers) == IN_FLIGHT_MAX
            assert {answer.operation.state for answer in answers} == {SUCCEEDED}
        await control.close()
        await settled(system)
        check(system, flood, other)
        assert len(system.simulator.received()) == IN_FLIGHT_MAX


@transports
async def test_calls_whose_callers_have_gone_count_until_they_end(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=60) as system:
        gateway = _start(
            system,
            transport,
            admission_calls_max=IN_FLIGHT_MAX,
            admission_in_flight_max=IN_FLIGHT_MAX,
        )
        control = system.control
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            await control.hold()
            calls = _begin(client, LONE_IN_FLIGHT)
            await control.await_held(LONE_IN_FLIGHT)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            await eventually(
                lambda: gateway.log.count("CANCELLED") >= LONE_IN_FLIGHT, "the gateway knows it"
            )
            [error] = await _refused(_begin(client, 1), 1)
            _check_refusal(error, transport)
            await control.release()
            await settled(system)
            # All is let go, and counted out: as many as before are taken again.
            again = await client.authorize_all([authorize_request() for _ in range(LONE_IN_FLIGHT)])
            assert {answer.operation.state for answer in again} == {SUCCEEDED}
        await control.close()
        await settled(system)
        check(system, client)


def _items(count: int) -> list[pb.AuthorizePaymentItem]:
    return [
        pb.AuthorizePaymentItem(item_ref=str(number), authorization=authorize_request())
        for number in range(count)
    ]


async def _batch(caller: Caller, items: Sequence[pb.AuthorizePaymentItem]) -> list[Any]:
    request = pb.BatchAuthorizePaymentsRequest(items=items)
    return list((await caller.call("BatchAuthorizePayments", request)).results)


async def _stream(caller: Caller, items: Sequence[pb.AuthorizePaymentItem]) -> list[Any]:
    call = caller.stub.StreamAuthorizePayments(
        iter([pb.StreamAuthorizePaymentsRequest(items=items)]), metadata=caller.metadata
    )
    return [result async for message in call for result in message.results]


@transports
@pytest.mark.parametrize("send", [_batch, _stream], ids=["batch", "stream"])
async def test_items_beyond_the_bound_are_refused_one_by_one_and_the_call_is_not(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str, send: Any
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=60) as system:
        gateway = _start(
            system,
            transport,
            admission_calls_max=IN_FLIGHT_MAX,
            admission_in_flight_max=IN_FLIGHT_MAX,
        )
        control = system.control
        async with calling(gateway, system.shop.api_key) as caller:
            await control.hold()
            items = _items(CALLS)
            sending = asyncio.ensure_future(send(caller, items))
            await control.await_held(LONE_IN_FLIGHT)
            # A single call is refused as long as the items fill the bound: they count one by one.
            client = Client(caller)
            [error] = await _refused(_begin(client, 1), 1)
            _check_refusal(error, transport)
            await control.release()
            results = {result.item_ref: result for result in await sending}
            assert results.keys() == {item.item_ref for item in items}
            accepted = [each for each in results.values() if each.HasField("response")]
            refused = [each.error for each in results.values() if each.HasField("error")]
            assert len(accepted) == LONE_IN_FLIGHT
            assert {each.response.operation.state for each in accepted} == {SUCCEEDED}
            for status in refused:
                assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                info = error_details_pb2.ErrorInfo()
                status.details[0].Unpack(info)
                assert info.reason == "OVERLOADED"
                assert _pause_ms(status) > 0
            keys = {each.response.operation.idempotency_key for each in accepted}
            assert _keys(system) == keys
        await control.close()
        await settled(system)
        check(system)


def _admission(port: int) -> dict[str, float]:
    """The samples of admission's metrics, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        name: float(value)
        for name, value in re.findall(r"^gateway_admission_(\S+) (\S+)$", text, re.MULTILINE)
    }


@transports
async def test_under_overload_the_limit_is_found_and_all_that_is_accepted_is_answered_and_kept(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    port = free_port()
    with running_system(postgres, redis) as system:
        # Any queue at all is more than this target allows: overload on whatever machine.
        gateway = _start(
            system,
            transport,
            admission_target_ms=0.01,
            admission_bulk_target_ms=0.01,
            admission_retry_after_ms=1,
            metrics_address=f"127.0.0.1:{port}",
        )
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            refusals: list[Any] = []

            async def call_until_refused() -> None:
                while len(refusals) < CALLS:
                    try:
                        await client.call("AuthorizePayment", authorize_request())
                    except grpc.aio.AioRpcError as error:
                        refusals.append(error)

            await asyncio.gather(*(call_until_refused() for _ in range(64)))
            for error in refusals:
                _check_refusal(error, transport)
            samples = await asyncio.to_thread(_admission, port)
            assert samples['refused_total{bound="limit",class="payment"}'] == len(refusals)
            assert samples['admitted_total{class="payment"}'] == len(client.told)
            assert samples['in_flight{gate="payments"}'] == 0
            assert samples['overloaded{gate="payments"}'] == 1
            assert samples['limit{gate="payments"}'] < LIMIT_WITHOUT_OVERLOAD
            assert system.shop.merchant_id not in " ".join(samples)
            # Refusals are logged together, not one by one.
            await eventually(lambda: "calls refused for overload" in gateway.log, "a line of them")
            assert '"reason":"OVERLOADED"' not in gateway.log
        await settled(system)
        check(system, client)
        assert len(_keys(system)) == len(client.told)
