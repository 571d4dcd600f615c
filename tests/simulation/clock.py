"""The sources of time, of random numbers and of ids that the application reads, made a seed's."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import random
import time
from typing import TYPE_CHECKING, Any, Final

from gateway.application import outcomes
from gateway.connectors.simulator import ledger
from gateway.domain import ids
from tests.simulation.database import REPLACED
from tests.simulation.loop import EPOCH_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.loop import SimulatedLoop

ACTION_LIFE_S: Final = 4.0
"""For how long a customer can use the PSP's page."""


class _Id:
    __slots__ = ("hex",)

    def __init__(self, number: int) -> None:
        self.hex = f"{number:032x}"


@contextlib.contextmanager
def simulated_sources(loop: SimulatedLoop, seed: int) -> Iterator[None]:
    """While the context lasts, monotonic and wall clock are the loop's, the rest the seed's."""
    numbers = itertools.count(1)
    nonces = random.Random(f"nonces/{seed}")

    class SimulatedDatetime(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return dt.datetime.fromtimestamp(EPOCH_S + loop.now_s, tz)

    replaced: list[tuple[Any, str, Any]] = [
        (time, "monotonic", lambda: loop.now_s),
        (time, "perf_counter", lambda: loop.now_s),
        (time, "time", lambda: EPOCH_S + loop.now_s),
        (os, "urandom", nonces.randbytes),
        (ids, "uuid7", lambda: _Id(next(numbers))),
        (outcomes, "datetime", SimulatedDatetime),
        (ledger, "ACTION_LIFE_S", ACTION_LIFE_S),
        *REPLACED,
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in replaced]
    state = random.getstate()
    try:
        for where, name, value in replaced:
            setattr(where, name, value)
        random.seed(seed)
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
        random.setstate(state)
