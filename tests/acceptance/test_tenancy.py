"""No tenant sees, changes or replays what is another's: every RPC, every credential (P8)."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import message_factory
from payments.v1 import payment_pb2, payment_service_pb2

from storage.postgres.accounts import Accounts
from tests.harness import (
    SERVICE,
    START_TIMEOUT_S,
    asyncio_run,
    authorize_request,
    call_bytes,
    eur,
    new_key,
    reason_of,
    request_types,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from google.protobuf.message import Message

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

NOT_FOUND = grpc.StatusCode.NOT_FOUND
READS = {"GetPayment", "ListPayments", "GetOperation"}
ITEMS = {"BatchAuthorizePayments", "StreamAuthorizePayments"}
METHODS = sorted(request_types())
READ, WRITE = "payments:read", "payments:write"

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED


@dataclass(frozen=True, slots=True)
class Told:
    """How a call ended."""

    code: grpc.StatusCode
    reason: str
    text: str
    """All that the caller was told, but for the id of its request."""
    answer: Any = None


@dataclass(slots=True)
class Client:
    """Calls any method with any credential."""

    channel: grpc.aio.Channel

    async def call(self, method: str, request: Message, *credential: tuple[str, str]) -> Told:
        try:
            raw = await call_bytes(self.channel, method, request.SerializeToString(), credential)
        except grpc.aio.AioRpcError as error:
            trailers = sorted(
                (name, value)
                for name, value in error.trailing_metadata() or ()
                if name != "x-request-id"
            )
            return Told(error.code(), reason_of(error), f"{error.details()} {trailers}")
        if method in ITEMS:
            [answer] = payment_service_pb2.BatchAuthorizePaymentsResponse.FromString(raw).results
            if answer.WhichOneof("result") == "error":
                return _told_of_item(answer.error)
            return Told(grpc.StatusCode.OK, "", "", answer.response)
        answer_type = message_factory.GetMessageClass(SERVICE.methods_by_name[method].output_type)
        return Told(grpc.StatusCode.OK, "", "", answer_type.FromString(raw))


def _told_of_item(error: Any) -> Told:
    code = next(each for each in grpc.StatusCode if each.value[0] == error.code)
    info = next(each for each in error.details if each.type_url.endswith("ErrorInfo"))
    reason = next(
        reason
        for reason in ("MERCHANT_NOT_FOUND", "MERCHANT_REQUIRED", "CONNECTOR_UNAVAILABLE")
        if reason.encode() in info.value
    )
    return Told(code, reason, str(error))


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


@dataclass(frozen=True, slots=True)
class Victim:
    """What a merchant has that another must not reach."""

    merchant_id: str
    payment_id: str
    operation_id: str
    capture_id: str
    idempotency_key: str
    page_token: str


@dataclass(frozen=True, slots=True)
class Tenants:
    """Two organisations, of which one has two merchants, and their keys."""

    system: System
    gateway: GatewayProcess
    organisation_id: str
    victim: Victim
    neighbour_id: str
    """Another merchant of the victim's organisation."""
    stranger_id: str
    """A merchant of another organisation."""
    victim_key: str
    neighbour_key: str
    stranger_key: str
    both_key: str
    """Of the victim and its neighbour."""
    live_key: str
    """The victim's own, in the mode LIVE."""

    def client(self) -> Any:
        return _client(self.gateway)

    def create_key(self, **fields: Any) -> str:
        """A further key of the victim's."""
        text: str = self.create_named_key(**fields).text
        return text

    def create_named_key(self, **fields: Any) -> Any:
        """A further key of the victim's, with its id."""

        async def create() -> Any:
            async with Accounts.connect(self.system.dsn) as accounts:
                values: dict[str, Any] = {
                    "scopes": (READ, WRITE),
                    "mode": "test",
                    "merchant_ids": (self.victim.merchant_id,),
                    **fields,
                }
                return await accounts.create_key(self.organisation_id, **values)

        return asyncio_run(create)


@asynccontextmanager
async def _client(gateway: GatewayProcess) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        yield Client(channel)


