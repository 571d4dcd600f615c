"""One metric sample and one log line for each finished call."""

import logging
import time
from itertools import count
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

    def __init__(self, metrics: Metrics, log_success_every: int) -> None:
        self._metrics = metrics
        self._log_success_every = log_success_every
        self._successes = count()
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
        """Count a call out, and log it: every failure, and of the successes one in so many.

        Of those refused for overload only the number is logged.
        """
        self._metrics.rpc_finished(method, code, reason, seconds)
        if reason == Reason.OVERLOADED:
            self._overloaded += 1
            self._log_overload()
            return
        if code == "OK" and next(self._successes) % self._log_success_every:
            return
        _log.log(
            logging.ERROR if code in _OUR_FAULT else logging.INFO,
            "call finished",
            extra={
                "method": method,
                "code": code,
                "reason": reason,
                "duration_ms": round(1000 * seconds, 3),
                "request_id": request_id,
                "merchant_id": merchant_id,
                "payment_id": payment_id,
            },
        )

    def _log_overload(self) -> None:
        now = time.monotonic()
        if now - self._overload_logged_at < OVERLOAD_LOG_S:
            return
        self._overload_logged_at = now
        _log.warning("calls refused for overload", extra={"calls_refused": self._overloaded})
        self._overloaded = 0
