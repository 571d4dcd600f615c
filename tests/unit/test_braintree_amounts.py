"""Amounts as Braintree writes them: exact decimal text, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.connectors.braintree.amounts import RULES, from_braintree, to_braintree
from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS


@pytest.mark.parametrize(
    ("amount_minor", "currency", "text"),
    [
        (1099, "USD", "10.99"),
        (5, "EUR", "0.05"),
        (500, "JPY", "500"),
        (5124, "KWD", "5.124"),
        (10**12, "EUR", "10000000000.00"),
        # What cannot be expressed.
        (1000, "CLF", None),
        (10**12 + 1, "EUR", None),
        (-1, "EUR", None),
        (100, "XXX", None),
    ],
)
def test_amounts_are_written_with_the_decimals_of_their_currency(
    amount_minor: int, currency: str, text: str | None
) -> None:
    assert to_braintree(amount_minor, currency) == text


@given(st.sampled_from(sorted(RULES)), st.integers(0, AMOUNT_MINOR_MAX))
def test_every_amount_comes_back_as_it_was(currency: str, amount_minor: int) -> None:
    text = to_braintree(amount_minor, currency)
    assert text is not None
    # The schema's Amount: a whole number, or exactly two or three decimals.
    assert len(text.partition(".")[2]) in (0, 2, 3)
    assert from_braintree(text, currency) == amount_minor


@pytest.mark.parametrize(
    ("text", "currency", "amount_minor"),
    [
        ("10", "EUR", 1000),
        ("10.000", "EUR", 1000),
        ("1000.00", "JPY", 1000),
        ("-1.00", "EUR", -100),
        ("10.001", "EUR", None),
        ("1000.50", "JPY", None),
        ("10.", "EUR", None),
        ("1e3", "EUR", None),
        ("1,000.00", "EUR", None),
        ("٣.00", "EUR", None),
        ("", "EUR", None),
        (10.0, "EUR", None),
        (None, "EUR", None),
        ("10.00", "", None),
    ],
)
def test_answers_amount_is_read_exactly_or_not_at_all(
    text: object, currency: str, amount_minor: int | None
) -> None:
    assert from_braintree(text, currency) == amount_minor


def test_only_currencies_with_four_decimals_cannot_be_written() -> None:
    assert CURRENCY_EXPONENTS.keys() - RULES.keys() == {"CLF", "UYW"}
