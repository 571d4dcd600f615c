"""The oracle: rules that the journals of a trial must keep, whatever happened. Pure.

It knows the published rules (docs/states.md, docs/simulator.md) and asks no gateway. A violation
says which rule, which payment and operation, what is, and what should be.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Final

from gateway.connectors.simulator.journal import standing_charges
from gateway.domain.model import DoubtOutcome, OperationKind, OperationOrigin, PaymentState
from gateway.domain.model import OperationState as S
from gateway.domain.states import (
    FROZEN,
    OPERATION_TRANSITIONS,
    PAYMENT_TRANSITIONS,
    UNFINISHED,
    next_state,
)
from tests.chaos.history import Answer, Call, History, Look, Row, last_answer
from tests.faults.checker import Books

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gateway.connectors.simulator.journal import Record

K = OperationKind

SENDS_MAX: Final = 2
"""How often a request goes to an idempotent PSP at most: once more where its answer was lost."""

_EFFECTS: Final = {
    K.AUTHORIZE: frozenset({"authorization", "charge"}),
    K.CAPTURE: frozenset({"capture"}),
    K.VOID: frozenset({"void"}),
    K.REFUND: frozenset({"refund"}),
    K.INCREMENT: frozenset({"increment"}),
}
_MONEY_KINDS: Final = frozenset({"authorize", "capture", "refund", "increment"})
"""Kinds of request that move money, or hold more of it. Voids and reversals release it: recovery
repeats those until the PSP confirms them."""
_OPENING: Final = frozenset({K.AUTHORIZE, K.VERIFY})
"""Kinds that begin a payment. Every other one of a client's is an intent on one that exists, which
makes a version of it without an event."""
_ACTS_ON: Final = {
    "capture": frozenset({"authorization"}),
    "increment": frozenset({"authorization"}),
    "refund": frozenset({"capture", "charge"}),
}
"""What must have taken effect at the PSP before a request of a kind may be sent."""
_OF_MONEY: Final = frozenset(
    {
        *(PaymentState.AUTHORIZED, PaymentState.PARTIALLY_CAPTURED, PaymentState.CAPTURED),
        *(PaymentState.PARTIALLY_REFUNDED, PaymentState.REFUNDED, PaymentState.VOIDED),
    }
)
"""A payment's states that follow from its amounts."""


class Rule(enum.StrEnum):
    """What must hold."""

    ACKNOWLEDGED_IS_DURABLE = "acknowledged-is-durable"
    """What a client was told stands in the database, with its ids, amount and answer."""
    STATE_IS_REACHABLE = "state-is-reachable"
    """The table of transitions leads from each state told or recorded to all later ones."""
    REPLAY_EQUALS_FIRST = "replay-equals-first"
    """Once an answer is final, every repeat gets the same one, and only the first is no repeat."""
    ONE_OPERATION_A_CALL = "one-operation-a-call"
    """A key has one operation, and each operation of a client's is that of a call."""
    KEY_IS_ITS_PAYLOAD = "key-is-its-payload"
    """A call with another payload under a key that was used is never answered."""
    REFUSED_HAS_NO_EFFECT = "refused-has-no-effect"
    """What was always refused has no operation, and the payment's state gave the ground."""
    EVERY_CALL_IS_ANSWERED = "every-call-is-answered"
    """In the end each call has an answer; none is an internal error."""
    NO_CALL_FAILS = "no-call-fails"
    """Where nothing may fail, the clients' retry policy is enough for every call."""
    SERVICE_GOES_ON = "service-goes-on"
    """The trial reached its end: calls were answered during and after the faults."""
    AT_MOST_ONE_CHARGE = "at-most-one-charge"
    """No payment is charged twice, and no operation takes effect twice."""
    SUCCESS_IS_CHARGED = "success-is-charged"
    """Each success has its effect at the PSP, to the same amount."""
    CHARGE_IS_A_SUCCESS = "charge-is-a-success"
    """Each effect that stands at the PSP is that of an operation that succeeded."""
    INTENT_BEFORE_SEND = "intent-before-send"
    """Whatever was sent to the PSP is an attempt that the database knows, and nothing else took
    effect there."""
    ACTS_ON_WHAT_IS_THERE = "acts-on-what-is-there"
    """A capture, a refund or an increment is sent only after what it acts on took effect."""
    SENT_ONCE = "sent-once"
    """No attempt is sent again, but by the connector's declared idempotency."""
    RESTART_ONLY_WITHOUT_EFFECT = "restart-only-without-effect"
    """A new attempt is sent, wherever it goes, only when every earlier one that a PSP got has
    ended there without effect, and none takes effect later."""
    ATTEMPT_AT_ITS_ACCOUNT = "attempt-at-its-account"
    """An attempt goes to the account that the database has for it, and to no other one; what acts
    on a payment, to the one where that was authorized."""
    CUSTOMER_HAS_THE_TIME = "customer-has-the-time"
    """While a customer may act nothing cancels the payment but a void, and what has expired was
    ended at the PSP."""
    PARTIAL_WHERE_ALLOWED = "partial-where-allowed"
    """Less than was asked for is authorized only where the call allows it."""
    DECISION_HOLDS = "decision-holds"
    """A person's decision that was accepted is recorded, once for an attempt, with what it made of
    the operation; no careful decision is refused but for another outcome."""
    DISPUTE_IS_RECORDED = "dispute-is-recorded"
    """Each dispute that a PSP told of is one operation on its payment, with its end where one was
    told; a person is shown it, and another end than the one that counts."""
    DISCREPANCY_HAS_A_CAUSE = "discrepancy-has-a-cause"
    """Nobody but the gateway acts on the payments, and what it records as a contradiction some PSP
    did or said."""
    AMOUNTS_ADD_UP = "amounts-add-up"
    """A payment's amounts are the sums of its operations, and authorized ≥ captured ≥ refunded."""
    TOTALS_ADD_UP = "totals-add-up"
    """The sums over all payments are those of the PSP."""
    NOTHING_UNFINISHED = "nothing-unfinished"
    """Every operation has a definite outcome, but doubts that the PSP does not help to end."""


LOST_ACKS: Final = frozenset({Rule.ACKNOWLEDGED_IS_DURABLE, Rule.STATE_IS_REACHABLE})
"""Violations by which something acknowledged is gone or contradicted."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that does not hold."""

    rule: Rule
    payment_id: str
    operation_id: str
    found: str
    expected: str

    def __str__(self) -> str:
        where = " ".join(part for part in (self.payment_id, self.operation_id) if part)
        return f"{self.rule}: {where or 'all'}: {self.found}; should be: {self.expected}"


def judge(history: History) -> list[Violation]:
    """Every violation, in the order of the rules."""
    books = _Books(history)
    return [violation for check in _CHECKS for violation in check(books)]


