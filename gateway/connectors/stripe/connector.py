"""The connector to one Stripe account: PaymentIntents, SetupIntents and Refunds.

Source of the rules: Stripe's API reference and guides, named where a rule is used.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode
from uuid import uuid4

from gateway.application.notifications import LookupUnavailable
from gateway.application.ports import (
    CARD,
    NETWORK_TOKEN,
    Capabilities,
    ConnectorRequest,
    MethodRule,
)
from gateway.connectors.base import (
    MOTO_CHANNELS,
    REPEAT_PAUSE_S,
    Call,
    HttpConnector,
    Unusable,
    asking_first,
    doubt,
    in_steps,
    not_sent,
    sendable,
    target_of,
)
from gateway.connectors.http import FORM, HttpClient, MaybeSent, NotSent, Response
from gateway.connectors.repeats import age_s, is_remembered, of_several
from gateway.connectors.stripe import answers
from gateway.connectors.stripe.amounts import RULES, to_stripe
from gateway.connectors.stripe.answers import REFERENCE, TOMBSTONE, StripeError
from gateway.connectors.three_ds import authentication_of
from gateway.connectors.values import part
from gateway.domain.errors import Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Mode,
    OperationKind,
    Verdict,
)

API_VERSION: Final = "2025-10-29.clover"
ANSWER_TIMEOUT_S: Final = 30.0
KEY_VALIDITY_S: Final = 24 * 3600.0
"""Keys may be removed once they are at least 24 hours old ("Idempotent requests")."""
SEARCH_LAG_S: Final = 300.0
"""Searches find what is younger than a minute, and longer in an outage, not for sure ("Search")."""
PAGE_LENGTH: Final = 100
PAGES_MAX: Final = 10
"""Pages of a payment's refunds that are looked through."""
NAME: Final = "stripe"

K = OperationKind

SUPPORTED_FIELDS: Final = frozenset(
    {
        "payment_method.stored",
        "payment_method.network_token",
        "payment_method.redirect",
        "channel",
        "three_ds",
        "return_url",
        "statement_descriptor_suffix",
    }
)
_SEPA_DEBIT: Final = "sepa_debit"
_AT_ONCE: Final = frozenset({CaptureMethod.AUTOMATIC})
_EUR: Final = frozenset({"EUR"})
METHODS: Final[Mapping[str, MethodRule]] = {
    CARD: MethodRule(),
    NETWORK_TOKEN: MethodRule(),
    "bancontact": MethodRule(_AT_ONCE, _EUR, frozenset({"BE"}), frozenset({"customer_name"})),
    "eps": MethodRule(_AT_ONCE, _EUR, frozenset({"AT"}), frozenset({"customer_name"})),
    "ideal": MethodRule(_AT_ONCE, _EUR, frozenset({"NL"})),
    "p24": MethodRule(
        _AT_ONCE, frozenset({"EUR", "PLN"}), frozenset({"PL"}), frozenset({"customer_email"})
    ),
    "pix": MethodRule(_AT_ONCE, frozenset({"BRL"}), frozenset({"BR"})),
    _SEPA_DEBIT: MethodRule(_AT_ONCE, _EUR),
}
"""By the guide of each method ("Payment methods"): none but cards is captured later."""
_WITH_BANK: Final = frozenset({"eps", "ideal", "p24"})
"""Methods that take the customer's bank."""
_STORED: Final = re.compile(r"(?:(cus_[A-Za-z0-9_]+)/)?(pm_[A-Za-z0-9_]+)")
"""A PaymentMethod, behind the Customer that it is attached to."""


