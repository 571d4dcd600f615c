"""A merchant's payments through Braintree's double, over gRPC: charged, found, or in doubt."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
from payments.v1 import payment_pb2

from tests.braintree_double import PRIVATE_KEY, PUBLIC_KEY, braintree_psp
from tests.braintree_events import about, form, signed, transaction
from tests.connector_accounts import KEY, add_account, notifications_url
from tests.connector_conformance import Fault
from tests.harness import calling, eventually, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CREDENTIALS = {
    "public_key": PUBLIC_KEY,
    "private_key": PRIVATE_KEY,
    "merchant_accounts": "EUR=shop_eur",
}


async def tell(url: str, xml: str) -> int:
    """Send a notification, as Braintree does; the status."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(url, data=form(*signed(xml)), headers=headers) as answer,
    ):
        return answer.status


async def test_merchants_payments_go_to_braintree_and_what_is_not_found_stays_in_doubt(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with braintree_psp() as psp:
        with running_system(
            postgres,
            redis,
            braintree_sandbox_url=psp.way.url,
            braintree_answer_timeout_s=2,
            connector_keys=KEY,
            notifications_address="127.0.0.1:0",
        ) as system:
            account_id = await add_account(
                system.dsn, system.shop.merchant_id, "braintree", CREDENTIALS
            )
            gateway = await asyncio.to_thread(system.start_gateway)
            url = await notifications_url(gateway, "braintree", account_id)
            async with calling(gateway, system.shop.api_key) as caller:
                answer = await caller.authorize(capture_method="MANUAL")
                assert answer.payment.connector == "braintree"
                payment_id = answer.payment.payment_id
                captured = await caller.capture(payment_id, 600)
                refunded = await caller.refund(payment_id, 200)
                for told in (answer, captured, refunded):
                    assert told.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
                assert await psp.held_minor(f"{answer.operation.operation_id}-1") == 400

                reference = f"{refunded.operation.operation_id}-1"
                bounced = transaction(
                    type="credit",
                    status="processor_declined",
                    amount="2.00",
                    order_id=f"{reference}-refund",
                )
                assert await tell(url, about("refund_failed", bounced)) == 200
                await caller.until_state(
                    payment_pb2.OPERATION_STATE_FAILED, operation_id=refunded.operation.operation_id
                )

                async def lose(fault: Fault) -> str:
                    """A sale whose answer or request is lost; its operation."""
                    psp.way.disturb(fault)
                    lost = await caller.authorize(capture_method="AUTOMATIC")
                    assert lost.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
                    psp.way.clear()
                    return str(lost.operation.operation_id)

                operation_id = await lose(Fault.SILENT)
                await caller.until_state(
                    payment_pb2.OPERATION_STATE_SUCCEEDED, operation_id=operation_id
                )
                operation_id = await lose(Fault.SWALLOWED)
                asked = partial(psp.double.searched.count, f"{operation_id}-1")
                await eventually(lambda: asked() > 1, "it was asked about twice")
                told = await caller.operation(operation_id=operation_id)
                assert told.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
        assert not any(PRIVATE_KEY in line for line in gateway.lines)
