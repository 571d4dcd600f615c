"""How a server's threads share memory."""

import contextlib
import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8
"""Which parameter is meant, in glibc's malloc.h; mallopt(3)."""
_HEAPS_MAX: Final = 1


def share_one_heap() -> None:
    """Let all threads take memory from one heap, where the C library is glibc.

    Before any other thread starts: heaps that there are stay in use. By default up to eight for
    each core come into being, and what one thread frees helps only the threads of that heap. The
    transports' threads take calls as they come, so that in time every heap grows to what the calls
    of the worst moment took (docs/reliability.md).
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS_MAX)
