"""Two calls have one fingerprint where they mean the same, and only there."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from payments.v1 import payment_service_pb2 as pb
from payments.v1.payment_method_pb2 import CAPTURE_METHOD_MANUAL

from gateway.domain.model import Mode, OperationKind
from gateway.rpc import conversion
from gateway.rpc.conversion import Caller
from gateway.rpc.fingerprint import FINGERPRINT_VERSION, canonical, fingerprint

CALLER = Caller("req_1", "mer_1", Mode.TEST, None)
EXCLUDED = {"merchant_id", "idempotency_key"}
CONVERSIONS: dict[type[Message], Callable[..., Any]] = {
    pb.AuthorizePaymentRequest: conversion.to_authorize,
    pb.CapturePaymentRequest: conversion.to_capture,
    pb.VoidPaymentRequest: conversion.to_void,
    pb.RefundPaymentRequest: conversion.to_refund,
    pb.IncrementAuthorizationRequest: conversion.to_increment,
}


def base(message_type: type[Message]) -> Any:
    request: Any = message_type()
    request.idempotency_key = "key"
    if isinstance(request, pb.AuthorizePaymentRequest):
        request.amount.amount_minor = 1000
        request.amount.currency_code = "EUR"
        request.capture_method = CAPTURE_METHOD_MANUAL
        request.payment_method.token = "tok_visa"
    return request


def fingerprint_of(request: Any, caller: Caller = CALLER) -> bytes:
    copy = type(request)()
    copy.CopyFrom(request)
    result: bytes = CONVERSIONS[type(request)](copy, caller).fingerprint
    return result


def changes(request: Message, path: str = "") -> Iterator[tuple[str, Message]]:
    """A changed copy of the request for each field, nested ones too."""
    for field in request.DESCRIPTOR.fields:
        if field.name in EXCLUDED and not path:
            continue
        changed: Any = type(request)()
        changed.CopyFrom(request)
        if field.message_type is None:
            value = getattr(changed, field.name)
            kind = field.type
            if kind == FieldDescriptor.TYPE_STRING:
                setattr(changed, field.name, value + "x")
            elif kind == FieldDescriptor.TYPE_BOOL:
                setattr(changed, field.name, not value)
            elif field.enum_type is not None:
                # 1 is what some values are documented to be taken as.
                setattr(changed, field.name, 3 if value == 2 else 2)
            else:
                setattr(changed, field.name, value + 1)
            yield path + field.name, changed
        elif field.message_type.GetOptions().map_entry:
            getattr(changed, field.name)["added"] = "x"
            yield path + field.name, changed
        else:
            for name, inner in changes(getattr(request, field.name), f"{path}{field.name}."):
                outer: Any = type(request)()
                outer.CopyFrom(request)
                getattr(outer, field.name).CopyFrom(inner)
                yield name, outer


@pytest.mark.parametrize("message_type", CONVERSIONS)
def test_every_field_changed_in_turn_changes_it(message_type: type[Message]) -> None:
    request = base(message_type)
    seen = {fingerprint_of(request)}
    for path, changed in changes(request):
        seen_before = len(seen)
        seen.add(fingerprint_of(changed))
        assert len(seen) == seen_before + 1, path


@pytest.mark.parametrize("message_type", CONVERSIONS)
def test_the_key_and_how_the_merchant_is_named_do_not_change_it(
    message_type: type[Message],
) -> None:
    request = base(message_type)
    first = fingerprint_of(request)
    request.idempotency_key = "another"
    request.merchant_id = "mer_1"
    assert fingerprint_of(request) == first


def test_the_merchant_the_mode_and_the_method_change_it() -> None:
    request = base(pb.AuthorizePaymentRequest)
    others = {
        fingerprint_of(request),
        fingerprint_of(request, Caller("req_1", "mer_2", Mode.TEST, None)),
        fingerprint_of(request, Caller("req_1", "mer_1", Mode.LIVE, None)),
        fingerprint(OperationKind.CAPTURE, Mode.TEST, "mer_1", canonical(request)),
    }
    assert len(others) == 4


def test_the_request_id_and_the_deadline_do_not_change_it() -> None:
    request = base(pb.AuthorizePaymentRequest)
    assert fingerprint_of(request, Caller("req_2", "mer_1", Mode.TEST, 5.0)) == (
        fingerprint_of(request)
    )


def test_a_value_and_what_it_is_documented_to_be_taken_as_are_the_same() -> None:
    request = base(pb.AuthorizePaymentRequest)
    explicit = base(pb.AuthorizePaymentRequest)
    explicit.channel = 1
    explicit.initiator = 1
    assert fingerprint_of(explicit) == fingerprint_of(request)


def test_unknown_fields_and_the_order_on_the_wire_do_not_change_it() -> None:
    request = base(pb.AuthorizePaymentRequest)
    request.metadata.update({f"k{n}": "v" for n in range(20)})
    first = fingerprint_of(request)
    backwards = pb.AuthorizePaymentRequest()
    for n in reversed(range(20)):
        backwards.metadata[f"k{n}"] = "v"
    backwards.MergeFrom(request)
    assert fingerprint_of(backwards) == first
    # Field 1000 as a varint, which no version knows.
    extended = request.SerializeToString() + b"\xc0\x3e\x01"
    assert fingerprint_of(pb.AuthorizePaymentRequest.FromString(extended)) == first


def test_it_is_what_was_stored_by_earlier_versions() -> None:
    # Stored fingerprints are compared for ever: whoever has to change these bytes must raise
    # FINGERPRINT_VERSION and keep computing the old form for old keys.
    request = base(pb.AuthorizePaymentRequest)
    request.metadata.update({"b": "2", "a": "1"})
    assert canonical(request).hex() == GOLDEN_ENCODING
    told = fingerprint(OperationKind.AUTHORIZE, Mode.TEST, "mer_1", bytes.fromhex(GOLDEN_ENCODING))
    assert told.hex() == GOLDEN
    assert told[:1] == FINGERPRINT_VERSION
    assert len(told) == 33


GOLDEN_ENCODING = (
    "1a0808e807120345555220022a0a0a08746f6b5f7669736150015801a201060a0161120131a201060a0162120132"
)
GOLDEN = "0122918d165c5dca51f10e4755cba2c2180f703eee9d9fb6a1d51d4c71f0e541a3"
