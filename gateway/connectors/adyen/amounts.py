"""Amounts as Adyen writes them, where its minor units are not those of ISO 4217.

Source: Adyen's "Currency codes and minor units", which says of CLP, CVE, IDR and ISK that the
decimals of its table lead, not those of the standard.
"""

from collections.abc import Mapping
from typing import Final

from gateway.application.ports import AmountRule
from gateway.connectors.amounts import PspUnits

_TWO_DECIMALS = """
AED ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BWP BYN BZD CAD CHF CLP CNY COP CRC
CUP CZK DKK DOP DZD EGP ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF ILS INR ISK JMD
KES KGS KHR KYD KZT LAK LBP LKR MAD MDL MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK
NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD SAR SBD SCR SEK SGD SHP SLE SOS SRD STN SVC SZL THB TOP
TRY TTD TWD TZS UAH USD UYU UZS WST XCD YER ZAR ZMW
"""
# CVE and IDR have two, but are written without: their last two digits must be 00.
_NO_DECIMALS = "CVE DJF GNF IDR JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
_THREE_DECIMALS = "BHD IQD JOD KWD LYD OMR TND"

_UNITS: Final = PspUnits.of({0: _NO_DECIMALS, 2: _TWO_DECIMALS, 3: _THREE_DECIMALS})
EXPONENTS: Final[Mapping[str, int]] = _UNITS.exponents
"""The currencies that Adyen takes, to the number of decimals in its API."""
RULES: Final[Mapping[str, AmountRule]] = _UNITS.rules
"""Which amounts of each currency Adyen can express, in the minor units of ISO 4217."""

to_adyen = _UNITS.to_psp
from_adyen = _UNITS.from_psp
