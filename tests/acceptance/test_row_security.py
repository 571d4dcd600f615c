"""A gateway behind the second wall: everything goes on as without it, recovery too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from payments.v1 import payment_pb2, payment_service_pb2

from storage.postgres import row_security
from tests.harness import Caller, authorize_request, eur, new_key, running_system

if TYPE_CHECKING:
    from collections.abc import Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import System
    from tests.servers import PostgresForTests


@pytest.fixture
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    with running_system(postgres, redis, postgres_row_security=True) as running:
        yield running


async def test_without_its_roles_and_policies_the_gateway_does_not_start(system: System) -> None:
    gateway = system.start_gateway()
    assert gateway.wait() != 0
    assert "gateway row-security enable" in gateway.log


async def test_payments_live_their_whole_life_behind_the_wall(system: System) -> None:
    await row_security.enable(system.dsn)
    service = payment_service_pb2
    gateway = system.start_gateway()
    async with grpc.aio.insecure_channel(await gateway.serving()) as channel:
        caller = Caller(channel, system.shop.api_key)
        request = authorize_request()
        authorized = await caller.call("AuthorizePayment", request)
        payment_id = authorized.payment.payment_id
        again = await caller.call("AuthorizePayment", request)
        assert again.replay.replayed
        captured = await caller.call(
            "CapturePayment",
            service.CapturePaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(400)
            ),
        )
        assert captured.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
        refunded = await caller.call(
            "RefundPayment",
            service.RefundPaymentRequest(
                idempotency_key=new_key(), payment_id=payment_id, amount=eur(100)
            ),
        )
        assert refunded.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
        read = await caller.call("GetPayment", service.GetPaymentRequest(payment_id=payment_id))
        assert len(read.operations) == 3
        found = await caller.call(
            "GetOperation", service.GetOperationRequest(idempotency_key=request.idempotency_key)
        )
        assert found.operation.operation_id == authorized.operation.operation_id
        page = await caller.call("ListPayments", service.ListPaymentsRequest())
        assert [each.payment_id for each in page.payments] == [payment_id]

        # What the PSP's answer did not reach, recovery settles: over all merchants.
        doubtful = await caller.authorize(token="tok_timeout_after_charge")
        assert doubtful.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
        while True:
            settled = await caller.call(
                "GetOperation",
                service.GetOperationRequest(operation_id=doubtful.operation.operation_id),
            )
            if settled.operation.state != payment_pb2.OPERATION_STATE_IN_DOUBT:
                break
    assert gateway.stop() == 0
    assert '"level":"ERROR"' not in gateway.log
