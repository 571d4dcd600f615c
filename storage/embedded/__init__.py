"""The local PostgreSQL and Redis of the default set-up: real servers, no Docker, no installation.

Each server lives in a directory of its own, listens on 127.0.0.1 only, asks for a password, and
stops by itself when the process that started it ends, however that ends.
"""

from storage.embedded._errors import (
    BinaryUnavailableError,
    DataDirectoryInUseError,
    EmbeddedServerError,
    PortTakenError,
)
from storage.embedded._postgres import EmbeddedPostgres
from storage.embedded._redis import EmbeddedRedis
from storage.embedded._server import EmbeddedServer, free_port

__all__ = [
    "BinaryUnavailableError",
    "DataDirectoryInUseError",
    "EmbeddedPostgres",
    "EmbeddedRedis",
    "EmbeddedServer",
    "EmbeddedServerError",
    "PortTakenError",
    "free_port",
]
