"""The result of 3-D Secure that the merchant has done before, as connectors hand it on."""

from collections.abc import Mapping
from typing import NamedTuple

from gateway.application.ports import ConnectorRequest
from gateway.connectors.http import NotSent
from gateway.domain.errors import Reason


class Authentication(NamedTuple):
    """What the contract's `three_ds` says."""

    cavv: str
    """Base64; empty where nothing but an exemption is told."""
    transaction_id: str
    """The directory server's."""
    version: str
    eci: str
    exemption: str
    """The contract's name without `SCA_EXEMPTION_`; empty for none."""


def authentication_of(request: ConnectorRequest) -> Authentication | None:
    """None where a request has none. Raises NotSent for one of which a part is missing, and beside
    a method that is no card.
    """
    told = request.fields.get("three_ds")
    if not isinstance(told, Mapping):
        return None
    method = request.fields.get("payment_method")
    if isinstance(method, Mapping) and "redirect" in method:
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)

    def text(name: str) -> str:
        return str(told.get(name) or "")

    proof = text("cavv"), text("directory_server_transaction_id"), text("version")
    exemption = text("exemption").removeprefix("SCA_EXEMPTION_")
    authentication = Authentication(*proof, text("eci"), exemption)
    if any(proof) != all(proof) or not (any(proof) or exemption):
        raise NotSent(Reason.INVALID_REQUEST)
    return authentication
