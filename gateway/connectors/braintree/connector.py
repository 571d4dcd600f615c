"""The connector to one Braintree account, over the GraphQL API.

Source of the rules: Braintree's published schema, its GraphQL reference and guides, named where a
rule is used.
"""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.application.ports import Capabilities, ConnectorRequest
from gateway.connectors.base import (
    MOTO_CHANNELS,
    REPEAT_PAUSE_S,
    HttpConnector,
    Unusable,
    asking_first,
    doubt,
    in_steps,
    sendable,
    target_of,
)
from gateway.connectors.braintree import answers, documents
from gateway.connectors.braintree.amounts import RULES, to_braintree
from gateway.connectors.braintree.answers import Answered
from gateway.connectors.http import HttpClient, MaybeSent, NotSent, Response
from gateway.connectors.repeats import of_several
from gateway.connectors.values import part
from gateway.domain.errors import Reason
from gateway.domain.model import (
    SENT_KINDS,
    CaptureMethod,
    ConnectorAnswer,
    Delivery,
    Mode,
    OperationKind,
    Verdict,
)

API_VERSION: Final = "2026-01-01"
"""`Braintree-Version`: the API as it was on this day ("Making API calls")."""
PATH: Final = "/graphql"
ANSWER_TIMEOUT_S: Final = 60.0
"""As long as Braintree itself works on a request at most ("Exceptions", time-outs)."""
KEY_VALIDITY_S: Final = 30 * 24 * 3600.0
"""For how long an `apiRequestKey` is remembered (the schema, "At-Most-Once Processing")."""
SEARCH_LENGTH_MAX: Final = 50
"""Transactions with one reference that are looked at: more than one is a duplicate already."""
TOKEN_PREFIX: Final = "tok_"  # noqa: S105 - no secret
"""A token of the contract is this and the id of a payment method at Braintree."""
REFUND_SUFFIX: Final = "-refund"
"""After our reference in the order ID of a refund. One that is made in Braintree's Control Panel
has the order ID of what it is a refund of."""
REVERSAL_SUFFIX: Final = "-reversal"
"""The same of a refund that is part of a REVERSAL."""
NAME: Final = "braintree"

K = OperationKind

SUPPORTED_FIELDS: Final = frozenset(
    {"payment_method.stored", "channel", "initiator", "stored_credential"}
)
_DOCUMENTS: Final = {
    "authorizePaymentMethod": documents.AUTHORIZE,
    "chargePaymentMethod": documents.CHARGE,
    "authorizeCreditCard": documents.AUTHORIZE_CARD,
    "chargeCreditCard": documents.CHARGE_CARD,
}
_SERIES: Final = {
    "MIT_CATEGORY_RECURRING": "RECURRING",
    "MIT_CATEGORY_INSTALLMENT": "INSTALLMENT",
}


