"""The connector to the simulator: the port's promises over the simulator's HTTP interface."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote

import orjson

from gateway.application.ports import (
    CARD,
    NETWORK_TOKEN,
    Capabilities,
    ConnectorRequest,
    MethodRule,
)
from gateway.connectors import values
from gateway.connectors.base import AccountConnector, Unusable, doubt, not_sent
from gateway.connectors.http import HttpClient, Limits, MaybeSent, NotSent, Response
from gateway.connectors.kinds import narrowed
from gateway.connectors.schemes import ISO8583_CODES, outcome_of
from gateway.connectors.simulator.profiles import FIELDS, Profile
from gateway.domain.errors import Reason
from gateway.domain.model import (
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Mode,
    NextAction,
    OperationKind,
    Outcome,
    QrCode,
    ResponseCode,
    Verdict,
)

ANSWER_TIMEOUT_S: Final = 10.0
SUPPORTED_FIELDS: Final = FIELDS | {
    "payment_method.token",
    "payment_method.network_token",
    "payment_method.redirect",
    "metadata",
}
_AT_ONCE: Final = frozenset({CaptureMethod.AUTOMATIC})
METHODS: Final[Mapping[str, MethodRule]] = {
    CARD: MethodRule(),
    NETWORK_TOKEN: MethodRule(),
    "bancontact": MethodRule(_AT_ONCE, frozenset({"EUR"}), frozenset({"BE"})),
    "ideal": MethodRule(_AT_ONCE, frozenset({"EUR"}), frozenset({"NL"})),
    "p24": MethodRule(
        _AT_ONCE, frozenset({"EUR", "PLN"}), frozenset({"PL"}), frozenset({"customer_email"})
    ),
    "pix": MethodRule(_AT_ONCE, frozenset({"BRL"}), frozenset({"BR"})),
}

# Handled elsewhere in a request to the PSP, or kept by the gateway.
_NOT_FORWARDED: Final = frozenset(
    {
        "merchant_id",
        "idempotency_key",
        "amount",
        "capture_method",
        "payment_method",
        "metadata",
    }
)

_VERDICTS: Final = {
    "approved": Verdict.APPROVED,
    "declined": Verdict.DECLINED,
    "pending": Verdict.PENDING,
    "requires_action": Verdict.REQUIRES_ACTION,
    "rejected": Verdict.FAILED,
    "failed": Verdict.FAILED,
    "canceled": Verdict.CANCELED,
    "expired": Verdict.EXPIRED,
    "refused": Verdict.CANCELED,
}
_ACCEPTED: Final = frozenset({Verdict.APPROVED, Verdict.PENDING, Verdict.REQUIRES_ACTION})


class ProfileMismatch(Exception):
    """The simulator runs another profile than the one that the settings declare."""


class SimulatorConnector(AccountConnector):
    """Requests to one simulator.

    A request is written once, with one exception: where the PSP is idempotent, the connection is
    lost or the status is 5xx, the same request goes out once more with the same reference, if there
    is time left of `answer_timeout_s`, before `send_before`, and within half of the key's validity
    (the other half is for the way there). The answer to it then counts.
    """

    def __init__(
        self,
        url: str,
        profile: Profile,
        *,
        name: str = "simulator",
        mode: Mode = Mode.TEST,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        limits: Limits | None = None,
        more_headers: Callable[[], str] | None = None,
        token: str = "",
        told: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """Connects to nothing yet. Raises ValueError for a URL that is not http://host[:port].

        `limits` and `more_headers` are those of HttpClient; `token` is sent in the place of every
        payment's, where it is given; `told` narrows the capabilities, as `narrowed` says.
        """
        self._http = HttpClient(url, limits, more_headers)
        self._url = url.rstrip("/")
        self._profile = profile
        self._token = token
        usual = Capabilities(
            mode=mode,
            idempotent_by_reference=profile.idempotent_by_reference,
            key_validity_s=profile.key_validity_s,
            query_by_reference=profile.query_by_reference,
            cancel_by_reference=profile.cancel_by_reference,
            answer_timeout_s=answer_timeout_s,
            supported_fields=SUPPORTED_FIELDS,
            methods=METHODS,
        )
        super().__init__(name, narrowed(usual, usual, told))

    async def check(self) -> bool:
        """Whether the simulator is there; raises ProfileMismatch where it is another one."""
        try:
            response = await self._ask("GET", "/v1/profile")
        except (NotSent, MaybeSent):
            return False
        told = values.json_object(response.body)
        if response.status != 200 or not told:
            return False
        if told.get("profile") != self._profile.name:
            raise ProfileMismatch(
                f"the simulator runs the profile {told.get('profile')!r}, "
                f"the settings say {self._profile.name!r}"
            )
        return True

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Raises NotSent and MaybeSent."""
        kind = request.kind.name.lower()
        if self._token:
            request = replace(request, payment_method_token=self._token)
        fields = {
            name: value
            for name, value in request.fields.items()
            if name not in _NOT_FORWARDED and value
        }
        if not fields.keys() <= FIELDS:
            raise NotSent(Reason.FIELD_NOT_SUPPORTED)
        try:
            body = _encode(kind, request, fields)
        except TypeError:  # not JSON: the request cannot be sent as it is
            raise NotSent(Reason.INVALID_REQUEST) from None
        response = await self._deliver(f"/v1/operations/{kind}", body, send_before)
        told = _envelope(response, kind, request.reference)
        if told is None or told.get("currency", request.currency) != request.currency:
            raise Unusable
        return _answered(told, self._url)

    async def _query(
        self,
        kind: OperationKind,
        reference: str,
        request: ConnectorRequest | None,  # noqa: ARG002 - the reference is enough
    ) -> ConnectorAnswer | None:
        """The reference is enough. Where the PSP charged it several times, the answer is about the
        first charge and reports the sum of them.
        """
        if not self._capabilities.query_by_reference:
            raise Unusable
        name = kind.name.lower()
        response = await self._ask("GET", f"/v1/operations/{name}/{quote(reference, safe='')}")
        if response.status == 404:
            known = {"result": "not_found", "reference": reference, "kind": name}
            return None if values.json_object(response.body) == known else doubt()
        told = _envelope(response, name, reference)
        return doubt() if told is None else _found(told, self._url)

    async def _cancel(
        self,
        kind: OperationKind,
        reference: str,
        request: ConnectorRequest | None,  # noqa: ARG002 - the reference is enough
    ) -> ConnectorAnswer:
        """See `cancel`."""
        if not self._capabilities.cancel_by_reference:
            raise Unusable
        name = kind.name.lower()
        target = f"/v1/operations/{name}/{quote(reference, safe='')}/cancel"
        response = await self._ask("POST", target)
        told = _envelope(response, name, reference)
        if told is not None and told.get("code") == "cancel_refused":
            # It stands, and the PSP says how.
            told = _checked(told.get("standing"), name, reference)
            told = told if told is not None and told["result"] == "approved" else None
        return doubt() if told is None else _found(told, self._url)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _ask(self, method: str, target: str) -> Response:
        return await self._http.request(
            method,
            target,
            send_before=self._in_time(),
            answer_timeout_s=self._capabilities.answer_timeout_s,
        )

    async def _deliver(self, target: str, body: bytes, send_before: float) -> Response:
        """Send, and once more where the class says so; raises NotSent and MaybeSent."""
        began = time.monotonic()
        lost: MaybeSent | None = None
        response: Response | None = None
        try:
            response = await self._http.request(
                "POST",
                target,
                body,
                send_before=send_before,
                answer_timeout_s=self._capabilities.answer_timeout_s,
            )
        except MaybeSent as error:
            lost = error
        again_before = self._again_before(began, send_before)
        failed = response.status >= 500 if response is not None else _is_lost(lost)
        if failed and time.monotonic() < again_before:
            try:
                return await self._http.request(
                    "POST",
                    target,
                    body,
                    send_before=again_before,
                    answer_timeout_s=self._capabilities.answer_timeout_s,
                    answer_before=began + self._capabilities.answer_timeout_s,
                )
            except NotSent:
                pass  # not the second time, but the first
        if response is None:
            raise lost or MaybeSent(Reason.ANSWER_UNUSABLE)
        return response

    def _again_before(self, began: float, send_before: float) -> float:
        """Until when the same request may be written a second time; monotonic."""
        if not self._capabilities.idempotent_by_reference:
            return -math.inf
        validity_s = self._capabilities.key_validity_s
        return min(
            send_before,
            began + self._capabilities.answer_timeout_s,
            math.inf if validity_s is None else began + validity_s / 2,
        )


