"""One history from a seed: gateways, servers, clients and faults, and what the oracle says."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import orjson
from payments.v1 import payment_pb2

from gateway.application.ports import StoreUnavailable
from gateway.connectors.simulator.profiles import find_profile
from gateway.domain.model import OperationKind
from gateway.domain.states import UNFINISHED
from tests.chaos.clients import FAULTY_TOKENS, TOKENS
from tests.chaos.history import AMOUNTS, RESPONSES, History, digest_of, told_by
from tests.chaos.oracle import Violation, judge
from tests.simulation.accounts import Account, rules_of, suspension_of
from tests.simulation.clients import Clients
from tests.simulation.clock import simulated_sources
from tests.simulation.database import POSTGRES, Database
from tests.simulation.gateway import MERCHANT, TAKEOVER_S, Gateway
from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import Network, Weather
from tests.simulation.notifications import Notifier
from tests.simulation.people import People
from tests.simulation.psp import PSP, PspServer
from tests.simulation.redis import REDIS, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from gateway.application.notifications import Received
    from gateway.application.ports import Resolution
    from gateway.connectors.simulator.profiles import Profile
    from gateway.domain.model import Operation
    from gateway.routing.availability import AccountAvailability
    from tests.chaos.history import Row
    from tests.simulation.clients import Looked
    from tests.simulation.gateway import Told
    from tests.simulation.loop import Process

PROFILES: Final = (
    *("idempotent",) * 4,
    *("non_idempotent",) * 4,
    *("cancel_only",) * 2,
    "no_query",
)
"""The kinds of PSP, as often as they are drawn. `key_2s` is not among them: its key is valid for
less time than a message may take here, which the connector says it cannot live with."""
GATEWAYS: Final = (2, 3)
PAYMENTS_MAX: Final = 3
FAULTS_MAX: Final = 4
SETTLE_S: Final = 60.0
"""When every operation has its definite outcome, after the last fault."""
CLOCK_STEP_S: Final = (-8.0, 8.0)
LOOK_S: Final = 0.5
ACCOUNTS: Final = (1, 1, 1, 2, 2, 3)
"""How many accounts the merchant has, as often as they are drawn."""
FURTHER_PROFILES: Final = ("idempotent", "non_idempotent", "cancel_only")
REDIRECTS_SHARE: Final = 0.4
"""Histories in which customers are sent elsewhere."""
NOTIFIES_SHARE: Final = 0.3
TELLS_SHARE: Final = 0.25
"""Accounts whose PSP tells what it does; and those that tell some things in no other way."""
CROWDS_SHARE: Final = 0.25
"""Histories in which operations of all kinds act on a payment at once, and some are declined."""
REFUSING_TOKENS: Final = tuple(
    f"tok_{kind}_{name}"
    for kind in ("capture", "refund", "void", "increment")
    for name in ("declined", "pending_declined")
)
"""With these, captures and the like are declined, at once or later."""
BOUNCING_TOKENS: Final = ("tok_refund_bounces",) * 2
PEOPLE_SHARE: Final = 0.25
"""Histories in which persons end doubts; and thrice as many of those where recovery cannot."""
PSP_AWAY_SHARE: Final = 0.7
PSP_AWAY_AT_S: Final = (0.5, 4.0)
PSP_AWAY_S: Final = (14.0, 25.0)
DISPUTES_SHARE: Final = 0.4
"""PSPs that notify whose customers dispute what was charged."""
PARTIALS_SHARE: Final = 0.2
"""Histories in which PSPs approve less than was asked for, which some callers allow."""
PARTIAL_TOKEN: Final = "tok_partial_approval"
GATEWAYS_ADDRESS: Final = "gateways"
"""The gateways, as PSPs reach them."""
NOTIFICATION_TIMEOUT_S: Final = 2.0
DECISION_TIMEOUT_S: Final = 10.0

T = TypeVar("T")


@dataclass(slots=True)
class Result:
    """What came of a history."""

    seed: int
    history: History
    violations: list[Violation]
    trace: str
    """A digest of every step and of the journals: equal for equal histories."""
    steps: int
    simulated_s: float
    faults: list[str] = field(default_factory=list)
    acked: int = 0


class World:
    """Everything in a history."""

    def __init__(self, loop: SimulatedLoop, seed: int) -> None:
        self.loop = loop
        self.draw = random.Random(f"world/{seed}")
        self._more = random.Random(f"accounts/{seed}")
        first = find_profile(self.draw.choice(PROFILES))
        self.history = History(first.name)
        self.faults: list[str] = []
        servers = loop.spawn("servers")
        self.network = Network(loop, random.Random(f"network/{seed}"), servers)
        self.database = Database(loop, TAKEOVER_S)
        self.redis = RedisServer(loop)
        self.accounts: list[Account] = []
        self.notifiers: list[Notifier] = []
        self._open_accounts(first, seed)
        self.servers = (POSTGRES, REDIS, *(each.name for each in self.accounts))
        self.gateways: list[Gateway] = []
        self._at_home = loop.spawn("clients")
        tokens: Sequence[str] = TOKENS if self.draw.random() < 0.5 else FAULTY_TOKENS
        profiles = [each.profile for each in self.accounts]
        crowds = random.Random(f"crowds/{seed}")
        has_crowds = crowds.random() < CROWDS_SHARE
        if has_crowds:
            tokens = [*tokens, *REFUSING_TOKENS]
        partials = random.Random(f"partials/{seed}")
        has_partials = partials.random() < PARTIALS_SHARE
        if has_partials:
            tokens = [*tokens, *[PARTIAL_TOKEN] * (len(tokens) // 3)]
        if not all(each.query_by_reference for each in profiles):
            # Where the PSP cannot be asked, it cannot tell later.
            tokens = [each for each in tokens if "pending" not in each]
        tokens = [each for each in tokens if "oversized" not in each]
        redirects = self.history.settles and self._more.random() < REDIRECTS_SHARE
        if redirects and all(each.query_by_reference for each in profiles):
            tokens = [*tokens, "tok_requires_action"]
        if all(each.notifies for each in self.accounts):
            tokens = [*tokens, *BOUNCING_TOKENS]
        count = self.draw.choice(GATEWAYS)
        self.clients = Clients(
            self.history,
            self._send,
            seed=seed,
            gateways=count,
            tokens=tokens,
            may_cancel=self.history.settles,
            # A PSP that can neither be asked nor repeats by reference cannot settle a doubtful void
            # of a remainder, or an increment that a void has met: such a doubt stays one.
            settles_remainders=all(
                each.query_by_reference or each.idempotent_by_reference for each in profiles
            ),
            look=self._look if redirects or len(self.accounts) > 1 or self.notifiers else None,
            accounts=len(self.accounts),
            visit=self._visit if redirects else None,
            crowds=crowds if has_crowds else None,
            partials=partials if has_partials else None,
        )
        self._people_draw = drawn = random.Random(f"people/{seed}")
        share = PEOPLE_SHARE if self.history.settles else 3 * PEOPLE_SHARE
        self.history.has_people = drawn.random() < share
        self._people = People(self.history, self.database, drawn, self._decide, lambda: loop.now_s)
        self._rules = rules_of(self.accounts) if len(self.accounts) > 1 else ""
        for number in range(count):
            self._start(number)

    def _open_accounts(self, first: Profile, seed: int) -> None:
        """The merchant's accounts, each with a PSP, some of which tell what they do."""
        more, loop = self._more, self.loop
        count = more.choice(ACCOUNTS) if first.query_by_reference else 1
        for number in range(1, count + 1):
            profile = first if number == 1 else find_profile(more.choice(FURTHER_PROFILES))
            drawn = more.random()
            tells = drawn < TELLS_SHARE and profile.idempotent_by_reference
            tells = tells and profile.query_by_reference
            name = PSP if number == 1 else f"{PSP}-{number}"
            account_id = f"account-{number}"
            psp: PspServer = loop.root.context.run(
                PspServer,
                loop,
                loop.spawn(name),
                account_id,
                profile,
                self.history.psp,
                random.Random(f"{name}/{seed}"),
            )
            account = Account(account_id, name, profile, psp, tells=tells)
            account.notifies = tells or drawn < TELLS_SHARE + NOTIFIES_SHARE
            if account.notifies:
                draw = random.Random(f"notifications/{account_id}/{seed}")
                disputes = random.Random(f"disputes/{account_id}/{seed}")
                notifier = Notifier(
                    loop,
                    account,
                    MERCHANT,
                    draw,
                    self._delivery(psp),
                    disputes if disputes.random() < DISPUTES_SHARE else None,
                    self.history.disputes,
                )
                psp.on_record(notifier.told)
                self.notifiers.append(notifier)
            self.accounts.append(account)
            self.history.profiles[account_id] = profile.name

    def _start(self, number: int) -> None:
        process = self.loop.spawn(f"gateway-{number}")
        gateway: Gateway = process.context.run(
            Gateway,
            self.loop,
            process,
            self.network,
            self.database,
            self.redis,
            self.accounts,
            self._rules,
        )
        self.gateways[number : number + 1] = [gateway]
        self.loop.start(process, gateway.run())

    # --- calls ------------------------------------------------------------------------------------

    async def _send(
        self, number: int, kind: OperationKind, message: bytes, timeout_s: float
    ) -> Told:
        """A client's try: what it is told. Runs in the clients' process."""
        loop, network = self.loop, self.network
        here, there = self._at_home.context, self.gateways[number].process
        gateway = self.gateways[number]
        told: asyncio.Future[Told] = loop.create_future()
        deadline = loop.now_s + timeout_s
        running: list[asyncio.Task[Any]] = []

        def tell(answer: Told) -> None:
            if not told.done():
                told.set_result(answer)

        def hang_up() -> None:
            loop.call_later(network.latency_s(), tell, ("UNAVAILABLE", "", b""), context=here)

        async def serve() -> None:
            answer = await gateway.serve(kind, message, deadline)
            # An answer on its way is lost with its sender.
            loop.call_later(network.latency_s(), arrive_back, answer, context=here)

        def arrive_back(answer: Told) -> None:
            if there.alive:
                tell(answer)

        def arrive() -> None:
            if not there.alive:
                hang_up()
                return
            there.at_end.append(hang_up)
            running.append(loop.start(there, serve()))

        loop.call_later(network.latency_s(), arrive, context=loop.root.context)
        try:
            async with asyncio.timeout(timeout_s):
                return await told
        except TimeoutError:
            loop.call_later(network.latency_s(), _cancel, running, context=there.context)
            return "DEADLINE_EXCEEDED", "", b""

    async def _look(self, number: int, operation_id: str, timeout_s: float) -> Looked | None:
        """What a gateway says of an operation now; None without an answer."""
        gateway = self.gateways[number]
        return await self._ask(gateway, lambda: gateway.look(operation_id), timeout_s)

    async def _decide(self, operation_id: str, decision: Resolution) -> str | None:
        """What a gateway says of a person's decision; None without an answer."""
        gateway = self.gateways[self._people_draw.randrange(len(self.gateways))]
        return await self._ask(
            gateway, lambda: gateway.decide(operation_id, decision), DECISION_TIMEOUT_S
        )

    async def _ask(
        self, gateway: Gateway, serve: Callable[[], Coroutine[Any, Any, T]], timeout_s: float
    ) -> T | None:
        """What a gateway says, over a way without faults; None without an answer."""
        loop, network = self.loop, self.network
        here, there = self._at_home.context, gateway.process
        told: asyncio.Future[T] = loop.create_future()

        async def run() -> None:
            answer = await serve()
            loop.call_later(network.latency_s(), arrive_back, answer, context=here)

        def arrive_back(answer: T) -> None:
            if there.alive and not told.done():
                told.set_result(answer)

        def arrive() -> None:
            if there.alive:
                loop.start(there, run())

        loop.call_later(network.latency_s(), arrive, context=loop.root.context)
        try:
            async with asyncio.timeout(timeout_s):
                return await told
        except TimeoutError:
            return None

    async def _visit(self, page: str, chosen: str) -> None:
        """A customer presses a button on a PSP's page."""
        path = page.removeprefix("http://psp")
        transaction_id = path.rpartition("/")[2]
        for account in self.accounts:
            if account.psp.ledger.visited(transaction_id) is not None:
                await asyncio.sleep(self.network.latency_s())
                account.psp.serve("POST", f"{path}/{chosen}", b"", lambda _: None)

    def _delivery(self, psp: PspServer) -> Callable[[Received], Coroutine[Any, Any, bool]]:
        """How a PSP takes a notification to a gateway."""
        loop, network, process = self.loop, self.network, psp.process

        async def deliver(received: Received) -> bool:
            gateway = self.gateways[self._more.randrange(len(self.gateways))]
            there = gateway.process
            kept: asyncio.Future[bool] = loop.create_future()
            fate, there_s, back_s = network.fate(process, GATEWAYS_ADDRESS)

            async def serve() -> None:
                is_kept = await gateway.receive(received)
                if fate == "good":
                    loop.call_later(back_s, tell, is_kept, context=process.context)

            def tell(is_kept: bool) -> None:
                if there.alive and not kept.done():
                    kept.set_result(is_kept)

            def arrive() -> None:
                if there.alive:
                    loop.start(there, serve())

            if fate in ("good", "answer_lost", "late"):
                late_s = back_s if fate == "late" else 0
                loop.call_later(there_s + late_s, arrive, context=loop.root.context)
            try:
                async with asyncio.timeout(NOTIFICATION_TIMEOUT_S):
                    return await kept
            except TimeoutError:
                return False

        return deliver

    # --- the course of a history ------------------------------------------------------------------

    async def run(self) -> None:
        """Calls under faults, then rest, then every call again."""
        loop, clients = self.loop, self.clients
        shopping = loop.start(self._at_home, clients.shop(self.draw.randint(1, PAYMENTS_MAX)))
        striking = asyncio.create_task(self._strike())
        self._people.over = not self.history.has_people
        seeing_to_doubts = loop.start(self._at_home, self._people.work())
        await asyncio.wait([shopping])
        shopping.result()
        await striking
        self._mend()
        await self._settle()
        for again in (clients.repeat_unanswered, clients.repeat_answered):
            repeating = loop.start(self._at_home, again())
            await asyncio.wait([repeating])
            repeating.result()
            await self._settle()
        self._people.over = True
        await asyncio.wait([seeing_to_doubts])
        seeing_to_doubts.result()
        looking = loop.start(self._at_home, clients.look_at_all())
        await asyncio.wait([looking])
        looking.result()
        await self._settle()  # a PSP may have decided meanwhile, and told it

    async def _settle(self) -> None:
        until = self.loop.now_s + SETTLE_S + abs(self.database.step_s)
        settles = self.history.settles or self.history.has_people
        quiet_s = SETTLE_S if settles else 3 * TAKEOVER_S
        until = min(until, self.loop.now_s + quiet_s + abs(self.database.step_s))
        while self._open() and self.loop.now_s < until:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(LOOK_S)

    def _open(self) -> bool:
        operations = self.database.operations.values()
        return (
            bool(self.database.doubts)
            or bool(self.untold())
            or any(
                operation.state in UNFINISHED and operation.kind is not OperationKind.DISPUTE
                for operation in operations
            )
        )

    def untold(self) -> int:
        """Notifications that are on their way, or kept and not applied."""
        on_the_way = sum(each.undelivered for each in self.notifiers)
        return on_the_way + len(self.database.notifications.rows)

    # --- faults -----------------------------------------------------------------------------------

    async def _strike(self) -> None:
        draw = self.draw
        if draw.random() < 0.5:
            for server in self.servers:
                self._weather(server, draw.random() * 0.15)
            self.faults.append("weather")
        if self.notifiers:
            share = self._more.random() * 0.3
            self.network.weather[GATEWAYS_ADDRESS] = Weather(
                *(share * self._more.random() for _ in range(5))
            )
        kinds: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            *(self._crash,) * 4,
            *(self._pause,) * 3,
            *(self._cut,) * 2,
            *(self._storm,) * 2,
            self._postgres_crash,
            self._postgres_failover,
            self._postgres_lossy_failover,
            *(self._postgres_clock,) * 2,
            self._redis,
            self._psp_mode,
        )
        if len(self.accounts) > 1:
            kinds += (self._psp_mode, self._account_disabled, self._account_missing, self._killed)
        struck = [draw.choice(kinds)() for _ in range(draw.randint(0, FAULTS_MAX))]
        if self.history.has_people and self._people_draw.random() < PSP_AWAY_SHARE:
            struck.append(self._psp_away())
        await asyncio.gather(*struck)

    def _weather(self, server: str, share: float) -> None:
        draw = self.draw
        self.network.weather[server] = Weather(*(share * draw.random() for _ in range(5)))

    async def _moment(self) -> None:
        await asyncio.sleep(self.draw.random() * 2.5)

    def _victim(self) -> tuple[int, Process]:
        number = self.draw.randrange(len(self.gateways))
        return number, self.gateways[number].process

    async def _at_a_step(self, process: Process, strike: Callable[[], None]) -> None:
        """Strike before one of the process's next steps, wherever it is then."""
        done = self.loop.create_future()

        def struck() -> None:
            strike()
            if not done.done():
                done.set_result(None)

        process.strike_at = process.steps + int(2 ** (self.draw.random() * 8.5))
        process.strike = struck
        process.at_end.append(struck_anyhow := _once(done))
        await done
        process.at_end.remove(struck_anyhow)

    async def _crash(self) -> None:
        await self._moment()
        number, process = self._victim()
        if not process.alive or process.strike_at is not None:
            return
        self.faults.append(f"SIGKILL {process.name} at {self.loop.now_s:.3f}")
        await self._at_a_step(process, process.kill)
        await self._restart_later(number, process)

    async def _restart_later(self, number: int, process: Process) -> None:
        await asyncio.sleep(self.draw.random() * 3)
        if self.gateways[number].process is process and not process.alive:
            self._start(number)

    async def _pause(self) -> None:
        await self._moment()
        _, process = self._victim()
        if not process.alive or process.paused or process.strike_at is not None:
            return

        def stop() -> None:
            process.paused = True

        self.faults.append(f"SIGSTOP {process.name} at {self.loop.now_s:.3f}")
        await self._at_a_step(process, stop)
        await asyncio.sleep(self.draw.random() * 6)
        process.paused = False

    async def _cut(self) -> None:
        await self._moment()
        _, process = self._victim()
        server, how = self.draw.choice(self.servers), self.draw.choice(("reset", "hole"))
        self.faults.append(f"{process.name} to {server}: {how} at {self.loop.now_s:.3f}")
        self.network.cut(process, server, how)
        await asyncio.sleep(self.draw.random() * 4)
        self.network.cut(process, server, None)

    async def _storm(self) -> None:
        await self._moment()
        server = self.draw.choice(self.servers)
        self.faults.append(f"storm before {server} at {self.loop.now_s:.3f}")
        before = self.network.weather.get(server, Weather())
        self._weather(server, 1.0)
        await asyncio.sleep(self.draw.random() * 2)
        self.network.weather[server] = before

    async def _postgres_crash(self) -> None:
        await self._moment()
        self.faults.append(f"SIGKILL postgres at {self.loop.now_s:.3f}")
        self.database.crash()
        await asyncio.sleep(self.draw.random() * 3)
        self.database.up = True

    async def _postgres_failover(self) -> None:
        await self._moment()
        self.faults.append(f"failover at {self.loop.now_s:.3f}")
        self.database.fail_over()

    async def _postgres_lossy_failover(self) -> None:
        """A site is lost with its gateways, and the standby lacks a commit that nobody was told of.

        Redis, elsewhere, holds the answer that was committed.
        """
        await self._moment()
        loop, database = self.loop, self.database
        lost: asyncio.Future[None] = loop.create_future()

        def cached(response: bytes) -> None:
            if lost.done() or not database.outbox:
                return
            event = payment_pb2.PaymentEvent.FromString(database.outbox[-1].payload)
            operation_id = event.operation.operation_id
            payment, clients = event.payment, self.clients
            if operation_id in clients.told or operation_id.encode() not in response:
                return
            # Nor was its payment shown as it is by then, with another operation.
            if payment.version <= clients.versions.get(payment.payment_id, 0):
                return
            if not database.forget_last(event.event_id):
                return
            lost.set_result(None)
            for gateway in self.gateways:
                gateway.process.kill()
            database.fail_over()

        self.redis.on_frozen = cached
        await asyncio.wait([lost], timeout=self.draw.random() * 3)
        self.redis.on_frozen = None
        if lost.done():
            self.faults.append(f"failover without the last commit at {loop.now_s:.3f}")
            await asyncio.gather(
                *(
                    self._restart_later(number, gateway.process)
                    for number, gateway in enumerate(list(self.gateways))
                )
            )
        else:
            lost.cancel()

    async def _postgres_clock(self) -> None:
        await self._moment()
        step_s = self.draw.uniform(*CLOCK_STEP_S)
        self.faults.append(f"clock of postgres {step_s:+.1f} s at {self.loop.now_s:.3f}")
        self.database.step_s += step_s
        self.database.stepped_s += abs(step_s)

    async def _redis(self) -> None:
        await self._moment()
        draw, redis = self.draw, self.redis
        kind = draw.choice(("flush", "empty", "old", "clock"))
        self.faults.append(f"redis {kind} at {self.loop.now_s:.3f}")
        if kind == "flush":
            redis.flush()
        elif kind == "clock":
            redis.step_s += draw.uniform(*CLOCK_STEP_S)
        else:
            redis.save()
            await asyncio.sleep(draw.random())
            redis.up = False
            await asyncio.sleep(draw.random() * 2)
            redis.restart(old_data=kind == "old")

    async def _psp_mode(self) -> None:
        await self._moment()
        mode = self.draw.choice(("down", "hang", "reset"))
        account = self.accounts[0] if len(self.accounts) == 1 else self.draw.choice(self.accounts)
        self.faults.append(f"{account.name} {mode} at {self.loop.now_s:.3f}")
        account.psp.set_mode(mode)
        await asyncio.sleep(self.draw.random() * 3)
        account.psp.set_mode("up")

    async def _psp_away(self) -> None:
        """A PSP does not answer for so long that people look into its console."""
        draw = self._people_draw
        await asyncio.sleep(draw.uniform(*PSP_AWAY_AT_S))
        account = draw.choice(self.accounts)
        mode = draw.choice(("down", "hang", "reset", "mute", "mute", "mute"))
        self.faults.append(f"{account.name} {mode} for long at {self.loop.now_s:.3f}")
        if mode == "mute":  # it does what it is told to, and its answers are lost
            self.network.weather[account.name] = Weather(answer_lost=1.0)
        else:
            account.psp.set_mode(mode)
        await asyncio.sleep(draw.uniform(*PSP_AWAY_S))
        account.psp.set_mode("up")
        self.network.weather.pop(account.name, None)

    async def _account_disabled(self) -> None:
        await self._moment()
        account = self.draw.choice(self.accounts)
        self.faults.append(f"{account.account_id} disabled at {self.loop.now_s:.3f}")
        account.enabled = False
        await asyncio.sleep(self.draw.random() * 3)
        account.enabled = True

    async def _account_missing(self) -> None:
        """A gateway does not know an account, as one that was just added, or is removed."""
        await self._moment()
        number, _ = self._victim()
        account_id = self.draw.choice(self.accounts).account_id
        gateway = self.gateways[number]
        self.faults.append(f"{account_id} missing at {number} at {self.loop.now_s:.3f}")
        gateway.router.missing.add(account_id)
        await asyncio.sleep(self.draw.random() * 3)
        gateway.router.missing.discard(account_id)

    async def _killed(self) -> None:
        """A person switches an account off, and on again."""
        await self._moment()
        account = self.draw.choice(self.accounts)
        self.faults.append(f"{account.account_id} switched off at {self.loop.now_s:.3f}")
        self._suspend([account])
        await asyncio.sleep(self.draw.random() * 3)
        self._suspend([])

    def _suspend(self, accounts: Sequence[Account]) -> None:
        for gateway in self.gateways:
            availability = cast("AccountAvailability", gateway.routing._availability)
            availability.suspend([suspension_of(each) for each in accounts], self.loop.now_s)

    def _mend(self) -> None:
        self.network.mend()
        self.database.up = self.redis.up = True
        for account in self.accounts:
            account.psp.set_mode("up")
            account.enabled = True
        self._suspend([])
        for number, gateway in enumerate(list(self.gateways)):
            gateway.process.paused = False
            gateway.process.strike_at = None
            gateway.router.missing.clear()
            if not gateway.process.alive:
                self._start(number)


