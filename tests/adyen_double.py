"""A double of Adyen's Checkout API v71, from its public documentation, in the test's event loop.

It keeps payments, what acts on them and idempotency keys, is strict about parameters (one that it
does not know is an error), and queues the events that Adyen would tell of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from Adyen.util import generate_notification_sig
from aiohttp import web

from gateway.connectors.adyen.amounts import EXPONENTS, from_adyen
from gateway.connectors.adyen.codes import REFUSALS
from gateway.connectors.adyen.connector import API_VERSION, AdyenConnector, widest
from gateway.domain.model import Mode, OperationKind, ResponseCode
from tests.doubles import Answer, DoublePsp, KeyedDouble, running

API_KEY = "AQEtestKEYtestKEYtestKEY"
MERCHANT_ACCOUNT = "TestCompanyECOM"
DECLINE_TOKEN = "tok_declined_"
"""Followed by a refusal reason code: the authorization is refused with it."""
ACTION_TOKEN = "tok_redirect"
HMAC_KEY = "44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056"
KEY_LENGTH_MAX = 64
REFERENCE_LENGTH_MAX = 80

_PAYMENT = frozenset(
    {
        "merchantAccount",
        "reference",
        "amount",
        "returnUrl",
        "paymentMethod",
        "shopperReference",
        "shopperInteraction",
        "recurringProcessingModel",
        "shopperStatement",
        "captureDelayHours",
        "additionalData",
        "mpiData",
    }
)
_ADDITIONAL = frozenset(
    {"manualCapture", "authorisationType", "networkTxReference", "scaExemption"}
)
_MPI_DATA = frozenset({"cavv", "dsTransID", "eci", "threeDSVersion", "directoryResponse"})
_MODIFICATIONS: dict[str, frozenset[str]] = {
    "captures": frozenset({"merchantAccount", "reference", "amount"}),
    "cancels": frozenset({"merchantAccount", "reference"}),
    "refunds": frozenset({"merchantAccount", "reference", "amount"}),
    "amountUpdates": frozenset({"merchantAccount", "reference", "amount"}),
    "reversals": frozenset({"merchantAccount", "reference"}),
}
_TECHNICAL_CANCEL = frozenset({"merchantAccount", "paymentReference", "reference"})

Json = dict[str, Any]


class Refused(Exception):
    """An error as the API answers it."""

    def __init__(
        self, status: int, code: str, type_: str = "validation", *, transient: bool = False
    ) -> None:
        super().__init__(code)
        self.status = status
        self.transient = transient
        self.body = {
            "status": status,
            "errorCode": code,
            "message": "as documented",
            "errorType": type_,
        }


@dataclass
class Held:
    """A payment, its amounts in Adyen's unit."""

    psp_reference: str
    reference: str
    currency: str
    authorised: int
    captured: int = 0
    refunded: int = 0
    cancelled: bool = False
    pre_authorised: bool = False

    @property
    def open(self) -> int:
        """What is still held: one capture releases what it leaves."""
        return 0 if self.cancelled or self.captured else self.authorised


