"""Finds and masks what looks like a card number (PAN, ISO/IEC 7812-1) in any text.

A card number here is 13 to 19 digits at token boundaries, with spaces and dashes allowed inside,
that pass the Luhn check (ISO/IEC 7812-1 annex B) and begin with an issuer prefix in use for that
length. Both conditions together keep order numbers and timestamps out.

Between groups as cards have them, 4-4-4-4 or 4-6-5, one of the characters . _ / : , may stand too,
and a space after it, the same each time: the parts of times, amounts and addresses are longer or
shorter.

A token is bounded by anything but an ASCII letter or digit. Unicode digits, spaces and dashes count
as their ASCII forms; percent-encoding and backslash escapes are read through. An RFC 9562 UUID in
its dashed form with a hex letter in it is no card number, though some of its digits may look so.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

PAN_DIGITS_MIN: Final = 13
PAN_DIGITS_MAX: Final = 19
SEPARATORS_MAX: Final = 4
"""The longest run of separators that may stand between two digits of one card number."""

_SIXTEEN_UP = tuple(range(16, PAN_DIGITS_MAX + 1))
_FOURTEEN_UP = tuple(range(14, PAN_DIGITS_MAX + 1))
_ANY = tuple(range(PAN_DIGITS_MIN, PAN_DIGITS_MAX + 1))

# (scheme, first prefix, last prefix, lengths), as the schemes publish them.
ISSUER_RANGES: Final[tuple[tuple[str, str, str, tuple[int, ...]], ...]] = (
    ("visa", "4", "4", (13, 16, 19)),
    ("mastercard", "51", "55", (16,)),
    ("mastercard", "2221", "2720", (16,)),
    ("american express", "34", "34", (15,)),
    ("american express", "37", "37", (15,)),
    ("discover", "6011", "6011", _SIXTEEN_UP),
    ("discover", "644", "649", _SIXTEEN_UP),
    ("discover", "65", "65", _SIXTEEN_UP),
    ("jcb", "3528", "3589", _SIXTEEN_UP),
    ("diners club", "300", "305", _FOURTEEN_UP),
    ("diners club", "3095", "3095", _FOURTEEN_UP),
    ("diners club", "36", "36", _FOURTEEN_UP),
    ("diners club", "38", "39", _FOURTEEN_UP),
    ("unionpay", "62", "62", _SIXTEEN_UP),
    ("unionpay", "81", "81", _SIXTEEN_UP),
    ("maestro", "50", "50", _ANY),
    ("maestro", "56", "69", _ANY),
    ("rupay", "508", "508", (16,)),
    ("rupay", "60", "60", (16,)),
    ("rupay", "65", "65", (16,)),
    ("rupay", "81", "82", (16,)),
    ("mir", "2200", "2204", _SIXTEEN_UP),
    ("elo", "4011", "4011", (16,)),
    ("elo", "5041", "5041", (16,)),
    ("elo", "5066", "5067", (16,)),
    ("elo", "5090", "5090", (16,)),
    ("elo", "6277", "6277", (16,)),
    ("elo", "6362", "6363", (16,)),
    ("elo", "6504", "6509", (16,)),
    ("elo", "6516", "6516", (16,)),
    ("elo", "6550", "6550", (16,)),
    ("troy", "9792", "9792", (16,)),
    ("humo", "9860", "9860", (16,)),
    ("uzcard", "8600", "8600", (16,)),
    ("napas", "9704", "9704", (16, 19)),
    ("uatp", "1", "1", (15,)),
)
"""Issuer prefixes in use: scheme, first and last prefix of the range, numbers of digits."""


@dataclass(frozen=True, slots=True)
class Match:
    """Where in the text a card number stands, as a half-open range; never its digits."""

    start: int
    end: int


def _lengths_by_prefix() -> list[tuple[int, ...]]:
    # One entry for each first four digits, so that a look-up is one index.
    table: list[set[int]] = [set() for _ in range(10_000)]
    for _scheme, first, last, lengths in ISSUER_RANGES:
        for prefix in range(int(first.ljust(4, "0")), int(last.ljust(4, "9")) + 1):
            table[prefix].update(lengths)
    return [tuple(sorted(lengths)) for lengths in table]


_LENGTHS = _lengths_by_prefix()
_DOUBLED = tuple(sum(divmod(2 * digit, 10)) for digit in range(10))

# "+" is a space in form-encoded text; line breaks because text is wrapped.
_GAP = rf"[ \t\r\n+\-]{{1,{SEPARATORS_MAX}}}"
# Necessary, not sufficient, and quick: so many digits and separators in a row.
_CANDIDATE = re.compile(rf"[0-9 \t\r\n+\-._/:,]{{{PAN_DIGITS_MIN}}}")
_GROUPED = re.compile(
    r"(?<![A-Za-z0-9])[0-9]{4}"
    r"(?:([._/:,] ?)(?:[0-9]{4}\1){2}[0-9]{1,7}(?:\1[0-9]{1,3})?|([._/:,] ?)[0-9]{6}\2[0-9]{4,5})"
    r"(?![A-Za-z0-9])"
)
_NOT_DIGITS = re.compile(r"[^0-9]")
_CHAIN = re.compile(rf"(?<![A-Za-z0-9])[0-9]+(?:{_GAP}[0-9]+)*(?![A-Za-z0-9])")
_TOKEN = re.compile(r"[0-9]+")
_UUID = re.compile(
    r"(?<![a-z0-9])(?=[0-9-]{0,35}[a-f])"
    r"[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}(?![a-z0-9])",
    re.IGNORECASE,
)
_UUID_BLANK = "\0" * 36
# %25 repeats where a URL was encoded more than once, a backslash where JSON was.
_ESCAPE = re.compile(
    # From the first backslash of a run alone: from each of them a long run would be read anew. What
    # comes before it is looked at behind it, so that the search can go by the first character.
    r"%(?:25)*([0-9A-Fa-f]{2})"
    r"|\\(?<!\\\\)\\*+(?:u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|[abfnrtv])"
)


def find_pan(text: str) -> Match | None:
    """The first card number in `text`, or None. Takes well under a microsecond for most text."""
    if len(text) < PAN_DIGITS_MIN:
        return None
    if text.isascii() and "%" not in text and "\\" not in text and _CANDIDATE.search(text) is None:
        return None
    found = next(_windows(text), None)
    return None if found is None else Match(found[0], found[1])


def contains_pan(text: str) -> bool:
    """Whether a card number stands anywhere in `text`."""
    return find_pan(text) is not None


def mask_pans(text: str) -> str:
    """`text` with every card number as asterisks and its last four digits (PCI DSS 3.4.1).

    Numbers that overlap are masked as one. The four digits that stay may look like another number
    together with those that follow: then these are masked too.
    """
    while find_pan(text) is not None:
        text = _mask_once(text)
    return text


def _mask_once(text: str) -> str:
    pieces: list[str] = []
    done = 0
    for start, end, digits in _merged(sorted(_windows(text))):
        pieces += text[done:start], "*" * (len(digits) - 4), digits[-4:]
        done = end
    pieces.append(text[done:])
    return "".join(pieces)


def _merged(windows: list[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    start, end, digits = windows[0]
    for next_start, next_end, next_digits in windows[1:]:
        if next_start >= end:
            yield start, end, digits
            start, end, digits = next_start, next_end, next_digits
        elif next_end > end:
            end, digits = next_end, next_digits
    yield start, end, digits


def _windows(text: str) -> Iterator[tuple[int, int, str]]:
    """Every card number in `text`, overlapping ones too: start, end, digits."""
    for view, offsets in _views(text):
        if _CANDIDATE.search(view) is None:
            continue
        spaced = _GROUPED.sub(_with_spaces, view)
        for chain in _CHAIN.finditer(_UUID.sub(_UUID_BLANK, spaced)):
            for start, end, digits in _windows_of_chain(chain):
                if offsets is None:
                    yield start, end, digits
                else:
                    yield offsets[start], offsets[end], digits


def _with_spaces(grouped: re.Match[str]) -> str:
    return _NOT_DIGITS.sub(" ", grouped[0])


def _windows_of_chain(chain: re.Match[str]) -> Iterator[tuple[int, int, str]]:
    # Any run of whole tokens may be the card number: "12 4111 1111 1111 1111 34".
    digits = "".join(_TOKEN.findall(chain[0]))
    if len(digits) < PAN_DIGITS_MIN:
        return
    starts: list[tuple[int, int]] = []
    end_of: dict[int, int] = {}
    index = 0
    for token in _TOKEN.finditer(chain.string, chain.start(), chain.end()):
        start, end = token.span()
        starts.append((index, start))
        index += end - start
        end_of[index] = end
    sums: tuple[list[int], list[int]] | None = None
    for first, start in starts:
        for length in _LENGTHS[int(digits[first : first + 4])]:
            last = first + length
            end = end_of.get(last, 0)
            if not end:
                continue
            if sums is None:
                sums = _luhn_sums(digits)
            of_last = sums[last & 1]
            if (of_last[last] - of_last[first]) % 10 == 0:
                yield start, end, digits[first:last]


def _luhn_sums(digits: str) -> tuple[list[int], list[int]]:
    """Running Luhn sums, so that every window costs two look-ups.

    The first list is for windows that end before an even index, the second before an odd one: the
    last digit of a window counts plain, the one before it doubled, and so on in turn.
    """
    values = list(map(int, digits))
    doubled = [_DOUBLED[value] for value in values]
    even, odd = doubled[:], values[:]
    even[1::2] = values[1::2]
    odd[1::2] = doubled[1::2]
    return list(accumulate(even, initial=0)), list(accumulate(odd, initial=0))


def _views(text: str) -> Iterator[tuple[str, list[int] | None]]:
    """The text with digits, spaces and dashes in ASCII; then, if it has escapes, read through them.

    The second view comes with the offset in `text` of each of its characters, and of its end.
    """
    yield _folded(text), None
    if "%" not in text and "\\" not in text:
        return
    pieces: list[str] = []
    offsets: list[int] = []
    done = 0
    for escape in _ESCAPE.finditer(text):
        code = escape[1] or escape[2] or escape[3]
        pieces += text[done : escape.start()], chr(int(code, 16)) if code else "\n"
        offsets += range(done, escape.start() + 1)
        done = escape.end()
    pieces.append(text[done:])
    offsets += range(done, len(text) + 1)
    yield _folded("".join(pieces)), offsets


def _folded(text: str) -> str:
    return text if text.isascii() else text.translate(_FOLD)


class _Fold(dict[int, int]):
    """Code point to the ASCII digit, space or dash that it stands for, filled as they are met."""

    def __missing__(self, code_point: int) -> int:
        character = chr(code_point)
        digit = unicodedata.digit(character, None)
        category = unicodedata.category(character)
        if digit is not None:
            folded = ord("0") + digit
        elif category == "Pd" or character == "\N{MINUS SIGN}":
            folded = ord("-")
        elif category in ("Zs", "Zl", "Zp", "Cf", "Mn", "Me"):
            # Zero-width characters and combining marks may stand between digits unseen.
            folded = ord(" ")
        else:
            return code_point  # not kept: text can hold a million of these
        self[code_point] = folded
        return folded


_FOLD = _Fold({code_point: code_point for code_point in range(128)})
