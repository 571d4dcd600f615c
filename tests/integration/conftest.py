"""A database of its own for each test, and a store on it; a Redis of its own for each module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from storage.postgres import PostgresStore
from tests.servers import redis_server
from tests.store_data import new_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests


@pytest.fixture
def dsn(postgres: PostgresForTests) -> Iterator[str]:
    """A database with the schema and nothing in it, on the server of the test's module."""
    database = new_database(postgres)
    yield database
    postgres.drop_database(database)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    """A gateway's."""
    async with PostgresStore(dsn) as opened:
        yield opened


@pytest.fixture(scope="module")
def own_redis() -> Iterator[EmbeddedRedis]:
    """The module's, to be flushed and looked into."""
    with redis_server() as running:
        yield running


@pytest.fixture
def mortal_redis() -> Iterator[EmbeddedRedis]:
    """The test's alone, to be killed and paused."""
    with redis_server() as running:
        yield running
