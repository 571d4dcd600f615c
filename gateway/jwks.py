"""Where the token issuer's keys come from: an HTTPS address, or a file."""

import asyncio
from pathlib import Path
from typing import Final

import aiohttp

JWKS_BYTES_MAX: Final = 256 * 1024
"""The largest key set that is read."""


class JwksUnusable(Exception):
    """The key set could not be had as it must be."""


async def fetch_jwks(url: str, timeout_s: float) -> bytes:
    """The key set at an address, within `timeout_s` in all.

    Redirects are not followed: whoever can make the issuer redirect must not choose our keys.
    Raises JwksUnusable, aiohttp's and OSError's errors, or TimeoutError.
    """
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            # Nothing that expands: the limit below is on what comes over the wire.
            headers={"accept": "application/json", "accept-encoding": "identity"},
            auto_decompress=False,
        ) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise JwksUnusable(f"status {response.status}")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > JWKS_BYTES_MAX:
                raise JwksUnusable("too large")
        return bytes(body)


async def read_jwks_file(path: Path) -> bytes:
    """The key set in a file. Raises JwksUnusable or OSError."""

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(JWKS_BYTES_MAX + 1)

    text = await asyncio.to_thread(read)
    if len(text) > JWKS_BYTES_MAX:
        raise JwksUnusable("too large")
    return text


async def read_jwks(url: str, file: str, timeout_s: float) -> bytes:
    """The key set in the file where one is named, else at the address.

    Raises as those two do.
    """
    if file:
        return await read_jwks_file(Path(file))
    return await fetch_jwks(url, timeout_s)
