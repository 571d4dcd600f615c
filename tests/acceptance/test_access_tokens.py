"""Access tokens from outside: a right one pays as an API key does, a wrong one does not."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from payments.v1 import payment_pb2, payment_service_pb2

from storage.postgres.accounts import Accounts
from tests.harness import (
    Caller,
    asyncio_run,
    new_key,
    reason_of,
    running_system,
)
from tests.tokens import (
    AUDIENCE,
    ISSUER,
    SigningKey,
    ec_key,
    jwks_endpoint,
    key_set,
    rsa_key,
    token,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import System
    from tests.servers import PostgresForTests

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    with running_system(
        postgres,
        redis,
        jwt_issuer=ISSUER,
        jwt_audience=AUDIENCE,
        jwt_jwks_pause_s=0.1,
        auth_cache_life_s=0.2,
        auth_negative_life_s=0.1,
    ) as running:
        yield running


@asynccontextmanager
async def calling(address: str, text: str) -> AsyncIterator[Caller]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Caller(channel, text)


async def refusal(caller: Caller, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.call(method, request)
    return caught.value.code(), reason_of(caught.value)


def of_shop(system: System, key: SigningKey, **changes: object) -> str:
    return token(key, None, **{"organisation_id": system.shop.organisation_id, **changes})


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_a_token_pays_within_its_scopes_merchants_and_mode(
    system: System, transport: str
) -> None:
    key = rsa_key("rsa-1")
    async with jwks_endpoint(key_set(key)) as endpoint:
        gateway = system.start_gateway(
            transport=transport, trusted_front=True, jwt_jwks_url=endpoint.url
        )
        address = await gateway.serving()
        async with calling(address, of_shop(system, key)) as caller:
            answer = await caller.authorize()
            assert answer.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
            assert answer.payment.merchant_id == system.shop.merchant_id
            read = payment_service_pb2.GetPaymentRequest(payment_id=answer.payment.payment_id)
            await caller.call("GetPayment", read)
        # An API key goes on beside it.
        async with calling(address, system.shop.api_key) as caller:
            await caller.call("GetPayment", read)
        write = payment_service_pb2.VoidPaymentRequest(
            payment_id=read.payment_id, idempotency_key=new_key()
        )
        async with calling(address, of_shop(system, key, scope="payments:read")) as caller:
            await caller.call("GetPayment", read)
            assert await refusal(caller, "VoidPayment", write) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "SCOPE_MISSING",
            )
        async with calling(address, of_shop(system, key, mode="live")) as caller:
            code, _ = await refusal(caller, "GetPayment", read)
            assert code is grpc.StatusCode.NOT_FOUND
        stranger_id = asyncio_run(lambda: _stranger(system.dsn))
        async with calling(address, of_shop(system, key, merchant_ids=[stranger_id])) as caller:
            foreign = payment_service_pb2.GetPaymentRequest(
                payment_id=read.payment_id, merchant_id=stranger_id
            )
            assert await refusal(caller, "GetPayment", foreign) == (
                grpc.StatusCode.NOT_FOUND,
                "MERCHANT_NOT_FOUND",
            )
        for wrong in (
            of_shop(system, rsa_key("rsa-1")),
            of_shop(system, key, aud="another"),
            of_shop(system, key, exp=1),
            of_shop(system, key)[:-10],
        ):
            async with calling(address, wrong) as caller:
                assert await refusal(caller, "GetPayment", read) == (
                    UNAUTHENTICATED,
                    "CREDENTIAL_INVALID",
                )
        gateway.stop()
        assert "eyJ" not in gateway.log  # as every part of a token begins that is readable


async def _stranger(dsn: str) -> str:
    async with Accounts.connect(dsn) as accounts:
        return await accounts.create_merchant(await accounts.create_organisation("O"), "Stranger")


async def test_a_rotated_key_is_found_and_an_issuer_that_is_away_is_no_verdict(
    system: System,
) -> None:
    old, new = ec_key("ec-1"), ec_key("ec-2")
    read = payment_service_pb2.ListPaymentsRequest()
    async with jwks_endpoint(key_set(old)) as endpoint:
        gateway = system.start_gateway(jwt_jwks_url=endpoint.url)
        address = await gateway.serving()
        async with calling(address, of_shop(system, old)) as caller:
            await caller.call("ListPayments", read)
        endpoint.serve(key_set(old, new))
        async with calling(address, of_shop(system, new)) as caller:
            await _until_valid(caller, read)
        endpoint.serve(b"", 500)
        third = of_shop(system, ec_key("ec-3"))
        async with calling(address, third) as caller:
            while True:  # within the pause between two readings it is unknown
                told = await refusal(caller, "ListPayments", read)
                if told == (grpc.StatusCode.UNAVAILABLE, "SIGNING_KEYS_UNAVAILABLE"):
                    break
                assert told == (UNAUTHENTICATED, "CREDENTIAL_INVALID")
    # Without its issuer the gateway still knows the keys that it read.
    async with calling(address, of_shop(system, new, sub="another")) as caller:
        await caller.call("ListPayments", read)


async def _until_valid(caller: Caller, request: Any) -> None:
    """Call until the token is valid: a reading may just have been made."""
    while True:
        try:
            await caller.call("ListPayments", request)
        except grpc.aio.AioRpcError as error:
            assert error.code() is UNAUTHENTICATED  # noqa: PT017 - nothing else is expected
        else:
            return
