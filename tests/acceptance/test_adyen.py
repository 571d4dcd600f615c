"""A merchant's payments through Adyen's double, over gRPC, ended by what Adyen tells."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from payments.v1 import payment_method_pb2, payment_pb2

from tests.adyen_double import (
    API_KEY,
    DECLINE_TOKEN,
    HMAC_KEY,
    MERCHANT_ACCOUNT,
    AdyenPsp,
    adyen_psp,
    webhook_of,
)
from tests.connector_accounts import KEY, add_account, notifications_url
from tests.connector_conformance import Fault
from tests.harness import (
    START_TIMEOUT_S,
    Caller,
    authorize_request,
    calling,
    eventually,
    running_system,
)

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CREDENTIALS = {
    "api_key": API_KEY,
    "merchant_account": MERCHANT_ACCOUNT,
    "webhook_secrets": HMAC_KEY,
}
METHODS = {"methods": ["card", "ideal"]}
IN_DOUBT = payment_pb2.OPERATION_STATE_IN_DOUBT
PENDING = payment_pb2.OPERATION_STATE_PENDING
SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED
NOT_SENT = payment_pb2.OPERATION_STATE_NOT_SENT


@dataclass
class Shop:
    """A merchant who calls the gateway, and Adyen, which tells it what happened."""

    psp: AdyenPsp
    caller: Caller
    url: str
    http: aiohttp.ClientSession

    async def authorize(self, capture_method: str = "MANUAL", **more: Any) -> Any:
        return await self.caller.authorize(
            capture_method=capture_method, customer_id="cus_1", **more
        )

    async def tell(self) -> None:
        """Everything that has happened since, each event in a request of its own, and twice."""
        events, self.psp.double.events = self.psp.double.events, []
        for item in events * 2:
            async with self.http.post(
                self.url, data=webhook_of(item), headers={"Content-Type": "application/json"}
            ) as answer:
                assert (answer.status, await answer.read()) == (200, b"[accepted]")

    async def becomes(self, answer: Any, state: Any, *, tell: bool = True) -> None:
        """An answer's operation, in the end; after everything was told, or without that."""
        if tell:
            await self.tell()
        await self.caller.until_state(state, operation_id=answer.operation.operation_id)


async def test_merchants_payments_at_adyen_end_by_what_it_tells_and_doubts_by_the_key(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with adyen_psp() as psp:
        with running_system(
            postgres,
            redis,
            adyen_test_url=psp.way.url,
            adyen_answer_timeout_s=2,
            connector_keys=KEY,
            notifications_address="127.0.0.1:0",
        ) as system:
            account_id = await add_account(
                system.dsn, system.shop.merchant_id, "adyen", CREDENTIALS, capabilities=METHODS
            )
            gateway = await asyncio.to_thread(system.start_gateway)
            url = await notifications_url(gateway, "adyen", account_id)
            timeout = aiohttp.ClientTimeout(total=START_TIMEOUT_S)
            async with (
                calling(gateway, system.shop.api_key) as caller,
                aiohttp.ClientSession(timeout=timeout) as http,
            ):
                shop = Shop(psp, caller, url, http)
                await what_adyen_receives_ends_by_its_notification(shop)
                await customer_pays_at_the_bank(shop)
                await what_was_lost_is_found_by_its_key(shop)
            assert system.fetch("SELECT kind FROM discrepancies") == []
        assert not any(API_KEY in line or HMAC_KEY in line for line in gateway.lines)


async def what_adyen_receives_ends_by_its_notification(shop: Shop) -> None:
    authorized = await shop.authorize()
    assert authorized.operation.state == SUCCEEDED
    assert authorized.payment.connector == "adyen"
    payment_id = authorized.payment.payment_id
    captured = await shop.caller.capture(payment_id, 600)
    assert captured.operation.state == PENDING
    assert captured.payment.amounts.capture_pending_minor == 600
    await shop.becomes(captured, SUCCEEDED)
    refunded = await shop.caller.refund(payment_id, 200)
    assert refunded.operation.state == PENDING
    other = await shop.authorize()
    void = await shop.caller.void(other.payment.payment_id)
    assert void.operation.state == PENDING
    await shop.becomes(refunded, SUCCEEDED)
    await shop.becomes(void, SUCCEEDED)
    payment = (await shop.caller.payment(payment_id)).payment
    assert payment.amounts.captured_minor == 600
    assert payment.amounts.refunded_minor == 200
    assert await shop.psp.held_minor(f"{authorized.operation.operation_id}-1") == 400
    declined = await shop.authorize("AUTOMATIC", token=f"{DECLINE_TOKEN}12")
    assert declined.operation.state == payment_pb2.OPERATION_STATE_DECLINED


async def customer_pays_at_the_bank(shop: Shop) -> None:
    method = payment_method_pb2.PaymentMethod(
        redirect=payment_method_pb2.RedirectPaymentMethod(method_type="ideal")
    )
    request = authorize_request(
        capture_method="AUTOMATIC", customer_id="cus_1", return_url="https://shop.example/back"
    )
    request.payment_method.CopyFrom(method)
    answer = await shop.caller.call("AuthorizePayment", request)
    assert answer.operation.state == payment_pb2.OPERATION_STATE_REQUIRES_ACTION
    assert answer.operation.next_action.redirect_url.startswith("https://checkoutshopper-test.")
    shop.psp.double.come_back(f"{answer.operation.operation_id}-1")
    await shop.becomes(answer, SUCCEEDED)
    payment = (await shop.caller.payment(answer.payment.payment_id)).payment
    assert payment.amounts.captured_minor == 1000


async def what_was_lost_is_found_by_its_key(shop: Shop) -> None:
    way, double = shop.psp.way, shop.psp.double
    manual = await shop.authorize()
    way.disturb(Fault.SILENT)
    charge, capture, voided = await asyncio.gather(
        shop.authorize("AUTOMATIC"),
        shop.caller.capture(manual.payment.payment_id),
        shop.authorize(),
    )
    void = await shop.caller.void(voided.payment.payment_id)
    way.disturb(Fault.SWALLOWED)
    absent = await shop.authorize("AUTOMATIC")
    for doubt in (charge, capture, voided, absent):
        assert doubt.operation.state == IN_DOUBT
    way.clear()
    # Nothing is told yet: the key answers.
    await shop.becomes(charge, SUCCEEDED, tell=False)
    await shop.becomes(capture, PENDING, tell=False)
    await shop.becomes(absent, NOT_SENT, tell=False)
    assert await shop.psp.effects(f"{charge.operation.operation_id}-1") == 1
    # What was voided while in doubt is taken back, and over when Adyen says so.
    reference = f"{voided.operation.operation_id}-1"
    await eventually(lambda: f"{reference}-reversal" in double.effects, "it is taken back")
    await shop.becomes(voided, payment_pb2.OPERATION_STATE_CANCELED)
    await shop.becomes(void, SUCCEEDED, tell=False)
    await shop.becomes(capture, SUCCEEDED, tell=False)
    assert await shop.psp.held_minor(reference) == 0
