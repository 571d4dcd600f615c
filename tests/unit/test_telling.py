"""What connectors find out by themselves is stored, later where it cannot be now, and bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from gateway.application import telling
from gateway.application.notifications import Notification, Received
from gateway.application.ports import StoreUnavailable
from gateway.application.telling import Telling
from gateway.domain.errors import GatewayError, Reason

pytestmark = pytest.mark.unit

LONG_S = 30.0


def received(number: int) -> Received:
    return Received("mer_1", "acc_1", Notification("iso8583", f"evt_{number}", "0110"))


class Store:
    """Keeps, or fails first."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.kept: list[list[str]] = []
        self.changed = asyncio.Event()
        self.failed = asyncio.Event()

    async def keep(self, batch: Sequence[Received]) -> int:
        if self.failures:
            self.failed.set()
            raise self.failures.pop(0)
        self.kept.append([each.notification.event_id for each in batch])
        self.changed.set()
        return len(batch)


async def test_what_is_told_is_stored_together_once_the_store_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telling, "PAUSE_S", 0.0)
    store = Store(StoreUnavailable("away"), GatewayError(Reason.OVERLOADED, "full"))
    told = Telling(store.keep, 10)
    for number in range(3):
        told.tell(received(number))
    running = asyncio.create_task(told.run())
    await asyncio.wait_for(store.changed.wait(), 30)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert store.kept == [["evt_0", "evt_1", "evt_2"]]


async def test_what_cannot_be_stored_for_whatever_reason_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telling, "PAUSE_S", 0.0)
    kept: list[str] = []
    all_kept = asyncio.Event()
    refused = 0

    async def keep(batch: Sequence[Received]) -> int:
        nonlocal refused
        names = [each.notification.event_id for each in batch]
        if "evt_1" in names and refused < 5:
            refused += 1
            raise RuntimeError
        kept.extend(names)
        if len(kept) == 4:
            all_kept.set()
        return len(batch)

    told = Telling(keep, 10)
    for number in range(4):
        told.tell(received(number))
    running = asyncio.create_task(told.run())
    await asyncio.wait_for(all_kept.wait(), 30)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert kept == ["evt_0", "evt_2", "evt_3", "evt_1"]


async def test_what_waits_at_the_end_is_stored_as_far_as_that_can_be_done() -> None:
    store = Store()
    told = Telling(store.keep, telling.BATCH_MAX + 1)
    for number in range(telling.BATCH_MAX + 1):
        told.tell(received(number))
    await told.flush()
    assert [len(batch) for batch in store.kept] == [telling.BATCH_MAX, 1]
    away = Telling(Store(StoreUnavailable("away")).keep, 10)
    away.tell(received(0))
    await away.flush()


async def test_what_could_not_be_stored_yet_at_the_end_is_stored_then() -> None:
    store = Store(StoreUnavailable("away"))
    told = Telling(store.keep, 10)
    told.tell(received(0))
    running = asyncio.create_task(told.run())
    await asyncio.wait_for(store.failed.wait(), 30)
    running.cancel()  # in the pause before the next try
    with contextlib.suppress(asyncio.CancelledError):
        await running
    told.tell(received(1))
    await told.flush()
    assert store.kept == [["evt_0"], ["evt_1"]]


async def test_what_is_too_much_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    told = Telling(store.keep, 1)
    told.tell(received(0))
    told.tell(received(1))
    await told.flush()
    assert store.kept == [["evt_0"]]
    assert "is dropped" in caplog.text


async def test_the_end_does_not_wait_for_a_database_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def keep(_: Sequence[Received]) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(telling, "FLUSH_S_MAX", 0.01)
    told = Telling(keep, 10)
    told.tell(received(1))
    async with asyncio.timeout(LONG_S):
        await told.flush()
