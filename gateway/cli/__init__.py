"""The command line: `python -m gateway COMMAND`."""

import click

from gateway import __version__
from gateway.cli import (
    accounts,
    changes,
    connectors,
    doubts,
    events,
    notifications,
    payments,
    routing,
    servers,
    tools,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """A payment gateway: gRPC in, payment service providers out.

    Everything is set by GATEWAY_* variables (docs/settings.md). Without a database of your own,
    `run` brings one.
    """


_COMMANDS: tuple[click.Command, ...] = (
    servers.serve,
    servers.worker,
    servers.run,
    servers.simulator,
    servers.migrate,
    servers.row_security,
    accounts.organisations,
    accounts.merchants,
    accounts.keys,
    accounts.identities,
    connectors.connectors,
    changes.changes,
    routing.routing,
    payments.payments,
    notifications.notifications,
    events.events,
    doubts.doubts,
    doubts.verify,
    tools.states,
    tools.demo,
    tools.health,
    tools.doctor,
)
for _command in _COMMANDS:
    main.add_command(_command)
