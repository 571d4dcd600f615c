"""What must hold of a payment as it is stored, and of what stands for it at its PSP. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Final

from gateway.domain import states
from gateway.domain.decisions import payment_state_of_money
from gateway.domain.model import (
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Payment,
    PaymentState,
)

K = OperationKind
S = OperationState
P = PaymentState

SUMS_MAX: Final = 10_000
"""Sums of bounced captures that are told apart."""


class Kind(StrEnum):
    """Which rule does not hold."""

    AMOUNTS_OUT_OF_BOUNDS = "amounts-out-of-bounds"
    """More is captured than authorized, more refunded than captured, or an amount is negative."""
    AMOUNTS_DIFFER = "amounts-differ-from-operations"
    """A payment's amount is not the sum of its operations."""
    RESERVATION_DIFFERS = "reservation-differs-from-operations"
    """A pending amount is not the sum of the unfinished operations, or there is none."""
    PAYMENT_STATE_DIFFERS = "payment-state-differs"
    """A payment's state does not follow from its operations and amounts."""
    PATH_NOT_ALLOWED = "path-not-allowed"
    """The events tell a move that the table does not allow, or do not end in the row's state."""
    EVENT_MISSING = "event-missing"
    """A version of the payment has no event where one belongs."""
    EVENT_UNEXPECTED = "event-unexpected"
    """An event stands at a version that cannot have it."""
    EVENT_UNREADABLE = "event-unreadable"
    """An event's bytes are none of its payment and version."""
    ANSWER_MISSING = "answer-missing"
    """An operation with a frozen state has no stored answer."""
    ANSWER_UNEXPECTED = "answer-unexpected"
    """A stored answer of an operation whose state has none."""
    ANSWER_UNREADABLE = "answer-unreadable"
    """A stored answer that cannot be decoded."""
    ANSWER_DIFFERS = "answer-differs"
    """A stored answer tells another operation than the row, or a state that does not lead to it."""
    DOUBT_NOT_LISTED = "doubt-not-listed"
    """An unfinished operation that recovery does not know of."""
    ATTEMPTS_DIFFER = "attempts-differ"
    """The superseded attempts are not those before the present one."""
    ALLOCATIONS_DIFFER = "allocations-differ"
    """A refund's parts are not its amount, or go to no capture of the payment."""
    OPERATIONS_DIFFER = "operations-differ"
    """A payment without its one authorization, an operation of another currency or of no parent."""
    ROW_UNREADABLE = "row-unreadable"
    """A row holds what no version of the gateway writes."""
    ORPHAN = "orphan"
    """A row whose payment or operation does not exist."""
    CHARGED_TWICE = "charged-twice"
    """More than one charge stands at the PSP for a payment."""
    CHARGE_WITHOUT_SUCCESS = "charge-without-success"
    """A charge stands at the PSP for a payment that has none."""
    SUCCESS_WITHOUT_CHARGE = "success-without-charge"
    """The PSP holds or took nothing of a payment that has succeeded."""
    CHARGE_DIFFERS = "charge-differs"
    """The PSP holds, took or gave back another amount, and no discrepancy tells of it."""
    CHARGE_UNRECORDED = "charge-unrecorded"
    """A charge stands at the PSP for a payment that the database does not have."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that does not hold."""

    kind: Kind
    merchant_id: str
    payment_id: str
    operation_id: str
    detail: str
    """What is, and what should be; no card data, no text of a caller or a PSP."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a stored answer or event says."""

    merchant_id: str
    payment_id: str
    operation_id: str
    kind: int
    state: int
    amount_minor: int
    idempotency_key: str
    payment_state: int
    payment_version: int


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of the outbox."""

    version: int
    seq: int
    told: Told | None
    """None: its bytes are no event."""


@dataclass(slots=True)
class Stored:
    """All that is stored of a payment."""

    payment: Payment
    operations: Sequence[Operation]
    events: Sequence[StoredEvent]
    """By version and number."""
    answers: Mapping[str, Told | None]
    """The stored answers by operation; None: the bytes are no answer."""
    doubts: frozenset[str] = frozenset()
    """Operations on recovery's list."""
    overdue: frozenset[str] = frozenset()
    """PROCESSING operations that recovery should have put on its list by now."""
    discrepancies: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The kinds of recorded discrepancies by operation."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What stands at the PSP of one authorization, in minor units."""

    reference: str
    open_minor: int
    captured_minor: int
    refunded_minor: int


