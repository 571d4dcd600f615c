"""P4: a gateway that dies at any wait, of a call or of recovery, neither loses nor doubles money.

The waits are not listed here: a first run of each flow tells them, and then a gateway is killed at
each, of calls on one of two kinds of PSP. All are killed; `GATEWAY_TESTS_CRASH_SITES_MAX` and
`GATEWAY_TESTS_CRASH_SEED` bound a run to so many of each flow, drawn with that seed, and say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
from collections import defaultdict
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import pytest
from payments.v1 import payment_service_pb2 as rpc
from payments.v1.payment_pb2 import OperationState
from redis import Redis

from gateway.application.routing_administration import Author
from gateway.connectors.simulator.journal import standing_charges
from gateway.connectors.simulator.launch import SimulatorProcess
from gateway.domain.model import Mode
from gateway.domain.states import UNFINISHED
from storage.embedded import free_port
from storage.postgres import RoutingRules
from storage.redis.claims import KEY_DIGEST_BYTES, NONCE_BYTES
from tests.connector_accounts import KEY, add_account
from tests.faults.checker import REPEAT_AFTER_S, TRIES_MAX, Books, Client, check, settled
from tests.faults.crashing_gateway import CALLS, NOTHING, RECOVERY, CrashingGateway
from tests.faults.stepping import AFTER, BEFORE
from tests.faults.transports import TRANSPORTS, alternating
from tests.harness import (
    Caller,
    System,
    asyncio_run,
    authorize_request,
    calling,
    eur,
    eventually,
    new_key,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from storage.embedded import EmbeddedRedis
    from tests.nursery import Nursery
    from tests.servers import PostgresForTests

SITES_MAX: Final = int(os.environ.get("GATEWAY_TESTS_CRASH_SITES_MAX", "0"))
"""Most sites of each flow; 0: all."""
SEED: Final = int(os.environ.get("GATEWAY_TESTS_CRASH_SEED", "1"))

AT_ONCE: Final = 3
"""How many gateways are killed at once: some of their time is waiting."""
CRASH_TRIES_MAX: Final = 5
"""A few sites are on one of two ways, by which of two waits ends first."""
NOT_REACHED_S: Final = 20.0
"""A gateway that has not come by its site by then never will."""
LEASE_S: Final = 600
"""Longer than a test: a killed recoverer keeps what it took, and each takes another operation."""

PROFILES: Final = ("idempotent", "non_idempotent")
SUCCEEDED: Final = OperationState.OPERATION_STATE_SUCCEEDED
DECLINED: Final = OperationState.OPERATION_STATE_DECLINED
NOTHING_STANDS: Final = Books(0, 0, 0)

SETTINGS: Final[dict[str, object]] = {
    # Few connections: they are most of a start.
    "intent_connections": 1,
    "outcome_connections": 1,
    "read_connections": 1,
    "simulator_answer_timeout_s": 1,
    "recover_margin_s": 0.2,
    "recovery_lease_s": 1,
    # On a busy machine too, Redis has the time to answer: its ways are part of the sites.
    "redis_timeout_ms": 5_000,
    "redis_connect_timeout_ms": 5_000,
    "send_window_s": 1.5,
    # Its looks are no sites, and work for a machine that is busy with starts.
    "readiness_interval_s": 10,
}
DEAD_SENDER_TIMES: Final = {"send_window_s": "0.5", "simulator_answer_timeout_s": "0.5"}
"""Recovery may take over soon what a gateway with these settings leaves."""
NEVER_SENDS: Final = {"send_window_s": 0.000_001, "min_send_budget_s": 0}
"""Whatever a gateway with these settings begins ends NOT_SENT: its intent takes longer."""

COMMON: Final = (
    "Claims.",
    "Recovery.run:",
    "Recovery._search_forever:",
    "DirectLane.",
    "_call:",
)
"""Sites that look alike in every flow: the claim, and the rounds of recovery. Once is enough."""
NO_CRASH: Final = (
    "Connection._get_statement",
    "_check:",
    "PostgresStore.count_doubts",
    "PostgresStore.estimate_outbox",
    "PostgresStore.search_behind_s",
    "OutboxEvents.",
    "Lane._linger:",
)
"""Sites of the driver's preparations, of the gateway's readiness and lag, and where rows wait for
company, which they do by chance."""

_AT_WORK: Final = ("Recovery._take:", "Recovery._settle:", "Lane._send")
"""Parts of the sites of recovery that are no pause."""
_SEARCHING: Final = ("Recovery._search", "Search.")
"""Parts of those of its search. Of two gateways one searches at a time, and the other goes on to
settle what there is, until it comes by the site."""

Call = tuple[str, Any]
"""A method and its request."""
Claim = Literal["released", "held"]
"""What stands in Redis when a call is repeated."""


@dataclass
class Trial:
    """A system with a gateway that lives on, and the calls whose gateways died."""

    system: System
    nursery: Nursery
    healthy: Caller
    late: Caller
    """Of a gateway that never sends."""
    client: Client
    starts: Iterator[int] = field(default_factory=itertools.count)
    done: list[tuple[Flow, str, Call]] = field(default_factory=list)
    """Flow, site and call of each crash."""
    crashed: set[str] = field(default_factory=set)
    """The COMMON sites of earlier flows."""

    @contextmanager
    def gateway(self, scope: str, kill_at: str = "", **settings: str) -> Iterator[CrashingGateway]:
        environment = dict(self.system.settings)
        environment |= {f"GATEWAY_{name.upper()}": value for name, value in settings.items()}
        visits = self.system.directory / f"visits-{next(self.starts)}"
        gateway = CrashingGateway(self.nursery, environment, visits, scope, kill_at)
        try:
            yield gateway
        finally:
            gateway.end()

    async def make(self, method: str, request: Any, state: int) -> Any:
        """Make a call that the healthy gateway answers with this state."""
        response = await self.client.call(method, request)
        assert response.operation.state == state, response
        return response


@dataclass(frozen=True)
class Flow:
    """A call, what comes before it, and what is so in the end."""

    name: str
    prepare: Callable[[Trial], AbstractAsyncContextManager[Call]]
    books: Books
    """Of its payment, where it succeeds; otherwise nothing stands."""
    states: tuple[int, ...] = (SUCCEEDED,)
    """Those that it may end in."""
    alone: bool = False
    """It holds requests at the PSP, so nothing may run beside it."""
    dies_at: str = ""
    """For recovery: `function:moment` where the sender died; without it the call ends in doubt."""


# --- calls ----------------------------------------------------------------------------------------


def _authorization(**fields: Any) -> Callable[[Trial], AbstractAsyncContextManager[Call]]:
    @asynccontextmanager
    async def prepare(_: Trial) -> AsyncIterator[Call]:
        yield "AuthorizePayment", authorize_request(**fields)

    return prepare


def _follow_up(
    method: str, capture_method: str = "MANUAL_MULTIPLE", token: str = "tok_visa", **fields: Any
) -> Callable[[Trial], AbstractAsyncContextManager[Call]]:
    @asynccontextmanager
    async def prepare(trial: Trial) -> AsyncIterator[Call]:
        request = authorize_request(capture_method=capture_method, token=token)
        first = await trial.make("AuthorizePayment", request, SUCCEEDED)
        yield method, _request(method, payment_id=first.payment.payment_id, **fields)

    return prepare


def _request(method: str, **fields: Any) -> Any:
    if "amount_minor" in fields:
        name = "additional_amount" if method == "IncrementAuthorization" else "amount"
        fields[name] = eur(fields.pop("amount_minor"))
    return getattr(rpc, f"{method}Request")(idempotency_key=new_key(), **fields)


def _cancel_request(capture_method: str) -> Callable[[Trial], AbstractAsyncContextManager[Call]]:
    """A void of an authorization that is at the PSP at this moment, and succeeds afterwards."""

    @asynccontextmanager
    async def prepare(trial: Trial) -> AsyncIterator[Call]:
        control = trial.system.control
        request = authorize_request(capture_method=capture_method)
        await control.hold("before_answer", kind="authorize")
        authorizing = asyncio.create_task(trial.client.attempt("AuthorizePayment", request))
        try:
            await control.await_held()
            key = request.idempotency_key
            yield "VoidPayment", _request("VoidPayment", authorize_idempotency_key=key)
        finally:
            await control.release()
            await control.close()
            await authorizing

    return prepare


def _repeated_authorization(
    claim: Claim,
) -> Callable[[Trial], AbstractAsyncContextManager[Call]]:
    """The repeat of an authorization that was NOT_SENT."""

    @asynccontextmanager
    async def prepare(trial: Trial) -> AsyncIterator[Call]:
        request = authorize_request()
        await _not_sent(trial, "AuthorizePayment", request, claim)
        yield "AuthorizePayment", request

    return prepare


def _repeated_capture(claim: Claim) -> Callable[[Trial], AbstractAsyncContextManager[Call]]:
    """The repeat of a capture that was NOT_SENT."""

    @asynccontextmanager
    async def prepare(trial: Trial) -> AsyncIterator[Call]:
        async with _follow_up("CapturePayment", amount_minor=400)(trial) as (method, request):
            await _not_sent(trial, method, request, claim)
            yield method, request

    return prepare


async def _not_sent(trial: Trial, method: str, request: Any, claim: Claim) -> None:
    client = Client(trial.late)
    response = await client.call(method, request)
    assert response.operation.state == OperationState.OPERATION_STATE_NOT_SENT, response
    trial.client.told[request.idempotency_key] += client.told[request.idempotency_key]
    await _await_claim(trial, request.idempotency_key, claim)


async def _await_claim(trial: Trial, key: str, claim: Claim) -> None:
    """Wait until a claim is released; put another's in its place, where one shall stand there."""
    digest = hashlib.blake2b(key.encode(), digest_size=KEY_DIGEST_BYTES).hexdigest()
    with Redis.from_url(trial.system.redis_url) as client:
        await eventually(
            lambda: not list(client.scan_iter(match=f"*:idem:*:{digest}")), "the claim is released"
        )
        if claim == "held":
            # All keys of a merchant begin alike.
            other = next(client.scan_iter(match=f"*:idem:{trial.system.shop.merchant_id}:*"))
            name = other.decode().rpartition(":")[0] + f":{digest}"
            client.set(name, b"C" + os.urandom(NONCE_BYTES), px=1000 * LEASE_S)


