"""The one batching engine: rows in, shared round trips out, one answer for each row.

A `Lane` collects rows that arrive one by one and hands them to a `flush` callable in batches. Redis
claims and PostgreSQL writes both go through it, so the rules of batching live here and only here:

* An idle lane sends at once what one turn of the event loop submitted; while `in_flight_max`
  batches are out, the next ones fill.
* A batch never mixes partitions, and never holds two rows of one exclusive key; nor are two such
  rows in flight at the same time. Rows of one exclusive key leave in the order of submission.
* The queue is bounded; only reserved rows pass the bound, and those are bounded at admission.
* A caller's cancellation never reaches a batch: the row is written, only its answer is forgotten.

There is no task, timer or lock for each row: a row costs a future and an append.
"""

import asyncio
import enum
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from gateway.domain.making import maker

Row = TypeVar("Row")
Result = TypeVar("Result")
Answers = TypeVar("Answers")

LINGER_ROWS_MIN = 2
"""A lane lingers only when it expects at least so many rows meanwhile. Even two that
share a round trip cost less than two round trips; a lone row has nothing to wait for."""

LINGER_FROM_LOAD = 0.6
LINGER_WHOLE_AT_LOAD = 0.8
"""A lane begins to linger where the event loop's thread works for the one share of its time, and
lingers for the whole of `linger_ms_max` where it works for the other; in between, in proportion.
What a shared round trip saves is CPU: with a thread that has time left, waiting buys nothing. (In
proportion to the rate of rows a slow machine lingered less than a fast one, and became slower.)"""

LINGER_MS_CAP = 100.0
"""Largest `linger_ms_max`. Lingering is for sharing round trips of a few milliseconds; beyond this
even a lone row would count as a load (`LINGER_ROWS_MIN`, `SMOOTHING_S`)."""

SMOOTHING_S = 0.05
"""Time constant of the arrival rate and of the thread's load: long enough to see through the gaps
between bursts, short enough that a lane which fell idle is known to be idle."""


class BatchingError(Exception):
    """A row could not be batched, or its batch gave no usable answer."""


class QueueFull(BatchingError):
    """The lane's queue holds `queue_max` rows; the row was not taken."""


class LaneClosed(BatchingError):
    """The lane is closed; the row was not taken."""


class FlushBroken(BatchingError):
    """The flush callable broke its contract, so what became of the batch's rows is unknown."""


class Failure(enum.Enum):
    """What to do with the rows of a batch whose flush raised."""

    RETRY = "RETRY"
    """Send the same rows again; the flush must be idempotent."""
    BISECT = "BISECT"
    """Send the halves one after the other, so that a poisoned row fails alone."""
    FAIL = "FAIL"
    """Every row of the batch gets the exception."""


class LaneMetrics(Protocol):
    """What a lane tells about itself: once for each batch, never for each row."""

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        """A batch left; its oldest row had waited for `wait_s_of_oldest` since its submission."""

    def batch_failed(self, lane: str, rows: int, failure: Failure) -> None:
        """A flush of `rows` rows raised and was treated as `failure` says."""


class LaneTracer(Protocol):
    """What tells which requests' rows a batch carried."""

    def carried(self) -> object | None:
        """What a batch's span is to be linked to, for a row submitted now; None: nothing."""

    def flush(
        self, lane: str, rows: int, carried: Sequence[object], sending: Awaitable[Answers]
    ) -> Awaitable[Answers]:
        """Await `sending`, a flush of `rows` rows, some of which were `carried`. Raises as it."""


class NoLaneMetrics:
    """Discards everything."""

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        """Discard it."""

    def batch_failed(self, lane: str, rows: int, failure: Failure) -> None:
        """Discard it."""


def fail_always(_: Exception) -> Failure:
    """The default policy: no error is known to be worth a second attempt."""
    return Failure.FAIL


@dataclass(slots=True)
class _Entry(Generic[Row, Result]):
    row: Row
    future: asyncio.Future[Result]
    partition: Hashable
    exclusive: Hashable | None
    submitted_s: float
    traced: object | None = None
    """Set only where there is a tracer."""


_make_entry = maker(_Entry)


