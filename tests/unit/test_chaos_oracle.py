"""The oracle of the fault campaign: good histories pass, and each rule rejects bad ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

from gateway.domain.model import OperationKind as K
from gateway.domain.model import OperationOrigin, PaymentState
from gateway.domain.model import OperationState as S
from tests.chaos.history import (
    AMOUNTS,
    OK,
    OPEN,
    Answer,
    Call,
    Decision,
    Disputed,
    History,
    Look,
)
from tests.chaos.oracle import Rule, judge, unresolved

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SENDS: Final = {K.AUTHORIZE: "authorization"}


class Book:
    """A history that is written step by step, as a system that keeps every rule would leave it."""

    def __init__(self, profile: str = "non_idempotent") -> None:
        self.history = History(profile)
        self.order = 0
        self.transactions = 0
        self._where: dict[str, Any] = {}

    def tell(self, key: str, state: S, **fields: Any) -> None:
        """One more answer to a call, a replay but for the first."""
        call = next(each for each in self.history.calls if each.key == key)
        row = self.row(key)
        told = [each for each in self.history.answers if each.key == key]
        self.order += 2
        answer = Answer(
            key,
            self.order - 1,
            self.order,
            OK,
            operation_id=row["operation_id"],
            payment_id=row["payment_id"],
            kind=call.kind,
            state=state,
            amount_minor=row["amount_minor"],
            currency=row["currency"],
            replayed=bool(told),
            digest=row["digest"] or f"{key} {state.name}",
        )
        self.history.answers.append(replace(answer, **fields))

    def fail(self, key: str, status: str, reason: str = "") -> None:
        """A try without an answer, or refused."""
        self.order += 2
        self.history.answers.append(Answer(key, self.order - 1, self.order, status, reason))

    def row(self, key: str) -> dict[str, Any]:
        return next(each for each in self.history.operations if each["idempotency_key"] == key)

    def payment(self, payment_id: str = "pay_1") -> dict[str, Any]:
        return next(each for each in self.history.payments if each["payment_id"] == payment_id)

    def begin(
        self,
        key: str,
        kind: K,
        amount_minor: int,
        payment_id: str = "pay_1",
        origin: OperationOrigin = OperationOrigin.CLIENT,
    ) -> None:
        """A call and its intent; one of the gateway's own begins with another's outcome."""
        named, parent = "", None
        if kind is not K.AUTHORIZE:
            named = payment_id
            on = K.CAPTURE if kind is K.REFUND else K.AUTHORIZE
            parent = next(
                each["operation_id"]
                for each in self.history.operations
                if (each["payment_id"], each["kind"]) == (payment_id, on)
            )
            if origin is OperationOrigin.CLIENT:
                self.payment(payment_id)["version"] += 1
        self.history.calls.append(Call(key, kind, named, amount_minor))
        self.history.operations.append(
            {
                "operation_id": f"op_{key}",
                "payment_id": payment_id,
                "idempotency_key": key,
                "kind": kind,
                "origin": origin,
                "state": S.PROCESSING,
                "amount_minor": amount_minor,
                "currency": "EUR",
                "epoch": 1,
                "attempt_number": 1,
                "parent_operation_id": parent,
                "digest": "",
            }
        )
        if kind is K.AUTHORIZE:
            amounts = ("authorized", "capture_pending", "captured", "refund_pending", "refunded")
            self.history.payments.append(
                {
                    "payment_id": payment_id,
                    "version": 1,
                    "state": PaymentState.PROCESSING,
                    "currency": "EUR",
                    "requested_minor": amount_minor,
                    **{f"{name}_minor": 0 for name in (*amounts, "voided", "increment_pending")},
                    "cancel_requested": False,
                }
            )

    def send(self, key: str, number: int = 1) -> None:
        """The PSP receives an attempt."""
        row = self.row(key)
        self.history.psp.append(
            {
                "type": "received",
                "method": "send",
                "kind": K(row["kind"]).name.lower(),
                "reference": f"{row['operation_id']}-{number}",
                "payment_id": row["payment_id"],
                "amount_minor": row["amount_minor"],
                "currency": "EUR",
            }
            | self._where
        )

    def take_effect(self, key: str, number: int = 1, effect: str = "") -> None:
        """The PSP does what an attempt asks for."""
        row = self.row(key)
        self.transactions += 1
        kind = K(row["kind"])
        transaction_id = f"tx_{self.transactions}"
        opening = kind is K.AUTHORIZE
        authorizations = [
            each["authorization_id"]
            for each in self.history.psp
            if each["type"] == "effect" and each["payment_id"] == row["payment_id"]
        ]
        self.history.psp.append(
            {
                "type": "effect",
                "method": "send",
                "effect": effect or SENDS.get(kind, kind.name.lower()),
                "transaction_id": transaction_id,
                "authorization_id": transaction_id if opening else authorizations[0],
                "amount_minor": row["amount_minor"],
                "released_minor": 0,
                "reference": f"{row['operation_id']}-{number}",
                "payment_id": row["payment_id"],
                "account": "account",
                "currency": "EUR",
                "token": "tok_visa",
            }
            | self._where
        )

    def at(self, t: float, account: str) -> Book:
        """What follows happens then, at the PSP of this account."""
        self._where = {"t": t, "account": account}
        return self

    def decide(self, key: str, result: str, number: int = 1, **more: Any) -> None:
        """The PSP decides on an attempt, without an effect."""
        row = self.row(key)
        record = {
            "type": "outcome",
            "method": more.pop("method", "send"),
            "kind": K(row["kind"]).name.lower(),
            "reference": f"{row['operation_id']}-{number}",
            "effect": "",
            "answer": {"result": result, **more},
        }
        self.history.psp.append(record | self._where)

    def ask_to_cancel(self, key: str, number: int = 1) -> None:
        """The PSP receives a cancellation."""
        row = self.row(key)
        record = {
            "type": "received",
            "method": "cancel",
            "kind": K(row["kind"]).name.lower(),
            "reference": f"{row['operation_id']}-{number}",
        }
        self.history.psp.append(record | self._where)

    def look(self, key: str) -> None:
        """A client asks for the operation."""
        row = self.row(key)
        payment = self.payment(row["payment_id"])
        self.order += 2
        self.history.looks.append(
            Look(
                row["operation_id"],
                self.order - 1,
                self.order,
                row["state"],
                payment["state"],
                payment["version"],
            )
        )

    def cancel(self, number: int) -> None:
        """The PSP takes back an effect that it made."""
        effect = [each for each in self.history.psp if each["type"] == "effect"][number]
        names = ("effect", "transaction_id", "authorization_id", "amount_minor", "released_minor")
        self.history.psp.append(
            {
                "type": "effect",
                "method": "cancel",
                "effect": "cancel",
                "kind": "authorize",
                "reference": effect["reference"],
                "answer": {"result": "canceled", "had": "effect"},
                "takes_back": [{name: effect[name] for name in names}],
                "payment_id": effect["payment_id"],
                "authorization_id": effect["authorization_id"],
            }
        )

    def try_again(self, key: str) -> None:
        """The next attempt, with its event."""
        row = self.row(key)
        row["epoch"] += 1
        row["attempt_number"] += 1
        self.end(key, S.PROCESSING, PaymentState.PROCESSING)

    def end(self, key: str, state: S, payment_state: PaymentState, **amounts: int) -> None:
        """The outcome, with its event."""
        row = self.row(key)
        payment = self.payment(row["payment_id"])
        row["state"] = state
        if state not in OPEN:
            row["digest"] = f"{key} {state.name}"
        payment["state"] = payment_state
        payment["version"] += 1
        for name, amount_minor in amounts.items():
            payment[f"{name}_minor"] = amount_minor
        self.history.events.append(
            {
                "payment_id": row["payment_id"],
                "payment_version": payment["version"],
                "seq": 0,
                "payment_state": payment_state,
                "operation_id": row["operation_id"],
                "operation_state": state,
                "operation_minor": row["amount_minor"],
                "amounts": {name: payment[name] for name in AMOUNTS},
            }
        )

    def succeed(self, key: str, payment_state: PaymentState, **amounts: int) -> None:
        """Sent, done, recorded, told."""
        self.send(key)
        self.take_effect(key)
        self.end(key, S.SUCCEEDED, payment_state, **amounts)
        self.tell(key, S.SUCCEEDED)


def good() -> Book:
    """A payment captured and refunded in part, one declined, one that was restarted, a refusal."""
    book = Book()
    book.begin("a", K.AUTHORIZE, 1000)
    book.fail("a", "UNAVAILABLE")
    book.succeed("a", PaymentState.AUTHORIZED, authorized=1000)
    book.begin("c", K.CAPTURE, 600)
    book.succeed("c", PaymentState.PARTIALLY_CAPTURED, captured=600)
    book.tell("c", S.SUCCEEDED)
    book.begin("r", K.REFUND, 200)
    book.succeed("r", PaymentState.PARTIALLY_REFUNDED, refunded=200)
    book.history.calls.append(Call("v", K.INCREMENT, "pay_1", 250))
    book.fail("v", "FAILED_PRECONDITION", "INCREMENT_NOT_ALLOWED")

    book.begin("d", K.AUTHORIZE, 700, "pay_2")
    book.send("d")
    book.decide("d", "declined")
    book.end("d", S.DECLINED, PaymentState.DECLINED)
    book.tell("d", S.DECLINED)

    book.begin("n", K.AUTHORIZE, 500, "pay_3")
    book.send("n")
    book.take_effect("n")
    book.end("n", S.IN_DOUBT, PaymentState.IN_DOUBT)
    book.tell("n", S.IN_DOUBT)
    book.cancel(3)
    book.end("n", S.NOT_SENT, PaymentState.NOT_SENT)
    book.try_again("n")
    book.send("n", 2)
    book.take_effect("n", 2)
    book.end("n", S.SUCCEEDED, PaymentState.AUTHORIZED, authorized=500)
    book.tell("n", S.SUCCEEDED)
    return book


def in_doubt_for_ever() -> Book:
    """A PSP that can neither be asked nor told to cancel."""
    book = Book("no_query")
    book.begin("a", K.AUTHORIZE, 1000)
    book.send("a")
    book.take_effect("a")
    book.end("a", S.IN_DOUBT, PaymentState.IN_DOUBT)
    book.tell("a", S.IN_DOUBT)
    return book


def automatic() -> Book:
    """The PSP charges at once; the gateway records a capture of its own."""
    book = Book("idempotent")
    book.begin("a", K.AUTHORIZE, 1000)
    book.send("a")
    book.send("a")
    book.take_effect("a", effect="charge")
    book.end("a", S.SUCCEEDED, PaymentState.CAPTURED, authorized=1000, captured=1000)
    book.tell("a", S.SUCCEEDED)
    capture = {
        **book.row("a"),
        "operation_id": "op_capture",
        "idempotency_key": None,
        "kind": K.CAPTURE,
        "origin": OperationOrigin.GATEWAY,
        "parent_operation_id": "op_a",
    }
    book.history.operations.append(capture)
    book.history.events.append(
        {**book.history.events[-1], "seq": 1, "operation_id": "op_capture"},
    )
    return book


def voided() -> Book:
    """A void releases what was held."""
    book = Book()
    book.begin("a", K.AUTHORIZE, 1000)
    book.succeed("a", PaymentState.AUTHORIZED, authorized=1000)
    book.begin("i", K.INCREMENT, 250)
    book.succeed("i", PaymentState.AUTHORIZED, authorized=1250)
    book.begin("v", K.VOID, 1250)
    book.send("v")  # a void that is repeated does no harm
    book.succeed("v", PaymentState.VOIDED, voided=1250)
    return book


def sent_on() -> Book:
    """A customer who paid in time, one who never came, and a cascade before each."""
    book = Book("idempotent")
    book.history.profiles = {"one": "idempotent", "two": "non_idempotent"}
    book.history.discrepancies = []
    for key, payment_id in (("p", "pay_1"), ("x", "pay_2")):
        book.begin(key, K.AUTHORIZE, 1000, payment_id)
        book.row(key)["connector_account_id"] = "two"
        book.at(1.0, "one").send(key)
        book.decide(key, "declined")
        book.try_again(key)
        book.at(2.0, "two").send(key, 2)
        book.decide(key, "requires_action", 2, next_action_expires_at=10.0)
        book.end(key, S.REQUIRES_ACTION, PaymentState.REQUIRES_ACTION)
        book.tell(key, S.REQUIRES_ACTION)
        book.look(key)
    book.at(5.0, "two").take_effect("p", 2)
    book.end("p", S.SUCCEEDED, PaymentState.AUTHORIZED, authorized=1000)
    book.row("p")["digest"] = "p REQUIRES_ACTION"
    book.look("p")
    book.at(10.5, "two").ask_to_cancel("x", 2)
    book.decide("x", "canceled", 2, method="cancel", had="effect")
    book.end("x", S.EXPIRED, PaymentState.EXPIRED)
    book.row("x")["digest"] = "x REQUIRES_ACTION"
    book.look("x")
    return book


def release_in_doubt(
    profile: str, kind: K = K.VOID, origin: OperationOrigin = OperationOrigin.GATEWAY
) -> Book:
    """The gateway's own void of what a cancelled capture gave back, whose answer was lost."""
    book = Book(profile)
    book.begin("a", K.AUTHORIZE, 1000)
    book.succeed("a", PaymentState.AUTHORIZED, authorized=1000)
    book.begin("v", kind, 400, origin=origin)
    book.send("v")
    book.end("v", S.IN_DOUBT, PaymentState.AUTHORIZED)
    if origin is OperationOrigin.GATEWAY:
        book.row("v")["idempotency_key"] = None
        book.history.calls.pop()
    return book


