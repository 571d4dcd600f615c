"""What one acquirer's host expects: a file in TOML, checked when it is read, and the codec it sets.

docs/connectors.md says how to write one.
"""

import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any, Final, Literal, cast

import iso8583
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from gateway.connectors.iso8583.currencies import NUMERIC_CODES
from gateway.connectors.iso8583.framing import LENGTH_BYTES_MAX, Framing
from gateway.connectors.iso8583.identity import RrnStyle
from gateway.connectors.schemes import NETWORK_CODES
from gateway.domain.model import ResponseCode

Fields = dict[str, str]
"""A message: `t`, its type (MTI), and its data elements by number."""

AMOUNT_MINOR_MAX: Final = 10**12 - 1
"""DE 4 has twelve digits."""

STANDARD_FORMATS: Final[Mapping[str, str]] = {
    str(number): text
    for numbers, text in (
        ("2", "n ..19"),
        ("3 11 12 73", "n 6"),
        ("4 5 6 82 83 84 85", "n 12"),
        ("7 74 75 76 77 78 79 80 81", "n 10"),
        ("8 9 10", "n 8"),
        ("13 14 15 16 17 18 71 72", "n 4"),
        ("19 20 21 22 23 24 49 68 69 70", "n 3"),
        ("25 26 67", "n 2"),
        ("27 66", "n 1"),
        ("28 29 30 31", "an 9"),
        ("32 33 99 100", "n ..11"),
        ("34", "ans ..28"),
        ("35", "ans ..37"),
        ("36", "ans ...104"),
        ("37", "an 12"),
        ("38", "an 6"),
        ("39 92", "an 2"),
        ("40 50 51", "an 3"),
        ("41", "ans 8"),
        ("42", "ans 15"),
        ("43", "ans 40"),
        ("44", "ans ..25"),
        ("45", "ans ..76"),
        ("46 47 48 55 56 57 58 59 60 61 62 63", "ans ...999"),
        ("52 64 96 128", "b 8"),
        ("53 86 87 88 89", "n 16"),
        ("54", "an ...120"),
        ("90", "n 42"),
        ("91", "an 1"),
        ("93", "an 5"),
        ("94", "an 7"),
        ("95", "an 42"),
        ("97", "an 17"),
        ("98", "ans 25"),
        ("101", "ans ..17"),
        ("102 103", "ans ..28"),
        ("104", "ans ...100"),
        (" ".join(str(number) for number in range(105, 128)), "ans ...999"),
    )
    for number in numbers.split()
}
"""The elements of ISO 8583:1987; the sign of an amount counts as a letter."""

SIGN_OFF_CODE: Final = "002"
"""DE 70 of a sign-off."""
CARD_DATA: Final = frozenset({"2", "34", "35", "36", "45", "52", "55"})
"""Elements that hold card numbers, tracks, PIN blocks and chip data: the gateway has none."""

MessageName = Literal[
    "authorize",
    "sale",
    "verify",
    "capture",
    "capture_more",
    "void",
    "refund",
    "increment",
    "reversal",
]
NetworkName = Literal["sign_on", "sign_off", "echo"]
Mti = Annotated[str, StringConstraints(pattern=r"^[01][1-8][0246][024]$")]
Number = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,2}$")]
Code = Annotated[str, StringConstraints(pattern=r"^[0-9A-Z]{2,3}$")]

