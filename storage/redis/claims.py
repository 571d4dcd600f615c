"""Idempotency claims in Redis: the fast path that stops duplicates before they reach PostgreSQL.

What Redis says is advice, except in one direction: a duplicate is answered from here only out of a
*frozen response*, written after PostgreSQL committed it. A bare claim proves nothing, since its
owner may have died before the intent, and no answer at all (`UNAVAILABLE`) proves nothing either:
in both cases PostgreSQL's unique key decides. Redis may therefore be flushed, killed, stopped or
partitioned without a payment lost or doubled.

A key is `{b<bucket>}:<generation>:idem:<merchant_id>:<digest of the idempotency key>`. The braces
are Redis Cluster's hash tag: every key of a script lies in one slot. The client's text enters the
key only as a digest, and its value not at all.

A merchant's rate limit is counted by the same script, so that it costs no round trip of its own,
and nothing where there is none. Its key is `{b<bucket>}:rate:<merchant_id>`.
"""

import asyncio
import hashlib
import logging
import os
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple, Protocol

from gateway.application.accounts import RateLimit
from gateway.application.ports import ClaimOutcome, ClaimResult, make_claim_result
from gateway.domain.making import maker
from storage.batching import Lane, LaneMetrics, LaneTracer, NoLaneMetrics, QueueFull
from storage.redis.connection import Part, RedisAway, RedisClient, RedisRefused

NONCE_BYTES = 16
"""Size of an owner's nonce: random enough that no two claims ever share one."""

KEY_DIGEST_BYTES = 16
"""Size of an idempotency key's digest. Keys of one merchant alone compete, and a collision only
shows as a conflict of fingerprints, never as another merchant's answer."""

SENDS_MAX = 3
"""Most times that one script is sent: after a connection found dead or at a server that is no
primary any more, after a script found unknown (both at once when Redis was restarted, or another
took its place). All of them within one `timeout_ms`."""

ROWS_MAX = 0xFFFF
"""Most keys in one script: the number of a claim's rate limit has two bytes."""

RETRY_STEP_MS = 10
"""A refusal for the rate limit tells a pause that is a multiple of this."""

CACHE_MEMORY_SHARE_MAX = 0.8
"""Frozen responses are cached until Redis has used this much of its `maxmemory`. They live thirty
times as long as claims, and a Redis that they fill refuses the claims."""

ROOM_LOOK_EVERY_S = 1.0
"""How often Redis is asked how full it is while answers are settled."""

_NO_KEY = b"{b0}:none"
"""Of a bucket that there always is, and of nothing: to delete it is a write without an effect."""

_GENERATION = re.compile(r"[0-9A-Za-z._-]{1,64}")

_logger = logging.getLogger(__name__)


class ClaimMetrics(LaneMetrics, Protocol):
    """What the claims tell about themselves, besides their two lanes."""

    def claims_answered(self, outcome: ClaimOutcome, claims: int) -> None:
        """`claims` claims had this outcome."""

    def settlements_dropped(self, reason: str, settlements: int) -> None:
        """Releases or cache entries did not reach Redis.

        Reasons: QUEUE_FULL, CLOSED, UNAVAILABLE, REFUSED (by Redis, key by key), TOO_LARGE,
        NO_ROOM (`CACHE_MEMORY_SHARE_MAX`).
        """

    def redis_available(self, available: bool) -> None:
        """The circuit opened (False) or closed (True)."""


class NoClaimMetrics(NoLaneMetrics):
    """Discards everything."""

    def claims_answered(self, outcome: ClaimOutcome, claims: int) -> None:
        """Discard it."""

    def settlements_dropped(self, reason: str, settlements: int) -> None:
        """Discard it."""

    def redis_available(self, available: bool) -> None:
        """Discard it."""


@dataclass(frozen=True, slots=True)
class _Script:
    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # Redis itself names scripts by SHA-1; nothing rests on it.
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)


def _read_script(name: str) -> _Script:
    return _Script(resources.files(__package__).joinpath("lua", name).read_text("utf-8"))


_CLAIM = _read_script("claim.lua")
_SETTLE = _read_script("settle.lua")


_KEY_DIGEST = hashlib.blake2b(digest_size=KEY_DIGEST_BYTES)
"""Of nothing yet: it costs less to copy than to make."""

