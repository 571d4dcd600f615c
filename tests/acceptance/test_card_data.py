"""No card number anywhere: not in a log, a metric, Redis, a table, an error or at the PSP (P9)."""

from __future__ import annotations

import base64
import itertools
import re
import unicodedata
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import aiohttp
import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from payments.v1 import payment_method_pb2, payment_pb2, payment_service_pb2
from redis import Redis

from gateway.connectors.simulator.server import NETWORK_TOKEN_TOKEN
from gateway.rpc.validation import NETWORK_TOKEN_NUMBER
from storage.postgres.accounts import Accounts
from tests.harness import (
    asyncio_run,
    authorize_request,
    call_bytes,
    eur,
    eventually,
    field_paths,
    holder_of,
    new_key,
    reason_of,
    request_types,
    running_system,
)
from tests.servers import free_port, redis_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

UNARY, BATCH, STREAM = "AuthorizePayment", "BatchAuthorizePayments", "StreamAuthorizePayments"
METHODS = sorted(request_types())

# --- canaries -------------------------------------------------------------------------------------

PREFIX = "4539578763"
"""Of every canary: 16 digits that an issuer could have given out."""

OVERLAP_BYTES = 4096
"""What is searched again of a place that grows: a number may have been half written."""

_numbers = itertools.count(1)
_given_out: set[str] = set()

WRITINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "in groups": lambda number: " ".join(re.findall("....", number)),
    "with dashes": lambda number: "-".join(re.findall("....", number)),
    "in a text": lambda number: f"card {number}, thanks",
    "full width": lambda number: "".join(chr(ord(digit) + 0xFEE0) for digit in number),
    "escaped": lambda number: "".join(f"%{ord(digit):02x}" for digit in number),
}
"""How callers write card numbers."""


def new_canary() -> str:
    """A card number (ISO/IEC 7812-1, with its Luhn digit) that nobody has used."""
    body = f"{PREFIX}{next(_numbers):05d}"
    doubled = [int(digit) * (2 if n % 2 == 0 else 1) for n, digit in enumerate(body)]
    canary = f"{body}{-sum(sum(divmod(each, 10)) for each in doubled) % 10}"
    _given_out.add(canary)
    return canary


def found_in(haystack: bytes) -> set[str]:
    """The canaries in some bytes, with or without anything between their digits.

    Escapes, other digits and the hexadecimal and base64 forms are read too.
    """
    text = unicodedata.normalize("NFKC", unquote(haystack.decode("utf-8", "replace")))
    found = {
        number
        for number in re.findall(rf"(?=({PREFIX}[0-9]{{6}}))", re.sub(r"[^0-9a-zA-Z]+", "", text))
        if number in _given_out
    }
    coded = text.replace("\\n", "").replace("\n", "")
    found |= {
        number
        for number in _given_out
        if PREFIX.encode().hex() in coded and number.encode().hex() in coded
    }
    for shift in range(3):
        if _base64_core(PREFIX, shift) in coded:
            found |= {number for number in _given_out if _base64_core(number, shift) in coded}
    return found


