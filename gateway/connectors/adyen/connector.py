"""The connector to one Adyen merchant account: Checkout API v71.

Source of the rules: Adyen's API reference and documentation pages, named where a rule is used.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import orjson

from gateway.application.ports import CARD, Capabilities, ConnectorRequest, MethodRule
from gateway.connectors.adyen import answers
from gateway.connectors.adyen.amounts import RULES, to_adyen
from gateway.connectors.base import (
    MOTO_CHANNELS,
    REPEAT_PAUSE_S,
    Call,
    HttpConnector,
    Unusable,
    doubt,
    not_sent,
    sendable,
)
from gateway.connectors.http import HttpClient, NotSent
from gateway.connectors.repeats import is_remembered
from gateway.connectors.three_ds import Authentication, authentication_of
from gateway.domain.errors import Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Mode,
    OperationKind,
    Verdict,
)

API_VERSION: Final = "v71"
ANSWER_TIMEOUT_S: Final = 30.0
KEY_VALIDITY_S: Final = 7 * 24 * 3600.0
"""Keys are valid for at least 7 days ("API idempotency")."""
NAME: Final = "adyen"
NO_RETURN_URL: Final = "https://no-return.invalid/"
"""For the required `returnUrl` of who has none (RFC 2606 §2): nobody is ever sent there."""

SHOPPER_REFERENCE_LENGTH_MIN: Final = 3
"""Of `shopperReference`, in characters."""

TOMBSTONE_SUFFIX: Final = "-cancel"
"""Of the reference of a technical cancel, which uses up a key."""
REVERSAL_SUFFIX: Final = "-reversal"
"""Of the reference and key of a reversal of an authorization."""
REFUND_SUFFIX: Final = "-refund"
"""Of the reference and key of a refund that gives a capture back."""

K = OperationKind

SUPPORTED_FIELDS: Final = frozenset(
    {
        "payment_method.stored",
        "payment_method.redirect",
        "channel",
        "initiator",
        "stored_credential",
        "three_ds",
        "return_url",
        "statement_descriptor",
    }
)
METHODS: Final[Mapping[str, MethodRule]] = {
    CARD: MethodRule(),
    "ideal": MethodRule(
        frozenset({CaptureMethod.AUTOMATIC}),
        frozenset({"EUR"}),
        frozenset({"NL"}),
        needs_notifications=True,
    ),
}
"""Of the methods with a redirect, one whose payment is complete when the customer has paid at the
bank: of others, as of cards with 3D Secure, Adyen has to be told what the customer came back with
(`/payments/details`), which the contract does not carry."""
_STATUS_OF_ECI: Final = {"05": "Y", "02": "Y", "06": "A", "01": "A"}
"""The networks' indicators of an authentication that was done, and of one that was tried."""
_EXEMPTIONS: Final = {
    "LOW_VALUE": "lowValue",
    "TRANSACTION_RISK_ANALYSIS": "transactionRiskAnalysis",
    "TRUSTED_BENEFICIARY": "trustedBeneficiary",
    "SECURE_CORPORATE_PAYMENT": "secureCorporate",
}
_TOKEN_PREFIX: Final = "tok_"  # noqa: S105 - the contract's, before Adyen's id
_WITHOUT_EFFECT: Final = frozenset({Verdict.DECLINED, Verdict.CANCELED})
_ENDPOINTS: Final[Mapping[OperationKind, str]] = {
    K.CAPTURE: "captures",
    K.VOID: "cancels",
    K.REFUND: "refunds",
    K.INCREMENT: "amountUpdates",
    K.REVERSAL: "reversals",
}


