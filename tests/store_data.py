"""Payments for the tests of the store, and a template database for them."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gateway.application.ports import Change, Doubt, Intent
from gateway.domain import ids
from gateway.domain.model import (
    AdviceAction,
    Attempt,
    AvsResult,
    CaptureMethod,
    CvvResult,
    Delivery,
    Mode,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    PaymentState,
    ResponseCode,
)
from storage.postgres.migrate import migrate

if TYPE_CHECKING:
    from storage.postgres import PostgresStore
    from tests.servers import PostgresForTests

MERCHANT = ids.new_merchant_id()
NEVER_S = 3600.0
"""Longer than any test: what is due then does not happen."""

_numbers = itertools.count(1)


def new_database(postgres: PostgresForTests) -> str:
    """The DSN of a database with the schema and nothing in it."""
    return postgres.create_database(postgres.create_template("gateway_schema", migrate))


def authorize(
    merchant_id: str = MERCHANT,
    key: str | None = None,
    *,
    recover_after_s: float = NEVER_S,
    amount_minor: int = 10_000,
    **payment: Any,
) -> Intent:
    """The intent of a new payment; `payment` are further fields of it."""
    payment_id = ids.new_payment_id()
    operation = Operation(
        merchant_id=merchant_id,
        operation_id=ids.new_operation_id(),
        payment_id=payment_id,
        kind=OperationKind.AUTHORIZE,
        origin=OperationOrigin.CLIENT,
        state=OperationState.PROCESSING,
        amount_minor=amount_minor,
        currency="EUR",
        attempt=Attempt(1, "simulator", "acct_1"),
        idempotency_key=key or f"key-{next(_numbers)}",
        fingerprint=b"\x01" * 33,
        request_id="req_1",
        merchant_transaction_id="mtx-1",
    )
    return Intent(
        operation,
        Payment(
            merchant_id=merchant_id,
            payment_id=payment_id,
            mode=payment.pop("mode", Mode.TEST),
            state=PaymentState.PROCESSING,
            currency="EUR",
            capture_method=CaptureMethod.MANUAL_MULTIPLE,
            requested_minor=amount_minor,
            connector="simulator",
            connector_account_id="acct_1",
            **payment,
        ),
        recover_after_s,
    )


OUTCOME = Outcome(
    response_code=ResponseCode.APPROVED,
    connector_code="00",
    connector_message="ok \N{SNOWMAN}",
    network_code="00",
    network_code_scheme="visa",
    advice_action=AdviceAction.RETRY_AFTER,
    advice_retry_after_s=3600,
    advice_code="24",
    advice_scheme="mastercard",
    avs_result=AvsResult.FULL_MATCH,
    avs_code="Y",
    cvv_result=CvvResult.MATCH,
    cvv_code="M",
    auth_code="A1B2C3",
    network_transaction_id="ntx-1",
    retrieval_reference_number="rrn-1",
    system_trace_audit_number="000123",
    acquirer_reference_number="arn-1",
    amount_reported_minor=10_000,
)


def outcome(
    operation: Operation,
    payment: Payment,
    state: OperationState = OperationState.SUCCEEDED,
    *,
    check_after_s: float | None = None,
    changed_operation: dict[str, Any] | None = None,
    changed_payment: dict[str, Any] | None = None,
    **change: Any,
) -> Change:
    """The change that gives an operation its outcome, from what it is now."""
    now = datetime.now(UTC)
    after = operation.copy_with(state=state, response=b"response", updated_at=now)
    after = after.copy_with(
        attempt=Attempt(
            operation.attempt.number,
            operation.attempt.connector,
            operation.attempt.connector_account_id,
            Delivery.ANSWERED,
            "ch_1",
            OUTCOME,
            12.345,
        )
    )
    return Change(
        operation=after.copy_with(**(changed_operation or {})),
        payment=payment.copy_with(
            version=payment.version + 1,
            state=PaymentState.AUTHORIZED,
            authorized_minor=payment.requested_minor,
            updated_at=now,
            **(changed_payment or {}),
        ),
        expected_epoch=operation.epoch,
        expected_state=operation.state,
        expected_version=payment.version,
        event_id=ids.new_event_id(),
        event_type="payment.changed",
        event=b"event",
        doubt=None if check_after_s is None else Doubt(check_after_s),
        **change,
    )


def restarted(
    operation: Operation, payment: Payment, *, recover_after_s: float = NEVER_S
) -> Change:
    """The change by which a repeat begins the next attempt of what was not sent."""
    attempt = Attempt(operation.attempt.number + 1, "simulator", "a")
    return outcome(
        operation,
        payment,
        OperationState.PROCESSING,
        changed_operation={"epoch": operation.epoch + 1, "response": None, "attempt": attempt},
        recover_after_s=recover_after_s,
    )


def capture(payment: Payment, amount_minor: int = 1_000, key: str | None = None) -> Intent:
    """The intent of a capture, with its reservation."""
    operation = authorize(payment.merchant_id, key, amount_minor=amount_minor).operation
    return Intent(
        operation.copy_with(kind=OperationKind.CAPTURE, payment_id=payment.payment_id),
        payment.copy_with(
            version=payment.version + 1,
            capture_pending_minor=payment.capture_pending_minor + amount_minor,
        ),
        NEVER_S,
        expected_version=payment.version,
    )


async def authorized(store: PostgresStore, merchant_id: str = MERCHANT) -> Payment:
    """A payment that was authorized, as it is stored."""
    intent = authorize(merchant_id)
    await store.write_intent(intent)
    await store.write_change(outcome(intent.operation, intent.payment))
    return (await stored(store, intent.operation))[1]


async def stored(store: PostgresStore, operation: Operation) -> tuple[Operation, Payment]:
    """An operation and its payment as they are in the database."""
    found = await store.find_operation(operation.merchant_id, operation.operation_id)
    assert found is not None
    return found.operation, found.payment
