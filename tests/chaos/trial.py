"""A run: two gateways under load, a fault after another, and what the oracle says of the journals.

Each fault, with the wait until all that had been begun is settled, is a trial.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit
from zlib import crc32

import grpc

from gateway.domain.states import UNFINISHED
from storage.embedded import free_port
from tests.chaos.clients import TOKENS, Clients, LoopThread
from tests.chaos.history import History, read_database
from tests.chaos.network import Fault, TcpProxy
from tests.chaos.oracle import LOST_ACKS, Rule, Violation, judge, unresolved
from tests.faults.transports import TRANSPORTS
from tests.harness import Caller, GatewayProcess, System, eventually, running_system
from tests.nursery import SERVE, forking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from storage.embedded import EmbeddedPostgres, EmbeddedRedis
    from tests.chaos.shims import Shims
    from tests.nursery import Nursery
    from tests.servers import PostgresForTests

T = TypeVar("T")

SETTLE_TIMEOUT_S: Final = 60.0
"""When every operation has its definite outcome, counted from the end of a fault."""
ANSWERS_BEFORE: Final = 60
"""Calls that are answered before the first fault."""
ANSWERS_AFTER: Final = 30
"""Calls that are answered after each fault, before the next one."""
SHOWN_MAX: Final = 5
"""Operations that are named where some do not settle."""
RECONNECT_MS_MIN: Final = 50
RECONNECT_MS_MAX: Final = 500
"""The clients look for a gateway that was away so soon again."""
PSP_LATENCY_MS: Final = (20, 150)
"""The median and the 99th percentile, so that calls are at the PSP when a fault strikes."""
PROFILES: Final = ("idempotent", "non_idempotent")
"""The PSPs of the trials in turn, by the seed."""

SETTINGS: Final[dict[str, object]] = {
    # Short, so that a stopped gateway is soon later than all of them.
    "send_window_s": 1,
    "simulator_answer_timeout_s": 1,
    "recover_margin_s": 0.5,
    "claim_life_ms": 1000,
    "recovery_lease_s": 1,
    "wait_s_max": 1,
    "postgres_statement_timeout_s": 3,
    "postgres_connect_timeout_s": 2,
    "trusted_front": True,
}
SERVE_SHIMMED: Final = "tests.chaos.shims:serve"
"""What a gateway's process runs where clocks and disks can be turned."""
TAKEOVER_S: Final = 3.5
"""After so long without a sign of life, all of that has passed, and others have taken over."""

# A doubt may also be about an operation that has its outcome: a success that came late.
_OPEN_SQL: Final = """
SELECT operation_id
FROM operations
WHERE (state = ANY ($1::int2[])
        OR (merchant_id, operation_id) IN (SELECT merchant_id, operation_id FROM doubts))
    AND ($2::text[] IS NULL OR operation_id = ANY ($2))
"""


class Unsettled(Exception):
    """Operations that had been begun before a fault ended have no outcome."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a trial does to the system."""

    name: str
    meaning: str
    fault: Callable[[Run], None]
    trials: int
    """Of the full campaign."""
    needs: str = ""
    """What its servers have beside the usual; see tests.chaos.servers."""
    behind: str = ""
    """Which server the gateways reach through proxies: `postgres`, `redis` or `psp`."""
    tokens: Sequence[str] = TOKENS
    calls_may_fail: bool = True
    has_strangers: bool = False


