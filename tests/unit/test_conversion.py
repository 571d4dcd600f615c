"""Nothing is lost or invented between the contract's messages and the gateway's values."""

from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st
from payments.v1 import money_pb2, payment_method_pb2, payment_pb2
from payments.v1 import payment_service_pb2 as pb

from gateway.application.commands import Answer, Authorize, Capture, Increment, Refund, Void
from gateway.application.ports import Found, ListFilter
from gateway.domain.model import (
    AdviceAction,
    Aggregate,
    Attempt,
    AvsResult,
    CaptureMethod,
    CvvResult,
    Delivery,
    Mode,
    NextAction,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    PaymentState,
    QrCode,
    ResponseCode,
    Voucher,
)
from gateway.routing import record
from gateway.routing.model import (
    CARD_TYPES,
    Candidate,
    Excluded,
    Exclusion,
    Learned,
    RouteDecision,
    Scored,
)
from gateway.rpc import conversion
from gateway.rpc.conversion import Caller, ContractEncoder

AT = datetime(2026, 11, 1, 12, 30, 15, 123456, tzinfo=UTC)
ENCODER = ContractEncoder()


def outcome() -> Outcome:
    return Outcome(
        response_code=ResponseCode.INSUFFICIENT_FUNDS,
        connector_code="declined",
        connector_message="no money",
        network_code="51",
        network_code_scheme="iso8583_1987",
        advice_action=AdviceAction.RETRY_AFTER,
        advice_retry_after_s=3600,
        advice_code="24",
        advice_scheme="mastercard",
        avs_result=AvsResult.FULL_MATCH,
        avs_code="Y",
        cvv_result=CvvResult.MATCH,
        cvv_code="M",
        auth_code="A1",
        network_transaction_id="nti",
        retrieval_reference_number="rrn",
        system_trace_audit_number="stan",
        acquirer_reference_number="arn",
        amount_reported_minor=7,
    )


def operation() -> Operation:
    return Operation(
        merchant_id="mer_1",
        operation_id="op_1",
        payment_id="pay_1",
        kind=OperationKind.REFUND,
        origin=OperationOrigin.CLIENT,
        state=OperationState.REQUIRES_ACTION,
        amount_minor=1000,
        currency="EUR",
        attempt=Attempt(2, "second", "account_2", Delivery.MAY_HAVE_BEEN_SENT),
        epoch=3,
        parent_operation_id="op_0",
        final=True,
        idempotency_key="key",
        merchant_transaction_id="mtx",
        fingerprint=b"fingerprint",
        request_id="req_1",
        note="not in the contract",
        reason="RECOVERED",
        next_action=NextAction("https://psp.example/1", expires_at=AT),
        allocations=(("op_c1", 600), ("op_c2", 400)),
        superseded_attempts=(
            Attempt(1, "first", "account_1", Delivery.ANSWERED, "ch_1", outcome(), 12.345),
        ),
        response=b"response",
        created_at=AT,
        updated_at=AT + timedelta(seconds=1),
    )


def request() -> pb.AuthorizePaymentRequest:
    """A request with every field that a payment repeats."""
    return pb.AuthorizePaymentRequest(
        merchant_id="mer_1",
        idempotency_key="key",
        amount=money_pb2.Money(amount_minor=1000, currency_code="EUR"),
        capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
        payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),
        customer_id="cus",
        profile_id="pro",
        merchant_transaction_id="mtx",
        merchant_order_id="order",
        channel=payment_method_pb2.CHANNEL_MAIL_ORDER,
        initiator=payment_method_pb2.INITIATOR_MERCHANT,
        stored_credential=payment_method_pb2.StoredCredential(
            usage=payment_method_pb2.STORED_CREDENTIAL_USAGE_SUBSEQUENT,
            mit_category=payment_method_pb2.MIT_CATEGORY_RECURRING,
            network_transaction_id="nti",
        ),
        three_ds=payment_method_pb2.ThreeDs(eci="05", version="2.2.0"),
        billing_address=payment_method_pb2.Address(line1="Street 1", country_code="DE"),
        statement_descriptor="SHOP",
        statement_descriptor_suffix="1",
        amount_details=money_pb2.AmountDetails(tip_minor=5),
        allow_partial_approval=True,
        return_url="https://shop.example/",
        metadata={"b": "2", "a": "1"},
    )


