"""The connector to an acquirer's host, for one terminal of a merchant.

The source of the rules is ISO 8583:1987 with what the host's specification says.
"""

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from typing import Final, NamedTuple

from gateway.application.notifications import Notification, NotificationKind
from gateway.application.ports import AmountRule, Capabilities, ConnectorRequest
from gateway.connectors import values
from gateway.connectors.base import AccountConnector, Unusable, doubt, not_sent
from gateway.connectors.http import MaybeSent, NotSent
from gateway.connectors.iso8583.currencies import ALPHABETIC_CODES, NUMERIC_CODES
from gateway.connectors.iso8583.host import AcquirerHost, Later
from gateway.connectors.iso8583.identity import Identity, Original, identity_of, parse_original
from gateway.connectors.iso8583.specification import (
    AMOUNT_MINOR_MAX,
    Fields,
    MessageName,
    Specification,
    is_advice,
    repeat_mti,
)
from gateway.connectors.schemes import outcome_of
from gateway.domain.errors import Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Mode,
    OperationKind,
    Outcome,
    ResponseCode,
    Verdict,
)

NAME: Final = "iso8583"
K = OperationKind

_KINDS: Final[Mapping[OperationKind, MessageName]] = {
    K.AUTHORIZE: "authorize",
    K.CAPTURE: "capture",
    K.VOID: "void",
    K.REFUND: "refund",
    K.INCREMENT: "increment",
    K.VERIFY: "verify",
    K.REVERSAL: "reversal",
}
_TOLD: Final[Mapping[OperationKind, NotificationKind]] = {
    K.AUTHORIZE: NotificationKind.AUTHORIZATION,
    K.VERIFY: NotificationKind.AUTHORIZATION,
    K.CAPTURE: NotificationKind.CAPTURE,
    K.VOID: NotificationKind.VOID,
    K.REFUND: NotificationKind.REFUND,
    K.INCREMENT: NotificationKind.INCREMENT,
}
_REVERSAL: Final = "-reversal"
"""Ends what a reversal's own numbers are made of, so that they differ from the original's."""


def capabilities_of(
    specification: Specification, mode: Mode, answer_timeout_s: float | None = None
) -> Capabilities:
    """What a host can do, by the messages that its specification has."""
    messages = specification.messages
    methods = {CaptureMethod.AUTOMATIC} if "sale" in messages else set()
    if "capture" in messages:
        methods |= {CaptureMethod.MANUAL}
        methods |= {CaptureMethod.MANUAL_MULTIPLE} if "capture_more" in messages else set()
    return Capabilities(
        mode=mode,
        idempotent_by_reference=specification.repeats,
        key_validity_s=None,
        query_by_reference=False,
        cancel_by_reference=True,
        answer_timeout_s=answer_timeout_s or specification.answer_timeout_s,
        supported_fields=frozenset({"channel"} if specification.channels else ()),
        operations=frozenset(kind for kind, name in _KINDS.items() if name in messages),
        capture_methods=frozenset(methods),
        amounts={
            code: AmountRule(amount_minor_max=AMOUNT_MINOR_MAX) for code in specification.currencies
        },
    )


class _Sent(NamedTuple):
    """A request as it was sent."""

    request: ConnectorRequest
    fields: Fields
    identity: Identity


