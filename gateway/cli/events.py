"""Commands for events and their consumers."""

import asyncio
import re
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
    postgres_dsn,
    read_settings,
    reason_option,
    require_merchant,
)

CONSUMERS_SHOWN_MAX: Final = 1000


def _consumer(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse a name that the contract does not take either."""
    if value is None:
        return None
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise click.BadParameter(
            "a consumer's name has small letters, digits and ._-, at most 63", context, option
        )
    return no_card_number(context, option, value)


@click.group()
def events() -> None:
    """Payments' events and their consumers (docs/events.md)."""


_consumer_organisation = click.option(
    "--organisation", default="", help="Whose consumer; without it, the operator's own."
)


@asynccontextmanager
async def _events() -> AsyncIterator[Any]:
    """Streams of events, straight from the database."""
    from gateway.application.events import Events, Schedule
    from gateway.rpc.decoding import ContractDecoder
    from storage.postgres import OutboxEvents

    settings = read_settings()
    schedule = Schedule(
        poll_s_min=settings.events_poll_ms_min / 1000,
        poll_s_max=settings.events_poll_ms_max / 1000,
        heartbeat_s=settings.events_heartbeat_s,
        kept_bytes_max=settings.events_kept_bytes_max,
    )
    async with OutboxEvents.connect(postgres_dsn(settings)) as store:
        streams = Events(store, store, ContractDecoder().mode_of_event, schedule)
        tail = asyncio.create_task(streams.run())
        try:
            yield streams
        finally:
            tail.cancel()


def _consumer_name(organisation: str, mode: str, name: str) -> Any:
    from gateway.application.events import ConsumerName
    from gateway.domain.model import Mode

    return ConsumerName(organisation, Mode[mode.upper()], name)


async def _position(streams: Any, place: str) -> Any:
    from gateway.application.events import ORIGIN

    if place == "beginning":
        return ORIGIN
    return await (streams.latest() if place == "latest" else streams.position_of(place))


@events.command("tail")
@mode_option
@click.option("--merchant", help="Only this merchant's; without it, all merchants'.")
@click.option(
    "--consumer",
    callback=_consumer,
    help="Go on at the operator's consumer of this name, and acknowledge what was printed.",
)
@click.option(
    "--from",
    "place",
    metavar="PLACE",
    help="`beginning`, `latest` or a cursor; of a consumer, where a new one begins. "
    "Without it: beginning.",
)
@click.option("--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@coroutine
async def events_tail(
    mode: str, merchant: str | None, consumer: str | None, place: str | None, follow: bool
) -> None:
    """Print events in their order, one JSON object a line, with the cursor behind it."""
    from contextlib import aclosing

    import orjson
    from google.protobuf.json_format import MessageToDict
    from payments.v1.payment_pb2 import PaymentEvent

    from gateway.application.events import Audience, encode_cursor

    if consumer and place not in (None, "beginning", "latest"):
        raise click.UsageError("--consumer has a position: `events reset` moves it to a cursor")
    merchants = None if merchant is None else frozenset({merchant})
    name = _consumer_name("", mode, consumer or "")
    audience = Audience(name.mode, merchants)
    await require_merchant(postgres_dsn(read_settings()), merchant)

    async def ask() -> Audience:
        return audience

    async with _events() as streams:
        if consumer:
            after = await streams.consumer_position(name, merchants, begin_latest=place == "latest")
        else:
            after = await _position(streams, place or "beginning")
        async with aclosing(streams.stream(ask, after, until_current=not follow)) as batches:
            async for batch in batches:
                for event in batch.events:
                    line = {
                        "cursor": encode_cursor(event.position),
                        "event": MessageToDict(
                            PaymentEvent.FromString(event.payload),
                            preserving_proto_field_name=True,
                        ),
                    }
                    try:
                        click.echo(orjson.dumps(line))
                    except BrokenPipeError:  # as of `| head`: what it has not read is not done
                        return
                if consumer:
                    cursor = encode_cursor(batch.position)
                    await streams.acknowledge(name, merchants, cursor, None)


@events.command("consumers")
@coroutine
async def events_consumers() -> None:
    """List all consumers: how far they are behind, and when they moved last."""
    from gateway.application.events import encode_cursor
    from storage.postgres import OutboxEvents

    async with OutboxEvents.connect(postgres_dsn(read_settings())) as store:
        for each in await store.consumers(None, None, CONSUMERS_SHOWN_MAX):
            click.echo(
                "  ".join(
                    (
                        each.name.organisation_id or "operator",
                        each.name.mode.name,
                        each.name.name,
                        f"{each.events_behind} events",
                        f"{each.seconds_behind:.0f}s behind",
                        f"{each.acknowledged_at:%Y-%m-%dT%H:%M:%SZ}",
                        encode_cursor(each.position),
                    )
                )
            )


async def _stored_consumer(streams: Any, name: Any) -> Any:
    """A consumer of whoever, by the merchants that it reads."""
    from gateway.application.events import told

    # Reached or not: who may run the command may do everything.
    found = await told(streams.consumer_store.find_consumer(name, None))
    if found is None:
        fail(f"There is no consumer {name.name} in this mode; `events consumers` lists them.")
    return found


@events.command("reset")
@click.argument("consumer", callback=_consumer)
@mode_option
@_consumer_organisation
@click.option("--to", "place", required=True, help="`beginning`, `latest` or a cursor.")
@reason_option
@coroutine
async def events_reset(
    consumer: str, mode: str, organisation: str, place: str, reason: str
) -> None:
    """Move a consumer: what lies between is delivered again, or never."""
    from gateway.application.events import ORIGIN, Reset, encode_cursor

    name = _consumer_name(organisation, mode, consumer)
    async with _events() as streams:
        found = await _stored_consumer(streams, name)
        position = await _position(streams, place)
        cursor = "" if position == ORIGIN else encode_cursor(position)
        await streams.acknowledge(name, found.merchant_ids, cursor, Reset(login_name(), reason))
    click.echo(f"{consumer} is at {encode_cursor(position)}")


@events.command("delete")
@click.argument("consumer", callback=_consumer)
@mode_option
@_consumer_organisation
@coroutine
async def events_delete(consumer: str, mode: str, organisation: str) -> None:
    """Forget a consumer and its position."""
    name = _consumer_name(organisation, mode, consumer)
    async with _events() as streams:
        found = await _stored_consumer(streams, name)
        await streams.delete_consumer(name, found.merchant_ids, login_name())
    click.echo(f"{consumer} is deleted")
