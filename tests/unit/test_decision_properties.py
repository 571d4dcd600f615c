"""Whatever is asked and answered, in whatever order: amounts stay within bounds, moves are allowed.

Calls begin and answers settle on one payment, drawn at random; the rules are checked after each.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.domain import decisions, states
from gateway.domain.decisions import Begun, Origin, Settled
from gateway.domain.errors import GatewayError
from gateway.domain.model import (
    Aggregate,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Mode,
    Operation,
    OperationKind,
    OperationState,
    Outcome,
    PaymentState,
    Verdict,
)

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
    def __init__(self) -> None:
        super().__init__()
        self.numbers = count(1)
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def origin(self) -> Origin:
        number = next(self.numbers)
        return Origin(f"op_{number}", f"key {number}", b"\x01", f"req_{number}")

    @initialize(method=st.sampled_from(CaptureMethod), partial=st.booleans())
    def authorize(self, method: CaptureMethod, partial: bool) -> None:
        begun = decisions.begin_authorization(
            self.origin(),
            merchant_id="mer_1",
            payment_id="pay_1",
            mode=Mode.TEST,
            amount_minor=AMOUNT,
            currency="EUR",
            capture_method=method,
            connector="simulator",
            connector_account_id="mer_1",
            merchant_order_id="",
            allow_partial_approval=partial,
            details=b"",
        )
        self.aggregate = Aggregate(begun.payment, [begun.operation])

    def begun(self, begun: Begun) -> None:
        before = self.aggregate.payment
        assert begun.payment.version == before.version + 1
        assert begun.payment.state is before.state, "an intent moves no payment's state"
        self.aggregate = Aggregate(begun.payment, [*self.aggregate.operations, begun.operation])

    def settled(self, operation: Operation, settled: Settled) -> None:
        before, after = self.aggregate.payment, settled.payment
        assert after.version == before.version + 1
        allowed = states.PAYMENT_TRANSITIONS[before.state] | {before.state}
        assert after.state in allowed, f"{before.state.name} to {after.state.name}"
        operations = [
            settled.operation if other is operation else other
            for other in self.aggregate.operations
        ]
        self.aggregate = Aggregate(after, operations + settled.companions)

    @rule(amount=st.one_of(st.none(), st.integers(1, 2 * AMOUNT)), final=st.booleans())
    def capture(self, amount: int | None, final: bool) -> None:
        try:
            self.begun(decisions.begin_capture(self.aggregate, self.origin(), amount, "EUR", final))
        except GatewayError:
            return

    @rule(amount=st.one_of(st.none(), st.integers(1, 2 * AMOUNT)))
    def refund(self, amount: int | None) -> None:
        try:
            begun = decisions.begin_refund(self.aggregate, self.origin(), amount, "EUR", None, "")
        except GatewayError:
            return
        parts = begun.operation.allocations
        assert sum(part for _, part in parts) == begun.operation.amount_minor
        self.begun(begun)

    @rule()
    def void(self) -> None:
        try:
            begun = decisions.begin_void(self.aggregate, self.origin(), "")
        except GatewayError:
            return
        self.begun(begun)
        if begun.cancel_request:
            operation = self.aggregate.operations[-1]
            payment = self.aggregate.payment
            self.settled(operation, decisions.accept_cancel_request(payment, operation, self.at))

    @rule(amount=st.integers(1, AMOUNT))
    def increment(self, amount: int) -> None:
        try:
            self.begun(decisions.begin_increment(self.aggregate, self.origin(), amount, "EUR"))
        except GatewayError:
            return

    @rule(which=st.integers(0), answer=answers())
    def answer(self, which: int, answer: ConnectorAnswer) -> None:
        operation = self.aggregate.operations[which % len(self.aggregate.operations)]
        self.at += timedelta(seconds=1)
        new_id = f"op_{next(self.numbers)}"
        settled = decisions.settle(self.aggregate.payment, operation, answer, self.at, new_id)
        if settled is not None:
            self.settled(operation, settled)

    @rule(which=st.integers(0))
    def bounce(self, which: int) -> None:
        operation = self.aggregate.operations[which % len(self.aggregate.operations)]
        answer = ConnectorAnswer(Delivery.ANSWERED, Verdict.FAILED)
        settled = decisions.bounce(self.aggregate.payment, operation, answer, self.at)
        if settled is not None:
            self.settled(operation, settled)

    @precondition(lambda self: self.aggregate.payment.state is P.NOT_SENT)
    @rule()
    def repeat(self) -> None:
        operation = self.aggregate.operations[0]
        begun = decisions.restart(self.aggregate.payment, operation, "req_again")
        assert begun.operation.epoch == operation.epoch + 1
        assert begun.operation.attempt.number == operation.attempt.number + 1
        assert begun.operation.reference != operation.reference
        self.aggregate = Aggregate(begun.payment, [begun.operation, *self.aggregate.operations[1:]])

    @invariant()
    def amounts_are_within_bounds(self) -> None:
        if not hasattr(self, "aggregate"):
            return
        p = self.aggregate.payment
        assert p.captured_minor + p.capture_pending_minor <= p.authorized_minor
        assert p.refunded_minor + p.refund_pending_minor <= p.captured_minor
        assert min(p.capture_pending_minor, p.refund_pending_minor, p.refunded_minor) >= 0
        assert min(p.captured_minor, p.voided_minor, p.increment_pending_minor) >= 0
        assert p.captured_minor + p.voided_minor <= p.authorized_minor

    @invariant()
    def reservations_are_those_of_the_unfinished_operations(self) -> None:
        if not hasattr(self, "aggregate"):
            return
        for kind, reserved in (
            (K.CAPTURE, self.aggregate.payment.capture_pending_minor),
            (K.REFUND, self.aggregate.payment.refund_pending_minor),
            (K.INCREMENT, self.aggregate.payment.increment_pending_minor),
        ):
            assert reserved == sum(
                operation.amount_minor
                for operation in self.aggregate.operations
                if operation.kind is kind and operation.state in states.UNFINISHED
            )


TestOnePayment = OnePayment.TestCase
TestOnePayment.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
