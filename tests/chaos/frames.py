"""Unary gRPC calls as bare HTTP/2 frames, many at once on a connection: a million are affordable.

Just enough of RFC 9113 and RFC 7541 for a client that trusts nothing and forgets each call at once:
of an answer it looks at `grpc-status` alone.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Final, cast

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    *(0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8),
    0x9,
)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
CANCEL: Final = struct.pack(">I", 8)

HEAD_BYTES: Final = 9
WINDOW_BYTES: Final = 65_535
"""What either side may send on a connection before it is told more; RFC 9113, 6.9.2."""
WINDOW_BYTES_MAX: Final = 2**31 - 1
WINDOW_RENEWED_BYTES: Final = 2**24
STREAM_MAX: Final = 2**31 - 1

CUT: Final = "CUT"
"""What a call is counted as whose connection ended before its answer."""
NO_STATUS: Final = "(no status)"

Call = tuple[bytes, bytes]
"""The block of a call's headers, and its message."""

_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
_HUFFMAN: Final = {
    # RFC 7541, appendix B: a character's code and how many bits it has.
    "0": (0x0, 5),
    "1": (0x1, 5),
    "2": (0x2, 5),
    "3": (0x19, 6),
    "4": (0x1A, 6),
    "5": (0x1B, 6),
    "6": (0x1C, 6),
    "7": (0x1D, 6),
    "8": (0x1E, 6),
    "9": (0x1F, 6),
    "a": (0x3, 5),
    "c": (0x4, 5),
    "g": (0x26, 6),
    "p": (0x2B, 6),
    "r": (0x2C, 6),
    "s": (0x8, 5),
    "t": (0x9, 5),
    "u": (0x2D, 6),
    "-": (0x16, 6),
}


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def header_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Headers, each a literal without indexing of at most 126 bytes (RFC 7541, 6.2.2)."""
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields
    )


def call_headers(path: str, api_key: str, timeout_s: int) -> bytes:
    """The headers of a unary call."""
    return header_block(
        (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "gateway"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", f"{timeout_s}S"),
            ("authorization", f"Bearer {api_key}"),
        )
    )


def _packed(text: str) -> bytes:
    """By Huffman's code, with its length before it."""
    bits = "".join(format(code, f"0{count}b") for code, count in map(_HUFFMAN.__getitem__, text))
    bits += "1" * (-len(bits) % 8)
    return bytes([0x80 | len(bits) // 8]) + int(bits, 2).to_bytes(len(bits) // 8, "big")


_STATUS: Final = tuple(
    (name, value, _NAMES[number])
    for name in (b"\x0bgrpc-status", _packed("grpc-status"))
    for number in _NAMES
    for value in (bytes([len(str(number))]) + str(number).encode(), _packed(str(number)))
)


def status_of(block: bytes) -> str:
    """The gRPC status in a block of headers that refers to no table: we allow the server none."""
    for name in (_STATUS[0][0], _STATUS[-1][0]):
        at = block.find(name)
        if at >= 0:
            rest = at + len(name)
            for named, value, status in _STATUS:
                if named is name and block.startswith(value, rest):
                    return status
    return NO_STATUS


class Connection(asyncio.Protocol):
    """One connection with up to `at_once` calls under way, until `next_call` has no more."""

    def __init__(
        self,
        next_call: Callable[[], Call | None],
        count: Callable[[str], None],
        at_once: int,
    ) -> None:
        self._next_call = next_call
        self._count = count
        self._at_once = at_once
        self._streams: dict[int, bytes] = {}
        """The calls under way, and what has come of their trailers."""
        self._stream = 1
        self._waiting: Call | None = None
        """One for which the window has no room."""
        self._window = WINDOW_BYTES
        self._received = 0
        self._buffer = b""
        self._refusing = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection is closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # No table of headers, no pushes, no bound on what a stream may answer.
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, WINDOW_BYTES_MAX)
        more = struct.pack(">I", WINDOW_BYTES_MAX - WINDOW_BYTES)
        self._transport.write(
            PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, more)
        )
        self._transport.write(b"".join(self._calls()))

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        at, replies = 0, []
        while len(data) - at >= HEAD_BYTES:
            end = at + HEAD_BYTES + int.from_bytes(data[at : at + 3], "big")
            if len(data) < end:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            replies.append(self._frame(kind, flags, stream, data[at + HEAD_BYTES : end]))
            at = end
        self._buffer = data[at:]
        replies += self._calls()
        self._transport.write(b"".join(replies))
        if not self._streams and self._waiting is None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for _ in self._streams:
            self._count(CUT)
        self._streams.clear()
        if not self.ended.done():
            self.ended.set_result(None)

    def _calls(self) -> Sequence[bytes]:
        """Begin as many calls as there is room for."""
        frames = []
        while len(self._streams) < self._at_once and self._stream < STREAM_MAX:
            if self._waiting is None:
                self._waiting = None if self._refusing else self._next_call()
            if self._waiting is None:
                break
            headers, message = self._waiting
            if len(message) + 5 > self._window:
                break
            self._waiting = None
            self._window -= len(message) + 5
            body = b"\x00" + len(message).to_bytes(4, "big") + message
            frames.append(frame(HEADERS, END_HEADERS, self._stream, headers))
            frames.append(frame(DATA, END_STREAM, self._stream, body))
            self._streams[self._stream] = b""
            self._stream += 2
        return frames

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        """Take a frame; what is to be sent because of it."""
        if kind in (HEADERS, CONTINUATION):
            assert not flags & (PADDED | PRIORITY), "no server that we know sends these"
            self._headers(kind, flags, stream, payload)
        elif kind == DATA:
            self._received += len(payload)
            if self._received >= WINDOW_RENEWED_BYTES:
                more, self._received = struct.pack(">I", self._received), 0
                return frame(WINDOW_UPDATE, 0, 0, more)
        elif kind == RST_STREAM:
            self._end(stream, f"RST {int.from_bytes(payload, 'big')}")
        elif kind in (SETTINGS, PING) and not flags & ACK:
            return frame(kind, ACK, 0, payload if kind == PING else b"")
        elif kind == WINDOW_UPDATE and not stream:
            self._window += int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            # What is under way is answered; further calls need another connection.
            self._refusing = True
        return b""

    def _headers(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if stream not in self._streams:
            return
        block = payload if kind == HEADERS else self._streams[stream] + payload
        self._streams[stream] = block
        # Of an answer's first headers and its trailers, the status is in the last ones.
        if flags & END_HEADERS and (kind == CONTINUATION or flags & END_STREAM):
            status = status_of(block)
            if status != NO_STATUS or flags & END_STREAM:
                self._end(stream, status)

    def _end(self, stream: int, outcome: str) -> None:
        if self._streams.pop(stream, None) is not None:
            self._count(outcome)
