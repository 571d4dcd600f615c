"""Simulated clients: payments with all their operations, retries, duplicates, rivals and misuse."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from payments.v1 import payment_method_pb2
from payments.v1 import payment_service_pb2 as rpc

from gateway.domain.model import OperationKind as K
from gateway.domain.model import OperationState as S
from gateway.domain.states import UNFINISHED
from tests.chaos.history import OPEN, RESPONSES, Answer, Call, History, Look
from tests.chaos.requests import AMOUNTS_MINOR, FINAL_SHARE, INCREMENT_MINOR, follow_up
from tests.faults.checker import REPEATABLE
from tests.harness import eur
from tests.simulation.accounts import SEPARATOR
from tests.simulation.gateway import OK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from tests.simulation.gateway import Told


TRY_TIMEOUT_S: Final = 2.0
TRIES_MAX: Final = 4
FINAL_TRIES_MAX: Final = 30
PAUSE_S: Final = (0.02, 0.4)
PATIENCE_TRIES: Final = 2
PATIENCE_S: Final = 0.5
REPEATED_MAX: Final = 6
"""Answered calls that are repeated at the end."""
DUPLICATE_SHARE: Final = 0.2
RIVAL_SHARE: Final = 0.25
CANCEL_SHARE: Final = 0.12
REPEAT_SHARE: Final = 0.2
MISUSE_SHARE: Final = 0.06
CROWD_SHARE: Final = 0.7
"""Payments that operations of all kinds act on at once."""
CROWD_MAX: Final = 8
CROWD_S: Final = 3.0
IMPATIENT_SHARE: Final = 0.1
"""Tries whose deadline is too short."""
IMPATIENCE_S: Final = (0.01, 0.3)

ALLOWS_PARTIAL_SHARE: Final = 0.6
NAMED_SHARE: Final = 0.5
"""Refunds in a crowd that name the capture that they give back."""
REDIRECT_SHARE: Final = 0.6
SOFT_SHARE: Final = 0.45
"""Of what an account that is not the last makes of a payment: a decline that another one may not
get."""
SOFT_TOKENS: Final = ("tok_declined_do_not_honor", "tok_declined_issuer_unavailable")
CUSTOMER_DELAY_S: Final = (0.02, 5.5)
CUSTOMER_AWAY_SHARE: Final = 0.25
CUSTOMER_TWICE_SHARE: Final = 0.3
CHOICES: Final = ("approve",) * 4 + ("decline", "later")
RETURNS_SHARE: Final = 0.3
"""Payments that are voided while they wait for a customer or for their PSP."""
WATCH_S: Final = 15.0
"""For how long a client looks whether what it waits for has come."""
LOOK_PAUSE_S: Final = (0.2, 1.5)

PAGES: Final = "http://psp/pay/"

Looked = tuple[int, int, int]
"""An operation's state, its payment's, and the payment's version."""

_REPEATABLE: Final = frozenset(code.name for code in REPEATABLE)


@dataclass(frozen=True, slots=True)
class _Request:
    call: Call
    message: bytes


