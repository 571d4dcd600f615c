"""The batching engine's rules, each driven to where it would break."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.batching import (
    LINGER_FROM_LOAD,
    LINGER_MS_CAP,
    LINGER_WHOLE_AT_LOAD,
    Failure,
    FlushBroken,
    Lane,
    LaneClosed,
    QueueFull,
)

T = TypeVar("T")

HANG_S = 30.0
"""A test that takes so long hangs; no rule is tested by this time."""


def run(main: Callable[[], Awaitable[T]]) -> T:
    async def guarded() -> T:
        async with asyncio.timeout(HANG_S):
            return await main()

    return asyncio.run(guarded())


@dataclass
class Recorder:
    """Lane metrics that remember."""

    sent: list[tuple[int, float]] = field(default_factory=list)
    failed: list[tuple[int, Failure]] = field(default_factory=list)

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        self.sent.append((rows, wait_s_of_oldest))

    def batch_failed(self, lane: str, rows: int, failure: Failure) -> None:
        self.failed.append((rows, failure))


class Gate:
    """A flush that holds each batch until the test lets it go, and answers a row with itself."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self._let_go: list[asyncio.Event] = []
        self._arrived = asyncio.Condition()

    async def flush(self, rows: Sequence[Any]) -> list[Any]:
        event = asyncio.Event()
        self.batches.append(list(rows))
        self._let_go.append(event)
        async with self._arrived:
            self._arrived.notify_all()
        await event.wait()
        return list(rows)

    async def arrived(self, batches: int) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.batches) >= batches)

    def let_go(self, batch: int) -> None:
        self._let_go[batch].set()


class Echo:
    """A flush that answers every row with itself at once."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    async def flush(self, rows: Sequence[Any]) -> list[Any]:
        self.batches.append(list(rows))
        return list(rows)


@dataclass(frozen=True)
class Row:
    number: int
    partition: int
    payment: int | None
    poisoned: bool
    pauses: int
    """Event loop turns between this row's submission and the next one's."""


class Poisoned(Exception):
    pass


class Deadlock(Exception):
    pass


def classify(error: Exception) -> Failure:
    if isinstance(error, Poisoned):
        return Failure.BISECT
    return Failure.RETRY if isinstance(error, Deadlock) else Failure.FAIL


def assert_answered(row: Row, future: asyncio.Future[int], *, lost: bool) -> None:
    if lost:
        assert future.cancelled()
    elif row.poisoned:
        assert isinstance(future.exception(), Poisoned)
    else:
        assert future.result() == row.number


_loads = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.one_of(st.none(), st.integers(0, 3)),
        st.sampled_from([False] * 9 + [True]),
        st.integers(0, 3),
    ),
    max_size=60,
).map(lambda drawn: [Row(number, *parts) for number, parts in enumerate(drawn)])


@settings(max_examples=150)
@given(
    rows=_loads,
    rows_max=st.integers(1, 8),
    in_flight_max=st.integers(1, 4),
    linger_ms_max=st.sampled_from([0.0, 0.5]),
    flush_turns=st.integers(0, 6),
    deadlocks=st.sets(st.integers(0, 20), max_size=4),
    cancelled=st.sets(st.integers(0, 59), max_size=10),
)
def test_every_row_gets_one_answer_and_no_batch_breaks_a_rule(
    *,
    rows: list[Row],
    rows_max: int,
    in_flight_max: int,
    linger_ms_max: float,
    flush_turns: int,
    deadlocks: set[int],
    cancelled: set[int],
) -> None:
    written: Counter[int] = Counter()
    order: dict[int, list[int]] = defaultdict(list)
    in_flight_keys: Counter[int] = Counter()
    in_flight = 0
    flushes = 0

    async def flush(batch: Sequence[Row]) -> list[int]:
        nonlocal in_flight, flushes
        flushes += 1
        in_flight += 1
        keys = [row.payment for row in batch if row.payment is not None]
        in_flight_keys.update(keys)
        try:
            assert 1 <= len(batch) <= rows_max
            assert in_flight <= in_flight_max
            assert len({row.partition for row in batch}) == 1
            assert not keys or max(in_flight_keys.values()) == 1
            number = flushes
            for _ in range(flush_turns):
                await asyncio.sleep(0)
            if number in deadlocks:
                raise Deadlock
            if any(row.poisoned for row in batch):
                raise Poisoned
            for row in batch:
                written[row.number] += 1
                if row.payment is not None:
                    order[row.payment].append(row.number)
            return [row.number for row in batch]
        finally:
            in_flight -= 1
            in_flight_keys.subtract(keys)

    async def main() -> None:
        lane: Lane[Row, int] = Lane(
            "test",
            flush,
            rows_max=rows_max,
            queue_max=1_000,
            in_flight_max=in_flight_max,
            linger_ms_max=linger_ms_max,
            cpu_s=None,
            partition=lambda row: row.partition,
            exclusive=lambda row: row.payment,
            classify=classify,
            retries_max=len(deadlocks),
            backoff_ms=0.01,
        )
        futures = []
        for row in rows:
            futures.append(lane.submit(row))
            for _ in range(row.pauses):
                await asyncio.sleep(0)
        lost = {number for number in cancelled if number < len(rows) and futures[number].cancel()}
        await lane.close()
        for row, future in zip(rows, futures, strict=True):
            assert_answered(row, future, lost=row.number in lost)
        assert written == Counter(row.number for row in rows if not row.poisoned)
        assert all(numbers == sorted(numbers) for numbers in order.values())
        assert (lane.depth, lane.in_flight) == (0, 0)
        assert not lane._held  # nothing of an exclusive key is kept for ever
        assert not lane._ready

    run(main)


def make_busy(lane: Lane[int, int]) -> None:
    """Let the lane believe in a storm of arrivals, and in a busy thread, for good."""
    lane._arrivals_per_s = 1e9
    lane._load = 1.0
    lane._measured_s = float("inf")


async def turns(count: int = 4) -> None:
    """Let the event loop turn: enough for a row to leave that nothing holds back."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_idle_lane_sends_a_lone_row_without_waiting_however_long_it_may_linger() -> None:
    async def main() -> None:
        echo = Echo()
        lane: Lane[int, int] = Lane(
            "test", echo.flush, rows_max=10, queue_max=10, linger_ms_max=LINGER_MS_CAP
        )
        future = lane.submit(1)
        await turns()
        assert echo.batches == [[1]]
        assert await future == 1

    run(main)


