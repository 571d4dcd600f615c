"""What Stripe tells over HTTP is taken, applied to payments made over gRPC, and told to people."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from click.testing import CliRunner
from payments.v1 import payment_pb2

from gateway.cli import main
from tests.harness import eventually
from tests.stripe_double import ACTION_TOKEN
from tests.stripe_events import refund_of
from tests.stripe_webhooks import OLD_SECRET, SECRET, Stripe, stripe

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, System
    from tests.servers import PostgresForTests


async def test_what_stripe_tells_completes_and_records_once_and_payments_go_on(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe(postgres, redis, notifications_per_s_max=40) as (psp, caller, gateway):
        # What waits for its customer is completed.
        waiting = await caller.authorize(
            token=ACTION_TOKEN, capture_method="MANUAL", return_url="https://shop.test/back"
        )
        assert waiting.operation.state == payment_pb2.OPERATION_STATE_REQUIRES_ACTION
        [intent] = psp.psp.double.intents.values()
        intent |= {"status": "requires_capture", "amount_capturable": 1000, "next_action": None}
        assert await psp.tell("payment_intent.amount_capturable_updated", intent, "evt_a") == 200
        await eventually(lambda: psp.applied("evt_a"), "the authorization is told")
        told = await caller.operation(operation_id=waiting.operation.operation_id)
        assert told.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED

        # A refund in the dashboard, told many times at once, by both secrets, is one operation.
        payment_id = waiting.payment.payment_id
        await caller.capture(payment_id)
        refund = refund_of(payment_intent=intent["id"])
        statuses = await asyncio.gather(
            *(
                psp.tell("refund.created", refund, "evt_r", secret=(SECRET, OLD_SECRET)[n % 2])
                for n in range(20)
            )
        )
        assert set(statuses) == {200}
        await eventually(lambda: psp.applied("evt_r"), "the refund is recorded")
        [row] = psp.applied("evt_r")
        assert row["payment_id"] == payment_id
        assert await psp.tell("refund.updated", refund, "evt_r2") == 200
        await eventually(lambda: psp.applied("evt_r2"), "told otherwise, too")
        payment = (await caller.payment(payment_id)).payment
        assert payment.amounts.captured_minor == 1000
        assert payment.amounts.refunded_minor == 0
        [refunded] = [
            each
            for each in (await caller.payment(payment_id)).operations
            if each.kind == payment_pb2.OPERATION_KIND_REFUND
        ]
        assert refunded.origin == payment_pb2.OPERATION_ORIGIN_PSP
        assert refunded.amount.amount_minor == 250

        # So is a dispute; and what nobody knows is kept.
        dispute = {
            "object": "dispute",
            "id": "dp_1",
            "amount": 1000,
            "currency": "eur",
            "status": "needs_response",
            "reason": "fraudulent",
            "payment_intent": intent["id"],
        }
        assert await psp.tell("charge.dispute.created", dispute, "evt_d") == 200
        assert await psp.tell("brand.new", {"object": "brand"}, "evt_n") == 200
        await eventually(
            lambda: psp.applied("evt_d") and psp.applied("evt_n"), "both are done with"
        )
        kinds = [each.kind for each in (await caller.payment(payment_id)).operations]
        assert kinds.count(payment_pb2.OPERATION_KIND_DISPUTE) == 1
        rows = psp.system.fetch("SELECT kind FROM discrepancies ORDER BY created_at")
        assert [row[0] for row in rows] == ["refund_elsewhere", "dispute"]

        await flood(psp, caller)
        await people(psp)
        assert not any(SECRET in line or "fraudulent" in line for line in gateway.lines)


async def flood(psp: Stripe, caller: Caller) -> None:
    """Forgeries are refused, most of them by their number; payments are served meanwhile."""
    forged = asyncio.gather(
        *(psp.tell("x.y", {}, f"evt_f{n}", secret="forged" * 4) for n in range(150))
    )
    answers = await asyncio.gather(*(caller.authorize(capture_method="MANUAL") for _ in range(20)))
    assert {each.operation.state for each in answers} == {payment_pb2.OPERATION_STATE_SUCCEEDED}
    refused = Counter(await forged)
    assert refused.keys() <= {400, 429, 503}
    assert refused[429] + refused[503] > 0
    assert psp.system.fetch("SELECT 1 FROM notifications WHERE event_id LIKE 'evt_f%'") == []


async def people(psp: Stripe) -> None:
    """The command line shows what came, and has one applied again; the books are in order."""
    merchant = ("--merchant", psp.system.shop.merchant_id)
    listed = await command(psp.system, "notifications", "list", *merchant)
    assert "evt_r  stripe" in listed
    assert "RECORDED" in listed
    unknown = await command(psp.system, "notifications", "list", *merchant, "--result", "unknown")
    assert "evt_n" in unknown
    assert "evt_r" not in unknown
    assert '"re_1"' in await command(psp.system, "notifications", "show", *merchant, "evt_r")
    assert "is due" in await command(psp.system, "notifications", "apply", *merchant, "evt_r")
    await eventually(lambda: psp.applied("evt_r"), "it is applied again")
    absent = await command(psp.system, "notifications", "show", *merchant, "evt_0")
    assert "has no notification" in absent
    assert "payments, 0 findings" in await command(psp.system, "verify", *merchant)


async def command(system: System, *arguments: str) -> str:
    """What `gateway …` says."""
    environment = {"GATEWAY_POSTGRES_DSN": system.dsn}
    ran = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=environment)
    return ran.output


async def test_workers_share_the_port_for_notifications(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe(postgres, redis, workers=2) as (psp, _, gateway):

        def ports() -> set[int]:
            marked = '"message":"notifications are taken"'
            lines = [json.loads(line) for line in list(gateway.lines) if marked in line]
            return {line["port"] for line in lines} if len(lines) == 2 else set()

        await eventually(lambda: ports() == {urlsplit(psp.url).port}, "both take them on one port")
        statuses = [await psp.tell("brand.new", {}, f"evt_{n % 5}") for n in range(30)]
        assert set(statuses) == {200}
        await eventually(
            lambda: all(psp.applied(f"evt_{n}") for n in range(5)), "all are done with"
        )