def widest(mode: Mode, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> Capabilities:
    """The most that an account can do."""
    return Capabilities(
        mode=mode,
        idempotent_by_reference=True,
        key_validity_s=KEY_VALIDITY_S,
        query_by_reference=True,
        cancel_by_reference=True,
        answer_timeout_s=answer_timeout_s,
        supported_fields=SUPPORTED_FIELDS,
        amounts=RULES,
        methods=METHODS,
    )


@dataclass(frozen=True, slots=True)
class _Call(Call):
    total: int | None = None
    """Of an increment: what the PaymentIntent is to have afterwards, in Stripe's unit."""


class StripeConnector(HttpConnector):
    """PaymentIntents, SetupIntents and Refunds of one account.

    The idempotency key of a request is its reference, but of a void (`_key`). What makes an outcome
    definite:

    - An answer with status 200 or 402, or a refusal of the first sending.
    - A repeat of the same request with the same key within the key's validity: Stripe answers with
      what it answered first. The sender repeats once, where the answer was lost or is a conflict
      (409), a limit (429) or an error of Stripe's (5xx), within its send window.
    - The PaymentIntent itself: captures and increments leave their reference in its metadata, and
      objects are read as they are, which searches are not.
    - An occupied key. Stripe refuses a key that comes again with another request, so a request that
      does nothing, sent under the reference, either proves that Stripe never executed the reference
      and will not while the key is valid, or that it did; then the repeat tells what came of it.
    """

    def __init__(
        self,
        http: HttpClient,
        secret_key: str,
        capabilities: Capabilities,
        *,
        stripe_account: str = "",
        search_lag_s: float = SEARCH_LAG_S,
        repeat_pause_s: float = REPEAT_PAUSE_S,
    ) -> None:
        """`http` is the caller's to close; `stripe_account` is a connected account's id."""
        headers = {"Authorization": f"Bearer {secret_key}", "Stripe-Version": API_VERSION}
        if stripe_account:
            headers["Stripe-Account"] = stripe_account
        super().__init__(
            NAME, http, capabilities, headers, repeat_pause_s=repeat_pause_s, content_type=FORM
        )
        self._search_lag_s = search_lag_s

    # --- send -------------------------------------------------------------------------------------

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Raises NotSent and MaybeSent."""
        if request.kind is K.REVERSAL:
            return await self._reverse(request, send_before)
        call = await self._prepare(request, send_before)
        if isinstance(call, ConnectorAnswer):
            return call
        sendings = limited = 0

        async def post(send_before: float, answer_before: float) -> Response:
            nonlocal sendings, limited
            sendings += 1
            try:
                response = await self._post(call, _key(request), send_before, answer_before)
            except NotSent:
                sendings -= 1
                raise
            limited += _is_rate_limited(response)
            return response

        response, repeated = await self._request_and_repeat(
            post,
            send_before,
            is_uncertain=_is_uncertain,
            # Stripe may say that a repeat is of no use ("Advanced error handling").
            may_repeat=lambda answer: answer.headers.get("stripe-should-retry") != "false",
        )
        if limited == sendings:
            raise NotSent(Reason.CONNECTOR_RATE_LIMITED)
        return self._answer(request, call, response, repeated=repeated and not limited)

    async def _prepare(
        self, request: ConnectorRequest, send_before: float
    ) -> _Call | ConnectorAnswer:
        """What to send; an answer, where that is known to be done. Raises NotSent."""
        if request.kind is K.INCREMENT:
            return await self._prepare_increment(request, send_before)
        return self._call(request)

    async def _prepare_increment(
        self, request: ConnectorRequest, send_before: float
    ) -> _Call | ConnectorAnswer:
        """Stripe takes the new total: ask for the present one. An answer, where it has been raised
        by this reference already.
        """
        with asking_first():
            intent = await self._intent(_id(request), send_before)
        done = answers.increment(intent, request.reference)
        if done is not None:
            return done
        more = _amount(request)
        total = answers.amount_of(intent, "amount") + more
        form = {
            "amount": str(total),
            f"metadata[{request.reference}]": f"increment:{more}",
            "expand[]": "latest_charge",
        }
        target = f"/v1/payment_intents/{_id(request)}/increment_authorization"
        return _Call(target, _encode(form), total)

    def _call(self, request: ConnectorRequest) -> _Call:
        """Raises NotSent."""
        match request.kind:
            case K.AUTHORIZE:
                return _Call("/v1/payment_intents", _encode(self._authorization(request)))
            case K.VERIFY:
                return _Call("/v1/setup_intents", _encode(_verification(request)))
            case K.CAPTURE:
                target = f"/v1/payment_intents/{_id(request)}/capture"
                return _Call(target, _encode(self._capture(request)))
            case K.VOID:
                return _Call(f"/v1/payment_intents/{_id(request)}/cancel", b"")
            case K.REFUND:
                form = {
                    "payment_intent": _intent_id(request),
                    "amount": str(_amount(request)),
                    f"metadata[{REFERENCE}]": request.reference,
                }
                return _Call("/v1/refunds", _encode(form))
            case _:
                raise NotSent(Reason.OPERATION_NOT_SUPPORTED)

    def _authorization(self, request: ConnectorRequest) -> dict[str, str]:
        fields = request.fields
        form = {
            "amount": str(_amount(request)),
            "currency": request.currency.lower(),
            "confirm": "true",
            "capture_method": "automatic" if request.capture else "manual",
            **_payment_method(request),
            **_authentication(request),
            f"metadata[{REFERENCE}]": request.reference,
            "metadata[gateway_payment_id]": request.payment_id,
            "expand[]": "latest_charge",
        }
        suffix = fields.get("statement_descriptor_suffix")
        if suffix:
            form["statement_descriptor_suffix"] = str(suffix)
        if fields.get("channel") in MOTO_CHANNELS:
            form["payment_method_options[card][moto]"] = "true"
        if fields.get("return_url"):
            form["return_url"] = str(fields["return_url"])
        else:
            # Without a way back nobody could act; it is declined instead.
            form["error_on_requires_action"] = "true"
        if not request.capture:
            if CaptureMethod.MANUAL_MULTIPLE in self._capabilities.capture_methods:
                form["payment_method_options[card][request_multicapture]"] = "if_available"
            if K.INCREMENT in self._capabilities.operations:
                form["payment_method_options[card][request_incremental_authorization]"] = (
                    "if_available"
                )
        return form

    def _capture(self, request: ConnectorRequest) -> dict[str, str]:
        amount = _amount(request)
        form = {
            "amount_to_capture": str(amount),
            f"metadata[{request.reference}]": f"capture:{amount}",
            "expand[]": "latest_charge",
        }
        if not request.final:
            # Only where several captures are available; without it every capture is the last.
            form["final_capture"] = "false"
        return form

    def _answer(
        self, request: ConnectorRequest, call: _Call, response: Response, *, repeated: bool
    ) -> ConnectorAnswer:
        """What an answer says of a request. Raises Unusable."""
        if response.status == 200:
            answer = self._done(request, call, answers.read(response))
            if answer.currency not in ("", request.currency):
                raise Unusable
            return answer
        error = answers.read_error(response)
        if error.status == 402 and error.type in _DECLINES:
            object_ = error.payment_intent or part(error.told, "setup_intent")
            return answers.declined(error.told, str(object_.get("id", "")))
        if error.status not in (400, 401, 403, 404) or error.type == "idempotency_error":
            raise Unusable
        if request.kind is K.VOID and (done := answers.void(error.payment_intent)) is not None:
            return done  # whichever sending did it
        if repeated and response.headers.get("idempotent-replayed") != "true":
            # It refuses this sending, and tells nothing of the one before.
            raise Unusable
        if not error.type:
            raise Unusable  # not Stripe's: a proxy's, perhaps
        return answers.rejected(error)

    def _done(
        self, request: ConnectorRequest, call: _Call, told: Mapping[str, Any]
    ) -> ConnectorAnswer:
        """What an object says that Stripe answered a request with. Raises Unusable."""
        answer: ConnectorAnswer | None
        self._check(told, _OBJECTS[request.kind])
        if request.kind in _OF_AN_INTENT:
            if told.get("id") != request.target_transaction_id:
                raise Unusable
        elif part(told, "metadata").get(REFERENCE) != request.reference:
            raise Unusable
        match request.kind:
            case K.AUTHORIZE:
                answer = answers.authorization(told, captured=request.capture)
            case K.VERIFY:
                answer = answers.verification(told)
            case K.CAPTURE:
                answer = answers.capture(told, request.reference)
            case K.INCREMENT:
                answer = answers.increment(told, request.reference, call.total)
            case K.VOID:
                answer = answers.void(told)
            case _:
                answer = answers.refund(told)
        if answer is None:
            raise Unusable
        return answer

    # --- query ------------------------------------------------------------------------------------

    async def _query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        """An authorization whose PaymentIntent is not known is searched for. A search may miss what
        is young: until the reference is SEARCH_LAG_S old, not found is no answer.
        """
        if kind is K.AUTHORIZE:
            return await self._query_authorization(reference, request)
        if request is not None and request.target_transaction_id:
            return await self._query_known(kind, reference, request)
        # A verification moves no money: `cancel` tells what came of it.
        return None if kind is K.VERIFY else doubt()

    async def _query_known(
        self, kind: OperationKind, reference: str, request: ConnectorRequest
    ) -> ConnectorAnswer | None:
        """By the objects that are acted on, which are read as they are."""
        match kind:
            case K.VERIFY:
                setup_intent = await self._get(f"/v1/setup_intents/{_id(request)}")
                self._check(setup_intent, "setup_intent", _id(request))
                return answers.verification(setup_intent)
            case K.REFUND:
                return await self._query_refund(reference, request)
            case K.CAPTURE:
                return answers.capture(await self._intent(_id(request)), reference)
            case K.INCREMENT:
                return answers.increment(await self._intent(_id(request)), reference)
            case K.VOID:
                return answers.void(await self._intent(_id(request)))
            case _:  # REVERSAL
                return answers.canceled(await self._intent(_id(request)))

    async def _query_authorization(
        self, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        captured = None if request is None else request.capture
        if request is not None and request.target_transaction_id:
            intent = await self._intent(_id(request))
            return answers.authorization(intent, captured=captured)
        found = await self._search(reference)
        told = of_several([answers.authorization(intent, captured=captured) for intent in found])
        if told is not None:
            return told
        age = age_s(reference)
        if age is not None and age < self._search_lag_s:
            return doubt(Reason.RECOVERED)
        return None

    async def _search(self, reference: str) -> list[Mapping[str, Any]]:
        """The PaymentIntents made with a reference, as far as the search knows them."""
        text = reference.replace("\\", "\\\\").replace("'", "\\'")
        query = urlencode(
            {
                "query": f"metadata['{REFERENCE}']:'{text}'",
                "expand[]": "data.latest_charge",
                "limit": str(PAGE_LENGTH),
            }
        )
        listed = (await self._get(f"/v1/payment_intents/search?{query}")).get("data")
        if not isinstance(listed, list):
            raise Unusable
        for intent in listed:
            self._check(intent, "payment_intent")
        return [intent for intent in listed if part(intent, "metadata").get(REFERENCE) == reference]

    async def _query_refund(
        self, reference: str, request: ConnectorRequest
    ) -> ConnectorAnswer | None:
        """By the list of the payment's refunds, which is read as it is."""
        query = {
            "payment_intent": _intent_id(request),
            "limit": str(PAGE_LENGTH),
        }
        for _ in range(PAGES_MAX):
            page = await self._get(f"/v1/refunds?{urlencode(query)}")
            listed = page.get("data")
            if not isinstance(listed, list):
                raise Unusable
            for told in listed:
                self._check(told, "refund")
                if part(told, "metadata").get(REFERENCE) == reference:
                    return answers.refund(told)
            if not page.get("has_more") or not listed:
                return None
            query["starting_after"] = str(listed[-1].get("id"))
        raise Unusable

    async def reference_of(self, connector_transaction_id: str) -> str | None:
        """See gateway.connectors.notifications.ReferenceTeller."""
        quoted_id = quote(connector_transaction_id, safe="")
        try:
            response = await self._request("GET", f"/v1/payment_intents/{quoted_id}")
            if response.status == 404 and answers.read_error(response).type:
                return None
            intent = answers.read(response)
            self._check(intent, "payment_intent", quoted_id)
        except (NotSent, MaybeSent):
            raise LookupUnavailable("Stripe does not tell now") from None
        reference = part(intent, "metadata").get(REFERENCE)
        return reference if isinstance(reference, str) else None

    # --- cancel -----------------------------------------------------------------------------------

    async def _cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer:
        """Past half of the key's validity nothing proves an absence, and of a void, whose keys are
        not the reference, never. A refund, a void and an increment cannot be taken back: where they
        took effect nothing is said here, and `query` tells it.
        """
        if request is not None and request.target_transaction_id and kind in _TO_BE_DROPPED:
            return await self._cancel_known(kind, _id(request), reference)
        if kind is not K.VOID and is_remembered(reference, KEY_VALIDITY_S):
            if await self._occupy(reference):
                return not_sent(Reason.REFERENCE_CANCELED)
            if request is not None:
                return await self._undo(request)
        return doubt(Reason.RECOVERED)

    async def _occupy(self, reference: str) -> bool:
        """Use up the key, by a SetupIntent without a payment method, which can do nothing.

        False: it was used before, by a request that Stripe executed. Raises Unusable where Stripe
        says neither.
        """
        form = {f"metadata[{TOMBSTONE}]": reference, "payment_method_types[]": "card"}
        response = await self._post(_Call("/v1/setup_intents", _encode(form)), reference)
        if response.status == 200:
            told = answers.read(response)
            self._check(told, "setup_intent")
            if part(told, "metadata").get(TOMBSTONE) != reference:
                raise Unusable
            return True
        error: StripeError = answers.read_error(response)
        if error.status == 400 and error.type == "idempotency_error":
            return False
        raise Unusable

    async def _undo(self, request: ConnectorRequest) -> ConnectorAnswer:
        """Take back what a reference caused whose key is used: the repeat tells what that was."""
        call = await self._prepare(request, self._in_time())
        if isinstance(call, ConnectorAnswer):
            return doubt(Reason.RECOVERED)
        response = await self._post(call, request.reference)
        if _is_uncertain(response) or response.headers.get("idempotent-replayed") != "true":
            raise Unusable
        answer = self._answer(request, call, response, repeated=True)
        if answer.verdict in (Verdict.DECLINED, Verdict.FAILED) or request.kind is K.VERIFY:
            return answer
        if request.kind is K.AUTHORIZE:
            intent = await self._intent(quote(answer.connector_transaction_id, safe=""))
            return await self._take_back(intent, request.reference)
        if request.kind is K.CAPTURE:
            amount = str(_amount(request))
            return await self._give_back(request.target_transaction_id, request.reference, amount)
        return doubt(Reason.RECOVERED)

    async def _reverse(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        with asking_first():
            intent = await self._intent(_id(request), send_before)
        with in_steps():
            answer = await self._take_back(intent, request.reference)
        if answer.verdict is Verdict.CANCELED:
            answer.verdict = Verdict.APPROVED
        return answer

    async def _take_back(self, intent: Mapping[str, Any], reference: str) -> ConnectorAnswer:
        """Nothing of a PaymentIntent stands afterwards. Raises NotSent, MaybeSent, Unusable."""
        intent_id = str(intent.get("id"))
        if intent.get("status") not in ("succeeded", "canceled"):
            quoted_id = quote(intent_id, safe="")
            response = await self._cancel_object(f"/v1/payment_intents/{quoted_id}")
            if response.status == 200:
                intent = answers.read(response)
            else:
                intent = answers.read_error(response).payment_intent
            self._check(intent, "payment_intent", quoted_id)
            if intent.get("status") not in ("succeeded", "canceled"):
                raise Unusable
        if answers.amount_of(intent, "amount_received"):
            return await self._give_back(intent_id, reference, "")
        return ConnectorAnswer(
            Delivery.ANSWERED, Verdict.CANCELED, connector_transaction_id=intent_id
        )

    async def _cancel_known(self, kind: K, id_: str, reference: str) -> ConnectorAnswer:
        """Take back a PaymentIntent; cancel a SetupIntent, or tell what it says instead. Raises as
        `_take_back`.
        """
        if kind is K.AUTHORIZE:
            return await self._take_back(await self._intent(id_), reference)
        response = await self._cancel_object(f"/v1/setup_intents/{id_}")
        if response.status == 200:
            told = answers.read(response)
        else:
            told = part(answers.read_error(response).told, "setup_intent")
        self._check(told, "setup_intent", id_)
        return answers.verification(told)

    async def _cancel_object(self, path: str) -> Response:
        """Without a key, and a second one does no harm: under a key Stripe would answer with the
        first refusal for a day, as of a payment that was being processed then.
        """
        return await self._post(_Call(f"{path}/cancel", b""), "")

    async def _give_back(self, intent_id: str, reference: str, amount: str) -> ConnectorAnswer:
        """Refund an amount in Stripe's unit, or what is left. Raises as `_take_back`.

        What is left has no key: a second refund of it does no harm, and under a key Stripe would
        answer with its first refusal or error for a day, as of a balance that was too low then. An
        amount would be refunded twice.
        """
        form = {"payment_intent": intent_id, f"metadata[{REFERENCE}]": f"{reference}-refund"}
        if amount:
            form["amount"] = amount
        response = await self._post(
            _Call("/v1/refunds", _encode(form)),
            f"{reference}-refund" if amount else "",
        )
        if response.status == 200:
            told = answers.read(response)
            self._check(told, "refund")
            if told.get("status") not in ("succeeded", "pending"):
                raise Unusable
        elif answers.read_error(response).code != "charge_already_refunded":
            raise Unusable
        return ConnectorAnswer(
            Delivery.ANSWERED, Verdict.CANCELED, connector_transaction_id=intent_id
        )

    # --- HTTP -------------------------------------------------------------------------------------

    async def _intent(
        self, quoted_id: str, answer_before: float | None = None
    ) -> Mapping[str, Any]:
        intent = await self._get(
            f"/v1/payment_intents/{quoted_id}?expand[]=latest_charge", answer_before=answer_before
        )
        self._check(intent, "payment_intent", quoted_id)
        return intent

    async def _get(self, target: str, *, answer_before: float | None = None) -> Mapping[str, Any]:
        """An object as it is now. Raises NotSent, MaybeSent, Unusable."""
        until = self._in_time()
        if answer_before is not None:
            until = min(until, answer_before)
        response = await self._request("GET", target, send_before=until, answer_before=until)
        return answers.read(response)

    def _check(self, told: object, object_: str, quoted_id: str = "") -> None:
        """Raises Unusable for another object than was asked for, of another id where one was named,
        or of the other mode.
        """
        live = self._capabilities.mode is Mode.LIVE
        if (
            not isinstance(told, dict)
            or told.get("object") != object_
            # A Refund does not say.
            or (object_ != "refund" and told.get("livemode") is not live)
            or (quoted_id and quote(str(told.get("id")), safe="") != quoted_id)
        ):
            raise Unusable


_DECLINES: Final = frozenset({"card_error", "invalid_request_error"})
"""Types of an error with status 402, "the parameters were valid but the request failed" ("Errors"):
of methods but cards it is the second, and Stripe's own SDKs go by the status alone."""
_TO_BE_DROPPED: Final = frozenset({K.AUTHORIZE, K.VERIFY})
_OF_AN_INTENT: Final = frozenset({K.CAPTURE, K.VOID, K.INCREMENT})
_OBJECTS: Final[Mapping[OperationKind, str]] = {
    K.AUTHORIZE: "payment_intent",
    K.CAPTURE: "payment_intent",
    K.VOID: "payment_intent",
    K.INCREMENT: "payment_intent",
    K.VERIFY: "setup_intent",
    K.REFUND: "refund",
}


def _is_uncertain(response: Response) -> bool:
    """Whether the request may or may not have been executed, now or by another one of its key."""
    return response.status in (409, 429) or response.status >= 500


def _is_rate_limited(response: Response) -> bool:
    """Whether the request was turned away before anything looked at it or its key: "rate limiters
    run before the API's idempotency layer" ("Advanced error handling"). The code `lock_timeout`,
    of the same status, comes later.
    """
    return response.status == 429 and answers.read_error(response).code == "rate_limit"


def _key(request: ConnectorRequest) -> str:
    """The idempotency key of one sending. A void has another one each time, since a second cancel
    does no harm, and Stripe would answer the same key with its first 500 for a day.
    """
    return f"{request.reference}-{uuid4().hex}" if request.kind is K.VOID else request.reference


def _encode(form: Mapping[str, str]) -> bytes:
    return urlencode(form).encode("ascii")


def _amount(request: ConnectorRequest) -> int:
    """In Stripe's unit. Raises NotSent."""
    return sendable(to_stripe(request.amount_minor, request.currency), request.currency, RULES)


def _id(request: ConnectorRequest) -> str:
    """The id that a request acts on, fit for a path. Raises NotSent."""
    return quote(target_of(request), safe="")


def _intent_id(refund: ConnectorRequest) -> str:
    """The PaymentIntent that a refund is of. What it acts on may be a capture from Stripe's
    Dashboard, which goes by its Charge.
    """
    return refund.payment_transaction_id or refund.target_transaction_id


def _payment_method(request: ConnectorRequest) -> dict[str, str]:
    """What the customer pays with. Raises NotSent."""
    method = request.fields.get("payment_method")
    if isinstance(method, dict):
        for name, form in (
            ("stored", _stored),
            ("network_token", _network_token),
            ("redirect", _redirect),
        ):
            told = method.get(name)
            if isinstance(told, dict):
                return form(told, request.secrets)
    if not request.payment_method_token:
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)
    return {
        "payment_method_types[]": "card",
        "payment_method_data[type]": "card",
        "payment_method_data[card][token]": request.payment_method_token,
    }


def _stored(told: Mapping[str, object], _: Mapping[str, str]) -> dict[str, str]:
    """A PaymentMethod by its id, and its Customer: Stripe takes one that is attached with its
    Customer alone. The merchant's own `customer_id` is none of Stripe's. Raises NotSent.
    """
    named = _STORED.fullmatch(str(told.get("stored_payment_method_id", "")))
    if named is None:
        raise NotSent(Reason.INVALID_REQUEST)
    type_ = str(told.get("method_type", CARD))
    form = {"payment_method_types[]": type_, "payment_method": named[2]}
    if named[1]:
        form["customer"] = named[1]
    if type_ == _SEPA_DEBIT:
        # The merchant has the customer's acceptance; the gateway did not see it online.
        form["mandate_data[customer_acceptance][type]"] = "offline"
    return form


def _network_token(told: Mapping[str, object], secrets: Mapping[str, str]) -> dict[str, str]:
    """Raises NotSent: what recovery repeats has no secrets."""
    if not secrets.get("number"):
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)
    form = {
        "payment_method_types[]": "card",
        "payment_method_data[type]": "card",
        "payment_method_data[card][network_token][number]": secrets["number"],
        "payment_method_data[card][network_token][exp_month]": str(told.get("expiry_month")),
        "payment_method_data[card][network_token][exp_year]": str(told.get("expiry_year")),
        "payment_method_options[card][network_token][cryptogram]": secrets["cryptogram"],
    }
    if told.get("eci"):
        indicator = "payment_method_options[card][network_token][electronic_commerce_indicator]"
        form[indicator] = str(told["eci"])
    return form


