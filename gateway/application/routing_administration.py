"""Putting routing rules into force: checked against the accounts, kept in versions, explained."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from gateway.application.commands import Authorize
from gateway.application.ports import AmountRule, Router, Served, StoreUnavailable
from gateway.application.routing import Plan, Routing, RuleBook, accounts_of
from gateway.domain.errors import GatewayError, Reason, Violation
from gateway.domain.model import Mode
from gateway.domain.money import AMOUNT_MINOR_MAX
from gateway.routing.rule_file import Problem, RuleFile, RulesInvalid, read_rules
from gateway.routing.rules import Rule, Rules, Target, compile_rules

PAGE_SIZE_DEFAULT: Final = 50
PROBLEMS_MAX: Final = 50
"""How many problems of a file are told."""
ACTIVATE_TRIES_MAX: Final = 5
"""How often an activation is tried anew because another one came between."""

_log = logging.getLogger(__name__)


class Author(NamedTuple):
    """Who changes rules, and why: the audit record."""

    name: str
    """An API key's id, or `login:` and a name."""
    reason: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class RulesVersion:
    """A version of a merchant's rules."""

    version: int
    text: str
    """Empty in a list."""
    reason: str
    created_by: str
    created_at: datetime
    active: bool
    activated_at: datetime | None
    """When it was last put into force; None: never."""
    activated_by: str
    activation_reason: str


class PastPayment(NamedTuple):
    """What a simulation needs of a payment."""

    payment_id: str
    amount_minor: int
    currency: str
    details: bytes
    connector: str
    """Of the account that was asked first."""
    connector_account_id: str


class RuleStore(Protocol):
    """Where versions are kept. Every method raises StoreUnavailable."""

    async def put(self, merchant_id: str, mode: Mode, text: str, author: Author) -> int:
        """Keep a text as the next version; its number, or that of the newest where it is the same.

        Raises GatewayError(INVALID_REQUEST) without the merchant.
        """

    async def active(self, merchant_id: str, mode: Mode) -> int:
        """The version in force; 0: none."""

    async def activate(
        self, merchant_id: str, mode: Mode, version: int, expected: int, author: Author
    ) -> bool:
        """Put a version into force in the place of the one that is expected; 0: none.

        False where it does not exist, or another one is in force.
        """

    async def find(self, merchant_id: str, mode: Mode, version: int) -> RulesVersion | None:
        """A version with its text."""

    async def versions(
        self, merchant_id: str, mode: Mode, *, before_version: int | None, page_size: int
    ) -> Sequence[RulesVersion]:
        """Versions without their texts, the newest first."""


class Checked(NamedTuple):
    """A file that may be put into force."""

    file: RuleFile
    of_accounts: tuple[Problem, ...]
    """What is perhaps not meant of the accounts that it names."""

    @property
    def warnings(self) -> list[Problem]:
        """Those of the file, see there, and those of the accounts."""
        return [*self.file.warnings, *self.of_accounts]


class Explained(NamedTuple):
    """Where a payment would go."""

    plan: Plan
    refusal: GatewayError | None
    """Why it would go nowhere."""


class RoutingAdministration:
    """The use cases of RoutingService."""

    def __init__(
        self, store: RuleStore, router: Router, routing: Routing, book: RuleBook | None = None
    ) -> None:
        """`book` is read anew after a change, so that its own gateway knows it at once."""
        self._store = store
        self._router = router
        self._routing = routing
        self._book = book

    def check(self, merchant_id: str, mode: Mode, text: str) -> Checked:
        """Read a file and compare it with the merchant's accounts. Raises GatewayError."""
        with _refused():
            file = read_rules(text)
            of_accounts = check_accounts(file.rules, self._router.accounts(merchant_id, mode))
        return Checked(file, tuple(of_accounts))

    async def put(
        self, merchant_id: str, mode: Mode, text: str, author: Author, *, activate: bool
    ) -> tuple[int, Checked]:
        """Keep a file as a version, and put it into force where that is wanted. Raises
        GatewayError.
        """
        checked = self.check(merchant_id, mode, text)
        version = await self._store.put(merchant_id, mode, text, author)
        if activate:
            await self.activate(merchant_id, mode, version, author)
        return version, checked

    async def get(self, merchant_id: str, mode: Mode, version: int) -> RulesVersion:
        """A version, or (0) the one in force. Raises GatewayError(ROUTING_RULES_NOT_FOUND)."""
        wanted = version or await self._store.active(merchant_id, mode)
        found = await self._store.find(merchant_id, mode, wanted) if wanted else None
        if found is None:
            raise _not_found()
        return found

    async def versions(
        self, merchant_id: str, mode: Mode, *, before_version: int | None, page_size: int
    ) -> Sequence[RulesVersion]:
        """Versions without their texts, the newest first."""
        return await self._store.versions(
            merchant_id, mode, before_version=before_version, page_size=page_size
        )

    async def activate(
        self,
        merchant_id: str,
        mode: Mode,
        version: int,
        author: Author,
        expected: int | None = None,
    ) -> int:
        """Put a version into force, or (0) none; the one that was in force before.

        It is checked anew: accounts may have gone since it was put. Raises GatewayError;
        ROUTING_RULES_CHANGED where another version than `expected` is in force, CONTENTION where
        others were faster every time.
        """
        if version:
            found = await self.get(merchant_id, mode, version)
            self.check(merchant_id, mode, found.text)
        for _ in range(ACTIVATE_TRIES_MAX):
            before = await self._store.active(merchant_id, mode)
            if expected is not None and before != expected:
                raise GatewayError(
                    Reason.ROUTING_RULES_CHANGED,
                    "Another version is in force than was expected.",
                    metadata={"active_version": str(before)},
                )
            done = before == version or await self._store.activate(
                merchant_id, mode, version, before, author
            )
            if done:
                await self._read_back()
                return before
        raise GatewayError(Reason.CONTENTION, "Others put rules into force at the same time.")

    async def _read_back(self) -> None:
        if self._book is None:
            return
        try:
            await self._book.refresh()
        except (StoreUnavailable, GatewayError) as error:
            # What is stored is in force. This gateway follows as the others do.
            _log.warning("routing rules in force are read later: %s", error)

    async def explain(
        self, command: Authorize, payment_id: str, *, text: str = "", version: int = 0
    ) -> Explained:
        """Where a payment would go, by a text, a version, or what is in force. Raises GatewayError
        for a text or a version that cannot be used.
        """
        if text:
            rules, number = self.check(command.merchant_id, command.mode, text).file.rules, 0
        else:
            number = version or await self._store.active(command.merchant_id, command.mode)
            rules = compile_rules(())
            if number:
                found = await self.get(command.merchant_id, command.mode, number)
                # An account that has gone since does not end the others: payments go on as well.
                with _refused():
                    rules = read_rules(found.text).rules
        return Explained(*self._routing.consider(number, rules, command, payment_id))

    def accounts(self, merchant_id: str, mode: Mode) -> Sequence[Served]:
        """What may serve the merchant, the lowest priority number first."""
        return list(self._router.accounts(merchant_id, mode).values())


