"""Notifications in PostgreSQL: kept once each, leased, finished, and which of them counts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from gateway.application.notifications import (
    Applied,
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    Received,
    Result,
)
from gateway.domain.ids import new_connector_account_id, new_merchant_id
from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    Mode,
    Outcome,
    ResponseCode,
    Verdict,
)
from gateway.domain.states import Event
from storage.postgres import LaneLimits, PostgresStore
from storage.postgres.notifications import notification_json, notification_of
from storage.postgres.queries import Query
from tests.servers import fetch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    async with PostgresStore(dsn, notifications=LaneLimits(connections=2)) as opened:
        yield opened


def received(event_id: str = "evt_1", verdict: Verdict = Verdict.APPROVED) -> Received:
    notification = Notification(
        connector="stripe",
        event_id=event_id,
        event_type="refund.updated",
        kind=NotificationKind.REFUND,
        occurred_at=AT,
        mode=Mode.TEST,
        reference="op_1-1",
        answer=ConnectorAnswer(
            Delivery.ANSWERED,
            verdict,
            Outcome(response_code=ResponseCode.APPROVED, amount_reported_minor=5),
            connector_transaction_id="re_1",
        ),
        amount_minor=5,
        currency="EUR",
    )
    return Received(new_merchant_id(), new_connector_account_id(), notification)


def of_same_account(one: Received, event_id: str, verdict: Verdict, after_s: float) -> Received:
    notification = replace(
        received(event_id, verdict).notification, occurred_at=AT + timedelta(seconds=after_s)
    )
    return replace(one, notification=notification)


def test_a_notification_is_read_as_it_was_written() -> None:
    one = received().notification
    assert notification_of(notification_json(one)) == one
    disputed = Notification(
        "stripe",
        "evt_2",
        "charge.dispute.created",
        NotificationKind.DISPUTE,
        dispute=Dispute("dp_1", DisputeStage.ACTIVE_DISPUTE, DisputeStatus.OPENED, "fraudulent"),
    )
    assert notification_of(notification_json(disputed)) == disputed


async def test_an_event_that_comes_often_and_at_once_is_kept_once(store: PostgresStore) -> None:
    one = received()
    new = await asyncio.gather(*(store.notifications.keep([one]) for _ in range(50)))
    assert sum(new) == 1
    assert await store.notifications.keep([one, one]) == 0
    [leased] = await store.notifications.lease(10, 60)
    assert leased.received == one
    assert leased.tries == 0


async def test_the_same_event_id_of_another_account_is_another_event(store: PostgresStore) -> None:
    one, other = received(), received()
    assert await store.notifications.keep([one, other]) == 2


async def test_what_is_leased_is_nobody_elses_until_the_lease_ends(store: PostgresStore) -> None:
    one = received()
    await store.notifications.keep([one])
    leases = await asyncio.gather(*(store.notifications.lease(10, 60) for _ in range(8)))
    assert sum(len(each) for each in leases) == 1
    await store.notifications.put_off(one, 0)
    [again] = await store.notifications.lease(10, 0)
    assert again.tries == 1
    [expired] = await store.notifications.lease(10, 60)
    assert expired.tries == 2


async def test_one_that_cannot_be_read_holds_up_no_other(store: PostgresStore, dsn: str) -> None:
    await store.notifications.keep([received(f"evt_{n}") for n in range(3)])
    newer = """
        UPDATE notifications SET content = content || '{"of_a_newer_version": 1}'
        WHERE event_id = 'evt_1' RETURNING 1
    """
    fetch(dsn, newer)
    leased = await store.notifications.lease(10, 60.0)
    assert {each.received.notification.event_id for each in leased} == {"evt_0", "evt_2"}


async def test_one_that_cannot_be_read_is_shown_and_hides_no_other(
    store: PostgresStore, dsn: str
) -> None:
    one = received()
    other = of_same_account(one, "evt_2", Verdict.APPROVED, 1)
    await store.notifications.keep([one, other])
    newer = """
        UPDATE notifications
        SET content = content || '{"of_a_newer_version": 1}', kind = 99, result = 98
        WHERE event_id = 'evt_1' RETURNING 1
    """
    fetch(dsn, newer)
    listed = await store.notifications.list(one.merchant_id, limit=5)
    assert {(each.event_id, each.kind, each.result) for each in listed} == {
        ("evt_1", "99", "98"),
        ("evt_2", "REFUND", ""),
    }
    [found] = await store.notifications.find(one.merchant_id, "evt_1")
    assert found.content["of_a_newer_version"] == 1
    assert await store.notifications.apply_again(one.merchant_id, "evt_1")


async def test_no_account_has_more_at_work_than_its_share_and_hides_nobody(
    store: PostgresStore,
) -> None:
    many = [received(event_id=f"evt_many_{number}") for number in range(1, 8)]
    many = [replace(each, connector_account_id="acc_many") for each in many]
    for each in many:
        await store.notifications.keep([each])
    other = received(event_id="evt_other")
    await store.notifications.keep([other])
    first = await store.notifications.lease(4, 0, account_max=3)
    at_work = [each.received for each in first]
    assert [each in many for each in at_work] == [True, True, True, False]
    # With them at work the account has no place left, and with one of them two.
    assert not await store.notifications.lease(4, 60, account_max=3, at_work=at_work)
    again = await store.notifications.lease(4, 60, account_max=3, at_work=[at_work[0], other])
    assert len(again) == 2
    assert at_work[0] not in [each.received for each in again]


async def test_an_event_that_is_worked_on_holds_up_none_of_its_name_at_another_account(
    store: PostgresStore,
) -> None:
    one, other = received(), received()
    await store.notifications.keep([one])
    [first] = await store.notifications.lease(10, 0)
    await store.notifications.keep([other])
    leased = await store.notifications.lease(10, 60, at_work=[first.received])
    assert [each.received for each in leased] == [other]


async def test_what_is_finished_is_shown_and_not_leased_again(store: PostgresStore) -> None:
    one = received()
    await store.notifications.keep([one])
    assert (await store.notifications.count_pending()).notifications == 1
    await store.notifications.lease(10, 0)
    await store.notifications.finish(one, Applied(Result.APPLIED, "pay_1", "op_1"))
    assert not await store.notifications.lease(10, 60)
    assert (await store.notifications.count_pending()).notifications == 0
    [kept] = await store.notifications.list(one.merchant_id, limit=5)
    assert (kept.event_id, kept.result, kept.payment_id) == ("evt_1", "APPLIED", "pay_1")
    assert notification_of(orjson.dumps(kept.content).decode()) == one.notification
    assert not await store.notifications.list(new_merchant_id(), limit=5)
    assert await store.notifications.apply_again(one.merchant_id, "evt_1")
    assert not await store.notifications.apply_again(new_merchant_id(), "evt_1")
    [leased] = await store.notifications.lease(10, 60)
    assert leased.received == one


async def test_those_of_a_rare_result_are_looked_for_in_parts_of_the_list(
    store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = received("evt_0")
    for number in range(9):
        await store.notifications.keep([of_same_account(one, f"evt_{number}", Verdict.FAILED, 0)])
    # Two at a time were received in one moment, and the parts are of three.
    fetch(
        dsn,
        "UPDATE notifications SET received_at = timestamptz '2026-03-01'"
        " - right(event_id, 1)::int / 2 * interval '1 second',"
        " result = CASE WHEN event_id IN ('evt_3', 'evt_4', 'evt_8') THEN 5 ELSE 2 END RETURNING 1",
    )
    monkeypatch.setattr("storage.postgres.notifications.LIST_SCAN_MAX", 3)
    looked_at: list[int] = []
    fetched = store.notifications._lane.fetch

    async def counted(statement: Query, /, **values: Any) -> Any:
        if "received_from" in values:
            in_part = fetch(
                dsn,
                "SELECT count(*) FROM notifications WHERE received_at >="
                " coalesce($1::timestamptz, '-infinity')"
                " AND received_at < coalesce($2::timestamptz, 'infinity')",
                values["received_from"],
                values["received_before"],
            )
            looked_at.append(in_part[0][0])
        return await fetched(statement, **values)

    monkeypatch.setattr(store.notifications._lane, "fetch", counted)
    for limit, parts in ((2, [4, 4]), (5, [4, 4, 1])):
        found = await store.notifications.list(
            one.merchant_id, limit=limit, result=Result.UNMATCHED
        )
        assert [each.event_id for each in found] == ["evt_3", "evt_4", "evt_8"][:limit]
        assert looked_at == parts
        looked_at.clear()


async def test_of_the_events_of_one_attempt_the_latest_counts(store: PostgresStore) -> None:
    one = received()
    pending = of_same_account(one, "evt_2", Verdict.PENDING, 1)
    bounced = of_same_account(one, "evt_3", Verdict.FAILED, 2)
    at_once = of_same_account(one, "evt_4", Verdict.APPROVED, 2)
    unordered = replace(one, notification=replace(one.notification, occurred_at=None))
    is_outdated = store.notifications.is_outdated
    await store.notifications.keep([one, pending])
    assert not await is_outdated(one, Event.APPROVED)
    await store.notifications.keep([bounced, at_once])
    assert await is_outdated(one, Event.APPROVED)
    assert not await is_outdated(bounced, Event.FAILED)
    assert await is_outdated(at_once, Event.APPROVED)
    assert not await is_outdated(unordered, Event.APPROVED)


@pytest.mark.parametrize("transaction_id", ["re_2", ""])
async def test_under_one_reference_the_psps_ids_tell_things_apart(
    store: PostgresStore, transaction_id: str
) -> None:
    one = received()
    assert one.notification.answer is not None
    answer = replace(one.notification.answer, connector_transaction_id=transaction_id)
    other = replace(one, notification=replace(one.notification, event_id="evt_2", answer=answer))
    failed = of_same_account(one, "evt_3", Verdict.FAILED, 1)
    await store.notifications.keep([one, other, failed])
    is_outdated = store.notifications.is_outdated
    assert await is_outdated(other, Event.APPROVED)
    assert not await is_outdated(other, Event.APPROVED, by_id=True)
    assert await is_outdated(one, Event.APPROVED, by_id=True)


@pytest.mark.parametrize("end", [Verdict.APPROVED, Verdict.EXPIRED])
async def test_an_approval_is_outdated_by_an_end_of_its_payment_unless_it_is_newer(
    store: PostgresStore, end: Verdict
) -> None:
    def told(event_id: str, verdict: Verdict, after_s: float, **more: Any) -> Received:
        made = of_same_account(one, event_id, verdict, after_s)
        return replace(one, notification=replace(made.notification, **more))

    one = received()
    of_void = {"kind": NotificationKind.VOID, "reference": "", "payment_reference": "op_1-1"}
    approval = told("evt_1", Verdict.APPROVED, 0, kind=NotificationKind.AUTHORIZATION)
    is_outdated = store.notifications.is_outdated
    await store.notifications.keep([approval, told("evt_2", Verdict.FAILED, 9, **of_void)])
    assert not await is_outdated(approval, Event.APPROVED)  # what did not end it
    await store.notifications.keep([told("evt_3", end, 5, **of_void)])
    for after_s, expected in ((4, True), (5, True), (6, False)):
        at = told("evt_4", Verdict.APPROVED, after_s, kind=NotificationKind.AUTHORIZATION)
        assert await is_outdated(at, Event.APPROVED) is expected
