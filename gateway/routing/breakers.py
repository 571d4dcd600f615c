"""Circuit breakers: an account whose calls fail, or are far slower than they were, is left alone.

There is a breaker for each account and payment method, and one for what is done to the account's
existing payments. It opens on the failures of a rolling window, stays open for a pause that grows
with each opening in a row, and is then half-open: a few probes may try the PSP, and what becomes of
them closes it or opens it anew. Processes tell each other through `Exchange`, in the background;
without it each goes by what it sees itself.

A slow call is waited for to the end all the same: what cuts an answer short makes a doubt (P10).
"""

import asyncio
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple, Protocol

from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, OperationKind
from gateway.routing.model import Candidate, Exclusion, Segment

SLICES: Final = 10
"""A window is counted in so many slices; one of them leaves it at a time."""
BREAKERS_MAX: Final = 50_000
"""Breakers in memory; beyond it the one that was called least recently is forgotten, of those that
are closed."""
PROBE_RIGHT_S: Final = 5.0
"""How long one process alone may probe, unless it asks again. Several exchanges with others."""
REPORTS_MAX: Final = 1_000
"""What is told others at once, and of others' breakers taken over at once."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When a breaker opens and closes; times in seconds."""

    window_s: float = 30.0
    calls_min: int = 20
    """Fewer calls in the window open nothing."""
    failure_share: float = 0.5
    """Of the window's calls: so many failures open it."""
    slow_share: float = 0.8
    """So many slow calls open it."""
    slow_factor: float = 10.0
    """A call is slow that takes so many times the account's median."""
    slow_s_min: float = 1.0
    """No call is slow that takes less."""
    slow_s_max: float = 10.0
    """Every call is slow that takes more."""
    pause_s_min: float = 5.0
    """How long it stays open, the first time; doubled with each opening in a row."""
    pause_s_max: float = 60.0
    probes_max: int = 3
    """Probes under way at once."""
    probes_good: int = 3
    """So many good probes in a row close it."""
    probe_life_s: float = 60.0
    """After so long a probe whose end nobody told gives its place back. Longer than a PSP may take
    to answer."""


class BreakerState(Enum):
    """Whether calls pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerKey(NamedTuple):
    """What a breaker is for."""

    connector: str
    connector_account_id: str
    method: str
    """As `Segment.method`; empty for what is done to an existing payment."""


class ReportKind(Enum):
    """What a process tells the others of a breaker."""

    OPENED = "O"
    CLOSED = "C"
    WANTS_PROBES = "P"
    """Its pause is over, and there is a call that could be a probe."""


class Report(NamedTuple):
    """What a process tells the others."""

    kind: ReportKind
    key: BreakerKey
    s: float = 0.0
    """OPENED: the pause. WANTS_PROBES: for how long the right to probe is wanted."""
    streak: int = 0
    """OPENED: how often in a row."""
    version: int = 0
    """CLOSED: the opening that is over. One that came after it stays. WANTS_PROBES: the opening
    that is known, if others were told of it: where there is none any more it is over."""


class Shared(NamedTuple):
    """A breaker that is open or half-open, as all processes know it."""

    key: BreakerKey
    version: int
    """Which opening: larger with each."""
    remaining_s: float
    """Of the pause; 0 when it is over."""
    streak: int
    mine: bool
    """This process may probe; no other one does."""


class ExchangeUnavailable(Exception):
    """What was told may have arrived or not; nothing was learnt."""


class Exchange(Protocol):
    """Tells processes of each other's breakers."""

    async def exchange(self, reports: Sequence[Report]) -> Sequence[Shared]:
        """Tell, and learn of all that are not closed. Telling twice does no harm.

        Raises ExchangeUnavailable.
        """


class BreakerObserver(Protocol):
    """Counts what breakers do, for metrics."""

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        """A breaker came into a state."""


