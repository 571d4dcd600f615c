"""What Adyen's answers and errors say, in the gateway's words. Pure.

Sources: Adyen's API reference (Checkout v71), "Payment result codes", "HTTP status codes", "API
idempotency".
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from gateway.connectors import schemes, values
from gateway.connectors.adyen import amounts, codes
from gateway.connectors.base import Unusable
from gateway.connectors.http import Response
from gateway.connectors.values import part
from gateway.domain.model import (
    AvsResult,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    NextAction,
    Outcome,
    ResponseCode,
    Verdict,
)

IN_PROGRESS: Final = "704"
"""The error code of a request whose key is being used, or was."""

_REFUSING: Final = frozenset({400, 401, 403, 404, 405, 413, 422})
_REFUSING_TYPES: Final = frozenset({"configuration", "security", "validation"})
# "05 : Do not honor": the network's code, and its text.
_RAW_CODE: Final = re.compile(r"([0-9A-Z]{1,3})\s*:")


def read(response: Response) -> Mapping[str, Any]:
    """The object of an answer; empty where it is none."""
    return values.json_object(response.body)


def is_done(response: Response) -> bool:
    """Whether Adyen answered what was asked for; what came of it is in the object."""
    return response.status in (200, 201)


def is_uncertain(response: Response) -> bool:
    """Whether the request may or may not have been executed, now or by another one of its key."""
    return (
        response.status in (408, 409, 429)
        or response.status >= 500
        or _is_transient(response)
        or read(response).get("errorCode") == IN_PROGRESS
    )


def may_repeat(response: Response) -> bool:
    """Whether the same request under the same key is of use: Adyen says not to repeat after an
    error of its own without `transient-error: true`; another's, as a proxy's, says nothing.
    """
    return "errorType" not in read(response) or _is_transient(response)


def _is_transient(response: Response) -> bool:
    return response.headers.get("transient-error") == "true"


# --- payments -------------------------------------------------------------------------------------


def payment(told: Mapping[str, Any], reference: str, *, can_act: bool) -> ConnectorAnswer:
    """What an answer to /payments says of an authorization or verification.

    `can_act`: the payment is complete when the customer has acted elsewhere. Raises Unusable.
    """
    if told.get("merchantReference", reference) != reference:
        raise Unusable
    match told.get("resultCode"):
        case "Authorised" | "PartiallyAuthorised":
            return _approved(told, reference)
        case "Refused" | "Error":
            return _refused(told)
        case "Cancelled":
            return _answered(told, Verdict.CANCELED)
        case "Pending" | "Received":
            return _answered(told, Verdict.PENDING)
        case "RedirectShopper" | "IdentifyShopper" | "ChallengeShopper" | "PresentToShopper":
            return _action(told, can_act=can_act)
        case _:
            raise Unusable


def currency_and_amount(told: Mapping[str, Any]) -> tuple[str, int | None]:
    """An `amount`, in minor units of ISO 4217; ("", None) without one. Raises Unusable."""
    amount = part(told, "amount")
    if not amount:
        return "", None
    currency = values.text(amount.get("currency"), 3)
    value = values.amount(amount.get("value"))
    amount_minor = None if value is None else amounts.from_adyen(value, currency)
    if amount_minor is None:
        raise Unusable
    return currency, amount_minor


def _answered(told: Mapping[str, Any], verdict: Verdict) -> ConnectorAnswer:
    transaction_id = values.identifier(told.get("pspReference"))
    if not transaction_id:
        raise Unusable
    return ConnectorAnswer(Delivery.ANSWERED, verdict, connector_transaction_id=transaction_id)


def _approved(told: Mapping[str, Any], reference: str) -> ConnectorAnswer:
    if told.get("merchantReference") != reference:
        raise Unusable
    answer = _answered(told, Verdict.APPROVED)
    more, response_code = part(told, "additionalData"), ResponseCode.APPROVED
    if told.get("resultCode") == "PartiallyAuthorised":
        told = {**told, "amount": _authorised_amount(more)}
        response_code = ResponseCode.PARTIALLY_APPROVED
    answer.currency, amount_minor = currency_and_amount(told)
    outcome = _outcome(told, response_code)
    outcome.connector_code = values.text(told.get("resultCode"))
    outcome.auth_code = values.text(more.get("authCode"))
    outcome.network_transaction_id = values.text(more.get("networkTxReference"))
    outcome.amount_reported_minor = amount_minor
    answer.outcome = outcome
    return answer


def _authorised_amount(more: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was authorized of a payment that was not wholly. Raises Unusable."""
    value = values.text(more.get("authorisedAmountValue"))
    if not (value.isascii() and value.isdigit()):
        raise Unusable
    return {"currency": more.get("authorisedAmountCurrency"), "value": int(value)}


def _refused(told: Mapping[str, Any]) -> ConnectorAnswer:
    """A refusal of the issuer, the network or Adyen itself; an `Error` is final too."""
    answer = _answered(told, Verdict.DECLINED)
    code = values.text(told.get("refusalReasonCode"))
    network, _ = network_code(told)
    outcome = _outcome(told, refusal(code, network))
    outcome.connector_code = code or values.text(told.get("resultCode"))
    outcome.connector_message = values.text(told.get("refusalReason"), values.MESSAGE_LENGTH_MAX)
    _advise(outcome, told, code)
    answer.outcome = outcome
    return answer