def unresolved(history: History) -> list[Row]:
    """The operations without a definite outcome; disputes take as long as they take."""
    return [
        row for row in history.operations if row["state"] in UNFINISHED and row["kind"] != K.DISPUTE
    ]


@cache
def reachable_states(kind: K, state: S) -> frozenset[S]:
    """The states that an operation may be in after it was in this one, itself included."""
    found, looked_at = {state}, set[S]()
    while found - looked_at:
        at = (found - looked_at).pop()
        looked_at.add(at)
        events = [event for before, event in OPERATION_TRANSITIONS if before is at]
        after = (next_state(kind, at, event) for event in events)
        found.update(each for each in after if each is not None)
    return frozenset(found)


@cache
def reachable_payment_states(state: PaymentState) -> frozenset[PaymentState]:
    """The same for a payment."""
    found, looked_at = {state}, set[PaymentState]()
    while found - looked_at:
        at = (found - looked_at).pop()
        looked_at.add(at)
        found |= PAYMENT_TRANSITIONS[at]
    return frozenset(found)


class _Books:
    """The journals, by what the rules ask for."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.calls = {call.key: call for call in history.calls}
        self.operations = {row["operation_id"]: row for row in history.operations}
        self.by_key = {row["idempotency_key"]: row for row in history.operations}
        self.payments = {row["payment_id"]: row for row in history.payments}
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        for answer in history.answers:
            self.answers[answer.key].append(answer)
        self.looks: dict[str, list[Look]] = defaultdict(list)
        for look in history.looks:
            self.looks[look.operation_id].append(look)
        self.of_payment: dict[str, list[Row]] = defaultdict(list)
        for row in history.operations:
            self.of_payment[row["payment_id"]].append(row)
        self.told: dict[str, list[Row]] = defaultdict(list)
        """The events of each payment, in their order."""
        for event in sorted(
            history.events, key=lambda each: (each["payment_version"], each["seq"])
        ):
            self.told[event["payment_id"]].append(event)
        self.unfinished = {row["payment_id"] for row in unresolved(history)}
        self.standings = [each for each in standing_charges(history.psp) if not each.reversed]
        self.authorizations = {
            record["authorization_id"]: record
            for record in history.psp
            if record.get("effect") in ("authorization", "charge")
        }
        self.effects: dict[str, list[Record]] = defaultdict(list)
        """What stands at the PSP, by the operation's id."""
        for effect in standing_effects(history.psp).values():
            self.effects[_operation_of(effect["reference"])].append(effect)

    def paid_by(self, effect: Record) -> str:
        """The payment whose authorization at the PSP an effect acts on; it says itself whose it
        wants to be.
        """
        authorization = self.authorizations.get(effect["authorization_id"], effect)
        row = self.operations.get(_operation_of(authorization["reference"]))
        payment_ids = {effect["payment_id"], row["payment_id"] if row else ""}
        return " and ".join(sorted(payment_ids))


def _operation_of(reference: str) -> str:
    return reference.rpartition("-")[0]


def standing_effects(records: Iterable[Record]) -> dict[str, Record]:
    """The effects that were not taken back, by the PSP's transaction id."""
    standing: dict[str, Record] = {}
    for record in records:
        _enter_effect(standing, record)
    return standing


def _enter_effect(standing: dict[str, Record], record: Record) -> None:
    if record["type"] != "effect":
        return
    if "takes_back" not in record:
        standing[record["transaction_id"]] = record
        return
    for item in record["takes_back"]:
        standing.pop(item["transaction_id"], None)
        if item["effect"] in ("authorization", "charge"):
            # With an authorization goes all that was done to it.
            of_it = [
                transaction_id
                for transaction_id, effect in standing.items()
                if effect["authorization_id"] == item["authorization_id"]
            ]
            for transaction_id in of_it:
                del standing[transaction_id]


# --- what clients were told -----------------------------------------------------------------------


def _acknowledged(books: _Books) -> Iterator[Violation]:
    rule = Rule.ACKNOWLEDGED_IS_DURABLE
    for key, answers in books.answers.items():
        row = books.by_key.get(key)
        for told in answers:
            if not told.ok:
                continue
            if row is None:
                yield Violation(
                    rule, told.payment_id, told.operation_id, f"{key} is not there", "recorded"
                )
                break
            yield from _differences(rule, books.calls[key], told, row)
            frozen = S(told.state) in FROZEN
            if frozen and told.digest != row["digest"]:
                yield Violation(
                    rule,
                    row["payment_id"],
                    row["operation_id"],
                    f"the stored answer {row['digest'][:12] or '(none)'}",
                    f"the answer that was given, {told.digest[:12]}",
                )
    for row in books.operations.values():
        if row["payment_id"] not in books.payments:
            yield Violation(
                rule, row["payment_id"], row["operation_id"], "no payment's row", "a payment"
            )


def _differences(rule: Rule, call: Call, told: Answer, row: Row) -> Iterator[Violation]:
    asked = (call.kind, call.payment_id or told.payment_id)
    # A new attempt at "whatever is left" may find another amount.
    if call.amount_minor is None and S(told.state) not in FROZEN:
        amount_minor = row["amount_minor"]
    else:
        amount_minor = told.amount_minor
    for what, found, expected in (
        ("operation", row["operation_id"], told.operation_id),
        ("payment", row["payment_id"], told.payment_id),
        ("kind", row["kind"], told.kind),
        ("amount", row["amount_minor"], amount_minor),
        ("currency", row["currency"], told.currency),
        ("told kind and payment", (told.kind, told.payment_id), asked),
        (
            "told amount",
            told.amount_minor,
            told.amount_minor if call.amount_minor is None else call.amount_minor,
        ),
    ):
        if found != expected:
            yield Violation(
                rule, row["payment_id"], row["operation_id"], f"{what} {found}", f"{expected}"
            )


def _told_states(books: _Books) -> Iterator[Violation]:
    rule = Rule.STATE_IS_REACHABLE
    for key, answers in books.answers.items():
        row = books.by_key.get(key)
        if row is None:
            continue
        told = [each for each in answers if each.ok]
        steps = [(each.state, row["state"]) for each in told]
        seen: list[Answer | Look] = [*told, *books.looks[row["operation_id"]]]
        for one, other in combinations(seen, 2):
            first, second = sorted((one, other), key=lambda each: each.sent)
            # An answer may be the first one's copy, but what a look tells is so at that time.
            if first.answered < second.sent and not (
                isinstance(second, Answer) and isinstance(first, Look)
            ):
                steps.append((first.state, second.state))
        yield from _unreachable(rule, row, steps)