CALL_FLOWS: Final = (
    Flow("authorize", _authorization(capture_method="MANUAL"), Books(1000, 0, 0)),
    Flow("authorize-automatic", _authorization(capture_method="AUTOMATIC"), Books(0, 1000, 0)),
    Flow("authorize-in-doubt", _authorization(token="tok_timeout_after_charge"), Books(1000, 0, 0)),
    Flow("verify", _authorization(amount_minor=0, capture_method="MANUAL"), Books(0, 0, 0)),
    Flow("capture", _follow_up("CapturePayment", amount_minor=400), Books(600, 400, 0)),
    Flow(
        "capture-final",
        _follow_up("CapturePayment", "MANUAL", "tok_capture_reset_after_charge", amount_minor=400),
        Books(0, 400, 0),
    ),
    Flow("refund", _follow_up("RefundPayment", "AUTOMATIC", amount_minor=300), Books(0, 1000, 300)),
    Flow("void", _follow_up("VoidPayment"), Books(0, 0, 0)),
    Flow("increment", _follow_up("IncrementAuthorization", amount_minor=500), Books(1500, 0, 0)),
    # A repeat goes another way while the claim of the first call still stands.
    Flow("authorize-again", _repeated_authorization("released"), Books(1000, 0, 0)),
    Flow("authorize-again-claimed", _repeated_authorization("held"), Books(1000, 0, 0)),
    Flow("capture-again", _repeated_capture("released"), Books(600, 400, 0)),
    Flow("capture-again-claimed", _repeated_capture("held"), Books(600, 400, 0)),
    Flow("void-in-flight", _cancel_request("MANUAL"), Books(0, 0, 0), alone=True),
)


