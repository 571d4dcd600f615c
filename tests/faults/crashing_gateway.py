"""Gateways that kill themselves at a chosen wait."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.application.usecases import Payments
from gateway.composition import run_server
from gateway.settings import load_settings
from tests.faults import stepping
from tests.harness import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.nursery import Nursery

CALLS: Final = "calls"
"""The scope of what a caller waits for: the call itself, the work detached from it, its batches."""
RECOVERY: Final = "recovery"
"""The scope of recovery: its loop, each operation that it took, its batches."""
NOTHING: Final = ""

_CALLS: Final = ("authorize", "capture", "void", "refund", "increment")
_FLOWS: Final = {
    CALLS: frozenset({"_tell"}),
    RECOVERY: frozenset({"Recovery.run", "Recovery._search_forever", "Recovery._settle"}),
    NOTHING: frozenset[str](),
}
_LANES: Final = {
    # Not those of Redis: what a claim may have done is done, or not, when its waiter goes on, and
    # nobody waits for a settlement.
    CALLS: frozenset({"intents", "follow_ups", "changes", "reads"}),
    RECOVERY: frozenset({"direct", "changes", "reads"}),
    NOTHING: frozenset[str](),
}


class CrashingGateway(GatewayProcess):
    """A gateway that writes down the sites of `scope` that it comes by in the file `visits`, and
    kills itself at the site `kill_at`.
    """

    def __init__(
        self,
        nursery: Nursery,
        environment: Mapping[str, str],
        visits: Path,
        scope: str = NOTHING,
        kill_at: str = "",
    ) -> None:
        arguments = (str(visits), scope, kill_at)
        super().__init__(nursery.fork(f"{__name__}:serve", arguments, environment))
        self._visits = visits

    async def died(self, timeout_s: float) -> bool:
        """Wait until it has ended by itself; whether it was by SIGKILL. False where it goes on."""
        try:
            status = await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return status == -signal.SIGKILL

    def visits(self) -> list[str]:
        """The sites that it came by until now, in order."""
        return self._visits.read_text().splitlines() if self._visits.exists() else []


def serve(visits: str, scope: str, kill_at: str) -> None:
    """`gateway serve`, stepped."""
    visit = stepping.Visitor(Path(visits), kill_at)
    if scope == CALLS:
        for name in _CALLS:
            stepping.step_method(Payments, name, visit)

    def prepare(loop: asyncio.AbstractEventLoop) -> None:
        stepping.install(loop, visit, flows=_FLOWS[scope], lanes=_LANES[scope])

    run_server(load_settings(), prepare)
