"""Braintree's webhooks as it signs and sends them."""

from __future__ import annotations

import hmac
from base64 import encodebytes
from hashlib import sha1
from urllib.parse import urlencode

from tests.braintree_double import PRIVATE_KEY, PUBLIC_KEY


def signed(
    xml: str | bytes, public: str = PUBLIC_KEY, private: str = PRIVATE_KEY
) -> tuple[str, str]:
    """`bt_signature` and `bt_payload`."""
    payload = encodebytes(xml.encode() if isinstance(xml, str) else xml)
    key = sha1(private.encode()).digest()
    return f"{public}|{hmac.new(key, payload, sha1).hexdigest()}", payload.decode()


def form(signature: str, payload: str) -> bytes:
    """The body of a request."""
    return urlencode({"bt_signature": signature, "bt_payload": payload}).encode()


def about(kind: str, subject: str) -> str:
    """A notification."""
    return (
        f'<notification><timestamp type="datetime">2026-03-04T05:06:07Z</timestamp>'
        f"<kind>{kind}</kind><subject>{subject}</subject></notification>"
    )


def transaction(**fields: str) -> str:
    """A transaction of 10.00 EUR that is settled, but for what is said of it."""
    values = {
        "id": "c9g9z3ab",
        "global-id": "dHJhbnNhY3Rpb25fYzlnOXozYWI",
        "status": "settled",
        "type": "sale",
        "currency-iso-code": "EUR",
        "amount": "10.00",
    } | {name.replace("_", "-"): value for name, value in fields.items()}
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    return f"<transaction>{inner}</transaction>"
