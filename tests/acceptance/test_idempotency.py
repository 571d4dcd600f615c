"""One key, one charge, one answer: duplicates, changed payloads, replays, repeats (P2, P3)."""

from __future__ import annotations

import asyncio
import itertools
import socket
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from payments.v1 import (
    money_pb2,
    payment_method_pb2,
    payment_pb2,
    payment_service_pb2,
)
from redis import Redis

from tests.harness import (
    CALL_TIMEOUT_S,
    authorize_request,
    bytes_without_replay,
    call_bytes,
    calling,
    eur,
    eventually,
    field_paths,
    holder_of,
    new_key,
    reason_of,
    running_system,
)
from tests.servers import fetch, free_port, redis_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, GatewayProcess, System
    from tests.servers import PostgresForTests

CALLERS = 100
WAITERS_PER_KEY_MAX = 20
"""Of a gateway: of 100 callers some wait for the first one's answer, the others are refused."""
ABORTED = CALLERS - 1 - 2 * WAITERS_PER_KEY_MAX
"""How many callers of two gateways are refused while the first one has no answer."""

KEY_REUSED = (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED")
EXECUTED = (grpc.StatusCode.OK, "")

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED
NOT_SENT = payment_pb2.OPERATION_STATE_NOT_SENT


@dataclass(frozen=True, slots=True)
class Gateways:
    """Gateways on one database: one on each transport, and one that has lost the PSP."""

    system: System
    grpcio: GatewayProcess
    native: GatewayProcess
    cut_off: GatewayProcess
    """Every connection of its to the PSP is refused, so that nothing is ever sent."""

    @property
    def pair(self) -> tuple[GatewayProcess, GatewayProcess]:
        return self.grpcio, self.native

    def sent(self, operation_id: str = "") -> list[str]:
        """The references of the requests that reached the PSP (for one operation)."""
        return [
            record["reference"]
            for record in self.system.simulator.received()
            if record["reference"].startswith(operation_id)
        ]


@pytest.fixture(
    scope="module",
    params=list(itertools.product(("idempotent", "non_idempotent"), ("redis", "redis_away"))),
    ids="-".join,
)
def gateways(
    request: pytest.FixtureRequest, postgres: PostgresForTests, redis: EmbeddedRedis
) -> Iterator[Gateways]:
    profile, claims = request.param
    with ExitStack() as stack:
        refusing = stack.enter_context(socket.socket())
        refusing.bind(("127.0.0.1", 0))  # taken, and never listened on
        nowhere = f"127.0.0.1:{refusing.getsockname()[1]}"
        settings: dict[str, Any] = {
            "waiters_per_key_max": WAITERS_PER_KEY_MAX,
            # A held answer is late, not missing.
            "simulator_answer_timeout_s": CALL_TIMEOUT_S,
        }
        if claims == "redis_away":
            settings["redis_url"] = f"redis://{nowhere}/0"
        system = stack.enter_context(running_system(postgres, redis, profile=profile, **settings))
        yield Gateways(
            system,
            system.start_gateway(),
            system.start_gateway(transport="native", trusted_front=True),
            system.start_gateway(simulator_url=f"http://{nowhere}", recovery_enabled=False),
        )


@asynccontextmanager
async def callers(gateways: Gateways) -> AsyncIterator[tuple[Caller, Caller]]:
    """A caller of each of the two gateways."""
    key = gateways.system.shop.api_key
    async with calling(gateways.grpcio, key) as one, calling(gateways.native, key) as other:
        yield one, other


@asynccontextmanager
async def held(system: System, kind: str) -> AsyncIterator[None]:
    """Requests of a kind are done, and not answered until the end."""
    control = system.control
    try:
        await control.hold("before_answer", kind=kind)
        yield
    finally:
        await control.release()
        await control.close()


async def told(caller: Caller, method: str, request: Any, request_id: str) -> Any:
    """The answer to a call with a request id of its own."""
    metadata = (*caller.metadata, ("x-request-id", request_id))
    return await getattr(caller.stub, method)(request, metadata=metadata, timeout=CALL_TIMEOUT_S)


async def verdict_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """A call's status and reason."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), reason_of(error)
    return EXECUTED


def retry_info_of(error: grpc.aio.AioRpcError) -> float:
    """The pause that an error advises, in seconds."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            seconds: float = info.retry_delay.ToTimedelta().total_seconds()
            return seconds
    raise AssertionError(f"no RetryInfo: {error}")


# --- duplicates -----------------------------------------------------------------------------------


async def race(gateways: Gateways, method: str, kind: str, request: Any) -> Any:
    """100 calls at once over two gateways, of which one asks the PSP; the answer of all.

    The PSP keeps its answer until every caller that finds no room to wait was refused, so that the
    others are all in flight together.
    """
    async with callers(gateways) as both:
        async with held(gateways.system, kind):
            calls = {
                asyncio.create_task(told(both[n % 2], method, request, f"race-{n}")): f"race-{n}"
                for n in range(CALLERS)
            }
            refused: set[asyncio.Task[Any]] = set()
            waiting = set(calls)
            while len(refused) < ABORTED:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                refused |= done
        answers = {calls[call]: await call for call in waiting}
        for call in refused:
            error = call.exception()
            assert isinstance(error, grpc.aio.AioRpcError), call.result()
            assert error.code() is grpc.StatusCode.ABORTED
            assert reason_of(error) == "IDEMPOTENCY_KEY_IN_FLIGHT"
            assert retry_info_of(error) > 0
        for call in refused:
            answers[calls[call]] = await told(both[0], method, request, "again")

    assert len(answers) == CALLERS
    [(first_id, first)] = [
        (request_id, answer)
        for request_id, answer in answers.items()
        if not answer.HasField("replay")
    ]
    for answer in answers.values():
        assert bytes_without_replay(answer) == bytes_without_replay(first)
        if answer is not first:
            assert answer.replay.replayed
            assert answer.replay.first_request_id == first_id
    return first


async def test_a_hundred_concurrent_duplicates_cause_one_request_at_the_psp(
    gateways: Gateways,
) -> None:
    authorized = await race(gateways, "AuthorizePayment", "authorize", authorize_request())
    assert authorized.operation.state == SUCCEEDED
    payment_id = authorized.payment.payment_id
    captured = await race(
        gateways,
        "CapturePayment",
        "capture",
        payment_service_pb2.CapturePaymentRequest(idempotency_key=new_key(), payment_id=payment_id),
    )
    assert captured.payment.amounts.captured_minor == 1000
    refunded = await race(
        gateways,
        "RefundPayment",
        "refund",
        payment_service_pb2.RefundPaymentRequest(
            idempotency_key=new_key(), payment_id=payment_id, amount=eur(600)
        ),
    )
    assert refunded.payment.amounts.refunded_minor == 600

    for answer in (authorized, captured, refunded):
        operation_id = answer.operation.operation_id
        assert gateways.sent(operation_id) == [f"{operation_id}-1"]
    [standing] = [each for each in gateways.system.standing() if each.payment_id == payment_id]
    assert (standing.authorized_minor, standing.captured_minor, standing.refunded_minor) == (
        1000,
        1000,
        600,
    )
    sends = [r for r in gateways.system.simulator.received() if r["payment_id"] == payment_id]
    assert len(sends) == 3


async def test_a_hundred_repeats_of_what_was_not_sent_cause_one_request_at_the_psp(
    gateways: Gateways,
) -> None:
    request = authorize_request()
    async with calling(gateways.cut_off, gateways.system.shop.api_key) as cut_off:
        first = await cut_off.call("AuthorizePayment", request)
    assert first.operation.state == NOT_SENT
    # Ahead of every gateway's clock, so that all repeats decide on the same times as well.
    fetch(
        gateways.system.dsn,
        "UPDATE payments SET updated_at = now() + interval '1 hour' WHERE payment_id = $1"
        " RETURNING 1",
        first.payment.payment_id,
    )
    answer = await race(gateways, "AuthorizePayment", "authorize", request)
    assert answer.operation.state == SUCCEEDED
    assert answer.operation.epoch == 2
    operation_id = answer.operation.operation_id
    assert gateways.sent(operation_id) == [f"{operation_id}-2"]


# --- what is not frozen ---------------------------------------------------------------------------


async def test_what_was_not_sent_executes_when_it_is_repeated(gateways: Gateways) -> None:
    service = payment_service_pb2
    async with (
        callers(gateways) as both,
        calling(gateways.cut_off, gateways.system.shop.api_key) as cut_off,
    ):

        async def not_sent_then_sent(method: str, request: Any) -> Any:
            answers = [await cut_off.call(method, request) for _ in range(2)]
            for epoch, answer in enumerate(answers, 1):
                assert answer.operation.state == NOT_SENT
                assert answer.operation.reason == "CONNECT_FAILED"
                assert answer.operation.epoch == epoch
                assert not answer.HasField("replay")
            operation_id = answers[0].operation.operation_id
            assert gateways.sent(operation_id) == []

            executed = await both[0].call(method, request)
            assert executed.operation.state == SUCCEEDED
            assert executed.operation.operation_id == operation_id
            assert executed.operation.epoch == 3
            assert executed.operation.attempts[-1].number == 3
            assert not executed.HasField("replay")
            again = await both[1].call(method, request)
            assert bytes_without_replay(again) == bytes_without_replay(executed)
            assert again.replay.replayed
            assert gateways.sent(operation_id) == [f"{operation_id}-3"]
            return executed

        authorized = await not_sent_then_sent("AuthorizePayment", authorize_request())
        await not_sent_then_sent(
            "AuthorizePayment", authorize_request(amount_minor=0, capture_method="MANUAL")
        )
        await not_sent_then_sent("AuthorizePayment", authorize_request(capture_method="AUTOMATIC"))
        payment_id = authorized.payment.payment_id
        incremented = await not_sent_then_sent(
            "IncrementAuthorization",
            service.IncrementAuthorizationRequest(
                idempotency_key=new_key(), payment_id=payment_id, additional_amount=eur(500)
            ),
        )
        assert incremented.payment.amounts.authorized_minor == 1500
        captured = await not_sent_then_sent(
            "CapturePayment",
            service.CapturePaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(800)
            ),
        )
        assert captured.payment.amounts.captured_minor == 800
        refunded = await not_sent_then_sent(
            "RefundPayment",
            service.RefundPaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(300)
            ),
        )
        assert refunded.payment.amounts.refunded_minor == 300
        voided = await not_sent_then_sent(
            "VoidPayment",
            service.VoidPaymentRequest(idempotency_key=new_key(), payment_id=payment_id),
        )
        assert voided.payment.amounts.voided_minor == 700


