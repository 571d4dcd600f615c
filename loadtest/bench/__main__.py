"""`python -m loadtest.bench`: measures side by side, prints the table, writes the summary."""

import sys

from loadtest.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
