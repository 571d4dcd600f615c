"""Certificates from outside: identities by mutual TLS, and renewal of the server's own."""

from __future__ import annotations

import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography import x509
from payments.v1 import payment_service_pb2

from gateway.rpc.peers import FORWARDED_HEADER
from storage.postgres.accounts import Accounts
from tests.certificates import Authority, Certificate, TlsFiles, put
from tests.harness import (
    START_TIMEOUT_S,
    Caller,
    asyncio_run,
    authorize_request,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

TILL = "spiffe://example.org/ns/shop/sa/till"
READER = "spiffe://example.org/ns/shop/sa/reader"
STRANGER = "spiffe://example.org/ns/shop/sa/stranger"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED

LIST = payment_service_pb2.ListPaymentsRequest()


@pytest.fixture(scope="module")
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    with running_system(postgres, redis, auth_cache_life_s=0.2, auth_negative_life_s=0.1) as up:
        asyncio_run(lambda: _add_identities(up))
        yield up


async def _add_identities(system: System) -> None:
    async with Accounts.connect(system.dsn) as accounts:
        for uri, scopes in (
            (TILL, ("payments:read", "payments:write")),
            (READER, ("payments:read",)),
        ):
            await accounts.add_identity(
                uri, system.shop.organisation_id, scopes=scopes, mode="test"
            )


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def tls_settings(files: TlsFiles) -> dict[str, object]:
    return {
        "tls_certificate_file": files.certificate,
        "tls_key_file": files.key,
        "tls_client_ca_file": files.client_ca,
        "client_identity": "certificate",
    }


@asynccontextmanager
async def calling(
    gateway: GatewayProcess,
    authority: Authority,
    client: Certificate,
    *metadata: tuple[str, str],
) -> AsyncIterator[Caller]:
    credentials = grpc.ssl_channel_credentials(authority.pem, client.key_pem, client.pem)
    options = [("grpc.use_local_subchannel_pool", 1)]
    address = await gateway.serving()
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        caller = Caller(channel, "")
        caller.metadata = metadata  # type: ignore[assignment]  # none, or other than a key
        yield caller


async def refusal(caller: Caller, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.call(method, request)
    return caught.value.code(), reason_of(caught.value)


async def test_a_certificate_is_a_credential_within_what_its_identity_may(
    system: System, authority: Authority, tmp_path: Path
) -> None:
    files = TlsFiles.write(tmp_path, authority.server(), authority.pem)
    gateway = system.start_gateway(**tls_settings(files))
    async with calling(gateway, authority, authority.client(TILL)) as caller:
        answer = await caller.authorize()
        assert answer.payment.merchant_id == system.shop.merchant_id
        # Streams ask again and again who calls.
        batch = payment_service_pb2.BatchAuthorizePaymentsRequest()
        batch.items.add(item_ref="1", authorization=authorize_request())
        told = await caller.call("BatchAuthorizePayments", batch)
        assert told.results[0].WhichOneof("result") == "response"
    async with calling(gateway, authority, authority.client(READER)) as caller:
        await caller.call("ListPayments", LIST)
        assert await refusal(caller, "AuthorizePayment", authorize_request()) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "SCOPE_MISSING",
        )


async def test_a_certificate_without_one_known_identity_is_no_credential(
    system: System, authority: Authority, tmp_path: Path
) -> None:
    files = TlsFiles.write(tmp_path, authority.server(), authority.pem)
    gateway = system.start_gateway(**tls_settings(files))
    for uris, reason in (
        ((STRANGER,), "CREDENTIAL_INVALID"),
        ((), "CREDENTIAL_MISSING"),
        ((TILL, READER), "CREDENTIAL_MISSING"),
        (("https://example.org/till",), "CREDENTIAL_MISSING"),
    ):
        client = authority.client(*uris)
        # What a proxy would write counts for nothing here.
        header = (FORWARDED_HEADER, f"URI={TILL}")
        async with calling(gateway, authority, client, header) as caller:
            assert await refusal(caller, "ListPayments", LIST) == (UNAUTHENTICATED, reason)
        # With a key of its own the same connection is served.
        key = ("authorization", f"Bearer {system.shop.api_key}")
        async with calling(gateway, authority, client, key) as caller:
            await caller.call("ListPayments", LIST)
    # A wrong key is wrong, whoever shows it.
    wrong = ("authorization", f"Bearer {system.shop.api_key[:-1]}")
    async with calling(gateway, authority, authority.client(TILL), wrong) as caller:
        assert await refusal(caller, "ListPayments", LIST) == (
            UNAUTHENTICATED,
            "CREDENTIAL_INVALID",
        )
    # Nor does another authority's word count: there is no connection at all.
    other = Authority()
    client = other.client(TILL)
    async with calling(gateway, authority, client) as caller:
        code, _ = await refusal(caller, "ListPayments", LIST)
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_removed_identity_is_refused(
    system: System, authority: Authority, tmp_path: Path
) -> None:
    uri = "spiffe://example.org/ns/shop/sa/leaving"
    files = TlsFiles.write(tmp_path, authority.server(), authority.pem)
    gateway = system.start_gateway(**tls_settings(files))
    async with Accounts.connect(system.dsn) as accounts:
        await accounts.add_identity(
            uri, system.shop.organisation_id, scopes=("payments:read",), mode="test"
        )
        async with calling(gateway, authority, authority.client(uri)) as caller:
            await caller.call("ListPayments", LIST)
            assert await accounts.remove_identity(uri)
            assert not await accounts.remove_identity(uri)
            while True:
                try:
                    await caller.call("ListPayments", LIST)
                except grpc.aio.AioRpcError as error:
                    assert reason_of(error) == "CREDENTIAL_INVALID"  # noqa: PT017 - no other
                    break


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_behind_a_trusted_front_its_header_is_the_certificate(
    system: System, transport: str
) -> None:
    gateway = system.start_gateway(
        transport=transport, trusted_front=True, client_identity="forwarded"
    )
    async with grpc.aio.insecure_channel(await gateway.serving()) as channel:
        caller = Caller(channel, "")
        caller.metadata = (("x-forwarded-client-cert", f'Hash=1;Subject="CN=x";URI={TILL}'),)
        answer = await caller.authorize()
        assert answer.payment.merchant_id == system.shop.merchant_id
        items = [
            payment_service_pb2.AuthorizePaymentItem(
                item_ref="1", authorization=authorize_request()
            )
        ]
        stream = caller.stub.StreamAuthorizePayments(
            iter([payment_service_pb2.StreamAuthorizePaymentsRequest(items=items)]),
            metadata=caller.metadata,
        )
        results = [each async for response in stream for each in response.results]
        assert [each.WhichOneof("result") for each in results] == ["response"]
        for header in (f"URI={STRANGER}", f"URI={TILL},URI={TILL}", "Hash=1"):
            caller.metadata = ((FORWARDED_HEADER, header),)
            code, _ = await refusal(caller, "ListPayments", LIST)
            assert code is UNAUTHENTICATED


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_without_the_setting_no_header_is_an_identity(system: System, transport: str) -> None:
    gateway = system.start_gateway(transport=transport, trusted_front=True)
    async with grpc.aio.insecure_channel(await gateway.serving()) as channel:
        caller = Caller(channel, "")
        caller.metadata = ((FORWARDED_HEADER, f"URI={TILL}"),)
        assert await refusal(caller, "ListPayments", LIST) == (
            UNAUTHENTICATED,
            "CREDENTIAL_MISSING",
        )


# --- renewal --------------------------------------------------------------------------------------


def served_serial(address: str, authority: Authority, client: Certificate, directory: Path) -> int:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    certificate, key = directory / "client.crt", directory / "client.key"
    put(certificate, client.pem)
    put(key, client.key_pem)
    context.load_cert_chain(certificate, key)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), START_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number


