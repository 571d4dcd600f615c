"""The client of the hot path against a real Redis: pipelining, errors, silence, other addresses."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import pytest
import trustme
from redis.asyncio import Redis

from storage.embedded import free_port
from storage.redis import RedisAway, RedisClient, RedisRefused
from tests.pumping import pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from storage.embedded import EmbeddedRedis

LONG_MS = 20_000.0
SHORT_MS = 200.0
HOUR_S = 3_600.0
HANG_S = 30.0
"""A wait that takes so long hangs; no rule is tested by this time."""


@asynccontextmanager
async def client_of(url: str, timeout_ms: float = LONG_MS) -> AsyncIterator[RedisClient]:
    client = RedisClient(url, timeout_ms=timeout_ms, connect_timeout_ms=LONG_MS)
    try:
        yield client
    finally:
        await client.close()


async def connections(own_redis: EmbeddedRedis) -> int:
    """How many connections Redis has, without the one that asks."""
    async with Redis.from_url(own_redis.url) as looking:
        return len(await looking.client_list()) - 1


async def test_concurrent_commands_share_one_connection_and_get_their_own_answers(
    own_redis: EmbeddedRedis,
) -> None:
    async with client_of(own_redis.url) as client:
        answers = await asyncio.gather(*(client.execute("ECHO", str(n)) for n in range(500)))
        assert answers == [str(number).encode() for number in range(500)]
        assert await connections(own_redis) == 1


async def test_error_is_the_answer_to_its_own_command_alone(own_redis: EmbeddedRedis) -> None:
    async with client_of(own_redis.url) as client:
        commands: list[tuple[bytes | str | int, ...]] = [
            ("ECHO", b"before"),
            ("EVALSHA", "0" * 40, 0),
            ("ECHO", b"after"),
        ]
        before, wrong, after = await asyncio.gather(
            *(client.execute(*command) for command in commands), return_exceptions=True
        )
        assert (before, after) == (b"before", b"after")
        assert isinstance(wrong, RedisRefused)
        assert wrong.code == "NOSCRIPT"


async def test_answer_of_a_cancelled_command_is_nobody_elses(own_redis: EmbeddedRedis) -> None:
    async with client_of(own_redis.url) as client:
        await client.execute("PING")
        gone = asyncio.create_task(client.execute("ECHO", b"gone"))
        await asyncio.sleep(0)  # it is sent, and its answer is not here
        gone.cancel()
        assert await client.execute("ECHO", b"mine") == b"mine"
        assert gone.cancelled()


async def test_large_values_arrive_whole(own_redis: EmbeddedRedis) -> None:
    value = bytes(range(256)) * 20_000
    async with client_of(own_redis.url) as client:
        assert await client.execute("ECHO", value) == value


async def test_silence_ends_the_connection_and_the_next_command_makes_another(
    mortal_redis: EmbeddedRedis,
) -> None:
    async with client_of(mortal_redis.url, SHORT_MS) as client:
        await client.execute("PING")
        mortal_redis.pause()
        try:
            answers = await asyncio.gather(
                *(client.execute("ECHO", b"x") for _ in range(3)), return_exceptions=True
            )
        finally:
            mortal_redis.resume()
        assert [type(answer) for answer in answers] == [RedisAway] * 3
        assert await client.execute("ECHO", b"y", until=asyncio.get_running_loop().time() + 20)


async def test_connection_that_was_lost_is_made_again_where_one_is_asked_for(
    own_redis: EmbeddedRedis,
) -> None:
    async with client_of(own_redis.url) as client:
        with pytest.raises(RedisAway):  # what is not answered in time ends it
            await client.execute("BLPOP", "nothing", 0, until=asyncio.get_running_loop().time() + 1)
        await client.connect()
        assert client._connection is not None
        assert not client._connection.lost


@pytest.mark.parametrize("before", ["connecting", "a command"])
async def test_command_waits_no_longer_than_it_may_however_long_those_before_it_may(
    own_redis: EmbeddedRedis, before: str
) -> None:
    client = RedisClient(own_redis.url, timeout_ms=SHORT_MS, connect_timeout_ms=1000 * HOUR_S)
    try:
        await client.connect()
        waiting = []
        if before == "a command":
            until = asyncio.get_running_loop().time() + HOUR_S
            waiting.append(client.execute("BLPOP", "nothing", 0, until=until))
        waiting.append(client.execute("BLPOP", "nothing", 0))
        async with asyncio.timeout(HANG_S):
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(answer) for answer in answers} == {RedisAway}
    finally:
        await client.close()


async def test_refusal_of_a_server_that_is_no_primary_any_more_ends_the_connection(
    mortal_redis: EmbeddedRedis,
) -> None:
    async with client_of(mortal_redis.url) as client:
        first = await client.execute("CLIENT", "ID")
        await client.execute("REPLICAOF", "127.0.0.1", free_port())
        assert await client.execute("CLIENT", "ID") == first
        with pytest.raises(RedisRefused) as refused:
            await client.execute("DEL", "anything")
        assert refused.value.code == "READONLY"
        assert await client.execute("CLIENT", "ID") > first


async def test_killed_redis_ends_what_waits_and_is_found_again(
    mortal_redis: EmbeddedRedis,
) -> None:
    async with client_of(mortal_redis.url) as client:
        blocked = asyncio.create_task(client.execute("BLPOP", "nothing", 0))
        while await connections(mortal_redis) < 1:
            pass
        mortal_redis.kill()
        with pytest.raises(RedisAway):
            await blocked
        with pytest.raises(RedisAway):
            await client.execute("PING")
        mortal_redis.start()
        assert await client.execute("PING") == b"PONG"


async def test_command_waits_no_longer_than_it_may_for_a_connection_that_others_make() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with client_of(f"redis://:any@127.0.0.1:{silent.getsockname()[1]}/0") as client:
            making = asyncio.create_task(client.connect())
            await asyncio.sleep(0)  # it has begun
            with pytest.raises(RedisAway):
                await client.execute("PING", until=asyncio.get_running_loop().time())
            assert not making.done()
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making


@pytest.mark.parametrize(
    ("timeout_ms", "connect_timeout_ms"), [(SHORT_MS, 1000 * HOUR_S), (1000 * HOUR_S, SHORT_MS)]
)
async def test_connection_is_waited_for_no_longer_than_either_time_out_lets(
    timeout_ms: float, connect_timeout_ms: float
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://:any@127.0.0.1:{silent.getsockname()[1]}/0"
        client = RedisClient(url, timeout_ms=timeout_ms, connect_timeout_ms=connect_timeout_ms)
        try:
            async with asyncio.timeout(HANG_S):
                with pytest.raises(RedisAway):
                    await client.execute("PING")
        finally:
            await client.close()


async def test_closed_port_is_away_at_once() -> None:
    async with client_of(f"redis://127.0.0.1:{free_port()}") as client:
        with pytest.raises(RedisAway):
            await client.execute("PING")


async def test_closed_client_ends_what_waits_and_takes_nothing_more(
    own_redis: EmbeddedRedis,
) -> None:
    async with client_of(own_redis.url) as client:
        await client.execute("PING")
        blocked = asyncio.create_task(client.execute("BLPOP", "nothing", 0))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(RedisAway):
            await blocked
        with pytest.raises(RedisAway):
            await client.execute("PING")


async def test_client_that_is_closed_while_it_connects_leaves_no_connection(
    own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = RedisClient(own_redis.url, timeout_ms=LONG_MS, connect_timeout_ms=LONG_MS)
    connect, connected, goes_on = client._address.connect, asyncio.Event(), asyncio.Event()

    async def connect_slowly() -> object:
        connection = await connect()
        connected.set()
        await goes_on.wait()
        return connection

    monkeypatch.setattr(client._address, "connect", connect_slowly)
    command = asyncio.ensure_future(client.execute("ECHO", "late"))
    await connected.wait()
    await client.close()
    goes_on.set()
    with pytest.raises(RedisAway):
        await command
    async with asyncio.timeout(HANG_S):
        while await connections(own_redis):
            pass


async def test_wrong_password_is_refused_and_not_shown(own_redis: EmbeddedRedis) -> None:
    port = urlsplit(own_redis.url).port
    async with client_of(f"redis://:guess@127.0.0.1:{port}/0") as client:
        with pytest.raises(RedisRefused) as refused:
            await client.execute("PING")
        assert refused.value.code == "WRONGPASS"
        assert "guess" not in str(refused.value)


async def test_user_of_the_address_is_the_one_that_asks_also_without_a_password(
    own_redis: EmbeddedRedis,
) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await client.acl_setuser("passwordless", enabled=True, nopass=True, commands=["+acl"])
    try:
        port = urlsplit(own_redis.url).port
        async with client_of(f"redis://passwordless@127.0.0.1:{port}/0") as client:
            assert await client.execute("ACL", "WHOAMI") == b"passwordless"
    finally:
        async with Redis.from_url(own_redis.url) as client:
            await client.acl_deluser("passwordless")


async def test_database_of_the_address_is_the_one_that_is_used(own_redis: EmbeddedRedis) -> None:
    other = own_redis.url.rpartition("/")[0] + "/3"
    async with client_of(other) as client:
        await client.execute("SET", "mine", 1)
    async with Redis.from_url(own_redis.url) as first, Redis.from_url(other) as third:
        assert (await first.exists("mine"), await third.exists("mine")) == (0, 1)


@asynccontextmanager
async def front(
    own_redis: EmbeddedRedis, *, tls: ssl.SSLContext | None = None, path: Path | None = None
) -> AsyncIterator[int]:
    """A way to a Redis: a port, which may speak TLS, or a Unix socket (then 0)."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection("127.0.0.1", urlsplit(own_redis.url).port)
        tasks.add(asyncio.create_task(pump(reader, inner[1])))
        tasks.add(asyncio.create_task(pump(inner[0], writer)))

    if path is None:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    else:
        listening = await asyncio.start_unix_server(serve, str(path))
    try:
        yield 0 if path else listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listening.wait_closed()


