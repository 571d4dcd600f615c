"""The connectors' HTTP client against real servers: TLS, proxies, chunks, limits, bad answers."""

import asyncio
import socket
import ssl
import struct
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.connectors import http
from gateway.connectors.http import FORM, HttpClient, Limits, MaybeSent, NotSent, Response
from gateway.domain.errors import Reason
from tests.addresses import resolving, swallowing

pytestmark = pytest.mark.integration

WAIT_S = 30.0
SHORT_S = 0.3
"""For what never answers: nothing but the client's own time-out ends the wait."""
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Heard:
    """What a server was sent."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that ends with its connections; its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(run(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def serving(
    *answers: bytes, tls: ssl.SSLContext | None = None, keep: bool = True, then: str = "close"
) -> AsyncIterator[tuple[int, Heard]]:
    """A server that gives the answers in turn, the last one for ever; its port."""
    heard = Heard()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            heard.requests.append(head + await reader.readexactly(length))
            writer.write(answers[min(len(heard.requests), len(answers)) - 1])
            await writer.drain()
            if not keep:
                break
        if then == "hang":
            await reader.read()
        elif then == "reset":
            writer.transport.abort()

    async with listening(serve, tls) as port:
        yield port, heard


def server_context(ca: trustme.CA, *names: str, **validity: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*(names or ("localhost",)), **validity).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
async def clients() -> AsyncIterator[Callable[..., HttpClient]]:
    async with AsyncExitStack() as stack:

        def make(url: str, limits: Limits | None = None, **more: Any) -> HttpClient:
            client = HttpClient(url, limits, **more)
            stack.push_async_callback(client.close)
            return client

        yield make


Clients = Callable[..., HttpClient]


async def post(client: HttpClient, body: bytes = b"{}", **more: Any) -> Response:
    values: dict[str, Any] = {
        "send_before": time.monotonic() + WAIT_S,
        "answer_timeout_s": WAIT_S,
    } | more
    return await client.request("POST", "/v1/x", body, **values)


async def reason_of(call: Awaitable[object]) -> tuple[type[Exception], Reason]:
    try:
        await call
    except (NotSent, MaybeSent) as error:
        return type(error), error.reason
    raise AssertionError("it was answered")


# --- addresses ------------------------------------------------------------------------------------


async def test_address_that_swallows_everything_leaves_the_hosts_others(clients: Clients) -> None:
    async with serving(OK) as (port, heard):
        with swallowing(port) as address, resolving("psp.test", address, "127.0.0.1"):
            client = clients(f"http://psp.test:{port}", Limits(connect_timeout_s=WAIT_S))
            assert (await post(client)).status == 200
            assert heard.connections == 1
            # What else was tried is gone with it.
            assert len(client._open) == 1


async def test_address_that_refuses_leaves_the_hosts_others_and_alone_is_a_request_not_sent(
    clients: Clients,
) -> None:
    async with serving(OK) as (port, _):
        with resolving("psp.test", "127.0.0.3", "127.0.0.1"):
            assert (await post(clients(f"http://psp.test:{port}"))).status == 200
        for addresses in (["127.0.0.3"], []):
            with resolving("psp.test", *addresses):
                told = await reason_of(post(clients(f"http://psp.test:{port}")))
                assert told == (NotSent, Reason.CONNECT_FAILED)


# --- TLS ------------------------------------------------------------------------------------------


async def test_tls_requests_share_a_verified_connection(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    async with serving(OK, tls=server_context(ca)) as (port, heard):
        client = clients(f"https://localhost:{port}", ca_file=ca_file)
        for _ in range(3):
            assert await post(client) == Response(200, b"{}", {"content-length": "2"})
    assert (heard.connections, len(heard.requests)) == (1, 3)


async def test_an_address_is_verified_as_such(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    async with serving(OK, tls=server_context(ca, "127.0.0.1")) as (port, _):
        client = clients(f"https://127.0.0.1:{port}", ca_file=ca_file)
        assert (await post(client)).status == 200


async def test_a_request_never_begins_within_one_that_was_answered_before_it_was_read(
    clients: Clients,
) -> None:
    heard: list[asyncio.StreamWriter] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers by the head alone, and leaves the body where it is."""
        heard.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Slow Down\r\nContent-Length: 2\r\n\r\n{}")

    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=1024)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = clients(f"http://127.0.0.1:{port}")
        # More than the socket's buffers on both sides hold.
        assert (await post(client, bytes(32 << 20))).status == 429
        assert (await post(client)).status == 429
        await client.close()
        for writer in heard:
            writer.transport.abort()
    assert len(heard) == 2


