"""One load test from its servers to its verdict: control, schedule, audit, gates, files."""

import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import asyncpg
import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from payments.v1.payment_service_pb2 import AuthorizePaymentResponse

from loadtest import environment
from loadtest.audit import SETTLE_TIMEOUT_S, audit_by_calls, audit_by_database, check_database
from loadtest.calls import SERVICE, Acknowledged, sample_request
from loadtest.children import Process, ProcessFailed
from loadtest.engine import Target
from loadtest.knee import KneeSearch
from loadtest.measures import Analysis
from loadtest.mixes import load_mix
from loadtest.plan import API_KEY_VARIABLE, Plan
from loadtest.processes import Observation, Observer, busiest
from loadtest.samples import (
    ACKNOWLEDGED_FILE,
    OUTCOME_FILE,
    SAMPLES_FILE,
    read_acknowledged,
    read_samples,
)
from loadtest.servers import Stack, StackOptions
from loadtest.slo import Limits, Verdict, evaluate
from storage.embedded import free_port

SUMMARY_FILE: Final = "summary.json"
REPORT_FILE: Final = "report.html"
LOCUST_FILE: Final = Path(__file__).with_name("locustfile.py")
START_ALLOWANCE_S: Final = 60.0
"""What a generator may take beside its schedule and the last call's deadline."""
WATCH_S: Final = 0.2
"""How often it is looked whether a run has ended, or a server of it."""
AFTERMATH_S: Final = 1.0
"""How long sending goes on after a server has ended: the figures show what callers saw of it."""
INTERRUPTED: Final = "interrupted"
STOPPED: Final = "stopped in Locust"
KNEE_WARM_UP_S: Final = 3.0
REMOTE_PORT: Final = 5557
"""Where generators on other machines find the master, Locust's own default."""
GENERATOR: Final = "generator"
PARTS: Final = ("control", "simulator", "gateway")
"""What a summary may name as left out."""


_NO_AUDIT: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, grpc.RpcError, OSError)


@dataclass(frozen=True, slots=True)
class Options:
    """One load test."""

    plan: Plan
    profile: str
    folder: Path
    slo: Path
    transport: str = "native"
    workers: int = 0
    generators: int = 1
    remote_generators: bool = False
    """They are started elsewhere, and connect to port 5557 of this machine."""
    control_s: float = 20.0
    """0: no control run."""
    target: str = ""
    """A deployed gateway; empty: one is started here."""
    audit_dsn: str = field(default="", repr=False)
    """The deployed gateway's database; empty: the audit asks the gateway."""
    web_port: int = 0
    """Where Locust's web UI is shown; 0: nowhere."""
    command: tuple[str, ...] = ("-m", "gateway", "serve")

    @property
    def controlled(self) -> bool:
        """Whether there is a control run. Generators on other machines reach no echo of ours, and
        end with the first schedule that they have sent.
        """
        return self.control_s > 0 and not self.remote_generators


@dataclass(frozen=True, slots=True)
class System:
    """What is called: a stack of our own, or somebody's gateway."""

    address: str
    api_key: str = field(repr=False)
    merchants: Path | None
    stack: Stack | None

    @property
    def ended(self) -> list[str]:
        """Which servers have ended by themselves; of what is not ours nobody knows."""
        return [] if self.stack is None else self.stack.ended

    @property
    def gateway_ended(self) -> bool | None:
        """Whether the gateway has ended by itself; None where it is not ours."""
        return None if self.stack is None else "gateway" in self.stack.ended

    @property
    def pids(self) -> Mapping[str, int]:
        """The roots of process trees on this machine that are watched."""
        return self.stack.pids if self.stack is not None else {}


