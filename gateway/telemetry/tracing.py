"""OpenTelemetry traces: spans of calls, their stages and their batches, sent by OTLP over HTTP.

Loaded only where the settings name an endpoint. What is traced is wrapped when the gateway is put
together, so that a gateway without tracing runs the same code as if there were none; only lanes and
HTTP clients ask whether there is a tracer. Whether a call is traced is decided once, when it
begins: by its caller's `traceparent` (W3C Trace Context), else by chance. A call that is not costs
a look at its headers and a context variable.

No attribute holds anything of a request but ids: no amount, no token, no text of an exception.
"""

import asyncio
import contextlib
import logging
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.status import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from gateway import __version__
from gateway.application.accounts import RateLimit
from gateway.application.commands import Answer, Authorize
from gateway.application.ports import (
    Change,
    ClaimResult,
    Claims,
    Connector,
    ConnectorRequest,
    Found,
    Intent,
    IntentResult,
    ListFilter,
    Page,
    Store,
    Stored,
)
from gateway.domain.errors import GatewayError
from gateway.domain.model import Aggregate, ConnectorAnswer, OperationState
from gateway.domain.pan import contains_pan
from gateway.rpc.service import (
    BATCH,
    SERVICE_NAME,
    STREAM,
    Observer,
    UseCases,
)
from gateway.rpc.service import (
    Context as CallContext,
)
from gateway.rpc.system import Handlers

SPANS_QUEUED_MAX: Final = 16_384
"""Spans that wait for the collector; further ones push out the oldest."""
SPANS_PER_EXPORT_MAX: Final = 512
"""Spans of one request to the collector."""
EXPORT_DELAY_MS: Final = 1000.0
"""How long a span waits for others before it is sent."""
EXPORT_TIMEOUT_S: Final = 5.0
"""How long a request to the collector may take, repetitions included."""
FLUSH_S_MAX: Final = 5.0
"""How long the end of the gateway waits for the collector to take the last spans."""
TRACESTATE_CHARACTERS_MAX: Final = 512
"""A longer `tracestate` is not taken over (W3C Trace Context, section 3.3.1.5)."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that make a server's span an error (OpenTelemetry's conventions for gRPC)."""

_log = logging.getLogger(__name__)
# It warns of an invalid `tracestate`, and quotes it, and anyone can send one with every call.
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TracingOptions:
    """What is traced, and where it goes."""

    endpoint: str
    """Of the collector, with the path: `http://collector:4318/v1/traces`."""
    sample_ratio: float
    """The part of the calls without a caller's decision that is traced, 0 to 1."""
    calls_per_s_max: int
    """Calls traced in a second, at most, whoever decided that they be."""
    service_name: str
    """`service.name` of the spans."""
    links_max: int
    """Requests that a batch's span is linked to, at most."""
    merchant_id: bool = False
    """Whether spans of calls tell the merchant."""


class Trace:
    """Where the running code is in a trace: within a span, or in a call that is not traced."""

    __slots__ = ("context", "id", "method", "passed_on", "span")

    def __init__(self, span: Span | None, method: str = "", passed_on: str = "") -> None:
        self.span = span
        """None where the call is not traced."""
        self.context = None if span is None else set_span_in_context(span, Context())
        """What makes a span its child."""
        self.id = "" if span is None else f"{span.get_span_context().trace_id:032x}"
        """The trace's, in hexadecimal digits; empty where the call is not traced."""
        self.method = method
        """The method's name, of a call's own span."""
        self.passed_on = passed_on
        """Of a call that its caller decided not to trace: the headers that say so to others."""


_NOT_TRACED: Final = Trace(None)
_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_trace_id() -> str:
    """The id of the running code's trace; empty where it is not traced."""
    trace = _current.get()
    return "" if trace is None else trace.id


def outgoing_headers() -> str:
    """The lines of a request's head that pass the trace on (W3C Trace Context), ended by CR LF.

    Of a call that is not traced, they say that it is not; outside of calls there are none.
    """
    trace = _current.get()
    if trace is None:
        return ""
    if trace.span is not None:
        return _headers(trace.span.get_span_context())
    if trace.passed_on:
        return trace.passed_on
    trace_id, span_id = random.getrandbits(128), random.getrandbits(64)
    return f"traceparent: 00-{trace_id:032x}-{span_id:016x}-00\r\n"


def _headers(context: SpanContext) -> str:
    flags = context.trace_flags & TraceFlags.SAMPLED  # the one flag that every version knows
    lines = f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}\r\n"
    if context.trace_state:
        lines += f"tracestate: {context.trace_state.to_header()}\r\n"
    return lines


