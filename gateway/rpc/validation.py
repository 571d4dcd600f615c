"""Checks a request: the contract's rules (protovalidate), what they cannot say, and no card data.

Every refusal names fields, never values: neither a violation's text nor its path holds anything
that the caller sent. A map's key is sent by the caller, so paths end at the map.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final, TypeVar, cast

from buf.validate import validate_pb2 as rules
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from payments.v1.money_pb2 import Money
from payments.v1.payment_service_pb2 import (
    AuthorizePaymentItem,
    AuthorizePaymentRequest,
    CapturePaymentRequest,
    GetOperationRequest,
    GetPaymentRequest,
    IncrementAuthorizationRequest,
    ListPaymentsRequest,
    RefundPaymentRequest,
    VoidPaymentRequest,
)
from protovalidate import Validator
from protovalidate import Violation as RuleViolation

from gateway.application.accounts import MerchantInfo
from gateway.domain.errors import GatewayError, Reason, Violation
from gateway.domain.money import is_currency
from gateway.domain.pan import PAN_DIGITS_MIN, contains_pan
from gateway.rpc.screening import screen

BATCH_ITEMS_MAX: Final = 500
"""The contract's rule for BatchAuthorizePaymentsRequest.items."""
STREAM_ITEMS_MAX: Final = 100
"""The contract's rule for StreamAuthorizePaymentsRequest.items."""
ITEM_REF_CHARACTERS_MAX: Final = 128
"""The contract's rule for AuthorizePaymentItem.item_ref."""
TEXT_CHARACTERS_MAX: Final = 2_048
"""The longest text that the contract's rules allow, but for LONGER_TEXTS."""
LONGER_TEXTS: Final = {"rules_toml": 65_536}
"""By path, the longest text in characters."""
TEXTS_CHARACTERS_MAX: Final = 40_000
"""All texts of a request together, but for LONGER_TEXTS; the contract's rules allow no more."""
NETWORK_TOKEN_NUMBER: Final = "payment_method.network_token.number"  # noqa: S105 - a field's path
"""Where the number of a network token may stand; it looks like a card number."""
REQUEST_ID_CHARACTERS_MAX: Final = 128
"""A longer x-request-id is not taken over."""

_PATHS_TOLD_MAX: Final = 5  # in an error's text; its details have them all

REQUEST_TYPES: Final[tuple[type[Message], ...]] = (
    AuthorizePaymentRequest,
    CapturePaymentRequest,
    VoidPaymentRequest,
    RefundPaymentRequest,
    IncrementAuthorizationRequest,
    GetPaymentRequest,
    ListPaymentsRequest,
    GetOperationRequest,
)

# google.protobuf.Timestamp: 0001-01-01T00:00:00Z to 9999-12-31T23:59:59.999999999Z.
_TIMESTAMP_SECONDS = range(-62_135_596_800, 253_402_300_800)
_NANOS = range(1_000_000_000)

# A violation of a whole message is reported at the field that can mend it.
_MESSAGE_RULE_FIELDS: Final = {
    "authorize.zero_amount": "capture_method",
    "authorize.mit": "stored_credential",
    "authorize.redirect": "return_url",
}

# Every byte becomes a character that says what it may be part of: "0" a card number in digits and
# separators, "%" an escape (or NUL), "<" and ">" a character beyond ASCII in UTF-8, its first byte
# and the further ones.
_CLASSES = b"".join(
    b"0" if byte in b"0123456789 \t\r\n+-._/:,"
    else b"%" if byte in b"%\\\0"
    else b"<" if 0xC2 <= byte <= 0xF4
    else b">" if 0x80 <= byte <= 0xBF
    else b"."
    for byte in range(0x100)
)  # fmt: skip
_CARD_NUMBER = "0" * PAN_DIGITS_MIN

