"""What the simulated PSP knows and decides: requests in, records and answers out, no I/O.

State changes only by `apply`, live as well as when the journal is read again after a restart, so
that both lead to the same state.
"""

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.connectors.simulator.journal import Record, Standing, apply_effect
from gateway.connectors.simulator.outcomes import (
    ACTION_LIFE_S,
    APPROVE,
    LOOKS_UNTIL_SETTLED,
    REDIRECT,
    VISITS,
    Behaviour,
    Result,
    choose,
)
from gateway.connectors.simulator.profiles import Profile

KINDS: Final = ("authorize", "capture", "void", "refund", "increment", "verify", "reversal")
CODES: Final = frozenset({"pix"})
"""Redirect methods whose page is led to by a code to scan."""
AUTHORIZATION_LIFE_S: Final = 7 * 86_400.0
"""For how long an authorization holds, in seconds; told, not enforced."""

Answer = dict[str, Any]

_SHORT: Final = {
    "authorize": "auth",
    "capture": "cap",
    "void": "void",
    "refund": "ref",
    "increment": "inc",
    "verify": "ver",
    "reversal": "rev",
}
_MESSAGES: Final = {
    "transaction_not_found": "no such transaction on this account",
    "authorization_closed": "the authorization no longer stands",
    "currency_mismatch": "the currency is not that of the authorization",
    "amount_exceeds_authorized": "the amount exceeds what is authorized and not yet captured",
    "amount_exceeds_captured": "the amount exceeds what is captured and not yet refunded",
    "already_captured": "a part is captured already",
    "nothing_to_void": "nothing is left to void",
    "remaining_amount_differs": "not what stands after the void",
    "nothing_to_reverse": "nothing is left to reverse",
    "reference_reused": "the reference was used for another request",
    "reference_canceled": "the reference was cancelled",
    "cancel_refused": "later operations rest on it",
    "refund_bounced": "the bank returned the refund",
    "capture_bounced": "the bank returned the capture",
}


@dataclass(slots=True)
class Send:
    """A request to do something, as it came over the wire."""

    kind: str
    reference: str
    amount_minor: int
    currency: str
    account: str
    payment_id: str
    token: str = ""
    capture: bool = False
    final: bool = False
    target_transaction_id: str = ""
    target_reference: str = ""
    avs_code: str = ""
    method: str = ""
    """The redirect method; empty for a token."""
    return_url: str = ""
    remaining_minor: int | None = None
    """For a void: what is to stand after it, where the request tells that."""

    def same_as(self, other: "Transaction") -> bool:
        """Whether a repeat of a reference asks for the same thing."""
        mine = (self.kind, self.amount_minor, self.currency, self.account, self.final)
        theirs = (other.kind, other.requested_minor, other.currency, other.account, other.final)
        same_token = self.kind not in ("authorize", "verify") or self.token == other.token
        return (
            mine == theirs
            and same_token
            and self.method == other.method
            and self.target_transaction_id == other.target_transaction_id
        )


@dataclass(slots=True)
class Transaction:
    """A decision of the PSP on a request."""

    transaction_id: str
    kind: str
    reference: str
    account: str
    payment_id: str
    requested_minor: int
    amount_minor: int
    currency: str
    token: str
    authorization_id: str
    """The authorization that it belongs to; its own id where it is one."""
    target_transaction_id: str
    final: bool
    effect: str
    """What it does, or will do when it is settled."""
    received_at: float
    answer: Answer
    targets: tuple[str, ...] = ()
    """For a reversal: the authorizations that it takes back."""
    released_minor: int = 0
    """What a final capture gave back of the authorization."""
    refunded_minor: int = 0
    """For what captures: what refunds that name it gave back."""
    method: str = ""
    """The redirect method."""
    return_url: str = ""
    looks: int = 0
    taken_back: bool = False

    @property
    def result(self) -> Result:
        """What the PSP says of it now."""
        return Result(self.answer["result"])

    def awaits_customer(self, now: float) -> bool:
        """Whether its page can be used."""
        return (
            bool(self.method)
            and self.result is Result.REQUIRES_ACTION
            and now < self.answer["next_action_expires_at"]
        )