def caller_of(metadata: Sequence[tuple[str, str | bytes]]) -> SpanContext | None:
    """The caller's span by a request's headers; None where there is none, or no valid one."""
    parent = states = None
    for name, value in metadata:
        if name == "traceparent":
            if parent is not None:  # two are as good as none
                return None
            parent = value
        elif name == "tracestate":
            states = value if states is None else None
    match = None if not isinstance(parent, str) else _TRACEPARENT.fullmatch(parent)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    state = None
    if (
        isinstance(states, str)
        and len(states) <= TRACESTATE_CHARACTERS_MAX
        and not contains_pan(states)
    ):
        state = TraceState.from_header([states])
    context = SpanContext(
        int(match[2], 16),
        int(match[3], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(match[4], 16)),
        trace_state=state,
    )
    return context if context.is_valid else None


class Tracing:
    """Makes spans and sends them off. `close` it once everything that it wraps has ended.

    The collector is told in a thread of its own: one that is slow, away or refuses costs spans,
    and neither time nor errors of a call. Also read from the environment: what OpenTelemetry's SDK
    does for its exporter, as OTEL_EXPORTER_OTLP_HEADERS, and OTEL_RESOURCE_ATTRIBUTES.
    """

    def __init__(
        self, options: TracingOptions, *, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        exporter = OTLPSpanExporter(endpoint=options.endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what is not to be traced has no span at all
            resource=Resource.create(
                {"service.name": options.service_name, "service.version": __version__}
            ),
            span_limits=SpanLimits(max_links=options.links_max),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=SPANS_QUEUED_MAX,
                schedule_delay_millis=EXPORT_DELAY_MS,
                max_export_batch_size=SPANS_PER_EXPORT_MAX,
            )
        )
        self._tracer = self._provider.get_tracer("gateway", __version__)
        self._options = options
        self._clock_s = clock_s
        self._second_ends_at = float("-inf")
        self._begun_in_second = 0

    async def close(self) -> None:
        """Send what is left, for at most FLUSH_S_MAX."""
        loop = asyncio.get_running_loop()
        sent = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # too late, and the loop is closed
                loop.call_soon_threadsafe(sent.set)

        # Not the loop's own threads: those are waited for without a limit.
        threading.Thread(target=shut_down, name="tracing-shutdown", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S_MAX):
                await sent.wait()
        except TimeoutError:
            _log.warning("the last spans were not sent")

    # --- calls ---

    def handlers(self, service: str, handlers: Handlers) -> Handlers:
        """A service's handlers, each within a span of its call where that is traced."""
        wrapped: Handlers = {}
        for name, handler in handlers.items():
            if handler.unary_unary is not None:
                serve = self._serving(service, name, handler.unary_unary)
                wrapped[name] = grpc.unary_unary_rpc_method_handler(serve)
            elif handler.unary_stream is not None:
                serve = self._serving(service, name, handler.unary_stream)
                wrapped[name] = grpc.unary_stream_rpc_method_handler(serve)
            else:
                assert handler.stream_stream is not None
                serve = self._serving(service, name, handler.stream_stream)
                wrapped[name] = grpc.stream_stream_rpc_method_handler(serve)
        return wrapped

    def _serving(self, service: str, method: str, serve: Any) -> Any:
        async def traced(request: Any, context: CallContext) -> Any:
            trace = self._begin(service, method, context)
            token = _current.set(trace)
            try:
                return await serve(request, context)
            finally:
                _current.reset(token)
                if trace.span is not None:
                    trace.span.end()

        return traced

    def _begin(self, service: str, method: str, context: CallContext) -> Trace:
        caller = caller_of(context.invocation_metadata() or ())
        if caller is None:
            wanted = random.random() < self._options.sample_ratio
        else:
            wanted = caller.trace_flags.sampled
        if not wanted or not self._may_begin():
            if caller is None:
                return _NOT_TRACED
            passed_on = SpanContext(
                caller.trace_id, caller.span_id, is_remote=False, trace_state=caller.trace_state
            )
            return Trace(None, passed_on=_headers(passed_on))
        parent = Context()
        if caller is not None:
            parent = set_span_in_context(NonRecordingSpan(caller), parent)
        span = self._tracer.start_span(
            f"{service}/{method}",
            parent,
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": f"{service}/{method}"},
        )
        # OTEL_SDK_DISABLED
        return Trace(span, method) if span.is_recording() else _NOT_TRACED

    def _may_begin(self) -> bool:
        now_s = self._clock_s()
        if now_s >= self._second_ends_at:
            self._second_ends_at = now_s + 1
            self._begun_in_second = 0
        self._begun_in_second += 1
        return self._begun_in_second <= self._options.calls_per_s_max

    def observer(self, inner: Observer) -> Observer:
        """`inner`; a call's span is told besides how it ended."""
        return _TracedObserver(inner, self._options.merchant_id)

    # --- stages ---

    def within(self, name: str, kind: SpanKind = SpanKind.INTERNAL) -> "_Within | None":
        """A span within that of the running code, to be entered; None where it is not traced."""
        trace = _current.get()
        if trace is None or trace.span is None:
            return None
        return _Within(self._tracer.start_span(name, trace.context, kind))

    def use_cases(self, inner: UseCases) -> UseCases:
        """`inner`; an item of a batch or stream has a span of its own."""
        return _TracedUseCases(inner, self)

    def claims(self, inner: Claims) -> Claims:
        """`inner`, with a span `claim`."""
        return _TracedClaims(inner, self)

    def store(self, inner: Store) -> Store:
        """`inner`, with spans `intent`, `outcome` and `read`."""
        return _TracedStore(inner, self)

    def connector(self, inner: Connector) -> Connector:
        """`inner`, with a span of each request to the PSP that is sent for a call."""
        return _TracedConnector(inner, self)

    # --- batches: storage.batching.LaneTracer ---

    def carried(self) -> object | None:
        """The span that a row is submitted in."""
        trace = _current.get()
        return None if trace is None or trace.span is None else trace.span.get_span_context()

    def flush(
        self, lane: str, rows: int, carried: Sequence[object], sending: Awaitable[T]
    ) -> Awaitable[T]:
        """Await a flush, within a span linked to those of its rows where there are any."""
        return self._flush(lane, rows, carried, sending) if carried else sending

    async def _flush(
        self, lane: str, rows: int, carried: Sequence[object], sending: Awaitable[T]
    ) -> T:
        # Of no trace: it is part of as many as it is linked to.
        span = self._tracer.start_span(
            f"batch {lane}",
            Context(),
            attributes={"gateway.lane": lane, "gateway.batch.rows": rows},
            links=[Link(cast(SpanContext, each)) for each in carried],
        )
        try:
            return await sending
        except BaseException as error:
            _fail(span, error)
            raise
        finally:
            span.end()


