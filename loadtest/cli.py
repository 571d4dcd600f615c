"""The command line of the load test."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import asyncpg
import grpc

from loadtest.arrivals import Process, Profile
from loadtest.children import INTERRUPTED, ProcessFailed
from loadtest.knee import RATE_MIN
from loadtest.plan import API_KEY_VARIABLE, DURATION_S_MIN, BadPlan, Plan, merchants_of
from loadtest.report import write_report
from loadtest.runner import REPORT_FILE, SUMMARY_FILE, Options, Outcome, run
from loadtest.slo import SLO_FILE, BadSlo, conclusion
from storage.embedded import EmbeddedServerError

DSN_VARIABLE: Final = "LOADTEST_POSTGRES_DSN"
MET, FAILED, USAGE, INVALID = 0, 1, 2, 3
SOAK_S: Final = 3600.0
KNEE_STEP_S: Final = 20.0
PORT_MAX: Final = 65_535

_EPILOG: Final = f"""\
The gateway, an embedded PostgreSQL and Redis and the PSP simulator are started here, unless
--target names a deployed gateway; then {API_KEY_VARIABLE} holds a key of mode test (never an
option: options are seen by every user of the machine), and {DSN_VARIABLE} may hold its
database for the audit, which otherwise asks GetOperation for every key.

exit status:
  0  every gate is met
  1  a gate is missed, the audit found a fault or could not be done, or the gateway or a worker
     of it ended
  2  the options make no sense
  3  the run is invalid: the control run or the simulator shows that the machine was too busy to
     say anything, it was stopped in Locust's web UI, another server than the gateway ended,
     sends left no sample, nothing was sent, an overload was none, or there was no run
  130  interrupted, by Ctrl-C or SIGTERM; what was measured until then is told, once anything was
     sent

