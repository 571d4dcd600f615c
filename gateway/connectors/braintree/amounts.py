"""Amounts as Braintree's GraphQL API writes them: decimal text in major units.

Source: the schema's scalar `Amount` ("either a whole number or a number with exactly two or three
decimal places") and `TransactionInput.amount` ("must match the currency format of the merchant
account"). So every currency of ISO 4217 with 0, 2 or 3 decimals can be written; those with 4
cannot. Which of them an account takes is up to its merchant accounts.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.application.ports import AmountRule
from gateway.domain.money import (
    AMOUNT_MINOR_MAX,
    CURRENCY_EXPONENTS,
    MoneyError,
    exponent,
    from_decimal_string,
    to_decimal_string,
)

DECIMALS_MAX: Final = 3

RULES: Final[Mapping[str, AmountRule]] = MappingProxyType(
    {
        code: AmountRule()
        for code, decimals in sorted(CURRENCY_EXPONENTS.items())
        if decimals <= DECIMALS_MAX
    }
)
"""Which amounts of each currency Braintree can express, in the minor units of ISO 4217."""


def to_braintree(amount_minor: int, currency: str) -> str | None:
    """Minor units as decimal text; None where it cannot be expressed, or the currency is none."""
    if currency not in RULES or not 0 <= amount_minor <= AMOUNT_MINOR_MAX:
        return None
    return to_decimal_string(amount_minor, currency)


def from_braintree(text: object, currency: str) -> int | None:
    """Braintree's amount in minor units; None where it is none, or has more decimals than the
    currency, unless these are zeros.
    """
    if not isinstance(text, str):
        return None
    whole, _, fraction = text.partition(".")
    try:
        if fraction and not fraction[exponent(currency) :].strip("0"):
            fraction = fraction[: exponent(currency)]
            text = f"{whole}.{fraction}" if fraction else whole
        return from_decimal_string(text, currency)
    except MoneyError:
        return None
