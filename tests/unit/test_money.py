"""gateway.domain.money."""
# ruff: noqa: RUF001 - digits of other scripts are what is tested

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.money import (
    AMOUNT_MINOR_MAX,
    CURRENCY_EXPONENTS,
    Money,
    MoneyError,
    exponent,
    format_money,
    from_decimal_string,
    is_currency,
    to_decimal_string,
)

currencies = st.sampled_from(sorted(CURRENCY_EXPONENTS))
amounts = st.integers(-AMOUNT_MINOR_MAX, AMOUNT_MINOR_MAX)


@pytest.mark.parametrize(
    ("decimals", "codes"),
    [
        (0, "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"),
        (2, "EUR USD GBP CHF HUF TWD MGA MRU IDR XCD XCG ZWG"),
        (3, "BHD IQD JOD KWD LYD OMR TND"),
        (4, "CLF UYW"),
    ],
)
def test_exponents_are_those_of_iso_4217(decimals: int, codes: str) -> None:
    assert {code: exponent(code) for code in codes.split()} == dict.fromkeys(
        codes.split(), decimals
    )


def test_the_table_has_as_many_currencies_of_each_exponent_as_the_standard() -> None:
    counts = dict.fromkeys((0, 2, 3, 4), 0)
    for decimals in CURRENCY_EXPONENTS.values():
        counts[decimals] += 1
    assert counts == {0: 17, 2: 132, 3: 7, 4: 2}


@pytest.mark.parametrize(
    "code", ["", "eur", "EURO", "EU", "XXX", "XTS", "XAU", "XDR", "USN", "DEM", "HRK", "ZZZ", "978"]
)
def test_a_code_that_is_no_active_currency_is_refused(code: str) -> None:
    assert not is_currency(code)
    with pytest.raises(MoneyError):
        exponent(code)
    with pytest.raises(MoneyError):
        to_decimal_string(1, code)


@pytest.mark.parametrize(
    ("amount_minor", "currency", "text"),
    [
        (1000, "EUR", "10.00"),
        (5, "EUR", "0.05"),
        (0, "EUR", "0.00"),
        (-5, "EUR", "-0.05"),
        (1000, "JPY", "1000"),
        (1000, "KWD", "1.000"),
        (1, "CLF", "0.0001"),
        (AMOUNT_MINOR_MAX, "USD", "10000000000.00"),
    ],
)
def test_amounts_have_the_decimals_of_their_currency(
    amount_minor: int, currency: str, text: str
) -> None:
    assert to_decimal_string(amount_minor, currency) == text
    assert format_money(Money(amount_minor, currency)) == f"{text} {currency}"
    assert str(Money(amount_minor, currency)) == f"{text} {currency}"


@given(amounts, currencies)
def test_an_amount_survives_the_way_through_text(amount_minor: int, currency: str) -> None:
    text = to_decimal_string(amount_minor, currency)
    assert from_decimal_string(text, currency) == amount_minor
    assert Decimal(text) == Decimal(amount_minor).scaleb(-exponent(currency))


@given(st.integers(0, 10**9), currencies)
def test_missing_decimals_are_zeros(whole: int, currency: str) -> None:
    assert from_decimal_string(str(whole), currency) == whole * 10 ** exponent(currency)


@given(amounts, currencies, st.text("0123456789", min_size=1, max_size=4))
def test_more_decimals_than_the_currency_has_are_refused_and_never_rounded(
    amount_minor: int, currency: str, more: str
) -> None:
    text = to_decimal_string(amount_minor, currency)
    with pytest.raises(MoneyError):
        from_decimal_string(text + more if "." in text else f"{text}.{more}", currency)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        ".",
        "1.",
        ".5",
        "1,00",
        "1 000",
        "+1",
        "1e3",
        "NaN",
        "0x1",
        " 1",
        "1\n",
        "１",
        "1_0",
    ],
)
def test_text_that_is_no_plain_number_is_refused(text: str) -> None:
    with pytest.raises(MoneyError):
        from_decimal_string(text, "EUR")


def test_money_is_a_value() -> None:
    assert Money(1, "EUR") == Money(1, "EUR") != Money(1, "USD")
    assert len({Money(1, "EUR"), Money(1, "EUR")}) == 1
    with pytest.raises(AttributeError):
        Money(1, "EUR").amount_minor = 2  # type: ignore[misc]
