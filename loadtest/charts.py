"""Charts as inline SVG: no script, no network, readable in light and dark. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 24, 30
POINTS_MAX: Final = 360
"""More points than a line has room for are drawn as the highest of each group."""
TICKS: Final = 5

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One series."""

    name: str
    points: Sequence[Point]
    color: int
    """Its place in the palette of the page, from 1."""
    marks: bool = False
    """Whether each point is drawn, with its value as a tooltip."""
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """A horizontal line that a series should stay below."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Band:
    """A part of the horizontal axis with a name."""

    name: str
    begin: float
    end: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    x_title: str,
    log_y: bool = False,
    limit: Limit | None = None,
    bands: Sequence[Band] = (),
    x_ticks: Sequence[tuple[float, str]] = (),
) -> str:
    """A chart of lines over a common axis; an explanation where there is nothing to draw."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return figure(title, '<p class="empty">nothing was measured</p>', "")
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    if limit is not None:
        ys.append(limit.value)
    x_low, x_high = min(xs), max(xs)
    x_of = _scale(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT)
    y_ticks, y_of = _y_axis(ys, log_y)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_bands(bands, x_of, x_low, x_high),
        *_grid(y_ticks, y_of, unit),
        *_x_axis(x_ticks or [(x, _number(x)) for x in _nice(x_low, x_high)], x_of, x_title),
    ]
    if limit is not None:
        y = y_of(limit.value)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="limit" x="{WIDTH - RIGHT}" y="{y - 4}" text-anchor="end">'
            f"{escape(limit.name)}</text>"
        )
    for line in drawn:
        parts += _line(line, x_of, y_of, unit)
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="c{line.color}{" dashed" if line.dashed else ""}"></i>'
        f"{escape(line.name)}</span>"
        for line in drawn
    )
    return figure(title, "".join(parts), legend)


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars of counts, each with its number."""
    if not bars:
        return figure(title, '<p class="empty">none</p>', "")
    largest = max(value for _, value in bars) or 1
    row, height = 26, 26 * len(bars) + 8
    label, room = 250, WIDTH - 250 - 90
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for number, (name, value) in enumerate(bars):
        y = 4 + number * row
        width = max(room * value / largest, 1)
        parts.append(
            f'<text class="label" x="{label - 8}" y="{y + 15}" text-anchor="end">'
            f"{escape(name)}</text>"
            f'<rect class="b1" x="{label}" y="{y + 2}" width="{width:.1f}" height="18" rx="3"/>'
            f'<text class="value" x="{label + width + 6:.1f}" y="{y + 15}">{value:,.0f}</text>'
        )
    parts.append("</svg>")
    return figure(title, "".join(parts), "")


def figure(title: str, body: str, legend: str) -> str:
    """A chart with its title and legend."""
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f"{body}</figure>"
    )


def image(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str,
    x_title: str,
    bands: Sequence[Band] = (),
) -> str:
    """A line chart as a file of its own, with its title and legend in it; for at least one line."""
    chart = line_chart(title, lines, unit=unit, x_title=x_title, bands=bands)
    drawing = chart[chart.index("<svg") : chart.index("</svg>")].partition(">")[2]
    parts = [f'<text class="title" x="4" y="-26">{escape(title)}</text>']
    x = float(LEFT)
    for line in lines:
        parts.append(
            f'<line class="l{line.color}" x1="{x}" x2="{x + 18}" y1="-10" y2="-10"/>'
            f'<text x="{x + 23}" y="-6">{escape(line.name)}</text>'
        )
        x += 40 + 6.2 * len(line.name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -44 {WIDTH} {HEIGHT + 44}" role="img"'
        f' aria-label="{escape(title)}"><style>{_IMAGE_STYLE}</style>'
        f'<rect class="page" y="-44" width="{WIDTH}" height="{HEIGHT + 44}"/>'
        f"{''.join(parts)}{drawing}</svg>\n"
    )


_IMAGE_STYLE: Final = (
    ":root{--page:#fff;--ink:#16202c;--soft:#5b6776;--line:#e1e6ec;"
    "--c1:#1668b8;--c2:#c4471d;--c3:#7a8592;--c4:#8a3fb0}"
    "@media(prefers-color-scheme:dark){:root{--page:#11161c;--ink:#e6ebf1;--soft:#9aa7b5;"
    "--line:#2b3642;--c1:#62a8ea;--c2:#f08a5d;--c3:#93a0ae;--c4:#c58be0}}"
    "text{font:11px sans-serif;fill:var(--soft)}text.title{font-size:13px;fill:var(--ink)}"
    ".page{fill:var(--page)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}"
    "rect.shaded{fill:var(--soft);opacity:.1}rect.plain{fill:none}"
    "polyline{fill:none;stroke-width:1.6}"
    ".l1{stroke:var(--c1)}.l2{stroke:var(--c2)}.l3{stroke:var(--c3)}.l4{stroke:var(--c4)}"
)
"""As report.css has it, for an image that no page gives a style."""


def percentile_ticks(highest: float) -> list[tuple[float, str]]:
    """Where 0, 50, 90, 99 … % stand on the axis of `percentile_place`."""
    ticks = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
    return [(percentile_place(each), f"{each:g} %") for each in ticks if each <= highest]


def percentile_place(percent: float) -> float:
    """Each nine takes as much room as the one before, as HdrHistogram's plots have it."""
    return -math.log10(1 - min(percent, 99.9999) / 100)


