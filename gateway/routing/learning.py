"""Routing by success: counts of each kind of payment that fade, and a choice that goes on learning.

What is counted is kept for a payment's segment and for three wider ones, and a segment with few
payments is thought of as the next wider one. The choice is Thompson sampling over Beta posteriors.
Its probabilities are computed (by the normal approximation of the difference of two) instead of
sampled, so that one draw decides, an explanation can tell them, and the share of payments that may
go to another account than the best one, the exploration budget, is a bound and not a hope.

With a merchant's costs the best account is the one of the largest expected margin:
success × (worth of the payment - fees of an approval) - fees of an attempt.
Where no approval is worth its fees, it is the one of the most approvals.
"""

import asyncio
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final, NamedTuple, Protocol, TypeAlias

from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.breakers import ExchangeUnavailable, is_failure
from gateway.routing.costs import MICRO, CostBook, Costs, Tariff
from gateway.routing.model import Candidate, Learned, Scored, Segment

EXCHANGED_MAX: Final = 100
"""Segments that are exchanged with other processes at once: Redis does nothing else meanwhile."""
DRAW_BITS: Final = 64
EXPONENT_MAX: Final = 500.0
"""After so many half-lives weights begin anew: floats end at 2 ** 1024."""
_DRAW_FACTOR: Final = 6_364_136_223_846_793_005
_DRAW_STEP: Final = 1_442_695_040_888_963_407
"""One draw gives others by Knuth's linear congruential generator (The Art of Computer Programming,
volume 2, 3.3.4, MMIX)."""

SegmentKey: TypeAlias = tuple[str, ...]
"""A segment or a wider one: the first of merchant, mode, method, currency, scheme, issuer country
and channel."""
AccountKey: TypeAlias = tuple[str, str]
"""Connector and account."""

_COUNTED: Final = Segment._fields.index("card_type")
"""So many fields of a Segment are what success is counted by; the last is its costs' alone."""

