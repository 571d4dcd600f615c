"""What a PSP says, as values that may be kept: bounded, printable, and without card numbers."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from gateway.domain.pan import PAN_DIGITS_MAX, SEPARATORS_MAX, contains_pan, mask_pans

CODE_LENGTH_MAX: Final = 64
MESSAGE_LENGTH_MAX: Final = 255
IDENTIFIER_LENGTH_MAX: Final = 128
URL_LENGTH_MAX: Final = 2048
CODE_DATA_LENGTH_MAX: Final = 2048
"""Of what a code says that is to be scanned; more fits into no such code."""
AMOUNT_ABS_MAX: Final = 2**50
"""No amount that a PSP reports may come near the end of int64, neither in the minor units of ISO
4217, which may be a hundred times as many, nor as a sum. It is a thousand of our largest ones."""
_BEYOND: Final = PAN_DIGITS_MAX * (1 + SEPARATORS_MAX)
"""The characters that a card number may take, all its separators among them."""

_EMPTY: Final[Mapping[str, Any]] = {}


def json_object(body: bytes) -> Mapping[str, Any]:
    """The object that a body is; empty where it is none."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _EMPTY
    return told if isinstance(told, dict) else _EMPTY


def part(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within an object; empty where there is none."""
    value = told.get(name)
    return value if isinstance(value, dict) else _EMPTY


def amount(value: object) -> int | None:
    """An integer; None for anything else, and for what no amount can be."""
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > AMOUNT_ABS_MAX:
        return None
    return value


def text(value: object, length_max: int = CODE_LENGTH_MAX) -> str:
    """A text, cut to its length; empty for anything else. A card number that the cut would go
    through is masked before it.
    """
    if not isinstance(value, str):
        return ""
    longer = "".join(filter(str.isprintable, value[: length_max + _BEYOND]))
    return mask_pans(longer)[:length_max]


def identifier(value: object) -> str:
    """The PSP's id, unchanged; empty where it has none that can be used."""
    if not isinstance(value, str) or len(value) > IDENTIFIER_LENGTH_MAX:
        return ""
    return value if value.isascii() and value.isprintable() else ""


def code_data(value: object) -> str:
    """What a code says, unchanged, as it has a checksum; empty where it cannot be kept so."""
    if not isinstance(value, str) or len(value) > CODE_DATA_LENGTH_MAX or not value.isprintable():
        return ""
    return "" if contains_pan(value) else value


def https_url(value: object) -> str:
    """An address to send a customer to; empty for any other."""
    if not isinstance(value, str) or len(value) > URL_LENGTH_MAX:
        return ""
    return value if value.startswith("https://") and value.isprintable() else ""


def instant(value: object) -> datetime | None:
    """A time given in seconds since 1970."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return datetime.fromtimestamp(value, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def instant_of_text(value: object) -> datetime | None:
    """A time in ISO 8601 with its offset, in UTC; at the ends of the calendar it may have none."""
    try:
        at = datetime.fromisoformat(text(value))
        return None if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
