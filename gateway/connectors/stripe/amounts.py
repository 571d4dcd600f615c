"""Amounts as Stripe writes them, where its minor units are not those of ISO 4217.

Source: Stripe's "Supported currencies" (zero-decimal currencies, three-decimal currencies, special
cases, maximum charge amounts).
"""

from collections.abc import Mapping
from typing import Final

from gateway.application.ports import AmountRule
from gateway.connectors.amounts import PspUnits

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

THREE_DECIMAL_STEP: Final = 10
"""The last digit of an amount in a three-decimal currency must be 0."""

_UNITS: Final = PspUnits.of(
    {0: _NO_DECIMALS, 2: _TWO_DECIMALS, 3: _THREE_DECIMALS},
    amount_max=STRIPE_AMOUNT_MAX,
    steps={3: THREE_DECIMAL_STEP},
)
EXPONENTS: Final[Mapping[str, int]] = _UNITS.exponents
"""The currencies that Stripe takes, to the number of decimals in its API."""
RULES: Final[Mapping[str, AmountRule]] = _UNITS.rules
"""Which amounts of each currency Stripe can express, in the minor units of ISO 4217."""

to_stripe = _UNITS.to_psp
from_stripe = _UNITS.from_psp