async def test_a_renewed_certificate_is_served_without_a_restart_and_a_broken_one_is_not(
    system: System, authority: Authority, tmp_path: Path
) -> None:
    first, second, third = (authority.server() for _ in range(3))
    files = TlsFiles.write(tmp_path, first, authority.pem)
    gateway = system.start_gateway(**tls_settings(files))
    address = await gateway.serving()
    client = authority.client(TILL)

    def shown() -> int:
        return served_serial(address, authority, client, tmp_path)

    async with calling(gateway, authority, client) as standing:
        await standing.call("ListPayments", LIST)
        assert shown() == first.serial

        files.replace(second, authority.pem)
        assert shown() == second.serial

        # The next set, one broken file after another: the last whole one stays.
        for path, text in (
            (files.key, third.key_pem),
            (files.certificate, b"no certificate"),
            (files.certificate, third.pem[:-200]),
            (files.certificate, None),
            (files.client_ca, b""),
        ):
            if text is None:
                path.unlink()
            else:
                put(path, text)
            assert shown() == second.serial
            async with calling(gateway, authority, client) as caller:
                await caller.call("ListPayments", LIST)

        files.replace(third, authority.pem)
        assert shown() == third.serial
        # Nobody's connection was cut for it.
        await standing.call("ListPayments", LIST)
    gateway.stop()
    assert "the renewed TLS files are not served, the old ones are" in gateway.log
    assert "the renewed TLS files are served" in gateway.log
    assert "PRIVATE KEY" not in gateway.log


async def test_the_authority_of_clients_is_renewed_with_the_files(
    system: System, authority: Authority, tmp_path: Path
) -> None:
    server = authority.server()
    files = TlsFiles.write(tmp_path, server, authority.pem)
    gateway = system.start_gateway(**tls_settings(files))
    await gateway.serving()
    new = Authority()
    async with calling(gateway, authority, new.client(TILL)) as caller:
        code, _ = await refusal(caller, "ListPayments", LIST)
        assert code is grpc.StatusCode.UNAVAILABLE
    put(files.client_ca, authority.pem + new.pem)
    for issuer in (new, authority):
        async with calling(gateway, authority, issuer.client(TILL)) as caller:
            await caller.call("ListPayments", LIST)


async def test_files_that_are_broken_from_the_start_stop_the_gateway(
    system: System, authority: Authority, tmp_path: Path
) -> None:
    files = TlsFiles.write(tmp_path, authority.server(), authority.pem)
    put(files.key, authority.server().key_pem)
    gateway = system.start_gateway(**tls_settings(files))
    assert gateway.wait() != 0
