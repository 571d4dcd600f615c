"""What a call may do to a payment, and what an answer does to it. Pure: values in, values out.

Amounts are reserved when an operation begins and settled by its outcome, so that
`captured + capture_pending <= authorized` and `refunded + refund_pending <= captured` hold at every
moment; a doubt keeps its reservation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from gateway.domain import states
from gateway.domain.errors import GatewayError, Reason, refuse
from gateway.domain.model import (
    Aggregate,
    Attempt,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Discrepancy,
    Mode,
    Operation,
    OperationKind,
    OperationOrigin,
    OperationState,
    Outcome,
    Payment,
    PaymentState,
    ResponseCode,
    Verdict,
    make_attempt,
    make_operation,
    make_payment,
)
from gateway.domain.money import AMOUNT_MINOR_MAX
from gateway.domain.states import Beside, Event

K = OperationKind
S = OperationState

REPORTED_MINOR_MAX = 2**62
"""The largest total of reported amounts that is kept, in minor units: inside int64."""
_WITHOUT_EFFECT = frozenset({Event.NEVER_SENT, Event.CANCELED})

# For what every authorization goes through: in Python 3.11 it costs as much as a call to look up a
# member on its enum.
_BEGINNINGS = _AUTHORIZE, _VERIFY = (K.AUTHORIZE, K.VERIFY)
_PROCESSING, _REQUIRES_ACTION = S.PROCESSING, S.REQUIRES_ACTION
_PAYMENT_PROCESSING, _PAYMENT_AUTHORIZED = PaymentState.PROCESSING, PaymentState.AUTHORIZED
_FROM_CLIENT = OperationOrigin.CLIENT
_AUTOMATIC = CaptureMethod.AUTOMATIC
_APPROVED = Event.APPROVED
_UNKNOWN = Verdict.UNKNOWN


@dataclass(slots=True)
class Origin:
    """Where a new operation comes from: the call's idempotency data."""

    operation_id: str
    idempotency_key: str
    fingerprint: bytes
    request_id: str
    merchant_transaction_id: str = ""


@dataclass(slots=True)
class Begun:
    """A new operation and its payment after it: what the intent writes."""

    operation: Operation
    payment: Payment
    cancel_request: bool = False
    """The operation is a void that waits for an unfinished authorization: nothing is sent yet."""


@dataclass(slots=True)
class Settled:
    """What an answer makes of an operation and its payment."""

    operation: Operation
    payment: Payment
    companions: list[Operation] = field(default_factory=list)
    """Operations that begin with it."""
    discrepancies: list[Discrepancy] = field(default_factory=list)


# --- beginnings -----------------------------------------------------------------------------------


def begin_authorization(
    origin: Origin,
    *,
    merchant_id: str,
    payment_id: str,
    mode: Mode,
    amount_minor: int,
    currency: str,
    capture_method: CaptureMethod,
    connector: str,
    connector_account_id: str,
    merchant_order_id: str,
    allow_partial_approval: bool,
    details: bytes,
    route: str = "",
) -> Begun:
    """A new payment with its AUTHORIZE, or its VERIFY where the amount is zero.

    `route` says why it goes where it goes, as `Operation.note` keeps it.
    """
    operation = make_operation(
        merchant_id=merchant_id,
        operation_id=origin.operation_id,
        payment_id=payment_id,
        kind=_AUTHORIZE if amount_minor else _VERIFY,
        origin=_FROM_CLIENT,
        state=_PROCESSING,
        amount_minor=amount_minor,
        currency=currency,
        attempt=make_attempt(1, connector, connector_account_id),
        idempotency_key=origin.idempotency_key,
        fingerprint=origin.fingerprint,
        request_id=origin.request_id,
        merchant_transaction_id=origin.merchant_transaction_id,
        note=route,
    )
    payment = make_payment(
        merchant_id=merchant_id,
        payment_id=payment_id,
        mode=mode,
        state=_PAYMENT_PROCESSING,
        currency=currency,
        capture_method=capture_method,
        requested_minor=amount_minor,
        connector=connector,
        connector_account_id=connector_account_id,
        merchant_order_id=merchant_order_id,
        allow_partial_approval=allow_partial_approval,
        details=details,
    )
    return Begun(operation, payment)


def begin_capture(
    aggregate: Aggregate,
    origin: Origin,
    amount_minor: int | None,
    currency: str | None,
    final: bool,
) -> Begun:
    """A capture. Raises GatewayError where the payment's state or amounts do not allow it."""
    payment = aggregate.payment
    _require_authorized(payment)
    _check_matrix(K.CAPTURE, aggregate)
    _check_currency(payment, currency)
    if payment.capture_closed:
        raise refuse(
            Reason.PAYMENT_CLOSED_FOR_CAPTURE,
            "The payment takes no further capture.",
            capture_method=payment.capture_method.name,
        )
    available = payment.authorized_minor - payment.captured_minor - payment.capture_pending_minor
    amount = available if amount_minor is None else amount_minor
    if not 0 < amount <= available:
        raise refuse(
            Reason.AMOUNT_EXCEEDS_AUTHORIZED,
            "The amount is more than what is authorized and not yet captured.",
            available_minor=str(available),
        )
    # MANUAL takes one capture: it is final whatever the call says.
    closes = final or payment.capture_method is CaptureMethod.MANUAL
    operation = _follow_up(payment, origin, K.CAPTURE, amount)
    operation.final = closes
    operation.parent_operation_id = _authorization(aggregate).operation_id
    return Begun(
        operation,
        payment.copy_with(
            version=payment.version + 1,
            capture_pending_minor=payment.capture_pending_minor + amount,
            capture_closed=closes,
        ),
    )


