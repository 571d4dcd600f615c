"""The capability matrix of docs/connectors.md, from the data that calls are checked against.

`python -m gateway.connectors.matrix` prints it.
"""

import sys
from collections.abc import Set as AbstractSet
from typing import Final

from gateway.application.ports import Capabilities, MethodRule
from gateway.connectors.adyen import connector as adyen_connector
from gateway.connectors.adyen import kind as adyen_kind
from gateway.connectors.braintree import connector as braintree_connector
from gateway.connectors.braintree import kind as braintree_kind
from gateway.connectors.iso8583 import kind as iso8583_kind
from gateway.connectors.simulator.connector import ANSWER_TIMEOUT_S, METHODS, SUPPORTED_FIELDS
from gateway.connectors.simulator.profiles import PROFILES
from gateway.connectors.stripe.connector import widest
from gateway.connectors.stripe.kind import usual
from gateway.domain.model import SENT_KINDS, CaptureMethod, Mode, OperationKind

FIELDS: Final = (
    "payment_method.stored",
    "payment_method.network_token",
    "payment_method.redirect",
    "channel",
    "initiator",
    "stored_credential",
    "three_ds",
    "billing_address",
    "statement_descriptor",
    "statement_descriptor_suffix",
    "amount_details",
    "return_url",
)
"""What a request may use of a connector beyond a token, an amount and a capture method."""


def known() -> dict[str, tuple[Capabilities, Capabilities]]:
    """Each connector's usual and widest capabilities."""
    profile = PROFILES["idempotent"]
    simulator = Capabilities(
        mode=Mode.TEST,
        idempotent_by_reference=profile.idempotent_by_reference,
        key_validity_s=profile.key_validity_s,
        query_by_reference=profile.query_by_reference,
        cancel_by_reference=profile.cancel_by_reference,
        answer_timeout_s=ANSWER_TIMEOUT_S,
        supported_fields=SUPPORTED_FIELDS,
        methods=METHODS,
    )
    stripe, adyen = widest(Mode.TEST), adyen_connector.widest(Mode.TEST)
    braintree = braintree_connector.widest(Mode.TEST)
    return {
        "simulator": (simulator, simulator),
        "stripe": (usual(stripe), stripe),
        "adyen": (adyen_kind.usual(adyen), adyen),
        "braintree": (braintree_kind.usual(braintree), braintree),
        "iso8583": (iso8583_kind.widest(), iso8583_kind.widest()),
    }


def matrix() -> str:
    """Markdown: what each connector can do, and which amounts it takes."""
    names = list(known())
    rows = [
        (
            f"`{kind.name}`",
            [_can(kind in a.operations, kind in b.operations) for a, b in _columns()],
        )
        for kind in OperationKind
        if kind in SENT_KINDS
    ]
    rows += [
        (
            f"capture `{method.name}`",
            [_can(method in a.capture_methods, method in b.capture_methods) for a, b in _columns()],
        )
        for method in CaptureMethod
    ]
    rows += [
        (
            f"`{field}`",
            [_can(field in a.supported_fields, field in b.supported_fields) for a, b in _columns()],
        )
        for field in FIELDS
    ]
    methods = dict.fromkeys(name for _, most in _columns() for name in most.methods)
    rows += [
        (
            f"method `{name}`",
            [_can(name in a.methods, name in b.methods) for a, b in _columns()],
        )
        for name in methods
    ]
    rows += [
        (
            "currencies",
            ["all" if a.amounts is None else str(len(a.amounts)) for a, _ in _columns()],
        ),
        ("a reference is remembered", [_validity(a) for a, _ in _columns()]),
        ("waits for an answer", [f"{a.answer_timeout_s:g} s" for a, _ in _columns()]),
    ]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {head} | {' | '.join(cells)} |" for head, cells in rows]
    return "\n".join(lines) + "\n\n" + _methods() + "\n" + _steps()


def _columns() -> list[tuple[Capabilities, Capabilities]]:
    return list(known().values())


def _can(usually: bool, at_most: bool) -> str:
    if usually:
        return "yes"
    return "where the account has it" if at_most else "no"


def _validity(capabilities: Capabilities) -> str:
    validity_s = capabilities.key_validity_s
    return "for ever" if validity_s is None else f"{validity_s / 3600:g} h"


def _methods() -> str:
    """What holds for the methods other than cards."""
    lines = ["| Connector | Method | Capture | Currencies | Countries | Needs |", "|" + "---|" * 6]
    for name, (_, most) in known().items():
        for method, rule in most.methods.items():
            if rule == MethodRule():
                continue
            cells = (
                name,
                f"`{method}`",
                " ".join(f"`{each.name}`" for each in sorted(rule.capture_methods)),
                _listed(rule.currencies),
                _listed(rule.countries),
                " ".join(
                    [f"`{each}`" for each in sorted(rule.needs)]
                    + ["notifications"] * rule.needs_notifications
                ),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _listed(codes: AbstractSet[str] | None) -> str:
    return "all" if codes is None else " ".join(sorted(codes))


def _steps() -> str:
    lines = [
        "| Connector | Currency | Amounts are multiples of | Largest, minor units |",
        "|---|---|---|---|",
    ]
    for name, (_, widest_) in known().items():
        by_rule: dict[tuple[int, int], list[str]] = {}
        for code, rule in (widest_.amounts or {}).items():
            by_rule.setdefault((rule.step_minor, rule.amount_minor_max), []).append(code)
        if not by_rule:
            continue
        usual_rule = max(by_rule, key=lambda rule: len(by_rule[rule]))
        for (step, largest), codes in sorted(by_rule.items()):
            shown = "all others" if (step, largest) == usual_rule else " ".join(sorted(codes))
            lines.append(f"| {name} | {shown} | {step} | {largest} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(matrix())
