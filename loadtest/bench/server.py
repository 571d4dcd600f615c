"""`gateway serve` with the in-process PSP in the place of one: everything else is the product."""

import argparse

from gateway.composition import run_server
from gateway.connectors.simulator.latency import Latency
from gateway.settings import load_settings
from loadtest.bench.psp import InProcessPsp


def main() -> None:
    """Serve, as the GATEWAY_* variables say."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.server", description=__doc__)
    parser.add_argument(
        "--latency",
        type=Latency.parse,
        default=Latency(),
        metavar="P50_MS,P99_MS",
        help="the PSP's delay, log-normal; by default none",
    )
    options = parser.parse_args()
    run_server(load_settings(), connectors=[InProcessPsp(options.latency)])


if __name__ == "__main__":
    main()
