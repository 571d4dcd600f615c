"""The search for operations whose sender has died, in slices of time that are each read at once."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from gateway.application.ports import StoreUnavailable
from gateway.domain.model import OperationState
from storage.postgres.lanes import DirectLane
from storage.postgres.pool import Connection
from storage.postgres.queries import query, run

_READ_WATERMARK = query("recovery", "read_watermark")
_PUT_EXPIRED = query("recovery", "put_expired")
_MOVE_WATERMARK = query("recovery", "move_watermark")

SEARCH_ROWS_MAX: Final = 500_000
"""The most operations that one statement of the search reads; a slice with more is cut. Few slices
are better than small ones: each reads the newest part of the table too, which BRIN has not
summarized yet."""
SEARCH_ROWS_MIN: Final = 1_000
"""No fewer are read at once, however often that took longer than a statement may."""
SEARCH_SLICE_S_MIN: Final = 0.001
"""A slice is not cut further, in seconds: so little time has few operations, and is read whole."""
SEARCH_SLICES_BEHIND_MAX: Final = 20
"""How many slices a search moves the watermark by at most; the next search goes on. What has just
died does not wait until a watermark that was held back for long has caught up."""

_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class _Look:
    """What came of one slice."""

    put: int
    reached: datetime
    """Everything visible that was created before is finished or a doubt, from the slice's begin."""
    until: datetime
    """The slice's end."""
    horizon: datetime
    is_whole: bool
    """Whether all of the slice was read."""
    is_last: bool
    """Whether there is nothing after it to be looked at."""
    generation: str | None
    """The server's that was asked."""


class Search:
    """Finds what dead senders left, from two places on.

    The watermark in the database says up to where nothing can be missing. An open transaction, of
    anybody on the server, keeps it where it is. So a search looks first at what was created since
    the last one, from where this process has seen everything that was committed by then, and then
    moves the watermark as far as it may.
    """

    def __init__(self, lane: DirectLane) -> None:
        """The lane is the caller's to close."""
        self._lane = lane
        self._generation: str | None = None
        self._seen_before: datetime | None = None
        """Everything created before that was committed when it was looked at is finished, or a
        doubt. Not stored: who begins anew begins at the watermark."""
        self._slice_s = math.inf
        """How much time a slice has, in seconds: as much as was last read at once."""
        self._rows_max = SEARCH_ROWS_MAX
        """How many operations are read at once: fewer where that took too long."""

    def set_generation(self, generation: str) -> None:
        """The server's generation: another one may not have what was seen."""
        if generation != self._generation:
            self._generation = generation
            self._seen_before = None

    async def put_expired(self, limit: int, horizon_s: float) -> int:
        """Put up to `limit` operations whose sender has died on recovery's list; how many. 0 also
        while another gateway is looking. `horizon_s`: as PostgresStore's recovery_horizon_s.

        Raises as DirectLane.run. What was found before that is on the list, and the next search
        tries less at once.
        """
        put = await self._look_at_the_newest(limit, horizon_s)
        for _ in range(SEARCH_SLICES_BEHIND_MAX):
            if put >= limit:
                break
            look = await self._read(limit - put, horizon_s, None, moves_watermark=True)
            if look is None:
                break
            put += look.put
            if look.is_last or (look.is_whole and look.reached < look.until):
                break
        return put

    async def _look_at_the_newest(self, limit: int, horizon_s: float) -> int:
        put, begin, is_seen = 0, None, True
        generation = None
        while put < limit:
            look = await self._read(limit - put, horizon_s, begin, moves_watermark=False)
            if look is None:
                break
            put += look.put
            generation = look.generation if begin is None else generation
            if not generation == look.generation == self._generation:
                break  # what was seen was the other server's
            if not look.is_whole:
                continue
            if is_seen:
                self._seen_before = min(look.reached, look.horizon)
            # What is left behind is looked at again; it keeps nobody from what is newer.
            is_seen = is_seen and look.reached == look.until
            begin = look.until
            if look.is_last:
                break
        return put

    async def _read(
        self, limit: int, horizon_s: float, begin: datetime | None, *, moves_watermark: bool
    ) -> _Look | None:
        """Read a slice, and learn from it how much to read at once; None while another looks."""

        async def read(connection: Connection) -> _Look | None:
            async with connection.transaction():
                return await self._slice(
                    connection, limit, horizon_s, begin, moves_watermark=moves_watermark
                )

        try:
            return await self._lane.run(read)
        except StoreUnavailable:
            self._rows_max = max(self._rows_max // 4, SEARCH_ROWS_MIN)
            raise

    async def _slice(
        self,
        connection: Connection,
        limit: int,
        horizon_s: float,
        begin: datetime | None,
        *,
        moves_watermark: bool,
    ) -> _Look | None:
        generation = self._generation
        found = await run(connection, _READ_WATERMARK, horizon_s=horizon_s)
        if not found:
            return None
        [mark] = found
        horizon: datetime = mark["horizon"]
        if moves_watermark:
            begin = mark["created_before"]
            end = mark["proposed_before"] if mark["is_safe"] else begin
        else:
            if begin is None:
                seen_before = self._seen_before or mark["created_before"]
                # Where the clock was set back, what is new was created before what was seen.
                begin = min(max(seen_before, mark["created_before"]), horizon)
            end = mark["at"] + _MICROSECOND
        assert begin is not None
        until, is_whole, reached, put = begin, True, None, 0
        if begin < end:
            until = self._until(begin, end)
            read_s = (until - begin).total_seconds()
            rows_max = self._rows_max if read_s > SEARCH_SLICE_S_MIN else None
            [read] = await run(
                connection,
                _PUT_EXPIRED,
                created_from=begin,
                created_until=until,
                processing=OperationState.PROCESSING,
                rows_max=rows_max,
                limit=limit,
            )
            put = read["put"]
            is_whole = rows_max is None or read["operations"] < rows_max
            if not is_whole:
                self._slice_s = max(read_s / 2, SEARCH_SLICE_S_MIN)
            else:
                reached = min(read["oldest_left"] or until, until)
                if read["operations"] < self._rows_max / 2:
                    self._slice_s *= 2
                self._rows_max = min(self._rows_max + self._rows_max // 8, SEARCH_ROWS_MAX)
        is_last = until >= end and is_whole
        was_set_back = max(mark["created_before"], mark["proposed_before"]) > horizon
        if moves_watermark or was_set_back:
            await run(
                connection,
                _MOVE_WATERMARK,
                created_before=reached if moves_watermark else None,
                proposes=moves_watermark and mark["is_safe"] and is_last,
                horizon_s=horizon_s,
            )
        return _Look(put, reached or begin, until, horizon, is_whole, is_last, generation)

    def _until(self, begin: datetime, end: datetime) -> datetime:
        if self._slice_s >= (end - begin).total_seconds():
            return end
        return begin + timedelta(seconds=self._slice_s)