def test_only_a_release_that_the_psp_cannot_tell_of_may_stay_in_doubt() -> None:
    assert judge(release_in_doubt("cancel_only").history) == []
    for other in (
        release_in_doubt("idempotent"),
        release_in_doubt("non_idempotent"),
        release_in_doubt("cancel_only", K.REVERSAL),
    ):
        assert [each.rule for each in judge(other.history)] == [Rule.NOTHING_UNFINISHED]
    client = release_in_doubt("cancel_only", origin=OperationOrigin.CLIENT)
    client.tell("v", S.IN_DOUBT)
    assert [each.rule for each in judge(client.history)] == [Rule.NOTHING_UNFINISHED]


@pytest.mark.parametrize("make", [Book, good, in_doubt_for_ever, automatic, voided, sent_on])
def test_a_history_that_keeps_the_rules_is_accepted(make: Callable[[], Book]) -> None:
    assert judge(make().history) == []


def test_doubts_that_the_psp_cannot_end_are_listed() -> None:
    history = in_doubt_for_ever().history
    assert [row["operation_id"] for row in unresolved(history)] == ["op_a"]


def _answer(book: Book, key: str, number: int = -1, **fields: Any) -> None:
    """Change one of the answers to a call."""
    at = [i for i, each in enumerate(book.history.answers) if each.key == key][number]
    book.history.answers[at] = replace(book.history.answers[at], **fields)