def begin_void(aggregate: Aggregate, origin: Origin, note: str) -> Begun:
    """A void; of an unfinished authorization a cancel request. Raises GatewayError."""
    payment = aggregate.payment
    as_request = _check_matrix(K.VOID, aggregate) is Beside.AS_CANCEL_REQUEST
    amount = payment.authorized_minor - payment.captured_minor
    if not as_request and (amount <= 0 or payment.voided_minor or not _is_money(payment)):
        raise refuse(
            Reason.NOTHING_TO_VOID,
            "Nothing is authorized that is not captured or released.",
            state=payment.state.name,
        )
    authorization = _authorization(aggregate)
    operation = _follow_up(
        payment, origin, K.VOID, authorization.amount_minor if as_request else amount
    )
    operation.note = note
    operation.parent_operation_id = authorization.operation_id
    return Begun(
        operation,
        payment.copy_with(
            version=payment.version + 1, cancel_requested=payment.cancel_requested or as_request
        ),
        cancel_request=as_request,
    )


def is_unconfirmed(operation: Operation) -> bool:
    """Whether it is a void or reversal that was accepted and that the PSP has not confirmed: it
    releases money, and after a while somebody has to see to it.
    """
    return operation.state is S.PENDING and operation.kind in (K.VOID, K.REVERSAL)


def check_authorization_ended(aggregate: Aggregate) -> None:
    """Raises GatewayError where a void waits for its authorization: until that has ended nobody
    knows what the void releases.
    """
    authorization = _authorization(aggregate)
    if authorization.state in states.UNFINISHED:
        raise _in_progress("The void waits for its authorization.", authorization)


def takes_charge_back(payment: Payment) -> bool:
    """Whether a void was asked for while the authorization, and its capture, were in flight: it
    is the charge that is given back then, as a whole.
    """
    return payment.cancel_requested and payment.capture_method is _AUTOMATIC


def begin_refund(
    aggregate: Aggregate,
    origin: Origin,
    amount_minor: int | None,
    currency: str | None,
    capture_operation_id: str | None,
    note: str,
) -> Begun:
    """A refund, allocated to the named capture or to the oldest first. Raises GatewayError."""
    payment = aggregate.payment
    _require_authorized(payment)
    _check_matrix(K.REFUND, aggregate)
    _check_currency(payment, currency)
    open_parts = refundable_captures(aggregate.operations)
    if capture_operation_id is not None:
        open_parts = [part for part in open_parts if part[0] == capture_operation_id]
        if not open_parts:
            raise refuse(
                Reason.CAPTURE_NOT_REFUNDABLE,
                "The payment has no such capture with an amount left to refund.",
            )
    # A capture's bounce or a fact reported by the PSP may leave less in total than in the parts.
    captured = payment.captured_minor
    if payment.captured_reported_minor is not None:
        captured = min(captured, payment.captured_reported_minor)
    refunded = max(payment.refunded_minor, payment.refunded_reported_minor or 0)
    available = max(
        0,
        min(
            sum(part for _, part in open_parts),
            captured - refunded - payment.refund_pending_minor,
        ),
    )
    amount = available if amount_minor is None else amount_minor
    if not 0 < amount <= available:
        raise refuse(
            Reason.AMOUNT_EXCEEDS_CAPTURED,
            "The amount is more than what is captured and not yet refunded.",
            available_minor=str(available),
        )
    operation = _follow_up(payment, origin, K.REFUND, amount)
    operation.note = note
    operation.allocations = allocate(open_parts, amount)
    operation.parent_operation_id = operation.allocations[0][0]
    return Begun(
        operation,
        payment.copy_with(
            version=payment.version + 1,
            refund_pending_minor=payment.refund_pending_minor + amount,
        ),
    )


def begin_increment(
    aggregate: Aggregate, origin: Origin, amount_minor: int, currency: str
) -> Begun:
    """An increment of the authorized amount. Raises GatewayError."""
    payment = aggregate.payment
    _require_authorized(payment)
    _check_matrix(K.INCREMENT, aggregate)
    _check_currency(payment, currency)
    # Captures of ours close the payment or leave its state; those that the PSP told of do not.
    captures = any(
        operation.kind is K.CAPTURE and operation.state is S.SUCCEEDED
        for operation in aggregate.operations
    )
    if captures or payment.capture_closed or payment.state is not PaymentState.AUTHORIZED:
        raise refuse(
            Reason.INCREMENT_NOT_ALLOWED,
            "Only a payment with manual capture of which nothing is captured can be incremented.",
            state=payment.state.name,
            capture_method=payment.capture_method.name,
        )
    if payment.authorized_minor + amount_minor > AMOUNT_MINOR_MAX:
        raise refuse(
            Reason.INCREMENT_NOT_ALLOWED,
            "The authorized amount would exceed the largest amount.",
            available_minor=str(AMOUNT_MINOR_MAX - payment.authorized_minor),
        )
    operation = _follow_up(payment, origin, K.INCREMENT, amount_minor)
    operation.parent_operation_id = _authorization(aggregate).operation_id
    return Begun(
        operation,
        payment.copy_with(version=payment.version + 1, increment_pending_minor=amount_minor),
    )


