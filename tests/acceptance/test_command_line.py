"""The command line against a real database: accounts, migrations, looks, and clear refusals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from click.testing import CliRunner

from gateway import composition
from gateway.cli import main
from gateway.domain.ids import new_merchant_id, new_payment_id
from gateway.local import LocalState
from gateway.settings import load_settings
from storage.postgres import row_security
from storage.postgres.migrate import migrate, read_migrations
from tests.harness import calling, eventually, reason_of, running_system
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

    from storage.embedded import EmbeddedRedis
    from tests.nursery import Nursery
    from tests.servers import PostgresForTests


REPOSITORY = Path(__file__).resolve().parents[2]
NOWHERE = "org_00000000000000000000000000000000"


def _environment(**settings: str) -> dict[str, str]:
    """The caller's environment with these settings and no others."""
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("GATEWAY_")}
    return inherited | {f"GATEWAY_{name.upper()}": value for name, value in settings.items()}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`gateway` in an empty directory, with settings that every command gets."""

    nursery: Nursery
    directory: Path
    settings: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Whatever comes of a command; a traceback never does."""
        values = self.settings | settings
        environment = {f"GATEWAY_{name.upper()}": value for name, value in values.items()}
        ran = self.nursery.run(arguments, environment, self.directory)
        assert "Traceback" not in ran.stderr
        return ran

    def printed(self, *arguments: str) -> str:
        """What a command that succeeds prints."""
        ran = self.run(*arguments)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def refused(self, *arguments: str, **settings: str) -> str:
        """The one line that a command is refused with."""
        ran = self.run(*arguments, **settings)
        assert ran.returncode == 1, ran.stdout
        assert ran.stdout == ""
        [line] = ran.stderr.splitlines()
        assert line.startswith("Error: ")
        return line


@pytest.fixture
def alone(nursery: Nursery, tmp_path: Path) -> CommandLine:
    """Without a database."""
    return CommandLine(nursery, tmp_path)


@pytest.fixture
def command_line(postgres: PostgresForTests, nursery: Nursery, tmp_path: Path) -> CommandLine:
    """On a migrated database without accounts."""
    template = postgres.create_template("migrated", migrate)
    return CommandLine(nursery, tmp_path, {"postgres_dsn": postgres.create_database(template)})


# --- help and refusals ----------------------------------------------------------------------------


def _commands(group: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*path, name))


@pytest.mark.parametrize("command", list(_commands()), ids=" ".join)
def test_every_command_has_help_that_says_what_it_does(
    nursery: Nursery, tmp_path: Path, command: tuple[str, ...]
) -> None:
    told = InProcess(nursery, tmp_path).printed(*command, "--help")
    assert "usage" in told.lower()
    assert len(told.splitlines()) > 3


@pytest.mark.parametrize("command", [("migrate",), ("keys", "list"), ("serve",)], ids=" ".join)
def test_without_a_database_the_way_to_one_is_named(
    alone: CommandLine, command: tuple[str, ...]
) -> None:
    line = alone.refused(*command)
    assert "GATEWAY_POSTGRES_DSN" in line
    assert "gateway run" in line


@pytest.mark.parametrize(
    "state",
    [b"[]", b"null", b'"x"', b"{", b"\xff", b'{"postgres_dsn": null}', b"[" * 100_000],
    ids=["list", "null", "text", "half", "no text", "no texts", "deep"],
)
def test_a_state_of_the_local_set_up_that_is_none_is_named(
    nursery: Nursery, tmp_path: Path, state: bytes
) -> None:
    folder = tmp_path / ".local/embedded"
    folder.mkdir(parents=True)
    (folder / "local.json").write_bytes(state)
    for command in (("organisations", "list"), ("demo",), ("run",)):
        line = CommandLine(nursery, tmp_path).refused(*command)
        assert "local.json is no JSON object of texts" in line


