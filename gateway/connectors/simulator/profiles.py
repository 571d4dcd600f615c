"""The kinds of PSP that the simulator can be: what each remembers of a reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

KEY_VALIDITY_S: Final = 2.0
"""For how long the profile `key_2s` remembers a reference, in seconds after it was received."""

FIELDS: Final = frozenset(
    {
        "customer_id",
        "profile_id",
        "merchant_transaction_id",
        "merchant_order_id",
        "channel",
        "initiator",
        "stored_credential",
        "billing_address",
        "statement_descriptor",
        "statement_descriptor_suffix",
        "amount_details",
        "allow_partial_approval",
        "return_url",
    }
)
"""The fields that an authorization may carry beside the amount; with another one it is refused."""


class UnknownProfile(ValueError):
    """There is no simulator profile of this name."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a PSP does with a reference that it has seen before."""

    name: str
    meaning: str
    idempotent_by_reference: bool
    key_validity_s: float | None
    """For how long a reference is remembered, in seconds; None: for ever."""
    query_by_reference: bool
    cancel_by_reference: bool


PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                name="idempotent",
                meaning="remembers a reference for ever; query and cancel",
                idempotent_by_reference=True,
                key_validity_s=None,
                query_by_reference=True,
                cancel_by_reference=True,
            ),
            Profile(
                name="non_idempotent",
                meaning="a second send charges again, as bank hosts do; query and cancel",
                idempotent_by_reference=False,
                key_validity_s=None,
                query_by_reference=True,
                cancel_by_reference=True,
            ),
            Profile(
                name="key_2s",
                meaning="remembers a reference for 2 s, then charges again; query and cancel",
                idempotent_by_reference=True,
                key_validity_s=KEY_VALIDITY_S,
                query_by_reference=True,
                cancel_by_reference=True,
            ),
            Profile(
                name="no_query",
                meaning="remembers a reference for ever; no query, no cancel",
                idempotent_by_reference=True,
                key_validity_s=None,
                query_by_reference=False,
                cancel_by_reference=False,
            ),
            Profile(
                name="cancel_only",
                meaning="a second send charges again; no query, but cancel",
                idempotent_by_reference=False,
                key_validity_s=None,
                query_by_reference=False,
                cancel_by_reference=True,
            ),
        )
    }
)


def find_profile(name: str) -> Profile:
    """The profile of this name; raises UnknownProfile."""
    try:
        return PROFILES[name]
    except KeyError:
        known = ", ".join(PROFILES)
        raise UnknownProfile(f"no simulator profile {name!r}; there are {known}") from None
