"""Commands for accounts at PSPs: credentials, what nothing is sent to, what they cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from gateway.cli.common import (
    coroutine,
    fail,
    login_name,
    merchant_option,
    mode_option,
    option_group,
    point_in_time,
    postgres_dsn,
    read_settings,
    reason_option,
    require_merchant,
)
from gateway.settings import Settings

SUSPENSIONS_SHOWN_MAX: Final = 200
COSTS_SHOWN_MAX: Final = 100
CREDENTIALS_BYTES_MAX: Final = 16 * 1024


@click.group()
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


def _kinds(settings: Settings) -> dict[str, Any]:
    """What connectors there are here, by name."""
    from gateway.connectors.configured import ConnectorsMisconfigured, configured_kinds

    try:
        return {kind.name: kind for kind in configured_kinds(settings)}
    except ConnectorsMisconfigured as error:
        fail(str(error))


def _kind(settings: Settings, name: str) -> Any:
    kinds = _kinds(settings)
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


def connector_accounts(settings: Settings) -> Any:
    """The store of accounts at PSPs, as a context."""
    from storage.postgres import ConnectorAccounts

    return ConnectorAccounts.connect(postgres_dsn(settings), login_name())


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
@merchant_option
@click.option("--connector", required=True, help="The PSP, as `stripe`.")
@mode_option
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
@coroutine
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

    settings = read_settings()
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
    async with connector_accounts(settings) as accounts:
        await accounts.add(account)
    _warn_of_silence(kind, credentials)
    click.echo(account.account_id)


@connectors.command("list")
@click.option("--merchant", help="Only those of this merchant.")
@coroutine
async def connectors_list(merchant: str | None) -> None:
    """List the accounts, without their credentials."""
    settings = read_settings()
    await require_merchant(postgres_dsn(settings), merchant)
    async with connector_accounts(settings) as accounts:
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
@merchant_option
@click.argument("account_id")
@coroutine
async def connectors_disable(merchant: str, account_id: str) -> None:
    """Give an account no new payments. Those that it has can be captured, voided and refunded."""
    await _change_account(merchant, account_id, enabled=False)


@connectors.command("enable")
@merchant_option
@click.argument("account_id")
@coroutine
async def connectors_enable(merchant: str, account_id: str) -> None:
    """Give a disabled account new payments again."""
    await _change_account(merchant, account_id, enabled=True)


async def _change_account(merchant: str, account_id: str, *, enabled: bool) -> None:
    async with connector_accounts(read_settings()) as accounts:
        if await accounts.change(merchant, account_id, enabled=enabled) is None:
            fail(_no_account(merchant, account_id))
    click.echo(f"{'enabled' if enabled else 'disabled'} {account_id}")


@connectors.command("rotate")
@merchant_option
@click.argument("account_id")
@_credentials
@coroutine
async def connectors_rotate(merchant: str, account_id: str, credentials_file: Any) -> None:
    """Replace an account's credentials. Gateways take them over without a restart."""
    from gateway.connectors.kinds import AccountRefused
    from gateway.connectors.sealing import seal

    settings = read_settings()
    keys = _wrapping_keys(settings)
    credentials = _read_credentials(credentials_file)
    async with connector_accounts(settings) as accounts:
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
@merchant_option
@click.argument("account_id")
@coroutine
async def connectors_remove(merchant: str, account_id: str) -> None:
    """Delete an account's credentials. Nothing can be done to its payments any more."""
    async with connector_accounts(read_settings()) as accounts:
        if await accounts.remove(merchant, account_id) is None:
            fail(_no_account(merchant, account_id))
    click.echo(f"removed {account_id}")


@connectors.command("rewrap")
@coroutine
async def connectors_rewrap() -> None:
    """Wrap all data keys with the first wrapping key. Then the others are no longer needed."""
    from gateway.application.connector_accounts import KeyServiceError
    from gateway.connectors.sealing import rewrap

    settings = read_settings()
    keys = _wrapping_keys(settings)
    rewrapped, failed = 0, 0
    async with connector_accounts(settings) as accounts:
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


# --- what nothing is sent to ----------------------------------------------------------------------


