"""What makes two calls with one idempotency key the same call: a digest over the payload's meaning.

The digest covers the method, the mode, the merchant that the call resolves to and the known fields
in a canonical encoding: proto3 deterministic serialisation, unknown fields dropped, and each enum
value that the contract documents as "taken as" another written as that other. The idempotency key
and a batch's `item_ref` are left out, so that unary, batch and stream give the same fingerprint.
"""

from hashlib import sha256
from typing import Final

from google.protobuf.message import Message
from payments.v1.payment_method_pb2 import (
    CHANNEL_ECOMMERCE,
    INITIATOR_CUSTOMER,
)
from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

from gateway.domain.model import Mode, OperationKind

FINGERPRINT_VERSION: Final = b"\x01"
"""Stands first in every fingerprint. A change of this module's encoding needs another version, and
the old one must still be computed for keys that were stored with it."""


def canonical(request: Message) -> bytes:
    """The canonical encoding of a money request. Changes the request: it is normalised and loses
    its key, its merchant and its unknown fields.
    """
    request.ClearField("idempotency_key")
    request.ClearField("merchant_id")
    if isinstance(request, AuthorizePaymentRequest):
        if not request.channel:
            request.channel = CHANNEL_ECOMMERCE
        if not request.initiator:
            request.initiator = INITIATOR_CUSTOMER
    request.DiscardUnknownFields()
    return request.SerializeToString(deterministic=True)


def fingerprint(kind: OperationKind, mode: Mode, merchant_id: str, encoding: bytes) -> bytes:
    """The fingerprint of a call, 33 bytes. `encoding` is from `canonical`.

    A verification counts as AUTHORIZE: the method is the same.
    """
    head = b"%d %d %s " % (kind, mode, merchant_id.encode())
    return FINGERPRINT_VERSION + sha256(head + encoding).digest()
