"""The load: k9 (compiled) for single calls, a sender of ready bytes for batches and streams.

`docs/decisions/0006-generators.md` says why these.
"""

import base64
import json
import re
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc import StatusCode
from payments.v1 import payment_service_pb2

from loadtest.bench.bulk import API_KEY_VARIABLE, SERVICE
from loadtest.children import POLL_S, Process, ProcessFailed, cpu_s, stopping
from storage.embedded import free_port

WARM_UP_S: Final = 1
"""What comes before the measured window: connections are opened, batches find their size."""
TAIL_S: Final = 0.4
"""How much longer than the window the load lasts, so that it is under load to its end."""
WINDOW_S_MIN: Final = 0.5
"""The counters change once a second: a shorter window is none."""
END_TIMEOUT_S: Final = 45.0
"""A generator waits up to 30 s for the answers to its last calls."""
BULK_ITEMS: Final = {"batch": (100, 1), "stream": (64, 4)}
"""Items of a message, and messages unanswered at once on a stream: together the default of its
window (GATEWAY_STREAM_WINDOW_ITEMS)."""
_ACCEPTED: Final = f"grpc_req_duration{{status:{StatusCode.OK.value[0]}}}"
_REFUSED: Final = f"grpc_req_duration{{status:{StatusCode.RESOURCE_EXHAUSTED.value[0]}}}"
_PGBENCH_SCRIPT: Final = "intent_row.pgbench.sql"
_CONTROL_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to call."""

    address: str
    """`host:port`"""
    api_key: str
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of a generator measured, within its window."""

    per_s: float
    """Successful calls (or items) a second."""
    calls: int
    """All that were answered with OK, before, in and after the window."""
    failed: int
    """All that were not."""
    cpu_us: Mapping[str, float]
    """CPU of each watched process for one call (or item), in microseconds."""


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """What an open loop measured. Latencies are from the intended time of each call."""

    offered_per_s: float
    achieved_per_s: float
    dropped: int
    failed: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    calls: int
    accepted_p99_ms: float
    """Of the calls that were answered with OK, from when they were sent."""
    refused: int
    """Those with RESOURCE_EXHAUSTED; the other failed ones ended otherwise."""
    refusal_p99_ms: float
    """From when they were sent."""


def _contract() -> FileDescriptorSet:
    """The contract with all that it imports, each file after its imports."""
    files = FileDescriptorSet()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for imported in file.dependencies:
                add(imported)
            file.CopyToProto(files.file.add())

    add(payment_service_pb2.DESCRIPTOR)
    return files


def authorization() -> dict[str, Any]:
    """The request of every benchmark, with a key of its own in each call."""
    return {
        "idempotency_key": "{{ uuid() }}",
        "amount": {"amount_minor": "1000", "currency_code": "EUR"},
        "capture_method": "CAPTURE_METHOD_MANUAL_MULTIPLE",
        "payment_method": {"token": "tok_visa"},
    }


class NoWindow(ProcessFailed):
    """The machine was too busy to see the generator's counters at both ends of the window."""


