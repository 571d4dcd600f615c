"""The network: every message between processes and servers takes its time, and may not arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import asyncio
    import random
    from collections.abc import Callable

    from tests.simulation.loop import Process, SimulatedLoop

T = TypeVar("T")

LATENCY_S: Final = (0.0002, 0.02)
SLOW_S: Final = (0.2, 2.5)
"""Of a message that is held up: mostly longer than the sender waits for its answer."""


@dataclass(slots=True)
class Weather:
    """How likely it is that something becomes of a message, other than usual."""

    lost: float = 0.0
    """The connection breaks before it arrives."""
    refused: float = 0.0
    """No connection can be made."""
    answer_lost: float = 0.0
    """It arrives, and the connection breaks before the answer does."""
    late: float = 0.0
    """The connection breaks, and it arrives all the same, later."""
    slow: float = 0.0
    """It is held up on its way, or its answer is."""


CLEAR: Final = Weather()


class Network:
    """All connections of a history."""

    def __init__(self, loop: SimulatedLoop, draw: random.Random, servers: Process) -> None:
        self._loop = loop
        self._draw = draw
        self._servers = servers
        self.weather: dict[str, Weather] = {}
        """By the name of the server."""
        self._cut: dict[tuple[int, str], str] = {}
        """Ways that are cut, and how: `reset`, or `hole`, where nothing arrives."""

    def cut(self, process: Process, server: str, how: str | None) -> None:
        """Cut the way of a process to a server; None mends it."""
        if how is None:
            self._cut.pop((process.number, server), None)
        else:
            self._cut[process.number, server] = how

    def mend(self) -> None:
        """Let everything arrive, from now on."""
        self._cut.clear()
        self.weather.clear()

    def latency_s(self) -> float:
        """How long a message takes."""
        low_s, high_s = LATENCY_S
        drawn: float = self._draw.random()
        return low_s + (high_s - low_s) * drawn * drawn

    def fate(self, process: Process, server: str) -> tuple[str, float, float]:
        """What becomes of a request: how it ends, and how long both ways take, in seconds."""
        there_s, back_s = self.latency_s(), self.latency_s()
        cut = self._cut.get((process.number, server))
        if cut is not None:
            return ("lost" if cut == "reset" else "hole"), there_s, back_s
        weather = self.weather.get(server)
        if weather is None:
            return "good", there_s, back_s
        drawn = self._draw.random()
        for fate in ("lost", "refused", "answer_lost", "late", "slow"):
            drawn -= getattr(weather, fate)
            if drawn < 0:
                break
        else:
            return "good", there_s, back_s
        if fate == "slow":
            if self._draw.random() < 0.5:
                there_s += self._draw.uniform(*SLOW_S)
            else:
                back_s += self._draw.uniform(*SLOW_S)
            fate = "good"
        if fate == "late":
            back_s += self._draw.uniform(*SLOW_S)
        return fate, there_s, back_s

    async def call(self, process: Process, server: str, action: Callable[[], T]) -> T:
        """What `action` returns or raises at the server.

        Raises ConnectionResetError; waits for ever where the way is a hole.
        """
        loop = self._loop
        fate, there_s, back_s = self.fate(process, server)
        told: asyncio.Future[T] = loop.create_future()
        servers = self._servers.context
        here = process.context

        def reply(value: Any, error: BaseException | None) -> None:
            if told.done():
                return
            if error is not None:
                told.set_exception(error)
            else:
                told.set_result(value)

        def arrive() -> None:
            value: Any = None
            failed: BaseException | None = None
            try:
                value = action()
            except Exception as error:  # noqa: BLE001 - it is the caller's
                failed = error
            if fate == "answer_lost":
                value, failed = None, ConnectionResetError("reset after it arrived")
            if fate != "late":
                loop.call_later(back_s, reply, value, failed, context=here)

        if fate == "hole":
            return await told
        if fate not in ("lost", "refused"):
            loop.call_later(there_s + (back_s if fate == "late" else 0), arrive, context=servers)
        if fate in ("lost", "refused", "late"):
            reset = ConnectionResetError("reset")
            loop.call_later(there_s, reply, None, reset, context=here)
        return await told
