"""Acquirers' specifications, the codec that they set, and the numbers of a request."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.connectors.iso8583.connector import capabilities_of
from gateway.connectors.iso8583.currencies import ALPHABETIC_CODES, NUMERIC_CODES
from gateway.connectors.iso8583.host import HostAddress
from gateway.connectors.iso8583.identity import Original, identity_of, parse_original
from gateway.connectors.iso8583.kind import open_hosts
from gateway.connectors.iso8583.specification import (
    Specification,
    SpecificationError,
    answer_mti,
    load_specification,
    names,
    repeat_mti,
)
from gateway.domain.ids import new_operation_id
from gateway.domain.model import SENT_KINDS, CaptureMethod, Mode, OperationKind, ResponseCode
from gateway.domain.money import CURRENCY_EXPONENTS
from gateway.domain.pan import contains_pan
from gateway.routing.cascade import SOFT_DECLINES, VISA_CATEGORY_1

FEW = settings(max_examples=50)
REFERENCE = "op_0193476e8a007abc8def0123456789ab-1"
TEXT = (files("gateway.connectors.iso8583") / "specifications" / "reference-text.toml").read_text()


def test_every_currency_of_the_contract_has_its_numeric_code() -> None:
    assert set(NUMERIC_CODES) == set(CURRENCY_EXPONENTS)
    assert len(ALPHABETIC_CODES) == len(NUMERIC_CODES)
    assert [NUMERIC_CODES[code] for code in ("EUR", "USD", "JPY", "KWD", "CLF", "ALL")] == [
        "978",
        "840",
        "392",
        "414",
        "990",
        "008",
    ]


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_follow_from_the_reference_and_stay_as_they_are() -> None:
    """Another release has to find the same: it may have to reverse what this one sent."""
    identity = identity_of(REFERENCE, "alphanumeric")
    assert (identity.stan, identity.rrn, identity.time) == STORED_ALPHANUMERIC
    dated = identity_of(REFERENCE, "date")
    assert (dated.stan, dated.rrn, dated.time) == STORED_DATE
    assert identity_of(REFERENCE[:-1] + "2", "date").stan != identity.stan


STORED_ALPHANUMERIC = ("617486", "WHQ50R9PEGIX", "1120023726")
STORED_DATE = ("617486", "432502316516", "1120023726")


def test_numbers_of_many_references_are_spread() -> None:
    references = [f"{new_operation_id()}-1" for _ in range(2000)]
    identities = [identity_of(reference, "alphanumeric") for reference in references]
    assert len({each.rrn for each in identities}) == len(references)
    assert len({each.stan for each in identities}) > 1900
    assert all(each.stan != "000000" for each in identities)


def test_reference_without_an_id_has_no_numbers() -> None:
    with pytest.raises(ValueError, match="no id"):
        identity_of("something-1", "alphanumeric")


@FEW
@given(
    stan=st.from_regex(r"[0-9]{6}", fullmatch=True),
    time=st.from_regex(r"[0-9]{10}", fullmatch=True),
    rrn=st.from_regex(r"[0-9]{12}", fullmatch=True),
    auth_code=st.from_regex(r"[0-9A-Za-z]{0,6}", fullmatch=True),
    amount_minor=st.integers(0, 10**12 - 1),
    year=st.from_regex(r"([0-9]{2})?", fullmatch=True),
)
def test_transaction_id_is_read_back_and_never_taken_for_a_card_number(
    stan: str, time: str, rrn: str, auth_code: str, amount_minor: int, year: str
) -> None:
    original = Original("0100", stan, time, rrn, amount_minor, auth_code, year)
    assert parse_original(str(original)) == original
    assert not contains_pan(str(original))


def test_another_connectors_transaction_id_is_none() -> None:
    assert parse_original("pi_123") is None
    assert parse_original("") is None


# --- codec ----------------------------------------------------------------------------------------

AUTHORIZATION = {
    "t": "0100",
    "3": "000000",
    "4": "000000001000",
    "7": "1121163158",
    "11": "000042",
    "37": "ABCDEF012345",
    "41": "TERM0001",
    "47": "tok_visa",
    "49": "978",
}


def test_message_in_text_is_as_the_standard_writes_it() -> None:
    """By hand: type, bitmap of DE 3, 4, 7, 11, 37, 41, 47 and 49, then the elements."""
    wire = load_specification("reference-text").encode(dict(AUTHORIZATION))
    assert wire == (
        b"0100"
        b"3220000008828000"
        b"000000" b"000000001000" b"1121163158" b"000042" b"ABCDEF012345" b"TERM0001"
        b"008tok_visa" b"978"
    )  # fmt: skip


def test_message_in_packed_decimals_is_as_the_standard_writes_it() -> None:
    """The odd DE 49 has its zero on the left."""
    wire = load_specification("reference-binary").encode(dict(AUTHORIZATION))
    assert wire == bytes.fromhex(
        "010032200000088280000000000000000010001121163158000042"
    ) + b"ABCDEF012345TERM0001" + bytes.fromhex("0008") + b"tok_visa" + bytes.fromhex("0978")


@pytest.mark.parametrize("name", names())
def test_messages_are_read_back(name: str) -> None:
    specification = load_specification(name)
    assert specification.decode(specification.encode(dict(AUTHORIZATION))) == AUTHORIZATION


@pytest.mark.parametrize("name", names())
@FEW
@given(data=st.binary(max_size=300))
def test_garbage_is_no_message_and_nothing_worse(name: str, data: bytes) -> None:
    specification = load_specification(name)
    try:
        fields = specification.decode(data)
    except ValueError:
        return
    assert fields["t"]


@pytest.mark.parametrize("name", names())
@FEW
@given(data=st.data())
def test_damaged_messages_are_no_messages_or_others(name: str, data: st.DataObject) -> None:
    specification = load_specification(name)
    wire = bytearray(specification.encode(dict(AUTHORIZATION)))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        fields = specification.decode(bytes(wire))
    except ValueError:
        return
    assert set(fields) - {"t"} <= {str(number) for number in range(2, 129)}


@pytest.mark.parametrize("name", names())
def test_element_that_only_the_host_uses_is_read_by_the_standards_format(name: str) -> None:
    specification = load_specification(name)
    fields = {
        "t": "0110",
        "11": "000042",
        "15": "1122",
        "38": "A00001",
        "54": "0002978C0000",
        "102": "X",
    }
    assert specification.decode(specification.encode(dict(fields))) == fields


def test_value_that_does_not_fit_is_refused() -> None:
    specification = load_specification("reference-text")
    for number, value in (("4", "1" * 13), ("4", "ten"), ("41", "TOOLONG99"), ("47", "é")):
        with pytest.raises(ValueError, match=r".*"):
            specification.encode({**AUTHORIZATION, number: value})


def test_element_may_have_an_encoding_of_its_own() -> None:
    text = TEXT.replace("[fields]", '[fields]\n4 = "n 12 bcd"\n41 = "ans 8 cp500"')
    wire = Specification("mixed", text).encode(dict(AUTHORIZATION))
    assert wire == (
        b"0100"
        b"3220000008828000"
        b"000000" b"\0\0\0\0\x10\0" b"1121163158" b"000042" b"ABCDEF012345"
        b"\xe3\xc5\xd9\xd4\xf0\xf0\xf0\xf1" b"008tok_visa" b"978"
    )  # fmt: skip


def test_sign_off_of_a_host_is_known_by_what_the_specification_has_for_it() -> None:
    newer, older = (load_specification(f"reference-{name}") for name in ("1993", "text"))
    assert newer.is_sign_off({"t": "1804", "24": "802"})
    assert not newer.is_sign_off({"t": "1804", "24": "831"})
    assert older.is_sign_off({"t": "0800", "70": "002"})
    assert not older.is_sign_off({"t": "0800"})
    asked = {"t": "1804", "7": "1121163158", "11": "000009", "12": "251121163158", "24": "831"}
    assert newer.network_answer(asked) == {**asked, "t": "1814", "39": "800"}


def test_types_of_answers_and_repeats() -> None:
    assert [
        answer_mti(mti) for mti in ("0100", "0101", "0120", "0200", "0400", "0421", "1804")
    ] == [
        "0110",
        "0110",
        "0130",
        "0210",
        "0410",
        "0430",
        "1814",
    ]
    assert repeat_mti("0420") == "0421"


# --- specifications -------------------------------------------------------------------------------


def test_message_is_known_by_its_type_and_its_fixed_fields() -> None:
    specification = load_specification("reference-text")
    fixed = {"3": "000000", "22": "010"}
    assert specification.name_of({"t": "0100", **fixed, "25": "59"}) == "authorize"
    assert specification.name_of({"t": "0101", **fixed, "25": "51"}) == "verify"
    assert specification.name_of({"t": "0200", "3": "200000"}) == "refund"
    assert specification.name_of({"t": "0120", "3": "000000", "60": "MORE"}) == "capture_more"
    assert specification.name_of({"t": "0100", "3": "310000"}) is None


def test_capabilities_are_what_there_are_messages_for() -> None:
    text = capabilities_of(load_specification("reference-text"), Mode.TEST)
    assert text.operations == SENT_KINDS
    assert text.capture_methods == frozenset(CaptureMethod)
    assert text.idempotent_by_reference
    assert text.cancel_by_reference
    assert not text.query_by_reference
    binary = capabilities_of(load_specification("reference-binary"), Mode.LIVE)
    assert OperationKind.INCREMENT not in binary.operations
    assert CaptureMethod.MANUAL_MULTIPLE not in binary.capture_methods
    assert not binary.idempotent_by_reference


def test_codes_mean_what_the_specification_says() -> None:
    specification = load_specification("reference-text")
    assert specification.response_code("08") is ResponseCode.APPROVED
    assert specification.response_code("10") is ResponseCode.PARTIALLY_APPROVED
    assert specification.response_code("51") is ResponseCode.INSUFFICIENT_FUNDS
    assert specification.response_code("Z9") is ResponseCode.DECLINED_OTHER


def test_codes_after_which_visa_forbids_another_try_are_known_by_their_meaning() -> None:
    specification = load_specification("reference-text")
    meanings = {specification.response_code(code) for code in VISA_CATEGORY_1}
    assert not meanings & {ResponseCode.APPROVED, ResponseCode.DECLINED_OTHER}
    assert not meanings & SOFT_DECLINES


@pytest.mark.parametrize(
    ("found", "instead", "told"),
    [
        ("[fields]", '[fields]\n11 = "number"', "no format"),
        ("[fields]", '[fields]\n11 = "n 6 morse"', "no format"),
        ("[fields]", '[fields]\n41 = "ans 8 bcd"', "cannot be in bcd"),
        ("repeats = true", "repeats = true\nnetwork_approved = []", "network_approved"),
        ('60 = "FINAL"', '60 = "FINAL", 39 = "too long"', "cannot be written"),
        ('70 = "301"', '70 = "3010"', "cannot be written"),
        ("repeats = true", "", "repeats"),
        ("repeats = true", "repeats = true\nretries = 3", "retries"),
        ('47 = "$token"', '47 = "$pan"', "cannot have"),
        ('3 = "200000"', '3 = "$token"', "cannot have"),
        ('47 = "$token" }\n\n[messages.sale]', '2 = "$token" }\n\n[messages.sale]', "card data"),
        ('62 = "$payment"', '65 = "$payment"', "no format"),
        ('37 = "$rrn"\n', "", "lacks DE 37"),
        ('approved = ["00", "08", "11", "85"]', 'approved = ["00", "09"]', "something else"),
        ('partially_approved = ["10"]', 'partially_approved = ["10", "12"]', "something else"),
        ('approved = ["00", "08", "11", "85"]', "approved = []", "approved: .*at least 1"),
        ('amount = "4"', 'balance = "54"', "tell no"),
        ('avs_code = "44:1-1"', 'avs_code = "44-1"', "no place"),
        ('"1A" = "AUTHENTICATION_REQUIRED"', '"1A" = "NO_SUCH"', "no response code 'NO_SUCH'"),
        ("[network.echo]", "[network.ping]", "ping"),
        ("[messages.reversal]", "[messages.undo]", "undo"),
        ('[messages.void]\nmti = "0400"', '[messages.void]\nmti = "0410"', "mti"),
        ('60 = "FINAL"', '60 = "$remaining_amount"', "cannot have"),
        ('match = ["11"', 'currencies = ["XTS"]\nmatch = ["11"', "no currency"),
    ],
)
def test_specification_that_contradicts_itself_is_refused(
    found: str, instead: str, told: str
) -> None:
    assert found in TEXT
    with pytest.raises(SpecificationError, match=told) as refused:
        Specification("changed", TEXT.replace(found, instead))
    assert "\n" not in str(refused.value)


def test_specification_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(SpecificationError, match="nested too deeply"):
        Specification("deep", f"meaning = {'[' * 20_000}")


def test_framing_is_the_specifications() -> None:
    told = TEXT.replace("[framing]", '[framing]\nheader = "0000"\nlength_includes_header = false')
    framing = Specification("reserved", told).framing
    assert (framing.header, framing.length_includes_header) == (b"\0\0", False)
    assert framing.frame_bytes_max == load_specification("reference-text").framing.frame_bytes_max


def test_specification_is_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "acquirer.toml"
    path.write_text(TEXT)
    assert load_specification(str(path)).name == "acquirer"
    assert names() == ["reference-1993", "reference-binary", "reference-text"]
    with pytest.raises(SpecificationError, match="there are reference-1993, reference-binary"):
        load_specification("reference")
    with pytest.raises(SpecificationError, match="cannot be read"):
        load_specification("/nowhere/at/all.toml")


@pytest.mark.parametrize(
    "url",
    [
        "http://host:1?specification=reference-text&mode=test",
        "tls://host?specification=reference-text&mode=test",
        "tls://host:1?specification=reference-text",
        "tls://host:1?specification=reference-text&mode=both",
        "tls://user:secret@host:1?specification=reference-text&mode=test",
        "tls://host:1/path?specification=reference-text&mode=test",
        "tls://host:port?specification=reference-text&mode=test",
        "tls://host:70000?specification=reference-text&mode=test",
        "tls://host:1?specification=reference-text&mode=test&more",
    ],
)
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must be tcp://"):
        HostAddress.parse(url)


def test_hosts_are_named_once() -> None:
    url = "tcp://127.0.0.1:1?specification=reference-text&mode=test"
    assert list(open_hosts(f"alpha={url}, beta={url}")) == ["alpha", "beta"]
    assert open_hosts("") == {}
    for text in (f"alpha={url},alpha={url}", url, f"={url}"):
        with pytest.raises(ValueError, match=r".*"):
            open_hosts(text)
