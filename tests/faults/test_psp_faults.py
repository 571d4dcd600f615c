"""What PSPs do wrong, chosen by test tokens: doubts end where the PSP helps, and only there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from payments.v1 import payment_pb2
from payments.v1.payment_service_pb2 import (
    CapturePaymentRequest,
    IncrementAuthorizationRequest,
    RefundPaymentRequest,
    VoidPaymentRequest,
)

from gateway.connectors.simulator.outcomes import AMOUNTS, SCRIPTED_TOKEN
from gateway.domain.model import OperationKind
from gateway.domain.model import OperationState as S
from tests.faults.checker import Client, check, settled
from tests.faults.transports import alternating, other_than, start_on_both
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
    from tests.harness import System
    from tests.servers import PostgresForTests

LOOKS_MIN: Final = 4
"""After so many looks of recovery a doubt that still stands is one that no timer ends."""

SETTLING: Final = ("idempotent", "key_2s", "non_idempotent", "cancel_only")
"""The profiles on which every doubt ends."""

STANDS: Final = frozenset({S.SUCCEEDED})
NEVER_SENT: Final = frozenset({S.NOT_SENT})
TAKEN_BACK: Final = frozenset({S.CANCELED})
DECLINES: Final = frozenset({S.DECLINED})
EITHER: Final = frozenset({S.SUCCEEDED, S.NOT_SENT, S.CANCELED})
"""Where the PSP may be quicker or slower than recovery; the books have to agree all the same."""

FINAL_STATES: Final[dict[str, tuple[frozenset[S], ...]]] = {
    # token: on idempotent PSPs, on those that can be asked, on those that can only cancel.
    # An idempotent one is sent the same request again where the connection was lost.
    "tok_visa": (STANDS, STANDS, STANDS),
    "tok_declined_do_not_honor": (DECLINES, DECLINES, DECLINES),
    "tok_timeout_after_charge": (STANDS, STANDS, TAKEN_BACK),
    "tok_timeout_before_charge": (NEVER_SENT, NEVER_SENT, NEVER_SENT),
    "tok_success_late": (EITHER, EITHER, EITHER),
    "tok_reset_before_charge": (STANDS, NEVER_SENT, NEVER_SENT),
    "tok_reset_after_charge": (STANDS, STANDS, TAKEN_BACK),
    "tok_reset_always": (STANDS, STANDS, TAKEN_BACK),
    "tok_error_500_then_success": (STANDS, NEVER_SENT, NEVER_SENT),
    "tok_error_500_after_charge": (STANDS, STANDS, TAKEN_BACK),
    "tok_error_500_always": (NEVER_SENT, NEVER_SENT, NEVER_SENT),
    "tok_garbage": (STANDS, STANDS, TAKEN_BACK),
    "tok_oversized": (STANDS, STANDS, TAKEN_BACK),
    "tok_wrong_reference": (STANDS, STANDS, TAKEN_BACK),
    "tok_wrong_currency": (STANDS, STANDS, TAKEN_BACK),
    "tok_slow": (EITHER, EITHER, EITHER),
    "tok_wrong_amount": (STANDS, STANDS, STANDS),
    "tok_partial_approval": (DECLINES, DECLINES, DECLINES),
    # What ends by a query, and so only where the PSP can be asked.
    "tok_pending": (STANDS, STANDS, frozenset()),
    "tok_pending_declined": (DECLINES, DECLINES, frozenset()),
    "tok_requires_action": (STANDS, STANDS, frozenset()),
}
COLUMNS: Final = {"idempotent": 0, "key_2s": 0, "non_idempotent": 1, "cancel_only": 2}

DOUBTS_WITHOUT_QUERY: Final = (
    "tok_timeout_after_charge",
    "tok_timeout_before_charge",
    "tok_reset_always",
    "tok_error_500_always",
    "tok_garbage",
    "tok_wrong_reference",
)

IN_DOUBT = payment_pb2.OPERATION_STATE_IN_DOUBT
PENDING = payment_pb2.OPERATION_STATE_PENDING
SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED
DECLINED = payment_pb2.OPERATION_STATE_DECLINED

PROFILES: Final = ("idempotent", "non_idempotent")


def _system(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, answer_timeout_s: float = 1
) -> Any:
    return running_system(
        postgres,
        redis,
        profile=profile,
        simulator_answer_timeout_s=answer_timeout_s,
        recover_margin_s=0.2,
        trusted_front=True,
    )


def _states(system: System) -> dict[str, S]:
    rows = system.fetch("SELECT idempotency_key, state FROM operations")
    return {row["idempotency_key"]: S(row["state"]) for row in rows if row["idempotency_key"]}


@alternating(profile=SETTLING)
async def test_every_fault_of_an_authorization_ends_in_a_definite_state(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    expected = {
        token: columns[COLUMNS[profile]]
        for token, columns in FINAL_STATES.items()
        if columns[COLUMNS[profile]]
    }
    with _system(postgres, redis, profile) as system:
        gateway = system.start_gateway(transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            requests = {
                (token, method): authorize_request(token=token, capture_method=method)
                for token in expected
                for method in ("MANUAL", "AUTOMATIC")
            }
            await asyncio.gather(
                *(client.call("AuthorizePayment", request) for request in requests.values())
            )
            await settled(system)
            states = _states(system)
            for (token, method), request in requests.items():
                assert states[request.idempotency_key] in expected[token], (token, method)
            check(system, client)

            # What had surely no effect executes when it is repeated; all else is answered again.
            repeats = await asyncio.gather(
                *(client.call("AuthorizePayment", request) for request in requests.values())
            )
            for request, answer in zip(requests.values(), repeats, strict=True):
                executed = states[request.idempotency_key] is S.NOT_SENT
                assert answer.replay.replayed != executed
                assert len(answer.operation.attempts) == 1 + executed
            await settled(system)
            check(system, client)


async def test_without_query_and_cancel_a_doubt_stays_and_no_timer_fails_it(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with _system(postgres, redis, "no_query") as system:
        gateways = start_on_both(system)
        async with (
            calling(gateways[0], system.shop.api_key) as first,
            calling(gateways[1], system.shop.api_key) as second,
        ):
            client = Client(first, second)
            requests = [authorize_request(token=token) for token in DOUBTS_WITHOUT_QUERY]
            pending = authorize_request(token="tok_pending")
            answers = await asyncio.gather(
                *(client.call("AuthorizePayment", request) for request in requests)
            )
            assert {answer.operation.state for answer in answers} == {IN_DOUBT}
            assert (await client.call("AuthorizePayment", pending)).operation.state == PENDING

            def looked_at() -> bool:
                rows = system.fetch("SELECT tries FROM doubts")
                return len(rows) == len(requests) + 1 and all(
                    row["tries"] >= LOOKS_MIN for row in rows
                )

            await eventually(looked_at, "recovery has looked at every doubt several times")
            for request in requests:
                answer = await client.call("AuthorizePayment", request)
                assert answer.operation.state == IN_DOUBT
                assert answer.replay.replayed
                assert answer.payment.state == payment_pb2.PAYMENT_STATE_IN_DOUBT
            check(system, client, doubts_stay=True)
        assert all(record["method"] == "send" for record in system.simulator.received())
        assert [gateway.stop() for gateway in gateways] == [0, 0]


def _follow_up(kind: OperationKind, payment_id: str) -> tuple[str, Any]:
    key = new_key()
    match kind:
        case OperationKind.CAPTURE:
            return "CapturePayment", CapturePaymentRequest(
                idempotency_key=key, payment_id=payment_id, amount=eur(400)
            )
        case OperationKind.REFUND:
            return "RefundPayment", RefundPaymentRequest(
                idempotency_key=key, payment_id=payment_id, amount=eur(300)
            )
        case OperationKind.INCREMENT:
            return "IncrementAuthorization", IncrementAuthorizationRequest(
                idempotency_key=key, payment_id=payment_id, additional_amount=eur(100)
            )
        case _:
            return "VoidPayment", VoidPaymentRequest(idempotency_key=key, payment_id=payment_id)


FOLLOW_UPS: Final[dict[str, frozenset[S]]] = {
    "declined": DECLINES,
    "pending": STANDS,
    "pending_declined": DECLINES,
    "timeout_after_charge": STANDS,
    # A void is repeated until the PSP confirms it.
    "timeout_before_charge": NEVER_SENT | STANDS,
    "reset_after_charge": STANDS,
    "reset_always": STANDS,
    "error_500_then_success": NEVER_SENT | STANDS,
    "garbage": STANDS,
    "wrong_reference": STANDS,
    "wrong_currency": STANDS,
}


@alternating(profile=PROFILES)
async def test_every_fault_of_a_follow_up_ends_in_a_definite_state_and_its_reservation_with_it(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    kinds = (
        OperationKind.CAPTURE,
        OperationKind.REFUND,
        OperationKind.VOID,
        OperationKind.INCREMENT,
    )
    with _system(postgres, redis, profile) as system:
        gateway = system.start_gateway(transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)

            async def one(kind: OperationKind, name: str) -> tuple[OperationKind, str, str]:
                token = f"tok_{kind.name.lower()}_{name}"
                authorized = await client.call("AuthorizePayment", authorize_request(token=token))
                payment_id = authorized.payment.payment_id
                if kind is OperationKind.REFUND:
                    await client.call(*_follow_up(OperationKind.CAPTURE, payment_id))
                method, request = _follow_up(kind, payment_id)
                await client.call(method, request)
                return kind, name, request.idempotency_key

            cases = await asyncio.gather(
                *(one(kind, name) for kind in kinds for name in FOLLOW_UPS)
            )
            await settled(system)
            states = _states(system)
            wrong = [
                (kind.name, name, states[key].name)
                for kind, name, key in cases
                if states[key] not in FOLLOW_UPS[name]
            ]
            assert not wrong
            check(system, client)


@alternating(profile=PROFILES)
async def test_a_capture_in_doubt_keeps_its_reservation(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    with _system(postgres, redis, profile) as system:
        gateway = system.start_gateway(transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            control = system.control
            token = "tok_capture_timeout_after_charge"
            authorized = await client.call("AuthorizePayment", authorize_request(token=token))
            payment_id = authorized.payment.payment_id
            await control.hold(method="query")
            doubtful = await client.call(*_follow_up(OperationKind.CAPTURE, payment_id))
            assert doubtful.operation.state == IN_DOUBT
            assert doubtful.payment.amounts.capture_pending_minor == 400
            held = await client.attempt(
                "CapturePayment",
                CapturePaymentRequest(
                    idempotency_key=new_key(), payment_id=payment_id, amount=eur(600)
                ),
            )
            assert held.payment.amounts.capture_pending_minor == 1000
            await control.release()
            await control.close()
            await settled(system)
            after = await caller.payment(payment_id)
            assert after.payment.amounts.captured_minor == 1000
            check(system, client)


@alternating(profile=("cancel_only",))
async def test_a_hold_that_a_cancelled_capture_gives_back_to_a_closed_payment_is_released(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    amount_minor = next(
        amount for amount, each in AMOUNTS.items() if each.name == "reset_after_charge"
    )
    with _system(postgres, redis, profile) as system:
        gateway = system.start_gateway(transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            control = system.control
            request = authorize_request(
                amount_minor=amount_minor + 400,
                capture_method="MANUAL_MULTIPLE",
                token=SCRIPTED_TOKEN,
            )
            payment_id = (await client.call("AuthorizePayment", request)).payment.payment_id

            def capture(amount_minor: int, *, final: bool) -> CapturePaymentRequest:
                return CapturePaymentRequest(
                    idempotency_key=new_key(),
                    payment_id=payment_id,
                    amount=eur(amount_minor),
                    final=final,
                )

            await control.hold(method="cancel")
            doubtful = await client.call("CapturePayment", capture(amount_minor, final=False))
            assert doubtful.operation.state == IN_DOUBT
            closing = await client.call("CapturePayment", capture(300, final=True))
            assert closing.operation.state == SUCCEEDED
            await control.release()
            await control.close()
            await settled(system)
            after = await caller.payment(payment_id)
            released = [each for each in after.operations if each.kind == OperationKind.VOID]
            assert [each.state for each in released] == [SUCCEEDED]
            assert after.payment.amounts.captured_minor == 300
            assert after.payment.amounts.voided_minor == amount_minor + 100
            check(system, client)


@alternating(profile=PROFILES)
async def test_another_amount_than_requested_is_recorded_as_a_discrepancy(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    with _system(postgres, redis, profile) as system:
        gateway = system.start_gateway(transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            answer = await client.call(
                "AuthorizePayment", authorize_request(token="tok_wrong_amount")
            )
            assert answer.operation.state == SUCCEEDED
            assert answer.payment.amounts.authorized_minor == 1000
            assert answer.payment.amounts.authorized_reported_minor == 1001
        [row] = system.fetch("SELECT kind, expected, reported FROM discrepancies")
        assert tuple(row) == ("authorized_amount", "1000", "1001")
        check(system, client)


@alternating(profile=(*SETTLING, "no_query"))
async def test_the_reversal_of_a_partial_approval_outlives_the_gateway_that_began_it(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    with _system(postgres, redis, profile) as system:
        control = system.control
        dying = system.start_gateway(transport=transport)
        if profile == "no_query":
            await control.hold(kind="reversal")
        else:
            await control.hold(method="cancel")
        async with calling(dying, system.shop.api_key) as caller:
            client = Client(caller)
            answer = await client.call(
                "AuthorizePayment", authorize_request(token="tok_partial_approval")
            )
            assert answer.operation.state == DECLINED
            allowed = await client.call(
                "AuthorizePayment",
                authorize_request(token="tok_partial_approval", allow_partial_approval=True),
            )
            assert allowed.operation.state == SUCCEEDED
            assert allowed.payment.amounts.authorized_minor == 500
            await control.await_held()
            dying.kill()
        assert len([one for one in system.standing() if one.stands]) == 2
        await control.release()
        await control.close()
        system.start_gateway(transport=other_than(transport))
        await settled(system)
        check(system, client)
        assert [one.open_minor for one in system.standing() if one.stands] == [500]


VOIDED_IN_FLIGHT: Final = (
    "tok_visa",
    "tok_wrong_amount",
    "tok_partial_approval",
    "tok_timeout_after_charge",
    "tok_pending",
)


@alternating(profile=(*SETTLING, "no_query"))
async def test_a_success_found_after_a_void_of_an_authorization_in_flight_is_taken_back(
    postgres: PostgresForTests, redis: EmbeddedRedis, profile: str, transport: str
) -> None:
    # Where nothing would tell the outcome, only those that are answered.
    answered = {"no_query": 3, "cancel_only": 4}.get(profile, len(VOIDED_IN_FLIGHT))
    tokens = VOIDED_IN_FLIGHT[:answered]
    # Held by its own nature, until the gateway has gone.
    late = [] if profile == "no_query" else ["tok_success_late"]
    # The voids have to come while it is waited for.
    with _system(postgres, redis, profile, answer_timeout_s=4) as system:
        gateway = system.start_gateway(transport=transport)
        async with calling(gateway, system.shop.api_key) as caller:
            client = Client(caller)
            control = system.control
            await control.hold()
            requests = [
                authorize_request(token=token, capture_method=method)
                for token in [*tokens, *late]
                for method in ("MANUAL", "AUTOMATIC")
            ]
            authorizing = asyncio.gather(
                *(client.call("AuthorizePayment", request) for request in requests)
            )
            await control.await_held(2 * len(tokens))
            await eventually(
                lambda: len(system.simulator.received()) == len(requests), "all are at the PSP"
            )
            voids = [
                VoidPaymentRequest(
                    idempotency_key=new_key(), authorize_idempotency_key=request.idempotency_key
                )
                for request in requests
            ]
            answers = await asyncio.gather(*(client.call("VoidPayment", void) for void in voids))
            assert {answer.operation.state for answer in answers} == {PENDING}
            await control.release()
            await control.close()
            await authorizing
            await settled(system)
            assert not any(standing.stands for standing in system.standing())
            check(system, client)
            states = _states(system)
            assert {states[void.idempotency_key] for void in voids} == {S.SUCCEEDED}
            for void, answer in zip(voids, answers, strict=True):
                again = await client.call("VoidPayment", void)
                assert bytes_without_replay(again) == bytes_without_replay(answer)
