"""A token issuer for tests: keys, a JWK Set, tokens right and wrong, and its endpoint."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

from tests.http_server import http_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

ISSUER = "https://issuer.example/"
AUDIENCE = "payment-gateway"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key of the issuer's."""

    kid: str
    algorithm: str
    private: Any

    @property
    def jwk(self) -> dict[str, Any]:
        """Its public half, as the key set has it."""
        implementation = get_default_algorithms()[self.algorithm]
        public: dict[str, Any] = implementation.to_jwk(self.private.public_key(), as_dict=True)
        public.pop("key_ops", None)
        return {**public, "kid": self.kid, "alg": self.algorithm, "use": "sig"}


def rsa_key(kid: str, bits: int = 2048, algorithm: str = "RS256") -> SigningKey:
    return SigningKey(kid, algorithm, rsa.generate_private_key(65537, bits))


def ec_key(kid: str, algorithm: str = "ES256") -> SigningKey:
    curves: dict[str, ec.EllipticCurve] = {
        "ES256": ec.SECP256R1(),
        "ES384": ec.SECP384R1(),
        "ES512": ec.SECP521R1(),
    }
    return SigningKey(kid, algorithm, ec.generate_private_key(curves[algorithm]))


def ed_key(kid: str) -> SigningKey:
    return SigningKey(kid, "EdDSA", ed25519.Ed25519PrivateKey.generate())


def key_set(*keys: SigningKey) -> bytes:
    return json.dumps({"keys": [each.jwk for each in keys]}).encode()


def claims(**changes: object) -> dict[str, Any]:
    """The claims of a right token; those that are None are left out."""
    now = int(time.time())
    values: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "shop-backend",
        "iat": now,
        "nbf": now,
        "exp": now + 600,
        "scope": "payments:read payments:write",
        "organisation_id": "org_1",
        "mode": "test",
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def token(key: SigningKey, headers: dict[str, Any] | None = None, **changes: object) -> str:
    """A token signed with a key; a header that is None is left out."""
    header = {"kid": key.kid, **(headers or {})}
    return jwt.encode(
        claims(**changes),
        key.private,
        algorithm=key.algorithm,
        headers=header,
    )


def part(value: object) -> str:
    """A part of a token that the library would not make."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@dataclass
class JwksEndpoint:
    """The address of a key set, which `answer` serves."""

    url: str
    requests: int = 0
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = field(init=False)

    def serve(self, body: bytes, status: int = 200, **headers: str) -> None:
        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.Response(body=body, status=status, headers=headers)

        self.answer = answer

    def hang(self) -> None:
        """Take requests and never answer them."""

        async def answer(_request: web.Request) -> web.StreamResponse:
            await asyncio.Event().wait()
            raise AssertionError

        self.answer = answer


@asynccontextmanager
async def jwks_endpoint(body: bytes = b"") -> AsyncIterator[JwksEndpoint]:
    async def handle(request: web.Request) -> web.StreamResponse:
        endpoint.requests += 1
        return await endpoint.answer(request)

    async with http_server(handle) as url:
        endpoint = JwksEndpoint(f"{url}/jwks.json")
        endpoint.serve(body)
        yield endpoint