def payment() -> Payment:
    return Payment(
        merchant_id="mer_1",
        payment_id="pay_1",
        mode=Mode.TEST,
        state=PaymentState.PARTIALLY_CAPTURED,
        currency="EUR",
        capture_method=CaptureMethod.MANUAL,
        requested_minor=1,
        connector="simulator",
        connector_account_id="account",
        version=2,
        authorized_minor=3,
        capture_pending_minor=4,
        captured_minor=5,
        refund_pending_minor=6,
        refunded_minor=7,
        voided_minor=8,
        increment_pending_minor=9,
        authorized_reported_minor=10,
        captured_reported_minor=0,
        refunded_reported_minor=12,
        capture_closed=True,
        cancel_requested=True,
        connector_transaction_id="ch_1",
        auth_code="A1",
        network_transaction_id="nti",
        authorization_expires_at=AT + timedelta(days=7),
        merchant_order_id="order",
        allow_partial_approval=True,
        details=conversion.to_authorize(request(), Caller("req_1", "mer_1")).details,
        created_at=AT,
        updated_at=AT + timedelta(seconds=1),
    )


def unset(message: Message, path: str = "") -> set[str]:
    """The paths of the fields that a message does not have."""
    told: set[str] = set()
    present = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        value: Any = present.get(field.name)
        if field.name not in present:
            told.add(path + field.name)
        elif isinstance(value, Message) and value.DESCRIPTOR.file.package == "payments.v1":
            told |= unset(value, f"{path}{field.name}.")
    return told


OUTCOME = {
    "response_code": "RESPONSE_CODE_INSUFFICIENT_FUNDS",
    "connector_code": "declined",
    "connector_message": "no money",
    "network_code": "51",
    "network_code_scheme": "iso8583_1987",
    "advice": {
        "action": "ADVICE_ACTION_RETRY_AFTER",
        "retry_after": "3600s",
        "code": "24",
        "scheme": "mastercard",
    },
    "avs_result": "AVS_RESULT_FULL_MATCH",
    "avs_code": "Y",
    "cvv_result": "CVV_RESULT_MATCH",
    "cvv_code": "M",
    "auth_code": "A1",
    "network_transaction_id": "nti",
    "retrieval_reference_number": "rrn",
    "system_trace_audit_number": "stan",
    "acquirer_reference_number": "arn",
    "amount_reported_minor": 7,
}
OPERATION = {
    "operation_id": "op_1",
    "payment_id": "pay_1",
    "merchant_id": "mer_1",
    "parent_operation_id": "op_0",
    "kind": "OPERATION_KIND_REFUND",
    "origin": "OPERATION_ORIGIN_CLIENT",
    "state": "OPERATION_STATE_REQUIRES_ACTION",
    "amount": {"amount_minor": 1000, "currency_code": "EUR"},
    "idempotency_key": "key",
    "epoch": 3,
    "final": True,
    # Of the latest attempt that was answered.
    "outcome": OUTCOME,
    "attempts": [
        {
            "number": 1,
            "connector": "first",
            "connector_account_id": "account_1",
            "connector_reference": "op_1-1",
            "delivery": "DELIVERY_ANSWERED",
            "connector_transaction_id": "ch_1",
            "outcome": OUTCOME,
            "connector_processing_time": "0.012345s",
        },
        {
            "number": 2,
            "connector": "second",
            "connector_account_id": "account_2",
            "connector_reference": "op_1-2",
            "delivery": "DELIVERY_MAY_HAVE_BEEN_SENT",
        },
    ],
    "allocations": [
        {"capture_operation_id": "op_c1", "amount_minor": 600},
        {"capture_operation_id": "op_c2", "amount_minor": 400},
    ],
    "next_action": {
        "redirect_url": "https://psp.example/1",
        "expires_at": "2026-11-01T12:30:15.123456Z",
    },
    "reason": "RECOVERED",
    "merchant_transaction_id": "mtx",
    "created_at": "2026-11-01T12:30:15.123456Z",
    "updated_at": "2026-11-01T12:30:16.123456Z",
}
PAYMENT = {
    "payment_id": "pay_1",
    "merchant_id": "mer_1",
    "mode": "MODE_TEST",
    "state": "PAYMENT_STATE_PARTIALLY_CAPTURED",
    "version": 2,
    "amounts": {
        "currency_code": "EUR",
        "requested_minor": 1,
        "authorized_minor": 3,
        "capture_pending_minor": 4,
        "captured_minor": 5,
        "refund_pending_minor": 6,
        "refunded_minor": 7,
        "voided_minor": 8,
        "increment_pending_minor": 9,
        "authorized_reported_minor": 10,
        # Reported, unlike none.
        "captured_reported_minor": 0,
        "refunded_reported_minor": 12,
    },
    "capture_method": "CAPTURE_METHOD_MANUAL",
    "capture_closed": True,
    "cancel_requested": True,
    "authorization_expires_at": "2026-11-08T12:30:15.123456Z",
    "connector": "simulator",
    "connector_account_id": "account",
    "connector_transaction_id": "ch_1",
    "auth_code": "A1",
    "network_transaction_id": "nti",
    "created_at": "2026-11-01T12:30:15.123456Z",
    "updated_at": "2026-11-01T12:30:16.123456Z",
}


