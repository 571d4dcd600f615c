"""The journals of a trial: what clients sent and were told, what the PSP did, what is recorded.

They are plain values that go into files and come back the same: a trial can be judged again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import grpc
from payments.v1 import payment_pb2, payment_service_pb2

from gateway.connectors.simulator.profiles import find_profile
from gateway.domain.model import OperationKind, OperationState
from tests.faults.checker import REPEATABLE
from tests.harness import System, bytes_without_replay

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from gateway.connectors.simulator.journal import Record
    from gateway.connectors.simulator.profiles import Profile

Row = dict[str, Any]
"""A row of the database by its columns' names."""

OK: Final = grpc.StatusCode.OK.name

_IN_DATABASE: Final = ("operations", "payments", "events", "discrepancies", "resolutions")
_CLIENTS, _PSP, _DATABASE = "clients.json", "psp.jsonl", "database.json"

OPEN: Final = frozenset(
    {OperationState.PROCESSING, OperationState.IN_DOUBT, OperationState.NOT_SENT}
)
"""States after which the same call may be answered otherwise."""

RESPONSES: Final = {
    OperationKind.AUTHORIZE: payment_service_pb2.AuthorizePaymentResponse,
    OperationKind.VERIFY: payment_service_pb2.AuthorizePaymentResponse,
    OperationKind.CAPTURE: payment_service_pb2.CapturePaymentResponse,
    OperationKind.VOID: payment_service_pb2.VoidPaymentResponse,
    OperationKind.REFUND: payment_service_pb2.RefundPaymentResponse,
    OperationKind.INCREMENT: payment_service_pb2.IncrementAuthorizationResponse,
    # Of the gateway's and the PSP's own: stored as any other, told to nobody, with the same fields.
    OperationKind.REVERSAL: payment_service_pb2.AuthorizePaymentResponse,
    OperationKind.DISPUTE: payment_service_pb2.AuthorizePaymentResponse,
}

AMOUNTS: Final = (
    *("requested_minor", "authorized_minor", "capture_pending_minor", "captured_minor"),
    *("refund_pending_minor", "refunded_minor", "voided_minor", "increment_pending_minor"),
)
"""A payment's amounts, as events and rows call them."""

_OPERATIONS_SQL: Final = """
SELECT operation_id, payment_id, idempotency_key, kind, origin, state, amount_minor, currency,
    epoch, attempt_number, parent_operation_id, connector_account_id, response
FROM operations
ORDER BY created_at, operation_id
"""
_PAYMENTS_SQL: Final = """
SELECT payment_id, version, state, currency, requested_minor, authorized_minor,
    capture_pending_minor, captured_minor, refund_pending_minor, refunded_minor, voided_minor,
    increment_pending_minor, cancel_requested
FROM payments
ORDER BY created_at, payment_id
"""
_EVENTS_SQL: Final = """
SELECT payment_id, payment_version, seq, payload
FROM outbox
ORDER BY payment_id, payment_version, seq
"""


@dataclass(frozen=True, slots=True)
class Call:
    """What a client wants under one idempotency key."""

    key: str
    kind: OperationKind
    payment_id: str
    """The payment that it is about; empty for an authorization."""
    amount_minor: int | None
    """Minor units; None: whatever is left."""
    allows_partial: bool = False
    """Whether less than the amount may be authorized."""
    capture_operation_id: str = ""
    """Of a refund, the capture that it names."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How one try of a call ended."""

    key: str
    sent: int
    """The clients' own order of events: when the try was sent."""
    answered: int
    """When it ended. A try that was sent later than another one had ended came after it."""
    status: str
    """The gRPC status by its name."""
    reason: str = ""
    """Of a refusal, by its ErrorInfo."""
    operation_id: str = ""
    payment_id: str = ""
    kind: int = 0
    state: int = 0
    amount_minor: int = 0
    currency: str = ""
    replayed: bool = False
    digest: str = ""
    """Of the answer without its `replay` field."""

    @classmethod
    def of(cls, response: Any, key: str, sent: int, answered: int) -> Answer:
        """One that tells of an operation."""
        operation = response.operation
        return cls(
            key,
            sent,
            answered,
            OK,
            operation_id=operation.operation_id,
            payment_id=operation.payment_id,
            kind=operation.kind,
            state=operation.state,
            amount_minor=operation.amount.amount_minor,
            currency=operation.amount.currency_code,
            replayed=response.replay.replayed,
            digest=digest_of(response),
        )

    @property
    def ok(self) -> bool:
        """Whether it tells of an operation."""
        return self.status == OK

    @property
    def refuses(self) -> bool:
        """Whether its status says that nothing was begun, with a reason or, wrongly, without."""
        return not self.ok and self.status not in _UNKNOWN

    @property
    def refused(self) -> bool:
        """Whether it says that nothing was begun, and why. Any other failure tells nothing."""
        return self.refuses and bool(self.reason)

    @property
    def final(self) -> bool:
        """Whether it tells of an operation, and every repeat has to tell the same."""
        return self.ok and self.state not in OPEN


@dataclass(frozen=True, slots=True)
class Look:
    """What GetOperation said of an operation, and of its payment."""

    operation_id: str
    sent: int
    """By the same order as an answer's."""
    answered: int
    state: int
    payment_state: int
    version: int
    """The payment's."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person said of an attempt that was in doubt."""

    operation_id: str
    attempt_number: int
    outcome: str
    """The DoubtOutcome by its name."""
    amount_minor: int | None
    """Where the PSP's differs."""
    told: str | None
    """The reason of its refusal; empty: it was accepted; None: there was no answer."""