def _forget(book: Book, key: str) -> None:
    book.history.operations.remove(book.row(key))


def _effect(book: Book, number: int) -> dict[str, Any]:
    return [each for each in book.history.psp if each["type"] == "effect"][number]


def _lose_the_row(book: Book) -> None:
    _forget(book, "c")


def _lose_the_payment(book: Book) -> None:
    book.history.payments.remove(book.payment())


def _store_another_answer(book: Book) -> None:
    book.row("d")["digest"] = "another"


def _lose_the_answer(book: Book) -> None:
    book.row("d")["digest"] = ""


def _tell_another_amount(book: Book) -> None:
    _answer(book, "c", 0, amount_minor=601)


def _record_another_amount(book: Book) -> None:
    book.row("d")["amount_minor"] = 701


def _tell_of_another_operation(book: Book) -> None:
    _answer(book, "r", operation_id="op_c")


def _tell_of_another_payment(book: Book) -> None:
    _answer(book, "d", payment_id="pay_1")


def _serve_the_wrong_call(book: Book) -> None:
    book.history.calls[1] = replace(book.history.calls[1], amount_minor=599)


def _forget_a_success(book: Book) -> None:
    book.row("a")["state"] = S.DECLINED


def _revive_a_decline(book: Book) -> None:
    _answer(book, "d", state=S.SUCCEEDED)


def _doubt_after_success(book: Book) -> None:
    book.tell("a", S.IN_DOUBT)


def _jump_in_the_events(book: Book) -> None:
    event = next(each for each in book.history.events if each["operation_id"] == "op_d")
    book.history.events.append({**event, "payment_version": 3, "operation_state": S.SUCCEEDED})
    book.payment("pay_2")["version"] = 3


def _jump_of_a_payment(book: Book) -> None:
    event = next(each for each in book.history.events if each["operation_id"] == "op_d")
    event["payment_state"] = PaymentState.AUTHORIZED


def _lose_the_last_event(book: Book) -> None:
    book.history.events = [e for e in book.history.events if e["operation_id"] != "op_r"]


def _change_without_event(book: Book) -> None:
    book.payment()["version"] += 1


