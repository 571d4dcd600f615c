"""Whatever is asked and answered, in whatever order: amounts stay within bounds, moves are allowed.

Calls begin and answers settle on one payment, drawn at random; the rules are checked after each.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.domain import decisions, states
from gateway.domain.decisions import Begun, Settled
from gateway.domain.errors import GatewayError
from gateway.domain.model import (
    Aggregate,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    OperationKind,
    OperationState,
    Outcome,
    PaymentState,
    Verdict,
)
from tests.payment_book import CURRENCY, PaymentBook

K, S, P = OperationKind, OperationState, PaymentState
AMOUNT = 1000


@st.composite
def answers(draw: st.DrawFn) -> ConnectorAnswer:
    """Any answer, a PSP's amount that differs from ours included."""
    delivery = draw(st.sampled_from(Delivery))
    if delivery is not Delivery.ANSWERED:
        return ConnectorAnswer(delivery, reason="CONNECT_FAILED")
    reported = draw(st.one_of(st.none(), st.integers(0, 2 * AMOUNT)))
    return ConnectorAnswer(
        delivery,
        draw(st.sampled_from(Verdict)),
        Outcome(amount_reported_minor=reported),
        connector_transaction_id="ch_1",
    )


class OnePayment(RuleBasedStateMachine):
    @initialize(method=st.sampled_from(CaptureMethod), partial=st.booleans())
    def authorize(self, method: CaptureMethod, partial: bool) -> None:
        self.book = PaymentBook(method, AMOUNT, partial=partial)

    def begun(self, begun: Begun) -> None:
        before = self.book.payment
        assert begun.payment.version == before.version + 1
        assert begun.payment.state is before.state, "an intent moves no payment's state"
        self.book.enter_begun(begun)

    def settled(self, settled: Settled) -> None:
        before, after = self.book.payment, settled.payment
        assert after.version == before.version + 1
        allowed = states.PAYMENT_TRANSITIONS[before.state] | {before.state}
        assert after.state in allowed, f"{before.state.name} to {after.state.name}"
        self.book.enter_settled(settled)

    @rule(amount=st.one_of(st.none(), st.integers(1, 2 * AMOUNT)), final=st.booleans())
    def capture(self, amount: int | None, final: bool) -> None:
        try:
            self.begun(
                decisions.begin_capture(
                    self.book.aggregate, self.book.new_origin(), amount, CURRENCY, final
                )
            )
        except GatewayError:
            return

    @rule(amount=st.one_of(st.none(), st.integers(1, 2 * AMOUNT)))
    def refund(self, amount: int | None) -> None:
        try:
            begun = decisions.begin_refund(
                self.book.aggregate, self.book.new_origin(), amount, CURRENCY, None, ""
            )
        except GatewayError:
            return
        parts = begun.operation.allocations
        assert sum(part for _, part in parts) == begun.operation.amount_minor
        self.begun(begun)

    @rule()
    def void(self) -> None:
        try:
            begun = decisions.begin_void(self.book.aggregate, self.book.new_origin(), "")
        except GatewayError:
            return
        self.begun(begun)
        if begun.cancel_request:
            operation = self.book.operations[-1]
            payment = self.book.payment
            self.settled(decisions.accept_cancel_request(payment, operation, self.book.later()))

    @rule(amount=st.integers(1, AMOUNT))
    def increment(self, amount: int) -> None:
        try:
            self.begun(
                decisions.begin_increment(
                    self.book.aggregate, self.book.new_origin(), amount, CURRENCY
                )
            )
        except GatewayError:
            return

    @rule(which=st.integers(0), answer=answers())
    def answer(self, which: int, answer: ConnectorAnswer) -> None:
        operation = self.book.operations[which % len(self.book.operations)]
        at, new_id = self.book.later(), self.book.new_operation_id()
        settled = decisions.settle(self.book.payment, operation, answer, at, new_id)
        if settled is not None:
            self.settled(settled)

    @rule(which=st.integers(0))
    def bounce(self, which: int) -> None:
        operation = self.book.operations[which % len(self.book.operations)]
        answer = ConnectorAnswer(Delivery.ANSWERED, Verdict.FAILED)
        settled = decisions.bounce(self.book.payment, operation, answer, self.book.later())
        if settled is not None:
            self.settled(settled)

    @precondition(lambda self: self.book.operations[0].state not in states.UNFINISHED)
    @rule(kind=st.sampled_from([K.CAPTURE, K.REFUND]), amount=st.integers(0, 2 * AMOUNT))
    def elsewhere(self, kind: OperationKind, amount: int) -> None:
        """Somebody acts in the PSP's console."""
        new_id = self.book.new_operation_id()
        answer = ConnectorAnswer(
            Delivery.ANSWERED, Verdict.APPROVED, connector_transaction_id=f"tx_{new_id}"
        )
        settled = decisions.record_elsewhere(
            self.book.aggregate, kind, amount, answer, self.book.later(), new_id
        )
        assert settled is not None
        self.settled(settled)

    @rule(which=st.integers(0), answer=answers())
    def late_success(self, which: int, answer: ConnectorAnswer) -> None:
        """What an operation was taken for turns out to be wrong."""
        operation = self.book.operations[which % len(self.book.operations)]
        if operation.state in states.UNFINISHED | {S.SUCCEEDED}:
            return
        new_ids = self.book.new_operation_id(), self.book.new_operation_id()
        number, at = operation.attempt.number, self.book.later()
        self.settled(
            decisions.reverse_late_success(
                self.book.payment, operation, number, answer, at, new_ids
            )
        )

    @precondition(lambda self: self.book.payment.state is P.NOT_SENT)
    @rule()
    def repeat(self) -> None:
        operation = self.book.operations[0]
        begun = decisions.restart(
            self.book.payment,
            operation,
            "req_again",
            connector="other",
            connector_account_id="acc_other",
        )
        assert begun.operation.epoch == operation.epoch + 1
        assert begun.operation.attempt.number == operation.attempt.number + 1
        assert begun.operation.reference != operation.reference
        self.book.aggregate = Aggregate(begun.payment, [begun.operation, *self.book.operations[1:]])

    @invariant()
    def amounts_are_within_bounds(self) -> None:
        if not hasattr(self, "book"):
            return
        p = self.book.payment
        assert p.captured_minor + p.capture_pending_minor <= p.authorized_minor
        assert p.refunded_minor + p.refund_pending_minor <= p.captured_minor
        assert min(p.capture_pending_minor, p.refund_pending_minor, p.refunded_minor) >= 0
        assert min(p.captured_minor, p.voided_minor, p.increment_pending_minor) >= 0
        assert p.captured_minor + p.voided_minor <= p.authorized_minor

    @invariant()
    def reservations_are_those_of_the_unfinished_operations(self) -> None:
        if not hasattr(self, "book"):
            return
        for kind, reserved in (
            (K.CAPTURE, self.book.payment.capture_pending_minor),
            (K.REFUND, self.book.payment.refund_pending_minor),
            (K.INCREMENT, self.book.payment.increment_pending_minor),
        ):
            assert reserved == sum(
                operation.amount_minor
                for operation in self.book.operations
                if operation.kind is kind and operation.state in states.UNFINISHED
            )


TestOnePayment = OnePayment.TestCase
TestOnePayment.settings = settings(max_examples=300, stateful_step_count=30)
