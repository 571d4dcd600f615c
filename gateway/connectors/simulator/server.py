"""The PSP simulator's process: HTTP in front of the ledger, the journal behind it.

A lean HTTP/1.1 server of its own, so that a load test measures the gateway, and so that it can do
what good servers never do: reset, hang and answer with garbage.
"""

import argparse
import asyncio
import contextlib
import ctypes
import math
import os
import random
import re
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote, urlencode

import orjson

from gateway.connectors.simulator.journal import JOURNAL_VERSION, Journal, JournalError, Record
from gateway.connectors.simulator.latency import Latency
from gateway.connectors.simulator.ledger import KINDS, Ledger, Send, Transaction
from gateway.connectors.simulator.notifying import Notifier, Notifying
from gateway.connectors.simulator.outcomes import APPROVE, BEFORE_EFFECT, VISITS, Behaviour, Fault
from gateway.connectors.simulator.profiles import FIELDS, PROFILES, Profile, find_profile
from gateway.listening import every_address

HEAD_BYTES_MAX: Final = 16 * 1024
BODY_BYTES_MAX: Final = 256 * 1024
CONNECTIONS_MAX: Final = 8_192
BACKLOG: Final = 4_096
AMOUNT_MINOR_MAX: Final = 10**12
HANG_S_MAX: Final = 300.0
"""A request that gets no answer is let go after this, in seconds."""
CONTROL_WAIT_S_MAX: Final = 30.0
"""How long a control request may wait for requests to be held, in seconds."""
HOLDS_MAX: Final = 100
TRANSACTIONS_MAX: Final = 5_000_000
"""The books are in memory; beyond this a request gets status 503 without effect."""
OVERSIZED_BYTES: Final = 1024 * 1024
COMMIT_MS: Final = 5.0
"""How long before an answer is due its effect is decided, in milliseconds: about the time that the
journal takes, so that the answer is written when it is due."""

_REFERENCE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_AVS_POSTAL_CODE: Final = re.compile(r"AVS-([A-Z])")
_METHOD: Final = re.compile(r"[a-z0-9_]{1,64}")
_RETURN_URL: Final = re.compile(r"https://[!-~]{1,2040}")
_NETWORK_TOKEN: Final = re.compile(r"[0-9]{12,19}")
NETWORK_TOKEN_TOKEN: Final = "tok_test_network_token"  # noqa: S105
"""What stands in the journal for every network token."""
_PHRASES: Final = {
    200: "OK",
    303: "See Other",
    400: "Bad Request",
    404: "Not Found",
    409: "Conflict",
}
_PAGE: Final = """<!DOCTYPE html><title>Simulator</title>
<h1>{method}: {amount_minor} minor units of {currency}</h1>
<p>{state}</p>
"""
_CHOICES: Final = "".join(
    f'<form method="post" action="{{path}}/{outcome}"><button>{outcome}</button></form>\n'
    for outcome in VISITS
)
LINGER_NOT: Final = struct.pack("ii", 1, 0)
"""SO_LINGER such that closing sends a reset."""
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True)
class Options:
    """How to run a simulator."""

    journal: Path
    profile: str = "idempotent"
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one, told in the line that is printed at the start."""
    latency: Latency = field(default_factory=Latency)
    seed: int = 1
    exit_with_parent: bool = False
    iso8583: tuple[str, int] | None = None
    """Where to listen for ISO 8583 too; port 0 as above."""
    iso8583_specification: str = "reference-text"
    notifying: Notifying | None = None
    """Where to tell what came of operations."""


class Lateness:
    """How much later than due answers were written, in milliseconds."""

    STEPS_MAX: Final = 10_000
    """Later than this many steps counts as the last one; `max_ms` is exact all the same."""
    STEP_MS: Final = 0.1

    def __init__(self) -> None:
        self._counts = [0] * self.STEPS_MAX
        self._count = 0
        self._max_ms = 0.0

    def record(self, late_ms: float) -> None:
        """One answer was written so much later than due."""
        self._counts[min(int(late_ms / self.STEP_MS), self.STEPS_MAX - 1)] += 1
        self._count += 1
        self._max_ms = max(self._max_ms, late_ms)

    def summary(self) -> dict[str, float]:
        """`count`, `p50_ms`, `p99_ms`, `p999_ms` (each rounded up to a step) and `max_ms`."""
        return {
            "count": self._count,
            "p50_ms": self._quantile(0.5),
            "p99_ms": self._quantile(0.99),
            "p999_ms": self._quantile(0.999),
            "max_ms": round(self._max_ms, 3),
        }

    def _quantile(self, share: float) -> float:
        rank = math.ceil(share * self._count)
        if not rank:
            return 0.0
        seen = 0
        for step, count in enumerate(self._counts):
            seen += count
            if seen >= rank and step < self.STEPS_MAX - 1:
                return round((step + 1) * self.STEP_MS, 3)
        return round(self._max_ms, 3)


class _BadRequest(Exception):
    """The request makes no sense; nothing was processed."""


class Peer(Protocol):
    """The connection that a request came on."""

    connection_id: str
    gone: asyncio.Future[None]
    """Done when the client has closed."""

    def abort(self) -> None:
        """Reset it."""


@dataclass(slots=True)
class Reply:
    """An answer, as HTTP has it."""

    status: int
    body: bytes
    due_at: float | None = None
    """When it has to be written, by the monotonic clock; None where that is not measured."""
    content_type: str = "application/json"
    location: str = ""


@dataclass(slots=True)
class _Console:
    """Somebody who uses the PSP's console. Implements Peer."""

    connection_id: str
    gone: asyncio.Future[None] = field(default_factory=asyncio.Future)

    def abort(self) -> None:
        """Nothing is reset."""


