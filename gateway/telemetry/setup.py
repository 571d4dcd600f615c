"""The start of logging and error reports, as the settings say; the same for every process."""

from gateway.settings import Settings
from gateway.telemetry.logs import Logs, configure_logging


def start_logging(settings: Settings) -> Logs:
    """Log, and report errors where that is set up. Before anything else of the process."""
    logs = configure_logging(settings.log_level)
    dsn = settings.sentry_dsn.get_secret_value()
    if dsn:
        # Sentry's library is loaded only here.
        from gateway.telemetry.error_reports import report_errors  # noqa: PLC0415

        report_errors(dsn, settings.environment)
    return logs
