"""Adyen's connector against the double: what is Adyen's own, beyond the conformance suite."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from gateway.connectors.adyen import answers
from gateway.connectors.adyen.connector import KEY_VALIDITY_S, NO_RETURN_URL, widest
from gateway.connectors.base import Unusable
from gateway.connectors.http import Response
from gateway.domain.errors import Reason
from gateway.domain.model import (
    AdviceAction,
    AvsResult,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    Mode,
    OperationKind,
    ResponseCode,
    Verdict,
)
from tests.adyen_double import (
    ACTION_TOKEN,
    API_KEY,
    DECLINE_TOKEN,
    AdyenPsp,
    Refused,
    adyen_psp,
)
from tests.connector_conformance import (
    Fault,
    found_of,
    is_doubt,
    outcome_of,
    prepared,
    reference_made,
    request_of,
    send,
)

K = OperationKind


@pytest_asyncio.fixture
async def psp() -> AsyncIterator[AdyenPsp]:
    async with adyen_psp() as opened:
        yield opened


def body_of(psp: AdyenPsp, index: int = -1) -> dict[str, Any]:
    return psp.double.requests[index][2]


# --- requests -------------------------------------------------------------------------------------


async def test_requests_carry_the_key_the_account_and_the_reference(psp: AdyenPsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    headers = psp.double.headers[0]
    assert headers["x-api-key"] == API_KEY
    assert headers["idempotency-key"] == request.reference
    assert headers["content-type"] == "application/json"
    assert psp.double.requests[0][0] == "/v71/payments"
    assert body_of(psp)["reference"] == request.reference
    assert body_of(psp)["returnUrl"] == NO_RETURN_URL


@pytest.mark.parametrize(
    ("kind", "capture", "incremental", "delay", "more"),
    [
        (K.AUTHORIZE, True, True, 0, None),
        (K.AUTHORIZE, False, False, None, {"manualCapture": "true"}),
        (
            K.AUTHORIZE,
            False,
            True,
            None,
            {"manualCapture": "true", "authorisationType": "PreAuth"},
        ),
        (K.VERIFY, False, True, None, None),
    ],
)
async def test_each_payment_says_when_it_is_captured(
    psp: AdyenPsp, kind: K, capture: bool, incremental: bool, delay: int | None, more: object
) -> None:
    capabilities = widest(Mode.TEST)
    if not incremental:
        capabilities = replace(capabilities, operations=frozenset(K) - {K.INCREMENT})
    connector = psp.connect(5)
    connector._capabilities = capabilities
    await send(connector, request_of(kind, capture=capture))
    assert body_of(psp).get("captureDelayHours") == delay
    assert body_of(psp).get("additionalData") == more


@pytest.mark.parametrize(
    ("fields", "interaction", "model"),
    [
        ({}, "ContAuth", "CardOnFile"),
        ({"channel": "CHANNEL_TELEPHONE_ORDER"}, "Moto", "CardOnFile"),
        ({"initiator": "INITIATOR_MERCHANT"}, "ContAuth", "UnscheduledCardOnFile"),
        (
            {
                "initiator": "INITIATOR_MERCHANT",
                "stored_credential": {"mit_category": "MIT_CATEGORY_RECURRING"},
            },
            "ContAuth",
            "Subscription",
        ),
    ],
)
async def test_who_pays_and_how_is_told(
    psp: AdyenPsp, fields: dict[str, object], interaction: str, model: str
) -> None:
    request = request_of(fields={"customer_id": "cus_1", **fields})
    assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
    assert body_of(psp)["shopperInteraction"] == interaction
    assert body_of(psp)["recurringProcessingModel"] == model


async def test_descriptor_and_the_networks_id_of_the_first_payment_are_passed_on(
    psp: AdyenPsp,
) -> None:
    fields = {
        "customer_id": "cus_1",
        "statement_descriptor": "SHOP 7",
        "stored_credential": {"network_transaction_id": "MCC1"},
        "return_url": "https://shop.example/back",
    }
    await send(psp.connector, request_of(capture=True, fields=fields))
    assert body_of(psp)["shopperStatement"] == "SHOP 7"
    assert body_of(psp)["returnUrl"] == "https://shop.example/back"
    assert body_of(psp)["additionalData"] == {"networkTxReference": "MCC1"}


async def test_increment_asks_for_the_new_total(psp: AdyenPsp) -> None:
    request = await prepared(psp, K.INCREMENT, amount_minor=500)
    request.authorized_minor = 500
    assert (await send(psp.connector, request)).verdict is Verdict.PENDING
    assert body_of(psp)["amount"] == {"currency": "EUR", "value": 1000}
    assert psp.double.events[-1]["success"] == "true"


async def test_refund_acts_on_the_payment_and_not_on_its_capture(psp: AdyenPsp) -> None:
    capture = await prepared(psp, K.CAPTURE)
    payment_id = capture.target_transaction_id
    captured = await send(psp.connector, capture)
    assert captured.connector_transaction_id != payment_id
    refund = request_of(
        K.REFUND,
        target_transaction_id=captured.connector_transaction_id,
        payment_transaction_id=payment_id,
    )
    assert (await send(psp.connector, refund)).verdict is Verdict.PENDING
    assert psp.double.events[-1]["originalReference"] == payment_id
    assert psp.double.events[-1]["success"] == "true"


@pytest.mark.parametrize(
    ("token", "fields", "reason"),
    [
        ("", {"customer_id": "cus_1"}, Reason.FIELD_NOT_SUPPORTED),
        ("tok_visa", {}, Reason.INVALID_REQUEST),
        ("tok_visa", {"customer_id": "c7"}, Reason.INVALID_REQUEST),
        (
            "",
            {"payment_method": {"stored": {"stored_payment_method_id": "ABC"}}},
            Reason.INVALID_REQUEST,
        ),
    ],
)
async def test_token_that_nobody_owns_is_not_sent(
    psp: AdyenPsp, token: str, fields: dict[str, object], reason: Reason
) -> None:
    for kind in (K.AUTHORIZE, K.VERIFY):
        answer = await send(
            psp.connector, request_of(kind, payment_method_token=token, fields=fields)
        )
        assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=reason)
    assert psp.double.requests == []


async def test_stored_payment_method_is_charged_by_its_id(psp: AdyenPsp) -> None:
    fields = {
        "customer_id": "cus_1",
        "payment_method": {"stored": {"stored_payment_method_id": "M5N7TQ4TG5PFWR50"}},
    }
    request = request_of(payment_method_token="", fields=fields)
    assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
    assert body_of(psp)["paymentMethod"] == {
        "type": "scheme",
        "storedPaymentMethodId": "M5N7TQ4TG5PFWR50",
    }
    assert body_of(psp)["shopperReference"] == "cus_1"


# --- answers --------------------------------------------------------------------------------------


async def test_answer_tells_what_the_network_said(psp: AdyenPsp) -> None:
    outcome = outcome_of(await send(psp.connector, request_of()))
    assert (outcome.avs_result, outcome.avs_code) == (AvsResult.ADDRESS_ONLY, "A")
    assert (outcome.cvv_result, outcome.cvv_code) == (CvvResult.MATCH, "M")
    assert (outcome.auth_code, outcome.network_transaction_id) == ("044925", "MCC123456789012")
    assert outcome.network_code == ""  # "AUTHORISED" is none


@pytest.mark.parametrize(
    ("more", "unified", "network", "action", "retry_after_s"),
    [
        ({"refusalReasonRaw": "51 : Insufficient funds"}, "INSUFFICIENT_FUNDS", "51", "", None),
        ({"refusalReasonRaw": "N7 : CVV2 failure"}, "SECURITY_VIOLATION", "N7", "", None),
        ({"refusalReasonRaw": "Z9 : A new one"}, "DO_NOT_HONOR", "Z9", "", None),
        (
            {"merchantAdviceCode": "03 : Do not try again", "paymentMethod": "mc"},
            "DO_NOT_HONOR",
            "",
            "DO_NOT_RETRY",
            None,
        ),
        (
            {"merchantAdviceCode": "25: Retry after 24 hours", "paymentMethod": "mc"},
            "DO_NOT_HONOR",
            "",
            "RETRY_AFTER",
            86400,
        ),
        # Mastercard's codes are no other network's.
        ({"merchantAdviceCode": "03", "paymentMethod": "visa"}, "DO_NOT_HONOR", "", "", None),
    ],
)
async def test_refusal_tells_the_networks_code_and_advice(
    psp: AdyenPsp,
    more: dict[str, str],
    unified: str,
    network: str,
    action: str,
    retry_after_s: int | None,
) -> None:
    psp.way.alter = lambda told: told["additionalData"].update(more)
    answer = await send(psp.connector, request_of(payment_method_token=f"{DECLINE_TOKEN}2"))
    outcome = outcome_of(answer)
    assert outcome.response_code.name == unified
    assert (outcome.network_code, outcome.connector_code) == (network, "2")
    assert outcome.advice_action is AdviceAction[action or "UNSPECIFIED"]
    assert outcome.advice_retry_after_s == retry_after_s


async def test_payment_that_adyen_blocks_for_its_retries_is_not_to_be_retried(
    psp: AdyenPsp,
) -> None:
    answer = await send(psp.connector, request_of(payment_method_token=f"{DECLINE_TOKEN}46"))
    outcome = outcome_of(answer)
    assert outcome.advice_action is AdviceAction.DO_NOT_RETRY
    assert (outcome.advice_code, outcome.advice_scheme) == ("46", "adyen")


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        ("Error", Verdict.DECLINED),
        ("Cancelled", Verdict.CANCELED),
        ("Pending", Verdict.PENDING),
        ("Received", Verdict.PENDING),
    ],
)
async def test_every_result_code_has_its_verdict(
    psp: AdyenPsp, result: str, verdict: Verdict
) -> None:
    psp.way.alter = lambda told: told.update(resultCode=result)
    answer = await send(psp.connector, request_of())
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, verdict)


async def test_part_that_was_authorized_is_reported(psp: AdyenPsp) -> None:
    def part(told: dict[str, Any]) -> None:
        told["resultCode"] = "PartiallyAuthorised"
        told["additionalData"] |= {
            "authorisedAmountValue": "400",
            "authorisedAmountCurrency": "EUR",
        }

    psp.way.alter = part
    answer = await send(psp.connector, request_of())
    assert answer.verdict is Verdict.APPROVED
    assert outcome_of(answer).amount_reported_minor == 400


def ideal(**more: str) -> dict[str, Any]:
    return {
        "payment_method": {"redirect": {"method_type": "ideal", **more}},
        "return_url": "https://shop.example/back",
    }


async def test_customer_of_a_bank_is_sent_there_and_asked_about_by_the_key(psp: AdyenPsp) -> None:
    request = request_of(capture=True, payment_method_token="", fields=ideal(bank="1121"))
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.REQUIRES_ACTION
    assert answer.next_action is not None
    assert answer.next_action.redirect_url.startswith("https://checkoutshopper-test.adyen.com/")
    assert body_of(psp)["paymentMethod"] == {"type": "ideal", "issuer": "1121"}
    assert body_of(psp)["returnUrl"] == "https://shop.example/back"
    found = await found_of(psp, request)
    assert found.verdict is Verdict.REQUIRES_ACTION
    # Nothing at Adyen stops a customer who is at the bank: only Adyen tells the end.
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference, request))


async def test_method_that_the_connector_has_not_is_not_sent(psp: AdyenPsp) -> None:
    for type_ in ("card", "pix"):
        fields = {"payment_method": {"redirect": {"method_type": type_}}}
        request = request_of(payment_method_token="", fields=fields)
        answer = await send(psp.connector, request)
        assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.METHOD_NOT_SUPPORTED)
    assert psp.double.requests == []


@pytest.mark.parametrize("return_url", ["", "https://shop.example/back"])
async def test_card_that_needs_its_customer_is_declined(psp: AdyenPsp, return_url: str) -> None:
    fields = {"customer_id": "cus_1", "return_url": return_url}
    answer = await send(psp.connector, request_of(payment_method_token=ACTION_TOKEN, fields=fields))
    assert answer.verdict is Verdict.DECLINED
    assert outcome_of(answer).response_code is ResponseCode.AUTHENTICATION_REQUIRED


@pytest.mark.parametrize(
    "alteration",
    [
        {"merchantReference": "op_other-1"},
        {"pspReference": None},
        {"resultCode": "Success"},
        {"amount": {"currency": "EUR", "value": "1000"}},
        {"amount": {"currency": "USD", "value": 1000}},
    ],
)
async def test_answer_to_something_else_is_none(
    psp: AdyenPsp, alteration: dict[str, object]
) -> None:
    psp.way.alter = lambda told: told.update(alteration)
    assert is_doubt(await send(psp.connector, request_of()))


async def test_capture_of_another_payment_is_no_answer(psp: AdyenPsp) -> None:
    capture = await prepared(psp, K.CAPTURE)
    await send(psp.connector, capture)
    _, answer = psp.double.keys[capture.reference]
    assert answer is not None
    for name in ("paymentPspReference", "reference", "status"):
        was = answer[1][name]
        answer[1][name] = "other"
        assert is_doubt(await send(psp.connector, capture))
        answer[1][name] = was
    assert (await send(psp.connector, capture)).verdict is Verdict.PENDING


async def test_refused_request_failed_and_tells_adyens_code(psp: AdyenPsp) -> None:
    answer = await send(psp.connector, request_of(K.CAPTURE, target_transaction_id="NONE"))
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.FAILED)
    assert outcome_of(answer).response_code is ResponseCode.REJECTED_BY_CONNECTOR
    assert outcome_of(answer).connector_code == "167"


async def test_refused_credentials_fail_the_request(psp: AdyenPsp) -> None:
    answer = await send(psp.connect(5, api_key="another"), request_of())
    assert answer.verdict is Verdict.FAILED
    assert API_KEY not in repr(answer)


@pytest.mark.parametrize(
    ("failure", "requests"),
    [
        (Refused(422, "703", transient=True), 2),
        (Refused(503, "703", "internal", transient=True), 2),
        (Refused(500, "905", "internal"), 1),  # it says not to repeat
        (Refused(409, "704"), 1),
        (Refused(422, "704"), 1),  # another one with the key is at work, or was
    ],
)
async def test_error_is_repeated_where_adyen_calls_it_transient(
    psp: AdyenPsp, failure: Refused, requests: int
) -> None:
    psp.double.failures.append(failure)
    answer = await send(psp.connector, request_of())
    assert len(psp.double.requests) == requests
    assert answer.verdict is Verdict.APPROVED if requests == 2 else is_doubt(answer)


async def test_refusal_of_a_repeat_says_nothing_of_the_sending_before(psp: AdyenPsp) -> None:
    psp.way.disturb(Fault.LOST, times=1)
    psp.double.failures.append(Refused(422, "167"))
    assert is_doubt(await send(psp.connector, request_of()))
    assert len(psp.double.requests) == 1


async def test_error_that_stays_transient_leaves_a_doubt(psp: AdyenPsp) -> None:
    psp.double.failures.extend([Refused(422, "703", transient=True)] * 2)
    assert is_doubt(await send(psp.connector, request_of()))


async def test_card_number_in_a_message_is_masked(psp: AdyenPsp) -> None:
    psp.way.alter = lambda told: told.update(refusalReason="card 4242424242424242 declined")
    answer = await send(psp.connector, request_of(payment_method_token=f"{DECLINE_TOKEN}2"))
    assert answer.verdict is Verdict.DECLINED
    assert "4242424242424242" not in repr(answer)


# --- 3-D Secure -----------------------------------------------------------------------------------

AUTHENTICATED = {
    "eci": "05",
    "cavv": "AAABBZEEBgAAAAAAAAAAAAAAAAA=",
    "directory_server_transaction_id": "c5b808e7-1de1-4069-a17b-f70d3b3b1645",
    "version": "2.2.0",
}


def authenticated(**more: str) -> dict[str, Any]:
    return {"customer_id": "cus_1", "three_ds": {**AUTHENTICATED, **more}}


async def test_authentication_done_elsewhere_goes_with_the_payment(psp: AdyenPsp) -> None:
    for eci, status in (("05", "Y"), ("02", "Y"), ("06", "A"), ("01", "A")):
        request = request_of(fields=authenticated(eci=eci))
        assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
        assert body_of(psp)["mpiData"] == {
            "cavv": AUTHENTICATED["cavv"],
            "dsTransID": AUTHENTICATED["directory_server_transaction_id"],
            "eci": eci,
            "threeDSVersion": "2.2.0",
            "directoryResponse": status,
        }
    exempt = {"customer_id": "cus_1", "three_ds": {"exemption": "SCA_EXEMPTION_LOW_VALUE"}}
    assert (await send(psp.connector, request_of(fields=exempt))).verdict is Verdict.APPROVED
    assert body_of(psp)["additionalData"]["scaExemption"] == "lowValue"
    assert "mpiData" not in body_of(psp)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (authenticated(cavv=""), Reason.INVALID_REQUEST),
        (authenticated(version=""), Reason.INVALID_REQUEST),
        (authenticated(eci="07"), Reason.INVALID_REQUEST),
        (authenticated(eci=""), Reason.INVALID_REQUEST),
        ({"customer_id": "cus_1", "three_ds": {"eci": "05"}}, Reason.INVALID_REQUEST),
        (
            authenticated(exemption="SCA_EXEMPTION_DELEGATED_AUTHENTICATION"),
            Reason.FIELD_NOT_SUPPORTED,
        ),
        (
            {**authenticated(), "payment_method": {"redirect": {"method_type": "ideal"}}},
            Reason.FIELD_NOT_SUPPORTED,
        ),
    ],
)
async def test_authentication_that_proves_nothing_is_not_sent(
    psp: AdyenPsp, fields: dict[str, Any], reason: Reason
) -> None:
    answer = await send(psp.connector, request_of(fields=fields))
    assert (answer.delivery, answer.reason) == (Delivery.NOT_SENT, reason)
    assert psp.double.requests == []


# --- the key as proof -----------------------------------------------------------------------------


async def test_used_up_key_moves_no_money_and_lets_no_late_request_through(psp: AdyenPsp) -> None:
    for kind in (K.AUTHORIZE, K.CAPTURE, K.REFUND, K.INCREMENT, K.VERIFY):
        request = await prepared(psp, kind)
        before = len(psp.double.effects)
        for _ in range(2):
            told = await psp.connector.query(kind, request.reference, request)
            assert told == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.REFERENCE_CANCELED)
        assert is_doubt(await send(psp.connector, request))
        assert len(psp.double.effects) == before


@pytest.mark.parametrize("name", ["status", "paymentReference", "reference"])
async def test_only_a_cancel_of_the_reference_that_was_received_uses_it_up(
    psp: AdyenPsp, name: str
) -> None:
    request = request_of()
    await psp.connector.query(K.AUTHORIZE, request.reference, request)
    _, answer = psp.double.keys[request.reference]
    assert answer is not None
    answer[1][name] = "other"
    assert is_doubt(await psp.connector.query(K.AUTHORIZE, request.reference, request))


async def test_answer_to_a_request_of_another_kind_settles_nothing(psp: AdyenPsp) -> None:
    payment, capture = request_of(), await prepared(psp, K.CAPTURE)
    for request in (payment, capture):
        await send(psp.connector, request)
    (one, paid), (other, received) = (
        psp.double.keys[each.reference] for each in (payment, capture)
    )
    assert paid is not None
    assert received is not None
    received[1]["reference"], paid[1]["merchantReference"] = payment.reference, capture.reference
    psp.double.keys |= {payment.reference: (one, received), capture.reference: (other, paid)}
    for request in (payment, capture):
        assert is_doubt(await psp.connector.query(request.kind, request.reference, request))


async def test_key_that_is_forgotten_all_the_same_takes_the_payment_back(psp: AdyenPsp) -> None:
    """Keys are promised to be one for a company account; the question cancels even if not."""
    request = request_of()
    await send(psp.connector, request)
    psp.double.keys.clear()
    told = await psp.connector.query(K.AUTHORIZE, request.reference, request)
    assert told == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.REFERENCE_CANCELED)
    assert await psp.held_minor(request.reference) == 0


async def test_key_that_adyen_refuses_instead_of_answering_leaves_the_doubt(psp: AdyenPsp) -> None:
    psp.double.strict_keys = True
    for kind in (K.AUTHORIZE, K.CAPTURE):
        request = await prepared(psp, kind)
        await send(psp.connector, request)
        assert is_doubt(await psp.connector.query(kind, request.reference, request))
        assert is_doubt(await psp.connector.cancel(kind, request.reference, request))
        assert await psp.effects(request.reference) == 1


async def test_past_half_of_the_keys_validity_nothing_is_asked(psp: AdyenPsp) -> None:
    for reference in (reference_made(KEY_VALIDITY_S / 2 + 60), "op_00000001-1"):
        request = request_of(reference=reference)
        await send(psp.connector, request)
        before = len(psp.double.requests)
        for kind in (K.AUTHORIZE, K.VOID):
            assert is_doubt(await psp.connector.query(kind, reference, request))
        assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, reference, request))
        assert len(psp.double.requests) == before
    still = reference_made(KEY_VALIDITY_S / 2 - 60)
    told = await psp.connector.query(K.AUTHORIZE, still, request_of(reference=still))
    assert told is not None
    assert told.reason == Reason.REFERENCE_CANCELED


async def test_doubt_without_its_request_stays_one(psp: AdyenPsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    assert is_doubt(await psp.connector.query(K.AUTHORIZE, request.reference))
    assert is_doubt(await psp.connector.cancel(K.AUTHORIZE, request.reference))
    assert await psp.held_minor(request.reference) == 1000


@pytest.mark.parametrize("kind", [K.REFUND, K.INCREMENT])
async def test_what_cannot_be_taken_back_is_not_called_so(psp: AdyenPsp, kind: K) -> None:
    request = await prepared(psp, kind)
    await send(psp.connector, request)
    assert is_doubt(await psp.connector.cancel(kind, request.reference, request))
    found = await found_of(psp, request)
    assert found.verdict is Verdict.PENDING


async def test_refused_authorization_is_told_by_its_cancellation(psp: AdyenPsp) -> None:
    request = request_of(payment_method_token=f"{DECLINE_TOKEN}12")
    await send(psp.connector, request)
    told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    assert told.verdict is Verdict.DECLINED


async def test_verification_that_stands_is_told_by_its_cancellation(psp: AdyenPsp) -> None:
    request = request_of(K.VERIFY)
    sent = await send(psp.connector, request)
    before = len(psp.double.requests)
    assert await psp.connector.cancel(K.VERIFY, request.reference, request) == sent
    assert len(psp.double.requests) == before + 1


async def test_what_takes_something_back_names_what_it_takes_back(psp: AdyenPsp) -> None:
    """An authorization as a whole, a capture by its amount."""
    for kind, endpoint, suffix in (
        (K.AUTHORIZE, "reversals", "reversal"),
        (K.CAPTURE, "refunds", "refund"),
    ):
        request = await prepared(psp, kind)
        sent = await send(psp.connector, request)
        payment_id = request.target_transaction_id or sent.connector_transaction_id
        told = await psp.connector.cancel(kind, request.reference, request)
        assert told.verdict is Verdict.PENDING
        path, key, body = psp.double.requests[-1]
        assert (path, key) == (
            f"/v71/payments/{payment_id}/{endpoint}",
            f"{request.reference}-{suffix}",
        )
        amount = {"currency": "EUR", "value": 1000} if kind is K.CAPTURE else None
        assert body.get("amount") == amount


async def test_reversal_goes_to_the_payment_that_is_known_without_asking(psp: AdyenPsp) -> None:
    request = request_of()
    payment_id = (await send(psp.connector, request)).connector_transaction_id
    request.target_transaction_id = payment_id
    told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    assert told.verdict is Verdict.PENDING
    assert told.connector_transaction_id != payment_id
    assert psp.double.requests[-1][:2] == (
        f"/v71/payments/{payment_id}/reversals",
        f"{request.reference}-reversal",
    )
    assert len(psp.double.requests) == 2
    assert await psp.held_minor(request.reference) == 0


@pytest.mark.parametrize("type_", ["{}", "[]", "1", '"internal"', "null"])
def test_refusal_of_no_known_type_settles_nothing(type_: str) -> None:
    with pytest.raises(Unusable):
        answers.rejected(Response(422, f'{{"errorType": {type_}}}'.encode()))
