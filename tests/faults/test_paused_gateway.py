"""A gateway stopped at its worst moments, recovery by another one meanwhile; then it wakes up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pytest
from payments.v1 import payment_pb2
from payments.v1.payment_service_pb2 import CapturePaymentRequest, RefundPaymentRequest

from gateway.cli import main
from gateway.domain.model import OperationState as S
from storage.embedded._process import is_frozen
from storage.postgres.queries import query
from tests.faults.checker import Client, check, settled
from tests.faults.proxies import Action, postgres_proxy
from tests.faults.transports import alternating, other_than
from tests.harness import (
    authorize_request,
    bytes_without_replay,
    calling,
    eur,
    eventually,
    new_key,
    running_system,
)

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

STOPPED_SENDER: Final = "tests.faults.stopped_sender:serve"

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED

PROFILES: Final = ("idempotent", "non_idempotent", "no_query")

SLEEPER: Final = {"recovery_enabled": False}
"""Recovery is the other gateway's. Stopped in the middle of a search for dead senders, the sleeper
would keep everybody from searching until PostgreSQL ended its transaction."""


def _system(postgres: PostgresForTests, redis: EmbeddedRedis, profile: str) -> Any:
    return running_system(
        postgres,
        redis,
        profile=profile,
        simulator_answer_timeout_s=1,
        send_window_s=1.5,
        recover_margin_s=0.2,
        wait_s_max=1,
        # However long a busy machine takes over a pause, what was waited for has not timed out.
        postgres_statement_timeout_s=300,
        recovery_horizon_s=600,
        trusted_front=True,
    )


async def _stopped(gateway: GatewayProcess) -> None:
    """Wait until a process is stopped."""
    await eventually(lambda: is_frozen(gateway.pid), "the gateway is stopped")


async def _recovered(system: System, key: str) -> S:
    """Wait until recovery has taken an operation over and is done with it for now."""

    def state() -> S | None:
        rows = system.fetch(
            "SELECT operation.state, doubt.tries FROM operations AS operation"
            " LEFT JOIN doubts AS doubt USING (merchant_id, operation_id)"
            " WHERE operation.idempotency_key = $1 AND operation.epoch > 1",
            key,
        )
        if not rows or rows[0]["state"] == S.PROCESSING:
            return None
        return S(rows[0]["state"])

    found: S = await eventually(state, "recovery has taken the operation over")
    return found


async def _finish(system: System, profile: str, *clients: Client) -> None:
    """Everything is as it should be: settled, or on `no_query` in doubt and recorded so."""
    if profile == "no_query":

        def at_rest() -> bool:
            rows = system.fetch("SELECT tries, evidence_leased, evidence FROM doubts")
            return all(row["evidence"] is None or row["evidence_leased"] for row in rows)

        await eventually(at_rest, "recovery has weighed all evidence")
        check(system, *clients, doubts_stay=True)
        return
    await settled(system)
    check(system, *clients)


@alternating(profile=PROFILES)
async def test_a_sender_that_wakes_after_its_send_window_never_sends(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    """Stopped between the intent's COMMIT and its answer; recovery acts; SIGCONT."""
    with _system(postgres, redis, profile) as system, postgres_proxy(system.dsn) as proxy:
        sleeper = system.start_gateway(transport=transport, postgres_dsn=proxy.dsn, **SLEEPER)
        system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        async with calling(sleeper, system.shop.api_key) as caller:
            client = Client(caller)
            held = proxy.intercept(query("writes", "authorize_intent").text, Action.HOLD_ANSWER)
            call = asyncio.ensure_future(client.call("AuthorizePayment", request))
            await held.reached()
            sleeper.pause()
            await _stopped(sleeper)
            held.release()
            state = await _recovered(system, request.idempotency_key)
            assert state is (S.IN_DOUBT if profile == "no_query" else S.NOT_SENT)
            sleeper.resume()
            answer = await call
            assert answer.operation.state in (
                payment_pb2.OPERATION_STATE_NOT_SENT,
                payment_pb2.OPERATION_STATE_IN_DOUBT,
            )
        assert system.simulator.received() == []
        # The sender's own word that it never sent is evidence; then even without a query the doubt
        # ends.
        await settled(system)
        check(system, client)


