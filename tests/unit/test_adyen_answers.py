"""Which of Adyen's answers are definite, and what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.connectors.adyen import answers
from gateway.connectors.base import Unusable
from gateway.connectors.http import Response
from gateway.domain.model import ResponseCode, Verdict

REFERENCE = "op_1-1"
TRANSIENT = {"transient-error": "true"}


def error(status: int, type_: str = "validation", code: str = "167", **headers: str) -> Response:
    body = {"errorType": type_, "errorCode": code, "message": "m"}
    return Response(
        status, json.dumps(body).encode(), {k.replace("_", "-"): v for k, v in headers.items()}
    )


def paid(result: str, **more: Any) -> dict[str, Any]:
    return {
        "pspReference": "PSP1",
        "merchantReference": REFERENCE,
        "resultCode": result,
        "amount": {"currency": "EUR", "value": 1000},
        **more,
    }


@pytest.mark.parametrize(
    "response",
    [
        *(Response(status, b"") for status in (408, 409, 429, 500, 502, 503, 504)),
        error(500, "internal"),
        error(422, transient_error="true"),
        error(422, code="704"),
    ],
)
def test_it_may_have_been_done_or_be_done_yet(response: Response) -> None:
    assert answers.is_uncertain(response)


@pytest.mark.parametrize(
    "response",
    [
        *(error(status) for status in (400, 401, 403, 404, 405, 413, 422)),
        error(422, transient_error="false"),
        Response(200, b"{}"),
    ],
)
def test_it_was_decided_on(response: Response) -> None:
    assert not answers.is_uncertain(response)


def test_adyens_own_error_is_repeated_only_where_it_is_transient() -> None:
    assert not answers.may_repeat(error(500, "internal"))
    assert answers.may_repeat(error(500, "internal", transient_error="true"))
    assert answers.may_repeat(Response(502, b"<html>"))


@pytest.mark.parametrize("type_", ["configuration", "security", "validation"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422])
def test_a_refusal_is_adyens_by_its_status_and_its_type(status: int, type_: str) -> None:
    answer = answers.rejected(error(status, type_))
    assert answer.verdict is Verdict.FAILED
    assert answer.outcome is not None
    assert answer.outcome.response_code is ResponseCode.REJECTED_BY_CONNECTOR
    assert answer.outcome.connector_code == "167"
    without_code = answers.rejected(error(status, type_, code=""))
    assert without_code.outcome is not None
    assert without_code.outcome.connector_code == type_


@pytest.mark.parametrize(
    "response",
    [error(302), error(402), error(500), error(422, "internal"), Response(404, b"<html>")],
)
def test_what_is_no_refusal_of_adyens_settles_nothing(response: Response) -> None:
    with pytest.raises(Unusable):
        answers.rejected(response)


@pytest.mark.parametrize("value", [None, "", "much", "4 00", "\u0664", 400, "9" * 30])
def test_a_part_that_nobody_can_read_settles_nothing(value: object) -> None:
    more = {"authorisedAmountValue": value, "authorisedAmountCurrency": "EUR"}
    with pytest.raises(Unusable):
        answers.payment(paid("PartiallyAuthorised", additionalData=more), REFERENCE, can_act=False)


def test_a_part_that_was_authorized_is_called_so() -> None:
    more = {"authorisedAmountValue": "400", "authorisedAmountCurrency": "EUR"}
    told = paid("PartiallyAuthorised", additionalData=more)
    answer = answers.payment(told, REFERENCE, can_act=False)
    assert (answer.verdict, answer.currency) == (Verdict.APPROVED, "EUR")
    assert answer.outcome is not None
    assert answer.outcome.amount_reported_minor == 400
    assert answer.outcome.response_code is ResponseCode.PARTIALLY_APPROVED
    assert answer.outcome.connector_code == "PartiallyAuthorised"


@pytest.mark.parametrize(
    ("code", "raw", "unified"),
    [
        ("2", "51 : Insufficient funds", ResponseCode.INSUFFICIENT_FUNDS),
        ("99", "51 : Insufficient funds", ResponseCode.INSUFFICIENT_FUNDS),  # a new code of Adyen's
        ("99", "Z9 : New", ResponseCode.DECLINED_OTHER),
        ("6", "51 : Insufficient funds", ResponseCode.EXPIRED_CARD),
        # No approval, whatever is said.
        ("2", "00 : Approved", ResponseCode.DO_NOT_HONOR),
        ("2", "10 : Partial approval", ResponseCode.DO_NOT_HONOR),
    ],
)
def test_the_networks_code_leads_where_adyens_says_less(
    code: str, raw: str, unified: ResponseCode
) -> None:
    more = {"refusalReasonRaw": raw}
    told = paid("Refused", refusalReasonCode=code, refusalReason="no", additionalData=more)
    answer = answers.payment(told, REFERENCE, can_act=False)
    assert answer.outcome is not None
    assert answer.outcome.response_code is unified
    assert (answer.outcome.connector_code, answer.outcome.connector_message) == (code, "no")


@pytest.mark.parametrize("result", ["Success", "", "AuthenticationFinished", "authorised"])
def test_a_result_that_is_not_known_settles_nothing(result: str) -> None:
    with pytest.raises(Unusable):
        answers.payment(paid(result), REFERENCE, can_act=True)


def test_what_is_authorized_names_the_reference_and_a_decline_may_leave_it_out() -> None:
    for result in ("Authorised", "Refused"):
        with pytest.raises(Unusable):
            answers.payment(paid(result, merchantReference="op_2-1"), REFERENCE, can_act=False)
    unnamed = paid("Authorised")
    del unnamed["merchantReference"]
    with pytest.raises(Unusable):
        answers.payment(unnamed, REFERENCE, can_act=False)
    declined = answers.payment(unnamed | {"resultCode": "Refused"}, REFERENCE, can_act=False)
    assert declined.verdict is Verdict.DECLINED
    assert declined.outcome is not None
    assert declined.outcome.connector_code == "Refused"


@pytest.mark.parametrize(
    ("action", "can_act", "verdict"),
    [
        ({"url": "https://bank.example", "method": "GET"}, True, Verdict.REQUIRES_ACTION),
        ({"url": "https://bank.example"}, True, Verdict.REQUIRES_ACTION),
        # Nobody can be sent there, so nothing will be authorized.
        ({"url": "https://bank.example", "method": "POST"}, True, Verdict.DECLINED),
        ({"url": "http://bank.example", "method": "GET"}, True, Verdict.DECLINED),
        ({}, True, Verdict.DECLINED),
        ({"url": "https://bank.example", "method": "GET"}, False, Verdict.DECLINED),
    ],
)
def test_a_customer_acts_at_an_address_that_can_be_visited(
    action: dict[str, str], can_act: bool, verdict: Verdict
) -> None:
    told = paid("RedirectShopper", action=action)
    answer = answers.payment(told, REFERENCE, can_act=can_act)
    assert answer.verdict is verdict
    assert (answer.next_action is not None) == (verdict is Verdict.REQUIRES_ACTION)
    assert answer.connector_transaction_id == "PSP1"
