"""gateway.domain.pan: what looks like a card number is found, and little else."""
# ruff: noqa: RUF001 - digits of other scripts are what is tested

import json
import random
import uuid
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.domain.pan import (
    ISSUER_RANGES,
    SEPARATORS_MAX,
    Match,
    contains_pan,
    find_pan,
    mask_pans,
)

# Published test numbers of schemes and PSPs.
TEST_NUMBERS = [
    "4111111111111111",
    "4222222222222",
    "4242424242424242",
    "5555555555554444",
    "2223003122003222",
    "378282246310005",
    "371449635398431",
    "6011111111111117",
    "6011000990139424",
    "3530111333300000",
    "30569309025904",
    "38520000023237",
    "36227206271667",
    "6200000000000005",
    "6759649826438453",
]


def luhn_ok(digits: str) -> bool:
    # Written by the standard's text, unlike the code's running sums.
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def completed(body: str) -> str:
    return next(body + check for check in "0123456789" if luhn_ok(body + check))


@st.composite
def pans(draw: st.DrawFn) -> str:
    """A number of any issuer range and length, with its check digit."""
    _scheme, first, last, lengths = draw(st.sampled_from(ISSUER_RANGES))
    prefix = str(draw(st.integers(int(first), int(last))))
    size = draw(st.sampled_from(lengths)) - 1 - len(prefix)
    return completed(prefix + draw(st.text("0123456789", min_size=size, max_size=size)))


gaps = st.text(" -", max_size=SEPARATORS_MAX)


@st.composite
def written_pans(draw: st.DrawFn) -> tuple[str, str]:
    """A number, and the same with spaces and dashes anywhere inside."""
    pan = draw(pans())
    cuts = draw(st.lists(gaps, min_size=len(pan) - 1, max_size=len(pan) - 1))
    return pan, pan[0] + "".join(gap + digit for gap, digit in zip(cuts, pan[1:], strict=True))


@pytest.mark.parametrize("pan", TEST_NUMBERS)
def test_published_test_numbers_are_found(pan: str) -> None:
    assert find_pan(pan) == Match(0, len(pan))
    assert find_pan(f"card {pan}.") == Match(5, 5 + len(pan))
    assert contains_pan(" ".join(pan[i : i + 4] for i in range(0, len(pan), 4)))


@pytest.mark.parametrize("row", ISSUER_RANGES, ids=lambda row: f"{row[0]} {row[1]}")
def test_every_length_of_every_issuer_range_is_found(
    row: tuple[str, str, str, tuple[int, ...]],
) -> None:
    _scheme, first, last, lengths = row
    for prefix in {first, last}:
        for length in lengths:
            assert contains_pan(completed(prefix.ljust(length - 1, "7")))


@given(pans())
def test_one_wrong_digit_hides_a_number_from_luhn(pan: str) -> None:
    wrong = pan[:-1] + str((int(pan[-1]) + 1) % 10)
    assert not contains_pan(wrong)


@given(written_pans())
def test_a_number_is_found_with_spaces_and_dashes_anywhere_inside(
    written: tuple[str, str],
) -> None:
    pan, text = written
    assert contains_pan(text)
    assert pan not in mask_pans(text)


@given(
    written_pans(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(list(" .,;:=/\"'()[]{}<>|_#&?\n\té卡")),
)
def test_a_number_is_found_inside_any_text(
    written: tuple[str, str], around: str, bound: str
) -> None:
    _pan, text = written
    # A bound before and after; what lies beyond may add tokens, never hide the number.
    assert contains_pan(f"{around}{bound}.{text}.{bound}{around}")


@given(written_pans())
def test_a_number_is_found_in_json_and_in_urls(written: tuple[str, str]) -> None:
    pan, text = written
    for carrier in (
        json.dumps({"n": text}),
        json.dumps({text: [1]}),
        json.dumps(json.dumps({"a": "line\n" + text})),
        f"https://shop.example/pay/{pan}?x=1",
        "https://shop.example/?" + urlencode({"a": "1", "card": text}),
        "https://shop.example/?card=" + quote(text),
        "https://shop.example/?next=" + quote(quote_plus("/?card=" + text)),
        "note=%20" + pan,
        f"tok_{pan}",
    ):
        assert contains_pan(carrier), carrier
        assert pan not in mask_pans(carrier)


@pytest.mark.parametrize(
    "text",
    [
        "４１１１１１１１１１１１１１１１",  # full width
        "٤١١١١١١١١١١١١١١١",  # Arabic-Indic
        "४१११ ११११ ११११ ११११",  # Devanagari
        "𝟒𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏",  # mathematical bold
        "④①①①①①①①①①①①①①①①",  # circled
        "4111\N{NO-BREAK SPACE}1111\N{THIN SPACE}1111\N{EN DASH}1111",
        "4111\N{MINUS SIGN}1111\N{NON-BREAKING HYPHEN}1111\N{EM DASH}1111",
        "4111\N{ZERO WIDTH SPACE}1111\N{SOFT HYPHEN}1111\N{WORD JOINER}1111",
        "卡号4111111111111111号",
        "\\u0034111111111111111",
        "%34%31%31%31%31%31%31%31%31%31%31%31%31%31%31%31",
        "4111%25201111%25201111%25201111",
    ],
)
def test_other_writings_of_digits_and_separators_are_read(text: str) -> None:
    assert contains_pan(text)
    assert mask_pans(text).count("*") == 12


@pytest.mark.parametrize("separator", [".", "_", "/", ":", ",", ", "])
@pytest.mark.parametrize(
    "groups",
    ["4111 1111 1111 1111", "3782 822463 10005", "3056 930902 5904", "4000 0000 0000 0000 006"],
)
def test_a_number_is_found_in_the_groups_of_a_card_whatever_divides_them(
    groups: str, separator: str
) -> None:
    pan, digits = groups.replace(" ", separator), groups.replace(" ", "")
    for text in (pan, f"card {pan}.", f'{{"a": "{pan}"}}', f"[{pan}]", f"a%3D{pan}\\n"):
        masked = mask_pans(text)
        assert masked == text.replace(pan, "*" * (len(digits) - 4) + digits[-4:])


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1111 12",
        "12 4111 1111 1111 1111",
        "12-34 4111-1111-1111-1111 56-78",
        "0 4111 1111 1111 1111 0000 0000 0000",
        "1 2 3 4 4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 5 6 7 8",
        "4111-1111-1111-1111-378282246310005",
        "20251121 4111111111111111 042133",
        "4111 1111 1111 1111 12ab",
        "ab12 4111 1111 1111 1111",
        "01a1fc51-3c07-75d5-9480-b250e158f699 4111111111111111",
    ],
)
def test_a_number_among_other_tokens_is_found(text: str) -> None:
    assert contains_pan(text)
    masked = mask_pans(text)
    assert not contains_pan(masked)
    assert "4111" not in masked


