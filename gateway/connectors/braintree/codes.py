"""Braintree's codes, normalised.

Sources: Braintree's "Authorization" and "Settlement" processor responses, the schema's
GatewayRejectionReason, AvsCvvResponseCode and CreditCardBrandCode, "Merchant advice codes".
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.domain.model import AdviceAction, AvsResult, CvvResult, ResponseCode

_R = ResponseCode

PARTIAL_APPROVAL: Final = "1004"
"""Approved for less than was asked for."""

PROCESSOR_CODES: Final[Mapping[str, ResponseCode]] = MappingProxyType(
    {
        "2000": _R.DO_NOT_HONOR,
        "2001": _R.INSUFFICIENT_FUNDS,
        "2002": _R.EXCEEDS_AMOUNT_LIMIT,
        "2003": _R.EXCEEDS_FREQUENCY_LIMIT,
        "2004": _R.EXPIRED_CARD,
        "2005": _R.INVALID_CARD_NUMBER,
        "2006": _R.EXPIRED_CARD,
        "2007": _R.INVALID_CARD_NUMBER,
        "2008": _R.INVALID_CARD_NUMBER,
        "2009": _R.INVALID_CARD_NUMBER,
        "2010": _R.SECURITY_VIOLATION,
        "2011": _R.REFER_TO_ISSUER,
        "2012": _R.LOST_CARD,
        "2013": _R.STOLEN_CARD,
        "2014": _R.SUSPECTED_FRAUD,
        "2015": _R.NOT_PERMITTED,
        "2016": _R.DECLINED_OTHER,
        "2017": _R.RESTRICTED_CARD,
        "2018": _R.RESTRICTED_CARD,
        "2019": _R.INVALID_TRANSACTION,
        "2020": _R.SECURITY_VIOLATION,
        "2021": _R.SECURITY_VIOLATION,
        "2022": _R.INVALID_CARD_NUMBER,
        "2023": _R.NOT_PERMITTED,
        "2024": _R.NOT_PERMITTED,
        "2025": _R.INVALID_MERCHANT,
        "2026": _R.INVALID_MERCHANT,
        "2027": _R.INVALID_AMOUNT,
        "2028": _R.INVALID_MERCHANT,
        "2029": _R.INVALID_PAYMENT_METHOD,
        "2030": _R.INVALID_MERCHANT,
        "2031": _R.SYSTEM_MALFUNCTION,
        "2033": _R.INVALID_TRANSACTION,
        "2034": _R.DO_NOT_HONOR,
        "2038": _R.DO_NOT_HONOR,
        "2040": _R.INVALID_MERCHANT,
        "2041": _R.REFER_TO_ISSUER,
        "2042": _R.INVALID_MERCHANT,
        "2043": _R.REFER_TO_ISSUER,
        "2044": _R.REFER_TO_ISSUER,
        "2045": _R.INVALID_MERCHANT,
        "2046": _R.DO_NOT_HONOR,
        "2047": _R.PICK_UP_CARD,
        "2048": _R.INVALID_AMOUNT,
        "2051": _R.INVALID_PAYMENT_METHOD,
        "2053": _R.LOST_CARD,
        "2056": _R.EXCEEDS_AMOUNT_LIMIT,
        "2057": _R.RESTRICTED_CARD,
        "2059": _R.INVALID_PAYMENT_METHOD,
        "2060": _R.SECURITY_VIOLATION,
        "2061": _R.INVALID_TRANSACTION,
        "2062": _R.INVALID_AMOUNT,
        "2064": _R.NOT_PERMITTED,
        "2074": _R.INVALID_PAYMENT_METHOD,
        "2075": _R.RESTRICTED_CARD,
        "2077": _R.SUSPECTED_FRAUD,
        "2086": _R.EXCEEDS_AMOUNT_LIMIT,
        "2093": _R.INVALID_PAYMENT_METHOD,
        "2097": _R.EXCEEDS_AMOUNT_LIMIT,
        "2098": _R.EXCEEDS_FREQUENCY_LIMIT,
        "2099": _R.AUTHENTICATION_REQUIRED,
        "2101": _R.AUTHENTICATION_REQUIRED,
        "2102": _R.WRONG_PIN,
        "2103": _R.EXCEEDS_FREQUENCY_LIMIT,
        "2107": _R.RESTRICTED_CARD,
        "2108": _R.INVALID_CARD_NUMBER,
        "3000": _R.ISSUER_UNAVAILABLE,
    }
)
"""`legacyCode` of a processor's response. Others of 2000 to 2999 are declines of their own, others
of 3000 to 3999 troubles of the processor's network."""

