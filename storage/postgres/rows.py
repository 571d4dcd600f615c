"""Between the domain's values and the columns of the tables."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeVar, cast

import asyncpg
import orjson

from gateway.application.administration import DoubtEntry
from gateway.application.ports import Change, Intent, Resolution
from gateway.domain.model import (
    AdviceAction,
    Attempt,
    AvsResult,
    CaptureMethod,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    DoubtCause,
    DoubtOutcome,
    Mode,
    NextAction,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    PaymentState,
    QrCode,
    ResponseCode,
    Verdict,
    Voucher,
    make_attempt,
    make_operation,
    make_payment,
)

T = TypeVar("T")
Row = tuple[Any, ...]
"""A composite value: what a statement takes an array of."""

_PROCESSING = OperationState.PROCESSING
_BACKSLASH = ord("\\")
"""A number: to look for bytes within bytes costs Python 3.11 an exception."""
_OUTCOME_ENUMS = {
    "response_code": ResponseCode,
    "advice_action": AdviceAction,
    "avs_result": AvsResult,
    "cvv_result": CvvResult,
}
_WRITTEN_WITH_NEW_PAYMENT = {
    "version",
    "merchant_order_id",
    "allow_partial_approval",
    "details",
    "created_at",
    "updated_at",
}
_NEW_PAYMENT = {
    field.name: field.default
    for field in fields(Payment)
    if field.default is not MISSING and field.name not in _WRITTEN_WITH_NEW_PAYMENT
}
_NEW_PAYMENT_DEFAULTS = tuple(_NEW_PAYMENT.values())
_new_payment_values = attrgetter(*_NEW_PAYMENT)


def clean(text: str) -> str:
    """A PSP's text as PostgreSQL can hold it: without NUL and half surrogate pairs.

    An outcome is written whatever it says, so what cannot be stored is replaced, not refused.
    """
    if text.isascii():
        return text.replace("\x00", "\ufffd") if "\x00" in text else text
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


# --- documents ------------------------------------------------------------------------------------
# While a newer version of the gateway is rolled out, older processes read what it wrote: fields and
# codes that they do not know are left out.


def _json(document: object) -> str:
    return orjson.dumps(document).decode()


def outcome_json(outcome: Outcome | None) -> str | None:
    """By field names, defaults left out."""
    if outcome is None:
        return None
    try:
        text = orjson.dumps(outcome.told())
    except TypeError:  # half a surrogate pair
        return _json(_outcome_document(outcome))
    # As ASCII, but for NUL, a text is clean; what is written with a backslash may be one.
    if text.isascii() and _BACKSLASH not in text:
        return text.decode()
    return _json(_outcome_document(outcome))


def _outcome_document(outcome: Outcome) -> dict[str, Any]:
    return {
        name: clean(value) if isinstance(value, str) else value
        for name, value in outcome.told().items()
    }


def outcome_of(text: str | None) -> Outcome | None:
    """The outcome of a column."""
    return None if text is None else _outcome_of_document(orjson.loads(text))


def _outcome_of_document(document: dict[str, Any]) -> Outcome:
    for name, enum in _OUTCOME_ENUMS.items():
        if name in document:
            try:
                document[name] = enum(document[name])
            except ValueError:
                del document[name]
    return _made(Outcome, document)


def _made(kind: Callable[..., T], document: dict[str, Any]) -> T:
    try:
        return kind(**document)
    except TypeError:
        known = {field.name for field in fields(cast(Any, kind))}
        return kind(**{name: value for name, value in document.items() if name in known})


def _next_action_text(action: NextAction | None) -> str:
    """The column next_action_url: a JSON document, or nothing."""
    return "" if action is None else _json(_next_action_document(action))


def _next_action_document(action: NextAction) -> dict[str, Any]:
    """By field names, defaults left out."""
    return {
        name: _cleaned(value)
        for name, value in asdict(action).items()
        if value not in (None, "", False)
    }


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {name: _cleaned(part) for name, part in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value


def _next_action_of(text: str) -> NextAction | None:
    """Of the column next_action_url, which was an address before it was a document."""
    if not text:
        return None
    if not text.startswith("{"):
        return NextAction(redirect_url=text)
    return _next_action_of_document(orjson.loads(text))


def _next_action_of_document(document: dict[str, Any]) -> NextAction:
    if "qr_code" in document:
        document["qr_code"] = _made(QrCode, document["qr_code"])
    if "voucher" in document:
        document["voucher"] = _made(Voucher, document["voucher"])
    if "expires_at" in document:
        document["expires_at"] = datetime.fromisoformat(document["expires_at"])
    return _made(NextAction, document)


def answer_json(answer: ConnectorAnswer) -> str:
    """A connector's answer by field names, defaults left out."""
    document: dict[str, Any] = {}
    for field in fields(ConnectorAnswer):
        value = getattr(answer, field.name)
        if value == field.default:
            continue
        if isinstance(value, Outcome):
            value = _outcome_document(value)
        elif isinstance(value, NextAction):
            value = _next_action_document(value)
        elif isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, str):
            value = clean(value)
        document[field.name] = value
    return _json(document)


