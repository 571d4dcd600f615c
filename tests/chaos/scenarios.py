"""The faults of the campaign; each strikes while calls are under way and ends with its function."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Final

from redis.asyncio import Redis

from tests.chaos.clients import FAULTY_TOKENS
from tests.chaos.network import Fault
from tests.chaos.trial import TAKEOVER_S, Scenario

if TYPE_CHECKING:
    from tests.chaos.trial import Trial

KILLS: Final = 2
"""How often a trial kills, stops or restarts."""
ROUNDS: Final = 2
"""How often every gateway is restarted in turn."""

# Calls that are answered between two strikes, at least and at most.
BETWEEN: Final = (10, 90)
DURING: Final = (5, 60)

_DUMP: Final = "dump.rdb"


def gateway_sigkill(trial: Trial) -> None:
    """Kill one gateway after the other, at any moment; the other one serves meanwhile."""
    for _ in range(KILLS):
        trial.answers(*BETWEEN)
        number = trial.random.randrange(len(trial.gateways))
        trial.gateways[number].kill()
        trial.answers(*DURING)
        trial.start(number)


def gateway_sigstop(trial: Trial) -> None:
    """Stop a gateway until others have taken over what it had begun; then it goes on."""
    trial.answers(*BETWEEN)
    number = trial.random.randrange(len(trial.gateways))
    trial.gateways[number].pause()
    trial.last(TAKEOVER_S, TAKEOVER_S + 1.5)
    trial.gateways[number].resume()


def postgres_sigkill(trial: Trial) -> None:
    """Kill PostgreSQL with all its processes; it starts again over the same data."""
    for _ in range(KILLS):
        trial.answers(*BETWEEN)
        trial.postgres.kill()
        trial.last(0, 0.7)
        trial.postgres.start()


def redis_sigkill(trial: Trial) -> None:
    """Kill Redis; the gateways go on without it; it comes back empty."""
    for _ in range(KILLS):
        trial.answers(*BETWEEN)
        trial.redis.kill()
        trial.answers(*DURING)
        trial.redis.start()


def redis_flush(trial: Trial) -> None:
    """Empty Redis several times."""

    async def flush() -> None:
        async with Redis.from_url(trial.redis.url) as client:
            await client.flushall()

    for _ in range(3 * KILLS):
        trial.answers(*DURING)
        asyncio.run(flush())


def redis_restart_old_data(trial: Trial) -> None:
    """Redis comes back with what it held a while ago: claims since released, answers long given."""

    async def save() -> None:
        async with Redis.from_url(trial.redis.url) as client:
            await client.save()

    dump = trial.redis.data_dir / _DUMP
    old = trial.system.directory / _DUMP
    asyncio.run(save())
    shutil.copyfile(dump, old)
    for _ in range(KILLS):
        trial.answers(*BETWEEN)
        trial.redis.kill()
        trial.answers(*DURING)
        shutil.copyfile(old, dump)
        trial.redis.start()


def partition(trial: Trial) -> None:
    """Every fault of a network in random order, for one gateway or for both."""
    faults = list(Fault)
    trial.random.shuffle(faults)
    for fault in faults:
        trial.answers(*DURING)
        struck = trial.random.choice(((0,), (1,), (0, 1)))
        for number in struck:
            trial.network(number, fault)
        trial.last(0.2, 1.6)
        for number in struck:
            trial.network(number, None)


def psp_answers(trial: Trial) -> None:
    """A PSP that is down, hangs and resets, beside the wrong answers that the tokens ask for."""
    modes = ["down", "hang", "reset"]
    trial.random.shuffle(modes)
    for mode in modes:
        trial.answers(*BETWEEN)
        trial.psp(mode)
        trial.last(0.3, 2)
        trial.psp("up")


def rolling_restart(trial: Trial) -> None:
    """SIGTERM one gateway after the other, each replaced before the next one goes."""
    for _ in range(ROUNDS):
        for number in range(len(trial.gateways)):
            trial.answers(*BETWEEN)
            status = trial.gateways[number].stop()
            assert status == 0, f"a gateway drained with exit status {status}"
            trial.answers(*DURING)
            trial.start(number)


SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        Scenario("gateway-sigkill", "SIGKILL of a gateway at any moment", gateway_sigkill),
        Scenario(
            "gateway-sigstop",
            "SIGSTOP of a gateway beyond send window, claim and lease; SIGCONT",
            gateway_sigstop,
        ),
        Scenario(
            "postgres-sigkill",
            "SIGKILL of PostgreSQL, restart over the same data",
            postgres_sigkill,
        ),
        Scenario("redis-sigkill", "SIGKILL of Redis, restart empty", redis_sigkill),
        Scenario("redis-flush", "FLUSHALL", redis_flush),
        Scenario(
            "redis-restart-old-data",
            "SIGKILL of Redis, restart with what it held earlier",
            redis_restart_old_data,
        ),
        *(
            Scenario(
                f"partition-{server}",
                f"reset, black hole (each direction and both), half-open, delay and throttle"
                f" between gateways and {title}",
                partition,
                behind=server,
            )
            for server, title in (("postgres", "PostgreSQL"), ("redis", "Redis"), ("psp", "PSP"))
        ),
        Scenario(
            "psp-answers",
            "answers lost before and after charging, late, 500, garbage; PSP down, hanging",
            psp_answers,
            tokens=FAULTY_TOKENS,
        ),
        Scenario(
            "rolling-restart",
            "SIGTERM of every gateway in turn; no call may fail",
            rolling_restart,
            calls_may_fail=False,
        ),
    )
}
