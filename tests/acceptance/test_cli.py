"""The command line, further: what it refuses, what it prints of keys, and the published tables."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gateway.domain.ids import new_merchant_id, new_payment_id
from storage.postgres.migrate import migrate

if TYPE_CHECKING:
    from tests.servers import PostgresForTests

REPOSITORY = Path(__file__).resolve().parents[2]
NOWHERE = "org_00000000000000000000000000000000"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`gateway` on a database, in an empty directory."""

    dsn: str
    directory: Path

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
        environment |= {f"GATEWAY_{name.upper()}": value for name, value in settings.items()}
        return subprocess.run(
            [sys.executable, "-m", "gateway", *arguments],
            env={"GATEWAY_POSTGRES_DSN": self.dsn, **environment},
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )

    def printed(self, *arguments: str) -> str:
        """What a command that succeeds prints."""
        ran = self.run(*arguments)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def refused(self, *arguments: str) -> str:
        """The one line that a command is refused with."""
        ran = self.run(*arguments)
        assert ran.returncode == 1, ran.stdout
        assert ran.stdout == ""
        [line] = ran.stderr.splitlines()
        assert line.startswith("Error: ")
        return line


@pytest.fixture
def command_line(postgres: PostgresForTests, tmp_path: Path) -> CommandLine:
    template = postgres.create_template("migrated", migrate)
    return CommandLine(postgres.create_database(template), tmp_path)


def test_what_does_not_exist_is_refused_in_one_line_that_names_it(
    command_line: CommandLine,
) -> None:
    organisation = command_line.printed("organisations", "create", "--name", "One")
    other = command_line.printed("organisations", "create", "--name", "Other")
    merchant = command_line.printed(
        "merchants", "create", "--organisation", other, "--name", "Theirs"
    )
    key = ("keys", "create", "--scope", "payments:read", "--mode", "test")
    for arguments, named in (
        (("merchants", "create", "--organisation", NOWHERE, "--name", "x"), NOWHERE),
        ((*key, "--organisation", NOWHERE), NOWHERE),
        # A key never reaches a merchant of another organisation.
        ((*key, "--organisation", organisation, "--merchant", merchant), organisation),
        (("keys", "revoke", "key_none"), "key_none"),
    ):
        assert named in command_line.refused(*arguments)
    assert command_line.printed("keys", "list") == ""
    assert command_line.printed("merchants", "list", "--organisation", organisation) == ""


def test_a_payment_is_shown_to_its_merchants_id_alone(command_line: CommandLine) -> None:
    payment_id, merchant_id = new_payment_id(), new_merchant_id()
    refused = command_line.refused("payments", "show", payment_id, "--merchant", merchant_id)
    assert payment_id in refused
    assert merchant_id in refused
    assert command_line.run("payments", "show", payment_id).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--mode", "test"), "--scope"),
        (("--mode", "test", "--scope", "payments:everything"), "payments:everything"),
        (("--scope", "payments:read"), "--mode"),
        (("--mode", "both", "--scope", "payments:read"), "both"),
        (("--mode", "live", "--scope", "admin", "--expires-in-days", "0"), "--expires-in-days"),
    ],
)
def test_a_key_needs_a_known_scope_a_mode_and_a_life(
    command_line: CommandLine, arguments: tuple[str, ...], named: str
) -> None:
    ran = command_line.run("keys", "create", "--organisation", NOWHERE, *arguments)
    assert ran.returncode == 2
    assert named in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_listed_key_tells_mode_scopes_and_life_and_no_secret(command_line: CommandLine) -> None:
    organisation = command_line.printed("organisations", "create", "--name", "One")
    create = ("keys", "create", "--organisation", organisation, "--name", "till")
    live = command_line.run(*create, "--mode", "live", "--scope", "payments:read")
    # The key alone on the standard output, so that a script can take it.
    assert live.stdout.startswith("gwk_live_")
    assert len(live.stdout.split()) == 1
    test = command_line.printed(
        *(*create, "--mode", "test", "--expires-in-days", "30"),
        *("--scope", "payments:write", "--scope", "payments:read"),
    )
    key_id = f"key_{test.split('_')[2]}"
    assert key_id in command_line.printed("keys", "revoke", key_id)

    first, second = command_line.printed("keys", "list", "--organisation", organisation).split("\n")
    for told in ("live", "payments:read", "no expiry", "till"):
        assert told in first
    for told in (key_id, "test", "payments:read,payments:write", "revoked"):
        assert told in second
    for key in (live.stdout.strip(), test):
        assert key.rpartition("_")[2] not in first + second


def test_the_tables_of_states_are_printed_as_they_are_published(command_line: CommandLine) -> None:
    published = (REPOSITORY / "docs/states.md").read_text("utf-8")
    assert command_line.printed("states", "--markdown") == published.strip()
    assert "IN_DOUBT" in command_line.printed("states")


def test_a_wrong_setting_is_named_with_its_variable_and_without_a_secret(
    command_line: CommandLine,
) -> None:
    ran = command_line.run("keys", "list", wait_s_max="soon", redis_url="secret-word")
    assert ran.returncode == 1
    assert "GATEWAY_WAIT_S_MAX" in ran.stderr
    assert "GATEWAY_REDIS_URL" in ran.stderr
    assert "secret-word" not in ran.stderr
    assert "Traceback" not in ran.stderr
