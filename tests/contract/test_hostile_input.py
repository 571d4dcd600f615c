"""Hostile and odd input over both transports against a real gateway; TLS, health and reflection."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payments.v1 import payment_service_pb2

from tests.chaos import frames
from tests.harness import (
    SERVICE,
    System,
    asyncio_run,
    authorize_request,
    calling,
    eur,
    eventually,
    new_key,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

DATA = Path(__file__).resolve().parents[1] / "data"
UNARY = [method.name for method in SERVICE.methods if method.name != "StreamAuthorizePayments"]
LINES_PER_S = 10_000
"""More than tests can make: each finds its own."""
NO_WINDOW = b"\0\4\0\0\0\0"
"""The setting that a client takes no byte of an answer (SETTINGS_INITIAL_WINDOW_SIZE)."""
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}


@pytest.fixture(scope="module", params=["grpcio", "native"])
def system(
    request: pytest.FixtureRequest, postgres: PostgresForTests, redis: EmbeddedRedis
) -> Iterator[System]:
    with running_system(postgres, redis) as running:
        running.start_gateway(
            transport=request.param,
            trusted_front=True,
            message_bytes_max=65536,
            log_refusals_per_s_max=LINES_PER_S,
        )
        yield running


async def _raw(system: System, method: str, data: bytes) -> grpc.StatusCode:
    """The status of a unary call with these bytes as its message."""
    async with grpc.aio.insecure_channel(system.gateways[0].address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/{SERVICE.full_name}/{method}"
        )
        try:
            await call(
                data,
                metadata=(("authorization", f"Bearer {system.shop.api_key}"),),
                timeout=30,
            )
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _valid(method: str) -> bytes:
    request = (
        authorize_request(amount_minor=1234, merchant_order_id="order", metadata={"a": "b"})
        if method == "AuthorizePayment"
        else payment_service_pb2.CapturePaymentRequest(
            idempotency_key=new_key(), payment_id="pay_1", amount=eur(5)
        )
    )
    return request.SerializeToString()


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(UNARY),
    data=st.binary(max_size=200),
    cut=st.integers(0, 100),
    keep=st.booleans(),
)
def test_no_bytes_are_answered_internal_or_unknown(
    system: System, method: str, data: bytes, cut: int, keep: bool
) -> None:
    valid = _valid(method)
    mutated = valid[:cut] + data + valid[cut:] if keep else data
    assert asyncio_run(lambda: _raw(system, method, mutated)) not in NEVER


async def test_an_oversized_message_is_refused_without_a_retry(system: System) -> None:
    large = authorize_request(metadata={"a": "x" * 70_000}).SerializeToString()
    code = await _raw(system, "AuthorizePayment", large)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    huge = authorize_request(metadata={"a": "x" * 500_000}).SerializeToString()
    assert await _raw(system, "AuthorizePayment", huge) is grpc.StatusCode.RESOURCE_EXHAUSTED
    # Text that only pretends to be compressed is a message like any other.
    assert await _raw(system, "AuthorizePayment", gzip.compress(b"x" * 10_000)) not in NEVER


async def test_oversized_metadata_harm_no_later_call(system: System) -> None:
    async with calling(system.gateways[0], system.shop.api_key) as caller:
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.stub.AuthorizePayment(
                authorize_request(),
                metadata=(*caller.metadata, ("x-large", "x" * 40_000)),
                timeout=30,
            )
        assert (await caller.authorize()).payment.amounts.authorized_minor == 1000


async def test_headers_that_are_no_text_are_not_logged(system: System) -> None:
    gateway, request_id = system.gateways[0], new_key()
    address, _, port = gateway.address.rpartition(":")
    reader, writer = await asyncio.open_connection(address, int(port))
    block = frames.call_headers(f"/{SERVICE.full_name}/GetPayment", "none", 30)
    block += frames.header_block([("x-request-id", request_id)]) + b"\x00\x01a\x02n\xff" * 200
    try:
        writer.write(
            frames.PREFACE
            + frames.frame(frames.SETTINGS, 0, 0, b"")
            + frames.frame(frames.HEADERS, frames.END_HEADERS, 1, block)
            + frames.frame(frames.DATA, frames.END_STREAM, 1, bytes(5))
        )
        await eventually(lambda: request_id in gateway.log, "the call is answered")
    finally:
        writer.close()
        reader.feed_eof()
    assert "Invalid encoding" not in gateway.log
    assert "\\xff" not in gateway.log


async def test_a_stream_that_is_reset_while_it_is_written_to_is_not_logged_as_an_error(
    system: System,
) -> None:
    gateway, request_id, later_id = system.gateways[0], new_key(), new_key()
    address, _, port = gateway.address.rpartition(":")
    _, writer = await asyncio.open_connection(address, int(port))
    path = f"/{SERVICE.full_name}/StreamAuthorizePayments"
    block = frames.call_headers(path, system.shop.api_key, 30)
    block += frames.header_block([("x-request-id", request_id)])
    item = payment_service_pb2.AuthorizePaymentItem(item_ref="refused")
    data = payment_service_pb2.StreamAuthorizePaymentsRequest(items=[item]).SerializeToString()
    try:
        writer.write(
            frames.PREFACE
            + frames.frame(frames.SETTINGS, 0, 0, NO_WINDOW)
            + frames.frame(frames.HEADERS, frames.END_HEADERS, 1, block)
            + frames.frame(frames.DATA, 0, 1, b"\0" + len(data).to_bytes(4, "big") + data)
        )
        await eventually(lambda: request_id in gateway.log, "the item is refused")
        writer.write(frames.frame(frames.RST_STREAM, 0, 1, frames.CANCEL))
        await eventually(lambda: gateway.log.count(request_id) == 2, "the call is abandoned")
    finally:
        writer.close()
    async with calling(gateway.address, system.shop.api_key) as caller:
        metadata = (*caller.metadata, ("x-request-id", later_id))
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.stub.GetPayment(
                payment_service_pb2.GetPaymentRequest(), metadata=metadata, timeout=30
            )
    await eventually(lambda: later_id in gateway.log, "the later call is logged")
    assert '"level":"ERROR"' not in gateway.log


async def test_each_broken_field_has_a_violation_of_its_own(system: System) -> None:
    request = authorize_request(amount_minor=-1, idempotency_key="\x01", token="4242")
    request.amount.currency_code = "XXX"
    async with calling(system.gateways[0], system.shop.api_key) as caller:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.call("AuthorizePayment", request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_REQUEST"


async def test_health_is_served_for_the_server_and_the_service(system: System) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE.full_name):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="no.Such"), timeout=30)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_service(system: System) -> None:
    async with grpc.aio.insecure_channel(system.gateways[0].address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(timeout=30)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        listed = {service.name for service in answer.list_services_response.service}
    assert SERVICE.full_name in listed


async def test_with_tls_settings_only_tls_is_answered(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            tls_certificate_file=DATA / "localhost.pem", tls_key_file=DATA / "localhost.key"
        )
        address = gateway.address
        credentials = grpc.ssl_channel_credentials((DATA / "localhost.pem").read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                f"/{SERVICE.full_name}/AuthorizePayment"
            )
            data = await call(
                authorize_request().SerializeToString(),
                metadata=(("authorization", f"Bearer {system.shop.api_key}"),),
                timeout=30,
            )
            answer = payment_service_pb2.AuthorizePaymentResponse.FromString(data)
            assert answer.payment.amounts.authorized_minor == 1000
        async with calling(address, system.shop.api_key) as caller:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await caller.authorize()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_handshake_that_fails_leaves_no_line_that_is_no_json(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            tls_certificate_file=DATA / "localhost.pem", tls_key_file=DATA / "localhost.key"
        )
        address, _, port = gateway.address.rpartition(":")
        reader, writer = await asyncio.open_connection(address, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.read()  # until it is hung up on
        writer.close()
        assert await asyncio.to_thread(gateway.stop) == 0
    for line in gateway.lines:
        json.loads(line)