_new = tuple.__new__
"""Makes a named tuple at a third of what its class costs: two for each candidate of a decision."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LearningLimits:
    """How it learns."""

    half_life_s: float = 1800.0
    """After so long a payment counts half."""
    exploration_share: float = 0.05
    """At most so many payments go to another account than the best one."""
    prior_calls: float = 20.0
    """What a wider segment tells weighs as much as so many payments."""
    prior_success: float = 0.8
    """What is thought of an account that nothing is known of."""
    ranking_age_s_max: float = 0.1
    """For so long payments of a kind go by what was known at its beginning."""
    segments_max: int = 100_000
    """In memory, wider ones included; beyond it the one without payments for longest is
    forgotten."""


class Increment(NamedTuple):
    """What one process counted of an account in a segment."""

    account: AccountKey
    successes: float
    failures: float


class CountExchange(Protocol):
    """Adds up what processes count."""

    async def exchange(
        self, increments: Mapping[SegmentKey, Sequence[Increment]], half_life_s: float
    ) -> Mapping[SegmentKey, Sequence[Increment]]:
        """Add, and learn of these segments what all have counted, faded to now.

        Raises ExchangeUnavailable.
        """


_Success: TypeAlias = tuple[Candidate, float, float, float]
"""A candidate, its success, the calls that this is known from (the prior's included), the success's
variance."""
_Ranking: TypeAlias = tuple[tuple[Scored, ...], list[float]]
"""Candidates, the best one first, and how often each is to be the first."""


class _Counts:
    """What is known of an account in a segment."""

    __slots__ = ("calls", "new_failures", "new_successes", "successes")

    def __init__(self) -> None:
        self.calls = 0.0
        """In the weights of their times: see `SuccessRanking._weight`."""
        self.successes = 0.0
        """Of these."""
        self.new_successes = 0.0
        """Those that others have not been told of; without weight."""
        self.new_failures = 0.0


_NOTHING: Final = _Counts()


class _Level:
    """What is known of the accounts in a segment, or in a wider one."""

    __slots__ = ("accounts", "key", "lines")

    def __init__(self, key: SegmentKey) -> None:
        self.key = key
        self.accounts: dict[AccountKey, _Counts] = {}
        self.lines = 0
        """How many lines it stands in."""

    def counts(self, account: AccountKey) -> _Counts:
        counts = self.accounts.get(account)
        if counts is None:
            counts = self.accounts[account] = _Counts()
        return counts


class _Line:
    """A segment with the wider ones, the widest first: found at once for each payment."""

    __slots__ = ("accounts", "levels")

    def __init__(self, levels: tuple[_Level, ...]) -> None:
        self.levels = levels
        self.accounts: dict[AccountKey, tuple[_Counts, ...]] = {}
        """Of those with calls here: the counts of each level."""

    def counts(self, account: AccountKey) -> tuple[_Counts, ...]:
        """To count in."""
        counts = self.accounts.get(account)
        if counts is None:
            counts = tuple([level.counts(account) for level in self.levels])
            self.accounts[account] = counts
        return counts

    def known(self, account: AccountKey) -> tuple[_Counts, ...]:
        """To read, and nothing is kept of an account without calls."""
        return self.accounts.get(account) or tuple(
            [level.accounts.get(account, _NOTHING) for level in self.levels]
        )


_Estimate: TypeAlias = tuple[float, Candidate, float, float, float, float]
"""Utility, candidate, success, the calls that this is known from (the prior's included), the
utility's variance, cost in minor units. No class: a decision makes one for each candidate."""


class SuccessRanking:
    """Implements the ports Ranking and Observer."""

    def __init__(
        self,
        limits: LearningLimits,
        costs: CostBook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._costs = CostBook() if costs is None else costs
        self._clock = clock
        self._lines: OrderedDict[tuple[object, ...], _Line] = OrderedDict()
        """By what success is counted by; the one without payments for longest first."""
        self._levels: dict[SegmentKey, _Level] = {}
        self._pending: dict[_Level, None] = {}
        """What others are to be told of, or to be asked for."""
        self._rankings: dict[tuple[_Line, tuple[Candidate, ...]], _Ranking] = {}
        """Without costs."""
        self._priced: dict[
            tuple[_Line, tuple[Candidate, ...], str], tuple[list[_Success], list[Tariff | None]]
        ] = {}
        """With costs, by the card's type too."""
        self._stale_at = -math.inf
        """All of both hold until then."""
        self._weighed_since = clock()

    # --- Ranking ---

    def rank(
        self, segment: Segment, candidates: Sequence[Candidate], amount_minor: int, draw: int
    ) -> Sequence[Scored]:
        """See the port."""
        line = self._lines.get(segment[:_COUNTED]) or self._new_line(segment)
        costs = self._costs.costs(segment.merchant_id)
        now = self._clock()
        if now >= self._stale_at:
            self._rankings.clear()
            self._priced.clear()
            self._stale_at = now + self._limits.ranking_age_s_max
        among = tuple(candidates)
        if costs is not None:
            estimates = self._with_costs(line, segment, among, amount_minor, costs, now)
            ranking, _ = self._order(estimates, draw)
        elif (line, among) in self._rankings:
            ranking = self._rankings[line, among]
        else:
            estimates = [
                (success, candidate, success, calls, variance, 0.0)
                for candidate, success, calls, variance in self._successes(line, among, now)
            ]
            ranking, has_equals = self._order(estimates, draw)
            if not has_equals:  # of equals each payment has an order of its own
                self._rankings[line, among] = ranking
        scored, chances = ranking
        chosen = _drawn(chances, draw)
        if not chosen:
            return scored
        return (scored[chosen], *scored[:chosen], *scored[chosen + 1 :])

    def _order(self, estimates: list[_Estimate], draw: int) -> tuple[_Ranking, bool]:
        """The ranking, and whether the draw had to decide between equals."""
        estimates.sort(key=_utility, reverse=True)
        has_equals = _break_ties(estimates, draw)
        chances = self._chances(estimates)
        scored = []
        for place, (utility, candidate, success, calls, _, cost_minor) in enumerate(estimates):
            learned = _new(Learned, (success, calls, cost_minor, chances[place]))
            scored.append(_new(Scored, (candidate, utility, learned)))
        return (tuple(scored), chances), has_equals

    def _chances(self, estimates: Sequence[_Estimate]) -> list[float]:
        """How often each is first; the best one comes first here. Its equals never are: of them the
        weights have chosen it.
        """
        if len(estimates) < 2:
            return [1.0] * len(estimates)
        utility, _, _, _, variance, _ = estimates[0]
        chances = [0.0]
        for other, _, _, _, its_variance, _ in estimates[1:]:
            if other == utility:
                chances.append(0.0)
                continue
            spread = math.sqrt(2 * (variance + its_variance))
            chances.append(0.5 * math.erfc((utility - other) / spread) if spread > 0 else 0.0)
        explored = sum(chances)
        if explored > self._limits.exploration_share:
            factor = self._limits.exploration_share / explored
            chances = [chance * factor for chance in chances]
            explored = self._limits.exploration_share
        chances[0] = 1 - explored
        return chances

    def _successes(
        self, line: _Line, candidates: Sequence[Candidate], now: float
    ) -> list[_Success]:
        """What is thought of each: its posterior in the narrowest segment, by way of the wider."""
        prior_success, weight = self._limits.prior_success, self._weight(now)
        prior = self._limits.prior_calls * weight
        successes = []
        for candidate in candidates:
            success, known = prior_success, 0.0
            for counts in line.known(candidate[:2]):
                known = counts.calls
                if known:
                    success = (success * prior + counts.successes) / (prior + known)
            calls = (prior + known) / weight
            successes.append((candidate, success, calls, success * (1 - success) / (calls + 1)))
        return successes

    def _with_costs(
        self,
        line: _Line,
        segment: Segment,
        candidates: tuple[Candidate, ...],
        amount_minor: int,
        costs: Costs,
        now: float,
    ) -> list[_Estimate]:
        key = line, candidates, segment.card_type
        priced = self._priced.get(key)
        if priced is None:
            day = self._costs.today()
            tariffs = [costs.tariff(each[1], segment, day) for each in candidates]
            priced = self._priced[key] = self._successes(line, candidates, now), tariffs
        successes, tariffs = priced
        fees = _fees(tariffs, amount_minor)
        worth = amount_minor * costs.margin_ppm / MICRO
        # Where every approval is a loss, the largest margin is that of who declines most.
        by_margin = fees is not None and any(approval < worth for _, approval in fees)
        estimates: list[_Estimate] = []
        for place, (candidate, success, calls, variance) in enumerate(successes):
            attempt, approval = (0.0, 0.0) if fees is None else fees[place]
            cost_minor = attempt + success * approval
            if not by_margin:
                estimates.append((success, candidate, success, calls, variance, cost_minor))
                continue
            gain = worth - approval
            utility = success * gain - attempt
            spread = variance * gain * gain
            estimates.append((utility, candidate, success, calls, spread, cost_minor))
        return estimates

    # --- Observer ---

    def observed(
        self,
        segment: Segment,
        candidate: Candidate,
        kind: OperationKind,
        answer: ConnectorAnswer,
        seconds: float,  # noqa: ARG002 - the port's
    ) -> None:
        """See the port."""
        if kind is not OperationKind.AUTHORIZE:
            return
        success = _is_success(answer)
        if success is None:
            return
        weight = self._weight(self._clock())
        account = candidate[:2]
        key = segment[:_COUNTED]
        line = self._lines.get(key)
        if line is None:
            line = self._new_line(segment)
        else:
            self._lines.move_to_end(key)
        for counts in line.accounts.get(account) or line.counts(account):
            counts.calls += weight
            if success:
                counts.successes += weight
                counts.new_successes += 1
            else:
                counts.new_failures += 1
        self._pending.update(dict.fromkeys(line.levels))

    def _weight(self, now: float) -> float:
        """What a call counts now; what was counted before keeps its weight and so fades beside it.

        Forward decay (Cormode, Shkapenyuk, Srivastava and Xu 2009): nothing has to be faded when it
        is read, but once in EXPONENT_MAX half-lives, before numbers grow too large.
        """
        exponent = (now - self._weighed_since) / self._limits.half_life_s
        if exponent > EXPONENT_MAX:
            fading = math.exp2(-exponent)
            for level in self._levels.values():
                for counts in level.accounts.values():
                    counts.calls *= fading
                    counts.successes *= fading
            self._weighed_since = now
            return 1.0
        return math.exp2(exponent)

    @property
    def segments(self) -> int:
        """How many are in memory."""
        return len(self._levels)

    def _new_line(self, segment: Segment) -> _Line:
        """Others, or this process before it began anew, may know a segment that is new here, and
        are asked for it.
        """
        levels = tuple([self._level(key) for key in _levels(segment)])
        line = self._lines[segment[:_COUNTED]] = _Line(levels)
        while len(self._levels) > self._limits.segments_max and len(self._lines) > 1:
            _, forgotten = self._lines.popitem(last=False)
            for level in forgotten.levels:
                level.lines -= 1
                if not level.lines:
                    del self._levels[level.key]
                    self._pending.pop(level, None)
        return line

    def _level(self, key: SegmentKey) -> _Level:
        level = self._levels.get(key)
        if level is None:
            level = self._levels[key] = _Level(key)
            self._pending[level] = None
        level.lines += 1
        return level

    # --- other processes ---

    async def run(self, exchange: CountExchange, interval_s: float) -> None:
        """Exchange counts with other processes, again and again, until cancelled."""
        is_away = False
        while True:
            try:
                await self.synchronize(exchange)
                is_away = False
            except ExchangeUnavailable as error:
                if not is_away:
                    _log.warning("what routing learns is not shared: %s", error)
                is_away = True
            await asyncio.sleep(interval_s * random.uniform(0.8, 1.2))

    async def synchronize(self, exchange: CountExchange) -> None:
        """Tell the others what was counted, and take over what all have counted.

        Raises ExchangeUnavailable: then what was told may count twice.
        """
        while self._pending:
            levels = list(self._pending)[:EXCHANGED_MAX]
            taken = {level.key: self._take(level) for level in levels}
            try:
                totals = await exchange.exchange(taken, self._limits.half_life_s)
            except BaseException:
                self._put_back(taken)
                raise
            for key, accounts in totals.items():
                self._take_over(key, accounts)
            if len(taken) < EXCHANGED_MAX:
                return

    def _take(self, level: _Level) -> list[Increment]:
        """What others are told of a segment."""
        del self._pending[level]
        increments = []
        for account, counts in level.accounts.items():
            successes, failures = counts.new_successes, counts.new_failures
            if successes or failures:
                increments.append(Increment(account, successes, failures))
                counts.new_successes = counts.new_failures = 0.0
        return increments

    def _take_over(self, key: SegmentKey, accounts: Sequence[Increment]) -> None:
        level = self._levels.get(key)
        if level is None:
            return
        weight = self._weight(self._clock())
        for account, successes, failures in accounts:
            counts = level.counts(account)
            # And what was counted here since.
            counts.successes = weight * (successes + counts.new_successes)
            counts.calls = counts.successes + weight * (failures + counts.new_failures)

    def _put_back(self, taken: Mapping[SegmentKey, Sequence[Increment]]) -> None:
        for key, increments in taken.items():
            level = self._levels.get(key)
            if level is None:
                continue
            self._pending[level] = None
            for account, successes, failures in increments:
                counts = level.counts(account)
                counts.new_successes += successes
                counts.new_failures += failures


def _fees(tariffs: Sequence[Tariff | None], amount_minor: int) -> list[tuple[float, float]] | None:
    """For an attempt and for an approval, in minor units; None where no candidate's are known.

    A candidate whose fees are not known is as dear as the dearest that are.
    """
    told = [tariff.cost(amount_minor) for tariff in tariffs if tariff is not None]
    fees = [(attempt / MICRO, approval / MICRO) for attempt, approval in told]
    if len(fees) == len(tariffs):
        return fees
    if not fees:
        return None
    dearest = max(attempt for attempt, _ in fees), max(approval for _, approval in fees)
    known = iter(fees)
    return [dearest if tariff is None else next(known) for tariff in tariffs]


_utility = itemgetter(0)


def _drawn(chances: Sequence[float], draw: int) -> int:
    """Which place is the first: the best one's, but for what is explored."""
    left = draw / (1 << DRAW_BITS)
    if chances and left < 1 - chances[0]:
        for place in range(1, len(chances)):
            left -= chances[place]
            if left < 0:
                return place
    return 0


def _break_ties(estimates: list[_Estimate], draw: int) -> bool:
    """Those of the same utility, as all are that nothing is known of, by a draw of their weights;
    whether there were any.

    What is in order already is looked at, and no more.
    """
    start, count, found = 0, len(estimates), False
    while start < count - 1:
        utility, end = estimates[start][0], start + 1
        while end < count and estimates[end][0] == utility:
            end += 1
        found = found or end - start > 1
        while start < end - 1:
            draw = (draw * _DRAW_FACTOR + _DRAW_STEP) % (1 << DRAW_BITS)
            weights = sum(each[1].weight for each in estimates[start:end])
            left = draw * weights >> DRAW_BITS
            place = start
            while left >= estimates[place][1].weight:
                left -= estimates[place][1].weight
                place += 1
            estimates.insert(start, estimates.pop(place))
            start += 1
        start = end
    return found


def _is_success(answer: ConnectorAnswer) -> bool | None:
    """None where it tells nothing, or nothing yet."""
    if answer.delivery is not Delivery.ANSWERED:
        return False if is_failure(answer) else None
    if answer.verdict is Verdict.APPROVED:
        return True
    return False if answer.verdict in (Verdict.DECLINED, Verdict.FAILED) else None


_MODES: Final = {mode: mode.name for mode in Mode}


def _levels(segment: Segment) -> tuple[SegmentKey, SegmentKey, SegmentKey, SegmentKey]:
    """The segment and the wider ones, the widest first; all of them are the merchant's own."""
    merchant_id, mode, method, scheme, currency, issuer_country, channel, _ = segment
    widest = merchant_id, _MODES[mode], method
    wider = (*widest, currency, scheme)
    return (
        widest,
        wider,
        (*wider, issuer_country),
        (*wider, issuer_country, channel),
    )
