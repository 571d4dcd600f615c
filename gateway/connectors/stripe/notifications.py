"""Stripe's events, as its webhook endpoints send them. Pure.

Sources: Stripe's API reference (Events, PaymentIntents, SetupIntents, Refunds, Disputes) and its
guide to webhook signatures.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from gateway.connectors import values
from gateway.connectors.base import Unusable
from gateway.connectors.notifications import (
    OUR_REFERENCE,
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    UnusableNotification,
    timed_event,
    webhook_secrets,
)
from gateway.connectors.stripe import answers
from gateway.connectors.stripe.answers import REFERENCE
from gateway.connectors.stripe.connector import NAME
from gateway.connectors.values import part
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, Verdict

_GIVEN_BACK_SUFFIX: Final = "-refund"
_GIVEN_BACK: Final = re.compile(OUR_REFERENCE.pattern + _GIVEN_BACK_SUFFIX)
"""What a reversal of the gateway's own refunds (see the connector's `_give_back`)."""

_S = DisputeStatus
_DISPUTES: Final = {
    "warning_needs_response": (DisputeStage.PRE_DISPUTE, _S.OPENED),
    "warning_under_review": (DisputeStage.PRE_DISPUTE, _S.CHALLENGED),
    "warning_closed": (DisputeStage.PRE_DISPUTE, _S.CANCELLED),
    "needs_response": (DisputeStage.ACTIVE_DISPUTE, _S.OPENED),
    "under_review": (DisputeStage.ACTIVE_DISPUTE, _S.CHALLENGED),
    "won": (DisputeStage.ACTIVE_DISPUTE, _S.WON),
    "lost": (DisputeStage.ACTIVE_DISPUTE, _S.LOST),
    "prevented": (DisputeStage.ACTIVE_DISPUTE, _S.CANCELLED),
}


@dataclass(frozen=True, slots=True)
class StripeNotifications:
    """Implements the NotificationSource port."""

    tolerance_s: float
    """How old, or how far ahead, the time in a signature may be."""
    connector: str = field(default=NAME, init=False)
    acknowledgement: bytes = field(default=b"", init=False)

    def secrets(self, credentials: Mapping[str, str]) -> Sequence[str]:
        """See the port: the endpoint's signing secrets, `whsec_…`."""
        return webhook_secrets(credentials)

    def verify_and_parse(
        self, headers: Mapping[str, str], body: bytes, secrets: Sequence[str], now: datetime
    ) -> list[Notification]:
        """See the port."""
        signature = headers.get("stripe-signature", "")
        event = timed_event(signature, body, secrets, now, self.tolerance_s)
        event_id = values.identifier(event.get("id"))
        live = event.get("livemode")
        if event.get("object") != "event" or not event_id or not isinstance(live, bool):
            raise UnusableNotification("it is no event")
        bare = Notification(
            connector=NAME,
            event_id=event_id,
            event_type=values.text(event.get("type")),
            occurred_at=values.instant(event.get("created")),
            mode=Mode.LIVE if live else Mode.TEST,
        )
        try:
            told = list(_told(bare, part(part(event, "data"), "object")))
        except Unusable:
            told = []
        return told or [bare]


def _told(bare: Notification, told: Mapping[str, Any]) -> Iterator[Notification]:
    """What an event says; nothing where it says nothing to us. Raises Unusable."""
    type_ = bare.event_type
    match told.get("object"):
        case "payment_intent" if type_.startswith("payment_intent."):
            yield from _of_payment_intent(bare, told)
        case "setup_intent" if type_.startswith("setup_intent."):
            reference = _reference(told)
            if OUR_REFERENCE.fullmatch(reference):
                yield replace(
                    bare,
                    kind=NotificationKind.AUTHORIZATION,
                    reference=reference,
                    answer=answers.verification(told),
                )
        case "refund":
            yield from _of_refund(bare, told)
        case "charge" if type_ == "charge.refunded":
            # Newer versions of the API leave the refunds out; then refund.* tells them.
            listed = part(told, "refunds").get("data")
            for refund in listed if isinstance(listed, list) else ():
                if isinstance(refund, dict):
                    one = f"{bare.event_id}#{values.identifier(refund.get('id'))}"
                    yield from _of_refund(replace(bare, event_id=one), refund)
        case "dispute":
            yield from _of_dispute(bare, told)
        case _:
            return


