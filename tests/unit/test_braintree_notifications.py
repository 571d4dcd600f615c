"""Braintree's webhooks: what its own SDK signs is accepted, what we sign its SDK accepts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.connectors.braintree.notifications import (
    DEPTH_MAX,
    ELEMENTS_MAX,
    SIGNATURES_MAX,
    BraintreeNotifications,
)
from gateway.connectors.notifications import (
    BadSignature,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    UnusableNotification,
)
from gateway.domain.model import ConnectorAnswer, Delivery, ResponseCode, Verdict
from tests.braintree_double import PRIVATE_KEY as PRIVATE
from tests.braintree_double import PUBLIC_KEY as PUBLIC
from tests.braintree_events import about, form, signed
from tests.braintree_events import transaction as bare_transaction

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the SDK warns of itself
    import braintree

CREDENTIALS = {"public_key": PUBLIC, "private_key": PRIVATE, "merchant_accounts": "EUR=shop"}
REFERENCE = "op_" + "0123456789abcdef" * 2 + "-1"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SOURCE = BraintreeNotifications()
KINDS = braintree.WebhookNotification.Kind
ALL_KINDS = sorted(value for name, value in vars(KINDS).items() if not name.startswith("_"))
# The SDK's sample uses a call that newer Pythons warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")


@pytest.fixture(scope="module")
def sdk() -> Any:
    return braintree.BraintreeGateway(
        braintree.Configuration(
            environment=braintree.Environment.Sandbox,
            merchant_id="merchant",
            public_key=PUBLIC,
            private_key=PRIVATE,
        )
    )


def parse(body: bytes, secrets: tuple[str, ...] | None = None) -> Notification:
    told = secrets if secrets is not None else tuple(SOURCE.secrets(CREDENTIALS))
    (notification,) = SOURCE.verify_and_parse({}, body, told, NOW)
    return notification


def transaction(**fields: str) -> str:
    return bare_transaction(**({"order_id": REFERENCE} | fields))


def told(xml: str | bytes) -> Notification:
    """What a notification says."""
    return parse(form(*signed(xml)))


# --- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_braintrees_sdk_signs_is_accepted(sdk: Any, kind: str) -> None:
    sample = sdk.webhook_testing.sample_notification(kind, "abc123")
    notification = parse(form(sample["bt_signature"], sample["bt_payload"].decode()))
    assert (notification.connector, notification.event_type) == ("braintree", kind)
    assert notification.event_id.startswith(kind)
    assert notification.occurred_at is not None


def test_what_we_sign_braintrees_sdk_accepts(sdk: Any) -> None:
    signature, payload = signed(about(KINDS.TransactionSettled, transaction()))
    parsed = sdk.webhook_notification.parse(signature, payload)
    assert parsed.kind == "transaction_settled"
    assert parsed.transaction.order_id == REFERENCE
    assert parsed.transaction.graphql_id == "dHJhbnNhY3Rpb25fYzlnOXozYWI"


def test_payload_that_lost_its_last_newline_is_genuine(sdk: Any) -> None:
    signature, payload = signed(about(KINDS.Check, "<check>true</check>"))
    assert parse(form(signature, payload.rstrip("\n"))).event_type == "check"
    assert sdk.webhook_notification.parse(signature, payload.rstrip("\n")).kind == "check"


def test_one_of_several_keys_of_the_account_is_enough() -> None:
    signature, payload = signed(about("check", "<check>true</check>"))
    body = form(f"anotherkey|{'0' * 40}&{signature}", payload)
    assert parse(body).event_type == "check"


def test_rotated_keys_are_both_accepted() -> None:
    rotated = {**CREDENTIALS, "webhook_secrets": "oldpublickey|oldprivatekey"}
    secrets = tuple(SOURCE.secrets(rotated))
    xml = about("check", "<check>true</check>")
    for keys in ((PUBLIC, PRIVATE), ("oldpublickey", "oldprivatekey")):
        assert parse(form(*signed(xml, *keys)), secrets).event_type == "check"
    with pytest.raises(BadSignature):
        parse(form(*signed(xml, PUBLIC, "oldprivatekey")), secrets)


def _tampered() -> Iterator[tuple[str, bytes]]:
    signature, payload = signed(about("check", "<check>true</check>"))
    other = signed(about("check", "<check>false</check>"))[1]
    digest = signature.partition("|")[2]
    yield "another payload", form(signature, other)
    yield "another private key", form(*signed("<notification/>", PUBLIC, "anotherprivatekey"))
    yield "another public key", form(f"anotherkey|{digest}", payload)
    yield "no signature", form("", payload)
    yield "half a signature", form(signature[:-2], payload)
    yield "upper case", form(signature.upper(), payload)
    yield "no payload", form(signature, "")
    yield "characters that are none", form(signature, payload + "%")
    yield "signature alone", urlencode({"bt_signature": signature}).encode()
    yield "twice", form(signature, payload) + b"&bt_payload=x"
    yield "no form", b'{"bt_signature": "x"}'
    yield "not ASCII", b"bt_signature=\xff&bt_payload=\xff"
    yield "too many fields", form(signature, payload) + b"&a=1" * 20
    many = "&".join(f"{PUBLIC}|{number:040x}" for number in range(SIGNATURES_MAX))
    yield "beyond the last signature", form(f"{many}&{signature}", payload)


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in _tampered()])
def test_what_is_not_signed_by_the_account_is_refused(body: bytes) -> None:
    with pytest.raises(BadSignature) as caught:
        parse(body)
    assert PRIVATE not in str(caught.value)


def test_without_secrets_nothing_is_genuine() -> None:
    with pytest.raises(BadSignature):
        parse(form(*signed(about("check", "<check>true</check>"))), ())


# --- XML ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "xml",
    [
        "no XML",
        "<notification><kind>check</kind>",
        "<notification></notification>",
        '<!DOCTYPE n [<!ENTITY a "check">]><notification><kind>&a;</kind></notification>',
        '<!DOCTYPE n SYSTEM "file:///etc/hostname"><notification><kind>x</kind></notification>',
        "<notification><kind>&undeclared;</kind></notification>",
        "<n>" * (DEPTH_MAX + 1) + "</n>" * (DEPTH_MAX + 1),
        "<n>" + "<a/>" * ELEMENTS_MAX + "</n>",
    ],
)
def test_genuine_payload_that_cannot_be_read_is_refused(xml: str) -> None:
    with pytest.raises(UnusableNotification):
        told(xml)


@pytest.mark.parametrize(
    "within", ["<a>" * DEPTH_MAX + "</a>" * DEPTH_MAX, "<a/>" * ELEMENTS_MAX], ids=["deep", "long"]
)
def test_notification_whose_xml_is_too_large_is_refused(within: str) -> None:
    with pytest.raises(UnusableNotification, match="too large"):
        told(about("check", within))


@pytest.mark.parametrize("encoding", ["utf-7", "idna", "hex", "none-such", "utf-8"])
def test_declared_encoding_is_not_heeded(encoding: str) -> None:
    xml = f'<?xml version="1.0" encoding="{encoding}"?>{about("check", "<check>true</check>")}'
    assert told(xml).event_type == "check"


@given(st.binary(min_size=1, max_size=200), st.integers(0, 400))
def test_whatever_is_signed_is_read_or_unusable(junk: bytes, at: int) -> None:
    xml = about("transaction_settled", transaction()).encode()
    for payload in (junk, xml[:at] + junk + xml[at:], xml[:at]):
        if payload:
            with contextlib.suppress(UnusableNotification):
                assert told(payload).connector == "braintree"


# --- captures and refunds -------------------------------------------------------------------------


def test_settled_transaction_confirms_its_capture() -> None:
    notification = told(about("transaction_settled", transaction()))
    assert notification.kind is NotificationKind.CAPTURE
    assert notification.reference == REFERENCE
    assert notification.payment_transaction_id == "dHJhbnNhY3Rpb25fYzlnOXozYWI"
    assert notification.event_id == "transaction_settled:c9g9z3ab:settled"
    assert notification.occurred_at == datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    assert (notification.amount_minor, notification.currency) == (1000, "EUR")
    answer = notification.answer
    assert answer is not None
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.APPROVED)
    assert answer.outcome is not None
    assert answer.outcome.amount_reported_minor == 1000
    assert answer.outcome.response_code is ResponseCode.APPROVED
    assert answer.outcome.connector_code == "settled"


def test_capture_that_bounces_failed() -> None:
    subject = transaction(status="settlement_declined", processor_settlement_response_code="4001")
    notification = told(about("transaction_settlement_declined", subject))
    assert notification.kind is NotificationKind.CAPTURE
    assert notification.reference == REFERENCE
    assert answer_of(notification).verdict is Verdict.FAILED
    outcome = answer_of(notification).outcome
    assert outcome is not None
    assert (outcome.connector_code, outcome.amount_reported_minor) == ("4001", None)
    assert outcome.response_code is ResponseCode.REJECTED_BY_CONNECTOR


def answer_of(notification: Notification) -> ConnectorAnswer:
    assert notification.answer is not None
    return notification.answer


def test_refund_of_ours_that_bounces_is_told_by_its_reference() -> None:
    subject = transaction(
        type="credit", status="processor_declined", order_id=f"{REFERENCE}-refund"
    )
    notification = told(about("refund_failed", subject))
    assert notification.kind is NotificationKind.REFUND
    assert (notification.reference, notification.payment_reference) == (REFERENCE, "")
    assert answer_of(notification).verdict is Verdict.FAILED
    # What it is a refund of is not told.
    assert notification.payment_transaction_id == ""


def test_refund_from_the_control_panel_is_one_of_the_payment() -> None:
    """It has the order ID of what it is a refund of."""
    notification = told(about("refund_failed", transaction(type="credit")))
    assert notification.kind is NotificationKind.REFUND
    assert (notification.reference, notification.payment_reference) == ("", REFERENCE)


def test_refund_within_a_reversal_of_ours_that_bounces_fails_the_reversal() -> None:
    order_id = f"{REFERENCE}-reversal"
    notification = told(about("refund_failed", transaction(type="credit", order_id=order_id)))
    assert (notification.kind, notification.reference) == (NotificationKind.REVERSAL, REFERENCE)
    assert answer_of(notification).verdict is Verdict.FAILED
    # A reversal may be of several refunds: that one was settled says nothing of the others.
    settled = told(about("transaction_settled", transaction(type="credit", order_id=order_id)))
    assert settled.kind is NotificationKind.UNKNOWN
    # A charge is none, whatever it is called.
    charge = told(about("transaction_settlement_declined", transaction(order_id=order_id)))
    assert (charge.kind, charge.reference) == (NotificationKind.CAPTURE, "")


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        ("transaction_disbursed", transaction()),
        ("transaction_settled", "<dispute><id>d1</id></dispute>"),
        (
            "a_new_one",
            "<dispute><id>d1</id><kind>chargeback</kind><status>open</status></dispute>",
        ),
        ("dispute_opened", transaction()),
    ],
)
def test_notification_of_another_kind_or_subject_is_kept_as_unknown(
    kind: str, subject: str
) -> None:
    notification = told(about(kind, subject))
    assert (notification.kind, notification.event_type) == (NotificationKind.UNKNOWN, kind)


@pytest.mark.parametrize("order_id", ["", "order-7", f"x{REFERENCE}"])
def test_order_id_that_is_not_ours_is_no_reference(order_id: str) -> None:
    for kind, type_ in (("transaction_settled", "sale"), ("refund_failed", "credit")):
        notification = told(about(kind, transaction(type=type_, order_id=order_id)))
        assert (notification.reference, notification.payment_reference) == ("", "")


def test_repeated_notification_has_the_same_event_id_and_another_state_another() -> None:
    settled = about("transaction_settled", transaction())
    assert told(settled).event_id == told(settled).event_id
    other = told(about("transaction_settled", transaction(id="another1")))
    assert other.event_id != told(settled).event_id


def test_card_data_in_a_payload_is_not_kept(sdk: Any) -> None:
    sample = sdk.webhook_testing.sample_notification(KINDS.RefundFailed, "abc123")
    notification = parse(form(sample["bt_signature"], sample["bt_payload"].decode()))
    assert notification.kind is NotificationKind.REFUND
    assert answer_of(notification).verdict is Verdict.FAILED
    assert "1234560000001234" not in repr(notification)


# --- disputes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (KINDS.DisputeOpened, DisputeStatus.OPENED),
        (KINDS.DisputeDisputed, DisputeStatus.CHALLENGED),
        (KINDS.DisputeUnderReview, DisputeStatus.CHALLENGED),
        (KINDS.DisputeWon, DisputeStatus.WON),
        (KINDS.DisputeLost, DisputeStatus.LOST),
        (KINDS.DisputeAccepted, DisputeStatus.ACCEPTED),
        (KINDS.DisputeAutoAccepted, DisputeStatus.ACCEPTED),
        (KINDS.DisputeExpired, DisputeStatus.EXPIRED),
    ],
)
def test_dispute_tells_its_stage_and_what_became_of_it(
    sdk: Any, kind: str, status: DisputeStatus
) -> None:
    sample = sdk.webhook_testing.sample_notification(kind, "abc123")
    notification = parse(form(sample["bt_signature"], sample["bt_payload"].decode()))
    assert notification.kind is NotificationKind.DISPUTE
    assert (notification.amount_minor, notification.currency) == (10_000, "USD")
    dispute = notification.dispute
    assert dispute is not None
    assert (dispute.dispute_id, dispute.stage) == ("abc123", DisputeStage.ACTIVE_DISPUTE)
    assert (dispute.status, dispute.reason) == (status, "fraud")
    assert notification.answer is None


def test_dispute_belongs_to_the_payment_of_its_order_id() -> None:
    subject = (
        "<dispute><id>d1</id><kind>pre_arbitration</kind><status>open</status>"
        "<amount>5.00</amount><currency-iso-code>EUR</currency-iso-code>"
        f"{transaction()}</dispute>"
    )
    notification = told(about("dispute_opened", subject))
    assert notification.payment_reference == REFERENCE
    assert notification.amount_minor == 500
    assert notification.dispute is not None
    assert notification.dispute.stage is DisputeStage.PRE_ARBITRATION


def test_dispute_tells_what_is_disputed_why_and_no_reference_of_somebody_elses() -> None:
    subject = (
        "<dispute><id>d1</id><kind>chargeback</kind><status>open</status>"
        "<amount>5.00</amount><amount-disputed>4.00</amount-disputed>"
        "<currency-iso-code>EUR</currency-iso-code><reason>fraud</reason>"
        f"<reason-code>83</reason-code>{transaction(order_id='order-7')}</dispute>"
    )
    notification = told(about("dispute_opened", subject))
    assert notification.payment_reference == ""
    assert notification.payment_transaction_id == "dHJhbnNhY3Rpb25fYzlnOXozYWI"
    assert notification.amount_minor == 400
    assert notification.dispute is not None
    assert notification.dispute.reason == "83"


@pytest.mark.parametrize(
    "subject",
    [
        "<dispute><id>d1</id><kind>chargeback</kind><status>a_new_one</status></dispute>",
        "<dispute><id>d1</id><kind>a_new_one</kind><status>open</status></dispute>",
        "<dispute><kind>chargeback</kind><status>open</status></dispute>",
    ],
)
def test_dispute_that_is_not_understood_is_kept_as_unknown(subject: str) -> None:
    assert told(about("dispute_opened", subject)).kind is NotificationKind.UNKNOWN
