"""Routing by success: what is learnt, and how seldom another account than the best is tried."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.breakers import ExchangeUnavailable
from gateway.routing.costs import CostBook, parse_costs
from gateway.routing.learning import Increment, LearningLimits, SegmentKey, SuccessRanking
from gateway.routing.model import Candidate, Segment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LIMITS = LearningLimits(half_life_s=1000.0, ranking_age_s_max=0.0)
SEGMENT = Segment("mer_1", Mode.TEST, "card", "visa", "EUR", "DE", "ECOMMERCE")
GOOD, BAD = Candidate("one", "acc_1"), Candidate("two", "acc_2")
APPROVED = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
DECLINED = ConnectorAnswer(Delivery.ANSWERED, Verdict.DECLINED)
PENDING = ConnectorAnswer(Delivery.ANSWERED, Verdict.PENDING)
TIMED_OUT = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)
NEVER = (1 << 64) - 1
"""The draw that explores least."""


class _World:
    def __init__(self, limits: LearningLimits = LIMITS, costs: CostBook | None = None) -> None:
        self.now = 0.0
        self.ranking = SuccessRanking(limits, costs, lambda: self.now)

    def count(
        self,
        candidate: Candidate,
        approved: int,
        declined: int,
        segment: Segment = SEGMENT,
    ) -> None:
        for answer, times in ((APPROVED, approved), (DECLINED, declined)):
            for _ in range(times):
                self.observe(candidate, answer, segment)

    def observe(
        self, candidate: Candidate, answer: ConnectorAnswer, segment: Segment = SEGMENT
    ) -> None:
        kind = OperationKind.AUTHORIZE
        self.ranking.observed(segment, candidate, kind, answer, 0.1)

    def first(self, draw: int = NEVER, segment: Segment = SEGMENT) -> Candidate:
        return self.ranking.rank(segment, [BAD, GOOD], 1000, draw)[0].candidate

    def success(self, candidate: Candidate, segment: Segment = SEGMENT) -> float:
        scored = self.ranking.rank(segment, [candidate], 1000, NEVER)[0]
        assert scored.learned is not None
        return scored.learned.success


def test_the_account_that_approves_more_comes_first() -> None:
    world = _World()
    world.count(GOOD, 95, 5)
    world.count(BAD, 80, 20)
    assert world.first() == GOOD


def test_the_cards_type_changes_costs_and_not_what_is_learnt() -> None:
    book = CostBook()
    book.put(
        "mer_1",
        parse_costs(
            '[[fee]]\naccount = "acc_1"\ncurrency = "EUR"\npercentage = "1"\n'
            '[[fee]]\naccount = "acc_2"\ncurrency = "EUR"\n'
            '[[fee.interchange]]\ncard_type = "debit"\npercentage = "0.2"\n'
            '[[fee.interchange]]\npercentage = "1.8"\n'
        ),
    )
    world = _World(replace(LIMITS, ranking_age_s_max=60.0), book)
    world.count(GOOD, 50, 50)
    world.count(BAD, 50, 50)
    debit, credit = (SEGMENT._replace(card_type=each) for each in ("debit", "credit"))
    assert world.success(BAD, debit) == world.success(BAD, credit) == world.success(BAD)
    assert (world.first(segment=debit), world.first(segment=credit)) == (BAD, GOOD)


def test_an_answer_that_is_still_to_come_counts_for_nothing() -> None:
    world = _World()
    before = world.success(GOOD)
    world.observe(GOOD, PENDING)
    assert world.success(GOOD) == before
    world.observe(GOOD, TIMED_OUT)
    assert world.success(GOOD) < before


def test_a_segment_without_payments_is_thought_of_as_the_wider_one() -> None:
    world = _World()
    world.count(GOOD, 950, 50)
    world.count(BAD, 500, 500)
    cold = SEGMENT._replace(issuer_country="PT", channel="MAIL_ORDER")
    assert world.first(segment=cold) == GOOD
    assert world.success(BAD, cold) == pytest.approx(0.5, abs=0.02)


def test_a_segment_of_its_own_kind_comes_to_its_own_estimate() -> None:
    world = _World()
    world.count(GOOD, 950, 50)
    world.count(GOOD, 10, 190, SEGMENT._replace(issuer_country="BR"))
    assert world.success(GOOD, SEGMENT._replace(issuer_country="BR")) < 0.25
    assert world.success(GOOD) > 0.85


def test_another_merchants_payments_teach_nothing() -> None:
    world = _World()
    world.count(GOOD, 0, 500, SEGMENT._replace(merchant_id="mer_2"))
    assert world.success(GOOD) == LIMITS.prior_success


def test_what_is_known_fades() -> None:
    world = _World()
    world.count(GOOD, 0, 100)
    known = world.success(GOOD)
    world.now += 20 * LIMITS.half_life_s
    assert known < 0.2
    assert world.success(GOOD) == pytest.approx(LIMITS.prior_success, abs=0.01)


def test_the_best_account_after_a_shift_is_found() -> None:
    world = _World()
    world.count(GOOD, 300, 700)
    world.count(BAD, 900, 100)
    assert world.first() == BAD
    world.now += 3 * LIMITS.half_life_s
    world.count(GOOD, 450, 50)
    world.count(BAD, 100, 400)
    assert world.first() == GOOD


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=6),
    st.floats(0, 0.3),
)
def test_exploration_never_exceeds_its_budget(counts: list[tuple[int, int]], share: float) -> None:
    world = _World(replace(LIMITS, exploration_share=share))
    candidates = [Candidate("psp", f"acc_{number}") for number in range(len(counts))]
    levels = {
        candidate: Increment(candidate[:2], *each)
        for candidate, each in zip(candidates, counts, strict=True)
    }
    world.ranking.rank(SEGMENT, candidates, 1000, 0)
    for key in list(world.ranking._levels):
        world.ranking._take_over(key, list(levels.values()))
    scored = world.ranking.rank(SEGMENT, candidates, 1000, NEVER)
    shares = [each.learned.first_share for each in scored if each.learned is not None]
    assert sum(shares) == pytest.approx(1)
    assert sum(shares[1:]) <= share + 1e-9
    # The draws of a share choose what the share belongs to; those of equals order them, too.
    scores = {each.score for each in scored}
    if len(shares) > 1 and shares[1] > 1e-6 and len(scores) == len(scored):
        inside = int(shares[1] / 2 * 2**64)
        assert world.ranking.rank(SEGMENT, candidates, 1000, inside)[0].candidate == (
            scored[1].candidate
        )


def test_the_same_draw_makes_the_same_choice() -> None:
    world = _World()
    world.count(GOOD, 8, 2)
    world.count(BAD, 7, 3)
    random.seed(5)
    for _ in range(100):
        draw = random.getrandbits(64)
        assert world.first(draw) == world.first(draw)


def test_accounts_that_nothing_is_known_of_go_by_their_weights() -> None:
    world = _World(replace(LIMITS, ranking_age_s_max=60.0))
    known = Candidate("psp", "acc_known")
    world.count(known, 99, 1)
    new = [Candidate("psp", f"acc_{weight}", 0, weight) for weight in (1, 2, 5)]
    firsts: Counter[str] = Counter()
    draws = random.Random(3)
    for _ in range(4_000):
        unexplored = draws.getrandbits(63) + (1 << 63)
        ranked = world.ranking.rank(SEGMENT, [*new, known], 1000, unexplored)
        places = [each.candidate.connector_account_id for each in ranked]
        assert sorted(places) == ["acc_1", "acc_2", "acc_5", "acc_known"]
        firsts[next(each for each in places if each != "acc_known")] += 1
    for weight, share in ((1, 1 / 8), (2, 2 / 8), (5, 5 / 8)):
        assert firsts[f"acc_{weight}"] / 4_000 == pytest.approx(share, abs=0.03)


def test_equals_are_first_in_the_shares_of_their_weights_and_are_not_explored() -> None:
    world = _World()
    known = Candidate("psp", "acc_known")
    world.count(known, 15, 5)
    new = [Candidate("psp", f"acc_{weight}", 0, weight) for weight in (1, 99)]
    draws = random.Random(3)
    firsts: Counter[Candidate] = Counter()
    for _ in range(10_000):
        ranked = world.ranking.rank(SEGMENT, [*new, known], 1000, draws.getrandbits(64))
        firsts[ranked[0].candidate] += 1
        told = {each.candidate: each.learned.first_share for each in ranked if each.learned}
        assert sum(told.values()) == pytest.approx(1)
        assert told[known] == pytest.approx(LIMITS.exploration_share)
    rest = 1 - LIMITS.exploration_share
    for candidate, share in zip([*new, known], [0.01 * rest, 0.99 * rest, 0.05], strict=True):
        assert firsts[candidate] / 10_000 == pytest.approx(share, abs=0.01)


def test_a_ranking_holds_for_a_moment_and_no_longer() -> None:
    world = _World(replace(LIMITS, ranking_age_s_max=0.1))
    world.count(GOOD, 5, 5)
    world.count(BAD, 6, 4)
    assert world.first() == BAD
    world.count(GOOD, 90, 0)
    world.now = 0.09
    assert world.first() == BAD
    assert world.ranking.rank(SEGMENT, [GOOD], 1000, NEVER)[0].candidate == GOOD
    world.now = 0.1
    assert world.first() == GOOD


def test_a_ranking_that_holds_explores_by_each_payments_draw() -> None:
    limits = replace(LIMITS, ranking_age_s_max=60.0, exploration_share=0.25)
    world = _World(limits)
    candidates = [Candidate("psp", f"acc_{number}") for number in range(4)]
    for number, candidate in enumerate(candidates):
        world.count(candidate, 20 + number, 5)
    best, *others = world.ranking.rank(SEGMENT, candidates, 1000, NEVER)
    shares = {each.candidate: each.learned.first_share for each in others if each.learned}
    assert sum(shares.values()) == pytest.approx(0.25)
    draws = random.Random(7)
    firsts: Counter[Candidate] = Counter()
    for _ in range(20_000):
        ranked = world.ranking.rank(SEGMENT, candidates, 1000, draws.getrandbits(64))
        firsts[ranked[0].candidate] += 1
        rest = [each for each in (best, *others) if each.candidate != ranked[0].candidate]
        assert list(ranked[1:]) == rest
    for candidate, share in shares.items():
        assert firsts[candidate] / 20_000 == pytest.approx(share, abs=0.01)


def test_with_costs_each_amount_is_ranked_by_itself() -> None:
    book = _book("3", 'percentage = "2.5"', "fixed_minor = 30")
    world = _World(replace(LIMITS, ranking_age_s_max=60.0), book)
    for candidate in (GOOD, BAD):
        world.count(candidate, 90, 10)
    first = {
        amount: world.ranking.rank(SEGMENT, [GOOD, BAD], amount, NEVER)[0].candidate
        for amount in (100, 100_000)
    }
    assert first == {100: GOOD, 100_000: BAD}


def test_new_costs_decide_as_soon_as_a_ranking_no_longer_holds() -> None:
    book = _book("3", 'percentage = "0.1"', 'percentage = "2"')
    world = _World(replace(LIMITS, ranking_age_s_max=0.1), book)
    for candidate in (GOOD, BAD):
        world.count(candidate, 90, 10)
    assert world.first() == GOOD
    [costs] = _book("3", 'percentage = "2"', 'percentage = "0.1"')._costs.values()
    book.put("mer_1", costs)
    world.now = 0.1
    assert world.first() == BAD


def test_segments_in_memory_are_bounded() -> None:
    world = _World(replace(LIMITS, segments_max=50))
    for number in range(500):
        world.count(GOOD, 1, 0, SEGMENT._replace(issuer_country=f"C{number}"))
    assert world.ranking.segments == 50
    assert len(world.ranking._pending) <= 50
    # What was learnt of forgotten segments stays in the wider ones, which others are part of.
    assert world.success(GOOD, SEGMENT._replace(issuer_country="FR")) > 0.99


def test_the_segment_without_payments_for_longest_is_forgotten() -> None:
    world = _World(replace(LIMITS, segments_max=20))
    used, unused = SEGMENT._replace(issuer_country="US"), SEGMENT._replace(issuer_country="CA")
    for segment in (used, unused):
        world.count(GOOD, 0, 100, segment)
    for number in range(100):
        world.count(GOOD, 10, 0, SEGMENT._replace(issuer_country=f"C{number}"))
        world.count(GOOD, 0, 1, used)
    assert world.success(GOOD, used) < 0.1
    assert world.success(GOOD, unused) > 0.5


# --- costs ----------------------------------------------------------------------------------------


def _book(margin: str, of_good: str, of_bad: str) -> CostBook:
    fees = "\n".join(
        f'[[fee]]\naccount = "{candidate.connector_account_id}"\ncurrency = "EUR"\n{fee}'
        for candidate, fee in ((GOOD, of_good), (BAD, of_bad))
        if fee
    )
    book = CostBook()
    objective = f'[objective]\nmargin_percentage = "{margin}"\n'
    book.put("mer_1", parse_costs(objective + fees))
    return book


def test_a_cheap_account_wins_where_an_approval_is_worth_little() -> None:
    for margin, first in (("100", GOOD), ("3", BAD)):
        world = _World(costs=_book(margin, 'percentage = "2.5"', 'percentage = "0.5"'))
        world.count(GOOD, 1900, 100)
        world.count(BAD, 1800, 200)
        assert world.first() == first


def test_an_account_whose_fees_are_not_known_is_as_dear_as_the_dearest() -> None:
    world = _World(costs=_book("10", 'percentage = "2"', ""))
    world.count(GOOD, 900, 100)
    world.count(BAD, 900, 100)
    scored = world.ranking.rank(SEGMENT, [GOOD, BAD], 1000, NEVER)
    assert scored[0].score == scored[1].score
    assert world.ranking.rank(SEGMENT._replace(currency="USD"), [GOOD], 1000, NEVER)[0].score < 1


@pytest.mark.parametrize("amount_minor", [0, 20, 25])
def test_where_no_approval_is_worth_its_fees_the_account_that_approves_more_comes_first(
    amount_minor: int,
) -> None:
    """As of a verification: by the margin the account would come first that declines most."""
    world = _World(costs=_book("100", "fixed_minor = 30", "fixed_minor = 25\nattempt_minor = 1"))
    world.count(GOOD, 90, 10)
    world.count(BAD, 10, 90)
    first, other = world.ranking.rank(SEGMENT, [BAD, GOOD], amount_minor, NEVER)
    assert (first.candidate, other.candidate) == (GOOD, BAD)
    assert first.learned is not None
    assert other.learned is not None
    assert first.learned.cost_minor == pytest.approx(first.learned.success * 30)
    assert other.learned.cost_minor == pytest.approx(1 + other.learned.success * 25)


# --- several processes ----------------------------------------------------------------------------


class _Exchange:
    """A stand-in that adds up; Redis' own is tested with Redis."""

    def __init__(self) -> None:
        self.counts: dict[SegmentKey, dict[tuple[str, str], list[float]]] = {}
        self.away = False

    async def exchange(
        self, increments: Mapping[SegmentKey, Sequence[Increment]], half_life_s: float
    ) -> Mapping[SegmentKey, Sequence[Increment]]:
        if self.away:
            raise ExchangeUnavailable("away")
        for key, accounts in increments.items():
            level = self.counts.setdefault(key, {})
            for each in accounts:
                counts = level.setdefault(each.account, [0.0, 0.0])
                counts[0] += each.successes
                counts[1] += each.failures
        return {
            key: [Increment(account, *counts) for account, counts in self.counts[key].items()]
            for key in increments
        }