class Generator:
    """Runs generators, with their files below `folder`. Every method raises ProcessFailed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._contract = base64.b64encode(_contract().SerializeToString()).decode("ascii")

    def closed(
        self,
        target: Target,
        concurrency: int,
        seconds: int,
        *,
        warm_up_s: int = WARM_UP_S,
        watched: Mapping[str, int] | None = None,
    ) -> Load:
        """`concurrency` callers, each on its own connection, each with one call at a time.

        `watched` are the processes whose CPU is measured, by name.
        """
        end_s = warm_up_s + seconds
        options = {"vus": concurrency, "duration": f"{round(1000 * (end_s + TAIL_S))}ms"}
        port = free_port()
        plan = self._write_plan(target, options)
        summary = self._folder / "summary.json"
        process = self._start(plan, summary, port)
        with stopping(process):
            watch = _Watch(process, {**(watched or {}), "generator": process.pid}, port)
            first = watch.at_least(warm_up_s)
            last = watch.at_least(max(end_s, first.at_s + WINDOW_S_MIN))
            process.wait(END_TIMEOUT_S)
        passes, fails = _checks(summary)
        ok_part = passes / max(passes + fails, 1)
        calls = (last.count - first.count) * ok_part
        return Load(
            per_s=calls / (last.at_s - first.at_s),
            calls=passes,
            failed=fails,
            cpu_us={
                name: 1e6 * (last.cpu_s[name] - first.cpu_s[name]) / max(calls, 1)
                for name in first.cpu_s
            },
        )

    def bulk(
        self,
        method: str,
        target: Target,
        concurrency: int,
        seconds: int,
        *,
        watched: Mapping[str, int] | None = None,
    ) -> Load:
        """`concurrency` batch calls or streams at once; counts items."""
        log = self._folder / "generator.log"
        log.unlink(missing_ok=True)
        items, ahead = BULK_ITEMS[method]
        command = [
            *(sys.executable, "-m", "loadtest.bench.bulk", method, target.address),
            *("--concurrency", str(concurrency), "--items", str(items), "--ahead", str(ahead)),
            *("--warm-up", str(WARM_UP_S), "--seconds", str(seconds)),
        ]
        before = {name: cpu_s(pid) for name, pid in (watched or {}).items()}
        process = Process("generator", command, {API_KEY_VARIABLE: target.api_key}, log)
        with stopping(process):
            process.wait(WARM_UP_S + seconds + END_TIMEOUT_S)
        told = json.loads(process.printed().splitlines()[-1])
        count = max(told["answered"], 1)
        cpu_us = {
            name: 1e6 * (cpu_s(pid) - before[name]) / count for name, pid in (watched or {}).items()
        }
        return Load(
            per_s=told["items_per_s"],
            calls=told["answered"],
            failed=told["refused"],
            cpu_us={**cpu_us, "generator": told["cpu_us_per_item"]},
        )

    def pgbench(
        self, program: Path, connection: Mapping[str, str], clients: int, seconds: int
    ) -> Load:
        """Commits of one intent row by `clients` connections.

        `connection` is libpq's environment.
        """
        log = self._folder / "generator.log"
        log.unlink(missing_ok=True)
        with resources.as_file(resources.files(__package__) / "sql" / _PGBENCH_SCRIPT) as script:
            command = [
                *(str(program), "--no-vacuum", "--protocol", "prepared", "--file", str(script)),
                *("--client", str(clients), "--jobs", "1", "--time", str(seconds)),
            ]
            process = Process("pgbench", command, connection, log)
            with stopping(process):
                process.wait(seconds + END_TIMEOUT_S)
        printed = process.printed()
        rate = re.search(r"^tps = ([0-9.]+)", printed, re.MULTILINE)
        count = re.search(r"actually processed: ([0-9]+)", printed)
        failed = re.search(r"failed transactions: ([0-9]+)", printed)
        if count is None:
            raise process.failure("did not count")
        # Without a rate it was still connecting when its time was over.
        per_s = float(rate[1]) if rate else 0.0
        return Load(per_s, int(count[1]), int(failed[1]) if failed else 0, {})

    def open(self, target: Target, rate: int, seconds: int, callers: int) -> OpenLoad:
        """Calls at a constant rate, whatever becomes of them.

        At most `callers` are under way at once: what cannot be sent for it is counted as dropped.
        """
        options = {
            "scenarios": {
                "open": {
                    "executor": "constant-arrival-rate",
                    "rate": rate,
                    "timeUnit": "1s",
                    "duration": f"{seconds}s",
                    "preAllocatedVUs": callers,
                    "maxVUs": callers,
                }
            },
            # A trend of a status is kept where a threshold asks for it; these never fail.
            "thresholds": {trend: ["max>=0"] for trend in (_ACCEPTED, _REFUSED)},
        }
        summary = self._folder / "summary.json"
        process = self._start(self._write_plan(target, options), summary, None)
        with stopping(process):
            process.wait(seconds + END_TIMEOUT_S)
        passes, fails = _checks(summary)
        metrics = json.loads(summary.read_text("utf-8"))["metrics"]
        latency = metrics["iteration_duration_corrected"]
        accepted, refused = metrics.get(_ACCEPTED, {}), metrics.get(_REFUSED, {})
        return OpenLoad(
            offered_per_s=rate,
            achieved_per_s=metrics["iterations"]["rate"],
            dropped=int(metrics.get("dropped_iterations", {}).get("count", 0)),
            failed=fails,
            p50_ms=latency["p(50)"],
            p99_ms=latency["p(99)"],
            max_ms=latency["max"],
            calls=passes,
            accepted_p99_ms=accepted.get("p(99)", 0.0),
            refused=int(refused.get("count", 0)),
            refusal_p99_ms=refused.get("p(99)", 0.0),
        )

    def _write_plan(self, target: Target, options: Mapping[str, Any]) -> Path:
        step = {
            "target": target.address,
            "method": f"{SERVICE}/AuthorizePayment",
            "plaintext": not target.tls,
            "descriptorSet": self._contract,
            "metadata": {"authorization": f"Bearer {target.api_key}"},
            "message": authorization(),
            "checks": {"ok": {"status": 0}},
        }
        plan = {
            "flows": {"default": [{"grpc": step}]},
            "options": {
                **options,
                "insecureSkipTLSVerify": target.tls,  # its certificate is a minute old
                "summaryTrendStats": ["p(50)", "p(99)", "max", "count"],
            },
        }
        path = self._folder / "plan.json"
        path.write_text(json.dumps(plan), "utf-8")
        return path

    def _start(self, plan: Path, summary: Path, control_port: int | None) -> Process:
        summary.unlink(missing_ok=True)
        log = self._folder / "generator.log"
        log.unlink(missing_ok=True)
        arguments = ["-m", "k9", "run", "-q", str(plan), "--summary-export", str(summary)]
        if control_port is not None:
            arguments += ["-a", f"127.0.0.1:{control_port}"]
        return Process("generator", [sys.executable, *arguments], {}, log)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    at_s: float
    """On the generator's clock, since its start."""
    count: float
    cpu_s: Mapping[str, float]