# The ends of metadata keys, reduced to their letters and digits, under which three or four digits
# are a card verification value.
_VERIFICATION_KEY_ENDS = (
    *("cvv", "cvv2", "cvc", "cvc2", "cvn", "cvn2", "cvd", "csc", "cav", "cav2"),
    *("securitycode", "verificationvalue", "verificationcode", "verificationnumber"),
)
_VERIFICATION_VALUE = re.compile(r"\s*[0-9]{3,4}\s*")
_NOT_LETTERS_OR_DIGITS = re.compile(r"[^a-z0-9]")

_validator = Validator()
_M = TypeVar("_M", bound=Message)


def warm(further: Sequence[type[Message]] = ()) -> None:
    """Compile the contract's rules: the first validation of each message takes milliseconds."""
    for message_type in (*REQUEST_TYPES, *further):
        screen(message_type.DESCRIPTOR)
        _validator.collect_violations(message_type())


def parse(message_type: type[_M], data: bytes) -> _M:
    """The message of the bytes. Raises GatewayError(MESSAGE_MALFORMED)."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        raise GatewayError(
            Reason.MESSAGE_MALFORMED, "The bytes are no message of the method's request type."
        ) from None


# --- the contract's rules, and the gateway's own --------------------------------------------------


def validate(request: Message) -> None:
    """Check a request but for card data.

    Raises GatewayError(INVALID_REQUEST) with one violation for each field.
    """
    is_surely_right = screen(request.DESCRIPTOR)
    if is_surely_right is not None and is_surely_right(request):
        found: Sequence[RuleViolation] = ()
    else:
        _shorten(request)
        found = _validator.collect_violations(request)
    own_rules = _OWN_RULES.get(type(request))
    violations = [] if own_rules is None else own_rules(request)
    if found or violations:
        translated = (_translated(request, each) for each in found)
        raise _invalid(_by_field([*translated, *violations]))


def _shorten(message: Message) -> None:
    """Leave of a list or a map that has too many entries one too many.

    It is refused all the same, and not looked at entry by entry: each that breaks a rule takes a
    quarter of a millisecond, and a request has room for a million.
    """
    for field, value in message.ListFields():
        if field.is_repeated:
            most = _entries_max(field)
            if not 0 < most < len(value):
                continue
            if isinstance(value, Mapping):
                held = cast("dict[Any, Any]", value)
                for key in list(held)[most + 1 :]:
                    del held[key]
            else:
                del value[most + 1 :]
        elif isinstance(value, Message):
            _shorten(value)


@cache
def _entries_max(field: FieldDescriptor) -> int:
    """How many entries the contract allows in a list or a map; 0: it does not say."""
    given = cast("Any", field.GetOptions()).Extensions[rules.field]
    return int(given.repeated.max_items or given.map.max_pairs)


def _invalid(violations: Sequence[Violation]) -> GatewayError:
    # Whoever sees the text alone learns at least which fields are wrong.
    paths = [violation.field for violation in violations if violation.field]
    fields = ", ".join(paths[:_PATHS_TOLD_MAX])
    more = f" and {len(paths) - _PATHS_TOLD_MAX} more" if len(paths) > _PATHS_TOLD_MAX else ""
    return GatewayError(
        Reason.INVALID_REQUEST,
        f"The request breaks rules of the contract{': ' if fields else ''}{fields}{more}.",
        violations=violations,
    )


def _by_field(violations: Sequence[Violation]) -> list[Violation]:
    by_field: dict[str, list[str]] = {}
    for violation in violations:
        descriptions = by_field.setdefault(violation.field, [])
        if violation.description not in descriptions:
            descriptions.append(violation.description)
    return [Violation(path, "; ".join(texts)) for path, texts in by_field.items()]


def _translated(request: Message, violation: RuleViolation) -> Violation:
    proto = violation.proto
    path: list[str] = []
    in_map = False
    # The violation's own `field_value` takes half a millisecond to tell.
    value: Any = request
    for element in proto.field.elements if proto.field is not None else ():
        name = element.field_name
        value = getattr(value, name, None)  # a oneof is no field
        subscript = element.subscript
        if subscript is not None:
            if subscript.field == "index":
                name += f"[{subscript.value}]"
            else:
                in_map = True
            is_key = in_map and proto.for_key
            value = subscript.value if is_key else value[subscript.value]
        path.append(name)
    description = proto.message or "is not valid"
    if proto.rule_id.startswith(("string.", "enum.")) and not value:
        description = "value is required"  # rather than which pattern the empty text does not match
    if in_map:
        description = f"a {'key' if proto.for_key else 'value'} {description}"
    return Violation(".".join(path) or _MESSAGE_RULE_FIELDS.get(proto.rule_id, ""), description)


def _currency_rule(path: str, money: Money) -> list[Violation]:
    if is_currency(money.currency_code):
        return []
    return [Violation(f"{path}.currency_code", "must be an active ISO 4217 currency code")]


def _authorize_rules(request: AuthorizePaymentRequest) -> list[Violation]:
    violations = _amount_rules(request)
    if request.HasField("amount_details"):
        parts = request.amount_details
        total = parts.tip_minor + parts.surcharge_minor + parts.tax_minor + parts.shipping_minor
        if total > request.amount.amount_minor:
            violations.append(Violation("amount_details", "must not exceed the amount in all"))
    return violations


def _amount_rules(
    request: AuthorizePaymentRequest | CapturePaymentRequest | RefundPaymentRequest,
) -> list[Violation]:
    return _currency_rule("amount", request.amount) if request.HasField("amount") else []


def _increment_rules(request: IncrementAuthorizationRequest) -> list[Violation]:
    if not request.HasField("additional_amount"):
        return []
    return _currency_rule("additional_amount", request.additional_amount)


def _list_rules(request: ListPaymentsRequest) -> list[Violation]:
    return [
        Violation(path, "must be a time of the years 1 to 9999 with nanos below 10^9")
        for path in ("created_from", "created_before")
        if request.HasField(path) and not _is_time(getattr(request, path))
    ]


def _is_time(timestamp: Timestamp) -> bool:
    return timestamp.seconds in _TIMESTAMP_SECONDS and timestamp.nanos in _NANOS


_OWN_RULES: Final[dict[type[Message], Callable[[Any], list[Violation]]]] = {
    AuthorizePaymentRequest: _authorize_rules,
    CapturePaymentRequest: _amount_rules,
    RefundPaymentRequest: _amount_rules,
    IncrementAuthorizationRequest: _increment_rules,
    ListPaymentsRequest: _list_rules,
}


# --- batches and streams --------------------------------------------------------------------------


def validate_items(items: Sequence[AuthorizePaymentItem], items_max: int) -> None:
    """Check how many items a batch, or a message of a stream, has. Raises GatewayError."""
    if not 1 <= len(items) <= items_max:
        raise _invalid([Violation("items", f"must contain 1 to {items_max} items")])


def validate_item_refs(items: Sequence[AuthorizePaymentItem]) -> None:
    """Check that the items of a batch can be told apart. Raises GatewayError."""
    seen: set[str] = set()
    repeated: list[Violation] = []
    for index, item in enumerate(items):
        if item.item_ref and item.item_ref in seen:
            repeated.append(Violation(f"items[{index}].item_ref", "stands at another item too"))
        seen.add(item.item_ref)
    if repeated:
        raise _invalid(repeated)


def echoed_item_ref(item: AuthorizePaymentItem) -> str:
    """The item's mark as its result may repeat it: empty where it is none, or card data."""
    item_ref = item.item_ref
    if len(item_ref) > ITEM_REF_CHARACTERS_MAX or contains_pan(item_ref):
        return ""
    return item_ref


