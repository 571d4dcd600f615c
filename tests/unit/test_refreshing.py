"""gateway.application.refreshing: a store that is away ends no reading."""

import asyncio

import pytest

from gateway.application.ports import StoreUnavailable
from gateway.application.refreshing import refresh_forever


async def test_what_could_not_be_read_is_told_and_read_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = 0
    read = asyncio.Event()

    async def refresh() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise StoreUnavailable("PostgreSQL did not answer in time")
        read.set()

    reading = asyncio.create_task(refresh_forever("the accounts", refresh, 0.0))
    async with asyncio.timeout(10):
        await read.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert [record.getMessage() for record in caplog.records] == [
        "the accounts could not be read: PostgreSQL did not answer in time"
    ]


async def test_a_defect_is_not_taken_for_a_store_that_is_away() -> None:
    async def refresh() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        await refresh_forever("the accounts", refresh, 0.0)
