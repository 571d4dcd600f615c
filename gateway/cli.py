"""The command line: `python -m gateway COMMAND`."""

import asyncio
import math
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import reduce, wraps
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, ParamSpec, TypeVar, cast

import click

from gateway import __version__
from gateway.local import LocalState, read_state
from gateway.settings import WORKERS_MAX, Settings, SettingsError, load_settings

DOUBTS_PER_PAGE: Final = 200
SUSPENSIONS_SHOWN_MAX: Final = 200
CONSUMERS_SHOWN_MAX: Final = 1000
COSTS_SHOWN_MAX: Final = 100
REASON_CHARACTERS_MIN: Final = 10
REASON_CHARACTERS_MAX: Final = 1000
"""As ResolveInDoubtRequest.reason."""

SCOPES = (
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

RATE_PER_S_MIN, RATE_PER_S_MAX = 0.001, 100_000
RATE_BURST_MAX = 1_000_000
"""The bounds of a merchant's rate limit, as the table of merchants has them."""

P = ParamSpec("P")
R = TypeVar("R")
Command = TypeVar("Command", bound=Callable[..., Any])


def fail(message: str) -> NoReturn:
    """End with a message and exit status 1."""
    raise click.ClickException(message)


def _settings(**overrides: object) -> Settings:
    """The settings; an override that is None is none."""
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return load_settings(**given)
    except SettingsError as error:
        fail(str(error))


def _state(settings: Settings) -> LocalState:
    return read_state(Path(settings.embedded_dir))


def _postgres_dsn(settings: Settings) -> str:
    """The DSN of the settings, or of the embedded PostgreSQL that runs now."""
    dsn = settings.postgres_dsn.get_secret_value()
    if dsn:
        return dsn
    dsn = _state(settings).postgres_dsn
    if not dsn:
        fail(
            "No database: set GATEWAY_POSTGRES_DSN, or start the embedded one with "
            "`python -m gateway run` in another terminal."
        )
    return dsn


def _no_card_number(context: click.Context, option: click.Parameter, value: str) -> str:
    """Refuse an option's text that holds what looks like a card number; it would be stored."""
    from gateway.domain.pan import contains_pan

    if contains_pan(value):
        raise click.BadParameter("holds what looks like a card number", context, option)
    return value


def _long_enough(context: click.Context, option: click.Parameter, value: str) -> str:
    """Refuse a reason that says nothing, or that would not be stored."""
    if not REASON_CHARACTERS_MIN <= len(value) <= REASON_CHARACTERS_MAX:
        raise click.BadParameter(
            f"the reason has {REASON_CHARACTERS_MIN} to {REASON_CHARACTERS_MAX} characters",
            context,
            option,
        )
    return _no_card_number(context, option, value)


def _consumer(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse a name that the contract does not take either."""
    if value is None:
        return None
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise click.BadParameter(
            "a consumer's name has small letters, digits and ._-, at most 63", context, option
        )
    return _no_card_number(context, option, value)


def _login() -> str:
    """Who runs the command, as the audit records have it."""
    import getpass

    return f"login:{getpass.getuser()}"


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


_organisation = click.option("--organisation", required=True, help="The organisation's id, org_….")
_of_organisation = click.option("--organisation", help="Only those of this organisation.")
_name = click.option("--name", default="", callback=_no_card_number, help="A name for people.")
_merchant = click.option("--merchant", required=True, help="The merchant's id, mer_….")
_mode = click.option("--mode", type=click.Choice(["test", "live"]), required=True)
_why = click.option(
    "--reason",
    required=True,
    callback=_long_enough,
    help="Why, for the audit record: 10 characters or more.",
)


def _async(command: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """Run a command's coroutine; what the database or a server refuses becomes one clear line."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import asyncpg

        from gateway.application.ports import StoreUnavailable
        from gateway.domain.errors import GatewayError

        try:
            return asyncio.run(command(*args, **kwargs))
        except GatewayError as error:
            fail(error.message)
        except StoreUnavailable as error:
            fail(f"{error}. See `python -m gateway doctor`.")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            fail(f"{type(error).__name__}: {error}")

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """A payment gateway: gRPC in, payment service providers out.

    Everything is set by GATEWAY_* variables (docs/settings.md). Without a database of your own,
    `run` brings one.
    """


# --- servers --------------------------------------------------------------------------------------


_workers = click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_MAX),
    metavar="N",
    help="Processes that serve the port together, by default GATEWAY_WORKERS, which is 1.",
)


@main.command()
@_workers
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
    settings = _settings(workers=workers)
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


@main.command(hidden=True)
@click.argument("channel", type=int)
def worker(channel: int) -> None:
    """Serve as one of several workers.

    Not for people: `serve --workers` starts it, with the file descriptor of its channel.
    """
    from gateway.workers import work

    sys.exit(work(channel))


@main.command()
@_workers
def run(workers: int | None) -> None:
    """Run everything here: embedded PostgreSQL and Redis, a PSP simulator, and the gateway.

    Data last between runs, in GATEWAY_EMBEDDED_DIR. Servers that the settings name are used
    instead of embedded ones. Prints a demo merchant's key and a command to paste.
    """
    from gateway.composition import StartError, run_local

    try:
        run_local(_settings(workers=workers))
    except StartError as error:
        fail(str(error))


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulator(arguments: tuple[str, ...]) -> None:
    """Run the PSP simulator as a process of its own (docs/simulator.md)."""
    from gateway.connectors.simulator import server

    sys.exit(server.main(list(arguments)))


_login_option = click.option(
    "--login",
    help="The user that gateways connect as; without it that of the last time, then this one.",
)