def answer_of(text: str | None) -> ConnectorAnswer | None:
    """The answer of a column."""
    if text is None:
        return None
    document = orjson.loads(text)
    document["delivery"] = Delivery(document["delivery"])
    if "verdict" in document:
        document["verdict"] = Verdict(document["verdict"])
    if "outcome" in document:
        document["outcome"] = _outcome_of_document(document["outcome"])
    if "next_action" in document:
        document["next_action"] = _next_action_of_document(document["next_action"])
    if "authorization_expires_at" in document:
        document["authorization_expires_at"] = datetime.fromisoformat(
            document["authorization_expires_at"]
        )
    return _made(ConnectorAnswer, document)


# --- to rows --------------------------------------------------------------------------------------
# In the order of the attributes of the types in the migrations. One array of composite values costs
# a quarter of an array for each column: see docs/performance.md. An enum's member goes in as its
# number, `_value_`: asyncpg would look twice at what is no plain int, and `value` is a function.


def _changing(operation: Operation) -> Row:
    """What of an operation can change, but for its epoch."""
    attempt = operation.attempt
    return (
        operation.state._value_,
        operation.amount_minor,
        operation.final,
        operation.request_id,
        operation.note,
        operation.reason,
        _next_action_text(operation.next_action),
        _json(operation.allocations) if operation.allocations else None,
        attempt.number,
        attempt.connector,
        attempt.connector_account_id,
        attempt.delivery._value_,
        clean(attempt.connector_transaction_id),
        outcome_json(attempt.outcome),
        attempt.processing_ms,
        operation.response,
    )


def _new(operation: Operation) -> Row:
    """All of an operation but its times."""
    return (
        operation.merchant_id,
        operation.operation_id,
        operation.payment_id,
        operation.kind._value_,
        operation.origin._value_,
        operation.currency,
        operation.epoch,
        operation.parent_operation_id,
        operation.idempotency_key,
        operation.fingerprint,
        operation.merchant_transaction_id,
        *_changing(operation),
    )


def _payment(payment: Payment) -> Row:
    """What of a payment can change."""
    return (
        payment.version,
        payment.state._value_,
        payment.requested_minor,
        payment.authorized_minor,
        payment.capture_pending_minor,
        payment.captured_minor,
        payment.refund_pending_minor,
        payment.refunded_minor,
        payment.voided_minor,
        payment.increment_pending_minor,
        payment.authorized_reported_minor,
        payment.captured_reported_minor,
        payment.refunded_reported_minor,
        payment.capture_closed,
        payment.cancel_requested,
        payment.connector,
        payment.connector_account_id,
        clean(payment.connector_transaction_id),
        clean(payment.auth_code),
        clean(payment.network_transaction_id),
        payment.authorization_expires_at,
    )


def check_new_payment(intent: Intent) -> None:
    """Raise ValueError for a new payment that is not as authorize_intent writes it.

    That is: without amounts but the requested one, with its operation's currency and connector.
    """
    operation, payment = intent.operation, intent.payment
    attempt = operation.attempt
    if (
        payment.merchant_id != operation.merchant_id
        or payment.payment_id != operation.payment_id
        or payment.currency != operation.currency
        or payment.connector != attempt.connector
        or payment.connector_account_id != attempt.connector_account_id
    ):
        raise ValueError("a new payment and its first operation differ")
    values = _new_payment_values(payment)
    if values != _NEW_PAYMENT_DEFAULTS:
        pairs = zip(_NEW_PAYMENT, values, _NEW_PAYMENT_DEFAULTS, strict=True)
        name = next(name for name, value, default in pairs if value != default)
        raise ValueError(f"{name} of a new payment is set")