def _base64_core(number: str, shift: int) -> str:
    """What of a number's base64 form does not depend on what stands around it."""
    coded = base64.b64encode(b"\0" * shift + number.encode()).decode()
    whole = (shift + len(number)) * 8 // 6
    return coded[(shift * 8 + 5) // 6 : whole]


@pytest.mark.parametrize("writing", WRITINGS)
def test_the_search_finds_a_canary_however_it_is_written(writing: str) -> None:
    canary = new_canary()
    written = WRITINGS[writing](canary)
    assert found_in(f'{{"x": "{written}"}}'.encode()) == {canary}


def test_the_search_reads_hexadecimal_base64_and_separators() -> None:
    for around in ("", "a", "ab", "abc"):
        canary = new_canary()
        text = f"{around}{canary}{around}".encode()
        assert found_in(text.hex().encode()) == {canary}
        assert found_in(base64.b64encode(text)) == {canary}
        assert found_in(".".join(canary).encode()) == {canary}
    assert found_in(b"4111111111111111") == set()


# --- the places that are searched -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """How a call ended."""

    code: grpc.StatusCode
    reason: str = ""
    fields: frozenset[str] = frozenset()
    """Those of BadRequest."""
    everything: bytes = b""
    """All bytes that the caller was told."""


@dataclass
class Place:
    """A gateway that logs all it can, and everywhere that something could be left."""

    system: System
    gateway: GatewayProcess
    redis: Redis
    metrics_port: int
    server_log: Callable[[], bytes]
    """What PostgreSQL logged."""
    payment_id: str = ""
    told: list[bytes] = field(default_factory=list)
    """What callers were told, and was not searched yet."""
    searched: dict[str, int] = field(default_factory=dict)
    """How much of each place that only grows was clean."""

    @property
    def credential(self) -> tuple[str, str]:
        return "authorization", f"Bearer {self.system.shop.api_key}"

    async def call(
        self,
        channel: grpc.aio.Channel,
        method: str,
        data: bytes,
        *metadata: tuple[str, str],
    ) -> Told:
        """Call with bytes; what came back is searched later."""
        try:
            raw = await call_bytes(channel, method, data, metadata or (self.credential,))
        except grpc.aio.AioRpcError as error:
            trailers = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
            parts = [str(error.details()), str(error.debug_error_string())]
            everything = " ".join(parts).encode()
            for name, value in trailers:
                everything += f" {name}=".encode()
                everything += value if isinstance(value, bytes) else value.encode()
            self.told.append(everything)
            return Told(error.code(), reason_of(error), violated(error), everything)
        self.told.append(raw)
        return Told(grpc.StatusCode.OK, everything=raw)

    async def contents(self) -> tuple[dict[str, bytes], dict[str, int]]:
        """Everything of every place, but of those that only grow what was not found clean yet; and
        how large the growing ones are.
        """
        marker = f"marker-{new_key()}"
        async with grpc.aio.insecure_channel(self.gateway.address) as channel:
            await call_bytes(
                channel, "ListPayments", b"", [self.credential, ("x-request-id", marker)]
            )
        await eventually(lambda: marker in self.gateway.log, "the log is written")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer,
        ):
            metrics = await answer.read()
        growing = {
            "gateway's log": self.gateway.log.encode(),
            "PostgreSQL's log": self.server_log(),
            "simulator's journal": self.system.simulator.journal.read_bytes(),
        }
        contents = {
            "told": b"\n".join(self.told),
            "metrics": metrics,
            "Redis": b"\n".join(self._redis_entries()),
            **await self._tables(),
        }
        for name, data in growing.items():
            searched = self.searched.get(name, 0)
            contents[name] = data[max(0, searched - OVERLAP_BYTES) :]
        return contents, {name: len(data) for name, data in growing.items()}

    async def _tables(self) -> dict[str, bytes]:
        """What stands in each table."""
        connection = await asyncpg.connect(self.system.dsn)
        try:
            tables = await connection.fetch(
                "SELECT relname FROM pg_class WHERE relkind = 'r' AND "
                "relnamespace = current_schema()::regnamespace"
            )
            assert {"payments", "operations", "outbox", "api_keys"} <= {each[0] for each in tables}
            return {
                f"table {table}": b"\n".join(
                    value if isinstance(value, bytes) else str(value).encode()
                    for row in await connection.fetch(f'SELECT * FROM "{table}"')
                    for value in row.values()
                )
                for (table,) in tables
            }
        finally:
            await connection.close()

    def _redis_entries(self) -> Iterator[bytes]:
        client: Any = self.redis
        for key in client.scan_iter():
            yield key
            match client.type(key):
                case b"string":
                    yield client.get(key) or b""
                case b"hash":
                    for name, value in client.hgetall(key).items():
                        yield from (name, value)
                case b"zset":
                    yield from client.zrange(key, 0, -1)
                case b"none":
                    pass  # it has run out meanwhile
                case other:
                    raise AssertionError(f"nobody looks into a {other!r}")

    async def assert_clean(self) -> None:
        """No canary is anywhere, and no secret of a key."""
        contents, sizes = await self.contents()
        assert {place: found for place, data in contents.items() if (found := found_in(data))} == {}
        secret = self.system.shop.api_key.rpartition("_")[2].encode()
        assert [place for place, data in contents.items() if secret in data] == []
        self.searched = sizes
        self.told.clear()


