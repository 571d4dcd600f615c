"""Load tests as their users run them, and the honesty of the generator behind every figure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

import psutil
import pytest

from loadtest.arrivals import Schedule
from loadtest.audit import Audit, audit_by_database
from loadtest.calls import DROPPED, OK, Acknowledged
from loadtest.engine import Chunk
from loadtest.generator import read_frames
from loadtest.measures import Analysis
from loadtest.plan import API_KEY_VARIABLE, Plan
from loadtest.runner import LOCUST_FILE
from loadtest.samples import (
    ACKNOWLEDGED_FILE,
    OUTCOME_FILE,
    SAMPLES_FILE,
    read_acknowledged,
    unpack_samples,
)
from storage.embedded import EmbeddedPostgres, free_port
from tests.harness import asyncio_run, eventually, running_system
from tests.servers import release_shared_memory

if TYPE_CHECKING:
    import asyncpg

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

PAUSE_S = 2.0
RUN_TIMEOUT_S = 150.0


@pytest.fixture
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    # A gateway that is stalled for a while comes to an end with every call that it has.
    with running_system(
        postgres,
        redis,
        send_window_s=60,
        simulator_connect_timeout_s=60,
        simulator_answer_timeout_s=60,
        admission_target_ms=30_000,
        admission_bulk_target_ms=30_000,
    ) as running:
        yield running


@dataclass
class Sent:
    """What a generator handed over."""

    schedule: Schedule
    samples: bytes = b""
    lines: bytes = b""
    failures: list[str] = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)

    @property
    def analysis(self) -> Analysis:
        return Analysis(unpack_samples(self.samples), self.schedule.segments)

    @property
    def intended(self) -> int:
        return len(list(self.schedule.arrivals()))

    def told(self, folder: Path) -> list[Acknowledged]:
        path = folder / "acknowledged"
        path.write_bytes(self.lines)
        return list(read_acknowledged(path))

    def audit(self, system: System, folder: Path) -> Audit:
        return audit_by_database(
            self.told(folder), system.dsn, system.simulator.journal, folder / "audit.sqlite"
        )


@contextmanager
def sending(system: System, gateway: GatewayProcess, plan: Plan) -> Iterator[Sent]:
    """A generator at work; what it sent is complete when the context has ended."""
    plan = replace(plan, run_id=os.urandom(4).hex())
    sent = Sent(plan.schedule)
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.generator"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, API_KEY_VARIABLE: system.shop.api_key},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = process.stdout

    def read() -> None:
        for frame in read_frames(output):
            if isinstance(frame, Chunk):
                sent.samples += frame.samples
                sent.lines += frame.acknowledged
            else:
                sent.failures.append(frame)
            sent.first.set()
        sent.first.set()

    reader = threading.Thread(target=read)
    try:
        job = {"plan": asdict(plan), "address": gateway.address, "share": 0}
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        reader.start()
        yield sent
        reader.join(RUN_TIMEOUT_S)
        assert not reader.is_alive(), "the generator does not end"
        assert process.wait(RUN_TIMEOUT_S) == 0, sent.failures
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        if reader.ident is not None:
            reader.join(RUN_TIMEOUT_S)
        process.stdout.close()


def pause(gateway: GatewayProcess, seconds: float) -> float:
    """Stop the server for a while; returns for how long it was stopped at least."""
    gateway.pause()
    begun = time.monotonic()
    try:
        time.sleep(seconds)
    finally:
        paused_s = time.monotonic() - begun
        gateway.resume()
    return paused_s


def test_stall_of_the_server_shows_in_the_percentiles(system: System, tmp_path: Path) -> None:
    gateway = system.start_gateway()
    plan = Plan(rate=50, duration=6, warm_up=0, arrivals="constant")
    with sending(system, gateway, plan) as sent:
        assert sent.first.wait(RUN_TIMEOUT_S)
        paused_ms = 1000 * pause(gateway, PAUSE_S)
    whole = sent.analysis.whole
    # A third of all sends was intended while nothing was answered: a closed loop, or latencies from
    # the real send, would show a stall of one call for each of its users.
    assert whole.offered == sent.intended == 300
    assert whole.latency.max_ms >= 0.9 * paused_ms
    assert whole.latency.percentile(99) >= 0.75 * paused_ms
    assert whole.latency.percentile(90) >= 0.4 * paused_ms
    assert whole.codes == {OK: whole.offered}, gateway.log
    assert sent.audit(system, tmp_path).clean


def test_sends_beyond_the_limit_in_flight_are_counted_as_dropped(
    system: System, tmp_path: Path
) -> None:
    gateway = system.start_gateway()
    plan = Plan(rate=50, duration=4, warm_up=0, in_flight_max=5)
    with sending(system, gateway, plan) as sent:
        assert sent.first.wait(RUN_TIMEOUT_S)
        pause(gateway, 1.5)
    whole = sent.analysis.whole
    assert whole.dropped > 0
    assert whole.codes == {OK: whole.ok, DROPPED: whole.dropped}
    assert whole.offered == sent.intended
    assert len(sent.told(tmp_path)) == whole.ok


def test_calls_that_time_out_are_unknown_and_never_lost(system: System, tmp_path: Path) -> None:
    gateway = system.start_gateway()
    plan = Plan(rate=50, duration=4, warm_up=0, deadline=1)
    with sending(system, gateway, plan) as sent:
        assert sent.first.wait(RUN_TIMEOUT_S)
        pause(gateway, 2 * plan.deadline)
    whole = sent.analysis.whole
    audit = sent.audit(system, tmp_path)
    assert whole.errors > 0
    assert audit.clean
    assert audit.unknown == whole.errors
    assert audit.acked == whole.ok


def test_audit_finds_what_was_lost_or_changed_after_it_was_acknowledged(
    system: System, tmp_path: Path
) -> None:
    gateway = system.start_gateway()
    with sending(system, gateway, Plan(rate=30, duration=2, warm_up=0)) as sent:
        pass
    assert sent.audit(system, tmp_path).clean
    lost, changed, *_ = sent.told(tmp_path)

    async def spoil() -> None:
        connection: asyncpg.Connection = await connect(system.dsn)
        try:
            await connection.execute(
                "DELETE FROM operations WHERE operation_id = $1", lost.operation_id
            )
            await connection.execute(
                "UPDATE operations SET response = response || 'x' WHERE operation_id = $1",
                changed.operation_id,
            )
        finally:
            await connection.close()

    asyncio_run(spoil)
    audit = sent.audit(system, tmp_path)
    assert not audit.clean
    assert (audit.missing, audit.contradicted, audit.unrecorded_charges) == (1, 1, 1)


COPY_SQL = """
INSERT INTO operations
SELECT (jsonb_populate_record(o, $2::jsonb)).* FROM operations o WHERE operation_id = $1
"""
DISCREPANCY_SQL = """
INSERT INTO discrepancies (merchant_id, payment_id, operation_id, kind, expected, reported)
VALUES ('mer', $1, 'op', 'kind', '', '')
"""


def test_audit_asks_for_no_operations_but_those_of_the_run(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = system.start_gateway()
    with sending(system, gateway, Plan(rate=30, duration=1, warm_up=0)) as sent:
        pass
    mine = sent.told(tmp_path)[0]

    async def execute(sql: str, *values: object) -> None:
        connection = await connect(system.dsn)
        try:
            await connection.execute(sql, *values)
        finally:
            await connection.close()

    theirs = {"operation_id": "op_theirs", "payment_id": "pay_theirs", "idempotency_key": "theirs"}
    reversal = {"operation_id": "op_reversal", "kind": 7, "idempotency_key": None}
    for other in (theirs, reversal):
        in_doubt = json.dumps({**other, "state": 8})
        asyncio_run(partial(execute, COPY_SQL, mine.operation_id, in_doubt))
    for payment_id in ("pay_theirs", mine.payment_id):
        asyncio_run(partial(execute, DISCREPANCY_SQL, payment_id))
    waited = 0

    async def settle(_: float) -> None:
        nonlocal waited
        waited += 1
        await execute("UPDATE operations SET state = 4 WHERE operation_id = 'op_reversal'")

    monkeypatch.setattr("loadtest.audit.asyncio.sleep", settle)
    audit = sent.audit(system, tmp_path)
    assert audit.clean
    assert (audit.unfinished, audit.discrepancies, waited) == (0, 1, 1)


async def connect(dsn: str) -> asyncpg.Connection:
    import asyncpg  # noqa: PLC0415

    return await asyncpg.connect(dsn)


def load_test(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        env={**os.environ, **variables},
        check=False,
    )


def spoiled_load_test(
    spoil: Callable[[int], None], *arguments: str, **variables: str
) -> tuple[int, str]:
    """A load test that something is done to once answers came: exit status and output.

    `spoil` gets its process id.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )
    assert process.stdout is not None
    # Ends the reading, too.
    watchdog = threading.Timer(RUN_TIMEOUT_S, process.terminate)
    watchdog.start()
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if sum(" answers/s " in each for each in said) == 1 and " answers/s " in line:
                spoil(process.pid)
        return process.wait(RUN_TIMEOUT_S), "".join(said)
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(RUN_TIMEOUT_S)
        process.stdout.close()


