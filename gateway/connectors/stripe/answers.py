"""What Stripe's objects and errors say, in the gateway's words. Pure.

Sources: Stripe's API reference (PaymentIntents, SetupIntents, Refunds, Charges, Errors).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.connectors import schemes, values
from gateway.connectors.base import Unusable
from gateway.connectors.http import Response
from gateway.connectors.stripe import amounts, codes
from gateway.connectors.values import part
from gateway.domain.model import (
    AdviceAction,
    AvsResult,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    NextAction,
    Outcome,
    QrCode,
    ResponseCode,
    Verdict,
)

REFERENCE: Final = "gateway_reference"
"""The metadata key of an object's reference. What later changes a PaymentIntent leaves its own
reference as a key beside it, with the kind and the amount: `capture:1000`."""
TOMBSTONE: Final = "gateway_tombstone"
"""The metadata key of a SetupIntent that only occupies an idempotency key."""

_EXPIRED_REASONS: Final = frozenset({"automatic", "expired"})


@dataclass(frozen=True, slots=True)
class StripeError:
    """The `error` of an answer."""

    status: int
    type: str
    code: str
    told: Mapping[str, Any]

    @property
    def payment_intent(self) -> Mapping[str, Any]:
        """The PaymentIntent that the error is about; empty without one."""
        return part(self.told, "payment_intent")


def read(response: Response) -> Mapping[str, Any]:
    """The object of a successful answer. Raises Unusable."""
    told = values.json_object(response.body)
    if response.status != 200 or not told:
        raise Unusable
    return told


def read_error(response: Response) -> StripeError:
    """The error of another answer; without type and code where it is not Stripe's."""
    error = part(values.json_object(response.body), "error")
    return StripeError(
        response.status, values.text(error.get("type")), values.text(error.get("code")), error
    )


def currency_of(told: Mapping[str, Any]) -> str:
    """The object's currency as ISO 4217 writes it."""
    return values.text(told.get("currency"), 3).upper()


def amount_of(told: Mapping[str, Any], name: str) -> int:
    """An amount of an object, in Stripe's unit. Raises Unusable."""
    value = values.amount(told.get(name))
    if value is None:
        raise Unusable
    return value


def minor(amount: int, currency: str) -> int:
    """Raises Unusable for an amount that ISO 4217 cannot express."""
    value = amounts.from_stripe(amount, currency)
    if value is None:
        raise Unusable
    return value


# --- objects --------------------------------------------------------------------------------------


def authorization(intent: Mapping[str, Any], *, captured: bool | None) -> ConnectorAnswer:
    """What a PaymentIntent says of its authorization. Raises Unusable.

    `captured`: whether it was to be captured at once; None where that is not known.
    """
    currency = currency_of(intent)
    match intent.get("status"):
        case "requires_capture" if captured is not True:
            held = amount_of(intent, "amount_capturable") + amount_of(intent, "amount_received")
            return _approved(intent, minor(held, currency))
        case "succeeded" if part(intent, "latest_charge").get("refunded") is not True:
            # Captured later, and perhaps not wholly: authorized was the whole.
            name = "amount_received" if captured else "amount"
            return _approved(intent, minor(amount_of(intent, name), currency))
        case "processing":
            return _answered(intent, Verdict.PENDING)
        case "requires_action":
            return _action(intent)
        case "canceled" | "succeeded":  # or all of it was given back
            expired = values.text(intent.get("cancellation_reason")) in _EXPIRED_REASONS
            return _answered(intent, Verdict.EXPIRED if expired else Verdict.CANCELED)
        case "requires_payment_method" | "requires_confirmation" if part(
            intent, "last_payment_error"
        ):
            return declined(part(intent, "last_payment_error"), str(intent.get("id", "")))
        case _:
            raise Unusable


