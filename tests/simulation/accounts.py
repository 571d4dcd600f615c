"""The merchant's accounts in a history: each a PSP of its own, and how a gateway chooses one.

The rules, cascades and breakers are the gateway's own. A token names what each PSP does, in the
order of the accounts and separated by `|`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

from gateway.application.ports import Route, Served
from gateway.application.routing import ActiveRules, Routing, RuleBook
from gateway.connectors.base import doubt
from gateway.connectors.simulator.connector import SimulatorConnector, _envelope, _found
from gateway.domain.decisions import event_of
from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.domain.states import Event
from gateway.routing.availability import AccountAvailability, Suspension, SuspensionKind
from gateway.routing.breakers import BreakerLimits, Breakers
from tests.simulation.psp import ASK, HttpClient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.application.ports import ConnectorRequest
    from gateway.connectors.simulator.profiles import Profile
    from gateway.routing.breakers import BreakerKey, BreakerState
    from gateway.routing.cascade import ReattemptLimit
    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network
    from tests.simulation.psp import PspServer

K = OperationKind

SEPARATOR: Final = "|"
BREAKER_LIMITS: Final = BreakerLimits(
    window_s=3.0,
    calls_min=3,
    slow_s_max=0.8,
    pause_s_min=0.3,
    pause_s_max=1.5,
    probes_max=1,
    probes_good=1,
    probe_life_s=2.0,
)
_AT: Final = datetime(2026, 1, 1, tzinfo=UTC)
_RETOLD: Final = frozenset({Event.APPROVED, Event.DECLINED, Event.FAILED})
_WITHOUT_EFFECT: Final = frozenset({Event.NEVER_SENT, Event.DECLINED, Event.FAILED, Event.CANCELED})


@dataclass(slots=True)
class Account:
    """An account of the merchant, with the PSP behind it."""

    account_id: str
    name: str
    """The connector's, and the server's in the network."""
    profile: Profile
    psp: PspServer
    notifies: bool = False
    """The PSP tells what it does by notification."""
    tells: bool = False
    """Of what acts on a payment it tells the outcome by notification alone, as Adyen does."""
    enabled: bool = True


def token_of(token: str, number: int) -> str:
    """What the account of this number, from 0, makes of a token."""
    parts = token.split(SEPARATOR)
    return parts[number % len(parts)]


class _Connector(SimulatorConnector):
    """The simulator's connector of one gateway, for one account."""

    def __init__(self, account: Account, number: int, http: Any, answer_timeout_s: float) -> None:
        super().__init__(
            "http://psp", account.profile, name=account.name, answer_timeout_s=answer_timeout_s
        )
        self._http = http
        self._number = number

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        token = token_of(request.payment_method_token, self._number)
        return await super()._send(replace(request, payment_method_token=token), send_before)


class _TellingConnector(_Connector):
    """Of a PSP like Adyen: what acts on a payment it only accepts, and a notification tells what
    came of it. Asked, it repeats its first answer, and uses up a reference that it does not know.
    """

    def __init__(self, account: Account, *given: Any) -> None:
        super().__init__(account, *given)
        self._psp = account.psp
        self._capabilities = replace(self._capabilities, tells_by_notification=True)

    def _first(self, kind: OperationKind, answer: ConnectorAnswer) -> ConnectorAnswer:
        if kind in (K.AUTHORIZE, K.VERIFY) or event_of(answer) not in _RETOLD:
            return answer
        accepted = replace(answer, verdict=Verdict.PENDING)
        # What is refused at once by some is told later by others.
        return accepted if event_of(answer) is Event.APPROVED or self._number % 2 else answer

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        answer = self._first(request.kind, await super()._send(request, send_before))
        if answer.delivery is not Delivery.ANSWERED:
            return answer
        return self._psp.first_answers.setdefault(request.reference, answer)

    async def _query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        if kind in (K.VOID, K.REVERSAL):
            return None  # its own repeat tells
        target = f"/v1/operations/{kind.name.lower()}/{reference}"
        told = _envelope(await self._ask(ASK, target), kind.name.lower(), reference)
        if told is None:
            return doubt()
        found = _found(told)
        first = self._psp.first_answers.get(reference)
        return self._first(kind, found) if first is None else first

    async def _cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer:
        if kind is not K.AUTHORIZE:
            found = await self._query(kind, reference, request)
            settled = found is not None and event_of(found) in _WITHOUT_EFFECT
            return found if settled and found is not None else doubt(Reason.RECOVERED)
        answer = await super()._cancel(kind, reference, request)
        if event_of(answer) is Event.CANCELED:
            return replace(answer, verdict=Verdict.PENDING)
        return answer


