"""Commands for organisations, merchants, keys and identities."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import click

from gateway.cli.common import (
    coroutine,
    fail,
    login_name,
    mode_option,
    no_card_number,
    option_group,
    postgres_dsn,
    read_settings,
)

SCOPES: Final = (
    "payments:read",
    "payments:write",
    "payments:admin",
    "routing:read",
    "routing:write",
    "events:read",
    "events:read_all",
    "admin",
)
"""What credentials may be for: `gateway.application.accounts.Scope`, which loads too much here."""

RATE_PER_S_MIN: Final = 0.001
RATE_PER_S_MAX: Final = 100_000
RATE_BURST_MAX: Final = 1_000_000
"""The bounds of a merchant's rate limit, as the table of merchants has them."""


_organisation = click.option("--organisation", required=True, help="The organisation's id, org_….")
_of_organisation = click.option("--organisation", help="Only those of this organisation.")
_name = click.option("--name", default="", callback=no_card_number, help="A name for people.")


@click.group()
def organisations() -> None:
    """Organisations: each has merchants and API keys."""


@organisations.command("create")
@click.option("--name", required=True, callback=no_card_number, help="A name for people.")
@coroutine
async def organisations_create(name: str) -> None:
    """Create an organisation and print its id."""
    async with _accounts() as accounts:
        click.echo(await accounts.create_organisation(name))


@organisations.command("list")
@coroutine
async def organisations_list() -> None:
    """List the organisations."""
    async with _accounts() as accounts:
        for row in await accounts.list_organisations():
            click.echo(f"{row.organisation_id}  {row.name}")


@click.group()
def merchants() -> None:
    """Merchants: whose payments they are."""


@merchants.command("create")
@_organisation
@click.option("--name", required=True, callback=no_card_number, help="A name for people.")
@click.option(
    "--card-like-order-ids",
    is_flag=True,
    help="Allow merchant_order_id to look like a card number; it is masked in logs.",
)
@coroutine
async def merchants_create(organisation: str, name: str, card_like_order_ids: bool) -> None:
    """Create a merchant and print its id."""
    async with _accounts() as accounts:
        click.echo(
            await accounts.create_merchant(
                organisation, name, pan_exempt_order_id=card_like_order_ids
            )
        )


@merchants.command("list")
@_of_organisation
@coroutine
async def merchants_list(organisation: str | None) -> None:
    """List the merchants."""
    async with _accounts_of(organisation) as accounts:
        for row in await accounts.list_merchants(organisation):
            limit = (
                "no rate limit"
                if row.rate_limit is None
                else f"{row.rate_limit.per_s:g} a second, {row.rate_limit.burst} at once"
            )
            click.echo(f"{row.merchant_id}  {row.organisation_id}  {limit}  {row.name}")


@merchants.command("limit")
@click.argument("merchant_id")
@click.option(
    "--per-second",
    type=click.FloatRange(RATE_PER_S_MIN, RATE_PER_S_MAX),
    help="Money calls and items a second, in the long run.",
)
@click.option(
    "--burst",
    type=click.IntRange(1, RATE_BURST_MAX),
    help="How many may come at once; without it, those of one second.",
)
@click.option("--none", "unlimited", is_flag=True, help="Take the limit away.")
@coroutine
async def merchants_limit(
    merchant_id: str, per_second: float | None, burst: int | None, unlimited: bool
) -> None:
    """Limit how often a merchant's money calls may begin, over all gateways together.

    Beyond it they are refused with RATE_LIMITED and a pause. Gateways know the new limit after
    GATEWAY_AUTH_CACHE_LIFE_S.
    """
    from gateway.application.accounts import RateLimit

    if per_second is not None and math.isnan(per_second):  # click's range lets it through
        fail("--per-second has to be a number.")
    if unlimited == (per_second is not None) or (unlimited and burst is not None):
        fail("Say either --per-second (and --burst), or --none.")
    limit = None
    if per_second is not None:
        limit = RateLimit(per_second, burst or max(1, round(per_second)))
    async with _accounts() as accounts:
        await accounts.limit_merchant(merchant_id, limit)
    click.echo(f"limited {merchant_id}" if limit else f"{merchant_id} has no limit")


