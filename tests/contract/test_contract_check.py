"""The contract's checks see a break, a missing comment and a wrong format, and name them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"
MONEY = "proto/payments/v1/money.proto"
FIELD = "int64 tip_minor = 1"


class Repository:
    """A repository of its own with a copy of proto/."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("gen", "__pycache__", "dist")
        shutil.copytree(PROTO, root / "proto", ignore=ignored)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> None:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.invalid"]
        plain = ["-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
        subprocess.run(["git", *who, *plain, *arguments], cwd=self.root, check=True)

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def replace(self, old: str, new: str) -> None:
        path = self.root / MONEY
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def check(self) -> tuple[int, str]:
        """Returns the exit status of check.py and all that it printed."""
        ran = subprocess.run(
            [sys.executable, "proto/check.py"],
            cwd=self.root,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(self.root.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return ran.returncode, ran.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    root = tmp_path / "a repository"
    root.mkdir()
    return Repository(root)


def test_contract_as_it_is_passes_without_a_history(repository: Repository) -> None:
    status, printed = repository.check()
    assert status == 0, printed
    assert "NOT compared with an earlier one" in printed
    shutil.rmtree(repository.root / ".git")
    status, printed = repository.check()
    assert status == 0, printed
    assert "NOT compared with an earlier one" in printed


def test_uncommitted_break_is_found(repository: Repository) -> None:
    repository.commit("contract")
    status, printed = repository.check()
    assert status == 0, printed
    assert "breaks nothing since" in printed
    repository.replace(FIELD, "int64 gratuity_minor = 1")
    status, printed = repository.check()
    assert status == 1
    assert "BREAKS callers of" in printed
    assert "gratuity_minor" in printed


def test_committed_break_is_found_behind_commits_that_leave_the_contract_alone(
    repository: Repository,
) -> None:
    repository.commit("contract")
    repository.replace(FIELD, "int64 gratuity_minor = 1")
    repository.commit("break")
    (repository.root / "other").write_text("no contract", encoding="utf-8")
    repository.commit("other")
    status, printed = repository.check()
    assert status == 1
    assert "(the contract before its last change)" in printed


def test_added_field_breaks_nothing(repository: Repository) -> None:
    repository.commit("contract")
    repository.replace(
        "message AmountDetails {",
        "message AmountDetails {\n  // The duty.\n  int64 duty_minor = 5;",
    )
    status, printed = repository.check()
    assert status == 0, printed


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("  // The tip or gratuity.\n", "", "should have a non-empty comment"),
        ("tip_minor", "TipMinor", "should be lower_snake_case"),
        (FIELD, "int64   tip_minor = 1", "-  int64   tip_minor = 1"),
        ("package payments.v1;", "package payments.v1", "protoc refused the contract"),
    ],
    ids=["comment", "name", "format", "syntax"],
)
def test_finding_fails_the_check(repository: Repository, old: str, new: str, finding: str) -> None:
    repository.replace(old, new)
    status, printed = repository.check()
    assert status == 1
    assert finding in printed
