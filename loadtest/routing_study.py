"""Routing by what is learnt, against PSPs that drift: `python -m loadtest.routing_study`.

PSPs whose approval rates walk and jump, that go down, and that slow down until their answers come
too late. The same payments are routed by fixed weights, in the order that was best in the first
hour, by the gateway's own ranking and breakers (the real ones, with a clock of the study's), and by
an oracle that knows each PSP's true rates at every moment. Regret is what the oracle would have
earned more, in expectation, so that luck is no part of it. Every drift is an argument, and
`--scenarios` tries those of SCENARIOS.
"""

import json
import logging
import math
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple, Protocol

import click

from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.breakers import BreakerKey, BreakerLimits, Breakers, BreakerState
from gateway.routing.costs import MICRO, CostBook, parse_costs
from gateway.routing.learning import LearningLimits, SuccessRanking
from gateway.routing.model import Candidate, Segment
from loadtest.charts import Band, Line, image

SUMMARY: Final = Path(".local/bench/routing_study.json")
MERCHANT: Final = "mer_study"
STEP_S: Final = 60
"""Rates change once in so long."""
BUCKET_S: Final = 900
"""A point of the plots."""
ANSWER_S: Final = 0.3
TIMEOUT_S: Final = 10.0
SCHEMES: Final = (("visa", 0.55), ("mastercard", 0.35), ("amex", 0.1))
COUNTRIES: Final = (("DE", 0.4), ("FR", 0.3), ("US", 0.2), ("BR", 0.1))
FEES: Final = (("1.40", 10), ("1.10", 15), ("0.90", 20), ("1.25", 12), ("1.00", 18), ("1.60", 5))
"""Percentage and fixed part of the PSPs, in turn."""
SCENARIOS: Final[Mapping[str, str]] = {
    "as the defaults": "",
    "three PSPs": "--psps 3",
    "rates that jump": "--shifts-per-day 12 --shift 1.2 --walk 0.4",
    "nothing changes": "--shifts-per-day 0 --walk 0 --outages-per-day 0 --slowdowns-per-day 0",
    "PSPs alike": "--spread 0 --shifts-per-day 0 --walk 0 --outages-per-day 0",
    "short outages": "--outages-per-day 12 --outage-minutes 10 --shifts-per-day 0",
    "the best decays": "--decay 0.3 --shifts-per-day 0",
    "segments change places": "--swaps-per-day 6 --spread 1 --shifts-per-day 0",
    "a new and better PSP": "--newcomer-hour 6 --newcomer-odds 1 --shifts-per-day 0",
    "a new and worse PSP": "--newcomer-hour 6 --newcomer-odds -2 --shifts-per-day 0",
    "sparse segments": "--countries 60 --rate 0.1 --hours 72",
    "one payment in a minute": "--rate 0.0167 --hours 168",
    "rates cost fees": "--fees-for-rates 2 --spread 1",
}
"""Drifts that differ in kind, each as arguments."""

_APPROVED: Final = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
_DECLINED: Final = ConnectorAnswer(Delivery.ANSWERED, Verdict.DECLINED)
_TIMED_OUT: Final = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)
_NO_CONNECTION: Final = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED)


@dataclass(frozen=True, slots=True)
class Drift:
    """How PSPs change."""

    psps: int
    hours: float
    rate_per_s: float
    walk: float
    """The standard deviation of the walk of a rate's log-odds, in an hour."""
    shifts_per_day: float
    """Jumps of each PSP's rates."""
    shift: float
    """Their standard deviation, in log-odds."""
    outages_per_day: float
    outage_minutes: float
    slowdowns_per_day: float
    slowdown_minutes: float
    spread: float
    """How far PSPs are apart in a segment at the beginning, in log-odds."""
    margin_percent: float
    """What an approved payment is worth, of its amount."""
    decay: float = 0.0
    """What the PSP that is best at first loses in an hour, in log-odds."""
    swaps_per_day: float = 0.0
    """How often two PSPs change places in a segment, in each."""
    newcomer_hour: float = 0.0
    """When the last PSP comes; 0: it is there from the beginning."""
    newcomer_odds: float = 0.0
    """What it is better by than it would be, in log-odds."""
    countries: int = len(COUNTRIES)
    """Issuers' countries: so many segments for each scheme."""
    fees_for_rates: float = 0.0
    """How much dearer a PSP is for what it is better by at first: percent of the amount for one of
    log-odds."""


