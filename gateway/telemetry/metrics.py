"""The gateway's Prometheus metrics: one object that fills every observer port of the core."""

import platform
from collections.abc import Iterator
from enum import Enum
from typing import Final, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from gateway import __version__
from gateway.application.admission import Admission
from gateway.domain.model import ConnectorAnswer, Operation, OperationKind, OperationState
from gateway.domain.pan import mask_pans
from gateway.telemetry.merging import OverWorkers, Snapshot, take_snapshot

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `Metrics.render` gives: Prometheus' text exposition format."""
LABEL_SETS_MAX: Final = 1000
"""Combinations of label values of one metric; any further one is counted as `other`."""

_NAMESPACE: Final = "gateway"
_RPC_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_CONNECTOR_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_BATCH_WAIT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)

_M = TypeVar("_M", bound=MetricWrapperBase)


class _Labelled(Generic[_M]):
    """A metric whose labelled children are looked up once and kept: `labels()` is slow."""

    __slots__ = ("_children", "_metric")

    def __init__(self, metric: _M) -> None:
        self._metric = metric
        self._children: dict[tuple[str, ...], _M] = {}

    def __call__(self, *labels: str) -> _M:
        child = self._children.get(labels)
        return self._new(labels) if child is None else child

    def _new(self, labels: tuple[str, ...]) -> _M:
        if not labels:
            return self._metric
        if len(self._children) >= LABEL_SETS_MAX:
            return self._metric.labels(*("other" for _ in labels))
        child = self._metric.labels(*map(mask_pans, labels))
        self._children[labels] = child
        return child


class _AdmissionCollector(Collector):
    """What the gates count, read when it is asked for: calls pay nothing."""

    def __init__(self, admission: Admission) -> None:
        self._gates = admission.gates()

    def collect(self) -> Iterator[Metric]:
        prefix = f"{_NAMESPACE}_admission"
        admitted = CounterMetricFamily(
            f"{prefix}_admitted", "Calls and items admitted.", labels=["class"]
        )
        refused = CounterMetricFamily(
            f"{prefix}_refused", "Calls and items refused.", labels=["class", "bound"]
        )
        families = [
            GaugeMetricFamily(f"{prefix}_{name}", text, labels=["gate"])
            for name, (text, _) in _GATE_GAUGES.items()
        ]
        for name, gate in self._gates.items():
            for work, calls in gate.admitted.items():
                admitted.add_metric([work], calls)
            for (work, bound), calls in gate.refused.items():
                refused.add_metric([work, bound], calls)
            values = (
                gate.limit,
                gate.engaged,
                gate.working,
                gate.in_flight,
                gate.merchants,
                gate.delay_s,
                gate.base_s,
            )
            for family, value in zip(families, values, strict=True):
                family.add_metric([name], value)
        yield from (admitted, refused, *families)


_GATE_GAUGES: Final[dict[str, tuple[str, OverWorkers]]] = {
    "limit": ("Calls that the gateway may work on at once.", "sum"),
    "overloaded": ("Whether the limit is lowered for overload: 1 or 0.", "max"),
    "working": ("Calls that the gateway works on, without those that wait for a PSP.", "sum"),
    "in_flight": ("Calls inside, those that wait for a PSP included.", "sum"),
    "merchants": ("Merchants that have calls inside.", "max"),
    "delay_seconds": ("What the gateway's own stages took lately, together.", "max"),
    "base_seconds": ("What they take unhindered.", "max"),
}


