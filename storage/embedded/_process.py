"""Processes and files of the embedded servers: launching, looking, signalling, writing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.embedded._errors import EmbeddedServerError

COMMAND_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Identity:
    """Who a server runs as."""

    launch: str
    """As `_launch` takes it: `self`, `userns` or `UID:GID`."""
    owner: tuple[int, int] | None = None
    """uid and gid that must own the server's files; None where that is ourselves."""


SELF = Identity("self")
USER_NAMESPACE = Identity("userns")


def other_user(uid: int, gid: int) -> Identity:
    return Identity(f"{uid}:{gid}", (uid, gid))


def launch_command(
    identity: Identity, directory: Path, death_signal: signal.Signals, command: Sequence[str | Path]
) -> list[str]:
    """The command line that runs `command` in `directory` as a child that dies with us."""
    if not sys.executable:
        raise EmbeddedServerError("The Python interpreter cannot tell its own path.")
    launcher = Path(__file__).with_name("_launch.py")
    how = (launcher, os.getpid(), int(death_signal), identity.launch, directory, *command)
    # Isolated and without site-packages: quick to start, deaf to PYTHON* variables.
    return [sys.executable, "-I", "-S", *map(str, how)]


def guard(pid: int) -> subprocess.Popen[bytes]:
    """A process that continues a paused server when we die; to be killed when that goes on."""
    program = Path(__file__).with_name("_guard.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", program, str(pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def clean_environment() -> dict[str, str]:
    """Ours, without what would redirect PostgreSQL's programs or translate their messages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def run_to_end(
    identity: Identity,
    directory: Path,
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    timeout_s: float = COMMAND_TIMEOUT_S,
    lock_fd: int | None = None,
) -> str:
    """Run a server's own tool and return what it printed; raises EmbeddedServerError."""
    try:
        done = subprocess.run(
            launch_command(identity, directory, signal.SIGKILL, command),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=clean_environment(),
            timeout=timeout_s,
            pass_fds=() if lock_fd is None else (lock_fd,),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EmbeddedServerError(f"{command[0]} did not end within {timeout_s:g} s.") from error
    if done.returncode != 0:
        output = done.stdout.strip() or f"it ended with status {done.returncode}"
        raise EmbeddedServerError(f"{command[0]} failed:\n{output}")
    return done.stdout


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and parent of a process, or None when there is none; see proc(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, parent, *_ = stat[stat.rindex(b")") + 2 :].split()  # the name may contain anything
    return state.decode(), int(parent)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and waits for its parent does not."""
    found = _stat(pid)
    return found is not None and found[0] not in "ZX"


def is_frozen(pid: int) -> bool:
    """Whether a process obeyed SIGSTOP, or is gone."""
    found = _stat(pid)
    return found is None or found[0] in "TtZX"


def all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def children_of(pid: int) -> list[int]:
    return [child for child in all_processes() if (found := _stat(child)) and found[1] == pid]


def signal_each(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner reads, whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename in the directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
