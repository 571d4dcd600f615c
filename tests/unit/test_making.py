"""gateway.domain.making: makers and copiers against what dataclasses do themselves."""

import inspect
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from gateway.application.commands import Authorize, make_authorize
from gateway.application.ports import (
    Change,
    ClaimResult,
    ConnectorRequest,
    make_change,
    make_claim_result,
    make_connector_request,
)
from gateway.domain.making import copier, maker
from gateway.domain.model import (
    Attempt,
    Operation,
    Payment,
    make_attempt,
    make_operation,
    make_payment,
)

MADE: list[tuple[Any, Any]] = [
    (Attempt, make_attempt),
    (Operation, make_operation),
    (Payment, make_payment),
    (Change, make_change),
    (ClaimResult, make_claim_result),
    (ConnectorRequest, make_connector_request),
    (Authorize, make_authorize),
]


@pytest.mark.parametrize(("cls", "make"), MADE)
def test_maker_takes_and_sets_what_the_constructor_does(cls: Any, make: Any) -> None:
    theirs, mine = (inspect.signature(each).parameters.values() for each in (cls, make))
    assert [(each.name, each.kind) for each in mine] == [(each.name, each.kind) for each in theirs]
    given = {each.name: object() for each in theirs}
    made = make(**given)
    assert type(made) is cls
    assert {name: getattr(made, name) for name in given} == given


@pytest.mark.parametrize(("cls", "make"), MADE)
def test_maker_leaves_the_rest_at_its_defaults(cls: Any, make: Any) -> None:
    parameters = inspect.signature(cls).parameters.values()
    needed = {each.name: each.name for each in parameters if each.default is each.empty}
    fresh = {each.name for each in fields(cls) if each.name == "begun_at"}  # a time of its own
    theirs, mine = cls(**needed), make(**needed)
    for each in fields(cls):
        if each.name not in fresh:
            assert getattr(mine, each.name) == getattr(theirs, each.name)
    with pytest.raises(TypeError):
        make()


def test_maker_makes_a_new_list_for_each() -> None:
    @dataclass(slots=True)
    class Box:
        items: list[int] = field(default_factory=list)

    make = maker(Box)
    make().items.append(1)
    assert make().items == []
    assert make([2]).items == [2]


def test_copy_is_equal_and_another() -> None:
    attempt = Attempt(1, "simulator", "acct_1")
    again = copier(Attempt)(attempt)
    assert again == attempt
    again.number = 2
    assert attempt.number == 1


def test_what_its_fields_alone_do_not_make_is_refused() -> None:
    @dataclass(slots=True)
    class Derived:
        length: int = field(init=False)

    @dataclass(slots=True)
    class Finished:
        length: int

        def __post_init__(self) -> None:
            self.length += 1

    for cls in (Derived, Finished):
        with pytest.raises(TypeError, match=cls.__name__):
            maker(cls)
        with pytest.raises(TypeError, match=cls.__name__):
            copier(cls)
