"""The access log: our failures, as much of the rest as a second may have; merchants' counts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gateway.telemetry.metrics import Metrics
from gateway.telemetry.observer import MERCHANTS_ELECTED_S, MerchantObserver, RpcObserver

if TYPE_CHECKING:
    import pytest


class Log:
    """An observer with a clock that is set by hand."""

    def __init__(
        self,
        caplog: pytest.LogCaptureFixture,
        successes_per_s_max: int,
        refusals_per_s_max: int = 100,
    ) -> None:
        caplog.set_level(logging.INFO, "gateway.rpc")
        self._caplog = caplog
        self.now_s = 0.0
        self.trace_id = ""
        self._observer = RpcObserver(
            Metrics(),
            successes_per_s_max,
            refusals_per_s_max,
            trace_id=lambda: self.trace_id,
            clock_s=lambda: self.now_s,
        )

    def finish(
        self, code: str, calls: int = 1, merchant_id: str = "mer_1"
    ) -> list[dict[str, object]]:
        """What is logged as so many calls end."""
        self._caplog.clear()
        for _ in range(calls):
            self._observer.rpc_started("GetPayment")
            self._observer.rpc_finished(
                "GetPayment", code, "", 0.001, "req_1", merchant_id, "pay_1"
            )
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


def test_failures_of_ours_are_always_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert len(Log(caplog, 0, 0).finish("INTERNAL", calls=100)) == 100


def test_of_each_merchant_so_many_refusals_are_logged_a_second_and_the_number_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Log(caplog, 0, 2)
    assert len(log.finish("INVALID_ARGUMENT", calls=10)) == 2
    assert log.finish("CANCELLED") == []
    [other] = log.finish("NOT_FOUND", merchant_id="mer_2")
    assert other["refusals_not_logged"] == 9
    log.now_s = 1.0
    first, _ = log.finish("UNAVAILABLE", calls=3)
    assert "refusals_not_logged" not in first
    [ours] = log.finish("INTERNAL")
    assert ours["refusals_not_logged"] == 1


def test_with_no_successes_a_second_none_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert Log(caplog, 0).finish("OK", calls=100) == []


def test_a_line_of_a_traced_call_names_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(caplog, 100)
    [line] = log.finish("OK")
    assert "trace_id" not in line
    log.trace_id = "0af7651916cd43dd8448eb211c80319c"
    [line] = log.finish("OK")
    assert line["trace_id"] == log.trace_id


# --- merchants ------------------------------------------------------------------------------------


class Merchants:
    """An observer of merchants with a clock that is set by hand."""

    def __init__(self, merchants_max: int) -> None:
        self.now_s = 0.0
        self.metrics = Metrics()
        inner = RpcObserver(self.metrics, 0, 0)
        self._observer = MerchantObserver(
            inner, self.metrics, merchants_max, clock_s=lambda: self.now_s
        )

    def call(self, merchant_id: str, calls: int = 1) -> None:
        for _ in range(calls):
            self._observer.rpc_started("GetPayment")
            self._observer.rpc_finished("GetPayment", "OK", "", 0.001, "req", merchant_id, "")

    @property
    def shown(self) -> dict[str, float]:
        """The counts by their labels."""
        [series] = [
            each for each in self.metrics.series if each.name == "gateway_merchant_requests"
        ]
        samples = series.collect().samples
        assert {sample.labels["code"] for sample in samples} <= {"OK"}
        return {sample.labels["merchant"]: sample.value for sample in samples}


def test_merchants_beyond_the_number_are_counted_together() -> None:
    merchants = Merchants(2)
    for merchant_id in ("a", "b", "c", "d", "a"):
        merchants.call(merchant_id)
    assert merchants.shown == {"a": 2, "b": 1, "other": 2}


def test_those_with_the_most_calls_get_the_labels_and_begin_at_nothing() -> None:
    merchants = Merchants(2)
    for merchant_id, calls in (("a", 1), ("b", 5), ("c", 9)):
        merchants.call(merchant_id, calls)
    assert merchants.shown == {"a": 1, "b": 5, "other": 9}
    merchants.now_s = MERCHANTS_ELECTED_S
    merchants.call("c")
    assert merchants.shown == {"b": 5, "c": 1, "other": 9}


def test_who_is_silent_keeps_a_label_that_nobody_else_needs() -> None:
    merchants = Merchants(2)
    merchants.call("a")
    merchants.call("b")
    merchants.now_s = MERCHANTS_ELECTED_S
    merchants.call("b")
    merchants.now_s = 2 * MERCHANTS_ELECTED_S
    merchants.call("b")
    assert merchants.shown == {"a": 1, "b": 3}


def test_a_call_whose_merchant_is_not_known_is_counted_for_none() -> None:
    merchants = Merchants(2)
    merchants.call("")
    assert merchants.shown == {}
