"""The report of a run: one HTML file with everything in it, to look at and to keep."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final

from loadtest.arrivals import WARM_UP
from loadtest.charts import (
    Band,
    Limit,
    Line,
    Point,
    bar_chart,
    line_chart,
    percentile_place,
    percentile_ticks,
    thinned,
)
from loadtest.measures import Second
from loadtest.runner import Outcome, Step
from loadtest.slo import conclusion

COLORS_MAX: Final = 6
_STYLE: Final = Path(__file__).with_name("report.css")


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the report. Raises OSError."""
    path.write_text(render(outcome), "utf-8")


def render(outcome: Outcome) -> str:
    """The whole page."""
    summary = outcome.summary
    begun = datetime.fromtimestamp(summary["started_at"], UTC)
    plan = outcome.step.plan
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Load test, {begun:%Y-%m-%d %H:%M} UTC</title>",
        f"<style>{_STYLE.read_text('utf-8')}</style></head><body><main>",
        f"<h1>Load test: {escape(summary['profile'])}, {plan.rate:,.0f} sends/s</h1>",
        (
            f'<p class="sub">{begun:%Y-%m-%d %H:%M} UTC · {summary["duration_s"]:g} s measured ·'
            f" mix {escape(plan.mix)} · {escape(plan.arrivals)} arrivals · commit"
            f" <code>{escape(summary['commit'][:12] or 'unknown')}</code></p>"
        ),
        _banner(summary),
        _tiles(summary),
        _charts(outcome),
        "<h2>Gates</h2>",
        _gates(summary["gates"]),
        "<h2>Audit</h2>",
        _audit(summary["audit"]),
        "<h2>Segments and calls</h2>",
        _stats_table("Segment", summary["segments"]),
        _stats_table("Call", summary["kinds"]),
        _refusals(summary["reasons"]),
        "<h2>How it was measured</h2>",
        _explanation(summary),
        _definitions("Machine", summary["machine"]),
        _definitions("Versions", summary["versions"]),
        (
            "<details><summary>Configuration</summary>"
            f"<pre>{escape(json.dumps(summary['config'], indent=1))}</pre></details>"
        ),
        "<details><summary>Second by second</summary>",
        _timeline_table(outcome.step.analysis.timeline()),
        "</details></main></body></html>",
    ]
    return "\n".join(parts)


# --- the top --------------------------------------------------------------------------------------


def _banner(summary: Mapping[str, Any]) -> str:
    kind, said = conclusion(summary)
    # A page has no terminal's capitals.
    word, colon, rest = said.partition(":")
    text = word.capitalize() + colon + rest if colon else said[0].upper() + said[1:]
    missed = [gate["name"] for gate in summary["gates"] if not gate["met"]]
    detail = f" <small>missed: {escape(', '.join(missed))}</small>" if missed else ""
    return f'<p class="banner {kind}"><strong>{escape(text)}</strong>{detail}</p>'


def _tiles(summary: Mapping[str, Any]) -> str:
    tiles = [
        (
            f"{summary['achieved_rps']:,.0f}",
            "answers/s",
            f"of {summary['offered_rps']:,.0f} offered",
        ),
        (
            f"{summary['added_p50_ms']:,.1f}",
            "ms added, p50",
            f"p99.9 {summary['added_p999_ms']:,.1f}",
        ),
        (f"{summary['added_p99_ms']:,.1f}", "ms added, p99", f"max {summary['added_max_ms']:,.1f}"),
        (f"{summary['errors']:,}", "errors", f"{summary['dropped']:,} dropped"),
        _missing_tile(summary["audit"]),
    ]
    if "knee" in summary:
        tiles.insert(0, (f"{summary['knee']['rate']:,.0f}", "sends/s at the knee", ""))
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(more)}</small></div>"
            for value, name, more in tiles
        )
        + "</div>"
    )


def _missing_tile(audit: Mapping[str, Any]) -> tuple[str, str, str]:
    if "failure" in audit:
        return "–", "payments missing", "not audited"
    duplicates = audit["duplicate_charges"]
    charged = "charges not compared" if duplicates is None else f"{duplicates:,} charged twice"
    return (
        f"{audit['missing']:,}",
        "payments missing",
        f"of {audit['acked']:,} acknowledged; {charged}",
    )