@main.command()
@click.option(
    "--phase",
    type=click.Choice(["pre", "post", "all"]),
    default="all",
    show_default=True,
    help="pre: before the new version is deployed; post: after the last old one has gone.",
)
@_login_option
@_async
async def migrate(phase: str, login: str | None) -> None:
    """Bring the schema up to this version. Safe to repeat, and from several places at once.

    With GATEWAY_POSTGRES_ROW_SECURITY the tables that it adds are protected as by `row-security
    enable`; --login is then as there.
    """
    from storage.postgres import migrate as migrations
    from storage.postgres import row_security as security

    settings = _settings()
    dsn = _postgres_dsn(settings)
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


@main.group("row-security")
def row_security() -> None:
    """Row-level security in PostgreSQL, the second wall between merchants (docs/security.md)."""


@row_security.command("enable")
@_login_option
@_async
async def row_security_enable(login: str | None) -> None:
    """Create the roles and policies for GATEWAY_POSTGRES_ROW_SECURITY.

    As the tables' owner, who may create roles where there are none. Where `migrate` runs without
    the setting, run it again after each: a new table is protected by it. Safe to repeat, and
    gateways that run without the setting go on.
    """
    from storage.postgres import row_security as security

    await security.enable(_postgres_dsn(_settings()), login)
    click.echo("row-level security is enabled")


@row_security.command("disable")
@_async
async def row_security_disable() -> None:
    """Remove the policies. First restart all gateways without the setting."""
    from storage.postgres import row_security as security

    await security.disable(_postgres_dsn(_settings()))
    click.echo("row-level security is disabled")


# --- accounts -------------------------------------------------------------------------------------


@main.group()
def organisations() -> None:
    """Organisations: each has merchants and API keys."""


@organisations.command("create")
@click.option("--name", required=True, callback=_no_card_number, help="A name for people.")
@_async
async def organisations_create(name: str) -> None:
    """Create an organisation and print its id."""
    async with _accounts() as accounts:
        click.echo(await accounts.create_organisation(name))


@organisations.command("list")
@_async
async def organisations_list() -> None:
    """List the organisations."""
    async with _accounts() as accounts:
        for row in await accounts.list_organisations():
            click.echo(f"{row.organisation_id}  {row.name}")


@main.group()
def merchants() -> None:
    """Merchants: whose payments they are."""


@merchants.command("create")
@_organisation
@click.option("--name", required=True, callback=_no_card_number, help="A name for people.")
@click.option(
    "--card-like-order-ids",
    is_flag=True,
    help="Allow merchant_order_id to look like a card number; it is masked in logs.",
)
@_async
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
@_async
async def merchants_list(organisation: str | None) -> None:
    """List the merchants."""
    async with _accounts() as accounts:
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
@_async
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


_grant = _options(
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
    _mode,
    _name,
)
"""What every credential says of its principal, as the store takes it."""


@main.group()
def keys() -> None:
    """API keys: each names a principal, its scopes, its merchants and its mode."""


@keys.command("create")
@_grant
@click.option("--expires-in-days", type=click.IntRange(1, 3650), help="Without it: never.")
@_async
async def keys_create(organisation: str, expires_in_days: int | None, **grant: Any) -> None:
    """Create a key and print it. It is shown this once: only its hash is stored."""
    async with _accounts() as accounts:
        created = await accounts.create_key(organisation, expires_in_days=expires_in_days, **grant)
    click.echo(created.text)
    click.echo(f"key id {created.key_id}; keep the key above, it is not shown again", err=True)


@keys.command("list")
@_of_organisation
@_async
async def keys_list(organisation: str | None) -> None:
    """List the keys, without their secrets."""
    async with _accounts() as accounts:
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
@_async
async def keys_revoke(key_id: str) -> None:
    """Revoke a key. Gateways refuse it once their cache has aged (GATEWAY_AUTH_CACHE_LIFE_S)."""
    async with _accounts() as accounts:
        if not await accounts.revoke_key(key_id):
            fail(f"No key {key_id} that is not revoked already.")
    click.echo(f"revoked {key_id}")


@main.group()
def identities() -> None:
    """Identities in client certificates: each is a principal, as an API key is.

    They count where GATEWAY_CLIENT_IDENTITY says so (docs/security.md).
    """


@identities.command("add")
@click.argument("uri")
@_grant
@_async
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
@_async
async def identities_list(organisation: str | None) -> None:
    """List the identities."""
    async with _accounts() as accounts:
        for row in await accounts.list_identities(organisation):
            merchants = "all" if row.merchant_ids is None else ",".join(row.merchant_ids)
            scopes = ",".join(sorted(row.scopes))
            mode = row.mode.name.lower()
            click.echo(
                f"{row.uri}  {row.organisation_id}  {mode}  {scopes}  {merchants}  {row.name}"
            )


@identities.command("remove")
@click.argument("uri")
@_async
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

    return Accounts.connect(_postgres_dsn(_settings()))


# --- connectors -----------------------------------------------------------------------------------


@main.group()
def connectors() -> None:
    """Merchants' accounts at payment service providers (docs/connectors.md).

    Credentials are a JSON object, read from standard input or a file and never from an argument,
    and are stored encrypted (GATEWAY_CONNECTOR_KEYS).
    """


_credentials = click.option(
    "--credentials",
    "credentials_file",
    type=click.File("rb"),
    default="-",
    metavar="FILE",
    help='A file with the credentials, as {"secret_key": "…"}; standard input by default.',
)
CREDENTIALS_BYTES_MAX = 16 * 1024


def _read_credentials(file: Any) -> dict[str, str]:
    import orjson

    text = file.read(CREDENTIALS_BYTES_MAX + 1)
    try:
        credentials = orjson.loads(text) if len(text) <= CREDENTIALS_BYTES_MAX else None
    except orjson.JSONDecodeError:
        credentials = None
    if not isinstance(credentials, dict) or not all(
        isinstance(value, str) for value in credentials.values()
    ):
        # Not shown, not even in part.
        fail("The credentials are no JSON object of texts.")
    return credentials


def _kind(settings: Settings, name: str) -> Any:
    from gateway.connectors.configured import ConnectorsMisconfigured, configured_kinds

    try:
        kinds = {kind.name: kind for kind in configured_kinds(settings)}
    except ConnectorsMisconfigured as error:
        fail(str(error))
    if name not in kinds:
        fail(f"There is no connector {name!r}; there are: {', '.join(sorted(kinds))}.")
    return kinds[name]


