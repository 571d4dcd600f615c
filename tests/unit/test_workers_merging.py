"""gateway.telemetry.merging: several processes' metrics as those of one."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.merging import MergedMetrics, OverWorkers, Snapshot, take_snapshot
from gateway.telemetry.metrics import Metrics


def values(merged: MergedMetrics) -> dict[str, float]:
    """What a scrape would read: `name{label="value"}` to the value."""
    read = {}
    for family in text_string_to_metric_families(merged.render().decode()):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            read[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return read


def counted(count: float, label: str = "x") -> Snapshot:
    registry = CollectorRegistry()
    Counter("calls", "Calls.", ["code"], registry=registry).labels(label).inc(count)
    return without_created(take_snapshot(registry, {}))


def measured(value: float, over_workers: OverWorkers) -> Snapshot:
    registry = CollectorRegistry()
    Gauge("level", "A level.", registry=registry).set(value)
    return take_snapshot(registry, {"level": over_workers})


def without_created(snapshot: Snapshot) -> Snapshot:
    for family in snapshot:
        family[4] = [sample for sample in family[4] if not sample[0].endswith("_created")]
    return snapshot


def test_counters_are_summed_by_their_labels() -> None:
    merged = MergedMetrics()
    merged.update("1", counted(2, "a"))
    merged.update("2", counted(3, "a"))
    merged.update("3", counted(5, "b"))
    assert values(merged) == {'calls_total{code="a"}': 5, 'calls_total{code="b"}': 5}


def test_a_later_snapshot_of_the_same_worker_replaces_the_one_before() -> None:
    merged = MergedMetrics()
    merged.update("1", counted(2))
    merged.update("1", counted(7))
    assert values(merged) == {'calls_total{code="x"}': 7}


@pytest.mark.parametrize(("over_workers", "together"), [("sum", 6.0), ("max", 3.0), ("min", 1.0)])
def test_a_gauge_is_merged_by_its_meaning(over_workers: OverWorkers, together: float) -> None:
    merged = MergedMetrics()
    for number, value in enumerate((1.0, 3.0, 2.0)):
        merged.update(str(number), measured(value, over_workers))
    assert values(merged) == {"level": together}


def test_what_is_kept_apart_has_the_label_of_its_worker() -> None:
    merged = MergedMetrics()
    merged.update("1", measured(4, "apart"))
    merged.update("2", measured(5, "apart"))
    assert values(merged) == {'level{worker="1"}': 4, 'level{worker="2"}': 5}


def test_the_gauges_of_a_worker_that_has_gone_go_and_its_counters_stay() -> None:
    merged = MergedMetrics()
    merged.update("1", counted(2) + measured(4, "sum"))
    merged.update("2", counted(3) + measured(5, "sum"))
    merged.retire("1")
    assert values(merged) == {'calls_total{code="x"}': 5, "level": 5}


def test_the_next_worker_continues_the_counters_of_its_place() -> None:
    merged = MergedMetrics()
    merged.update("1", counted(2))
    merged.retire("1")
    merged.retire("1")  # it ended before it was heard of
    merged.update("1", counted(1))
    assert values(merged) == {'calls_total{code="x"}': 3}


def test_histograms_are_summed_bucket_by_bucket() -> None:
    merged = MergedMetrics()
    for worker, observed in (("1", (0.5, 1.5)), ("2", (1.5, 9.0))):
        registry = CollectorRegistry()
        histogram = Histogram("wait", "A wait.", registry=registry, buckets=(1, 2))
        for value in observed:
            histogram.observe(value)
        merged.update(worker, without_created(take_snapshot(registry, {})))
    merged.retire("2")
    text = merged.render().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == [
        'wait_bucket{le="1.0"} 1.0',
        'wait_bucket{le="2.0"} 3.0',
        'wait_bucket{le="+Inf"} 4.0',
        "wait_count 4.0",
        "wait_sum 12.5",
    ]


def test_a_value_that_json_cannot_hold_is_not_a_number() -> None:
    merged = MergedMetrics()
    merged.update("1", [["level", "", "gauge", "sum", [["level", {}, None]]]])
    assert math.isnan(values(merged)["level"])


def test_the_gateways_own_gauges_say_what_several_workers_make_together() -> None:
    merged = MergedMetrics()
    one, other = Metrics(), Metrics()
    for metrics, rows, doubts in ((one, 3, 7), (other, 4, 6)):
        metrics.watch_queues({"intents": SimpleNamespace(depth=rows)})
        metrics.operations_in_doubt(doubts)
    other.redis_available(False)
    merged.update("1", one.snapshot())
    merged.update("2", other.snapshot())
    read = values(merged)
    assert read['gateway_batch_queue_depth{lane="intents"}'] == 7
    assert read["gateway_operations_in_doubt"] == 7  # each counts those of all
    assert read["gateway_redis_up"] == 0
    assert [v for name, v in read.items() if name.startswith("gateway_build_info")] == [1]
    assert {'process_open_fds{worker="1"}', 'process_open_fds{worker="2"}'} <= read.keys()


def test_a_worker_that_forgets_a_merchant_lowers_no_counter_of_the_others() -> None:
    merged = MergedMetrics()
    one, other = Metrics(), Metrics()
    for metrics in (one, other):
        metrics.merchant_finished("mer_1", "OK")
        metrics.merchant_finished("mer_1", "OK")
    merged.update("1", one.snapshot())
    merged.update("2", other.snapshot())

    def shown() -> dict[str, float]:
        return {name: v for name, v in values(merged).items() if "mer_1" in name}

    both = shown()
    assert sorted(both.values()) == [2, 2]
    one.forget_merchant("mer_1")
    merged.update("1", one.snapshot())
    [(name, calls)] = shown().items()
    assert calls == both[name] == 2
    merged.retire("2")
    assert shown() == {}  # and the next one begins anew


Step = tuple[str, int, int]


@given(
    st.lists(
        st.tuples(st.sampled_from(("update", "retire")), st.integers(1, 3), st.integers(0, 5)),
        max_size=30,
    )
)
def test_no_order_of_reports_and_deaths_makes_a_counter_go_backwards(steps: list[Step]) -> None:
    merged = MergedMetrics()
    live: dict[int, int] = {}
    total = 0
    for step, place, more in steps:
        if step == "retire":
            merged.retire(str(place))
            live.pop(place, None)
        else:
            live[place] = live.get(place, 0) + more
            total += more
            merged.update(str(place), [counters(live[place])])
        read: Any = values(merged).get("calls_total", 0)
        assert read == total


def counters(value: int) -> list[Any]:
    return ["calls", "Calls.", "counter", "sum", [["calls_total", {}, value]]]