def _answer_otherwise(book: Book) -> None:
    _answer(book, "c", digest="another")


def _execute_twice(book: Book) -> None:
    _answer(book, "c", replayed=False)


def _refuse_a_repeat(book: Book) -> None:
    book.fail("c", "FAILED_PRECONDITION", "PAYMENT_CLOSED_FOR_CAPTURE")


def _thaw_an_answer(book: Book) -> None:
    book.tell("d", S.PROCESSING)


def _answer_another_payload(book: Book) -> None:
    book.history.misuses.append(next(each for each in book.history.answers if each.ok))


def _do_what_was_refused(book: Book) -> None:
    book.history.answers = [each for each in book.history.answers if each.key != "d"]
    book.fail("d", "FAILED_PRECONDITION", "PAYMENT_NOT_AUTHORIZED")


def _lose_what_it_is_about(book: Book) -> None:
    _answer(book, "v", status="NOT_FOUND", reason="PAYMENT_NOT_FOUND")


def _never_answer(book: Book) -> None:
    _answer(book, "v", status="DEADLINE_EXCEEDED", reason="")


def _keep_processing(book: Book) -> None:
    book.history.answers = [each for each in book.history.answers if each.key != "d"]
    book.tell("d", S.PROCESSING)


def _fail_inside(book: Book) -> None:
    _answer(book, "a", 0, status="INTERNAL", reason="INTERNAL")


def _fail_a_call(book: Book) -> None:
    book.history.calls_may_fail = False
    book.history.failed.append("a")


def _break_off(book: Book) -> None:
    book.history.broken = "no answers"


def _charge_twice(book: Book) -> None:
    book.take_effect("a")


def _charge_a_second_attempt(book: Book) -> None:
    book.take_effect("n", 1)


def _capture_twice(book: Book) -> None:
    # So that the sums are right, and the operation is not.
    book.take_effect("c")
    _effect(book, -1)["amount_minor"] = 0


def _lose_the_charge(book: Book) -> None:
    book.history.psp.remove(_effect(book, 4))


def _charge_more(book: Book) -> None:
    _effect(book, 0)["amount_minor"] = 1001


def _succeed_without_effect(book: Book) -> None:
    _effect(book, 1)["reference"] = "op_a-1"


def _take_back_a_success(book: Book) -> None:
    book.cancel(1)


def _charge_a_decline(book: Book) -> None:
    book.take_effect("d")


def _charge_the_unknown(book: Book) -> None:
    book.history.psp.append(
        _effect(book, 0)
        | {
            "payment_id": "pay_9",
            "reference": "op_9-1",
            "transaction_id": "tx_9",
            "authorization_id": "tx_9",
        }
    )


def _leave_a_cancelled_one(book: Book) -> None:
    book.history.psp = [each for each in book.history.psp if "takes_back" not in each]


def _send_without_intent(book: Book) -> None:
    _forget(book, "d")
    book.history.answers = [each for each in book.history.answers if each.key != "d"]


def _send_an_unknown_attempt(book: Book) -> None:
    book.row("n")["attempt_number"] = 1


def _send_for_another_payment(book: Book) -> None:
    book.history.psp[0]["payment_id"] = "pay_2"


def _send_twice(book: Book) -> None:
    book.send("c")


def _send_another_amount(book: Book) -> None:
    next(each for each in book.history.psp if each["reference"] == "op_d-1")["amount_minor"] = 7


def _restart_too_early(book: Book) -> None:
    cancel = next(each for each in book.history.psp if "takes_back" in each)
    book.history.psp.remove(cancel)
    book.history.psp.append(cancel)


def _capture_more_than_authorized(book: Book) -> None:
    book.payment()["captured_minor"] = 1001


def _keep_a_reservation(book: Book) -> None:
    book.payment()["refund_pending_minor"] = 100


def _refund_more_than_captured(book: Book) -> None:
    book.payment()["refunded_minor"] = 700


def _shift_between_payments(book: Book) -> None:
    book.payment()["authorized_minor"] -= 100
    book.payment("pay_3")["authorized_minor"] += 200


def _stay_in_doubt(book: Book) -> None:
    book.row("d")["state"] = S.IN_DOUBT


def _charge_in_another_currency(book: Book) -> None:
    _effect(book, 0)["currency"] = "USD"


def _tell_another_currency(book: Book) -> None:
    _answer(book, "c", 0, currency="USD")


def _record_another_currency(book: Book) -> None:
    book.payment("pay_2")["currency"] = "USD"


def _request_more(book: Book) -> None:
    book.payment("pay_2")["requested_minor"] = 701


def _capture_on_another_authorization(book: Book) -> None:
    capture = _effect(book, 1)
    book.history.psp.remove(capture)
    book.history.psp.append(capture)
    capture["authorization_id"] = _effect(book, -2)["transaction_id"]


def _swap_two_authorizations(book: Book) -> None:
    _effect(book, 0)["reference"] = "op_n-2"
    _effect(book, -1)["reference"] = "op_a-1"


def _tell_another_amount_in_an_event(book: Book) -> None:
    book.history.events[1]["operation_minor"] += 1


def _tell_another_sum_in_the_last_event(book: Book) -> None:
    event = next(each for each in book.history.events if each["operation_id"] == "op_r")
    event["amounts"] = event["amounts"] | {"refunded_minor": 199}


def _number_two_events_alike(book: Book) -> None:
    book.history.events.append(dict(book.history.events[0]))


def _tell_events_in_another_order(book: Book) -> None:
    first, second = book.history.events[0], book.history.events[2]
    versions = first["payment_version"], second["payment_version"]
    second["payment_version"], first["payment_version"] = versions


def _have_two_operations_of_a_key(book: Book) -> None:
    book.history.operations.append(book.row("d") | {"operation_id": "op_other"})


