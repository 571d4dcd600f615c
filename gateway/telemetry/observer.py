"""What is told of each finished call: a metric sample, a log line, its merchant's count."""

import logging
import time
from collections.abc import Callable
from typing import Final

from gateway.domain.errors import Reason
from gateway.rpc.service import Observer
from gateway.telemetry.metrics import Metrics

_log = logging.getLogger("gateway.rpc")

_OUR_FAULT = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
"""Codes that a caller can do nothing about: each such call is logged."""
OVERLOAD_LOG_S: Final = 1.0
"""Calls refused for overload are logged together, at most once in so long: a line for each would
cost more than the refusal."""
MERCHANTS_ELECTED_S: Final = 60.0
"""How often it is settled anew which merchants have the most calls."""
MERCHANTS_COUNTED_MAX: Final = 10_000
"""Merchants whose calls are counted between two elections; those that come later are left out."""
OTHER_MERCHANTS: Final = "other"
"""The label of all merchants that have none of their own."""


class _Lines:
    """How many lines a second has, for each key."""

    __slots__ = ("_left", "_per_s_max", "_second_ends_at", "left_out")

    def __init__(self, per_s_max: int) -> None:
        self._per_s_max = per_s_max
        self._second_ends_at = float("-inf")
        self._left: dict[str, int] = {}
        self.left_out = 0
        """How many had no room since somebody last set this to 0."""

    def has_room(self, now_s: float, key: str = "") -> bool:
        """Whether there is one more; it is taken then."""
        if now_s >= self._second_ends_at:
            self._second_ends_at = now_s + 1
            self._left = {}
        left = self._left.get(key, self._per_s_max)
        if left <= 0:
            self.left_out += 1
            return False
        self._left[key] = left - 1
        return True


class RpcObserver:
    """Implements `gateway.rpc.service.Observer`."""

    def __init__(
        self,
        metrics: Metrics,
        log_successes_per_s_max: int,
        log_refusals_per_s_max: int,
        *,
        trace_id: Callable[[], str] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._trace_id = trace_id
        self._clock_s = clock_s
        self._successes = _Lines(log_successes_per_s_max)
        self._refusals = _Lines(log_refusals_per_s_max)
        self._overloaded = 0
        self._overload_logged_at = float("-inf")

    def rpc_started(self, method: str) -> None:
        """Count a call in."""
        self._metrics.rpc_started(method)

    def rpc_finished(
        self,
        method: str,
        code: str,
        reason: str,
        seconds: float,
        request_id: str,
        merchant_id: str,
        payment_id: str,
    ) -> None:
        """Count a call out, and log it: every failure of ours, so many successes in a second, and
        so many refusals of each merchant.

        Of the others, and of the calls refused for overload, only the number is logged: a client
        that is refused again and again shall not fill the log, nor have us work for it.
        """
        self._metrics.rpc_finished(method, code, reason, seconds)
        if code == "OK":
            if not self._successes.has_room(self._clock_s()):
                return
        elif reason == Reason.OVERLOADED:
            self._overloaded += 1
            self._log_overload()
            return
        elif code not in _OUR_FAULT and not self._refusals.has_room(self._clock_s(), merchant_id):
            return
        extra: dict[str, object] = {
            "method": method,
            "code": code,
            "reason": reason,
            "duration_ms": round(1000 * seconds, 3),
            "request_id": request_id,
            "merchant_id": merchant_id,
            "payment_id": payment_id,
        }
        if self._trace_id is not None and (trace_id := self._trace_id()):
            extra["trace_id"] = trace_id
        if self._successes.left_out:
            extra["successes_not_logged"] = self._successes.left_out
            self._successes.left_out = 0
        if self._refusals.left_out:
            extra["refusals_not_logged"] = self._refusals.left_out
            self._refusals.left_out = 0
        level = logging.ERROR if code in _OUR_FAULT else logging.INFO
        _log.log(level, "call finished", extra=extra)

    def _log_overload(self) -> None:
        now = self._clock_s()
        if now - self._overload_logged_at < OVERLOAD_LOG_S:
            return
        self._overload_logged_at = now
        _log.warning("calls refused for overload", extra={"calls_refused": self._overloaded})
        self._overloaded = 0


class MerchantObserver:
    """Implements `gateway.rpc.service.Observer`: counts calls by merchant, of those with the most.

    At most `merchants_max` have a label at a time. A free one goes to whoever comes; every
    MERCHANTS_ELECTED_S those keep or get one that had the most calls meanwhile. A merchant's series
    begins at 0 when it gets a label, and ends when it loses it.
    """

    def __init__(
        self,
        inner: Observer,
        metrics: Metrics,
        merchants_max: int,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rpc_started = inner.rpc_started
        self._finished = inner.rpc_finished
        self._metrics = metrics
        self._merchants_max = merchants_max
        self._clock_s = clock_s
        self._shown: set[str] = set()
        self._calls: dict[str, int] = {}
        self._elect_at = clock_s() + MERCHANTS_ELECTED_S

    def rpc_finished(
        self,
        method: str,
        code: str,
        reason: str,
        seconds: float,
        request_id: str,
        merchant_id: str,
        payment_id: str,
    ) -> None:
        """Count the call, and pass it on. Of one that was refused early no merchant is known."""
        self._finished(method, code, reason, seconds, request_id, merchant_id, payment_id)
        if not merchant_id:
            return
        if self._clock_s() >= self._elect_at:
            self._elect()
        calls = self._calls.get(merchant_id, 0)
        if calls or len(self._calls) < MERCHANTS_COUNTED_MAX:
            self._calls[merchant_id] = calls + 1
        shown = merchant_id
        if merchant_id not in self._shown:
            if len(self._shown) < self._merchants_max:
                self._shown.add(merchant_id)
            else:
                shown = OTHER_MERCHANTS
        self._metrics.merchant_finished(shown, code)

    def _elect(self) -> None:
        def rank(merchant_id: str) -> tuple[int, bool]:
            return self._calls[merchant_id], merchant_id in self._shown

        elected = set(sorted(self._calls, key=rank, reverse=True)[: self._merchants_max])
        if len(elected) < self._merchants_max:  # who was silent keeps what nobody else needs
            silent = sorted(self._shown - elected)
            elected |= set(silent[: self._merchants_max - len(elected)])
        for merchant_id in self._shown - elected:
            self._metrics.forget_merchant(merchant_id)
        self._shown = elected
        self._calls = {}
        self._elect_at = self._clock_s() + MERCHANTS_ELECTED_S
