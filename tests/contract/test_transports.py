"""Both transports answer alike: what callers may count on, and where they differ by design.

The use cases are a small double here: the subject is what stands around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import os
import re
import socket
import tempfile
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode, aio
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
)
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payments.v1 import payment_method_pb2, payment_pb2
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
from gateway.rpc import receiving
from gateway.rpc import server as server_module
from gateway.rpc.auth import Authenticator, AuthLimits
from gateway.rpc.conversion import ContractEncoder
from gateway.rpc.error_map import INTERNAL_MESSAGE, PUSHBACK_TRAILER
from gateway.rpc.server import GrpcServer, ServerConfigError, ServerOptions
from gateway.rpc.service import PaymentService, RpcLimits
from gateway.rpc.system import MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from payments.v1.payment_service_pb2_grpc import PaymentServiceAsyncStub

Transport = Literal["grpcio", "native"]
TRANSPORTS: tuple[Transport, ...] = ("grpcio", "native")
MERCHANT, OTHER_MERCHANT = "mer_one", "mer_two"
DESCRIPTOR = pb.DESCRIPTOR.services_by_name["PaymentService"]
PATIENCE_S = 60.0
"""How long a test waits for what must happen: a failure, never a measurement."""
CONNECTIONS, FLUSH_S = 4, 1.0
"""Of the test of a drain's last answers: more time than the server's, for busy machines."""
CARD_NUMBER = "4242424242424242"
CREATED_AT = datetime(2026, 11, 1, 12, tzinfo=UTC)

UnaryMethod = aio.UnaryUnaryMultiCallable[bytes, bytes]


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
    response: pb.AuthorizePaymentResponse | None = None
    """The answer to every authorization, instead of what the operation says."""

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
        if self.response is not None:
            response = self.response.SerializeToString()
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
    seconds: float = field(default=0.0, compare=False)


@dataclass
class RecordingObserver:
    calls: list[Finished] = field(default_factory=list)

    def rpc_started(self, method: str) -> None: ...

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
        ids = request_id, merchant_id, payment_id
        self.calls.append(Finished(method, code, reason, *ids, seconds))


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
        idempotency_key=key, capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL, **fields
    )
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
    told = Refused(error.code(), error.details() or "", *unpacked(status), trailers)
    if told.code is StatusCode.INVALID_ARGUMENT and told.reason != "MESSAGE_MALFORMED":
        assert told.violations, "which field is wrong"
    return told


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
    for sent, taken in (("my-id 1", True), ("x" * 129, False), ("", False)):
        metadata = (*gateway.metadata, ("x-request-id", sent))
        call = gateway.stub.AuthorizePayment(authorization(), metadata=metadata)
        await call
        told = dict(await call.trailing_metadata())["x-request-id"]
        assert told == sent if taken else is_request_id(str(told))
    failure = await refusal(gateway.stub.AuthorizePayment(authorization()))
    assert is_request_id(str(failure.trailers["x-request-id"]))
    assert gateway.observer.calls[-1].request_id == failure.trailers["x-request-id"]


async def test_each_call_is_observed_once_with_its_ids(gateway: Running) -> None:
    await gateway.authorize(authorization())
    await refusal(
        gateway.stub.CapturePayment(pb.CapturePaymentRequest(), metadata=gateway.metadata)
    )
    payment_id = next(iter(gateway.payments.operations.values())).payment.payment_id
    first, second = gateway.observer.calls
    assert (first.method, first.code, first.reason) == ("AuthorizePayment", "OK", "")
    assert (first.merchant_id, first.payment_id) == (MERCHANT, payment_id)
    assert (second.method, second.code) == ("CapturePayment", "INVALID_ARGUMENT")
    assert second.reason == "INVALID_REQUEST"


async def test_a_refusal_carries_reason_domain_metadata_and_retry(
    gateway: Running, transport: Transport
) -> None:
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
    # The native transport reserves the trailer's name.
    assert told.trailers.get(PUSHBACK_TRAILER) == (None if transport == "native" else "125")


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
    for path in (
        "/payments.v1.PaymentService/StealPayment",
        "/x.Y/Z",
        "/payments.v1.PaymentService/",
    ):
        told = await refusal(gateway.raw(path)(b"", metadata=gateway.metadata))
        assert (told.code, told.reason) == (StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND")
        assert told.trailers["x-request-id"]


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


def has_card_number(told: object) -> bool:
    """Whether half of it is there, however it is written; less may be of a random id."""
    return CARD_NUMBER[:8] in re.sub(r"[ -]", "", repr(told))


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
        assert not has_card_number(told)
    token = authorization()
    token.payment_method.token = CARD_NUMBER
    assert (await refusal(gateway.authorize(token))).violations.keys() == {"payment_method.token"}
    header = (*gateway.metadata, ("x-request-id", CARD_NUMBER))
    told = await refusal(gateway.stub.AuthorizePayment(authorization(), metadata=header))
    assert told.reason == "CARD_DATA_NOT_ALLOWED"
    assert told.violations.keys() == {"x-request-id"}
    assert not has_card_number(told)
    assert not has_card_number(gateway.observer.calls)
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
    for timeout_s in (0.3, 3.0, 30.0):  # on a stalled machine a call is not even there in time
        told = await refusal(
            gateway.stub.AuthorizePayment(
                authorization(), metadata=gateway.metadata, timeout=timeout_s
            )
        )
        assert told.code is StatusCode.DEADLINE_EXCEEDED
        if gateway.payments.commands:
            break
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


# --- limits ---------------------------------------------------------------------------------------


async def test_a_message_too_large_is_refused_for_good_by_the_handler_and_by_the_transport(
    gateway: Running, transport: Transport
) -> None:
    method = gateway.raw("/payments.v1.PaymentService/AuthorizePayment")
    told = await refusal(method(bytes(LIMITS.message_bytes_max + 1), metadata=gateway.metadata))
    assert (told.code, told.reason) == (StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    # native cannot send grpc-* trailers.
    assert told.trailers.get(PUSHBACK_TRAILER) == (None if transport == "native" else "-1")
    told = await refusal(method(bytes(3 * LIMITS.message_bytes_max), metadata=gateway.metadata))
    assert told.code is StatusCode.RESOURCE_EXHAUSTED
    assert (await gateway.authorize(authorization())).operation.operation_id


@pytest.mark.parametrize("method", [each.name for each in DESCRIPTOR.methods])
async def test_every_method_refuses_what_is_too_large_and_tells_the_request_s_id(
    gateway: Running, method: str
) -> None:
    call: Any = gateway.channel.stream_stream(f"/{DESCRIPTOR.full_name}/{method}")
    sent = iter([bytes(LIMITS.message_bytes_max + 1)])
    told = await refusal(call(sent, metadata=gateway.metadata).read())
    assert (told.code, told.reason) == (StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert told.trailers["x-request-id"]
    assert gateway.observer.calls[0].request_id == told.trailers["x-request-id"]


async def test_a_message_that_unpacks_beyond_the_limit_is_refused(gateway: Running) -> None:
    # A gRPC frame: compressed flag, length, gzip of zeros.
    method: UnaryMethod = gateway.channel.unary_unary(
        "/payments.v1.PaymentService/AuthorizePayment"
    )
    told = await refusal(
        method(
            bytes(20 * LIMITS.message_bytes_max),
            metadata=gateway.metadata,
            compression=grpc.Compression.Gzip,
        )
    )
    assert told.code is StatusCode.RESOURCE_EXHAUSTED
    assert len(gzip.compress(bytes(20 * LIMITS.message_bytes_max))) < LIMITS.message_bytes_max


async def test_headers_too_large_are_refused_on_native_without_a_grpc_status(
    transport: Transport,
) -> None:
    async with running(transport, options=ServerOptions(metadata_bytes_max=4096)) as up:
        header = (*up.metadata, ("x-filler", "f" * 5000))
        told = await refusal(up.stub.AuthorizePayment(authorization(), metadata=header))
        # Documented in docs/transports.md: HTTP 431 on native, which clients call UNKNOWN.
        expected = {"grpcio": StatusCode.RESOURCE_EXHAUSTED, "native": StatusCode.UNKNOWN}
        assert told.code is expected[transport]
        assert up.payments.commands == []
        assert (await up.authorize(authorization())).operation.operation_id


async def test_calls_beyond_the_streams_of_a_connection_wait_and_none_fails(
    transport: Transport,
) -> None:
    # grpcio refuses some of them (REFUSED_STREAM), which the published service config repeats.
    published = (files("payments.v1") / "service_config.json").read_text()
    options = [("grpc.service_config", published)]
    async with (
        running(transport, options=ServerOptions(concurrent_streams_max=2)) as started,
        aio.insecure_channel(started.target, options=options) as channel,
    ):
        up = replace(started, channel=channel)
        go_on = asyncio.Event()
        most = 0
        # A client knows the limit once it has heard from the server.
        await up.authorize(authorization("first"))

        async def wait(_: Authorize) -> None:
            nonlocal most
            most = max(most, len(up.payments.running))
            await go_on.wait()

        up.payments.before = wait
        calls = [asyncio.ensure_future(up.authorize(authorization(f"k{n}"))) for n in range(6)]
        await until(lambda: len(up.payments.running) == 2)
        go_on.set()
        await asyncio.gather(*calls)
        assert most == 2


async def test_a_list_of_addresses_is_an_authority_to_grpcio_alone(
    gateway: Running, transport: Transport
) -> None:
    target = f"ipv4:{gateway.target},{gateway.target}"
    async with aio.insecure_channel(target) as channel:
        call = PaymentServiceStub(channel).AuthorizePayment(
            authorization(), metadata=gateway.metadata
        )
        if transport == "native":
            assert (await refusal(call)).code is StatusCode.INTERNAL
            assert gateway.payments.commands == []
        else:
            assert (await call).operation.operation_id
    named = [("grpc.default_authority", "payments")]
    async with aio.insecure_channel(target, options=named) as channel:
        stub = PaymentServiceStub(channel)
        answer = await stub.AuthorizePayment(authorization(), metadata=gateway.metadata)
        assert answer.operation.operation_id


# --- batches --------------------------------------------------------------------------------------


async def batch(
    up: Running, *items: pb.AuthorizePaymentItem, timeout_s: float | None = None
) -> list[pb.AuthorizePaymentResult]:
    request = pb.BatchAuthorizePaymentsRequest(items=items)
    answer = await up.stub.BatchAuthorizePayments(request, metadata=up.metadata, timeout=timeout_s)
    return list(answer.results)


def reason_of(result: pb.AuthorizePaymentResult) -> str:
    return unpacked(result.error)[0]


async def test_a_bad_item_of_a_batch_spoils_no_other(gateway: Running) -> None:
    bad_currency = item("b")
    bad_currency.authorization.amount.currency_code = "XXX"
    results = await batch(
        gateway,
        item("a"),
        bad_currency,
        item("c", metadata={"note": CARD_NUMBER}),
        pb.AuthorizePaymentItem(item_ref="d"),
        item("e", merchant_id=OTHER_MERCHANT),
        item("f"),
    )
    assert [each.item_ref for each in results] == ["a", "b", "c", "d", "e", "f"]
    assert [each.WhichOneof("result") for each in results] == [
        "response",
        "error",
        "error",
        "error",
        "error",
        "response",
    ]
    assert [reason_of(each) for each in results[1:5]] == [
        "INVALID_REQUEST",
        "CARD_DATA_NOT_ALLOWED",
        "INVALID_REQUEST",
        "MERCHANT_NOT_FOUND",
    ]
    assert unpacked(results[1].error)[2].keys() == {"amount.currency_code"}
    methods = [each.method for each in gateway.observer.calls]
    assert methods == ["BatchAuthorizePayments/item"] * 6 + ["BatchAuthorizePayments"]


async def test_each_item_is_observed_once_with_what_came_of_it_and_its_ids(
    gateway: Running,
) -> None:
    changed = item("b", "key-a")
    changed.authorization.amount.amount_minor = 7
    results = await batch(gateway, item("a"), changed, item("c", merchant_id=OTHER_MERCHANT))
    payment_id = results[0].response.payment.payment_id
    *items, call = gateway.observer.calls
    told = {(each.code, each.reason, each.merchant_id, each.payment_id) for each in items}
    assert told == {
        ("OK", "", MERCHANT, payment_id),
        ("ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED", MERCHANT, ""),
        ("NOT_FOUND", "MERCHANT_NOT_FOUND", "", ""),
    }
    assert {each.request_id for each in items} == {call.request_id}
    assert max(each.seconds for each in items) <= call.seconds


async def test_an_item_ref_that_is_card_data_is_refused_and_not_repeated(gateway: Running) -> None:
    results = await batch(gateway, item(CARD_NUMBER, "k1"), item("", "k2"), item("c" * 129, "k3"))
    assert [each.item_ref for each in results] == ["", "", ""]
    assert reason_of(results[0]) == "CARD_DATA_NOT_ALLOWED"
    assert reason_of(results[1]) == reason_of(results[2]) == "INVALID_REQUEST"
    assert gateway.payments.commands == []


async def test_a_batch_has_1_to_500_items_with_marks_of_their_own(transport: Transport) -> None:
    limits = replace(LIMITS, message_bytes_max=1024 * 1024)
    async with running(transport, limits) as up:
        for items, field_name in (
            ([], "items"),
            ([item(str(n)) for n in range(501)], "items"),
            ([item("a", "k1"), item("b", "k2"), item("a", "k3")], "items[2].item_ref"),
        ):
            told = await refusal(batch(up, *items))
            assert (told.code, told.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert told.violations.keys() == {field_name}
        results = await batch(up, *[item(str(n)) for n in range(500)])
        assert [each.item_ref for each in results] == [str(n) for n in range(500)]
        assert all(each.HasField("response") for each in results)


async def test_the_second_of_two_equal_keys_in_a_batch_waits_for_the_first(
    gateway: Running,
) -> None:
    async def turns(_: Authorize) -> None:
        for _turn in range(20):
            await asyncio.sleep(0)

    gateway.payments.before = turns
    other = item("c", "same")
    other.authorization.amount.amount_minor = 7
    first, second, third = await batch(gateway, item("a", "same"), item("b", "same"), other)
    assert not first.response.HasField("replay")
    assert second.response.replay.replayed
    second.response.ClearField("replay")
    assert second.response == first.response
    assert reason_of(third) == "IDEMPOTENCY_KEY_REUSED"


async def test_a_batch_answers_before_its_deadline_with_what_is_unfinished_as_processing(
    gateway: Running,
) -> None:
    go_on = asyncio.Event()

    async def wait(command: Authorize) -> None:
        if command.idempotency_key != "key-fast":
            await go_on.wait()

    gateway.payments.before = wait
    changed = item("changed", "key-slow")
    changed.authorization.amount.amount_minor = 7
    results: list[pb.AuthorizePaymentResult] = []
    for timeout_s in (2.0, 30.0):  # on a stalled machine the fast one is not done in time
        with contextlib.suppress(aio.AioRpcError):
            results = await batch(gateway, item("fast"), item("slow"), changed, timeout_s=timeout_s)
            if results[0].response.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED:
                break
    fast, slow, conflicting = results
    assert fast.response.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
    assert slow.response.operation.state == payment_pb2.OPERATION_STATE_PROCESSING
    assert slow.response.operation.idempotency_key == "key-slow"
    assert reason_of(conflicting) == "IDEMPOTENCY_KEY_REUSED"
    go_on.set()
    await until(lambda: gateway.payments.finished == ["key-fast", "key-slow"])


async def test_an_unfinished_item_without_an_operation_is_in_flight(transport: Transport) -> None:
    async with running(transport, replace(LIMITS, batch_wait_s_max=0.05)) as up:
        go_on = asyncio.Event()

        async def forget_and_wait(command: Authorize) -> None:
            del up.payments.operations[command.merchant_id, command.idempotency_key]
            await go_on.wait()

        up.payments.before = forget_and_wait
        (result,) = await batch(up, item("a"))
        assert result.error.code == StatusCode.ABORTED.value[0]
        assert unpacked(result.error)[0] == "IDEMPOTENCY_KEY_IN_FLIGHT"
        assert unpacked(result.error)[3] is not None
        go_on.set()
        await until(lambda: up.payments.finished == ["key-a"])


async def test_a_cancelled_batch_leaves_its_items_running(gateway: Running) -> None:
    go_on = asyncio.Event()

    async def wait(_: Authorize) -> None:
        await go_on.wait()

    gateway.payments.before = wait
    request = pb.BatchAuthorizePaymentsRequest(items=[item("a"), item("b")])
    call = gateway.stub.BatchAuthorizePayments(request, metadata=gateway.metadata)
    waiting = asyncio.ensure_future(refusal(call))
    await until(lambda: len(gateway.payments.commands) == 2)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await until(lambda: bool(gateway.observer.calls))
    go_on.set()
    await until(lambda: sorted(gateway.payments.finished) == ["key-a", "key-b"])


# --- streams --------------------------------------------------------------------------------------

Stream = aio.StreamStreamCall[pb.StreamAuthorizePaymentsRequest, pb.StreamAuthorizePaymentsResponse]


def open_stream(up: Running) -> Stream:
    return up.stub.StreamAuthorizePayments(metadata=up.metadata)


def message(*items: pb.AuthorizePaymentItem) -> pb.StreamAuthorizePaymentsRequest:
    return pb.StreamAuthorizePaymentsRequest(items=items)


async def rest_of(call: Stream) -> list[pb.AuthorizePaymentResult]:
    results: list[pb.AuthorizePaymentResult] = []
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await call.read()) is not aio.EOF:
            results.extend(cast("pb.StreamAuthorizePaymentsResponse", answer).results)
    return results


async def test_a_streams_answers_come_as_they_are_ready_and_its_half_close_drains(
    gateway: Running,
) -> None:
    go_on = asyncio.Event()

    async def wait(command: Authorize) -> None:
        if command.idempotency_key == "key-slow":
            await go_on.wait()

    gateway.payments.before = wait
    call = open_stream(gateway)
    await call.write(message(item("slow"), item("fast")))
    answer = cast("pb.StreamAuthorizePaymentsResponse", await call.read())
    assert [each.item_ref for each in answer.results] == ["fast"]
    await call.write(message(item("bad", metadata={"n": CARD_NUMBER}), item("last", "key-fast")))
    await call.done_writing()
    go_on.set()
    results = {each.item_ref: each for each in await rest_of(call)}
    assert results.keys() == {"slow", "bad", "last"}
    assert reason_of(results["bad"]) == "CARD_DATA_NOT_ALLOWED"
    assert results["last"].response.replay.replayed
    assert await call.code() is StatusCode.OK


async def test_a_stream_without_a_key_is_refused_before_its_first_message(
    gateway: Running,
) -> None:
    """Or anyone could hold as many as there may be."""
    told = await refusal(gateway.stub.StreamAuthorizePayments(timeout=PATIENCE_S).read())
    assert (told.code, told.reason) == (StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING")


async def test_a_stream_is_not_read_beyond_its_window(gateway: Running) -> None:
    released: asyncio.Queue[None] = asyncio.Queue()

    async def wait(_: Authorize) -> None:
        await released.get()

    gateway.payments.before = wait
    window = LIMITS.stream_window_items
    call = open_stream(gateway)
    sent = window + 3
    await call.write(message(*[item(str(n)) for n in range(sent)]))
    await until(lambda: len(gateway.payments.commands) == window)
    # What would have been begun beyond the window had its turns.
    await refusal(
        gateway.stub.GetPayment(pb.GetPaymentRequest(payment_id="none"), metadata=gateway.metadata)
    )
    assert len(gateway.payments.commands) == window
    released.put_nowait(None)
    answer = cast("pb.StreamAuthorizePaymentsResponse", await call.read())
    assert len(answer.results) == 1
    await until(lambda: len(gateway.payments.commands) == window + 1)
    for _ in range(sent):
        released.put_nowait(None)
    await call.done_writing()
    assert len(await rest_of(call)) == sent - 1


async def test_a_message_of_a_stream_ends_at_its_limit_and_a_larger_result_is_one_alone(
    transport: Transport,
) -> None:
    limits = replace(LIMITS, response_bytes_max=20_000)
    async with running(transport, limits) as up:
        go_on = asyncio.Event()

        async def wait(_: Authorize) -> None:
            await go_on.wait()

        up.payments.before = wait
        call = open_stream(up)
        for number, values in enumerate((15, 15, 15, 50)):
            bulky = {f"k{n}": "v" * 500 for n in range(values)}
            await call.write(message(item(str(number), metadata=bulky)))
        await call.done_writing()
        await until(lambda: len(up.payments.commands) == 4)
        go_on.set()
        told: set[str] = set()
        async with asyncio.timeout(PATIENCE_S):
            while (read := await call.read()) is not aio.EOF:
                answer = cast("pb.StreamAuthorizePaymentsResponse", read)
                assert len(answer.results) == 1 or answer.ByteSize() <= limits.response_bytes_max
                told.update(each.item_ref for each in answer.results)
        assert told == {"0", "1", "2", "3"}


async def test_a_client_that_does_not_read_its_results_is_not_read_further(
    transport: Transport,
) -> None:
    sent = 700  # of 26 kB: more than twice of what is on the way when native stops to read
    async with running(transport, replace(LIMITS, message_bytes_max=1024 * 1024)) as up:
        call = open_stream(up)
        bulky = {f"k{n}": "v" * 500 for n in range(50)}
        writes = asyncio.ensure_future(
            write_all(call, [message(item(str(n), metadata=bulky)) for n in range(sent)])
        )
        # The results fill what the connections take, then the window.
        stalled = await count_when_still(up.payments.commands)
        assert stalled < sent
        results = await rest_of(call)
        await writes
        assert {each.item_ref for each in results} == {str(n) for n in range(sent)}


async def write_all(call: Stream, messages: list[pb.StreamAuthorizePaymentsRequest]) -> None:
    for each in messages:
        await call.write(each)
    await call.done_writing()


async def count_when_still(commands: list[Authorize]) -> int:
    """How many there are once none was added for a while."""
    count, still = -1, 0
    while still < 50:
        still = still + 1 if len(commands) == count and count > 0 else 0
        count = len(commands)
        await asyncio.sleep(0.005)
    return count


async def test_a_malformed_message_ends_the_stream_after_the_results_of_those_before(
    gateway: Running,
) -> None:
    method: Any = gateway.channel.stream_stream(
        "/payments.v1.PaymentService/StreamAuthorizePayments"
    )
    for bad, reason in (
        (b"\xff\xff", "MESSAGE_MALFORMED"),
        (b"", "INVALID_REQUEST"),
        (bytes(LIMITS.message_bytes_max + 1), "MESSAGE_TOO_LARGE"),
    ):
        call = method(metadata=gateway.metadata)
        await call.write(message(item("a", f"key-{reason}")).SerializeToString())
        await call.write(bad)
        answer = pb.StreamAuthorizePaymentsResponse.FromString(cast("bytes", await call.read()))
        assert answer.results[0].item_ref == "a"
        told = await refusal(call.read())
        assert told.reason == reason


async def test_a_cancelled_stream_leaves_its_items_running(gateway: Running) -> None:
    go_on = asyncio.Event()

    async def wait(_: Authorize) -> None:
        await go_on.wait()

    gateway.payments.before = wait
    call = open_stream(gateway)
    await call.write(message(item("a"), item("b")))
    await until(lambda: len(gateway.payments.commands) == 2)
    call.cancel()
    await until(lambda: bool(gateway.observer.calls))
    assert gateway.observer.calls[-1].code == "CANCELLED"
    go_on.set()
    await until(lambda: sorted(gateway.payments.finished) == ["key-a", "key-b"])


async def test_a_stream_that_is_reset_while_items_wait_leaves_nothing_to_the_collector(
    gateway: Running,
) -> None:
    """Its last message, above all, which would else stay for minutes."""
    go_on = asyncio.Event()

    async def wait(_: Authorize) -> None:
        await go_on.wait()

    gateway.payments.before = wait
    window = LIMITS.stream_window_items
    streams = gateway.server._service._streams
    gc.disable()
    try:
        call = open_stream(gateway)
        await call.write(message(*[item(str(n)) for n in range(window + 1)]))
        await until(lambda: len(gateway.payments.commands) == window)
        left = [weakref.ref(each) for each in streams]
        call.cancel()
        await until(lambda: not streams)
        go_on.set()
        await until(lambda: len(gateway.payments.finished) == window)
        await until(lambda: [each() for each in left] == [None])
    finally:
        gc.enable()


async def test_a_revoked_key_ends_its_streams(transport: Transport) -> None:
    async with running(transport, auth=AuthLimits(life_s=0.0)) as up:
        call = open_stream(up)
        await call.write(message(item("a")))
        await call.read()
        up.keys.records.clear()
        await call.write(message(item("b")))
        told = await refusal(call.read())
        assert (told.code, told.reason) == (StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID")


async def test_a_revoked_key_begins_no_more_items_of_a_message_that_waits_for_room(
    transport: Transport,
) -> None:
    """However long its client leaves the results unread."""
    async with running(transport, auth=AuthLimits(life_s=0.0)) as up:
        go_on = asyncio.Event()

        async def wait(_: Authorize) -> None:
            await go_on.wait()

        up.payments.before = wait
        window = LIMITS.stream_window_items
        call = open_stream(up)
        await call.write(message(*[item(str(n)) for n in range(window + 3)]))
        await call.done_writing()
        await until(lambda: len(up.payments.commands) == window)
        up.keys.records.clear()
        go_on.set()
        told = await refusal(rest_of(call))
        assert (told.code, told.reason) == (StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID")
        assert len(up.payments.finished) == len(up.payments.commands) == window


async def test_the_use_cases_are_told_which_authorizations_are_items(gateway: Running) -> None:
    await gateway.authorize(authorization("one"))
    await batch(gateway, item("b"))
    call = open_stream(gateway)
    await call.write(message(item("s")))
    await call.read()
    are_items = {each.idempotency_key: each.item for each in gateway.payments.commands}
    assert are_items == {"one": False, "key-b": True, "key-s": True}


async def test_unary_batch_and_stream_replay_the_same_bytes(gateway: Running) -> None:
    service = "/payments.v1.PaymentService"
    data = authorization("one").SerializeToString()
    method = gateway.raw(f"{service}/AuthorizePayment")
    await method(data, metadata=gateway.metadata)
    replay = await method(data, metadata=gateway.metadata)
    request = pb.BatchAuthorizePaymentsRequest(items=[item("r", "one")])
    batched = await gateway.raw(f"{service}/BatchAuthorizePayments")(
        request.SerializeToString(), metadata=gateway.metadata
    )
    call: Any = gateway.channel.stream_stream(f"{service}/StreamAuthorizePayments")(
        metadata=gateway.metadata
    )
    await call.write(message(item("r", "one")).SerializeToString())
    streamed = await call.read()
    await call.done_writing()
    assert streamed == batched
    assert replay in batched
    assert pb.BatchAuthorizePaymentsResponse.FromString(batched).results[0] == (
        pb.AuthorizePaymentResult(
            item_ref="r", response=pb.AuthorizePaymentResponse.FromString(replay)
        )
    )


# --- lists ----------------------------------------------------------------------------------------


async def test_pages_follow_each_other_and_end_at_the_size_of_a_response(gateway: Running) -> None:
    details = authorization("k", metadata={f"k{n}": "v" * 500 for n in range(50)})
    details.ClearField("idempotency_key")
    gateway.payments.payments = [
        replace(
            payment_of(MERCHANT, new_payment_id(), details.SerializeToString()),
            created_at=CREATED_AT - timedelta(microseconds=n),
        )
        for n in range(6)
    ]
    request = pb.ListPaymentsRequest(page_size=4)
    seen: list[str] = []
    pages = 0
    while True:
        page = await gateway.stub.ListPayments(request, metadata=gateway.metadata)
        seen += [each.payment_id for each in page.payments]
        pages += 1
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert seen == [each.payment_id for each in gateway.payments.payments]
    assert pages == 3  # two of some 26 kB fit into 64 KiB


async def test_a_page_token_is_bound_to_its_filters_and_garbage_is_none(gateway: Running) -> None:
    gateway.payments.payments = [payment_of(MERCHANT, new_payment_id()) for _ in range(2)]
    first = await gateway.stub.ListPayments(
        pb.ListPaymentsRequest(page_size=1), metadata=gateway.metadata
    )
    token = first.next_page_token
    assert token
    for request in (
        pb.ListPaymentsRequest(page_token=token, merchant_order_id="another"),
        pb.ListPaymentsRequest(page_token=token[:-1]),
        pb.ListPaymentsRequest(page_token="zz"),
        pb.ListPaymentsRequest(page_token="00" * 60),
        pb.ListPaymentsRequest(page_token=token[:18] + "7f" * 8 + token[34:]),
    ):
        told = await refusal(gateway.stub.ListPayments(request, metadata=gateway.metadata))
        assert (told.code, told.reason) == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
    await gateway.stub.ListPayments(
        pb.ListPaymentsRequest(page_token=token, page_size=7), metadata=gateway.metadata
    )


# --- health and reflection ------------------------------------------------------------------------


def health_check(up: Running, service: str) -> Awaitable[HealthCheckResponse]:
    method = up.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )
    return method(HealthCheckRequest(service=service))


async def test_health_is_served_without_a_key_and_watched(gateway: Running) -> None:
    serving, not_serving = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
    for service in ("", "payments.v1.PaymentService"):
        assert (await health_check(gateway, service)).status == serving
    assert (await refusal(health_check(gateway, "other"))).code is StatusCode.NOT_FOUND
    watch: Any = gateway.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=HealthCheckRequest.SerializeToString,
        response_deserializer=HealthCheckResponse.FromString,
    )(HealthCheckRequest())
    assert (await watch.read()).status == serving
    await gateway.server.set_serving(False)
    assert (await watch.read()).status == not_serving
    assert (await health_check(gateway, "")).status == not_serving
    await gateway.server.set_serving(True)
    assert (await watch.read()).status == serving


@pytest.mark.parametrize(
    "method",
    [
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/List",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_what_anyone_may_ask_is_held_to_a_few_bytes(gateway: Running, method: str) -> None:
    """Such a call lasts as long as its caller likes, and holds its request."""
    call: Any = gateway.channel.stream_stream(f"/{method}")
    request = HealthCheckRequest(service="x" * MESSAGE_BYTES_MAX).SerializeToString()
    told = await refusal(call(iter([request])).read())
    assert (told.code, told.reason) == (StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


async def test_reflection_knows_the_services_and_their_files(gateway: Running) -> None:
    for version in ("v1", "v1alpha"):
        call: Any = gateway.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )()
        await call.write(ServerReflectionRequest(list_services=""))
        listed = cast("Any", await call.read()).list_services_response.service
        assert {"payments.v1.PaymentService", "grpc.health.v1.Health"} <= {
            each.name for each in listed
        }
        symbol = "payments.v1.PaymentService"
        await call.write(ServerReflectionRequest(file_containing_symbol=symbol))
        assert cast("Any", await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()


# --- draining -------------------------------------------------------------------------------------


async def test_draining_ends_the_streams_of_reflection(gateway: Running) -> None:
    call: Any = gateway.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=ServerReflectionRequest.SerializeToString,
        response_deserializer=ServerReflectionResponse.FromString,
    )()
    await call.write(ServerReflectionRequest(list_services=""))
    await call.read()
    # Sooner than a cancelled receive would end: behind it, the native transport has stopped.
    drained = asyncio.ensure_future(gateway.server.drain(receiving._WAIT_S_MAX * 0.9))
    told = await refusal(call.read())
    assert (told.code, told.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
    await drained


async def test_draining_finishes_what_is_in_flight_and_takes_nothing_more(
    gateway: Running,
) -> None:
    go_on = asyncio.Event()

    async def wait(_: Authorize) -> None:
        await go_on.wait()

    gateway.payments.before = wait
    unary = asyncio.ensure_future(gateway.authorize(authorization()))
    batched = asyncio.ensure_future(batch(gateway, item("b")))
    stream = open_stream(gateway)
    await stream.write(message(item("s")))
    await until(lambda: len(gateway.payments.commands) == 3)
    watching: Any = gateway.channel.unary_stream(
        "/grpc.health.v1.Health/Watch", response_deserializer=HealthCheckResponse.FromString
    )
    watch = watching(b"")
    await watch.read()

    drained = asyncio.ensure_future(gateway.server.drain(PATIENCE_S))
    assert cast("Any", await watch.read()).status == HealthCheckResponse.NOT_SERVING
    told = await refusal(watch.read())
    assert told.code is StatusCode.UNAVAILABLE
    # A late call: refused by our handler, by the transport, or without a listener.
    late = await refusal(gateway.authorize(authorization("late")))
    assert late.code is StatusCode.UNAVAILABLE
    assert late.reason in {"DRAINING", ""}
    assert not drained.done()
    go_on.set()
    assert (await unary).operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
    assert (await batched)[0].HasField("response")
    answer = cast("pb.StreamAuthorizePaymentsResponse", await stream.read())
    assert answer.results[0].item_ref == "s"
    told = await refusal(stream.read())
    assert (told.code, told.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
    await drained
    assert len(gateway.payments.commands) == 3
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", gateway.server.port)) != 0


async def test_draining_ends_after_its_grace_and_leaves_the_work_running(gateway: Running) -> None:
    go_on = asyncio.Event()

    async def wait(_: Authorize) -> None:
        await go_on.wait()

    gateway.payments.before = wait
    call = asyncio.ensure_future(refusal(gateway.authorize(authorization())))
    await until(lambda: len(gateway.payments.commands) == 1)
    await gateway.server.drain(0.1)
    assert (await call).code in {StatusCode.UNAVAILABLE, StatusCode.CANCELLED}
    go_on.set()
    await until(lambda: gateway.payments.finished == ["key-1"])


async def test_native_refuses_while_draining_with_a_retry_hint() -> None:
    async with running("native") as up:
        go_on = asyncio.Event()

        async def wait(_: Authorize) -> None:
            await go_on.wait()

        up.payments.before = wait
        call = asyncio.ensure_future(up.authorize(authorization()))
        await until(lambda: len(up.payments.commands) == 1)
        drained = asyncio.ensure_future(up.server.drain(PATIENCE_S))
        told = await refusal(up.authorize(authorization("late")))
        # It sends no GOAWAY: the connection stays, and our handler refuses.
        assert (told.code, told.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
        assert told.retry_delay_s is not None
        go_on.set()
        await call
        await drained


async def test_a_native_drain_gives_its_last_answers_the_time_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each is more than a server can send at once: it leaves after its handler has ended.
    payload = "x" * 3_900_000
    limits = replace(LIMITS, response_bytes_max=len(payload) * 2)
    async with running("native", limits) as up, contextlib.AsyncExitStack() as stack:
        go_on = asyncio.Event()
        wait_idle = PaymentService.wait_idle

        async def answer(_: Authorize) -> None:
            await go_on.wait()

        async def wait_for_the_last(service: PaymentService) -> None:
            go_on.set()
            await wait_idle(service)

        monkeypatch.setattr(PaymentService, "wait_idle", wait_for_the_last)
        monkeypatch.setattr(server_module, "_FLUSH_S", FLUSH_S)
        up.payments.before = answer
        up.payments.response = pb.AuthorizePaymentResponse()
        up.payments.response.operation.operation_id = payload
        calls = []
        for number in range(CONNECTIONS):
            channel = await stack.enter_async_context(
                aio.insecure_channel(up.target, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            call = PaymentServiceStub(channel).AuthorizePayment
            calls.append(call(authorization(f"key-{number}"), metadata=up.metadata))
        answers = asyncio.gather(*calls)
        await until(lambda: len(up.payments.commands) == CONNECTIONS)
        await up.server.drain(PATIENCE_S)
        for response in await answers:
            assert response.operation.operation_id == payload


# --- a stock client -------------------------------------------------------------------------------

# On grpcio so long that without the pushback trailer no retry comes within the test; native cannot
# send that trailer, so there the client's own pauses apply.
PAUSES = {"grpcio": "3600s", "native": "0.01s"}


def retrying(pause: str) -> str:
    """A service config that pauses so between tries."""
    return json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{"service": "payments.v1.PaymentService"}],
                    "retryPolicy": {
                        "maxAttempts": 4,
                        "initialBackoff": pause,
                        "maxBackoff": pause,
                        "backoffMultiplier": 1,
                        "retryableStatusCodes": ["UNAVAILABLE", "ABORTED", "RESOURCE_EXHAUSTED"],
                    },
                }
            ]
        }
    )


async def test_a_stock_client_obeys_the_pushback_trailer_and_on_native_its_own_policy(
    gateway: Running, transport: Transport
) -> None:
    refusals = [
        GatewayError(Reason.OVERLOADED, "later", retry_after_s=0.01),
        GatewayError(Reason.STORE_UNAVAILABLE, "later", retry_after_s=0.01),
        GatewayError(Reason.CONTENTION, "later", retry_after_s=0.0),
    ]

    async def refuse(command: Authorize) -> None:
        if refusals:
            del gateway.payments.operations[command.merchant_id, command.idempotency_key]
            raise refusals.pop(0)

    gateway.payments.before = refuse
    options = [("grpc.service_config", retrying(PAUSES[transport])), ("grpc.enable_retries", 1)]
    async with aio.insecure_channel(gateway.target, options=options) as channel:
        stub = PaymentServiceStub(channel)
        async with asyncio.timeout(PATIENCE_S):
            await stub.AuthorizePayment(authorization(), metadata=gateway.metadata)
        assert len(gateway.payments.commands) == 4
        # A negative pushback: no retry, though the code is retried otherwise, and on native is.
        method: UnaryMethod = channel.unary_unary("/payments.v1.PaymentService/AuthorizePayment")
        async with asyncio.timeout(PATIENCE_S):
            data = bytes(LIMITS.message_bytes_max + 1)
            told = await refusal(method(data, metadata=gateway.metadata))
        assert told.reason == "MESSAGE_TOO_LARGE"
    tried = [each for each in gateway.observer.calls if each.reason == "MESSAGE_TOO_LARGE"]
    assert len(tried) == (4 if transport == "native" else 1)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ServerOptions(transport="native"), "trusted_front"),
        (
            ServerOptions(
                transport="native",
                trusted_front=True,
                tls_certificate_file="c.pem",
                tls_key_file="k.pem",
            ),
            "TLS",
        ),
        (
            ServerOptions(transport="native", trusted_front=True, connection_age_max_s=60),
            "connection_age_max_s",
        ),
        (ServerOptions(tls_certificate_file="c.pem"), "tls_key_file"),
        (ServerOptions(tls_client_ca_file="c.pem"), "tls_certificate_file"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(
    options: ServerOptions, named: str
) -> None:
    service = PaymentService(
        FakePayments(), Authenticator(Keys().load, AuthLimits()), RecordingObserver(), LIMITS
    )
    with pytest.raises(ServerConfigError, match=named):
        GrpcServer(service, options)


async def test_a_port_in_use_is_refused(transport: Transport) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        service = PaymentService(
            FakePayments(), Authenticator(Keys().load, AuthLimits()), RecordingObserver(), LIMITS
        )
        options = ServerOptions(
            transport=transport,
            trusted_front=True,
            listen_address=f"127.0.0.1:{taken.getsockname()[1]}",
        )
        with pytest.raises(ServerConfigError, match="cannot listen"):
            await GrpcServer(service, options).start()


async def test_keepalive_pings_of_the_server_leave_a_quiet_connection_alone(
    transport: Transport,
) -> None:
    options = ServerOptions(keepalive_time_s=0.05, keepalive_timeout_s=PATIENCE_S)
    async with running(transport, options=options) as up:
        go_on = asyncio.Event()

        async def wait(_: Authorize) -> None:
            await go_on.wait()

        up.payments.before = wait
        call = asyncio.ensure_future(up.authorize(authorization()))
        await asyncio.sleep(0.3)  # a few pings; nothing is measured
        go_on.set()
        assert (await call).operation.operation_id


async def test_grpcio_serves_tls_and_asks_for_client_certificates(tmp_path: Path) -> None:
    ca, certificate, key = await self_signed(tmp_path)
    options = ServerOptions(
        tls_certificate_file=certificate, tls_key_file=key, tls_client_ca_file=ca
    )
    async with running("grpcio", options=options) as up:
        pem = Path(certificate).read_bytes()
        stranger = grpc.ssl_channel_credentials(pem)
        known = grpc.ssl_channel_credentials(pem, Path(key).read_bytes(), pem)
        name = [("grpc.ssl_target_name_override", "localhost")]
        async with aio.secure_channel(up.target, known, options=name) as channel:
            await PaymentServiceStub(channel).AuthorizePayment(
                authorization(), metadata=up.metadata
            )
        for credentials in (stranger, None):
            channel = (
                up.channel
                if credentials is None
                else aio.secure_channel(up.target, credentials, options=name)
            )
            told = await refusal(
                PaymentServiceStub(channel).AuthorizePayment(authorization(), metadata=up.metadata)
            )
            assert told.code is StatusCode.UNAVAILABLE
            await channel.close()


async def self_signed(folder: Path) -> tuple[str, str, str]:
    """A certificate for localhost that is its own authority: authority, certificate, key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    made = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", "1", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await made.wait() == 0
    return str(certificate), str(certificate), str(key)


