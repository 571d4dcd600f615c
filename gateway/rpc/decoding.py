"""Reads back what the contract's encoder wrote: stored answers and events, for the audit."""

from google.protobuf.message import DecodeError, Message
from payments.v1 import payment_pb2
from payments.v1.payment_service_pb2 import AuthorizePaymentResponse

from gateway.domain.invariants import Told
from gateway.domain.model import Mode


class ContractDecoder:
    """Implements `gateway.application.verification.Decoder`."""

    def answer(self, data: bytes) -> Told | None:
        """A stored answer: the money responses have the same fields, whatever the kind."""
        response = AuthorizePaymentResponse()
        if not _parsed(response, data) or not response.HasField("operation"):
            return None
        return _told(response.operation, response.payment)

    def event(self, data: bytes) -> Told | None:
        """An event of the outbox."""
        event = payment_pb2.PaymentEvent()
        if not _parsed(event, data) or not event.HasField("operation"):
            return None
        return _told(event.operation, event.payment)

    def mode_of_event(self, data: bytes, merchant_id: str) -> Mode | None:
        """The mode of an event's payment; None where that is not the merchant's.

        Also a wall between tenants: what the row says must be what the payload says.
        """
        event = payment_pb2.PaymentEvent()
        if not _parsed(event, data) or event.payment.merchant_id != merchant_id:
            return None
        return Mode(event.payment.mode) if event.payment.mode else None


def _parsed(message: Message, data: bytes) -> bool:
    try:
        message.ParseFromString(data)
    except DecodeError:
        return False
    return True


def _told(operation: payment_pb2.Operation, payment: payment_pb2.Payment) -> Told:
    return Told(
        merchant_id=operation.merchant_id,
        payment_id=operation.payment_id,
        operation_id=operation.operation_id,
        kind=operation.kind,
        state=operation.state,
        amount_minor=operation.amount.amount_minor,
        idempotency_key=operation.idempotency_key,
        payment_state=payment.state,
        payment_version=payment.version,
    )
