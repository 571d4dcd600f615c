"""What a payment costs at an account, exactly, and files that are refused."""

from __future__ import annotations

import datetime as dt

import pytest

from gateway.domain.model import Mode
from gateway.routing.costs import MICRO, Cost, CostBook, CostsRefused, parse_costs
from gateway.routing.model import Segment

FILE = """
[objective]
margin_percentage = "30"

[[fee]]
account = "acc_1"
currency = "EUR"
valid_until = 2026-07-01
percentage = "0.25"
fixed_minor = 5
attempt_minor = 2

[[fee.interchange]]
scheme = "visa"
issuer_countries = ["DE", "FR"]
percentage = "0.2"
cap_minor = 50

[[fee.interchange]]
percentage = "1.5"

[[fee]]
account = "acc_1"
currency = "EUR"
valid_from = 2026-07-01
percentage = "0.3"
"""
JUNE = dt.date(2026, 6, 30).toordinal()
VISA_DE = Segment("mer_1", Mode.LIVE, "card", "visa", "EUR", "DE")


def _micro(segment: Segment, amount_minor: int, day: int = JUNE) -> int:
    cost = parse_costs(FILE).of("acc_1", segment, amount_minor, day)
    assert cost is not None
    return cost.approval_micro


def test_a_fee_is_exact_to_the_millionth_of_a_minor_unit() -> None:
    cost = parse_costs(FILE).of("acc_1", VISA_DE, 999, JUNE)
    # 0.25 % and 0.2 % of 999, and 5: 2.4975 + 1.998 + 5.
    assert cost == Cost(attempt_micro=2 * MICRO, approval_micro=9_495_500)


def test_interchange_is_capped() -> None:
    assert _micro(VISA_DE, 100_000) == 250 * MICRO + 5 * MICRO + 50 * MICRO


def test_a_fee_and_its_interchange_have_a_least_amount() -> None:
    costs = parse_costs(
        '[[fee]]\naccount = "a"\ncurrency = "EUR"\npercentage = "1"\nfixed_minor = 2\n'
        'minimum_minor = 10\n[[fee.interchange]]\npercentage = "0.5"\nminimum_minor = 3\n'
        "cap_minor = 20\n"
    )
    told = {
        amount_minor: cost.approval_micro
        for amount_minor in (100, 700, 1000, 10_000)
        if (cost := costs.of("a", VISA_DE, amount_minor, JUNE)) is not None
    }
    assert told == {
        100: (10 + 3) * MICRO,
        700: 10 * MICRO + 3_500_000,  # 7 and 2 are less than 10
        1000: (12 + 5) * MICRO,
        10_000: (102 + 20) * MICRO,
    }


def test_interchange_is_that_of_the_cards_type_and_the_dearest_where_it_is_not_known() -> None:
    costs = parse_costs(
        '[[fee]]\naccount = "a"\ncurrency = "EUR"\n'
        '[[fee.interchange]]\ncard_type = "debit"\npercentage = "0.2"\n'
        '[[fee.interchange]]\ncard_type = "credit"\npercentage = "0.3"\n'
        '[[fee.interchange]]\npercentage = "1.5"\n'
    )
    percent: dict[str, float] = {}
    for card_type in ("debit", "credit", "commercial", ""):
        cost = costs.of("a", VISA_DE._replace(card_type=card_type), 1000, JUNE)
        assert cost is not None
        percent[card_type] = cost.approval_micro / (10 * MICRO)
    assert percent == {"debit": 0.2, "credit": 0.3, "commercial": 1.5, "": 1.5}


def test_what_a_payment_does_not_say_costs_the_dearest_that_may_fit() -> None:
    elsewhere = _micro(VISA_DE._replace(issuer_country="US"), 10_000)
    assert elsewhere == _micro(VISA_DE._replace(issuer_country=""), 10_000)
    assert elsewhere == 25 * MICRO + 5 * MICRO + 150 * MICRO
    assert _micro(VISA_DE, 10_000) < elsewhere


def test_a_fee_is_valid_from_its_first_day_to_the_day_before_the_last() -> None:
    assert _micro(VISA_DE, 1000, JUNE + 1) == 3 * MICRO
    assert _micro(VISA_DE, 1000, JUNE) != 3 * MICRO


def test_other_accounts_and_currencies_have_no_fee() -> None:
    costs = parse_costs(FILE)
    assert costs.of("acc_2", VISA_DE, 1000, JUNE) is None
    assert costs.of("acc_1", VISA_DE._replace(currency="USD"), 1000, JUNE) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fee = 1", "at most"),
        ("[[fees]]", "there is no `fees`"),
        ('[[fee]]\ncurrency = "EUR"', "`account`"),
        ('[[fee]]\naccount = "a"', "`currency` is missing"),
        ('[[fee]]\naccount = "a"\ncurrency = "eur"', "`currency`"),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\npercentage = 0.25', "a text"),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\npercentage = "0.00001"', "four decimals"),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\npercentage = "100.1"', "to"),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\nfixed_minor = 1.5', "whole"),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\nfixed_minor = -1', "at least 0"),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\nvalid_from = "2026"', "a date"),
        (
            (
                '[[fee]]\naccount = "a"\ncurrency = "EUR"\nvalid_from = 2026-01-02\n'
                "valid_until = 2026-01-02"
            ),
            "never valid",
        ),
        ('[[fee]]\naccount = "a"\ncurrency = "EUR"\n' * 2, "two fees"),
        (
            (
                '[[fee]]\naccount = "a"\ncurrency = "EUR"\n[[fee.interchange]]\n'
                '[[fee.interchange]]\nscheme = "visa"'
            ),
            "always fits first",
        ),
        (
            '[[fee]]\naccount = "a"\ncurrency = "EUR"\n[[fee.interchange]]\ncard_type = "gold"',
            "`card_type`",
        ),
        (
            '[[fee]]\naccount = "a"\ncurrency = "EUR"\n[[fee.interchange]]\nregion = "EU"',
            "there is no `region`",
        ),
        ("[objective]\nmargin_percentage = 30", "a text"),
        ("this is no TOML", "no TOML"),
        ("fee = " + "1" * 5000, "no TOML"),
        ("fee = " + "[" * 5000, "no TOML"),
        ('[[fee]]\naccount = "a"\ncurrency = "XXQ"', "ISO 4217"),
        (
            (
                '[[fee]]\naccount = "a"\ncurrency = "EUR"\n[[fee.interchange]]\n'
                "minimum_minor = 2\ncap_minor = 1"
            ),
            "below",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_place(text: str, told: str) -> None:
    with pytest.raises(CostsRefused, match=told):
        parse_costs(text)


def test_the_book_tells_the_day_in_utc() -> None:
    book = CostBook(lambda: dt.datetime(2026, 6, 30, 23, 59, tzinfo=dt.UTC).timestamp())
    assert book.today() == JUNE