# As in `gateway.domain.decisions`.
_NEW, _IN_FLIGHT = ClaimOutcome.NEW, ClaimOutcome.IN_FLIGHT
_REPLAY, _CONFLICT = ClaimOutcome.REPLAY, ClaimOutcome.CONFLICT
_RATE_LIMITED, _UNAVAILABLE = ClaimOutcome.RATE_LIMITED, ClaimOutcome.UNAVAILABLE


@dataclass(slots=True)
class _Claim:
    bucket: int
    key: bytes
    nonce: bytes
    fingerprint: bytes
    generation: str
    limit: tuple[bytes, RateLimit] | None
    """The key of the merchant's rate limit, and the limit."""


@dataclass(slots=True)
class _Settlement:
    bucket: int
    key: bytes
    entry: bytes


_make_claim = maker(_Claim)
_make_settlement = maker(_Settlement)


class _Frozen(NamedTuple):
    fingerprint: bytes
    first_request_id: str
    response: bytes


class _Away(Exception):
    """The circuit is open; nothing was sent."""


class Claims:
    """Claims idempotency keys, releases them, and caches frozen responses in their place.

    Nothing here raises because of Redis and nothing waits longer than about twice `timeout_ms`:
    once for batches already in flight, once for one's own. After a failure the circuit opens:
    every claim is answered UNAVAILABLE at once, while one probe in the background asks whether
    Redis is back, so that a dead or stopped Redis costs no request its latency.

    Made inside a running event loop. It needs Redis 7 or Valkey (SET with both NX and GET).

    Args:
        client: it stays the caller's: `close` leaves it open.
        buckets: hash tags that merchants are spread over: 1 on one node, some 256 on a cluster.
            All gateways of one Redis use the same number.
        claim_life_ms: life of a bare claim whose owner never settles it.
        cache_life_s: life of a frozen response in Redis. PostgreSQL keeps it for ever.
        cache_bytes_max: largest frozen response that is cached, its fingerprint and the first
            request's id included. `settle_queue_max` of these is the most that waiting costs.
        rows_max: most keys in one script, at most ROWS_MAX.
        queue_max: most claims waiting; beyond it they are UNAVAILABLE at once.
        in_flight_max: most claim scripts in flight.
        linger_ms_max: see `storage.batching.Lane`; for claims.
        settle_rows_max, settle_queue_max, settle_linger_ms_max: the same for releases and cache
            entries, which are off the path: beyond the queue they are dropped.
        timeout_ms: longest time for one batch, connecting and sending again included.
        retry_after_ms: mean time between two probes while Redis is away.
        tracer: makes spans of the lanes' batches.
    """

    def __init__(
        self,
        client: RedisClient,
        *,
        buckets: int,
        claim_life_ms: int,
        cache_life_s: int,
        cache_bytes_max: int = 16_384,
        rows_max: int = 256,
        queue_max: int = 4_096,
        in_flight_max: int = 2,
        linger_ms_max: float = 0.0,
        settle_rows_max: int = 128,
        settle_queue_max: int = 2_048,
        settle_linger_ms_max: float = 5.0,
        timeout_ms: float = 50.0,
        retry_after_ms: float = 250.0,
        metrics: ClaimMetrics | None = None,
        tracer: LaneTracer | None = None,
    ) -> None:
        if min(buckets, claim_life_ms, cache_life_s, timeout_ms, retry_after_ms) <= 0:
            raise ValueError("claims: buckets, lives, timeout_ms and retry_after_ms are positive")
        if rows_max > ROWS_MAX:
            raise ValueError(f"claims: rows_max is at most {ROWS_MAX}")
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._buckets = buckets
        self._claim_life_ms = claim_life_ms
        self._cache_life_ms = cache_life_s * 1000
        self._cache_bytes_max = cache_bytes_max
        self._timeout_s = timeout_ms / 1000
        self._retry_after_s = retry_after_ms / 1000
        self._metrics: ClaimMetrics = metrics if metrics is not None else NoClaimMetrics()
        self._generation: str | None = None
        self._available = True
        self._probe: asyncio.Task[None] | None = None
        self._closed = False
        self._limiting = False  # until the first merchant with a limit comes
        self._has_room = True
        self._look_for_room_at_s = 0.0
        self._claim_lane: Lane[_Claim, ClaimResult] = Lane(
            "redis-claim",
            self._flush_claims,
            rows_max=rows_max,
            queue_max=queue_max,
            in_flight_max=in_flight_max,
            linger_ms_max=linger_ms_max,
            partition=_bucket_of_claim,
            metrics=self._metrics,
            tracer=tracer,
        )
        self._settle_lane: Lane[_Settlement, None] = Lane(
            "redis-settle",
            self._flush_settlements,
            rows_max=settle_rows_max,
            queue_max=settle_queue_max,
            linger_ms_max=settle_linger_ms_max,
            cpu_s=None,  # nobody waits for them
            partition=_bucket_of_settlement,
            metrics=self._metrics,
            tracer=tracer,
        )

    @property
    def queues(self) -> dict[str, Lane[Any, Any]]:
        """The lanes by their names, for who asks how many rows wait."""
        return {lane.name: lane for lane in (self._claim_lane, self._settle_lane)}

    @property
    def available(self) -> bool:
        """Whether the circuit is closed: the last that was heard of Redis was good."""
        return self._available

    @property
    def generation(self) -> str | None:
        """The present generation, where one has been set."""
        return self._generation

    def set_generation(self, generation: str) -> None:
        """Name the database whose commits the cache may speak of; until then nothing is claimed.

        PostgreSQL's system identifier and timeline, so that a failover or a restore, which may
        have lost commits, empties the cache. Whoever changes the encoding of the fingerprint adds
        its version, or old entries would look like conflicts.

        Raises:
            ValueError: not 1 to 64 letters, digits, dots, dashes and underscores.
        """
        if not _GENERATION.fullmatch(generation):
            raise ValueError("a generation is 1 to 64 characters of 0-9 A-Z a-z . _ -")
        self._generation = generation

    async def start(self) -> None:
        """Load the scripts. A Redis that is away, or a replica, is no error; the circuit opens."""
        try:
            await self._make_ready()
        except Exception as error:  # noqa: BLE001 (whatever it is, Redis is no use)
            self._open_circuit(error)

    async def close(self) -> None:
        """Send what is queued (within the time-outs) and stop probing. Safe to repeat."""
        self._closed = True
        await self._claim_lane.close()
        await self._settle_lane.close()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])

    async def claim(
        self,
        merchant_id: str,
        idempotency_key: str,
        fingerprint: bytes,
        rate_limit: RateLimit | None = None,
    ) -> ClaimResult:
        """Claim a key, or learn what stands in its place. Never raises, except if cancelled.

        A new claim counts against the merchant's rate limit, in the same script. While Redis is
        away nothing is limited.
        """
        generation = self._generation
        if generation is None or not self._available:
            self._metrics.claims_answered(_UNAVAILABLE, 1)
            return ClaimResult(_UNAVAILABLE)
        nonce = os.urandom(NONCE_BYTES)
        try:
            bucket, key = self._place(merchant_id, idempotency_key, generation)
            limit = None
            if rate_limit is not None:
                limit = (f"{{b{bucket}}}:rate:{merchant_id}".encode(), rate_limit)
                self._limiting = True
            row = _make_claim(bucket, key, nonce, fingerprint, generation, limit)
            return await self._claim_lane.submit(row)
        except Exception:  # noqa: BLE001 (queue full, lane closed, text that is none)
            self._metrics.claims_answered(_UNAVAILABLE, 1)
            return ClaimResult(_UNAVAILABLE, nonce, generation)

    def release(
        self,
        merchant_id: str,
        idempotency_key: str,
        nonce: bytes,
        *,
        generation: str | None = None,
    ) -> None:
        """Give a claim back, if it is still this owner's. Returns at once and never raises.

        A release that does not reach Redis costs the next caller of the key an IN_FLIGHT, until
        `claim_life_ms` is over.

        Args:
            merchant_id: whose key it is.
            idempotency_key: the client's.
            nonce: `ClaimResult.nonce`; with an empty one nothing happens.
            generation: `ClaimResult.generation`; without it, the present one.
        """
        if nonce:
            self._settle(merchant_id, idempotency_key, b"C" + nonce, generation)

    def cache(
        self,
        merchant_id: str,
        idempotency_key: str,
        *,
        fingerprint: bytes,
        first_request_id: str,
        response: bytes,
        generation: str | None = None,
    ) -> None:
        """Put a frozen response in a claim's place, whoever's it is. Returns at once, never raises.

        Call it only after PostgreSQL committed the response, and only for a frozen one. An entry
        is immutable: a later call for the key changes nothing. One beyond `cache_bytes_max`, or
        while Redis has no room for it, is not cached; a bare claim is left to its end, and
        PostgreSQL answers repeats.

        Args:
            merchant_id: whose key it is.
            idempotency_key: the client's.
            fingerprint: of the request, at most 255 bytes.
            first_request_id: of the request that the response answered, at most 255 bytes.
            response: without its replay field.
            generation: that of the connection which committed; `ClaimResult.generation` is safe,
                since an entry in a generation that has passed is never read. Without it, the
                present one.
        """
        entry = _encode(fingerprint, first_request_id, response)
        if entry is None or len(entry) > self._cache_bytes_max:
            self._metrics.settlements_dropped("TOO_LARGE", 1)
            return
        self._settle(merchant_id, idempotency_key, entry, generation)

    def _settle(
        self, merchant_id: str, idempotency_key: str, entry: bytes, generation: str | None
    ) -> None:
        generation = generation or self._generation
        if generation is None or not self._available:
            self._metrics.settlements_dropped("UNAVAILABLE", 1)
            return
        try:
            bucket, key = self._place(merchant_id, idempotency_key, generation)
            self._settle_lane.submit(_make_settlement(bucket, key, entry))
        except QueueFull:
            self._metrics.settlements_dropped("QUEUE_FULL", 1)
        except Exception:  # noqa: BLE001 (lane closed, text that is none)
            self._metrics.settlements_dropped("CLOSED" if self._closed else "REFUSED", 1)

    def _place(self, merchant_id: str, idempotency_key: str, generation: str) -> tuple[int, bytes]:
        """The bucket and the Redis key. The same in every process: no `hash()`."""
        bucket = zlib.crc32(merchant_id.encode()) % self._buckets
        digest = _KEY_DIGEST.copy()
        digest.update(idempotency_key.encode())
        key = f"{{b{bucket}}}:{generation}:idem:{merchant_id}:{digest.hexdigest()}"
        return bucket, key.encode()

    async def _flush_claims(self, rows: Sequence[_Claim]) -> Sequence[ClaimResult]:
        try:
            keys = [row.key for row in rows]
            args: list[int | bytes] = [
                self._claim_life_ms,
                b"".join([row.nonce for row in rows]),
            ]
            if self._limiting:
                limit_keys, limit_args = _limits_of(rows)
                keys += limit_keys
                args += limit_args
            reply = await self._run(_CLAIM, keys, args)
            return self._read_claims(rows, reply)
        except Exception:  # noqa: BLE001 (whatever it is, PostgreSQL decides)
            self._metrics.claims_answered(_UNAVAILABLE, len(rows))
            return [ClaimResult(_UNAVAILABLE, row.nonce, row.generation) for row in rows]

    def _read_claims(self, rows: Sequence[_Claim], reply: list[bytes]) -> list[ClaimResult]:
        """Results of the rows from the reply of claim.lua, counted.

        Raises:
            ValueError: the reply is none of claim.lua's.
        """
        letters, *entries = reply
        limited = letters.count(b"L")
        if len(letters) != len(rows) or letters.count(b"R") + limited != len(entries):
            raise ValueError("claim.lua's reply does not fit its keys")
        next_entry = iter(entries)
        results: list[ClaimResult] = []
        replays = conflicts = unknown = 0
        for row, letter in zip(rows, letters, strict=True):
            if letter == 0x4E:  # N
                result = make_claim_result(_NEW, row.nonce, row.generation)
            elif letter == 0x46:  # F
                result = ClaimResult(_IN_FLIGHT, b"", row.generation)
            elif letter == 0x4C:  # L
                result = ClaimResult(_RATE_LIMITED, retry_after_s=_pause_s(int(next(next_entry))))
            else:
                frozen = _decode(next(next_entry)) if letter == 0x52 else None  # R
                if frozen is None:
                    unknown += 1
                    result = ClaimResult(_UNAVAILABLE, row.nonce, row.generation)
                elif frozen.fingerprint == row.fingerprint:
                    replays += 1
                    result = ClaimResult(
                        _REPLAY,
                        b"",
                        row.generation,
                        frozen.response,
                        frozen.first_request_id,
                    )
                else:
                    conflicts += 1
                    result = ClaimResult(
                        _CONFLICT,
                        b"",
                        row.generation,
                        first_request_id=frozen.first_request_id,
                    )
            results.append(result)
        for outcome, claims in (
            (_NEW, letters.count(b"N")),
            (_IN_FLIGHT, letters.count(b"F")),
            (_REPLAY, replays),
            (_CONFLICT, conflicts),
            (_RATE_LIMITED, limited),
            (_UNAVAILABLE, unknown),
        ):
            if claims:
                self._metrics.claims_answered(outcome, claims)
        return results

    async def _flush_settlements(self, rows: Sequence[_Settlement]) -> Sequence[None]:
        sent = rows
        try:
            if self._loop.time() >= self._look_for_room_at_s:
                await self._look_for_room()
            if not self._has_room:
                sent = [row for row in rows if row.entry.startswith(b"C")]
                if dropped := len(rows) - len(sent):
                    self._metrics.settlements_dropped("NO_ROOM", dropped)
            if sent:
                refused = await self._run(
                    _SETTLE,
                    [row.key for row in sent],
                    [self._cache_life_ms, *[row.entry for row in sent]],
                )
                if refused:
                    self._metrics.settlements_dropped("REFUSED", int(refused))
        except Exception:  # noqa: BLE001 (whatever it is, it costs a round trip later)
            self._metrics.settlements_dropped("UNAVAILABLE", len(sent))
        return [None] * len(rows)

    async def _look_for_room(self) -> None:
        if not self._available:
            return
        self._look_for_room_at_s = self._loop.time() + ROOM_LOOK_EVERY_S
        try:
            told = await self._client.execute("INFO", "memory", until=self._until())
        except RedisRefused:
            self._has_room = True  # this user may not ask
            return
        except RedisAway:
            return  # what is sent next finds it out
        has_room = _has_room(told)
        if has_room != self._has_room:
            self._has_room = has_room
            if has_room:
                _logger.info("Redis has room again: answers are cached")
            else:
                _logger.warning("Redis is nearly full: answers are not cached, claims go on")

    async def _run(self, script: _Script, keys: list[bytes], args: list[int | bytes]) -> Any:
        """Run a script within `timeout_ms`; any failure opens the circuit."""
        if not self._available:
            raise _Away
        try:
            return await self._send((script.sha, len(keys), *keys, *args), script)
        except Exception as error:
            self._open_circuit(error)
            raise

    async def _send(self, arguments: tuple[Part, ...], script: _Script) -> Any:
        # Sending again is safe: a claim that meets its own nonce has won, and settling twice is
        # settling once.
        until = self._until()
        for _ in range(SENDS_MAX - 1):
            try:
                return await self._client.execute("EVALSHA", *arguments, until=until)
            except RedisRefused as refusal:
                if refusal.is_elsewhere and self._loop.time() < until:
                    continue  # over a connection of its own: the address may lead to the primary
                if refusal.code != "NOSCRIPT":
                    raise
                await self._client.execute("SCRIPT", "LOAD", script.text, until=until)
            except RedisAway:
                # Most likely an idle connection that was closed meanwhile.
                if self._loop.time() >= until:
                    raise
        return await self._client.execute("EVALSHA", *arguments, until=until)

    async def _make_ready(self) -> None:
        """Load the scripts, and find out whether the server takes writes.

        A replica loads scripts too, and answers whoever only asks. No claim waits for it: it may
        take as long to connect as connecting may, with TLS longer than an answer.
        """
        await self._client.connect()
        until = self._until()
        for script in (_CLAIM, _SETTLE):
            await self._client.execute("SCRIPT", "LOAD", script.text, until=until)
        try:
            await self._client.execute("DEL", _NO_KEY, until=until)
        except RedisRefused as refusal:
            if refusal.code != "NOPERM":  # this user may write by the scripts alone
                raise

    def _until(self) -> float:
        return self._loop.time() + self._timeout_s

    def _open_circuit(self, error: Exception) -> None:
        if not self._available:
            return
        _logger.warning("Redis is unavailable (%s); PostgreSQL decides alone", _name_of(error))
        self._available = False
        self._metrics.redis_available(False)
        if not self._closed:
            self._probe = self._loop.create_task(self._probe_until_back(), name="redis-probe")

    async def _probe_until_back(self) -> None:
        while True:
            # Spread, so that many gateways do not fall on a Redis that has just come back.
            spread = random.uniform(0.5, 1.5)
            await asyncio.sleep(self._retry_after_s * spread)
            try:
                await self._make_ready()
            except Exception as error:  # noqa: BLE001 (whatever it is, ask again later)
                _logger.debug("Redis is still unavailable (%s)", _name_of(error))
                continue
            _logger.info("Redis is available again")
            self._available = True
            self._metrics.redis_available(True)
            return


