"""The audit's comparison: clean books are clean, and each fault is found."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest.audit import CHUNK_ROWS, Audit, Books, Stored
from loadtest.calls import Acknowledged

TOLD = Acknowledged("AUTHORIZE", "mer_a", "k1", "op_1", "pay_1", 4, 100, "d1")
STORED: Stored = ("k1", "op_1", "pay_1", 4, 100, "d1")
CHARGE: dict[str, Any] = {
    "type": "effect",
    "effect": "authorization",
    "reference": "op_1-1",
    "transaction_id": "auth_1",
    "payment_id": "pay_1",
    "amount_minor": 100,
}
AGAIN = {**CHARGE, "transaction_id": "auth_2"}
CAPTURE_TOLD = Acknowledged("CAPTURE", "mer_a", "k2", "op_2", "pay_1", 4, 100, "d2")
CAPTURE_STORED: Stored = ("k2", "op_2", "pay_1", 4, 100, "d2")
CAPTURE = {**CHARGE, "effect": "capture", "reference": "op_2-1", "transaction_id": "cap_1"}
DECLINED, FAILED, NOT_SENT, CANCELED = 5, 6, 7, 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def compare(
    folder: Path,
    told: Iterable[Acknowledged] = (TOLD,),
    stored: Iterable[Stored] = (STORED,),
    journal: Iterable[dict[str, Any]] = (CHARGE,),
    *,
    reversing: Iterable[str] = (),
    charges: bool = True,
    answers: bool = True,
) -> Audit:
    path = folder / "journal"
    path.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in journal) + b'{"type":"eff')
    with closing(Books(folder / "audit.sqlite")) as books:
        books.tell(told)
        books.store(stored)
        if charges:
            books.charge(path)
        books.reverse(reversing)
        return books.compare(
            "a test", answers=answers, charges=charges, unfinished=0, discrepancies=0
        )


def faults(audit: Audit) -> set[str]:
    harmless = {"acked", "acked_operations", "unknown", "unknown_recorded", "source"}
    return {name for name, value in audit.figures().items() if value and name not in harmless} - {
        "clean"
    }


def told_with(**changes: Any) -> Acknowledged:
    return TOLD._replace(**changes)


def silent(told: Acknowledged) -> Acknowledged:
    """The same call, timed out."""
    return told._replace(operation_id="", payment_id="", state=-4, digest="")


def test_equal_books_are_clean(folder: Path) -> None:
    audit = compare(folder, told=[TOLD, TOLD], stored=[STORED, STORED])
    assert audit.clean
    assert audit.acked == 1


@pytest.mark.parametrize(
    ("found", "books"),
    [
        ({"missing", "missing_rows", "uncharged"}, {"stored": [], "journal": []}),
        ({"missing", "missing_rows", "unrecorded_charges"}, {"stored": []}),
        ({"missing", "uncharged"}, {"journal": []}),
        ({"missing", "uncharged"}, {"journal": [{**CHARGE, "amount_minor": 99}]}),
        (
            {"missing", "uncharged"},
            {
                "journal": [
                    CHARGE,
                    {"type": "effect", "effect": "reversal", "takes_back": [CHARGE]},
                ]
            },
        ),
        ({"contradicted"}, {"stored": [("k1", "op_2", "pay_1", 4, 100, "d1")]}),
        ({"contradicted"}, {"stored": [("k1", "op_1", "pay_1", 4, 101, "d1")]}),
        ({"contradicted"}, {"stored": [("k1", "op_1", "pay_1", 4, 100, "d2")]}),
        (
            {"contradicted", "charged_declines"},
            {"stored": [("k1", "op_1", "pay_1", 5, 100, "d1")]},
        ),
        (
            {"contradicted"},
            {
                "told": [told_with(state=9)],
                "stored": [("k1", "op_1", "pay_1", 6, 100, "d1")],
                "journal": [],
            },
        ),
        ({"contradicted"}, {"told": [TOLD, told_with(digest="d2")]}),
        ({"unkept"}, {"stored": [("k1", "op_1", "pay_1", 4, 100, "")]}),
        ({"repeated_rows"}, {"stored": [STORED, ("k1", "op_1", "pay_1", 4, 100, "")]}),
        (
            {"duplicate_charges"},
            {"journal": [CHARGE, AGAIN]},
        ),
        (
            {"unrecorded_charges"},
            {"journal": [CHARGE, {**AGAIN, "payment_id": "pay_2"}]},
        ),
        (
            {"charged_declines"},
            {
                "told": [told_with(kind="DECLINE", state=5)],
                "stored": [("k1", "op_1", "pay_1", 5, 100, "d1")],
            },
        ),
        (
            {"charged_refusals"},
            {"told": [told_with(operation_id="", payment_id="", state=-8, digest="")]},
        ),
    ],
)
def test_each_fault_is_found(folder: Path, found: set[str], books: dict[str, Any]) -> None:
    audit = compare(folder, **books)
    assert not audit.clean
    assert found <= faults(audit)
    if found != {"repeated_rows"}:
        assert faults(audit) == found


@pytest.mark.parametrize("state", [DECLINED, FAILED, NOT_SENT, CANCELED])
@pytest.mark.parametrize("answered", [True, False])
def test_what_did_not_happen_must_not_stand_at_the_psp(
    folder: Path, state: int, *, answered: bool
) -> None:
    told = told_with(state=state, digest="") if answered else silent(TOLD)
    stored: list[Stored] = [("k1", "op_1", "pay_1", state, 100, "")]
    audit = compare(folder, told=[told], stored=stored)
    assert faults(audit) == {"charged_declines"}
    assert compare(folder, told=[told], stored=stored, journal=[]).clean
    # While the gateway takes it back, it may stand.
    assert compare(folder, told=[told], stored=stored, reversing=["pay_1"]).clean


@pytest.mark.parametrize("state", [DECLINED, FAILED, NOT_SENT, CANCELED])
@pytest.mark.parametrize("answered", [True, False])
def test_capture_that_did_not_happen_must_not_stand_at_the_psp(
    folder: Path, state: int, *, answered: bool
) -> None:
    told = CAPTURE_TOLD._replace(state=state, digest="") if answered else silent(CAPTURE_TOLD)
    books: dict[str, Any] = {
        "told": [TOLD, told],
        "stored": [STORED, ("k2", "op_2", "pay_1", state, 100, "")],
    }
    audit = compare(folder, **books, journal=[CHARGE, CAPTURE])
    assert faults(audit) == {"charged_declines"}
    bounced = {"type": "effect", "effect": "bounce", "takes_back": [CAPTURE]}
    for journal in ([CHARGE], [CHARGE, CAPTURE, bounced]):
        assert compare(folder, **books, journal=journal).clean


def test_stored_success_without_an_answer_needs_its_charge(folder: Path) -> None:
    assert faults(compare(folder, told=[silent(TOLD)], journal=[])) == {"missing", "uncharged"}


def test_answer_not_sent_binds_no_more_once_a_repeat_succeeded(folder: Path) -> None:
    assert compare(folder, told=[told_with(state=NOT_SENT, digest="")]).clean


def test_verification_is_never_charged(folder: Path) -> None:
    books: dict[str, Any] = {
        "told": [told_with(kind="VERIFY", amount_minor=0)],
        "stored": [("k1", "op_1", "pay_1", 4, 0, "d1")],
    }
    verified = {**CHARGE, "effect": "verify", "transaction_id": "ver_1", "amount_minor": 0}
    assert compare(folder, **books, journal=[verified]).clean
    assert faults(compare(folder, **books, journal=[])) == {"missing", "uncharged"}
    assert faults(compare(folder, **books, journal=[verified, CHARGE])) == {"charged_declines"}


@pytest.mark.parametrize("kind", ["CAPTURE", "VOID", "REFUND", "INCREMENT"])
def test_each_success_is_done_once_at_the_psp_with_its_amount(folder: Path, kind: str) -> None:
    effect = {**CAPTURE, "effect": kind.lower()}
    for told in (CAPTURE_TOLD._replace(kind=kind), silent(CAPTURE_TOLD)._replace(kind=kind)):

        def found(*effects: dict[str, Any], told: Acknowledged = told) -> set[str]:
            books: dict[str, Any] = {"told": [TOLD, told], "stored": [STORED, CAPTURE_STORED]}
            return faults(compare(folder, **books, journal=[CHARGE, *effects]))

        assert found(effect) == set()
        assert found() == {"missing", "uncharged"}
        assert found({**effect, "amount_minor": 101}) == {"missing", "uncharged"}
        # Under another attempt of the same operation, too.
        again = {**effect, "reference": "op_2-2", "transaction_id": "cap_2"}
        assert found(effect, again) == {"repeated_effects"}


@pytest.mark.parametrize("kind", ["CAPTURE", "REFUND", "INCREMENT"])
def test_money_that_the_database_knows_nothing_of_is_found(folder: Path, kind: str) -> None:
    audit = compare(folder, journal=[CHARGE, {**CAPTURE, "effect": kind.lower()}])
    assert faults(audit) == {"unrecorded_charges"}


def test_what_the_gateway_voids_by_itself_is_no_fault(folder: Path) -> None:
    assert compare(folder, journal=[CHARGE, {**CAPTURE, "effect": "void"}]).clean


def test_charge_that_a_void_took_back_as_a_whole_is_no_fault(folder: Path) -> None:
    books: dict[str, Any] = {
        "told": [TOLD, CAPTURE_TOLD._replace(kind="VOID")],
        "stored": [STORED, CAPTURE_STORED],
    }
    taken_back = {"type": "effect", "effect": "cancel", "takes_back": [CHARGE]}
    assert compare(folder, **books, journal=[CHARGE, taken_back]).clean
    assert not compare(folder, **books, journal=[]).clean


def test_refused_capture_must_not_stand_at_the_psp(folder: Path) -> None:
    refused = CAPTURE_TOLD._replace(operation_id="", payment_id="", state=-9, digest="")
    stored: list[Stored] = [STORED, ("k2", "op_2", "pay_1", 1, 100, "")]
    audit = compare(folder, told=[TOLD, refused], stored=stored, journal=[CHARGE, CAPTURE])
    assert faults(audit) == {"charged_refusals"}


@pytest.mark.parametrize("code", [1, 2, 4, 10, 13, 14])
@pytest.mark.parametrize("recorded", [True, False])
def test_call_without_an_answer_is_unknown_and_no_fault(
    folder: Path, code: int, *, recorded: bool
) -> None:
    books: dict[str, Any] = {} if recorded else {"stored": [], "journal": []}
    audit = compare(folder, told=[silent(TOLD)._replace(state=-code)], **books)
    assert audit.clean
    assert (audit.acked, audit.unknown, audit.unknown_recorded) == (0, 1, int(recorded))


def test_answer_after_time_outs_counts_as_the_answer(folder: Path) -> None:
    refused = told_with(operation_id="", payment_id="", state=-8, digest="")
    audit = compare(folder, told=[silent(TOLD), TOLD, refused])
    assert audit.clean
    assert (audit.acked, audit.unknown) == (1, 0)


def test_answer_in_doubt_is_held_to_its_ids_alone(folder: Path) -> None:
    in_doubt = told_with(state=8, digest="")
    assert compare(folder, told=[in_doubt]).clean
    assert not compare(folder, told=[in_doubt], stored=[]).clean


def test_charge_that_was_taken_back_and_made_again_is_one_charge(folder: Path) -> None:
    taken_back = {"type": "effect", "effect": "cancel", "takes_back": [CHARGE]}
    assert compare(folder, journal=[CHARGE, taken_back, AGAIN]).clean


def test_charges_are_not_judged_without_a_journal(folder: Path) -> None:
    audit = compare(folder, charges=False)
    assert audit.clean
    assert audit.duplicate_charges is None


def test_frozen_answers_are_not_judged_where_only_the_gateway_can_be_asked(folder: Path) -> None:
    stored = [("k1", "op_1", "pay_1", 4, 100, "")]
    assert not compare(folder, stored=stored).clean
    assert compare(folder, stored=stored, answers=False).clean
    stored = [("k1", "op_2", "pay_1", 4, 100, "")]
    assert compare(folder, stored=stored, answers=False).contradicted == 1


def test_unanswered_call_without_a_merchant_is_of_the_only_one(folder: Path) -> None:
    unanswered = told_with(key="k2", merchant_id="", state=-4)
    for told, merchants in (
        ([TOLD, unanswered], {"mer_a"}),
        ([TOLD, told_with(key="k3", merchant_id="mer_b"), unanswered], {"mer_a", "mer_b", ""}),
    ):
        with closing(Books(folder / "audit.sqlite")) as books:
            books.tell(told)
            assert {each for portion in books.portions() for each, _ in portion} == merchants


def test_every_key_is_looked_up_however_many_there_are(folder: Path) -> None:
    count = 2 * CHUNK_ROWS + 17
    with closing(Books(folder / "audit.sqlite")) as books:
        books.tell(told_with(key=f"k{number // 2}") for number in range(count))
        keys = {key for portion in books.portions() for _, key in portion}
        assert all(len(portion) <= CHUNK_ROWS for portion in books.portions())
    assert keys == {f"k{number // 2}" for number in range(count)}
