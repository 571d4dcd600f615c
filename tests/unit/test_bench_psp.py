from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from gateway.application.ports import ConnectorRequest
from gateway.connectors.simulator.latency import Latency
from gateway.domain.model import Delivery, OperationKind, Verdict
from loadtest.bench.psp import InProcessPsp

REQUEST = ConnectorRequest(OperationKind.AUTHORIZE, "op_1-1", 1000, "EUR", "account", "pay_1")


async def test_without_a_delay_it_approves_without_a_turn_of_the_loop() -> None:
    sending = InProcessPsp(Latency()).send(REQUEST, time.monotonic() + 10)
    with pytest.raises(StopIteration) as ended:
        sending.send(None)
    answer = ended.value.value
    assert answer.verdict is Verdict.APPROVED
    assert answer.delivery is Delivery.ANSWERED
    assert answer.connector_transaction_id == "txn_op_1-1"


async def test_nothing_is_sent_when_it_is_too_late() -> None:
    answer = await InProcessPsp(Latency()).send(REQUEST, time.monotonic() - 1)
    assert answer.delivery is Delivery.NOT_SENT


async def test_delays_are_told_and_have_the_median_that_was_asked_for() -> None:
    psp = InProcessPsp(Latency(2.0, 4.0))
    answers = await asyncio.gather(*(psp.send(REQUEST, time.monotonic() + 10) for _ in range(1001)))
    delays_ms = [answer.processing_ms or 0.0 for answer in answers]
    assert 1.8 < statistics.median(delays_ms) < 2.2
    assert 3.4 < sorted(delays_ms)[990] < 4.8