profiles:
  steady    the rate, for the duration
  ramp      up to the rate, there for a while, and down
  spike     the rate, three times the rate for a tenth of the duration, the rate
  soak      steady for an hour, unless --duration says otherwise; memory must stay flat
  knee      searches the highest rate that holds the SLO, in steps of --duration ({KNEE_STEP_S:g} s)
  overload  the rate, --overload-factor times the rate, the rate; give the knee as the rate
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a load test; returns the exit status."""
    parser = _parser()
    options = _options(parser, parser.parse_args(argv))
    summary_file = options.folder / SUMMARY_FILE
    report_file = options.folder / REPORT_FILE
    try:
        outcome = run(options)
        summary_file.write_text(json.dumps(outcome.summary, indent=1) + "\n", "utf-8")
        write_report(outcome, report_file)
    except BadSlo as error:
        parser.error(str(error))
    except (
        *(ProcessFailed, EmbeddedServerError, OSError, grpc.RpcError),
        *(asyncpg.PostgresError, asyncpg.InterfaceError),
    ) as error:
        sys.stderr.write(f"loadtest: no result: {error}\n")
        return INVALID
    except KeyboardInterrupt:
        sys.stderr.write("loadtest: interrupted, no result\n")
        return INTERRUPTED
    sys.stdout.write(table(outcome))
    sys.stdout.write(f"\nreport   {report_file}\nsummary  {summary_file}\n")
    return INTERRUPTED if outcome.interrupted else outcome.verdict.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description="Open-loop load tests of the gateway: latencies count from the intended times,"
        " and every acknowledged payment is looked for afterwards.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is sent")
    what.add_argument("--rate", type=float, default=1000.0, help="sends a second (default 1000)")
    what.add_argument("--duration", type=float, help="seconds that are measured (default 60)")
    what.add_argument(
        "--profile", choices=(*get_args(Profile), "knee"), default="steady", help="see below"
    )
    what.add_argument(
        "--mix",
        default="authorize",
        help="which calls: authorize (of the SLO, the default), realistic or everything; a section"
        " of loadtest/mixes.toml",
    )
    what.add_argument("--arrivals", choices=get_args(Process), default="poisson")
    what.add_argument("--seed", type=int, default=1, help="of times, calls, merchants and amounts")
    what.add_argument(
        "--warm-up", type=float, default=5.0, help="seconds before, rising, not measured (5)"
    )
    what.add_argument("--overload-factor", type=float, default=3.0, help="default 3")
    what.add_argument("--batch-items", type=int, default=20, help="of a batch or stream call (20)")
    how = parser.add_argument_group("how it is sent")
    how.add_argument("--generators", type=int, default=1, help="Locust workers (default 1)")
    how.add_argument(
        "--remote-generators",
        action="store_true",
        help="they are started on other machines; there is no control run",
    )
    how.add_argument("--connections", type=int, default=4, help="of each generator (default 4)")
    how.add_argument(
        "--retries",
        action="store_true",
        help="repeat refusals as the published service config says, as ordinary clients do",
    )
    how.add_argument("--deadline", type=float, default=15.0, help="seconds of a call (default 15)")
    how.add_argument(
        "--in-flight-max", type=int, default=20_000, help="more calls at once are dropped (20000)"
    )
    how.add_argument(
        "--control",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="of the control run against an echo, at most --duration; 0: none (default 20)",
    )
    how.add_argument("--web-port", type=int, default=0, help="show Locust's web UI there")
    where = parser.add_argument_group("against what")
    where.add_argument(
        "--transport", choices=("native", "grpcio"), default="native", help="of the gateway here"
    )
    where.add_argument(
        "--workers", type=int, default=0, help="processes of the gateway here, `serve --workers`"
    )
    where.add_argument("--target", default="", metavar="HOST:PORT", help="a deployed gateway")
    where.add_argument("--tls", action="store_true", help="call the target over TLS")
    where.add_argument(
        "--ca-file", default="", metavar="PEM", help="the CA to trust; implies --tls"
    )
    where.add_argument(
        "--merchants", default="", help="the target's merchants, with commas, or @FILE"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--folder", type=Path, default=Path(".local/load"), metavar="DIR")
    files.add_argument("--slo", type=Path, default=SLO_FILE, metavar="TOML", help="the gates")
    return parser


def _options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    duration = given.duration
    if duration is None:
        duration = {"soak": SOAK_S, "knee": KNEE_STEP_S}.get(given.profile, 60.0)
    try:
        plan = Plan(
            rate=given.rate,
            duration=duration,
            profile="steady" if given.profile == "knee" else given.profile,
            arrivals=given.arrivals,
            mix=given.mix,
            warm_up=given.warm_up,
            overload_factor=given.overload_factor,
            seed=given.seed,
            connections=given.connections,
            in_flight_max=given.in_flight_max,
            deadline=given.deadline,
            batch_items=given.batch_items,
            shares=given.generators,
            merchants=_merchants(parser, given.merchants),
            tls=given.tls,
            ca_file=given.ca_file,
            retries=given.retries,
        )
    except BadPlan as error:
        parser.error(str(error))
    _check_target(parser, given)
    for name, low, high in (
        ("workers", 0, 256),
        ("control", 0, 3600),
        ("web_port", 0, PORT_MAX),
    ):
        if not low <= getattr(given, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")
    if 0 < given.control < DURATION_S_MIN:
        parser.error(f"--control must be 0 or at least {DURATION_S_MIN:g}")
    if given.profile == "knee" and given.rate < RATE_MIN:
        parser.error(f"--profile knee searches from a --rate of {RATE_MIN:g} or more")
    if given.web_port and given.profile == "knee":
        parser.error("--web-port shows one run; --profile knee makes many")
    if given.remote_generators and given.profile == "knee":
        parser.error("--remote-generators end with one run; --profile knee makes many")
    if given.remote_generators and given.generators < 2:
        parser.error("--remote-generators needs --generators 2 or more")
    if not given.slo.is_file():
        parser.error(f"--slo: there is no file {given.slo}")
    return Options(
        plan=plan,
        profile=given.profile,
        folder=given.folder,
        slo=given.slo,
        transport=given.transport,
        workers=given.workers,
        generators=given.generators,
        remote_generators=given.remote_generators,
        control_s=given.control,
        target=given.target,
        audit_dsn=os.environ.get(DSN_VARIABLE, ""),
        web_port=given.web_port,
    )


def _check_target(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if not given.target:
        for name in ("tls", "ca_file", "merchants"):
            if getattr(given, name):
                parser.error(f"--{name.replace('_', '-')} is for a --target")
        return
    matched = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})", given.target)
    if matched is None or not 0 < int(matched[1]) <= PORT_MAX:
        parser.error(f"--target must be HOST:PORT, not {given.target!r}")
    if not os.environ.get(API_KEY_VARIABLE):
        parser.error(f"--target needs an API key of mode test in {API_KEY_VARIABLE}")
    if given.workers:
        parser.error("--workers is for a gateway that is started here")


def _merchants(parser: argparse.ArgumentParser, text: str) -> str:
    try:
        return merchants_of(text)
    except (OSError, ValueError) as error:
        parser.error(f"--merchants: {error}")


# --- the table ------------------------------------------------------------------------------------


def table(outcome: Outcome) -> str:
    """The result for a terminal."""
    summary = outcome.summary
    lines = [
        "",
        f"{'offered':<22}{summary['offered_rps']:>12,.1f} /s",
        f"{'answered as expected':<22}{summary['achieved_rps']:>12,.1f} /s",
        (
            f"{'errors, dropped, late':<22}{summary['errors']:>12,} {summary['dropped']:>9,}"
            f" {summary['late']:>9,}"
        ),
        "",
        f"{'ms':<22}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}",
        _percentiles("latency", summary, ""),
        _percentiles("added by the gateway", summary, "added_"),
    ]
    if len(summary["segments"]) > 1:
        lines += ["", f"{'segment, added ms':<22}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}"]
        lines += [
            _percentiles(name, figures, "added_") for name, figures in summary["segments"].items()
        ]
    if len(summary["kinds"]) > 1:
        lines += ["", f"{'call, added ms':<22}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}"]
        lines += [
            f"{_percentiles(name, figures, 'added_')}{figures['offered']:>10,} calls"
            for name, figures in sorted(summary["kinds"].items())
        ]
    if summary["reasons"]:
        lines += ["", "refusals"]
        lines += [
            f"  {count:>8,}  {reason}" for reason, count in sorted(summary["reasons"].items())
        ]
    if "knee" in summary:
        lines += ["", *_knee(summary["knee"])]
    cpu = ", ".join(f"{name} {percent:.0f}" for name, percent in summary["cpu_percent"].items())
    lines += [
        "",
        f"CPU, % of a core: {cpu}; the machine is {summary['machine_percent']:.0f} % busy",
    ]
    lines += ["", *_audit(summary["audit"]), ""]
    for gate in outcome.verdict.gates:
        value = "not measured" if gate.value is None else f"{gate.value:,.4g}"
        sign = "≥" if gate.at_least else "≤"
        mark = "ok  " if gate.met else "BAD "
        lines.append(f"{mark} {gate.name:<36} {value:>12} {sign} {gate.limit:g}")
    return "\n".join([*lines, "", conclusion(summary)[1]]) + "\n"


def _percentiles(title: str, figures: Mapping[str, Any], prefix: str) -> str:
    cells = (figures[f"{prefix}{name}_ms"] for name in ("p50", "p99", "p999", "max"))
    return f"{title:<22}" + "".join(f"{cell:>10,.1f}" for cell in cells)


def _knee(knee: Mapping[str, Any]) -> list[str]:
    lines = [f"{'rate/s':>10}{'added p99':>12}{'errors':>9}{'dropped':>9}  holds"]
    lines += [
        f"{each['rate']:>10,.0f}{each['added_p99_ms']:>12,.1f}{each['errors']:>9,}"
        f"{each['dropped']:>9,}  {'yes' if each['held'] else 'no: ' + ', '.join(each['missed'])}"
        for each in sorted(knee["steps"], key=lambda each: float(each["rate"]))
    ]
    lines.append(f"knee: {knee['rate']:,.0f}/s")
    if knee["saturates_first"]:
        lines.append(
            f"beyond it {knee['saturates_first']} uses the most CPU, and the machine is"
            f" {knee['machine_percent']:.0f} % busy"
        )
    return lines


def _audit(audit: Mapping[str, Any]) -> list[str]:
    if "failure" in audit:
        return [f"audit: not done: {audit['failure']}"]
    lines = [
        (
            f"audit against {audit['source']}: {audit['acked']:,} authorizations acknowledged,"
            f" {audit['missing']:,} missing, {audit['contradicted']:,} contradicted"
        ),
        (
            f"  {audit['unknown']:,} calls without an answer: unknown,"
            f" {audit['unknown_recorded']:,} of them recorded"
        ),
    ]
    if audit["duplicate_charges"] is None:
        lines.append("  charges were not compared: the PSP's journal is not within reach")
    else:
        lines.append(f"  {audit['duplicate_charges']:,} duplicate charges")
    return lines
