"""A request is refused field by field, for every rule that it breaks, and nothing is repeated."""
# ruff: noqa: RUF001 - digits of other scripts are what is tested

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, cast
from urllib.parse import quote

import pytest
from buf.validate import validate_pb2 as rules
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from payments.v1 import (
    admin_service_pb2,
    event_service_pb2,
    money_pb2,
    payment_method_pb2,
    payment_pb2,
    routing_service_pb2,
)
from payments.v1 import payment_service_pb2 as pb

from gateway.application.accounts import MerchantInfo
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS
from gateway.domain.pan import contains_pan
from gateway.rpc import validation

PAN = "4111111111111111"
CANARY = "canary-7f3a"
FAR_TOO_LONG = 10_000


def authorization(**fields: Any) -> pb.AuthorizePaymentRequest:
    """A valid request in which the named fields are changed."""
    values: dict[str, Any] = {
        "idempotency_key": "key",
        "amount": money_pb2.Money(amount_minor=1000, currency_code="EUR"),
        "capture_method": payment_method_pb2.CAPTURE_METHOD_MANUAL,
        "payment_method": payment_method_pb2.PaymentMethod(token="tok_visa"),
    }
    return pb.AuthorizePaymentRequest(**values | fields)


def redirecting(**redirect: str) -> pb.AuthorizePaymentRequest:
    method = payment_method_pb2.RedirectPaymentMethod(**redirect)
    return authorization(payment_method=payment_method_pb2.PaymentMethod(redirect=method))


def network_token(**token: Any) -> pb.AuthorizePaymentRequest:
    method = payment_method_pb2.NetworkToken(**token)
    return authorization(payment_method=payment_method_pb2.PaymentMethod(network_token=method))


def money(amount_minor: int = 1000, currency: str = "EUR") -> money_pb2.Money:
    return money_pb2.Money(amount_minor=amount_minor, currency_code=currency)


VALID: tuple[Message, ...] = (
    authorization(),
    pb.CapturePaymentRequest(idempotency_key="key", payment_id="pay_1"),
    pb.VoidPaymentRequest(idempotency_key="key", payment_id="pay_1"),
    pb.RefundPaymentRequest(idempotency_key="key", payment_id="pay_1"),
    pb.IncrementAuthorizationRequest(
        idempotency_key="key", payment_id="pay_1", additional_amount=money()
    ),
    pb.GetPaymentRequest(payment_id="pay_1"),
    pb.ListPaymentsRequest(),
    pb.GetOperationRequest(operation_id="op_1"),
)


def refusal(request: Message) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        validation.validate(request)
    assert caught.value.reason is Reason.INVALID_REQUEST
    return caught.value


def wrong_fields(request: Message) -> list[str]:
    """The fields that a request is refused for, one for each violation."""
    return [violation.field for violation in refusal(request).violations]


def told(error: GatewayError) -> str:
    """Everything that a refusal tells."""
    return repr((error.message, error.violations, dict(error.metadata), error.args))


def copied(request: Any) -> Any:
    copy = type(request)()
    copy.CopyFrom(request)
    return copy


