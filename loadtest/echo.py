"""The server of control runs: an empty grpc.aio echo on uvloop, in a process of its own.

What the generator measures against it is what the generator and the machine add by themselves. It
answers every unary call with the bytes of one real answer: `python -m loadtest.echo FILE`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import grpc
import uvloop

STREAMS_MAX = 100_000
"""Concurrent calls on one connection: the control must not queue where the gateway would not."""


async def serve(reply: bytes) -> None:
    """Serve until SIGTERM; prints one line of JSON with the address first."""

    async def answer(_request: bytes, _context: object) -> bytes:
        return reply

    class Echo(grpc.GenericRpcHandler):
        def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server(options=(("grpc.max_concurrent_streams", STREAMS_MAX),))
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    sys.stdout.write(json.dumps({"address": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()
    await stopped.wait()
    await server.stop(None)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]).read_bytes()))