def verification(intent: Mapping[str, Any]) -> ConnectorAnswer:
    """What a SetupIntent says. Raises Unusable."""
    match intent.get("status"):
        case "succeeded":
            answer = _answered(intent, Verdict.APPROVED)
            answer.outcome = Outcome(
                response_code=ResponseCode.APPROVED,
                connector_code="succeeded",
                amount_reported_minor=0,
            )
            return answer
        case "processing":
            return _answered(intent, Verdict.PENDING)
        case "requires_action":
            answer = _action(intent)
            if answer.next_action is not None:
                return answer
            # Nobody can act: it is over, and nothing is held.
            return declined({"code": "authentication_required"}, answer.connector_transaction_id)
        case "requires_payment_method" if part(intent, "last_setup_error"):
            return declined(part(intent, "last_setup_error"), str(intent.get("id", "")))
        case "canceled":
            return _answered(intent, Verdict.CANCELED)
        case _:
            raise Unusable


def capture(intent: Mapping[str, Any], reference: str) -> ConnectorAnswer | None:
    """What a PaymentIntent says of one of its captures; None where it knows of none such.

    Only the sum of the captures is told: what this one took is the sum without the others.
    Raises Unusable.
    """
    entries = _entries(intent, "capture")
    if reference not in entries:
        return None
    others = sum(amount for other, amount in entries.items() if other != reference)
    taken = amount_of(intent, "amount_received") - others
    return _approved(intent, minor(taken, currency_of(intent)))


def captures(intent: Mapping[str, Any]) -> list[str]:
    """The references of a PaymentIntent's captures."""
    return list(_entries(intent, "capture"))


def increment(
    intent: Mapping[str, Any], reference: str, total: int | None = None
) -> ConnectorAnswer | None:
    """What a PaymentIntent says of one of its increments; None where it knows of none such.

    `total` is the amount that it was to have afterwards, in Stripe's unit, where that is known.
    Raises Unusable.
    """
    entries = _entries(intent, "increment")
    if reference not in entries:
        return None
    more = 0 if total is None else amount_of(intent, "amount") - total
    return _approved(intent, minor(entries[reference] + more, currency_of(intent)))


def void(intent: Mapping[str, Any]) -> ConnectorAnswer | None:
    """APPROVED where nothing is held of the PaymentIntent any more, whoever released it; None where
    something is, or where all was captured. Raises Unusable.

    One that was captured in part becomes succeeded where it is cancelled ("Multicapture").
    """
    taken, whole = (values.amount(intent.get(name)) for name in ("amount_received", "amount"))
    if intent.get("status") == "succeeded" and None not in (taken, whole) and taken != whole:
        return _approved(intent, None)
    return canceled(intent)


def canceled(intent: Mapping[str, Any]) -> ConnectorAnswer | None:
    """APPROVED where the PaymentIntent was cancelled, by whomever, so that nothing of it stands;
    None where it was not. Raises Unusable.
    """
    return _approved(intent, None) if intent.get("status") == "canceled" else None


def refund(told: Mapping[str, Any]) -> ConnectorAnswer:
    """What a Refund says. Raises Unusable."""
    currency = currency_of(told)
    match told.get("status"):
        case "succeeded":
            return _approved(told, minor(amount_of(told, "amount"), currency))
        case "pending" | "requires_action":
            return _answered(told, Verdict.PENDING)
        case "failed":
            answer = _answered(told, Verdict.FAILED)
            answer.outcome = Outcome(
                response_code=ResponseCode.REJECTED_BY_CONNECTOR,
                connector_code=values.text(told.get("failure_reason")) or "failed",
            )
            return answer
        case "canceled":
            return _answered(told, Verdict.CANCELED)
        case _:
            raise Unusable


def _entries(intent: Mapping[str, Any], kind: str) -> dict[str, int]:
    """References to amounts in Stripe's unit, of what changed the PaymentIntent."""
    entries: dict[str, int] = {}
    for reference, value in part(intent, "metadata").items():
        name, _, amount = value.partition(":") if isinstance(value, str) else ("", "", "")
        if name == kind and amount.isascii() and amount.isdigit():
            entries[reference] = int(amount)
    return entries


def _answered(told: Mapping[str, Any], verdict: Verdict) -> ConnectorAnswer:
    transaction_id = values.identifier(told.get("id"))
    if not transaction_id:
        raise Unusable
    return ConnectorAnswer(
        delivery=Delivery.ANSWERED,
        verdict=verdict,
        connector_transaction_id=transaction_id,
        currency=currency_of(told),
    )


