"""The one table from the domain's reasons to gRPC statuses, with google.rpc details and trailers.

`python -m gateway.rpc.error_map` prints `docs/errors.md`.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from gateway.domain.errors import GatewayError, Reason

ERROR_DOMAIN: Final = "payments.v1"
"""`ErrorInfo.domain` of every error."""
VIOLATIONS_MAX: Final = 20
"""How many violations a status lists: clients refuse trailers above 8 KiB."""
DESCRIPTION_CHARACTERS_MAX: Final = 200
"""The length at which a violation's description is cut, for the same reason."""
INTERNAL_MESSAGE: Final = (
    "An internal error. Whether the call took effect is not known: repeat it with the same key."
)
"""The text of every INTERNAL error: what went wrong inside is for the log alone."""

DETAILS_TRAILER: Final = "grpc-status-details-bin"
PUSHBACK_TRAILER: Final = "grpc-retry-pushback-ms"
"""What stock clients obey between tries (gRFC A6): milliseconds, or negative for no retry."""

Trailers = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """How a reason leaves the gateway."""

    code: StatusCode
    advice: str
    """What the caller should do, one sentence."""
    retry_after_s: float | None = None
    """When the same call may be repeated, in seconds, where the refusal itself does not say; None
    where a repeat of the same call makes no sense."""


_C = StatusCode
_DIFFERENTLY = "The payment's present state forbids it; read the payment with GetPayment first."