async def test_unix_socket_is_an_address(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    path = tmp_path / "redis socket"
    password = urlsplit(own_redis.url).password
    async with front(own_redis, path=path), client_of(f"unix://:{password}@{path}?db=2") as client:
        assert await client.execute("PING") == b"PONG"


@pytest.mark.parametrize(("name", "answers"), [("127.0.0.1", True), ("redis.example", False)])
async def test_tls_address_verifies_the_servers_name(
    own_redis: EmbeddedRedis, tmp_path: Path, name: str, answers: bool
) -> None:
    ca = trustme.CA()
    ca_file = tmp_path / "ca of redis.pem"
    ca.cert_pem.write_to_path(str(ca_file))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(name).configure_cert(tls)
    password = urlsplit(own_redis.url).password
    async with front(own_redis, tls=tls) as port:
        url = f"rediss://:{password}@127.0.0.1:{port}/0?ssl_ca_certs={quote(str(ca_file))}"
        async with client_of(url) as client:
            if answers:
                assert await client.execute("PING") == b"PONG"
            else:
                with pytest.raises(RedisAway):
                    await client.execute("PING")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:6379",
        "redis://127.0.0.1:6379/first",
        "redis://127.0.0.1:6379/0?max_connections=8",
        "redis://127.0.0.1:6379/0?ssl_ca_certs=ca.pem",
        "rediss://127.0.0.1:6379/0?ssl_ca_certs=there-is-no-such-file.pem",
    ],
)
async def test_address_that_cannot_be_followed_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="Redis' address"):
        RedisClient(url, timeout_ms=1, connect_timeout_ms=1)