@dataclass(slots=True)
class Reference:
    """All that came under one reference."""

    kind: str
    sends: int = 0
    """How many requests to do it were received."""
    transactions: list[Transaction] = field(default_factory=list)
    canceled: Answer | None = None
    """What cancelling it found; None where it was not cancelled."""


class _Rejected(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Ledger:
    """The books of the PSP."""

    def __init__(self, profile: Profile, records: Iterable[Record] = ()) -> None:
        self.profile = profile
        self.journal_id = ""
        self._references: dict[str, Reference] = {}
        self._transactions: dict[str, Transaction] = {}
        self._standings: dict[str, Standing] = {}
        self._pending: dict[str, list[Transaction]] = {}
        """Unsettled operations by authorization: they hold their amount."""
        self._next_number = 1
        self.request_count = 0
        """How many requests the journal holds; the latest has this number."""
        for record in records:
            self.apply(record)
        if not self.journal_id:
            # Ids of two journals differ, and no id is a run of digits like a card number.
            self.journal_id = "j" + secrets.token_hex(4)

    @property
    def transaction_count(self) -> int:
        """How many decisions are held in memory."""
        return len(self._transactions)

    def reference(self, reference: str) -> Reference | None:
        """What is known of a reference."""
        return self._references.get(reference)

    def decided(self) -> Iterator[tuple[str, Transaction]]:
        """Each reference with its latest transaction."""
        for reference, known in self._references.items():
            if known.transactions:
                yield reference, known.transactions[-1]

    def duplicate_of(self, reference: str, now: float) -> Transaction | None:
        """The transaction that a further request with this reference would repeat now."""
        known = self._references.get(reference)
        if not self.profile.idempotent_by_reference or known is None or not known.transactions:
            return None
        latest = known.transactions[-1]
        validity_s = self.profile.key_validity_s
        expired = validity_s is not None and now - latest.received_at >= validity_s
        return None if expired else latest

    def behaviour(self, send: Send) -> Behaviour:
        """What the published tokens and amounts say about a request."""
        token = send.token
        if send.method:
            return REDIRECT
        if send.kind not in ("authorize", "verify"):
            standings = self._targets(send)
            token = standings[0].token if standings else ""
        return choose(send.kind, token, send.amount_minor)

    # --- requests ---------------------------------------------------------------------------------

    def refuse_canceled(self, send: Send, request: int, now: float) -> tuple[Record, Answer]:
        """The refusal of a request whose reference was cancelled."""
        known = self._references[send.reference]
        answer = _answer(
            Result.REFUSED,
            "reference_canceled",
            had=(known.canceled or {}).get("had", "nothing"),
            reference=send.reference,
            kind=send.kind,
        )
        record: Record = {
            "type": "refused",
            "t": now,
            "request": request,
            "reference": send.reference,
            "kind": send.kind,
            "code": "reference_canceled",
        }
        return record, answer

    def repeat(
        self, transaction: Transaction, send: Send, request: int, now: float
    ) -> tuple[Record | None, Answer]:
        """The answer to a further request with an idempotent reference."""
        if not send.same_as(transaction):
            answer = _answer(
                Result.REJECTED, "reference_reused", reference=send.reference, kind=send.kind
            )
            return None, answer
        return self._look(transaction, request, now), transaction.answer

    def execute(
        self, send: Send, behaviour: Behaviour, request: int, received_at: float, now: float
    ) -> tuple[Record, Answer]:
        """Decide on a request, and do it."""
        number = self._next_number
        transaction_id = f"sim_{_SHORT[send.kind]}_{self.journal_id}x{number:x}"
        answer = _answer(
            behaviour.result,
            behaviour.code,
            reference=send.reference,
            kind=send.kind,
            transaction_id=transaction_id,
            amount_minor=send.amount_minor,
            currency=send.currency,
        )
        record: Record = {
            "type": "outcome",
            "method": "send",
            "t": now,
            "received_at": received_at,
            "request": request,
            "number": number,
            "kind": send.kind,
            "reference": send.reference,
            "transaction_id": transaction_id,
            "authorization_id": transaction_id if send.kind == "authorize" else "",
            "payment_id": send.payment_id,
            "account": send.account,
            "token": send.token,
            "amount_minor": send.amount_minor,
            "requested_minor": send.amount_minor,
            "released_minor": 0,
            "currency": send.currency,
            "target_transaction_id": send.target_transaction_id,
            "final": send.final,
            "method_type": send.method,
            "return_url": send.return_url,
            "effect": "",
            "targets": [],
            "answer": answer,
        }
        try:
            self._prepare(send, record)
        except _Rejected as rejected:
            record["effect"] = ""
            answer |= {
                "result": Result.REJECTED.value,
                "code": rejected.code,
                "message": _MESSAGES[rejected.code],
            }
        else:
            _complete(send, behaviour, record)
        self.apply(record)
        return record, answer

    def query(
        self, kind: str, reference: str, request: int, now: float
    ) -> tuple[list[Record], Answer]:
        """What became of a reference: the answer that counts, and all charges of it."""
        known = self._references.get(reference)
        if known is None or known.kind != kind or not (known.transactions or known.canceled):
            return [], {"result": "not_found", "reference": reference, "kind": kind}
        if known.canceled is not None:
            return [], {**known.canceled, "transactions": []}
        records = [
            record
            for transaction in known.transactions
            if (record := self._look(transaction, request, now)) is not None
        ]
        return records, _all_of(known)

    def cancel(self, kind: str, reference: str, request: int, now: float) -> tuple[Record, Answer]:
        """Make a reference unusable, and take back what it caused."""
        known = self._references.get(reference) or Reference(kind)
        found = _telling([transaction.answer for transaction in known.transactions])
        record: Record = {
            "type": "outcome",
            "method": "cancel",
            "t": now,
            "request": request,
            "kind": known.kind,
            "reference": reference,
            "effect": "",
            "takes_back": [],
        }
        if known.canceled is not None:
            record["answer"] = known.canceled
            return record, known.canceled
        if known.kind != kind or not self._may_take_back(known.transactions):
            record["answer"] = answer = _answer(
                Result.REJECTED, "cancel_refused", reference=reference, kind=kind
            )
            if known.kind == kind:
                answer["standing"] = _all_of(known)
            # Nothing is applied: the reference stays as it is.
            return record, answer
        settled = {
            result.value
            for result in (Result.DECLINED, Result.REJECTED, Result.FAILED, Result.EXPIRED)
        }
        if found.get("result") in settled:
            answer = {**found, "had": "refusal"}
        else:
            takes_back = [
                _item(transaction)
                for transaction in known.transactions
                if self._has_effect(transaction)
            ]
            if takes_back:
                record |= {"type": "effect", "effect": "cancel", "takes_back": takes_back}
            answer = {
                **_answer(Result.CANCELED, "canceled", reference=reference, kind=kind),
                "had": "effect" if "transaction_id" in found else "nothing",
            }
            for name in ("transaction_id", "currency"):
                if name in found:
                    answer[name] = found[name]
            if takes_back:
                answer["amount_minor"] = sum(item["amount_minor"] for item in takes_back)
        record["answer"] = answer
        self.apply(record)
        return record, answer

    def visited(self, transaction_id: str) -> Transaction | None:
        """The authorization whose page a customer visits."""
        transaction = self._transactions.get(transaction_id)
        return transaction if transaction is not None and transaction.method else None

    def visit(
        self, transaction: Transaction, outcome: str, request: int, now: float
    ) -> Record | None:
        """What a customer chose on the page; None where the page can no longer be used."""
        known = self._references[transaction.reference]
        if not transaction.awaits_customer(now) or known.canceled is not None:
            return None
        record = self._settlement(transaction, VISITS[outcome], now)
        if record is not None:
            record["request"] = request
            self.apply(record)
        return record

    def settle(self, transaction_id: str, now: float) -> Record | None:
        """What became of a transaction without anybody's looking at it; None where it stays as it
        is.
        """
        transaction = self._transactions[transaction_id]
        return self._settle(transaction, self._settles_as(transaction, now, by_itself=True), now)

    def settles_by_itself(self, transaction_id: str) -> bool:
        """Whether something will become of it that nobody has to do."""
        transaction = self._transactions.get(transaction_id)
        if transaction is None:
            return False
        return self._settles_as(transaction, transaction.received_at, by_itself=True) is not None

    def payment_reference(self, record: Record) -> str:
        """The reference of the authorization that a decision belongs to."""
        authorization = self._transactions.get(record["authorization_id"])
        return record["reference"] if authorization is None else authorization.reference

    # --- the state --------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        """Change the state by a record."""
        kind = record["type"]
        if kind == "start":
            self.journal_id = record["journal_id"]
        elif kind == "received":
            self.request_count = record["request"]
            if record["method"] == "send":
                self._known(record).sends += 1
        elif kind in ("effect", "outcome"):
            if record["method"] == "send":
                self._apply_decision(record)
            elif record["method"] == "settle":
                self._apply_settlement(record)
            elif record["answer"]["code"] != "cancel_refused":
                self._apply_cancel(record)
            for item in record.get("takes_back", ()):
                transaction = self._transactions[item["transaction_id"]]
                transaction.taken_back = True
                if item["effect"] == "refund":
                    self._refunded(transaction, -transaction.amount_minor)
            if kind == "effect":
                apply_effect(self._standings, record)

    def _known(self, record: Record) -> Reference:
        reference = record["reference"]
        known = self._references.get(reference)
        if known is None:
            known = self._references[reference] = Reference(record["kind"])
        return known

    def _apply_decision(self, record: Record) -> None:
        self._next_number = record["number"] + 1
        transaction = Transaction(
            transaction_id=record["transaction_id"],
            kind=record["kind"],
            reference=record["reference"],
            account=record["account"],
            payment_id=record["payment_id"],
            requested_minor=record["requested_minor"],
            amount_minor=record["amount_minor"],
            currency=record["currency"],
            token=record["token"],
            authorization_id=record["authorization_id"],
            target_transaction_id=record["target_transaction_id"],
            final=record["final"],
            effect=record["effect"],
            received_at=record["received_at"],
            answer=record["answer"],
            targets=tuple(record["targets"]),
            released_minor=record["released_minor"],
            # A journal of before redirects has neither.
            method=record.get("method_type", ""),
            return_url=record.get("return_url", ""),
        )
        self._transactions[transaction.transaction_id] = transaction
        self._known(record).transactions.append(transaction)
        if transaction.result is Result.PENDING:
            self._pending.setdefault(transaction.authorization_id, []).append(transaction)
        if record["type"] == "effect" and transaction.effect == "refund":
            self._refunded(transaction, transaction.amount_minor)

    def _apply_settlement(self, record: Record) -> None:
        transaction = self._transactions[record["transaction_id"]]
        self._settled(transaction)
        transaction.answer = record["answer"]
        transaction.released_minor = record["released_minor"]
        if record["effect"] == "refund":
            self._refunded(transaction, transaction.amount_minor)

    def _apply_cancel(self, record: Record) -> None:
        known = self._known(record)
        known.canceled = record["answer"]
        for transaction in known.transactions:
            self._settled(transaction)

    def _settled(self, transaction: Transaction) -> None:
        pending = self._pending.get(transaction.authorization_id, [])
        if transaction in pending:
            pending.remove(transaction)

    def _refunded(self, refund: Transaction, amount_minor: int) -> None:
        captured = self._transactions.get(refund.target_transaction_id)
        if captured is not None:
            captured.refunded_minor += amount_minor

    # --- rules ------------------------------------------------------------------------------------

    def _targets(self, send: Send) -> list[Standing]:
        """The authorizations that a request acts on: several only for a reversal by reference."""
        if send.target_transaction_id:
            found = [self._transactions.get(send.target_transaction_id)]
        else:
            known = self._references.get(send.target_reference)
            found = list(known.transactions) if known is not None else []
        return [
            self._standings[transaction.authorization_id]
            for transaction in found
            if transaction is not None
            and transaction.authorization_id in self._standings
            and transaction.account == send.account
        ]

    def _held_by_pending(self, authorization_id: str, kind: str) -> int:
        pending = self._pending.get(authorization_id, ())
        return sum(one.amount_minor for one in pending if one.kind == kind)

    def _free_minor(self, standing: Standing) -> int:
        """What is authorized and neither captured, released nor held by what is pending."""
        held = (
            self._held_by_pending(standing.authorization_id, kind) for kind in ("capture", "void")
        )
        return standing.open_minor - sum(held)

    def _prepare(self, send: Send, record: Record) -> None:
        """Check a request by the PSP's rules and put its effect into the record."""
        if send.kind == "authorize":
            record["effect"] = "charge" if send.capture else "authorization"
        elif send.kind == "verify":
            record["effect"] = "verify"
        else:
            self._prepare_follow_up(send, record)

    def _prepare_follow_up(self, send: Send, record: Record) -> None:
        standings = self._targets(send)
        if not standings:
            raise _Rejected("transaction_not_found")
        standing = standings[0]
        record["authorization_id"] = standing.authorization_id
        record["token"] = standing.token
        record["effect"] = send.kind
        if send.kind == "reversal":
            self._prepare_reversal(standings, record)
        elif standing.reversed:
            raise _Rejected("authorization_closed")
        elif standing.currency != send.currency:
            raise _Rejected("currency_mismatch")
        elif send.kind == "capture":
            free_minor = self._free_minor(standing)
            if send.amount_minor > free_minor:
                raise _Rejected("amount_exceeds_authorized")
            record["released_minor"] = free_minor - send.amount_minor if send.final else 0
        elif send.kind == "void":
            # A void releases whatever is left, and says how much that was.
            left_minor = self._free_minor(standing)
            if left_minor <= 0:
                raise _Rejected("nothing_to_void")
            if send.remaining_minor not in (None, standing.captured_minor):
                raise _Rejected("remaining_amount_differs")
            record["amount_minor"] = record["answer"]["amount_minor"] = left_minor
        elif send.kind == "refund":
            self._prepare_refund(standing, send)
        elif _is_used(standing):
            raise _Rejected("already_captured")

    def _released_now(self, capture: Transaction) -> int:
        """What a final capture releases when it settles: nothing that others hold by then."""
        free_minor = self._free_minor(self._standings[capture.authorization_id])
        return min(capture.released_minor, free_minor)

    def _prepare_refund(self, standing: Standing, send: Send) -> None:
        free_minor = standing.net_minor - self._held_by_pending(standing.authorization_id, "refund")
        named = self._transactions.get(send.target_transaction_id)
        if named is not None and named.kind == "capture":
            if named.taken_back or named.result is not Result.APPROVED:
                raise _Rejected("amount_exceeds_captured")
            free_minor = min(free_minor, named.amount_minor - named.refunded_minor)
        if send.amount_minor > free_minor:
            raise _Rejected("amount_exceeds_captured")

    def _prepare_reversal(self, standings: list[Standing], record: Record) -> None:
        open_ones = [standing for standing in standings if standing.stands]
        if not open_ones:
            raise _Rejected("nothing_to_reverse")
        record["targets"] = targets = [standing.authorization_id for standing in open_ones]
        record["takes_back"] = [_item(self._transactions[target]) for target in targets]
        amount_minor = sum(standing.open_minor + standing.net_minor for standing in open_ones)
        record["amount_minor"] = record["answer"]["amount_minor"] = amount_minor

    def _has_effect(self, transaction: Transaction) -> bool:
        standing = self._standings.get(transaction.authorization_id)
        return (
            transaction.result is Result.APPROVED
            and not transaction.taken_back
            and (standing is None or not standing.reversed)
        )

    def _may_take_back(self, transactions: list[Transaction]) -> bool:
        """Whether refunded ≤ captured ≤ authorized still holds without these."""
        for transaction in transactions:
            if transaction.kind == "reversal" and transaction.result is Result.APPROVED:
                return False
            standing = self._standings.get(transaction.authorization_id)
            if standing is None or not self._has_effect(transaction):
                continue
            if transaction.kind == "capture" and transaction.amount_minor > standing.net_minor:
                return False
            if transaction.kind == "increment" and transaction.amount_minor > standing.open_minor:
                return False
        return True

    def _look(self, transaction: Transaction, request: int, now: float) -> Record | None:
        """Count a look at a transaction, and settle it when its time has come."""
        transaction.looks += 1
        record = self._settle(transaction, self._settles_as(transaction, now), now)
        if record is not None:
            record["request"] = request
        return record

    def _settle(self, transaction: Transaction, result: Result | None, now: float) -> Record | None:
        known = self._references[transaction.reference]
        if result is None or transaction.taken_back or known.canceled is not None:
            return None
        record = self._settlement(transaction, result, now)
        if record is not None:
            self.apply(record)
        return record

    def _settles_as(
        self, transaction: Transaction, now: float, *, by_itself: bool = False
    ) -> Result | None:
        """What this look, or time, makes of it; None where it stays as it is."""
        if transaction.method:
            if transaction.result is Result.PENDING:
                return Result.APPROVED
            waiting = transaction.result is Result.REQUIRES_ACTION
            return Result.EXPIRED if waiting and not transaction.awaits_customer(now) else None
        behaviour = choose(transaction.kind, transaction.token, transaction.requested_minor)
        due = by_itself or transaction.looks >= LOOKS_UNTIL_SETTLED
        return behaviour.settles_as if due and transaction.result is behaviour.result else None

    def _settlement(self, transaction: Transaction, result: Result, now: float) -> Record | None:
        """The later outcome of a transaction; None where what was done since forbids it."""
        record: Record = {
            "type": "outcome",
            "method": "settle",
            "t": now,
            "kind": transaction.kind,
            "reference": transaction.reference,
            "transaction_id": transaction.transaction_id,
            "authorization_id": transaction.authorization_id,
            "payment_id": transaction.payment_id,
            "account": transaction.account,
            "token": transaction.token,
            "amount_minor": transaction.amount_minor,
            "released_minor": transaction.released_minor,
            "currency": transaction.currency,
            "effect": "",
        }
        code, network_code = "do_not_honor", "05"
        if result is Result.APPROVED and transaction.kind == "increment":
            standing = self._standings[transaction.authorization_id]
            if standing.reversed or _is_used(standing):
                # Nothing is left to add to, as it would be told of a new request.
                result, code, network_code = Result.DECLINED, "authorization_closed", ""
        if result is Result.APPROVED:
            code, network_code = APPROVE.code, APPROVE.network_code
            record |= {"type": "effect", "effect": transaction.effect}
            if transaction.effect == "capture":
                record["released_minor"] = self._released_now(transaction)
            if transaction.effect == "reversal":
                targets = [self._transactions[target] for target in transaction.targets]
                record["takes_back"] = [_item(one) for one in targets if self._has_effect(one)]
        elif result in (Result.PENDING, Result.EXPIRED):
            code, network_code = result.value, ""
        elif result is Result.FAILED:
            if not self._may_take_back([transaction]):
                return None
            code, network_code = f"{transaction.kind}_bounced", ""
            record |= {"type": "effect", "effect": "bounce", "takes_back": [_item(transaction)]}
        answer = transaction.answer | {
            "result": result.value,
            "code": code,
            "message": _message(code),
            "network_code": network_code,
            "network_code_scheme": "iso8583_1987" if network_code else "",
        }
        if result is Result.APPROVED:
            answer |= _approval(transaction.kind, transaction.transaction_id, now)
        record["answer"] = answer
        return record


def _is_used(standing: Standing) -> bool:
    """Whether it is too late to increment an authorization."""
    return bool(standing.captured_minor or standing.voided_minor)


# --- answers --------------------------------------------------------------------------------------


def _message(code: str) -> str:
    return _MESSAGES.get(code, code.replace("_", " "))


def _answer(result: Result, code: str, **more: object) -> Answer:
    return {"result": result.value, "code": code, "message": _message(code), **more}


def _telling(answers: list[Answer]) -> Answer:
    """The answer that counts: an approval before what is pending, that before a refusal."""
    for result in (Result.APPROVED, Result.PENDING, Result.REQUIRES_ACTION):
        for answer in answers:
            if answer["result"] == result.value:
                return answer
    return answers[-1] if answers else {}


def _all_of(known: Reference) -> Answer:
    """The answer that counts, with all answers of a reference."""
    answers = [transaction.answer for transaction in known.transactions]
    return {**_telling(answers), "transactions": answers}


def _item(transaction: Transaction) -> dict[str, Any]:
    """What a record says about a transaction that is taken back."""
    return {
        "effect": transaction.effect,
        "transaction_id": transaction.transaction_id,
        "authorization_id": transaction.authorization_id,
        "amount_minor": transaction.amount_minor,
        "released_minor": transaction.released_minor,
    }


def _complete(send: Send, behaviour: Behaviour, record: Record) -> None:
    """Put what the behaviour says into a record that the PSP's rules allow."""
    answer = record["answer"]
    if behaviour.partial and send.kind == "authorize":
        record["amount_minor"] = answer["amount_minor"] = max(1, send.amount_minor // 2)
    if behaviour.reports_wrong_amount:
        answer["amount_minor"] += 1
    answer |= {
        "network_code": behaviour.network_code,
        "network_code_scheme": "iso8583_1987" if behaviour.network_code else "",
        "advice_scheme": behaviour.advice_scheme,
        "advice_code": behaviour.advice_code,
    }
    if send.kind in ("authorize", "verify"):
        answer |= {
            "avs_code": behaviour.avs_code or send.avs_code,
            "cvv_code": behaviour.cvv_code,
        }
    if send.method:
        answer["next_action_kind"] = "qr_code" if send.method in CODES else "redirect"
        answer["next_action_path"] = f"/pay/{record['transaction_id']}"
        answer["next_action_expires_at"] = record["t"] + ACTION_LIFE_S
    elif behaviour.result is Result.REQUIRES_ACTION:
        answer["next_action_url"] = f"https://acs.example/challenge/{record['transaction_id']}"
    if behaviour.result is Result.APPROVED:
        record["type"] = "effect"
        answer |= _approval(send.kind, record["transaction_id"], record["t"])
    else:
        record.pop("takes_back", None)


def _approval(kind: str, transaction_id: str, now: float) -> dict[str, object]:
    """The network's numbers of an approval. None of them can be taken for a card number."""
    number = int(transaction_id.rpartition("x")[2], 16)
    numbers: dict[str, object] = {
        "rrn": f"{number % 10**12:012}",
        "stan": f"{number % 10**6:06}",
    }
    if kind in ("authorize", "verify", "increment"):
        numbers |= {
            "auth_code": f"A{number % 10**5:05}",
            "network_transaction_id": f"NTX{number:012X}",
        }
    if kind in ("authorize", "increment"):
        numbers["expires_at"] = now + AUTHORIZATION_LIFE_S
    if kind in ("capture", "refund"):
        numbers["arn"] = f"7{number:022}"
    return numbers