RULES: Final[Mapping[Reason, Rule]] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: Rule(
            _C.INVALID_ARGUMENT, "Correct the fields that BadRequest names."
        ),
        Reason.MESSAGE_MALFORMED: Rule(
            _C.INVALID_ARGUMENT,
            "Send a message of the method's type; these bytes are none (or hold invalid UTF-8).",
        ),
        Reason.MESSAGE_TOO_LARGE: Rule(
            _C.RESOURCE_EXHAUSTED, "Send less in one message; the same message is never accepted."
        ),
        Reason.CARD_DATA_NOT_ALLOWED: Rule(
            _C.INVALID_ARGUMENT,
            "Remove the card number or card verification value from the field that BadRequest "
            "names; use a token.",
        ),
        Reason.FIELD_NOT_SUPPORTED: Rule(
            _C.INVALID_ARGUMENT,
            "Leave out the fields that BadRequest names; the merchant's connector cannot use them.",
        ),
        Reason.CURRENCY_NOT_SUPPORTED: Rule(
            _C.INVALID_ARGUMENT, "The merchant's connector does not take this currency."
        ),
        Reason.AMOUNT_NOT_SUPPORTED: Rule(
            _C.INVALID_ARGUMENT,
            "The merchant's connector cannot express the amount: use a multiple of the metadata's "
            "`step_minor`, at most `amount_minor_max`.",
        ),
        Reason.METHOD_NOT_SUPPORTED: Rule(
            _C.INVALID_ARGUMENT, "The merchant's connector does not take this payment method."
        ),
        Reason.COUNTRY_NOT_SUPPORTED: Rule(
            _C.INVALID_ARGUMENT,
            "The payment method is not offered to customers of the country that was given.",
        ),
        Reason.FIELD_REQUIRED: Rule(
            _C.INVALID_ARGUMENT,
            "Fill in the fields that BadRequest names; the connector needs them for this payment "
            "method.",
        ),
        Reason.PAGE_TOKEN_INVALID: Rule(
            _C.INVALID_ARGUMENT,
            "Use the next_page_token as it was given, with the same filters, or begin anew.",
        ),
        Reason.EVENT_CURSOR_INVALID: Rule(
            _C.INVALID_ARGUMENT, "Use the cursor of a message as it was given."
        ),
        Reason.CREDENTIAL_MISSING: Rule(
            _C.UNAUTHENTICATED,
            "Send the metadata `authorization: Bearer <API key or access token>`.",
        ),
        Reason.CREDENTIAL_INVALID: Rule(
            _C.UNAUTHENTICATED, "The credential is unknown, expired or revoked; use another."
        ),
        Reason.SCOPE_MISSING: Rule(
            _C.PERMISSION_DENIED, "Use a credential with the scope that the metadata names."
        ),
        Reason.MERCHANT_REQUIRED: Rule(
            _C.INVALID_ARGUMENT, "Name the merchant; the credential reaches not exactly one."
        ),
        Reason.MERCHANT_NOT_FOUND: Rule(
            _C.NOT_FOUND, "The credential reaches no merchant of this id."
        ),
        Reason.PAYMENT_NOT_FOUND: Rule(
            _C.NOT_FOUND,
            "The merchant has no payment of this id in the credential's mode, or no authorization"
            " with this idempotency key yet: where its call has no answer, repeat that one first.",
        ),
        Reason.OPERATION_NOT_FOUND: Rule(
            _C.NOT_FOUND,
            "The merchant has no operation of this id in the credential's mode, or none with this"
            " idempotency key yet: where its call has no answer, repeat that one.",
        ),
        Reason.METHOD_NOT_FOUND: Rule(
            _C.UNIMPLEMENTED, "The service has no method of this name; compare the versions."
        ),
        Reason.ROUTING_RULES_NOT_FOUND: Rule(
            _C.NOT_FOUND, "The merchant has no such version of routing rules in this mode."
        ),
        Reason.EVENT_CONSUMER_NOT_FOUND: Rule(
            _C.NOT_FOUND, "The organisation has no consumer of this name in the key's mode."
        ),
        Reason.IDEMPOTENCY_KEY_REUSED: Rule(
            _C.ALREADY_EXISTS,
            "The key belongs to another payload; nothing was done. Use a new key for a new call.",
        ),
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT: Rule(
            _C.ABORTED,
            "The first call with this key is still running; repeat with the same key.",
            retry_after_s=0.2,
        ),
        Reason.ROUTING_RULES_CHANGED: Rule(
            _C.ABORTED,
            "Another version is in force than was expected, the one of the metadata's "
            "`active_version`: look at it with GetRoutingRules first.",
        ),
        Reason.PAYMENT_NOT_AUTHORIZED: Rule(_C.FAILED_PRECONDITION, _DIFFERENTLY),
        Reason.PAYMENT_CLOSED_FOR_CAPTURE: Rule(
            _C.FAILED_PRECONDITION, "The payment takes no further capture."
        ),
        Reason.AMOUNT_EXCEEDS_AUTHORIZED: Rule(
            _C.FAILED_PRECONDITION,
            "Capture at most what is authorized and neither captured nor reserved by a capture.",
        ),
        Reason.AMOUNT_EXCEEDS_CAPTURED: Rule(
            _C.FAILED_PRECONDITION,
            "Refund at most what is captured and neither refunded nor reserved by a refund.",
        ),
        Reason.CURRENCY_MISMATCH: Rule(_C.FAILED_PRECONDITION, "Use the currency of the payment."),
        Reason.NOTHING_TO_VOID: Rule(
            _C.FAILED_PRECONDITION, "Nothing of the payment is authorized and not captured."
        ),
        Reason.INCREMENT_NOT_ALLOWED: Rule(
            _C.FAILED_PRECONDITION,
            "Increment only authorized payments with manual capture of which nothing is captured.",
        ),
        Reason.CAPTURE_NOT_REFUNDABLE: Rule(
            _C.FAILED_PRECONDITION, "Name a capture of this payment that succeeded, or none."
        ),
        Reason.OPERATION_NOT_IN_DOUBT: Rule(
            _C.FAILED_PRECONDITION,
            "Nothing is to be decided about this attempt, or another decision was taken; read the "
            "operation with GetOperation.",
        ),
        Reason.OUTCOME_NOT_ALLOWED: Rule(
            _C.FAILED_PRECONDITION,
            "Operations of this kind cannot have this outcome; the metadata names the kind.",
        ),
        Reason.OPERATION_IN_PROGRESS: Rule(
            _C.FAILED_PRECONDITION,
            "Repeat once the payment's unfinished operation has its outcome.",
            retry_after_s=1.0,
        ),
        Reason.TOO_MANY_OPERATIONS: Rule(
            _C.FAILED_PRECONDITION, "The payment takes no further operation."
        ),
        Reason.TOO_MANY_ATTEMPTS: Rule(
            _C.FAILED_PRECONDITION,
            "It was NOT_SENT every time, so nothing was done: find out why, and use a new key.",
        ),
        Reason.OPERATION_NOT_SUPPORTED: Rule(
            _C.FAILED_PRECONDITION, "The payment's connector has no such operation."
        ),
        Reason.CONNECTOR_UNAVAILABLE: Rule(
            _C.FAILED_PRECONDITION,
            "No connector serves the merchant in this mode: have one configured. With RetryInfo "
            "its accounts are out of use for now (a breaker, a maintenance window): repeat with "
            "the same key after the pause, which the service config does not do.",
        ),
        Reason.EVENT_CURSOR_UNKNOWN: Rule(
            _C.FAILED_PRECONDITION,
            "The database has lost the event that the position names (a restore, a standby that "
            "was behind): reset the consumer to an earlier cursor, or to the beginning.",
        ),
        Reason.EVENT_CONSUMER_OUT_OF_REACH: Rule(
            _C.FAILED_PRECONDITION,
            "Use a credential that reaches all merchants of the consumer, or another consumer.",
        ),
        Reason.EVENT_CONSUMERS_TOO_MANY: Rule(
            _C.FAILED_PRECONDITION, "Delete a consumer that nobody uses."
        ),
        Reason.CONTENTION: Rule(
            _C.ABORTED,
            "Other calls changed the payment meanwhile; repeat with the same key.",
            retry_after_s=0.1,
        ),
        Reason.OVERLOADED: Rule(
            _C.RESOURCE_EXHAUSTED,
            "The gateway refused it at the door; repeat with the same key after the pause.",
            retry_after_s=0.5,
        ),
        Reason.RATE_LIMITED: Rule(
            _C.RESOURCE_EXHAUSTED,
            "The merchant's rate limit is used up; repeat with the same key after the pause, which "
            "says when there is room.",
            retry_after_s=1.0,
        ),
        Reason.EVENT_STREAMS_TOO_MANY: Rule(
            _C.RESOURCE_EXHAUSTED,
            "The server, or the organisation on it, has as many streams of events as it may; end "
            "one, or begin again after the pause.",
            retry_after_s=5.0,
        ),
        Reason.DEADLINE_TOO_SHORT: Rule(
            _C.DEADLINE_EXCEEDED,
            "Nothing was sent to the PSP; repeat with the same key and a longer deadline.",
        ),
        Reason.STORE_UNAVAILABLE: Rule(
            _C.UNAVAILABLE,
            "Whether the call took effect is not known; repeat with the same key.",
            retry_after_s=1.0,
        ),
        Reason.SIGNING_KEYS_UNAVAILABLE: Rule(
            _C.UNAVAILABLE,
            "The keys that tokens are signed with could not be read; nothing was done, repeat.",
            retry_after_s=1.0,
        ),
        Reason.DRAINING: Rule(
            _C.UNAVAILABLE,
            "This server is shutting down; repeat with the same key over a new connection.",
            # Longer than a server goes on refusing before it closes its connections: a repeat must
            # not meet it again, or a client with one connection uses up its tries.
            retry_after_s=0.5,
        ),
        Reason.INTERNAL: Rule(
            _C.INTERNAL,
            "Whether the call took effect is not known; repeat with the same key, and report the "
            "`x-request-id`.",
        ),
    }
)
"""Every reason that a call can be refused for."""

