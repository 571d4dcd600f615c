"""Functions that make and copy instances of dataclasses with slots, written out for each class.

In Python 3.11 a class that is called with keywords packs them into a dictionary and unpacks it
again: an operation costs twice as much by `Operation(...)` as by a function with the same
parameters, and five times as much by `dataclasses.replace` or `copy.copy` as by one assignment for
each field (`docs/performance.md`).
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, ParamSpec, TypeVar, cast

_P = ParamSpec("_P")
_T = TypeVar("_T")


def maker(cls: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that does what the constructor of a dataclass does, by the same parameters."""
    kind = cast("type[_T]", cls)
    names: dict[str, Any] = {"create": object.__new__, "cls": kind, "missing": object()}
    positional: list[str] = []
    named: list[str] = []
    lines: list[str] = []
    for each in _fields(kind):
        parameter, value = each.name, each.name
        if each.default_factory is not MISSING:
            names[f"make_{each.name}"] = each.default_factory
            parameter = f"{each.name}=missing"
            value = f"make_{each.name}() if {each.name} is missing else {each.name}"
        elif each.default is not MISSING:
            names[f"default_{each.name}"] = each.default
            parameter = f"{each.name}=default_{each.name}"
        (named if each.kw_only else positional).append(parameter)
        lines.append(f"    new.{each.name} = {value}\n")
    parameters = [*positional, *(["*"] if named else []), *named]
    return cast("Callable[_P, _T]", _function(", ".join(parameters), lines, names))


def copier(cls: type[_T]) -> Callable[[_T], _T]:
    """A function that copies an instance."""
    names: dict[str, Any] = {"create": object.__new__, "cls": cls}
    lines = [f"    new.{each.name} = value.{each.name}\n" for each in _fields(cls)]
    return cast("Callable[[_T], _T]", _function("value", lines, names))


def _fields(cls: type[Any]) -> "tuple[Field[Any], ...]":
    found = fields(cls)
    if hasattr(cls, "__post_init__") or not all(each.init for each in found):
        raise TypeError(f"{cls.__name__} is not made by its fields alone")
    return found


def _function(parameters: str, lines: list[str], names: dict[str, Any]) -> Any:
    source = f"def made({parameters}):\n    new = create(cls)\n{''.join(lines)}    return new\n"
    exec(source, names)  # noqa: S102 (as the module of dataclasses makes its methods)
    return names["made"]
