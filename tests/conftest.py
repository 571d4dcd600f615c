"""What every test shares: the event loop of production, and a marker for each kind of test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

from tests.servers import PostgresForTests, postgres_server, redis_server

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterator, Mapping

    from storage.embedded import EmbeddedRedis

_KINDS = ("unit", "integration", "contract", "faults", "acceptance")
"""The directories below tests/, each with the marker of the same name (pyproject.toml)."""


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], AbstractEventLoop]]:
    """Runs every asynchronous test on uvloop, as the gateway itself runs."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test by its directory; a test outside of them has no kind, which is an error."""
    root = config.rootpath / "tests"
    for item in items:
        kind = Path(item.path).relative_to(root).parts[0]
        if kind not in _KINDS:
            message = f"{item.nodeid}: tests belong into one of tests/{{{','.join(_KINDS)}}}"
            raise pytest.UsageError(message)
        item.add_marker(kind)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresForTests]:
    """The suite's PostgreSQL, as durable as the default set-up's."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[EmbeddedRedis]:
    """The suite's Redis. A test that stops or flushes it starts its own."""
    with redis_server() as server:
        yield server
