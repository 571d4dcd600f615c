"""The door for PSPs' notifications: HTTP on a port of its own, bounded in every direction.

`POST /v1/notifications/{connector}/{account id}`. Status 200 leaves only after the notification is
stored. PSPs repeat what has another status, so what is too much is refused early: a connection too
many, a request too soon, a body too long, all before a signature is computed. Nothing of it shares
a connection or a queue with the payments.

Whose a request is only its signature tells, and anybody may send what has none. So where there is
too much, what has proved nothing gives way: the oldest connection that has brought nothing genuine,
the oldest unread body of the account that has the most of them, and the requests of accounts whose
others fail.
"""

import asyncio
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, Protocol, cast

from aiohttp import web

from gateway.application.notifications import Notification, Receipt, Received
from gateway.application.ports import StoreUnavailable
from gateway.connectors.accounts import NotifiedAccount
from gateway.connectors.notifications import (
    BadSignature,
    NotificationSource,
    UnusableNotification,
)
from gateway.domain.errors import GatewayError
from gateway.http_connection import Connection
from gateway.listening import listen
from gateway.settings import split_address

PATH: Final = "/v1/notifications"
CONTENT_TYPES: Final = frozenset({"application/json", "application/x-www-form-urlencoded"})
EVENTS_MAX: Final = 100
"""Events in one request."""
EVENT_ID_LENGTH_MAX: Final = 255
LINGER_S: Final = 1.0
"""For how long the rest of a refused body is read, so that the refusal is."""
BACKLOG: Final = 128
"""Connections that wait to be accepted."""
FAILURES_PER_S_MAX: Final = 1
"""An account of whose requests more fail leaves the second half of the rate to the others."""

_TARGET: Final = re.compile(re.escape(PATH) + "/([a-z][a-z0-9_]{0,63})/(acc_[0-9a-f]{32})")
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: %d\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)

_log = logging.getLogger(__name__)


_STATUS: Final = {
    Receipt.KEPT: 200,
    Receipt.REPEATED: 200,
    Receipt.BAD_SIGNATURE: 400,
    Receipt.UNUSABLE: 400,
    Receipt.UNKNOWN_ACCOUNT: 404,
    Receipt.BAD_REQUEST: 400,
    Receipt.TOO_LARGE: 413,
    Receipt.TOO_SLOW: 408,
    Receipt.RATE_LIMITED: 429,
    Receipt.OVERLOADED: 503,
    Receipt.STORE_UNAVAILABLE: 503,
}
_FAILURES: Final = frozenset(
    {Receipt.BAD_SIGNATURE, Receipt.BAD_REQUEST, Receipt.TOO_LARGE, Receipt.TOO_SLOW}
)
"""What may be anybody's."""
_RETRIED: Final = frozenset(
    {Receipt.RATE_LIMITED, Receipt.OVERLOADED, Receipt.STORE_UNAVAILABLE, Receipt.TOO_SLOW}
)


@dataclass(frozen=True, slots=True)
class ReceiverLimits:
    """The bounds of the door, for each process."""

    body_bytes_max: int
    timeout_s: float
    """From the first byte of a request, or a connection's beginning, to the last."""
    connections_max: int
    in_flight_max: int
    """Requests worked on at once."""
    per_s_max: int
    """Requests begun in a second, and in one burst."""
    stop_s_max: float = math.inf
    """How long `stop` waits for what has begun; never longer than `timeout_s`."""
    retry_after_s: int = 1
    """What a sender who is refused for now is told."""


class ReceiverObserver(Protocol):
    """Counts requests, for metrics."""

    def notification_received(self, connector: str, receipt: Receipt) -> None:
        """A request ended; `connector` is empty where it names none that is known."""


class _Refused(Exception):
    """The request gets no further."""

    def __init__(self, receipt: Receipt, status: int | None = None) -> None:
        super().__init__(receipt)
        self.receipt = receipt
        self.status = status or _STATUS[receipt]


class _Rate:
    """A token bucket: `per_s_max` in a second, and as many at once after a quiet second."""

    def __init__(self, per_s_max: int) -> None:
        self._per_s_max = per_s_max
        self._tokens = float(per_s_max)
        self._at = time.monotonic()

    def has(self, tokens: float) -> bool:
        """Whether so many are there."""
        now = time.monotonic()
        self._tokens = min(self._per_s_max, self._tokens + (now - self._at) * self._per_s_max)
        self._at = now
        return self._tokens >= tokens

    def take(self, least: float = 1) -> bool:
        """Take one where there are `least`, which are 1 or more."""
        if not self.has(least):
            return False
        self._tokens -= 1
        return True


class _Refusing(asyncio.Protocol):
    """Answers a connection too many without reading from it."""

    def __init__(self, retry_after_s: int) -> None:
        self._answer = _REFUSAL % retry_after_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writable = cast(asyncio.WriteTransport, transport)
        writable.write(self._answer)
        writable.close()


