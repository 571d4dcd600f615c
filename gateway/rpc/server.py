"""The gRPC server: one of two transports with the same handlers, limits, health and draining.

`grpcio` (grpc.aio) is the default, and the only one for callers that are not trusted. `native`
(pygrpc-native) is for trusted callers behind a proxy; `docs/transports.md` says how they differ.
"""

import asyncio
import contextlib
import logging
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import pygrpc_native.aio
from grpc import aio

from gateway.rpc import validation
from gateway.rpc.admin import REQUEST_TYPES as ADMIN_REQUEST_TYPES
from gateway.rpc.admin import SERVICE_NAME as ADMIN_SERVICE_NAME
from gateway.rpc.admin import AdminService
from gateway.rpc.events import REQUEST_TYPES as EVENT_REQUEST_TYPES
from gateway.rpc.events import SERVICE_NAME as EVENT_SERVICE_NAME
from gateway.rpc.events import EventService
from gateway.rpc.receiving import finish_cancelled_receives
from gateway.rpc.routing import REQUEST_TYPES as ROUTING_REQUEST_TYPES
from gateway.rpc.routing import SERVICE_NAME as ROUTING_SERVICE_NAME
from gateway.rpc.routing import RoutingService
from gateway.rpc.service import SERVICE_NAME, PaymentService
from gateway.rpc.system import (
    HEALTH_SERVICE,
    REFLECTION_SERVICES,
    Handlers,
    Health,
    Reflection,
    UnknownMethods,
)
from gateway.rpc.tls import TlsFiles, TlsFilesUnusable

_HARD_MESSAGE_FACTOR: Final = 2
"""The transport itself refuses messages above `message_bytes_max` times this, without details;
below it the handlers refuse, with a reason and the advice not to retry."""
_QUIET_S: Final = 0.05
"""A draining server to which no call came for so long has read all that its transport held."""
_QUIET_WAIT_S_MAX: Final = 0.3
"""Under calls without a pause, a draining server goes on after this. Less than the pause that the
refused clients are told (DRAINING in the error map), so that none is refused twice."""
_FLUSH_S: Final = 0.25
"""The native transport writes answers by threads of its own, does not tell when it has, and drops
at its stop() what it has not: it is left so long for the last ones. With 0.05 none was lost to
eight busy processes on two cores, without it in most drains some."""
_LITTER_AGE_S_MIN: Final = 60.0
"""Younger directories of the native transport may belong to a server that is just starting."""
_GRPC_LOGGER: Final = "grpc._cython.cygrpc"
_HEADER_COMPLAINT: Final = "Invalid encoding on %s"


class ServerConfigError(RuntimeError):
    """The settings of the server contradict each other, or its address cannot be used."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to serve. Times are in seconds."""

    transport: Literal["grpcio", "native"] = "grpcio"
    listen_address: str = "127.0.0.1:50051"
    """`host:port`; an IPv6 address in brackets, port 0 for any free one."""
    tls_certificate_file: str = ""
    """The server's certificate with its chain, PEM. Empty: plain text. grpcio only. The TLS files
    may be replaced while it serves."""
    tls_key_file: str = ""
    """The certificate's private key, PEM."""
    tls_client_ca_file: str = ""
    """With it every client must present a certificate of this authority (mutual TLS)."""
    trusted_front: bool = False
    """Declares that only trusted callers reach this server, through a proxy that terminates TLS,
    bounds requests and ages connections. `native` does not start without."""
    share_port: bool = False
    """Several processes may bind the same port (SO_REUSEPORT)."""
    message_bytes_max: int = 2 * 1024 * 1024
    """The largest request; the same as in RpcLimits."""
    metadata_bytes_max: int = 16 * 1024
    """The largest headers of a request."""
    concurrent_streams_max: int = 1000
    """Calls at once on one connection (HTTP/2 SETTINGS_MAX_CONCURRENT_STREAMS)."""
    keepalive_time_s: float = 60.0
    """A connection on which nothing was heard for so long is pinged."""
    keepalive_timeout_s: float = 20.0
    """A ping unanswered for so long ends the connection."""
    client_ping_interval_s_min: float = 10.0
    """A client that pings more often without data is sent away. grpcio only."""
    connection_age_max_s: float = 0.0
    """A connection of this age is asked to go, so that load spreads over new servers; 0: never.
    grpcio only."""
    connection_age_grace_s: float = 30.0
    """How long its calls may still take then."""
    reflection: bool = True
    """Whether server reflection is served."""
    drain_notice_s: float = 0.0
    """How long after NOT_SERVING calls are still taken, so that load balancers notice first."""


