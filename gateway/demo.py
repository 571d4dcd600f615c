"""A few payments against a running gateway, shown as a caller sees them."""

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from payments.v1 import (
    money_pb2,
    outcome_pb2,
    payment_method_pb2,
    payment_pb2,
    payment_service_pb2,
    payment_service_pb2_grpc,
)

_A = TypeVar("_A")

CALL_TIMEOUT_S = 15.0
"""How long each call of the demo may take."""


async def run_demo(target: str, api_key: str) -> bool:
    """Run the demo; whether every step went as it should."""
    async with grpc.aio.insecure_channel(target) as channel:
        demo = _Demo(payment_service_pb2_grpc.PaymentServiceStub(channel), api_key)
        try:
            await demo.run()
        except grpc.aio.AioRpcError as error:
            click.echo(f"{target}: {_refusal(error)}", err=True)
            return False
    return demo.good


class _Demo:
    def __init__(
        # The name is one of the type stubs alone.
        self,
        stub: "payment_service_pb2_grpc.PaymentServiceAsyncStub",
        api_key: str,
    ) -> None:
        self._stub = stub
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self._run = uuid.uuid4().hex
        self.good = True

    async def run(self) -> None:
        request = self._authorization("authorize", "tok_visa")
        first = await self._step(
            "authorize 19.99 EUR",
            self._stub.AuthorizePayment,
            request,
            lambda answer: answer.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED,
        )
        payment_id = first.payment.payment_id
        await self._step(
            "the same call again",
            self._stub.AuthorizePayment,
            request,
            lambda answer: answer.replay.replayed and answer.operation == first.operation,
        )
        await self._step(
            "capture it",
            self._stub.CapturePayment,
            payment_service_pb2.CapturePaymentRequest(
                idempotency_key=f"demo-{self._run}-capture", payment_id=payment_id
            ),
            lambda answer: answer.payment.state == payment_pb2.PAYMENT_STATE_CAPTURED,
        )
        await self._step(
            "refund 5.00 EUR",
            self._stub.RefundPayment,
            payment_service_pb2.RefundPaymentRequest(
                idempotency_key=f"demo-{self._run}-refund",
                payment_id=payment_id,
                amount=money_pb2.Money(amount_minor=500, currency_code="EUR"),
            ),
            lambda answer: answer.payment.state == payment_pb2.PAYMENT_STATE_PARTIALLY_REFUNDED,
        )
        await self._step(
            "a card without funds",
            self._stub.AuthorizePayment,
            self._authorization("decline", "tok_declined_insufficient_funds"),
            lambda answer: answer.operation.state == payment_pb2.OPERATION_STATE_DECLINED,
        )
        await self._redirect()
        request.amount.amount_minor = 1
        started = time.monotonic()
        try:
            await self._stub.AuthorizePayment(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
            refusal, as_expected = "was not refused", False
        except grpc.aio.AioRpcError as error:
            refusal, as_expected = _refusal(error), error.code() is grpc.StatusCode.ALREADY_EXISTS
        self._show("the first key, another amount", started, refusal, as_expected)

    async def _redirect(self) -> None:
        """A customer who pays at a bank: shown is where to go; the payment ends by itself."""
        request = self._authorization("redirect", "")
        request.capture_method = payment_method_pb2.CAPTURE_METHOD_AUTOMATIC
        request.payment_method.redirect.method_type = "ideal"
        request.return_url = "https://shop.example/back"
        answer = await self._step(
            "a customer who pays at a bank",
            self._stub.AuthorizePayment,
            request,
            lambda answer: answer.operation.state == payment_pb2.OPERATION_STATE_REQUIRES_ACTION,
        )
        click.echo(f"   to pay, open {answer.operation.next_action.redirect_url}")

    def _authorization(self, step: str, token: str) -> payment_service_pb2.AuthorizePaymentRequest:
        return payment_service_pb2.AuthorizePaymentRequest(
            idempotency_key=f"demo-{self._run}-{step}",
            amount=money_pb2.Money(amount_minor=1999, currency_code="EUR"),
            capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
            payment_method=payment_method_pb2.PaymentMethod(token=token),
            merchant_order_id=f"demo-{self._run}",
        )

    async def _step(
        self,
        label: str,
        method: Callable[..., Awaitable[_A]],
        request: Any,
        as_expected: Callable[[_A], bool],
    ) -> _A:
        started = time.monotonic()
        answer = await method(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
        self._show(label, started, _states(answer), as_expected(answer))
        return answer

    def _show(self, label: str, started: float, detail: str, as_expected: bool) -> None:
        self.good = self.good and as_expected
        mark = click.style("ok ", fg="green") if as_expected else click.style("BAD", fg="red")
        click.echo(f"{mark} {label:<30} {1000 * (time.monotonic() - started):7.1f} ms  {detail}")


def _states(answer: Any) -> str:
    operation, payment = answer.operation, answer.payment
    state = payment_pb2.OperationState.Name(operation.state).removeprefix("OPERATION_STATE_")
    whole = payment_pb2.PaymentState.Name(payment.state).removeprefix("PAYMENT_STATE_")
    text = f"{state}, payment {payment.payment_id} {whole}"
    if operation.state == payment_pb2.OPERATION_STATE_DECLINED:
        code = outcome_pb2.ResponseCode.Name(operation.outcome.response_code)
        text += f", {code.removeprefix('RESPONSE_CODE_')}"
    if answer.replay.replayed:
        text += f", replayed from {answer.replay.first_request_id}"
    return text


def _refusal(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return f"{error.code().name} {info.reason}: {error.details()}"
    return f"{error.code().name}: {error.details()}"