_suspended = option_group(
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

    return RoutingControls.connect(postgres_dsn(settings))


def _check_method(kinds: dict[str, Any], connector: str, method: str) -> None:
    """A misspelt switch would stop nothing, and say that it is done."""
    of = [kinds[connector]] if connector in kinds else kinds.values()
    known = {each for kind in of for each in kind.widest.methods}
    if method and method not in known:
        fail(f"{connector} takes no method {method!r}; there are: {', '.join(sorted(known))}.")


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
    settings = read_settings()
    kinds = _kinds(settings)
    of: dict[str, Any] = {"connector": connector}
    if account_id:
        async with connector_accounts(settings) as accounts:
            account = await accounts.find(merchant, account_id)
        if account is None:
            fail(_no_account(str(merchant), account_id))
        of = {"connector": account.connector, "merchant_id": merchant, "account_id": account_id}
    elif connector not in kinds:
        # Another host may have it: what accounts are of exists.
        async with connector_accounts(settings) as accounts:
            names = {*kinds, *(account.connector for account in await accounts.list())}
        if connector not in names:
            fail(f"There is no connector {connector!r}; there are: {', '.join(sorted(names))}.")
    _check_method(kinds, of["connector"], when.get("method", ""))
    async with _controls(settings) as controls:
        suspension = await controls.suspend(
            SuspensionKind[kind], **of, **when, reason=reason, created_by=login_name()
        )
    click.echo(suspension.suspension_id)


@connectors.command("kill")
@_suspended
@reason_option
@coroutine
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
@reason_option
@coroutine
async def connectors_maintenance(begins: str | None, ends: str, **of: Any) -> None:
    """Send nothing to an account or a connector for a time. Prints the window's id."""
    from datetime import UTC, datetime

    begins_at = point_in_time(begins) if begins else None
    ends_at = point_in_time(ends)
    if ends_at <= (begins_at or datetime.now(UTC)):
        fail("The window ends before it begins.")
    await _suspend("MAINTENANCE", **of, begins_at=begins_at, ends_at=ends_at)


@connectors.command("revive")
@click.argument("suspension_id")
@reason_option
@coroutine
async def connectors_revive(suspension_id: str, reason: str) -> None:
    """End a kill switch or a maintenance window, which stays in the audit."""
    async with _controls(read_settings()) as controls:
        ended = await controls.end_suspension(suspension_id, reason=reason, ended_by=login_name())
    if ended is None:
        fail(f"No suspension {suspension_id} that has not ended.")
    click.echo(f"revived {suspension_id}")


@connectors.command("suspensions")
@click.option("--all", "everything", is_flag=True, help="Those that are over too.")
@coroutine
async def connectors_suspensions(everything: bool) -> None:
    """List kill switches and maintenance windows, with who decided so and why."""
    async with _controls(read_settings()) as controls:
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
@merchant_option
@_costs_file
@reason_option
@coroutine
async def connector_costs_put(merchant: str, file: Path, reason: str) -> None:
    """Store the next version of a merchant's fees; an empty file ends them.

    Gateways know it after GATEWAY_CONNECTOR_ACCOUNTS_INTERVAL_S.
    """
    from gateway.routing.costs import parse_costs

    text = _read_costs(file)
    named = {account_id for account_id, _ in parse_costs(text).fees}
    settings = read_settings()
    async with connector_accounts(settings) as accounts:
        unknown = named - {row.account_id for row in await accounts.list(merchant)}
    if unknown:
        fail(_no_account(merchant, min(unknown)))
    async with _controls(settings) as controls:
        stored = await controls.put_costs(merchant, text, reason=reason, created_by=login_name())
    click.echo(f"version {stored.version} of the costs of {merchant}")


@connector_costs.command("show")
@merchant_option
@click.option("--versions", is_flag=True, help="Who put which version, and why, instead.")
@coroutine
async def connector_costs_show(merchant: str, versions: bool) -> None:
    """Print a merchant's fees."""
    settings = read_settings()
    await require_merchant(postgres_dsn(settings), merchant)
    async with _controls(settings) as controls:
        rows = await controls.costs_of(merchant, COSTS_SHOWN_MAX if versions else 1)
    if not versions:
        click.echo(rows[0].body if rows else "", nl=False)
        return
    for row in rows:
        click.echo(
            f"{row.version}  {row.created_at:%Y-%m-%dT%H:%M:%SZ}  {row.created_by}: {row.reason}"
        )
