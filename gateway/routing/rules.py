"""A merchant's routing rules, and what they choose.

Rules are looked at in their order, and the first whose conditions hold decides.
`gateway.routing.rule_file` reads the file that they are written in.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b
from operator import itemgetter
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from gateway.domain.model import ResponseCode
from gateway.routing.cascade import SOFT_DECLINES

ATTEMPTS_MAX: Final = 5
"""How many accounts may be asked for one authorization."""
ATTEMPTS_DEFAULT: Final = 2
BIN_DIGITS_MAX: Final = 8
KINDS_MAX: Final = 256
"""Kinds of payments whose rules are remembered, of each merchant and mode."""
GROUPS_MAX: Final = 4_096
"""Lists of targets whose groups are remembered."""
_BIN_END: Final[int] = 10**BIN_DIGITS_MAX
_ALL_BINS: Final = (-1, _BIN_END)
"""More than all: a BIN that is not known is in no range."""


class Facts(NamedTuple):
    """What a request tells besides its amount. Empty: not known."""

    method: str = "card"
    """See `Segment.method`."""
    scheme: str = ""
    bin: str = ""
    """The card number's first 6 to 8 digits."""
    issuer_country: str = ""
    card_type: str = ""
    """One of CARD_TYPES."""
    channel: str = "ECOMMERCE"
    customer_id: str = ""
    metadata: Mapping[str, str] = MappingProxyType({})
    instrument: str = ""
    """What is paid with, a token or its like, by which reattempts are counted; never shown."""


class SplitBy(StrEnum):
    """What a split's hash is taken of; the same value goes the same way."""

    PAYMENT = "payment"
    CUSTOMER = "customer"
    """The payment where the request names no customer."""


class Order(StrEnum):
    """Who orders targets of the same priority."""

    WEIGHTS = "weights"
    LEARNED = "learned"
    """The ranking of what was learned; by weights where there is none."""


class Target(NamedTuple):
    """Where a rule sends payments: one account, or the merchant's accounts at a connector."""

    account: str
    connector: str
    """One of both is empty."""
    priority: int
    weight: int

    @property
    def name(self) -> str:
        """As the file names it."""
        return self.account or self.connector


class Arm(NamedTuple):
    """A part of an experiment."""

    name: str
    share: int
    targets: tuple[Target, ...]


class Experiment(NamedTuple):
    """Payments of a rule, divided into arms."""

    name: str
    split_by: SplitBy
    arms: tuple[Arm, ...]


