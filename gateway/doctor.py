"""What `gateway doctor` examines: servers, durability, schema, clock, listening addresses."""

import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
import asyncpg
from asyncpg.connect_utils import SessionAttribute

from gateway.local import LocalState
from gateway.settings import Settings, split_address
from storage.postgres import SchemaError, check_schema, durability_problems
from storage.postgres.store import DIRECT, FOLLOW_UPS, NOTIFICATIONS
from storage.redis import RedisAway, RedisClient, RedisRefused

CLOCK_DIFFERENCE_S_MAX = 2.0
"""How far this machine's clock may be from the database's before it is worth a word."""
CHECK_TIMEOUT_S = 5.0
"""How long each check may take."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined."""

    good: bool
    text: str


async def examine(settings: Settings, state: LocalState) -> list[Finding]:
    """Examine everything; one finding for each thing, in the order of a start."""
    dsn = settings.postgres_dsn.get_secret_value() or state.postgres_dsn
    redis_url = settings.redis_url.get_secret_value() or state.redis_url
    simulator_url = settings.simulator_url or state.simulator_url
    findings = await _postgres(dsn, settings)
    findings.append(await _redis(redis_url, settings))
    findings.append(await _simulator(simulator_url))
    findings += [_address("listen_address", settings.listen_address)]
    findings += [_address("metrics_address", settings.metrics_address)]
    return findings


async def _postgres(dsn: str, settings: Settings) -> list[Finding]:
    if not dsn:
        return [
            Finding(
                False,
                "PostgreSQL: no address; set GATEWAY_POSTGRES_DSN or start `python -m gateway run`",
            )
        ]
    try:
        connection = await asyncpg.connect(
            dsn, timeout=CHECK_TIMEOUT_S, target_session_attrs=SessionAttribute.read_write
        )
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InternalClientError,
        TimeoutError,
        ValueError,
    ) as error:
        return [Finding(False, f"PostgreSQL: {type(error).__name__}: {error}")]
    try:
        version = connection.get_server_version()
        findings = [Finding(True, f"PostgreSQL {version.major}.{version.micro} answers")]
        problems = await durability_problems(connection)
        findings += [Finding(False, f"PostgreSQL: {problem}") for problem in problems]
        if not problems:
            findings.append(Finding(True, "PostgreSQL keeps what it commits"))
        try:
            await check_schema(connection)
            findings.append(Finding(True, "the schema is the one that this version needs"))
        except SchemaError as error:
            findings.append(Finding(False, f"schema: {error}"))
        findings.append(await _connections(connection, settings))
        started = time.monotonic()
        database_time: datetime = await connection.fetchval("SELECT clock_timestamp()")
        half_way_s = (time.monotonic() - started) / 2
        difference_s = abs((datetime.now(UTC) - database_time).total_seconds() - half_way_s)
        findings.append(
            Finding(
                difference_s <= CLOCK_DIFFERENCE_S_MAX,
                f"this machine's clock is {difference_s:.3f} s from the database's",
            )
        )
        return findings
    finally:
        connection.terminate()


async def _connections(connection: "asyncpg.Connection[Any]", settings: Settings) -> Finding:
    """Whether PostgreSQL has room for the connections that each worker holds."""
    lanes = settings.intent_connections + settings.outcome_connections + settings.read_connections
    lanes += FOLLOW_UPS.connections + DIRECT.connections
    if settings.applies_notifications:
        lanes += NOTIFICATIONS.connections
    needed = settings.workers * lanes
    room: int = await connection.fetchval(
        "SELECT sum(CASE name WHEN 'max_connections' THEN 1 ELSE -1 END * setting::int)"
        " FROM pg_settings WHERE name IN"
        " ('max_connections', 'superuser_reserved_connections', 'reserved_connections')"
    )
    return Finding(
        needed <= room,
        f"{settings.workers} x {needed // settings.workers} connections to PostgreSQL are held;"
        f" it has {room} for all its clients",
    )


async def _redis(url: str, settings: Settings) -> Finding:
    if not url:
        return Finding(False, "Redis: no address; set GATEWAY_REDIS_URL")
    try:
        client = RedisClient(
            url,
            timeout_ms=settings.redis_timeout_ms,
            connect_timeout_ms=settings.redis_connect_timeout_ms,
        )
    except ValueError as error:
        return Finding(False, f"GATEWAY_REDIS_URL: {error}")
    try:
        started = time.monotonic()
        await client.execute("PING")
        return Finding(True, f"Redis answers in {1000 * (time.monotonic() - started):.1f} ms")
    except (RedisAway, RedisRefused) as error:
        return Finding(
            False,
            f"Redis: {type(error).__name__}: {error}; payments go on without it, slower",
        )
    finally:
        await client.close()


async def _simulator(url: str) -> Finding:
    if not url:
        return Finding(True, "no PSP simulator is configured: TEST payments have no connector")
    timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url}/v1/profile") as response,
        ):
            response.raise_for_status()
            return Finding(True, "the PSP simulator answers")
    except (aiohttp.ClientError, TimeoutError) as error:
        return Finding(False, f"PSP simulator: {type(error).__name__}: {error}")


def _address(name: str, address: str) -> Finding:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(
                False,
                f"GATEWAY_{name.upper()} {address}: {error.strerror}; does a gateway run already?",
            )
    return Finding(True, f"GATEWAY_{name.upper()} {address} is free")
