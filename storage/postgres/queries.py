"""The statements of sql/*.sql by name, their named parameters turned into PostgreSQL's numbers.

A file holds sections that begin with `-- :name <name>` (a statement) or `-- :fragment <name>` (a
text that `{{name}}` brings into the sections of the same file). Parameters are written `:name`.
"""

import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncpg

_SECTION = re.compile(r"^-- :(name|fragment) (\w+)\n", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)
_INCLUDE = re.compile(r"\{\{(\w+)\}\}")
_PARAMETER = re.compile(r"(?<!:):([a-z_]+)")


@dataclass(frozen=True, slots=True)
class Query:
    """One statement."""

    name: str
    text: str
    """As PostgreSQL takes it."""
    parameters: tuple[str, ...]
    """The names of $1, $2, …"""

    def arguments(self, values: Mapping[str, object]) -> list[object]:
        """The values in the order of the parameters; raises KeyError for one that is missing."""
        return [values[name] for name in self.parameters]


def run(
    connection: "asyncpg.Connection[asyncpg.Record]", statement: Query, /, **values: object
) -> "Coroutine[Any, Any, list[asyncpg.Record]]":
    """The rows of a statement, its parameters given by name."""
    return connection.fetch(statement.text, *statement.arguments(values))


def query(file: str, name: str) -> Query:
    """The statement `name` of sql/`file`.sql; raises KeyError where there is none."""
    return queries(file)[name]


@cache
def queries(file: str) -> Mapping[str, Query]:
    """All statements of a file."""
    text = resources.files(__package__).joinpath("sql", f"{file}.sql").read_text("utf-8")
    _, *parts = _SECTION.split(text)
    sections = {
        (kind, name): _COMMENT.sub("", body).strip().removesuffix(";")
        for kind, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }

    def include(match: re.Match[str]) -> str:
        return _INCLUDE.sub(include, sections["fragment", match[1]])

    return {
        name: _number(name, _INCLUDE.sub(include, body))
        for (kind, name), body in sections.items()
        if kind == "name"
    }


def _number(name: str, text: str) -> Query:
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        return f"${numbers.setdefault(match[1], len(numbers) + 1)}"

    numbered = _PARAMETER.sub(number, text)
    return Query(name, numbered, tuple(numbers))
