"""`make chart`: everything about the chart that can be seen without a cluster.

Renders every file of ci/ with Helm 4 (helm-python-sdk), validates each object strictly against
Kubernetes' own schemas (kubernetes-validate) and, of custom resources, those of schemas/, compares
with golden/, loads the rendered settings into the gateway, and looks at policies. Values that
contradict each other must be refused, with a text that says so; each value taken away by `null`,
and values at random (chart_fuzz.py), be refused likewise or render to what passes the same checks.
The dashboards' queries and the alerts must be PromQL; where promtool is present, it reads them too,
and runs alerts_test.yaml. Then the chart's scripts run against a gateway.

`--write` writes golden/ anew; `--no-live` leaves the running gateway out; `--image` builds what the
image holds (a minute) and runs that too.
"""

import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

import helm_python
import jsonschema
import kubernetes_validate
import promql_parser
import yaml

import chart_files
import chart_fuzz
import chart_live
import chart_queries
from gateway.settings import PREFIX, Settings, SettingsError, load_settings

HERE: Final = Path(__file__).parent
CHART: Final = chart_files.CHART
KUBERNETES_VERSIONS: Final = tuple(f"1.{minor}" for minor in range(30, 38))
"""From the oldest that Chart.yaml allows to the newest that there are schemas for."""
_FIRST, *_, _LAST = KUBERNETES_VERSIONS
RELEASE: Final = "pay"
NAMESPACE: Final = "payments"
LINT_WARNING: Final = 2
"""helm_python.lint's severity; 3 is an error."""

Object = dict[str, Any]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it is untyped here
    """Refuses a key that stands twice, of which YAML would silently take the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Object:
    keys = [key.value for key, _ in node.value]
    double = sorted({key for key in keys if keys.count(key) > 1})
    if double:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(double)} stands twice")
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_values(path: Path) -> Object:
    """A values file."""
    values: Object = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}  # noqa: S506 - a SafeLoader
    return values


def render(
    chart: helm_python.Chart, values: Object, name: str = RELEASE, namespace: str = NAMESPACE
) -> tuple[list[Object], str]:
    """The objects and the notes. Raises HelmError and yaml.YAMLError."""
    rendered = chart.render(values, name=name, namespace=namespace)
    notes = ""
    objects: list[Object] = []
    for path, text in sorted(rendered.items()):
        if path.endswith("NOTES.txt"):
            notes = text
        else:
            objects += [each for each in yaml.load_all(text, Loader=_Loader) if each]
    return objects, notes


def title(thing: Object) -> str:
    """An object's kind and name, for people."""
    return f"{thing['kind']}/{thing['metadata']['name']}"


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind by their names."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


# --- schemas --------------------------------------------------------------------------------------