def refusal(code: str, network: str) -> ResponseCode:
    """What a refusal means: by Adyen's code, and by the network's where that says more."""
    unified = codes.REFUSALS.get(code, ResponseCode.DECLINED_OTHER)
    if code in codes.REFUSALS and code not in codes.GENERIC:
        return unified
    known = schemes.NETWORK_CODES.get(network, unified)
    is_refusal = known not in (ResponseCode.APPROVED, ResponseCode.PARTIALLY_APPROVED)
    return known if is_refusal else unified


def _outcome(told: Mapping[str, Any], response_code: ResponseCode) -> Outcome:
    """What the network said, as far as the account is set up to be told."""
    more = part(told, "additionalData")
    avs, cvv = _number(more, "avsResult"), _number(more, "cvcResult")
    outcome = Outcome(
        response_code=response_code,
        avs_result=codes.AVS.get(avs, AvsResult.UNSPECIFIED),
        avs_code=values.text(more.get("avsResultRaw")) or avs,
        cvv_result=codes.CVV.get(cvv, CvvResult.UNSPECIFIED),
        cvv_code=values.text(more.get("cvcResultRaw")) or cvv,
    )
    outcome.network_code, outcome.network_code_scheme = network_code(told)
    return outcome


def network_code(told: Mapping[str, Any]) -> tuple[str, str]:
    """The network's own code, and the network; empty where the account is not told."""
    raw = _RAW_CODE.match(values.text(part(told, "additionalData").get("refusalReasonRaw")))
    return ("", "") if raw is None else (raw[1], _scheme(told))


def _advise(outcome: Outcome, told: Mapping[str, Any], code: str) -> None:
    """The network's advice where it is known, otherwise Adyen's."""
    advice, scheme = _number(part(told, "additionalData"), "merchantAdviceCode"), _scheme(told)
    if not schemes.advise(outcome, scheme, advice) and code in codes.ADVICE:
        outcome.advice_action = codes.ADVICE[code]
        outcome.advice_code, outcome.advice_scheme = code, "adyen"


def _number(more: Mapping[str, Any], name: str) -> str:
    """What a field begins with: "4 AVS not supported" and "01: New account" have a number."""
    return re.split(r"[ :]", values.text(more.get(name)), maxsplit=1)[0]


def _scheme(told: Mapping[str, Any]) -> str:
    """The network's name, as `schemes` has it; Adyen's where it is another."""
    brand = (
        values.text(part(told, "paymentMethod").get("brand"))  # of an answer
        or values.text(part(told, "additionalData").get("paymentMethod"))
        or values.text(told.get("paymentMethod"))  # of a notification
    )
    return codes.SCHEMES.get(brand, brand)


def _action(told: Mapping[str, Any], *, can_act: bool) -> ConnectorAnswer:
    """The customer has to act, by visiting an address; what else Adyen asks for nobody can do."""
    action = part(told, "action")
    url = values.https_url(action.get("url"))
    transaction_id = values.identifier(told.get("pspReference"))
    if can_act and url and action.get("method", "GET") == "GET":
        return ConnectorAnswer(
            Delivery.ANSWERED,
            Verdict.REQUIRES_ACTION,
            connector_transaction_id=transaction_id,
            next_action=NextAction(redirect_url=url),
        )
    # Nothing is authorized before the customer has acted, and the address is told to nobody.
    outcome = Outcome(
        response_code=ResponseCode.AUTHENTICATION_REQUIRED,
        connector_code=values.text(told.get("resultCode")),
    )
    return ConnectorAnswer(
        Delivery.ANSWERED, Verdict.DECLINED, outcome, connector_transaction_id=transaction_id
    )


# --- modifications --------------------------------------------------------------------------------


def modification(
    told: Mapping[str, Any], reference: str, payment_id: str, currency: str = ""
) -> ConnectorAnswer:
    """What Adyen says of a capture, cancellation, refund, reversal or new amount: that it received
    it. The outcome comes by notification, under the id that is answered. Raises Unusable.
    """
    if (
        told.get("status") != "received"
        or told.get("reference") != reference
        or told.get("paymentPspReference") != payment_id
    ):
        raise Unusable
    answer = _answered(told, Verdict.PENDING)
    answer.currency, _ = currency_and_amount(told)
    if answer.currency not in ("", currency):
        raise Unusable
    answer.outcome = Outcome(connector_code="received")
    return answer


def rejected(response: Response) -> ConnectorAnswer:
    """Adyen refuses the request as it stands. Raises Unusable for what does not say so."""
    told = read(response)
    type_ = values.text(told.get("errorType"))
    if response.status not in _REFUSING or type_ not in _REFUSING_TYPES:
        raise Unusable
    outcome = Outcome(
        response_code=ResponseCode.REJECTED_BY_CONNECTOR,
        connector_code=values.text(told.get("errorCode")) or values.text(told.get("errorType")),
        connector_message=values.text(told.get("message"), values.MESSAGE_LENGTH_MAX),
    )
    return ConnectorAnswer(
        Delivery.ANSWERED,
        Verdict.FAILED,
        outcome,
        connector_transaction_id=values.identifier(told.get("pspReference")),
    )
