"""What processes tell each other of breakers and of success, through a real Redis."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from gateway.domain.model import ConnectorAnswer, Delivery, Mode, OperationKind, Verdict
from gateway.routing.breakers import (
    BreakerKey,
    BreakerLimits,
    Breakers,
    BreakerState,
    ExchangeUnavailable,
    Report,
    ReportKind,
)
from gateway.routing.learning import Increment, SegmentKey
from gateway.routing.model import Candidate, Segment
from storage.redis import RedisBreakers, RedisClient, RedisCounts
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from storage.embedded import EmbeddedRedis

KEY = BreakerKey("psp", "acc_1", "card")
OPENED = Report(ReportKind.OPENED, KEY, 60.0, 2)
WANTS = Report(ReportKind.WANTS_PROBES, KEY, 60.0)


@pytest.fixture
async def client(redis: EmbeddedRedis) -> AsyncIterator[RedisClient]:
    opened = RedisClient(redis.url, timeout_ms=5000, connect_timeout_ms=5000)
    yield opened
    await opened.close()


@pytest.fixture
def key() -> str:
    return f"{{routing}}:test:{uuid.uuid4().hex}"


async def test_an_opening_is_known_to_all_until_it_is_closed(client: RedisClient, key: str) -> None:
    one, other = RedisBreakers(client, key), RedisBreakers(client, key)
    (told,) = await one.exchange([OPENED])
    (heard,) = await other.exchange([])
    assert (heard.key, heard.streak, heard.mine) == (KEY, 2, False)
    assert 0 < heard.remaining_s <= 60.0
    assert heard.version == told.version
    assert await other.exchange([Report(ReportKind.CLOSED, KEY, version=heard.version)]) == []


async def test_two_that_open_at_once_make_one_opening(client: RedisClient, key: str) -> None:
    one, other = RedisBreakers(client, key), RedisBreakers(client, key)
    (first,) = await one.exchange([OPENED])
    (second,) = await other.exchange([Report(ReportKind.OPENED, KEY, 20.0, 1)])
    assert second.version == first.version
    assert second.remaining_s > 20.0


async def test_a_close_of_an_earlier_opening_leaves_the_later_one(
    client: RedisClient, key: str
) -> None:
    one = RedisBreakers(client, key)
    (first,) = await one.exchange([Report(ReportKind.OPENED, KEY, 0.0, 1)])
    (second,) = await one.exchange([OPENED])
    assert second.version > first.version
    (left,) = await one.exchange([Report(ReportKind.CLOSED, KEY, version=first.version)])
    assert left.version == second.version


async def test_an_opening_lasts_no_longer_for_a_clock_that_was_set_back(
    client: RedisClient, key: str
) -> None:
    one, other = RedisBreakers(client, key), RedisBreakers(client, key)
    await one.exchange([OPENED])
    # As if it had been told an hour from now.
    name, told = await client.execute("HGETALL", key)
    version, ends, rest = told.decode().split(" ", 2)
    ahead = (str(int(number) + 3_600_000) for number in (version, ends))
    await client.execute("HSET", key, name, f"{' '.join(ahead)} {rest}")
    (first,) = await one.exchange([])
    (second,) = await other.exchange([])
    assert 0 < second.remaining_s <= first.remaining_s <= 60.0
    assert (second.version, second.streak) == (first.version, 2)
    assert await one.exchange([Report(ReportKind.CLOSED, KEY, version=first.version)]) == []


async def test_one_process_at_a_time_may_probe(client: RedisClient, key: str) -> None:
    one, other = RedisBreakers(client, key), RedisBreakers(client, key)
    (waiting,) = await one.exchange([OPENED, WANTS])
    assert not waiting.mine  # the pause is not over
    await client.execute("DEL", key)
    await one.exchange([Report(ReportKind.OPENED, KEY, 0.0, 1)])
    (first,) = await one.exchange([WANTS])
    (second,) = await other.exchange([WANTS])
    (again,) = await one.exchange([WANTS])
    assert (first.mine, second.mine, again.mine) == (True, False, True)


async def test_who_would_probe_what_another_has_closed_opens_nothing(
    client: RedisClient, key: str
) -> None:
    one, other = RedisBreakers(client, key), RedisBreakers(client, key)
    (opened,) = await one.exchange([Report(ReportKind.OPENED, KEY, 0.0, 1)])
    closed = Report(ReportKind.CLOSED, KEY, version=opened.version)
    assert await one.exchange([closed]) == []
    assert await other.exchange([WANTS._replace(version=opened.version)]) == []
    # Of what nobody was told, nobody can have closed it.
    (mine,) = await other.exchange([WANTS])
    assert mine.mine


class Unseen:
    """Implements BreakerObserver."""

    def breaker_changed(self, key: BreakerKey, state: BreakerState) -> None:
        """Nobody looks."""


async def test_processes_let_a_psp_that_is_well_again_be_well(
    client: RedisClient, key: str
) -> None:
    """What one has found out is not undone by the others' wish to find it out."""
    now, limits, psp = 0.0, BreakerLimits(), Candidate("psp", "acc_1")
    processes = [
        (Breakers(limits, Unseen(), lambda: now), RedisBreakers(client, key)) for _ in range(3)
    ]

    def call(breakers: Breakers, answer: ConnectorAnswer) -> bool:
        if breakers.admit(psp, "card") is not None:
            return False
        segment, kind = Segment("mer_1", Mode.TEST, "card"), OperationKind.AUTHORIZE
        breakers.observed(segment, psp, kind, answer, 0.0)
        return True

    for breakers, exchange in processes:
        await breakers.synchronize(exchange)
    for _ in range(limits.calls_min):
        call(processes[0][0], ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT))
    for breakers, exchange in processes:
        await breakers.synchronize(exchange)
    now += limits.pause_s_max
    # As if so much time had passed there, too.
    name, told = await client.execute("HGETALL", key)
    version, _, rest = told.decode().split(" ", 2)
    await client.execute("HSET", key, name, f"{version} {version} {rest}")
    well = ConnectorAnswer(Delivery.ANSWERED, Verdict.APPROVED)
    let_in = []
    for _ in range(6):
        now += 1.0
        for breakers, exchange in processes:
            let_in.append([call(breakers, well) for _ in range(limits.probes_good)])
            await breakers.synchronize(exchange)
    assert all(map(all, let_in[-9:])), let_in


