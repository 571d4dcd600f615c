"""The benchmark's command line: what cannot be written is found before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench.cli import main


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
