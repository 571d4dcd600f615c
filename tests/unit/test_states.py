"""gateway.domain.states and its rendering: what is not in the tables is not allowed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from gateway.domain import states, tables
from gateway.domain.model import OperationKind as K
from gateway.domain.model import OperationState as S
from gateway.domain.model import PaymentState as P
from gateway.domain.model import Verdict
from gateway.domain.states import (
    EVENT_KINDS,
    FROZEN,
    MATRIX,
    OPERATION_TRANSITIONS,
    PAYMENT_TRANSITIONS,
    UNFINISHED,
    Beside,
    Event,
    may_start_beside,
    next_state,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "states.md"

DEFINITE = frozenset(S) - UNFINISHED

# The rules anew, in other words than the tables': what each event leads to, and from where.
LEADS_TO = {
    Event.APPROVED: S.SUCCEEDED,
    Event.DECLINED: S.DECLINED,
    Event.FAILED: S.FAILED,
    Event.ACCEPTED: S.PENDING,
    Event.ACTION_REQUIRED: S.REQUIRES_ACTION,
    Event.DOUBTED: S.IN_DOUBT,
    Event.NEVER_SENT: S.NOT_SENT,
    Event.CANCELED: S.CANCELED,
    Event.EXPIRED: S.EXPIRED,
    Event.BOUNCED: S.FAILED,
    Event.RESTARTED: S.PROCESSING,
    Event.CASCADED: S.PROCESSING,
}


def comes_from(kind: K, event: Event) -> frozenset[S]:
    match event:
        case Event.DOUBTED | Event.NEVER_SENT:
            return frozenset({S.PROCESSING, S.IN_DOUBT})
        case Event.BOUNCED:
            return frozenset({S.SUCCEEDED}) if kind in (K.CAPTURE, K.REFUND) else frozenset()
        case Event.RESTARTED:
            return frozenset({S.NOT_SENT})
        case Event.CASCADED:
            return frozenset({S.PROCESSING}) if kind in (K.AUTHORIZE, K.VERIFY) else frozenset()
        case Event.EXPIRED if kind is K.AUTHORIZE:
            return UNFINISHED | {S.SUCCEEDED}
        case _:
            return UNFINISHED


@pytest.mark.parametrize("kind", K)
def test_every_state_moves_on_every_event_as_the_rules_say_and_no_other_way(kind: K) -> None:
    for state, event in product(S, Event):
        wanted = LEADS_TO[event] if state in comes_from(kind, event) else None
        assert next_state(kind, state, event) is wanted, (state.name, event.name)


def test_a_move_that_is_not_in_the_table_is_refused_for_every_kind() -> None:
    for kind, state, event in product(K, S, Event):
        if (state, event) not in OPERATION_TRANSITIONS:
            assert next_state(kind, state, event) is None


def test_a_definite_outcome_is_left_only_by_a_new_attempt_a_bounce_or_by_time() -> None:
    left = {(state, event) for state, event in OPERATION_TRANSITIONS if state in DEFINITE}
    assert left == {
        (S.NOT_SENT, Event.RESTARTED),
        (S.SUCCEEDED, Event.BOUNCED),
        (S.SUCCEEDED, Event.EXPIRED),
    }


def test_only_what_was_not_sent_begins_anew_and_only_what_is_being_sent_goes_elsewhere() -> None:
    assert [move for move, after in OPERATION_TRANSITIONS.items() if after is S.PROCESSING] == [
        (S.NOT_SENT, Event.RESTARTED),
        (S.PROCESSING, Event.CASCADED),
    ]


def test_what_the_psp_acknowledged_is_never_in_doubt_and_never_not_sent() -> None:
    for kind, state in product(K, (S.PENDING, S.REQUIRES_ACTION)):
        assert next_state(kind, state, Event.DOUBTED) is None
        assert next_state(kind, state, Event.NEVER_SENT) is None


def test_kinds_are_named_only_for_moves_of_the_table() -> None:
    assert EVENT_KINDS.keys() <= OPERATION_TRANSITIONS.keys()


def test_every_verdict_is_an_event_of_its_own() -> None:
    assert states.VERDICT_EVENTS.keys() == set(Verdict)
    assert len(set(states.VERDICT_EVENTS.values())) == len(Verdict)


def test_answers_are_frozen_but_those_that_a_repeat_may_change() -> None:
    assert frozenset(S) - FROZEN == {S.PROCESSING, S.IN_DOUBT, S.NOT_SENT}


# --- payments -------------------------------------------------------------------------------------


def test_every_payment_state_has_its_moves_and_leads_elsewhere() -> None:
    assert PAYMENT_TRANSITIONS.keys() == set(P)
    for state, after in PAYMENT_TRANSITIONS.items():
        assert state not in after


def test_every_payment_state_is_reached_from_processing() -> None:
    reached, new = {P.PROCESSING}, {P.PROCESSING}
    while new:
        new = {after for state in new for after in PAYMENT_TRANSITIONS[state]} - reached
        reached |= new
    assert reached == set(P)


def test_every_unfinished_state_can_end_in_every_way_that_a_psp_may_tell() -> None:
    told = {S.SUCCEEDED, S.DECLINED, S.FAILED, S.CANCELED, S.EXPIRED}
    for state in UNFINISHED:
        assert told <= {OPERATION_TRANSITIONS.get((state, event)) for event in Event}


def test_a_payment_with_money_never_becomes_declined_failed_or_not_sent() -> None:
    for state in (P.AUTHORIZED, P.PARTIALLY_CAPTURED, P.CAPTURED, P.PARTIALLY_REFUNDED, P.REFUNDED):
        never = {P.DECLINED, P.FAILED, P.NOT_SENT, P.PROCESSING, P.IN_DOUBT}
        assert not PAYMENT_TRANSITIONS[state] & never


def test_a_payment_without_money_stays_without_money() -> None:
    money = {
        P.AUTHORIZED,
        P.PARTIALLY_CAPTURED,
        P.CAPTURED,
        P.PARTIALLY_REFUNDED,
        P.REFUNDED,
        P.VERIFIED,
    }
    for state in (P.DECLINED, P.FAILED, P.CANCELED, P.EXPIRED, P.VOIDED, P.NOT_SENT):
        assert not PAYMENT_TRANSITIONS[state] & money


# --- the matrix -----------------------------------------------------------------------------------

_NO = Beside.REFUSED
_YES = Beside.ALLOWED
_CANCELS = Beside.AS_CANCEL_REQUEST


def rule(new: K, unfinished: K, state: S) -> Beside:
    """The matrix anew, in the words of the design."""
    if unfinished in (K.VERIFY, K.REVERSAL, K.DISPUTE):
        # There is no payment yet, or something is being taken back; a bank's demand hinders nobody.
        return _YES if unfinished is K.DISPUTE else _NO
    if unfinished is K.AUTHORIZE:
        return _CANCELS if new is K.VOID else _NO
    if new in (K.INCREMENT, K.REFUND):
        return _NO if new is K.INCREMENT else _YES  # exclusive; held to what is captured
    if unfinished is K.INCREMENT:
        return _YES if state is S.IN_DOUBT else _NO  # by the old ceiling
    if unfinished is K.CAPTURE:
        return _YES if new is K.CAPTURE else _NO
    return _NO if unfinished is K.VOID else _YES


@pytest.mark.parametrize("unfinished", K)
@pytest.mark.parametrize("new", [K.CAPTURE, K.VOID, K.REFUND, K.INCREMENT])
def test_every_pair_of_operations_runs_together_as_the_design_says(new: K, unfinished: K) -> None:
    for state in UNFINISHED:
        assert may_start_beside(new, unfinished, state) is rule(new, unfinished, state), state


def test_the_matrix_has_every_operation_that_acts_on_a_payment_beside_every_kind() -> None:
    assert MATRIX.keys() == {K.CAPTURE, K.VOID, K.REFUND, K.INCREMENT}
    for beside in MATRIX.values():
        assert beside.keys() == set(K)


def test_void_and_capture_exclude_each_other_both_ways() -> None:
    for state in UNFINISHED:
        assert may_start_beside(K.VOID, K.CAPTURE, state) is Beside.REFUSED
        assert may_start_beside(K.CAPTURE, K.VOID, state) is Beside.REFUSED


# --- the document ---------------------------------------------------------------------------------


def drawings() -> Iterator[set[tuple[str, str]]]:
    """The ways of each drawing in the document, those from the composite state spelled out."""
    for drawing in re.findall(
        r"```mermaid\nstateDiagram-v2\n(.*?)```", tables.markdown(), re.DOTALL
    ):
        ways = re.findall(r"^ +(\S+) --> (\w+)(?:: \w+)?$", drawing, re.MULTILINE)
        assert len(ways) == drawing.count("-->") == len(set(re.findall(".+-->.+", drawing)))
        yield {
            (state, after)
            for before, after in ways
            for state in ([s.name for s in UNFINISHED] if before == "UNFINISHED" else [before])
        }


def test_drawings_show_the_tables_and_nothing_else() -> None:
    operations, payments = drawings()
    start = ("[*]", "PROCESSING")
    assert operations == {start} | {
        (state.name, after.name) for (state, _), after in OPERATION_TRANSITIONS.items()
    }
    assert payments == {start} | {
        (state.name, after.name)
        for state, afters in PAYMENT_TRANSITIONS.items()
        for after in afters
    }


def test_text_and_document_name_every_state_event_and_kind() -> None:
    for shown in (tables.text(), tables.markdown()):
        words = set(re.findall(r"[A-Z_]{3,}", shown))
        assert words >= {member.name for enum in (S, P, K, Event) for member in enum}


def test_every_event_is_explained_once_in_the_document() -> None:
    shown = tables.markdown()
    for event in Event:
        assert len(re.findall(rf"^\| `{event.name}` \| [A-Z][^|]+\. \|$", shown, re.MULTILINE)) == 1


def test_document_is_what_the_module_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "gateway.domain.tables"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    assert printed == tables.markdown()
    assert DOCUMENT.read_text(encoding="utf-8") == printed
