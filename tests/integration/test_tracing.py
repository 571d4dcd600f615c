"""Traces as a collector receives them: a call's spans, its batches', and what they never say."""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import grpc
import pytest
from payments.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    routing_service_pb2,
    routing_service_pb2_grpc,
)
from payments.v1 import payment_service_pb2 as pb
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from storage.postgres.accounts import Accounts
from tests.collectors import Collector, Listener, closed_port
from tests.harness import authorize_request, calling, new_key, running_system
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from storage.embedded import EmbeddedRedis
    from tests.collectors import Received
    from tests.harness import Caller, GatewayProcess, System
    from tests.servers import PostgresForTests

SERVICE = "payments.v1.PaymentService"
METHOD = f"{SERVICE}/AuthorizePayment"
STAGES = ("claim", "intent", "psp simulator", "outcome")
LANE_OF = {
    "claim": "batch redis-claim",
    "intent": "batch intents",
    "outcome": "batch changes",
}
ATTRIBUTES = {
    "rpc.system.name",
    "rpc.method",
    "rpc.response.status_code",
    "error.type",
    "gateway.reason",
    "gateway.request_id",
    "gateway.payment_id",
    "gateway.merchant_id",
    "gateway.replayed",
    "gateway.claim",
    "gateway.stored",
    "gateway.operation.id",
    "gateway.operation.kind",
    "gateway.operation.state",
    "gateway.connector",
    "gateway.attempt.reference",
    "gateway.psp.delivery",
    "gateway.psp.verdict",
    "gateway.lane",
    "gateway.batch.rows",
}
"""All that a span may say."""


class Traced:
    """A gateway that is traced, its collector, and what stands between it and its PSP."""

    def __init__(
        self,
        system: System,
        gateway: GatewayProcess,
        collector: Collector,
        psp: Listener,
        caller: Caller,
    ) -> None:
        self.system = system
        self.gateway = gateway
        self.collector = collector
        self.psp = psp
        self.caller = caller

    async def authorize(
        self, traceparent: str = "", headers: tuple[tuple[str, str], ...] = (), **fields: Any
    ) -> Any:
        more = (("traceparent", traceparent),) if traceparent else ()
        return await self.caller.stub.AuthorizePayment(
            authorize_request(**fields),
            metadata=(*self.caller.metadata, *more, *headers),
            timeout=30,
        )

    async def received(self, name: str, count: int = 1) -> list[Received]:
        """The spans of this name, once so many have come."""
        collector = self.collector

        def some() -> list[Received] | None:
            spans = collector.named(name)
            return spans if len(spans) >= count else None

        what = f"{count} spans {name}"
        spans: list[Received] = await asyncio.to_thread(collector.wait_for, some, what)
        assert len(spans) == count
        return spans

    async def stop(self) -> int:
        """Drain the gateway; its exit status. All spans have come then."""
        return await asyncio.to_thread(self.gateway.stop)


@asynccontextmanager
async def tracing(
    postgres: PostgresForTests, redis: EmbeddedRedis, **settings: object
) -> AsyncIterator[Traced]:
    """A gateway that traces every call, unless the settings say otherwise."""
    async with AsyncExitStack() as stack:
        system: System = stack.enter_context(running_system(postgres, redis))
        collector, psp = Collector(), Listener(system.simulator.url)
        stack.enter_context(collector.running())
        stack.enter_context(psp.running())
        values: dict[str, object] = {
            "tracing_endpoint": collector.endpoint,
            "tracing_sample_ratio": 1,
            "simulator_url": psp.url,
            "simulator_answer_timeout_s": 20,
            **settings,
        }
        if values.get("transport") == "native":
            values["trusted_front"] = True
        gateway = system.start_gateway(**values)
        address = await gateway.serving()
        caller = await stack.enter_async_context(calling(address, system.shop.api_key))
        try:
            yield Traced(system, gateway, collector, psp, caller)
        finally:
            collector.released.set()