@dataclass(slots=True)
class _Hold:
    """Requests that match stop at a point until they are released."""

    point: str
    method: str
    kind: str
    reference_prefix: str


@dataclass(slots=True, eq=False)
class _Held:
    reference: str
    kind: str
    point: str
    released: asyncio.Future[None]


def _json(status: int, body: object) -> Reply:
    return Reply(status, orjson.dumps(body))


# --- HTTP -----------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """One client's connection: its requests are handled one after the other."""

    def __init__(self, simulator: "Simulator") -> None:
        self._simulator = simulator
        self._buffer = bytearray()
        self.busy = False
        self.connection_id = ""
        self.gone = asyncio.get_running_loop().create_future()
        """Done when the client has closed."""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.connection_id = self._simulator.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        if not self.gone.done():
            self.gone.set_result(None)
        self._simulator.disconnected(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > HEAD_BYTES_MAX + BODY_BYTES_MAX:
            self.abort()
        elif not self.busy:
            self._next()

    def _next(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                self.abort()
            return
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        length = 0
        for line in lines[1:]:
            name, _, value = line.partition(":")
            name = name.lower()
            if name == "content-length":
                value = value.strip()
                length = int(value) if value.isdigit() and len(value) < 9 else BODY_BYTES_MAX + 1
            elif name == "transfer-encoding":
                length = BODY_BYTES_MAX + 1
        whole = end + 4 + length
        if length > BODY_BYTES_MAX:
            self.abort()
            return
        if len(self._buffer) < whole:
            return
        body = bytes(self._buffer[end + 4 : whole])
        del self._buffer[:whole]
        method, _, rest = lines[0].partition(" ")
        self.busy = True
        self._simulator.spawn(self, method, rest.partition(" ")[0], body)

    def reply(self, reply: Reply) -> None:
        """Answer, and go on with the next request."""
        if self.transport is None or self.transport.is_closing():
            return
        phrase = _PHRASES.get(reply.status, "Error")
        head = (
            f"HTTP/1.1 {reply.status} {phrase}\r\nContent-Type: {reply.content_type}\r\n"
            f"Content-Length: {len(reply.body)}\r\n"
        )
        if reply.location:
            head += f"Location: {reply.location}\r\n"
        head += "\r\n"
        self.transport.write(head.encode("ascii") + reply.body)
        self.busy = False
        if self._buffer:
            self._next()

    def abort(self) -> None:
        """Reset the connection (RST, where the system can)."""
        # A connection that the client has closed meanwhile has no socket any more.
        if self.transport is not None and not self.transport.is_closing():
            with contextlib.suppress(OSError):
                # Without lingering, closing sends a reset instead of an end (RFC 9293 §3.10.4).
                self.transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT
                )
            self.transport.abort()


# --- the simulator --------------------------------------------------------------------------------


class Simulator:
    """Handles requests: journal, ledger, latency, faults and holds."""

    def __init__(
        self, journal: Journal, ledger: Ledger, *, latency: Latency, source: random.Random
    ) -> None:
        self._journal = journal
        self._ledger = ledger
        self._latency = latency
        self._source = source
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working: dict[str, asyncio.Future[None]] = {}
        """References whose first request is being worked on."""
        self._holds: list[_Hold] = []
        self._held: list[_Held] = []
        self._held_changed = asyncio.Event()
        self._mode = "up"
        self._clock_ahead_s = 0.0
        self._connection_count = 0
        self._lateness = Lateness()
        self.notifier = Notifier(journal.durable, self._settle, source)

    @property
    def run(self) -> int:
        """How many times a simulator was started on this journal, this one included."""
        return self._journal.run

    # --- connections ------------------------------------------------------------------------------

    def connected(self, connection: _Connection) -> str:
        """A new connection; returns its id, unique in the journal."""
        self._connection_count += 1
        if len(self._connections) >= CONNECTIONS_MAX:
            connection.abort()
        self._connections.add(connection)
        return f"{self._journal.run}-{self._connection_count}"

    def disconnected(self, connection: _Connection) -> None:
        """A connection is gone. What it asked for goes on, as at a real PSP."""
        self._connections.discard(connection)

    def spawn(self, connection: _Connection, method: str, target: str, body: bytes) -> None:
        """Handle a request in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._serve(connection, method, target, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Drop every connection and every request under way, and close the journal."""
        for connection in list(self._connections):
            connection.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.notifier.close()
        await self._journal.close()

    async def _serve(self, connection: _Connection, method: str, target: str, body: bytes) -> None:
        try:
            reply = await self._route(connection, method, target.partition("?")[0], body)
        except (_BadRequest, orjson.JSONDecodeError) as error:
            reply = _json(400, {"error": "bad_request", "message": str(error)})
        except Exception:  # noqa: BLE001 a bug here must be seen, and must not stop the others
            sys.stderr.write(traceback.format_exc())
            reply = _json(500, {"error": "internal"})
        if reply is not None:
            connection.reply(reply)
            if reply.due_at is not None:
                self._lateness.record(max(0.0, 1000 * (time.monotonic() - reply.due_at)))

    async def _route(
        self, connection: _Connection, method: str, path: str, body: bytes
    ) -> Reply | None:
        parts = [unquote(part) for part in path.split("/")[1:]]
        match [method, *parts]:
            case ["POST", "v1", "operations", kind] if kind in KINDS:
                return await self.send(connection, _parse_send(kind, body))
            case ["GET", "v1", "operations", kind, reference] if kind in KINDS:
                return await self._query(connection, kind, _reference(reference))
            case ["POST", "v1", "operations", kind, reference, "cancel"] if kind in KINDS:
                return await self.cancel(connection, kind, _reference(reference))
            case ["GET", "v1", "profile"]:
                return _json(200, _profile_json(self._ledger.profile))
            case ["POST", "control", action]:
                return await self._control(action, _object(body or b"{}"))
            case _:
                return await self._pay(connection, method, parts)

    # --- the three requests -----------------------------------------------------------------------

    async def send(self, connection: Peer, send: Send) -> Reply | None:
        """Do what is asked, or repeat what was; None where the connection is not answered."""
        received_at = self._now()
        arrived_at = time.monotonic()
        behaviour = self._ledger.behaviour(send)
        known = self._ledger.reference(send.reference)
        first = known is None or known.sends == 0
        repeated = self._ledger.duplicate_of(send.reference, received_at)
        idempotent = self._ledger.profile.idempotent_by_reference
        deduplicated = repeated is not None or (idempotent and send.reference in self._working)
        request = await self._received(
            connection, "send", send.kind, send.reference, send, deduplicated=deduplicated
        )
        if self._mode != "up" or self._ledger.transaction_count >= TRANSACTIONS_MAX:
            return await self._unavailable(connection)
        fault = behaviour.fault if first or behaviour.every_time else Fault.NONE
        if fault in BEFORE_EFFECT:
            return await self._fail(connection, fault)
        delay_ms = self._latency.draw(self._source) + behaviour.extra_ms
        # The delay is the whole of the PSP's work, the journal's included.
        due_at = arrived_at + delay_ms / 1000
        while idempotent and send.reference in self._working:
            await asyncio.wait([self._working[send.reference]])
        working: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if idempotent:
            self._working[send.reference] = working
        try:
            await self._work(connection, send, fault, due_at - COMMIT_MS / 1000)
            answer = await self._decide(send, behaviour, request, received_at)
            await _sleep_until(due_at)
        finally:
            if idempotent:
                del self._working[send.reference]
            working.set_result(None)
        await self._hold("before_answer", "send", send.kind, send.reference)
        answer = {**answer, "processing_ms": round(delay_ms, 3)}
        reply = await self._answer(connection, fault, answer)
        # Neither what was held nor what waited for another request is the simulator's lateness.
        if reply is not None and delay_ms and first and fault is Fault.NONE and not self._holds:
            reply.due_at = due_at
        return reply

    async def _work(self, connection: Peer, send: Send, fault: Fault, decide_at: float) -> None:
        """All the time until the effect."""
        if fault is Fault.LATE:
            await asyncio.wait([connection.gone], timeout=HANG_S_MAX)
        await _sleep_until(decide_at)
        await self._hold("before_effect", "send", send.kind, send.reference)

    async def _decide(
        self, send: Send, behaviour: Behaviour, request: int, received_at: float
    ) -> dict[str, Any]:
        """Refuse, repeat or execute, durably. No await stands between looking and doing."""
        now = self._now()
        known = self._ledger.reference(send.reference)
        record: Record | None
        if known is not None and known.canceled is not None:
            record, answer = self._ledger.refuse_canceled(send, request, now)
        elif (repeated := self._ledger.duplicate_of(send.reference, received_at)) is not None:
            record, answer = self._ledger.repeat(repeated, send, request, now)
        else:
            record, answer = self._ledger.execute(send, behaviour, request, received_at, now)
        if record is not None:
            self._enter(record)
        # A repeat too waits: what it repeats may not be durable yet.
        await self._journal.durable()
        return answer

    async def _query(self, connection: Peer, kind: str, reference: str) -> Reply | None:
        if not self._ledger.profile.query_by_reference:
            return _json(404, {"error": "no_query"})
        request = await self._received(connection, "query", kind, reference)
        if self._mode != "up":
            return await self._unavailable(connection)
        await self._hold("before_effect", "query", kind, reference)
        known = self._ledger.reference(reference)
        if reference in self._working and known is not None and not known.transactions:
            body = {"result": "in_progress", "reference": reference, "kind": kind}
            return _json(409, body)
        records, answer = self._ledger.query(kind, reference, request, self._now())
        for record in records:
            self._enter(record)
        await self._journal.durable()
        await self._hold("before_answer", "query", kind, reference)
        return _json(404 if answer["result"] == "not_found" else 200, answer)

    async def cancel(self, connection: Peer, kind: str, reference: str) -> Reply | None:
        """Make a reference unusable and take back what it caused."""
        if not self._ledger.profile.cancel_by_reference:
            return _json(404, {"error": "no_cancel"})
        request = await self._received(connection, "cancel", kind, reference)
        if self._mode != "up":
            return await self._unavailable(connection)
        await self._hold("before_effect", "cancel", kind, reference)
        record, answer = self._ledger.cancel(kind, reference, request, self._now())
        self._journal.append(record)
        await self._journal.durable()
        await self._hold("before_answer", "cancel", kind, reference)
        return _json(200, answer)

    def _enter(self, record: Record) -> None:
        """A decision, or what became of one: into the journal, and told where that is wanted."""
        self._journal.append(record)
        if record["type"] != "refused" and self.notifier.tells:
            self.notifier.entered(
                record,
                self._ledger.payment_reference(record),
                settles=self._ledger.settles_by_itself(record["transaction_id"]),
            )

    async def _settle(self, transaction_id: str) -> None:
        record = self._ledger.settle(transaction_id, self._now())
        if record is not None:
            self._enter(record)
            await self._journal.durable()

    # --- the customer's page ----------------------------------------------------------------------

    async def _pay(
        self, connection: _Connection, method: str, parts: Sequence[str]
    ) -> Reply | None:
        transaction = self._ledger.visited(parts[1]) if len(parts) > 1 else None
        match [method, *parts]:
            case ["GET", "pay", _] if transaction is not None:
                return self._page(transaction)
            case ["POST", "pay", _, chosen] if transaction is not None and chosen in VISITS:
                return await self._visit(connection, transaction, chosen)
            case _:
                return _json(404, {"error": "no_such_resource"})

    def _page(self, transaction: Transaction) -> Reply:
        page = _PAGE.format(
            method=transaction.method,
            amount_minor=transaction.amount_minor,
            currency=transaction.currency,
            state=transaction.result.value,
        )
        if transaction.awaits_customer(self._now()):
            page += _CHOICES.format(path=f"/pay/{transaction.transaction_id}")
        return Reply(200, page.encode(), content_type="text/html; charset=utf-8")

    async def _visit(
        self, connection: _Connection, transaction: Transaction, outcome: str
    ) -> Reply | None:
        kind, reference = transaction.kind, transaction.reference
        request = await self._received(connection, "visit", kind, reference)
        if self._mode != "up":
            return await self._unavailable(connection)
        record = self._ledger.visit(transaction, outcome, request, self._now())
        if record is not None:
            self._enter(record)
            await self._journal.durable()
        reply = self._page(transaction)
        if record is None:
            reply.status = 409
        elif transaction.return_url:
            reply.status, reply.location = 303, transaction.return_url
        return reply

    async def _received(
        self,
        connection: Peer,
        method: str,
        kind: str,
        reference: str,
        send: Send | None = None,
        *,
        deduplicated: bool = False,
    ) -> int:
        """Record a request before anything is done about it; returns its number."""
        request = self._ledger.request_count + 1
        known = self._ledger.reference(reference)
        record: Record = {
            "type": "received",
            "t": self._now(),
            "run": self._journal.run,
            "request": request,
            "method": method,
            "kind": kind,
            "reference": reference,
            "connection": connection.connection_id,
        }
        if send is not None:
            record |= {
                "amount_minor": send.amount_minor,
                "currency": send.currency,
                "account": send.account,
                "payment_id": send.payment_id,
                "token": send.token,
                "target_transaction_id": send.target_transaction_id,
                "target_reference": send.target_reference,
                "deduplicated": deduplicated,
                "canceled_before": known is not None and known.canceled is not None,
                "method_type": send.method,
            }
        self._ledger.apply(record)
        self._journal.append(record)
        await self._journal.durable()
        return request

    # --- faults -----------------------------------------------------------------------------------

    async def _unavailable(self, connection: Peer) -> Reply | None:
        if self._mode == "hang":
            return await self._fail(connection, Fault.HANG_BEFORE)
        if self._mode == "reset":
            return await self._fail(connection, Fault.RESET_BEFORE)
        return _json(503, {"error": "unavailable"})

    async def _fail(self, connection: Peer, fault: Fault) -> Reply | None:
        if fault in (Fault.ERROR_BEFORE, Fault.ERROR_AFTER):
            return _json(500, {"error": "internal"})
        if fault not in (Fault.RESET_BEFORE, Fault.RESET_AFTER):
            await asyncio.wait([connection.gone], timeout=HANG_S_MAX)
        connection.abort()
        return None

    async def _answer(self, connection: Peer, fault: Fault, answer: dict[str, Any]) -> Reply | None:
        match fault:
            case Fault.NONE:
                return _json(200, answer)
            case Fault.GARBAGE:
                return Reply(200, b"<html><body>Service temporarily approved")
            case Fault.OVERSIZED:
                return _json(200, {**answer, "message": "x" * OVERSIZED_BYTES})
            case Fault.WRONG_REFERENCE:
                return _json(200, {**answer, "reference": "op_of_another_request-1"})
            case Fault.WRONG_CURRENCY:
                other = "JPY" if answer.get("currency") == "XAF" else "XAF"
                return _json(200, {**answer, "currency": other})
            case _:
                return await self._fail(connection, fault)

    # --- control ----------------------------------------------------------------------------------

    async def _hold(self, point: str, method: str, kind: str, reference: str) -> None:
        matching = any(
            hold.point == point
            and hold.method == method
            and hold.kind in ("", kind)
            and reference.startswith(hold.reference_prefix)
            for hold in self._holds
        )
        if not matching:
            return
        held = _Held(reference, kind, point, asyncio.get_running_loop().create_future())
        self._held.append(held)
        self._held_changed.set()
        try:
            await held.released
        finally:
            self._held.remove(held)

    async def _control(self, action: str, body: dict[str, Any]) -> Reply:
        actions: dict[str, Callable[[dict[str, Any]], None]] = {
            "hold": self._add_hold,
            "release": self._release,
            "latency": self._set_latency,
            "mode": self._set_mode,
            "advance_clock": self._advance_clock,
            "close_idle": self._close_idle,
            "state": lambda _: None,
            "reset_lateness": self._reset_lateness,
        }
        if action == "await_held":
            await self._await_held(_integer(body, "count"))
        elif action == "notify":
            await self.notifier.set(_notifying(body))
        elif action == "operate":
            return _json(200, {"answer": await self._operate(body)})
        elif action == "dispute":
            self._dispute(body)
        elif action in actions:
            actions[action](body)
        else:
            return _json(404, {"error": "no_such_control"})
        return _json(200, self._state())

    async def _operate(self, body: dict[str, Any]) -> dict[str, Any]:
        """What somebody does in the PSP's console: a refund, capture or void that the gateway did
        not ask for, of the authorization with a reference.
        """
        kind, payment = _text(body, "kind"), self._authorization(body)
        if kind not in ("capture", "refund", "void"):
            raise _BadRequest("kind must be capture, refund or void")
        send = Send(
            kind=kind,
            reference=f"console-{self._ledger.request_count + 1}",
            amount_minor=0 if kind == "void" else _integer(body, "amount_minor"),
            currency=payment.currency,
            account=payment.account,
            payment_id=payment.payment_id,
            target_transaction_id=payment.transaction_id,
        )
        request = await self._received(_Console("console"), "send", kind, send.reference, send)
        return await self._decide(send, APPROVE, request, self._now())

    def _dispute(self, body: dict[str, Any]) -> None:
        """A customer disputes a payment, or the dispute goes on. It moves nothing in the books."""
        payment = self._authorization(body)
        dispute_id = _text(body, "id") or f"dispute_{payment.transaction_id}"
        stage = _text(body, "stage") or "ACTIVE_DISPUTE"
        status = _text(body, "status") or "OPENED"
        self.notifier.tell(
            payment.account,
            {
                "id": f"evt_{dispute_id}_{stage}_{status}",
                "type": f"dispute.{status.lower()}",
                "created_at": self._now(),
                "payment_transaction_id": payment.authorization_id,
                "payment_reference": payment.reference,
                "amount_minor": _integer(body, "amount_minor"),
                "currency": payment.currency,
                "dispute": {
                    "id": dispute_id,
                    "stage": stage,
                    "status": status,
                    "reason": _text(body, "reason"),
                },
            },
        )

    def _authorization(self, body: dict[str, Any]) -> Transaction:
        """The authorization that a reference names."""
        known = self._ledger.reference(_text(body, "reference"))
        if known is None or known.kind != "authorize" or not known.transactions:
            raise _BadRequest("reference must be that of an authorization")
        return known.transactions[-1]

    def _add_hold(self, body: dict[str, Any]) -> None:
        hold = _Hold(
            point=_text(body, "point") or "before_effect",
            method=_text(body, "method") or "send",
            kind=_text(body, "kind"),
            reference_prefix=_text(body, "reference_prefix"),
        )
        if hold.point not in ("before_effect", "before_answer"):
            raise _BadRequest("point must be before_effect or before_answer")
        if len(self._holds) >= HOLDS_MAX:
            raise _BadRequest("too many holds")
        self._holds.append(hold)

    async def _await_held(self, count: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONTROL_WAIT_S_MAX):
                while len(self._held) < count:
                    self._held_changed.clear()
                    await self._held_changed.wait()

    def _release(self, body: dict[str, Any]) -> None:
        reference = _text(body, "reference")
        if not reference:
            self._holds.clear()
        for held in self._held:
            if reference in ("", held.reference) and not held.released.done():
                held.released.set_result(None)

    def _set_latency(self, body: dict[str, Any]) -> None:
        try:
            self._latency = Latency(float(body["p50_ms"]), float(body["p99_ms"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _BadRequest("p50_ms and p99_ms must be a latency") from error

    def _set_mode(self, body: dict[str, Any]) -> None:
        mode = _text(body, "mode")
        if mode not in ("up", "down", "hang", "reset"):
            raise _BadRequest("mode must be up, down, hang or reset")
        self._mode = mode

    def _advance_clock(self, body: dict[str, Any]) -> None:
        self._clock_ahead_s += _integer(body, "seconds")

    def _close_idle(self, _: dict[str, Any]) -> None:
        for connection in list(self._connections):
            if not connection.busy and connection.transport is not None:
                connection.transport.close()

    def _reset_lateness(self, _: dict[str, Any]) -> None:
        self._lateness = Lateness()

    def _state(self) -> dict[str, Any]:
        return {
            "journal": str(self._journal.path),
            "mode": self._mode,
            "requests": self._ledger.request_count,
            "in_flight": sum(connection.busy for connection in self._connections),
            "connections": len(self._connections),
            "lateness": self._lateness.summary(),
            "notifications": {
                "waiting": self.notifier.waiting,
                "told": self.notifier.told,
                "dropped": self.notifier.dropped,
            },
            "held": [
                {"reference": held.reference, "kind": held.kind, "point": held.point}
                for held in self._held
                if not held.released.done()
            ],
        }

    def _now(self) -> float:
        return time.time() + self._clock_ahead_s


async def _sleep_until(at: float) -> None:
    """Until a time of the monotonic clock; at once where it has passed."""
    left_s = at - time.monotonic()
    if left_s > 0:
        await asyncio.sleep(left_s)


# --- requests -------------------------------------------------------------------------------------


def _object(body: bytes) -> dict[str, Any]:
    value = orjson.loads(body)
    if not isinstance(value, dict):
        raise _BadRequest("the body must be a JSON object")
    return value


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > 256:
        raise _BadRequest(f"{name} must be a short text")
    return value


def _integer(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= AMOUNT_MINOR_MAX:
        raise _BadRequest(f"{name} must be an integer from 0 to {AMOUNT_MINOR_MAX}")
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise _BadRequest(f"{name} must be true or false")
    return value


def _reference(text: str) -> str:
    if _REFERENCE.fullmatch(text) is None:
        raise _BadRequest("reference must be 1 to 128 letters, digits or _ . : -")
    return text


def _notifying(body: dict[str, Any]) -> Notifying | None:
    """None where no address is given."""
    if not _text(body, "url"):
        return None
    try:
        return Notifying(
            url=_text(body, "url"),
            secret=_text(body, "secret"),
            delay=Latency(float(body.get("p50_ms", 0)), float(body.get("p99_ms", 0))),
            duplicate_percent=_integer({"duplicate_percent": 0} | body, "duplicate_percent"),
        )
    except (TypeError, ValueError) as error:
        raise _BadRequest(str(error)) from None


def _parse_send(kind: str, data: bytes) -> Send:
    body = _object(data)
    currency = _text(body, "currency")
    if _CURRENCY.fullmatch(currency) is None:
        raise _BadRequest("currency must be an ISO 4217 alphabetic code")
    amount_minor = _integer(body, "amount_minor")
    if (amount_minor == 0) != (kind == "verify") and kind not in ("void", "reversal"):
        raise _BadRequest("amount_minor must be 0 for a verification, and above 0 otherwise")
    fields = body.get("fields", {})
    if not isinstance(fields, dict) or not fields.keys() <= FIELDS:
        raise _BadRequest("fields has one that this PSP does not know")
    address = fields.get("billing_address")
    avs_code = ""
    if isinstance(address, dict):
        match = _AVS_POSTAL_CODE.fullmatch(str(address.get("postal_code", "")))
        avs_code = match[1] if match is not None else "Y"
    return Send(
        kind=kind,
        reference=_reference(_text(body, "reference")),
        amount_minor=amount_minor,
        currency=currency,
        account=_text(body, "account"),
        payment_id=_text(body, "payment_id"),
        token=_token(body),
        capture=_flag(body, "capture"),
        final=_flag(body, "final"),
        target_transaction_id=_text(body, "target_transaction_id"),
        target_reference=_text(body, "target_reference"),
        avs_code=avs_code,
        method=_method(body),
        return_url=_return_url(fields),
    )


def _token(body: dict[str, Any]) -> str:
    """The token; for a network token what stands for all of them, so that none is kept."""
    network_token = body.get("network_token")
    if network_token is None:
        return _text(body, "token")
    number = network_token.get("number") if isinstance(network_token, dict) else None
    if not isinstance(number, str) or _NETWORK_TOKEN.fullmatch(number) is None:
        raise _BadRequest("network_token must have a number of 12 to 19 digits")
    if not network_token.get("cryptogram"):
        raise _BadRequest("network_token must have a cryptogram")
    return NETWORK_TOKEN_TOKEN


def _method(body: dict[str, Any]) -> str:
    method = _text(body, "method")
    if method and _METHOD.fullmatch(method) is None:
        raise _BadRequest("method must be the name of a payment method")
    return method


def _return_url(fields: dict[str, Any]) -> str:
    url = fields.get("return_url", "")
    if url and (not isinstance(url, str) or _RETURN_URL.fullmatch(url) is None):
        raise _BadRequest("return_url must be an https address")
    return str(url)


def _profile_json(profile: Profile) -> dict[str, Any]:
    return {
        "profile": profile.name,
        "idempotent_by_reference": profile.idempotent_by_reference,
        "key_validity_s": profile.key_validity_s,
        "query_by_reference": profile.query_by_reference,
        "cancel_by_reference": profile.cancel_by_reference,
    }


# --- the process ----------------------------------------------------------------------------------


async def serve(options: Options, announce: Callable[[str], object] | None = None) -> None:
    """Run a simulator until SIGTERM or SIGINT.

    `announce` gets one line of JSON with `url`, `profile`, `journal` and `pid` when it listens; by
    default it is written to standard output. Raises UnknownProfile, JournalError, and OSError where
    it cannot listen.
    """
    profile = find_profile(options.profile)
    if options.exit_with_parent:
        _exit_with_parent()
    _allow_connections()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    journal, records = Journal.open(options.journal)
    ledger = Ledger(profile, records)
    del records
    journal.append(
        {
            "type": "start",
            "t": time.time(),
            "journal_version": JOURNAL_VERSION,
            "journal_id": ledger.journal_id,
            "run": journal.run,
            "profile": profile.name,
            "seed": options.seed,
        }
    )
    await journal.durable()
    simulator = Simulator(
        journal,
        ledger,
        latency=options.latency,
        source=random.Random(options.seed),
    )
    await simulator.notifier.set(options.notifying)
    stack = contextlib.AsyncExitStack()
    try:
        server = await _listen(lambda: _Connection(simulator), options.host, options.port)
        line: dict[str, object] = {
            "url": f"http://{_authority(server)}",
            "profile": profile.name,
            "journal": str(journal.path),
            "pid": os.getpid(),
        }
        if options.iso8583 is not None:
            line["iso8583"] = await _listen_iso8583(options, simulator, ledger, stack)
        (announce or _announce)(orjson.dumps(line).decode())
        await stopped.wait()
        server.close()
    finally:
        await stack.aclose()
        await simulator.close()


async def _listen(
    connection: Callable[[], asyncio.Protocol], host: str, port: int
) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    both = every_address(host, port, backlog=BACKLOG)
    if both is not None:
        return await loop.create_server(connection, sock=both, backlog=BACKLOG)
    return await loop.create_server(connection, host, port, backlog=BACKLOG)


def _authority(server: asyncio.Server) -> str:
    host, port = server.sockets[0].getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _listen_iso8583(
    options: Options, simulator: Simulator, ledger: Ledger, stack: contextlib.AsyncExitStack
) -> str:
    """Listen for ISO 8583 too; the address as the gateway's settings take it."""
    from gateway.connectors.iso8583.specification import load_specification  # noqa: PLC0415
    from gateway.connectors.simulator.iso8583 import Iso8583Front  # noqa: PLC0415 - as it is here

    assert options.iso8583 is not None
    specification = load_specification(options.iso8583_specification)
    front = Iso8583Front(simulator, ledger, specification)
    server = await asyncio.get_running_loop().create_server(front.accept, *options.iso8583)
    stack.callback(front.close)
    stack.callback(server.close)
    query = urlencode({"specification": options.iso8583_specification, "mode": "test"})
    return f"tcp://{_authority(server)}?{query}"


def _allow_connections() -> None:
    """Raise the limit of open files as far as it may: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS_MAX
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _exit_with_parent() -> None:
    """Have the kernel send SIGTERM when the thread that launched this process ends (Linux)."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(0)  # it died before the request was in force


def _listen_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError("must be HOST:PORT")
    return host.strip("[]"), int(port)


def _latency(text: str) -> Latency:
    try:
        return Latency.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="simulator", description="A payment service provider for tests, demos and load."
    )
    parser.add_argument(
        "--listen", type=_listen_address, default=("127.0.0.1", 0), metavar="HOST:PORT"
    )
    parser.add_argument("--journal", type=Path, required=True, metavar="FILE")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="idempotent")
    parser.add_argument(
        "--latency", type=_latency, default=Latency(), metavar="P50_MS,P99_MS", help="log-normal"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the latencies")
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="stop when the launching process ends"
    )
    parser.add_argument(
        "--iso8583",
        type=_listen_address,
        nargs="?",
        const=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="be an acquirer's host over TCP too",
    )
    parser.add_argument(
        "--iso8583-specification",
        default="reference-text",
        metavar="NAME|FILE.toml",
        help="what that host speaks",
    )
    parser.add_argument(
        "--notify", metavar="URL", help="tell what came of operations: the gateway's way in"
    )
    parser.add_argument(
        "--notify-secret-file",
        type=Path,
        metavar="FILE",
        help="holds one of the account's webhook_secrets, to sign with",
    )
    parser.add_argument(
        "--notify-delay",
        type=_latency,
        default=Latency(),
        metavar="P50_MS,P99_MS",
        help="log-normal, each notification's own",
    )
    parser.add_argument(
        "--notify-duplicates",
        type=int,
        default=0,
        metavar="PERCENT",
        help="of the notifications are sent twice",
    )
    arguments = parser.parse_args(argv)
    if (arguments.notify is None) != (arguments.notify_secret_file is None):
        parser.error("--notify and --notify-secret-file go together")
    try:
        options = _options(arguments)
        run(options)
    except (JournalError, OSError, ValueError) as error:
        sys.stderr.write(f"simulator: {error}\n")
        return 1
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    """Raises OSError and ValueError."""
    host, port = arguments.listen
    notifying = None
    if arguments.notify is not None:
        notifying = Notifying(
            arguments.notify,
            arguments.notify_secret_file.read_text("ascii").strip(),
            arguments.notify_delay,
            arguments.notify_duplicates,
        )
    return Options(
        journal=arguments.journal,
        profile=arguments.profile,
        host=host,
        port=port,
        latency=arguments.latency,
        seed=arguments.seed,
        exit_with_parent=arguments.exit_with_parent,
        iso8583=arguments.iso8583,
        iso8583_specification=arguments.iso8583_specification,
        notifying=notifying,
    )


def run(options: Options, announce: Callable[[str], object] | None = None) -> None:
    """Run `serve` on an event loop of its own; raises as it does."""
    import uvloop  # noqa: PLC0415 only the process needs it

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options, announce))