async def _accounts(dsn: str) -> dict[str, str]:
    async with Accounts.connect(dsn) as accounts:
        organisation_id = await accounts.create_organisation("One")
        other_organisation_id = await accounts.create_organisation("Other")
        victim_id = await accounts.create_merchant(organisation_id, "Victim")
        neighbour_id = await accounts.create_merchant(organisation_id, "Neighbour")
        stranger_id = await accounts.create_merchant(other_organisation_id, "Stranger")

        async def key(of: str, *merchant_ids: str, mode: str = "test") -> str:
            made = await accounts.create_key(
                of, scopes=(READ, WRITE), mode=mode, merchant_ids=merchant_ids
            )
            return made.text

        return {
            "organisation_id": organisation_id,
            "victim_id": victim_id,
            "neighbour_id": neighbour_id,
            "stranger_id": stranger_id,
            "victim_key": await key(organisation_id, victim_id),
            "neighbour_key": await key(organisation_id, neighbour_id),
            "stranger_key": await key(other_organisation_id, stranger_id),
            "both_key": await key(organisation_id, victim_id, neighbour_id),
            "live_key": await key(organisation_id, victim_id, mode="live"),
        }


async def _victim(gateway: GatewayProcess, merchant_id: str, key: str) -> Victim:
    """Payments of the victim: one partly captured, and enough for a second page."""
    service = payment_service_pb2
    async with _client(gateway) as client:

        async def call(method: str, request: Message) -> Any:
            told = await client.call(method, request, bearer(key))
            assert told.code is grpc.StatusCode.OK, told
            return told.answer

        request = authorize_request(merchant_order_id="order-of-the-victim")
        authorized = await call("AuthorizePayment", request)
        payment_id = authorized.payment.payment_id
        captured = await call(
            "CapturePayment",
            service.CapturePaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(400)
            ),
        )
        await call("AuthorizePayment", authorize_request())
        page = await call("ListPayments", service.ListPaymentsRequest(page_size=1))
        assert page.next_page_token
        return Victim(
            merchant_id,
            payment_id,
            authorized.operation.operation_id,
            captured.operation.operation_id,
            request.idempotency_key,
            page.next_page_token,
        )


@pytest.fixture(scope="module", params=["grpcio", "native"])
def tenants(
    request: pytest.FixtureRequest, postgres: PostgresForTests, redis: EmbeddedRedis
) -> Iterator[Tenants]:
    with running_system(postgres, redis, auth_cache_life_s=0.2, auth_negative_life_s=0.1) as system:
        gateway = system.start_gateway(transport=request.param, trusted_front=True)
        made = asyncio_run(lambda: _accounts(system.dsn))
        victim_id = made.pop("victim_id")
        victim = asyncio_run(lambda: _victim(gateway, victim_id, made["victim_key"]))
        yield Tenants(system, gateway, victim=victim, **made)


def requests_for(victim: Victim, merchant_id: str = "") -> dict[str, list[Any]]:
    """For each method the requests that aim at what the victim has; new keys, where they need some.

    Those of batches and streams have one item.
    """
    service = payment_service_pb2
    payment_id = victim.payment_id
    money: dict[str, Any] = {"merchant_id": merchant_id, "payment_id": payment_id}

    def item() -> Any:
        return service.AuthorizePaymentItem(
            item_ref="1", authorization=authorize_request(merchant_id=merchant_id)
        )

    return {
        "AuthorizePayment": [authorize_request(merchant_id=merchant_id)],
        "BatchAuthorizePayments": [service.BatchAuthorizePaymentsRequest(items=[item()])],
        "StreamAuthorizePayments": [service.StreamAuthorizePaymentsRequest(items=[item()])],
        "CapturePayment": [service.CapturePaymentRequest(idempotency_key=new_key(), **money)],
        "VoidPayment": [
            service.VoidPaymentRequest(idempotency_key=new_key(), **money),
            service.VoidPaymentRequest(
                idempotency_key=new_key(),
                merchant_id=merchant_id,
                authorize_idempotency_key=victim.idempotency_key,
            ),
        ],
        "RefundPayment": [
            service.RefundPaymentRequest(idempotency_key=new_key(), **money),
            service.RefundPaymentRequest(
                idempotency_key=new_key(), capture_operation_id=victim.capture_id, **money
            ),
        ],
        "IncrementAuthorization": [
            service.IncrementAuthorizationRequest(
                idempotency_key=new_key(), additional_amount=eur(1), **money
            )
        ],
        "GetPayment": [service.GetPaymentRequest(**money)],
        "ListPayments": [
            service.ListPaymentsRequest(merchant_id=merchant_id),
            service.ListPaymentsRequest(
                merchant_id=merchant_id, merchant_order_id="order-of-the-victim"
            ),
        ],
        "GetOperation": [
            service.GetOperationRequest(merchant_id=merchant_id, operation_id=victim.operation_id),
            service.GetOperationRequest(merchant_id=merchant_id, operation_id=victim.capture_id),
            service.GetOperationRequest(
                merchant_id=merchant_id, idempotency_key=victim.idempotency_key
            ),
        ],
    }


