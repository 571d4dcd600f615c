"""A gateway killed between storing a notification and applying it: another one applies it, once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp
import asyncpg
import pytest
from payments.v1 import payment_pb2

from gateway.application.notifications import Result
from tests.connector_accounts import notifications_url
from tests.harness import START_TIMEOUT_S, calling, eventually
from tests.stripe_double import ACTION_TOKEN
from tests.stripe_events import event_of, refund_of, sign
from tests.stripe_webhooks import SECRET, stripe

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED


@pytest.mark.parametrize("what", ["completion", "refund"])
async def test_what_was_stored_before_a_kill_is_applied_once_by_the_next_gateway(
    what: str, postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe(postgres, redis) as (psp, caller, gateway):
        waiting = await caller.authorize(
            token=ACTION_TOKEN, capture_method="MANUAL", return_url="https://shop.test/back"
        )
        payment_id = waiting.payment.payment_id
        [intent] = psp.psp.double.intents.values()
        completed = intent | {
            "status": "requires_capture",
            "amount_capturable": 1000,
            "next_action": None,
        }
        intent |= completed
        if what == "refund":
            assert (
                await psp.tell("payment_intent.amount_capturable_updated", intent, "evt_0") == 200
            )
            await eventually(lambda: psp.applied("evt_0"), "the payment is authorized")
            await caller.capture(payment_id)
        # Whoever applies it waits for the payment's row: so it is stored, and not applied.
        blocker = await asyncpg.connect(psp.system.dsn)
        async with blocker.transaction():
            await blocker.execute(
                "SELECT FROM payments WHERE payment_id = $1 FOR UPDATE", payment_id
            )
            if what == "refund":
                told = await psp.tell("refund.created", refund_of(payment_intent=intent["id"]), "e")
            else:
                told = await psp.tell("payment_intent.amount_capturable_updated", intent, "e")
            assert told == 200
            await eventually(
                lambda: psp.system.fetch(
                    "SELECT 1 FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                ),
                "somebody applies it",
            )
            assert psp.applied("e") == []
            gateway.kill()
        await blocker.close()

        second = await asyncio.to_thread(psp.system.start_gateway)
        await eventually(lambda: psp.applied("e"), "the next gateway has applied it")
        async with calling(second, psp.system.shop.api_key) as caller_after:
            payment = await caller_after.payment(payment_id)
        assert [each.state for each in payment.operations[:1]] == [SUCCEEDED]
        refunds = [
            each for each in payment.operations if each.kind == payment_pb2.OPERATION_KIND_REFUND
        ]
        assert len(refunds) == (1 if what == "refund" else 0)
        reported = psp.system.fetch("SELECT refunded_reported_minor FROM payments")
        assert [row[0] for row in reported] == [250 if what == "refund" else None]
        [done] = psp.applied("e")
        assert done["result"] in (Result.APPLIED, Result.RECORDED, Result.NO_NEWS)
        assert psp.system.fetch("SELECT 1 FROM pending_notifications") == []


async def test_the_same_event_at_two_gateways_at_once_has_one_effect(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe(postgres, redis) as (psp, caller, _):
        second = await asyncio.to_thread(psp.system.start_gateway)
        other = replace(psp, url=await notifications_url(second, "stripe", psp.account_id))
        charged = await caller.authorize(capture_method="AUTOMATIC")
        [intent] = psp.psp.double.intents.values()
        refund = refund_of(payment_intent=intent["id"])
        events = [f"evt_{n}" for n in range(5)]
        statuses = await asyncio.gather(
            *(
                door.tell("refund.created", refund, event_id)
                for event_id in events
                for door in (psp, other) * 4
            )
        )
        assert set(statuses) == {200}
        await eventually(
            lambda: all(psp.applied(event_id) for event_id in events), "all are done with"
        )
        payment = await caller.payment(charged.payment.payment_id)
        refunds = [
            each for each in payment.operations if each.kind == payment_pb2.OPERATION_KIND_REFUND
        ]
        assert [each.amount.amount_minor for each in refunds] == [250]
        assert len(psp.system.fetch("SELECT 1 FROM discrepancies")) == 1
        assert len(psp.system.fetch("SELECT 1 FROM notifications")) == len(events)


async def test_nothing_is_acknowledged_before_it_is_committed(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with stripe(postgres, redis) as (psp, caller, _):
        await caller.authorize(capture_method="AUTOMATIC")
        [intent] = psp.psp.double.intents.values()
        body = event_of("refund.created", refund_of(payment_intent=intent["id"]), event_id="e")
        blocker = await asyncpg.connect(psp.system.dsn)
        headers = {
            "Stripe-Signature": sign(body, SECRET, int(time.time())),
            "Content-Type": "application/json",
        }
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE notifications IN ACCESS EXCLUSIVE MODE")
            call = asyncio.ensure_future(psp.http.post(psp.url, data=body, headers=headers))
            waits = (
                "SELECT 1 FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            await eventually(lambda: psp.system.fetch(waits), "it waits for the table")
            assert not call.done()
        await blocker.close()
        async with asyncio.timeout(START_TIMEOUT_S):
            answer: aiohttp.ClientResponse = await call
        assert answer.status == 200
        answer.release()
        assert len(psp.system.fetch("SELECT 1 FROM notifications")) == 1