def schema_problems(objects: list[Object], versions: tuple[str, ...]) -> Iterator[str]:
    """What Kubernetes, or a custom resource's schema, would refuse."""
    for thing in objects:
        custom = HERE / "schemas" / f"{thing['kind'].lower()}.json"
        if custom.exists():
            validator = jsonschema.Draft202012Validator(yaml.safe_load(custom.read_text()))
            for error in validator.iter_errors(thing):
                yield f"{title(thing)}: {error.json_path}: {error.message}"
            continue
        for version in versions:
            try:
                kubernetes_validate.validate(thing, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{title(thing)}: Kubernetes {version}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"{title(thing)}: {error.message}"


# --- policies -------------------------------------------------------------------------------------


def pod_of(thing: Object) -> Object | None:
    """The pod's specification in an object; None where it has none."""
    if thing["kind"] == "Pod":
        pod: Object = thing["spec"]
        return pod
    if thing["kind"] in ("Deployment", "Job"):
        template: Object = thing["spec"]["template"]["spec"]
        return template
    return None


def containers_of(pod: Object) -> list[Object]:
    """All containers, those of the start among them."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def policy_problems(objects: list[Object]) -> Iterator[str]:
    """What a careful platform team would not let in."""
    for thing in objects:
        pod = pod_of(thing)
        if pod is not None:
            yield from (f"{title(thing)}: {problem}" for problem in _pod_problems(thing, pod))
        if thing["kind"] == "ServiceAccount" and thing.get("automountServiceAccountToken", True):
            yield f"{title(thing)}: mounts its token into pods"
        if thing["kind"] == "ConfigMap" and re.search(
            r"://[^/\s:@]*:[^@\s]+@|PRIVATE KEY", yaml.safe_dump(thing.get("data"))
        ):
            yield f"{title(thing)}: holds a secret"
        if len(thing["metadata"]["name"]) > 63:
            yield f"{title(thing)}: the name is longer than a DNS label"
    yield from _disruption_problems(objects)


def _pod_problems(thing: Object, pod: Object) -> Iterator[str]:
    if pod.get("automountServiceAccountToken", True):
        yield "mounts a service account's token"
    if pod.get("enableServiceLinks", True):
        yield "has variables of every Service of the namespace"
    if pod.get("hostNetwork") or pod.get("hostPID") or pod.get("hostIPC"):
        yield "shares the host's namespaces"
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    for container in containers_of(pod):
        for problem in _container_problems(container):
            yield f"container {container['name']}: {problem}"
    if thing["kind"] == "Deployment":
        for container in pod["containers"]:
            missing = {"startupProbe", "livenessProbe", "readinessProbe"} - set(container)
            if missing:
                yield f"container {container['name']}: has no {', '.join(sorted(missing))}"
            if container.get("livenessProbe", {}).get("grpc") is not None:
                yield f"container {container['name']}: its liveness depends on the stores"


def _container_problems(container: Object) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation", True) or security.get("privileged"):
        yield "may gain privileges"
    if not security.get("readOnlyRootFilesystem"):
        yield "may write to its root file system"
    if "ALL" not in security.get("capabilities", {}).get("drop", []):
        yield "keeps capabilities"
    for bound in ("requests", "limits"):
        missing = {"cpu", "memory"} - set(container.get("resources", {}).get(bound, {}))
        if missing:
            yield f"has no {bound} of {', '.join(sorted(missing))}"
    if re.search(r"(:latest|/[^:@]*|^[^:@]*)$", container["image"]):
        yield f"its image {container['image']} is not pinned"
    for variable in container.get("env", []):
        if re.search(r"(DSN|URL|KEY|PASSWORD|TOKEN)$", variable["name"]) and re.search(
            r"://[^/\s:@]*:[^@\s]+@|^gwk_", variable.get("value", "")
        ):
            yield f"{variable['name']} holds a secret"


def _disruption_problems(objects: list[Object]) -> Iterator[str]:
    budgets = named(objects, "PodDisruptionBudget")
    scalers = [each for each in objects if each["kind"].startswith(("Horizontal", "Scaled"))]
    for name, deployment in named(objects, "Deployment").items():
        replicas = deployment["spec"].get("replicas")
        scaled = [each["spec"]["scaleTargetRef"]["name"] for each in scalers]
        if name in scaled and replicas is not None:
            yield f"{title(deployment)}: states replicas beside what scales it"
        if (replicas is None or replicas > 1) and name not in budgets:
            yield f"{title(deployment)}: runs several pods without a PodDisruptionBudget"


def reference_problems(objects: list[Object]) -> Iterator[str]:
    """Names and keys of the chart's own objects that pods refer to and nobody makes."""
    prefix = min(named(objects, "Service"), key=len)
    secrets = {
        name: set(each.get("stringData", {})) for name, each in named(objects, "Secret").items()
    }
    for each in named(objects, "Certificate").values():
        secrets[each["spec"]["secretName"]] = {"tls.crt", "tls.key", "ca.crt"}
    configs = {name: set(each["data"]) for name, each in named(objects, "ConfigMap").items()}
    accounts = named(objects, "ServiceAccount")
    for thing in objects:
        pod = pod_of(thing)
        if pod is None:
            continue
        account = pod["serviceAccountName"]
        if account.startswith(prefix) and account not in accounts:
            yield f"{title(thing)}: nobody makes the ServiceAccount {account}"
        for made, (name, key) in (
            *((secrets, each) for each in _references(pod, "secretKeyRef", "secret")),
            *((configs, each) for each in _references(pod, "configMapRef", "configMap")),
        ):
            if not name.startswith(prefix):
                continue  # the user's
            if name not in made or (key and key not in made[name]):
                yield f"{title(thing)}: nobody makes {name} {key}".rstrip()
        yield from (f"{title(thing)}: {each}" for each in _mount_problems(pod))


def _references(part: object, *kinds: str) -> Iterator[tuple[str, str]]:
    """(name, key) of all that a part of a pod refers to; the key is empty where it is the whole."""
    if isinstance(part, list):
        for each in part:
            yield from _references(each, *kinds)
    if not isinstance(part, dict):
        return
    for word, inner in part.items():
        if word in kinds and isinstance(inner, dict) and not inner.get("optional"):
            name = str(inner.get("name") or inner.get("secretName"))
            keys = [each["key"] for each in inner.get("items", [])] or [inner.get("key", "")]
            yield from ((name, key) for key in keys)
        yield from _references(inner, *kinds)


def _mount_problems(pod: Object) -> Iterator[str]:
    volumes = {each["name"] for each in pod.get("volumes", [])}
    mounted: set[str] = set()
    for container in containers_of(pod):
        paths = [each["mountPath"] for each in container.get("volumeMounts", [])]
        if len(paths) != len(set(paths)):
            yield f"container {container['name']}: mounts a path twice"
        mounted |= {each["name"] for each in container.get("volumeMounts", [])}
    for name in sorted(mounted ^ volumes):
        state = "not mounted" if name in volumes else "mounted and does not exist"
        yield f"volume {name} is {state}"


# --- the gateway's own view -----------------------------------------------------------------------


def settings_problems(objects: list[Object]) -> Iterator[str]:
    """What the gateway would refuse to start with, and a drain that its pod would not outlive."""
    for deployment in named(objects, "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        container = pod["containers"][0]
        if container["name"] != "gateway":
            continue
        variables = variables_of(objects, container)
        with mock.patch.dict(os.environ, variables):
            for name in [name for name in os.environ if name.upper().startswith(PREFIX)]:
                if name not in variables:
                    del os.environ[name]
            try:
                settings = load_settings()
            except SettingsError as error:
                yield f"{title(deployment)}: {error}"
                continue
        stop = container.get("lifecycle", {}).get("preStop", {})
        pause_s = stop.get("sleep", {}).get("seconds", 0)
        if "exec" in stop:
            pause_s = max(float(each) for each in stop["exec"]["command"][-2:])
        if pod["terminationGracePeriodSeconds"] < pause_s + 2 * settings.drain_grace_s + 20:
            yield f"{title(deployment)}: is killed before a drain ends"
        yield from front_problems(objects, settings)


def front_problems(objects: list[Object], settings: Settings) -> Iterator[str]:
    """Settings that Envoy stands before, and does not keep."""
    for config in named(objects, "ConfigMap").values():
        if "envoy.yaml" not in config["data"]:
            continue
        envoy = yaml.safe_load(config["data"]["envoy.yaml"])
        [chain] = envoy["static_resources"]["listeners"][0]["filter_chains"]
        door = chain["filters"][0]["typed_config"]
        http2 = door["http2_protocol_options"]
        ping = http2["connection_keepalive"]
        if door["max_request_headers_kb"] * 1024 < settings.metadata_bytes_max:
            yield f"{title(config)}: refuses metadata that the gateway takes"
        if http2["max_concurrent_streams"] != settings.concurrent_streams_max:
            yield f"{title(config)}: has another concurrent_streams_max"
        for name, value in (("interval", "keepalive_time_s"), ("timeout", "keepalive_timeout_s")):
            if float(ping[name].removesuffix("s")) != getattr(settings, value):
                yield f"{title(config)}: has another {value}"


def variables_of(objects: list[Object], container: Object) -> dict[str, str]:
    """A container's variables, with something of the right form for each secret."""
    forms = {
        "GATEWAY_POSTGRES_DSN": "postgresql://gateway@127.0.0.1/payments",
        "GATEWAY_REDIS_URL": "redis://127.0.0.1",
        "GATEWAY_SENTRY_DSN": "https://key@127.0.0.1/1",
        "GATEWAY_SIMULATOR_URL": "http://127.0.0.1:9400",
    }
    configs = named(objects, "ConfigMap")
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if (name := source.get("configMapRef", {}).get("name")) in configs:  # else the user's
            variables |= configs[name]["data"]
    for each in container["env"]:
        if "value" in each or each["name"] in forms:
            variables[each["name"]] = each.get("value", forms.get(each["name"]))
    return variables


# --- refusals -------------------------------------------------------------------------------------

_SERVERS: Final[Object] = {
    "postgres": {"existingSecret": "servers"},
    "redis": {"existingSecret": "servers"},
}
_PLAIN: Final[Object] = _SERVERS | {"tls": {"enabled": False}}

REFUSED: Final[tuple[tuple[Object, str], ...]] = (
    ({}, "set postgres.existingSecret"),
    ({}, "set redis.existingSecret"),
    ({}, "set tls.existingSecret"),
    (_PLAIN | {"replicas": 3}, "replicas"),
    (_PLAIN | {"networkPolicy": {"egress": {"postgresPorts": None}}}, "postgresPorts"),
    (_PLAIN | {"fullnameOverride": "1-pay"}, "begins with a letter"),
    (_PLAIN | {"replicaCount": "three"}, "replicaCount"),
    (_PLAIN | {"settings": {"worker": 2}}, "worker"),
    (_PLAIN | {"settings": {"workers": 0}}, "workers"),
    (_PLAIN | {"settings": {"workers": 1.5}}, "workers"),
    (_PLAIN | {"settings": {"log_level": "LOUD"}}, "log_level"),
    (_PLAIN | {"settings": {"transport": "native"}}, "transport"),
    (_PLAIN | {"settings": {"postgres_dsn": "postgresql://a"}}, "postgres_dsn"),
    (_PLAIN | {"settings": {"drain_grace_s": None}}, "drain_grace_s"),
    (_PLAIN | {"secretSettings": {"simulator": {"name": "a", "key": "b"}}}, "simulator"),
    (_PLAIN | {"secretSettings": {"simulator_url": {"name": "a"}}}, "key"),
    (
        _PLAIN
        | {
            "settings": {"simulator_url": "http://a"},
            "secretSettings": {"simulator_url": {"name": "a", "key": "b"}},
        },
        "is in settings, too",
    ),
    (
        _PLAIN | {"secretSettings": {"postgres_row_security": {"name": "a", "key": "b"}}},
        "secretSettings.postgres_row_security: other parts of the chart follow from it",
    ),
    (
        _PLAIN
        | {
            "transport": "native",
            "secretSettings": {"message_bytes_max": {"name": "a", "key": "b"}},
        },
        "secretSettings.message_bytes_max: other parts of the chart follow from it",
    ),
    (_PLAIN | {"transport": "http"}, "transport"),
    (_PLAIN | {"updateStrategy": {"rollingUpdate": {"maxSurge": 0}}}, "could ever be replaced"),
    (_PLAIN | {"settings": {"client_identity": "certificate"}}, "needs tls.clientCa"),
    (_PLAIN | {"settings": {"client_identity": "forwarded"}}, "it is certificate"),
    (
        _PLAIN | {"transport": "native", "settings": {"client_identity": "certificate"}},
        "it is forwarded",
    ),
    (_PLAIN | {"extraEnv": [{"name": "GATEWAY_WORKERS", "value": "2"}]}, "extraEnv"),
    (_PLAIN | {"securityContext": {"readOnlyRootFilesystem": False}}, "readOnlyRootFilesystem"),
    (_PLAIN | {"podSecurityContext": {"runAsUser": 0}}, "runAsUser"),
    (_PLAIN | {"resources": {"limits": None}}, "limits"),
    (_PLAIN | {"image": {"tag": "not a tag"}}, "tag"),
    (_PLAIN | {"image": {"digest": "sha256:0"}}, "digest"),
    (_PLAIN | {"terminationGracePeriodSeconds": 30}, "would kill a pod that drains; at least 85"),
    (
        _PLAIN | {"autoscaling": {"enabled": True}, "keda": {"enabled": True}},
        "enable one, not both",
    ),
    (_PLAIN | {"autoscaling": {"enabled": True, "minReplicas": 11}}, "must not be greater"),
    (_PLAIN | {"keda": {"enabled": True, "inFlight": {"enabled": True}}}, "needs serverAddress"),
    (
        _PLAIN | {"keda": {"enabled": True, "targetCPUUtilizationPercentage": 0}},
        "nothing to scale on",
    ),
    (
        _PLAIN
        | {
            "settings": {"postgres_row_security": True},
            "migrations": {"postgres": {"existingSecret": "owner"}},
        },
        "migrations.login: with settings.postgres_row_security",
    ),
    (_PLAIN | {"migrations": {"login": "gateway"}}, "is for settings.postgres_row_security"),
    (
        _PLAIN
        | {
            "serviceAccount": {"name": "pay"},
            "migrations": {"serviceAccount": {"name": "pay"}},
        },
        "migrations.serviceAccount.name: pay is the gateway's own",
    ),
    (
        _PLAIN | {"serviceAccount": {"name": f"{RELEASE}-payment-gateway-migrations"}},
        "is the gateway's own",
    ),
    (
        _PLAIN
        | {
            "serviceAccount": {"create": False, "name": "pay"},
            "migrations": {"serviceAccount": {"name": "pay"}},
        },
        "is the gateway's own",
    ),
    (
        _PLAIN
        | {
            "serviceAccount": {"name": "pay"},
            "migrations": {"serviceAccount": {"create": False, "name": "pay"}},
        },
        "is the gateway's own",
    ),
    (_PLAIN | {"commonLabels": {"team": "pay ments"}}, "team"),
    (_PLAIN | {"podLabels": {"a/b/c": "1"}}, "a/b/c"),
    (
        _PLAIN | {"service": {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4", "IPv6"]}},
        "SingleStack has one",
    ),
    (_PLAIN | {"ingress": {"enabled": True}}, "ingress: needs hosts"),
    (_PLAIN | {"grpcRoute": {"enabled": True}}, "grpcRoute: needs parentRefs"),
    (
        _PLAIN | {"grpcRoute": {"backendTLS": {"enabled": True, "hostname": "a.example.com"}}},
        "serve without TLS",
    ),
    (
        _PLAIN | {"simulator": {"enabled": True}, "settings": {"simulator_url": "http://a"}},
        "take simulator_url and simulator_profile out",
    ),
    (
        _PLAIN | {"simulator": {"enabled": True, "notifications": {"existingSecret": "hook"}}},
        "simulator.notifications: the gateway takes none",
    ),
    (_PLAIN | {"tls": {"enabled": False, "existingSecret": "tls"}}, "TLS is off"),
    (_SERVERS | {"tls": {"certificate": "-----BEGIN CERTIFICATE-----"}}, "belong together"),
    (
        _SERVERS | {"tls": {"existingSecret": "tls", "certManager": {"enabled": True}}},
        "not several",
    ),
    (_SERVERS | {"tls": {"certManager": {"enabled": True}}}, "needs issuerRef.name"),
    (
        _PLAIN | {"postgres": {"existingSecret": "servers", "dsn": "postgresql://a"}},
        "existingSecret or dsn, not both",
    ),
    ({"embedded": True} | _SERVERS, "brings its own PostgreSQL"),
    ({"embedded": True, "autoscaling": {"enabled": True}}, "is one pod"),
    ({"embedded": True, "simulator": {"enabled": True}}, "a simulator of its own"),
)
"""Values, and what the refusal must say."""


def refusal_problems(chart: helm_python.Chart) -> Iterator[str]:
    """Values that pass and should not, or are refused in words that do not help."""
    for values, expected in REFUSED:
        try:
            chart.render(copy.deepcopy(values), name=RELEASE, namespace=NAMESPACE)
        except helm_python.HelmError as error:
            if expected not in str(error):
                yield f"{values}: the refusal does not say {expected!r}: {error}"
        else:
            yield f"{values}: is not refused ({expected})"


_ENABLED: Final = (
    *("autoscaling", "dashboards", "grpcRoute", "ingress", "notifications", "prometheusRule"),
    *("serviceMonitor", "simulator"),
)


def null_problems(chart: helm_python.Chart) -> Iterator[str]:
    """Values that cannot be taken away by `null`, and fail in Helm's words, or in the cluster."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    documented = {path for path, _, _ in chart_files.documented_values(text) if path}
    parents = {path.rpartition(".")[0] for path in documented} - {""}
    given: Object = copy.deepcopy(_PLAIN) | {name: {"enabled": True} for name in _ENABLED}
    given["grpcRoute"]["parentRefs"] = [{"name": "edge"}]
    given["ingress"]["hosts"] = ["a.example.com"]
    usual, _ = render(chart, given)
    for path in sorted(documented | parents):
        values = copy.deepcopy(given)
        *above, last = path.split(".")
        place = values
        for name in above:
            place = place.setdefault(name, {})
        place[last] = None
        try:
            objects, notes = render(chart, values)
        except helm_python.HelmError as error:
            if not re.search(r"The values cannot be used|don't meet the specification", str(error)):
                yield f"{path}: null fails in Helm's words: {error}"
            continue
        except yaml.YAMLError as error:
            yield f"{path}: null renders to no YAML: {error}"
            continue
        found = [
            *schema_problems([each for each in objects if each not in usual], (_LAST,)),
            *policy_problems(objects),
            *reference_problems(objects),
            *settings_problems(objects),
            *notes_problems(notes),
        ]
        yield from (f"{path}: null: {each}" for each in found)


# --- values at random -----------------------------------------------------------------------------


def random_problems(chart: helm_python.Chart) -> Iterator[str]:
    """Values that the schema lets in, and that render to what cannot be used."""
    source = random.Random(chart_fuzz.SEED)
    refused = 0
    for number in range(chart_fuzz.DRAWS):
        values, name, namespace = chart_fuzz.draw(source)
        where = f"draw {number} of seed {chart_fuzz.SEED} ({name} in {namespace})"
        try:
            objects, notes = render(chart, values, name, namespace)
        except helm_python.HelmError as error:
            refused += 1
            if "The values cannot be used" not in str(error):
                yield f"{where}: fails in Helm's words: {error}\n{values}"
            continue
        except yaml.YAMLError as error:
            yield f"{where}: is no YAML: {error}\n{values}"
            continue
        found = list(case_problems(objects, notes, namespace, (_LAST,)))
        if found:
            yield f"{where}: {'; '.join(found)}\n{values}"
    print(f"== {chart_fuzz.DRAWS} draws of values, {refused} of them refused")
    if refused * 2 > chart_fuzz.DRAWS:
        yield f"{refused} of {chart_fuzz.DRAWS} draws are refused: they show little"


# --- the whole ------------------------------------------------------------------------------------


def lint_problems(values: Object) -> Iterator[str]:
    """What `helm lint --strict` says."""
    report = helm_python.lint(CHART, values, strict=True, namespace=NAMESPACE)
    for message in report["messages"]:
        if message["severity"] >= LINT_WARNING:
            yield f"lint: {message['path']}: {message['error']}"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # it is untyped here
    """Writes text of several lines as lines."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)


def golden_text(objects: list[Object]) -> str:
    """The objects in a form that changes only with what they say; scripts, dashboards by name."""
    shown = copy.deepcopy(sorted(objects, key=title))
    for thing in shown:
        if thing["kind"] == "ConfigMap":
            for name in thing["data"]:
                for folder in ("files", "dashboards"):
                    if (CHART / folder / name).exists():
                        thing["data"][name] = f"{folder}/{name}"
    return "".join(f"---\n{yaml.dump(each, Dumper=_Dumper, width=100)}" for each in shown)


def golden_problems(case: str, objects: list[Object], *, write: bool) -> Iterator[str]:
    """Whether the case renders as it did; with `write` it does from now on."""
    path = HERE / "golden" / f"{case}.yaml"
    text = golden_text(objects)
    if write:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        yield f"renders other than golden/{case}.yaml: see `make chart ARGS=--write` and git diff"


def envoy_problems(objects: list[Object], envoy: Path) -> Iterator[str]:
    """What Envoy says of its configuration."""
    for name, config in named(objects, "ConfigMap").items():
        if not name.endswith("-envoy"):
            continue
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            path = folder / "envoy.yaml"
            path.write_text(chart_live.with_test_files(config["data"], folder))
            checked = subprocess.run(
                [envoy, "--mode", "validate", "--config-path", path, "--log-level", "error"],
                capture_output=True,
                text=True,
                check=False,
            )
        if checked.returncode:
            yield f"Envoy refuses its configuration: {checked.stdout}{checked.stderr}"


def case_problems(
    objects: list[Object],
    notes: str,
    namespace: str = NAMESPACE,
    versions: tuple[str, ...] = KUBERNETES_VERSIONS,
) -> Iterator[str]:
    """All that is looked at in every case."""
    yield from schema_problems(objects, versions)
    yield from policy_problems(objects)
    yield from reference_problems(objects)
    yield from settings_problems(objects)
    titles = [title(each) for each in objects]
    for each in sorted({each for each in titles if titles.count(each) > 1}):
        yield f"{each} is rendered twice"
    yield from notes_problems(notes, namespace)


def notes_problems(notes: str, namespace: str = NAMESPACE) -> Iterator[str]:
    """What a template left in the notes."""
    if f"{namespace} rollout status" not in notes or re.search(r"<no value>|<nil>|%!", notes):
        yield "the notes are not what they should be"


def find_envoy() -> Path | None:
    """Envoy beside this Python (the bench group brings it) or on PATH."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    found = shutil.which("envoy", path=os.pathsep.join(places))
    return Path(found) if found else None


def query_problems() -> Iterator[str]:
    """Queries of dashboards and rules of alerts that PromQL's grammar or types forbid."""
    queries = [*chart_queries.dashboard_queries(), *chart_queries.alert_queries()]
    for query in queries:
        try:
            promql_parser.parse(query.expression)
        except ValueError as error:
            yield f"{query.where}: {error}"
    print(f"== {len(queries)} queries of dashboards and alerts")


def rule_problems() -> Iterator[str]:
    """What promtool says of the alerts, of their tests, and of the dashboards' queries."""
    promtool = shutil.which("promtool")
    if promtool is None:
        print("  not run: the alerts' tests, and Prometheus' own parser (promtool is not on PATH)")
        return
    with tempfile.TemporaryDirectory() as directory:
        queries = Path(directory) / "dashboards.json"
        queries.write_text(chart_queries.rule_file(), encoding="utf-8")
        commands: tuple[tuple[str | Path, ...], ...] = (
            ("check", "rules", *sorted((CHART / "alerts").glob("*.yaml")), queries),
            ("test", "rules", HERE / "alerts_test.yaml"),
        )
        for arguments in commands:
            checked = subprocess.run(
                [promtool, *arguments], capture_output=True, text=True, check=False
            )
            if checked.returncode:
                yield f"promtool: {checked.stdout}{checked.stderr}"


def main() -> int:
    """Check everything; the exit status."""
    write, live = "--write" in sys.argv[1:], "--no-live" not in sys.argv[1:]
    problems: list[str] = []
    print("== files that follow from others")
    if chart_files.main(check=not write):
        problems.append("the chart's README or schema is stale")
    envoy = find_envoy()
    rendered: dict[str, list[Object]] = {}
    with helm_python.Chart.load(CHART) as chart:
        for path in sorted((CHART / "ci").glob("*-values.yaml")):
            case = path.name.removesuffix("-values.yaml")
            values = read_values(path)
            found = list(lint_problems(values))
            try:
                objects, notes = render(chart, values)
            except (helm_python.HelmError, yaml.YAMLError) as error:
                problems.append(f"{case}: {error}")
                continue
            rendered[case] = objects
            found += case_problems(objects, notes)
            found += golden_problems(case, objects, write=write)
            if envoy is not None:
                found += envoy_problems(objects, envoy)
            print(f"== {case}: {len(objects)} objects, Kubernetes {_FIRST} to {_LAST}")
            problems += [f"{case}: {each}" for each in found]
        print(f"== {len(REFUSED)} refusals")
        problems += refusal_problems(chart)
        problems += null_problems(chart)
        problems += random_problems(chart)
    problems += query_problems()
    problems += rule_problems()
    if not {"embedded", "tls"} <= set(rendered):
        live = False  # what does not render cannot run
    if envoy is None:
        print("  not run: Envoy and what stands behind it (`make bench` installs it, or PATH)")
    if live:
        print("== helm test's script, probes and drain against running gateways")
        problems += chart_live.embedded_problems(variables(rendered["embedded"]))
        if envoy is not None:
            problems += chart_live.native_problems(
                variables(rendered["tls"]), envoy_files(rendered["tls"]), envoy
            )
    if live and "--image" in sys.argv[1:]:
        print("== what the image holds")
        problems += chart_live.image_problems(variables(rendered["embedded"]))
    else:
        print("  not run: what the image holds (ARGS=--image, a minute)")
    print("  not run: docker build and an installation in a cluster (they need an engine)")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def variables(objects: list[Object]) -> dict[str, str]:
    """The gateway's settings that are no secrets."""
    data: dict[str, str] = named(objects, "ConfigMap")[f"{RELEASE}-payment-gateway"]["data"]
    return data


def envoy_files(objects: list[Object]) -> dict[str, str]:
    """Envoy's configuration, and the files that it names."""
    data: dict[str, str] = named(objects, "ConfigMap")[f"{RELEASE}-payment-gateway-envoy"]["data"]
    return data


if __name__ == "__main__":
    sys.exit(main())