def _warn_of_silence(kind: Any, credentials: dict[str, str]) -> None:
    """Of an account whose operations would never end."""
    from gateway.connectors.notifications import WEBHOOK_SECRETS

    if kind.widest.tells_by_notification and not credentials.get(WEBHOOK_SECRETS):
        click.echo(
            f"Without `{WEBHOOK_SECRETS}` the gateway is never told what became of captures, voids"
            " and refunds: they stay PENDING.",
            err=True,
        )


def _wrapping_keys(settings: Settings) -> Any:
    from gateway.connectors.configured import ConnectorsMisconfigured, configured_keys

    try:
        keys = configured_keys(settings)
    except ConnectorsMisconfigured as error:
        fail(str(error))
    if keys is None:
        fail(
            "No wrapping keys: set GATEWAY_CONNECTOR_KEYS or GATEWAY_CONNECTOR_KEYS_FILE, here and "
            "for the gateways. `gateway connectors new-key ID` makes a key."
        )
    return keys


def _connector_accounts(settings: Settings) -> Any:
    from storage.postgres import ConnectorAccounts

    return ConnectorAccounts.connect(_postgres_dsn(settings))


@connectors.command("new-key")
@click.argument("key_id")
def connectors_new_key(key_id: str) -> None:
    """Make a wrapping key named KEY_ID and print it. Nothing stores it."""
    from gateway.connectors.sealing import new_wrapping_key

    try:
        click.echo(new_wrapping_key(key_id))
    except ValueError:
        fail("A key's id is 1 to 64 letters, digits, `_`, `.` or `-`.")


@connectors.command("add")
@_merchant
@click.option("--connector", required=True, help="The PSP, as `stripe`.")
@_mode
@click.option(
    "--priority",
    type=click.IntRange(0, 1_000_000),
    default=100,
    show_default=True,
    help="New payments go to the enabled account of the lowest number.",
)
@click.option(
    "--capabilities",
    default="{}",
    help="What the account can do where that is not the usual, as JSON (docs/connectors.md).",
)
@_credentials
@_async
async def connectors_add(
    merchant: str,
    connector: str,
    mode: str,
    priority: int,
    capabilities: str,
    credentials_file: Any,
) -> None:
    """Add an account and print its id.

    Gateways use it once they have read it (GATEWAY_CONNECTOR_ACCOUNTS_INTERVAL_S).
    """
    import orjson

    from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
    from gateway.connectors.kinds import AccountRefused
    from gateway.connectors.sealing import seal
    from gateway.domain.ids import new_connector_account_id
    from gateway.domain.model import Mode

    settings = _settings()
    keys = _wrapping_keys(settings)
    kind = _kind(settings, connector)
    try:
        told = orjson.loads(capabilities)
    except orjson.JSONDecodeError:
        told = None
    if not isinstance(told, dict):
        fail("The capabilities are no JSON object.")
    credentials = _read_credentials(credentials_file)
    account = ConnectorAccount(
        merchant_id=merchant,
        account_id=new_connector_account_id(),
        mode=Mode[mode.upper()],
        connector=connector,
        sealed=Sealed(b"", WrappedKey("", b"")),
        priority=priority,
        capabilities=told,
    )
    try:
        kind.check(account.mode, credentials, told)
    except AccountRefused as error:
        fail(f"The account cannot be used: {error}.")
    account = replace(account, sealed=await seal(credentials, account.context, keys))
    async with _connector_accounts(settings) as accounts:
        await accounts.add(account)
    _warn_of_silence(kind, credentials)
    click.echo(account.account_id)


@connectors.command("list")
@click.option("--merchant", help="Only those of this merchant.")
@_async
async def connectors_list(merchant: str | None) -> None:
    """List the accounts, without their credentials."""
    async with _connector_accounts(_settings()) as accounts:
        for row in await accounts.list(merchant):
            click.echo(
                "  ".join(
                    (
                        row.account_id,
                        row.merchant_id,
                        row.connector,
                        row.mode.name.lower(),
                        f"priority {row.priority}",
                        "enabled" if row.enabled else "disabled",
                        f"key {row.sealed.data_key.key_id}",
                    )
                )
            )


@connectors.command("disable")
@_merchant
@click.argument("account_id")
@_async
async def connectors_disable(merchant: str, account_id: str) -> None:
    """Give an account no new payments. Those that it has can be captured, voided and refunded."""
    await _change_account(merchant, account_id, enabled=False)


@connectors.command("enable")
@_merchant
@click.argument("account_id")
@_async
async def connectors_enable(merchant: str, account_id: str) -> None:
    """Give a disabled account new payments again."""
    await _change_account(merchant, account_id, enabled=True)


async def _change_account(merchant: str, account_id: str, *, enabled: bool) -> None:
    async with _connector_accounts(_settings()) as accounts:
        if await accounts.change(merchant, account_id, enabled=enabled) is None:
            fail(_no_account(merchant, account_id))
    click.echo(f"{'enabled' if enabled else 'disabled'} {account_id}")


@connectors.command("rotate")
@_merchant
@click.argument("account_id")
@_credentials
@_async
async def connectors_rotate(merchant: str, account_id: str, credentials_file: Any) -> None:
    """Replace an account's credentials. Gateways take them over without a restart."""
    from gateway.connectors.kinds import AccountRefused
    from gateway.connectors.sealing import seal

    settings = _settings()
    keys = _wrapping_keys(settings)
    credentials = _read_credentials(credentials_file)
    async with _connector_accounts(settings) as accounts:
        account = await accounts.find(merchant, account_id)
        if account is None:
            fail(_no_account(merchant, account_id))
        kind = _kind(settings, account.connector)
        try:
            kind.check(account.mode, credentials, account.capabilities)
        except AccountRefused as error:
            fail(f"The account cannot be used: {error}.")
        sealed = await seal(credentials, account.context, keys)
        if await accounts.replace_credentials(merchant, account_id, sealed) is None:
            fail(_no_account(merchant, account_id))
    _warn_of_silence(kind, credentials)
    click.echo(f"rotated {account_id}")