OPERATION_REASONS: Final[Mapping[Reason, str]] = MappingProxyType(
    {
        Reason.SEND_WINDOW_PASSED: "It was not sent in time, so it was not sent at all.",
        Reason.CONNECT_FAILED: "No connection to the PSP came about; nothing was sent.",
        Reason.ANSWER_TIMED_OUT: "It was sent, and no answer came in time.",
        Reason.CONNECTION_LOST: "It may have been sent; the connection broke before an answer.",
        Reason.ANSWER_UNUSABLE: "The PSP's answer could not be understood.",
        Reason.CONNECTOR_BUSY: "No connection to the PSP was free in time; nothing was sent.",
        Reason.CONNECTOR_RATE_LIMITED: "The PSP's rate limiter turned it away; nothing was done.",
        Reason.REFERENCE_CANCELED: "Its reference was made unusable at the PSP.",
        Reason.RECOVERED: "Recovery took it over after its sender had died.",
        Reason.RESOLVED_BY_PERSON: "A person found out what became of it at the PSP.",
    }
)
"""Reasons that stand in `Operation.reason` only, never in an error."""

_NO_RETRY: Trailers = ((PUSHBACK_TRAILER, "-1"),)
_RETRIED_CODES: Final = frozenset({_C.ABORTED, _C.RESOURCE_EXHAUSTED, _C.UNAVAILABLE})
"""The codes that the published service config retries."""


