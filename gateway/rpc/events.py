"""The handlers of EventService: counted, admitted and logged as PaymentService's."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message
from payments.v1 import event_service_pb2 as pb

from gateway.application.accounts import Principal, Scope
from gateway.application.admission import Gate
from gateway.application.events import (
    ORIGIN,
    Audience,
    Batch,
    Consumer,
    ConsumerName,
    Events,
    Position,
    Reset,
    encode_cursor,
)
from gateway.domain.errors import GatewayError, Reason
from gateway.rpc.conversion import Caller
from gateway.rpc.service import Context, PaymentService
from gateway.rpc.unary import Reply, Unary, checked
from gateway.rpc.wire import length_delimited, to_timestamp

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["EventService"].full_name
STREAM_EVENTS: Final = "StreamEvents"
REQUEST_TYPES: Final[tuple[type[Message], ...]] = (
    pb.StreamEventsRequest,
    pb.AcknowledgeEventsRequest,
    pb.ListEventConsumersRequest,
    pb.DeleteEventConsumerRequest,
)

_EVENTS: Final = pb.StreamEventsResponse.EVENTS_FIELD_NUMBER
_CURSOR: Final = pb.StreamEventsResponse.CURSOR_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How many streams of events a process has."""

    streams_max: int = 200
    of_organisation_max: int = 50


class _Reach(NamedTuple):
    """Whose events a call is about."""

    organisation_id: str
    merchant_ids: frozenset[str] | None

    def consumer(self, caller: Caller, name: str) -> ConsumerName:
        return ConsumerName(self.organisation_id, caller.mode, name)


class _CallerGone(Exception):
    """A message could not be written: the transport's errors mean nothing else."""