@pytest.mark.parametrize("method", ["BatchAuthorizePayments", "StreamAuthorizePayments"])
async def test_items_that_were_not_sent_execute_when_they_are_repeated(
    gateways: Gateways, method: str
) -> None:
    requests = [authorize_request(amount_minor=amount) for amount in range(100, 110)]
    async with calling(gateways.grpcio, gateways.system.shop.api_key) as caller:
        first = await authorize_items(gateways.cut_off, caller, method, requests)
        assert {each.response.operation.state for each in first} == {NOT_SENT}
        second = await authorize_items(gateways.native, caller, method, requests)
    assert {each.response.operation.state for each in second} == {SUCCEEDED}
    assert {each.response.operation.epoch for each in second} == {2}
    for each in second:
        operation_id = each.response.operation.operation_id
        assert gateways.sent(operation_id) == [f"{operation_id}-2"]


async def test_a_changed_payload_never_executes_after_what_was_not_sent(
    gateways: Gateways,
) -> None:
    request = full_request(new_key())
    async with calling(gateways.cut_off, gateways.system.shop.api_key) as cut_off:
        first = await cut_off.call("AuthorizePayment", request)
        assert first.operation.state == NOT_SENT
    await refuse_all(gateways, "AuthorizePayment", list(changes(request)))