def _once(done: asyncio.Future[None]) -> Callable[[], None]:
    def end() -> None:
        if not done.done():
            done.set_result(None)

    return end


def _cancel(running: list[asyncio.Task[Any]]) -> None:
    for task in running:
        task.cancel()


# --- the journals ---------------------------------------------------------------------------------


def approved_of(operation: Operation) -> int:
    """Of an authorization, what its PSP approved: less than was asked for, maybe."""
    outcome = operation.attempt.outcome
    told = outcome.amount_reported_minor if outcome is not None else None
    if operation.kind is not OperationKind.AUTHORIZE or told is None:
        return operation.amount_minor
    return told


def _operation_row(operation: Operation) -> Row:
    digest = ""
    if operation.response is not None:
        digest = digest_of(RESPONSES[operation.kind].FromString(operation.response))
    return {
        "operation_id": operation.operation_id,
        "payment_id": operation.payment_id,
        "idempotency_key": operation.idempotency_key,
        "kind": int(operation.kind),
        "origin": int(operation.origin),
        "state": int(operation.state),
        "amount_minor": operation.amount_minor,
        "currency": operation.currency,
        "approved_minor": approved_of(operation),
        "epoch": operation.epoch,
        "attempt_number": operation.attempt.number,
        "parent_operation_id": operation.parent_operation_id,
        "allocations": [list(each) for each in operation.allocations],
        "connector_account_id": operation.attempt.connector_account_id,
        "connector_transaction_id": operation.attempt.connector_transaction_id,
        "digest": digest,
    }


