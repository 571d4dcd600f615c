"""Metrics over HTTP, for Prometheus, on a port of their own."""

from aiohttp import web

from gateway.settings import split_address
from gateway.telemetry.metrics import CONTENT_TYPE, Metrics


class MetricsServer:
    """Serves `/metrics`."""

    def __init__(self, metrics: Metrics, address: str) -> None:
        self._metrics = metrics
        self._host, self._port = split_address(address)
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. Raises OSError where the address is taken."""
        app = web.Application()
        app.router.add_get("/metrics", self._serve)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

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

    async def _serve(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})
