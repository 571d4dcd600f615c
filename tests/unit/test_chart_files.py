"""The Helm chart, as far as it can be seen without Helm; `make chart` does the rest."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from gateway.settings import PREFIX, Settings, variable
from gateway.telemetry.metrics import Metrics
from gateway.workers import EXIT_S_MAX, STOP_MARGIN_S
from tests.chart_scripts import load

ROOT = Path(__file__).parents[2]
HELM = ROOT / "helm"
CHART = HELM / "payment-gateway"


chart_files = load(HELM / "chart_files.py")
locked_subset = load(HELM / "locked_subset.py")
wait_for_rollout = load(CHART / "files" / "wait_for_rollout.py")


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    return found


def text_of(*paths: Path) -> str:
    return "\n".join(path.read_text("utf-8") for path in paths)


def templates() -> list[Path]:
    return sorted(path for path in (CHART / "templates").rglob("*") if path.is_file())


# --- what follows from elsewhere ------------------------------------------------------------------


def test_the_readme_is_that_of_the_values() -> None:
    committed = (CHART / "README.md").read_text("utf-8")
    assert committed == chart_files.readme_text(), "run `python helm/chart_files.py`"


def test_the_schema_knows_the_settings_that_exist() -> None:
    committed = (CHART / "values.schema.json").read_text("utf-8")
    assert committed == chart_files.schema_text(), "run `python helm/chart_files.py`"


def test_every_setting_can_be_set_or_follows_from_another_value() -> None:
    properties = schema()["properties"]
    free = set(properties["settings"]["properties"]) | set(
        properties["secretSettings"]["properties"]
    )
    assert free | chart_files.OWNED == set(Settings.model_fields)
    assert not free & chart_files.OWNED


def test_every_variable_that_the_templates_name_is_a_setting() -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z][A-Z_]+[A-Z]", text_of(*templates())))
    known = {variable(name) for name in Settings.model_fields}
    assert named <= known
    assert {variable(name) for name in chart_files.OWNED} <= named, "or it cannot be set at all"


def test_every_documented_value_is_in_the_schema_and_every_value_is_documented() -> None:
    rows = chart_files.documented_values((CHART / "values.yaml").read_text("utf-8"))
    documented = {path for path, _, _ in rows if path}
    for path in documented:
        place = schema()
        for name in path.split("."):
            place = place["properties"][name]

    def leaves(place: dict[str, Any], path: str) -> Iterator[str]:
        for name, inner in place.get("properties", {}).items():
            below = f"{path}.{name}" if path else name
            if below in documented or below in ("global", "settings", "secretSettings"):
                continue
            if "properties" not in inner:
                yield below
            yield from leaves(inner, below)

    undocumented = {
        path
        for path in leaves(schema(), "")
        if not any(path.startswith(f"{known}.") for known in documented)
    }
    assert not undocumented


def test_a_value_without_a_comment_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"values\.yaml:3: b has no comment"):
        chart_files.documented_values("# -- A.\na: 1\nb: 2\n")


def test_the_schema_is_a_json_schema() -> None:
    jsonschema = pytest.importorskip(
        "jsonschema", reason="not run: jsonschema comes with `make chart`, which checks it too"
    )
    jsonschema.Draft7Validator.check_schema(schema())


def test_nothing_that_is_not_listed_passes_the_schema() -> None:
    assert schema()["additionalProperties"] is False

    def open_objects(place: object, path: str) -> Iterator[str]:
        if isinstance(place, dict):
            if "properties" in place and place.get("additionalProperties", True) is True:
                yield path
            for name, inner in place.items():
                yield from open_objects(inner, f"{path}/{name}")

    # Kubernetes' own objects, of which the schema holds only what must not be changed.
    allowed = {"/properties/podSecurityContext", "/properties/securityContext"}
    assert set(open_objects(schema(), "")) == allowed


# --- versions and numbers that stand in two places ------------------------------------------------


def test_chart_and_gateway_have_one_version() -> None:
    chart = (CHART / "Chart.yaml").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert re.search(r"^version: (\S+)$", chart, re.MULTILINE)[1] == project["version"]  # type: ignore[index]
    assert re.search(r'^appVersion: "(\S+)"$', chart, re.MULTILINE)[1] == __version__  # type: ignore[index]


def test_the_grace_period_counts_as_the_supervisor_does() -> None:
    helpers = (CHART / "templates" / "_helpers.tpl").read_text("utf-8")
    margin = re.search(r"mulf 2 \.Values\.settings\.drain_grace_s \| ceil \| int\) (\d+)", helpers)
    assert margin is not None
    assert int(margin[1]) >= STOP_MARGIN_S + EXIT_S_MAX


def test_envoy_s_defaults_are_those_of_the_settings() -> None:
    envoy = (CHART / "templates" / "_envoy.tpl").read_text("utf-8")
    found = re.findall(r":= (\d+) }}{{- if hasKey \$settings \"(\w+)\"", envoy)
    assert len(found) == 5
    for number, name in found:
        assert int(number) == Settings.model_fields[name].default


def test_the_image_s_user_is_the_chart_s() -> None:
    values = (CHART / "values.yaml").read_text("utf-8")
    user = re.search(r"runAsUser: (\d+)", values)
    assert user is not None
    assert f"USER {user[1]}:{user[1]}" in (HELM / "Dockerfile").read_text("utf-8")


def test_the_metric_that_pods_are_scaled_on_is_exported() -> None:
    exported = set(re.findall(r"^# TYPE (\w+)", Metrics().render().decode(), re.MULTILINE))
    used = re.findall(
        r"gateway_[a-z_]+",
        text_of(CHART / "values.yaml", CHART / "templates" / "autoscaling.yaml"),
    )
    assert used
    assert set(used) <= exported


# --- locks ----------------------------------------------------------------------------------------


def test_the_image_gets_what_the_gateway_requires_and_no_tool() -> None:
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    runtime = locked_subset.subset(lock, "runtime")
    names = set(re.findall(r"^([a-z0-9._-]+)==", runtime, re.MULTILINE))
    required = {
        re.split(r"[^A-Za-z0-9._-]", each)[0] for each in project["project"]["dependencies"]
    }
    assert required - names == {"payment-gateway-stubs"}
    assert not names & {"pytest", "ruff", "mypy", "locust", "hatchling", "grpcio-tools"}
    assert runtime.count("--hash=sha256:") >= len(names)


def test_the_chart_s_lock_has_hashes_and_the_versions_of_the_main_one() -> None:
    lock = (ROOT / "requirements-chart.lock").read_text("utf-8")
    main_lock = (ROOT / "requirements.lock").read_text("utf-8")
    pins, main = (
        dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))
        for text in (lock, main_lock)
    )
    assert pins["helm-python-sdk"] == "0.2.2"
    assert all(main.get(name, version) == version for name, version in pins.items())
    assert lock.count("--hash=sha256:") >= len(pins)
    assert "://" not in lock


# --- the wait between the two phases of a migration -----------------------------------------------


def deployment(**changes: int) -> dict[str, Any]:
    status = {"observedGeneration": 4, "replicas": 3, "updatedReplicas": 3, "availableReplicas": 3}
    return {
        "metadata": {"generation": 4},
        "spec": {"replicas": 3},
        "status": status | changes,
    }


def pod(*, leaving: bool) -> dict[str, Any]:
    return {"metadata": {"name": "a"} | ({"deletionTimestamp": "now"} if leaving else {})}


def test_a_rollout_is_done_when_all_pods_are_new_and_none_drains() -> None:
    assert not wait_for_rollout.unfinished(deployment(), [pod(leaving=False)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observedGeneration": 3}, "has not been looked at"),
        ({"updatedReplicas": 2}, "2 of 3 pods"),
        ({"replicas": 4}, "old pods run"),
        ({"availableReplicas": 2}, "not available"),
    ],
)
def test_a_rollout_under_way_is_waited_for(changes: dict[str, int], said: str) -> None:
    assert said in wait_for_rollout.unfinished(deployment(**changes), [])


def test_an_old_pod_that_drains_is_waited_for() -> None:
    assert "pods drain: a" in wait_for_rollout.unfinished(deployment(), [pod(leaving=True)])