def widest(mode: Mode, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> Capabilities:
    """The most that an account can do.

    No reference can be made unusable (docs/decisions/0012-…). INCREMENT is left out: a changed
    amount carries no reference, so that nothing would tell whose change it was.
    """
    return Capabilities(
        mode=mode,
        idempotent_by_reference=True,
        key_validity_s=KEY_VALIDITY_S,
        query_by_reference=True,
        cancel_by_reference=False,
        answer_timeout_s=answer_timeout_s,
        supported_fields=SUPPORTED_FIELDS,
        operations=SENT_KINDS - {K.INCREMENT},
        amounts=RULES,
    )


@dataclass(frozen=True, slots=True)
class _Call:
    document: str
    field: str
    """The mutation."""
    result: str
    """The field of its payload that holds what it made or changed."""
    input: Mapping[str, Any]
    repeatable: bool = True
    """Whether a second one has no effect: it has a key, or is a void."""


class BraintreeConnector(HttpConnector):
    """Transactions, refunds and verifications of one account.

    Our reference is the `apiRequestKey` of a request and the order ID of what it makes or changes.
    What makes an outcome definite:

    - An answer that holds the object, or a refusal of the first sending.
    - A repeat of the same input with the same key within 30 days: Braintree answers with the object
      that the first one made, as it is now. The sender repeats once, within its send window. A
      refusal of the repeat says nothing of the first.
    - The object: a capture, a refund and a void are read from the Transaction itself.
    - A search by order ID, for an authorization. How far it lags is not documented.

    Nothing proves an absence: a key is used up by a success alone, and nothing without effect
    succeeds. So a doubt whose effect is not found stays one, until it is or a person decides.
    """

    def __init__(
        self,
        http: HttpClient,
        public_key: str,
        private_key: str,
        merchant_accounts: Mapping[str, str],
        capabilities: Capabilities,
        *,
        repeat_pause_s: float = REPEAT_PAUSE_S,
    ) -> None:
        """`http` is the caller's to close; `merchant_accounts` are the ids by currency."""
        token = b64encode(f"{public_key}:{private_key}".encode("ascii")).decode("ascii")
        headers = {
            "Authorization": f"Basic {token}",
            "Braintree-Version": API_VERSION,
            "Accept": "application/json",
        }
        super().__init__(NAME, http, capabilities, headers, repeat_pause_s=repeat_pause_s)
        self._merchant_accounts = merchant_accounts

    # --- send -------------------------------------------------------------------------------------

    async def _send(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Raises NotSent and MaybeSent."""
        if request.kind is K.REVERSAL:
            return await self._reverse(request, send_before)
        call = await self._prepare(request, send_before)
        if isinstance(call, ConnectorAnswer):
            return call
        answered, definite = await self._deliver(call, send_before)
        if definite and answered.is_limited:
            raise NotSent(Reason.CONNECTOR_RATE_LIMITED)
        try:
            return await self._answer(request, call, answered, definite=definite)
        except (NotSent, MaybeSent):
            raise Unusable from None  # the question about it, not the request itself

    async def _prepare(
        self, request: ConnectorRequest, send_before: float
    ) -> _Call | ConnectorAnswer:
        """What to send; an answer, where that is known to be done. Raises NotSent."""
        several = CaptureMethod.MANUAL_MULTIPLE in self._capabilities.capture_methods
        match request.kind:
            case K.AUTHORIZE:
                return self._authorize(request)
            case K.VERIFY:
                return _verify(request, self._merchant_account(request.currency))
            case K.CAPTURE:
                # Captures that are parts are transactions of their own, the last one too.
                parted = several and (
                    not request.final or bool(await self._parts(request, send_before))
                )
                return _capture(request, parted=parted)
            case K.VOID:
                return _void(target_of(request), request.reference)
            case K.REFUND:
                parts = await self._parts(request, send_before) if several else []
                if not parts:
                    return _refund_from(request, target_of(request))
                with asking_first():
                    return _refund_part(request, parts)
            case _:
                raise NotSent(Reason.OPERATION_NOT_SUPPORTED)

    async def _parts(
        self, request: ConnectorRequest, send_before: float
    ) -> list[Mapping[str, Any]]:
        """The partial captures of what a request acts on. Raises NotSent."""
        with asking_first():
            return answers.children(await self._transaction(target_of(request), send_before))

    def _authorize(self, request: ConnectorRequest) -> _Call:
        transaction = {
            "amount": _amount(request),
            "merchantAccountId": self._merchant_account(request.currency),
            "orderId": request.reference,
        }
        initiator = _initiator(request.fields)
        if initiator:
            transaction["paymentInitiator"] = initiator
        input_: dict[str, Any] = {
            "clientMutationId": request.reference,
            "apiRequestKey": request.reference,
            "paymentMethodId": _payment_method(request),
            "transaction": transaction,
        }
        vault = _external_vault(request)
        if vault:
            input_["options"] = {"externalVault": vault}
        mutation = ("charge" if request.capture else "authorize") + (
            "CreditCard" if vault else "PaymentMethod"
        )
        return _Call(_DOCUMENTS[mutation], mutation, "transaction", input_)

    def _merchant_account(self, currency: str) -> str:
        """A merchant account has one currency, which amounts do not tell. Raises NotSent."""
        merchant_account = self._merchant_accounts.get(currency)
        if merchant_account is None:
            raise NotSent(Reason.CURRENCY_NOT_SUPPORTED)
        return merchant_account

    async def _deliver(self, call: _Call, send_before: float) -> tuple[Answered, bool]:
        """Send, and once more where the class says so; whether a refusal is definite.

        Raises NotSent and MaybeSent.
        """
        seen: list[Answered] = []

        async def post(send_before: float, answer_before: float) -> Response:
            response = await self._mutate(call, send_before, answer_before)
            seen.append(answers.read(response, call.field))
            return response

        def is_uncertain(response: Response) -> bool:
            answered = answers.read(response, call.field)
            return not (answered.told or (answered.is_refusal and not answered.is_limited))

        if not call.repeatable:
            return answers.read(await post(send_before, self._in_time()), call.field), True
        response, repeated = await self._request_and_repeat(
            post, send_before, is_uncertain=is_uncertain
        )
        first_refused = len(seen) > 1 and seen[0].is_refusal
        return answers.read(response, call.field), not repeated or first_refused

    async def _answer(
        self, request: ConnectorRequest, call: _Call, answered: Answered, *, definite: bool
    ) -> ConnectorAnswer:
        """What an answer says of a request. Raises NotSent, MaybeSent and Unusable."""
        if answered.told:
            answer = await self._done(request, call, answered.told)
            if answer.currency not in ("", request.currency):
                raise Unusable
            return answer
        if request.kind is K.VOID and answered.is_refusal:
            # It may have been voided before, by an earlier sending for one.
            done = answers.void(await self._transaction(target_of(request)))
            if done is not None:
                return done
        if not definite or not answered.is_refusal:
            # It refuses this sending, and tells nothing of the one before.
            raise Unusable
        return answers.rejected(answered)

    async def _done(
        self, request: ConnectorRequest, call: _Call, payload: Mapping[str, Any]
    ) -> ConnectorAnswer:
        """What a payload says of the request that it answers. Raises as `_answer`."""
        told = part(payload, call.result)
        if payload.get("clientMutationId") != request.reference or not told:
            raise Unusable
        answer: ConnectorAnswer | None
        match request.kind:
            case K.VERIFY:
                return answers.verification(told)
            case K.VOID:
                answer = answers.void(told) if told.get("id") == target_of(request) else None
            case K.AUTHORIZE:
                _expect(told.get("orderId") == request.reference)
                first = answers.duplicate_of(told)
                if first is not None:
                    # Of an earlier sending: nothing else has this order ID.
                    _expect(first.get("orderId") == request.reference)
                    told = await self._transaction(str(first.get("id")))
                answer = answers.authorization(told, captured=request.capture)
            case K.CAPTURE:
                parent = part(part(told, "partialCaptureDetails"), "parentAuthorization")
                _expect(target_of(request) == (parent or told).get("id"))
                answer = answers.capture(told, request.reference)
            case _:  # REFUND
                of = part(told, "refundedTransaction").get("id")
                _expect(told.get("orderId") == f"{request.reference}{REFUND_SUFFIX}")
                _expect(of == call.input["transactionId"])
                answer = answers.refund(told)
        if answer is None:
            raise Unusable
        return answer

    # --- query ------------------------------------------------------------------------------------

    async def _query(
        self, kind: OperationKind, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        """None where Braintree knows of no such effect, or does not yet."""
        if kind is K.AUTHORIZE:
            return await self._query_authorization(reference, request)
        if kind is K.REVERSAL and request is not None:
            targets = await self._targets(request)
            stands = any(_stands(each) for each in targets)
            return None if stands or not targets else _reversed(targets[0])
        if request is not None and request.target_transaction_id:
            return await self._query_known(kind, reference, request)
        # A verification has no reference at Braintree.
        return None if kind is K.VERIFY else doubt()

    async def _query_known(
        self, kind: OperationKind, reference: str, request: ConnectorRequest
    ) -> ConnectorAnswer | None:
        """By the objects that are acted on, which are read as they are."""
        if kind is K.VERIFY:
            id_ = target_of(request)
            read = await self._ask(documents.VERIFICATION, {"id": id_}, "node")
            _expect(read.get("__typename") == "Verification" and read.get("id") == id_)
            return answers.verification(read)
        transaction = await self._transaction(target_of(request))
        match kind:
            case K.CAPTURE:
                return answers.capture(transaction, reference)
            case K.REFUND:
                for each in (transaction, *answers.children(transaction)):
                    found = _refund_of(each, reference)
                    if found is not None:
                        return found
                return None
            case _:  # VOID
                return answers.void(transaction)

    async def _query_authorization(
        self, reference: str, request: ConnectorRequest | None
    ) -> ConnectorAnswer | None:
        captured = None if request is None else request.capture
        if request is not None and request.target_transaction_id:
            transaction = await self._transaction(target_of(request))
            return answers.authorization(transaction, captured=captured)
        found = await self._search(reference)
        return of_several([answers.authorization(each, captured=captured) for each in found])

    async def _search(
        self, reference: str, answer_before: float | None = None
    ) -> list[Mapping[str, Any]]:
        """The Transactions with a reference, as far as the search knows them; not those that were
        rejected as duplicates of one.
        """
        found = await self._ask(
            documents.SEARCH,
            {"input": {"orderId": {"is": reference}}, "first": SEARCH_LENGTH_MAX},
            "search",
            answer_before=answer_before,
        )
        connection = part(found, "transactions")
        _expect(part(connection, "pageInfo").get("hasNextPage") is False)
        nodes = [part(edge, "node") for edge in answers.parts(connection, "edges")]
        return [
            node
            for node in nodes
            if node.get("orderId") == reference and answers.duplicate_of(node) is None
        ]

    # --- reversals --------------------------------------------------------------------------------

    async def _reverse(self, request: ConnectorRequest, send_before: float) -> ConnectorAnswer:
        """Take back all that stands of a Transaction, or of those that have a reference."""
        with asking_first():
            targets = await self._targets(request, send_before)
        if not targets:
            return doubt(Reason.RECOVERED)
        with in_steps():
            for target in targets:
                if _stands(target):
                    await self._take_back(target, request.reference)
        return _reversed(targets[0])

    async def _targets(
        self, request: ConnectorRequest, send_before: float | None = None
    ) -> list[Mapping[str, Any]]:
        """What a REVERSAL is of, each partial capture by itself and before its authorization."""
        if request.target_transaction_id:
            found = [await self._transaction(target_of(request), send_before)]
        else:
            found = await self._search(request.target_reference, send_before)
        return [target for each in found for target in (*answers.children(each), each)]

    async def _take_back(self, target: Mapping[str, Any], reference: str) -> None:
        """Nothing of a Transaction stands afterwards. Raises NotSent, MaybeSent, Unusable."""
        target_id = str(target.get("id"))
        left_minor = answers.minor(target) - answers.refunded_minor(target)
        voidable = answers.status_of(target) in answers.VOIDABLE
        if voidable:
            call = _void(target_id, reference)
        else:
            amount = to_braintree(left_minor, answers.currency_of(target))
            call = _refund(
                target_id,
                amount or "",
                reference=reference,
                key=f"{reference}-{left_minor}-{target_id}",
                order_id=f"{reference}{REVERSAL_SUFFIX}",
            )
        answered = answers.read(await self._mutate(call), call.field)
        made = part(answered.told, call.result)
        if voidable:
            _expect(made.get("id") == target_id and answers.status_of(made) == "VOIDED")
        else:
            _expect(part(made, "refundedTransaction").get("id") == target_id)
            _expect(not answers.is_gone(made) and answers.minor(made) == left_minor)

    # --- HTTP -------------------------------------------------------------------------------------

    async def _transaction(
        self, transaction_id: str, answer_before: float | None = None
    ) -> Mapping[str, Any]:
        """A Transaction as it is now. Raises NotSent, MaybeSent, Unusable."""
        read = await self._ask(
            documents.TRANSACTION, {"id": transaction_id}, "node", answer_before=answer_before
        )
        _expect(read.get("__typename") == "Transaction" and read.get("id") == transaction_id)
        return read

    async def _ask(
        self,
        document: str,
        variables: Mapping[str, Any],
        field: str,
        *,
        answer_before: float | None = None,
    ) -> Mapping[str, Any]:
        """The field of a query's answer. Raises NotSent, MaybeSent, Unusable."""
        until = self._in_time()
        if answer_before is not None:
            until = min(until, answer_before)
        told = answers.read(await self._execute(document, variables, until, until), field).told
        if not told:
            raise Unusable
        return told

    async def _mutate(
        self, call: _Call, send_before: float | None = None, answer_before: float | None = None
    ) -> Response:
        """Send a mutation. Raises NotSent and MaybeSent."""
        return await self._execute(call.document, {"input": call.input}, send_before, answer_before)

    async def _execute(
        self,
        document: str,
        variables: Mapping[str, Any],
        send_before: float | None,
        answer_before: float | None,
    ) -> Response:
        return await self._request(
            "POST",
            PATH,
            orjson.dumps({"query": document, "variables": variables}),
            send_before=send_before,
            answer_before=answer_before,
        )


def _expect(holds: bool) -> None:
    """Raises Unusable for an answer that is about something else."""
    if not holds:
        raise Unusable


def _amount(request: ConnectorRequest) -> str:
    """As decimal text. Raises NotSent."""
    return sendable(to_braintree(request.amount_minor, request.currency), request.currency, RULES)


def _payment_method(request: ConnectorRequest) -> str:
    """The id of a single-use or of a stored payment method. Raises NotSent."""
    method = request.fields.get("payment_method")
    stored = method.get("stored") if isinstance(method, dict) else None
    if isinstance(stored, dict) and stored.get("stored_payment_method_id"):
        return str(stored["stored_payment_method_id"])
    token = request.payment_method_token.removeprefix(TOKEN_PREFIX)
    if not token:
        raise NotSent(Reason.FIELD_NOT_SUPPORTED)
    return token


def _initiator(fields: Mapping[str, object]) -> str:
    """`paymentInitiator`; empty for an ordinary payment of the customer."""
    if fields.get("channel") in MOTO_CHANNELS:
        return "MOTO"
    stored = fields.get("stored_credential")
    told = stored if isinstance(stored, dict) else {}
    series = _SERIES.get(str(told.get("mit_category")), "")
    if fields.get("initiator") == "INITIATOR_MERCHANT":
        return series or "UNSCHEDULED"
    is_first = told.get("usage") == "STORED_CREDENTIAL_USAGE_FIRST"
    return f"{series}_FIRST" if series and is_first else ""


def _external_vault(request: ConnectorRequest) -> dict[str, str]:
    """A token is used once: what is stored of it is stored elsewhere than in Braintree's vault,
    which knows of its own what was stored in it. Empty where nothing is
    (`TransactionExternalVaultOptionsInput`).
    """
    stored = request.fields.get("stored_credential")
    if not isinstance(stored, dict) or not request.payment_method_token:
        return {}
    if stored.get("usage") == "STORED_CREDENTIAL_USAGE_FIRST":
        return {"status": "WILL_VAULT"}
    vault = {"status": "VAULTED"}
    network_id = stored.get("network_transaction_id")
    if network_id and request.fields.get("initiator") == "INITIATOR_MERCHANT":
        vault["verifyingNetworkTransactionId"] = str(network_id)
    return vault


def _verify(request: ConnectorRequest, merchant_account: str) -> _Call:
    return _Call(
        documents.VERIFY,
        "verifyPaymentMethod",
        "verification",
        {
            "clientMutationId": request.reference,
            "paymentMethodId": _payment_method(request),
            "merchantAccountId": merchant_account,
        },
        repeatable=False,
    )


def _capture(request: ConnectorRequest, *, parted: bool) -> _Call:
    transaction: dict[str, Any] = {"amount": _amount(request), "orderId": request.reference}
    if parted:
        transaction["finalCapture"] = request.final
    return _Call(
        documents.PARTIAL_CAPTURE if parted else documents.CAPTURE,
        "partialCaptureTransaction" if parted else "captureTransaction",
        "capture" if parted else "transaction",
        {
            "clientMutationId": request.reference,
            "apiRequestKey": request.reference,
            "transactionId": target_of(request),
            "transaction": transaction,
        },
    )


def _void(transaction_id: str, reference: str) -> _Call:
    """It has no key, and needs none: a second one is refused, and the Transaction tells why."""
    return _Call(
        documents.VOID,
        "voidTransaction",
        "transaction",
        {"clientMutationId": reference, "transactionId": transaction_id},
    )


def _refund(transaction_id: str, amount: str, *, reference: str, key: str, order_id: str) -> _Call:
    return _Call(
        documents.REFUND,
        "refundTransaction",
        "refund",
        {
            "clientMutationId": reference,
            "apiRequestKey": key,
            "transactionId": transaction_id,
            "refund": {"amount": amount, "orderId": order_id},
        },
    )


def _refund_from(request: ConnectorRequest, transaction_id: str) -> _Call:
    """A REFUND, of a Transaction. Raises NotSent."""
    return _refund(
        transaction_id,
        _amount(request),
        reference=request.reference,
        key=request.reference,
        order_id=f"{request.reference}{REFUND_SUFFIX}",
    )


def _refund_part(
    request: ConnectorRequest, captures: list[Mapping[str, Any]]
) -> _Call | ConnectorAnswer:
    """A refund of an authorization that was captured in parts is one of the first part that has
    enough left. Raises NotSent where none has, and Unusable.
    """
    for capture in captures:
        done = _refund_of(capture, request.reference)
        if done is not None:
            return done
    for capture in captures:
        left_minor = answers.minor(capture) - answers.refunded_minor(capture)
        if not answers.is_gone(capture) and left_minor >= request.amount_minor:
            return _refund_from(request, str(capture.get("id")))
    raise NotSent(Reason.AMOUNT_NOT_SUPPORTED)


def _refund_of(transaction: Mapping[str, Any], reference: str) -> ConnectorAnswer | None:
    """The refund of a Transaction that has a reference."""
    for told in answers.parts(transaction, "refunds"):
        if told.get("orderId") == f"{reference}{REFUND_SUFFIX}":
            return answers.refund(told)
    return None


def _stands(transaction: Mapping[str, Any]) -> bool:
    """Whether money of a Transaction is held, or captured and not refunded. Raises Unusable."""
    if answers.is_gone(transaction):
        return False
    if answers.children(transaction):
        return answers.status_of(transaction) in ("AUTHORIZED", "SETTLEMENT_PENDING")
    return answers.refunded_minor(transaction) < answers.minor(transaction)


def _reversed(target: Mapping[str, Any]) -> ConnectorAnswer:
    return ConnectorAnswer(
        Delivery.ANSWERED, Verdict.APPROVED, connector_transaction_id=str(target.get("id"))
    )