@connectors.command("remove")
@_merchant
@click.argument("account_id")
@_async
async def connectors_remove(merchant: str, account_id: str) -> None:
    """Delete an account's credentials. Nothing can be done to its payments any more."""
    async with _connector_accounts(_settings()) as accounts:
        if await accounts.remove(merchant, account_id) is None:
            fail(_no_account(merchant, account_id))
    click.echo(f"removed {account_id}")


@connectors.command("rewrap")
@_async
async def connectors_rewrap() -> None:
    """Wrap all data keys with the first wrapping key. Then the others are no longer needed."""
    from gateway.application.connector_accounts import KeyServiceError
    from gateway.connectors.sealing import rewrap

    settings = _settings()
    keys = _wrapping_keys(settings)
    rewrapped, failed = 0, 0
    async with _connector_accounts(settings) as accounts:
        for account in await accounts.list():
            if account.sealed.data_key.key_id == keys.current_key_id:
                continue
            try:
                sealed = await rewrap(account.sealed, account.context, keys)
            except KeyServiceError as error:
                failed += 1
                click.echo(f"{account.account_id}: {error}", err=True)
                continue
            rewrapped += await accounts.rewrap(account, sealed)
    click.echo(f"{rewrapped} accounts are wrapped with {keys.current_key_id} now")
    if failed:
        fail(f"{failed} accounts could not be opened; keep their keys.")


def _no_account(merchant: str, account_id: str) -> str:
    return f"The merchant {merchant} has no account {account_id}."


# --- routing --------------------------------------------------------------------------------------


@main.group()
def routing() -> None:
    """Routing rules: where a merchant's payments go (docs/routing.md)."""


_rules_file = click.argument("file", type=click.File("r", encoding="utf-8"))


def _author(reason: str) -> Any:
    from gateway.application.routing_administration import Author

    return Author(_login(), reason)


def _rules_text(file: Any) -> str:
    from gateway.domain.pan import contains_pan

    try:
        text = str(file.read())
    except UnicodeDecodeError:
        fail("The file is not UTF-8.")
    if contains_pan(text):
        fail("The file holds what looks like a card number.")
    return text


def _show_problems(problems: Iterable[tuple[str, str]], kind: str) -> None:
    for path, text in problems:
        click.echo(f"{kind}: {path}: {text}", err=True)


