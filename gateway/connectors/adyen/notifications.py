"""Adyen's standard webhooks: verified by their HMAC, and read. Pure.

Sources: Adyen's "Verify HMAC signatures" and "Webhook types" (standard and dispute webhooks). The
signature covers the ids, the account, the reference, the amount, the event and its success, and
nothing else of an item: what is not signed decides on no payment, but for whether what somebody
took back in Adyen's Customer Area is told as a void or as a refund.
"""

import binascii
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import orjson

from gateway.application.notifications import (
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
)
from gateway.connectors import values
from gateway.connectors.adyen import answers, codes
from gateway.connectors.adyen.connector import NAME, REFUND_SUFFIX, REVERSAL_SUFFIX
from gateway.connectors.base import Unusable
from gateway.connectors.notifications import (
    OUR_REFERENCE,
    BadSignature,
    UnusableNotification,
    signed_by_any,
    webhook_secrets,
)
from gateway.connectors.values import part
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, Outcome, ResponseCode, Verdict

ITEMS_MAX: Final = 100
"""Of one request; Adyen sends one item in each."""
SIGNED: Final = (
    "pspReference",
    "originalReference",
    "merchantAccountCode",
    "merchantReference",
    "value",
    "currency",
    "eventCode",
    "success",
)
"""What is signed, joined by colons; `value` and `currency` are of `amount`."""

N = NotificationKind

_MODIFIED: Final = {
    "AUTHORISATION_ADJUSTMENT": N.INCREMENT,
    "CAPTURE": N.CAPTURE,
    "CAPTURE_FAILED": N.CAPTURE,
    "CANCELLATION": N.VOID,
    "REFUND": N.REFUND,
    "REFUND_FAILED": N.REFUND,
    "REFUNDED_REVERSED": N.REFUND,
}
"""What our own requests cause, under the reference that they had."""
_RETURNED: Final = frozenset({"CAPTURE_FAILED", "REFUND_FAILED", "REFUNDED_REVERSED"})
"""What had succeeded has not; `success` says only that this is so."""
_GONE: Final = frozenset({"CANCEL_OR_REFUND", "TECHNICAL_CANCEL", "EXPIRE"})
"""With `success`, nothing stands any more, or nothing is held."""
_DISPUTES: Final = {
    "REQUEST_FOR_INFORMATION": (DisputeStage.PRE_DISPUTE, DisputeStatus.OPENED),
    "NOTIFICATION_OF_CHARGEBACK": (DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED),
    "CHARGEBACK": (DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED),
    "CHARGEBACK_REVERSED": (DisputeStage.ACTIVE_DISPUTE, DisputeStatus.CHALLENGED),
    "DISPUTE_DEFENSE_PERIOD_ENDED": (DisputeStage.ACTIVE_DISPUTE, DisputeStatus.EXPIRED),
    "ISSUER_RESPONSE_TIMEFRAME_EXPIRED": (DisputeStage.ACTIVE_DISPUTE, DisputeStatus.WON),
    "SECOND_CHARGEBACK": (DisputeStage.PRE_ARBITRATION, DisputeStatus.LOST),
    "PREARBITRATION_OPEN": (DisputeStage.PRE_ARBITRATION, DisputeStatus.OPENED),
    "PREARBITRATION_WON": (DisputeStage.PRE_ARBITRATION, DisputeStatus.WON),
    "PREARBITRATION_LOST": (DisputeStage.PRE_ARBITRATION, DisputeStatus.LOST),
    "SCHEME_ARBITRATION_WON": (DisputeStage.PRE_ARBITRATION, DisputeStatus.WON),
    "SCHEME_ARBITRATION_LOST": (DisputeStage.PRE_ARBITRATION, DisputeStatus.LOST),
}
_DISPUTE_STATUSES: Final = {
    "Accepted": DisputeStatus.ACCEPTED,
    "Expired": DisputeStatus.EXPIRED,
    "Lost": DisputeStatus.LOST,
    "Won": DisputeStatus.WON,
}
"""`disputeStatus`, where it says more than the event."""


@dataclass(frozen=True, slots=True)
class AdyenNotifications:
    """Implements the NotificationSource port."""

    connector: str = field(default=NAME, init=False)
    acknowledgement: bytes = field(default=b"[accepted]", init=False)

    def secrets(self, credentials: Mapping[str, str]) -> Sequence[str]:
        """See the port: HMAC keys as Adyen shows them, in hexadecimal digits."""
        return webhook_secrets(credentials)

    def verify_and_parse(
        self,
        headers: Mapping[str, str],  # noqa: ARG002 - the signature is in the body
        body: bytes,
        secrets: Sequence[str],
        now: datetime,  # noqa: ARG002 - nothing in the signature tells its time
    ) -> list[Notification]:
        """See the port. Every item has to be signed."""
        try:
            told = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise BadSignature("not JSON") from None
        listed = told.get("notificationItems") if isinstance(told, dict) else None
        if not isinstance(listed, list) or not 0 < len(listed) <= ITEMS_MAX:
            raise BadSignature(f"not 1 to {ITEMS_MAX} items")
        keys = [bytes.fromhex(secret) for secret in secrets]
        items = [_item(each) for each in listed]
        for item in items:
            if not signed_by_any(signed_text(item).encode(), [_signature(item)], keys):
                raise BadSignature("the signature of an item is not one of the account's")
        mode = _MODES.get(str(told.get("live")).lower())
        return [_notification(item, mode) for item in items]


