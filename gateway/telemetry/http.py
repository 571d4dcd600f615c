"""Metrics and health over HTTP, for Prometheus and for probes, on a port of their own.

`/metrics` is Prometheus' text format, or OpenMetrics where that is asked for, which alone can show
exemplars. `/livez` answers 200 for as long as this process answers at
all; `/readyz` 200 where calls are served, 503 where they are not (starting, draining, no database).
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder

from gateway.http_connection import Connection
from gateway.listening import listen
from gateway.settings import split_address
from gateway.telemetry.merging import Encode

SHUTDOWN_S: Final = 1.0
"""How long an answer that is under way at the end is waited for, and then its connection: aiohttp's
60 s, twice, are more than a process has that drains, and whoever asks may read nothing."""

CONNECTIONS_MAX: Final = 128
"""Connections held; one more closes the oldest, so that nobody who opens many shuts out a probe."""

_UNCLEAR_VERSION: Final = re.compile(r"version=(?![0-9]{1,9}(?:\.[0-9]{1,9})*\s*(?:[;,]|\Z))")


class _Server(web.Server):
    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        super().__init__(handler)
        self._held: dict[web.RequestHandler, None] = {}
        """The connections, the oldest first."""

    def __call__(self) -> asyncio.Protocol:  # type: ignore[override]
        return Connection(lambda: None, self, loop=asyncio.get_running_loop(), access_log=None)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._held) >= CONNECTIONS_MAX:
            oldest = next(iter(self._held))
            del self._held[oldest]
            oldest.force_close()
        self._held[handler] = None

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._held.pop(handler, None)


class MetricsServer:
    """Serves `/metrics`, `/livez` and `/readyz`.

    `render` gives the metrics in a format, `ready` whether calls are served and a line for people.
    """

    def __init__(
        self,
        render: Callable[[Encode], Awaitable[bytes]],
        ready: Callable[[], Awaitable[tuple[bool, str]]],
        address: str,
    ) -> None:
        self._render = render
        self._ready = ready
        self._host, self._port = split_address(address)
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """Listen. Raises OSError where the address is taken."""
        self._runner = web.ServerRunner(_Server(self._serve), shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        await listen(self._runner, self._host, self._port)

    @property
    def port(self) -> int:
        """The port, also where a free one was asked for."""
        assert self._runner is not None, "started"
        port: int = self._runner.addresses[0][1]
        return port

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.Response:
        serve = {
            "/metrics": self._serve_metrics,
            "/livez": self._serve_live,
            "/readyz": self._serve_ready,
        }.get(request.path)
        if serve is None:
            return web.Response(status=404)
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers={"Allow": "GET, HEAD"})
        return await serve(request)

    async def _serve_metrics(self, request: web.BaseRequest) -> web.Response:
        encode, content_type = _format(",".join(request.headers.getall("Accept", ())))
        return web.Response(body=await self._render(encode), headers={"Content-Type": content_type})

    async def _serve_live(self, _: web.BaseRequest) -> web.Response:
        return web.Response(text="alive\n")

    async def _serve_ready(self, _: web.BaseRequest) -> web.Response:
        ready, text = await self._ready()
        return web.Response(text=f"{text}\n", status=200 if ready else 503)


def _format(accept: str) -> tuple[Encode, str]:
    """What a scraper asks for, by its Accept header; plain text where that is unclear."""
    if _UNCLEAR_VERSION.search(accept):
        return generate_latest, CONTENT_TYPE_PLAIN_0_0_4
    return choose_encoder(accept)