@asynccontextmanager
async def _routing(merchant: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    """The store of rules, and decisions and administration by the merchant's accounts."""
    from gateway.application.routing import Routing
    from gateway.application.routing_administration import RoutingAdministration
    from gateway.connectors.configured import ConnectorsMisconfigured, configured_kinds
    from gateway.routing_report import DescribedAccounts
    from storage.postgres import RoutingRules

    settings = _settings()
    try:
        kinds = configured_kinds(settings)
    except ConnectorsMisconfigured as error:
        fail(str(error))
    async with _connector_accounts(settings) as accounts:
        router = DescribedAccounts(await accounts.list(merchant), kinds, settings.simulator_profile)
    decisions = Routing(router)
    async with RoutingRules.connect(_postgres_dsn(settings)) as store:
        yield store, decisions, RoutingAdministration(store, router, decisions)


def _refused_rules(error: Any) -> NoReturn:
    """End with everything that is wrong with a file, or with the error's own text."""
    _show_problems(((each.field, each.description) for each in error.violations), "error")
    fail(error.message)


@routing.command("validate")
@_rules_file
@click.option("--merchant", help="Compare with this merchant's accounts, too.")
@click.option("--mode", type=click.Choice(["test", "live"]), help="With --merchant.")
@_async
async def routing_validate(file: Any, merchant: str | None, mode: str | None) -> None:
    """Check a file of rules. Exit status 1 where it cannot be used."""
    from gateway.domain.errors import GatewayError
    from gateway.domain.model import Mode
    from gateway.routing.rule_file import RulesInvalid, read_rules

    text = _rules_text(file)
    if (merchant is None) != (mode is None):
        fail("Say both --merchant and --mode, or neither.")
    try:
        if merchant is None or mode is None:
            warnings = read_rules(text).warnings
        else:
            async with _routing(merchant) as (_, _, administration):
                warnings = administration.check(merchant, Mode[mode.upper()], text).warnings
    except RulesInvalid as error:
        _show_problems(error.problems, "error")
        fail("The routing rules cannot be used.")
    except GatewayError as error:
        _refused_rules(error)
    _show_problems(warnings, "warning")
    click.echo("the rules can be used")


@routing.command("put")
@_rules_file
@_merchant
@_mode
@_why
@click.option("--activate", is_flag=True, help="Put the version into force at once.")
@_async
async def routing_put(file: Any, merchant: str, mode: str, reason: str, activate: bool) -> None:
    """Keep a file of rules as a new version and print its number."""
    from gateway.domain.errors import GatewayError
    from gateway.domain.model import Mode

    text, author = _rules_text(file), _author(reason)
    async with _routing(merchant) as (_, _, administration):
        try:
            version, checked = await administration.put(
                merchant, Mode[mode.upper()], text, author, activate=activate
            )
        except GatewayError as error:
            _refused_rules(error)
    _show_problems(checked.warnings, "warning")
    click.echo(version)


@routing.command("list")
@_merchant
@_mode
@_async
async def routing_list(merchant: str, mode: str) -> None:
    """List the versions of a merchant's rules, the newest first: who, when, why."""
    from gateway.application.routing_administration import PAGE_SIZE_DEFAULT
    from gateway.domain.model import Mode

    before: int | None = None
    async with _routing(merchant) as (_, _, administration):
        while True:
            page = await administration.versions(
                merchant, Mode[mode.upper()], before_version=before, page_size=PAGE_SIZE_DEFAULT
            )
            for each in page:
                state = "never in force"
                if each.activated_at is not None:
                    state = f"{'in force since' if each.active else 'last in force from'} "
                    state += f"{each.activated_at:%Y-%m-%dT%H:%M:%SZ} by {each.activated_by}"
                    state += f": {each.activation_reason}"
                click.echo(
                    f"{each.version}  {each.created_at:%Y-%m-%dT%H:%M:%SZ}  {each.created_by}  "
                    f"{each.reason}  ({state})"
                )
            if len(page) < PAGE_SIZE_DEFAULT:
                return
            before = page[-1].version


@routing.command("show")
@_merchant
@_mode
@click.option("--version", type=click.IntRange(1), help="Without it: the one in force.")
@_async
async def routing_show(merchant: str, mode: str, version: int | None) -> None:
    """Print a version's file."""
    from gateway.domain.model import Mode

    async with _routing(merchant) as (_, _, administration):
        found = await administration.get(merchant, Mode[mode.upper()], version or 0)
    click.echo(found.text, nl=not found.text.endswith("\n"))


@routing.command("activate")
@click.argument("version", type=click.IntRange(0))
@_merchant
@_mode
@_why
@_async
async def routing_activate(version: int, merchant: str, mode: str, reason: str) -> None:
    """Put a version into force; 0: none, payments go where they would without rules.

    Gateways follow within GATEWAY_CONNECTOR_ACCOUNTS_INTERVAL_S.
    """
    from gateway.domain.errors import GatewayError
    from gateway.domain.model import Mode

    author = _author(reason)
    async with _routing(merchant) as (_, _, administration):
        try:
            before = await administration.activate(merchant, Mode[mode.upper()], version, author)
        except GatewayError as error:
            _refused_rules(error)
    click.echo(f"in force: {version or 'none'}; before: {before or 'none'}")


@routing.command("explain")
@_merchant
@_mode
@click.option("--amount-minor", type=click.IntRange(0, 10**12), required=True)
@click.option("--currency", required=True, help="ISO 4217, as EUR.")
@click.option("--scheme", default="", help="The card scheme, as visa.")
@click.option("--bin", "bin_", default="", help="The card number's first 6 to 8 digits.")
@click.option("--issuer-country", default="", help="ISO 3166-1 alpha-2, as DE.")
@click.option(
    "--card-type", type=click.Choice(["credit", "debit", "prepaid", "commercial"]), default=None
)
@click.option(
    "--method",
    default="card",
    show_default=True,
    help="As rules name it: card, network_token, or a redirect's method_type, as ideal.",
)
@click.option(
    "--channel",
    type=click.Choice(["ECOMMERCE", "MAIL_ORDER", "TELEPHONE_ORDER"]),
    default="ECOMMERCE",
    show_default=True,
)
@click.option("--customer", default="", callback=_no_card_number, help="The customer's id.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Repeat for several.")
@click.option("--payment-id", default="", help="Whose place in splits; without it, a new one's.")
@click.option(
    "--file", type=click.File("r", encoding="utf-8"), help="A file instead of what is in force."
)
@_async
async def routing_explain(
    merchant: str,
    mode: str,
    amount_minor: int,
    currency: str,
    scheme: str,
    bin_: str,
    issuer_country: str,
    card_type: str | None,
    method: str,
    channel: str,
    customer: str,
    metadata: tuple[str, ...],
    payment_id: str,
    file: Any,
) -> None:
    """Tell where a payment would go, and why, as JSON.

    Breakers and what was learned are a gateway's: RoutingService.ExplainRoute knows them.
    """
    from google.protobuf.json_format import MessageToJson
    from payments.v1.payment_method_pb2 import CAPTURE_METHOD_MANUAL, CardType, Channel
    from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

    from gateway.application.ports import CARD, NETWORK_TOKEN
    from gateway.domain.errors import GatewayError
    from gateway.domain.ids import new_payment_id
    from gateway.domain.model import Mode
    from gateway.rpc import conversion, validation

    request = AuthorizePaymentRequest(idempotency_key="explain")
    request.amount.amount_minor = amount_minor
    request.amount.currency_code = currency
    request.capture_method = CAPTURE_METHOD_MANUAL  # possible for every amount
    if method == CARD:
        request.payment_method.token = "tok_explain"  # noqa: S105 - no token of anybody's
    elif method == NETWORK_TOKEN:
        request.payment_method.network_token.token_reference = "explain"  # noqa: S105 - likewise
    else:
        request.payment_method.redirect.method_type = method
        request.return_url = "https://explain.invalid/"
    hints = request.payment_method.card_hints
    hints.scheme, hints.bin, hints.issuer_country = scheme, bin_, issuer_country
    if card_type is not None:
        hints.card_type = CardType.Value(f"CARD_TYPE_{card_type.upper()}")
    request.channel = Channel.Value(f"CHANNEL_{channel}")
    request.customer_id = customer
    for each in metadata:
        key, sign, value = each.partition("=")
        if not sign:
            fail(f"--metadata {each} is not KEY=VALUE.")
        request.metadata[key] = value
    caller = conversion.Caller(merchant_id=merchant, mode=Mode[mode.upper()])
    async with _routing(merchant) as (_, _, administration):
        try:
            validation.refuse_card_numbers(request, None)
            validation.validate(request)
            explained = await administration.explain(
                conversion.to_authorize(request, caller),
                payment_id or new_payment_id(),
                text="" if file is None else _rules_text(file),
            )
        except GatewayError as error:
            _refused_rules(error)
    route = conversion.route_message(explained.plan.decision)
    click.echo(MessageToJson(route, preserving_proto_field_name=True))
    if explained.refusal is not None:
        fail(explained.refusal.message)


@routing.command("simulate")
@_rules_file
@_merchant
@_mode
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True)
@click.option(
    "--payments-max",
    type=click.IntRange(1, 1_000_000),
    default=100_000,
    show_default=True,
    help="At most so many, the newest.",
)
@_async
async def routing_simulate(
    file: Any, merchant: str, mode: str, days: int, payments_max: int
) -> None:
    """Tell where the merchant's past payments would have gone by a file of rules."""
    from gateway.domain.errors import GatewayError
    from gateway.domain.model import Mode
    from gateway.routing_report import describe, simulate

    text = _rules_text(file)
    which = Mode[mode.upper()]
    async with _routing(merchant) as (store, decisions, administration):
        try:
            checked = administration.check(merchant, which, text)
        except GatewayError as error:
            _refused_rules(error)
        _show_problems(checked.warnings, "warning")
        past = await store.past_payments(merchant, which, days=days, payments_max=payments_max)
    for line in describe(simulate(checked.file.rules, decisions, merchant, which, past)):
        click.echo(line)


