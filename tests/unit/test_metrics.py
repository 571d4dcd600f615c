"""gateway.telemetry: what is counted is what a scrape reads, whatever its labels hold."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from gateway.application.admission import AdmissionLimits, Stage, Work, open_gates
from gateway.application.ports import ClaimOutcome
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    OperationKind,
    Outcome,
    ResponseCode,
    Verdict,
)
from gateway.telemetry import series
from gateway.telemetry.loop import sample_lag
from gateway.telemetry.merging import MergedMetrics
from gateway.telemetry.metrics import ADDED_S_SLO, MeasuredOccupancy, Metrics
from gateway.telemetry.reference import table
from storage.batching import Lane

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]
# A published test number of Visa, and one that is masked alike.
PAN, ALIKE = "4111111111111111", f"411111{9:06}1111"


def read(text: bytes) -> dict[str, float]:
    """What a scrape reads: `name{label="value"}` to the value."""
    values = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in values, "stands twice"
            values[name] = sample.value
    return values


def answer(code: ResponseCode | None) -> ConnectorAnswer:
    outcome = None if code is None else Outcome(response_code=code)
    return ConnectorAnswer(Delivery.ANSWERED, Verdict.DECLINED, outcome)


def test_a_cascade_is_counted_by_its_reason_and_what_came_of_it() -> None:
    metrics = Metrics()
    unsent = ConnectorAnswer(Delivery.NOT_SENT)
    soft = answer(ResponseCode.DO_NOT_HONOR)
    metrics.cascaded(unsent, soft)
    metrics.cascaded(soft, unsent)
    metrics.cascaded(soft, ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT))
    metrics.cascaded(soft, ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED))
    values = read(metrics.render())
    assert {name: n for name, n in values.items() if name.startswith("gateway_cascades_total")} == {
        f'gateway_cascades_total{{outcome="{outcome}",reason="{reason}"}}': 1
        for reason, outcome in (
            ("not_sent", "DECLINED"),
            ("soft_decline", "NEVER_SENT"),
            ("soft_decline", "DOUBTED"),
            ("soft_decline", "APPROVED"),
        )
    }


# --- series ---------------------------------------------------------------------------------------


_EXACTLY_ADDED = st.integers(0, 4096).map(lambda number: number / 1024)
"""Python adds floats more exactly from 3.12 on where it adds many at once: not these."""


@given(st.lists(_EXACTLY_ADDED | st.sampled_from((0.5, 1.0, 2.5)), max_size=9))
def test_a_histogram_renders_as_that_of_the_client_library(values: list[float]) -> None:
    bounds = (0.5, 1, 2.5)
    ours = series.Histogram("wait", "A wait.", bounds, "lane")
    registry = CollectorRegistry()
    theirs = Histogram("wait", "A wait.", ["lane"], registry=registry, buckets=bounds)
    for value in values * (series.LATEST_MAX // 4):  # some are added up before they are asked for
        ours.observe(value, ("a",))
        theirs.labels("a").observe(value)

    class Ours:
        def collect(self) -> Iterator[Any]:
            yield ours.collect()

    lines = [
        line
        for line in generate_latest(registry).decode().splitlines()
        if not re.match(r"(# (HELP|TYPE) )?wait_created", line)
    ]
    assert generate_latest(Ours()).decode().splitlines() == lines


def test_labels_beyond_the_limit_are_counted_as_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "LABEL_SETS_MAX", 2)
    metrics = Metrics()
    for reason in ("A", "B", "C", "D", "A"):
        metrics.settlements_dropped(reason, 1)
        metrics.batch_sent(reason, 1, 0)
    values = read(metrics.render())
    dropped = "gateway_claim_settlements_dropped_total"
    assert {name: n for name, n in values.items() if name.startswith(dropped)} == {
        f'{dropped}{{reason="A"}}': 2,
        f'{dropped}{{reason="B"}}': 1,
        f'{dropped}{{reason="other"}}': 2,
    }
    assert values['gateway_batch_rows_count{lane="other"}'] == 2


def test_no_label_shows_a_card_number_and_two_of_them_are_one() -> None:
    metrics = Metrics()
    for pan in (PAN, ALIKE):
        metrics.rpc_started(pan)
        metrics.rpc_finished(pan, "OK", "", 0.001)
    text = metrics.render()
    assert PAN.encode() not in text
    assert ALIKE.encode() not in text
    values = read(text)
    [count] = [n for name, n in values.items() if name.startswith("gateway_rpc_duration_seconds_c")]
    assert count == 2
    [ended] = [n for name, n in values.items() if name.startswith("gateway_rpc_requests")]
    assert ended == 2


def test_a_scrape_on_another_thread_reads_histograms_that_agree_with_themselves() -> None:
    metrics = Metrics()
    ended = threading.Event()
    problems: list[str] = []

    def scrape() -> None:
        before = 0.0
        while not ended.is_set():
            values = read(metrics.render())
            name = 'gateway_rpc_duration_seconds_{}{{method="m0"}}'
            count = values.get(name.format("count"), 0.0)
            last = values.get('gateway_rpc_duration_seconds_bucket{le="+Inf",method="m0"}', 0.0)
            if count != last or count < before:
                problems.append(f"{before} {count} {last}")
            before = count

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for number in range(20_000):
            method = f"m{number % 50 if number % 2 else 0}"
            metrics.rpc_started(method)
            metrics.rpc_finished(method, "OK", "", number / 1000)
    finally:
        ended.set()
        thread.join()
    assert problems == []
    values = read(metrics.render())
    assert sum(n for name, n in values.items() if "rpc_requests_total" in name) == 20_000


# --- what is counted ------------------------------------------------------------------------------


def test_a_call_is_counted_in_and_out_with_its_code_reason_and_time() -> None:
    metrics = Metrics()
    metrics.rpc_started("GetPayment")
    assert read(metrics.render())['gateway_rpc_in_flight{method="GetPayment"}'] == 1
    metrics.rpc_finished("GetPayment", "NOT_FOUND", "PAYMENT_NOT_FOUND", 0.004)
    values = read(metrics.render())
    assert values['gateway_rpc_in_flight{method="GetPayment"}'] == 0
    labels = 'code="NOT_FOUND",method="GetPayment",reason="PAYMENT_NOT_FOUND"'
    assert values[f"gateway_rpc_requests_total{{{labels}}}"] == 1
    assert values['gateway_rpc_duration_seconds_bucket{le="0.0025",method="GetPayment"}'] == 0
    assert values['gateway_rpc_duration_seconds_bucket{le="0.005",method="GetPayment"}'] == 1


def test_a_psp_s_answers_are_counted_by_their_response_codes() -> None:
    metrics = Metrics()
    for code in (ResponseCode.DO_NOT_HONOR, ResponseCode.DO_NOT_HONOR, ResponseCode.APPROVED, None):
        metrics.connector_called("simulator", OperationKind.AUTHORIZE, answer(code), 0.2)
    values = read(metrics.render())
    name = 'gateway_connector_outcomes_total{{connector="simulator",kind="AUTHORIZE",{}}}'
    assert values[name.format('response_code="DO_NOT_HONOR"')] == 2
    assert values[name.format('response_code="APPROVED"')] == 1
    assert sum(n for each, n in values.items() if "connector_outcomes_total" in each) == 3
    assert sum(n for each, n in values.items() if "connector_calls_total" in each) == 4
    assert values['gateway_stage_duration_seconds_count{stage="psp"}'] == 4


def test_what_the_gateway_adds_has_a_bucket_that_ends_at_its_objective() -> None:
    metrics = Metrics()
    metrics.answered(ADDED_S_SLO)
    metrics.answered(ADDED_S_SLO + 0.0001)
    values = read(metrics.render())
    assert values[f'gateway_added_duration_seconds_bucket{{le="{ADDED_S_SLO}"}}'] == 1
    assert values["gateway_added_duration_seconds_count"] == 2


def test_a_measured_gate_is_the_gate_and_its_stages_are_counted() -> None:
    metrics = Metrics()
    gates = open_gates(AdmissionLimits())
    gate, occupancy = gates.payments, MeasuredOccupancy(gates.payments, metrics)
    metrics.watch_admission(gates)
    gate.admit("mer_1", Work.PAYMENT)
    occupancy.passed(Stage.CLAIM, 0.001)
    occupancy.leave("mer_1")
    assert (gate.working, gate.in_flight) == (0, 1)
    values = read(metrics.render())
    assert values['gateway_admission_in_flight{gate="payments"}'] == 1
    assert values['gateway_admission_admitted_total{class="payment"}'] == 1
    assert values['gateway_stage_duration_seconds_count{stage="claim"}'] == 1
    occupancy.come_back("mer_1")
    occupancy.carry("mer_1")
    assert (gate.working, gate.in_flight) == (2, 2)
    occupancy.release("mer_1")
    gate.release("mer_1")
    assert read(metrics.render())['gateway_admission_in_flight{gate="payments"}'] == 0


def test_claims_without_redis_have_a_counter_of_their_own_from_the_start() -> None:
    metrics = Metrics()
    assert read(metrics.render())["gateway_redis_unavailable_total"] == 0
    metrics.claimed(ClaimOutcome.UNAVAILABLE)
    metrics.claimed(ClaimOutcome.NEW)
    values = read(metrics.render())
    assert values["gateway_redis_unavailable_total"] == 1
    assert values['gateway_claims_total{result="UNAVAILABLE"}'] == 1


def test_the_first_outcome_that_is_lost_is_a_rise_for_its_alert() -> None:
    values = read(Metrics().render())
    for kind in OperationKind:
        assert values[f'gateway_outcomes_lost_total{{kind="{kind.name}"}}'] == 0


class _Pool:
    size, connected, busy, busy_s = 3, 2, 1, 0.5


def test_workers_pools_are_summed_and_what_lies_in_the_database_is_not() -> None:
    merged = MergedMetrics()
    for worker in "12":
        metrics = Metrics()
        metrics.watch_pools({"intents": _Pool()})
        metrics.operations_in_doubt(4, 60.5, 1, ((10.0, 1), (60.0, 3)))
        metrics.outbox_rows(7)
        metrics.recovery_search_behind(8.5)
        metrics.answered(0.01)
        # As a worker sends it to its supervisor.
        merged.update(worker, json.loads(json.dumps(metrics.snapshot())))
    values = read(merged.render())
    assert values['gateway_pool_connections_max{lane="intents"}'] == 6
    assert values['gateway_pool_connections_open{lane="intents"}'] == 4
    assert values['gateway_pool_connections_busy{lane="intents"}'] == 2
    assert values['gateway_pool_busy_seconds_total{lane="intents"}'] == 1.0
    assert values["gateway_operations_in_doubt"] == 4
    assert values["gateway_operations_in_doubt_age_seconds"] == 60.5
    assert values['gateway_operations_unresolved{needs_person="true"}'] == 1
    assert values['gateway_operations_unresolved{needs_person="false"}'] == 3
    ages = [values[f'gateway_operations_in_doubt_by_age{{le="{le}"}}'] for le in (10, 60, "+Inf")]
    assert ages == [1, 3, 4]
    assert values["gateway_outbox_rows"] == 7
    assert values["gateway_recovery_search_behind_seconds"] == 8.5
    assert values["gateway_added_duration_seconds_count"] == 2


async def test_a_loop_that_is_kept_busy_is_seen_to_lag() -> None:
    seen: asyncio.Queue[float] = asyncio.Queue()
    sampling = asyncio.create_task(sample_lag(seen.put_nowait, 0.001))
    await seen.get()
    held_s = 0.05
    until = time.monotonic() + held_s
    while time.monotonic() < until:  # as a handler that computes
        pass
    lags = [await seen.get()]
    while max(lags) < held_s / 2:
        lags.append(await seen.get())
    sampling.cancel()
    assert min(lags) >= 0


# --- exemplars ------------------------------------------------------------------------------------


class Traces:
    """Metrics whose calls are traced as the test says."""

    def __init__(self) -> None:
        self.trace_id = ""
        self.metrics = Metrics(lambda: self.trace_id)

    def ended(self, seconds: float, trace_id: str = "") -> None:
        self.trace_id = trace_id
        self.metrics.rpc_started("GetPayment")
        self.metrics.rpc_finished("GetPayment", "OK", "", seconds)


def exemplars(text: bytes) -> dict[str, tuple[str, float]]:
    """Trace and value of each bucket's exemplar, by the bucket's bound."""
    families = openmetrics_families(text.decode())  # type: ignore[no-untyped-call]
    return {
        sample.labels["le"]: (sample.exemplar.labels["trace_id"], sample.exemplar.value)
        for family in families
        for sample in family.samples
        if sample.exemplar is not None
    }


def test_a_bucket_names_the_trace_of_its_latest_traced_call_and_no_other() -> None:
    traces = Traces()
    traces.ended(0.002)
    assert exemplars(traces.metrics.render(generate_openmetrics)) == {}
    traces.ended(0.002, "a" * 32)
    traces.ended(0.0021, "b" * 32)
    traces.ended(0.0022)
    traces.ended(100, "c" * 32)
    assert exemplars(traces.metrics.render(generate_openmetrics)) == {
        "0.0025": ("b" * 32, 0.0021),
        "+Inf": ("c" * 32, 100),
    }
    assert b"trace_id" not in traces.metrics.render()


def test_exemplars_beyond_the_limit_of_labels_are_those_of_the_others() -> None:
    histogram = series.ExemplarHistogram(
        "wait", "A wait.", (1.0,), "label", trace_id=lambda: "a" * 32
    )
    for number in range(series.LABEL_SETS_MAX + 100):
        histogram.observe(0.5, (str(number),))
    shown = [each for each in histogram.collect().samples if each.exemplar is not None]
    assert len(shown) == series.LABEL_SETS_MAX + 1
    assert len(histogram._exemplars) == series.LABEL_SETS_MAX + 1


def test_of_several_workers_the_latest_exemplar_of_a_bucket_is_shown() -> None:
    merged = MergedMetrics()
    workers = Traces(), Traces(), Traces()
    for worker, trace_id in zip(workers, "abc", strict=True):
        worker.ended(0.002, trace_id * 32)
    workers[0].ended(100, "d" * 32)
    for name in (2, 0, 1):  # in whatever order they are heard of
        merged.update(str(name), json.loads(json.dumps(workers[name].metrics.snapshot())))
    latest = {"0.0025": ("c" * 32, 0.002), "+Inf": ("d" * 32, 100)}
    assert exemplars(merged.render(generate_openmetrics)) == latest
    merged.retire("2")  # its calls are still counted
    assert exemplars(merged.render(generate_openmetrics)) == latest


async def test_rows_that_wait_are_shown_while_no_batch_leaves() -> None:
    sent, stuck = asyncio.Event(), asyncio.Event()

    async def flush(rows: Sequence[int]) -> list[int]:
        sent.set()
        await stuck.wait()
        return list(rows)

    metrics = Metrics()
    lane: Lane[int, int] = Lane("intents", flush, rows_max=1, queue_max=10, metrics=metrics)
    metrics.watch_queues({"intents": lane})
    rows = [lane.submit(number) for number in range(3)]
    await sent.wait()
    rows += [lane.submit(number) for number in range(4)]
    depth = 'gateway_batch_queue_depth{lane="intents"}'
    assert read(metrics.render())[depth] == 6
    stuck.set()
    await asyncio.gather(*rows)
    assert read(metrics.render())[depth] == 0


# --- the documents --------------------------------------------------------------------------------


def test_the_documented_metrics_are_those_that_exist() -> None:
    committed = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert committed == table(), "run `python -m gateway.telemetry.reference > docs/metrics.md`"


def test_one_metric_alone_has_a_merchant_among_its_labels() -> None:
    named = {
        (each.name, label)
        for each in Metrics().series
        for label in each.labels
        if "merchant" in label or "payment" in label
    }
    assert named == {("gateway_merchant_requests", "merchant")}
