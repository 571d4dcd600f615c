"""Writes messages of the contract from the domain's values, by functions made from the descriptors.

protobuf's constructors look up every field by its name, those at their defaults too, and copy each
nested message. A function that is written out for one message costs half as much, and the bytes are
the same: fields in the order of their numbers, none at its default (proto3).
https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, Final, TypeAlias, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

Octets: TypeAlias = str
"""Encoded bytes as a text with a character for each of them (ISO 8859-1): a string that is ASCII,
as nearly all are, need not be encoded to become part of it."""
OCTETS: Final = "latin-1"
"""The codec from octets to bytes."""
VARINTS_KEPT: Final = 4096
"""Numbers below this are not encoded anew each time: the lengths of nearly all parts."""
HEADS_KEPT: Final = 128
"""Numbers and lengths below this are kept encoded behind the tag of their field."""
TIMES_CACHED_MAX: Final = 256
"""How many times are kept encoded: those of an operation and its payment are the same, and all of a
batch have the same intent's time."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_VARINT, _LENGTH_DELIMITED = 0, 2
_INTEGERS: Final = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
_NUMBERS: Final = (FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM, *_INTEGERS)
_TIMESTAMP: Final = Timestamp.DESCRIPTOR.full_name
_ALL_NUMBERS: Final = range(1, 2**29)
_NO_NAMES: Final[Mapping[str, str]] = MappingProxyType({})

# Seven bits, and the bit that says that more follow.
_MORE = tuple(chr(bits | 0x80) for bits in range(0x80))
_VARINTS = tuple(
    _MORE[number & 0x7F] + chr(number >> 7) if number >= 0x80 else chr(number)
    for number in range(VARINTS_KEPT)
)


def _varint(value: int) -> Octets:
    if not -(2**63) <= value < 2**63:
        raise ValueError("not a number of 64 bits")
    if value < 0:
        value += 2**64
    octets = ""
    while value >= VARINTS_KEPT:
        octets += _MORE[value & 0x7F]
        value >>= 7
    return octets + _VARINTS[value]


def _head(tag: Octets, number: int) -> Octets:
    """What stands before a part, or a whole number: a field's tag and a varint."""
    return tag + (_VARINTS[number] if 0 <= number < VARINTS_KEPT else _varint(number))


@cache
def _heads(tag: Octets) -> tuple[Octets, ...]:
    return tuple(_head(tag, number) for number in range(HEADS_KEPT))


_LENGTHS = tuple(each.encode(OCTETS) for each in _VARINTS)
_TAGS = tuple(bytes((field_number << 3 | _LENGTH_DELIMITED,)) for field_number in range(16))


def length_delimited(field_number: int, payload: bytes) -> bytes:
    """A field of bytes that are encoded already: a string or a message. Field numbers up to 15."""
    size = len(payload)
    length = _LENGTHS[size] if size < VARINTS_KEPT else _varint(size).encode(OCTETS)
    return _TAGS[field_number] + length + payload


def to_timestamp(at: datetime | None) -> Timestamp | None:
    """A time as a message."""
    if at is None:
        return None
    since = at - EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def octets_of(message: Message) -> Octets:
    """The octets of a message that protobuf encodes."""
    return message.SerializeToString().decode(OCTETS)


@lru_cache(maxsize=TIMES_CACHED_MAX)
def _timestamp(at: datetime) -> Octets:
    octets = octets_of(cast("Timestamp", to_timestamp(at)))
    return _VARINTS[len(octets)] + octets


def _utf8(text: str) -> Octets:
    return text.encode().decode(OCTETS)


