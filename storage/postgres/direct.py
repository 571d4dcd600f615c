"""Stores whose statements run one by one, on a lane of single calls: for what is rare."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Final, Self, TypeVar

import asyncpg

from storage.postgres.lanes import DirectLane, LaneLimits
from storage.postgres.pool import ConnectionSettings, HeldConnections

OVERLAP_S: Final = 600.0
"""How far before the last change is looked again; longer than any statement may take."""

_LIMITS: Final = LaneLimits(connections=1, rows_max=1, queue_max=200, retry_s_max=1.0)
_CONNECT_TIMEOUT_S: Final = 5.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


def readable(
    what: str, read: Callable[[asyncpg.Record], T], records: Sequence[asyncpg.Record]
) -> list[T]:
    """Those that this version can read; of the others, as a newer version's, it is said whose they
    are.
    """
    found = []
    for record in records:
        try:
            found.append(read(record))
        except ValueError as error:
            merchant_id = record["merchant_id"]
            _log.error("%s cannot be read: %s", what, error, extra={"merchant_id": merchant_id})
    return found


class DirectStore:
    """Every method of such a store raises StoreUnavailable where the database is away."""

    NAME: ClassVar[str]
    """Of its lane and connections."""
    STATEMENT_TIMEOUT_S: ClassVar[float] = 10.0

    def __init__(self, lane: DirectLane) -> None:
        """`lane` is the caller's to close; `connect` brings its own."""
        self._lane = lane

    @classmethod
    @asynccontextmanager
    async def connect(cls, dsn: str, author: str = "") -> AsyncIterator[Self]:
        """With a connection of its own, by which `author` changes what it changes."""
        settings = ConnectionSettings(
            dsn,
            connect_timeout_s=_CONNECT_TIMEOUT_S,
            statement_timeout_s=cls.STATEMENT_TIMEOUT_S,
            author=author,
        )
        lane = DirectLane(cls.NAME, HeldConnections(settings, cls.NAME, 1), _LIMITS)
        try:
            yield cls(lane)
        finally:
            await lane.close()
