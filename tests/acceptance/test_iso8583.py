"""A merchant's payments through an acquirer's host, over gRPC: reversed until the host has said so,
whoever dies meanwhile.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import grpc
import pytest
from payments.v1 import payment_pb2

from gateway.connectors.iso8583.identity import identity_of
from tests.connector_accounts import KEY, add_account
from tests.connector_conformance import Fault
from tests.harness import Caller, System, calling, eventually, new_key, running_system
from tests.iso8583 import FrameWay, frame_way_to, scripted_host
from tests.simulators import running_simulator, standings_of

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.connectors.simulator.launch import SimulatorProcess
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

CREDENTIALS = {"host": "acme", "terminal_id": "TERM0001", "merchant_id": "MERCHANT1"}
STATE = payment_pb2


def specification_in(directory: Path, answer_timeout_s: float = 1.0) -> str:
    """The reference's, of a host that answers in time or not at all, as a file of its own."""
    folder = files("gateway.connectors.iso8583") / "specifications"
    text = (folder / "reference-text.toml").read_text()
    assert "answer_timeout_s = 20.0" in text
    path = directory / "acme.toml"
    path.write_text(
        text.replace("answer_timeout_s = 20.0", f"answer_timeout_s = {answer_timeout_s}")
    )
    return str(path)


def of_reference(way: FrameWay, reference: str) -> list[str]:
    """The types of the messages about a reference."""
    return [message["t"] for message in way.seen if message.get("48") == reference]


async def check_payments(caller: Caller, host: SimulatorProcess) -> None:
    """What goes well, from authorization to refund."""
    answer = await caller.authorize(capture_method="MANUAL")
    assert answer.payment.connector == "iso8583"
    assert answer.operation.state == STATE.OPERATION_STATE_SUCCEEDED
    payment_id = answer.payment.payment_id
    captured = await caller.capture(payment_id, 600)
    assert captured.operation.state == STATE.OPERATION_STATE_SUCCEEDED
    refunded = await caller.refund(payment_id, 200)
    assert refunded.operation.state == STATE.OPERATION_STATE_SUCCEEDED
    first = f"{answer.operation.operation_id}-1"
    (standing,) = await asyncio.to_thread(standings_of, host, first)
    assert (standing.open_minor, standing.net_minor) == (0, 400)
    assert standing.payment_id == payment_id

    voided = await caller.authorize(capture_method="MANUAL")
    void = await caller.void(voided.payment.payment_id)
    assert void.operation.state == STATE.OPERATION_STATE_SUCCEEDED

    sale = await caller.authorize(capture_method="AUTOMATIC")
    assert sale.payment.amounts.captured_minor == 1000
    refunded = await caller.refund(sale.payment.payment_id, 300)
    assert refunded.operation.state == STATE.OPERATION_STATE_SUCCEEDED
    # What is approved in part is not taken: reversed, and told as a decline.
    partly = await caller.authorize(token="tok_partial_approval", capture_method="MANUAL")
    assert partly.operation.state == STATE.OPERATION_STATE_DECLINED
    reference = f"{partly.operation.operation_id}-1"
    await eventually(lambda: _released(host, reference), "a partial approval is reversed")