def violated(error: grpc.aio.AioRpcError) -> frozenset[str]:
    """The fields that a refusal's BadRequest names."""
    status = rpc_status.from_call(error)
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details if status is not None else ():
        if detail.Unpack(bad_request):
            return frozenset(each.field for each in bad_request.field_violations)
    return frozenset()


@pytest.fixture(scope="module", params=["grpcio", "native"])
def place(request: pytest.FixtureRequest, postgres: PostgresForTests) -> Iterator[Place]:
    """With a Redis of its own, since each test reads every key of it."""
    port = free_port()
    with (
        redis_server() as redis,
        running_system(
            postgres,
            redis,
            transport=request.param,
            trusted_front=True,
            log_level="DEBUG",
            log_successes_per_s_max=1_000_000,
            metrics_address=f"127.0.0.1:{port}",
        ) as system,
    ):
        client = Redis.from_url(redis.url)
        made = Place(
            system, system.start_gateway(), client, port, postgres.server.log_path.read_bytes
        )
        asyncio_run(lambda: _pay(made))
        try:
            yield made
        finally:
            client.close()


async def _pay(place: Place) -> None:
    """A payment for the follow-ups to aim at."""
    async with channel_to(place) as channel:
        raw = await call_bytes(
            channel, UNARY, authorize_request().SerializeToString(), [place.credential]
        )
    answer = payment_service_pb2.AuthorizePaymentResponse.FromString(raw)
    place.payment_id = answer.payment.payment_id


@asynccontextmanager
async def channel_to(place: Place, *options: tuple[str, Any]) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(place.gateway.address, options=options) as channel:
        yield channel


# --- fields ---------------------------------------------------------------------------------------


def valid_request(method: str, payment_id: str) -> Any:
    """A request that would be answered; for batches and streams that of their item."""
    service = payment_service_pb2
    key = {"idempotency_key": new_key()}
    match method:
        case "AuthorizePayment" | "BatchAuthorizePayments" | "StreamAuthorizePayments":
            return authorize_request()
        case "IncrementAuthorization":
            return service.IncrementAuthorizationRequest(
                payment_id=payment_id, additional_amount=eur(1), **key
            )
        case "GetPayment":
            return service.GetPaymentRequest(payment_id=payment_id)
        case "ListPayments":
            return service.ListPaymentsRequest()
        case "GetOperation":
            return service.GetOperationRequest(operation_id="op_1")
        case _:
            return request_types()[method](payment_id=payment_id, **key)


def spoiled(request: Any, canary: Callable[[], str]) -> Iterator[tuple[str, Any]]:
    """The request with a canary in each string, map key and map value in turn."""

    def copy() -> Any:
        other = type(request)()
        other.CopyFrom(request)
        return other

    for path, described in field_paths(request):
        nested = described.message_type
        if nested is not None and nested.GetOptions().map_entry:
            for entry in ({canary(): "value"}, {"key": canary()}):
                other = copy()
                getattr(other, path).update(entry)
                yield path, other
        elif described.type == described.TYPE_STRING:
            other = copy()
            target, name = holder_of(other, path)
            setattr(target, name, canary())
            yield path, other


def as_sent(method: str, request: Any, item_ref: str = "1") -> bytes:
    """The bytes of a request; of a batch's or stream's with the request as its item."""
    if method in (BATCH, STREAM):
        item = payment_service_pb2.AuthorizePaymentItem(item_ref=item_ref, authorization=request)
        request = payment_service_pb2.BatchAuthorizePaymentsRequest(items=[item])
    data: bytes = request.SerializeToString()
    return data


def error_of_item(raw: bytes) -> tuple[str, frozenset[str], str]:
    """Reason and named fields of the one item's refusal, and the mark that its result repeats."""
    [result] = payment_service_pb2.BatchAuthorizePaymentsResponse.FromString(raw).results
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in result.error.details:
        assert detail.Unpack(info) or detail.Unpack(bad_request)
    fields = frozenset(each.field for each in bad_request.field_violations)
    return info.reason, fields, result.item_ref


