"""Receives of grpc.aio that are cancelled are finished first: each would lose 98 bytes for good.

grpc.aio frees what a batch of operations took (96 bytes for a receive) once it has been waited
for. A call that is reset before its message came has its task cancelled in that wait, so that a
client which only opens and resets streams takes memory that nobody gives back (grpc/grpc#43360,
not mended in 1.85.1). Core ends the receive of such a call at once: so the wait goes on, and the
task is cancelled after it.
"""

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Final

from grpc._cython import cygrpc  # type: ignore[attr-defined]

_WAIT_S_MAX: Final = 1.0
"""How long a cancelled receive is waited for: nothing ends that of a call which only we gave up."""
_CALLS_TASK: Final = "HandleExceptions["
"""How the names begin of the tasks that grpc.aio cancels when their calls are."""


class _Receipt:
    """What a task waits for instead of a future: cancelling it only sets an end to the wait."""

    __slots__ = ("_asyncio_future_blocking", "_end", "_future", "add_done_callback", "get_loop")

    def __init__(self, future: asyncio.Future[None]) -> None:
        # The protocol of what tasks wait for.
        self._asyncio_future_blocking = True
        self.add_done_callback = future.add_done_callback
        self.get_loop = future.get_loop
        self._future = future
        self._end: asyncio.TimerHandle | None = None

    def cancel(self, msg: object = None) -> bool:
        """Not yet, it says: the task is cancelled when the wait is over."""
        del msg
        if self._end is None:
            self._end = self.get_loop().call_later(_WAIT_S_MAX, self._future.cancel)
        return False

    def forget_end(self) -> None:
        """The wait is over."""
        if self._end is not None:
            self._end.cancel()


class _Receive:
    """A receive that its task's cancellation does not interrupt."""

    __slots__ = ("_batch",)

    def __init__(self, batch: Coroutine[Any, Any, None]) -> None:
        self._batch = batch

    def __await__(self) -> Generator[Any, None, None]:
        steps = self._batch.__await__()
        cancelled: asyncio.CancelledError | None = None
        try:
            while True:
                receipt = _Receipt(next(steps))
                try:
                    yield receipt
                except asyncio.CancelledError as error:
                    cancelled = error
                    receipt.forget_end()
        except Exception as end:
            if cancelled is not None:
                raise cancelled from None
            if not isinstance(end, StopIteration):
                raise
        finally:
            cancelled = None  # or its traceback and this frame would keep each other


class _ExecuteBatch:
    """grpc.aio's `execute_batch`, which finishes the receives of servers' calls."""

    __slots__ = ("_original",)

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(self, call: Any, operations: tuple[Any, ...], loop: Any) -> Any:
        batch = self._original(call, operations, loop)
        if type(operations[0]) is not cygrpc.ReceiveMessageOperation:
            return batch
        task = asyncio.current_task()
        if task is None or not task.get_name().startswith(_CALLS_TASK):
            return batch
        return _Receive(batch)


def finish_cancelled_receives() -> None:
    """Let grpc.aio's servers of this process do so, where they are made as those that lose memory.

    Safe to repeat.
    """
    original = getattr(cygrpc, "execute_batch", None)
    if original is not None and not isinstance(original, _ExecuteBatch):
        cygrpc.execute_batch = _ExecuteBatch(original)