@dataclass(slots=True)
class Result:
    """What came of a run."""

    scenario: str
    seed: int
    history: History
    trials: int = 0
    """Faults that struck, and after which everything was settled."""
    violations: list[Violation] = field(default_factory=list)
    acked: int = 0
    """Calls whose clients were told of an operation."""
    unresolved: int = 0
    """Operations without a definite outcome."""
    recoveries_s: list[float] = field(default_factory=list)
    """From the end of each fault until all that was begun before had its outcome."""
    outages_s: list[float] = field(default_factory=list)
    """From a server's death until a call that was sent after it was answered, where measured."""
    notes: list[str] = field(default_factory=list)
    """What a scenario has to say of itself."""
    duration_s: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    """Of every try, by the gRPC status' name."""
    logs: list[str] = field(default_factory=list)
    """Of every gateway that ran."""

    @property
    def lost_acks(self) -> int:
        """Violations by which something acknowledged is gone."""
        return sum(each.rule in LOST_ACKS for each in self.violations)

    @property
    def double_charges(self) -> int:
        """Payments and operations with more than one effect."""
        return sum(each.rule is Rule.AT_MOST_ONE_CHARGE for each in self.violations)

    def drop_journals(self) -> None:
        """Keep the figures alone."""
        self.history = History(self.history.profile)
        self.logs = []


@dataclass(slots=True)
class Servers:
    """What all runs share; each has a database of its own."""

    postgres: PostgresForTests
    redis: EmbeddedRedis
    loop: LoopThread
    nursery: Nursery
    shims: Shims | None = None
    """Of servers whose clocks and disks can be turned."""


