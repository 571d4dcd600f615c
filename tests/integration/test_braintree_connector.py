"""Braintree's connector against the double: what is its own, beyond the conformance suite."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from graphql import parse, validate

from gateway.connectors.braintree import documents
from gateway.connectors.braintree.connector import API_VERSION, widest
from gateway.connectors.braintree.kind import usual
from gateway.connectors.http import MaybeSent, Response
from gateway.domain.errors import Reason
from gateway.domain.model import (
    SENT_KINDS,
    AdviceAction,
    AvsResult,
    CaptureMethod,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    Mode,
    OperationKind,
    ResponseCode,
    Verdict,
)
from gateway.routing.breakers import is_failure
from gateway.routing.cascade import Next
from gateway.routing.cascade import after as cascade_after
from tests.braintree_double import (
    DECLINE,
    MERCHANT_ACCOUNTS,
    PRIVATE_KEY,
    PUBLIC_KEY,
    REJECT,
    SCHEMA,
    BraintreePsp,
    braintree_psp,
    refused,
)
from tests.connector_conformance import (
    Fault,
    found_of,
    is_doubt,
    outcome_of,
    prepared,
    request_of,
    send,
)

K = OperationKind


@pytest_asyncio.fixture
async def psp() -> AsyncIterator[BraintreePsp]:
    async with braintree_psp() as opened:
        yield opened


def single(psp: BraintreePsp) -> Any:
    """A connector to an account that has one capture for each authorization."""
    return psp.connect(5, capabilities=usual(widest(Mode.TEST, 5)))


@pytest.mark.parametrize(
    "name", [name for name in vars(documents) if name.isupper() and name[0] != "_"]
)
def test_every_document_is_valid_against_the_published_schema(name: str) -> None:
    assert validate(SCHEMA, parse(getattr(documents, name))) == []


async def test_requests_carry_the_pinned_version_the_key_and_the_reference(
    psp: BraintreePsp,
) -> None:
    request = request_of()
    await send(psp.connector, request)
    headers = psp.double.headers[0]
    token = b64encode(f"{PUBLIC_KEY}:{PRIVATE_KEY}".encode()).decode()
    assert headers["authorization"] == f"Basic {token}"
    assert headers["braintree-version"] == API_VERSION
    assert headers["content-type"] == "application/json"
    assert psp.double.requests == [("authorizePaymentMethod", request.reference)]
    (transaction,) = psp.double.transactions()
    assert (transaction["orderId"], transaction["method"]) == (request.reference, "visa")


async def test_answer_tells_what_the_network_said(psp: BraintreePsp) -> None:
    answer = await send(psp.connector, request_of())
    outcome = outcome_of(answer)
    assert (outcome.avs_result, outcome.avs_code) == (
        AvsResult.POSTAL_CODE_ONLY,
        "NOT_PROVIDED/MATCHES",
    )
    assert (outcome.cvv_result, outcome.cvv_code) == (CvvResult.MATCH, "MATCHES")
    assert (outcome.connector_code, outcome.auth_code) == ("1000", "A1B2C3")
    assert (outcome.network_transaction_id, outcome.retrieval_reference_number) == (
        "nti_1",
        "1234567",
    )
    assert (outcome.network_code, outcome.network_code_scheme) == ("00", "visa")
    assert answer.authorization_expires_at == datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("method", "action", "retry_after_s", "code", "scheme"),
    [
        ("declined_2000", AdviceAction.RETRY_LATER, None, "SOFT", "braintree"),
        ("declined_2004", AdviceAction.DO_NOT_RETRY, None, "HARD", "braintree"),
        ("declined_2046_mastercard_24", AdviceAction.RETRY_AFTER, 3600, "24", "mastercard"),
        ("declined_2046_mastercard_03", AdviceAction.DO_NOT_RETRY, None, "03", "mastercard"),
    ],
)
async def test_decline_tells_advice_of_the_network_before_braintrees(
    psp: BraintreePsp,
    method: str,
    action: AdviceAction,
    retry_after_s: int | None,
    code: str,
    scheme: str,
) -> None:
    request = request_of(payment_method_token=f"tok_{method}")
    outcome = outcome_of(await send(psp.connector, request))
    assert (outcome.advice_action, outcome.advice_retry_after_s) == (action, retry_after_s)
    assert (outcome.advice_code, outcome.advice_scheme) == (code, scheme)
    assert outcome.network_code == "51"


@pytest.mark.parametrize(
    ("method", "code", "unified"),
    [
        (f"tok_{DECLINE}2004", "2004", ResponseCode.EXPIRED_CARD),
        (f"tok_{REJECT}CVV", "CVV", ResponseCode.SECURITY_VIOLATION),
    ],
)
async def test_verification_is_declined_as_an_authorization_is(
    psp: BraintreePsp, method: str, code: str, unified: ResponseCode
) -> None:
    answer = await send(psp.connector, request_of(K.VERIFY, payment_method_token=method))
    assert answer.verdict is Verdict.DECLINED
    assert (outcome_of(answer).connector_code, outcome_of(answer).response_code) == (code, unified)


# --- payment methods and merchant accounts --------------------------------------------------------


async def test_stored_payment_method_is_charged_by_its_id(psp: BraintreePsp) -> None:
    stored = {"payment_method": {"stored": {"stored_payment_method_id": "cGF5bWVudA"}}}
    request = request_of(payment_method_token="", fields=stored, capture=True)
    assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
    (transaction,) = psp.double.transactions()
    assert transaction["method"] == "cGF5bWVudA"


async def test_payment_method_that_braintree_has_not_is_not_sent(psp: BraintreePsp) -> None:
    for kind in (K.AUTHORIZE, K.VERIFY):
        answer = await send(psp.connector, request_of(kind, payment_method_token=""))
        assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.FIELD_NOT_SUPPORTED)
    assert psp.double.requests == []


async def test_currency_without_a_merchant_account_is_not_sent(psp: BraintreePsp) -> None:
    euros = psp.connect(5, merchant_accounts={"EUR": MERCHANT_ACCOUNTS["EUR"]})
    for kind in (K.AUTHORIZE, K.VERIFY):
        answer = await send(euros, request_of(kind, currency="USD"))
        assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CURRENCY_NOT_SUPPORTED)
    assert psp.double.requests == []


FIRST, SUBSEQUENT = "STORED_CREDENTIAL_USAGE_FIRST", "STORED_CREDENTIAL_USAGE_SUBSEQUENT"
MERCHANT = {"initiator": "INITIATOR_MERCHANT"}


def stored_as(usage: str, category: str = "", network_id: str = "") -> dict[str, Any]:
    """The stored-credential block of a request."""
    told = {"usage": usage}
    if category:
        told["mit_category"] = f"MIT_CATEGORY_{category}"
    if network_id:
        told["network_transaction_id"] = network_id
    return {"stored_credential": told}


@pytest.mark.parametrize(
    ("fields", "initiator", "vault"),
    [
        ({}, None, None),
        ({"channel": "CHANNEL_ECOMMERCE"}, None, None),
        ({"channel": "CHANNEL_MAIL_ORDER"}, "MOTO", None),
        ({"channel": "CHANNEL_TELEPHONE_ORDER"}, "MOTO", None),
        (MERCHANT, "UNSCHEDULED", None),
        (stored_as(FIRST), None, {"status": "WILL_VAULT"}),
        (stored_as(FIRST, "RECURRING"), "RECURRING_FIRST", {"status": "WILL_VAULT"}),
        (stored_as(FIRST, "INSTALLMENT"), "INSTALLMENT_FIRST", {"status": "WILL_VAULT"}),
        # The customer pays: the network's id is not told.
        (stored_as(SUBSEQUENT, network_id="n1"), None, {"status": "VAULTED"}),
        (
            MERCHANT | stored_as(SUBSEQUENT, "RECURRING", "n1"),
            "RECURRING",
            {"status": "VAULTED", "verifyingNetworkTransactionId": "n1"},
        ),
        (
            MERCHANT | stored_as(SUBSEQUENT, "RESUBMISSION", "n1"),
            "UNSCHEDULED",
            {"status": "VAULTED", "verifyingNetworkTransactionId": "n1"},
        ),
    ],
)
async def test_who_pays_and_what_is_stored_are_told(
    psp: BraintreePsp, fields: dict[str, Any], initiator: str | None, vault: dict[str, str] | None
) -> None:
    for capture in (False, True):
        request = request_of(fields=fields, capture=capture)
        assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
        transaction = psp.double.transactions()[-1]
        assert (transaction["initiator"], transaction["vault"]) == (initiator, vault)
        assert await psp.effects(request.reference) == 1


async def test_what_braintree_stored_is_not_told_to_be_stored_elsewhere(psp: BraintreePsp) -> None:
    fields = {
        "payment_method": {"stored": {"stored_payment_method_id": "cGF5bWVudA"}},
        **MERCHANT,
        **stored_as(SUBSEQUENT, "RECURRING", "n1"),
    }
    await send(psp.connector, request_of(payment_method_token="", fields=fields))
    (transaction,) = psp.double.transactions()
    assert (transaction["initiator"], transaction["vault"]) == ("RECURRING", None)


# --- doubts ---------------------------------------------------------------------------------------


async def test_search_that_does_not_find_proves_nothing(psp: BraintreePsp) -> None:
    request = request_of()
    psp.way.disturb(Fault.SILENT)
    assert is_doubt(await send(await psp.impatient(), request))
    psp.way.clear()
    psp.double.searchable = False
    assert await psp.connector.query(K.AUTHORIZE, request.reference, request) is None
    told = await psp.connector.cancel(K.AUTHORIZE, request.reference, request)
    assert told == ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.RECOVERED)
    psp.double.searchable = True
    found = await found_of(psp, request)
    assert found.verdict is Verdict.APPROVED


async def test_account_that_heeds_no_keys_is_not_charged_twice(psp: BraintreePsp) -> None:
    """The repeat is rejected as a duplicate of the first, which is what is answered."""
    psp.double.heeds_keys, psp.double.searchable = False, False
    request = request_of()
    psp.way.disturb(Fault.RESET, times=1)
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.APPROVED
    assert await psp.effects(request.reference) == 1
    first, second = psp.double.transactions()
    assert (first["status"], second["status"]) == ("AUTHORIZED", "GATEWAY_REJECTED")
    assert answer.connector_transaction_id == first["id"]
    psp.double.searchable = True
    found = await found_of(psp, request)
    assert found.connector_transaction_id == first["id"]


@pytest.mark.parametrize("first", [None, {"id": "transaction_1", "orderId": "another"}])
async def test_duplicate_of_what_is_not_told_is_a_doubt_and_no_decline(
    psp: BraintreePsp, first: Any
) -> None:
    def hide(told: dict[str, Any]) -> None:
        transaction = told["data"]["authorizePaymentMethod"]["transaction"]
        transaction["statusHistory"][0]["duplicateOf"] = first

    psp.double.heeds_keys = False
    psp.way.disturb(Fault.RESET, times=1)
    psp.way.alter = hide
    request = request_of()
    assert is_doubt(await send(psp.connector, request))
    assert await psp.effects(request.reference) == 1


async def test_search_that_finds_only_the_duplicate_tells_of_no_decline(psp: BraintreePsp) -> None:
    psp.double.heeds_keys = False
    psp.way.disturb(Fault.RESET, times=1)
    request = request_of()
    first = (await send(psp.connector, request)).connector_transaction_id
    assert (await found_of(psp, request)).connector_transaction_id == first
    # The search lags, and has not found the first one yet.
    del psp.double.nodes[first]
    assert len(psp.double.nodes) == 1
    assert await psp.connector.query(K.AUTHORIZE, request.reference, request) is None


async def test_what_two_transactions_hold_under_one_reference_is_told(psp: BraintreePsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    psp.double.keys.clear()  # as if the key were forgotten
    await send(psp.connector, request)
    found = await psp.connector.query(K.AUTHORIZE, request.reference, request)
    assert outcome_of(found).amount_reported_minor == 2000
    reversal = request_of(K.REVERSAL, target_reference=request.reference)
    assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
    assert await psp.held_minor(request.reference) == 0


async def test_request_under_way_is_not_taken_for_refused(psp: BraintreePsp) -> None:
    request = request_of()
    psp.double.keys[request.reference] = ("another input, or still at work", None)
    assert is_doubt(await send(psp.connector, request))


async def test_verification_is_sent_once(psp: BraintreePsp) -> None:
    request = request_of(K.VERIFY)
    psp.way.disturb(Fault.RESET, times=1)
    assert is_doubt(await send(psp.connector, request))
    assert await psp.effects(request.reference) == 1
    assert len(psp.double.requests) == 1


@pytest.mark.parametrize("error_class", ["INTERNAL", "SERVICE_AVAILABILITY", "A_NEW_ONE", ""])
async def test_error_of_a_class_that_may_have_acted_is_a_doubt(
    psp: BraintreePsp, error_class: str
) -> None:
    psp.double.error = refused(error_class)
    for kind in (K.AUTHORIZE, K.VERIFY):
        assert is_doubt(await send(psp.connector, request_of(kind)))


@pytest.mark.parametrize(
    ("error_class", "code", "told"),
    [
        ("VALIDATION", "91564", "91564"),
        ("AUTHORIZATION", "", "AUTHORIZATION"),
        ("NOT_FOUND", "", "NOT_FOUND"),
    ],
)
async def test_error_of_a_class_that_refuses_fails_the_request(
    psp: BraintreePsp, error_class: str, code: str, told: str
) -> None:
    psp.double.error = refused(error_class, code)
    answer = await send(psp.connector, request_of())
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.FAILED)
    assert outcome_of(answer).response_code is ResponseCode.REJECTED_BY_CONNECTOR
    assert outcome_of(answer).connector_code == told
    assert len(psp.double.requests) == 1


@pytest.mark.parametrize("kind", [K.AUTHORIZE, K.CAPTURE, K.VOID, K.REFUND, K.VERIFY])
async def test_what_was_limited_each_time_was_surely_not_done(psp: BraintreePsp, kind: K) -> None:
    request = await prepared(psp, kind)
    before = len(psp.double.requests)
    psp.double.error = refused("RESOURCE_LIMIT")
    answer = await send(single(psp), request)
    assert (answer.delivery, answer.verdict) == (Delivery.NOT_SENT, Verdict.UNKNOWN)
    assert answer.reason is Reason.CONNECTOR_RATE_LIMITED
    assert len(psp.double.requests) - before == (1 if kind is K.VERIFY else 2)
    assert cascade_after(answer) is Next.ANOTHER
    assert is_failure(answer)  # so that a breaker opens where it lasts


async def test_limit_of_the_repeat_says_nothing_of_the_first_sending(
    psp: BraintreePsp, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    connector = single(psp)
    through = connector._request

    async def lost_and_then_limited(*args: Any, **more: Any) -> Response:
        if psp.double.error is not None:
            return await through(*args, **more)  # type: ignore[no-any-return]
        await through(*args, **more)
        psp.double.error = refused("RESOURCE_LIMIT")
        raise MaybeSent(Reason.CONNECTION_LOST)

    monkeypatch.setattr(connector, "_request", lost_and_then_limited)
    assert is_doubt(await send(connector, request))
    assert await psp.effects(request.reference) == 1


@pytest.mark.parametrize(
    ("first", "is_definite"), [("RESOURCE_LIMIT", True), ("INTERNAL", False), ("", False)]
)
async def test_refusal_of_the_repeat_is_the_requests_where_the_first_was_limited(
    psp: BraintreePsp, monkeypatch: pytest.MonkeyPatch, first: str, is_definite: bool
) -> None:
    connector = single(psp)
    through = connector._request
    errors = [refused(first) if first else None, refused("VALIDATION")]

    async def one_after_the_other(*args: Any, **more: Any) -> Response:
        psp.double.error = errors.pop(0)
        response: Response = await through(*args, **more)
        if psp.double.error is None:
            raise MaybeSent(Reason.CONNECTION_LOST)
        return response

    monkeypatch.setattr(connector, "_request", one_after_the_other)
    answer = await send(connector, request_of())
    assert errors == []
    if is_definite:
        assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.FAILED)
    else:
        assert is_doubt(answer)


async def test_document_that_is_not_executed_fails_the_request(
    psp: BraintreePsp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be where the API lost a field: an answer without data."""
    monkeypatch.setattr(documents, "VERIFY", "mutation Send { fieldThatIsNot }")
    answer = await send(psp.connector, request_of(K.VERIFY))
    assert answer.verdict is Verdict.FAILED
    assert psp.double.nodes == {}


