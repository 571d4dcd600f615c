"""What the commands share: settings, the database, options, and errors in one line."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import reduce, wraps
from pathlib import Path
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

import click

from gateway.local import LocalState, LocalStateUnusable, read_state
from gateway.settings import WORKERS_MAX, Settings, SettingsError, load_settings

REASON_CHARACTERS_MIN: Final = 10
REASON_CHARACTERS_MAX: Final = 1000
"""As ResolveInDoubtRequest.reason."""


P = ParamSpec("P")
R = TypeVar("R")
Command = TypeVar("Command", bound=Callable[..., Any])


def fail(message: str) -> NoReturn:
    """End with a message and exit status 1."""
    raise click.ClickException(message)


def read_settings(**overrides: object) -> Settings:
    """The settings; an override that is None is none."""
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return load_settings(**given)
    except SettingsError as error:
        fail(str(error))


def local_state(settings: Settings) -> LocalState:
    """What the gateway that `run` started here has left."""
    try:
        return read_state(Path(settings.embedded_dir))
    except LocalStateUnusable as error:
        fail(str(error))


def postgres_dsn(settings: Settings) -> str:
    """The DSN of the settings, or of the embedded PostgreSQL that runs now."""
    dsn = settings.postgres_dsn.get_secret_value()
    if dsn:
        return dsn
    dsn = local_state(settings).postgres_dsn
    if not dsn:
        fail(
            "No database: set GATEWAY_POSTGRES_DSN, or start the embedded one with "
            "`python -m gateway run` in another terminal."
        )
    return dsn


async def require_merchant(dsn: str, merchant: str | None) -> None:
    """Refuse an id that no merchant has: it would look like a merchant without payments.

    None is no id.
    """
    from storage.postgres.accounts import Accounts

    if merchant is not None:
        async with Accounts.connect(dsn) as accounts:
            await accounts.require_merchant(merchant)


def no_card_number(context: click.Context, option: click.Parameter, value: str) -> str:
    """Refuse an option's text that holds what looks like a card number; it would be stored."""
    from gateway.domain.pan import contains_pan

    if contains_pan(value):
        raise click.BadParameter("holds what looks like a card number", context, option)
    return value


def long_enough(context: click.Context, option: click.Parameter, value: str) -> str:
    """Refuse a reason that says nothing, or that would not be stored."""
    if not REASON_CHARACTERS_MIN <= len(value) <= REASON_CHARACTERS_MAX:
        raise click.BadParameter(
            f"the reason has {REASON_CHARACTERS_MIN} to {REASON_CHARACTERS_MAX} characters",
            context,
            option,
        )
    return no_card_number(context, option, value)


def one_line(text: str) -> str:
    """What a caller wrote, for a line of ours: it begins no other one, and commands no terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def login_name() -> str:
    """Who runs the command, as the audit records have it."""
    import getpass
    import os

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # as in a container, by a number that has no name
        name = str(os.getuid())
    return f"login:{one_line(name)}"


def point_in_time(text: str) -> Any:
    """A time that says where it is."""
    from datetime import datetime

    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{text!r} is no time as 2026-01-31T04:00+01:00.")
    if at.tzinfo is None:
        fail(f"{text!r} says no offset from UTC, as 2026-01-31T04:00+01:00 does.")
    return at


def option_group(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


workers_option = click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_MAX),
    metavar="N",
    help="Processes that serve the port together, by default GATEWAY_WORKERS, which is 1.",
)
merchant_option = click.option("--merchant", required=True, help="The merchant's id, mer_….")
mode_option = click.option("--mode", type=click.Choice(["test", "live"]), required=True)
reason_option = click.option(
    "--reason",
    required=True,
    callback=long_enough,
    help="Why, for the audit record: 10 characters or more.",
)


_NOT_MIGRATED: Final = (
    "The database lacks a table or column of this version: run `python -m gateway migrate` first."
)
_UNDEFINED: Final = ("42P01", "42703")  # the SQLSTATEs, which the text of a RowRefused names


def coroutine(command: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """Run a command's coroutine; what the database or a server refuses becomes one clear line."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import asyncpg

        from gateway.application.ports import StoreUnavailable
        from gateway.domain.errors import GatewayError
        from storage.postgres.errors import NotDurable, RowRefused, SchemaError

        try:
            return asyncio.run(command(*args, **kwargs))
        except GatewayError as error:
            fail(error.message)
        except StoreUnavailable as error:
            fail(f"{error}. See `python -m gateway doctor`.")
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            fail(_NOT_MIGRATED)
        except RowRefused as error:
            lacking = any(code in str(error) for code in _UNDEFINED)
            fail(_NOT_MIGRATED if lacking else f"{error}")
        except (NotDurable, SchemaError) as error:
            fail(f"{error}")
        except BrokenPipeError:
            raise  # as of `| head`: click ends without a word
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            fail(f"{type(error).__name__}: {error}")

    return run
