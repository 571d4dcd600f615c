"""Organisations, merchants, API keys and certificates' identities in PostgreSQL."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from gateway.application.accounts import (
    KeyRecord,
    MerchantInfo,
    NewKey,
    Principal,
    RateLimit,
    new_key,
)
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_merchant_id, new_organisation_id
from gateway.domain.model import Mode
from storage.postgres.direct import DirectStore
from storage.postgres.queries import query

_CREATE_ORGANISATION = query("accounts", "create_organisation")
_LIST_ORGANISATIONS = query("accounts", "list_organisations")
_CREATE_MERCHANT = query("accounts", "create_merchant")
_LIMIT_MERCHANT = query("accounts", "limit_merchant")
_FIND_MERCHANT = query("accounts", "find_merchant")
_FIND_ORGANISATION = query("accounts", "find_organisation")
_LIST_MERCHANTS = query("accounts", "list_merchants")
_CREATE_KEY = query("accounts", "create_key")
_LIST_KEYS = query("accounts", "list_keys")
_REVOKE_KEY = query("accounts", "revoke_key")
_LOAD_KEY = query("accounts", "load_key")
_ADD_IDENTITY = query("accounts", "add_identity")
_LIST_IDENTITIES = query("accounts", "list_identities")
_REMOVE_IDENTITY = query("accounts", "remove_identity")
_LOAD_IDENTITY = query("accounts", "load_identity")
_LOAD_MERCHANTS = query("accounts", "load_merchants")


@dataclass(frozen=True, slots=True)
class OrganisationRow:
    """A stored organisation."""

    organisation_id: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class MerchantRow:
    """A stored merchant."""

    merchant_id: str
    organisation_id: str
    name: str
    pan_exempt_order_id: bool
    created_at: datetime
    rate_limit: RateLimit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRow:
    """What every stored credential says of its principal."""

    organisation_id: str
    name: str
    scopes: frozenset[str]
    merchant_ids: tuple[str, ...] | None
    """None: all merchants of the organisation."""
    mode: Mode
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow(CredentialRow):
    """A stored API key, without its hash."""

    key_id: str
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRow(CredentialRow):
    """A stored identity of a certificate."""

    uri: str


class Accounts(DirectStore):
    """Who may call."""

    NAME = "accounts"

    async def create_organisation(self, name: str) -> str:
        """The new organisation's id."""
        organisation_id = new_organisation_id()
        await self._lane.fetch(_CREATE_ORGANISATION, organisation_id=organisation_id, name=name)
        return organisation_id

    async def list_organisations(self) -> Sequence[OrganisationRow]:
        """All of them, the oldest first."""
        return [OrganisationRow(*record) for record in await self._lane.fetch(_LIST_ORGANISATIONS)]

    async def create_merchant(
        self, organisation_id: str, name: str, *, pan_exempt_order_id: bool = False
    ) -> str:
        """The new merchant's id. Raises GatewayError(INVALID_REQUEST) without the organisation."""
        merchant_id = new_merchant_id()
        if not await self._lane.fetch(
            _CREATE_MERCHANT,
            merchant_id=merchant_id,
            organisation_id=organisation_id,
            name=name,
            pan_exempt_order_id=pan_exempt_order_id,
        ):
            raise GatewayError(
                Reason.INVALID_REQUEST, f"There is no organisation {organisation_id}."
            )
        return merchant_id

    async def list_merchants(self, organisation_id: str | None = None) -> Sequence[MerchantRow]:
        """Those of an organisation, or all; the oldest first."""
        return [
            MerchantRow(
                merchant_id=record["merchant_id"],
                organisation_id=record["organisation_id"],
                name=record["name"],
                pan_exempt_order_id=record["pan_exempt_order_id"],
                created_at=record["created_at"],
                rate_limit=_limit(record["rate_limit_per_s"], record["rate_limit_burst"]),
            )
            for record in await self._lane.fetch(_LIST_MERCHANTS, organisation_id=organisation_id)
        ]

    async def require_organisation(self, organisation_id: str) -> None:
        """Raises GatewayError(INVALID_REQUEST) where there is no such organisation."""
        if not await self._lane.fetch(_FIND_ORGANISATION, organisation_id=organisation_id):
            raise GatewayError(
                Reason.INVALID_REQUEST, f"There is no organisation {organisation_id}."
            )

    async def require_merchant(self, merchant_id: str) -> None:
        """Raises GatewayError(INVALID_REQUEST) where there is no such merchant."""
        if not await self._lane.fetch(_FIND_MERCHANT, merchant_id=merchant_id):
            raise GatewayError(Reason.INVALID_REQUEST, f"There is no merchant {merchant_id}.")

    async def limit_merchant(self, merchant_id: str, rate_limit: RateLimit | None) -> None:
        """Limit how often a merchant's money calls may begin, or (None) no longer.

        Gateways know it once their cache of credentials has aged. Raises
        GatewayError(INVALID_REQUEST) without the merchant, or for a limit that is none.
        """
        per_s, burst = (None, None) if rate_limit is None else rate_limit
        if not await self._lane.fetch(
            _LIMIT_MERCHANT, merchant_id=merchant_id, per_s=per_s, burst=burst
        ):
            raise GatewayError(Reason.INVALID_REQUEST, f"There is no merchant {merchant_id}.")

    async def create_key(
        self,
        organisation_id: str,
        *,
        scopes: Collection[str],
        mode: Mode | str,
        merchant_ids: Collection[str] | None = None,
        name: str = "",
        expires_in_days: float | None = None,
    ) -> NewKey:
        """A new key; its text is known to the caller alone, once.

        `mode` is a Mode or its name in any case; without `merchant_ids` the key reaches all
        merchants of the organisation, later ones too. Raises GatewayError(INVALID_REQUEST) without
        the organisation, or for a merchant that is not one of its.
        """
        mode = mode if isinstance(mode, Mode) else Mode[mode.upper()]
        key = new_key(mode)
        expires_at = (
            None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days)
        )
        if not await self._lane.fetch(
            _CREATE_KEY,
            key_id=key.key_id,
            organisation_id=organisation_id,
            name=name,
            secret_hash=key.secret_hash,
            scopes=sorted(scopes),
            merchant_ids=None if merchant_ids is None else sorted(merchant_ids),
            mode=mode,
            expires_at=expires_at,
        ):
            raise GatewayError(
                Reason.INVALID_REQUEST,
                f"There is no organisation {organisation_id} with all of these merchants.",
            )
        return key

    async def list_keys(self, organisation_id: str | None = None) -> Sequence[KeyRow]:
        """Those of an organisation, or all; the oldest first, revoked ones too."""
        records = await self._lane.fetch(_LIST_KEYS, organisation_id=organisation_id)
        return [KeyRow(**_credential(record)) for record in records]

    async def revoke_key(self, key_id: str) -> bool:
        """Whether there was such a key that was not revoked already."""
        return bool(await self._lane.fetch(_REVOKE_KEY, key_id=key_id))

    async def load_key(self, key_id: str) -> KeyRecord | None:
        """A key with its merchants as they are now; revoked and expired ones too."""
        records = await self._lane.fetch(_LOAD_KEY, key_id=key_id)
        if not records:
            return None
        first = records[0]
        return KeyRecord(
            key_id=first["key_id"],
            secret_hash=first["secret_hash"],
            organisation_id=first["organisation_id"],
            scopes=frozenset(first["scopes"]),
            mode=Mode(first["mode"]),
            expires_at=first["expires_at"],
            revoked_at=first["revoked_at"],
            merchants=_merchants_of(records),
        )

    async def add_identity(
        self,
        uri: str,
        organisation_id: str,
        *,
        scopes: Collection[str],
        mode: Mode | str,
        merchant_ids: Collection[str] | None = None,
        name: str = "",
    ) -> None:
        """Let the certificates with this SPIFFE ID act for the organisation, as `create_key`'s key.

        Raises GatewayError(INVALID_REQUEST) without the organisation, for a merchant that is not
        one of its, or for an identity that is there already.
        """
        mode = mode if isinstance(mode, Mode) else Mode[mode.upper()]
        if not await self._lane.fetch(
            _ADD_IDENTITY,
            uri=uri,
            organisation_id=organisation_id,
            name=name,
            scopes=sorted(scopes),
            merchant_ids=None if merchant_ids is None else sorted(merchant_ids),
            mode=mode,
        ):
            raise GatewayError(
                Reason.INVALID_REQUEST,
                f"There is no organisation {organisation_id} with all of these merchants, or the "
                "identity is there already: remove it first.",
            )

    async def list_identities(self, organisation_id: str | None = None) -> Sequence[IdentityRow]:
        """Those of an organisation, or all, by their URIs."""
        records = await self._lane.fetch(_LIST_IDENTITIES, organisation_id=organisation_id)
        return [IdentityRow(**_credential(record)) for record in records]

    async def remove_identity(self, uri: str) -> bool:
        """Whether there was such an identity."""
        return bool(await self._lane.fetch(_REMOVE_IDENTITY, uri=uri))

    async def load_identity(self, uri: str) -> Principal | None:
        """Whom certificates with this SPIFFE ID act for, with the merchants as they are now."""
        records = await self._lane.fetch(_LOAD_IDENTITY, uri=uri)
        if not records:
            return None
        return Principal(
            key_id=records[0]["uri"],
            organisation_id=records[0]["organisation_id"],
            scopes=frozenset(records[0]["scopes"]),
            mode=Mode(records[0]["mode"]),
            merchants=_merchants_of(records),
        )

    async def load_merchants(
        self, organisation_id: str, merchant_ids: Collection[str] | None
    ) -> Mapping[str, MerchantInfo]:
        """Those of the named merchants that the organisation has; without names, all of its."""
        return _merchants_of(
            await self._lane.fetch(
                _LOAD_MERCHANTS,
                organisation_id=organisation_id,
                merchant_ids=None if merchant_ids is None else sorted(merchant_ids),
            )
        )


def _credential(record: asyncpg.Record) -> dict[str, Any]:
    """The columns of a credential by their names, as the fields of its row have them."""
    merchant_ids = record["merchant_ids"]
    return {
        **record,
        "scopes": frozenset(record["scopes"]),
        "merchant_ids": None if merchant_ids is None else tuple(merchant_ids),
        "mode": Mode(record["mode"]),
    }


def _merchants_of(records: Sequence[asyncpg.Record]) -> dict[str, MerchantInfo]:
    """The merchants of a credential's rows; it may have none."""
    return {
        record["merchant_id"]: MerchantInfo(
            record["merchant_id"],
            record["merchant_pan_exempt_order_id"],
            _limit(record["merchant_rate_limit_per_s"], record["merchant_rate_limit_burst"]),
        )
        for record in records
        if record["merchant_id"] is not None
    }


def _limit(per_s: float | None, burst: int | None) -> RateLimit | None:
    return None if per_s is None or burst is None else RateLimit(per_s, burst)