class EventService:
    """The servicer of `payments.v1.EventService`; `door` counts and authenticates its calls."""

    def __init__(
        self, door: PaymentService, gate: Gate, events: Events, limits: StreamLimits
    ) -> None:
        self._door = door
        self._gate = gate
        self._events = events
        self._limits = limits
        self._streams: Counter[str] = Counter()
        """Those that are open, by organisation."""

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return self._streams.total()

    def method_handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """The handlers by the names of their methods, without (de)serializers."""
        around = self._door, self._gate, Scope.EVENTS_READ
        unary: tuple[Unary[Any], ...] = (
            Unary(*around, "AcknowledgeEvents", pb.AcknowledgeEventsRequest, self._acknowledge),
            Unary(*around, "ListEventConsumers", pb.ListEventConsumersRequest, self._list),
            Unary(*around, "DeleteEventConsumer", pb.DeleteEventConsumerRequest, self._delete),
        )
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        handlers = {each.method: grpc.unary_unary_rpc_method_handler(each.serve) for each in unary}
        handlers[STREAM_EVENTS] = grpc.unary_stream_rpc_method_handler(self._serve_stream)
        return handlers

    def begin_drain(self) -> None:
        """End the streams with DRAINING."""
        self._events.close()

    async def _serve_stream(self, data: bytes, context: Context) -> None:
        door = self._door
        call = door.begin(STREAM_EVENTS, context)
        try:
            door.admit(call, len(data))
            principal = await door.identify(call, Scope.EVENTS_READ)
            request: Any = checked(pb.StreamEventsRequest, data, principal, call)

            async def audience() -> Audience:
                # A stream may outlive its key, and its organisation get merchants.
                now = await door.identify(call, Scope.EVENTS_READ)
                checked(pb.StreamEventsRequest, data, now, call)
                return Audience(call.mode, _reach(now, call).merchant_ids)

            with self._admitted(principal.organisation_id):
                after = await self._begin(_reach(principal, call), call, request)
                batches = self._events.stream(audience, after, until_current=request.until_current)
                async with aclosing(batches):
                    async for batch in batches:
                        await _write(context, batch)
        except _CallerGone:
            door.abandoned(call)
            raise asyncio.CancelledError from None  # as in `PaymentService._serve_stream`
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            data, request = b"", None  # as in `Unary.serve`
            await door.failed(call, context, error)
        except BaseException:
            door.abandoned(call)
            raise
        door.answered(call, context)

    @contextmanager
    def _admitted(self, organisation_id: str) -> Iterator[None]:
        of_organisation = self._streams[organisation_id]
        if (
            self.streams >= self._limits.streams_max
            or of_organisation >= self._limits.of_organisation_max
        ):
            raise GatewayError(
                Reason.EVENT_STREAMS_TOO_MANY, "There are too many streams of events already."
            )
        self._streams[organisation_id] += 1
        try:
            yield
        finally:
            self._streams[organisation_id] -= 1
            if not self._streams[organisation_id]:
                del self._streams[organisation_id]

    async def _begin(
        self, reach: _Reach, caller: Caller, request: pb.StreamEventsRequest
    ) -> Position:
        begin_latest = request.start == pb.EVENTS_START_LATEST
        match request.WhichOneof("from"):
            case "cursor":
                return await self._events.position_of(request.cursor)
            case "consumer":
                return await self._events.consumer_position(
                    reach.consumer(caller, request.consumer),
                    reach.merchant_ids,
                    begin_latest=begin_latest,
                )
            case _:
                pass
        return await self._events.latest() if begin_latest else ORIGIN

    async def _acknowledge(
        self, principal: Principal, caller: Caller, request: pb.AcknowledgeEventsRequest
    ) -> Reply:
        reach = _reach(principal, caller)
        reason = request.reset_reason
        position, moved = await self._events.acknowledge(
            reach.consumer(caller, request.consumer),
            reach.merchant_ids,
            request.cursor,
            Reset(principal.key_id, reason) if reason else None,
        )
        return Reply.of(pb.AcknowledgeEventsResponse(cursor=encode_cursor(position), moved=moved))

    async def _list(
        self, principal: Principal, caller: Caller, _: pb.ListEventConsumersRequest
    ) -> Reply:
        reach = _reach(principal, caller)
        found = await self._events.consumers(reach.organisation_id, caller.mode, reach.merchant_ids)
        return Reply.of(pb.ListEventConsumersResponse(consumers=map(_message, found)))

    async def _delete(
        self, principal: Principal, caller: Caller, request: pb.DeleteEventConsumerRequest
    ) -> Reply:
        reach = _reach(principal, caller)
        name = reach.consumer(caller, request.consumer)
        await self._events.delete_consumer(name, reach.merchant_ids, principal.key_id)
        return Reply.of(pb.DeleteEventConsumerResponse())


def _reach(principal: Principal, caller: Caller) -> _Reach:
    if caller.merchant_id:
        return _Reach(principal.organisation_id, frozenset((caller.merchant_id,)))
    if Scope.EVENTS_READ_ALL in principal.scopes:
        return _Reach("", None)
    return _Reach(principal.organisation_id, frozenset(principal.merchants))


async def _write(context: Context, batch: Batch) -> None:
    parts = [length_delimited(_EVENTS, event.payload) for event in batch.events]
    parts.append(length_delimited(_CURSOR, encode_cursor(batch.position).encode()))
    try:
        await context.write(b"".join(parts))
    except Exception as error:
        raise _CallerGone from error


def _message(consumer: Consumer) -> pb.EventConsumer:
    return pb.EventConsumer(
        consumer=consumer.name.name,
        cursor=encode_cursor(consumer.position),
        merchant_ids=sorted(consumer.merchant_ids or ()),
        created_at=to_timestamp(consumer.created_at),
        acknowledged_at=to_timestamp(consumer.acknowledged_at),
        events_behind=consumer.events_behind,
        seconds_behind=consumer.seconds_behind,
        reset_at=to_timestamp(consumer.reset_at),
        reset_by=consumer.reset_by,
        reset_reason=consumer.reset_reason,
    )