# --- charts ---------------------------------------------------------------------------------------


def _charts(outcome: Outcome) -> str:
    summary, step = outcome.summary, outcome.step
    timeline = step.analysis.timeline()
    bands = _segment_bands(step)
    limit_ms = next(
        (gate["limit"] for gate in summary["gates"] if gate["name"].endswith("added p99, ms")), None
    )
    limit = None if limit_ms is None else Limit(f"p99 gate, {limit_ms:g} ms", limit_ms)
    charts = []
    if "knee" in summary:
        charts.append(_knee_chart(summary["knee"], limit))
    charts += [
        line_chart(
            "Added latency over time",
            [
                Line("p50", series(timeline, "added_p50_ms"), 1),
                Line("p99", series(timeline, "added_p99_ms"), 2),
            ],
            unit="ms",
            x_title="seconds, by the intended time",
            limit=limit,
            bands=bands,
        ),
        line_chart(
            "Latency over time, the PSP's delay included",
            [
                Line("p50", series(timeline, "latency_p50_ms"), 1),
                Line("p99", series(timeline, "latency_p99_ms"), 2),
                Line("maximum", series(timeline, "latency_max_ms"), 3),
            ],
            unit="ms",
            x_title="seconds, by the intended time",
            bands=bands,
        ),
        _percentile_chart(step),
        line_chart(
            "Offered against answered",
            [
                Line("offered", series(timeline, "offered"), 3, dashed=True),
                Line("answered", series(timeline, "answered"), 1),
                Line("errors", series(timeline, "errors"), 2),
                Line("dropped", series(timeline, "dropped"), 4),
            ],
            unit="a second",
            x_title="seconds",
            bands=bands,
        ),
        line_chart(
            "CPU by process",
            _usage_lines(step, "cpu_percent"),
            unit="% of a core",
            x_title="seconds",
            bands=bands,
        ),
        line_chart(
            "Memory by process",
            _usage_lines(step, "memory_mb"),
            unit="MB",
            x_title="seconds",
            bands=bands,
        ),
        bar_chart("Calls by status", sorted(summary["codes"].items(), key=lambda each: -each[1])),
    ]
    return '<div class="charts">' + "".join(charts) + "</div>"


def series(timeline: Sequence[Second], name: str) -> list[Point]:
    """A figure second by second; of a long run what is worst in each group of seconds."""
    # A second in which nothing was intended has no latency, which is not one of 0.
    told = [each for each in timeline if each.offered or not name.endswith("_ms")]
    # Of an outage the fewest answers tell.
    return thinned(
        [(each.at_s, float(getattr(each, name))) for each in told], lowest_too=name == "answered"
    )


def _segment_bands(step: Step) -> list[Band]:
    bands = [Band(name, begin, end) for name, begin, end in step.analysis.spans if end > begin]
    # One measured segment needs no name.
    return bands if len(bands) > 2 else [band for band in bands if band.name == WARM_UP]


def _usage_lines(step: Step, name: str) -> list[Line]:
    names = list(step.observations[0].of) if step.observations else []
    return [
        Line(
            process,
            thinned(
                [
                    (each.at - step.started_at, float(getattr(each.of[process], name)))
                    for each in step.observations
                    if each.at >= step.started_at
                ]
            ),
            number % COLORS_MAX + 1,
        )
        for number, process in enumerate(names)
    ]


def _percentile_chart(step: Step) -> str:
    whole = step.analysis.whole
    # A percentile needs calls beyond it; the maximum stands at the end.
    highest = 100 - 100 / max(whole.ok, 2)

    def points(curve: Iterable[tuple[float, float]]) -> list[Point]:
        return [
            (percentile_place(min(percent, highest)), value)
            for percent, value in curve
            if percent <= highest or percent == 100
        ]

    return line_chart(
        "Percentiles, to the maximum",
        [
            Line("added by the gateway", points(whole.added.curve()), 1, marks=True),
            Line("latency", points(whole.latency.curve()), 2, marks=True),
        ],
        unit="ms",
        x_title="percentile",
        log_y=True,
        x_ticks=percentile_ticks(highest),
    )