def thinned(points: Sequence[Point], *, lowest_too: bool = False) -> list[Point]:
    """At most POINTS_MAX points: of each group the highest, since it is the worst.

    `lowest_too`: and the lowest, of what is bad where it is low.
    """
    if len(points) <= POINTS_MAX:
        return list(points)
    size = math.ceil(len(points) * (1 + lowest_too) / POINTS_MAX)
    kept: list[Point] = []
    for begin in range(0, len(points), size):
        group = points[begin : begin + size]
        ends = [max(group, key=lambda point: point[1])]
        if lowest_too and len(group) > 1:
            ends.append(min(group, key=lambda point: point[1]))
        kept += sorted(set(ends))
    return kept


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    return lambda value: round(begin + (value - low) / (high - low) * (end - begin), 1)


def _y_axis(ys: Sequence[float], log: bool) -> tuple[list[float], Callable[[float], float]]:
    if not log:
        ticks = _nice(0.0, max(ys) or 1.0)
        step = ticks[1] - ticks[0]
        high = ticks[-1] if ticks[-1] >= max(ys) else ticks[-1] + step
        if high > ticks[-1]:
            ticks.append(high)
        return ticks, _scale(0.0, high, HEIGHT - BOTTOM, TOP)
    floor = max(min((y for y in ys if y > 0), default=0.1), 0.01)
    low, high = math.floor(math.log10(floor)), math.ceil(math.log10(max(*ys, floor * 10)))
    scale = _scale(low, max(high, low + 1), HEIGHT - BOTTOM, TOP)
    lowest = 10.0**low
    return (
        [10.0**exponent for exponent in range(low, max(high, low + 1) + 1)],
        lambda value: scale(math.log10(max(value, lowest))),
    )


def _nice(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about TICKS of them."""
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= TICKS)
    first = math.ceil(low / step)
    ticks = [round(number * step, 10) for number in range(first, int(high / step + 1e-9) + 1)]
    return ticks if len(ticks) > 1 else [first * step, (first + 1) * step]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _grid(ticks: Sequence[float], y_of: Callable[[float], float], unit: str) -> list[str]:
    parts = []
    for tick in ticks:
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">'
            f"{_number(tick)}</text>"
        )
    parts.append(f'<text class="tick" x="4" y="12">{escape(unit)}</text>')
    return parts


def _x_axis(
    ticks: Sequence[tuple[float, str]], x_of: Callable[[float], float], title: str
) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for x, text in ticks:
        anchor = "end" if x_of(x) > WIDTH - RIGHT - 20 else "middle"
        parts.append(
            f'<text class="tick" x="{x_of(x)}" y="{base + 14}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">'
        f"{escape(title)}</text>"
    )
    return parts


def _bands(
    bands: Sequence[Band], x_of: Callable[[float], float], low: float, high: float
) -> list[str]:
    parts = []
    for number, band in enumerate(bands):
        begin, end = x_of(max(band.begin, low)), x_of(min(band.end, high))
        if end <= begin:
            continue
        shade = "shaded" if number % 2 == 0 else "plain"
        parts.append(
            f'<rect class="{shade}" x="{begin}" y="{TOP}" width="{end - begin:.1f}"'
            f' height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<text class="band" x="{begin + 4}" y="{TOP + 11}">{escape(band.name)}</text>'
        )
    return parts


def _line(
    line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float], unit: str
) -> list[str]:
    places = [(x_of(x), y_of(y)) for x, y in line.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    dashed = " dashed" if line.dashed else ""
    parts = [f'<polyline class="l{line.color}{dashed}" points="{path}"/>']
    if line.marks:
        for (x, y), (_, value) in zip(places, line.points, strict=True):
            parts.append(
                f'<circle class="m{line.color}" cx="{x}" cy="{y}" r="3.5">'
                f"<title>{escape(line.name)}: {value:,.2f} {escape(unit)}</title></circle>"
            )
    return parts
