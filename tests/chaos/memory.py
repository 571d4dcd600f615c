"""What attacks of one kind do to a gateway's memory: `python -m tests.chaos.memory`.

Each kind has a gateway of its own, on which nobody else calls. Its memory is printed before the
attack and after each round of it. The exit status is 1 where it grew by more than the campaign
allows once it was warm, after half of the rounds.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import uvloop

from tests.chaos.attack import GROWN_BYTES_MAX, WARM_SHARE, resident_bytes
from tests.chaos.bad_clients import KINDS, Attack, Orders
from tests.harness import authorize_request, calling, running_system
from tests.servers import postgres_server, redis_server
from tests.workers import TRANSPORTS, transport_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.harness import GatewayProcess, System

TIMES: Final = {
    "fuzz": 3_000,
    "idle": 1_000,
    "stream": 400,
    "message": 200,
    "metadata": 40,
    "deadline": 400,
    "cancel": 300,
    "reset": 300,
}
"""Attacks of a round."""
ROUNDS: Final = 6
ORDINARY_CALLS: Final = 300
"""Before the attack: what any caller makes a gateway keep is no effect of it."""


async def measure(
    system: System, gateway: GatewayProcess, kind: str, times: int, rounds: int
) -> list[int]:
    """The gateway's memory in bytes, before the attack and after each round."""
    attack = Attack(Orders(await gateway.serving(), system.shop.api_key, 1, 0, 0))
    memory = [resident_bytes(gateway.pid)]
    for _ in range(rounds):
        await attack.repeat(kind, times)
        memory.append(resident_bytes(gateway.pid))
    return memory


def grown_bytes(memory: Sequence[int]) -> int:
    """By how much it grew once it was warm."""
    return memory[-1] - memory[int(WARM_SHARE * len(memory))]


async def _call(system: System, gateway: GatewayProcess) -> None:
    async with calling(gateway, system.shop.api_key) as caller:
        for _ in range(ORDINARY_CALLS):
            await caller.call("AuthorizePayment", authorize_request())


async def _attack(system: System, transport: str, kind: str, rounds: int) -> bool:
    """Measure and print; whether it stayed within the bound."""
    gateway = system.start_gateway(**transport_settings(transport))
    await gateway.serving()
    await _call(system, gateway)
    memory = await measure(system, gateway, kind, TIMES[kind], rounds)
    gateway.stop()
    told = " ".join(f"{each / 1e6:.0f}" for each in memory)
    print(f"{transport} {kind}, {TIMES[kind]} a round: {told} MB", flush=True)
    return grown_bytes(memory) <= GROWN_BYTES_MAX


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.memory", description=__doc__)
    parser.add_argument("--transport", choices=TRANSPORTS, action="append")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)

    async def attack(system: System) -> bool:
        return all(
            [
                await _attack(system, transport, kind, options.rounds)
                for transport in options.transport or TRANSPORTS
                for kind in options.kind or KINDS
            ]
        )

    with ExitStack() as stack:
        postgres, redis = (
            stack.enter_context(postgres_server()),
            stack.enter_context(redis_server()),
        )
        system = stack.enter_context(running_system(postgres, redis))
        return 0 if uvloop.run(attack(system)) else 1


if __name__ == "__main__":
    sys.exit(main())
