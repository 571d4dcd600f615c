"""Before the gateway is stopped: have Envoy lead clients away, and wait until no call is left.

`native` sends no GOAWAY, so the proxy must take clients away first. Runs as the preStop hook of the
gateway's container; Envoy ends after it.
"""

import sys
import time
import urllib.request

ADMIN = "http://127.0.0.1:9901"
ADMIN_TIMEOUT_S = 2.0
POLL_S = 0.25


def ask(admin: str, path: str, method: str) -> str:
    """What Envoy's admin interface answers. Raises OSError."""
    request = urllib.request.Request(admin + path, method=method)  # noqa: S310 - on loopback
    with urllib.request.urlopen(request, timeout=ADMIN_TIMEOUT_S) as response:  # noqa: S310
        text: str = response.read().decode()
        return text


def calls_left(admin: str) -> int:
    """Calls that Envoy has in flight."""
    for line in ask(admin, "/stats?filter=^http.grpc.downstream_rq_active$", "GET").splitlines():
        name, _, value = line.partition(": ")
        if name == "http.grpc.downstream_rq_active":
            return int(value)
    return 0


def main() -> None:
    """Drain for at least and at most as many seconds as the arguments say.

    A third one is the admin interface's address, where it is not the usual one.
    """
    least_s, most_s = float(sys.argv[1]), float(sys.argv[2])
    admin = sys.argv[3] if len(sys.argv) > 3 else ADMIN
    begun = time.monotonic()
    try:
        # Answers go on, each with GOAWAY behind it, and the listener stays: load balancers that
        # have not noticed yet are still served.
        ask(admin, "/drain_listeners?graceful&skip_exit", "POST")
        time.sleep(least_s)
        while time.monotonic() - begun < most_s and calls_left(admin):
            time.sleep(POLL_S)
    except OSError as error:
        # Not a reason to keep the pod: SIGTERM drains what is left.
        print(f"Envoy could not be asked: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