async def test_a_field_that_is_none_of_ours_is_removed(client: RedisClient, key: str) -> None:
    await client.execute("HSET", key, "garbage", "garbage")
    assert await RedisBreakers(client, key).exchange([]) == []
    assert await client.execute("EXISTS", key) == 0


async def test_a_name_that_cannot_be_read_hides_no_other_breaker(
    client: RedisClient, key: str
) -> None:
    one, other = RedisBreakers(client, key), RedisBreakers(client, key)
    (told,) = await one.exchange([OPENED])
    _, value = await client.execute("HGETALL", key)
    newer = ['["psp","acc_1","card","more"]', '[["psp"],1,null]', '{"psp": "acc_1"}', '"psp"']
    garbage = b'["\xff","acc_1","card"]'
    await client.execute("HSET", key, "no name of ours", value, garbage, value)
    for name in newer:
        await client.execute("HSET", key, name, value)
    for _ in range(2):
        (heard,) = await other.exchange([])
        assert (heard.key, heard.version) == (KEY, told.version)
    # What may be a newer version's stays.
    assert await client.execute("HEXISTS", key, "no name of ours") == 0
    assert await client.execute("HEXISTS", key, newer[0]) == 1


async def test_counts_add_up_and_fade(client: RedisClient, key: str) -> None:
    counts = RedisCounts(client, key)
    segment: SegmentKey = ("mer_1", "TEST", "card")
    account = ("psp", "acc_1")
    told = {segment: [Increment(account, 6.0, 2.0)]}
    await counts.exchange(told, 1e6)
    totals = await counts.exchange({**told, ("mer_2",): []}, 1e6)
    (total,) = totals[segment]
    assert (total.successes, total.failures) == pytest.approx((12.0, 4.0), rel=1e-3)
    assert totals[("mer_2",)] == []
    name = f'{key}["mer_1","TEST","card"]'
    field = '["psp","acc_1"]'
    assert await client.execute("PTTL", name) > 0
    successes, failures, at = (await client.execute("HGET", name, field)).split()
    await client.execute("HSET", name, field, b"%s %s %d" % (successes, failures, int(at) - 10**6))
    ((faded,),) = (await counts.exchange({segment: []}, 1000.0)).values()
    assert (faded.successes, faded.failures) == pytest.approx((6.0, 2.0), rel=0.01)


@pytest.mark.parametrize("text", ["garbage", "inf 0 1", "0 nan 1", "-1 2 1", f"1{'0' * 400} 1 1"])
async def test_what_is_no_count_of_ours_counts_for_nothing(
    client: RedisClient, key: str, text: str
) -> None:
    counts = RedisCounts(client, key)
    segment: SegmentKey = ("mer_1", "TEST", "card")
    account = ("psp", "acc_1")
    await client.execute("HSET", f'{key}["mer_1","TEST","card"]', '["psp","acc_1"]', text)
    assert await counts.exchange({segment: []}, 1e6) == {segment: []}
    told = {segment: [Increment(account, 6.0, 2.0)]}
    assert await counts.exchange(told, 1e6) == told


async def test_an_account_that_cannot_be_read_hides_no_other_ones_counts(
    client: RedisClient, key: str
) -> None:
    counts = RedisCounts(client, key)
    segment: SegmentKey = ("mer_1", "TEST", "card")
    told = {segment: [Increment(("psp", "acc_1"), 6.0, 2.0)]}
    assert await counts.exchange(told, 1e6) == told
    for name in ("no name of ours", b'["\xff","acc_1"]', '["psp","acc_1","more"]', '[["psp"],1]'):
        await client.execute("HSET", f'{key}["mer_1","TEST","card"]', name, "1 1 1")
    ((total,),) = (await counts.exchange({segment: []}, 1e6)).values()
    assert total.account == ("psp", "acc_1")
    assert (total.successes, total.failures) == pytest.approx((6.0, 2.0), rel=1e-3)


async def test_a_redis_that_is_away_is_told_as_such() -> None:
    client = RedisClient(f"redis://127.0.0.1:{free_port()}", timeout_ms=500, connect_timeout_ms=500)
    with pytest.raises(ExchangeUnavailable):
        await RedisBreakers(client).exchange([])
    with pytest.raises(ExchangeUnavailable):
        await RedisCounts(client).exchange({("mer_1",): []}, 60.0)
    await client.close()
