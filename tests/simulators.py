"""PSP simulators for tests: real processes, each with a journal of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gateway.connectors.simulator.journal import Standing, standing_charges
from gateway.connectors.simulator.launch import Process, SimulatorProcess, execute
from gateway.domain.model import OperationKind
from tests.nursery import SIMULATE, current

_numbers = itertools.count(1)


def new_reference() -> str:
    """A reference that no other test uses, in the form of the gateway's."""
    return f"op_{next(_numbers):08x}-1"


@contextmanager
def running_simulator(
    directory: Path,
    profile: str = "idempotent",
    *,
    latency: str = "0",
    iso8583_specification: str = "",
) -> Iterator[SimulatorProcess]:
    """A simulator for as long as the context lasts, on the journal `directory/journal.jsonl`."""
    simulator = SimulatorProcess.start(
        directory / "journal.jsonl",
        profile,
        latency=latency,
        iso8583_specification=iso8583_specification,
        run=_run,
    )
    try:
        yield simulator
    finally:
        simulator.kill()


def _run(arguments: Sequence[str], stdout: int) -> Process:
    """Forked, where gateways are."""
    nursery = current()
    if nursery is None:
        return execute(arguments, stdout)
    return nursery.fork(SIMULATE, arguments, {}, stdout=stdout, stderr=2)


def standings_of(simulator: SimulatorProcess, reference: str) -> list[Standing]:
    """What stands of every authorization made with a reference."""
    charges = standing_charges(simulator.records())
    return [standing for standing in charges if standing.reference == reference]


class SimulatorBooks:
    """What the conformance suite of connectors asks about a PSP, of a simulator's journal."""

    follow_up_decline: Mapping[OperationKind, str] = {
        kind: f"tok_{kind.name.lower()}_declined"
        for kind in (
            OperationKind.CAPTURE,
            OperationKind.VOID,
            OperationKind.REFUND,
            OperationKind.INCREMENT,
        )
    }

    def __init__(self, simulator: SimulatorProcess) -> None:
        self._simulator = simulator

    async def effects(self, reference: str) -> int:
        """How often a reference took effect."""
        return sum(
            record["type"] == "effect" and record.get("reference") == reference
            for record in self._simulator.records()
        )

    async def held_minor(self, reference: str) -> int:
        """What stands of an authorization: held, or captured and not refunded."""
        return sum(
            each.open_minor + each.net_minor for each in standings_of(self._simulator, reference)
        )
