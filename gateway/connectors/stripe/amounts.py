"""Amounts as Stripe writes them, where its minor units are not those of ISO 4217.

Source: Stripe's "Supported currencies" (zero-decimal currencies, three-decimal currencies, special
cases, maximum charge amounts).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gateway.application.ports import AmountRule
from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS

STRIPE_AMOUNT_MAX: Final = 999_999_999_999
"""Twelve digits, in Stripe's unit."""

_TWO_DECIMALS = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BWP BYN BZD CAD CDF CHF CNY COP
CRC CVE CZK DKK DOP DZD EGP ETB EUR FJD FKP GBP GEL GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR ISK
JMD KES KGS KHR KYD KZT LAK LBP LKR LRD LSL MAD MDL MKD MMK MNT MOP MUR MVR MWK MXN MYR MZN NAD NGN
NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SEK SGD SHP SLE SOS SRD SZL THB
TJS TOP TRY TTD TWD TZS UAH UGX USD UYU UZS WST XCD XCG YER ZAR ZMW
"""
# ISK and UGX have none left, but are written with two, which must be 00: so they stand above.
_NO_DECIMALS = "BIF CLP DJF GNF JPY KMF KRW MGA PYG RWF VND VUV XAF XOF XPF"
_THREE_DECIMALS = "BHD JOD KWD OMR TND"

EXPONENTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        code: decimals
        for decimals, codes in ((0, _NO_DECIMALS), (2, _TWO_DECIMALS), (3, _THREE_DECIMALS))
        for code in codes.split()
    }
)
"""The currencies that Stripe takes, to the number of decimals in its API."""

THREE_DECIMAL_STEP: Final = 10
"""The last digit of an amount in a three-decimal currency must be 0."""


def _factors(code: str) -> tuple[int, int]:
    """What an amount in minor units is multiplied by, and then divided by."""
    shift = EXPONENTS[code] - CURRENCY_EXPONENTS[code]
    return int(10 ** max(shift, 0)), int(10 ** max(-shift, 0))


def _rule(code: str) -> AmountRule:
    times, over = _factors(code)
    step = THREE_DECIMAL_STEP if EXPONENTS[code] == 3 else 1
    return AmountRule(step * over, min(STRIPE_AMOUNT_MAX // times * over, AMOUNT_MINOR_MAX))


RULES: Final[Mapping[str, AmountRule]] = MappingProxyType({code: _rule(code) for code in EXPONENTS})
"""Which amounts of each currency Stripe can express, in the minor units of ISO 4217."""


def to_stripe(amount_minor: int, currency: str) -> int | None:
    """The amount in Stripe's unit; None where it cannot be expressed, or the currency is none."""
    rule = RULES.get(currency)
    if rule is None or amount_minor % rule.step_minor or amount_minor > rule.amount_minor_max:
        return None
    times, over = _factors(currency)
    return amount_minor * times // over


def from_stripe(amount: int, currency: str) -> int | None:
    """Stripe's amount in minor units of ISO 4217; None where these cannot express it."""
    if currency not in EXPONENTS:
        return None
    times, over = _factors(currency)
    return None if amount % times else amount // times * over
