"""Adyen's codes, normalised.

Sources: Adyen's "Refusal reasons", "Raw responses" and "AVS" (address verification) and "CVC/CVV
result" pages.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.domain.model import AdviceAction, AvsResult, CvvResult, ResponseCode

_R = ResponseCode

REFUSALS: Final[Mapping[str, ResponseCode]] = MappingProxyType(
    {
        "2": _R.DO_NOT_HONOR,  # Refused
        "3": _R.REFER_TO_ISSUER,  # Referral
        "4": _R.SYSTEM_MALFUNCTION,  # Acquirer Error
        "5": _R.RESTRICTED_CARD,  # Blocked Card
        "6": _R.EXPIRED_CARD,  # Expired Card
        "7": _R.INVALID_AMOUNT,  # Invalid Amount
        "8": _R.INVALID_CARD_NUMBER,  # Invalid Card Number
        "9": _R.ISSUER_UNAVAILABLE,  # Issuer Unavailable
        "10": _R.NOT_PERMITTED,  # Not supported
        "11": _R.AUTHENTICATION_REQUIRED,  # 3D Not Authenticated
        "12": _R.INSUFFICIENT_FUNDS,  # Not enough balance
        "14": _R.SUSPECTED_FRAUD,  # Acquirer Fraud
        "15": _R.DECLINED_OTHER,  # Cancelled
        "16": _R.DECLINED_OTHER,  # Shopper Cancelled
        "17": _R.WRONG_PIN,  # Invalid Pin
        "18": _R.EXCEEDS_FREQUENCY_LIMIT,  # Pin tries exceeded
        "19": _R.WRONG_PIN,  # Pin validation not possible
        "20": _R.SUSPECTED_FRAUD,  # FRAUD
        "21": _R.SYSTEM_MALFUNCTION,  # Not Submitted
        "22": _R.SUSPECTED_FRAUD,  # FRAUD-CANCELLED
        "23": _R.NOT_PERMITTED,  # Transaction Not Permitted
        "24": _R.SECURITY_VIOLATION,  # CVC Declined
        "25": _R.RESTRICTED_CARD,  # Restricted Card
        "26": _R.RESTRICTED_CARD,  # Revocation Of Auth
        "27": _R.DO_NOT_HONOR,  # Declined Non Generic
        "28": _R.EXCEEDS_AMOUNT_LIMIT,  # Withdrawal amount exceeded
        "29": _R.EXCEEDS_FREQUENCY_LIMIT,  # Withdrawal count exceeded
        "31": _R.SUSPECTED_FRAUD,  # Issuer Suspected Fraud
        "32": _R.INVALID_PAYMENT_METHOD,  # AVS Declined
        "33": _R.WRONG_PIN,  # Card requires online pin
        "34": _R.INVALID_CARD_NUMBER,  # No checking account available on Card
        "35": _R.INVALID_CARD_NUMBER,  # No savings account available on Card
        "36": _R.AUTHENTICATION_REQUIRED,  # Mobile pin required
        "37": _R.NOT_PERMITTED,  # Contactless fallback
        "38": _R.AUTHENTICATION_REQUIRED,  # Authentication required
        "39": _R.AUTHENTICATION_REQUIRED,  # RReq not received from DS
        "40": _R.NOT_PERMITTED,  # Current AID is in Penalty Box
        "41": _R.WRONG_PIN,  # CVM Required Restart Payment
        "42": _R.AUTHENTICATION_REQUIRED,  # 3DS Authentication Error
        "43": _R.WRONG_PIN,  # Online PIN required
        "44": _R.NOT_PERMITTED,  # Try another interface
        "45": _R.NOT_PERMITTED,  # Chip downgrade mode
        "46": _R.EXCEEDS_FREQUENCY_LIMIT,  # blocked by Adyen to prevent excessive retry fees
    }
)
"""`refusalReasonCode`."""

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
