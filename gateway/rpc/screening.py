"""Tells most requests that break no rule of the contract from the rest, at a quarter of the cost.

protovalidate evaluates the rules, and alone says what a request breaks. Before its first rule it
encodes the message and decodes it again in another runtime; in a busy server an authorization took
it 78 microseconds (`docs/performance.md`). Nearly every request is right, and a function that is
written out from the same rules, in the descriptors, sees that sooner. Where it does not, or does
not know a rule, protovalidate decides.
https://protovalidate.com/reference/rules
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final, cast

from buf.validate import validate_pb2 as rules
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

Screen = Callable[[Any], bool]
"""Whether a message surely breaks no rule. False says nothing."""

_INTEGERS: Final = ("int32", "int64")
_KINDS: Final = ("string", "enum", *_INTEGERS)
_COMPARISONS: Final = {"gte": ">=", "gt": ">", "lte": "<=", "lt": "<"}

# What RE2, whose syntax the contract's patterns have, and `re` read alike: an anchor at each end
# and nowhere else, no escape but that of a point.
_PATTERN = re.compile(r"\^(?:[^\\$^]|\[\^|\\\.)*\$")

# What the Common Expression Language and Python read alike, but for the signs of three operators.
_EXPRESSION = re.compile(
    r"(?:!?has\(this(?:\.[a-z0-9_]+)+\)|this(?:\.[a-z0-9_]+)*|\d+|''|[=!<>]=|[<>]|&&|\|\||[()]|\s)+"
)
_HAS = re.compile(r"has\((this(?:\.[a-z0-9_]+)*)\.([a-z0-9_]+)\)")


class _UnknownRule(Exception):
    pass


@cache
def screen(message: Descriptor) -> Screen | None:
    """The function for messages of this kind; None where it could never be sure."""
    try:
        source, names = _Source().of(message)
    except _UnknownRule:
        return None
    exec(source, names)  # noqa: S102 (as `gateway.rpc.wire` makes its functions)
    return cast("Screen", names["is_surely_right"])


class _Source:
    """The source of one function, and what it names."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {}

    def of(self, message: Descriptor) -> tuple[str, dict[str, Any]]:
        lines = [line for field in message.fields for line in self._field(field)]
        lines += _whole(message)
        body = "\n    ".join([*lines, "return True"])
        return f"def is_surely_right(this):\n    {body}\n", self._names

    def _named(self, value: object) -> str:
        name = f"_{len(self._names)}"
        self._names[name] = value
        return name

    def _field(self, field: FieldDescriptor) -> list[str]:
        given = _given(field.GetOptions(), rules.field)
        message = field.message_type
        if message is not None and message.GetOptions().map_entry:
            return self._map(field, message, given)
        if field.is_repeated:
            _end(given)
            return [f"if this.{field.name}: return False"]
        if message is not None:
            return self._nested(field, message, given)
        conditions = self._conditions(given, "value", field.enum_type)
        if not conditions:
            return []
        condition = " and ".join(conditions)
        lines = [f"value = this.{field.name}", f"if not ({condition}): return False"]
        if field.has_presence:
            return [f"if this.HasField({field.name!r}):", *_indented(lines)]
        if eval(condition, self._names | {"value": field.default_value}):  # noqa: S307
            # Half of a request's fields are left out.
            lines[1:] = ["if value:", *_indented(lines[1:])]
        return lines

    def _nested(
        self, field: FieldDescriptor, message: Descriptor, given: dict[str, Any]
    ) -> list[str]:
        required = given.pop("required", False)
        conditions = [_translated(rule.expression, "value") for rule in given.pop("cel", ())]
        _end(given)
        nested = screen(message)
        conditions.append("False" if nested is None else f"{self._named(nested)}(value)")
        lines = [
            f"value = this.{field.name}",
            f"if not ({' and '.join(conditions)}): return False",
        ]
        if required:
            return [f"if not this.HasField({field.name!r}): return False", *lines]
        return [f"if this.HasField({field.name!r}):", *_indented(lines)]

    def _map(self, field: FieldDescriptor, entry: Descriptor, given: dict[str, Any]) -> list[str]:
        of_pairs = _fields(given.pop("map", None))
        _end(given)
        key, value = (entry.fields_by_name[name] for name in ("key", "value"))
        if value.message_type is not None:
            raise _UnknownRule(field.full_name)
        conditions = [
            *self._conditions(_fields(of_pairs.pop("keys", None)), "key", key.enum_type),
            *self._conditions(_fields(of_pairs.pop("values", None)), "value", value.enum_type),
        ]
        lines: list[str] = []
        if "max_pairs" in of_pairs:
            lines.append(f"if len(pairs) > {of_pairs.pop('max_pairs')}: return False")
        _end(of_pairs)
        if conditions:
            check = ["value = pairs[key]", f"if not ({' and '.join(conditions)}): return False"]
            lines += ["for key in pairs:", *_indented(check)]
        return [f"pairs = this.{field.name}", "if pairs:", *_indented(lines)] if lines else []

    def _conditions(
        self, given: dict[str, Any], value: str, enum: EnumDescriptor | None
    ) -> list[str]:
        """What a value that is no message has to be."""
        found: list[str] = []
        for kind, rule in given.items():
            if kind == "cel":
                found += [_translated(each.expression, value) for each in rule]
                continue
            if kind not in _KINDS:
                raise _UnknownRule(kind)
            for name, bound in _fields(rule).items():
                if kind == "string":
                    found.append(self._of_text(name, bound, value))
                elif kind in _INTEGERS and name in _COMPARISONS:
                    found.append(f"{value} {_COMPARISONS[name]} {bound}")
                elif kind == "enum" and enum is not None:
                    found.append(self._of_enum(name, bound, value, enum))
                else:
                    raise _UnknownRule(f"{kind}.{name}")
        return found

    def _of_text(self, name: str, bound: Any, value: str) -> str:
        if name == "pattern" and _PATTERN.fullmatch(bound):
            # `$` would match before a newline at the end, too.
            matches = re.compile(bound[:-1] + r"\Z").match
            return f"{self._named(matches)}({value}) is not None"
        if name == "min_len":
            return f"len({value}) >= {bound}"
        if name == "max_len":
            return f"len({value}) <= {bound}"
        if name == "in":
            return f"{value} in {self._named(frozenset(bound))}"
        raise _UnknownRule(f"string.{name}")

    def _of_enum(self, name: str, bound: Any, value: str, enum: EnumDescriptor) -> str:
        if name == "defined_only":
            return f"{value} in {self._named(frozenset(enum.values_by_number))}"
        if name == "not_in":
            return f"{value} not in {self._named(frozenset(bound))}"
        raise _UnknownRule(f"enum.{name}")


