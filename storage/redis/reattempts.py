"""How often a declined card was tried again, by the networks' windows, over all gateways."""

import os
import zlib
from collections.abc import Sequence
from hashlib import sha256
from importlib import resources
from typing import Final

from gateway.routing.cascade import ReattemptLimit
from storage.redis.connection import Part, RedisAway, RedisClient, RedisRefused

_MEMBER_BYTES: Final = 8
_SCRIPT: Final = (
    resources.files(__package__).joinpath("lua", "reattempt.lua").read_text("utf-8").encode()
)


class Reattempts:
    """Implements `gateway.application.routing.Reattempts`.

    A key is `{b<bucket>}:reattempts:<merchant_id>:<digest of the instrument>`, the bucket that of
    the merchant's claims. Counts that Redis loses are counts that were allowed, at most one limit
    more; while it is away nothing is allowed.
    """

    def __init__(self, redis: RedisClient, buckets: int) -> None:
        self._redis = redis
        self._buckets = buckets

    async def take(
        self, merchant_id: str, instrument: str, limits: Sequence[ReattemptLimit]
    ) -> bool:
        """See the port."""
        bucket = zlib.crc32(merchant_id.encode()) % self._buckets
        digest = sha256(instrument.encode()).hexdigest()
        key = f"{{b{bucket}}}:reattempts:{merchant_id}:{digest}"
        bounds: list[Part] = [
            str(number) for limit in limits for number in (limit.window_s, limit.reattempts_max)
        ]
        member = os.urandom(_MEMBER_BYTES)
        try:
            counted: int = await self._redis.execute("EVAL", _SCRIPT, "1", key, member, *bounds)
        except (RedisAway, RedisRefused):
            return False
        return counted == 1