def restart(
    payment: Payment,
    operation: Operation,
    request_id: str,
    *,
    connector: str,
    connector_account_id: str,
    route: str = "",
) -> Begun:
    """A new attempt of an operation that was NOT_SENT, under the next epoch, where a new decision
    leads.

    For AUTHORIZE and VERIFY only; every other kind begins anew by its own rules, see
    `begin_again`.
    """
    again = _next_attempt(operation, request_id, connector, connector_account_id)
    again.note = route
    return Begun(
        again,
        payment.copy_with(
            version=payment.version + 1,
            state=PaymentState.PROCESSING,
            connector=connector,
            connector_account_id=connector_account_id,
        ),
    )


def cascade(
    payment: Payment,
    operation: Operation,
    answer: ConnectorAnswer,
    *,
    connector: str,
    connector_account_id: str,
) -> Begun:
    """A new attempt elsewhere, after one of an AUTHORIZE or VERIFY that surely took no effect.

    Raises ValueError where the transition table does not allow it.
    """
    if states.next_state(operation.kind, operation.state, Event.CASCADED) is None:
        raise ValueError(f"a {operation.kind.name} that is {operation.state.name} has no cascade")
    answered = operation.copy_with(attempt=_answered(operation.attempt, answer))
    return Begun(
        _next_attempt(answered, operation.request_id, connector, connector_account_id),
        payment.copy_with(
            version=payment.version + 1,
            connector=connector,
            connector_account_id=connector_account_id,
        ),
    )


def begin_again(operation: Operation, begun: Begun, request_id: str) -> Begun:
    """A new attempt of a follow-up that was NOT_SENT: the reservation is made anew (`begun`, by the
    same rules as the first time), the operation keeps its identity.
    """
    old = operation.attempt
    again = _next_attempt(operation, request_id, old.connector, old.connector_account_id)
    again.amount_minor = begun.operation.amount_minor
    again.final = begun.operation.final
    again.allocations = begun.operation.allocations
    again.parent_operation_id = begun.operation.parent_operation_id
    return Begun(again, begun.payment, begun.cancel_request)


def _next_attempt(
    operation: Operation, request_id: str, connector: str, connector_account_id: str
) -> Operation:
    old = operation.attempt
    return operation.copy_with(
        state=S.PROCESSING,
        epoch=operation.epoch + 1,
        attempt=make_attempt(old.number + 1, connector, connector_account_id),
        superseded_attempts=(*operation.superseded_attempts, old),
        reason="",
        response=None,
        request_id=request_id,
    )


# --- outcomes -------------------------------------------------------------------------------------


def event_of(answer: ConnectorAnswer) -> Event:
    """What an answer means: what it says, and without a verdict, never sent or in doubt."""
    if answer.verdict is _UNKNOWN and answer.delivery is Delivery.NOT_SENT:
        return Event.NEVER_SENT
    return states.VERDICT_EVENTS[answer.verdict]


def _declined_before(operation: Operation) -> bool:
    """Whether an attempt of a cascade before the present one was declined."""
    return operation.kind in _BEGINNINGS and any(
        each.delivery is Delivery.ANSWERED for each in operation.superseded_attempts
    )


def event_for(
    payment: Payment, operation: Operation, answer: ConnectorAnswer, at: datetime
) -> Event:
    """What an answer means for an operation at a time.

    An authorization without effect that a void has cancelled is CANCELED: as NOT_SENT, a repeat of
    its call would execute it after all. One that was declined before its last attempt, which was
    not sent, is DECLINED. One that ends without effect after its customer's time, and that no void
    has cancelled, is EXPIRED, whoever ended it.
    """
    event = event_of(answer)
    if event in _WITHOUT_EFFECT:
        if payment.cancel_requested and operation.kind is K.AUTHORIZE:
            return Event.CANCELED
        if event is Event.NEVER_SENT and _declined_before(operation):
            return Event.DECLINED
        if action_overdue_s(operation, at) >= 0:
            return Event.EXPIRED
    return event


def action_overdue_s(operation: Operation, at: datetime) -> float:
    """For how long the customer's time is over, in seconds; negative while it is not, and for what
    waits for no customer.
    """
    action = operation.next_action
    if operation.state is not S.REQUIRES_ACTION or action is None or action.expires_at is None:
        return -math.inf
    return (at - action.expires_at).total_seconds()