async def test_refused_credentials_fail_the_request_and_are_not_told(psp: BraintreePsp) -> None:
    answer = await send(psp.connect(5, private_key="anotherprivatekey"), request_of())
    assert answer.verdict is Verdict.FAILED
    assert outcome_of(answer).connector_code == "AUTHENTICATION"
    assert "anotherprivatekey" not in repr(answer)


@pytest.mark.parametrize(
    "alter",
    [
        lambda told: told.update(clientMutationId="op_other-1"),
        lambda told: told["transaction"].update(orderId="op_other-1"),
        lambda told: told["transaction"].update(id=None),
        lambda told: told["transaction"].update(status="A_NEW_ONE"),
        lambda told: told["transaction"].update(statusHistory="none"),
        lambda told: told["transaction"]["amount"].update(value="10.001"),
        lambda told: told.update(transaction=None),
    ],
)
async def test_answer_about_something_else_is_no_answer(psp: BraintreePsp, alter: Any) -> None:
    psp.way.alter = lambda told: alter(told["data"]["authorizePaymentMethod"])
    assert is_doubt(await send(psp.connector, request_of()))


@pytest.mark.parametrize(
    ("kind", "field", "result"),
    [
        (K.CAPTURE, "captureTransaction", "transaction"),
        (K.VOID, "voidTransaction", "transaction"),
        (K.REFUND, "refundTransaction", "refund"),
    ],
)
async def test_follow_up_of_another_transaction_is_no_answer(
    psp: BraintreePsp, kind: K, field: str, result: str
) -> None:
    def alter(told: dict[str, Any]) -> None:
        object_ = told["data"][field][result]
        object_["id"] = "transaction_99"
        object_["refundedTransaction"] = {"id": "transaction_99"}

    request = await prepared(psp, kind)
    psp.way.alter = alter
    assert is_doubt(await send(psp.connector, request))