class Run:
    """What a scenario's fault may do. Every method blocks."""

    def __init__(
        self,
        servers: Servers,
        system: System,
        history: History,
        *,
        scenario: Scenario,
        seed: int,
        rate: float,
        target: str,
        full: bool = False,
    ) -> None:
        self.full = full
        """Whether this is the full campaign, where one trial may take minutes."""
        self.postgres_for_tests = servers.postgres
        self.redis = servers.redis
        self.shims = servers.shims
        self.system = system
        self.random = random.Random(f"{scenario.name}/{seed}")
        self.gateways: list[GatewayProcess] = []
        self.proxies: list[TcpProxy] = []
        """One for each gateway, where the scenario has a server behind them."""
        self.outages_s: list[float] = []
        """See Result."""
        self.notes: list[str] = []
        """See Result."""
        self.psp_faults = 0
        """How many faults of the PSP there were in this run."""
        self._loop = servers.loop
        self._behind = scenario.behind
        self._target = target
        self._ports = [free_port() for _ in TRANSPORTS]
        self._stack = AsyncExitStack()
        self._make_clients = partial(
            Clients,
            history,
            seed=f"{scenario.name}/{seed}",
            rate=rate,
            tokens=scenario.tokens,
        )
        self._clients: Clients | None = None
        self._decks: dict[str, list[Any]] = {}

    @property
    def postgres(self) -> EmbeddedPostgres:
        """The server; of several, the present primary."""
        return self.postgres_for_tests.server

    @property
    def clients(self) -> Clients:
        """The load; there once the gateways run."""
        assert self._clients is not None
        return self._clients

    # --- for scenarios ----------------------------------------------------------------------------

    def answers(self, low: int, high: int) -> None:
        """Wait until a random number of calls more are answered. Raises Stalled."""
        self.clients.await_answers(self.random.randint(low, high))

    def last(self, low_s: float, high_s: float) -> None:
        """Let a fault last for a random time."""
        time.sleep(self.random.uniform(low_s, high_s))

    def await_service(self, since_s: float) -> None:
        """Wait for the answer to a call that is sent from now on; notes the time since then.

        `since_s` is a time of time.monotonic(). Raises Stalled.
        """
        self.clients.await_fresh_answer()
        self.outages_s.append(time.monotonic() - since_s)

    def deal(self, name: str, cards: Iterable[T]) -> T:
        """One of the cards, at random; all of them, before one comes again."""
        deck: list[T] = self._decks.setdefault(name, [])
        if not deck:
            deck.extend(cards)
            self.random.shuffle(deck)
        return deck.pop()

    def start(self, number: int) -> None:
        """Start a gateway, anew on its port, and wait until it serves."""
        target, arguments = self._target, tuple[str, ...]()
        if self.shims is not None:
            assert target == SERVE, "a gateway with a deliberate fault has no shim"
            target, arguments = SERVE_SHIMMED, (str(self.shims.gateways[number].path),)
        gateway = self.system.fork_gateway(
            target,
            *arguments,
            transport=TRANSPORTS[number],
            listen_address=f"127.0.0.1:{self._ports[number]}",
            **self._settings(number),
        )
        self.gateways[number : number + 1] = [gateway]
        assert gateway.address

    def network(self, number: int, fault: Fault | None) -> None:
        """Let a fault strike the way of a gateway to the server behind its proxy; None ends it."""
        proxy = self.proxies[number]
        self._loop.run(proxy.heal() if fault is None else proxy.strike(fault))

    def psp(self, mode: str) -> None:
        """The simulator's mode, docs/simulator.md."""
        self._loop.run(_psp_mode(self.system, mode))

    # --- for `run_trials` -------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Gateways and clients, for as long as the context lasts."""
        try:
            if self._behind:
                self._start_proxies()
            for number in range(len(TRANSPORTS)):
                self.start(number)
            self._loop.run(_slow_psp(self.system))
            self._loop.run(self._connect())
            yield
        finally:
            self._loop.run(self._close())
            # The journals are read when nobody writes any more.
            for gateway in self.system.gateways:
                gateway.end()

    def stop_clients(self) -> None:
        """Let the clients finish what they began."""
        self._loop.run(self.clients.stop())

    def repeat_unanswered(self) -> None:
        """Repeat the calls whose clients do not know their outcome."""
        self._loop.run(self.clients.repeat_unanswered())

    def repeat_answered(self) -> None:
        """Repeat calls that were answered."""
        self._loop.run(self.clients.repeat_answered())

    def settle(self) -> float:
        """Wait until recovery has no work on what was begun before; how long it took, in seconds.

        Raises Unsettled.
        """
        begun_s = time.monotonic()
        begun = self._open(None)

        def is_settled() -> bool:
            return not self._open(begun)

        try:
            asyncio.run(eventually(is_settled, "every outcome is definite", SETTLE_TIMEOUT_S))
        except AssertionError:
            left = ", ".join(self._open(begun)[:SHOWN_MAX])
            raise Unsettled(f"{SETTLE_TIMEOUT_S:g} s after the fault, open: {left}") from None
        return time.monotonic() - begun_s

    def _open(self, among: list[str] | None) -> list[str]:
        """The operations without a definite outcome, or with a doubt about it."""
        rows = self.system.fetch(_OPEN_SQL, sorted(UNFINISHED), among)
        return [row["operation_id"] for row in rows]

    def _start_proxies(self) -> None:
        values = self.system.settings
        address = {
            "postgres": values["GATEWAY_POSTGRES_DSN"],
            "redis": values["GATEWAY_REDIS_URL"],
            "psp": values["GATEWAY_SIMULATOR_URL"],
        }[self._behind]
        url = urlsplit(address)
        assert url.hostname is not None
        assert url.port is not None
        for _ in TRANSPORTS:
            self.proxies.append(TcpProxy(url.hostname, url.port))
            self._loop.run(self.proxies[-1].start())

    def _settings(self, number: int) -> dict[str, object]:
        if not self._behind:
            return {}
        name = {"postgres": "postgres_dsn", "redis": "redis_url", "psp": "simulator_url"}[
            self._behind
        ]
        url = urlsplit(self.system.settings[f"GATEWAY_{name.upper()}"])
        credentials, at, _ = url.netloc.rpartition("@")
        netloc = f"{credentials}{at}127.0.0.1:{self.proxies[number].port}"
        query = "sslmode=disable" if self._behind == "postgres" else url.query
        return {name: urlunsplit((url.scheme, netloc, url.path, query, ""))}

    async def _connect(self) -> None:
        options = [
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS_MIN),
            ("grpc.min_reconnect_backoff_ms", RECONNECT_MS_MIN),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
            # The policy is the clients' own, so that every try is in their journal.
            ("grpc.enable_retries", 0),
        ]
        callers = []
        for port in self._ports:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
            await self._stack.enter_async_context(channel)
            callers.append(Caller(channel, self.system.shop.api_key))
        self._clients = self._make_clients(callers)
        await self._clients.start()

    async def _close(self) -> None:
        if self._clients is not None:
            await self._clients.cancel()
        await self._stack.aclose()
        for proxy in self.proxies:
            await proxy.close()