@pytest.mark.parametrize("half", [0, 1])
async def test_a_crash_at_any_wait_of_a_call_neither_loses_nor_doubles_it(
    postgres: PostgresForTests, redis: EmbeddedRedis, nursery: Nursery, half: int
) -> None:
    """A wait that calls come by with both kinds of PSP is one of the two's, in turn."""
    async with AsyncExitStack() as stack:
        trials = [
            await stack.enter_async_context(
                _trial(postgres, redis, nursery, profile, transport, recovers=True)
            )
            for profile, transport in zip(PROFILES, TRANSPORTS, strict=True)
        ]
        failures = []
        for number, flow in enumerate(CALL_FLOWS[half::2]):
            sites = [_chosen(trial, flow, await _sites_of_call(trial, flow)) for trial in trials]
            for trial, own in zip(trials, _in_turn(*sites, first=number % 2), strict=True):
                failures += await _crash_calls(trial, flow, own)
        for trial in trials:
            await settled(trial.system)
            # Whatever recovery made of it, the books agree before anybody repeats a call ...
            check(trial.system, trial.client)
            failures += await _repeat_all(trial)
            # ... and when everybody has.
            check(trial.system, trial.client)
        assert not failures, "\n".join(failures)


def _in_turn(one: list[str], other: list[str], *, first: int) -> tuple[list[str], list[str]]:
    """What both have, divided between them in turn; each keeps what the other has not."""
    shared = [site for site in one if site in other]
    divided = set(shared[first::2]), set(shared[1 - first :: 2])
    return (
        [site for site in one if site not in divided[1]],
        [site for site in other if site not in divided[0]],
    )


