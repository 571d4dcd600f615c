"""Stores whose statements run one by one, on a lane of single calls: for what is rare."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Final, Self

from storage.postgres.lanes import DirectLane, LaneLimits
from storage.postgres.pool import ConnectionSettings, HeldConnections

OVERLAP_S: Final = 600.0
"""How far before the last change is looked again; longer than any statement may take."""

_LIMITS: Final = LaneLimits(connections=1, rows_max=1, queue_max=200, retry_s_max=1.0)
_CONNECT_TIMEOUT_S: Final = 5.0


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
