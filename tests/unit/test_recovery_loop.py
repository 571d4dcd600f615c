"""gateway.application.recovery: its loop, and what one failure or one PSP that hangs holds up."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from gateway.application import outcomes
from gateway.application.ports import StoreUnavailable
from gateway.domain.model import (
    ConnectorAnswer,
    NextAction,
    OperationKind,
    OperationState,
    Verdict,
)
from tests.memory_store import (
    ACTION_MARGIN_S,
    ACTION_TIMEOUT_S,
    FIRST_CHECK_S,
    LEASE_S,
    LOST,
    NO_ANSWER,
    SCHEDULE,
    TAKEOVER_S,
    Bench,
    Gate,
    ManyRoutes,
    ScriptedConnector,
    Step,
    answered,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

S = OperationState
WAIT_S = 30.0
"""What is waited for here happens, or the rule is broken."""
SELDOM = replace(SCHEDULE, interval_s=3600.0, search_interval_s=3600.0)
"""Nothing comes by its interval within a test."""
QUICK = replace(SCHEDULE, interval_s=0.001, concurrency_max=6, account_concurrency_max=4)


class Hanging(ScriptedConnector):
    """A PSP that answers no question until its gate is opened; but those of `answers` at once."""

    def __init__(self, name: str = "hanging") -> None:
        super().__init__(name=name)
        self.gate = Gate()
        self.answers: set[str] = set()
        self.asked: list[str] = []

    async def query(self, kind: OperationKind, reference: str, *more: Any) -> Any:
        self.asked.append(reference)
        if reference not in self.answers:
            await self.gate.wait()
        return await super().query(kind, reference, *more)


async def doubts(gateway: Bench, connector: ScriptedConnector, *keys: str) -> None:
    """Authorizations whose answers were lost, all of them due."""
    for key in keys:
        connector.steps.append(LOST)
        await gateway.payments.authorize(gateway.authorize(key))
    gateway.store.advance(FIRST_CHECK_S)


@asynccontextmanager
async def recovering(gateway: Bench) -> AsyncIterator[None]:
    task = asyncio.create_task(gateway.recovery.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 - of the store's rows nobody tells
            await asyncio.sleep(0)


async def settled(gateway: Bench, *keys: str) -> None:
    await until(lambda: all(gateway.store.by_key(key).state is S.SUCCEEDED for key in keys))


async def asked(connector: Hanging, times: int) -> None:
    await until(lambda: len(connector.asked) >= times)


SEARCH_FAILED = "recovery could not search for what dead senders left: "


async def no_search(limit: int) -> int:
    raise StoreUnavailable("canceling statement due to statement timeout")


@asynccontextmanager
async def looks(gateway: Bench) -> AsyncIterator[list[int]]:
    """How many each look for work has found, or -1 where it failed, while the loop runs."""
    found: list[int] = []
    lease = gateway.store.lease

    async def counted(*given: Any, **named: Any) -> Any:
        found.append(-1)
        leases = await lease(*given, **named)
        found[-1] = len(leases)
        return leases

    gateway.store.lease = counted  # type: ignore[method-assign]
    async with recovering(gateway):
        yield found


async def turns() -> None:
    """So many turns of the event loop that whoever does not wait has gone on."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_a_look_that_fails_is_counted_and_waits_for_its_interval() -> None:
    gateway = Bench(schedule=SELDOM)

    async def away(method: str) -> None:
        await asyncio.sleep(0)
        if method == "lease":
            raise StoreUnavailable("the database is away")

    gateway.store.before = away
    async with looks(gateway) as found:
        await turns()
        assert found == [-1]
    assert gateway.counts.failures == 1


async def test_where_all_that_was_asked_for_is_found_more_is_looked_for_at_once() -> None:
    hanging = Hanging()
    gateway = Bench(hanging, schedule=replace(SELDOM, batch_max=1, account_concurrency_max=3))
    await doubts(gateway, hanging, "a", "b")
    async with looks(gateway) as found:
        await asked(hanging, 2)
        await turns()
        assert found == [1, 1, 0]


