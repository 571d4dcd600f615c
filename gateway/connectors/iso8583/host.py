"""Persistent connections to an acquirer's host: signed on, watched, and many requests on each.

As the HTTP client, it always knows on which side of the write a failure was: the time `send_before`
is compared directly before the system call, over TLS too, which runs in memory.
"""

import asyncio
import contextlib
import logging
import math
import os
import random
import ssl
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, cast
from urllib.parse import parse_qs, urlsplit

from gateway.connectors.http import MaybeSent, NotSent, verifying_context
from gateway.connectors.iso8583.framing import FrameError, FrameReader
from gateway.connectors.iso8583.identity import STAN_MAX
from gateway.connectors.iso8583.specification import (
    Fields,
    NetworkName,
    Specification,
    answer_mti,
)
from gateway.connectors.reaching import reach
from gateway.domain.errors import Reason
from gateway.domain.model import Mode

FORGOTTEN_MAX: Final = 10_000
"""For how many of the latest requests a late or second answer is told from one to nothing."""
UNDECODABLE_MAX: Final = 16
"""So many frames in succession that are no messages, and the connection is given up."""
TLS_READ_BYTES: Final = 64 * 1024

_log = logging.getLogger(__name__)

_Key = tuple[str, ...]


class Event(StrEnum):
    """What is counted."""

    CONNECTED = "connected"
    """Connected and signed on."""
    LOST = "lost"
    TIMED_OUT = "timed_out"
    ANSWERED_LATE = "answered_late"
    """An answer came after its request was in doubt."""
    ANSWERED_TWICE = "answered_twice"
    UNMATCHED = "unmatched"
    """An answer to no request of ours, or one with other numbers."""
    UNDECODABLE = "undecodable"
    ECHOED = "echoed"


Later = Callable[[Fields], None]
"""Takes an answer that comes when its request waits for none any more. Raises nothing."""


class _Waiting(NamedTuple):
    """A request that waits for its answer."""

    answer: asyncio.Future[Fields]
    later: Later | None
    asked_at: float


class _Past(NamedTuple):
    """A request that waits no longer: what an answer is, should one come."""

    event: Event
    later: Later | None = None
    first: Fields | None = None
    """The answer that it had."""


_UNKNOWN: Final = _Past(Event.UNMATCHED)