def authorize_row(intent: Intent) -> Row:
    """An authorize_intent."""
    payment = intent.payment
    return (
        *_new(intent.operation),
        intent.recover_after_s,
        payment.mode._value_,
        payment.state._value_,
        payment.capture_method._value_,
        payment.requested_minor,
        payment.version,
        payment.merchant_order_id,
        payment.allow_partial_approval,
        payment.details,
    )


def followup_row(intent: Intent) -> Row:
    """A followup_intent."""
    return (
        *_new(intent.operation),
        intent.recover_after_s,
        intent.expected_version,
        *_payment(intent.payment),
    )


def change_row(change: Change) -> Row:
    """A payment_change."""
    operation, payment = change.operation, change.payment
    recover_after_s = change.recover_after_s if operation.state is _PROCESSING else None
    return (
        operation.merchant_id,
        operation.operation_id,
        operation.payment_id,
        change.expected_epoch,
        change.expected_state._value_,
        change.expected_version,
        operation.epoch,
        recover_after_s,
        # An operation that is PROCESSING again is too old for the scan for dead senders.
        recover_after_s if change.doubt is None else change.doubt.check_after_s,
        change.event_id,
        change.event_type,
        change.event,
        *_changing(operation),
        operation.updated_at,
        *_payment(payment),
        # Mostly the same: asyncpg takes as long for a time as for twenty numbers.
        None if payment.updated_at is operation.updated_at else payment.updated_at,
    )


def companion_rows(changes: Sequence[Change]) -> list[Row]:
    """The companion_operations that begin with the changes; their events follow the changes'."""
    return [
        (
            change.operation.operation_id,
            *_new(each.operation),
            change.payment.version,
            seq,
            each.event_id,
            each.event_type,
            each.event,
        )
        for change in changes
        for seq, each in enumerate(change.companions, 1)
    ]


def resolution_rows(changes: Sequence[Change]) -> list[Row]:
    """The doubt_resolutions of the changes that a person decided on."""
    return [
        (
            change.operation.merchant_id,
            change.operation.operation_id,
            each.attempt_number,
            change.operation.payment_id,
            each.resolved_by,
            each.outcome,
            each.connector_transaction_id,
            each.amount_reported_minor,
            each.reason,
            each.request_id,
            each.state_before,
            each.state_after,
            each.payment_state_before,
            each.payment_state_after,
            each.payment_version,
        )
        for change in changes
        if (each := change.resolution) is not None
    ]


def superseded_rows(operations: Iterable[Operation]) -> list[Row]:
    """The superseded_attempts before the present ones."""
    return [
        (
            operation.merchant_id,
            operation.operation_id,
            attempt.number,
            attempt.connector,
            attempt.connector_account_id,
            attempt.delivery._value_,
            clean(attempt.connector_transaction_id),
            outcome_json(attempt.outcome),
            attempt.processing_ms,
        )
        for operation in operations
        for attempt in operation.superseded_attempts
        if attempt.number < operation.attempt.number
    ]


def discrepancy_rows(changes: Sequence[Change]) -> list[Row]:
    """The discrepancies that the changes found."""
    return [
        (
            change.operation.operation_id,
            each.merchant_id,
            each.payment_id,
            each.operation_id,
            each.kind,
            clean(each.expected),
            clean(each.reported),
        )
        for change in changes
        for each in change.discrepancies
    ]


# --- from columns ---------------------------------------------------------------------------------


def operation_of(row: asyncpg.Record) -> Operation:
    """The operation in a row with `operation_columns` of reads.sql."""
    earlier = row["superseded_attempts"]
    allocations = row["allocations"]
    return make_operation(
        merchant_id=row["merchant_id"],
        operation_id=row["operation_id"],
        payment_id=row["payment_id"],
        kind=OperationKind(row["kind"]),
        origin=OperationOrigin(row["origin"]),
        state=OperationState(row["state"]),
        amount_minor=row["amount_minor"],
        currency=row["currency"],
        attempt=make_attempt(
            number=row["attempt_number"],
            connector=row["connector"],
            connector_account_id=row["connector_account_id"],
            delivery=Delivery(row["delivery"]),
            connector_transaction_id=row["connector_transaction_id"],
            outcome=outcome_of(row["outcome"]),
            processing_ms=row["processing_ms"],
        ),
        epoch=row["epoch"],
        parent_operation_id=row["parent_operation_id"],
        final=row["final"],
        idempotency_key=row["idempotency_key"],
        fingerprint=row["fingerprint"],
        request_id=row["request_id"],
        merchant_transaction_id=row["merchant_transaction_id"],
        note=row["note"],
        reason=row["reason"],
        next_action=_next_action_of(row["next_action_url"]),
        allocations=()
        if allocations is None
        else tuple((operation_id, part) for operation_id, part in orjson.loads(allocations)),
        superseded_attempts=()
        if earlier is None
        else tuple(_attempt_of(document) for document in orjson.loads(earlier)),
        response=row["response"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _attempt_of(document: dict[str, Any]) -> Attempt:
    outcome = document["outcome"]
    return make_attempt(
        number=document["number"],
        connector=document["connector"],
        connector_account_id=document["connector_account_id"],
        delivery=Delivery(document["delivery"]),
        connector_transaction_id=document["connector_transaction_id"],
        outcome=None if outcome is None else _outcome_of_document(outcome),
        processing_ms=document["processing_ms"],
    )


def payment_of(row: asyncpg.Record) -> Payment:
    """The payment in a row with `payment_columns` of reads.sql."""
    return make_payment(
        merchant_id=row["payment_merchant_id"],
        payment_id=row["payment_payment_id"],
        mode=Mode(row["mode"]),
        state=PaymentState(row["payment_state"]),
        currency=row["payment_currency"],
        capture_method=CaptureMethod(row["capture_method"]),
        requested_minor=row["requested_minor"],
        connector=row["payment_connector"],
        connector_account_id=row["payment_connector_account_id"],
        version=row["payment_version"],
        authorized_minor=row["authorized_minor"],
        capture_pending_minor=row["capture_pending_minor"],
        captured_minor=row["captured_minor"],
        refund_pending_minor=row["refund_pending_minor"],
        refunded_minor=row["refunded_minor"],
        voided_minor=row["voided_minor"],
        increment_pending_minor=row["increment_pending_minor"],
        authorized_reported_minor=row["authorized_reported_minor"],
        captured_reported_minor=row["captured_reported_minor"],
        refunded_reported_minor=row["refunded_reported_minor"],
        capture_closed=row["capture_closed"],
        cancel_requested=row["cancel_requested"],
        connector_transaction_id=row["payment_connector_transaction_id"],
        auth_code=row["auth_code"],
        network_transaction_id=row["network_transaction_id"],
        authorization_expires_at=row["authorization_expires_at"],
        merchant_order_id=row["merchant_order_id"],
        allow_partial_approval=row["allow_partial_approval"],
        details=row["details"],
        created_at=row["payment_created_at"],
        updated_at=row["payment_updated_at"],
    )


def doubt_of(row: asyncpg.Record) -> DoubtEntry:
    """The doubt in a row of list_doubts."""
    operation = operation_of(row)
    silent = operation.state is OperationState.PROCESSING
    return DoubtEntry(
        operation=operation,
        mode=Mode(row["mode"]),
        payment_state=PaymentState(row["payment_state"]),
        since=row["since"],
        tries=row["tries"],
        next_check_at=row["check_at"],
        leased_until=row["lease_until"],
        cause=DoubtCause.SENDER_SILENT if silent else DoubtCause(row["cause"]),
        needs_person=row["needs_person"],
    )


def resolution_of(row: asyncpg.Record) -> Resolution:
    """The audit record in a row of find_resolution."""
    return Resolution(
        attempt_number=row["attempt_number"],
        outcome=DoubtOutcome(row["outcome"]),
        connector_transaction_id=row["connector_transaction_id"],
        amount_reported_minor=row["amount_reported_minor"],
        reason=row["reason"],
        resolved_by=row["resolved_by"],
        request_id=row["request_id"],
        resolved_at=row["resolved_at"],
        state_before=OperationState(row["state_before"]),
        state_after=OperationState(row["state_after"]),
        payment_state_before=PaymentState(row["payment_state_before"]),
        payment_state_after=PaymentState(row["payment_state_after"]),
        payment_version=row["payment_version"],
    )
