"""A rolling restart in production's shape: several gateways with TLS behind a real load balancer,
which asks for their health, under the open-loop load of `make load` with the published retries.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

from loadtest.audit import audit_by_database
from loadtest.calls import OK
from loadtest.measures import Analysis
from loadtest.plan import API_KEY_VARIABLE, Plan
from loadtest.samples import RECORD, read_acknowledged, unpack_samples
from storage.embedded import free_port
from tests.envoys import (
    CERTIFICATE,
    DRAIN_FRONT,
    KEY,
    Envoy,
    find_envoy,
    running_balancer,
    running_envoy,
    sidecar_config,
)
from tests.harness import running_system

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.engine import Chunk
    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

PODS: Final = 3
RATE: Final = 50.0
"""Sends a second, whatever comes back."""
LATENCY_MS: Final = (150, 400)
"""The PSP's, median and 99th percentile: so many in flight at every step, on a machine that is busy
with other things too.
"""
ANSWERS: Final = 50
"""So many calls are answered between two steps of the rollout."""
DURATION_S_MAX: Final = 600.0
"""The load ends when the rollout has ended; by then it has."""
CONNECTION_AGE_S: Final = 2
"""So that connections are aged under load, too."""
LEAD_AWAY_S: Final = (1, 5)
"""How long, at least and at most, a side-car leads callers away before its gateway is stopped."""


@dataclass
class Pod:
    """A gateway, on `native` behind a side-car as the chart has it, at an address that stays."""

    system: System
    transport: str
    folder: Path
    port: int = field(default_factory=free_port)
    _inner_port: int = field(default_factory=free_port)
    _admin_port: int = field(default_factory=free_port)
    _gateway: GatewayProcess | None = None
    _sidecar: Envoy | None = None
    ends: ExitStack = field(default_factory=ExitStack)
    """Ends the side-car; harmless where it has ended."""

    @property
    def address(self) -> str:
        """Where the load balancer finds it."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        if self.transport == "native":
            config = sidecar_config(self.port, self._inner_port, self._admin_port, self.folder)
            self._sidecar = self.ends.enter_context(
                running_envoy(
                    *(config, self.address, self._admin_port, self.folder),
                    *("--drain-time-s", str(LEAD_AWAY_S[1]), "--drain-strategy", "immediate"),
                )
            )
            await self._sidecar.serving()
            self._gateway = self.system.start_gateway(
                transport="native",
                trusted_front=True,
                listen_address=f"127.0.0.1:{self._inner_port}",
            )
        else:
            self._gateway = self.system.start_gateway(
                transport="grpcio",
                listen_address=self.address,
                tls_certificate_file=CERTIFICATE,
                tls_key_file=KEY,
                connection_age_max_s=CONNECTION_AGE_S,
            )
        await self._gateway.serving()

    async def stop(self) -> None:
        """As Kubernetes ends a pod: the preStop hook, SIGTERM, then the side-car."""
        assert self._gateway is not None
        if self._sidecar is not None:
            least_s, most_s = LEAD_AWAY_S
            hook = await asyncio.create_subprocess_exec(
                *(sys.executable, str(DRAIN_FRONT), str(least_s), str(most_s), self._sidecar.admin)
            )
            assert await hook.wait() == 0
        assert await asyncio.to_thread(self._gateway.stop) == 0, self._gateway.log
        await asyncio.to_thread(self.ends.close)


@dataclass
class Sent:
    """What the load generator handed over until now."""

    samples: bytearray = field(default_factory=bytearray)
    lines: bytearray = field(default_factory=bytearray)
    reasons: list[str] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, chunk: Chunk) -> None:
        """Keep what came."""
        self.samples += chunk.samples
        self.lines += chunk.acknowledged
        self.reasons += chunk.reasons
        self._more.set()

    async def more(self, count: int, sending: asyncio.Future[Any]) -> None:
        """Wait until so many more calls have ended. Raises what ended the load."""
        until = len(self.samples) + count * RECORD.size
        while len(self.samples) < until:
            self._more.clear()
            waiting: asyncio.Future[Any] = asyncio.ensure_future(self._more.wait())
            await asyncio.wait([waiting, sending], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if sending.done():
                sending.result()
                raise AssertionError("the load has ended before the rollout")


async def _roll(pods: list[Pod], balancer: Envoy, sending: asyncio.Future[Any], sent: Sent) -> None:
    """Replace one after the other, each when the one before serves again."""
    await sent.more(ANSWERS, sending)
    for pod in pods:
        await pod.stop()
        await sent.more(ANSWERS, sending)
        await pod.start()
        await balancer.until_healthy(*(each.address for each in pods))
        await sent.more(ANSWERS, sending)


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_a_rolling_restart_behind_a_load_balancer_fails_no_call_under_load(
    postgres: PostgresForTests,
    redis: EmbeddedRedis,
    transport: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_envoy()
    plan = Plan(
        rate=RATE,
        duration=DURATION_S_MAX,
        warm_up=0,
        ca_file=str(CERTIFICATE),
        retries=True,
        run_id="rollout",
    )
    with (
        # Overload is no subject here, and a machine that is busy with other things is no reason.
        running_system(
            *(postgres, redis),
            simulator_answer_timeout_s=10,
            admission_target_ms=30_000,
            admission_bulk_target_ms=30_000,
        ) as system,
        ExitStack() as stack,
    ):
        monkeypatch.setenv(API_KEY_VARIABLE, system.shop.api_key)
        await system.control.latency(*LATENCY_MS)
        pods = [Pod(system, transport, tmp_path / f"pod-{number}") for number in range(PODS)]
        for pod in pods:
            stack.callback(pod.ends.close)
            await pod.start()
        addresses = [pod.address for pod in pods]
        balancer = stack.enter_context(running_balancer(addresses, tmp_path / "balancer"))
        await balancer.serving()
        await balancer.until_healthy(*addresses)
        engine = plan.engine(balancer.address, 0)
        sent = Sent()
        sending = asyncio.ensure_future(engine.run(sent.take))
        try:
            await _roll(pods, balancer, sending, sent)
        finally:
            engine.stop()
            await sending
        served = {address: balancer.answered(address) for address in addresses}
        for pod in pods:
            await pod.stop()
        whole = Analysis(unpack_samples(bytes(sent.samples)), plan.schedule.segments).whole
        assert set(whole.codes) == {OK}, (whole.codes, sent.reasons)
        assert all(served.values()), served
        # A drained gateway leaves nothing to recovery.
        assert system.unfinished() == []
        told = tmp_path / "acknowledged"
        told.write_bytes(sent.lines)
        audit = await asyncio.to_thread(
            audit_by_database,
            read_acknowledged(told),
            system.dsn,
            system.simulator.journal,
            tmp_path / "audit.sqlite",
        )
        assert audit.clean, audit
        assert audit.acked == whole.ok