_DIGITS: Final = "[0-9]+"
_ANY: Final = ".+"
VARIABLES: Final[Mapping[str, str]] = {
    "amount": "[0-9]{12}",
    "currency": "[0-9]{3}",
    "stan": "[0-9]{6}",
    "rrn": "[0-9A-Z]{12}",
    "transmission_time": "[0-9]{10}",
    "local_time": "[0-9]{6}",
    "local_date": "[0-9]{4}",
    "year": "[0-9]{2}",
    "terminal": _ANY,
    "merchant": _ANY,
    "acquirer": _DIGITS,
    "channel": _ANY,
    "reference": _ANY,
    "payment": _ANY,
    "token": _ANY,
    "original_mti": "[0-9]{4}",
    "original_stan": "[0-9]{6}",
    "original_time": "[0-9]{10}",
    "original_year": "[0-9]{2}",
    "original_rrn": "[0-9A-Z ]{0,12}",
    "original_auth_code": "[0-9A-Za-z]{0,6}",
    "original_amount": "[0-9]{12}",
    "remaining_amount": "[0-9]{12}",
}
"""What a field of a message may name as `$amount`, and what it looks like."""
_SAMPLE: Final = {
    **dict.fromkeys(VARIABLES, "0"),
    **dict.fromkeys(("amount", "original_amount", "remaining_amount"), "0" * 12),
    **dict.fromkeys(("transmission_time", "original_time"), "0" * 10),
    **dict.fromkeys(("stan", "original_stan", "local_time"), "0" * 6),
    **dict.fromkeys(("rrn", "original_rrn"), "0" * 12),
    **dict.fromkeys(("local_date", "original_mti"), "0" * 4),
    **dict.fromkeys(("year", "original_year"), "0" * 2),
    "currency": "0" * 3,
}
_OF_ORIGINALS: Final = frozenset(name for name in VARIABLES if "original" in name) | {
    "remaining_amount"
}
_FIRST: Final = frozenset({"authorize", "sale", "verify"})
_RELEASES: Final = frozenset({"void", "reversal"})
ANSWER_NAMES: Final = (
    "amount",
    "auth_code",
    "network_transaction_id",
    "reference",
    "avs_code",
    "cvv_code",
    "advice_code",
    "advice_scheme",
    "message",
)
"""What can be read from an answer beside DE 39, 37, 11 and 49."""

_FORMAT: Final = re.compile(
    r"(n|an|ans|a|b) ?(\.{0,4})([1-9][0-9]{0,3})(?: (ascii|cp500|cp1047|bcd))?"
)
_PLACE: Final = re.compile(r"([1-9][0-9]{0,2})(?::([1-9][0-9]{0,2})-([1-9][0-9]{0,2}))?")