def descriptors(descriptor: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below a message's type, with its path."""
    for field in descriptor.fields:
        yield path + field.name, field
        nested = field.message_type
        if nested is not None and not nested.GetOptions().map_entry:
            yield from descriptors(nested, f"{path}{field.name}.")


def string_fields(request: Message) -> list[str]:
    return [
        path
        for path, field in descriptors(request.DESCRIPTOR)
        if field.type == FieldDescriptor.TYPE_STRING
    ]


def with_string(request: Message, path: str, text: str) -> Any:
    """A copy of the request with a text at a path."""
    copy = holder = copied(request)
    *outer, name = path.split(".")
    for each in outer:
        holder = getattr(holder, each)
    setattr(holder, name, text)
    return copy


STRINGS = [
    pytest.param(request, path, id=f"{type(request).__name__}.{path}")
    for request in VALID
    for path in string_fields(request)
]


# --- rules ----------------------------------------------------------------------------------------


def test_what_is_missing_is_told_as_missing_and_the_text_alone_names_the_fields() -> None:
    error = refusal(pb.AuthorizePaymentRequest())
    assert {
        violation.field: violation.description for violation in error.violations
    } == dict.fromkeys(
        ("idempotency_key", "amount", "capture_method", "payment_method"), "value is required"
    )
    assert error.message == (
        "The request breaks rules of the contract: "
        "idempotency_key, amount, capture_method, payment_method."
    )
    wrong = pb.AuthorizePaymentRequest(
        idempotency_key="\n",
        amount=money(currency="eur"),
        profile_id="x" * 999,
        merchant_order_id="x" * 999,
        statement_descriptor="x" * 999,
    )
    error = refusal(wrong)
    assert error.message.endswith(f" and {len(error.violations) - 5} more.")
    assert error.violations[0].description != "value is required"


def test_every_request_of_the_service_is_tested_here_and_warmed() -> None:
    methods = pb.DESCRIPTOR.services_by_name["PaymentService"].methods
    unary = {each.input_type.name for each in methods if "Batch" not in each.name}
    unary.discard("StreamAuthorizePaymentsRequest")
    assert {type(request).__name__ for request in VALID} == unary
    assert {each.__name__ for each in validation.REQUEST_TYPES} == unary
    validation.warm()


@pytest.mark.parametrize("request_", VALID, ids=lambda request: type(request).__name__)
def test_a_valid_request_passes(request_: Message) -> None:
    validation.validate(request_)
    assert not validation.is_suspect(request_.SerializeToString())
    validation.refuse_card_numbers(request_, None)


def test_every_bad_field_has_one_violation_and_no_good_one_has_any() -> None:
    request = pb.AuthorizePaymentRequest(
        merchant_id="shop",
        idempotency_key="",
        amount=money(-1, "eur"),
        channel=9,  # type: ignore[arg-type] # a newer client's
        customer_id="customer",
        merchant_order_id="x" * 129,
        stored_credential=payment_method_pb2.StoredCredential(network_transaction_id="x" * 65),
        three_ds=payment_method_pb2.ThreeDs(eci="5", version="2.x", cavv="fine"),
        billing_address=payment_method_pb2.Address(country_code="Germany", city="Berlin"),
        amount_details=money_pb2.AmountDetails(tax_minor=-1, tip_minor=1),
        return_url="http://shop.example/",
        metadata={"": "", "long": "x" * 501, "good": "fine"},
    )
    assert sorted(wrong_fields(request)) == [
        "amount.amount_minor",
        "amount.currency_code",
        "amount_details",
        "amount_details.tax_minor",
        "billing_address.country_code",
        "capture_method",
        "channel",
        "idempotency_key",
        "merchant_id",
        "merchant_order_id",
        "metadata",
        "payment_method",
        "return_url",
        "stored_credential.network_transaction_id",
        "stored_credential.usage",
        "three_ds.eci",
        "three_ds.version",
    ]


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.CapturePaymentRequest(amount=money(0)), ["amount", "idempotency_key", "payment_id"]),
        (pb.RefundPaymentRequest(amount=money(0)), ["amount", "idempotency_key", "payment_id"]),
        (
            pb.IncrementAuthorizationRequest(idempotency_key="k", payment_id="p"),
            ["additional_amount"],
        ),
        (pb.VoidPaymentRequest(idempotency_key="k"), ["target"]),
        (pb.VoidPaymentRequest(idempotency_key="k", payment_id=""), ["payment_id"]),
        (
            pb.VoidPaymentRequest(idempotency_key="k", authorize_idempotency_key="\t"),
            ["authorize_idempotency_key"],
        ),
        (pb.GetPaymentRequest(), ["payment_id"]),
        (pb.GetOperationRequest(), ["target"]),
        (pb.GetOperationRequest(idempotency_key=""), ["idempotency_key"]),
        (pb.ListPaymentsRequest(page_size=501), ["page_size"]),
        (pb.ListPaymentsRequest(states=[payment_pb2.PAYMENT_STATE_UNSPECIFIED]), ["states[0]"]),
        (pb.ListPaymentsRequest(states=[payment_pb2.PAYMENT_STATE_VOIDED] * 2), ["states"]),
        (authorization(amount=money(0), capture_method=1), ["capture_method"]),
        (
            authorization(initiator=payment_method_pb2.INITIATOR_MERCHANT),
            ["stored_credential"],
        ),
        (
            authorization(payment_method=payment_method_pb2.PaymentMethod()),
            ["payment_method.method"],
        ),
        (
            authorization(amount_details=money_pb2.AmountDetails(tip_minor=600, tax_minor=401)),
            ["amount_details"],
        ),
        (redirecting(method_type="ideal"), ["return_url"]),
        (authorization(return_url="https://"), ["return_url"]),
        (authorization(return_url="https:///path"), ["return_url"]),
        (authorization(return_url="https://shop.example/a b"), ["return_url"]),
        (authorization(return_url="https://shop.example/\x01"), ["return_url"]),
        (
            redirecting(method_type="cash", country_code="nl", bank="a b", customer_email="me"),
            [
                *("payment_method.redirect.bank", "payment_method.redirect.country_code"),
                *("payment_method.redirect.customer_email", "payment_method.redirect.method_type"),
                "return_url",
            ],
        ),
        (network_token(), ["payment_method.network_token"]),
        (network_token(number="4" * 16), ["payment_method.network_token"]),
        (
            network_token(number="4" * 16, token_reference="dnt", cryptogram="A" * 28),
            ["payment_method.network_token"],
        ),
        (
            network_token(
                token_reference="dnt", cryptogram="short", expiry_month=13, expiry_year=30, eci="5"
            ),
            [
                f"payment_method.network_token.{name}"
                for name in ("cryptogram", "eci", "expiry_month", "expiry_year")
            ],
        ),
    ],
)
def test_a_broken_rule_is_told_at_the_field_that_can_mend_it(
    request_: Message, fields: list[str]
) -> None:
    assert sorted(wrong_fields(request_)) == fields


