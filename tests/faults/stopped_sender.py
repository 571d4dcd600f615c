"""A gateway that stops itself between its last look at the clock and the write to the PSP's socket.

SIGSTOP strikes at the first request of a kind, after `send_before` was compared: the worst moment
there is, since no check of the sender's own is left.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from gateway.cli import main
from gateway.connectors import http

if TYPE_CHECKING:
    import asyncio


def stop_once_before(request_line: bytes) -> None:
    """Arrange that the process stops itself before it writes such a request for the first time."""
    write = http._Connection.write
    stopped: list[bytes] = []

    def stopping(
        connection: http._Connection, request: bytes
    ) -> asyncio.Future[http.Response] | None:
        if request.startswith(request_line) and not stopped:
            stopped.append(request)
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(connection, request)

    http._Connection.write = stopping  # type: ignore[method-assign, assignment]


def serve(kind: str) -> None:
    """`gateway serve`, which stops itself before it sends its first operation of the kind."""
    stop_once_before(f"POST /v1/operations/{kind} ".encode())
    main(["serve"])