Kind: TypeAlias = tuple[str, str, str, str, str, str]
"""Currency, method, scheme, issuer country, card type and channel of a payment."""
Ranges = tuple[tuple[int, int], ...]
"""Inclusive, ascending, apart from each other."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """When a rule decides: all that are given must hold. None: not given."""

    currency: frozenset[str] | None = None
    amount_minor: tuple[int, int] | None = None
    """The smallest and the largest, inclusive."""
    method: frozenset[str] | None = None
    scheme: frozenset[str] | None = None
    bin: Ranges | None = None
    """Of BINs of eight digits."""
    issuer_country: frozenset[str] | None = None
    card_type: frozenset[str] | None = None
    channel: frozenset[str] | None = None
    metadata: Mapping[str, frozenset[str]] | None = None

    def suit(self, kind: Kind) -> bool:
        """Whether those hold that look at the payment's kind; what is not known meets none."""
        sets = (
            self.currency,
            self.method,
            self.scheme,
            self.issuer_country,
            self.card_type,
            self.channel,
        )
        return all(each is None or its in each for each, its in zip(sets, kind, strict=True))

    def hold(self, facts: Facts, bins: tuple[int, int] | None, amount_minor: int) -> bool:
        """Whether the others hold, too. `bins` is `bins_of` the facts' BIN."""
        span = self.amount_minor
        return (
            (span is None or span[0] <= amount_minor <= span[1])
            and (self.bin is None or (bins is not None and _has_bins(self.bin, bins)))
            and (
                self.metadata is None
                or all(facts.metadata.get(key) in its for key, its in self.metadata.items())
            )
        )

    def cover(self, other: "Conditions") -> bool:
        """Whether these hold wherever the others do."""
        return (
            all(_covers(mine, its) for mine, its in self._sets(other))
            and _range_covers(self.amount_minor, other.amount_minor)
            and _ranges_cover(self.bin, other.bin)
            and (
                self.metadata is None
                or (
                    other.metadata is not None
                    and all(
                        key in other.metadata and other.metadata[key] <= values
                        for key, values in self.metadata.items()
                    )
                )
            )
        )

    def meet(self, other: "Conditions") -> bool:
        """Whether there is a payment that both hold for."""
        if any(
            mine is not None and its is not None and not mine & its
            for mine, its in self._sets(other)
        ):
            return False
        mine, its = self.amount_minor, other.amount_minor
        if mine is not None and its is not None and (mine[1] < its[0] or its[1] < mine[0]):
            return False
        if self.bin is not None and other.bin is not None and not _ranges_meet(self.bin, other.bin):
            return False
        shared = (self.metadata or {}).keys() & (other.metadata or {}).keys()
        return all((self.metadata or {})[key] & (other.metadata or {})[key] for key in shared)

    def _sets(
        self, other: "Conditions"
    ) -> Iterable[tuple[frozenset[str] | None, frozenset[str] | None]]:
        return (
            (self.currency, other.currency),
            (self.method, other.method),
            (self.scheme, other.scheme),
            (self.issuer_country, other.issuer_country),
            (self.card_type, other.card_type),
            (self.channel, other.channel),
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule."""

    name: str
    when: Conditions
    targets: tuple[Target, ...]
    """Empty with an experiment."""
    experiment: Experiment | None = None
    split_by: SplitBy = SplitBy.PAYMENT
    order: Order = Order.WEIGHTS
    attempts_max: int = ATTEMPTS_DEFAULT
    cascade_on: frozenset[ResponseCode] = SOFT_DECLINES
    """The declines after which the next target is asked; 1 attempt: after none."""
    then: str = ""
    """The rule whose targets follow these, whatever its conditions are."""

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """Its own, those of all arms."""
        if self.experiment is None:
            return self.targets
        return tuple(target for arm in self.experiment.arms for target in arm.targets)


class Choice(NamedTuple):
    """What the rules say of a payment."""

    rule: Rule
    experiment: str
    arm: str
    groups: tuple[tuple[Target, ...], ...]
    """In the order to try; targets of one group have the same priority and are in the order of
    their weights' hash, or as the file names them where a ranking follows."""

    @property
    def is_learned(self) -> bool:
        """Whether what was learnt orders the targets of a group."""
        return self.rule.order is Order.LEARNED


_Bounded: TypeAlias = tuple[int, int, Rule]
"""A rule, behind what a payment's BINs have to be between."""


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules of a merchant and a mode."""

    rules: tuple[Rule, ...]
    _by_name: Mapping[str, Rule] = field(default_factory=dict, repr=False)
    _suiting: dict[Kind, tuple[_Bounded, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """The rules that payments of a kind may go by: most rules of a long file are for others."""

    def match(self, facts: Facts, amount_minor: int, currency: str) -> Rule | None:
        """The first rule whose conditions hold."""
        kind = (
            currency,
            facts.method,
            facts.scheme,
            facts.issuer_country,
            facts.card_type,
            facts.channel,
        )
        rules = self._suiting.get(kind)
        if rules is None:
            if len(self._suiting) >= KINDS_MAX:
                self._suiting.clear()
            rules = tuple(
                (*_bin_bounds(rule.when.bin), rule) for rule in self.rules if rule.when.suit(kind)
            )
            self._suiting[kind] = rules
        bins = bins_of(facts.bin)
        first, last = _ALL_BINS if bins is None else bins
        for low, high, rule in rules:
            # Many rules differ in their BINs alone.
            if low <= first and last <= high and rule.when.hold(facts, bins, amount_minor):
                return rule
        return None

    def choose(
        self,
        facts: Facts,
        amount_minor: int,
        currency: str,
        payment_id: str,
        *,
        is_ranked: bool = False,
    ) -> Choice | None:
        """What the rules say of a payment; None where none decides.

        `is_ranked`: there is a ranking, which orders what is to be in the order that was learnt.
        """
        rule = self.match(facts, amount_minor, currency)
        if rule is None:
            return None
        experiment = arm = ""
        targets = rule.targets
        if rule.experiment is not None:
            chosen = _arm(rule.experiment, _split_key(rule.experiment.split_by, facts, payment_id))
            experiment, arm, targets = rule.experiment.name, chosen.name, chosen.targets
        groups: list[tuple[Target, ...]] = []
        by_weight = not is_ranked or rule.order is not Order.LEARNED
        current: Rule | None = rule
        while current is not None:
            for group, beginnings in _by_priority(current.name, targets):
                if not by_weight or len(group) == 1:
                    groups.append(group)
                    continue
                key = _split_key(current.split_by, facts, payment_id)
                groups.append(_by_weight(group, beginnings, key))
            current = self._by_name.get(current.then)
            targets = () if current is None else current.targets
        return Choice(rule, experiment, arm, tuple(groups))


def compile_rules(rules: Sequence[Rule]) -> Rules:
    """Rules, ready to choose."""
    return Rules(tuple(rules), {rule.name: rule for rule in rules})


# --- splits ---------------------------------------------------------------------------------------


def stable_hash(*parts: str) -> int:
    """64 bits that are the same on every machine, for ever: a payment stays in its arm."""
    return _number(_hashed(*parts))


def _hashed(*parts: str) -> bytes:
    """What is hashed of these parts."""
    return "\0".join(parts).encode("utf-8", "replace")


def _number(octets: bytes) -> int:
    return int.from_bytes(blake2b(octets, digest_size=8).digest(), "big")


def _split_key(split_by: SplitBy, facts: Facts, payment_id: str) -> str:
    if split_by is SplitBy.CUSTOMER and facts.customer_id:
        return facts.customer_id
    return payment_id


def _arm(experiment: Experiment, key: str) -> Arm:
    place = stable_hash("arm", experiment.name, key) % sum(arm.share for arm in experiment.arms)
    for arm in experiment.arms:
        place -= arm.share
        if place < 0:
            return arm
    raise AssertionError("the place is below the sum of the shares")


@lru_cache(GROUPS_MAX)
def _by_priority(
    rule: str, targets: tuple[Target, ...]
) -> tuple[tuple[tuple[Target, ...], tuple[bytes, ...]], ...]:
    """Targets of the same priority together, the lowest number first, and for each of them what
    the text begins with that its draws are hashed from.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.priority, []).append(target)
    return tuple(
        (tuple(group), tuple(_hashed("target", rule, target.name, "") for target in group))
        for _, group in sorted(groups.items())
    )


