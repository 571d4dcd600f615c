"""Money as integers of minor units under ISO 4217, with exact conversion to decimal text."""

import re
from dataclasses import dataclass
from typing import Final

AMOUNT_MINOR_MAX: Final = 10**12
"""The largest amount that a request may carry, in minor units; leaves sums far inside int64."""

# ISO 4217 list one, as of 2026: national currencies with two decimals. Left out: funds and
# supranational units (BOV, CHE, CHW, COU, MXV, USN, XDR, XSU, XUA), metals, XTS and XXX, and what
# the standard has withdrawn (ANG, BGN, CUC, HRK, SLL, ZWL among the latest).
_TWO_DECIMALS = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF
CNY COP CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL
HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT
MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB
SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH
USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG
"""
_NO_DECIMALS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_THREE_DECIMALS = "BHD IQD JOD KWD LYD OMR TND"
_FOUR_DECIMALS = "CLF UYW"

CURRENCY_EXPONENTS: Final[dict[str, int]] = {
    code: decimals
    for decimals, codes in (
        (0, _NO_DECIMALS),
        (2, _TWO_DECIMALS),
        (3, _THREE_DECIMALS),
        (4, _FOUR_DECIMALS),
    )
    for code in codes.split()
}
"""Active alphabetic code to the number of decimals of its minor unit (ISO 4217)."""

_DECIMAL = re.compile(r"(-?)([0-9]{1,18})(?:\.([0-9]{1,4}))?")


class MoneyError(ValueError):
    """An unknown currency, or text that is no exact amount of it."""


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in minor units of an ISO 4217 currency.

    Building one checks nothing, since amounts that a PSP reports must always be recordable;
    requests are checked where they enter.
    """

    amount_minor: int
    currency: str

    def __str__(self) -> str:
        return format_money(self)


def is_currency(code: str) -> bool:
    """Whether `code` is an active ISO 4217 alphabetic code, in upper case."""
    return code in CURRENCY_EXPONENTS


def exponent(currency: str) -> int:
    """The number of decimals of the currency's minor unit; MoneyError if it is unknown."""
    try:
        return CURRENCY_EXPONENTS[currency]
    except KeyError:
        raise MoneyError("not an active ISO 4217 currency code") from None


def to_decimal_string(amount_minor: int, currency: str) -> str:
    """Minor units as decimal text in major units: 1000 EUR is "10.00", 1000 JPY is "1000".

    Raises MoneyError for an unknown currency.
    """
    decimals = exponent(currency)
    if decimals == 0:
        return str(amount_minor)
    sign = "-" if amount_minor < 0 else ""
    digits = str(abs(amount_minor)).rjust(decimals + 1, "0")
    return f"{sign}{digits[:-decimals]}.{digits[-decimals:]}"


def from_decimal_string(text: str, currency: str) -> int:
    """Decimal text in major units as minor units, exactly: "10", "10.0", "10.00" EUR are 1000.

    Raises MoneyError for an unknown currency, for anything but plain ASCII digits with at most one
    point, and for more decimals than the currency has: nothing is ever rounded.
    """
    decimals = exponent(currency)
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise MoneyError("not a plain decimal number")
    sign, whole, fraction = match[1], match[2], match[3] or ""
    if len(fraction) > decimals:
        raise MoneyError(f"{currency} has {decimals} decimals")
    amount_minor = int(whole + fraction.ljust(decimals, "0"))
    return -amount_minor if sign else amount_minor


def format_money(money: Money) -> str:
    """For people: "10.00 EUR". Raises MoneyError for an unknown currency."""
    return f"{to_decimal_string(money.amount_minor, money.currency)} {money.currency}"
