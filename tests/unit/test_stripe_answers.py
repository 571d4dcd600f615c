"""What Stripe's objects say of amounts and of what became of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.connectors.base import Unusable
from gateway.connectors.http import Response
from gateway.connectors.stripe import answers
from gateway.domain.model import ConnectorAnswer, ResponseCode, Verdict

REFERENCE, OTHER = "op_1-1", "op_2-1"


def intent(status: str = "requires_capture", **more: Any) -> dict[str, Any]:
    return {
        "id": "pi_1",
        "object": "payment_intent",
        "status": status,
        "currency": "eur",
        "amount": 1000,
        "amount_capturable": 1000,
        "amount_received": 0,
        **more,
    }


def told_minor(answer: ConnectorAnswer | None) -> int | None:
    assert answer is not None
    assert answer.verdict is Verdict.APPROVED
    assert answer.outcome is not None
    return answer.outcome.amount_reported_minor


@pytest.mark.parametrize(("status", "body"), [(200, {}), (500, {"id": "pi_1"}), (302, {"a": 1})])
def test_an_object_comes_with_status_200_and_is_not_empty(status: int, body: object) -> None:
    with pytest.raises(Unusable):
        answers.read(Response(status, json.dumps(body).encode()))


def test_authorized_is_what_is_held_and_what_was_captured_of_it() -> None:
    part_taken = intent(amount_capturable=600, amount_received=400)
    assert told_minor(answers.authorization(part_taken, captured=False)) == 1000
    taken = intent("succeeded", amount_capturable=0, amount_received=400)
    assert told_minor(answers.authorization(taken, captured=False)) == 1000
    assert told_minor(answers.authorization(taken, captured=None)) == 1000


def test_charged_at_once_is_what_was_received_and_nothing_less_than_captured() -> None:
    taken = intent("succeeded", amount_capturable=0, amount_received=400)
    assert told_minor(answers.authorization(taken, captured=True)) == 400
    with pytest.raises(Unusable):
        answers.authorization(intent(), captured=True)


def test_a_payment_that_waits_for_a_method_and_tells_no_error_says_nothing() -> None:
    for status in ("requires_payment_method", "requires_confirmation", "a_new_one"):
        with pytest.raises(Unusable):
            answers.authorization(intent(status), captured=False)


def test_a_verification_is_an_approval_of_nothing() -> None:
    answer = answers.verification(intent("succeeded"))
    assert told_minor(answer) == 0
    assert answer.outcome is not None
    assert answer.outcome.response_code is ResponseCode.APPROVED


@pytest.mark.parametrize(
    ("received", "told"),
    [(300, 300), (500, 500)],
)
def test_a_capture_took_what_the_others_did_not(received: int, told: int) -> None:
    captured = intent(
        amount_received=received + 200,
        metadata={REFERENCE: "capture:300", OTHER: "capture:200", "op_3-1": "increment:50"},
    )
    assert told_minor(answers.capture(captured, REFERENCE)) == told
    assert answers.capture(captured, "op_3-1") is None


def test_what_is_no_entry_of_ours_is_passed_over() -> None:
    metadata = {"a": None, "b": 5, "c": "capture:", "d": "capture:x", "e": "capture:\u0663"}
    assert answers.captures(intent(metadata={**metadata, REFERENCE: "capture:5"})) == [REFERENCE]


@pytest.mark.parametrize(("total", "told"), [(None, 200), (1200, 200), (1150, 250), (1300, 100)])
def test_an_increment_is_what_was_asked_for_and_what_the_total_differs_by(
    total: int | None, told: int
) -> None:
    raised = intent(amount=1200, metadata={REFERENCE: "increment:200"})
    assert told_minor(answers.increment(raised, REFERENCE, total)) == told
    assert answers.increment(raised, OTHER, total) is None


@pytest.mark.parametrize(
    ("told", "is_void"),
    [
        (intent("canceled"), True),
        (intent("succeeded", amount_received=400), True),
        (intent("succeeded", amount_received=1000), False),
        (intent("succeeded", amount_received=None), False),
        (intent("succeeded", amount_received=400, amount=None), False),
        (intent(amount_received=400), False),
        (intent("processing"), False),
    ],
)
def test_void_is_what_nothing_is_held_of_and_what_was_not_captured_as_a_whole(
    told: dict[str, Any], is_void: bool
) -> None:
    assert (answers.void(told) is not None) == is_void


@pytest.mark.parametrize(
    ("reason", "code"), [("expired_or_canceled_card",) * 2, (None, "failed"), ("", "failed")]
)
def test_a_failed_refund_tells_why(reason: str | None, code: str) -> None:
    answer = answers.refund(intent("failed", object="refund", failure_reason=reason))
    assert answer.verdict is Verdict.FAILED
    assert answer.outcome is not None
    assert answer.outcome.connector_code == code
    assert answer.outcome.response_code is ResponseCode.REJECTED_BY_CONNECTOR


@pytest.mark.parametrize(
    ("street", "postal", "code"),
    [
        ("pass", "fail", "pass/fail"),
        ("unchecked", "pass", "/pass"),
        ("fail", None, "fail/"),
        ("unchecked", None, ""),
    ],
)
def test_an_address_check_tells_the_parts_that_were_checked(
    street: str, postal: str | None, code: str
) -> None:
    checks = {"address_line1_check": street, "address_postal_code_check": postal}
    charge = {"payment_method_details": {"card": {"checks": checks}}}
    answer = answers.authorization(intent(latest_charge=charge), captured=False)
    assert answer.outcome is not None
    assert answer.outcome.avs_code == code
