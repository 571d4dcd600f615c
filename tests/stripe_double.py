"""A double of Stripe's API, written from its public documentation, in the test's own event loop.

It keeps PaymentIntents, SetupIntents, Refunds and idempotency keys as the API reference says, and
is strict about parameters: one that it does not know is an error. `tests/connector_conformance.py`
disturbs the way to it; independent mocks are used by `make conformance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gateway.connectors.notifications import OUR_REFERENCE
from gateway.connectors.stripe.codes import DECLINE_CODES
from gateway.connectors.stripe.connector import StripeConnector, widest
from gateway.domain.model import Mode, OperationKind, ResponseCode
from tests.doubles import Answer, DoublePsp, KeyedDouble, running

SECRET_KEY = "sk_test_doubledouble1234"
DECLINE_TOKEN = "tok_chargeDeclined_"
"""Followed by a decline code: the authorization is declined with it."""
FOLLOW_UP_DECLINE_TOKEN = "tok_later_"
"""Followed by a decline code: captures and increments are declined with it."""
AUTHENTICATION_FAILURE = "payment_intent_authentication_failure"
"""In the place of a decline code: an error that is none of a card's, with status 402 too."""
ACTION_TOKEN = "tok_threeDSecureRequired"
_METADATA_KEYS_MAX = 50
_REDIRECTS: dict[str, tuple[frozenset[str], str]] = {
    "bancontact": (frozenset({"eur"}), "name"),
    "eps": (frozenset({"eur"}), "name"),
    "ideal": (frozenset({"eur"}), ""),
    "p24": (frozenset({"eur", "pln"}), "email"),
    "pix": (frozenset({"brl"}), ""),
}
"""The currencies of methods with a customer's action, and the billing detail that each needs."""
PIX_EXPIRES_AT = 1_900_000_000

_ALLOWED: dict[str, frozenset[str]] = {
    "create": frozenset(
        {
            "amount",
            "currency",
            "confirm",
            "capture_method",
            "customer",
            "payment_method",
            "payment_method_types[]",
            "payment_method_data[type]",
            "payment_method_data[card][token]",
            "payment_method_options[card][moto]",
            "payment_method_options[card][request_multicapture]",
            "payment_method_options[card][request_incremental_authorization]",
            "payment_method_data[card][network_token][number]",
            "payment_method_data[card][network_token][exp_month]",
            "payment_method_data[card][network_token][exp_year]",
            "payment_method_options[card][network_token][cryptogram]",
            "payment_method_options[card][network_token][electronic_commerce_indicator]",
            "payment_method_options[card][three_d_secure][cryptogram]",
            "payment_method_options[card][three_d_secure][transaction_id]",
            "payment_method_options[card][three_d_secure][version]",
            "payment_method_options[card][three_d_secure][electronic_commerce_indicator]",
            "payment_method_options[card][three_d_secure][exemption_indicator]",
            "payment_method_data[billing_details][name]",
            "payment_method_data[billing_details][email]",
            "payment_method_data[eps][bank]",
            "payment_method_data[ideal][bank]",
            "payment_method_data[p24][bank]",
            "mandate_data[customer_acceptance][type]",
            "return_url",
            "error_on_requires_action",
            "statement_descriptor_suffix",
            "expand[]",
        }
    ),
    "capture": frozenset({"amount_to_capture", "final_capture", "expand[]"}),
    "cancel": frozenset({"cancellation_reason"}),
    "increment_authorization": frozenset({"amount", "expand[]"}),
    "refund": frozenset({"payment_intent", "amount"}),
    "setup": frozenset(
        {
            "confirm",
            "customer",
            "payment_method",
            "payment_method_types[]",
            "payment_method_data[type]",
            "payment_method_data[card][token]",
            "return_url",
        }
    ),
}

Form = dict[str, str]


class Refused(Exception):
    """An error as the API answers it."""

    def __init__(self, status: int, type_: str, *, saved: bool = True, **more: Any) -> None:
        super().__init__(type_)
        self.status = status
        self.saved = saved
        """Whether an endpoint began to execute, so that the key keeps the answer."""
        self.body = {"error": {"type": type_, "message": "as documented", **more}}


