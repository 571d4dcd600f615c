"""A PSP that answers within the gateway's process: approvals, after a delay that can be chosen."""

import asyncio
import random
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from gateway.application.ports import Capabilities, ConnectorRequest
from gateway.connectors.simulator.connector import SUPPORTED_FIELDS
from gateway.connectors.simulator.latency import Latency
from gateway.domain.errors import Reason
from gateway.domain.model import (
    ConnectorAnswer,
    CvvResult,
    Delivery,
    Mode,
    OperationKind,
    Outcome,
    ResponseCode,
    Verdict,
)

ANSWER_TIMEOUT_S: Final = 10.0
AUTHORIZATION_LIFE: Final = timedelta(days=7)


class InProcessPsp:
    """Approves all, with an answer as full as the simulator's. Implements the Connector port.

    Delays are drawn as the PSP simulator draws them. Without one there is not even a turn of the
    event loop, so that nothing but the gateway's own work is measured.
    """

    def __init__(self, latency: Latency, seed: int = 1) -> None:
        self._latency = latency
        self._random = random.Random(seed)
        self._answered = 0
        self._capabilities = Capabilities(
            mode=Mode.TEST,
            idempotent_by_reference=True,
            key_validity_s=None,
            query_by_reference=True,
            cancel_by_reference=True,
            answer_timeout_s=ANSWER_TIMEOUT_S,
            supported_fields=SUPPORTED_FIELDS,
        )

    @property
    def name(self) -> str:
        """The connector's name."""
        return "in_process"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the simulator's profile `idempotent`."""
        return self._capabilities

    async def send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Approve, after the delay."""
        if time.monotonic() >= send_before:
            return ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.SEND_WINDOW_PASSED)
        delay_ms = self._latency.draw(self._random)
        if delay_ms:
            await asyncio.sleep(delay_ms / 1000)
        self._answered += 1
        number = self._answered
        return ConnectorAnswer(
            delivery=Delivery.ANSWERED,
            verdict=Verdict.APPROVED,
            outcome=Outcome(
                response_code=ResponseCode.APPROVED,
                connector_code="approved",
                connector_message="Approved",
                network_code="00",
                network_code_scheme="iso8583_1987",
                cvv_result=CvvResult.MATCH,
                cvv_code="M",
                auth_code=f"{number % 1_000_000:06d}",
                network_transaction_id=f"ntx{number:012d}",
                retrieval_reference_number=f"r{number:011d}",
                system_trace_audit_number=f"{number % 1_000_000:06d}",
                amount_reported_minor=request.amount_minor,
            ),
            connector_transaction_id=f"txn_{request.reference}",
            currency=request.currency,
            processing_ms=delay_ms,
            authorization_expires_at=datetime.now(UTC) + AUTHORIZATION_LIFE,
        )

    async def query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer | None:
        """Not known: no answer is ever lost on the way, so that recovery never asks in vain."""
        del kind, reference, request
        return None

    async def cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None = None
    ) -> ConnectorAnswer:
        """Without effect."""
        del kind, reference, request
        return ConnectorAnswer(Delivery.NOT_SENT)

    async def close(self) -> None:
        """Nothing is open."""