def settle(
    payment: Payment,
    operation: Operation,
    answer: ConnectorAnswer,
    at: datetime,
    new_operation_id: str,
) -> Settled | None:
    """What an answer makes of an operation; None where the transition table does not allow it.

    `at` is the time of the change; `new_operation_id` names a companion, should there be one.
    """
    event = event_for(payment, operation, answer, at)
    after = states.next_state(operation.kind, operation.state, event)
    if after is None:
        return None
    changed, changed_payment = operation.copy(), payment.copy()
    changed.state = after
    changed.attempt = _answered(operation.attempt, answer)
    changed.reason = answer.reason
    changed.next_action = answer.next_action if after is _REQUIRES_ACTION else None
    changed_payment.version += 1
    changed.updated_at = changed_payment.updated_at = at
    settled = Settled(changed, changed_payment)
    if event is _APPROVED and answer.currency not in ("", operation.currency):
        settled.discrepancies.append(
            _discrepancy(operation, "currency", operation.currency, answer.currency)
        )
    if operation.kind in _BEGINNINGS:
        _settle_authorization(settled, answer, event, at, new_operation_id)
    elif operation.kind is K.CAPTURE:
        _settle_capture(settled, event)
        if event is Event.CANCELED:
            _begin_release(settled, new_operation_id, at)
    elif operation.kind is K.REFUND:
        _settle_refund(settled, event)
    elif operation.kind is K.VOID:
        _settle_void(settled)
    elif operation.kind is K.INCREMENT:
        _settle_increment(settled)
    elif operation.kind is K.REVERSAL and event in _DENIALS:
        # What was to be taken back stands, and nobody waits for an answer to hear of it.
        settled.discrepancies.append(
            _discrepancy(operation, "reversal_failed", S.SUCCEEDED.name, event.name)
        )
    return settled


def bounce(
    payment: Payment, operation: Operation, answer: ConnectorAnswer, at: datetime
) -> Settled | None:
    """A capture or refund that had succeeded was returned; None where it had not succeeded."""
    after = states.next_state(operation.kind, operation.state, Event.BOUNCED)
    if after is None:
        return None
    settled = Settled(
        operation.copy_with(state=after, updated_at=at, reason=answer.reason),
        payment.copy_with(version=payment.version + 1, updated_at=at),
    )
    if operation.kind is K.CAPTURE:
        _settle_capture(settled, Event.BOUNCED)
    else:
        _settle_refund(settled, Event.BOUNCED)
    return settled


def accept_cancel_request(payment: Payment, operation: Operation, at: datetime) -> Settled:
    """A void that waits for an unfinished authorization: PENDING; recovery carries it out."""
    attempt = make_attempt(
        operation.attempt.number,
        operation.attempt.connector,
        operation.attempt.connector_account_id,
        delivery=Delivery.NOT_SENT,
    )
    return Settled(
        operation.copy_with(state=S.PENDING, updated_at=at, attempt=attempt),
        payment.copy_with(version=payment.version + 1, updated_at=at),
    )


def reverse_late_success(
    payment: Payment,
    operation: Operation,
    attempt_number: int,
    answer: ConnectorAnswer,
    at: datetime,
    new_operation_ids: tuple[str, str],
) -> Settled:
    """A success of an attempt that was taken for not sent or cancelled: a durable REVERSAL begins,
    and of a capture on a closed payment, the release of what the reversal gives back.

    The operation keeps its state. A late void or reversal is only reported: what it released cannot
    be had back.
    """
    reference = f"{operation.operation_id}-{attempt_number}"
    settled = Settled(
        operation.copy_with(updated_at=at),
        payment.copy_with(version=payment.version + 1, updated_at=at),
    )
    if operation.kind not in (K.VOID, K.REVERSAL):
        reported = answer.outcome.amount_reported_minor if answer.outcome else None
        amount = reported if reported is not None and reported > 0 else operation.amount_minor
        settled.companions.append(
            _reversal(operation, new_operation_ids[0], reference, amount, answer, at)
        )
        if operation.kind is K.CAPTURE:
            _begin_release(settled, new_operation_ids[1], at)
    settled.discrepancies.append(
        _discrepancy(
            operation, "late_success", operation.state.name, f"{reference} took effect later"
        )
    )
    return settled


def contradict(
    payment: Payment, operation: Operation, answer: ConnectorAnswer, at: datetime
) -> Settled | None:
    """What is left of an answer that comes after a success and denies it: a discrepancy, and the
    success stands. None where it contradicts nothing.

    A void or reversal may be sent several times, and all but one of them refused.
    """
    event = event_of(answer)
    if (
        operation.state is not S.SUCCEEDED
        or operation.kind in (K.VOID, K.REVERSAL)
        or event not in _DENIALS
    ):
        return None
    settled = Settled(
        operation.copy_with(updated_at=at),
        payment.copy_with(version=payment.version + 1, updated_at=at),
    )
    settled.discrepancies.append(
        _discrepancy(operation, "late_refusal", operation.state.name, event.name)
    )
    return settled