class Clients:
    """The load, and its journal."""

    def __init__(
        self,
        history: History,
        send: Callable[[int, K, bytes, float], Awaitable[Told]],
        *,
        seed: int,
        gateways: int,
        tokens: Sequence[str],
        may_cancel: bool,
        settles_remainders: bool,
        look: Callable[[int, str, float], Awaitable[Looked | None]] | None = None,
        accounts: int = 1,
        visit: Callable[[str, str], Awaitable[None]] | None = None,
        crowds: random.Random | None = None,
        partials: random.Random | None = None,
    ) -> None:
        """`look` asks for an operation's state, where clients do that; `visit` presses a button on
        a PSP's page, where customers are sent to one. With `crowds` operations of all kinds act on
        some payments at once. With `partials` some calls allow that less is authorized.
        """
        self._partials = partials
        self._crowds = crowds
        self._look = look
        self._accounts = accounts
        self._visit = visit
        self._names = random.Random(f"names/{seed}")
        self._captures: dict[str, list[str]] = {}
        """Those that have succeeded, by payment."""
        self._customers: dict[str, asyncio.Task[None]] = {}
        """By the page that each is sent to."""
        self._history = history
        self._send = send
        self._gateways = gateways
        self._tokens = tokens
        self._may_cancel = may_cancel
        self._settles_remainders = settles_remainders
        self._draw = random.Random(f"clients/{seed}")
        self._order = itertools.count(1)
        self._keys = itertools.count(1)
        self._requests: dict[str, _Request] = {}
        self.told: dict[str, str] = {}
        """Operations that a client has been told of, with their payments."""
        self.versions: dict[str, int] = {}
        """The latest version of each payment that a client has been told."""

    async def shop(self, payments: int) -> None:
        """So many payments, some at once."""
        await asyncio.gather(*(self._payment() for _ in range(payments)))

    async def repeat_unanswered(self) -> None:
        """Repeat every call whose outcome a client does not know, until it does."""
        await self._all(self._history.unanswered())

    async def repeat_answered(self) -> None:
        """Repeat some of the calls that have their final answer."""
        keys = self._history.answered()
        await self._all(self._draw.sample(keys, min(len(keys), REPEATED_MAX)))

    async def look_at_all(self) -> None:
        """Ask for every operation that a client knows."""
        if self._look is not None:
            for operation_id in sorted(self.told):
                await self._look_at(operation_id)

    async def _all(self, keys: Iterable[str]) -> None:
        for key in keys:
            await self._call(self._requests[key], FINAL_TRIES_MAX)

    def _key(self) -> str:
        return f"key-{next(self._keys)}"

    # --- a payment --------------------------------------------------------------------------------

    async def _payment(self) -> None:
        draw = self._draw
        await asyncio.sleep(draw.random())
        amount_minor = draw.choice(AMOUNTS_MINOR)
        methods = ["AUTOMATIC", "MANUAL", "MANUAL_MULTIPLE", "MANUAL_MULTIPLE"]
        if self._visit is not None:
            methods += ["AUTOMATIC"] * 4
        method = draw.choice(methods)
        request = self._authorization(amount_minor, method)
        authorizing = self._patiently(request)
        if self._may_cancel and draw.random() < CANCEL_SHARE:
            cancel = rpc.VoidPaymentRequest(
                idempotency_key=self._key(), authorize_idempotency_key=request.call.key
            )
            void = _Request(
                Call(cancel.idempotency_key, K.VOID, "", None), cancel.SerializeToString()
            )
            answer, _ = await asyncio.gather(authorizing, self._later(void))
        else:
            answer = await authorizing
        if answer is None or not await self._succeeds(answer):
            return
        if self._crowds is not None and self._crowds.random() < CROWD_SHARE:
            await self._crowd(self._crowds, method, answer.payment_id, amount_minor)
            return
        for kind, amount in self._plan(method, amount_minor):
            calls = 2 if draw.random() < RIVAL_SHARE else 1
            done, *_ = await asyncio.gather(
                *(
                    self._patiently(self._follow_up(kind, answer.payment_id, amount))
                    for _ in range(calls)
                )
            )
            if done is None:
                return

    async def _crowd(
        self, draw: random.Random, method: str, payment_id: str, amount_minor: int
    ) -> None:
        """Operations of all kinds at once, some of them when others have ended."""
        kinds = [K.CAPTURE, K.CAPTURE, K.REFUND, K.REFUND]
        if self._settles_remainders:
            kinds += [K.VOID]
        if self._may_cancel:
            kinds += [K.INCREMENT]
        amounts = (None, amount_minor // 2, amount_minor // 3, amount_minor)

        async def one() -> None:
            await asyncio.sleep(draw.random() * CROWD_S)
            kind = draw.choice(kinds)
            amount = draw.choice(amounts)
            if kind in (K.INCREMENT, K.VOID):
                amount = INCREMENT_MINOR if kind is K.INCREMENT else None
            named = ""
            captures = self._captures.get(payment_id)
            if kind is K.REFUND and captures and self._names.random() < NAMED_SHARE:
                named = self._names.choice(captures)
            await self._patiently(self._follow_up(kind, payment_id, amount, named))

        if method != "AUTOMATIC" and draw.random() < 0.5:
            await self._patiently(self._follow_up(K.CAPTURE, payment_id, amount_minor // 2))
        await asyncio.gather(*(one() for _ in range(draw.randint(2, CROWD_MAX))))

    async def _succeeds(self, answer: Answer) -> bool:
        """Whether an authorization has succeeded, or does so in a while."""
        if answer.state == S.SUCCEEDED:
            return True
        if self._look is None or answer.state not in (S.PENDING, S.REQUIRES_ACTION):
            return False
        draw = self._draw
        voiding = None
        if self._may_cancel and draw.random() < RETURNS_SHARE:
            voiding = asyncio.create_task(self._void_later(answer.payment_id))
        waited_s = 0.0
        state = answer.state
        while S(state) in UNFINISHED and waited_s < WATCH_S:
            pause_s = draw.uniform(*LOOK_PAUSE_S)
            await asyncio.sleep(pause_s)
            waited_s += pause_s
            looked = await self._look_at(answer.operation_id)
            state = state if looked is None else looked.state
        if voiding is not None:
            await voiding
        return voiding is None and state == S.SUCCEEDED

    async def _void_later(self, payment_id: str) -> None:
        await asyncio.sleep(self._draw.random() * 5)
        await self._patiently(self._follow_up(K.VOID, payment_id, None))

    async def _look_at(self, operation_id: str) -> Look | None:
        assert self._look is not None
        sent = next(self._order)
        number = self._draw.randrange(self._gateways)
        looked = await self._look(number, operation_id, TRY_TIMEOUT_S)
        if looked is None:
            return None
        look = Look(operation_id, sent, next(self._order), *map(int, looked))
        self._hear(operation_id, self.told[operation_id], look.version)
        self._history.looks.append(look)
        return look

    def _hear(self, operation_id: str, payment_id: str, version: int) -> None:
        self.told[operation_id] = payment_id
        self.versions[payment_id] = max(version, self.versions.get(payment_id, 0))

    async def _customer(self, page: str) -> None:
        """Acts on a PSP's page: soon, late, twice, or never."""
        assert self._visit is not None
        draw = self._draw
        if draw.random() < CUSTOMER_AWAY_SHARE:
            return
        for _ in range(2 if draw.random() < CUSTOMER_TWICE_SHARE else 1):
            await asyncio.sleep(draw.uniform(*CUSTOMER_DELAY_S))
            await self._visit(page, draw.choice(CHOICES))

    async def _later(self, request: _Request) -> Answer | None:
        await asyncio.sleep(self._draw.random() * 0.3)
        return await self._patiently(request)

    def _authorization(self, amount_minor: int, method: str) -> _Request:
        key = self._key()
        partials = self._partials
        allows_partial = partials is not None and partials.random() < ALLOWS_PARTIAL_SHARE
        message = rpc.AuthorizePaymentRequest(
            idempotency_key=key,
            amount=eur(amount_minor),
            allow_partial_approval=allows_partial,
            capture_method=getattr(payment_method_pb2, f"CAPTURE_METHOD_{method}"),
            payment_method=self._payment_method(method),
            return_url="https://shop.example/back" if self._visit is not None else "",
        )
        call = Call(key, K.AUTHORIZE, "", amount_minor, allows_partial)
        return _Request(call, message.SerializeToString())

    def _payment_method(self, method: str) -> payment_method_pb2.PaymentMethod:
        draw = self._draw
        if self._visit is not None and method == "AUTOMATIC" and draw.random() < REDIRECT_SHARE:
            elsewhere = payment_method_pb2.RedirectPaymentMethod(
                method_type="ideal", country_code="NL"
            )
            return payment_method_pb2.PaymentMethod(redirect=elsewhere)
        tokens = [draw.choice(self._tokens)]
        for _ in range(self._accounts - 1):
            soft = draw.random() < SOFT_SHARE
            tokens.insert(0, draw.choice(SOFT_TOKENS if soft else self._tokens))
        return payment_method_pb2.PaymentMethod(token=SEPARATOR.join(tokens))

    def _plan(self, method: str, amount_minor: int) -> Sequence[tuple[K, int | None]]:
        if method == "AUTOMATIC":
            return ((K.REFUND, amount_minor // 2),)
        part = amount_minor // 2
        plans: tuple[tuple[tuple[K, int | None], ...], ...] = (
            ((K.CAPTURE, part), (K.REFUND, part // 2), (K.REFUND, None)),
            ((K.CAPTURE, part), (K.CAPTURE, None), (K.REFUND, part)),
            ((K.CAPTURE, amount_minor), (K.REFUND, amount_minor)),
            ((K.VOID, None),),
        )
        if self._settles_remainders:
            plans += (((K.CAPTURE, part), (K.VOID, None)),)
        if self._may_cancel:
            plans += (
                ((K.INCREMENT, INCREMENT_MINOR), (K.CAPTURE, amount_minor + INCREMENT_MINOR)),
                ((K.INCREMENT, INCREMENT_MINOR), (K.VOID, None)),
            )
        return self._draw.choice(plans)

    def _follow_up(
        self, kind: K, payment_id: str, amount_minor: int | None, named: str = ""
    ) -> _Request:
        key = self._key()
        final = kind is K.CAPTURE and self._draw.random() < FINAL_SHARE
        message = follow_up(kind, key, payment_id, amount_minor, final=final)
        if named:
            message.capture_operation_id = named
        call = Call(key, kind, payment_id, amount_minor, capture_operation_id=named)
        return _Request(call, message.SerializeToString())

    # --- a call -----------------------------------------------------------------------------------

    async def _patiently(self, request: _Request) -> Answer | None:
        """A call, with its duplicates and repeats; None where its outcome stays unknown."""
        draw = self._draw
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
        if answer is not None and draw.random() < MISUSE_SHARE:
            await self._misuse(request)
        return answer

    async def _misuse(self, request: _Request) -> None:
        """The same key with another payload."""
        if request.call.kind is not K.AUTHORIZE:
            return
        message = rpc.AuthorizePaymentRequest.FromString(request.message)
        message.amount.amount_minor += 1
        other = _Request(request.call, message.SerializeToString())
        answer = await self._try(other, self._draw.randrange(self._gateways), TRY_TIMEOUT_S)
        self._history.misuses.append(answer)

    async def _call(self, request: _Request, tries_max: int = TRIES_MAX) -> Answer | None:
        """By the retry policy; None where it is refused, or not answered by the last try."""
        key, draw = request.call.key, self._draw
        if key not in self._requests:
            self._requests[key] = request
            self._history.calls.append(request.call)
        pause_s = PAUSE_S[0]
        first = draw.randrange(self._gateways)
        for number in range(first, first + tries_max):
            impatient = tries_max == TRIES_MAX and draw.random() < IMPATIENT_SHARE
            timeout_s = draw.uniform(*IMPATIENCE_S) if impatient else TRY_TIMEOUT_S
            answer = await self._try(request, number % self._gateways, timeout_s)
            self._history.answers.append(answer)
            if answer.ok or answer.refused:
                return answer if answer.ok else None
            await asyncio.sleep(pause_s * draw.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, PAUSE_S[1])
        self._history.failed.append(key)
        return None

    async def _try(self, request: _Request, gateway: int, timeout_s: float) -> Answer:
        call, sent = request.call, next(self._order)
        status, reason, data = await self._send(gateway, call.kind, request.message, timeout_s)
        if status != OK:
            reason = "" if status in _REPEATABLE else reason
            return Answer(call.key, sent, next(self._order), status, reason.partition(" ")[0])
        response: Any = RESPONSES[call.kind].FromString(data)
        payment = response.payment
        self._hear(response.operation.operation_id, payment.payment_id, payment.version)
        if call.kind is K.CAPTURE and response.operation.state == S.SUCCEEDED:
            captures = self._captures.setdefault(payment.payment_id, [])
            if response.operation.operation_id not in captures:
                captures.append(response.operation.operation_id)
        page = response.operation.next_action.redirect_url
        if self._visit is not None and page.startswith(PAGES) and page not in self._customers:
            self._customers[page] = asyncio.create_task(self._customer(page))
        return Answer.of(response, call.key, sent, next(self._order))
