"""storage.postgres.errors: which failures of a batch are repeated, searched for a row, or final."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from storage.batching import Failure
from storage.postgres.errors import (
    CommitInDoubt,
    ConnectionUnavailable,
    NotDurable,
    SchemaError,
    classify,
    keeps_connection,
)

pytestmark = pytest.mark.unit

_PASSING = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.ConnectionFailureError,
    asyncpg.TooManyConnectionsError,
    asyncpg.DiskFullError,
    asyncpg.PostgresIOError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.InvalidCachedStatementError,
    asyncpg.InternalClientError,
    asyncpg.InterfaceError,
    ConnectionUnavailable,
    CommitInDoubt,
    ConnectionResetError,
    TimeoutError,
)
_OF_A_ROW = (
    asyncpg.UniqueViolationError,
    asyncpg.CheckViolationError,
    asyncpg.NumericValueOutOfRangeError,
    asyncpg.CharacterNotInRepertoireError,
    OverflowError,
    TypeError,
)
_FINAL = (
    asyncpg.UndefinedTableError,
    asyncpg.InsufficientPrivilegeError,
    NotDurable,
    SchemaError,
    RuntimeError,
)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        *((error, Failure.RETRY) for error in _PASSING),
        *((error, Failure.BISECT) for error in _OF_A_ROW),
        *((error, Failure.FAIL) for error in _FINAL),
    ],
)
def test_what_may_pass_is_repeated_and_only_a_rows_error_is_searched_for(
    error: type[Exception], failure: Failure
) -> None:
    assert classify(error("it failed")) is failure


def test_an_answer_that_breaks_off_may_be_that_of_a_commit() -> None:
    assert classify(asyncio.IncompleteReadError(b"", 5)) is Failure.RETRY


def test_a_connection_is_kept_only_where_the_server_answered_with_an_error_of_ours() -> None:
    kept = (*_OF_A_ROW[:-2], asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
    assert all(keeps_connection(error("it failed")) for error in kept)
    # A statement that was cancelled may have held what the next one would wait for.
    others = {*_PASSING, *_FINAL} - set(kept)
    assert not any(keeps_connection(error("it failed")) for error in others)
