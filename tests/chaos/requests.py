"""What the clients of campaigns ask for."""

from __future__ import annotations

from typing import Any, Final

from payments.v1 import payment_service_pb2 as rpc

from gateway.domain.model import OperationKind as K
from tests.harness import eur

AMOUNTS_MINOR: Final = range(1000, 8001, 50)
"""Amounts that mean nothing to the simulator."""
INCREMENT_MINOR: Final = 250
FINAL_SHARE: Final = 0.3
"""Captures that are their authorizations' last."""

METHODS: Final = {
    K.AUTHORIZE: "AuthorizePayment",
    K.CAPTURE: "CapturePayment",
    K.REFUND: "RefundPayment",
    K.INCREMENT: "IncrementAuthorization",
    K.VOID: "VoidPayment",
}


def follow_up(
    kind: K, key: str, payment_id: str, amount_minor: int | None, *, final: bool = False
) -> Any:
    """The request for an operation on a payment; without an amount, for whatever is left."""
    amount = eur(amount_minor)
    match kind:
        case K.CAPTURE:
            return rpc.CapturePaymentRequest(
                idempotency_key=key, payment_id=payment_id, amount=amount, final=final
            )
        case K.REFUND:
            return rpc.RefundPaymentRequest(
                idempotency_key=key, payment_id=payment_id, amount=amount
            )
        case K.INCREMENT:
            return rpc.IncrementAuthorizationRequest(
                idempotency_key=key, payment_id=payment_id, additional_amount=amount
            )
        case _:
            return rpc.VoidPaymentRequest(idempotency_key=key, payment_id=payment_id)
