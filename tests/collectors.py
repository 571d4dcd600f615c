"""What a gateway reports to: an OTLP collector, a Sentry, and a listener between it and its PSP."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

TIMEOUT_S = 30.0
"""Generous: it is met only where a test fails."""


class Received:
    """What one span says, as a test asks for it."""

    def __init__(self, span: Span, service_name: str) -> None:
        self.name = span.name
        self.kind = span.kind
        self.trace_id = span.trace_id.hex()
        self.span_id = span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.is_error = span.status.code == 2
        self.trace_state = span.trace_state
        self.service_name = service_name
        self.attributes = {each.key: _plain(each.value) for each in span.attributes}
        self.duration_ns = span.end_time_unix_nano - span.start_time_unix_nano
        self.text = str(span)
        """All of it, for what must stand nowhere."""


def _plain(value: Any) -> object:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind is not None else None


class Server:
    """An HTTP server in threads of its own; subclasses say what it answers."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                coding = self.headers.get("Content-Encoding")
                if coding == "gzip":
                    body = gzip.decompress(body)
                elif coding == "br":  # sentry-sdk's choice where the library happens to be there
                    import brotli  # noqa: PLC0415

                    body = brotli.decompress(body)
                with server.changed:
                    server.requests += 1
                    server.changed.notify_all()
                status, answer = server.answer(self, body)
                with server.changed:
                    server.changed.notify_all()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # whoever asked has gone

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        raise NotImplementedError

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition comes to, once it is true."""
        with self.changed:
            met = self.changed.wait_for(condition, TIMEOUT_S)
        assert met, f"not within {TIMEOUT_S} s: {what}"
        return met

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()


class Collector(Server):
    """An OTLP receiver over HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Received] = []
        self.status = 200
        self.released = threading.Event()
        """Until it is set, nothing is answered; as it is from the start."""
        self.released.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        assert self.released.wait(TIMEOUT_S)
        if self.status != 200:
            return self.status, b""
        assert request.path == "/v1/traces"
        message = ExportTraceServiceRequest.FromString(body)
        with self.changed:
            for resource in message.resource_spans:
                [name] = [
                    each.value.string_value
                    for each in resource.resource.attributes
                    if each.key == "service.name"
                ]
                for scope in resource.scope_spans:
                    self.spans += [Received(span, name) for span in scope.spans]
        return 200, ExportTraceServiceResponse().SerializeToString()

    def named(self, name: str) -> list[Received]:
        """The spans of this name."""
        return [span for span in self.spans if span.name == name]


class Sentry(Server):
    """A receiver of Sentry's envelopes."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        self.text = ""
        """All that came."""

    @property
    def dsn(self) -> str:
        return f"http://0123456789abcdef0123456789abcdef@127.0.0.1:{self.port}/1"

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        assert request.path == "/api/1/envelope/"
        text = body.decode()
        with self.changed:
            self.text += text
            lines = text.splitlines()
            for header, payload in zip(lines[1::2], lines[2::2], strict=False):
                if json.loads(header).get("type") == "event":
                    self.events.append(json.loads(payload))
        return 200, b"{}"


class Listener(Server):
    """Passes a gateway's requests on to its PSP, and keeps their heads."""

    def __init__(self, psp_url: str) -> None:
        super().__init__()
        self.heads: list[dict[str, str]] = []
        self._psp_url = psp_url

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        if request.command == "POST":
            with self.changed:
                self.heads.append({name.lower(): value for name, value in request.headers.items()})
        onward = Request(self._psp_url + request.path, data=body or None, method=request.command)
        with urlopen(onward, timeout=TIMEOUT_S) as response:
            return response.status, response.read()


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
