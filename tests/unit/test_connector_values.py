"""What a PSP says is kept bounded, and without card numbers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from gateway.connectors import values
from gateway.connectors.adyen.amounts import EXPONENTS as OF_ADYEN
from gateway.connectors.adyen.amounts import from_adyen
from gateway.connectors.stripe.amounts import EXPONENTS as OF_STRIPE
from gateway.connectors.stripe.amounts import from_stripe

CARD = "4111111111111111"


@pytest.mark.parametrize("card", [CARD, " - ".join(CARD), "4111\r\n1111\r\n1111\r\n1111"])
@pytest.mark.parametrize("limit", [values.CODE_LENGTH_MAX, values.MESSAGE_LENGTH_MAX])
def test_a_card_number_is_masked_wherever_the_text_is_cut(card: str, limit: int) -> None:
    for before in range(limit - len(card) - 1, limit + 2):
        text = values.text(f"{'x' * before} {card} declined", limit)
        assert len(text) <= limit
        digits = "".join(filter(str.isdigit, text))
        assert len(digits) <= 4, before


def test_a_text_is_cut_to_its_length_and_what_is_none_is_empty() -> None:
    assert values.text("x" * 300) == "x" * values.CODE_LENGTH_MAX
    assert values.text("a\x00b\u200b") == "ab"
    assert values.text(None) == values.text(5) == ""


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"1", b"null", b"{", b'{"a": "\xff"}', b"\x1f\x8b\x08", b"<html>", b"[" * 9999],
)
def test_a_body_that_is_no_object_says_nothing(body: bytes) -> None:
    assert values.json_object(body) == {}


def test_a_part_that_is_no_object_says_nothing() -> None:
    told = {"object": {"a": 1}, "list": [1], "text": "a", "nothing": None}
    assert values.part(told, "object") == {"a": 1}
    for name in ("list", "text", "nothing", "missing"):
        assert values.part(told, name) == {}


@pytest.mark.parametrize("value", [None, True, False, "1", 1.0, [], {}, 2**63, -(2**63)])
def test_an_amount_is_an_integer_that_can_be_one(value: object) -> None:
    assert values.amount(value) is None


def test_an_id_is_kept_as_it_is_or_not_at_all() -> None:
    longest = "x" * values.IDENTIFIER_LENGTH_MAX
    for usable in ("pi_1", "a b/c?d", longest):
        assert values.identifier(usable) == usable
    for unusable in (None, 5, longest + "x", "a\nb", "\u00e9"):
        assert values.identifier(unusable) == ""


def test_what_a_code_says_is_kept_as_it_is_or_not_at_all() -> None:
    longest = "x" * values.CODE_DATA_LENGTH_MAX
    for usable in ("00020101021226890014br.gov.bcb.pix", longest):
        assert values.code_data(usable) == usable
    for unusable in (None, 5, longest + "x", "a\nb", f"pay {CARD}"):
        assert values.code_data(unusable) == ""


@pytest.mark.parametrize("value", [None, "5", True, 1e300, -1e300, 10**30])
def test_a_time_that_is_none_is_not_kept(value: object) -> None:
    assert values.instant(value) is None


def test_an_address_to_send_a_customer_to_is_one_printable_line() -> None:
    assert values.https_url("https://bank.example/a?b=c") == "https://bank.example/a?b=c"
    for other in ("http://bank.example", "https://bank.example/\r\nSet-Cookie: a", "https://\x00"):
        assert values.https_url(other) == ""
    assert values.https_url("https://" + "x" * values.URL_LENGTH_MAX) == ""
    assert values.https_url(None) == ""


def test_a_time_is_one_that_can_be_stored_or_none() -> None:
    assert values.instant_of_text("2026-11-21T01:00:00+01:00") == datetime(2026, 11, 21, tzinfo=UTC)
    for text in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-11-21T01:00:00"):
        assert values.instant_of_text(text) is None


def test_a_sum_of_the_largest_amounts_that_a_psp_can_report_stays_within_int64() -> None:
    largest = values.amount(values.AMOUNT_ABS_MAX)
    assert largest is not None
    assert values.amount(largest + 1) is None
    in_our_unit = [from_adyen(largest, currency) for currency in OF_ADYEN]
    in_our_unit += [from_stripe(largest, currency) for currency in OF_STRIPE]
    assert max(told for told in in_our_unit if told is not None) * 50 < 2**63
