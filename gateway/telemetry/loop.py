"""How late the event loop is: the one measure that shows what everything on it waits for."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

SAMPLE_S: Final = 0.25
"""How often it is looked at. uvloop's timers count milliseconds: less than one is no lag."""


async def sample_lag(lagged: Callable[[float], None], sample_s: float = SAMPLE_S) -> None:
    """Tell `lagged`, until cancelled, how much later than due the loop woke this task, in s."""
    while True:
        due = time.monotonic() + sample_s
        await asyncio.sleep(sample_s)
        lagged(max(0.0, time.monotonic() - due))