def test_sigterm_ends_the_first_process_of_a_container_before_it_serves_too(tmp_path: Path) -> None:
    program = """
import os, runpy, signal, sys

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the kernel has it for process 1
own = os.getpid()
os.getpid = lambda: 1


class WhileItStarts:
    def find_spec(self, name, *_):
        if name == "gateway.cli":
            os.kill(own, signal.SIGTERM)


sys.meta_path.insert(0, WhileItStarts())
sys.argv = ["gateway", "states"]
runpy.run_module("gateway", run_name="__main__")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (128 + signal.SIGTERM, b""), ran.stderr


def test_run_where_its_directory_cannot_be_made_or_written_to_says_so(
    command_line: CommandLine, tmp_path: Path, redis: EmbeddedRedis
) -> None:
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "embedded")
    line = command_line.refused("run", embedded_dir=below)
    assert line.startswith(f"Error: {below} cannot be made")
    assert "GATEWAY_EMBEDDED_DIR" in line
    (tmp_path / "folder" / "local.new").mkdir(parents=True)
    line = command_line.refused(
        "run",
        embedded_dir=str(tmp_path / "folder"),
        redis_url=redis.url,
        simulator_url="http://127.0.0.1",
    )
    assert "local.json cannot be written" in line


def test_a_database_that_is_away_ends_in_one_clear_line_without_its_password(
    alone: CommandLine,
) -> None:
    dsn = f"postgresql://gateway:secret-word@127.0.0.1:{free_port()}/gateway"
    elsewhere = {"redis_url": "redis://127.0.0.1", "simulator_url": "http://127.0.0.1"}
    for command in (("migrate",), ("organisations", "list"), ("run",)):
        ran = alone.run(*command, postgres_dsn=dsn, **elsewhere)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.splitlines()[-1].startswith("Error: ")
        assert "secret-word" not in ran.stderr


def test_a_setting_that_does_not_exist_is_named_with_its_neighbour(alone: CommandLine) -> None:
    ran = alone.run("migrate", postgres_dns="x")
    assert ran.returncode == 1
    assert "GATEWAY_POSTGRES_DNS" in ran.stderr
    assert "GATEWAY_POSTGRES_DSN" in ran.stderr


def test_a_wrong_setting_is_named_with_its_variable_and_without_a_secret(
    alone: CommandLine,
) -> None:
    ran = alone.run("keys", "list", wait_s_max="soon", redis_url="secret-word")
    assert ran.returncode == 1
    assert "GATEWAY_WAIT_S_MAX" in ran.stderr
    assert "GATEWAY_REDIS_URL" in ran.stderr
    assert "secret-word" not in ran.stderr


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
    alone: CommandLine, arguments: tuple[str, ...], named: str
) -> None:
    ran = alone.run("keys", "create", "--organisation", NOWHERE, *arguments)
    assert ran.returncode == 2
    assert named in ran.stderr


@pytest.mark.parametrize("name", ["4242424242424242", "card 4242-4242-4242-4242 of Eve"])
def test_a_name_that_holds_a_card_number_is_refused_by_its_option(
    command_line: CommandLine, name: str
) -> None:
    organisation = command_line.printed("organisations", "create", "--name", "One")
    of_it = ("--organisation", organisation)
    for command in (
        ("organisations", "create"),
        ("merchants", "create", *of_it),
        ("keys", "create", *of_it, "--mode", "test", "--scope", "admin"),
    ):
        ran = command_line.run(*command, "--name", name)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert "'--name'" in ran.stderr
        assert "4242" not in ran.stderr
    assert command_line.printed("organisations", "list") == f"{organisation}  One"
    assert command_line.printed("merchants", "list") == ""
    assert command_line.printed("keys", "list") == ""


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


@pytest.mark.parametrize(
    "command",
    [
        ("verify",),
        ("doubts", "list"),
        ("notifications", "list"),
        ("connectors", "list"),
        ("changes", "list"),
        ("connectors", "costs", "show"),
        ("events", "tail", "--mode", "test", "--consumer", "relay"),
        ("routing", "list", "--mode", "test"),
        ("routing", "validate", "--mode", "test", "-"),
        ("routing", "simulate", "--mode", "test", "-"),
    ],
)
def test_a_merchant_that_there_is_not_is_refused_rather_than_taken_for_one_without_anything(
    command_line: CommandLine, command: tuple[str, ...]
) -> None:
    assert command_line.refused(*command, "--merchant", "mer_none") == (
        "Error: There is no merchant mer_none."
    )
    assert command_line.printed("events", "consumers") == ""


@pytest.mark.parametrize("what", ["merchants", "keys", "identities", "changes"])
def test_an_organisation_that_there_is_not_is_refused_rather_than_taken_for_an_empty_one(
    command_line: CommandLine, what: str
) -> None:
    assert command_line.refused(what, "list", "--organisation", "org_none") == (
        "Error: There is no organisation org_none."
    )


def test_a_reader_that_has_read_enough_is_no_error(command_line: CommandLine) -> None:
    command_line.printed("organisations", "create", "--name", "One")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "gateway", "organisations", "list"],
            cwd=command_line.directory,
            env=_environment(**command_line.settings),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert ran.stderr == ""


def test_a_payment_is_shown_to_its_merchants_id_alone(command_line: CommandLine) -> None:
    payment_id, merchant_id = new_payment_id(), new_merchant_id()
    refused = command_line.refused("payments", "show", payment_id, "--merchant", merchant_id)
    assert payment_id in refused
    assert merchant_id in refused
    assert command_line.run("payments", "show", payment_id).returncode == 2


# --- what commands do -----------------------------------------------------------------------------


def test_the_tables_of_states_are_printed_as_they_are_published(alone: CommandLine) -> None:
    published = (REPOSITORY / "docs/states.md").read_text("utf-8")
    assert alone.printed("states", "--markdown") == published.strip()
    assert "IN_DOUBT" in alone.printed("states")


def test_migrate_repeats_harmlessly(postgres: PostgresForTests, alone: CommandLine) -> None:
    dsn = postgres.create_database()
    first = alone.run("migrate", postgres_dsn=dsn)
    files = REPOSITORY.joinpath("storage/postgres/migrations").glob("*.sql")
    assert (first.returncode, first.stdout.count("applied")) == (0, len(list(files)))
    again = alone.run("migrate", postgres_dsn=dsn)
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")


def test_row_security_is_enabled_and_disabled(
    postgres: PostgresForTests, alone: CommandLine
) -> None:
    dsn = postgres.create_database()
    alone.run("migrate", postgres_dsn=dsn)
    for _ in range(2):
        told = alone.run("row-security", "enable", postgres_dsn=dsn)
        assert (told.returncode, told.stdout) == (0, "row-level security is enabled\n")
    nobody = alone.run("row-security", "enable", "--login", "nobody_of_this_name", postgres_dsn=dsn)
    assert nobody.returncode == 1
    told = alone.run("row-security", "disable", postgres_dsn=dsn)
    assert (told.returncode, told.stdout) == (0, "row-level security is disabled\n")


async def test_migrate_protects_the_tables_that_it_adds_where_the_gateways_rely_on_it(
    postgres: PostgresForTests, alone: CommandLine
) -> None:
    dsn = postgres.create_database()
    settings = {"postgres_dsn": dsn, "postgres_row_security": "true"}
    for phase in ("pre", "all"):
        told = alone.run("migrate", "--phase", phase, **settings)
        assert told.returncode == 0, told.stderr
        assert told.stdout.endswith("row-level security is enabled\n")
        assert await row_security.problems(dsn) == []
    assert "row-level" not in alone.run("migrate", "--phase", "post", **settings).stdout


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


def test_a_merchant_is_limited_and_freed(command_line: CommandLine) -> None:
    organisation = command_line.printed("organisations", "create", "--name", "One")
    merchant = command_line.printed(
        "merchants", "create", "--organisation", organisation, "--name", "S"
    )

    def listed() -> str:
        return command_line.printed("merchants", "list", "--organisation", organisation)

    assert listed() == f"{merchant}  {organisation}  no rate limit  S"
    for options, shown in (
        (("--per-second", "50", "--burst", "100"), "50 a second, 100 at once"),
        (("--per-second", "50"), "50 a second, 50 at once"),
        (("--per-second", "0.5"), "0.5 a second, 1 at once"),
        (("--none",), "no rate limit"),
    ):
        command_line.printed("merchants", "limit", merchant, *options)
        assert listed() == f"{merchant}  {organisation}  {shown}  S"
    for wrong in (
        (),
        ("--burst", "5"),
        ("--none", "--per-second", "5"),
        ("--none", "--burst", "5"),
        ("--per-second", "0"),
        ("--per-second", "nan"),
        ("--per-second", "5", "--burst", "0"),
    ):
        assert command_line.run("merchants", "limit", merchant, *wrong).returncode != 0, wrong
    assert command_line.run("merchants", "limit", "mer_none", "--none").returncode == 1
    assert listed() == f"{merchant}  {organisation}  no rate limit  S"


def test_an_identity_is_added_listed_and_removed(command_line: CommandLine) -> None:
    organisation = command_line.printed("organisations", "create", "--name", "One")
    merchant = command_line.printed(
        "merchants", "create", "--organisation", organisation, "--name", "S"
    )
    uri = f"spiffe://example.org/{organisation}/till"
    add = ("identities", "add", uri, "--organisation", organisation, "--merchant", merchant)
    options = ("--scope", "payments:read", "--mode", "live", "--name", "till")
    assert command_line.printed(*add, *options) == f"added {uri}"
    again = command_line.run(*add, *options)
    assert again.returncode == 1
    assert "there already" in again.stderr
    no_id = command_line.run("identities", "add", "https://example.org/till", *add[3:], *options)
    assert no_id.returncode == 1
    assert "SPIFFE ID" in no_id.stderr
    line = command_line.printed("identities", "list", "--organisation", organisation)
    assert line == f"{uri}  {organisation}  live  payments:read  {merchant}  till"
    assert command_line.printed("identities", "remove", uri) == f"removed {uri}"
    assert command_line.run("identities", "remove", uri).returncode == 1


async def test_accounts_from_creation_to_a_revoked_key(
    postgres: PostgresForTests, redis: EmbeddedRedis, nursery: Nursery, tmp_path: Path
) -> None:
    with running_system(postgres, redis, auth_cache_life_s=0.05) as system:
        command_line = CommandLine(nursery, tmp_path, {"postgres_dsn": system.dsn})
        run = command_line.printed
        organisation = run("organisations", "create", "--name", "Example")
        merchant = run("merchants", "create", "--organisation", organisation, "--name", "Shop")
        scopes = ("--scope", "payments:write", "--scope", "payments:read")
        create = ("keys", "create", "--organisation", organisation, "--mode", "test")
        key, second = run(*create, *scopes), run(*create, *scopes)
        assert key != second
        assert organisation in run("organisations", "list")
        assert merchant in run("merchants", "list", "--organisation", organisation)
        listed = run("keys", "list", "--organisation", organisation)
        assert len(listed.splitlines()) == 2
        assert key.rpartition("_")[2] not in listed

        gateway = system.start_gateway()
        async with calling(gateway, key) as caller, calling(gateway, second) as other:
            payment = (await caller.authorize()).payment
            assert payment.merchant_id == merchant
            shown = run("payments", "show", payment.payment_id, "--merchant", merchant)
            assert json.loads(shown)["payment"]["payment_id"] == payment.payment_id

            assert "revoked" in run("keys", "revoke", f"key_{key.split('_')[2]}")
            reasons: list[str] = []
            while "CREDENTIAL_INVALID" not in reasons:
                try:
                    await caller.payment(payment.payment_id)
                except grpc.aio.AioRpcError as error:
                    reasons.append(reason_of(error))
            assert (await other.payment(payment.payment_id)).payment == payment
        command_line.refused("keys", "revoke", f"key_{key.split('_')[2]}")


async def test_doctor_tells_good_from_bad(
    postgres: PostgresForTests, redis: EmbeddedRedis, alone: CommandLine
) -> None:
    with running_system(postgres, redis) as system:
        settings = {
            "postgres_dsn": system.dsn,
            "redis_url": system.redis_url,
            "simulator_url": f"{system.simulator.url}/",  # as the gateway takes it, too
            "listen_address": f"127.0.0.1:{free_port()}",
            "metrics_address": f"127.0.0.1:{free_port()}",
        }
        good = alone.run("doctor", **settings)
        assert (good.returncode, "BAD" in good.stdout) == (0, False), good.stdout
        assert "changes of the configuration are recorded" in good.stdout
        # As within a pod: beside the gateway that has the addresses.
        gateway = system.start_gateway(
            listen_address=settings["listen_address"], metrics_address=settings["metrics_address"]
        )
        await gateway.serving()
        beside = await asyncio.to_thread(alone.run, "doctor", **settings)
        assert (beside.returncode, "BAD" in beside.stdout) == (0, False), beside.stdout
        assert "a gateway runs there" in beside.stdout
        await asyncio.to_thread(gateway.stop)
        settings["redis_url"] = f"redis://127.0.0.1:{free_port()}"
        settings["postgres_dsn"] = postgres.create_database()
        bad = alone.run("doctor", **settings)
        assert bad.returncode == 1
        complaints = [line for line in bad.stdout.splitlines() if line.startswith("BAD")]
        assert any("Redis" in line for line in complaints)
        assert any("gateway migrate" in line for line in complaints)


def test_serve_on_a_schema_that_lacks_something_ends_with_the_command_to_run(
    postgres: PostgresForTests, redis: EmbeddedRedis, alone: CommandLine
) -> None:
    served = alone.run(
        "serve",
        postgres_dsn=postgres.create_database(),
        redis_url=redis.url,
        listen_address="127.0.0.1:0",
        metrics_address="127.0.0.1:0",
    )
    assert served.returncode == 1
    assert "Run `gateway migrate`" in served.stderr
    assert '"serving"' not in served.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("merchants", "list"),
        ("organisations", "create", "--name", "Example"),
        ("doubts", "list"),
        ("verify",),
        ("row-security", "enable"),
    ],
)
def test_commands_on_a_database_without_the_schema_say_what_to_run(
    postgres: PostgresForTests, alone: CommandLine, command: tuple[str, ...]
) -> None:
    ran = alone.run(*command, postgres_dsn=postgres.create_database())
    assert ran.returncode == 1
    assert "gateway migrate" in ran.stderr
    assert "Traceback" not in ran.stderr


async def test_commands_on_a_schema_before_theirs_say_what_to_run(
    postgres: PostgresForTests, alone: CommandLine
) -> None:
    dsn = postgres.create_database()
    folder = REPOSITORY / "storage/postgres/migrations"
    await migrate(dsn, migrations=read_migrations(folder)[:1])
    ran = await asyncio.to_thread(alone.run, "merchants", "list", postgres_dsn=dsn)
    assert ran.returncode == 1
    assert "gateway migrate" in ran.stderr


async def test_health_is_0_only_where_calls_are_served(
    postgres: PostgresForTests, redis: EmbeddedRedis, alone: CommandLine
) -> None:
    with running_system(postgres, redis, simulator_answer_timeout_s=30) as system:
        address = f"0.0.0.0:{free_port()}"
        nobody = await asyncio.to_thread(alone.run, "health", metrics_address=address)
        assert (nobody.returncode, f"no gateway answers at {address}" in nobody.stderr) == (1, True)
        gateway = system.start_gateway(metrics_address=address)
        async with calling(await gateway.serving(), system.shop.api_key) as caller:
            serving = await asyncio.to_thread(alone.run, "health", metrics_address=address)
            assert (serving.returncode, serving.stderr) == (0, "")
            await system.control.hold("before_answer")
            waiting = asyncio.ensure_future(caller.authorize())
            await system.control.await_held()
            stopping = asyncio.ensure_future(asyncio.to_thread(gateway.stop))
            await eventually(lambda: '"draining"' in gateway.log, "the gateway drains")
            draining = await asyncio.to_thread(alone.run, "health", metrics_address=address)
            assert (draining.returncode, "not ready" in draining.stderr) == (1, True), draining
            live = await asyncio.to_thread(alone.run, "health", "--live", metrics_address=address)
            assert live.returncode == 0, live
            await system.control.release()
            await waiting
            assert await stopping == 0


async def test_run_brings_everything_keeps_its_data_and_ends_what_it_started(
    nursery: Nursery, tmp_path: Path
) -> None:
    alone = CommandLine(nursery, tmp_path)
    first = await _run_and_demo(alone)
    assert await _run_and_demo(alone) == first
    state = json.loads((tmp_path / ".local/embedded/local.json").read_text())
    port = int(state["postgres_dsn"].rpartition(":")[2].partition("/")[0])
    await eventually(lambda: not _listens(port), "PostgreSQL has ended")


def test_run_tells_an_address_of_ipv6_as_browsers_take_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    composition._welcome(load_settings(metrics_address="[::1]:9464"), "[::1]:50051", LocalState())
    assert "http://[::1]:9464/metrics" in capsys.readouterr().out


async def test_run_gives_its_merchant_another_key_where_the_one_before_was_revoked(
    command_line: CommandLine, redis: EmbeddedRedis
) -> None:
    command_line.settings["redis_url"] = redis.url
    first = await _run_and_demo(command_line)
    merchants = command_line.printed("merchants", "list")
    command_line.printed("keys", "revoke", f"key_{first.split('_')[2]}")
    assert await _run_and_demo(command_line) != first
    assert command_line.printed("merchants", "list") == merchants


async def _run_and_demo(alone: CommandLine) -> str:
    """`run` in the directory until the demo has ended; the demo merchant's key."""
    addresses = {"listen_address": "127.0.0.1:0", "metrics_address": f"127.0.0.1:{free_port()}"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "run"),
        cwd=alone.directory,
        # The demo finds the port that was free.
        env=_environment(**alone.settings | addresses),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    key = ""
    try:
        async for line in process.stdout:
            if b"API key" in line:
                key = line.split()[-1].decode()
            if b"Stop with Ctrl-C" in line:
                break
        demo = await asyncio.to_thread(alone.run, "demo")
        assert (demo.returncode, "BAD" in demo.stdout) == (0, False), demo.stdout + demo.stderr
    finally:
        process.terminate()
        assert await process.wait() == 0
    return key