NOBODY = Victim(
    merchant_id=f"mer_{uuid.uuid4().hex}",
    payment_id=f"pay_{uuid.uuid4().hex}",
    operation_id=f"op_{uuid.uuid4().hex}",
    capture_id=f"op_{uuid.uuid4().hex}",
    idempotency_key=uuid.uuid4().hex,
    page_token="",
)
"""What nobody has: what is another's must look the same."""


def of_victim(tenants: Tenants) -> tuple[Any, ...]:
    """All that is stored of the victim, and what reached the PSP for it."""
    rows = [
        tenants.system.fetch(
            f"SELECT * FROM {table} WHERE merchant_id = $1 ORDER BY 1, 2, 3",
            tenants.victim.merchant_id,
        )
        for table in ("payments", "operations", "outbox", "doubts")
    ]
    sent = [
        record["reference"]
        for record in tenants.system.simulator.received()
        if record["account"] == tenants.victim.merchant_id
    ]
    return (*rows, sent)


def test_the_matrix_has_every_method_of_the_service() -> None:
    assert sorted(requests_for(NOBODY)) == METHODS


# --- another merchant -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_a_merchant_outside_of_the_keys_set_is_as_one_that_does_not_exist(
    tenants: Tenants, method: str
) -> None:
    before = of_victim(tenants)
    async with tenants.client() as client:
        for key in (tenants.stranger_key, tenants.neighbour_key):
            foreign = requests_for(tenants.victim, tenants.victim.merchant_id)[method]
            nobodys = requests_for(NOBODY, NOBODY.merchant_id)[method]
            for request, unknown in zip(foreign, nobodys, strict=True):
                told = await client.call(method, request, bearer(key))
                assert (told.code, told.reason) == (NOT_FOUND, "MERCHANT_NOT_FOUND")
                assert told == await client.call(method, unknown, bearer(key))
    assert of_victim(tenants) == before


@pytest.mark.parametrize("method", METHODS)
async def test_what_another_merchant_has_is_as_what_does_not_exist(
    tenants: Tenants, method: str
) -> None:
    before = of_victim(tenants)
    reason = "OPERATION_NOT_FOUND" if method == "GetOperation" else "PAYMENT_NOT_FOUND"
    async with tenants.client() as client:
        for key, merchant_id in itertools.product(
            (tenants.stranger_key, tenants.neighbour_key), ("", "its own")
        ):
            own_id = tenants.stranger_id if key == tenants.stranger_key else tenants.neighbour_id
            named = own_id if merchant_id else ""
            foreign = requests_for(tenants.victim, named)[method]
            nobodys = requests_for(NOBODY, named)[method]
            for request, unknown in zip(foreign, nobodys, strict=True):
                told = await client.call(method, request, bearer(key))
                if method == "ListPayments":
                    assert {each.merchant_id for each in told.answer.payments} <= {own_id}
                elif method == "AuthorizePayment" or method in ITEMS:
                    assert told.answer.payment.merchant_id == own_id
                else:
                    assert (told.code, told.reason) == (NOT_FOUND, reason)
                    assert told == await client.call(method, unknown, bearer(key))
    assert of_victim(tenants) == before


async def test_a_merchant_of_the_same_key_does_not_have_the_other_ones_payments(
    tenants: Tenants,
) -> None:
    before = of_victim(tenants)
    async with tenants.client() as client:
        for method, requests in requests_for(tenants.victim, tenants.neighbour_id).items():
            for request in requests:
                told = await client.call(method, request, bearer(tenants.both_key))
                if method == "ListPayments":
                    owners = {each.merchant_id for each in told.answer.payments}
                    assert owners <= {tenants.neighbour_id}
                elif method == "AuthorizePayment" or method in ITEMS:
                    assert told.answer.payment.merchant_id == tenants.neighbour_id
                else:
                    assert told.code is NOT_FOUND, (method, told)
    assert of_victim(tenants) == before


