"""Where servers over HTTP listen: `[::]` is every address of both families, as gRPC has it."""

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp.web_runner import BaseRunner

BACKLOG = 128
"""Connections that wait to be accepted."""


async def listen(
    runner: "BaseRunner",
    host: str,
    port: int,
    *,
    backlog: int = BACKLOG,
    reuse_port: bool = False,
) -> None:
    """Listen with a runner that is set up. Raises OSError where the address is taken."""
    from aiohttp import web  # noqa: PLC0415 - the PSP simulator does without

    both = every_address(host, port, backlog=backlog, reuse_port=reuse_port)
    if both is None:
        reuse = reuse_port or None
        await web.TCPSite(runner, host, port, backlog=backlog, reuse_port=reuse).start()
    else:
        await web.SockSite(runner, both, backlog=backlog).start()


def every_address(
    host: str, port: int, *, backlog: int, reuse_port: bool = False
) -> socket.socket | None:
    """A listening socket of both families for the host `::`; None for every other one.

    asyncio alone would listen for IPv6 only, and a pod of two families is probed by its first
    address, which may be of IPv4. Raises OSError where the address is taken.
    """
    if host != "::":
        return None
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6,
        backlog=backlog,
        reuse_port=reuse_port,
        dualstack_ipv6=socket.has_dualstack_ipv6(),
    )
