"""What every test shares: the event loop of production, a marker for each kind of test, how tests
are spread over processes, and an end for whatever hangs.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tests.nursery import Nursery, forking
from tests.servers import (
    DIRECTORY_VARIABLE,
    PostgresForTests,
    initialised_once,
    postgres_server,
    redis_server,
)

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterator, Mapping

    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    from storage.embedded import EmbeddedRedis

# uvloop starts a program with fork(), in which gRPC's handlers would run: beside calls in flight
# some children die of one, in 3 % of the starts, before they are the program. No test needs gRPC in
# a fork.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"

# Where the environment forbids byte code, each of the interpreters that the suite starts would
# compile the gateway anew, and each worker all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_KINDS = ("unit", "integration", "contract", "faults", "acceptance")
"""The directories below tests/, each with the marker of the same name (pyproject.toml)."""

WORKERS_MAX: Final = 8
"""Each worker has a PostgreSQL and a Redis of its own."""

MEMORY_DIRECTORY: Final = "/dev/shm"
MEMORY_FREE_BYTES_MIN: Final = 4 * 1024**3
"""Where servers have their files in memory: several times what a run was seen to hold there."""

_stderr: Final = pytest.StashKey[int]()

# Examples are judged by what comes of them, however slow the machine is, and a run has those of the
# last one: `--hypothesis-profile=explore` looks for others.
settings.register_profile(
    "explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("steady", settings.get_profile("explore"), derandomize=True)
settings.load_profile("steady")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], AbstractEventLoop]]:
    """Runs every asynchronous test on uvloop, as the gateway itself runs."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave the thousands of tests out of every collection of garbage, these and the later ones."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test by its directory; a test outside of them has no kind, which is an error."""
    root = config.rootpath / "tests"
    for item in items:
        kind = Path(item.path).relative_to(root).parts[0]
        if kind not in _KINDS:
            message = f"{item.nodeid}: tests belong into one of tests/{{{','.join(_KINDS)}}}"
            raise pytest.UsageError(message)
        item.add_marker(kind)
    if hasattr(config, "workerinput"):  # the longest tests first, so that no worker ends late
        items.sort(key=lambda item: item.get_closest_marker("faults") is None)


# --- processes ------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are processors, since many tests wait; none for a few quick tests."""
    unit = config.rootpath / "tests" / "unit"
    paths = [(config.invocation_params.dir / arg).resolve() for arg in config.args]
    if all("::" in path.name or path.is_relative_to(unit) for path in paths):
        return 0
    return min(len(os.sched_getaffinity(0)) + 1, WORKERS_MAX)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """For `--dist loadfile`: tests of a file stay together, since they share fixtures, but those of
    faults go one by one: they are long, and each has a system of its own.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 - not where -p no:xdist is set

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "/faults/" in nodeid else nodeid.partition("::")[0]

    return Scheduling(config, log)


# --- what hangs -----------------------------------------------------------------------------------
#
# After `faulthandler_timeout` a test ends its process, with the stacks of all threads; where that
# is a worker, the test has failed and the run ends. An exception would be kinder (pytest-timeout),
# but uvloop does not let one out of a signal's handler or of a callback. pytest itself stops
# watching when a test fails, for the sake of debuggers, although its fixtures and its loop are yet
# to end, and does not watch the end of the process.


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error, which is captured while tests run; choose where servers live."""
    config.stash[_stderr] = os.dup(2)
    directory = _directory_of_servers()
    if directory is not None:
        os.environ.setdefault(DIRECTORY_VARIABLE, directory)


def _end_if_it_hangs(config: pytest.Config) -> None:
    if not config.getoption("usepdb"):
        limit_s = float(config.getini("faulthandler_timeout"))
        faulthandler.dump_traceback_later(limit_s, file=config.stash[_stderr], exit=True)


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """A test has failed; pytest's own end of the test ends this watch."""
    if isinstance(node, pytest.Item):
        _end_if_it_hangs(node.config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """From here to the end of the process."""
    _end_if_it_hangs(session.config)


# --- servers --------------------------------------------------------------------------------------
#
# Tests kill processes and never the machine, so a file that the kernel holds in memory lasts as
# long as one on a disk, and a disk's slowness proves nothing.


def _directory_of_servers() -> str | None:
    """Memory, where there is enough; None for the directory of temporary files."""
    try:
        found = os.statvfs(MEMORY_DIRECTORY)
    except FileNotFoundError:
        return None
    # Programs are compiled and run there, too.
    usable = not found.f_flag & os.ST_NOEXEC and os.access(MEMORY_DIRECTORY, os.W_OK)
    free_bytes = found.f_bavail * found.f_frsize
    return MEMORY_DIRECTORY if usable and free_bytes >= MEMORY_FREE_BYTES_MIN else None


@pytest.fixture(scope="session", autouse=True)
def _servers_begin_as_copies() -> Iterator[None]:
    with initialised_once():
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresForTests]:
    """The suite's PostgreSQL, as durable as the default set-up's."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[EmbeddedRedis]:
    """The suite's Redis. A test that stops or flushes it starts its own."""
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where gateways and simulators are forked."""
    with Nursery.open() as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def _processes_are_forked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gateways and simulators, but in modules marked `executed`, and for unit tests."""
    module = request.node
    if module.get_closest_marker("executed") or "unit" in Path(module.path).parts:
        yield
        return
    with forking(request.getfixturevalue("nursery")):
        yield