def _looks(books: _Books) -> Iterator[Violation]:
    """What GetOperation told goes on to what is recorded."""
    rule = Rule.STATE_IS_REACHABLE
    for operation_id, looks in books.looks.items():
        row = books.operations.get(operation_id)
        if row is None:
            yield Violation(
                Rule.ACKNOWLEDGED_IS_DURABLE, "", operation_id, "is not there", "recorded"
            )
            continue
        payment = books.payments.get(row["payment_id"])
        if payment is None:
            continue
        yield from _unreachable(rule, row, ((each.state, row["state"]) for each in looks))
        for each in looks:
            after = PaymentState(payment["state"])
            if after not in reachable_payment_states(PaymentState(each.payment_state)):
                yield Violation(
                    rule,
                    row["payment_id"],
                    operation_id,
                    after.name,
                    f"a state that follows {PaymentState(each.payment_state).name}",
                )
            yield from _as_of_its_version(books, row, each)
        last = payment["version"]
        others = (other["operation_id"] for other in books.of_payment[row["payment_id"]])
        of_payment = [each for other in others for each in books.looks.get(other, ())]
        for later in sorted(looks, key=lambda each: -each.sent):
            earlier = [each.version for each in of_payment if each.answered < later.sent]
            if later.version > last or any(version > later.version for version in earlier):
                yield Violation(
                    rule,
                    row["payment_id"],
                    operation_id,
                    f"version {later.version} was told, {max(earlier, default=0)} before,"
                    f" {last} is recorded",
                    "versions that grow",
                )


def _as_of_its_version(books: _Books, row: Row, look: Look) -> Iterator[Violation]:
    """Operation and payment were told as the events up to the version told have them."""
    state, payment_state = int(S.PROCESSING), int(PaymentState.PROCESSING)
    for event in books.told[row["payment_id"]]:
        if event["payment_version"] > look.version:
            break
        payment_state = event["payment_state"]
        if event["operation_id"] == look.operation_id:
            state = event["operation_state"]
    if (look.state, look.payment_state) != (state, payment_state):
        yield Violation(
            Rule.STATE_IS_REACHABLE,
            row["payment_id"],
            row["operation_id"],
            f"{S(look.state).name} and {PaymentState(look.payment_state).name} were told with"
            f" version {look.version}",
            f"{S(state).name} and {PaymentState(payment_state).name}, as its events say",
        )


def _unreachable(rule: Rule, row: Row, steps: Iterable[tuple[int, int]]) -> Iterator[Violation]:
    for before, after in dict.fromkeys(steps):
        if S(after) not in reachable_states(K(row["kind"]), S(before)):
            yield Violation(
                rule,
                row["payment_id"],
                row["operation_id"],
                S(after).name,
                f"a state that follows {S(before).name}",
            )


def _replays(books: _Books) -> Iterator[Violation]:
    rule = Rule.REPLAY_EQUALS_FIRST
    for key, answers in books.answers.items():
        frozen = [each for each in answers if each.ok and S(each.state) in FROZEN]
        if not frozen:
            continue
        first = frozen[0]

        def violation(found: str, expected: str, first: Answer = first) -> Violation:
            return Violation(rule, first.payment_id, first.operation_id, found, expected)

        others = {each.digest for each in frozen} - {first.digest}
        if others:
            yield violation(f"{len(others) + 1} answers for {key}", "one")
        firsts = sum(not each.replayed for each in frozen)
        if firsts > 1:
            yield violation(f"{firsts} answers that are no replay", "at most one")
        for later in answers:
            after = later.sent > min(each.answered for each in frozen)
            if after and (later.refused or (later.ok and S(later.state) not in FROZEN)):
                told = S(later.state).name if later.ok else later.reason
                yield violation(f"{told} after the final answer", S(first.state).name)


def _keys(books: _Books) -> Iterator[Violation]:
    rule = Rule.ONE_OPERATION_A_CALL
    rows = books.history.operations
    if books.history.has_strangers:
        rows = [row for row in rows if row["idempotency_key"] in books.calls]
    for name in ("operation_id", "idempotency_key"):
        for value, count in Counter(row[name] for row in rows).items():
            if value is not None and count > 1:
                yield Violation(rule, "", "", f"{count} operations with {value}", "one")
    for row in rows:
        from_client = row["origin"] == OperationOrigin.CLIENT
        if from_client != (row["idempotency_key"] in books.calls):
            yield Violation(
                rule,
                row["payment_id"],
                row["operation_id"],
                f"{OperationOrigin(row['origin']).name} with {row['idempotency_key']}",
                "a client's with the key of a call",
            )


def _misuses(books: _Books) -> Iterator[Violation]:
    for each in books.history.misuses:
        if each.ok:
            yield Violation(
                Rule.KEY_IS_ITS_PAYLOAD,
                each.payment_id,
                each.operation_id,
                f"{each.key} with another payload was told {S(each.state).name}",
                "a refusal",
            )


def _refusals(books: _Books) -> Iterator[Violation]:
    rule = Rule.REFUSED_HAS_NO_EFFECT
    for key, answers in books.answers.items():
        row = books.by_key.get(key)
        if row is not None and all(each.refused for each in answers):
            yield Violation(
                rule,
                row["payment_id"],
                row["operation_id"],
                f"{S(row['state']).name}, and {key} was always refused",
                "no operation",
            )
        for each in answers:
            call = books.calls[key]
            # A void by an authorization's key may be the first to arrive.
            early = call.kind is K.VOID and not call.payment_id and each.status == "NOT_FOUND"
            named = each.refused and (each.status == "FAILED_PRECONDITION" or early)
            if each.refuses and not named:
                yield Violation(
                    rule,
                    call.payment_id,
                    "",
                    f"{key} was refused by {each.status} {each.reason}",
                    "no such refusal of a good call",
                )


def _unanswered(books: _Books) -> Iterator[Violation]:
    rule = Rule.EVERY_CALL_IS_ANSWERED
    for key, call in books.calls.items():
        answers = books.answers[key]
        last = last_answer(answers)
        if last is None or (last.ok and S(last.state) is S.PROCESSING):
            told = last.status if last else "nothing"
            yield Violation(rule, call.payment_id, "", f"{key} was told {told}", "an outcome")
        for each in answers:
            if each.reason == "INTERNAL":
                yield Violation(rule, call.payment_id, "", f"{key}: INTERNAL", "no internal error")


def _failed(books: _Books) -> Iterator[Violation]:
    if not books.history.calls_may_fail:
        for key in books.history.failed:
            yield Violation(
                Rule.NO_CALL_FAILS,
                books.calls[key].payment_id,
                "",
                f"{key} failed after all tries: {Counter(a.status for a in books.answers[key])}",
                "an answer",
            )


def _broken(books: _Books) -> Iterator[Violation]:
    if books.history.broken:
        yield Violation(Rule.SERVICE_GOES_ON, "", "", books.history.broken, "a trial to its end")


