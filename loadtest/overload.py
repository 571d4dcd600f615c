"""What overload does: `make overload`, five minutes.

A compiled generator (docs/decisions/0006-generators.md) searches the highest rate that a gateway
with its default settings holds, its knee, and then offers that rate, one and a half times and three
times as much. The PSP answers within the process, so that all latency is the gateway's. At each
rate a second caller sends a few calls of its own, and looks whether refusals say how long to pause.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import click
import grpc
from payments.v1 import payment_service_pb2_grpc as service
from payments.v1.money_pb2 import Money
from payments.v1.payment_method_pb2 import CAPTURE_METHOD_MANUAL, PaymentMethod
from payments.v1.payment_service_pb2 import AuthorizePaymentRequest

from gateway.domain.ids import new_request_id
from loadtest import environment
from loadtest.bench.generator import Generator, OpenLoad
from loadtest.bench.report import BROKEN, INVALID, MET, MISSED
from loadtest.bench.system import CANNOT_MEASURE, Server, System, running_system
from loadtest.children import INTERRUPTED, interrupted_by_sigterm
from loadtest.engine import reason_of
from loadtest.knee import KneeSearch
from loadtest.slo import Gate, Limits, overload_gates

Transport = Literal["native", "grpcio"]

LIMITS: Final = Limits.load("overload")
"""The gates of loadtest/slo.toml. The knee holds its `added_p99_ms_max`, with no call refused,
failed or dropped."""
FACTORS: Final = (1.5, 3.0)
RATE_FIRST: Final = 1_000.0
SECONDS_MIN: Final = 60
"""A shorter run is a look, no proof."""
CALLERS_MIN: Final = 50
CALLERS_MAX: Final = 1_000
STALL_S_MAX: Final = 0.2
"""As many calls may be under way at once as come meanwhile; beyond it sends are dropped. Each
caller has a connection of its own, which its first call opens: no more than are needed."""
WARM_UP_RATE: Final = 200
WARM_UP_S: Final = 3
ASKED_PER_S: Final = 20.0
"""Calls of the second caller a second."""
CALL_TIMEOUT_S: Final = 20.0
SUMMARY: Final = Path(".local/bench/overload.json")


@dataclass(frozen=True, slots=True)
class Step:
    """What one offered rate led to."""

    factor: float
    """Of the knee."""
    load: OpenLoad
    seconds: float
    asked: int
    """Refusals that the second caller got."""
    asked_without_retry_info: int

    @property
    def goodput_per_s(self) -> float:
        """Accepted calls a second."""
        return self.load.calls / self.seconds


@dataclass(slots=True)
class Overload:
    """A whole run."""

    transport: str
    knee_per_s: float
    seconds: int
    tried: list[tuple[float, bool]] = field(default_factory=list)
    """Rates of the search, and whether they held."""
    steps: list[Step] = field(default_factory=list)
    """The knee's own rate first."""
    interrupted: bool = False
    """Whether somebody ended it before its time, with what was measured until then."""

    def gates(self) -> list[Gate]:
        """What each rate beyond the knee is held to."""
        base, *beyond = self.steps
        return [
            replace(gate, name=f"x {step.factor:g}: {gate.name}")
            for step in beyond
            for gate in _gates(base, step)
        ]

    def invalid(self) -> str:
        """Why it proves nothing; empty where it does."""
        if self.seconds < SECONDS_MIN:
            return f"{self.seconds} s a rate, not {SECONDS_MIN}"
        return ""


def _gates(base: Step, step: Step) -> list[Gate]:
    told = {
        "factor": step.factor,
        "goodput_ratio": _ratio(step.goodput_per_s, base.goodput_per_s),
        "accepted_p99_ratio": _ratio(step.load.accepted_p99_ms, base.load.accepted_p99_ms),
        "refusal_p99_ms": step.load.refusal_p99_ms,
        "refusals_without_retry_info": step.asked_without_retry_info,
    }
    otherwise = step.load.failed - step.load.refused
    return [*overload_gates(LIMITS, told), Gate("calls that failed otherwise", otherwise, 0)]