def test_rows_of_one_turn_leave_an_idle_lane_in_one_batch() -> None:
    async def main() -> None:
        echo = Echo()
        lane: Lane[int, int] = Lane("test", echo.flush, rows_max=10, queue_max=10, in_flight_max=4)
        assert await asyncio.gather(*(lane.put(number) for number in range(5))) == [*range(5)]
        assert echo.batches == [[0, 1, 2, 3, 4]]

    run(main)


def test_rows_submitted_during_a_flush_leave_in_one_batch() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[int, int] = Lane("test", gate.flush, rows_max=10, queue_max=10)
        futures = [lane.submit(0)]
        await gate.arrived(1)
        for number in range(1, 6):
            futures.append(lane.submit(number))
            await asyncio.sleep(0)
        assert (lane.depth, lane.in_flight) == (5, 1)
        gate.let_go(0)
        await gate.arrived(2)
        gate.let_go(1)
        assert await asyncio.gather(*futures) == [*range(6)]
        assert gate.batches == [[0], [1, 2, 3, 4, 5]]

    run(main)


def test_no_more_batches_than_in_flight_max_are_sent_at_a_time() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[int, int] = Lane("test", gate.flush, rows_max=1, queue_max=10, in_flight_max=2)
        futures = [lane.submit(number) for number in range(3)]
        await gate.arrived(2)
        await turns()
        assert (lane.depth, lane.in_flight) == (1, 2)
        gate.let_go(1)
        await gate.arrived(3)
        gate.let_go(0)
        gate.let_go(2)
        assert await asyncio.gather(*futures) == [0, 1, 2]

    run(main)