async def test_a_foreign_idempotency_key_is_a_new_one(tenants: Tenants) -> None:
    service = payment_service_pb2
    async with tenants.client() as client:
        for key, own_id in (
            (tenants.stranger_key, tenants.stranger_id),
            (tenants.neighbour_key, tenants.neighbour_id),
        ):
            # The very request of the victim; and a changed one, which would be refused there.
            for amount_minor, replayed in ((1000, False), (1000, True)):
                request = authorize_request(
                    amount_minor=amount_minor,
                    idempotency_key=tenants.victim.idempotency_key,
                    merchant_order_id="order-of-the-victim",
                )
                told = await client.call("AuthorizePayment", request, bearer(key))
                assert told.answer.payment.merchant_id == own_id
                assert told.answer.payment.payment_id != tenants.victim.payment_id
                assert told.answer.replay.replayed is replayed
            by_key = service.GetOperationRequest(idempotency_key=tenants.victim.idempotency_key)
            told = await client.call("GetOperation", by_key, bearer(key))
            assert told.answer.operation.merchant_id == own_id
            listed = service.ListPaymentsRequest(merchant_order_id="order-of-the-victim")
            told = await client.call("ListPayments", listed, bearer(key))
            assert [each.merchant_id for each in told.answer.payments] == [own_id]


async def test_a_foreign_capture_cannot_be_named_in_a_refund(tenants: Tenants) -> None:
    service = payment_service_pb2
    async with tenants.client() as client:
        own = await client.call(
            "AuthorizePayment",
            authorize_request(capture_method="AUTOMATIC"),
            bearer(tenants.stranger_key),
        )
        told = [
            await client.call(
                "RefundPayment",
                service.RefundPaymentRequest(
                    idempotency_key=new_key(),
                    payment_id=own.answer.payment.payment_id,
                    capture_operation_id=capture_id,
                ),
                bearer(tenants.stranger_key),
            )
            for capture_id in (tenants.victim.capture_id, NOBODY.capture_id)
        ]
    assert told[0].reason == "CAPTURE_NOT_REFUNDABLE"
    assert told[0] == told[1]


async def test_a_page_token_serves_nobody_but_its_merchant(tenants: Tenants) -> None:
    victim = tenants.victim
    request = payment_service_pb2.ListPaymentsRequest(page_size=1, page_token=victim.page_token)
    async with tenants.client() as client:
        told = await client.call("ListPayments", request, bearer(tenants.victim_key))
        assert [each.merchant_id for each in told.answer.payments] == [victim.merchant_id]
        for key in (tenants.stranger_key, tenants.neighbour_key, tenants.live_key):
            told = await client.call("ListPayments", request, bearer(key))
            assert (told.code, told.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "PAGE_TOKEN_INVALID",
            )
        request.merchant_id = tenants.neighbour_id
        told = await client.call("ListPayments", request, bearer(tenants.both_key))
        assert told.reason == "PAGE_TOKEN_INVALID"


# --- several merchants ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_with_several_merchants_a_request_has_to_name_one(
    tenants: Tenants, method: str
) -> None:
    everyones = tenants.create_key(merchant_ids=None)
    async with tenants.client() as client:
        for key in (tenants.both_key, everyones):
            for request in requests_for(tenants.victim)[method]:
                told = await client.call(method, request, bearer(key))
                assert (told.code, told.reason) == (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "MERCHANT_REQUIRED",
                )
            if method in READS:
                for request in requests_for(tenants.victim, tenants.victim.merchant_id)[method]:
                    told = await client.call(method, request, bearer(key))
                    assert told.code is grpc.StatusCode.OK


@pytest.mark.parametrize("method", sorted(ITEMS))
async def test_items_may_differ_in_merchant_and_stand_alone(tenants: Tenants, method: str) -> None:
    service = payment_service_pb2
    named = (tenants.victim.merchant_id, tenants.neighbour_id, tenants.stranger_id, "")
    items = [
        service.AuthorizePaymentItem(
            item_ref=str(n), authorization=authorize_request(merchant_id=merchant_id)
        )
        for n, merchant_id in enumerate(named)
    ]
    request = service.BatchAuthorizePaymentsRequest(items=items).SerializeToString()
    async with grpc.aio.insecure_channel(tenants.gateway.address) as channel:
        raw = await call_bytes(channel, method, request, [bearer(tenants.both_key)])
    results = service.BatchAuthorizePaymentsResponse.FromString(raw).results
    one, other, foreign, nameless = sorted(results, key=lambda result: result.item_ref)
    assert one.response.payment.merchant_id == tenants.victim.merchant_id
    assert other.response.payment.merchant_id == tenants.neighbour_id
    assert _told_of_item(foreign.error).reason == "MERCHANT_NOT_FOUND"
    assert _told_of_item(nameless.error).reason == "MERCHANT_REQUIRED"


