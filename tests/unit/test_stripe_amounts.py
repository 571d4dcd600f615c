"""Amounts as Stripe writes them: exact, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.connectors.stripe.amounts import (
    EXPONENTS,
    RULES,
    STRIPE_AMOUNT_MAX,
    from_stripe,
    to_stripe,
)
from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS, is_currency


@pytest.mark.parametrize(
    ("amount_minor", "currency", "stripe"),
    [
        (1099, "USD", 1099),
        (500, "JPY", 500),
        (5, "ISK", 500),
        (5, "UGX", 500),
        (100, "MGA", 1),
        (5120, "KWD", 5120),
        (1045, "HUF", 1045),
        (80045, "TWD", 80045),
        (999_999_999_999, "EUR", 999_999_999_999),
        # What cannot be expressed.
        (5124, "KWD", None),
        (150, "MGA", None),
        (10**12, "EUR", None),
        (10**10, "ISK", None),
        (100, "CLF", None),
        (100, "IQD", None),
    ],
)
def test_amounts_follow_stripes_own_decimals(
    amount_minor: int, currency: str, stripe: int | None
) -> None:
    assert to_stripe(amount_minor, currency) == stripe
    if stripe is not None:
        assert from_stripe(stripe, currency) == amount_minor


@given(st.sampled_from(sorted(RULES)), st.integers(0, 10**12))
def test_every_amount_is_exact_or_refused(currency: str, amount_minor: int) -> None:
    stripe = to_stripe(amount_minor, currency)
    rule = RULES[currency]
    fits = amount_minor % rule.step_minor == 0 and amount_minor <= rule.amount_minor_max
    assert (stripe is not None) == fits
    if stripe is not None:
        assert stripe <= STRIPE_AMOUNT_MAX
        assert from_stripe(stripe, currency) == amount_minor


def test_currencies_differ_from_iso_4217_where_stripe_says_so_only() -> None:
    assert all(is_currency(code) for code in EXPONENTS)
    differing = {code for code in EXPONENTS if EXPONENTS[code] != CURRENCY_EXPONENTS[code]}
    assert differing == {"ISK", "MGA", "UGX"}


def test_fraction_that_iso_4217_has_not_is_no_amount() -> None:
    assert from_stripe(550, "ISK") is None
    assert from_stripe(100, "CLF") is None


def test_no_amount_is_taken_beyond_the_largest_that_a_request_may_carry() -> None:
    assert max(rule.amount_minor_max for rule in RULES.values()) == AMOUNT_MINOR_MAX
