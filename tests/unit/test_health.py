"""What watchers of the health are told, at moments that a connection meets by chance."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from gateway.rpc.system import Health

if TYPE_CHECKING:
    from collections.abc import Callable

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING


class Aborted(Exception):
    """As grpc.aio ends a handler."""


class Watching:
    """The context of a call, in which something happens while the first message is written."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.told: list[int] = []
        self._meanwhile = meanwhile

    async def write(self, data: bytes) -> None:
        if not self.told:
            self._meanwhile()
        self.told.append(HealthCheckResponse.FromString(data).status)

    async def abort(self, *_: object) -> None:
        raise Aborted


async def test_a_watcher_is_told_what_changed_while_it_was_written_to_before_the_end() -> None:
    health = Health([])

    def drain() -> None:
        health.set_serving(False)
        health.close()

    watching = Watching(drain)
    watch = cast("Any", health.method_handlers()["Watch"]).unary_stream
    with pytest.raises(Aborted):
        await watch(b"", watching)
    assert watching.told == [SERVING, NOT_SERVING]


async def test_a_watcher_that_has_gone_is_not_logged_as_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def reset() -> None:
        raise RuntimeError("the call is reset")

    watch = cast("Any", Health([]).method_handlers()["Watch"]).unary_stream
    with pytest.raises(asyncio.CancelledError):
        await watch(b"", Watching(reset))
    assert not caplog.records
