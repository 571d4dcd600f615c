"""The default set-up: embedded servers, a PSP simulator and a demo merchant, all below one folder.

What lasts between runs lies in the folder: the servers' data, the simulator's journal, and
`local.json` (readable by its owner alone) with the addresses of what runs and the demo's key.
"""

import contextlib
import json
import os
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gateway.connectors.simulator.launch import SimulatorProcess
from storage.embedded import EmbeddedPostgres, EmbeddedRedis

STATE_FILE = "local.json"
LOGS_EVERY_S = 60.0
"""How often it is looked whether a server's log has grown too large."""


@dataclass(frozen=True, slots=True)
class LocalState:
    """What runs, and the demo's credentials."""

    postgres_dsn: str = ""
    redis_url: str = ""
    simulator_url: str = ""
    listen_address: str = ""
    merchant_id: str = ""
    api_key: str = ""


class LocalStateUnusable(Exception):
    """The state of a set-up cannot be read or written; the text says what to do."""


def read_state(folder: Path) -> LocalState:
    """The state of the set-up in the folder; empty where there is none. Raises
    LocalStateUnusable.
    """
    path = folder / STATE_FILE
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return LocalState()
    except OSError as error:
        raise LocalStateUnusable(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise LocalStateUnusable(
            f"{path} is no JSON object of texts. Remove it: `python -m gateway run` makes it anew."
        )
    return LocalState(**{name: told[name] for name in LocalState.__slots__ if name in told})


def write_state(folder: Path, state: LocalState) -> None:
    """Replace the state, whole or not at all. Raises LocalStateUnusable."""
    path = folder / STATE_FILE
    temporary = path.with_suffix(".new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(state), file, indent=1)
        temporary.replace(path)
    except OSError as error:
        raise LocalStateUnusable(f"{path} cannot be written: {error.strerror}.") from error


class LocalServers:
    """The embedded servers and the simulator, as children of this process.

    Start it in the main thread, before the event loop. The children end with this process, however
    it ends.
    """

    def __init__(
        self, folder: Path, *, postgres: bool, redis: bool, simulator_profile: str
    ) -> None:
        self._folder = folder
        self._postgres = EmbeddedPostgres(folder / "postgres") if postgres else None
        self._redis = EmbeddedRedis(folder / "redis") if redis else None
        self._profile = simulator_profile
        self._simulator: SimulatorProcess | None = None
        self._stopping = threading.Event()

    def start(self) -> LocalState:
        """Start what is wanted. Raises LocalStateUnusable, EmbeddedServerError and
        SimulatorFailed.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalStateUnusable(
                f"{self._folder} cannot be made: {error.strerror}. GATEWAY_EMBEDDED_DIR names"
                " another directory."
            ) from error
        state = read_state(self._folder)
        if self._postgres is not None:
            self._postgres.start()
            state = replace(state, postgres_dsn=self._postgres.dsn)
        if self._redis is not None:
            self._redis.start()
            state = replace(state, redis_url=self._redis.url)
        if self._profile:
            journal = self._folder / f"simulator-{self._profile}.journal"
            self._simulator = SimulatorProcess.start(journal, self._profile)
            state = replace(state, simulator_url=self._simulator.url)
        threading.Thread(target=self._limit_logs, name="logs", daemon=True).start()
        return state

    def _limit_logs(self) -> None:
        while not self._stopping.wait(LOGS_EVERY_S):
            for server in (self._postgres, self._redis):
                if server is not None:
                    with contextlib.suppress(OSError):  # as of a full disk: looked at again
                        server.limit_log()

    def stop(self) -> None:
        """Stop what was started."""
        self._stopping.set()
        if self._simulator is not None:
            self._simulator.stop()
        if self._redis is not None:
            self._redis.stop()
        if self._postgres is not None:
            self._postgres.stop()