def _have_an_operation_that_nobody_asked_for(book: Book) -> None:
    book.history.operations.append(
        book.row("d") | {"operation_id": "op_other", "idempotency_key": "other"}
    )


def _have_an_operation_twice(book: Book) -> None:
    book.history.operations.append(dict(book.row("d")))


def _do_a_clients_work_unasked(book: Book) -> None:
    book.row("d")["origin"] = OperationOrigin.GATEWAY


def _restart_beside_an_open_one(book: Book) -> None:
    """Nothing stands of the first attempt, but the PSP had not decided on it."""
    book.history.psp = [each for each in book.history.psp if each.get("reference") != "op_n-1"]
    book.send("n")
    [last] = [each for each in book.history.psp if each.get("reference") == "op_n-1"]
    book.history.psp.remove(last)
    number = next(i for i, each in enumerate(book.history.psp) if each.get("reference") == "op_n-2")
    book.history.psp.insert(number, last)


def _take_effect_after_the_next_attempt(book: Book) -> None:
    book.take_effect("n", 1)
    book.cancel(-1)


def _void_nothing(book: Book) -> None:
    book.begin("w", K.VOID, 500, "pay_3")
    book.send("w")
    book.end("w", S.SUCCEEDED, PaymentState.AUTHORIZED)
    book.tell("w", S.SUCCEEDED)


def _tell_of_too_much_on_the_way(book: Book) -> None:
    book.history.events[0]["amounts"] = book.history.events[0]["amounts"] | {"captured_minor": 5000}


def _tell_of_an_operation_that_is_not_there(book: Book) -> None:
    book.history.events.append(book.history.events[0] | {"operation_id": "op_9", "seq": 1})


def _tell_of_a_payment_that_is_not_there(book: Book) -> None:
    book.history.events.append(
        book.history.events[0] | {"payment_id": "pay_9", "operation_id": "op_9"}
    )


def _record_what_no_event_told(book: Book) -> None:
    book.payment("pay_2")["state"] = PaymentState.FAILED


def _call_it_captured_in_part(book: Book) -> None:
    """Row and event agree, and the amounts say that nothing is captured."""
    book.payment("pay_3")["state"] = PaymentState.PARTIALLY_CAPTURED
    event = next(each for each in reversed(book.history.events) if each["payment_id"] == "pay_3")
    event["payment_state"] = PaymentState.PARTIALLY_CAPTURED


def _lose_an_event_on_the_way(book: Book) -> None:
    """The states before and after it follow each other all the same."""
    doubt = next(e for e in book.history.events if e["operation_state"] == S.IN_DOUBT)
    book.history.events.remove(doubt)


def _decline_what_no_psp_declined(book: Book) -> None:
    book.history.psp = [each for each in book.history.psp if each["reference"] != "op_d-1"]


def _try_again_in_the_same_epoch(book: Book) -> None:
    book.row("n")["epoch"] = 1


def _succeed_by_another_attempt(book: Book) -> None:
    for each in book.history.psp:
        if each["reference"] == "op_a-1":
            each["reference"] = "op_a-2"
    book.row("a").update(attempt_number=3, epoch=3)


def _do_what_nobody_sent(book: Book) -> None:
    sent = next(each for each in book.history.psp if each["reference"] == "op_c-1")
    book.history.psp.remove(sent)


def _capture_before_it_is_authorized(book: Book) -> None:
    sent = next(each for each in book.history.psp if each["reference"] == "op_c-1")
    book.history.psp.remove(sent)
    book.history.psp.insert(0, sent)


def _capture_what_was_declined(book: Book) -> None:
    book.begin("x", K.CAPTURE, 700, "pay_2")
    book.send("x")
    book.decide("x", "declined")
    book.end("x", S.DECLINED, PaymentState.DECLINED)
    book.tell("x", S.DECLINED)


def _refuse_without_a_reason(book: Book) -> None:
    book.history.answers.insert(0, Answer("a", 0, 0, "PERMISSION_DENIED"))


def _capture_of_another_payment(book: Book) -> None:
    book.row("c")["parent_operation_id"] = "op_d"


def _refund_a_refund(book: Book) -> None:
    book.row("r")["parent_operation_id"] = "op_r"


def _look_at_an_older_version_by_another_operation(book: Book) -> None:
    book.look("c")
    book.look("a")
    book.history.looks[1] = replace(
        book.history.looks[1], version=2, payment_state=PaymentState.AUTHORIZED
    )


def _look_at_what_no_event_told(book: Book) -> None:
    book.look("a")
    book.history.looks[0] = replace(book.history.looks[0], payment_state=PaymentState.AUTHORIZED)


def _authorize_less_than_was_asked_for(book: Book) -> None:
    book.row("n")["approved_minor"] = 250


def _dispute(book: Book, state: S, *shown: str) -> None:
    """A dispute that was opened, lost, and won in appeal."""
    book.history.disputes.append(Disputed("dp_1", "op_n-2", 500, ["OPENED", "LOST", "WON"]))
    row = book.row("n") | {
        "operation_id": "op_dispute",
        "idempotency_key": None,
        "kind": K.DISPUTE,
        "origin": OperationOrigin.PSP,
        "parent_operation_id": "op_n",
        "connector_transaction_id": "dp_1",
        "state": state,
    }
    book.history.operations.append(row)
    told = book.history.events[-1]
    book.history.events.append(
        told | {"seq": 1, "operation_id": "op_dispute", "operation_state": state}
    )
    book.history.discrepancies = [
        {"operation_id": "op_dispute", "kind": kind} for kind in ("dispute", *shown)
    ]


def _lose_a_dispute(book: Book) -> None:
    book.history.disputes.append(Disputed("dp_1", "op_n-2", 500, ["OPENED"]))


def _leave_a_dispute_open(book: Book) -> None:
    _dispute(book, S.PENDING, "dispute_outcome")