def _ratio(value: float, base: float) -> float | None:
    return round(value / base, 3) if base else None


def holds(load: OpenLoad) -> bool:
    """Whether a rate holds what the knee is to hold."""
    return not load.failed and not load.dropped and load.p99_ms <= LIMITS.added_p99_ms_max


class _Asker:
    """A caller of its own beside the load: counts refusals, and those without RetryInfo."""

    def __init__(self, address: str, api_key: str) -> None:
        self._address = address
        self._headers = (("authorization", f"Bearer {api_key}"),)
        self._stop = threading.Event()
        self.refusals = 0
        self.without_retry_info = 0
        self.accepted = 0

    @contextmanager
    def asking(self) -> Any:
        """Ask in a thread for as long as the context lasts."""
        thread = threading.Thread(target=lambda: asyncio.run(self._ask()), name="asker")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    async def _ask(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = service.PaymentServiceStub(channel)
            calls: set[asyncio.Task[None]] = set()
            while not self._stop.is_set():
                call = asyncio.create_task(self._authorize(stub))
                calls.add(call)
                call.add_done_callback(calls.discard)
                await asyncio.sleep(1 / ASKED_PER_S)
            if calls:
                await asyncio.wait(calls)

    async def _authorize(self, stub: Any) -> None:
        request = AuthorizePaymentRequest(
            idempotency_key=new_request_id(),
            amount=Money(amount_minor=1000, currency_code="EUR"),
            capture_method=CAPTURE_METHOD_MANUAL,
            payment_method=PaymentMethod(token="tok_visa"),  # noqa: S106 - no token of anybody's
        )
        try:
            await stub.AuthorizePayment(request, metadata=self._headers, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.refusals += 1
                self.without_retry_info += not reason_of(error).endswith("RetryInfo")
        else:
            self.accepted += 1


def measure(
    system: System, transport: Transport, *, rate: float, step_s: int, seconds: int, knee: float
) -> Overload:
    """Search the knee, from `rate` in steps of `step_s`, unless it is given; then go beyond it.

    An interruption ends it with what was measured until then, where there is anything. Raises
    ProcessFailed and KeyboardInterrupt.
    """
    server = system.server(f"overload_{transport}")
    generator = Generator(system.folder)

    def offer(per_s: float, for_s: int) -> OpenLoad:
        callers = min(max(round(per_s * STALL_S_MAX), CALLERS_MIN), CALLERS_MAX)
        load = generator.open(server.target, round(per_s), for_s, callers)
        server.acknowledged += load.calls
        system.forget_logs()
        return load

    offer(WARM_UP_RATE, WARM_UP_S)
    system.analyze()
    found = Overload(transport, knee, seconds)
    search = KneeSearch(rate)
    found.tried = search.tried
    try:
        _go_beyond(found, search, offer, server, step_s)
    except KeyboardInterrupt:
        if not found.tried and not found.steps:
            raise
        click.echo("interrupted: what was measured until then follows", err=True)
        found.interrupted = True
    return found


def _go_beyond(
    found: Overload,
    search: KneeSearch,
    offer: Callable[[float, int], OpenLoad],
    server: Server,
    step_s: int,
) -> None:
    if not found.knee_per_s:
        while not search.done:
            load = offer(search.rate, step_s)
            click.echo(
                f"{search.rate:8,.0f}/s for {step_s} s: p99 {load.p99_ms:.0f} ms,"
                f" {load.failed} refused or failed, {load.dropped} dropped",
                err=True,
            )
            search.record(held=holds(load))
        found.knee_per_s = search.holding
    if not found.knee_per_s:
        return
    for factor in (1.0, *FACTORS):
        asker = _Asker(server.target.address, server.target.api_key)
        with asker.asking() if factor > 1 else nullcontext():
            load = offer(factor * found.knee_per_s, found.seconds)
        server.acknowledged += asker.accepted
        step = Step(factor, load, found.seconds, asker.refusals, asker.without_retry_info)
        click.echo(_line(step), err=True)
        found.steps.append(step)


def _line(step: Step) -> str:
    load = step.load
    return (
        f"x {step.factor:g}: {load.offered_per_s:,.0f}/s offered, {step.goodput_per_s:,.0f}/s"
        f" accepted with p99 {load.accepted_p99_ms:.0f} ms, {load.refused:,} refused with p99"
        f" {load.refusal_p99_ms:.0f} ms, {load.failed - load.refused:,} failed otherwise,"
        f" {load.dropped:,} dropped; from the intended times p99 {load.p99_ms:.0f} ms"
    )


@click.command()
@click.option("--transport", type=click.Choice(["native", "grpcio"]), default="native")
@click.option("--seconds", type=click.IntRange(1, 600), default=SECONDS_MIN, show_default=True)
@click.option("--rate", type=click.FloatRange(10), default=RATE_FIRST, help="To begin the search.")
@click.option("--step-seconds", type=click.IntRange(1, 600), default=10, show_default=True)
@click.option("--knee", type=click.FloatRange(10), default=None, help="Instead of a search.")
def main(
    transport: Transport, seconds: int, rate: float, step_seconds: int, knee: float | None
) -> None:
    """Measure, print and write the summary. Native is gated, grpcio printed.

    Exit status: 0 all bounds are met, 1 one is missed or an acknowledged authorization is not in
    the database, 3 it proves nothing, 4 it could not be measured, 130 it was interrupted; what was
    measured until then is told, once a rate was offered.
    """
    interrupted_by_sigterm()
    SUMMARY.unlink(missing_ok=True)  # or it would be taken for this run's
    try:
        with running_system() as system:
            found = measure(
                system,
                transport,
                rate=rate,
                step_s=step_seconds,
                seconds=seconds,
                knee=knee or 0.0,
            )
            missing = sum(system.missing().values())
    except CANNOT_MEASURE as error:
        click.echo(f"overload: {error}", err=True)
        sys.exit(BROKEN)
    except KeyboardInterrupt:
        click.echo("overload: interrupted, no result", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(_tell(found, missing))


def _tell(found: Overload, missing: int) -> int:
    """Print, write the summary; the exit status."""
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        **asdict(found),
        "missing": missing,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }
    gates = found.gates() if found.steps else []
    summary["gates"] = [gate.figures() for gate in gates]
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    if found.steps:
        click.echo(
            f"{found.transport}: knee {found.knee_per_s:,.0f}/s"
            f" (p99 {LIMITS.added_p99_ms_max:g} ms)"
        )
    elif found.interrupted:
        for rate, held in found.tried:
            click.echo(f"{rate:8,.0f}/s {'holds' if held else 'does not hold'}")
    else:
        click.echo(f"{found.transport}: no rate holds a p99 of {LIMITS.added_p99_ms_max:g} ms")
    for step in found.steps:
        click.echo(_line(step))
    for gate in gates:
        said = "met   " if gate.met else "MISSED"
        relation = "at least" if gate.at_least else "at most"
        click.echo(f"{said} {gate.name} {gate.value}, {relation} {gate.limit:g}")
    if missing:
        click.echo(f"MISSED {missing} acknowledged authorizations are not in the database")
    click.echo(f"summary: {SUMMARY}")
    return _exit_status(found, gates, missing)


def _exit_status(found: Overload, gates: Sequence[Gate], missing: int) -> int:
    if found.interrupted:
        click.echo("INVALID interrupted before all was offered")
        return INTERRUPTED
    is_met = bool(found.steps) and all(gate.met for gate in gates)
    if missing or (found.transport == "native" and not is_met):
        return MISSED
    if found.steps and found.invalid():
        click.echo(f"INVALID {found.invalid()}")
        return INVALID
    return MET


if __name__ == "__main__":
    main()
