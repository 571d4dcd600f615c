"""`make conformance` finds out what a published schema has otherwise."""

from __future__ import annotations

import pytest
from graphql import build_schema, print_schema

from tests.braintree_double import SCHEMA
from tests.conformance.braintree import check

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("ours", "theirs", "check_name", "complaint"),
    [
        (
            "input VoidTransactionInput",
            "input VoidInput",
            "input VoidTransactionInput",
            "not there",
        ),
        ("orderId: String", "orderId: Int", "input TransactionInput", "orderId is Int, not String"),
        ("legacyCode: ", "oldCode: ", "document AUTHORIZE", "legacyCode"),
    ],
)
def test_what_braintrees_schema_has_otherwise_is_found(
    ours: str, theirs: str, check_name: str, complaint: str
) -> None:
    text = print_schema(SCHEMA)
    assert ours in text
    same = check(SCHEMA, build_schema(text))
    assert same
    assert not any(same.values())
    name = ours.rpartition(" ")[2]
    changed = text.replace(ours, theirs)
    if ours.startswith("input"):
        changed = changed.replace(f"{name}!", f"{theirs.rpartition(' ')[2]}!")
    found = check(SCHEMA, build_schema(changed))
    assert complaint in found[f"the {check_name}"]
