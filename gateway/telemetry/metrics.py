"""The gateway's Prometheus metrics: one object that fills every observer port of the core."""

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Final, Protocol, TypeVar

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gateway import __version__
from gateway.application.admission import Admission, Gate, Stage
from gateway.application.events import Consumer
from gateway.application.notifications import NotificationKind, Receipt, Result
from gateway.application.ports import ClaimOutcome
from gateway.domain import decisions
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    Operation,
    OperationKind,
    OperationState,
)
from gateway.routing.breakers import BreakerKey, Breakers, BreakerState
from gateway.telemetry.merging import Encode, OverWorkers, Snapshot, take_snapshot
from gateway.telemetry.series import Counter, ExemplarHistogram, Gauge, Histogram, Labels, Series

_NAMESPACE: Final = "gateway"
_RPC_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_CONNECTOR_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_BATCH_WAIT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
_LOOP_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

ADDED_S_SLO: Final = 0.015
"""What the gateway may add to its PSP's time; a bucket's bound, which the alerts are written on."""
_STAGE_S: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125),
    ADDED_S_SLO,  # dense around it: a quantile is interpolated within its bucket
    *(0.0175, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
_PSP: Final = "psp"
FOLLOW_UPS: Final = "follow_ups"
"""The method's label of what is done to existing payments."""

_S = TypeVar("_S", bound=Series)


class Pool(Protocol):
    """A lane's connections: `storage.postgres.pool.HeldConnections`."""

    @property
    def size(self) -> int:
        """How many it may hold."""

    @property
    def connected(self) -> int:
        """How many are open."""

    @property
    def busy(self) -> int:
        """How many are in use."""

    @property
    def busy_s(self) -> float:
        """For how long connections were in use, all together, in seconds."""


class Queue(Protocol):
    """A lane's queue: `storage.batching.Lane`."""

    @property
    def depth(self) -> int:
        """Rows that wait, those in flight not counted."""


class _Families(Collector):
    """What is counted here and what is read elsewhere, when it is asked for."""

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.readers: list[Callable[[], None]] = []

    def collect(self) -> Iterator[Metric]:
        for read in self.readers:
            read()
        for series in self.series:
            yield series.collect()


class Metrics:
    """Everything that is counted, in a registry of its own.

    Durations are in seconds. No method raises, and none blocks. All are called by the thread of
    the event loop; `render` and `snapshot` may be called by any (gateway.telemetry.series).
    With `trace_id`, which tells the running code's trace, latencies have exemplars.
    """

    def __init__(self, trace_id: Callable[[], str] | None = None) -> None:
        self._trace_id = trace_id
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._families = _Families()
        self._add_calls()
        self._add_admission()
        self._add_stores()
        self._add_connectors()
        self._add_routing()
        self._add_process()
        self._families.readers.append(self._read_claims)
        self.registry.register(self._families)

    def _add_calls(self) -> None:
        self._rpcs = self._counter("rpc_requests", "Calls ended.", "method", "code", "reason")
        self._rpc_s = self._latency("rpc_duration_seconds", "Time to answer.", _RPC_S, "method")
        self._in_flight = self._gauge("rpc_in_flight", "Calls being worked on.", "method")
        # Apart: each worker elects its own, and one that forgets a merchant would lower a sum.
        self._merchant_rpcs = self._counter(
            "merchant_requests",
            "Calls and items ended, of the merchants with the most of them, where that is set.",
            "merchant",
            "code",
            over_workers="apart",
        )
        self.stage_s = self._latency(
            "stage_duration_seconds", "Time of a call in a stage.", _STAGE_S, "stage"
        )
        self._added_s = self._latency(
            "added_duration_seconds",
            "Time of a call from its claim to its outcome's commit, without its PSP's; items of"
            " batches and streams are not in it.",
            _STAGE_S,
        )
        self._replays = self._counter(
            "replays", "Frozen answers repeated, by their source.", "source"
        )
        self._outcomes_lost = self._counter(
            "outcomes_lost", "Outcomes left to recovery since they could not be written.", "kind"
        )
        for kind in OperationKind:  # from 0, or the first one, which is an alert, would be no rise
            self._outcomes_lost.add((kind,), 0)

    def _add_admission(self) -> None:
        self._admitted = self._counter("admission_admitted", "Calls and items admitted.", "class")
        self._refused = self._counter(
            "admission_refused", "Calls and items refused.", "class", "bound"
        )
        self._gates = {
            name: self._gauge(f"admission_{name}", text, "gate", over_workers=over_workers)
            for name, (text, over_workers, _) in _GATE_GAUGES.items()
        }

    def _add_stores(self) -> None:
        counter, gauge = self._counter, self._gauge
        self._claims = counter("claims", "Idempotency claims, by what they met.", "result")
        self._redis_unavailable = counter(
            "redis_unavailable", "Claims that PostgreSQL decided because Redis gave no answer."
        )
        self._redis_up = gauge("redis_up", "Whether Redis answers: 1 or 0.", over_workers="min")
        self._redis_up.set(1)
        self._settlements_dropped = counter(
            "claim_settlements_dropped", "Releases and cache entries lost to Redis.", "reason"
        )
        self._batch_rows = self._histogram("batch_rows", "Rows of a batch.", _BATCH_ROWS, "lane")
        self._batch_wait_s = self._histogram(
            "batch_wait_seconds", "Wait of a batch's oldest row.", _BATCH_WAIT_S, "lane"
        )
        self._batch_failures = counter(
            "batch_failures", "Batches that raised, by what was done.", "lane", "failure"
        )
        self._queue_depth = gauge("batch_queue_depth", "Rows that wait for a batch.", "lane")
        self._pool_size = gauge(
            "pool_connections_max", "Connections to PostgreSQL that a lane may hold.", "lane"
        )
        self._pool_open = gauge(
            "pool_connections_open", "Connections to PostgreSQL that are open.", "lane"
        )
        self._pool_busy = gauge(
            "pool_connections_busy", "Connections to PostgreSQL that are in use.", "lane"
        )
        self._pool_busy_s = counter(
            "pool_busy_seconds", "Time that connections were in use, all together.", "lane"
        )
        self._outbox_rows = gauge(  # each worker asks for those of all, as for the doubts below
            "outbox_rows",
            "Events in the outbox, as PostgreSQL's statistics estimate them.",
            over_workers="max",
        )
        self._add_events()

    def _add_events(self) -> None:
        counter, gauge = self._counter, self._gauge
        self._event_streams = gauge("event_streams", "Streams of events that are open.")
        self._ready = gauge(
            "ready", "Whether calls are served, as readiness says: 1 or 0.", over_workers="max"
        )
        self._events_read = counter(
            "events_read",
            "Events read from the outbox, by the `tail` that streams share, or by a `stream` that "
            "is behind it.",
            "reader",
        )
        of_consumer = "organisation", "mode", "consumer"
        self._events_behind = gauge(
            "event_consumer_behind_events",
            "Events that a consumer has not acknowledged, counted up to 10,000; of the operator's "
            "consumers the organisation is empty.",
            *of_consumer,
            over_workers="max",
        )
        self._event_lag_s = gauge(
            "event_consumer_behind_seconds",
            "Age of the oldest event that a consumer has not acknowledged; 0 where there is none.",
            *of_consumer,
            over_workers="max",
        )
        self._events_held_s = gauge(
            "events_held_back_seconds",
            "Age of the oldest event that waits for a transaction still running in PostgreSQL.",
            over_workers="max",
        )

    def _add_connectors(self) -> None:
        self._connector_calls = self._counter(
            "connector_calls", "Calls to PSPs.", "connector", "kind", "delivery", "result"
        )
        self._connector_outcomes = self._counter(
            "connector_outcomes",
            "Answers of PSPs, by their unified response code.",
            "connector",
            "kind",
            "response_code",
        )
        self._acquirer_events = self._counter(
            "acquirer_events",
            "What happened on connections to acquirers' hosts (ISO 8583).",
            "host",
            "event",
        )
        self._connector_s = self._latency(
            "connector_duration_seconds",
            "Time of a call to a PSP.",
            _CONNECTOR_S,
            "connector",
            "kind",
        )
        self._in_doubt = self._gauge(
            "operations_in_doubt", "Operations whose outcome is unknown.", over_workers="max"
        )
        self._in_doubt_age_s = self._gauge(
            "operations_in_doubt_age_seconds",
            "Age of the oldest operation whose outcome is unknown; 0 where there is none.",
            over_workers="max",
        )
        self._unresolved = self._gauge(
            "operations_unresolved",
            "Operations whose outcome is unknown, by whether recovery leaves them to a person.",
            "needs_person",
            over_workers="max",
        )
        self._in_doubt_by_age = self._gauge(
            "operations_in_doubt_by_age",
            "Operations whose outcome is unknown and that are at most `le` seconds old.",
            "le",
            over_workers="max",
        )
        self._count_failures = self._counter(
            "count_failures",
            "Counts of what waits in the database (`doubts`, `search`, `outbox`, `notifications`)"
            " that failed; the last values stand.",
            "what",
        )
        self._recoveries = self._counter(
            "recovery", "Operations recovery looked at.", "kind", "outcome"
        )
        self._recovery_failures = self._counter(
            "recovery_failures", "Looks of recovery that failed."
        )
        self._search_behind_s = self._gauge(
            "recovery_search_behind_seconds",
            "How much older than GATEWAY_RECOVERY_HORIZON_S that is up to which the search for "
            "dead senders can have missed nothing.",
            over_workers="max",
        )
        self._notifications = self._counter(
            "notifications_received",
            "Requests at the port for notifications, by what became of them.",
            "connector",
            "receipt",
        )
        self._notifications_applied = self._counter(
            "notifications_applied",
            "Notifications that are done with, by what they were.",
            "connector",
            "about",
            "outcome",
        )
        self._notifications_failures = self._counter(
            "notifications_failures", "Looks at notifications that failed."
        )
        self._notifications_pending = self._gauge(
            "notifications_pending",
            "Notifications that are stored and yet to be applied.",
            over_workers="max",
        )
        self._notifications_pending_age_s = self._gauge(
            "notifications_pending_age_seconds",
            "Age of the oldest notification that is yet to be applied; 0 where there is none.",
            over_workers="max",
        )

    def _add_routing(self) -> None:
        self._cascades = self._counter(
            "cascades",
            "Authorizations sent on to another account after a `soft_decline`, or since they were "
            "`not_sent`, by what came of it there.",
            "reason",
            "outcome",
        )
        self._breakers = self._gauge(
            "breakers",
            "Breakers of accounts that are open or half-open.",
            "connector",
            "method",
            "state",
            over_workers="max",
        )
        self._breaker_changes = self._counter(
            "breaker_changes",
            "Times that a breaker came into a state.",
            "connector",
            "method",
            "state",
        )

    def _add_process(self) -> None:
        self._loop_lag_s = self._histogram(
            "event_loop_lag_seconds", "How late the event loop woke a task.", _LOOP_LAG_S
        )
        self._gauge(
            "build_info", "What runs; always 1.", "version", "python", over_workers="max"
        ).set(1, (__version__, platform.python_version()))

    def _counter(
        self, name: str, text: str, *labels: str, over_workers: OverWorkers = "sum"
    ) -> Counter:
        counter = Counter(f"{_NAMESPACE}_{name}", text, *labels, over_workers=over_workers)
        return self._add(counter)

    def _gauge(
        self, name: str, text: str, *labels: str, over_workers: OverWorkers = "sum"
    ) -> Gauge:
        gauge = Gauge(f"{_NAMESPACE}_{name}", text, *labels, over_workers=over_workers)
        return self._add(gauge)

    def _histogram(
        self, name: str, text: str, bounds: tuple[float, ...], *labels: str
    ) -> Histogram:
        return self._add(Histogram(f"{_NAMESPACE}_{name}", text, bounds, *labels))

    def _latency(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
        if self._trace_id is None:
            return self._histogram(name, text, bounds, *labels)
        name = f"{_NAMESPACE}_{name}"
        return self._add(ExemplarHistogram(name, text, bounds, *labels, trace_id=self._trace_id))

    def _add(self, series: _S) -> _S:
        self._families.series.append(series)
        return series

    @property
    def series(self) -> tuple[Series, ...]:
        """All that is the gateway's own, for the documents."""
        return tuple(self._families.series)

    def render(self, encode: Encode = generate_latest) -> bytes:
        """All metrics in Prometheus' text format, or another one."""
        return encode(self.registry)

    def snapshot(self) -> Snapshot:
        """All metrics, to be merged with those of other processes."""
        over_workers = {series.name: series.over_workers for series in self._families.series}
        return take_snapshot(self.registry, over_workers)

    # What is counted elsewhere, and read when it is asked for: calls pay nothing.

    def watch_admission(self, admission: Admission) -> None:
        """Show what these gates count, from now on."""
        gates = admission.gates()
        self._families.readers.append(lambda: self._read_admission(gates))

    def _read_admission(self, gates: Mapping[str, Gate]) -> None:
        for name, gate in gates.items():
            for work, calls in gate.admitted.copy().items():
                self._admitted.set(calls, (work,))
            for (work, bound), calls in gate.refused.copy().items():
                self._refused.set(calls, (work, bound))
            for gauge, (_, _, read) in zip(
                self._gates.values(), _GATE_GAUGES.values(), strict=True
            ):
                gauge.set(read(gate), (name,))

    def watch_pools(self, pools: Mapping[str, Pool]) -> None:
        """Show the use of these lanes' connections, from now on."""
        self._families.readers.append(lambda: self._read_pools(pools))

    def _read_pools(self, pools: Mapping[str, Pool]) -> None:
        for lane, pool in pools.items():
            self._pool_size.set(pool.size, (lane,))
            self._pool_open.set(pool.connected, (lane,))
            self._pool_busy.set(pool.busy, (lane,))
            self._pool_busy_s.set(pool.busy_s, (lane,))

    def watch_queues(self, queues: Mapping[str, Queue]) -> None:
        """Show how many rows wait in these lanes, from now on: also where no batch leaves."""
        self._families.readers.append(lambda: self._read_queues(queues))

    def _read_queues(self, queues: Mapping[str, Queue]) -> None:
        for lane, queue in queues.items():
            self._queue_depth.set(queue.depth, (lane,))

    def watch_breakers(self, breakers: Breakers) -> None:
        """Show which of these are not closed, from now on."""
        self._families.readers.append(lambda: self._read_breakers(breakers))

    def _read_breakers(self, breakers: Breakers) -> None:
        counts = dict.fromkeys(self._breakers.labels_shown(), 0)
        for key in breakers.open_keys():
            method = key.method or FOLLOW_UPS
            labels: Labels = (key.connector, method, breakers.state(key).value)
            counts[labels] = counts.get(labels, 0) + 1
        for shown, count in counts.items():
            self._breakers.set(count, shown)

    def _read_claims(self) -> None:
        self._redis_unavailable.set(self._claims.value((ClaimOutcome.UNAVAILABLE,)))

    # Calls.

    def rpc_started(self, method: str) -> None:
        """A call began, or an item of a batch or stream."""
        self._in_flight.add((method,))

    def rpc_finished(self, method: str, code: str, reason: str, duration_s: float) -> None:
        """It ended; `code` is gRPC's name, `reason` ours, empty where there is none."""
        of_method: Labels = (method,)
        self._in_flight.add(of_method, -1)
        self._rpcs.add((method, code, reason))
        self._rpc_s.observe(duration_s, of_method)

    def merchant_finished(self, merchant: str, code: str) -> None:
        """A call of this merchant ended, or of one that stands for many."""
        self._merchant_rpcs.add((merchant, code))

    def forget_merchant(self, merchant: str) -> None:
        """Show this merchant no longer."""
        for labels in self._merchant_rpcs.labels_shown():
            if labels[0] == merchant:
                self._merchant_rpcs.remove(labels)

    # gateway.application.usecases.Observer

    def claimed(self, outcome: ClaimOutcome) -> None:
        """A call's claim was answered."""
        self._claims.add((outcome,))

    def replayed(self, source: str) -> None:
        """A frozen answer was repeated, from `redis` or `postgres`."""
        self._replays.add((source,))

    def connector_called(
        self, connector: str, kind: OperationKind, answer: ConnectorAnswer, seconds: float
    ) -> None:
        """A call to a PSP ended."""
        self._connector_calls.add((connector, kind, answer.delivery, answer.verdict))
        if answer.outcome is not None:
            code = answer.outcome.response_code
            self._connector_outcomes.add((connector, kind, code))
        self._connector_s.observe(seconds, (connector, kind))
        self.stage_s.observe(seconds, (_PSP,))

    def cascaded(self, before: ConnectorAnswer, answer: ConnectorAnswer) -> None:
        """After `before` another account was asked, with this answer."""
        reason = "not_sent" if before.delivery is Delivery.NOT_SENT else "soft_decline"
        self._cascades.add((reason, decisions.event_of(answer)))

    def acquirer_event(self, host: str, event: str) -> None:
        """Something happened on a connection to an acquirer's host."""
        self._acquirer_events.add((host, event))

    def answered(self, added_s: float) -> None:
        """What a PSP answered is written; so long the call was in the gateway since its claim."""
        self._added_s.observe(added_s)

    def outcome_lost(self, operation: Operation) -> None:
        """An outcome could not be written; recovery settles the operation."""
        self._outcomes_lost.add((operation.kind,))

    # gateway.application.recovery.RecoveryObserver

    def recovered(self, kind: OperationKind, state: OperationState) -> None:
        """Recovery looked at an operation; the state that it is in now."""
        self._recoveries.add((kind, state))

    def recovery_failed(self) -> None:
        """A look of recovery at the store or at an operation failed."""
        self._recovery_failures.add()

    # gateway.receiver.ReceiverObserver and gateway.application.applying.ApplyingObserver

    def notification_received(self, connector: str, receipt: Receipt) -> None:
        """A request for a notification ended; `connector` is empty where none is known."""
        self._notifications.add((connector, receipt.value))

    def notification_applied(self, connector: str, kind: NotificationKind, result: Result) -> None:
        """A notification is done with."""
        self._notifications_applied.add((connector, kind, result))

    def applying_failed(self) -> None:
        """A look at the notifications, or at one of them, failed."""
        self._notifications_failures.add()

    # What breakers tell.

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        """A breaker came into a state."""
        self._breaker_changes.add((key.connector, key.method or FOLLOW_UPS, state.value))

    # The composition root's loops.

    def count_failed(self, what: str) -> None:
        """`what` waits in the database could not be counted: the last values stand."""
        self._count_failures.add((what,))

    def notifications_pending(self, count: int, oldest_age_s: float) -> None:
        """So many are yet to be applied now, the oldest for so long."""
        self._notifications_pending.set(count)
        self._notifications_pending_age_s.set(oldest_age_s)

    def operations_in_doubt(
        self,
        count: int,
        oldest_age_s: float = 0.0,
        needs_person: int = 0,
        by_age: Sequence[tuple[float, int]] = (),
    ) -> None:
        """So many operations are in doubt now, the oldest for so long; so many need a person.

        `by_age` tells how many are at most so old, in seconds, for ascending ages.
        """
        self._in_doubt.set(count)
        self._in_doubt_age_s.set(oldest_age_s)
        self._unresolved.set(needs_person, ("true",))
        self._unresolved.set(count - needs_person, ("false",))
        for bound_s, inside in (*by_age, (math.inf, count)):
            bound = "+Inf" if math.isinf(bound_s) else f"{bound_s:g}"
            self._in_doubt_by_age.set(inside, (bound,))

    def recovery_search_behind(self, seconds: float) -> None:
        """The search for dead senders is behind by so much now."""
        self._search_behind_s.set(seconds)

    def outbox_rows(self, rows: int) -> None:
        """The outbox holds about so many events now."""
        self._outbox_rows.set(rows)

    def event_lag(self, consumers: Sequence[Consumer], held_back_s: float) -> None:
        """How far the consumers are behind now, and for how long events are held back."""
        self._events_held_s.set(held_back_s)
        shown = set()
        for consumer in consumers:
            name = consumer.name
            labels = name.organisation_id, name.mode, name.name
            shown.add(labels)
            self._events_behind.set(consumer.events_behind, labels)
            self._event_lag_s.set(consumer.seconds_behind, labels)
        for gauge in (self._events_behind, self._event_lag_s):
            for gone in set(gauge.labels_shown()) - shown:
                gauge.remove(gone)

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Read whether calls are served when it is asked for."""
        self._families.readers.append(lambda: self._ready.set(is_ready()))

    def watch_event_streams(self, count: Callable[[], int]) -> None:
        """Read the number of open streams when it is asked for."""
        self._families.readers.append(lambda: self._event_streams.set(count()))

    # gateway.application.events.EventMetrics

    def events_read(self, events: int, reader: str) -> None:
        """A page was read, by the `tail` or by a `stream` that is behind it."""
        self._events_read.add((reader,), events)

    def loop_lagged(self, seconds: float) -> None:
        """The event loop woke a task so much later than it was to."""
        self._loop_lag_s.observe(seconds)

    # storage.batching.LaneMetrics

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        """A batch left; its oldest row had waited so long."""
        of_lane: Labels = (lane,)
        self._batch_rows.observe(rows, of_lane)
        self._batch_wait_s.observe(wait_s_of_oldest, of_lane)

    def batch_failed(self, lane: str, rows: int, failure: Enum) -> None:  # noqa: ARG002 - the port's
        """A flush raised, and was treated as `failure` says."""
        self._batch_failures.add((lane, failure))

    # storage.redis.claims.ClaimMetrics

    def claims_answered(self, outcome: Enum, claims: int) -> None:
        """Nothing: `claimed` counts them, once for each call, where no Redis is reached too."""

    def settlements_dropped(self, reason: str, settlements: int) -> None:
        """Releases or cache entries did not reach Redis."""
        self._settlements_dropped.add((reason,), settlements)

    def redis_available(self, available: bool) -> None:
        """Redis answers again, or no longer."""
        self._redis_up.set(available)


_GATE_GAUGES: Final[dict[str, tuple[str, OverWorkers, Callable[[Gate], float]]]] = {
    "limit": ("Calls that the gateway may work on at once.", "sum", lambda gate: gate.limit),
    "overloaded": (
        "Whether the limit is lowered for overload: 1 or 0.",
        "max",
        lambda gate: gate.engaged,
    ),
    "working": (
        "Calls that the gateway works on, without those that wait for a PSP.",
        "sum",
        lambda gate: gate.working,
    ),
    "in_flight": (
        "Calls inside, those that wait for a PSP included.",
        "sum",
        lambda gate: gate.in_flight,
    ),
    "merchants": ("Merchants that have calls inside.", "max", lambda gate: gate.merchants),
    "delay_seconds": (
        "What the gateway's own stages took lately, together.",
        "max",
        lambda gate: gate.delay_s,
    ),
    "base_seconds": ("What they take unhindered.", "max", lambda gate: gate.base_s),
}
"""Of each gauge of a gate: what it means, what several workers make together, how it is read."""


class MeasuredOccupancy:
    """`gateway.application.usecases.Occupancy`: a gate, whose stages' times are counted besides."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self.leave = gate.leave
        self.come_back = gate.come_back
        self.carry = gate.carry
        self.release = gate.release
        self._gate_passed = gate.passed
        self._observe = metrics.stage_s.observe

    def passed(self, stage: Stage, seconds: float) -> None:
        """A call has passed a stage."""
        self._gate_passed(stage, seconds)
        self._observe(seconds, (stage,))
