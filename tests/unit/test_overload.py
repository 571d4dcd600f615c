"""What an overload run is held to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from loadtest.bench.generator import OpenLoad, Target
from loadtest.bench.system import Server
from loadtest.overload import Overload, Step, _tell, holds, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtest.bench.system import System
    from loadtest.children import Process

CALM = OpenLoad(
    offered_per_s=2000,
    achieved_per_s=2000,
    dropped=0,
    failed=0,
    p50_ms=4,
    p99_ms=12,
    max_ms=40,
    calls=120_000,
    accepted_p99_ms=11,
    refused=0,
    refusal_p99_ms=0,
)
FULL = replace(
    CALM,
    offered_per_s=3000,
    calls=110_000,
    failed=70_000,
    refused=70_000,
    accepted_p99_ms=21,
    refusal_p99_ms=9,
)


class Served:
    """A system with one server, and the generator that offers it a load."""

    folder = Path()

    def __init__(self, offer: Callable[[float, int], OpenLoad]) -> None:
        self._offer = offer

    def server(self, _side: str) -> Server:
        return Server(Target("", ""), cast("Process", None))

    def open(self, _target: Target, rate: int, seconds: int, _callers: int) -> OpenLoad:
        return self._offer(rate, seconds)

    def forget_logs(self) -> None:
        pass

    def analyze(self) -> None:
        pass


def run(
    half_more: OpenLoad = FULL, thrice: OpenLoad = FULL, without_retry_info: int = 0
) -> Overload:
    steps = [
        Step(1.0, CALM, 60, 0, 0),
        Step(1.5, half_more, 60, 30, without_retry_info),
        Step(3.0, thrice, 60, 30, 0),
    ]
    return Overload("native", 2000, 60, steps=steps)


def missed(overload: Overload) -> list[str]:
    return [f"{gate.name} {gate.value}" for gate in overload.gates() if not gate.met]


def test_a_run_within_all_bounds_misses_none() -> None:
    assert missed(run()) == []
    assert run().invalid() == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calls": 100_000}, "x 1.5: goodput ÷ base 0.833"),
        ({"accepted_p99_ms": 23}, "x 1.5: accepted p99 ÷ base 2.091"),
        ({"refusal_p99_ms": 21}, "x 1.5: refusal p99, ms 21"),
        ({"failed": 70_003}, "x 1.5: calls that failed otherwise 3"),
    ],
)
def test_what_misses_a_bound_is_said(changes: dict[str, float], said: str) -> None:
    assert missed(run(half_more=replace(FULL, **changes))) == [said]  # type: ignore[arg-type]


def test_thrice_the_knee_may_cost_half_of_the_goodput_and_no_more() -> None:
    assert missed(run(thrice=replace(FULL, calls=60_000))) == []
    assert missed(run(thrice=replace(FULL, calls=59_000))) == ["x 3: goodput ÷ base 0.492"]


def test_a_refusal_without_a_pause_misses_its_bound() -> None:
    assert missed(run(without_retry_info=2)) == ["x 1.5: refusals without RetryInfo 2"]


def test_a_short_run_proves_nothing() -> None:
    short = run()
    short.seconds = 59
    assert short.invalid()


@pytest.mark.parametrize("changes", [{"p99_ms": 15.1}, {"failed": 1}, {"dropped": 1}])
def test_a_knee_is_held_without_refusals_drops_or_late_answers(changes: dict[str, float]) -> None:
    assert holds(CALM)
    assert not holds(replace(CALM, **changes))  # type: ignore[arg-type]


def ended(
    monkeypatch: pytest.MonkeyPatch, folder: Path, found: Overload, missing: int = 0
) -> tuple[int, dict[str, Any]]:
    """The exit status and the summary."""
    summary = folder / "overload.json"
    monkeypatch.setattr("loadtest.overload.SUMMARY", summary)
    return _tell(found, missing), json.loads(summary.read_text("utf-8"))


def test_a_run_that_is_interrupted_tells_what_was_measured_until_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offered: list[float] = []

    def offer(rate: float, _seconds: int) -> OpenLoad:
        offered.append(rate)
        if len(offered) == 3:
            raise KeyboardInterrupt
        return CALM

    system = cast("System", Served(offer))
    monkeypatch.setattr("loadtest.overload.Generator", lambda _: system)
    found = measure(system, "native", rate=1000, step_s=1, seconds=60, knee=0)
    assert found.interrupted
    assert found.tried == [(1000, True)]
    status, summary = ended(monkeypatch, tmp_path, found)
    assert status == 130
    assert summary["tried"] == [[1000, True]]
    assert "1,000/s holds" in capsys.readouterr().out


def test_a_run_that_is_interrupted_before_a_rate_was_offered_has_no_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offer(_rate: float, _seconds: int) -> OpenLoad:
        raise KeyboardInterrupt

    system = cast("System", Served(offer))
    monkeypatch.setattr("loadtest.overload.Generator", lambda _: system)
    with pytest.raises(KeyboardInterrupt):
        measure(system, "native", rate=1000, step_s=1, seconds=60, knee=0)


def test_a_lost_authorization_is_told_where_no_rate_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Overload("grpcio", 0.0, 60)
    assert ended(monkeypatch, tmp_path, found)[0] == 0
    assert ended(monkeypatch, tmp_path, found, missing=2)[0] == 1
    assert "MISSED 2 acknowledged" in capsys.readouterr().out