@dataclass
class AdyenDouble(KeyedDouble[tuple[str, str, Json]]):
    """The state behind the API. Of each request it notes path, idempotency key and body."""

    payments: dict[str, Held] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    """The notification items that Adyen would send, unsigned, in order."""
    away: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    """By reference: amount, currency and key of payments whose customer is at the bank."""
    strict_keys: bool = False
    """Whether a key that comes with another request is refused, instead of answered as at first:
    the documentation does not say."""
    failures: list[Refused] = field(default_factory=list)
    """What the next requests are answered, before anything is executed."""

    # --- HTTP ---

    async def handle(self, request: web.Request) -> web.Response:
        """Any request."""
        key = request.headers.get("Idempotency-Key", "")
        text = await request.text()
        try:
            body = _parsed(text)
            self.note(request, (request.path, key, body))
            if self.revoked or request.headers.get("X-API-Key") != API_KEY:
                raise Refused(401, "000", "security")
            if request.content_type != "application/json" or request.method != "POST":
                raise Refused(400, "702")
            if self.failures:
                raise self.failures.pop(0)
            if not 0 < len(key) <= KEY_LENGTH_MAX:
                raise Refused(422, "705")
            return _json(*await self._keyed(request.path, key, body, text))
        except Refused as refused:
            return _json(refused.status, refused.body, transient=refused.transient)

    async def _keyed(self, path: str, key: str, body: Json, text: str) -> Answer:
        fingerprint = f"{path} {text}"
        if key in self.keys:
            first, answer = self.keys[key]
            if answer is None:
                raise Refused(409, "704", transient=True)
            if self.strict_keys and first != fingerprint:
                raise Refused(422, "704")
            return answer

        async def make() -> Answer:
            return self._post(path, body, key)

        return await self.execute(key, fingerprint, make)

    def _post(self, path: str, body: Json, key: str) -> Answer:
        if body.get("merchantAccount") != MERCHANT_ACCOUNT:
            raise Refused(403, "901", "security")
        if len(str(body.get("reference", ""))) > REFERENCE_LENGTH_MAX:
            raise Refused(422, "130")
        match path.strip("/").split("/"):
            case [version, "payments"] if version == API_VERSION:
                return 200, self._pay(body, key)
            case [version, "cancels"] if version == API_VERSION:
                return 201, self._technical_cancel(body)
            case [version, "payments", psp_reference, what] if (
                version == API_VERSION and what in _MODIFICATIONS
            ):
                _check(body, _MODIFICATIONS[what])
                payment = self.payments.get(psp_reference)
                if payment is None:
                    raise Refused(422, "167")
                return 201, self._modify(payment, what, body, key)
            case _:
                raise Refused(404, "404")

    # --- payments ---

    def _pay(self, body: Json, key: str) -> Json:
        _check(body, _PAYMENT)
        _check(body.get("additionalData", {}), _ADDITIONAL)
        _check(body.get("mpiData", {}), _MPI_DATA)
        value, currency = _amount(body)
        method = body.get("paymentMethod", {})
        if method.get("type") == "ideal":
            return self._send_away(body, value, currency, key)
        _check(method, frozenset({"type", "storedPaymentMethodId"}))
        if not method.get("storedPaymentMethodId") or len(body.get("shopperReference", "")) < 3:
            raise Refused(422, "800")
        if body.get("recurringProcessingModel") not in (
            "CardOnFile",
            "Subscription",
            "UnscheduledCardOnFile",
        ) or body.get("shopperInteraction") not in ("Ecommerce", "ContAuth", "Moto"):
            raise Refused(422, "901")
        if not body.get("reference") or not body.get("returnUrl"):
            raise Refused(422, "702")
        told: Json = {
            "pspReference": self._reference(),
            "merchantReference": body["reference"],
            "additionalData": {"paymentMethod": "visa"},
        }
        token = f"tok_{method['storedPaymentMethodId']}"
        if token.startswith(DECLINE_TOKEN):
            code = token.removeprefix(DECLINE_TOKEN)
            told |= {
                "resultCode": "Refused",
                "refusalReason": "as documented",
                "refusalReasonCode": code,
            }
            self._tell(
                "AUTHORISATION", told["pspReference"], body["reference"], value, currency, ok=False
            )
            return told
        if token == ACTION_TOKEN:
            return _redirected("scheme")
        manual = body.get("additionalData", {}).get("manualCapture") == "true"
        payment = Held(
            told["pspReference"],
            body["reference"],
            currency,
            value,
            captured=0 if manual else value,
            pre_authorised=body.get("additionalData", {}).get("authorisationType") == "PreAuth",
        )
        if not manual and value and body.get("captureDelayHours") != 0:
            raise Refused(422, "702")  # it would be captured some time
        self.payments[payment.psp_reference] = payment
        self.effects.append(key)
        self._tell("AUTHORISATION", payment.psp_reference, body["reference"], value, currency)
        told["resultCode"] = "Authorised"
        told["amount"] = {"currency": currency, "value": value}
        told["additionalData"] |= {
            "authCode": "044925",
            "avsResult": "9 Address matches, postal code unknown",
            "avsResultRaw": "A",
            "cvcResult": "1 Matches",
            "cvcResultRaw": "M",
            "networkTxReference": "MCC123456789012",
            "refusalReasonRaw": "AUTHORISED",
        }
        return told

    def _send_away(self, body: Json, value: int, currency: str, key: str) -> Json:
        """A payment that the customer completes at the bank: see `come_back`."""
        _check(body["paymentMethod"], frozenset({"type", "issuer"}))
        if body.get("captureDelayHours") != 0 or currency != "EUR":
            raise Refused(422, "905")
        self.away[body["reference"]] = (value, currency, key)
        return _redirected("ideal")

    def come_back(self, reference: str, *, paid: bool = True) -> None:
        """The customer has paid at the bank, or not."""
        value, currency, key = self.away.pop(reference)
        psp_reference = self._reference()
        if paid:
            self.payments[psp_reference] = Held(
                psp_reference, reference, currency, value, captured=value
            )
            self.effects.append(key)
        self._tell("AUTHORISATION", psp_reference, reference, value, currency, ok=paid)

    def _technical_cancel(self, body: Json) -> Json:
        _check(body, _TECHNICAL_CANCEL)
        reference = body.get("paymentReference")
        if not reference:
            raise Refused(422, "702")
        told = {**body, "pspReference": self._reference(), "status": "received"}
        found = [payment for payment in self.payments.values() if payment.reference == reference]
        for payment in found:
            if not payment.captured:
                payment.cancelled = True
        self._tell("TECHNICAL_CANCEL", told["pspReference"], reference, 0, "EUR", ok=bool(found))
        return told

    def _modify(self, payment: Held, what: str, body: Json, key: str) -> Json:
        """Everything is received; whether it can be done, notifications tell."""
        told = {
            **body,
            "pspReference": self._reference(),
            "paymentPspReference": payment.psp_reference,
            "status": "received",
        }
        value = payment.authorised
        if "amount" in _MODIFICATIONS[what]:
            value, currency = _amount(body)
            if currency != payment.currency or not value:
                raise Refused(422, "137")
        event, done = self._carry_out(payment, what, value)
        self.effects.append(key)
        self._tell(
            event,
            told["pspReference"],
            body.get("reference", payment.reference),
            value,
            payment.currency,
            ok=done,
            original=payment.psp_reference,
        )
        return told

    def _carry_out(self, payment: Held, what: str, value: int) -> tuple[str, bool]:
        """The event that is told of it, and whether it could be done."""
        match what:
            case "captures":
                done = value <= payment.open
                payment.captured += value if done else 0
                return "CAPTURE", done
            case "cancels":
                done = payment.open > 0
                payment.cancelled |= done
                return "CANCELLATION", done
            case "refunds":
                done = value <= payment.captured - payment.refunded
                payment.refunded += value if done else 0
                return "REFUND", done
            case "amountUpdates":
                done = payment.open > 0 and payment.pre_authorised
                payment.authorised = value if done else payment.authorised
                return "AUTHORISATION_ADJUSTMENT", done
            case _:
                done = payment.open > 0 or payment.captured > payment.refunded
                payment.cancelled |= payment.open > 0
                payment.refunded = payment.captured
                return "CANCEL_OR_REFUND", done

    # --- notifications ---

    def _reference(self) -> str:
        """Adyen's references have 16 characters."""
        return f"PSP{next(self._numbers):013d}"

    def _tell(
        self,
        event: str,
        psp_reference: str,
        reference: str,
        value: int,
        currency: str,
        *,
        ok: bool = True,
        original: str = "",
    ) -> None:
        item: Json = {
            "eventCode": event,
            "success": "true" if ok else "false",
            "eventDate": "2026-11-21T16:00:00+01:00",
            "merchantAccountCode": MERCHANT_ACCOUNT,
            "merchantReference": reference,
            "pspReference": psp_reference,
            "amount": {"currency": currency, "value": value},
            "paymentMethod": "visa",
            "reason": "" if ok else "as documented",
        }
        if original:
            item["originalReference"] = original
        self.events.append(item)


