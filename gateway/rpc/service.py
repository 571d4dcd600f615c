"""The handlers of PaymentService: bytes in, bytes out, the same on both transports.

They take bytes, because the transports answer a message that does not parse, and any exception,
with statuses and texts of their own. Each is wrapped once, at registration: interceptors would cost
more.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from payments.v1.payment_service_pb2 import (
    DESCRIPTOR,
    AuthorizePaymentItem,
    AuthorizePaymentRequest,
    BatchAuthorizePaymentsRequest,
    CapturePaymentRequest,
    GetOperationRequest,
    GetPaymentRequest,
    IncrementAuthorizationRequest,
    ListPaymentsRequest,
    RefundPaymentRequest,
    StreamAuthorizePaymentsRequest,
    VoidPaymentRequest,
)

from gateway.application.accounts import MerchantInfo, Principal, Scope
from gateway.application.admission import Admission, AdmissionLimits, Gate, Stage, Work, open_gates
from gateway.application.commands import Answer, Authorize, Capture, Increment, Refund, Void
from gateway.application.ports import Found, ListFilter, Page
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_request_id
from gateway.domain.model import Aggregate, Mode, OperationState
from gateway.domain.pan import contains_pan
from gateway.rpc import conversion, error_map, validation
from gateway.rpc.auth import Authenticator, find_merchant, require_scope, resolve_merchant
from gateway.rpc.conversion import Caller
from gateway.rpc.paging import decode_page_token, encode_page_token, filter_digest
from gateway.rpc.peers import PeerIdentities, PeerIdentity

SERVICE_NAME: Final = DESCRIPTOR.services_by_name["PaymentService"].full_name

BATCH: Final = "BatchAuthorizePayments"
STREAM: Final = "StreamAuthorizePayments"

AUTHORIZATION_HEADER: Final = "authorization"
REQUEST_ID_HEADER: Final = "x-request-id"
"""Taken over from the caller where it is printable; told as a trailer of every call."""

_DEADLINE_S_MAX: Final = 1e9
"""A deadline farther away is none: the native transport says 9e18 s where there is none."""
_ITEMS_BEGUN_AT_ONCE: Final = 50
"""After so many items of a batch, other calls have their turn."""
_BYTES_LOOKED_AT_AT_ONCE: Final = 8_192
"""The same, after so many bytes of items whose strings are looked at one by one."""
_PLAIN_REFUSALS_KEPT: Final = 512
"""Refusals that say nothing of their call are encoded once, so that many cost little."""

_ITEM: Final = Work.ITEM  # looked up once, as in `gateway.application.admission`

_log = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """The bounds of the handlers; times in seconds."""

    message_bytes_max: int = 2 * 1024 * 1024
    """The largest request. Half of the 4 MiB that stock clients take, since the answer to a batch
    echoes it."""
    response_bytes_max: int = 3 * 1024 * 1024
    """The size at which a page of ListPayments or a message of a stream ends."""
    batch_wait_s_max: float = 30.0
    """How long a batch waits for its items before it answers."""
    batch_margin_s: float = 0.1
    """How long before its deadline a batch answers; half of the time left where that is less."""
    stream_window_items: int = 256
    """Items of one stream that may be unfinished, or finished and not yet written."""


class UseCases(Protocol):
    """What the handlers call: `gateway.application.usecases.Payments`."""

    async def authorize(self, command: Authorize) -> Answer:
        """Authorize or verify."""

    async def capture(self, command: Capture) -> Answer:
        """Capture."""

    async def void(self, command: Void) -> Answer:
        """Void."""

    async def refund(self, command: Refund) -> Answer:
        """Refund."""

    async def increment(self, command: Increment) -> Answer:
        """Raise the authorized amount."""

    async def get_payment(self, merchant_id: str, mode: Mode, payment_id: str) -> Aggregate:
        """A payment with its operations."""

    async def get_operation(
        self,
        merchant_id: str,
        mode: Mode,
        *,
        operation_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Found:
        """An operation with its payment."""

    async def list_payments(self, filter_: ListFilter) -> Page:
        """A page of payments."""


class Observer(Protocol):
    """Metrics and the access log."""

    def rpc_started(self, method: str) -> None:
        """A call began, or an item of a batch or stream; one `rpc_finished` follows."""

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
        """A call ended, or an item of a batch or stream (method `<method>/item`).

        `code` is a gRPC status code's name; `reason` a Reason or empty; ids may be empty.
        """


class Context(Protocol):
    """What the handlers use of `grpc.aio.ServicerContext`, alike on both transports."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        """The request's headers."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the connection's handshake proved."""

    def time_remaining(self) -> float | None:
        """Seconds until the deadline."""

    def set_trailing_metadata(self, trailing_metadata: error_map.Trailers) -> None:
        """The trailers of an answered call."""

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: error_map.Trailers
    ) -> NoReturn:
        """End the call with an error."""

    async def read(self) -> Any:
        """The next message of a stream, bytes or `grpc.aio.EOF`."""

    async def write(self, message: bytes) -> None:
        """Write a message of a stream; waits while the client does not read."""


@dataclass(slots=True)
class _Call(Caller):
    """One call, from its first byte to its status."""

    method: str = ""
    started: float = 0.0
    authorization: str | PeerIdentity | None = None
    payment_id: str = ""

    @property
    def item_method(self) -> str:
        """What the items of a batch or stream are counted as."""
        return f"{self.method}/item"


@dataclass(slots=True)
class _Item:
    """One item of a batch or stream."""

    item_ref: str
    """What the result repeats."""
    started: float
    command: Authorize | None = None
    """None where the item was refused before there was one."""
    refusal: GatewayError | None = None
    task: "asyncio.Task[Answer | GatewayError] | None" = None


class PaymentService:
    """The servicer of `payments.v1.PaymentService`."""

    def __init__(
        self,
        payments: UseCases,
        authenticator: Authenticator,
        observer: Observer,
        limits: RpcLimits,
        admission: Admission | None = None,
        peers: PeerIdentities | None = None,
    ) -> None:
        self._admission = open_gates(AdmissionLimits()) if admission is None else admission
        self._peers = peers
        self._payments = payments
        self._authenticator = authenticator
        self._observer = observer
        self._limits = limits
        self._draining = False
        self.calls_begun = 0
        """How many calls have arrived until now, refused ones too."""
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._streams: set[_Stream] = set()
        self._detached: set[asyncio.Task[Any]] = set()
        self.pushback = True
        """Whether errors carry the pushback trailer: not where the transport cannot send it."""

    def method_handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """The handlers by the names of their methods, without (de)serializers."""
        gates = self._admission
        pay = _Kind(Scope.PAYMENTS_WRITE, gates.payments, Work.PAYMENT)
        read = _Kind(Scope.PAYMENTS_READ, gates.reads, Work.READ)
        list_ = _Kind(Scope.PAYMENTS_READ, gates.lists, Work.LIST)
        unary: tuple[_Unary[Any], ...] = (
            _Unary(self, "AuthorizePayment", pay, AuthorizePaymentRequest, self._authorize),
            _Unary(self, "CapturePayment", pay, CapturePaymentRequest, self._capture),
            _Unary(self, "VoidPayment", pay, VoidPaymentRequest, self._void),
            _Unary(self, "RefundPayment", pay, RefundPaymentRequest, self._refund),
            _Unary(
                self, "IncrementAuthorization", pay, IncrementAuthorizationRequest, self._increment
            ),
            _Unary(self, "GetPayment", read, GetPaymentRequest, self._get_payment),
            _Unary(self, "ListPayments", list_, ListPaymentsRequest, self._list_payments),
            _Unary(self, "GetOperation", read, GetOperationRequest, self._get_operation),
        )
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        handlers = {each.method: grpc.unary_unary_rpc_method_handler(each.serve) for each in unary}
        handlers[BATCH] = grpc.unary_unary_rpc_method_handler(self._serve_batch)
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(self._serve_stream)
        return handlers

    # --- draining ---

    def begin_drain(self) -> None:
        """Refuse new calls with DRAINING, and read no more of the streams."""
        self._draining = True
        for stream in self._streams:
            stream.stop_reading()

    async def wait_idle(self) -> None:
        """Wait until every call is answered and no item of a batch or stream is unfinished."""
        while self._in_flight or self._detached:
            if self._in_flight:
                await self._idle.wait()
            else:
                await asyncio.wait(self._detached)

    # --- a call's beginning and end ---

    def begin(self, method: str, context: Context) -> _Call:
        """Count a call in; `end` counts it out."""
        self.calls_begun += 1
        self._in_flight += 1
        self._idle.clear()
        call = _Call(method=method, started=time.perf_counter())
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s < _DEADLINE_S_MAX:
            call.deadline = time.monotonic() + remaining_s
        for name, value in context.invocation_metadata() or ():
            if name == AUTHORIZATION_HEADER and call.authorization is None:
                call.authorization = cast("str", value)
            elif name == REQUEST_ID_HEADER:
                call.request_id = cast("str", value)
        if call.authorization is None and self._peers is not None:
            call.authorization = self._peers.of(context)
        self._observer.rpc_started(method)
        return call

    def admit(self, call: _Call, request_bytes: int) -> None:
        """Settle the request's id; refuse what need not be read. Raises GatewayError."""
        given_id = call.request_id
        if not given_id or not validation.is_usable_request_id(given_id):
            call.request_id = new_request_id()
        elif contains_pan(given_id):
            call.request_id = new_request_id()
            raise validation.card_data_refusal(REQUEST_ID_HEADER)
        if self._draining:
            raise GatewayError(Reason.DRAINING, "This server is shutting down.")
        if call.deadline is not None and time.monotonic() >= call.deadline:
            raise GatewayError(
                Reason.DEADLINE_TOO_SHORT, "The deadline passed before the call was begun."
            )
        if request_bytes > self._limits.message_bytes_max:
            raise GatewayError(
                Reason.MESSAGE_TOO_LARGE,
                f"The message has more than {self._limits.message_bytes_max} bytes.",
            )

    async def identify(self, call: _Call, scope: Scope) -> Principal:
        """Who calls. Raises GatewayError where the key is not valid or has not the scope."""
        authenticator = self._authenticator
        principal = authenticator.remembered(call.authorization)
        if principal is None:
            principal = await authenticator.authenticate(call.authorization)
        require_scope(principal, scope)
        call.mode = principal.mode
        return principal

    def end(self, call: _Call, code: str, reason: str) -> None:
        """Count a call out and report it."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()
        self._observer.rpc_finished(
            call.method,
            code,
            reason,
            time.perf_counter() - call.started,
            call.request_id,
            call.merchant_id,
            call.payment_id,
        )

    def answered(self, call: _Call, context: Context) -> None:
        """End a call with OK."""
        context.set_trailing_metadata(((REQUEST_ID_HEADER, call.request_id),))
        self.end(call, "OK", "")

    async def failed(self, call: _Call, context: Context, error: Exception) -> NoReturn:
        """End a call with the status of an error."""
        refusal = _as_refusal(error, call)
        # grpc.aio keeps what `abort` raises, in a cycle with the call, and with it this error.
        forget_frames(error)
        code = error_map.status_code(refusal.reason)
        self.end(call, code.name, refusal.reason)
        text, trailers = _ending(refusal, pushback=self.pushback)
        await context.abort(code, text, (*trailers, (REQUEST_ID_HEADER, call.request_id)))

    def abandoned(self, call: _Call) -> None:
        """End a call whose caller has gone, or whose deadline has passed."""
        late = call.deadline is not None and time.monotonic() >= call.deadline
        self.end(call, "DEADLINE_EXCEEDED" if late else "CANCELLED", "")

    # --- money calls ---

    async def _authorize(self, call: _Call, request: AuthorizePaymentRequest) -> bytes:
        validation.refuse_verification_values(request)
        answer = await self._payments.authorize(conversion.to_authorize(request, call))
        call.payment_id = answer.payment_id
        return conversion.encode_answer(answer)

    async def _capture(self, call: _Call, request: CapturePaymentRequest) -> bytes:
        call.payment_id = request.payment_id
        return conversion.encode_answer(
            await self._payments.capture(conversion.to_capture(request, call))
        )

    async def _void(self, call: _Call, request: VoidPaymentRequest) -> bytes:
        answer = await self._payments.void(conversion.to_void(request, call))
        call.payment_id = answer.payment_id
        return conversion.encode_answer(answer)

    async def _refund(self, call: _Call, request: RefundPaymentRequest) -> bytes:
        call.payment_id = request.payment_id
        return conversion.encode_answer(
            await self._payments.refund(conversion.to_refund(request, call))
        )

    async def _increment(self, call: _Call, request: IncrementAuthorizationRequest) -> bytes:
        call.payment_id = request.payment_id
        return conversion.encode_answer(
            await self._payments.increment(conversion.to_increment(request, call))
        )

    # --- reads ---

    async def _get_payment(self, call: _Call, request: GetPaymentRequest) -> bytes:
        call.payment_id = request.payment_id
        return conversion.encode_aggregate(
            await self._payments.get_payment(call.merchant_id, call.mode, request.payment_id)
        )

    async def _get_operation(self, call: _Call, request: GetOperationRequest) -> bytes:
        by_id = request.WhichOneof("target") == "operation_id"
        found = await self._payments.get_operation(
            call.merchant_id,
            call.mode,
            operation_id=request.operation_id if by_id else None,
            idempotency_key=None if by_id else request.idempotency_key,
        )
        call.payment_id = found.payment.payment_id
        return conversion.encode_found(found)

    async def _list_payments(self, call: _Call, request: ListPaymentsRequest) -> bytes:
        digest = filter_digest(request, call)
        after = decode_page_token(digest, request.page_token)
        page = await self._payments.list_payments(conversion.to_list_filter(request, call, after))
        encoded: list[bytes] = []
        next_after = page.next_after
        room_bytes = self._limits.response_bytes_max
        for payment in page.payments:
            encoding = conversion.encode_payment(payment)
            room_bytes -= len(encoding)
            if room_bytes < 0 and encoded:
                last = page.payments[len(encoded) - 1]
                if last.created_at is not None:
                    next_after = (last.created_at, last.payment_id)
                break
            encoded.append(encoding)
        return conversion.encode_page(encoded, encode_page_token(digest, next_after))

    # --- items of batches and streams ---

    def prepare(
        self, call: _Call, principal: Principal, item: AuthorizePaymentItem, suspect: bool
    ) -> _Item:
        """Check an item; what is wrong with it becomes its own refusal."""
        prepared = _Item(validation.echoed_item_ref(item), time.perf_counter())
        self._observer.rpc_started(call.item_method)
        gate, admitted = self._admission.payments, ""
        request = item.authorization
        try:
            # First: what is refused for overload has to be cheap.
            merchant = find_merchant(principal, request.merchant_id)
            if merchant is not None:
                gate.admit(merchant.merchant_id, _ITEM)
                admitted = merchant.merchant_id
            validation.validate_item(item, prepared.item_ref)
            caller = Caller(call.request_id, "", call.mode, call.deadline)
            if suspect:
                # Some item's bytes, or where two items meet: whether this one's are is cheaper to
                # tell than to look at its strings.
                suspect = validation.is_suspect(request.SerializeToString())
            check(request, principal, merchant, caller, suspect)
            validation.refuse_verification_values(request)
            prepared.command = conversion.to_authorize(request, caller)
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            if admitted:
                gate.release(admitted)
            prepared.refusal = _as_refusal(error, call)
            self._item_ended(call, prepared, prepared.refusal)
        return prepared

    def start(self, call: _Call, item: _Item, earlier: "asyncio.Task[Any] | None") -> None:
        """Begin an item's authorization, after an earlier one with the same key."""
        if item.command is not None:
            item.command.item = True
            item.task = self._detach(self._perform(call, item, item.command, earlier))

    def _detach(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task that goes on without whoever waits for it; draining waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._detached.add(task)
        task.add_done_callback(self._forget)
        return task

    async def _perform(
        self, call: _Call, item: _Item, command: Authorize, earlier: "asyncio.Task[Any] | None"
    ) -> Answer | GatewayError:
        """What an item's authorization comes to. It ends here, whoever still waits for it."""
        outcome: Answer | GatewayError | None = None
        gate = self._admission.payments
        try:
            if earlier is not None:
                gate.leave(command.merchant_id)
                try:
                    await asyncio.wait((earlier,))
                finally:
                    gate.come_back(command.merchant_id)
            outcome = await self._payments.authorize(command)
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            outcome = _as_refusal(error, call)
        finally:
            gate.release(command.merchant_id)
            self._item_ended(call, item, _in_flight() if outcome is None else outcome)
        return outcome

    def _item_ended(self, call: _Call, item: _Item, outcome: Answer | GatewayError) -> None:
        if isinstance(outcome, GatewayError):
            code, reason = error_map.status_code(outcome.reason).name, str(outcome.reason)
            payment_id = ""
        else:
            code, reason, payment_id = "OK", "", outcome.payment_id
        self._observer.rpc_finished(
            call.item_method,
            code,
            reason,
            time.perf_counter() - item.started,
            call.request_id,
            "" if item.command is None else item.command.merchant_id,
            payment_id,
        )

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._detached.discard(task)
        if not task.cancelled():
            # Its caller may have gone, and then nobody else asks.
            task.exception()

    def result(self, item: _Item) -> bytes:
        """The encoded result of an item that was refused or whose task has ended."""
        if item.task is None or item.task.cancelled():
            return _refused_result(item, item.refusal or _in_flight())
        outcome = item.task.result()
        if isinstance(outcome, GatewayError):
            return _refused_result(item, outcome)
        return conversion.encode_result(item.item_ref, conversion.encode_answer(outcome))

    # --- batches ---

    async def _serve_batch(self, data: bytes, context: Context) -> bytes:
        call = self.begin(BATCH, context)
        try:
            self.admit(call, len(data))
            principal = await self.identify(call, Scope.PAYMENTS_WRITE)
            request = validation.parse(BatchAuthorizePaymentsRequest, data)
            validation.validate_items(request.items, validation.BATCH_ITEMS_MAX)
            validation.validate_item_refs(request.items)
            response = await self._batch(
                call, principal, request.items, validation.is_suspect(data)
            )
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            data, request = b"", None  # as in `_Unary.serve`
            await self.failed(call, context, error)
        except asyncio.CancelledError:
            self.abandoned(call)
            raise
        self.answered(call, context)
        return response

    async def _batch(
        self,
        call: _Call,
        principal: Principal,
        requests: Sequence[AuthorizePaymentItem],
        suspect: bool,
    ) -> bytes:
        until = time.monotonic() + self._limits.batch_wait_s_max
        margin_s = self._limits.batch_margin_s
        if call.deadline is not None:
            left_s = call.deadline - time.monotonic()
            margin_s = min(margin_s, left_s / 2)
            until = min(until, call.deadline - margin_s)
        items: list[_Item] = []
        latest: dict[tuple[str, str], asyncio.Task[Any]] = {}
        looked_at_bytes = 0
        for request in requests:
            if suspect:
                looked_at_bytes += request.ByteSize()
            if (
                len(items) % _ITEMS_BEGUN_AT_ONCE == _ITEMS_BEGUN_AT_ONCE - 1
                or looked_at_bytes > _BYTES_LOOKED_AT_AT_ONCE
            ):
                looked_at_bytes = 0
                await asyncio.sleep(0)
            item = self.prepare(call, principal, request, suspect)
            items.append(item)
            if item.command is not None:
                key = (item.command.merchant_id, item.command.idempotency_key)
                self.start(call, item, latest.get(key))
                if item.task is not None:
                    latest[key] = item.task
            elif _breaks_rules(item):
                await asyncio.sleep(0)
        tasks = [item.task for item in items if item.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
        unfinished = {
            index: self._detach(self._unfinished_result(item, item.command))
            for index, item in enumerate(items)
            if item.command is not None and item.task is not None and not item.task.done()
        }
        if unfinished:
            await asyncio.wait(unfinished.values(), timeout=margin_s / 2)
        return b"".join(
            self._read_or_in_flight(call, item, unfinished[index])
            if index in unfinished
            else self.result(item)
            for index, item in enumerate(items)
        )

    async def _unfinished_result(self, item: _Item, command: Authorize) -> bytes:
        """The result of an item that goes on without its caller: what its operation is now.

        An attempt that was never sent says nothing of this one, which may yet be sent.
        """
        found = await self._payments.get_operation(
            command.merchant_id, command.mode, idempotency_key=command.idempotency_key
        )
        operation = found.operation
        if operation.fingerprint != command.fingerprint:
            raise GatewayError(
                Reason.IDEMPOTENCY_KEY_REUSED, "The idempotency key was used with another payload."
            )
        if operation.state is OperationState.NOT_SENT:
            raise _in_flight()
        response = operation.response or conversion.encode_found(found)
        is_answered = operation.state is not OperationState.PROCESSING
        # A repeat may have its first call's request id.
        is_mine = command.executes and operation.request_id == command.request_id
        answer = Answer(
            response, is_answered and not is_mine, operation.request_id, operation.payment_id
        )
        return conversion.encode_result(item.item_ref, conversion.encode_answer(answer))

    def _read_or_in_flight(self, call: _Call, item: _Item, reading: "asyncio.Task[bytes]") -> bytes:
        if item.task is not None and item.task.done():
            reading.cancel()
            return self.result(item)
        if not reading.done():
            reading.cancel()
            return _refused_result(item, _in_flight())
        error = reading.exception()
        if error is None:
            return reading.result()
        refusal = _as_refusal(error, call)
        if refusal.reason is Reason.OPERATION_NOT_FOUND:
            refusal = _in_flight()
        return _refused_result(item, refusal)

    # --- streams ---

    async def _serve_stream(self, _requests: object, context: Context) -> None:
        call = self.begin(STREAM, context)
        stream = _Stream(self, call, context, self._limits)
        self._streams.add(stream)
        try:
            self.admit(call, 0)
            await self.identify(call, Scope.PAYMENTS_WRITE)
            await stream.run()
        except _CallerGone:
            self.abandoned(call)
            # Returned from, grpc.aio would send a status, and log as an error that it cannot.
            raise asyncio.CancelledError from None
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            await self.failed(call, context, error)
        except asyncio.CancelledError:
            self.abandoned(call)
            raise
        finally:
            self._streams.discard(stream)
        self.answered(call, context)

    # --- what is no method ---

    async def serve_unknown(self, _requests: object, context: Context) -> None:
        """The handler of every method that the server does not have."""
        call = self.begin("unknown", context)
        try:
            self.admit(call, 0)
            raise GatewayError(Reason.METHOD_NOT_FOUND, "The server has no such method.")
        except GatewayError as error:
            await self.failed(call, context, error)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What methods of one kind need."""

    scope: Scope
    gate: Gate
    work: Work


class _Unary(Generic[_M]):
    """One unary method: what stands around its call."""

    def __init__(
        self,
        service: PaymentService,
        method: str,
        kind: _Kind,
        request_type: type[_M],
        perform: Callable[[_Call, _M], Coroutine[Any, Any, bytes]],
    ) -> None:
        self.method = method
        self._service = service
        self._kind = kind
        self._request_type = request_type
        self._perform = perform

    async def serve(self, data: bytes, context: Context) -> bytes:
        """The handler."""
        service, kind = self._service, self._kind
        gate, admitted = kind.gate, ""
        call = service.begin(self.method, context)
        try:
            service.admit(call, len(data))
            principal = await service.identify(call, kind.scope)
            request: Any = validation.parse(self._request_type, data)
            # Before all that costs more; `check` refuses what names no merchant of the principal.
            merchant = find_merchant(principal, request.merchant_id)
            if merchant is not None:
                gate.admit(merchant.merchant_id, kind.work)
                admitted = merchant.merchant_id
            try:
                check(request, principal, merchant, call, validation.is_suspect(data))
                began = time.perf_counter()
                response = await self._perform(call, request)
                if kind.scope is Scope.PAYMENTS_READ:
                    gate.passed(Stage.READ, time.perf_counter() - began)
            finally:
                if admitted:
                    gate.release(admitted)
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            data, request = b"", None  # this frame, too, lives on with what `failed` raises
            await service.failed(call, context, error)
        except asyncio.CancelledError:
            service.abandoned(call)
            raise
        service.answered(call, context)
        return response


class _CallerGone(Exception):
    """A stream could not be read or written: the transport's errors mean nothing else."""


class _Stream:
    """One StreamAuthorizePayments: a reader that starts items, and the writer of their results.

    At most `stream_window_items` are between the two; beyond that nothing is read, and HTTP/2's
    flow control stops the client. What ends the reading is told after the results of what was
    begun.
    """

    def __init__(
        self, service: PaymentService, call: _Call, context: Context, limits: RpcLimits
    ) -> None:
        self._service = service
        self._call = call
        self._context = context
        self._limits = limits
        self._unfinished = 0
        self._ready: list[bytes] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._stopped = False

    def stop_reading(self) -> None:
        """End the stream with DRAINING once the results of what was begun are written."""
        self._stopped = True
        if self._reader is not None:
            self._reader.cancel()

    async def run(self) -> None:
        """Serve the stream to its end. Raises what ended the reading, but for the client's end."""
        self._reader = reader = asyncio.get_running_loop().create_task(self._read())
        reader.add_done_callback(self._reading_ended)
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._ready:
                    await self._write()
                if reader.done() and not self._unfinished:
                    break
        except BaseException:
            reader.cancel()
            raise
        finally:
            # Or what it has read would stay, in a cycle, until the collector comes.
            self._reader = None
        if reader.cancelled():
            raise GatewayError(Reason.DRAINING, "This server is shutting down.")
        reader.result()

    def _reading_ended(self, reader: "asyncio.Task[None]") -> None:
        if not reader.cancelled():
            # Where the writing ended first, nobody else asks.
            reader.exception()
        self._wake.set()

    async def _write(self) -> None:
        # All that is ready in one message, within its limit.
        count, size_bytes = 0, 0
        for result in self._ready:
            size_bytes += len(result)
            if count and size_bytes > self._limits.response_bytes_max:
                break
            count += 1
        message = b"".join(self._ready[:count])
        del self._ready[:count]
        try:
            await self._context.write(message)
        except Exception as error:
            raise _CallerGone from error
        self._unfinished -= count
        self._room.set()

    async def _read(self) -> None:
        service, call = self._service, self._call
        while not self._stopped:
            await self._wait_for_room()
            try:
                data = await self._context.read()
            except Exception as error:
                raise _CallerGone from error
            if data is grpc.aio.EOF:
                return
            # A long stream may outlive its key.
            principal = await service.identify(call, Scope.PAYMENTS_WRITE)
            if len(data) > self._limits.message_bytes_max:
                raise GatewayError(
                    Reason.MESSAGE_TOO_LARGE,
                    f"The message has more than {self._limits.message_bytes_max} bytes.",
                )
            request = validation.parse(StreamAuthorizePaymentsRequest, data)
            validation.validate_items(request.items, validation.STREAM_ITEMS_MAX)
            suspect = validation.is_suspect(data)
            looked_at_bytes = 0
            for each in request.items:
                if suspect:
                    looked_at_bytes += each.ByteSize()
                    if looked_at_bytes > _BYTES_LOOKED_AT_AT_ONCE:
                        looked_at_bytes = 0
                        await asyncio.sleep(0)
                if await self._wait_for_room():
                    # However long its client left the results unread.
                    principal = await service.identify(call, Scope.PAYMENTS_WRITE)
                item = service.prepare(call, principal, each, suspect)
                self._start(item)
                if _breaks_rules(item):
                    await asyncio.sleep(0)
        raise GatewayError(Reason.DRAINING, "This server is shutting down.")

    async def _wait_for_room(self) -> bool:
        """Whether that took any time."""
        waited = False
        while self._unfinished >= self._limits.stream_window_items:
            waited = True
            self._room.clear()
            await self._room.wait()
        return waited

    def _start(self, item: _Item) -> None:
        self._unfinished += 1
        self._service.start(self._call, item, None)
        if item.task is None:
            self._finish(item)
        else:
            item.task.add_done_callback(lambda _: self._finish(item))

    def _finish(self, item: _Item) -> None:
        self._ready.append(self._service.result(item))
        self._wake.set()


def check(
    request: Any,
    principal: Principal,
    merchant: MerchantInfo | None,
    caller: Caller,
    suspect: bool,
) -> None:
    """Check a request with a `merchant_id`, and tell its merchant, as `find_merchant` found it, to
    `caller`. Raises GatewayError.

    Card data come first: a card number in the wrong place breaks other rules too.
    """
    if suspect:
        validation.refuse_card_numbers(request, merchant)
    validation.validate(request)
    if merchant is None:
        merchant = resolve_merchant(principal, request.merchant_id)
    caller.merchant_id, caller.rate_limit = merchant.merchant_id, merchant.rate_limit


def _breaks_rules(item: _Item) -> bool:
    """Whether others have to have their turn: to find all the rules that an item breaks takes
    milliseconds, a hundred times as long as one that breaks none.
    """
    return item.refusal is not None and item.refusal.reason is Reason.INVALID_REQUEST


def forget_frames(error: BaseException) -> None:
    """Keep an error, and not what it came of: in a cycle the frames of its traceback, and of the
    errors behind it, would hold all that they know until the collector comes, the whole message
    among it.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None


def _as_refusal(error: BaseException, call: _Call) -> GatewayError:
    """The refusal that an exception is answered with; what is no refusal is logged.

    Without its frames: the one that keeps the refusal of an item is among them.
    """
    if isinstance(error, GatewayError):
        forget_frames(error)
        return error
    _log.error(
        "a call failed unexpectedly",
        exc_info=error,
        extra={
            "method": call.method,
            "request_id": call.request_id,
            "merchant_id": call.merchant_id,
            "payment_id": call.payment_id,
        },
    )
    return GatewayError(Reason.INTERNAL, error_map.INTERNAL_MESSAGE)


def _ending(refusal: GatewayError, *, pushback: bool) -> tuple[str, error_map.Trailers]:
    """The text and the trailers of a refused call."""
    if refusal.metadata or refusal.violations:
        status = error_map.to_status(refusal)
        return status.message, error_map.to_trailers(refusal, status, pushback=pushback)
    return _plain_ending(refusal.reason, refusal.message, refusal.retry_after_s, pushback)


@lru_cache(_PLAIN_REFUSALS_KEPT)
def _plain_ending(
    reason: Reason, message: str, retry_after_s: float | None, pushback: bool
) -> tuple[str, error_map.Trailers]:
    refusal = GatewayError(reason, message, retry_after_s=retry_after_s)
    status = error_map.to_status(refusal)
    return status.message, error_map.to_trailers(refusal, status, pushback=pushback)


@lru_cache(_PLAIN_REFUSALS_KEPT)
def _plain_status(reason: Reason, message: str, retry_after_s: float | None) -> Status:
    return error_map.to_status(GatewayError(reason, message, retry_after_s=retry_after_s))


def _in_flight() -> GatewayError:
    return GatewayError(
        Reason.IDEMPOTENCY_KEY_IN_FLIGHT, "The item is in progress: repeat it with the same key."
    )


def _refused_result(item: _Item, refusal: GatewayError) -> bytes:
    if refusal.metadata or refusal.violations:
        status = error_map.to_status(refusal)
    else:
        status = _plain_status(refusal.reason, refusal.message, refusal.retry_after_s)
    return conversion.encode_error_result(item.item_ref, status)