def test_what_is_wrong_with_several_entries_of_metadata_is_told_once() -> None:
    error = refusal(authorization(metadata={"a": "x" * 501, "b": "x" * 501, "c d": ""}))
    (violation,) = error.violations
    assert violation.description.count("a value must be at most 500 characters") == 1
    assert violation.description.count("a key does not match") == 1


def test_what_the_amount_is_made_up_of_may_be_all_of_it() -> None:
    parts = money_pb2.AmountDetails(
        tip_minor=400, surcharge_minor=300, tax_minor=200, shipping_minor=100
    )
    validation.validate(authorization(amount_details=parts))


@pytest.mark.parametrize(("amount_minor", "valid"), [(AMOUNT_MINOR_MAX, True), (2**63 - 1, False)])
def test_an_amount_has_its_bound(amount_minor: int, *, valid: bool) -> None:
    request = authorization(amount=money(amount_minor))
    if valid:
        validation.validate(request)
        too_much = authorization(amount=money(amount_minor + 1))
        assert wrong_fields(too_much) == ["amount.amount_minor"]
    else:
        assert wrong_fields(request) == ["amount.amount_minor"]


@pytest.mark.parametrize("key", ["x", " ", "~" * 255, "a b/c=?"])
def test_an_idempotency_key_is_1_to_255_printable_characters(key: str) -> None:
    validation.validate(authorization(idempotency_key=key))


@pytest.mark.parametrize("key", ["", "x" * 256, "a\n", "a\tb", "\x7f", "schlüssel", "a\u00a0b"])
def test_an_idempotency_key_is_nothing_else(key: str) -> None:
    assert wrong_fields(authorization(idempotency_key=key)) == ["idempotency_key"]


def test_every_active_currency_is_taken() -> None:
    for currency in CURRENCY_EXPONENTS:
        validation.validate(authorization(amount=money(1, currency)))