def _drop_an_appeal(book: Book) -> None:
    _dispute(book, S.SUCCEEDED)


def _decide(book: Book, said: str, recorded: str, state: S, told: str = "") -> None:
    """A person's decision on the first attempt of what was restarted."""
    book.history.decisions.append(Decision("op_n", 1, said, None, told))
    book.history.resolutions.append(
        {
            "operation_id": "op_n",
            "attempt_number": 1,
            "outcome": recorded,
            "amount_minor": None,
            "state": state,
        }
    )


def _record_another_decision(book: Book) -> None:
    _decide(book, "CANCELED", "NO_EFFECT", S.NOT_SENT)


def _make_something_else_of_a_decision(book: Book) -> None:
    _decide(book, "NO_EFFECT", "NO_EFFECT", S.SUCCEEDED)


def _decide_and_tell_nobody(book: Book) -> None:
    _decide(book, "NO_EFFECT", "NO_EFFECT", S.CANCELED)


def _refuse_a_decision(book: Book) -> None:
    _decide(book, "NO_EFFECT", "NO_EFFECT", S.NOT_SENT, "OUTCOME_NOT_ALLOWED")


def _divide_less_than_a_refund(book: Book) -> None:
    book.row("r")["allocations"] = [["op_c", 100]]


def _give_back_more_than_a_capture_took(book: Book) -> None:
    book.row("c")["amount_minor"] = 100
    book.row("r")["allocations"] = [["op_c", 200]]


def _give_another_capture_back(book: Book) -> None:
    [call] = [each for each in book.history.calls if each.key == "r"]
    named = replace(call, capture_operation_id="op_other")
    book.history.calls[book.history.calls.index(call)] = named
    book.row("r")["allocations"] = [["op_c", 200]]


BAD: Final[dict[Callable[[Book], None], Rule]] = {
    _divide_less_than_a_refund: Rule.AMOUNTS_ADD_UP,
    _give_back_more_than_a_capture_took: Rule.AMOUNTS_ADD_UP,
    _give_another_capture_back: Rule.AMOUNTS_ADD_UP,
    _authorize_less_than_was_asked_for: Rule.PARTIAL_WHERE_ALLOWED,
    _lose_a_dispute: Rule.DISPUTE_IS_RECORDED,
    _leave_a_dispute_open: Rule.DISPUTE_IS_RECORDED,
    _drop_an_appeal: Rule.DISPUTE_IS_RECORDED,
    _record_another_decision: Rule.DECISION_HOLDS,
    _make_something_else_of_a_decision: Rule.DECISION_HOLDS,
    _decide_and_tell_nobody: Rule.DECISION_HOLDS,
    _refuse_a_decision: Rule.DECISION_HOLDS,
    _lose_the_row: Rule.ACKNOWLEDGED_IS_DURABLE,
    _lose_the_payment: Rule.ACKNOWLEDGED_IS_DURABLE,
    _store_another_answer: Rule.ACKNOWLEDGED_IS_DURABLE,
    _lose_the_answer: Rule.ACKNOWLEDGED_IS_DURABLE,
    _tell_another_amount: Rule.ACKNOWLEDGED_IS_DURABLE,
    _record_another_amount: Rule.ACKNOWLEDGED_IS_DURABLE,
    _tell_of_another_operation: Rule.ACKNOWLEDGED_IS_DURABLE,
    _tell_of_another_payment: Rule.ACKNOWLEDGED_IS_DURABLE,
    _serve_the_wrong_call: Rule.ACKNOWLEDGED_IS_DURABLE,
    _forget_a_success: Rule.STATE_IS_REACHABLE,
    _revive_a_decline: Rule.STATE_IS_REACHABLE,
    _doubt_after_success: Rule.STATE_IS_REACHABLE,
    _jump_in_the_events: Rule.STATE_IS_REACHABLE,
    _jump_of_a_payment: Rule.STATE_IS_REACHABLE,
    _lose_the_last_event: Rule.STATE_IS_REACHABLE,
    _change_without_event: Rule.STATE_IS_REACHABLE,
    _answer_otherwise: Rule.REPLAY_EQUALS_FIRST,
    _execute_twice: Rule.REPLAY_EQUALS_FIRST,
    _refuse_a_repeat: Rule.REPLAY_EQUALS_FIRST,
    _thaw_an_answer: Rule.REPLAY_EQUALS_FIRST,
    _answer_another_payload: Rule.KEY_IS_ITS_PAYLOAD,
    _do_what_was_refused: Rule.REFUSED_HAS_NO_EFFECT,
    _lose_what_it_is_about: Rule.REFUSED_HAS_NO_EFFECT,
    _never_answer: Rule.EVERY_CALL_IS_ANSWERED,
    _keep_processing: Rule.EVERY_CALL_IS_ANSWERED,
    _fail_inside: Rule.EVERY_CALL_IS_ANSWERED,
    _fail_a_call: Rule.NO_CALL_FAILS,
    _break_off: Rule.SERVICE_GOES_ON,
    _charge_twice: Rule.AT_MOST_ONE_CHARGE,
    _charge_a_second_attempt: Rule.AT_MOST_ONE_CHARGE,
    _capture_twice: Rule.AT_MOST_ONE_CHARGE,
    _lose_the_charge: Rule.SUCCESS_IS_CHARGED,
    _charge_more: Rule.SUCCESS_IS_CHARGED,
    _succeed_without_effect: Rule.SUCCESS_IS_CHARGED,
    _take_back_a_success: Rule.SUCCESS_IS_CHARGED,
    _charge_a_decline: Rule.CHARGE_IS_A_SUCCESS,
    _charge_the_unknown: Rule.CHARGE_IS_A_SUCCESS,
    _send_without_intent: Rule.INTENT_BEFORE_SEND,
    _send_an_unknown_attempt: Rule.INTENT_BEFORE_SEND,
    _send_for_another_payment: Rule.INTENT_BEFORE_SEND,
    _send_twice: Rule.SENT_ONCE,
    _send_another_amount: Rule.SENT_ONCE,
    _restart_too_early: Rule.RESTART_ONLY_WITHOUT_EFFECT,
    _leave_a_cancelled_one: Rule.RESTART_ONLY_WITHOUT_EFFECT,
    _capture_more_than_authorized: Rule.AMOUNTS_ADD_UP,
    _keep_a_reservation: Rule.AMOUNTS_ADD_UP,
    _refund_more_than_captured: Rule.AMOUNTS_ADD_UP,
    _shift_between_payments: Rule.TOTALS_ADD_UP,
    _stay_in_doubt: Rule.NOTHING_UNFINISHED,
    _charge_in_another_currency: Rule.SUCCESS_IS_CHARGED,
    _tell_another_currency: Rule.ACKNOWLEDGED_IS_DURABLE,
    _record_another_currency: Rule.AMOUNTS_ADD_UP,
    _request_more: Rule.AMOUNTS_ADD_UP,
    _capture_on_another_authorization: Rule.SUCCESS_IS_CHARGED,
    _swap_two_authorizations: Rule.SUCCESS_IS_CHARGED,
    _tell_another_amount_in_an_event: Rule.AMOUNTS_ADD_UP,
    _tell_another_sum_in_the_last_event: Rule.AMOUNTS_ADD_UP,
    _number_two_events_alike: Rule.STATE_IS_REACHABLE,
    _tell_events_in_another_order: Rule.AMOUNTS_ADD_UP,
    _have_two_operations_of_a_key: Rule.ONE_OPERATION_A_CALL,
    _have_an_operation_that_nobody_asked_for: Rule.ONE_OPERATION_A_CALL,
    _have_an_operation_twice: Rule.ONE_OPERATION_A_CALL,
    _do_a_clients_work_unasked: Rule.ONE_OPERATION_A_CALL,
    _restart_beside_an_open_one: Rule.RESTART_ONLY_WITHOUT_EFFECT,
    _take_effect_after_the_next_attempt: Rule.RESTART_ONLY_WITHOUT_EFFECT,
    _void_nothing: Rule.SUCCESS_IS_CHARGED,
    _tell_of_too_much_on_the_way: Rule.AMOUNTS_ADD_UP,
    _tell_of_an_operation_that_is_not_there: Rule.STATE_IS_REACHABLE,
    _tell_of_a_payment_that_is_not_there: Rule.STATE_IS_REACHABLE,
    _record_what_no_event_told: Rule.STATE_IS_REACHABLE,
    _call_it_captured_in_part: Rule.AMOUNTS_ADD_UP,
    _lose_an_event_on_the_way: Rule.STATE_IS_REACHABLE,
    _decline_what_no_psp_declined: Rule.STATE_IS_REACHABLE,
    _try_again_in_the_same_epoch: Rule.STATE_IS_REACHABLE,
    _succeed_by_another_attempt: Rule.SUCCESS_IS_CHARGED,
    _do_what_nobody_sent: Rule.INTENT_BEFORE_SEND,
    _capture_before_it_is_authorized: Rule.ACTS_ON_WHAT_IS_THERE,
    _capture_what_was_declined: Rule.ACTS_ON_WHAT_IS_THERE,
    _refuse_without_a_reason: Rule.REFUSED_HAS_NO_EFFECT,
    _capture_of_another_payment: Rule.AMOUNTS_ADD_UP,
    _refund_a_refund: Rule.AMOUNTS_ADD_UP,
    _look_at_an_older_version_by_another_operation: Rule.STATE_IS_REACHABLE,
    _look_at_what_no_event_told: Rule.STATE_IS_REACHABLE,
}


