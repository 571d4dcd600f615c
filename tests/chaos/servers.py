"""The servers of the campaign by what a scenario needs of them, each kind started once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Self

from tests.chaos.clients import LoopThread
from tests.chaos.shims import open_shims, shimmed_postgres, shimmed_redis
from tests.chaos.trial import Servers
from tests.nursery import Nursery
from tests.servers import postgres_server, redis_server
from tests.standby import replicated_postgres

if TYPE_CHECKING:
    from types import TracebackType

STANDBY: Final = "standby"
"""PostgreSQL has a synchronous standby."""
SHIMS: Final = "shims"
"""Clocks and disks of PostgreSQL, Redis and gateways can be turned; needs a C compiler."""


class Supply:
    """Starts servers at their first use; all end with the context."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._servers: dict[str, Servers] = {}

    def __enter__(self) -> Self:
        self._loop = self._stack.enter_context(LoopThread())
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(error_type, error, traceback)

    def servers(self, needs: str) -> Servers:
        """The servers of a kind. Raises NotPossible, EmbeddedServerError."""
        if needs not in self._servers:
            self._servers[needs] = self._start(needs)
        return self._servers[needs]

    def _start(self, needs: str) -> Servers:
        enter = self._stack.enter_context
        if needs == SHIMS:
            shims = enter(open_shims())
            return Servers(
                enter(shimmed_postgres(shims)),
                enter(shimmed_redis(shims)),
                self._loop,
                enter(Nursery.open(shims.preload)),
                shims,
            )
        if needs == STANDBY:
            postgres = enter(replicated_postgres())
            usual = self.servers("")
            return Servers(postgres, usual.redis, self._loop, usual.nursery)
        return Servers(
            enter(postgres_server()), enter(redis_server()), self._loop, enter(Nursery.open())
        )
