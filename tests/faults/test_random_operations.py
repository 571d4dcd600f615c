"""Random operations and faults against a real system, held to a small model of the amounts.

The model knows the published rules and nothing of the gateway's code. It is compared with
GetPayment after every step, and with PostgreSQL and the PSP's journal at the end.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from payments.v1 import payment_service_pb2 as rpc
from payments.v1.payment_method_pb2 import CaptureMethod
from payments.v1.payment_pb2 import OperationState, PaymentState
from redis.asyncio import Redis

from gateway.domain.states import FROZEN, UNFINISHED
from tests.faults.checker import REPEAT_AFTER_S, TRIES_MAX, Client, check, settled
from tests.faults.transports import TRANSPORTS
from tests.harness import (
    Caller,
    authorize_request,
    bytes_without_replay,
    eur,
    new_key,
    running_system,
)
from tests.servers import redis_server

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import GatewayProcess, System
    from tests.servers import PostgresForTests

T = TypeVar("T")

SEED: Final = int(os.environ.get("GATEWAY_TESTS_RANDOM_SEED", "2"))
"""The same operations every time, unless another one is given."""
PROFILES: Final = {"idempotent": SEED, "non_idempotent": SEED + 1}
EXAMPLES: Final = 14
"""For each profile."""
STEPS: Final = 16
DOWN_OPERATIONS_MAX: Final = 4
"""For how many operations the PSP is down at most."""
DEATHS_MAX: Final = 1
"""How often a gateway dies during an operation: recovery then waits for the dead one's time."""
SEND_WINDOW_S: Final = 1.5
"""As long as a stop of the machine may be for a payment to be sent all the same."""
PICKS: Final = st.integers(0, 7)
"""Which of the latest payments; 0 to 5 of those that allow the operation."""
ALLOWED_PICKS_MAX: Final = 5

AUTHORIZED_MINOR: Final = 1000
TOKENS: Final = (
    "tok_visa",
    "tok_visa",
    "tok_garbage",
    "tok_declined_do_not_honor",
    "tok_partial_approval",
    "tok_capture_declined",
    "tok_capture_garbage",
    "tok_void_declined",
    "tok_void_garbage",
    "tok_refund_declined",
    "tok_refund_garbage",
    "tok_increment_declined",
    "tok_increment_reset_after_charge",
)
"""`garbage` and `reset_after_charge` take effect, and the answer is lost."""

AUTHORIZE, CAPTURE, VOID, REFUND, INCREMENT = (
    "AuthorizePayment",
    "CapturePayment",
    "VoidPayment",
    "RefundPayment",
    "IncrementAuthorization",
)
SUCCEEDED, DECLINED, NOT_SENT, IN_DOUBT, PENDING, CANCELED = (
    OperationState.OPERATION_STATE_SUCCEEDED,
    OperationState.OPERATION_STATE_DECLINED,
    OperationState.OPERATION_STATE_NOT_SENT,
    OperationState.OPERATION_STATE_IN_DOUBT,
    OperationState.OPERATION_STATE_PENDING,
    OperationState.OPERATION_STATE_CANCELED,
)

STATE_NAMES: Final[dict[int, str]] = {number: name for name, number in OperationState.items()}


# --- the model ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Op:
    """A call with its key."""

    method: str
    request: Any
    payment: Model
    amount_minor: int = 0
    final: bool = False
    allocations: dict[str, int] = field(default_factory=dict)
    """Of a refund: by the capture's operation id."""
    state: int = NOT_SENT
    frozen: bytes | None = None
    """The first answer that must be repeated for ever."""

    @property
    def key(self) -> str:
        key: str = self.request.idempotency_key
        return key


