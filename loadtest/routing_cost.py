"""What routing rules cost an authorization: `python -m loadtest.routing_cost`, some ten seconds.

The decision on a request that two dozen rules look at, among three accounts by a weighted split,
with the record that the operation keeps; without rules; and, as a measure that other work on the
machine changes alike, what the contract's own work on the same request and its answer takes. The
sides take turns, and the gate is on their paired ratio. All in CPU time of this process.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import uvloop
from payments.v1.money_pb2 import Money
from payments.v1.payment_method_pb2 import CAPTURE_METHOD_MANUAL, CardHints, PaymentMethod
from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

from gateway.application.commands import Authorize
from gateway.application.ports import Capabilities, Route, Served
from gateway.application.routing import ActiveRules, Routing, RuleBook
from gateway.domain import decisions, ids
from gateway.domain.decisions import Origin
from gateway.domain.model import Mode
from gateway.rpc.conversion import Caller, ContractEncoder, to_authorize
from loadtest.bench.ratios import IQR_MAX, PAIRS_MIN, Measured, measured, paired

RATIO_MAX: Final = 1.0
"""The most that a decision may take, of the contract's work on the request and its answer."""
CALLS_PER_ROUND: Final = 2_000
RULES: Final = 24
SUMMARY: Final = Path(".local/bench/routing.json")
MERCHANT: Final = "mer_1"

_ENCODER: Final = ContractEncoder()


class _Psp:
    name = "psp"
    capabilities = Capabilities(Mode.TEST, True, None, True, True, 10.0, frozenset())


class _Accounts:
    """Implements the Router port with three accounts."""

    def __init__(self) -> None:
        self._psp: Any = _Psp()
        self._served = {
            f"acc_{name}": Served(f"acc_{name}", "psp", 1, True, self._psp) for name in "abc"
        }

    def route(self, merchant_id: str, mode: Mode) -> Route | None:  # noqa: ARG002 - the port's
        return Route(self._psp, "acc_a")

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:  # noqa: ARG002 - s.a.
        return self._served

    def connector(self, name: str, connector_account_id: str) -> Any:  # noqa: ARG002 - s.a.
        return self._psp


class _Source:
    """Implements RuleSource: rules for other cards, and at last one that holds."""

    async def active_since(self, since: datetime | None) -> Sequence[ActiveRules]:  # noqa: ARG002
        targets = ", ".join(f'{{ account = "acc_{name}", weight = 2 }}' for name in "abc")
        rules = [
            f'[[rule]]\nname = "r{number}"\nwhen = {{ currency = ["EUR", "USD"], scheme = "visa", '
            f'bin = "{500_000 + number}", issuer_country = ["DE", "FR"], '
            f'metadata = {{ tier = "gold" }} }}\ntargets = [{targets}]\n'
            for number in range(RULES)
        ]
        rules.append(f'[[rule]]\nname = "rest"\ntargets = [{targets}]\n')
        text = "format = 1\n" + "".join(rules)
        return [ActiveRules(MERCHANT, Mode.TEST, 1, text, datetime.now(UTC), 1)]


def _request() -> AuthorizePaymentRequest:
    return AuthorizePaymentRequest(
        idempotency_key="key",
        amount=Money(amount_minor=1000, currency_code="EUR"),
        capture_method=CAPTURE_METHOD_MANUAL,
        payment_method=PaymentMethod(
            token="tok_visa",  # noqa: S106 - no token of anybody's
            card_hints=CardHints(scheme="visa", bin="411111", issuer_country="DE"),
        ),
        customer_id="cus_1",
        metadata={"tier": "gold"},
    )


def _convert(_: Authorize) -> None:
    """The contract's work: the request's, the answer's."""
    command = to_authorize(_request(), Caller(merchant_id=MERCHANT))
    begun = decisions.begin_authorization(
        Origin("op_1", "key", command.fingerprint, "req_1"),
        merchant_id=MERCHANT,
        payment_id="pay_1",
        mode=Mode.TEST,
        amount_minor=command.amount_minor,
        currency=command.currency,
        capture_method=command.capture_method,
        connector="psp",
        connector_account_id="acc_a",
        merchant_order_id="",
        allow_partial_approval=False,
        details=command.details,
    )
    _ENCODER.change("evt_1", "authorize.succeeded", begun.operation, begun.payment)


def call_us(call: Callable[[Authorize], object]) -> float:
    """A call's CPU time, in microseconds."""
    command = to_authorize(_request(), Caller(merchant_id=MERCHANT))
    began = time.process_time()
    for _ in range(CALLS_PER_ROUND):
        call(command)
    return 1e6 * (time.process_time() - began) / CALLS_PER_ROUND


async def measure(rounds: int) -> dict[str, Measured]:
    """The paired ratio, and each side in microseconds."""
    book = RuleBook(_Source())
    await book.refresh()
    ruled, bare = Routing(_Accounts(), rules=book), Routing(_Accounts())
    sides: dict[str, Callable[[Authorize], object]] = {
        "rules_us": lambda command: ruled.plan(command, ids.new_payment_id()),
        "no_rules_us": lambda command: bare.plan(command, ids.new_payment_id()),
        "contract_us": _convert,
    }
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call_us(call)
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            spent[name].append(call_us(sides[name]))
    return {
        "ratio": paired(spent["rules_us"], spent["contract_us"]),
        **{name: measured(values) for name, values in spent.items()},
    }


@click.command()
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(PAIRS_MIN))
def main(rounds: int) -> None:
    """Measure, print, write the summary; exit with 1 where the gate fails."""
    figures = uvloop.run(measure(rounds))
    ratio = figures["ratio"]
    problem = ratio.problem()
    if not problem and ratio.median > RATIO_MAX:
        problem = f"ratio {ratio.median:.3f} above {RATIO_MAX}"
    click.echo(f"rounds {rounds}; median [quartiles]; a figure spread by more than {IQR_MAX:.0%}")
    click.echo("of its median is worth nothing")
    for name, text in (
        ("rules_us", f"a decision by {RULES + 1} rules among three accounts, microseconds"),
        ("no_rules_us", "without rules, microseconds"),
        ("contract_us", "the contract's work on the request and its answer, microseconds"),
        ("ratio", "the decision by rules, of the contract's work"),
    ):
        figure = figures[name]
        click.echo(f"{figure.median:8.3f} [{figure.q1:.3f}, {figure.q3:.3f}]  {text}")
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    values = {name: [each.q1, each.median, each.q3] for name, each in figures.items()}
    summary = {"rounds": rounds, "figures": values, "gate": RATIO_MAX, "problem": problem}
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if problem:
        click.echo(f"FAILED: {problem}")
        sys.exit(1)


if __name__ == "__main__":
    main()