async def _sites_of_call(trial: Trial, flow: Flow) -> list[str]:
    """The sites that a whole call comes by in a fresh gateway."""
    async with _calling_a_gateway(trial, flow) as (gateway, client, call):
        await client.call(*call)
        visits = gateway.visits()
        assert any(site.startswith("_tell:") for site in visits), "the call's own work goes unseen"
        key = call[1].idempotency_key
        trial.client.told[key] += client.told[key]
    trial.done.append((flow, "", call))
    return _worth_a_crash(visits)


async def _crash_calls(trial: Trial, flow: Flow, sites: Sequence[str]) -> list[str]:
    room = asyncio.Semaphore(1 if flow.alone else AT_ONCE)

    async def crash(site: str) -> str:
        for _ in range(CRASH_TRIES_MAX):
            async with room, _calling_a_gateway(trial, flow, site) as (gateway, client, call):
                answer = await client.attempt(*call)
                trial.done.append((flow, site, call))
                if answer is None:
                    died = await gateway.died(NOT_REACHED_S)
                    return "" if died else f"{flow.name} {site}: it went on\n{gateway.log}"
                key = call[1].idempotency_key
                trial.client.told[key] += client.told[key]
        return f"{flow.name} {site}: answered, the site was not reached"

    return [text for text in await asyncio.gather(*map(crash, sites)) if text]


@asynccontextmanager
async def _calling_a_gateway(
    trial: Trial, flow: Flow, kill_at: str = ""
) -> AsyncIterator[tuple[CrashingGateway, Client, Call]]:
    times = DEAD_SENDER_TIMES if flow.dies_at else {}
    with trial.gateway(CALLS, kill_at, recovery_enabled="false", **times) as gateway:
        async with (
            calling(await gateway.serving(), trial.system.shop.api_key) as caller,
            flow.prepare(trial) as call,
        ):
            yield gateway, Client(caller), call


# --- recovery -------------------------------------------------------------------------------------


@asynccontextmanager
async def _cancel_request_of_a_doubt(trial: Trial) -> AsyncIterator[Call]:
    """A void of an authorization in doubt."""
    request = authorize_request(token="tok_garbage", capture_method="AUTOMATIC")
    await trial.make("AuthorizePayment", request, OperationState.OPERATION_STATE_IN_DOUBT)
    key = request.idempotency_key
    yield "VoidPayment", _request("VoidPayment", authorize_idempotency_key=key)