_MONEY: Final = frozenset(
    {
        P.AUTHORIZED,
        P.PARTIALLY_CAPTURED,
        P.CAPTURED,
        P.PARTIALLY_REFUNDED,
        P.REFUNDED,
        P.VOIDED,
    }
)
_OF_UNFINISHED: Final = {
    S.PROCESSING: P.PROCESSING,
    S.REQUIRES_ACTION: P.REQUIRES_ACTION,
    S.PENDING: P.PENDING,
    S.IN_DOUBT: P.IN_DOUBT,
}
_OF_REFUSED: Final = {
    S.DECLINED: P.DECLINED,
    S.FAILED: P.FAILED,
    S.NOT_SENT: P.NOT_SENT,
    S.CANCELED: P.CANCELED,
    S.EXPIRED: P.EXPIRED,
}
_STATES: Final[frozenset[int]] = frozenset(S)
_PAYMENT_STATES: Final[frozenset[int]] = frozenset(P)
_BEGINNINGS: Final = frozenset({K.AUTHORIZE, K.VERIFY})
_FOLLOW_UPS: Final = frozenset({K.CAPTURE, K.VOID, K.REFUND, K.INCREMENT})


class _Findings(list[Finding]):
    def __init__(self, payment: Payment) -> None:
        super().__init__()
        self._payment = payment

    def found(self, kind: Kind, detail: str, operation: Operation | None = None) -> None:
        payment = self._payment
        operation_id = "" if operation is None else operation.operation_id
        self.append(Finding(kind, payment.merchant_id, payment.payment_id, operation_id, detail))


def check(stored: Stored) -> list[Finding]:
    """Every rule that does not hold of a payment."""
    findings = _Findings(stored.payment)
    authorizations = [each for each in stored.operations if each.kind in _BEGINNINGS]
    if len(authorizations) != 1:
        detail = f"{len(authorizations)} authorizations; should be one"
        findings.found(Kind.OPERATIONS_DIFFER, detail)
    else:
        _check_amounts(stored, authorizations[0], findings)
        _check_state(stored.payment, authorizations[0], findings)
    _check_bounds(stored.payment, findings)
    _check_reservations(stored, findings)
    for operation in stored.operations:
        _check_operation(stored, operation, findings)
        _check_answer(stored, operation, findings)
    _check_versions(stored, findings)
    _check_paths(stored, findings)
    return findings


def check_charges(stored: Stored, charges: Sequence[Charge]) -> list[Finding]:
    """Whether exactly one charge stands for a success, none for anything else, to its amounts.

    `charges` are those of the payment that were not reversed. What is unfinished may stand or not;
    a difference that a discrepancy tells of is known.
    """
    payment, findings = stored.payment, _Findings(stored.payment)
    standing = [
        each for each in charges if each.open_minor or each.captured_minor - each.refunded_minor
    ]
    unfinished = [each for each in stored.operations if each.state in states.UNFINISHED]
    # Until a reversal has taken effect, what it reverses stands beside what it was repeated by.
    reversing = any(each.kind is K.REVERSAL for each in unfinished)
    if len(standing) > 1 and not reversing:
        references = ", ".join(each.reference for each in standing)
        findings.found(Kind.CHARGED_TWICE, f"{references} stand; should be one")
        return findings
    if unfinished:
        return findings
    expected = _expected_charge(payment)
    found = (
        sum(each.open_minor for each in charges),
        sum(each.captured_minor for each in charges),
        sum(each.refunded_minor for each in charges),
    )
    if found == expected or stored.discrepancies:
        return findings
    detail = "open {}, captured {}, refunded {} at the PSP; ".format(*found)
    detail += "should be {}, {}, {}".format(*expected)
    if not any(expected):
        findings.found(Kind.CHARGE_WITHOUT_SUCCESS, detail)
    elif not any(found):
        findings.found(Kind.SUCCESS_WITHOUT_CHARGE, detail)
    else:
        findings.found(Kind.CHARGE_DIFFERS, detail)
    return findings