def _name_of(error: Exception) -> str:
    """What may be logged of it: a refusal's text could quote what was sent, its code does not."""
    name = type(error).__name__
    return f"{name} {error.code}" if isinstance(error, RedisRefused) else name


def _has_room(told: bytes) -> bool:
    """Whether Redis, by its INFO, may be given frozen responses; yes where it limits nothing."""
    fields = _memory_of(told)
    try:
        most, used = int(fields[b"maxmemory"]), int(fields[b"used_memory"])
    except (KeyError, ValueError):
        return True
    # What evicts is always full.
    if not most or evicting_policy(told):
        return True
    return used <= CACHE_MEMORY_SHARE_MAX * most


def evicting_policy(told: bytes) -> str:
    """The policy by which Redis, by its INFO, gives keys away when it is full; empty for none."""
    fields = _memory_of(told)
    policy = fields.get(b"maxmemory_policy", b"noeviction").decode("ascii", "replace")
    limited = fields.get(b"maxmemory", b"0") != b"0"
    return policy if limited and policy != "noeviction" else ""


def _memory_of(told: bytes) -> dict[bytes, bytes]:
    return dict(line.split(b":", 1) for line in told.split(b"\r\n") if b":" in line)


def _limits_of(rows: Sequence[_Claim]) -> tuple[list[bytes], list[int | bytes]]:
    """The further keys and arguments of claim.lua; none where no claim has a limit."""
    numbers: dict[bytes, int] = {}
    args: list[int | bytes] = [b""]
    of_rows = bytearray()
    for row in rows:
        number = 0
        if row.limit is not None:
            key, limit = row.limit
            number = numbers.get(key, 0)
            if not number:
                number = numbers[key] = len(numbers) + 1
                args += (f"{1e6 / limit.per_s:.3f}".encode(), limit.burst)
        of_rows += number.to_bytes(2, "big")
    if not numbers:
        return [], []
    args[0] = bytes(of_rows)
    return [*numbers], args