def a_caller(flags: str = "01") -> tuple[str, str, str]:
    """A caller's header, its trace's id and its span's."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace_id}-{span_id}-{flags}", trace_id, span_id


# --- what a call leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_a_call_continues_its_callers_trace_through_its_stages_and_on_to_the_psp(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    async with tracing(
        postgres, redis, transport=transport, tracing_sample_ratio=0, tracing_service_name="gw-test"
    ) as traced:
        header, trace_id, span_id = a_caller()
        answer = await traced.authorize(header, (("tracestate", "vendor=a1,other=b2"),))
        assert await traced.stop() == 0
        [server] = traced.collector.named(METHOD)
        assert (server.trace_id, server.parent_id) == (trace_id, span_id)
        assert server.trace_state == "vendor=a1,other=b2"
        assert server.service_name == "gw-test"
        assert server.attributes["rpc.response.status_code"] == "OK"
        assert server.attributes["gateway.payment_id"] == answer.payment.payment_id
        assert not server.is_error
        for name in STAGES:
            [stage] = traced.collector.named(name)
            assert (stage.trace_id, stage.parent_id) == (trace_id, server.span_id), name
            assert 0 < stage.duration_ns < server.duration_ns
        [psp] = traced.collector.named("psp simulator")
        [head] = traced.psp.heads
        assert head["traceparent"] == f"00-{trace_id}-{psp.span_id}-01"
        assert head["tracestate"] == "vendor=a1,other=b2"


async def test_a_batch_is_a_trace_of_its_own_linked_to_the_spans_whose_rows_it_carried(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with tracing(postgres, redis) as traced:
        calls = 20
        await asyncio.gather(*(traced.authorize() for _ in range(calls)))
        assert await traced.stop() == 0
        collector = traced.collector
        assert len(collector.named(METHOD)) == calls
        assert len({span.trace_id for span in collector.named(METHOD)}) == calls
        for stage, lane in LANE_OF.items():
            batches = collector.named(lane)
            assert sum(int(str(each.attributes["gateway.batch.rows"])) for each in batches) == calls
            links = [link for batch in batches for link in batch.links]
            stages = [(span.trace_id, span.span_id) for span in collector.named(stage)]
            assert sorted(links) == sorted(stages)
            assert not {batch.trace_id for batch in batches} & {trace for trace, _ in stages}
            assert not any(batch.parent_id for batch in batches)


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_an_item_of_a_batch_or_stream_has_a_span_around_its_stages(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    items = [
        pb.AuthorizePaymentItem(item_ref=str(number), authorization=authorize_request())
        for number in range(3)
    ]
    async with tracing(postgres, redis, transport=transport) as traced:
        caller = traced.caller
        request = pb.BatchAuthorizePaymentsRequest(items=items)
        await caller.call("BatchAuthorizePayments", request)
        stream = caller.stub.StreamAuthorizePayments(metadata=caller.metadata)
        for item in items:
            item.authorization.idempotency_key = new_key()
        await stream.write(pb.StreamAuthorizePaymentsRequest(items=items))
        await stream.done_writing()
        assert sum([len(message.results) async for message in stream]) == 3
        assert await traced.stop() == 0
        collector = traced.collector
        for method in ("BatchAuthorizePayments", "StreamAuthorizePayments"):
            [server] = collector.named(f"{SERVICE}/{method}")
            spans = collector.named(f"{SERVICE}/{method}/item")
            assert [each.parent_id for each in spans] == 3 * [server.span_id]
            of_items = {each.span_id for each in spans}
            for stage in STAGES:
                parents = {each.parent_id for each in collector.named(stage)}
                assert of_items <= parents, stage


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_calls_to_operate_it_are_traced_as_payments_are(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    async with tracing(postgres, redis, transport=transport, tracing_sample_ratio=0) as traced:
        shop = traced.system.shop
        async with Accounts.connect(traced.system.dsn) as accounts:
            scopes = ("payments:admin", "routing:read")
            key = await accounts.create_key(shop.organisation_id, scopes=scopes, mode="test")
        header, trace_id, span_id = a_caller()
        sent: dict[str, Any] = {
            "metadata": (("authorization", f"Bearer {key.text}"), ("traceparent", header)),
            "timeout": 30,
        }
        admin = admin_service_pb2_grpc.AdminServiceStub(traced.caller.channel)
        routing = routing_service_pb2_grpc.RoutingServiceStub(traced.caller.channel)
        await admin.ListInDoubt(admin_service_pb2.ListInDoubtRequest(), **sent)
        request = admin_service_pb2.VerifyInvariantsRequest()
        assert [each async for each in admin.VerifyInvariants(request, **sent)]
        await routing.ListConnectors(
            routing_service_pb2.ListConnectorsRequest(merchant_id=shop.merchant_id), **sent
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await routing.GetRoutingRules(
                routing_service_pb2.GetRoutingRulesRequest(merchant_id=shop.merchant_id), **sent
            )
        assert await traced.stop() == 0
        reasons = {
            "AdminService/ListInDoubt": None,
            "AdminService/VerifyInvariants": None,
            "RoutingService/ListConnectors": None,
            "RoutingService/GetRoutingRules": "ROUTING_RULES_NOT_FOUND",
        }
        for name, reason in reasons.items():
            [server] = traced.collector.named(f"payments.v1.{name}")
            assert (server.trace_id, server.parent_id) == (trace_id, span_id)
            assert server.attributes["rpc.method"] == f"payments.v1.{name}"
            code = "OK" if reason is None else "NOT_FOUND"
            assert server.attributes["rpc.response.status_code"] == code
            assert server.attributes["gateway.request_id"]
            assert server.attributes.get("gateway.reason") == reason
        lines = [line for line in traced.gateway.lines if '"call finished"' in line]
        assert [json.loads(line).get("trace_id") for line in lines] == [trace_id] * len(reasons)


async def test_how_a_call_ended_and_why_stands_in_its_span(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with tracing(postgres, redis, simulator_answer_timeout_s=2) as traced:
        key = new_key()
        await traced.authorize(idempotency_key=key)
        with pytest.raises(Exception, match="another payload"):
            await traced.authorize(idempotency_key=key, amount_minor=2)
        await traced.authorize(token="tok_declined_insufficient_funds")
        await traced.authorize(token="tok_timeout_after_charge")
        assert await traced.stop() == 0
        calls = [each.attributes for each in traced.collector.named(METHOD)]
        codes = sorted(str(each["rpc.response.status_code"]) for each in calls)
        assert codes == ["ALREADY_EXISTS", "OK", "OK", "OK"]
        reasons = [each["gateway.reason"] for each in calls if "gateway.reason" in each]
        assert reasons == ["IDEMPOTENCY_KEY_REUSED"]
        asked = [each.attributes for each in traced.collector.named("psp simulator")]
        told = [(each["gateway.psp.delivery"], each["gateway.psp.verdict"]) for each in asked]
        assert sorted(told) == [
            ("ANSWERED", "APPROVED"),
            ("ANSWERED", "DECLINED"),
            ("MAY_HAVE_BEEN_SENT", "UNKNOWN"),
        ]


# --- what is traced -------------------------------------------------------------------------------


async def test_the_caller_decides_whether_a_call_is_traced_and_chance_where_it_does_not(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with tracing(postgres, redis) as traced:  # ratio 1
        header, refused_trace, refused_span = a_caller("00")
        await traced.authorize(header)
        await traced.authorize()
        [server] = await traced.received(METHOD)
        assert server.trace_id != refused_trace
        assert server.parent_id == ""
        passed_on, own = (head["traceparent"] for head in traced.psp.heads)
        assert passed_on == f"00-{refused_trace}-{refused_span}-00"
        assert own.startswith(f"00-{server.trace_id}-")
        assert own.endswith("-01")
        await traced.stop()
        assert not [each for each in traced.collector.spans if each.trace_id == refused_trace]


async def test_a_call_that_is_not_traced_leaves_no_span_and_no_link(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with tracing(postgres, redis, tracing_sample_ratio=0) as traced:
        await asyncio.gather(*(traced.authorize() for _ in range(5)))
        assert {head["traceparent"][-3:] for head in traced.psp.heads} == {"-00"}
        assert len({head["traceparent"] for head in traced.psp.heads}) == 5
        header, trace_id, _ = a_caller()
        await asyncio.gather(traced.authorize(header), *(traced.authorize() for _ in range(5)))
        await traced.stop()
        batches = [each for each in traced.collector.spans if each.name.startswith("batch ")]
        assert {trace for each in batches for trace, _ in each.links} == {trace_id}
        assert all(each.links for each in batches)
        assert len(traced.collector.named(METHOD)) == 1


async def test_no_more_calls_are_traced_in_a_second_than_may_be(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with tracing(postgres, redis, tracing_calls_per_s_max=1) as traced:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(20):
            await traced.authorize(a_caller()[0])
        seconds = loop.time() - begun
        await traced.stop()
        assert 1 <= len(traced.collector.named(METHOD)) <= seconds + 1


# --- what they never say --------------------------------------------------------------------------


@pytest.mark.parametrize("merchant", [False, True])
async def test_spans_say_ids_and_outcomes_and_nothing_of_the_request(
    postgres: PostgresForTests, redis: EmbeddedRedis, merchant: bool
) -> None:
    async with tracing(postgres, redis, tracing_merchant_id=merchant) as traced:
        key = "key-of-a-customer"
        pan = "4111 1111 1111 1111"
        state = (("tracestate", "vendor=4111111111111111"),)
        await traced.authorize(
            a_caller()[0],
            state,
            idempotency_key=key,
            amount_minor=4_242_434_243,
            merchant_order_id="order-of-a-customer",
        )
        with pytest.raises(Exception, match=r"card"):
            await traced.authorize(merchant_order_id=pan)
        with pytest.raises(Exception, match=r"card"):
            await traced.authorize(headers=(("x-request-id", pan.replace(" ", "")),))
        await traced.caller.call("ListPayments", pb.ListPaymentsRequest(page_size=5))
        assert await traced.stop() == 0
        spans = traced.collector.spans
        assert {name for span in spans for name in span.attributes} <= ATTRIBUTES
        text = "\n".join(span.text for span in spans)
        numbers = ("4242434243", "4111 1111", "41111111")  # too long to be of a span's id by chance
        for secret in (key, *numbers, "tok_visa", "order-of", "Bearer", "gwk_"):
            assert secret not in text, secret
        told = {span.attributes.get("gateway.merchant_id") for span in spans} - {None}
        assert len(told) == merchant


# --- the collector --------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["away", "hanging", "refusing"])
async def test_a_collector_that_fails_neither_fails_nor_holds_up_a_call_nor_the_drain(
    postgres: PostgresForTests, redis: EmbeddedRedis, failing: str
) -> None:
    settings = {}
    if failing == "away":
        settings["tracing_endpoint"] = f"http://127.0.0.1:{closed_port()}/v1/traces"
    async with tracing(postgres, redis, **settings) as traced:
        collector = traced.collector
        if failing == "hanging":
            collector.released.clear()
        if failing == "refusing":
            collector.status = 400
        await traced.authorize()
        if failing != "away":  # the collector has been asked, and has not answered well
            await asyncio.to_thread(collector.wait_for, lambda: collector.requests > 0, "asked")
        await asyncio.gather(*(traced.authorize() for _ in range(20)))
        assert await traced.stop() == 0
        assert collector.spans == []


async def test_the_drain_sends_the_last_calls_spans(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    async with tracing(postgres, redis) as traced:
        control_calls = [asyncio.ensure_future(traced.authorize()) for _ in range(3)]
        await asyncio.gather(*control_calls)
        assert await traced.stop() == 0  # at once: less than a span waits for others
        assert len(traced.collector.named(METHOD)) == 3
        assert len(traced.collector.named("batch redis-settle")) >= 1


# --- exemplars and the log ------------------------------------------------------------------------

LATENCIES = {
    "gateway_rpc_duration_seconds",
    "gateway_stage_duration_seconds",
    "gateway_added_duration_seconds",
    "gateway_connector_duration_seconds",
}


def exemplars_at(port: int) -> dict[str, set[str]]:
    """The traces' ids that the latencies' exemplars name, by the family, as Prometheus asks."""
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    request = Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urlopen(request, timeout=30) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        text = response.read().decode()
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    found: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            if sample.exemplar is not None:
                assert sample.exemplar.value <= float(sample.labels["le"])
                assert sample.value >= 1
                found.setdefault(family.name, set()).add(sample.exemplar.labels["trace_id"])
    return found


def plain_metrics_at(port: int) -> str:
    """What whoever asks for no format gets."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize("workers", [1, 2])
