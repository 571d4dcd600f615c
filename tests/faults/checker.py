"""A caller that keeps a journal of its answers, and the comparison of that with all other books.

Three books have to agree: what callers were told, what PostgreSQL holds, and what the PSP did by
its own journal. Nothing here asks the gateway.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from payments.v1.payment_pb2 import OperationState

from gateway.domain.model import OperationKind, PaymentState
from gateway.domain.model import OperationState as S
from gateway.domain.states import FROZEN, UNFINISHED
from tests.harness import Caller, System, bytes_without_replay, eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.connectors.simulator.journal import Standing

REPEATABLE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
"""Statuses after which a caller repeats its call, with the same key and payload."""
REPEAT_AFTER_S: Final = 0.05
"""The pause of a caller between two tries."""
TRIES_MAX: Final = 600

# A payment's states with money behind them; in every other one nothing may stand at the PSP.
_MONEY: Final = frozenset(
    {
        PaymentState.AUTHORIZED,
        PaymentState.PARTIALLY_CAPTURED,
        PaymentState.CAPTURED,
        PaymentState.PARTIALLY_REFUNDED,
        PaymentState.REFUNDED,
        PaymentState.VOIDED,
    }
)
_NEVER_FROZEN: Final = frozenset(S) - FROZEN


class Client:
    """Calls over any number of gateways, one after the other, and writes down every answer."""

    def __init__(self, *callers: Caller) -> None:
        self.told: dict[str, list[Any]] = defaultdict(list)
        """The answers by idempotency key, in the order in which they came."""
        self._callers = itertools.cycle(callers)
        self._answers = 0
        self._answered = asyncio.Event()

    async def call(self, method: str, request: Any, timeout_s: float = 30.0) -> Any:
        """One call, over the next gateway. Raises AioRpcError."""
        response = await next(self._callers).call(method, request, timeout_s)
        self.told[request.idempotency_key].append(response)
        self._answers += 1
        self._answered.set()
        return response

    async def attempt(self, method: str, request: Any, timeout_s: float = 30.0) -> Any:
        """One call; None where it ended with a status after which it may be repeated."""
        try:
            return await self.call(method, request, timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() not in REPEATABLE:
                raise
            return None

    async def until_answered(self, method: str, request: Any, timeout_s: float = 30.0) -> Any:
        """Repeat the call until it is answered with what is neither PROCESSING nor NOT_SENT."""
        for _ in range(TRIES_MAX):
            response = await self.attempt(method, request, timeout_s)
            if response is not None and response.operation.state not in (
                OperationState.OPERATION_STATE_PROCESSING,
                OperationState.OPERATION_STATE_NOT_SENT,
            ):
                return response
            await asyncio.sleep(REPEAT_AFTER_S)
        raise AssertionError(f"{method} has no answer after {TRIES_MAX} tries")

    async def more(self, count: int, callers: asyncio.Future[Any]) -> None:
        """Wait until so many more calls are answered. Raises what one of the callers raised."""
        until = self._answers + count
        while self._answers < until:
            self._answered.clear()
            answered = asyncio.ensure_future(self._answered.wait())
            await asyncio.wait([answered, callers], return_when=asyncio.FIRST_COMPLETED)
            answered.cancel()
            if callers.done():
                callers.result()
                raise AssertionError("the callers have ended")

    async def authorize_all(self, requests: Sequence[Any]) -> list[Any]:
        """Authorize at once, each until it is answered."""
        return await asyncio.gather(
            *(self.until_answered("AuthorizePayment", request) for request in requests)
        )


async def settled(system: System) -> None:
    """Wait until no operation is unfinished, and recovery has nothing left to look at."""

    def is_settled() -> bool:
        [row] = system.fetch(
            "SELECT (SELECT count(*) FROM operations WHERE state = ANY ($1::int2[]))"
            " + (SELECT count(*) FROM doubts) AS open",
            sorted(UNFINISHED),
        )
        return bool(row["open"] == 0)

    await eventually(is_settled, "every operation has a definite outcome")


@dataclass(frozen=True, slots=True)
class Books:
    """A payment in minor units, by PostgreSQL or by the PSP's journal."""

    open_minor: int
    captured_minor: int
    refunded_minor: int

    @classmethod
    def of_standings(cls, standings: Sequence[Standing]) -> Books:
        """What the PSP holds and took."""
        return cls(
            sum(standing.open_minor for standing in standings),
            sum(standing.captured_minor for standing in standings),
            sum(standing.refunded_minor for standing in standings),
        )

    @classmethod
    def of_payment(cls, payment: Any) -> Books:
        """What a row of the table `payments` says."""
        if payment["state"] not in _MONEY:
            return cls(0, 0, 0)
        captured_minor = payment["captured_minor"]
        return cls(
            payment["authorized_minor"] - captured_minor - payment["voided_minor"],
            captured_minor,
            payment["refunded_minor"],
        )


