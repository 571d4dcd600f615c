"""A merchant's payments through Braintree's double, over gRPC: charged, found, or in doubt."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp
from payments.v1 import payment_pb2

from tests.braintree_double import PRIVATE_KEY, PUBLIC_KEY, braintree_psp
from tests.braintree_events import about, form, signed, transaction
from tests.connector_accounts import KEY, add_account
from tests.connector_conformance import Fault
from tests.harness import START_TIMEOUT_S, Caller, GatewayProcess, calling, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CREDENTIALS = {
    "public_key": PUBLIC_KEY,
    "private_key": PRIVATE_KEY,
    "merchant_accounts": "EUR=shop_eur",
}


async def tell(gateway: GatewayProcess, account_id: str, xml: str) -> int:
    """Send a notification, as Braintree does; the status."""
    told = [line for line in list(gateway.lines) if '"message":"notifications are taken"' in line]
    port = json.loads(told[0])["port"]
    url = f"http://127.0.0.1:{port}/v1/notifications/braintree/{account_id}"
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(url, data=form(*signed(xml)), headers=headers) as answer,
    ):
        return answer.status


async def becomes(caller: Caller, before: Any, state: int) -> None:
    """Wait until an operation has a state."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            told = await caller.operation(operation_id=before.operation.operation_id)
            if told.operation.state == state:
                return
            await asyncio.sleep(0.05)


async def test_merchants_payments_go_to_braintree_and_what_is_not_found_stays_in_doubt(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with braintree_psp() as psp:
        with running_system(
            postgres,
            redis,
            braintree_sandbox_url=psp.way.url,
            braintree_answer_timeout_s=1,
            connector_keys=KEY,
            notifications_address="127.0.0.1:0",
        ) as system:
            account_id = await add_account(
                system.dsn, system.shop.merchant_id, "braintree", CREDENTIALS
            )
            gateway = await asyncio.to_thread(system.start_gateway)
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
                assert await tell(gateway, account_id, about("refund_failed", bounced)) == 200
                await becomes(caller, refunded, payment_pb2.OPERATION_STATE_FAILED)

                states = {}
                for fault in (Fault.SILENT, Fault.SWALLOWED):
                    psp.way.disturb(fault)
                    lost = await caller.authorize(capture_method="AUTOMATIC")
                    assert lost.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
                    operation_id = lost.operation.operation_id
                    psp.way.clear()
                    async with asyncio.timeout(START_TIMEOUT_S):
                        while True:
                            asked = psp.double.searched.count(f"{operation_id}-1")
                            told = await caller.operation(operation_id=operation_id)
                            settled = told.operation.state != lost.operation.state
                            if settled or asked > 1:
                                break
                            await asyncio.sleep(0.05)
                    states[fault] = told.operation.state
                assert states == {
                    Fault.SILENT: payment_pb2.OPERATION_STATE_SUCCEEDED,
                    Fault.SWALLOWED: payment_pb2.OPERATION_STATE_IN_DOUBT,
                }
        assert not any(PRIVATE_KEY in line for line in gateway.lines)
