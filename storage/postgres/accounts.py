"""Organisations, merchants, API keys and certificates' identities in PostgreSQL."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

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
from storage.postgres.lanes import DirectLane, LaneLimits
from storage.postgres.pool import Connection, ConnectionSettings, HeldConnections
from storage.postgres.queries import query, run

_CREATE_ORGANISATION = query("accounts", "create_organisation")
_LIST_ORGANISATIONS = query("accounts", "list_organisations")
_CREATE_MERCHANT = query("accounts", "create_merchant")
_LIMIT_MERCHANT = query("accounts", "limit_merchant")
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

LIMITS = LaneLimits(connections=1, rows_max=1, queue_max=200, retry_s_max=1.0)


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


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A stored API key, without its hash."""

    key_id: str
    organisation_id: str
    name: str
    scopes: frozenset[str]
    merchant_ids: tuple[str, ...] | None
    """None: all merchants of the organisation."""
    mode: Mode
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class IdentityRow:
    """A stored identity of a certificate."""

    uri: str
    organisation_id: str
    name: str
    scopes: frozenset[str]
    merchant_ids: tuple[str, ...] | None
    """None: all merchants of the organisation."""
    mode: Mode
    created_at: datetime


class Accounts:
    """Who may call. Every method raises StoreUnavailable where the database is away."""

    def __init__(self, lane: DirectLane) -> None:
        """`lane` is the caller's to close; `connect` brings its own."""
        self._lane = lane

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, dsn: str, *, connect_timeout_s: float = 5.0, statement_timeout_s: float = 10.0
    ) -> AsyncIterator["Accounts"]:
        """With a connection of its own."""
        settings = ConnectionSettings(
            dsn, connect_timeout_s=connect_timeout_s, statement_timeout_s=statement_timeout_s
        )
        lane = DirectLane("accounts", HeldConnections(settings, "accounts", 1), LIMITS)
        try:
            yield cls(lane)
        finally:
            await lane.close()

    async def create_organisation(self, name: str) -> str:
        """The new organisation's id."""
        organisation_id = new_organisation_id()

        async def create(connection: Connection) -> None:
            await run(connection, _CREATE_ORGANISATION, organisation_id=organisation_id, name=name)

        await self._lane.run(create)
        return organisation_id

    async def list_organisations(self) -> Sequence[OrganisationRow]:
        """All of them, the oldest first."""

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _LIST_ORGANISATIONS)

        return [OrganisationRow(*record) for record in await self._lane.run(select)]

    async def create_merchant(
        self, organisation_id: str, name: str, *, pan_exempt_order_id: bool = False
    ) -> str:
        """The new merchant's id. Raises GatewayError(INVALID_REQUEST) without the organisation."""
        merchant_id = new_merchant_id()

        async def create(connection: Connection) -> list[asyncpg.Record]:
            return await run(
                connection,
                _CREATE_MERCHANT,
                merchant_id=merchant_id,
                organisation_id=organisation_id,
                name=name,
                pan_exempt_order_id=pan_exempt_order_id,
            )

        if not await self._lane.run(create):
            raise GatewayError(
                Reason.INVALID_REQUEST, f"There is no organisation {organisation_id}."
            )
        return merchant_id

    async def list_merchants(self, organisation_id: str | None = None) -> Sequence[MerchantRow]:
        """Those of an organisation, or all; the oldest first."""

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _LIST_MERCHANTS, organisation_id=organisation_id)

        return [
            MerchantRow(
                merchant_id=record["merchant_id"],
                organisation_id=record["organisation_id"],
                name=record["name"],
                pan_exempt_order_id=record["pan_exempt_order_id"],
                created_at=record["created_at"],
                rate_limit=_limit(record["rate_limit_per_s"], record["rate_limit_burst"]),
            )
            for record in await self._lane.run(select)
        ]

    async def limit_merchant(self, merchant_id: str, rate_limit: RateLimit | None) -> None:
        """Limit how often a merchant's money calls may begin, or (None) no longer.

        Gateways know it once their cache of credentials has aged. Raises
        GatewayError(INVALID_REQUEST) without the merchant, or for a limit that is none.
        """
        per_s, burst = (None, None) if rate_limit is None else rate_limit

        async def limit(connection: Connection) -> list[asyncpg.Record]:
            return await run(
                connection, _LIMIT_MERCHANT, merchant_id=merchant_id, per_s=per_s, burst=burst
            )

        if not await self._lane.run(limit):
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

        async def create(connection: Connection) -> list[asyncpg.Record]:
            return await run(
                connection,
                _CREATE_KEY,
                key_id=key.key_id,
                organisation_id=organisation_id,
                name=name,
                secret_hash=key.secret_hash,
                scopes=sorted(scopes),
                merchant_ids=None if merchant_ids is None else sorted(merchant_ids),
                mode=mode,
                expires_at=expires_at,
            )

        if not await self._lane.run(create):
            raise GatewayError(
                Reason.INVALID_REQUEST,
                f"There is no organisation {organisation_id} with all of these merchants.",
            )
        return key

    async def list_keys(self, organisation_id: str | None = None) -> Sequence[KeyRow]:
        """Those of an organisation, or all; the oldest first, revoked ones too."""

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _LIST_KEYS, organisation_id=organisation_id)

        return [
            KeyRow(
                key_id=record["key_id"],
                organisation_id=record["organisation_id"],
                name=record["name"],
                scopes=frozenset(record["scopes"]),
                merchant_ids=None
                if record["merchant_ids"] is None
                else tuple(record["merchant_ids"]),
                mode=Mode(record["mode"]),
                expires_at=record["expires_at"],
                revoked_at=record["revoked_at"],
                created_at=record["created_at"],
            )
            for record in await self._lane.run(select)
        ]

    async def revoke_key(self, key_id: str) -> bool:
        """Whether there was such a key that was not revoked already."""

        async def revoke(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _REVOKE_KEY, key_id=key_id)

        return bool(await self._lane.run(revoke))

    async def load_key(self, key_id: str) -> KeyRecord | None:
        """A key with its merchants as they are now; revoked and expired ones too."""

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _LOAD_KEY, key_id=key_id)

        records = await self._lane.run(select)
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

        async def add(connection: Connection) -> list[asyncpg.Record]:
            return await run(
                connection,
                _ADD_IDENTITY,
                uri=uri,
                organisation_id=organisation_id,
                name=name,
                scopes=sorted(scopes),
                merchant_ids=None if merchant_ids is None else sorted(merchant_ids),
                mode=mode,
            )

        if not await self._lane.run(add):
            raise GatewayError(
                Reason.INVALID_REQUEST,
                f"There is no organisation {organisation_id} with all of these merchants, or the "
                "identity is there already: remove it first.",
            )

    async def list_identities(self, organisation_id: str | None = None) -> Sequence[IdentityRow]:
        """Those of an organisation, or all, by their URIs."""

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _LIST_IDENTITIES, organisation_id=organisation_id)

        return [
            IdentityRow(
                uri=record["uri"],
                organisation_id=record["organisation_id"],
                name=record["name"],
                scopes=frozenset(record["scopes"]),
                merchant_ids=None
                if record["merchant_ids"] is None
                else tuple(record["merchant_ids"]),
                mode=Mode(record["mode"]),
                created_at=record["created_at"],
            )
            for record in await self._lane.run(select)
        ]

    async def remove_identity(self, uri: str) -> bool:
        """Whether there was such an identity."""

        async def remove(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _REMOVE_IDENTITY, uri=uri)

        return bool(await self._lane.run(remove))

    async def load_identity(self, uri: str) -> Principal | None:
        """Whom certificates with this SPIFFE ID act for, with the merchants as they are now."""

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(connection, _LOAD_IDENTITY, uri=uri)

        records = await self._lane.run(select)
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

        async def select(connection: Connection) -> list[asyncpg.Record]:
            return await run(
                connection,
                _LOAD_MERCHANTS,
                organisation_id=organisation_id,
                merchant_ids=None if merchant_ids is None else sorted(merchant_ids),
            )

        return _merchants_of(await self._lane.run(select))


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