def _by_weight(
    group: tuple[Target, ...], beginnings: tuple[bytes, ...], key: str
) -> tuple[Target, ...]:
    """Targets of the same priority in the order of weighted rendezvous hashing.

    Each target draws from the hash of itself and the key, so that one that is taken away leaves
    the others' payments where they were (Thaler and Ravishankar 1998; the weights as in
    draft-ietf-bess-weighted-hrw). Each is first with the probability of its share of the weights.
    """
    octets = _hashed(key)
    draws: list[tuple[float, Target]] = []
    for target, beginning in zip(group, beginnings, strict=True):
        uniform = (_number(beginning + octets) + 0.5) / 2**64
        draws.append((-target[3] / math.log(uniform) if uniform < 1.0 else math.inf, target))
    draws.sort(key=_first, reverse=True)
    return tuple([target for _, target in draws])


_first = itemgetter(0)


# --- conditions -----------------------------------------------------------------------------------


def bins_of(digits: str) -> tuple[int, int] | None:
    """The first and the last BIN of eight digits that begin so; None where nothing is known."""
    if not digits:
        return None
    return int(digits.ljust(BIN_DIGITS_MAX, "0")), int(digits.ljust(BIN_DIGITS_MAX, "9"))


def _bin_bounds(ranges: Ranges | None) -> tuple[int, int]:
    """What BINs have to be between to be in the ranges."""
    return _ALL_BINS if ranges is None else (ranges[0][0], ranges[-1][1])


def _has_bins(ranges: Ranges, bins: tuple[int, int]) -> bool:
    """Whether all of these BINs are in the ranges."""
    index = bisect_right(ranges, (bins[0], _BIN_END)) - 1
    return index >= 0 and bins[1] <= ranges[index][1]


def _covers(mine: frozenset[str] | None, its: frozenset[str] | None) -> bool:
    return mine is None or (its is not None and its <= mine)


def _range_covers(mine: tuple[int, int] | None, its: tuple[int, int] | None) -> bool:
    return mine is None or (its is not None and mine[0] <= its[0] and its[1] <= mine[1])


def _ranges_cover(mine: Ranges | None, its: Ranges | None) -> bool:
    return mine is None or (its is not None and all(_has_bins(mine, each) for each in its))


def _ranges_meet(mine: Ranges, its: Ranges) -> bool:
    # Both are in order and apart, so that one look at each is enough.
    at, its_at = 0, 0
    while at < len(mine) and its_at < len(its):
        low, high = mine[at]
        its_low, its_high = its[its_at]
        if low <= its_high and its_low <= high:
            return True
        if high < its_high:
            at += 1
        else:
            its_at += 1
    return False
