"""The figures of the table: what is divided by what, what it must reach, what it aims at."""

from dataclasses import dataclass
from typing import Final

OPEN_SECONDS_MIN: Final = 60
"""A shorter open loop proves nothing."""
NATIVE: Final = (
    "native has no TLS, no connection age, no bound on a message before it is buffered, and no"
    " GOAWAY while it drains: it is for trusted callers behind a proxy on the same host, which has"
    " them (docs/transports.md). The line with Envoy has that proxy."
)
"""What the native transport does not promise; said beside each of its figures."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    """In the summary."""
    title: str
    side: str
    """The side measured."""
    over: str = ""
    """The side that it is divided by; empty: the rate itself."""
    target: float | None = None
    aim: float | None = None
    native: bool = False
    lower_is_better: bool = False


FIGURES: Final = (
    Figure("echo_rps", "empty echo, grpc.aio", "echo"),
    Figure("native_echo_rps", "empty echo, native", "native_echo", native=True),
    Figure("authorize_rps", "authorize, native", "authorize", native=True),
    Figure(
        *("authorize_over_echo", "authorize, native ÷ echo", "authorize", "echo"),
        target=0.9,
        aim=1.2,
        native=True,
    ),
    Figure(
        *("authorize_over_native_echo", "authorize, native ÷ native echo"),
        *("authorize", "native_echo"),
        native=True,
    ),
    Figure("grpcio_authorize_rps", "authorize, grpcio", "grpcio_authorize"),
    Figure(
        *("grpcio_authorize_over_echo", "authorize, grpcio ÷ echo", "grpcio_authorize", "echo"),
        target=0.55,
        aim=0.75,
    ),
    Figure("production_rps", "authorize, native behind Envoy with TLS", "production", native=True),
    Figure(
        *("production_over_echo", "authorize, native behind Envoy with TLS ÷ echo"),
        *("production", "echo"),
        target=0.7,
        aim=0.9,
        native=True,
    ),
    Figure("grpcio_tls_rps", "authorize, grpcio with TLS", "grpcio_tls"),
    Figure(
        *("grpcio_tls_over_echo", "authorize, grpcio with TLS ÷ echo", "grpcio_tls", "echo"),
        target=0.4,
    ),
    Figure("delayed_rps", "authorize, native, PSP 120/380 ms", "delayed", native=True),
    Figure(
        *("delayed_over_instant", "authorize, native, PSP 120/380 ms ÷ without delay"),
        *("delayed", "authorize"),
        target=0.8,
        native=True,
    ),
    Figure("naive_rps", "naive baseline, grpc.aio", "naive"),
    Figure(
        *("authorize_over_naive", "authorize, native ÷ naive", "authorize", "naive"),
        target=4.0,
        native=True,
    ),
    Figure(
        *("batch_items_per_s", "BatchAuthorizePayments, items/s", "batch"),
        target=15_000,
        aim=20_000,
        native=True,
    ),
    Figure("stream_items_per_s", "StreamAuthorizePayments, items/s", "stream", native=True),
    Figure("pgbench_tps", "pgbench, commits of one intent row", "pgbench"),
    Figure(
        *("batch_over_pgbench", "batch items ÷ pgbench commits", "batch", "pgbench"),
        target=0.6,
        native=True,
    ),
    Figure(
        *("open_5000_p99_ms", "open loop 5,000/s, p99 in ms", "open_5000"),
        target=30.0,
        native=True,
        lower_is_better=True,
    ),
)
"""In the order of the table."""

GROUPS: Final = {
    "authorize": (
        "echo_rps",
        "native_echo_rps",
        "authorize_rps",
        "authorize_over_echo",
        "authorize_over_native_echo",
        "grpcio_authorize_rps",
        "grpcio_authorize_over_echo",
    ),
    "production": (
        "echo_rps",
        "production_rps",
        "production_over_echo",
        "grpcio_tls_rps",
        "grpcio_tls_over_echo",
    ),
    "delayed": ("authorize_rps", "delayed_rps", "delayed_over_instant"),
    "naive": ("authorize_rps", "naive_rps", "authorize_over_naive"),
    "bulk": ("batch_items_per_s", "stream_items_per_s", "pgbench_tps", "batch_over_pgbench"),
    "open": ("open_5000_p99_ms",),
}
"""Names for `--only`, besides the figures' own."""


def select(names: list[str]) -> list[Figure]:
    """The figures of these names and groups, all for none. Raises ValueError."""
    wanted: set[str] = set()
    known = {figure.name for figure in FIGURES}
    for name in names:
        if name in GROUPS:
            wanted.update(GROUPS[name])
        elif name in known:
            wanted.add(name)
        else:
            raise ValueError(f"no figure {name!r}: one of {', '.join([*GROUPS, *sorted(known)])}")
    return [figure for figure in FIGURES if not names or figure.name in wanted]
