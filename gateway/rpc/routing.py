"""The handlers of RoutingService: counted, admitted and logged as PaymentService's."""

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from payments.v1 import outcome_pb2, payment_pb2
from payments.v1 import routing_service_pb2 as pb
from payments.v1.payment_method_pb2 import CaptureMethod as CaptureMethodPb

from gateway.application.accounts import Principal, Scope
from gateway.application.admission import Gate
from gateway.application.ports import Capabilities, Served
from gateway.application.routing_administration import (
    PAGE_SIZE_DEFAULT,
    Author,
    RoutingAdministration,
    RulesVersion,
)
from gateway.domain.ids import new_payment_id
from gateway.routing.rule_file import Problem
from gateway.rpc import conversion, validation
from gateway.rpc.auth import resolve_merchant
from gateway.rpc.conversion import Caller
from gateway.rpc.service import PaymentService
from gateway.rpc.unary import Reply, Unary
from gateway.rpc.wire import to_timestamp

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["RoutingService"].full_name
REQUEST_TYPES: Final[tuple[type[Message], ...]] = (
    pb.PutRoutingRulesRequest,
    pb.GetRoutingRulesRequest,
    pb.ListRoutingRuleVersionsRequest,
    pb.ActivateRoutingRulesRequest,
    pb.ExplainRouteRequest,
    pb.ListConnectorsRequest,
)


class RoutingService:
    """The servicer of `payments.v1.RoutingService`; `door` counts and authenticates its calls."""

    def __init__(
        self, door: PaymentService, gate: Gate, administration: RoutingAdministration
    ) -> None:
        self._door = door
        self._gate = gate
        self._administration = administration

    def method_handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """The handlers by the names of their methods, without (de)serializers."""
        read = self._door, self._gate, Scope.ROUTING_READ
        write = self._door, self._gate, Scope.ROUTING_WRITE
        unary: tuple[Unary[Any], ...] = (
            Unary(*write, "PutRoutingRules", pb.PutRoutingRulesRequest, self._put),
            Unary(*read, "GetRoutingRules", pb.GetRoutingRulesRequest, self._get),
            Unary(
                *read,
                "ListRoutingRuleVersions",
                pb.ListRoutingRuleVersionsRequest,
                self._list,
            ),
            Unary(*write, "ActivateRoutingRules", pb.ActivateRoutingRulesRequest, self._activate),
            Unary(*read, "ExplainRoute", pb.ExplainRouteRequest, self._explain),
            Unary(*read, "ListConnectors", pb.ListConnectorsRequest, self._list_connectors),
        )
        return {each.method: grpc.unary_unary_rpc_method_handler(each.serve) for each in unary}

    async def _put(
        self, principal: Principal, caller: Caller, request: pb.PutRoutingRulesRequest
    ) -> Reply:
        merchant_id = _merchant(principal, caller, request.merchant_id)
        if request.validate_only:
            checked = self._administration.check(merchant_id, caller.mode, request.rules_toml)
            return Reply.of(pb.PutRoutingRulesResponse(warnings=_warnings(checked.warnings)))
        version, checked = await self._administration.put(
            merchant_id,
            caller.mode,
            request.rules_toml,
            _author(principal, caller, request.reason),
            activate=request.activate,
        )
        return Reply.of(
            pb.PutRoutingRulesResponse(version=version, warnings=_warnings(checked.warnings))
        )

    async def _get(
        self, principal: Principal, caller: Caller, request: pb.GetRoutingRulesRequest
    ) -> Reply:
        merchant_id = _merchant(principal, caller, request.merchant_id)
        found = await self._administration.get(merchant_id, caller.mode, request.version)
        return Reply.of(pb.GetRoutingRulesResponse(rules=_rules(found)))

    async def _list(
        self, principal: Principal, caller: Caller, request: pb.ListRoutingRuleVersionsRequest
    ) -> Reply:
        found = await self._administration.versions(
            _merchant(principal, caller, request.merchant_id),
            caller.mode,
            before_version=request.before_version or None,
            page_size=request.page_size or PAGE_SIZE_DEFAULT,
        )
        return Reply.of(
            pb.ListRoutingRuleVersionsResponse(versions=[_rules(each) for each in found])
        )

    async def _activate(
        self, principal: Principal, caller: Caller, request: pb.ActivateRoutingRulesRequest
    ) -> Reply:
        previous = await self._administration.activate(
            _merchant(principal, caller, request.merchant_id),
            caller.mode,
            request.version,
            _author(principal, caller, request.reason),
            request.expected_active_version
            if request.HasField("expected_active_version")
            else None,
        )
        return Reply.of(pb.ActivateRoutingRulesResponse(previous_version=previous))

    async def _explain(
        self, principal: Principal, caller: Caller, request: pb.ExplainRouteRequest
    ) -> Reply:
        _merchant(principal, caller, request.merchant_id)
        validation.refuse_verification_values(request.payment)
        payment_id = request.payment_id or new_payment_id()
        explained = await self._administration.explain(
            conversion.to_authorize(request.payment, caller),
            payment_id,
            text=request.rules_toml,
            version=request.version,
        )
        plan, refusal = explained
        return Reply.of(
            pb.ExplainRouteResponse(
                route=conversion.route_message(plan.decision),
                payment_id=payment_id,
                attempts_max=plan.attempts_max,
                cascade_on=[outcome_pb2.ResponseCode.ValueType(code) for code in sorted(plan.soft)],
                refusal_reason="" if refusal is None else refusal.reason,
            )
        )

    async def _list_connectors(
        self, principal: Principal, caller: Caller, request: pb.ListConnectorsRequest
    ) -> Reply:
        merchant_id = _merchant(principal, caller, request.merchant_id)
        accounts = self._administration.accounts(merchant_id, caller.mode)
        return Reply.of(pb.ListConnectorsResponse(accounts=[_account(each) for each in accounts]))


