"""What a connector's capabilities refuse before an intent is written: nothing was sent, or kept."""

from gateway.application.commands import Authorize
from gateway.application.ports import Capabilities, Described, MethodRule
from gateway.domain.errors import GatewayError, Reason, Violation, refuse
from gateway.domain.model import Operation, OperationKind

_AUTHORIZE, _VERIFY = OperationKind.AUTHORIZE, OperationKind.VERIFY


def check_authorization(command: Authorize, connector: Described) -> None:
    """Raises GatewayError for what the connector cannot do with a new payment."""
    capabilities = connector.capabilities
    paths = command.used_fields - capabilities.supported_fields
    rule = capabilities.methods.get(command.method)
    if command.capture_method not in capabilities.capture_methods or (
        rule is not None and command.capture_method not in rule.capture_methods
    ):
        paths |= {"capture_method"}
    if paths:
        raise GatewayError(
            Reason.FIELD_NOT_SUPPORTED,
            f"The connector {connector.name} cannot use a field of the request.",
            metadata={"connector": connector.name},
            violations=[
                Violation(path, "not supported by the connector") for path in sorted(paths)
            ],
        )
    if rule is None:
        raise refuse(
            Reason.METHOD_NOT_SUPPORTED,
            f"The connector {connector.name} does not take this payment method.",
            violation=Violation("payment_method", "not taken by the connector"),
            connector=connector.name,
            method=command.method,
        )
    _check_method(command, rule, connector)
    _check_kind(_AUTHORIZE if command.amount_minor else _VERIFY, connector, capabilities)
    _check_amount(command.amount_minor, command.currency, connector, capabilities)


def _check_method(command: Authorize, rule: MethodRule, connector: Described) -> None:
    """What the connector's rule for the method says. Raises GatewayError."""
    country = command.customer_country
    if country and rule.countries is not None and country not in rule.countries:
        raise refuse(
            Reason.COUNTRY_NOT_SUPPORTED,
            "The payment method is not offered to customers of this country.",
            violation=Violation("payment_method.redirect.country_code", "not a country of it"),
            connector=connector.name,
            method=command.method,
        )
    if rule.currencies is not None and command.currency not in rule.currencies:
        raise refuse(
            Reason.CURRENCY_NOT_SUPPORTED,
            "The payment method takes no payments in this currency.",
            violation=Violation("amount.currency_code", "not taken for the payment method"),
            connector=connector.name,
            method=command.method,
        )
    missing = rule.needs - command.method_fields
    if missing:
        raise GatewayError(
            Reason.FIELD_REQUIRED,
            f"The connector {connector.name} needs a field for this payment method.",
            metadata={"connector": connector.name, "method": command.method},
            violations=[
                Violation(f"payment_method.redirect.{name}", "is needed by the connector")
                for name in sorted(missing)
            ],
        )


def check_follow_up(operation: Operation, connector: Described) -> None:
    """Raises GatewayError for what the connector cannot do with an existing payment."""
    capabilities = connector.capabilities
    _check_kind(operation.kind, connector, capabilities)
    if operation.kind is not OperationKind.VOID:  # which carries no amount to the PSP
        field = "additional_amount" if operation.kind is OperationKind.INCREMENT else "amount"
        _check_amount(operation.amount_minor, operation.currency, connector, capabilities, field)


def _check_kind(kind: OperationKind, connector: Described, capabilities: Capabilities) -> None:
    if kind not in capabilities.operations:
        raise refuse(
            Reason.OPERATION_NOT_SUPPORTED,
            f"The connector {connector.name} has no such operation.",
            connector=connector.name,
            operation_kind=kind.name,
        )


def _check_amount(
    amount_minor: int,
    currency: str,
    connector: Described,
    capabilities: Capabilities,
    field: str = "amount",
) -> None:
    if capabilities.amounts is None:
        return
    rule = capabilities.amounts.get(currency)
    if rule is None:
        raise refuse(
            Reason.CURRENCY_NOT_SUPPORTED,
            f"The connector {connector.name} takes no payments in this currency.",
            violation=Violation(f"{field}.currency_code", "not taken by the connector"),
            connector=connector.name,
        )
    if amount_minor % rule.step_minor or amount_minor > rule.amount_minor_max:
        raise refuse(
            Reason.AMOUNT_NOT_SUPPORTED,
            f"The connector {connector.name} cannot express this amount of the currency.",
            violation=Violation(f"{field}.amount_minor", "not a multiple of the step, or too much"),
            connector=connector.name,
            step_minor=str(rule.step_minor),
            amount_minor_max=str(rule.amount_minor_max),
        )
