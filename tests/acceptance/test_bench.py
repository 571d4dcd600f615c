"""`python -m loadtest.bench` from outside: what it measures, prints and leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import temporary_directory

RUN_TIMEOUT_S = 170.0

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("k9") is None,
    reason="not run: the load generator is installed by `make bench` only",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the benchmark puts all that it makes."""
    with temporary_directory() as path:
        yield path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loadtest.bench", "--summary", f"{folder}/out.json", *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(folder: Path) -> list[str]:
    """The command lines of the processes that work below a folder."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            command = (directory / "cmdline").read_text("utf-8", "replace")
            environment = (directory / "environ").read_bytes()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if f"TMPDIR={folder}".encode() in environment and directory.name != str(os.getpid()):
            found.append(command)
    return found


def test_it_measures_every_kind_of_side_and_leaves_nothing_behind(folder: Path) -> None:
    """Short rounds prove no speed: that is what its exit status says."""
    bench = start(
        folder,
        *("--only", "authorize_over_echo,naive_rps,batch_over_pgbench,stream_items_per_s"),
        *("--pairs", "1", "--seconds", "1", "--no-warm-up"),
        *("--concurrency", "echo=8", "--concurrency", "authorize=8", "--concurrency", "naive=8"),
        *("--concurrency", "batch=1", "--concurrency", "stream=1", "--concurrency", "pgbench=4"),
    )
    printed, progress = bench.communicate(timeout=RUN_TIMEOUT_S)
    assert bench.returncode == 3, progress
    summary = json.loads((folder / "out.json").read_text("utf-8"))
    for name in ("authorize_over_echo", "naive_rps", "batch_over_pgbench", "stream_items_per_s"):
        assert summary[name] > 0
        assert summary["verdicts"][name] == "INVALID"
    assert summary["rounds"] == 1
    assert summary["acknowledged_missing"] == {}
    assert summary["concurrency"]["authorize"] == 8
    assert summary["cpu_us"]["authorize"]["generator"] > 0
    assert "authorize, native ÷ echo *" in printed
    assert "1 rounds, not 7" in printed
    (folder / "out.json").unlink()
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_tells_what_was_measured_until_it_is_stopped_and_ends_all_that_it_started(
    folder: Path, end: signal.Signals
) -> None:
    bench = start(
        folder,
        *("--only", "echo_rps,naive_rps", "--pairs", "1000", "--seconds", "1", "--no-warm-up"),
        *("--concurrency", "echo=2", "--concurrency", "naive=2"),
    )
    assert bench.stderr is not None
    assert "round 1/1000" in bench.stderr.readline()
    assert processes_of(folder)
    bench.send_signal(end)
    printed, progress = bench.communicate(timeout=RUN_TIMEOUT_S)
    assert bench.returncode == 130, progress
    assert "interrupted: what was measured until then follows" in progress
    assert "Traceback" not in progress
    assert "echo" in printed
    summary = json.loads((folder / "out.json").read_text("utf-8"))
    assert summary["interrupted"]
    assert summary["echo_rps"] > 0
    # Whole rounds alone: the sides of a round are compared with each other.
    assert len(summary["rates"]["echo"]) == len(summary["rates"]["naive"]) >= 1
    (folder / "out.json").unlink()
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []


def test_it_has_no_result_where_it_is_stopped_before_its_first_round(folder: Path) -> None:
    bench = start(folder, "--only", "echo_rps", "--seconds", "100", "--no-search")
    try:
        while not any("loadtest.bench.server" in command for command in processes_of(folder)):
            assert bench.poll() is None
        bench.send_signal(signal.SIGINT)
        printed, progress = bench.communicate(timeout=RUN_TIMEOUT_S)
    finally:
        bench.kill()
    assert (bench.returncode, printed, progress) == (130, "", "bench: interrupted, no result\n")
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []
