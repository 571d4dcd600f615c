"""Values at random for `make chart`: what the schema lets in must render to what can be used.

Each draw sets some of CHOICES, all of them values that somebody could write. The chart either
refuses the draw, in words of its own, or every check of the fixed cases must pass. The seed is the
same every time, so that a failure is found again; `SEED=` and `DRAWS=` of the environment look
elsewhere.
"""

import copy
import os
import random
from typing import Any, Final

Values = dict[str, Any]

SEED: Final = int(os.environ.get("SEED", "1"))
DRAWS: Final = int(os.environ.get("DRAWS", "60"))
SET_PROBABILITY: Final = 0.25
"""Of each choice, in a draw."""
CONTRADICTION_PROBABILITY: Final = 0.1
"""That what cannot go together is left together."""
NAME_MAX: Final = 53
"""What Helm allows a release's name to be long."""

RELEASES: Final = ("pay", "payment-gateway", "true", "p" * NAME_MAX, f"{'p' * 46}-{'p' * 6}")
NAMESPACES: Final = ("payments", "n" * 63, "1", "1e3", "null")

_PEM: Final = "-----BEGIN CERTIFICATE-----\nnot a certificate\n-----END CERTIFICATE-----\n"
_TEXTS: Final = ("yes", "1", "1e3", "0x10", "null", "a: b # c", "{{ .Values }}", '"', "ü\nü")
"""What YAML or a template would read as something else, were it not quoted."""
_RESOURCES: Final = (
    {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"cpu": 2, "memory": "1Gi"}},
    {"requests": {"cpu": "100m", "memory": 134217728}, "limits": {"cpu": "1.5", "memory": "1G"}},
)
_TIGHT: Final = {
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    },
    "resources": _RESOURCES[1],
}
_PROBE: Final = {"tcpSocket": {"port": 9000}}
_DIGEST: Final = f"sha256:{'0' * 64}"

CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "nameOverride": ("psp", "n" * 63),
    "fullnameOverride": ("payments", "on", "f" * 63, f"{'f' * 46}-x"),
    "commonLabels": ({"team": "payments"}, {"example.com/cost": "1"}, {"on": "true"}),
    "image.tag": ("1.2.3", "1e3", "20261121"),
    "image.digest": (_DIGEST,),
    "image.repository": ("registry.example.com:5000/team/gateway",),
    "image.pullPolicy": ("Always", "Never"),
    "imagePullSecrets": ([{"name": "pull"}],),
    "persistence.enabled": (False,),
    "persistence.existingClaim": ("claim",),
    "persistence.storageClass": ("fast",),
    "settings.workers": (1, 4),
    "settings.drain_grace_s": (0.5, 1, 300, 25.25),
    "settings.message_bytes_max": (65536, 16777216),
    "settings.metadata_bytes_max": (4096, 20000),
    "settings.keepalive_time_s": (15, 7200),
    "settings.keepalive_timeout_s": (7.5,),
    "settings.log_level": ("DEBUG",),
    "settings.postgres_row_security": (True, False),
    "settings.tracing_endpoint": ("http://collector:4318/v1/traces",),
    "secretSettings": ({"simulator_url": {"name": "psp", "key": "url"}},),
    "transport": ("native", "grpcio"),
    "listenHost": ("[::]", "0.0.0.0"),  # noqa: S104 - inside a pod
    "connectionAgeSeconds": (0, 1, 86400),
    "tls.clientCa": (
        {"existingSecret": "callers", "existingSecretKey": "ca.pem"},
        {"certificate": _PEM},
    ),
    "envoy.image.digest": (_DIGEST,),
    "envoy.concurrency": (1, 8),
    "envoy.connectionsMax": (1, 1000000),
    "envoy.drainSeconds": (1, 600),
    "envoy.resources": _RESOURCES,
    "replicaCount": (1, 2, 100),
    "resources": _RESOURCES,
    "updateStrategy": (
        {"type": "Recreate", "rollingUpdate": None},
        {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": 0}},
    ),
    "minReadySeconds": (0, 60),
    "preStopSeconds": (0, 60),
    "terminationGracePeriodSeconds": (3600,),
    "probes.startup": ({"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 600},),
    "topologySpreadConstraints": (
        [],
        [
            {
                "maxSkew": 1,
                "topologyKey": "zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "matchLabelKeys": ["app.kubernetes.io/version"],
            }
        ],
        [
            {
                "maxSkew": 2,
                "topologyKey": "zone",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"team": "payments"}},
            }
        ],
    ),
    "nodeSelector": ({"pool": "1"},),
    "tolerations": ([{"operator": "Exists"}],),
    "affinity": (
        {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["1"]}]}
                    ]
                }
            }
        },
    ),
    "podAnnotations": tuple({"example.com/text": text} for text in _TEXTS),
    "podLabels": ({"tier": "1"}, {"team": "core", "app.kubernetes.io/name": "other"}),
    "extraEnv": (
        *([{"name": "TEXT", "value": text}] for text in _TEXTS),
        [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
    ),
    "extraEnvFrom": ([{"secretRef": {"name": "more"}}],),
    "extraVolumes": ([{"name": "more", "emptyDir": {}}],),
    "extraContainers": (
        [
            {
                "name": "more",
                "image": "site/more:1",
                "startupProbe": _PROBE,
                "livenessProbe": _PROBE,
                "readinessProbe": _PROBE,
                **_TIGHT,
            }
        ],
    ),
    "extraInitContainers": ([{"name": "first", "image": "site/first:1", **_TIGHT}],),
    "serviceAccount": (
        {"create": False},
        {"create": False, "name": "own"},
        {"create": True, "name": "made", "annotations": {"example.com/role": "1"}},
    ),
    "priorityClassName": ("system-cluster-critical", "1"),
    "podDisruptionBudget.maxUnavailable": (0, 2, "50%"),
    "autoscaling": (
        {"enabled": True},
        {"enabled": True, "minReplicas": 1, "inFlight": {"enabled": True, "target": 1000000}},
    ),
    "keda": (
        {"enabled": True},
        {
            "enabled": True,
            "targetCPUUtilizationPercentage": 0,
            "inFlight": {"enabled": True, "serverAddress": "http://prometheus:9090"},
        },
        {"enabled": True, "triggers": [{"type": "cron", "metadata": {"timezone": "UTC"}}]},
    ),
    "service": (
        {"type": "LoadBalancer", "port": 443, "annotations": {"example.com/internal": "true"}},
        {"type": "NodePort", "labels": {"mesh": "1"}},
        {"appProtocol": "kubernetes.io/h2c"},
        {"ipFamilyPolicy": "PreferDualStack"},
        {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]},
    ),
    "headlessService": ({"enabled": False}, {"annotations": {"a.example.com/b": "yes"}}),
    "networkPolicy": (
        {"enabled": False},
        {"clients": [], "metricsClients": []},
        {"clients": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]},
        {
            "egress": {
                "postgresPeers": [{"ipBlock": {"cidr": "2001:db8::/32"}}],
                "postgresPorts": [5433],
                "pspPorts": [443, 8443],
                "dnsPorts": [53, 5353],
                "kubernetesPorts": [8443],
                "extra": [{"to": [{"namespaceSelector": {}}]}],
            }
        },
    ),
    "grpcRoute": (
        {"enabled": True, "parentRefs": [{"name": "edge"}], "annotations": {"a": "1"}},
        {
            "enabled": True,
            "parentRefs": [{"name": "edge", "sectionName": "grpc"}],
            "hostnames": ["*.example.com"],
            "backendTLS": {"enabled": True, "hostname": "a.example.com"},
        },
    ),
    "ingress": (
        {"enabled": True, "hosts": ["a.example.com", "*.example.com"]},
        {"enabled": True, "hosts": ["a.example.com"], "tls": [{"secretName": "edge"}]},
    ),
    "migrations": (
        {"enabled": False},
        {"post": False, "backoffLimit": 0},
        {"postgres": {"existingSecret": "owner"}, "serviceAccount": {"create": False}},
        {"post": True, "postgres": {"existingSecret": "owner", "existingSecretKey": "1"}},
        {"deadlineSeconds": 86400, "podAnnotations": {"sidecar.istio.io/inject": "false"}},
    ),
    "simulator": (
        {"enabled": True},
        {"enabled": True, "latency": "1,2", "persistence": {"enabled": True, "size": "10Gi"}},
    ),
    "tests": (
        {"enabled": False},
        {"apiKey": {"existingSecret": "key"}, "clientSecret": "client", "serverName": "a.b"},
    ),
    "serviceMonitor": (
        {"enabled": True, "interval": "1m", "labels": {"release": "1"}},
        {
            "enabled": True,
            "relabelings": [{"action": "labeldrop", "regex": "pod"}],
            "metricRelabelings": [{"action": "drop", "sourceLabels": ["__name__"], "regex": "x"}],
        },
    ),
    "prometheusRule": (
        {"enabled": True, "runbooks": "https://wiki.example.com/a?b={c}"},
        {"enabled": True, "labels": {"on": "true"}},
    ),
    "dashboards": ({"enabled": True}, {"enabled": True, "annotations": {"folder": "1"}}),
}
"""Values that somebody could write, by their paths."""