# --- what the PSP did -----------------------------------------------------------------------------


def _charges(books: _Books) -> Iterator[Violation]:
    own = defaultdict(list)
    for standing in books.standings:
        own[standing.payment_id].append(standing)
    for payment_id, standings in own.items():
        if len(standings) > 1:
            references = ", ".join(each.reference for each in standings)
            yield Violation(
                Rule.AT_MOST_ONE_CHARGE, payment_id, "", f"charges stand: {references}", "one"
            )
        if payment_id not in books.payments:
            yield Violation(
                Rule.CHARGE_IS_A_SUCCESS, payment_id, "", "a charge stands", "a payment's row"
            )
    for payment_id, payment in books.payments.items():
        if payment_id in books.unfinished:
            continue
        at_psp, expected = Books.of_standings(own[payment_id]), Books.of_payment(payment)
        if at_psp != expected:
            yield Violation(
                Rule.SUCCESS_IS_CHARGED, payment_id, "", f"at the PSP {at_psp}", f"{expected}"
            )


def _effects(books: _Books) -> Iterator[Violation]:
    for operation_id, row in books.operations.items():
        kinds = _EFFECTS.get(K(row["kind"]))
        if kinds is None:
            continue
        found = [each for each in books.effects[operation_id] if each["effect"] in kinds]
        if len(found) > 1:
            references = ", ".join(each["reference"] for each in found)
            yield Violation(
                Rule.AT_MOST_ONE_CHARGE, row["payment_id"], operation_id, references, "one effect"
            )
        elif row["state"] in UNFINISHED:
            continue
        elif row["state"] == S.SUCCEEDED:
            yield from _success(books, row, found)
        elif found:
            yield Violation(
                Rule.CHARGE_IS_A_SUCCESS,
                row["payment_id"],
                operation_id,
                f"{found[0]['effect']} stands at the PSP, the operation is {S(row['state']).name}",
                "SUCCEEDED",
            )
    for operation_id, effects in books.effects.items():
        if operation_id not in books.operations:
            yield Violation(
                Rule.CHARGE_IS_A_SUCCESS,
                effects[0]["payment_id"],
                operation_id,
                f"{effects[0]['effect']} of an operation that is not there",
                "an operation",
            )


def _success(books: _Books, row: Row, found: list[Record]) -> Iterator[Violation]:
    """The effect of an operation that succeeded."""
    payment = books.payments.get(row["payment_id"])
    taken_back = payment is not None and payment["state"] == PaymentState.VOIDED
    held = row["kind"] in (K.AUTHORIZE, K.INCREMENT)
    if row["kind"] == K.VOID or (held and taken_back and not found):
        # A void may have found nothing to release, or have taken the authorization back as a whole,
        # and with it the increments.
        return
    if row["kind"] == K.CAPTURE and row["origin"] == OperationOrigin.GATEWAY:
        # The PSP did it with the authorization.
        found = [
            each
            for each in books.effects[row["parent_operation_id"] or ""]
            if each["effect"] == "charge"
        ]
    else:
        present = f"{row['operation_id']}-{row['attempt_number']}"
        for each in found:
            if each["reference"] != present:
                yield Violation(
                    Rule.SUCCESS_IS_CHARGED,
                    row["payment_id"],
                    row["operation_id"],
                    f"the effect of {each['reference']}",
                    f"that of the attempt which succeeded, {present}",
                )
    effects = [(each["amount_minor"], each["currency"], books.paid_by(each)) for each in found]
    approved = _approved(row)
    call = books.calls.get(row["idempotency_key"])
    allows_partial = call is not None and call.allows_partial
    if approved < row["amount_minor"] and not allows_partial:
        yield Violation(
            Rule.PARTIAL_WHERE_ALLOWED,
            row["payment_id"],
            row["operation_id"],
            f"{approved} of {row['amount_minor']} authorized",
            "declined, and taken back",
        )
    if effects != [(approved, row["currency"], row["payment_id"])]:
        yield Violation(
            Rule.SUCCESS_IS_CHARGED,
            row["payment_id"],
            row["operation_id"],
            f"effects (amount, currency, payment whose authorization it is of) {effects}",
            f"one of {approved} {row['currency']} on its payment's",
        )


def _approved(row: Row) -> int:
    """The amount of an operation that succeeded: of an authorization, what was approved of it."""
    approved: int = row["approved_minor" if "approved_minor" in row else "amount_minor"]
    return approved


def _sends(books: _Books) -> Iterator[Violation]:
    sends: dict[str, list[Record]] = defaultdict(list)
    references: dict[str, set[str]] = defaultdict(set)
    """Those that a PSP got, by operation."""
    over = {
        f"{each['operation_id']}-{each['attempt_number']}": True
        for each in books.history.resolutions
        if each["outcome"] == DoubtOutcome.NO_EFFECT.name
    }
    """Whether all that came under a reference has ended without effect, and nothing can come."""
    standing: dict[str, Record] = {}
    done: dict[str, set[str]] = defaultdict(set)
    """What ever took effect, by payment."""
    for record in books.history.psp:
        _enter_effect(standing, record)
        reference = record.get("reference", "")
        if record["type"] in ("effect", "outcome") and _is_of_money(record):
            yield from _took_effect(record, references)
            over[reference] = _is_over(record)
            if record["type"] == "effect" and "takes_back" not in record:
                done[record["payment_id"]].add(record["effect"])
                yield from _was_sent(record, sends.get(reference, []))
        if record["type"] != "received" or record["method"] != "send":
            continue
        if record["kind"] in _MONEY_KINDS:
            yield from _has_ground(record, done[record["payment_id"]])
            if not sends[reference]:
                yield from _restarted(record, standing, references, over)
            references[_operation_of(reference)].add(reference)
            over.setdefault(reference, False)
        sends[reference].append(record)
    for reference, records in sends.items():
        yield from _sent(books, reference, records)
    for rows in books.of_payment.values():
        authorized_at = {
            row.get("connector_account_id") for row in rows if row["kind"] == K.AUTHORIZE
        }
        for row in rows:
            acts = row["kind"] in (K.CAPTURE, K.REFUND, K.INCREMENT)
            if acts and row.get("connector_account_id") not in authorized_at:
                yield Violation(
                    Rule.ATTEMPT_AT_ITS_ACCOUNT,
                    row["payment_id"],
                    row["operation_id"],
                    f"at {row.get('connector_account_id')}",
                    f"at {authorized_at}, where the payment was authorized",
                )


