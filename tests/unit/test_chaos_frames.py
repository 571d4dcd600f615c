"""tests.chaos.frames: what an attacker sends, and the one thing that it reads of an answer."""

from __future__ import annotations

import grpc
import pytest

from tests.chaos.frames import NO_STATUS, _packed, header_block, status_of


@pytest.mark.parametrize(("text", "packed"), [("302", "826402"), ("307", "83640eff")])
def test_huffmans_code_is_that_of_the_examples_in_rfc_7541(text: str, packed: str) -> None:
    assert _packed(text) == bytes.fromhex(packed)


@pytest.mark.parametrize("code", grpc.StatusCode)
@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_status_is_read_however_the_server_writes_it(code: grpc.StatusCode, packs: bool) -> None:
    number = str(code.value[0])
    field = b"\x00" + _packed("grpc-status") + _packed(number)
    block = field if packs else header_block([("grpc-status", number)])
    around = header_block([("grpc-status-details-bin", "12")]), header_block([("a", "b")])
    assert status_of(around[0] + block + around[1]) == code.name


def test_headers_without_a_status_have_none() -> None:
    assert status_of(b"\x88" + header_block([("grpc-status-details-bin", "1")])) == NO_STATUS
