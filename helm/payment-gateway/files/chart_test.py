"""`helm test`: ask the release for its health and, with a test merchant's key, make a payment."""

import json
import os
import sys
import uuid
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from payments.v1 import (
    money_pb2,
    payment_method_pb2,
    payment_pb2,
    payment_service_pb2,
    payment_service_pb2_grpc,
)

from gateway.application.accounts import parse_key
from gateway.domain.model import Mode

CALL_TIMEOUT_S = float(os.environ.get("CALL_TIMEOUT_S", "20"))
SERVICE = "payments.v1.PaymentService"


def open_channel() -> grpc.Channel:
    """A channel to the Service, with TLS where the release has it."""
    target = os.environ["TARGET"]
    tls = os.environ.get("TLS_DIR")
    if not tls:
        return grpc.insecure_channel(target)
    root = Path(tls) / "ca.crt"
    if not root.exists():
        root = Path(tls) / "tls.crt"  # self-signed
    key = certificate = None
    if client := os.environ.get("CLIENT_TLS_DIR"):
        key = (Path(client) / "tls.key").read_bytes()
        certificate = (Path(client) / "tls.crt").read_bytes()
    credentials = grpc.ssl_channel_credentials(root.read_bytes(), key, certificate)
    name = os.environ.get("SERVER_NAME")
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(target, credentials, options)


def find_key() -> str:
    """The API key; empty where the chart was given none."""
    if key := os.environ.get("API_KEY", "").strip():
        return key
    if state := os.environ.get("EMBEDDED_STATE"):
        return str(json.loads(Path(state).read_text())["api_key"])
    return ""


def check_health(channel: grpc.Channel) -> None:
    """The service must be SERVING."""
    answer = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=SERVICE), timeout=CALL_TIMEOUT_S, wait_for_ready=True
    )
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"{SERVICE} is not serving")
    print(f"{SERVICE} is serving")


def pay(channel: grpc.Channel, key: str) -> None:
    """Authorize, repeat and void; the repeat must be answered with the first answer."""
    payments = payment_service_pb2_grpc.PaymentServiceStub(channel)
    metadata = (("authorization", f"Bearer {key}"),)
    run = uuid.uuid4().hex
    request = payment_service_pb2.AuthorizePaymentRequest(
        idempotency_key=f"helm-test-{run}",
        amount=money_pb2.Money(amount_minor=100, currency_code="EUR"),
        capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
        payment_method=payment_method_pb2.PaymentMethod(token=os.environ["PAYMENT_TOKEN"]),
        merchant_order_id=f"helm-test-{run}",
    )
    first = payments.AuthorizePayment(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
    if first.operation.state != payment_pb2.OPERATION_STATE_SUCCEEDED:
        sys.exit(f"authorize: {payment_pb2.OperationState.Name(first.operation.state)}")
    again = payments.AuthorizePayment(request, metadata=metadata, timeout=CALL_TIMEOUT_S)
    if not again.replay.replayed or again.operation != first.operation:
        sys.exit("a repeat was not answered with the first answer")
    voided = payments.VoidPayment(
        payment_service_pb2.VoidPaymentRequest(
            idempotency_key=f"helm-test-void-{run}", payment_id=first.payment.payment_id
        ),
        metadata=metadata,
        timeout=CALL_TIMEOUT_S,
    )
    if voided.operation.state != payment_pb2.OPERATION_STATE_SUCCEEDED:
        sys.exit(f"void: {payment_pb2.OperationState.Name(voided.operation.state)}")
    print(f"authorized, repeated and voided {first.payment.payment_id}")


def main() -> None:
    """Run the test."""
    key = find_key()
    with open_channel() as channel:
        check_health(channel)
        if not key:
            print("no payment was made: set tests.apiKey.existingSecret to a TEST key's Secret")
            return
        presented = parse_key(key)
        if presented is None or presented.mode is not Mode.TEST:
            sys.exit("the API key is not a TEST key: a live one would charge")
        pay(channel, key)


if __name__ == "__main__":
    main()
