"""The published outcomes: complete, documented, and understood by the connector."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.connectors import schemes
from gateway.connectors.http import Response
from gateway.connectors.simulator import connector, outcomes
from gateway.connectors.simulator.ledger import KINDS, Ledger, Send
from gateway.connectors.simulator.outcomes import TOKENS, Result, choose
from gateway.connectors.simulator.profiles import PROFILES, find_profile
from gateway.domain.model import (
    SENT_KINDS,
    AdviceAction,
    AvsResult,
    ConnectorAnswer,
    CvvResult,
    Delivery,
    ResponseCode,
    Verdict,
)
from gateway.domain.pan import contains_pan

pytestmark = pytest.mark.unit

DOCUMENT = Path(__file__).parents[2] / "docs" / "simulator.md"


def first_answer(token: str, kind: str = "authorize") -> ConnectorAnswer:
    ledger = Ledger(PROFILES["idempotent"])
    amount_minor = 0 if kind == "verify" else 1000
    send = Send(kind, "op_1-1", amount_minor, "EUR", "account", "pay_1", token=token)
    _, answer = ledger.execute(send, ledger.behaviour(send), 1, 100.0, 100.0)
    told = connector._envelope(Response(200, orjson.dumps(answer)), kind, "op_1-1")
    assert told is not None
    return connector._answered(told)


def test_document_shows_the_published_tables() -> None:
    text = DOCUMENT.read_text()
    begin, end = re.escape("outcomes -->\n\n"), re.escape("\n<!-- end of tables -->")
    shown = re.search(f"{begin}(.*?){end}", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == outcomes.tables()
    for profile in PROFILES.values():
        assert f"| `{profile.name}` | {profile.meaning} |" in text


def test_connector_and_simulator_know_the_same_kinds_of_operation() -> None:
    assert set(KINDS) == {kind.name.lower() for kind in SENT_KINDS}


def test_tokens_fit_the_contract_and_are_no_card_numbers() -> None:
    published = [*TOKENS, outcomes.SCRIPTED_TOKEN, *outcomes.follow_up_tokens()]
    assert len(published) == len(set(published))
    for token in published:
        assert re.fullmatch(r"tok_[A-Za-z0-9_-]{1,120}", token)
        assert not contains_pan(token)


def test_every_iso8583_code_of_a_decline_has_a_token_and_a_unified_code() -> None:
    published = {network_code for network_code, _ in outcomes.DECLINES.values()}
    assert published == schemes.ISO8583_CODES.keys() - {"00", "10"} | {"93"}
    for name, (network_code, _) in outcomes.DECLINES.items():
        answer = first_answer(f"tok_declined_{name}")
        assert answer.verdict is Verdict.DECLINED
        assert answer.outcome is not None
        assert (answer.outcome.connector_code, answer.outcome.network_code) == (name, network_code)
        other = answer.outcome.response_code is ResponseCode.DECLINED_OTHER
        assert other == (name == "other")
        assert answer.outcome.auth_code == ""


def test_every_advice_is_understood() -> None:
    told: dict[str, tuple[AdviceAction, int | None]] = {}
    for token in TOKENS:
        if token.startswith("tok_advice_"):
            outcome = first_answer(token).outcome
            assert outcome is not None
            told[token] = (outcome.advice_action, outcome.advice_retry_after_s)
    assert len(told) == len(schemes.ADVICE)
    assert {action for action, _ in told.values()} == set(AdviceAction) - {AdviceAction.UNSPECIFIED}
    assert told["tok_advice_retry_after_1h"] == (AdviceAction.RETRY_AFTER, 3600)
    assert told["tok_advice_retry_after_10d"] == (AdviceAction.RETRY_AFTER, 864_000)
    assert told["tok_advice_stop_recurring"] == (AdviceAction.STOP_RECURRING, None)


def test_every_avs_and_cvv_result_has_a_token() -> None:
    avs = set()
    for code in outcomes.AVS_CODES:
        outcome = first_answer(f"tok_avs_{code.lower()}").outcome
        assert outcome is not None
        assert outcome.avs_code == code
        avs.add(outcome.avs_result)
    cvv = set()
    for code in outcomes.CVV_CODES:
        outcome = first_answer(f"tok_cvv_{code.lower()}").outcome
        assert outcome is not None
        cvv.add(outcome.cvv_result)
    assert avs == set(AvsResult) - {AvsResult.UNSPECIFIED}
    assert cvv == set(CvvResult) - {CvvResult.UNSPECIFIED}


@pytest.mark.parametrize("kind", ["authorize", "verify"])
@pytest.mark.parametrize("token", TOKENS)
def test_every_token_is_answered_in_a_form_that_the_connector_reads(token: str, kind: str) -> None:
    answer = first_answer(token, kind)
    assert answer.delivery is Delivery.ANSWERED
    assert answer.verdict is connector._VERDICTS[TOKENS[token].result.value]
    assert answer.currency == "EUR"


def test_unknown_token_is_declined_as_an_invalid_payment_method() -> None:
    for token in ("tok_unheard_of", "tok_capture_unheard_of", "tok_void_bounces", ""):
        outcome = first_answer(token).outcome
        assert outcome is not None
        assert outcome.response_code is ResponseCode.INVALID_PAYMENT_METHOD


@given(
    kind=st.sampled_from(outcomes.FOLLOW_UP_KINDS),
    token=st.sampled_from(["tok_visa", "tok_approved", "tok_test_load_7", "tok_slow"]),
    amount_minor=st.integers(0, 10**12) | st.sampled_from(sorted(outcomes.AMOUNTS)),
)
def test_follow_ups_of_ordinary_payments_approve_whatever_their_amount(
    kind: str, token: str, amount_minor: int
) -> None:
    assert choose(kind, token, amount_minor) is outcomes.APPROVE


def test_follow_up_token_strikes_its_kind_alone() -> None:
    for token in outcomes.follow_up_tokens():
        _, struck, name = token.split("_", 2)
        for kind in KINDS:
            behaviour = choose(kind, token, 1000)
            expected = outcomes.FOLLOW_UPS[name] if kind == struck else outcomes.APPROVE
            assert behaviour is expected


def test_scripted_amounts_strike_scripted_payments() -> None:
    for amount_minor, behaviour in outcomes.AMOUNTS.items():
        assert choose("capture", outcomes.SCRIPTED_TOKEN, amount_minor) is behaviour
    assert choose("capture", outcomes.SCRIPTED_TOKEN, 1000) is outcomes.APPROVE
    bounces = max(outcomes.AMOUNTS)
    assert choose("void", outcomes.SCRIPTED_TOKEN, bounces) is outcomes.APPROVE


def test_numbers_of_the_network_are_no_card_numbers() -> None:
    ledger = Ledger(PROFILES["idempotent"])
    for number in (1, 41_111_111, 411_111_111_111, 10**12):
        ledger._next_number = number
        send = Send("authorize", f"op_{number}-1", 1, "EUR", "", "", token="tok_visa")
        record, _ = ledger.execute(send, ledger.behaviour(send), 1, 100.0, 100.0)
        assert not contains_pan(orjson.dumps(record).decode())


def test_unknown_profile_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no simulator profile 'unheard'"):
        find_profile("unheard")


# --- hostile answers ------------------------------------------------------------------------------

_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_names = [
    *("transaction_id", "amount_minor", "currency", "code", "message", "network_code"),
    *("advice_scheme", "advice_code", "avs_code", "processing_ms", "expires_at"),
    *("next_action_url", "next_action_path", "next_action_kind", "next_action_expires_at"),
    *("transactions", "had"),
]


@given(
    result=st.sampled_from([result.value for result in Result]) | _values,
    more=st.dictionaries(st.sampled_from(_names), _values),
)
def test_no_answer_of_a_psp_breaks_the_connector(result: Any, more: dict[str, Any]) -> None:
    body = {"reference": "op_1-1", "kind": "refund", "result": result, **more}
    response = Response(200, orjson.dumps(body))
    told = connector._envelope(response, "refund", "op_1-1")
    if told is not None:
        answer = connector._found(told)
        assert answer.delivery in Delivery
        if answer.outcome is not None and answer.outcome.amount_reported_minor is not None:
            assert abs(answer.outcome.amount_reported_minor) < 2**63


@given(st.binary(max_size=64))
def test_a_body_that_is_no_answer_is_unusable(body: bytes) -> None:
    assert connector._envelope(Response(200, body), "refund", "op_1-1") is None


def test_card_number_in_a_psps_message_is_masked() -> None:
    number = "4" + "1" * 15
    told = {"result": "declined", "message": f"card {number} is unknown", "code": number}
    answer = connector._answered(told)
    assert answer.outcome is not None
    assert number not in repr(answer)
    assert answer.outcome.connector_message.endswith("1111 is unknown")


@pytest.mark.parametrize("name", ["transaction_id", "amount_minor", "currency"])
def test_approval_that_lacks_what_follow_ups_need_is_unusable(name: str) -> None:
    whole = {
        "result": "approved",
        "reference": "op_1-1",
        "kind": "authorize",
        "transaction_id": "sim_1",
        "amount_minor": 1,
        "currency": "EUR",
    }
    assert connector._envelope(Response(200, orjson.dumps(whole)), "authorize", "op_1-1")
    del whole[name]
    assert connector._envelope(Response(200, orjson.dumps(whole)), "authorize", "op_1-1") is None
