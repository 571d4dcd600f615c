"""Commands for operations in doubt, and the audit of the books."""

import sys
from pathlib import Path
from typing import Final

import click

from gateway.cli.common import (
    coroutine,
    fail,
    login_name,
    long_enough,
    merchant_option,
    no_card_number,
    postgres_dsn,
    read_settings,
    require_merchant,
)

DOUBTS_PER_PAGE: Final = 200


@click.group()
def doubts() -> None:
    """Operations whose outcome is unknown, of all merchants (docs/operations.md)."""


@doubts.command("list")
@click.option("--merchant", "merchant_id", help="Only those of this merchant.")
@click.option("--needs-person", is_flag=True, help="Only those that recovery leaves to a person.")
@coroutine
async def doubts_list(merchant_id: str | None, needs_person: bool) -> None:
    """List the doubts, the oldest first: what to ask the PSP about, and what recovery does."""
    from datetime import UTC, datetime

    from gateway.application.administration import AdminFilter
    from storage.postgres import open_reader

    dsn = postgres_dsn(read_settings())
    await require_merchant(dsn, merchant_id)
    merchants = None if merchant_id is None else frozenset({merchant_id})
    page_of = AdminFilter(merchants, None, DOUBTS_PER_PAGE)
    now = datetime.now(UTC)
    async with open_reader(dsn) as store:
        while True:
            page = await store.list_doubts(page_of, needs_person_only=needs_person)
            for each in page.doubts:
                operation = each.operation
                click.echo(
                    "  ".join(
                        (
                            operation.merchant_id,
                            operation.reference,
                            operation.attempt.connector,
                            operation.kind.name,
                            operation.state.name,
                            f"{operation.amount_minor} {operation.currency}",
                            f"{(now - each.since).total_seconds():.0f}s",
                            f"tries={each.tries}",
                            each.cause.name,
                            f"next={each.next_check_at:%Y-%m-%dT%H:%M:%SZ}",
                            "NEEDS_PERSON" if each.needs_person else "recovery",
                        )
                    )
                )
            if page.next_after is None:
                return
            page_of = AdminFilter(merchants, None, DOUBTS_PER_PAGE, page.next_after)


@doubts.command("resolve")
@click.argument("reference", metavar="REFERENCE")
@merchant_option
@click.option(
    "--outcome",
    required=True,
    type=click.Choice(["took-effect", "no-effect", "declined", "failed", "canceled"]),
    help="What the PSP says became of it.",
)
@click.option(
    "--connector-transaction-id", default="", callback=no_card_number, help="The PSP's id of it."
)
@click.option(
    "--amount-reported-minor",
    type=click.IntRange(0, 10**12),
    help="The PSP's amount in minor units, where it differs.",
)
@click.option(
    "--reason",
    required=True,
    callback=long_enough,
    help="How it was found out, for the audit record: 10 characters or more.",
)
@coroutine
async def doubts_resolve(
    reference: str,
    merchant: str,
    outcome: str,
    connector_transaction_id: str,
    amount_reported_minor: int | None,
    reason: str,
) -> None:
    """End the doubt of an attempt by what you found out at its PSP.

    REFERENCE is the attempt's, as `doubts list` prints it: the operation's id, "-", the number.
    """
    from gateway.application.administration import Administration
    from gateway.application.outcomes import DatabaseClock, Outcomes
    from gateway.application.ports import Resolution
    from gateway.domain.model import DoubtOutcome
    from gateway.rpc.conversion import ContractEncoder
    from storage.postgres import open_reader

    operation_id, _, number = reference.rpartition("-")
    if not (operation_id and number.isascii() and number.isdecimal() and len(number) < 10):
        raise click.BadParameter("an attempt's reference, op_…-1")
    async with open_reader(postgres_dsn(read_settings())) as store:
        # A decided operation is definite: nothing is left to take over, and nothing to check.
        outcomes = Outcomes(store, None, ContractEncoder(), DatabaseClock(), 0.0, lambda _: 0.0)
        resolved = await Administration(store, outcomes).resolve(
            merchant,
            None,
            operation_id,
            Resolution(
                attempt_number=int(number),
                outcome=DoubtOutcome[outcome.upper().replace("-", "_")],
                connector_transaction_id=connector_transaction_id,
                amount_reported_minor=amount_reported_minor,
                reason=reason,
                resolved_by=login_name(),
            ),
        )
    said = "decided before: " if resolved.replayed else ""
    click.echo(f"{said}{operation_id} is {resolved.found.operation.state.name}")


@click.command()
@click.option("--merchant", "merchant_id", help="Only the payments of this merchant.")
@click.option(
    "--psp-journal",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The simulator's journal, to compare with.",
)
@coroutine
async def verify(merchant_id: str | None, psp_journal: Path | None) -> None:
    """Audit every payment in the database: amounts, states, events, stored answers, doubts.

    Reads only, a page at a time, also while gateways are at work. Exit status 1 where a rule does
    not hold (docs/operations.md explains each). With the PSP's journal every success must have its
    one charge and the reverse; take it when no payment is on its way.
    """
    from gateway.application.administration import AdminFilter
    from gateway.connectors.simulator.journal import JournalError
    from gateway.verify import verify_all
    from storage.postgres import open_reader

    dsn = postgres_dsn(read_settings())
    await require_merchant(dsn, merchant_id)
    merchants = None if merchant_id is None else frozenset({merchant_id})
    async with open_reader(dsn) as store:
        try:
            good = await verify_all(store.audit, AdminFilter(merchants, None, 0), psp_journal)
        except JournalError as error:
            fail(str(error))
    if not good:
        sys.exit(1)
