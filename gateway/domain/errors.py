"""Why the gateway refuses a call: the reasons, and the one root of its errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Reason(StrEnum):
    """A machine-readable reason; `docs/errors.md` says what a caller should do about each."""

    # The request itself.
    INVALID_REQUEST = "INVALID_REQUEST"
    MESSAGE_MALFORMED = "MESSAGE_MALFORMED"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    CARD_DATA_NOT_ALLOWED = "CARD_DATA_NOT_ALLOWED"
    FIELD_NOT_SUPPORTED = "FIELD_NOT_SUPPORTED"
    CURRENCY_NOT_SUPPORTED = "CURRENCY_NOT_SUPPORTED"
    AMOUNT_NOT_SUPPORTED = "AMOUNT_NOT_SUPPORTED"
    METHOD_NOT_SUPPORTED = "METHOD_NOT_SUPPORTED"
    COUNTRY_NOT_SUPPORTED = "COUNTRY_NOT_SUPPORTED"
    FIELD_REQUIRED = "FIELD_REQUIRED"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"
    EVENT_CURSOR_INVALID = "EVENT_CURSOR_INVALID"
    # Who calls.
    CREDENTIAL_MISSING = "CREDENTIAL_MISSING"
    CREDENTIAL_INVALID = "CREDENTIAL_INVALID"
    SCOPE_MISSING = "SCOPE_MISSING"
    MERCHANT_REQUIRED = "MERCHANT_REQUIRED"
    # What it names.
    MERCHANT_NOT_FOUND = "MERCHANT_NOT_FOUND"
    PAYMENT_NOT_FOUND = "PAYMENT_NOT_FOUND"
    OPERATION_NOT_FOUND = "OPERATION_NOT_FOUND"
    METHOD_NOT_FOUND = "METHOD_NOT_FOUND"
    ROUTING_RULES_NOT_FOUND = "ROUTING_RULES_NOT_FOUND"
    EVENT_CONSUMER_NOT_FOUND = "EVENT_CONSUMER_NOT_FOUND"
    # Idempotency.
    IDEMPOTENCY_KEY_REUSED = "IDEMPOTENCY_KEY_REUSED"
    IDEMPOTENCY_KEY_IN_FLIGHT = "IDEMPOTENCY_KEY_IN_FLIGHT"
    # What other people changed meanwhile.
    ROUTING_RULES_CHANGED = "ROUTING_RULES_CHANGED"
    # What the payment's state does not allow.
    PAYMENT_NOT_AUTHORIZED = "PAYMENT_NOT_AUTHORIZED"
    PAYMENT_CLOSED_FOR_CAPTURE = "PAYMENT_CLOSED_FOR_CAPTURE"
    AMOUNT_EXCEEDS_AUTHORIZED = "AMOUNT_EXCEEDS_AUTHORIZED"
    AMOUNT_EXCEEDS_CAPTURED = "AMOUNT_EXCEEDS_CAPTURED"
    CURRENCY_MISMATCH = "CURRENCY_MISMATCH"
    NOTHING_TO_VOID = "NOTHING_TO_VOID"
    INCREMENT_NOT_ALLOWED = "INCREMENT_NOT_ALLOWED"
    CAPTURE_NOT_REFUNDABLE = "CAPTURE_NOT_REFUNDABLE"
    OPERATION_NOT_IN_DOUBT = "OPERATION_NOT_IN_DOUBT"
    OUTCOME_NOT_ALLOWED = "OUTCOME_NOT_ALLOWED"
    OPERATION_IN_PROGRESS = "OPERATION_IN_PROGRESS"
    TOO_MANY_OPERATIONS = "TOO_MANY_OPERATIONS"
    TOO_MANY_ATTEMPTS = "TOO_MANY_ATTEMPTS"
    OPERATION_NOT_SUPPORTED = "OPERATION_NOT_SUPPORTED"
    CONNECTOR_UNAVAILABLE = "CONNECTOR_UNAVAILABLE"
    # What the events' consumers do not allow.
    EVENT_CURSOR_UNKNOWN = "EVENT_CURSOR_UNKNOWN"
    EVENT_CONSUMER_OUT_OF_REACH = "EVENT_CONSUMER_OUT_OF_REACH"
    EVENT_CONSUMERS_TOO_MANY = "EVENT_CONSUMERS_TOO_MANY"
    # What the gateway could not do now.
    CONTENTION = "CONTENTION"
    OVERLOADED = "OVERLOADED"
    RATE_LIMITED = "RATE_LIMITED"
    EVENT_STREAMS_TOO_MANY = "EVENT_STREAMS_TOO_MANY"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    SIGNING_KEYS_UNAVAILABLE = "SIGNING_KEYS_UNAVAILABLE"
    DRAINING = "DRAINING"
    INTERNAL = "INTERNAL"
    # Why an operation ended without an answer of the PSP (Operation.reason, never an error).
    SEND_WINDOW_PASSED = "SEND_WINDOW_PASSED"
    CONNECT_FAILED = "CONNECT_FAILED"
    ANSWER_TIMED_OUT = "ANSWER_TIMED_OUT"
    CONNECTION_LOST = "CONNECTION_LOST"
    ANSWER_UNUSABLE = "ANSWER_UNUSABLE"
    CONNECTOR_BUSY = "CONNECTOR_BUSY"
    CONNECTOR_RATE_LIMITED = "CONNECTOR_RATE_LIMITED"
    REFERENCE_CANCELED = "REFERENCE_CANCELED"
    RECOVERED = "RECOVERED"
    RESOLVED_BY_PERSON = "RESOLVED_BY_PERSON"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of one field of a request."""

    field: str
    """The path of the field in the request, as `amount.currency_code`."""
    description: str
    """What is wrong; never the value."""


class GatewayError(Exception):
    """The gateway refuses a call. Its text is safe to show: no value of the request is in it."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] = _NOTHING,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata
        """Facts about the refusal, as `{"state": "VOIDED"}`."""
        self.violations = violations
        self.retry_after_s = retry_after_s
        """When a repeat makes sense, in seconds from now; None where it makes none."""


def refuse(
    reason: Reason, message: str, *, violation: Violation | None = None, **metadata: str
) -> GatewayError:
    """A refusal with facts about it, and the one field that it is for where there is one."""
    violations = () if violation is None else (violation,)
    return GatewayError(reason, message, metadata=metadata, violations=violations)