def _approved(told: Mapping[str, Any], amount_minor: int | None) -> ConnectorAnswer:
    answer = _answered(told, Verdict.APPROVED)
    charge = part(told, "latest_charge")
    card = part(part(charge, "payment_method_details"), "card")
    checks = part(card, "checks")
    street, postal = (
        _check(checks, "address_line1_check"),
        _check(checks, "address_postal_code_check"),
    )
    cvc = _check(checks, "cvc_check")
    answer.authorization_expires_at = values.instant(card.get("capture_before"))
    answer.outcome = Outcome(
        response_code=ResponseCode.APPROVED,
        connector_code=values.text(told.get("status")),
        avs_result=codes.AVS.get((street, postal), AvsResult.UNSPECIFIED),
        avs_code=f"{street}/{postal}" if street or postal else "",
        cvv_result=codes.CVV.get(cvc, CvvResult.UNSPECIFIED),
        cvv_code=cvc,
        auth_code=values.text(card.get("authorization_code")),
        network_transaction_id=values.text(card.get("network_transaction_id")),
        amount_reported_minor=amount_minor,
    )
    return answer


def _check(checks: Mapping[str, Any], name: str) -> str:
    """A result of a check; "" where nothing was checked."""
    value = values.text(checks.get(name))
    return "" if value == "unchecked" else value


def _action(intent: Mapping[str, Any]) -> ConnectorAnswer:
    """With what the customer has to do, where that can be put into the gateway's words."""
    answer = _answered(intent, Verdict.REQUIRES_ACTION)
    told = part(intent, "next_action")
    redirect = values.https_url(part(told, "redirect_to_url").get("url"))
    code = part(told, "pix_display_qr_code")
    if redirect:
        answer.next_action = NextAction(redirect_url=redirect)
    elif code:
        answer.next_action = NextAction(
            qr_code=QrCode(
                data=values.code_data(code.get("data")),
                image_url=values.https_url(code.get("image_url_png")),
                page_url=values.https_url(code.get("hosted_instructions_url")),
            ),
            expires_at=values.instant(code.get("expires_at")),
        )
    return answer


# --- errors ---------------------------------------------------------------------------------------


def declined(error: Mapping[str, Any], transaction_id: str) -> ConnectorAnswer:
    """A decline of the issuer, the network or Stripe itself."""
    decline_code, code = values.text(error.get("decline_code")), values.text(error.get("code"))
    response_code = codes.DECLINE_CODES.get(decline_code) or codes.DECLINE_CODES.get(
        code, ResponseCode.DECLINED_OTHER
    )
    outcome = _refused(error, response_code)
    outcome.connector_code = decline_code or code
    network = part(part(error, "payment_method"), "card")
    brand = values.text(network.get("brand"))
    outcome.network_code = values.text(error.get("network_decline_code"))
    outcome.network_code_scheme = brand if outcome.network_code else ""
    _advise(outcome, error, brand)
    return ConnectorAnswer(
        Delivery.ANSWERED,
        Verdict.DECLINED,
        outcome,
        connector_transaction_id=values.identifier(transaction_id),
    )


def _advise(outcome: Outcome, error: Mapping[str, Any], brand: str) -> None:
    """The network's own advice where it is known, otherwise what Stripe makes of it."""
    advice = values.text(error.get("advice_code"))
    decline_code = values.text(error.get("decline_code"))
    if not advice and decline_code in codes.ADVISING:
        advice = decline_code
    known = schemes.advise(outcome, brand, values.text(error.get("network_advice_code")))
    if not known and advice:
        outcome.advice_action = codes.ADVICE.get(advice, AdviceAction.UNSPECIFIED)
        outcome.advice_code, outcome.advice_scheme = advice, "stripe"


def rejected(error: StripeError) -> ConnectorAnswer:
    """Stripe refuses the request as it stands."""
    outcome = _refused(error.told, ResponseCode.REJECTED_BY_CONNECTOR)
    outcome.connector_code = error.code or error.type
    return ConnectorAnswer(
        Delivery.ANSWERED,
        Verdict.FAILED,
        outcome,
        connector_transaction_id=values.identifier(error.payment_intent.get("id")),
    )


def _refused(error: Mapping[str, Any], response_code: ResponseCode) -> Outcome:
    return Outcome(
        response_code=response_code,
        connector_message=values.text(error.get("message"), values.MESSAGE_LENGTH_MAX),
    )
