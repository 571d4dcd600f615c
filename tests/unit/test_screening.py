"""A request that the screen lets pass breaks no rule of the contract."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from buf.validate import validate_pb2 as rules
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from payments.v1 import money_pb2, payment_method_pb2
from payments.v1 import payment_service_pb2 as pb
from protovalidate import Validator

from gateway.rpc import validation
from gateway.rpc.screening import screen

Field = descriptor_pb2.FieldDescriptorProto

VALIDATOR = Validator()
NUMBERS_OF_FILES = itertools.count()

# Right somewhere, wrong elsewhere, and at the bounds of the contract's lengths.
TEXTS = (
    *("", "a", "A", "0", " ", "~", "\x7f", "é", "a\n", "\n", "\0", "😀", "a/b", "a.b-c_d"),
    *("mer_1", "mer_", "mer_1\n", "xmer_1", "mer_" + 60 * "Z", "mer_" + 61 * "Z"),
    *("tok_1", "tok_", "tok_1\n", "tok_" + 120 * "a", "tok_" + 121 * "a", "tok_é"),
    *("EUR", "EURO", "eur", "EU", "EUR\n", "DE", "visa", "visa_2", "411111", "41111111", "4111111"),
    *("05", "5", "2.2.0", "2.2.0.1", "2.", "12345", "sepa_debit", "ideal", "SEPA", "a@b", "a b@c"),
    *("https://shop.example/", "http://shop.example/", "https://\n", "https://" + 2040 * "a"),
    *(22 * "A" + "==", 64 * "A", 65 * "A", 12 * "1", 19 * "1", 20 * "1"),
    *(size * "é" for size in (22, 23, 36, 37, 40, 41, 64, 65, 100, 128, 129, 255, 256, 500, 501)),
    *(size * "k" for size in (20, 21, 40, 41, 255, 256, 2048, 2049)),
)
NUMBERS = (-(2**31), -1, 0, 1, 2, 3, 12, 13, 1999, 2000, 2099, 2100, 2**31 - 1)
LARGE_NUMBERS = (*NUMBERS, 10**12, 10**12 + 1, -(2**63), 2**63 - 1)

AUTHORIZATION = pb.AuthorizePaymentRequest(
    merchant_id="mer_1",
    idempotency_key="key",
    amount=money_pb2.Money(amount_minor=1000, currency_code="EUR"),
    capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
    payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),
    metadata={"order": "1"},
)
REQUESTS: tuple[Message, ...] = (
    AUTHORIZATION,
    pb.CapturePaymentRequest(idempotency_key="key", payment_id="pay_1"),
    pb.VoidPaymentRequest(idempotency_key="key", payment_id="pay_1"),
    pb.RefundPaymentRequest(idempotency_key="key", payment_id="pay_1"),
    pb.IncrementAuthorizationRequest(
        idempotency_key="key",
        payment_id="pay_1",
        additional_amount=money_pb2.Money(amount_minor=1, currency_code="EUR"),
    ),
    pb.GetPaymentRequest(payment_id="pay_1"),
    pb.GetOperationRequest(operation_id="op_1"),
)


def fields_of(message: Message, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of every field, nested ones too."""
    for field in message.DESCRIPTOR.fields:
        yield (*path, field.name)
        if field.message_type is not None and not field.is_repeated:
            yield from fields_of(getattr(message, field.name), (*path, field.name))


def value_of(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(TEXTS) | st.text(max_size=30)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_INT64:
        return st.sampled_from(LARGE_NUMBERS)
    return st.sampled_from(NUMBERS)


def change(draw: st.DrawFn, message: Any, path: tuple[str, ...]) -> None:
    """Give a field another value, or take it away."""
    *above, name = path
    for each in above:
        message = getattr(message, each)
    field = message.DESCRIPTOR.fields_by_name[name]
    if draw(st.integers(0, 9)) == 0:
        message.ClearField(name)
    elif field.is_repeated:  # the only ones are maps of texts
        entries = st.dictionaries(st.sampled_from(TEXTS), st.sampled_from(TEXTS), max_size=3)
        getattr(message, name).update(draw(entries))
        if draw(st.integers(0, 9)) == 0:
            more = draw(st.integers(48, 51))
            getattr(message, name).update({f"k{number}": "" for number in range(more)})
    elif field.message_type is not None:
        getattr(message, name).SetInParent()
    else:
        setattr(message, name, draw(value_of(field)))


@st.composite
def requests(draw: st.DrawFn) -> Message:
    """A right request of which some fields are changed."""
    request = draw(st.sampled_from(REQUESTS))
    changed = type(request)()
    changed.CopyFrom(request)
    paths = list(fields_of(type(request)()))
    for path in draw(st.lists(st.sampled_from(paths), max_size=4)):
        change(draw, changed, path)
    return changed


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda each: each.DESCRIPTOR.name)
def test_a_right_request_passes(request_: Message) -> None:
    passes = screen(request_.DESCRIPTOR)

    assert passes is not None
    assert passes(request_)


