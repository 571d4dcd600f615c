"""Amounts as Adyen writes them: exact, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.connectors.adyen.amounts import EXPONENTS, RULES, from_adyen, to_adyen
from gateway.domain.money import CURRENCY_EXPONENTS, is_currency


@pytest.mark.parametrize(
    ("amount_minor", "currency", "adyen"),
    [
        (1099, "USD", 1099),
        (500, "JPY", 500),
        (5120, "KWD", 5120),
        (5121, "KWD", 5121),
        (5, "ISK", 500),
        (5, "CLP", 500),
        (500, "CVE", 5),
        (500, "IDR", 5),
        (10**12, "ISK", 10**14),
        # What cannot be expressed.
        (150, "CVE", None),
        (150, "IDR", None),
        (10**12 + 1, "EUR", None),
        (100, "CLF", None),
    ],
)
def test_amounts_follow_adyens_own_decimals(
    amount_minor: int, currency: str, adyen: int | None
) -> None:
    assert to_adyen(amount_minor, currency) == adyen
    if adyen is not None:
        assert from_adyen(adyen, currency) == amount_minor


@given(st.sampled_from(sorted(RULES)), st.integers(0, 10**12))
def test_every_amount_is_exact_or_refused(currency: str, amount_minor: int) -> None:
    adyen = to_adyen(amount_minor, currency)
    rule = RULES[currency]
    fits = amount_minor % rule.step_minor == 0 and amount_minor <= rule.amount_minor_max
    assert (adyen is not None) == fits
    if adyen is not None:
        assert from_adyen(adyen, currency) == amount_minor


def test_currencies_differ_from_iso_4217_where_adyen_says_so_only() -> None:
    assert all(is_currency(code) for code in EXPONENTS)
    differing = {code for code in EXPONENTS if EXPONENTS[code] != CURRENCY_EXPONENTS[code]}
    assert differing == {"CLP", "CVE", "IDR", "ISK"}


def test_fraction_that_iso_4217_has_not_is_no_amount() -> None:
    assert from_adyen(550, "ISK") is None
    assert from_adyen(100, "CLF") is None
