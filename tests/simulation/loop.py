"""An event loop in virtual time, whose seeded scheduler takes turns among simulated processes.

Within a process callbacks run in the order in which they were scheduled, as asyncio promises; which
process runs next is drawn. A process that was killed never runs again, wherever it was; one that is
paused finds its work waiting, and its clock ahead, when it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import random
import warnings
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")

STEPS_MAX: Final = 100_000
"""Callbacks of one history; beyond, it does not come to an end."""

EPOCH_S: Final = 1_767_225_600.0
"""The simulated wall clock at the beginning: 2026-01-01, in seconds after 1970."""


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")


class NoEnd(Exception):
    """A history had more steps than it may have, or everything in it waits for ever."""


class Process:
    """What runs together and ends together."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.ready: deque[Handle] = deque()
        self.alive = True
        self.paused = False
        self.steps = 0
        self.strike_at: int | None = None
        """The step before which `strike` is called."""
        self.strike: Callable[[], None] = _nothing
        self.context = contextvars.Context()
        self.context.run(_process.set, self)
        self.tasks: list[asyncio.Task[Any]] = []
        self.at_end: list[Callable[[], object]] = []
        """Called when it is killed: others learn that its connections are closed."""

    def kill(self) -> None:
        """End it at once, wherever it is."""
        self.alive = False
        self.ready.clear()
        for each in self.at_end:
            each()


def _nothing() -> None:
    pass


_process: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


class Handle:
    """A scheduled callback: what asyncio needs of its own handles."""

    __slots__ = ("args", "at", "callback", "context", "off", "process")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
        process: Process,
        at: float,
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = process
        self.at = at
        self.off = False

    def cancel(self) -> None:
        """Do not run it."""
        self.off = True

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.off

    def when(self) -> float:
        """When it is due."""
        return self.at


class SimulatedLoop:
    """The loop of one history: all that is asked of asyncio's here, and nothing more."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.steps = 0
        self.trace = 0
        """A checksum over every step: which process, when."""
        self.unexpected: list[str] = []
        """What asyncio was told of exceptions that nobody looked at."""
        self._random = random.Random(f"schedule/{seed}")
        self._processes: list[Process] = []
        self._timers: list[tuple[float, int, Handle]] = []
        self._timer_count = 0
        self._over = False
        self.root = self.spawn("world")

    def spawn(self, name: str) -> Process:
        """A new process."""
        process = Process(len(self._processes), name)
        self._processes.append(process)
        return process

    # --- what asyncio calls -----------------------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._over

    def is_closed(self) -> bool:
        return self._over

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=_as_loop(self))

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        if self._over:
            # Asked for by what is being closed: it never begins.
            coro.close()
            return cast("asyncio.Task[Any]", self.create_future())
        task = asyncio.Task(coro, loop=_as_loop(self), name=name or "task", context=context)
        _process.get(self.root).tasks.append(task)
        return task

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        if context is None:
            context = contextvars.copy_context()
        process = context.get(_process, self.root)
        handle = Handle(callback, args, context, process, self.now_s)
        if process.alive and not self._over:
            process.ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        if context is None:
            context = contextvars.copy_context()
        process = context.get(_process, self.root)
        handle = Handle(callback, args, context, process, when)
        if process.alive and not self._over:
            self._timer_count += 1
            heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Handle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._over:
            self.unexpected.append(f"{context.get('message')}: {context.get('exception')!r}")

    # --- running ----------------------------------------------------------------------------------

    def start(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as a task of a process."""
        task = asyncio.Task(
            coroutine, loop=_as_loop(self), name=process.name, context=process.context.copy()
        )
        process.tasks.append(task)
        return task

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run until the coroutine has ended. Raises NoEnd, and what it raises."""
        asyncio._set_running_loop(_as_loop(self))
        try:
            task = self.start(self.root, coroutine)
            while not task.done():
                self._step()
            task.result()
        finally:
            self._end()
            asyncio._set_running_loop(None)

    def _step(self) -> None:
        runnable = [each for each in self._processes if each.ready and not each.paused]
        if not runnable:
            self._advance()
            return
        process = runnable[0]
        if len(runnable) > 1:
            process = runnable[int(self._random.random() * len(runnable))]
        if process.strike_at is not None and process.steps >= process.strike_at:
            process.strike_at = None
            process.strike()
            return
        handle = process.ready.popleft()
        if handle.off:
            return
        process.steps += 1
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise NoEnd(f"{STEPS_MAX} steps, and no end")
        self.trace = zlib.crc32(b"%d %.6f" % (process.number, self.now_s), self.trace)
        handle.context.run(handle.callback, *handle.args)

    def _advance(self) -> None:
        """Go on to the next timer, and to all that are due with it."""
        timers = self._timers
        while timers and (timers[0][2].off or not timers[0][2].process.alive):
            heapq.heappop(timers)
        if not timers:
            raise NoEnd("everything waits for ever")
        self.now_s = max(self.now_s, timers[0][0])
        while timers and timers[0][0] <= self.now_s:
            handle = heapq.heappop(timers)[2]
            if not handle.off and handle.process.alive:
                handle.process.ready.append(handle)

    def _end(self) -> None:
        """Let nothing that is left, of the living and the dead, do anything more."""
        self._over = True
        with warnings.catch_warnings():
            # What never began is never awaited.
            warnings.simplefilter("ignore", RuntimeWarning)
            for process in self._processes:
                process.alive = False
                process.ready.clear()
                for task in process.tasks:
                    if not task.done():
                        task._log_destroy_pending = False  # type: ignore[attr-defined]
                        with contextlib.suppress(BaseException):
                            coroutine: Any = task.get_coro()
                            coroutine.close()
                process.tasks.clear()
            self._timers.clear()
            self._processes.clear()


def _as_loop(loop: SimulatedLoop) -> asyncio.AbstractEventLoop:
    return cast("asyncio.AbstractEventLoop", loop)


@contextlib.contextmanager
def collected_by_hand() -> Iterator[None]:
    """Let cycles be collected between histories only, not at moments that no seed determines."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            while gc.collect():  # what ends may leave something behind
                pass
        if was_on:
            gc.enable()
