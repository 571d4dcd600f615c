"""What processes count for routing, added up in Redis, where it outlives them."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

import orjson

from gateway.routing.breakers import ExchangeUnavailable
from gateway.routing.learning import Increment, SegmentKey
from storage.redis.breakers import names_of
from storage.redis.connection import Part, RedisAway, RedisClient, RedisRefused

PREFIX: Final = "{routing}:success:"
LIFE_HALF_LIVES: Final = 20
"""A segment that nobody asked about for so many half-lives is forgotten: a millionth is left."""

_SCRIPT: Final = resources.files(__package__).joinpath("lua", "learning.lua").read_text("utf-8")


class RedisCounts:
    """Implements the port `gateway.routing.learning.CountExchange`."""

    def __init__(self, client: RedisClient, prefix: str = PREFIX) -> None:
        """`client` stays the caller's."""
        self._client = client
        self._prefix = prefix

    async def exchange(
        self, increments: Mapping[SegmentKey, Sequence[Increment]], half_life_s: float
    ) -> Mapping[SegmentKey, Sequence[Increment]]:
        """See the port."""
        keys: list[Part] = []
        half_life_ms = round(1000 * half_life_s)
        arguments: list[Part] = [half_life_ms, LIFE_HALF_LIVES * half_life_ms]
        for segment, accounts in increments.items():
            keys.append(self._prefix + orjson.dumps(segment).decode("utf-8"))
            arguments.append(len(accounts))
            for each in accounts:
                field = orjson.dumps(each.account)
                arguments += (field, f"{each.successes:.6f}", f"{each.failures:.6f}")
        try:
            reply = await self._client.execute("EVAL", _SCRIPT, len(keys), *keys, *arguments)
            return {
                segment: _counts(fields) for segment, fields in zip(increments, reply, strict=True)
            }
        except (RedisAway, RedisRefused) as error:
            raise ExchangeUnavailable(str(error)) from error
        except (TypeError, ValueError) as error:
            raise ExchangeUnavailable("an answer that is none") from error


def _counts(fields: Sequence[Any]) -> list[Increment]:
    counts = []
    for place in range(0, len(fields), 3):
        names = names_of(fields[place], 2)
        if names is None:
            continue  # and hides nobody else's
        connector, account_id = names
        counts.append(
            Increment((connector, account_id), float(fields[place + 1]), float(fields[place + 2]))
        )
    return counts