def record_elsewhere(
    aggregate: Aggregate,
    kind: OperationKind,
    amount_minor: int,
    answer: ConnectorAnswer,
    at: datetime,
    new_operation_id: str,
) -> Settled | None:
    """What the PSP says was done to a payment and not by us: an operation of the PSP's origin.

    For a CAPTURE, REFUND or VOID that took effect. It is a fact that no rule of ours may refuse, so
    the amounts go where there is no CHECK, with a discrepancy; what it leaves no room for, the PSP
    refuses. A void closes the payment, unless captures are under way: theirs is the last word.
    None where it is recorded already, by the PSP's id of it.
    """
    authorization = _authorization(aggregate)
    if done_elsewhere(aggregate, kind, answer.connector_transaction_id) is not None:
        return None
    payment = aggregate.payment.copy_with(version=aggregate.payment.version + 1, updated_at=at)
    settled = Settled(authorization.copy_with(updated_at=at), payment)
    parts = refundable_captures(aggregate.operations) if kind is K.REFUND else []
    done = make_operation(
        merchant_id=payment.merchant_id,
        operation_id=new_operation_id,
        payment_id=payment.payment_id,
        kind=kind,
        origin=OperationOrigin.PSP,
        state=S.SUCCEEDED,
        amount_minor=amount_minor,
        currency=payment.currency,
        attempt=_answered(make_attempt(1, payment.connector, payment.connector_account_id), answer),
        parent_operation_id=authorization.operation_id,
        allocations=allocate(parts, amount_minor),
        created_at=at,
        updated_at=at,
    )
    settled.companions.append(done)
    expected = "0"
    if kind is K.CAPTURE:
        told = payment.captured_reported_minor
        payment.captured_reported_minor = _told(
            told, payment.captured_minor, amount_minor, payment.captured_minor
        )
    elif kind is K.REFUND:
        told = payment.refunded_reported_minor
        payment.refunded_reported_minor = _told(
            told, payment.refunded_minor, amount_minor, payment.refunded_minor
        )
    else:
        expected = payment.state.name
        if not payment.capture_pending_minor and _is_money(payment):
            payment.voided_minor = payment.authorized_minor - payment.captured_minor
            payment.capture_closed = True
            payment.state = payment_state_of_money(payment)
    settled.discrepancies.append(
        _discrepancy(done, f"{kind.name.lower()}_elsewhere", expected, str(amount_minor))
    )
    return settled


def record_dispute(
    aggregate: Aggregate,
    connector_account_id: str,
    amount_minor: int,
    answer: ConnectorAnswer,
    at: datetime,
    new_operation_id: str,
) -> Settled | None:
    """A dispute that the PSP tells of: an operation of its origin, PENDING until it is decided,
    SUCCEEDED where the money is gone, FAILED where it stays. A person has to see it, and another
    end than was told before. An amount of another currency than the payment's is told to that
    person alone. The account is that of the attempt that was disputed, which another may have
    followed.

    None where it is recorded already, by the PSP's id of it, or where the answer is none.
    """
    known = done_elsewhere(aggregate, K.DISPUTE, answer.connector_transaction_id)
    event = event_of(answer)
    if known is not None:
        return _dispute_goes_on(aggregate.payment, known, answer, event, at)
    state = states.next_state(K.DISPUTE, S.PROCESSING, event)
    if state is None:
        return None
    authorization, payment = _authorization(aggregate), aggregate.payment
    reported = str(amount_minor)
    if answer.currency not in ("", payment.currency):
        amount_minor, reported = 0, f"{amount_minor} {answer.currency}"
    disputed = next(
        (
            each
            for each in authorization.superseded_attempts
            if each.connector_account_id == connector_account_id
        ),
        authorization.attempt,
    )
    settled = Settled(
        authorization.copy_with(updated_at=at),
        payment.copy_with(version=payment.version + 1, updated_at=at),
    )
    dispute = make_operation(
        merchant_id=payment.merchant_id,
        operation_id=new_operation_id,
        payment_id=payment.payment_id,
        kind=K.DISPUTE,
        origin=OperationOrigin.PSP,
        state=state,
        amount_minor=amount_minor,
        currency=payment.currency,
        attempt=_answered(
            make_attempt(1, disputed.connector, disputed.connector_account_id), answer
        ),
        parent_operation_id=authorization.operation_id,
        created_at=at,
        updated_at=at,
    )
    settled.companions.append(dispute)
    settled.discrepancies.append(_discrepancy(dispute, "dispute", "0", reported))
    return settled


def _dispute_goes_on(
    payment: Payment, dispute: Operation, answer: ConnectorAnswer, event: Event, at: datetime
) -> Settled | None:
    told = states.next_state(K.DISPUTE, S.PENDING, event)
    if told in (None, S.PENDING, dispute.state):
        return None
    if dispute.state is S.PENDING:
        return settle(payment, dispute, answer, at, "")
    reported = answer.outcome.connector_message if answer.outcome else event.name
    return report(payment, dispute, "dispute_outcome", dispute.state.name, reported, at)


def done_elsewhere(
    aggregate: Aggregate, kind: OperationKind, connector_transaction_id: str
) -> Operation | None:
    """The operation of the PSP's origin that has this id there; a payment has one void at most."""
    for operation in aggregate.operations:
        if operation.origin is OperationOrigin.PSP and operation.kind is kind:
            its = operation.attempt.connector_transaction_id
            if kind is K.VOID or its == connector_transaction_id:
                return operation
    return None


def report(
    payment: Payment, operation: Operation, kind: str, expected: str, reported: str, at: datetime
) -> Settled:
    """A fact that changes nothing here and that a person has to see: a discrepancy."""
    return Settled(
        operation.copy_with(updated_at=at),
        payment.copy_with(version=payment.version + 1, updated_at=at),
        discrepancies=[_discrepancy(operation, kind, expected, reported)],
    )