class Iso8583Connector(AccountConnector):
    """Messages of one terminal to its host.

    A request's numbers (STAN, RRN, transmission time) follow from its reference, so that whoever
    has the reference can reverse it. A reversal is a 0420, later the same as its repeat (0421), and
    recovery sends it until the host answers: ISO 8583 has no question about an earlier message. An
    answer that comes after its time, or says something else than the first, is told as a PSP's
    notification is: a fact, which settles the doubt where no reversal has begun, and is reversed or
    shown to a person where the operation has ended otherwise. A late answer to a reversal is only
    counted, since the same reversal is sent until it is answered in time.

    Where the connection is lost and the host takes repeats, or the message is an advice, the sender
    repeats once (0101 for 0100) within its window.
    """

    def __init__(
        self,
        host: AcquirerHost,
        capabilities: Capabilities,
        *,
        terminal: str,
        merchant: str,
        acquirer: str = "",
        tell: Callable[[Notification], None] | None = None,
    ) -> None:
        """`host` is the caller's to close; the next are DE 41, 42 and 32. `tell` keeps what is
        answered too late to be an answer.
        """
        super().__init__(NAME, capabilities)
        self._host = host
        self._specification = host.specification
        self._account = {"terminal": terminal, "merchant": merchant, "acquirer": acquirer}
        self._tell = tell

    # --- send -------------------------------------------------------------------------------------

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """A REVERSAL takes back what it names, as `cancel` does. Raises NotSent and MaybeSent."""
        self._check(request)
        if request.kind is K.REVERSAL:
            return await self._send_reversal(request, send_before)
        try:
            identity = identity_of(request.reference, self._specification.rrn_style)
            name = self._message_name(request)
            fields = self._build(name, request, identity, self._original(request))
        except ValueError:
            raise NotSent(Reason.INVALID_REQUEST) from None
        except KeyError:
            raise NotSent(Reason.OPERATION_NOT_SUPPORTED) from None
        sent = _Sent(request, fields, identity)
        later = None if self._tell is None else partial(self._answered_later, sent)
        return self._read(sent, await self._deliver(fields, send_before, later))

    async def _send_reversal(
        self, request: ConnectorRequest, send_before: float
    ) -> ConnectorAnswer:
        original = parse_original(request.target_transaction_id)
        if original is None and request.target_reference:
            original = self._derived(K.AUTHORIZE, request.target_reference, request)
        if original is None:
            raise NotSent(Reason.INVALID_REQUEST)
        answer = await self._reverse(
            original, request.target_reference, request, send_before, request.target_transaction_id
        )
        if answer.verdict is Verdict.CANCELED:
            answer.verdict = Verdict.APPROVED
        return answer

    def _check(self, request: ConnectorRequest) -> None:
        """Raises NotSent for what no message can carry."""
        if request.currency not in self._specification.currencies:
            raise NotSent(Reason.CURRENCY_NOT_SUPPORTED)
        if not 0 <= request.amount_minor <= AMOUNT_MINOR_MAX:
            raise NotSent(Reason.AMOUNT_NOT_SUPPORTED)

    def _message_name(self, request: ConnectorRequest) -> MessageName:
        """Raises KeyError where the host has no such message."""
        name = _KINDS[request.kind]
        if request.kind is K.AUTHORIZE and request.capture:
            name = "sale"
        elif request.kind is K.CAPTURE and not request.final:
            name = "capture_more"
        if name not in self._specification.messages:
            raise KeyError(name)
        return name

    def _original(self, request: ConnectorRequest) -> Original | None:
        """What a follow-up acts on. Raises ValueError where that is no transaction of ours."""
        if request.kind in (K.AUTHORIZE, K.VERIFY):
            return None
        original = parse_original(request.target_transaction_id)
        if original is None:
            raise ValueError("no transaction of this host")
        return original

    def _build(
        self,
        name: MessageName,
        request: ConnectorRequest,
        identity: Identity,
        original: Original | None,
        *,
        reference: str | None = None,
    ) -> Fields:
        """Raises ValueError."""
        channels = self._specification.channels
        channel = str(request.fields.get("channel", ""))
        told = {
            **self._account,
            "amount": f"{request.amount_minor:012}",
            "currency": NUMERIC_CODES[request.currency],
            "stan": identity.stan,
            "rrn": identity.rrn,
            "transmission_time": identity.time,
            "local_time": identity.local_time,
            "local_date": identity.local_date,
            "year": identity.year,
            "channel": channels.get(channel, channels.get("default", "")),
            "reference": request.reference if reference is None else reference,
            "payment": request.payment_id,
            "token": request.payment_method_token,
        }
        if original is not None:
            told |= {
                "original_mti": original.mti,
                "original_stan": original.stan,
                "original_time": original.time,
                "original_year": original.year or identity.year,
                "original_rrn": original.rrn,
                "original_auth_code": original.auth_code,
                "original_amount": f"{original.amount_minor:012}",
                "remaining_amount": f"{request.captured_minor if name == 'void' else 0:012}",
            }
        return self._specification.build(self._specification.messages[name], told)

    async def _deliver(
        self, fields: Fields, send_before: float, later: Later | None = None
    ) -> Fields:
        """Send, and once more where the class says so. Raises NotSent and MaybeSent."""
        until = self._in_time()
        try:
            return await self._host.exchange(
                fields,
                send_before=send_before,
                answer_timeout_s=self._capabilities.answer_timeout_s,
                later=later,
            )
        except MaybeSent as lost:
            repeats = self._specification.repeats or is_advice(fields["t"])
            if lost.reason is not Reason.CONNECTION_LOST or not repeats:
                raise
            return await self._repeat(fields, min(send_before, until), until, lost, later)

    async def _repeat(
        self,
        fields: Fields,
        send_before: float,
        until: float,
        lost: MaybeSent,
        later: Later | None,
    ) -> Fields:
        """Raises MaybeSent."""
        again = {**fields, "t": repeat_mti(fields["t"])}
        try:
            return await self._host.exchange(
                again,
                send_before=send_before,
                answer_timeout_s=max(0.0, until - time.monotonic()),
                later=later,
            )
        except NotSent:
            raise lost from None  # not the second time, but the first

    # --- query and cancel -------------------------------------------------------------------------

    async def _cancel(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer:
        """A reversal advice. What a void or a reversal released stays released."""
        if request is None or kind in (K.VOID, K.REVERSAL):
            return doubt()
        original = self._derived(kind, reference, request)
        if original is None:
            return doubt()
        return await self._reverse(original, reference, request, self._in_time(), str(original))

    def _derived(
        self, kind: OperationKind, reference: str, request: ConnectorRequest
    ) -> Original | None:
        """What the request with a reference looked like; None for one that was never sent."""
        try:
            identity = identity_of(reference, self._specification.rrn_style)
            attempt = ConnectorRequest(
                kind,
                reference,
                request.amount_minor,
                request.currency,
                request.connector_account_id,
                request.payment_id,
                capture=request.capture,
                final=request.final,
            )
            name = self._message_name(attempt)
        except (ValueError, KeyError):
            return None
        mti = self._specification.messages[name].mti
        known = parse_original(request.target_transaction_id) if kind in _NAMED_BY_ID else None
        if known is not None and known.stan == identity.stan:
            return known  # with the host's RRN and authorization code
        return Original(
            mti,
            identity.stan,
            identity.time,
            identity.rrn,
            request.amount_minor,
            year=identity.year,
        )

    async def _reverse(
        self,
        original: Original,
        reference: str,
        request: ConnectorRequest,
        send_before: float,
        transaction_id: str,
    ) -> ConnectorAnswer:
        """Verdict CANCELED, or REFERENCE_CANCELED where the original had no effect. Raises NotSent
        and MaybeSent.
        """
        try:
            identity = identity_of(
                (reference or request.reference) + _REVERSAL, self._specification.rrn_style
            )
            fields = self._build("reversal", request, identity, original, reference=reference)
        except (ValueError, KeyError):
            raise NotSent(Reason.INVALID_REQUEST) from None
        if request.is_repeat:
            fields["t"] = repeat_mti(fields["t"])
        code = (await self._deliver(fields, send_before)).get("39", "")
        rules = self._specification.reversal
        if code in self._specification.approved:
            return ConnectorAnswer(
                Delivery.ANSWERED, Verdict.CANCELED, connector_transaction_id=transaction_id
            )
        if code in rules.without_effect and rules.refuses_late_originals:
            return not_sent(Reason.REFERENCE_CANCELED)
        raise Unusable

    # --- answers ----------------------------------------------------------------------------------

    def _answered_later(self, sent: _Sent, told: Fields) -> None:
        """Tell of an answer that came after its time, or says something else than the first."""
        request = sent.request
        try:
            answer = self._read(sent, told)
        except Unusable:
            return
        assert self._tell is not None, "asked for by who tells"
        digest = blake2b(repr(sorted(told.items())).encode(), digest_size=8).hexdigest()
        self._tell(
            Notification(
                connector=NAME,
                # The same for the same answer, however often it comes.
                event_id=f"{told['t']}:{request.reference}:{digest}",
                event_type=told["t"],
                kind=_TOLD[request.kind],
                occurred_at=datetime.now(UTC),
                reference=request.reference,
                answer=answer,
                amount_minor=answer.outcome.amount_reported_minor if answer.outcome else None,
                currency=answer.currency,
            )
        )

    def _read(self, sent: _Sent, told: Fields) -> ConnectorAnswer:
        """What an answer says of a request. Raises Unusable."""
        specification, request = self._specification, sent.request
        code = values.text(told.get("39", ""))
        currency = ALPHABETIC_CODES.get(told.get("49", ""), "")
        if (
            not code
            or code in specification.uncertain
            or (told.get("49") and currency != request.currency)
            or specification.read(told, "reference") not in ("", request.reference)
        ):
            raise Unusable
        if code in specification.rejected:
            verdict = Verdict.FAILED
            response_code = ResponseCode.REJECTED_BY_CONNECTOR
        else:
            verdict = Verdict.APPROVED if code in specification.approved else Verdict.DECLINED
            response_code = specification.response_code(code)
        amount_minor = _amount(specification.read(told, "amount"))
        if code in specification.partially_approved and amount_minor is None:
            raise Unusable  # approved, and nobody knows how much
        if request.kind is K.AUTHORIZE and verdict is Verdict.APPROVED and amount_minor == 0:
            # Taken for a partial approval of nothing, it would be declined, and nothing reversed.
            raise Unusable
        rrn = told.get("37") or sent.fields.get("37", "")
        auth_code = values.text(specification.read(told, "auth_code"))
        original = Original(
            sent.fields["t"],
            sent.identity.stan,
            sent.identity.time,
            rrn,
            request.amount_minor,
            auth_code,
            sent.identity.year,
        )
        return ConnectorAnswer(
            delivery=Delivery.ANSWERED,
            verdict=verdict,
            outcome=self._outcome(told, code, response_code, amount_minor),
            connector_transaction_id=str(original),
            currency=currency,
        )

    def _outcome(
        self, told: Fields, code: str, response_code: ResponseCode, amount_minor: int | None
    ) -> Outcome:
        outcome = outcome_of(lambda name: self._specification.read(told, name))
        outcome.response_code = response_code
        outcome.connector_code = outcome.network_code = code
        outcome.network_code_scheme = self._specification.code_scheme
        outcome.retrieval_reference_number = values.text(told.get("37", ""))
        outcome.system_trace_audit_number = values.text(told.get("11", ""))
        outcome.amount_reported_minor = amount_minor
        return outcome


_NAMED_BY_ID: Final = frozenset({K.AUTHORIZE, K.VERIFY})
"""Kinds whose request, asked about or cancelled, names its own transaction id."""


_AMOUNT: Final = re.compile(r"0*([0-9]{1,16})")


def _amount(text: str) -> int | None:
    """None for what no amount can be: an element may be longer than DE 4."""
    match = _AMOUNT.fullmatch(text)
    return None if match is None else values.amount(int(match[1]))