class GrpcServer:
    """Serves PaymentService, and AdminService where there is one, with health and reflection.

    `start`, then `drain`.

    `wrap` may put something around a service's handlers, by its name. Raises ServerConfigError
    where the options contradict each other.
    """

    def __init__(
        self,
        service: PaymentService,
        options: ServerOptions,
        wrap: Callable[[str, Handlers], Handlers] | None = None,
        admin: AdminService | None = None,
        routing: RoutingService | None = None,
        events: EventService | None = None,
    ) -> None:
        _check(options)
        self._wrap = wrap
        self._service = service
        self._admin = admin
        self._routing = routing
        self._events = events
        self._names = (
            SERVICE_NAME,
            *(() if admin is None else (ADMIN_SERVICE_NAME,)),
            *(() if routing is None else (ROUTING_SERVICE_NAME,)),
            *(() if events is None else (EVENT_SERVICE_NAME,)),
        )
        self._options = options
        # The native transport reserves the trailer's name: a call that ends with it never ends.
        service.pushback = options.transport != "native"
        self._health = Health(self._names)
        self._reflection = Reflection(self._names)
        self._server: aio.Server | None = None
        self._drained: asyncio.Task[None] | None = None
        self.port = 0
        """The port that is bound, once started."""

    @property
    def address(self) -> str:
        """Where it listens, once started: `host:port`."""
        return f"{self._options.listen_address.rpartition(':')[0]}:{self.port}"

    async def start(self) -> int:
        """Bind, serve, and return the port. Raises ServerConfigError."""
        validation.warm(
            (
                *(() if self._admin is None else ADMIN_REQUEST_TYPES),
                *(() if self._routing is None else ROUTING_REQUEST_TYPES),
                *(() if self._events is None else EVENT_REQUEST_TYPES),
            )
        )
        options = self._options
        # Native's streams are grpc.aio's too.
        finish_cancelled_receives()
        logging.getLogger(_GRPC_LOGGER).addFilter(_is_no_header_complaint)
        if options.transport == "native":
            _remove_litter()
            server: aio.Server = pygrpc_native.aio.server(options=_channel_options(options))
        else:
            server = aio.server(options=_channel_options(options))
        for name, handlers in self._services():
            generic = grpc.method_handlers_generic_handler(name, handlers)
            server.add_generic_rpc_handlers((generic,))
            if options.transport == "native":
                # Or it would leave the method to its grpcio fallback. On grpcio each call would
                # have to wait for one of every registered method anew.
                server.add_registered_method_handlers(name, handlers)
        server.add_generic_rpc_handlers((UnknownMethods(self._service.serve_unknown),))
        self.port = _bind(server, options)
        await server.start()
        self._server = server
        return self.port

    def _services(self) -> Iterator[tuple[str, Handlers]]:
        for name, handlers in self._own_services():
            yield name, handlers if self._wrap is None else self._wrap(name, handlers)
        yield HEALTH_SERVICE, self._health.method_handlers()
        if self._options.reflection:
            for name in REFLECTION_SERVICES:
                yield name, self._reflection.method_handlers()

    def _own_services(self) -> Iterator[tuple[str, Handlers]]:
        yield SERVICE_NAME, self._service.method_handlers()
        if self._admin is not None:
            yield ADMIN_SERVICE_NAME, self._admin.method_handlers()
        if self._routing is not None:
            yield ROUTING_SERVICE_NAME, self._routing.method_handlers()
        if self._events is not None:
            yield EVENT_SERVICE_NAME, self._events.method_handlers()

    async def set_serving(self, serving: bool) -> None:
        """Report SERVING or NOT_SERVING by health; ignored once draining has begun."""
        if self._drained is None:
            self._health.set_serving(serving)

    async def drain(self, grace_s: float) -> None:
        """Report NOT_SERVING, take no more calls, finish those in flight, stop.

        What is not finished after `grace_s` seconds is cancelled: its callers get UNAVAILABLE or
        CANCELLED, and what it had begun goes on in the use cases. May be called more than once.
        """
        if self._drained is None:
            self._drained = asyncio.get_running_loop().create_task(self._drain(grace_s))
        await asyncio.shield(self._drained)

    async def _drain(self, grace_s: float) -> None:
        self._health.set_serving(False)
        await asyncio.sleep(self._options.drain_notice_s)
        until = time.monotonic() + grace_s
        self._service.begin_drain()
        if self._admin is not None:
            self._admin.begin_drain()
        if self._events is not None:
            self._events.begin_drain()
        self._health.close()
        self._reflection.close()
        await self._wait_quiet()
        if self._options.transport == "native":
            # Its stop() tells clients nothing (no GOAWAY): they learn by our refusals first.
            await self._wait_idle(grace_s)
            await asyncio.sleep(min(_FLUSH_S, max(0.0, until - time.monotonic())))
        if self._server is not None:
            await self._server.stop(max(0.0, until - time.monotonic()))
        await self._wait_idle(until - time.monotonic())

    async def _wait_quiet(self) -> None:
        """Refuse what has arrived and was not read yet, and let the refused clients pause.

        grpcio's stop() would end it with CANCELLED, which ordinary clients do not repeat.
        """
        until = time.monotonic() + _QUIET_WAIT_S_MAX
        begun = -1
        while begun != self._service.calls_begun and time.monotonic() < until:
            begun = self._service.calls_begun
            await asyncio.sleep(_QUIET_S)

    async def _wait_idle(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._service.wait_idle(), max(0.0, timeout_s))