def _authentication(request: ConnectorRequest) -> dict[str, str]:
    """The result of 3-D Secure done elsewhere. Raises NotSent, for an exemption by itself too: what
    Stripe takes goes with a cryptogram, and is the one of risk analysis alone.
    """
    told = authentication_of(request)
    if told is None:
        return {}
    if not told.cavv or told.exemption not in ("", "TRANSACTION_RISK_ANALYSIS"):
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)
    form = {
        "cryptogram": told.cavv,
        "transaction_id": told.transaction_id,
        "version": told.version,
        "electronic_commerce_indicator": told.eci,
        "exemption_indicator": "low_risk" if told.exemption else "",
    }
    place = "payment_method_options[card][three_d_secure]"
    return {f"{place}[{name}]": value for name, value in form.items() if value}


def _redirect(told: Mapping[str, object], _: Mapping[str, str]) -> dict[str, str]:
    """Raises NotSent."""
    type_ = str(told.get("method_type"))
    if type_ not in METHODS:
        raise NotSent(Reason.METHOD_NOT_SUPPORTED)
    form = {"payment_method_types[]": type_, "payment_method_data[type]": type_}
    if told.get("bank") and type_ in _WITH_BANK:
        form[f"payment_method_data[{type_}][bank]"] = str(told["bank"])
    for name in ("name", "email"):
        if told.get(f"customer_{name}"):
            form[f"payment_method_data[billing_details][{name}]"] = str(told[f"customer_{name}"])
    return form


def _verification(request: ConnectorRequest) -> dict[str, str]:
    """Raises NotSent."""
    if request.fields.get("three_ds"):
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)
    form = {
        "confirm": "true",
        **_payment_method(request),
        f"metadata[{REFERENCE}]": request.reference,
        "metadata[gateway_payment_id]": request.payment_id,
    }
    if request.fields.get("return_url"):
        form["return_url"] = str(request.fields["return_url"])
    return form
