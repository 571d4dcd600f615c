"""The chart's scripts and settings with a gateway that really runs: helm test, probes, the drain.

No cluster: the gateway is `gateway run` with the rendered settings, but for addresses, which are
free ports of 127.0.0.1, and folders. For `native`, the rendered Envoy stands in front of it.
"""

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import trustme

from gateway.settings import PREFIX

SCRIPTS: Final = Path(__file__).parent / "payment-gateway" / "files"
IMAGE_TREE: Final = Path(__file__).parent / "image_tree.sh"
TEST_DATA: Final = Path(__file__).parents[1] / "tests" / "data"
STOP_S_MAX: Final = 120.0
SCRIPT_S_MAX: Final = 120.0
ROTATION_S_MAX: Final = 60.0
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
"""With empty SETTINGS (RFC 9113, 3.4)."""


def with_test_files(files: Mapping[str, str], folder: Path) -> str:
    """Envoy's configuration; what it names is in `folder`, the tests' certificate among it."""
    certificate, key = (TEST_DATA / f"localhost.{kind}" for kind in ("pem", "key"))
    mount(folder / "tls", {"tls.crt": certificate.read_bytes(), "tls.key": key.read_bytes()})
    mount(folder / "client-ca", {"ca.crt": certificate.read_bytes()})
    texts = {
        name: text.replace("/etc/envoy", str(folder))
        .replace(": /tls", f": {folder}/tls")
        .replace(": /client-ca", f": {folder}/client-ca")
        for name, text in files.items()
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts["envoy.yaml"]


def mount(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a Secret's files into a folder, or others in their place, as the kubelet does."""
    version = folder / f"..{time.monotonic_ns()}"
    version.mkdir(parents=True)
    for name, content in files.items():
        (version / name).write_bytes(content)
    (folder / "..new").symlink_to(version.name)
    (folder / "..new").rename(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data", name))


def with_local_addresses(config: str, front: int, gateway: int, admin: int) -> str:
    """The same on ports of 127.0.0.1: its own, the gateway's, and its admin interface's."""
    for rendered, here in (("50051", front), ("50052", gateway), ("9901", admin)):
        config = config.replace(f"port_value: {rendered}", f"port_value: {here}")
    return config.replace('address: "0.0.0.0"', "address: 127.0.0.1")


def image_problems(settings: dict[str, str]) -> Iterator[str]:
    """What the image holds, built without Docker, in the embedded case."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "image"
        built = subprocess.run(
            [IMAGE_TREE, sys.executable, target], capture_output=True, text=True, check=False
        )
        if built.returncode:
            yield f"live: {IMAGE_TREE.name}: {built.stdout}{built.stderr}"
        else:
            yield from embedded_problems(settings, target / "bin" / "python")


def embedded_problems(
    settings: dict[str, str], python: Path = Path(sys.executable)
) -> Iterator[str]:
    """The embedded case: its probes answer, its helm test pays, and it drains."""
    with tempfile.TemporaryDirectory() as directory:
        port, metrics = free_ports(2)
        folder = Path(directory) / "gateway"
        with running_gateway(folder, settings, port, metrics, python) as gateway:
            yield from probe_problems(metrics)
            yield from health_problems(metrics, python)
            state = folder / "local.json"
            yield from script_problems(
                "chart_test.py",
                {"TARGET": f"127.0.0.1:{port}", "EMBEDDED_STATE": str(state)},
                says="authorized, repeated and voided",
                python=python,
            )
            yield from drain_problems(gateway)


def native_problems(
    settings: dict[str, str], files: Mapping[str, str], envoy: Path
) -> Iterator[str]:
    """The TLS case: the same through Envoy with client certificates, which then leads them away."""
    with tempfile.TemporaryDirectory() as directory:
        port, metrics, front, admin = free_ports(4)
        mounted = Path(directory) / "mounted"
        config = with_local_addresses(with_test_files(files, mounted), front, port, admin)
        path = Path(directory) / "envoy.yaml"
        path.write_text(config)
        tls = Path(directory) / "tls"
        tls.mkdir()
        for name in ("tls.crt", "ca.crt"):
            shutil.copy(TEST_DATA / "localhost.pem", tls / name)
        shutil.copy(TEST_DATA / "localhost.key", tls / "tls.key")
        folder = Path(directory) / "gateway"
        with (
            running_gateway(folder, settings, port, metrics) as gateway,
            running_envoy(envoy, path),
        ):
            yield from probe_problems(metrics)
            variables = {
                "TARGET": f"127.0.0.1:{front}",
                "EMBEDDED_STATE": str(folder / "local.json"),
                "TLS_DIR": str(tls),
                "SERVER_NAME": "localhost",
            }
            yield from script_problems(
                "chart_test.py",
                variables | {"CLIENT_TLS_DIR": str(tls)},
                says="authorized, repeated and voided",
            )
            # Without a client certificate it fails, whatever time it has.
            yield from script_problems(
                "chart_test.py", variables | {"CALL_TIMEOUT_S": "2"}, fails=True
            )
            yield from rotation_problems(front, mounted)
            yield from script_problems(
                "drain_front.py", {}, "0", "5", f"http://127.0.0.1:{admin}", quiet=True
            )
            yield from drain_problems(gateway)


def rotation_problems(front: int, mounted: Path) -> Iterator[str]:
    """Whether Envoy serves a renewed certificate, and asks for those of a new authority."""
    ca = trustme.CA()
    server, client = ca.issue_cert("localhost"), ca.issue_cert("client.example")
    chain = b"".join(each.bytes() for each in server.cert_chain_pems)
    mount(mounted / "tls", {"tls.crt": chain, "tls.key": server.private_key_pem.bytes()})
    mount(mounted / "client-ca", {"ca.crt": ca.cert_pem.bytes()})
    new, old = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))
    for context in (new, old):
        ca.configure_trust(context)
        context.set_alpn_protocols(["h2"])
    client.configure_cert(new)
    old.load_cert_chain(TEST_DATA / "localhost.pem", TEST_DATA / "localhost.key")
    until = time.monotonic() + ROTATION_S_MAX
    while not is_accepted(front, new):
        if time.monotonic() > until:
            yield "live: Envoy did not read a new certificate and a new authority of clients"
            return
        time.sleep(0.1)
    if is_accepted(front, old):
        yield "live: Envoy accepts a client of an authority that was replaced"


def is_accepted(port: int, context: ssl.SSLContext) -> bool:
    """Whether the server proves itself, and begins HTTP/2 with the client."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
            context.wrap_socket(connection, server_hostname="localhost") as tls,
        ):
            # With TLS 1.3 a refusal of the client's certificate comes after the handshake.
            tls.sendall(HTTP2_PREFACE)
            return bool(tls.recv(1))
    except OSError:
        return False


def probe_problems(metrics: int) -> Iterator[str]:
    """Whether the paths that the probes ask for answer 200."""
    for path in ("/livez", "/readyz", "/metrics"):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}{path}", timeout=10):
                pass
        except OSError as error:
            yield f"live: {path}: {error}"


def health_problems(metrics: int, python: Path) -> Iterator[str]:
    """Whether the image's HEALTHCHECK finds it well."""
    asked = subprocess.run(
        [python, "-m", "gateway", "health"],
        cwd=SCRIPTS,  # not the checkout, whose packages would win
        env=environment() | {"GATEWAY_METRICS_ADDRESS": f"0.0.0.0:{metrics}"},
        capture_output=True,
        text=True,
        timeout=SCRIPT_S_MAX,
        check=False,
    )
    if asked.returncode:
        yield f"live: gateway health: {asked.stdout}{asked.stderr}"


def script_problems(
    name: str,
    variables: dict[str, str],
    *arguments: str,
    says: str = "",
    fails: bool = False,
    quiet: bool = False,
    python: Path = Path(sys.executable),
) -> Iterator[str]:
    """Whether a script of the chart ends as it should and prints what it should."""
    done = subprocess.run(
        [python, SCRIPTS / name, *arguments],
        env=environment() | {"PAYMENT_TOKEN": "tok_visa"} | variables,
        capture_output=True,
        text=True,
        timeout=SCRIPT_S_MAX,
        check=False,
    )
    shown = f"{name}: exit status {done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    if fails != (done.returncode != 0) or says not in done.stdout or (quiet and done.stderr):
        yield f"live: {shown}"


def drain_problems(gateway: "subprocess.Popen[str]") -> Iterator[str]:
    """Whether SIGTERM ends it with status 0."""
    gateway.terminate()
    status = gateway.wait(STOP_S_MAX)
    if status:
        yield f"live: the gateway ended with status {status}"


@contextlib.contextmanager
def running_gateway(
    folder: Path,
    settings: dict[str, str],
    port: int,
    metrics: int,
    python: Path = Path(sys.executable),
) -> Iterator["subprocess.Popen[str]"]:
    """`gateway run` with these settings, once it serves."""
    settings = settings | {
        "GATEWAY_ENVIRONMENT": "development",
        "GATEWAY_EMBEDDED_DIR": str(folder),
        "GATEWAY_LISTEN_ADDRESS": f"127.0.0.1:{port}",
        "GATEWAY_METRICS_ADDRESS": f"127.0.0.1:{metrics}",
    }
    gateway = subprocess.Popen(
        [python, "-m", "gateway", "run"],
        cwd=folder.parent,  # not the checkout, whose packages would win
        env=environment() | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert gateway.stdout is not None
        for line in gateway.stdout:
            if "API key" in line:
                break
        else:
            raise RuntimeError(f"the gateway ended with status {gateway.wait()} before it served")
        yield gateway
    finally:
        stop(gateway)


@contextlib.contextmanager
def running_envoy(envoy: Path, config: Path) -> Iterator[None]:
    """Envoy, once its workers run."""
    arguments = ["--config-path", str(config), "--concurrency", "1", "--drain-time-s", "5"]
    process = subprocess.Popen(
        [envoy, *arguments, "--drain-strategy", "immediate", "--disable-hot-restart"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        log = []
        for line in process.stderr:
            log.append(line)
            if re.search(r"starting main dispatch loop", line):
                break
        else:
            raise RuntimeError(f"Envoy ended with status {process.wait()}:\n{''.join(log[-10:])}")
        yield
    finally:
        stop(process)


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process, if need be by force."""
    process.terminate()
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def environment() -> dict[str, str]:
    """This process's own, without settings of the caller."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