async def _slow_psp(system: System) -> None:
    control = system.control
    try:
        await control.latency(*PSP_LATENCY_MS)
    finally:
        await control.close()


async def _psp_mode(system: System, mode: str) -> None:
    control = system.control
    try:
        await control.mode(mode)
    finally:
        await control.close()


def profile_of(scenario: Scenario, seed: int) -> str:
    """The PSP's kind: another one for the next seed, and not the same for all scenarios."""
    return PROFILES[(seed + crc32(scenario.name.encode())) % len(PROFILES)]


def run_trials(
    servers: Servers,
    scenario: Scenario,
    seed: int,
    *,
    rate: float,
    trials: int = 1,
    target: str = SERVE,
    full: bool = False,
) -> Result:
    """A run of so many trials. `target` is the function that a gateway's process runs.

    What keeps it from its end is a violation too.
    """
    begun_s = time.monotonic()
    profile = profile_of(scenario, seed)
    history = History(
        profile,
        calls_may_fail=scenario.calls_may_fail,
        has_strangers=scenario.has_strangers,
    )
    result = Result(scenario.name, seed, history)
    with (
        forking(servers.nursery),
        running_system(servers.postgres, servers.redis, profile=profile, **SETTINGS) as system,
    ):
        run = Run(
            servers,
            system,
            history,
            scenario=scenario,
            seed=seed,
            rate=rate,
            target=target,
            full=full,
        )
        try:
            with run.running():
                _carry_out(run, scenario, result, trials)
        except Exception as error:  # noqa: BLE001 - a run that breaks off is judged all the same
            history.broken = f"trial {result.trials + 1}: {type(error).__name__}: {error}"
        finally:
            _make_whole(servers)
        read_database(history, system)
        history.psp = system.simulator.records()
        result.logs = [gateway.log for gateway in system.gateways]
    result.acked = len({each.key for each in history.answers if each.ok})
    result.unresolved = len(unresolved(history))
    result.violations = judge(history)
    result.duration_s = time.monotonic() - begun_s
    return result


def _carry_out(run: Run, scenario: Scenario, result: Result, trials: int) -> None:
    result.statuses = run.clients.statuses
    result.outages_s, result.notes = run.outages_s, run.notes
    run.clients.await_answers(ANSWERS_BEFORE)
    for _ in range(trials):
        scenario.fault(run)
        result.recoveries_s.append(run.settle())
        run.clients.await_answers(ANSWERS_AFTER)
        result.trials += 1
    run.stop_clients()
    run.settle()
    run.repeat_unanswered()
    run.settle()
    run.repeat_answered()


def _make_whole(servers: Servers) -> None:
    """The next run finds its servers as they should be."""
    if servers.shims is not None:
        servers.shims.reset()
    for server in (servers.postgres.server, servers.redis):
        if server.running:
            server.resume()
        else:
            server.start()


def keep(result: Result, folder: Path) -> None:
    """Write a run's journals and violations into a directory. Raises OSError."""
    if folder.exists():
        shutil.rmtree(folder)
    result.history.save(folder)
    (folder / "violations.txt").write_text(
        "".join(f"{violation}\n" for violation in result.violations), "utf-8"
    )
    for number, log in enumerate(result.logs):
        (folder / f"gateway-{number}.log").write_text(log, "utf-8")
