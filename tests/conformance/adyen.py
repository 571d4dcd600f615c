"""Adyen's connector, and its double's answers, against Adyen's published OpenAPI specification.

Adyen's schemas allow properties that they do not name, so that names are compared here: those of
every request, and of every answer of the double that `make test` trusts.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from gateway.application.ports import ConnectorRequest
from gateway.connectors.adyen.connector import TOMBSTONE_SUFFIX, AdyenConnector, widest
from gateway.connectors.base import Call
from gateway.connectors.http import JSON, HttpClient
from gateway.domain.model import SENT_KINDS, Mode, OperationKind
from tests.adyen_double import ACTION_TOKEN, DECLINE_TOKEN, MERCHANT_ACCOUNT, adyen_psp
from tests.conformance.mocks import (
    DIRECTORY,
    LIMITS,
    SPECIFICATIONS,
    START_S_MAX,
    complaint_about,
    mock,
    print_found,
)
from tests.connector_conformance import prepared, request_of, send

SPECIFICATION = "adyen.com/CheckoutService-v71.json"
K = OperationKind
PAYMENT = "993617895215577D"

Schema = Mapping[str, Any]


def requests() -> dict[str, ConnectorRequest]:
    """One of each kind, and what they can hold."""
    everything = {
        "customer_id": "cus_1",
        "payment_method": {"stored": {"stored_payment_method_id": "M5N7TQ4TG5PFWR50"}},
        "channel": "CHANNEL_MAIL_ORDER",
        "initiator": "INITIATOR_MERCHANT",
        "stored_credential": {"network_transaction_id": "MCC1"},
        "return_url": "https://shop.example/back",
        "statement_descriptor": "SHOP 7",
    }
    redirect = {
        "payment_method": {"redirect": {"method_type": "ideal", "bank": "1121"}},
        "return_url": "https://shop.example/back",
    }
    on_payment = partial(request_of, target_transaction_id=PAYMENT)
    return {
        "authorize": request_of(),
        "authorize and capture": request_of(capture=True),
        "authorize with everything": request_of(fields=everything, payment_method_token=""),
        "authorize with 3-D Secure": request_of(
            fields={
                "customer_id": "cus_1",
                "three_ds": {
                    "eci": "05",
                    "cavv": "AAABBZEEBgAAAAAAAAAAAAAAAAA=",
                    "directory_server_transaction_id": "c5b808e7-1de1-4069-a17b-f70d3b3b1645",
                    "version": "2.2.0",
                    "exemption": "SCA_EXEMPTION_LOW_VALUE",
                },
            }
        ),
        "authorize with a redirect": request_of(
            capture=True, fields=redirect, payment_method_token=""
        ),
        "verify": request_of(K.VERIFY),
        "capture": on_payment(K.CAPTURE, final=True),
        "void": on_payment(K.VOID),
        "refund": on_payment(K.REFUND),
        "increment": on_payment(K.INCREMENT, authorized_minor=1000),
        "reverse": on_payment(K.REVERSAL),
    }


class Specification:
    """Names of properties, as the specification has them."""

    def __init__(self) -> None:
        path = DIRECTORY / SPECIFICATIONS / SPECIFICATION
        self._whole = json.loads(path.read_text("utf-8"))

    def complaint(self, path: str, body: Mapping[str, Any], status: int = 0) -> str:
        """What is not in the schema of a request, or of the answer with a status."""
        operation = self._whole["paths"][path.replace(PAYMENT, "{paymentPspReference}")]["post"]
        told = operation["responses"].get(str(status)) if status else operation["requestBody"]
        if told is None:
            return f"status {status} is not told of"
        schema = told["content"]["application/json"]["schema"]
        return "; ".join(self._wrong(schema, body, path))

    def _wrong(self, schema: Schema, value: Any, where: str) -> Iterator[str]:
        options = self._options(schema)
        if isinstance(value, dict):
            known: dict[str, list[Schema]] = {}
            for option in options:
                for name, inner in option.get("properties", {}).items():
                    known.setdefault(name, []).append(inner)
                if len(options) == 1:
                    missing = set(option.get("required", ())) - value.keys()
                    yield from (f"{where} lacks {name}" for name in sorted(missing))
            for name, inner in value.items():
                if name in known:
                    yield from self._wrong({"anyOf": known[name]}, inner, f"{where}.{name}")
                elif known:
                    yield f"{where} knows no {name}"
        if all("enum" in option and value not in option["enum"] for option in options):
            yield f"{where} is not {value!r}"

    def _options(self, schema: Schema) -> list[Schema]:
        """A schema, or those that it may be."""
        if "$ref" in schema:
            return self._options(self._at(schema["$ref"]))
        for name in ("oneOf", "anyOf"):
            if name in schema:
                return [each for option in schema[name] for each in self._options(option)]
        return [schema]

    def _at(self, reference: str) -> Schema:
        found = self._whole
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
        return dict(found)


async def check_requests(url: str, specification: Specification) -> dict[str, str]:
    """Each request to what the mock and the specification's names have against it."""
    http = HttpClient(url, LIMITS)
    connector = AdyenConnector(
        http, "AQEconformance12345", MERCHANT_ACCOUNT, widest(Mode.TEST), base_path=""
    )

    async def post(call: Call) -> str:
        until = time.monotonic() + START_S_MAX
        response = await connector._post(call, "op_1-1", until, until)
        unknown = specification.complaint(call.target, json.loads(call.body))
        return "; ".join(filter(None, (complaint_about(response), unknown)))

    found = {name: await post(connector._call(request)) for name, request in requests().items()}
    question = {
        "merchantAccount": MERCHANT_ACCOUNT,
        "paymentReference": "op_1-1",
        "reference": f"op_1-1{TOMBSTONE_SUFFIX}",
    }
    found["ask by the key"] = await post(Call("/cancels", json.dumps(question).encode()))
    for name, wrong in (
        ("a missing parameter is found out", {"merchantAccount": "x"}),
        ("a wrong type is found out", question | {"paymentReference": 7}),
        ("an unknown parameter is found out", question | {"colour": "blue"}),
    ):
        told = await post(Call("/cancels", json.dumps(wrong).encode()))
        found[name] = "" if told else "it is not"
    until = time.monotonic() + START_S_MAX
    response = await http.request(
        "POST", "/cancels", b"[]", send_before=until, answer_timeout_s=START_S_MAX,
        content_type=JSON,
    )  # fmt: skip
    found["what is no object is found out"] = "" if complaint_about(response) else "it is not"
    await http.close()
    return found