def _expected_charge(payment: Payment) -> tuple[int, int, int]:
    if payment.state not in _MONEY:
        return (0, 0, 0)
    open_minor = payment.authorized_minor - payment.captured_minor - payment.voided_minor
    return (open_minor, payment.captured_minor, payment.refunded_minor)


# --- amounts and states ---------------------------------------------------------------------------


def _check_bounds(payment: Payment, findings: _Findings) -> None:
    captured = payment.captured_minor + payment.capture_pending_minor
    refunded = payment.refunded_minor + payment.refund_pending_minor
    amounts = (
        payment.authorized_minor,
        payment.captured_minor,
        payment.capture_pending_minor,
        payment.refunded_minor,
        payment.refund_pending_minor,
        payment.voided_minor,
        payment.increment_pending_minor,
    )
    if min(amounts) < 0:
        findings.found(Kind.AMOUNTS_OUT_OF_BOUNDS, "an amount is negative")
    if captured + payment.voided_minor > payment.authorized_minor:
        findings.found(
            Kind.AMOUNTS_OUT_OF_BOUNDS,
            f"captured and reserved {captured}, released {payment.voided_minor}; should be at most"
            f" the {payment.authorized_minor} authorized",
        )
    if refunded > payment.captured_minor:
        findings.found(
            Kind.AMOUNTS_OUT_OF_BOUNDS,
            f"refunded and reserved {refunded}; should be at most the {payment.captured_minor}"
            " captured",
        )


def _check_amounts(stored: Stored, authorization: Operation, findings: _Findings) -> None:
    payment, done = stored.payment, _sums(stored.operations, {S.SUCCEEDED})
    # A capture that bounced after its money was refunded stays in the books, and in a discrepancy;
    # so is one of which the PSP reported another amount, and which may have left the books.
    bounced = [
        each.amount_minor
        for each in stored.operations
        if each.kind is K.CAPTURE
        and each.state is S.FAILED
        and "captured_amount" in stored.discrepancies.get(each.operation_id, ())
    ]
    kept = payment.captured_minor - done[K.CAPTURE]
    if not _is_sum_of_some(kept, bounced):
        kept = 0
    for name, found, expected in (
        ("authorized", payment.authorized_minor, _authorized(payment, authorization, done)),
        ("captured", payment.captured_minor, {done[K.CAPTURE] + kept}),
        ("refunded", payment.refunded_minor, {done[K.REFUND]}),
    ):
        if found not in expected:
            findings.found(
                Kind.AMOUNTS_DIFFER,
                f"{name} {found}; should be {max(expected)} by the operations",
            )


def _is_sum_of_some(total: int, amounts: Sequence[int]) -> bool:
    """Whether some of the amounts sum up to the total; where there are very many ways, whether it
    lies between none and all of them.
    """
    sums = {0}
    for amount in amounts:
        sums |= {each + amount for each in sums if each + amount <= total}
        if len(sums) > SUMS_MAX:
            return total <= sum(amounts)
    return total in sums


def _authorized(payment: Payment, authorization: Operation, done: Counter[K]) -> set[int]:
    """What may be authorized, by the operations."""
    if authorization.kind is K.VERIFY or authorization.state not in (S.SUCCEEDED, S.EXPIRED):
        return {0}
    outcome = authorization.attempt.outcome
    reported = None if outcome is None else outcome.amount_reported_minor
    approved = authorization.amount_minor
    if payment.allow_partial_approval and reported is not None and 0 < reported < approved:
        approved = reported
    whole = approved + done[K.INCREMENT]
    # It may have expired before it was approved, or after.
    return {0, whole} if authorization.state is S.EXPIRED else {whole}


def _check_reservations(stored: Stored, findings: _Findings) -> None:
    payment, open_ = stored.payment, _sums(stored.operations, states.UNFINISHED)
    for name, found, expected in (
        ("capture_pending", payment.capture_pending_minor, open_[K.CAPTURE]),
        ("refund_pending", payment.refund_pending_minor, open_[K.REFUND]),
        ("increment_pending", payment.increment_pending_minor, open_[K.INCREMENT]),
    ):
        if found != expected:
            findings.found(
                Kind.RESERVATION_DIFFERS,
                f"{name} {found}; should be {expected} by the unfinished operations",
            )


