"""Which accounts may be asked now: what persons have switched off, and what breakers have seen.

A kill switch stops everything that would be sent to an account, or to all accounts of a connector;
a maintenance window does so from one time to another. Captures, voids and refunds are refused too,
before anything is written; recovery goes on asking about what was sent.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from gateway.routing.breakers import Breakers
from gateway.routing.model import Candidate, Exclusion


class SuspensionKind(IntEnum):
    """Why an account is asked nothing."""

    UNKNOWN = 0
    """As a newer version of the gateway knows: taken for a kill switch."""
    KILL = 1
    """A person switched it off, until a person switches it on again."""
    MAINTENANCE = 2
    """A window, which ends by itself."""


@dataclass(frozen=True, slots=True)
class Suspension:
    """A time in which an account is asked nothing, with who decided so and why."""

    suspension_id: str
    kind: SuspensionKind
    merchant_id: str
    """Empty: of every merchant."""
    connector: str
    account_id: str
    """Empty: every account of the connector."""
    method: str
    """As `gateway.routing.model.Segment.method`; empty: everything."""
    reason: str
    created_by: str
    begins_at: datetime
    ends_at: datetime | None
    begins_in_s: float
    """By the database's clock, from when it was read."""
    ends_in_s: float | None
    """None: it does not end by itself."""


@dataclass(frozen=True, slots=True)
class _Window:
    exclusion: Exclusion
    method: str
    begins: float
    ends: float | None


_EXCLUSIONS = {
    SuspensionKind.UNKNOWN: Exclusion.KILLED,
    SuspensionKind.KILL: Exclusion.KILLED,
    SuspensionKind.MAINTENANCE: Exclusion.MAINTENANCE,
}


class AccountAvailability:
    """Implements the port Availability: suspensions first, then breakers."""

    def __init__(
        self,
        breakers: Breakers | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `breakers` persons alone decide."""
        self._breakers = breakers
        self._clock = clock
        self._windows: dict[tuple[str, str], list[_Window]] = {}
        """By connector and account; the account is empty where all are meant."""

    def refusal(self, candidate: Candidate, method: str) -> Exclusion | None:
        """See the port."""
        if self._windows and (suspended := self._suspended(candidate, method)):
            return suspended
        return None if self._breakers is None else self._breakers.refusal(candidate, method)

    def admit(self, candidate: Candidate, method: str) -> Exclusion | None:
        """See the port."""
        if self._windows and (suspended := self._suspended(candidate, method)):
            return suspended
        return None if self._breakers is None else self._breakers.admit(candidate, method)

    def give_back(self, candidate: Candidate, method: str, seconds: float) -> None:
        """See the port."""
        if self._breakers is not None:
            self._breakers.give_back(candidate, method, seconds)

    def pause_s(self, candidate: Candidate, method: str) -> float | None:
        """See the port. Of windows and the breaker the last end counts; a kill switch has none."""
        now = self._clock()
        pauses = []
        for window in self._held(candidate, method):
            if window.ends is None:
                return None
            pauses.append(window.ends - now)
        breaker_s = None if self._breakers is None else self._breakers.pause_s(candidate, method)
        if breaker_s is not None:
            pauses.append(breaker_s)
        return max(pauses, default=None)

    def _suspended(self, candidate: Candidate, method: str) -> Exclusion | None:
        """A kill switch is what is told where a window holds, too."""
        told = {window.exclusion for window in self._held(candidate, method)}
        return Exclusion.KILLED if Exclusion.KILLED in told else next(iter(told), None)

    def _held(self, candidate: Candidate, method: str) -> list[_Window]:
        """The windows that hold now."""
        now = self._clock()
        return [
            window
            for account_id in (candidate.connector_account_id, "")
            for window in self._windows.get((candidate.connector, account_id), ())
            if window.method in ("", method)
            and window.begins <= now
            and (window.ends is None or now < window.ends)
        ]

    def suspend(self, suspensions: Iterable[Suspension], read_at: float) -> None:
        """Take over the suspensions that are or are to come, in place of those before.

        `read_at` is when they were asked for, by this object's clock.
        """
        windows: dict[tuple[str, str], list[_Window]] = {}
        for each in suspensions:
            ends = None if each.ends_in_s is None else read_at + each.ends_in_s
            window = _Window(_EXCLUSIONS[each.kind], each.method, read_at + each.begins_in_s, ends)
            windows.setdefault((each.connector, each.account_id), []).append(window)
        self._windows = windows
