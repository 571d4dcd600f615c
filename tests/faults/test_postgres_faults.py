"""PostgreSQL killed under calls, and COMMITs whose answer is lost: what was acknowledged stays."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from payments.v1 import payment_pb2, payment_service_pb2

from storage.postgres.queries import query
from tests.faults.checker import Client, check, settled
from tests.faults.proxies import Action, postgres_proxy
from tests.faults.transports import alternating, other_than, start_on_both
from tests.harness import (
    authorize_request,
    bytes_without_replay,
    calling,
    eur,
    new_key,
    running_system,
)
from tests.servers import postgres_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

KEYS = 20
KILLS = 3
COMMIT = "COMMIT;"
"""As asyncpg ends a transaction block."""

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED

PROFILES = ("idempotent", "non_idempotent")
profiles = pytest.mark.parametrize("profile", PROFILES)


@pytest.fixture
def own_postgres() -> Iterator[PostgresForTests]:
    """A PostgreSQL that the test may kill."""
    with postgres_server() as server:
        yield server


async def _payment_through(client: Client, token: str) -> None:
    """Authorize, capture and refund, each until it is answered."""
    authorized = await client.until_answered("AuthorizePayment", authorize_request(token=token))
    if authorized.operation.state != SUCCEEDED:
        return
    payment_id = authorized.payment.payment_id
    for method, make, amount_minor in (
        ("CapturePayment", payment_service_pb2.CapturePaymentRequest, 600),
        ("RefundPayment", payment_service_pb2.RefundPaymentRequest, 200),
    ):
        answer = await client.until_answered(
            method,
            make(idempotency_key=new_key(), payment_id=payment_id, amount=eur(amount_minor)),
        )
        assert answer.operation.state == SUCCEEDED


@profiles
async def test_after_postgresql_was_killed_under_calls_all_that_was_acknowledged_is_there(
    own_postgres: PostgresForTests, redis: EmbeddedRedis, profile: str
) -> None:
    with running_system(own_postgres, redis, profile=profile) as system:
        async with AsyncExitStack() as stack:
            client = Client(
                *[
                    await stack.enter_async_context(calling(gateway, system.shop.api_key))
                    for gateway in start_on_both(system)
                ]
            )
            tokens = ["tok_visa", "tok_visa", "tok_declined_do_not_honor"]
            stop = asyncio.Event()

            async def caller() -> None:
                for number in range(10_000):
                    await _payment_through(client, tokens[number % len(tokens)])
                    if stop.is_set():
                        return

            callers = asyncio.gather(*(caller() for _ in range(8)))
            for _ in range(KILLS):
                await client.more(KEYS, callers)
                await asyncio.to_thread(own_postgres.server.kill)
                own_postgres.server.start()
            await client.more(KEYS, callers)
            stop.set()
            await callers
        await settled(system)
        check(system, client)


@alternating(point=("before_effect", "before_answer"), profile=PROFILES)
async def test_a_kill_of_postgresql_while_calls_are_at_the_psp_loses_no_outcome(
    own_postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, point: str, transport: str
) -> None:
    with running_system(
        own_postgres, redis, profile=profile, simulator_answer_timeout_s=60
    ) as system:
        gateway = system.start_gateway(transport=transport, trusted_front=True)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            control = system.control
            await control.hold(point)
            requests = [authorize_request() for _ in range(KEYS)]
            answers = asyncio.ensure_future(client.authorize_all(requests))
            await control.await_held(KEYS)
            await asyncio.to_thread(own_postgres.server.kill)
            await control.release()
            own_postgres.server.start()
            assert {answer.operation.state for answer in await answers} == {SUCCEEDED}
            await control.close()
        await settled(system)
        check(system, client)
        assert len(system.simulator.received()) == KEYS


@alternating(
    statement=("authorize_intent", "followup_intent", "change", "change_with_more"),
    profile=PROFILES,
)
async def test_a_commit_whose_answer_is_lost_takes_effect_once(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    profile: str,
    statement: str,
    transport: str,
) -> None:
    with (
        running_system(postgres, redis, profile=profile) as system,
        postgres_proxy(system.dsn) as proxy,
    ):
        gateway = system.start_gateway(
            transport=transport, trusted_front=True, postgres_dsn=proxy.dsn
        )
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            before = await client.call("AuthorizePayment", authorize_request())
            lost = proxy.intercept(query("writes", statement).text, Action.LOSE_ANSWER, times=2)
            if statement == "followup_intent":
                request: Any = payment_service_pb2.CapturePaymentRequest(
                    idempotency_key=new_key(),
                    payment_id=before.payment.payment_id,
                    amount=eur(600),
                )
                method = "CapturePayment"
            else:
                # An automatic capture is a companion: its change is one with more.
                automatic = statement == "change_with_more"
                request = authorize_request(
                    capture_method="AUTOMATIC" if automatic else "MANUAL_MULTIPLE"
                )
                method = "AuthorizePayment"
            # One try: the gateway itself finds out that it has written.
            answer = await client.call(method, request)
            for _ in range(2):
                await lost.reached()
            assert answer.operation.state == SUCCEEDED
            assert not answer.replay.replayed
            # Neither taken for another call's, nor left to recovery.
            assert (answer.operation.epoch, len(answer.operation.attempts)) == (1, 1)
            again = await client.call(method, request)
            assert again.replay.replayed
            assert bytes_without_replay(again) == bytes_without_replay(answer)
        assert len(system.simulator.received()) == 2
        await settled(system)
        check(system, client)


@alternating(profile=PROFILES)
async def test_a_lease_whose_commit_is_lost_only_delays_recovery(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    with (
        running_system(postgres, redis, profile=profile, simulator_answer_timeout_s=1) as system,
        postgres_proxy(system.dsn) as proxy,
    ):
        gateway = system.start_gateway(
            transport=transport,
            trusted_front=True,
            postgres_dsn=proxy.dsn,
            recovery_lease_s=1,
        )
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            # Every transaction block is recovery's: those that put and those that lease.
            lost = proxy.intercept(COMMIT, Action.LOSE_ANSWER, times=3)
            answer = await client.call(
                "AuthorizePayment", authorize_request(token="tok_timeout_after_charge")
            )
            assert answer.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
            for _ in range(3):
                await lost.reached()
            await settled(system)
            after = await caller.operation(operation_id=answer.operation.operation_id)
            assert after.operation.state == SUCCEEDED
        check(system, client)


@alternating(lost_writes=("intents", "outcomes"), profile=PROFILES)
async def test_when_a_gateway_dies_with_the_answer_of_its_commit_another_one_finishes(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    profile: str,
    lost_writes: str,
    transport: str,
) -> None:
    """The commit is durable, its writer never hears of it: recovery ends what it began."""
    statement = "authorize_intent" if lost_writes == "intents" else "change"
    with (
        running_system(
            postgres,
            redis,
            profile=profile,
            simulator_answer_timeout_s=1,
            # The other may take over when this, the answer's time and the margin have run out.
            send_window_s=1.5,
            recover_margin_s=0.2,
            trusted_front=True,
        ) as system,
        postgres_proxy(system.dsn) as proxy,
    ):
        dying = system.start_gateway(transport=transport, postgres_dsn=proxy.dsn)
        surviving = system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        async with (
            calling(dying, system.shop.api_key) as first,
            calling(surviving, system.shop.api_key) as second,
        ):
            held = proxy.intercept(query("writes", statement).text, Action.HOLD_ANSWER)
            client = Client(first)
            call = asyncio.ensure_future(client.attempt("AuthorizePayment", request))
            await held.reached()
            dying.kill()
            assert await call is None
            held.release()
            other = Client(second)
            answer = await other.until_answered("AuthorizePayment", request)
            assert answer.operation.state == SUCCEEDED
        await settled(system)
        check(system, client, other)