class _Within:
    """A span, in which what is awaited within it is. Ended by an exception, it tells its kind."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> Self:
        self._token: Token[Trace | None] = _current.set(Trace(self._span))
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _current.reset(self._token)
        if error is not None:
            _fail(self._span, error)
        self._span.end()

    def tell(self, attributes: Mapping[str, AttributeValue]) -> None:
        """Give the span these attributes."""
        self._span.set_attributes(attributes)


def _fail(span: Span, error: BaseException) -> None:
    """A refusal has a reason; of everything else only the kind is told, since texts may quote."""
    if isinstance(error, GatewayError):
        span.set_attribute("gateway.reason", error.reason.value)
        return
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR))


class _TracedObserver:
    """Implements `gateway.rpc.service.Observer`."""

    def __init__(self, inner: Observer, tell_merchant: bool) -> None:
        self.rpc_started = inner.rpc_started
        self._finished = inner.rpc_finished
        self._tell_merchant = tell_merchant

    def rpc_finished(
        self,
        method: str,
        code: str,
        reason: str,
        seconds: float,
        request_id: str,
        merchant_id: str,
        payment_id: str,
    ) -> None:
        """Tell the call's span, and pass it on; an item's span has ended by itself."""
        self._finished(method, code, reason, seconds, request_id, merchant_id, payment_id)
        trace = _current.get()
        if trace is None or trace.span is None or trace.method != method:
            return
        told = {"rpc.response.status_code": code, "gateway.request_id": request_id}
        if reason:
            told["gateway.reason"] = reason
        if payment_id:
            told["gateway.payment_id"] = payment_id
        if self._tell_merchant and merchant_id:
            told["gateway.merchant_id"] = merchant_id
        trace.span.set_attributes(told)
        if code in _FAULTS:
            trace.span.set_attribute("error.type", code)
            trace.span.set_status(Status(StatusCode.ERROR))


class _TracedUseCases:
    """Implements `gateway.rpc.service.UseCases`."""

    def __init__(self, inner: UseCases, tracing: Tracing) -> None:
        self._authorize = inner.authorize
        self._tracing = tracing
        self.capture = inner.capture
        self.void = inner.void
        self.refund = inner.refund
        self.increment = inner.increment
        self.get_payment = inner.get_payment
        self.get_operation = inner.get_operation
        self.list_payments = inner.list_payments

    async def authorize(self, command: Authorize) -> Answer:
        """Authorize, within an item's span where it is one."""
        trace = _current.get()
        if trace is None or trace.span is None or trace.method not in (BATCH, STREAM):
            return await self._authorize(command)
        span = self._tracing.within(f"{SERVICE_NAME}/{trace.method}/item")
        assert span is not None, "the trace has a span"
        with span:
            answer = await self._authorize(command)
            span.tell(
                {"gateway.payment_id": answer.payment_id, "gateway.replayed": answer.replayed}
            )
            return answer


