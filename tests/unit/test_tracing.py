"""gateway.telemetry.tracing: whose call it is by its headers, and what is passed on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry.tracing import (
    TRACESTATE_CHARACTERS_MAX,
    caller_of,
    current_trace_id,
    outgoing_headers,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"


def test_a_traceparent_names_trace_span_and_decision() -> None:
    caller = caller_of((("authorization", "Bearer x"), ("traceparent", VALID)))
    assert caller is not None
    assert f"{caller.trace_id:032x}-{caller.span_id:016x}" == f"{TRACE}-{SPAN}"
    assert caller.is_remote
    assert caller.trace_flags.sampled
    assert not caller.trace_state
    refused = caller_of((("traceparent", f"00-{TRACE}-{SPAN}-00"),))
    assert refused is not None
    assert not refused.trace_flags.sampled


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f" 00-{TRACE}-{SPAN}-01",
    ],
)
def test_an_invalid_traceparent_is_as_good_as_none(header: str) -> None:
    assert caller_of((("traceparent", header),)) is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert caller_of((("traceparent", f"cc-{TRACE}-{SPAN}-01-what-is-new"),)) is not None


def test_two_traceparents_are_as_good_as_none() -> None:
    assert caller_of((("traceparent", VALID), ("traceparent", VALID))) is None


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("a=1,b=2", "a=1,b=2"),
        ("a=4111111111111111", ""),
        ("a=" + "1" * TRACESTATE_CHARACTERS_MAX, ""),
        ("a=1\r\nx: y", ""),
        ("no member", ""),
    ],
)
def test_a_tracestate_is_taken_over_where_it_is_valid_and_without_card_numbers(
    header: str, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    caller = caller_of((("traceparent", VALID), ("tracestate", header)))
    assert caller is not None
    assert caller.trace_state.to_header() == kept
    assert not caplog.records, "nobody can fill the log with it"


@given(st.lists(st.tuples(st.sampled_from(("traceparent", "tracestate")), st.text())))
def test_no_header_is_an_error(metadata: list[tuple[str, str | bytes]]) -> None:
    caller_of([*metadata, ("traceparent-bin", b"\xff")])


def test_outside_of_calls_nothing_is_passed_on() -> None:
    assert (outgoing_headers(), current_trace_id()) == ("", "")