def _redirected(method: str) -> Json:
    return {
        "resultCode": "RedirectShopper",
        "action": {
            "type": "redirect",
            "method": "GET",
            "paymentMethodType": method,
            "url": f"https://checkoutshopper-test.adyen.com/{method}/redirect",
        },
    }


def webhook_of(*items: Json, hmac_key: str = HMAC_KEY) -> bytes:
    """The body of a request that tells of events, signed by Adyen's own library."""
    wrapped = [
        {
            "NotificationRequestItem": {
                **item,
                "additionalData": {
                    "hmacSignature": generate_notification_sig(item, hmac_key).decode()
                },
            }
        }
        for item in items
    ]
    return json.dumps({"live": "false", "notificationItems": wrapped}).encode()


def _parsed(text: str) -> Json:
    try:
        told = json.loads(text)
    except ValueError:
        raise Refused(400, "702") from None
    if not isinstance(told, dict):
        raise Refused(400, "702")
    return told


def _json(status: int, body: object, *, transient: bool = False) -> web.Response:
    headers = {"transient-error": "true"} if transient else {}
    return web.json_response(body, status=status, headers=headers)


def _check(body: Mapping[str, object], allowed: frozenset[str]) -> None:
    if not body.keys() <= allowed:
        raise Refused(400, "702")