@dataclass(eq=False)
class Model:
    """What a payment must look like."""

    method: int
    token: str
    partial_allowed: bool
    payment_id: str = ""
    authorization: int = NOT_SENT
    """The state of its AUTHORIZE."""
    authorized: int = 0
    voided: int = 0
    closed: bool = False
    captures: dict[str, int] = field(default_factory=dict)
    """Succeeded ones, by operation id, the oldest first."""
    refunded: dict[str, int] = field(default_factory=dict)
    """By the capture's operation id."""
    unfinished: list[Op] = field(default_factory=list)
    """Only while the PSP is down."""

    @property
    def captured(self) -> int:
        return sum(self.captures.values())

    def pending(self, method: str) -> int:
        return sum(op.amount_minor for op in self.unfinished if op.method == method)

    @property
    def is_money(self) -> bool:
        released = self.voided and not self.captured
        return self.authorization == SUCCEEDED and not released

    @property
    def state(self) -> int:
        if self.authorization != SUCCEEDED:
            _, _, name = STATE_NAMES[self.authorization].partition("STATE_")
            return PaymentState.Value(f"PAYMENT_STATE_{name}")
        refunded = sum(self.refunded.values())
        if refunded:
            whole = refunded == self.captured
            name = "REFUNDED" if whole else "PARTIALLY_REFUNDED"
        elif self.captured:
            name = "CAPTURED" if self.captured == self.authorized else "PARTIALLY_CAPTURED"
        else:
            name = "VOIDED" if self.voided else "AUTHORIZED"
        return PaymentState.Value(f"PAYMENT_STATE_{name}")

    # --- rules ---

    def plan(self, op: Op) -> bool:
        """Whether the gateway takes the operation now; fills in what it comes to."""
        busy = {other.method for other in self.unfinished}
        if op.method == AUTHORIZE:
            op.amount_minor = AUTHORIZED_MINOR
            return True
        if op.method == VOID and AUTHORIZE in busy:
            return VOID not in busy  # a cancel request
        if not self.is_money:
            return False
        return {
            CAPTURE: self._plan_capture,
            VOID: self._plan_void,
            REFUND: self._plan_refund,
            INCREMENT: self._plan_increment,
        }[op.method](op, busy)

    def _plan_capture(self, op: Op, busy: set[str]) -> bool:
        available = self.authorized - self.captured - self.pending(CAPTURE)
        op.amount_minor = _asked(op, available)
        op.final = op.request.final or self.method == CaptureMethod.CAPTURE_METHOD_MANUAL
        return VOID not in busy and not self.closed and 0 < op.amount_minor <= available

    def _plan_void(self, op: Op, busy: set[str]) -> bool:
        op.amount_minor = self.authorized - self.captured
        return not busy & {CAPTURE, VOID} and op.amount_minor > 0 and not self.voided

    def _plan_refund(self, op: Op, _: set[str]) -> bool:
        left = {
            capture: amount - self.refunded.get(capture, 0)
            for capture, amount in self.captures.items()
        }
        for other in self.unfinished:
            for capture, part in other.allocations.items():
                left[capture] -= part
        named = op.request.capture_operation_id
        if named:
            left = {named: left.get(named, 0)}
        op.amount_minor = rest = _asked(op, sum(left.values()))
        op.allocations = {}
        for capture, part in left.items():
            if rest and part:
                op.allocations[capture] = min(rest, part)
                rest -= op.allocations[capture]
        return rest == 0 and op.amount_minor > 0

    def _plan_increment(self, op: Op, busy: set[str]) -> bool:
        op.amount_minor = op.request.additional_amount.amount_minor
        manual = self.method != CaptureMethod.CAPTURE_METHOD_AUTOMATIC
        return manual and not busy and not self.captured and not self.closed

    def outcome(self, op: Op) -> int:
        """What the PSP says to the operation, by the token."""
        kind = {AUTHORIZE: "", CAPTURE: "capture", VOID: "void", REFUND: "refund"}.get(
            op.method, "increment"
        )
        if op.method == AUTHORIZE:
            partial = self.token == "tok_partial_approval" and not self.partial_allowed
            return DECLINED if partial or "_declined_" in self.token else SUCCEEDED
        return DECLINED if self.token == f"tok_{kind}_declined" else SUCCEEDED

    def begin(self, op: Op) -> None:
        """It is in doubt, or waits."""
        self.unfinished.append(op)
        if op.method == AUTHORIZE:
            self.authorization = IN_DOUBT
        elif op.method == CAPTURE and op.final:
            self.closed = True

    def end(self, op: Op, state: int, operation_id: str) -> None:
        """It has a definite outcome."""
        if op in self.unfinished:
            self.unfinished.remove(op)
            if op.method == CAPTURE and op.final:
                self.closed = False
        op.state = state
        if op.method == AUTHORIZE:
            self.authorization = state
        if state == SUCCEEDED:
            self._take_effect(op, operation_id)

    def _take_effect(self, op: Op, operation_id: str) -> None:
        if op.method == AUTHORIZE:
            partial = self.token == "tok_partial_approval"
            self.authorized = AUTHORIZED_MINOR // 2 if partial else AUTHORIZED_MINOR
            if self.method == CaptureMethod.CAPTURE_METHOD_AUTOMATIC:
                # By the id of the gateway's own CAPTURE, which the machine fills in.
                self.captures[operation_id] = self.authorized
                self.closed = True
        elif op.method == CAPTURE:
            self.captures[operation_id] = op.amount_minor
            if op.final:
                self.closed = True
                self.voided = self.authorized - self.captured
        elif op.method == VOID and self.authorization == SUCCEEDED:
            self.closed = True
            self.voided = self.authorized - self.captured
        elif op.method == REFUND:
            for capture, part in op.allocations.items():
                self.refunded[capture] = self.refunded.get(capture, 0) + part
        elif op.method == INCREMENT:
            self.authorized += op.amount_minor


