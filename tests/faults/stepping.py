"""Steps coroutines by hand, so that a test sees every place where they wait, from outside.

Nothing in the stepped code knows of it. A *site* is a place, the chain of functions that wait for
one another, and a moment: `before` (what is waited for was begun, and the wait begins) or `after`
(the answer is there, and nobody has seen it yet).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator
    from types import CodeType, CoroutineType, FrameType

T = TypeVar("T")

BEFORE: Final = "before"
AFTER: Final = "after"

_ROOT: Final = Path(__file__).resolve().parents[2]
_OURS: Final = (f"{_ROOT / 'gateway'}{os.sep}", f"{_ROOT / 'storage'}{os.sep}")


class Stepped(Generic[T]):
    """An awaitable that runs a coroutine step by step and calls `visit(site)` at each wait."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], visit: Callable[[str], None]) -> None:
        self._coroutine = coroutine
        self._visit = visit

    def __await__(self) -> Generator[Any, Any, T]:
        coroutine = self._coroutine
        step = functools.partial(coroutine.send, None)
        while True:
            try:
                awaited = step()
            except StopIteration as stop:
                result: T = stop.value
                return result
            place = place_of(coroutine)
            self._visit(f"{place}:{BEFORE}")
            try:
                answer = yield awaited
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's to handle
                step = functools.partial(coroutine.throw, error)
            else:
                step = functools.partial(coroutine.send, answer)
            self._visit(f"{place}:{AFTER}")


async def stepped(coroutine: Coroutine[Any, Any, T], visit: Callable[[str], None]) -> T:
    """Run a coroutine step by step."""
    return await Stepped(coroutine, visit)


def place_of(coroutine: object) -> str:
    """Where a coroutine waits: `qualname:line` of our functions, `qualname` of the libraries'.

    The outermost comes first.
    """
    return " > ".join(
        f"{code.co_qualname}:{frame.f_lineno}"
        if code.co_filename.startswith(_OURS)
        else code.co_qualname
        for code, frame in _chain(coroutine)
    )


def _chain(awaitable: object) -> Iterator[tuple[CodeType, FrameType]]:
    """The frames of what waits for what. Futures and extension types end the chain."""
    while awaitable is not None:
        if inspect.iscoroutine(awaitable):
            code, frame, awaitable = awaitable.cr_code, awaitable.cr_frame, awaitable.cr_await
        elif inspect.isgenerator(awaitable):
            code, frame, awaitable = awaitable.gi_code, awaitable.gi_frame, awaitable.gi_yieldfrom
        else:
            return
        if frame is not None:
            yield code, frame


def install(
    loop: asyncio.AbstractEventLoop,
    visit: Callable[[str], None],
    *,
    flows: frozenset[str],
    lanes: frozenset[str],
) -> None:
    """Step every task of `loop` whose coroutine has one of the qualified names `flows`, and every
    batch that leaves one of these lanes: whoever began its task, it may carry a flow's rows.
    """

    class Task(asyncio.Task[T]):
        """Also what our code makes past the loop's factory."""

        def __init__(
            self, coroutine: Generator[Any, None, T] | Coroutine[Any, Any, T], **options: Any
        ) -> None:
            # Extension modules have coroutines of their own, which hide what they await.
            if inspect.iscoroutine(coroutine) and (
                coroutine.__qualname__ in flows or _lane(coroutine) in lanes
            ):
                coroutine = stepped(coroutine, visit)
            super().__init__(coroutine, **options)

    asyncio.Task = Task  # type: ignore[assignment, misc]
    loop.set_task_factory(lambda loop, coroutine, **options: Task(coroutine, loop=loop, **options))


def _lane(coroutine: CoroutineType[Any, Any, Any]) -> str:
    """The lane's name, where the coroutine is about to send a lane's batch; else nothing."""
    if coroutine.__qualname__ != "Lane._send" or coroutine.cr_frame is None:
        return ""
    name: str = coroutine.cr_frame.f_locals["self"].name
    return name


def step_method(owner: type, name: str, visit: Callable[[str], None]) -> None:
    """Step every call of a coroutine method; for calls below a task that hides what it awaits."""
    method = getattr(owner, name)

    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await stepped(method(*args, **kwargs), visit)

    setattr(owner, name, call)


class Visitor:
    """Writes every visit to a file, one a line, and kills the process at one of them."""

    def __init__(self, path: Path, kill_at: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._kill_at = kill_at
        self._visits: Counter[str] = Counter()

    def __call__(self, site: str) -> None:
        """The nth visit of a site, n > 1, has `#n` behind its name."""
        self._visits[site] += 1
        count = self._visits[site]
        name = site if count == 1 else f"{site}#{count}"
        os.write(self._fd, f"{name}\n".encode())
        if name == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
