"""A double of Braintree's GraphQL API, written from its public schema and guides, in the test's own
event loop.

Every request is parsed, validated and executed by graphql-core against the part of the schema that
the connector uses, so that a field that Braintree has not is an error. What only changes and what
asks go to one address: `is_mutation` tells them apart.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from aiohttp import web
from graphql import (
    DocumentNode,
    GraphQLError,
    GraphQLScalarType,
    OperationDefinitionNode,
    OperationType,
    build_schema,
    execute_sync,
    parse,
    validate,
)

from gateway.application.ports import Connector
from gateway.connectors.braintree.codes import GATEWAY_REJECTIONS, PROCESSOR_CODES
from gateway.connectors.braintree.connector import API_VERSION, BraintreeConnector, widest
from gateway.connectors.braintree.kind import usual
from gateway.domain.model import Mode, OperationKind, ResponseCode
from gateway.domain.money import CURRENCY_EXPONENTS
from tests.connector_conformance import SHORT_S
from tests.doubles import Double, DoublePsp, running

PUBLIC_KEY = "doublepublickey1"
PRIVATE_KEY = "doubleprivatekey0123456789abcdef"
MERCHANT_ACCOUNTS = {code: f"shop_{code.lower()}" for code in ("EUR", "USD", "JPY", "KWD", "HUF")}
CURRENCIES = {account: code for code, account in MERCHANT_ACCOUNTS.items()}
DECLINE = "declined_"
"""In a payment method's id, followed by a processor's code: authorizations are declined with it."""
REJECT = "rejected_"
"""Followed by a reason: the gateway rejects authorizations for it."""

SCHEMA = build_schema((Path(__file__).parent / "braintree_schema.graphql").read_text("utf-8"))
_AMOUNT = re.compile(r"\d+(\.\d{2,3})?")
_VOIDABLE = ("AUTHORIZED", "SUBMITTED_FOR_SETTLEMENT", "SETTLEMENT_PENDING")
_APPROVED = {
    "legacyCode": "1000",
    "message": "Approved",
    "cvvResponse": "MATCHES",
    "avsPostalCodeResponse": "MATCHES",
    "avsStreetAddressResponse": "NOT_PROVIDED",
    "authorizationId": "A1B2C3",
    "retrievalReferenceNumber": "1234567",
}
_EVENTS = {
    "AUTHORIZED": "AuthorizedEvent",
    "SUBMITTED_FOR_SETTLEMENT": "SubmittedForSettlementEvent",
    "SETTLEMENT_PENDING": "SettlementPendingEvent",
    "SETTLEMENT_CONFIRMED": "SettlementConfirmedEvent",
    "SETTLED": "SettledEvent",
    "SETTLEMENT_DECLINED": "SettlementDeclinedEvent",
    "AUTHORIZATION_EXPIRED": "AuthorizationExpiredEvent",
    "VOIDED": "VoidedEvent",
    "PROCESSOR_DECLINED": "ProcessorDeclinedEvent",
    "GATEWAY_REJECTED": "GatewayRejectedEvent",
    "FAILED": "FailedEvent",
}


@lru_cache
def _checked(text: str) -> tuple[DocumentNode, list[GraphQLError]]:
    """A document, and what is wrong with it."""
    document = parse(text)
    return document, validate(SCHEMA, document)


def _parse_amount(value: Any) -> str:
    if not isinstance(value, str) or not _AMOUNT.fullmatch(value):
        raise GraphQLError("an Amount is a whole number, or has two or three decimals")
    return value


_scalar = SCHEMA.type_map["Amount"]
assert isinstance(_scalar, GraphQLScalarType)
_scalar.parse_value = _parse_amount  # type: ignore[method-assign]


def refused(error_class: str, code: str = "", *path: str) -> GraphQLError:
    """An error as the API answers it."""
    extensions: dict[str, Any] = {"errorClass": error_class, "errorType": "user_error"}
    if code:
        extensions["legacyCode"] = code
    if path:
        extensions["inputPath"] = ["input", *path]
    return GraphQLError("as documented", extensions=extensions)


def money(minor: int, currency: str) -> dict[str, str]:
    """A MonetaryAmount."""
    value = Decimal(minor).scaleb(-CURRENCY_EXPONENTS[currency])
    return {"value": f"{value:f}", "currencyCode": currency}


def _minor(text: str, currency: str) -> int:
    """In the currency's format, or refused."""
    value = Decimal(text).scaleb(CURRENCY_EXPONENTS[currency])
    decimals = len(text.partition(".")[2])
    if decimals not in (0, CURRENCY_EXPONENTS[currency]) or value <= 0:
        raise refused("VALIDATION", "81503", "transaction", "amount")
    return int(value)