# --- what nothing is sent to ----------------------------------------------------------------------


_suspended = _options(
    click.option("--connector", help="All accounts of a connector, of every merchant."),
    click.option("--merchant", help="The merchant of `--account`."),
    click.option("--account", "account_id", help="One account, acc_…."),
    click.option(
        "--method",
        default="",
        metavar="METHOD",
        help="Only new payments by this method, as `card`. Without it nothing is sent at all.",
    ),
)


def _controls(settings: Settings) -> Any:
    from storage.postgres import RoutingControls

    return RoutingControls.connect(_postgres_dsn(settings))


async def _suspend(
    kind: str,
    *,
    connector: str | None,
    merchant: str | None,
    account_id: str | None,
    reason: str,
    **when: Any,
) -> None:
    """Store a suspension and print its id; the rest is as the store takes it."""
    from gateway.routing.availability import SuspensionKind

    if bool(connector) == bool(merchant or account_id) or bool(merchant) != bool(account_id):
        fail("Say either --connector, or --merchant and --account.")
    of: dict[str, Any] = {"connector": connector}
    if account_id:
        async with _connector_accounts(_settings()) as accounts:
            account = await accounts.find(merchant, account_id)
        if account is None:
            fail(_no_account(str(merchant), account_id))
        of = {"connector": account.connector, "merchant_id": merchant, "account_id": account_id}
    async with _controls(_settings()) as controls:
        suspension = await controls.suspend(
            SuspensionKind[kind], **of, **when, reason=reason, created_by=_login()
        )
    click.echo(suspension.suspension_id)


@connectors.command("kill")
@_suspended
@_why
@_async
async def connectors_kill(**of: Any) -> None:
    """Send nothing to an account or a connector any more, until `revive`. Prints the switch's id.

    New payments, captures, voids and refunds are refused before anything is written; recovery goes
    on asking about what was sent. Gateways know it after GATEWAY_CONNECTOR_ACCOUNTS_INTERVAL_S.
    """
    await _suspend("KILL", **of)


@connectors.command("maintenance")
@_suspended
@click.option("--from", "begins", metavar="TIME", help="ISO 8601 with an offset; now without it.")
@click.option("--until", "ends", required=True, metavar="TIME", help="ISO 8601 with an offset.")
@_why
@_async
async def connectors_maintenance(begins: str | None, ends: str, **of: Any) -> None:
    """Send nothing to an account or a connector for a time. Prints the window's id."""
    from datetime import UTC, datetime

    begins_at = _time(begins) if begins else None
    ends_at = _time(ends)
    if ends_at <= (begins_at or datetime.now(UTC)):
        fail("The window ends before it begins.")
    await _suspend("MAINTENANCE", **of, begins_at=begins_at, ends_at=ends_at)


def _time(text: str) -> Any:
    from datetime import datetime

    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{text!r} is no time as 2026-01-31T04:00+01:00.")
    if at.tzinfo is None:
        fail(f"{text!r} says no offset from UTC, as 2026-01-31T04:00+01:00 does.")
    return at


@connectors.command("revive")
@click.argument("suspension_id")
@_why
@_async
async def connectors_revive(suspension_id: str, reason: str) -> None:
    """End a kill switch or a maintenance window, which stays in the audit."""
    async with _controls(_settings()) as controls:
        ended = await controls.end_suspension(suspension_id, reason=reason, ended_by=_login())
    if ended is None:
        fail(f"No suspension {suspension_id} that has not ended.")
    click.echo(f"revived {suspension_id}")


@connectors.command("suspensions")
@click.option("--all", "everything", is_flag=True, help="Those that are over too.")
@_async
async def connectors_suspensions(everything: bool) -> None:
    """List kill switches and maintenance windows, with who decided so and why."""
    async with _controls(_settings()) as controls:
        if not everything:
            for each in await controls.suspensions():
                click.echo(_suspension_line(each))
            return
        for stored in await controls.all_suspensions(SUSPENSIONS_SHOWN_MAX):
            ended = (
                f"  ended {stored.ended_at:%Y-%m-%dT%H:%M:%SZ} by {stored.ended_by}: "
                f"{stored.ended_reason}"
                if stored.ended_at
                else ""
            )
            click.echo(_suspension_line(stored.suspension) + ended)


def _suspension_line(each: Any) -> str:
    ends = f"{each.ends_at:%Y-%m-%dT%H:%M:%SZ}" if each.ends_at else "revived"
    return "  ".join(
        (
            each.suspension_id,
            each.kind.name.lower(),
            each.connector,
            each.account_id or "every account",
            each.method or "everything",
            f"from {each.begins_at:%Y-%m-%dT%H:%M:%SZ} until {ends}",
            f"by {each.created_by}: {each.reason}",
        )
    )


# --- what accounts cost ---------------------------------------------------------------------------


@connectors.group("costs")
def connector_costs() -> None:
    """What a merchant's accounts cost, for routing by margin (docs/routing.md)."""


