"""The benchmark's command line: its summary is of this run, and can be written."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from loadtest.bench import cli, report
from loadtest.bench.cli import main
from loadtest.children import ProcessFailed


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


def test_a_run_that_could_not_measure_leaves_no_summary_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> NoReturn:
        raise ProcessFailed("the generator ended")

    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    monkeypatch.setattr(cli, "_measure", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("signal.signal", lambda *_: None)  # ours stay as they are
    assert main(["--summary", str(summary)]) == report.BROKEN
    assert not summary.exists()
