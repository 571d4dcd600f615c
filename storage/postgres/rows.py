"""Between the domain's values and the columns of the tables."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from datetime import datetime
from typing import Any

import asyncpg

from gateway.application.ports import Change, Intent
from gateway.domain.model import (
    AdviceAction,
    Attempt,
    AvsResult,
    CaptureMethod,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    Discrepancy,
    Mode,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    PaymentState,
    ResponseCode,
    Verdict,
)

Columns = dict[str, list[Any]]
"""The arrays of a statement, by the names of its parameters."""

_OUTCOME_DEFAULTS = tuple((field.name, field.default) for field in fields(Outcome))
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
_NEW_PAYMENT = tuple(
    (field.name, field.default)
    for field in fields(Payment)
    if field.default is not MISSING and field.name not in _WRITTEN_WITH_NEW_PAYMENT
)


def clean(text: str) -> str:
    """A PSP's text as PostgreSQL can hold it: without NUL and half surrogate pairs.

    An outcome is written whatever it says, so what cannot be stored is replaced, not refused.
    """
    if text.isascii():
        return text.replace("\x00", "\ufffd") if "\x00" in text else text
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


# --- documents ------------------------------------------------------------------------------------


def outcome_json(outcome: Outcome | None) -> str | None:
    """By field names, defaults left out."""
    return None if outcome is None else json.dumps(_outcome_document(outcome))


def _outcome_document(outcome: Outcome) -> dict[str, str | int]:
    document: dict[str, str | int] = {}
    for name, default in _OUTCOME_DEFAULTS:
        value = getattr(outcome, name)
        if value != default:
            document[name] = clean(value) if isinstance(value, str) else int(value)
    return document


def outcome_of(text: str | None) -> Outcome | None:
    """The outcome of a column."""
    return None if text is None else _outcome_of_document(json.loads(text))


def _outcome_of_document(document: dict[str, Any]) -> Outcome:
    for name, enum in _OUTCOME_ENUMS.items():
        if name in document:
            document[name] = enum(document[name])
    return Outcome(**document)


def answer_json(answer: ConnectorAnswer) -> str:
    """A connector's answer by field names, defaults left out."""
    document: dict[str, Any] = {}
    for field in fields(ConnectorAnswer):
        value = getattr(answer, field.name)
        if value == field.default:
            continue
        if isinstance(value, Outcome):
            value = _outcome_document(value)
        elif isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, str):
            value = clean(value)
        document[field.name] = value
    return json.dumps(document)


def answer_of(text: str | None) -> ConnectorAnswer | None:
    """The answer of a column."""
    if text is None:
        return None
    document = json.loads(text)
    document["delivery"] = Delivery(document["delivery"])
    if "verdict" in document:
        document["verdict"] = Verdict(document["verdict"])
    if "outcome" in document:
        document["outcome"] = _outcome_of_document(document["outcome"])
    if "authorization_expires_at" in document:
        document["authorization_expires_at"] = datetime.fromisoformat(
            document["authorization_expires_at"]
        )
    return ConnectorAnswer(**document)


# --- to columns -----------------------------------------------------------------------------------


def _changing_columns(operations: Sequence[Operation], prefix: str) -> Columns:
    """What of an operation can change, but for its epoch."""
    attempts = [operation.attempt for operation in operations]
    return {
        f"{prefix}state": [o.state for o in operations],
        f"{prefix}amount_minor": [o.amount_minor for o in operations],
        f"{prefix}final": [o.final for o in operations],
        f"{prefix}request_id": [o.request_id for o in operations],
        f"{prefix}note": [o.note for o in operations],
        f"{prefix}reason": [o.reason for o in operations],
        f"{prefix}next_action_url": [clean(o.next_action_url) for o in operations],
        f"{prefix}allocations": [
            json.dumps(o.allocations) if o.allocations else None for o in operations
        ],
        f"{prefix}attempt_number": [a.number for a in attempts],
        f"{prefix}connector": [a.connector for a in attempts],
        f"{prefix}connector_account_id": [a.connector_account_id for a in attempts],
        f"{prefix}delivery": [a.delivery for a in attempts],
        f"{prefix}connector_transaction_id": [clean(a.connector_transaction_id) for a in attempts],
        f"{prefix}outcome": [outcome_json(a.outcome) for a in attempts],
        f"{prefix}processing_ms": [a.processing_ms for a in attempts],
        f"{prefix}response": [o.response for o in operations],
        f"{prefix}updated_at": [o.updated_at for o in operations],
    }


def _new_columns(operations: Sequence[Operation], prefix: str = "") -> Columns:
    """All of an operation but its times."""
    return _changing_columns(operations, prefix) | {
        f"{prefix}merchant_id": [o.merchant_id for o in operations],
        f"{prefix}operation_id": [o.operation_id for o in operations],
        f"{prefix}payment_id": [o.payment_id for o in operations],
        f"{prefix}kind": [o.kind for o in operations],
        f"{prefix}origin": [o.origin for o in operations],
        f"{prefix}currency": [o.currency for o in operations],
        f"{prefix}epoch": [o.epoch for o in operations],
        f"{prefix}parent_operation_id": [o.parent_operation_id for o in operations],
        f"{prefix}idempotency_key": [o.idempotency_key for o in operations],
        f"{prefix}fingerprint": [o.fingerprint for o in operations],
        f"{prefix}merchant_transaction_id": [o.merchant_transaction_id for o in operations],
    }


def _payment_columns(payments: Sequence[Payment]) -> Columns:
    """What of a payment can change."""
    return {
        "payment_version": [p.version for p in payments],
        "payment_state": [p.state for p in payments],
        "requested_minor": [p.requested_minor for p in payments],
        "authorized_minor": [p.authorized_minor for p in payments],
        "capture_pending_minor": [p.capture_pending_minor for p in payments],
        "captured_minor": [p.captured_minor for p in payments],
        "refund_pending_minor": [p.refund_pending_minor for p in payments],
        "refunded_minor": [p.refunded_minor for p in payments],
        "voided_minor": [p.voided_minor for p in payments],
        "increment_pending_minor": [p.increment_pending_minor for p in payments],
        "authorized_reported_minor": [p.authorized_reported_minor for p in payments],
        "captured_reported_minor": [p.captured_reported_minor for p in payments],
        "refunded_reported_minor": [p.refunded_reported_minor for p in payments],
        "capture_closed": [p.capture_closed for p in payments],
        "cancel_requested": [p.cancel_requested for p in payments],
        "payment_connector": [p.connector for p in payments],
        "payment_connector_account_id": [p.connector_account_id for p in payments],
        "payment_connector_transaction_id": [clean(p.connector_transaction_id) for p in payments],
        "auth_code": [clean(p.auth_code) for p in payments],
        "network_transaction_id": [clean(p.network_transaction_id) for p in payments],
        "authorization_expires_at": [p.authorization_expires_at for p in payments],
    }


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
    for name, default in _NEW_PAYMENT:
        if getattr(payment, name) != default:
            raise ValueError(f"{name} of a new payment is set")


def authorize_columns(intents: Sequence[Intent]) -> Columns:
    """For authorize_intent."""
    payments = [intent.payment for intent in intents]
    return _new_columns([intent.operation for intent in intents]) | {
        "recover_after_s": [intent.recover_after_s for intent in intents],
        "mode": [p.mode for p in payments],
        "payment_state": [p.state for p in payments],
        "capture_method": [p.capture_method for p in payments],
        "requested_minor": [p.requested_minor for p in payments],
        "version": [p.version for p in payments],
        "merchant_order_id": [p.merchant_order_id for p in payments],
        "allow_partial_approval": [p.allow_partial_approval for p in payments],
        "details": [p.details for p in payments],
    }


def followup_columns(intents: Sequence[Intent]) -> Columns:
    """For followup_intent."""
    return (
        _payment_columns([intent.payment for intent in intents])
        | _new_columns([intent.operation for intent in intents])
        | {
            "recover_after_s": [intent.recover_after_s for intent in intents],
            "expected_version": [intent.expected_version for intent in intents],
        }
    )