@dataclass(frozen=True, slots=True)
class HostLimits:
    """The bounds of the connections to one host; times in seconds."""

    connections: int = 2
    in_flight_max: int = 512
    """Unanswered requests on one connection."""
    waiters_max: int = 4096
    """Requests that wait for a connection."""
    wait_timeout_s: float = 10.0
    """How long one of them waits at most, whatever its window says."""
    connect_timeout_s: float = 3.0
    """With the TLS handshake."""
    network_timeout_s: float = 5.0
    """For the answer to a sign-on, a sign-off or an echo. A connection on which nothing came for so
    long to a request is tested by an echo, too, and takes no other request meanwhile."""
    echo_interval_s: float = 30.0
    """A connection on which nothing came for so long is tested by an echo."""
    reconnect_s_min: float = 0.1
    """The first pause before a connection is made again; doubled up to the next."""
    reconnect_s_max: float = 15.0
    """The longest pause. After a connection that lasted as long, or on which a request was
    answered, the first one comes again."""


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host is, what it speaks, and whether real money moves there."""

    host: str
    port: int
    tls: bool
    specification: str
    mode: Mode

    @classmethod
    def parse(cls, url: str) -> "HostAddress":
        """From `tls://host:port?specification=…&mode=live`; raises ValueError."""
        try:
            parts = urlsplit(url)
            port = parts.port
            query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
        except ValueError:
            # The standard library's error shows what may be a part of a password.
            parts, port, query = urlsplit(""), None, {}
        if (
            parts.scheme not in ("tcp", "tls")
            or not parts.hostname
            or port is None
            or parts.path
            or parts.fragment
            or "@" in parts.netloc
            or set(query) != {"specification", "mode"}
            or any(len(values) != 1 for values in query.values())
            or query["mode"][0] not in ("live", "test")
        ):
            raise ValueError(
                "a host's address must be tcp:// or"
                " tls://HOST:PORT?specification=NAME&mode=live|test"
            )
        return cls(
            parts.hostname,
            port,
            parts.scheme == "tls",
            query["specification"][0],
            Mode[query["mode"][0].upper()],
        )


class AcquirerHost:
    """Sends messages to one host and finds their answers, whichever order they come in."""

    def __init__(
        self,
        address: HostAddress,
        specification: Specification,
        limits: HostLimits | None = None,
        *,
        ca_file: str = "",
        count: Callable[[Event], None] | None = None,
    ) -> None:
        """Connects when the first message is to be sent. Raises OSError for an unusable CA file.

        `count` is told what happens.
        """
        self.specification = specification
        self.limits = limits or HostLimits()
        self.address = address
        self.count: Callable[[Event], None] = count or (lambda _: None)
        self.tls = verifying_context(ca_file) if address.tls else None
        self._tells_terminals = "41" in specification.match
        self._links: set[_Link] = set()
        """Signed on; those too that the host has signed off, until they are gone."""
        self._keepers: list[asyncio.Task[None]] = []
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._numbers: dict[_Key, asyncio.Future[None]] = {}
        """The numbers in flight; each is done when they are free again."""
        self._past: OrderedDict[_Key, _Past] = OrderedDict()
        self._closed = False

    async def exchange(
        self,
        request: Fields,
        *,
        send_before: float,
        answer_timeout_s: float,
        later: Later | None = None,
    ) -> Fields:
        """Send a message and wait for its answer at most `answer_timeout_s` from then.

        The answer may come on any connection. `later` is given one that comes after that, and a
        second one that differs from the first, as long as the request is among the FORGOTTEN_MAX
        latest ones.

        Two messages whose answers could be taken for each other's are never in flight together: the
        second waits, as one does for a connection with room, at most `wait_timeout_s`.
        Raises NotSent (CONNECT_FAILED, CONNECTOR_BUSY, SEND_WINDOW_PASSED, INVALID_REQUEST) and
        MaybeSent (ANSWER_TIMED_OUT, CONNECTION_LOST).
        """
        try:
            frame = self.specification.framing.pack(self.specification.encode(request))
        except (ValueError, FrameError) as error:
            raise NotSent(Reason.INVALID_REQUEST) from error
        key = self.specification.key(answer_mti(request["t"]), request)
        numbers = (request["11"], request.get("41", "") if self._tells_terminals else "")
        wait_before = min(send_before, time.monotonic() + self.limits.wait_timeout_s)
        await self._free(numbers, wait_before)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._numbers[numbers] = mine
        try:
            while True:
                link = await self._writable(wait_before)
                # No await may stand between this comparison and the write.
                now = time.monotonic()
                if now >= send_before:
                    raise NotSent(Reason.SEND_WINDOW_PASSED)
                answer = link.write(key, frame, later)
                if answer is not None:
                    return await self._answer(link, key, answer, answer_timeout_s)
                # The other side is gone and took no byte, so another connection may be tried.
        finally:
            del self._numbers[numbers]
            mine.set_result(None)

    async def _answer(
        self, link: "_Link", key: _Key, answer: asyncio.Future[Fields], timeout_s: float
    ) -> Fields:
        timer = asyncio.get_running_loop().call_later(timeout_s, link.give_up, key)
        try:
            return await answer
        finally:
            timer.cancel()
            link.forget(key)
            self.wake()

    # --- answers ----------------------------------------------------------------------------------

    def take(self, key: _Key) -> _Waiting | None:
        """The request of any connection that an answer belongs to; it waits no longer."""
        for link in self._links:
            waiting = link.pending.pop(key, None)
            if waiting is not None:
                return waiting
        return None

    def remember(self, key: _Key, past: _Past) -> None:
        """A request waits no longer."""
        self._past[key] = past
        self._past.move_to_end(key)
        if len(self._past) > FORGOTTEN_MAX:
            self._past.popitem(last=False)

    def answered_afterwards(self, key: _Key, fields: Fields) -> None:
        """An answer came that no request waits for."""
        past = self._past.get(key, _UNKNOWN)
        self.count(past.event)
        if past.later is not None and fields != past.first:
            past.later(fields)

    async def close(self) -> None:
        """Sign off and close; what waits was not sent, what is in flight is lost."""
        self._closed = True
        self._wake_all()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # One turn of the loop lets the transports go.
        await asyncio.sleep(0)

    # --- waiting ----------------------------------------------------------------------------------

    async def _free(self, numbers: _Key, wait_before: float) -> None:
        while (other := self._numbers.get(numbers)) is not None:
            await asyncio.wait([other], timeout=max(0.0, wait_before - time.monotonic()))
            if time.monotonic() >= wait_before:
                raise NotSent(Reason.CONNECTOR_BUSY)

    async def _writable(self, wait_before: float) -> "_Link":
        """The connection with the least in flight."""
        queued = False
        while True:
            if self._closed:
                raise NotSent(Reason.CONNECTOR_BUSY)
            self._start()
            links = [link for link in self._links if link.has_room]
            if links and (queued or not self._waiters):
                return min(links, key=lambda link: link.in_flight)
            budget_s = wait_before - time.monotonic()
            if budget_s <= 0:
                self.wake()
                is_busy = any(not link.leaving for link in self._links)
                raise NotSent(Reason.CONNECTOR_BUSY if is_busy else Reason.CONNECT_FAILED)
            if not queued and len(self._waiters) >= self.limits.waiters_max:
                raise NotSent(Reason.CONNECTOR_BUSY)
            await self._wait(budget_s, first=queued)
            queued = True

    async def _wait(self, budget_s: float, *, first: bool) -> None:
        """Until there may be room; `first` for who has waited before."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiters.appendleft if first else self._waiters.append)(waiter)
        try:
            await asyncio.wait([waiter], timeout=budget_s)
        except asyncio.CancelledError:
            if waiter.done():
                self.wake()  # the room goes to the next one
            raise
        finally:
            if not waiter.done():
                self._waiters.remove(waiter)

    def wake(self) -> None:
        """Let those go on for whom there is room."""
        room = sum(link.room for link in self._links)
        while self._waiters and room > 0:
            self._waiters.popleft().set_result(None)
            room -= 1

    def _wake_all(self) -> None:
        while self._waiters:
            self._waiters.popleft().set_result(None)

    # --- connections ------------------------------------------------------------------------------

    def _start(self) -> None:
        if not self._keepers:
            loop = asyncio.get_running_loop()
            self._keepers = [loop.create_task(self._keep()) for _ in range(self.limits.connections)]

    async def _keep(self) -> None:
        """Have one connection, again and again."""
        limits = self.limits
        pause_s = limits.reconnect_s_min
        warned = False
        while True:
            link: _Link | None = None
            try:
                async with asyncio.timeout(limits.connect_timeout_s):
                    link = await reach(lambda: _Link(self), self.address.host, self.address.port)
                    await link.ready
                if "sign_on" in self.specification.network:
                    await link.ask("sign_on")
                self.count(Event.CONNECTED)
                warned, since = False, time.monotonic()
                self._links.add(link)
                self.wake()
                await self._watch(link)
                self.count(Event.LOST)
                if link.served or time.monotonic() - since >= limits.reconnect_s_max:
                    pause_s = limits.reconnect_s_min
            except Exception as error:  # noqa: BLE001 - the connection is made again, whatever it was
                if not warned:
                    _log.warning("an acquirer's host cannot be used: %r", error)
                warned = True
            finally:
                if link is not None:
                    self._drop(link)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, limits.reconnect_s_max)

    def _drop(self, link: "_Link") -> None:
        self._links.discard(link)
        if self._closed and link.is_open:
            # Told, not waited for.
            link.tell("sign_off")
        link.abort(Reason.CONNECTION_LOST)

    async def _watch(self, link: "_Link") -> None:
        """Until the connection is lost, silent, or the host has signed off and all is answered."""
        if "echo" not in self.specification.network:
            await asyncio.wait([link.lost])
        while not link.lost.done():
            left_s = link.silent_at - time.monotonic()
            if left_s > 0:
                # A request that is written meanwhile brings it forward, but not by more than this.
                left_s = min(left_s, self.limits.network_timeout_s)
                await asyncio.wait([link.lost], timeout=left_s)
                continue
            try:
                await link.ask("echo")
            except MaybeSent:
                return
            self.count(Event.ECHOED)
            self.wake()