@settings(max_examples=1000)
@given(requests())
@example(pb.AuthorizePaymentRequest())
def test_what_passes_breaks_no_rule(request_: Message) -> None:
    passes = screen(request_.DESCRIPTOR)
    assert passes is not None

    broken = VALIDATOR.collect_violations(request_)

    if passes(request_):
        assert broken == []
    elif not broken:
        # Only what the screen does not know: the pattern of an e-mail address.
        assert request_.payment_method.HasField("redirect")  # type: ignore[attr-defined]


def test_every_rule_of_an_authorization_is_asked_for() -> None:
    """Each field alone, with every value of the pool: the screen and protovalidate agree."""
    passes = screen(pb.AuthorizePaymentRequest.DESCRIPTOR)
    assert passes is not None
    for path in fields_of(pb.AuthorizePaymentRequest()):
        if path[:2] == ("payment_method", "redirect"):
            continue
        for value in (*TEXTS, *LARGE_NUMBERS):
            changed = pb.AuthorizePaymentRequest()
            changed.CopyFrom(AUTHORIZATION)
            holder: Any = changed
            for each in path[:-1]:
                holder = getattr(holder, each)
            try:
                setattr(holder, path[-1], value)
            except (AttributeError, TypeError, ValueError):
                continue  # a message, or a value of another type
            assert passes(changed) is not bool(VALIDATOR.collect_violations(changed)), (path, value)


@pytest.mark.parametrize("entries", [50, 51])
def test_as_many_entries_pass_as_the_contract_allows(entries: int) -> None:
    request = pb.AuthorizePaymentRequest()
    request.CopyFrom(AUTHORIZATION)
    request.metadata.clear()
    request.metadata.update({f"k{number}": "" for number in range(entries)})
    passes = screen(request.DESCRIPTOR)

    assert passes is not None
    assert passes(request) is (entries == 50)
    assert passes(request) is not bool(VALIDATOR.collect_violations(request))


def test_a_message_with_a_rule_that_is_not_known_never_passes_within_another() -> None:
    assert screen(payment_method_pb2.RedirectPaymentMethod.DESCRIPTOR) is None
    request = pb.AuthorizePaymentRequest()
    request.CopyFrom(AUTHORIZATION)
    request.return_url = "https://shop.example/"
    request.payment_method.redirect.method_type = "ideal"
    passes = screen(request.DESCRIPTOR)

    assert VALIDATOR.collect_violations(request) == []
    assert passes is not None
    assert not passes(request)


def test_a_page_of_payments_is_left_to_protovalidate() -> None:
    assert screen(pb.ListPaymentsRequest.DESCRIPTOR) is None


def described(*, message_cel: str = "", **field_rules: Any) -> Descriptor:
    """A message with a string `text` and these rules."""
    package = f"screening.number_{next(NUMBERS_OF_FILES)}"
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto",
        package=package,
        syntax="proto3",
        dependency=["buf/validate/validate.proto"],
    )
    message = file.message_type.add(name="Message")
    field = message.field.add(
        name="text", number=1, type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL
    )
    field.options.Extensions[rules.field].CopyFrom(rules.FieldRules(**field_rules))
    if message_cel:
        message.options.Extensions[rules.message].cel.add(
            id="message", message="wrong", expression=message_cel
        )
    pool = descriptor_pool.Default()
    pool.Add(file)
    return pool.FindMessageTypeByName(f"{package}.Message")


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\d+$",  # Python's has digits of every script
        r"^\s*$",  # Python's has the vertical tab
        "a",  # anywhere
        "^a",
        "a$",
        "^(a$|b)$",
        "^(^a)$",
        r"^a\$",  # no anchor at the end
    ],
)
def test_a_pattern_that_python_may_read_otherwise_is_left_to_protovalidate(pattern: str) -> None:
    assert screen(described(string=rules.StringRules(pattern=pattern))) is None


@pytest.mark.parametrize(
    "rule",
    [
        {"string": rules.StringRules(prefix="a")},
        {"string": rules.StringRules(email=True)},
        {"string": rules.StringRules(max_bytes=3)},
        {"ignore": rules.IGNORE_IF_ZERO_VALUE, "string": rules.StringRules(min_len=1)},
        {"required": True},
        {"cel_expression": ["this != 'a'"]},
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_a_rule_that_is_not_known_is_left_to_protovalidate(rule: dict[str, Any]) -> None:
    assert screen(described(**rule)) is None


@pytest.mark.parametrize(
    "expression",
    [
        "(this.text == '') == (this.text != '') == (this.text != '')",  # a chain in Python
        "this.text.startsWith('a')",
        "this.text != 'a'",
        "this.text in ['a']",
        "size(this.text) > 1",
        "this.text == '' ? true : false",
        "!(this.text == '')",
    ],
)
def test_an_expression_that_python_may_read_otherwise_is_left_to_protovalidate(
    expression: str,
) -> None:
    assert screen(described(message_cel=expression)) is None


def test_no_call_waits_for_a_screen_to_be_made() -> None:
    screen.cache_clear()
    validation.warm()
    made = screen.cache_info().misses

    for message_type in validation.REQUEST_TYPES:
        screen(message_type.DESCRIPTOR)

    assert screen.cache_info().misses == made
