"""Commands for routing rules."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import click

from gateway.cli.common import (
    coroutine,
    fail,
    login_name,
    merchant_option,
    mode_option,
    no_card_number,
    one_line,
    postgres_dsn,
    read_settings,
    reason_option,
    require_merchant,
)
from gateway.cli.connectors import connector_accounts

VERSION_MAX: Final = 2**31 - 1
"""What the contract and the column hold."""


@click.group()
def routing() -> None:
    """Routing rules: where a merchant's payments go (docs/routing.md)."""


_rules_file = click.argument("file", type=click.File("r", encoding="utf-8"))


def _author(reason: str) -> Any:
    from gateway.application.routing_administration import Author

    return Author(login_name(), reason)


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

    settings = read_settings()
    try:
        kinds = configured_kinds(settings)
    except ConnectorsMisconfigured as error:
        fail(str(error))
    await require_merchant(postgres_dsn(settings), merchant)
    async with connector_accounts(settings) as accounts:
        router = DescribedAccounts(await accounts.list(merchant), kinds, settings.simulator_profile)
    decisions = Routing(router)
    async with RoutingRules.connect(postgres_dsn(settings)) as store:
        yield store, decisions, RoutingAdministration(store, router, decisions)


def _refused_rules(error: Any) -> NoReturn:
    """End with everything that is wrong with a file, or with the error's own text."""
    _show_problems(((each.field, each.description) for each in error.violations), "error")
    fail(error.message)


@routing.command("validate")
@_rules_file
@click.option("--merchant", help="Compare with this merchant's accounts, too.")
@click.option("--mode", type=click.Choice(["test", "live"]), help="With --merchant.")
@coroutine
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
@merchant_option
@mode_option
@reason_option
@click.option("--activate", is_flag=True, help="Put the version into force at once.")
@coroutine
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
@merchant_option
@mode_option
@coroutine
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
                    state += f": {one_line(each.activation_reason)}"
                click.echo(
                    f"{each.version}  {each.created_at:%Y-%m-%dT%H:%M:%SZ}  {each.created_by}  "
                    f"{one_line(each.reason)}  ({state})"
                )
            if len(page) < PAGE_SIZE_DEFAULT:
                return
            before = page[-1].version


@routing.command("show")
@merchant_option
@mode_option
@click.option(
    "--version", type=click.IntRange(1, VERSION_MAX), help="Without it: the one in force."
)
@coroutine
async def routing_show(merchant: str, mode: str, version: int | None) -> None:
    """Print a version's file."""
    from gateway.domain.model import Mode

    async with _routing(merchant) as (_, _, administration):
        found = await administration.get(merchant, Mode[mode.upper()], version or 0)
    click.echo(found.text, nl=not found.text.endswith("\n"))


@routing.command("activate")
@click.argument("version", type=click.IntRange(0, VERSION_MAX))
@merchant_option
@mode_option
@reason_option
@coroutine
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
@merchant_option
@mode_option
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
@click.option("--customer", default="", callback=no_card_number, help="The customer's id.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Repeat for several.")
@click.option("--payment-id", default="", help="Whose place in splits; without it, a new one's.")
@click.option(
    "--file", type=click.File("r", encoding="utf-8"), help="A file instead of what is in force."
)
@coroutine
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
@merchant_option
@mode_option
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True)
@click.option(
    "--payments-max",
    type=click.IntRange(1, 1_000_000),
    default=100_000,
    show_default=True,
    help="At most so many, the newest.",
)
@coroutine
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
