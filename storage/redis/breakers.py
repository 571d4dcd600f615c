"""What processes tell each other of their circuit breakers through Redis."""

import os
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

import orjson

from gateway.routing.breakers import BreakerKey, ExchangeUnavailable, Report, Shared
from storage.redis.connection import Part, RedisAway, RedisClient, RedisRefused

KEY: Final = "{routing}:breakers"
LIFE_MS: Final = 3_600_000
"""After so long an opening that nobody tried to end is forgotten."""

_SCRIPT: Final = resources.files(__package__).joinpath("lua", "breakers.lua").read_text("utf-8")


class RedisBreakers:
    """Implements the port `gateway.routing.breakers.Exchange`."""

    def __init__(self, client: RedisClient, key: str = KEY) -> None:
        """`client` stays the caller's."""
        self._client = client
        self._key = key
        self._who = os.urandom(8).hex()

    async def exchange(self, reports: Sequence[Report]) -> Sequence[Shared]:
        """See the port."""
        arguments: list[Part] = [self._who, LIFE_MS]
        for report in reports:
            arguments += (
                report.kind.value,
                orjson.dumps(list(report.key)),
                round(1000 * report.s),
                report.streak,
                report.version,
            )
        try:
            # By its text: a round trip of the background, which no flush of scripts breaks.
            reply = await self._client.execute("EVAL", _SCRIPT, 1, self._key, *arguments)
            parts = (reply[place : place + 5] for place in range(0, len(reply), 5))
            return [shared for part in parts if (shared := _shared(part)) is not None]
        except (RedisAway, RedisRefused) as error:
            raise ExchangeUnavailable(str(error)) from error
        except (TypeError, ValueError) as error:
            raise ExchangeUnavailable("an answer that is none") from error


def names_of(field: bytes, count: int) -> list[str] | None:
    """The names in a field's; None where they are no such, as another version's."""
    try:
        names = orjson.loads(field)
    except ValueError:
        return None
    is_list = isinstance(names, list) and len(names) == count
    return names if is_list and all(isinstance(each, str) for each in names) else None


def _shared(part: Sequence[Any]) -> Shared | None:
    """None where its name cannot be read."""
    name, version, remaining_ms, streak, mine = part
    names = names_of(name, len(BreakerKey._fields))
    if names is None:
        return None
    return Shared(
        BreakerKey(*names),
        version=int(version),
        remaining_s=int(remaining_ms) / 1000,
        streak=int(streak),
        mine=bool(mine),
    )