def _was_sent(record: Record, sends: list[Record]) -> Iterator[Violation]:
    reference = record["reference"]
    accounts = {each.get("account") for each in sends}
    if not sends or ("account" in sends[0] and record["account"] not in accounts):
        yield Violation(
            Rule.INTENT_BEFORE_SEND,
            record["payment_id"],
            _operation_of(reference),
            f"{record['effect']} of {reference}, which nobody sent to {record['account']}",
            "an effect of what was sent",
        )


def _has_ground(record: Record, done: set[str]) -> Iterator[Violation]:
    wanted = _ACTS_ON.get(record["kind"], frozenset())
    if wanted and not wanted & done:
        yield Violation(
            Rule.ACTS_ON_WHAT_IS_THERE,
            record["payment_id"],
            _operation_of(record["reference"]),
            f"{record['reference']} was sent before any {' or '.join(sorted(wanted))}",
            "sent after it",
        )


def _is_of_money(record: Record) -> bool:
    return bool(record.get("reference")) and record.get("kind", "authorize") in _MONEY_KINDS


def _is_over(record: Record) -> bool:
    """Whether a decision of the PSP says that nothing stands, and nothing will."""
    return record.get("answer", {}).get("result") in _ENDS_WITHOUT_EFFECT


_ENDS_WITHOUT_EFFECT: Final = frozenset(
    {"declined", "rejected", "failed", "canceled", "expired", "refused"}
)


def _earlier(reference: str, references: Iterable[str]) -> list[str]:
    number = int(reference.rpartition("-")[2])
    return sorted(each for each in references if int(each.rpartition("-")[2]) < number)


def _restarted(
    record: Record,
    standing: dict[str, Record],
    references: dict[str, set[str]],
    over: dict[str, bool],
) -> Iterator[Violation]:
    reference = record["reference"]
    operation_id, _, number = reference.rpartition("-")
    if int(number) <= 1:
        return  # nothing was before it
    found = [
        effect["reference"]
        for effect in standing.values()
        # A request may be late, and meet an attempt that came after it: the PSP refuses it then.
        if _operation_of(effect["reference"]) == operation_id
        and int(effect["reference"].rpartition("-")[2]) < int(number)
    ]
    open_ones = [
        each for each in _earlier(reference, references[operation_id]) if not over.get(each)
    ]
    for each in dict.fromkeys([*found, *open_ones]):
        yield Violation(
            Rule.RESTART_ONLY_WITHOUT_EFFECT,
            record["payment_id"],
            operation_id,
            f"{reference} was sent while {each} {'stood' if each in found else 'was open'}",
            "sent when nothing of the earlier attempts stands or may come",
        )


def _took_effect(record: Record, references: dict[str, set[str]]) -> Iterator[Violation]:
    """What a PSP did for an attempt after another one had followed it."""
    reference = record["reference"]
    operation_id = _operation_of(reference)
    if record["type"] != "effect" or "takes_back" in record:
        return
    later = [each for each in references[operation_id] if reference in _earlier(each, [reference])]
    if later:
        yield Violation(
            Rule.RESTART_ONLY_WITHOUT_EFFECT,
            record["payment_id"],
            operation_id,
            f"{reference} took effect after {', '.join(sorted(later))} was sent",
            "no effect of an attempt that another one has followed",
        )


def _sent(books: _Books, reference: str, records: list[Record]) -> Iterator[Violation]:
    operation_id, _, number = reference.rpartition("-")
    first = records[0]
    row = books.operations.get(operation_id)
    known = row is not None and row["payment_id"] == first["payment_id"]
    if row is None or not known or int(number) > row["attempt_number"]:
        yield Violation(
            Rule.INTENT_BEFORE_SEND,
            first["payment_id"],
            operation_id,
            f"{reference} was sent, the database has "
            + ("no such operation" if row is None else f"attempt {row['attempt_number']}"),
            "recorded before",
        )
        return
    if first["kind"] not in _MONEY_KINDS:
        return
    accounts = {each["account"] for each in records if "account" in each}
    at = row.get("connector_account_id") if int(number) == row["attempt_number"] else None
    if len(accounts) > 1 or (at is not None and accounts - {at}):
        yield Violation(
            Rule.ATTEMPT_AT_ITS_ACCOUNT,
            first["payment_id"],
            operation_id,
            f"{reference} was sent to {', '.join(sorted(accounts))}",
            at or "one account",
        )
    profile = books.history.profile_of(first.get("account", ""))
    sends_max = SENDS_MAX if profile.idempotent_by_reference else 1
    contents = {
        (each["kind"], each["amount_minor"], each["currency"], each["payment_id"])
        for each in records
    }
    if len(records) > sends_max or len(contents) > 1:
        yield Violation(
            Rule.SENT_ONCE,
            first["payment_id"],
            operation_id,
            f"{reference} was sent {len(records)} times with {len(contents)} contents",
            f"at most {sends_max} times, the same each time",
        )
    if int(number) == row["attempt_number"] and first["amount_minor"] != row["amount_minor"]:
        yield Violation(
            Rule.SENT_ONCE,
            first["payment_id"],
            operation_id,
            f"{reference} was sent for {first['amount_minor']}",
            f"{row['amount_minor']}",
        )


def _customers(books: _Books) -> Iterator[Violation]:
    """Those who have to act first have the time to, and only the PSP ends it."""
    rule = Rule.CUSTOMER_HAS_THE_TIME
    until: dict[str, float] = {}
    ended: set[str] = set()
    partial: set[str] = set()
    """What a PSP approved less of, which declines it where the call does not allow that."""
    # A doubt that the gateway cancels may be of one whose page nobody was told of.
    sent_on = {
        event["operation_id"]
        for event in books.history.events
        if event["operation_state"] == S.REQUIRES_ACTION
    }
    for record in books.history.psp:
        reference, answer = record.get("reference", ""), record.get("answer", {})
        if answer.get("result") == "requires_action" and "next_action_expires_at" in answer:
            until[reference] = answer["next_action_expires_at"]
        elif record["type"] in ("effect", "outcome"):
            until.pop(reference, None)
        if answer.get("result") in _ENDS_WITHOUT_EFFECT:
            ended.add(reference)
        row = books.operations.get(_operation_of(reference))
        if row is not None and _is_refused_part(books, row, answer):
            partial.add(reference)
        if record["type"] != "received" or record["method"] != "cancel" or row is None:
            continue
        if row["operation_id"] not in sent_on:
            continue
        payment = books.payments.get(row["payment_id"])
        left_s = until.get(reference, -math.inf) - record["t"] - books.history.clock_step_s
        if left_s > 0 and payment is not None and not payment["cancel_requested"]:
            yield Violation(
                rule,
                row["payment_id"],
                row["operation_id"],
                f"{reference} was cancelled {left_s:.1f} s before the customer's time was over",
                "not cancelled, but for a void",
            )
    for row in books.operations.values():
        reference = f"{row['operation_id']}-{row['attempt_number']}"
        if row["state"] == S.EXPIRED and reference not in ended:
            yield Violation(
                rule, row["payment_id"], row["operation_id"], "EXPIRED", "ended at the PSP"
            )
        references = {f"{row['operation_id']}-{n + 1}" for n in range(row["attempt_number"])}
        if row["state"] == S.DECLINED and not references & (ended | partial):
            yield Violation(
                Rule.STATE_IS_REACHABLE,
                row["payment_id"],
                row["operation_id"],
                "DECLINED",
                "declined by a PSP, which none did",
            )


