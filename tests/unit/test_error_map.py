"""Every reason has one place in the table, and what leaves holds no more than it may."""

from pathlib import Path

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from gateway.domain.errors import GatewayError, Reason, Violation
from gateway.rpc.error_map import (
    INTERNAL_MESSAGE,
    OPERATION_REASONS,
    PUSHBACK_TRAILER,
    RULES,
    VIOLATIONS_MAX,
    render,
    status_code,
    to_status,
    to_trailers,
)

TRAILERS_BYTES_MAX = 8192
"""What grpc-core takes without a thought (GRPC_ARG_MAX_METADATA_SIZE)."""


def test_every_reason_is_an_error_or_stands_in_an_operation_and_none_is_both() -> None:
    assert RULES.keys() | OPERATION_REASONS.keys() == set(Reason)
    assert not RULES.keys() & OPERATION_REASONS.keys()


def test_the_published_table_is_the_one_of_the_code() -> None:
    published = Path(__file__).parents[2] / "docs" / "errors.md"
    assert published.read_text() == render()


@pytest.mark.parametrize("reason", RULES)
def test_a_status_names_its_reason_and_hints_at_a_retry_where_the_table_does(
    reason: Reason,
) -> None:
    error = GatewayError(reason, "text", metadata={"state": "VOIDED"})
    status = to_status(error)
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason.value, "payments.v1")
    assert status.code == RULES[reason].code.value[0]
    hinted = [detail for detail in status.details if detail.Unpack(retry)]
    pause_s = RULES[reason].retry_after_s
    trailers = dict(to_trailers(error, status))
    assert trailers["grpc-status-details-bin"] == status.SerializeToString()
    if pause_s is not None:
        assert retry.retry_delay.ToMilliseconds() == round(pause_s * 1000)
        assert trailers[PUSHBACK_TRAILER] == str(round(pause_s * 1000))
    else:
        assert not hinted
        assert trailers.get(PUSHBACK_TRAILER, "-1") == "-1"


def test_what_clients_retry_by_its_code_and_must_not_carries_a_negative_pushback() -> None:
    error = GatewayError(Reason.MESSAGE_TOO_LARGE, "text")
    assert (PUSHBACK_TRAILER, "-1") in to_trailers(error, to_status(error))
    error = GatewayError(Reason.PAYMENT_NOT_FOUND, "text")
    assert PUSHBACK_TRAILER not in dict(to_trailers(error, to_status(error)))


def test_a_pause_is_never_zero_which_clients_take_for_none() -> None:
    error = GatewayError(Reason.CONTENTION, "text", retry_after_s=0.0)
    assert (PUSHBACK_TRAILER, "1") in to_trailers(error, to_status(error))


def test_an_internal_error_says_the_same_whatever_happened() -> None:
    for error in (
        GatewayError(
            Reason.INTERNAL,
            "secret",
            metadata={"secret": "secret"},
            violations=[Violation("secret", "secret")],
        ),
        # A reason that is no error by the table: a fault of ours, not the caller's.
        GatewayError(Reason.ANSWER_TIMED_OUT, "secret"),
    ):
        status = to_status(error)
        assert status.message == INTERNAL_MESSAGE
        assert status_code(error.reason) is StatusCode.INTERNAL
        assert b"secret" not in status.SerializeToString()


def test_violations_are_bounded_so_that_clients_take_the_trailers() -> None:
    violations = [Violation(f"a.long.path.of.field_{n}", "x" * 500) for n in range(100)]
    error = GatewayError(Reason.INVALID_REQUEST, "text", violations=violations)
    status = to_status(error)
    bad = BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert len(bad.field_violations) == VIOLATIONS_MAX
    # Binary trailers travel in base64.
    sizes = [len(name) + len(value) * 4 / 3 for name, value in to_trailers(error, status)]
    assert sum(sizes) < TRAILERS_BYTES_MAX
    assert Status.FromString(status.SerializeToString()) == status