RECOVERY_FLOWS: Final = (
    Flow("unsent", _authorization(), Books(1000, 0, 0), dies_at=f"_write_intent:{AFTER}"),
    Flow("unanswered", _authorization(), Books(1000, 0, 0), dies_at=f"_answer:{BEFORE}"),
    Flow("authorize", _authorization(token="tok_garbage"), Books(1000, 0, 0)),
    Flow(
        "authorize-automatic",
        _authorization(token="tok_garbage", capture_method="AUTOMATIC"),
        Books(0, 1000, 0),
    ),
    Flow("reversal", _authorization(token="tok_partial_approval"), NOTHING_STANDS, (DECLINED,)),
    Flow(
        "capture",
        _follow_up("CapturePayment", token="tok_capture_garbage", amount_minor=400),
        Books(600, 400, 0),
    ),
    Flow(
        "refund",
        _follow_up("RefundPayment", "AUTOMATIC", "tok_refund_garbage", amount_minor=300),
        Books(0, 1000, 300),
    ),
    Flow("void", _follow_up("VoidPayment", token="tok_void_garbage"), Books(0, 0, 0)),
    Flow(
        "increment",
        _follow_up("IncrementAuthorization", token="tok_increment_garbage", amount_minor=500),
        Books(1500, 0, 0),
    ),
    Flow("cancel-request", _cancel_request_of_a_doubt, Books(0, 0, 0)),
    Flow("take-back", _cancel_request("AUTOMATIC"), Books(0, 0, 0), alone=True),
)


@alternating(profile=PROFILES)
async def test_a_crash_at_any_wait_of_recovery_leaves_the_work_to_the_next_recovery(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    nursery: Nursery,
    profile: str,
    transport: str,
) -> None:
    async with _trial(postgres, redis, nursery, profile, transport, recovers=False) as trial:
        failures = []
        for flow in RECOVERY_FLOWS:
            sites = _chosen(trial, flow, await _sites_of_recovery(trial, flow))
            failures += await _leave_unfinished(trial, flow, len(sites) + AT_ONCE)
            charges = _charges_sent(trial)
            failures += await _crash_recoveries(trial, flow, sites)
            with trial.gateway(NOTHING):
                await settled(trial.system)
            assert _charges_sent(trial) == charges, f"{flow.name}: recovery has sent a charge"
        check(trial.system, trial.client)
        failures += await _repeat_all(trial)
        check(trial.system, trial.client)
        assert not failures, "\n".join(failures)


async def _leave_unfinished(trial: Trial, flow: Flow, count: int) -> list[str]:
    """Make so many operations that recovery has to finish, and wait until it may; what failed."""
    failures = []
    if flow.dies_at:
        function, _, moment = flow.dies_at.partition(":")
        [site] = [
            site
            for site in await _sites_of_call(trial, flow)
            if site.endswith(moment) and f".{function}:" in site and site.startswith("_tell:")
        ]
        failures = await _crash_calls(trial, flow, [site] * count)
    else:
        room = asyncio.Semaphore(1 if flow.alone else count)

        async def leave() -> None:
            async with room, flow.prepare(trial) as call:
                await trial.client.call(*call)
            trial.done.append((flow, "", call))

        await asyncio.gather(*(leave() for _ in range(count)))

    def is_due() -> bool:
        [row] = trial.system.fetch(
            "SELECT (SELECT count(*) FROM doubts WHERE check_at > now())"
            " + (SELECT count(*) FROM operations WHERE state = 1 AND recover_after >= now())"
            " AS early"
        )
        return bool(row["early"] == 0)

    await eventually(is_due, "recovery may look at everything")
    return failures


def _charges_sent(trial: Trial) -> int:
    """How many requests that move money, and not back, the PSP has received."""
    kinds = ("authorize", "capture", "refund", "increment")
    return sum(record["kind"] in kinds for record in trial.system.simulator.received("send"))


async def _sites_of_recovery(trial: Trial, flow: Flow) -> list[str]:
    """The sites that a recoverer comes by until an operation is settled."""
    assert not await _leave_unfinished(trial, flow, 1)
    with trial.gateway(RECOVERY, recovery_batch_max="1", recovery_concurrency="1") as gateway:
        await settled(trial.system)
        visits = gateway.visits()
    # Its rounds without work are as many as there was time for.
    return _worth_a_crash([site for site in visits if "#" not in site or not _is_common(site)])