_grant = option_group(
    _organisation,
    click.option(
        "--merchant",
        "merchant_ids",
        multiple=True,
        callback=lambda _, __, value: value or None,
        help="One that it may act for; repeat for several. Without it: all of the organisation.",
    ),
    click.option(
        "--scope",
        "scopes",
        multiple=True,
        required=True,
        type=click.Choice(SCOPES),
        help="What it may do; repeat for several.",
    ),
    mode_option,
    _name,
)
"""What every credential says of its principal, as the store takes it."""


@click.group()
def keys() -> None:
    """API keys: each names a principal, its scopes, its merchants and its mode."""


@keys.command("create")
@_grant
@click.option("--expires-in-days", type=click.IntRange(1, 3650), help="Without it: never.")
@coroutine
async def keys_create(organisation: str, expires_in_days: int | None, **grant: Any) -> None:
    """Create a key and print it. It is shown this once: only its hash is stored."""
    async with _accounts() as accounts:
        created = await accounts.create_key(organisation, expires_in_days=expires_in_days, **grant)
    click.echo(created.text)
    click.echo(f"key id {created.key_id}; keep the key above, it is not shown again", err=True)


@keys.command("list")
@_of_organisation
@coroutine
async def keys_list(organisation: str | None) -> None:
    """List the keys, without their secrets."""
    async with _accounts_of(organisation) as accounts:
        for row in await accounts.list_keys(organisation):
            click.echo(
                "  ".join(
                    (
                        row.key_id,
                        row.organisation_id,
                        row.mode.name.lower(),
                        ",".join(sorted(row.scopes)),
                        "revoked" if row.revoked_at else _expiry(row.expires_at),
                        row.name,
                    )
                )
            )


@keys.command("revoke")
@click.argument("key_id")
@coroutine
async def keys_revoke(key_id: str) -> None:
    """Revoke a key. Gateways refuse it once their cache has aged (GATEWAY_AUTH_CACHE_LIFE_S)."""
    async with _accounts() as accounts:
        if not await accounts.revoke_key(key_id):
            fail(f"No key {key_id} that is not revoked already.")
    click.echo(f"revoked {key_id}")


@click.group()
def identities() -> None:
    """Identities in client certificates: each is a principal, as an API key is.

    They count where GATEWAY_CLIENT_IDENTITY says so (docs/security.md).
    """


@identities.command("add")
@click.argument("uri")
@_grant
@coroutine
async def identities_add(uri: str, organisation: str, **grant: Any) -> None:
    """Let certificates with the SPIFFE ID URI (spiffe://…) act as a key would."""
    from gateway.rpc.peers import is_spiffe_id

    if not is_spiffe_id(uri):
        fail("The identity has to be a SPIFFE ID with a path: spiffe://example.org/ns/shop/sa/till")
    async with _accounts() as accounts:
        await accounts.add_identity(uri, organisation, **grant)
    click.echo(f"added {uri}")


@identities.command("list")
@_of_organisation
@coroutine
async def identities_list(organisation: str | None) -> None:
    """List the identities."""
    async with _accounts_of(organisation) as accounts:
        for row in await accounts.list_identities(organisation):
            merchants = "all" if row.merchant_ids is None else ",".join(row.merchant_ids)
            scopes = ",".join(sorted(row.scopes))
            mode = row.mode.name.lower()
            click.echo(
                f"{row.uri}  {row.organisation_id}  {mode}  {scopes}  {merchants}  {row.name}"
            )


@identities.command("remove")
@click.argument("uri")
@coroutine
async def identities_remove(uri: str) -> None:
    """Remove an identity. Gateways refuse it after GATEWAY_AUTH_CACHE_LIFE_S."""
    async with _accounts() as accounts:
        if not await accounts.remove_identity(uri):
            fail(f"No identity {uri}.")
    click.echo(f"removed {uri}")


def _expiry(at: Any) -> str:
    return f"until {at:%Y-%m-%d}" if at else "no expiry"


def _accounts() -> Any:
    from storage.postgres.accounts import Accounts

    return Accounts.connect(postgres_dsn(read_settings()), login_name())


@asynccontextmanager
async def _accounts_of(organisation: str | None) -> AsyncIterator[Any]:
    """The accounts, for a list; an organisation that there is not would look like an empty one."""
    async with _accounts() as accounts:
        if organisation is not None:
            await accounts.require_organisation(organisation)
        yield accounts