class SpecificationError(ValueError):
    """A specification cannot be used; the text says why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Framing(_Model):
    length: Literal["binary", "ascii", "bcd"] = "binary"
    length_bytes: int = Field(2, ge=1, le=LENGTH_BYTES_MAX)
    length_includes_itself: bool = False
    length_includes_header: bool = True
    header: Annotated[str, StringConstraints(pattern=r"^([0-9A-Fa-f]{2})*$")] = ""
    frame_bytes_max: int = Field(8192, ge=64, le=1024 * 1024)


class _Encoding(_Model):
    text: Literal["ascii", "cp500", "cp1047"] = "ascii"
    mti: Literal["text", "bcd"] = "text"
    bitmap: Literal["hex", "binary"] = "hex"
    numeric: Literal["text", "bcd"] = "text"
    length: Literal["text", "bcd", "binary"] = "text"


class _Message(_Model):
    mti: Mti
    fields: dict[Number, str] = {}


class _Reversal(_Model):
    without_effect: list[Code] = []
    refuses_late_originals: bool


class _File(_Model):
    meaning: str
    code_scheme: str = "iso8583_1987"
    answer_timeout_s: float = Field(gt=0, le=120)
    repeats: bool
    rrn: RrnStyle
    currencies: list[str] = []
    match: list[Number] = ["11", "37", "41"]
    framing: _Framing
    encoding: _Encoding = _Encoding()
    fields: dict[Number, str] = {}
    common: dict[Number, str]
    channels: dict[str, str] = {}
    messages: dict[MessageName, _Message]
    network: dict[NetworkName, _Message] = {}
    answers: dict[str, str] = {}
    approved: list[Code] = Field(min_length=1)
    partially_approved: list[Code] = []
    uncertain: list[Code] = []
    rejected: list[Code] = []
    network_approved: list[Code] = Field(["00"], min_length=1)
    codes: dict[Code, str] = {}
    reversal: _Reversal


class _Format:
    """A data element's format in the standard's notation: `n 6`, `an 12`, `ans ..25`, `b 8`; where
    its encoding is not that of its kind, with its own: `n 6 ascii`, `n 6 bcd`.
    """

    def __init__(self, text: str) -> None:
        match = _FORMAT.fullmatch(text)
        if match is None:
            raise SpecificationError(f"{text!r} is no format, as `n 6`, `ans ...999` or `b 8`")
        self.kind, self.length_digits, self.size = match[1], len(match[2]), int(match[3])
        self.encoding = match[4]
        if self.encoding and (self.kind == "b" or (self.encoding == "bcd") > (self.kind == "n")):
            raise SpecificationError(f"{text!r} cannot be in {self.encoding}")

    def codec(self, encoding: _Encoding) -> dict[str, Any]:
        """As pyiso8583 wants it."""
        own = self.encoding
        is_bcd = own == "bcd" if own else encoding.numeric == "bcd"
        packed = self.kind == "b" or (self.kind == "n" and is_bcd)
        digits = self.length_digits
        compact = (digits + 1) // 2 if encoding.length == "bcd" else 1 + (self.size > 255)
        nibbles = packed and self.kind == "n"
        return {
            "data_enc": "b" if packed else (own or encoding.text),
            "len_enc": {"text": encoding.text, "bcd": "bcd", "binary": "b"}[encoding.length],
            "len_type": digits if encoding.length == "text" or not digits else compact,
            "max_len": self.size,
            **({"len_count": "nibbles", "left_pad": "0"} if nibbles else {}),
            "desc": "",
        }

    def put(self, text: str) -> str:
        """A value as long as the format says. Raises ValueError for one that does not fit."""
        if self.kind == "n" and not (text.isascii() and text.isdigit()):
            raise ValueError("no number")
        if not self.length_digits and self.kind != "b":
            text = text.zfill(self.size) if self.kind == "n" else text.ljust(self.size)
        if len(text) > self.size * (2 if self.kind == "b" else 1):
            raise ValueError("too long")
        return text

    def get(self, text: str) -> str:
        return text if self.kind in "nb" else text.rstrip()


class _Place:
    """Where an answer tells something: a data element, `44`, or a part of it, `44:1-2`."""

    def __init__(self, text: str) -> None:
        match = _PLACE.fullmatch(text)
        if match is None:
            raise SpecificationError(f"{text!r} is no place, as `38` or `44:1-2`")
        self.number = match[1]
        self.begin = int(match[2] or 1) - 1
        self.end = None if match[3] is None else int(match[3])

    def read(self, fields: Fields) -> str:
        return fields.get(self.number, "")[self.begin : self.end].strip()

    def write(self, fields: Fields, value: str) -> None:
        if self.end is None:
            fields[self.number] = value
            return
        present = fields.get(self.number, "").ljust(self.end)
        part = value[: self.end - self.begin].ljust(self.end - self.begin)
        fields[self.number] = present[: self.begin] + part + present[self.end :]


class Specification:
    """One acquirer's. Raises SpecificationError for one that contradicts itself."""

    def __init__(self, name: str, text: str) -> None:
        try:
            told = _File.model_validate(tomllib.loads(text))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()
            )
            raise SpecificationError(f"the specification {name}: {wrong}") from error
        except tomllib.TOMLDecodeError as error:
            raise SpecificationError(f"the specification {name}: {error}") from error
        except RecursionError:
            raise SpecificationError(f"the specification {name} is nested too deeply") from None
        self.name = name
        self.meaning = told.meaning
        self.code_scheme = told.code_scheme
        self.answer_timeout_s = told.answer_timeout_s
        self.repeats = told.repeats
        """A request that comes again as its repeat (the type's last digit 1), with the same
        numbers, is answered as the first and takes effect once."""
        self.rrn_style: RrnStyle = told.rrn
        self.currencies = told.currencies or sorted(NUMERIC_CODES)
        self.match = told.match
        self.framing = Framing(
            told.framing.length,
            told.framing.length_bytes,
            told.framing.length_includes_itself,
            bytes.fromhex(told.framing.header),
            told.framing.length_includes_header,
            told.framing.frame_bytes_max,
        )
        self.channels = told.channels
        self.messages: Mapping[MessageName, _Message] = {
            key: _Message(mti=one.mti, fields={**told.common, **one.fields})
            for key, one in told.messages.items()
        }
        """By name; `reversal` is always there."""
        self.network = told.network
        self.network_approved = tuple(told.network_approved)
        """The first one is what the gateway answers with."""
        self._network_numbers = {"7", "11", "70"}.union(*(m.fields for m in told.network.values()))
        self.approved = frozenset(told.approved) | set(told.partially_approved)
        self.partially_approved = frozenset(told.partially_approved)
        self.uncertain = frozenset(told.uncertain)
        """Codes that leave open whether the request took effect."""
        self.rejected = frozenset(told.rejected)
        self.reversal = told.reversal
        try:
            self._formats = {
                number: _Format(text)
                for number, text in {**STANDARD_FORMATS, **told.fields}.items()
            }
            self._places = {key: _Place(text) for key, text in told.answers.items()}
            self._codes = {**NETWORK_CODES, **{c: _response(n) for c, n in told.codes.items()}}
            self._check(told)
        except SpecificationError as error:
            raise SpecificationError(f"the specification {name}: {error}") from error
        self._codec = self._pyiso8583(told.encoding)
        for key, one in (*self.messages.items(), *self.network.items()):
            try:
                self.encode(self.build(one, _SAMPLE))
            except ValueError as error:
                raise SpecificationError(
                    f"the specification {name}: {key} cannot be written: {error}"
                ) from error

    def _pyiso8583(self, encoding: _Encoding) -> dict[str, dict[str, Any]]:
        fixed = {"len_enc": "ascii", "len_type": 0, "desc": ""}
        bitmap = (
            {"data_enc": "b", "max_len": 8}
            if encoding.bitmap == "binary"
            else {"data_enc": encoding.text, "max_len": 16}
        )
        mti = (
            {"data_enc": "b", "max_len": 2}
            if encoding.mti == "bcd"
            else {"data_enc": encoding.text, "max_len": 4}
        )
        return {
            "h": {**fixed, "data_enc": "b", "max_len": 0},
            "t": {**fixed, **mti},
            "p": {**fixed, **bitmap},
            "1": {**fixed, **bitmap},
            **{number: each.codec(encoding) for number, each in self._formats.items()},
        }

    def _check(self, told: _File) -> None:
        missing = {"authorize", "reversal"} - set(told.messages)
        if missing:
            raise SpecificationError(f"the message {missing.pop()!r} is missing")
        if "11" not in told.match:
            raise SpecificationError("DE 11 must be among what is matched")
        others = {*told.uncertain, *told.rejected, *told.reversal.without_effect}
        if others & {*told.approved, *told.partially_approved}:
            raise SpecificationError("a code is approved and something else")
        unknown = set(told.answers) - set(ANSWER_NAMES)
        if unknown:
            raise SpecificationError(f"answers tell no {unknown.pop()!r}")
        beyond = set(told.currencies) - set(NUMERIC_CODES)
        if beyond:
            raise SpecificationError(f"there is no currency {beyond.pop()!r}")
        for name, message in (*self.messages.items(), *self.network.items()):
            self._check_message(name, message)
        for place in self._places.values():
            self._require(place.number)

    def _check_message(self, name: str, message: _Message) -> None:
        needed = {"11", "7"} if name in self.network else {*self.match}
        absent = needed - set(message.fields) if name in self.messages else set()
        if absent:
            raise SpecificationError(f"{name} lacks DE {absent.pop()}, which answers are told by")
        for number, text in message.fields.items():
            self._require(number)
            if number in CARD_DATA:
                raise SpecificationError(f"{name} cannot have DE {number}, which is card data")
            template = Template(text)
            used = set(template.get_identifiers())
            allowed = set(VARIABLES) - ({"token"} if name not in _FIRST else _OF_ORIGINALS)
            if name not in _RELEASES:
                allowed -= {"remaining_amount"}
            if name in self.network:
                allowed = {"stan", "transmission_time", "local_time", "local_date", "year"}
            if not template.is_valid() or used - allowed:
                raise SpecificationError(f"{name} cannot have {text!r} in DE {number}")

    def _require(self, number: str) -> None:
        if number not in self._formats:
            raise SpecificationError(f"DE {number} has no format")

    # --- messages ---------------------------------------------------------------------------------

    def build(self, message: _Message, values: Mapping[str, str]) -> Fields:
        """A message; what would be empty is left out. Raises ValueError for what does not fit."""
        fields: Fields = {"t": message.mti}
        for number, text in message.fields.items():
            value = Template(text).substitute(values)
            if value:
                fields[number] = self._formats[number].put(value)
        return fields

    def encode(self, fields: Fields) -> bytes:
        """A message as bytes. Raises ValueError."""
        padded = {
            number: value if number == "t" else self._formats[number].put(value)
            for number, value in fields.items()
        }
        return bytes(iso8583.encode(padded, self._codec)[0])

    def decode(self, data: bytes) -> Fields:
        """A message from bytes. Raises ValueError, also for a data element without a format."""
        try:
            told, _ = iso8583.decode(data, self._codec)
        except KeyError as error:
            raise ValueError("a data element without a format") from error
        return {
            number: value if number == "t" else self._formats[number].get(value)
            for number, value in told.items()
            if number not in ("h", "p", "1")
        }

    def key(self, mti: str, fields: Fields) -> tuple[str, ...]:
        """What an answer of type `mti` and the fields of its request have in common."""
        return (mti, *(self._matched(number, fields) for number in self.match))

    def _matched(self, number: str, fields: Fields) -> str:
        value = fields.get(number, "")
        return self._formats[number].get(value)

    # --- network management -----------------------------------------------------------------------

    def network_answer(self, request: Fields) -> Fields:
        """The answer to a network management request of the other side."""
        answer: Fields = {"t": answer_mti(request["t"]), "39": self.network_approved[0]}
        numbers = self._network_numbers & request.keys()
        return answer | {number: request[number] for number in numbers}

    def is_sign_off(self, request: Fields) -> bool:
        """Whether the other side signs off: by what the gateway's own sign-off has, or DE 70."""
        message = self.network.get("sign_off")
        told = {} if message is None else message.fields
        fixed = {number: text for number, text in told.items() if "$" not in text}
        fixed = fixed or {"70": SIGN_OFF_CODE}
        return all(request.get(number) == text for number, text in fixed.items())

    # --- answers ----------------------------------------------------------------------------------

    def read(self, fields: Fields, name: str) -> str:
        """What an answer tells under one of ANSWER_NAMES; empty where it tells nothing."""
        place = self._places.get(name)
        return "" if place is None else place.read(fields)

    def write(self, fields: Fields, name: str, value: str) -> None:
        """The reverse, for a host; nothing where the specification has no place for it."""
        place = self._places.get(name)
        if place is not None and value:
            place.write(fields, value)

    def response_code(self, code: str) -> ResponseCode:
        """What DE 39 means."""
        if code in self.partially_approved:
            return ResponseCode.PARTIALLY_APPROVED
        if code in self.approved:
            return ResponseCode.APPROVED
        known = self._codes.get(code, ResponseCode.DECLINED_OTHER)
        is_refusal = known not in (ResponseCode.APPROVED, ResponseCode.PARTIALLY_APPROVED)
        return known if is_refusal else ResponseCode.DECLINED_OTHER

    # --- the host's side --------------------------------------------------------------------------

    def name_of(self, fields: Fields) -> MessageName | None:
        """Which message this is: of those with its type, the one with the most fixed fields."""
        found: dict[MessageName, int] = {}
        for name, message in self.messages.items():
            fixed = {n: text for n, text in message.fields.items() if "$" not in text}
            if message.mti == original_mti(fields["t"]) and all(
                self._matched(number, fields)
                == self._formats[number].get(self._formats[number].put(text))
                for number, text in fixed.items()
            ):
                found[name] = len(fixed)
        return max(found, key=found.__getitem__, default=None)

    def values_of(self, name: MessageName, fields: Fields) -> dict[str, str]:
        """The values that a message was built of, as far as it tells them."""
        values: dict[str, str] = {}
        for number, text in self.messages[name].fields.items():
            match = re.fullmatch(_pattern(text), fields.get(number, ""))
            if match is not None:
                values |= match.groupdict()
        return values


