"""The command line against a real database: accounts, migrations, looks, and clear refusals."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from gateway.cli import main
from tests.harness import calling, eventually, reason_of, running_system
from tests.servers import free_port

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests


def _gateway(*arguments: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")
    }
    environment |= {f"GATEWAY_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def _commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for name, command in main.commands.items():
        found.append((name,))
        found += [(name, sub) for sub in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_every_command_has_help_that_says_what_it_does(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    ran = _gateway(*command, "--help", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "usage" in ran.stdout.lower()
    assert len(ran.stdout.splitlines()) > 3


@pytest.mark.parametrize("command", [("migrate",), ("keys", "list"), ("serve",)], ids=" ".join)
def test_without_a_database_the_way_to_one_is_named(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    ran = _gateway(*command, cwd=tmp_path)
    assert ran.returncode == 1
    assert "GATEWAY_POSTGRES_DSN" in ran.stderr
    assert "gateway run" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_database_that_is_away_is_one_clear_line(tmp_path: Path) -> None:
    dsn = f"postgresql://gateway:secret-word@127.0.0.1:{free_port()}/gateway"
    for command in (("migrate",), ("organisations", "list")):
        ran = _gateway(*command, cwd=tmp_path, postgres_dsn=dsn)
        assert ran.returncode == 1
        assert "Traceback" not in ran.stderr
        assert "secret-word" not in ran.stderr


def test_a_setting_that_does_not_exist_is_named_with_its_neighbour(tmp_path: Path) -> None:
    ran = _gateway("migrate", cwd=tmp_path, postgres_dns="x")
    assert ran.returncode == 1
    assert "GATEWAY_POSTGRES_DNS" in ran.stderr
    assert "GATEWAY_POSTGRES_DSN" in ran.stderr


def test_migrate_repeats_harmlessly(postgres: PostgresForTests, tmp_path: Path) -> None:
    dsn = postgres.create_database()
    first = _gateway("migrate", cwd=tmp_path, postgres_dsn=dsn)
    assert (first.returncode, first.stdout.count("applied")) == (0, 2)
    again = _gateway("migrate", cwd=tmp_path, postgres_dsn=dsn)
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")


async def test_accounts_from_creation_to_a_revoked_key(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    with running_system(postgres, redis, auth_cache_life_s=0.05) as system:
        dsn = system.dsn

        def run(*arguments: str) -> str:
            ran = _gateway(*arguments, cwd=tmp_path, postgres_dsn=dsn)
            assert ran.returncode == 0, ran.stderr
            return ran.stdout.strip()

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
        again = _gateway(
            "keys", "revoke", f"key_{key.split('_')[2]}", cwd=tmp_path, postgres_dsn=dsn
        )
        assert again.returncode == 1


async def test_doctor_tells_good_from_bad(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    with running_system(postgres, redis) as system:
        settings = {
            "postgres_dsn": system.dsn,
            "redis_url": system.redis_url,
            "simulator_url": system.simulator.url,
            "listen_address": f"127.0.0.1:{free_port()}",
            "metrics_address": f"127.0.0.1:{free_port()}",
        }
        good = _gateway("doctor", cwd=tmp_path, **settings)
        assert (good.returncode, "BAD" in good.stdout) == (0, False), good.stdout
        settings["redis_url"] = f"redis://127.0.0.1:{free_port()}"
        settings["postgres_dsn"] = postgres.create_database()
        bad = _gateway("doctor", cwd=tmp_path, **settings)
        assert bad.returncode == 1
        complaints = [line for line in bad.stdout.splitlines() if line.startswith("BAD")]
        assert any("Redis" in line for line in complaints)
        assert any("gateway migrate" in line for line in complaints)


async def test_run_brings_everything_keeps_its_data_and_ends_what_it_started(
    tmp_path: Path,
) -> None:
    first = await _run_and_demo(tmp_path)
    assert await _run_and_demo(tmp_path) == first
    state = json.loads((tmp_path / ".local/embedded/local.json").read_text())
    port = int(state["postgres_dsn"].rpartition(":")[2].partition("/")[0])
    await eventually(lambda: not _listens(port), "PostgreSQL has ended")


async def _run_and_demo(directory: Path) -> str:
    """`run` in the directory until the demo has ended; the demo merchant's key."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GATEWAY_")}
    environment["GATEWAY_LISTEN_ADDRESS"] = f"127.0.0.1:{free_port()}"
    environment["GATEWAY_METRICS_ADDRESS"] = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "run"),
        cwd=directory,
        env=environment,
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
        demo = await asyncio.to_thread(_gateway, "demo", cwd=directory)
        assert (demo.returncode, "BAD" in demo.stdout) == (0, False), demo.stdout + demo.stderr
    finally:
        process.terminate()
        assert await process.wait() == 0
    return key


def _listens(port: int) -> bool:
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
