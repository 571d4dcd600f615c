"""What the embedded servers share: the lock of a data directory, starting, stopping, killing.

A server and everything it forks inherit one open file description that holds `flock` on the
directory's lock file. So the lock is held exactly as long as a process of that server lives,
also when its main process was killed and a child lingers, and no pid has to be believed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from storage.embedded._binaries import Binary, check_settings
from storage.embedded._errors import DataDirectoryInUseError, EmbeddedServerError, PortTakenError
from storage.embedded._process import (
    children_of,
    clean_environment,
    guard,
    is_alive,
    is_frozen,
    signal_each,
    write_private,
)

HOST = "127.0.0.1"

# Below Linux's ephemeral range (32768-60999): no outgoing connection takes the port between a
# server's end and its next start.
PORT_MIN = 20_000
PORT_MAX = 32_767
PORT_ATTEMPTS_MAX = 50

START_TIMEOUT_S = 60.0
"""Long enough to replay the whole write-ahead log of a crash on a slow disk."""
STOP_TIMEOUT_S = 30.0
ORPHAN_WAIT_S_MAX = 15.0
"""How long a start waits for a server whose launcher is dead: it is on its way out."""
FREEZE_TIMEOUT_S = 10.0
POLL_S = 0.003

LOG_BYTES_MAX = 10 * 1024 * 1024
LOG_TAIL_LINES = 20


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do: closed connections that linger on the port are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on now; raises PortTakenError if none is found."""
    choice = random.SystemRandom()  # never the seeded generator of a test run
    for _ in range(PORT_ATTEMPTS_MAX):
        port = choice.randint(PORT_MIN, PORT_MAX)
        if port_is_free(port):
            return port
    raise PortTakenError(f"No free port was found between {PORT_MIN} and {PORT_MAX} on {HOST}.")


