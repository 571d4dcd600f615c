"""What fault tests share: gateways start quickly, since most of these tests start several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import forked_gateways
from tests.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where gateways are forked."""
    with Nursery.open() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _gateways_are_forked(nursery: Nursery) -> Iterator[None]:
    with forked_gateways(nursery):
        yield