async def test_a_refusal_before_the_intent_does_not_burn_the_key(gateways: Gateways) -> None:
    service = payment_service_pb2
    async with callers(gateways) as both:
        authorization: dict[str, dict[str, Any]] = {
            "INVALID_REQUEST": {"statement_descriptor": "x" * 23},
            "CARD_DATA_NOT_ALLOWED": {"customer_id": "4111 1111 1111 1111"},
            "FIELD_NOT_SUPPORTED": {"three_ds": payment_method_pb2.ThreeDs(eci="05")},
            "MERCHANT_NOT_FOUND": {"merchant_id": "mer_none"},
        }
        payment_id = ""
        for reason, wrong in authorization.items():
            for one, other in (both, both[::-1]):
                key = new_key()
                refused = await verdict_of(one.authorize(idempotency_key=key, **wrong))
                assert refused[1] == reason
                executed = await other.authorize(idempotency_key=key)
                assert executed.operation.state == SUCCEEDED
                assert executed.operation.epoch == 1
                assert not executed.HasField("replay")
                payment_id = executed.payment.payment_id

        capture: dict[str, dict[str, Any]] = {
            "PAYMENT_NOT_FOUND": {"payment_id": "pay_none"},
            "CURRENCY_MISMATCH": {"amount": money_pb2.Money(amount_minor=1, currency_code="USD")},
            "AMOUNT_EXCEEDS_AUTHORIZED": {"amount": eur(1001)},
        }
        for reason, wrong in capture.items():
            key = new_key()
            right: dict[str, Any] = {"payment_id": payment_id, "amount": eur(10)}
            request = service.CapturePaymentRequest(idempotency_key=key, **(right | wrong))
            assert (await verdict_of(both[0].call("CapturePayment", request)))[1] == reason
            request = service.CapturePaymentRequest(idempotency_key=key, **right)
            executed = await both[1].call("CapturePayment", request)
            assert executed.operation.state == SUCCEEDED
            assert not executed.HasField("replay")


