"""An acquirer's host of another make: the edition of 1993 in EBCDIC, by a codec of its own.

Nothing of the gateway's is used here, so that what both sides have in common is the specification
`reference-1993` alone: as text here, as data there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CODEC = "cp500"
TPDU = bytes.fromhex("6000030000")
SWAPPED = bytes.fromhex("6000000003")
"""A TPDU comes back with its addresses swapped."""

FIXED = {
    3: 6,
    7: 10,
    11: 6,
    12: 12,
    22: 12,
    24: 3,
    25: 4,
    30: 24,
    37: 12,
    38: 6,
    39: 3,
    41: 8,
    42: 15,
    49: 3,
}
"""Characters of each element in EBCDIC."""
PACKED = {4: 12}
"""Digits, two to the byte."""
VARIABLE = {44: 2, 47: 3, 56: 2, 63: 3}
"""Digits of their length."""

Message = dict[int, str]
"""Element 0 is the type."""


def unpacked(data: bytes) -> Message:
    """A message from bytes; every byte of them is used."""
    message = {0: data[:4].decode(CODEC)}
    bits = int.from_bytes(data[4:12], "big")
    assert not bits >> 63, "no second bitmap is expected"
    at = 12
    for number in (n for n in range(2, 65) if bits >> (64 - n) & 1):
        if number in PACKED:
            size = PACKED[number] // 2
            message[number] = data[at : at + size].hex()
        elif number in FIXED:
            size = FIXED[number]
            message[number] = data[at : at + size].decode(CODEC)
        else:
            digits = VARIABLE[number]
            size = int(data[at : at + digits].decode(CODEC))
            at += digits
            message[number] = data[at : at + size].decode(CODEC)
        at += size
    assert at == len(data)
    return message


def packed(message: Message) -> bytes:
    """The reverse."""
    numbers = sorted(number for number in message if number)
    data = message[0].encode(CODEC)
    data += sum(1 << (64 - number) for number in numbers).to_bytes(8, "big")
    for number in numbers:
        text = message[number]
        if number in PACKED:
            data += bytes.fromhex(text.zfill(PACKED[number]))
        elif number in FIXED:
            data += text.ljust(FIXED[number]).encode(CODEC)
        else:
            data += f"{len(text):0{VARIABLE[number]}}{text}".encode(CODEC)
    return data


@dataclass
class Entry:
    """What one financial request did."""

    amount_minor: int
    follows: Entry | None = None
    sign: int = 1
    reversed: bool = False


@dataclass
class ForeignHost:
    """Its books, and how it answers."""

    seen: list[Message] = field(default_factory=list)
    entries: dict[tuple[str, str, str], Entry] = field(default_factory=dict)
    """By type, STAN and time, as DE 56 names them."""
    reversals: set[str] = field(default_factory=set)
    """What DE 56 of the reversals said that came."""
    answers: dict[tuple[str, str, str], Message] = field(default_factory=dict)
    mute: int = 0
    """So many requests that are not reversals are processed and not answered."""
    signed_on: bool = False
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def standing_minor(self) -> int:
        """What is held or taken, of all payments."""
        return sum(each.sign * each.amount_minor for each in self.entries.values() if each.sign)

    def take(self, message: Message) -> Message | None:
        """Process a message; None where it is not answered."""
        self.seen.append(message)
        kind = message[0][:3]
        if kind == "180":
            self.signed_on = message[24] != "802"
            return self._answer(message, "800")
        assert self.signed_on
        key = (message[0][:3] + "0", message[11], message[12])
        if key in self.answers:
            return self.answers[key]
        code = self._reverse(message) if kind == "142" else self._process(key, message)
        answer = self.answers[key] = self._answer(message, code)
        if kind != "142" and self.mute:
            self.mute -= 1
            return None
        return answer

    def _process(self, key: tuple[str, str, str], message: Message) -> str:
        named = "".join(key)
        amount_minor = int(message[4])
        if named in self.reversals:
            return "902"
        if 56 in message:
            original = self.entries[_key_of(message[56])]
            if key[0] == "1220":
                original.amount_minor -= amount_minor
                self.entries[key] = Entry(amount_minor, original)
            else:
                self.entries[key] = Entry(amount_minor, original, sign=-1)
            return "000"
        if message.get(47) == "tok_short":
            return "116"
        self.entries[key] = Entry(amount_minor)
        return "000"

    def _reverse(self, message: Message) -> str:
        self.reversals.add(message[56][:-2])
        entry = self.entries.get(_key_of(message[56]))
        if entry is None:
            return "914"
        if message[24] == "401":
            assert int(message[30][:12]) >= int(message[4])
            entry.amount_minor = int(message[4])
        else:
            entry.sign = 0
        return "400"

    def _answer(self, message: Message, code: str) -> Message:
        told = {0: f"{message[0][:2]}{int(message[0][2]) + 1}{int(message[0][3]) & ~1}", 39: code}
        told |= {n: message[n] for n in (3, 4, 7, 11, 12, 24, 41, 42, 49) if n in message}
        if message[0][1] != "8":
            number = next(self._numbers)
            told |= {37: f"H{number:011}", 38: f"Z{number:05}", 63: f"NET{number}"}
        return told


def _key_of(text: str) -> tuple[str, str, str]:
    return text[:4], text[4:10], text[10:22]


async def _serve(
    host: ForeignHost, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while True:
            size = int((await reader.readexactly(4)).decode("ascii"))
            data = await reader.readexactly(size)
            assert data[:5] == TPDU
            answer = host.take(unpacked(data[5:]))
            if answer is not None:
                frame = SWAPPED + packed(answer)
                writer.write(f"{len(frame):04}".encode("ascii") + frame)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


@asynccontextmanager
async def foreign_host() -> AsyncIterator[tuple[ForeignHost, int]]:
    """One for as long as the context lasts, and its port on 127.0.0.1."""
    host = ForeignHost()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.get_running_loop().create_task(_serve(host, reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield host, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # lets the transports go
        failed = [each for each in ended if isinstance(each, Exception)]
        assert not failed, failed