def _read_costs(path: Path) -> str:
    from gateway.routing.costs import TEXT_CHARACTERS_MAX, CostsRefused, parse_costs

    with path.open("rb") as file:
        content = file.read(4 * TEXT_CHARACTERS_MAX + 1)
    try:
        text = content.decode("utf-8")
        parse_costs(text)
    except UnicodeDecodeError:
        fail(f"{path}: no UTF-8")
    except CostsRefused as error:
        fail(f"{path}: {error}")
    return text


_costs_file = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))


@connector_costs.command("validate")
@_costs_file
def connector_costs_validate(file: Path) -> None:
    """Say whether a file of fees can be used."""
    _read_costs(file)
    click.echo(f"{file} can be used")


@connector_costs.command("put")
@_merchant
@_costs_file
@_why
@_async
async def connector_costs_put(merchant: str, file: Path, reason: str) -> None:
    """Store the next version of a merchant's fees; an empty file ends them.

    Gateways know it after GATEWAY_CONNECTOR_ACCOUNTS_INTERVAL_S.
    """
    from gateway.routing.costs import parse_costs

    text = _read_costs(file)
    named = {account_id for account_id, _ in parse_costs(text).fees}
    settings = _settings()
    async with _connector_accounts(settings) as accounts:
        unknown = named - {row.account_id for row in await accounts.list(merchant)}
    if unknown:
        fail(_no_account(merchant, min(unknown)))
    async with _controls(settings) as controls:
        stored = await controls.put_costs(merchant, text, reason=reason, created_by=_login())
    click.echo(f"version {stored.version} of the costs of {merchant}")


@connector_costs.command("show")
@_merchant
@click.option("--versions", is_flag=True, help="Who put which version, and why, instead.")
@_async
async def connector_costs_show(merchant: str, versions: bool) -> None:
    """Print a merchant's fees."""
    async with _controls(_settings()) as controls:
        rows = await controls.costs_of(merchant, COSTS_SHOWN_MAX if versions else 1)
    if not versions:
        click.echo(rows[0].body if rows else "", nl=False)
        return
    for row in rows:
        click.echo(
            f"{row.version}  {row.created_at:%Y-%m-%dT%H:%M:%SZ}  {row.created_by}: {row.reason}"
        )


# --- looking --------------------------------------------------------------------------------------


@main.group()
def payments() -> None:
    """Look at payments in the database."""


@payments.command("show")
@click.argument("payment_id")
@_merchant
@_async
async def payments_show(payment_id: str, merchant: str) -> None:
    """Print a payment, its operations and their attempts as JSON."""
    from google.protobuf.json_format import MessageToJson
    from payments.v1.payment_service_pb2 import GetPaymentResponse

    from gateway.rpc.conversion import encode_aggregate
    from storage.postgres import open_reader

    async with open_reader(_postgres_dsn(_settings())) as store:
        aggregate = await store.load(merchant, payment_id)
    if aggregate is None:
        fail(f"The merchant {merchant} has no payment {payment_id}.")
    shown = GetPaymentResponse.FromString(encode_aggregate(aggregate))
    click.echo(MessageToJson(shown, preserving_proto_field_name=True))


# --- administration -------------------------------------------------------------------------------


@main.group()
def notifications() -> None:
    """What PSPs told of a merchant's payments (docs/notifications.md)."""


_event = click.argument("event_id", metavar="EVENT_ID")


def _notifications() -> Any:
    from storage.postgres import Notifications

    return Notifications.connect(_postgres_dsn(_settings()))


def _no_notification(merchant: str, event_id: str) -> str:
    return f"Merchant {merchant} has no notification {event_id}."


@notifications.command("list")
@_merchant
@click.option("--pending", is_flag=True, help="Only those that are yet to be applied.")
@click.option(
    "--result",
    type=click.Choice(["applied", "no-news", "recorded", "unknown", "unmatched"]),
    help="Only those of which this became.",
)
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many."
)
@_async
async def notifications_list(merchant: str, pending: bool, result: str | None, limit: int) -> None:
    """List them, the newest first."""
    from gateway.application.notifications import Result

    wanted = None if result is None else Result[result.upper().replace("-", "_")]
    async with _notifications() as store:
        for each in await store.list(merchant, limit=limit, pending_only=pending, result=wanted):
            told = each.received.notification
            click.echo(
                "  ".join(
                    (
                        f"{each.received_at:%Y-%m-%dT%H:%M:%SZ}",
                        told.event_id,
                        told.connector,
                        each.received.connector_account_id,
                        told.event_type,
                        told.kind.name,
                        "PENDING" if each.result is None else each.result.name,
                        each.payment_id or "-",
                    )
                )
            )


@notifications.command("show")
@_merchant
@_event
@_async
async def notifications_show(merchant: str, event_id: str) -> None:
    """Show what is stored of one, by the PSP's id, as JSON."""
    import orjson

    from storage.postgres.notifications import notification_json

    async with _notifications() as store:
        found = await store.find(merchant, event_id)
    if not found:
        fail(_no_notification(merchant, event_id))
    for each in found:
        document = {
            "connector_account_id": each.received.connector_account_id,
            "received_at": each.received_at.isoformat(),
            "result": None if each.result is None else each.result.name,
            "applied_at": None if each.applied_at is None else each.applied_at.isoformat(),
            "payment_id": each.payment_id,
            "operation_id": each.operation_id,
            "notification": orjson.loads(notification_json(each.received.notification)),
        }
        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


@notifications.command("apply")
@_merchant
@_event
@_async
async def notifications_apply(merchant: str, event_id: str) -> None:
    """Have a running gateway apply one now, again if need be: twice has the effect of once."""
    async with _notifications() as store:
        if not await store.apply_again(merchant, event_id):
            fail(_no_notification(merchant, event_id))
    click.echo(f"{event_id} is due")