@pytest.mark.parametrize("currency", ["", "eur", "EU", "EURO", "XXX", "XTS", "XAU", "DEM", "HRK"])
def test_what_is_no_active_currency_is_refused_wherever_money_stands(currency: str) -> None:
    wrong = money(1, currency)
    for request, path in (
        (authorization(amount=wrong), "amount"),
        (pb.CapturePaymentRequest(idempotency_key="k", payment_id="p", amount=wrong), "amount"),
        (pb.RefundPaymentRequest(idempotency_key="k", payment_id="p", amount=wrong), "amount"),
        (
            pb.IncrementAuthorizationRequest(
                idempotency_key="k", payment_id="p", additional_amount=wrong
            ),
            "additional_amount",
        ),
    ):
        assert wrong_fields(request) == [f"{path}.currency_code"]


def test_money_stands_nowhere_where_its_currency_is_not_looked_at() -> None:
    places = {
        (type(request).__name__, path)
        for request in VALID
        for path, field in descriptors(request.DESCRIPTOR)
        if field.message_type is not None and field.message_type.name == "Money"
    }
    assert places == {
        ("AuthorizePaymentRequest", "amount"),
        ("CapturePaymentRequest", "amount"),
        ("RefundPaymentRequest", "amount"),
        ("IncrementAuthorizationRequest", "additional_amount"),
    }


@pytest.mark.parametrize(
    ("seconds", "nanos", "valid"),
    [
        (-62_135_596_800, 0, True),
        (253_402_300_799, 999_999_999, True),
        (-62_135_596_801, 0, False),
        (253_402_300_800, 0, False),
        (0, -1, False),
        (0, 1_000_000_000, False),
        (2**63 - 1, 0, False),
    ],
)
def test_a_time_is_one_of_the_years_1_to_9999(seconds: int, nanos: int, *, valid: bool) -> None:
    for name in ("created_from", "created_before"):
        request = pb.ListPaymentsRequest()
        getattr(request, name).MergeFrom(Timestamp(seconds=seconds, nanos=nanos))
        if valid:
            validation.validate(request)
        else:
            assert wrong_fields(request) == [name]


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", "x1")
@pytest.mark.parametrize(("request_", "path"), STRINGS)
def test_every_text_has_a_bound(request_: Message, path: str, character: str) -> None:
    assert path in wrong_fields(with_string(request_, path, character * FAR_TOO_LONG))


@pytest.mark.parametrize(
    ("metadata", "valid"),
    [
        ({str(number): "" for number in range(50)}, True),
        ({str(number): "" for number in range(51)}, False),
        ({"k" * 40: "v" * 500}, True),
        ({"a-b_c.D9": "ü" * 500}, True),
        ({"k" * 41: ""}, False),
        ({"": ""}, False),
        ({"a b": ""}, False),
        ({"ä": ""}, False),
        ({"a\n": ""}, False),
        ({"a": "v" * 501}, False),
    ],
)
def test_metadata_are_50_entries_of_40_and_500_characters(
    metadata: dict[str, str], *, valid: bool
) -> None:
    request = authorization(metadata=metadata)
    if valid:
        validation.validate(request)
    else:
        assert wrong_fields(request) == ["metadata"]


MANY = 1000
BAD_METADATA = {f"a b {number}": "1" for number in range(MANY)}


def _states(numbers: Iterable[int]) -> list[payment_pb2.PaymentState.ValueType]:
    """Numbers that no state has, as a caller may send them."""
    return [cast("payment_pb2.PaymentState.ValueType", number) for number in numbers]


