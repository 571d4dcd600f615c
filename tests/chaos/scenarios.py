"""The faults of the campaign; each strikes while calls are under way and ends with its function."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Final

import asyncpg
from redis.asyncio import Redis

from tests.chaos.attack import BadClients
from tests.chaos.clients import FAULTY_TOKENS
from tests.chaos.network import Fault
from tests.chaos.shims import SLOW_SYNC_S
from tests.chaos.trial import TAKEOVER_S, Scenario
from tests.standby import ReplicatedPostgres

if TYPE_CHECKING:
    from tests.chaos.trial import Run

# Calls that are answered between two strikes, at least and at most.
BETWEEN: Final = (10, 90)
DURING: Final = (5, 60)

PARTITIONS: Final = tuple(fault for fault in Fault if fault is not Fault.DUPLICATE)
PSP_OUTAGE_S: Final = 30.0
PSP_OUTAGE_EVERY: Final = 10
"""Of so many faults of the PSP in a run, one is an outage of that length."""

BAD_MESSAGES: Final = 10_000
BAD_MESSAGES_FULL: Final = 500_000
"""Fuzzed messages of a trial; the full campaign has two."""
CLOCK_STEP_S: Final = 300
POOLS_HELD_S: Final = 10.0

_DUMP: Final = "dump.rdb"


def gateway_sigkill(run: Run) -> None:
    """Kill a gateway at any moment; the other one serves meanwhile."""
    run.answers(*BETWEEN)
    number = run.random.randrange(len(run.gateways))
    run.gateways[number].kill()
    run.answers(*DURING)
    run.start(number)


def gateway_sigstop(run: Run) -> None:
    """Stop a gateway until others have taken over what it had begun; then it goes on."""
    run.answers(*BETWEEN)
    number = run.random.randrange(len(run.gateways))
    run.gateways[number].pause()
    run.last(TAKEOVER_S, TAKEOVER_S + 1.5)
    run.gateways[number].resume()


def postgres_sigkill(run: Run) -> None:
    """Kill PostgreSQL with all its processes; it starts again over the same data."""
    run.answers(*BETWEEN)
    killed_s = time.monotonic()
    run.postgres.kill()
    run.last(0, 0.7)
    run.postgres.start()
    run.await_service(killed_s)


def standby_promote(run: Run) -> None:
    """Kill the primary; its synchronous standby takes its place, and gets a standby of its own."""
    pair = run.postgres_for_tests
    assert isinstance(pair, ReplicatedPostgres)
    if not pair.standby.running:
        pair.build_standby()
    run.answers(*BETWEEN)
    killed_s = time.monotonic()
    pair.server.kill()
    pair.promote()
    run.await_service(killed_s)


def redis_sigkill(run: Run) -> None:
    """Kill Redis; the gateways go on without it; it comes back empty."""
    run.answers(*BETWEEN)
    run.redis.kill()
    run.answers(*DURING)
    run.redis.start()


def redis_flush(run: Run) -> None:
    """Empty Redis."""

    async def flush() -> None:
        async with Redis.from_url(run.redis.url) as client:
            await client.flushall()

    run.answers(*DURING)
    asyncio.run(flush())


def redis_restart_old_data(run: Run) -> None:
    """Redis comes back with what it held a while ago: claims since released, answers long given."""

    async def save() -> None:
        async with Redis.from_url(run.redis.url) as client:
            await client.save()

    dump = run.redis.data_dir / _DUMP
    old = run.system.directory / _DUMP
    asyncio.run(save())
    shutil.copyfile(dump, old)
    run.answers(*BETWEEN)
    run.redis.kill()
    run.answers(*DURING)
    shutil.copyfile(old, dump)
    run.redis.start()


def partition(run: Run) -> None:
    """A fault of a network, for one gateway or for both."""
    run.answers(*DURING)
    struck = run.random.choice(((0,), (1,), (0, 1)))
    fault = run.deal("network", PARTITIONS)
    for number in struck:
        run.network(number, fault)
    run.last(0.2, 1.6)
    for number in struck:
        run.network(number, None)


def psp_answers(run: Run) -> None:
    """A PSP that is down, hangs, resets or repeats itself, beside what the tokens ask for."""
    run.answers(*BETWEEN)
    run.psp_faults += 1
    if run.psp_faults % PSP_OUTAGE_EVERY == 0:
        run.psp("down")
        run.last(PSP_OUTAGE_S, PSP_OUTAGE_S)
        run.psp("up")
        return
    mode = run.deal("psp", ("down", "hang", "reset", "duplicate"))
    if mode == "duplicate":
        for number in range(len(run.gateways)):
            run.network(number, Fault.DUPLICATE)
        run.last(0.3, 2)
        for number in range(len(run.gateways)):
            run.network(number, None)
    else:
        run.psp(mode)
        run.last(0.3, 2)
        run.psp("up")


def clocks(run: Run) -> None:
    """Set a clock five minutes forward or back, while calls are under way and a gateway dies.

    Redis's and a gateway's are set right again. PostgreSQL's is set back and right again, or
    forward for good: what was begun by a fast clock is due only when the time has come again.
    """
    shims = run.shims
    assert shims is not None
    whose, step_s = run.deal(
        "clocks",
        [
            (whose, step_s)
            for whose in ("postgres", "redis", "gateway")
            for step_s in (CLOCK_STEP_S, -CLOCK_STEP_S)
        ],
    )
    number = run.random.randrange(len(run.gateways))
    turned = {
        "postgres": shims.postgres,
        "redis": shims.redis,
        "gateway": shims.gateways[number],
    }[whose]
    right_s = turned.clock_offset_s
    run.answers(*BETWEEN)
    turned.set_clock(right_s + step_s)
    run.answers(*DURING)
    run.gateways[number].kill()
    run.answers(*DURING)
    run.start(number)
    run.last(0, TAKEOVER_S)
    if whose != "postgres" or step_s < 0:
        turned.set_clock(right_s)


def disk_slow(run: Run) -> None:
    """Every fsync of PostgreSQL takes longer."""
    assert run.shims is not None
    run.answers(*BETWEEN)
    run.shims.postgres.slow_disk(SLOW_SYNC_S)
    run.answers(*BETWEEN)
    run.last(0.5, 3)
    run.shims.postgres.slow_disk(0)


def disk_full(run: Run) -> None:
    """PostgreSQL's disk has no more room; where that ends it, it is started when there is some."""
    assert run.shims is not None
    run.answers(*BETWEEN)
    run.shims.postgres.fill_disk(full=True)
    run.last(0.5, 3)
    run.shims.postgres.fill_disk(full=False)
    if not run.postgres.running:
        run.postgres.start()


