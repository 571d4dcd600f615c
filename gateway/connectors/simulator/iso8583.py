"""The PSP simulator as an acquirer's host: ISO 8583 over TCP, on the same ledger and journal.

What goes wrong is chosen by the same tokens and amounts. What HTTP says by a status, a host says by
closing the connection, with all that is under way on it.
"""

import asyncio
import contextlib
import socket
from typing import Any, Final, cast

import orjson

from gateway.connectors.iso8583.currencies import ALPHABETIC_CODES, NUMERIC_CODES
from gateway.connectors.iso8583.framing import FrameError, FrameReader
from gateway.connectors.iso8583.identity import identity_of
from gateway.connectors.iso8583.specification import (
    Fields,
    MessageName,
    Specification,
    answer_mti,
)
from gateway.connectors.simulator.ledger import Ledger, Send
from gateway.connectors.simulator.server import LINGER_NOT, Reply, Simulator

LINES_MAX: Final = 1024
"""Connections at once; more are reset."""

_KINDS: Final[dict[MessageName, str]] = {
    "authorize": "authorize",
    "sale": "authorize",
    "verify": "verify",
    "capture": "capture",
    "capture_more": "capture",
    "void": "void",
    "refund": "refund",
    "increment": "increment",
}
_ECHOED: Final = ("3", "4", "7", "11", "12", "13", "37", "41", "42", "49")
_TOLD: Final = (
    "auth_code",
    "network_transaction_id",
    "avs_code",
    "cvv_code",
    "advice_code",
    "advice_scheme",
)
# DE 39 where the ledger names no code of a network's.
_CODES: Final = {
    "approved": "00",
    "declined": "14",
    "pending": "09",
    "requires_action": "1A",
    "rejected": "12",
    "failed": "05",
    "refused": "12",
    "canceled": "00",
}
_FORMAT_ERROR: Final = "30"
_NOT_LOCATED: Final = "25"
_NO_ACTION: Final = "21"


