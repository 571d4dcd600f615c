"""The process that sends for one Locust user: the engine on uvloop, without gevent.

A call costs half of what it does through gRPC's bridge to gevent, where a thread of a pool waits
for each, and is sent and timed more exactly, since nothing else runs in its interpreter.

It reads one line of JSON (`plan`, `address`, `share`) and writes frames: three lengths, then so
many bytes of JSON, of samples and of acknowledgements (`loadtest.samples`). When its input ends it
sends no more.
"""

import asyncio
import json
import os
import struct
import sys
import threading
from collections.abc import Iterator
from typing import IO, Final

import uvloop

from loadtest.engine import Chunk, Engine
from loadtest.plan import BadPlan, Plan

_LENGTHS: Final = struct.Struct("<III")


def frame_of(chunk: Chunk | str) -> bytes:
    """A chunk, or what went wrong, as a frame."""
    samples = acknowledged = b""
    head: dict[str, object]
    if isinstance(chunk, str):
        head = {"failure": chunk}
    else:
        samples, acknowledged = chunk.samples, chunk.acknowledged
        head = {
            "reasons": chunk.reasons,
            "in_flight": chunk.in_flight,
            "due": chunk.due,
            "elapsed_s": chunk.elapsed_s,
        }
    text = json.dumps(head).encode()
    return _LENGTHS.pack(len(text), len(samples), len(acknowledged)) + text + samples + acknowledged


def read_frames(file: IO[bytes]) -> Iterator[Chunk | str]:
    """The frames of a generator until it ends. A torn last one is left out."""
    while len(lengths := file.read(_LENGTHS.size)) == _LENGTHS.size:
        parts = [file.read(length) for length in _LENGTHS.unpack(lengths)]
        if [len(part) for part in parts] != list(_LENGTHS.unpack(lengths)):
            return
        head = json.loads(parts[0])
        yield head["failure"] if "failure" in head else Chunk(parts[1], parts[2], **head)


def main() -> int:
    """Send what standard input says; returns the exit status."""
    # Frames own the pipe: whatever else is printed goes to standard error.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def write(chunk: Chunk | str) -> None:
        out.write(frame_of(chunk))
        out.flush()

    told = json.loads(sys.stdin.buffer.readline())
    try:
        engine = Plan(**told["plan"]).engine(told["address"], told["share"])
        # A thread, since standard input may be a file or a terminal, which no event loop watches.
        threading.Thread(target=_stop_at_end, args=(engine,), daemon=True).start()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(engine.run(write))
    except (BadPlan, ConnectionError) as error:
        write(str(error))
        return 1
    return 0


def _stop_at_end(engine: Engine) -> None:
    # Not through sys.stdin, whose lock a thread may not hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    engine.stop()


if __name__ == "__main__":
    sys.exit(main())