@pytest.mark.parametrize(
    "text",
    [
        "",
        "order-12345",
        "411111111111111",  # 15 digits, and visa has none
        "4111111111111112",  # Luhn
        "9999999999999995",  # Luhn, and no issuer
        "0000000000000000",
        "41111111111111110000",  # 20 digits are one token
        "a4111111111111111",
        "4111111111111111b",
        "x4111111111111111x",
        "1763700000000",  # milliseconds
        "1763700000000000000",  # nanoseconds
        "2025-11-21T04:21:33.123456789Z",
        "20251121042133",
        "+49 30 901820",
        "DE89 3704 0044 0532 0130 00",
        "4111.1111/1111.1111",
        "41.11.11.11.11.11.11.11",
        "411.111.111.111.111.1",
        "2026-11-30 05:12:34.123456",
        "10:19:34.123456789",
        "ipv4:192.168.10.10:50051",
        "4.242.424.242.424.242",
        "550e8400-e29b-41d4-a716-446655440000",
        "550e8400e29b41d4a716446655440000",
        "********1111",
    ],
)
def test_what_is_no_card_number_passes(text: str) -> None:
    assert find_pan(text) is None
    assert mask_pans(text) == text


def test_random_uuids_and_timestamps_pass() -> None:
    source = random.Random(20251121)
    for _ in range(20_000):
        bits = uuid.UUID(int=source.getrandbits(128), version=4)
        assert not contains_pan(str(bits)), bits
        assert not contains_pan(bits.hex), bits
        now_ns = source.randrange(1_700_000_000, 1_999_999_999) * 10**9 + source.randrange(10**9)
        for unit in (1, 10**3, 10**6, 10**9):
            assert not contains_pan(f"order-{now_ns // unit}"), now_ns


def test_a_uuid_shape_of_digits_alone_excuses_nothing() -> None:
    assert contains_pan("41111111-1111-1111-8111-111111111111")


@given(st.text("0123456789 -ab", max_size=60))
def test_detection_agrees_with_trying_every_window(text: str) -> None:
    assert contains_pan(text) == any(
        _is_written_pan(text, start, end)
        for start in range(len(text))
        for end in range(start + 13, len(text) + 1)
    )


def _is_written_pan(text: str, start: int, end: int) -> bool:
    inside = text[start:end]
    digits = inside.replace(" ", "").replace("-", "")
    longest_gap = max(map(len, "".join(" x"[c.isdigit()] for c in inside).split("x")))
    return (
        (digits.isdecimal() and digits.isascii() and 13 <= len(digits) <= 19)
        and inside[0].isdigit()
        and inside[-1].isdigit()
        and longest_gap <= SEPARATORS_MAX
        and (start == 0 or not text[start - 1].isalnum())
        and (end == len(text) or not text[end].isalnum())
        and luhn_ok(digits)
        and any(
            len(digits) in lengths and first <= digits[: len(first)] <= last
            for _scheme, first, last, lengths in ISSUER_RANGES
        )
    )


@example("6491112333638791009 00000000000")
@given(st.lists(pans() | st.text("0123456789abc .-", max_size=12), max_size=6).map(" ".join))
def test_masked_text_has_no_number_left_and_is_masked_once(text: str) -> None:
    masked = mask_pans(text)
    assert not contains_pan(masked)
    assert mask_pans(masked) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("pay 4111 1111 1111 1111 now", "pay ************1111 now"),
        ("5555555555554444,378282246310005", "************4444,***********0005"),
        ("a%3D4111%201111%201111%201111&b", "a%3D************1111&b"),
        ('{"a":"x\\n4111111111111111"}', '{"a":"x\\n************1111"}'),
    ],
)
def test_masking_keeps_the_last_four_digits_and_all_other_text(text: str, masked: str) -> None:
    assert mask_pans(text) == masked


def test_long_hostile_text_is_read_in_linear_time() -> None:
    # Tokens, runs and gaps that would make a backtracking search quadratic; it would not end.
    for text in (
        *("4 " * 200_000, "4" * 1_000_000 + "a", ("4" + " " * 5) * 100_000, "%25" * 300_000),
        *("4111." * 200_000, "4111, " * 200_000, "4111.1111.1111.1112." * 50_000),
        *("\\" * 1_000_000, "\\u" * 300_000, "\\u003" * 200_000, "%" * 1_000_000),
    ):
        mask_pans(text)