async def _crash_recoveries(trial: Trial, flow: Flow, sites: Sequence[str]) -> list[str]:
    """Kill a recoverer at each site; each takes operations that no other one has taken."""
    room = asyncio.Semaphore(AT_ONCE)

    async def crash(site: str) -> str:
        async with room:
            with trial.gateway(
                RECOVERY,
                site,
                recovery_batch_max="1",
                recovery_concurrency="1",
                recovery_lease_s=str(LEASE_S),
            ) as gateway:
                if not await gateway.died(NOT_REACHED_S):
                    return f"{flow.name} {site}: not reached\n{gateway.log}"
                return ""

    idle = [
        site
        for site in sites
        if any(part in site for part in _SEARCHING) or not any(part in site for part in _AT_WORK)
    ]
    failures = await asyncio.gather(*(crash(site) for site in sites if site not in idle))
    # The pause between two rounds comes only once there is no more work.
    failures += await asyncio.gather(*map(crash, idle))
    trial.system.fetch("UPDATE doubts SET lease_until = now()")  # the leases of the dead run out
    return [text for text in failures if text]


# --- cascades -------------------------------------------------------------------------------------


@asynccontextmanager
async def _cascade(_: Trial) -> AsyncIterator[Call]:
    """An authorization of a card of its own: how often one may be tried again is limited."""
    yield "AuthorizePayment", authorize_request(token=f"tok_{new_key()}", capture_method="MANUAL")


CASCADE_NOT_SENT: Final = Flow("cascade-not-sent", _cascade, Books(1000, 0, 0))
CASCADE_DECLINED: Final = Flow(
    "cascade-declined", _cascade, Books(1000, 0, 0), (DECLINED, SUCCEEDED)
)
"""The first account's decline stands where nobody knows of a second attempt."""


async def test_a_crash_at_any_wait_of_a_cascade_leaves_at_most_one_charge_over_both_psps(
    postgres: PostgresForTests, redis: EmbeddedRedis, nursery: Nursery
) -> None:
    """Killed at each wait from the first PSP's answer to the last outcome; that PSP cannot be
    reached in the one half, and declines in the other.
    """
    first = f"127.0.0.1:{free_port()}"
    with ExitStack() as servers:
        async with _trial(
            postgres,
            redis,
            nursery,
            "idempotent",
            "grpcio",
            recovers=True,
            prepare=lambda system: asyncio_run(lambda: _route(system, f"http://{first}")),
        ) as trial:
            failures = await _crash_cascades(trial, CASCADE_NOT_SENT)
            journal = trial.system.directory / "first.jsonl"
            declining = SimulatorProcess.start(journal, listen=first)
            servers.callback(declining.kill)
            failures += await _crash_cascades(trial, CASCADE_DECLINED)
            await settled(trial.system)
            check(trial.system, trial.client)
            failures += await _repeat_all(trial)
            check(trial.system, trial.client)
            assert not failures, "\n".join(failures)
            assert not standing_charges(declining.records())
            rows = trial.system.fetch("SELECT DISTINCT state FROM operations")
            # Some die before the second attempt is durable, and some after it: of all sites.
            assert SITES_MAX or {row["state"] for row in rows} == {SUCCEEDED, DECLINED}


async def _route(system: System, first_url: str) -> None:
    """The merchant's payments go to a PSP that declines them, then to one that approves."""
    merchant_id = system.shop.merchant_id
    targets = []
    accounts = (first_url, "tok_declined_do_not_honor"), (system.simulator.url, "tok_visa")
    for number, (url, token) in enumerate(accounts, 1):
        credentials = {"url": url, "token": token}
        account_id = await add_account(system.dsn, merchant_id, "simulator", credentials)
        targets.append(f'{{ account = "{account_id}", priority = {number} }}')
    text = (
        f'format = 1\n[[rule]]\nname = "both"\nattempts_max = 2\ntargets = [{", ".join(targets)}]\n'
    )
    author = Author("login:ann", "two PSPs")
    async with RoutingRules.connect(system.dsn) as rules:
        version = await rules.put(merchant_id, Mode.TEST, text, author)
        assert await rules.activate(merchant_id, Mode.TEST, version, 0, author)