async def test_a_key_of_all_merchants_reaches_later_ones_and_no_other_organisations(
    tenants: Tenants,
) -> None:
    everyones = tenants.create_key(merchant_ids=None)

    async def create() -> str:
        async with Accounts.connect(tenants.system.dsn) as accounts:
            return await accounts.create_merchant(tenants.organisation_id, "Later")

    later_id = asyncio_run(create)
    async with tenants.client() as client:
        request = authorize_request(merchant_id=later_id)
        told = await client.call("AuthorizePayment", request, bearer(everyones))
        assert told.answer.payment.merchant_id == later_id
        request = authorize_request(merchant_id=tenants.stranger_id)
        told = await client.call("AuthorizePayment", request, bearer(everyones))
        assert told.reason == "MERCHANT_NOT_FOUND"


# --- LIVE and TEST --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_a_live_key_does_not_reach_test_payments(tenants: Tenants, method: str) -> None:
    before = of_victim(tenants)
    async with tenants.client() as client:
        foreign = requests_for(tenants.victim)[method]
        nobodys = requests_for(NOBODY)[method]
        for request, unknown in zip(foreign, nobodys, strict=True):
            told = await client.call(method, request, bearer(tenants.live_key))
            if method == "ListPayments":
                assert list(told.answer.payments) == []
            elif method == "AuthorizePayment" or method in ITEMS:
                # No live connector is configured, and the simulator serves TEST alone.
                assert told.reason == "CONNECTOR_UNAVAILABLE"
            else:
                assert told.code is NOT_FOUND
                assert told == await client.call(method, unknown, bearer(tenants.live_key))
        # A test payment's key is not replayed to the live key either.
        request = authorize_request(
            idempotency_key=tenants.victim.idempotency_key, merchant_order_id="order-of-the-victim"
        )
        told = await client.call("AuthorizePayment", request, bearer(tenants.live_key))
        assert told.reason == "IDEMPOTENCY_KEY_REUSED"
    assert of_victim(tenants) == before


# --- scopes and credentials -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_a_method_needs_its_scope_and_names_it(tenants: Tenants, method: str) -> None:
    needed = READ if method in READS else WRITE
    others = [scope for scope in (READ, WRITE, "admin") if scope != needed]
    before = of_victim(tenants)
    async with tenants.client() as client:
        for scopes in (*((scope,) for scope in others), tuple(others)):
            key = tenants.create_key(scopes=scopes)
            for request in requests_for(tenants.victim)[method]:
                told = await client.call(method, request, bearer(key))
                assert (told.code, told.reason) == (
                    grpc.StatusCode.PERMISSION_DENIED,
                    "SCOPE_MISSING",
                )
                assert needed in told.text
        assert of_victim(tenants) == before
        told = await client.call(
            method,
            requests_for(tenants.victim)[method][0],
            bearer(tenants.create_key(scopes=(needed,))),
        )
        assert told.code is not grpc.StatusCode.PERMISSION_DENIED


def _wrong_credentials(tenants: Tenants) -> dict[str, tuple[tuple[str, str], ...]]:
    key = tenants.victim_key
    head, secret = key.rsplit("_", 1)
    _, mode, key_id, _ = key.split("_")
    other_secret = tenants.stranger_key.rsplit("_", 1)[1]
    return {
        "empty": (("authorization", ""),),
        "no scheme": (("authorization", key),),
        "another scheme": (("authorization", f"Basic {key}"),),
        "scheme alone": (("authorization", "Bearer "),),
        "cut off": (bearer(key[:-1]),),
        "longer": (bearer(key + "0"),),
        "very long": (bearer("x" * 5000),),
        "in capitals": (bearer(key.upper()),),
        "another's secret": (bearer(f"{head}_{other_secret}"),),
        "one digit": (bearer(f"{head}_{'0' if secret[0] != '0' else '1'}{secret[1:]}"),),
        "unknown id": (bearer(f"gwk_{mode}_{uuid.uuid4().hex}_{secret}"),),
        "the other mode": (bearer(f"gwk_live_{key_id}_{secret}"),),
        "no key": (bearer("' OR true --"),),
        "two keys, the first is wrong": (bearer("x"), bearer(key)),
    }