class EmbeddedServer(ABC):
    """One server process in a directory of its own.

    Start it from the main thread: the kernel ends the server when the *thread* that launched it
    ends. Every method blocks; all of them raise EmbeddedServerError and nothing else.
    """

    title: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    """Stops the server in good order; also sent by the kernel when our process dies."""
    ready_line: ClassVar[str]
    """What it logs when it is ready. The port is never asked: another may listen there."""
    reserved_settings: ClassVar[frozenset[str]]
    """What the class itself promises; everything else may be set."""

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        """Nothing happens yet. Without a port, the first start chooses a free one and keeps it.

        Raises ValueError for a setting that is reserved or malformed.
        """
        self.data_dir = Path(data_dir).absolute()
        self.settings = dict(settings or {})
        check_settings(self.title, self.settings, self.reserved_settings)
        self._found: Binary | None = None
        self._port = port
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []
        self._guard: subprocess.Popen[bytes] | None = None
        """While paused: continues the server, should we die."""
        self._log_offset = 0

    @abstractmethod
    def _prepare(self, lock_fd: int) -> None:
        """Find the binary, create what the first start needs; the lock is held."""

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """The command line of the server."""

    def _on_ready(self) -> None:  # noqa: B027 (a hook, empty on purpose)
        """What remains to be done once the server is ready."""

    # -- what it is

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The main process of the running server."""
        return self._running_process().pid

    @property
    def port(self) -> int:
        if self._port is None:
            raise EmbeddedServerError(f"{self.title} has no port before its first start.")
        return self._port

    @property
    def log_path(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def _lock_path(self) -> Path:
        return self.data_dir / "lock"

    @property
    def _password_path(self) -> Path:
        return self.data_dir / "password"

    @property
    def password(self) -> str:
        """Random, made at the first start, kept in a file that only its owner reads."""
        try:
            return self._password_path.read_text(encoding="ascii").strip()
        except OSError as error:
            raise EmbeddedServerError(f"{self.title} has no password yet: {error}") from error

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise EmbeddedServerError(f"{self.title} in {self.data_dir} is not running.")
        return self._process

    @property
    def _binary(self) -> Binary:
        if self._found is None:
            raise EmbeddedServerError(f"{self.title}'s programs are known after its first start.")
        return self._found

    # -- start

    def start(self) -> None:
        """Return when the server accepts connections.

        Raises DataDirectoryInUseError, PortTakenError, BinaryUnavailableError, or their root
        EmbeddedServerError with the end of the server's log.
        """
        if not sys.platform.startswith("linux"):
            raise EmbeddedServerError(f"An embedded {self.title} runs on Linux only.")
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedServerError(f"Start {self.title} from the main thread: it ends with it.")
        if self.running:
            raise EmbeddedServerError(f"{self.title} in {self.data_dir} already runs.")
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = self._lock()
            try:
                self._prepare(lock_fd)
                self._launch_on_a_port(lock_fd)
            finally:
                os.close(lock_fd)  # the server's own copy keeps the lock
        except OSError as error:
            raise EmbeddedServerError(
                f"{self.title} could not start: {error}.\n"
                f"Its data directory is {self.data_dir}; this user must be able to write there."
            ) from error

    def _lock(self) -> int:
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _take(self, fd: int) -> None:
        deadline_s = time.monotonic() + ORPHAN_WAIT_S_MAX
        while not _try_lock(fd):
            server_pid, launcher_pid = self._read_holder(fd)
            in_use = is_alive(server_pid) and is_alive(launcher_pid)
            if in_use or time.monotonic() > deadline_s:
                raise DataDirectoryInUseError(
                    f"{self.data_dir} is in use by process {server_pid} "
                    f"({self.title}, started by process {launcher_pid}). Stop that one first, "
                    "or choose another data directory."
                )
            time.sleep(POLL_S)
        self._write_holder(fd, os.getpid())

    @staticmethod
    def _write_holder(fd: int, server_pid: int) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{server_pid} {os.getpid()}\n".encode("ascii"), 0)

    @staticmethod
    def _read_holder(fd: int) -> tuple[int, int]:
        try:
            server_pid, launcher_pid = os.pread(fd, 64, 0).split()
            return int(server_pid), int(launcher_pid)
        except ValueError:  # being written at this moment
            return 0, 0

    def _ensure_password(self) -> None:
        if not self._password_path.exists():
            write_private(self._password_path, secrets.token_urlsafe(24) + "\n")

    def _launch_on_a_port(self, lock_fd: int) -> None:
        if self._port is not None:
            self._launch(self._port, lock_fd)
            return
        for attempt in range(1, PORT_ATTEMPTS_MAX + 1):
            port = free_port()
            try:
                self._launch(port, lock_fd)
            except PortTakenError:
                if attempt == PORT_ATTEMPTS_MAX:
                    raise
                continue  # somebody was quicker
            self._port = port
            return

    def _launch(self, port: int, lock_fd: int) -> None:
        if not port_is_free(port):
            raise self._port_taken(port)
        self.limit_log()
        command = self._command(port)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with os.fdopen(os.open(self.log_path, flags, 0o600), "ab") as log:
            self._log_offset = log.seek(0, os.SEEK_END)
            self._forget_pause()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(),
                pass_fds=(lock_fd,),
                # Out of the terminal's reach: Ctrl-C is for us, who drain first.
                start_new_session=True,
            )
        try:
            self._write_holder(lock_fd, self._process.pid)
            self._await_ready(self._process, port)
            self._on_ready()
        except BaseException:
            self._kill_all()
            raise

    def limit_log(self) -> None:
        """Put a log aside that has grown too large; the server may be writing to it.

        It appends, and so goes on at the beginning. Lines of that moment may be lost. Raises
        OSError.
        """
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
            shutil.copy(self.log_path, self.log_path.with_name("server.log.1"))
            os.truncate(self.log_path, 0)

    def _port_taken(self, port: int) -> PortTakenError:
        return PortTakenError(
            f"{self.title} cannot listen on {HOST}:{port}: another process does. "
            "Stop that one, or choose another port."
        )

    def _await_ready(self, process: subprocess.Popen[bytes], port: int) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        while self.ready_line not in self._log_since_launch():
            if process.poll() is not None:
                if not port_is_free(port):
                    raise self._port_taken(port)
                raise self._failed_to_start(f"ended with status {process.returncode}")
            if time.monotonic() > deadline_s:
                raise self._failed_to_start(f"was not ready after {self._start_timeout_s:g} s")
            time.sleep(POLL_S)

    def _log_since_launch(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_offset)
            return log.read(LOG_BYTES_MAX).decode("utf-8", "replace")

    def _failed_to_start(self, how: str) -> EmbeddedServerError:
        tail = "\n".join(self._log_since_launch().splitlines()[-LOG_TAIL_LINES:])
        return EmbeddedServerError(
            f"{self.title} {how} while starting in {self.data_dir}. "
            f"The end of its log ({self.log_path}):\n{tail or '(nothing was logged)'}"
        )

    # -- stop, kill, pause

    def stop(self) -> None:
        """Stop in good order, open connections closed; kill what does not end in time."""
        if self._process is None or self._process.poll() is not None:
            return
        self.resume()
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and all its children; return when none is left."""
        self._kill_all()
        self._await_no_process()

    def restart(self) -> None:
        """Stop and start, on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the server and all its children, as a stalled machine would."""
        process = self._running_process()
        self.resume()
        self._guard = guard(process.pid)
        self._paused = self._freeze(process)
        signal_each(self._paused, signal.SIGSTOP)
        _await(
            lambda: all(map(is_frozen, self._paused)),
            FREEZE_TIMEOUT_S,
            f"{self.title} in {self.data_dir} could not be paused.",
        )

    def resume(self) -> None:
        if self.running:
            signal_each(self._paused, signal.SIGCONT)
        self._forget_pause()

    def _forget_pause(self) -> None:
        self._paused = []
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    def _kill_all(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        signal_each(self._freeze(process), signal.SIGKILL)
        process.wait()
        self._forget_pause()

    def _freeze(self, process: subprocess.Popen[bytes]) -> list[int]:
        """Stop the main process; return its pid and those of all its children.

        While it is stopped it neither forks nor reaps: the list stays whole and true.
        """
        process.send_signal(signal.SIGSTOP)
        _await(
            lambda: is_frozen(process.pid),
            FREEZE_TIMEOUT_S,
            f"{self.title} in {self.data_dir} (process {process.pid}) hangs in the kernel.",
        )
        return [process.pid, *children_of(process.pid)]

    def _await_no_process(self) -> None:
        """Until the last process that inherited the lock is gone."""
        if not self._lock_path.exists():
            return
        with self._lock_path.open("rb") as lock:
            _await(
                lambda: _try_lock(lock.fileno()),
                self._stop_timeout_s,
                f"Processes of {self.title} in {self.data_dir} survived its end.",
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _await(condition: Callable[[], bool], timeout_s: float, failure: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise EmbeddedServerError(failure)
        time.sleep(POLL_S)
