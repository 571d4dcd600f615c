"""What a person may say of a doubt."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.application.administration import answer_of_person
from gateway.application.ports import Resolution
from gateway.domain import decisions
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.invariants import Kind
from gateway.domain.model import (
    Attempt,
    DoubtOutcome,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
)
from gateway.domain.states import Event

ROOT = Path(__file__).parents[2]
K = OperationKind


def decision(outcome: DoubtOutcome, **fields: object) -> Resolution:
    psp_id = "" if outcome is DoubtOutcome.NO_EFFECT else "psp-1"
    made = Resolution(1, outcome, psp_id, None, "asked the PSP", "key_1")
    return replace(made, **fields)  # type: ignore[arg-type]


def operation(kind: OperationKind) -> Operation:
    return Operation(
        merchant_id="mer_1",
        operation_id="op_1",
        payment_id="pay_1",
        kind=kind,
        origin=OperationOrigin.CLIENT,
        state=OperationState.IN_DOUBT,
        amount_minor=100,
        currency="EUR",
        attempt=Attempt(1, "simulator", "acct_1"),
    )


@pytest.mark.parametrize(
    ("outcome", "event"),
    [
        (DoubtOutcome.TOOK_EFFECT, Event.APPROVED),
        (DoubtOutcome.NO_EFFECT, Event.NEVER_SENT),
        (DoubtOutcome.DECLINED, Event.DECLINED),
        (DoubtOutcome.FAILED, Event.FAILED),
        (DoubtOutcome.CANCELED, Event.CANCELED),
    ],
)
def test_a_decision_is_the_event_that_the_psp_s_answer_would_have_been(
    outcome: DoubtOutcome, event: Event
) -> None:
    answer = answer_of_person(operation(K.AUTHORIZE), decision(outcome))
    assert decisions.event_of(answer) is event
    assert answer.reason == Reason.RESOLVED_BY_PERSON


@pytest.mark.parametrize("outcome", [each for each in DoubtOutcome if each.name != "TOOK_EFFECT"])
def test_a_reversal_cannot_be_given_up(outcome: DoubtOutcome) -> None:
    with pytest.raises(GatewayError) as refused:
        answer_of_person(operation(K.REVERSAL), decision(outcome))
    assert refused.value.reason is Reason.OUTCOME_NOT_ALLOWED


def test_a_void_that_was_accepted_cannot_be_said_never_to_have_been_sent() -> None:
    accepted = replace(operation(K.VOID), state=OperationState.PENDING)
    with pytest.raises(GatewayError) as refused:
        answer_of_person(accepted, decision(DoubtOutcome.NO_EFFECT))
    assert refused.value.reason is Reason.OUTCOME_NOT_ALLOWED
    failed = answer_of_person(accepted, decision(DoubtOutcome.FAILED))
    assert decisions.event_of(failed) is Event.FAILED


@pytest.mark.parametrize("kind", [K.AUTHORIZE, K.VERIFY])
def test_a_payment_that_took_effect_needs_the_psp_s_id(kind: OperationKind) -> None:
    said = decision(DoubtOutcome.TOOK_EFFECT, connector_transaction_id="")
    with pytest.raises(GatewayError) as refused:
        answer_of_person(operation(kind), said)
    assert refused.value.violations[0].field == "connector_transaction_id"
    answer_of_person(operation(K.CAPTURE), said)


def test_what_the_psp_has_an_id_of_is_not_said_to_have_had_no_effect() -> None:
    said = decision(DoubtOutcome.NO_EFFECT, connector_transaction_id="psp-1")
    with pytest.raises(GatewayError) as refused:
        answer_of_person(operation(K.AUTHORIZE), said)
    assert refused.value.violations[0].field == "connector_transaction_id"


def test_decisions_are_the_same_whoever_takes_them_and_for_whatever_reason() -> None:
    said = decision(DoubtOutcome.DECLINED)
    assert said.same_decision(replace(said, reason="another reason", resolved_by="key_2"))
    for other in (
        replace(said, outcome=DoubtOutcome.FAILED),
        replace(said, connector_transaction_id="psp-2"),
        replace(said, amount_reported_minor=1),
        replace(said, attempt_number=2),
    ):
        assert not said.same_decision(other)


# --- documents ------------------------------------------------------------------------------------


def test_every_kind_of_finding_is_explained() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)) == {*map(str, Kind)}