@pytest.mark.parametrize(
    ("profile", "repeated", "transport"),
    [
        ("idempotent", False, "grpcio"),
        ("non_idempotent", False, "native"),
        ("no_query", False, "grpcio"),
        ("idempotent", True, "native"),
        ("non_idempotent", True, "grpcio"),
    ],
)
async def test_what_a_sender_sends_after_recovery_leaves_no_charge_unrecorded(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    profile: str,
    *,
    repeated: bool,
    transport: str,
) -> None:
    """Stopped between its last look at the clock and the write; recovery acts; SIGCONT."""
    with _system(postgres, redis, profile) as system:
        sleeper = system.fork_gateway(STOPPED_SENDER, "authorize", transport=transport, **SLEEPER)
        other = system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        async with (
            calling(sleeper, system.shop.api_key) as first,
            calling(other, system.shop.api_key) as second,
        ):
            client = Client(first)
            call = asyncio.ensure_future(client.call("AuthorizePayment", request))
            await _stopped(sleeper)
            await _recovered(system, request.idempotency_key)
            if repeated:  # a second attempt, which stands before the first one is sent
                await Client(second).until_answered("AuthorizePayment", request)
            sleeper.resume()
            await call
            repeat = await Client(second).until_answered("AuthorizePayment", request)
        # What the sleeper sent has arrived: it answers its call only after its own attempt.
        assert len(system.simulator.received()) >= 1
        await _finish(system, profile, client)
        standing = [one for one in system.standing() if one.stands]
        assert len(standing) == 1
        if profile == "no_query":
            [row] = system.fetch("SELECT state FROM operations")
            assert row["state"] in (S.SUCCEEDED, S.IN_DOUBT)
        else:
            assert repeat.operation.state == SUCCEEDED
            assert standing[0].reference == repeat.operation.attempts[-1].connector_reference


@pytest.mark.parametrize(
    ("repeated", "transport"), [(False, "grpcio"), (True, "native")], ids=["alone", "repeated"]
)
async def test_what_a_person_took_for_without_effect_is_reversed_should_it_take_effect(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
    *,
    repeated: bool,
    transport: str,
) -> None:
    """The PSP can be asked nothing, a person says "no effect", and then the sender wakes up."""
    with _system(postgres, redis, "no_query") as system:
        sleeper = system.fork_gateway(STOPPED_SENDER, "authorize", transport=transport, **SLEEPER)
        other = system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        async with (
            calling(sleeper, system.shop.api_key) as first,
            calling(other, system.shop.api_key) as second,
        ):
            client = Client(first)
            call = asyncio.ensure_future(client.call("AuthorizePayment", request))
            await _stopped(sleeper)
            assert await _recovered(system, request.idempotency_key) is S.IN_DOUBT
            [row] = system.fetch("SELECT operation_id FROM operations")
            monkeypatch.setenv("GATEWAY_POSTGRES_DSN", system.dsn)
            command = ["doubts", "resolve", f"{row['operation_id']}-1"]
            command += ["--merchant", system.shop.merchant_id, "--outcome", "no-effect"]
            command += ["--reason", "The PSP's console does not know the reference."]
            await asyncio.to_thread(main, command, standalone_mode=False)
            [row] = system.fetch("SELECT state FROM operations")
            assert row["state"] == S.NOT_SENT
            if repeated:  # a second attempt, which stands before the first one is sent
                await Client(second).until_answered("AuthorizePayment", request)
            sleeper.resume()
            await call

        def reversed_() -> bool:
            rows = system.fetch("SELECT state FROM operations WHERE kind = 7")
            return bool(rows) and all(each["state"] == S.SUCCEEDED for each in rows)

        await eventually(reversed_, "the late charge is reversed")
        await settled(system)
        check(system, client)
        standing = [one.reference for one in system.standing() if one.stands]
        [row] = system.fetch("SELECT operation_id, state FROM operations WHERE kind = 1")
        assert standing == ([f"{row['operation_id']}-2"] if repeated else [])
        assert row["state"] == (S.SUCCEEDED if repeated else S.NOT_SENT)
        [found] = system.fetch("SELECT kind FROM discrepancies")
        assert found["kind"] == "late_success"


