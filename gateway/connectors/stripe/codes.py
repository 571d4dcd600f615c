"""Stripe's codes, normalised.

Sources: Stripe's "Decline codes", "Error codes" and "Card declines" (advice codes).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.domain.model import AdviceAction, AvsResult, CvvResult, ResponseCode

_R = ResponseCode

DECLINE_CODES: Final[Mapping[str, ResponseCode]] = MappingProxyType(
    {
        "approve_with_id": _R.REFER_TO_ISSUER,
        "authentication_required": _R.AUTHENTICATION_REQUIRED,
        "call_issuer": _R.REFER_TO_ISSUER,
        "card_decline_rate_limit_exceeded": _R.EXCEEDS_FREQUENCY_LIMIT,
        "card_not_supported": _R.NOT_PERMITTED,
        "card_velocity_exceeded": _R.EXCEEDS_FREQUENCY_LIMIT,
        "currency_not_supported": _R.NOT_PERMITTED,
        "do_not_honor": _R.DO_NOT_HONOR,
        "do_not_try_again": _R.DO_NOT_HONOR,
        "duplicate_transaction": _R.DECLINED_OTHER,
        "expired_card": _R.EXPIRED_CARD,
        "fraudulent": _R.SUSPECTED_FRAUD,
        "generic_decline": _R.DO_NOT_HONOR,
        "highest_risk_level": _R.SUSPECTED_FRAUD,
        "incorrect_address": _R.INVALID_PAYMENT_METHOD,
        "incorrect_cvc": _R.SECURITY_VIOLATION,
        "incorrect_number": _R.INVALID_CARD_NUMBER,
        "incorrect_pin": _R.WRONG_PIN,
        "incorrect_zip": _R.INVALID_PAYMENT_METHOD,
        "insufficient_funds": _R.INSUFFICIENT_FUNDS,
        "invalid_account": _R.INVALID_CARD_NUMBER,
        "invalid_amount": _R.INVALID_AMOUNT,
        "invalid_cvc": _R.SECURITY_VIOLATION,
        "invalid_expiry_month": _R.EXPIRED_CARD,
        "invalid_expiry_year": _R.EXPIRED_CARD,
        "invalid_number": _R.INVALID_CARD_NUMBER,
        "invalid_pin": _R.WRONG_PIN,
        "issuer_not_available": _R.ISSUER_UNAVAILABLE,
        "lost_card": _R.LOST_CARD,
        "merchant_blacklist": _R.SUSPECTED_FRAUD,
        "new_account_information_available": _R.INVALID_CARD_NUMBER,
        "no_action_taken": _R.DO_NOT_HONOR,
        "not_permitted": _R.NOT_PERMITTED,
        "offline_pin_required": _R.WRONG_PIN,
        "online_or_offline_pin_required": _R.WRONG_PIN,
        "payment_intent_authentication_failure": _R.AUTHENTICATION_REQUIRED,
        "pickup_card": _R.PICK_UP_CARD,
        "pin_try_exceeded": _R.EXCEEDS_FREQUENCY_LIMIT,
        "processing_error": _R.SYSTEM_MALFUNCTION,
        "reenter_transaction": _R.REENTER_TRANSACTION,
        "restricted_card": _R.RESTRICTED_CARD,
        "revocation_of_all_authorizations": _R.RESTRICTED_CARD,
        "revocation_of_authorization": _R.RESTRICTED_CARD,
        "security_violation": _R.SECURITY_VIOLATION,
        "service_not_allowed": _R.NOT_PERMITTED,
        "setup_intent_authentication_failure": _R.AUTHENTICATION_REQUIRED,
        "stolen_card": _R.STOLEN_CARD,
        "stop_payment_order": _R.RESTRICTED_CARD,
        "testmode_decline": _R.DECLINED_OTHER,
        "transaction_not_allowed": _R.NOT_PERMITTED,
        "try_again_later": _R.ISSUER_UNAVAILABLE,
        "withdrawal_count_limit_exceeded": _R.EXCEEDS_AMOUNT_LIMIT,
    }
)
"""`decline_code`, and the error's `code` where there is no decline code."""

ADVICE: Final[Mapping[str, AdviceAction]] = MappingProxyType(
    {
        "confirm_card_data": AdviceAction.RETRY_AFTER_INSTRUMENT_UPDATE,
        "do_not_try_again": AdviceAction.DO_NOT_RETRY,
        "try_again_later": AdviceAction.RETRY_LATER,
    }
)
"""`advice_code`."""
ADVISING: Final = frozenset({"do_not_try_again"})
"""Decline codes that are advice by themselves, where no other is told."""

AVS: Final[Mapping[tuple[str, str], AvsResult]] = MappingProxyType(
    {
        ("pass", "pass"): AvsResult.FULL_MATCH,
        ("fail", "fail"): AvsResult.NO_MATCH,
        ("unavailable", "unavailable"): AvsResult.UNAVAILABLE,
        **{("pass", other): AvsResult.ADDRESS_ONLY for other in ("fail", "unavailable", "")},
        **{(other, "pass"): AvsResult.POSTAL_CODE_ONLY for other in ("fail", "unavailable", "")},
    }
)
"""`address_line1_check` and `address_postal_code_check`; "" where a part was not checked."""

CVV: Final[Mapping[str, CvvResult]] = MappingProxyType(
    {
        "pass": CvvResult.MATCH,
        "fail": CvvResult.NO_MATCH,
        "unavailable": CvvResult.NOT_PROCESSED,
    }
)
"""`cvc_check`."""
