"""Runs the fault campaign: `python -m tests.chaos --help`."""

import os
import signal
import sys
from typing import Never


def _terminated(number: int, _frame: object) -> Never:
    # As an exception, so that everything that was started is stopped on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    # Connections that are cut are the purpose here; gRPC's core would tell of each.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from tests.chaos.cli import main  # which imports gRPC

    sys.exit(main())
