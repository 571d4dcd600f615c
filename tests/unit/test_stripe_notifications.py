"""Stripe's events: genuine ones are read, others are not; Stripe's own library agrees."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.connectors.kinds import AccountRefused
from gateway.connectors.notifications import (
    SIGNATURES_MAX,
    BadSignature,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    UnusableNotification,
)
from gateway.connectors.stripe.notifications import StripeNotifications
from gateway.domain.ids import new_operation_id
from gateway.domain.model import Mode, Verdict
from tests.stripe_events import event_of, refund_of, sign

SOURCE = StripeNotifications(tolerance_s=300)
SECRET = "whsec_0123456789abcdef"
OTHER = "whsec_fedcba9876543210"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
AT_S = int(NOW.timestamp())
REFERENCE = f"{new_operation_id()}-1"
N = NotificationKind


def read(
    body: bytes, header: str | None = None, *, now: datetime = NOW, secrets: Any = (SECRET,)
) -> list[Notification]:
    header = sign(body, SECRET, AT_S) if header is None else header
    return SOURCE.verify_and_parse({"stripe-signature": header}, body, secrets, now)


def intent_of(**more: Any) -> dict[str, Any]:
    return {
        "id": "pi_1",
        "object": "payment_intent",
        "amount": 1000,
        "amount_received": 0,
        "amount_capturable": 0,
        "currency": "eur",
        "capture_method": "automatic",
        "status": "succeeded",
        "metadata": {"gateway_reference": REFERENCE},
        "latest_charge": "ch_1",
        **more,
    }


# --- signatures -----------------------------------------------------------------------------------


def test_stripes_library_takes_what_the_tests_sign() -> None:
    body = event_of("refund.created", refund_of())
    told = stripe.Webhook.construct_event(
        body, sign(body, SECRET, int(datetime.now(UTC).timestamp())), SECRET
    )
    assert told["id"] == "evt_1"


def test_what_stripes_library_signs_is_taken() -> None:
    body = event_of("refund.created", refund_of())
    signature = stripe.WebhookSignature._compute_signature(  # the library has no public signer
        f"{AT_S}.{body.decode()}", SECRET
    )
    [told] = read(body, f"t={AT_S},v1={signature}")
    assert told.event_id == "evt_1"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "v1=00",
        "t=,v1=00",
        "t=1e3,v1=00",
        "t=-5,v1=00",
        f"t={AT_S}",
        f"t={AT_S},v1=zz",
        f"t={AT_S},v1=" + 64 * "0",
        f"t={AT_S},v0=" + 64 * "0",
        f"t={AT_S},t={AT_S},v1=" + 64 * "0",
        "t=" + 13 * "9" + ",v1=00",
        "\u0661",
    ],
)
def test_a_signature_that_is_none_is_refused(header: str) -> None:
    with pytest.raises(BadSignature):
        read(event_of("refund.created", refund_of()), header)


@given(st.text(max_size=200))
def test_no_header_raises_anything_else(header: str) -> None:
    with pytest.raises(BadSignature):
        read(b"{}", header)


@given(st.binary(max_size=300))
def test_no_signed_body_raises_anything_else(body: bytes) -> None:
    with pytest.raises(UnusableNotification):
        read(body)


_ODD = st.sampled_from([None, True, 7, -1, 2**62, 1.5, "", "x", "pi_1", [], [1], {}, {"data": 5}])
_STATUSES = (
    *("requires_capture", "succeeded", "processing", "requires_action", "canceled", "won"),
    *("requires_payment_method", "pending", "failed"),
)
_METADATA = {"gateway_reference": REFERENCE, f"{new_operation_id()}-1": "capture:5"}
_FIELDS = {
    **dict.fromkeys(
        ("id", "payment_intent", "latest_charge", "refunds", "next_action", "reason"), _ODD
    ),
    **dict.fromkeys(("amount", "amount_received", "amount_capturable"), _ODD | st.just(5)),
    **dict.fromkeys(("cancellation_reason", "last_payment_error", "capture_method"), _ODD),
    "status": _ODD | st.sampled_from(_STATUSES),
    "currency": _ODD | st.sampled_from(["eur", "jpy", "kwd"]),
    "metadata": st.just(_METADATA) | _ODD,
}


_TYPES = {
    "payment_intent.succeeded": "payment_intent",
    "setup_intent.succeeded": "setup_intent",
    "charge.refunded": "charge",
    "charge.dispute.created": "dispute",
    "refund.created": "refund",
}


@settings(max_examples=100)
@given(st.sampled_from(sorted(_TYPES)), st.fixed_dictionaries(_FIELDS))
def test_whatever_an_events_object_holds_it_is_kept(type_: str, fields: dict[str, Any]) -> None:
    body = event_of(type_, {**fields, "object": _TYPES[type_]})
    assert read(body)[0].event_type == type_


def test_a_changed_body_another_secret_and_another_time_are_refused() -> None:
    body = event_of("refund.created", refund_of())
    header = sign(body, SECRET, AT_S)
    with pytest.raises(BadSignature):
        read(body + b" ", header)
    with pytest.raises(BadSignature):
        read(body, header.replace(f"t={AT_S}", f"t={AT_S + 1}"))
    with pytest.raises(BadSignature):
        read(body, sign(body, OTHER, AT_S))
    with pytest.raises(BadSignature):
        read(body, header, secrets=())


@pytest.mark.parametrize("late_s", [-301, 301])
def test_a_signature_of_another_time_is_refused(late_s: int) -> None:
    body = event_of("refund.created", refund_of())
    read(body, now=NOW + timedelta(seconds=300 if late_s > 0 else -300))
    with pytest.raises(BadSignature, match="another time"):
        read(body, now=NOW + timedelta(seconds=late_s))


def test_secrets_are_rotated_without_a_gap() -> None:
    body = event_of("refund.created", refund_of())
    assert read(body, secrets=(OTHER, SECRET))
    rolled = sign(body, OTHER, AT_S) + "," + sign(body, SECRET, AT_S).partition(",")[2]
    assert read(body, rolled)
    flood = f"t={AT_S}" + SIGNATURES_MAX * (",v1=" + 64 * "0") + "," + rolled.partition(",")[2]
    with pytest.raises(BadSignature):
        read(body, flood)


def test_secrets_are_those_of_the_credentials() -> None:
    assert SOURCE.secrets({"webhook_secrets": f"{SECRET} {OTHER}"}) == (SECRET, OTHER)
    assert SOURCE.secrets({"secret_key": "sk_test_1"}) == ()
    with pytest.raises(AccountRefused):
        SOURCE.secrets({"webhook_secrets": "short"})
    with pytest.raises(AccountRefused):
        SOURCE.secrets({"webhook_secrets": " ".join([SECRET] * 5)})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b'{"object":"event"}',
        b'{"object":"event","id":"e","livemode":1}',
        b'{"object":"event","id":"","livemode":true}',
        b'{"object":"refund","id":"e","livemode":true}',
    ],
)
def test_what_is_no_event_is_unusable(body: bytes) -> None:
    with pytest.raises(UnusableNotification):
        read(body)


# --- events ---------------------------------------------------------------------------------------


def test_an_automatic_payment_that_succeeded_is_an_authorization() -> None:
    [told] = read(event_of("payment_intent.succeeded", intent_of(amount_received=1000)))
    assert (told.kind, told.reference, told.mode) == (N.AUTHORIZATION, REFERENCE, Mode.TEST)
    assert told.occurred_at == NOW
    assert told.answer is not None
    assert (told.answer.verdict, told.answer.connector_transaction_id) == (Verdict.APPROVED, "pi_1")
    assert told.answer.outcome is not None
    assert told.answer.outcome.amount_reported_minor == 1000


@pytest.mark.parametrize(
    ("type_", "more", "verdict"),
    [
        ("processing", {"status": "processing"}, Verdict.PENDING),
        ("requires_action", {"status": "requires_action"}, Verdict.REQUIRES_ACTION),
        (
            "payment_failed",
            {
                "status": "requires_payment_method",
                "last_payment_error": {"code": "card_declined", "decline_code": "lost_card"},
            },
            Verdict.DECLINED,
        ),
    ],
)
def test_other_ends_of_a_payment_are_told_as_they_are(
    type_: str, more: dict[str, Any], verdict: Verdict
) -> None:
    [told] = read(event_of(f"payment_intent.{type_}", intent_of(**more)))
    assert told.answer is not None
    assert (told.kind, told.answer.verdict) == (N.AUTHORIZATION, verdict)


def test_each_capture_of_ours_is_told_by_its_reference() -> None:
    first, second = f"{new_operation_id()}-1", f"{new_operation_id()}-2"
    metadata = {"gateway_reference": REFERENCE, first: "capture:300", second: "capture:500"}
    intent = intent_of(capture_method="manual", amount_received=800, metadata=metadata)
    [whole, *captures] = read(event_of("payment_intent.succeeded", intent))
    assert (whole.kind, whole.reference) == (N.AUTHORIZATION, REFERENCE)
    assert [(each.kind, each.reference) for each in captures] == [
        (N.CAPTURE, first),
        (N.CAPTURE, second),
    ]
    amounts = [each.answer and each.answer.outcome for each in captures]
    assert [each and each.amount_reported_minor for each in amounts] == [300, 500]
    assert len({each.event_id for each in (whole, *captures)}) == 3


@pytest.mark.parametrize(
    ("charge", "id_"), [("ch_1", "ch_1"), ({"id": "ch_2"}, "ch_2"), (None, "pi_1")]
)
def test_a_capture_from_the_dashboard_has_no_reference_of_its_own(charge: object, id_: str) -> None:
    intent = intent_of(capture_method="manual", amount_received=400, latest_charge=charge)
    [_, capture] = read(event_of("payment_intent.succeeded", intent))
    assert (capture.kind, capture.reference) == (N.CAPTURE, "")
    assert (capture.payment_reference, capture.amount_minor) == (REFERENCE, 400)
    assert capture.answer is not None
    assert capture.answer.connector_transaction_id == id_


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [("automatic", Verdict.EXPIRED), ("requested_by_customer", Verdict.APPROVED)],
)
def test_a_cancelled_payment_is_a_void(reason: str, verdict: Verdict) -> None:
    intent = intent_of(status="canceled", cancellation_reason=reason)
    [told] = read(event_of("payment_intent.canceled", intent))
    assert (told.kind, told.reference, told.payment_reference) == (N.VOID, "", REFERENCE)
    assert told.answer is not None
    assert told.answer.verdict is verdict


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        ("succeeded", Verdict.APPROVED),
        ("pending", Verdict.PENDING),
        ("failed", Verdict.FAILED),
        ("canceled", Verdict.CANCELED),
    ],
)
def test_a_refund_is_told_with_its_reference_or_its_payment(status: str, verdict: Verdict) -> None:
    for metadata, reference in (
        ({"gateway_reference": REFERENCE}, REFERENCE),
        ({"gateway_reference": "order-7"}, ""),  # somebody else's
        ({}, ""),
    ):
        refund = refund_of(status=status, metadata=metadata)
        [told] = read(event_of("refund.updated", refund))
        assert (told.kind, told.reference) == (N.REFUND, reference)
        assert (told.payment_transaction_id, told.amount_minor) == ("pi_1", 250)
        assert told.answer is not None
        assert (told.answer.verdict, told.answer.connector_transaction_id) == (verdict, "re_1")


def test_a_refund_is_told_by_its_reference_where_its_payment_is_not() -> None:
    refund = refund_of(payment_intent=None, metadata={"gateway_reference": REFERENCE})
    [told] = read(event_of("refund.updated", refund))
    assert (told.kind, told.reference, told.payment_transaction_id) == (N.REFUND, REFERENCE, "")


@pytest.mark.parametrize(
    ("status", "verdict"), [("succeeded", Verdict.APPROVED), ("failed", Verdict.FAILED)]
)
def test_what_a_reversal_gave_back_is_no_refund_from_elsewhere(
    status: str, verdict: Verdict
) -> None:
    refund = refund_of(status=status, metadata={"gateway_reference": f"{REFERENCE}-refund"})
    [told] = read(event_of("refund.updated", refund))
    assert (told.kind, told.reference, told.payment_transaction_id) == (N.REVERSAL, REFERENCE, "")
    assert told.answer is not None
    assert told.answer.verdict is verdict


def test_a_charge_tells_its_refunds_where_it_holds_them() -> None:
    charge = {
        "object": "charge",
        "id": "ch_1",
        "refunds": {"data": [refund_of(), refund_of(id="re_2")]},
    }
    told = read(event_of("charge.refunded", charge))
    assert [each.event_id for each in told] == ["evt_1#re_1", "evt_1#re_2"]
    [bare] = read(event_of("charge.refunded", {"object": "charge", "id": "ch_1"}))
    assert bare.kind is N.UNKNOWN


@pytest.mark.parametrize(
    ("status", "stage", "become"),
    [
        ("warning_needs_response", DisputeStage.PRE_DISPUTE, DisputeStatus.OPENED),
        ("needs_response", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED),
        ("under_review", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.CHALLENGED),
        ("won", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.WON),
        ("lost", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.LOST),
    ],
)
def test_a_dispute_is_told_by_its_status(
    status: str, stage: DisputeStage, become: DisputeStatus
) -> None:
    dispute = {
        "object": "dispute",
        "id": "dp_1",
        "amount": 1000,
        "currency": "jpy",
        "status": status,
        "reason": "fraudulent",
        "payment_intent": "pi_1",
    }
    [told] = read(event_of("charge.dispute.updated", dispute))
    assert told.dispute is not None
    assert (told.dispute.stage, told.dispute.status) == (stage, become)
    assert (told.dispute.dispute_id, told.dispute.reason) == ("dp_1", "fraudulent")
    assert (told.amount_minor, told.currency, told.payment_transaction_id) == (1000, "JPY", "pi_1")


@pytest.mark.parametrize(
    ("type_", "told"),
    [
        ("payout.paid", {"object": "payout", "id": "po_1"}),
        ("payment_intent.succeeded", intent_of(metadata={})),
        ("payment_intent.succeeded", intent_of(status="brand_new")),
        ("setup_intent.succeeded", {"object": "setup_intent", "id": "seti_1", "metadata": {}}),
        ("refund.created", refund_of(currency="xxx")),
        ("charge.refunded", {"object": "charge", "id": "ch_1", "refunds": {"data": 5}}),
        ("payment_intent.canceled", intent_of(id={}, status="canceled", cancellation_reason=[])),
        ("payment_intent.succeeded", intent_of(capture_method=[], amount={})),
        ("refund.created", refund_of(payment_intent=None)),
        ("charge.dispute.created", {"object": "dispute", "id": "dp_1", "status": "brand_new"}),
        ("charge.dispute.created", {"object": "dispute", "id": "", "status": "lost"}),
    ],
)
def test_what_the_gateway_does_not_act_on_is_kept_all_the_same(
    type_: str, told: dict[str, Any]
) -> None:
    [one] = read(event_of(type_, told))
    assert (one.kind, one.event_type) == (N.UNKNOWN, type_)


def test_a_live_event_says_so() -> None:
    body = orjson.dumps({**orjson.loads(event_of("x.y", {})), "livemode": True})
    assert read(body)[0].mode is Mode.LIVE
