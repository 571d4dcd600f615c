"""Identities in certificates: which are read, from which source, and what is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from gateway.application.accounts import MerchantInfo, Principal
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from gateway.rpc.auth import Authenticator, AuthLimits
from gateway.rpc.peers import (
    FORWARDED_CHARACTERS_MAX,
    FORWARDED_HEADER,
    URI_CHARACTERS_MAX,
    PeerIdentities,
    PeerIdentity,
    forwarded_uris,
    is_spiffe_id,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

URI = "spiffe://example.org/ns/shop/sa/till"


@dataclass
class Peer:
    headers: Sequence[tuple[str, str | bytes]] = ()
    proven: Mapping[str, Sequence[bytes]] = field(default_factory=dict)

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self.headers

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        return self.proven


def forwarded(*headers: str) -> PeerIdentity | None:
    peer = Peer([(FORWARDED_HEADER, each) for each in headers], {"peer_spiffe_id": [b"x"]})
    return PeerIdentities("forwarded").of(peer)


@pytest.mark.parametrize(
    "uri",
    [
        URI,
        "spiffe://example.org/till",
        "spiffe://a_b-c.1/x.y/A-Z_0",
        "spiffe://example.org/" + "x" * (URI_CHARACTERS_MAX - 21),
    ],
)
def test_a_spiffe_id_names_a_workload(uri: str) -> None:
    assert is_spiffe_id(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://example.org",
        "spiffe://example.org/",
        "spiffe:///till",
        "spiffe://Example.org/till",
        "SPIFFE://example.org/till",
        "spiffe://example.org:443/till",
        "spiffe://user@example.org/till",
        "spiffe://example.org/till/",
        "spiffe://example.org//till",
        "spiffe://example.org/../till",
        "spiffe://example.org/till/.",
        "spiffe://example.org/till?x=1",
        "spiffe://example.org/till#x",
        "spiffe://example.org/t%69ll",
        "spiffe://example.org/till\n",
        "https://example.org/till",
        "spiffe://example.org/" + "x" * (URI_CHARACTERS_MAX - 20),
    ],
)
def test_what_is_no_spiffe_id_is_no_identity(uri: str) -> None:
    assert not is_spiffe_id(uri)
    assert PeerIdentities("certificate").of(Peer((), {"peer_spiffe_id": [uri.encode()]})) is None
    assert forwarded(f'URI="{uri}"') is None


def test_the_handshake_tells_the_identity_and_no_header_does() -> None:
    identities = PeerIdentities("certificate")
    header = [(FORWARDED_HEADER, f"URI={URI}")]
    assert identities.of(Peer(header, {"peer_spiffe_id": [URI.encode()]})) == PeerIdentity(URI)
    assert identities.of(Peer(header, {"peer_uri": [URI.encode()]})) is None
    assert identities.of(Peer(header, {"peer_spiffe_id": [URI.encode()] * 2})) is None
    assert identities.of(Peer(header)) is None


@pytest.mark.parametrize(
    "header",
    [
        f"URI={URI}",
        f'URI="{URI}"',
        f"uri={URI};",
        f"By=spiffe://example.org/gateway;Hash=468ed33be74eee6556d90c0149c1309e;URI={URI}",
        f'Hash=1;Subject="CN=till,O=\\"Shop, Inc\\";URI=x";URI={URI};DNS=a;DNS=b',
    ],
)
def test_the_header_tells_the_identity_as_the_proxy_writes_it(header: str) -> None:
    assert forwarded(header) == PeerIdentity(URI)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("",),
        (f"URI={URI}", f"URI={URI}"),
        (f"URI={URI},By=x;URI={URI}",),
        (f"By=x;URI={URI},",),
        (f"URI={URI};URI=spiffe://example.org/other",),
        (f'Subject="CN=x;URI={URI}',),
        (f'Subject="CN=x\\";URI={URI}"',),
        (f"URI={URI};;",),
        (f"=x;URI={URI}",),
        ("By=x;Hash=y",),
        (f"URI={URI};By={'x' * FORWARDED_CHARACTERS_MAX}",),
        ('A="' * 2000,),
    ],
)
def test_a_header_that_speaks_of_none_or_several_or_is_damaged_tells_nobody(
    headers: tuple[str, ...],
) -> None:
    assert forwarded(*headers) is None


def test_a_name_in_quotes_is_read_as_it_was() -> None:
    assert forwarded_uris('URI="a\\"b\\\\c;d,e=f"') == ['a"b\\c;d,e=f']


# --- identities as credentials --------------------------------------------------------------------

PRINCIPAL = Principal(URI, "org_1", frozenset(), Mode.TEST, {"mer_1": MerchantInfo("mer_1")})


@dataclass
class Identities:
    stored: dict[str, Principal]
    reads: list[str] = field(default_factory=list)
    at_s: float = 0.0

    async def load(self, uri: str) -> Principal | None:
        self.reads.append(uri)
        return self.stored.get(uri)

    def authenticator(self) -> Authenticator:
        async def no_key(_key_id: str) -> None:
            raise AssertionError("an identity is no key")

        return Authenticator(
            no_key,
            AuthLimits(life_s=10.0, negative_life_s=4.0),
            load_identity=self.load,
            clock=lambda: self.at_s,
        )


async def test_an_identity_is_a_principal_remembered_like_a_keys() -> None:
    identities = Identities({URI: PRINCIPAL})
    authenticator = identities.authenticator()
    assert authenticator.remembered(PeerIdentity(URI)) is None
    assert await authenticator.authenticate(PeerIdentity(URI)) is PRINCIPAL
    assert authenticator.remembered(PeerIdentity(URI)) is PRINCIPAL
    assert identities.reads == [URI]
    del identities.stored[URI]
    identities.at_s += 10.0
    assert authenticator.remembered(PeerIdentity(URI)) is None
    for _ in range(2):
        with pytest.raises(GatewayError) as caught:
            await authenticator.authenticate(PeerIdentity(URI))
        assert caught.value.reason is Reason.CREDENTIAL_INVALID
    assert identities.reads == [URI, URI]


async def test_what_a_caller_sends_is_never_taken_for_an_identity() -> None:
    identities = Identities({URI: PRINCIPAL})
    authenticator = identities.authenticator()
    await authenticator.authenticate(PeerIdentity(URI))
    for text in (URI, f"Bearer {URI}", repr(PeerIdentity(URI))):
        assert authenticator.remembered(text) is None
        with pytest.raises(GatewayError) as caught:
            await authenticator.authenticate(text)
        assert caught.value.reason is Reason.CREDENTIAL_INVALID