def validate_item(item: AuthorizePaymentItem, echoed_ref: str) -> None:
    """Check what an item has beside its authorization; `echoed_ref` is from `echoed_item_ref`.

    Raises GatewayError.
    """
    violations: list[Violation] = []
    if not echoed_ref:
        if 1 <= len(item.item_ref) <= ITEM_REF_CHARACTERS_MAX:
            raise card_data_refusal("item_ref")
        description = f"must have 1 to {ITEM_REF_CHARACTERS_MAX} characters"
        violations.append(Violation("item_ref", description))
    if not item.HasField("authorization"):
        violations.append(Violation("authorization", "value is required"))
    if violations:
        raise _invalid(violations)


# --- card data ------------------------------------------------------------------------------------


def is_suspect(data: bytes) -> bool:
    """Whether the strings of a message have to be looked at one by one, told from its bytes.

    A card number stands in the bytes as it does in the string, in ASCII digits, or with escapes, or
    with other characters in UTF-8. Tags, lengths and numbers can only cause a needless closer look.
    """
    classes = data.translate(_CLASSES).decode("ascii")
    return _CARD_NUMBER in classes or "%" in classes or "<>" in classes


def refuse_card_numbers(request: Message, merchant: MerchantInfo | None) -> None:
    """Refuse card numbers in every string, map key and map value, but in a network token's own
    number. `merchant` may have its `merchant_order_id` exempted.

    Needed for messages whose bytes are suspect. Raises GatewayError(CARD_DATA_NOT_ALLOWED), or
    INVALID_REQUEST for the character U+0000, which no text of PostgreSQL can hold, and for a text
    that is longer than any may be, or with those before it longer than all: to search it would keep
    everybody else waiting.
    """
    _shorten(request)
    exempt = {NETWORK_TOKEN_NUMBER}
    if merchant is not None and merchant.pan_exempt_order_id:
        exempt.add("merchant_order_id")
    left = TEXTS_CHARACTERS_MAX
    for path, text in _strings(request, ""):
        if len(text) > TEXT_CHARACTERS_MAX and len(text) > LONGER_TEXTS.get(path, 0):
            raise _invalid([Violation(path, "is too long")])
        if path not in LONGER_TEXTS:
            left -= len(text)
            if left < 0:
                raise _invalid([Violation(path, "is too long, with the texts before it")])
        if "\0" in text:
            raise _invalid([Violation(path, "must not contain the character U+0000")])
        if path not in exempt and contains_pan(text):
            raise card_data_refusal(path)


