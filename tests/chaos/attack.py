"""Bad clients in a trial: who is attacked, and what the gateways and good clients must keep."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Final

from tests.chaos.bad_clients import Orders, orders_text
from tests.chaos.frames import CUT, NO_STATUS
from tests.harness import asyncio_run, new_shop

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.chaos.trial import Run

CONNECTIONS: Final = 1_000
WARM_SHARE: Final = 0.5
"""Of the messages, before the memory is measured that may not grow: buffers, caches and pools have
grown by then."""
STORM: Final = 50
"""Connections that reset their streams at once while it warms up: three times as many calls as grpc
core lets wait, so that all that they can take is taken by then."""
QUIET_ANSWERS: Final = 600
"""Of good clients, for their latency while nobody attacks."""
P99_RATIO_MAX: Final = 4.0
"""The good clients' 99th percentile under attack, to the one without, on cores that they share."""
GROWN_BYTES_MAX: Final = 24 * 1024 * 1024
"""By which a gateway's memory may grow after the warm share, however many messages follow: in the
full campaign 200 bytes for each fuzzed one, with all else that is sent beside it."""
ATTACK_TIMEOUT_S: Final = 3600.0

NEVER: Final = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS", CUT, NO_STATUS})


class AttackSucceeded(Exception):
    """A gateway or the good clients suffered."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What an attack did to a gateway that is still there, and to its good clients."""

    statuses: Mapping[str, Mapping[str, int]]
    """What bad clients were told, by the kind of attack."""
    quiet_p99_s: float
    attacked_p99_s: float
    begun_bytes: int
    """The gateway's memory before the attack."""
    warmed_bytes: int
    """The same after the warm share."""
    ended_bytes: int
    """The same at the end."""

    def figures(self) -> str:
        """For people."""
        return (
            f"p99 of good clients {1000 * self.quiet_p99_s:.0f} ms, attacked"
            f" {1000 * self.attacked_p99_s:.0f} ms; memory {self.begun_bytes / 1e6:.0f} MB, warm"
            f" {self.warmed_bytes / 1e6:.0f} MB, at the end {self.ended_bytes / 1e6:.0f} MB"
        )

    def problems(self) -> list[str]:
        """What may not happen and did."""
        problems = [
            f"{attack} met {count} {status}"
            for attack, counts in self.statuses.items()
            for status, count in counts.items()
            if status in NEVER
        ]
        if self.attacked_p99_s > P99_RATIO_MAX * self.quiet_p99_s:
            ratio = self.attacked_p99_s / self.quiet_p99_s
            problems.append(f"the good clients' p99 rose to {ratio:.1f} times")
        grown_bytes = self.ended_bytes - self.warmed_bytes
        if grown_bytes > GROWN_BYTES_MAX:
            problems.append(f"its memory grew by {grown_bytes / 1e6:.0f} MB after it was warm")
        return problems


class BadClients:
    """The attack of a trial."""

    def __init__(self, run: Run, messages: int) -> None:
        self._run = run
        self._messages = messages
        # A merchant of their own: bad clients may be known to us.
        self._api_key = asyncio_run(lambda: new_shop(run.system.dsn)).api_key

    def carry_out(self) -> None:
        """Attack the gateways in turn. Raises AttackSucceeded."""
        run = self._run
        if importlib.util.find_spec("envoy") is None:
            run.notes.append("native behind Envoy: not run: `make bench` installs Envoy")
            self._attack("grpcio", 0, run.gateways[0].address, self._messages)
            return
        self._attack("grpcio", 0, run.gateways[0].address, self._messages // 2)
        with self._envoy(run.gateways[1].address) as (address, certificate):
            self._attack(
                "native behind Envoy", 1, address, self._messages - self._messages // 2, certificate
            )

    @contextmanager
    def _envoy(self, upstream: str) -> Iterator[tuple[str, str]]:
        from loadtest.bench.envoy import (  # noqa: PLC0415 - it needs what may not be installed
            start_envoy,
            write_certificate,
        )
        from loadtest.children import stopping  # noqa: PLC0415 - as above

        folder = self._run.system.directory
        certificate, key = write_certificate(folder)
        process, address = start_envoy(folder, upstream, certificate, key)
        with stopping(process):
            yield address, str(certificate)

    def _attack(
        self, name: str, number: int, address: str, messages: int, certificate: str = ""
    ) -> None:
        run = self._run
        pid = run.gateways[number].pid
        quiet_s = self._p99_s(QUIET_ANSWERS)
        begun = resident_bytes(pid)
        warm = int(messages * WARM_SHARE)
        warming = self._send(address, warm, certificate, STORM)
        warmed = resident_bytes(pid)
        before = len(run.clients.latencies_s)
        statuses = self._send(address, messages - warm, certificate)
        for attack, counts in warming.items():
            statuses[attack] = dict(Counter(counts) + Counter(statuses[attack]))
        effect = Effect(
            statuses,
            quiet_s,
            _p99_s(run.clients.latencies_s[before:]),
            begun,
            warmed,
            resident_bytes(pid),
        )
        run.notes.append(
            f"{name}: {messages} fuzzed, {CONNECTIONS} idle connections; {effect.figures()};"
            f" {json.dumps(statuses)}"
        )
        problems = effect.problems()
        if not run.gateways[number].running:
            problems.append("the gateway has ended")
        if problems:
            raise AttackSucceeded(f"{name}: {'; '.join(problems)}")

    def _p99_s(self, answers: int) -> float:
        """Of the next answers that good clients get."""
        before = len(self._run.clients.latencies_s)
        self._run.clients.await_answers(answers)
        return _p99_s(self._run.clients.latencies_s[before:])

    def _send(
        self, address: str, messages: int, certificate: str, storm: int = 0
    ) -> dict[str, dict[str, int]]:
        orders = Orders(
            address,
            self._api_key,
            self._run.random.getrandbits(32),
            messages,
            CONNECTIONS,
            certificate,
            storm,
        )
        ended = subprocess.run(
            [sys.executable, "-m", "tests.chaos.bad_clients"],
            input=orders_text(orders),
            capture_output=True,
            text=True,
            timeout=ATTACK_TIMEOUT_S,
            cwd=Path(__file__).resolve().parents[2],
            check=False,
        )
        assert ended.returncode == 0, f"the attackers failed: {ended.stderr[-2000:]}"
        statuses: dict[str, dict[str, int]] = json.loads(ended.stdout)
        return statuses


def _p99_s(latencies_s: list[float]) -> float:
    return quantiles(latencies_s, n=100)[-1]


def resident_bytes(pid: int) -> int:
    """The memory of a process; proc(5)."""
    text = Path(f"/proc/{pid}/status").read_text("ascii")
    [line] = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
