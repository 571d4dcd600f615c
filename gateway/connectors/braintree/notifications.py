"""Braintree's webhooks: how they are signed and what they say. Pure.

Sources: Braintree's guide "Webhooks" (parse) and its reference of webhook notifications; the
signature as its server SDKs compute it.
"""

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha1
from typing import Final
from urllib.parse import parse_qsl
from xml.parsers import expat

from gateway.connectors import values
from gateway.connectors.braintree import amounts
from gateway.connectors.braintree.connector import NAME, REFUND_SUFFIX, REVERSAL_SUFFIX
from gateway.connectors.notifications import (
    OUR_REFERENCE,
    BadSignature,
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    UnusableNotification,
    signed_by_any,
    webhook_secrets,
)
from gateway.domain.model import ConnectorAnswer, Delivery, Outcome, ResponseCode, Verdict

SIGNATURES_MAX: Final = 16
"""Braintree signs with every API key of the account."""
FIELDS_MAX: Final = 8
ELEMENTS_MAX: Final = 10_000
DEPTH_MAX: Final = 32

_PAYLOAD: Final = re.compile(r"[A-Za-z0-9+/=\n]+")
_HEX: Final = re.compile(r"[0-9a-f]{40}")

_STAGES: Final = {
    "retrieval": DisputeStage.PRE_DISPUTE,
    "chargeback": DisputeStage.ACTIVE_DISPUTE,
    "pre_arbitration": DisputeStage.PRE_ARBITRATION,
}
_STATUSES: Final = {
    "open": DisputeStatus.OPENED,
    "disputed": DisputeStatus.CHALLENGED,
    "under_review": DisputeStatus.CHALLENGED,
    "won": DisputeStatus.WON,
    "lost": DisputeStatus.LOST,
    "accepted": DisputeStatus.ACCEPTED,
    "auto_accepted": DisputeStatus.ACCEPTED,
    "expired": DisputeStatus.EXPIRED,
}
_VERDICTS: Final = {
    "transaction_settled": Verdict.APPROVED,
    "transaction_settlement_declined": Verdict.FAILED,
    "refund_failed": Verdict.FAILED,
}
"""The notifications about a capture or a refund."""


@dataclass(slots=True)
class _Element:
    """An element of XML: its text, and of each name the first element within."""

    text: str = ""
    within: "dict[str, _Element]" = field(default_factory=dict)

    def at(self, name: str) -> "_Element":
        """An element within; an empty one where there is none."""
        return self.within.get(name) or _Element()


@dataclass(frozen=True, slots=True)
class BraintreeNotifications:
    """Implements the NotificationSource port.

    A secret is a pair of API keys, `public_key|private_key`: those of the account, and while they
    are rotated the other ones, as `webhook_secrets`. A notification is signed for good, so that an
    old one is as genuine as a new one; what it tells is known by its event's id.
    """

    connector: str = field(default=NAME, init=False)
    acknowledgement: bytes = field(default=b"", init=False)

    def secrets(self, credentials: Mapping[str, str]) -> Sequence[str]:
        """See the port."""
        own = f"{credentials['public_key']}|{credentials['private_key']}"
        return (own, *webhook_secrets(credentials))

    def verify_and_parse(
        self,
        headers: Mapping[str, str],  # noqa: ARG002 - the port's
        body: bytes,
        secrets: Sequence[str],
        now: datetime,  # noqa: ARG002 - the port's
    ) -> list[Notification]:
        """See the port. The body is a form with `bt_signature` and `bt_payload`."""
        try:
            pairs = parse_qsl(
                body.decode("ascii"),
                keep_blank_values=True,
                strict_parsing=True,
                errors="strict",
                max_num_fields=FIELDS_MAX,
            )
        except ValueError:
            raise BadSignature("it is no form") from None
        form = dict(pairs)
        if len(form) != len(pairs):
            raise BadSignature("it has a field twice")
        payload = form.get("bt_payload", "")
        if _PAYLOAD.fullmatch(payload) is None:
            raise BadSignature("it has no payload")
        if not _is_signed(payload.encode("ascii"), form.get("bt_signature", ""), secrets):
            raise BadSignature("its signature does not hold")
        return [_told(_parsed(payload))]


def _is_signed(payload: bytes, signature: str, secrets: Sequence[str]) -> bool:
    """`public_key|hex[&public_key|hex…]`: HMAC-SHA1 of the payload under SHA-1 of the private key.

    The payload may have lost a last newline on its way.
    """
    signatures: dict[str, list[bytes]] = {}
    for pair in signature.split("&")[:SIGNATURES_MAX]:
        public_key, _, told = pair.partition("|")
        if _HEX.fullmatch(told):
            signatures.setdefault(public_key, []).append(bytes.fromhex(told))
    held = False
    for secret in secrets:
        public_key, _, private_key = secret.partition("|")
        # The algorithm is Braintree's; HMAC does not rest on what is broken in SHA-1.
        key = sha1(private_key.encode("utf-8"), usedforsecurity=False).digest()
        for message in (payload, payload + b"\n"):
            held |= signed_by_any(message, signatures.get(public_key, ()), (key,), "sha1")
    return held