@dataclass
class BraintreeDouble(Double[tuple[str, str]]):
    """The state behind the API. Of each request it notes the operation's field and the key; a
    reference of an effect is the request's `clientMutationId`.
    """

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Transactions, Refunds and Verifications by id; `minor` and `made_by` are the double's."""
    keys: dict[str, tuple[str, dict[str, Any] | None]] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list)
    """The order ID of each search."""
    searchable: bool = True
    """Whether searches find what was made; they lag."""
    heeds_keys: bool = True
    """Whether keys are heeded; otherwise duplicates are checked for instead."""
    settles: bool = True
    """Whether what is submitted for settlement is settled before the next request."""
    error: GraphQLError | None = None
    """Where it is set, it is the answer to every mutation, which does nothing."""

    # --- HTTP ---

    async def handle(self, request: web.Request) -> web.Response:
        """Any request."""
        if (request.method, request.path) != ("POST", "/graphql"):
            return web.json_response({}, status=404)
        body = await request.json()
        assert sorted(body) == ["query", "variables"]
        input_ = body["variables"].get("input", {})
        document, faults = _checked(body["query"])
        operation = next(
            each for each in document.definitions if isinstance(each, OperationDefinitionNode)
        )
        asked: Any = operation.selection_set.selections[0]
        self.note(request, (asked.name.value, _key_of(input_)))
        if not self._is_authenticated(request):
            return web.json_response({"data": None, "errors": [_json(refused("AUTHENTICATION"))]})
        changes = operation.operation is OperationType.MUTATION
        if changes:
            await self.pass_gate()
        if self.settles:
            self.settle()
        root = self._mutations() if changes else self._queries()
        if faults:
            return web.json_response({"errors": [_json(error) for error in faults]})
        result = execute_sync(SCHEMA, document, root_value=root, variable_values=body["variables"])
        answer: dict[str, Any] = {"extensions": {"requestId": "r-1"}}
        if result.data is not None:  # otherwise nothing was executed
            answer["data"] = result.data
        if result.errors:
            answer["errors"] = [_json(error) for error in result.errors]
        return web.json_response(answer)

    def _is_authenticated(self, request: web.Request) -> bool:
        token = b64encode(f"{PUBLIC_KEY}:{PRIVATE_KEY}".encode()).decode()
        return (
            not self.revoked
            and request.headers.get("Authorization") == f"Basic {token}"
            and request.headers.get("Braintree-Version") == API_VERSION
        )

    def _queries(self) -> dict[str, Any]:
        def transactions(_info: Any, input: dict[str, Any], first: int) -> dict[str, Any]:  # noqa: A002
            wanted = input["orderId"]["is"]
            self.searched.append(wanted)
            found = [
                node
                for node in self.nodes.values()
                if self.searchable
                and node["__typename"] == "Transaction"
                and node["orderId"] == wanted
            ]
            return {
                "edges": [{"cursor": node["id"], "node": node} for node in found[:first]],
                "pageInfo": {"hasNextPage": len(found) > first, "hasPreviousPage": False},
            }

        def node(_info: Any, id: str) -> dict[str, Any]:  # noqa: A002
            if id not in self.nodes:
                raise refused("NOT_FOUND")
            return self.nodes[id]

        return {"node": node, "search": {"transactions": transactions}}

    def _mutations(self) -> dict[str, Any]:
        made: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
            "authorizePaymentMethod": ("transaction", partial(self._charge, at_once=False)),
            "chargePaymentMethod": ("transaction", partial(self._charge, at_once=True)),
            "authorizeCreditCard": ("transaction", partial(self._charge, at_once=False)),
            "chargeCreditCard": ("transaction", partial(self._charge, at_once=True)),
            "captureTransaction": ("transaction", self._capture),
            "partialCaptureTransaction": ("capture", self._capture_part),
            "voidTransaction": ("transaction", self._void),
            "refundTransaction": ("refund", self._refund),
            "verifyPaymentMethod": ("verification", self._verify),
        }

        def resolver(result: str, make: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
            def resolve(_info: Any, input: dict[str, Any]) -> dict[str, Any]:  # noqa: A002
                if self.error is not None:
                    raise self.error
                object_ = self._keyed(input, make)
                return {"clientMutationId": input.get("clientMutationId"), result: object_}

            return resolve

        return {name: resolver(*each) for name, each in made.items()}

    def _keyed(
        self, told: dict[str, Any], make: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """ "If subsequent requests are made with the same apiRequestKey, and the first request
        resulted in a transaction being created, then the same transaction in its current status
        will be returned"; other input values are a validation error; errors use no key up.
        """
        key, fingerprint = _key_of(told), json.dumps(told, sort_keys=True)
        if not key or not self.heeds_keys:
            return make(told)
        if key in self.keys:
            first, object_ = self.keys[key]
            if first != fingerprint or object_ is None:
                raise refused("VALIDATION", "", "apiRequestKey")
            return object_
        object_ = make(told)
        self.keys[key] = (fingerprint, object_)
        return object_

    # --- objects ---

    def _new(self, type_: str, minor: int, currency: str, told: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        node: dict[str, Any] = {
            "__typename": type_,
            "id": f"{type_.lower()}_{number}",
            "legacyId": str(number),
            "made_by": told.get("clientMutationId"),
            "minor": minor,
            "currency": currency,
            "status": None,
            "statusHistory": [],
        }
        node["amount"] = lambda _info: money(node["minor"], currency)
        self.nodes[node["id"]] = node
        return node

    def change(self, node: dict[str, Any], status: str, **more: Any) -> None:
        """A new status, and its event before all others."""
        event = {
            "__typename": _EVENTS[status],
            "status": status,
            "amount": money(node["minor"], node["currency"]),
            **more,
        }
        node["status"] = status
        node["statusHistory"].insert(0, event)

    def settle(self) -> None:
        """Settle all that was submitted."""
        for node in self.nodes.values():
            if node["status"] == "SUBMITTED_FOR_SETTLEMENT":
                self.change(node, "SETTLED")

    def _transaction(self, told: dict[str, Any]) -> dict[str, Any]:
        node = self.nodes.get(told["transactionId"])
        if node is None or node["__typename"] != "Transaction":
            raise refused("NOT_FOUND", "", "transactionId")
        return node

    def _new_transaction(
        self, minor: int, currency: str, told: dict[str, Any], brand: str
    ) -> dict[str, Any]:
        node = self._new("Transaction", minor, currency, told)
        node |= {
            "orderId": told["transaction"].get("orderId"),
            "parent": None,
            "parts": [],
            "paymentMethodSnapshot": {
                "__typename": "CreditCardTransactionDetails",
                "creditCard": {"brandCode": brand},
                "networkTransactionId": "nti_1",
                "acquirerReferenceNumber": "arn_1",
            },
            "refunds": lambda _info: self.refunds_of(node),
            "partialCaptureDetails": lambda _info: _relation(node),
        }
        return node

    def _charge(self, told: dict[str, Any], *, at_once: bool) -> dict[str, Any]:
        transaction = told["transaction"]
        currency = CURRENCIES.get(transaction.get("merchantAccountId", ""))
        if currency is None:
            raise refused("VALIDATION", "91513", "transaction", "merchantAccountId")
        method = told["paymentMethodId"]
        minor = _minor(transaction["amount"], currency)
        same = [
            node
            for node in self.nodes.values()
            if node["__typename"] == "Transaction"
            and (node["orderId"], node["minor"]) == (transaction.get("orderId"), minor)
        ]
        node = self._new_transaction(
            minor, currency, told, "MASTERCARD" if "mastercard" in method else "VISA"
        )
        node["initiator"] = transaction.get("paymentInitiator")
        node["vault"] = told.get("options", {}).get("externalVault")
        node["method"] = method
        if same and not self.heeds_keys:
            self.change(
                node, "GATEWAY_REJECTED", gatewayRejectionReason="DUPLICATE", duplicateOf=same[0]
            )
            return node
        if method.startswith(REJECT):
            reason = method.removeprefix(REJECT)
            self.change(
                node, "GATEWAY_REJECTED", gatewayRejectionReason=reason, processorResponse=_APPROVED
            )
            return node
        if method.startswith(DECLINE):
            code, _, advice = method.removeprefix(DECLINE).partition("_mastercard_")
            self.change(
                node,
                "FAILED" if code.startswith("3") else "PROCESSOR_DECLINED",
                declineType="SOFT" if code in ("2000", "2001", "2046") else "HARD",
                processorResponse={"legacyCode": code, "message": "Declined"},
                networkResponse={"code": "51", "message": "51"},
                merchantAdviceCodeResponse={"code": advice} if advice else None,
            )
            return node
        self.effects.append(told["clientMutationId"])
        self.change(
            node,
            "AUTHORIZED",
            processorResponse=_APPROVED,
            networkResponse={"code": "00"},
            authorizationExpiresAt="2030-01-02T03:04:05.000000Z",
        )
        if at_once:
            self.change(node, "SUBMITTED_FOR_SETTLEMENT")
        return node

    def _capture(self, told: dict[str, Any]) -> dict[str, Any]:
        node = self._transaction(told)
        if node["status"] != "AUTHORIZED":
            raise refused("VALIDATION", "91507")
        wanted = _minor(told["transaction"]["amount"], node["currency"])
        if wanted > node["minor"]:
            raise refused("VALIDATION", "91522", "transaction", "amount")
        self.effects.append(told["clientMutationId"])
        node["minor"], node["orderId"] = wanted, told["transaction"]["orderId"]
        self.change(node, "SUBMITTED_FOR_SETTLEMENT")
        return node

    def _capture_part(self, told: dict[str, Any]) -> dict[str, Any]:
        node = self._transaction(told)
        if node["status"] not in ("AUTHORIZED", "SETTLEMENT_PENDING"):
            raise refused("VALIDATION", "91507")
        node.setdefault("whole", node["minor"])
        wanted = _minor(told["transaction"]["amount"], node["currency"])
        taken = sum(part["minor"] for part in node["parts"])
        if taken + wanted > node["whole"]:
            raise refused("VALIDATION", "91522", "transaction", "amount")
        self.effects.append(told["clientMutationId"])
        part = self._new_transaction(wanted, node["currency"], told, "VISA")
        part["parent"] = node
        self.change(part, "SUBMITTED_FOR_SETTLEMENT")
        node["parts"].append(part)
        node["minor"] = taken + wanted
        final = told["transaction"].get("finalCapture")
        self.change(node, "SETTLEMENT_CONFIRMED" if final else "SETTLEMENT_PENDING")
        return part

    def _void(self, told: dict[str, Any]) -> dict[str, Any]:
        node = self._transaction(told)
        if node["status"] not in _VOIDABLE:
            raise refused("VALIDATION", "91504")
        self.effects.append(told["clientMutationId"])
        self.change(node, "VOIDED")
        return node

    def refunds_of(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """The Refunds of a Transaction."""
        return [
            each
            for each in self.nodes.values()
            if each["__typename"] == "Refund" and each["refundedTransaction"] is node
        ]

    def _refund(self, told: dict[str, Any]) -> dict[str, Any]:
        node = self._transaction(told)
        if node["status"] != "SETTLED":
            raise refused("VALIDATION", "91506")
        left = node["minor"] - sum(each["minor"] for each in self.refunds_of(node))
        minor = _minor(told["refund"]["amount"], node["currency"])
        if minor > left:
            raise refused("VALIDATION", "91521", "refund", "amount")
        return self._new_refund(node, minor, told, told["refund"].get("orderId"))

    def _new_refund(
        self, node: dict[str, Any], minor: int, told: dict[str, Any], order_id: str | None
    ) -> dict[str, Any]:
        self.effects.append(told["clientMutationId"])
        refund = self._new("Refund", minor, node["currency"], told)
        refund |= {"refundedTransaction": node, "orderId": order_id or node["orderId"]}
        self.change(refund, "SUBMITTED_FOR_SETTLEMENT")
        return refund

    def _verify(self, told: dict[str, Any]) -> dict[str, Any]:
        if told.get("merchantAccountId", "") not in CURRENCIES:
            raise refused("VALIDATION", "91728", "merchantAccountId")
        method = told["paymentMethodId"]
        node = self._new("Verification", 0, "EUR", told)
        node |= {"status": "VERIFIED", "processorResponse": _APPROVED}
        if method.startswith(DECLINE):
            code = method.removeprefix(DECLINE)
            node |= {"status": "PROCESSOR_DECLINED", "processorResponse": {"legacyCode": code}}
        elif method.startswith(REJECT):
            node |= {
                "status": "GATEWAY_REJECTED",
                "gatewayRejectionReason": method.removeprefix(REJECT),
            }
        else:
            self.effects.append(told["clientMutationId"])
        return node

    def transactions(self) -> list[dict[str, Any]]:
        """All that were made, the oldest first."""
        return [node for node in self.nodes.values() if node["__typename"] == "Transaction"]

    def standing_minor(self, node: dict[str, Any]) -> int:
        """What of a Transaction is held, or captured and not refunded."""
        if node["parts"]:
            held = node["whole"] - node["minor"] if node["status"] == "SETTLEMENT_PENDING" else 0
            return int(held) + sum(self.standing_minor(part) for part in node["parts"])
        if node["status"] not in (*_VOIDABLE, "SETTLED"):
            return 0
        return int(node["minor"] - sum(each["minor"] for each in self.refunds_of(node)))


def _key_of(input_: Mapping[str, Any]) -> str:
    return str(input_.get("apiRequestKey", ""))


def _json(error: GraphQLError) -> dict[str, Any]:
    return {
        "message": error.message,
        "path": error.path,
        "extensions": dict(error.extensions or {}),
    }


def _relation(node: dict[str, Any]) -> dict[str, Any] | None:
    if node["parent"] is not None:
        return {"__typename": "ChildCapture", "parentAuthorization": node["parent"]}
    if node["parts"]:
        return {
            "__typename": "ParentAuthorization",
            "childCaptures": node["parts"],
            "totalAmountAuthorized": money(node["whole"], node["currency"]),
        }
    return None


class BraintreePsp(DoublePsp[BraintreeDouble]):
    """Braintree's double."""

    declines: Mapping[str, ResponseCode] = {
        **{f"tok_{DECLINE}{code}": unified for code, unified in PROCESSOR_CODES.items()},
        **{f"tok_{REJECT}{reason}": unified for reason, unified in GATEWAY_REJECTIONS.items()},
        f"tok_{DECLINE}2999": ResponseCode.DECLINED_OTHER,
        f"tok_{DECLINE}3999": ResponseCode.SYSTEM_MALFUNCTION,
    }
    follow_up_decline: Mapping[OperationKind, str] = {}
    inexpressible: tuple[tuple[int, str], ...] = ((1000, "CLF"), (10**12 + 1, "EUR"), (100, "GBP"))
    currencies: tuple[str, ...] = ("JPY", "EUR", "KWD", "HUF")

    def connect(self, answer_timeout_s: float, **more: Any) -> BraintreeConnector:
        values: dict[str, Any] = {
            "public_key": PUBLIC_KEY,
            "private_key": PRIVATE_KEY,
            "merchant_accounts": MERCHANT_ACCOUNTS,
            "capabilities": widest(Mode.TEST, answer_timeout_s),
            "repeat_pause_s": 0.0,
        } | more
        return BraintreeConnector(self.client(), **values)

    async def impatient(self) -> Connector:
        # An account with one capture for each authorization: it asks for nothing before it sends.
        return self.connect(SHORT_S, capabilities=usual(widest(Mode.TEST, SHORT_S)))

    async def held_minor(self, reference: str) -> int:
        return sum(
            self.double.standing_minor(node)
            for node in self.double.transactions()
            if node["made_by"] == reference
        )

    def report_more(self, told: dict[str, Any]) -> None:
        told["data"]["authorizePaymentMethod"]["transaction"]["amount"]["value"] = "10.01"

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        amount = told["data"]["authorizePaymentMethod"]["transaction"]["amount"]
        amount["currencyCode"] = "USD"


def is_mutation(body: bytes) -> bool:
    """Whether a request changes something."""
    return body.startswith(b'{"query":"mutation')


def braintree_psp() -> AbstractAsyncContextManager[BraintreePsp]:
    """Braintree's double, the way to it, and a connector."""
    return running(BraintreePsp, BraintreeDouble(), is_mutation)