class Trouble(NamedTuple):
    """A time in which a PSP is down or slow."""

    psp: int
    slow: bool
    begin_s: float
    end_s: float


class Payment(NamedTuple):
    """One that is to be routed."""

    at_s: float
    place: int
    """Of its segment."""
    segment: Segment
    amount_minor: int
    draw: int
    luck: float
    late: float
    """Its chance to be late: below what share of answers that are."""


class World:
    """PSPs over time, by a seed."""

    def __init__(self, drift: Drift, seed: int) -> None:
        self.drift = drift
        self._random = random.Random(seed)
        self.candidates = [Candidate(f"psp{n}", f"acc_{n}") for n in range(drift.psps)]
        self.segments = [
            (Segment(MERCHANT, Mode.TEST, "card", scheme, "EUR", country, "ECOMMERCE"), one * two)
            for scheme, one in SCHEMES
            for country, two in _countries(drift.countries)
        ]
        self.steps = math.ceil(3600 * drift.hours / STEP_S)
        self.troubles = self._troubles()
        self._first_odds: list[float] = []
        """Each PSP's mean over the segments."""
        self._rates = self._walk()
        self.costs = parse_costs(self._fees())
        self._late = [self._lateness(psp) for psp in range(drift.psps)]

    def _fees(self) -> str:
        lines = [f'[objective]\nmargin_percentage = "{self.drift.margin_percent:g}"']
        for number, candidate in enumerate(self.candidates):
            percentage, fixed = FEES[number % len(FEES)]
            better = self._first_odds[number] - min(self._first_odds)
            dearer = float(percentage) + self.drift.fees_for_rates * better
            lines.append(
                f'[[fee]]\naccount = "{candidate.connector_account_id}"\ncurrency = "EUR"\n'
                f'percentage = "{min(dearer, 100):.4f}"\nfixed_minor = {fixed}\nattempt_minor = 1'
            )
        return "\n".join(lines)

    def _troubles(self) -> list[Trouble]:
        drift, chance = self.drift, self._random
        found = []
        for psp in range(drift.psps):
            for slow, per_day, minutes in (
                (False, drift.outages_per_day, drift.outage_minutes),
                (True, drift.slowdowns_per_day, drift.slowdown_minutes),
            ):
                at = chance.expovariate(per_day) * 86_400 if per_day else math.inf
                while at < 3600 * drift.hours:
                    length = 60 * minutes * chance.uniform(0.5, 1.5)
                    found.append(Trouble(psp, slow, at, at + length))
                    at += length + chance.expovariate(per_day) * 86_400
        return sorted(found, key=lambda trouble: trouble.begin_s)

    def _walk(self) -> list[list[list[float]]]:
        """Approval rates by step, PSP and segment."""
        drift, chance = self.drift, self._random
        odds = [
            [2.0 + chance.gauss(0, drift.spread) for _ in self.segments] for _ in range(drift.psps)
        ]
        odds[-1] = [each + drift.newcomer_odds for each in odds[-1]]
        self._first_odds = [fmean(psp) for psp in odds]
        best = max(range(drift.psps), key=self._first_odds.__getitem__)
        swaps = drift.swaps_per_day * STEP_S / 86_400
        step = drift.walk * math.sqrt(STEP_S / 3600)
        shifts = drift.shifts_per_day * STEP_S / 86_400
        rates = []
        for _ in range(self.steps):
            odds[best] = [each - drift.decay * STEP_S / 3600 for each in odds[best]]
            for place in range(len(self.segments) if swaps else 0):
                if chance.random() < swaps:
                    one, two = chance.sample(odds, 2)
                    one[place], two[place] = two[place], one[place]
            for psp in odds:
                common = chance.gauss(0, step)
                if chance.random() < shifts:
                    common += chance.gauss(0, drift.shift)
                for place in range(len(psp)):
                    # Pulled back, so that a PSP does not leave for ever.
                    pull = 0.5 * STEP_S / 86_400 * (2.0 - psp[place])
                    psp[place] += common + chance.gauss(0, step / 2) + pull
            rates.append([[1 / (1 + math.exp(-each)) for each in psp] for psp in odds])
        return rates

    def _lateness(self, psp: int) -> list[float]:
        """The share of answers that come too late, by step; 1 where the PSP is down."""
        late = [0.0] * self.steps
        for trouble in self.troubles:
            if trouble.psp != psp:
                continue
            first, last = int(trouble.begin_s / STEP_S), int(trouble.end_s / STEP_S)
            for step in range(first, min(last + 1, self.steps)):
                share = 0.6 * (step - first + 1) / (last - first + 1) if trouble.slow else 1.0
                late[step] = max(late[step], share)
        return late

    def there(self, at_s: float) -> int:
        """How many PSPs there are: the first so many."""
        return self.drift.psps - (at_s < 3600 * self.drift.newcomer_hour)

    def late(self, psp: int, at_s: float) -> float:
        """The share of answers that come too late; 1 where the PSP is down."""
        return self._late[psp][int(at_s / STEP_S)]

    def rate(self, psp: int, payment: Payment) -> float:
        """The true chance of an approval."""
        step = int(payment.at_s / STEP_S)
        return self._rates[step][psp][payment.place] * (1 - self._late[psp][step])

    def utility(self, psp: int, payment: Payment) -> float:
        """What a payment is expected to earn at a PSP, in minor units."""
        account_id = self.candidates[psp].connector_account_id
        cost = self.costs.of(account_id, payment.segment, payment.amount_minor, 1)
        assert cost is not None
        worth = payment.amount_minor * self.costs.margin_ppm
        earned = self.rate(psp, payment) * (worth - cost.approval_micro) - cost.attempt_micro
        return earned / MICRO

    def payments(self, seed: int) -> Sequence[Payment]:
        """What arrives."""
        chance = random.Random(seed)
        shares = [share for _, share in self.segments]
        found = []
        at = chance.expovariate(self.drift.rate_per_s)
        while at < self.steps * STEP_S:
            place = chance.choices(range(len(shares)), shares)[0]
            amount = min(max(round(4000 * math.exp(chance.gauss(0, 0.8))), 100), 200_000)
            found.append(
                Payment(
                    at,
                    place,
                    self.segments[place][0],
                    amount,
                    chance.getrandbits(64),
                    chance.random(),
                    chance.random(),
                )
            )
            at += chance.expovariate(self.drift.rate_per_s)
        return found