def widest(mode: Mode, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> Capabilities:
    """The most that an account can do.

    Adyen takes several captures from accounts that it enabled for them, but does not release what
    the last one leaves: there is one capture.
    """
    return Capabilities(
        mode=mode,
        idempotent_by_reference=True,
        key_validity_s=KEY_VALIDITY_S,
        query_by_reference=True,
        cancel_by_reference=True,
        answer_timeout_s=answer_timeout_s,
        supported_fields=SUPPORTED_FIELDS,
        capture_methods=frozenset({CaptureMethod.AUTOMATIC, CaptureMethod.MANUAL}),
        tells_by_notification=True,
        amounts=RULES,
        methods=METHODS,
    )


class AdyenConnector(HttpConnector):
    """Payments and what follows them, of one merchant account.

    The idempotency key of a request is its reference, and so is the `reference` in it. What makes
    an outcome definite:

    - An answer to /payments, or a refusal of the first sending. What acts on a payment (captures,
      cancellations, refunds, new amounts) Adyen only receives: a notification tells the outcome.
    - A repeat of the same request with the same key within the key's validity. The sender repeats
      once within its send window, where the answer was lost or Adyen calls the error transient.
    - The key. Adyen cannot be asked by reference, but a key is used once in a company account: a
      technical cancel of the reference, sent under it, is either executed, and then nothing else
      was or will be under this key; or the first request was, and then its answer is answered.
    """

    def __init__(
        self,
        http: HttpClient,
        api_key: str,
        merchant_account: str,
        capabilities: Capabilities,
        *,
        base_path: str = f"/{API_VERSION}",
        repeat_pause_s: float = REPEAT_PAUSE_S,
    ) -> None:
        """`http` is the caller's to close; `base_path` is where the API begins there."""
        super().__init__(
            NAME, http, capabilities, {"X-API-Key": api_key}, repeat_pause_s=repeat_pause_s
        )
        self._merchant_account = merchant_account
        self._base_path = base_path

    # --- send -------------------------------------------------------------------------------------

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Raises NotSent and MaybeSent."""
        call = self._call(request)
        response, repeated = await self._request_and_repeat(
            lambda send_before, answer_before: self._post(
                call, request.reference, send_before, answer_before
            ),
            send_before,
            is_uncertain=answers.is_uncertain,
            may_repeat=answers.may_repeat,
        )
        if answers.is_done(response):
            return self._done(request, answers.read(response))
        if repeated or answers.is_uncertain(response):
            # It refuses this sending, and tells nothing of the one before.
            raise Unusable
        return answers.rejected(response)

    def _call(self, request: ConnectorRequest) -> Call:
        """Raises NotSent."""
        if request.kind in (K.AUTHORIZE, K.VERIFY):
            return self._to("/payments", self._payment(request))
        payment_id = _payment_id(request)
        if not payment_id:
            raise NotSent(Reason.INVALID_REQUEST)
        body: dict[str, Any] = {
            "merchantAccount": self._merchant_account,
            "reference": request.reference,
        }
        if request.kind in (K.CAPTURE, K.REFUND):
            body["amount"] = _amount(request.amount_minor, request.currency)
        elif request.kind is K.INCREMENT:
            # The new amount, not what it grows by ("Adjust an authorisation").
            total_minor = request.authorized_minor + request.amount_minor
            body["amount"] = _amount(total_minor, request.currency)
        path = f"/payments/{quote(payment_id, safe='')}/{_ENDPOINTS[request.kind]}"
        return self._to(path, body)

    def _to(self, path: str, body: Mapping[str, Any]) -> Call:
        return Call(self._base_path + path, orjson.dumps(body))

    def _payment(self, request: ConnectorRequest) -> dict[str, Any]:
        fields = request.fields
        body: dict[str, Any] = {
            "merchantAccount": self._merchant_account,
            "reference": request.reference,
            "amount": _amount(request.amount_minor, request.currency),
            "returnUrl": str(fields.get("return_url") or NO_RETURN_URL),
            **(_redirect_method(request) or _payment_method(request)),
        }
        if fields.get("statement_descriptor"):
            body["shopperStatement"] = str(fields["statement_descriptor"])
        more: dict[str, str] = {}
        if request.kind is K.AUTHORIZE and request.capture:
            body["captureDelayHours"] = 0
        elif request.kind is K.AUTHORIZE:
            # Whatever the merchant account's capture delay is ("Capture").
            more["manualCapture"] = "true"
            if K.INCREMENT in self._capabilities.operations:
                more["authorisationType"] = "PreAuth"
        stored = fields.get("stored_credential")
        network_id = stored.get("network_transaction_id") if isinstance(stored, dict) else None
        if network_id:
            more["networkTxReference"] = str(network_id)
        authentication = authentication_of(request)
        if authentication is not None:
            if authentication.cavv:
                body["mpiData"] = _mpi_data(authentication)
            if authentication.exemption:
                more["scaExemption"] = _exemption(authentication.exemption)
        if more:
            body["additionalData"] = more
        return body

    def _done(self, request: ConnectorRequest, told: Mapping[str, Any]) -> ConnectorAnswer:
        """What Adyen answered a request with. Raises Unusable."""
        if request.kind not in (K.AUTHORIZE, K.VERIFY):
            return answers.modification(
                told, request.reference, _payment_id(request), request.currency
            )
        can_act = bool(_redirect_method(request))
        answer = answers.payment(told, request.reference, can_act=can_act)
        if answer.currency not in ("", request.currency):
            raise Unusable
        return answer

    # --- query ------------------------------------------------------------------------------------

    async def _query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        """Asking uses the reference up, where it had no effect. Past half of the key's validity
        nothing is asked. A void or reversal is None within it: its own repeat tells.
        """
        if not is_remembered(reference, KEY_VALIDITY_S):
            return doubt(Reason.RECOVERED)
        if kind in (K.VOID, K.REVERSAL):
            return None
        return await self._ask(reference, request)

    async def _ask(self, reference: str, request: ConnectorRequest | None) -> ConnectorAnswer:
        """What was answered under a reference; NOT_SENT where nothing was, and never will be.

        Raises NotSent and MaybeSent.
        """
        tombstone = reference + TOMBSTONE_SUFFIX
        body = {
            "merchantAccount": self._merchant_account,
            "paymentReference": reference,
            "reference": tombstone,
        }
        response = await self._post(self._to("/cancels", body), reference)
        told = answers.read(response)
        if not answers.is_done(response):
            raise Unusable
        if told.get("reference") == tombstone:
            if told.get("status") != "received" or told.get("paymentReference") != reference:
                raise Unusable
            return not_sent(Reason.REFERENCE_CANCELED)
        if request is None:
            raise Unusable
        return self._done(request, told)

    # --- cancel -----------------------------------------------------------------------------------

    async def _cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer:
        """Of an authorization and a capture that took effect Adyen only says that it will take them
        back: PENDING. A refund and an increment cannot be taken back: where they took effect
        nothing is said here.
        """
        if kind is K.AUTHORIZE and request is not None and request.target_transaction_id:
            return await self._reverse(reference, request.target_transaction_id)
        if not is_remembered(reference, KEY_VALIDITY_S):
            return doubt(Reason.RECOVERED)
        found = await self._ask(reference, request)
        without_effect = found.delivery is Delivery.NOT_SENT or found.verdict in _WITHOUT_EFFECT
        if without_effect or kind is K.VERIFY:
            return found
        if kind is K.AUTHORIZE and found.connector_transaction_id:
            return await self._reverse(reference, found.connector_transaction_id)
        if kind is K.CAPTURE and request is not None:
            return await self._give_back(request)
        return doubt(Reason.RECOVERED)

    async def _reverse(self, reference: str, payment_id: str) -> ConnectorAnswer:
        """Cancel or refund a payment, whichever it needs, as a whole. Raises as `_ask`."""
        return await self._modify(payment_id, "reversals", reference + REVERSAL_SUFFIX, {})

    async def _give_back(self, capture: ConnectorRequest) -> ConnectorAnswer:
        """Refund what a capture took. Raises as `_ask`."""
        amount = _amount(capture.amount_minor, capture.currency)
        return await self._modify(
            _payment_id(capture),
            "refunds",
            capture.reference + REFUND_SUFFIX,
            {"amount": amount},
            capture.currency,
        )

    async def _modify(
        self,
        payment_id: str,
        endpoint: str,
        key: str,
        more: Mapping[str, object],
        currency: str = "",
    ) -> ConnectorAnswer:
        body = {"merchantAccount": self._merchant_account, "reference": key, **more}
        call = self._to(f"/payments/{quote(payment_id, safe='')}/{endpoint}", body)
        response = await self._post(call, key)
        if not answers.is_done(response):
            raise Unusable
        return answers.modification(answers.read(response), key, payment_id, currency)


def _amount(amount_minor: int, currency: str) -> dict[str, object]:
    """In Adyen's unit. Raises NotSent."""
    value = sendable(to_adyen(amount_minor, currency), currency, RULES)
    return {"currency": currency, "value": value}


def _mpi_data(authentication: Authentication) -> dict[str, str]:
    """The proof of an authentication done elsewhere ("Authenticate using a third-party provider").

    Raises NotSent where the indicator does not say that one was done or tried.
    """
    status = _STATUS_OF_ECI.get(authentication.eci)
    if status is None:
        raise NotSent(Reason.INVALID_REQUEST)
    return {
        "cavv": authentication.cavv,
        "dsTransID": authentication.transaction_id,
        "eci": authentication.eci,
        "threeDSVersion": authentication.version,
        "directoryResponse": status,
    }


def _exemption(name: str) -> str:
    """Raises NotSent for one that Adyen has not."""
    try:
        return _EXEMPTIONS[name]
    except KeyError:
        raise NotSent(Reason.FIELD_NOT_SUPPORTED) from None


def _payment_id(request: ConnectorRequest) -> str:
    """Adyen's id of the payment that a request acts on: never that of a capture."""
    return request.payment_transaction_id or request.target_transaction_id


def _redirect_method(request: ConnectorRequest) -> dict[str, Any]:
    """A method that the customer is sent elsewhere for; empty for a card. Raises NotSent."""
    method = request.fields.get("payment_method")
    redirect = method.get("redirect") if isinstance(method, dict) else None
    if not isinstance(redirect, dict):
        return {}
    type_ = str(redirect.get("method_type"))
    if type_ == CARD or type_ not in METHODS:
        raise NotSent(Reason.METHOD_NOT_SUPPORTED)
    told = {"type": type_}
    if redirect.get("bank"):
        told["issuer"] = str(redirect["bank"])
    return {"paymentMethod": told, "shopperInteraction": "Ecommerce"}


def _payment_method(request: ConnectorRequest) -> dict[str, Any]:
    """A token of Adyen's and whose it is: tokens belong to a customer ("Tokenization").

    Raises NotSent.
    """
    method = request.fields.get("payment_method")
    stored = method.get("stored") if isinstance(method, dict) else None
    if isinstance(stored, dict):
        token = str(stored.get("stored_payment_method_id", ""))
    else:
        token = request.payment_method_token.removeprefix(_TOKEN_PREFIX)
    customer_id = str(request.fields.get("customer_id", ""))
    if not token:
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)
    if len(customer_id) < SHOPPER_REFERENCE_LENGTH_MIN:
        raise NotSent(Reason.INVALID_REQUEST)
    channel = request.fields.get("channel")
    return {
        "paymentMethod": {"type": "scheme", "storedPaymentMethodId": token},
        "shopperReference": customer_id,
        "shopperInteraction": "Moto" if channel in MOTO_CHANNELS else "ContAuth",
        "recurringProcessingModel": _processing_model(request.fields),
    }


def _processing_model(fields: Mapping[str, object]) -> str:
    """Who pays again, and how regularly: required of a token ("Tokenization")."""
    if fields.get("initiator") != "INITIATOR_MERCHANT":
        return "CardOnFile"
    stored = fields.get("stored_credential")
    category = stored.get("mit_category") if isinstance(stored, dict) else None
    regular = category in ("MIT_CATEGORY_RECURRING", "MIT_CATEGORY_INSTALLMENT")
    return "Subscription" if regular else "UnscheduledCardOnFile"