class Clock:
    """Time that passes when it is told to, and what the event loop's thread has worked of it."""

    def __init__(self) -> None:
        self.now_s = self.cpu_s = 0.0

    def pass_(self, seconds: float, work: float = 0.0) -> None:
        self.now_s += seconds
        self.cpu_s += seconds * work

    def lane(self, echo: Echo, *, is_asked: bool = True) -> Lane[int, int]:
        """A lane that may linger; `is_asked`: in proportion to the thread's work."""
        return Lane(
            "test",
            echo.flush,
            rows_max=1_000,
            queue_max=1_000,
            linger_ms_max=LINGER_MS_CAP,
            cpu_s=(lambda: self.cpu_s) if is_asked else None,
            clock_s=lambda: self.now_s,
        )


@pytest.mark.parametrize("work", [0.95, None])
def test_lane_lingers_once_rows_come_thickly_and_no_more_when_it_fell_idle(
    work: float | None,
) -> None:
    async def main() -> None:
        echo, clock = Echo(), Clock()
        lane = clock.lane(echo, is_asked=work is not None)
        futures = [lane.submit(0)]
        await turns()
        assert echo.batches == [[0]]
        while lane._linger_timer is None:
            assert len(futures) < 1_000
            clock.pass_(0.001, work or 0)
            futures.append(lane.submit(len(futures)))
            await turns()
        await asyncio.gather(*futures)
        clock.pass_(10)
        last = lane.submit(-1)
        await turns()
        assert echo.batches[-1] == [-1]
        await last

    run(main)


def test_lane_knows_how_thickly_rows_come_and_how_busy_its_thread_is() -> None:
    async def main() -> None:
        clock = Clock()
        lane = clock.lane(Echo())
        for number in range(1_000):
            clock.pass_(0.001, LINGER_FROM_LOAD / 2)
            await lane.put(number)
        assert lane._arrivals_per_s == pytest.approx(1_000)
        assert lane._load == pytest.approx(LINGER_FROM_LOAD / 2)

    run(main)


def test_lane_of_a_thread_with_time_left_lets_nobody_wait_however_many_rows_come() -> None:
    async def main() -> None:
        echo, clock = Echo(), Clock()
        lane = clock.lane(echo)
        for number in range(1_000):
            clock.pass_(0.0001, LINGER_FROM_LOAD)
            future = lane.submit(number)
            await turns()
            assert echo.batches[-1] == [number]
            await future

    run(main)


def test_lane_lingers_the_longer_the_busier_its_thread_is_up_to_its_most() -> None:
    async def main() -> None:
        lane: Lane[int, int] = Lane(
            "test", Echo().flush, rows_max=10, queue_max=10, linger_ms_max=10
        )
        lane._arrivals_per_s = 1_000
        between = (LINGER_FROM_LOAD + LINGER_WHOLE_AT_LOAD) / 2
        lingers_s = []
        for load in (0.0, LINGER_FROM_LOAD, between, LINGER_WHOLE_AT_LOAD, 1.0):
            lane._load = load
            lingers_s.append(round(lane.linger_s, 9))
        assert lingers_s == [0, 0, 0.005, 0.01, 0.01]

        lane._arrivals_per_s = 200  # a second row would come meanwhile
        assert lane.linger_s == 0.01
        lane._arrivals_per_s = 199
        assert lane.linger_s == 0

    run(main)


def test_lingering_rows_leave_as_soon_as_the_batch_is_full() -> None:
    async def main() -> None:
        echo = Echo()
        lane: Lane[int, int] = Lane(
            "test", echo.flush, rows_max=8, queue_max=100, linger_ms_max=LINGER_MS_CAP
        )
        make_busy(lane)
        futures = [lane.submit(0)]
        await turns()
        assert lane._linger_timer is not None
        lane._linger_timer.cancel()  # it shall not be the time that sends them
        futures += [lane.submit(number) for number in range(1, 7)]
        await turns()
        assert not echo.batches
        futures.append(lane.submit(7))
        assert await asyncio.gather(*futures) == [*range(8)]
        assert echo.batches == [[*range(8)]]

    run(main)


