"""One payment to which operations are done in memory, for the tests of the domain's decisions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING

from gateway.domain import decisions
from gateway.domain.decisions import Begun, Origin, Settled
from gateway.domain.model import Aggregate, CaptureMethod, Mode
from gateway.domain.states import PAYMENT_TRANSITIONS

if TYPE_CHECKING:
    from gateway.domain.model import Operation, Payment

CURRENCY = "EUR"


class PaymentBook:
    """An authorization that was begun, and what is entered after it: `op_1`, `op_2` and so on."""

    def __init__(self, method: CaptureMethod, amount_minor: int, *, partial: bool = False) -> None:
        self._numbers = count(1)
        self._at = datetime(2026, 1, 1, tzinfo=UTC)
        begun = decisions.begin_authorization(
            self.new_origin(),
            merchant_id="mer_1",
            payment_id="pay_1",
            mode=Mode.TEST,
            amount_minor=amount_minor,
            currency=CURRENCY,
            capture_method=method,
            connector="psp",
            connector_account_id="account",
            merchant_order_id="",
            allow_partial_approval=partial,
            details=b"",
        )
        self.aggregate = Aggregate(begun.payment, [begun.operation])

    @property
    def payment(self) -> Payment:
        return self.aggregate.payment

    @property
    def operations(self) -> list[Operation]:
        return self.aggregate.operations

    def new_operation_id(self) -> str:
        return f"op_{next(self._numbers)}"

    def new_origin(self) -> Origin:
        """A client's call with a key of its own."""
        number = next(self._numbers)
        return Origin(f"op_{number}", f"key_{number}", b"\x01", f"req_{number}")

    def later(self) -> datetime:
        """A second after the time that was told last."""
        self._at += timedelta(seconds=1)
        return self._at

    def enter_begun(self, begun: Begun) -> str:
        """Take over an intent; the id of its operation."""
        assert begun.payment.version == self.payment.version + 1
        self.aggregate = Aggregate(begun.payment, [*self.operations, begun.operation])
        return begun.operation.operation_id

    def enter_settled(self, settled: Settled) -> None:
        """Take over an outcome, and what came with it, by the table of the payment's states."""
        assert settled.payment.version == self.payment.version + 1
        before, after = self.payment.state, settled.payment.state
        assert after is before or after in PAYMENT_TRANSITIONS[before], (before, after)
        changed = settled.operation
        operations = [
            changed if operation.operation_id == changed.operation_id else operation
            for operation in self.operations
        ]
        self.aggregate = Aggregate(settled.payment, operations + settled.companions)