def _pause_s(milliseconds: int) -> float:
    # In few sizes: refusals of the same size are encoded once.
    return -(-milliseconds // RETRY_STEP_MS) * RETRY_STEP_MS / 1000


def _bucket_of_claim(row: _Claim) -> int:
    return row.bucket


def _bucket_of_settlement(row: _Settlement) -> int:
    return row.bucket


def _encode(fingerprint: bytes, first_request_id: str, response: bytes) -> bytes | None:
    """`R`, then fingerprint and first request id, each behind its length in a byte, then the rest.

    None when a part is too long for its length.
    """
    request_id = first_request_id.encode("utf-8", "replace")
    if len(fingerprint) > 0xFF or len(request_id) > 0xFF:
        return None
    return b"R%c%b%c%b%b" % (len(fingerprint), fingerprint, len(request_id), request_id, response)


def _decode(entry: bytes) -> _Frozen | None:
    """The parts of an entry that `_encode` made; None when it is damaged."""
    try:
        fingerprint_end = 2 + entry[1]
        request_id_end = fingerprint_end + 1 + entry[fingerprint_end]
        if len(entry) < request_id_end:
            return None
        return _Frozen(
            entry[2:fingerprint_end],
            entry[fingerprint_end + 1 : request_id_end].decode(),
            entry[request_id_end:],
        )
    except (IndexError, UnicodeDecodeError):
        return None