@pytest.mark.parametrize("closed", [False, True])
def test_lingering_rows_leave_when_the_time_is_over_or_the_lane_closes(closed: bool) -> None:
    async def main() -> None:
        echo = Echo()
        lane: Lane[int, int] = Lane(
            "test",
            echo.flush,
            rows_max=1_000,
            queue_max=1_000,
            linger_ms_max=LINGER_MS_CAP if closed else 1.0,
        )
        make_busy(lane)
        future = lane.submit(1)
        await turns()
        if closed:
            assert lane._linger_timer is not None
            lane._linger_timer.cancel()
            await lane.close()
        assert await future == 1

    run(main)


def test_how_long_the_oldest_row_of_a_batch_has_waited_is_told() -> None:
    async def main() -> None:
        gate, clock, recorder = Gate(), Clock(), Recorder()
        lane: Lane[int, int] = Lane(
            "test",
            gate.flush,
            rows_max=3,
            queue_max=10,
            metrics=recorder,
            clock_s=lambda: clock.now_s,
        )
        clock.pass_(100)
        futures = [lane.submit(0)]
        await gate.arrived(1)
        for number in (1, 2):
            futures.append(lane.submit(number))
            clock.pass_(number)
        gate.let_go(0)
        await gate.arrived(2)
        gate.let_go(1)
        await asyncio.gather(*futures)
        assert recorder.sent == [(1, 0), (2, 3)]

    run(main)


def test_full_batch_does_not_linger() -> None:
    async def main() -> None:
        echo = Echo()
        lane: Lane[int, int] = Lane(
            "test", echo.flush, rows_max=3, queue_max=10, linger_ms_max=LINGER_MS_CAP
        )
        make_busy(lane)
        futures = [lane.submit(number) for number in range(3)]
        await turns()
        assert echo.batches == [[0, 1, 2]]
        await asyncio.gather(*futures)

    run(main)


def test_lane_that_closes_waits_for_what_is_in_flight_and_lingers_no_more() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[int, int] = Lane(
            "test", gate.flush, rows_max=3, queue_max=10, linger_ms_max=LINGER_MS_CAP
        )
        futures = [lane.submit(0)]
        await gate.arrived(1)
        gate.let_go(0)
        await futures[0]  # it was empty before, and is not now
        futures.append(lane.submit(1))
        await gate.arrived(2)
        make_busy(lane)
        futures.append(lane.submit(2))
        closing = asyncio.ensure_future(lane.close())
        await turns()
        assert not closing.done()
        gate.let_go(1)
        await turns(8)
        assert gate.batches == [[0], [1], [2]]
        again = asyncio.ensure_future(lane.close())
        await turns()
        assert not closing.done()
        assert not again.done()
        gate.let_go(2)
        await asyncio.gather(closing, again)
        assert [future.result() for future in futures] == [0, 1, 2]

    run(main)


def test_lane_keeps_what_it_sends_and_nothing_of_what_it_has_sent() -> None:
    waited_for: list[weakref.ref[asyncio.Future[None]]] = []

    async def flush(rows: Sequence[int]) -> list[int]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waited_for.append(weakref.ref(future))
        await future
        return list(rows)

    async def main() -> None:
        lane: Lane[int, int] = Lane("test", flush, rows_max=3, queue_max=10)
        answer = lane.submit(1)
        await turns()
        gc.collect()
        future = waited_for[0]()
        assert future is not None
        future.set_result(None)
        assert await answer == 1
        await turns()
        assert not lane._sending

    run(main)


def test_partitions_take_turns() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[str, str] = Lane(
            "test", gate.flush, rows_max=2, queue_max=20, partition=lambda row: row[0]
        )
        futures = [lane.submit(row) for row in ("a1", "a2", "a3", "a4", "a5", "b1")]
        for batch in range(4):
            await gate.arrived(batch + 1)
            gate.let_go(batch)
        await asyncio.gather(*futures)
        assert gate.batches == [["a1", "a2"], ["b1"], ["a3", "a4"], ["a5"]]

    run(main)