class _Watch:
    """Reads a running k9's counters by its control API, where they change once a second."""

    def __init__(self, process: Process, watched: Mapping[str, int], port: int) -> None:
        self._process = process
        self._watched = watched
        self._url = f"http://127.0.0.1:{port}/v1/metrics"
        self._started = time.monotonic()

    def at_least(self, seconds: float) -> _Snapshot:
        """The first counters of that time or later. Raises ProcessFailed."""
        until = self._started + seconds + END_TIMEOUT_S
        # The first counters come a second after the start; asking often costs the generator.
        wait_s = self._started + seconds - time.monotonic()
        time.sleep(max(0.0, wait_s))
        while time.monotonic() < until:
            counted = self._iterations()
            if counted is not None:
                count, rate = counted
                at_s = count / rate
                if at_s >= seconds - 0.1:
                    cpu = {name: cpu_s(pid) for name, pid in self._watched.items()}
                    return _Snapshot(at_s, count, cpu)
            if not self._process.running:
                failure = self._process.failure("ended before its window")
                raise NoWindow(str(failure))
            time.sleep(POLL_S)
        raise self._process.failure("does not count")

    def _iterations(self) -> tuple[float, float] | None:
        try:
            with urllib.request.urlopen(self._url, timeout=_CONTROL_TIMEOUT_S) as answer:  # noqa: S310 - http, to ourselves
                data = json.load(answer)["data"]
        except OSError:
            return None  # it does not listen yet
        for metric in data:
            if metric["id"] == "iterations":
                sample = metric["attributes"]["sample"]
                if sample["rate"] > 0:
                    return sample["count"], sample["rate"]
        return None


def _checks(summary: Path) -> tuple[int, int]:
    """How many calls were answered with OK, and how many were not. Raises ProcessFailed."""
    try:
        metrics = json.loads(summary.read_text("utf-8"))["metrics"]
        return int(metrics["checks"]["passes"]), int(metrics["checks"]["fails"])
    except (FileNotFoundError, KeyError) as error:
        raise ProcessFailed("the generator made no call") from error