GATEWAY_REJECTIONS: Final[Mapping[str, ResponseCode]] = MappingProxyType(
    {
        "APPLICATION_INCOMPLETE": _R.INVALID_MERCHANT,
        "AVS": _R.INVALID_PAYMENT_METHOD,
        "AVS_AND_CVV": _R.SECURITY_VIOLATION,
        "CVV": _R.SECURITY_VIOLATION,
        "EXCESSIVE_RETRY": _R.EXCEEDS_FREQUENCY_LIMIT,
        "FRAUD": _R.SUSPECTED_FRAUD,
        "MANUAL_TRANSACTIONS_DISABLED": _R.NOT_PERMITTED,
        "PAYMENT_METHOD_BLOCKED": _R.RESTRICTED_CARD,
        "RISK_THRESHOLD": _R.SUSPECTED_FRAUD,
        "THREE_D_SECURE": _R.AUTHENTICATION_REQUIRED,
        "TOKEN_ISSUANCE": _R.INVALID_PAYMENT_METHOD,
        "TOO_MANY_CONFIRMATION_ATTEMPTS": _R.EXCEEDS_FREQUENCY_LIMIT,
        "UNION_PAY_ENROLLMENT_REQUIRED": _R.AUTHENTICATION_REQUIRED,
    }
)
"""`gatewayRejectionReason`, without DUPLICATE: that is no decline, but another transaction."""
DUPLICATE: Final = "DUPLICATE"

ADVICE: Final[Mapping[str, AdviceAction]] = MappingProxyType(
    {
        "HARD": AdviceAction.DO_NOT_RETRY,
        "SOFT": AdviceAction.RETRY_LATER,
    }
)
"""`declineType`, where the network advises nothing."""

BRANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "AMERICAN_EXPRESS": "amex",
        "DINERS": "diners",
        "DISCOVER": "discover",
        "JCB": "jcb",
        "MAESTRO": "mastercard",
        "MASTERCARD": "mastercard",
        "UNION_PAY": "unionpay",
        "VISA": "visa",
    }
)
"""`brandCode`, to the name of the network whose codes are told."""

AVS: Final[Mapping[tuple[str, str], AvsResult]] = MappingProxyType(
    {
        ("MATCHES", "MATCHES"): AvsResult.FULL_MATCH,
        ("DOES_NOT_MATCH", "DOES_NOT_MATCH"): AvsResult.NO_MATCH,
        ("NOT_VERIFIED", "NOT_VERIFIED"): AvsResult.UNAVAILABLE,
        ("SYSTEM_ERROR", "SYSTEM_ERROR"): AvsResult.RETRY,
        ("ISSUER_DOES_NOT_PARTICIPATE", "ISSUER_DOES_NOT_PARTICIPATE"): AvsResult.UNSUPPORTED,
        **{
            ("MATCHES", other): AvsResult.ADDRESS_ONLY
            for other in ("DOES_NOT_MATCH", "NOT_VERIFIED", "NOT_PROVIDED")
        },
        **{
            (other, "MATCHES"): AvsResult.POSTAL_CODE_ONLY
            for other in ("DOES_NOT_MATCH", "NOT_VERIFIED", "NOT_PROVIDED")
        },
    }
)
"""`avsStreetAddressResponse` and `avsPostalCodeResponse`."""

CVV: Final[Mapping[str, CvvResult]] = MappingProxyType(
    {
        "MATCHES": CvvResult.MATCH,
        "DOES_NOT_MATCH": CvvResult.NO_MATCH,
        "NOT_VERIFIED": CvvResult.NOT_PROCESSED,
        "NOT_PROVIDED": CvvResult.SHOULD_BE_PRESENT,
        "ISSUER_DOES_NOT_PARTICIPATE": CvvResult.ISSUER_NOT_PARTICIPATING,
    }
)
"""`cvvResponse`."""

UNTOLD: Final = frozenset({"NOT_APPLICABLE", "BYPASS"})
"""Nothing was checked."""


def response_code(processor_code: str) -> ResponseCode:
    """What a processor's code means."""
    known = PROCESSOR_CODES.get(processor_code)
    if known is not None:
        return known
    return _R.SYSTEM_MALFUNCTION if processor_code.startswith("3") else _R.DECLINED_OTHER
