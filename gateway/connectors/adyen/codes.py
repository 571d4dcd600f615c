"""Adyen's codes, normalised.

Sources: Adyen's "Refusal reasons", "Raw responses" and "AVS" (address verification) and "CVC/CVV
result" pages.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.domain.model import AdviceAction, AvsResult, CvvResult, ResponseCode

_R = ResponseCode

_REFUSALS: Final = (
    ("2", "Refused", _R.DO_NOT_HONOR),
    ("3", "Referral", _R.REFER_TO_ISSUER),
    ("4", "Acquirer Error", _R.SYSTEM_MALFUNCTION),
    ("5", "Blocked Card", _R.RESTRICTED_CARD),
    ("6", "Expired Card", _R.EXPIRED_CARD),
    ("7", "Invalid Amount", _R.INVALID_AMOUNT),
    ("8", "Invalid Card Number", _R.INVALID_CARD_NUMBER),
    ("9", "Issuer Unavailable", _R.ISSUER_UNAVAILABLE),
    ("10", "Not supported", _R.NOT_PERMITTED),
    ("11", "3D Not Authenticated", _R.AUTHENTICATION_REQUIRED),
    ("12", "Not enough balance", _R.INSUFFICIENT_FUNDS),
    ("14", "Acquirer Fraud", _R.SUSPECTED_FRAUD),
    ("15", "Cancelled", _R.DECLINED_OTHER),
    ("16", "Shopper Cancelled", _R.DECLINED_OTHER),
    ("17", "Invalid Pin", _R.WRONG_PIN),
    ("18", "Pin tries exceeded", _R.EXCEEDS_FREQUENCY_LIMIT),
    ("19", "Pin validation not possible", _R.WRONG_PIN),
    ("20", "FRAUD", _R.SUSPECTED_FRAUD),
    ("21", "Not Submitted", _R.SYSTEM_MALFUNCTION),
    ("22", "FRAUD-CANCELLED", _R.SUSPECTED_FRAUD),
    ("23", "Transaction Not Permitted", _R.NOT_PERMITTED),
    ("24", "CVC Declined", _R.SECURITY_VIOLATION),
    ("25", "Restricted Card", _R.RESTRICTED_CARD),
    ("26", "Revocation Of Auth", _R.RESTRICTED_CARD),
    ("27", "Declined Non Generic", _R.DO_NOT_HONOR),
    ("28", "Withdrawal amount exceeded", _R.EXCEEDS_AMOUNT_LIMIT),
    ("29", "Withdrawal count exceeded", _R.EXCEEDS_FREQUENCY_LIMIT),
    ("31", "Issuer Suspected Fraud", _R.SUSPECTED_FRAUD),
    ("32", "AVS Declined", _R.INVALID_PAYMENT_METHOD),
    ("33", "Card requires online pin", _R.WRONG_PIN),
    ("34", "No checking account available on Card", _R.INVALID_CARD_NUMBER),
    ("35", "No savings account available on Card", _R.INVALID_CARD_NUMBER),
    ("36", "Mobile pin required", _R.AUTHENTICATION_REQUIRED),
    ("37", "Contactless fallback", _R.NOT_PERMITTED),
    ("38", "Authentication required", _R.AUTHENTICATION_REQUIRED),
    ("39", "RReq not received from DS", _R.AUTHENTICATION_REQUIRED),
    ("40", "Current AID is in Penalty Box", _R.NOT_PERMITTED),
    ("41", "CVM Required Restart Payment", _R.WRONG_PIN),
    ("42", "3DS Authentication Error", _R.AUTHENTICATION_REQUIRED),
    ("43", "Online PIN required", _R.WRONG_PIN),
    ("44", "Try another interface", _R.NOT_PERMITTED),
    ("45", "Chip downgrade mode", _R.NOT_PERMITTED),
    (
        "46",
        "Transaction blocked by Adyen to prevent excessive retry fees",
        _R.EXCEEDS_FREQUENCY_LIMIT,
    ),
)
REFUSALS: Final[Mapping[str, ResponseCode]] = MappingProxyType(
    {code: unified for code, _, unified in _REFUSALS}
)
"""`refusalReasonCode`."""
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {reason.casefold(): code for code, reason, _ in _REFUSALS}
)
"""`refusalReason`, in lower case, to its code: notifications tell no code."""

GENERIC: Final = frozenset({"2", "10", "23", "25", "27"})
"""Codes that say less than the network's own may: that one leads, where it is known."""

ADVICE: Final[Mapping[str, AdviceAction]] = MappingProxyType({"46": AdviceAction.DO_NOT_RETRY})
"""`refusalReasonCode` that is advice too."""

SCHEMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "mc": "mastercard",
        "maestro": "mastercard",
        "visa": "visa",
        "electron": "visa",
        "amex": "amex",
        "discover": "discover",
        "diners": "diners",
        "jcb": "jcb",
        "cup": "unionpay",
    }
)
"""`paymentMethod` of a card payment to the network's name."""

_A = AvsResult

AVS: Final[Mapping[str, AvsResult]] = MappingProxyType(
    {
        **dict.fromkeys(("7", "20", "24"), _A.FULL_MATCH),
        **dict.fromkeys(("1", "9", "12", "21", "25"), _A.ADDRESS_ONLY),
        **dict.fromkeys(("6", "14", "15", "19", "23"), _A.POSTAL_CODE_ONLY),
        **dict.fromkeys(("2", "10", "13", "16", "17", "26"), _A.NO_MATCH),
        **dict.fromkeys(("3", "8", "11", "18"), _A.UNAVAILABLE),
        "4": _A.UNSUPPORTED,
    }
)
"""The number that `avsResult` begins with."""

CVV: Final[Mapping[str, CvvResult]] = MappingProxyType(
    {
        "1": CvvResult.MATCH,
        "2": CvvResult.NO_MATCH,
        "3": CvvResult.NOT_PROCESSED,
        "4": CvvResult.SHOULD_BE_PRESENT,
        "5": CvvResult.ISSUER_NOT_PARTICIPATING,
    }
)
"""The number that `cvcResult` begins with."""