def test_every_field_of_an_operation_and_its_attempts_is_told() -> None:
    message = payment_pb2.Operation.FromString(conversion.encode_operation(operation()))
    assert message == ParseDict(OPERATION, payment_pb2.Operation())
    # Nothing is left to tell, but what else a customer might have to do, and what no refund has.
    others = {f"next_action.{action}" for action in ("qr_code", "voucher", "await_approval")}
    assert unset(message) == others | {"route"}
    assert unset(message.attempts[0]) == set()


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (NextAction(), {}),
        (
            NextAction(qr_code=QrCode("0002", "https://i.example", "https://p.example")),
            {
                "qr_code": {
                    "data": "0002",
                    "image_url": "https://i.example",
                    "page_url": "https://p.example",
                }
            },
        ),
        (
            NextAction(voucher=Voucher("123 456", "11249", "https://p.example")),
            {"voucher": {"number": "123 456", "entity": "11249", "page_url": "https://p.example"}},
        ),
        (
            NextAction(await_approval=True, expires_at=AT),
            {"await_approval": {}, "expires_at": "2026-11-01T12:30:15.123456Z"},
        ),
    ],
)
def test_what_a_customer_has_to_do_is_told_by_its_kind(
    action: NextAction, told: dict[str, Any]
) -> None:
    encoded = conversion.encode_operation(operation().copy_with(next_action=action))
    message = payment_pb2.Operation.FromString(encoded)
    assert message.HasField("next_action")
    assert message.next_action == ParseDict(told, payment_pb2.NextAction())


DPAN = "4895370000000000003"
CRYPTOGRAM = "AgAAAAAABk4DWZ4C28yUQAAAAAA="


def network_token(**changes: Any) -> pb.AuthorizePaymentRequest:
    token: dict[str, Any] = {
        "number": DPAN,
        "cryptogram": CRYPTOGRAM,
        "expiry_month": 12,
        "expiry_year": 2030,
        "eci": "05",
    }
    return pb.AuthorizePaymentRequest(
        capture_method=payment_method_pb2.CAPTURE_METHOD_AUTOMATIC,
        payment_method=payment_method_pb2.PaymentMethod(
            network_token=payment_method_pb2.NetworkToken(**(token | changes))
        ),
    )


def test_a_network_tokens_number_and_cryptogram_are_for_the_psp_alone() -> None:
    command = conversion.to_authorize(network_token(), Caller("req_1", "mer_1"))
    assert command.secrets == {"number": DPAN, "cryptogram": CRYPTOGRAM}
    kept = payment().copy_with(details=command.details)
    encoded = command.details + conversion.encode_payment(kept) + repr(command).encode()
    for secret in command.secrets.values():
        assert secret.encode() not in encoded
    token, fields = ENCODER.connector_fields(kept)
    assert token == ""
    assert fields["payment_method"] == {
        "network_token": {"expiry_month": 12, "expiry_year": 2030, "eci": "05"}
    }
    assert command.method == "network_token"
    assert command.used_fields == {"payment_method.network_token"}


