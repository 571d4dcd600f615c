"""Messages on a stream of bytes: a length, perhaps a header, the message. No I/O."""

from dataclasses import dataclass
from typing import Final, Literal

LENGTH_BYTES_MAX: Final = 8


class FrameError(Exception):
    """The stream holds no frame here, and where the next one begins is not known."""


@dataclass(frozen=True, slots=True)
class Framing:
    """How an acquirer's host puts messages on the stream."""

    length: Literal["binary", "ascii", "bcd"] = "binary"
    """A binary length is big-endian."""
    length_bytes: int = 2
    length_includes_itself: bool = False
    header: bytes = b""
    """Stands between the length and every message that is sent. As many bytes are passed over in
    what is received (a TPDU comes back with its addresses swapped)."""
    length_includes_header: bool = True
    """False for a header that is reserved bytes of the length's own, as two of zero."""
    frame_bytes_max: int = 8192
    """The longest frame, its header included, its length left out."""

    def pack(self, message: bytes) -> bytes:
        """A message as a frame. Raises FrameError for one that is too long."""
        size = len(self.header) + len(message)
        told = size + self._told_more
        if size > self.frame_bytes_max or told > self._length_max:
            raise FrameError("the message is too long")
        return self._encode(told) + self.header + message

    @property
    def _told_more(self) -> int:
        """What the length tells more than the bytes that follow it."""
        more = self.length_bytes if self.length_includes_itself else 0
        return more if self.length_includes_header else more - len(self.header)

    @property
    def _length_max(self) -> int:
        if self.length == "binary":
            return int(256**self.length_bytes) - 1
        return int(10 ** (self.length_bytes * (2 if self.length == "bcd" else 1))) - 1

    def _encode(self, size: int) -> bytes:
        if self.length == "binary":
            return size.to_bytes(self.length_bytes, "big")
        if self.length == "ascii":
            return f"{size:0{self.length_bytes}}".encode("ascii")
        return bytes.fromhex(f"{size:0{2 * self.length_bytes}}")

    def size_of(self, length: bytes) -> int:
        """How many bytes follow a length. Raises FrameError."""
        if self.length == "binary":
            told = int.from_bytes(length, "big")
        else:
            digits = length if self.length == "ascii" else length.hex().encode("ascii")
            if not digits.isdigit():
                raise FrameError("the length is no number")
            told = int(digits)
        size = told - self._told_more
        if not 0 <= size <= self.frame_bytes_max:
            raise FrameError("the length is out of bounds")
        return size


class FrameReader:
    """Takes bytes as they come and gives whole messages, without their headers."""

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now; an empty frame, which keeps a line alive, is none.

        Raises FrameError, after which the stream is of no use; messages that were whole before are
        given first, and the next call raises. At most one frame is kept beside `data`.
        """
        framing, buffer = self._framing, self._buffer
        buffer += data
        messages: list[bytes] = []
        at = 0
        while len(buffer) - at >= framing.length_bytes:
            begin = at + framing.length_bytes
            try:
                size = framing.size_of(bytes(buffer[at:begin]))
            except FrameError:
                if not messages:
                    raise
                break
            if len(buffer) - begin < size:
                break
            message = bytes(buffer[begin + len(framing.header) : begin + size])
            if message:
                messages.append(message)
            at = begin + size
        del buffer[:at]
        return messages
