"""Gateways, their workers and simulators forked from a process that has imported them once: a start
is most of a short test.

Run as a process, it is the nursery: it forks a child for every request that comes over its socket.
`Nursery` is the test's side.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SERVE: Final = "tests.nursery:serve"
"""`gateway serve`, as what a child is to run."""
COMMAND: Final = "tests.nursery:command"
"""`gateway` with arguments, the same."""
SIMULATE: Final = "tests.nursery:simulate"
"""The PSP simulator with arguments, the same."""
WORK: Final = "tests.nursery:work"
"""`gateway worker`, the same."""
END_TIMEOUT_S: Final = 60.0
REQUEST_BYTES_MAX: Final = 64 * 1024
FDS_MAX: Final = 4

_PR_SET_PDEATHSIG: Final = 1


class ForkedProcess:
    """A child of the nursery, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, nursery: Nursery, pid: int, stderr: int | None, alive: int) -> None:
        self.pid = pid
        self.stderr = None if stderr is None else os.fdopen(stderr, "rb")
        self._nursery = nursery
        self._alive = os.fdopen(alive, "rb")
        self._lock = threading.Lock()
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. Raises subprocess.TimeoutExpired."""
        status = self._wait(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(["gateway"], timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal; harmless where it has ended."""
        with self._lock:
            # Until it is reaped it is at least a zombie, and its pid nobody else's.
            if self._status is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout_s: float | None) -> int | None:
        if self._status is None and self._ended(timeout_s):
            with self._lock:
                if self._status is None:
                    self._status = self._nursery.reap(self.pid)
                    self._alive.close()
        return self._status

    def _ended(self, timeout_s: float | None) -> bool:
        """Whether the pipe that the child alone holds open is closed."""
        poll = select.poll()
        poll.register(self._alive, select.POLLHUP)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


class Nursery:
    """The process that forks; it ends, with its children, at the end of `open`."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def open(cls, environment: Mapping[str, str] | None = None) -> Iterator[Nursery]:
        """Start one, with more in its environment."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=inherited_environment() | dict(environment or {}),
                cwd=Path(__file__).resolve().parents[1],
                start_new_session=True,
            )
            theirs.close()
            try:
                yield cls(ours)
            finally:
                ours.close()  # which ends it
                process.wait(END_TIMEOUT_S)

    def fork(
        self,
        target: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
        stderr: int | None = None,
        passed: int | None = None,
        directory: Path | None = None,
    ) -> ForkedProcess:
        """A child that runs the function `target`, as `module:name`, with these arguments.

        Its standard output goes to the file descriptor `stdout`, or nowhere; its standard error to
        `stderr`, or into the pipe of that name that the process has here. It gets the descriptor
        `passed`, whose number there is its last argument.
        """
        request = {
            "target": target,
            "arguments": arguments,
            "environment": dict(environment),
            "directory": None if directory is None else str(directory),
            "stdout": stdout is not None,
        }
        told, stderr_of_child = os.pipe() if stderr is None else (None, os.dup(stderr))
        alive, alive_of_child = os.pipe()
        fds = [stderr_of_child, alive_of_child]
        fds += [each for each in (stdout, passed) if each is not None]
        try:
            pid = self._ask(request, fds)
        finally:
            os.close(stderr_of_child)
            os.close(alive_of_child)
        return ForkedProcess(self, pid, told, alive)

    def run(
        self, arguments: tuple[str, ...], environment: Mapping[str, str], directory: Path
    ) -> subprocess.CompletedProcess[str]:
        """`gateway` with these arguments, in a directory, to its end."""
        with tempfile.TemporaryFile("w+") as stdout:
            process = self.fork(
                COMMAND, arguments, environment, stdout=stdout.fileno(), directory=directory
            )
            assert process.stderr is not None
            with process.stderr:
                told = process.stderr.read().decode()
            status = process.wait(END_TIMEOUT_S)
            stdout.seek(0)
            return subprocess.CompletedProcess(("gateway", *arguments), status, stdout.read(), told)

    def reap(self, pid: int) -> int:
        """The exit status of a child that has ended."""
        return os.waitstatus_to_exitcode(self._ask({"reap": pid}))

    def _ask(self, request: dict[str, Any], fds: list[int] | None = None) -> int:
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(request).encode()], fds or [])
            answer = self._channel.recv(REQUEST_BYTES_MAX)
        assert answer, "the nursery is gone"
        return int(answer)


_nursery: Nursery | None = None


@contextmanager
def forking(nursery: Nursery) -> Iterator[None]:
    """For as long as the context lasts, gateways and simulators are forked, which takes a tenth of
    the time.
    """
    global _nursery  # noqa: PLW0603 - every test of a directory starts its processes so, or none
    outer, _nursery = _nursery, nursery
    try:
        yield
    finally:
        _nursery = outer


