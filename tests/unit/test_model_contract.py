"""The enums of gateway.domain.model are those of the contract: same names, same numbers."""

from enum import IntEnum

import pytest
from google.protobuf.descriptor import EnumDescriptor
from payments.v1 import (
    admin_service_pb2,
    outcome_pb2,
    payment_method_pb2,
    payment_pb2,
    payment_service_pb2,
)

from gateway.domain import model

_FILES = (
    admin_service_pb2.DESCRIPTOR,
    outcome_pb2.DESCRIPTOR,
    payment_method_pb2.DESCRIPTOR,
    payment_pb2.DESCRIPTOR,
    payment_service_pb2.DESCRIPTOR,
)

SHARED: list[type[IntEnum]] = [
    model.Mode,
    model.CaptureMethod,
    model.OperationKind,
    model.OperationOrigin,
    model.OperationState,
    model.PaymentState,
    model.Delivery,
    model.ResponseCode,
    model.AdviceAction,
    model.AvsResult,
    model.CvvResult,
    model.DoubtCause,
    model.DoubtOutcome,
]


def contracts_enum(name: str) -> EnumDescriptor:
    [found] = [file.enum_types_by_name[name] for file in _FILES if name in file.enum_types_by_name]
    return found


def prefix(enum: EnumDescriptor) -> str:
    """CAPTURE_METHOD_ for CaptureMethod, as buf's STANDARD rules have it."""
    return enum.values_by_number[0].name.removesuffix("UNSPECIFIED")


@pytest.mark.parametrize("enum", SHARED, ids=lambda enum: enum.__name__)
def test_names_and_numbers_are_those_of_the_contract(enum: type[IntEnum]) -> None:
    descriptor = contracts_enum(enum.__name__)
    told = {
        value.name.removeprefix(prefix(descriptor)): value.number for value in descriptor.values
    }
    ours = {member.name: member.value for member in enum}
    # Where the domain always knows the value, it has no UNSPECIFIED.
    assert {"UNSPECIFIED": 0} | ours == told


def test_every_enum_of_the_domain_is_compared_or_the_domains_alone() -> None:
    enums = {
        value
        for value in vars(model).values()
        if isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum
    }
    assert enums - set(SHARED) == {model.Verdict}