def _is_lost(error: MaybeSent | None) -> bool:
    return error is not None and error.reason is Reason.CONNECTION_LOST


def _encode(kind: str, request: ConnectorRequest, fields: dict[str, object]) -> bytes:
    body: dict[str, object] = {
        "reference": request.reference,
        "amount_minor": request.amount_minor,
        "currency": request.currency,
        "account": request.connector_account_id,
        "payment_id": request.payment_id,
    }
    if kind in ("authorize", "verify"):
        body |= {"token": request.payment_method_token, "capture": request.capture}
        body["fields"] = fields
        method = request.fields.get("payment_method")
        if isinstance(method, dict) and "redirect" in method:
            body["method"] = method["redirect"].get("method_type")
        elif isinstance(method, dict) and "network_token" in method:
            body["network_token"] = method["network_token"] | request.secrets
    else:
        body |= {
            "final": request.final,
            "target_transaction_id": request.target_transaction_id,
            "target_reference": request.target_reference,
        }
    return orjson.dumps(body)


# --- answers --------------------------------------------------------------------------------------


def _envelope(response: Response, kind: str, reference: str) -> dict[str, Any] | None:
    """The PSP's answer to this very request; None for anything else, as a proxy's error page."""
    return (
        _checked(values.json_object(response.body), kind, reference)
        if response.status == 200
        else None
    )


