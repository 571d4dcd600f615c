"""`python -m tests.chaos` from outside, and whether the campaign finds faults that are there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.chaos import mutants
from tests.chaos.cli import NO_RESULT, RATE, USAGE, main
from tests.chaos.clients import LoopThread
from tests.chaos.history import History
from tests.chaos.network import DELAY_S, READ_BYTES_MAX, THROTTLE_BYTES_PER_S, Fault, TcpProxy
from tests.chaos.oracle import Rule
from tests.chaos.scenarios import CLOCK_STEP_S, SCENARIOS, redis_flush
from tests.chaos.shims import (
    SLOW_SYNC_S,
    NotPossible,
    open_shims,
    shimmed_postgres,
    shimmed_redis,
)
from tests.chaos.trial import PROFILES, Servers, keep, profile_of, run_trials

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime

    from storage.embedded import EmbeddedRedis
    from tests.chaos.trial import Scenario
    from tests.nursery import Nursery
    from tests.servers import PostgresForTests

LOST_ANSWERS: Final = replace(
    SCENARIOS["psp-answers"], fault=redis_flush, tokens=("tok_visa", "tok_reset_after_charge")
)
"""A PSP that only loses answers: nobody has to wait for a time-out."""
FLUSHES: Final = 6
KILLS: Final = 2
"""Trials of a gateway with a deliberate fault."""
RUN_TIMEOUT_S: Final = 150.0
FIGURES: Final = (
    *("name", "trials", "acked", "lost_acks", "double_charges", "unresolved", "violations"),
    *("recovery_p50_s", "recovery_max_s", "rto_p50_s", "rto_max_s"),
)


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        env=os.environ,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )


def chaos_here(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what starts nothing."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())


def test_a_trial_without_violation_prints_figures_writes_its_summary_and_exits_with_0(
    tmp_path: Path,
) -> None:
    ended = chaos(
        *("--scenario", "gateway-sigkill", "--trials", "1", "--seed", "5"),
        *("--folder", str(tmp_path)),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert set(summary) == {"scenarios", "not_run", "seed", "commit"}
    assert summary["seed"] == 5
    [row] = summary["scenarios"]
    assert tuple(row) == FIGURES
    assert (row["name"], row["trials"]) == ("gateway-sigkill", 1)
    assert row["acked"] > 0
    assert row["lost_acks"] == row["double_charges"] == row["unresolved"] == row["violations"] == 0
    assert row["recovery_max_s"] >= row["recovery_p50_s"] > 0
    assert "gateway-sigkill 1/1: seed 5" in ended.stdout
    assert "no violation" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_options_that_make_no_sense_end_with_2_and_a_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = chaos_here(capsys, "--scenario", "gateway-sigkil")
    assert ended.returncode == USAGE
    assert "no scenario gateway-sigkil; there are gateway-sigkill," in ended.stderr
    assert ended.stdout == ""


def test_help_names_options_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    ended = chaos_here(capsys, "--help")
    assert ended.returncode == 0
    for said in ("--scenario", "--trials", "--seed", "--rate", "--quick", "--list", "exit status"):
        assert said in ended.stdout


@pytest.mark.parametrize(
    ("mutant", "scenario", "trials", "rules"),
    [
        (
            mutants.take_a_doubt_for_a_failure,
            LOST_ANSWERS,
            FLUSHES,
            {Rule.AT_MOST_ONE_CHARGE, Rule.CHARGE_IS_A_SUCCESS, Rule.RESTART_ONLY_WITHOUT_EFFECT},
        ),
        (
            mutants.write_the_intent_after_the_send,
            SCENARIOS["gateway-sigkill"],
            KILLS,
            {Rule.INTENT_BEFORE_SEND, Rule.CHARGE_IS_A_SUCCESS},
        ),
        (
            mutants.answer_before_the_outcome_is_durable,
            SCENARIOS["gateway-sigkill"],
            KILLS,
            {Rule.ACKNOWLEDGED_IS_DURABLE},
        ),
    ],
)
def test_a_gateway_with_a_deliberate_fault_is_found_out_and_its_journals_are_kept(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    nursery: Nursery,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    mutant: Callable[[], None],
    scenario: Scenario,
    trials: int,
    rules: set[Rule],
) -> None:
    target = f"{mutants.__name__}:{mutant.__name__}"
    # On the PSP that charges a second time where it is asked a second time.
    seed = next(
        seed for seed in range(len(PROFILES)) if profile_of(scenario, seed) == "non_idempotent"
    )
    with LoopThread() as loop:
        servers = Servers(postgres, redis, loop, nursery)
        result = run_trials(servers, scenario, seed, rate=RATE, trials=trials, target=target)
    assert rules <= {violation.rule for violation in result.violations}, result.violations
    keep(result, tmp_path)
    assert History.load(tmp_path) == result.history
    again = chaos_here(capsys, "--judge", str(tmp_path))
    assert again.returncode == 1
    assert again.stdout.splitlines()[:-1] == [str(each) for each in result.violations]


def test_a_folder_without_journals_cannot_be_judged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ended = chaos_here(capsys, "--judge", str(tmp_path))
    assert ended.returncode == NO_RESULT
    assert "holds no journals of a trial" in ended.stderr


class Echo:
    """A server behind a proxy, and a connection to it."""

    def __init__(self) -> None:
        self.received = asyncio.Event()
        self.lost = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES_MAX):
                self.received.set()
                writer.write(data)
                await writer.drain()
        self.lost.set()
        writer.transport.abort()

    @contextlib.asynccontextmanager
    async def behind_proxy(
        self,
    ) -> AsyncIterator[tuple[TcpProxy, asyncio.StreamReader, asyncio.StreamWriter]]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        proxy = TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1])
        await proxy.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            self.received.clear()
            yield proxy, reader, writer
        finally:
            writer.transport.abort()
            await proxy.close()
            server.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether nothing but the end of the connection comes."""
    try:
        return await reader.read(READ_BYTES_MAX) == b""
    except ConnectionResetError:
        return True


