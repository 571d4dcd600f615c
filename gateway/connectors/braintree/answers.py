"""What Braintree's objects and errors say, in the gateway's words. Pure.

Sources: Braintree's published schema (Transaction, Refund, Verification and their events) and the
guide "Making API calls" (errors).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.connectors import schemes, values
from gateway.connectors.base import Unusable
from gateway.connectors.braintree import amounts, codes
from gateway.connectors.http import Response
from gateway.connectors.values import part
from gateway.domain.model import (
    AdviceAction,
    AvsResult,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    Outcome,
    ResponseCode,
    Verdict,
)

_EMPTY: Final[Mapping[str, Any]] = {}

CAPTURED: Final = frozenset(
    {
        "SUBMITTED_FOR_SETTLEMENT",
        "SETTLING",
        "SETTLED",
        "SETTLEMENT_CONFIRMED",
        "SETTLEMENT_PENDING",
    }
)
VOIDABLE: Final = frozenset({"AUTHORIZED", "SUBMITTED_FOR_SETTLEMENT", "SETTLEMENT_PENDING"})
"""What a void may still release ("Transaction: Void")."""
GONE: Final = frozenset(
    {
        "AUTHORIZATION_EXPIRED",
        "FAILED",
        "GATEWAY_REJECTED",
        "PROCESSOR_DECLINED",
        "SETTLEMENT_DECLINED",
        "VOIDED",
    }
)
"""Nothing of it stands."""
_DECLINED: Final = frozenset({"FAILED", "GATEWAY_REJECTED", "PROCESSOR_DECLINED"})

_REQUEST_ERROR: Final = "REQUEST_ERROR"
"""Ours, for an error without a class in an answer without `data`: nothing was executed (GraphQL,
"Response": a request error is raised before execution begins, and there is no data entry)."""
_REFUSALS: Final = frozenset(
    {
        _REQUEST_ERROR,
        "AUTHENTICATION",
        "AUTHORIZATION",
        "NOT_FOUND",
        "NOT_IMPLEMENTED",
        "RESOURCE_LIMIT",
        "UNSUPPORTED_CLIENT",
        "VALIDATION",
    }
)
"""Classes of errors with which nothing was done; with all others it may have been."""
LIMITED: Final = "RESOURCE_LIMIT"
_KEY: Final = "apiRequestKey"


@dataclass(frozen=True, slots=True)
class BraintreeError:
    """One of an answer's `errors`."""

    error_class: str
    code: str
    """`legacyCode`; empty without one."""
    message: str
    of_key: bool
    """It complains of the idempotency key: another request has it, or has it still."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back for the one field that a document asks for."""

    told: Mapping[str, Any]
    """The field's object; empty where there is none."""
    errors: tuple[BraintreeError, ...]

    @property
    def is_refusal(self) -> bool:
        """Surely nothing was done, by this sending."""
        return bool(self.errors) and all(
            error.error_class in _REFUSALS and not error.of_key for error in self.errors
        )

    @property
    def is_limited(self) -> bool:
        """It was refused for its rate alone."""
        return self.is_refusal and any(error.error_class == LIMITED for error in self.errors)


def read(response: Response, field: str) -> Answered:
    """What an answer says of a field; nothing where it is none of the API (a proxy's, perhaps), or
    where the API itself failed.
    """
    body = values.json_object(response.body)
    if not body or response.status >= 500:
        return Answered(_EMPTY, ())
    told = part(part(body, "data"), field) if response.status == 200 else _EMPTY
    errors = body.get("errors")
    listed = errors if isinstance(errors, list) else []
    unexecuted = "data" not in body and response.status in (200, 400)
    unclassed = _REQUEST_ERROR if unexecuted else ""
    return Answered(
        told, tuple(_error(error, unclassed) for error in listed if isinstance(error, dict))
    )


def _error(told: Mapping[str, Any], unclassed: str) -> BraintreeError:
    extensions = part(told, "extensions")
    path = extensions.get("inputPath")
    message = values.text(told.get("message"), values.MESSAGE_LENGTH_MAX)
    return BraintreeError(
        values.text(extensions.get("errorClass")) or unclassed,
        values.text(extensions.get("legacyCode")),
        message,
        (isinstance(path, list) and _KEY in path) or _KEY in message,
    )