def interrupt(pid: int) -> None:
    os.kill(pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("generators", "how", "status"),
    [(1, "SIGINT", 130), (1, "SIGTERM", 130), (2, "SIGINT", 130), (2, "web UI", 3)],
)
def test_run_that_a_person_ends_tells_what_was_measured_until_then(
    tmp_path: Path, generators: int, how: str, status: int
) -> None:
    web_port = free_port()
    arguments = ["--rate", "30", "--duration", "100", "--warm-up", "0", "--control", "0"]
    arguments += ["--generators", str(generators), "--folder", str(tmp_path)]
    if how == "web UI":
        arguments += ["--web-port", str(web_port)]

    def end(pid: int) -> None:
        if how == "web UI":
            ask(f"http://127.0.0.1:{web_port}/stop", {})
        else:
            os.kill(pid, signal.Signals[how])

    ended, said = spoiled_load_test(end, *arguments)
    assert ended == status, said
    summary = summary_in(tmp_path)
    assert summary["stopped"]
    assert f"INVALID: {summary['stopped']}" in said
    assert not summary["valid"]
    assert not summary["slo_met"]
    assert 0 < summary["duration_s"] < 100
    assert summary["offered_rps"] == pytest.approx(30, rel=0.9)
    assert summary["ok"] == summary["offered"] > 0, summary["codes"]
    assert summary["unaccounted"] == 0
    # None of the generators' acknowledgements is lost: their charges would be unrecorded.
    assert summary["audit"]["clean"], summary["audit"]
    assert summary["audit"]["acked"] == summary["ok"] + 1
    report = (tmp_path / "report.html").read_text("utf-8")
    assert f"Invalid: {summary['stopped']}" in report