class _TracedClaims:
    """Implements `gateway.application.ports.Claims`."""

    def __init__(self, inner: Claims, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing
        self.release = inner.release
        self.cache = inner.cache

    @property
    def generation(self) -> str | None:
        """See Claims."""
        return self._inner.generation

    async def claim(
        self,
        merchant_id: str,
        idempotency_key: str,
        fingerprint: bytes,
        rate_limit: RateLimit | None = None,
    ) -> ClaimResult:
        """See Claims."""
        span = self._tracing.within("claim")
        if span is None:
            return await self._inner.claim(merchant_id, idempotency_key, fingerprint, rate_limit)
        with span:
            result = await self._inner.claim(merchant_id, idempotency_key, fingerprint, rate_limit)
            span.tell({"gateway.claim": result.outcome.value})
            return result


class _TracedStore:
    """Implements `gateway.application.ports.Store`."""

    def __init__(self, inner: Store, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing
        self.add_evidence = inner.add_evidence
        self.expired = inner.expired
        self.lease = inner.lease
        self.begin_cancel = inner.begin_cancel
        self.postpone = inner.postpone
        self.hasten = inner.hasten
        self.forget = inner.forget

    async def write_intent(self, intent: Intent) -> IntentResult:
        """See Store."""
        span = self._tracing.within("intent")
        if span is None:
            return await self._inner.write_intent(intent)
        with span:
            result = await self._inner.write_intent(intent)
            span.tell(_of_operation(intent) | {"gateway.stored": result.stored.name})
            return result

    async def write_change(self, change: Change) -> Stored:
        """See Store. What is PROCESSING afterwards is a new attempt's intent."""
        sending = change.operation.state is OperationState.PROCESSING
        span = self._tracing.within("intent" if sending else "outcome")
        if span is None:
            return await self._inner.write_change(change)
        with span:
            stored = await self._inner.write_change(change)
            span.tell(_of_operation(change) | {"gateway.stored": stored.name})
            return stored

    async def find_by_key(self, merchant_id: str, idempotency_key: str) -> Found | None:
        """See Store."""
        return await self._read(self._inner.find_by_key(merchant_id, idempotency_key))

    async def find_operation(
        self, merchant_id: str, operation_id: str, *, for_outcome: bool = False
    ) -> Found | None:
        """See Store."""
        reading = self._inner.find_operation(merchant_id, operation_id, for_outcome=for_outcome)
        return await self._read(reading)

    async def load(
        self, merchant_id: str, payment_id: str, *, for_outcome: bool = False
    ) -> Aggregate | None:
        """See Store."""
        return await self._read(self._inner.load(merchant_id, payment_id, for_outcome=for_outcome))

    async def list_payments(self, filter_: ListFilter) -> Page:
        """See Store."""
        return await self._read(self._inner.list_payments(filter_))

    async def _read(self, reading: Awaitable[T]) -> T:
        span = self._tracing.within("read")
        if span is None:
            return await reading
        with span:
            return await reading


def _of_operation(write: Intent | Change) -> dict[str, AttributeValue]:
    operation = write.operation
    return {
        "gateway.operation.id": operation.operation_id,
        "gateway.operation.kind": operation.kind.name,
        "gateway.operation.state": operation.state.name,
        "gateway.payment_id": operation.payment_id,
    }


class _TracedConnector:
    """Implements `gateway.application.ports.Connector`."""

    def __init__(self, inner: Connector, tracing: Tracing) -> None:
        self._tracing = tracing
        self._send = inner.send
        self.name = inner.name
        self.capabilities = inner.capabilities
        self.query = inner.query
        self.cancel = inner.cancel
        self.close = inner.close

    async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """See Connector."""
        span = self._tracing.within(f"psp {self.name}", SpanKind.CLIENT)
        if span is None:
            return await self._send(request, send_before)
        with span:
            answer = await self._send(request, send_before)
            told = {
                "gateway.connector": self.name,
                "gateway.attempt.reference": request.reference,
                "gateway.operation.kind": request.kind.name,
                "gateway.psp.delivery": answer.delivery.name,
                "gateway.psp.verdict": answer.verdict.name,
            }
            if answer.reason:
                told["gateway.reason"] = answer.reason
            span.tell(told)
            return answer