def _send_to_another_account(book: Book) -> None:
    book.row("p")["connector_account_id"] = "one"


def _send_to_two_accounts(book: Book) -> None:
    book.row("p").pop("connector_account_id")
    book.at(2.5, "one").send("p", 2)


def _capture_at_another_account(book: Book) -> None:
    book.begin("c", K.CAPTURE, 1000)
    book.row("c")["connector_account_id"] = "one"


def _cascade_after_an_approval(book: Book) -> None:
    record = next(each for each in book.history.psp if each["type"] == "outcome")
    record["answer"]["result"] = "approved"


def _charge_at_both(book: Book) -> None:
    book.at(9.0, "one").take_effect("p", 1)


def _cancel_too_early(book: Book) -> None:
    record = next(each for each in book.history.psp if each["method"] == "cancel")
    record["t"] = 9.9


def _expire_by_ourselves(book: Book) -> None:
    book.history.psp = [each for each in book.history.psp if each["method"] != "cancel"]


def _charge_what_has_expired(book: Book) -> None:
    book.history.psp = [each for each in book.history.psp if each["method"] != "cancel"]
    book.at(9.0, "two").take_effect("x", 2)


def _expire_what_was_paid(book: Book) -> None:
    book.row("p")["state"] = S.EXPIRED


def _look_back(book: Book) -> None:
    looks = book.history.looks
    looks[2] = replace(looks[2], state=S.DECLINED)


def _look_at_an_older_version(book: Book) -> None:
    looks = book.history.looks
    looks[2] = replace(looks[2], version=1)


def _look_at_what_was_lost(book: Book) -> None:
    looks = book.history.looks
    looks[2] = replace(looks[2], operation_id="op_9")


def _take_our_own_for_anothers(book: Book) -> None:
    row = book.row("p") | {"operation_id": "op_9", "idempotency_key": None, "kind": K.VOID}
    book.history.operations.append(row | {"origin": OperationOrigin.PSP})


