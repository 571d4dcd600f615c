"""What the functions made from the descriptors write is what protobuf would have written."""

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from payments.v1 import money_pb2, outcome_pb2, payment_pb2

from gateway.domain.model import AvsResult, CvvResult, Operation, Outcome, ResponseCode
from gateway.rpc.wire import OCTETS, length_delimited, octets_of, to_timestamp, writer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
INT64 = st.integers(-(2**63), 2**63 - 1)
TIMES = st.datetimes(timezones=st.just(UTC))

write_outcome = writer(outcome_pb2.Outcome, "advice", of=Outcome)


@given(
    st.builds(
        Outcome,
        response_code=st.sampled_from(ResponseCode),
        connector_code=TEXTS,
        connector_message=TEXTS,
        avs_result=st.sampled_from(AvsResult),
        cvv_result=st.sampled_from(CvvResult),
        auth_code=TEXTS,
        amount_reported_minor=st.none() | INT64,
    ),
    st.none() | TEXTS,
)
def test_a_message_is_written_byte_for_byte_as_protobuf_writes_it(
    outcome: Outcome, advice_code: str | None
) -> None:
    advice = None if advice_code is None else outcome_pb2.Advice(code=advice_code)
    expected = outcome_pb2.Outcome(
        response_code=outcome_pb2.ResponseCode.ValueType(outcome.response_code),
        connector_code=outcome.connector_code,
        connector_message=outcome.connector_message,
        advice=advice,
        avs_result=outcome_pb2.AvsResult.ValueType(outcome.avs_result),
        cvv_result=outcome_pb2.CvvResult.ValueType(outcome.cvv_result),
        auth_code=outcome.auth_code,
        amount_reported_minor=outcome.amount_reported_minor,
    )
    octets = write_outcome(outcome, None if advice is None else octets_of(advice))
    assert octets.encode(OCTETS) == expected.SerializeToString()


@dataclass
class Told:
    """Some fields of an operation, and its times."""

    reason: str
    epoch: int
    final: bool
    created_at: datetime | None
    updated_at: datetime | None


write_told = writer(
    payment_pb2.Operation,
    *("operation_id", "payment_id", "merchant_id", "parent_operation_id", "kind", "origin"),
    *("state", "amount", "idempotency_key", "outcome", "attempts", "allocations", "next_action"),
    *("merchant_transaction_id", "route"),
    of=Told,
)


@given(
    st.builds(Told, TEXTS, INT64, st.booleans(), st.none() | TIMES, st.none() | TIMES),
    st.lists(st.builds(payment_pb2.Attempt, connector=TEXTS), max_size=3),
    st.sampled_from([0, 1, 127, 128, 4095, 4096, 20_000]),
)
def test_times_long_parts_and_repeated_messages_are_written_as_protobuf_writes_them(
    told: Told, attempts: list[payment_pb2.Attempt], length: int
) -> None:
    key = "k" * length
    expected = payment_pb2.Operation(
        idempotency_key=key,
        epoch=told.epoch,
        final=told.final,
        attempts=attempts,
        reason=told.reason,
        created_at=to_timestamp(told.created_at),
        updated_at=to_timestamp(told.updated_at),
    )
    octets = write_told(
        *(told, "", "", "", None, 0, 0, 0, None, key, None, map(octets_of, attempts), (), None),
        *("", None),
    )
    assert octets.encode(OCTETS) == expected.SerializeToString()


@given(st.integers(-(2**70), 2**70))
def test_a_number_that_the_contract_cannot_hold_is_refused(number: int) -> None:
    write = writer(money_pb2.Money, "amount_minor", "currency_code", numbers=range(1, 2))
    if -(2**63) <= number < 2**63:
        message = money_pb2.Money.FromString(write(number, "").encode(OCTETS))
        assert message.amount_minor == number
    else:
        with pytest.raises(ValueError, match="64 bits"):
            write(number, "")


def test_a_field_that_nothing_tells_is_found_when_the_function_is_made() -> None:
    with pytest.raises(TypeError, match=r"payments\.v1\.Outcome\.advice"):
        writer(outcome_pb2.Outcome, of=Outcome)
    with pytest.raises(TypeError, match=r"allocations has to be given"):
        writer(payment_pb2.Operation, "amount", "outcome", "attempts", of=Operation)


def test_a_duration_without_length_is_empty() -> None:
    write = writer(Duration, "seconds", "nanos")
    assert write(0, 0) == ""
    assert Duration.FromString(write(-1, -5).encode(OCTETS)) == Duration(seconds=-1, nanos=-5)


@given(st.binary(max_size=5000), st.integers(1, 15))
def test_what_is_delimited_by_its_length_is_read_back(payload: bytes, number: int) -> None:
    encoded = length_delimited(number, payload)
    assert encoded.endswith(payload)
    assert encoded[0] == number << 3 | 2
    assert len(encoded) == 1 + len(payload) + (1 if len(payload) < 128 else 2)
