"""The chart's dashboards and alerts, as far as they can be seen without a gateway."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry.metrics import ADDED_S_SLO
from tests.chart_scripts import load

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "docs" / "runbooks"
SECTIONS = (
    "## What it means",
    "## What callers see",
    "## How to look",
    "## What to do",
    "## What not to do",
)

chart_queries = load(ROOT / "helm" / "chart_queries.py")
DASHBOARDS: dict[str, Any] = chart_queries.dashboards()


# --- the reader of PromQL -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "metrics", "grouped"),
    [
        ("up", {"up": []}, []),
        (
            'sum by (a, b) (rate(x_total{c=~"1|2",d!="{}"}[5m]))',
            {"x_total": ["c", "d"]},
            ["a", "b"],
        ),
        ("sum(x) by (a) / on (b) group_left (c) y offset 5m", {"x": [], "y": []}, ["a", "b", "c"]),
        ("1e3 * x:y_rate5m > bool 0.5 or absent(z)", {"x:y_rate5m": [], "z": []}, []),
        ("x[1h:5m] unless -x @ 1", {"x": []}, []),
    ],
)
def test_metrics_and_labels_are_found_in_a_query(
    expression: str, metrics: dict[str, list[str]], grouped: list[str]
) -> None:
    used, labels = chart_queries.uses(expression)
    assert {use.metric: [label for label, _ in use.matchers] for use in used} == metrics
    assert sorted(labels) == grouped


@pytest.mark.parametrize("expression", ["sum(x", "x]", 'x{a="b}', "x ? y", "rate(x[5m)]"])
def test_what_is_no_query_is_an_error(expression: str) -> None:
    with pytest.raises(ValueError, match=r"closes nothing|is missing|is no PromQL"):
        chart_queries.uses(expression)


# --- dashboards -----------------------------------------------------------------------------------


def test_the_dashboards_are_the_four_that_are_shipped() -> None:
    assert list(DASHBOARDS) == ["hot-path", "psps-and-doubts", "stores", "traffic-and-slo"]
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == 4


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_asks_the_data_source_that_is_chosen(name: str) -> None:
    variables = {each["name"]: each["type"] for each in DASHBOARDS[name]["templating"]["list"]}
    assert variables == {"datasource": "datasource", "namespace": "query", "job": "query"}
    asked = [panel for panel in chart_queries.panels(DASHBOARDS[name]) if panel["type"] != "row"]
    assert asked
    for panel in asked:
        assert panel["targets"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_metric_of_a_dashboard_is_that_of_the_chosen_gateways(name: str) -> None:
    for panel in chart_queries.panels(DASHBOARDS[name]):
        for target in panel.get("targets", ()):
            used, _ = chart_queries.uses(chart_queries.filled_in(target["expr"]))
            assert used, panel["title"]
            for use in used:
                chosen = {("namespace", "$namespace"), ("job", "$job")}
                assert chosen <= set(use.matchers), (panel["title"], use)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_a_place_of_their_own(name: str) -> None:
    found = list(chart_queries.panels(DASHBOARDS[name]))
    assert len({panel["id"] for panel in found}) == len(found)
    taken: set[tuple[int, int]] = set()
    for panel in found:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        columns = range(at["x"], at["x"] + at["w"])
        cells = set(itertools.product(columns, range(at["y"], at["y"] + at["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells


# --- alerts and runbooks --------------------------------------------------------------------------


def alerts() -> set[str]:
    return {query.alert for query in chart_queries.alert_queries() if query.alert}


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == alerts()


def test_every_alert_says_whom_it_wakes_and_where_its_runbook_is() -> None:
    text = "".join(path.read_text("utf-8") for path in (chart_queries.CHART / "alerts").iterdir())
    rules = re.split(r"^      - (?=alert|record)", text, flags=re.MULTILINE)
    rules = [rule for rule in rules if rule.startswith("alert: ")]
    assert len(rules) >= len(alerts())
    for rule in rules:
        name = rule.partition("\n")[0].removeprefix("alert: ")
        assert re.search(r"^        labels: {severity: (page|ticket)}$", rule, re.MULTILINE), name
        assert re.search(r"^          summary: \S", rule, re.MULTILINE), name
        assert f"\n          runbook_url: docs/runbooks/{name}.md\n" in rule + "\n", name


@pytest.mark.parametrize("name", sorted(alerts()))
def test_a_runbook_answers_the_five_questions_of_whoever_is_woken(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text("utf-8")
    assert text.startswith(f"# {name}\n")
    assert tuple(re.findall(r"^## .*$", text, re.MULTILINE)) == SECTIONS
    for heading, section in itertools.pairwise(re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]):
        assert heading.strip().count("\n") >= 2, heading
        assert section.strip().count("\n") >= 2, section


def test_the_queries_of_runbooks_ask_for_metrics_that_exist() -> None:
    exported = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text("utf-8")))
    for path in RUNBOOKS.glob("*.md"):
        for metric in re.findall(r"\b(?:gateway|process)_[a-z_]+\b", path.read_text("utf-8")):
            base = re.sub(r"_(bucket|count|sum)$", "", metric)
            assert {metric, base} & exported, f"{path.name}: {metric}"
        text = path.read_text("utf-8")
        for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if not block.startswith("SELECT"):
                used, _ = chart_queries.uses(block)
                assert used, f"{path.name}: {block}"


def test_every_alert_has_a_test_of_its_own() -> None:
    tested = (ROOT / "helm" / "alerts_test.yaml").read_text("utf-8")
    assert set(re.findall(r'alertname(?:: |=")(\w+)', tested)) == alerts()


def test_the_objective_of_latency_is_the_same_everywhere() -> None:
    alert_text = "".join(query.expression for query in chart_queries.alert_queries())
    bounds = re.findall(r'le="([^"]+)"', alert_text + json.dumps(DASHBOARDS).replace('\\"', '"'))
    assert set(bounds) == {str(ADDED_S_SLO)}
