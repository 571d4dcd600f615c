"""Child processes of a load test or benchmark: started, waited for and surely ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

START_TIMEOUT_S: Final = 60.0
"""A server that does not serve by then hangs."""
STOP_TIMEOUT_S: Final = 45.0
"""A process that has not ended by then is killed. A gateway drains first."""
POLL_S: Final = 0.02
LOG_LINES_SHOWN: Final = 20

_PR_SET_PDEATHSIG: Final = 1
_WITH_PARENT: Final = (
    "import ctypes, os, sys;"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)});"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
"""Ends with the thread that started it, and becomes the program."""
INTERRUPTED: Final = 130
"""Exit status of what a person ended, by Ctrl-C or SIGTERM."""
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class ProcessFailed(Exception):
    """A process did not do what it was started for; the text says what it logged."""


class Process:
    """A child that ends with this process, however that ends. Its output goes to a file, its log;
    without one, where ours goes.

    It is in a session of its own: Ctrl-C is for us, who let servers drain. Of our environment it
    has everything but GATEWAY_* variables.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path | None
    ) -> None:
        self.name = name
        self._log = log
        with contextlib.ExitStack() as stack:
            output = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("wb"))
            started = False
            try:
                with _signals_held():
                    self._process = subprocess.Popen(
                        [sys.executable, "-ISc", _WITH_PARENT, *command],
                        env={**_inherited(), **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                    started = True
            except BaseException:
                if started:
                    self.stop()
                raise

    @classmethod
    def python(
        cls, name: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> Self:
        """A Python program of ours."""
        return cls(name, [sys.executable, *arguments], environment, folder / f"{name}.log")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def await_serving(self) -> str:
        """The address that it serves at, once it has logged it. Raises ProcessFailed."""
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            ended = not self.running
            for line in self.printed().splitlines():
                if '"message":"serving"' in line:
                    address: str = json.loads(line)["address"]
                    return address
            if ended:
                raise self.failure("ended before it served")
            time.sleep(POLL_S)
        raise self.failure("does not serve")

    def printed(self) -> str:
        """What it printed; nothing where it has no log."""
        return "" if self._log is None else self._log.read_text("utf-8", "replace")

    def lines_with(self, text: str) -> int:
        """How many lines of what it printed have a text."""
        if self._log is None:
            return 0
        with self._log.open(encoding="utf-8", errors="replace") as lines:
            return sum(text in line for line in lines)

    def forget_log(self) -> None:
        """Empty the log, so that a long run fills no disk."""
        if self._log is not None:
            os.truncate(self._log, 0)

    def failure(self, what: str) -> ProcessFailed:
        """What went wrong, with the end of the log."""
        lines = self.printed().splitlines()[-LOG_LINES_SHOWN:]
        return ProcessFailed("\n".join([f"{self.name} {what}", *lines]))

    def check(self) -> None:
        """Raises ProcessFailed where it has ended."""
        if not self.running:
            raise self.failure(f"ended with status {self._process.returncode}")

    def wait(self, timeout_s: float) -> None:
        """Wait for its end. Raises ProcessFailed where it takes too long or ends with a failure."""
        self.await_end(timeout_s)
        if (status := self._process.returncode) != 0:
            raise self.failure(f"ended with status {status}")

    def await_end(self, timeout_s: float) -> None:
        """Wait for its end, whatever its status. Raises ProcessFailed where it takes too long."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {timeout_s:g} s") from None

    def ask_to_end(self) -> None:
        """SIGTERM, without waiting. Harmless where it has ended."""
        self._process.terminate()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL. Harmless where it has ended."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def _signals_held() -> Iterator[None]:
    """A signal that ends us takes effect afterwards: while a child is being made, nobody could end
    it. Python hands signals to the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _: came.append(number))
        for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def interrupted_by_sigterm() -> None:
    """From now on SIGTERM does what Ctrl-C does: everything is stopped and told on the way out."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def stopping(process: Process) -> Iterator[Process]:
    """The process for as long as the context lasts."""
    try:
        yield process
    finally:
        process.stop()


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}


def cpu_s(pid: int) -> float:
    """The CPU time that a process and its living children have used, in seconds; see proc(5)."""
    total = 0.0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
        fields = stat[stat.rindex(")") + 2 :].split()
        total = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        for child in child_pids(pid):
            total += cpu_s(child)
    return total


def child_pids(pid: int) -> list[int]:
    """The children of a process, whichever of its threads started them; of one that is gone, none.

    psutil looks through all processes of the machine for that.
    """
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (thread / "children").read_text("utf-8").split())
    return found