@dataclass(frozen=True, slots=True)
class Step:
    """A schedule that was sent."""

    plan: Plan
    folder: Path
    analysis: Analysis
    observations: list[Observation]
    started_at: float
    reasons: Mapping[str, int]
    lateness: Mapping[str, float] | None
    """The simulator's; None where it is not ours."""
    stopped: str = ""
    """Why not all of it was sent; empty where all was."""
    due: int | None = None
    """Where not all was sent: the sends whose intended time had come."""

    @property
    def unaccounted(self) -> int:
        """By how many the samples differ from the sends that were due; each leaves one sample."""
        recorded = sum(each.offered for each in self.analysis.of_segment.values())
        due = sum(1 for _ in self.plan.schedule.arrivals()) if self.due is None else self.due
        return abs(due - recorded)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything about a load test that its report shows."""

    summary: dict[str, Any]
    verdict: Verdict
    step: Step
    """What was measured; of a search, the highest rate that held, or else the first."""
    steps: Sequence[Step]
    interrupted: bool = False
    """Whether somebody wanted it to end before its time, with what was measured until then."""


def run(options: Options) -> Outcome:
    """Do it all, and say so as it goes on.

    The files of a run before go first, so that none is taken for this one's. An interruption ends
    the sending, and what was measured is told; a second one, or one before, ends it all. Raises
    ProcessFailed, BadSlo, OSError and KeyboardInterrupt.
    """
    limits = Limits.load(options.profile, options.slo)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY_FILE, REPORT_FILE):
        (options.folder / name).unlink(missing_ok=True)
    if options.target and options.audit_dsn:
        try:
            check_database(options.audit_dsn)
        except _NO_AUDIT as error:
            raise ProcessFailed(f"the audit's database cannot be read: {error}") from None
    with ExitStack() as exit_stack:
        system = _system(options, exit_stack)
        plan = replace(
            options.plan,
            merchants=f"@{system.merchants}" if system.merchants else "",
            shares=options.generators,
        )
        first, reply = _first_payment(system, plan)
        if options.profile == "knee":
            steps, knee = _search(options, plan, system, limits)
            rates = [] if steps[-1].stopped else controlled_rates(knee)
            controls = _controls(options, [replace(plan, rate=rate) for rate in rates], reply)
        else:
            controls = _controls(options, [plan], reply)
            if any(each.stopped for each in controls):
                raise KeyboardInterrupt
            _say(
                f"{options.profile}: {plan.rate:g} sends/s for {plan.duration:g} s after"
                f" {plan.warm_up:g} s of warm-up, mix {plan.mix}"
            )
            steps, knee = [_send(options, plan, system, "run")], None
        audit = _audit(options, plan, system, chain([first], _told(steps)))
        step = _shown(steps, knee)
        summary = summarize(options, step, controls, audit, system)
        summary["stopped"] = stopped = steps[-1].stopped
        if knee is not None:
            summary["knee"] = knee
        verdict = evaluate(limits, summary)
        summary |= {
            "valid": verdict.valid,
            "slo_met": verdict.met,
            "gates": [gate.figures() for gate in verdict.gates],
        }
        interrupted = stopped == INTERRUPTED or audit.get("failure") == INTERRUPTED
        return Outcome(summary, verdict, step, steps, interrupted)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# --- what is called -------------------------------------------------------------------------------


def _system(options: Options, exit_stack: ExitStack) -> System:
    file = options.folder / "merchants.txt"
    if options.target:
        merchants = None
        if options.plan.merchants:
            # As a file: there may be more of them than an argument can hold.
            merchants = file
            file.write_text(options.plan.merchants.replace(",", "\n") + "\n", "utf-8")
        return System(options.target, os.environ[API_KEY_VARIABLE], merchants, None)
    _say(f"starting PostgreSQL, Redis, the PSP simulator and the gateway ({options.transport})")
    stack = exit_stack.enter_context(
        Stack(
            StackOptions(
                folder=options.folder,
                transport=options.transport,
                workers=options.workers,
                merchants=load_mix(options.plan.mix).merchants,
                command=options.command,
            )
        )
    )
    file.write_text("\n".join(stack.merchant_ids) + "\n", "utf-8")
    return System(stack.address, stack.api_key, file, stack)


def _target(system: System, plan: Plan) -> Target:
    ca_certificate = Path(plan.ca_file).read_bytes() if plan.ca_file else None
    return Target(
        system.address,
        system.api_key,
        tls=plan.tls or ca_certificate is not None,
        ca_certificate=ca_certificate,
        connections=1,
    )


def _first_payment(system: System, plan: Plan) -> tuple[Acknowledged, bytes]:
    """One authorization: shows that the gateway is there, and gives the echo its answer."""
    target = _target(system, plan)
    merchant_id = ""
    if system.merchants is not None:
        merchant_id = system.merchants.read_text("utf-8").split()[0]
    key = f"load-first-r{secrets.token_hex(8)}"
    if target.tls:
        channel = grpc.secure_channel(
            target.address, grpc.ssl_channel_credentials(target.ca_certificate)
        )
    else:
        channel = grpc.insecure_channel(target.address)
    with channel:
        try:
            authorize: Any = channel.unary_unary(f"/{SERVICE}/AuthorizePayment")
            data: bytes = authorize(
                sample_request(merchant_id, key),
                metadata=(("authorization", f"Bearer {target.api_key}"),),
                timeout=plan.deadline,
            )
        except grpc.RpcError as error:
            raise ProcessFailed(f"{target.address} refuses a payment: {_refusal(error)}") from None
    operation = AuthorizePaymentResponse.FromString(data).operation
    told = Acknowledged(
        "AUTHORIZE",
        operation.merchant_id,
        key,
        operation.operation_id,
        operation.payment_id,
        operation.state,
        operation.amount.amount_minor,
        "",
    )
    return told, data


def _refusal(error: Any) -> str:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            with suppress(ValueError, DecodeError):
                status = status_pb2.Status.FromString(value)
                return f"{error.code().name}: {status.message}"
    return f"{error.code().name}: {error.details()}"


# --- sending --------------------------------------------------------------------------------------


def control_of(plan: Plan, control_s: float) -> Plan:
    """The same schedule for an echo: its profile, within `control_s` seconds."""
    return replace(
        plan,
        duration=min(control_s, plan.duration),
        mix="authorize",
        control=True,
        tls=False,
        ca_file="",
        merchants="mer_control",
    )


def controlled_rates(knee: Mapping[str, Any]) -> list[float]:
    """What a search's control runs send: the rate that held, and the next one that did not.

    Where the machine is too busy for the one, the knee is none; where it is for the other, the knee
    is the machine's.
    """
    failing = [float(each["rate"]) for each in knee["steps"] if not each["held"]]
    above = [rate for rate in failing if rate > knee["rate"]]
    return [rate for rate in (round(knee["rate"], 1), min(above, default=0.0)) if rate]


def _controls(options: Options, plans: Sequence[Plan], reply: bytes) -> list[Step]:
    """Each schedule against an echo, for as long as a control lasts; none without a control."""
    if not options.controlled:
        return []
    reply_file = options.folder / "echo.bin"
    reply_file.write_bytes(reply)
    echo = Process.python(
        "echo",
        ["-m", "loadtest.echo", str(reply_file)],
        {"GATEWAY_LISTEN_ADDRESS": "127.0.0.1:0"},
        options.folder,
    )
    try:
        against = System(echo.await_serving(), "", None, None)
        steps: list[Step] = []
        for plan in plans:
            control = control_of(plan, options.control_s)
            _say(
                f"control: {control.profile}, {control.rate:g} sends/s for {control.duration:g} s"
                " against an empty echo"
            )
            steps.append(_send(options, control, against, f"control-{len(steps) + 1}"))
        return steps
    finally:
        echo.stop()


def _send(options: Options, plan: Plan, system: System, name: str) -> Step:
    """Have the schedule sent, and read what came of it. Raises ProcessFailed."""
    folder = options.folder / name
    outcome_file = folder / OUTCOME_FILE
    outcome_file.unlink(missing_ok=True)
    plan = replace(plan, run_id=secrets.token_hex(4), out=str(folder))
    _check_servers(system)
    if system.stack is not None:
        system.stack.reset_lateness()
    with ExitStack() as exit_stack:
        generator, workers = _launch(options, plan, system, exit_stack)
        watched = {name: [pid] for name, pid in system.pids.items()}
        pids = [generator.pid, *(worker.pid for worker in workers)]
        observer = Observer({**watched, GENERATOR: pids})
        with observer.watching():
            stopped = _await_end(generator, workers, plan, system, is_shown=bool(options.web_port))
    if not outcome_file.exists():
        _check_servers(system)
        if stopped == INTERRUPTED:  # before anything was sent
            raise KeyboardInterrupt
        generator.wait(0)
        raise generator.failure("ended without an outcome")
    told = json.loads(outcome_file.read_text("utf-8"))
    if told["stopped"]:
        stopped = stopped or STOPPED
        _say(f"{stopped}: what was measured until then follows")
    if told["failures"] or not stopped:
        generator.wait(0)
    schedule = plan.schedule
    sent_s = max((each.at_s for each in read_samples(folder / SAMPLES_FILE)), default=0.0)
    return Step(
        plan=plan,
        folder=folder,
        analysis=Analysis(
            read_samples(folder / SAMPLES_FILE),
            schedule.segments,
            until_s=sent_s if told["stopped"] else schedule.duration_s,
        ),
        observations=observer.observations,
        started_at=told["started_at"],
        reasons=told["reasons"],
        lateness=_lateness(system),
        stopped=stopped if told["stopped"] else "",
        due=told["due"] if told["stopped"] else None,
    )


def _check_servers(system: System) -> None:
    """Raises ProcessFailed where one has ended, and there is nothing to show of it."""
    if system.ended:
        raise ProcessFailed(f"ended by itself: {', '.join(system.ended)}")


def _lateness(system: System) -> dict[str, float] | None:
    if system.stack is None:
        return None
    try:
        return system.stack.lateness()
    except ProcessFailed as error:
        _say(str(error))
        return None


def _await_end(
    generator: Process,
    workers: Sequence[Process],
    plan: Plan,
    system: System,
    *,
    is_shown: bool,
) -> str:
    """Until the generator has ended; why it was made to before all was sent, or nothing.

    Raises ProcessFailed where it takes too long, which it may where Locust's web UI is shown, and
    where a worker of it ends before it has the outcome.
    """
    drain_s = plan.deadline + START_ALLOWANCE_S
    limit_s = plan.schedule.duration_s + drain_s
    until = time.monotonic() + limit_s
    try:
        while generator.running:
            if system.ended:
                return _end_without(system.ended, generator, drain_s)
            for worker in [each for each in workers if not each.running]:
                # The outcome is written before workers are told to end.
                if not (Path(plan.out) / OUTCOME_FILE).exists():
                    raise worker.failure("ended before all was sent")
            if time.monotonic() > until and not is_shown:
                raise generator.failure(f"did not end within {limit_s:g} s")
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        _say("interrupted: waiting for the answers to what was sent; once more ends it all")
        # Locust stops its users then, which wait for what is in flight.
        generator.ask_to_end()
        generator.await_end(drain_s)
        return INTERRUPTED
    return ""


def _end_without(servers: Sequence[str], generator: Process, drain_s: float) -> str:
    why = f"{' and '.join(servers)} ended"
    _say(f"{why} by itself: the run ends")
    with suppress(ProcessFailed):
        generator.await_end(AFTERMATH_S)
    generator.ask_to_end()
    generator.await_end(drain_s)
    return why


def _launch(
    options: Options, plan: Plan, system: System, exit_stack: ExitStack
) -> tuple[Process, list[Process]]:
    """Start Locust: alone, or a master and its workers."""
    variables = {API_KEY_VARIABLE: system.api_key}
    locust = ["-m", "locust", "-f", str(LOCUST_FILE), "--skip-log-setup"]
    command = [*locust, "--host", system.address, "-u", str(plan.shares), "-r", str(plan.shares)]
    command += ["--only-summary", *plan.arguments()]
    if options.web_port and not plan.control:
        _say(f"Locust's web UI: http://127.0.0.1:{options.web_port}")
        command += ["--web-host", "127.0.0.1", "--web-port", str(options.web_port)]
        command.append("--autostart")
    else:
        command.append("--headless")
    port = REMOTE_PORT if options.remote_generators else free_port()
    if plan.shares > 1:
        host = "*" if options.remote_generators else "127.0.0.1"
        command += ["--master", "--master-bind-host", host, "--master-bind-port", str(port)]
        command += ["--expect-workers", str(plan.shares)]
        if options.remote_generators:
            _say(
                f"waiting for {plan.shares} generators: on each machine, with {API_KEY_VARIABLE}"
                " set, locust -f loadtest/locustfile.py --worker --master-host <this machine>;"
                " there is no control run"
            )
    process = Process("generator", [sys.executable, *command], variables, None)
    exit_stack.callback(process.stop)
    workers: list[Process] = []
    if plan.shares > 1 and not options.remote_generators:
        for number in range(plan.shares):
            worker = Process.python(
                f"generator-{number}",
                [*locust, "--worker", "--master-host", "127.0.0.1", "--master-port", str(port)],
                variables,
                options.folder,
            )
            exit_stack.callback(worker.stop)
            workers.append(worker)
    return process, workers


# --- the search -----------------------------------------------------------------------------------


def _search(
    options: Options, plan: Plan, system: System, limits: Limits
) -> tuple[list[Step], dict[str, Any]]:
    """Step by step to the highest rate that holds the SLO."""
    search = KneeSearch(plan.rate)
    steps: list[Step] = []
    told: list[dict[str, Any]] = []
    single = replace(limits, knee_rate_min=None)
    while not search.done:
        rate = round(search.rate, 1)
        _say(f"knee, step {search.steps + 1}: {rate:g} sends/s for {plan.duration:g} s")
        attempt = replace(plan, rate=rate, profile="steady", warm_up=KNEE_WARM_UP_S)
        step = _send(options, attempt, system, f"step-{search.steps + 1}")
        summary = summarize(options, step, [], None, system)
        verdict = evaluate(single, summary)
        missed = [gate.name for gate in verdict.gates if not gate.met]
        if not step.stopped:
            search.record(held=verdict.met)
        steps.append(step)
        used = busiest(measured(step))
        told.append(
            {
                "rate": rate,
                "held": verdict.met,
                "valid": verdict.valid,
                "missed": missed,
                "added_p99_ms": summary["added_p99_ms"],
                "errors": summary["errors"],
                "dropped": summary["dropped"],
                "achieved_rps": summary["achieved_rps"],
                "cpu_percent": dict(used),
                "machine_percent": summary["machine_percent"],
            }
        )
        _say(
            f"  {'holds' if verdict.met else 'does not hold: ' + ', '.join(missed)};"
            f" machine {summary['machine_percent']:.0f} % busy, most of it {used[0][0]}"
        )
        if step.stopped or system.ended:
            break
    failing = [each for each in told if not each["held"]]
    first = min(failing, key=lambda each: float(each["rate"]), default=None)
    return steps, {
        "rate": search.holding,
        "steps": told,
        "saturates_first": next(iter(first["cpu_percent"])) if first is not None else None,
        "machine_percent": first["machine_percent"] if first is not None else None,
    }


def _shown(steps: Sequence[Step], knee: Mapping[str, Any] | None) -> Step:
    if knee is not None:
        for step, told in zip(steps, knee["steps"], strict=True):
            if told["held"] and told["rate"] == round(knee["rate"], 1):
                return step
    return steps[0]


# --- what came of it ------------------------------------------------------------------------------


def _told(steps: Iterable[Step]) -> Iterable[Acknowledged]:
    return chain.from_iterable(read_acknowledged(each.folder / ACKNOWLEDGED_FILE) for each in steps)


def _audit(
    options: Options, plan: Plan, system: System, told: Iterable[Acknowledged]
) -> dict[str, Any]:
    """What the audit found, for a summary; where it could not be done, `failure` says why."""
    scratch = options.folder / "audit.sqlite"
    stack = system.stack
    began = time.monotonic()
    try:
        if stack is not None:
            audit = audit_by_database(
                told,
                stack.dsn,
                stack.simulator.journal,
                scratch,
                # Nobody brings anything to an end without the gateway, or without its PSP.
                settle_s=0 if {"gateway", "simulator"} & {*system.ended} else SETTLE_TIMEOUT_S,
            )
        elif options.audit_dsn:
            audit = audit_by_database(told, options.audit_dsn, None, scratch)
        else:
            audit = audit_by_calls(told, _target(system, plan), scratch)
    except _NO_AUDIT as error:
        # What was measured is kept: whoever went away during the run is the reason to look at it.
        failure = _refusal(error) if isinstance(error, grpc.RpcError) else str(error)
        _say(f"audit: not done: {failure}")
        return {"clean": None, "failure": failure}
    except KeyboardInterrupt:
        _say("audit: interrupted")
        return {"clean": None, "failure": INTERRUPTED}
    _say(
        f"audit: {audit.acked} acknowledged authorizations against {audit.source},"
        f" {time.monotonic() - began:.1f} s"
    )
    return audit.figures()


def measured(step: Step) -> list[Observation]:
    """What was observed while the measured part was sent."""
    begin = step.started_at + step.plan.warm_up
    end = step.started_at + step.plan.schedule.duration_s
    return [each for each in step.observations if begin < each.at <= end + 1] or list(
        step.observations
    )


def summarize(
    options: Options,
    step: Step,
    controls: Sequence[Step],
    audit: dict[str, Any] | None,
    system: System,
) -> dict[str, Any]:
    """The figures of a step, as the summary has them; without an audit where there is none yet."""
    analysis = step.analysis
    whole = analysis.whole.figures()
    duration_s = analysis.duration_s
    observations = measured(step)
    left_out = []
    if not controls:
        left_out.append("control")
    if system.stack is None:
        left_out += ["simulator", "gateway"]
    summary: dict[str, Any] = {
        "profile": options.profile,
        "offered_rps": round(analysis.offered_rps(), 2),
        "achieved_rps": round(analysis.answered_rps(), 2),
        "duration_s": duration_s,
        **{name: value for name, value in whole.items() if name != "offered"},
        "offered": whole["offered"],
        "unaccounted": step.unaccounted,
        "control_p99_ms": control_p99_ms(controls),
        "psp_lateness_p99_ms": None if step.lateness is None else step.lateness["p99_ms"],
        "psp_lateness": step.lateness,
        "audit": audit if audit is not None else {},
        "left_out": left_out,
        "gateway_ended": system.gateway_ended,
        "ended": system.ended,
        "workers_ended": 0 if system.stack is None else system.stack.workers_ended,
        "stopped": step.stopped,
        "whole": whole,
        "segments": {name: each.figures() for name, each in analysis.of_segment.items()},
        "kinds": {name: each.figures() for name, each in analysis.of_kind.items()},
        "codes": environment.named_codes(analysis.whole.codes),
        "reasons": dict(step.reasons),
        "gateway_memory": _memory(observations),
        "cpu_percent": dict(busiest(observations)),
        "machine_percent": round(
            sum(each.machine_percent for each in observations) / max(len(observations), 1), 1
        ),
        "config": environment.configuration(asdict(step.plan), asdict(options)),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "started_at": step.started_at,
    }
    if options.profile == "overload":
        summary["overload"] = _overload(step, summary)
    return summary


def control_p99_ms(controls: Sequence[Step]) -> float | None:
    """The worst, from the intended times; None without any, or where one of them sent nothing.

    What was not answered at all makes it infinite in effect.
    """
    worst_ms: float | None = None
    for control in controls:
        figures = control.analysis.whole.figures()
        if not figures["offered"]:
            return None
        unanswered = figures["ok"] < figures["offered"] or control.unaccounted
        p99_ms = control.plan.deadline * 1000 if unanswered else figures["p99_ms"]
        worst_ms = max(worst_ms or 0.0, p99_ms)
    return worst_ms


def _memory(observations: Sequence[Observation]) -> dict[str, float | None]:
    """Of the gateway's largest process."""
    series = [each.of["gateway"].largest_mb for each in observations if "gateway" in each.of]
    if not series:
        return {"max_mb": None, "growth_mb": None}
    quarter = max(len(series) // 4, 1)
    second, last = series[quarter : 2 * quarter] or series, series[-quarter:]
    return {
        "max_mb": max(series),
        "growth_mb": round(sum(last) / len(last) - sum(second) / len(second), 1),
    }


def _overload(step: Step, summary: Mapping[str, Any]) -> dict[str, Any]:
    base, beyond = summary["segments"]["base"], summary["segments"]["overload"]
    base_rps = step.analysis.answered_rps("base")
    goodput_rps = step.analysis.answered_rps("overload")
    unserved = beyond["offered"] - step.analysis.served["overload"]
    refusals = step.analysis.refusals
    return {
        "factor": step.plan.overload_factor,
        "base_rps": round(base_rps, 1),
        "goodput_rps": round(goodput_rps, 1),
        "unserved_ratio": round(unserved / beyond["offered"], 4) if beyond["offered"] else None,
        "goodput_ratio": round(goodput_rps / base_rps, 3) if base_rps else None,
        "accepted_p99_ratio": (
            round(beyond["added_p99_ms"] / base["added_p99_ms"], 2)
            if base["added_p99_ms"]
            else None
        ),
        "refusals": refusals.count,
        "refusal_p99_ms": round(refusals.percentile(99), 2),
        "refusals_without_retry_info": sum(
            count
            for reason, count in step.reasons.items()
            if reason.startswith("RESOURCE_EXHAUSTED") and not reason.endswith("RetryInfo")
        ),
    }