def _whole(message: Descriptor) -> Iterator[str]:
    """The rules of a message, and of its oneofs."""
    given = _given(message.GetOptions(), rules.message)
    for rule in given.pop("cel", ()):
        yield f"if not ({_translated(rule.expression, 'this')}): return False"
    _end(given)
    for oneof in message.oneofs:
        given = _given(oneof.GetOptions(), rules.oneof)
        if given.pop("required", False):
            yield f"if this.WhichOneof({oneof.name!r}) is None: return False"
        _end(given)


def _translated(expression: str, this: str) -> str:
    """An expression in Python. Raises _UnknownRule where it might mean something else there."""
    if not _EXPRESSION.fullmatch(expression):
        raise _UnknownRule(expression)
    python = _HAS.sub(r"\1.HasField('\2')", expression)
    python = re.sub(r"!(?!=)", "not ", python).replace("&&", " and ").replace("||", " or ")
    python = " ".join(re.sub(r"\bthis\b", this, python).split())
    for node in ast.walk(ast.parse(python, mode="eval")):
        if isinstance(node, ast.Compare) and len(node.ops) > 1:
            raise _UnknownRule(expression)  # Python would compare in a chain
    return f"({python})"


def _given(options: Message, extension: Any) -> dict[str, Any]:
    """The rules that options hold."""
    held = cast("Any", options)
    return _fields(held.Extensions[extension]) if held.HasExtension(extension) else {}


def _fields(message: Message | None) -> dict[str, Any]:
    return {} if message is None else {field.name: value for field, value in message.ListFields()}


def _end(left: dict[str, Any]) -> None:
    """Raises _UnknownRule where rules are left over."""
    if left:
        raise _UnknownRule(", ".join(left))


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