@alternating(profile=PROFILES)
async def test_a_sender_that_sends_after_recovery_and_dies_leaves_no_charge_unrecorded(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    """As above, but nobody lives to tell: what recovery did must have been enough."""
    with _system(postgres, redis, profile) as system:
        sleeper = system.fork_gateway(STOPPED_SENDER, "authorize", transport=transport, **SLEEPER)
        other = system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        control = system.control
        async with (
            calling(sleeper, system.shop.api_key) as first,
            calling(other, system.shop.api_key) as second,
        ):
            client = Client(second)
            call = asyncio.ensure_future(Client(first).attempt("AuthorizePayment", request))
            await _stopped(sleeper)
            state = await _recovered(system, request.idempotency_key)
            await control.hold("before_answer")
            sleeper.resume()
            await control.await_held()
            sleeper.kill()
            await call
            await control.release()
            assert state is (S.IN_DOUBT if profile == "no_query" else S.NOT_SENT)
            answer = await client.until_answered("AuthorizePayment", request)
        await control.close()
        await _finish(system, profile, client)
        [standing] = [one for one in system.standing() if one.stands]
        assert standing.reference == answer.operation.attempts[-1].connector_reference


@pytest.mark.parametrize(
    ("profile", "kind", "transport"),
    [
        ("idempotent", "capture", "grpcio"),
        ("non_idempotent", "capture", "native"),
        ("no_query", "capture", "grpcio"),
        ("idempotent", "refund", "native"),
        ("non_idempotent", "refund", "grpcio"),
    ],
)
async def test_a_follow_up_that_is_sent_after_recovery_never_moves_money_twice(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, kind: str, transport: str
) -> None:
    with _system(postgres, redis, profile) as system:
        sleeper = system.fork_gateway(STOPPED_SENDER, kind, transport=transport, **SLEEPER)
        other = system.start_gateway(transport=other_than(transport))
        async with (
            calling(sleeper, system.shop.api_key) as first,
            calling(other, system.shop.api_key) as second,
        ):
            client = Client(first)
            authorized = await Client(second).call("AuthorizePayment", authorize_request())
            payment_id = authorized.payment.payment_id
            amounts = {"capture": 600, "refund": 200}
            if kind == "refund":
                capture = CapturePaymentRequest(
                    idempotency_key=new_key(), payment_id=payment_id, amount=eur(600)
                )
                await Client(second).call("CapturePayment", capture)
            make: Any = CapturePaymentRequest if kind == "capture" else RefundPaymentRequest
            method = f"{kind.capitalize()}Payment"
            request = make(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(amounts[kind])
            )
            call = asyncio.ensure_future(client.call(method, request))
            await _stopped(sleeper)
            await _recovered(system, request.idempotency_key)
            again = asyncio.ensure_future(Client(second).until_answered(method, request))
            if profile != "no_query":
                assert (await again).operation.state == SUCCEEDED
            sleeper.resume()
            await call
            await again
        await _finish(system, profile, client)
        [standing] = system.standing()
        moved = standing.captured_minor if kind == "capture" else standing.refunded_minor
        assert moved == amounts[kind]


@alternating(profile=PROFILES)
async def test_a_gateway_stopped_before_the_answer_of_the_psp_does_not_keep_the_outcome_away(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    """Stopped with its request at the PSP, which answers meanwhile; recovery acts; SIGCONT."""
    with _system(postgres, redis, profile) as system:
        sleeper = system.start_gateway(transport=transport, **SLEEPER)
        other = system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        control = system.control
        async with (
            calling(sleeper, system.shop.api_key) as first,
            calling(other, system.shop.api_key) as second,
        ):
            client = Client(first)
            await control.hold("before_answer")
            call = asyncio.ensure_future(client.call("AuthorizePayment", request))
            await control.await_held()
            sleeper.pause()
            await _stopped(sleeper)
            await control.release()
            state = await _recovered(system, request.idempotency_key)
            assert state is (S.IN_DOUBT if profile == "no_query" else S.SUCCEEDED)
            sleeper.resume()
            answer = await call
            repeat = await Client(second).until_answered("AuthorizePayment", request)
            if profile != "no_query":
                assert bytes_without_replay(repeat) == bytes_without_replay(answer)
        await control.close()
        await _finish(system, profile, client)
        assert len([one for one in system.standing() if one.stands]) == 1


@alternating(profile=PROFILES)
async def test_an_outcome_written_after_recovery_took_over_does_not_overwrite_it(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    """Stopped between the PSP's answer and the outcome's arrival at PostgreSQL."""
    with _system(postgres, redis, profile) as system, postgres_proxy(system.dsn) as proxy:
        sleeper = system.start_gateway(transport=transport, postgres_dsn=proxy.dsn, **SLEEPER)
        system.start_gateway(transport=other_than(transport))
        request = authorize_request()
        async with calling(sleeper, system.shop.api_key) as caller:
            client = Client(caller)
            late = proxy.intercept(query("writes", "change").text, Action.HOLD_STATEMENT)
            call = asyncio.ensure_future(client.call("AuthorizePayment", request))
            await late.reached()
            sleeper.pause()
            await _stopped(sleeper)
            state = await _recovered(system, request.idempotency_key)
            assert state is (S.IN_DOUBT if profile == "no_query" else S.SUCCEEDED)
            late.release()
            sleeper.resume()
            answer = await call
            if profile != "no_query":
                assert answer.operation.state == SUCCEEDED
        # The sleeper knows what the PSP said, so even without a query the doubt ends.
        await settled(system)
        check(system, client)
        [row] = system.fetch("SELECT state FROM operations")
        assert row["state"] == S.SUCCEEDED
