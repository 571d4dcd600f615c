"""Gates and verdicts: what is missed, what makes a run invalid, and the exit status of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.knee import PRECISION, STEPS_MAX, KneeSearch
from loadtest.slo import SLO_FILE, BadSlo, Limits, evaluate, floor_for

FIGURES = {
    "offered": 60_000,
    "ok": 60_000,
    "errors": 0,
    "dropped": 0,
    "added_p99_ms": 10.0,
    "added_p999_ms": 30.0,
}
AUDIT = dict.fromkeys(
    (
        *("missing", "repeated_rows", "contradicted", "unkept", "duplicate_charges"),
        *("charged_declines", "charged_refusals", "unrecorded_charges", "repeated_effects"),
    ),
    0,
)


def summary_of(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "duration_s": 300.0,
        "unaccounted": 0,
        "gateway_ended": False,
        "workers_ended": 0,
        "ended": [],
        "stopped": "",
        "whole": dict(FIGURES),
        "segments": {"before": dict(FIGURES), "after": dict(FIGURES), "spike": dict(FIGURES)},
        "control_p99_ms": 2.0,
        "psp_lateness_p99_ms": 1.0,
        "left_out": [],
        "gateway_memory": {"max_mb": 120.0, "growth_mb": 1.0},
        "audit": dict(AUDIT),
    }
    for path, value in changes.items():
        *outer, name = path.split("__")
        table = base
        for each in outer:
            table = table[each]
        table[name] = value
    return base


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"whole__added_p99_ms": 15.1}, 1),
        ({"whole__added_p999_ms": 50.1}, 1),
        ({"whole__added_p999_ms": 50.1, "duration_s": 299.0}, 0),
        ({"whole__errors": 7}, 1),
        ({"whole__errors": 6}, 0),
        ({"whole__dropped": 1}, 1),
        ({"whole__ok": 0}, 1),
        ({"gateway_memory__max_mb": 201.0}, 1),
        ({"control_p99_ms": 10.1}, 3),
        ({"psp_lateness_p99_ms": 3.1, "whole__added_p99_ms": 99.0}, 3),
        ({"control_p99_ms": None}, 3),
        ({"unaccounted": 1}, 3),
        ({"whole__offered": 0, "whole__ok": 0}, 3),
        ({"ended": ["Redis"]}, 3),
        ({"stopped": "interrupted"}, 3),
        ({"control_p99_ms": None, "left_out": ["control"]}, 0),
        ({"psp_lateness_p99_ms": None, "left_out": ["simulator"]}, 0),
        *(({f"audit__{name}": 1}, 1) for name in AUDIT),
        ({"audit__missing": 1, "control_p99_ms": 99.0}, 1),
        ({"audit__duplicate_charges": None}, 0),
        ({"audit": {"clean": None, "failure": "gone"}, "control_p99_ms": 99.0}, 1),
        ({"gateway_ended": True}, 1),
        ({"gateway_ended": True, "control_p99_ms": 99.0}, 1),
        ({"gateway_ended": None}, 0),
        ({"workers_ended": 1}, 1),
    ],
)
def test_exit_status_says_met_missed_or_invalid(changes: dict[str, Any], status: int) -> None:
    verdict = evaluate(Limits.load("steady"), summary_of(**changes))
    assert verdict.exit_status == status
    assert verdict.met == (status == 0)


def test_spike_is_gated_before_and_after_it() -> None:
    limits = Limits.load("spike")
    assert evaluate(limits, summary_of(segments__spike__errors=900)).exit_status == 0
    assert evaluate(limits, summary_of(segments__after__errors=900)).exit_status == 1


def test_soak_is_held_to_flat_memory() -> None:
    limits = Limits.load("soak")
    assert evaluate(limits, summary_of(gateway_memory__growth_mb=21.0)).exit_status == 0
    long = summary_of(gateway_memory__growth_mb=21.0, duration_s=600.0)
    assert evaluate(limits, long).exit_status == 1


def test_knee_is_held_to_its_rate() -> None:
    limits = Limits.load("knee")
    for rate, status in ((1500.0, 0), (1499.0, 1)):
        assert evaluate(limits, summary_of(knee={"rate": rate, "steps": []})).exit_status == status


@pytest.mark.parametrize(("valid", "status"), [(True, 1), (False, 3)])
def test_knee_that_is_the_simulator_s_says_nothing_of_the_gateway(
    *, valid: bool, status: int
) -> None:
    steps = [
        {"rate": 1000.0, "held": True, "valid": True},
        {"rate": 1500.0, "held": False, "valid": True},
        {"rate": 1200.0, "held": False, "valid": valid},
    ]
    limits = Limits.load("knee")
    low = summary_of(knee={"rate": 1000.0, "steps": steps})
    assert evaluate(limits, low).exit_status == status
    high = summary_of(knee={"rate": 2000.0, "steps": steps})
    assert evaluate(limits, high).exit_status == 0


def test_overload_is_held_to_goodput_latency_and_quick_refusals() -> None:
    limits = Limits.load("overload")
    good = {
        "factor": 3.0,
        "goodput_ratio": 0.5,
        "accepted_p99_ratio": 2.0,
        "refusal_p99_ms": 20.0,
        "refusals_without_retry_info": 0,
        "unserved_ratio": 0.5,
    }
    assert evaluate(limits, summary_of(overload=good)).exit_status == 0
    for name, value in (
        ("goodput_ratio", 0.49),
        ("goodput_ratio", None),
        ("accepted_p99_ratio", 2.1),
        ("refusal_p99_ms", 20.1),
        ("refusals_without_retry_info", 1),
        ("factor", 1.5),
    ):
        assert evaluate(limits, summary_of(overload={**good, name: value})).exit_status == 1
    # What was served nearly whole was no overload, and says nothing.
    for value in (0.04, None):
        overload = {**good, "unserved_ratio": value}
        assert evaluate(limits, summary_of(overload=overload)).exit_status == 3


def test_floor_of_goodput_is_that_of_the_next_factor() -> None:
    floors = {"1.5": 0.85, "3": 0.5}
    assert floor_for(floors, 1.2) == floor_for(floors, 1.5) == 0.85
    assert floor_for(floors, 2.0) == 0.5
    assert floor_for(floors, 4.0) is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[slo", "slo"),
        ("# ein Übermaß", "slo.toml: 'utf-8' codec can't decode"),
        ("[stedy]", "no profile is called stedy"),
        ("[slo]\nadded_p98_ms_max = 1", "no such limit: added_p98_ms_max"),
        ("[slo]\ndropped_max = -1", "dropped_max has a value"),
        ("[slo]\ndropped_max = true", "dropped_max has a value"),
        ("[spike]\ngated_segments = 1", "gated_segments has a value"),
        ('[spike]\ngated_segments = ["befor"]', "can be after, before, spike, not befor"),
        ("[spike]\ngoodput_ratio_min = {x = 1}", "goodput_ratio_min has a value"),
        ("[slo]\ndropped_max = 1", "is missing"),
    ],
)
def test_bad_file_of_gates_says_what_is_wrong(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "slo.toml"
    path.write_text(text, "latin-1")
    with pytest.raises(BadSlo, match=wrong):
        Limits.load("spike", path)


def test_published_gates_are_those_of_the_targets() -> None:
    limits = Limits.load("steady", SLO_FILE)
    assert limits == replace(
        limits,
        control_p99_ms_max=10.0,
        psp_lateness_p99_ms_max=3.0,
        added_p99_ms_max=15.0,
        added_p999_ms_max=50.0,
        added_p999_from_s=300.0,
        error_ratio_max=0.0001,
        dropped_max=0,
        gateway_memory_mb_max=200.0,
    )


@pytest.mark.parametrize("knee", [40.0, 700.0, 1000.0, 1730.0, 9000.0])
def test_search_finds_the_knee_within_its_precision(knee: float) -> None:
    search = KneeSearch(1000.0)
    while not search.done:
        search.record(held=search.rate <= knee)
    assert search.holding <= knee < search.failing
    assert search.failing / search.holding <= 1 + PRECISION or search.steps == STEPS_MAX
    assert search.failing / search.holding < 1.1


def test_search_ends_where_nothing_or_everything_holds() -> None:
    for held, holding in ((False, False), (True, True)):
        search = KneeSearch(1000.0)
        while not search.done:
            search.record(held=held)
        assert search.steps <= STEPS_MAX
        assert bool(search.holding) == holding