def _checked(told: object, kind: str, reference: str) -> dict[str, Any] | None:
    """What the PSP says of this reference, where it says something that can be used."""
    if not isinstance(told, dict) or told.get("reference") != reference or told.get("kind") != kind:
        return None
    result = told.get("result")
    verdict = _VERDICTS.get(result) if isinstance(result, str) else None
    if verdict is None:
        return None
    if verdict in _ACCEPTED and not (
        _amount(told) is not None
        and isinstance(told.get("currency"), str)
        and _transaction_id(told)
    ):
        return None
    return told


def operation_of(told: Mapping[str, Any]) -> ConnectorAnswer | None:
    """What the simulator says of an operation of its own accord; None where it says nothing that
    can be used.
    """
    checked = _checked(told, str(told.get("kind")), str(told.get("reference")))
    return None if checked is None else _answered(checked)


def _found(told: dict[str, Any], url: str = "") -> ConnectorAnswer:
    """What a query or a cancellation says; `url` is the simulator's."""
    if told["result"] == "canceled" and told.get("had") == "nothing":
        return not_sent(Reason.REFERENCE_CANCELED)
    if told["result"] == "approved":
        listed = told.get("transactions")
        charges = [
            charge
            for charge in (listed if isinstance(listed, list) else ())
            if isinstance(charge, dict) and charge.get("result") == "approved"
        ]
        amounts = [_amount(charge) for charge in charges]
        known = [amount for amount in amounts if amount is not None]
        if len(known) < len(amounts) or any(
            charge.get("currency") != told["currency"] for charge in charges
        ):
            return doubt()
        if len(known) > 1:
            told = {**told, "amount_minor": sum(known)}
    return _answered(told, url)


def _answered(told: dict[str, Any], url: str = "") -> ConnectorAnswer:
    return ConnectorAnswer(
        delivery=Delivery.ANSWERED,
        verdict=_VERDICTS[told["result"]],
        outcome=_outcome(told),
        connector_transaction_id=_transaction_id(told),
        currency=_text(told, "currency", 3),
        processing_ms=_duration(told.get("processing_ms")),
        next_action=_next_action(told, url),
        authorization_expires_at=values.instant(told.get("expires_at")),
    )


def _next_action(told: dict[str, Any], url: str) -> NextAction | None:
    """A page of the simulator's is where the simulator is."""
    elsewhere = values.https_url(told.get("next_action_url"))
    if elsewhere:
        return NextAction(redirect_url=elsewhere)
    path = told.get("next_action_path")
    if (
        told["result"] != "requires_action"
        or not isinstance(path, str)
        or len(path) > values.IDENTIFIER_LENGTH_MAX
        or not path.isprintable()
    ):
        return None
    page, expires_at = url + path, values.instant(told.get("next_action_expires_at"))
    if told.get("next_action_kind") == "qr_code":
        return NextAction(qr_code=QrCode(data=page, page_url=page), expires_at=expires_at)
    return NextAction(redirect_url=page, expires_at=expires_at)


def _outcome(told: dict[str, Any]) -> Outcome:
    outcome = outcome_of(told.get)
    outcome.response_code = _response_code(told)
    outcome.connector_code = _text(told, "code")
    outcome.network_code = _text(told, "network_code")
    outcome.network_code_scheme = _text(told, "network_code_scheme")
    outcome.retrieval_reference_number = _text(told, "rrn")
    outcome.system_trace_audit_number = _text(told, "stan")
    outcome.acquirer_reference_number = _text(told, "arn")
    outcome.amount_reported_minor = _amount(told)
    return outcome


def _response_code(told: dict[str, Any]) -> ResponseCode:
    match told["result"]:
        case "refused":
            return ResponseCode.REFERENCE_CANCELED
        case "rejected":
            return ResponseCode.REJECTED_BY_CONNECTOR
        case "pending" | "requires_action" | "canceled" | "expired":
            return ResponseCode.UNSPECIFIED
        case _:
            pass
    if told.get("code") == "invalid_payment_method":
        return ResponseCode.INVALID_PAYMENT_METHOD
    return ISO8583_CODES.get(_text(told, "network_code"), ResponseCode.DECLINED_OTHER)


def _amount(told: Mapping[str, Any]) -> int | None:
    return values.amount(told.get("amount_minor"))


def _text(told: Mapping[str, Any], name: str, length_max: int = values.CODE_LENGTH_MAX) -> str:
    return values.text(told.get(name), length_max)


def _transaction_id(told: Mapping[str, Any]) -> str:
    return values.identifier(told.get("transaction_id"))


def _duration(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None
