"""The generator's parts: every intended send leaves one sample, and Locust shows it as it was."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from payments.v1.money_pb2 import Money
from payments.v1.payment_pb2 import Operation, OperationState
from payments.v1.payment_service_pb2 import GetOperationRequest, GetOperationResponse

from loadtest.audit import audit_by_calls
from loadtest.calls import CONTRADICTED, OK, SERVICE, UNKNOWN, Acknowledged
from loadtest.engine import Chunk, Target
from loadtest.measures import Analysis
from loadtest.plan import API_KEY_VARIABLE, Plan
from loadtest.samples import unpack_samples

GUARD_S = 40.0
TORN = b"\x0a\xff"
"""A field that is longer than its message."""


@asynccontextmanager
async def serving(answer: Callable[[bytes, Any], Awaitable[bytes]]) -> AsyncIterator[str]:
    """The address of a server that answers so."""
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "AuthorizePayment": grpc.unary_unary_rpc_method_handler(answer)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def sent_to(
    answer: Callable[[bytes, Any], Awaitable[bytes]], plan: Plan
) -> tuple[Analysis, dict[str, int], list[str]]:
    """What came of a plan at a server that answers so: figures, reasons, acknowledged lines."""
    chunks: list[Chunk] = []
    async with serving(answer) as address:
        await plan.engine(address, 0).run(chunks.append)
    reasons: dict[str, int] = {}
    for chunk in chunks:
        for reason, count in chunk.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    samples = b"".join(chunk.samples for chunk in chunks)
    lines = b"".join(chunk.acknowledged for chunk in chunks).decode().splitlines()
    return Analysis(unpack_samples(samples), plan.schedule.segments), reasons, lines


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    return Plan(rate=100, duration=1, warm_up=0, run_id="run", merchants="mer_a", control=True)


@pytest.mark.parametrize("rate", [0.01, 100])
async def test_stop_waits_for_answers_and_for_no_further_send(plan: Plan, rate: float) -> None:
    async def answer(_request: bytes, _context: object) -> bytes:
        return b""

    chunks: list[Chunk] = []
    async with serving(answer) as address:
        # Of the lower rate nothing is intended for 50 s.
        engine = replace(plan, rate=rate, duration=10_000, arrivals="constant").engine(address, 0)

        def take(chunk: Chunk) -> None:
            chunks.append(chunk)
            engine.stop()

        async with asyncio.timeout(GUARD_S):
            await engine.run(take)
    samples = list(unpack_samples(b"".join(chunk.samples for chunk in chunks)))
    assert {sample.code for sample in samples} <= {OK}
    assert (len(samples) > 0) == (rate > 1)
    assert chunks[-1].due == len(samples)


async def test_answer_that_does_not_parse_is_an_error_and_unknown(plan: Plan) -> None:
    calls = 0

    async def answer(_request: bytes, _context: object) -> bytes:
        nonlocal calls
        calls += 1
        return TORN if calls % 5 == 0 else b""

    analysis, reasons, lines = await sent_to(answer, plan)
    intended = len(list(plan.schedule.arrivals()))
    torn = intended // 5
    assert calls == intended
    assert analysis.whole.codes == {OK: intended - torn, CONTRADICTED: torn}
    assert sum(reasons.values()) == torn
    assert [line.split("\t")[5] for line in lines] == [str(-UNKNOWN)] * torn


async def test_refusal_whose_details_do_not_parse_is_counted(plan: Plan) -> None:
    async def answer(_request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", TORN),))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        return b""

    analysis, reasons, _ = await sent_to(answer, plan)
    intended = len(list(plan.schedule.arrivals()))
    assert analysis.whole.codes == {grpc.StatusCode.UNAVAILABLE.value[0]: intended}
    assert reasons == {"UNAVAILABLE, details that do not parse": intended}


def test_audit_by_calls_repeats_what_is_refused_for_a_while(tmp_path: Path) -> None:
    calls: Counter[str] = Counter()

    def get_operation(data: bytes, context: Any) -> bytes:
        key = GetOperationRequest.FromString(data).idempotency_key
        calls[key] += 1
        if calls[key] == 1:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "later")
        operation = Operation(
            idempotency_key=key,
            operation_id=f"op_{key}",
            payment_id=f"pay_{key}",
            state=OperationState.OPERATION_STATE_SUCCEEDED,
            amount=Money(amount_minor=100, currency_code="EUR"),
        )
        return GetOperationResponse(operation=operation).SerializeToString()

    # In threads: the audit has an event loop of its own.
    server = grpc.server(ThreadPoolExecutor(1))
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "GetOperation": grpc.unary_unary_rpc_method_handler(get_operation)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    told = [
        Acknowledged("AUTHORIZE", "mer_a", key, f"op_{key}", f"pay_{key}", 4, 100, "digest")
        for key in ("k1", "k2", "k3")
    ]
    target = Target(f"127.0.0.1:{port}", "key", connections=1)
    try:
        audit = audit_by_calls(told, target, tmp_path / "audit.sqlite")
    finally:
        server.stop(0).wait()
    assert audit.clean
    assert (audit.acked, audit.missing) == (3, 0)
    assert set(calls.values()) == {2}


ENTERED = """
import json
from loadtest.locustfile import enter
from locust.stats import RequestStats
from loadtest.calls import DROPPED, OK
from loadtest.samples import Sample
stats = RequestStats()
for code, latency_ms in ((OK, 40.0), (OK, 60.0), (14, 50.0), *[(DROPPED, 0.0)] * 7):
    enter(stats, Sample(0.0, 0.0, latency_ms, latency_ms, 0, 0, code))
total = stats.total
print(json.dumps([total.num_requests, total.num_failures, total.get_response_time_percentile(0.5)]))
"""
"""In a process of its own: Locust patches the one that imports it."""


def test_dropped_sends_are_errors_and_no_quick_answers_in_locust_s_statistics() -> None:
    said = subprocess.run(
        [sys.executable, "-c", ENTERED], capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout) == [3, 8, 50]