def _disputes(books: _Books) -> Iterator[Violation]:
    rule = Rule.DISPUTE_IS_RECORDED
    shown = {(each["operation_id"], each["kind"]) for each in books.history.discrepancies or ()}
    recorded: dict[str, list[Row]] = defaultdict(list)
    for row in books.operations.values():
        if row["kind"] == K.DISPUTE:
            recorded[row["connector_transaction_id"]].append(row)
    for each in books.history.disputes:
        ends = {_ENDS_OF_DISPUTES[status] for status in each.statuses} - {S.PENDING}
        authorization = books.operations.get(_operation_of(each.reference), {})
        payment_id = authorization.get("payment_id", "")
        found = [
            (row["payment_id"], row["amount_minor"], row["state"] in (ends or {S.PENDING}))
            for row in recorded.pop(each.dispute_id, ())
        ]
        rows = [row for row in books.of_payment[payment_id] if row["kind"] == K.DISPUTE]
        wanted = {"dispute"} | ({"dispute_outcome"} if len(ends) > 1 else set())
        missing = wanted - {
            kind
            for row in rows
            if row["connector_transaction_id"] == each.dispute_id
            for operation_id, kind in shown
            if operation_id == row["operation_id"]
        }
        if found != [(payment_id, each.amount_minor, True)] or missing:
            yield Violation(
                rule,
                payment_id,
                each.dispute_id,
                f"(payment, amount, whether as it was told) {found}, not shown {sorted(missing)}",
                f"one of {each.amount_minor} that went {', '.join(each.statuses)}",
            )
    for dispute_id, rows in recorded.items():
        yield Violation(rule, rows[0]["payment_id"], dispute_id, "a dispute", "none was told")


_ENDS_OF_DISPUTES: Final = {
    **dict.fromkeys(("OPENED", "CHALLENGED"), S.PENDING),
    **dict.fromkeys(("WON", "CANCELLED"), S.FAILED),
    **dict.fromkeys(("LOST", "ACCEPTED", "EXPIRED"), S.SUCCEEDED),
}


def _is_refused_part(books: _Books, row: Row, answer: Row) -> bool:
    """Whether a PSP approved less than was asked for, and the call does not allow that."""
    call = books.calls.get(row["idempotency_key"])
    approved_minor = answer.get("amount_minor", row["amount_minor"])
    is_part = answer.get("result") == "approved" and approved_minor < row["amount_minor"]
    return is_part and not (call is not None and call.allows_partial)


def _discrepancies(books: _Books) -> Iterator[Violation]:
    rule = Rule.DISCREPANCY_HAS_A_CAUSE
    for row in books.operations.values():
        if row["origin"] == OperationOrigin.PSP and row["kind"] != K.DISPUTE:
            yield Violation(
                rule,
                row["payment_id"],
                row["operation_id"],
                f"a {K(row['kind']).name} of the PSP's origin",
                "one of ours",
            )
    denied, done = set[str](), set[str]()
    for record in books.history.psp:
        reference = record.get("reference", "")
        if record["type"] == "effect" and "takes_back" not in record:
            done.add(_operation_of(reference))
        if _is_over(record):
            denied.add(reference)
    for each in books.history.discrepancies or ():
        operation_id = each["operation_id"]
        row = books.operations.get(operation_id, {})
        # The capture of an automatic authorization has that one's effect.
        named = (operation_id, row.get("parent_operation_id"))
        causes = {
            "late_success": any(name in done for name in named),
            "late_refusal": f"{operation_id}-{row.get('attempt_number')}" in denied,
        }
        # The simulated PSPs report what they did, and nobody acts in their consoles.
        uncaused = each["kind"].endswith("elsewhere") or each["kind"] in ("currency", "late_amount")
        if not causes.get(each["kind"], not uncaused):
            yield Violation(
                rule, "", operation_id, f"a discrepancy {each['kind']}", "none without a cause"
            )


_MADE_BY: Final = {
    # A partial approval that the call does not allow, and a void that waits, decide too.
    DoubtOutcome.TOOK_EFFECT.name: frozenset({S.SUCCEEDED, S.DECLINED}),
    DoubtOutcome.NO_EFFECT.name: frozenset({S.NOT_SENT, S.CANCELED, S.DECLINED}),
    DoubtOutcome.DECLINED.name: frozenset({S.DECLINED}),
    DoubtOutcome.FAILED.name: frozenset({S.FAILED}),
    DoubtOutcome.CANCELED.name: frozenset({S.CANCELED}),
}
"""What a decision may make of an operation."""


def _decisions(books: _Books) -> Iterator[Violation]:
    rule = Rule.DECISION_HOLDS
    recorded = {
        (each["operation_id"], each["attempt_number"]): each for each in books.history.resolutions
    }
    for (operation_id, _), each in recorded.items():
        payment_id = books.operations[operation_id]["payment_id"]
        told = {
            event["operation_state"]
            for event in books.told[payment_id]
            if event["operation_id"] == operation_id
        }
        if each["state"] not in _MADE_BY[each["outcome"]] or each["state"] not in told:
            yield Violation(
                rule,
                payment_id,
                operation_id,
                f"{each['outcome']} made it {S(each['state']).name}, told were {sorted(told)}",
                f"one of {sorted(_MADE_BY[each['outcome']])}, and told",
            )
    for decision in books.history.decisions:
        operation_id = decision.operation_id
        row = recorded.get((operation_id, decision.attempt_number))
        said = (decision.outcome, decision.amount_minor)
        same = row is not None and (row["outcome"], row["amount_minor"]) == said
        wrong = not same if decision.told == "" else decision.told not in _NO_DECISION
        if wrong:
            yield Violation(
                rule,
                "",
                operation_id,
                f"{said} was told {decision.told or 'OK'}, {row} is recorded",
                "recorded, or refused since there is no such doubt",
            )


_NO_DECISION: Final = frozenset({None, "OPERATION_NOT_IN_DOUBT"})


# --- what the database holds ----------------------------------------------------------------------


