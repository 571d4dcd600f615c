"""What connectors find out by themselves, as an answer that comes too late, until it is stored."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from gateway.application.notifications import Received
from gateway.application.ports import StoreUnavailable
from gateway.domain.errors import GatewayError

BATCH_MAX: Final = 100
"""How many are stored at once."""
PAUSE_S: Final = 1.0
"""Between two tries where they cannot be stored."""

FLUSH_S_MAX: Final = 2.0
"""How long `flush` takes at most: the end of the gateway waits for it."""

_log = logging.getLogger(__name__)


class Telling:
    """Keeps what it is told as PSPs' notifications are kept.

    It waits in memory, so that a process that dies before the commit loses it. That is no worse
    than an answer that never came: what is in doubt is settled by recovery.
    """

    def __init__(
        self, keep: Callable[[Sequence[Received]], Awaitable[int]], waiting_max: int
    ) -> None:
        """`keep` raises as `gateway.application.notifications.NotificationStore.keep`."""
        self._keep = keep
        self._waiting: asyncio.Queue[Received] = asyncio.Queue(waiting_max)
        self._taken: list[Received] = []
        """What `run` is storing, or tries to."""

    def tell(self, received: Received) -> None:
        """Keep it soon; it is dropped, with a warning, where too much waits."""
        try:
            self._waiting.put_nowait(received)
        except asyncio.QueueFull:
            _log.warning(
                "what a connector told is dropped, since too much waits to be stored",
                extra={
                    "merchant_id": received.merchant_id,
                    "connector": received.notification.connector,
                    "connector_account_id": received.connector_account_id,
                },
            )

    async def run(self) -> None:
        """Store until cancelled."""
        while True:
            self._taken = [await self._waiting.get(), *self._more()]
            await self._store(self._taken)
            self._taken = []

    async def flush(self) -> None:
        """Store what waits yet, once `run` was cancelled, as far as that can be done now."""
        with suppress(GatewayError, StoreUnavailable, TimeoutError):
            async with asyncio.timeout(FLUSH_S_MAX):
                while batch := self._taken or self._more():
                    await self._keep(batch)
                    self._taken = []

    def _more(self) -> list[Received]:
        batch: list[Received] = []
        with suppress(asyncio.QueueEmpty):
            while len(batch) < BATCH_MAX:
                batch.append(self._waiting.get_nowait())
        return batch

    async def _store(self, batch: Sequence[Received]) -> None:
        while True:
            try:
                await self._keep(batch)
            except (GatewayError, StoreUnavailable) as error:
                _log.warning("what connectors told cannot be stored yet: %s", error)
                await asyncio.sleep(PAUSE_S)
            except Exception:  # noqa: BLE001 - without this loop nothing told is stored any more
                if len(batch) == 1:
                    _log.exception("what a connector told could not be stored")
                    await asyncio.sleep(PAUSE_S)
                    self.tell(batch[0])  # behind the others: whatever it is, it holds up none
                    return
                for each in batch:
                    await self._store([each])
                return
            else:
                return