def is_failure(answer: ConnectorAnswer) -> bool | None:
    """Whether a PSP failed, by what it answered; None where that says nothing of it.

    Where there was no connection, or no usable answer, or its rate limiter had enough, the PSP
    failed. A decline is an answer as
    good as any, and what the gateway itself did not send is no fault of the PSP.
    """
    if answer.delivery is Delivery.ANSWERED:
        return False
    if answer.delivery is Delivery.MAY_HAVE_BEEN_SENT:
        return True
    return True if answer.reason in _FAILURES else None


_FAILURES: Final = frozenset({Reason.CONNECT_FAILED, Reason.CONNECTOR_RATE_LIMITED})


class _Latencies:
    """A decaying histogram of how long an account takes, for its median; about 9 % exact."""

    HALF_LIFE_S: Final = 600.0
    FIRST_S: Final = 0.001
    PER_DOUBLING: Final = 4
    BINS: Final = 68  # up to 131 s
    RENEWED_S: Final = 1.0
    WEIGHT_MAX: Final = 2.0**40
    COUNT_MIN: Final = 20
    """Of fewer calls there is no median to speak of."""

    __slots__ = ("_at", "_median_s", "_renew_at", "_weights")

    def __init__(self, now: float) -> None:
        self._weights = [0.0] * self.BINS
        self._at = now
        self._renew_at = now
        self._median_s = math.inf

    def add(self, seconds: float, now: float) -> None:
        # A later call weighs more, instead of all earlier ones less.
        weight = math.exp2((now - self._at) / self.HALF_LIFE_S)
        if weight > self.WEIGHT_MAX:
            self._weights = [each / weight for each in self._weights]
            self._at, weight = now, 1.0
        place = self.PER_DOUBLING * math.log2(max(seconds, self.FIRST_S) / self.FIRST_S)
        self._weights[min(int(place), self.BINS - 1)] += weight
        if now >= self._renew_at:
            self._renew_at = now + self.RENEWED_S
            self._median_s = self._find(weight)

    def median_s(self) -> float:
        """Infinite where too few calls are known."""
        return self._median_s

    def _find(self, weight: float) -> float:
        half = sum(self._weights) / 2
        if half * 2 < self.COUNT_MIN * weight:
            return math.inf
        passed = 0.0
        for place, each in enumerate(self._weights):
            passed += each
            if passed >= half:
                return self.FIRST_S * math.exp2((place + 1) / self.PER_DOUBLING)
        return math.inf


@dataclass(slots=True)
class _Breaker:
    """One breaker; `open_until` is what tells closed from the rest."""

    latencies: _Latencies
    slice: int = 0
    calls: list[int] = field(default_factory=lambda: [0] * SLICES)
    failures: list[int] = field(default_factory=lambda: [0] * SLICES)
    slow: list[int] = field(default_factory=lambda: [0] * SLICES)
    is_open: bool = False
    """Open or half-open."""
    open_until: float = 0.0
    streak: int = 0
    closed_at: float = -math.inf
    version: int = 0
    """Of the opening, as shared; 0 while others do not know of it."""
    granted: bool = False
    """Others leave the probing to this process."""
    wanted: bool = False
    """The pause is over, and since others were told so a probe was sent, or a call came that could
    have been one without this right. Who has it and sends none leaves it to others."""
    asked: bool = False
    """Others were asked at once for the right to probe. Who has it may keep it for long, and is
    asked as often as states are told.
    """
    had_right: bool = False
    """The probing was left to this process, and no probe was sent since. Where calls come so seldom
    that each comes when the right has lapsed, one of them is a probe without it."""
    half_open_told: bool = False
    probes: list[float] = field(default_factory=list)
    """When each probe under way gives its place back, should nobody tell its end."""
    good_probes: int = 0

    def count(self, number: int, *, failed: bool, slow: bool) -> None:
        """Count a call in the slice of this number."""
        passed = number - self.slice
        if passed >= SLICES:
            self.forget()
        elif passed > 0:
            for each in range(self.slice + 1, number + 1):
                place = each % SLICES
                self.calls[place] = self.failures[place] = self.slow[place] = 0
        if passed > 0:
            self.slice = number
        place = self.slice % SLICES
        self.calls[place] += 1
        self.failures[place] += failed
        self.slow[place] += slow

    def forget(self) -> None:
        """Empty the window."""
        for counts in (self.calls, self.failures, self.slow):
            counts[:] = [0] * SLICES


