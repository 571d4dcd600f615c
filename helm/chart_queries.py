"""What the chart's dashboards and alerts ask of Prometheus: their queries, and the metrics and
labels in them. Needs the standard library alone, so that the tests can compare with a gateway.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CHART: Final = Path(__file__).parent / "payment-gateway"

TARGET_LABELS: Final = frozenset({"namespace", "job", "instance", "pod"})
"""Labels that no gateway exports: Prometheus adds them as it scrapes."""


@dataclass(frozen=True, slots=True)
class Use:
    """A metric in a query."""

    metric: str
    matchers: tuple[tuple[str, str], ...] = ()
    """Of its selector: each label, and the value or regular expression that it is compared to."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query of a dashboard's panel, or the expression of a rule."""

    where: str
    expression: str
    record: str = ""
    """The metric that a recording rule makes of it."""
    alert: str = ""
    legend_labels: frozenset[str] = frozenset()
    """Those that the panel's legend names."""


# --- PromQL ---------------------------------------------------------------------------------------

_TOKEN: Final = re.compile(
    r"""\s+ | \#[^\n]*
    | (?P<text>"(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | `[^`]*`)
    | (?P<number>0x[0-9a-fA-F]+ | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+|[a-z]+(?:\d+[a-z]+)*)?)
    | (?P<name>[a-zA-Z_$][\w:$]*)
    | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^=<>(){}\[\],:@])""",
    re.VERBOSE,
)
_GROUPING: Final = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_WORDS: Final = frozenset({"and", "or", "unless", "bool", "offset", "inf", "nan"})


def tokens(expression: str) -> list[tuple[str, str]]:
    """The kind and the text of each token. Raises ValueError for what PromQL does not have."""
    found, place = [], 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            raise ValueError(f"{expression[place:]!r} is no PromQL")
        if match.lastgroup is not None:
            found.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    return found


def uses(expression: str) -> tuple[list[Use], frozenset[str]]:
    """The metrics of an expression, and the labels that it groups by or matches on.

    Raises ValueError for brackets that do not fit, and for what is no PromQL.
    """
    parts = [*tokens(expression), ("end", "")]
    _check_brackets(parts)
    metrics: list[Use] = []
    grouped: set[str] = set()
    place = 0
    while place < len(parts):
        kind, text = parts[place]
        following = parts[place + 1][1] if kind == "name" else ""
        if kind != "name" or text.lower() in _WORDS:
            place += 1
        elif text in _GROUPING:
            end = place + 1
            if following == "(":
                end = parts.index(("sign", ")"), place)
                grouped.update(each for what, each in parts[place:end] if what == "name")
                grouped.discard(text)
            place = end
        elif following == "{":
            end = parts.index(("sign", "}"), place)
            inside = [each for what, each in parts[place + 2 : end] if what in ("name", "text")]
            matchers = zip(inside[::2], (each[1:-1] for each in inside[1::2]), strict=True)
            metrics.append(Use(text, tuple(matchers)))
            place = end
        else:
            # A function, or an aggregation whose labels come first.
            if following != "(" and following not in _GROUPING:
                metrics.append(Use(text))
            place += 1
    return metrics, frozenset(grouped)


def _check_brackets(parts: list[tuple[str, str]]) -> None:
    closing = {"(": ")", "{": "}", "[": "]"}
    expected: list[str] = []
    for kind, text in parts:
        if kind != "sign":
            continue
        if text in closing:
            expected.append(closing[text])
        elif text in closing.values() and (not expected or expected.pop() != text):
            raise ValueError(f"{text} closes nothing")
    if expected:
        raise ValueError(f"{expected[-1]} is missing")


# --- files ----------------------------------------------------------------------------------------


def dashboards() -> dict[str, Any]:
    """The dashboards by their files' names without `.json`."""
    paths = sorted((CHART / "dashboards").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def panels(dashboard: Any) -> Iterator[Any]:
    """Its panels, those in rows too."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def dashboard_queries() -> Iterator[Query]:
    """The queries of all panels and variables, with values for Grafana's variables."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel.get("targets", ()):
                legend = frozenset(re.findall(r"{{\s*(\w+)\s*}}", target.get("legendFormat", "")))
                where = f"{name}: {panel['title']}"
                yield Query(where, filled_in(target["expr"]), legend_labels=legend)
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                asked = variable["query"]["query"]
                match = re.fullmatch(r"label_values\((.*), (\w+)\)", asked, re.DOTALL)
                if match is None:
                    raise ValueError(f"{name}: ${variable['name']} asks {asked}")
                yield Query(f"{name}: ${variable['name']}", f"max by ({match[2]}) ({match[1]})")


def filled_in(expression: str) -> str:
    """A query with values for Grafana's own variables; the dashboards' stand only in texts."""
    return re.sub(r"\$__(rate_interval|interval|range)", "5m", expression)


_RULE: Final = re.compile(r"      - (record|alert): (\S+)")
_FIELD: Final = re.compile(r"        (\w+):(?: (.*))?")


def alert_queries() -> Iterator[Query]:
    """The rules of alerts/, read in the form that they are written in (YAML is no part of Python).

    Raises ValueError for a rule without an expression.
    """
    for path in sorted((CHART / "alerts").glob("*.yaml")):
        kind = name = ""
        field = ""
        lines: list[str] = []
        for line in [*path.read_text(encoding="utf-8").splitlines(), "      - record: end"]:
            if match := _RULE.fullmatch(line):
                if name:
                    if not lines:
                        raise ValueError(f"{path.name}: {name} has no expression")
                    yield Query(
                        f"{path.name}: {name}",
                        "\n".join(lines),
                        record=name if kind == "record" else "",
                        alert=name if kind == "alert" else "",
                    )
                kind, name, field, lines = match[1], match[2], "", []
            elif match := _FIELD.fullmatch(line):
                field = match[1]
                if field == "expr" and match[2] != "|":
                    raise ValueError(f"{path.name}: {name}: write the expression as a block")
            elif field == "expr" and line.startswith("          "):
                lines.append(line)


def rule_file() -> str:
    """All queries of the dashboards as recording rules, in JSON, which is YAML: promtool's food."""
    rules = [
        {"record": f"dashboards:query:{number}", "expr": query.expression}
        for number, query in enumerate(dashboard_queries())
    ]
    return json.dumps({"groups": [{"name": "dashboards", "rules": rules}]})