class _Server(web.Server):
    """A server that holds `connections_max` connections.

    One more closes the oldest that has brought nothing genuine; without such, it is refused.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: ReceiverLimits,
        told: Callable[[Receipt], None],
    ) -> None:
        super().__init__(handler)
        self._limits = limits
        self._told = told
        self._unproven: dict[web.RequestHandler, None] = {}
        """The connections that have brought nothing genuine, the oldest first."""

    def __call__(self) -> asyncio.Protocol:  # type: ignore[override]
        if len(self.connections) >= self._limits.connections_max:
            self._told(Receipt.OVERLOADED)
            if not self._unproven:
                return _Refusing(self._limits.retry_after_s)
            oldest = next(iter(self._unproven))
            del self._unproven[oldest]
            oldest.force_close()
        return Connection(
            partial(self._told, Receipt.BAD_REQUEST),
            self,
            loop=asyncio.get_running_loop(),
            access_log=None,
            # Also for a first request that does not come, or comes a byte at a time.
            keepalive_timeout=self._limits.timeout_s,
            lingering_time=LINGER_S,
            # A PSP compresses nothing, and a few bytes could become a gigabyte.
            auto_decompress=False,
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._unproven[handler] = None

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._unproven.pop(handler, None)

    def proven(self, handler: web.RequestHandler) -> None:
        """The connection has brought something genuine."""
        self._unproven.pop(handler, None)


class Receiver:
    """Serves the door.

    Args:
        account: finds an account by its id, also a disabled one; None where there is none.
        sources: how each connector's notifications are read.
        keep: stores what was received and returns how many were new; raises as
            `gateway.application.notifications.NotificationStore.keep`.
        limits: see there.
        observer: is told of every request.
        address: where to listen, `host:port`.
        share_port: whether other processes listen there too.
    """

    def __init__(
        self,
        account: Callable[[str], NotifiedAccount | None],
        sources: Sequence[NotificationSource],
        keep: Callable[[Sequence[Received]], Awaitable[int]],
        limits: ReceiverLimits,
        observer: ReceiverObserver,
        address: str,
        *,
        share_port: bool = False,
    ) -> None:
        self._account = account
        self._sources = {source.connector: source for source in sources}
        self._keep = keep
        self._limits = limits
        self._observer = observer
        self._host, self._port = split_address(address)
        self._share_port = share_port
        self._rate = _Rate(limits.per_s_max)
        self._strangers = _Rate(limits.per_s_max)
        """For those who name no account: they do not use up what is for the others."""
        self._failures: dict[str, _Rate] = {}
        """By account, of those that there are: what is left of what may fail."""
        self._in_flight = 0
        self._unproven: dict[asyncio.Timeout, str] = {}
        """The ends of those in flight that have proved nothing, the oldest first, by account."""
        self._server: _Server | None = None
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """Listen. Raises OSError where the address is taken."""
        self._server = _Server(
            self._serve, self._limits, partial(self._observer.notification_received, "")
        )
        stop_s = min(self._limits.timeout_s, self._limits.stop_s_max)
        # aiohttp waits for so long twice: before it takes the rest of the body away, and after.
        self._runner = web.ServerRunner(self._server, shutdown_timeout=stop_s / 2)
        await self._runner.setup()
        await listen(
            self._runner, self._host, self._port, backlog=BACKLOG, reuse_port=self._share_port
        )

    @property
    def port(self) -> int:
        """The port, also where a free one was asked for."""
        assert self._runner is not None, "started"
        port: int = self._runner.addresses[0][1]
        return port

    async def stop(self) -> None:
        """Finish what has begun, within its time, and close the port. Safe to repeat."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.Response:
        named, connector, body = None, "", b""
        try:
            target = _TARGET.fullmatch(request.path)
            named = None if target is None else self._account(target[2])
            account, source = self._admitted(request, target, named)
            connector = account.connector
            self._in_flight += 1
            try:
                received = await self._proven(request, account, source)
                receipt = Receipt.KEPT if await self._stored(received) else Receipt.REPEATED
            finally:
                self._in_flight -= 1
            status, body = 200, source.acknowledgement
        except _Refused as refused:
            receipt, status = refused.receipt, refused.status
        except Exception:  # noqa: BLE001 - with 500 a PSP would blame its event
            _log.exception("a notification could not be taken", extra={"connector": connector})
            receipt, status = Receipt.STORE_UNAVAILABLE, 503
        if named is not None and receipt in _FAILURES:
            rate = self._failures.setdefault(named.account_id, _Rate(FAILURES_PER_S_MAX))
            rate.take()
        self._observer.notification_received(connector, receipt)
        response = web.Response(status=status, body=body, content_type="text/plain")
        if status == 405:
            response.headers["Allow"] = "POST"
        if receipt in _RETRIED:
            response.headers["Retry-After"] = str(self._limits.retry_after_s)
        if receipt not in (Receipt.KEPT, Receipt.REPEATED):
            response.force_close()
        return response

    def _may_begin(self, account: NotifiedAccount | None) -> bool:
        """Whether the rate allows it."""
        if account is None:
            return self._strangers.take()
        failures = self._failures.get(account.account_id)
        if failures is None or failures.has(1):
            return self._rate.take()
        return self._rate.take(least=max(1, self._limits.per_s_max / 2))

    def _admitted(
        self,
        request: web.BaseRequest,
        target: re.Match[str] | None,
        account: NotifiedAccount | None,
    ) -> tuple[NotifiedAccount, NotificationSource]:
        """Whose it is; what can be refused by its head is. Raises _Refused."""
        if not self._may_begin(account):
            raise _Refused(Receipt.RATE_LIMITED)
        if target is None:
            raise _Refused(Receipt.BAD_REQUEST, 404)
        if request.method != "POST":
            raise _Refused(Receipt.BAD_REQUEST, 405)
        if request.content_type not in CONTENT_TYPES or "Content-Encoding" in request.headers:
            raise _Refused(Receipt.BAD_REQUEST, 415)
        if (request.content_length or 0) > self._limits.body_bytes_max:
            raise _Refused(Receipt.TOO_LARGE)
        source = self._sources.get(target[1])
        # An account that takes none looks like none.
        if account is None or source is None or account.connector != target[1]:
            raise _Refused(Receipt.UNKNOWN_ACCOUNT)
        if not account.secrets:
            raise _Refused(Receipt.UNKNOWN_ACCOUNT)
        if self._in_flight >= self._limits.in_flight_max and not self._gives_way(account):
            raise _Refused(Receipt.OVERLOADED)
        return account, source

    def _gives_way(self, account: NotifiedAccount) -> bool:
        """Whether another one ends for it: the oldest of whoever has the most without proof."""
        counts = Counter(self._unproven.values())
        [(most_id, most)] = counts.most_common(1) or [("", 0)]
        if most <= counts[account.account_id] + 1:
            return False
        oldest = next(end for end, account_id in self._unproven.items() if account_id == most_id)
        del self._unproven[oldest]
        if not oldest.expired():
            oldest.reschedule(asyncio.get_running_loop().time())
        return True

    async def _proven(
        self, request: web.BaseRequest, account: NotifiedAccount, source: NotificationSource
    ) -> list[Received]:
        """As `_read`, in its time, or until it has to give way. Raises _Refused."""
        try:
            async with asyncio.timeout(self._limits.timeout_s) as end:
                self._unproven[end] = account.account_id
                try:
                    received = await self._read(request, account, source)
                finally:
                    self._unproven.pop(end, None)
        except TimeoutError:
            raise _Refused(Receipt.TOO_SLOW) from None
        assert self._server is not None, "started"
        self._server.proven(request.protocol)
        return received

    async def _read(
        self, request: web.BaseRequest, account: NotifiedAccount, source: NotificationSource
    ) -> list[Received]:
        """The events of a genuine request. Raises _Refused."""
        body = await self._body(request)
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            told = source.verify_and_parse(headers, body, account.secrets, datetime.now(UTC))
            if len(told) > EVENTS_MAX:
                raise UnusableNotification(f"it has more than {EVENTS_MAX} events")
            for each in told:
                _check(each, account)
        except (BadSignature, UnusableNotification) as error:
            _log.warning(
                "a notification was refused: %s",
                error,
                extra={
                    "merchant_id": account.merchant_id,
                    "connector": account.connector,
                    "connector_account_id": account.account_id,
                },
            )
            bad = isinstance(error, BadSignature)
            raise _Refused(Receipt.BAD_SIGNATURE if bad else Receipt.UNUSABLE) from error
        return [Received(account.merchant_id, account.account_id, each) for each in told]

    async def _body(self, request: web.BaseRequest) -> bytes:
        """Raises _Refused where it is too long, whatever its head says, or breaks off."""
        body = bytearray()
        try:
            async for part in request.content.iter_any():
                body += part
                if len(body) > self._limits.body_bytes_max:
                    raise _Refused(Receipt.TOO_LARGE)
        except (web.RequestPayloadError, ConnectionError) as error:
            raise _Refused(Receipt.BAD_REQUEST) from error
        return bytes(body)

    async def _stored(self, received: Sequence[Received]) -> bool:
        """Whether any of it is new; it is stored in either case. Raises _Refused."""
        try:
            return await self._keep(received) > 0
        except GatewayError as error:
            raise _Refused(Receipt.OVERLOADED) from error
        except StoreUnavailable as error:
            raise _Refused(Receipt.STORE_UNAVAILABLE) from error


def _check(notification: Notification, account: NotifiedAccount) -> None:
    """Raises UnusableNotification for what cannot be kept, or is of the other mode."""
    event_id = notification.event_id
    if not event_id.isprintable() or not 0 < len(event_id) <= EVENT_ID_LENGTH_MAX:
        raise UnusableNotification("it has no id that can be used")
    if notification.mode not in (None, account.mode):
        raise UnusableNotification("it is of the other mode than the account")
