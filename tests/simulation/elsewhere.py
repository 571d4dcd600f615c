"""Deliberate faults that no history can show, and the tests that catch them.

The simulated PSPs do as they say: what they were told to cancel never takes effect later, so no
success comes late that has to be reversed. A claim in Redis proves nothing, so losing one does no
harm. Each fault is put into a process of its own, which runs the tests.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import pytest

from gateway.application.outcomes import Outcomes
from storage.redis import claims

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from gateway.domain.model import Operation


def _late_success_not_reversed() -> Sequence[AbstractContextManager[Any]]:
    async def mutated(self: Outcomes, *_: object) -> None:
        return None

    return [patch.object(Outcomes, "reverse", mutated)]


def _fenced_out_answer_dropped() -> Sequence[AbstractContextManager[Any]]:
    async def mutated(self: Outcomes, owned: Operation, _: object) -> Any:
        return await self._store.find_operation(owned.merchant_id, owned.operation_id)

    return [patch.object(Outcomes, "_fenced_out", mutated)]


def _claim_released_without_compare() -> Sequence[AbstractContextManager[Any]]:
    text = claims._SETTLE.text
    assert text.count("if reply == entry then") == 1
    script = claims._Script(text.replace("if reply == entry then", "if reply then"))
    return [patch.object(claims, "_SETTLE", script)]


ELSEWHERE: Final[dict[str, tuple[str, Callable[[], Sequence[AbstractContextManager[Any]]]]]] = {
    "late-success-not-reversed": ("tests/unit/test_usecases.py", _late_success_not_reversed),
    "fenced-out-answer-dropped": ("tests/unit/test_usecases.py", _fenced_out_answer_dropped),
    "claim-released-without-compare": (
        "tests/integration/test_redis_claims.py",
        _claim_released_without_compare,
    ),
}
"""Faults by their names, each with the tests that have to fail."""


def caught_by(name: str) -> str:
    """The tests that fail with the fault; empty where none does."""
    tests, _ = ELSEWHERE[name]
    done = subprocess.run([sys.executable, "-m", __name__, name], capture_output=True, check=False)
    return tests if done.returncode == pytest.ExitCode.TESTS_FAILED else ""


def main(name: str) -> int:
    """Run the tests of a fault, with it; pytest's exit status."""
    tests, patches = ELSEWHERE[name]
    with ExitStack() as stack:
        for each in patches():
            stack.enter_context(each)
        return int(pytest.main(["-q", "-n0", "-x", "-p", "no:cacheprovider", tests]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
