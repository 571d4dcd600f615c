"""The faults of the campaign; each strikes while calls are under way and ends with its function."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import TYPE_CHECKING, Final

from redis.asyncio import Redis

from tests.chaos.clients import FAULTY_TOKENS
from tests.chaos.network import Fault
from tests.chaos.trial import TAKEOVER_S, Scenario

if TYPE_CHECKING:
    from tests.chaos.trial import Run

# Calls that are answered between two strikes, at least and at most.
BETWEEN: Final = (10, 90)
DURING: Final = (5, 60)

PARTITIONS: Final = tuple(fault for fault in Fault if fault is not Fault.DUPLICATE)
PSP_OUTAGE_S: Final = 30.0
PSP_OUTAGE_EVERY: Final = 10
"""Of so many faults of the PSP in a run, one is an outage of that length."""

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
            "rolling-restart",
            "SIGTERM of every gateway in turn; no call may fail",
            rolling_restart,
            50,
            calls_may_fail=False,
        ),
    )
}
