"""Events as Stripe's webhook endpoints send them, written from its public documentation."""

from __future__ import annotations

import hmac
from typing import Any

import orjson

AT_S = 1_772_366_400
"""2026-03-01T12:00:00Z."""


def event_of(
    type_: str, told: dict[str, Any], *, event_id: str = "evt_1", at_s: int = AT_S
) -> bytes:
    """An event's body."""
    event = {
        "id": event_id,
        "object": "event",
        "api_version": "2025-10-29.clover",
        "created": at_s,
        "livemode": False,
        "type": type_,
        "data": {"object": told},
    }
    return orjson.dumps(event)


def refund_of(**more: Any) -> dict[str, Any]:
    """A refund made in the dashboard."""
    return {
        "id": "re_1",
        "object": "refund",
        "amount": 250,
        "currency": "eur",
        "status": "succeeded",
        "payment_intent": "pi_1",
        "charge": "ch_1",
        "metadata": {},
        **more,
    }


def sign(body: bytes, secret: str, at_s: int) -> str:
    """The header Stripe-Signature of a body."""
    message = str(at_s).encode("ascii") + b"." + body
    return f"t={at_s},v1={hmac.digest(secret.encode('utf-8'), message, 'sha256').hex()}"
