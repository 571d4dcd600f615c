"""What makes two calls with one idempotency key the same call: a digest over the payload's meaning.

The digest covers the method, the mode, the merchant that the call resolves to and the known fields
in a canonical encoding: proto3 deterministic serialisation, unknown fields dropped, and each enum
value that the contract documents as "taken as" another written as that other. The idempotency key
and a batch's `item_ref` are left out, so that unary, batch and stream give the same fingerprint.
"""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from hmac import digest
from typing import Final, TypeAlias

from payments.v1.payment_method_pb2 import (
    CHANNEL_ECOMMERCE,
    INITIATOR_CUSTOMER,
    NetworkToken,
)
from payments.v1.payment_service_pb2 import (
    AuthorizePaymentRequest,
    CapturePaymentRequest,
    IncrementAuthorizationRequest,
    RefundPaymentRequest,
    VoidPaymentRequest,
)

from gateway.domain.model import Mode, OperationKind

MoneyRequest: TypeAlias = (
    AuthorizePaymentRequest
    | CapturePaymentRequest
    | IncrementAuthorizationRequest
    | RefundPaymentRequest
    | VoidPaymentRequest
)

FINGERPRINT_VERSION: Final = b"\x01"
"""Stands first in every fingerprint. A change of this module's encoding needs another version, and
the old one must still be computed for keys that were stored with it."""
HEADS_CACHED_MAX: Final = 1024
"""How many merchants' fingerprints have their beginnings kept encoded."""


def canonical(request: MoneyRequest) -> bytes:
    """The canonical encoding of a money request. Changes the request: it is normalised and loses
    its key, its merchant and its unknown fields.
    """
    request.idempotency_key = request.merchant_id = ""
    if isinstance(request, AuthorizePaymentRequest):
        if not request.channel:
            request.channel = CHANNEL_ECOMMERCE
        if not request.initiator:
            request.initiator = INITIATOR_CUSTOMER
    request.DiscardUnknownFields()
    return request.SerializeToString(deterministic=True)


def take_secrets(token: NetworkToken) -> Mapping[str, str]:
    """What of a network token may not be kept; the message loses it."""
    secrets = {"number": token.number, "cryptogram": token.cryptogram}
    token.ClearField("number")
    token.ClearField("cryptogram")
    return secrets


def fingerprint(
    kind: OperationKind,
    mode: Mode,
    merchant_id: str,
    encoding: bytes,
    secrets: Mapping[str, str] | None = None,
) -> bytes:
    """The fingerprint of a call, 33 bytes. `encoding` is from `canonical`, `secrets` from
    `take_secrets`.

    A verification counts as AUTHORIZE: the method is the same. A network token's number could be
    found out from a plain digest, by trying all numbers. So it goes in under a key: the cryptogram
    that comes with every number, which is as good as random and is kept nowhere.
    """
    if secrets:
        key, number = secrets["cryptogram"].encode(), secrets["number"].encode()
        encoding += digest(key, number, "sha256")
    return FINGERPRINT_VERSION + sha256(_head(kind, mode, merchant_id) + encoding).digest()


@lru_cache(maxsize=HEADS_CACHED_MAX)
def _head(kind: OperationKind, mode: Mode, merchant_id: str) -> bytes:
    return b"%d %d %s " % (kind, mode, merchant_id.encode())
