"""Admission: how much the gateway takes on at once, and of whose (promise P10).

What is limited is the gateway's own work: calls that wait for Redis, PostgreSQL or the event loop.
A call that waits for its PSP costs memory and nothing else, so that it counts against a bound of
its own (`in_flight_max`), and the PSP's time is in no measurement.

The limit is off until the gateway's stages have taken `target_s` longer than they may, for some
ticks and with a queue that grows. A database that pauses for a moment is no overload, and neither
is the queue that it leaves, while that is being worked off; nor are callers that wait for their
answers before they call again, however many, up to `bulk_target_s`. Then the limit is what keeps
the time at a part of the target (what is refused anyway need not make those wait who are let in),
found by its ratio to the present time; it goes off again when nothing has been refused for a while.

Pure code: no task, no timer, no I/O. It measures in ticks, which end with the next call. One event
loop uses it. `docs/decisions/0005-admission.md` says why it is so.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from gateway.domain.errors import GatewayError, Reason

TICK_S: Final = 0.03
"""The shortest tick: long enough for tens of calls under load, a tenth of what overload may last
unnoticed."""
TICK_S_MAX: Final = 0.5
"""A tick ends after this even without `SAMPLES_MIN` samples."""
SAMPLES_MIN: Final = 20
"""A tick in which fewer calls passed a stage is not over yet."""
PATIENCE_TICKS: Final = 5
"""So many slow ticks in a row with a queue that grows are an overload. A tick in which it swells
counts twice."""
SWELLING: Final = 1.3
"""A queue that is longer by this factor than a tick ago swells."""
GROWN: Final = 1.25
"""A queue that is longer by this factor than in the first slow tick grows."""
SHRUNK: Final = 0.9
"""A queue that is down to this part of its longest is being worked off."""
CALM_TICKS: Final = 30
"""So many ticks in a row without a refusal end it."""
SHRINK_MIN: Final = 0.7
"""The limit shrinks in one tick to no less than this part."""
GROW_MAX: Final = 1.1
"""The limit grows in one tick by no more than this factor."""
HELD_PART: Final = 0.2
"""The part of the target at which an overload is held."""
FAIR_EXCESS: Final = 1.5
"""Merchants below their share are admitted beyond the limit, up to this factor."""
NEWCOMERS_PART: Final = 0.125
"""The part of `in_flight_max` that only merchants below their share get."""
BULK_PART: Final = 0.75
"""The part of the limit that items of batches and streams may fill while single calls come too."""
SINGLE_CALLS_REMEMBERED_S: Final = 1.0
"""Items have the gateway to themselves when no single call has come for so long."""
BASE_WINDOW_S: Final = 30.0
"""What the stages take unhindered is the least of the last one to two of these windows."""
BASE_FACTOR: Final = 2.0
"""The stages may always take so many times the least time that they take unhindered."""
BASE_STEP: Final = 0.005
"""At the least limit nothing is left to refuse: what the stages take then becomes, by this part in
a tick, what they are taken to take unhindered (a database that has become slower, say), as far as
`bulk_target_s` allows."""
FADING: Final = 0.8
"""What is left in a tick of the measurement of a stage that nobody passed."""
JITTER_STEPS: Final = 16
"""A pause is one of so many, from half of the mean to one and a half: spread enough for clients,
few enough for the door to keep the encoded refusals."""
PRESSURE_LEVELS: Final = 6
"""The mean pause doubles at most so often."""

_MESSAGE: Final = "The gateway has too much to do; repeat with the same key after the pause."


class Work(StrEnum):
    """Classes of calls, for metrics."""

    PAYMENT = "payment"
    ITEM = "item"
    READ = "read"
    LIST = "list"


_ITEM: Final = Work.ITEM  # looked up once: in Python 3.11 that costs as much as a call


class Stage(StrEnum):
    """What a call waits for, beside its PSP."""

    CLAIM = "claim"
    INTENT = "intent"
    OUTCOME = "outcome"
    READ = "read"


class RefusedBy(StrEnum):
    """Which bound refused a call, for metrics."""

    LIMIT = "limit"
    IN_FLIGHT = "in_flight"


@dataclass(frozen=True, slots=True)
class GateLimits:
    """The bounds of one gate; times in seconds."""

    working_max: int
    """Calls that the gateway works on at once, at most; the limit while there is no overload."""
    working_min: int
    """The least limit: fewer are never refused, whatever they take."""
    in_flight_max: int
    """Calls at once, those that wait for a PSP included."""
    target_s: float
    """By how much the stages may take longer than unhindered."""
    bulk_target_s: float
    """The same while there are only items of batches and streams."""
    retry_after_s: float = 0.25
    """The mean pause that a refused call is told; it doubles as the refusals outnumber the rest."""


@dataclass(slots=True)
class _Share:
    """What one merchant has in the gateway; it lasts as long as there is something."""

    working: int = 0
    in_flight: int = 0


@dataclass(slots=True)
class _Timing:
    """The passages through one stage since the last tick."""

    sum_s: float = 0.0
    count: int = 0
    min_s: float = field(default=float("inf"))
    mean_s: float = 0.0
    """Of the latest tick in which somebody passed, fading."""


class Gate:
    """The door to one kind of work: what is inside, how long it takes, who may enter.

    A call that is admitted counts as working until `release`; between `leave` and `come_back` it
    waits for something that is not the gateway's. What goes on without its caller is counted by
    `carry`, and released once more.
    """

    def __init__(
        self,
        limits: GateLimits,
        stages: tuple[Stage, ...],
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if not 1 <= limits.working_min <= limits.working_max <= limits.in_flight_max:
            raise ValueError("1 <= working_min <= working_max <= in_flight_max must hold")
        if min(limits.target_s, limits.bulk_target_s, limits.retry_after_s) <= 0:
            raise ValueError("targets and pauses are positive")
        self.limits = limits
        self.limit = float(limits.working_max)
        """How many calls the gateway may work on now."""
        self.engaged = False
        """Whether there is an overload."""
        self.working = 0
        """Calls that the gateway works on."""
        self.in_flight = 0
        """Those, and the ones that wait for a PSP."""
        self.delay_s = 0.0
        """What the stages took in the latest tick, together."""
        self.base_s = 0.0
        """What they take unhindered."""
        self.admitted: dict[Work, int] = {}
        self.refused: dict[tuple[Work, RefusedBy], int] = {}
        self._clock = clock
        self._uniform = uniform
        self._shares: dict[str, _Share] = {}
        self._working_merchants = 0
        self._in_flight_soft = max(1, int(limits.in_flight_max * (1 - NEWCOMERS_PART)))
        self._timings = {stage: _Timing() for stage in stages}
        now = clock()
        self._ticked = now
        self._next_tick = now + TICK_S
        self._admitted_in_tick = 0
        self._refused_in_tick = 0
        self._most = 0  # at work at once in this tick,
        self._most_before = 0  # and in the one before: at one moment there may be few by chance
        self._slow_ticks = 0
        self._first_slow = 0  # that number in the first of the slow ticks,
        self._longest = 0  # and in the one with the most
        self._calm_ticks = 0
        self._pressure = 1.0
        self._single_call_at = now - SINGLE_CALLS_REMEMBERED_S
        self._window_began = now
        self._least_s = (float("inf"), float("inf"))  # of the present window, and of the one before

    # --- calls ---

    def admit(self, merchant_id: str, work: Work) -> None:
        """Take a call in. Raises GatewayError(OVERLOADED)."""
        now = self._clock()
        if now >= self._next_tick:
            self._tick(now)
        limit = self.limit
        if work is not _ITEM:
            self._single_call_at = now
        elif self.engaged and now - self._single_call_at < SINGLE_CALLS_REMEMBERED_S:
            limit *= BULK_PART
        share = self._shares.get(merchant_id)
        if self.working >= limit or self.in_flight >= self._in_flight_soft:
            self._check_share(share, limit, work)
        if share is None:
            share = self._shares[merchant_id] = _Share()
        if not share.working:
            self._working_merchants += 1
        share.working += 1
        share.in_flight += 1
        self.working += 1
        self.in_flight += 1
        if self.working > self._most:  # noqa: PLR1730 - as in `passed`
            self._most = self.working
        self._admitted_in_tick += 1
        self.admitted[work] = self.admitted.get(work, 0) + 1

    def release(self, merchant_id: str) -> None:
        """A call that was admitted or carried has ended."""
        share = self._shares[merchant_id]
        share.in_flight -= 1
        self.in_flight -= 1
        self._stop(share)
        if not share.in_flight:
            del self._shares[merchant_id]

    def leave(self, merchant_id: str) -> None:
        """A call begins to wait for its PSP, or for another call."""
        self._stop(self._shares[merchant_id])

    def come_back(self, merchant_id: str) -> None:
        """It has its answer, and is never refused any more."""
        self._go(self._shares[merchant_id])

    def carry(self, merchant_id: str) -> None:
        """A call goes on without its caller, who will release it; another `release` follows."""
        share = self._shares[merchant_id]
        share.in_flight += 1
        self.in_flight += 1
        self._go(share)

    def passed(self, stage: Stage, seconds: float) -> None:
        """A call has passed a stage."""
        timing = self._timings[stage]
        timing.sum_s += seconds
        timing.count += 1
        if seconds < timing.min_s:  # noqa: PLR1730 - for every call; min() costs thrice as much
            timing.min_s = seconds

    @property
    def merchants(self) -> int:
        """How many merchants have something in the gateway."""
        return len(self._shares)

    def _go(self, share: _Share) -> None:
        # From 0, or from below: a call may be carried while it waits for its PSP.
        share.working += 1
        if share.working == 1:
            self._working_merchants += 1
        self.working += 1

    def _stop(self, share: _Share) -> None:
        share.working -= 1
        if share.working == 0:
            self._working_merchants -= 1
        self.working -= 1

    def _check_share(self, share: _Share | None, limit: float, work: Work) -> None:
        """At a bound: only who has less than an equal share of it may enter. Raises GatewayError.

        The shares are max-min fair: what others leave unused goes to whoever comes first, as long
        as there is room.
        """
        in_flight_max = self.limits.in_flight_max
        if self.in_flight >= self._in_flight_soft:
            mine = 1 if share is None else share.in_flight + 1
            # As if one more were about to come: a lone merchant leaves room for a second one.
            others = len(self._shares) + (share is None)
            if self.in_flight >= in_flight_max or mine * (others + 1) > in_flight_max:
                raise self._refusal(work, RefusedBy.IN_FLIGHT)
        if self.working >= limit:
            mine = 1 if share is None else share.working + 1
            merchants = self._working_merchants + (mine == 1)
            if self.working >= limit * FAIR_EXCESS or mine * merchants > limit:
                raise self._refusal(work, RefusedBy.LIMIT)

    def _refusal(self, work: Work, by: RefusedBy) -> GatewayError:
        self._refused_in_tick += 1
        self.refused[work, by] = self.refused.get((work, by), 0) + 1
        return GatewayError(Reason.OVERLOADED, _MESSAGE, retry_after_s=self._pause_s())

    def _pause_s(self) -> float:
        level = min(PRESSURE_LEVELS, max(0, int(self._pressure).bit_length() - 1))
        step = int(self._uniform() * JITTER_STEPS)
        return self.limits.retry_after_s * 2.0**level * (0.5 + step / JITTER_STEPS)

    # --- ticks ---

    def _tick(self, now: float) -> None:
        elapsed_s = now - self._ticked
        passed = max(timing.count for timing in self._timings.values())
        if passed < SAMPLES_MIN and elapsed_s < TICK_S_MAX:
            # While nothing passes there is nothing to learn: `working_max` bounds what comes in.
            self._next_tick = now + TICK_S / 3
            return
        target_s = self._target_s(now)
        least_s = self._measure(elapsed_s)
        if self.engaged:
            self._adjust(BASE_FACTOR * self.base_s + HELD_PART * target_s)
        else:
            self._learn_base(now, least_s)
            self._watch(BASE_FACTOR * self.base_s + target_s)
        offered = self._admitted_in_tick + self._refused_in_tick
        pressure = offered / max(1, self._admitted_in_tick)
        self._pressure += 0.2 * (pressure - self._pressure)
        self._admitted_in_tick = self._refused_in_tick = 0
        self._most_before, self._most = self._most, self.working
        self._ticked = now
        tick_s = TICK_S
        if self.engaged:
            # No shorter than what it controls takes, or it would judge the limit before the last.
            tick_s = max(tick_s, min(self.delay_s, TICK_S_MAX))
        self._next_tick = now + tick_s

    def _target_s(self, now: float) -> float:
        alone = now - self._single_call_at >= SINGLE_CALLS_REMEMBERED_S
        return self.limits.bulk_target_s if alone else self.limits.target_s

    def _measure(self, elapsed_s: float) -> float:
        """Settle `delay_s`, and begin anew; the least that the stages took, together.

        That is infinite where nobody passed one of them.
        """
        fading = FADING ** max(1.0, elapsed_s / TICK_S_MAX)
        self.delay_s = least_s = 0.0
        for timing in self._timings.values():
            if timing.count:
                timing.mean_s = timing.sum_s / timing.count
            else:
                timing.mean_s *= fading
            least_s += timing.min_s
            self.delay_s += timing.mean_s
            timing.sum_s, timing.count, timing.min_s = 0.0, 0, float("inf")
        return least_s

    def _learn_base(self, now: float, least_s: float) -> None:
        present_s, before_s = self._least_s
        if now - self._window_began >= BASE_WINDOW_S:
            self._window_began = now
            present_s, before_s = float("inf"), present_s
        self._least_s = min(present_s, least_s), before_s
        known_s = min(self._least_s)
        if known_s < float("inf"):
            self.base_s = known_s

    def _watch(self, allowed_s: float) -> None:
        """Look for an overload."""
        most = self._most
        slow = self.delay_s > allowed_s and most > self.limits.working_min
        if not slow or most < SHRUNK * self._longest:
            self._slow_ticks = self._longest = 0
        if not slow:
            return
        if not self._slow_ticks:
            self._first_slow = most
        self._longest = max(self._longest, most)
        self._slow_ticks += 2 if most > SWELLING * self._most_before else 1
        # Callers that wait for their answers make a queue of some length, and never a longer one.
        grows = self._longest >= GROWN * self._first_slow
        too_slow = self.delay_s > BASE_FACTOR * self.base_s + self.limits.bulk_target_s
        if self._slow_ticks >= PATIENCE_TICKS and (grows or too_slow):
            self.engaged = True
            self._calm_ticks = 0
            self._set_limit(self.working * allowed_s / self.delay_s)

    def _adjust(self, allowed_s: float) -> None:
        """Move the limit to where the stages take what they may."""
        ratio = allowed_s / max(self.delay_s, 1e-9)
        calm = ratio >= 1 and not self._refused_in_tick
        self._calm_ticks = self._calm_ticks + 1 if calm else 0
        if self._calm_ticks >= CALM_TICKS:
            self.engaged = False
            self._slow_ticks = self._longest = 0
            self.limit = float(self.limits.working_max)
            return
        limit = self.limit
        if ratio < 1:
            if self.working > limit * FAIR_EXCESS:
                return  # what was measured is the queue from before this limit
            # A limit far above what is inside would first have to shrink for nothing.
            limit = min(limit, FAIR_EXCESS * self.working)
        # Half of the way in each tick: the next one sees what it did.
        self._set_limit(limit * min(GROW_MAX, max(SHRINK_MIN, (1 + ratio) / 2)))
        # Not without end: refusals beyond all measure take the thread's time too, at any limit.
        may_learn = BASE_FACTOR * self.base_s < self.limits.bulk_target_s
        if self.limit == self.limits.working_min and ratio < 1 and may_learn:
            self.base_s += BASE_STEP * (self.delay_s - self.base_s)
            self._least_s = (self.base_s, self.base_s)

    def _set_limit(self, limit: float) -> None:
        self.limit = min(float(self.limits.working_max), max(float(self.limits.working_min), limit))


@dataclass(frozen=True, slots=True)
class Admission:
    """The gates of one process."""

    payments: Gate
    """Money calls, and the items of batches and streams."""
    reads: Gate
    """GetPayment and GetOperation."""
    lists: Gate
    """ListPayments: few at once, for their lane serves recovery and credentials too."""

    def gates(self) -> dict[str, Gate]:
        """All of them, by their names in metrics."""
        return {"payments": self.payments, "reads": self.reads, "lists": self.lists}


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The bounds of admission; times in seconds. See GateLimits."""

    calls_max: int = 2000
    calls_min: int = 32
    in_flight_max: int = 10_000
    reads_max: int = 1000
    lists_max: int = 64
    target_s: float = 0.1
    bulk_target_s: float = 1.0
    retry_after_s: float = 0.25


def open_gates(
    limits: AdmissionLimits,
    *,
    clock: Callable[[], float] = time.monotonic,
    uniform: Callable[[], float] = random.random,
) -> Admission:
    """The gates for these limits. Raises ValueError where they contradict each other."""

    def read_gate(working_max: int) -> Gate:
        return Gate(
            GateLimits(
                working_max=working_max,
                working_min=min(limits.calls_min, working_max),
                in_flight_max=2 * working_max,  # reads wait for no PSP: never what bounds them
                target_s=limits.target_s,
                bulk_target_s=limits.bulk_target_s,
                retry_after_s=limits.retry_after_s,
            ),
            (Stage.READ,),
            clock=clock,
            uniform=uniform,
        )

    payments = Gate(
        GateLimits(
            working_max=limits.calls_max,
            working_min=limits.calls_min,
            in_flight_max=limits.in_flight_max,
            target_s=limits.target_s,
            bulk_target_s=limits.bulk_target_s,
            retry_after_s=limits.retry_after_s,
        ),
        (Stage.CLAIM, Stage.INTENT, Stage.OUTCOME),
        clock=clock,
        uniform=uniform,
    )
    return Admission(payments, read_gate(limits.reads_max), read_gate(limits.lists_max))
