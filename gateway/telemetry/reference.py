"""The table of all metrics: `python -m gateway.telemetry.reference` prints docs/metrics.md."""

import sys
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import Metric

from gateway.telemetry.merging import WORKER_LABEL
from gateway.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Documented:
    """What is said about one metric."""

    name: str
    """As queries have it: a counter's with `_total`, a histogram's without what follows it."""
    kind: str
    labels: tuple[str, ...]
    meaning: str
    together: str
    """What the values of several workers make."""

    @property
    def unit(self) -> str:
        """By the name, whose end it is; what is counted where it is none."""
        words = self.name.removesuffix("_total").split("_")
        return next((unit for word, unit in _UNITS.items() if words[-1] == word), "")


_UNITS: Final = {"seconds": "seconds", "bytes": "bytes", "rows": "rows"}
_WORKERS: Final = (
    Documented(
        "gateway_worker_up",
        "gauge",
        (WORKER_LABEL,),
        "Whether the worker answered this scrape: 1 or 0.",
        "apart",
    ),
    Documented(
        "gateway_worker_ready",
        "gauge",
        (WORKER_LABEL,),
        "Whether the worker serves calls: 1 or 0.",
        "apart",
    ),
    Documented(
        "gateway_worker_restarts_total",
        "counter",
        (WORKER_LABEL,),
        "Workers started in the place of one that ended.",
        "apart",
    ),
)
"""What the supervisor of several workers counts itself (gateway.workers)."""


def documented() -> tuple[Documented, ...]:
    """Every metric: the gateway's own, the supervisor's, and those of process and interpreter."""
    own = (
        Documented(
            series.name + ("_total" if series.kind == "counter" else ""),
            series.kind,
            series.labels,
            series.text,
            series.over_workers,
        )
        for series in Metrics().series
    )
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    process = (_of_client(family, "apart") for family in registry.collect())
    registry = CollectorRegistry()
    GCCollector(registry=registry)
    collections = (_of_client(family, "sum") for family in registry.collect())
    return (*own, *_WORKERS, *process, *collections)


def _of_client(family: Metric, together: str) -> Documented:
    name = family.name + ("_total" if family.type == "counter" else "")
    labels = {label for sample in family.samples for label in sample.labels}
    worker = (WORKER_LABEL,) if together == "apart" else ()
    meaning = family.documentation.rstrip(".") + "."
    return Documented(name, family.type, (*sorted(labels), *worker), meaning, together)


_HEAD: Final = f"""\
# Metrics

`/metrics` of GATEWAY_METRICS_ADDRESS, in Prometheus' text format, or in OpenMetrics where the
scraper asks for it. Written by `python -m gateway.telemetry.reference`; do not edit.

A counter's `_total` is part of its name here; a histogram has `_bucket` (label `le`), `_count` and
`_sum`. No label holds anything of a caller, but for the names of consumers of events: methods,
codes and reasons are those of the contract, connectors those of the configuration. Past a thousand
combinations of a metric's labels, further ones are counted as `other`.

One metric tells merchants, where GATEWAY_METRICS_MERCHANTS_MAX says how many:
`gateway_merchant_requests_total`. Each worker gives labels to those with the most calls of its last
minute and counts the rest as `other`; a series begins at 0 with its label and ends with it, so look
at rates. Calls refused before their merchant was known are not in it.

Where calls are traced (`docs/tracing.md`), OpenMetrics has exemplars, the `trace_id` of the latest
traced call of each bucket, for `gateway_rpc_duration_seconds`, `gateway_stage_duration_seconds`,
`gateway_added_duration_seconds` and `gateway_connector_duration_seconds`.

*Workers* says what several of them (GATEWAY_WORKERS) make together; those that are kept apart have
the label `{WORKER_LABEL}`, which there is not with one worker. Counters of a worker that has ended
stay in the sums; what is kept apart ends with its process. Counts and ages of what lies in the
database are those of all gateways: take the `max` over pods, not the sum.

`gateway_stage_duration_seconds` has the stages `claim` (Redis), `intent` (its commit), `psp` and
`outcome` (its commit). `gateway_added_duration_seconds` is what the latency SLO is about: from the
claim to the outcome's commit without the PSP's time, of calls that reached their PSP.
"""


def table() -> str:
    """The whole of docs/metrics.md."""
    lines = [
        _HEAD,
        "| Metric | Type | Labels | Unit | Workers | Meaning |",
        "|---|---|---|---|---|---|",
    ]
    for each in documented():
        labels = ", ".join(f"`{label}`" for label in each.labels)
        lines.append(
            f"| `{each.name}` | {each.kind} | {labels} | {each.unit} | {each.together} "
            f"| {each.meaning} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