def _countries(count: int) -> Sequence[tuple[str, float]]:
    """Codes with their shares; of other numbers than COUNTRIES' by Zipf's law."""
    if count == len(COUNTRIES):
        return COUNTRIES
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    total = sum(1 / rank for rank in range(1, count + 1))
    return [
        (letters[n // len(letters)] + letters[n % len(letters)], 1 / (n + 1) / total)
        for n in range(count)
    ]


# --- policies -------------------------------------------------------------------------------------


class Policy(Protocol):
    """Chooses a PSP for each payment."""

    def choose(self, payment: Payment) -> int | None:
        """None: it is refused."""

    def told(self, payment: Payment, psp: int, answer: ConnectorAnswer, seconds: float) -> None:
        """What came of it."""


class _Fixed:
    """Chooses without looking at what comes of it."""

    def __init__(self, choose: Callable[[Payment], int]) -> None:
        self.choose = choose

    def told(self, payment: Payment, psp: int, answer: ConnectorAnswer, seconds: float) -> None:
        """Nothing is learnt."""


class _Adaptive:
    """The gateway's breakers, and its ranking or a fixed order."""

    def __init__(
        self, world: World, limits: LearningLimits, order: Sequence[int] | None = None
    ) -> None:
        self._world = world
        self._order = order
        self._now = 0.0
        book = CostBook(lambda: 0.0)
        book.put(MERCHANT, world.costs)
        self._ranking = SuccessRanking(limits, book, lambda: self._now)
        self._breakers = Breakers(BreakerLimits(), self, lambda: self._now)
        self._places = {each: place for place, each in enumerate(world.candidates)}

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        """Nobody counts it here."""

    def choose(self, payment: Payment) -> int | None:
        """The first in order, of those whose breaker lets it through."""
        self._now = payment.at_s
        there = [
            each
            for each in self._world.candidates[: self._world.there(payment.at_s)]
            if self._breakers.refusal(each, "card") is None
        ]
        if self._order is None:
            ranked = self._ranking.rank(payment.segment, there, payment.amount_minor, payment.draw)
            there = [scored.candidate for scored in ranked]
        else:
            order = self._order
            there.sort(key=lambda each: order.index(self._places[each]))
        for candidate in there:
            if self._breakers.admit(candidate, "card") is None:
                return self._places[candidate]
        return None

    def told(self, payment: Payment, psp: int, answer: ConnectorAnswer, seconds: float) -> None:
        """Both learn."""
        candidate, kind = self._world.candidates[psp], OperationKind.AUTHORIZE
        self._now = payment.at_s + seconds
        for observer in (self._ranking, self._breakers):
            observer.observed(payment.segment, candidate, kind, answer, seconds)


def policies(world: World, limits: LearningLimits, first: Sequence[Payment]) -> dict[str, Policy]:
    """All that are compared; `first` are the payments that the fixed priority is tuned on."""

    def best(payment: Payment) -> int:
        psps = range(world.there(payment.at_s))
        return max(psps, key=lambda psp: world.utility(psp, payment))

    earned = [
        fmean(world.utility(psp, payment) for payment in first) for psp in range(world.there(0.0))
    ]
    order = sorted(range(len(earned)), key=earned.__getitem__, reverse=True)
    order += range(len(earned), world.drift.psps)  # who came later comes last
    return {
        "oracle": _Fixed(best),
        "static weights": _Fixed(lambda payment: payment.draw % world.there(payment.at_s)),
        "fixed order": _Fixed(lambda _: order[0]),
        "fixed order, breakers": _Adaptive(world, limits, order),
        "learnt": _Adaptive(world, limits),
    }


# --- the study ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    """What one policy came to, with one seed."""

    earned: float
    approved: float
    """Expected approvals."""
    payments: int
    by_bucket: list[float]
    """Earned, by BUCKET_S."""
    elsewhere: int = 0
    """Payments that went to another PSP than the oracle's."""


def run(world: World, policy: Policy, payments: Sequence[Payment]) -> tuple[Result, list[int]]:
    """Route all payments by a policy; also where each went, -1 where it was refused."""
    result = Result(0.0, 0.0, len(payments), [0.0] * math.ceil(world.steps * STEP_S / BUCKET_S))
    places = []
    under_way: list[tuple[float, int, Payment, int, ConnectorAnswer, float]] = []
    for number, payment in enumerate(payments):
        while under_way and under_way[0][0] <= payment.at_s:
            policy.told(*heappop(under_way)[2:])
        psp = policy.choose(payment)
        places.append(-1 if psp is None else psp)
        if psp is None:
            continue
        answer, seconds = _answer(world, psp, payment)
        ended = payment.at_s + seconds, number, payment, psp, answer, seconds
        heappush(under_way, ended)
        earned = world.utility(psp, payment)
        result.earned += earned
        result.by_bucket[int(payment.at_s / BUCKET_S)] += earned
        result.approved += world.rate(psp, payment)
    return result, places


def _answer(world: World, psp: int, payment: Payment) -> tuple[ConnectorAnswer, float]:
    late = world.late(psp, payment.at_s)
    if late >= 1:
        return _NO_CONNECTION, 1.0
    if payment.late < late:
        return _TIMED_OUT, TIMEOUT_S
    rate = world.rate(psp, payment) / (1 - late)
    # The same luck at every PSP: what is compared is the choice.
    return _APPROVED if payment.luck < rate else _DECLINED, ANSWER_S * (1 + 10 * late)


def study(
    drift: Drift, seeds: int, first_seed: int, limits: LearningLimits
) -> tuple[dict[str, list[Result]], list[Trouble]]:
    """All policies with all seeds, and the troubles of the first one."""
    results: dict[str, list[Result]] = {}
    troubles: list[Trouble] = []
    for seed in range(first_seed, first_seed + seeds):
        world = World(drift, seed)
        payments = world.payments(seed + 1_000_000)
        if seed == first_seed:
            troubles = world.troubles
        first = [each for each in payments if each.at_s < 3600] or payments
        oracle: list[int] = []
        for name, policy in policies(world, limits, first).items():
            result, places = run(world, policy, payments)
            oracle = oracle or places
            result.elsewhere = sum(a != b for a, b in zip(places, oracle, strict=True))
            results.setdefault(name, []).append(result)
    return results, troubles


def regrets(results: dict[str, list[Result]], name: str) -> list[float]:
    """What a policy lost to the oracle, as a share of what the oracle earned; by seed."""
    return [
        1 - each.earned / oracle.earned
        for each, oracle in zip(results[name], results["oracle"], strict=True)
    ]


def _cumulative(results: dict[str, list[Result]], name: str) -> list[tuple[float, float]]:
    """The mean regret up to each moment, in thousands of major units."""
    points, total = [(0.0, 0.0)], 0.0
    buckets = len(results["oracle"][0].by_bucket)
    for bucket in range(buckets):
        total += fmean(
            oracle.by_bucket[bucket] - each.by_bucket[bucket]
            for each, oracle in zip(results[name], results["oracle"], strict=True)
        )
        points.append(((bucket + 1) * BUCKET_S / 3600, total / 100_000))
    return points


def _momentary(results: dict[str, list[Result]], name: str) -> list[tuple[float, float]]:
    """The first seed's regret at each moment, in percent of what the oracle earned then."""
    each, oracle = results[name][0], results["oracle"][0]
    return [
        (bucket * BUCKET_S / 3600, max(0.0, 100 * (1 - mine / its)))
        for bucket, (mine, its) in enumerate(zip(each.by_bucket, oracle.by_bucket, strict=True))
        if its > 0
    ]


def plots(results: dict[str, list[Result]], troubles: Sequence[Trouble]) -> dict[str, str]:
    """The images by the names of their files."""
    names = [name for name in results if name != "oracle"]
    bands = [
        Band(
            f"{trouble.psp} {'slow' if trouble.slow else 'down'}",
            trouble.begin_s / 3600,
            trouble.end_s / 3600,
        )
        for trouble in troubles
    ]
    spaced = [each for band in bands for each in (band, Band("", band.end, band.end))]
    return {
        "routing-regret.svg": image(
            f"Regret against the oracle, mean of {len(results['oracle'])} seeds",
            [Line(name, _cumulative(results, name), n) for n, name in enumerate(names, 1)],
            unit="thousand EUR",
            x_title="hours",
        ),
        "routing-moment.svg": image(
            "Regret by quarter of an hour, one seed, with its outages and slowdowns",
            [Line(name, _momentary(results, name), n) for n, name in enumerate(names, 1)],
            unit="% of the oracle's margin",
            x_title="hours",
            bands=spaced,
        ),
    }


def table(results: dict[str, list[Result]]) -> str:
    """The figures, as a table of Markdown."""
    lines = [
        "| policy | approved | margin of the oracle's | regret, least and most of the seeds |",
        "|---|---|---|---|",
    ]
    for name, of_name in results.items():
        lost = regrets(results, name)
        approved = fmean(each.approved / each.payments for each in of_name)
        lines.append(
            f"| {name} | {approved:.2%} | {1 - fmean(lost):.2%} "
            f"| {fmean(lost):.2%} ({min(lost):.2%} to {max(lost):.2%}) |"
        )
    return "\n".join(lines)


def scenarios(seeds: int, first_seed: int) -> dict[str, dict[str, float]]:
    """Print a table of all SCENARIOS' mean regrets, in Markdown; them by scenario and policy."""
    shown = ("static weights", "fixed order, breakers", "learnt")
    click.echo(f"| | arguments | {' | '.join(shown)} |\n|---|---|{'---|' * len(shown)}")
    found: dict[str, dict[str, float]] = {}
    for name, arguments in SCENARIOS.items():
        given = main.make_context("routing_study", shlex.split(arguments)).params
        drift, limits = _world_of(given)
        results, _ = study(drift, seeds, first_seed, limits)
        lost = {each: fmean(regrets(results, each)) for each in shown}
        told = " | ".join(f"{100 * lost[each]:.2f} %" for each in shown)
        click.echo(f"| {name} | {f'`{arguments}`' if arguments else ''} | {told} |")
        found[name] = lost
    return found


def _world_of(given: Mapping[str, Any]) -> tuple[Drift, LearningLimits]:
    names = {each.name for each in fields(Drift)}
    drift = Drift(**{name: value for name, value in given.items() if name in names})
    limits = LearningLimits(
        half_life_s=given["half_life_s"], exploration_share=given["exploration"]
    )
    return drift, limits


@click.command()
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1, 1000))
@click.option("--first-seed", default=1, show_default=True)
@click.option("--psps", default=4, show_default=True, type=click.IntRange(2, 50))
@click.option("--hours", default=24.0, show_default=True, type=click.FloatRange(0.5, 2000))
@click.option("--rate", "rate_per_s", default=1.0, show_default=True, help="Payments a second.")
@click.option("--walk", default=0.15, show_default=True, help="Of log-odds, in an hour.")
@click.option("--shifts-per-day", default=2.0, show_default=True, help="Of each PSP.")
@click.option("--shift", default=0.8, show_default=True, help="Of log-odds.")
@click.option("--outages-per-day", default=1.0, show_default=True, help="Of each PSP.")
@click.option("--outage-minutes", default=30.0, show_default=True)
@click.option("--slowdowns-per-day", default=1.0, show_default=True, help="Of each PSP.")
@click.option("--slowdown-minutes", default=60.0, show_default=True)
@click.option("--spread", default=0.5, show_default=True, help="Of PSPs at first, in log-odds.")
@click.option("--margin-percent", default=20.0, show_default=True)
@click.option("--decay", default=0.0, help="Log-odds that the best PSP loses in an hour.")
@click.option("--swaps-per-day", default=0.0, help="Two PSPs change places in a segment.")
@click.option("--newcomer-hour", default=0.0, help="When the last PSP comes; 0: it is there.")
@click.option("--newcomer-odds", default=0.0, help="What it is better by, in log-odds.")
@click.option(
    "--countries",
    default=len(COUNTRIES),
    show_default=True,
    type=click.IntRange(1, 600),
    help="Of issuers: so many segments for each of three schemes.",
)
@click.option(
    "--fees-for-rates", default=0.0, help="Percent of the amount for one of log-odds at first."
)
@click.option("--half-life-s", default=1800.0, show_default=True)
@click.option("--exploration", default=0.05, show_default=True, help="The budget, as a share.")
@click.option(
    "--plots-to",
    type=click.Path(file_okay=False, path_type=Path),
    help="A directory for the plots; without it none are drawn.",
)
@click.option(
    "--scenarios",
    "all_scenarios",
    is_flag=True,
    help="Drifts of many kinds instead; fails where learning loses to fixed weights.",
)
def main(
    seeds: int, first_seed: int, plots_to: Path | None, all_scenarios: bool, **given: Any
) -> None:
    """Compare the policies, print the figures, write the summary and the plots."""
    logging.getLogger("gateway.routing").setLevel(logging.ERROR)  # each breaker, otherwise
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    if all_scenarios:
        found = scenarios(seeds, first_seed)
        SUMMARY.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        worse = [name for name, lost in found.items() if lost["learnt"] > lost["static weights"]]
        if worse:
            raise click.ClickException(f"learning lost to fixed weights: {', '.join(worse)}")
        return
    world, limits = _world_of(given)
    results, troubles = study(world, seeds, first_seed, limits)
    click.echo(table(results))
    payments = sum(each.payments for each in results["oracle"])
    click.echo(f"\n{payments:,} payments, {seeds} seeds, {world.psps} PSPs, {world.hours:g} hours")
    summary = {name: {"regret": regrets(results, name)} for name in results}
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if plots_to is not None:
        plots_to.mkdir(parents=True, exist_ok=True)
        for name, text in plots(results, troubles).items():
            (plots_to / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