async def test_card_number_in_a_message_is_masked(psp: BraintreePsp) -> None:
    psp.double.error = refused("VALIDATION")
    psp.double.error.message = "card 4242424242424242 is invalid"
    answer = await send(psp.connector, request_of())
    assert answer.verdict is Verdict.FAILED
    assert "4242424242424242" not in repr(answer)


# --- captures, voids, refunds ---------------------------------------------------------------------


async def test_authorization_that_expired_at_braintree_is_told_so(psp: BraintreePsp) -> None:
    request = request_of()
    await send(psp.connector, request)
    (transaction,) = psp.double.transactions()
    psp.double.change(transaction, "AUTHORIZATION_EXPIRED")
    found = await found_of(psp, request)
    assert found.verdict is Verdict.EXPIRED


async def test_what_was_authorized_is_told_after_less_was_captured(psp: BraintreePsp) -> None:
    request = request_of()
    request.target_transaction_id = (await send(psp.connector, request)).connector_transaction_id
    target = request.target_transaction_id
    capture = request_of(K.CAPTURE, 400, target_transaction_id=target, final=True)
    assert outcome_of(await send(psp.connector, capture)).amount_reported_minor == 400
    found = await psp.connector.query(K.AUTHORIZE, request.reference, request)
    assert outcome_of(found).amount_reported_minor == 1000
    assert await psp.held_minor(request.reference) == 400