@pytest.mark.parametrize("method", METHODS)
async def test_a_card_number_in_any_string_is_refused_by_the_fields_name_and_left_nowhere(
    place: Place, method: str
) -> None:
    sent = len(place.system.simulator.received())
    writings = itertools.cycle(WRITINGS.values())
    async with channel_to(place) as channel:
        request = valid_request(method, place.payment_id)
        seen = set()
        for path, other in spoiled(request, lambda: next(writings)(new_canary())):
            told = await place.call(channel, method, as_sent(method, other))
            if method in (BATCH, STREAM):
                reason, fields, _ = error_of_item(told.everything)
            else:
                assert told.code is grpc.StatusCode.INVALID_ARGUMENT, path
                reason, fields = told.reason, told.fields
            if path == NETWORK_TOKEN_NUMBER:  # where one may stand, but not without more
                assert reason == "INVALID_REQUEST"
            else:
                assert (reason, fields) == ("CARD_DATA_NOT_ALLOWED", frozenset({path})), path
            seen.add(path)
        assert {"merchant_id"} <= seen
        if method in (BATCH, STREAM):
            for writing in WRITINGS.values():
                other = valid_request(method, place.payment_id)
                data = as_sent(method, other, item_ref=writing(new_canary()))
                told = await place.call(channel, method, data)
                refused = ("CARD_DATA_NOT_ALLOWED", frozenset({"item_ref"}), "")
                assert error_of_item(told.everything) == refused
    assert len(place.system.simulator.received()) == sent
    await place.assert_clean()


@pytest.mark.parametrize("method", METHODS)
async def test_a_token_or_an_id_around_a_card_number_is_refused(place: Place, method: str) -> None:
    async with channel_to(place) as channel:
        request = valid_request(method, place.payment_id)
        for path, _ in spoiled(request, new_canary):
            other = type(request)()
            other.CopyFrom(request)
            if path == "metadata":
                other.metadata[f"card_{new_canary()}"] = f"pan:{new_canary()};"
            else:
                target, name = holder_of(other, path)
                setattr(target, name, f"tok_{new_canary()}")
            told = await place.call(channel, method, as_sent(method, other))
            told_reason = (
                error_of_item(told.everything)[0] if method in (BATCH, STREAM) else told.reason
            )
            expected = (
                "CARD_DATA_NOT_ALLOWED" if path != NETWORK_TOKEN_NUMBER else "INVALID_REQUEST"
            )
            assert told_reason == expected, path
    await place.assert_clean()


@pytest.mark.parametrize("method", [UNARY, BATCH, STREAM])
async def test_a_network_tokens_number_and_cryptogram_reach_the_psp_and_are_left_nowhere(
    place: Place, method: str
) -> None:
    cryptogram = base64.b64encode(uuid.uuid4().bytes + b"tavv").decode()
    async with channel_to(place) as channel:
        token = payment_method_pb2.NetworkToken(
            number=new_canary(),
            cryptogram=cryptogram,
            expiry_month=12,
            expiry_year=2030,
            eci="05",
            wallet=payment_method_pb2.WALLET_APPLE_PAY,
        )
        request = authorize_request()
        request.payment_method.network_token.CopyFrom(token)
        calls: list[tuple[str, dict[str, Any]]] = [
            (request.idempotency_key, {}),
            (request.idempotency_key, {}),  # a replay
            (request.idempotency_key, {"number": new_canary()}),  # another call
            (new_key(), {"cryptogram": ""}),  # refused
            (new_key(), {"number": "1" * 20}),
        ]
        for key, changes in calls:
            other = type(request)()
            other.CopyFrom(request)
            other.idempotency_key = key
            other.payment_method.network_token.MergeFrom(type(token)(**changes))
            if changes == {"cryptogram": ""}:
                other.payment_method.network_token.ClearField("cryptogram")
            await place.call(channel, method, as_sent(method, other))
        found = await place.call(
            channel,
            "GetOperation",
            payment_service_pb2.GetOperationRequest(
                idempotency_key=request.idempotency_key
            ).SerializeToString(),
        )
    answer = payment_service_pb2.GetOperationResponse.FromString(found.everything)
    assert answer.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
    kept = answer.payment.payment_method.network_token
    assert (kept.number, kept.cryptogram, kept.eci) == ("", "", "05")
    reference = f"{answer.operation.operation_id}-1"
    received = place.system.simulator.received()
    assert [each["token"] for each in received if each["reference"] == reference] == [
        NETWORK_TOKEN_TOKEN
    ]
    await place.assert_clean()
    contents, _ = await place.contents()
    assert [name for name, data in contents.items() if cryptogram.encode() in data] == []


