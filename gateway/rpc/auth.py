"""Who calls: credentials to principals, with a cache so that this costs no round trip.

A credential is an API key or a signed access token, both as `Bearer` in the metadata, or else the
identity in the caller's certificate. It is proven in one place, `_prove`, and remembered in one
cache: a remembered token costs no signature.

A revoked key, a scope or merchant taken away is effective within `life_s` at the latest, whatever
the database does: an entry past its life, which begins with its read, is never used. (A call that
finds a read under way takes its answer.) From half of its life on an entry is read anew in the
background, so that a busy key never waits for the database, and a database that is away for less
than half a life is not noticed. A token is used no longer than it says.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, Protocol, TypeVar

from gateway.application.accounts import KeyRecord, MerchantInfo, Principal, Scope, parse_key
from gateway.application.ports import StoreUnavailable
from gateway.domain.errors import GatewayError, Reason, Violation, refuse
from gateway.rpc.peers import PeerIdentity
from gateway.rpc.tokens import TokenClaims

_BEARER: Final = "bearer "
_KEY_PREFIX: Final = "gwk_"
_SUBJECT_PREFIX: Final = "sub:"
"""Before a token's subject, so that none can pass for a key's id."""

_V = TypeVar("_V")

Presented = str | PeerIdentity
"""What a caller shows: the value of `authorization`, or what its connection proved."""
_Digest = bytes | PeerIdentity
"""What it is remembered by: a secret by its SHA-256 only, an identity, which is none, by itself."""

LoadKey = Callable[[str], Awaitable[KeyRecord | None]]
LoadMerchants = Callable[[str, Sequence[str] | None], Awaitable[Mapping[str, MerchantInfo]]]
LoadIdentity = Callable[[str], Awaitable[Principal | None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuthLimits:
    """The bounds of the cache of keys; times in seconds."""

    life_s: float = 30.0
    """How long a read key is used: the longest time that a revocation takes to be effective."""
    negative_life_s: float = 5.0
    """How long a key that was refused is refused without being read again."""
    entries_max: int = 10_000
    """How many keys are remembered, and as many refused ones."""
    loads_max: int = 64
    """How many keys are read from the database at once, and as many more of those that were good
    before; beyond it calls are refused."""


class Tokens(Protocol):
    """What verifies access tokens: `gateway.rpc.tokens.TokenVerifier`."""

    async def verify(self, token: str) -> TokenClaims | None:
        """What a token says; None where it is not valid. May raise GatewayError."""


@dataclass(slots=True)
class _Entry:
    principal: Principal
    expires_at: datetime | None
    refresh_at: float
    dead_at: float


class Authenticator:
    """Turns credentials into principals.

    `load_key(key_id)` reads a key's record, None where there is none, and
    `load_merchants(organisation_id, merchant_ids)` those of the named merchants that the
    organisation has, or all of its, and `load_identity(uri)` the principal of a SPIFFE ID; each may
    raise StoreUnavailable. Without `tokens`, none are accepted. A key or token is remembered by its
    SHA-256, never itself.
    """

    def __init__(
        self,
        load_key: LoadKey,
        limits: AuthLimits,
        *,
        tokens: Tokens | None = None,
        load_merchants: LoadMerchants | None = None,
        load_identity: LoadIdentity | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load_key = load_key
        self._limits = limits
        self._tokens = tokens
        self._load_merchants = load_merchants
        self._load_identity = load_identity
        self._clock = clock
        self._entries: dict[_Digest, _Entry] = {}
        self._refused: dict[_Digest, float] = {}
        self._loads: dict[_Digest, asyncio.Task[Principal]] = {}
        self._known_loads = 0
        """Of these, those of credentials that were good before."""

    def remembered(self, presented: Presented | None) -> Principal | None:
        """The principal of a credential that is remembered, without waiting; else None."""
        if presented is None:
            return None
        digest = _digest_of(presented)
        entry = self._entries.get(digest)
        if entry is None:
            return None
        now = self._clock()
        if now >= entry.dead_at or _is_past(entry.expires_at):
            return None  # it stays, as one that was good before
        if now >= entry.refresh_at and digest not in self._loads:
            if self._may_load(digest):
                self._start_load(digest, presented)
            entry.refresh_at = now + self._limits.life_s / 10
        return entry.principal

    async def authenticate(self, presented: Presented | None) -> Principal:
        """The principal of `Bearer <API key or token>`, or of a certificate's identity.

        Raises GatewayError: CREDENTIAL_MISSING, CREDENTIAL_INVALID, STORE_UNAVAILABLE,
        SIGNING_KEYS_UNAVAILABLE, and OVERLOADED where too many credentials are being read.
        """
        principal = self.remembered(presented)
        if principal is not None:
            return principal
        if not presented:
            raise GatewayError(Reason.CREDENTIAL_MISSING, "The call carries no credential.")
        digest = _digest_of(presented)
        refused_until = self._refused.get(digest)
        if refused_until is not None:
            if self._clock() < refused_until:
                raise _invalid()
            del self._refused[digest]
        load = self._loads.get(digest)
        if load is None:
            if not self._may_load(digest):
                raise GatewayError(Reason.OVERLOADED, "Too many credentials are being read.")
            load = self._start_load(digest, presented)
        # The load is for everyone who waits for it: one caller's cancellation does not end it.
        return await asyncio.shield(load)

    def _may_load(self, digest: _Digest) -> bool:
        # Anybody can make up keys: those that were good before do not wait for their places.
        known = self._known_loads
        loads = known if digest in self._entries else len(self._loads) - known
        return loads < self._limits.loads_max

    def _start_load(self, digest: _Digest, presented: Presented) -> "asyncio.Task[Principal]":
        load = asyncio.get_running_loop().create_task(self._load(digest, presented))
        is_known = digest in self._entries
        self._loads[digest] = load
        self._known_loads += is_known
        load.add_done_callback(lambda _: self._end_load(digest, load, is_known=is_known))
        return load

    def _end_load(
        self, digest: _Digest, load: "asyncio.Task[Principal]", *, is_known: bool
    ) -> None:
        del self._loads[digest]
        self._known_loads -= is_known
        if load.cancelled():
            return
        error = load.exception()
        # A reading in the background has nobody to tell.
        if error is not None and not isinstance(error, GatewayError):
            _log.error("a credential could not be read", exc_info=error)

    async def _load(self, digest: _Digest, presented: Presented) -> Principal:
        # Before the read: what it finds may have changed by the time that it answers.
        begun_at = self._clock()
        try:
            proven = await self._prove(presented)
        except StoreUnavailable as error:
            raise GatewayError(
                Reason.STORE_UNAVAILABLE, "The credential could not be read: the store is away."
            ) from error
        if proven is None or _is_past(proven[1]):
            self._entries.pop(digest, None)
            _make_room(self._refused, self._limits.entries_max)
            self._refused[digest] = self._clock() + self._limits.negative_life_s
            raise _invalid()
        principal, expires_at = proven
        if digest not in self._entries:
            _make_room(self._entries, self._limits.entries_max)
        self._entries[digest] = _Entry(
            principal,
            expires_at,
            refresh_at=begun_at + self._limits.life_s / 2,
            dead_at=begun_at + self._limits.life_s,
        )
        return principal

    async def _prove(self, presented: Presented) -> tuple[Principal, datetime | None] | None:
        """The principal of a credential and when it expires; None where it is not valid."""
        if isinstance(presented, PeerIdentity):
            return await self._prove_identity(presented)
        if presented[: len(_BEARER)].lower() != _BEARER:
            return None
        text = presented[len(_BEARER) :].strip()
        if self._tokens is None or text.startswith(_KEY_PREFIX):
            return await self._prove_key(text)
        return await self._prove_token(self._tokens, text)

    async def _prove_key(self, text: str) -> tuple[Principal, datetime | None] | None:
        presented = parse_key(text)
        if presented is None:
            return None
        record = await self._load_key(presented.key_id)
        if (
            record is None
            or not hmac.compare_digest(record.secret_hash, presented.secret_hash)
            or record.mode is not presented.mode
            or record.revoked_at is not None
        ):
            return None
        principal = Principal(
            key_id=record.key_id,
            organisation_id=record.organisation_id,
            scopes=record.scopes,
            mode=record.mode,
            merchants=record.merchants,
        )
        return principal, record.expires_at

    async def _prove_identity(
        self, identity: PeerIdentity
    ) -> tuple[Principal, datetime | None] | None:
        if self._load_identity is None:
            return None
        principal = await self._load_identity(identity.uri)
        # Its certificate was valid when it connected; docs/security.md says how long that lasts.
        return None if principal is None else (principal, None)

    async def _prove_token(
        self, tokens: Tokens, text: str
    ) -> tuple[Principal, datetime | None] | None:
        claims = await tokens.verify(text)
        if claims is None or self._load_merchants is None:
            return None
        merchants = await self._load_merchants(claims.organisation_id, claims.merchant_ids)
        principal = Principal(
            key_id=_SUBJECT_PREFIX + claims.subject,
            organisation_id=claims.organisation_id,
            scopes=claims.scopes,
            mode=claims.mode,
            merchants=merchants,
        )
        return principal, claims.expires_at


def _digest_of(presented: Presented) -> _Digest:
    if isinstance(presented, PeerIdentity):
        return presented
    if presented[: len(_BEARER)].lower() == _BEARER:
        # However it is spelled: one key in ten thousand ways would push out all others.
        presented = _BEARER + presented[len(_BEARER) :].strip()
    return sha256(presented.encode()).digest()


def _make_room(entries: dict[_Digest, _V], most: int) -> None:
    # The oldest goes first: a key in use comes back by one read.
    while len(entries) >= most:
        del entries[next(iter(entries))]


def _is_past(at: datetime | None) -> bool:
    return at is not None and datetime.now(UTC) >= at


def _invalid() -> GatewayError:
    # One text for unknown, wrong, expired and revoked: whoever tries keys learns nothing.
    return GatewayError(Reason.CREDENTIAL_INVALID, "The credential is not valid.")


def require_scope(principal: Principal, scope: Scope) -> None:
    """Raises GatewayError(SCOPE_MISSING) where the credential does not have the scope."""
    if scope not in principal.scopes:
        raise GatewayError(
            Reason.SCOPE_MISSING,
            f"The credential does not have the scope {scope.value}.",
            metadata={"scope": scope.value},
        )


def find_merchant(principal: Principal, merchant_id: str) -> MerchantInfo | None:
    """The merchant that a request is for; None where `resolve_merchant` raises."""
    merchants = principal.merchants
    if not merchant_id and len(merchants) == 1:
        return next(iter(merchants.values()))
    return merchants.get(merchant_id)


def resolve_merchant(principal: Principal, merchant_id: str) -> MerchantInfo:
    """The merchant that a request is for; `merchant_id` is empty where the request names none.

    Raises GatewayError: MERCHANT_NOT_FOUND for one outside the principal's set, whether or not it
    exists, MERCHANT_REQUIRED where none is named and the principal has not exactly one.
    """
    merchant = find_merchant(principal, merchant_id)
    if merchant is not None:
        return merchant
    if merchant_id:
        raise GatewayError(
            Reason.MERCHANT_NOT_FOUND, "The credential reaches no merchant of this id."
        )
    raise refuse(
        Reason.MERCHANT_REQUIRED,
        "The request has to name its merchant: the credential reaches not exactly one.",
        violation=Violation("merchant_id", "is needed with this credential"),
    )
