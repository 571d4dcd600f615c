"""API keys: their form, what a stored one says, and the principal that a presented one proves.

A key is `gwk_<live|test>_<32 hex of its id>_<64 hex of its secret>`. Its id finds the record; its
secret is 256 random bits, so that one SHA-256 keeps it as safe as a slow hash would. The whole key
is shown once; only the hash is stored.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from gateway.domain.ids import new_key_id
from gateway.domain.model import Mode

KEY_CHARACTERS_MAX: Final = 128
"""A presented key longer than this is none."""

_SECRET_BYTES: Final = 32
_KEY = re.compile(r"gwk_(live|test)_([0-9a-f]{32})_([0-9a-f]{64})")


class Scope(StrEnum):
    """What a key may be used for; none includes another."""

    PAYMENTS_WRITE = "payments:write"
    """AuthorizePayment, CapturePayment, VoidPayment, RefundPayment, IncrementAuthorization."""
    PAYMENTS_READ = "payments:read"
    """GetPayment, ListPayments, GetOperation."""
    PAYMENTS_ADMIN = "payments:admin"
    """All of AdminService: settling doubts, discrepancies, the audit."""
    ROUTING_READ = "routing:read"
    """RoutingService's reads: rules, their versions, explanations, connectors."""
    ROUTING_WRITE = "routing:write"
    """Putting routing rules and putting them into force."""
    EVENTS_READ = "events:read"
    """All of EventService: the merchants' events, and consumers' positions."""
    EVENTS_READ_ALL = "events:read_all"
    """Besides EVENTS_READ: the events of every merchant there is, for the operator's own."""
    ADMIN = "admin"
    """Reserved for the administration of accounts; opens no method."""


class RateLimit(NamedTuple):
    """How often money calls of a merchant may begin, over all gateways together."""

    per_s: float
    """Calls and items a second, in the long run."""
    burst: int
    """So many may come at once."""


@dataclass(frozen=True, slots=True)
class MerchantInfo:
    """What a call has to know of a merchant."""

    merchant_id: str
    pan_exempt_order_id: bool = False
    """The merchant's order ids may look like card numbers; they are then masked in logs."""
    rate_limit: RateLimit | None = None
    """None: as often as the gateway can."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A stored API key, with the merchants that it reaches at the time of reading."""

    key_id: str
    secret_hash: bytes
    """SHA-256 of the secret's hex characters in ASCII."""
    organisation_id: str
    scopes: frozenset[str]
    mode: Mode
    expires_at: datetime | None
    """With a time zone; None: never."""
    revoked_at: datetime | None
    merchants: Mapping[str, MerchantInfo]
    """Merchant id to merchant: one, several, or all of the organisation."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls."""

    key_id: str
    """The API key's id, `sub:` and the subject of a token, or the identity in a certificate."""
    organisation_id: str
    scopes: frozenset[str]
    mode: Mode
    merchants: Mapping[str, MerchantInfo]


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key taken apart."""

    key_id: str
    mode: Mode
    secret_hash: bytes


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. `text` is shown once and stored nowhere."""

    text: str
    key_id: str
    secret_hash: bytes


def hash_secret(secret: str) -> bytes:
    """The stored form of a key's secret: its SHA-256, 32 bytes."""
    return hashlib.sha256(secret.encode("ascii")).digest()


def new_key(mode: Mode) -> NewKey:
    """A new random key of a mode."""
    key_id = new_key_id()
    secret = secrets.token_hex(_SECRET_BYTES)
    text = f"gwk_{mode.name.lower()}_{key_id.removeprefix('key_')}_{secret}"
    return NewKey(text, key_id, hash_secret(secret))


def parse_key(text: str) -> PresentedKey | None:
    """The parts of a presented key, or None where it has not a key's form."""
    if len(text) > KEY_CHARACTERS_MAX:
        return None
    match = _KEY.fullmatch(text)
    if match is None:
        return None
    return PresentedKey(f"key_{match[2]}", Mode[match[1].upper()], hash_secret(match[3]))