def test_calls_with_another_network_token_or_cryptogram_are_other_calls() -> None:
    fingerprints = [
        conversion.to_authorize(network_token(**changes), Caller("req_1", "mer_1")).fingerprint
        for changes in (
            {},
            {},
            {"number": "4895370000000000011"},
            {"cryptogram": CRYPTOGRAM.replace("k", "l")},
            {"eci": "07"},
        )
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 4


@pytest.mark.parametrize(
    ("method", "name", "country"),
    [
        ({"token": "tok_visa"}, "card", ""),
        ({"stored": {"stored_payment_method_id": "pm_1"}}, "card", ""),
        (
            {"stored": {"stored_payment_method_id": "pm_1", "method_type": "sepa_debit"}},
            "sepa_debit",
            "",
        ),
        ({"redirect": {"method_type": "ideal", "country_code": "NL"}}, "ideal", "NL"),
    ],
)
def test_a_payment_method_has_the_name_that_capabilities_know_it_by(
    method: dict[str, Any], name: str, country: str
) -> None:
    request = pb.AuthorizePaymentRequest(
        capture_method=payment_method_pb2.CAPTURE_METHOD_AUTOMATIC,
        payment_method=payment_method_pb2.PaymentMethod(**method),
    )
    command = conversion.to_authorize(request, Caller("req_1", "mer_1"))
    assert (command.method, command.customer_country) == (name, country)


def test_every_field_of_a_payment_is_told_and_the_requests_fields_are_as_in_it() -> None:
    message = payment_pb2.Payment.FromString(conversion.encode_payment(payment()))
    expected = ParseDict(PAYMENT, payment_pb2.Payment())
    sent = request()
    echoed = [field.name for field in message.DESCRIPTOR.fields if field.name not in PAYMENT]
    assert len(echoed) == 16
    for name in echoed:
        described = message.DESCRIPTOR.fields_by_name[name]
        if described.message_type is None:
            setattr(expected, name, getattr(sent, name))
        else:
            getattr(expected, name).MergeFrom(getattr(sent, name))
    assert message == expected
    assert {path for path in unset(message) if path.count(".") == 0} == set()
    assert unset(message.amounts) == set()


CHANGES: tuple[tuple[type | tuple[type, ...], Callable[[Any], Any]], ...] = (
    (IntEnum, lambda value: next(each for each in type(value) if each is not value)),
    (bool, lambda value: not value),
    ((str, bytes, tuple), lambda value: value[:-1]),
    ((int, float), lambda value: value + 1),
    (datetime, lambda value: value + timedelta(microseconds=1)),
    (Attempt, lambda _: Attempt(9, "third", "account_3")),
    ((Outcome, NextAction), lambda _: None),
)


def changed(name: str, value: Any) -> Any:
    """Another value of the same type."""
    if name == "details":
        return b""
    return next(change(value) for kind, change in CHANGES if isinstance(value, kind))


def told_fields(value: Any, encode: Any) -> set[str]:
    """The fields of a value that make a difference to its encoding."""
    before = encode(value)
    told: set[str] = set()
    for field in fields(value):
        other = type(value)(**{each.name: getattr(value, each.name) for each in fields(value)})
        setattr(other, field.name, changed(field.name, getattr(value, field.name)))
        if encode(other) != before:
            told.add(field.name)
    return told


def names(value: Any) -> set[str]:
    return {field.name for field in fields(value)}


def test_an_authorization_tells_the_decision_of_the_rules_that_led_to_it() -> None:
    first, second = Candidate("first", "acc_1"), Candidate("second", "acc_2")
    decision = RouteDecision(
        (first, second),
        (Excluded(Candidate("third", "acc_3"), Exclusion.BREAKER_OPEN),),
        rules_version=7,
        rule="eur",
        experiment="new-psp",
        arm="half",
        scores=(Scored(second, 0.25),),
    )
    routed = operation().copy_with(kind=OperationKind.AUTHORIZE, note=record.encode(decision))
    told = payment_pb2.Operation.FromString(conversion.encode_operation(routed)).route
    wanted = {
        "rules_version": 7,
        "rule": "eur",
        "experiment": "new-psp",
        "arm": "half",
        "candidates": [
            {"connector": "first", "connector_account_id": "acc_1"},
            {"connector": "second", "connector_account_id": "acc_2", "score": 0.25},
            {
                "connector": "third",
                "connector_account_id": "acc_3",
                "excluded_reason": "BREAKER_OPEN",
            },
        ],
    }
    assert told == ParseDict(wanted, payment_pb2.Route())


def test_what_is_learnt_is_told_where_a_decision_has_it() -> None:
    parts = {"success": 0.9, "calls": 120.5, "cost_minor": 21.25, "first_share": 0.95}
    candidate = Candidate("first", "acc_1")
    decision = RouteDecision((candidate,), scores=(Scored(candidate, 0.5, Learned(**parts)),))
    [told] = conversion.route_message(decision).candidates
    assert told.learned == payment_pb2.LearnedScore(**parts)
    # An operation keeps the score alone.
    kept = record.decode(record.encode(decision))
    assert kept is not None
    [told] = conversion.route_message(kept).candidates
    assert (told.score, told.HasField("learned")) == (0.5, False)


def test_a_score_is_kept_with_six_decimals() -> None:
    candidate = Candidate("first", "acc_1")
    scores = (0.81234567, -12.3456785, 4_000_000.12345678, 0.0)
    decision = RouteDecision(
        (candidate,), scores=tuple(Scored(candidate, score) for score in scores)
    )
    kept = record.decode(record.encode(decision))
    assert kept is not None
    assert [each.score for each in kept.scores] == [0.812346, -12.345678, 4_000_000.123457, 0.0]


def test_card_types_are_those_of_the_contract() -> None:
    numbers = payment_method_pb2.CardType.values()
    names = {conversion.facts_of(_card(number)).card_type for number in numbers}
    assert names == {"", *CARD_TYPES}


def _card(card_type: "payment_method_pb2.CardType.ValueType") -> bytes:
    sent = request()
    sent.payment_method.card_hints.card_type = card_type
    return sent.SerializeToString()


def test_a_reason_that_only_a_newer_version_knows_is_told_as_it_stands() -> None:
    decision = RouteDecision((), (Excluded(Candidate("first", "acc_1"), "OF_TOMORROW"),))
    routed = operation().copy_with(kind=OperationKind.AUTHORIZE, note=record.encode(decision))
    told = payment_pb2.Operation.FromString(conversion.encode_operation(routed)).route
    assert [each.excluded_reason for each in told.candidates] == ["OF_TOMORROW"]


@pytest.mark.parametrize("note", ["", "no JSON", "[]", "{}", '{"c":[],"v":1}', "1"])
def test_an_answer_does_not_fail_for_an_explanation_that_cannot_be_read(note: str) -> None:
    odd = operation().copy_with(kind=OperationKind.AUTHORIZE, note=note)
    assert not payment_pb2.Operation.FromString(conversion.encode_operation(odd)).HasField("route")


def test_routing_looks_at_what_the_request_tells_of_the_card() -> None:
    sent = request()
    sent.payment_method.card_hints.scheme = "visa"
    sent.payment_method.card_hints.bin = "41111111"
    sent.payment_method.card_hints.issuer_country = "DE"
    sent.payment_method.card_hints.card_type = payment_method_pb2.CARD_TYPE_PREPAID
    sent.metadata["tier"] = "gold"
    command = conversion.to_authorize(sent, Caller("req_1", "mer_1"))
    facts = command.facts()
    assert (facts.method, facts.scheme, facts.bin) == ("card", "visa", "41111111")
    assert (facts.issuer_country, facts.channel) == ("DE", "MAIL_ORDER")
    assert facts.card_type == "prepaid"
    assert (facts.customer_id, facts.instrument) == ("cus", "tok_visa")
    assert facts.metadata["tier"] == "gold"
    assert conversion.facts_of(command.details) == facts
    assert "payment_method" not in command.used_fields


def test_an_operations_outcome_is_that_of_its_latest_answered_attempt() -> None:
    later = Attempt(2, "second", "account_2", Delivery.ANSWERED, outcome=Outcome(auth_code="later"))
    encoding = conversion.encode_operation(operation().copy_with(attempt=later))
    assert payment_pb2.Operation.FromString(encoding).outcome.auth_code == "later"


def test_nothing_that_the_gateway_knows_of_an_operation_is_forgotten() -> None:
    internal = {"fingerprint", "note", "request_id", "response"}
    assert told_fields(operation(), conversion.encode_operation) == names(operation()) - internal

    answered = operation().superseded_attempts[0]
    told = told_fields(
        answered, lambda each: conversion.encode_operation(operation().copy_with(attempt=each))
    )
    assert told == names(answered)
    told = told_fields(
        outcome(),
        lambda each: conversion.encode_operation(
            operation().copy_with(attempt=Attempt(2, "second", "account", outcome=each))
        ),
    )
    assert told == names(outcome())


def test_nothing_that_the_gateway_knows_of_a_payment_is_forgotten() -> None:
    in_details = {"merchant_order_id", "allow_partial_approval"}
    assert told_fields(payment(), conversion.encode_payment) == names(payment()) - in_details


@given(st.permutations([f"key_{number}" for number in range(10, 30)]))
def test_an_encoding_does_not_depend_on_the_order_in_which_a_map_was_sent(keys: list[str]) -> None:
    # Sent entry by entry: a message made here would be written in an order of its own.
    sent = request().SerializeToString() + b"".join(
        pb.AuthorizePaymentRequest(metadata={key: "x"}).SerializeToString() for key in keys
    )
    received = pb.AuthorizePaymentRequest.FromString(sent)
    command = conversion.to_authorize(received, Caller("req_1", "mer_1"))
    encoding = ENCODER.response(operation(), payment().copy_with(details=command.details))
    for bytes_ in (command.details, encoding):
        places = [bytes_.index(key.encode()) for key in sorted(keys)]
        assert places == sorted(places)


def test_an_amount_that_was_not_reported_is_absent() -> None:
    plain = payment().copy_with(captured_reported_minor=None)
    message = payment_pb2.Payment.FromString(conversion.encode_payment(plain))
    assert not message.amounts.HasField("captured_reported_minor")


def test_an_encoding_is_that_of_the_generated_message() -> None:
    encoding = conversion.encode_payment(payment())
    message = payment_pb2.Payment.FromString(encoding)
    assert message.SerializeToString(deterministic=True) == encoding


@pytest.mark.parametrize(
    "response_type",
    [
        pb.AuthorizePaymentResponse,
        pb.CapturePaymentResponse,
        pb.VoidPaymentResponse,
        pb.RefundPaymentResponse,
        pb.IncrementAuthorizationResponse,
        pb.GetOperationResponse,
    ],
)
def test_one_encoding_serves_every_money_response(response_type: Any) -> None:
    encoding = ENCODER.response(operation(), payment())
    assert encoding == conversion.encode_found(Found(operation(), payment()))
    message = response_type.FromString(encoding)
    assert message.operation.operation_id == "op_1"
    assert message.payment.payment_id == "pay_1"
    assert message.SerializeToString(deterministic=True) == encoding


def test_a_repeat_is_the_stored_bytes_with_the_replay_appended() -> None:
    stored = ENCODER.response(operation(), payment())
    assert conversion.encode_answer(Answer(stored, False, "req_1", "pay_1")) == stored
    repeat = conversion.encode_answer(Answer(stored, True, "req_1", "pay_1"))
    assert repeat.startswith(stored)
    message = pb.AuthorizePaymentResponse.FromString(repeat)
    assert message.replay == payment_pb2.Replay(replayed=True, first_request_id="req_1")
    message.ClearField("replay")
    assert message.SerializeToString(deterministic=True) == stored


@given(st.text(max_size=300), st.integers(0, 70_000))
def test_results_are_encoded_as_the_generated_messages_are(item_ref: str, size: int) -> None:
    response = pb.AuthorizePaymentResponse(
        operation=payment_pb2.Operation(idempotency_key="k" * size)
    )
    error = Status(code=5, message="m" * size)
    ours = conversion.encode_result(
        item_ref, response.SerializeToString()
    ) + conversion.encode_error_result(item_ref, error)
    theirs = pb.BatchAuthorizePaymentsResponse(
        results=[
            pb.AuthorizePaymentResult(item_ref=item_ref, response=response),
            pb.AuthorizePaymentResult(item_ref=item_ref, error=error),
        ]
    )
    assert ours == theirs.SerializeToString()
    assert pb.StreamAuthorizePaymentsResponse.FromString(ours).results == theirs.results


def test_reads_are_encoded_as_their_messages() -> None:
    aggregate = Aggregate(payment(), [operation(), operation()])
    read = pb.GetPaymentResponse.FromString(conversion.encode_aggregate(aggregate))
    assert read.payment.payment_id == "pay_1"
    assert [each.operation_id for each in read.operations] == ["op_1", "op_1"]
    payments = [conversion.encode_payment(payment())] * 2
    page = pb.ListPaymentsResponse.FromString(conversion.encode_page(payments, "token"))
    assert len(page.payments) == 2
    assert page.next_page_token == "token"
    assert conversion.encode_page([], "") == b""


def test_an_event_holds_its_id_and_type_and_payment_and_operation() -> None:
    _, encoding = ENCODER.change("evt_1", "refund.succeeded", operation(), payment())
    assert payment_pb2.PaymentEvent.FromString(encoding) == payment_pb2.PaymentEvent(
        event_version=conversion.EVENT_VERSION,
        event_type="refund.succeeded",
        event_id="evt_1",
        payment=payment_pb2.Payment.FromString(conversion.encode_payment(payment())),
        operation=payment_pb2.Operation.FromString(conversion.encode_operation(operation())),
    )


def test_a_connector_gets_the_fields_that_it_was_asked_to_support_and_whose_payment_it_is() -> None:
    command = conversion.to_authorize(request(), Caller("req_1", "mer_1"))
    token, fields = ENCODER.connector_fields(payment())
    assert token == command.payment_method_token == "tok_visa"
    assert fields.keys() == command.used_fields | {"customer_id"}
    assert command.used_fields == {
        "channel",
        "initiator",
        "statement_descriptor",
        "statement_descriptor_suffix",
        "return_url",
        "stored_credential",
        "three_ds",
        "billing_address",
        "amount_details",
    }
    assert fields["billing_address"] == {"line1": "Street 1", "country_code": "DE"}
    assert fields["channel"] == "CHANNEL_MAIL_ORDER"


def test_defaults_and_what_the_gateway_keeps_ask_nothing_of_a_connector() -> None:
    plain = pb.AuthorizePaymentRequest(
        customer_id="cus",
        merchant_order_id="order",
        metadata={"a": "b"},
        allow_partial_approval=True,
        channel=payment_method_pb2.CHANNEL_ECOMMERCE,
        capture_method=payment_method_pb2.CAPTURE_METHOD_AUTOMATIC,
        payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),
    )
    assert conversion.to_authorize(plain, Caller("req_1", "mer_1")).used_fields == frozenset()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ({"network_token": {"token_reference": "n"}}, "payment_method.network_token"),
        ({"stored": {"stored_payment_method_id": "s"}}, "payment_method.stored"),
        ({"redirect": {"method_type": "ideal"}}, "payment_method.redirect"),
    ],
)
def test_a_method_other_than_a_token_has_to_be_supported(method: dict[str, Any], path: str) -> None:
    other = pb.AuthorizePaymentRequest(
        capture_method=payment_method_pb2.CAPTURE_METHOD_AUTOMATIC,
        payment_method=payment_method_pb2.PaymentMethod(**method),
    )
    command = conversion.to_authorize(other, Caller("req_1", "mer_1"))
    token = method.get("network_token", {}).get("token_reference")
    by_reference = {f"{path}.token_reference"} if token else set()
    assert command.used_fields == {path} | by_reference
    details = payment().copy_with(details=command.details)
    token, fields = ENCODER.connector_fields(details)
    assert token == ""
    assert fields["payment_method"] == method