def _amounts(books: _Books) -> Iterator[Violation]:
    for payment_id, payment in books.payments.items():
        done: Counter[K] = Counter()
        pending: Counter[K] = Counter()
        for row in books.of_payment[payment_id]:
            if row["state"] in UNFINISHED:
                pending[K(row["kind"])] += row["amount_minor"]
            elif row["state"] == S.SUCCEEDED:
                done[K(row["kind"])] += _approved(row)
        opening = [
            row["amount_minor"]
            for row in books.of_payment[payment_id]
            if row["kind"] in (K.AUTHORIZE, K.VERIFY)
        ]
        if opening != [payment["requested_minor"]]:
            yield Violation(
                Rule.AMOUNTS_ADD_UP,
                payment_id,
                "",
                f"requested_minor {payment['requested_minor']}",
                f"{opening} by its authorization",
            )
        yield from _parents(books, payment_id)
        yield from _allocations(books, payment_id)
        yield from _voids(books, payment)
        for row in books.of_payment[payment_id]:
            if row["currency"] != payment["currency"]:
                yield Violation(
                    Rule.AMOUNTS_ADD_UP,
                    payment_id,
                    row["operation_id"],
                    f"in {row['currency']}",
                    f"in {payment['currency']}",
                )
        for name, expected in (
            ("authorized_minor", done[K.AUTHORIZE] + done[K.INCREMENT]),
            ("captured_minor", done[K.CAPTURE]),
            ("refunded_minor", done[K.REFUND]),
            ("capture_pending_minor", pending[K.CAPTURE]),
            ("refund_pending_minor", pending[K.REFUND]),
            ("increment_pending_minor", pending[K.INCREMENT]),
        ):
            if payment[name] != expected:
                yield Violation(
                    Rule.AMOUNTS_ADD_UP,
                    payment_id,
                    "",
                    f"{name} {payment[name]}",
                    f"{expected} by its operations",
                )
        yield from _bounds(Rule.AMOUNTS_ADD_UP, payment_id, payment)


def _parents(books: _Books, payment_id: str) -> Iterator[Violation]:
    """Each operation acts on one of its own payment, a refund on a capture."""
    for row in books.of_payment[payment_id]:
        if row["kind"] in _OPENING:
            continue
        parent = books.operations.get(row["parent_operation_id"] or "")
        of_it = parent is not None and parent["payment_id"] == payment_id
        if (
            parent is None
            or not of_it
            or (row["kind"] == K.REFUND)
            != (parent["kind"] == K.CAPTURE and row["origin"] == OperationOrigin.CLIENT)
        ):
            yield Violation(
                Rule.AMOUNTS_ADD_UP,
                payment_id,
                row["operation_id"],
                f"a {K(row['kind']).name} on {row['parent_operation_id']}",
                "on its payment's authorization, a refund on a capture of it",
            )


def _allocations(books: _Books, payment_id: str) -> Iterator[Violation]:
    """A refund is divided among captures, the named one alone where it names one, and of none is
    more given back than it took.
    """
    given: Counter[str] = Counter()
    for row in books.of_payment[payment_id]:
        if row["kind"] != K.REFUND or "allocations" not in row:
            continue
        parts: dict[str, int] = dict(row["allocations"])
        call = books.calls.get(row["idempotency_key"])
        named = call.capture_operation_id if call is not None else ""
        if sum(parts.values()) != row["amount_minor"] or (named and set(parts) != {named}):
            yield Violation(
                Rule.AMOUNTS_ADD_UP,
                payment_id,
                row["operation_id"],
                f"divided into {parts}",
                f"{row['amount_minor']} of {named or 'captures'}",
            )
        if row["state"] in UNFINISHED or row["state"] == S.SUCCEEDED:
            given.update(parts)
    for capture_id, part in given.items():
        capture = books.operations.get(capture_id, {})
        if capture.get("kind") != K.CAPTURE or part > capture["amount_minor"]:
            yield Violation(
                Rule.AMOUNTS_ADD_UP,
                payment_id,
                capture_id,
                f"{part} refunded of it",
                f"at most {capture.get('amount_minor')}",
            )


def _voids(books: _Books, payment: Row) -> Iterator[Violation]:
    """What was voided is not held any more."""
    payment_id = payment["payment_id"]
    rows = books.of_payment[payment_id]
    authorized = any(row["kind"] in _OPENING and row["state"] == S.SUCCEEDED for row in rows)
    held = payment["authorized_minor"] - payment["captured_minor"] - payment["voided_minor"]
    if payment_id in books.unfinished or not authorized or not held:
        return
    for row in rows:
        own = row["origin"] == OperationOrigin.CLIENT
        if row["kind"] == K.VOID and row["state"] == S.SUCCEEDED and own:
            yield Violation(
                Rule.SUCCESS_IS_CHARGED,
                payment_id,
                row["operation_id"],
                f"a VOID that succeeded, and {held} are held",
                "nothing",
            )


def _bounds(rule: Rule, payment_id: str, sums: Row) -> Iterator[Violation]:
    captured = sums["captured_minor"] + sums["capture_pending_minor"]
    refunded = sums["refunded_minor"] + sums["refund_pending_minor"]
    if not sums["authorized_minor"] >= captured + sums["voided_minor"] >= captured:
        yield Violation(
            rule,
            payment_id,
            "",
            f"captured and being captured {captured}, voided {sums['voided_minor']}",
            f"at most the {sums['authorized_minor']} authorized",
        )
    if not sums["captured_minor"] >= refunded >= 0:
        yield Violation(
            rule,
            payment_id,
            "",
            f"refunded and being refunded {refunded}",
            f"at most the {sums['captured_minor']} captured",
        )


def _totals(books: _Books) -> Iterator[Violation]:
    rows = list(books.payments.values())
    if rows:
        names = [name for name in rows[0] if name.endswith("_minor")]
        sums: Row = {name: sum(row[name] for row in rows) for name in names}
        yield from _bounds(Rule.TOTALS_ADD_UP, "", sums)
    if books.unfinished:
        return  # what is in doubt may stand, or not
    ours = [Books.of_payment(row) for row in rows]
    theirs = Books.of_standings(books.standings)
    total = Books(
        sum(each.open_minor for each in ours),
        sum(each.captured_minor for each in ours),
        sum(each.refunded_minor for each in ours),
    )
    if total != theirs:
        yield Violation(Rule.TOTALS_ADD_UP, "", "", f"{total}", f"{theirs}, as at the PSP")


def _unfinished(books: _Books) -> Iterator[Violation]:
    for row in unresolved(books.history):
        profile = books.history.profile_of(row.get("connector_account_id", ""))
        settles = profile.query_by_reference or profile.cancel_by_reference
        # Where it does not, a void of a remainder can neither be asked for nor repeated.
        tells_of_voids = profile.query_by_reference or profile.idempotent_by_reference
        release = row["kind"] == K.VOID and row["origin"] == OperationOrigin.GATEWAY
        if release and not tells_of_voids:
            continue
        if settles or row["state"] != S.IN_DOUBT or books.history.has_people:
            yield Violation(
                Rule.NOTHING_UNFINISHED,
                row["payment_id"],
                row["operation_id"],
                f"{K(row['kind']).name} is {S(row['state']).name}",
                "a definite outcome",
            )


