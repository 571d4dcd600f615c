"""The simulator's books: its rules hold, and its journal alone tells them."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.connectors.simulator.journal import Record, Standing, read_journal, standing_charges
from gateway.connectors.simulator.ledger import Answer, Ledger, Send
from gateway.connectors.simulator.outcomes import ACTION_LIFE_S, VISITS
from gateway.connectors.simulator.profiles import PROFILES

pytestmark = pytest.mark.unit


class Books:
    """A ledger and what it wrote."""

    def __init__(self, profile: str = "idempotent") -> None:
        self.profile = PROFILES[profile]
        self.ledger = Ledger(self.profile)
        self.records: list[Record] = [{"type": "start", "journal_id": self.ledger.journal_id}]
        self.now = 1000.0
        self._requests = 0

    def send(
        self, kind: str, reference: str, amount_minor: int, currency: str = "EUR", **more: Any
    ) -> Answer:
        send = Send(kind, reference, amount_minor, currency, "account", "pay_1", **more)
        if kind == "authorize" and not (send.token or send.method):
            send.token = "tok_visa"
        self._requests += 1
        known = self.ledger.reference(reference)
        record: Record | None
        if known is not None and known.canceled is not None:
            record, answer = self.ledger.refuse_canceled(send, self._requests, self.now)
        elif (repeated := self.ledger.duplicate_of(reference, self.now)) is not None:
            record, answer = self.ledger.repeat(repeated, send, self._requests, self.now)
        else:
            behaviour = self.ledger.behaviour(send)
            record, answer = self.ledger.execute(
                send, behaviour, self._requests, self.now, self.now
            )
        if record is not None:
            self.records.append(record)
        return answer

    def query(self, kind: str, reference: str) -> Answer:
        records, answer = self.ledger.query(kind, reference, 0, self.now)
        self.records += records
        return answer

    def cancel(self, kind: str, reference: str) -> Answer:
        record, answer = self.ledger.cancel(kind, reference, 0, self.now)
        self.records.append(record)
        return answer

    def visit(self, transaction_id: str, outcome: str) -> Record | None:
        transaction = self.ledger.visited(transaction_id)
        assert transaction is not None
        record = self.ledger.visit(transaction, outcome, 0, self.now)
        if record is not None:
            self.records.append(record)
        return record

    def read_again(self) -> "Books":
        """The books after a restart."""
        books = Books(self.profile.name)
        books.records, books.now = list(self.records), self.now
        books.ledger = Ledger(self.profile, self.records)
        return books

    def standing(self) -> Standing:
        (standing,) = standing_charges(self.records)
        return standing


def authorized(amount_minor: int = 100, **more: Any) -> tuple[Books, str]:
    books = Books()
    answer = books.send("authorize", "a-1", amount_minor, **more)
    return books, answer["transaction_id"]


def test_captures_beyond_the_authorized_amount_are_rejected() -> None:
    books, target = authorized()
    assert books.send("capture", "c-1", 60, target_transaction_id=target)["result"] == "approved"
    refused = books.send("capture", "c-2", 41, target_transaction_id=target)
    assert (refused["result"], refused["code"]) == ("rejected", "amount_exceeds_authorized")
    assert books.standing().captured_minor == 60


def test_refunds_beyond_the_named_capture_are_rejected() -> None:
    books, target = authorized()
    first = books.send("capture", "c-1", 60, target_transaction_id=target)["transaction_id"]
    books.send("capture", "c-2", 40, target_transaction_id=target)
    assert books.send("refund", "r-1", 60, target_transaction_id=first)["result"] == "approved"
    refused = books.send("refund", "r-2", 1, target_transaction_id=first)
    assert refused["code"] == "amount_exceeds_captured"
    assert books.send("refund", "r-3", 40, target_transaction_id=target)["result"] == "approved"
    assert books.standing().net_minor == 0


def test_final_capture_releases_what_it_leaves_and_cancelling_it_reopens() -> None:
    books, target = authorized()
    books.send("capture", "c-1", 60, target_transaction_id=target, final=True)
    assert (books.standing().open_minor, books.standing().voided_minor) == (0, 40)
    assert books.cancel("capture", "c-1")["had"] == "effect"
    assert (books.standing().open_minor, books.standing().captured_minor) == (100, 0)


def test_void_releases_whatever_is_left_and_says_how_much() -> None:
    books, target = authorized()
    books.send("capture", "c-1", 30, target_transaction_id=target)
    assert books.send("void", "v-1", 100, target_transaction_id=target)["amount_minor"] == 70
    again = books.send("void", "v-2", 70, target_transaction_id=target)
    assert again["code"] == "nothing_to_void"


def test_increment_comes_before_any_capture() -> None:
    books, target = authorized()
    assert books.send("increment", "i-1", 50, target_transaction_id=target)["result"] == "approved"
    books.send("capture", "c-1", 150, target_transaction_id=target)
    refused = books.send("increment", "i-2", 50, target_transaction_id=target)
    assert refused["code"] == "already_captured"


def test_reversal_by_reference_takes_back_every_charge_of_it() -> None:
    books = Books("non_idempotent")
    for _ in range(2):
        books.send("authorize", "a-1", 100, capture=True)
    answer = books.send("reversal", "x-1", 100, target_reference="a-1")
    assert (answer["result"], answer["amount_minor"]) == ("approved", 200)
    assert not any(standing.stands for standing in standing_charges(books.records))
    again = books.send("reversal", "x-2", 100, target_reference="a-1")
    assert again["code"] == "nothing_to_reverse"


def test_follow_up_in_another_currency_or_on_another_account_is_rejected() -> None:
    books, target = authorized()
    other = books.send("capture", "c-1", 1, "USD", target_transaction_id=target)
    assert other["code"] == "currency_mismatch"
    foreign = Send(
        "capture", "c-2", 1, "EUR", "another account", "pay_1", target_transaction_id=target
    )
    _, answer = books.ledger.execute(foreign, books.ledger.behaviour(foreign), 9, 0.0, 0.0)
    assert answer["code"] == "transaction_not_found"


def test_pending_refund_holds_its_amount_until_it_is_settled() -> None:
    books, target = authorized(token="tok_refund_pending", capture=True)
    assert books.send("refund", "r-1", 60, target_transaction_id=target)["result"] == "pending"
    assert books.standing().refunded_minor == 0
    refused = books.send("refund", "r-2", 41, target_transaction_id=target)
    assert refused["code"] == "amount_exceeds_captured"
    assert [books.query("refund", "r-1")["result"] for _ in range(3)] == [
        "pending",
        "approved",
        "approved",
    ]
    assert books.standing().refunded_minor == 60


def test_a_final_capture_releases_nothing_that_another_one_holds_when_it_settles() -> None:
    books, target = authorized(token="tok_capture_pending")
    books.send("capture", "c-1", 50, target_transaction_id=target, final=True)
    books.send("capture", "c-2", 50, target_transaction_id=target)
    for reference in ("c-1", "c-1", "c-2", "c-2"):
        books.query("capture", reference)
    assert (books.standing().captured_minor, books.standing().open_minor) == (100, 0)


@pytest.mark.parametrize("other", ["capture", "void", "reversal"])
def test_a_pending_increment_is_declined_once_its_authorization_is_used_or_gone(other: str) -> None:
    books, target = authorized(token="tok_increment_pending")
    sent = books.send("increment", "i-1", 50, target_transaction_id=target)
    assert sent["result"] == "pending"
    books.send(other, "o-1", 100, target_transaction_id=target)
    answers = [books.query("increment", "i-1") for _ in range(2)]
    assert (answers[-1]["result"], answers[-1]["code"]) == ("declined", "authorization_closed")
    assert books.standing().open_minor == 0


def test_what_a_pending_void_releases_is_neither_voided_again_nor_captured() -> None:
    books, target = authorized(token="tok_void_pending")
    assert books.send("void", "v-1", 100, target_transaction_id=target)["result"] == "pending"
    again = books.send("void", "v-2", 100, target_transaction_id=target)
    assert again["code"] == "nothing_to_void"
    capture = books.send("capture", "c-1", 1, target_transaction_id=target)
    assert capture["code"] == "amount_exceeds_authorized"
    assert [books.query("void", "v-1")["result"] for _ in range(2)] == ["pending", "approved"]
    assert books.standing().voided_minor == 100


def test_refund_that_bounces_gives_the_money_back_to_the_merchant() -> None:
    books, target = authorized(token="tok_refund_bounces", capture=True)
    assert books.send("refund", "r-1", 100, target_transaction_id=target)["result"] == "approved"
    books.query("refund", "r-1")
    found = books.query("refund", "r-1")
    assert (found["result"], found["code"]) == ("failed", "refund_bounced")
    assert books.standing().net_minor == 100


def test_repeat_of_a_reference_with_another_amount_is_rejected_and_changes_nothing() -> None:
    books, _ = authorized()
    refused = books.send("authorize", "a-1", 101)
    assert (refused["result"], refused["code"]) == ("rejected", "reference_reused")
    assert books.query("authorize", "a-1")["amount_minor"] == 100


def test_cancel_that_later_operations_forbid_is_refused() -> None:
    books, target = authorized()
    capture = books.send("capture", "c-1", 100, target_transaction_id=target)
    books.send("refund", "r-1", 1, target_transaction_id=capture["transaction_id"])
    told = books.cancel("capture", "c-1")
    assert (told["code"], told["standing"]) == ("cancel_refused", books.query("capture", "c-1"))
    assert books.cancel("refund", "c-1")["code"] == "cancel_refused"
    assert "standing" not in books.cancel("refund", "c-1")
    assert books.query("capture", "c-1")["result"] == "approved"
    assert books.cancel("refund", "r-1")["had"] == "effect"
    assert books.cancel("capture", "c-1")["had"] == "effect"


def test_cancelling_a_pending_authorization_keeps_it_from_ever_taking_effect() -> None:
    books = Books()
    books.send("authorize", "a-1", 100, token="tok_pending")
    assert books.cancel("authorize", "a-1")["result"] == "canceled"
    assert [books.query("authorize", "a-1")["result"] for _ in range(3)] == ["canceled"] * 3
    assert standing_charges(books.records) == []


_KINDS = ("capture", "void", "refund", "increment", "reversal")
_step = st.tuples(
    st.sampled_from(("send", "cancel", "query")),
    st.sampled_from(_KINDS),
    st.integers(1, 8),
    st.integers(1, 120),
    st.booleans(),
)


@settings(max_examples=300)
@given(
    token=st.sampled_from(
        (
            *("tok_visa", "tok_refund_pending", "tok_void_pending"),
            *("tok_capture_pending", "tok_capture_bounces"),
        )
    ),
    profile=st.sampled_from(("idempotent", "non_idempotent", "key_2s")),
    capture=st.booleans(),
    steps=st.lists(_step, max_size=25),
)
def test_books_balance_after_any_steps_and_the_journal_rebuilds_them(
    token: str, profile: str, capture: bool, steps: list[tuple[str, str, int, int, bool]]
) -> None:
    books = Books(profile)
    target = books.send("authorize", "a-1", 100, token=token, capture=capture)["transaction_id"]
    do: dict[str, Callable[[str, str], object]] = {"cancel": books.cancel, "query": books.query}
    for action, kind, number, amount_minor, flag in steps:
        reference = f"{kind}-{number}"
        if action == "send":
            final = flag and kind == "capture"
            books.send(kind, reference, amount_minor, target_transaction_id=target, final=final)
        else:
            do[action](kind, reference)
        books.now += 0.5
        for standing in standing_charges(books.records):
            assert 0 <= standing.refunded_minor <= standing.captured_minor
            assert standing.captured_minor + standing.voided_minor <= standing.authorized_minor
    rebuilt = Ledger(books.profile, books.records)
    assert rebuilt._standings == books.ledger._standings
    live = {key: asdict(value) | {"looks": 0} for key, value in books.ledger._transactions.items()}
    assert {key: asdict(value) for key, value in rebuilt._transactions.items()} == live
    for reference, known in books.ledger._references.items():
        again = rebuilt.reference(reference)
        assert again is not None
        assert again.canceled == known.canceled


def test_torn_last_line_of_a_journal_is_left_out_and_a_malformed_one_is_an_error(
    tmp_path: Any,
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'{"type":"start"}\n{"type":"rec')
    assert read_journal(path) == [{"type": "start"}]
    path.write_bytes(b'{"type":"start"\n{"type":"start"}\n')
    with pytest.raises(Exception, match="line 1 of the journal is malformed"):
        read_journal(path)


# --- customers ------------------------------------------------------------------------------------


def redirected() -> tuple[Books, str]:
    """A payment whose customer is to visit a page."""
    books = Books()
    answer = books.send("authorize", "a-1", 100, token="", capture=True, method="ideal")
    assert answer["result"] == "requires_action"
    return books, answer["transaction_id"]


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("outcome", "results", "captured_minor"),
    [
        ("approve", ["approved", "approved"], 100),
        ("decline", ["declined", "declined"], 0),
        ("later", ["approved", "approved"], 100),
    ],
)
def test_what_the_customer_chooses_decides(
    outcome: str, results: list[str], captured_minor: int, *, restarted: bool
) -> None:
    books, transaction_id = redirected()
    for _ in range(3):
        assert books.query("authorize", "a-1")["result"] == "requires_action"
    books = books.read_again() if restarted else books
    record = books.visit(transaction_id, outcome)
    assert record is not None
    assert record["answer"]["result"] == VISITS[outcome].value
    assert books.visit(transaction_id, "approve") is None
    books = books.read_again() if restarted else books
    assert [books.query("authorize", "a-1")["result"] for _ in range(2)] == results
    charges = [charge.captured_minor for charge in standing_charges(books.records)]
    assert charges == ([captured_minor] if captured_minor else [])


def test_the_page_of_a_payment_ends_with_the_customers_time() -> None:
    books, transaction_id = redirected()
    books.now += ACTION_LIFE_S
    assert books.visit(transaction_id, "approve") is None
    assert books.query("authorize", "a-1")["result"] == "expired"
    assert books.cancel("authorize", "a-1")["had"] == "refusal"
    assert books.read_again().query("authorize", "a-1")["result"] == "expired"


def test_a_cancelled_payment_can_no_longer_be_paid() -> None:
    books, transaction_id = redirected()
    assert books.cancel("authorize", "a-1")["result"] == "canceled"
    assert books.visit(transaction_id, "approve") is None
    assert standing_charges(books.records) == []


def test_a_repeat_for_another_method_is_another_request() -> None:
    books, _ = redirected()
    repeated = books.send("authorize", "a-1", 100, token="", capture=True, method="pix")
    assert (repeated["result"], repeated["code"]) == ("rejected", "reference_reused")