async def test_reversal_survives_a_killed_gateway_and_is_sent_until_the_host_answers(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    name = specification_in(tmp_path)
    with running_simulator(tmp_path, iso8583_specification=name) as host:
        async with frame_way_to(host.iso8583_url) as way:
            with running_system(
                postgres,
                redis,
                iso8583_hosts=f"acme={way.url}",
                iso8583_reconnect_s_max=0.1,
                connector_keys=KEY,
                send_window_s=1,
            ) as system:
                await add_account(system.dsn, system.shop.merchant_id, "iso8583", CREDENTIALS)
                gateway = await asyncio.to_thread(system.start_gateway)
                key = new_key()
                async with calling(gateway, system.shop.api_key) as caller:
                    await check_payments(caller, host)

                    # The host charges, its answer is lost, and the gateway dies while it waits.
                    way.disturb(Fault.SILENT, times=1)
                    before = len(_sales(way))
                    call = asyncio.ensure_future(
                        caller.authorize(idempotency_key=key, capture_method="AUTOMATIC")
                    )
                    await eventually(lambda: _charged(host, way, before), "the sale is at the host")
                    gateway.kill()
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call
                # Nor do the first reversals arrive.
                way.disturb(Fault.SWALLOWED, times=2)
                other = await asyncio.to_thread(system.start_gateway)
                async with calling(other, system.shop.api_key) as caller:
                    canceled = await caller.until_state(
                        STATE.OPERATION_STATE_CANCELED, idempotency_key=key
                    )
                reference = f"{canceled.operation.operation_id}-1"
                sale, first, *repeated = of_reference(way, reference)
                # A machine that stands still for a while has one more sent.
                assert (sale, first, set(repeated)) == ("0200", "0420", {"0421"})
                assert len(repeated) >= 2
                lost, *reversals = [m for m in way.seen if m.get("48") == reference]
                identity = identity_of(reference, "alphanumeric")
                assert (lost["11"], lost["7"]) == (identity.stan, identity.time)
                assert all(
                    reversal["90"] == f"0200{lost['11']}{lost['7']}{'0' * 22}"
                    for reversal in reversals
                )
                (standing,) = await asyncio.to_thread(standings_of, host, reference)
                assert not standing.stands
                assert not await asyncio.to_thread(system.unfinished)


async def test_what_a_host_answers_late_twice_or_with_another_amount_is_a_fact(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    name = specification_in(tmp_path, answer_timeout_s=2)
    async with scripted_host(name) as (host, address):
        query = urlencode({"specification": name, "mode": "test"})
        with running_system(
            postgres,
            redis,
            iso8583_hosts=f"acme=tcp://127.0.0.1:{address.port}?{query}",
            connector_keys=KEY,
            send_window_s=1,
        ) as system:
            await add_account(system.dsn, system.shop.merchant_id, "iso8583", CREDENTIALS)
            patient = await asyncio.to_thread(system.start_gateway, recovery_first_check_s=60)
            async with calling(patient, system.shop.api_key) as caller:
                # Late, before its reversal has begun, and with another amount: it stands.
                doubt = await caller.authorize(capture_method="MANUAL")
                assert doubt.operation.state == STATE.OPERATION_STATE_IN_DOUBT
                line, request = await host.request()
                line.answer(request, de4=f"{1300:012}", de38="A00001")
                late = await caller.until_state(
                    STATE.OPERATION_STATE_SUCCEEDED, operation_id=doubt.operation.operation_id
                )
                assert late.payment.amounts.authorized_minor == 1000
                assert await _discrepancies(system, late) == [("authorized_amount", "1000", "1300")]

                # A second answer with another amount.
                call = asyncio.ensure_future(caller.authorize(capture_method="MANUAL"))
                line, request = await host.request()
                line.answer(request)
                line.answer(request, de4=f"{1400:012}")
                twice = await call
                assert twice.operation.state == STATE.OPERATION_STATE_SUCCEEDED
                told = [("late_amount", "1000", "1400")]
                await eventually(lambda: _told(system, twice) == told, "the second amount is shown")

            gateway = await asyncio.to_thread(system.start_gateway)
            async with calling(gateway, system.shop.api_key) as caller:
                # Late, when its reversal found nothing: it is taken back after all.
                doubt = await caller.authorize(capture_method="MANUAL")
                line, request = await host.request()
                # Either process may reverse; what comes late comes to the one that sent it.
                reversing, reversal = await host.request()
                assert reversal["t"] == "0420"
                reversing.answer(reversal, "25")
                await caller.until_state(
                    STATE.OPERATION_STATE_NOT_SENT, operation_id=doubt.operation.operation_id
                )
                line.answer(request, de38="A00003")
                reversing, again = await host.request()
                assert again == reversal
                reversing.answer(again)
                payment_id = doubt.payment.payment_id
                found = await eventually(lambda: _reversed(caller, payment_id), "it is taken back")
                assert [each.kind for each in found.operations] == [
                    STATE.OPERATION_KIND_AUTHORIZE,
                    STATE.OPERATION_KIND_REVERSAL,
                ]
                assert [kind for kind, *_ in await _discrepancies(system, doubt)] == [
                    "late_success"
                ]
                assert not await asyncio.to_thread(system.unfinished)


def _told(system: System, answer: Any) -> list[tuple[str, str, str]]:
    rows = system.fetch(
        "SELECT kind, expected, reported FROM discrepancies WHERE payment_id = $1",
        answer.payment.payment_id,
    )
    return [tuple(row) for row in rows]


async def _discrepancies(system: System, answer: Any) -> list[tuple[str, str, str]]:
    return await asyncio.to_thread(_told, system, answer)


async def _reversed(caller: Caller, payment_id: str) -> Any:
    """The payment, once its reversal has succeeded."""
    found = await caller.payment(payment_id)
    ended = [each.state == STATE.OPERATION_STATE_SUCCEEDED for each in found.operations[1:]]
    return found if ended and all(ended) else None


def _sales(way: FrameWay) -> list[str]:
    """The references of all sales that came, refunds left out."""
    return [message["48"] for message in way.seen if message["t"] == "0200" and "47" in message]


def _charged(host: SimulatorProcess, way: FrameWay, before: int) -> bool:
    sales = _sales(way)[before:]
    return bool(sales) and bool(standings_of(host, sales[0]))


def _released(host: SimulatorProcess, reference: str) -> bool:
    (standing,) = standings_of(host, reference)
    return not standing.stands
