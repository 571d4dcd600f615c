"""`.ci/choose-python`: what .venv is made from where nobody names a Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "choose-python"
UNSUITABLE = None


def install(directory: Path, microseconds: int | None) -> Path:
    """A python3 that says it takes so long, or that it is too old."""
    directory.mkdir()
    python = directory / "python3"
    answer = "exit 1" if microseconds is UNSUITABLE else f"echo {microseconds}"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    return python


def chosen_of(*pythons: Path) -> subprocess.CompletedProcess[str]:
    """What it prints where these are on the PATH, in this order."""
    return subprocess.run(
        ["/bin/sh", SCRIPT],
        env={"PATH": ":".join(str(each.parent) for each in pythons)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("microseconds", "chosen"),
    [
        ([5000], 0),
        ([5000, 4000], 0),
        ([5000, 3999], 1),
        ([5000, 6000], 0),
        ([5000, 3900, 3800], 1),
        ([5000, 3900, 3000], 2),
        ([5000, UNSUITABLE, 3000], 2),
        ([UNSUITABLE, 6000], 1),
        ([UNSUITABLE, 6000, 4000], 2),
        ([UNSUITABLE, UNSUITABLE], 0),
    ],
)
def test_a_python_is_taken_for_the_first_where_it_is_a_fifth_faster_or_the_first_is_of_no_use(
    microseconds: list[int | None], chosen: int, tmp_path: Path
) -> None:
    pythons = [install(tmp_path / f"a {n}", each) for n, each in enumerate(microseconds)]
    told = chosen_of(*pythons)
    assert told.stdout == ("python3\n" if chosen == 0 else f"{pythons[chosen]}\n")
    assert (str(pythons[chosen]) in told.stderr) == (chosen != 0)


def test_without_any_python_it_is_the_one_that_setup_says_is_missing(tmp_path: Path) -> None:
    told = chosen_of(tmp_path / "python3")
    assert (told.stdout, told.stderr) == ("python3\n", "")


def test_a_python_that_was_faster_by_chance_is_not_taken(tmp_path: Path) -> None:
    first, second = install(tmp_path / "first", 5000), install(tmp_path / "second", 3900)
    first.write_text(f"#!/bin/sh\necho 5000\nexec /bin/cp {second} {first}\n")
    told = chosen_of(first, second)
    assert (told.stdout, told.stderr) == ("python3\n", "")


def test_a_real_python_is_timed(tmp_path: Path) -> None:
    of_no_use = install(tmp_path / "first", UNSUITABLE)
    real = tmp_path / "second" / "python3"
    real.parent.mkdir()
    real.symlink_to(Path(sys.executable).resolve())
    assert chosen_of(of_no_use, real).stdout == f"{real}\n"
