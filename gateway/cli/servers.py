"""Commands that serve, and that prepare the database."""

import sys
from typing import Literal, cast

import click

from gateway.cli.common import coroutine, fail, postgres_dsn, read_settings, workers_option


@click.command()
@workers_option
def serve(workers: int | None) -> None:
    """Serve the contract on your PostgreSQL and Redis.

    Refuses to start where the schema is not the one that this version needs (`migrate`), or where
    the database would not keep what it commits. SIGTERM and SIGINT drain: health says NOT_SERVING,
    calls in flight end, everything is flushed. A second signal does not cut that short.

    With several workers a supervisor starts them on one port, replaces those that die, drains all
    at once, and serves the metrics and health of all at GATEWAY_METRICS_ADDRESS. Each worker opens
    connections to PostgreSQL and Redis of its own (`doctor` counts them). SIGTERM to one worker
    drains and replaces that one.
    """
    settings = read_settings(workers=workers)
    if not settings.postgres_dsn.get_secret_value() or not settings.redis_url.get_secret_value():
        fail(
            "`serve` needs GATEWAY_POSTGRES_DSN and GATEWAY_REDIS_URL. To try the gateway out on "
            "embedded servers: `python -m gateway run`."
        )
    if settings.workers > 1:
        # Not the composition root: a supervisor loads no gRPC.
        from gateway.workers import WorkersFailed, serve_with_workers

        try:
            serve_with_workers(settings)
        except WorkersFailed as error:
            fail(str(error))
        return
    from gateway.composition import StartError, run_server

    try:
        run_server(settings)
    except StartError as error:
        fail(str(error))


@click.command(hidden=True)
@click.argument("channel", type=int)
def worker(channel: int) -> None:
    """Serve as one of several workers.

    Not for people: `serve --workers` starts it, with the file descriptor of its channel.
    """
    from gateway.workers import work

    sys.exit(work(channel))


@click.command()
@workers_option
def run(workers: int | None) -> None:
    """Run everything here: embedded PostgreSQL and Redis, a PSP simulator, and the gateway.

    Data last between runs, in GATEWAY_EMBEDDED_DIR. Servers that the settings name are used
    instead of embedded ones. Prints a demo merchant's key and a command to paste.
    """
    from gateway.composition import StartError, run_local
    from gateway.local import LocalStateUnusable

    try:
        run_local(read_settings(workers=workers))
    except (StartError, LocalStateUnusable) as error:
        fail(str(error))


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulator(arguments: tuple[str, ...]) -> None:
    """Run the PSP simulator as a process of its own (docs/simulator.md)."""
    from gateway.connectors.simulator import server

    sys.exit(server.main(list(arguments)))


_login_option = click.option(
    "--login",
    help="The user that gateways connect as; without it that of the last time, then this one.",
)


@click.command()
@click.option(
    "--phase",
    type=click.Choice(["pre", "post", "all"]),
    default="all",
    show_default=True,
    help="pre: before the new version is deployed; post: after the last old one has gone.",
)
@_login_option
@coroutine
async def migrate(phase: str, login: str | None) -> None:
    """Bring the schema up to this version. Safe to repeat, and from several places at once.

    With GATEWAY_POSTGRES_ROW_SECURITY the tables that it adds are protected as by `row-security
    enable`; --login is then as there.
    """
    from storage.postgres import migrate as migrations
    from storage.postgres import row_security as security

    settings = read_settings()
    dsn = postgres_dsn(settings)
    try:
        applied = await migrations.migrate(dsn, cast("Literal['pre', 'post', 'all']", phase))
    except (migrations.MigrationChanged, migrations.MigrationBusy) as error:
        fail(str(error))
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("nothing to do")
    if settings.postgres_row_security and phase != "post":
        await security.enable(dsn, login, new_tables_only=True)
        click.echo("row-level security is enabled")


@click.group("row-security")
def row_security() -> None:
    """Row-level security in PostgreSQL, the second wall between merchants (docs/security.md)."""


@row_security.command("enable")
@_login_option
@coroutine
async def row_security_enable(login: str | None) -> None:
    """Create the roles and policies for GATEWAY_POSTGRES_ROW_SECURITY.

    As the tables' owner, who may create roles where there are none. Where `migrate` runs without
    the setting, run it again after each: a new table is protected by it. Safe to repeat, and
    gateways that run without the setting go on.
    """
    from storage.postgres import row_security as security

    await security.enable(postgres_dsn(read_settings()), login)
    click.echo("row-level security is enabled")


@row_security.command("disable")
@coroutine
async def row_security_disable() -> None:
    """Remove the policies. First restart all gateways without the setting."""
    from storage.postgres import row_security as security

    await security.disable(postgres_dsn(read_settings()))
    click.echo("row-level security is disabled")
