"""loadtest.tracing_cost: what a lane is compared with is the lane, without a word of tracing."""

from __future__ import annotations

import pytest

import storage.batching
from loadtest import tracing_cost
from loadtest.tracing_cost import lanes_without_tracing


async def test_a_lane_without_tracing_is_a_lane() -> None:
    module = lanes_without_tracing()

    async def flush(rows: list[int]) -> list[int]:
        return rows

    lane = module.Lane("test", flush, rows_max=2, queue_max=10)
    assert [await lane.put(row) for row in range(3)] == [0, 1, 2]
    assert not hasattr(lane, "_tracer")
    assert "traced" not in module._Entry.__slots__
    assert "traced" in storage.batching._Entry.__slots__


async def test_what_is_measured_is_more_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_cost, "ROWS_PER_ROUND", 400)
    monkeypatch.setattr(tracing_cost, "CALLS_PER_ROUND", 20)
    for module in (storage.batching, lanes_without_tracing()):
        assert await tracing_cost.rows_per_s(module) > 0
    assert await tracing_cost.call_s(tracing_cost._call(None)) > 0