class Breakers:
    """All breakers of this process. Implements the port Observer, and for
    `gateway.routing.availability` the half of Availability that looks at calls.
    """

    def __init__(
        self,
        limits: BreakerLimits,
        observer: BreakerObserver,
        clock: Callable[[], float] = time.monotonic,
        breakers_max: int = BREAKERS_MAX,
    ) -> None:
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._breakers_max = breakers_max
        self._slice_s = limits.window_s / SLICES
        self._surely_fast_s = min(limits.slow_s_min, limits.slow_s_max)
        """No call is slow that takes less, whatever the account's median."""
        self._breakers: OrderedDict[BreakerKey, _Breaker] = OrderedDict()
        self._open: set[BreakerKey] = set()
        self._reports: dict[BreakerKey, Report] = {}
        self._told = asyncio.Event()
        """There is something that others should know soon."""
        self._coordinated = False
        """The others were heard lately: then one process probes, for all."""

    # --- Availability ---

    def refusal(self, candidate: Candidate, method: str) -> Exclusion | None:
        """See the port."""
        if not self._open:
            return None
        key = BreakerKey(candidate.connector, candidate.connector_account_id, method)
        breaker = self._breakers.get(key)
        if breaker is None or not breaker.is_open:
            return None
        return self._refusal(key, breaker, self._clock())

    def admit(self, candidate: Candidate, method: str) -> Exclusion | None:
        """See the port."""
        if not self._open:
            return None
        key = BreakerKey(candidate.connector, candidate.connector_account_id, method)
        breaker = self._breakers.get(key)
        if breaker is None or not breaker.is_open:
            return None
        now = self._clock()
        refusal = self._refusal(key, breaker, now)
        if refusal is None:
            breaker.probes.append(now + self._limits.probe_life_s)
            breaker.had_right = False
            breaker.wanted = True
        return refusal

    def give_back(self, candidate: Candidate, method: str, seconds: float) -> None:
        """See the port."""
        if not self._open:
            return
        key = BreakerKey(candidate.connector, candidate.connector_account_id, method)
        breaker = self._breakers.get(key)
        # A place from before the pause went with the opening.
        if breaker is not None and breaker.probes and self._clock() - seconds >= breaker.open_until:
            breaker.probes.pop()

    def pause_s(self, candidate: Candidate, method: str) -> float | None:
        """See the port: until the next probe may be sent."""
        key = BreakerKey(candidate.connector, candidate.connector_account_id, method)
        breaker = self._breakers.get(key)
        if breaker is None or not breaker.is_open:
            return None
        left_s = breaker.open_until - self._clock()
        return left_s if left_s > 0 else None

    def _refusal(self, key: BreakerKey, breaker: _Breaker, now: float) -> Exclusion | None:
        if now < breaker.open_until:
            return Exclusion.BREAKER_OPEN
        if self._coordinated and not breaker.granted:
            breaker.wanted = True
            if not breaker.asked:
                breaker.asked = True
                self._told.set()
            if not breaker.had_right:
                return Exclusion.BREAKER_OPEN
        if not breaker.half_open_told:
            breaker.half_open_told = True
            self._observer.breaker_changed(key, BreakerState.HALF_OPEN)
        breaker.probes = [until for until in breaker.probes if until > now]
        if len(breaker.probes) >= self._limits.probes_max:
            return Exclusion.PROBES_TAKEN
        return None

    # --- Observer ---

    def observed(
        self,
        segment: Segment,
        candidate: Candidate,
        kind: OperationKind,  # noqa: ARG002 - the port's
        answer: ConnectorAnswer,
        seconds: float,
    ) -> None:
        """See the port."""
        failed = is_failure(answer)
        now = self._clock()
        key = BreakerKey(candidate.connector, candidate.connector_account_id, segment.method)
        breaker = self._breakers.get(key)
        if breaker is None:
            if failed is None:
                return
            breaker = self._new(key, now)
        self._breakers.move_to_end(key)
        if breaker.is_open:
            self._probed(key, breaker, failed, seconds, now)
            return
        if failed is None:
            return
        slow = not failed and seconds > self._surely_fast_s and seconds > self._slow_s(breaker)
        breaker.count(int(now / self._slice_s), failed=failed, slow=slow)
        if not failed:
            breaker.latencies.add(seconds, now)
        if failed or slow:
            self._open_where_due(key, breaker, now)

    def _slow_s(self, breaker: _Breaker) -> float:
        limits = self._limits
        told = limits.slow_factor * breaker.latencies.median_s()
        return min(max(told, limits.slow_s_min), limits.slow_s_max)

    def _open_where_due(self, key: BreakerKey, breaker: _Breaker, now: float) -> None:
        calls, limits = sum(breaker.calls), self._limits
        if calls < limits.calls_min:
            return
        if (
            sum(breaker.failures) >= limits.failure_share * calls
            or sum(breaker.slow) >= limits.slow_share * calls
        ):
            if now - breaker.closed_at > limits.pause_s_max:
                breaker.streak = 0
            self._reopen(key, breaker, now)

    def _probed(
        self,
        key: BreakerKey,
        breaker: _Breaker,
        failed: bool | None,
        seconds: float,
        now: float,
    ) -> None:
        # What was sent before the pause was over is no probe, and tells of earlier times.
        if not breaker.probes or now - seconds < breaker.open_until:
            return
        breaker.probes.pop(0)
        if failed is None:
            return
        if failed or seconds > self._slow_s(breaker):
            self._reopen(key, breaker, now)
            return
        breaker.good_probes += 1
        if breaker.good_probes >= self._limits.probes_good:
            self._report(Report(ReportKind.CLOSED, key, version=breaker.version))
            self._close(key, breaker, now)

    def _new(self, key: BreakerKey, now: float) -> _Breaker:
        if len(self._breakers) >= self._breakers_max:
            self._forget_one()
        breaker = self._breakers[key] = _Breaker(_Latencies(now), int(now / self._slice_s))
        return breaker

    def _forget_one(self) -> None:
        closed = (key for key, breaker in self._breakers.items() if not breaker.is_open)
        key = next(closed, None) or next(iter(self._breakers))
        del self._breakers[key]
        self._open.discard(key)

    def _reopen(self, key: BreakerKey, breaker: _Breaker, now: float) -> None:
        breaker.streak += 1
        pause_s = self._limits.pause_s_min * math.exp2(min(breaker.streak - 1, 30))
        pause_s = min(pause_s, self._limits.pause_s_max)
        breaker.version = 0
        self._opened(key, breaker, now + pause_s)
        self._report(Report(ReportKind.OPENED, key, pause_s, breaker.streak))

    def _opened(self, key: BreakerKey, breaker: _Breaker, until: float) -> None:
        breaker.is_open = True
        breaker.open_until = until
        breaker.granted = breaker.wanted = breaker.asked = False
        breaker.had_right = breaker.half_open_told = False
        breaker.probes.clear()
        breaker.good_probes = 0
        self._open.add(key)
        self._observer.breaker_changed(key, BreakerState.OPEN)
        _log.warning(
            "a breaker opened: calls are refused until probes succeed",
            extra={
                "connector": key.connector,
                "connector_account_id": key.connector_account_id,
                "method": key.method,
            },
        )

    def _close(self, key: BreakerKey, breaker: _Breaker, now: float) -> None:
        breaker.is_open = False
        breaker.closed_at = now
        breaker.version = 0
        breaker.probes.clear()
        breaker.forget()
        self._open.discard(key)
        self._observer.breaker_changed(key, BreakerState.CLOSED)
        _log.warning(
            "a breaker closed: calls pass again",
            extra={
                "connector": key.connector,
                "connector_account_id": key.connector_account_id,
                "method": key.method,
            },
        )

    # --- what is looked at ---

    def state(self, key: BreakerKey) -> BreakerState:
        """Of one breaker, now."""
        breaker = self._breakers.get(key)
        if breaker is None or not breaker.is_open:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < breaker.open_until else BreakerState.HALF_OPEN

    def open_keys(self) -> Iterable[BreakerKey]:
        """Those that are open or half-open."""
        return tuple(self._open)

    # --- other processes ---

    async def run(self, exchange: Exchange, interval_s: float) -> None:
        """Exchange states with other processes, again and again, until cancelled."""
        while True:
            self._told.clear()  # what happens from here on may come too late for this exchange
            await self.synchronize(exchange)
            pause_s = interval_s * random.uniform(0.8, 1.2)
            try:
                async with asyncio.timeout(pause_s):
                    await self._told.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(interval_s / 10)  # what happens together is told together

    async def synchronize(self, exchange: Exchange) -> None:
        """Tell the others what has changed, and take over what they tell."""
        taken = dict(list(self._reports.items())[:REPORTS_MAX])
        asked_at = self._clock()
        news = [told for each in taken.values() if (told := self._as_of(asked_at, each))]
        wishes = []
        for key in list(self._open)[:REPORTS_MAX]:
            breaker = self._breakers[key]
            is_probing = any(until > asked_at for until in breaker.probes)
            if key not in taken and (breaker.wanted or is_probing):
                # The right to probe lapses where no probes are sent.
                breaker.wanted = False
                wish = Report(ReportKind.WANTS_PROBES, key, PROBE_RIGHT_S, version=breaker.version)
                wishes.append(wish)
        try:
            shared = await exchange.exchange([*news, *wishes])
        except ExchangeUnavailable as error:
            if self._coordinated:
                _log.warning("breakers are not shared between processes: %s", error)
            self._coordinated = False
            return
        self._coordinated = True
        for key, report in taken.items():
            if self._reports.get(key) is report:
                del self._reports[key]
        self._take_over(shared, asked_at)

    def _as_of(self, now: float, report: Report) -> Report | None:
        """An opening with what is left of its pause, which others may have been out of reach for;
        None where nothing is: they may know better since.
        """
        if report.kind is not ReportKind.OPENED:
            return report
        breaker = self._breakers.get(report.key)
        left_s = 0.0 if breaker is None else breaker.open_until - now
        return report._replace(s=left_s) if left_s > 0 else None

    def _take_over(self, shared: Sequence[Shared], asked_at: float) -> None:
        now = self._clock()
        told = {each.key: each for each in shared}
        for key in list(self._open):
            # What others do not know of yet is reported next time.
            breaker = self._breakers[key]
            if key not in told and key not in self._reports and breaker.version:
                self._close(key, breaker, now)
        for each in shared:
            if each.key in self._reports:
                continue  # newer here
            breaker = self._breakers.get(each.key) or self._new(each.key, now)
            until = asked_at + each.remaining_s
            if not breaker.is_open or (each.version != breaker.version and breaker.version):
                self._opened(each.key, breaker, until)
            breaker.version, breaker.streak = each.version, each.streak
            if each.remaining_s > 0:
                breaker.open_until = until
            breaker.granted = each.mine
            breaker.had_right = breaker.had_right or each.mine

    def _report(self, report: Report) -> None:
        if len(self._reports) < REPORTS_MAX or report.key in self._reports:
            self._reports[report.key] = report
        self._told.set()