async def test_a_reset_ends_connections_and_refuses_new_ones_until_it_is_healed() -> None:
    echo = Echo()
    async with echo.behind_proxy() as (proxy, reader, _):
        await proxy.strike(Fault.RESET)
        assert await ended(reader)
        await echo.lost.wait()
        refused, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ended(refused)
        writer.transport.abort()
        await proxy.heal()
        accepted, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"again")
        assert await accepted.readexactly(5) == b"again"
        writer.transport.abort()


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.DROP_REQUESTS, Fault.DROP_ANSWERS])
async def test_what_a_black_hole_holds_back_arrives_when_it_is_healed(fault: Fault) -> None:
    echo, other = Echo(), Echo()
    async with echo.behind_proxy() as (proxy, reader, writer):
        await proxy.strike(fault)
        writer.write(b"again")
        answer = asyncio.ensure_future(reader.readexactly(5))
        if fault is Fault.DROP_ANSWERS:
            await echo.received.wait()
        async with other.behind_proxy():  # time enough for what is not held back
            pass
        assert echo.received.is_set() == (fault is Fault.DROP_ANSWERS)
        assert not answer.done()
        await proxy.heal()
        assert await answer == b"again"


async def test_the_client_of_a_half_open_connection_learns_of_it_at_the_end_only() -> None:
    echo, other = Echo(), Echo()
    async with echo.behind_proxy() as (proxy, reader, writer):
        await proxy.strike(Fault.HALF_OPEN)
        await echo.lost.wait()
        writer.write(b"again")
        end = asyncio.ensure_future(ended(reader))
        async with other.behind_proxy():
            pass
        assert not end.done()
        assert not echo.received.is_set()
        await proxy.heal()
        assert await end


@pytest.mark.parametrize(
    ("fault", "takes_s"),
    # Half of what it is there and back: timers are not exact.
    [(Fault.DELAY, DELAY_S), (Fault.THROTTLE, 10_000 / THROTTLE_BYTES_PER_S)],
)
async def test_a_slow_line_takes_its_time_and_loses_nothing(fault: Fault, takes_s: float) -> None:
    async with Echo().behind_proxy() as (proxy, reader, writer):
        await proxy.strike(fault)
        begun_s = asyncio.get_running_loop().time()
        writer.write(bytes(10_000))
        assert await reader.readexactly(10_000) == bytes(10_000)
        assert asyncio.get_running_loop().time() - begun_s >= takes_s


async def test_a_duplicated_answer_arrives_twice_and_a_request_once() -> None:
    echo = Echo()
    async with echo.behind_proxy() as (proxy, reader, writer):
        await proxy.strike(Fault.DUPLICATE)
        writer.write(b"again")
        assert await reader.readexactly(10) == b"againagain"
        await proxy.heal()
        writer.write(b"once more")
        assert await reader.readexactly(9) == b"once more"


async def test_clock_and_disk_of_a_server_are_turned_and_nobody_else_s() -> None:
    with contextlib.ExitStack() as stack:
        try:
            shims = stack.enter_context(open_shims())
        except NotPossible as error:
            pytest.skip(f"not run: {error}")
        server = stack.enter_context(shimmed_postgres(shims)).server
        cache = stack.enter_context(shimmed_redis(shims))
        connection = await asyncpg.connect(server.dsn)
        shims.postgres.set_clock(CLOCK_STEP_S)
        shims.redis.set_clock(-CLOCK_STEP_S)
        at: datetime = await connection.fetchval("SELECT clock_timestamp()")
        async with Redis.from_url(cache.url) as client:
            seconds, _ = await client.time()
        now_s = time.time()
        assert at.timestamp() - now_s == pytest.approx(CLOCK_STEP_S, abs=CLOCK_STEP_S / 2)
        assert seconds - now_s == pytest.approx(-CLOCK_STEP_S, abs=CLOCK_STEP_S / 2)

        await connection.execute("CREATE TABLE filled (text text)")
        shims.postgres.slow_disk(SLOW_SYNC_S)
        begun_s = time.monotonic()
        await connection.execute("INSERT INTO filled VALUES ('slow')")
        assert time.monotonic() - begun_s >= SLOW_SYNC_S
        shims.postgres.slow_disk(0)

        shims.postgres.fill_disk(full=True)
        with pytest.raises(asyncpg.DiskFullError):
            await connection.execute(
                "INSERT INTO filled SELECT repeat('x', 1000) FROM generate_series(1, 1000)"
            )
        shims.postgres.fill_disk(full=False)
        await connection.execute("INSERT INTO filled VALUES ('room')")
        await connection.close()
