"""Commands that show what there is: transition tables, a demo, health, findings."""

import sys

import click

from gateway.cli.common import coroutine, fail, local_state, read_settings, workers_option


@click.command()
@click.option("--markdown", is_flag=True, help="As docs/states.md has it.")
def states(markdown: bool) -> None:
    """Print the transition tables and what may run beside what."""
    from gateway.domain import tables

    click.echo(tables.markdown() if markdown else tables.text())


@click.command()
@click.option("--target", help="host:port; without it, the gateway that `run` has started.")
@click.option("--api-key", envvar="PAYMENTS_API_KEY", help="Without it, the demo merchant's.")
@coroutine
async def demo(target: str | None, api_key: str | None) -> None:
    """Authorize, repeat, capture, refund and decline a few payments, and show each answer."""
    from gateway.demo import run_demo

    settings = read_settings()
    state = local_state(settings)
    key = api_key or state.api_key
    if not key:
        fail("No API key: give --api-key, or start `python -m gateway run` first.")
    if not await run_demo(target or state.listen_address or settings.listen_address, key):
        fail("The demo did not go as it should; see above.")


@click.command()
@click.option(
    "--live", is_flag=True, help="Ask only whether it answers at all, not whether it serves."
)
def health(live: bool) -> None:
    """Ask the gateway of this host whether it serves, at GATEWAY_METRICS_ADDRESS.

    For engines whose health checks are commands: ends with status 0 where calls are served, 1 where
    they are not (starting, draining, no database), and prints why.
    """
    from gateway.probe import ask_health

    good, text = ask_health(read_settings().metrics_address, "livez" if live else "readyz")
    if not good:
        fail(text)
    click.echo(text)


@click.command()
@workers_option
@coroutine
async def doctor(workers: int | None) -> None:
    """Check settings, files, servers, durability and clock, and say what to do about each finding.

    May be run beside a gateway that serves. Where `serve` is given --workers, give it here, too:
    each worker has connections of its own. Exit status 1 where a finding is BAD.
    """
    from gateway.doctor import examine

    settings = read_settings(workers=workers)
    click.echo("ok    settings are valid")
    findings = await examine(settings, local_state(settings))
    for finding in findings:
        click.echo(f"{'ok   ' if finding.good else 'BAD  '} {finding.text}")
    if not all(finding.good for finding in findings):
        sys.exit(1)
