"""Who a caller is by its certificate: the SPIFFE ID of mutual TLS.

A SPIFFE ID is the one URI in the certificate's subject alternative names (X.509-SVID, section 2).
The server reads it from its own handshake, or, behind a proxy on loopback that terminates TLS, from
the header that Envoy writes. That header is what anyone can send: it is read only where the
settings say that none but the proxy can connect.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

FORWARDED_HEADER: Final = "x-forwarded-client-cert"
FORWARDED_CHARACTERS_MAX: Final = 8192
"""A longer header is not looked at."""
URI_CHARACTERS_MAX: Final = 2048
"""The longest SPIFFE ID (SPIFFE-ID, section 2.3)."""

Source = Literal["certificate", "forwarded"]

# SPIFFE-ID, sections 2.1 and 2.2; an ID without a path names a trust domain, not a workload.
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+")
# A pair of the header: key=value or key="value", with \" for " inside; then what stands after it.
_PAIR = re.compile(r'([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^",;]*))(;|,|$)')


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A caller's identity that its connection proved; of another type than what a caller sends."""

    uri: str
    """The SPIFFE ID."""


class Peer(Protocol):
    """What is used of a call's context."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        """The request's headers."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the handshake proved."""


class PeerIdentities:
    """Reads the identity of callers from one source."""

    def __init__(self, source: Source) -> None:
        self._forwarded = source == "forwarded"

    def of(self, peer: Peer) -> PeerIdentity | None:
        """The caller's identity, None where its certificate has none."""
        if not self._forwarded:
            # grpc-core tells it only where the certificate has exactly one URI, a SPIFFE ID.
            uris = [each.decode("ascii", "replace") for each in _proven(peer)]
        else:
            headers = [
                value
                for name, value in peer.invocation_metadata() or ()
                if name == FORWARDED_HEADER and isinstance(value, str)
            ]
            uris = forwarded_uris(headers[0]) if len(headers) == 1 else []
        if len(uris) != 1 or not is_spiffe_id(uris[0]):
            return None
        return PeerIdentity(uris[0])


def _proven(peer: Peer) -> Iterable[bytes]:
    return peer.auth_context().get("peer_spiffe_id", ())


def is_spiffe_id(text: str) -> bool:
    """Whether a text is the SPIFFE ID of a workload."""
    return len(text) <= URI_CHARACTERS_MAX and _SPIFFE_ID.fullmatch(text) is not None


def forwarded_uris(header: str) -> list[str]:
    """The URIs of the client's certificate by `x-forwarded-client-cert`.

    None where the header is damaged, or speaks of more than one certificate: a proxy that appends
    instead of replacing would hand on what its client wrote.
    """
    if len(header) > FORWARDED_CHARACTERS_MAX:
        return []
    uris: list[str] = []
    at = 0
    while at < len(header):
        pair = _PAIR.match(header, at)
        if pair is None or pair[4] == ",":
            return []
        if pair[1].lower() == "uri":
            uris.append(pair[3] if pair[2] is None else re.sub(r"\\(.)", r"\1", pair[2]))
        at = pair.end()
    return uris