def _is_no_header_complaint(record: logging.LogRecord) -> bool:
    """Whether it is anything but grpc.aio's error, with a traceback, for a header not in UTF-8.

    It quotes the header, and anyone can send hundreds with a call: to log them took the event loop
    a quarter of a second. The header is read as ISO 8859-1, and the call goes on.
    """
    return record.msg != _HEADER_COMPLAINT


def _check(options: ServerOptions) -> None:
    tls = options.tls_certificate_file
    if bool(tls) != bool(options.tls_key_file) or (options.tls_client_ca_file and not tls):
        raise ServerConfigError("TLS needs both tls_certificate_file and tls_key_file")
    if options.transport == "grpcio":
        return
    for name, wrong in (
        ("TLS", bool(tls)),
        ("connection_age_max_s", options.connection_age_max_s > 0),
    ):
        if wrong:
            raise ServerConfigError(
                f"the native transport has no {name}: leave it to the proxy in front, or use grpcio"
            )
    if not options.trusted_front:
        raise ServerConfigError(
            "the native transport is for trusted callers behind a proxy that terminates TLS and "
            "bounds requests: declare it with trusted_front, or use grpcio"
        )


def _bind(server: aio.Server, options: ServerOptions) -> int:
    address = options.listen_address
    credentials = _credentials(options) if options.tls_certificate_file else None
    try:
        if credentials is not None:
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ServerConfigError(f"cannot listen on {address}") from error
    if port == 0:
        raise ServerConfigError(f"cannot listen on {address}")
    return port


def _channel_options(options: ServerOptions) -> list[tuple[str, Any]]:
    arguments: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", _HARD_MESSAGE_FACTOR * options.message_bytes_max),
        # Both limits, or grpc-core refuses some calls between them at random.
        ("grpc.max_metadata_size", options.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", options.metadata_bytes_max),
        ("grpc.max_concurrent_streams", options.concurrent_streams_max),
        ("grpc.keepalive_time_ms", _milliseconds(options.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", _milliseconds(options.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        (
            "grpc.http2.min_recv_ping_interval_without_data_ms",
            _milliseconds(options.client_ping_interval_s_min),
        ),
        # grpc.aio would share a port silently.
        ("grpc.so_reuseport", int(options.share_port)),
    ]
    if options.connection_age_max_s > 0:
        age_ms = _milliseconds(options.connection_age_max_s)
        grace_ms = _milliseconds(options.connection_age_grace_s)
        arguments.append(("grpc.max_connection_age_ms", age_ms))
        arguments.append(("grpc.max_connection_age_grace_ms", grace_ms))
    return arguments


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _credentials(options: ServerOptions) -> grpc.ServerCredentials:
    client_ca = options.tls_client_ca_file
    files = TlsFiles(
        Path(options.tls_certificate_file),
        Path(options.tls_key_file),
        Path(client_ca) if client_ca else None,
    )
    try:
        return files.credentials()
    except TlsFilesUnusable as error:
        raise ServerConfigError(str(error)) from error


def _remove_litter() -> None:
    """Remove what killed processes of the native transport left: sockets that nobody listens on."""
    for path in Path(tempfile.gettempdir()).glob("pygrpc-native-*/fallback.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if time.time() - path.stat().st_mtime < _LITTER_AGE_S_MIN:
                continue
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                shutil.rmtree(path.parent)