def _knee_chart(knee: Mapping[str, Any], limit: Limit | None) -> str:
    steps = sorted(knee["steps"], key=lambda each: float(each["rate"]))
    holding = [(each["rate"], each["added_p99_ms"]) for each in steps]
    title = f"The knee: {knee['rate']:,.0f} sends/s"
    if knee["saturates_first"]:
        title += f"; beyond it {knee['saturates_first']} is the busiest process"
    return line_chart(
        title,
        [Line("added p99", holding, 2, marks=True)],
        unit="ms",
        x_title="offered, sends/s",
        log_y=True,
        limit=limit,
    )


# --- tables ---------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="table"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ("", "Gate", "Measured", "Limit"),
        (
            (
                "✓" if gate["met"] else "✗",
                gate["name"],
                "not measured" if gate["value"] is None else f"{gate['value']:,.4g}",
                f"{'≥' if gate['at_least'] else '≤'} {gate['limit']:g}",
            )
            for gate in gates
        ),
    )


def _audit(audit: Mapping[str, Any]) -> str:
    if "failure" in audit:
        return f"<p>Not done: {escape(audit['failure'])}</p>"
    rows = [
        (name.replace("_", " "), "not compared" if value is None else f"{value:,}")
        for name, value in audit.items()
        if name not in ("clean", "source")
    ]
    return f"<p>Compared with {escape(audit['source'])}.</p>" + _table(("Found", "Count"), rows)


def _stats_table(title: str, stats: Mapping[str, Mapping[str, Any]]) -> str:
    head = (title, "offered", "ok", "errors", "dropped", "late")
    milliseconds = ("added p50", "p99", "p99.9", "max ms", "latency p50", "p99", "max ms")
    return _table(
        (*head, *milliseconds),
        (
            (
                name,
                *(f"{each[key]:,}" for key in ("offered", "ok", "errors", "dropped", "late")),
                *(f"{each[f'added_{key}_ms']:,.1f}" for key in ("p50", "p99", "p999", "max")),
                *(f"{each[f'{key}_ms']:,.1f}" for key in ("p50", "p99", "max")),
            )
            for name, each in stats.items()
        ),
    )


def _refusals(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return ""
    rows = ((reason, f"{count:,}") for reason, count in sorted(reasons.items()))
    return _table(("Refusal, the warm-up's too", "Count"), rows)


def _definitions(title: str, values: Mapping[str, Any]) -> str:
    return _table((title, ""), ((name, str(value)) for name, value in values.items()))


def _explanation(summary: Mapping[str, Any]) -> str:
    control, lateness = summary["control_p99_ms"], summary["psp_lateness"]
    parts = [
        (
            "Sends were intended at times fixed beforehand, and every latency counts from the"
            " intended time, so a stall of the server shows in every call that it delayed. Added"
            " latency is the latency of a call without the delay that the PSP drew for that call."
        )
    ]
    if control is not None:
        parts.append(
            f"The same schedule against an empty echo had a p99 of {control:.2f} ms: what generator"
            " and machine add."
        )
    if lateness is not None:
        parts.append(
            f"The simulator wrote its answers {lateness['p99_ms']:.1f} ms later than due at the"
            f" 99th percentile, {lateness['max_ms']:.1f} ms at most."
        )
    if summary["left_out"]:
        parts.append(f"Not part of this run: {', '.join(summary['left_out'])}.")
    return f"<p>{escape(' '.join(parts))}</p>"


def _timeline_table(timeline: Sequence[Second]) -> str:
    return _table(
        ("second", "offered", "answered", "errors", "dropped", "added p50", "added p99", "max ms"),
        (
            (
                *(f"{each.at_s:,}", f"{each.offered:,}", f"{each.answered:,}"),
                *(f"{each.errors:,}", f"{each.dropped:,}", f"{each.added_p50_ms:,.1f}"),
                *(f"{each.added_p99_ms:,.1f}", f"{each.latency_max_ms:,.1f}"),
            )
            for each in timeline
        ),
    )