def signed_text(item: Mapping[str, Any]) -> str:
    """What the signature of an item is made of. Raises BadSignature where Adyen signs no such."""
    flat = {**item, **{name: part(item, "amount").get(name) for name in ("value", "currency")}}
    told = [flat.get(name) for name in SIGNED]
    if any(isinstance(each, (dict, list)) for each in told):
        raise BadSignature("a signed field is neither text nor number")
    return ":".join("" if each is None else str(each) for each in told)


_MODES: Final = {"true": Mode.LIVE, "false": Mode.TEST}


def _item(wrapped: object) -> Mapping[str, Any]:
    item = part(wrapped, "NotificationRequestItem") if isinstance(wrapped, dict) else {}
    if not item:
        raise BadSignature("an item is none")
    return item


def _signature(item: Mapping[str, Any]) -> bytes:
    told = part(item, "additionalData").get("hmacSignature")
    if not isinstance(told, str) or not told.isascii():
        raise BadSignature("an item is not signed")
    try:
        return b64decode(told, validate=True)
    except binascii.Error:
        raise BadSignature("a signature is not in base64") from None


# --- what is told ---------------------------------------------------------------------------------


def _notification(item: Mapping[str, Any], mode: Mode | None) -> Notification:
    """Raises UnusableNotification."""
    event_type = values.text(item.get("eventCode"))
    own_id = values.identifier(item.get("pspReference"))
    if not event_type or not own_id:
        raise UnusableNotification("an item without `eventCode` or `pspReference`")
    success = item.get("success") == "true"
    told: dict[str, Any] = {
        "connector": NAME,
        # "Duplicates have the same eventCode and pspReference"; a later success is another event.
        "event_id": f"{event_type}:{own_id}:{'true' if success else 'false'}",
        "event_type": event_type,
        "occurred_at": values.instant_of_text(item.get("eventDate")),
        "mode": mode,
        "payment_transaction_id": values.identifier(item.get("originalReference")),
    }
    try:
        return _read(item, told, own_id, success=success)
    except Unusable:
        # Kept and counted: Adyen sends nothing else before what is refused is taken.
        return Notification(**told)


def _read(
    item: Mapping[str, Any], told: dict[str, Any], own_id: str, *, success: bool
) -> Notification:
    """What an item says. Raises Unusable for an amount that ISO 4217 cannot express."""
    event_type: str = told["event_type"]
    reference = _reference(item)
    if event_type == "AUTHORISATION":
        own = {**told, "payment_transaction_id": own_id, "reference": reference}
        answer = _authorization(item, own_id, success=success)
        return Notification(kind=N.AUTHORIZATION, answer=answer, **own, **_amount(item))
    if event_type == "OFFER_CLOSED" and success:
        answer = ConnectorAnswer(Delivery.ANSWERED, Verdict.EXPIRED)
        return Notification(kind=N.AUTHORIZATION, reference=reference, answer=answer, **told)
    if reference.endswith(REFUND_SUFFIX) or (
        reference.endswith(REVERSAL_SUFFIX) and not (event_type in _GONE and success)
    ):
        return _reversed(item, told, reference, own_id, success=success)
    if event_type in _MODIFIED:
        return _modified(item, told, reference, own_id, success=success)
    if event_type in _GONE and success:
        return _gone(item, told, reference, own_id)
    if event_type in _DISPUTES:
        told |= {
            "kind": N.DISPUTE,
            "payment_reference": reference,
            "dispute": _dispute(item, event_type, own_id),
            **_amount(item),
        }
    return Notification(**told)


def _reference(item: Mapping[str, Any]) -> str:
    """Ours; empty for what somebody else called a payment of theirs, which may hold anything."""
    reference = values.identifier(item.get("merchantReference"))
    attempt = reference.removesuffix(REFUND_SUFFIX).removesuffix(REVERSAL_SUFFIX)
    return reference if OUR_REFERENCE.fullmatch(attempt) else ""