async def _crash_cascades(trial: Trial, flow: Flow) -> list[str]:
    """Kill a gateway from the wait for the first PSP on: until the second attempt is durable where
    the first was not sent, since what follows is as after a decline.
    """
    sites = await _sites_of_call(trial, flow)
    again = [number for number, site in enumerate(sites) if "._elsewhere:" in site]
    written = [number for number, site in enumerate(sites) if "Outcomes.write:" in site]
    last = (again if flow is CASCADE_NOT_SENT else written)[-1]
    return await _crash_calls(trial, flow, _chosen(trial, flow, sites[again[0] - 1 : last + 1]))


# --- both -----------------------------------------------------------------------------------------


@asynccontextmanager
async def _trial(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    nursery: Nursery,
    profile: str,
    transport: str,
    *,
    recovers: bool,
    prepare: Callable[[System], None] = lambda _: None,
) -> AsyncIterator[Trial]:
    """A trial with a healthy gateway that `recovers`, or does not; all are on the transport.

    What gateways read when they start, `prepare` may write.
    """
    settings = {
        **SETTINGS,
        "transport": transport,
        "trusted_front": True,
        "connector_keys": KEY,
    }
    with running_system(postgres, redis, profile=profile, **settings) as system:
        prepare(system)
        gateway = system.start_gateway(recovery_enabled=recovers)
        never = system.start_gateway(recovery_enabled=False, **NEVER_SENDS)
        async with (
            calling(gateway, system.shop.api_key) as healthy,
            calling(never, system.shop.api_key) as late,
        ):
            yield Trial(system, nursery, healthy, late, Client(healthy))


def _worth_a_crash(visits: Sequence[str]) -> list[str]:
    """Without the round trips in which the driver only prepares a statement, those of readiness,
    which share a batch with recovery by chance, the waits for company, and the answers to batches:
    nothing leaves the process between them and what their waiters do next, sites as well.
    """

    def is_worth(site: str) -> bool:
        answer = site.startswith("Lane._send:") and site.partition("#")[0].endswith(AFTER)
        return not answer and not any(part in site for part in NO_CRASH)

    return list(filter(is_worth, visits))


def _is_common(site: str) -> bool:
    return any(part in site for part in COMMON)


def _chosen(trial: Trial, flow: Flow, sites: Sequence[str]) -> list[str]:
    """The sites to kill at: all, but what is common to all flows once; or as many as asked for."""
    chosen = [site for site in sites if site not in trial.crashed]
    trial.crashed.update(filter(_is_common, sites))
    if 0 < SITES_MAX < len(chosen):
        numbers = random.Random(SEED).sample(range(len(chosen)), SITES_MAX)
        chosen = [chosen[number] for number in sorted(numbers)]
    print(f"{flow.name}: {len(chosen)} of {len(sites)} sites")
    return chosen


async def _repeat_all(trial: Trial) -> list[str]:
    """Repeat each call until it has a definite outcome, which must be the right one, once."""
    ends = await asyncio.gather(*(_repeat(trial, *done) for done in trial.done))
    standings = defaultdict(list)
    for standing in trial.system.standing():
        standings[standing.payment_id].append(standing)
    failures = []
    for (flow, site, _), (payment_id, state) in zip(trial.done, ends, strict=True):
        books = Books.of_standings(standings[payment_id])
        expected = flow.books if state == SUCCEEDED else NOTHING_STANDS
        if books != expected:
            failures.append(f"{flow.name} {site}: {payment_id} is {books}, not {expected}")
    return failures


async def _repeat(trial: Trial, flow: Flow, site: str, call: Call) -> tuple[str, int]:
    """The payment's id, and the state in which the operation ended."""
    method, request = call
    for _ in range(TRIES_MAX):
        await trial.client.until_answered(method, request)
        present = await trial.healthy.operation(idempotency_key=request.idempotency_key)
        state = present.operation.state
        if state not in UNFINISHED and state != OperationState.OPERATION_STATE_NOT_SENT:
            assert state in flow.states, f"{flow.name} {site}: {present}"
            return present.payment.payment_id, state
        await asyncio.sleep(REPEAT_AFTER_S)
    raise AssertionError(f"{flow.name} {site}: no definite outcome after {TRIES_MAX} tries")
