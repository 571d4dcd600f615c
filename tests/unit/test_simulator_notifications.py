"""The simulator's notifications: believed only as the account's, and read as its answers are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from gateway.application.notifications import DisputeStage, DisputeStatus, NotificationKind
from gateway.connectors.notifications import BadSignature, UnusableNotification
from gateway.connectors.simulator.ledger import Ledger, Send
from gateway.connectors.simulator.notifications import SimulatorNotifications
from gateway.connectors.simulator.notifying import (
    SIGNATURE,
    Notifying,
    event_of,
    signature,
)
from gateway.connectors.simulator.outcomes import APPROVE
from gateway.connectors.simulator.profiles import PROFILES
from gateway.connectors.simulator.server import main
from gateway.domain.ids import new_operation_id
from gateway.domain.model import Mode, Verdict

pytestmark = pytest.mark.unit

SOURCE = SimulatorNotifications(tolerance_s=300)
SECRET = "whsec_simulator_0123456789"
OTHER = "whsec_simulator_9876543210"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ACCOUNT = "acc_" + 32 * "0"


def signed(event: Any, secret: str = SECRET, at: datetime = NOW) -> tuple[dict[str, str], bytes]:
    body = event if isinstance(event, bytes) else orjson.dumps(event)
    return {SIGNATURE: signature(secret, int(at.timestamp()), body)}, body


def authorized(reference: str) -> dict[str, Any]:
    """The event of an approved authorization, as the simulator makes it."""
    ledger = Ledger(PROFILES["idempotent"])
    send = Send("authorize", reference, 1000, "EUR", ACCOUNT, "pay_1", "tok_visa")
    record, _ = ledger.execute(send, APPROVE, 1, 0.0, NOW.timestamp())
    return event_of(record, ledger.payment_reference(record))


def test_what_the_simulator_signs_is_read_as_its_answer() -> None:
    reference = f"{new_operation_id()}-1"
    [told] = SOURCE.verify_and_parse(*signed(authorized(reference)), [OTHER, SECRET], NOW)
    assert (told.kind, told.reference) == (NotificationKind.AUTHORIZATION, reference)
    assert (told.payment_reference, told.mode) == (reference, Mode.TEST)
    assert (told.amount_minor, told.currency) == (1000, "EUR")
    assert told.occurred_at == NOW
    assert told.answer is not None
    assert told.answer.verdict is Verdict.APPROVED
    [again] = SOURCE.verify_and_parse(*signed(authorized(reference)), [SECRET], NOW)
    assert again.event_type == "authorize.approved"


@pytest.mark.parametrize(
    ("off_s", "holds"), [(-301, False), (-299, True), (299, True), (301, False)]
)
def test_signature_holds_around_its_time_both_ways(off_s: int, holds: bool) -> None:
    headers, body = signed({"id": "evt_1"}, at=NOW + timedelta(seconds=off_s))
    if holds:
        assert SOURCE.verify_and_parse(headers, body, [SECRET], NOW)
        return
    with pytest.raises(BadSignature):
        SOURCE.verify_and_parse(headers, body, [SECRET], NOW)


@pytest.mark.parametrize("secrets", [[], [OTHER]])
def test_signature_by_another_secret_does_not_hold(secrets: list[str]) -> None:
    with pytest.raises(BadSignature):
        SOURCE.verify_and_parse(*signed({"id": "evt_1"}), secrets, NOW)


def test_changed_body_and_missing_signature_do_not_hold() -> None:
    headers, body = signed({"id": "evt_1"})
    for given in (headers, {}, {SIGNATURE: "t=1,v1=zz"}, {SIGNATURE: "v1=00"}):
        with pytest.raises(BadSignature):
            SOURCE.verify_and_parse(given, body + b" ", [SECRET], NOW)


@pytest.mark.parametrize("body", [b"<", b"[]", b"{}", b'{"id": 7}'])
def test_what_is_no_event_is_unusable(body: bytes) -> None:
    with pytest.raises(UnusableNotification):
        SOURCE.verify_and_parse(*signed(body), [SECRET], NOW)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"operation": {"kind": "dance"}},
        {"operation": {"kind": "refund", "reference": "console-1", "result": "approved"}},
        {"dispute": {"id": "d_1", "stage": "ACTIVE_DISPUTE", "status": "SOLD"}},
    ],
)
def test_what_cannot_be_used_is_of_no_known_kind(more: dict[str, Any]) -> None:
    [told] = SOURCE.verify_and_parse(*signed({"id": "evt_1"} | more), [SECRET], NOW)
    assert told.kind is NotificationKind.UNKNOWN


def test_dispute_is_told_of_its_payment() -> None:
    reference = f"{new_operation_id()}-1"
    event = {
        "id": "evt_1",
        "type": "dispute.opened",
        "payment_reference": reference,
        "amount_minor": 700,
        "currency": "EUR",
        "dispute": {"id": "d_1", "stage": "ACTIVE_DISPUTE", "status": "OPENED", "reason": "13.1"},
    }
    [told] = SOURCE.verify_and_parse(*signed(event), [SECRET], NOW)
    assert (told.kind, told.payment_reference) == (NotificationKind.DISPUTE, reference)
    assert (told.amount_minor, told.currency) == (700, "EUR")
    assert told.dispute is not None
    assert (told.dispute.stage, told.dispute.status) == (
        DisputeStage.ACTIVE_DISPUTE,
        DisputeStatus.OPENED,
    )


@pytest.mark.parametrize(
    ("url", "secret", "percent"),
    [
        ("https://gateway.example", SECRET, 0),
        ("http://gateway.example/elsewhere", SECRET, 0),
        ("http://gateway.example", "", 0),
        ("http://gateway.example", SECRET, 101),
    ],
)
def test_where_nothing_can_be_told_is_refused(url: str, secret: str, percent: int) -> None:
    with pytest.raises(ValueError, match=r"events|duplicate_percent"):
        Notifying(url, secret, duplicate_percent=percent)


def test_secret_of_the_simulator_shows_nowhere() -> None:
    assert SECRET not in repr(Notifying("http://gateway.example", SECRET))


def test_address_without_a_secret_is_refused_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--journal", "j.jsonl", "--notify", "http://gateway.example"])
    assert "--notify-secret-file" in capsys.readouterr().err


def test_what_ends_by_itself_is_settled_once() -> None:
    ledger = Ledger(PROFILES["idempotent"])
    send = Send("authorize", "op_1-1", 1000, "EUR", ACCOUNT, "pay_1", "tok_pending")
    record, _ = ledger.execute(send, ledger.behaviour(send), 1, 0.0, 0.0)
    transaction_id = record["transaction_id"]
    assert ledger.settles_by_itself(transaction_id)
    settled = ledger.settle(transaction_id, 1.0)
    assert settled is not None
    assert (settled["type"], settled["answer"]["result"]) == ("effect", "approved")
    assert not ledger.settles_by_itself(transaction_id)
    assert ledger.settle(transaction_id, 2.0) is None
    again = Ledger(PROFILES["idempotent"], [record, settled])
    assert not again.settles_by_itself(transaction_id)
