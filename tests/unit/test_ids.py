"""gateway.domain.ids."""
# ruff: noqa: RUF001 - digits of other scripts are what is tested

import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain import ids
from gateway.domain.pan import contains_pan

KINDS: list[tuple[str, Callable[[], str], Callable[[str], bool]]] = [
    ("pay_", ids.new_payment_id, ids.is_payment_id),
    ("op_", ids.new_operation_id, ids.is_operation_id),
    ("mer_", ids.new_merchant_id, ids.is_merchant_id),
    ("org_", ids.new_organisation_id, ids.is_organisation_id),
    ("key_", ids.new_key_id, ids.is_key_id),
    ("req_", ids.new_request_id, ids.is_request_id),
]


@pytest.mark.parametrize(("prefix", "new", "check"), KINDS)
def test_an_id_is_its_prefix_and_a_uuid_of_version_7(
    prefix: str, new: Callable[[], str], check: Callable[[str], bool]
) -> None:
    made = new()
    assert made.startswith(prefix)
    inside = uuid.UUID(made.removeprefix(prefix))
    assert inside.hex == made.removeprefix(prefix)
    assert (inside.version, inside.variant) == (7, uuid.RFC_4122)
    assert check(made)


@pytest.mark.parametrize(("prefix", "new", "check"), KINDS)
def test_an_id_of_another_form_is_told(
    prefix: str, new: Callable[[], str], check: Callable[[str], bool]
) -> None:
    made = new()
    hexadecimal = made.removeprefix(prefix)
    wrong = ["", hexadecimal, made[:-1], made + "0", made + "\n", " " + made, made.upper()]
    wrong += [other + hexadecimal for other, _, _ in KINDS if other != prefix]
    wrong += [prefix + "g" * 32, prefix + "１" * 32]
    assert [text for text in wrong if check(text)] == []


def test_ids_are_distinct_and_sort_by_creation() -> None:
    made = [ids.new_payment_id() for _ in range(10_000)]
    assert made == sorted(set(made))


def test_no_generated_id_looks_like_a_card_number() -> None:
    assert not any(contains_pan(ids.new_payment_id()) for _ in range(100_000))


@given(st.text("0123456789", min_size=32, max_size=32), st.sampled_from(KINDS))
def test_even_an_id_of_digits_alone_looks_like_no_card_number(
    digits: str, kind: tuple[str, object, object]
) -> None:
    assert not contains_pan(kind[0] + digits)


@given(st.text("0123456789abcdef", min_size=32, max_size=32), st.sampled_from(KINDS))
def test_no_possible_id_looks_like_a_card_number(
    hexadecimal: str, kind: tuple[str, object, object]
) -> None:
    assert not contains_pan(kind[0] + hexadecimal)
    assert not contains_pan(f"{kind[0]}4111111111111111{hexadecimal[:15]}a")
