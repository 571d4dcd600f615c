"""Stripe's connector against the double: what is Stripe's own, beyond the conformance suite."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from gateway.application.notifications import LookupUnavailable
from gateway.application.ports import ConnectorRequest
from gateway.connectors.http import HttpClient, Response
from gateway.connectors.stripe import answers
from gateway.connectors.stripe.connector import (
    API_VERSION,
    KEY_VALIDITY_S,
    StripeConnector,
    widest,
)
from gateway.connectors.stripe.kind import usual
from gateway.domain.errors import Reason
from gateway.domain.model import (
    AdviceAction,
    AvsResult,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    Mode,
    NextAction,
    OperationKind,
    QrCode,
    ResponseCode,
    Verdict,
)
from gateway.routing.breakers import is_failure
from gateway.routing.cascade import Next
from gateway.routing.cascade import after as cascade_after
from tests import connector_conformance
from tests.connector_conformance import (
    found_of,
    is_doubt,
    outcome_of,
    prepared,
    reference_made,
    request_of,
    send,
)
from tests.http_server import http_server
from tests.stripe_double import (
    ACTION_TOKEN,
    AUTHENTICATION_FAILURE,
    DECLINE_TOKEN,
    PIX_EXPIRES_AT,
    SECRET_KEY,
    StripePsp,
    stripe_psp,
)

K = OperationKind


@pytest_asyncio.fixture
async def psp() -> AsyncIterator[StripePsp]:
    async with stripe_psp() as opened:
        yield opened


async def test_requests_carry_the_pinned_version_the_key_and_the_reference(psp: StripePsp) -> None:
    request = request_of(fields={"statement_descriptor_suffix": "ORDER 7"})
    await send(psp.connector, request)
    headers = psp.double.headers[0]
    assert headers["authorization"] == f"Bearer {SECRET_KEY}"
    assert headers["stripe-version"] == API_VERSION
    assert headers["idempotency-key"] == request.reference
    assert headers["content-type"] == "application/x-www-form-urlencoded"
    (intent,) = psp.double.intents.values()
    assert intent["metadata"] == {
        "gateway_reference": request.reference,
        "gateway_payment_id": "pay_1",
    }


@pytest.mark.parametrize(
    ("channel", "moto"),
    [
        ("CHANNEL_MAIL_ORDER", "true"),
        ("CHANNEL_TELEPHONE_ORDER", "true"),
        ("CHANNEL_ECOMMERCE", None),
        ("", None),
    ],
)
async def test_only_an_order_by_mail_or_telephone_is_told_as_one(
    psp: StripePsp, channel: str, moto: str | None
) -> None:
    await send(psp.connector, request_of(fields={"channel": channel}))
    assert psp.double.forms[-1].get("payment_method_options[card][moto]") == moto


@pytest.mark.parametrize("has_it", [True, False])
async def test_what_an_account_has_not_is_not_asked_for(psp: StripePsp, has_it: bool) -> None:
    most = widest(Mode.TEST)
    connector = StripeConnector(psp.client(), SECRET_KEY, most if has_it else usual(most))
    await send(connector, request_of())
    for what in ("request_multicapture", "request_incremental_authorization"):
        told = psp.double.forms[-1].get(f"payment_method_options[card][{what}]")
        assert told == ("if_available" if has_it else None)
    await send(connector, request_of(capture=True))
    assert not [name for name in psp.double.forms[-1] if "request_" in name]


async def test_connected_account_is_named(psp: StripePsp) -> None:
    await send(psp.connect(5, stripe_account="acct_1"), request_of())
    assert psp.double.headers[0]["stripe-account"] == "acct_1"


async def test_answer_tells_what_the_network_said(psp: StripePsp) -> None:
    answer = await send(psp.connector, request_of())
    outcome = outcome_of(answer)
    assert (outcome.avs_result, outcome.avs_code) == (AvsResult.ADDRESS_ONLY, "pass/")
    assert (outcome.cvv_result, outcome.cvv_code) == (CvvResult.MATCH, "pass")
    assert (outcome.auth_code, outcome.network_transaction_id) == ("123456", "nti_1")
    assert answer.authorization_expires_at is not None


@pytest.mark.parametrize(
    ("code", "action"),
    [
        ("lost_card", AdviceAction.DO_NOT_RETRY),
        ("insufficient_funds", AdviceAction.RETRY_LATER),
        ("expired_card", AdviceAction.RETRY_AFTER_INSTRUMENT_UPDATE),
    ],
)
async def test_decline_tells_code_advice_and_the_networks_code(
    psp: StripePsp, code: str, action: AdviceAction
) -> None:
    request = request_of(payment_method_token=f"{DECLINE_TOKEN}{code}")
    outcome = outcome_of(await send(psp.connector, request))
    assert (outcome.connector_code, outcome.advice_action) == (code, action)
    assert outcome.advice_scheme == "stripe"
    assert (outcome.network_code, outcome.network_code_scheme) == ("51", "visa")


def test_decline_code_that_is_advice_ends_a_cascade() -> None:
    for code, follows in (("do_not_try_again", Next.NOTHING), ("do_not_honor", Next.REATTEMPT)):
        error = {"code": "card_declined", "decline_code": code}
        assert cascade_after(answers.declined(error, "pi_1")) is follows


async def test_verification_is_declined_as_an_authorization_is(psp: StripePsp) -> None:
    request = request_of(K.VERIFY, payment_method_token=f"{DECLINE_TOKEN}expired_card")
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.DECLINED
    assert outcome_of(answer).response_code is ResponseCode.EXPIRED_CARD


# --- payment methods and actions ------------------------------------------------------------------


async def test_stored_payment_method_is_charged_by_its_id(psp: StripePsp) -> None:
    stored = {"payment_method": {"stored": {"stored_payment_method_id": "pm_card_visa"}}}
    request = request_of(payment_method_token="", fields=stored)
    assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
    (intent,) = psp.double.intents.values()
    assert intent["token"] == "pm_card_visa"


@pytest.mark.parametrize("kind", [K.AUTHORIZE, K.VERIFY])
async def test_stored_payment_method_goes_with_the_customer_that_it_is_attached_to(
    psp: StripePsp, kind: K
) -> None:
    psp.double.attached["pm_1AbC"] = "cus_9XyZ"

    def request(stored_id: str) -> ConnectorRequest:
        stored = {"payment_method": {"stored": {"stored_payment_method_id": stored_id}}}
        # The merchant's own id of its customer is not Stripe's, whatever it looks like.
        fields = {**stored, "customer_id": "cus_merchants"}
        return request_of(kind, payment_method_token="", fields=fields)

    attached = request("cus_9XyZ/pm_1AbC")
    assert (await send(psp.connector, attached)).verdict is Verdict.APPROVED
    assert await psp.effects(attached.reference) == 1
    assert (await send(psp.connector, request("pm_1AbC"))).verdict is Verdict.FAILED
    assert (await send(psp.connector, request("cus_other/pm_1AbC"))).verdict is Verdict.FAILED
    assert (await send(psp.connector, request("pm_card_visa"))).verdict is Verdict.APPROVED
    assert "customer" not in psp.double.forms[-1]


async def test_repeat_of_an_attached_payment_method_is_the_same_request(psp: StripePsp) -> None:
    psp.double.attached["pm_1AbC"] = "cus_9XyZ"
    stored = {"stored_payment_method_id": "cus_9XyZ/pm_1AbC"}
    request = request_of(payment_method_token="", fields={"payment_method": {"stored": stored}})
    await send(psp.connector, request)
    psp.double.searchable = False
    told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    assert told.verdict is Verdict.CANCELED


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *(
            (
                {"payment_method": {"stored": {"stored_payment_method_id": stored_id}}},
                Reason.INVALID_REQUEST,
            )
            for stored_id in ("cus_1", "cus_1/", "/pm_1", "pm_1/cus_1", "me/pm_1", "cus_1/pm_1/x")
        ),
        ({}, Reason.FIELD_NOT_SUPPORTED),
        (
            {"payment_method": {"network_token": {"token_reference": "x"}}},
            Reason.FIELD_NOT_SUPPORTED,
        ),
        (
            {"payment_method": {"stored": {"stored_payment_method_id": "card_1"}}},
            Reason.INVALID_REQUEST,
        ),
    ],
)
async def test_payment_method_that_stripe_has_not_is_not_sent(
    psp: StripePsp, fields: dict[str, Any], reason: Reason
) -> None:
    for kind in (K.AUTHORIZE, K.VERIFY):
        request = request_of(kind, payment_method_token="", fields=fields)
        answer = await send(psp.connector, request)
        assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=reason)
    assert psp.double.requests == []


async def test_customer_who_has_to_act_is_sent_on_and_asked_about_later(psp: StripePsp) -> None:
    request = request_of(
        payment_method_token=ACTION_TOKEN, fields={"return_url": "https://shop.example/back"}
    )
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.REQUIRES_ACTION
    assert answer.next_action == NextAction(redirect_url="https://hooks.stripe.com/redirect")
    (intent,) = psp.double.intents.values()
    request.target_transaction_id = answer.connector_transaction_id
    found = await found_of(psp, request)
    assert found.verdict is Verdict.REQUIRES_ACTION
    intent |= {"status": "requires_capture", "amount_capturable": 1000, "next_action": None}
    found = await found_of(psp, request)
    assert found.verdict is Verdict.APPROVED


async def test_customer_who_cannot_come_back_is_declined(psp: StripePsp) -> None:
    answer = await send(psp.connector, request_of(payment_method_token=ACTION_TOKEN))
    assert answer.verdict is Verdict.DECLINED
    assert outcome_of(answer).response_code is ResponseCode.AUTHENTICATION_REQUIRED


async def test_authorization_that_expired_at_stripe_is_told_so(psp: StripePsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    (intent,) = psp.double.intents.values()
    intent |= {"status": "canceled", "amount_capturable": 0, "cancellation_reason": "automatic"}
    found = await found_of(psp, request)
    assert found.verdict is Verdict.EXPIRED


def redirecting(type_: str, **more: str) -> dict[str, Any]:
    redirect = {"method_type": type_, **more}
    return {
        "payment_method": {"redirect": redirect},
        "return_url": "https://shop.example/back",
    }


@pytest.mark.parametrize(
    ("type_", "currency", "more"),
    [
        ("bancontact", "EUR", {"customer_name": "Ada"}),
        ("eps", "EUR", {"customer_name": "Ada", "bank": "bank_austria"}),
        ("ideal", "EUR", {"bank": "ing"}),
        ("ideal", "EUR", {}),
        ("p24", "PLN", {"customer_email": "ada@shop.example", "bank": "ing"}),
    ],
)
async def test_customer_is_sent_to_the_bank_and_asked_about_until_it_paid(
    psp: StripePsp, type_: str, currency: str, more: dict[str, str]
) -> None:
    request = request_of(
        payment_method_token="",
        currency=currency,
        capture=True,
        fields=redirecting(type_, country_code="NL", **more),
    )
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.REQUIRES_ACTION
    (intent,) = psp.double.intents.values()
    url = f"https://hooks.stripe.com/redirect/authenticate/{intent['id']}"
    assert answer.next_action == NextAction(url)
    assert await psp.effects(request.reference) == 0
    # By a repeat, by the search and by its id.
    assert (await send(psp.connector, request)).next_action == NextAction(url)
    psp.double.customer_pays(intent)
    for target in ("", answer.connector_transaction_id):
        request.target_transaction_id = target
        found = await found_of(psp, request)
        assert found.verdict is Verdict.APPROVED
        assert outcome_of(found).amount_reported_minor == 1000


async def test_code_to_scan_is_told_with_its_end(psp: StripePsp) -> None:
    request = request_of(
        payment_method_token="", currency="BRL", capture=True, fields=redirecting("pix")
    )
    answer = await send(psp.connector, request)
    assert answer.next_action == NextAction(
        qr_code=QrCode(
            "00020101021226890014br.gov.bcb.pix",
            "https://qr.stripe.com/pix.png",
            "https://payments.stripe.com/pix/instructions",
        ),
        expires_at=datetime.fromtimestamp(PIX_EXPIRES_AT, UTC),
    )


async def test_customer_who_does_not_go_through_with_it_is_a_decline(psp: StripePsp) -> None:
    request = request_of(payment_method_token="", capture=True, fields=redirecting("ideal"))
    answer = await send(psp.connector, request)
    (intent,) = psp.double.intents.values()
    psp.double.customer_fails(intent)
    request.target_transaction_id = answer.connector_transaction_id
    found = await found_of(psp, request)
    assert found.verdict is Verdict.DECLINED
    assert outcome_of(found).connector_code == "payment_method_provider_decline"


async def test_direct_debit_is_pending_until_the_bank_paid_or_refused(psp: StripePsp) -> None:
    stored = {"stored_payment_method_id": "pm_sepa", "method_type": "sepa_debit"}
    for finish, verdict in (
        (psp.double.customer_pays, Verdict.APPROVED),
        (psp.double.customer_fails, Verdict.DECLINED),
    ):
        request = request_of(
            payment_method_token="", capture=True, fields={"payment_method": {"stored": stored}}
        )
        answer = await send(psp.connector, request)
        assert answer.verdict is Verdict.PENDING
        # While the bank has it, it can be neither cancelled nor taken for cancelled.
        request.target_transaction_id = answer.connector_transaction_id
        assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))
        finish(psp.double.intents[answer.connector_transaction_id])
        found = await found_of(psp, request)
        assert found.verdict is verdict


async def test_what_stripe_could_not_cancel_then_is_cancelled_once_it_can_be(
    psp: StripePsp,
) -> None:
    stored = {"stored_payment_method_id": "pm_sepa", "method_type": "sepa_debit"}
    request = request_of(
        payment_method_token="", capture=True, fields={"payment_method": {"stored": stored}}
    )
    answer = await send(psp.connector, request)
    request.target_transaction_id = answer.connector_transaction_id
    # The refusal would be saved under a key, and be answered again whatever changed since.
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))
    intent = psp.double.intents[answer.connector_transaction_id]
    psp.double.customer_fails(intent)
    told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    assert told.verdict is Verdict.CANCELED
    assert intent["status"] == "canceled"


@pytest.mark.parametrize("kind", [K.AUTHORIZE, K.VERIFY])
async def test_what_a_customer_did_not_do_can_be_cancelled_and_not_be_done_later(
    psp: StripePsp, kind: K
) -> None:
    fields = {"return_url": "https://shop.example/back"}
    request = request_of(kind, payment_method_token=ACTION_TOKEN, fields=fields)
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.REQUIRES_ACTION
    request.target_transaction_id = answer.connector_transaction_id
    for _ in range(2):
        told = await psp.connector.cancel(kind, request.reference, request)
        assert told.verdict is Verdict.CANCELED
    object_ = (psp.double.intents | psp.double.setups)[answer.connector_transaction_id]
    assert object_["status"] == "canceled"


async def test_verification_that_succeeded_after_all_is_not_cancelled(psp: StripePsp) -> None:
    request = request_of(K.VERIFY)
    answer = await send(psp.connector, request)
    request.target_transaction_id = answer.connector_transaction_id
    told = await psp.connector.cancel(K.VERIFY, request.reference, request)
    assert told.verdict is Verdict.APPROVED


async def test_network_token_goes_with_its_cryptogram_and_is_not_told_again(
    psp: StripePsp,
) -> None:
    secrets = {"number": "4895370000000000003", "cryptogram": "AgAAAAAABk4DWZ4C28yUQAAAAAA="}
    told = {"expiry_month": 12, "expiry_year": 2030, "eci": "05"}
    request = request_of(
        payment_method_token="",
        fields={"payment_method": {"network_token": told}},
        secrets=secrets,
    )
    assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
    sent = psp.double.forms[-1]
    token = "payment_method_data[card][network_token]"
    options = "payment_method_options[card][network_token]"
    assert sent[f"{token}[number]"] == secrets["number"]
    assert (sent[f"{token}[exp_month]"], sent[f"{token}[exp_year]"]) == ("12", "2030")
    assert sent[f"{options}[cryptogram]"] == secrets["cryptogram"]
    assert sent[f"{options}[electronic_commerce_indicator]"] == "05"
    assert not any(secret in repr(request) for secret in secrets.values())
    # Recovery has no secrets: it asks, and what it cannot repeat stays in doubt.
    request.secrets = {}
    found = await found_of(psp, request)
    assert found.verdict is Verdict.APPROVED
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))
    assert await psp.effects(request.reference) == 1


# --- 3-D Secure -----------------------------------------------------------------------------------

AUTHENTICATED = {
    "eci": "05",
    "cavv": "AAABBZEEBgAAAAAAAAAAAAAAAAA=",
    "directory_server_transaction_id": "c5b808e7-1de1-4069-a17b-f70d3b3b1645",
    "version": "2.2.0",
}


async def test_authentication_done_elsewhere_goes_with_the_payment(psp: StripePsp) -> None:
    exempt = {**AUTHENTICATED, "exemption": "SCA_EXEMPTION_TRANSACTION_RISK_ANALYSIS"}
    for three_ds in (AUTHENTICATED, exempt):
        answer = await send(psp.connector, request_of(fields={"three_ds": three_ds}))
        assert answer.verdict is Verdict.APPROVED
    place = "payment_method_options[card][three_d_secure]"
    sent = {name: value for name, value in psp.double.forms[-1].items() if name.startswith(place)}
    assert sent == {
        f"{place}[cryptogram]": AUTHENTICATED["cavv"],
        f"{place}[transaction_id]": AUTHENTICATED["directory_server_transaction_id"],
        f"{place}[version]": "2.2.0",
        f"{place}[electronic_commerce_indicator]": "05",
        f"{place}[exemption_indicator]": "low_risk",
    }
    assert f"{place}[exemption_indicator]" not in psp.double.forms[-2]


@pytest.mark.parametrize(
    ("kind", "three_ds", "reason"),
    [
        (K.AUTHORIZE, {**AUTHENTICATED, "cavv": ""}, Reason.INVALID_REQUEST),
        (K.AUTHORIZE, {"exemption": "SCA_EXEMPTION_LOW_VALUE"}, Reason.FIELD_NOT_SUPPORTED),
        (
            K.AUTHORIZE,
            {**AUTHENTICATED, "exemption": "SCA_EXEMPTION_LOW_VALUE"},
            Reason.FIELD_NOT_SUPPORTED,
        ),
        (K.VERIFY, AUTHENTICATED, Reason.FIELD_NOT_SUPPORTED),
    ],
)
async def test_authentication_that_stripe_cannot_take_is_not_sent(
    psp: StripePsp, kind: K, three_ds: dict[str, str], reason: Reason
) -> None:
    answer = await send(psp.connector, request_of(kind, fields={"three_ds": three_ds}))
    assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, reason)
    assert psp.double.forms == []


# --- proof of absence -----------------------------------------------------------------------------


async def test_search_that_lags_is_no_answer_while_the_reference_is_young(psp: StripePsp) -> None:
    patient = psp.connect(5, search_lag_s=300.0)
    request = request_of()
    await send(patient, request)
    psp.double.searchable = False
    assert is_doubt(await patient.query(K.AUTHORIZE, request.reference, request))
    old = reference_made(301)
    assert await patient.query(K.AUTHORIZE, old, request_of(reference=old)) is None
    psp.double.searchable = True
    found = await patient.query(K.AUTHORIZE, request.reference, request)
    assert found is not None
    assert found.verdict is Verdict.APPROVED


@pytest.mark.parametrize("capture", [False, True])
async def test_authorization_is_found_by_its_reference_alone(psp: StripePsp, capture: bool) -> None:
    request = request_of(capture=capture)
    sent = await send(psp.connector, request)
    assert await psp.connector.query(K.AUTHORIZE, request.reference) == sent
    assert await psp.connector.query(K.AUTHORIZE, "op_none-1") is None


async def test_what_is_found_and_is_of_the_other_mode_or_another_kind_is_no_answer(
    psp: StripePsp,
) -> None:
    request = request_of()
    sent = await send(psp.connector, request)
    psp.double.intents[sent.connector_transaction_id]["livemode"] = True
    assert is_doubt(await psp.connector.query(K.AUTHORIZE, request.reference, request))
    refund = await prepared(psp, K.REFUND)
    await send(psp.connector, refund)
    for each in psp.double.refunds.values():
        each["object"] = "charge"
    assert is_doubt(await psp.connector.query(K.REFUND, refund.reference, refund))


@pytest.mark.parametrize("kind", [K.CAPTURE, K.REFUND, K.VOID, K.INCREMENT, K.REVERSAL])
async def test_what_acts_on_a_payment_cannot_be_asked_about_without_it(
    psp: StripePsp, kind: K
) -> None:
    for request in (None, request_of(kind)):
        assert is_doubt(await psp.connector.query(kind, "op_none-1", request))
    assert psp.double.requests == []


async def test_verification_that_nobody_knows_the_id_of_is_not_asked_about(psp: StripePsp) -> None:
    request = request_of(K.VERIFY)
    assert await psp.connector.query(K.VERIFY, request.reference, request) is None
    assert psp.double.requests == []


async def test_used_key_disproves_what_a_search_has_not_found(psp: StripePsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    psp.double.searchable = False
    assert await psp.connector.query(K.AUTHORIZE, request.reference, request) is None
    told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    assert told.verdict is Verdict.CANCELED
    assert await psp.held_minor(request.reference) == 0


async def test_occupied_key_moves_no_money_and_lets_no_late_request_through(
    psp: StripePsp,
) -> None:
    request = request_of()
    for _ in range(2):
        told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
        assert told == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.REFERENCE_CANCELED)
    assert is_doubt(await send(psp.connector, request))
    assert psp.double.intents == {}
    assert psp.double.effects == []


async def test_past_half_of_the_keys_validity_nothing_proves_an_absence(psp: StripePsp) -> None:
    for reference in (reference_made(KEY_VALIDITY_S / 2 + 60), "op_00000001-1"):
        request = request_of(reference=reference)
        await send(psp.connector, request)
        psp.double.keys.clear()  # pruned, as Stripe may after 24 hours
        psp.double.searchable = False
        before = len(psp.double.requests)
        assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, reference, request))
        assert len(psp.double.requests) == before
        psp.double.searchable = True
    still_valid = reference_made(KEY_VALIDITY_S / 2 - 60)
    told = await psp.connector.cancel(K.AUTHORIZE, still_valid, request_of(reference=still_valid))
    assert told.reason == Reason.REFERENCE_CANCELED


async def test_doubt_without_its_request_stays_one(psp: StripePsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference))
    assert is_doubt(await psp.connector.query(K.CAPTURE, request.reference))
    assert await psp.held_minor(request.reference) == 1000


async def test_refused_or_verified_already_is_told_by_its_cancellation(psp: StripePsp) -> None:
    declined = request_of(payment_method_token=f"{DECLINE_TOKEN}lost_card")
    for request, verdict in (
        (declined, Verdict.DECLINED),
        (request_of(K.VERIFY), Verdict.APPROVED),
    ):
        sent = await send(psp.connector, request)
        told = await psp.connector.cancel(request.kind, request.reference, request)
        assert (told.verdict, told) == (verdict, sent)


async def test_only_a_repeat_that_stripe_calls_one_tells_what_a_key_did(
    psp: StripePsp, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(payment_method_token=f"{DECLINE_TOKEN}lost_card")
    await send(psp.connector, request)
    monkeypatch.setattr(connector_conformance, "_PASSED_ON", ())
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))


@pytest.mark.parametrize("other", [{"livemode": True}, {"object": "other"}, {"metadata": {}}])
async def test_only_an_object_of_its_own_occupies_a_key(
    psp: StripePsp, other: dict[str, Any]
) -> None:
    psp.way.alter = lambda told: told.update(other)
    request = request_of()
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))


@pytest.mark.parametrize("other", [{"livemode": True}, {"object": "other"}, {"id": "seti_other"}])
async def test_a_verification_is_cancelled_by_its_own_object_alone(
    psp: StripePsp, other: dict[str, Any]
) -> None:
    request = request_of(K.VERIFY)
    request.target_transaction_id = (await send(psp.connector, request)).connector_transaction_id
    psp.double.setups[request.target_transaction_id] |= {"status": "requires_action"} | other
    assert is_doubt(await psp.connector.cancel(K.VERIFY, request.reference, request))


@pytest.mark.parametrize("kind", [K.REFUND, K.INCREMENT])
async def test_what_cannot_be_taken_back_is_left_for_a_query(psp: StripePsp, kind: K) -> None:
    request = await prepared(psp, kind)
    await send(psp.connector, request)
    assert is_doubt(await psp.connector.cancel(kind, request.reference, request))
    found = await found_of(psp, request)
    assert found.verdict is Verdict.APPROVED


# --- errors ---------------------------------------------------------------------------------------


async def test_refused_request_failed_and_tells_stripes_code(psp: StripePsp) -> None:
    request = request_of(K.CAPTURE, target_transaction_id="pi_none")
    answer = await send(psp.connector, request)
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.FAILED)
    assert outcome_of(answer).response_code is ResponseCode.REJECTED_BY_CONNECTOR
    assert outcome_of(answer).connector_code == "resource_missing"


@pytest.mark.parametrize(
    ("codes", "sent"),
    [
        (["rate_limit", "rate_limit"], False),
        (["rate_limit", "lock_timeout"], True),
        (["lock_timeout", "rate_limit"], True),
    ],
)
async def test_what_the_rate_limiter_turned_away_each_time_was_surely_not_done(
    psp: StripePsp, monkeypatch: pytest.MonkeyPatch, codes: list[str], sent: bool
) -> None:
    answers_left = list(codes)

    async def limited(*_args: object, **_more: object) -> Response:
        error = {"error": {"type": "invalid_request_error", "code": answers_left.pop(0)}}
        return Response(429, json.dumps(error).encode(), {})

    connector = psp.connect(5)
    with monkeypatch.context() as patched:
        patched.setattr(connector, "_request", limited)
        answer = await send(connector, request_of())
    assert not answers_left
    if sent:
        assert is_doubt(answer)
        return
    assert (answer.delivery, answer.verdict) == (Delivery.NOT_SENT, Verdict.UNKNOWN)
    assert answer.reason is Reason.CONNECTOR_RATE_LIMITED
    assert cascade_after(answer) is Next.ANOTHER
    assert is_failure(answer)  # so that a breaker opens where it lasts


async def test_a_refusal_after_the_rate_limiters_is_the_requests_own(
    psp: StripePsp, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = psp.connect(5)
    through = connector._request
    left = [1]

    async def limited_once(*args: Any, **more: Any) -> Response:
        if left:
            left.pop()
            return Response(429, b'{"error": {"code": "rate_limit"}}', {})
        return await through(*args, **more)

    monkeypatch.setattr(connector, "_request", limited_once)
    answer = await send(connector, request_of(K.CAPTURE, target_transaction_id="pi_none"))
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.FAILED)


async def test_refused_credentials_fail_the_request(psp: StripePsp) -> None:
    answer = await send(psp.connect(5, secret_key="sk_test_another12345"), request_of())
    assert answer.verdict is Verdict.FAILED
    assert SECRET_KEY not in repr(answer)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (402, {}),  # a proxy's
        (402, {"type": "api_error"}),
        (400, {}),
        (404, {"message": "no such page"}),
        (400, {"type": "idempotency_error"}),
        (405, {"type": "invalid_request_error"}),
        (302, {"type": "invalid_request_error"}),
        (503, {"type": "api_error", "code": "rate_limit"}),
    ],
)
async def test_status_without_stripes_word_for_it_is_no_refusal(
    status: int, error: dict[str, str]
) -> None:
    async def answered(_: web.Request) -> web.Response:
        return web.json_response({"error": error}, status=status)

    async with http_server(answered) as url:
        http = HttpClient(url)
        connector = StripeConnector(http, SECRET_KEY, widest(Mode.TEST))
        assert is_doubt(await send(connector, request_of()))
        await http.close()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_stripes_own_refusal_of_the_first_sending_is_definite(status: int) -> None:
    async def answered(_: web.Request) -> web.Response:
        return web.json_response({"error": {"type": "invalid_request_error"}}, status=status)

    async with http_server(answered) as url:
        http = HttpClient(url)
        connector = StripeConnector(http, SECRET_KEY, widest(Mode.TEST))
        answer = await send(connector, request_of())
        assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.FAILED)
        await http.close()


@pytest.mark.parametrize(
    ("kind", "verdict"), [(K.VOID, Verdict.APPROVED), (K.CAPTURE, Verdict.FAILED)]
)
async def test_only_a_void_is_done_where_the_payment_was_cancelled_before(
    psp: StripePsp, kind: K, verdict: Verdict
) -> None:
    request = await prepared(psp, kind)
    psp.double.intents[request.target_transaction_id] |= {
        "status": "canceled",
        "amount_capturable": 0,
    }
    answer = await send(psp.connector, request)
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, verdict)


@pytest.mark.parametrize("kind", [K.AUTHORIZE, K.VERIFY])
async def test_decline_tells_the_id_of_what_was_declined(psp: StripePsp, kind: K) -> None:
    token = f"{DECLINE_TOKEN}lost_card"
    answer = await send(psp.connector, request_of(kind, payment_method_token=token))
    assert answer.verdict is Verdict.DECLINED
    assert answer.connector_transaction_id in (psp.double.intents | psp.double.setups)


async def test_object_of_the_other_mode_is_no_answer(psp: StripePsp) -> None:
    psp.way.alter = lambda told: told.update(livemode=True)
    assert is_doubt(await send(psp.connector, request_of()))


async def test_objects_of_other_requests_are_no_answers(psp: StripePsp) -> None:
    psp.way.alter = lambda told: told["metadata"].update(gateway_reference="op_other-1")
    assert is_doubt(await send(psp.connector, request_of()))
    psp.way.clear()
    capture = await prepared(psp, K.CAPTURE)
    psp.way.alter = lambda told: told.update(id="pi_other")
    assert is_doubt(await send(psp.connector, capture))


@pytest.mark.parametrize("other", [{"livemode": True}, {"id": "pi_other"}])
@pytest.mark.parametrize("kind", [K.INCREMENT, K.REVERSAL])
async def test_nothing_is_done_to_another_object_than_was_asked_about(
    psp: StripePsp, kind: K, other: dict[str, Any]
) -> None:
    request = await prepared(psp, kind)
    psp.double.intents[request.target_transaction_id] |= other
    psp.double.requests.clear()
    answer = await send(psp.connector, request)
    assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, Reason.CONNECT_FAILED)
    for told in (
        await psp.connector.query(kind, request.reference, request),
        await psp.connector.cancel(K.AUTHORIZE, request.reference, request),
    ):
        assert is_doubt(told)
    assert {method for method, _, _ in psp.double.requests} == {"GET"}


async def test_card_number_in_a_message_is_masked(psp: StripePsp) -> None:
    def leak(told: dict[str, Any]) -> None:
        told["status"] = "requires_payment_method"
        told["last_payment_error"] = {
            "code": "card_declined",
            "message": "card 4242424242424242 declined",
        }

    psp.way.alter = leak
    answer = await send(psp.connector, request_of())
    assert answer.verdict is Verdict.DECLINED
    assert "4242424242424242" not in repr(answer)


async def test_refund_of_a_capture_from_the_dashboard_names_the_payment(psp: StripePsp) -> None:
    request = await prepared(psp, K.REFUND)
    request.payment_transaction_id = request.target_transaction_id
    request.target_transaction_id = "ch_from_the_dashboard"
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.APPROVED
    assert await psp.connector.query(K.REFUND, request.reference, request) == answer


# --- whose it is ----------------------------------------------------------------------------------


async def test_payments_reference_is_told_by_its_id(psp: StripePsp) -> None:
    connector = psp.connect(5)
    for of_ours in (True, False):
        request = request_of()
        answer = await send(connector, request)
        if not of_ours:
            psp.double.intents[answer.connector_transaction_id]["metadata"] = {}
        told = await connector.reference_of(answer.connector_transaction_id)
        assert told == (request.reference if of_ours else None)
    assert await connector.reference_of("pi_of_nobody") is None


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, {}),  # a proxy's
        (500, {}),
        (403, {"error": {"type": "invalid_request_error"}}),
        (200, {"object": "payment_intent", "id": "pi_1", "livemode": True, "metadata": {}}),
        (200, {"object": "payment_intent", "id": "pi_2", "livemode": False, "metadata": {}}),
    ],
)
async def test_what_does_not_say_whose_a_payment_is_has_to_be_asked_again(
    status: int, told: dict[str, Any]
) -> None:
    async def answered(_: web.Request) -> web.Response:
        return web.json_response(told, status=status)

    async with http_server(answered) as url:
        http = HttpClient(url)
        connector = StripeConnector(http, SECRET_KEY, widest(Mode.TEST))
        with pytest.raises(LookupUnavailable):
            await connector.reference_of("pi_1")
        await http.close()


async def test_captured_payment_cannot_be_voided(psp: StripePsp) -> None:
    request = await prepared(psp, K.REFUND)
    void = request_of(K.VOID, target_transaction_id=request.target_transaction_id)
    answer = await send(psp.connector, void)
    assert answer.verdict is Verdict.FAILED
    assert outcome_of(answer).connector_code == "payment_intent_unexpected_state"


async def test_rest_of_a_payment_captured_in_part_can_be_voided(psp: StripePsp) -> None:
    capture = await prepared(psp, K.CAPTURE)
    capture.amount_minor, capture.final = capture.amount_minor // 2, False
    assert (await send(psp.connector, capture)).verdict is Verdict.APPROVED

    void = request_of(K.VOID, target_transaction_id=capture.target_transaction_id)
    assert (await send(psp.connector, void)).verdict is Verdict.APPROVED
    (intent,) = psp.double.intents.values()
    assert (intent["status"], intent["amount_capturable"]) == ("succeeded", 0)
    assert (await found_of(psp, void)).verdict is Verdict.APPROVED
    # What was captured stands.
    reversal = request_of(K.REVERSAL, target_transaction_id=capture.target_transaction_id)
    assert await psp.connector.query(K.REVERSAL, reversal.reference, reversal) is None


@pytest.mark.parametrize("errors", [1, 2])
async def test_void_is_not_held_up_by_an_error_that_stripe_keeps(
    psp: StripePsp, errors: int
) -> None:
    void = await prepared(psp, K.VOID)
    psp.double.errors = errors
    answer = await send(psp.connector, void)
    if errors == 2:  # as many as the sender's sendings
        assert is_doubt(answer)
        assert await psp.connector.query(K.VOID, void.reference, void) is None
        answer = await send(psp.connector, void)  # recovery's
    assert answer.verdict is Verdict.APPROVED
    assert await psp.effects(void.reference) == 1


async def test_what_is_left_is_given_back_once_whatever_error_stripe_keeps(psp: StripePsp) -> None:
    request = request_of(capture=True)
    answer = await send(psp.connector, request)
    request.target_transaction_id = answer.connector_transaction_id
    psp.double.errors = 1
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))
    assert await psp.held_minor(request.reference) == 1000
    for _ in range(2):
        told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
        assert told.verdict is Verdict.CANCELED
    assert [refund["amount"] for refund in psp.double.refunds.values()] == [1000]


async def test_charge_that_was_given_back_as_a_whole_is_not_told_as_one_that_stands(
    psp: StripePsp,
) -> None:
    request = request_of(capture=True)
    sent = await send(psp.connector, request)
    refund = request_of(K.REFUND, 400, target_transaction_id=sent.connector_transaction_id)
    await send(psp.connector, refund)
    assert (await found_of(psp, request)).verdict is Verdict.APPROVED
    await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    for request.target_transaction_id in ("", sent.connector_transaction_id):
        found = await found_of(psp, request)
        assert (found.verdict, found.connector_transaction_id) == (
            Verdict.CANCELED,
            sent.connector_transaction_id,
        )


async def test_part_is_given_back_under_one_key(psp: StripePsp) -> None:
    capture = await prepared(psp, K.CAPTURE)
    capture.amount_minor, capture.final = 400, False
    await send(psp.connector, capture)
    # What else was captured stands.
    await send(
        psp.connector,
        request_of(K.CAPTURE, 600, target_transaction_id=capture.target_transaction_id, final=True),
    )
    for _ in range(2):
        told = await psp.connector.cancel(K.CAPTURE, capture.reference, capture)
        assert told.verdict is Verdict.CANCELED
    assert [refund["amount"] for refund in psp.double.refunds.values()] == [400]


async def test_absence_of_a_void_is_not_proved(psp: StripePsp) -> None:
    void = await prepared(psp, K.VOID)
    before = len(psp.double.requests)
    assert is_doubt(await psp.connector.cancel(K.VOID, void.reference, void))
    assert len(psp.double.requests) == before


async def test_error_that_is_none_of_a_cards_is_a_decline_too(psp: StripePsp) -> None:
    request = request_of(payment_method_token=f"{DECLINE_TOKEN}{AUTHENTICATION_FAILURE}")
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.DECLINED
    assert outcome_of(answer).response_code is ResponseCode.AUTHENTICATION_REQUIRED
    assert outcome_of(answer).connector_code == AUTHENTICATION_FAILURE
    assert answer.connector_transaction_id