async def test_while_every_place_is_taken_nothing_is_looked_for() -> None:
    hanging = Hanging()
    gateway = Bench(hanging, schedule=replace(SELDOM, concurrency_max=2))
    await doubts(gateway, hanging, "a", "b", "c")
    async with looks(gateway) as found:
        await asked(hanging, 2)
        await turns()
        assert found == [2]
        hanging.answers = {gateway.store.by_key("c").reference}
        hanging.gate.opened.set()
        await settled(gateway, "a", "b", "c")


def searches(gateway: Bench, *found: int) -> list[int]:
    """The limit of each search, of which the first ones find so many."""
    limits: list[int] = []

    async def expired(limit: int) -> int:
        await asyncio.sleep(0)
        limits.append(limit)
        return found[len(limits) - 1] if len(limits) <= len(found) else 0

    gateway.store.expired = expired  # type: ignore[method-assign]
    return limits


async def test_a_search_that_found_all_that_it_may_goes_on_at_once() -> None:
    gateway = Bench(schedule=replace(SELDOM, batch_max=2))
    searched = searches(gateway, 2, 2, 1)
    async with recovering(gateway):
        await turns()
    assert searched == [2, 2, 2]


async def test_a_search_comes_again_after_its_interval() -> None:
    gateway = Bench(schedule=replace(QUICK, search_interval_s=0.001))
    searched = searches(gateway)
    async with recovering(gateway):
        await until(lambda: len(searched) == 3)


async def test_searches_are_never_nearer_than_looks() -> None:
    gateway = Bench(schedule=replace(SELDOM, search_interval_s=0.0))
    searched = searches(gateway)
    async with recovering(gateway):
        await turns()
    assert len(searched) == 1


async def test_what_a_search_finds_is_looked_at_at_once() -> None:
    gateway = Bench(schedule=SELDOM)
    gate = Gate()
    gateway.connector.steps.append(Step(after=gate))
    call = asyncio.create_task(gateway.payments.authorize(gateway.authorize()))
    await gate.reached.wait()
    gateway.store.advance(TAKEOVER_S + 1)
    searched = gateway.store.expired

    async def after_the_first_look(limit: int) -> int:
        await turns()
        return await searched(limit)

    gateway.store.expired = after_the_first_look  # type: ignore[method-assign]
    async with looks(gateway) as found:
        await settled(gateway, "a")
        assert found[:2] == [0, 1]
    gate.opened.set()
    await call


