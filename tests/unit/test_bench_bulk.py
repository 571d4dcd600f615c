from __future__ import annotations

import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st
from payments.v1 import payment_service_pb2 as contract

from loadtest.bench.bulk import Items, UnexpectedAnswer, count_results


def test_a_message_has_as_many_items_as_asked_for_each_with_a_new_key() -> None:
    items = Items(7)
    messages = [contract.BatchAuthorizePaymentsRequest.FromString(items.encode()) for _ in range(3)]
    keys = {item.authorization.idempotency_key for each in messages for item in each.items}
    assert [len(each.items) for each in messages] == [7, 7, 7]
    assert len(keys) == 21
    assert [item.item_ref for item in messages[0].items] == [str(number) for number in range(7)]
    assert messages[0].items[6].authorization.amount.amount_minor == 1000


def test_a_stream_takes_the_same_message_as_a_batch() -> None:
    request = contract.StreamAuthorizePaymentsRequest.FromString(Items(3).encode())
    assert len(request.items) == 3


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_results_are_counted_whatever_their_sizes(sizes: list[int]) -> None:
    answer = contract.BatchAuthorizePaymentsResponse()
    for number, size in enumerate(sizes):
        result = answer.results.add(item_ref=str(number) if size % 2 else "")
        result.response.payment.merchant_id = "m" * size
    assert count_results(answer.SerializeToString()) == (len(sizes), 0)


def test_refused_items_are_counted_apart() -> None:
    answer = contract.BatchAuthorizePaymentsResponse()
    answer.results.add(item_ref="1").response.payment.merchant_id = "m"
    answer.results.add(item_ref="2").error.CopyFrom(status_pb2.Status(code=8, message="no"))
    assert count_results(answer.SerializeToString()) == (1, 1)


def test_a_result_without_an_answer_is_raised() -> None:
    answer = contract.BatchAuthorizePaymentsResponse()
    answer.results.add(item_ref="1")
    with pytest.raises(UnexpectedAnswer):
        count_results(answer.SerializeToString())


def test_another_message_is_raised() -> None:
    with pytest.raises(UnexpectedAnswer, match="field 2"):
        count_results(
            contract.AuthorizePaymentResult(
                response=contract.AuthorizePaymentResponse()
            ).SerializeToString()
        )
