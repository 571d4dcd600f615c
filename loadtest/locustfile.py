"""The Locust file: `locust -f loadtest/locustfile.py --host HOST:PORT`, options `--load-…`.

Locust starts, distributes, stops and shows. Its users are closed-loop, so each has one generator
process beside it (`loadtest.generator`), which sends its share of an open-loop schedule; there is
one user in each Locust process. The master, or a process that runs alone, writes what came of it
into the folder `--load-out`.
"""

import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, ClassVar, Final, cast

import gevent
from gevent.event import Event
from locust import User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import RequestStats

from loadtest.calls import DROPPED, OK
from loadtest.engine import Chunk
from loadtest.generator import read_frames
from loadtest.measures import code_name
from loadtest.mixes import Kind
from loadtest.plan import BadPlan, Plan, add_options, merchants_of
from loadtest.samples import ACKNOWLEDGED_FILE, OUTCOME_FILE, SAMPLES_FILE, Sample, unpack_samples

MESSAGE: Final = "open-loop"
WEB_UI_STAYS_S: Final = 3.0
"""After the last answer, so that the page shows it."""
STOPPED: Final = "stopped before the end of its schedule"
LAST_WORDS_S: Final = 10.0
"""How long after the deadline of the last call generators may take to say what became of it."""
STATISTICS_SLICE: Final = 100
"""Calls entered into Locust's statistics at a time, before other greenlets have a turn."""


