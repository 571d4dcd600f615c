"""What a connector is asked to do: an operation's attempt, from the operation and its payment."""

from gateway.application.ports import ConnectorRequest, Encoder, make_connector_request
from gateway.domain.model import Aggregate, CaptureMethod, Operation, OperationKind, Payment

_BEGINNINGS = (OperationKind.AUTHORIZE, OperationKind.VERIFY)
_AUTOMATIC = CaptureMethod.AUTOMATIC


def connector_request(
    encoder: Encoder, operation: Operation, payment: Payment, aggregate: Aggregate | None
) -> ConnectorRequest:
    """An operation's present attempt, as its connector sends it."""
    request = make_connector_request(
        kind=operation.kind,
        reference=operation.reference,
        amount_minor=operation.amount_minor,
        currency=operation.currency,
        connector_account_id=operation.attempt.connector_account_id,
        payment_id=operation.payment_id,
        final=operation.final,
    )
    if operation.kind in _BEGINNINGS:
        request.payment_method_token, request.fields = encoder.connector_fields(payment)
        request.capture = payment.capture_method is _AUTOMATIC
        return request
    request.target_transaction_id = payment.connector_transaction_id
    request.payment_transaction_id = payment.connector_transaction_id
    if operation.kind is OperationKind.INCREMENT:
        reported = payment.authorized_reported_minor
        request.authorized_minor = payment.authorized_minor if reported is None else reported
    elif operation.kind is OperationKind.VOID:
        reported = payment.captured_reported_minor
        request.captured_minor = payment.captured_minor if reported is None else reported
    elif operation.kind is OperationKind.REVERSAL:
        request.target_reference = operation.note
        request.target_transaction_id = operation.attempt.connector_transaction_id
    elif operation.kind is OperationKind.REFUND and len(operation.allocations) == 1 and aggregate:
        capture_id = operation.allocations[0][0]
        for other in aggregate.operations:
            if other.operation_id == capture_id and other.attempt.connector_transaction_id:
                request.target_transaction_id = other.attempt.connector_transaction_id
    return request