async def test_long_requests_and_answers_pass_through_tls(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    body = bytes(range(256)) * 4000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with serving(answer, tls=server_context(ca)) as (port, heard):
        limits = Limits(body_bytes_max=len(body))
        client = clients(f"https://localhost:{port}", limits, ca_file=ca_file)
        assert (await post(client, body)).body == body
    assert heard.requests[0].endswith(body)


async def test_who_trusts_the_systems_authorities_reads_them_once(
    ca_file: str, clients: Clients
) -> None:
    one, other = clients("https://one.example"), clients("https://other.example")
    assert one._way.tls is other._way.tls
    own = clients("https://one.example", ca_file=ca_file)
    assert own._way.tls not in (None, one._way.tls)


@pytest.mark.parametrize("flaw", ["wrong name", "expired", "not yet", "self-signed", "unknown CA"])
async def test_certificate_that_proves_nothing_gets_no_request(
    flaw: str, ca: trustme.CA, ca_file: str, clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    match flaw:
        case "wrong name":
            context = server_context(ca, "other.example")
        case "expired":
            context = server_context(
                ca, not_before=now - timedelta(days=2), not_after=now - timedelta(days=1)
            )
        case "not yet":
            context = server_context(ca, not_before=now + timedelta(days=1))
        case "self-signed":
            own = trustme.CA()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            with own.cert_pem.tempfile() as chain, own.private_key_pem.tempfile() as key:
                context.load_cert_chain(chain, key)
        case _:
            context = server_context(trustme.CA())
    async with serving(OK, tls=context) as (port, heard):
        client = clients(f"https://localhost:{port}", ca_file=ca_file)
        for _ in range(2):
            assert await reason_of(post(client)) == (NotSent, Reason.CONNECT_FAILED)
    assert heard.requests == []
    (warning,) = [r.getMessage() for r in caplog.records if r.name == http.__name__]
    assert "certificate verify failed" in warning


async def test_protocol_older_than_tls_1_2_is_refused(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    context = server_context(ca)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is what is refused
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serving(OK, tls=context) as (port, heard):
        client = clients(f"https://localhost:{port}", ca_file=ca_file)
        assert await reason_of(post(client)) == (NotSent, Reason.CONNECT_FAILED)
    assert heard.requests == []


async def test_server_without_tls_and_one_that_says_nothing_get_no_request(
    ca_file: str, clients: Clients
) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(OK) as (port, heard):
        # The greeting of TLS is no request: the server waits for the rest of it.
        limits = Limits(connect_timeout_s=SHORT_S)
        client = clients(f"https://localhost:{port}", limits, ca_file=ca_file)
        assert await reason_of(post(client)) == (NotSent, Reason.CONNECT_FAILED)
        assert heard.requests == []
    async with listening(silent) as port:
        client = clients(f"https://localhost:{port}", limits, ca_file=ca_file)
        assert await reason_of(post(client)) == (NotSent, Reason.CONNECT_FAILED)


async def test_handshake_takes_the_place_of_one_connection(ca_file: str, clients: Clients) -> None:
    came = asyncio.Semaphore(0)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.release()
        await reader.read()

    async with listening(silent) as port:
        limits = Limits(connections_max=2, connect_timeout_s=2 * WAIT_S)
        client = clients(f"https://localhost:{port}", limits, ca_file=ca_file)
        posts: list[asyncio.Task[Response]] = []
        try:
            for _ in range(2):  # each once the one before shakes hands
                posts.append(asyncio.create_task(post(client)))
                await asyncio.wait_for(came.acquire(), WAIT_S)
        finally:
            for waiting in posts:
                waiting.cancel()
            await asyncio.gather(*posts, return_exceptions=True)
        # What was given up has left its place.
        for _ in range(2):
            posts.append(asyncio.create_task(post(client)))
            await asyncio.wait_for(came.acquire(), WAIT_S)
        for waiting in posts:
            waiting.cancel()
        await asyncio.gather(*posts, return_exceptions=True)


async def test_connection_given_up_as_it_is_made_leaves_its_place(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(OK) as (port, _):
        client = clients(f"http://localhost:{port}", Limits(connections_max=1))
        made = http._Connection.connection_made

        def give_up(connection: http._Connection, transport: asyncio.BaseTransport) -> None:
            made(connection, transport)
            call.cancel()

        monkeypatch.setattr(http._Connection, "connection_made", give_up)
        call = asyncio.create_task(post(client))
        with pytest.raises(asyncio.CancelledError):
            await call
        monkeypatch.undo()
        async with asyncio.timeout(WAIT_S):
            assert (await post(client)).status == 200


async def test_answer_cut_off_in_tls_leaves_a_doubt(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    for then in ("close", "reset"):
        cut = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"
        async with serving(cut, tls=server_context(ca), keep=False, then=then) as (port, heard):
            client = clients(f"https://localhost:{port}", ca_file=ca_file)
            assert await reason_of(post(client)) == (MaybeSent, Reason.CONNECTION_LOST)
        assert len(heard.requests) == 1


async def test_past_the_send_window_nothing_is_written_and_the_next_request_is_served(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    async with serving(OK, tls=server_context(ca)) as (port, heard):
        client = clients(f"https://localhost:{port}", ca_file=ca_file)
        await post(client)
        late = post(client, b"late", send_before=time.monotonic())
        assert await reason_of(late) == (NotSent, Reason.SEND_WINDOW_PASSED)
        await post(client)
    assert len(heard.requests) == 2
    assert not any(b"late" in request for request in heard.requests)


async def test_connection_closed_while_idle_is_replaced_before_anything_is_written(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    async with serving(OK, tls=server_context(ca), keep=False) as (port, heard):
        client = clients(f"https://localhost:{port}", ca_file=ca_file)
        for _ in range(3):
            assert (await post(client)).status == 200
            while client._open:  # noqa: ASYNC110 - the server's close has to arrive
                await asyncio.sleep(0)
    assert (heard.connections, len(heard.requests)) == (3, 3)


# --- answers --------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("chunks", "body"),
    [
        (b"2\r\n{}\r\n0\r\n\r\n", b"{}"),
        (b'5;name="v"\r\n{"a":\r\n00003 \r\n 1}\r\n0\r\nX-Sum: 7\r\nY: 8\r\n\r\n', b'{"a": 1}'),
        (b"0\r\n\r\n", b""),
        (b"A\r\n" + b"a" * 10 + b"\r\nb\r\n" + b"b" * 11 + b"\r\n0\r\n\r\n", b"a" * 10 + b"b" * 11),
    ],
)
async def test_chunked_answers_are_put_together_and_the_connection_is_kept(
    chunks: bytes, body: bytes, clients: Clients
) -> None:
    async with serving(CHUNKED + chunks) as (port, heard):
        client = clients(f"http://127.0.0.1:{port}")
        for _ in range(2):
            assert (await post(client)).body == body
    assert heard.connections == 1


async def test_chunked_answer_that_comes_byte_by_byte_is_whole_at_its_end(
    clients: Clients,
) -> None:
    answer = CHUNKED + b"3\r\n{ }\r\n1\r\n\n\r\n0\r\nA: b\r\n\r\n"

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        for byte in answer:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    async with listening(drip) as port:
        client = clients(f"http://127.0.0.1:{port}")
        assert (await post(client)).body == b"{ }\n"


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}}\r\n0\r\n\r\n",
        CHUNKED + b"100\r\n" + b"x" * 256 + b"\r\n1\r\nx\r\n0\r\n\r\n",
        CHUNKED + b"ffffffff\r\n",
        CHUNKED + b"2;" + b"x" * 1000,
        CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 5000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        CHUNKED[:-2] + b"Content-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n folded\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 257\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 257,
        b"HTTP/1.1 101 Switching Protocols\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_answer_against_the_rules_or_the_limits_is_unusable(
    answer: bytes, clients: Clients
) -> None:
    async with serving(answer, keep=False, then="hang") as (port, heard):
        client = clients(f"http://127.0.0.1:{port}", Limits(body_bytes_max=256))
        assert await reason_of(post(client)) == (MaybeSent, Reason.ANSWER_UNUSABLE)
    assert len(heard.requests) == 1


async def test_chunked_answer_that_ends_too_soon_is_lost(clients: Clients) -> None:
    async with serving(CHUNKED + b"5\r\n{}", keep=False) as (port, _):
        client = clients(f"http://127.0.0.1:{port}")
        assert await reason_of(post(client)) == (MaybeSent, Reason.CONNECTION_LOST)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK", b"HTTP/1.1 402 No\r\nConnection: close"])
async def test_answer_without_a_length_ends_with_its_connection(
    head: bytes, ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    for url, tls in (("http://127.0.0.1", None), ("https://localhost", server_context(ca))):
        answer = head + b"\r\n\r\n" + b'{"a": 1}'
        async with serving(answer, tls=tls, keep=False) as (port, heard):
            client = clients(f"{url}:{port}", ca_file=ca_file if tls else "")
            for _ in range(2):
                assert (await post(client)).body == b'{"a": 1}'
        assert heard.connections == 2


async def test_answer_without_a_length_is_lost_where_its_connection_breaks(
    clients: Clients,
) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b'HTTP/1.0 200 OK\r\n\r\n{"a": 1}')
        await writer.drain()
        # No time to linger: the connection is reset, not closed.
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async with listening(cut) as port:
        client = clients(f"http://127.0.0.1:{port}")
        assert await reason_of(post(client)) == (MaybeSent, Reason.CONNECTION_LOST)


async def test_interim_answers_are_passed_over(clients: Clients) -> None:
    hints = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with serving(hints + OK) as (port, heard):
        client = clients(f"http://127.0.0.1:{port}")
        for _ in range(2):
            assert (await post(client)).status == 200
    assert heard.connections == 1


async def test_answer_that_trickles_for_ever_ends_by_the_answer_timeout(clients: Clients) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with listening(trickle) as port:
        client = clients(f"http://127.0.0.1:{port}")
        call = post(client, answer_timeout_s=SHORT_S)
        assert await reason_of(call) == (MaybeSent, Reason.ANSWER_TIMED_OUT)


async def test_redirect_is_an_answer_and_not_followed(clients: Clients) -> None:
    async with serving(OK) as (elsewhere, other):
        moved = (
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:%d/\r\n"
            b"Content-Length: 0\r\n\r\n" % elsewhere
        )
        async with serving(moved) as (port, _):
            assert (await post(clients(f"http://127.0.0.1:{port}"))).status == 307
        assert other.requests == []


async def test_answers_without_a_body_and_headers_of_one_name(clients: Clients) -> None:
    answer = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nX-A: 1\r\nx-a:2 \r\n\r\n"
    async with serving(answer) as (port, _):
        response = await post(clients(f"http://127.0.0.1:{port}"))
    assert response == Response(204, b"", {"content-length": "0", "x-a": "1, 2"})


@pytest.mark.parametrize(
    ("line", "connections"),
    [
        (b"", 1),
        (b"Connection: close\r\n", 2),
        (b"Connection: Keep-Alive, Close\r\n", 2),
        (b"Keep-Alive: timeout=5, max=100\r\n", 1),
        # Used again a second before its announced end, that is: never.
        (b"Keep-Alive: timeout=1\r\n", 2),
    ],
)
async def test_connection_is_kept_as_the_other_side_says(
    line: bytes, connections: int, clients: Clients
) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + line + b"Content-Length: 2\r\n\r\n{}"
    async with serving(answer) as (port, heard):
        client = clients(f"http://127.0.0.1:{port}")
        await post(client)
        await post(client)
    assert heard.connections == connections


async def test_bytes_after_an_answer_end_the_connection(clients: Clients) -> None:
    for answer in (OK + b"HTTP", CHUNKED + b"0\r\n\r\nHTTP"):
        async with serving(answer) as (port, heard):
            client = clients(f"http://127.0.0.1:{port}")
            await post(client)
            await post(client)
        assert heard.connections == 2


# --- requests -------------------------------------------------------------------------------------


async def test_headers_and_forms_are_sent_as_given(clients: Clients) -> None:
    async with serving(OK) as (port, heard):
        client = clients(f"http://127.0.0.1:{port}")
        await post(client, b"a=1", headers={"Idempotency-Key": "op_1-1"}, content_type=FORM)
    assert heard.requests == [
        b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
        b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n"
        b"Idempotency-Key: op_1-1\r\n\r\na=1" % port
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("X", "a\r\nY: b"), ("X", "a\nb"), ("X", ""), ("X", "é"), ("X y", "a"), ("X:", "a")],
)
async def test_header_that_would_not_stay_one_line_is_refused(
    name: str, value: str, clients: Clients
) -> None:
    async with serving(OK) as (port, heard):
        with pytest.raises(ValueError, match="header"):
            await post(clients(f"http://127.0.0.1:{port}"), headers={name: value})
    assert heard.requests == []


async def test_target_that_would_not_stay_one_line_is_refused(clients: Clients) -> None:
    client = clients("http://127.0.0.1:9")
    for target in ("x", "/a b", "/a\r\nHost: b", "/é"):
        with pytest.raises(ValueError, match="target"):
            await client.request("GET", target, send_before=0, answer_timeout_s=1)


@pytest.mark.parametrize(
    "url",
    [
        "https://host/path",
        "https://user:secret@host",
        "https://host?x=1",
        "https://host#x",
        "https://host:port",
        "https://host:70000",
        "https://[::1",
        "ftp://host",
        "host",
        "https://",
    ],
)
def test_url_that_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="the URL must be"):
        HttpClient(url)


def test_ca_file_that_is_not_there_or_none_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pem"):
        HttpClient("https://host", ca_file=str(tmp_path / "none.pem"))
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    with pytest.raises(OSError, match=r"other\.pem"):
        HttpClient("https://host", ca_file=str(other))


# --- proxies --------------------------------------------------------------------------------------


@asynccontextmanager
async def proxy(
    refusal: bytes = b"", surplus: bytes = b""
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that tunnels to 127.0.0.1, whatever the host; its URL and what it was asked."""
    asked: list[bytes] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head)
        if refusal:
            writer.write(refusal)
            return
        port = int(head.split(b" ")[1].rpartition(b":")[2])
        onward = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n" + surplus)
        try:
            await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))
        finally:
            onward[1].close()

    async with listening(serve) as port:
        yield f"127.0.0.1:{port}", asked


async def test_proxy_tunnels_and_sees_nothing_of_the_request(
    ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    context = server_context(ca, "psp.example")
    async with proxy() as (address, asked), serving(OK, tls=context) as (port, heard):
        client = clients(
            f"https://psp.example:{port}", ca_file=ca_file, proxy_url=f"http://me:p%40ss@{address}"
        )
        await post(client)
        await post(client)
    assert (len(heard.requests), heard.connections) == (2, 1)
    authority = b"psp.example:%d" % port
    assert asked == [
        b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n\r\n"
        % (authority, authority)
    ]


@pytest.mark.parametrize(
    ("refusal", "surplus"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b""),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", b""),
        (b"nonsense\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000, b""),
        (b"", b"bytes before the host was spoken to"),
    ],
)
async def test_proxy_that_does_not_connect_gets_no_request(
    refusal: bytes, surplus: bytes, ca: trustme.CA, ca_file: str, clients: Clients
) -> None:
    async with (
        proxy(refusal, surplus) as (address, _),
        serving(OK, tls=server_context(ca)) as (port, heard),
    ):
        client = clients(
            f"https://localhost:{port}", ca_file=ca_file, proxy_url=f"http://{address}"
        )
        assert await reason_of(post(client)) == (NotSent, Reason.CONNECT_FAILED)
    assert heard.requests == []


def test_proxy_of_another_kind_is_refused_without_telling_its_password() -> None:
    for url in (
        "socks5://user:secret@host:1",
        "http://user:secret@host/path",
        "http://user:secret",
        "http://user:secret/1@host:1",
        "https://host",
    ):
        with pytest.raises(ValueError, match="proxy") as caught:
            HttpClient("https://host", proxy_url=url)
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="https"):
        HttpClient("http://host", proxy_url="http://host:1")