async def test_latencies_of_traced_calls_name_their_traces_to_whoever_asks_for_exemplars(
    postgres: PostgresForTests, redis: EmbeddedRedis, workers: int
) -> None:
    port = free_port()
    settings = {"workers": workers, "metrics_address": f"127.0.0.1:{port}"}
    async with tracing(postgres, redis, tracing_sample_ratio=0, **settings) as traced:
        header, trace_id, _ = a_caller()
        await traced.authorize(header)
        for _ in range(3):
            await traced.authorize()
        assert await asyncio.to_thread(exemplars_at, port) == {
            name: {trace_id} for name in LATENCIES
        }
        assert trace_id not in await asyncio.to_thread(plain_metrics_at, port)
        # The log's line of the call names it too, and no other does.
        await traced.stop()
        lines = [line for line in traced.gateway.lines if '"call finished"' in line]
        assert [json.loads(line).get("trace_id") for line in lines] == [trace_id, None, None, None]


# --- off ------------------------------------------------------------------------------------------

_OFF = """
import asyncio, sys
from gateway.application.usecases import Payments
from gateway.composition import Gateway
from gateway.settings import load_settings
from gateway.telemetry.observer import RpcObserver
from gateway.telemetry.series import Histogram
from storage.postgres import PostgresStore
from storage.redis import Claims

async def main():
    gateway = Gateway(load_settings())
    await gateway.start()
    kept = gateway.service._payments, gateway.service._observer
    assert [type(each) for each in kept] == [Payments, RpcObserver], kept
    inner = gateway.payments._store, gateway.payments._claims
    assert [type(each) for each in inner] == [PostgresStore, Claims], inner
    assert gateway.claims._claim_lane._tracer is None
    assert gateway.store._intents._lane._tracer is None
    assert gateway.connectors.connector("simulator", "")._http._more_headers is None
    assert gateway.server._wrap is None
    histograms = [each for each in gateway.metrics.series if each.kind == "histogram"]
    assert {type(each) for each in histograms} == {Histogram}
    await gateway.stop()
    for name in ("opentelemetry", "sentry_sdk", "requests"):
        assert name not in sys.modules, name

asyncio.run(main())
"""


async def test_without_an_endpoint_nothing_is_wrapped_and_no_library_is_loaded(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with ExitStack() as stack:
        system = stack.enter_context(running_system(postgres, redis))
        await asyncio.to_thread(system.run_python, _OFF)
