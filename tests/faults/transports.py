"""Both transports in the fault tests, without running each test twice.

A test with several gateways has one on each transport; one with a single gateway alternates the
transport over its cases, so that every value of every parameter is seen on both.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.harness import GatewayProcess, System

TRANSPORTS: Final = ("grpcio", "native")


def other_than(transport: str) -> str:
    """The other transport."""
    [other] = (each for each in TRANSPORTS if each != transport)
    return other


def start_on_both(system: System, **settings: object) -> list[GatewayProcess]:
    """Two gateways, one on each transport."""
    return [
        system.start_gateway(transport=transport, trusted_front=True, **settings)
        for transport in TRANSPORTS
    ]


def alternating(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize over all combinations of the axes, with a `transport` that is another one for
    neighbours along any axis.
    """
    cases = [
        pytest.param(
            *(value for _, value in case),
            TRANSPORTS[sum(number for number, _ in case) % len(TRANSPORTS)],
            id="-".join(str(getattr(value, "__name__", value)) for _, value in case),
        )
        for case in itertools.product(*(enumerate(values) for values in axes.values()))
    ]
    return pytest.mark.parametrize((*axes, "transport"), cases)
