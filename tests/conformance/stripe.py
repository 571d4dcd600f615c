"""Stripe's connector against Stripe's published OpenAPI specification."""

import asyncio
import json
import re
import time
from collections.abc import Callable

from gateway.application.ports import ConnectorRequest
from gateway.connectors.http import FORM, HttpClient, Response
from gateway.connectors.stripe.answers import TOMBSTONE
from gateway.connectors.stripe.connector import StripeConnector, _Call, _encode, widest
from gateway.domain.model import Mode, OperationKind
from tests.conformance.mocks import (
    LIMITS,
    START_S_MAX,
    STRIPE_MOCK,
    complaint_about,
    install_stripe_mock,
    mock,
    print_found,
    stripe_mock,
)
from tests.connector_conformance import request_of

SPECIFICATION = "stripe.com.json"
OPTIONS = (
    "--validator-form-array-format=brackets",
    "--validator-form-object-format=brackets",
    "--validator-query-array-format=brackets",
)
NOT_IN_THIS_EDITION = {
    "Unknown property: final_capture (body)": "final_capture (later than this edition)",
    'Value "card" is not in allowed values (body.payment_method_data.type)': (
        "payment_method_data[card] with a token or network token (left out of the published"
        " specification)"
    ),
}
"""What the mock has against requests that Stripe's guides have, and why it has."""
NOT_PUBLISHED = {
    "object property 'payment_method_data' validation failed: object property 'type' validation"
    " failed: value is not in enumeration": (
        "payment_method_data[card] with a token or network token (left out of the published"
        " specification)"
    ),
}
"""The same of Stripe's own mock."""

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
    redirects = {
        f"authorize with {method}": request_of(
            fields={
                "payment_method": {"redirect": {"method_type": method, **more}},
                "return_url": "https://shop.example/back",
            },
            payment_method_token="",
            capture=True,
            currency=currency,
        )
        for method, currency, more in (
            ("bancontact", "EUR", {"customer_name": "Ann Example"}),
            ("eps", "EUR", {"customer_name": "Ann Example"}),
            ("ideal", "EUR", {}),
            ("p24", "PLN", {"customer_email": "ann@example.com"}),
            ("pix", "BRL", {}),
        )
    }
    authenticated = {
        "eci": "05",
        "cavv": "AAABBZEEBgAAAAAAAAAAAAAAAAA=",
        "directory_server_transaction_id": "c5b808e7-1de1-4069-a17b-f70d3b3b1645",
        "version": "2.2.0",
        "exemption": "SCA_EXEMPTION_TRANSACTION_RISK_ANALYSIS",
    }
    attached = {"payment_method": {"stored": {"stored_payment_method_id": "cus_1/pm_1"}}}
    debit = {"stored_payment_method_id": "pm_1", "method_type": "sepa_debit"}
    token = {"expiry_month": 12, "expiry_year": 2030, "eci": "05"}
    return {
        **redirects,
        "authorize a direct debit": request_of(
            fields={"payment_method": {"stored": debit}}, payment_method_token="", capture=True
        ),
        "authorize with 3-D Secure": request_of(
            fields={**stored, "three_ds": authenticated}, payment_method_token=""
        ),
        "authorize a network token": request_of(
            fields={"payment_method": {"network_token": token}},
            payment_method_token="",
            secrets={"number": "4895370000000000003", "cryptogram": "AgAAAAAABk4DWZ4C28yUQAAAAAA="},
        ),
        "authorize": request_of(),
        "authorize and capture": request_of(capture=True),
        "authorize a stored method": request_of(fields=stored, payment_method_token=""),
        "authorize a customer's method": request_of(fields=attached, payment_method_token=""),
        "authorize with everything": request_of(fields=everything, payment_method_token=""),
        "verify": request_of(K.VERIFY, fields=everything, payment_method_token=""),
        "verify a customer's method": request_of(
            K.VERIFY, fields=attached, payment_method_token=""
        ),
        "capture": request_of(K.CAPTURE, final=True, target_transaction_id=INTENT),
        "capture a part": request_of(K.CAPTURE, 300, target_transaction_id=INTENT),
        "void": request_of(K.VOID, target_transaction_id=INTENT),
        "refund": request_of(K.REFUND, target_transaction_id=INTENT),
    }


async def check(url: str, complaint: Callable[[Response], str]) -> dict[str, str]:
    """Each request to what a mock has against it."""
    http = HttpClient(url, LIMITS)
    connector = StripeConnector(http, "sk_test_conformance1", widest(Mode.TEST))

    async def post(call: _Call, reference: str) -> str:
        until = time.monotonic() + START_S_MAX
        return complaint(await connector._post(call, reference, until))

    async def get(target: str) -> str:
        until = time.monotonic() + START_S_MAX
        return complaint(
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


def complaint_of_stripes(response: Response) -> str:
    """What Stripe's own mock has against a request; empty where it has nothing."""
    if response.status == 200:
        return ""
    told = json.loads(response.body)["error"]["message"]
    return re.sub("^Request validation error: validator 0x[0-9a-f]+ failed: ", "", told)


async def run() -> dict[str, str]:
    """Check against a running mock."""
    async with mock(SPECIFICATION, *OPTIONS) as url:
        return await check(url, complaint_about)


def report() -> int:
    """Run it and say what was found; how many checks are bad."""
    return print_found("Stripe", asyncio.run(run()), NOT_IN_THIS_EDITION)


def report_official() -> int | None:
    """The same with Stripe's own mock; None where it cannot be had."""
    binary = install_stripe_mock()
    if binary is None:
        print("NOT RUN: Go is not here, or could not build Stripe's own mock.")
        return None

    async def found() -> dict[str, str]:
        async with stripe_mock(binary) as url:
            return await check(url, complaint_of_stripes)

    return print_found("Stripe", asyncio.run(found()), NOT_PUBLISHED, by=STRIPE_MOCK)
