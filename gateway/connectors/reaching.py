"""Connections to a host by whichever of its addresses answers (RFC 8305, "Happy Eyeballs").

An address that swallows everything, as of a site that is down or over IPv6 that leads nowhere, must
not stop a host whose other addresses work.
"""

import asyncio
import socket
from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Final, TypeVar

ADDRESS_DELAY_S: Final = 0.25
"""How long the addresses tried so far are waited for until the next is tried beside them (§5)."""

_P = TypeVar("_P", bound=asyncio.BaseProtocol)


async def reach(make: Callable[[], _P], host: str, port: int) -> _P:
    """The protocol of the first connection that is made; `make` may be called for others, which are
    closed. Raises OSError. The caller bounds the time.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families: dict[int, list[tuple[str, int]]] = {}
    for family, *_, address in found:
        families.setdefault(family, []).append((str(address[0]), int(address[1])))
    # The families take turns, the resolver's first one first (§4).
    in_turns = filter(None, chain.from_iterable(zip_longest(*families.values())))
    left = list(dict.fromkeys(in_turns))
    failure = OSError("the host has no address")
    trying: set[asyncio.Task[tuple[asyncio.Transport, _P]]] = set()
    try:
        while left or trying:
            if left:
                trying.add(loop.create_task(loop.create_connection(make, *left.pop(0))))
            done, _ = await asyncio.wait(
                trying,
                timeout=ADDRESS_DELAY_S if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                trying.discard(task)
                try:
                    return task.result()[1]
                except OSError as error:
                    failure = error
    finally:
        for task in trying:
            task.cancel()
            task.add_done_callback(_close)
    raise failure


def _close(task: "asyncio.Task[tuple[asyncio.Transport, _P]]") -> None:
    """Close the connection of a task, should it have one."""
    if not task.cancelled() and task.exception() is None:
        task.result()[0].abort()
