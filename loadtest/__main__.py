"""Runs a load test: `python -m loadtest --help`."""

import signal
import sys
from typing import Never

from loadtest.cli import main


def _terminated(number: int, _frame: object) -> Never:
    # As an exception, so that everything that was started is stopped on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