def writer(
    message: type[Message],
    *given: str,
    of: type | None = None,
    names: Mapping[str, str] = _NO_NAMES,
    numbers: range = _ALL_NUMBERS,
) -> Callable[..., Octets]:
    """A function that writes the fields of `message` that have these numbers.

    Its arguments are an instance of `of`, a dataclass or another message, whose attributes have the
    fields' names or the ones that `names` gives, and then the fields in `given`, in that order: a
    string, a number, the octets of a message or None, or the octets of several messages. Raises
    TypeError where a field comes from neither.
    """
    attributes = _attributes(of)
    arguments = given if of is None else ("value", *given)
    lines = [f"def write({', '.join(arguments)}):"]
    pieces: list[str] = []
    variables: dict[str, Any] = {"head": _head, "utf8": _utf8, "timestamp": _timestamp}
    described = cast("Mapping[int, FieldDescriptor]", message.DESCRIPTOR.fields_by_number)
    for number, field in sorted(described.items()):
        if number not in numbers:
            continue
        attribute = names.get(field.name, field.name)
        if field.name in given:
            source = field.name
        elif attribute in attributes:
            source = f"value.{attribute}"
        else:
            raise TypeError(f"nothing tells {field.full_name}")
        tag = _varint(number << 3 | (_VARINT if field.type in _NUMBERS else _LENGTH_DELIMITED))
        variables |= {f"tag{number}": tag, f"heads{number}": _heads(tag)}
        statement, piece = _source(field, field.name in given)
        lines += statement.format(value=source, n=number, kept=HEADS_KEPT).splitlines()
        pieces.append(piece.format(value=source, n=number, kept=HEADS_KEPT))
    lines.append(f'return "".join(({", ".join(pieces)},))')
    exec("\n    ".join(lines), variables)  # noqa: S102 (as dataclasses makes its methods)
    return cast("Callable[..., Octets]", variables["write"])


def _attributes(of: type | None) -> set[str]:
    if of is None:
        return set()
    if issubclass(of, Message):
        return set(of.DESCRIPTOR.fields_by_name)
    return {each.name for each in fields(cast("Any", of))}


# The source that writes a field: statements, and the pieces that they make, empty where the field
# is not written: its head, a tag with a number or a length, and its part, what follows a length.
_HEAD = "head{n} = heads{n}[size] if size < {kept} else head(tag{n}, size)"
_HEAD_AND_PART = "head{n}, part{n}"
_TEXT = f"""\
part{{n}} = {{value}}
if part{{n}}:
    if not part{{n}}.isascii():
        part{{n}} = utf8(part{{n}})
    size = len(part{{n}})
    {_HEAD}
else:
    head{{n}} = part{{n}} = ""
"""
_MESSAGE = f"""\
part{{n}} = {{value}}
if part{{n}} is None:
    head{{n}} = part{{n}} = ""
else:
    size = len(part{{n}})
    {_HEAD}
"""
_MESSAGES = f"""\
part{{n}} = ""
for part in {{value}}:
    size = len(part)
    {_HEAD}
    part{{n}} += head{{n}} + part
"""
_TIME = "'' if {value} is None else tag{n} + timestamp({value})"
_SMALL = "heads{n}[{value}] if {value}{is_told} else ''"
_INTEGER = (
    "(heads{n}[number] if 0 <= number < {kept} else head(tag{n}, number))"
    " if (number := {value}){is_told} else ''"
)


def _source(field: FieldDescriptor, is_given: bool) -> tuple[str, str]:
    """The statements and the pieces of a field."""
    kind, message = field.type, field.message_type
    if kind in _NUMBERS and not field.is_repeated:
        is_told = " is not None" if field.has_presence else ""
        return "", (_INTEGER if kind in _INTEGERS else _SMALL).replace("{is_told}", is_told)
    if kind == FieldDescriptor.TYPE_STRING and not (field.is_repeated or field.has_presence):
        return _TEXT, _HEAD_AND_PART
    if kind == FieldDescriptor.TYPE_MESSAGE and is_given:
        return (_MESSAGES, "part{n}") if field.is_repeated else (_MESSAGE, _HEAD_AND_PART)
    if message is not None and message.full_name == _TIMESTAMP:
        return "", _TIME
    raise TypeError(f"{field.full_name} has to be given as octets")
