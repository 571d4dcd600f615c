"""What samples say: exact counts, percentiles to the maximum, files that survive a torn end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loadtest.arrivals import WARM_UP, Segment
from loadtest.calls import DROPPED, OK, Acknowledged
from loadtest.engine import Chunk
from loadtest.generator import frame_of, read_frames
from loadtest.measures import Analysis, Distribution, quantile
from loadtest.mixes import Kind
from loadtest.samples import (
    RECORD,
    Sample,
    acknowledged_lines,
    read_acknowledged,
    read_samples,
)

SEGMENTS = (Segment(WARM_UP, 1, 10, 10), Segment("steady", 2, 10, 10))


def sample(at_s: float = 1.5, latency_ms: float = 10, code: int = OK, **fields: float) -> Sample:
    values = {"late_ms": 0.0, "added_ms": latency_ms, "kind": 0, "segment": int(at_s >= 1)}
    values |= fields
    return Sample(at_s=at_s, latency_ms=latency_ms, code=code, **values)  # type: ignore[arg-type]


def test_percentiles_are_within_a_thousandth_and_the_maximum_is_exact() -> None:
    source = random.Random(1)
    values = [source.lognormvariate(3, 1.5) for _ in range(20_011)]
    distribution = Distribution()
    for value in values:
        distribution.record(value)
    ordered = sorted(values)
    for percent in (1, 50, 90, 99, 99.9):
        expected = quantile(ordered, percent / 100)
        assert distribution.percentile(percent) == pytest.approx(expected, rel=2e-3, abs=0.01)
    assert distribution.max_ms == ordered[-1]
    assert distribution.percentile(100) == ordered[-1]
    assert distribution.count == len(values)
    curve = distribution.curve()
    assert curve[-1][1] == ordered[-1]
    values_ms = [value_ms for _, value_ms in curve]
    assert values_ms == sorted(values_ms)


def test_nothing_measured_has_no_percentiles() -> None:
    assert Distribution().percentile(99) == 0
    assert Analysis([], SEGMENTS).timeline() == []


def test_every_intended_send_is_counted_once_and_the_warm_up_apart() -> None:
    analysis = Analysis(
        [
            sample(0.5),
            sample(1.2, late_ms=11.0),
            sample(1.3, code=DROPPED, latency_ms=0),
            sample(1.4, code=8, latency_ms=3),
            sample(2.5, latency_ms=1000),
        ],
        SEGMENTS,
    )
    whole = analysis.whole
    assert (whole.offered, whole.ok, whole.dropped, whole.errors, whole.late) == (4, 2, 1, 1, 1)
    assert whole.latency.max_ms == 1000
    assert analysis.of_segment[WARM_UP].ok == 1
    assert analysis.refusals.count == 1
    assert analysis.duration_s == 2


def test_answers_stand_in_the_second_of_the_answer_and_latencies_in_that_of_the_send() -> None:
    timeline = Analysis([sample(1.5, latency_ms=2000)], SEGMENTS).timeline()
    assert [second.answered for second in timeline] == [0, 0, 0, 1]
    assert timeline[1].offered == 1
    assert timeline[1].latency_max_ms == 2000


def test_answers_after_their_segment_are_no_throughput_of_it() -> None:
    segments = (
        Segment(WARM_UP, 1, 10, 10),
        Segment("base", 2, 10, 10),
        Segment("overload", 2, 30, 30),
    )
    analysis = Analysis(
        [
            sample(0.5, latency_ms=600),  # sent in the warm-up, answered in the base
            sample(1.5),
            sample(2.5, latency_ms=1000, segment=1),
            *(sample(4.0, latency_ms=1001 + late_ms, segment=2) for late_ms in range(50)),
            sample(4.0, code=8, segment=2),
        ],
        segments,
    )
    assert analysis.answered_rps("base") == 1
    assert analysis.answered_rps("overload") == 0.5
    assert analysis.answered_rps() == 0.75
    assert analysis.of_segment["overload"].ok == 50


def test_backlog_is_not_served_and_the_psp_s_delay_is_no_backlog() -> None:
    analysis = Analysis(
        [
            sample(2.9, latency_ms=500, added_ms=20),
            sample(2.9, latency_ms=500, added_ms=200),
            sample(2.0, code=8),
            sample(2.0, code=DROPPED),
        ],
        SEGMENTS,
    )
    assert analysis.served == {"steady": 1}


def test_samples_and_acknowledgements_survive_their_files(tmp_path: Path) -> None:
    samples = [sample(1.5, 10.25, kind=Kind.BATCH), sample(2.0, code=DROPPED)]
    path = tmp_path / "samples"
    path.write_bytes(b"".join(RECORD.pack(*each) for each in samples) + b"torn")
    assert list(read_samples(path)) == samples
    told = [
        Acknowledged("AUTHORIZE", "mer_a", "key 1", "op_1", "pay_1", 4, 100, "ab"),
        Acknowledged("AUTHORIZE", "", "key 2", "", "", -4, 100, ""),
    ]
    path.write_bytes(acknowledged_lines(told))
    assert list(read_acknowledged(path)) == told


def test_frames_of_a_generator_are_read_up_to_a_torn_one(tmp_path: Path) -> None:
    chunk = Chunk(b"abc", b"de", {"UNAVAILABLE": 2}, 7, 9, 1.5)
    frames = [frame_of(chunk), frame_of("it broke"), frame_of(chunk)[:-1]]
    path = tmp_path / "frames"
    path.write_bytes(b"".join(frames))
    with path.open("rb") as file:
        assert list(read_frames(file)) == [chunk, "it broke"]


def test_rates_of_a_run_that_was_left_count_the_time_that_was_sent_for() -> None:
    segments = (*SEGMENTS, Segment("never", 5, 10, 10))
    samples = [sample(0.5), sample(1.25), sample(2.0), sample(2.0, latency_ms=1.0)]
    analysis = Analysis(samples, segments, until_s=2.0)
    assert analysis.duration_s == 1.0
    assert analysis.offered_rps() == 3.0
    # The last answers came after the end.
    assert analysis.answered_rps() == 1.0
    assert analysis.answered_rps("never") == 0.0
    assert analysis.spans == [(WARM_UP, 0.0, 1.0), ("steady", 1.0, 2.0), ("never", 2.0, 2.0)]
    in_warm_up = Analysis([sample(0.5)], segments, until_s=0.5)
    assert (in_warm_up.duration_s, in_warm_up.offered_rps(), in_warm_up.answered_rps()) == (0, 0, 0)