async def test_capture_that_another_one_made_is_not_found(psp: BraintreePsp) -> None:
    request = await prepared(psp, K.CAPTURE)
    await send(psp.connector, request)
    other = request_of(K.CAPTURE, target_transaction_id=request.target_transaction_id, final=True)
    assert await psp.connector.query(K.CAPTURE, other.reference, other) is None
    answer = await send(psp.connector, other)
    assert answer.verdict is Verdict.FAILED
    assert outcome_of(answer).connector_code == "91507"


async def test_capture_that_is_declined_when_it_is_settled_failed(psp: BraintreePsp) -> None:
    request = await prepared(psp, K.CAPTURE)
    await send(psp.connector, request)
    (transaction,) = psp.double.transactions()
    psp.double.change(
        transaction,
        "SETTLEMENT_DECLINED",
        processorResponse={"legacyCode": "4001", "message": "Settlement Declined"},
    )
    found = await found_of(psp, request)
    assert found.verdict is Verdict.FAILED
    assert outcome_of(found).connector_code == "4001"


async def test_account_with_one_capture_asks_for_nothing_before_it(psp: BraintreePsp) -> None:
    for kind in (K.CAPTURE, K.REFUND):
        request = await prepared(psp, kind)
        before = len(psp.double.requests)
        assert (await send(single(psp), request)).verdict is Verdict.APPROVED
        assert len(psp.double.requests) == before + 1