def status_code(reason: Reason) -> StatusCode:
    """The gRPC status code of a refusal for this reason."""
    rule = RULES.get(reason)
    return StatusCode.INTERNAL if rule is None else rule.code


def retry_after_s(error: GatewayError) -> float | None:
    """When the call may be repeated, in seconds from now; None where that makes no sense."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    rule = RULES.get(error.reason)
    return None if rule is None else rule.retry_after_s


def _pause_ms(error: GatewayError) -> int | None:
    pause_s = retry_after_s(error)
    # Clients take a pushback of 0 for none, and fall back to their own, longer pause.
    return None if pause_s is None else max(1, round(pause_s * 1000))


def to_status(error: GatewayError) -> Status:
    """The error as google.rpc.Status: ErrorInfo, then BadRequest and RetryInfo where they apply."""
    code = status_code(error.reason)
    internal = code is StatusCode.INTERNAL
    status = Status(code=code.value[0], message=INTERNAL_MESSAGE if internal else error.message)
    reason = Reason.INTERNAL if internal else error.reason
    info = ErrorInfo(
        reason=reason.value, domain=ERROR_DOMAIN, metadata=None if internal else error.metadata
    )
    status.details.add().Pack(info)
    if error.violations and not internal:
        bad_request = BadRequest()
        for violation in error.violations[:VIOLATIONS_MAX]:
            bad_request.field_violations.add(
                field=violation.field,
                description=violation.description[:DESCRIPTION_CHARACTERS_MAX],
                reason=reason.value,
            )
        status.details.add().Pack(bad_request)
    pause_ms = _pause_ms(error)
    if pause_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(pause_ms)
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def to_trailers(error: GatewayError, status: Status, *, pushback: bool = True) -> Trailers:
    """The trailers of a call that ends with the status of `to_status(error)`.

    Without `pushback` the pause stands in the status alone.
    """
    details: Trailers = ((DETAILS_TRAILER, status.SerializeToString()),)
    if not pushback:
        return details
    pause_ms = _pause_ms(error)
    if pause_ms is not None:
        return (*details, (PUSHBACK_TRAILER, str(pause_ms)))
    if status_code(error.reason) in _RETRIED_CODES:
        return details + _NO_RETRY
    return details


_HEAD = """# Errors

<!-- Printed by `python -m gateway.rpc.error_map`; a test compares. -->

A refused call ends with a gRPC status whose `grpc-status-details-bin` trailer is a
`google.rpc.Status`: an `ErrorInfo` with the reason and the domain `payments.v1`, a `BadRequest`
with one violation for each field that is wrong, a `RetryInfo` where the same call may be repeated.
The pause is also in the trailer `grpc-retry-pushback-ms`, which gRPC clients with a retry policy
obey; `-1` there forbids the retry (the native transport cannot send it). Every call that
reaches the gateway, refused or not, ends with the trailer `x-request-id`; what gRPC itself refuses
does not (headers above `GATEWAY_METADATA_BYTES_MAX`, a message of twice
`GATEWAY_MESSAGE_BYTES_MAX`), and has no details. No text holds values of the request, card data
or the text of an exception.

A decline and an unknown outcome are answers, not errors: see `operation.state`. Repeating a call
with the same idempotency key and payload is always safe, whatever the error was.

| Reason | Status | Repeat after | What to do |
|---|---|---|---|
"""
_MIDDLE = """
## Why an operation has no answer of the PSP

These stand in `Operation.reason` and are never errors.

| Reason | Meaning |
|---|---|
"""


def render() -> str:
    """`docs/errors.md`."""
    rows = [
        f"| `{reason}` | {rule.code.name} | "
        f"{'' if rule.retry_after_s is None else f'{rule.retry_after_s:g} s'} | {rule.advice} |\n"
        for reason, rule in RULES.items()
    ]
    meanings = [f"| `{reason}` | {text} |\n" for reason, text in OPERATION_REASONS.items()]
    return _HEAD + "".join(rows) + _MIDDLE + "".join(meanings)


if __name__ == "__main__":
    sys.stdout.write(render())
