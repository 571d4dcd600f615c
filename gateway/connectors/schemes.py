"""The card schemes' codes, normalised: responses, advice, address and card verification results."""

from collections.abc import Callable, Mapping
from typing import Final

from gateway.connectors import values
from gateway.domain.model import AdviceAction, AvsResult, CvvResult, Outcome, ResponseCode

ISO8583_CODES: Final[Mapping[str, ResponseCode]] = {
    "00": ResponseCode.APPROVED,
    "01": ResponseCode.REFER_TO_ISSUER,
    "03": ResponseCode.INVALID_MERCHANT,
    "04": ResponseCode.PICK_UP_CARD,
    "05": ResponseCode.DO_NOT_HONOR,
    "07": ResponseCode.PICK_UP_CARD,
    "10": ResponseCode.PARTIALLY_APPROVED,
    "12": ResponseCode.INVALID_TRANSACTION,
    "13": ResponseCode.INVALID_AMOUNT,
    "14": ResponseCode.INVALID_CARD_NUMBER,
    "19": ResponseCode.REENTER_TRANSACTION,
    "1A": ResponseCode.AUTHENTICATION_REQUIRED,
    "41": ResponseCode.LOST_CARD,
    "43": ResponseCode.STOLEN_CARD,
    "51": ResponseCode.INSUFFICIENT_FUNDS,
    "54": ResponseCode.EXPIRED_CARD,
    "55": ResponseCode.WRONG_PIN,
    "57": ResponseCode.NOT_PERMITTED,
    "58": ResponseCode.NOT_PERMITTED,
    "59": ResponseCode.SUSPECTED_FRAUD,
    "61": ResponseCode.EXCEEDS_AMOUNT_LIMIT,
    "62": ResponseCode.RESTRICTED_CARD,
    "63": ResponseCode.SECURITY_VIOLATION,
    "65": ResponseCode.EXCEEDS_FREQUENCY_LIMIT,
    "91": ResponseCode.ISSUER_UNAVAILABLE,
    "96": ResponseCode.SYSTEM_MALFUNCTION,
}
"""DE39 of the 1987 edition; "1A" is the networks' own, a soft decline for authentication."""

NETWORK_CODES: Final[Mapping[str, ResponseCode]] = {
    **ISO8583_CODES,
    "02": ResponseCode.REFER_TO_ISSUER,
    "15": ResponseCode.INVALID_CARD_NUMBER,  # no such issuer
    "39": ResponseCode.INVALID_CARD_NUMBER,  # no credit account
    "46": ResponseCode.INVALID_CARD_NUMBER,  # the account is closed
    "52": ResponseCode.INVALID_CARD_NUMBER,  # no current account
    "53": ResponseCode.INVALID_CARD_NUMBER,  # no savings account
    "70": ResponseCode.WRONG_PIN,  # none was given
    "75": ResponseCode.EXCEEDS_FREQUENCY_LIMIT,  # of tries of the PIN
    "92": ResponseCode.ISSUER_UNAVAILABLE,  # no way there
    "N7": ResponseCode.SECURITY_VIOLATION,  # the card's verification code
    "R0": ResponseCode.RESTRICTED_CARD,  # this payment was stopped
    "R1": ResponseCode.RESTRICTED_CARD,  # all of the merchant's were
    "R3": ResponseCode.RESTRICTED_CARD,  # all were
}
"""With those of the networks that mean the same at all of them."""

_HOUR_S: Final = 3600
_DAY_S: Final = 24 * _HOUR_S
ADVICE: Final[Mapping[tuple[str, str], tuple[AdviceAction, int | None]]] = {
    ("mastercard", "01"): (AdviceAction.RETRY_AFTER_INSTRUMENT_UPDATE, None),
    ("mastercard", "02"): (AdviceAction.RETRY_LATER, None),
    ("mastercard", "03"): (AdviceAction.DO_NOT_RETRY, None),
    ("mastercard", "21"): (AdviceAction.STOP_RECURRING, None),
    ("mastercard", "24"): (AdviceAction.RETRY_AFTER, _HOUR_S),
    ("mastercard", "25"): (AdviceAction.RETRY_AFTER, _DAY_S),
    ("mastercard", "26"): (AdviceAction.RETRY_AFTER, 2 * _DAY_S),
    ("mastercard", "27"): (AdviceAction.RETRY_AFTER, 4 * _DAY_S),
    ("mastercard", "28"): (AdviceAction.RETRY_AFTER, 6 * _DAY_S),
    ("mastercard", "29"): (AdviceAction.RETRY_AFTER, 8 * _DAY_S),
    ("mastercard", "30"): (AdviceAction.RETRY_AFTER, 10 * _DAY_S),
    ("visa", "1"): (AdviceAction.DO_NOT_RETRY, None),
}
"""Scheme and code to the action and, for RETRY_AFTER, the seconds to wait."""

AVS: Final[Mapping[str, AvsResult]] = {
    **dict.fromkeys("YDFM", AvsResult.FULL_MATCH),
    "X": AvsResult.FULL_MATCH_ZIP9,
    **dict.fromkeys("AB", AvsResult.ADDRESS_ONLY),
    **dict.fromkeys("ZP", AvsResult.POSTAL_CODE_ONLY),
    "W": AvsResult.ZIP9_ONLY,
    "N": AvsResult.NO_MATCH,
    "U": AvsResult.UNAVAILABLE,
    "R": AvsResult.RETRY,
    "S": AvsResult.UNSUPPORTED,
    **dict.fromkeys("GIC", AvsResult.GLOBAL_UNAVAILABLE),
}
CVV: Final[Mapping[str, CvvResult]] = {
    "M": CvvResult.MATCH,
    "N": CvvResult.NO_MATCH,
    "P": CvvResult.NOT_PROCESSED,
    "S": CvvResult.SHOULD_BE_PRESENT,
    "U": CvvResult.ISSUER_NOT_PARTICIPATING,
}


def advise(outcome: Outcome, scheme: str, advice_code: str) -> bool:
    """Put a network's advice into an outcome; False where there is none that is known."""
    known = ADVICE.get((scheme, advice_code))
    if known is None:
        return False
    outcome.advice_action, outcome.advice_retry_after_s = known
    outcome.advice_code, outcome.advice_scheme = advice_code, scheme
    return True


def outcome_of(raw: Callable[[str], object]) -> Outcome:
    """What a network said, from its raw codes by their names in `Outcome`, and `message`."""
    avs_code, cvv_code = values.text(raw("avs_code")), values.text(raw("cvv_code"))
    outcome = Outcome(
        connector_message=values.text(raw("message"), values.MESSAGE_LENGTH_MAX),
        advice_code=values.text(raw("advice_code")),
        advice_scheme=values.text(raw("advice_scheme")),
        avs_result=AVS.get(avs_code, AvsResult.UNSPECIFIED),
        avs_code=avs_code,
        cvv_result=CVV.get(cvv_code, CvvResult.UNSPECIFIED),
        cvv_code=cvv_code,
        auth_code=values.text(raw("auth_code")),
        network_transaction_id=values.text(raw("network_transaction_id")),
    )
    advise(outcome, outcome.advice_scheme, outcome.advice_code)
    return outcome