async def test_last_part_of_several_captures_closes_the_authorization(psp: BraintreePsp) -> None:
    assert CaptureMethod.MANUAL_MULTIPLE in psp.connector.capabilities.capture_methods
    target = (await send(psp.connector, request_of())).connector_transaction_id
    for amount, final in ((300, False), (200, True)):
        part = request_of(K.CAPTURE, amount, target_transaction_id=target, final=final)
        answer = await send(psp.connector, part)
        assert answer.connector_transaction_id != target
    assert psp.double.nodes[target]["status"] == "SETTLEMENT_CONFIRMED"
    assert psp.double.standing_minor(psp.double.nodes[target]) == 500


async def test_refund_that_no_part_has_enough_left_for_is_not_sent(psp: BraintreePsp) -> None:
    target = (await send(psp.connector, request_of())).connector_transaction_id
    for amount, final in ((300, False), (200, True)):
        part = request_of(K.CAPTURE, amount, target_transaction_id=target, final=final)
        await send(psp.connector, part)
    for amount in (250, 150):  # of the first, of the second
        refund = request_of(K.REFUND, amount, target_transaction_id=target)
        assert (await send(psp.connector, refund)).verdict is Verdict.APPROVED
    refund = request_of(K.REFUND, 100, target_transaction_id=target)
    answer = await send(psp.connector, refund)
    assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.AMOUNT_NOT_SUPPORTED)