def current() -> Nursery | None:
    """That of `forking`; None outside of it."""
    return _nursery


def inherited_environment() -> dict[str, str]:
    """Ours, without the gateway's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}


# --- the nursery's side ---------------------------------------------------------------------------


_siblings: Nursery | None = None
"""What a child has forked beside it."""


def serve() -> None:
    """`gateway serve`, its workers forked like itself."""
    from gateway import workers  # noqa: PLC0415 - the test's side needs none of it
    from gateway.cli import main  # noqa: PLC0415 - as above

    workers.execute = _fork_worker
    main(["serve"])


class _ForkedWorker:
    """A sibling as the supervisor's child."""

    def __init__(self, process: ForkedProcess) -> None:
        self._process = process
        self.pid = process.pid

    def send_signal(self, number: int) -> None:
        """Harmless where it has ended."""
        self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait for the exit status."""
        return await asyncio.to_thread(self._process.wait)


async def _fork_worker(channel: int) -> _ForkedWorker:
    assert _siblings is not None
    return _ForkedWorker(_siblings.fork(WORK, (), {}, stderr=2, passed=channel))


def work(channel: str) -> None:
    """`gateway worker`."""
    from gateway.cli import main  # noqa: PLC0415 - as above

    main(["worker", channel])


def command(*arguments: str) -> None:
    """`gateway` with these arguments."""
    from gateway.cli import main  # noqa: PLC0415 - as above

    main(list(arguments), prog_name="gateway")


def simulate(*arguments: str) -> None:
    """The PSP simulator with these arguments."""
    from gateway.connectors.simulator.server import main  # noqa: PLC0415 - as above

    sys.exit(main(arguments))


def _serve_nursery(channel: socket.socket) -> None:
    import gateway.cli  # noqa: PLC0415 - what the children need is imported once
    import gateway.composition  # noqa: PLC0415 - the same
    import gateway.connectors.simulator.server  # noqa: F401, PLC0415 - the same
    from gateway.connectors.http import public_tls_context  # noqa: PLC0415
    from gateway.rpc import admin, events, routing, validation  # noqa: PLC0415

    validation.warm((*admin.REQUEST_TYPES, *routing.REQUEST_TYPES, *events.REQUEST_TYPES))
    public_tls_context()
    gc.collect()
    gc.freeze()  # or a child's first collection would copy every page
    channels = {channel.fileno(): channel}
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while channel.fileno() in channels:
        for number, _ in poll.poll():
            asking = channels[number]
            message, fds, _, _ = socket.recv_fds(asking, REQUEST_BYTES_MAX, FDS_MAX)
            if not message:
                poll.unregister(number)
                del channels[number]
                asking.close()
                continue
            request = json.loads(message)
            if "reap" in request:
                _, answer = os.waitpid(request["reap"], 0)
            else:
                answer, another = _fork(request, fds, list(channels.values()))
                channels[another.fileno()] = another
                poll.register(another, select.POLLIN)
            with contextlib.suppress(BrokenPipeError):  # a child that has been killed meanwhile
                asking.send(str(answer).encode())


def _fork(
    request: dict[str, Any], fds: list[int], channels: Sequence[socket.socket]
) -> tuple[int, socket.socket]:
    """A child's pid, and the channel over which it may ask as well."""
    parent = os.getpid()
    with contextlib.suppress(Exception):  # the child fails alike, and tells
        importlib.import_module(request["target"].partition(":")[0])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        for each in (ours, *channels):
            each.close()
        _run(request, fds, parent, theirs)
    theirs.close()
    for fd in fds:
        os.close(fd)
    return pid, ours


def _run(request: dict[str, Any], fds: list[int], parent: int, channel: socket.socket) -> None:
    """Be the child. Does not return."""
    import tests.nursery  # noqa: PLC0415 - this module runs under another name here

    tests.nursery._siblings = tests.nursery.Nursery(channel)
    atexit._clear()  # what the nursery itself does at its end
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        if os.getppid() == parent:
            stderr, _, *others = fds  # the second one tells by its end that we have ended
            stdout = [others.pop(0)] if request["stdout"] else []
            for fd, number in ((stderr, 2), *((each, 1) for each in stdout)):
                os.dup2(fd, number)
                os.close(fd)
            if request["directory"] is not None:
                os.chdir(request["directory"])
            os.environ.update(request["environment"])
            module, _, name = request["target"].partition(":")
            arguments = [*request["arguments"], *map(str, others)]
            getattr(importlib.import_module(module), name)(*arguments)
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a fork must never go back into the nursery's loop
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # the log's last lines are written then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as nursery_channel:
        _serve_nursery(nursery_channel)