@dataclass
class StripeDouble(KeyedDouble[tuple[str, str, str]]):
    """The state behind the API. Of each request it notes method, path and idempotency key."""

    intents: dict[str, dict[str, Any]] = field(default_factory=dict)
    setups: dict[str, dict[str, Any]] = field(default_factory=dict)
    refunds: dict[str, dict[str, Any]] = field(default_factory=dict)
    attached: dict[str, str] = field(default_factory=dict)
    """PaymentMethods to the Customers that they are attached to."""
    forms: list[Form] = field(default_factory=list)
    """The parameters of each request that was executed, in order."""
    errors: int = 0
    """How many requests yet are answered with a 500, which their keys keep, and do nothing."""
    searchable: bool = True
    """Whether searches find what was made; they lag."""

    # --- HTTP ---

    async def handle(self, request: web.Request) -> web.Response:
        """Any request."""
        key = request.headers.get("Idempotency-Key", "")
        body = await request.text()
        self.note(request, (request.method, request.path, key))
        try:
            if self.revoked or request.headers.get("Authorization") != f"Bearer {SECRET_KEY}":
                raise Refused(401, "invalid_request_error", saved=False)
            if request.method == "GET":
                return _json(200, self._get(request))
            return await self._keyed(request, key, body)
        except Refused as refused:
            return _json(refused.status, refused.body)

    async def _keyed(self, request: web.Request, key: str, body: str) -> web.Response:
        fingerprint = f"{request.path} {body}"

        async def make() -> Answer:
            form = await _form(request)
            self.forms.append(form)
            try:
                if self.errors:
                    self.errors -= 1
                    raise Refused(500, "api_error")
                return 200, self._post(request.path, form, key)
            except Refused as refused:
                if not refused.saved:
                    raise
                return refused.status, refused.body

        if not key:
            return _json(*await make())
        if key in self.keys:
            first, answer = self.keys[key]
            if first != fingerprint:
                raise Refused(400, "idempotency_error", saved=False)
            if answer is None:
                raise Refused(
                    409, "invalid_request_error", code="idempotency_key_in_use", saved=False
                )
            return _json(*answer, replayed=True)
        return _json(*await self.execute(key, fingerprint, make))

    def _post(self, path: str, form: Form, key: str) -> dict[str, Any]:
        match path.strip("/").split("/")[1:]:
            case ["payment_intents"]:
                return self._create(form, key)
            case ["payment_intents", id_, "capture" | "cancel" | "increment_authorization" as what]:
                intent = self.intents.get(id_)
                if intent is None:
                    raise Refused(404, "invalid_request_error", code="resource_missing")
                _check(form, what)
                return {
                    "capture": self._capture,
                    "cancel": self._cancel,
                    "increment_authorization": self._increment,
                }[what](intent, form, key)
            case ["refunds"]:
                return self._refund(form, key)
            case ["setup_intents"]:
                return self._setup(form, key)
            case ["setup_intents", id_, "cancel"] if id_ in self.setups:
                return self._cancel_setup(self.setups[id_])
            case _:
                raise Refused(404, "invalid_request_error", saved=False)

    def _get(self, request: web.Request) -> dict[str, Any]:
        match request.path.strip("/").split("/")[1:]:
            case ["payment_intents", "search"]:
                name, value = request.query["query"].removeprefix("metadata['").split("']:'")
                found = [
                    intent
                    for intent in self.intents.values()
                    if self.searchable and intent["metadata"].get(name) == value.removesuffix("'")
                ]
                return {"object": "search_result", "data": found, "has_more": False}
            case ["payment_intents", id_] if id_ in self.intents:
                return self.intents[id_]
            case ["setup_intents", id_] if id_ in self.setups:
                return self.setups[id_]
            case ["refunds"]:
                return self._list_refunds(request)
            case _:
                raise Refused(404, "invalid_request_error", code="resource_missing", saved=False)

    def _list_refunds(self, request: web.Request) -> dict[str, Any]:
        """The newest first, a page of at most two, so that pages are turned."""
        listed = [
            refund
            for refund in reversed(self.refunds.values())
            if refund["payment_intent"] == request.query["payment_intent"]
        ]
        after = request.query.get("starting_after")
        if after is not None:
            listed = listed[[refund["id"] for refund in listed].index(after) + 1 :]
        return {"object": "list", "data": listed[:2], "has_more": len(listed) > 2}

    # --- objects ---

    def _create(self, form: Form, key: str) -> dict[str, Any]:
        _check(form, "create")
        amount = _integer(form, "amount")
        if not 0 < amount < 10**12 or form.get("confirm") != "true":
            raise _invalid("amount")
        token = self._payment_method(form)
        intent: dict[str, Any] = {
            "id": f"pi_{next(self._numbers)}",
            "object": "payment_intent",
            "livemode": False,
            "amount": amount,
            "amount_capturable": 0,
            "amount_received": 0,
            "currency": form["currency"],
            "capture_method": form["capture_method"],
            "status": "requires_payment_method",
            "cancellation_reason": None,
            "last_payment_error": None,
            "next_action": None,
            "metadata": _metadata(form),
            "latest_charge": None,
            "multicapture": "payment_method_options[card][request_multicapture]" in form,
            "token": token,
        }
        self.intents[intent["id"]] = intent
        type_ = form.get("payment_method_types[]", "card")
        if type_ != "card":
            self._pay_elsewhere(intent, type_, form)
            return intent
        self._decline(intent, token, DECLINE_TOKEN)
        if token == ACTION_TOKEN:
            if form.get("error_on_requires_action") == "true":
                intent["last_payment_error"] = {"code": "authentication_required"}
                raise _card_error("authentication_required", intent, code="authentication_required")
            intent["status"] = "requires_action"
            url = "https://hooks.stripe.com/redirect"
            intent["next_action"] = {"redirect_to_url": {"url": url}}
            return intent
        self._authorized(intent, key)
        return intent

    def _payment_method(self, form: Form) -> str:
        """The token or PaymentMethod, which may be used with the Customer alone that it is attached
        to: "the payment method you provided is attached to a customer so for security purposes you
        must provide the customer in the request".
        """
        customer, stored = form.get("customer"), form.get("payment_method", "")
        if stored and customer != self.attached.get(stored, customer):
            raise _invalid("customer")
        return form.get("payment_method_data[card][token]") or stored

    def _pay_elsewhere(self, intent: dict[str, Any], type_: str, form: Form) -> None:
        """A method other than cards, by its guide: captured at once, in its currencies."""
        if form["capture_method"] != "automatic":
            raise _invalid("capture_method")
        if type_ == "sepa_debit":
            if form["currency"] != "eur" or "mandate_data[customer_acceptance][type]" not in form:
                raise _invalid("mandate_data")
            intent["status"] = "processing"
            return
        currencies, needed = _REDIRECTS[type_]
        if form.get("payment_method_data[type]") != type_ or form["currency"] not in currencies:
            raise _invalid("payment_method_types")
        if needed and f"payment_method_data[billing_details][{needed}]" not in form:
            raise _invalid("payment_method_data")
        intent["status"] = "requires_action"
        if type_ == "pix":
            intent["next_action"] = {
                "type": "pix_display_qr_code",
                "pix_display_qr_code": {
                    "data": "00020101021226890014br.gov.bcb.pix",
                    "expires_at": PIX_EXPIRES_AT,
                    "hosted_instructions_url": "https://payments.stripe.com/pix/instructions",
                    "image_url_png": "https://qr.stripe.com/pix.png",
                    "image_url_svg": "https://qr.stripe.com/pix.svg",
                },
            }
        elif "return_url" in form:
            url = f"https://hooks.stripe.com/redirect/authenticate/{intent['id']}"
            intent["next_action"] = {"type": "redirect_to_url", "redirect_to_url": {"url": url}}
        else:
            raise _invalid("return_url")

    def customer_pays(self, intent: dict[str, Any]) -> None:
        """The customer did what had to be done, and the bank paid."""
        assert intent["status"] in ("requires_action", "processing")
        intent["next_action"] = None
        self._authorized(intent, intent["metadata"]["gateway_reference"])

    def customer_fails(self, intent: dict[str, Any]) -> None:
        """The customer did not go through with it, or the bank refused."""
        intent |= {
            "status": "requires_payment_method",
            "next_action": None,
            "last_payment_error": {
                "type": "invalid_request_error",
                "code": "payment_method_provider_decline",
                "message": "The payment was declined by the provider.",
            },
        }

    def _authorized(self, intent: dict[str, Any], key: str) -> None:
        amount = intent["amount"]
        self.effects.append(key)
        intent["latest_charge"] = {
            "id": f"ch_{next(self._numbers)}",
            "object": "charge",
            "payment_method_details": {
                "card": {
                    "brand": "visa",
                    "checks": {
                        "address_line1_check": "pass",
                        "address_postal_code_check": "unchecked",
                        "cvc_check": "pass",
                    },
                    "network_transaction_id": "nti_1",
                    "authorization_code": "123456",
                    "capture_before": 1_900_000_000,
                }
            },
        }
        if intent["capture_method"] == "manual":
            intent |= {"status": "requires_capture", "amount_capturable": amount}
        else:
            intent |= {"status": "succeeded", "amount_received": amount}

    def _capture(self, intent: dict[str, Any], form: Form, key: str) -> dict[str, Any]:
        final = form.get("final_capture", "true") == "true"
        if intent["status"] != "requires_capture":
            raise _unexpected(intent)
        amount = _integer(form, "amount_to_capture")
        if not 0 < amount <= intent["amount_capturable"] or (
            not final and not intent["multicapture"]
        ):
            raise _invalid("amount_to_capture")
        self._decline(intent, intent["token"], FOLLOW_UP_DECLINE_TOKEN)
        _change_metadata(intent, form)
        self.effects.append(key)
        intent["amount_received"] += amount
        intent["amount_capturable"] = 0 if final else intent["amount_capturable"] - amount
        if not intent["amount_capturable"]:
            intent["status"] = "succeeded"
        return intent

    def _cancel(self, intent: dict[str, Any], form: Form, key: str) -> dict[str, Any]:
        if intent["status"] in ("succeeded", "canceled", "processing"):
            raise _unexpected(intent)
        reference, *_ = OUR_REFERENCE.findall(key) or [key]
        self.effects.append(reference)
        # "Uncaptured PaymentIntents transition to canceled, while partially captured PaymentIntents
        # transition to succeeded" (Multicapture).
        status = "succeeded" if intent["amount_received"] else "canceled"
        intent |= {"status": status, "amount_capturable": 0}
        return intent

    def _increment(self, intent: dict[str, Any], form: Form, key: str) -> dict[str, Any]:
        if intent["status"] != "requires_capture" or intent["amount_received"]:
            raise _unexpected(intent)
        amount = _integer(form, "amount")
        if amount <= intent["amount"]:
            raise _invalid("amount")
        self._decline(intent, intent["token"], FOLLOW_UP_DECLINE_TOKEN)
        _change_metadata(intent, form)
        self.effects.append(key)
        intent |= {"amount": amount, "amount_capturable": amount}
        return intent

    def _refund(self, form: Form, key: str) -> dict[str, Any]:
        _check(form, "refund")
        intent = self.intents.get(form.get("payment_intent", ""))
        if intent is None:
            raise Refused(404, "invalid_request_error", code="resource_missing")
        left = intent["amount_received"] - self.refunded(intent["id"])
        amount = _integer(form, "amount") if "amount" in form else left
        if not left:
            raise Refused(400, "invalid_request_error", code="charge_already_refunded")
        if not 0 < amount <= left:
            raise _invalid("amount")
        self.effects.append(key)
        refund = {
            "id": f"re_{next(self._numbers)}",
            "object": "refund",
            "status": "succeeded",
            "amount": amount,
            "currency": intent["currency"],
            "payment_intent": intent["id"],
            "metadata": _metadata(form),
        }
        self.refunds[refund["id"]] = refund
        # "Whether the charge has been fully refunded" (Charges).
        intent["latest_charge"]["refunded"] = amount == left
        return refund

    def _setup(self, form: Form, key: str) -> dict[str, Any]:
        _check(form, "setup")
        setup: dict[str, Any] = {
            "id": f"seti_{next(self._numbers)}",
            "object": "setup_intent",
            "livemode": False,
            "status": "requires_payment_method",
            "last_setup_error": None,
            "next_action": None,
            "metadata": _metadata(form),
        }
        self.setups[setup["id"]] = setup
        if form.get("confirm") != "true":
            return setup
        token = self._payment_method(form)
        if token.startswith(DECLINE_TOKEN):
            code = token.removeprefix(DECLINE_TOKEN)
            setup["last_setup_error"] = {"code": "card_declined", "decline_code": code}
            raise Refused(
                402, "card_error", code="card_declined", decline_code=code, setup_intent=setup
            )
        if token == ACTION_TOKEN and "return_url" in form:
            setup["status"] = "requires_action"
            url = "https://hooks.stripe.com/redirect"
            setup["next_action"] = {"redirect_to_url": {"url": url}}
            return setup
        self.effects.append(key)
        setup["status"] = "succeeded"
        return setup

    def _cancel_setup(self, setup: dict[str, Any]) -> dict[str, Any]:
        if setup["status"] in ("succeeded", "canceled"):
            code = "setup_intent_unexpected_state"
            raise Refused(400, "invalid_request_error", code=code, setup_intent=dict(setup))
        setup["status"] = "canceled"
        return setup

    def _decline(self, intent: dict[str, Any], token: str, prefix: str) -> None:
        if not token.startswith(prefix):
            return
        error = _card_error(token.removeprefix(prefix), intent)
        if intent["status"] == "requires_payment_method":
            intent["last_payment_error"] = {
                name: value
                for name, value in error.body["error"].items()
                if name != "payment_intent"
            }
        raise error

    def refunded(self, intent_id: str) -> int:
        """What was refunded of a PaymentIntent."""
        return sum(
            refund["amount"]
            for refund in self.refunds.values()
            if refund["payment_intent"] == intent_id
        )


