"""Continues paused processes when whoever paused them has died: a program of its own.

Usage: python -I -S _guard.py PID

PID is the main process of a server, which is continued after all its children.

It reads its standard input, which ends with the last process that holds the other end. What the
kernel sent the paused ones meanwhile, because their parent died, takes effect then: a stopped
process acts on no signal but SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.stdin.buffer.read()
    server = sys.argv[1]
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is no process
            parent = (entry / "stat").read_text("ascii", "replace").rpartition(")")[2].split()[1]
            if parent == server:
                os.kill(int(entry.name), signal.SIGCONT)
    with contextlib.suppress(OSError):
        os.kill(int(server), signal.SIGCONT)
