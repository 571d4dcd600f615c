"""gateway.telemetry.error_reports: what is reported, how often, and what never is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from gateway.domain.errors import GatewayError, Reason
from gateway.telemetry.error_reports import EVENTS_PER_S_MAX, ErrorReports

DSN = "https://0123456789abcdef@127.0.0.1/1"
PAN = "4111 1111 1111 1111"


class Kept(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        for item in envelope.items:
            self.events.append(json.loads(item.get_bytes()))


class Reports:
    """A logger whose errors are reported, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.handler = ErrorReports(DSN, "production", clock_s=lambda: self.now_s)
        self.handler._client.transport = self.kept = Kept()
        self.logger = self.logger_named("gateway.rpc.service")

    def logger_named(self, name: str) -> logging.Logger:
        """A logger of its own, whatever else has the name."""
        logger = logging.Logger(name)  # noqa: LOG001 - so that no other test meets it
        logger.addHandler(self.handler)
        return logger

    def fail(self, error: Exception, **extra: object) -> None:
        """Log an exception as the gateway logs what it did not expect."""
        request_body = {"card": PAN}  # a local variable, which nobody may report
        try:
            raise error
        except Exception as caught:
            self.logger.log(logging.ERROR, "a call failed", exc_info=caught, extra=extra)
        del request_body

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.kept.events


@pytest.fixture
def reports() -> Iterator[Reports]:
    made = Reports()
    yield made
    made.handler.close()


def test_an_unexpected_exception_is_reported_with_its_stack_and_its_ids(reports: Reports) -> None:
    reports.fail(KeyError("missing"), request_id="req_1", method="AuthorizePayment")
    [event] = reports.events
    [exception] = event["exception"]["values"]
    assert (exception["type"], exception["value"]) == ("KeyError", "'missing'")
    assert exception["stacktrace"]["frames"][-1]["function"] == "fail"
    assert event["logentry"]["formatted"] == "a call failed"
    assert event["extra"]["request_id"] == "req_1"
    assert event["extra"]["method"] == "AuthorizePayment"
    assert (event["level"], event["environment"]) == ("error", "production")


def test_card_numbers_and_secrets_are_scrubbed_wherever_they_stand(reports: Reports) -> None:
    key = "gwk_test_abc.defghijkl"
    error = ValueError(f"card {PAN}, cvv=123, key {key}")
    error.__cause__ = RuntimeError("postgresql://gateway:hunter2@db/payments")
    reports.fail(error, authorization=f"Bearer {key}", detail={"list": [PAN], PAN: 1})
    text = json.dumps(reports.events)
    for secret in ("4111 1111", "cvv=123", "defghijkl", "hunter2"):
        assert secret not in text, secret
    assert "ValueError" in text
    assert "RuntimeError" in text


def test_no_local_variable_is_reported(reports: Reports) -> None:
    reports.fail(ValueError("x"))
    [event] = reports.events
    frames = event["exception"]["values"][0]["stacktrace"]["frames"]
    assert frames
    assert not any("vars" in frame for frame in frames)


def test_what_is_no_unexpected_exception_is_not_reported(reports: Reports) -> None:
    refusal = GatewayError(Reason.OVERLOADED, "Too much to do.")
    reports.logger.info("call finished", extra={"code": "RESOURCE_EXHAUSTED"})
    reports.logger.warning("not ready", exc_info=refusal)
    reports.logger.error("an outcome was lost")
    reports.logger.error("no exception here", exc_info=True)  # noqa: LOG014 - so it may be
    for name in ("urllib3.connectionpool", "opentelemetry.sdk", "sentry_sdk.errors"):
        reports.logger_named(name).error("the collector is away", exc_info=OSError("refused"))
    assert reports.events == []
    assert reports.handler.reports_dropped == 0


def test_an_exception_that_every_call_meets_is_reported_so_often_and_no_oftener(
    reports: Reports,
) -> None:
    for _ in range(3 * EVENTS_PER_S_MAX):
        reports.fail(ValueError("x"))
    assert len(reports.events) == EVENTS_PER_S_MAX
    assert reports.handler.reports_dropped == 2 * EVENTS_PER_S_MAX
    reports.now_s = 1.0
    reports.fail(ValueError("x"))
    assert len(reports.events) == EVENTS_PER_S_MAX + 1


def test_a_report_that_cannot_be_made_fails_nobody(reports: Reports) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    reports.fail(Broken())
    reports.logger.error("%d", "no number", exc_info=ValueError("x"))
    assert reports.handler.reports_dropped >= 1
