"""Checks the contract: its format, buf's lint rules, and that no caller of an earlier one breaks.

    python proto/check.py

It compares the contract in the working tree with two versions that git knows:

- the one of the last commit (HEAD), which catches a break before it is committed;
- the one before the commit that last changed the contract. Where nothing is uncommitted, as in a
  fresh clone or in CI, HEAD is the working tree itself; this is then the last contract of main that
  differs, and it catches a break that was committed unchecked.

Only first parents count: what a merged branch tried on its way was never main's. Where there is no
such version (the first commit, a shallow clone, an unpacked archive), it says so and passes. A
break that is meant is written into buf.yaml (`breaking.ignore_only`), where a reviewer sees it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import stubgen

_ROOT = Path(__file__).resolve().parent
_BUF = Path(sysconfig.get_path("scripts")) / "buf"
_PACKAGES = stubgen.CONTRACT.split("/", maxsplit=1)[0]
"""The directory of ours: an image also holds google/* and buf/*, which are not ours to judge."""


class HistoryError(Exception):
    """git cannot say what went before; the message is git's own."""


@dataclass(frozen=True)
class Baseline:
    """An earlier contract to compare with."""

    commit: str
    """The commit's full hash."""
    meaning: str
    """What that commit is, for the person who reads the outcome."""


def main() -> int:
    """Runs every check, also after a failure; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="contract-check-") as scratch:
        work = Path(scratch)
        os.environ["BUF_CACHE_DIR"] = str(work / "cache")  # a home directory may be missing
        try:
            image = _image(_ROOT, work / "now")
        except stubgen.GenerationError as error:
            print(f"contract: {error}", file=sys.stderr)
            return 1
        passed = [
            _buf("format", "--diff", "--exit-code", ".", "--path", _PACKAGES),
            _buf("lint", str(image), "--path", _PACKAGES),
            _breaks_nothing(image, work),
        ]
    if not all(passed):
        print("contract: FAILED", file=sys.stderr)
        return 1
    print("contract: format and lint passed")
    return 0


def baselines() -> list[Baseline]:
    """Returns the earlier contracts to compare with, the newest first; none without a history.

    Raises:
        HistoryError: git is missing, or this is no repository with a commit.
    """
    head = _git("rev-parse", "--verify", "HEAD").decode().strip()
    changes = _git("log", "--first-parent", "--max-count=2", "--format=%H", "--", _PACKAGES)
    found = [Baseline(head, "the last commit")]
    if len(changes.split()) > 1:
        before = changes.decode().split()[1]
        found.append(Baseline(before, "the contract before its last change"))
    return [one for one in found if _files(one.commit)]


def _breaks_nothing(image: Path, work: Path) -> bool:
    try:
        earlier = baselines()
    except HistoryError as error:
        print(f"contract: NOT compared with an earlier one, git has no history here ({error})")
        return True
    if not earlier:
        print("contract: NOT compared with an earlier one, no commit has a contract yet")
        return True
    passed = True
    for number, baseline in enumerate(earlier):
        label = f"{baseline.commit[:12]} ({baseline.meaning})"
        tree = work / f"earlier-{number}"
        _extract(baseline.commit, tree)
        try:
            against = _image(tree, work / f"earlier-{number}-compiled")
        except stubgen.GenerationError as error:
            # Nobody can have built on a contract that does not compile.
            print(f"contract: NOT compared with {label}: {error}")
            continue
        compatible = _buf("breaking", str(image), "--against", str(against), "--path", _PACKAGES)
        print(f"contract: {'breaks nothing since' if compatible else 'BREAKS callers of'} {label}")
        passed = passed and compatible
    return passed


def _image(source: Path, work: Path) -> Path:
    stubgen.write_include(source, work)
    target = work / stubgen.DESCRIPTOR_SET
    target.write_bytes(stubgen.compile_image(work))
    return target


def _files(commit: str) -> list[str]:
    listed = _git("ls-tree", "-r", "-z", "--name-only", commit, "--", _PACKAGES)
    return listed.decode().split("\0")[:-1]


def _extract(commit: str, target: Path) -> None:
    for name in _files(commit):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_git("show", f"{commit}:./{name}"))


def _buf(command: str, *arguments: str) -> bool:
    config = ["--config", "buf.yaml"] if command != "format" else []
    ran = subprocess.run([_BUF, command, *arguments, *config], cwd=_ROOT, check=False)
    return ran.returncode == 0


def _git(*arguments: str) -> bytes:
    """Runs git in this directory: paths, the archive's too, are relative to it."""
    try:
        ran = subprocess.run(
            ["git", *arguments],
            cwd=_ROOT,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise HistoryError(str(error)) from error
    if ran.returncode != 0:
        raise HistoryError(ran.stderr.decode(errors="replace").strip().splitlines()[-1])
    return ran.stdout


if __name__ == "__main__":
    sys.exit(main())