class Lane(Generic[Row, Result]):
    """A bounded queue of rows that leave in batches. It belongs to the event loop it is made in.

    Args:
        name: the lane's name in metrics and errors.
        flush: takes the rows of one batch, in order, and returns for each one, in the same order,
            its result or the exception that its caller shall get. It is given at most
            `in_flight_max` batches at a time, and it must come to an end by its own time-outs.
        rows_max: most rows in a batch.
        queue_max: most rows waiting, those in flight not counted.
        in_flight_max: most batches in flight, e.g. one for each connection of the lane.
        linger_ms_max: longest time that a row waits for company while there is room in flight.
            The lane lingers only where rows come meanwhile (`LINGER_ROWS_MIN`), so a lone row
            never waits; 0 turns lingering off, and `LINGER_MS_CAP` is the most.
        cpu_s: seconds of CPU that the event loop's thread has used: the busier it is, the longer
            rows wait (`LINGER_FROM_LOAD`); None: as if it worked all the time.
        partition: rows of different partitions never share a batch. Partitions take turns.
        exclusive: at most one row of a key is in flight; rows without a key (None) are free.
        classify: decides what happens to a batch whose flush raised.
        retries_max: most repetitions (Failure.RETRY) for a batch, its halves included; beyond
            them the rows get the exception. A batch that backs off keeps its place in flight.
        backoff_ms: mean pause before the first repetition; doubles with each one, fully jittered.
        backoff_ms_max: longest pause before a repetition.
        tracer: makes a span of each flush; None: there are none.
        clock_s: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        flush: Callable[[Sequence[Row]], Awaitable[Sequence[Result | BaseException]]],
        *,
        rows_max: int,
        queue_max: int,
        in_flight_max: int = 1,
        linger_ms_max: float = 0.0,
        cpu_s: Callable[[], float] | None = time.thread_time,
        partition: Callable[[Row], Hashable] | None = None,
        exclusive: Callable[[Row], Hashable | None] | None = None,
        classify: Callable[[Exception], Failure] = fail_always,
        retries_max: int = 3,
        backoff_ms: float = 2.0,
        backoff_ms_max: float = 50.0,
        metrics: LaneMetrics | None = None,
        tracer: LaneTracer | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(rows_max, queue_max, in_flight_max) < 1:
            raise ValueError(f"lane {name}: rows_max, queue_max and in_flight_max are at least 1")
        if min(linger_ms_max, retries_max, backoff_ms, backoff_ms_max) < 0:
            raise ValueError(f"lane {name}: times and retries_max are not negative")
        if linger_ms_max > LINGER_MS_CAP:
            raise ValueError(f"lane {name}: linger_ms_max is at most {LINGER_MS_CAP}")
        self.name = name
        self._flush = flush
        self._rows_max = rows_max
        self._queue_max = queue_max
        self._in_flight_max = in_flight_max
        self._linger_s_max = linger_ms_max / 1000
        self._cpu_s = clock_s if cpu_s is None else cpu_s
        self._partition = partition
        self._exclusive = exclusive
        self._classify = classify
        self._retries_max = retries_max
        self._backoff_s = backoff_ms / 1000
        self._backoff_s_max = backoff_ms_max / 1000
        self._metrics: LaneMetrics = metrics if metrics is not None else NoLaneMetrics()
        self._tracer = tracer
        self._clock_s = clock_s
        self._loop = asyncio.get_running_loop()
        self._task_name = f"lane-{name}"

        # Rows that may leave, by partition; the order of the dict is the order of turns.
        self._ready: dict[Hashable, deque[_Entry[Row, Result]]] = {}
        self._ready_rows = 0
        # Exclusive keys of ready rows and rows in flight, each with the rows parked behind it.
        # Parked rows are kept off the queue so that no batch has to search its way past them.
        self._held: dict[Hashable, deque[_Entry[Row, Result]] | None] = {}
        self._parked_rows = 0
        # The loop keeps only weak references to tasks.
        self._sending: set[asyncio.Task[None]] = set()
        self._in_flight = 0

        # A task has begun that will take a batch, and has not taken it yet.
        self._taker_begun = False
        # What it waits for while it lingers, and what ends that.
        self._linger_end: asyncio.Future[None] | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._arrived = 0
        self._arrivals_per_s = 0.0
        self._load = 0.0
        self._measured_s = clock_s()
        self._measured_cpu_s = self._cpu_s()

        self._closed = False
        self._drained = asyncio.Event()

    @property
    def depth(self) -> int:
        """Rows waiting, those in flight not counted."""
        return self._ready_rows + self._parked_rows

    @property
    def in_flight(self) -> int:
        """Batches in flight, those that back off included."""
        return self._in_flight

    @property
    def linger_s(self) -> float:
        """How long a row waits for company at the present load; 0: not at all."""
        linger_s = self._linger_s_max
        if self._load < LINGER_WHOLE_AT_LOAD:
            part = (self._load - LINGER_FROM_LOAD) / (LINGER_WHOLE_AT_LOAD - LINGER_FROM_LOAD)
            linger_s *= max(0.0, part)
        return linger_s if self._arrivals_per_s * linger_s >= LINGER_ROWS_MIN else 0.0

    def submit(self, row: Row, reserved: bool = False) -> asyncio.Future[Result]:
        """Take a row; the future gets its result, or the exception it failed with.

        Cancelling the future forgets the answer and nothing else: the row is sent all the same.
        Whoever may be cancelled and needs the answer later keeps the future behind
        `asyncio.shield`.

        Args:
            row: what to send.
            reserved: the row's place was reserved at admission (an outcome), so that it is taken
                even when the queue is full.

        Raises:
            QueueFull: `queue_max` rows are waiting. The row was not taken.
            LaneClosed: the lane is closed. The row was not taken.
        """
        if self._closed:
            raise LaneClosed(f"lane {self.name} is closed")
        if not reserved and self._ready_rows + self._parked_rows >= self._queue_max:
            raise QueueFull(f"lane {self.name} has {self._queue_max} rows waiting")
        future: asyncio.Future[Result] = self._loop.create_future()
        exclusive = None if self._exclusive is None else self._exclusive(row)
        entry = _make_entry(
            row,
            future,
            None if self._partition is None else self._partition(row),
            exclusive,
            self._clock_s(),
        )
        if self._tracer is not None:
            entry.traced = self._tracer.carried()
        self._arrived += 1
        if exclusive is not None:
            if exclusive in self._held:
                self._park(entry)
                return future
            self._held[exclusive] = None
        self._queue_of(entry).append(entry)
        self._ready_rows += 1
        if not self._taker_begun:
            if self._in_flight < self._in_flight_max:
                self._begin_taker()
        elif self._linger_end is not None and self._ready_rows >= self._rows_max:
            self._stop_lingering()
        return future

    async def put(self, row: Row, *, reserved: bool = False) -> Result:
        """Submit a row and wait for its result. Cancelling the waiter does not cancel the row.

        Raises:
            QueueFull, LaneClosed: as `submit`; the row was not taken.
            Exception: what the row failed with.
        """
        return await self.submit(row, reserved)

    async def close(self) -> None:
        """Refuse new rows, reserved ones too, and return when every row taken has its answer.

        Close a lane only after those who submit to it have finished. Safe to repeat.
        """
        self._closed = True
        if self._is_empty():
            self._drained.set()
        else:
            self._stop_lingering()
        await self._drained.wait()

    def _is_empty(self) -> bool:
        return self._in_flight == 0 and self._ready_rows == 0 and self._parked_rows == 0

    def _park(self, entry: _Entry[Row, Result]) -> None:
        parked = self._held[entry.exclusive]
        if parked is None:
            parked = self._held[entry.exclusive] = deque()
        parked.append(entry)
        self._parked_rows += 1

    def _queue_of(self, entry: _Entry[Row, Result]) -> deque[_Entry[Row, Result]]:
        queue = self._ready.get(entry.partition)
        if queue is None:
            queue = self._ready[entry.partition] = deque()
        return queue

    def _begin_taker(self) -> None:
        # A task, since it begins in the loop's next turn: its batch has all that this one submits.
        self._taker_begun = True
        # Made without the loop's help, which would make up another name first.
        task = asyncio.Task(self._send(), loop=self._loop, name=self._task_name)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _linger(self) -> None:
        """Wait for more rows where that pays: as long as may be, or until a batch is full."""
        now_s = self._clock_s()
        elapsed_s = now_s - self._measured_s
        if elapsed_s > 0:
            weight = -math.expm1(-elapsed_s / SMOOTHING_S)
            self._arrivals_per_s += weight * (self._arrived / elapsed_s - self._arrivals_per_s)
            self._arrived = 0
            self._measured_s = now_s
            cpu_s = self._cpu_s()
            self._load += weight * ((cpu_s - self._measured_cpu_s) / elapsed_s - self._load)
            self._measured_cpu_s = cpu_s
        if self._closed or self._ready_rows >= self._rows_max:
            return
        oldest = next(iter(self._ready.values()))[0]
        rest_s = oldest.submitted_s + self.linger_s - now_s
        if rest_s <= 0:
            return
        self._linger_end = self._loop.create_future()
        self._linger_timer = self._loop.call_later(rest_s, self._stop_lingering)
        try:
            await self._linger_end
        finally:
            self._linger_timer.cancel()
            self._linger_end = self._linger_timer = None

    def _stop_lingering(self) -> None:
        if self._linger_end is not None and not self._linger_end.done():
            self._linger_end.set_result(None)

    def _take_batch(self) -> list[_Entry[Row, Result]]:
        partition, queue = next(iter(self._ready.items()))
        del self._ready[partition]
        if len(queue) <= self._rows_max:
            batch = list(queue)
        else:
            batch = [queue.popleft() for _ in range(self._rows_max)]
            self._ready[partition] = queue  # at the end: the other partitions come first
        self._ready_rows -= len(batch)
        return batch

    async def _send(self) -> None:
        """Take a batch and send it."""
        if self._linger_s_max > 0:
            await self._linger()
        batch = self._take_batch()
        self._in_flight += 1
        self._taker_begun = False
        if self._ready and self._in_flight < self._in_flight_max:
            self._begin_taker()
        try:
            wait_s = self._clock_s() - min([entry.submitted_s for entry in batch])
            self._metrics.batch_sent(self.name, len(batch), wait_s)
            await self._flush_all(batch)
        except asyncio.CancelledError:
            for entry in batch:  # the loop is being torn down
                entry.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 (whatever it is, its rows get an answer)
            # The policy or the metrics are broken; that must leave nobody waiting for ever.
            broken = FlushBroken(f"lane {self.name}: {error!r}")
            broken.__cause__ = error
            _fail(batch, broken)
        finally:
            self._in_flight -= 1
            self._release_keys(batch)
            if self._ready and not self._taker_begun:
                # It begins behind the callers whose answers were just set: what they submit next
                # travels with its batch.
                self._begin_taker()
            if self._closed and self._is_empty():
                self._drained.set()

    async def _flush_all(self, batch: list[_Entry[Row, Result]]) -> None:
        """Flush a batch, again and in halves as the policy says, until each row has its answer."""
        parts = [batch]
        retries = 0
        while parts:
            part = parts.pop()
            try:
                results = await self._flush_once(part)
            except Exception as error:  # noqa: BLE001 (the policy judges it)
                failure = self._classify(error)
                if failure is Failure.RETRY and retries >= self._retries_max:
                    failure = Failure.FAIL
                if failure is Failure.BISECT and len(part) == 1:
                    failure = Failure.FAIL
                self._metrics.batch_failed(self.name, len(part), failure)
                if failure is Failure.RETRY:
                    await asyncio.sleep(self._pause_s(retries))
                    retries += 1
                    parts.append(part)
                elif failure is Failure.BISECT:
                    middle = len(part) // 2
                    parts += (part[middle:], part[:middle])
                else:
                    _fail(part, error)
            else:
                _answer(part, results)

    async def _flush_once(
        self, part: list[_Entry[Row, Result]]
    ) -> Sequence[Result | BaseException]:
        try:
            sending = self._flush([entry.row for entry in part])
            if self._tracer is not None:
                carried = [entry.traced for entry in part if entry.traced is not None]
                sending = self._tracer.flush(self.name, len(part), carried, sending)
            results = await sending
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Something inside the flush was cancelled, not the lane: an error like any other.
            raise FlushBroken(f"lane {self.name}: the flush was cancelled from within") from error
        if len(results) != len(part):
            raise FlushBroken(
                f"lane {self.name}: the flush gave {len(results)} answers to {len(part)} rows"
            )
        return results

    def _pause_s(self, retries: int) -> float:
        doublings = min(retries, 30)  # far beyond any backoff_ms_max, and no overflow
        pause_s_max = min(self._backoff_s_max, 2 * self._backoff_s * 2**doublings)
        return random.uniform(0, pause_s_max)

    def _release_keys(self, batch: list[_Entry[Row, Result]]) -> None:
        if self._exclusive is None:
            return
        # Backwards and to the front: rows that were parked are older than those of the queue.
        for entry in reversed(batch):
            if entry.exclusive is None:
                continue
            parked = self._held[entry.exclusive]
            if not parked:
                del self._held[entry.exclusive]
                continue
            oldest = parked.popleft()
            self._parked_rows -= 1
            self._queue_of(oldest).appendleft(oldest)
            self._ready_rows += 1


def _answer(part: list[_Entry[Row, Result]], results: Sequence[Result | BaseException]) -> None:
    for entry, result in zip(part, results, strict=True):
        if isinstance(result, BaseException):
            _fail_row(entry, result)
        elif not entry.future.done():  # done: cancelled by its caller
            entry.future.set_result(result)


def _fail(part: list[_Entry[Row, Result]], error: Exception) -> None:
    for entry in part:
        _fail_row(entry, error)


def _fail_row(entry: _Entry[Row, Result], error: BaseException) -> None:
    if entry.future.done():
        return
    entry.future.set_exception(error)
    # Looked at, so that asyncio does not log it as never retrieved: the caller behind a shield may
    # have been cancelled, which is no fault. Failures are counted by the lane's metrics.
    entry.future.exception()
