"""What the gateway keeps in Redis: the fast path, never the last word."""

from storage.redis.breakers import RedisBreakers
from storage.redis.claims import (
    NONCE_BYTES,
    ClaimMetrics,
    Claims,
    NoClaimMetrics,
    evicting_policy,
)
from storage.redis.connection import RedisAway, RedisClient, RedisRefused
from storage.redis.learning import RedisCounts
from storage.redis.reattempts import Reattempts

__all__ = [
    "NONCE_BYTES",
    "ClaimMetrics",
    "Claims",
    "NoClaimMetrics",
    "Reattempts",
    "RedisAway",
    "RedisBreakers",
    "RedisClient",
    "RedisCounts",
    "RedisRefused",
    "evicting_policy",
]
