"""Runs the PSP simulator: `python -m gateway.connectors.simulator --help`."""

import sys

from gateway.connectors.simulator.server import main

sys.exit(main())
