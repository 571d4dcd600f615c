"""What routing rules cost an authorization: `python -m loadtest.routing_cost`, some ten seconds.

The decision on a request that two dozen rules look at, among three accounts by a weighted split,
with the record that the operation keeps; the same in the order that was learnt of some hundred
calls to each; without rules; and, as a measure that other work on the machine changes alike, what
the contract's own work on the same request and its answer takes. The gate is on the first's paired
ratio to that.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from payments.v1.money_pb2 import Money
from payments.v1.payment_method_pb2 import CAPTURE_METHOD_MANUAL, CardHints, PaymentMethod
from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

from gateway.application.ports import Capabilities, Route, Served
from gateway.application.routing import ActiveRules, Plan, Routing, RuleBook
from gateway.domain import decisions, ids
from gateway.domain.decisions import Origin
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.learning import LearningLimits, SuccessRanking
from gateway.rpc.conversion import Caller, ContractEncoder, to_authorize
from loadtest.bench.costs import Gate, cost_command, cpu_side, take_turns
from loadtest.bench.ratios import Measured, measured, paired

RATIO_MAX: Final = 1.0
"""The most that a decision may take, of the contract's work on the request and its answer."""
RULES: Final = 24
CALLS_KNOWN: Final = 100
"""What is learnt of each account rests on so many calls."""
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

    def __init__(self, order: str = "") -> None:
        """`order`: the line of the last rule that says how its targets are ordered."""
        self._order = order

    async def active_since(self, since: datetime | None) -> Sequence[ActiveRules]:  # noqa: ARG002
        targets = ", ".join(f'{{ account = "acc_{name}", weight = 2 }}' for name in "abc")
        rules = [
            f'[[rule]]\nname = "r{number}"\nwhen = {{ currency = ["EUR", "USD"], scheme = "visa", '
            f'bin = "{500_000 + number}", issuer_country = ["DE", "FR"], '
            f'metadata = {{ tier = "gold" }} }}\ntargets = [{targets}]\n'
            for number in range(RULES)
        ]
        rules.append(f'[[rule]]\nname = "rest"\n{self._order}targets = [{targets}]\n')
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


def _convert() -> None:
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


def _teach(ranking: SuccessRanking, plan: Plan) -> None:
    """Let each account be known by calls of which the more succeeded the later it stands."""
    assert plan.segment is not None
    for number, candidate in enumerate(plan.decision.candidates):
        for call in range(CALLS_KNOWN):
            verdict = Verdict.DECLINED if call % (5 + number) == 0 else Verdict.APPROVED
            answer = ConnectorAnswer(Delivery.ANSWERED, verdict)
            ranking.observed(plan.segment, candidate, OperationKind.AUTHORIZE, answer, 0.1)


async def measure(rounds: int) -> dict[str, Measured]:
    """The paired ratio, and each side in microseconds."""
    book, learning = RuleBook(_Source()), RuleBook(_Source('order = "learned"\n'))
    await book.refresh()
    await learning.refresh()
    ruled, bare = Routing(_Accounts(), rules=book), Routing(_Accounts())
    ranking = SuccessRanking(LearningLimits())
    learned = Routing(_Accounts(), rules=learning, ranking=ranking)
    command = to_authorize(_request(), Caller(merchant_id=MERCHANT))
    _teach(ranking, learned.plan(command, ids.new_payment_id()))
    sides = {
        "rules_us": cpu_side(lambda: ruled.plan(command, ids.new_payment_id())),
        "learned_us": cpu_side(lambda: learned.plan(command, ids.new_payment_id())),
        "contract_us": cpu_side(_convert),
        "no_rules_us": cpu_side(lambda: bare.plan(command, ids.new_payment_id())),
    }
    spent = await take_turns(sides, rounds)
    return {
        "ratio": paired(spent["rules_us"], spent["contract_us"]),
        **{name: measured(values) for name, values in spent.items()},
    }


main = cost_command(
    measure,
    Gate("ratio", most=RATIO_MAX),
    {
        "rules_us": f"a decision by {RULES + 1} rules among three accounts, microseconds",
        "learned_us": "the same in the order that was learnt, microseconds",
        "no_rules_us": "without rules, microseconds",
        "contract_us": "the contract's work on the request and its answer, microseconds",
        "ratio": "the decision by rules, of the contract's work",
    },
    Path(".local/bench/routing.json"),
)


if __name__ == "__main__":
    main()
