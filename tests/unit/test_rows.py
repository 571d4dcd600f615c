"""storage.postgres.rows: documents that another version of the gateway wrote."""

from __future__ import annotations

import json

from gateway.domain.model import (
    ConnectorAnswer,
    Delivery,
    NextAction,
    Outcome,
    QrCode,
    ResponseCode,
    Verdict,
)
from storage.postgres.rows import answer_json, answer_of, outcome_of

OUTCOME = Outcome(response_code=ResponseCode.DO_NOT_HONOR, network_code="05")
ANSWER = ConnectorAnswer(
    Delivery.ANSWERED,
    Verdict.REQUIRES_ACTION,
    OUTCOME,
    next_action=NextAction(qr_code=QrCode("data")),
)


def test_an_answer_is_read_as_it_was_written() -> None:
    assert answer_of(answer_json(ANSWER)) == ANSWER


def test_fields_and_codes_of_a_newer_version_are_left_out() -> None:
    document = json.loads(answer_json(ANSWER))
    for part in (
        document,
        document["outcome"],
        document["next_action"],
        document["next_action"]["qr_code"],
    ):
        part["of_a_newer_version"] = {"what": "ever"}
    document["outcome"]["advice_action"] = 10_000
    assert answer_of(json.dumps(document)) == ANSWER
    document["outcome"]["response_code"] = 10_000
    outcome = outcome_of(json.dumps(document["outcome"]))
    assert outcome == Outcome(network_code="05")
