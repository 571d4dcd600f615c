"""What `gateway doctor` examines: files, servers, durability, schema, clock, addresses."""

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from gateway.connectors.configured import (
    ConnectorsMisconfigured,
    configured_keys,
    configured_kinds,
)
from gateway.jwks import JwksUnusable, read_jwks
from gateway.local import LocalState
from gateway.probe import ask_health
from gateway.rpc.tls import TlsFiles, TlsFilesUnusable
from gateway.rpc.tokens import read_key_set
from gateway.settings import Settings, algorithms_of, split_address
from storage.postgres import (
    NO_STANDBY,
    SchemaError,
    check_schema,
    connect_once,
    durability_problems,
    has_standby,
    row_security,
    unrecorded_tables,
)
from storage.postgres.store import DIRECT, EVENTS, FOLLOW_UPS, NOTIFICATIONS
from storage.redis import RedisAway, RedisClient, RedisRefused, evicting_policy

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
    findings = [*_tls(settings), *_connectors(settings)]
    findings += [each async for each in _postgres(dsn, settings)]
    findings += await _redis(redis_url, settings)
    findings += await _signing_keys(settings)
    findings.append(await _simulator(simulator_url))
    # Within a pod it is asked beside the gateway that has the addresses.
    runs, _ = await asyncio.to_thread(ask_health, settings.metrics_address, "livez")
    for name in ("listen_address", "metrics_address", "notifications_address"):
        if address := getattr(settings, name):
            findings.append(_address(name, address, runs=runs))
    return findings


def _tls(settings: Settings) -> Iterator[Finding]:
    if not settings.tls_certificate_file:
        return
    client_ca = settings.tls_client_ca_file
    files = TlsFiles(
        Path(settings.tls_certificate_file),
        Path(settings.tls_key_file),
        Path(client_ca) if client_ca else None,
    )
    try:
        files.credentials()
    except TlsFilesUnusable as error:
        yield Finding(False, f"TLS: {error}")
    else:
        yield Finding(True, "the TLS files can be served")


def _connectors(settings: Settings) -> Iterator[Finding]:
    try:
        kinds = configured_kinds(settings)
        keys = configured_keys(settings)
    except ConnectorsMisconfigured as error:
        yield Finding(False, f"connectors: {error}")
        return
    known = ", ".join(kind.name for kind in kinds)
    yield Finding(True, f"connectors can be made: {known}")
    if keys is None:
        yield Finding(True, "no wrapping keys are set: merchants' own accounts cannot be used")
    else:
        yield Finding(True, f"the wrapping keys can be used; {keys.current_key_id} wraps")


async def _signing_keys(settings: Settings) -> list[Finding]:
    if not settings.jwt_issuer:
        return []
    try:
        text = await read_jwks(
            settings.jwt_jwks_url, settings.jwt_jwks_file, settings.jwt_jwks_timeout_s
        )
        keys = read_key_set(text, algorithms_of(settings.jwt_algorithms))
    except (OSError, TimeoutError, ValueError, aiohttp.ClientError, JwksUnusable) as error:
        return [Finding(False, f"the token issuer's keys: {type(error).__name__}: {error}")]
    names = ", ".join(sorted({kid for kid, _ in keys}))
    return [Finding(True, f"the token issuer's keys can be used: {names}")]


async def _postgres(dsn: str, settings: Settings) -> AsyncIterator[Finding]:
    if not dsn:
        yield Finding(
            False,
            "PostgreSQL: no address; set GATEWAY_POSTGRES_DSN or start `python -m gateway run`",
        )
        return
    try:
        connection = await connect_once(dsn, CHECK_TIMEOUT_S, command_timeout=CHECK_TIMEOUT_S)
        try:
            async for finding in _database(connection, dsn, settings):
                yield finding
        finally:
            connection.terminate()
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        TimeoutError,
        ValueError,
    ) as error:
        yield Finding(False, f"PostgreSQL: {type(error).__name__}: {error}")


