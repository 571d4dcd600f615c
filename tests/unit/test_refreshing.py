"""gateway.application.refreshing: nothing ends a reading, and no end is silent."""

import asyncio
import logging

import pytest

from gateway.application.ports import StoreUnavailable
from gateway.application.refreshing import in_background, refresh_forever


async def refreshed_after(error: Exception, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """What is logged where the first reading fails, and another one follows."""
    tries = 0
    read = asyncio.Event()

    async def refresh() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise error
        read.set()

    reading = asyncio.create_task(refresh_forever("the accounts", refresh, 0.0))
    async with asyncio.timeout(10):
        await read.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    [record] = caplog.records
    return record


async def test_what_could_not_be_read_is_told_and_read_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = await refreshed_after(StoreUnavailable("no answer in time"), caplog)
    assert record.getMessage() == "the accounts could not be read: no answer in time"


async def test_a_defect_is_told_as_one_and_ends_no_reading(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = await refreshed_after(ValueError("a defect"), caplog)
    assert (record.levelname, record.getMessage()) == ("ERROR", "the accounts could not be read")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a defect"


async def test_the_end_of_what_never_ends_is_told_and_its_cancellation_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken() -> None:
        raise ValueError("a defect")

    async def going_on() -> None:
        await asyncio.Event().wait()

    with pytest.raises(ValueError, match="a defect"):
        await in_background("breakers", broken())
    cancelled = in_background("recovery", going_on())
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "ERROR",
        "work in the background has ended: breakers",
    )


async def test_what_is_read_again_is_never_older_than_the_interval_that_is_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A person who switched an account off waits for so long, and takes it for off then."""
    pauses_s: list[float] = []

    async def pause(seconds: float) -> None:
        pauses_s.append(seconds)
        if len(pauses_s) == 100:
            raise asyncio.CancelledError

    async def refresh() -> None:
        """Nothing has changed."""

    monkeypatch.setattr(asyncio, "sleep", pause)
    with pytest.raises(asyncio.CancelledError):
        await refresh_forever("a list", refresh, 5.0)
    assert max(pauses_s) <= 5.0
    assert len(set(pauses_s)) > 1  # many gateways do not ask at once