def payment_state_of_money(payment: Payment) -> PaymentState:
    """The state of a payment whose authorization succeeded, from its amounts."""
    if payment.refunded_minor:
        whole = payment.refunded_minor >= payment.captured_minor
        return PaymentState.REFUNDED if whole else PaymentState.PARTIALLY_REFUNDED
    if payment.captured_minor:
        whole = payment.captured_minor >= payment.authorized_minor
        return PaymentState.CAPTURED if whole else PaymentState.PARTIALLY_CAPTURED
    if payment.voided_minor and not payment.capture_pending_minor:
        return PaymentState.VOIDED
    return _PAYMENT_AUTHORIZED


def refundable_captures(operations: Sequence[Operation]) -> list[tuple[str, int]]:
    """(operation id, amount left to refund) of each succeeded capture, the oldest first."""
    left = {
        operation.operation_id: operation.amount_minor
        for operation in operations
        if operation.kind is K.CAPTURE and operation.state is S.SUCCEEDED
    }
    for operation in operations:
        holds = operation.state in states.UNFINISHED or operation.state is S.SUCCEEDED
        if operation.kind is K.REFUND and holds:
            for capture_id, part in operation.allocations:
                if capture_id in left:
                    left[capture_id] -= part
    return [(capture_id, part) for capture_id, part in left.items() if part > 0]


def allocate(parts: Sequence[tuple[str, int]], amount_minor: int) -> tuple[tuple[str, int], ...]:
    """Divides an amount among captures in their order."""
    allocations = []
    for capture_id, part in parts:
        share = min(part, amount_minor)
        if share:
            allocations.append((capture_id, share))
            amount_minor -= share
    return tuple(allocations)


# --- parts of the above ---------------------------------------------------------------------------


def _follow_up(payment: Payment, origin: Origin, kind: K, amount_minor: int) -> Operation:
    return make_operation(
        merchant_id=payment.merchant_id,
        operation_id=origin.operation_id,
        payment_id=payment.payment_id,
        kind=kind,
        origin=OperationOrigin.CLIENT,
        state=S.PROCESSING,
        amount_minor=amount_minor,
        currency=payment.currency,
        attempt=make_attempt(1, payment.connector, payment.connector_account_id),
        idempotency_key=origin.idempotency_key,
        fingerprint=origin.fingerprint,
        request_id=origin.request_id,
        merchant_transaction_id=origin.merchant_transaction_id,
    )


def _authorization(aggregate: Aggregate) -> Operation:
    return next(operation for operation in aggregate.operations if operation.kind in _BEGINNINGS)


def _is_money(payment: Payment) -> bool:
    return payment.state in (
        PaymentState.AUTHORIZED,
        PaymentState.PARTIALLY_CAPTURED,
        PaymentState.CAPTURED,
        PaymentState.PARTIALLY_REFUNDED,
        PaymentState.REFUNDED,
    )


def _require_authorized(payment: Payment) -> None:
    if not _is_money(payment):
        raise refuse(
            Reason.PAYMENT_NOT_AUTHORIZED,
            "The payment is not authorized.",
            state=payment.state.name,
        )


def _check_currency(payment: Payment, currency: str | None) -> None:
    if currency is not None and currency != payment.currency:
        raise refuse(
            Reason.CURRENCY_MISMATCH,
            "The currency is not that of the payment.",
            payment_currency=payment.currency,
        )


def _check_matrix(kind: K, aggregate: Aggregate) -> Beside:
    result = Beside.ALLOWED
    for operation in aggregate.operations:
        if operation.state not in states.UNFINISHED:
            continue
        beside = states.may_start_beside(kind, operation.kind, operation.state)
        if kind is K.REFUND and operation.kind is K.VOID and takes_charge_back(aggregate.payment):
            # It gives back the whole charge: the refund would be given besides.
            beside = Beside.REFUSED
        if beside is Beside.REFUSED:
            raise _in_progress(
                f"No {kind.name} can start beside an unfinished {operation.kind.name}.", operation
            )
        if beside is Beside.AS_CANCEL_REQUEST:
            result = beside
    return result


def _in_progress(text: str, operation: Operation) -> GatewayError:
    return refuse(
        Reason.OPERATION_IN_PROGRESS,
        text,
        operation_id=operation.operation_id,
        operation_kind=operation.kind.name,
        operation_state=operation.state.name,
    )


def _answered(attempt: Attempt, answer: ConnectorAnswer) -> Attempt:
    return make_attempt(
        attempt.number,
        attempt.connector,
        attempt.connector_account_id,
        answer.delivery,
        answer.connector_transaction_id or attempt.connector_transaction_id,
        answer.outcome or attempt.outcome,
        attempt.processing_ms if answer.processing_ms is None else answer.processing_ms,
    )


_DENIALS = frozenset(
    {Event.DECLINED, Event.FAILED, Event.NEVER_SENT, Event.CANCELED, Event.EXPIRED}
)
"""What says that an operation has no effect."""

