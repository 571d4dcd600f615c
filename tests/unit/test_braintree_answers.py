"""Which of Braintree's answers are definite, and that none is more than unusable."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.connectors import values
from gateway.connectors.base import Unusable
from gateway.connectors.braintree import answers
from gateway.connectors.braintree.answers import read
from gateway.connectors.http import Response
from gateway.domain.model import ConnectorAnswer

FIELD = "authorizePaymentMethod"


def error(error_class: str = "", **more: Any) -> dict[str, Any]:
    extensions = {"errorClass": error_class} if error_class else {}
    return {"message": "m", "extensions": extensions | more}


def answer(status: int, **body: Any) -> Response:
    return Response(status, json.dumps(body).encode())


@pytest.mark.parametrize(
    "response",
    [
        answer(200, data={FIELD: None}, errors=[error("VALIDATION", legacyCode="91564")]),
        answer(200, data=None, errors=[error("AUTHENTICATION")]),
        answer(403, data=None, errors=[error("AUTHORIZATION")]),
        answer(429, errors=[error("RESOURCE_LIMIT")]),
        # A request error: there is no data, so nothing was executed.
        answer(200, errors=[error()]),
        answer(400, errors=[{"message": "Syntax Error"}]),
        answer(200, data={FIELD: None}, errors=[error("VALIDATION"), error("NOT_FOUND")]),
    ],
)
def test_nothing_was_done(response: Response) -> None:
    answered = read(response, FIELD)
    assert answered.is_refusal
    assert not answered.told


@pytest.mark.parametrize(
    "response",
    [
        answer(200, data={FIELD: None}),
        answer(200, data={FIELD: None}, errors=[]),
        answer(200, data={FIELD: None}, errors=[error("INTERNAL")]),
        answer(200, data={FIELD: None}, errors=[error("SERVICE_AVAILABILITY")]),
        answer(200, data={FIELD: None}, errors=[error("A_NEW_ONE")]),
        answer(200, data={FIELD: None}, errors=[error()]),
        answer(200, data={FIELD: None}, errors=[error("VALIDATION"), error("INTERNAL")]),
        # Another request has the key, or this one is at work.
        answer(
            200,
            data={FIELD: None},
            errors=[error("VALIDATION", inputPath=["input", "apiRequestKey"])],
        ),
        # Of a proxy, or of an API that failed.
        answer(502, errors=[error()]),
        answer(500, data=None, errors=[error("VALIDATION")]),
        answer(404, errors=[error()]),
        answer(302, data={FIELD: {"transaction": {"id": "1"}}}),
        Response(200, b"<html>"),
        Response(200, b"[]"),
        Response(200, b'{"data": [], "errors": {"message": "m"}}'),
        Response(200, b""),
    ],
)
def test_it_may_have_been_done(response: Response) -> None:
    answered = read(response, FIELD)
    assert not answered.is_refusal
    assert not answered.told


def test_object_counts_whatever_errors_come_with_it() -> None:
    told = {"transaction": {"id": "1"}}
    answered = read(answer(200, data={FIELD: told}, errors=[error("INTERNAL")]), FIELD)
    assert answered.told == told


# --- objects that are not as documented -----------------------------------------------------------

REFERENCE = "op_1-1"
MONEY = {"value": "10.00", "currencyCode": "EUR"}
PROCESSOR = {
    "legacyCode": "1000",
    "message": "Approved",
    "cvvResponse": "MATCHES",
    "avsPostalCodeResponse": "MATCHES",
    "avsStreetAddressResponse": "MATCHES",
    "authorizationId": "A1",
    "retrievalReferenceNumber": "1",
}
TRANSACTION: dict[str, Any] = {
    "__typename": "Transaction",
    "id": "dHJhbnNhY3Rpb25fMQ",
    "orderId": REFERENCE,
    "status": "SETTLED",
    "amount": MONEY,
    "statusHistory": [
        {"__typename": "SettledEvent", "status": "SETTLED", "amount": MONEY},
        {
            "__typename": "GatewayRejectedEvent",
            "status": "GATEWAY_REJECTED",
            "gatewayRejectionReason": "DUPLICATE",
            "duplicateOf": {"id": "dA", "orderId": REFERENCE},
        },
        {
            "__typename": "AuthorizedEvent",
            "status": "AUTHORIZED",
            "amount": MONEY,
            "processorResponse": PROCESSOR,
            "networkResponse": {"code": "00"},
            "authorizationExpiresAt": "2030-01-02T03:04:05.000000Z",
        },
        {
            "__typename": "ProcessorDeclinedEvent",
            "status": "PROCESSOR_DECLINED",
            "declineType": "SOFT",
            "processorResponse": PROCESSOR,
            "merchantAdviceCodeResponse": {"code": "24"},
        },
    ],
    "paymentMethodSnapshot": {
        "__typename": "CreditCardTransactionDetails",
        "networkTransactionId": "n",
        "creditCard": {"brandCode": "MASTERCARD"},
    },
    "refunds": [{"id": "r", "orderId": "o", "status": "SETTLED", "amount": MONEY}],
    "partialCaptureDetails": {
        "childCaptures": [{"id": "c", "orderId": REFERENCE, "status": "SETTLED", "amount": MONEY}]
    },
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        [*sorted(answers.CAPTURED | answers.GONE), "AUTHORIZED", "VERIFIED", "9" * 40 + ".00"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def paths_of(told: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of an object are."""
    items = told.items() if isinstance(told, dict) else enumerate(told)
    for name, value in items:
        yield (*path, name)
        if isinstance(value, (dict, list)):
            yield from paths_of(value, (*path, name))


@given(
    st.sampled_from(sorted(paths_of(TRANSACTION), key=repr)),
    JSON,
    st.sampled_from([*sorted(answers.CAPTURED | answers.GONE), "AUTHORIZED"]),
)
@example(("status",), [], "SETTLED")
@example(("refunds", 0, "status"), {}, "SETTLED")
def test_no_answer_is_more_than_unusable(path: tuple[Any, ...], value: Any, status: str) -> None:
    told = copy.deepcopy(TRANSACTION) | {"status": status}
    within: Any = told
    for name in path[:-1]:
        within = within[name]
    within[path[-1]] = value
    for function in (
        lambda: answers.authorization(told, captured=None),
        lambda: answers.authorization(told, captured=True),
        lambda: answers.capture(told, REFERENCE),
        lambda: answers.void(told),
        lambda: answers.refund(told),
        lambda: answers.verification(told),
        lambda: answers.duplicate_of(told),
        lambda: answers.refunded_minor(told),
        lambda: answers.is_gone(told),
    ):
        try:
            said = function()
        except Unusable:
            continue
        if isinstance(said, ConnectorAnswer):
            assert len(said.connector_transaction_id) <= values.IDENTIFIER_LENGTH_MAX
            amount = None if said.outcome is None else said.outcome.amount_reported_minor
            assert amount is None or abs(amount) <= values.AMOUNT_ABS_MAX
