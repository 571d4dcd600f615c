"""When a request goes out once more under its key, and what counts of several of one reference."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import pytest

from gateway.connectors.http import MaybeSent, NotSent, Response
from gateway.connectors.repeats import of_several, send_and_repeat
from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DONE, FAILED = Response(200, b"done"), Response(500, b"failed")
LOST = MaybeSent(Reason.CONNECTION_LOST)


class Posts:
    """What comes of each sending, and until when each was allowed."""

    def __init__(self, *told: Response | Exception) -> None:
        self._told = list(told)
        self.times: list[tuple[float, float]] = []

    async def __call__(self, send_before: float, answer_before: float) -> Response:
        self.times.append((send_before, answer_before))
        told = self._told.pop(0)
        if isinstance(told, Exception):
            raise told
        return told

    async def sent(
        self,
        *,
        send_before: float = math.inf,
        answer_timeout_s: float = 60.0,
        pause_s: float = 0.0,
        may_repeat: Callable[[Response], bool] = lambda _: True,
    ) -> tuple[Response, bool]:
        """Sent, and once more where that is of use."""
        return await send_and_repeat(
            self,
            send_before=send_before,
            answer_timeout_s=answer_timeout_s,
            pause_s=pause_s,
            is_uncertain=lambda response: response.status >= 500,
            may_repeat=may_repeat,
        )


async def test_a_definite_answer_is_not_asked_for_again() -> None:
    posts = Posts(DONE)
    assert await posts.sent() == (DONE, False)


@pytest.mark.parametrize("first", [LOST, FAILED])
async def test_after_a_lost_or_uncertain_answer_that_of_the_repeat_counts(
    first: Response | Exception,
) -> None:
    for second in (DONE, FAILED):
        assert await Posts(first, second).sent() == (second, True)
    with pytest.raises(MaybeSent) as raised:
        await Posts(first, MaybeSent(Reason.ANSWER_TIMED_OUT)).sent()
    assert raised.value.reason is Reason.ANSWER_TIMED_OUT


@pytest.mark.parametrize("reason", [Reason.ANSWER_TIMED_OUT, Reason.ANSWER_UNUSABLE])
async def test_an_answer_that_came_too_late_or_is_none_is_not_asked_for_again(
    reason: Reason,
) -> None:
    with pytest.raises(MaybeSent) as raised:
        await Posts(MaybeSent(reason)).sent()
    assert raised.value.reason is reason


async def test_a_repeat_that_was_not_sent_leaves_the_first_sending_as_it_was() -> None:
    busy = NotSent(Reason.CONNECTOR_BUSY)
    assert await Posts(FAILED, busy).sent() == (FAILED, False)
    with pytest.raises(MaybeSent) as raised:
        await Posts(LOST, busy).sent()
    assert raised.value is LOST


async def test_a_psp_that_wants_no_repeat_gets_none_unless_its_answer_was_lost() -> None:
    assert await Posts(FAILED).sent(may_repeat=lambda _: False) == (FAILED, False)
    assert await Posts(LOST, DONE).sent(may_repeat=lambda _: False) == (DONE, True)


@pytest.mark.parametrize(("window_s", "answer_timeout_s"), [(5.0, 60.0), (60.0, 5.0)])
async def test_a_repeat_goes_out_after_its_pause_within_the_window_and_the_answers_time(
    monkeypatch: pytest.MonkeyPatch, window_s: float, answer_timeout_s: float
) -> None:
    pauses: list[float] = []

    async def pause(delay_s: float) -> None:
        pauses.append(delay_s)

    monkeypatch.setattr(asyncio, "sleep", pause)
    send_before = time.monotonic() + window_s
    told: dict[str, Any] = {"send_before": send_before, "answer_timeout_s": answer_timeout_s}
    assert await Posts(FAILED).sent(pause_s=10.0, **told) == (FAILED, False)
    with pytest.raises(MaybeSent):
        await Posts(LOST).sent(pause_s=10.0, **told)
    assert pauses == []

    posts = Posts(LOST, DONE)
    assert await posts.sent(pause_s=1.0, **told) == (DONE, True)
    assert pauses == [1.0]
    (first, answer_before), again = posts.times
    assert first == send_before
    assert again == (min(send_before, answer_before), answer_before)


def told_of(verdict: Verdict, amount_minor: int | None = None) -> ConnectorAnswer:
    outcome = Outcome(amount_reported_minor=amount_minor)
    return ConnectorAnswer(Delivery.ANSWERED, verdict, outcome)


V = Verdict


@pytest.mark.parametrize(
    ("verdicts", "counts"),
    [
        ((V.DECLINED,), V.DECLINED),
        ((V.DECLINED, V.APPROVED), V.APPROVED),
        ((V.PENDING, V.APPROVED), V.APPROVED),
        # It may become one that stands.
        ((V.DECLINED, V.PENDING), V.PENDING),
        ((V.CANCELED, V.REQUIRES_ACTION), V.REQUIRES_ACTION),
    ],
)
def test_of_several_of_one_reference_what_stands_or_may_yet_counts(
    verdicts: Sequence[Verdict], counts: Verdict
) -> None:
    for told in (verdicts, verdicts[::-1]):
        answer = of_several([told_of(verdict) for verdict in told])
        assert answer is not None
        assert answer.verdict is counts
    assert of_several([]) is None


def test_of_several_of_one_reference_all_that_stands_counts() -> None:
    answer = of_several([told_of(V.DECLINED, 9), told_of(V.APPROVED, 10), told_of(V.APPROVED, 5)])
    assert answer is not None
    assert answer.outcome is not None
    assert answer.outcome.amount_reported_minor == 15
