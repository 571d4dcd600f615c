"""What the simulator tells, late, twice and in any order, ends and records what it is about."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from payments.v1 import payment_pb2

from gateway.connectors.simulator.journal import Standing
from tests.connector_accounts import KEY, add_account, notifications_url
from tests.harness import calling, eventually, running_system
from tests.simulators import standings_of

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, System
    from tests.servers import PostgresForTests

SECRET = "whsec_simulator_0123456789"
SUCCEEDED = payment_pb2.OPERATION_STATE_SUCCEEDED
IN_DOUBT = payment_pb2.OPERATION_STATE_IN_DOUBT


async def test_what_the_simulator_tells_completes_and_records_once_in_any_order(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    """Of a PSP that cannot be asked, so that its word is all there is."""
    with running_system(
        postgres,
        redis,
        profile="no_query",
        connector_keys=KEY,
        notifications_address="127.0.0.1:0",
    ) as system:
        psp = system.simulator
        account_id = await add_account(
            system.dsn,
            system.shop.merchant_id,
            "simulator",
            {"url": psp.url, "profile": "no_query", "webhook_secrets": SECRET},
        )
        gateway = await asyncio.to_thread(system.start_gateway)
        where = urlsplit(await notifications_url(gateway, "simulator", account_id))
        control = system.control
        await control.notify(
            f"http://{where.netloc}", SECRET, p50_ms=20, p99_ms=400, duplicate_percent=100
        )
        async with calling(gateway, system.shop.api_key) as caller:
            await _check(system, caller)
        state = await control.state()
        assert state["notifications"]["dropped"] == 0
        await control.close()
    rows = [line for line in gateway.lines if "a notification was refused" in line]
    assert rows == []


async def _check(system: System, caller: Caller) -> None:
    # What is pending ends without anybody's looking; an answer that was lost is told after all.
    pending, lost = await asyncio.gather(
        caller.authorize(token="tok_pending", capture_method="MANUAL"),
        caller.authorize(token="tok_reset_always", capture_method="MANUAL"),
    )
    assert lost.operation.state == IN_DOUBT
    assert pending.operation.state == payment_pb2.OPERATION_STATE_PENDING
    for each in (pending, lost):
        await caller.until_state(SUCCEEDED, operation_id=each.operation.operation_id)

    # A refund that its bank returns.
    bouncing = await caller.authorize(token="tok_refund_bounces", capture_method="AUTOMATIC")
    refund = await caller.refund(bouncing.payment.payment_id, 300)
    await caller.until_state(
        payment_pb2.OPERATION_STATE_FAILED, operation_id=refund.operation.operation_id
    )

    # What somebody does in the PSP's console, and a dispute, are operations of its origin.
    charged = await caller.authorize(capture_method="AUTOMATIC")
    reference = f"{charged.operation.operation_id}-1"
    control = system.control
    answer = await control.operate("refund", reference, 250)
    assert answer["result"] == "approved"
    await control.dispute(reference, 1000)
    await control.dispute(reference, 1000, "LOST")
    await control.close()
    found = await eventually(lambda: _told(caller, charged.payment.payment_id), "both are recorded")
    kinds = {each.kind: each.amount.amount_minor for each in found.operations[2:]}
    assert kinds == {
        payment_pb2.OPERATION_KIND_REFUND: 250,
        payment_pb2.OPERATION_KIND_DISPUTE: 1000,
    }
    [standing] = await asyncio.to_thread(standings_of, system.simulator, reference)
    assert isinstance(standing, Standing)
    assert standing.net_minor == 750
    assert not await asyncio.to_thread(system.unfinished)


async def _told(caller: Caller, payment_id: str) -> Any:
    """The payment, once the refund and the lost dispute are there."""
    found = await caller.payment(payment_id)
    elsewhere = [each for each in found.operations if each.origin == _PSP]
    ended = all(each.state == SUCCEEDED for each in elsewhere)
    return found if len(elsewhere) == 2 and ended else None


_PSP = payment_pb2.OPERATION_ORIGIN_PSP