@pytest.mark.parametrize("method", METHODS)
async def test_no_method_answers_without_a_valid_key(tenants: Tenants, method: str) -> None:
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    before = of_victim(tenants)
    request = requests_for(tenants.victim)[method][0]
    async with tenants.client() as client:
        for name in (None, "x-api-key", "authorization-bin"):
            headers = () if name is None else ((name, tenants.victim_key),)
            if name is not None and name.endswith("-bin"):
                headers = ((name, tenants.victim_key.encode()),)  # type: ignore[assignment]
            told = await client.call(method, request, *headers)
            assert (told.code, told.reason) == (unauthenticated, "CREDENTIAL_MISSING")
        told_all = {
            what: await client.call(method, request, *credential)
            for what, credential in _wrong_credentials(tenants).items()
        }
    missing = told_all.pop("empty")
    assert (missing.code, missing.reason) == (unauthenticated, "CREDENTIAL_MISSING")
    for what, told in told_all.items():
        assert (told.code, told.reason) == (unauthenticated, "CREDENTIAL_INVALID"), what
    # Whoever tries keys learns nothing about what is wrong with one.
    assert len({told.text for told in told_all.values()}) == 1
    assert of_victim(tenants) == before


async def _until_refused(client: Client, key: str) -> Told:
    request = payment_service_pb2.ListPaymentsRequest()
    until = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while True:
        told = await client.call("ListPayments", request, bearer(key))
        if told.code is not grpc.StatusCode.OK:
            return told
        assert asyncio.get_running_loop().time() < until, "the key still works"


async def test_a_revoked_key_stops_working_and_others_do_not(tenants: Tenants) -> None:
    key = tenants.create_named_key()
    other = tenants.create_key()
    async with tenants.client() as client:
        request = payment_service_pb2.ListPaymentsRequest()
        assert (await client.call("ListPayments", request, bearer(key.text))).answer.payments

        async def revoke() -> bool:
            async with Accounts.connect(tenants.system.dsn) as accounts:
                return await accounts.revoke_key(key.key_id)

        assert asyncio_run(revoke)
        told = await _until_refused(client, key.text)
        assert (told.code, told.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "CREDENTIAL_INVALID",
        )
        assert (await client.call("ListPayments", request, bearer(other))).answer.payments


async def test_a_key_stops_working_when_it_expires_however_long_it_is_cached(
    tenants: Tenants,
) -> None:
    gateway = tenants.system.start_gateway(auth_cache_life_s=300)
    async with _client(gateway) as client:
        expired = tenants.create_key(expires_in_days=-1)
        told = await _until_refused(client, expired)
        assert told.reason == "CREDENTIAL_INVALID"
        expiring = tenants.create_key(expires_in_days=1 / 86400)
        told = await _until_refused(client, expiring)
        assert told.reason == "CREDENTIAL_INVALID"
    assert gateway.stop() == 0


async def test_a_long_stream_ends_when_its_key_is_revoked(tenants: Tenants) -> None:
    service = payment_service_pb2
    key = tenants.create_named_key()
    async with grpc.aio.insecure_channel(tenants.gateway.address) as channel:
        path = "/payments.v1.PaymentService/StreamAuthorizePayments"
        call: Any = channel.stream_stream(path)(metadata=[bearer(key.text)])

        def message() -> bytes:
            item = service.AuthorizePaymentItem(item_ref="1", authorization=authorize_request())
            return service.StreamAuthorizePaymentsRequest(items=[item]).SerializeToString()

        await call.write(message())
        answer = await call.read()
        [first] = service.StreamAuthorizePaymentsResponse.FromString(answer).results
        assert first.response.operation.state == SUCCEEDED

        async def revoke() -> bool:
            async with Accounts.connect(tenants.system.dsn) as accounts:
                return await accounts.revoke_key(key.key_id)

        assert asyncio_run(revoke)
        async with asyncio.timeout(START_TIMEOUT_S):
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while answer is not grpc.aio.EOF:
                    await call.write(message())
                    answer = await call.read()
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