SERVERS: Final[tuple[Values, ...]] = (
    {"embedded": True},
    {
        "postgres": {"existingSecret": "1", "existingSecretKey": "2"},
        "redis": {"existingSecret": "null", "existingSecretKey": "true"},
    },
    {
        "postgres": {"dsn": "postgresql://gateway:p%40ss@postgres/payments"},
        "redis": {"existingSecret": "servers", "existingSecretKey": "address"},
    },
    {"postgres": {"dsn": "postgresql://a:b@c/d"}, "redis": {"url": "rediss://:x@redis:6380"}},
)
CERTIFICATES: Final[tuple[Values, ...]] = (
    {"enabled": False},
    {"enabled": True, "existingSecret": "1e3"},
    {"certificate": _PEM, "key": _PEM, "ca": _PEM},
    {"certManager": {"enabled": True, "issuerRef": {"name": "ca"}, "dnsNames": ["a.example.com"]}},
)
EXCLUSIVE: Final = (
    ("embedded", ("autoscaling", "keda", "simulator", "migrations")),
    ("keda", ("autoscaling",)),
    ("secretSettings", ("simulator",)),
)
"""What is refused beside what: of most draws, only the first of them is kept."""


def draw(source: random.Random) -> tuple[Values, str, str]:
    """Values, a release's name and a namespace."""
    values = copy.deepcopy(source.choice(SERVERS))
    values["tls"] = copy.deepcopy(source.choice(CERTIFICATES))
    for path, choices in CHOICES.items():
        if source.random() < SET_PROBABILITY:
            *parents, last = path.split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = copy.deepcopy(source.choice(choices))
    if source.random() > CONTRADICTION_PROBABILITY:
        for first, others in EXCLUSIVE:
            for other in others if first in values else ():
                values.pop(other, None)
        if values["tls"].get("enabled") is False:
            values["tls"].pop("clientCa", None)
            values.get("grpcRoute", {}).pop("backendTLS", None)
    if "extraVolumes" in values:  # a volume that nobody mounts is a finding
        values["extraVolumeMounts"] = [{"name": "more", "mountPath": "/more", "readOnly": True}]
    return values, source.choice(RELEASES), source.choice(NAMESPACES)
