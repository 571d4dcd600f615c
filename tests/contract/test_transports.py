"""Both transports answer alike: what callers may count on, and where they differ by design.

The use cases are a small double here: the subject is what stands around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode, aio
from grpc_health.v1.health_pb2 import (  # type: ignore[import-untyped]
    HealthCheckRequest,
    HealthCheckResponse,
)
from grpc_reflection.v1alpha.reflection_pb2 import (  # type: ignore[import-untyped]
    ServerReflectionRequest,
    ServerReflectionResponse,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payments.v1 import payment_pb2
from payments.v1 import payment_service_pb2 as pb
from payments.v1.payment_service_pb2_grpc import PaymentServiceStub

from gateway.application.accounts import KeyRecord, MerchantInfo, new_key
from gateway.application.commands import Answer, Authorize, Capture, Increment, Refund, Void
from gateway.application.ports import Found, ListFilter, Page
from gateway.domain.errors import GatewayError, Reason, Violation
from gateway.domain.ids import is_request_id, new_operation_id, new_payment_id
from gateway.domain.model import (
    Aggregate,
    Attempt,
    CaptureMethod,
    Mode,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Payment,
    PaymentState,
)
from gateway.rpc.auth import Authenticator, AuthLimits
from gateway.rpc.conversion import ContractEncoder
from gateway.rpc.error_map import INTERNAL_MESSAGE, PUSHBACK_TRAILER
from gateway.rpc.server import GrpcServer, ServerConfigError, ServerOptions
from gateway.rpc.service import PaymentService, RpcLimits

if TYPE_CHECKING:
    from payments.v1.payment_service_pb2_grpc import PaymentServiceAsyncStub

Transport = Literal["grpcio", "native"]
TRANSPORTS: tuple[Transport, ...] = ("grpcio", "native")
MERCHANT, OTHER_MERCHANT = "mer_one", "mer_two"
PATIENCE_S = 60.0
"""How long a test waits for what must happen: a failure, never a measurement."""
CARD_NUMBER = "4242424242424242"
CREATED_AT = datetime(2026, 11, 1, 12, tzinfo=UTC)


# --- the double -----------------------------------------------------------------------------------


@dataclass
class FakePayments:
    """Use cases in memory: one operation for each key, approved at once unless `before` waits."""

    operations: dict[tuple[str, str], Found] = field(default_factory=dict)
    before: Callable[[Authorize], Awaitable[None]] | None = None
    """Runs after the operation is stored as PROCESSING; may wait or raise."""
    commands: list[Authorize] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    payments: list[Payment] = field(default_factory=list)
    filters: list[ListFilter] = field(default_factory=list)
    running: set[asyncio.Task[Answer]] = field(default_factory=set)

    async def authorize(self, command: Authorize) -> Answer:
        self.commands.append(command)
        found = self.operations.get((command.merchant_id, command.idempotency_key))
        if found is not None:
            operation = found.operation
            if operation.fingerprint != command.fingerprint:
                raise GatewayError(Reason.IDEMPOTENCY_KEY_REUSED, "another payload")
            assert operation.response is not None
            return Answer(operation.response, True, operation.request_id, operation.payment_id)
        task = asyncio.create_task(self._run(command))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return await asyncio.shield(task)

    async def _run(self, command: Authorize) -> Answer:
        found = stored(command)
        self.operations[command.merchant_id, command.idempotency_key] = found
        if self.before is not None:
            await self.before(command)
        found.operation.state = OperationState.SUCCEEDED
        found.payment.state = PaymentState.AUTHORIZED
        response = ContractEncoder().response(found.operation, found.payment)
        found.operation.response = response
        self.finished.append(command.idempotency_key)
        return Answer(response, False, command.request_id, found.payment.payment_id)

    async def capture(self, command: Capture) -> Answer:
        raise GatewayError(
            Reason.AMOUNT_EXCEEDS_AUTHORIZED, "too much", metadata={"state": "AUTHORIZED"}
        )

    async def void(self, command: Void) -> Answer:
        raise GatewayError(Reason.OPERATION_IN_PROGRESS, "busy")

    async def refund(self, command: Refund) -> Answer:
        raise RuntimeError(f"secret detail about {CARD_NUMBER}")

    async def increment(self, command: Increment) -> Answer:
        raise GatewayError(Reason.OVERLOADED, "later", retry_after_s=0.125)

    async def get_payment(self, merchant_id: str, mode: Mode, payment_id: str) -> Aggregate:
        for found in self.operations.values():
            if found.payment.payment_id == payment_id and found.payment.merchant_id == merchant_id:
                return Aggregate(found.payment, [found.operation])
        raise GatewayError(Reason.PAYMENT_NOT_FOUND, "no such payment")

    async def get_operation(
        self,
        merchant_id: str,
        mode: Mode,
        *,
        operation_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Found:
        found = self.operations.get((merchant_id, idempotency_key or ""))
        if found is None:
            raise GatewayError(Reason.OPERATION_NOT_FOUND, "no such operation")
        return found

    async def list_payments(self, filter_: ListFilter) -> Page:
        self.filters.append(filter_)
        rows = [
            each
            for each in self.payments
            if filter_.after is None
            or (cast("datetime", each.created_at), each.payment_id) < filter_.after
        ]
        page = rows[: filter_.page_size]
        more = len(rows) > len(page)
        last = page[-1] if page else None
        after = (cast("datetime", last.created_at), last.payment_id) if last and more else None
        return Page(page, after)


def stored(command: Authorize) -> Found:
    payment_id = new_payment_id()
    operation = Operation(
        merchant_id=command.merchant_id,
        operation_id=new_operation_id(),
        payment_id=payment_id,
        kind=OperationKind.AUTHORIZE,
        origin=OperationOrigin.CLIENT,
        state=OperationState.PROCESSING,
        amount_minor=command.amount_minor,
        currency=command.currency,
        attempt=Attempt(1, "simulator", "account"),
        idempotency_key=command.idempotency_key,
        fingerprint=command.fingerprint,
        request_id=command.request_id,
        created_at=CREATED_AT,
        updated_at=CREATED_AT,
    )
    return Found(operation, payment_of(command.merchant_id, payment_id, command.details))


def payment_of(merchant_id: str, payment_id: str, details: bytes = b"") -> Payment:
    return Payment(
        merchant_id=merchant_id,
        payment_id=payment_id,
        mode=Mode.TEST,
        state=PaymentState.PROCESSING,
        currency="EUR",
        capture_method=CaptureMethod.MANUAL,
        requested_minor=1000,
        connector="simulator",
        connector_account_id="account",
        details=details,
        created_at=CREATED_AT,
        updated_at=CREATED_AT,
    )


@dataclass
class Finished:
    method: str
    code: str
    reason: str
    request_id: str
    merchant_id: str
    payment_id: str


@dataclass
class RecordingObserver:
    calls: list[Finished] = field(default_factory=list)

    def rpc_finished(
        self,
        method: str,
        code: str,
        reason: str,
        seconds: float,
        request_id: str,
        merchant_id: str,
        payment_id: str,
    ) -> None:
        assert seconds >= 0
        self.calls.append(Finished(method, code, reason, request_id, merchant_id, payment_id))


class Keys:
    """API keys in memory."""

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}

    def add(
        self,
        *merchants: MerchantInfo,
        scopes: tuple[str, ...] = ("payments:read", "payments:write"),
    ) -> str:
        key = new_key(Mode.TEST)
        self.records[key.key_id] = KeyRecord(
            key_id=key.key_id,
            secret_hash=key.secret_hash,
            organisation_id="org_1",
            scopes=frozenset(scopes),
            mode=Mode.TEST,
            expires_at=None,
            revoked_at=None,
            merchants={each.merchant_id: each for each in merchants},
        )
        return key.text

    async def load(self, key_id: str) -> KeyRecord | None:
        return self.records.get(key_id)


@dataclass
class Running:
    """A server under test with everything around it."""

    server: GrpcServer
    payments: FakePayments
    observer: RecordingObserver
    keys: Keys
    channel: aio.Channel
    metadata: tuple[tuple[str, str], ...]

    @property
    def stub(self) -> PaymentServiceAsyncStub:
        return PaymentServiceStub(self.channel)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def raw(self, path: str) -> aio.UnaryUnaryMultiCallable[bytes, bytes]:
        """A method that takes and gives bytes."""
        return self.channel.unary_unary(path)

    async def authorize(self, request: pb.AuthorizePaymentRequest) -> pb.AuthorizePaymentResponse:
        return await self.stub.AuthorizePayment(request, metadata=self.metadata)


LIMITS = RpcLimits(
    message_bytes_max=64 * 1024,
    response_bytes_max=64 * 1024,
    batch_wait_s_max=PATIENCE_S,
    stream_window_items=4,
)


@contextlib.asynccontextmanager
async def running(
    transport: Transport,
    limits: RpcLimits = LIMITS,
    options: ServerOptions | None = None,
    auth: AuthLimits | None = None,
) -> AsyncIterator[Running]:
    payments, observer, keys = FakePayments(), RecordingObserver(), Keys()
    key = keys.add(MerchantInfo(MERCHANT))
    service = PaymentService(
        payments, Authenticator(keys.load, auth or AuthLimits()), observer, limits
    )
    options = replace(
        options or ServerOptions(),
        transport=transport,
        listen_address="127.0.0.1:0",
        trusted_front=transport == "native",
        message_bytes_max=limits.message_bytes_max,
    )
    server = GrpcServer(service, options)
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            metadata = (("authorization", f"Bearer {key}"),)
            yield Running(server, payments, observer, keys, channel, metadata)
    finally:
        await server.drain(0.0)
        # Work whose caller has gone.
        for task in list(payments.running):
            task.cancel()
        await asyncio.gather(*payments.running, return_exceptions=True)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Transport:
    return cast("Transport", request.param)


@pytest.fixture
async def gateway(transport: Transport) -> AsyncIterator[Running]:
    async with running(transport) as up:
        yield up


# --- requests and errors --------------------------------------------------------------------------


def authorization(key: str = "key-1", **fields: Any) -> pb.AuthorizePaymentRequest:
    request = pb.AuthorizePaymentRequest(
        idempotency_key=key, capture_method=pb.AuthorizePaymentRequest().capture_method, **fields
    )
    request.capture_method = 2
    request.amount.amount_minor = 1000
    request.amount.currency_code = "EUR"
    request.payment_method.token = "tok_visa"
    return request


def item(ref: str, key: str | None = None, **fields: Any) -> pb.AuthorizePaymentItem:
    return pb.AuthorizePaymentItem(
        item_ref=ref, authorization=authorization(f"key-{ref}" if key is None else key, **fields)
    )


@dataclass
class Refused:
    """What a client sees of a refusal."""

    code: StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    violations: dict[str, str]
    retry_delay_s: float | None
    trailers: dict[str, str | bytes]


def refused(error: aio.AioRpcError) -> Refused:
    trailers = {str(name): value for name, value in error.trailing_metadata() or ()}
    details = cast("bytes", trailers.get("grpc-status-details-bin", b""))
    status = Status.FromString(details)
    if details:
        assert status.code == error.code().value[0]
        assert status.message == error.details()
    return Refused(
        error.code(), error.details() or "", *unpacked(status), trailers
    )


def unpacked(status: Status) -> tuple[str, dict[str, str], dict[str, str], float | None]:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        has_retry = detail.Unpack(retry) or has_retry
    assert info.reason == "" or info.domain == "payments.v1"
    return (
        info.reason,
        dict(info.metadata),
        {each.field: each.description for each in bad.field_violations},
        retry.retry_delay.ToMilliseconds() / 1000 if has_retry else None,
    )


async def refusal(call: Awaitable[Any]) -> Refused:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return refused(caught.value)


# --- calls ----------------------------------------------------------------------------------------


async def test_an_authorization_is_answered_and_its_repeat_is_the_same_bytes_with_replay(
    gateway: Running,
) -> None:
    method = gateway.raw("/payments.v1.PaymentService/AuthorizePayment")
    data = authorization(metadata={"cart": "7"}).SerializeToString()
    first = await method(data, metadata=(*gateway.metadata, ("x-request-id", "first")))
    again = await method(data, metadata=gateway.metadata)
    assert again.startswith(first)
    replay = pb.AuthorizePaymentResponse.FromString(again[len(first) :]).replay
    assert replay == payment_pb2.Replay(replayed=True, first_request_id="first")
    answer = pb.AuthorizePaymentResponse.FromString(first)
    assert answer.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
    assert dict(answer.payment.metadata) == {"cart": "7"}
    assert not answer.HasField("replay")


async def test_every_call_ends_with_a_request_id_the_callers_where_it_is_printable(
    gateway: Running,
) -> None:
    for given, taken in (("my-id 1", True), ("x" * 129, False), ("", False)):
        metadata = (*gateway.metadata, ("x-request-id", given))
        call = gateway.stub.AuthorizePayment(authorization(), metadata=metadata)
        await call
        told = dict(await call.trailing_metadata())["x-request-id"]
        assert told == given if taken else is_request_id(str(told))
    failure = await refusal(gateway.stub.AuthorizePayment(authorization()))
    assert is_request_id(str(failure.trailers["x-request-id"]))
    assert gateway.observer.calls[-1].request_id == failure.trailers["x-request-id"]


async def test_each_call_is_observed_once_with_its_ids(gateway: Running) -> None:
    await gateway.authorize(authorization())
    await refusal(gateway.stub.CapturePayment(pb.CapturePaymentRequest(), metadata=gateway.metadata))
    payment_id = next(iter(gateway.payments.operations.values())).payment.payment_id
    first, second = gateway.observer.calls
    assert (first.method, first.code, first.reason) == ("AuthorizePayment", "OK", "")
    assert (first.merchant_id, first.payment_id) == (MERCHANT, payment_id)
    assert (second.method, second.code) == ("CapturePayment", "INVALID_ARGUMENT")
    assert second.reason == "INVALID_REQUEST"


async def test_a_refusal_carries_reason_domain_metadata_and_retry(gateway: Running) -> None:
    capture = pb.CapturePaymentRequest(idempotency_key="k", payment_id="pay_1")
    told = await refusal(gateway.stub.CapturePayment(capture, metadata=gateway.metadata))
    assert (told.code, told.reason) == (
        StatusCode.FAILED_PRECONDITION,
        "AMOUNT_EXCEEDS_AUTHORIZED",
    )
    assert told.metadata == {"state": "AUTHORIZED"}
    assert told.retry_delay_s is None
    assert PUSHBACK_TRAILER not in told.trailers

    increment = pb.IncrementAuthorizationRequest(idempotency_key="k", payment_id="pay_1")
    increment.additional_amount.amount_minor = 1
    increment.additional_amount.currency_code = "EUR"
    told = await refusal(gateway.stub.IncrementAuthorization(increment, metadata=gateway.metadata))
    assert (told.code, told.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert told.retry_delay_s == 0.125
    assert told.trailers[PUSHBACK_TRAILER] == "125"


async def test_no_text_of_an_exception_leaves(
    gateway: Running, caplog: pytest.LogCaptureFixture
) -> None:
    refund = pb.RefundPaymentRequest(idempotency_key="k", payment_id="pay_1")
    told = await refusal(gateway.stub.RefundPayment(refund, metadata=gateway.metadata))
    assert (told.code, told.reason) == (StatusCode.INTERNAL, "INTERNAL")
    assert told.message == INTERNAL_MESSAGE
    assert "secret" not in repr(told)
    assert CARD_NUMBER not in repr(told)
    assert any(record.exc_info for record in caplog.records)


async def test_bad_fields_are_named_one_violation_each_and_never_their_values(
    gateway: Running,
) -> None:
    request = authorization("", merchant_id="not one", metadata={"bad key": "v" * 501})
    request.amount.currency_code = "XXX"
    request.amount.amount_minor = -1
    request.amount_details.tip_minor = 5
    told = await refusal(gateway.authorize(request))
    assert (told.code, told.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert set(told.violations) == {
        "idempotency_key",
        "merchant_id",
        "metadata",
        "amount.currency_code",
        "amount.amount_minor",
        "amount_details",
    }
    for value in ("not one", "bad key", "vvv", "XXX"):
        assert value not in repr(told)


async def test_garbage_is_malformed_and_never_internal(gateway: Running) -> None:
    for path in (
        "/payments.v1.PaymentService/AuthorizePayment",
        "/payments.v1.PaymentService/BatchAuthorizePayments",
        "/payments.v1.PaymentService/ListPayments",
        "/grpc.health.v1.Health/Check",
    ):
        for data in (b"\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"):
            told = await refusal(gateway.raw(path)(data, metadata=gateway.metadata))
            assert (told.code, told.reason) == (StatusCode.INVALID_ARGUMENT, "MESSAGE_MALFORMED")


async def test_an_unknown_method_is_unimplemented_with_a_reason(gateway: Running) -> None:
    for path in ("/payments.v1.PaymentService/StealPayment", "/x.Y/Z", "/payments.v1.PaymentService/"):
        told = await refusal(gateway.raw(path)(b"", metadata=gateway.metadata))
        assert (told.code, told.reason) == (StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND")


# --- who calls ------------------------------------------------------------------------------------


async def test_credentials_scopes_and_merchants_are_checked(gateway: Running) -> None:
    both = gateway.keys.add(MerchantInfo(MERCHANT), MerchantInfo(OTHER_MERCHANT))
    reader = gateway.keys.add(MerchantInfo(MERCHANT), scopes=("payments:read",))
    own = gateway.metadata[0][1].removeprefix("Bearer ")
    for header, merchant_id, code, reason in (
        (None, "", StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING"),
        ("Bearer ", "", StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        ("Bearer nonsense", "", StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        (f"Basic {own}", "", StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        (f"Bearer {own[:-1]}g", "", StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        (f"Bearer {own[:-64]}{'0' * 64}", "", StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        (f"Bearer {reader}", "", StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"),
        (f"Bearer {both}", "", StatusCode.INVALID_ARGUMENT, "MERCHANT_REQUIRED"),
        (f"Bearer {own}", OTHER_MERCHANT, StatusCode.NOT_FOUND, "MERCHANT_NOT_FOUND"),
    ):
        metadata = () if header is None else (("authorization", header),)
        request = authorization(merchant_id=merchant_id)
        told = await refusal(gateway.stub.AuthorizePayment(request, metadata=metadata))
        assert (told.code, told.reason) == (code, reason), header
    assert gateway.payments.commands == []
    for header, merchant_id in ((f"Bearer {both}", OTHER_MERCHANT), (f"bearer {own}", "")):
        await gateway.stub.AuthorizePayment(
            authorization(merchant_id=merchant_id), metadata=(("authorization", header),)
        )
    assert [each.merchant_id for each in gateway.payments.commands] == [OTHER_MERCHANT, MERCHANT]


async def test_a_card_number_is_refused_wherever_it_stands(gateway: Running) -> None:
    spaced = "4242 4242-4242 4242"
    for path, request in (
        ("merchant_order_id", authorization(merchant_order_id=f"order {spaced}")),
        ("idempotency_key", authorization(CARD_NUMBER)),
        ("metadata", authorization(metadata={"note": f"card:{CARD_NUMBER}"})),
        ("metadata", authorization(metadata={CARD_NUMBER: "x"})),
        ("metadata", authorization(metadata={"Card-CVV2": " 123"})),
        ("customer_id", authorization(customer_id="４２４２４２４２４２４２４２４２")),
        ("merchant_id", authorization(merchant_id=f"mer_{CARD_NUMBER}")),
    ):
        told = await refusal(gateway.authorize(request))
        assert (told.code, told.reason) == (StatusCode.INVALID_ARGUMENT, "CARD_DATA_NOT_ALLOWED")
        assert set(told.violations) == {path}
        assert "4242" not in repr(told)
    token = authorization()
    token.payment_method.token = CARD_NUMBER
    assert (await refusal(gateway.authorize(token))).violations.keys() == {"payment_method.token"}
    header = (*gateway.metadata, ("x-request-id", CARD_NUMBER))
    told = await refusal(gateway.stub.AuthorizePayment(authorization(), metadata=header))
    assert told.reason == "CARD_DATA_NOT_ALLOWED"
    assert told.violations.keys() == {"x-request-id"}
    assert "4242" not in repr(told)
    assert "4242" not in repr(gateway.observer.calls)
    assert gateway.payments.commands == []


async def test_a_merchant_may_exempt_its_order_ids(gateway: Running) -> None:
    key = gateway.keys.add(MerchantInfo(MERCHANT, pan_exempt_order_id=True))
    metadata = (("authorization", f"Bearer {key}"),)
    request = authorization(merchant_order_id=CARD_NUMBER)
    await gateway.stub.AuthorizePayment(request, metadata=metadata)
    request = authorization("k2", merchant_order_id=CARD_NUMBER, customer_id=CARD_NUMBER)
    told = await refusal(gateway.stub.AuthorizePayment(request, metadata=metadata))
    assert told.violations.keys() == {"customer_id"}


# --- deadlines and cancellation -------------------------------------------------------------------


async def test_the_deadline_reaches_the_use_case_and_ends_the_call_not_the_work(
    gateway: Running,
) -> None:
    go_on = asyncio.Event()

    async def wait(_: Authorize) -> None:
        await go_on.wait()

    gateway.payments.before = wait
    call = gateway.stub.AuthorizePayment(authorization(), metadata=gateway.metadata, timeout=0.3)
    told = await refusal(call)
    assert told.code is StatusCode.DEADLINE_EXCEEDED
    command = gateway.payments.commands[0]
    assert command.deadline is not None
    assert command.deadline - asyncio.get_running_loop().time() < PATIENCE_S
    await until(lambda: bool(gateway.observer.calls))
    assert gateway.observer.calls[0].code in {"DEADLINE_EXCEEDED", "CANCELLED"}
    go_on.set()
    await until(lambda: gateway.payments.finished == ["key-1"])


async def test_no_deadline_is_none(gateway: Running) -> None:
    await gateway.authorize(authorization())
    assert gateway.payments.commands[0].deadline is None


async def test_a_cancelled_call_leaves_its_work_running(gateway: Running) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: Authorize) -> None:
        started.set()
        await go_on.wait()

    gateway.payments.before = wait
    call = gateway.stub.AuthorizePayment(authorization(), metadata=gateway.metadata)
    running_call = asyncio.ensure_future(refusal(call))
    await started.wait()
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running_call
    await until(lambda: bool(gateway.observer.calls))
    assert gateway.observer.calls[0].code == "CANCELLED"
    go_on.set()
    await until(lambda: gateway.payments.finished == ["key-1"])


async def until(holds: Callable[[], bool]) -> None:
    """Wait, by giving the loop its turns, for what must come about."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.001)