def test_run_that_is_interrupted_before_it_sent_anything_has_no_result(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "loadtest", "--rate", "30", "--duration", "100"),
            *("--control", "100", "--folder", str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith("control: ") for line in process.stdout)
        interrupt(process.pid)
        said = process.stdout.read()
        assert process.wait(RUN_TIMEOUT_S) == 130, said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert "interrupted, no result" in said
    assert not (tmp_path / "summary.json").exists()


def kill_gateway_of(pid: int) -> None:
    kill_child(pid, lambda command: command[-3:] == ["-m", "gateway", "serve"])


def kill_child(pid: int, is_meant: Callable[[list[str]], bool]) -> None:
    [child] = [each for each in psutil.Process(pid).children() if is_meant(each.cmdline())]
    child.kill()


@pytest.mark.parametrize(
    ("server", "word", "status"),
    [
        ("simulator", "gateway.connectors.simulator", 3),
        ("Redis", "valkey", 3),
        # Nobody can say then whether what was acknowledged is there.
        ("PostgreSQL", "bin/postgres", 1),
    ],
)
def test_server_that_ends_during_the_run_ends_it_and_leaves_its_figures(
    tmp_path: Path, server: str, word: str, status: int
) -> None:
    ended, said = spoiled_load_test(
        lambda pid: kill_child(pid, lambda command: any(word in each for each in command)),
        *("--rate", "20", "--duration", "100", "--warm-up", "0", "--control", "0"),
        *("--deadline", "2", "--folder", str(tmp_path)),
    )
    assert ended == status, said
    assert "Traceback" not in said
    assert f"{server} ended by itself" in said
    assert f"{server} ended during the run" in said.splitlines()[-4]
    summary = summary_in(tmp_path)
    assert summary["ended"] == [server]
    assert not summary["gateway_ended"]
    assert not summary["valid"]
    assert 0 < summary["duration_s"] < 100
    assert summary["audit"]["clean"] is (None if server == "PostgreSQL" else True)
    report = (tmp_path / "report.html").read_text("utf-8")
    assert f"{server} ended during the run" in report
    release_shared_memory(EmbeddedPostgres(tmp_path / "postgres"))