async def test_a_card_number_as_a_number_is_refused_and_left_nowhere(place: Place) -> None:
    async with channel_to(place) as channel:
        for method in METHODS:
            request = valid_request(method, place.payment_id)
            for path, described in field_paths(request):
                if described.type != described.TYPE_INT64:
                    continue
                other = type(request)()
                other.CopyFrom(request)
                target, name = holder_of(other, path)
                setattr(target, name, int(new_canary()))
                told = await place.call(channel, method, as_sent(method, other))
                reason = (
                    error_of_item(told.everything)[0] if method in (BATCH, STREAM) else told.reason
                )
                assert reason == "INVALID_REQUEST", (method, path)
    await place.assert_clean()


@pytest.mark.parametrize("key", ["cvv", "CVC2", "card-cvv", "security_code", "x.cvn"])
async def test_a_card_verification_value_in_the_metadata_is_refused(place: Place, key: str) -> None:
    request = authorize_request(metadata={key: "123"})
    async with channel_to(place) as channel:
        told = await place.call(channel, UNARY, as_sent(UNARY, request))
        refused = ("CARD_DATA_NOT_ALLOWED", frozenset({"metadata"}))
        assert (told.reason, told.fields) == refused
        for method in (BATCH, STREAM):
            told = await place.call(channel, method, as_sent(method, request))
            assert error_of_item(told.everything)[:2] == refused


# --- what is not a field --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_a_card_number_in_a_header_or_a_path_is_left_nowhere(
    place: Place, method: str
) -> None:
    data = as_sent(method, valid_request(method, place.payment_id))
    async with channel_to(place) as channel:
        for name, writing in WRITINGS.items():
            canary = writing(new_canary())
            if not canary.isascii():
                continue
            told = await place.call(
                channel, method, data, place.credential, ("x-request-id", canary)
            )
            assert told.reason == "CARD_DATA_NOT_ALLOWED", name
            assert told.fields == {"x-request-id"}
            for credential in (canary, f"Bearer {canary}", f"Bearer gwk_test_{canary}_{canary}"):
                told = await place.call(channel, method, data, ("authorization", credential))
                assert told.reason == "CREDENTIAL_INVALID"
            await place.call(channel, method, data, place.credential, ("x-anything", canary))
        unknown = await place.call(channel, f"{method}{new_canary()}", data)
        assert unknown.code is grpc.StatusCode.UNIMPLEMENTED
        unknown = await place.call(channel, new_canary(), data)
        assert unknown.code is grpc.StatusCode.UNIMPLEMENTED
    async with channel_to(
        place,
        ("grpc.primary_user_agent", f"agent/{new_canary()}"),
        ("grpc.default_authority", f"{new_canary()}.example"),
    ) as channel:
        await place.call(channel, method, data)
    await place.assert_clean()


def _length_delimited(number: int, payload: bytes) -> bytes:
    """A field of the wire format, with a number and a length below 2^14."""
    tag, length = number << 3 | 2, len(payload)
    return b"".join(bytes((value & 0x7F | 0x80, value >> 7)) for value in (tag, length)) + payload


