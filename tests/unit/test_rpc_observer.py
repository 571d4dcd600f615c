"""The access log: every failure, and as many successes as a second may have."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gateway.telemetry.metrics import Metrics
from gateway.telemetry.observer import RpcObserver

if TYPE_CHECKING:
    import pytest


class Log:
    """An observer with a clock that is set by hand."""

    def __init__(self, caplog: pytest.LogCaptureFixture, successes_per_s_max: int) -> None:
        caplog.set_level(logging.INFO, "gateway.rpc")
        self._caplog = caplog
        self.now_s = 0.0
        self._observer = RpcObserver(Metrics(), successes_per_s_max, clock_s=lambda: self.now_s)

    def finish(self, code: str, calls: int = 1) -> list[dict[str, object]]:
        """What is logged as so many calls end."""
        self._caplog.clear()
        for _ in range(calls):
            self._observer.rpc_started("GetPayment")
            self._observer.rpc_finished("GetPayment", code, "", 0.001, "req_1", "mer_1", "pay_1")
        return [vars(record) for record in self._caplog.records]


def test_successes_are_logged_up_to_their_number_a_second(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(caplog, 3)
    assert len(log.finish("OK", calls=10)) == 3
    log.now_s = 0.999
    assert log.finish("OK") == []
    log.now_s = 1.0
    assert len(log.finish("OK", calls=10)) == 3


def test_a_line_tells_how_many_successes_were_not_logged_before_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Log(caplog, 1)
    [first] = log.finish("OK", calls=5)
    assert "successes_not_logged" not in first
    [failure] = log.finish("INVALID_ARGUMENT")
    assert failure["successes_not_logged"] == 4
    [next_failure] = log.finish("INVALID_ARGUMENT")
    assert "successes_not_logged" not in next_failure


def test_failures_are_always_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert len(Log(caplog, 0).finish("INTERNAL", calls=100)) == 100


def test_with_no_successes_a_second_none_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert Log(caplog, 0).finish("OK", calls=100) == []