def _asked(op: Op, available: int) -> int:
    asked: int = op.request.amount.amount_minor if op.request.HasField("amount") else available
    return asked


# --- the system -----------------------------------------------------------------------------------


@dataclass
class World:
    """A system with one gateway, which is killed and started anew on the other transport."""

    system: System
    redis: EmbeddedRedis
    runner: asyncio.Runner
    transports: Iterator[str] = field(default_factory=lambda: itertools.cycle(TRANSPORTS))
    clients: list[Client] = field(default_factory=list)
    gateway: GatewayProcess | None = None
    channel: grpc.aio.Channel | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    async def start(self) -> None:
        """Start the gateway, anew after a kill."""
        await self.kill()
        self.gateway = self.system.start_gateway(transport=next(self.transports))
        self.channel = grpc.aio.insecure_channel(await self.gateway.serving())
        self.caller = Caller(self.channel, self.system.shop.api_key)
        self.client = Client(self.caller)
        self.clients.append(self.client)

    async def kill(self) -> None:
        if self.gateway is not None:
            self.gateway.kill()
            self.gateway = None
        if self.channel is not None:
            await self.channel.close()
            self.channel = None

    async def flush_redis(self) -> None:
        async with Redis.from_url(self.redis.url) as client:
            await client.flushall()

    async def psp(self, mode: str) -> None:
        control = self.system.control
        await control.mode(mode)
        await control.close()

    async def call(self, op: Op) -> Any:
        """The answer, or the status of the refusal."""
        try:
            return await self.client.call(op.method, op.request)
        except grpc.aio.AioRpcError as error:
            return error.code()

    async def die_during(self, op: Op, point: str) -> None:
        """Kill the gateway while the operation's request is at the PSP, and start it anew."""
        control = self.system.control
        await control.hold(point, method="send")
        calling = asyncio.create_task(self.client.attempt(op.method, op.request))
        await control.await_held()
        assert self.gateway is not None
        self.gateway.kill()
        assert await calling is None
        await control.release()
        await control.close()
        await self.start()

    async def definite(self, key: str) -> Any:
        """The operation, once it has a definite outcome."""
        for _ in range(TRIES_MAX):
            found = await self.caller.operation(idempotency_key=key)
            if found.operation.state not in UNFINISHED:
                return found
            await asyncio.sleep(REPEAT_AFTER_S)
        raise AssertionError(f"{key} has no definite outcome after {TRIES_MAX} looks")


