"""Connections to a host by whichever of its addresses answers (RFC 8305, "Happy Eyeballs").

An address that swallows everything, as of a site that is down or over IPv6 that leads nowhere, must
not stop a host whose other addresses work.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final, TypeVar

from aiohappyeyeballs import start_connection

ADDRESS_DELAY_S: Final = 0.25
"""How long the addresses tried so far are waited for until the next is tried beside them (§5)."""

_P = TypeVar("_P", bound=asyncio.BaseProtocol)


async def reach(make: Callable[[], _P], host: str, port: int) -> _P:
    """The protocol of the first connection that is made. Raises OSError. The caller bounds the
    time.
    """
    loop = asyncio.get_running_loop()
    addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not addresses:
        raise OSError("the host has no address")
    try:
        # The families take turns, the resolver's first one first (§4).
        connected = await start_connection(addresses, happy_eyeballs_delay=ADDRESS_DELAY_S)
    except RuntimeError as error:  # as uvloop may tell it
        raise OSError("the host cannot be reached") from error
    try:
        _, protocol = await loop.create_connection(make, sock=connected)
    except BaseException:
        connected.close()
        raise
    return protocol