@contextmanager
def _refused() -> Iterator[None]:
    """Raises GatewayError with what is wrong with rules."""
    try:
        yield
    except RulesInvalid as error:
        raise GatewayError(
            Reason.INVALID_REQUEST,
            "The routing rules cannot be used.",
            violations=[
                Violation(f"rules_toml.{problem.path}", problem.text)
                for problem in error.problems[:PROBLEMS_MAX]
            ],
        ) from None


def _not_found() -> GatewayError:
    return GatewayError(
        Reason.ROUTING_RULES_NOT_FOUND, "The merchant has no such version of routing rules."
    )


# --- rules and accounts ---------------------------------------------------------------------------


def check_accounts(rules: Rules, served: Mapping[str, Served]) -> list[Problem]:
    """Compare what rules name with the merchant's accounts; what is worth a warning.

    Raises RulesInvalid for a target that no account serves, and for currencies, amounts and methods
    that no target of a rule can take.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    by_name = {rule.name: rule for rule in rules.rules}
    for index, rule in enumerate(rules.rules):
        path = f"rule[{index}]"
        for target in rule.all_targets:
            found = accounts_of(target, served)
            if not found:
                what = "account" if target.account else "account at the connector"
                problems.append(
                    Problem(f"{path}.targets", f"the merchant has no {what} {target.name}")
                )
            elif not any(each.enabled and each.connector for each in found):
                warnings.append(
                    Problem(f"{path}.targets", f"{target.name} takes no new payments now")
                )
        warnings += _named_twice(f"{path}.targets", rule, served)
        reached = [
            each
            for target in _with_following(rule, by_name)
            for each in accounts_of(target, served)
        ]
        # An account that cannot be opened here may be able to do anything.
        if reached and all(each.connector is not None for each in reached):
            problems += _beyond_all(path, rule, reached)
    if problems:
        raise RulesInvalid(problems)
    return warnings


def _with_following(rule: Rule, by_name: Mapping[str, Rule]) -> Iterable[Target]:
    current: Rule | None = rule
    while current is not None:
        yield from current.all_targets
        current = by_name.get(current.then)


def _named_twice(path: str, rule: Rule, served: Mapping[str, Served]) -> Iterable[Problem]:
    """Accounts that a rule names, and once more by their connector: their shares add up."""
    arms = [rule.targets] if rule.experiment is None else [a.targets for a in rule.experiment.arms]
    for targets in arms:
        connectors = {target.connector for target in targets if target.connector}
        for target in targets:
            found = served.get(target.account)
            if found is not None and found.connector_name in connectors:
                yield Problem(
                    path,
                    f"{target.account} is named, and {found.connector_name} as well, where it is"
                    " an account: it is asked once, and first in the shares of both",
                )


def _beyond_all(path: str, rule: Rule, reached: Sequence[Served]) -> Iterable[Problem]:
    capabilities = [each.connector.capabilities for each in reached if each.connector is not None]
    for code in sorted(rule.when.currency or ()):
        amounts = [
            AmountRule() if each.amounts is None else each.amounts[code]
            for each in capabilities
            if each.amounts is None or code in each.amounts
        ]
        if not amounts:
            yield Problem(f"{path}.when.currency", f"no target takes {code}")
        elif not any(_takes(each, rule.when.amount_minor) for each in amounts):
            yield Problem(f"{path}.when.amount_minor", f"no target can express it in {code}")
    for method in sorted(rule.when.method or ()):
        if not any(method in each.methods for each in capabilities):
            yield Problem(f"{path}.when.method", f"no target takes {method}")


def _takes(rule: AmountRule, span: tuple[int, int] | None) -> bool:
    low, high = (0, AMOUNT_MINOR_MAX) if span is None else span
    first = -(-low // rule.step_minor) * rule.step_minor
    return first <= min(high, rule.amount_minor_max)