class Iso8583Front:
    """Takes connections; hand `accept` to the loop's `create_server`."""

    def __init__(self, simulator: Simulator, ledger: Ledger, specification: Specification) -> None:
        """Raises ValueError for a specification with other codes than the simulator has."""
        if _CODES["approved"] not in specification.approved:
            raise ValueError("the simulator answers with the codes of the edition of 1987")
        self.specification = specification
        self._simulator = simulator
        self._ledger = ledger
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        self._references: dict[tuple[str, ...], str] = {}
        """By terminal, STAN and transmission time: what reversals and follow-ups name."""
        for reference, transaction in ledger.decided():
            # The gateway's numbers follow from its reference, so a restart finds them again.
            with contextlib.suppress(ValueError):
                identity = identity_of(reference, specification.rrn_style)
                self._references[transaction.account, identity.stan, identity.time] = reference

    def accept(self) -> asyncio.Protocol:
        """A new connection's protocol."""
        self._count += 1
        return _Line(self, f"iso8583-{self._simulator.run}-{self._count}")

    def close(self) -> None:
        """Drop every connection and every message under way."""
        for task in self._tasks:
            task.cancel()
        for line in list(self._lines):
            line.abort()

    def connected(self, line: "_Line") -> None:
        """A connection was made."""
        self._lines.add(line)
        if len(self._lines) > LINES_MAX:
            line.abort()

    def disconnected(self, line: "_Line") -> None:
        """A connection is gone; what it asked for goes on."""
        self._lines.discard(line)

    def spawn(self, line: "_Line", request: Fields) -> None:
        """Handle a message in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._serve(line, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, line: "_Line", request: Fields) -> None:
        specification = self.specification
        name = specification.name_of(request)
        if name is None or not (request.get("4") or "0").isdecimal():
            line.send({**_echo(request), "39": _FORMAT_ERROR})
            return
        values = specification.values_of(name, request)
        own = _numbers(request.get("41", ""), values.get("stan"), values.get("transmission_time"))
        target = _numbers(
            request.get("41", ""), values.get("original_stan"), values.get("original_time")
        )
        if name == "reversal":
            reference = values.get("reference") or self._references.get(target) or "-".join(target)
            kind = self._kind_of(reference, values.get("original_mti", ""))
            reply = await self._simulator.cancel(line, kind, reference)
        else:
            reference = values.get("reference") or "-".join(own)
            send = self._send(name, request, values, reference, target)
            if send is None:
                line.send({**_echo(request), "39": _FORMAT_ERROR})
                return
            self._references[own] = reference
            reply = await self._simulator.send(line, send)
        if reply is not None:
            self._answer(line, request, reference, reply)

    def _send(
        self,
        name: MessageName,
        request: Fields,
        values: dict[str, str],
        reference: str,
        target: tuple[str, ...],
    ) -> Send | None:
        """The order in a request; None where it names no currency that there is."""
        known = self._ledger.reference(self._references.get(target, ""))
        transactions = [] if known is None else known.transactions
        currency = ALPHABETIC_CODES.get(request.get("49", ""))
        if currency is None and "49" not in request and transactions:
            currency = transactions[-1].currency
        if currency is None:
            return None
        remaining = values.get("remaining_amount") if name == "void" else None
        return Send(
            kind=_KINDS[name],
            reference=reference,
            amount_minor=int(request.get("4") or "0"),
            currency=currency,
            account=request.get("41", ""),
            payment_id=values.get("payment", ""),
            token=values.get("token", ""),
            capture=name == "sale",
            final=name == "capture",
            target_transaction_id=transactions[-1].transaction_id if transactions else "",
            remaining_minor=int(remaining) if remaining else None,
        )

    def _kind_of(self, reference: str, mti: str) -> str:
        known = self._ledger.reference(reference)
        if known is not None:
            return known.kind
        messages = self.specification.messages
        return next(
            (kind for name, kind in _KINDS.items() if _mti(messages, name) == mti), "verify"
        )

    def _answer(self, line: "_Line", request: Fields, reference: str, reply: Reply) -> None:
        specification = self.specification
        if reply.status >= 500:
            line.close()
            return
        if len(reply.body) > specification.framing.frame_bytes_max:
            line.write(b"\xff" * specification.framing.length_bytes + reply.body)
            return
        try:
            told: dict[str, Any] = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            line.write(specification.framing.pack(reply.body))
            return
        answer = _echo(request)
        result = told.get("result", "rejected")
        code = told.get("network_code") or _CODES.get(result, "12")
        if "had" in told:
            code = {"nothing": _NOT_LOCATED, "refusal": _NO_ACTION}.get(told["had"], code)
        answer["39"] = code if result != "refused" else _CODES[result]
        if told.get("reference", reference) != reference:
            answer["37"] = "0" * 12
        if "amount_minor" in told and result != "canceled":
            specification.write(answer, "amount", f"{told['amount_minor']:012}")
        if told.get("currency") in NUMERIC_CODES:
            answer["49"] = NUMERIC_CODES[told["currency"]]
        for name in _TOLD:
            specification.write(answer, name, told.get(name, ""))
        specification.write(answer, "reference", told.get("reference", ""))
        line.send(answer)


class _Line(asyncio.Protocol):
    """One connection. Many messages may be under way on it."""

    def __init__(self, front: Iso8583Front, connection_id: str) -> None:
        self.connection_id = connection_id
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._front = front
        self._reader = FrameReader(front.specification.framing)
        self._transport: asyncio.Transport | None = None
        self._signed_on = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._front.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 asyncio's signature
        if not self.gone.done():
            self.gone.set_result(None)
        self._front.disconnected(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(self._front.specification.decode(message))
        except (FrameError, ValueError):
            self.abort()

    def _take(self, request: Fields) -> None:
        specification = self._front.specification
        if request["t"] == "0800":
            self._signed_on = not specification.is_sign_off(request)
            self.send(specification.network_answer(request))
        elif request["t"][2] not in "02":
            pass  # an answer, to nothing that was asked
        elif self._signed_on:
            self._front.spawn(self, request)
        else:
            self.abort()

    def send(self, fields: Fields) -> None:
        """Write a message."""
        specification = self._front.specification
        self.write(specification.framing.pack(specification.encode(fields)))

    def write(self, data: bytes) -> None:
        """Write bytes as they are."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """End the connection in order."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Reset the connection (RST, where the system can)."""
        if self._transport is not None and not self._transport.is_closing():
            with contextlib.suppress(OSError):
                self._transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT
                )
            self._transport.abort()


def _numbers(terminal: str, stan: str | None, time: str | None) -> tuple[str, ...]:
    return (terminal, stan or "", time or "")


def _echo(request: Fields) -> Fields:
    answer: Fields = {"t": answer_mti(request["t"])}
    answer |= {number: request[number] for number in _ECHOED if number in request}
    return answer


def _mti(messages: Any, name: MessageName) -> str:
    message = messages.get(name)
    return "" if message is None else str(message.mti)
