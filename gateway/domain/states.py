"""Which moves operations and payments may make, and what may run beside what: allow-lists as data.

What is not in a table is not allowed. `gateway states` prints the tables, `docs/states.md` shows
them, and every write of an outcome goes through `next_state`.
"""

from enum import IntEnum

from gateway.domain.model import OperationKind as K
from gateway.domain.model import OperationState as S
from gateway.domain.model import PaymentState as P
from gateway.domain.model import Verdict


class Event(IntEnum):
    """What can happen to an operation."""

    APPROVED = 1
    """The PSP approved it, or reported that it took effect."""
    DECLINED = 2
    """The issuer, the network or the PSP declined it."""
    FAILED = 3
    """The PSP refused it as it stands, or reported that it failed."""
    ACCEPTED = 4
    """The PSP accepted it and will tell the outcome later."""
    ACTION_REQUIRED = 5
    """The customer has to act first."""
    DOUBTED = 6
    """It may have been sent, and there is no answer."""
    NEVER_SENT = 7
    """Its own sender did not send it, or its reference was made unusable before it took effect."""
    CANCELED = 8
    """It was cancelled; if it had taken effect, that was taken back."""
    EXPIRED = 9
    """It ended by time at the PSP."""
    BOUNCED = 10
    """A capture or refund that had succeeded was returned later."""
    RESTARTED = 11
    """The client repeated a call that had surely no effect: a new attempt begins."""
    CASCADED = 12
    """The attempt surely took no effect, and another connector is asked: a new attempt begins."""


_FIRST_ANSWERS: dict[Event, S] = {
    Event.APPROVED: S.SUCCEEDED,
    Event.DECLINED: S.DECLINED,
    Event.FAILED: S.FAILED,
    Event.ACCEPTED: S.PENDING,
    Event.ACTION_REQUIRED: S.REQUIRES_ACTION,
    Event.DOUBTED: S.IN_DOUBT,
    Event.NEVER_SENT: S.NOT_SENT,
    Event.CANCELED: S.CANCELED,
    Event.EXPIRED: S.EXPIRED,
}
_LATER_ANSWERS = {
    event: state
    for event, state in _FIRST_ANSWERS.items()
    # An operation that the PSP has acknowledged was sent, and is no longer in doubt.
    if event not in (Event.DOUBTED, Event.NEVER_SENT)
}

OPERATION_TRANSITIONS: dict[tuple[S, Event], S] = {
    **{(S.PROCESSING, event): state for event, state in _FIRST_ANSWERS.items()},
    **{(S.IN_DOUBT, event): state for event, state in _FIRST_ANSWERS.items()},
    **{(S.PENDING, event): state for event, state in _LATER_ANSWERS.items()},
    **{(S.REQUIRES_ACTION, event): state for event, state in _LATER_ANSWERS.items()},
    (S.NOT_SENT, Event.RESTARTED): S.PROCESSING,
    (S.PROCESSING, Event.CASCADED): S.PROCESSING,
    (S.SUCCEEDED, Event.BOUNCED): S.FAILED,
    (S.SUCCEEDED, Event.EXPIRED): S.EXPIRED,
}

EVENT_KINDS: dict[tuple[S, Event], frozenset[K]] = {
    (S.SUCCEEDED, Event.BOUNCED): frozenset({K.CAPTURE, K.REFUND}),
    (S.SUCCEEDED, Event.EXPIRED): frozenset({K.AUTHORIZE}),
    (S.PROCESSING, Event.CASCADED): frozenset({K.AUTHORIZE, K.VERIFY}),
}
"""Moves that only some kinds of operation may make; a move not named here is open to every kind."""

UNFINISHED = frozenset({S.PROCESSING, S.REQUIRES_ACTION, S.PENDING, S.IN_DOUBT})
"""States without a definite outcome: their reservations stay."""

FROZEN = frozenset(S) - {S.PROCESSING, S.IN_DOUBT, S.NOT_SENT}
"""States whose first answer is stored and replayed."""

VERDICT_EVENTS: dict[Verdict, Event] = {
    Verdict.APPROVED: Event.APPROVED,
    Verdict.DECLINED: Event.DECLINED,
    Verdict.PENDING: Event.ACCEPTED,
    Verdict.REQUIRES_ACTION: Event.ACTION_REQUIRED,
    Verdict.FAILED: Event.FAILED,
    Verdict.CANCELED: Event.CANCELED,
    Verdict.EXPIRED: Event.EXPIRED,
    Verdict.UNKNOWN: Event.DOUBTED,
}


_MOVES = {
    (kind, *move): after
    for move, after in OPERATION_TRANSITIONS.items()
    for kind in EVENT_KINDS.get(move, frozenset(K))
}