class Metrics:
    """Everything that is counted, in a registry of its own.

    Durations are in seconds. No method raises, and none blocks.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._over_workers: dict[str, OverWorkers] = {}
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        counter, gauge = self._counter, self._gauge
        self._rpcs = counter("rpc_requests", "Calls ended.", "method", "code", "reason")
        self._rpc_s = self._histogram("rpc_duration_seconds", "Time to answer.", _RPC_S, "method")
        self._in_flight = gauge("rpc_in_flight", "Calls being worked on.", "method")
        self._claims = counter("claims", "Idempotency claims, by what they met.", "result")
        self._redis_unavailable = counter(
            "redis_unavailable", "Claims that PostgreSQL decided because Redis gave no answer."
        )()
        self._redis_up = gauge("redis_up", "Whether Redis answers: 1 or 0.", over_workers="min")()
        self._settlements_dropped = counter(
            "claim_settlements_dropped", "Releases and cache entries lost to Redis.", "reason"
        )
        self._replays = counter("replays", "Frozen answers repeated, by their source.", "source")
        self._batch_rows = self._histogram("batch_rows", "Rows of a batch.", _BATCH_ROWS, "lane")
        self._batch_wait_s = self._histogram(
            "batch_wait_seconds", "Wait of a batch's oldest row.", _BATCH_WAIT_S, "lane"
        )
        self._batch_failures = counter(
            "batch_failures", "Batches that raised, by what was done.", "lane", "failure"
        )
        self._queue_depth = gauge("batch_queue_depth", "Rows that wait for a batch.", "lane")
        self._connector_calls = counter(
            "connector_calls", "Calls to PSPs.", "connector", "kind", "delivery", "result"
        )
        self._connector_s = self._histogram(
            "connector_duration_seconds",
            "Time of a call to a PSP.",
            _CONNECTOR_S,
            "connector",
            "kind",
        )
        self._outcomes_lost = counter(
            "outcomes_lost", "Outcomes left to recovery since they could not be written.", "kind"
        )
        self._in_doubt = gauge(  # each worker counts those of all
            "operations_in_doubt", "Operations whose outcome is unknown.", over_workers="max"
        )()
        self._recoveries = counter("recovery", "Operations recovery looked at.", "kind", "outcome")
        self._recovery_failures = counter("recovery_failures", "Looks of recovery that failed.")()
        gauge("build_info", "What runs; always 1.", "version", "python", over_workers="max")(
            __version__, platform.python_version()
        ).set(1)
        self._redis_up.set(1)

    def _counter(self, name: str, text: str, *labels: str) -> _Labelled[Counter]:
        metric = Counter(name, text, labels, namespace=_NAMESPACE, registry=self.registry)
        return _Labelled(metric)

    def _gauge(
        self, name: str, text: str, *labels: str, over_workers: OverWorkers = "sum"
    ) -> _Labelled[Gauge]:
        self._over_workers[f"{_NAMESPACE}_{name}"] = over_workers
        return _Labelled(Gauge(name, text, labels, namespace=_NAMESPACE, registry=self.registry))

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> _Labelled[Histogram]:
        metric = Histogram(
            name, text, labels, namespace=_NAMESPACE, registry=self.registry, buckets=buckets
        )
        return _Labelled(metric)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, as CONTENT_TYPE says."""
        return generate_latest(self.registry)

    def snapshot(self) -> Snapshot:
        """All metrics, to be merged with those of other processes."""
        return take_snapshot(self.registry, self._over_workers)

    def watch_admission(self, admission: Admission) -> None:
        """Show what these gates count, from now on."""
        for name, (_, over_workers) in _GATE_GAUGES.items():
            self._over_workers[f"{_NAMESPACE}_admission_{name}"] = over_workers
        self.registry.register(_AdmissionCollector(admission))

    # Calls.

    def rpc_started(self, method: str) -> None:
        """A call began, or an item of a batch or stream."""
        self._in_flight(method).inc()

    def rpc_finished(self, method: str, code: str, reason: str, duration_s: float) -> None:
        """It ended; `code` is gRPC's name, `reason` ours, empty where there is none."""
        self._in_flight(method).dec()
        self._rpcs(method, code, reason).inc()
        self._rpc_s(method).observe(duration_s)

    # gateway.application.usecases.Observer

    def claimed(self, status: Enum) -> None:
        """A call's claim was answered."""
        self._claims(status.name).inc()
        if status.name == "UNAVAILABLE":
            self._redis_unavailable.inc()

    def replayed(self, source: str) -> None:
        """A frozen answer was repeated, from `redis` or `postgres`."""
        self._replays(source).inc()

    def connector_called(
        self, connector: str, kind: OperationKind, answer: ConnectorAnswer, seconds: float
    ) -> None:
        """A call to a PSP ended."""
        self._connector_calls(connector, kind.name, answer.delivery.name, answer.verdict.name).inc()
        self._connector_s(connector, kind.name).observe(seconds)

    def outcome_lost(self, operation: Operation) -> None:
        """An outcome could not be written; recovery settles the operation."""
        self._outcomes_lost(operation.kind.name).inc()

    # gateway.application.recovery.RecoveryObserver

    def recovered(self, kind: OperationKind, state: OperationState) -> None:
        """Recovery looked at an operation; the state that it is in now."""
        self._recoveries(kind.name, state.name).inc()

    def recovery_failed(self) -> None:
        """A look of recovery at the store or at an operation failed."""
        self._recovery_failures.inc()

    def operations_in_doubt(self, count: int) -> None:
        """So many operations are in doubt now."""
        self._in_doubt.set(count)

    # storage.batching.LaneMetrics

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        """A batch left; its oldest row had waited so long."""
        self._batch_rows(lane).observe(rows)
        self._batch_wait_s(lane).observe(wait_s_of_oldest)

    def batch_failed(self, lane: str, rows: int, failure: Enum) -> None:  # noqa: ARG002 - the port's
        """A flush raised, and was treated as `failure` says."""
        self._batch_failures(lane, failure.name).inc()

    def queue_depth(self, lane: str, rows: int) -> None:
        """So many rows wait."""
        self._queue_depth(lane).set(rows)

    # storage.redis.claims.ClaimMetrics

    def claims_answered(self, outcome: Enum, claims: int) -> None:
        """Nothing: `claimed` counts them, once for each call, where no Redis is reached too."""

    def settlements_dropped(self, reason: str, settlements: int) -> None:
        """Releases or cache entries did not reach Redis."""
        self._settlements_dropped(reason).inc(settlements)

    def redis_available(self, available: bool) -> None:
        """Redis answers again, or no longer."""
        self._redis_up.set(available)
