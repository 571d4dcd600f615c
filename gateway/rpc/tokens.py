"""Access tokens (JWT, RFC 7519 and RFC 8725) of one issuer: whom a signed token speaks for.

Only what the settings pin is accepted: the issuer, the audience, asymmetric algorithms, and keys of
the issuer's own key set (JWKS, RFC 7517). Nothing in a token says where a key comes from: `kid` is
compared with the names of keys that were read, and `jku`, `x5u`, `x5c` and `jwk` are not looked at.
"""

import asyncio
import base64
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, TypeGuard

import jwt
from jwt.algorithms import AllowedPublicKeys, get_default_algorithms

from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode

TOKEN_CHARACTERS_MAX: Final = 8192
"""A longer token is not looked at."""
KEYS_MAX: Final = 100
"""The most keys of a key set that are used."""
SCOPES_MAX: Final = 50
"""A token with more scopes is refused."""
MERCHANTS_MAX: Final = 1000
"""A token that names more merchants is refused."""
NAME_CHARACTERS_MAX: Final = 256
"""The longest `kid`, `sub`, organisation, merchant or scope."""

ALGORITHMS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        **{f"{kind}{bits}": ("RSA", "") for kind in ("RS", "PS") for bits in (256, 384, 512)},
        "ES256": ("EC", "P-256"),
        "ES384": ("EC", "P-384"),
        "ES512": ("EC", "P-521"),
        "EdDSA": ("OKP", "Ed25519"),
    }
)
"""What may be pinned, with the type and the curve that a key must have (RFC 7518, RFC 8037)."""

_TYPES: Final = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
"""The `typ` of access tokens (RFC 9068, section 2.1) and of issuers that set none or the general
one; a token made for another use is none (RFC 8725, section 3.11)."""
_REQUIRED: Final = ("exp", "nbf", "iat", "iss", "aud", "sub")
_HEADER_CHARACTERS_MAX: Final = 2048

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say. Times are in seconds."""

    issuer: str
    """`iss`, compared character by character."""
    audience: str
    """Must be in `aud`."""
    algorithms: frozenset[str] = frozenset({"RS256", "ES256"})
    """Of `ALGORITHMS`."""
    leeway_s: float = 30.0
    """How far the issuer's clock may differ from ours."""
    life_s_max: float = 86_400.0
    """The longest time from `iat` to `exp`: a token cannot be revoked."""
    organisation_claim: str = "organisation_id"
    merchants_claim: str = "merchant_ids"
    mode_claim: str = "mode"


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a verified token says."""

    subject: str
    organisation_id: str
    merchant_ids: tuple[str, ...] | None
    """None: all merchants of the organisation."""
    scopes: frozenset[str]
    mode: Mode
    expires_at: datetime
    """With the leeway."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """When the issuer's keys are read; times in seconds."""

    life_s: float = 300.0
    """Older keys are read anew, behind the calls that use them."""
    pause_s: float = 10.0
    """At least so long between two readings, whatever tokens come."""
    stale_s_max: float = 86_400.0
    """Keys that could not be read anew for so long are used no more."""
    waiters_max: int = 32
    """Tokens that may wait for a reading at once; further ones are refused."""


@dataclass(slots=True)
class _KeySet:
    keys: dict[tuple[str, str], AllowedPublicKeys] = field(default_factory=dict)
    """By `kid` and algorithm: a key verifies with its own algorithms only."""
    read_at: float = -math.inf


_LIVES_TRUSTED: Final = 2
"""After so many of their lives keys are read before they are used; before, beside that."""