@dataclass(frozen=True, slots=True)
class Disputed:
    """A dispute that a PSP told of."""

    dispute_id: str
    reference: str
    """Of the authorization."""
    amount_minor: int
    statuses: list[str]
    """All that was told, in the order in which it happened."""


_UNKNOWN: Final = frozenset(code.name for code in REPEATABLE) | {"INTERNAL", "UNKNOWN"}


@dataclass(slots=True)
class History:
    """All that is known after a trial."""

    profile: str
    """Of the PSP simulator; of the first account's, where there are several."""
    profiles: dict[str, str] = field(default_factory=dict)
    """Of each account's PSP; empty: there is one."""
    calls: list[Call] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """In the order in which they came."""
    failed: list[str] = field(default_factory=list)
    """Keys of calls that had no answer after all tries of the clients' retry policy."""
    misuses: list[Answer] = field(default_factory=list)
    """Of calls with another payload under a key that had been answered."""
    calls_may_fail: bool = True
    """Whether a call may end so. It is repeated at the end."""
    has_strangers: bool = False
    """Whether others call too, who keep no journal."""
    psp: list[Record] = field(default_factory=list)
    """The simulator's journal, docs/simulator.md."""
    operations: list[Row] = field(default_factory=list)
    payments: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    """The outbox: payment_id, payment_version, seq, and what `told_by` finds in them."""
    looks: list[Look] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    resolutions: list[Row] = field(default_factory=list)
    """What is recorded of decisions: operation_id, attempt_number, outcome, amount_minor, state."""
    has_people: bool = False
    """Whether persons end the doubts that recovery does not."""
    disputes: list[Disputed] = field(default_factory=list)
    discrepancies: list[Row] | None = None
    """operation_id and kind of each; None: nobody looked."""
    clock_step_s: float = 0.0
    """By how much PostgreSQL's clock was moved in all, to and fro."""
    broken: str = ""
    """Why the trial could not be carried to its end."""

    @property
    def settles(self) -> bool:
        """Whether every PSP helps to end every doubt."""
        profiles = [find_profile(each) for each in self.profiles.values() or (self.profile,)]
        return all(each.query_by_reference or each.cancel_by_reference for each in profiles)

    def profile_of(self, account_id: str) -> Profile:
        """Of an account's PSP."""
        return find_profile(self.profiles.get(account_id, self.profile))

    def unanswered(self) -> list[str]:
        """The keys of calls whose outcome the client does not know."""
        last = {each.key: each for each in self.answers if each.ok or each.refused}
        known = {key for key, answer in last.items() if answer.refused or answer.final}
        return [call.key for call in self.calls if call.key not in known]

    def answered(self) -> list[str]:
        """The keys of calls that have their final answer."""
        return list(dict.fromkeys(each.key for each in self.answers if each.final))

    def save(self, folder: Path) -> None:
        """Write the journals into a directory. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = asdict(self)
        database = {name: whole.pop(name) for name in _IN_DATABASE}
        psp: Iterable[Record] = whole.pop("psp")
        (folder / _CLIENTS).write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
        (folder / _DATABASE).write_text(json.dumps(database, indent=1) + "\n", "utf-8")
        (folder / _PSP).write_text("".join(json.dumps(record) + "\n" for record in psp), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> History:
        """The history that was saved. Raises OSError, ValueError, KeyError, TypeError."""
        values: dict[str, Any] = json.loads((folder / _CLIENTS).read_text("utf-8"))
        values |= json.loads((folder / _DATABASE).read_text("utf-8"))
        calls = [Call(**{**call, "kind": OperationKind(call["kind"])}) for call in values["calls"]]
        return cls(
            **{
                **values,
                "calls": calls,
                "answers": [Answer(**answer) for answer in values["answers"]],
                "misuses": [Answer(**answer) for answer in values.get("misuses", ())],
                "looks": [Look(**look) for look in values.get("looks", ())],
                "disputes": [Disputed(**each) for each in values.get("disputes", ())],
                "decisions": [Decision(**each) for each in values.get("decisions", ())],
                "psp": [
                    json.loads(line) for line in (folder / _PSP).read_text("utf-8").splitlines()
                ],
            }
        )


def digest_of(response: Any) -> str:
    """The digest of a money response without its `replay` field."""
    return sha256(bytes_without_replay(response)).hexdigest()


def read_database(history: History, system: System) -> None:
    """Enter what the gateway believes. Raises asyncpg's errors."""
    history.operations = [_operation(row) for row in system.fetch(_OPERATIONS_SQL)]
    history.payments = [dict(row) for row in system.fetch(_PAYMENTS_SQL)]
    history.events = [_event(row) for row in system.fetch(_EVENTS_SQL)]


def _operation(record: Any) -> Row:
    row = dict(record)
    stored = row.pop("response")
    row["digest"] = ""
    if stored is not None:
        response = RESPONSES[OperationKind(row["kind"])]()
        response.ParseFromString(stored)
        row["digest"] = digest_of(response)
    return row


def _event(record: Any) -> Row:
    row = dict(record)
    return row | told_by(payment_pb2.PaymentEvent.FromString(row.pop("payload")))


def told_by(event: payment_pb2.PaymentEvent) -> Row:
    """What an event says of its payment and operation."""
    amounts = event.payment.amounts
    return {
        "payment_state": event.payment.state,
        "amounts": {name: getattr(amounts, name) for name in AMOUNTS},
        "operation_id": event.operation.operation_id,
        "operation_state": event.operation.state,
        "operation_minor": event.operation.amount.amount_minor,
    }


def last_answer(answers: Sequence[Answer]) -> Answer | None:
    """The latest answer that tells of an operation or refuses it."""
    return next((each for each in reversed(answers) if each.ok or each.refused), None)
