"""Opaque prefixed ids with a UUIDv7 (RFC 9562 §5.7) inside, so that they sort by creation time.

An id can never look like a card number: its 32 hex characters are one token, and a token with a
letter in it, or with more than 19 digits, is none (see gateway.domain.pan).
"""

import re
from collections.abc import Callable
from typing import Final

from uuid_utils import uuid7

_PREFIXES: Final = {
    "payment": "pay_",
    "operation": "op_",
    "merchant": "mer_",
    "organisation": "org_",
    "key": "key_",
    "request": "req_",
    "event": "evt_",
    "connector_account": "acc_",
    "suspension": "sus_",
}


def new_payment_id() -> str:
    """A new id of a payment: `pay_` and 32 hex characters."""
    return "pay_" + uuid7().hex


def new_operation_id() -> str:
    """A new id of an operation: `op_` and 32 hex characters."""
    return "op_" + uuid7().hex


def new_merchant_id() -> str:
    """A new id of a merchant: `mer_` and 32 hex characters."""
    return "mer_" + uuid7().hex


def new_organisation_id() -> str:
    """A new id of an organisation: `org_` and 32 hex characters."""
    return "org_" + uuid7().hex


def new_key_id() -> str:
    """A new id of an API key: `key_` and 32 hex characters. It names the key, it is no secret."""
    return "key_" + uuid7().hex


def new_connector_account_id() -> str:
    """A new id of a merchant's account at a PSP: `acc_` and 32 hex characters."""
    return "acc_" + uuid7().hex


def new_suspension_id() -> str:
    """A new id of a suspension of accounts: `sus_` and 32 hex characters."""
    return "sus_" + uuid7().hex


def new_request_id() -> str:
    """A new id of a request: `req_` and 32 hex characters."""
    return "req_" + uuid7().hex


def new_event_id() -> str:
    """A new id of an event: `evt_` and 32 hex characters."""
    return "evt_" + uuid7().hex


_MADE_AT = re.compile("[a-z]{2,8}_([0-9a-f]{12})7[0-9a-f]{19}(?![0-9a-f])")


def _syntax(kind: str) -> Callable[[str], object]:
    return re.compile(_PREFIXES[kind] + "[0-9a-f]{32}").fullmatch


_payment = _syntax("payment")
_operation = _syntax("operation")
_merchant = _syntax("merchant")
_account = _syntax("connector_account")
_organisation = _syntax("organisation")
_key = _syntax("key")
_request = _syntax("request")


def is_payment_id(text: str) -> bool:
    """Whether `text` has the form of a payment's id; says nothing on its existence."""
    return _payment(text) is not None


def is_operation_id(text: str) -> bool:
    """Whether `text` has the form of an operation's id."""
    return _operation(text) is not None


def is_merchant_id(text: str) -> bool:
    """Whether `text` has the form of a merchant's id."""
    return _merchant(text) is not None


def is_account_id(text: str) -> bool:
    """Whether `text` has the form of an id of a merchant's account at a PSP."""
    return _account(text) is not None


def is_organisation_id(text: str) -> bool:
    """Whether `text` has the form of an organisation's id."""
    return _organisation(text) is not None


def is_key_id(text: str) -> bool:
    """Whether `text` has the form of an API key's id."""
    return _key(text) is not None


def is_request_id(text: str) -> bool:
    """Whether `text` has the form of a request's id."""
    return _request(text) is not None


def created_s(text: str) -> float | None:
    """When the id at the beginning of `text` was made, in seconds since 1970 by the clock of its
    maker; None where there is none (RFC 9562 §5.7: 48 bits of milliseconds).
    """
    match = _MADE_AT.match(text)
    return None if match is None else int(match[1], 16) / 1000