class _Link(asyncio.Protocol):
    """One connection."""

    def __init__(self, host: AcquirerHost) -> None:
        self._host = host
        self._specification = host.specification
        self._reader = FrameReader(host.specification.framing)
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._cipher_in = ssl.MemoryBIO()
        self._cipher_out = ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if host.tls is not None:
            self._tls = host.tls.wrap_bio(
                self._cipher_in, self._cipher_out, server_hostname=host.address.host
            )
        self.pending: dict[_Key, _Waiting] = {}
        self._undecodable = 0
        self._stan = random.randrange(STAN_MAX)
        self.served = False
        """A request was answered on it."""
        self.leaving = False
        """The host has signed off: no new requests."""
        self._farewell = False
        """The other side has ended TLS, or it broke: no more will come."""
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when messages can be written; it fails with an OSError."""
        self.lost: asyncio.Future[None] = loop.create_future()
        self.heard_at = time.monotonic()
        self._asked_at = -math.inf
        """Of what was asked since something came, the first; otherwise before that."""

    # --- what the host does -----------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self.pending)

    @property
    def silent_at(self) -> float:
        """From when on the connection may be half open, should nothing come until then."""
        limits = self._host.limits
        idle_at = self.heard_at + limits.echo_interval_s
        is_asked = self.pending or self._asked_at > self.heard_at
        if self.leaving or not is_asked:
            return idle_at
        return min(idle_at, max(self.heard_at, self._asked_at) + limits.network_timeout_s)

    @property
    def _is_silent(self) -> bool:
        return "echo" in self._specification.network and time.monotonic() >= self.silent_at

    @property
    def room(self) -> int:
        if self.leaving or not self._is_writable or self._is_silent:
            return 0
        return self._host.limits.in_flight_max - len(self.pending)

    @property
    def has_room(self) -> bool:
        return self.room > 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def _is_writable(self) -> bool:
        # What the system did not take yet stays before all else, and nobody knows when it goes.
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    async def ask(self, name: NetworkName) -> None:
        """A network management message. Raises MaybeSent, also where it is refused."""
        request = self._network(name)
        key = (answer_mti(request["t"]), request["11"])
        answer = self.write(key, self._pack(request))
        if answer is None:
            raise MaybeSent(Reason.CONNECTION_LOST)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._host.limits.network_timeout_s, self.give_up, key)
        try:
            told = await answer
        finally:
            timer.cancel()
            self.forget(key)
        if told.get("39") not in self._specification.network_approved:
            raise MaybeSent(Reason.ANSWER_UNUSABLE)

    def tell(self, name: NetworkName) -> None:
        """The same without an answer."""
        if name in self._specification.network:
            self._tell(self._pack(self._network(name)))

    def write(
        self, key: _Key, frame: bytes, later: Later | None = None
    ) -> asyncio.Future[Fields] | None:
        """Write now, by the system call itself; None: not a byte was taken.

        Transports may keep a write for a later moment of the loop's turn (uvloop's do).
        """
        transport = self._transport
        if transport is None or not self._is_writable:
            return None
        try:
            written = os.write(self._fd, frame := self._encrypt(frame))
        except OSError:
            # BlockingIOError too: a host that reads nothing is no better than none.
            self.abort(Reason.CONNECTION_LOST)
            return None
        if written < len(frame):
            transport.write(frame[written:])
        now = time.monotonic()
        if self._asked_at <= self.heard_at:
            self._asked_at = now
        waiting = _Waiting(asyncio.get_running_loop().create_future(), later, now)
        self.pending[key] = waiting
        return waiting.answer

    def give_up(self, key: _Key) -> None:
        """The answer's time is over."""
        waiting = self.pending.pop(key, None)
        if waiting is None or waiting.answer.done():
            return
        self._host.count(Event.TIMED_OUT)
        self._host.remember(key, _Past(Event.ANSWERED_LATE, waiting.later))
        waiting.answer.set_exception(MaybeSent(Reason.ANSWER_TIMED_OUT))
        # A part of it has not even left, and must not leave later; or the connection may be half
        # open, and there is no other test.
        tested = "echo" in self._specification.network or self.heard_at > waiting.asked_at
        if not (self._is_writable and tested):
            self.abort(Reason.CONNECTION_LOST)

    def forget(self, key: _Key) -> None:
        """Nobody waits for the answer any more, as where the caller was cancelled."""
        waiting = self.pending.pop(key, None)
        if waiting is not None:
            self._host.remember(key, _Past(Event.ANSWERED_LATE, waiting.later))
        if self.leaving and not self.pending:
            self.abort(Reason.CONNECTION_LOST)

    def abort(self, reason: Reason) -> None:
        """Close at once; what is in flight may have been sent."""
        pending, self.pending = self.pending, {}
        for key, waiting in pending.items():
            self._host.remember(key, _Past(Event.ANSWERED_LATE, waiting.later))
            if not waiting.answer.done():
                waiting.answer.set_exception(MaybeSent(reason))
        if self._transport is not None:
            self._transport.abort()
        if not self.ready.done():
            self.ready.set_exception(ConnectionResetError("the connection was lost"))
            self.ready.exception()  # looked at, since nobody may wait for it
        if not self.lost.done():
            self.lost.set_result(None)

    # --- what the event loop calls ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._fd = transport.get_extra_info("socket").fileno()
        self._transport.set_write_buffer_limits(high=0)
        if self._tls is None:
            self.ready.set_result(None)
        else:
            self._shake_hands()

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        try:
            clear = self._decrypt(data)
            # Once more where something came: what is broken is told after what was whole.
            while messages := self._reader.feed(clear):
                for message in messages:
                    self._take(message)
                clear = b""
            if self._farewell:
                self.abort(Reason.CONNECTION_LOST)
        except FrameError as error:
            self._host.count(Event.UNDECODABLE)
            self._fail(error)

    def resume_writing(self) -> None:
        self._host.wake()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        self.abort(Reason.CONNECTION_LOST)

    # --- messages ---------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        try:
            fields = self._specification.decode(data)
            mti = fields["t"]
            is_asked = mti[1] == "8" and mti[2] in "02"
            answer = self._pack(self._specification.network_answer(fields)) if is_asked else b""
        except ValueError:
            self._host.count(Event.UNDECODABLE)
            self._undecodable += 1
            if self._undecodable >= UNDECODABLE_MAX:
                raise FrameError("no messages are coming") from None
            return
        self._undecodable = 0
        if is_asked:
            self._serve(fields, answer)
            return
        is_network = mti[1] == "8"
        key = (mti, fields.get("11", "")) if is_network else self._specification.key(mti, fields)
        waiting = self.pending.pop(key, None)
        if waiting is None and not is_network:
            waiting = self._host.take(key)
        if waiting is None:
            self._host.answered_afterwards(key, fields)
        elif not waiting.answer.done():
            self.served |= not is_network
            self._host.remember(key, _Past(Event.ANSWERED_TWICE, waiting.later, fields))
            waiting.answer.set_result(fields)

    def _serve(self, request: Fields, answer: bytes) -> None:
        """A network management request of the host, and the frame that answers it."""
        self._tell(answer)
        if self._specification.is_sign_off(request):
            self.leaving = True
            if not self.pending:
                self.abort(Reason.CONNECTION_LOST)

    def _tell(self, frame: bytes) -> None:
        """Write what has no answer, behind what is not written yet; it is not missed."""
        if self._transport is None or self._transport.is_closing():
            return
        frame = self._encrypt(frame)
        written = 0
        if self._is_writable:
            with contextlib.suppress(OSError):
                written = os.write(self._fd, frame)
        if written < len(frame):
            self._transport.write(frame[written:])

    def _network(self, name: NetworkName) -> Fields:
        self._stan = self._stan % STAN_MAX + 1
        now = time.strftime("%y%m%d%H%M%S", time.gmtime())
        values = {
            "stan": f"{self._stan:06}",
            "transmission_time": now[2:],
            "local_time": now[6:],
            "local_date": now[2:6],
            "year": now[:2],
        }
        return self._specification.build(self._specification.network[name], values)

    def _pack(self, fields: Fields) -> bytes:
        return self._specification.framing.pack(self._specification.encode(fields))

    # --- TLS --------------------------------------------------------------------------------------

    def _encrypt(self, frame: bytes) -> bytes:
        if self._tls is None:
            return frame
        self._tls.write(frame)
        return self._cipher_out.read()

    def _shake_hands(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
            self.ready.set_result(None)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._fail(error)
        finally:
            hello = self._cipher_out.read()
            if hello and self.is_open and self._transport is not None:
                self._transport.write(hello)

    def _decrypt(self, data: bytes) -> bytes:
        if self._tls is None:
            return data
        self._cipher_in.write(data)
        if not self.ready.done():
            self._shake_hands()
            if not self.ready.done():
                return b""
        clear = bytearray()
        try:
            while part := self._tls.read(TLS_READ_BYTES):
                clear += part
            self._farewell = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:  # bytes that are none of the other side's
            self._farewell = True
        return bytes(clear)

    def _fail(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()
        self.abort(Reason.CONNECTION_LOST)