def test_a_command_has_its_callers_and_its_requests_fields() -> None:
    caller = Caller("req_1", "mer_1", Mode.LIVE, 12.5)
    money = money_pb2.Money(amount_minor=5, currency_code="EUR")
    own = {"idempotency_key": "key", "merchant_transaction_id": "mtx"}
    commands = (
        conversion.to_authorize(request(), caller),
        conversion.to_capture(
            pb.CapturePaymentRequest(payment_id="p", amount=money, final=True, **own), caller
        ),
        conversion.to_void(pb.VoidPaymentRequest(payment_id="p", reason="r", **own), caller),
        conversion.to_refund(
            pb.RefundPaymentRequest(
                payment_id="p",
                amount=money,
                capture_operation_id="op_c1",
                reason=pb.REFUND_REASON_DUPLICATE,
                **own,
            ),
            caller,
        ),
        conversion.to_increment(
            pb.IncrementAuthorizationRequest(payment_id="p", additional_amount=money, **own),
            caller,
        ),
    )
    head = ("mer_1", Mode.LIVE, "key")
    authorize, capture, void, refund, increment = commands
    for command in commands:
        assert (command.request_id, command.deadline) == ("req_1", 12.5)
        assert (command.merchant_id, command.mode, command.idempotency_key) == head
        assert command.merchant_transaction_id == "mtx"
    assert authorize == Authorize(
        *head,
        authorize.fingerprint,
        "req_1",
        12.5,
        1000,
        "EUR",
        CaptureMethod.MANUAL,
        "tok_visa",
        True,
        "order",
        "mtx",
        authorize.details,
        authorize.used_fields,
    )
    assert capture == Capture(*head, capture.fingerprint, "req_1", 12.5, "p", 5, "EUR", True, "mtx")
    assert void == Void(*head, void.fingerprint, "req_1", 12.5, "p", None, "r", "mtx")
    assert refund == Refund(
        *head, refund.fingerprint, "req_1", 12.5, "p", 5, "EUR", "op_c1", "DUPLICATE", "mtx"
    )
    assert increment == Increment(*head, increment.fingerprint, "req_1", 12.5, "p", 5, "EUR", "mtx")
    assert len({command.fingerprint for command in commands}) == len(commands)


