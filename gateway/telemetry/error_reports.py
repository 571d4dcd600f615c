"""Unexpected exceptions to Sentry, scrubbed as the logs are; loaded only where it is set up.

What is logged as an error with an exception is reported, and nothing else: no refusal, no request,
no local variable, no breadcrumb, and nothing of Sentry's own hooks is installed.
"""

import atexit
import logging
import time
from collections.abc import Callable
from typing import Any, Final, cast

from sentry_sdk import Client
from sentry_sdk.types import Event, Hint
from sentry_sdk.utils import event_from_exception

from gateway import __version__
from gateway.telemetry.logs import clean, extra_of

EVENTS_PER_S_MAX: Final = 5
"""Reports in a second, at most: an exception that every call meets is told often enough so. Each
reads source files and takes about a millisecond."""
EVENTS_QUEUED_MAX: Final = 100
"""Reports that wait for Sentry; further ones are dropped."""
FLUSH_S_MAX: Final = 2.0
"""How long the end of the process waits for Sentry to take the last reports."""
_DEPTH_MAX: Final = 12
"""Levels of a report: a frame of a stack lies on the seventh."""
_OF_REPORTING: Final = ("sentry_sdk", "urllib3", "opentelemetry")
"""Loggers that tell of reporting itself."""


def scrub(event: Event, _hint: Hint) -> Event:
    """The event without card numbers, card security codes, API keys and passwords."""
    return cast(Event, clean(event, _DEPTH_MAX))


class ErrorReports(logging.Handler):
    """Reports records with an exception from level ERROR on. It never raises, and never waits."""

    def __init__(
        self, dsn: str, environment: str, *, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(logging.ERROR)
        self.reports_dropped = 0
        """Exceptions that were not reported, since the start."""
        self._client = Client(
            dsn,
            environment=environment,
            release=f"payment-gateway@{__version__}",
            before_send=scrub,
            default_integrations=False,
            auto_enabling_integrations=False,
            auto_session_tracking=False,
            enable_backpressure_handling=False,
            include_local_variables=False,
            max_breadcrumbs=0,
            max_request_body_size="never",
            send_client_reports=False,
            shutdown_timeout=FLUSH_S_MAX,
            transport_queue_size=EVENTS_QUEUED_MAX,
        )
        self._clock_s = clock_s
        self._second_ends_at = float("-inf")
        self._sent_in_second = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Report the record's exception, where it has one."""
        if record.exc_info is None or record.exc_info[1] is None:
            return
        if record.name.partition(".")[0] in _OF_REPORTING:
            return
        if not self._may_send():
            self.reports_dropped += 1
            return
        try:
            self._report(record, record.exc_info[1])
        except Exception:  # noqa: BLE001 - a report must never fail whoever logs
            self.handleError(record)

    def _report(self, record: logging.LogRecord, error: BaseException) -> None:
        event: dict[str, Any]
        event, hint = cast(Any, event_from_exception(error, self._client.options))
        event["level"] = "fatal" if record.levelno >= logging.CRITICAL else "error"
        event["logger"] = record.name
        event["logentry"] = {"formatted": record.getMessage()}
        event["extra"] = extra_of(record)
        self._client.capture_event(cast(Event, event), hint)

    def _may_send(self) -> bool:
        now_s = self._clock_s()
        if now_s >= self._second_ends_at:
            self._second_ends_at = now_s + 1
            self._sent_in_second = 0
        self._sent_in_second += 1
        return self._sent_in_second <= EVENTS_PER_S_MAX

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        """Count it as not reported; logging's own would print the record as it is."""
        self.reports_dropped += 1

    def close(self) -> None:
        """Send what is queued, for at most FLUSH_S_MAX. Safe to repeat."""
        self._client.close(FLUSH_S_MAX)
        super().close()


def report_errors(dsn: str, environment: str) -> ErrorReports:
    """Report what all loggers are told, until the process ends.

    After `configure_logging`, which replaces all handlers.
    """
    reports = ErrorReports(dsn, environment)
    logging.getLogger().addHandler(reports)
    atexit.register(reports.close)
    return reports