async def test_refund_before_settlement_fails_with_braintrees_code(psp: BraintreePsp) -> None:
    psp.double.settles = False
    request = await prepared(psp, K.REFUND)
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.FAILED
    assert outcome_of(answer).connector_code == "91506"


async def test_settled_payment_cannot_be_voided(psp: BraintreePsp) -> None:
    request = await prepared(psp, K.REFUND)
    void = request_of(K.VOID, target_transaction_id=request.target_transaction_id)
    answer = await send(psp.connector, void)
    assert answer.verdict is Verdict.FAILED
    assert outcome_of(answer).connector_code == "91504"


# --- questions ------------------------------------------------------------------------------------


async def test_verification_is_asked_about_by_its_id_alone(psp: BraintreePsp) -> None:
    request = await prepared(psp, K.VERIFY)
    sent = await send(psp.connector, request)
    before = len(psp.double.requests)
    assert await psp.connector.query(K.VERIFY, request.reference, request) is None
    assert len(psp.double.requests) == before
    request.target_transaction_id = sent.connector_transaction_id
    assert (await found_of(psp, request)).verdict is Verdict.APPROVED
    # What has the id may be something else.
    other = await send(psp.connector, request_of())
    request.target_transaction_id = other.connector_transaction_id
    assert is_doubt(await psp.connector.query(K.VERIFY, request.reference, request))


@pytest.mark.parametrize("kind", [K.CAPTURE, K.REFUND, K.VOID, K.REVERSAL])
async def test_what_acts_on_a_payment_cannot_be_asked_about_without_it(
    psp: BraintreePsp, kind: K
) -> None:
    assert is_doubt(await psp.connector.query(kind, "op_none-1"))
    assert psp.double.requests == []


@pytest.mark.parametrize("capture", [False, True])
async def test_authorization_is_found_by_its_reference_alone(
    psp: BraintreePsp, capture: bool
) -> None:
    request = request_of(capture=capture)
    sent = await send(psp.connector, request)
    found = await psp.connector.query(K.AUTHORIZE, request.reference)
    assert found is not None
    assert (found.verdict, found.connector_transaction_id) == (
        Verdict.APPROVED,
        sent.connector_transaction_id,
    )
    assert await psp.connector.query(K.AUTHORIZE, "op_none-1") is None


