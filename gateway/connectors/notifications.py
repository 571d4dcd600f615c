"""The port of what PSPs tell of their own accord: a connector verifies and reads it, purely."""

import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol, runtime_checkable

import orjson

from gateway.application.notifications import (
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
)
from gateway.connectors.kinds import AccountRefused

__all__ = [
    "OUR_REFERENCE",
    "WEBHOOK_SECRETS",
    "BadSignature",
    "Dispute",
    "DisputeStage",
    "DisputeStatus",
    "Notification",
    "NotificationKind",
    "NotificationSource",
    "ReferenceTeller",
    "UnusableNotification",
    "signed_by_any",
    "timed_event",
    "webhook_secrets",
]

OUR_REFERENCE: Final = re.compile(r"op_[0-9a-f]{32}-[0-9]{1,9}")
"""What an attempt of ours is called at a PSP; anything else was done elsewhere."""
WEBHOOK_SECRETS: Final = "webhook_secrets"
"""The credential with the secrets that notifications are signed with, separated by spaces: while
they are rotated there are two."""
SECRETS_MAX: Final = 4
SECRET_LENGTH_MIN: Final = 16
SECRET_LENGTH_MAX: Final = 256
SIGNATURES_MAX: Final = 8
"""Signatures of one request that are compared: a PSP signs with each of an endpoint's secrets, two
while one is rolled."""

_TIME: Final = re.compile("[0-9]{1,12}")


class BadSignature(Exception):
    """The PSP did not send this, or not now; the text says why and holds nothing of it."""


class UnusableNotification(Exception):
    """It is genuine and cannot be read; the text says why and holds nothing of it."""


class NotificationSource(Protocol):
    """How one PSP's notifications are verified and read: pure, for every account at it."""

    @property
    def connector(self) -> str:
        """The connector's name, as `stripe`."""

    @property
    def acknowledgement(self) -> bytes:
        """The body that the PSP expects with status 200."""

    def secrets(self, credentials: Mapping[str, str]) -> Sequence[str]:
        """What an account's notifications may be signed with; empty where it takes none."""

    def verify_and_parse(
        self, headers: Mapping[str, str], body: bytes, secrets: Sequence[str], now: datetime
    ) -> list[Notification]:
        """The events of one request. The names in `headers` are in lower case.

        Nothing is read before its signature holds, but for what the signature needs. All secrets
        are tried, in constant time (`signed_by_any`). An event of a type that the connector does
        not know is one of kind UNKNOWN, no error. Raises BadSignature and UnusableNotification.
        """


@runtime_checkable
class ReferenceTeller(Protocol):
    """A connector that can ask its PSP what a notification leaves out."""

    async def reference_of(self, connector_transaction_id: str) -> str | None:
        """Our reference of an authorization by the PSP's id; None for one that is not ours.

        Raises LookupUnavailable where the PSP does not answer now.
        """


def webhook_secrets(credentials: Mapping[str, str]) -> tuple[str, ...]:
    """The secrets in an account's credentials; empty without any. Raises AccountRefused."""
    secrets = tuple(credentials.get(WEBHOOK_SECRETS, "").split())
    if len(secrets) > SECRETS_MAX:
        raise AccountRefused(f"`{WEBHOOK_SECRETS}` are at most {SECRETS_MAX}")
    if not all(SECRET_LENGTH_MIN <= len(each) <= SECRET_LENGTH_MAX for each in secrets):
        raise AccountRefused(
            f"each of `{WEBHOOK_SECRETS}` has {SECRET_LENGTH_MIN} to {SECRET_LENGTH_MAX} characters"
        )
    return secrets


def signed_by_any(
    message: bytes, signatures: Iterable[bytes], keys: Iterable[bytes], digest: str = "sha256"
) -> bool:
    """Whether one of the signatures is the message's HMAC under one of the keys.

    All pairs are compared, each in constant time. The caller bounds how many there are.
    """
    told = list(signatures)
    held = False
    for key in keys:
        expected = hmac.digest(key, message, digest)
        for signature in told:
            held |= hmac.compare_digest(expected, signature)
    return held


def timed_event(
    header: str, body: bytes, secrets: Iterable[str], now: datetime, tolerance_s: float
) -> dict[str, Any]:
    """The JSON object in a body that is signed as `t=<seconds since 1970>,v1=<hex>[,v1=<hex>…]`:
    HMAC-SHA256 of the time, a point and the body, as Stripe signs.

    Raises BadSignature and UnusableNotification.
    """
    _check_timed_signature(header, body, secrets, now, tolerance_s)
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UnusableNotification("it is no JSON") from None
    if not isinstance(event, dict):
        raise UnusableNotification("it is no event")
    return event


def _check_timed_signature(
    header: str, body: bytes, secrets: Iterable[str], now: datetime, tolerance_s: float
) -> None:
    parts = [part.strip().partition("=") for part in header.split(",")]
    times = [value for name, _, value in parts if name == "t"]
    if len(times) != 1 or _TIME.fullmatch(times[0]) is None:
        raise BadSignature("it has no signature that can be read")
    signatures: list[bytes] = []
    for name, _, value in parts:
        if name == "v1" and len(signatures) < SIGNATURES_MAX:
            try:
                signatures.append(bytes.fromhex(value))
            except ValueError:
                raise BadSignature("it has no signature that can be read") from None
    message = times[0].encode("ascii") + b"." + body
    if not signed_by_any(message, signatures, (each.encode("utf-8") for each in secrets)):
        raise BadSignature("its signature does not hold")
    if abs(now.timestamp() - int(times[0])) > tolerance_s:
        raise BadSignature("its signature is of another time")