def _sums(operations: Sequence[Operation], in_states: frozenset[S] | set[S]) -> Counter[K]:
    sums: Counter[K] = Counter()
    for each in operations:
        # What was done elsewhere is in no amount of ours.
        if each.state in in_states and each.origin is not OperationOrigin.PSP:
            sums[each.kind] += each.amount_minor
    return sums


def _check_state(payment: Payment, authorization: Operation, findings: _Findings) -> None:
    state = authorization.state
    if state in _OF_UNFINISHED:
        expected = {_OF_UNFINISHED[state]}
    elif state is S.SUCCEEDED and authorization.kind is K.VERIFY:
        expected = {P.VERIFIED}
    elif payment.authorized_minor and state in (S.SUCCEEDED, S.EXPIRED):
        expected = {payment_state_of_money(payment)}
        if state is S.EXPIRED:
            expected.add(P.EXPIRED)
    elif state in _OF_REFUSED:
        expected = {_OF_REFUSED[state]}
    else:
        expected = set()
    if payment.state not in expected:
        names = (
            " or ".join(sorted(each.name for each in expected)) or "none with that authorization"
        )
        findings.found(Kind.PAYMENT_STATE_DIFFERS, f"{payment.state.name}; should be {names}")


# --- operations -----------------------------------------------------------------------------------


def _check_operation(stored: Stored, operation: Operation, findings: _Findings) -> None:
    listed = operation.operation_id in stored.doubts
    unfinished = operation.state in states.UNFINISHED
    late = operation.operation_id in stored.overdue or operation.state is not S.PROCESSING
    # What another decides on is told, not asked for.
    if unfinished and late and not listed and operation.kind is not K.DISPUTE:
        detail = f"{operation.state.name}, and recovery does not have it"
        findings.found(Kind.DOUBT_NOT_LISTED, detail, operation)
    numbers = [each.number for each in operation.superseded_attempts]
    if numbers != list(range(1, operation.attempt.number)):
        detail = f"attempts {numbers} before attempt {operation.attempt.number}"
        findings.found(Kind.ATTEMPTS_DIFFER, detail, operation)
    ids = {each.operation_id for each in stored.operations}
    parent = operation.parent_operation_id
    if operation.kind not in _BEGINNINGS and parent not in ids:
        findings.found(Kind.OPERATIONS_DIFFER, "its parent is no operation of it", operation)
    if operation.currency != stored.payment.currency:
        findings.found(Kind.OPERATIONS_DIFFER, "its currency is not the payment's", operation)
    if operation.kind is K.REFUND:
        captures = {each.operation_id for each in stored.operations if each.kind is K.CAPTURE}
        total = sum(part for _, part in operation.allocations)
        elsewhere = operation.origin is OperationOrigin.PSP and total < operation.amount_minor
        if (total != operation.amount_minor and not elsewhere) or not captures.issuperset(
            capture_id for capture_id, _ in operation.allocations
        ):
            detail = f"{total} allocated of {operation.amount_minor}"
            findings.found(Kind.ALLOCATIONS_DIFFER, detail, operation)


def _check_answer(stored: Stored, operation: Operation, findings: _Findings) -> None:
    frozen = operation.state in states.FROZEN
    if operation.response is None:
        if frozen and operation.origin is OperationOrigin.CLIENT:
            detail = f"{operation.state.name} without its stored answer"
            findings.found(Kind.ANSWER_MISSING, detail, operation)
        return
    if not frozen:
        detail = f"{operation.state.name} with a stored answer"
        findings.found(Kind.ANSWER_UNEXPECTED, detail, operation)
    told = stored.answers.get(operation.operation_id)
    if told is None:
        findings.found(Kind.ANSWER_UNREADABLE, "its bytes are no answer", operation)
        return
    for name, found, expected in (
        ("operation", told.operation_id, operation.operation_id),
        ("payment", told.payment_id, operation.payment_id),
        ("merchant", told.merchant_id, operation.merchant_id),
        ("kind", told.kind, operation.kind),
        ("amount", told.amount_minor, operation.amount_minor),
        ("idempotency key", told.idempotency_key, operation.idempotency_key or ""),
    ):
        if found != expected:
            findings.found(Kind.ANSWER_DIFFERS, f"its answer tells another {name}", operation)
    if told.state not in _STATES or operation.state not in _reachable(
        operation.kind, S(told.state)
    ):
        detail = f"{operation.state.name} does not follow what its answer tells"
        findings.found(Kind.ANSWER_DIFFERS, detail, operation)


