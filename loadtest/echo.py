"""An empty echo: the gateway's own door with nothing behind it.

It is the measure of every ratio of the benchmarks, and what control runs of the load tests send to:
what they find is what the generator and the machine add by themselves.

It is the gateway's gRPC server with its options, on uvloop, with one method that takes bytes and
answers bytes of an authorization's size: no parsing, no log, no metric.
"""

import argparse
import asyncio
import logging
import signal
from pathlib import Path
from typing import Any, Final, cast

import grpc

from gateway.composition import run_loop, server_options
from gateway.rpc.server import GrpcServer
from gateway.rpc.service import PaymentService
from gateway.settings import load_settings
from gateway.telemetry.logs import configure_logging

METHOD: Final = "AuthorizePayment"

_log = logging.getLogger(__name__)


class Echo:
    """What `GrpcServer` needs of a service."""

    def __init__(self, response: bytes) -> None:
        self._response = response
        self.pushback = False
        self.calls_begun = 0

    def method_handlers(self) -> "dict[str, grpc.RpcMethodHandler[bytes, bytes]]":
        """The one method."""
        return {METHOD: grpc.unary_unary_rpc_method_handler(self._answer)}

    async def _answer(self, request: bytes, context: Any) -> bytes:
        del request, context
        return self._response

    async def serve_unknown(self, request: bytes, context: Any) -> bytes:
        """Every other method is refused."""
        del request
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "an echo")
        return b""

    def begin_drain(self) -> None:
        """Nothing is in flight for long."""

    async def wait_idle(self) -> None:
        """Nothing is waited for."""


async def _serve(response: bytes) -> None:
    settings = load_settings()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = GrpcServer(cast("PaymentService", Echo(response)), server_options(settings))
    await server.start()
    _log.info("serving", extra={"address": server.address, "transport": settings.transport})
    await stop.wait()
    await server.drain(0)


def main() -> None:
    """Serve, as the GATEWAY_* variables say."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.echo", description=__doc__)
    parser.add_argument("response", type=Path, help="a file with the answer's bytes")
    options = parser.parse_args()
    configure_logging("INFO")
    run_loop(_serve(options.response.read_bytes()))


if __name__ == "__main__":
    main()
