"""Redis flushed, killed, stopped, or forgetting at once: one charge for each key, nothing lost."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from storage.embedded import free_port
from tests.faults.checker import Client, check, settled
from tests.faults.transports import TRANSPORTS
from tests.harness import (
    authorize_request,
    bytes_without_replay,
    calling,
    eventually,
    running_system,
)
from tests.servers import redis_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

KEYS = 20
DUPLICATES = 3

profiles = pytest.mark.parametrize("profile", ["idempotent", "non_idempotent"])


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    """A Redis that the test may do everything to."""
    with redis_server() as server:
        yield server


async def _flush(redis: EmbeddedRedis) -> None:
    async with Redis.from_url(redis.url) as client:
        await client.flushall()


async def _kill(redis: EmbeddedRedis) -> None:
    await asyncio.to_thread(redis.kill)


async def _kill_and_restart(redis: EmbeddedRedis) -> None:
    await _kill(redis)
    redis.start()
    async with Redis.from_url(redis.url) as client:
        assert await client.dbsize() == 0


async def _pause(redis: EmbeddedRedis) -> None:
    await asyncio.to_thread(redis.pause)


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found is not None, f"no metric {name}"
    return float(found[1])


def _redis_is_up(port: int) -> bool:
    return _metric(port, "gateway_redis_up") == 1


async def _load(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    profile: str,
    fault: Callable[[EmbeddedRedis], Awaitable[None]] | None,
    *,
    away: bool = False,
    **settings: object,
) -> None:
    """Calls at the PSP, the fault, their duplicates and new calls; then every key once more."""
    with running_system(
        postgres,
        redis,
        profile=profile,
        send_window_s=30,  # however long the machine stands still
        simulator_answer_timeout_s=60,
        **settings,
    ) as system:
        ports = [free_port() for _ in TRANSPORTS]
        gateways = [
            system.start_gateway(
                transport=transport,
                trusted_front=True,
                metrics_address=f"127.0.0.1:{port}",
                waiters_per_key_max=1000,
            )
            for port, transport in zip(ports, TRANSPORTS, strict=True)
        ]
        first = [authorize_request() for _ in range(KEYS)]
        later = [authorize_request() for _ in range(KEYS)]
        async with AsyncExitStack() as stack:
            client = Client(
                *[
                    await stack.enter_async_context(calling(gateway, system.shop.api_key))
                    for gateway in gateways
                ]
            )
            control = system.control
            stack.push_async_callback(control.close)
            await control.hold()
            at_psp = asyncio.ensure_future(client.authorize_all(first))
            await control.await_held(KEYS)
            if fault is not None:
                await fault(redis)
            repeats = asyncio.ensure_future(client.authorize_all([*first, *later] * DUPLICATES))
            await control.await_held(2 * KEYS)
            await control.release()
            await asyncio.gather(at_psp, repeats)
            for port in ports if away else ():
                assert _metric(port, "gateway_redis_unavailable_total") > 0
                assert not _redis_is_up(port)
            if away:
                if not redis.running:
                    redis.start()
                redis.resume()
                for port in ports:
                    await eventually(partial(_redis_is_up, port), "the gateway sees Redis again")
            again = await client.authorize_all([*first, *later])
            assert all(answer.replay.replayed for answer in again)
        for answers in client.told.values():
            assert len({bytes_without_replay(answer) for answer in answers}) == 1
            assert sum(not answer.replay.replayed for answer in answers) <= 1
        sends = Counter(record["reference"] for record in system.simulator.received())
        assert len(sends) == 2 * KEYS
        assert set(sends.values()) == {1}, "a duplicate reached the PSP"
        await settled(system)
        check(system, client)


@profiles
async def test_flushall_under_load_leaves_one_charge_for_each_key(
    postgres: PostgresForTests, own_redis: EmbeddedRedis, profile: str
) -> None:
    await _load(postgres, own_redis, profile, _flush)


@profiles
async def test_a_redis_killed_and_restarted_empty_leaves_one_charge_for_each_key(
    postgres: PostgresForTests, own_redis: EmbeddedRedis, profile: str
) -> None:
    await _load(postgres, own_redis, profile, _kill_and_restart)


@profiles
async def test_postgresql_decides_while_redis_is_dead_and_metrics_say_so(
    postgres: PostgresForTests, own_redis: EmbeddedRedis, profile: str
) -> None:
    await _load(postgres, own_redis, profile, _kill, away=True)


@profiles
async def test_postgresql_decides_while_redis_is_stopped_and_metrics_say_so(
    postgres: PostgresForTests, own_redis: EmbeddedRedis, profile: str
) -> None:
    await _load(postgres, own_redis, profile, _pause, away=True)


@profiles
async def test_claims_that_live_for_1_ms_leave_one_charge_for_each_key(
    postgres: PostgresForTests, own_redis: EmbeddedRedis, profile: str
) -> None:
    await _load(postgres, own_redis, profile, None, claim_life_ms=1)


async def test_a_redis_that_is_away_is_told_by_a_metric_also_where_no_call_comes(
    postgres: PostgresForTests, own_redis: EmbeddedRedis
) -> None:
    port = free_port()
    with running_system(postgres, own_redis) as system:
        await system.start_gateway(metrics_address=f"127.0.0.1:{port}").serving()
        assert _redis_is_up(port)
        await _kill(own_redis)
        await eventually(lambda: not _redis_is_up(port), "the metric says that Redis is away")
        own_redis.start()
        await eventually(lambda: _redis_is_up(port), "the metric says that Redis is back")
