"""What a batch answers for items that are not finished when it has to answer."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from payments.v1 import money_pb2, payment_method_pb2, payment_pb2
from payments.v1 import payment_service_pb2 as pb

from gateway.application.accounts import MerchantInfo, Principal, Scope
from gateway.application.admission import Admission, AdmissionLimits, open_gates
from gateway.application.usecases import Payments
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode, OperationKind
from gateway.rpc import service as service_module
from gateway.rpc.conversion import ContractEncoder
from gateway.rpc.service import PaymentService, RpcLimits
from tests.memory_store import (
    CAPABLE,
    LIMITS,
    LOST,
    MERCHANT,
    UNSENT,
    Bench,
    Gate,
    ScriptedConnector,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.application.commands import Answer, Authorize
    from gateway.application.ports import Found

HANG_S = 30.0
"""A wait that takes so long hangs; no rule is tested by this time."""

PRINCIPAL = Principal(
    "key_1", "org_1", frozenset(Scope), Mode.TEST, {MERCHANT: MerchantInfo(MERCHANT)}
)


class _Held(Payments):
    """Authorizations wait until they are let go; reads do not, unless they are told to."""

    def __init__(self, bench: Bench, gates: Admission) -> None:
        super().__init__(
            bench.store,
            bench.claims,
            bench.router,
            ContractEncoder(),
            LIMITS,
            bench.counts,
            gates.payments,
        )
        self.go = asyncio.Event()
        self.begun = 0
        self.before_reading: Callable[[], Awaitable[object]] | None = None
        self.answered: Gate | None = None

    async def authorize(self, command: Authorize) -> Answer:
        self.begun += 1
        await self.go.wait()
        answer = await super().authorize(command)
        if self.answered is not None:
            await self.answered.wait()
        return answer

    async def get_operation(self, *where: Any, **named: Any) -> Found:
        if self.before_reading is not None:
            await self.before_reading()
        return await super().get_operation(*where, **named)


class _Observer:
    def rpc_started(self, method: str) -> None:
        pass

    def rpc_finished(self, *told: object) -> None:
        pass


class _Authenticator:
    def remembered(self, authorization: object) -> Principal:
        return PRINCIPAL


class _Context:
    def __init__(self, request_id: str, left_s: float | None) -> None:
        self._request_id = request_id
        self._left_s = left_s

    def time_remaining(self) -> float | None:
        return self._left_s

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return (("authorization", "Bearer key"), ("x-request-id", self._request_id))

    def set_trailing_metadata(self, trailers: object) -> None:
        pass


class _World:
    def __init__(self) -> None:
        self.connector = ScriptedConnector(replace(CAPABLE))
        self.gates = open_gates(AdmissionLimits())
        self.payments = _Held(Bench(self.connector), self.gates)

    @property
    def inside(self) -> tuple[int, int, int]:
        """Items that are worked on, all that are in the gateway, and their merchants."""
        gate = self.gates.payments
        return gate.working, gate.in_flight, gate.merchants

    async def batch(
        self,
        request_id: str,
        *,
        waits: bool,
        items: int = 1,
        each: pb.AuthorizePaymentRequest | None = None,
        margin_s: float = 60.0,
        one_key: bool = True,
        left_s: float | None = None,
    ) -> Any:
        """The results of items that are the same, or but for their keys. Without `waits` it answers
        at once, but for what is unfinished it reads, for half of `margin_s` at most.
        """
        wait_s_max = RpcLimits().batch_wait_s_max if waits else 0.0
        limits = RpcLimits(batch_wait_s_max=wait_s_max, batch_margin_s=margin_s)
        authenticator: Any = _Authenticator()
        self.service = PaymentService(self.payments, authenticator, _Observer(), limits, self.gates)
        context: Any = _Context(request_id, left_s)
        request = pb.BatchAuthorizePaymentsRequest()
        for number in range(items):
            authorization = request.items.add(item_ref=str(number)).authorization
            authorization.MergeFrom(each or AUTHORIZATION)
            if not one_key:
                authorization.idempotency_key += f"-{number}"
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


@pytest.mark.parametrize("answer", [None, LOST], ids=["frozen", "in doubt"])
@pytest.mark.parametrize("request_id", ["req_1", "req_2"])
async def test_a_repeat_that_is_not_finished_is_told_as_one(
    request_id: str, answer: Step | None
) -> None:
    world = _World()
    world.payments.go.set()
    if answer is not None:
        world.connector.steps.append(answer)
    [first] = await world.batch("req_1", waits=True)
    assert not first.response.HasField("replay")

    world.payments.go.clear()
    [repeat] = await world.batch(request_id, waits=False)
    assert repeat.response.replay == payment_pb2.Replay(replayed=True, first_request_id="req_1")
    repeat.response.ClearField("replay")
    assert repeat == first

    world.payments.go.set()
    await world.service.wait_idle()


async def test_the_second_of_two_equal_keys_is_told_as_a_repeat_though_it_is_not_finished() -> None:
    world = _World()
    world.payments.go.set()
    await world.batch("req_1", waits=True)

    world.payments.go.clear()
    _, second = await world.batch("req_1", waits=False, items=2)
    assert second.response.replay == payment_pb2.Replay(replayed=True, first_request_id="req_1")

    world.payments.go.set()
    await world.service.wait_idle()


async def test_what_an_unfinished_item_did_itself_is_told_as_no_repeat() -> None:
    world = _World()
    answered = world.payments.answered = Gate()
    world.payments.go.set()
    world.payments.before_reading = answered.reached.wait
    [result] = await world.batch("req_1", waits=False)
    assert result.response.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
    assert not result.response.HasField("replay")

    answered.opened.set()
    await world.service.wait_idle()


async def test_an_item_that_ends_while_its_operation_is_read_is_answered_by_its_end() -> None:
    world = _World()

    async def miss_it() -> None:
        world.payments.go.set()
        await asyncio.wait(world.service._detached - {asyncio.current_task()})
        raise GatewayError(Reason.OPERATION_NOT_FOUND, "not yet")

    world.payments.before_reading = miss_it
    [result] = await world.batch("req_1", waits=False)
    assert result.response.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED


async def test_what_is_finished_is_not_read() -> None:
    world = _World()
    read = 0

    async def count() -> None:
        nonlocal read
        read += 1

    world.payments.before_reading = count
    world.payments.go.set()
    await world.batch("req_1", waits=True, items=3, one_key=False)
    assert read == 0


async def test_a_batch_does_not_wait_for_a_read_that_does_not_end() -> None:
    world = _World()
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    world.payments.before_reading = hang
    async with asyncio.timeout(HANG_S):
        [result] = await world.batch("req_1", waits=False, margin_s=0.02)
        await ended.wait()
    assert result.error.code == StatusCode.ABORTED.value[0]

    world.payments.go.set()
    await world.service.wait_idle()


@pytest.mark.parametrize("leaves", [True, False], ids=["caller gone", "no time left"])
async def test_what_a_batch_reads_and_needs_no_more_is_no_defect(leaves: bool) -> None:
    """The loop would log it: an exception that nobody asked for."""
    world = _World()
    defects: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: defects.append(context))
    reading, goes_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        reading.set()
        try:
            await goes_on.wait()
        finally:
            ended.set()
        raise GatewayError(Reason.STORE_UNAVAILABLE, "away")

    world.payments.before_reading = fail
    margin_s = 60.0 if leaves else 0.0
    batch = asyncio.ensure_future(world.batch("req_1", waits=False, margin_s=margin_s))
    await reading.wait()
    if leaves:
        batch.cancel()
    await asyncio.wait([batch])
    del batch
    goes_on.set()
    world.payments.go.set()
    await ended.wait()
    await world.service.wait_idle()
    gc.collect()
    assert defects == []


async def test_a_margin_takes_half_of_the_time_that_is_left_at_most() -> None:
    world = _World()

    async def let_go() -> None:
        for _ in range(1_000):  # an answer at once takes fewer
            await asyncio.sleep(0)
        world.payments.go.set()

    letting_go = asyncio.ensure_future(let_go())
    [result] = await world.batch("req_1", waits=True, left_s=20.0, margin_s=60.0)
    assert result.response.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
    await letting_go


@pytest.mark.parametrize(
    ("left_s", "waits_s", "reads_s"),
    [
        (None, 30.0, 0.5),
        (1_000.0, 30.0, 0.5),
        (20.0, 19.0, 0.5),
        (1.0, 0.5, 0.25),
    ],
)
async def test_a_batch_waits_up_to_its_margin_and_no_longer_than_a_batch_may(
    monkeypatch: pytest.MonkeyPatch, left_s: float | None, waits_s: float, reads_s: float
) -> None:
    waited: list[float | None] = []
    wait = asyncio.wait

    async def at_once(tasks: Any, **options: float | None) -> Any:
        waited.append(options["timeout"])
        return await wait(tasks, timeout=0)

    clock = SimpleNamespace(monotonic=lambda: 1_000.0, perf_counter=lambda: 0.0)
    world = _World()
    with monkeypatch.context() as patched:
        patched.setattr(service_module, "time", clock)
        patched.setattr(asyncio, "wait", at_once)
        await world.batch("req_1", waits=True, left_s=left_s, margin_s=1.0)
    assert waited == [waits_s, reads_s]
    world.payments.go.set()
    await world.service.wait_idle()


async def test_an_item_that_waits_for_an_earlier_one_of_its_key_is_no_work() -> None:
    world = _World()
    await world.batch("req_1", waits=False, items=2)
    assert world.inside == (1, 2, 1)

    world.payments.go.set()
    await world.service.wait_idle()
    assert world.inside == (0, 0, 0)


async def test_items_that_are_refused_leave_their_places() -> None:
    world = _World()
    world.payments.go.set()
    wrong = pb.AuthorizePaymentRequest(merchant_id=MERCHANT)
    await world.batch("req_1", waits=True, items=3, each=wrong)
    assert world.inside == (0, 0, 0)


async def test_after_so_many_items_others_have_their_turn() -> None:
    world = _World()
    seen = [0]

    async def other() -> None:
        while True:
            seen.append(world.payments.begun)
            await asyncio.sleep(0)

    world.payments.go.set()
    task = asyncio.ensure_future(other())
    await world.batch("req_1", waits=True, items=500, one_key=False)
    task.cancel()
    assert seen[-1] == 500
    assert max(after - before for before, after in pairwise(seen)) <= 50


async def test_after_so_many_bytes_that_are_looked_at_others_have_their_turn() -> None:
    """Texts that may hold a card number are looked at one by one."""
    world = _World()
    seen = [0]

    async def other() -> None:
        while True:
            seen.append(world.payments.begun)
            await asyncio.sleep(0)

    world.payments.go.set()
    task = asyncio.ensure_future(other())
    suspect = pb.AuthorizePaymentRequest(metadata={f"k{n}": "." * 500 for n in range(10)})
    suspect.MergeFrom(AUTHORIZATION)
    await world.batch("req_1", waits=True, items=40, each=suspect, one_key=False)
    task.cancel()
    assert seen[-1] == 40
    assert max(after - before for before, after in pairwise(seen)) <= 2


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