@main.group()
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

    settings = _settings()
    schedule = Schedule(
        poll_s_min=settings.events_poll_ms_min / 1000,
        poll_s_max=settings.events_poll_ms_max / 1000,
        heartbeat_s=settings.events_heartbeat_s,
        kept_bytes_max=settings.events_kept_bytes_max,
    )
    async with OutboxEvents.connect(_postgres_dsn(settings)) as store:
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
@_mode
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
@_async
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
@_async
async def events_consumers() -> None:
    """List all consumers: how far they are behind, and when they moved last."""
    from gateway.application.events import encode_cursor
    from storage.postgres import OutboxEvents

    async with OutboxEvents.connect(_postgres_dsn(_settings())) as store:
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
@_mode
@_consumer_organisation
@click.option("--to", "place", required=True, help="`beginning`, `latest` or a cursor.")
@_why
@_async
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
        await streams.acknowledge(name, found.merchant_ids, cursor, Reset(_login(), reason))
    click.echo(f"{consumer} is at {encode_cursor(position)}")


@events.command("delete")
@click.argument("consumer", callback=_consumer)
@_mode
@_consumer_organisation
@_async
async def events_delete(consumer: str, mode: str, organisation: str) -> None:
    """Forget a consumer and its position."""
    name = _consumer_name(organisation, mode, consumer)
    async with _events() as streams:
        found = await _stored_consumer(streams, name)
        await streams.delete_consumer(name, found.merchant_ids)
    click.echo(f"{consumer} is deleted")


@main.group()
def doubts() -> None:
    """Operations whose outcome is unknown, of all merchants (docs/operations.md)."""


@doubts.command("list")
@click.option("--merchant", "merchant_id", help="Only those of this merchant.")
@click.option("--needs-person", is_flag=True, help="Only those that recovery leaves to a person.")
@_async
async def doubts_list(merchant_id: str | None, needs_person: bool) -> None:
    """List the doubts, the oldest first: what to ask the PSP about, and what recovery does."""
    from datetime import UTC, datetime

    from gateway.application.administration import AdminFilter
    from storage.postgres import open_reader

    merchants = None if merchant_id is None else frozenset({merchant_id})
    page_of = AdminFilter(merchants, None, DOUBTS_PER_PAGE)
    now = datetime.now(UTC)
    async with open_reader(_postgres_dsn(_settings())) as store:
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
@_merchant
@click.option(
    "--outcome",
    required=True,
    type=click.Choice(["took-effect", "no-effect", "declined", "failed", "canceled"]),
    help="What the PSP says became of it.",
)
@click.option(
    "--connector-transaction-id", default="", callback=_no_card_number, help="The PSP's id of it."
)
@click.option(
    "--amount-reported-minor",
    type=click.IntRange(0, 10**12),
    help="The PSP's amount in minor units, where it differs.",
)
@click.option(
    "--reason",
    required=True,
    callback=_long_enough,
    help="How it was found out, for the audit record: 10 characters or more.",
)
@_async
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
    from gateway.application.ports import Resolution
    from gateway.application.usecases import DatabaseClock, Outcomes
    from gateway.domain.model import DoubtOutcome
    from gateway.rpc.conversion import ContractEncoder
    from storage.postgres import open_reader

    operation_id, _, number = reference.rpartition("-")
    if not (operation_id and number.isascii() and number.isdecimal() and len(number) < 10):
        raise click.BadParameter("an attempt's reference, op_…-1")
    async with open_reader(_postgres_dsn(_settings())) as store:
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
                resolved_by=_login(),
            ),
        )
    said = "decided before: " if resolved.replayed else ""
    click.echo(f"{said}{operation_id} is {resolved.found.operation.state.name}")


@main.command()
@click.option("--merchant", "merchant_id", help="Only the payments of this merchant.")
@click.option(
    "--psp-journal",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The simulator's journal, to compare with.",
)
@_async
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

    merchants = None if merchant_id is None else frozenset({merchant_id})
    async with open_reader(_postgres_dsn(_settings())) as store:
        try:
            good = await verify_all(store.audit, AdminFilter(merchants, None, 0), psp_journal)
        except JournalError as error:
            fail(str(error))
    if not good:
        sys.exit(1)


@main.command()
@click.option("--markdown", is_flag=True, help="As docs/states.md has it.")
def states(markdown: bool) -> None:
    """Print the transition tables and what may run beside what."""
    from gateway.domain import tables

    click.echo(tables.markdown() if markdown else tables.text())


@main.command()
@click.option("--target", help="host:port; without it, the gateway that `run` has started.")
@click.option("--api-key", envvar="PAYMENTS_API_KEY", help="Without it, the demo merchant's.")
@_async
async def demo(target: str | None, api_key: str | None) -> None:
    """Authorize, repeat, capture, refund and decline a few payments, and show each answer."""
    from gateway.demo import run_demo

    settings = _settings()
    state = _state(settings)
    key = api_key or state.api_key
    if not key:
        fail("No API key: give --api-key, or start `python -m gateway run` first.")
    if not await run_demo(target or state.listen_address or settings.listen_address, key):
        fail("The demo did not go as it should; see above.")


@main.command()
@click.option(
    "--live", is_flag=True, help="Ask only whether it answers at all, not whether it serves."
)
def health(live: bool) -> None:
    """Ask the gateway of this host whether it serves, at GATEWAY_METRICS_ADDRESS.

    For engines whose health checks are commands: ends with status 0 where calls are served, 1 where
    they are not (starting, draining, no database), and prints why.
    """
    from gateway.probe import ask_health

    good, text = ask_health(_settings().metrics_address, "livez" if live else "readyz")
    if not good:
        fail(text)
    click.echo(text)


@main.command()
@_async
async def doctor() -> None:
    """Check settings, files, servers, durability and clock, and say what to do about each finding.

    May be run beside a gateway that serves. Exit status 1 where a finding is BAD.
    """
    from gateway.doctor import examine

    settings = _settings()
    click.echo("ok    settings are valid")
    findings = await examine(settings, _state(settings))
    for finding in findings:
        click.echo(f"{'ok   ' if finding.good else 'BAD  '} {finding.text}")
    if not all(finding.good for finding in findings):
        sys.exit(1)