_PAYMENT_STATES: dict[S, PaymentState] = {
    S.REQUIRES_ACTION: PaymentState.REQUIRES_ACTION,
    S.PENDING: PaymentState.PENDING,
    S.DECLINED: PaymentState.DECLINED,
    S.FAILED: PaymentState.FAILED,
    S.NOT_SENT: PaymentState.NOT_SENT,
    S.IN_DOUBT: PaymentState.IN_DOUBT,
    S.CANCELED: PaymentState.CANCELED,
    S.EXPIRED: PaymentState.EXPIRED,
}


def _settle_authorization(
    settled: Settled, answer: ConnectorAnswer, event: Event, at: datetime, new_operation_id: str
) -> None:
    operation, payment = settled.operation, settled.payment
    if event is not _APPROVED:
        if event is Event.EXPIRED and payment.authorized_minor:
            # What was captured or released stays, and what is being captured; the rest has expired.
            payment.capture_closed = True
            if payment.state is PaymentState.AUTHORIZED and not payment.capture_pending_minor:
                payment.state = PaymentState.EXPIRED
            return
        payment.state = _PAYMENT_STATES[operation.state]
        return
    outcome = answer.outcome or Outcome()
    payment.connector_transaction_id = operation.attempt.connector_transaction_id
    payment.auth_code = outcome.auth_code
    payment.network_transaction_id = outcome.network_transaction_id
    payment.authorization_expires_at = answer.authorization_expires_at
    if operation.kind is _VERIFY:
        payment.state = PaymentState.VERIFIED
        return
    approved = operation.amount_minor
    reported = outcome.amount_reported_minor
    if reported is not None and reported != approved:
        if reported > approved:
            payment.authorized_reported_minor = reported
            settled.discrepancies.append(
                _discrepancy(operation, "authorized_amount", str(approved), str(reported))
            )
        elif payment.allow_partial_approval and reported > 0:
            approved = reported
        else:
            _refuse_partial_approval(settled, answer, reported, at, new_operation_id)
            return
    payment.authorized_minor = approved
    if payment.capture_method is _AUTOMATIC:
        payment.captured_minor = approved
        payment.captured_reported_minor = payment.authorized_reported_minor
        payment.capture_closed = True
        settled.companions.append(
            make_operation(
                merchant_id=operation.merchant_id,
                operation_id=new_operation_id,
                payment_id=operation.payment_id,
                kind=K.CAPTURE,
                origin=OperationOrigin.GATEWAY,
                state=S.SUCCEEDED,
                amount_minor=approved,
                currency=operation.currency,
                attempt=operation.attempt,
                parent_operation_id=operation.operation_id,
                final=True,
                request_id=operation.request_id,
                created_at=at,
                updated_at=at,
            )
        )
    payment.state = payment_state_of_money(payment)


def _refuse_partial_approval(
    settled: Settled,
    answer: ConnectorAnswer,
    reported_minor: int,
    at: datetime,
    new_operation_id: str,
) -> None:
    operation = settled.operation
    operation.state = S.DECLINED
    outcome = operation.attempt.outcome
    if outcome is not None:
        outcome.response_code = ResponseCode.PARTIAL_APPROVAL_REVERSED
    settled.payment.state = PaymentState.DECLINED
    if reported_minor > 0:
        settled.companions.append(
            _reversal(operation, new_operation_id, operation.reference, reported_minor, answer, at)
        )


def _reversal(
    operation: Operation,
    new_operation_id: str,
    reference: str,
    amount_minor: int,
    answer: ConnectorAnswer,
    at: datetime,
) -> Operation:
    attempts = (*operation.superseded_attempts, operation.attempt)
    reversed_ = next(
        each for each in attempts if f"{operation.operation_id}-{each.number}" == reference
    )
    return make_operation(
        merchant_id=operation.merchant_id,
        operation_id=new_operation_id,
        payment_id=operation.payment_id,
        kind=K.REVERSAL,
        origin=OperationOrigin.GATEWAY,
        state=S.PROCESSING,
        amount_minor=amount_minor,
        currency=operation.currency,
        attempt=make_attempt(
            1,
            reversed_.connector,
            reversed_.connector_account_id,
            delivery=Delivery.NOT_SENT,
            # What is reversed, until the reversal has an id of its own.
            connector_transaction_id=answer.connector_transaction_id,
        ),
        parent_operation_id=operation.operation_id,
        request_id=operation.request_id,
        note=reference,
        created_at=at,
        updated_at=at,
    )


def _begin_release(settled: Settled, new_operation_id: str, at: datetime) -> None:
    """The PSP gives a capture's hold back: where the payment takes no further capture, the gateway
    voids what is left of the authorization.
    """
    capture, payment = settled.operation, settled.payment
    left = payment.authorized_minor - payment.captured_minor - payment.capture_pending_minor
    if not payment.capture_closed or left <= 0:
        return
    attempt = capture.attempt
    settled.companions.append(
        make_operation(
            merchant_id=capture.merchant_id,
            operation_id=new_operation_id,
            payment_id=capture.payment_id,
            kind=K.VOID,
            origin=OperationOrigin.GATEWAY,
            state=S.PROCESSING,
            amount_minor=left,
            currency=capture.currency,
            attempt=make_attempt(
                1, attempt.connector, attempt.connector_account_id, delivery=Delivery.NOT_SENT
            ),
            parent_operation_id=capture.operation_id,
            request_id=capture.request_id,
            created_at=at,
            updated_at=at,
        )
    )


