"""Dashboards, alerts and documents ask for nothing but what a running gateway exports."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from payments.v1 import payment_service_pb2
from prometheus_client.parser import text_string_to_metric_families

from gateway.application.admission import RefusedBy, Work
from gateway.application.notifications import Notification, Receipt, Received
from gateway.application.ports import ClaimOutcome
from gateway.domain.errors import Reason
from gateway.domain.model import Delivery, OperationKind, OperationState, Verdict
from gateway.telemetry.reference import documented
from storage.batching import Failure
from storage.postgres import LaneLimits, PostgresStore
from tests.chart_scripts import load
from tests.harness import authorize_request, calling, eventually, new_key, running_system
from tests.servers import free_port

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

chart_queries = load(Path(__file__).parents[2] / "helm" / "chart_queries.py")

Samples = dict[str, list[dict[str, str]]]
"""The labels of all samples of a metric, by the name that queries have for it."""

VALUES: dict[str, set[str]] = {
    "code": {code.name for code in grpc.StatusCode},
    "reason": {reason.value for reason in Reason} | {""},
    "class": {work.value for work in Work},
    "bound": {bound.value for bound in RefusedBy},
    "result": {each.name for each in (*Verdict, *ClaimOutcome)},
    "delivery": {delivery.name for delivery in Delivery},
    "kind": {kind.name for kind in OperationKind},
    "receipt": {receipt.value for receipt in Receipt},
    "failure": {failure.name for failure in Failure},
}
"""What labels may hold besides what is seen in a few calls."""


def scrape(port: int) -> tuple[set[str], Samples, dict[str, float]]:
    """The families of `/metrics`, the samples, and their values by name and labels' values."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    families: set[str] = set()
    samples: Samples = {}
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        families.add(family.name + ("_total" if family.type == "counter" else ""))
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
            values[" ".join((sample.name, *sample.labels.values()))] = sample.value
    return families, samples, values


async def scrape_of_a_used_gateway(
    postgres: PostgresForTests, redis: EmbeddedRedis, workers: int
) -> tuple[set[str], Samples]:
    """What a gateway exports after some calls of most kinds."""
    port = free_port()
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(workers=workers, metrics_address=f"127.0.0.1:{port}")
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            key = new_key()
            first = await caller.authorize(idempotency_key=key)
            payment_id = first.payment.payment_id
            await caller.capture(payment_id, 400)
            await caller.refund(payment_id, 100)
            await caller.authorize(token="tok_declined_insufficient_funds")
            await caller.payment(payment_id)
            with pytest.raises(grpc.aio.AioRpcError):
                await caller.payment("pay_none")
            await caller.authorize(idempotency_key=key)
            families, samples, _ = await asyncio.to_thread(scrape, port)
            return families, samples


def labels_by_metric() -> dict[str, set[str]]:
    """The documented labels by the names that queries have for metrics."""
    labels: dict[str, set[str]] = {}
    for each in documented():
        if each.kind != "histogram":
            labels[each.name] = set(each.labels)
            continue
        labels[f"{each.name}_bucket"] = {*each.labels, "le"}
        for end in ("count", "sum"):
            labels[f"{each.name}_{end}"] = set(each.labels)
    return labels


@pytest.mark.parametrize("workers", [1, 2])
async def test_what_is_exported_is_what_is_documented(
    postgres: PostgresForTests, redis: EmbeddedRedis, workers: int
) -> None:
    families, samples = await scrape_of_a_used_gateway(postgres, redis, workers)
    expected = {each.name for each in documented()}
    if workers == 1:
        expected = {name for name in expected if not name.startswith("gateway_worker_")}
    assert families == expected
    for name, labels in labels_by_metric().items():
        known = labels if workers > 1 else labels - {"worker"}
        for sample in samples.get(name, ()):
            assert set(sample) == known, name
    if workers > 1:
        _check_queries(families, samples)