def test_generator_that_is_killed_ends_the_run_which_names_it(tmp_path: Path) -> None:
    def kill_worker(pid: int) -> None:
        for child in psutil.Process(pid).children():
            if "--worker" in child.cmdline():
                child.kill()
                return

    ended, said = spoiled_load_test(
        kill_worker,
        # Longer than a test may take: the end is not that of the schedule.
        *("--rate", "20", "--duration", "1000", "--warm-up", "0", "--control", "0"),
        *("--generators", "2", "--folder", str(tmp_path)),
    )
    assert ended == 3, said
    assert re.search("no result: generator-[01] ended before all was sent", said), said
    assert not (tmp_path / "summary.json").exists()


def summary_in(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return summary


def test_short_run_leaves_a_clean_audit_a_summary_and_a_report(tmp_path: Path) -> None:
    done = load_test(
        *("--rate", "30", "--duration", "4", "--warm-up", "1", "--control", "2"),
        *("--mix", "everything", "--batch-items", "3", "--folder", str(tmp_path)),
    )
    assert done.returncode in {0, 1, 3}, done.stdout + done.stderr
    summary = summary_in(tmp_path)
    for name in (
        *("offered_rps", "achieved_rps", "dropped", "errors", "duration_s", "p50_ms", "p99_ms"),
        *("p999_ms", "max_ms", "added_p50_ms", "added_p99_ms", "added_p999_ms"),
        *("control_p99_ms", "psp_lateness_p99_ms", "valid", "audit", "slo_met"),
    ):
        assert name in summary
    assert summary["duration_s"] == 4
    assert summary["audit"]["clean"]
    assert summary["audit"]["acked"] > summary["kinds"]["authorize"]["ok"] > 0
    assert summary["audit"]["acked_operations"] > summary["audit"]["acked"]
    assert (summary["audit"]["missing"], summary["audit"]["duplicate_charges"]) == (0, 0)
    assert summary["errors"] == 0, summary["codes"]
    # The PSP works for a median of 120 ms, which is not the gateway's doing.
    assert summary["added_p50_ms"] + 50 < summary["kinds"]["authorize"]["p50_ms"]
    assert summary["control_p99_ms"] > 0
    statuses = {(True, True): 0, (True, False): 1, (False, False): 3}
    assert done.returncode == statuses[summary["valid"], summary["slo_met"]]
    assert " answers/s " in done.stdout
    report = (tmp_path / "report.html").read_text("utf-8")
    assert report.count("<svg") >= 7
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in report


def test_deployed_gateway_is_called_by_several_generators_and_audited_by_its_own_answers(
    system: System, tmp_path: Path
) -> None:
    gateway = system.start_gateway()
    merchants = tmp_path / "their merchants"
    # More than the kernel takes in one argument.
    merchants.write_text(f"{system.shop.merchant_id}\n" * 10_000)
    done = load_test(
        *("--target", gateway.address, "--merchants", f"@{merchants}"),
        *("--rate", "40", "--duration", "3", "--warm-up", "0", "--control", "0"),
        *("--generators", "2", "--folder", str(tmp_path)),
        **{API_KEY_VARIABLE: system.shop.api_key},
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    summary = summary_in(tmp_path)
    assert summary["audit"]["source"] == "GetOperation"
    assert summary["audit"]["clean"]
    assert summary["audit"]["acked"] == summary["ok"] + 1  # the first one is sent before the run
    assert summary["audit"]["duplicate_charges"] is None
    assert "charges were not compared" in done.stdout
    assert summary["left_out"] == ["control", "simulator", "gateway"]
    plan = Plan(rate=40, duration=3, warm_up=0)
    assert summary["offered"] == len(list(plan.schedule.arrivals()))
    assert system.shop.api_key not in done.stdout + done.stderr + json.dumps(summary)


def test_gateway_that_ends_during_the_run_fails_it_and_leaves_its_figures(tmp_path: Path) -> None:
    status, said = spoiled_load_test(
        kill_gateway_of,
        *("--rate", "20", "--duration", "4", "--warm-up", "0", "--control", "0"),
        *("--deadline", "2", "--folder", str(tmp_path)),
    )
    assert status == 1, said
    assert "the gateway ended during the run" in said
    summary = summary_in(tmp_path)
    assert summary["gateway_ended"]
    assert not summary["slo_met"]
    assert summary["errors"] > 0
    assert summary["audit"]["clean"], summary["audit"]
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "Failed: the gateway ended during the run" in report


def test_worker_of_the_gateway_that_ends_fails_the_run_which_tells_of_it(tmp_path: Path) -> None:
    def kill_worker(pid: int) -> None:
        for child in psutil.Process(pid).children(recursive=True):
            if child.cmdline()[-4:-1] == ["-m", "gateway", "worker"]:
                child.kill()
                return

    status, said = spoiled_load_test(
        kill_worker,
        *("--rate", "20", "--duration", "4", "--warm-up", "0", "--control", "0"),
        *("--workers", "2", "--deadline", "5", "--folder", str(tmp_path)),
    )
    summary = summary_in(tmp_path)
    assert (status, summary["workers_ended"], summary["gateway_ended"]) == (1, 1, False), said
    assert "FAILED: workers of the gateway ended during the run" in said


def test_target_that_goes_away_fails_the_run_and_leaves_its_figures(
    system: System, tmp_path: Path
) -> None:
    gateway = system.start_gateway()
    status, said = spoiled_load_test(
        lambda _: gateway.kill(),
        *("--target", gateway.address, "--merchants", system.shop.merchant_id),
        *("--rate", "20", "--duration", "3", "--warm-up", "0", "--control", "0"),
        *("--deadline", "2", "--folder", str(tmp_path)),
        **{API_KEY_VARIABLE: system.shop.api_key},
    )
    assert status == 1, said
    assert "the audit could not be done" in said
    summary = summary_in(tmp_path)
    assert summary["audit"]["clean"] is None
    assert summary["errors"] > 0
    assert "Failed: the audit could not be done" in (tmp_path / "report.html").read_text("utf-8")


@contextmanager
def web_ui(
    system: System, gateway: GatewayProcess, plan: Plan, *options: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Locust with its web UI: the address of that, and the process."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "locust", "-f", str(LOCUST_FILE), "--host", gateway.address),
            *("-u", "1", "-r", "1", "--web-host", "127.0.0.1", "--web-port", str(port)),
            *("--skip-log-setup", "--only-summary", *plan.arguments(), *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, API_KEY_VARIABLE: system.shop.api_key},
    )
    watchdog = threading.Timer(RUN_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        yield address, process
    finally:
        watchdog.cancel()
        process.terminate()
        print(process.communicate()[0])


def ask(url: str, form: dict[str, str] | None = None) -> dict[str, Any]:
    data = None if form is None else urlencode(form).encode()
    with urlopen(url, data, timeout=RUN_TIMEOUT_S) as answer:
        told: dict[str, Any] = json.loads(answer.read())
    return told


def test_run_that_a_person_stops_ends_and_loses_no_acknowledgement(
    system: System, tmp_path: Path
) -> None:
    gateway = system.start_gateway()
    plan = Plan(rate=50, duration=60, warm_up=0, run_id="stopped", out=str(tmp_path))
    with web_ui(system, gateway, plan, "--autostart") as (address, process):
        assert process.stdout is not None
        assert any(" answers/s " in line for line in process.stdout), "nothing was sent"
        ask(f"{address}/stop", {})
        said = process.stdout.read()
        assert process.wait(RUN_TIMEOUT_S) == 1, said
    assert "stopped before the end of its schedule" in said
    sent = Sent(
        plan.schedule,
        (tmp_path / SAMPLES_FILE).read_bytes(),
        (tmp_path / ACKNOWLEDGED_FILE).read_bytes(),
    )
    assert sent.analysis.whole.codes == {OK: len(sent.told(tmp_path))}
    assert sent.audit(system, tmp_path).clean


async def test_run_that_is_started_again_has_keys_of_its_own(
    system: System, tmp_path: Path
) -> None:
    gateway = system.start_gateway()
    plan = Plan(rate=20, duration=1, warm_up=0, out=str(tmp_path / "run"))
    runs: list[list[Acknowledged]] = []
    with web_ui(system, gateway, plan) as (address, _):

        def stands(state: str) -> bool:
            # The page is there before Locust has read the options.
            ready = (tmp_path / "run" / SAMPLES_FILE).exists()
            with suppress(OSError):
                return ready and ask(f"{address}/stats/requests")["state"] == state
            return False

        for state in ("ready", "stopped"):
            await eventually(partial(stands, state), f"Locust is {state}")
            outcome = tmp_path / "run" / OUTCOME_FILE
            outcome.unlink(missing_ok=True)
            assert ask(f"{address}/swarm", {"user_count": "1", "spawn_rate": "1"})["success"]
            await eventually(outcome.exists, "the run has ended")
            runs.append(list(read_acknowledged(tmp_path / "run" / ACKNOWLEDGED_FILE)))
    first, second = ({each.key for each in told} for told in runs)
    assert len(first) == len(second) == len(list(plan.schedule.arrivals()))
    assert not first & second
