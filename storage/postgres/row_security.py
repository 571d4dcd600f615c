"""Row-level security: what a statement of ours that forgot its merchant would meet.

Every statement names its merchants, and that is the first wall. With the second one a lane has a
role of its own, and before each batch its session is told for whom the batch is; PostgreSQL then
shows and takes those merchants' rows only. The reader has one merchant at a time, the writers those
of their batch. Recovery looks after all merchants, so its role sees all.
`docs/decisions/0009-row-level-security.md` says what that costs.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from storage.postgres.lanes import LaneRow
from storage.postgres.migrate import CONNECT_TIMEOUT_S, TABLE_LOCK_WAIT_S_MAX, check_schema
from storage.postgres.pool import Connection, connect_once
from storage.postgres.queries import query, run

READER: Final = "gateway_reader"
WRITER: Final = "gateway_writer"
RECOVERER: Final = "gateway_recoverer"

_CREATE_ROLES = query("row_security", "create_roles")
_PROTECT = query("row_security", "protect")
_UNPROTECT = query("row_security", "unprotect")
_PREPARE = query("row_security", "prepare")
_PROBLEMS = query("row_security", "problems")
_WITHIN_MERCHANTS = query("row_security", "within_merchants")
_WITHIN_MERCHANT = query("row_security", "within_merchant")
_READ_AS_MERCHANT = query("row_security", "read_as_merchant")

Value = TypeVar("Value")
Result = TypeVar("Result")
Write = Callable[[Connection, Sequence[LaneRow[Value]]], Awaitable[Sequence[Result]]]


async def _connect(dsn: str) -> Connection:
    return await connect_once(
        dsn,
        CONNECT_TIMEOUT_S,
        server_settings={
            "application_name": "gateway-row-security",
            "lock_timeout": str(int(TABLE_LOCK_WAIT_S_MAX * 1000)),
        },
    )


async def enable(dsn: str, login: str | None = None, *, new_tables_only: bool = False) -> None:
    """Create the roles and the policies; again after every migration that adds a table.

    `dsn` is that of the tables' owner, who may create roles where there are none; `login` the user
    that gateways connect as, by default the one of the last time, and the first time the owner.
    With `new_tables_only` no table is locked that has its policies. Gateways without the setting go
    on as before. Raises SchemaError for a database without this version's tables, and asyncpg's
    and OSError's errors.
    """
    connection = await _connect(dsn)
    try:
        await check_schema(connection)
        protect = "new" if new_tables_only else "all"
        await run(connection, _PREPARE, login=login, protect=protect)
        async with connection.transaction():
            await connection.execute(_CREATE_ROLES.text)
            await connection.execute(_PROTECT.text)
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)


async def disable(dsn: str) -> None:
    """Remove the policies; the roles stay, other databases may use them.

    Raises asyncpg's and OSError's errors.
    """
    connection = await _connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute(_UNPROTECT.text)
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)


async def problems(dsn: str) -> list[str]:
    """What keeps the wall from standing for the user of `dsn`; empty where nothing does.

    Raises asyncpg's and OSError's errors.
    """
    connection = await _connect(dsn)
    try:
        return [record["problem"] for record in await run(connection, _PROBLEMS)]
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)


def within_merchants(
    write: Write[Value, Result], merchant_of: Callable[[Value], str]
) -> Write[Value, Result]:
    """`write`, by a session that is held to the merchants of its batch."""

    async def held(connection: Connection, batch: Sequence[LaneRow[Value]]) -> Sequence[Result]:
        merchants = sorted({merchant_of(row.value) for row in batch})
        await run(connection, _WITHIN_MERCHANTS, merchants=merchants)
        return await write(connection, batch)

    return held


def within_merchant(
    read: Write[Value, Result], merchant_of: Callable[[Value], str]
) -> Write[Value, Result]:
    """`read`, by a session that is held to the one merchant of its batch."""

    async def held(connection: Connection, batch: Sequence[LaneRow[Value]]) -> Sequence[Result]:
        await run(connection, _WITHIN_MERCHANT, merchant=merchant_of(batch[0].value))
        return await read(connection, batch)

    return held


async def read_as_merchant(connection: Connection, merchant_id: str) -> None:
    """Hold the transaction under way to reading one merchant's rows."""
    await run(connection, _READ_AS_MERCHANT, merchant=merchant_id)