def test_second_row_of_a_payment_waits_for_the_first_ones_answer_and_blocks_no_other() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[str, str] = Lane(
            "test", gate.flush, rows_max=10, queue_max=20, in_flight_max=4, exclusive=lambda r: r[0]
        )
        futures = [lane.submit(row) for row in ("a1", "a2", "a3", "b1")]
        await gate.arrived(1)
        futures.append(lane.submit("c1"))
        await gate.arrived(2)
        assert lane.depth == 2
        gate.let_go(0)
        await gate.arrived(3)
        gate.let_go(2)
        await gate.arrived(4)
        gate.let_go(1)
        gate.let_go(3)
        await asyncio.gather(*futures)
        assert gate.batches == [["a1", "b1"], ["c1"], ["a2"], ["a3"]]

    run(main)


def test_rows_held_back_by_their_key_leave_before_younger_rows() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[str, str] = Lane(
            "test", gate.flush, rows_max=2, queue_max=20, exclusive=lambda row: row[0]
        )
        futures = [lane.submit(row) for row in ("a1", "b1")]
        await gate.arrived(1)
        futures += [lane.submit(row) for row in ("b2", "a2", "c1", "d1")]
        for batch in range(3):
            await gate.arrived(batch + 1)
            gate.let_go(batch)
        await asyncio.gather(*futures)
        assert gate.batches == [["a1", "b1"], ["a2", "b2"], ["c1", "d1"]]

    run(main)


def test_full_queue_refuses_a_row_and_takes_a_reserved_one() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[int, int] = Lane("test", gate.flush, rows_max=10, queue_max=2)
        first = lane.submit(0)
        await gate.arrived(1)
        futures = [lane.submit(1), lane.submit(2)]
        with pytest.raises(QueueFull):
            lane.submit(3)
        futures.append(lane.submit(4, reserved=True))
        with pytest.raises(QueueFull):
            await lane.put(5)
        gate.let_go(0)
        await gate.arrived(2)
        gate.let_go(1)
        assert await asyncio.gather(first, *futures) == [0, 1, 2, 4]

    run(main)


def test_rows_parked_behind_a_key_count_towards_the_queues_bound() -> None:
    async def main() -> None:
        gate = Gate()
        lane: Lane[int, int] = Lane(
            "test", gate.flush, rows_max=10, queue_max=2, exclusive=lambda _: "same"
        )
        futures = [lane.submit(0), lane.submit(1)]
        with pytest.raises(QueueFull):
            lane.submit(2)
        for batch in range(2):
            await gate.arrived(batch + 1)
            gate.let_go(batch)
        assert await asyncio.gather(*futures) == [0, 1]

    run(main)


def test_exception_instance_in_the_answer_fails_its_row_alone() -> None:
    async def flush(rows: Sequence[int]) -> list[int | BaseException]:
        return [ValueError("refused") if row == 1 else row for row in rows]

    async def main() -> None:
        lane: Lane[int, int] = Lane("test", flush, rows_max=10, queue_max=10)
        answers = await asyncio.gather(
            *(lane.put(number) for number in range(3)), return_exceptions=True
        )
        assert answers[0] == 0
        assert isinstance(answers[1], ValueError)
        assert answers[2] == 2

    run(main)


def test_poisoned_row_fails_alone_and_the_others_keep_their_order() -> None:
    written: list[int] = []

    async def flush(rows: Sequence[int]) -> list[int]:
        if 5 in rows:
            raise Poisoned
        written.extend(rows)
        return list(rows)

    async def main() -> None:
        recorder = Recorder()
        lane: Lane[int, int] = Lane(
            "test",
            flush,
            rows_max=100,
            queue_max=100,
            classify=classify,
            retries_max=0,  # halves are no repetitions
            metrics=recorder,
        )
        answers = await asyncio.gather(
            *(lane.put(number) for number in range(16)), return_exceptions=True
        )
        assert isinstance(answers.pop(5), Poisoned)
        assert answers == written == [number for number in range(16) if number != 5]
        assert recorder.failed[0] == (16, Failure.BISECT)
        assert recorder.failed[-1] == (1, Failure.FAIL)
        assert [rows for rows, _ in recorder.sent] == [16]

    run(main)