async def _database(
    connection: "asyncpg.Connection[Any]", dsn: str, settings: Settings
) -> AsyncIterator[Finding]:
    version = connection.get_server_version()
    yield Finding(True, f"PostgreSQL {version.major}.{version.micro} answers")
    problems = await durability_problems(connection)
    for problem in problems:
        yield Finding(False, f"PostgreSQL: {problem}")
    if not problems:
        yield Finding(True, "PostgreSQL keeps what it commits")
    async for finding in _standby(connection, settings):
        yield finding
    try:
        await check_schema(connection)
        yield Finding(True, "the schema is the one that this version needs")
        unrecorded = ", ".join(await unrecorded_tables(connection))
        yield Finding(
            not unrecorded,
            f"changes are not recorded, or not kept, of: {unrecorded}; a trigger is missing"
            if unrecorded
            else "changes of the configuration are recorded",
        )
    except SchemaError as error:
        yield Finding(False, f"schema: {error}")
    if settings.postgres_row_security:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            problems = await row_security.problems(dsn)
        for problem in problems:
            yield Finding(False, f"row-level security: {problem}")
        if not problems:
            yield Finding(True, "row-level security holds")
    yield await _connections(connection, settings)
    started = time.monotonic()
    database_time: datetime = await connection.fetchval("SELECT clock_timestamp()")
    half_way_s = (time.monotonic() - started) / 2
    difference_s = abs((datetime.now(UTC) - database_time).total_seconds() - half_way_s)
    yield Finding(
        difference_s <= CLOCK_DIFFERENCE_S_MAX,
        f"this machine's clock is {difference_s:.3f} s from the database's",
    )


async def _standby(
    connection: "asyncpg.Connection[Any]", settings: Settings
) -> AsyncIterator[Finding]:
    """What readiness asks of a synchronous standby (docs/standby.md)."""
    try:
        confirmed = await has_standby(connection)
    except TimeoutError:
        yield Finding(False, "PostgreSQL: no synchronous standby confirms a commit")
        return
    if confirmed:
        yield Finding(True, "a synchronous standby has what PostgreSQL commits")
    elif settings.postgres_standby_required:
        yield Finding(False, f"PostgreSQL: {NO_STANDBY}")


async def _connections(connection: "asyncpg.Connection[Any]", settings: Settings) -> Finding:
    """Whether PostgreSQL has room for the connections that each worker holds."""
    lanes = settings.intent_connections + settings.outcome_connections + settings.read_connections
    lanes += FOLLOW_UPS.connections + DIRECT.connections + EVENTS.connections
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


async def _redis(url: str, settings: Settings) -> list[Finding]:
    if not url:
        return [Finding(False, "Redis: no address; set GATEWAY_REDIS_URL")]
    try:
        client = RedisClient(
            url,
            timeout_ms=settings.redis_timeout_ms,
            connect_timeout_ms=settings.redis_connect_timeout_ms,
        )
    except ValueError as error:
        return [Finding(False, f"GATEWAY_REDIS_URL: {error}")]
    try:
        await client.connect()
        started = time.monotonic()
        await client.execute("PING")
        took_ms = 1000 * (time.monotonic() - started)
        return [Finding(True, f"Redis answers in {took_ms:.1f} ms"), *await _evictions(client)]
    except (RedisAway, RedisRefused) as error:
        return [
            Finding(
                False,
                f"Redis: {type(error).__name__}: {error}; payments go on without it, slower",
            )
        ]
    finally:
        await client.close()


async def _evictions(client: RedisClient) -> list[Finding]:
    """A Redis that gives away what has no end yet (docs/deploy.md)."""
    try:
        policy = evicting_policy(await client.execute("INFO", "memory"))
    except RedisRefused:
        return []  # this user may not ask
    if not policy:
        return []
    return [
        Finding(
            False,
            f"Redis: maxmemory-policy is {policy}: when it is full it gives away the counts of the"
            " networks' reattempt limits; set noeviction",
        )
    ]


async def _simulator(url: str) -> Finding:
    if not url:
        return Finding(True, "no PSP simulator is configured: TEST payments have no connector")
    timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url.rstrip('/')}/v1/profile") as response,
        ):
            response.raise_for_status()
            return Finding(True, "the PSP simulator answers")
    except (aiohttp.ClientError, TimeoutError) as error:
        return Finding(False, f"PSP simulator: {type(error).__name__}: {error}")


def _address(name: str, address: str, *, runs: bool) -> Finding:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if runs and taken:
                return Finding(True, f"GATEWAY_{name.upper()} {address}: a gateway runs there")
            hint = "; does a gateway run already?" if taken else ""
            return Finding(False, f"GATEWAY_{name.upper()} {address}: {error.strerror}{hint}")
    return Finding(True, f"GATEWAY_{name.upper()} {address} is free")