async def _form(request: web.Request) -> Form:
    return dict((await request.post()).items())  # type: ignore[arg-type]


def _json(status: int, body: object, *, replayed: bool = False) -> web.Response:
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return web.json_response(body, status=status, headers=headers)


def _invalid(param: str) -> Refused:
    return Refused(400, "invalid_request_error", code="parameter_invalid", param=param, saved=False)


def _unexpected(intent: dict[str, Any]) -> Refused:
    code = "payment_intent_unexpected_state"
    return Refused(400, "invalid_request_error", code=code, payment_intent=dict(intent))


def _card_error(decline_code: str, intent: dict[str, Any], code: str = "card_declined") -> Refused:
    if decline_code == AUTHENTICATION_FAILURE:
        about = {name: intent[name] for name in ("id", "object", "status")}
        return Refused(402, "invalid_request_error", code=decline_code, payment_intent=about)
    advice = {"lost_card": "do_not_try_again", "insufficient_funds": "try_again_later"}
    return Refused(
        402,
        "card_error",
        code=code,
        decline_code=decline_code,
        advice_code=advice.get(decline_code, "confirm_card_data"),
        network_decline_code="51",
        payment_method={"card": {"brand": "visa"}},
        payment_intent={name: intent[name] for name in ("id", "object", "status")},
    )