@pytest.mark.parametrize(("failures", "wins"), [(2, True), (3, False)])
def test_retries_are_bounded_and_send_the_same_rows(failures: int, wins: bool) -> None:
    batches: list[list[int]] = []

    async def flush(rows: Sequence[int]) -> list[int]:
        batches.append(list(rows))
        if len(batches) <= failures:
            raise Deadlock
        return list(rows)

    async def main() -> None:
        lane: Lane[int, int] = Lane(
            "test",
            flush,
            rows_max=10,
            queue_max=10,
            classify=classify,
            retries_max=2,
            backoff_ms=0.01,
        )
        answers = await asyncio.gather(lane.put(1), lane.put(2), return_exceptions=True)
        assert batches == [[1, 2]] * 3
        if wins:
            assert [*answers] == [1, 2]
        else:
            assert all(isinstance(answer, Deadlock) for answer in answers)

    run(main)


def test_pauses_before_repetitions_double_up_to_their_most_and_are_jittered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread_ms: list[tuple[float, float]] = []

    def longest(least_s: float, most_s: float) -> float:
        spread_ms.append((1000 * least_s, 1000 * most_s))
        return most_s

    monkeypatch.setattr("random.uniform", longest)

    async def main() -> None:
        lane: Lane[int, int] = Lane(
            "test", Echo().flush, rows_max=1, queue_max=1, backoff_ms=2, backoff_ms_max=50
        )
        for retries in (0, 1, 2, 3, 4, 5, 100_000):
            lane._pause_s(retries)

    run(main)
    assert spread_ms == [(0, most_ms) for most_ms in (4, 8, 16, 32, 50, 50, 50)]


def test_a_batch_that_backs_off_is_not_sent_again_before_its_pause_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("random.uniform", lambda _, most_s: most_s)
    batches: list[list[int]] = []

    async def flush(rows: Sequence[int]) -> list[int]:
        batches.append(list(rows))
        raise Deadlock

    async def main() -> None:
        hour_ms = 3_600_000
        lane: Lane[int, int] = Lane(
            "test",
            flush,
            rows_max=1,
            queue_max=1,
            classify=classify,
            backoff_ms=hour_ms,
            backoff_ms_max=hour_ms,
        )
        future = lane.submit(1)
        await turns(8)
        assert batches == [[1]]
        assert lane.in_flight == 1
        assert not future.done()

    run(main)


class Tracer:
    """Tells a test what each flush carried."""

    def __init__(self) -> None:
        self.request: str | None = None
        self.flushes: list[tuple[int, list[object]]] = []

    def carried(self) -> object | None:
        return self.request

    async def flush(
        self, lane: str, rows: int, carried: Sequence[object], sending: Awaitable[T]
    ) -> T:
        self.flushes.append((rows, list(carried)))
        return await sending


def test_each_flush_is_told_with_the_requests_whose_rows_it_carries() -> None:
    async def flush(rows: Sequence[int]) -> list[int]:
        if 1 in rows:
            raise Poisoned
        return list(rows)

    async def main() -> None:
        tracer = Tracer()
        lane: Lane[int, int] = Lane(
            "test",
            flush,
            rows_max=10,
            queue_max=10,
            classify=lambda _: Failure.BISECT,
            tracer=tracer,
        )
        futures = []
        for row, request in enumerate(("a", None, None, "d")):
            tracer.request = request
            futures.append(lane.submit(row))
        futures[3].cancel()  # its row is sent, and so its request's
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert [answers[0], answers[2]] == [0, 2]
        assert isinstance(answers[1], Poisoned)
        assert tracer.flushes == [(4, ["a", "d"]), (2, ["a"]), (1, ["a"]), (1, []), (2, ["d"])]

    run(main)


