"""Envoys for tests: the load balancer before several gateways, and the chart's side-car.

They come with `make bench`, or from PATH; where there is none, tests that need one are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from loadtest.children import Process
from storage.embedded import free_port
from tests.chart_scripts import load
from tests.harness import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).parents[1]
DATA: Final = ROOT / "tests" / "data"
CERTIFICATE: Final = DATA / "localhost.pem"
"""Self-signed, for localhost and 127.0.0.1: its own CA."""
KEY: Final = DATA / "localhost.key"
DRAIN_FRONT: Final = ROOT / "helm" / "payment-gateway" / "files" / "drain_front.py"
"""What the chart's pods run before SIGTERM."""
SERVICE: Final = "payments.v1.PaymentService"
ADMIN_TIMEOUT_S: Final = 10.0
HEALTH_CHECK_S: Final = 0.25
"""How often the load balancer asks each gateway for its health."""

_TYPE: Final = "type.googleapis.com/envoy.extensions"


def find_envoy() -> Path:
    """Envoy's binary; without one the test is skipped."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    found = shutil.which("envoy", path=os.pathsep.join(places))
    if found is None:
        pytest.skip("Envoy is not installed: `make .venv/bench` brings it")
    return Path(found)


@dataclass(frozen=True)
class Envoy:
    """One that runs."""

    address: str
    admin: str
    """Where its admin interface is, as a URL."""
    process: Process

    def ask(self, path: str) -> str:
        """What its admin interface answers. Raises OSError."""
        with urllib.request.urlopen(f"{self.admin}{path}", timeout=ADMIN_TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text

    def _ready(self) -> bool:
        self.process.check()
        try:
            return "LIVE" in self.ask("/ready")
        except OSError:
            return False

    async def serving(self) -> None:
        """Wait until it serves. Raises ProcessFailed."""
        await eventually(self._ready, "Envoy serves")

    def upstreams(self) -> dict[str, dict[str, Any]]:
        """The gateways behind it by their addresses, with their health and counters."""
        [cluster] = json.loads(self.ask("/clusters?format=json"))["cluster_statuses"]
        return {
            f"{host['address']['socket_address']['address']}:"
            f"{host['address']['socket_address']['port_value']}": host
            for host in cluster["host_statuses"]
        }

    def healthy(self) -> set[str]:
        """The addresses of the gateways that it sends calls to."""
        return {
            address
            for address, host in self.upstreams().items()
            if not host["health_status"].get("failed_active_health_check")
        }

    def answered(self, address: str) -> int:
        """How many calls a gateway behind it has answered."""
        stats = self.upstreams()[address]["stats"]
        return sum(int(each.get("value", 0)) for each in stats if each["name"] == "rq_success")

    async def until_healthy(self, *addresses: str) -> None:
        """Wait until it sends calls to all of these."""
        await eventually(
            lambda: self.healthy() >= set(addresses),
            "the load balancer finds them healthy",
        )


@contextmanager
def running_envoy(
    config: str, address: str, admin_port: int, folder: Path, *arguments: str
) -> Iterator[Envoy]:
    """An Envoy with this configuration, which may not serve yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "envoy.yaml"
    path.write_text(config, "utf-8")
    command = [
        *(str(find_envoy()), "--config-path", str(path), "--concurrency", "1"),
        *("--log-level", "warning", "--disable-hot-restart", *arguments),
    ]
    process = Process("envoy", command, {}, folder / "envoy.log")
    try:
        yield Envoy(address, f"http://127.0.0.1:{admin_port}", process)
    finally:
        process.stop()


def sidecar_config(front: int, gateway: int, admin: int, folder: Path) -> str:
    """What the chart renders for `native` with TLS and client certificates, on these ports.

    What it names is put into `folder`.
    """
    golden = (ROOT / "helm" / "golden" / "tls.yaml").read_text("utf-8")
    found = re.findall(r"^  (\w+\.yaml): \|\n((?:    .*\n|\n)+)", golden, re.MULTILINE)
    files = {name: textwrap.dedent(text) for name, text in found}
    live = load(ROOT / "helm" / "chart_live.py")
    config: str = live.with_local_addresses(
        live.with_test_files(files, folder), front, gateway, admin
    )
    return config


@contextmanager
def running_balancer(upstreams: Sequence[str], folder: Path) -> Iterator[Envoy]:
    """An Envoy that spreads calls over gateways with TLS, as long as they say that they serve."""
    port, admin = free_port(), free_port()
    config = json.dumps(_balancer_config(port, admin, upstreams))
    with running_envoy(config, f"127.0.0.1:{port}", admin, folder) as envoy:
        yield envoy


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _balancer_config(port: int, admin: int, upstreams: Sequence[str]) -> dict[str, Any]:
    certificates = [
        {"certificate_chain": {"filename": str(CERTIFICATE)}, "private_key": {"filename": str(KEY)}}
    ]
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "balancer",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "payments",
                    "domains": ["*"],
                    # No retry here: it knows nothing of keys, and clients have their own policy.
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "pods", "timeout": "0s"}}
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"},
            }
        ],
    }
    downstream_tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {"alpn_protocols": ["h2"], "tls_certificates": certificates},
    }
    upstream_tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "localhost",
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": certificates,  # for the side-cars, which ask for one
            "validation_context": {
                "trusted_ca": {"filename": str(CERTIFICATE)},
                "match_typed_subject_alt_names": [
                    {"san_type": "DNS", "matcher": {"exact": "localhost"}}
                ],
            },
        },
    }
    return {
        "admin": {"address": _address(f"127.0.0.1:{admin}")},
        "static_resources": {
            "listeners": [
                {
                    "name": "grpc",
                    "address": _address(f"127.0.0.1:{port}"),
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ],
                            "transport_socket": {
                                "name": "envoy.transport_sockets.tls",
                                "typed_config": downstream_tls,
                            },
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "pods",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "lb_policy": "ROUND_ROBIN",
                    "transport_socket": {
                        "name": "envoy.transport_sockets.tls",
                        "typed_config": upstream_tls,
                    },
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "circuit_breakers": {"thresholds": [{"max_requests": 10_000}]},
                    # Those that do not serve get nothing, however many they are.
                    "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
                    "health_checks": [
                        {
                            "timeout": "5s",
                            "interval": f"{HEALTH_CHECK_S}s",
                            "no_traffic_interval": f"{HEALTH_CHECK_S}s",
                            "unhealthy_threshold": 1,
                            "healthy_threshold": 1,
                            "grpc_health_check": {"service_name": SERVICE},
                        }
                    ],
                    "load_assignment": {
                        "cluster_name": "pods",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {"endpoint": {"address": _address(each)}} for each in upstreams
                                ]
                            }
                        ],
                    },
                }
            ],
        },
    }
