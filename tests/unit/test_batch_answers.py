"""What a batch answers for items that are not finished when it has to answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from payments.v1 import money_pb2, payment_method_pb2, payment_pb2
from payments.v1 import payment_service_pb2 as pb

from gateway.application.accounts import MerchantInfo, Principal, Scope
from gateway.application.usecases import Payments
from gateway.domain.model import Mode, OperationKind
from gateway.rpc.conversion import ContractEncoder
from gateway.rpc.service import PaymentService, RpcLimits
from tests.memory_store import CAPABLE, LIMITS, MERCHANT, UNSENT, Bench, ScriptedConnector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.application.commands import Answer, Authorize

PRINCIPAL = Principal(
    "key_1", "org_1", frozenset(Scope), Mode.TEST, {MERCHANT: MerchantInfo(MERCHANT)}
)


class _Held(Payments):
    """Authorizations wait until they are let go; reads do not."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(
            bench.store, bench.claims, bench.router, ContractEncoder(), LIMITS, bench.counts
        )
        self.go = asyncio.Event()

    async def authorize(self, command: Authorize) -> Answer:
        await self.go.wait()
        return await super().authorize(command)


class _Observer:
    def rpc_started(self, method: str) -> None:
        pass

    def rpc_finished(self, *told: object) -> None:
        pass


class _Authenticator:
    def remembered(self, authorization: object) -> Principal:
        return PRINCIPAL


class _Context:
    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return (("authorization", "Bearer key"), ("x-request-id", self._request_id))

    def set_trailing_metadata(self, trailers: object) -> None:
        pass


class _World:
    def __init__(self) -> None:
        self.connector = ScriptedConnector(replace(CAPABLE))
        self.payments = _Held(Bench(self.connector))

    async def batch(
        self,
        request_id: str,
        *,
        waits: bool,
        items: int = 1,
        each: pb.AuthorizePaymentRequest | None = None,
    ) -> Any:
        """The results of items that are the same; without `waits` it answers at once."""
        limits = RpcLimits() if waits else RpcLimits(batch_wait_s_max=0.0, batch_margin_s=60.0)
        authenticator: Any = _Authenticator()
        self.service = PaymentService(self.payments, authenticator, _Observer(), limits)
        context: Any = _Context(request_id)
        request = pb.BatchAuthorizePaymentsRequest()
        for number in range(items):
            authorization = request.items.add(item_ref=str(number)).authorization
            authorization.MergeFrom(each or AUTHORIZATION)
        answer = await self.service._serve_batch(request.SerializeToString(), context)
        return pb.BatchAuthorizePaymentsResponse.FromString(answer).results


AUTHORIZATION = pb.AuthorizePaymentRequest(
    merchant_id=MERCHANT,
    idempotency_key="key",
    amount=money_pb2.Money(amount_minor=100, currency_code="EUR"),
    capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
    payment_method=payment_method_pb2.PaymentMethod(token="tok_visa"),
)


async def test_a_repeat_that_is_not_finished_is_never_told_that_nothing_was_sent() -> None:
    """What was not sent is the attempt before: this one may yet be charged."""
    world = _World()
    world.connector.steps.append(UNSENT)
    world.payments.go.set()
    [first] = await world.batch("req_1", waits=True)
    assert first.response.operation.state == payment_pb2.OPERATION_STATE_NOT_SENT

    world.payments.go.clear()
    results = await world.batch("req_2", waits=False, items=2)
    assert [each.WhichOneof("result") for each in results] == ["error", "error"]

    world.payments.go.set()
    await world.service.wait_idle()
    assert len(world.connector.standing(OperationKind.AUTHORIZE)) == 1


async def test_a_repeat_that_is_not_finished_is_told_as_one() -> None:
    world = _World()
    world.payments.go.set()
    [first] = await world.batch("req_1", waits=True)

    world.payments.go.clear()
    [repeat] = await world.batch("req_2", waits=False)
    assert repeat.response.replay == payment_pb2.Replay(replayed=True, first_request_id="req_1")
    repeat.response.ClearField("replay")
    assert repeat == first

    world.payments.go.set()
    await world.service.wait_idle()


async def test_after_each_item_that_breaks_rules_others_have_their_turn() -> None:
    """To find out what it breaks takes milliseconds."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    wrong = pb.AuthorizePaymentRequest(merchant_id=MERCHANT)
    results = await _World().batch("req_1", waits=True, items=20, each=wrong)
    task.cancel()
    assert {each.WhichOneof("result") for each in results} == {"error"}
    assert turns >= 20
