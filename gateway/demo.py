"""A few payments against a running gateway, shown as a caller sees them."""

import time
import uuid

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

CALL_TIMEOUT_S = 15.0
"""How long each call of the demo may take."""


async def run_demo(target: str, api_key: str) -> bool:
    """Run the demo; whether every step went as it should."""
    metadata = (("authorization", f"Bearer {api_key}"),)
    run = uuid.uuid4().hex[:12]
    good = True

    def show(label: str, started: float, detail: str, as_expected: bool) -> None:
        nonlocal good
        good = good and as_expected
        mark = click.style("ok ", fg="green") if as_expected else click.style("BAD", fg="red")
        click.echo(f"{mark} {label:<34} {1000 * (time.monotonic() - started):7.1f} ms  {detail}")

    async with grpc.aio.insecure_channel(target) as channel:
        stub = payment_service_pb2_grpc.PaymentServiceStub(channel)

        def authorization(step: str, token: str) -> payment_service_pb2.AuthorizePaymentRequest:
            return payment_service_pb2.AuthorizePaymentRequest(
                idempotency_key=f"demo-{run}-{step}",
                amount=money_pb2.Money(amount_minor=1999, currency_code="EUR"),
                capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
                payment_method=payment_method_pb2.PaymentMethod(token=token),
                merchant_order_id=f"demo-{run}",
            )

        try:
            started = time.monotonic()
            request = authorization("authorize", "tok_visa")
            first = await stub.AuthorizePayment(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
            show(
                "authorize 19.99 EUR",
                started,
                _states(first.operation, first.payment),
                first.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED,
            )

            started = time.monotonic()
            again = await stub.AuthorizePayment(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
            show(
                "the same call again",
                started,
                f"the same answer, replayed from {again.replay.first_request_id}",
                again.replay.replayed and again.operation == first.operation,
            )

            started = time.monotonic()
            captured = await stub.CapturePayment(
                payment_service_pb2.CapturePaymentRequest(
                    idempotency_key=f"demo-{run}-capture", payment_id=first.payment.payment_id
                ),
                metadata=metadata,
                timeout=CALL_TIMEOUT_S,
            )
            show(
                "capture it",
                started,
                _states(captured.operation, captured.payment),
                captured.payment.state == payment_pb2.PAYMENT_STATE_CAPTURED,
            )

            started = time.monotonic()
            refunded = await stub.RefundPayment(
                payment_service_pb2.RefundPaymentRequest(
                    idempotency_key=f"demo-{run}-refund",
                    payment_id=first.payment.payment_id,
                    amount=money_pb2.Money(amount_minor=500, currency_code="EUR"),
                ),
                metadata=metadata,
                timeout=CALL_TIMEOUT_S,
            )
            show(
                "refund 5.00 EUR",
                started,
                _states(refunded.operation, refunded.payment),
                refunded.payment.state == payment_pb2.PAYMENT_STATE_PARTIALLY_REFUNDED,
            )

            started = time.monotonic()
            declined = await stub.AuthorizePayment(
                authorization("decline", "tok_declined_insufficient_funds"),
                metadata=metadata,
                timeout=CALL_TIMEOUT_S,
            )
            show(
                "a card without funds",
                started,
                _states(declined.operation, declined.payment)
                + ", "
                + outcome_pb2.ResponseCode.Name(declined.operation.outcome.response_code)[14:],
                declined.operation.state == payment_pb2.OPERATION_STATE_DECLINED,
            )

            request.amount.amount_minor = 1
            started = time.monotonic()
            try:
                await stub.AuthorizePayment(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
                show("the first key, another amount", started, "was not refused", False)
            except grpc.aio.AioRpcError as error:
                show(
                    "the first key, another amount",
                    started,
                    _refusal(error),
                    error.code() is grpc.StatusCode.ALREADY_EXISTS,
                )
        except grpc.aio.AioRpcError as error:
            click.echo(f"{target}: {_refusal(error)}", err=True)
            return False
    return good


def _states(operation: payment_pb2.Operation, payment: payment_pb2.Payment) -> str:
    state = payment_pb2.OperationState.Name(operation.state).removeprefix("OPERATION_STATE_")
    whole = payment_pb2.PaymentState.Name(payment.state).removeprefix("PAYMENT_STATE_")
    return f"{state}, payment {payment.payment_id} {whole}"


def _refusal(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return f"{error.code().name} {info.reason}: {error.details()}"
    return f"{error.code().name}: {error.details()}"