def _parsed(payload: str) -> _Element:
    """The root element of a payload. Raises UnusableNotification."""
    root = _Element()
    path = [root]
    elements = 0

    def start(name: str, _attributes: dict[str, str]) -> None:
        nonlocal elements
        elements += 1
        if elements > ELEMENTS_MAX or len(path) > DEPTH_MAX:
            raise UnusableNotification("its XML is too large")
        element = _Element()
        path[-1].within.setdefault(name, element)
        path.append(element)

    def end(_name: str) -> None:
        path.pop()

    def text(told: str) -> None:
        path[-1].text += told

    def refuse(*_told: object) -> None:
        # Without a document type there are no entities, and nothing can be made to grow.
        raise UnusableNotification("its XML declares a document type")

    # Whatever encoding it declares: none but this one is Braintree's.
    parser = expat.ParserCreate("UTF-8")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.buffer_text = True
    try:
        # White space around it is Braintree's own.
        parser.Parse(b64decode(payload.replace("\n", ""), validate=True).strip(), True)
    except (Base64Error, expat.ExpatError):
        raise UnusableNotification("it is no XML") from None
    return root


def _told(root: _Element) -> Notification:
    """What a notification says. Raises UnusableNotification."""
    notification = root.at("notification")
    event_type = values.text(notification.at("kind").text.strip())
    if not event_type:
        raise UnusableNotification("it is no notification")
    subject = notification.at("subject")
    bare = Notification(
        connector=NAME,
        event_id=event_type,
        event_type=event_type,
        occurred_at=values.instant_of_text(_word(notification, "timestamp")),
    )
    if event_type in _VERDICTS and "transaction" in subject.within:
        return _of_transaction(bare, subject.at("transaction"))
    if event_type.startswith("dispute_") and "dispute" in subject.within:
        return _of_dispute(bare, subject.at("dispute"))
    # One of a kind that is not acted on has no name of its own but its time and its subject's id.
    told = next(iter(subject.within.values()), _Element())
    at = values.text(notification.at("timestamp").text.strip())
    return replace(bare, event_id=_event_id(event_type, told, at))


def _event_id(event_type: str, told: _Element, state: str) -> str:
    """Braintree gives events no id: the type, the subject's id and its state are the same each
    time.
    """
    return values.identifier(f"{event_type}:{_word(told, 'id')}:{state}") or event_type


def _of_transaction(bare: Notification, told: _Element) -> Notification:
    order_id = _word(told, "order-id")
    is_refund = bare.event_type == "refund_failed" or _word(told, "type") == "credit"
    of_refund = order_id.endswith(REFUND_SUFFIX)
    reference = order_id.removesuffix(REFUND_SUFFIX) if is_refund else order_id
    if OUR_REFERENCE.fullmatch(reference) is None:
        reference = ""
    currency = values.text(_word(told, "currency-iso-code"), 3)
    amount_minor = amounts.from_braintree(_word(told, "amount"), currency)
    verdict = _VERDICTS[bare.event_type]
    status = values.text(_word(told, "status"))
    transaction_id = values.identifier(_word(told, "global-id"))
    answer = ConnectorAnswer(
        Delivery.ANSWERED,
        verdict,
        Outcome(
            response_code=ResponseCode.APPROVED
            if verdict is Verdict.APPROVED
            else ResponseCode.REJECTED_BY_CONNECTOR,
            connector_code=values.text(_word(told, "processor-settlement-response-code")) or status,
            connector_message=values.text(
                _word(told, "processor-settlement-response-text"), values.MESSAGE_LENGTH_MAX
            ),
            amount_reported_minor=amount_minor if verdict is Verdict.APPROVED else None,
        ),
        connector_transaction_id=transaction_id,
        currency=currency,
    )
    if is_refund and order_id.endswith(REVERSAL_SUFFIX):
        # It may be of several refunds: one that failed fails it, none alone succeeds it.
        failed = replace(
            bare,
            kind=NotificationKind.REVERSAL,
            reference=order_id.removesuffix(REVERSAL_SUFFIX),
            answer=answer,
        )
        of_reversal = failed if verdict is Verdict.FAILED else bare
        return replace(of_reversal, event_id=_event_id(bare.event_type, told, status))
    # A refund that was made elsewhere has the order ID of what it is a refund of.
    elsewhere = is_refund and not of_refund
    return replace(
        bare,
        event_id=_event_id(bare.event_type, told, status),
        kind=NotificationKind.REFUND if is_refund else NotificationKind.CAPTURE,
        reference="" if elsewhere else reference,
        payment_reference=reference if elsewhere else "",
        payment_transaction_id="" if is_refund else transaction_id,
        answer=answer,
        amount_minor=amount_minor,
        currency=currency,
    )


def _of_dispute(bare: Notification, told: _Element) -> Notification:
    status = _word(told, "status")
    event_id = _event_id(bare.event_type, told, values.text(status))
    dispute_id = values.identifier(_word(told, "id"))
    stage, known = _STAGES.get(_word(told, "kind")), _STATUSES.get(status)
    if not dispute_id or stage is None or known is None:
        return replace(bare, event_id=event_id)
    transaction = told.at("transaction")
    order_id = _word(transaction, "order-id")
    currency = values.text(_word(told, "currency-iso-code"), 3)
    amount = _word(told, "amount-disputed") or _word(told, "amount")
    return replace(
        bare,
        event_id=event_id,
        kind=NotificationKind.DISPUTE,
        payment_reference=order_id if OUR_REFERENCE.fullmatch(order_id) else "",
        payment_transaction_id=values.identifier(_word(transaction, "global-id")),
        amount_minor=amounts.from_braintree(amount, currency),
        currency=currency,
        dispute=Dispute(
            dispute_id,
            stage,
            known,
            values.text(_word(told, "reason-code") or _word(told, "reason")),
        ),
    )


def _word(told: _Element, name: str) -> str:
    return told.at(name).text.strip()