# --- changed payloads -----------------------------------------------------------------------------

OTHER_VALUES: dict[str, object] = {
    "amount.currency_code": "USD",
    "additional_amount.currency_code": "USD",
    "payment_method.token": "tok_mastercard",
    "payment_method.card_hints.bin": "411111",
    "payment_method.card_hints.issuer_country": "FR",
    "three_ds.eci": "05",
    "three_ds.version": "2.2.0",
    "billing_address.country_code": "FR",
    "return_url": "https://shop.example/back",
    "payment_method.network_token.cryptogram": "A" * 28,
    "payment_method.network_token.number": "4895370000000000003",
    "payment_method.network_token.expiry_year": 2030,
    "payment_method.network_token.eci": "05",
    "payment_method.stored.method_type": "sepa_debit",
    "payment_method.redirect.method_type": "ideal",
    "payment_method.redirect.country_code": "NL",
    "payment_method.redirect.customer_email": "ada@shop.example",
}
"""A value for each field that takes only some."""

TOKEN_REFERENCE = {"payment_method.network_token.token_reference": "dnt"}
REDIRECT = {
    "payment_method.redirect.method_type": "ideal",
    "return_url": "https://shop.example/back",
}
COMPANIONS: dict[str, dict[str, object]] = {
    **{
        f"payment_method.network_token.{name}": {**TOKEN_REFERENCE}
        for name in ("cryptogram", "expiry_month", "expiry_year", "eci", "wallet")
    },
    "payment_method.network_token.number": {
        "payment_method.network_token.cryptogram": "A" * 28,
        "payment_method.network_token.expiry_month": 12,
        "payment_method.network_token.expiry_year": 2030,
    },
    **{
        f"payment_method.redirect.{name}": {**REDIRECT}
        for name in ("method_type", "country_code", "bank", "customer_name", "customer_email")
    },
    "payment_method.stored.method_type": {"payment_method.stored.stored_payment_method_id": "pm_1"},
}
"""What has to be there beside a field."""

NOT_PAYLOAD = {"merchant_id", "idempotency_key"}

NEVER_EMPTY = {
    *("amount", "amount.amount_minor", "amount.currency_code", "capture_method"),
    *("payment_method", "payment_method.token", "stored_credential.usage"),
    *("payment_id", "authorize_idempotency_key", "additional_amount"),
    *("additional_amount.amount_minor", "additional_amount.currency_code"),
}
"""Fields that a valid request has."""

DEFAULTS = {"initiator"}
"""Fields of `full_request` with the value that the contract takes an empty one as."""


def full_request(idempotency_key: str) -> payment_service_pb2.AuthorizePaymentRequest:
    """A request with every field that the simulator can use."""
    return authorize_request(
        idempotency_key=idempotency_key,
        customer_id="customer",
        profile_id="profile",
        merchant_transaction_id="transaction",
        merchant_order_id="order",
        channel=payment_method_pb2.CHANNEL_MAIL_ORDER,
        initiator=payment_method_pb2.INITIATOR_CUSTOMER,
        stored_credential=payment_method_pb2.StoredCredential(
            usage=payment_method_pb2.STORED_CREDENTIAL_USAGE_SUBSEQUENT,
            mit_category=payment_method_pb2.MIT_CATEGORY_RECURRING,
            network_transaction_id="network",
        ),
        billing_address=payment_method_pb2.Address(
            name="Ada",
            line1="1 Lane",
            line2="Back",
            city="Town",
            region="Region",
            postal_code="12345",
            country_code="DE",
        ),
        statement_descriptor="SHOP",
        statement_descriptor_suffix="1",
        amount_details=money_pb2.AmountDetails(
            tip_minor=1, surcharge_minor=2, tax_minor=3, shipping_minor=4
        ),
        allow_partial_approval=True,
        metadata={"colour": "red", "size": "big"},
    )


def other_value(path: str, field: Any, value: Any) -> object:
    """A valid value that is not the present one."""
    if path in OTHER_VALUES:
        return OTHER_VALUES[path]
    if field.enum_type is not None:
        return next(each.number for each in field.enum_type.values if each.number not in (0, value))
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value + "x"