class SigningKeys:
    """The issuer's public keys, read anew when they age or a token names one that is not known.

    `read` returns a JWK Set's bytes and may raise anything. A reading that fails, or brings no
    usable key, leaves the keys as they are.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        algorithms: Collection[str],
        limits: KeyLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._algorithms = frozenset(algorithms)
        self._limits = limits
        self._clock = clock
        self._set = _KeySet()
        self._begun_at = -math.inf
        self._failed = False
        self._reading: asyncio.Task[None] | None = None
        self._waiters = 0

    async def find(self, kid: str, algorithm: str) -> AllowedPublicKeys | None:
        """The key of this name for this algorithm, None where the issuer has none.

        Raises GatewayError: SIGNING_KEYS_UNAVAILABLE where that cannot be told, OVERLOADED where
        too many tokens wait for the keys.
        """
        lives_s = (self._clock() - self._set.read_at) / self._limits.life_s
        reading = self.refresh() if lives_s >= 1 else None
        if reading is not None and lives_s >= _LIVES_TRUSTED and not self._failed:
            # Nobody has asked for long, and the issuer is there for all that is known: what it has
            # withdrawn meanwhile is not to be believed once more.
            await self._wait(reading)
        if (key := self._known(kid, algorithm)) is not None:
            return key
        reading = self.refresh()
        if reading is not None:
            await self._wait(reading)
            if (key := self._known(kid, algorithm)) is not None:
                return key
        if self._failed or not self._usable():
            raise GatewayError(
                Reason.SIGNING_KEYS_UNAVAILABLE,
                "The keys that tokens are signed with could not be read.",
            )
        return None

    async def _wait(self, reading: "asyncio.Task[None]") -> None:
        if self._waiters >= self._limits.waiters_max:
            raise GatewayError(Reason.OVERLOADED, "Too many tokens wait for their keys.")
        self._waiters += 1
        try:
            await asyncio.wait((reading,))
        finally:
            self._waiters -= 1

    def refresh(self) -> "asyncio.Task[None] | None":
        """Begin a reading unless the last one began just now; the one under way, if any."""
        now = self._clock()
        if self._reading is None and now >= self._begun_at + self._limits.pause_s:
            self._begun_at = now
            self._reading = asyncio.get_running_loop().create_task(self._renew(now))
        return self._reading

    async def close(self) -> None:
        """End a reading under way."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))

    def _usable(self) -> bool:
        return self._clock() < self._set.read_at + self._limits.stale_s_max

    def _known(self, kid: str, algorithm: str) -> AllowedPublicKeys | None:
        return self._set.keys.get((kid, algorithm)) if self._usable() else None

    async def _renew(self, begun_at: float) -> None:
        try:
            keys = read_key_set(await self._read(), self._algorithms)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old keys stay
            self._failed = True
            # The text may quote what was read, and this is no place for it.
            _log.warning("the token issuer's keys could not be read: %s", type(error).__name__)
        else:
            self._failed = False
            self._set = _KeySet(keys, begun_at)
        finally:
            self._reading = None


def read_key_set(
    text: bytes, algorithms: Collection[str]
) -> dict[tuple[str, str], AllowedPublicKeys]:
    """The usable keys of a JWK Set by `kid` and algorithm.

    Left out are keys without a name, for encryption, symmetric, private, of another type than the
    algorithms need, or (RSA) too short. Raises ValueError where none is left.
    """
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no JWK Set")  # noqa: TRY004 - of what was read, not of an argument
    found: dict[tuple[str, str], AllowedPublicKeys] = {}
    for entry in entries[:KEYS_MAX]:
        if not isinstance(entry, dict) or not _is_name(entry.get("kid")) or "d" in entry:
            continue
        if entry.get("use", "sig") != "sig" or not _may_verify(entry):
            continue
        for algorithm in algorithms:
            kind, curve = ALGORITHMS[algorithm]
            if entry.get("kty") != kind or (curve and entry.get("crv") != curve):
                continue
            if entry.get("alg", algorithm) != algorithm:
                continue
            key = _public_key(entry, algorithm)
            if key is not None:
                found.setdefault((entry["kid"], algorithm), key)
    if not found:
        raise ValueError("no usable key")
    return found


