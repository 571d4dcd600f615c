"""Lanes to PostgreSQL: the batching engine, with held connections and a limit in time."""

import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, cast

import asyncpg

from gateway.application.ports import StoreUnavailable
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.making import maker
from storage.batching import Failure, Lane, LaneClosed, LaneMetrics, LaneTracer, QueueFull
from storage.postgres.errors import NotDurable, SchemaError, classify, refusal
from storage.postgres.pool import Connection, HeldConnections
from storage.postgres.queries import Query, run

Value = TypeVar("Value")
Result = TypeVar("Result")
T = TypeVar("T")

_log = logging.getLogger(__name__)

BACKOFF_MS = 5.0
BACKOFF_MS_MAX = 500.0
RETRIES_MAX = 1_000_000
"""Never reached: `retry_s_max` ends the repetitions."""


@dataclass(slots=True)
class LaneRow(Generic[Value]):
    """A value on its way."""

    value: Value
    give_up_s: float
    """A time of time.monotonic(); past it the row is not tried *again*."""
    tries: int = 0

    @property
    def is_retry(self) -> bool:
        """An earlier try may have been committed."""
        return self.tries > 1


_make_row = maker(LaneRow)


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """What a lane may take and hold."""

    connections: int = 1
    """Held connections, and so batches in flight."""
    rows_max: int = 500
    """Most rows in a batch."""
    queue_max: int = 10_000
    """Most rows waiting."""
    retry_s_max: float = 1.0
    """For how long a row is repeated while the database is away, in seconds."""
    linger_ms_max: float = 0.0
    """See storage.batching.Lane."""


class PostgresLane(Generic[Value, Result]):
    """A Lane whose batches run on connections of its own.

    `write` gets one batch and returns a result for each of its rows. It is repeated with the same
    rows after a failure that may pass, so it must be idempotent.
    """

    def __init__(
        self,
        name: str,
        connections: HeldConnections,
        limits: LaneLimits,
        write: Callable[
            [Connection, Sequence[LaneRow[Value]]], Awaitable[Sequence[Result | BaseException]]
        ],
        *,
        retry_after_s: float,
        partition: Callable[[Value], Hashable] | None = None,
        exclusive: Callable[[Value], Hashable | None] | None = None,
        metrics: LaneMetrics | None = None,
        tracer: LaneTracer | None = None,
    ) -> None:
        self._name = name
        self._connections = connections
        self._write = write
        self._retry_s_max = limits.retry_s_max
        self._retry_after_s = retry_after_s
        self._lane: Lane[LaneRow[Value], Result] = Lane(
            name,
            self._flush,
            rows_max=limits.rows_max,
            queue_max=limits.queue_max,
            in_flight_max=limits.connections,
            linger_ms_max=limits.linger_ms_max,
            partition=None if partition is None else lambda row: partition(row.value),
            exclusive=None if exclusive is None else lambda row: exclusive(row.value),
            classify=classify,
            retries_max=RETRIES_MAX,
            backoff_ms=BACKOFF_MS,
            backoff_ms_max=BACKOFF_MS_MAX,
            metrics=metrics,
            tracer=tracer,
        )

    @property
    def depth(self) -> int:
        """Values waiting, those in flight not counted."""
        return self._lane.depth

    async def put(
        self, value: Value, *, reserved: bool = False, retry_s_max: float | None = None
    ) -> Result:
        """Write a value and return its result.

        Raises GatewayError(OVERLOADED) for a full queue, StoreUnavailable where the database stayed
        away, and RowRefused for a value that PostgreSQL does not take.
        """
        limit_s = self._retry_s_max if retry_s_max is None else retry_s_max
        row = _make_row(value, time.monotonic() + limit_s)
        try:
            return await self._lane.submit(row, reserved)
        except (StoreUnavailable, NotDurable, SchemaError):
            raise
        except QueueFull:
            raise GatewayError(
                Reason.OVERLOADED,
                "The gateway has too much to do; try again later.",
                retry_after_s=self._retry_after_s,
            ) from None
        except LaneClosed:
            raise StoreUnavailable("the store is closed") from None
        except Exception as error:  # noqa: BLE001 - of whatever kind, it may quote the row's values
            raise refusal(error) from None

    async def close(self) -> None:
        """Write what is waiting, then close the connections."""
        await self._lane.close()
        await self._connections.close()

    def _flush(self, rows: Sequence[LaneRow[Value]]) -> Awaitable[Sequence[Result | BaseException]]:
        # All of a batch were tried before, or none.
        return self._repeat(rows) if rows[0].tries else self._run(rows)

    async def _repeat(self, rows: Sequence[LaneRow[Value]]) -> Sequence[Result | BaseException]:
        now_s = time.monotonic()
        given_up = [now_s > row.give_up_s for row in rows]
        unavailable = StoreUnavailable("PostgreSQL did not answer in time")
        live = [row for row, over in zip(rows, given_up, strict=True) if not over]
        results = iter(await self._run(live) if live else ())
        return [unavailable if over else next(results) for over in given_up]

    async def _run(self, rows: Sequence[LaneRow[Value]]) -> Sequence[Result | BaseException]:
        for row in rows:
            row.tries += 1
        try:
            return await self._connections.run(lambda connection: self._write(connection, rows))
        except Exception as error:
            if len(rows) == 1 or classify(error) is Failure.FAIL:
                self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        if classify(error) is Failure.RETRY:
            return  # it passes, and the lane's metrics count it
        # Where it happened, and nothing of what was written.
        where = "".join(traceback.format_tb(error.__traceback__)[-1:])
        _log.error("lane %s: %s\n%s", self._name, refusal(error), where)


class DirectLane:
    """A lane of single calls, for what is rare: each call is a batch of its own."""

    def __init__(
        self,
        name: str,
        connections: HeldConnections,
        limits: LaneLimits,
        *,
        retry_after_s: float = 1.0,
        metrics: LaneMetrics | None = None,
        tracer: LaneTracer | None = None,
    ) -> None:
        self._lane: PostgresLane[Callable[[Connection], Awaitable[object]], object] = PostgresLane(
            name,
            connections,
            replace(limits, rows_max=1),
            _call,
            retry_after_s=retry_after_s,
            metrics=metrics,
            tracer=tracer,
        )

    @property
    def depth(self) -> int:
        """Calls waiting, those in flight not counted."""
        return self._lane.depth

    async def run(
        self,
        call: Callable[[Connection], Awaitable[T]],
        *,
        reserved: bool = False,
        retry_s_max: float | None = None,
    ) -> T:
        """What `call` returns; it may be repeated. Raises as PostgresLane.put."""
        return cast(T, await self._lane.put(call, reserved=reserved, retry_s_max=retry_s_max))

    async def fetch(self, statement: Query, /, **values: object) -> list[asyncpg.Record]:
        """The rows of a statement, its parameters given by name. Otherwise as `run`."""
        return await self.run(lambda connection: run(connection, statement, **values))

    async def close(self) -> None:
        """Finish what was begun, then close the connections."""
        await self._lane.close()


async def _call(
    connection: Connection, rows: Sequence[LaneRow[Callable[[Connection], Awaitable[object]]]]
) -> Sequence[object | BaseException]:
    return [await row.value(connection) for row in rows]