class OpenLoopUser(User):
    """Has its process's share of the schedule sent, once."""

    _sent: ClassVar[set[str]] = set()
    """The runs that this process has sent: their keys must not be used again."""

    @task
    def send(self) -> None:
        """Run a generator, and hand on what it says."""
        runner = self.environment.runner
        assert runner is not None
        assert self.environment.parsed_options is not None
        try:
            plan = Plan.of(self.environment.parsed_options)
        except BadPlan as error:  # a file that is not on this worker's machine
            runner.send_message(MESSAGE, {"share": -1, "failure": str(error)})
            raise StopUser from error
        if plan.run_id in self._sent:  # another user, or a run with this id was started again
            sys.stderr.write("load generator: this run is sent already; start Locust anew\n")
            raise StopUser
        self._sent.add(plan.run_id)
        share = max(0, runner.worker_index) if plan.shares > 1 else 0
        job = {"plan": asdict(plan), "address": self.host, "share": share}
        generator = subprocess.Popen(
            [sys.executable, "-m", "loadtest.generator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert generator.stdin is not None
        assert generator.stdout is not None
        # In a greenlet of its own: who stops this one must not tear a frame.
        reader = gevent.spawn(self._hand_on, generator.stdout, share)
        try:
            generator.stdin.write(json.dumps(job).encode() + b"\n")
            generator.stdin.flush()
            failure = reader.get()
        except gevent.GreenletExit:  # stopped by a person
            # The generator sends no more, and says what became of what it has sent.
            generator.stdin.close()
            failure = reader.get() or STOPPED
        finally:
            generator.stdin.close()
            status = generator.wait()
            generator.stdout.close()
        if status and not failure:
            failure = f"generator {share} ended with status {status}"
        runner.send_message(MESSAGE, {"share": share, "failure": failure, "done": True})
        raise StopUser

    def _hand_on(self, output: IO[bytes], share: int) -> str:
        """Hand on what a generator says until it ends; returns what went wrong."""
        assert self.environment.runner is not None
        failure = ""
        for frame in read_frames(output):
            if isinstance(frame, str):
                failure = frame
            else:
                self.environment.runner.send_message(MESSAGE, {"share": share, **asdict(frame)})
                self._enter(frame)
        return failure

    def _enter(self, chunk: Chunk) -> None:
        """Into Locust's own statistics, for its web UI and files."""
        assert self.environment.runner is not None
        stats = self.environment.runner.stats
        for number, sample in enumerate(unpack_samples(chunk.samples), 1):
            enter(stats, sample)
            if number % STATISTICS_SLICE == 0:
                gevent.sleep(0)


def enter(stats: RequestStats, sample: Sample) -> None:
    """Enter a sample into Locust's statistics."""
    name = Kind(sample.kind).name.lower()
    if sample.code != DROPPED:  # what was not sent took no time
        cast("Any", stats).log_request("gRPC", name, sample.latency_ms, 0)  # locust says int
    if sample.code != OK:
        stats.log_error("gRPC", name, code_name(sample.code))


class Collector:
    """Gathers what the generators say, writes it down, and shows progress."""

    def __init__(self, environment: Environment, plan: Plan) -> None:
        self._environment = environment
        self._plan = plan
        self._out = Path(plan.out) if plan.out else None
        self.begin()

    def begin(self) -> None:
        """Forget everything, the files' contents too, for a new run."""
        self._over = Event()
        self._reasons: Counter[str] = Counter()
        self._in_flight: dict[int, int] = {}
        self._due: dict[int, int] = {}
        self._done = 0
        self._failures: list[str] = []
        self._second: list[tuple[float, float, int]] = []
        self._dropped = 0
        self._errors = 0
        self._shown_at = time.monotonic()
        self._started_at = 0.0
        """The first intended time could come then, in seconds since 1970."""
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            for name in (SAMPLES_FILE, ACKNOWLEDGED_FILE):
                (self._out / name).write_bytes(b"")

    def receive(self, msg: Any, **_: object) -> None:
        """A generator's message."""
        told = msg.data
        if told.get("failure"):
            self._failures.append(told["failure"])
        if told.get("done") or told.get("failure"):
            self._done += 1
            if self._done >= self._plan.shares:
                self._finish()
            elif told.get("failure"):
                # The others send no more either, and say first what became of what they have sent.
                assert self._environment.runner is not None
                gevent.spawn(self._environment.runner.stop)
            return
        self._started_at = self._started_at or time.time() - told["elapsed_s"]
        self._reasons.update(told["reasons"])
        self._in_flight[told["share"]] = told["in_flight"]
        self._due[told["share"]] = told["due"]
        if self._out is not None:
            _append(self._out / SAMPLES_FILE, told["samples"])
            _append(self._out / ACKNOWLEDGED_FILE, told["acknowledged"])
        self._show(told)

    def _show(self, told: dict[str, Any]) -> None:
        for sample in unpack_samples(told["samples"]):
            self._second.append((sample.added_ms, sample.latency_ms, sample.code))
        # One line a second, with however many generators.
        if told["share"] != min(self._in_flight) or told["elapsed_s"] <= 0:
            return
        now = time.monotonic()
        answered = sorted(added for added, _, code in self._second if code == OK)
        dropped = sum(code == DROPPED for _, _, code in self._second)
        self._dropped += dropped
        self._errors += len(self._second) - len(answered) - dropped
        rate = len(answered) / max(now - self._shown_at, 0.001)
        if answered:
            added = f"p50 {_rank(answered, 0.5):8.1f}  p99 {_rank(answered, 0.99):8.1f} ms"
        else:
            added = f"{'no answers':>25}"
        sys.stdout.write(
            f"  {told['elapsed_s']:6.0f} s {rate:8.0f} answers/s  added {added}"
            f"  in flight {sum(self._in_flight.values()):6d}"
            f"  errors {self._errors:5d}  dropped {self._dropped:5d}\n"
        )
        sys.stdout.flush()
        self._second.clear()
        self._shown_at = now

    def _finish(self) -> None:
        if self._over.is_set():
            return
        if self._out is not None:
            outcome = {
                "reasons": dict(self._reasons),
                "failures": [each for each in self._failures if each != STOPPED],
                "stopped": STOPPED in self._failures,
                "due": sum(self._due.values()),
                "started_at": self._started_at,
            }
            (self._out / OUTCOME_FILE).write_text(json.dumps(outcome), "utf-8")
        for failure in self._failures:
            sys.stderr.write(f"load generator: {failure}\n")
        self._environment.process_exit_code = 1 if self._failures else 0
        self._over.set()
        gevent.spawn_later(0.1, self._end)

    def conclude(self, **_: object) -> None:
        """Before Locust quits: have all generators end, and take what they have to say. Locust
        itself gives its workers half a second.
        """
        runner = self._environment.runner
        if self._over.is_set() or not isinstance(runner, MasterRunner):
            return
        runner.stop()
        until = time.monotonic() + self._plan.deadline + LAST_WORDS_S
        while runner.worker_count and time.monotonic() < until and not self._over.wait(0.1):
            pass

    def _end(self) -> None:
        """Quit; where a person started the run in the web UI, only stop it."""
        runner, web_ui = self._environment.runner, self._environment.web_ui
        assert runner is not None
        if web_ui is None:
            runner.quit()
            return
        runner.stop()
        options = self._environment.parsed_options
        if options is not None and options.autostart:
            gevent.sleep(WEB_UI_STAYS_S)
            runner.quit()
            cast("Any", web_ui).stop()  # locust types it not


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _prepare(environment: Environment, **_: object) -> None:
    options = environment.parsed_options
    if isinstance(environment.runner, WorkerRunner) or options is None:
        return
    try:
        # Read here, so that workers on other machines need no such file.
        options.load_merchants = merchants_of(options.load_merchants)
        plan = Plan.of(options)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"load generator: {error}\n")
        raise SystemExit(2) from error
    collector = Collector(environment, plan)
    if not options.load_run_id:

        def renew(**_: object) -> None:
            # A run that a person starts again in the web UI is another one, with keys of its own.
            options.load_run_id = secrets.token_hex(4)
            collector.begin()

        cast("Any", environment.events).test_start.add_listener(renew)
    assert environment.runner is not None
    environment.runner.register_message(MESSAGE, cast("Any", collector.receive))
    cast("Any", environment.events).quitting.add_listener(collector.conclude)


_hooks = cast("Any", events)  # locust types them not
_hooks.init_command_line_parser.add_listener(add_options)
_hooks.init.add_listener(_prepare)
