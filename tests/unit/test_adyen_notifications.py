"""Adyen's standard webhooks: signed as Adyen signs them, and read as what they say."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import UTC, datetime
from hmac import digest
from typing import Any

import pytest
from Adyen.util import generate_notification_sig, is_valid_hmac_notification

from gateway.application.notifications import (
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
)
from gateway.connectors.adyen.codes import REASONS, REFUSALS
from gateway.connectors.adyen.notifications import ITEMS_MAX, AdyenNotifications, signed_text
from gateway.connectors.notifications import BadSignature, UnusableNotification
from gateway.domain.model import Mode, ResponseCode, Verdict

N = NotificationKind
KEY = "44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056"
OTHER_KEY = "AB" * 32
NOW = datetime(2026, 11, 21, tzinfo=UTC)
REFERENCE = "op_0199f0000000700080000000000000aa-1"
PAYMENT = "QFQTPCQ8HXSKGK82"
SOURCE = AdyenNotifications()


DEPTH = 1015
"""Levels of JSON that are read; a few more stand around them."""


def item_of(event: str = "AUTHORISATION", **more: Any) -> dict[str, Any]:
    """An item as the published examples have it, unsigned."""
    item = {
        "amount": {"currency": "EUR", "value": 1000},
        "eventCode": event,
        "eventDate": "2026-11-21T01:00:00+01:00",
        "merchantAccountCode": "TestCompanyECOM",
        "merchantReference": REFERENCE,
        "paymentMethod": "visa",
        "pspReference": PAYMENT,
        "reason": "",
        "success": "true",
        **more,
    }
    return {name: value for name, value in item.items() if value is not None}


def signed(item: dict[str, Any], key: str = KEY) -> dict[str, Any]:
    signature = b64encode(digest(bytes.fromhex(key), signed_text(item).encode(), "sha256"))
    more = {**item.get("additionalData", {}), "hmacSignature": signature.decode()}
    return {**item, "additionalData": more}


def body_of(*items: dict[str, Any], live: str = "false") -> bytes:
    wrapped = [{"NotificationRequestItem": item} for item in items]
    return json.dumps({"live": live, "notificationItems": wrapped}).encode()


def parsed(body: bytes, *secrets: str) -> list[Notification]:
    return SOURCE.verify_and_parse({}, body, secrets or (KEY,), NOW)


def told(event: str, **more: Any) -> Notification:
    (notification,) = parsed(body_of(signed(item_of(event, **more))))
    assert (notification.connector, notification.event_type) == ("adyen", event)
    return notification


# --- signatures -----------------------------------------------------------------------------------

ITEMS = [
    item_of(),
    item_of("CAPTURE", originalReference="9913140798220028"),
    item_of("CANCELLATION", originalReference=PAYMENT, success="false", reason="x:y"),
    item_of("REFUND", amount={"currency": "JPY", "value": 0}),
    item_of("REPORT_AVAILABLE", merchantReference=""),
    item_of(merchantReference="a:b\\c é"),
]


@pytest.mark.parametrize("item", ITEMS)
def test_adyens_own_library_accepts_what_we_sign(item: dict[str, Any]) -> None:
    ours = signed(item)
    assert is_valid_hmac_notification(ours, KEY)
    assert not is_valid_hmac_notification(ours, OTHER_KEY)


@pytest.mark.parametrize("item", ITEMS)
def test_what_adyens_own_library_signs_is_accepted(item: dict[str, Any]) -> None:
    signature = generate_notification_sig(item, KEY).decode()
    theirs = {**item, "additionalData": {"hmacSignature": signature}}
    assert len(parsed(body_of(theirs))) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pspReference", "QFQTPCQ8HXSKGK83"),
        ("originalReference", "9913140798220028"),
        ("merchantAccountCode", "OtherECOM"),
        ("merchantReference", "op_other-1"),
        ("amount", {"currency": "EUR", "value": 1001}),
        ("amount", {"currency": "USD", "value": 1000}),
        ("eventCode", "CAPTURE"),
        ("success", "false"),
    ],
)
def test_whatever_is_signed_cannot_be_changed(name: str, value: object) -> None:
    item = {**signed(item_of()), name: value}
    with pytest.raises(BadSignature):
        parsed(body_of(item))


def test_both_keys_of_a_rotation_are_accepted_and_no_third() -> None:
    for key in (KEY, OTHER_KEY):
        assert len(parsed(body_of(signed(item_of(), key)), KEY, OTHER_KEY)) == 1
    with pytest.raises(BadSignature):
        parsed(body_of(signed(item_of(), "CD" * 32)), KEY, OTHER_KEY)
    with pytest.raises(BadSignature):
        SOURCE.verify_and_parse({}, body_of(signed(item_of())), (), NOW)


def test_one_unsigned_item_refuses_the_whole_request() -> None:
    good = signed(item_of())
    for bad in (item_of(), signed(item_of(), OTHER_KEY), {}):
        with pytest.raises(BadSignature):
            parsed(body_of(good, bad))
    assert len(parsed(body_of(good, signed(item_of("CAPTURE"))))) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<xml/>",
        b"[]",
        b"{}",
        b'{"notificationItems": {}}',
        b'{"notificationItems": []}',
        b'{"notificationItems": [1]}',
        b'{"notificationItems": [{"NotificationRequestItem": {"additionalData": {}}}]}',
        body_of({**item_of(), "additionalData": {"hmacSignature": "not base64!"}}),
        body_of({**item_of(), "additionalData": {"hmacSignature": "é"}}),
        body_of({**item_of(), "additionalData": {"hmacSignature": 7}}),
        body_of({**item_of(), "amount": None}),
        # As deep as JSON may be: deeper than Python writes it out again.
        body_of({**signed(item_of()), "success": "?"}).replace(b'"?"', b"[" * DEPTH + b"]" * DEPTH),
        body_of(*[signed(item_of())] * (ITEMS_MAX + 1)),
    ],
)
def test_what_is_no_signed_request_is_refused(body: bytes) -> None:
    with pytest.raises(BadSignature):
        parsed(body)


@pytest.mark.parametrize(
    "item",
    [
        item_of(pspReference=""),
        item_of(eventCode=None),
    ],
)
def test_genuine_item_that_cannot_be_read_is_told_apart(item: dict[str, Any]) -> None:
    with pytest.raises(UnusableNotification):
        parsed(body_of(signed(item)))


@pytest.mark.parametrize("event", ["AUTHORISATION", "CAPTURE", "REFUND", "CHARGEBACK"])
@pytest.mark.parametrize(
    "amount",
    [
        {"currency": "ISK", "value": 550},
        {"currency": "EUR", "value": "1000"},
        {"currency": "XXX", "value": 1000},
    ],
)
def test_item_whose_amount_cannot_be_kept_is_taken_and_stops_no_other(
    event: str, amount: dict[str, Any]
) -> None:
    items = signed(item_of(event, amount=amount)), signed(item_of("CAPTURE", pspReference="C2"))
    odd, other = parsed(body_of(*items))

    assert (odd.kind, odd.event_type, odd.answer) == (N.UNKNOWN, event, None)
    assert other.kind is N.CAPTURE


# --- what is told ---------------------------------------------------------------------------------


def test_authorization_is_told_with_its_reference_amount_and_time() -> None:
    more = {"authCode": "044925", "networkTxReference": "MCC1"}
    notification = told("AUTHORISATION", additionalData=more, reason="044925:1111:03/2030")
    answer = notification.answer
    assert answer is not None
    assert answer.outcome is not None
    assert (notification.kind, notification.mode) == (N.AUTHORIZATION, Mode.TEST)
    assert notification.reference == REFERENCE
    assert notification.payment_transaction_id == PAYMENT
    assert notification.occurred_at == datetime(2026, 11, 21, tzinfo=UTC)
    assert answer.currency == "EUR"
    assert (notification.amount_minor, notification.currency) == (1000, "EUR")
    assert answer.verdict is Verdict.APPROVED
    assert answer.connector_transaction_id == PAYMENT
    assert answer.outcome.amount_reported_minor == 1000
    assert answer.outcome.auth_code == "044925"
    assert answer.outcome.network_transaction_id == "MCC1"
    assert "1111" not in repr(notification)


@pytest.mark.parametrize(("reason", "code"), [*REASONS.items(), ("refused", "2"), ("News", "")])
def test_refused_authorization_tells_why(reason: str, code: str) -> None:
    answer = told("AUTHORISATION", success="false", reason=reason).answer
    assert answer is not None
    assert answer.outcome is not None
    assert answer.verdict is Verdict.DECLINED
    expected = REFUSALS[code] if code else ResponseCode.DECLINED_OTHER
    assert answer.outcome.response_code is expected
    assert answer.outcome.connector_code == (code or "AUTHORISATION")
    assert answer.outcome.amount_reported_minor is None


@pytest.mark.parametrize(
    ("reason", "raw", "code"),
    [
        ("Refused", "51 : Insufficient funds", ResponseCode.INSUFFICIENT_FUNDS),
        ("A new reason", "51 : Insufficient funds", ResponseCode.INSUFFICIENT_FUNDS),
        ("A new reason", "Z9 : New", ResponseCode.DECLINED_OTHER),
        ("Expired Card", "51 : Insufficient funds", ResponseCode.EXPIRED_CARD),
        ("Refused", "00 : Approved", ResponseCode.DO_NOT_HONOR),
    ],
)
def test_refused_authorization_tells_the_networks_code(
    reason: str, raw: str, code: ResponseCode
) -> None:
    more = {"refusalReasonRaw": raw}
    answer = told("AUTHORISATION", success="false", reason=reason, additionalData=more).answer
    assert answer is not None
    assert answer.outcome is not None
    assert answer.outcome.response_code is code
    assert answer.outcome.connector_message == reason
    assert (answer.outcome.network_code, answer.outcome.network_code_scheme) == (raw[:2], "visa")


@pytest.mark.parametrize(
    ("event", "success", "kind", "verdict"),
    [
        ("CAPTURE", "true", N.CAPTURE, Verdict.APPROVED),
        ("CAPTURE", "false", N.CAPTURE, Verdict.FAILED),
        ("CAPTURE_FAILED", "true", N.CAPTURE, Verdict.FAILED),
        ("CANCELLATION", "true", N.VOID, Verdict.APPROVED),
        ("CANCELLATION", "false", N.VOID, Verdict.FAILED),
        ("REFUND", "true", N.REFUND, Verdict.APPROVED),
        ("REFUND", "false", N.REFUND, Verdict.FAILED),
        ("REFUND_FAILED", "true", N.REFUND, Verdict.FAILED),
        ("REFUNDED_REVERSED", "true", N.REFUND, Verdict.FAILED),
        ("AUTHORISATION_ADJUSTMENT", "true", N.INCREMENT, Verdict.APPROVED),
        ("AUTHORISATION_ADJUSTMENT", "false", N.INCREMENT, Verdict.FAILED),
    ],
)
def test_outcome_of_a_request_is_told_under_its_reference(
    event: str, success: str, kind: N, verdict: Verdict
) -> None:
    notification = told(
        event, success=success, originalReference=PAYMENT, pspReference="MOD0000000000001"
    )
    answer = notification.answer
    assert answer is not None
    assert answer.outcome is not None
    assert (notification.kind, answer.verdict) == (kind, verdict)
    assert notification.reference == REFERENCE
    assert notification.payment_transaction_id == PAYMENT
    assert answer.connector_transaction_id == "MOD0000000000001"
    # What an authorization grows by is not told, but what it grows to.
    has_amount = verdict is Verdict.APPROVED and kind in (N.CAPTURE, N.REFUND)
    assert answer.outcome.amount_reported_minor == (1000 if has_amount else None)
    assert answer.currency == ("EUR" if has_amount else "")


@pytest.mark.parametrize(
    ("success", "code", "message"),
    [
        # What is said of a success may be digits of the card.
        ("true", ResponseCode.APPROVED, ""),
        ("false", ResponseCode.REJECTED_BY_CONNECTOR, "Insufficient balance"),
    ],
)
def test_outcome_of_a_request_tells_why_it_was_refused(
    success: str, code: ResponseCode, message: str
) -> None:
    answer = told("REFUND", success=success, reason="Insufficient balance").answer
    assert answer is not None
    assert answer.outcome is not None
    assert (answer.outcome.response_code, answer.outcome.connector_message) == (code, message)
    assert answer.outcome.connector_code == "REFUND"


@pytest.mark.parametrize(
    ("event", "reference", "more", "verdict"),
    [
        ("CANCEL_OR_REFUND", f"{REFERENCE}-reversal", "cancel", Verdict.APPROVED),
        ("CANCEL_OR_REFUND", f"{REFERENCE}-reversal", "refund", Verdict.APPROVED),
        ("CANCEL_OR_REFUND", REFERENCE, "cancel", Verdict.APPROVED),
        ("TECHNICAL_CANCEL", REFERENCE, "", Verdict.APPROVED),
        ("TECHNICAL_CANCEL", REFERENCE, "refund", Verdict.APPROVED),
        ("EXPIRE", REFERENCE, "", Verdict.EXPIRED),
    ],
)
def test_payment_of_which_nothing_stands_is_told_so(
    event: str, reference: str, more: str, verdict: Verdict
) -> None:
    notification = told(
        event,
        merchantReference=reference,
        additionalData={"modification.action": more},
    )
    assert notification.kind is N.VOID
    assert (notification.reference, notification.payment_reference) == ("", REFERENCE)
    assert notification.answer is not None
    assert notification.answer.verdict is verdict


def test_reversal_that_refunded_a_payment_in_the_console_is_a_refund() -> None:
    notification = told("CANCEL_OR_REFUND", additionalData={"modification.action": "refund"})
    assert notification.kind is N.REFUND
    assert (notification.reference, notification.payment_reference) == ("", REFERENCE)
    assert notification.amount_minor == 1000


@pytest.mark.parametrize(
    "event", ["CANCEL_OR_REFUND", "TECHNICAL_CANCEL", "EXPIRE", "OFFER_CLOSED"]
)
def test_cancellation_without_effect_is_acted_on_by_nobody(event: str) -> None:
    assert told(event, success="false").kind is N.UNKNOWN


@pytest.mark.parametrize(
    ("event", "suffix", "success", "verdict"),
    [
        ("REFUND", "refund", "true", Verdict.APPROVED),
        ("REFUND", "refund", "false", Verdict.FAILED),
        ("REFUND_FAILED", "refund", "true", Verdict.FAILED),
        ("CANCEL_OR_REFUND", "reversal", "false", Verdict.FAILED),
        ("REFUND_FAILED", "reversal", "true", Verdict.FAILED),
        ("REFUNDED_REVERSED", "reversal", "true", Verdict.FAILED),
    ],
)
def test_what_became_of_a_reversal_of_ours_is_no_refund_of_the_merchants(
    event: str, suffix: str, success: str, verdict: Verdict
) -> None:
    notification = told(event, merchantReference=f"{REFERENCE}-{suffix}", success=success)
    assert (notification.kind, notification.reference) == (N.REVERSAL, REFERENCE)
    assert notification.answer is not None
    assert notification.answer.verdict is verdict


def test_what_else_has_the_reference_of_a_reversal_is_acted_on_by_nobody() -> None:
    notification = told("PAYOUT_DECLINE", merchantReference=f"{REFERENCE}-reversal")
    assert notification.kind is N.UNKNOWN


def test_payment_that_nobody_came_back_to_has_expired() -> None:
    notification = told("OFFER_CLOSED")
    assert notification.kind is N.AUTHORIZATION
    assert notification.answer is not None
    assert notification.answer.verdict is Verdict.EXPIRED


@pytest.mark.parametrize(
    ("event", "status", "stage", "expected"),
    [
        ("REQUEST_FOR_INFORMATION", None, DisputeStage.PRE_DISPUTE, DisputeStatus.OPENED),
        ("NOTIFICATION_OF_CHARGEBACK", None, DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED),
        ("CHARGEBACK", "Undefended", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED),
        ("CHARGEBACK", "Lost", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.LOST),
        ("CHARGEBACK_REVERSED", "Pending", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.CHALLENGED),
        ("CHARGEBACK_REVERSED", "Won", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.WON),
        ("SECOND_CHARGEBACK", None, DisputeStage.PRE_ARBITRATION, DisputeStatus.LOST),
        ("PREARBITRATION_WON", None, DisputeStage.PRE_ARBITRATION, DisputeStatus.WON),
        ("DISPUTE_DEFENSE_PERIOD_ENDED", None, DisputeStage.ACTIVE_DISPUTE, DisputeStatus.EXPIRED),
        (
            "DISPUTE_DEFENSE_PERIOD_ENDED",
            "Accepted",
            DisputeStage.ACTIVE_DISPUTE,
            DisputeStatus.ACCEPTED,
        ),
        ("ISSUER_RESPONSE_TIMEFRAME_EXPIRED", None, DisputeStage.ACTIVE_DISPUTE, DisputeStatus.WON),
        ("SCHEME_ARBITRATION_WON", None, DisputeStage.PRE_ARBITRATION, DisputeStatus.WON),
        ("SCHEME_ARBITRATION_LOST", None, DisputeStage.PRE_ARBITRATION, DisputeStatus.LOST),
    ],
)
def test_dispute_is_told_with_its_stage_and_status(
    event: str, status: str | None, stage: DisputeStage, expected: DisputeStatus
) -> None:
    more = {"chargebackReasonCode": "10.4"} | ({"disputeStatus": status} if status else {})
    notification = told(
        event, pspReference="DISPUTE000000001", originalReference=PAYMENT, additionalData=more
    )
    assert (notification.kind, notification.payment_reference) == (N.DISPUTE, REFERENCE)
    dispute = notification.dispute
    assert dispute is not None
    assert (dispute.dispute_id, dispute.stage, dispute.status, dispute.reason) == (
        "DISPUTE000000001",
        stage,
        expected,
        "10.4",
    )


def test_event_that_is_sent_again_has_the_same_id_and_another_verdict_has_another() -> None:
    first = told("AUTHORISATION", success="false", reason="Refused").event_id
    assert told("AUTHORISATION", success="false", reason="again").event_id == first
    ids = {
        first,
        told("AUTHORISATION").event_id,
        told("CAPTURE").event_id,
        told("CAPTURE", pspReference="MOD0000000000001").event_id,
    }
    assert len(ids) == 4


def test_event_of_an_unknown_type_is_kept_and_not_acted_on() -> None:
    notification = told("REPORT_AVAILABLE", amount=None)
    assert (notification.kind, notification.answer) == (N.UNKNOWN, None)


@pytest.mark.parametrize(("live", "mode"), [("true", Mode.LIVE), ("false", Mode.TEST), ("", None)])
def test_notification_tells_its_mode(live: str, mode: Mode | None) -> None:
    (notification,) = parsed(body_of(signed(item_of()), live=live))
    assert notification.mode is mode


def test_time_without_an_offset_is_none() -> None:
    assert told("CAPTURE", eventDate="2026-11-21T01:00:00").occurred_at is None
    assert told("CAPTURE", eventDate="yesterday").occurred_at is None


def test_adyen_expects_its_acknowledgement() -> None:
    assert SOURCE.acknowledgement == b"[accepted]"
    assert SOURCE.secrets({"webhook_secrets": f"{KEY} {OTHER_KEY}"}) == (KEY, OTHER_KEY)


@pytest.mark.parametrize("event", ["AUTHORISATION", "CAPTURE", "CANCELLATION", "CHARGEBACK"])
def test_what_somebody_else_calls_a_payment_is_not_kept(event: str) -> None:
    card = "4111111111111111"
    assert card not in str(told(event, merchantReference=card, originalReference=PAYMENT))
