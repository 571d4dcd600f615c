"""Reading anew, in the background, what is held in memory."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from gateway.application.ports import StoreUnavailable

_log = logging.getLogger(__name__)


async def refresh_forever(
    what: str, refresh: Callable[[], Awaitable[None]], interval_s: float
) -> None:
    """Refresh again and again, until cancelled; what is known holds while the store is away."""
    while True:
        await asyncio.sleep(interval_s * random.uniform(0.8, 1.2))
        try:
            await refresh()
        except StoreUnavailable as error:
            _log.warning("%s could not be read: %s", what, error)