def _check_queries(families: set[str], samples: Samples) -> None:
    """Every metric, label and value in dashboards and alerts exists."""
    labels = labels_by_metric()
    queries = [*chart_queries.dashboard_queries(), *chart_queries.alert_queries()]
    recorded = {query.record for query in queries if query.record}
    assert len(queries) > 50
    for query in queries:
        used, grouped = chart_queries.uses(query.expression)
        assert used, query
        known: set[str] = {*chart_queries.TARGET_LABELS}
        for use in used:
            if use.metric in recorded:
                continue
            assert use.metric in labels, f"{query.where}: {use.metric}"
            family = use.metric
            for end in ("_bucket", "_count", "_sum"):
                family = family.removesuffix(end)
            assert {use.metric, family} & families, f"{query.where}: {use.metric}"
            known |= labels[use.metric]
            for label, text in use.matchers:
                if label not in chart_queries.TARGET_LABELS:
                    assert label in labels[use.metric], f"{query.where}: {use.metric} {label}"
                    seen = {sample[label] for sample in samples.get(use.metric, ())}
                    values = VALUES.get(label, set()) | seen
                    assert set(text.split("|")) <= values, f"{query.where}: {label} {text}"
        assert grouped <= known, f"{query.where}: {grouped - known}"
        # An aggregation has the labels that it groups by, everything else those of its metric.
        assert query.legend_labels <= (grouped or known), query.where


# --- what a payment and a doubt leave in the metrics ----------------------------------------------


async def test_items_of_batches_and_streams_do_not_use_up_the_objective_of_latency(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    port = free_port()
    items = [
        payment_service_pb2.AuthorizePaymentItem(
            item_ref=f"{number}", authorization=authorize_request()
        )
        for number in range(3)
    ]
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(metrics_address=f"127.0.0.1:{port}")
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            batch = payment_service_pb2.BatchAuthorizePaymentsRequest(items=items)
            await caller.call("BatchAuthorizePayments", batch)
            *_, values = await asyncio.to_thread(scrape, port)
            assert values["gateway_stage_duration_seconds_count outcome"] == len(items)
            assert values.get("gateway_added_duration_seconds_count", 0) == 0


async def test_a_payment_is_timed_by_its_stages_and_a_doubt_has_an_age(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    port = free_port()
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(
            metrics_address=f"127.0.0.1:{port}",
            recovery_enabled=False,  # the doubt stays
        )
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            payment_id = (await caller.authorize()).payment.payment_id
            await caller.payment(payment_id)
            *_, values = await asyncio.to_thread(scrape, port)
            for stage in ("claim", "intent", "psp", "outcome"):
                assert values[f"gateway_stage_duration_seconds_count {stage}"] == 1, stage
            assert values["gateway_added_duration_seconds_count"] == 1
            answered_s = values["gateway_rpc_duration_seconds_sum AuthorizePayment"]
            psp_s = values["gateway_stage_duration_seconds_sum psp"]
            added_s = values["gateway_added_duration_seconds_sum"]
            own_s = sum(
                values[f"gateway_stage_duration_seconds_sum {stage}"]
                for stage in ("claim", "intent", "outcome")
            )
            assert own_s <= added_s <= answered_s - psp_s
            assert values["gateway_connector_outcomes_total simulator AUTHORIZE APPROVED"] == 1
            assert values["gateway_pool_connections_max intents"] >= 1
            assert values["gateway_pool_connections_open intents"] >= 1
            assert values["gateway_pool_busy_seconds_total intents"] > 0
            assert values["gateway_operations_in_doubt_age_seconds"] == 0

            doubtful = await caller.authorize(token="tok_timeout_after_charge")
            assert doubtful.operation.state == OperationState.IN_DOUBT

            def shows_the_doubt() -> bool:
                *_, values = scrape(port)
                age_s = values["gateway_operations_in_doubt_age_seconds"]
                return values["gateway_operations_in_doubt"] == 1 and age_s > 0

            await eventually(shows_the_doubt, "the doubt and its age are shown")
            *_, values = await asyncio.to_thread(scrape, port)
            assert values["gateway_event_loop_lag_seconds_count"] > 0


async def test_what_psps_told_is_counted_where_no_gateway_applies_it(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    """Or the alert on it would be silent in the one case that nothing mends by itself."""
    port = free_port()
    with running_system(postgres, redis) as system:
        async with PostgresStore(system.dsn, notifications=LaneLimits()) as store:
            told = Notification("stripe", "evt_1", "charge.refunded")
            await store.notifications.keep([Received("mer_1", "acc_1", told)])
        await system.start_gateway(metrics_address=f"127.0.0.1:{port}").serving()
        await eventually(
            lambda: scrape(port)[2]["gateway_notifications_pending"] == 1, "it is counted"
        )
        assert scrape(port)[2]["gateway_notifications_pending_age_seconds"] > 0