def _check(form: Form, what: str) -> None:
    for name in form:
        if name not in _ALLOWED[what] and not name.startswith("metadata["):
            raise Refused(
                400, "invalid_request_error", code="parameter_unknown", param=name, saved=False
            )


def _integer(form: Form, name: str) -> int:
    try:
        return int(form[name])
    except (KeyError, ValueError):
        raise _invalid(name) from None


def _metadata(form: Form) -> dict[str, str]:
    found = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in form.items()
        if name.startswith("metadata[")
    }
    if len(found) > _METADATA_KEYS_MAX or any(
        len(name) > 40 or len(value) > 500 for name, value in found.items()
    ):
        raise _invalid("metadata")
    return found


def _change_metadata(intent: dict[str, Any], form: Form) -> None:
    merged = intent["metadata"] | _metadata(form)
    if len(merged) > _METADATA_KEYS_MAX:
        raise _invalid("metadata")
    intent["metadata"] = merged


class StripePsp(DoublePsp[StripeDouble]):
    """Stripe's double."""

    declines: Mapping[str, ResponseCode] = {
        **{f"{DECLINE_TOKEN}{code}": unified for code, unified in DECLINE_CODES.items()},
        f"{DECLINE_TOKEN}a_new_one": ResponseCode.DECLINED_OTHER,
    }
    follow_up_decline: Mapping[OperationKind, str] = dict.fromkeys(
        (OperationKind.CAPTURE, OperationKind.INCREMENT), f"{FOLLOW_UP_DECLINE_TOKEN}do_not_honor"
    )
    inexpressible: tuple[tuple[int, str], ...] = (
        (1005, "KWD"),
        (150, "MGA"),
        (1000, "CLF"),
        (10**12, "EUR"),
        (10**10, "ISK"),
    )
    currencies: tuple[str, ...] = ("JPY", "EUR", "KWD", "ISK", "UGX", "MGA", "HUF", "TWD")

    def connect(self, answer_timeout_s: float, **more: Any) -> StripeConnector:
        values: dict[str, Any] = {
            "secret_key": SECRET_KEY,
            "search_lag_s": 0.0,
            "repeat_pause_s": 0.0,
        } | more
        capabilities = widest(Mode.TEST, answer_timeout_s)
        return StripeConnector(self.client(), capabilities=capabilities, **values)

    async def held_minor(self, reference: str) -> int:
        return sum(
            intent["amount_capturable"] + intent["amount_received"] - self.double.refunded(id_)
            for id_, intent in self.double.intents.items()
            if intent["metadata"].get("gateway_reference") == reference
        )

    def report_more(self, told: dict[str, Any]) -> None:
        told["amount_capturable"] += 1

    def report_in_another_currency(self, told: dict[str, Any]) -> None:
        told["currency"] = "usd"


def stripe_psp() -> AbstractAsyncContextManager[StripePsp]:
    """Stripe's double, the way to it, and a connector."""
    return running(StripePsp, StripeDouble())