@pytest.mark.parametrize(
    ("request_", "path", "most"),
    [
        (pb.ListPaymentsRequest(states=_states([99] * MANY)), "states", 16),
        (pb.ListPaymentsRequest(states=_states(range(100, 100 + MANY))), "states", 16),
        (authorization(metadata=BAD_METADATA), "metadata", 50),
        (
            routing_service_pb2.ExplainRouteRequest(payment=authorization(metadata=BAD_METADATA)),
            "payment.metadata",
            50,
        ),
    ],
)
def test_of_too_many_entries_no_more_are_looked_at_than_tell_that(
    request_: Message, path: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    validator = validation._validator

    class Watching:
        def collect_violations(self, request: Any) -> Any:
            looked_at.append(len(attrgetter(path)(request)))
            return validator.collect_violations(request)

    monkeypatch.setattr(validation, "_validator", Watching())
    wrong = {field.partition("[")[0] for field in wrong_fields(copied(request_))}
    assert path in wrong
    assert looked_at == [most + 1]


def test_no_more_texts_are_searched_than_a_request_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[str] = []
    monkeypatch.setattr(validation, "contains_pan", searched.append)
    validation.refuse_card_numbers(pb.AuthorizePaymentRequest(metadata=BAD_METADATA), None)
    assert len(searched) == 2 * 51


@pytest.mark.parametrize("most", [validation.BATCH_ITEMS_MAX, validation.STREAM_ITEMS_MAX])
def test_items_are_counted(most: int) -> None:
    validation.validate_items([pb.AuthorizePaymentItem()] * most, most)
    for count in (0, most + 1):
        with pytest.raises(GatewayError) as caught:
            validation.validate_items([pb.AuthorizePaymentItem()] * count, most)
        assert [each.field for each in caught.value.violations] == ["items"]


def test_items_are_told_apart_by_their_marks() -> None:
    items = [pb.AuthorizePaymentItem(item_ref=each) for each in ("a", "b", "", "", "a", "a")]
    with pytest.raises(GatewayError) as caught:
        validation.validate_item_refs(items)
    fields = [each.field for each in caught.value.violations]
    assert fields == ["items[4].item_ref", "items[5].item_ref"]
    validation.validate_item_refs(items[:4])


@pytest.mark.parametrize(
    ("item", "fields"),
    [
        (pb.AuthorizePaymentItem(), ["item_ref", "authorization"]),
        (pb.AuthorizePaymentItem(item_ref="x" * 129, authorization=authorization()), ["item_ref"]),
        (pb.AuthorizePaymentItem(item_ref="x" * 128), ["authorization"]),
    ],
)
def test_an_item_has_a_mark_and_an_authorization(
    item: pb.AuthorizePaymentItem, fields: list[str]
) -> None:
    with pytest.raises(GatewayError) as caught:
        validation.validate_item(item, validation.echoed_item_ref(item))
    assert [each.field for each in caught.value.violations] == fields


@pytest.mark.parametrize(
    ("item_ref", "echoed"),
    [
        ("a", "a"),
        ("ü" * 128, "ü" * 128),
        ("x" * 129, ""),
        (PAN, ""),
        (f"order {PAN}", ""),
        ("", ""),
    ],
)
def test_a_mark_is_repeated_unless_it_is_none_or_card_data(item_ref: str, echoed: str) -> None:
    assert validation.echoed_item_ref(pb.AuthorizePaymentItem(item_ref=item_ref)) == echoed


@pytest.mark.parametrize(
    ("request_id", "usable"),
    [
        ("x", True),
        ("a b~" * 32, True),
        ("", False),
        ("x" * 129, False),
        ("ü", False),
        ("a\n", False),
    ],
)
def test_a_request_id_is_1_to_128_printable_characters(request_id: str, *, usable: bool) -> None:
    assert validation.is_usable_request_id(request_id) is usable


def test_bytes_that_are_no_message_are_refused_without_a_word_of_them() -> None:
    assert validation.parse(pb.GetPaymentRequest, VALID[5].SerializeToString()) == VALID[5]
    # A field that ends too early, a group that never ends, text that is no UTF-8.
    for data in (b"\x12\x7fcanary", b"\x13canary", b"\x12\x02\xff\xfe", b"\xff"):
        with pytest.raises(GatewayError) as caught:
            validation.parse(pb.GetPaymentRequest, data)
        assert caught.value.reason is Reason.MESSAGE_MALFORMED
        assert "canary" not in told(caught.value)
        assert caught.value.__suppress_context__


# --- nothing is repeated --------------------------------------------------------------------------


@pytest.mark.parametrize(("request_", "path"), STRINGS)
def test_no_refusal_repeats_a_text(request_: Message, path: str) -> None:
    error = refusal(with_string(request_, path, f"{CANARY}\n" * 1000))
    assert CANARY not in told(error)
    with_nul = with_string(request_, path, f"{CANARY}\0")
    assert validation.is_suspect(with_nul.SerializeToString())
    with pytest.raises(GatewayError) as caught:
        validation.refuse_card_numbers(with_nul, None)
    assert [each.field for each in caught.value.violations] == [path]
    assert CANARY not in told(caught.value)


def test_no_violation_is_asked_for_its_value_which_takes_longer_than_all_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bare:
        def __init__(self, violation: Any) -> None:
            self.proto = violation.proto

    class Validator:
        def collect_violations(self, request: Message) -> list[Bare]:
            return [Bare(each) for each in found.collect_violations(request)]

    found = validation._validator
    request = authorization(idempotency_key="", metadata={"": "x", "b": "y" * 3_000})
    before = [(each.field, each.description) for each in refusal(request).violations]
    assert ("idempotency_key", "value is required") in before
    # In the order of the map's entries, which is another one in each process.
    parts = sorted(dict(before)["metadata"].split("; "))
    assert parts[0] == "a key value is required"
    assert parts[1].startswith("a value ")
    monkeypatch.setattr(validation, "_validator", Validator())
    assert [(each.field, each.description) for each in refusal(request).violations] == before


def test_no_refusal_repeats_a_key_or_a_value_of_metadata() -> None:
    for key, value in ((f"{CANARY} ", ""), ("a", CANARY * 100)):
        error = refusal(authorization(metadata={key: value}))
        assert [each.field for each in error.violations] == ["metadata"]
        assert CANARY not in told(error)
    for key, value in ((f"{CANARY}\0", ""), ("a", f"{CANARY}\0")):
        with pytest.raises(GatewayError) as caught:
            validation.refuse_card_numbers(authorization(metadata={key: value}), None)
        assert [each.field for each in caught.value.violations] == ["metadata"]
        assert CANARY not in told(caught.value)


# --- card data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("request_", "path"), STRINGS)
def test_a_text_longer_than_any_may_be_is_refused_without_searching_it(
    request_: Message, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = with_string(request_, path, "4" * (validation.TEXT_CHARACTERS_MAX + 1))
    assert validation.is_suspect(request.SerializeToString())
    monkeypatch.setattr(validation, "contains_pan", lambda text: len(text) > 2048)
    with pytest.raises(GatewayError) as caught:
        validation.refuse_card_numbers(request, None)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert [each.field for each in caught.value.violations] == [path]


def test_texts_that_are_longer_together_than_all_may_be_are_refused_without_searching_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[int] = []

    def search(text: str) -> bool:
        searched.append(len(text))
        return False

    monkeypatch.setattr(validation, "contains_pan", search)
    request = authorization(metadata={f"{n}" + "2 " * 1000: "2 " * 1000 for n in range(50)})
    assert validation.is_suspect(request.SerializeToString())
    with pytest.raises(GatewayError) as caught:
        validation.refuse_card_numbers(request, None)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert [each.field for each in caught.value.violations] == ["metadata"]
    assert sum(searched) <= validation.TEXTS_CHARACTERS_MAX


def test_the_longest_texts_that_the_contract_allows_are_searched_all() -> None:
    def longest(given_: Any) -> int:
        pattern = sum(int(most) for most in re.findall(r"\{(?:\d+,)?(\d+)\}", given_.pattern))
        return max(int(given_.max_len), pattern, *map(len, getattr(given_, "in")), 0)

    for request_ in VALID:
        total = 0
        for path, field in descriptors(request_.DESCRIPTOR):
            if field.type == FieldDescriptor.TYPE_STRING and path not in validation.LONGER_TEXTS:
                length = longest(field.GetOptions().Extensions[rules.field].string)
                assert length, path
                total += length
            elif field.message_type is not None and field.message_type.GetOptions().map_entry:
                pairs = field.GetOptions().Extensions[rules.field].map
                lengths = longest(pairs.keys.string), longest(pairs.values.string)
                assert all(lengths), path
                total += pairs.max_pairs * sum(lengths)
        assert total <= validation.TEXTS_CHARACTERS_MAX, type(request_).__name__


def test_no_rule_of_the_contract_allows_a_longer_text_than_is_searched() -> None:
    services = (
        pb.DESCRIPTOR,
        admin_service_pb2.DESCRIPTOR,
        event_service_pb2.DESCRIPTOR,
        routing_service_pb2.DESCRIPTOR,
    )
    seen = 0
    for file in services:
        for service in file.services_by_name.values():
            for method in service.methods:
                for path, field in descriptors(method.input_type):
                    given_ = field.GetOptions().Extensions[rules.field].string
                    allowed = max(given_.max_len, given_.max_bytes)
                    seen += bool(allowed)
                    longest = validation.LONGER_TEXTS.get(path, validation.TEXT_CHARACTERS_MAX)
                    assert allowed <= longest, path
    assert seen > 50


WRITTEN = [
    PAN,
    "4111 1111 1111 1111",
    "4111-1111-1111-1111",
    "4111.1111.1111.1111",
    "4111, 1111, 1111, 1111",
    f"order {PAN}, please",
    "٤١١١١١١١١١١١١١١١",
    "４１１１　１１１１　１１１１　１１１１",
    "4111\u200b1111\u200b1111\u200b1111",
    quote("4111 1111 1111 1111"),
    "4111\\u00201111\\u00201111\\u00201111",
    "4222222222222",
    "378282246310005",
]


def card_data_field(request: Message, merchant: MerchantInfo | None = None) -> str | None:
    """The field that a request is refused for; None where it is not refused."""
    refused: GatewayError | None = None
    if validation.is_suspect(request.SerializeToString()):
        try:
            validation.refuse_card_numbers(request, merchant)
        except GatewayError as error:
            refused = error
    if refused is None:
        return None
    assert refused.reason is Reason.CARD_DATA_NOT_ALLOWED
    assert "1111" not in told(refused)
    (violation,) = refused.violations
    return violation.field


@pytest.mark.parametrize(("request_", "path"), STRINGS)
def test_a_card_number_is_refused_in_every_text(request_: Message, path: str) -> None:
    if path == validation.NETWORK_TOKEN_NUMBER:
        # It is one, and goes to the PSP alone.
        assert card_data_field(with_string(request_, path, PAN)) is None
        return
    for text in WRITTEN:
        assert card_data_field(with_string(request_, path, text)) == path
        # Other texts do not lead away from it.
        second = with_string(with_string(request_, path, text), "merchant_id", "mer_1")
        assert card_data_field(second) == (None if path == "merchant_id" else path)


@pytest.mark.parametrize("text", WRITTEN)
def test_a_card_number_is_refused_in_every_key_and_value_of_metadata(text: str) -> None:
    others = {"a": "b", "c": "d"}
    assert card_data_field(authorization(metadata=others | {text: "x"})) == "metadata"
    assert card_data_field(authorization(metadata=others | {"x": text})) == "metadata"
    assert card_data_field(authorization(metadata=others)) is None


@pytest.mark.parametrize("text", WRITTEN)
def test_a_card_number_is_refused_as_the_mark_of_an_item(text: str) -> None:
    item = pb.AuthorizePaymentItem(item_ref=text, authorization=authorization())
    with pytest.raises(GatewayError) as caught:
        validation.validate_item(item, validation.echoed_item_ref(item))
    assert caught.value.reason is Reason.CARD_DATA_NOT_ALLOWED
    assert [each.field for each in caught.value.violations] == ["item_ref"]
    assert "1111" not in told(caught.value)


def test_a_merchant_may_exempt_its_order_ids_and_nothing_else() -> None:
    exempting = MerchantInfo("mer_1", pan_exempt_order_id=True)
    for request in (
        authorization(merchant_order_id=PAN),
        pb.ListPaymentsRequest(merchant_order_id=PAN),
    ):
        assert card_data_field(request, exempting) is None
        assert card_data_field(request, MerchantInfo("mer_1")) == "merchant_order_id"
        assert card_data_field(request) == "merchant_order_id"
    other = authorization(merchant_order_id=PAN, merchant_transaction_id=PAN)
    assert card_data_field(other, exempting) == "merchant_transaction_id"
    nul = authorization(merchant_order_id="\0")
    with pytest.raises(GatewayError, match="rules of the contract"):
        validation.refuse_card_numbers(nul, exempting)


def test_the_requests_have_no_place_for_text_that_is_not_looked_at() -> None:
    for request in VALID:
        for path, field in descriptors(request.DESCRIPTOR):
            assert field.type != FieldDescriptor.TYPE_BYTES, path
            if not field.is_repeated:
                continue
            entry: Descriptor | None = field.message_type
            if entry is None:
                assert field.type == FieldDescriptor.TYPE_ENUM, path
            else:
                assert entry.GetOptions().map_entry, path
                kinds = {each.type for each in entry.fields}
                assert kinds == {FieldDescriptor.TYPE_STRING}, path


DIGITS = st.sampled_from(["0123456789", "٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９"])
GAPS = st.sampled_from(
    ["", " ", "-", "+", "\t", "\u00a0", "\u2009", "–", "%20", "%2D", "\\n", "\\u0020"]
)


@st.composite
def written_numbers(draw: st.DrawFn) -> str:
    """A card number in some script, in groups, in some text."""
    number = draw(st.sampled_from([PAN, "4222222222222", "378282246310005", "6759649826438453"]))
    digits, gap = draw(DIGITS), draw(GAPS)
    cuts = draw(st.sets(st.integers(1, len(number) - 1), max_size=4))
    text = "".join(
        (gap if place in cuts else "") + digits[int(digit)] for place, digit in enumerate(number)
    )
    return draw(st.text(max_size=20)) + text + draw(st.text(max_size=20))


@given(st.one_of(st.text(), written_numbers()))
def test_no_card_number_is_in_a_message_whose_bytes_are_not_suspect(text: str) -> None:
    data = authorization(merchant_order_id=text).SerializeToString()
    if contains_pan(text) or "\0" in text:
        assert validation.is_suspect(data)


@pytest.mark.parametrize(
    "key", ["cvv", "CVV2", "card_cvc", "card-security-code", "cvn", "Verification.Value", "x_csc"]
)
@pytest.mark.parametrize("value", ["123", "1234", " 123 "])
def test_a_verification_value_under_its_name_is_refused(key: str, value: str) -> None:
    with pytest.raises(GatewayError) as caught:
        validation.refuse_verification_values(authorization(metadata={"a": "b", key: value}))
    assert caught.value.reason is Reason.CARD_DATA_NOT_ALLOWED
    assert [each.field for each in caught.value.violations] == ["metadata"]
    assert value not in told(caught.value)
    assert key not in told(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("cvv", "matched"), ("cvv_result", "123"), ("order", "123"), ("cvv", "12"), ("cvv", "12345")],
)
def test_what_is_no_verification_value_passes(key: str, value: str) -> None:
    validation.refuse_verification_values(authorization(metadata={key: value}))


def test_a_header_is_refused_by_its_name() -> None:
    error = validation.card_data_refusal("x-request-id")
    assert error.reason is Reason.CARD_DATA_NOT_ALLOWED
    assert [each.field for each in error.violations] == ["x-request-id"]


def test_a_state_is_one_of_the_contract() -> None:
    states = list(payment_pb2.PaymentState.values())
    validation.validate(pb.ListPaymentsRequest(states=states[1:]))
