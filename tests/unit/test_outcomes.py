"""The database's time, as the writers of outcomes go by it without asking."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from gateway.application import outcomes
from gateway.application.outcomes import DatabaseClock

pytestmark = pytest.mark.unit

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Monotonic:
    """The local clock; only the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(outcomes, "time", SimpleNamespace(monotonic=lambda: self.now_s))


def test_the_databases_time_goes_on_from_what_it_told_last(monkeypatch: pytest.MonkeyPatch) -> None:
    local = Monotonic(monkeypatch)
    clock = DatabaseClock()
    for told in (AT, AT + timedelta(hours=1), AT - timedelta(hours=1)):
        local.now_s += 100
        clock.observe(told)
        assert clock.after(None) == told
        local.now_s += 2.5
        assert clock.after(None) == told + timedelta(seconds=2.5)


def test_the_local_time_counts_until_the_database_told_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = Monotonic(monkeypatch)
    began = datetime.now(UTC)
    clock = DatabaseClock()
    ended = datetime.now(UTC)
    local.now_s += 60
    passed = timedelta(seconds=60)
    assert began + passed <= clock.after(None) <= ended + passed


def test_no_change_is_before_the_one_that_it_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    Monotonic(monkeypatch)
    clock = DatabaseClock()
    clock.observe(AT)
    assert clock.after(AT + timedelta(seconds=1)) == AT + timedelta(seconds=1)
    assert clock.after(AT - timedelta(seconds=1)) == AT