def refuse_verification_values(request: AuthorizePaymentRequest) -> None:
    """Refuse card verification values (CVV2, CVC2) under metadata keys that say that they are some.

    Raises GatewayError(CARD_DATA_NOT_ALLOWED).
    """
    metadata = request.metadata
    for key in metadata:
        reduced = _NOT_LETTERS_OR_DIGITS.sub("", key.lower())
        if reduced.endswith(_VERIFICATION_KEY_ENDS) and _VERIFICATION_VALUE.fullmatch(
            metadata[key]
        ):
            raise card_data_refusal("metadata")


def card_data_refusal(path: str) -> GatewayError:
    """The refusal of card data in a field or header, which it names."""
    return GatewayError(
        Reason.CARD_DATA_NOT_ALLOWED,
        "A field holds what looks like card data; only tokens are taken.",
        violations=[Violation(path, "looks like card data")],
    )


def _strings(message: Message, prefix: str) -> Iterator[tuple[str, str]]:
    """Every string of a message with its path; those of a map with the path of the map.

    The contract's requests have maps from strings to strings, and no other repeated strings.
    """
    for field, value in message.ListFields():
        path = prefix + field.name
        if field.type == FieldDescriptor.TYPE_STRING:
            yield path, value
        elif isinstance(value, Message):
            yield from _strings(value, path + ".")
        elif isinstance(value, Mapping):
            for key, text in value.items():
                yield path, key
                yield path, text


def is_usable_request_id(value: str) -> bool:
    """Whether a caller's x-request-id can be taken over: 1 to 128 printable ASCII characters."""
    return 0 < len(value) <= REQUEST_ID_CHARACTERS_MAX and value.isascii() and value.isprintable()
