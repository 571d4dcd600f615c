"""Commands for the record of what was changed of the configuration."""

from typing import Any, Final

import click

from gateway.cli.common import (
    coroutine,
    one_line,
    point_in_time,
    postgres_dsn,
    read_settings,
)

CHANGES_SHOWN_MAX: Final = 1000

_ACTIONS: Final = {
    "INSERT": "created",
    "UPDATE": "changed",
    "DELETE": "removed",
    "TRUNCATE": "emptied",
}


@click.group()
def changes() -> None:
    """Who changed what of the configuration (docs/security.md).

    Organisations, merchants, API keys, identities, accounts at PSPs, consumers of events.
    """


@changes.command("list")
@click.option("--merchant", help="Only those of this merchant and its accounts at PSPs.")
@click.option(
    "--organisation", help="Only those of this organisation, its merchants, keys and identities."
)
@click.option("--since", metavar="TIME", help="ISO 8601 with an offset.")
@click.option(
    "--before", type=click.IntRange(1, 2**63 - 1), metavar="N", help="Go on after the change N."
)
@click.option(
    "--limit",
    type=click.IntRange(1, CHANGES_SHOWN_MAX),
    default=50,
    show_default=True,
    help="At most so many.",
)
@coroutine
async def changes_list(
    merchant: str | None,
    organisation: str | None,
    since: str | None,
    before: int | None,
    limit: int,
) -> None:
    """List them, the newest first: number, time, author, who was logged in to the database from
    where, what was done to what, and how.

    Secrets are never shown, only that they changed. Changes by SQL are listed too.
    """
    from storage.postgres import ConfigurationChanges

    if merchant is not None and organisation is not None:
        raise click.UsageError("--merchant has one organisation: give one of them.")
    since_time = None if since is None else point_in_time(since)
    dsn = postgres_dsn(read_settings())
    async with ConfigurationChanges.connect(dsn) as store:
        found = await store.list(
            organisation_id=organisation,
            merchant_id=merchant,
            since=since_time,
            before=before,
            limit=limit,
        )
    if not found:  # what was removed has changes, and what never was looks like it
        await _require(dsn, merchant, organisation)
    for each in found:
        click.echo(one_line(_line(each)))


async def _require(dsn: str, merchant: str | None, organisation: str | None) -> None:
    from storage.postgres import Accounts

    async with Accounts.connect(dsn) as accounts:
        if merchant is not None:
            await accounts.require_merchant(merchant)
        if organisation is not None:
            await accounts.require_organisation(organisation)


def _line(each: Any) -> str:
    return "  ".join(
        (
            str(each.change_id),
            f"{each.changed_at:%Y-%m-%dT%H:%M:%SZ}",
            each.author,
            f"{each.database_user}@{each.client_address or 'local'}",
            _ACTIONS.get(each.action, each.action),
            each.table_name,
            each.row_id or "all",
            each.merchant_id or each.organisation_id or "-",
            "-" if each.mode is None else each.mode.name.lower(),
            _values(each),
        )
    )


def _values(each: Any) -> str:
    """The columns: of what was changed, what they were and what they are."""
    import orjson

    old, new = each.old_values, each.new_values
    return ", ".join(
        f"{column}: "
        + " -> ".join(
            orjson.dumps(values[column]).decode() for values in (old, new) if column in values
        )
        for column in sorted({*old, *new})
    )
