"""Prints a proto2 file's descriptor as `.proto` text, where only a descriptor is shipped.

It knows what such files hold in practice (messages, enums, oneofs, extensions, reserved and
extension ranges, options of any type) and nothing more. What it does not know it would leave out,
so its caller compiles the text and compares the result with the descriptor (`stubgen.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.message import Message

_INDENT = "  "
_FIELD_NUMBER_MAX = 2**29 - 1  # protobuf's language guide, Assigning Field Numbers
_ENUM_NUMBER_MAX = 2**31 - 1
_LABELS = {
    FieldDescriptorProto.LABEL_OPTIONAL: "optional",
    FieldDescriptorProto.LABEL_REQUIRED: "required",
    FieldDescriptorProto.LABEL_REPEATED: "repeated",
}


def print_file(file: FileDescriptorProto, dependencies: Iterable[FileDescriptorProto]) -> str:
    """Returns the text of `file`; `dependencies` are the files it imports, in any order.

    Raises:
        ValueError: the file is not of syntax proto2, the only one that is printed.
    """
    if file.syntax not in ("", "proto2"):
        msg = f"{file.name}: syntax {file.syntax} cannot be printed, only proto2"
        raise ValueError(msg)
    printer = _Printer(file, dependencies)
    return "\n".join(printer.file(file)) + "\n"


class _Printer:
    """Prints one file, with the options' extensions that the file itself defines."""

    def __init__(
        self, file: FileDescriptorProto, dependencies: Iterable[FileDescriptorProto]
    ) -> None:
        # A pool of its own: the file defines extensions of the options that its fields carry, and
        # in the default pool it may be absent or stand in another version.
        self._pool = descriptor_pool.DescriptorPool()
        for dependency in dependencies:
            self._pool.Add(dependency)
        self._pool.Add(file)

    def file(self, file: FileDescriptorProto) -> Iterator[str]:
        yield 'syntax = "proto2";'
        yield ""
        yield f"package {file.package};"
        yield ""
        yield from (f'import "{name}";' for name in file.dependency)
        yield ""
        yield from (f"option {option};" for option in self._options(file.options))
        for extension in file.extension:
            yield ""
            yield f"extend {extension.extendee} {{"
            yield _INDENT + self._field(extension)
            yield "}"
        for enum in file.enum_type:
            yield ""
            yield from self._enum(enum)
        for message in file.message_type:
            yield ""
            yield from self._message(message)

    def _message(self, message: DescriptorProto) -> Iterator[str]:
        yield f"message {message.name} {{"
        yield from _indented(f"option {o};" for o in self._options(message.options))
        for enum in message.enum_type:
            yield from _indented(self._enum(enum))
        for nested in message.nested_type:
            yield from _indented(self._message(nested))
        seen: set[int] = set()
        for field in message.field:
            if not field.HasField("oneof_index"):
                yield _INDENT + self._field(field)
            elif field.oneof_index not in seen:
                seen.add(field.oneof_index)
                yield from _indented(self._oneof(message, field.oneof_index))
        for extent in message.extension_range:  # the ends of both kinds of range are exclusive
            yield f"{_INDENT}extensions {_range(extent.start, extent.end - 1, _FIELD_NUMBER_MAX)};"
        for gap in message.reserved_range:
            yield f"{_INDENT}reserved {_range(gap.start, gap.end - 1, _FIELD_NUMBER_MAX)};"
        yield from (f'{_INDENT}reserved "{name}";' for name in message.reserved_name)
        yield "}"

    def _oneof(self, message: DescriptorProto, index: int) -> Iterator[str]:
        oneof = message.oneof_decl[index]
        yield f"oneof {oneof.name} {{"
        yield from _indented(f"option {o};" for o in self._options(oneof.options))
        for field in message.field:
            if field.HasField("oneof_index") and field.oneof_index == index:
                yield _INDENT + self._field(field, label=False)
        yield "}"

    def _enum(self, enum: EnumDescriptorProto) -> Iterator[str]:
        yield f"enum {enum.name} {{"
        yield from _indented(f"option {o};" for o in self._options(enum.options))
        for value in enum.value:
            yield f"{_INDENT}{value.name} = {value.number}{self._bracketed(value.options)};"
        for gap in enum.reserved_range:  # here, unlike in messages, the end is inclusive
            yield f"{_INDENT}reserved {_range(gap.start, gap.end, _ENUM_NUMBER_MAX)};"
        yield from (f'{_INDENT}reserved "{name}";' for name in enum.reserved_name)
        yield "}"

    def _field(self, field: FieldDescriptorProto, *, label: bool = True) -> str:
        type_name = field.type_name or FieldDescriptorProto.Type.Name(field.type)[5:].lower()
        prefix = f"{_LABELS[field.label]} " if label else ""
        options = self._bracketed(field.options)
        return f"{prefix}{type_name} {field.name} = {field.number}{options};"

    def _bracketed(self, options: Message) -> str:
        printed = list(self._options(options))
        return f" [{', '.join(printed)}]" if printed else ""

    def _options(self, options: Message) -> Iterator[str]:
        """Yields `name = value` for each option that is set, extensions in parentheses."""
        descriptor = self._pool.FindMessageTypeByName(options.DESCRIPTOR.full_name)
        known = message_factory.GetMessageClass(descriptor).FromString(options.SerializeToString())
        for field, value in known.ListFields():
            name = f"(.{field.full_name})" if field.is_extension else field.name
            for item in value if field.is_repeated else [value]:
                yield f"{name} = {_literal(field, item)}"


def _literal(field: FieldDescriptor, value: object) -> str:
    """Returns a value as protobuf's option syntax writes it; a message as an aggregate."""
    if isinstance(value, Message):
        return "{ " + text_format.MessageToString(value, as_one_line=True) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if field.enum_type is not None and isinstance(value, int):
        return field.enum_type.values_by_number[value].name
    return str(value)


def _range(start: int, last: int, largest: int) -> str:
    if start == last:
        return str(start)
    return f"{start} to {'max' if last == largest else last}"


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (_INDENT + line if line else line for line in lines)


def standard_dependencies(file: FileDescriptorProto) -> list[FileDescriptorProto]:
    """Returns the files that `file` imports, which must be protobuf's own well-known ones.

    Raises:
        KeyError: an imported file is not in the default descriptor pool.
    """
    found = []
    for name in file.dependency:
        descriptor = descriptor_pool.Default().FindFileByName(name)
        dependency = descriptor_pb2.FileDescriptorProto()
        descriptor.CopyToProto(dependency)
        found.append(dependency)
    return found
