"""Connections that a lane holds, where a server takes no new ones or falls silent."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest

from storage.postgres.errors import ConnectionUnavailable
from storage.postgres.pool import ConnectionSettings, HeldConnections
from storage.postgres.queries import query
from tests.faults.proxies import Action, postgres_proxy
from tests.servers import fetch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from storage.postgres.pool import Connection

HANG_S = 60.0
"""A wait that takes so long hangs; no rule is tested by this time."""
ROLE = "held_connections_test"


async def _session(connection: Connection) -> int:
    """The server's number of the session."""
    return int(await connection.fetchval("SELECT pg_backend_pid()"))


@asynccontextmanager
async def _holding(settings: ConnectionSettings, size: int) -> AsyncIterator[HeldConnections]:
    held = HeldConnections(settings, "test", size)
    try:
        yield held
    finally:
        await held.close()


@pytest.fixture
def limited_dsn(dsn: str) -> Iterator[str]:
    """The database for a user whose number of connections the test limits."""
    fetch(dsn, f"CREATE ROLE {ROLE} LOGIN PASSWORD 'held'")
    url = urlsplit(dsn)
    host = url.netloc.rpartition("@")[2]
    try:
        yield urlunsplit(url._replace(netloc=f"{ROLE}:held@{host}"))
    finally:
        fetch(
            dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", ROLE
        )
        fetch(dsn, f"DROP ROLE {ROLE}")


@pytest.mark.parametrize("ended", [0, 1])
async def test_a_connection_that_cannot_be_made_again_hides_none_that_is_open(
    dsn: str, limited_dsn: str, ended: int
) -> None:
    async with _holding(ConnectionSettings(limited_dsn), 2) as held:
        await held.open()
        meeting = asyncio.Barrier(2)

        async def session_of_both(connection: Connection) -> int:
            await meeting.wait()
            return await _session(connection)

        sessions = await asyncio.gather(held.run(session_of_both), held.run(session_of_both))
        assert len(set(sessions)) == 2
        fetch(dsn, f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
        fetch(dsn, "SELECT pg_terminate_backend($1, 60000)", sessions[ended])

        async def is_seen() -> bool:
            # By a user of both places at once: one of the two finds its session ended.
            found = await asyncio.gather(
                held.run(_session), held.run(_session), return_exceptions=True
            )
            return any(isinstance(each, ConnectionUnavailable) for each in found)

        while not await is_seen():
            pass
        assert held.connected == 1
        # Whether the pause before the next try is over or not.
        for _ in range(50):
            assert await held.run(_session) == sessions[1 - ended]
        fetch(dsn, f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")

        async def both_are_back() -> bool:
            found = await asyncio.gather(
                held.run(_session), held.run(_session), return_exceptions=True
            )
            return not any(isinstance(each, Exception) for each in found)

        while not await both_are_back():
            pass
        assert held.connected == 2


async def test_a_server_that_falls_silent_while_one_connects_is_given_up(dsn: str) -> None:
    """At the last step: it is connected, and has been asked which server it is."""
    generations: list[str] = []
    with postgres_proxy(dsn) as proxy:
        silent = proxy.intercept(query("session", "generation").text, Action.HOLD_STATEMENT)
        held = HeldConnections(
            ConnectionSettings(proxy.dsn, connect_timeout_s=1), "test", 1, generations.append
        )
        try:
            async with asyncio.timeout(HANG_S):
                while silent.left:  # a slow machine may not come as far at first
                    with pytest.raises(ConnectionUnavailable):
                        await held.run(_session)
            await silent.reached()
            assert (held.connected, held.busy, generations) == (0, 0, [])

            async def is_back() -> bool:
                try:
                    await held.run(_session)
                except ConnectionUnavailable:  # the pause before the next try, or a slow machine
                    return False
                return True

            while not await is_back():
                pass
            assert (held.connected, len(generations)) == (1, 1)
        finally:
            silent.release()
            await held.close()
