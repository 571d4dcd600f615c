"""The allow-lists: every state × event, every operation × operation, and the published page."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from gateway.domain import tables
from gateway.domain.model import OperationKind, OperationState, PaymentState, Verdict
from gateway.domain.states import (
    EVENT_KINDS,
    FROZEN,
    MATRIX,
    OPERATION_TRANSITIONS,
    PAYMENT_TRANSITIONS,
    UNFINISHED,
    VERDICT_EVENTS,
    Beside,
    Event,
    may_start_beside,
    next_state,
)

K, S, P = OperationKind, OperationState, PaymentState
DEFINITE_NEGATIVE = {S.DECLINED, S.FAILED, S.CANCELED, S.EXPIRED}


@pytest.mark.parametrize(("kind", "state", "event"), list(product(K, S, Event)))
def test_what_is_not_in_the_table_is_not_allowed(
    kind: OperationKind, state: OperationState, event: Event
) -> None:
    after = next_state(kind, state, event)
    listed = OPERATION_TRANSITIONS.get((state, event))
    kinds = EVENT_KINDS.get((state, event), frozenset(K))
    assert after == (listed if kind in kinds else None)


@pytest.mark.parametrize("kind", K)
def test_no_event_leads_out_of_a_definite_negative_outcome(kind: OperationKind) -> None:
    for state, event in product(DEFINITE_NEGATIVE, Event):
        assert next_state(kind, state, event) is None


@pytest.mark.parametrize("kind", K)
def test_only_a_repeat_by_the_client_leads_out_of_not_sent(kind: OperationKind) -> None:
    moves = {event for event in Event if next_state(kind, S.NOT_SENT, event) is not None}
    assert moves == {Event.RESTARTED}


def test_what_the_psp_acknowledged_never_becomes_not_sent_or_in_doubt() -> None:
    for kind, state in product(K, (S.PENDING, S.REQUIRES_ACTION, S.SUCCEEDED)):
        assert next_state(kind, state, Event.NEVER_SENT) is None
        assert next_state(kind, state, Event.DOUBTED) is None


def test_only_captures_and_refunds_bounce_and_only_authorizations_expire_after_success() -> None:
    for kind in K:
        bounced = next_state(kind, S.SUCCEEDED, Event.BOUNCED)
        assert (bounced is S.FAILED) == (kind in (K.CAPTURE, K.REFUND))
        expired = next_state(kind, S.SUCCEEDED, Event.EXPIRED)
        assert (expired is S.EXPIRED) == (kind is K.AUTHORIZE)


def test_every_state_is_reached_and_every_unfinished_one_can_be_left() -> None:
    reached = set(OPERATION_TRANSITIONS.values()) | {S.PROCESSING}
    assert reached == set(S)
    for state in UNFINISHED:
        ends = {OPERATION_TRANSITIONS.get((state, event)) for event in Event} - {None}
        assert {S.SUCCEEDED, *DEFINITE_NEGATIVE} <= ends


def test_the_first_answers_that_are_frozen_are_those_with_a_psps_answer() -> None:
    assert set(S) - FROZEN == {S.PROCESSING, S.IN_DOUBT, S.NOT_SENT}


def test_every_verdict_of_a_psp_is_an_event() -> None:
    assert set(VERDICT_EVENTS) == set(Verdict)


@pytest.mark.parametrize(
    ("new", "unfinished", "state"), list(product(MATRIX, K, sorted(UNFINISHED)))
)
def test_the_matrix_answers_for_every_pair(
    new: OperationKind, unfinished: OperationKind, state: OperationState
) -> None:
    rule, answer = MATRIX[new][unfinished], may_start_beside(new, unfinished, state)
    if rule is Beside.ALLOWED_IN_DOUBT:
        assert answer is (Beside.ALLOWED if state is S.IN_DOUBT else Beside.REFUSED)
    else:
        assert answer is rule


def test_void_is_exclusive_with_captures_and_increment_with_everything() -> None:
    assert MATRIX[K.VOID][K.CAPTURE] is Beside.REFUSED
    assert MATRIX[K.CAPTURE][K.VOID] is Beside.REFUSED
    assert set(MATRIX[K.INCREMENT].values()) == {Beside.REFUSED}


def test_a_payment_with_money_never_becomes_declined_failed_or_not_sent() -> None:
    money = {P.AUTHORIZED, P.PARTIALLY_CAPTURED, P.CAPTURED, P.PARTIALLY_REFUNDED, P.REFUNDED}
    assert set(PAYMENT_TRANSITIONS) == set(P)
    for state in money:
        never = {P.DECLINED, P.FAILED, P.NOT_SENT, P.PROCESSING, P.IN_DOUBT}
        assert not PAYMENT_TRANSITIONS[state] & never


def test_the_published_page_is_what_the_tables_say() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/states.md"
    assert page.read_text("utf-8").rstrip() == tables.markdown().rstrip()
