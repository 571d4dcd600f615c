"""What went wrong in PostgreSQL, by SQLSTATE, and what a lane does about it."""

import asyncio
from typing import Final

import asyncpg

from storage.batching import Failure

# Appendix A of PostgreSQL's manual, by class (the first two characters) and by code.
_ROW_CLASSES: Final = frozenset(
    {
        "22",  # data exception: a value that no column takes
        "23",  # integrity constraint violation
    }
)
_PASSING_CLASSES: Final = frozenset(
    {
        "08",  # connection exception
        "53",  # insufficient resources: a full disk, too many connections
        "58",  # system error: an I/O error of the server
    }
)
_PASSING_CODES: Final = frozenset(
    {
        "0A000",  # a cached plan that a migration has outdated: the next session makes a new one
        "25006",  # read-only transaction: a primary that became a standby
        "25P03",  # idle in transaction for too long
        "40001",  # serialization failure
        "40P01",  # deadlock detected
        "55P03",  # lock not available
        "57014",  # query canceled: statement_timeout
        "57P01",  # admin shutdown
        "57P02",  # crash shutdown
        "57P03",  # cannot connect now
        "57P05",  # idle session timeout
    }
)
_KEEPING_CODES: Final = frozenset({"40001", "40P01"})


class ConnectionUnavailable(Exception):
    """No connection to PostgreSQL could be made."""


class CommitInDoubt(Exception):
    """A commit is in the primary's log and perhaps on no standby: its wait was cancelled."""


class RowRefused(Exception):
    """PostgreSQL refuses this very row: a defect of ours, or a value that it cannot hold.

    The text names the error and the constraint, never a value.
    """


class NotDurable(Exception):
    """The server is set up so that it may lose what it has committed."""


class SchemaError(Exception):
    """The database lacks a migration that this version needs."""


_PASSING_ERRORS: Final = (
    ConnectionUnavailable,
    CommitInDoubt,
    OSError,
    TimeoutError,
    asyncio.IncompleteReadError,
    asyncpg.InternalClientError,  # the protocol is out of step; that of a new connection is not
)


def classify(error: Exception) -> Failure:
    """What becomes of the rows of a batch that failed with `error`.

    Every write is idempotent, so whatever may pass is repeated, a COMMIT with a lost answer
    included; only errors of a row's values are searched for the row.
    """
    if isinstance(error, asyncpg.PostgresError):
        return _by_code(error.sqlstate or "")
    if isinstance(error, asyncpg.InterfaceError):
        # asyncpg could not encode a value; every other InterfaceError is about the connection.
        return Failure.BISECT if isinstance(error, ValueError) else Failure.RETRY
    if isinstance(error, UnicodeError | OverflowError | TypeError):
        return Failure.BISECT  # TypeError: orjson's, of a number that is longer than 64 bits
    return Failure.RETRY if isinstance(error, _PASSING_ERRORS) else Failure.FAIL


def _by_code(code: str) -> Failure:
    if code[:2] in _ROW_CLASSES:
        return Failure.BISECT
    if code in _PASSING_CODES or code[:2] in _PASSING_CLASSES:
        return Failure.RETRY
    return Failure.FAIL


def keeps_connection(error: BaseException) -> bool:
    """Whether the connection is as good as before: the server answered, with an error of ours."""
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        return code[:2] in _ROW_CLASSES or code in _KEEPING_CODES
    return isinstance(error, ValueError) and isinstance(error, asyncpg.InterfaceError)


def refusal(error: Exception) -> RowRefused:
    """A description without values; PostgreSQL's own texts quote whole rows."""
    name = type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        constraint = getattr(error, "constraint_name", None)
        name += f" (SQLSTATE {error.sqlstate})" + (f" of {constraint}" if constraint else "")
    return RowRefused(f"PostgreSQL refused a row: {name}.")
