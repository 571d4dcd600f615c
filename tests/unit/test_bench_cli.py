"""The benchmark's command line: its summary is of this run, and can be written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import asyncpg
import pytest

from loadtest.bench import cli, report
from loadtest.bench.cli import main
from loadtest.bench.system import System
from loadtest.children import ProcessFailed
from storage.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError


def test_summary_that_cannot_be_written_is_refused_before_the_measurement(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file / "summary.json", tmp_path):
        with pytest.raises(SystemExit) as ended:
            main(["--summary", str(path)])
        assert ended.value.code == 2
        assert "--summary" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ProcessFailed("the generator ended"),
        EmbeddedServerError("PostgreSQL does not start"),
        ConnectionRefusedError("nobody listens"),
        asyncpg.AdminShutdownError("the server goes"),
    ],
)
def test_a_run_that_could_not_measure_leaves_no_summary_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    monkeypatch.setattr(cli, "_measure", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("signal.signal", lambda *_: None)  # ours stay as they are
    assert main(["--summary", str(summary)]) == report.BROKEN
    assert not summary.exists()


def test_figures_of_a_benchmark_whose_server_ended_are_none(tmp_path: Path) -> None:
    # Neither has been started.
    postgres, redis = EmbeddedPostgres(tmp_path / "postgres"), EmbeddedRedis(tmp_path / "redis")
    with pytest.raises(ProcessFailed, match="ended while it was measured"), ExitStack() as stack:
        System(tmp_path, postgres, redis, stack).missing()
