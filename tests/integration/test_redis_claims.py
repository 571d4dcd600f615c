"""Idempotency claims against a real Redis: what it answers, and what it costs when it is away."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from gateway.application.accounts import RateLimit
from gateway.application.ports import ClaimOutcome, ClaimResult
from storage.batching import LINGER_MS_CAP, NoLaneMetrics
from storage.redis import Claims, RedisAway, RedisClient, RedisRefused
from storage.redis import claims as claims_module
from tests.pumping import pump
from tests.servers import free_port, redis_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from storage.embedded import EmbeddedRedis

HANG_S = 30.0
"""A wait that takes so long hangs; no rule is tested by this time."""

GENERATION = "7512345678901234567-1"
MERCHANT = "m_1"
KEY = "order 1"
FINGERPRINT = b"\x01" + bytes(31)
RESPONSE = b"\x00frozen\xff"

NEW, IN_FLIGHT, REPLAY, CONFLICT, RATE_LIMITED, UNAVAILABLE = ClaimOutcome
KEY_NUMBERS = itertools.count()
SLOW = RateLimit(per_s=0.003, burst=3)
"""No test lasts as long as this takes for one more call: 333.333 s."""
INTERVAL_US = 1e6 / SLOW.per_s
LIMIT_KEY = f"{{b0}}:rate:{MERCHANT}"


@dataclass
class Recorder(NoLaneMetrics):
    answered: Counter[ClaimOutcome] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    circuit: list[bool] = field(default_factory=list)
    batches: Counter[str] = field(default_factory=Counter)

    def batch_sent(self, lane: str, rows: int, wait_s_of_oldest: float) -> None:
        self.batches[lane] += 1

    def claims_answered(self, outcome: ClaimOutcome, claims: int) -> None:
        self.answered[outcome] += claims

    def settlements_dropped(self, reason: str, settlements: int) -> None:
        self.dropped[reason] += settlements

    def redis_available(self, available: bool) -> None:
        self.circuit.append(available)


@dataclass
class Rig:
    """Claims as a gateway has them, a client that looks at Redis, and the metrics."""

    claims: Claims
    redis: Redis
    metrics: Recorder

    async def claim(
        self,
        key: str = KEY,
        merchant_id: str = MERCHANT,
        fingerprint: bytes = FINGERPRINT,
        limit: RateLimit | None = None,
    ) -> ClaimResult:
        return await self.claims.claim(merchant_id, key, fingerprint, limit)

    async def outcomes(
        self, count: int, limit: RateLimit | None, merchant_id: str = MERCHANT
    ) -> list[ClaimOutcome]:
        """Of as many new claims, in one batch."""
        claims = (
            self.claim(f"key-{next(KEY_NUMBERS)}", merchant_id, limit=limit) for _ in range(count)
        )
        return [result.outcome for result in await asyncio.gather(*claims)]

    def cache(self, response: bytes = RESPONSE, key: str = KEY, **changes: Any) -> None:
        parts = {"fingerprint": FINGERPRINT, "first_request_id": "req_1", "response": response}
        self.claims.cache(MERCHANT, key, **(parts | changes))

    async def keys(self) -> list[bytes]:
        return [key for key in await self.redis.keys() if isinstance(key, bytes)]

    async def settled(self) -> None:
        """Until everything that was to be released or cached is."""
        lane = self.claims._settle_lane
        await until(lambda: lane.depth == 0 and lane.in_flight == 0)


async def until(condition: Callable[[], Any]) -> None:
    """Poll until the condition holds; it may be a coroutine function's."""
    async with asyncio.timeout(HANG_S):
        while True:
            held = condition()
            if await held if inspect.isawaitable(held) else held:
                return
            await asyncio.sleep(0.001)


@asynccontextmanager
async def rig_on(
    own_redis: EmbeddedRedis, *, flush: bool = True, url: str = "", **options: Any
) -> AsyncIterator[Rig]:
    """A rig, its claims by `url` where there is one. Its time-outs are so long that only a server
    that is away meets them.
    """
    metrics = Recorder()
    client = RedisClient(url or own_redis.url, timeout_ms=10_000, connect_timeout_ms=10_000)
    looking = Redis.from_url(own_redis.url)
    defaults = {
        "buckets": 1,
        "claim_life_ms": 600_000,
        "cache_life_s": 600,
        "timeout_ms": 10_000,
        "retry_after_ms": 5,
        "settle_linger_ms_max": 0,
    }
    claims = Claims(client, metrics=metrics, **(defaults | options))
    claims.set_generation(GENERATION)
    try:
        if flush:
            await looking.flushall()
        await claims.start()
        yield Rig(claims, looking, metrics)
    finally:
        await claims.close()
        await client.close()
        await looking.aclose()


async def test_first_claim_is_new_and_the_second_one_is_in_flight(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        first = await rig.claim()
        assert first.outcome is NEW
        assert len(first.nonce) == 16
        assert first.generation == GENERATION
        assert await rig.claim() == ClaimResult(IN_FLIGHT, generation=GENERATION)


async def test_bare_claim_is_in_flight_whatever_the_payload(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim()
        assert (await rig.claim(fingerprint=b"another")).outcome is IN_FLIGHT


async def test_frozen_response_is_replayed_byte_for_byte(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim()
        rig.cache()
        await rig.settled()
        assert await rig.claim() == ClaimResult(
            REPLAY, generation=GENERATION, response=RESPONSE, first_request_id="req_1"
        )


async def test_another_payload_conflicts_with_a_frozen_response(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        rig.cache()
        await rig.settled()
        for fingerprint in (b"", FINGERPRINT[:-1], FINGERPRINT + b"\x00", b"\x02" + bytes(31)):
            assert await rig.claim(fingerprint=fingerprint) == ClaimResult(
                CONFLICT, generation=GENERATION, first_request_id="req_1"
            )


async def test_one_batch_answers_each_key_with_its_own_outcome(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim("taken")
        rig.cache()
        await rig.settled()
        batches = rig.metrics.batches["redis-claim"]
        results = await asyncio.gather(
            rig.claim("free"),
            rig.claim(),
            rig.claim("taken"),
            rig.claim(fingerprint=b"another"),
            rig.claim("free"),
        )
        outcomes = [result.outcome for result in results]
        assert outcomes == [NEW, REPLAY, IN_FLIGHT, CONFLICT, IN_FLIGHT]
        assert rig.metrics.batches["redis-claim"] == batches + 1
        assert rig.metrics.answered == {NEW: 2, REPLAY: 1, IN_FLIGHT: 2, CONFLICT: 1}


async def test_merchants_never_meet_under_the_same_key(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        assert (await rig.claim(merchant_id="m_1")).outcome is NEW
        assert (await rig.claim(merchant_id="m_2")).outcome is NEW


async def test_claim_that_meets_its_own_nonce_has_won(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_on(own_redis) as rig:
        send = rig.claims._client.execute
        answers = []

        async def lose_the_first_answer(*command: Any, **options: Any) -> Any:
            answers.append(await send(*command, **options))
            if len(answers) == 1:
                raise RedisAway
            return answers[-1]

        monkeypatch.setattr(rig.claims._client, "execute", lose_the_first_answer)
        assert (await rig.claim()).outcome is NEW
        assert answers == [[b"N"], [b"N"]]
        assert (await rig.claim()).outcome is IN_FLIGHT


async def test_thousand_concurrent_claims_of_one_key_give_exactly_one_new(
    own_redis: EmbeddedRedis,
) -> None:
    async with (
        rig_on(own_redis, rows_max=64, in_flight_max=4) as one,
        rig_on(own_redis, flush=False, rows_max=7) as other,
    ):
        results = await asyncio.gather(*((one, other)[i % 2].claim() for i in range(1_000)))
        assert Counter(result.outcome for result in results) == {NEW: 1, IN_FLIGHT: 999}


async def test_release_frees_the_key_for_the_next_claim(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        first = await rig.claim()
        rig.claims.release(MERCHANT, KEY, first.nonce, generation=first.generation)
        await rig.settled()
        second = await rig.claim()
        assert second.outcome is NEW
        assert second.nonce != first.nonce


async def test_release_never_deletes_another_owners_claim(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        late = await rig.claim()
        await rig.redis.flushall()
        owner = await rig.claim()
        rig.claims.release(MERCHANT, KEY, late.nonce)
        rig.claims.release(MERCHANT, KEY, b"")
        rig.claims.release(MERCHANT, KEY, owner.nonce[:-1])
        await rig.settled()
        assert (await rig.claim()).outcome is IN_FLIGHT


async def test_release_never_deletes_a_frozen_response(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        first = await rig.claim()
        rig.cache()
        rig.claims.release(MERCHANT, KEY, first.nonce)
        await rig.settled()
        assert (await rig.claim()).outcome is REPLAY


async def test_frozen_response_replaces_anyones_bare_claim(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim()
        await rig.redis.flushall()
        assert (await rig.claim()).outcome is NEW
        rig.cache()
        await rig.settled()
        assert (await rig.claim()).outcome is REPLAY


async def test_frozen_response_is_never_overwritten(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        rig.cache()
        rig.cache(b"later")
        rig.cache(b"later", fingerprint=b"another", first_request_id="req_2")
        await rig.settled()
        rig.cache(b"later still")
        await rig.settled()
        assert (await rig.claim()).response == RESPONSE


@pytest.mark.parametrize(
    "changes",
    [
        {"response": bytes(1_000)},
        {"first_request_id": "r" * 256},
        {"fingerprint": bytes(256)},
    ],
)
async def test_response_beyond_a_limit_is_not_cached_and_leaves_repeats_to_postgresql(
    own_redis: EmbeddedRedis, changes: dict[str, Any]
) -> None:
    async with rig_on(own_redis, cache_bytes_max=1_000) as rig:
        first = await rig.claim()
        rig.cache(**changes)
        await rig.settled()
        assert rig.metrics.dropped == {"TOO_LARGE": 1}
        assert (await rig.claim()).outcome is IN_FLIGHT
        rig.claims.release(MERCHANT, KEY, first.nonce)
        await rig.settled()
        assert await rig.redis.dbsize() == 0


async def test_fingerprint_and_request_id_of_the_largest_size_are_cached(
    own_redis: EmbeddedRedis,
) -> None:
    fingerprint, request_id = bytes(range(255)), "r" * 255
    async with rig_on(own_redis) as rig:
        rig.cache(fingerprint=fingerprint, first_request_id=request_id)
        await rig.settled()
        assert await rig.claim(fingerprint=fingerprint) == ClaimResult(
            REPLAY, generation=GENERATION, response=RESPONSE, first_request_id=request_id
        )


async def test_response_of_the_largest_size_is_cached(own_redis: EmbeddedRedis) -> None:
    overhead = len(b"R") + 1 + len(FINGERPRINT) + 1 + len("req_1")
    async with rig_on(own_redis, cache_bytes_max=1_000) as rig:
        rig.cache(bytes(1_000 - overhead))
        rig.cache(bytes(1_001 - overhead), "another")
        await rig.settled()
        assert (await rig.claim()).outcome is REPLAY
        assert rig.metrics.dropped == {"TOO_LARGE": 1}


@pytest.mark.parametrize("response", [b"", bytes(range(256)) * 40])
async def test_response_of_any_bytes_comes_back_whole(
    own_redis: EmbeddedRedis, response: bytes
) -> None:
    async with rig_on(own_redis) as rig:
        rig.cache(response, first_request_id="é" * 127)
        await rig.settled()
        result = await rig.claim()
        assert (result.outcome, result.response) == (REPLAY, response)
        assert result.first_request_id == "é" * 127


async def test_claim_of_one_millisecond_expires_and_the_key_is_free(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis, claim_life_ms=1) as rig:
        first = await rig.claim()
        assert first.outcome is NEW

        async def is_gone() -> bool:
            return int(await rig.redis.dbsize()) == 0

        await until(is_gone)
        second = await rig.claim()
        assert second.outcome is NEW
        rig.claims.release(MERCHANT, KEY, first.nonce)  # late, and no longer the owner
        await rig.settled()


async def test_every_entry_has_a_life(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis, claim_life_ms=60_000, cache_life_s=3_600) as rig:
        await rig.claim("claimed")
        rig.cache()
        await rig.settled()
        lives_ms = sorted([await rig.redis.pttl(key) for key in await rig.keys()])
        assert 0 < lives_ms[0] <= 60_000 < lives_ms[1] <= 3_600_000


async def test_flushed_redis_gives_the_key_away_again_and_stays_available(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim()
        await rig.redis.flushall()
        assert (await rig.claim()).outcome is NEW
        assert rig.metrics.circuit == []


async def test_forgotten_scripts_are_loaded_again_without_a_callers_notice(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        await rig.redis.script_flush()
        first = await rig.claim()
        assert first.outcome is NEW
        await rig.redis.script_flush()
        rig.cache()
        await rig.settled()
        assert (await rig.claim()).outcome is REPLAY
        assert rig.metrics.circuit == []


async def test_new_generation_empties_the_cache(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        old = await rig.claim()
        rig.cache()
        await rig.settled()
        rig.claims.set_generation("7512345678901234567-2")
        assert (await rig.claim()).outcome is NEW
        # What was committed under the old timeline speaks of the old timeline only.
        rig.cache(generation=old.generation)
        await rig.settled()
        assert (await rig.claim()).outcome is IN_FLIGHT


async def test_nothing_is_claimed_before_the_generation_is_known(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        rig.claims._generation = None
        assert await rig.claim() == ClaimResult(UNAVAILABLE)
        rig.cache()
        await rig.settled()
        assert await rig.redis.dbsize() == 0
        for generation in ("", "a:b", "{b0}", "a b", "x" * 65):
            with pytest.raises(ValueError, match="a generation is"):
                rig.claims.set_generation(generation)


async def test_keys_lie_in_their_merchants_bucket_and_hold_no_text_of_the_client(
    own_redis: EmbeddedRedis,
) -> None:
    canary = "4111111111111111 }{b9}:*"
    async with rig_on(own_redis, buckets=16) as rig:
        merchants = [f"m_{number}" for number in range(50)]
        await asyncio.gather(*(rig.claim(canary, merchant) for merchant in merchants))
        keys = [key.decode() for key in await rig.keys()]
        digest = hashlib.blake2b(canary.encode(), digest_size=16).hexdigest()
        tags = {key.split(":")[3]: key.split(":")[0] for key in keys}
        assert set(tags) == set(merchants)
        assert len(set(tags.values())) > 1
        for key in keys:
            assert (
                key == f"{tags[key.split(':')[3]]}:{GENERATION}:idem:{key.split(':')[3]}:{digest}"
            )
        # A batch is one script over one slot: as many batches as buckets.
        assert rig.metrics.batches["redis-claim"] == len(set(tags.values()))
        for merchant in merchants:
            rig.claims.cache(
                merchant,
                canary,
                fingerprint=FINGERPRINT,
                first_request_id="req_1",
                response=RESPONSE,
            )
        await rig.settled()
        assert rig.metrics.batches["redis-settle"] == len(set(tags.values()))


async def test_key_that_redis_cannot_claim_spoils_no_other(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim()
        (key,) = await rig.keys()
        damaged = [b"", b"X of another time", b"R", b"R\xff", b"R\x00\xff", b"R\x00\x01\xff"]
        for entry in damaged:
            await rig.redis.set(key, entry)
            results = await asyncio.gather(rig.claim("fine" + entry.hex()), rig.claim())
            assert [result.outcome for result in results] == [NEW, UNAVAILABLE], entry
        await rig.redis.delete(key)
        await rig.redis.rpush(key, "a list")
        results = await asyncio.gather(rig.claim("other"), rig.claim())
        assert [result.outcome for result in results] == [NEW, UNAVAILABLE]
        rig.cache()
        await rig.settled()
        assert rig.metrics.dropped == {"REFUSED": 1}
        assert rig.metrics.circuit == []


async def test_redis_without_memory_leaves_the_decision_to_postgresql() -> None:
    with redis_server({"maxmemory": "1", "maxmemory-policy": "noeviction"}) as full:
        async with rig_on(full) as rig:
            assert (await rig.claim()).outcome is UNAVAILABLE
            rig.cache()
            await rig.settled()


async def test_an_answer_that_a_full_redis_refuses_spoils_no_other_and_opens_no_circuit(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "_has_room", lambda _: True)
    async with rig_on(own_redis) as rig:
        claimed = await rig.claim("claimed")
        await rig.redis.config_set("maxmemory", 1)
        try:
            rig.cache()
            rig.cache(key="another")
            rig.claims.release(MERCHANT, "claimed", claimed.nonce)
            await rig.settled()
        finally:
            await rig.redis.config_set("maxmemory", 0)
        assert rig.metrics.dropped == {"REFUSED": 2}
        assert rig.metrics.circuit == []
        assert await rig.keys() == []


async def test_answers_leave_the_claims_their_room_in_redis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claims_module, "ROOM_LOOK_EVERY_S", 0.0)
    with redis_server({"maxmemory": "8mb", "maxmemory-policy": "noeviction"}) as small:
        async with rig_on(small) as rig:
            for number in range(4_000):
                if rig.metrics.dropped:
                    break
                claim = await rig.claim(f"order {number}")
                assert claim.outcome is NEW
                rig.cache(bytes(8_000), f"order {number}")
                await rig.settled()
            assert rig.metrics.dropped == {"NO_ROOM": 1}
            assert await rig.keys()
            assert rig.metrics.circuit == []
            # The last claim stands, so that PostgreSQL has its repeat.
            assert (await rig.claim(f"order {number - 1}")).outcome is IN_FLIGHT
            for more in range(500):
                assert (await rig.claim(f"more {more}")).outcome is NEW
            await rig.redis.flushall()

            async def is_cached() -> bool:  # Redis may free what it held a moment later
                rig.cache()
                await rig.settled()
                return bool(await rig.keys())

            # By answers alone: where all is well, nothing is released.
            await until(is_cached)
            assert (await rig.claim()).outcome is REPLAY


async def test_without_room_claims_are_released_and_only_answers_dropped(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "_has_room", lambda _: False)
    async with rig_on(own_redis) as rig:
        claimed = await rig.claim()
        batches = rig.metrics.batches["redis-settle"]
        for number in range(2):
            rig.cache(key=f"answered {number}")
        rig.claims.release(MERCHANT, KEY, claimed.nonce)
        await rig.settled()
        assert rig.metrics.batches["redis-settle"] == batches + 1
        assert rig.metrics.dropped == {"NO_ROOM": 2}
        assert await rig.keys() == []


async def test_that_answers_are_not_cached_is_logged_once_and_once_that_they_are_again(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", claims_module.__name__)
    monkeypatch.setattr(claims_module, "ROOM_LOOK_EVERY_S", 0.0)
    looks = iter([False, False, True, True])
    monkeypatch.setattr(claims_module, "_has_room", lambda _: next(looks))
    async with rig_on(own_redis) as rig:
        for number in range(4):
            rig.cache(key=str(number))
            await rig.settled()
        assert rig.metrics.dropped == {"NO_ROOM": 2}
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_redis_that_may_not_be_asked_any_more_is_given_answers_again(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "ROOM_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(claims_module, "_has_room", lambda _: False)
    async with rig_on(own_redis) as rig:
        rig.cache()
        await rig.settled()
        await rig.redis.acl_setuser("default", enabled=True, commands=["-info"])
        try:
            rig.cache()
            await rig.settled()
            assert (await rig.claim()).outcome is REPLAY
        finally:
            await rig.redis.acl_setuser("default", enabled=True, commands=["+info"])


async def test_redis_is_asked_for_its_room_once_in_a_while(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "ROOM_LOOK_EVERY_S", 3_600.0)
    async with rig_on(own_redis) as rig:
        send = rig.claims._client.execute
        asked: Counter[Any] = Counter()

        async def see(*command: Any, **options: Any) -> Any:
            asked[command[0]] += 1
            return await send(*command, **options)

        monkeypatch.setattr(rig.claims._client, "execute", see)
        for number in range(3):
            rig.cache(key=str(number))
            await rig.settled()
        assert asked == {"INFO": 1, "EVALSHA": 3}


@pytest.mark.parametrize(
    ("told", "has_room"),
    [
        (b"used_memory:90\r\nmaxmemory:100\r\nmaxmemory_policy:noeviction\r\n", False),
        (b"used_memory:80\r\nmaxmemory:100\r\nmaxmemory_policy:noeviction\r\n", True),
        (b"used_memory:90\r\nmaxmemory:100\r\nmaxmemory_policy:volatile-lru\r\n", True),
        (b"used_memory:90\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n", True),
        (b"# Memory\r\n", True),
        (b"", True),
    ],
)
def test_answers_are_cached_unless_redis_refuses_soon(told: bytes, has_room: bool) -> None:
    assert claims_module._has_room(told) is has_room


@pytest.mark.parametrize(
    ("told", "policy"),
    [
        (b"maxmemory:100\r\nmaxmemory_policy:allkeys-lru\r\n", "allkeys-lru"),
        (b"maxmemory:100\r\nmaxmemory_policy:noeviction\r\n", ""),
        (b"maxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\n", ""),
        (b"maxmemory_policy:allkeys-lru\r\n", ""),
        (b"maxmemory:100\r\n", ""),
    ],
)
def test_redis_evicts_by_its_policy_where_its_memory_is_limited(told: bytes, policy: str) -> None:
    assert claims_module.evicting_policy(told) == policy


async def test_redis_that_may_not_be_asked_for_its_memory_is_given_answers(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        await rig.redis.acl_setuser("default", enabled=True, commands=["-info"])
        try:
            rig.cache()
            await rig.settled()
            assert (await rig.claim()).outcome is REPLAY
            assert rig.metrics.circuit == []
        finally:
            await rig.redis.acl_setuser("default", enabled=True, commands=["+info"])


async def test_killed_redis_costs_no_claim_a_wait_and_recovers(
    mortal_redis: EmbeddedRedis,
) -> None:
    async with rig_on(mortal_redis) as rig:
        first = await rig.claim()
        mortal_redis.kill()
        assert (await rig.claim()).outcome is UNAVAILABLE
        await assert_open(rig)
        rig.claims.release(MERCHANT, KEY, first.nonce)
        rig.cache()
        assert rig.metrics.dropped == {"UNAVAILABLE": 2}
        mortal_redis.start()
        await until(lambda: rig.claims.available)
        assert (await rig.claim()).outcome is NEW  # it started empty
        assert rig.metrics.circuit == [False, True]


async def test_a_script_is_sent_so_often_and_no_more(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However quickly each try fails."""
    async with rig_on(own_redis) as rig:
        tries = 0

        async def fail(*_: Any, **__: Any) -> Any:
            nonlocal tries
            tries += 1
            raise RedisAway

        monkeypatch.setattr(rig.claims._client, "execute", fail)
        assert (await rig.claim()).outcome is UNAVAILABLE
        assert tries == claims_module.SENDS_MAX


async def test_redis_that_is_away_is_asked_after_a_pause_only(
    mortal_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def connect() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        raise RedisAway

    async with rig_on(mortal_redis, retry_after_ms=HANG_S * 1_000_000) as rig:
        monkeypatch.setattr(rig.claims._client, "connect", connect)
        mortal_redis.kill()
        assert (await rig.claim()).outcome is UNAVAILABLE
        for _ in range(100):
            await asyncio.sleep(0)
        assert asked == 0


async def test_what_redis_refuses_is_logged_by_its_code_and_never_by_its_text(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which may quote what was sent."""
    caplog.set_level("DEBUG", claims_module.__name__)
    async with rig_on(own_redis) as rig:
        refusals = iter(["BAD canary", "WORSE canary"])
        send = rig.claims._client.execute

        async def refuse(*command: Any, **options: Any) -> Any:
            for refusal in refusals:
                raise RedisRefused(refusal)
            return await send(*command, **options)

        monkeypatch.setattr(rig.claims._client, "execute", refuse)
        await rig.claim()
        await until(lambda: rig.claims.available)
        codes = [text for text in caplog.messages if "(" in text]
        assert [text.partition("(")[2].partition(")")[0] for text in codes] == [
            "RedisRefused BAD",
            "RedisRefused WORSE",
        ]
        assert "canary" not in caplog.text
        assert caplog.messages[-1] == "Redis is available again"


async def test_stopped_redis_costs_no_claim_a_wait_and_recovers(
    mortal_redis: EmbeddedRedis,
) -> None:
    async with rig_on(mortal_redis, timeout_ms=300) as rig:
        await until(lambda: rig.claims.available)
        mortal_redis.pause()
        results = await asyncio.gather(*(rig.claim(f"order {number}") for number in range(20)))
        assert {result.outcome for result in results} == {UNAVAILABLE}
        await assert_open(rig)
        mortal_redis.resume()
        await until(lambda: rig.claims.available)
        assert (await rig.claim("another")).outcome is NEW
        # The claims whose answers were lost may stand: they can be released by their nonces.
        for number, result in enumerate(results):
            rig.claims.release(MERCHANT, f"order {number}", result.nonce)
        await rig.settled()
        assert await rig.redis.dbsize() == 1


async def test_restart_between_two_claims_is_not_noticed(mortal_redis: EmbeddedRedis) -> None:
    async with rig_on(mortal_redis) as rig:
        await rig.claim("before")
        mortal_redis.restart()
        assert (await rig.claim("after")).outcome is NEW
        assert rig.metrics.circuit == []


class Front:
    """An address that leads new connections to the server of the moment, as a failover's does."""

    def __init__(self, primary: EmbeddedRedis, connecting_s: float = 0.0) -> None:
        self.primary = primary
        self.connections = 0
        self._connecting_s = connecting_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await asyncio.sleep(self._connecting_s)
        port = urlsplit(self.primary.url).port
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        for pair in ((reader, inner_writer), (inner_reader, writer)):
            self._tasks.add(asyncio.create_task(pump(*pair)))

    async def stop(self) -> None:
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def rig_behind_front(
    old: EmbeddedRedis, new: EmbeddedRedis, *, demoted: bool = False
) -> AsyncIterator[tuple[Rig, Front]]:
    """A rig whose address leads to `old`, which may be a replica from the beginning, and `new`, to
    which it may lead later. The rig's own look is at `old`.
    """
    front = Front(old)
    listening = await asyncio.start_server(front.serve, "127.0.0.1", 0)
    password = urlsplit(old.url).password
    async with Redis.from_url(new.url) as client:
        await client.config_set("requirepass", password or "")
    if demoted:
        await demote(old)
    try:
        port = listening.sockets[0].getsockname()[1]
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        async with rig_on(old, flush=False, url=url) as rig:
            yield rig, front
    finally:
        listening.close()
        await front.stop()
        await listening.wait_closed()


async def demote(server: EmbeddedRedis, *, serves_stale: bool = True) -> None:
    """Make a replica of it, whose connections stay; the primary that it is told of is away."""
    async with Redis.from_url(server.url) as client:
        await client.config_set("replica-serve-stale-data", "yes" if serves_stale else "no")
        await client.replicaof("127.0.0.1", str(free_port()))


@pytest.fixture
def second_redis() -> Iterator[EmbeddedRedis]:
    """The test's alone, that takes the place of another."""
    with redis_server() as running:
        yield running


@pytest.mark.parametrize("serves_stale", [True, False])
async def test_a_demoted_primary_that_closes_no_connection_is_left_without_a_claims_notice(
    mortal_redis: EmbeddedRedis, second_redis: EmbeddedRedis, serves_stale: bool
) -> None:
    async with rig_behind_front(mortal_redis, second_redis) as (rig, front):
        assert (await rig.claim("before")).outcome is NEW
        front.primary = second_redis
        await demote(mortal_redis, serves_stale=serves_stale)
        assert (await rig.claim("after")).outcome is NEW
        assert (await rig.claim("after")).outcome is IN_FLIGHT
        assert rig.metrics.circuit == []


@pytest.mark.parametrize("serves_stale", [True, False])
async def test_a_replica_is_no_redis_that_is_available_until_the_address_leads_to_a_primary(
    mortal_redis: EmbeddedRedis, second_redis: EmbeddedRedis, serves_stale: bool
) -> None:
    async with rig_behind_front(mortal_redis, second_redis) as (rig, front):
        assert (await rig.claim("before")).outcome is NEW
        await demote(mortal_redis, serves_stale=serves_stale)
        assert (await rig.claim("after")).outcome is UNAVAILABLE
        await assert_open(rig)
        probed = front.connections
        await until(lambda: front.connections >= probed + 3)  # each probe finds the replica
        assert rig.metrics.circuit == [False]
        front.primary = second_redis
        await until(lambda: rig.claims.available)
        assert (await rig.claim("after")).outcome is NEW
        assert rig.metrics.circuit == [False, True]


async def test_redis_whose_connection_takes_longer_than_an_answer_may_is_available(
    own_redis: EmbeddedRedis,
) -> None:
    front = Front(own_redis, connecting_s=0.3)  # as a handshake of TLS far away
    listening = await asyncio.start_server(front.serve, "127.0.0.1", 0)
    address = urlsplit(own_redis.url)
    url = f"redis://:{address.password}@127.0.0.1:{listening.sockets[0].getsockname()[1]}/0"
    try:
        async with rig_on(own_redis, url=url, timeout_ms=100) as rig:
            await until(lambda: rig.claims.available)
    finally:
        listening.close()
        await front.stop()
        await listening.wait_closed()


async def test_settlements_find_out_that_a_primary_is_none_any_more(
    mortal_redis: EmbeddedRedis, second_redis: EmbeddedRedis
) -> None:
    async with rig_behind_front(mortal_redis, second_redis) as (rig, _):
        released = (await rig.claim("released")).nonce
        await demote(mortal_redis)
        rig.claims.release(MERCHANT, "released", released)
        rig.cache()
        await rig.settled()
        assert rig.metrics.dropped == {"UNAVAILABLE": 2}
        await assert_open(rig)


async def test_a_gateway_that_starts_at_a_replica_finds_the_primary_later(
    mortal_redis: EmbeddedRedis, second_redis: EmbeddedRedis
) -> None:
    async with rig_behind_front(mortal_redis, second_redis, demoted=True) as (rig, front):
        assert rig.metrics.circuit == [False]
        front.primary = second_redis
        await until(lambda: rig.claims.available)
        assert (await rig.claim()).outcome is NEW


async def test_redis_whose_user_may_not_delete_is_available(own_redis: EmbeddedRedis) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await client.acl_setuser("default", enabled=True, commands=["-del"])
    try:
        async with rig_on(own_redis) as rig:
            assert (await rig.claim()).outcome is NEW
            assert rig.metrics.circuit == []
    finally:
        async with Redis.from_url(own_redis.url) as client:
            await client.acl_setuser("default", enabled=True, commands=["+del"])


async def assert_open(rig: Rig) -> None:
    """An open circuit answers within one turn of the event loop, and asks Redis nothing."""
    assert not rig.claims.available
    sent = rig.metrics.batches["redis-claim"]
    waiting = rig.claims.claim(MERCHANT, KEY, FINGERPRINT)
    with pytest.raises(StopIteration) as answer:
        waiting.send(None)  # the first step is the last: it suspends nowhere
    assert answer.value.value == ClaimResult(UNAVAILABLE)
    assert rig.metrics.batches["redis-claim"] == sent
    assert rig.metrics.circuit[-1] is False


async def test_gateway_starts_without_redis_and_finds_it_later(
    mortal_redis: EmbeddedRedis,
) -> None:
    mortal_redis.kill()
    async with rig_on(mortal_redis, flush=False) as rig:
        await assert_open(rig)
        mortal_redis.start()
        await until(lambda: rig.claims.available)
        assert (await rig.claim()).outcome is NEW


async def test_claims_behind_a_dead_batch_are_answered_without_asking(
    mortal_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_on(mortal_redis, timeout_ms=300, rows_max=1, in_flight_max=1) as rig:
        await until(lambda: rig.claims.available)
        execute = rig.claims._client.execute
        asked = set()  # a command that is repeated in its time is one

        async def counting(*command: Any, **options: Any) -> Any:
            asked.add(command)
            return await execute(*command, **options)

        monkeypatch.setattr(rig.claims._client, "execute", counting)
        mortal_redis.pause()
        results = await asyncio.gather(*(rig.claim(str(number)) for number in range(50)))
        assert {result.outcome for result in results} == {UNAVAILABLE}
        assert len(asked) == 1
        mortal_redis.resume()


async def test_full_queues_refuse_without_an_error(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis, queue_max=10, settle_queue_max=10) as rig:
        results = await asyncio.gather(*(rig.claim(str(number)) for number in range(25)))
        assert Counter(result.outcome for result in results) == {NEW: 10, UNAVAILABLE: 15}
        for number, result in enumerate(results):
            rig.claims.release(MERCHANT, str(number), result.nonce)
        await rig.settled()
        assert rig.metrics.dropped == {"QUEUE_FULL": 15}
        assert rig.claims.available


async def test_every_claim_is_counted_once_whatever_came_of_it(mortal_redis: EmbeddedRedis) -> None:
    async with rig_on(mortal_redis, queue_max=2) as rig:
        await asyncio.gather(*(rig.claim(str(number)) for number in range(3)))
        for key in await rig.keys():
            await rig.redis.set(key, "X of another time")
        await asyncio.gather(*(rig.claim(str(number)) for number in range(2)))
        assert rig.metrics.answered == {NEW: 2, UNAVAILABLE: 1 + 2}
        mortal_redis.kill()
        await asyncio.gather(*(rig.claim(str(number)) for number in range(2)))
        await assert_open(rig)
        assert rig.metrics.answered == {NEW: 2, UNAVAILABLE: 1 + 2 + 2 + 1}


async def test_cancelled_claim_reaches_redis_all_the_same(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        caller = asyncio.create_task(rig.claim())
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()

        async def stands() -> bool:
            return int(await rig.redis.dbsize()) == 1

        await until(stands)


async def test_close_sends_what_is_queued_and_refuses_the_rest_quietly(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis, settle_linger_ms_max=LINGER_MS_CAP) as rig:
        first = await rig.claim()
        rig.cache()
        await rig.claims.close()
        await rig.claims.close()
        (key,) = await rig.keys()
        entry = await rig.redis.get(key)
        assert isinstance(entry, bytes)
        assert entry.endswith(RESPONSE)
        assert (await rig.claim()).outcome is UNAVAILABLE
        rig.claims.release(MERCHANT, KEY, first.nonce)
        assert rig.metrics.dropped == {"CLOSED": 1}


async def test_nobody_asks_for_a_redis_that_is_away_after_close(
    mortal_redis: EmbeddedRedis,
) -> None:
    async with rig_on(mortal_redis) as rig:
        mortal_redis.kill()
        await rig.claim()
        probe = rig.claims._probe
        assert probe is not None
        await rig.claims.close()
        assert probe.cancelled()


@pytest.mark.parametrize("name", ["buckets", "claim_life_ms", "cache_life_s", "retry_after_ms"])
async def test_lives_and_pauses_are_positive(own_redis: EmbeddedRedis, name: str) -> None:
    none: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match="are positive"):
        async with rig_on(own_redis, flush=False, **none):
            pass


async def test_keys_of_a_script_are_no_more_than_their_numbers_can_tell(
    own_redis: EmbeddedRedis,
) -> None:
    rows_max = claims_module.ROWS_MAX
    async with rig_on(own_redis, flush=False, rows_max=rows_max):
        pass
    with pytest.raises(ValueError, match="rows_max is at most"):
        async with rig_on(own_redis, flush=False, rows_max=rows_max + 1):
            pass


async def test_text_that_is_none_is_answered_not_raised(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        assert (await rig.claim("\ud800")).outcome is UNAVAILABLE
        rig.claims.release(MERCHANT, "\ud800", b"nonce")
        rig.cache(first_request_id="\ud800")
        await rig.settled()
        assert rig.metrics.dropped == {"REFUSED": 1}
        assert rig.claims.available


# --- rate limits ----------------------------------------------------------------------------------


async def now_us(rig: Rig) -> int:
    seconds, microseconds = await rig.redis.time()
    return int(seconds) * 1_000_000 + int(microseconds)


async def test_a_burst_is_let_in_and_what_is_beyond_is_not_claimed_and_told_when(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        assert await rig.outcomes(SLOW.burst, SLOW) == [NEW] * SLOW.burst
        keys = await rig.keys()
        refused = await asyncio.gather(*(rig.claim(f"refused-{n}", limit=SLOW) for n in range(3)))
        for result in refused:
            assert (result.outcome, result.nonce) == (RATE_LIMITED, b"")
        # The first has room after less than an interval, each further one an interval later.
        pauses = [result.retry_after_s for result in refused]
        for number, pause_s in enumerate(pauses):
            assert number * INTERVAL_US < pause_s * 1e6 <= (number + 1) * INTERVAL_US + 10_000
        assert sorted(await rig.keys()) == sorted(keys)
        # A refused key is free: without a limit it is claimed.
        assert (await rig.claim("refused-0")).outcome is NEW
        assert rig.metrics.answered[RATE_LIMITED] == 3


async def test_a_burst_is_let_in_whole_where_its_intervals_are_fractions(
    own_redis: EmbeddedRedis,
) -> None:
    limit = RateLimit(per_s=3.0, burst=6)
    interval_us = 333_333.333
    # One after the other, as Redis adds them; sum() is more exact from Python 3.12 on.
    *_, ahead_us = itertools.accumulate([interval_us] * limit.burst)
    assert ahead_us > limit.burst * interval_us
    async with rig_on(own_redis) as rig:
        assert await rig.outcomes(limit.burst + 1, limit) == [NEW] * limit.burst + [RATE_LIMITED]


@pytest.mark.parametrize(("ms", "told_s"), [(0, 0.0), (1, 0.01), (10, 0.01), (11, 0.02)])
def test_pause_is_told_in_few_sizes_and_never_too_short(ms: int, told_s: float) -> None:
    assert claims_module._pause_s(ms) == told_s


@pytest.mark.parametrize("intervals", [1, 2, 3, 7])
async def test_room_comes_back_by_one_call_an_interval_and_no_more_than_a_burst(
    own_redis: EmbeddedRedis, intervals: int
) -> None:
    async with rig_on(own_redis) as rig:
        await rig.outcomes(SLOW.burst, SLOW)
        # As if so much time had passed.
        until_us = float(await rig.redis.get(LIMIT_KEY) or 0)
        await rig.redis.set(LIMIT_KEY, f"{until_us - intervals * INTERVAL_US:.0f}")
        room = min(intervals, SLOW.burst)
        expected = [NEW] * room + [RATE_LIMITED] * (5 - room)
        assert await rig.outcomes(5, SLOW) == expected


async def test_what_was_claimed_before_costs_nothing(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.claim(limit=SLOW)
        for _ in range(5):
            assert (await rig.claim(limit=SLOW)).outcome is IN_FLIGHT
        rig.cache()
        await rig.settled()
        for _ in range(5):
            assert (await rig.claim(limit=SLOW)).outcome is REPLAY
            assert (await rig.claim(limit=SLOW, fingerprint=b"another")).outcome is CONFLICT
        assert await rig.outcomes(3, SLOW) == [NEW, NEW, RATE_LIMITED]
        # Nor is it refused where nothing new is.
        assert (await rig.claim(limit=SLOW)).outcome is REPLAY


async def test_a_claim_sent_again_is_counted_once(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_on(own_redis) as rig:
        send = rig.claims._client.execute
        lost: list[Any] = []

        async def lose_the_first_answer(*command: Any, **options: Any) -> Any:
            answer = await send(*command, **options)
            if not lost:
                lost.append(answer)
                raise RedisAway
            return answer

        monkeypatch.setattr(rig.claims._client, "execute", lose_the_first_answer)
        assert (await rig.claim(limit=SLOW)).outcome is NEW
        assert await rig.outcomes(3, SLOW) == [NEW, NEW, RATE_LIMITED]
        assert lost


async def test_each_merchant_of_a_batch_has_its_own_limit_and_most_have_none(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        limits = {"m_none": None, "m_one": SLOW._replace(burst=1), "m_two": SLOW._replace(burst=2)}
        batches = rig.metrics.batches["redis-claim"]
        results = await asyncio.gather(
            *(
                rig.claim(f"{merchant_id}-{number}", merchant_id, limit=limit)
                for number in range(4)
                for merchant_id, limit in limits.items()
            )
        )
        outcomes = [result.outcome for result in results]
        assert outcomes[0::3] == [NEW] * 4
        assert outcomes[1::3] == [NEW] + [RATE_LIMITED] * 3
        assert outcomes[2::3] == [NEW] * 2 + [RATE_LIMITED] * 2
        assert rig.metrics.batches["redis-claim"] == batches + 1


async def test_limits_of_more_merchants_than_a_byte_can_tell_are_counted(
    own_redis: EmbeddedRedis,
) -> None:
    limit = SLOW._replace(burst=1)
    merchants = [f"m_{number}" for number in range(300)]
    async with rig_on(own_redis, rows_max=len(merchants)) as rig:
        for outcome in (NEW, RATE_LIMITED):
            told = await asyncio.gather(*(rig.outcomes(1, limit, each) for each in merchants))
            assert told == [[outcome]] * len(merchants)


async def test_the_gateways_of_one_redis_have_one_limit_together(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as one, rig_on(own_redis, flush=False) as other:
        limit = SLOW._replace(burst=20)
        outcomes = await asyncio.gather(*(rig.outcomes(20, limit) for rig in (one, other)))
        assert Counter(sum(outcomes, [])) == {NEW: 20, RATE_LIMITED: 20}  # noqa: RUF017 - two


async def test_a_lowered_limit_and_a_clock_set_back_shut_out_for_a_burst_at_most(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        await rig.redis.set(LIMIT_KEY, await now_us(rig) + 10**15)
        refused = await rig.claim(limit=SLOW)
        assert refused.outcome is RATE_LIMITED
        assert refused.retry_after_s * 1e6 <= INTERVAL_US + 10_000
        # It is worked off from then on, as if so much time had passed.
        until_us = float(await rig.redis.get(LIMIT_KEY) or 0)
        assert until_us <= await now_us(rig) + SLOW.burst * INTERVAL_US
        await rig.redis.set(LIMIT_KEY, f"{until_us - INTERVAL_US:.0f}")
        assert await rig.outcomes(2, SLOW) == [NEW, RATE_LIMITED]
        # A limit that was raised is felt at once.
        raised = SLOW._replace(per_s=SLOW.per_s * 1000, burst=10_000)
        assert await rig.outcomes(5, raised) == [NEW] * 5


async def test_a_limit_without_an_end_ends(own_redis: EmbeddedRedis) -> None:
    async with rig_on(own_redis) as rig:
        await rig.redis.set(LIMIT_KEY, b"inf")
        assert (await rig.claim(limit=SLOW)).outcome is RATE_LIMITED
        assert 0 < await rig.redis.pttl(LIMIT_KEY) <= SLOW.burst * INTERVAL_US / 1000 + 1


@pytest.mark.parametrize("value", [b"", b"no time", b"nan", b"-1"])
async def test_a_damaged_limit_lets_in(own_redis: EmbeddedRedis, value: bytes) -> None:
    async with rig_on(own_redis) as rig:
        await rig.redis.set(LIMIT_KEY, value)
        assert await rig.outcomes(2, SLOW) == [NEW, NEW]
        await rig.redis.delete(LIMIT_KEY)
        await rig.redis.rpush(LIMIT_KEY, value)
        assert await rig.outcomes(2, SLOW) == [NEW, NEW]


async def test_what_a_limit_keeps_goes_when_there_is_room_for_a_burst_again(
    own_redis: EmbeddedRedis,
) -> None:
    async with rig_on(own_redis) as rig:
        assert await rig.keys() == []
        await rig.claim(limit=SLOW)
        left_ms = await rig.redis.pttl(LIMIT_KEY)
        assert 0 < left_ms <= INTERVAL_US / 1000 + 2


async def test_without_limits_nothing_more_is_sent(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_on(own_redis) as rig:
        send = rig.claims._client.execute
        sent: list[tuple[Any, ...]] = []

        async def see(*command: Any, **options: Any) -> Any:
            sent.append(command)
            return await send(*command, **options)

        monkeypatch.setattr(rig.claims._client, "execute", see)
        await rig.claim("one")
        await rig.claim("two", limit=SLOW)
        await rig.claim("three")
        # EVALSHA, the script, the number of keys, the keys, the claims' life and their nonces.
        assert [(command[2], len(command)) for command in sent] == [(1, 6), (2, 10), (1, 6)]


async def test_without_redis_nothing_is_limited(mortal_redis: EmbeddedRedis) -> None:
    async with rig_on(mortal_redis) as rig:
        await rig.outcomes(SLOW.burst, SLOW)
        mortal_redis.stop()
        assert await rig.outcomes(5, SLOW) == [UNAVAILABLE] * 5


async def test_limits_count_on_a_cluster_which_takes_keys_of_one_slot_only() -> None:
    with redis_server({"cluster-enabled": "yes", "cluster-port": str(free_port())}) as cluster:
        looking = Redis.from_url(cluster.url)
        try:
            await looking.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")  # type: ignore[no-untyped-call]

            async def ready() -> bool:
                told = await looking.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
                return bool(told["cluster_state"] == "ok")

            await until(ready)
        finally:
            await looking.aclose()
        async with rig_on(cluster, flush=False, buckets=256) as rig:
            merchants = [f"m_{number}" for number in range(20)]
            limit = SLOW._replace(burst=2)
            for _ in range(2):
                told = await asyncio.gather(*(rig.outcomes(1, limit, each) for each in merchants))
                assert told == [[NEW]] * len(merchants)
            told = await asyncio.gather(*(rig.outcomes(1, limit, each) for each in merchants))
            assert told == [[RATE_LIMITED]] * len(merchants)