def _amount(body: Json) -> tuple[int, str]:
    amount = body.get("amount")
    if not isinstance(amount, dict) or amount.keys() != {"currency", "value"}:
        raise Refused(422, "100")
    value, currency = amount["value"], amount["currency"]
    if not isinstance(value, int) or value < 0 or currency not in EXPONENTS:
        raise Refused(422, "137")
    return value, currency


class AdyenPsp(DoublePsp[AdyenDouble]):
    """Adyen's double."""

    declines: Mapping[str, ResponseCode] = {
        **{f"{DECLINE_TOKEN}{code}": unified for code, unified in REFUSALS.items()},
        f"{DECLINE_TOKEN}999": ResponseCode.DECLINED_OTHER,
    }
    follow_up_decline: Mapping[OperationKind, str] = {}  # told by notification
    inexpressible: tuple[tuple[int, str], ...] = ((150, "IDR"), (150, "CVE"), (1000, "CLF"))
    currencies: tuple[str, ...] = ("JPY", "EUR", "KWD", "ISK", "CLP", "CVE", "IDR", "HUF", "TWD")

    def connect(self, answer_timeout_s: float, **more: Any) -> AdyenConnector:
        values: dict[str, Any] = {"api_key": API_KEY, "repeat_pause_s": 0.0} | more
        return AdyenConnector(
            self.client(),
            merchant_account=MERCHANT_ACCOUNT,
            capabilities=widest(Mode.TEST, answer_timeout_s),
            **values,
        )

    async def held_minor(self, reference: str) -> int:
        return sum(
            from_adyen(payment.open + payment.captured - payment.refunded, payment.currency) or 0
            for payment in self.double.payments.values()
            if payment.reference == reference
        )

    def report_more(self, told: dict[str, Any]) -> None:
        told["amount"]["value"] += 1

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        told["amount"]["currency"] = "USD"


def adyen_psp() -> AbstractAsyncContextManager[AdyenPsp]:
    """Adyen's double, the way to it, and a connector."""
    return running(AdyenPsp, AdyenDouble())