# --- reversals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settles", [True, False])
@pytest.mark.parametrize("refunded_minor", [0, 400])
async def test_reversal_of_a_charge_leaves_nothing(
    psp: BraintreePsp, refunded_minor: int, settles: bool
) -> None:
    charge = request_of(capture=True)
    target = (await send(psp.connector, charge)).connector_transaction_id
    if refunded_minor:
        refund = request_of(K.REFUND, refunded_minor, target_transaction_id=target)
        assert (await send(psp.connector, refund)).verdict is Verdict.APPROVED
    psp.double.settles = settles
    reversal = request_of(K.REVERSAL, target_transaction_id=target)
    assert await psp.connector.query(K.REVERSAL, reversal.reference, reversal) is None
    for _ in range(2):
        assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
    assert await psp.held_minor(charge.reference) == 0
    found = await found_of(psp, reversal)
    assert found.verdict is Verdict.APPROVED


@pytest.mark.parametrize(
    ("mutation", "made", "other"),
    [
        ("voidTransaction", "transaction", {"status": "AUTHORIZED"}),
        ("voidTransaction", "transaction", {"id": "another"}),
        ("refundTransaction", "refund", {"status": "PROCESSOR_DECLINED"}),
        ("refundTransaction", "refund", {"amount": {"value": "9.99", "currencyCode": "EUR"}}),
        ("refundTransaction", "refund", {"refundedTransaction": {"id": "another"}}),
    ],
)
async def test_reversal_that_did_something_else_stays_open(
    psp: BraintreePsp, mutation: str, made: str, other: dict[str, Any]
) -> None:
    target = (await send(psp.connector, request_of(capture=True))).connector_transaction_id
    psp.double.settles = mutation == "refundTransaction"
    psp.way.alter = lambda told: told["data"][mutation][made].update(other)
    reversal = request_of(K.REVERSAL, target_transaction_id=target)
    assert is_doubt(await send(psp.connector, reversal))


async def test_reversal_of_several_captures_leaves_nothing(psp: BraintreePsp) -> None:
    request = request_of()
    target = (await send(psp.connector, request)).connector_transaction_id
    for amount in (300, 200):
        await send(psp.connector, request_of(K.CAPTURE, amount, target_transaction_id=target))
    assert await psp.held_minor(request.reference) == 1000
    reversal = request_of(K.REVERSAL, target_transaction_id=target)
    assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
    assert await psp.held_minor(request.reference) == 0


async def test_reversal_of_what_is_not_found_stays_open(psp: BraintreePsp) -> None:
    reversal = request_of(K.REVERSAL, target_reference="op_none-1")
    assert is_doubt(await send(psp.connector, reversal))
    assert await psp.connector.query(K.REVERSAL, reversal.reference, reversal) is None


async def test_lost_reversal_is_confirmed_by_the_next_one(psp: BraintreePsp) -> None:
    request = request_of()
    target = (await send(psp.connector, request)).connector_transaction_id
    reversal = request_of(K.REVERSAL, target_transaction_id=target)
    psp.way.disturb(Fault.RESET)
    assert is_doubt(await send(psp.connector, reversal))
    psp.way.clear()
    assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
    assert await psp.held_minor(request.reference) == 0


async def test_concurrent_voids_release_once(psp: BraintreePsp) -> None:
    request = await prepared(psp, K.VOID)
    told = await asyncio.gather(*(send(psp.connector, request) for _ in range(3)))
    assert [answer.verdict for answer in told] == [Verdict.APPROVED] * 3
    assert await psp.effects(request.reference) == 1


def test_nothing_is_claimed_that_braintree_has_not() -> None:
    most = widest(Mode.TEST)
    assert not most.cancel_by_reference
    assert most.operations == SENT_KINDS - {K.INCREMENT}
    assert replace(most, capture_methods=usual(most).capture_methods) == usual(most)
    assert CaptureMethod.MANUAL_MULTIPLE not in usual(most).capture_methods