def _settle_capture(settled: Settled, event: Event) -> None:
    operation, payment = settled.operation, settled.payment
    amount = operation.amount_minor
    if operation.state in states.UNFINISHED:
        return
    before = payment.captured_minor
    if operation.origin is OperationOrigin.PSP:  # it bounced, and was never in our own books
        payment.captured_reported_minor = _told(
            payment.captured_reported_minor, before, -amount, before
        )
        return
    if event is Event.BOUNCED:
        refunds = payment.refunded_minor + payment.refund_pending_minor
        returned = -told_of(operation)
        if before - amount >= refunds:
            payment.captured_minor -= amount
        else:
            settled.discrepancies.append(
                _discrepancy(operation, "captured_amount", str(before), f"{amount} of it returned")
            )
        payment.captured_reported_minor = _told(
            payment.captured_reported_minor, before, returned, payment.captured_minor
        )
        payment.state = payment_state_of_money(payment)
        return
    payment.capture_pending_minor -= amount
    if operation.state is S.SUCCEEDED:
        payment.captured_minor += amount
        payment.captured_reported_minor = _told(
            payment.captured_reported_minor, before, told_of(operation), payment.captured_minor
        )
        _compare_amount(settled, "captured_amount")
    elif operation.final:
        # A void may have taken effect meanwhile.
        payment.capture_closed = payment.voided_minor > 0
    if payment.capture_closed and not payment.capture_pending_minor:
        payment.voided_minor = payment.authorized_minor - payment.captured_minor
    payment.state = payment_state_of_money(payment)


def _settle_refund(settled: Settled, event: Event) -> None:
    operation, payment = settled.operation, settled.payment
    amount = operation.amount_minor
    if operation.state in states.UNFINISHED:
        return
    before, told = payment.refunded_minor, 0
    if operation.origin is OperationOrigin.PSP:
        # It bounced, and was never in our own books: a payment without success stays what it is.
        payment.refunded_reported_minor = _told(
            payment.refunded_reported_minor, before, -amount, before
        )
        return
    if event is Event.BOUNCED:
        payment.refunded_minor -= amount
        told = -told_of(operation)
    else:
        payment.refund_pending_minor -= amount
        if operation.state is S.SUCCEEDED:
            payment.refunded_minor += amount
            told = told_of(operation)
            _compare_amount(settled, "refunded_amount")
    payment.refunded_reported_minor = _told(
        payment.refunded_reported_minor, before, told, payment.refunded_minor
    )
    payment.state = payment_state_of_money(payment)


def _settle_void(settled: Settled) -> None:
    operation, payment = settled.operation, settled.payment
    if operation.state is S.SUCCEEDED and _is_money(payment):
        # A release may end beside captures under way: what these leave is added by the last one.
        held = payment.captured_minor + payment.capture_pending_minor
        payment.voided_minor = payment.authorized_minor - held
        payment.capture_closed = True
        payment.state = payment_state_of_money(payment)


def _settle_increment(settled: Settled) -> None:
    operation, payment = settled.operation, settled.payment
    if operation.state in states.UNFINISHED:
        return
    payment.increment_pending_minor = 0
    if operation.state is S.SUCCEEDED:
        before = payment.authorized_minor
        payment.authorized_minor += operation.amount_minor
        payment.authorized_reported_minor = _told(
            payment.authorized_reported_minor,
            before,
            told_of(operation),
            payment.authorized_minor,
        )
        _compare_amount(settled, "authorized_amount")
        if payment.capture_closed and not payment.capture_pending_minor:
            # Captured or voided by the old ceiling while this was in doubt: the rest is released.
            payment.voided_minor = payment.authorized_minor - payment.captured_minor
            settled.discrepancies.append(
                _discrepancy(
                    operation,
                    "late_increment",
                    "closed for capture",
                    f"{operation.amount_minor} authorized in addition",
                )
            )
        if _is_money(payment):
            payment.state = payment_state_of_money(payment)


def told_of(operation: Operation) -> int:
    """The amount that the PSP reported of an operation; where it reported none, ours."""
    outcome = operation.attempt.outcome
    reported = outcome.amount_reported_minor if outcome else None
    return operation.amount_minor if reported is None else reported


def _told(
    told_minor: int | None, before_minor: int, change_minor: int, ours_minor: int
) -> int | None:
    """The total by what the PSP reported, after a change; None where it does not differ from ours.

    `told_minor` and `before_minor` are that total and ours before the change.
    """
    total = (before_minor if told_minor is None else told_minor) + change_minor
    total = max(-REPORTED_MINOR_MAX, min(total, REPORTED_MINOR_MAX))
    return None if total == ours_minor else total


def _compare_amount(settled: Settled, kind: str) -> None:
    expected, reported = settled.operation.amount_minor, told_of(settled.operation)
    if reported != expected:
        settled.discrepancies.append(
            _discrepancy(settled.operation, kind, str(expected), str(reported))
        )


def _discrepancy(operation: Operation, kind: str, expected: str, reported: str) -> Discrepancy:
    return Discrepancy(
        merchant_id=operation.merchant_id,
        payment_id=operation.payment_id,
        operation_id=operation.operation_id,
        kind=kind,
        expected=expected,
        reported=reported,
    )
