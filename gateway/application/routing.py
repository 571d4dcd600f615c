"""The routing of new payments: the rules that are active, the accounts that remain, in what order.

A merchant without rules goes the way of `Router.route`. Everything that a decision needs is in this
process; what changes elsewhere is read in the background.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from gateway.application import suitability
from gateway.application.commands import Authorize
from gateway.application.ports import Connector, Router, Served
from gateway.application.refreshing import refresh_forever
from gateway.domain.errors import GatewayError, Reason, refuse
from gateway.domain.making import maker
from gateway.domain.model import ConnectorAnswer, Mode, Operation, ResponseCode
from gateway.routing import record
from gateway.routing.cascade import ReattemptLimit
from gateway.routing.model import (
    Availability,
    Candidate,
    Excluded,
    Exclusion,
    Observer,
    Ranking,
    RouteDecision,
    Scored,
    Segment,
)
from gateway.routing.rule_file import RulesInvalid, read_rules
from gateway.routing.rules import Facts, Rules, Target, stable_hash

DECISIONS_KEPT: Final = 4_096
"""Accounts of merchants without rules whose decision is kept as it was made; and the candidates
that rules make of accounts."""
UNAVAILABLE_RETRY_S: Final = 5.0
"""What a caller is told where every account is out of use and nobody knows for how long, in
seconds: killed by a person, or half-open with as many probes under way as there may be."""
PAUSE_S_MAX: Final = 900.0
"""And the most where the end is known: a person may end a maintenance window sooner."""

_FOR_NOW: Final = frozenset(
    {Exclusion.BREAKER_OPEN, Exclusion.PROBES_TAKEN, Exclusion.KILLED, Exclusion.MAINTENANCE}
)

_log = logging.getLogger(__name__)


# --- the rules that are active --------------------------------------------------------------------


class ActiveRules(NamedTuple):
    """A merchant's active rules as they are stored."""

    merchant_id: str
    mode: Mode
    version: int
    """0: the merchant has none any more."""
    text: str
    activated_at: datetime
    number: int
    """Of the merchant's activations in this mode: the highest is the last."""


class RuleSource(Protocol):
    """Where rules are kept."""

    async def active_since(self, since: datetime | None) -> Sequence[ActiveRules]:
        """What was activated at or after `since`, or shortly before; None: all that is active. For
        each merchant and mode the last one, followed by the one before it.

        Raises StoreUnavailable.
        """


class _Compiled(NamedTuple):
    version: int
    rules: Rules
    number: int


class RuleBook:
    """The active rules of all merchants in memory."""

    def __init__(self, source: RuleSource) -> None:
        self._source = source
        self._rules: dict[tuple[str, Mode], _Compiled] = {}
        self._latest: datetime | None = None

    def find(self, merchant_id: str, mode: Mode) -> tuple[int, Rules] | None:
        """The version and the rules; None where the merchant has none."""
        found = self._rules.get((merchant_id, mode))
        return None if found is None or not found.version else (found.version, found.rules)

    async def run(self, interval_s: float) -> None:
        """Read what has changed, again and again, until cancelled."""
        await refresh_forever("the routing rules", self.refresh, interval_s)

    async def refresh(self) -> None:
        """Read what has changed. Raises StoreUnavailable."""
        for active in await self._source.active_since(self._latest):
            self._latest = max(active.activated_at, self._latest or active.activated_at)
            self._take(active)

    def _take(self, active: ActiveRules) -> None:
        key = active.merchant_id, active.mode
        known = self._rules.get(key)
        if known is not None and known.number >= active.number:
            return
        rules = Rules(())
        if active.version:
            try:
                rules = read_rules(active.text).rules
            except RulesInvalid as error:
                # Checked when they were put: by a gateway that knows more than this one.
                _log.error(
                    "routing rules cannot be read, those before stay: %s",
                    error,
                    extra={"merchant_id": active.merchant_id, "version": active.version},
                )
                return
        self._rules[key] = _Compiled(active.version, rules, active.number)


# --- a decision -----------------------------------------------------------------------------------


class Reattempts(Protocol):
    """Counts how often a declined card is tried again."""

    async def take(
        self, merchant_id: str, instrument: str, limits: Sequence[ReattemptLimit]
    ) -> bool:
        """Count one more where every limit allows it; False where one does not, or where the
        counts cannot be read. Never raises.
        """


