"""Braintree's documents against its published GraphQL schema, where somebody has put it.

Braintree publishes the schema in a repository, in no package registry, so that it is not fetched
here.
"""

from collections.abc import Iterator

from graphql import (
    GraphQLInputObjectType,
    GraphQLSchema,
    build_schema,
    parse,
    validate,
)

from gateway.connectors.braintree import documents
from tests.braintree_double import SCHEMA
from tests.conformance.mocks import DIRECTORY, print_found

PUBLISHED = DIRECTORY / "braintree.graphql"
SOURCE = "schema.graphql of the repository braintree/graphql-api"
LATER = {"has no apiRequestKey": "apiRequestKey (later than the repository's edition of 2025)"}
"""What the repository's schema lacks, and Braintree's reference has."""


def _differences(name: str, ours: GraphQLSchema, published: GraphQLSchema) -> Iterator[str]:
    """What the part of the schema that `make test` trusts has otherwise."""
    mine, other = ours.type_map[name], published.type_map.get(name)
    if not isinstance(mine, GraphQLInputObjectType):
        return
    if not isinstance(other, GraphQLInputObjectType):
        yield "is not there"
        return
    for field, told in mine.fields.items():
        if field not in other.fields:
            yield f"has no {field}"
        elif str(other.fields[field].type) != str(told.type):
            yield f"{field} is {other.fields[field].type}, not {told.type}"


def check(ours: GraphQLSchema, published: GraphQLSchema) -> dict[str, str]:
    """Each document and input to what the published schema has against it."""
    found = {
        f"the document {name}": "; ".join(
            error.message for error in validate(published, parse(text))
        )
        for name, text in sorted(vars(documents).items())
        if name[0].isupper() and name.isupper() and isinstance(text, str)
    }
    inputs = [name for name in ours.type_map if name.endswith("Input")]
    return found | {
        f"the input {name}": "; ".join(_differences(name, ours, published)) for name in inputs
    }


def report() -> int:
    """Run it and say what was found; how many checks are bad."""
    if not PUBLISHED.exists():
        print(f"NOT CHECKED: Braintree. Put {SOURCE}")
        print(f"at {PUBLISHED} to have its documents and inputs compared with it.")
        return 0
    found = check(SCHEMA, build_schema(PUBLISHED.read_text("utf-8")))
    more = "answers, keys and what comes of a request: a schema has none."
    return print_found("Braintree", found, LATER, more=more, by=SOURCE)
