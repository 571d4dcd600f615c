"""One metric sample and one log line for each finished call."""

import logging
import time
from collections.abc import Callable
from typing import Final

from gateway.domain.errors import Reason
from gateway.telemetry.metrics import Metrics

_log = logging.getLogger("gateway.rpc")

_OUR_FAULT = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
"""Codes that a caller can do nothing about."""
OVERLOAD_LOG_S: Final = 1.0
"""Calls refused for overload are logged together, at most once in so long: a line for each would
cost more than the refusal."""


class RpcObserver:
    """Implements `gateway.rpc.service.Observer`."""

    def __init__(
        self,
        metrics: Metrics,
        log_successes_per_s_max: int,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._log_successes_per_s_max = log_successes_per_s_max
        self._clock_s = clock_s
        self._second_ends_at = float("-inf")
        self._logged_in_second = 0
        self._successes_not_logged = 0
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
        """Count a call out, and log it: every failure, and so many successes in a second.

        Of the further successes, and of the calls refused for overload, only the number is logged.
        """
        self._metrics.rpc_finished(method, code, reason, seconds)
        if reason == Reason.OVERLOADED:
            self._overloaded += 1
            self._log_overload()
            return
        if code == "OK" and not self._may_log_success():
            self._successes_not_logged += 1
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
        if self._successes_not_logged:
            extra["successes_not_logged"] = self._successes_not_logged
            self._successes_not_logged = 0
        level = logging.ERROR if code in _OUR_FAULT else logging.INFO
        _log.log(level, "call finished", extra=extra)

    def _may_log_success(self) -> bool:
        now_s = self._clock_s()
        if now_s >= self._second_ends_at:
            self._second_ends_at = now_s + 1
            self._logged_in_second = 0
        self._logged_in_second += 1
        return self._logged_in_second <= self._log_successes_per_s_max

    def _log_overload(self) -> None:
        now = self._clock_s()
        if now - self._overload_logged_at < OVERLOAD_LOG_S:
            return
        self._overload_logged_at = now
        _log.warning("calls refused for overload", extra={"calls_refused": self._overloaded})
        self._overloaded = 0