class AccountsOfGateway:
    """Implements `gateway.application.ports.Router` in one gateway's process."""

    def __init__(
        self,
        accounts: Sequence[Account],
        network: Network,
        process: Process,
        answer_timeout_s: float,
    ) -> None:
        self._accounts = accounts
        self.missing: set[str] = set()
        """Accounts that this gateway does not know at the moment."""
        self._connectors: dict[str, SimulatorConnector] = {}
        for number, account in enumerate(accounts):
            http = cast("Any", HttpClient(network, process, account.psp))
            kind = _TellingConnector if account.tells else _Connector
            self._connectors[account.account_id] = kind(account, number, http, answer_timeout_s)

    def route(self, merchant_id: str, mode: Mode) -> Route | None:
        """See the port."""
        for served in self.accounts(merchant_id, mode).values():
            if served.enabled and served.connector is not None:
                connector = self._connectors[served.account_id]
                return Route(connector, served.account_id)
        return None

    def accounts(self, merchant_id: str, mode: Mode) -> Mapping[str, Served]:
        """See the port."""
        return {
            each.account_id: Served(
                each.account_id,
                each.name,
                number,
                each.enabled,
                self.connector(each.name, each.account_id),
            )
            for number, each in enumerate(self._accounts, 1)
        }

    def connector(self, name: str, connector_account_id: str) -> SimulatorConnector | None:
        """See the port."""
        if connector_account_id in self.missing:
            return None
        found = self._connectors.get(connector_account_id)
        return found if found is not None and found.name == name else None


class _Source:
    """Implements RuleSource with rules that never change."""

    def __init__(self, merchant_id: str, text: str) -> None:
        self._active = [ActiveRules(merchant_id, Mode.TEST, 1, text, _AT, 1)]

    async def active_since(self, since: object) -> Sequence[ActiveRules]:
        return self._active


class _Reattempts:
    """Implements Reattempts without a limit."""

    async def take(
        self, merchant_id: str, instrument: str, limits: Sequence[ReattemptLimit]
    ) -> bool:
        return True


class _Unobserved:
    """Implements BreakerObserver."""

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        pass


def rules_of(accounts: Sequence[Account]) -> str:
    """Rules by which each account is asked after the one before."""
    targets = "".join(
        f'    {{ account = "{each.account_id}", priority = {number} }},\n'
        for number, each in enumerate(accounts, 1)
    )
    return (
        f'format = 1\n[[rule]]\nname = "cascade"\nattempts_max = {len(accounts)}\n'
        f"targets = [\n{targets}]\n"
    )


def suspension_of(account: Account) -> Suspension:
    """A person's switch that is off."""
    return Suspension(
        f"sus_{account.account_id}",
        SuspensionKind.KILL,
        "",
        account.name,
        account.account_id,
        "",
        "",
        "",
        _AT,
        None,
        0.0,
        None,
    )


async def routing_of(
    loop: SimulatedLoop, merchant_id: str, router: AccountsOfGateway, rules: str
) -> Routing:
    """The routing of one gateway's process; without rules the usual way."""
    book = None
    if rules:
        book = RuleBook(_Source(merchant_id, rules))
        await book.refresh()
    breakers = Breakers(BREAKER_LIMITS, _Unobserved(), clock=lambda: loop.now_s)
    return Routing(
        router,
        rules=book,
        availability=AccountAvailability(breakers, clock=lambda: loop.now_s),
        observer=breakers,
        reattempts=_Reattempts(),
    )