def _events(books: _Books) -> Iterator[Violation]:
    """Each event is one of its payment's, and has its number for itself."""
    rule = Rule.STATE_IS_REACHABLE
    for event in books.history.events:
        operation_id = event["operation_id"]
        row = books.operations.get(operation_id, {"payment_id": "none"})
        if row["payment_id"] != event["payment_id"]:
            yield Violation(
                rule,
                event["payment_id"],
                operation_id,
                f"an event of an operation of {row['payment_id']}",
                "of the payment's own",
            )
    for (payment_id, version, seq), count in Counter(
        (each["payment_id"], each["payment_version"], each["seq"]) for each in books.history.events
    ).items():
        if count > 1:
            yield Violation(
                rule, payment_id, "", f"{count} events of version {version}, {seq}", "one"
            )


def _paths_of_operations(books: _Books) -> Iterator[Violation]:
    """The events tell a path of the table that ends in what the row says."""
    rule = Rule.STATE_IS_REACHABLE
    of_operation: dict[str, list[int]] = defaultdict(lambda: [S.PROCESSING])
    for event in (each for path in books.told.values() for each in path):
        of_operation[event["operation_id"]].append(event["operation_state"])
    for operation_id, row in books.operations.items():
        last = of_operation[operation_id][-1]
        if last != row["state"]:
            yield Violation(
                rule,
                row["payment_id"],
                operation_id,
                S(row["state"]).name,
                f"{S(last).name}, as the last event says",
            )
        yield from _unreachable(rule, row, pairwise(of_operation[operation_id]))
        # What comes with a charge has the number of that attempt.
        if row["origin"] == OperationOrigin.CLIENT and row["epoch"] < row["attempt_number"]:
            yield Violation(
                rule,
                row["payment_id"],
                operation_id,
                f"attempt {row['attempt_number']} in epoch {row['epoch']}",
                "an epoch for each attempt",
            )


def _paths_of_payments(books: _Books) -> Iterator[Violation]:
    """The same of payments; every change but an intent is told."""
    rule = Rule.STATE_IS_REACHABLE
    for payment_id, payment in books.payments.items():
        path = books.told[payment_id]
        states = [int(PaymentState.PROCESSING), *(each["payment_state"] for each in path)]
        for before, after in dict.fromkeys(pairwise([*states, payment["state"]])):
            if PaymentState(after) not in reachable_payment_states(PaymentState(before)):
                yield Violation(
                    rule,
                    payment_id,
                    "",
                    PaymentState(after).name,
                    f"a state that follows {PaymentState(before).name}",
                )
        if states[-1] != payment["state"]:
            yield Violation(
                rule,
                payment_id,
                "",
                PaymentState(payment["state"]).name,
                f"{PaymentState(states[-1]).name}, as the last event says",
            )
        yield from _told_amounts(books, payment, path)
        latest = path[-1]["payment_version"] if path else 0
        if payment_id not in books.unfinished and latest != payment["version"]:
            yield Violation(
                rule, payment_id, "", f"the last event is of version {latest}", payment["version"]
            )
        intents = sum(
            row["origin"] == OperationOrigin.CLIENT and row["kind"] not in _OPENING
            for row in books.of_payment[payment_id]
        )
        changes = len({each["payment_version"] for each in path})
        if payment["version"] != 1 + intents + changes:
            yield Violation(
                rule,
                payment_id,
                "",
                f"{changes} changes were told, with version {payment['version']}",
                f"{payment['version'] - 1 - intents}: all but {intents} intents",
            )


def _told_amounts(books: _Books, payment: Row, path: Sequence[Row]) -> Iterator[Violation]:
    """What events tell of amounts: the last one what is recorded, each what the operation has."""
    rule = Rule.AMOUNTS_ADD_UP
    payment_id = payment["payment_id"]
    for event in path:
        if "amounts" in event:
            yield from _bounds(rule, payment_id, event["amounts"])
            yield from _fits(payment_id, event["payment_state"], event["amounts"])
    yield from _fits(payment_id, payment["state"], payment)
    if path and payment_id not in books.unfinished and "amounts" in path[-1]:
        told = path[-1]["amounts"]
        differing = {
            name: amount_minor
            for name, amount_minor in told.items()
            if payment[name] != amount_minor
        }
        if differing:
            yield Violation(
                rule,
                payment_id,
                "",
                f"the last event told {differing}",
                f"{ {name: payment[name] for name in differing} }, as recorded",
            )
    last = {event["operation_id"]: event for event in path if "operation_minor" in event}
    for operation_id, event in last.items():
        row = books.operations.get(operation_id)
        if row is None or row["state"] != event["operation_state"]:
            continue  # a new attempt may be to another amount
        if row["amount_minor"] != event["operation_minor"]:
            yield Violation(
                rule,
                payment_id,
                operation_id,
                f"its event told {event['operation_minor']}",
                f"{row['amount_minor']}, as recorded",
            )


def _fits(payment_id: str, state: int, amounts: Row) -> Iterator[Violation]:
    """The state of a payment whose authorization succeeded is that of its amounts."""
    authorized, captured = amounts["authorized_minor"], amounts["captured_minor"]
    if amounts["refunded_minor"]:
        whole = amounts["refunded_minor"] >= captured
        expected = PaymentState.REFUNDED if whole else PaymentState.PARTIALLY_REFUNDED
    elif captured:
        whole = captured >= authorized
        expected = PaymentState.CAPTURED if whole else PaymentState.PARTIALLY_CAPTURED
    else:
        expected = PaymentState.VOIDED if amounts["voided_minor"] else PaymentState.AUTHORIZED
    if state in _OF_MONEY and state != expected:
        yield Violation(
            Rule.AMOUNTS_ADD_UP,
            payment_id,
            "",
            PaymentState(state).name,
            f"{expected.name}, by its amounts",
        )


_CHECKS: Final[tuple[Callable[[_Books], Iterator[Violation]], ...]] = (
    _broken,  # first: it may be why the others find something
    _acknowledged,
    _told_states,
    _looks,
    _events,
    _paths_of_operations,
    _paths_of_payments,
    _replays,
    _keys,
    _misuses,
    _refusals,
    _unanswered,
    _failed,
    _charges,
    _effects,
    _sends,
    _customers,
    _decisions,
    _disputes,
    _discrepancies,
    _amounts,
    _totals,
    _unfinished,
)