def changed_maps(entries: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """A map with one entry changed, renamed, added and left out."""
    name, value = next(iter(entries.items()))
    rest = {key: entries[key] for key in entries if key != name}
    yield "value", {**rest, name: value + "x"}
    yield "key", {**rest, name + "x": value}
    yield "added", {**entries, "more": value}
    yield "left out", rest


def changes(request: Any) -> Iterator[tuple[str, Any]]:
    """The request with each field changed in turn, and with each left out that may be."""

    def copy() -> Any:
        changed = type(request)()
        changed.CopyFrom(request)
        return changed

    for path, field in field_paths(request):
        if path in NOT_PAYLOAD:
            continue
        holder, name = holder_of(request, path)
        value = getattr(holder, name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for what, entries in changed_maps(dict(value)):
                changed = copy()
                changed_map = getattr(changed, name)
                changed_map.clear()
                changed_map.update(entries)
                yield f"{path} {what}", changed
        elif field.message_type is None:
            changed = copy()
            target, _ = holder_of(changed, path)
            setattr(target, name, other_value(path, field, value))
            for companion, with_value in COMPANIONS.get(path, {}).items():
                target, companion_name = holder_of(changed, companion)
                setattr(target, companion_name, with_value)
            yield path, changed
        is_set = holder.HasField(name) if field.has_presence else bool(value)
        if is_set and path not in NEVER_EMPTY | DEFAULTS:
            changed = copy()
            target, _ = holder_of(changed, path)
            target.ClearField(name)
            yield f"{path} left out", changed


async def refuse_all(gateways: Gateways, method: str, changed: Sequence[tuple[str, Any]]) -> None:
    """Every changed request is refused by both gateways, and nothing comes of it."""
    sent = len(gateways.sent())
    operations = "SELECT count(*) FROM operations"
    stored = gateways.system.fetch(operations)
    async with callers(gateways) as both:
        for caller in both:
            verdicts = await asyncio.gather(
                *(verdict_of(caller.call(method, request)) for _, request in changed)
            )
            others = [
                (path, verdict)
                for (path, _), verdict in zip(changed, verdicts, strict=True)
                if verdict != KEY_REUSED
            ]
            assert others == []
    assert len(gateways.sent()) == sent
    assert gateways.system.fetch(operations) == stored


async def test_a_change_of_any_field_under_the_same_key_never_executes(gateways: Gateways) -> None:
    request = full_request(new_key())
    changed = list(changes(request))
    async with callers(gateways) as (caller, _):
        first = await caller.call("AuthorizePayment", request)
        assert first.operation.state == SUCCEEDED
        await refuse_all(gateways, "AuthorizePayment", changed)

        # The same through a batch and a stream, whose items are all refused for themselves.
        sent = len(gateways.sent())
        for method in ("BatchAuthorizePayments", "StreamAuthorizePayments"):
            results = await authorize_items(
                gateways.native, caller, method, [item for _, item in changed]
            )
            assert len(results) == len(changed)
            assert {each.error.code for each in results} == {
                grpc.StatusCode.ALREADY_EXISTS.value[0]
            }
        assert len(gateways.sent()) == sent
        again = await caller.call("AuthorizePayment", request)
        assert bytes_without_replay(again) == bytes_without_replay(first)


async def test_the_walk_over_the_fields_changes_every_one_of_them() -> None:
    request = full_request(new_key())
    changed = {path.split(" ")[0] for path, _ in changes(request)}
    scalars = {path for path, field in field_paths(request) if field.message_type is None}
    assert changed >= scalars - NOT_PAYLOAD
    assert "metadata" in changed
    for path, other in changes(request):
        assert other != request, path


async def test_a_change_of_any_field_of_a_follow_up_never_executes(gateways: Gateways) -> None:
    async with callers(gateways) as (caller, _):
        payment_id = (await caller.authorize()).payment.payment_id
        other_id = (await caller.authorize()).payment.payment_id
        transaction = "transaction"
        service = payment_service_pb2

        increment = service.IncrementAuthorizationRequest(
            idempotency_key=new_key(),
            payment_id=payment_id,
            additional_amount=eur(500),
            merchant_transaction_id=transaction,
        )
        await caller.call("IncrementAuthorization", increment)
        capture = service.CapturePaymentRequest(
            idempotency_key=new_key(),
            payment_id=payment_id,
            amount=eur(800),
            merchant_transaction_id=transaction,
        )
        captured = await caller.call("CapturePayment", capture)
        refund = service.RefundPaymentRequest(
            idempotency_key=new_key(),
            payment_id=payment_id,
            amount=eur(300),
            capture_operation_id=captured.operation.operation_id,
            reason=service.REFUND_REASON_DUPLICATE,
            merchant_transaction_id=transaction,
        )
        await caller.call("RefundPayment", refund)
        void = service.VoidPaymentRequest(
            idempotency_key=new_key(),
            payment_id=payment_id,
            reason="changed their mind",
            merchant_transaction_id=transaction,
        )
        voided = await caller.call("VoidPayment", void)
        assert voided.payment.amounts.voided_minor == 700

    requests: dict[str, Any] = {
        "IncrementAuthorization": increment,
        "CapturePayment": capture,
        "RefundPayment": refund,
        "VoidPayment": void,
    }
    for method, request in requests.items():
        of_another = type(request)()
        of_another.CopyFrom(request)
        of_another.payment_id = other_id
        changed = [*changes(request), ("another payment", of_another)]
        if request.DESCRIPTOR.fields_by_name.get("amount"):
            everything = type(request)()
            everything.CopyFrom(request)
            everything.ClearField("amount")
            changed.append(("all that is left", everything))
        await refuse_all(gateways, method, changed)

        # A key belongs to a method, too.
        for other_method, other in requests.items():
            if other_method != method:
                borrowed = type(other)()
                borrowed.CopyFrom(other)
                borrowed.idempotency_key = request.idempotency_key
                await refuse_all(gateways, other_method, [(f"key of {method}", borrowed)])
        await refuse_all(
            gateways,
            "AuthorizePayment",
            [(method, authorize_request(idempotency_key=request.idempotency_key))],
        )


async def test_a_changed_payload_is_refused_while_the_first_one_is_in_flight(
    gateways: Gateways,
) -> None:
    key = new_key()
    async with callers(gateways) as (one, other):
        async with held(gateways.system, "authorize"):
            first = asyncio.ensure_future(one.authorize(idempotency_key=key))
            control = gateways.system.control
            await control.await_held()
            await control.close()
            for caller in (one, other):
                changed = caller.authorize(idempotency_key=key, amount_minor=999)
                assert await verdict_of(changed) == KEY_REUSED
        answer = await first
    assert gateways.sent(answer.operation.operation_id) == [f"{answer.operation.operation_id}-1"]


async def test_the_same_payload_in_another_writing_is_the_same_call(gateways: Gateways) -> None:
    request = full_request(new_key())
    request.ClearField("initiator")
    request.channel = payment_method_pb2.CHANNEL_ECOMMERCE

    def written(**fields: Any) -> bytes:
        other = type(request)()
        other.CopyFrom(request)
        for name, value in fields.items():
            setattr(other, name, value)
        return other.SerializeToString()

    without_metadata = type(request)()
    without_metadata.CopyFrom(request)
    without_metadata.ClearField("metadata")
    maps = [type(request)(metadata={name: request.metadata[name]}) for name in request.metadata]
    same = {
        "as it was": written(),
        "with its merchant": written(merchant_id=gateways.system.shop.merchant_id),
        "with the default initiator": written(initiator=payment_method_pb2.INITIATOR_CUSTOMER),
        "without the default channel": written(channel=0),
        "with a field of a later contract": written() + b"\xf2\x3f\x05later",
        "with the map in another order": b"".join(
            part.SerializeToString() for part in (*reversed(maps), without_metadata)
        ),
        "with the map in one order": b"".join(
            part.SerializeToString() for part in (*maps, without_metadata)
        ),
    }
    async with callers(gateways) as (caller, _):
        first = await caller.call("AuthorizePayment", request)
        for gateway in gateways.pair:
            async with grpc.aio.insecure_channel(gateway.address) as channel:
                for what, data in same.items():
                    raw = await call_bytes(channel, "AuthorizePayment", data, caller.metadata)
                    answer = payment_service_pb2.AuthorizePaymentResponse.FromString(raw)
                    assert answer.replay.replayed, what
                    assert bytes_without_replay(answer) == bytes_without_replay(first), what
    operation_id = first.operation.operation_id
    assert gateways.sent(operation_id) == [f"{operation_id}-1"]


# --- replays --------------------------------------------------------------------------------------

UNARY, BATCH, STREAM = "AuthorizePayment", "BatchAuthorizePayments", "StreamAuthorizePayments"


async def authorize_items(
    gateway: GatewayProcess, caller: Caller, method: str, requests: Sequence[Any]
) -> Sequence[Any]:
    """The results of a batch or stream, in the order of the requests."""
    items = [
        payment_service_pb2.AuthorizePaymentItem(item_ref=str(n), authorization=request)
        for n, request in enumerate(requests)
    ]
    request = payment_service_pb2.BatchAuthorizePaymentsRequest(items=items)
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        # Both requests and both responses are alike, but for how many items one may have.
        raw = await call_bytes(channel, method, request.SerializeToString(), caller.metadata)
    results = payment_service_pb2.BatchAuthorizePaymentsResponse.FromString(raw).results
    return sorted(results, key=lambda result: int(result.item_ref))


async def authorize_by(
    gateway: GatewayProcess, api_key: str, method: str, request: Any, request_id: str
) -> tuple[bytes, payment_service_pb2.AuthorizePaymentResponse]:
    """All bytes that come back through one of the three methods, and the authorization's answer."""
    metadata = (("authorization", f"Bearer {api_key}"), ("x-request-id", request_id))
    data = request
    if method != UNARY:
        item = payment_service_pb2.AuthorizePaymentItem(item_ref="1", authorization=request)
        data = payment_service_pb2.BatchAuthorizePaymentsRequest(items=[item])
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        raw = await call_bytes(channel, method, data.SerializeToString(), metadata)
    if method == UNARY:
        return raw, payment_service_pb2.AuthorizePaymentResponse.FromString(raw)
    [result] = payment_service_pb2.BatchAuthorizePaymentsResponse.FromString(raw).results
    return raw, result.response


def frozen_answer(system: System, idempotency_key: str) -> bytes:
    """The answer that PostgreSQL keeps for a key."""
    [row] = system.fetch(
        "SELECT response FROM operations WHERE merchant_id = $1 AND idempotency_key = $2",
        system.shop.merchant_id,
        idempotency_key,
    )
    response: bytes = row["response"]
    return response


OUTCOMES: dict[str, tuple[dict[str, Any], int]] = {
    "approved": ({}, SUCCEEDED),
    "captured at once": ({"capture_method": "AUTOMATIC"}, SUCCEEDED),
    "verified": ({"amount_minor": 0, "capture_method": "MANUAL"}, SUCCEEDED),
    "declined": ({"token": "tok_advice_retry_after_24h"}, payment_pb2.OPERATION_STATE_DECLINED),
    "pending": ({"token": "tok_pending"}, payment_pb2.OPERATION_STATE_PENDING),
    "to be acted on": (
        {"token": "tok_requires_action"},
        payment_pb2.OPERATION_STATE_REQUIRES_ACTION,
    ),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_a_replay_is_byte_for_byte_the_first_answer_whichever_way_either_went(
    gateways: Gateways, outcome: str
) -> None:
    fields, state = OUTCOMES[outcome]
    system = gateways.system
    ways = list(itertools.product(gateways.pair, (UNARY, BATCH, STREAM)))
    for number, (gateway, method) in enumerate(ways):
        request = authorize_request(**fields)
        key = request.idempotency_key
        raw, first = await authorize_by(
            gateway, system.shop.api_key, method, request, f"first-{number}"
        )
        assert first.operation.state == state
        assert not first.HasField("replay")
        frozen = frozen_answer(system, key)
        assert frozen in raw
        assert payment_service_pb2.AuthorizePaymentResponse.FromString(frozen) == first

        if method == UNARY and state == payment_pb2.OPERATION_STATE_PENDING:
            # The present is another by now; the answer stays.
            async with calling(gateway, system.shop.api_key) as caller:
                while (await caller.operation(idempotency_key=key)).operation.state == state:
                    pass
        for other_gateway, other_method in ways:
            raw, again = await authorize_by(
                other_gateway, system.shop.api_key, other_method, request, "again"
            )
            assert frozen in raw
            assert again.replay.replayed
            assert again.replay.first_request_id == f"first-{number}"
            replay = payment_service_pb2.AuthorizePaymentResponse(replay=again.replay)
            if other_method == UNARY:
                assert raw == frozen + replay.SerializeToString()
            else:
                assert frozen + replay.SerializeToString() in raw
        operation_id = first.operation.operation_id
        assert gateways.sent(operation_id) == [f"{operation_id}-1"]


async def test_follow_ups_are_replayed_byte_for_byte_on_both_transports(
    gateways: Gateways,
) -> None:
    service = payment_service_pb2
    for name in ("capture", "refund"):
        async with callers(gateways) as both:
            # Declined at the first of them, which is as final as a success.
            for token in ("tok_visa", f"tok_{name}_declined", f"tok_{name}_pending"):
                payment_id = (await both[0].authorize(token=token)).payment.payment_id
                method = "CapturePayment"
                request: Any = service.CapturePaymentRequest(
                    idempotency_key=new_key(), payment_id=payment_id, amount=eur(700)
                )
                first = await told(both[1], method, request, "first")
                if name == "refund":
                    method = "RefundPayment"
                    request = service.RefundPaymentRequest(
                        idempotency_key=new_key(), payment_id=payment_id, amount=eur(100)
                    )
                    first = await told(both[0], method, request, "first")
                # Later operations change the payment, and not the answer.
                await both[0].void(payment_id) if token == "tok_visa" else None
                for caller in both:
                    again = await told(caller, method, request, "again")
                    assert again.replay.first_request_id == "first"
                    assert bytes_without_replay(again) == bytes_without_replay(first)
                assert len(gateways.sent(first.operation.operation_id)) == 1


async def test_replays_come_from_redis_and_after_a_flush_from_postgresql(
    postgres: PostgresForTests,
) -> None:
    port = free_port()
    with redis_server() as redis, running_system(postgres, redis) as system:
        gateway = system.start_gateway(metrics_address=f"127.0.0.1:{port}")
        client = Redis.from_url(redis.url)

        async def replays(source: str) -> float:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{port}/metrics") as answer,
            ):
                text = await answer.text()
            name = f'gateway_replays_total{{source="{source}"}} '
            values = [line[len(name) :] for line in text.splitlines() if line.startswith(name)]
            return float(values[0]) if values else 0.0

        async with calling(gateway, system.shop.api_key) as caller:
            for token in ("tok_visa", "tok_declined_do_not_honor", "tok_requires_action"):
                request = authorize_request(token=token)
                first = await told(caller, "AuthorizePayment", request, "first")

                async def repeat(request: Any = request, first: Any = first) -> None:
                    again = await told(caller, "AuthorizePayment", request, "again")
                    assert again.replay.first_request_id == "first"
                    assert bytes_without_replay(again) == bytes_without_replay(first)

                operation_id = first.operation.operation_id.encode()

                def is_cached(operation_id: bytes = operation_id) -> bool:
                    entries = (client.get(key) for key in client.scan_iter(match="*:idem:*"))
                    return any(operation_id in entry for entry in entries if entry is not None)

                # The entry is written off the way of the answer.
                await eventually(is_cached, "the answer is cached")
                from_redis, from_postgres = await replays("redis"), await replays("postgres")
                await repeat()
                assert await replays("redis") == from_redis + 1
                client.flushall()
                await repeat()
                assert await replays("postgres") == from_postgres + 1
                # What PostgreSQL said is cached anew.
                await eventually(is_cached, "the answer is cached again")
                await repeat()
                assert await replays("redis") == from_redis + 2
                changed = caller.authorize(
                    token=token, idempotency_key=request.idempotency_key, amount_minor=1
                )
                assert await verdict_of(changed) == KEY_REUSED
                client.flushall()
                changed = caller.authorize(
                    token=token, idempotency_key=request.idempotency_key, amount_minor=1
                )
                assert await verdict_of(changed) == KEY_REUSED
                client.flushall()
        client.close()
        assert len(system.simulator.received()) == 3


async def test_not_found_by_a_key_is_no_outcome_of_a_call_that_is_on_its_way(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'payments'::regclass"
    with running_system(postgres, redis) as system:
        gateway = await system.start_gateway().serving()
        async with calling(gateway, system.shop.api_key) as caller:
            holder = await asyncpg.connect(system.dsn)
            try:
                async with holder.transaction():
                    await holder.execute("LOCK TABLE payments IN SHARE ROW EXCLUSIVE MODE")
                    first = asyncio.create_task(caller.authorize(idempotency_key="late"))
                    await eventually(lambda: fetch(system.dsn, waiting), "the intent waits")
                    void = payment_service_pb2.VoidPaymentRequest(
                        idempotency_key=new_key(), authorize_idempotency_key="late"
                    )
                    for call in (
                        caller.operation(idempotency_key="late"),
                        caller.call("VoidPayment", void),
                    ):
                        with pytest.raises(grpc.aio.AioRpcError) as refused:
                            await call
                        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
                        assert "with this key yet" in (refused.value.details() or "")
            finally:
                await holder.close()
            answer = await first
            assert answer.operation.state == SUCCEEDED
            again = await caller.authorize(idempotency_key="late")
            assert again.operation == answer.operation