def pools_held(run: Run) -> None:
    """No connection that the gateways hold is answered: every table is locked, or all stopped."""
    run.answers(*BETWEEN)
    if run.deal("pools", ("locked", "stopped")) == "locked":
        tables = ", ".join(
            row["name"]
            for row in run.system.fetch(
                "SELECT format('%I', tablename) AS name FROM pg_tables WHERE schemaname = 'public'"
                " ORDER BY tablename"
            )
        )

        async def hold() -> None:
            connection = await asyncpg.connect(run.system.dsn)
            try:
                async with connection.transaction():
                    await connection.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")
                    await asyncio.sleep(POOLS_HELD_S)
            finally:
                await connection.close()

        while True:
            # Tables are locked one after the other: a statement may be in the way, the other way.
            with contextlib.suppress(asyncpg.DeadlockDetectedError):
                asyncio.run(hold())
                break
    else:
        pids = [
            row["pid"]
            for row in run.system.fetch(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'gateway-%'"
                " AND datname = current_database()"
            )
        ]
        _signal(pids, signal.SIGSTOP)
        try:
            run.last(POOLS_HELD_S, POOLS_HELD_S)
        finally:
            _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, number)


def bad_clients(run: Run) -> None:
    """Attack each gateway, the native one behind the proxy that it is for; see `BadClients`."""
    attack = BadClients(run, BAD_MESSAGES_FULL if run.full else BAD_MESSAGES)
    attack.carry_out()


def rolling_restart(run: Run) -> None:
    """SIGTERM one gateway after the other, each replaced before the next one goes."""
    for number in range(len(run.gateways)):
        run.answers(*BETWEEN)
        status = run.gateways[number].stop()
        assert status == 0, f"a gateway drained with exit status {status}"
        run.answers(*DURING)
        run.start(number)


SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        Scenario("gateway-sigkill", "SIGKILL of a gateway at any moment", gateway_sigkill, 300),
        Scenario(
            "gateway-sigstop",
            "SIGSTOP of a gateway beyond send window, claim and lease; SIGCONT",
            gateway_sigstop,
            50,
        ),
        Scenario(
            "postgres-sigkill",
            "SIGKILL of PostgreSQL, restart over the same data",
            postgres_sigkill,
            100,
        ),
        Scenario(
            "standby-promote",
            "SIGKILL of the primary, promotion of its synchronous standby",
            standby_promote,
            30,
            needs="standby",
        ),
        Scenario("redis-sigkill", "SIGKILL of Redis, restart empty", redis_sigkill, 40),
        Scenario("redis-flush", "FLUSHALL", redis_flush, 30),
        Scenario(
            "redis-restart-old-data",
            "SIGKILL of Redis, restart with what it held earlier",
            redis_restart_old_data,
            30,
        ),
        *(
            Scenario(
                f"partition-{server}",
                f"reset, black hole (each direction and both), half-open, delay and throttle"
                f" between gateways and {title}",
                partition,
                trials,
                behind=server,
            )
            for server, title, trials in (
                ("postgres", "PostgreSQL", 36),
                ("redis", "Redis", 32),
                ("psp", "PSP", 32),
            )
        ),
        Scenario(
            "psp-answers",
            "answers lost before and after charging, late, 500, garbage, twice; PSP down, hanging",
            psp_answers,
            100,
            behind="psp",
            tokens=FAULTY_TOKENS,
        ),
        Scenario(
            "clocks",
            "the clock of PostgreSQL, Redis or a gateway five minutes forward or back",
            clocks,
            20,
            needs="shims",
        ),
        Scenario("disk-slow", "fsync 50 ms slower", disk_slow, 10, needs="shims"),
        Scenario("disk-full", "no room for more on the disk", disk_full, 10, needs="shims"),
        Scenario("pools-held", "no held connection to PostgreSQL answers for 10 s", pools_held, 20),
        Scenario(
            "bad-clients",
            "fuzzed, large, late and cancelled calls, idle connections, resets",
            bad_clients,
            2,
            has_strangers=True,
        ),
        Scenario(
            "rolling-restart",
            "SIGTERM of every gateway in turn; no call may fail",
            rolling_restart,
            50,
            calls_may_fail=False,
        ),
    )
}