@pytest.mark.parametrize("method", METHODS)
async def test_a_card_number_in_a_malformed_message_is_left_nowhere(
    place: Place, method: str
) -> None:
    request = valid_request(method, place.payment_id)
    data = as_sent(method, request)

    def canary() -> bytes:
        return new_canary().encode()

    malformed = {
        "no message": canary(),
        "cut off": data + _length_delimited(1, canary())[:-3],
        "no UTF-8": data + _length_delimited(1, canary() + b"\xff\xfe"),
        "another wire type": data + b"\x0d" + canary()[:4] + canary(),
        "a group without end": data + b"\x0b" + canary(),
        "text": b'{"card": "' + canary() + b'"}',
    }
    async with channel_to(place) as channel:
        for what, broken in malformed.items():
            told = await place.call(channel, method, broken)
            assert told.code is grpc.StatusCode.INVALID_ARGUMENT, what
        # Fields of no contract are ignored, and so they must not be kept.
        unknown = data + _length_delimited(999, canary())
        told = await place.call(channel, method, unknown)
        assert told.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
        if method in (UNARY, BATCH, STREAM):
            request = authorize_request()
            request.amount.MergeFromString(_length_delimited(999, canary()))
            told = await place.call(channel, method, as_sent(method, request))
            assert told.code is grpc.StatusCode.OK
        too_large = data + _length_delimited(999, canary() * 1000) * 140
        told = await place.call(channel, method, too_large)
        assert told.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await place.assert_clean()


async def test_a_card_number_inside_a_page_token_is_left_nowhere(place: Place) -> None:
    async with channel_to(place) as channel:
        for token in (
            new_canary().encode().hex(),
            base64.urlsafe_b64encode(new_canary().encode()).decode(),
            quote(new_canary()),
        ):
            request = payment_service_pb2.ListPaymentsRequest(page_token=token)
            told = await place.call(channel, "ListPayments", request.SerializeToString())
            assert told.reason in ("PAGE_TOKEN_INVALID", "CARD_DATA_NOT_ALLOWED")
    await place.assert_clean()


# --- the exception --------------------------------------------------------------------------------


async def test_an_exempted_order_id_is_kept_where_it_is_needed_and_never_logged(
    place: Place,
) -> None:
    """It also shows that what the other tests search is really searched."""

    async def shop() -> tuple[str, str]:
        async with Accounts.connect(place.system.dsn) as accounts:
            organisation_id = await accounts.create_organisation("Exempted")
            merchant_id = await accounts.create_merchant(
                organisation_id, "Exempted", pan_exempt_order_id=True
            )
            key = await accounts.create_key(
                organisation_id, scopes=("payments:read", "payments:write"), mode="test"
            )
        return merchant_id, key.text

    merchant_id, key = asyncio_run(shop)
    credential = ("authorization", f"Bearer {key}")
    canary = new_canary()
    told, place.told = place.told, []
    async with channel_to(place) as channel:
        for named in ("", merchant_id):
            for method in (UNARY, BATCH, STREAM):
                request = authorize_request(merchant_id=named, merchant_order_id=canary)
                answer = await place.call(channel, method, as_sent(method, request), credential)
                assert answer.code is grpc.StatusCode.OK
                assert found_in(answer.everything) == {canary}
            listed = payment_service_pb2.ListPaymentsRequest(
                merchant_id=named, merchant_order_id=canary
            )
            answer = await place.call(
                channel, "ListPayments", listed.SerializeToString(), credential
            )
            page = payment_service_pb2.ListPaymentsResponse.FromString(answer.everything)
            assert {each.merchant_order_id for each in page.payments} == {canary}
            # The exemption is for this field of this merchant alone.
            request = authorize_request(
                merchant_id=named, merchant_order_id=canary, customer_id=canary
            )
            answer = await place.call(channel, UNARY, as_sent(UNARY, request), credential)
            assert answer.reason == "CARD_DATA_NOT_ALLOWED"
            assert answer.fields == {"customer_id"}
    contents, _ = await place.contents()
    with_card = {name for name, data in contents.items() if found_in(data)}
    # Off the answer's way, so the answers may not be in Redis yet.
    assert with_card - {"Redis"} == {"table payments", "table operations", "table outbox", "told"}

    place.told = told
    _given_out.discard(canary)