def next_state(kind: K, state: S, event: Event) -> S | None:
    """The state of an operation after an event, or None where the event is not allowed."""
    return _MOVES.get((kind, state, event))


_AUTHORIZED = frozenset({P.AUTHORIZED, P.CAPTURED, P.VERIFIED})
_REFUSED = frozenset({P.DECLINED, P.FAILED, P.CANCELED, P.EXPIRED})
_MONEY = frozenset(
    {
        P.AUTHORIZED,
        P.PARTIALLY_CAPTURED,
        P.CAPTURED,
        P.PARTIALLY_REFUNDED,
        P.REFUNDED,
    }
)

PAYMENT_TRANSITIONS: dict[P, frozenset[P]] = {
    P.PROCESSING: _AUTHORIZED | _REFUSED | {P.PENDING, P.REQUIRES_ACTION, P.IN_DOUBT, P.NOT_SENT},
    P.IN_DOUBT: _AUTHORIZED | _REFUSED | {P.PENDING, P.REQUIRES_ACTION, P.NOT_SENT},
    P.PENDING: _AUTHORIZED | _REFUSED | {P.REQUIRES_ACTION},
    P.REQUIRES_ACTION: _AUTHORIZED | _REFUSED | {P.PENDING},
    P.NOT_SENT: frozenset({P.PROCESSING}),
    P.AUTHORIZED: frozenset({P.PARTIALLY_CAPTURED, P.CAPTURED, P.VOIDED, P.EXPIRED}),
    # A capture or refund that bounces late leads back.
    P.PARTIALLY_CAPTURED: (_MONEY | {P.VOIDED}) - {P.PARTIALLY_CAPTURED},
    P.CAPTURED: _MONEY - {P.CAPTURED},
    P.PARTIALLY_REFUNDED: _MONEY - {P.PARTIALLY_REFUNDED, P.AUTHORIZED},
    P.REFUNDED: frozenset({P.PARTIALLY_REFUNDED, P.CAPTURED, P.PARTIALLY_CAPTURED}),
    **{state: frozenset() for state in (*_REFUSED, P.VOIDED, P.VERIFIED)},
}


class Beside(IntEnum):
    """Whether an operation may start beside an unfinished one."""

    REFUSED = 0
    ALLOWED = 1
    ALLOWED_IN_DOUBT = 2
    """Only where the unfinished one is IN_DOUBT, and then by the amounts that are sure."""
    AS_CANCEL_REQUEST = 3
    """Accepted as PENDING: carried out when the unfinished one has its outcome."""


_R, _A, _D, _C = Beside.REFUSED, Beside.ALLOWED, Beside.ALLOWED_IN_DOUBT, Beside.AS_CANCEL_REQUEST

MATRIX: dict[K, dict[K, Beside]] = {
    K.CAPTURE: {
        K.AUTHORIZE: _R,
        K.CAPTURE: _A,
        K.VOID: _R,
        K.REFUND: _A,
        K.INCREMENT: _D,
        K.VERIFY: _R,
        K.REVERSAL: _R,
        K.DISPUTE: _A,
    },
    K.VOID: {
        K.AUTHORIZE: _C,
        K.CAPTURE: _R,
        K.VOID: _R,
        K.REFUND: _A,
        K.INCREMENT: _D,
        K.VERIFY: _R,
        K.REVERSAL: _R,
        K.DISPUTE: _A,
    },
    K.REFUND: {
        K.AUTHORIZE: _R,
        K.CAPTURE: _A,
        K.VOID: _A,
        K.REFUND: _A,
        K.INCREMENT: _A,
        K.VERIFY: _R,
        K.REVERSAL: _R,
        K.DISPUTE: _A,
    },
    K.INCREMENT: {
        K.AUTHORIZE: _R,
        K.CAPTURE: _R,
        K.VOID: _R,
        K.REFUND: _R,
        K.INCREMENT: _R,
        K.VERIFY: _R,
        K.REVERSAL: _R,
        K.DISPUTE: _A,
    },
}
"""MATRIX[new][unfinished]: whether `new` may start while `unfinished` has no definite outcome.

Captures beside captures are still held to the amount (and MANUAL to one); refunds to what is
captured. A VOID is exclusive with captures, since one that is in doubt may have taken place."""


def may_start_beside(new: K, unfinished: K, unfinished_state: S) -> Beside:
    """The matrix for an operation that is unfinished in the given state; never ALLOWED_IN_DOUBT."""
    rule = MATRIX[new][unfinished]
    if rule is Beside.ALLOWED_IN_DOUBT:
        return Beside.ALLOWED if unfinished_state is S.IN_DOUBT else Beside.REFUSED
    return rule
