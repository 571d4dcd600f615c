"""tests.chaos.attack: what an attack may do to a gateway and its good clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.attack import GROWN_BYTES_MAX, NEVER, P99_RATIO_MAX, WARM_SHARE, Effect
from tests.chaos.scenarios import BAD_MESSAGES_FULL

MEGABYTE = 1_000_000
HARMLESS = Effect(
    statuses={"fuzz": {"INVALID_ARGUMENT": 4_900, "OK": 100}, "reset": {"SURVIVED": 19_600}},
    quiet_p99_s=0.1,
    attacked_p99_s=0.3,
    begun_bytes=100 * MEGABYTE,
    warmed_bytes=160 * MEGABYTE,
    ended_bytes=165 * MEGABYTE,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attacked_p99_s": P99_RATIO_MAX * HARMLESS.quiet_p99_s},
        {"ended_bytes": HARMLESS.warmed_bytes + GROWN_BYTES_MAX},
        {"ended_bytes": HARMLESS.begun_bytes},
    ],
    ids=["harmless", "slow", "grown", "shrunk"],
)
def test_what_stays_within_the_bounds_is_no_problem(change: dict[str, Any]) -> None:
    assert replace(HARMLESS, **change).problems() == []


def test_memory_that_grows_once_it_is_warm_is_a_problem() -> None:
    grown = replace(HARMLESS, ended_bytes=HARMLESS.warmed_bytes + GROWN_BYTES_MAX + 1)
    assert grown.problems() == ["its memory grew by 25 MB after it was warm"]


def test_a_leak_of_a_quarter_of_a_kilobyte_a_message_breaks_the_full_campaign() -> None:
    later = (1 - WARM_SHARE) * BAD_MESSAGES_FULL / 2  # a half for each transport
    assert later * 256 > GROWN_BYTES_MAX


def test_growth_before_it_is_warm_is_told_and_is_no_problem() -> None:
    large = replace(HARMLESS, begun_bytes=10 * MEGABYTE)
    assert large.problems() == []
    assert "memory 10 MB, warm 160 MB, at the end 165 MB" in large.figures()


@pytest.mark.parametrize("status", sorted(NEVER))
def test_a_bad_client_is_never_told_of_a_fault_of_the_server(status: str) -> None:
    told = replace(HARMLESS, statuses={"fuzz": {"OK": 1}, "stream": {"OK": 2, status: 1}})
    assert told.problems() == [f"stream met 1 {status}"]


def test_good_clients_that_wait_too_long_are_a_problem() -> None:
    slow = replace(HARMLESS, attacked_p99_s=0.5)
    assert slow.problems() == ["the good clients' p99 rose to 5.0 times"]
