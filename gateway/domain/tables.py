"""Renders the tables of `gateway.domain.states` for people: as text, and as docs/states.md.

`python -m gateway.domain.tables > docs/states.md` writes the document anew.
"""

import ast
import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

from gateway.domain.model import OperationState, PaymentState
from gateway.domain.states import (
    EVENT_KINDS,
    FROZEN,
    MATRIX,
    OPERATION_TRANSITIONS,
    PAYMENT_TRANSITIONS,
    UNFINISHED,
    Beside,
    Event,
)

_BESIDE = {
    Beside.REFUSED: "no",
    Beside.ALLOWED: "yes",
    Beside.ALLOWED_IN_DOUBT: "in doubt",
    Beside.AS_CANCEL_REQUEST: "cancels it",
}

_BESIDE_MEANINGS = {
    Beside.REFUSED: "refused with `OPERATION_IN_PROGRESS`",
    Beside.ALLOWED: "it may start; it is still held to the amounts that are sure",
    Beside.ALLOWED_IN_DOUBT: "it may start where the unfinished one is `IN_DOUBT`",
    Beside.AS_CANCEL_REQUEST: (
        "accepted as `PENDING`, and carried out when the unfinished one has its outcome"
    ),
}

_INTRODUCTION = """\
# States

What is not in these tables is not allowed. They are data in `gateway/domain/states.py`, every
outcome that is written goes through them, and this document is made of them by
`python -m gateway.domain.tables`; `gateway states` prints the same.
"""

_OPERATIONS = """\
## Operations

An operation begins as `PROCESSING`. What may have been sent and has no answer is `IN_DOUBT`: no
timer ends a doubt, only an answer of the PSP or a reference that was made unusable there.
`NOT_SENT` is what surely had no effect, and the only state from which a repeat of the call executes
again; an authorization that a void cancelled before it took effect is `CANCELED` instead.
"""

_PAYMENTS = """\
## Payments

A payment shows how its authorization fares until that has succeeded; from then on its state follows
from its amounts. Captures, voids, refunds and increments that are unfinished do not change it. A
capture or refund that the bank returns late leads back.
"""

_MATRIX = """\
## What may run together

Whether the operation of a row may start while the one of a column has no definite outcome.
Operations with a definite outcome hinder nothing but by the amounts. `AUTHORIZE` and `VERIFY` begin
a payment, and a `REVERSAL` is begun by the gateway alone: they have no rows.
"""

_AMOUNTS = """\
Whatever the matrix says, a `MANUAL` payment takes one capture, and every amount is held to
`captured + capture_pending <= authorized` and `refunded + refund_pending <= captured`. No `REFUND`
starts beside a `VOID` that was asked for while an `AUTOMATIC` authorization was in flight: that
void gives the whole charge back.
"""