def _reachable(kind: K, state: S) -> frozenset[S]:
    """The states that may follow, in any number of steps; the state itself too."""
    found, pending = {state}, [state]
    while pending:
        for after in _next_states(kind, pending.pop()):
            if after not in found:
                found.add(after)
                pending.append(after)
    return frozenset(found)


def _next_states(kind: K, state: S) -> Iterator[S]:
    for event in states.Event:
        after = states.next_state(kind, state, event)
        if after is not None:
            yield after


# --- events ---------------------------------------------------------------------------------------


def _check_versions(stored: Stored, findings: _Findings) -> None:
    """Each version has its event, but the first one and those that a follow-up's intent made."""
    payment = stored.payment
    versions = [event.version for event in stored.events if event.seq == 0]
    for version in sorted({each.version for each in stored.events}):
        numbers = [each.seq for each in stored.events if each.version == version]
        if numbers != list(range(len(numbers))):
            findings.found(Kind.EVENT_MISSING, f"version {version} has the events {numbers}")
        if not 1 < version <= payment.version:
            findings.found(
                Kind.EVENT_UNEXPECTED,
                f"an event of version {version}; should be of 2 to {payment.version}",
            )
    intents = sum(
        each.kind in _FOLLOW_UPS and each.origin is OperationOrigin.CLIENT
        for each in stored.operations
    )
    expected = payment.version - 1 - intents
    if len(versions) != expected:
        kind = Kind.EVENT_MISSING if len(versions) < expected else Kind.EVENT_UNEXPECTED
        findings.found(
            kind,
            f"{len(versions)} versions with events; should be {expected} of {payment.version} with"
            f" {intents} follow-ups",
        )
    unfinished = any(each.state in states.UNFINISHED for each in stored.operations)
    latest = max(versions, default=1)
    if not unfinished and latest != payment.version and len(versions) == expected:
        findings.found(
            Kind.EVENT_MISSING, f"the latest event is of version {latest} of {payment.version}"
        )


def _check_paths(stored: Stored, findings: _Findings) -> None:
    payment = stored.payment
    operations = {each.operation_id: each for each in stored.operations}
    paths: dict[str, list[int]] = {each: [S.PROCESSING] for each in operations}
    payment_path: list[int] = [P.PROCESSING]
    for event in stored.events:
        told = event.told
        if (
            told is None
            or (told.merchant_id, told.payment_id) != (payment.merchant_id, payment.payment_id)
            or told.payment_version != event.version
            or told.operation_id not in paths
        ):
            detail = f"the event {event.seq} of version {event.version} tells another change"
            findings.found(Kind.EVENT_UNREADABLE, detail)
            continue
        paths[told.operation_id].append(told.state)
        payment_path.append(told.payment_state)
    for operation_id, operation in operations.items():
        path = paths[operation_id]
        for before, after in pairwise(path):
            if not _may_follow(operation.kind, before, after):
                findings.found(
                    Kind.PATH_NOT_ALLOWED,
                    f"{_name(S, before)} to {_name(S, after)}",
                    operation,
                )
        # A first attempt has no event of its own; whatever came of it has.
        if path[-1] != operation.state:
            findings.found(
                Kind.PATH_NOT_ALLOWED,
                f"{operation.state.name}; should be {_name(S, path[-1])} as the last event says",
                operation,
            )
    for before, after in pairwise(payment_path):
        known = {before, after} <= _PAYMENT_STATES
        if not known or (before != after and P(after) not in states.PAYMENT_TRANSITIONS[P(before)]):
            findings.found(
                Kind.PATH_NOT_ALLOWED, f"the payment from {_name(P, before)} to {_name(P, after)}"
            )
    if payment_path[-1] != payment.state:
        findings.found(
            Kind.PATH_NOT_ALLOWED,
            f"the payment is {payment.state.name}; should be {_name(P, payment_path[-1])} as the"
            " last event says",
        )


def _may_follow(kind: K, before: int, after: int) -> bool:
    if not {before, after} <= _STATES:
        return False
    return before == after or S(after) in _next_states(kind, S(before))


def _name(enum: type[S] | type[P], number: int) -> str:
    return next((each.name for each in enum if each == number), str(number))
