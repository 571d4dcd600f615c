"""Lanes to PostgreSQL: what is tried again, for how long, and what is told of a failure."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from gateway.application.ports import StoreUnavailable
from gateway.domain.errors import GatewayError, Reason
from storage.postgres.errors import ConnectionUnavailable, NotDurable, RowRefused, SchemaError
from storage.postgres.lanes import DirectLane, LaneLimits, PostgresLane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from storage.postgres.lanes import LaneRow

LONG_S = 3_600.0
RETRY_AFTER_S = 0.7
SECRET = "4242 of a row"


class Connections:
    """One connection that is none, and fails as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = [*failures]
        self.runs = 0
        self.closed = False

    async def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        self.runs += 1
        if self.failures:
            raise self.failures.pop(0)
        return await work(None)

    async def close(self) -> None:
        self.closed = True


class Writes:
    """A write that answers each value with itself, and remembers which rows it saw."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[object, bool]]] = []

    async def __call__(
        self, _: object, rows: Sequence[LaneRow[object]]
    ) -> Sequence[object | BaseException]:
        self.batches.append([(row.value, row.is_retry) for row in rows])
        return [row.value for row in rows]


def lane_of(
    connections: Connections, write: Any, *, queue_max: int = 10, **options: Any
) -> PostgresLane[object, object]:
    held: Any = connections
    limits = LaneLimits(queue_max=queue_max, retry_s_max=LONG_S)
    return PostgresLane("test", held, limits, write, retry_after_s=RETRY_AFTER_S, **options)


async def test_what_failed_is_written_again_and_told_that_it_may_have_been_written() -> None:
    write = Writes()
    lane = lane_of(Connections(ConnectionUnavailable()), write)
    assert await lane.put("a") == "a"
    assert await lane.put("b") == "b"
    assert write.batches == [[("a", True)], [("b", False)]]


async def test_a_row_whose_time_is_over_is_tried_once_and_never_again() -> None:
    write = Writes()
    connections = Connections(ConnectionUnavailable())
    lane = lane_of(connections, write)
    with pytest.raises(StoreUnavailable):
        await lane.put("late", retry_s_max=-LONG_S)
    assert (connections.runs, write.batches) == (1, [])
    assert await lane.put("late", retry_s_max=-LONG_S) == "late"


async def test_a_row_whose_time_is_over_takes_none_from_the_others_of_its_batch() -> None:
    write = Writes()
    lane = lane_of(Connections(ConnectionUnavailable()), write)
    first, late, last = await asyncio.gather(
        lane.put("a"),
        lane.put("late", retry_s_max=-LONG_S),
        lane.put("b"),
        return_exceptions=True,
    )
    assert isinstance(late, StoreUnavailable)
    assert (first, last) == ("a", "b")
    assert write.batches == [[("a", True), ("b", True)]]


@pytest.mark.parametrize("error", [NotDurable("off"), SchemaError("old"), StoreUnavailable("away")])
async def test_what_is_wrong_with_the_server_is_told_as_it_is(error: Exception) -> None:
    lane = lane_of(Connections(error), Writes())
    with pytest.raises(type(error)) as told:
        await lane.put("a")
    assert told.value is error


async def test_a_full_lane_refuses_with_a_pause_but_not_what_has_its_place() -> None:
    lane = lane_of(Connections(), Writes(), queue_max=1)
    first = asyncio.ensure_future(lane.put("a"))
    await asyncio.sleep(0)
    assert lane.depth == 1
    with pytest.raises(GatewayError) as refused:
        await lane.put("b")
    assert refused.value.reason is Reason.OVERLOADED
    assert refused.value.retry_after_s == RETRY_AFTER_S
    assert await lane.put("c", reserved=True) == "c"
    assert await first == "a"


async def test_a_closed_lane_has_written_what_it_took_and_is_a_store_that_is_away() -> None:
    connections, write = Connections(), Writes()
    lane = lane_of(connections, write)
    waiting = asyncio.ensure_future(lane.put("a"))
    await asyncio.sleep(0)
    await lane.close()
    assert connections.closed
    assert await waiting == "a"
    with pytest.raises(StoreUnavailable):
        await lane.put("a")


async def test_a_refused_row_fails_alone_is_logged_once_and_quoted_nowhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def write(_: object, rows: Sequence[LaneRow[object]]) -> Sequence[object]:
        if any(row.value == SECRET for row in rows):
            raise asyncpg.CheckViolationError(f"a row contains {SECRET}")
        return [row.value for row in rows]

    lane = lane_of(Connections(ConnectionUnavailable(SECRET)), write)
    with caplog.at_level(logging.DEBUG):
        answers = await asyncio.gather(
            *(lane.put(value) for value in (SECRET, "a", "b")), return_exceptions=True
        )
    refused = answers.pop(0)
    assert isinstance(refused, RowRefused)
    assert answers == ["a", "b"]
    assert SECRET not in str(refused)
    assert refused.__suppress_context__
    assert len(caplog.records) == 1
    assert SECRET not in caplog.text


async def test_a_failure_that_is_nobodys_row_is_logged_and_fails_its_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    connections = Connections(RuntimeError(SECRET))
    lane = lane_of(connections, Writes())
    answers = await asyncio.gather(lane.put("a"), lane.put("b"), return_exceptions=True)
    assert [type(answer) for answer in answers] == [RowRefused, RowRefused]
    assert connections.runs == 1
    assert len(caplog.records) == 1
    assert SECRET not in caplog.text


@pytest.mark.parametrize("rule", ["partition", "exclusive"])
async def test_values_that_may_not_share_a_batch_do_not(rule: str) -> None:
    write = Writes()
    options: dict[str, Any] = {rule: (lambda value: value[0])}
    lane = lane_of(Connections(), write, **options)
    values = ("a1", "b1", "a2") if rule == "exclusive" else ("a1", "b1")
    assert await asyncio.gather(*(lane.put(value) for value in values)) == [*values]
    assert len(write.batches) == 2


async def test_each_call_of_a_direct_lane_is_a_batch_of_its_own_and_closing_ends_with_them() -> (
    None
):
    connections = Connections()
    held: Any = connections
    lane = DirectLane("test", held, LaneLimits())
    called: list[int] = []

    def call(number: int) -> Callable[[Any], Awaitable[int]]:
        async def made(_: Any) -> int:
            called.append(number)
            return number

        return made

    calls = [asyncio.ensure_future(lane.run(call(number))) for number in range(3)]
    await asyncio.sleep(0)
    await lane.close()
    assert connections.closed
    assert await asyncio.gather(*calls) == called == [0, 1, 2]
    assert connections.runs == 3