def _reference(told: Mapping[str, Any]) -> str:
    return values.identifier(part(told, "metadata").get(REFERENCE))


def _of_payment_intent(bare: Notification, intent: Mapping[str, Any]) -> Iterator[Notification]:
    reference = _reference(intent)
    if not OUR_REFERENCE.fullmatch(reference):
        return
    intent_id = values.identifier(intent.get("id"))
    one = replace(bare, reference=reference, payment_transaction_id=intent_id)
    status = intent.get("status")
    if status == "canceled":
        answer = answers.authorization(intent, captured=None)
        if answer.verdict is Verdict.CANCELED:
            answer.verdict = Verdict.APPROVED  # of the void
        yield replace(
            one,
            kind=NotificationKind.VOID,
            reference="",
            payment_reference=reference,
            answer=answer,
        )
        return
    automatic = values.text(intent.get("capture_method")).startswith("automatic")
    yield replace(
        one,
        kind=NotificationKind.AUTHORIZATION,
        answer=answers.authorization(intent, captured=automatic),
    )
    if not automatic and status in ("succeeded", "requires_capture"):
        yield from _of_captures(one, intent)


def _of_captures(one: Notification, intent: Mapping[str, Any]) -> Iterator[Notification]:
    """One for each capture of ours; otherwise what was captured was captured elsewhere."""
    received = answers.amount_of(intent, "amount_received")
    if not received:
        return
    ours = answers.captures(intent)
    for number, reference in enumerate(ours):
        yield replace(
            one,
            event_id=f"{one.event_id}#{number}",
            kind=NotificationKind.CAPTURE,
            reference=reference,
            payment_reference=one.reference,
            answer=answers.capture(intent, reference),
        )
    if not ours:
        currency = answers.currency_of(intent)
        charge = intent.get("latest_charge")
        charge_id = charge.get("id") if isinstance(charge, dict) else charge
        yield replace(
            one,
            event_id=f"{one.event_id}#elsewhere",
            kind=NotificationKind.CAPTURE,
            reference="",
            payment_reference=one.reference,
            answer=ConnectorAnswer(
                Delivery.ANSWERED,
                Verdict.APPROVED,
                connector_transaction_id=values.identifier(charge_id) or one.payment_transaction_id,
                currency=currency,
            ),
            amount_minor=answers.minor(received, currency),
            currency=currency,
        )


def _of_refund(bare: Notification, told: Mapping[str, Any]) -> Iterator[Notification]:
    reference = _reference(told)
    intent_id = values.identifier(told.get("payment_intent"))
    if not (reference or intent_id):
        return
    if _GIVEN_BACK.fullmatch(reference):
        yield replace(
            bare,
            kind=NotificationKind.REVERSAL,
            reference=reference.removesuffix(_GIVEN_BACK_SUFFIX),
            answer=answers.refund(told),
        )
        return
    currency = answers.currency_of(told)
    yield replace(
        bare,
        kind=NotificationKind.REFUND,
        reference=reference if OUR_REFERENCE.fullmatch(reference) else "",
        payment_transaction_id=intent_id,
        answer=answers.refund(told),
        amount_minor=answers.minor(answers.amount_of(told, "amount"), currency),
        currency=currency,
    )


def _of_dispute(bare: Notification, told: Mapping[str, Any]) -> Iterator[Notification]:
    stage_and_status = _DISPUTES.get(values.text(told.get("status")))
    dispute_id = values.identifier(told.get("id"))
    if stage_and_status is None or not dispute_id:
        return
    currency = answers.currency_of(told)
    yield replace(
        bare,
        kind=NotificationKind.DISPUTE,
        payment_transaction_id=values.identifier(told.get("payment_intent")),
        amount_minor=answers.minor(answers.amount_of(told, "amount"), currency),
        currency=currency,
        dispute=Dispute(dispute_id, *stage_and_status, values.text(told.get("reason"))),
    )
