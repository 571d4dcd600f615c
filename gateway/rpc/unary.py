"""What stands around a unary call that is no payment: counted, admitted, authenticated, logged."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from gateway.application.accounts import Principal, Scope
from gateway.application.admission import Gate, Stage, Work
from gateway.rpc import validation
from gateway.rpc.auth import resolve_merchant
from gateway.rpc.conversion import Caller
from gateway.rpc.service import Context, PaymentService

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class Reply:
    """An encoded answer, and the payment that it is about."""

    data: bytes
    payment_id: str = ""

    @classmethod
    def of(cls, message: Message) -> "Reply":
        """An answer that is about no payment."""
        return cls(message.SerializeToString())


class Unary(Generic[_M]):
    """One unary method: what stands around its call."""

    def __init__(
        self,
        door: PaymentService,
        gate: Gate,
        scope: Scope,
        method: str,
        request_type: type[_M],
        perform: Callable[[Principal, Caller, _M], Awaitable[Reply]],
    ) -> None:
        self.method = method
        self._door = door
        self._gate = gate
        self._scope = scope
        self._request_type = request_type
        self._perform = perform

    async def serve(self, data: bytes, context: Context) -> bytes:
        """The handler."""
        door, gate = self._door, self._gate
        call = door.begin(self.method, context)
        try:
            door.admit(call, len(data))
            principal = await door.identify(call, self._scope)
            # A list may be of many merchants: an organisation has one share of the room.
            gate.admit(principal.organisation_id, Work.LIST)
            try:
                request = checked(self._request_type, data, principal, call)
                began = time.perf_counter()
                reply = await self._perform(principal, call, request)
                gate.passed(Stage.READ, time.perf_counter() - began)
            finally:
                gate.release(principal.organisation_id)
            call.payment_id = reply.payment_id
        except Exception as error:  # noqa: BLE001 - its text must not reach the client
            data, request = b"", None  # this frame lives on with what `failed` raises
            await door.failed(call, context, error)
        except BaseException:
            door.abandoned(call)
            raise
        door.answered(call, context)
        return reply.data


def checked(request_type: type[_M], data: bytes, principal: Principal, caller: Caller) -> _M:
    """The request, valid and without card data; the merchant that it names, if any, to `caller`.

    Raises GatewayError.
    """
    request: Any = validation.parse(request_type, data)
    if validation.is_suspect(data):
        validation.refuse_card_numbers(request, None)
    validation.validate(request)
    if request.merchant_id:
        caller.merchant_id = resolve_merchant(principal, request.merchant_id).merchant_id
    checked: _M = request
    return checked