@dataclass(slots=True)
class Plan:
    """Where an authorization may go, one account after the other."""

    decision: RouteDecision
    attempts_max: int
    soft: AbstractSet[ResponseCode]
    """The declines after which the next account is asked."""
    note: str = ""
    """The decision as `Operation.note` keeps it; empty without rules."""
    facts: Facts | None = None
    """None without rules."""
    segment: Segment | None = None
    taken: Candidate | None = None
    """The account that was taken last."""
    _passed: int = 0
    _attempts: int = 0

    def take(
        self, availability: Availability | None, router: Router
    ) -> tuple[Candidate, Connector] | None:
        """The next one that may be asked now; None where attempts or accounts are used up."""
        if self._attempts >= self.attempts_max:
            return None
        candidates = self.decision.candidates
        method = "" if self.segment is None else self.segment.method
        while self._passed < len(candidates):
            candidate = candidates[self._passed]
            self._passed += 1
            connector = router.connector(candidate.connector, candidate.connector_account_id)
            if connector is None:
                continue  # removed meanwhile
            if availability is None or availability.admit(candidate, method) is None:
                self._attempts += 1
                self.taken = candidate
                return candidate, connector
        return None

    @property
    def left(self) -> Sequence[Candidate]:
        """Those whose turn has not come yet."""
        return self.decision.candidates[self._passed :]

    @property
    def more(self) -> bool:
        """Whether there may be another attempt."""
        return self._attempts < self.attempts_max and self._passed < len(self.decision.candidates)


_make_plan = maker(Plan)
_candidate = lru_cache(DECISIONS_KEPT)(Candidate)
_NO_DECLINES: Final = frozenset[ResponseCode]()


@lru_cache(DECISIONS_KEPT)
def _only(connector: str, account_id: str) -> RouteDecision:
    """The decision for the one account there is."""
    return RouteDecision((Candidate(connector, account_id),))


