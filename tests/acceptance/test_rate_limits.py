"""A merchant's rate limit from outside: over all gateways together, item by item."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from payments.v1 import payment_service_pb2

from gateway.application.accounts import RateLimit
from storage.postgres.accounts import Accounts
from tests.harness import Caller, authorize_request, new_key, new_shop, reason_of, running_system

if TYPE_CHECKING:
    from collections.abc import Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import Shop, System
    from tests.servers import PostgresForTests

PER_S = 0.002
"""One more call in 500 s: no test lasts so long."""
BURST = 5


@pytest.fixture(scope="module")
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    with running_system(postgres, redis, auth_cache_life_s=0.2, redis_timeout_ms=5000) as running:
        yield running


async def limited_shop(system: System) -> Shop:
    shop = await new_shop(system.dsn)
    async with Accounts.connect(system.dsn) as accounts:
        await accounts.limit_merchant(shop.merchant_id, RateLimit(PER_S, BURST))
    return shop


def pause_s(error: grpc.aio.AioRpcError) -> float:
    status: Any = rpc_status.from_call(error)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    return float(retry.retry_delay.ToMilliseconds()) / 1000


async def refused(caller: Caller, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.authorize(**fields)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(caught.value) == "RATE_LIMITED"
    return caught.value


async def test_calls_beyond_the_limit_are_refused_and_nothing_else_is(system: System) -> None:
    shop = await limited_shop(system)
    async with AsyncExitStack() as stack:
        callers = []
        for transport in ("grpcio", "native"):
            gateway = system.start_gateway(transport=transport, trusted_front=True)
            channel = grpc.aio.insecure_channel(await gateway.serving())
            await stack.enter_async_context(channel)
            callers.append((Caller(channel, shop.api_key), Caller(channel, system.shop.api_key)))
        (one, unlimited), (other, _) = callers

        # Both gateways let in a burst together.
        keys = [new_key() for _ in range(BURST)]
        answers = [
            await (one, other)[number % 2].authorize(idempotency_key=key)
            for number, key in enumerate(keys)
        ]
        for caller in (one, other):
            error = await refused(caller)
            assert 0 < pause_s(error) <= 1 / PER_S
        # Repeats are answered, reads are served, and no other merchant notices.
        for key, answer in zip(keys, answers, strict=True):
            again = await other.authorize(idempotency_key=key)
            assert again.operation == answer.operation
            assert again.replay.replayed
        payment_id = answers[0].payment.payment_id
        await one.call("GetPayment", payment_service_pb2.GetPaymentRequest(payment_id=payment_id))
        for _ in range(BURST + 1):
            await unlimited.authorize()
        # Other money calls count too.
        void = payment_service_pb2.VoidPaymentRequest(
            payment_id=payment_id, idempotency_key=new_key()
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await one.call("VoidPayment", void)
        assert reason_of(caught.value) == "RATE_LIMITED"
        # What was refused left nothing behind, here or at the PSP.
        [count] = system.fetch(
            "SELECT count(*) FROM operations WHERE merchant_id = $1", shop.merchant_id
        )
        assert count["count"] == BURST

        async with Accounts.connect(system.dsn) as accounts:
            await accounts.limit_merchant(shop.merchant_id, None)
        while True:  # once the credential is read anew
            try:
                await one.call("VoidPayment", void)
            except grpc.aio.AioRpcError as error:
                assert reason_of(error) == "RATE_LIMITED"  # noqa: PT017 - nothing else is expected
            else:
                break


async def test_the_items_of_batches_and_streams_count_one_by_one(system: System) -> None:
    gateway = system.start_gateway()
    async with grpc.aio.insecure_channel(await gateway.serving()) as channel:
        for method in ("batch", "stream"):
            shop = await limited_shop(system)
            caller = Caller(channel, shop.api_key)
            items = [
                payment_service_pb2.AuthorizePaymentItem(
                    item_ref=str(number), authorization=authorize_request()
                )
                for number in range(BURST + 3)
            ]
            if method == "batch":
                request = payment_service_pb2.BatchAuthorizePaymentsRequest(items=items)
                told = await caller.call("BatchAuthorizePayments", request)
                results = list(told.results)
            else:
                stream = caller.stub.StreamAuthorizePayments(
                    iter([payment_service_pb2.StreamAuthorizePaymentsRequest(items=items)]),
                    metadata=caller.metadata,
                )
                results = [each async for response in stream for each in response.results]
            errors = [each.error for each in results if each.WhichOneof("result") == "error"]
            assert len(results) - len(errors) == BURST
            for error in errors:
                assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                assert any(b"RATE_LIMITED" in detail.value for detail in error.details)
                assert any(
                    detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in error.details
                )
