"""The handlers of AdminService: counted, admitted and logged as PaymentService's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import grpc
from google.protobuf.message import Message
from payments.v1 import admin_service_pb2 as pb
from payments.v1 import payment_pb2

from gateway.application.accounts import Principal, Scope
from gateway.application.administration import (
    PAGE_SIZE_DEFAULT,
    AdminFilter,
    Administration,
    DoubtEntry,
    RecordedDiscrepancy,
)
from gateway.application.admission import Gate
from gateway.application.ports import Resolution
from gateway.application.verification import AuditFactory, Progress, Summary
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import is_operation_id
from gateway.domain.invariants import Finding
from gateway.domain.model import DoubtOutcome
from gateway.rpc import conversion
from gateway.rpc.auth import resolve_merchant
from gateway.rpc.conversion import Caller
from gateway.rpc.paging import decode_page_token, encode_page_token, filter_digest
from gateway.rpc.service import Context, PaymentService
from gateway.rpc.unary import Reply, Unary, checked
from gateway.rpc.wire import to_timestamp

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
VERIFY: Final = "VerifyInvariants"

AUDITS_MAX: Final = 1
"""How many audits one process runs at once: each reads everything."""
AUDIT_RETRY_S: Final = 30.0
"""When a refused audit may be tried again."""
AUDIT_READ_S_MAX: Final = 30.0
"""How long an audit waits for its caller to read: others wait for its place meanwhile."""
REQUEST_TYPES: Final[tuple[type[Message], ...]] = (
    pb.ListInDoubtRequest,
    pb.ResolveInDoubtRequest,
    pb.ListDiscrepanciesRequest,
    pb.VerifyInvariantsRequest,
)


class AdminService:
    """The servicer of `payments.v1.AdminService`; `door` counts and authenticates its calls."""

    def __init__(
        self, door: PaymentService, gate: Gate, administration: Administration, audit: AuditFactory
    ) -> None:
        self._door = door
        self._gate = gate
        self._administration = administration
        self._audit = audit
        self._audits = 0
        self._draining = False

    def method_handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """The handlers by the names of their methods, without (de)serializers."""
        around = self._door, self._gate, Scope.PAYMENTS_ADMIN
        unary: tuple[Unary[Any], ...] = (
            Unary(
                *around,
                "ListInDoubt",
                pb.ListInDoubtRequest,
                self._list_in_doubt,
            ),
            Unary(
                *around,
                "ResolveInDoubt",
                pb.ResolveInDoubtRequest,
                self._resolve,
            ),
            Unary(
                *around,
                "ListDiscrepancies",
                pb.ListDiscrepanciesRequest,
                self._list_discrepancies,
            ),
        )
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        handlers = {each.method: grpc.unary_unary_rpc_method_handler(each.serve) for each in unary}
        handlers[VERIFY] = grpc.unary_stream_rpc_method_handler(self._serve_verify)
        return handlers

    def begin_drain(self) -> None:
        """End the audits that run with DRAINING."""
        self._draining = True

    async def _list_in_doubt(
        self, principal: Principal, caller: Caller, request: pb.ListInDoubtRequest
    ) -> Reply:
        digest = filter_digest(request, caller)
        after = decode_page_token(digest, request.page_token, is_operation_id)
        page = await self._administration.list_doubts(
            _filter(principal, caller, request.page_size, after),
            needs_person_only=request.needs_person_only,
        )
        answer = pb.ListInDoubtResponse(
            doubts=[_doubt(each) for each in page.doubts],
            next_page_token=encode_page_token(digest, page.next_after),
        )
        return Reply.of(answer)

    async def _list_discrepancies(
        self, principal: Principal, caller: Caller, request: pb.ListDiscrepanciesRequest
    ) -> Reply:
        digest = filter_digest(request, caller)
        after = decode_page_token(digest, request.page_token, _is_uuid)
        page = await self._administration.list_discrepancies(
            _filter(principal, caller, request.page_size, after)
        )
        answer = pb.ListDiscrepanciesResponse(
            discrepancies=[_discrepancy(each) for each in page.discrepancies],
            next_page_token=encode_page_token(digest, page.next_after),
        )
        return Reply.of(answer)

    async def _resolve(
        self, principal: Principal, caller: Caller, request: pb.ResolveInDoubtRequest
    ) -> Reply:
        merchant_id = resolve_merchant(principal, request.merchant_id).merchant_id
        caller.merchant_id = merchant_id
        resolved = await self._administration.resolve(
            merchant_id,
            caller.mode,
            request.operation_id,
            Resolution(
                attempt_number=request.attempt_number,
                outcome=DoubtOutcome(request.outcome),
                connector_transaction_id=request.connector_transaction_id,
                amount_reported_minor=(
                    request.amount_reported_minor
                    if request.HasField("amount_reported_minor")
                    else None
                ),
                reason=request.reason,
                resolved_by=principal.key_id,
                request_id=caller.request_id,
            ),
        )
        rest = pb.ResolveInDoubtResponse(
            resolution=_resolution(resolved.resolution), replayed=resolved.replayed
        )
        return Reply(
            # The operation and its payment have the field numbers of every money answer.
            conversion.encode_found(resolved.found) + rest.SerializeToString(),
            resolved.found.payment.payment_id,
        )

    async def _serve_verify(self, data: bytes, context: Context) -> None:
        door = self._door
        call = door.begin(VERIFY, context)
        try:
            door.admit(call, len(data))
            principal = await door.identify(call, Scope.PAYMENTS_ADMIN)
            checked(pb.VerifyInvariantsRequest, data, principal, call)
            with self._admitted():
                audit = self._audit(_filter(principal, call, 0, None))
                async for each in _until(audit.run(), lambda: self._draining):
                    await _write(context, _message(each).SerializeToString())
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            await door.failed(call, context, error)
        except BaseException:
            door.abandoned(call)
            raise
        door.answered(call, context)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._audits >= AUDITS_MAX:
            raise GatewayError(
                Reason.OVERLOADED, "Another audit is running.", retry_after_s=AUDIT_RETRY_S
            )
        self._audits += 1
        try:
            yield
        finally:
            self._audits -= 1


async def _until(
    events: AsyncIterator[Progress | Finding | Summary], stop: Callable[[], bool]
) -> AsyncIterator[Progress | Finding | Summary]:
    async for each in events:
        if stop():
            raise GatewayError(Reason.DRAINING, "This server is shutting down.")
        yield each


async def _write(context: Context, message: bytes) -> None:
    try:
        async with asyncio.timeout(AUDIT_READ_S_MAX):
            await context.write(message)
    except TimeoutError as error:
        raise GatewayError(
            Reason.OVERLOADED, "The audit was not read.", retry_after_s=AUDIT_RETRY_S
        ) from error


def _filter(
    principal: Principal, caller: Caller, page_size: int, after: tuple[datetime, str] | None
) -> AdminFilter:
    reached = (caller.merchant_id,) if caller.merchant_id else principal.merchants
    return AdminFilter(frozenset(reached), caller.mode, page_size or PAGE_SIZE_DEFAULT, after)


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


# --- values to messages ---------------------------------------------------------------------------


def _doubt(entry: DoubtEntry) -> pb.Doubt:
    return pb.Doubt(
        operation=payment_pb2.Operation.FromString(conversion.encode_operation(entry.operation)),
        mode=payment_pb2.Mode.ValueType(entry.mode),
        since=to_timestamp(entry.since),
        tries=entry.tries,
        next_check_at=to_timestamp(entry.next_check_at),
        leased_until=to_timestamp(entry.leased_until),
        cause=pb.DoubtCause.ValueType(entry.cause),
        needs_person=entry.needs_person,
        payment_state=payment_pb2.PaymentState.ValueType(entry.payment_state),
    )


def _resolution(record: Resolution) -> pb.DoubtResolution:
    return pb.DoubtResolution(
        attempt_number=record.attempt_number,
        outcome=pb.DoubtOutcome.ValueType(record.outcome),
        connector_transaction_id=record.connector_transaction_id,
        amount_reported_minor=record.amount_reported_minor,
        reason=record.reason,
        resolved_by=record.resolved_by,
        resolved_at=to_timestamp(record.resolved_at),
        state_before=payment_pb2.OperationState.ValueType(record.state_before),
        state_after=payment_pb2.OperationState.ValueType(record.state_after),
        payment_state_before=payment_pb2.PaymentState.ValueType(record.payment_state_before),
        payment_state_after=payment_pb2.PaymentState.ValueType(record.payment_state_after),
        payment_version=record.payment_version,
    )


def _discrepancy(record: RecordedDiscrepancy) -> pb.Discrepancy:
    return pb.Discrepancy(
        discrepancy_id=record.discrepancy_id,
        merchant_id=record.merchant_id,
        payment_id=record.payment_id,
        operation_id=record.operation_id,
        kind=record.kind,
        expected=record.expected,
        reported=record.reported,
        created_at=to_timestamp(record.created_at),
    )


def _message(event: Progress | Finding | Summary) -> pb.VerifyInvariantsResponse:
    match event:
        case Progress():
            progress = pb.VerifyProgress(payments=event.payments, findings=event.findings)
            return pb.VerifyInvariantsResponse(progress=progress)
        case Finding():
            finding = pb.InvariantFinding(
                kind=event.kind,
                merchant_id=event.merchant_id,
                payment_id=event.payment_id,
                operation_id=event.operation_id,
                detail=event.detail,
            )
            return pb.VerifyInvariantsResponse(finding=finding)
        case Summary():
            summary = pb.VerifySummary(
                payments=event.payments,
                findings=event.findings,
                findings_by_kind={str(kind): count for kind, count in event.by_kind.items()},
            )
            return pb.VerifyInvariantsResponse(summary=summary)