_PAYMENT_COLUMNS: Final = (
    *("payment_id", "version", "state", "currency", "cancel_requested"),
    *AMOUNTS,
)


def _enter(world: World) -> None:
    """What the servers hold, as the campaign reads it."""
    history, database = world.history, world.database
    history.operations = [_operation_row(each) for each in database.operations.values()]
    history.payments = [
        {name: getattr(payment, name) for name in _PAYMENT_COLUMNS}
        for payment in database.payments.values()
    ]
    for row in database.outbox:
        event = payment_pb2.PaymentEvent.FromString(row.payload)
        history.events.append(
            {
                "payment_id": row.payment_id,
                "payment_version": row.payment_version,
                "seq": row.seq,
            }
            | told_by(event)
        )
    history.resolutions = [
        {
            "operation_id": operation_id,
            "attempt_number": number,
            "outcome": each.outcome.name,
            "amount_minor": each.amount_reported_minor,
            "state": int(each.state_after),
        }
        for (_, operation_id, number), each in database.resolutions.items()
    ]
    history.clock_step_s = world.database.stepped_s
    history.discrepancies = [
        {"operation_id": each.operation_id, "kind": each.kind} for each in database.discrepancies
    ]


class _Errors(logging.Handler):
    """Collects what the application did not expect."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno >= logging.ERROR or (
            error is not None and not isinstance(error, StoreUnavailable)
        ):
            self.found.append(f"{record.getMessage()}: {error!r}")


def simulate(seed: int) -> Result:
    """One history. Whatever keeps it from its end is a violation too."""
    loop = SimulatedLoop(seed)
    errors = _Errors()
    logger = logging.getLogger()
    level, propagating = logger.level, list(logger.handlers)
    logger.handlers[:] = [errors]
    try:
        with simulated_sources(loop, seed):
            asyncio._set_running_loop(cast("Any", loop))
            world = World(loop, seed)
            try:
                loop.run(world.run())
            except Exception as error:  # noqa: BLE001 - it is judged all the same
                world.history.broken = f"{type(error).__name__}: {error}"
    finally:
        asyncio._set_running_loop(None)
        logger.handlers[:] = propagating
        logger.setLevel(level)
    history = world.history
    _enter(world)
    wrong = [*world.database.wrong, *loop.unexpected, *errors.found]
    if history.settles and world.untold():
        wrong.append(f"{world.untold()} notifications are not applied")
    if wrong and not history.broken:
        history.broken = wrong[0]
    told = orjson.dumps(history, option=orjson.OPT_SORT_KEYS)
    trace = hashlib.sha256(b"%d %d " % (loop.trace, loop.steps) + told).hexdigest()
    return Result(
        seed,
        history,
        judge(history),
        trace,
        loop.steps,
        loop.now_s,
        world.faults,
        len({each.key for each in history.answers if each.ok}),
    )
