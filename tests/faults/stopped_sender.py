"""A gateway that stops itself between its last look at the clock and the write to the PSP's socket.

Run as a script: `stopped_sender.py KIND`. SIGSTOP strikes at the first request of the kind, after
`send_before` was compared: the worst moment there is, since no check of the sender's own is left.
"""

from __future__ import annotations

import os
import signal
import sys
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


if __name__ == "__main__":
    stop_once_before(f"POST /v1/operations/{sys.argv[1]} ".encode())
    main(["serve"])
