"""Clients that pay, capture, refund, void and repeat, with an ordinary retry policy and a journal.

They run in an event loop of their own thread, so that faults, which block, do not stop them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import grpc
from payments.v1 import payment_service_pb2 as rpc
from payments.v1.payment_pb2 import OperationState

from gateway.domain.model import OperationKind
from tests.chaos.history import OPEN, Answer, Call, History
from tests.chaos.requests import AMOUNTS_MINOR, FINAL_SHARE, INCREMENT_MINOR, METHODS, follow_up
from tests.faults.checker import REPEATABLE
from tests.harness import Caller, authorize_request, new_key, reason_of

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

T = TypeVar("T")
K = OperationKind

CALLERS_MIN: Final = 32
CALLERS_MAX: Final = 512
CALLERS_S: Final = 0.2
"""Payments that are worked on at once: as many as there are calls in this time, within bounds."""
TRY_TIMEOUT_S: Final = 2.0
TRIES_MAX: Final = 6
"""Of one call; every try goes to the next gateway."""
PAUSE_S_MIN: Final = 0.05
PAUSE_S_MAX: Final = 0.8
"""Between two tries: the first and the longest, doubled in between, with jitter."""
PATIENCE_TRIES: Final = 3
"""How often a call is repeated that was told IN_DOUBT, PROCESSING or NOT_SENT."""
PATIENCE_S: Final = 0.5
FINAL_TRIES_MAX: Final = 20
"""Of a call that is repeated after the trial."""
REPEATED_MAX: Final = 300
"""Answered calls that are repeated after the trial."""
REPEATS_AT_ONCE: Final = 16
DUPLICATE_SHARE: Final = 0.1
"""Calls that are made twice at once."""
RIVAL_SHARE: Final = 0.15
"""Follow-ups that meet another one of the same kind and amount, under another key, at once."""
CANCEL_SHARE: Final = 0.04
"""Authorizations that are voided, by their key, while they are under way."""
REPEAT_SHARE: Final = 0.15
"""Calls that are repeated after their answer."""
ANSWER_TIMEOUT_S: Final = 60.0
"""Clients that get no answer for so long show that the service is gone."""

TOKENS: Final = ("tok_visa",) * 8 + ("tok_declined_do_not_honor", "tok_declined_insufficient_funds")
_WRONG_ANSWERS: Final = (
    *("timeout_before_charge", "timeout_after_charge", "success_late", "reset_before_charge"),
    *("reset_after_charge", "error_500_then_success", "error_500_after_charge", "garbage"),
    *("wrong_reference", "oversized", "slow", "pending"),
)
FAULTY_TOKENS: Final = (
    *TOKENS,
    *(f"tok_{name}" for name in _WRONG_ANSWERS),
    *(
        f"tok_{kind}_{name}"
        for kind in ("capture", "refund", "void", "increment")
        for name in _WRONG_ANSWERS
    ),
)
"""Tokens of payments whose PSP answers wrongly, late or not at all."""

SUCCEEDED: Final = OperationState.OPERATION_STATE_SUCCEEDED


class Stalled(Exception):
    """The clients get no answers any more."""


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clients")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Where the campaign was interrupted, what it waited for is still under way.
        self.run(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there to its end."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Request:
    """A call as it is sent."""

    call: Call
    message: Any


class Clients:
    """The load, and the clients' journal of it."""

    def __init__(
        self,
        history: History,
        callers: Sequence[Caller],
        *,
        seed: str,
        rate: float,
        tokens: Sequence[str],
    ) -> None:
        """`rate` is calls a second, as long as enough callers are free for it."""
        self.statuses: Counter[str] = Counter()
        """Of every try, by the status' name."""
        self.latencies_s: list[float] = []
        """Of every try that was answered, in their order."""
        self._history = history
        self._callers = callers
        self._first = itertools.cycle(range(len(callers)))
        self._seed = seed
        self._interval_s = 1 / rate
        self._callers_count = min(max(CALLERS_MIN, round(rate * CALLERS_S)), CALLERS_MAX)
        self._tokens = tokens
        self._order = itertools.count(1)
        self._requests: dict[str, _Request] = {}
        self._pace = random.Random(f"{seed}/pace")
        self._due_s = 0.0
        self._stop = asyncio.Event()
        self._running: asyncio.Future[Any] | None = None
        self._answered = threading.Condition()
        self._answers = 0
        self._latest = 0
        """The latest `sent` of a try that was answered."""

    # --- for the thread that drives the trial -----------------------------------------------------

    def await_answers(self, count: int) -> None:
        """Wait until so many more calls are answered. Raises Stalled."""
        with self._answered:
            until = self._answers + count
            if not self._answered.wait_for(lambda: self._answers >= until, ANSWER_TIMEOUT_S):
                missing = until - self._answers
                raise Stalled(f"{missing} of {count} answers are missing: {dict(self.statuses)}")

    def await_fresh_answer(self) -> None:
        """Wait until a try that is sent from now on is answered. Raises Stalled."""
        with self._answered:
            # What follows is numbered higher, in whichever thread.
            since = next(self._order)
            if not self._answered.wait_for(lambda: self._latest > since, ANSWER_TIMEOUT_S):
                raise Stalled(f"no call is answered: {dict(self.statuses)}")

    # --- in the clients' loop ---------------------------------------------------------------------

    async def start(self) -> None:
        """Begin."""
        self._running = asyncio.gather(
            *(self._shopper(number) for number in range(self._callers_count))
        )

    async def stop(self) -> None:
        """Finish what was begun. Raises what a client met and did not expect."""
        self._stop.set()
        if self._running is not None:
            await self._running

    async def cancel(self) -> None:
        """End, whatever is under way; harmless after `stop`."""
        self._stop.set()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def repeat_unanswered(self) -> None:
        """Repeat every call whose outcome a client does not know, until it does."""
        await self._all(self._history.unanswered())

    async def repeat_answered(self) -> None:
        """Repeat some of the calls that have their final answer."""
        keys = self._history.answered()
        await self._all(self._pace.sample(keys, min(len(keys), REPEATED_MAX)))

    async def _all(self, keys: Iterable[str]) -> None:
        room = asyncio.Semaphore(REPEATS_AT_ONCE)

        async def one(key: str) -> None:
            async with room:
                await self._tries(self._requests[key], FINAL_TRIES_MAX)

        await asyncio.gather(*(one(key) for key in keys))

    # --- a client ---------------------------------------------------------------------------------

    async def _shopper(self, number: int) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        while not self._stop.is_set():
            await self._payment(draw)

    async def _payment(self, draw: random.Random) -> None:
        """The life of a payment, as far as its operations succeed."""
        amount_minor = draw.choice(AMOUNTS_MINOR)
        method = draw.choice(("AUTOMATIC", "MANUAL", "MANUAL_MULTIPLE", "MANUAL_MULTIPLE"))
        request = authorize_request(
            amount_minor=amount_minor, token=draw.choice(self._tokens), capture_method=method
        )
        call = Call(request.idempotency_key, K.AUTHORIZE, "", amount_minor)
        authorizing = self._patiently(draw, _Request(call, request))
        if draw.random() < CANCEL_SHARE:
            cancel = rpc.VoidPaymentRequest(
                idempotency_key=new_key(), authorize_idempotency_key=call.key
            )
            void = Call(cancel.idempotency_key, K.VOID, "", None)
            await asyncio.gather(authorizing, self._patiently(draw, _Request(void, cancel)))
            return
        answer = await authorizing
        if answer is None or answer.state != SUCCEEDED:
            return
        payment_id = answer.payment_id
        if method == "AUTOMATIC":
            plan: tuple[tuple[K, int | None], ...] = ((K.REFUND, amount_minor // 2),)
        else:
            part = amount_minor // 2
            plan = draw.choice(
                (
                    ((K.CAPTURE, part), (K.REFUND, part // 2), (K.REFUND, None)),
                    ((K.CAPTURE, part), (K.CAPTURE, None), (K.REFUND, part)),
                    ((K.CAPTURE, part), (K.VOID, None)),
                    ((K.INCREMENT, INCREMENT_MINOR), (K.CAPTURE, amount_minor + INCREMENT_MINOR)),
                    ((K.INCREMENT, INCREMENT_MINOR), (K.VOID, None)),
                    ((K.VOID, None),),
                )
            )
        for kind, amount in plan:
            calls = 2 if draw.random() < RIVAL_SHARE else 1
            done, *_ = await asyncio.gather(
                *(
                    self._patiently(draw, _follow_up(draw, kind, payment_id, amount))
                    for _ in range(calls)
                )
            )
            if done is None or self._stop.is_set():
                return

    async def _patiently(self, draw: random.Random, request: _Request) -> Answer | None:
        """A call, with its duplicates and repeats; None where its outcome stays unknown."""
        if draw.random() < DUPLICATE_SHARE:
            answer, _ = await asyncio.gather(self._call(request), self._call(request))
        else:
            answer = await self._call(request)
        for _ in range(PATIENCE_TRIES):
            if answer is None or answer.state not in OPEN:
                break
            await asyncio.sleep(PATIENCE_S)
            answer = await self._call(request)
        if answer is not None and draw.random() < REPEAT_SHARE:
            await self._call(request)
        return answer

    async def _call(self, request: _Request) -> Answer | None:
        """When its time has come; see `_tries`."""
        key = request.call.key
        if key not in self._requests:
            self._requests[key] = request
            self._history.calls.append(request.call)
        await self._slot()
        return await self._tries(request, TRIES_MAX)

    async def _tries(self, request: _Request, tries_max: int) -> Answer | None:
        """By the retry policy; None where it is refused, or not answered by the last try."""
        pause_s = PAUSE_S_MIN
        first = next(self._first)
        for number in range(first, first + tries_max):
            answer = await self._try(request, self._callers[number % len(self._callers)])
            if answer.ok or answer.refused:
                return answer if answer.ok else None
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, PAUSE_S_MAX)
        self._history.failed.append(request.call.key)
        return None

    async def _slot(self) -> None:
        """Wait for the time of the next call, by a Poisson process."""
        now_s = asyncio.get_running_loop().time()
        self._due_s = max(self._due_s, now_s) + self._pace.expovariate(1) * self._interval_s
        await asyncio.sleep(self._due_s - now_s)

    async def _try(self, request: _Request, caller: Caller) -> Answer:
        key, sent = request.call.key, next(self._order)
        begun_s = time.monotonic()
        try:
            response = await caller.call(METHODS[request.call.kind], request.message, TRY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            reason = "" if error.code() in REPEATABLE else reason_of(error)
            answer = Answer(key, sent, next(self._order), error.code().name, reason)
        else:
            self.latencies_s.append(time.monotonic() - begun_s)
            answer = Answer.of(response, key, sent, next(self._order))
        self._history.answers.append(answer)
        self.statuses[answer.status] += 1
        if answer.ok:
            with self._answered:
                self._answers += 1
                self._latest = max(self._latest, sent)
                self._answered.notify_all()
        return answer


def _follow_up(draw: random.Random, kind: K, payment_id: str, amount_minor: int | None) -> _Request:
    key = new_key()
    final = kind is K.CAPTURE and draw.random() < FINAL_SHARE
    message = follow_up(kind, key, payment_id, amount_minor, final=final)
    return _Request(Call(key, kind, payment_id, amount_minor), message)