def _response(name: str) -> ResponseCode:
    """Raises SpecificationError."""
    try:
        return ResponseCode[name]
    except KeyError:
        raise SpecificationError(f"there is no response code {name!r}") from None


def _pattern(text: str) -> str:
    """A pattern that finds the variables of a field again."""
    parts = re.split(r"\$\{?([a-z_]+)\}?", text)
    return "".join(
        f"(?P<{part}>{VARIABLES[part]})" if index % 2 else re.escape(part)
        for index, part in enumerate(parts)
    )


def answer_mti(mti: str) -> str:
    """The type of the answer to a message: 0100 and its repeat 0101 have 0110, 1804 has 1814."""
    return f"{mti[:2]}{int(mti[2]) + 1}{int(mti[3]) & ~1}"


def repeat_mti(mti: str) -> str:
    """The type of a repeat: 0101 for 0100."""
    return f"{mti[:3]}{int(mti[3]) | 1}"


def original_mti(mti: str) -> str:
    """The reverse."""
    return f"{mti[:3]}{int(mti[3]) & ~1}"


def is_advice(mti: str) -> bool:
    """Whether the host has to take it, and takes it once however often it comes."""
    return mti[2] == "2"


def names() -> list[str]:
    """The specifications that come with the gateway."""
    folder = files("gateway.connectors.iso8583") / "specifications"
    return sorted(each.name.removesuffix(".toml") for each in folder.iterdir())


def load_specification(name: str) -> Specification:
    """One that comes with the gateway, by its name, or a file, by a path that ends in `.toml`.

    Raises SpecificationError.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return Specification(path.stem, path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SpecificationError(f"the specification {name} cannot be read") from error
    if name not in names():
        raise SpecificationError(f"no specification {name!r}; there are {', '.join(names())}")
    folder = files("gateway.connectors.iso8583") / "specifications"
    return Specification(name, cast("Path", folder / f"{name}.toml").read_text("utf-8"))
