"""Runs a load test: `python -m loadtest --help`."""

import sys

from loadtest.children import interrupted_by_sigterm
from loadtest.cli import main

if __name__ == "__main__":
    interrupted_by_sigterm()
    sys.exit(main())