def text() -> str:
    """The tables as plain text, for a terminal."""
    lines = ["Operations", ""]
    lines += _columns(
        [("state", "event", "then")]
        + [
            (state.name, event.name + _only(state, event), after.name)
            for (state, event), after in OPERATION_TRANSITIONS.items()
        ]
    )
    lines += ["", "Payments", ""]
    lines += _columns(
        [("state", "then")]
        + [
            (state.name, ", ".join(_names(after)) or "-")
            for state, after in PAYMENT_TRANSITIONS.items()
        ]
    )
    lines += ["", "What may start (row) beside what is unfinished (column)", ""]
    lines += _columns(list(_matrix_rows()))
    lines += [""]
    lines += _columns(
        [
            (_BESIDE[beside], meaning.replace("`", ""))
            for beside, meaning in _BESIDE_MEANINGS.items()
        ]
    )
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The tables and the drawings in Markdown with Mermaid: docs/states.md."""
    parts = [
        _INTRODUCTION,
        _OPERATIONS,
        _mermaid(_operation_edges(), _names(UNFINISHED)),
        _table(
            ("State", *(_code(event.name) for event in Event)),
            (
                (_code(state.name), *(_after(state, event) for event in Event))
                for state in OperationState
                if any(before is state for before, _ in OPERATION_TRANSITIONS)
            ),
        ),
        "The other states are final. Moves that only some kinds of operation may make:\n\n"
        + "\n".join(
            f"- {_code(state.name)} on {_code(event.name)}: {_codes(kinds)}"
            for (state, event), kinds in EVENT_KINDS.items()
        )
        + "\n",
        _table(
            ("Event", "What happened"),
            ((_code(event.name), meaning) for event, meaning in _event_meanings()),
        ),
        f"Reserved amounts stay in {_codes(UNFINISHED)}.\n",
        f"The first answer is stored and replayed in {_codes(FROZEN)}.\n",
        _PAYMENTS,
        _mermaid(_payment_edges(), _names(UNFINISHED)),
        _table(
            ("State", "Then"),
            ((_code(s.name), _codes(after) or "–") for s, after in PAYMENT_TRANSITIONS.items()),
        ),
        _MATRIX,
        _table(*_split(list(_matrix_rows()))),
        "\n".join(
            f"- **{_BESIDE[beside]}**: {meaning}." for beside, meaning in _BESIDE_MEANINGS.items()
        )
        + "\n",
        _AMOUNTS,
    ]
    return "\n".join(parts)


# --- rows and edges -------------------------------------------------------------------------------


def _operation_edges() -> Iterator[tuple[str, str, str]]:
    yield "[*]", OperationState.PROCESSING.name, ""
    for (state, event), after in OPERATION_TRANSITIONS.items():
        yield state.name, after.name, event.name


def _payment_edges() -> Iterator[tuple[str, str, str]]:
    yield "[*]", PaymentState.PROCESSING.name, ""
    for state, after in PAYMENT_TRANSITIONS.items():
        for name in _names(after):
            yield state.name, name, ""


def _matrix_rows() -> Iterator[tuple[str, ...]]:
    columns = list(next(iter(MATRIX.values())))
    yield ("", *(kind.name for kind in columns))
    for new, beside in MATRIX.items():
        yield (new.name, *(_BESIDE[beside[kind]] for kind in columns))


def _event_meanings() -> Iterator[tuple[Event, str]]:
    """Each event with the docstring that stands under it in the source."""
    [definition] = ast.parse(inspect.getsource(Event)).body
    assert isinstance(definition, ast.ClassDef)
    for member, docstring in itertools.pairwise(definition.body):
        if isinstance(member, ast.Assign) and isinstance(docstring, ast.Expr):
            [target] = member.targets
            yield Event[ast.unparse(target)], ast.literal_eval(docstring.value)


def _after(state: OperationState, event: Event) -> str:
    after = OPERATION_TRANSITIONS.get((state, event))
    return "" if after is None else after.name


def _only(state: OperationState, event: Event) -> str:
    kinds = EVENT_KINDS.get((state, event))
    return "" if kinds is None else f" ({', '.join(_names(kinds))} only)"


# --- layout ---------------------------------------------------------------------------------------


def _names(members: Iterable[IntEnum]) -> list[str]:
    return [member.name for member in sorted(members)]


def _code(name: str) -> str:
    return f"`{name}`"


def _codes(members: Iterable[IntEnum]) -> str:
    return ", ".join(map(_code, _names(members)))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _split(rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head, *body = rows
    return tuple(cell and _code(cell) for cell in head), [(_code(row[0]), *row[1:]) for row in body]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mermaid(edges: Iterable[tuple[str, str, str]], inner: Sequence[str]) -> str:
    """A drawing in which the `inner` states form one; a way that all of them have is drawn once."""
    ways = list(edges)
    common = dict.fromkeys(
        (after, label)
        for _, after, label in ways
        if after not in inner and all((state, after, label) in ways for state in inner)
    )
    own = [way for way in ways if way[0] not in inner or way[1:] not in common]
    within = [way for way in own if way[0] in inner and way[1] in inner]
    lines = ["```mermaid", "stateDiagram-v2", '    state "no definite outcome" as UNFINISHED {']
    lines += [f"        {_way(*way)}" for way in within]
    lines += ["    }"]
    lines += [f"    {_way(*way)}" for way in own if way not in within]
    lines += [f"    {_way('UNFINISHED', *rest)}" for rest in common]
    return "\n".join([*lines, "```", ""])


def _way(before: str, after: str, label: str) -> str:
    # What is labelled like the state that it leads to needs no label.
    return f"{before} --> {after}" + (f": {label}" if label and label != after else "")


if __name__ == "__main__":
    sys.stdout.write(markdown())