def _listens(port: int) -> bool:
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


# --- connectors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InProcess(CommandLine):
    """Without a process for each command, which costs a second on a busy machine."""

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """See CommandLine."""
        ran = CliRunner().invoke(main, arguments, env=_environment(**self.settings | settings))
        assert ran.exception is None or isinstance(ran.exception, SystemExit)
        return subprocess.CompletedProcess(arguments, ran.exit_code, ran.stdout, ran.stderr)


@pytest.fixture
def in_process(command_line: CommandLine) -> InProcess:
    """On a migrated database without accounts."""
    return InProcess(command_line.nursery, command_line.directory, command_line.settings)


def test_connector_accounts_are_added_rotated_rewrapped_and_removed_without_showing_a_credential(
    in_process: InProcess, tmp_path: Path
) -> None:
    old, new = (in_process.printed("connectors", "new-key", name) for name in ("k1", "k2"))
    in_process.settings["connector_keys"] = old
    organisation = in_process.printed("organisations", "create", "--name", "o")
    merchant = in_process.printed(
        "merchants", "create", "--organisation", organisation, "--name", "m"
    )
    credentials = tmp_path / "credentials.json"
    of_merchant = ("--merchant", merchant)
    said: list[str] = []

    def use(secret_key: str, *arguments: str, code: int = 0) -> str:
        credentials.write_text(json.dumps({"secret_key": secret_key}))
        ran = in_process.run(
            "connectors", *arguments, *of_merchant, "--credentials", str(credentials)
        )
        assert ran.returncode == code, ran.stderr
        said.append(ran.stdout + ran.stderr)
        return ran.stdout.strip()

    add = ("add", "--connector", "stripe", "--mode", "test")
    account = use("sk_test_firstsecret12", *add, "--priority", "7")
    use("sk_live_othermode1234", *add, code=1)
    use("sk_test_second12345678", "rotate", account)
    use("sk_live_othermode1234", "rotate", account, code=1)
    _check_silent_account(in_process, of_merchant, credentials)
    listed = in_process.printed("connectors", "list")
    said.append(listed)
    assert listed == f"{account}  {merchant}  stripe  test  priority 7  enabled  key k1"
    in_process.printed("connectors", "disable", *of_merchant, account)
    assert "disabled" in in_process.printed("connectors", "list", *of_merchant)
    in_process.printed("connectors", "enable", *of_merchant, account)

    in_process.settings["connector_keys"] = f"{new},{old}"
    assert "1 accounts" in in_process.printed("connectors", "rewrap")
    assert "0 accounts" in in_process.printed("connectors", "rewrap")
    assert in_process.printed("connectors", "list").endswith("key k2")
    in_process.printed("connectors", "remove", *of_merchant, account)
    assert in_process.printed("connectors", "list") == ""
    assert account in in_process.refused("connectors", "remove", *of_merchant, account)
    everything = "".join(said)
    for secret in ("firstsecret", "second1234", "othermode", old, new):
        assert secret not in everything