async def test_processes_learn_from_each_other() -> None:
    exchange, one, other = _Exchange(), _World(), _World()
    one.count(GOOD, 90, 10)
    other.count(BAD, 10, 90)
    for world in (one, other, one):
        await world.ranking.synchronize(exchange)
        world.first()
    one.observe(GOOD, APPROVED)
    await one.ranking.synchronize(exchange)
    assert one.success(BAD) == pytest.approx(other.success(BAD))
    assert one.success(BAD) < 0.3


async def test_a_process_that_begins_anew_knows_what_was_known() -> None:
    exchange, before, after = _Exchange(), _World(), _World()
    before.count(BAD, 10, 90)
    await before.ranking.synchronize(exchange)
    after.first()  # it asks for the segment
    await after.ranking.synchronize(exchange)
    assert after.success(BAD) == pytest.approx(before.success(BAD))


async def test_what_could_not_be_told_is_told_later() -> None:
    exchange, world = _Exchange(), _World()
    exchange.away = True
    world.count(GOOD, 5, 5)
    with pytest.raises(ExchangeUnavailable):
        await world.ranking.synchronize(exchange)
    world.count(GOOD, 1, 0)
    exchange.away = False
    await world.ranking.synchronize(exchange)
    assert {tuple(map(tuple, level.values())) for level in exchange.counts.values()} == {
        ((6.0, 5.0),)
    }
