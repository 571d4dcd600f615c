"""For the command line: a merchant's accounts without their credentials, and what rules would have
done with past payments.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

from gateway.application.commands import Authorize
from gateway.application.connector_accounts import PRIORITY_DEFAULT, ConnectorAccount
from gateway.application.ports import Capabilities, Connector, Route, Served
from gateway.application.routing import Routing
from gateway.application.routing_administration import PastPayment
from gateway.connectors.kinds import AccountRefused, ConnectorKind
from gateway.connectors.simulator.connector import SimulatorConnector
from gateway.connectors.simulator.profiles import find_profile
from gateway.domain.model import Mode
from gateway.routing.rules import Rules
from gateway.rpc.conversion import Caller, to_authorize


class Description(NamedTuple):
    """Implements `gateway.application.ports.Described`."""

    name: str
    capabilities: Capabilities


class DescribedAccounts:
    """Implements the Router port for decisions alone: there is no connector to ask.

    What an account can do is its connector's usual, unless the account says otherwise: more is not
    known without its credentials, as the currencies of an account at Braintree.
    """

    def __init__(
        self,
        accounts: Sequence[ConnectorAccount],
        kinds: Iterable[ConnectorKind],
        simulator_profile: str,
    ) -> None:
        """`accounts` are one merchant's, of all modes."""
        self._accounts = accounts
        self._kinds = {kind.name: kind for kind in kinds}
        self._simulator_profile = simulator_profile

    def route(self, merchant_id: str, mode: Mode) -> Route | None:  # noqa: ARG002 - the port's
        """None: nothing can be sent."""
        return None

    def connector(
        self,
        name: str,  # noqa: ARG002 - the port's
        connector_account_id: str,  # noqa: ARG002 - the port's
    ) -> Connector | None:
        """None: nothing can be sent."""
        return None

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """See the port."""
        ordered = sorted(
            (each for each in self._accounts if each.mode is mode),
            key=lambda each: (each.priority, each.account_id),
        )
        if ordered:
            return {
                each.account_id: Served(
                    each.account_id,
                    each.connector,
                    each.priority,
                    each.enabled,
                    self._described(each),
                )
                for each in ordered
            }
        if mode is not Mode.TEST:
            return {}
        profile = find_profile(self._simulator_profile)
        simulator = SimulatorConnector("http://127.0.0.1", profile, mode=mode)
        described = Description(simulator.name, simulator.capabilities)
        return {merchant_id: Served(merchant_id, simulator.name, PRIORITY_DEFAULT, True, described)}

    def _described(self, account: ConnectorAccount) -> Description | None:
        kind = self._kinds.get(account.connector)
        if kind is None:
            return None
        try:
            return Description(kind.name, kind.described(account.mode, account.capabilities))
        except AccountRefused:
            return None


@dataclass(slots=True)
class Simulation:
    """What rules would have done with past payments."""

    payments: int = 0
    unreadable: int = 0
    """Requests besides that this version cannot read, as a newer one's."""
    moved: int = 0
    """How many would go elsewhere than they went."""
    nowhere: int = 0
    """How many would be refused."""
    went: Counter[str] = field(default_factory=Counter)
    """Payments by `connector account`."""
    would_go: Counter[str] = field(default_factory=Counter)
    by_rule: Counter[str] = field(default_factory=Counter)
    """Payments by rule, with the experiment's arm where there is one; empty where none holds."""


def simulate(
    rules: Rules, routing: Routing, merchant_id: str, mode: Mode, payments: Iterable[PastPayment]
) -> Simulation:
    """Decide on past payments anew, each in the place of its id in splits."""
    result = Simulation()
    for payment in payments:
        command = _command(payment, Caller(merchant_id=merchant_id, mode=mode))
        if command is None:
            result.unreadable += 1
            continue
        plan, refusal = routing.consider(0, rules, command, payment.payment_id)
        decision = plan.decision
        went = f"{payment.connector} {payment.connector_account_id}"
        result.payments += 1
        result.went[went] += 1
        arm = f" {decision.experiment}={decision.arm}" if decision.experiment else ""
        result.by_rule[decision.rule + arm] += 1
        if refusal is not None:
            result.nowhere += 1
            continue
        first = decision.candidates[0]
        would_go = f"{first.connector} {first.connector_account_id}"
        result.would_go[would_go] += 1
        result.moved += would_go != went
    return result


def _command(payment: PastPayment, caller: Caller) -> Authorize | None:
    """None where the request names what this version does not know."""
    request = AuthorizePaymentRequest.FromString(payment.details)
    if request.payment_method.WhichOneof("method") is None:
        return None
    try:
        command = to_authorize(request, caller)
        command.facts()
    except KeyError:  # of the tables of the contract's enumerations
        return None
    return command


def describe(simulation: Simulation) -> list[str]:
    """The lines to print."""
    total = simulation.payments
    lines = [
        f"{total} payments: {simulation.moved} would go elsewhere, {simulation.nowhere} nowhere"
    ]
    if simulation.unreadable:
        lines.append(f"{simulation.unreadable} more are of a newer version, and left out")
    if not total:
        return lines
    lines.append("")
    lines += [
        f"{name:<44} {simulation.went[name] / total:7.1%} went"
        f" {simulation.would_go[name] / total:7.1%} would go"
        for name in sorted(simulation.went | simulation.would_go)
    ]
    lines.append("")
    lines += [
        f"{name or '(no rule)':<44} {count / total:7.1%}"
        for name, count in simulation.by_rule.most_common()
    ]
    return lines
