"""The generator's calls: valid requests, answers read right, and what follows from them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import protovalidate
import pytest
from google.protobuf.duration_pb2 import Duration
from payments.v1 import payment_pb2, payment_service_pb2
from payments.v1.money_pb2 import Money

from loadtest.calls import CONTRADICTED, METHODS, OK, UNEXPECTED, UNKNOWN, Book, Call
from loadtest.mixes import BadMix, Draw, Kind, Mix, load_mix, zipf_weights

MERCHANTS = ["mer_a", "mer_b", "mer_c"]


def book_of(*kinds: Kind, **options: Any) -> Book:
    mix = Mix("test", dict.fromkeys(kinds, 1.0), len(MERCHANTS), 1.0)
    return Book(mix, MERCHANTS, run_id="run", **options)


def request_of(call: Call) -> Any:
    return getattr(payment_service_pb2, f"{call.method}Request").FromString(call.data)


def answer_to(call: Call, state: int = 4, **changes: Any) -> Any:
    """An answer as the gateway gives it."""
    response = payment_service_pb2.AuthorizePaymentResponse()
    payment_id = call.payment_id or f"pay_{call.key}"
    response.operation.CopyFrom(
        payment_pb2.Operation(
            operation_id=f"op_{call.key}",
            payment_id=payment_id,
            merchant_id=call.merchant_id,
            state=state,  # type: ignore[arg-type]
            idempotency_key=call.key,
            amount=Money(amount_minor=call.amount_minor, currency_code="EUR"),
            attempts=[payment_pb2.Attempt(connector_processing_time=Duration(nanos=120_500_000))],
        )
    )
    response.payment.payment_id = payment_id
    response.payment.amounts.authorized_minor = call.amount_minor
    for name, value in changes.items():
        setattr(response.operation, name, value)
    return response


def test_every_request_of_every_mix_obeys_the_contract() -> None:
    mix = load_mix("everything")
    book = Book(mix, MERCHANTS, run_id="run", batch_items=3)
    seen = Counter[Kind]()
    for _ in range(3000):
        call = book.next()
        seen[call.kind] += 1
        request = request_of(call)
        protovalidate.validate(request)
        if call.kind in (Kind.BATCH, Kind.STREAM):
            assert [item.item_ref for item in request.items] == [item.key for item in call.items]
            protovalidate.validate(request.items[0].authorization)
            continue
        if call.key:
            assert request.idempotency_key == call.key
            assert request.merchant_id == call.merchant_id
            state = 5 if Kind.DECLINE in (call.kind, call.repeats) else 4
            response = answer_to(call, state)
            if call.kind is Kind.REPLAY:
                response.replay.replayed = True
            assert call.read(call, response.SerializeToString()).code == OK
    assert seen.keys() == set(mix.weights)
    assert set(METHODS.values()) == {
        *("AuthorizePayment", "CapturePayment", "VoidPayment", "RefundPayment"),
        *("IncrementAuthorization", "GetPayment", "GetOperation", "ListPayments"),
        *("BatchAuthorizePayments", "StreamAuthorizePayments"),
    }


def test_no_key_is_ever_used_twice_except_by_replays() -> None:
    books = [book_of(Kind.AUTHORIZE, share=share) for share in range(3)]
    keys = [book.next().key for book in books for _ in range(500)]
    assert len(set(keys)) == len(keys)


def test_delay_of_the_psp_is_read_from_the_answer() -> None:
    book = book_of(Kind.AUTHORIZE)
    call = book.next()
    assert call.read(call, answer_to(call).SerializeToString()) == (OK, 120.5)
    [told] = book.acknowledged
    assert (told.kind, told.key, told.state) == ("AUTHORIZE", call.key, 4)


def test_replay_has_the_digest_of_the_first_answer_and_no_delay_of_its_own() -> None:
    book = book_of(Kind.AUTHORIZE, Kind.REPLAY)
    first = book.next()
    response = answer_to(first)
    first.read(first, response.SerializeToString())
    replay = next(call for call in iter(book.next, None) if call.kind is Kind.REPLAY)
    assert replay.data == first.data
    response.replay.first_request_id = "req_1"
    response.replay.replayed = True
    data = (
        answer_to(first).SerializeToString()
        + b"\x1a"
        + bytes([response.replay.ByteSize()])
        + response.replay.SerializeToString()
    )
    assert replay.read(replay, data) == (OK, 0.0)
    digests = {told.digest for told in book.acknowledged}
    assert len(digests) == 1
    assert replay.read(replay, answer_to(first).SerializeToString()).code == UNEXPECTED
    assert first.read(first, data).code == CONTRADICTED


@pytest.mark.parametrize("changes", [{"idempotency_key": "other"}, {"payment_id": "pay_other"}])
def test_answer_about_something_else_is_a_contradiction(changes: dict[str, Any]) -> None:
    book = book_of(Kind.AUTHORIZE)
    call = book.next()
    assert call.read(call, answer_to(call, **changes).SerializeToString()).code == CONTRADICTED
    response = answer_to(call)
    response.operation.amount.amount_minor += 1
    assert call.read(call, response.SerializeToString()).code == CONTRADICTED
    assert book.acknowledged == []


@pytest.mark.parametrize("state", [1, 5, 7, 8])
def test_another_state_than_the_token_asks_for_is_unexpected_and_still_acknowledged(
    state: int,
) -> None:
    book = book_of(Kind.AUTHORIZE)
    call = book.next()
    assert call.read(call, answer_to(call, state).SerializeToString()).code == UNEXPECTED
    [told] = book.acknowledged
    assert told.state == state
    assert bool(told.digest) == (state == 5)  # the others are never frozen


def test_call_without_an_answer_is_kept_with_its_status() -> None:
    book = book_of(Kind.BATCH, batch_items=2)
    call = book.next()
    book.unanswered(call, 4)
    assert [(told.key, told.state) for told in book.acknowledged] == [
        (item.key, -4) for item in call.items
    ]


def test_items_of_a_batch_stand_or_fall_alone() -> None:
    book = book_of(Kind.BATCH, batch_items=3)
    call = book.next()
    response = payment_service_pb2.BatchAuthorizePaymentsResponse()
    response.results.add(item_ref=call.items[0].key).response.CopyFrom(answer_to(call.items[0]))
    response.results.add(item_ref=call.items[1].key).error.code = 8
    assert call.read(call, response.SerializeToString()).code == 8
    states = {told.key: told.state for told in book.acknowledged}
    assert list(states.values()) == [4, -8, -UNKNOWN]


def test_control_run_reads_answers_and_compares_nothing() -> None:
    book = book_of(Kind.AUTHORIZE, echoed=True)
    call = book.next()
    other = book.next()
    assert call.read(call, answer_to(other).SerializeToString()) == (OK, 0.0)
    assert book.acknowledged == []


def test_merchants_are_drawn_by_zipf() -> None:
    weights = zipf_weights(4, 1.0)
    assert weights == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    drawn = Counter(draw() for draw in [Draw("abcd", weights, random.Random(1))] * 20_000)
    for rank, name in enumerate("abcd", 1):
        assert drawn[name] / 20_000 == pytest.approx(1 / rank / sum(weights), rel=0.1)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no mix"),
        ("[x]\nmerchants = 1", "needs merchants"),
        ("[x]\nmerchants = 0\nzipf_exponent = 1\nweights = {authorize = 1}", "merchants must"),
        ("[x]\nmerchants = 1\nzipf_exponent = -1\nweights = {authorize = 1}", "zipf_exponent"),
        ("[x]\nmerchants = 1\nzipf_exponent = 1\nweights = {}", "weights must"),
        ("[x]\nmerchants = 1\nzipf_exponent = 1\nweights = {pay = 1}", "no call 'pay'"),
        ("[x]\nmerchants = 1\nzipf_exponent = 1\nweights = {void = 0}", "weight of void"),
        ("[x", "mixes"),
        ("# ein Übermaß", "mixes.toml: 'utf-8' codec can't decode"),
    ],
)
def test_bad_mix_says_what_is_wrong(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "mixes.toml"
    path.write_text(text, "latin-1")
    with pytest.raises(BadMix, match=wrong):
        load_mix("x", path)