def _check_silent_account(
    in_process: InProcess, of_merchant: tuple[str, ...], credentials: Path
) -> None:
    """An account that would never be told how its operations end is warned of."""
    told = {"api_key": "AQEfirstsecret123456", "merchant_account": "Shop"}
    for secrets in ("", "ABCD" * 16):
        more = {"webhook_secrets": secrets} if secrets else {}
        credentials.write_text(json.dumps(told | more))
        given = (*of_merchant, "--connector", "adyen", "--mode", "test")
        ran = in_process.run("connectors", "add", *given, "--credentials", str(credentials))
        assert ran.returncode == 0
        assert ("stay PENDING" in ran.stderr) == (not secrets)
        in_process.printed("connectors", "remove", *of_merchant, ran.stdout.strip())


def test_connector_accounts_need_a_wrapping_key_and_credentials_that_are_some(
    in_process: InProcess, tmp_path: Path
) -> None:
    add = ("connectors", "add", "--merchant", "mer_1", "--connector", "stripe", "--mode", "test")
    file = tmp_path / "credentials.json"
    file.write_text('{"secret_key": "sk_test_firstsecret12"')
    given = (*add, "--credentials", str(file))
    assert "GATEWAY_CONNECTOR_KEYS" in in_process.refused(*given)
    bad = in_process.refused(*given, connector_keys="k1:secret-word")
    assert "secret-word" not in bad
    key = in_process.printed("connectors", "new-key", "k1")
    line = in_process.refused(*given, connector_keys=key)
    assert "JSON" in line
    assert "firstsecret" not in line
    file.write_text('{"secret_key": "sk_test_firstsecret12"}')
    assert "mer_1" in in_process.refused(*given, connector_keys=key)
    unknown = in_process.refused(*given, "--connector", "elsewhere", connector_keys=key)
    assert "stripe" in unknown