class Machine(RuleBasedStateMachine):
    """Drives the world."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.payments: list[Model] = []
        self.ops: list[Op] = []
        self.down_for = 0
        self.deaths = 0
        self.tokens = itertools.cycle(token for token in TOKENS if not _refuses(token))

    @property
    def is_down(self) -> bool:
        return self.down_for > 0

    # --- operations ---

    @initialize(token=st.sampled_from(TOKENS))
    def begin_with_two_payments(self, token: str) -> None:
        self.authorize(token, "AUTOMATIC", True)
        self.authorize("tok_visa", "MANUAL_MULTIPLE", False)

    @rule(
        token=st.sampled_from(TOKENS),
        method=st.sampled_from(["AUTOMATIC", "MANUAL", "MANUAL_MULTIPLE", "MANUAL_MULTIPLE"]),
        partial_allowed=st.booleans(),
    )
    def authorize(self, token: str, method: str, partial_allowed: bool) -> None:
        request = authorize_request(
            amount_minor=AUTHORIZED_MINOR,
            token=token,
            capture_method=method,
            allow_partial_approval=partial_allowed,
        )
        payment = Model(request.capture_method, token, partial_allowed)
        self._do(Op(AUTHORIZE, request, payment))

    @rule(pick=PICKS, amount_minor=st.sampled_from([1, 300, 500, 1001]))
    def capture_a_part(self, pick: int, amount_minor: int) -> None:
        self._do(self._follow_up(CAPTURE, pick, amount=eur(amount_minor)))

    @rule(pick=PICKS, amount_minor=st.sampled_from([None, 200]))
    def capture_for_the_last_time(self, pick: int, amount_minor: int | None) -> None:
        self._do(self._follow_up(CAPTURE, pick, amount=eur(amount_minor), final=True))

    @rule(pick=PICKS)
    def capture_the_rest(self, pick: int) -> None:
        self._do(self._follow_up(CAPTURE, pick))

    @rule(pick=PICKS, amount_minor=st.sampled_from([1, 200, 600]))
    def refund_a_part(self, pick: int, amount_minor: int) -> None:
        self._do(self._follow_up(REFUND, pick, amount=eur(amount_minor)))

    @rule(pick=PICKS, number=st.integers(0, 3), amount_minor=st.sampled_from([None, 100]))
    def refund_of_a_capture(self, pick: int, number: int, amount_minor: int | None) -> None:
        captures = [capture for payment in self.payments for capture in payment.captures]
        capture = captures[-1 - number % len(captures)] if captures else "none"
        op = self._follow_up(REFUND, pick, amount=eur(amount_minor), capture_operation_id=capture)
        self._do(op)

    @rule(pick=PICKS)
    def refund_the_rest(self, pick: int) -> None:
        self._do(self._follow_up(REFUND, pick))

    @rule(pick=PICKS)
    def void(self, pick: int) -> None:
        self._do(self._follow_up(VOID, pick))

    @rule(pick=PICKS)
    def increment(self, pick: int) -> None:
        self._do(self._follow_up(INCREMENT, pick, additional_amount=eur(250)))

    @rule(pick=st.integers(0, 99), same_payload=st.booleans())
    def repeat(self, pick: int, same_payload: bool) -> None:
        op = self.ops[pick % len(self.ops)]
        if not same_payload:
            self._reuse_the_key_of(op)
        elif op.state == NOT_SENT:
            self._do(op)
        else:
            answer = self.world.run(self.world.call(op))
            assert answer.replay.replayed
            self._frozen(op, answer)

    # --- faults ---

    @rule(redis=st.booleans(), gateway=st.booleans())
    def flush_redis_and_kill_the_gateway(self, redis: bool, gateway: bool) -> None:
        if redis:
            self.world.run(self.world.flush_redis())
        if gateway:
            self.world.run(self.world.start())

    @precondition(lambda self: not self.is_down and self.deaths < DEATHS_MAX)
    @rule(
        pick=PICKS,
        method=st.sampled_from([CAPTURE, REFUND, VOID, INCREMENT, AUTHORIZE]),
        point=st.sampled_from(["before_effect", "before_answer"]),
    )
    def kill_the_gateway_during_an_operation(self, pick: int, method: str, point: str) -> None:
        if method == AUTHORIZE:
            request = authorize_request(amount_minor=AUTHORIZED_MINOR, capture_method="MANUAL")
            op = Op(AUTHORIZE, request, Model(request.capture_method, "tok_visa", False))
        else:
            extra = {"additional_amount": eur(250)} if method == INCREMENT else {}
            op = self._follow_up(method, pick, **extra)
        if op.payment.plan(op):
            self._die_during(op, point)

    @precondition(lambda self: not self.is_down)
    @rule(operations=st.integers(1, DOWN_OPERATIONS_MAX))
    def the_psp_goes_down(self, operations: int) -> None:
        """For the next so many operations."""
        self.world.run(self.world.psp("down"))
        self.down_for = operations

    def the_psp_comes_back(self) -> None:
        """What it never processed is NOT_SENT; voids, which release money, are repeated."""
        self.down_for = 0
        self.world.run(self.world.psp("up"))
        for payment in self.payments:
            for op in list(payment.unfinished):
                found = self.world.run(self.world.definite(op.key))
                cancels = payment.authorization == CANCELED
                if op.method == VOID:
                    expected = SUCCEEDED if cancels else payment.outcome(op)
                elif op.method == AUTHORIZE and payment.pending(VOID):
                    expected = CANCELED
                else:
                    expected = NOT_SENT
                assert found.operation.state == expected, found
                payment.end(op, expected, found.operation.operation_id)

    # --- what must be so ---

    @invariant()
    def every_payment_is_as_the_model_says(self) -> None:
        self.world.run(self._compare())

    async def _compare(self) -> None:
        answers = await asyncio.gather(
            *(self.world.caller.payment(payment.payment_id) for payment in self.payments)
        )
        for payment, answer in zip(self.payments, answers, strict=True):
            shown = answer.payment
            amounts = shown.amounts
            assert shown.state == payment.state, (shown, payment)
            assert {
                "authorized": amounts.authorized_minor,
                "captured": amounts.captured_minor,
                "refunded": amounts.refunded_minor,
                "voided": amounts.voided_minor,
                "capture_pending": amounts.capture_pending_minor,
                "refund_pending": amounts.refund_pending_minor,
                "increment_pending": amounts.increment_pending_minor,
                "closed": shown.capture_closed,
            } == {
                "authorized": payment.authorized,
                "captured": payment.captured,
                "refunded": sum(payment.refunded.values()),
                "voided": payment.voided,
                "capture_pending": payment.pending(CAPTURE),
                "refund_pending": payment.pending(REFUND),
                "increment_pending": payment.pending(INCREMENT),
                "closed": payment.closed,
            }, payment

    def teardown(self) -> None:
        if self.is_down:
            self.the_psp_comes_back()
            self.every_payment_is_as_the_model_says()
        self.world.run(settled(self.world.system))
        standing = {each.payment_id: each for each in self.world.system.standing() if each.stands}
        for payment in self.payments:
            own = standing.get(payment.payment_id)
            held = payment.authorized - payment.captured - payment.voided
            kept = payment.captured - sum(payment.refunded.values())
            stands = (own.open_minor, own.net_minor) if own else (0, 0)
            assert stands == (held, kept), payment

    # --- the parts of the above ---

    def _follow_up(self, method: str, pick: int, **fields: Any) -> Op:
        """A new operation on one of the payments, or on one that is made for it."""
        ops = self._follow_ups(method, fields)
        if pick <= ALLOWED_PICKS_MAX:
            if not any(op.payment.plan(op) for op in ops) and not self.is_down:
                capture_method = "AUTOMATIC" if method == REFUND else "MANUAL_MULTIPLE"
                self.authorize(next(self.tokens), capture_method, False)
                ops = self._follow_ups(method, fields)
            ops = [op for op in ops if op.payment.plan(op)] or ops
        return ops[pick % len(ops)]

    def _follow_ups(self, method: str, fields: dict[str, Any]) -> list[Op]:
        return [_follow_up(method, payment, **fields) for payment in reversed(self.payments)]

    def _do(self, op: Op) -> None:
        taken = op.payment.plan(op)
        began = time.monotonic()
        answer = self.world.run(self.world.call(op))
        # A machine that stood still meanwhile has sent nothing in time.
        stood_still = time.monotonic() - began > SEND_WINDOW_S
        if not taken:
            assert answer is grpc.StatusCode.FAILED_PRECONDITION, (answer, op)
            self._tick()
            return
        assert not isinstance(answer, grpc.StatusCode), (answer, op)
        self._know(op, answer)
        self._frozen(op, answer)
        if self.is_down:
            self._is_unfinished(op, answer.operation.state)
            return
        if answer.operation.state == IN_DOUBT:
            answer = self.world.run(self.world.definite(op.key))
        self._end(op, answer, may_be_unsent=stood_still)

    def _is_unfinished(self, op: Op, state: int) -> None:
        cancels = op.method == VOID and op.payment.authorization == IN_DOUBT
        assert state == (PENDING if cancels else IN_DOUBT), op
        op.state = state
        op.payment.begin(op)
        self._tick()

    def _tick(self) -> None:
        if self.down_for == 1:
            self.the_psp_comes_back()
        elif self.is_down:
            self.down_for -= 1

    def _reuse_the_key_of(self, op: Op) -> None:
        request = type(op.request)()
        request.CopyFrom(op.request)
        request.merchant_transaction_id = "another"
        answer = self.world.run(self.world.call(Op(op.method, request, op.payment)))
        assert answer is grpc.StatusCode.ALREADY_EXISTS, (answer, op)

    def _die_during(self, op: Op, point: str) -> None:
        self.deaths += 1
        self.world.run(self.world.die_during(op, point))
        answer = self.world.run(self.world.definite(op.key))
        self._know(op, answer)
        self._end(op, answer, may_be_unsent=True)

    def _know(self, op: Op, answer: Any) -> None:
        if op not in self.ops:
            self.ops.append(op)
        if op.payment not in self.payments:
            op.payment.payment_id = answer.payment.payment_id
            self.payments.append(op.payment)

    def _end(self, op: Op, answer: Any, *, may_be_unsent: bool) -> None:
        state = answer.operation.state
        expected = {op.payment.outcome(op)} | ({NOT_SENT} if may_be_unsent else set())
        assert state in expected, (answer, op)
        operation_id = answer.operation.operation_id
        if op.method == AUTHORIZE and op.payment.method == CaptureMethod.CAPTURE_METHOD_AUTOMATIC:
            shown = self.world.run(self.world.caller.payment(op.payment.payment_id))
            operation_id = shown.operations[-1].operation_id
        op.payment.end(op, state, operation_id)

    def _frozen(self, op: Op, answer: Any) -> None:
        """The first frozen answer of a call is its answer for ever."""
        if answer.operation.state in FROZEN:
            data = bytes_without_replay(answer)
            assert op.frozen in (None, data), (answer, op)
            op.frozen = data


def _refuses(token: str) -> bool:
    return "_declined" in token or token == "tok_partial_approval"


def _follow_up(method: str, payment: Model, **fields: Any) -> Op:
    request = getattr(rpc, f"{method}Request")(
        idempotency_key=new_key(), payment_id=payment.payment_id, **fields
    )
    return Op(method, request, payment)


@contextmanager
def _world(postgres: PostgresForTests, profile: str) -> Iterator[World]:
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        system = stack.enter_context(
            running_system(
                postgres,
                redis,
                profile=profile,
                # Recovery takes over what a dead gateway left as soon as it may.
                send_window_s=SEND_WINDOW_S,
                simulator_answer_timeout_s=1.5,
                recover_margin_s=0.1,
                recovery_interval_ms=20,
                recovery_first_check_s=0,
                recovery_backoff_s_min=0.02,
                recovery_backoff_s_max=0.1,
                recovery_waiting_interval_s_max=0.1,
                recovery_lease_s=1,
                trusted_front=True,
            )
        )
        runner = stack.enter_context(asyncio.Runner())
        world = World(system, redis, runner)
        try:
            world.run(world.start())
            yield world
        finally:
            world.run(world.kill())


@pytest.mark.parametrize("profile", PROFILES)
def test_random_operations_and_faults_leave_every_payment_as_the_model_says(
    postgres: PostgresForTests, profile: str
) -> None:
    with _world(postgres, profile) as world:

        @seed(PROFILES[profile])
        class MachineOfWorld(Machine):
            def __init__(self) -> None:
                super().__init__(world)

        run_state_machine_as_test(
            MachineOfWorld,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                database=None,
                # Shrinking would need hundreds of runs; fifteen steps can be read.
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        world.run(settled(world.system))
        check(world.system, *world.clients)
