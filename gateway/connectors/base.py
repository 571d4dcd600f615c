"""What all connectors do alike: the order in which a call can fail, and what a failure proves.

A request is put into the PSP's words and finds a place among the connections; `send_before` is
compared, and it is written at once. Whatever stops it before that raises `NotSent`. Then its answer
is awaited and read: a failure there raises `MaybeSent`, and `Unusable` where nothing is settled.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from gateway import __version__
from gateway.application.ports import Capabilities, ConnectorRequest
from gateway.connectors.http import JSON, HttpClient, MaybeSent, NotSent, Response
from gateway.connectors.repeats import send_and_repeat
from gateway.domain.errors import Reason
from gateway.domain.model import ConnectorAnswer, Delivery, OperationKind

REPEAT_PAUSE_S: Final = 0.5
"""Before the one repeat of a request whose answer was lost or is uncertain."""
MOTO_CHANNELS: Final = frozenset({"CHANNEL_MAIL_ORDER", "CHANNEL_TELEPHONE_ORDER"})

_T = TypeVar("_T")


class Unusable(MaybeSent):
    """The answer is not what was asked for: it settles nothing."""

    def __init__(self) -> None:
        super().__init__(Reason.ANSWER_UNUSABLE)


def not_sent(reason: Reason) -> ConnectorAnswer:
    """Surely nothing of it was written, or it can have no effect any more."""
    return ConnectorAnswer(Delivery.NOT_SENT, reason=reason)


def doubt(reason: Reason = Reason.ANSWER_UNUSABLE) -> ConnectorAnswer:
    """It may have been processed."""
    return ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=reason)


@contextmanager
def asking_first() -> Iterator[None]:
    """A question that the request needs, and that changes nothing: where it has no answer, the
    request itself was not sent. Raises NotSent.
    """
    try:
        yield
    except MaybeSent:
        raise NotSent(Reason.CONNECT_FAILED) from None


@contextmanager
def in_steps() -> Iterator[None]:
    """Requests after another one: that a later one was not sent says nothing of those before it.
    Raises MaybeSent.
    """
    try:
        yield
    except NotSent as error:
        raise MaybeSent(error.reason) from None


class AccountConnector(ABC):
    """Implements `gateway.application.ports.Connector` but for what is the PSP's own.

    The connections belong to the account's kind, which closes them.
    """

    def __init__(self, name: str, capabilities: Capabilities) -> None:
        self._name = name
        self._capabilities = capabilities

    @property
    def name(self) -> str:
        """The connector's name."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """What this account can do."""
        return self._capabilities

    async def close(self) -> None:  # noqa: B027 - nothing of its own
        """The connections are shared, and closed by who opened them."""

    async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """See the port."""
        try:
            return await self._send(request, send_before)
        except NotSent as error:
            return not_sent(error.reason)
        except MaybeSent as error:
            return doubt(error.reason)

    async def query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer | None:
        """See the port. That a question was not sent says nothing of what it asks about."""
        try:
            return await self._query(kind, reference, request)
        except (NotSent, MaybeSent) as error:
            return doubt(error.reason)

    async def cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer:
        """See the port. That a cancellation was not sent says nothing of what it cancels."""
        try:
            return await self._cancel(kind, reference, request)
        except (NotSent, MaybeSent) as error:
            return doubt(error.reason)

    @abstractmethod
    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """See `send`. Raises NotSent and MaybeSent, each on its side of the write."""

    async def _query(
        self,
        kind: OperationKind,  # noqa: ARG002 - for who can ask
        reference: str,  # noqa: ARG002
        request: ConnectorRequest | None,  # noqa: ARG002
    ) -> ConnectorAnswer | None:
        """See `query`; by itself for a PSP that has no such question. Raises NotSent, MaybeSent."""
        return doubt()

    async def _cancel(
        self,
        kind: OperationKind,  # noqa: ARG002 - for who can cancel
        reference: str,  # noqa: ARG002
        request: ConnectorRequest | None,  # noqa: ARG002
    ) -> ConnectorAnswer:
        """See `cancel`; by itself for a PSP where no reference can be made unusable. Raises NotSent
        and MaybeSent.
        """
        return doubt(Reason.RECOVERED)

    def _in_time(self) -> float:
        """Until when an answer is waited for from now on; a time of `time.monotonic()`."""
        return time.monotonic() + self._capabilities.answer_timeout_s


@dataclass(frozen=True, slots=True)
class Call:
    """What is posted under an idempotency key."""

    target: str
    body: bytes


class HttpConnector(AccountConnector):
    """One whose PSP speaks HTTP. A request may have an idempotency key, and is repeated once under
    it.
    """

    def __init__(
        self,
        name: str,
        http: HttpClient,
        capabilities: Capabilities,
        headers: Mapping[str, str],
        *,
        repeat_pause_s: float,
        content_type: str = JSON,
    ) -> None:
        """`headers` go with every request."""
        super().__init__(name, capabilities)
        self._http = http
        self._headers = {**headers, "User-Agent": f"payment-gateway/{__version__}"}
        self._repeat_pause_s = repeat_pause_s
        self._content_type = content_type

    async def _request(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        key: str = "",
        send_before: float | None = None,
        answer_before: float | None = None,
    ) -> Response:
        """Both times are of `time.monotonic()`, by default in time. Raises NotSent, MaybeSent."""
        until = self._in_time()
        return await self._http.request(
            method,
            target,
            body,
            send_before=until if send_before is None else send_before,
            answer_timeout_s=self._capabilities.answer_timeout_s,
            answer_before=until if answer_before is None else answer_before,
            headers={**self._headers, "Idempotency-Key": key} if key else self._headers,
            content_type=self._content_type,
        )

    async def _post(
        self,
        call: Call,
        key: str,
        send_before: float | None = None,
        answer_before: float | None = None,
    ) -> Response:
        """See `_request`."""
        return await self._request(
            "POST",
            call.target,
            call.body,
            key=key,
            send_before=send_before,
            answer_before=answer_before,
        )

    async def _request_and_repeat(
        self,
        post: Callable[[float, float], Awaitable[Response]],
        send_before: float,
        *,
        is_uncertain: Callable[[Response], bool],
        may_repeat: Callable[[Response], bool] = lambda _: True,
    ) -> tuple[Response, bool]:
        """See `send_and_repeat`."""
        return await send_and_repeat(
            post,
            send_before=send_before,
            answer_timeout_s=self._capabilities.answer_timeout_s,
            pause_s=self._repeat_pause_s,
            is_uncertain=is_uncertain,
            may_repeat=may_repeat,
        )


def sendable(amount: _T | None, currency: str, known: Container[str]) -> _T:
    """An amount as the PSP takes it. Raises NotSent for None, by whether the currency is known."""
    if amount is None:
        raise NotSent(
            Reason.AMOUNT_NOT_SUPPORTED if currency in known else Reason.CURRENCY_NOT_SUPPORTED
        )
    return amount


def target_of(request: ConnectorRequest) -> str:
    """The PSP's id of what a request acts on. Raises NotSent without one."""
    if not request.target_transaction_id:
        raise NotSent(Reason.INVALID_REQUEST)
    return request.target_transaction_id
