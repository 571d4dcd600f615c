"""Commands for what PSPs told."""

from typing import Any

import click

from gateway.cli.common import (
    coroutine,
    fail,
    merchant_option,
    postgres_dsn,
    read_settings,
    require_merchant,
)


@click.group()
def notifications() -> None:
    """What PSPs told of a merchant's payments (docs/notifications.md)."""


_event = click.argument("event_id", metavar="EVENT_ID")


def _notifications() -> Any:
    from storage.postgres import Notifications

    return Notifications.connect(postgres_dsn(read_settings()))


def _no_notification(merchant: str, event_id: str) -> str:
    return f"Merchant {merchant} has no notification {event_id}."


@notifications.command("list")
@merchant_option
@click.option("--pending", is_flag=True, help="Only those that are yet to be applied.")
@click.option(
    "--result",
    type=click.Choice(["applied", "no-news", "recorded", "unknown", "unmatched"]),
    help="Only those of which this became.",
)
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many."
)
@coroutine
async def notifications_list(merchant: str, pending: bool, result: str | None, limit: int) -> None:
    """List them, the newest first."""
    from gateway.application.notifications import Result

    if pending and result is not None:
        raise click.UsageError("--pending is what has no --result yet: give one of them.")
    wanted = None if result is None else Result[result.upper().replace("-", "_")]
    await require_merchant(postgres_dsn(read_settings()), merchant)
    async with _notifications() as store:
        for each in await store.list(merchant, limit=limit, pending_only=pending, result=wanted):
            click.echo(
                "  ".join(
                    (
                        f"{each.received_at:%Y-%m-%dT%H:%M:%SZ}",
                        each.event_id,
                        each.connector,
                        each.connector_account_id,
                        each.event_type,
                        each.kind,
                        each.result or "PENDING",
                        each.payment_id or "-",
                    )
                )
            )


@notifications.command("show")
@merchant_option
@_event
@coroutine
async def notifications_show(merchant: str, event_id: str) -> None:
    """Show what is stored of one, by the PSP's id, as JSON."""
    import orjson

    async with _notifications() as store:
        found = await store.find(merchant, event_id)
    if not found:
        fail(_no_notification(merchant, event_id))
    for each in found:
        document = {
            "connector_account_id": each.connector_account_id,
            "received_at": each.received_at.isoformat(),
            "result": each.result or None,
            "applied_at": None if each.applied_at is None else each.applied_at.isoformat(),
            "payment_id": each.payment_id,
            "operation_id": each.operation_id,
            "notification": each.content,
        }
        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


@notifications.command("apply")
@merchant_option
@_event
@coroutine
async def notifications_apply(merchant: str, event_id: str) -> None:
    """Have a running gateway apply one now, again if need be: twice has the effect of once."""
    async with _notifications() as store:
        if not await store.apply_again(merchant, event_id):
            fail(_no_notification(merchant, event_id))
    click.echo(f"{event_id} is due")
