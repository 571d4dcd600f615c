"""Idempotency keys: a request once more under the same one, and how long that is remembered."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from gateway.connectors.http import MaybeSent, NotSent, Response
from gateway.domain.errors import Reason
from gateway.domain.ids import created_s
from gateway.domain.model import ConnectorAnswer, Verdict

_UNFINISHED: Final = frozenset({Verdict.PENDING, Verdict.REQUIRES_ACTION})


async def send_and_repeat(
    post: Callable[[float, float], Awaitable[Response]],
    *,
    send_before: float,
    answer_timeout_s: float,
    pause_s: float,
    is_uncertain: Callable[[Response], bool],
    may_repeat: Callable[[Response], bool],
) -> tuple[Response, bool]:
    """Send, and once more where the answer was lost or is uncertain; whether it is the repeat's.

    `post` takes until when it may be sent and until when its answer may come, times of
    `time.monotonic()`; it must send the same request under the same key both times. `is_uncertain`:
    the request may or may not have been executed, now or by another one of its key. Raises NotSent
    and MaybeSent.
    """
    answer_before = time.monotonic() + answer_timeout_s
    response: Response | None = None
    lost: MaybeSent | None = None
    try:
        response = await post(send_before, answer_before)
    except MaybeSent as error:
        lost = error
    if response is not None and not is_uncertain(response):
        return response, False
    if lost is not None and lost.reason is not Reason.CONNECTION_LOST:
        raise lost
    again_before = min(send_before, answer_before)
    if (response is None or may_repeat(response)) and time.monotonic() + pause_s < again_before:
        await asyncio.sleep(pause_s)
        try:
            return await post(again_before, answer_before), True
        except NotSent:
            pass  # not the second time, but the first
    if response is None:
        raise lost or MaybeSent(Reason.ANSWER_UNUSABLE)
    return response, False


def age_s(reference: str) -> float | None:
    """How long ago, at most, a reference was first used; None for one that is not ours."""
    made_s = created_s(reference)
    return None if made_s is None else time.time() - made_s


def is_remembered(reference: str, key_validity_s: float) -> bool:
    """Whether the PSP surely remembers the key still, however early it was used: for half of its
    validity; the other half is for clocks and for the way there.
    """
    age = age_s(reference)
    return age is not None and age <= key_validity_s / 2


def of_several(told: Sequence[ConnectorAnswer]) -> ConnectorAnswer | None:
    """What one reference caused, of all objects that have it: more than one where its key had been
    forgotten or was not heeded. What stands counts, and all of it; otherwise what may stand yet.
    None for none.
    """
    standing = [answer for answer in told if answer.verdict is Verdict.APPROVED]
    if len(standing) > 1 and standing[0].outcome is not None:
        standing[0].outcome.amount_reported_minor = sum(
            (answer.outcome and answer.outcome.amount_reported_minor) or 0 for answer in standing
        )
    unfinished = [answer for answer in told if answer.verdict in _UNFINISHED]
    return next(iter(standing or unfinished or told), None)
