"""Captures, refunds and voids that race over two gateways never exceed what there is.

One of the two is on each transport.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from payments.v1 import payment_pb2
from payments.v1.payment_service_pb2 import (
    CapturePaymentRequest,
    RefundPaymentRequest,
    VoidPaymentRequest,
)

from storage.embedded import free_port
from storage.postgres.queries import query
from tests.faults.checker import REPEAT_AFTER_S, REPEATABLE, Client, check, settled
from tests.faults.proxies import Action, postgres_proxy
from tests.faults.transports import alternating, other_than, start_on_both
from tests.harness import authorize_request, calling, eur, new_key, reason_of, running_system

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from storage.embedded import EmbeddedRedis
    from tests.harness import System
    from tests.servers import PostgresForTests

RACERS: Final = 50
AUTHORIZED_MINOR: Final = 1000
PART_MINOR: Final = 100
ROUNDS: Final = 10
"""How many payments are voided and captured at once."""

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED

PROFILES: Final = ("idempotent", "non_idempotent")
profiles = pytest.mark.parametrize("profile", PROFILES)


@asynccontextmanager
async def _two_gateways(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> AsyncIterator[tuple[System, Client]]:
    """A system with two gateways, and a client of both; the books are checked at the end."""
    with running_system(postgres, redis, profile=profile, simulator_answer_timeout_s=30) as system:
        gateways = start_on_both(system)
        async with (
            calling(gateways[0], system.shop.api_key) as first,
            calling(gateways[1], system.shop.api_key) as second,
        ):
            client = Client(first, second)
            yield system, client
            await settled(system)
            check(system, client)


async def _race(client: Client, method: str, requests: Sequence[Any]) -> Counter[str]:
    """Call at once, each until it is answered or refused for good; how often what came out."""

    async def one(request: Any) -> str:
        while True:
            try:
                answer = await client.call(method, request)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    return reason_of(error)
                if error.code() not in REPEATABLE:
                    raise
                await asyncio.sleep(REPEAT_AFTER_S)
                continue
            name: str = payment_pb2.OperationState.Name(answer.operation.state)
            return name.removeprefix("OPERATION_STATE_")

    return Counter(await asyncio.gather(*map(one, requests)))


async def _authorized(client: Client, **fields: Any) -> str:
    answer = await client.call(
        "AuthorizePayment", authorize_request(amount_minor=AUTHORIZED_MINOR, **fields)
    )
    assert answer.operation.state == SUCCEEDED
    payment_id: str = answer.payment.payment_id
    return payment_id


def _captures(payment_id: str, count: int, amount_minor: int, **fields: Any) -> list[Any]:
    return [
        CapturePaymentRequest(
            idempotency_key=new_key(), payment_id=payment_id, amount=eur(amount_minor), **fields
        )
        for _ in range(count)
    ]


def _requested_minor(system: System, kind: str, payment_id: str) -> int:
    """What requests of a kind asked of the PSP altogether, refused ones too."""
    return sum(
        record["amount_minor"]
        for record in system.simulator.received()
        if record["kind"] == kind and record["payment_id"] == payment_id
    )


@profiles
async def test_racing_captures_never_reach_the_psp_beyond_what_is_authorized(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_id = await _authorized(client)
        came = await _race(client, "CapturePayment", _captures(payment_id, RACERS, PART_MINOR))
        assert came["SUCCEEDED"] == AUTHORIZED_MINOR // PART_MINOR, came
        assert came.keys() <= {"SUCCEEDED", "AMOUNT_EXCEEDS_AUTHORIZED"}, came
        assert _requested_minor(system, "capture", payment_id) == AUTHORIZED_MINOR


@profiles
async def test_racing_refunds_never_reach_the_psp_beyond_what_is_captured(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_id = await _authorized(client, capture_method="AUTOMATIC")
        requests = [
            RefundPaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(PART_MINOR)
            )
            for _ in range(RACERS)
        ]
        came = await _race(client, "RefundPayment", requests)
        assert came["SUCCEEDED"] == AUTHORIZED_MINOR // PART_MINOR, came
        assert came.keys() <= {"SUCCEEDED", "AMOUNT_EXCEEDS_CAPTURED"}, came
        assert _requested_minor(system, "refund", payment_id) == AUTHORIZED_MINOR


@profiles
async def test_refunds_that_race_captures_never_reach_the_psp_beyond_what_is_captured(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_id = await _authorized(client)
        captures = _captures(payment_id, RACERS // 2, PART_MINOR)
        refunds = [
            RefundPaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(PART_MINOR)
            )
            for _ in range(RACERS // 2)
        ]
        captured, refunded = await asyncio.gather(
            _race(client, "CapturePayment", captures), _race(client, "RefundPayment", refunds)
        )
        assert captured["SUCCEEDED"] == AUTHORIZED_MINOR // PART_MINOR, captured
        assert refunded["SUCCEEDED"] <= captured["SUCCEEDED"]
        assert _requested_minor(system, "refund", payment_id) == refunded["SUCCEEDED"] * PART_MINOR


@profiles
async def test_of_a_void_and_a_capture_that_race_the_sum_stays_within_the_authorization(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_ids = await asyncio.gather(*(_authorized(client) for _ in range(ROUNDS)))

        async def one(payment_id: str) -> tuple[Counter[str], Counter[str]]:
            void = VoidPaymentRequest(idempotency_key=new_key(), payment_id=payment_id)
            return await asyncio.gather(
                _race(client, "CapturePayment", _captures(payment_id, 1, 600)),
                _race(client, "VoidPayment", [void]),
            )

        results = await asyncio.gather(*map(one, payment_ids))
        await settled(system)
        standings = {standing.payment_id: standing for standing in system.standing()}
        for payment_id, (captured, voided) in zip(payment_ids, results, strict=True):
            standing = standings[payment_id]
            assert standing.captured_minor == 600 * captured["SUCCEEDED"]
            assert captured["SUCCEEDED"] + voided["SUCCEEDED"] >= 1, (captured, voided)
            if voided["SUCCEEDED"]:
                assert standing.open_minor == 0
                assert standing.captured_minor + standing.voided_minor == AUTHORIZED_MINOR


@profiles
async def test_of_racing_final_captures_one_takes_place(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_id = await _authorized(client)
        requests = _captures(payment_id, RACERS, PART_MINOR, final=True)
        came = await _race(client, "CapturePayment", requests)
        assert came == {"SUCCEEDED": 1, "PAYMENT_CLOSED_FOR_CAPTURE": RACERS - 1}
        assert _requested_minor(system, "capture", payment_id) == PART_MINOR
        [standing] = system.standing()
        assert standing.voided_minor == AUTHORIZED_MINOR - PART_MINOR


@profiles
async def test_manual_takes_one_capture_of_racing_ones(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_id = await _authorized(client, capture_method="MANUAL")
        requests = _captures(payment_id, RACERS, PART_MINOR)
        came = await _race(client, "CapturePayment", requests)
        assert came == {"SUCCEEDED": 1, "PAYMENT_CLOSED_FOR_CAPTURE": RACERS - 1}
        assert _requested_minor(system, "capture", payment_id) == PART_MINOR


@profiles
async def test_declined_final_captures_reopen_the_payment_for_the_next(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        payment_id = await _authorized(client, token="tok_capture_declined")
        requests = _captures(payment_id, ROUNDS, PART_MINOR, final=True)
        came = await _race(client, "CapturePayment", requests)
        assert came["DECLINED"] >= 1
        assert came.keys() <= {"DECLINED", "PAYMENT_CLOSED_FOR_CAPTURE"}, came
        [standing] = system.standing()
        assert standing.open_minor == AUTHORIZED_MINOR
        again = await _race(client, "CapturePayment", _captures(payment_id, 1, PART_MINOR))
        assert again == {"DECLINED": 1}


@profiles
async def test_a_hundred_duplicates_over_two_gateways_are_one_request_at_the_psp(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    async with _two_gateways(postgres, redis, profile) as (system, client):
        request = authorize_request()
        came = await _race(client, "AuthorizePayment", [request] * 2 * RACERS)
        assert came == {"SUCCEEDED": 2 * RACERS}
        answers = client.told[request.idempotency_key]
        assert sum(not answer.replay.replayed for answer in answers) == 1
        assert len(system.simulator.received()) == 1


@alternating(profile=PROFILES)
async def test_a_repeat_refused_for_the_reservation_of_its_own_first_try_executes_after_all(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    """The first try reserves all there is, the repeat sees that, and then the first is NOT_SENT."""
    with (
        # Without Redis, a repeat begins although the first try is under way.
        running_system(
            postgres,
            redis,
            profile=profile,
            redis_url=f"redis://127.0.0.1:{free_port()}",
            trusted_front=True,
        ) as system,
        postgres_proxy(system.dsn) as proxy,
        postgres_proxy(system.dsn) as other_proxy,
    ):
        # The send window of the first try is over before its intent is answered.
        late = system.start_gateway(
            transport=transport, postgres_dsn=proxy.dsn, send_window_s=0.001, min_send_budget_s=0
        )
        other = system.start_gateway(transport=other_than(transport), postgres_dsn=other_proxy.dsn)
        async with (
            calling(late, system.shop.api_key) as first,
            calling(other, system.shop.api_key) as second,
        ):
            client, repeating = Client(first), Client(second)
            [request] = _captures(await _authorized(repeating), 1, AUTHORIZED_MINOR)
            reserved = proxy.intercept(query("writes", "followup_intent").text, Action.HOLD_ANSWER)
            looked = other_proxy.intercept(query("reads", "load").text, Action.HOLD_ANSWER)
            trying = asyncio.ensure_future(client.call("CapturePayment", request))
            await reserved.reached()
            repeat = asyncio.ensure_future(repeating.call("CapturePayment", request))
            await looked.reached()
            reserved.release()
            assert (await trying).operation.state == payment_pb2.OPERATION_STATE_NOT_SENT
            looked.release()
            assert (await repeat).operation.state == SUCCEEDED
        await settled(system)
        check(system, client, repeating)
        assert _requested_minor(system, "capture", request.payment_id) == AUTHORIZED_MINOR