@pytest.mark.parametrize("form", ["a round", "the loop"])
async def test_a_search_that_fails_is_told_and_stops_nothing_that_is_listed(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Bench(schedule=QUICK)
    await doubts(gateway, gateway.connector, "a")
    gateway.store.expired = no_search  # type: ignore[method-assign]
    if form == "a round":
        assert await gateway.recovery.run_once() == 1
    else:
        async with recovering(gateway):
            await settled(gateway, "a")
    assert gateway.store.by_key("a").state is S.SUCCEEDED
    assert gateway.counts.failures > 0
    record = caplog.records[0]
    assert record.getMessage() == SEARCH_FAILED + "canceling statement due to statement timeout"
    assert not record.exc_info


async def test_a_defect_of_a_search_is_told_with_its_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gateway = Bench()

    async def broken(limit: int) -> int:
        raise ValueError(limit)

    gateway.store.expired = broken  # type: ignore[method-assign]
    await gateway.recovery.run_once()
    [record] = caplog.records
    assert record.getMessage().startswith(SEARCH_FAILED)
    assert record.exc_info


@pytest.mark.parametrize("error", [StoreUnavailable("away"), ValueError("a defect")])
async def test_an_operation_that_could_not_be_settled_is_counted_and_named(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Bench()
    await doubts(gateway, gateway.connector, "a")

    async def broken(method: str) -> None:
        await asyncio.sleep(0)
        if method == "write_change":
            raise error

    gateway.store.before = broken
    await gateway.recovery.run_once()
    assert (gateway.counts.failures, gateway.counts.recovered_states) == (1, {})
    [record] = caplog.records
    told = vars(record)
    operation = gateway.store.by_key("a")
    assert (told["merchant_id"], told["payment_id"], told["operation_id"]) == (
        operation.merchant_id,
        operation.payment_id,
        operation.operation_id,
    )
    # That the database is away is no defect, and has no stack.
    assert bool(record.exc_info) is isinstance(error, ValueError)


async def test_what_each_look_at_an_operation_finds_is_counted() -> None:
    gateway = Bench()
    await doubts(gateway, gateway.connector, "a")
    gateway.connector.asks.append(NO_ANSWER)
    await gateway.recover(rounds=2)
    assert gateway.counts.recovered_states == {S.IN_DOUBT: 1, S.SUCCEEDED: 1}


async def test_an_account_whose_psp_hangs_takes_its_share_of_the_places_and_no_more() -> None:
    hanging, other = Hanging(), ScriptedConnector(name="other")
    routes = ManyRoutes(hanging, other)
    gateway = Bench(hanging, router=routes, schedule=QUICK)
    await doubts(gateway, hanging, *(f"h{n}" for n in range(20)))
    routes.disabled.add("acc_hanging")
    async with recovering(gateway):
        await asked(hanging, QUICK.account_concurrency_max)
        await doubts(gateway, other, *(f"o{n}" for n in range(8)))
        await settled(gateway, *(f"o{n}" for n in range(8)))
        assert len(hanging.asked) == QUICK.account_concurrency_max
        # And nothing else was taken that could not begin.
        leased = [row for row in gateway.store.doubts.values() if row.lease_until is not None]
        assert len(leased) == QUICK.account_concurrency_max
        hanging.gate.opened.set()
        await settled(gateway, *(f"h{n}" for n in range(20)))


async def test_a_place_that_comes_free_is_filled_again_while_another_hangs() -> None:
    hanging = Hanging()
    gateway = Bench(hanging, schedule=replace(QUICK, concurrency_max=2))
    keys = [f"h{n}" for n in range(10)]
    await doubts(gateway, hanging, *keys)
    hanging.answers = {gateway.store.by_key(key).reference for key in keys[1:]}
    async with recovering(gateway):
        await settled(gateway, *keys[1:])
        assert gateway.store.by_key(keys[0]).state is S.IN_DOUBT


async def test_what_this_gateway_is_at_work_on_it_does_not_take_over_from_itself() -> None:
    """A PSP that hangs for longer than the lease would be asked for ever, and nobody hear it."""
    hanging = Hanging()
    gateway = Bench(hanging, schedule=QUICK)
    await doubts(gateway, hanging, "a")
    async with recovering(gateway):
        await asked(hanging, 1)
        epoch = gateway.store.by_key("a").epoch
        gateway.store.advance(LEASE_S + 1)
        await doubts(gateway, hanging, "b")
        await asked(hanging, 2)
        assert gateway.store.by_key("a").epoch == epoch
        hanging.gate.opened.set()
        await settled(gateway, "a", "b")
    assert len(hanging.asked) == 2


async def test_a_customers_time_is_judged_by_the_databases_clock_before_any_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Bench()
    needs_action: ConnectorAnswer = replace(
        answered(Verdict.REQUIRES_ACTION), next_action=NextAction("https://psp.example/")
    )
    first.store.now = datetime.now(UTC)
    first.pass_time(0)
    first.connector.steps.append(Step(decides=needs_action))
    await first.payments.authorize(first.authorize())

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=ACTION_TIMEOUT_S + ACTION_MARGIN_S + 60)

    monkeypatch.setattr(outcomes, "datetime", Ahead)
    # A gateway that has had no call yet, on a machine whose clock is ahead.
    other = Bench(first.connector, store=first.store)
    first.store.advance(2 * FIRST_CHECK_S)
    assert await other.recovery.run_once() == 1
    assert first.store.by_key("a").state is S.REQUIRES_ACTION
    assert not first.connector.canceled
