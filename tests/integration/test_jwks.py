"""The token issuer's key set over HTTP and from a file: bounded in time, size and place."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from gateway.jwks import JWKS_BYTES_MAX, JwksUnusable, fetch_jwks, read_jwks_file
from tests.tokens import JwksEndpoint, ec_key, jwks_endpoint, key_set

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TIMEOUT_S = 30.0
"""Of a reading that is to answer."""
BODY = key_set(ec_key("ec-1"))


@pytest.fixture
async def endpoint() -> AsyncIterator[JwksEndpoint]:
    async with jwks_endpoint(BODY) as running:
        yield running


async def test_the_key_set_is_read_as_it_is_served(endpoint: JwksEndpoint) -> None:
    assert await fetch_jwks(endpoint.url, TIMEOUT_S) == BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(endpoint: JwksEndpoint, status: int) -> None:
    async with jwks_endpoint(BODY) as other:
        endpoint.serve(b"", status, Location=other.url)
        with pytest.raises(JwksUnusable):
            await fetch_jwks(endpoint.url, TIMEOUT_S)
        assert other.requests == 0


@pytest.mark.parametrize("status", [204, 304, 401, 404, 429, 500, 503])
async def test_anything_but_200_is_no_key_set(endpoint: JwksEndpoint, status: int) -> None:
    endpoint.serve(BODY if status > 400 else b"", status)
    with pytest.raises(JwksUnusable):
        await fetch_jwks(endpoint.url, TIMEOUT_S)


async def test_a_huge_answer_is_read_no_further_than_the_limit(endpoint: JwksEndpoint) -> None:
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:  # until the reader goes
            await response.write(b" " * 65_536)
            sent += 65_536

    endpoint.answer = answer
    with pytest.raises(JwksUnusable):
        await fetch_jwks(endpoint.url, TIMEOUT_S)
    endpoint.serve(b" " * JWKS_BYTES_MAX)
    assert len(await fetch_jwks(endpoint.url, TIMEOUT_S)) == JWKS_BYTES_MAX


async def test_a_compressed_answer_is_not_expanded(endpoint: JwksEndpoint) -> None:
    bomb = gzip.compress(b" " * (100 * JWKS_BYTES_MAX))
    endpoint.serve(bomb, 200, **{"Content-Encoding": "gzip"})
    assert await fetch_jwks(endpoint.url, TIMEOUT_S) == bomb


async def test_an_issuer_that_does_not_answer_ends_with_the_time_out(
    endpoint: JwksEndpoint,
) -> None:
    endpoint.hang()
    with pytest.raises(TimeoutError):
        await fetch_jwks(endpoint.url, 0.05)


async def test_an_issuer_that_answers_by_drops_ends_with_the_time_out(
    endpoint: JwksEndpoint,
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")

    endpoint.answer = answer
    with pytest.raises((TimeoutError, JwksUnusable)):
        await fetch_jwks(endpoint.url, 0.2)


async def test_an_issuer_that_is_down_is_an_error_and_no_key_set() -> None:
    async with jwks_endpoint(BODY) as gone:
        url = gone.url
    with pytest.raises(aiohttp.ClientError):
        await fetch_jwks(url, TIMEOUT_S)


async def test_a_file_is_read_anew_each_time_and_within_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    with pytest.raises(FileNotFoundError):
        await read_jwks_file(path)
    for body in (BODY, key_set(ec_key("ec-2"))):
        path.write_bytes(body)
        assert await read_jwks_file(path) == body
    path.write_bytes(b" " * (JWKS_BYTES_MAX + 1))
    with pytest.raises(JwksUnusable):
        await read_jwks_file(path)
