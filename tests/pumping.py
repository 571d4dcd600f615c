"""What a way between a client and a server is made of."""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes until there is no more, and end the other side then."""
    try:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
    finally:
        writer.close()