def _may_verify(entry: dict[str, Any]) -> bool:
    operations = entry.get("key_ops", ["verify"])
    return isinstance(operations, list) and "verify" in operations


def _public_key(entry: dict[str, Any], algorithm: str) -> AllowedPublicKeys | None:
    implementation = get_default_algorithms()[algorithm]
    try:
        key: AllowedPublicKeys = implementation.from_jwk(entry)
        too_short = implementation.check_key_length(key)
    except Exception as error:  # noqa: BLE001 - one damaged key spoils no other
        _log.warning("a key of the token issuer cannot be used: %s", type(error).__name__)
        return None
    if too_short:
        _log.warning("a key of the token issuer is too short")
        return None
    return key


class TokenVerifier:
    """Verifies access tokens."""

    def __init__(self, keys: SigningKeys, rules: TokenRules) -> None:
        self._keys = keys
        self._rules = rules

    async def verify(self, token: str) -> TokenClaims | None:
        """What a token says; None where it is not valid.

        Raises GatewayError as `SigningKeys.find` does.
        """
        named = self._header(token)
        if named is None:
            return None
        kid, algorithm = named
        key = await self._keys.find(kid, algorithm)
        if key is None:
            return None
        rules = self._rules
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=rules.audience,
                issuer=rules.issuer,
                leeway=rules.leeway_s,
                options={"require": [*_REQUIRED], "enforce_minimum_key_length": True},
            )
            return self._claims(claims)
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            return None

    def _header(self, token: str) -> tuple[str, str] | None:
        """`kid` and `alg` of a token that may be one of ours; nothing of it is proven yet."""
        if len(token) > TOKEN_CHARACTERS_MAX or token.count(".") != 2:
            return None
        header = _decode_header(token.partition(".")[0])
        # crit and b64 change how the rest is read (RFC 7515, section 4.1.11; RFC 7797).
        if header is None or "crit" in header or "b64" in header:
            return None
        kid, algorithm, type_ = header.get("kid"), header.get("alg"), header.get("typ", "")
        if not isinstance(type_, str) or type_.lower() not in _TYPES:
            return None
        if not isinstance(algorithm, str) or algorithm not in self._rules.algorithms:
            return None
        return (kid, algorithm) if _is_name(kid) else None

    def _claims(self, claims: Mapping[str, Any]) -> TokenClaims | None:
        rules = self._rules
        issued_at, expires_at = _seconds(claims["iat"]), _seconds(claims["exp"])
        if not 0 < expires_at - issued_at <= rules.life_s_max:
            return None
        scopes = _names(claims.get("scope", ""), SCOPES_MAX)
        merchant_ids = claims.get(rules.merchants_claim)
        named = None if merchant_ids is None else _names(merchant_ids, MERCHANTS_MAX)
        mode = claims.get(rules.mode_claim)
        subject, organisation_id = claims["sub"], claims.get(rules.organisation_claim)
        if not _is_name(subject) or not _is_name(organisation_id):
            return None
        # No default: a token that does not say so moves no real money.
        if mode not in ("live", "test"):
            return None
        return TokenClaims(
            subject=subject,
            organisation_id=organisation_id,
            merchant_ids=named,
            scopes=frozenset(scopes),
            mode=Mode[mode.upper()],
            expires_at=datetime.fromtimestamp(expires_at + rules.leeway_s, UTC),
        )


def _decode_header(segment: str) -> dict[str, Any] | None:
    if len(segment) > _HEADER_CHARACTERS_MAX:
        return None
    try:
        header = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _seconds(value: object) -> float:
    """A NumericDate (RFC 7519, section 2); raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no NumericDate")
    return value


def _names(value: object, count_max: int) -> tuple[str, ...]:
    """A list of names, or names in one string between spaces (RFC 8693, section 4.2)."""
    names = value.split() if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > count_max or not all(map(_is_name, names)):
        raise ValueError("no list of names")
    return tuple(names)


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= NAME_CHARACTERS_MAX and value.isprintable()
