"""Customers who pay elsewhere: sent on, noticed when they paid, cancelled when they did not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import grpc
import pytest
from payments.v1 import money_pb2, payment_method_pb2, payment_pb2

from tests.harness import (
    Caller,
    authorize_request,
    bytes_without_replay,
    calling,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

REQUIRES_ACTION = payment_pb2.OPERATION_STATE_REQUIRES_ACTION
PENDING = payment_pb2.OPERATION_STATE_PENDING
SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED
DECLINED = payment_pb2.OPERATION_STATE_DECLINED
CANCELED = payment_pb2.OPERATION_STATE_CANCELED
EXPIRED = payment_pb2.OPERATION_STATE_EXPIRED


@pytest.fixture(scope="module", params=["grpcio", "native"])
def shop(
    request: pytest.FixtureRequest, postgres: PostgresForTests, redis: EmbeddedRedis
) -> Iterator[tuple[System, GatewayProcess]]:
    with running_system(postgres, redis, transport=request.param, trusted_front=True) as system:
        yield system, system.start_gateway()


@pytest.fixture
async def caller(shop: tuple[System, GatewayProcess]) -> Any:
    system, gateway = shop
    async with calling(gateway, system.shop.api_key) as opened:
        yield opened


def redirecting(method: str = "ideal", currency: str = "EUR", **more: Any) -> Any:
    """A request whose customer pays elsewhere."""
    fields: dict[str, Any] = {"country_code": "NL"}
    fields |= more.pop("redirect", {})
    request = authorize_request(capture_method=more.pop("capture_method", "AUTOMATIC"), **more)
    request.amount.CopyFrom(money_pb2.Money(amount_minor=1000, currency_code=currency))
    request.payment_method.redirect.CopyFrom(
        payment_method_pb2.RedirectPaymentMethod(method_type=method, **fields)
    )
    if "return_url" not in more:
        request.return_url = "https://shop.example/back"
    return request


async def choose(page: str, outcome: str) -> int:
    """The customer presses a button on the page."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{page}/{outcome}", allow_redirects=False) as answer,
    ):
        return answer.status


def page_of(answer: Any) -> str:
    action = answer.operation.next_action
    assert action.HasField("expires_at")
    page: str = action.redirect_url or action.qr_code.data
    return page


async def test_a_customer_pays_at_the_bank_and_is_refunded(
    shop: tuple[System, GatewayProcess], caller: Caller
) -> None:
    request = redirecting()
    answer = await caller.call("AuthorizePayment", request)
    assert answer.operation.state == REQUIRES_ACTION
    assert answer.payment.state == payment_pb2.PAYMENT_STATE_REQUIRES_ACTION
    assert answer.payment.payment_method.redirect.method_type == "ideal"
    assert await choose(page_of(answer), "approve") == 303
    found = await caller.until_state(SUCCEEDED, operation_id=answer.operation.operation_id)
    assert not found.operation.HasField("next_action")
    assert found.payment.state == payment_pb2.PAYMENT_STATE_CAPTURED
    # The first answer is the answer to the key; what is, GetOperation tells.
    repeated = await caller.call("AuthorizePayment", request)
    assert repeated.replay.replayed
    assert bytes_without_replay(repeated) == bytes_without_replay(answer)
    refund = await caller.refund(answer.payment.payment_id, 400)
    assert refund.operation.state == SUCCEEDED
    system, _ = shop
    events = system.fetch(
        "SELECT event_type FROM outbox WHERE payment_id = $1 ORDER BY payment_version, seq",
        answer.payment.payment_id,
    )
    assert [event for (event,) in events] == [
        "authorize.requires_action",
        "authorize.succeeded",
        "capture.succeeded",
        "refund.succeeded",
    ]


@pytest.mark.parametrize(
    ("method", "currency", "redirect", "outcome", "state"),
    [
        ("ideal", "EUR", {"bank": "ing"}, "decline", DECLINED),
        ("pix", "BRL", {"country_code": "BR"}, "later", SUCCEEDED),
        (
            "p24",
            "PLN",
            {"country_code": "PL", "customer_email": "ada@shop.example"},
            "approve",
            SUCCEEDED,
        ),
    ],
)
async def test_what_the_customer_does_is_noticed_without_a_notification(
    caller: Caller,
    method: str,
    currency: str,
    redirect: dict[str, str],
    outcome: str,
    state: int,
) -> None:
    answer = await caller.call("AuthorizePayment", redirecting(method, currency, redirect=redirect))
    assert answer.operation.state == REQUIRES_ACTION
    assert answer.operation.next_action.HasField("qr_code") == (method == "pix")
    assert await choose(page_of(answer), outcome) == 303
    found = await caller.until_state(state, operation_id=answer.operation.operation_id)
    captured = 1000 if state == SUCCEEDED else 0
    assert found.payment.amounts.captured_minor == captured


async def test_a_void_cancels_what_waits_for_its_customer(caller: Caller) -> None:
    answer = await caller.call("AuthorizePayment", redirecting())
    void = await caller.void(answer.payment.payment_id)
    assert void.operation.state == PENDING
    found = await caller.until_state(CANCELED, operation_id=answer.operation.operation_id)
    assert found.payment.state == payment_pb2.PAYMENT_STATE_CANCELED
    assert await choose(page_of(answer), "approve") == 409
    await caller.until_state(SUCCEEDED, operation_id=void.operation.operation_id)


async def test_the_psps_end_of_a_customers_time_is_noticed(
    shop: tuple[System, GatewayProcess], caller: Caller
) -> None:
    answer = await caller.call("AuthorizePayment", redirecting())
    control = shop[0].control
    await control.advance_clock(3600)
    await control.close()
    found = await caller.until_state(EXPIRED, operation_id=answer.operation.operation_id)
    assert found.payment.state == payment_pb2.PAYMENT_STATE_EXPIRED
    assert await choose(page_of(answer), "approve") == 409


@pytest.mark.parametrize(
    ("reason", "request_"),
    [
        ("METHOD_NOT_SUPPORTED", redirecting("twint")),
        ("COUNTRY_NOT_SUPPORTED", redirecting(redirect={"country_code": "BE"})),
        ("CURRENCY_NOT_SUPPORTED", redirecting(currency="PLN")),
        ("FIELD_NOT_SUPPORTED", redirecting(capture_method="MANUAL")),
        ("FIELD_REQUIRED", redirecting("p24", redirect={"country_code": "PL"})),
        ("INVALID_REQUEST", redirecting("cash")),
        ("INVALID_REQUEST", redirecting(return_url="")),
    ],
    # Requests have random keys, and every worker has to name a test the same.
    ids=["method", "country", "currency", "capture", "field", "unknown", "nowhere"],
)
async def test_a_method_that_cannot_be_used_so_is_refused_with_its_reason(
    shop: tuple[System, GatewayProcess], caller: Caller, reason: str, request_: Any
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.call("AuthorizePayment", request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == reason
    system, _ = shop
    key = request_.idempotency_key
    assert system.fetch("SELECT FROM operations WHERE idempotency_key = $1", key) == []


def test_the_audit_finds_nothing_whatever_customers_did(
    shop: tuple[System, GatewayProcess],
) -> None:
    system, _ = shop
    audit = ["verify", "--psp-journal", str(system.simulator.journal)]
    system.run_python(f"from gateway.cli import main; raise SystemExit(main({audit}))")
