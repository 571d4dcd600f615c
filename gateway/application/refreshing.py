"""Work in the background: reading anew what is held in memory, and telling what has ended."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from gateway.application.ports import StoreUnavailable

_log = logging.getLogger(__name__)


async def refresh_forever(
    what: str, refresh: Callable[[], Awaitable[None]], interval_s: float
) -> None:
    """Refresh again and again, until cancelled; what is known holds while the store is away.

    What has changed is known within `interval_s`: a person who stops something waits for so long.
    """
    while True:
        # Not all gateways at once; and reading takes its time, too.
        await asyncio.sleep(interval_s * random.uniform(0.75, 0.95))
        try:
            await refresh()
        except StoreUnavailable as error:
            _log.warning("%s could not be read: %s", what, error)
        except Exception:  # noqa: BLE001 - what is known must not become old for ever, in silence
            _log.exception("%s could not be read", what)


def in_background(name: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """Begin work that never ends by itself. Where it does, that is told: nobody awaits it."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_tell_end)
    return task


def _tell_end(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        _log.error(
            "work in the background has ended: %s", task.get_name(), exc_info=task.exception()
        )
