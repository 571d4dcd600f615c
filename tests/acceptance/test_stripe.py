"""A merchant's payments through Stripe's double, over gRPC: added, charged, lost, recovered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from payments.v1 import money_pb2, payment_method_pb2, payment_pb2

from tests.connector_accounts import KEY, add_account
from tests.connector_conformance import Fault
from tests.harness import (
    Caller,
    authorize_request,
    calling,
    eventually,
    reason_of,
    running_system,
)
from tests.stripe_double import DECLINE_TOKEN, SECRET_KEY, stripe_psp

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CREDENTIALS = {"secret_key": SECRET_KEY}
SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED


async def test_merchants_payments_go_to_stripe_and_doubts_are_recovered(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe_psp() as psp:
        with running_system(
            postgres,
            redis,
            stripe_url=psp.way.url,
            stripe_answer_timeout_s=2,
            connector_keys=KEY,
            connector_accounts_interval_s=0.1,
        ) as system:
            gateway = await asyncio.to_thread(system.start_gateway)
            async with calling(gateway, system.shop.api_key) as caller:
                at_first = await caller.authorize()
                assert at_first.payment.connector == "simulator"
                account_id = await add_account(
                    system.dsn, system.shop.merchant_id, "stripe", CREDENTIALS
                )

                async def at_stripe() -> Any:
                    answer = await caller.authorize(capture_method="MANUAL")
                    return answer if answer.payment.connector == "stripe" else None

                answer = await eventually(at_stripe, "the account is used without a restart")
                assert answer.operation.state == SUCCEEDED
                payment_id = answer.payment.payment_id
                captured = await caller.capture(payment_id, 600)
                assert captured.operation.state == SUCCEEDED
                refunded = await caller.refund(payment_id, 200)
                assert refunded.operation.state == SUCCEEDED
                reference = f"{answer.operation.operation_id}-1"
                assert await psp.held_minor(reference) == 400
                # What was begun with the simulator ends there.
                assert (await caller.void(at_first.payment.payment_id)).payment.connector == (
                    "simulator"
                )

                declined = await caller.authorize(
                    token=f"{DECLINE_TOKEN}insufficient_funds", capture_method="AUTOMATIC"
                )
                assert declined.operation.state == payment_pb2.OPERATION_STATE_DECLINED
                await refusals(caller)

                psp.way.disturb(Fault.SILENT)
                lost = await caller.authorize(capture_method="AUTOMATIC")
                assert lost.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
                psp.way.clear()
                found = await caller.until_state(
                    SUCCEEDED, operation_id=lost.operation.operation_id
                )
                assert found.payment.amounts.captured_minor == 1000
                assert await psp.effects(f"{lost.operation.operation_id}-1") == 1

                manual = await caller.authorize(capture_method="MANUAL")
                psp.way.disturb(Fault.SILENT)
                lost_capture = await caller.capture(manual.payment.payment_id)
                assert lost_capture.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
                psp.way.clear()
                await caller.until_state(
                    SUCCEEDED, operation_id=lost_capture.operation.operation_id
                )
            rows = system.fetch("SELECT DISTINCT connector_account_id FROM payments")
            assert {row[0] for row in rows} == {account_id, system.shop.merchant_id}
        assert not any(SECRET_KEY in line for line in gateway.lines)


async def test_customers_pay_elsewhere_through_stripe_or_are_waited_for_no_longer(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe_psp() as psp:
        with running_system(
            postgres,
            redis,
            stripe_url=psp.way.url,
            connector_keys=KEY,
            action_timeout_s=1,
            recovery_action_margin_s=0,
        ) as system:
            methods = {"methods": ["card", "ideal", "pix", "sepa_debit"]}
            await add_account(
                system.dsn, system.shop.merchant_id, "stripe", CREDENTIALS, capabilities=methods
            )
            gateway = await asyncio.to_thread(system.start_gateway)
            async with calling(gateway, system.shop.api_key) as caller:
                # The bank does not hear of the customer: Stripe cancels, since the gateway asks.
                ideal = await caller.call("AuthorizePayment", elsewhere("ideal", "EUR"))
                assert ideal.operation.state == payment_pb2.OPERATION_STATE_REQUIRES_ACTION
                assert ideal.operation.next_action.redirect_url.startswith("https://hooks.stripe")
                found = await caller.until_state(
                    payment_pb2.OPERATION_STATE_EXPIRED, operation_id=ideal.operation.operation_id
                )
                assert found.payment.state == payment_pb2.PAYMENT_STATE_EXPIRED
                intent = psp.double.intents[ideal.operation.attempts[0].connector_transaction_id]
                assert intent["status"] == "canceled"

                # Stripe says until when: the customer has that time, and pays.
                pix = await caller.call("AuthorizePayment", elsewhere("pix", "BRL"))
                assert pix.operation.next_action.qr_code.data.startswith("0002")
                psp.double.customer_pays(
                    psp.double.intents[pix.operation.attempts[0].connector_transaction_id]
                )
                found = await caller.until_state(SUCCEEDED, operation_id=pix.operation.operation_id)
                assert found.payment.state == payment_pb2.PAYMENT_STATE_CAPTURED

                # A direct debit has no customer to wait for, and no end but the bank's.
                request = elsewhere("ideal", "EUR")
                request.payment_method.stored.stored_payment_method_id = "pm_sepa"
                request.payment_method.stored.method_type = "sepa_debit"
                debit = await caller.call("AuthorizePayment", request)
                assert debit.operation.state == payment_pb2.OPERATION_STATE_PENDING
                psp.double.customer_pays(
                    psp.double.intents[debit.operation.attempts[0].connector_transaction_id]
                )
                await caller.until_state(SUCCEEDED, operation_id=debit.operation.operation_id)

                # The account was not set up for it.
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await caller.call("AuthorizePayment", elsewhere("eps", "EUR"))
                assert reason_of(caught.value) == "METHOD_NOT_SUPPORTED"
            assert system.unfinished() == []


def elsewhere(method: str, currency: str) -> Any:
    """A payment that a customer makes elsewhere."""
    request = authorize_request(capture_method="AUTOMATIC", return_url="https://shop.example/back")
    request.amount.currency_code = currency
    request.payment_method.redirect.method_type = method
    return request


async def refusals(caller: Caller) -> None:
    """What Stripe, or this account, cannot do is refused before anything is written."""
    method = payment_method_pb2.PaymentMethod(
        network_token=payment_method_pb2.NetworkToken(token_reference="x")
    )
    kuwait = money_pb2.Money(amount_minor=1005, currency_code="KWD")
    unidad = money_pb2.Money(amount_minor=1000, currency_code="CLF")
    for reason, fields in (
        ("CURRENCY_NOT_SUPPORTED", {"amount": unidad}),
        ("AMOUNT_NOT_SUPPORTED", {"amount": kuwait}),
        ("FIELD_NOT_SUPPORTED", {"payment_method": method}),
        ("FIELD_NOT_SUPPORTED", {}),  # several captures, which the account cannot do
    ):
        request = authorize_request(capture_method="MANUAL" if fields else "MANUAL_MULTIPLE")
        for name, value in fields.items():
            getattr(request, name).CopyFrom(value)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.call("AuthorizePayment", request)
        assert reason_of(caught.value) == reason