def _merchant(principal: Principal, caller: Caller, merchant_id: str) -> str:
    caller.merchant_id = resolve_merchant(principal, merchant_id).merchant_id
    return caller.merchant_id


def _author(principal: Principal, caller: Caller, reason: str) -> Author:
    return Author(principal.key_id, reason, caller.request_id)


# --- values to messages ---------------------------------------------------------------------------


def _warnings(problems: Iterable[Problem]) -> list[pb.RoutingWarning]:
    return [pb.RoutingWarning(path=each.path, text=each.text) for each in problems]


def _rules(found: RulesVersion) -> pb.RoutingRules:
    return pb.RoutingRules(
        version=found.version,
        rules_toml=found.text,
        created_at=to_timestamp(found.created_at),
        created_by=found.created_by,
        reason=found.reason,
        active=found.active,
        activated_at=to_timestamp(found.activated_at),
        activated_by=found.activated_by,
        activation_reason=found.activation_reason,
    )


def _account(served: Served) -> pb.ConnectorAccount:
    connector = served.connector
    return pb.ConnectorAccount(
        connector=served.connector_name,
        connector_account_id=served.account_id,
        priority=served.priority,
        enabled=served.enabled,
        capabilities=None if connector is None else _capabilities(connector.capabilities),
    )


def _capabilities(capabilities: Capabilities) -> pb.ConnectorCapabilities:
    amounts = capabilities.amounts
    return pb.ConnectorCapabilities(
        operations=[
            payment_pb2.OperationKind.ValueType(each) for each in sorted(capabilities.operations)
        ],
        capture_methods=[
            CaptureMethodPb.ValueType(each) for each in sorted(capabilities.capture_methods)
        ],
        supported_fields=sorted(capabilities.supported_fields),
        all_currencies=amounts is None,
        currencies=[
            pb.CurrencyCapability(
                currency_code=code,
                step_minor=rule.step_minor,
                amount_minor_max=rule.amount_minor_max,
            )
            for code, rule in sorted((amounts or {}).items())
        ],
        answer_timeout=_duration(capabilities.answer_timeout_s),
        idempotent_by_reference=capabilities.idempotent_by_reference,
        reference_validity=None
        if capabilities.key_validity_s is None
        else _duration(capabilities.key_validity_s),
        query_by_reference=capabilities.query_by_reference,
        cancel_by_reference=capabilities.cancel_by_reference,
    )


def _duration(seconds: float) -> Duration:
    told = Duration()
    told.FromMilliseconds(round(seconds * 1000))
    return told