def change_columns(changes: Sequence[Change]) -> Columns:
    """For change, and for written_changes."""
    operations = [change.operation for change in changes]
    recover_after_s = [
        change.recover_after_s if change.operation.state is OperationState.PROCESSING else None
        for change in changes
    ]
    payments = [change.payment for change in changes]
    return (
        _payment_columns(payments)
        | _changing_columns(operations, "")
        | {
            "merchant_id": [o.merchant_id for o in operations],
            "operation_id": [o.operation_id for o in operations],
            "payment_id": [o.payment_id for o in operations],
            "expected_epoch": [change.expected_epoch for change in changes],
            "expected_state": [change.expected_state for change in changes],
            "expected_version": [change.expected_version for change in changes],
            "epoch": [o.epoch for o in operations],
            "recover_after_s": recover_after_s,
            "check_after_s": [
                wait_s if change.doubt is None else change.doubt.check_after_s
                # An operation that is PROCESSING again is too old for the scan for dead senders.
                for change, wait_s in zip(changes, recover_after_s, strict=True)
            ],
            "event_id": [change.event_id for change in changes],
            "event_type": [change.event_type for change in changes],
            "event": [change.event for change in changes],
            "payment_updated_at": [p.updated_at for p in payments],
        }
    )


def companion_columns(changes: Sequence[Change]) -> Columns:
    """For change_with_more: the operations that begin with the changes."""
    companions = [(change, each) for change in changes for each in change.companions]
    return _new_columns([each for _, each in companions], "companion_") | {
        "companion_changed_by": [change.operation.operation_id for change, _ in companions],
    }


def superseded_columns(operations: Iterable[Operation]) -> Columns:
    """For change_with_more: the attempts before the present ones."""
    earlier = [
        (operation, attempt)
        for operation in operations
        for attempt in operation.superseded_attempts
        if attempt.number < operation.attempt.number
    ]
    return {
        "earlier_merchant_id": [o.merchant_id for o, _ in earlier],
        "earlier_operation_id": [o.operation_id for o, _ in earlier],
        "earlier_number": [a.number for _, a in earlier],
        "earlier_connector": [a.connector for _, a in earlier],
        "earlier_connector_account_id": [a.connector_account_id for _, a in earlier],
        "earlier_delivery": [a.delivery for _, a in earlier],
        "earlier_connector_transaction_id": [clean(a.connector_transaction_id) for _, a in earlier],
        "earlier_outcome": [outcome_json(a.outcome) for _, a in earlier],
        "earlier_processing_ms": [a.processing_ms for _, a in earlier],
    }


def discrepancy_columns(changes: Sequence[Change]) -> Columns:
    """For change_with_more."""
    found: list[tuple[Change, Discrepancy]] = [
        (change, each) for change in changes for each in change.discrepancies
    ]
    return {
        "discrepancy_changed_by": [change.operation.operation_id for change, _ in found],
        "discrepancy_merchant_id": [each.merchant_id for _, each in found],
        "discrepancy_payment_id": [each.payment_id for _, each in found],
        "discrepancy_operation_id": [each.operation_id for _, each in found],
        "discrepancy_kind": [each.kind for _, each in found],
        "discrepancy_expected": [clean(each.expected) for _, each in found],
        "discrepancy_reported": [clean(each.reported) for _, each in found],
    }


# --- from columns ---------------------------------------------------------------------------------


def operation_of(row: asyncpg.Record) -> Operation:
    """The operation in a row with `operation_columns` of reads.sql."""
    earlier = row["superseded_attempts"]
    allocations = row["allocations"]
    return Operation(
        merchant_id=row["merchant_id"],
        operation_id=row["operation_id"],
        payment_id=row["payment_id"],
        kind=OperationKind(row["kind"]),
        origin=OperationOrigin(row["origin"]),
        state=OperationState(row["state"]),
        amount_minor=row["amount_minor"],
        currency=row["currency"],
        attempt=Attempt(
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
        next_action_url=row["next_action_url"],
        allocations=()
        if allocations is None
        else tuple((operation_id, part) for operation_id, part in json.loads(allocations)),
        superseded_attempts=()
        if earlier is None
        else tuple(_attempt_of(document) for document in json.loads(earlier)),
        response=row["response"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _attempt_of(document: dict[str, Any]) -> Attempt:
    outcome = document["outcome"]
    return Attempt(
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
    return Payment(
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