def test_what_a_request_leaves_out_is_none() -> None:
    caller = Caller("req_1", "mer_1")
    capture = conversion.to_capture(pb.CapturePaymentRequest(payment_id="p"), caller)
    assert (capture.amount_minor, capture.currency, capture.final) == (None, None, False)
    refund = conversion.to_refund(pb.RefundPaymentRequest(payment_id="p"), caller)
    assert (refund.amount_minor, refund.currency) == (None, None)
    assert (refund.capture_operation_id, refund.note) == (None, "")


def test_a_void_names_a_payment_or_its_authorizations_key() -> None:
    caller = Caller("req_1", "mer_1")
    by_id = conversion.to_void(pb.VoidPaymentRequest(payment_id="p"), caller)
    assert (by_id.payment_id, by_id.authorize_idempotency_key) == ("p", None)
    by_key = conversion.to_void(pb.VoidPaymentRequest(authorize_idempotency_key="k"), caller)
    assert (by_key.payment_id, by_key.authorize_idempotency_key) == (None, "k")


@given(st.datetimes(timezones=st.just(UTC)))
def test_microseconds_come_back_as_the_same_time(at: datetime) -> None:
    if at.replace(microsecond=0) < datetime.max.replace(microsecond=0, tzinfo=UTC):
        assert conversion.from_microseconds(conversion.to_microseconds(at)) == at


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected"),
    [
        (0, 0, datetime(1970, 1, 1, tzinfo=UTC)),
        # Up, so that "at or later" and "before" mean the same for times of microseconds.
        (0, 1, datetime(1970, 1, 1, microsecond=1, tzinfo=UTC)),
        (-1, 999_999_999, datetime(1970, 1, 1, tzinfo=UTC)),
        (-62_135_596_800, 0, datetime(1, 1, 1, tzinfo=UTC)),
        (253_402_300_799, 999_999_999, datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_a_filters_time_is_rounded_up_to_the_databases_microseconds(
    seconds: int, nanos: int, expected: datetime
) -> None:
    listing = pb.ListPaymentsRequest(created_from=Timestamp(seconds=seconds, nanos=nanos))
    told = conversion.to_list_filter(listing, Caller("req_1", "mer_1"), None)
    assert told.created_from == expected
    assert told.created_before is None
    assert told.page_size == conversion.PAGE_SIZE_DEFAULT


def test_a_filter_is_as_the_request_says() -> None:
    listing = pb.ListPaymentsRequest(
        page_size=7,
        states=[payment_pb2.PAYMENT_STATE_VOIDED, payment_pb2.PAYMENT_STATE_AUTHORIZED],
        created_before=Timestamp(seconds=1),
        merchant_order_id="order",
    )
    told = conversion.to_list_filter(listing, Caller("req_1", "mer_1", Mode.LIVE), (AT, "pay_1"))
    assert told == ListFilter(
        merchant_id="mer_1",
        mode=Mode.LIVE,
        page_size=7,
        states=(PaymentState.AUTHORIZED, PaymentState.VOIDED),
        created_from=None,
        created_before=datetime(1970, 1, 1, second=1, tzinfo=UTC),
        merchant_order_id="order",
        after=(AT, "pay_1"),
    )