def test_unknown_failure_fails_every_row_once() -> None:
    calls = 0

    async def flush(rows: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        raise KeyError("unknown")

    async def main() -> None:
        lane: Lane[int, int] = Lane("test", flush, rows_max=10, queue_max=10, classify=classify)
        answers = await asyncio.gather(lane.put(1), lane.put(2), return_exceptions=True)
        assert [type(answer) for answer in answers] == [KeyError, KeyError]
        assert calls == 1

    run(main)


async def _too_few(rows: Sequence[int]) -> list[int]:
    return list(rows)[1:]


async def _cancelled_within(rows: Sequence[int]) -> list[int]:
    raise asyncio.CancelledError


def _broken_policy(error: Exception) -> Failure:
    raise RuntimeError("the policy is broken")


async def _too_many(rows: Sequence[int]) -> Sequence[int]:
    return [0, *rows]


@pytest.mark.parametrize("flush", [_too_few, _too_many, _cancelled_within])
@pytest.mark.parametrize("policy", [classify, _broken_policy])
def test_broken_flush_or_policy_leaves_nobody_waiting(
    flush: Callable[[Sequence[int]], Awaitable[Sequence[int]]],
    policy: Callable[[Exception], Failure],
) -> None:
    async def main() -> None:
        lane: Lane[int, int] = Lane("test", flush, rows_max=10, queue_max=10, classify=policy)
        answers = await asyncio.gather(lane.put(1), lane.put(2), return_exceptions=True)
        assert [type(answer) for answer in answers] == [FlushBroken, FlushBroken]
        await lane.close()

    run(main)


@pytest.mark.parametrize("moment", ["waiting", "in flight"])
@pytest.mark.parametrize("fails", [False, True])
def test_callers_cancellation_loses_no_row_and_makes_no_noise(moment: str, fails: bool) -> None:
    noise: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
        gate = Gate()

        async def flush(rows: Sequence[int]) -> list[int]:
            await gate.flush(rows)
            if fails:
                raise KeyError("unknown")
            return list(rows)

        lane: Lane[int, int] = Lane("test", flush, rows_max=10, queue_max=10)
        blocker = asyncio.create_task(lane.put(0))
        await gate.arrived(1)
        caller = asyncio.create_task(lane.put(1))
        await asyncio.sleep(0)
        shielded = asyncio.ensure_future(asyncio.shield(lane.submit(2)))
        await asyncio.sleep(0)
        if moment == "in flight":
            gate.let_go(0)
            await gate.arrived(2)
        caller.cancel()
        shielded.cancel()
        await asyncio.wait([caller, shielded])
        assert caller.cancelled()
        gate.let_go(0)
        await gate.arrived(2)
        gate.let_go(1)
        await lane.close()
        await asyncio.gather(blocker, return_exceptions=True)
        assert gate.batches == [[0], [1, 2]]
        del caller, shielded, blocker, lane
        gc.collect()
        await asyncio.sleep(0)

    run(main)
    assert noise == []


def test_close_drains_parked_queued_and_retried_rows_and_refuses_new_ones() -> None:
    failed = False

    async def flush(rows: Sequence[int]) -> list[int]:
        nonlocal failed
        await asyncio.sleep(0)
        if not failed:
            failed = True
            raise Deadlock
        return list(rows)

    async def main() -> None:
        lane: Lane[int, int] = Lane(
            "test",
            flush,
            rows_max=2,
            queue_max=20,
            exclusive=lambda row: row % 3,
            classify=classify,
            backoff_ms=0.01,
        )
        futures = [lane.submit(number) for number in range(12)]
        await asyncio.gather(lane.close(), lane.close())
        assert [future.result() for future in futures] == [*range(12)]
        for reserved in (False, True):
            with pytest.raises(LaneClosed):
                lane.submit(99, reserved=reserved)
        await lane.close()

    run(main)


def test_loop_that_ends_cancels_the_callers_instead_of_leaving_them() -> None:
    futures: list[asyncio.Future[int]] = []

    async def main() -> None:
        gate = Gate()
        lane: Lane[int, int] = Lane("test", gate.flush, rows_max=10, queue_max=10)
        futures.append(lane.submit(1))
        await gate.arrived(1)

    run(main)
    assert futures[0].cancelled()


@pytest.mark.parametrize(
    "limits",
    [
        {"rows_max": 0},
        {"queue_max": 0},
        {"in_flight_max": 0},
        {"retries_max": -1},
        {"linger_ms_max": -1},
        {"linger_ms_max": LINGER_MS_CAP + 1},
    ],
)
def test_limit_out_of_its_range_is_refused(limits: dict[str, Any]) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="lane test: "):
            Lane("test", Echo().flush, **{"rows_max": 1, "queue_max": 1, **limits})

    run(main)