async def test_native_removes_what_killed_servers_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A short path: sockets' are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        litter = Path(folder, "pygrpc-native-dead")
        litter.mkdir()
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(litter / "fallback.sock"))
        os.utime(litter / "fallback.sock", (0, 0))
        alive = Path(folder, "pygrpc-native-alive")
        alive.mkdir()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(alive / "fallback.sock"))
            listening.listen()
            os.utime(alive / "fallback.sock", (0, 0))
            async with running("native") as up:
                assert (await up.authorize(authorization())).operation.operation_id
            assert not litter.exists()
            assert alive.exists()
        assert [each.name for each in Path(folder).iterdir()] == ["pygrpc-native-alive"]


# --- fuzzing --------------------------------------------------------------------------------------

VALID = (
    ("AuthorizePayment", authorization(metadata={"a": "b"}).SerializeToString()),
    (
        "BatchAuthorizePayments",
        pb.BatchAuthorizePaymentsRequest(items=[item("a"), item("b")]).SerializeToString(),
    ),
    ("VoidPayment", pb.VoidPaymentRequest(idempotency_key="k", payment_id="p").SerializeToString()),
    ("GetOperation", pb.GetOperationRequest(idempotency_key="k").SerializeToString()),
    (
        "ListPayments",
        pb.ListPaymentsRequest(
            page_size=3, page_token="00", states=[payment_pb2.PAYMENT_STATE_AUTHORIZED]
        ).SerializeToString(),
    ),
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A method and bytes: any, or those of a valid message with a few changes."""
    method, valid = draw(st.sampled_from(VALID))
    if draw(st.booleans()):
        return method, draw(st.binary(max_size=200))
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1)) if data else 0
        match draw(st.integers(0, 3)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                data[at:at] = draw(st.binary(max_size=8))
            case 2:
                del data[at : at + draw(st.integers(1, 8))]
            case _:
                del data[at:]
    return method, bytes(data)


async def test_no_bytes_whatever_get_internal_or_unknown(gateway: Running) -> None:
    loop = asyncio.get_running_loop()

    async def call(method: str, data: bytes) -> StatusCode:
        try:
            answer = await gateway.raw(f"/payments.v1.PaymentService/{method}")(
                data, metadata=gateway.metadata
            )
        except aio.AioRpcError as error:
            assert refused(error).reason
            return error.code()
        for result in (
            pb.BatchAuthorizePaymentsResponse.FromString(answer).results
            if method == "BatchAuthorizePayments"
            else ()
        ):
            assert result.error.code not in {
                StatusCode.INTERNAL.value[0],
                StatusCode.UNKNOWN.value[0],
            }
        return StatusCode.OK

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(mutated())
    def fuzz(case: tuple[str, bytes]) -> None:
        code = asyncio.run_coroutine_threadsafe(call(*case), loop).result(PATIENCE_S)
        assert code not in {StatusCode.INTERNAL, StatusCode.UNKNOWN}

    await asyncio.to_thread(fuzz)


# --- what the transports' own refusals look like --------------------------------------------------


def test_a_violation_is_cut_and_counted() -> None:
    violations = [Violation(f"field_{n}", "x" * 500) for n in range(100)]
    error = GatewayError(Reason.INVALID_REQUEST, "wrong", violations=violations)
    from gateway.rpc.error_map import to_status, to_trailers  # noqa: PLC0415

    status = to_status(error)
    size_bytes = sum(len(name) + len(value) * 4 / 3 for name, value in to_trailers(error, status))
    assert size_bytes < 8192