def _report_what_nobody_did(book: Book) -> None:
    book.history.discrepancies = [{"operation_id": "op_p", "kind": "refund_elsewhere"}]


def _contradict_without_a_refusal(book: Book) -> None:
    book.history.discrepancies = [{"operation_id": "op_p", "kind": "late_refusal"}]


def _reverse_what_never_succeeded(book: Book) -> None:
    book.history.discrepancies = [{"operation_id": "op_x", "kind": "late_success"}]


def _take_effect_at_another_account(book: Book) -> None:
    _effect(book, 0)["account"] = "one"


def _look_at_a_success_of_what_waits(book: Book) -> None:
    """Operation and payment are not of one moment."""
    looks = book.history.looks
    looks[2] = replace(looks[2], payment_state=PaymentState.REQUIRES_ACTION)


BAD_REDIRECTS: Final[dict[Callable[[Book], None], Rule]] = {
    _send_to_another_account: Rule.ATTEMPT_AT_ITS_ACCOUNT,
    _send_to_two_accounts: Rule.ATTEMPT_AT_ITS_ACCOUNT,
    _capture_at_another_account: Rule.ATTEMPT_AT_ITS_ACCOUNT,
    _cascade_after_an_approval: Rule.RESTART_ONLY_WITHOUT_EFFECT,
    _charge_at_both: Rule.AT_MOST_ONE_CHARGE,
    _cancel_too_early: Rule.CUSTOMER_HAS_THE_TIME,
    _expire_by_ourselves: Rule.CUSTOMER_HAS_THE_TIME,
    _charge_what_has_expired: Rule.CHARGE_IS_A_SUCCESS,
    _expire_what_was_paid: Rule.STATE_IS_REACHABLE,
    _look_back: Rule.STATE_IS_REACHABLE,
    _look_at_an_older_version: Rule.STATE_IS_REACHABLE,
    _look_at_what_was_lost: Rule.ACKNOWLEDGED_IS_DURABLE,
    _take_our_own_for_anothers: Rule.DISCREPANCY_HAS_A_CAUSE,
    _contradict_without_a_refusal: Rule.DISCREPANCY_HAS_A_CAUSE,
    _reverse_what_never_succeeded: Rule.DISCREPANCY_HAS_A_CAUSE,
    _report_what_nobody_did: Rule.DISCREPANCY_HAS_A_CAUSE,
    _take_effect_at_another_account: Rule.INTENT_BEFORE_SEND,
    _look_at_a_success_of_what_waits: Rule.STATE_IS_REACHABLE,
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_history_that_breaks_a_rule_is_rejected_by_it(spoil: Callable[[Book], None]) -> None:
    book = good()
    spoil(book)
    violations = judge(book.history)
    assert BAD[spoil] in {violation.rule for violation in violations}
    for violation in violations:
        assert violation.found
        assert violation.expected


@pytest.mark.parametrize("spoil", BAD_REDIRECTS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_history_with_redirects_and_cascades_is_held_to_the_rules(
    spoil: Callable[[Book], None],
) -> None:
    book = sent_on()
    spoil(book)
    assert BAD_REDIRECTS[spoil] in {violation.rule for violation in judge(book.history)}


def test_the_operations_of_clients_without_a_journal_are_not_held_against_the_others() -> None:
    book = good()
    book.history.has_strangers = True
    _have_an_operation_that_nobody_asked_for(book)
    found = {violation.rule for violation in judge(book.history)}
    assert Rule.ONE_OPERATION_A_CALL not in found


def test_a_void_may_cancel_before_the_customers_time_is_over() -> None:
    book = sent_on()
    _cancel_too_early(book)
    book.payment("pay_2")["cancel_requested"] = True
    assert judge(book.history) == []


def test_a_decision_that_was_taken_and_a_dispute_that_was_lost_and_won_are_good() -> None:
    book = good()
    _decide(book, "NO_EFFECT", "NO_EFFECT", S.NOT_SENT)
    book.history.decisions.append(
        Decision("op_n", 1, "FAILED", None, "OPERATION_NOT_IN_DOUBT"),
    )
    _dispute(book, S.SUCCEEDED, "dispute_outcome")
    assert judge(book.history) == []


def test_every_rule_rejects_something() -> None:
    assert {*BAD.values(), *BAD_REDIRECTS.values()} == set(Rule)


def test_a_violation_says_rule_payment_operation_what_is_and_what_should_be() -> None:
    book = good()
    _charge_a_decline(book)
    texts = [str(violation) for violation in judge(book.history)]
    assert (
        "charge-is-a-success: pay_2 op_d: authorization stands at the PSP, the operation is"
        " DECLINED; should be: SUCCEEDED"
    ) in texts


def test_an_idempotent_psp_may_be_sent_the_same_request_once_more_and_no_other() -> None:
    book = automatic()
    book.send("a")
    assert [violation.rule for violation in judge(book.history)] == [Rule.SENT_ONCE]
    book = automatic()
    book.history.psp[1]["amount_minor"] = 999
    assert [violation.rule for violation in judge(book.history)] == [Rule.SENT_ONCE]


def test_answers_that_crossed_are_in_no_order() -> None:
    """A doubt told after a success is wrong, but not where its try began before that came."""
    book = good()
    book.tell("n", S.IN_DOUBT)
    last, before = book.history.answers[-1], book.history.answers[-2]
    assert Rule.STATE_IS_REACHABLE in {each.rule for each in judge(book.history)}
    book.history.answers[-1] = replace(last, sent=before.sent, answered=before.answered)
    assert judge(book.history) == []


def test_kept_journals_are_judged_the_same_again(tmp_path: Path) -> None:
    book = good()
    _charge_twice(book)
    book.history.save(tmp_path)
    loaded = History.load(tmp_path)
    assert loaded == book.history
    assert judge(loaded) == judge(book.history)
