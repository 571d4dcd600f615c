"""gateway.domain.decisions: each rule by an example; test_decision_properties.py tries them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain import decisions
from gateway.domain.decisions import Settled
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import (
    Aggregate,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    PaymentState,
    ResponseCode,
    Verdict,
)
from gateway.domain.money import AMOUNT_MINOR_MAX
from gateway.domain.states import Event
from tests.payment_book import CURRENCY, PaymentBook

K, S, P = OperationKind, OperationState, PaymentState
AUTOMATIC, MANUAL, MULTIPLE = CaptureMethod

DOUBT = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)
UNSENT = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED)


def says(verdict: Verdict, reported_minor: int | None = None) -> ConnectorAnswer:
    return ConnectorAnswer(
        Delivery.ANSWERED, verdict, Outcome(amount_reported_minor=reported_minor)
    )


YES, NO = says(Verdict.APPROVED), says(Verdict.DECLINED)


class Book(PaymentBook):
    """A payment to which things are done one after another."""

    def __init__(
        self, method: CaptureMethod = MULTIPLE, amount_minor: int = 100, *, partial: bool = False
    ) -> None:
        super().__init__(method, amount_minor, partial=partial)
        self.last: Settled | None = None

    @property
    def authorization(self) -> Operation:
        return self.operations[0]

    def __getitem__(self, operation_id: str) -> Operation:
        return next(o for o in self.operations if o.operation_id == operation_id)

    def capture(self, amount_minor: int | None = None, *, final: bool = False) -> str:
        origin = self.new_origin()
        return self.enter_begun(
            decisions.begin_capture(self.aggregate, origin, amount_minor, None, final)
        )

    def void(self) -> str:
        return self.enter_begun(decisions.begin_void(self.aggregate, self.new_origin(), "note"))

    def refund(self, amount_minor: int | None = None, *, of: str | None = None) -> str:
        origin = self.new_origin()
        return self.enter_begun(
            decisions.begin_refund(self.aggregate, origin, amount_minor, None, of, "note")
        )

    def increment(self, amount_minor: int) -> str:
        origin = self.new_origin()
        return self.enter_begun(
            decisions.begin_increment(self.aggregate, origin, amount_minor, CURRENCY)
        )

    def enter(self, settled: Settled | None) -> None:
        assert settled is not None
        self.last = settled
        self.enter_settled(settled)

    def settle(self, operation_id: str, answer: ConnectorAnswer) -> str:
        at, new_id = self.later(), self.new_operation_id()
        self.enter(decisions.settle(self.payment, self[operation_id], answer, at, new_id))
        return operation_id

    def bounce(self, operation_id: str) -> None:
        answer = says(Verdict.FAILED)
        self.enter(decisions.bounce(self.payment, self[operation_id], answer, self.later()))

    def authorized(self, answer: ConnectorAnswer = YES) -> Book:
        self.settle("op_1", answer)
        return self

    def discrepancies(self) -> list[str]:
        assert self.last is not None
        return [discrepancy.kind for discrepancy in self.last.discrepancies]


def refused(reason: Reason, call: Callable[[], object]) -> GatewayError:
    with pytest.raises(GatewayError) as error:
        call()
    assert error.value.reason is reason
    return error.value


# --- authorizations -------------------------------------------------------------------------------


def test_amount_zero_is_a_verification_and_leads_to_verified() -> None:
    book = Book(amount_minor=0)
    assert book.authorization.kind is K.VERIFY
    assert book.authorized().payment.state is P.VERIFIED
    refused(Reason.PAYMENT_NOT_AUTHORIZED, book.capture)
    refused(Reason.NOTHING_TO_VOID, book.void)


@pytest.mark.parametrize(
    ("answer", "operation", "payment"),
    [
        (YES, S.SUCCEEDED, P.AUTHORIZED),
        (NO, S.DECLINED, P.DECLINED),
        (says(Verdict.FAILED), S.FAILED, P.FAILED),
        (says(Verdict.PENDING), S.PENDING, P.PENDING),
        (says(Verdict.REQUIRES_ACTION), S.REQUIRES_ACTION, P.REQUIRES_ACTION),
        (says(Verdict.CANCELED), S.CANCELED, P.CANCELED),
        (says(Verdict.EXPIRED), S.EXPIRED, P.EXPIRED),
        (says(Verdict.UNKNOWN), S.IN_DOUBT, P.IN_DOUBT),
        (DOUBT, S.IN_DOUBT, P.IN_DOUBT),
        (UNSENT, S.NOT_SENT, P.NOT_SENT),
    ],
)
def test_payment_shows_what_became_of_its_authorization(
    answer: ConnectorAnswer, operation: OperationState, payment: PaymentState
) -> None:
    book = Book().authorized(answer)
    assert (book.authorization.state, book.payment.state) == (operation, payment)
    assert book.payment.version == 2


def test_what_a_later_answer_does_not_say_is_as_it_was_told_before() -> None:
    accepted = replace(
        says(Verdict.PENDING), connector_transaction_id="tx-1", processing_ms=7, outcome=Outcome()
    )
    book = Book()
    book.settle("op_1", accepted)
    book.settle("op_1", ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED))
    attempt = book.authorization.attempt
    assert (attempt.connector_transaction_id, attempt.processing_ms) == ("tx-1", 7)
    assert attempt.outcome is not None
    assert book.payment.connector_transaction_id == "tx-1"


def test_a_payment_keeps_what_its_approval_told_and_when() -> None:
    book, ends_at = Book(), datetime(2026, 2, 1, tzinfo=UTC)
    outcome = Outcome(auth_code="A12345", network_transaction_id="net_1")
    book.authorized(
        ConnectorAnswer(
            Delivery.ANSWERED,
            Verdict.APPROVED,
            outcome,
            connector_transaction_id="psp_1",
            authorization_expires_at=ends_at,
        )
    )
    payment = book.payment
    assert (payment.auth_code, payment.network_transaction_id) == ("A12345", "net_1")
    told = payment.connector_transaction_id, payment.authorization_expires_at
    assert told == ("psp_1", ends_at)
    assert payment.updated_at is not None
    assert payment.updated_at == book.authorization.updated_at


def test_only_what_succeeded_can_have_had_another_currency() -> None:
    assert Book().authorized(replace(NO, currency="USD")).discrepancies() == []


def test_answer_that_the_table_does_not_allow_changes_nothing() -> None:
    book = Book().authorized(NO)
    settled = decisions.settle(book.payment, book.authorization, YES, datetime.now(UTC), "op_9")
    assert settled is None


def test_automatic_authorization_is_captured_by_an_operation_of_the_gateway() -> None:
    book = Book(AUTOMATIC).authorized()
    capture = book.aggregate.operations[1]
    assert (capture.kind, capture.origin, capture.state, capture.amount_minor) == (
        K.CAPTURE,
        OperationOrigin.GATEWAY,
        S.SUCCEEDED,
        100,
    )
    assert (capture.parent_operation_id, capture.idempotency_key) == ("op_1", None)
    assert capture.final
    assert (book.payment.state, book.payment.captured_minor) == (P.CAPTURED, 100)
    refused(Reason.PAYMENT_CLOSED_FOR_CAPTURE, book.capture)


@pytest.mark.parametrize("approved", [40, 1])
def test_partial_approval_that_was_not_allowed_is_declined_and_reversed(approved: int) -> None:
    book = Book(AUTOMATIC).authorized(says(Verdict.APPROVED, approved))
    assert (book.authorization.state, book.payment.state) == (S.DECLINED, P.DECLINED)
    outcome = book.authorization.attempt.outcome
    assert outcome is not None
    assert outcome.response_code is ResponseCode.PARTIAL_APPROVAL_REVERSED
    [reversal] = book.aggregate.operations[1:]
    assert (reversal.kind, reversal.state) == (K.REVERSAL, S.PROCESSING)
    assert reversal.amount_minor == approved
    assert (reversal.note, reversal.parent_operation_id) == ("op_1-1", "op_1")
    assert (book.payment.authorized_minor, book.payment.captured_minor) == (0, 0)


@pytest.mark.parametrize("reported_minor", [0, -5])
def test_approval_of_nothing_is_declined_without_anything_to_reverse(reported_minor: int) -> None:
    book = Book(partial=True).authorized(says(Verdict.APPROVED, reported_minor))
    assert book.payment.state is P.DECLINED
    assert len(book.aggregate.operations) == 1


@pytest.mark.parametrize("approved", [40, 1])
def test_partial_approval_that_was_allowed_is_the_new_ceiling(approved: int) -> None:
    book = Book(partial=True).authorized(says(Verdict.APPROVED, approved))
    assert (book.payment.requested_minor, book.payment.authorized_minor) == (100, approved)
    error = refused(Reason.AMOUNT_EXCEEDS_AUTHORIZED, lambda: book.capture(approved + 1))
    assert error.metadata["available_minor"] == str(approved)


@pytest.mark.parametrize("method", CaptureMethod)
def test_over_approval_is_a_reported_fact_and_never_our_amount(method: CaptureMethod) -> None:
    book = Book(method, partial=True).authorized(says(Verdict.APPROVED, 130))
    assert (book.payment.authorized_minor, book.payment.authorized_reported_minor) == (100, 130)
    assert book.discrepancies() == ["authorized_amount"]
    captured = (book.payment.captured_minor, book.payment.captured_reported_minor)
    assert captured == ((100, 130) if method is AUTOMATIC else (0, None))


def test_another_currency_than_ours_is_a_discrepancy() -> None:
    answer = says(Verdict.APPROVED)
    answer.currency = "USD"
    assert Book().authorized(answer).discrepancies() == ["currency"]


@pytest.mark.parametrize("captured_minor", [0, 30])
def test_expired_authorization_takes_no_capture_and_keeps_what_was_captured(
    captured_minor: int,
) -> None:
    book = Book().authorized()
    if captured_minor:
        book.settle(book.capture(captured_minor), YES)
    book.settle("op_1", says(Verdict.EXPIRED))
    assert book.payment.state is (P.PARTIALLY_CAPTURED if captured_minor else P.EXPIRED)
    assert book.payment.captured_minor == captured_minor
    with pytest.raises(GatewayError):
        book.capture(1)


def test_expiry_does_not_contradict_a_void_or_a_capture_on_its_way() -> None:
    book = Book().authorized()
    book.settle(book.void(), YES)
    book.settle("op_1", says(Verdict.EXPIRED))
    assert book.payment.state is P.VOIDED

    book = Book().authorized()
    capture = book.capture(30)
    book.settle("op_1", says(Verdict.EXPIRED))
    book.settle(capture, YES)
    assert book.payment.state is P.PARTIALLY_CAPTURED


# --- captures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [DOUBT, says(Verdict.PENDING)])
def test_reservation_stays_without_a_definite_outcome(answer: ConnectorAnswer) -> None:
    book = Book().authorized()
    book.settle(book.capture(60), answer)
    assert (book.payment.capture_pending_minor, book.payment.captured_minor) == (60, 0)
    refused(Reason.AMOUNT_EXCEEDS_AUTHORIZED, lambda: book.capture(41))
    book.settle(book.capture(40), YES)
    assert book.payment.state is P.PARTIALLY_CAPTURED


@pytest.mark.parametrize(
    "answer", [NO, UNSENT, *map(says, (Verdict.FAILED, Verdict.CANCELED, Verdict.EXPIRED))]
)
def test_definite_outcome_without_success_releases_the_reservation(answer: ConnectorAnswer) -> None:
    book = Book().authorized()
    book.settle(book.capture(60), answer)
    assert book.payment.capture_pending_minor == 0
    assert book.payment.state is P.AUTHORIZED
    assert book[book.capture()].amount_minor == 100


def test_capture_without_an_amount_takes_what_is_left() -> None:
    book = Book().authorized()
    book.settle(book.capture(30), YES)
    book.capture(20)
    assert book[book.capture()].amount_minor == 50
    refused(Reason.AMOUNT_EXCEEDS_AUTHORIZED, book.capture)


def test_final_capture_closes_at_intent_and_releases_the_rest() -> None:
    book = Book().authorized()
    capture = book.capture(30, final=True)
    refused(Reason.PAYMENT_CLOSED_FOR_CAPTURE, lambda: book.capture(1))
    book.settle(capture, DOUBT)
    refused(Reason.PAYMENT_CLOSED_FOR_CAPTURE, lambda: book.capture(1))
    book.settle(capture, YES)
    assert (book.payment.captured_minor, book.payment.voided_minor) == (30, 70)
    assert book.payment.state is P.PARTIALLY_CAPTURED
    refused(Reason.NOTHING_TO_VOID, book.void)


@pytest.mark.parametrize("answer", [NO, UNSENT])
def test_final_capture_that_did_not_succeed_reopens_the_payment(answer: ConnectorAnswer) -> None:
    book = Book().authorized()
    book.settle(book.capture(30, final=True), answer)
    assert not book.payment.capture_closed
    assert book[book.capture()].amount_minor == 100


@pytest.mark.parametrize("answer", [YES, NO])
def test_rest_of_a_final_capture_is_released_when_the_last_one_beside_it_ends(
    answer: ConnectorAnswer,
) -> None:
    book = Book().authorized()
    earlier = book.capture(20)
    book.settle(book.capture(30, final=True), YES)
    assert book.payment.voided_minor == 0
    book.settle(earlier, answer)
    assert book.payment.voided_minor == (50 if answer is YES else 70)


def test_manual_takes_one_capture_and_releases_the_rest() -> None:
    book = Book(MANUAL).authorized()
    capture = book.capture(30)
    assert book[capture].final
    refused(Reason.PAYMENT_CLOSED_FOR_CAPTURE, lambda: book.capture(1))
    book.settle(capture, YES)
    refused(Reason.PAYMENT_CLOSED_FOR_CAPTURE, lambda: book.capture(1))
    assert book.payment.voided_minor == 70


def test_captured_amount_that_the_psp_reports_otherwise_is_added_up_beside_ours() -> None:
    book = Book().authorized()
    book.settle(book.capture(30), says(Verdict.APPROVED, 35))
    assert (book.payment.captured_minor, book.payment.captured_reported_minor) == (30, 35)
    assert book.discrepancies() == ["captured_amount"]
    book.settle(book.capture(20), YES)
    assert (book.payment.captured_minor, book.payment.captured_reported_minor) == (50, 55)
    book.settle(book.capture(10), says(Verdict.APPROVED, 5))
    assert (book.payment.captured_minor, book.payment.captured_reported_minor) == (60, None)


def test_reported_totals_stay_within_int64() -> None:
    book = Book().authorized()
    for _ in range(4):
        book.settle(book.capture(10), says(Verdict.APPROVED, 2**62))
    assert book.payment.captured_reported_minor == decisions.REPORTED_MINOR_MAX < 2**63


def test_other_currency_than_the_payments_is_refused() -> None:
    book = Book().authorized()
    for begin in (
        lambda: decisions.begin_capture(book.aggregate, book.new_origin(), 1, "USD", False),
        lambda: decisions.begin_increment(book.aggregate, book.new_origin(), 1, "USD"),
        lambda: decisions.begin_refund(book.aggregate, book.new_origin(), 1, "USD", None, ""),
    ):
        refused(Reason.CURRENCY_MISMATCH, begin)


# --- voids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, DOUBT, says(Verdict.PENDING)])
def test_void_is_exclusive_with_a_capture_that_may_have_taken_place(
    answer: ConnectorAnswer | None,
) -> None:
    book = Book().authorized()
    capture = book.capture(30)
    if answer is not None:
        book.settle(capture, answer)
    error = refused(Reason.OPERATION_IN_PROGRESS, book.void)
    assert error.metadata["operation_id"] == capture


def test_void_after_a_partial_capture_releases_the_rest() -> None:
    book = Book().authorized()
    book.settle(book.capture(30), YES)
    assert book[book.void()].amount_minor == 70
    book.settle(book.aggregate.operations[-1].operation_id, YES)
    assert (book.payment.voided_minor, book.payment.state) == (70, P.PARTIALLY_CAPTURED)
    refused(Reason.PAYMENT_CLOSED_FOR_CAPTURE, lambda: book.capture(1))
    refused(Reason.NOTHING_TO_VOID, book.void)


@pytest.mark.parametrize("method", [AUTOMATIC, MULTIPLE])
def test_void_of_what_is_captured_as_a_whole_is_refused(method: CaptureMethod) -> None:
    book = Book(method).authorized()
    if method is MULTIPLE:
        book.settle(book.capture(), YES)
    assert book.payment.state is P.CAPTURED
    refused(Reason.NOTHING_TO_VOID, book.void)


def test_void_of_what_has_expired_is_refused() -> None:
    book = Book().authorized()
    book.settle("op_1", says(Verdict.EXPIRED))
    assert (book.payment.state, book.payment.authorized_minor) == (P.EXPIRED, 100)
    refused(Reason.NOTHING_TO_VOID, book.void)


def test_a_cancel_request_is_remembered_beyond_a_void_that_was_declined() -> None:
    book = Book()
    request = book.void()
    book.authorized()
    book.settle(request, NO)
    assert book.payment.cancel_requested
    book.void()
    assert book.payment.cancel_requested


@pytest.mark.parametrize("kind", K)
@pytest.mark.parametrize("state", S)
def test_a_release_that_was_accepted_is_unconfirmed_and_nothing_else(
    kind: OperationKind, state: OperationState
) -> None:
    operation = Book().authorization
    operation.kind, operation.state = kind, state
    expected = state is S.PENDING and kind in (K.VOID, K.REVERSAL)
    assert decisions.is_unconfirmed(operation) is expected


@pytest.mark.parametrize("method", [AUTOMATIC, MANUAL, MULTIPLE])
@pytest.mark.parametrize("asked", [False, True])
def test_a_void_gives_a_charge_back_only_where_it_was_asked_for_before_an_automatic_capture(
    method: CaptureMethod, asked: bool
) -> None:
    book = Book(method)
    if asked:
        book.void()
    assert decisions.takes_charge_back(book.payment) is (asked and method is AUTOMATIC)


def test_void_that_was_declined_leaves_the_payment_as_it_was() -> None:
    book = Book().authorized()
    book.settle(book.void(), NO)
    assert book.payment.state is P.AUTHORIZED
    book.settle(book.capture(), YES)


@pytest.mark.parametrize(
    "answer", [None, DOUBT, says(Verdict.PENDING), says(Verdict.REQUIRES_ACTION)]
)
def test_void_of_an_unfinished_authorization_is_a_durable_cancel_request(
    answer: ConnectorAnswer | None,
) -> None:
    book = Book()
    if answer is not None:
        book.authorized(answer)
    begun = decisions.begin_void(book.aggregate, book.new_origin(), "")
    assert begun.cancel_request
    assert begun.payment.cancel_requested
    accepted = decisions.accept_cancel_request(begun.payment, begun.operation, datetime.now(UTC))
    assert accepted.operation.state is S.PENDING
    assert accepted.operation.attempt.delivery is Delivery.NOT_SENT
    book.aggregate = Aggregate(accepted.payment, [book.authorization, accepted.operation])
    refused(Reason.OPERATION_IN_PROGRESS, book.void)


@pytest.mark.parametrize("state", [S.PROCESSING, S.IN_DOUBT])
def test_cancelled_authorization_without_effect_cannot_be_executed_by_a_repeat(
    state: OperationState,
) -> None:
    book = Book()
    if state is S.IN_DOUBT:
        book.authorized(DOUBT)
    book.void()
    assert book.authorized(UNSENT).authorization.state is S.CANCELED
    assert book.payment.state is P.CANCELED


def test_void_of_what_never_was_authorized_is_refused() -> None:
    for answer in (NO, UNSENT, says(Verdict.EXPIRED)):
        refused(Reason.NOTHING_TO_VOID, Book().authorized(answer).void)


# --- refunds --------------------------------------------------------------------------------------


def test_the_smallest_amount_can_be_captured_and_refunded_and_none_cannot() -> None:
    book = Book().authorized()
    refused(Reason.AMOUNT_EXCEEDS_AUTHORIZED, lambda: book.capture(0))
    book.settle(book.capture(1), YES)
    refused(Reason.AMOUNT_EXCEEDS_CAPTURED, lambda: book.refund(0))
    book.settle(book.refund(1), YES)
    assert (book.payment.captured_minor, book.payment.refunded_minor) == (1, 1)


def captured_twice() -> tuple[Book, str, str]:
    book = Book().authorized()
    first, second = book.capture(60), book.capture(40)
    book.settle(second, YES)
    book.settle(first, YES)
    return book, first, second


def test_refund_is_allocated_to_the_oldest_capture_first() -> None:
    book, first, second = captured_twice()
    assert book[book.refund(70)].allocations == ((first, 60), (second, 10))
    assert book[book.refund()].allocations == ((second, 30),)
    refused(Reason.AMOUNT_EXCEEDS_CAPTURED, book.refund)


def test_refund_of_a_named_capture_is_held_to_it() -> None:
    book, first, second = captured_twice()
    refused(Reason.AMOUNT_EXCEEDS_CAPTURED, lambda: book.refund(41, of=second))
    refund = book[book.refund(40, of=second)]
    assert (refund.allocations, refund.parent_operation_id) == (((second, 40),), second)
    refused(Reason.CAPTURE_NOT_REFUNDABLE, lambda: book.refund(1, of=second))
    refused(Reason.CAPTURE_NOT_REFUNDABLE, lambda: book.refund(1, of="op_none"))
    assert book[book.refund()].allocations == ((first, 60),)


def test_second_refund_beyond_captured_is_refused_while_the_first_is_in_doubt() -> None:
    book, *_ = captured_twice()
    first = book.settle(book.refund(60), DOUBT)
    refused(Reason.AMOUNT_EXCEEDS_CAPTURED, lambda: book.refund(60))
    book.settle(first, NO)
    book.settle(book.refund(60), YES)
    assert (book.payment.refunded_minor, book.payment.state) == (60, P.PARTIALLY_REFUNDED)
    book.settle(book.refund(), YES)
    assert book.payment.state is P.REFUNDED


def test_what_the_psp_says_it_refunded_beyond_ours_cannot_be_refunded_again() -> None:
    book = Book().authorized()
    book.settle(book.capture(), YES)
    book.settle(book.refund(30), says(Verdict.APPROVED, 50))
    refused(Reason.AMOUNT_EXCEEDS_CAPTURED, lambda: book.refund(51))
    assert book[book.refund()].amount_minor == 50


@pytest.mark.parametrize("answer", [NO, says(Verdict.EXPIRED)])
def test_nothing_is_refunded_of_what_was_not_authorized(answer: ConnectorAnswer) -> None:
    refused(Reason.PAYMENT_NOT_AUTHORIZED, Book().authorized(answer).refund)


def test_refunds_and_voids_keep_the_callers_note() -> None:
    book = Book().authorized()
    book.settle(book.capture(30), YES)
    assert book[book.refund(10)].note == "note"
    assert book[book.void()].note == "note"


def test_refund_counts_only_captures_that_succeeded() -> None:
    book = Book().authorized()
    book.capture(50)
    refused(Reason.AMOUNT_EXCEEDS_CAPTURED, lambda: book.refund(1))


def test_refund_is_allocated_to_no_capture_that_failed() -> None:
    book = Book().authorized()
    book.settle(book.capture(50), NO)
    second = book.settle(book.capture(50), YES)
    assert book[book.refund(20)].allocations == ((second, 20),)


def test_refund_elsewhere_takes_its_part_of_the_oldest_capture() -> None:
    book, first, second = captured_twice()
    book.enter(
        decisions.record_elsewhere(
            book.aggregate, K.REFUND, 70, YES, book.later(), book.new_operation_id()
        )
    )
    assert book.operations[-1].allocations == ((first, 60), (second, 10))
    assert book[book.refund()].allocations == ((second, 30),)


def test_void_elsewhere_releases_what_is_not_captured() -> None:
    book = Book().authorized()
    book.settle(book.capture(30), YES)
    book.enter(
        decisions.record_elsewhere(
            book.aggregate, K.VOID, 70, YES, book.later(), book.new_operation_id()
        )
    )
    assert (book.payment.voided_minor, book.payment.state) == (70, P.PARTIALLY_CAPTURED)
    assert book.operations[-1].allocations == ()


def test_refunded_amount_that_the_psp_reports_otherwise_is_a_discrepancy() -> None:
    book, *_ = captured_twice()
    book.settle(book.refund(30), says(Verdict.APPROVED, 50))
    assert book.discrepancies() == ["refunded_amount"]
    book.settle(book.refund(10), says(Verdict.APPROVED, 10))
    assert book.discrepancies() == []


def test_refund_waits_for_a_void_only_where_that_gives_the_charge_back() -> None:
    charged = Book(AUTOMATIC)
    charged.void()
    charged.authorized()
    refused(Reason.OPERATION_IN_PROGRESS, lambda: charged.refund(10))
    captured = Book().authorized()
    captured.settle(captured.capture(30), YES)
    captured.void()
    assert captured[captured.refund(10)].amount_minor == 10


def test_refund_that_bounces_gives_the_amount_back() -> None:
    book, first, _ = captured_twice()
    refund = book.settle(book.refund(60), YES)
    book.bounce(refund)
    assert (book.payment.refunded_minor, book.payment.state) == (0, P.CAPTURED)
    assert book[refund].state is S.FAILED
    assert book[book.refund(60)].allocations == ((first, 60),)


# --- bounces of captures --------------------------------------------------------------------------


def test_capture_that_bounces_leads_back() -> None:
    book, first, second = captured_twice()
    book.bounce(first)
    assert (book.payment.captured_minor, book.payment.state) == (40, P.PARTIALLY_CAPTURED)
    book.bounce(second)
    assert (book.payment.captured_minor, book.payment.state) == (0, P.AUTHORIZED)


@pytest.mark.parametrize("answer", [YES, DOUBT])
def test_bounce_after_refunds_is_recorded_beside_the_amounts(answer: ConnectorAnswer) -> None:
    book, first, second = captured_twice()
    book.settle(book.refund(70), answer)
    book.bounce(first)
    assert (book.payment.captured_minor, book.payment.captured_reported_minor) == (100, 40)
    assert book[first].state is S.FAILED
    assert book.discrepancies() == ["captured_amount"]
    error = refused(Reason.AMOUNT_EXCEEDS_CAPTURED, lambda: book.refund(1))
    assert error.metadata["available_minor"] == "0"
    book.bounce(second)
    assert book.payment.captured_reported_minor == 0


def test_only_what_succeeded_bounces() -> None:
    book = Book().authorized()
    capture = book[book.capture(10)]
    answer = says(Verdict.FAILED)
    at = datetime.now(UTC)
    assert decisions.bounce(book.payment, capture, answer, at) is None
    assert decisions.bounce(book.payment, book.authorization, answer, at) is None


# --- increments -----------------------------------------------------------------------------------


def test_increment_raises_the_ceiling_when_it_succeeds() -> None:
    book = Book().authorized()
    increment = book.increment(50)
    assert (book.payment.authorized_minor, book.payment.increment_pending_minor) == (100, 50)
    refused(Reason.OPERATION_IN_PROGRESS, book.capture)
    book.settle(increment, YES)
    assert (book.payment.authorized_minor, book.payment.increment_pending_minor) == (150, 0)
    assert book[book.capture()].amount_minor == 150


def test_increment_in_doubt_keeps_the_old_ceiling() -> None:
    book = Book().authorized()
    increment = book.settle(book.increment(50), DOUBT)
    refused(Reason.AMOUNT_EXCEEDS_AUTHORIZED, lambda: book.capture(101))
    book.settle(book.capture(100), YES)
    assert book.payment.state is P.CAPTURED
    book.settle(increment, YES)
    assert (book.payment.authorized_minor, book.payment.state) == (150, P.PARTIALLY_CAPTURED)
    assert book[book.capture()].amount_minor == 50


@pytest.mark.parametrize(
    "begin", [lambda book: book.capture(30), Book.void, lambda book: book.increment(50)]
)
def test_no_increment_begins_beside_what_is_under_way(begin: Callable[[Book], str]) -> None:
    book = Book().authorized()
    begin(book)
    refused(Reason.OPERATION_IN_PROGRESS, lambda: book.increment(50))


def test_increment_that_was_declined_changes_nothing() -> None:
    book = Book().authorized()
    book.settle(book.increment(50), NO)
    assert (book.payment.authorized_minor, book.payment.increment_pending_minor) == (100, 0)


@pytest.mark.parametrize("how", ["void", "final capture"])
def test_late_increment_of_a_closed_payment_is_released_and_reported(how: str) -> None:
    book = Book().authorized()
    increment = book.settle(book.increment(50), DOUBT)
    book.settle(book.void() if how == "void" else book.capture(30, final=True), YES)
    state = book.payment.state
    book.settle(increment, YES)
    assert book.payment.state is state
    assert book.payment.captured_minor + book.payment.voided_minor == 150
    assert book.discrepancies() == ["late_increment"]
    with pytest.raises(GatewayError):
        book.capture(1)


def test_late_increment_beside_a_last_capture_is_released_with_that_ones_rest() -> None:
    book = Book().authorized()
    increment = book.settle(book.increment(50), DOUBT)
    capture = book.capture(30, final=True)
    book.settle(increment, YES)
    assert (book.payment.capture_pending_minor, book.payment.voided_minor) == (30, 0)
    book.settle(capture, YES)
    assert (book.payment.captured_minor, book.payment.voided_minor) == (30, 120)


def test_late_increment_does_not_revive_an_expired_payment() -> None:
    book = Book().authorized()
    increment = book.settle(book.increment(50), DOUBT)
    book.settle("op_1", says(Verdict.EXPIRED))
    book.settle(increment, YES)
    assert book.payment.state is P.EXPIRED


def test_increment_that_the_psp_reports_otherwise_is_a_reported_fact() -> None:
    book = Book().authorized()
    book.settle(book.increment(50), says(Verdict.APPROVED, 20))
    assert (book.payment.authorized_minor, book.payment.authorized_reported_minor) == (150, 120)
    assert book.discrepancies() == ["authorized_amount"]


def test_increment_is_for_manual_payments_before_any_capture() -> None:
    refused(Reason.INCREMENT_NOT_ALLOWED, lambda: Book(AUTOMATIC).authorized().increment(1))
    returned = Book(AUTOMATIC).authorized()
    returned.bounce(returned.operations[-1].operation_id)
    assert returned.payment.state is P.AUTHORIZED
    refused(Reason.INCREMENT_NOT_ALLOWED, lambda: returned.increment(1))
    book = Book().authorized()
    book.settle(book.capture(10), YES)
    refused(Reason.INCREMENT_NOT_ALLOWED, lambda: book.increment(1))
    elsewhere = Book().authorized()
    elsewhere.enter(
        decisions.record_elsewhere(
            elsewhere.aggregate, K.CAPTURE, 10, YES, elsewhere.later(), elsewhere.new_operation_id()
        )
    )
    assert elsewhere.payment.state is P.AUTHORIZED
    refused(Reason.INCREMENT_NOT_ALLOWED, lambda: elsewhere.increment(1))
    voided = Book().authorized()
    voided.settle(voided.void(), YES)
    refused(Reason.PAYMENT_NOT_AUTHORIZED, lambda: voided.increment(1))


def test_increment_stays_below_the_largest_amount_and_is_told_what_is_left() -> None:
    book = Book().authorized()
    error = refused(
        Reason.INCREMENT_NOT_ALLOWED, lambda: book.increment(AMOUNT_MINOR_MAX - 100 + 1)
    )
    assert error.metadata["available_minor"] == str(AMOUNT_MINOR_MAX - 100)
    increment = book[book.increment(AMOUNT_MINOR_MAX - 100)]
    assert increment.parent_operation_id == book.authorization.operation_id


# --- new attempts and late successes --------------------------------------------------------------


def test_repeat_of_an_authorization_that_was_not_sent_is_a_new_attempt_under_the_next_epoch() -> (
    None
):
    book = Book().authorized(UNSENT)
    again = decisions.restart(
        book.payment,
        book.authorization,
        "req_again",
        connector="other",
        connector_account_id="acc_other",
        route="why there",
    )
    assert (again.payment.state, again.operation.note) == (P.PROCESSING, "why there")
    assert (again.payment.connector, again.payment.connector_account_id) == ("other", "acc_other")
    assert again.payment.version == book.payment.version + 1
    operation = again.operation
    assert (operation.epoch, operation.attempt.number, operation.reference) == (2, 2, "op_1-2")
    assert (operation.request_id, operation.reason) == ("req_again", "")
    assert [attempt.number for attempt in operation.superseded_attempts] == [1]


def test_repeat_of_a_follow_up_reserves_anew_and_keeps_its_identity() -> None:
    book = Book().authorized()
    capture = book.settle(book.capture(), UNSENT)
    book.settle(book.capture(30), YES)
    begun = decisions.begin_capture(book.aggregate, book.new_origin(), None, None, False)
    again = decisions.begin_again(book[capture], begun, "req_again")
    assert again.operation.operation_id == capture
    assert (again.operation.amount_minor, again.payment.capture_pending_minor) == (70, 70)
    assert (again.operation.epoch, again.operation.attempt.number) == (2, 2)


@pytest.mark.parametrize(("reported", "amount"), [(None, 100), (130, 130), (0, 100), (-1, 100)])
def test_late_success_of_an_earlier_attempt_is_reversed_by_a_durable_operation(
    reported: int | None, amount: int
) -> None:
    book = Book().authorized(UNSENT)
    answer = says(Verdict.APPROVED, reported)
    at = datetime.now(UTC)
    settled = decisions.reverse_late_success(
        book.payment, book.authorization, 1, answer, at, ("op_8", "op_9")
    )
    [reversal] = settled.companions
    assert (reversal.kind, reversal.amount_minor, reversal.note) == (K.REVERSAL, amount, "op_1-1")
    assert [discrepancy.kind for discrepancy in settled.discrepancies] == ["late_success"]
    assert settled.operation.state is S.NOT_SENT


def test_late_success_of_a_void_is_reported_and_not_reversed() -> None:
    book = Book().authorized()
    void = book[book.settle(book.void(), NO)]
    settled = decisions.reverse_late_success(
        book.payment, void, 1, YES, datetime.now(UTC), ("op_8", "op_9")
    )
    assert settled.companions == []
    assert len(settled.discrepancies) == 1


def test_capture_that_is_taken_back_from_a_closed_payment_is_followed_by_a_release() -> None:
    book = Book().authorized()
    doubtful = book.settle(book.capture(40), DOUBT)
    final = book.settle(book.capture(30, final=True), DOUBT)
    book.settle(doubtful, says(Verdict.CANCELED))
    assert book.last is not None
    [release] = book.last.companions
    assert (release.kind, release.origin) == (K.VOID, OperationOrigin.GATEWAY)
    assert (release.amount_minor, release.state) == (70, S.PROCESSING)
    assert release.parent_operation_id == doubtful
    book.settle(final, YES)
    book.settle(release.operation_id, YES)
    assert (book.payment.captured_minor, book.payment.voided_minor) == (30, 70)


@pytest.mark.parametrize(("answer", "captured"), [(YES, 30), (NO, 0)])
def test_a_release_that_ends_beside_the_last_capture_leaves_what_that_holds(
    answer: ConnectorAnswer, captured: int
) -> None:
    book = Book().authorized()
    doubtful = book.settle(book.capture(40), DOUBT)
    final = book.settle(book.capture(30, final=True), DOUBT)
    book.settle(doubtful, says(Verdict.CANCELED))
    assert book.last is not None
    [release] = book.last.companions
    book.settle(release.operation_id, YES)
    assert (book.payment.state, book.payment.voided_minor) == (P.AUTHORIZED, 70)
    book.settle(final, answer)
    assert (book.payment.captured_minor, book.payment.voided_minor) == (captured, 100 - captured)
    assert book.payment.capture_closed


@pytest.mark.parametrize(
    "answer", [UNSENT, NO, says(Verdict.FAILED), YES], ids=["unsent", "declined", "failed", "yes"]
)
def test_capture_of_a_closed_payment_that_gives_no_hold_back_is_followed_by_nothing(
    answer: ConnectorAnswer,
) -> None:
    book = Book().authorized()
    doubtful = book.settle(book.capture(40), DOUBT)
    book.settle(book.capture(30, final=True), YES)
    book.settle(doubtful, answer)
    assert book.last is not None
    assert book.last.companions == []


def test_capture_that_is_taken_back_from_an_open_payment_may_be_captured_again() -> None:
    book = Book().authorized()
    book.settle(book.capture(40), says(Verdict.CANCELED))
    assert book.last is not None
    assert book.last.companions == []
    assert book[book.capture()].amount_minor == 100


def test_late_capture_of_a_closed_payment_is_reversed_and_what_that_gives_back_released() -> None:
    book = Book().authorized()
    late = book[book.settle(book.capture(40), UNSENT)]
    book.settle(book.capture(30, final=True), YES)
    settled = decisions.reverse_late_success(
        book.payment, late, 1, YES, datetime.now(UTC), ("op_8", "op_9")
    )
    kinds = [(each.operation_id, each.kind) for each in settled.companions]
    assert kinds == [("op_8", K.REVERSAL), ("op_9", K.VOID)]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (NO, "DECLINED"),
        (says(Verdict.FAILED), "FAILED"),
        (says(Verdict.CANCELED), "CANCELED"),
        (UNSENT, "NEVER_SENT"),
    ],
)
def test_refusal_after_a_success_is_a_discrepancy_and_the_success_stands(
    answer: ConnectorAnswer, told: str
) -> None:
    book = Book().authorized()
    capture = book[book.settle(book.capture(40), YES)]
    settled = decisions.contradict(book.payment, capture, answer, book.later())
    assert settled is not None
    assert settled.operation.state is S.SUCCEEDED
    assert settled.payment.captured_minor == 40
    assert settled.payment.version == book.payment.version + 1
    [found] = settled.discrepancies
    assert (found.kind, found.expected, found.reported) == ("late_refusal", "SUCCEEDED", told)


@pytest.mark.parametrize("answer", [YES, DOUBT, says(Verdict.PENDING)])
def test_what_denies_no_success_is_no_discrepancy(answer: ConnectorAnswer) -> None:
    book = Book().authorized()
    capture = book[book.settle(book.capture(40), YES)]
    assert decisions.contradict(book.payment, capture, answer, book.later()) is None
    declined = book[book.settle(book.capture(10), NO)]
    assert decisions.contradict(book.payment, declined, NO, book.later()) is None
    void = book[book.settle(book.void(), YES)]
    assert decisions.contradict(book.payment, void, NO, book.later()) is None


# --- allocation -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), max_size=5), st.integers(0, 500))
def test_allocation_fills_the_parts_in_their_order(parts: list[int], amount: int) -> None:
    named = [(f"op_{number}", part) for number, part in enumerate(parts)]
    allocations = decisions.allocate(named, amount)
    assert sum(share for _, share in allocations) == min(amount, sum(parts))
    for (name, share), (wanted, part) in zip(allocations, named, strict=False):
        assert name == wanted
        assert 0 < share <= part
    for (_, share), (_, part) in zip(allocations[:-1], named, strict=False):
        assert share == part


@given(st.sampled_from(Delivery), st.sampled_from(Verdict))
def test_only_what_surely_was_not_sent_and_has_no_verdict_is_never_sent(
    delivery: Delivery, verdict: Verdict
) -> None:
    event = decisions.event_of(ConnectorAnswer(delivery, verdict))
    unsent = delivery is Delivery.NOT_SENT and verdict is Verdict.UNKNOWN
    assert (event is Event.NEVER_SENT) == unsent
