"""What a gRPC server offers beside its services: health, reflection, an answer to unknown calls.

Here too the handlers take bytes and catch everything, so that garbage is answered INVALID_ARGUMENT
and no exception's text reaches a client.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)
from grpc_reflection.v1alpha.reflection import (
    aio as reflection_aio,
)
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
)

from gateway.domain.errors import GatewayError, Reason
from gateway.rpc import error_map, validation
from gateway.rpc.service import Context, forget_frames

HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICES: Final = (
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
"""Both names have the same messages but for their package."""
WATCHERS_MAX: Final = 1000
"""How many Health.Watch calls may run at once."""
MESSAGE_BYTES_MAX: Final = 4_096
"""The largest request. It is of anyone, without a key, and is held as long as its call lasts."""

_log = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)

Handlers = dict[str, "grpc.RpcMethodHandler[Any, Any]"]


async def _fail(context: Context, error: Exception) -> None:
    if not isinstance(error, GatewayError):
        _log.error("a system call failed unexpectedly", exc_info=error)
        forget_frames(error)
        error = GatewayError(Reason.INTERNAL, error_map.INTERNAL_MESSAGE)
    forget_frames(error)
    status = error_map.to_status(error)
    # No retry policy names these services, and not every transport can send the pushback.
    trailers = error_map.to_trailers(error, status, pushback=False)
    await context.abort(error_map.status_code(error.reason), status.message, trailers)


def _parse(message_type: type[_M], data: bytes) -> _M:
    if len(data) > MESSAGE_BYTES_MAX:
        raise GatewayError(
            Reason.MESSAGE_TOO_LARGE, f"The message has more than {MESSAGE_BYTES_MAX} bytes."
        )
    return validation.parse(message_type, data)


async def _write(context: Context, message: Message) -> None:
    try:
        await context.write(message.SerializeToString())
    except Exception as error:
        # The caller has gone: the transport's errors mean nothing else.
        raise asyncio.CancelledError from error


class Health:
    """`grpc.health.v1.Health`. No watcher, however slow, can hold up a change."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(("", *services), True)
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def set_serving(self, serving: bool) -> None:
        """Change what all services are reported as."""
        self._serving = dict.fromkeys(self._serving, serving)
        self._wake()

    def close(self) -> None:
        """End the watchers, once each has read the last change."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def method_handlers(self) -> Handlers:
        """The handlers by the names of their methods."""
        return {
            "Check": grpc.unary_unary_rpc_method_handler(self._check),
            "List": grpc.unary_unary_rpc_method_handler(self._list),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }

    async def _check(self, data: bytes, context: Context) -> bytes:
        try:
            request = _parse(HealthCheckRequest, data)
        except GatewayError as error:
            data = b""  # this frame lives on with what `_fail` raises
            await _fail(context, error)
            raise
        serving = self._serving.get(request.service)
        if serving is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "The server has no such service.", ())
        return _encode(_health(serving))

    async def _list(self, data: bytes, context: Context) -> bytes:
        try:
            _parse(HealthListRequest, data)
        except GatewayError as error:
            data = b""
            await _fail(context, error)
        statuses = {service: _health(serving) for service, serving in self._serving.items()}
        return _encode(HealthListResponse(statuses=statuses))

    async def _watch(self, data: bytes, context: Context) -> None:
        watcher = asyncio.Event()
        try:
            request = _parse(HealthCheckRequest, data)
            if len(self._watchers) >= WATCHERS_MAX:
                raise GatewayError(Reason.OVERLOADED, "Too many calls watch the health.")
            self._watchers.add(watcher)
            last: bool | None = None
            first = True
            while True:
                watcher.clear()
                # What changes while this one is written is told before the end.
                closed, serving = self._closed, self._serving.get(request.service)
                if first or serving is not last:
                    await _write(context, _health(serving))
                first, last = False, serving
                if closed:
                    raise GatewayError(Reason.DRAINING, "This server is shutting down.")
                await watcher.wait()
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            data = b""
            await _fail(context, error)
        finally:
            self._watchers.discard(watcher)


def _encode(message: Message) -> bytes:
    return message.SerializeToString()


def _health(serving: bool | None) -> HealthCheckResponse:
    if serving is None:
        return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
    return HealthCheckResponse(
        status=HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
    )


class Reflection:
    """Server reflection, versions v1 and v1alpha."""

    def __init__(self, services: Iterable[str]) -> None:
        names = (*services, HEALTH_SERVICE, *REFLECTION_SERVICES)
        self._servicer = reflection_aio.ReflectionServicer(names)
        self._waiting: set[asyncio.Future[None]] = set()
        """Of the calls that wait for their clients to ask something: done, it ends the wait."""
        self._closed = False

    def close(self) -> None:
        """End the streams, once what was asked is answered: their clients would leave them open."""
        self._closed = True
        for end in self._waiting:
            end.set_result(None)

    def method_handlers(self) -> Handlers:
        """The handler by the name of its method."""
        return {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._info)}

    async def _info(self, _requests: object, context: Context) -> None:
        async def requests() -> AsyncIterator[ServerReflectionRequest]:
            while (data := await self._read(context)) is not grpc.aio.EOF:
                yield _parse(ServerReflectionRequest, data)

        try:
            async for response in self._servicer.ServerReflectionInfo(requests(), context):
                await _write(context, response)
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            await _fail(context, error)

    async def _read(self, context: Context) -> Any:
        # Cancelled, a receive would end after a second only (`receiving`), by when a native drain
        # has closed its doors. Left alone, it ends with its call.
        loop = asyncio.get_running_loop()
        read, end = loop.create_task(context.read()), loop.create_future()
        read.add_done_callback(_forget)
        if self._closed:
            end.set_result(None)
        self._waiting.add(end)
        try:
            await asyncio.wait((read, end), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(end)
        if not read.done():
            raise GatewayError(Reason.DRAINING, "This server is shutting down.")
        return read.result()


def _forget(read: "asyncio.Task[Any]") -> None:
    if not read.cancelled():
        read.exception()  # where its call has ended nobody else asks


class UnknownMethods(grpc.GenericRpcHandler):
    """Answers every call that no other handler takes."""

    def __init__(self, serve: Callable[[Any, Any], Any]) -> None:
        self._handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            serve
        )

    def service(
        self,
        handler_call_details: grpc.HandlerCallDetails,  # noqa: ARG002 - named so by grpc
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler."""
        return self._handler
