"""What the simulator tells of its own accord, verified and read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from gateway.connectors import values
from gateway.connectors.notifications import (
    OUR_REFERENCE,
    Dispute,
    DisputeStage,
    DisputeStatus,
    Notification,
    NotificationKind,
    UnusableNotification,
    timed_event,
    webhook_secrets,
)
from gateway.connectors.simulator.connector import operation_of
from gateway.connectors.simulator.notifying import SIGNATURE
from gateway.domain.model import Mode

NAME: Final = "simulator"
N = NotificationKind

_KINDS: Final = {
    "authorize": N.AUTHORIZATION,
    "verify": N.AUTHORIZATION,
    "capture": N.CAPTURE,
    "void": N.VOID,
    "refund": N.REFUND,
    "increment": N.INCREMENT,
    "reversal": N.VOID,
}


@dataclass(frozen=True, slots=True)
class SimulatorNotifications:
    """Implements the NotificationSource port."""

    tolerance_s: float
    """How old, or how far ahead, the time in a signature may be."""
    connector: str = field(default=NAME, init=False)
    acknowledgement: bytes = field(default=b"", init=False)

    def secrets(self, credentials: Mapping[str, str]) -> Sequence[str]:
        """See the port."""
        return webhook_secrets(credentials)

    def verify_and_parse(
        self, headers: Mapping[str, str], body: bytes, secrets: Sequence[str], now: datetime
    ) -> list[Notification]:
        """See the port."""
        signature = headers.get(SIGNATURE, "")
        told = timed_event(signature, body, secrets, now, self.tolerance_s)
        if not values.identifier(told.get("id")):
            raise UnusableNotification("it is no event")
        return [_notification(told)]


def _notification(told: Mapping[str, Any]) -> Notification:
    payment_reference = values.identifier(told.get("payment_reference"))
    bare = Notification(
        connector=NAME,
        event_id=values.identifier(told["id"]),
        event_type=values.text(told.get("type")),
        occurred_at=values.instant(told.get("created_at")),
        mode=Mode.TEST,
        payment_reference=payment_reference if OUR_REFERENCE.fullmatch(payment_reference) else "",
        payment_transaction_id=values.identifier(told.get("payment_transaction_id")),
        currency=values.text(told.get("currency"), 3),
    )
    dispute = _dispute(told.get("dispute"))
    if dispute is not None:
        amount_minor = values.amount(told.get("amount_minor"))
        return replace(bare, kind=N.DISPUTE, dispute=dispute, amount_minor=amount_minor)
    operation = values.part(told, "operation")
    kind = _KINDS.get(values.text(operation.get("kind")))
    answer = None if kind is None else operation_of(operation)
    if kind is None or answer is None:
        return bare
    reference = values.identifier(operation.get("reference"))
    return replace(
        bare,
        kind=kind,
        reference=reference if OUR_REFERENCE.fullmatch(reference) else "",
        answer=answer,
        amount_minor=answer.outcome.amount_reported_minor if answer.outcome else None,
        currency=answer.currency,
    )


def _dispute(told: object) -> Dispute | None:
    if not isinstance(told, dict):
        return None
    dispute_id = values.identifier(told.get("id"))
    try:
        stage = DisputeStage[values.text(told.get("stage"))]
        status = DisputeStatus[values.text(told.get("status"))]
    except KeyError:
        return None
    reason = values.text(told.get("reason"))
    return Dispute(dispute_id, stage, status, reason) if dispute_id else None
