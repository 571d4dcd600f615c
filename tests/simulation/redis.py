"""Redis, simulated: what the two scripts of the claims do, with expiry, restarts and old data."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any, Final

from storage.redis import claims
from storage.redis.connection import RedisAway, RedisRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.simulation.loop import Process, SimulatedLoop
    from tests.simulation.network import Network

REDIS: Final = "redis"

_Entries = dict[bytes, tuple[bytes, float]]
"""Values with the time of their expiry, by Redis' own clock."""


class RedisServer:
    """The data, and the scripts it knows."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self.up = True
        self.step_s = 0.0
        """How far its clock has been moved."""
        self.entries: _Entries = {}
        self.scripts: set[str] = set()
        self._snapshot: _Entries = {}
        self.on_frozen: Callable[[bytes], None] | None = None
        """Called with a frozen response that has just been cached."""

    def save(self) -> None:
        """Take the snapshot that a restart may come back with."""
        self._snapshot = dict(self.entries)

    def flush(self) -> None:
        """Lose all data."""
        self.entries.clear()

    def restart(self, *, old_data: bool) -> None:
        """Come back, empty or with what the snapshot holds."""
        self.up = True
        self.scripts.clear()
        self.entries = dict(self._snapshot) if old_data else {}

    def load(self, text: str) -> None:
        """SCRIPT LOAD."""
        self._check()
        self.scripts.add(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    def run(self, sha: str, keys: Sequence[bytes], args: Sequence[Any]) -> Any:
        """EVALSHA."""
        self._check()
        if sha not in self.scripts:
            raise RedisRefused("NOSCRIPT no matching script")
        return self._claim(keys, args) if sha == claims._CLAIM.sha else self._settle(keys, args)

    def delete(self, key: bytes) -> int:
        """DEL."""
        self._check()
        return int(self.entries.pop(key, None) is not None)

    def _check(self) -> None:
        if not self.up:
            raise ConnectionResetError("the server has gone")

    @property
    def _now_s(self) -> float:
        return self._loop.now_s + self.step_s

    def _get(self, key: bytes) -> bytes | None:
        entry = self.entries.get(key)
        if entry is None or entry[1] <= self._now_s:
            self.entries.pop(key, None)
            return None
        return entry[0]

    def _claim(self, keys: Sequence[bytes], args: Sequence[Any]) -> list[bytes]:
        """As lua/claim.lua."""
        life_ms, nonces = args
        size = len(nonces) // len(keys)
        letters, replies = b"", []
        for number, key in enumerate(keys):
            claim = b"C" + nonces[number * size : (number + 1) * size]
            found = self._get(key)
            if found is None:
                self.entries[key] = (claim, self._now_s + life_ms / 1000)
            if found is None or found == claim:
                letters += b"N"
            elif found.startswith(b"C"):
                letters += b"F"
            else:
                letters += b"R"
                replies.append(found)
        return [letters, *replies]

    def _settle(self, keys: Sequence[bytes], args: Sequence[Any]) -> int:
        """As lua/settle.lua."""
        life_ms, *entries = args
        for key, entry in zip(keys, entries, strict=True):
            found = self._get(key)
            if entry.startswith(b"C"):
                if found == entry:
                    del self.entries[key]
            elif found is None or not found.startswith(b"R"):
                self.entries[key] = (entry, self._now_s + life_ms / 1000)
                if self.on_frozen is not None:
                    self.on_frozen(entry)
        return 0


class Client:
    """What `storage.redis.claims.Claims` uses of `storage.redis.connection.RedisClient`."""

    def __init__(self, network: Network, process: Process, server: RedisServer) -> None:
        self._network = network
        self._process = process
        self._server = server

    async def connect(self) -> None:
        """See there: nothing is connected here, and the first command finds out the same."""

    async def execute(self, *command: Any, until: float) -> Any:
        """See there."""

        def action() -> Any:
            if command[0] == "SCRIPT":
                return self._server.load(command[2])
            if command[0] == "INFO":
                return b"maxmemory:0\r\n"
            if command[0] == "DEL":
                return self._server.delete(command[1])
            count = command[2]
            return self._server.run(command[1], list(command[3 : 3 + count]), command[3 + count :])

        try:
            async with asyncio.timeout_at(until):
                return await self._network.call(self._process, REDIS, action)
        except (ConnectionResetError, TimeoutError) as error:
            raise RedisAway(str(error)) from error