class Routing:
    """Decides where new payments go."""

    def __init__(
        self,
        router: Router,
        *,
        rules: RuleBook | None = None,
        availability: Availability | None = None,
        ranking: Ranking | None = None,
        observer: Observer | None = None,
        learner: Observer | None = None,
        reattempts: Reattempts | None = None,
    ) -> None:
        """`observer` is told of every call, `learner` of those that rules decided on."""
        self._router = router
        self._rules = rules
        self._availability = availability
        self._ranking = ranking
        self._observer = observer
        self._learner = learner
        self.reattempts = reattempts

    def plan(self, command: Authorize, payment_id: str) -> Plan:
        """Where a new payment may go. Raises GatewayError where it may go nowhere."""
        found = None if self._rules is None else self._rules.find(command.merchant_id, command.mode)
        if found is None:
            return self._usual(command)
        version, rules = found
        return self.plan_by(version, rules, command, payment_id)

    def _usual(self, command: Authorize) -> Plan:
        """The way of a merchant without rules: one account, and no other."""
        route = self._router.route(command.merchant_id, command.mode)
        if route is None:
            raise _nowhere(command)
        connector = route.connector
        suitability.check_authorization(command, connector)
        decision = _only(connector.name, route.connector_account_id)
        if self._availability is not None:
            candidate = decision.candidates[0]
            refused = self._availability.refusal(candidate, command.method)
            if refused is not None:
                raise self._unavailable(candidate, command.method, refused)
        # Nobody learns from it: what a segment has beyond the method tells nothing here.
        segment = Segment(command.merchant_id, command.mode, command.method)
        return _make_plan(decision, 1, _NO_DECLINES, segment=segment)

    def plan_by(self, version: int, rules: Rules, command: Authorize, payment_id: str) -> Plan:
        """Where a new payment may go by these rules. Raises GatewayError."""
        plan, refusal = self.consider(version, rules, command, payment_id)
        if refusal is not None:
            raise refusal
        return plan

    def consider(
        self, version: int, rules: Rules, command: Authorize, payment_id: str
    ) -> tuple[Plan, GatewayError | None]:
        """Where a new payment may go by these rules, or why it may go nowhere."""
        facts = command.facts()
        segment = _segment(command, facts)
        choice = rules.choose(
            facts,
            command.amount_minor,
            command.currency,
            payment_id,
            is_ranked=self._ranking is not None,
        )
        ranking = self._ranking if choice is not None and choice.is_learned else None
        served = self._router.accounts(command.merchant_id, command.mode)
        candidates: list[Candidate] = []
        excluded: list[Excluded] = []
        scores: list[Scored] = []
        refusals: dict[Candidate, GatewayError] = {}
        seen: set[str] = set()
        for group in _usual_groups(served) if choice is None else choice.groups:
            kept: list[Candidate] = []
            for target in group:
                for each in accounts_of(target, served):
                    if each.account_id in seen:
                        continue
                    seen.add(each.account_id)
                    candidate = _candidate(
                        each.connector_name, each.account_id, target.priority, target.weight
                    )
                    reason = self._exclusion(command, segment, each, candidate, refusals)
                    if reason is None:
                        kept.append(candidate)
                    else:
                        excluded.append(Excluded(candidate, reason))
            if ranking is not None and len(kept) > 1:
                draw = stable_hash("draw", payment_id)
                ranked = ranking.rank(segment, kept, command.amount_minor, draw)
                kept = [each.candidate for each in ranked]
                scores += ranked
            candidates += kept
        decision = RouteDecision(
            tuple(candidates),
            tuple(excluded),
            version,
            "" if choice is None else choice.rule.name,
            "" if choice is None else choice.experiment,
            "" if choice is None else choice.arm,
            tuple(scores),
        )
        attempts_max = 1 if choice is None else choice.rule.attempts_max
        soft = _NO_DECLINES if choice is None else choice.rule.cascade_on
        note = record.encode(decision)
        plan = _make_plan(decision, attempts_max, soft, note, facts, segment)
        return plan, None if candidates else self._refusal(
            command, segment.method, decision.excluded, refusals
        )

    def _exclusion(
        self,
        command: Authorize,
        segment: Segment,
        served: Served,
        candidate: Candidate,
        refusals: dict[Candidate, GatewayError],
    ) -> Exclusion | None:
        if not served.enabled:
            return Exclusion.DISABLED
        if served.connector is None:
            return Exclusion.UNUSABLE
        try:
            suitability.check_authorization(command, served.connector)
        except GatewayError as refusal:
            # With its traceback it would be in a cycle with this very frame.
            refusals[candidate] = refusal.with_traceback(None)
            return Exclusion(refusal.reason)
        if self._availability is None:
            return None
        return self._availability.refusal(candidate, segment.method)

    def may_take(self, plan: Plan) -> bool:
        """Whether `take` would find an account now. Only looks."""
        availability, router = self._availability, self._router
        method = "" if plan.segment is None else plan.segment.method
        return plan.more and any(
            router.connector(each.connector, each.connector_account_id) is not None
            and (availability is None or availability.refusal(each, method) is None)
            for each in plan.left
        )

    def take(self, plan: Plan) -> tuple[Candidate, Connector] | None:
        """The plan's next account that may be asked now, with its connector."""
        return plan.take(self._availability, self._router)

    def first(self, plan: Plan) -> tuple[Candidate, Connector]:
        """The plan's first account. Raises GatewayError where none may be asked now."""
        taken = self.take(plan)
        if taken is None:
            raise self._taken_meanwhile(plan)
        return taken

    def _taken_meanwhile(self, plan: Plan) -> GatewayError:
        """Why none of a plan's accounts may be asked, though each could when it was made."""
        method = "" if plan.segment is None else plan.segment.method
        refusals = []
        for candidate in plan.decision.candidates:
            reason: Exclusion | None = None
            if self._router.connector(candidate.connector, candidate.connector_account_id) is None:
                reason = Exclusion.UNUSABLE
            elif self._availability is not None:
                reason = self._availability.refusal(candidate, method)
            # What is free again by now was taken a moment ago.
            refusals.append(self._unavailable(candidate, method, reason or Exclusion.PROBES_TAKEN))
        return min(refusals, key=_retry_order)

    def give_back(self, plan: Plan, seconds: float) -> None:
        """The account that was taken last, less than so long ago, is not asked after all."""
        if self._availability is not None and plan.taken is not None:
            method = "" if plan.segment is None else plan.segment.method
            self._availability.give_back(plan.taken, method, seconds)

    def check_follow_up(self, operation: Operation) -> None:
        """Raises GatewayError where a payment's account must not be asked now."""
        if self._availability is None:
            return
        candidate = _account_of(operation)
        refused = self._availability.admit(candidate, "")
        if refused is not None:
            raise self._unavailable(candidate, "", refused)

    def give_back_follow_up(self, operation: Operation, seconds: float) -> None:
        """The operation that was checked less than so long ago is not sent after all."""
        if self._availability is not None:
            self._availability.give_back(_account_of(operation), "", seconds)

    def _refusal(
        self,
        command: Authorize,
        method: str,
        excluded: Sequence[Excluded],
        refusals: Mapping[Candidate, GatewayError],
    ) -> GatewayError:
        """Why a payment may go nowhere: what passes by itself, the soonest, before what has to be
        changed.
        """
        passing = [
            self._unavailable(candidate, method, reason)
            for candidate, reason in excluded
            if reason in _FOR_NOW
        ]
        if passing:
            return min(passing, key=_retry_order)
        for candidate, reason in excluded:
            return refusals.get(candidate) or self._unavailable(candidate, method, reason)
        return _nowhere(command)

    def _unavailable(self, candidate: Candidate, method: str, reason: str) -> GatewayError:
        retry_after_s = UNAVAILABLE_RETRY_S if reason in _FOR_NOW else None
        if retry_after_s is not None and self._availability is not None:
            pause_s = self._availability.pause_s(candidate, method)
            if pause_s is not None:
                retry_after_s = min(pause_s, PAUSE_S_MAX)
        return GatewayError(
            Reason.CONNECTOR_UNAVAILABLE,
            f"The connector {candidate.connector} takes no payments now; nothing was sent.",
            metadata={"connector": candidate.connector, "exclusion": str(reason)},
            retry_after_s=retry_after_s,
        )

    def observed(
        self, plan: Plan | None, mode: Mode, operation: Operation, answer: ConnectorAnswer, s: float
    ) -> None:
        """A connector's `send` ended after `s` seconds; 0 where it was too late to send."""
        by_rules = plan is not None and plan.facts is not None
        if self._observer is None and not by_rules:
            return
        segment = None if plan is None else plan.segment
        if segment is None:
            segment = Segment(operation.merchant_id, mode, "", currency=operation.currency)
        candidate = None if plan is None else plan.taken
        if candidate is None:
            candidate = _account_of(operation)
        if self._observer is not None:
            self._observer.observed(segment, candidate, operation.kind, answer, s)
        if self._learner is not None and by_rules:
            self._learner.observed(segment, candidate, operation.kind, answer, s)


