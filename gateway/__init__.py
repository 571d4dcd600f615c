"""A payment gateway: gRPC in front, PostgreSQL as the last word, PSPs behind one port."""

import os

__version__ = "0.1.0"

# Read where gRPC is loaded. Its core writes lines of its own, which are no JSON; at its level INFO
# one for each TLS handshake that fails, as of whoever only looks whether the port is open.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