async def check_double(specification: Specification) -> dict[str, str]:
    """Each answer of the double to what the specification's names have against it."""
    found: dict[str, str] = {}
    async with adyen_psp() as psp:
        for kind in SENT_KINDS:
            request = await prepared(psp, kind)
            await send(psp.connector, request)
        for token in (f"{DECLINE_TOKEN}2", ACTION_TOKEN):
            await send(psp.connector, request_of(payment_method_token=token))
        await psp.connector.query(K.AUTHORIZE, "op_2-1", None)
        unsent = request_of()
        await psp.connector.query(K.AUTHORIZE, unsent.reference, unsent)
        for target, key, _ in psp.double.requests:
            _, answer = psp.double.keys[key]
            assert answer is not None
            status, told = answer
            path = target.removeprefix("/v71")
            for payment in psp.double.payments:
                if f"/{payment}/" in path:
                    path = path.replace(payment, PAYMENT)
                    break
            name = f"the double's answer to {path.replace(PAYMENT, '…')}"
            complaint = specification.complaint(path, told, status)
            found[name] = "; ".join(filter(None, (found.get(name, ""), complaint)))
    return found


async def run() -> dict[str, str]:
    """Check against a running mock, and by the names."""
    specification = Specification()
    async with mock(SPECIFICATION) as url:
        found = await check_requests(url, specification)
    return found | await check_double(specification)


def report() -> int:
    """Run it and say what was found; how many checks are bad."""
    more = "what comes of a request: the mock has no state; notifications: they are not in it."
    return print_found("Adyen", asyncio.run(run()), {}, more=more)
