"""One metric sample and one log line for each finished call."""

import logging
from itertools import count

from gateway.telemetry.metrics import Metrics

_log = logging.getLogger("gateway.rpc")

_OUR_FAULT = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
"""Codes that a caller can do nothing about."""


class RpcObserver:
    """Implements `gateway.rpc.service.Observer`."""

    def __init__(self, metrics: Metrics, log_success_every: int) -> None:
        self._metrics = metrics
        self._log_success_every = log_success_every
        self._successes = count()

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
        """Count a call, and log it: every failure, and of the successes one in so many."""
        self._metrics.rpc_finished(method, code, reason, seconds)
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