def parts(told: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """The objects of a list within an object. Raises Unusable where it holds anything else."""
    value = told.get(name)
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise Unusable
    yield from value


def children(transaction: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The partial captures of an authorization. Raises Unusable."""
    return list(parts(part(transaction, "partialCaptureDetails"), "childCaptures"))


def status_of(told: Mapping[str, Any]) -> str:
    """The object's, or event's, status; empty where it has none."""
    return values.text(told.get("status"))


def currency_of(told: Mapping[str, Any]) -> str:
    """The object's currency as ISO 4217 writes it."""
    return values.text(part(told, "amount").get("currencyCode"), 3)


def minor(told: Mapping[str, Any], name: str = "amount") -> int:
    """An amount of an object in minor units. Raises Unusable."""
    money = part(told, name)
    value = amounts.from_braintree(money.get("value"), values.text(money.get("currencyCode"), 3))
    if value is None or values.amount(value) is None:
        raise Unusable
    return value


# --- objects --------------------------------------------------------------------------------------


def authorization(transaction: Mapping[str, Any], *, captured: bool | None) -> ConnectorAnswer:
    """What a Transaction says of its authorization. Raises Unusable.

    `captured`: whether it was to be captured at once; None where that is not known.
    """
    status = status_of(transaction)
    if status in _DECLINED:
        return _declined(transaction)
    if status == "AUTHORIZED" and not captured:
        return _approved(transaction, minor(transaction))
    if status in CAPTURED:
        # Captured later, and perhaps not wholly: authorized was the whole.
        event = _event(transaction, "AUTHORIZED")
        whole = transaction if captured or not event else event
        return _approved(transaction, minor(whole))
    match status:
        case "VOIDED":
            return _answered(transaction, Verdict.CANCELED)
        case "AUTHORIZATION_EXPIRED":
            return _answered(transaction, Verdict.EXPIRED)
        case "SETTLEMENT_DECLINED":
            return _failed(transaction)
        case _:
            raise Unusable


def duplicate_of(transaction: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Where it was rejected for the sake of an earlier one: that one's id and order ID, as far as
    they are told. Of the earlier one it says nothing else. Raises Unusable.
    """
    if status_of(transaction) != "GATEWAY_REJECTED":
        return None
    rejected = _event(transaction, "GATEWAY_REJECTED")
    if rejected.get("gatewayRejectionReason") != codes.DUPLICATE:
        return None
    return part(rejected, "duplicateOf")


def capture(transaction: Mapping[str, Any], reference: str) -> ConnectorAnswer | None:
    """What a Transaction says of one of its captures; None where it knows of none such.

    A capture leaves its reference as the order ID: of the transaction, or, where several are
    possible, of a transaction of its own. Raises Unusable.
    """
    for taken in (*children(transaction), transaction):
        if taken.get("orderId") != reference:
            continue
        if status_of(taken) in CAPTURED:
            return _approved(taken, minor(taken))
        if status_of(taken) in (_DECLINED | {"SETTLEMENT_DECLINED"}):
            return _failed(taken)
        if status_of(taken) == "VOIDED":
            return _answered(taken, Verdict.CANCELED)
    return None


def void(transaction: Mapping[str, Any]) -> ConnectorAnswer | None:
    """APPROVED where the Transaction was voided, by whomever; None where it was not."""
    return _approved(transaction, None) if status_of(transaction) == "VOIDED" else None


def refund(told: Mapping[str, Any]) -> ConnectorAnswer:
    """What a Refund says. Raises Unusable."""
    status = status_of(told)
    if status in CAPTURED:
        return _approved(told, minor(told))
    if status in (_DECLINED | {"SETTLEMENT_DECLINED"}):
        return _failed(told)
    match status:
        case "AUTHORIZING" | "AUTHORIZED":
            return _answered(told, Verdict.PENDING)
        case "VOIDED":
            return _answered(told, Verdict.CANCELED)
        case _:
            raise Unusable


def refunded_minor(transaction: Mapping[str, Any]) -> int:
    """What was, or is being, given back of a Transaction. Raises Unusable."""
    return sum(minor(told) for told in parts(transaction, "refunds") if not is_gone(told))


def is_gone(told: Mapping[str, Any]) -> bool:
    """Whether nothing of a Transaction or Refund stands."""
    return status_of(told) in GONE


def verification(told: Mapping[str, Any]) -> ConnectorAnswer:
    """What a Verification says. Raises Unusable."""
    outcome = Outcome(connector_code=status_of(told))
    _process(outcome, part(told, "processorResponse"))
    outcome.network_code = values.text(part(told, "networkResponse").get("code"))
    answer = ConnectorAnswer(Delivery.ANSWERED, outcome=outcome, connector_transaction_id=_id(told))
    match status_of(told):
        case "VERIFIED":
            answer.verdict = Verdict.APPROVED
            outcome.response_code = ResponseCode.APPROVED
            outcome.amount_reported_minor = 0
        case "PENDING" | "VERIFYING":
            answer.verdict, answer.outcome = Verdict.PENDING, None
        case "PROCESSOR_DECLINED" | "FAILED":
            answer.verdict = Verdict.DECLINED
            _refuse(outcome, told, _EMPTY)
        case "GATEWAY_REJECTED":
            answer.verdict = Verdict.DECLINED
            _refuse(outcome, told, told)
        case _:
            raise Unusable
    return answer


def _id(told: Mapping[str, Any]) -> str:
    transaction_id = values.identifier(told.get("id"))
    if not transaction_id:
        raise Unusable
    return transaction_id


def _event(told: Mapping[str, Any], status: str) -> Mapping[str, Any]:
    """The latest event of a status; empty without one. Raises Unusable."""
    for event in parts(told, "statusHistory"):
        if status_of(event) == status:
            return event
    return _EMPTY


def _answered(told: Mapping[str, Any], verdict: Verdict) -> ConnectorAnswer:
    return ConnectorAnswer(
        delivery=Delivery.ANSWERED,
        verdict=verdict,
        connector_transaction_id=_id(told),
        currency=currency_of(told),
    )


def _approved(told: Mapping[str, Any], amount_minor: int | None) -> ConnectorAnswer:
    answer = _answered(told, Verdict.APPROVED)
    authorized = _event(told, "AUTHORIZED")
    processor = part(authorized, "processorResponse")
    answer.authorization_expires_at = values.instant_of_text(
        authorized.get("authorizationExpiresAt")
    )
    answer.outcome = outcome = Outcome(
        response_code=ResponseCode.APPROVED,
        connector_code=values.text(processor.get("legacyCode")) or status_of(told),
        amount_reported_minor=amount_minor,
    )
    if outcome.connector_code == codes.PARTIAL_APPROVAL:
        outcome.response_code = ResponseCode.PARTIALLY_APPROVED
    _process(outcome, processor)
    _trace(outcome, told, authorized)
    return answer


def _process(outcome: Outcome, processor: Mapping[str, Any]) -> None:
    """What a processor told beside its code."""
    street, postal, cvv = (
        _check(processor, name)
        for name in ("avsStreetAddressResponse", "avsPostalCodeResponse", "cvvResponse")
    )
    outcome.avs_result = codes.AVS.get((street, postal), AvsResult.UNSPECIFIED)
    outcome.avs_code = f"{street}/{postal}" if street or postal else ""
    outcome.cvv_result, outcome.cvv_code = codes.CVV.get(cvv, CvvResult.UNSPECIFIED), cvv
    outcome.auth_code = values.text(processor.get("authorizationId"))
    outcome.retrieval_reference_number = values.text(processor.get("retrievalReferenceNumber"))


def _check(processor: Mapping[str, Any], name: str) -> str:
    """A result of a check; "" where nothing was checked."""
    value = values.text(processor.get(name))
    return "" if value in codes.UNTOLD else value


def _trace(outcome: Outcome, told: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    """What the network told; the network's name."""
    details = part(told, "paymentMethodSnapshot")
    brand = codes.BRANDS.get(values.text(part(details, "creditCard").get("brandCode")), "")
    outcome.network_transaction_id = values.text(details.get("networkTransactionId"))
    outcome.acquirer_reference_number = values.text(details.get("acquirerReferenceNumber"))
    outcome.network_code = values.text(part(event, "networkResponse").get("code"))
    outcome.network_code_scheme = brand if outcome.network_code else ""
    return brand


def _declined(told: Mapping[str, Any]) -> ConnectorAnswer:
    """A decline of the issuer, the network or Braintree itself."""
    answer = _answered(told, Verdict.DECLINED)
    event = _event(told, status_of(told))
    answer.outcome = outcome = Outcome()
    _process(outcome, part(event, "processorResponse"))
    brand = _trace(outcome, told, event)
    _refuse(outcome, event, event)
    advice = values.text(part(event, "merchantAdviceCodeResponse").get("code"))
    if not schemes.advise(outcome, brand, advice):
        decline_type = values.text(event.get("declineType"))
        outcome.advice_action = codes.ADVICE.get(decline_type, AdviceAction.UNSPECIFIED)
        outcome.advice_code = decline_type
        outcome.advice_scheme = "braintree" if decline_type else ""
    return answer


def _failed(told: Mapping[str, Any]) -> ConnectorAnswer:
    """A capture or refund that was refused, at once or when it was to be settled."""
    answer = _answered(told, Verdict.FAILED)
    event = _event(told, status_of(told))
    answer.outcome = outcome = Outcome()
    _refuse(outcome, event, event)
    if not outcome.connector_code:
        outcome.connector_code = status_of(told)
    outcome.response_code = ResponseCode.REJECTED_BY_CONNECTOR
    return answer


def _refuse(outcome: Outcome, told: Mapping[str, Any], rejected: Mapping[str, Any]) -> None:
    """Fill in why: the gateway's own reason, or what the processor told."""
    processor = part(told, "processorResponse")
    reason = values.text(rejected.get("gatewayRejectionReason"))
    code = values.text(processor.get("legacyCode"))
    outcome.connector_code = reason or code or outcome.connector_code
    outcome.connector_message = values.text(processor.get("message"), values.MESSAGE_LENGTH_MAX)
    if reason:
        outcome.response_code = codes.GATEWAY_REJECTIONS.get(reason, ResponseCode.DECLINED_OTHER)
    else:
        outcome.response_code = codes.response_code(code)


def rejected(answered: Answered) -> ConnectorAnswer:
    """Braintree refuses the request as it stands."""
    error = answered.errors[0]
    outcome = Outcome(
        response_code=ResponseCode.REJECTED_BY_CONNECTOR,
        connector_code=error.code or error.error_class,
        connector_message=error.message,
    )
    return ConnectorAnswer(Delivery.ANSWERED, Verdict.FAILED, outcome)