def check(system: System, *clients: Client, doubts_stay: bool = False) -> None:
    """Compare the books; call it once everything is `settled`.

    With `doubts_stay`, for PSPs that can neither be asked nor cancel, operations may be unfinished,
    and at most one charge stands for each of their payments.
    """
    operations = system.fetch("SELECT * FROM operations ORDER BY created_at, operation_id")
    payments = {row["payment_id"]: row for row in system.fetch("SELECT * FROM payments")}
    unfinished = {row["payment_id"] for row in operations if row["state"] in UNFINISHED}
    assert doubts_stay or not unfinished, f"unfinished: {unfinished}"

    by_key = {row["idempotency_key"]: row for row in operations if row["idempotency_key"]}
    for client in clients:
        for key, answers in client.told.items():
            _check_acknowledged(by_key.get(key), answers)
    _check_charges(system.standing(), payments, unfinished)
    by_payment = defaultdict(list)
    for row in operations:
        by_payment[row["payment_id"]].append(row)
    for payment_id, payment in payments.items():
        _check_amounts(payment, by_payment[payment_id])
    _check_outbox(system, payments, unfinished)


def _check_acknowledged(row: Any | None, answers: Sequence[Any]) -> None:
    """Every answer is about the operation that PostgreSQL has, and frozen ones are that one."""
    key = answers[0].operation.idempotency_key
    assert row is not None, f"{key} was acknowledged and is lost"
    for answer in answers:
        told = answer.operation
        assert (told.operation_id, told.payment_id) == (row["operation_id"], row["payment_id"])
        if S(told.state) in _NEVER_FROZEN:
            continue
        assert row["response"] is not None, f"{key}: its frozen answer is lost"
        stored = type(answer)()
        stored.ParseFromString(row["response"])
        assert bytes_without_replay(answer) == bytes_without_replay(stored), key
        if S(told.state) not in UNFINISHED:
            assert S(row["state"]) is S(told.state), f"{key}: {S(row['state'])!r}, told {told}"


def _check_charges(
    standings: Sequence[Standing], payments: dict[str, Any], unfinished: set[str]
) -> None:
    """One charge stands for each success, none for anything else, and to the same amounts."""
    of_payment = defaultdict(list)
    for standing in standings:
        if not standing.reversed:
            of_payment[standing.payment_id].append(standing)
    assert of_payment.keys() <= payments.keys(), "a charge stands without a record"
    for payment_id, payment in payments.items():
        own = of_payment[payment_id]
        assert len(own) <= 1, f"{payment_id} is charged {len(own)} times: {own}"
        if payment_id not in unfinished:
            expected = Books.of_payment(payment)
            assert Books.of_standings(own) == expected, f"{PaymentState(payment['state'])!r}: {own}"


def _check_amounts(payment: Any, operations: Sequence[Any]) -> None:
    """The payment's amounts are the sums of its operations."""
    sums: Counter[tuple[OperationKind, str]] = Counter()
    for row in operations:
        if row["state"] in UNFINISHED:
            sums[OperationKind(row["kind"]), "pending"] += row["amount_minor"]
        elif row["state"] == S.SUCCEEDED:
            sums[OperationKind(row["kind"]), "done"] += row["amount_minor"]
    kinds = OperationKind
    assert payment["capture_pending_minor"] == sums[kinds.CAPTURE, "pending"], operations
    assert payment["captured_minor"] == sums[kinds.CAPTURE, "done"], operations
    assert payment["refund_pending_minor"] == sums[kinds.REFUND, "pending"], operations
    assert payment["refunded_minor"] == sums[kinds.REFUND, "done"], operations


def _check_outbox(system: System, payments: dict[str, Any], unfinished: set[str]) -> None:
    """The latest event of a payment is of its latest version."""
    rows = system.fetch(
        "SELECT payment_id, max(payment_version) AS latest FROM outbox GROUP BY payment_id"
    )
    latest = {row["payment_id"]: row["latest"] for row in rows}
    for payment_id, payment in payments.items():
        if payment_id not in unfinished:
            assert latest.get(payment_id) == payment["version"], payment_id