def _modified(
    item: Mapping[str, Any], told: dict[str, Any], reference: str, own_id: str, *, success: bool
) -> Notification:
    """The outcome of a request of ours, or of the like made in Adyen's Customer Area."""
    event_type = told["event_type"]
    # In the Customer Area it is the payment's reference.
    told = {**told, "payment_reference": reference}
    took_effect = success and event_type not in _RETURNED
    answer = _answer(item, own_id, Verdict.APPROVED if took_effect else Verdict.FAILED)
    kind = _MODIFIED[event_type]
    if kind is N.INCREMENT:
        # The amount that is told is the new total.
        return Notification(kind=kind, reference=reference, answer=answer, **told)
    amount = _amount(item)
    if took_effect and kind is not N.VOID and answer.outcome is not None:
        answer.outcome.amount_reported_minor = amount["amount_minor"]
        answer.currency = amount["currency"]
    return Notification(kind=kind, reference=reference, answer=answer, **told, **amount)


def _reversed(
    item: Mapping[str, Any], told: dict[str, Any], reference: str, own_id: str, *, success: bool
) -> Notification:
    """What became of the taking back of an attempt of ours, which is no void or refund of the
    merchant's: a payment's reversal that was refused or returned, or a capture's refund.
    """
    event_type = told["event_type"]
    if event_type not in _GONE and event_type not in _MODIFIED:
        return Notification(**told)
    took_effect = success and event_type not in _RETURNED
    return Notification(
        kind=N.REVERSAL,
        reference=reference.removesuffix(REFUND_SUFFIX).removesuffix(REVERSAL_SUFFIX),
        answer=_answer(item, own_id, Verdict.APPROVED if took_effect else Verdict.FAILED),
        **told,
    )


def _gone(
    item: Mapping[str, Any], told: dict[str, Any], reference: str, own_id: str
) -> Notification:
    """Nothing stands of a payment any more, or nothing is held of it."""
    event_type = told["event_type"]
    ours = reference.endswith(REVERSAL_SUFFIX)
    payment_reference = reference.removesuffix(REVERSAL_SUFFIX)
    action = part(item, "additionalData").get("modification.action")
    if event_type == "CANCEL_OR_REFUND" and not ours and action == "refund":
        answer = _answer(item, own_id, Verdict.APPROVED)
        return Notification(
            kind=N.REFUND, payment_reference=reference, answer=answer, **told, **_amount(item)
        )
    verdict = Verdict.EXPIRED if event_type == "EXPIRE" else Verdict.APPROVED
    return Notification(
        kind=N.VOID,
        payment_reference=payment_reference,
        answer=_answer(item, own_id, verdict),
        **told,
    )


def _authorization(item: Mapping[str, Any], own_id: str, *, success: bool) -> ConnectorAnswer:
    more = part(item, "additionalData")
    answer = _answer(item, own_id, Verdict.APPROVED if success else Verdict.DECLINED)
    outcome = answer.outcome = Outcome(response_code=ResponseCode.APPROVED)
    if success:
        amount = _amount(item)
        answer.currency = amount["currency"]
        outcome.amount_reported_minor = amount["amount_minor"]
        outcome.auth_code = values.text(more.get("authCode"))
        outcome.network_transaction_id = values.text(more.get("networkTxReference"))
        # `reason` holds the authorization code and digits of the card.
        return answer
    reason = values.text(item.get("reason"), values.MESSAGE_LENGTH_MAX)
    code = codes.REASONS.get(reason.casefold(), "")
    outcome.connector_code = code or "AUTHORISATION"
    outcome.connector_message = reason
    outcome.network_code, outcome.network_code_scheme = answers.network_code(item)
    outcome.response_code = answers.refusal(code, outcome.network_code)
    return answer


def _answer(item: Mapping[str, Any], own_id: str, verdict: Verdict) -> ConnectorAnswer:
    approved = verdict is Verdict.APPROVED
    message = "" if approved else values.text(item.get("reason"), values.MESSAGE_LENGTH_MAX)
    return ConnectorAnswer(
        Delivery.ANSWERED,
        verdict,
        Outcome(
            response_code=(
                ResponseCode.APPROVED if approved else ResponseCode.REJECTED_BY_CONNECTOR
            ),
            connector_code=values.text(item.get("eventCode")),
            connector_message=message,
        ),
        connector_transaction_id=own_id,
    )


def _amount(item: Mapping[str, Any]) -> dict[str, Any]:
    """Raises Unusable for an amount that ISO 4217 cannot express."""
    currency, amount_minor = answers.currency_and_amount(item)
    return {"amount_minor": amount_minor, "currency": currency}


def _dispute(item: Mapping[str, Any], event_type: str, own_id: str) -> Dispute:
    more = part(item, "additionalData")
    stage, status = _DISPUTES[event_type]
    told = more.get("disputeStatus")
    if isinstance(told, str):
        status = _DISPUTE_STATUSES.get(told, status)
    return Dispute(own_id, stage, status, values.text(more.get("chargebackReasonCode")))