def _account_of(operation: Operation) -> Candidate:
    attempt = operation.attempt
    return Candidate(attempt.connector, attempt.connector_account_id)


def _retry_order(refusal: GatewayError) -> float:
    """What passes the soonest first, and last what does not pass by itself."""
    return math.inf if refusal.retry_after_s is None else refusal.retry_after_s


def _segment(command: Authorize, facts: Facts) -> Segment:
    return Segment(
        command.merchant_id,
        command.mode,
        facts.method,
        facts.scheme,
        command.currency,
        facts.issuer_country,
        facts.channel,
        facts.card_type,
    )


def accounts_of(target: Target, served: Mapping[str, Served]) -> Sequence[Served]:
    """The merchant's accounts that a target names, the lowest priority number first."""
    if target.account:
        found = served.get(target.account)
        return () if found is None else (found,)
    return [each for each in served.values() if each.connector_name == target.connector]


def _usual_groups(served: Mapping[str, Served]) -> tuple[tuple[Target, ...], ...]:
    """Where no rule matches: the enabled account of the lowest priority number."""
    for each in served.values():
        if each.enabled and each.connector is not None:
            return ((Target(each.account_id, "", 1, 1),),)
    return ()


def _nowhere(command: Authorize) -> GatewayError:
    return refuse(
        Reason.CONNECTOR_UNAVAILABLE,
        f"No connector serves the merchant in mode {command.mode.name}.",
        mode=command.mode.name,
    )
