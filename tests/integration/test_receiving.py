"""gateway.rpc.receiving: what grpc.aio has begun to receive, it finishes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from gateway.rpc import receiving
from gateway.rpc.receiving import finish_cancelled_receives
from tests.chaos.bad_clients import RESETS_OF_CONNECTION, Attack, Orders
from tests.harness import SERVICE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS = 3
WAITS_FOR_EVER = "HandleExceptions[test]"


async def _answer(request: bytes, _context: object) -> bytes:
    return request


class Receives:
    """grpc.aio's `execute_batch`, with counts of its receives."""

    def __init__(self, execute_batch: Callable[..., Any]) -> None:
        self._execute_batch = execute_batch
        self.begun = 0
        self.finished = 0

    async def __call__(self, call: Any, operations: tuple[Any, ...], loop: Any) -> None:
        receives = isinstance(operations[0], cygrpc.ReceiveMessageOperation)
        self.begun += receives
        await self._execute_batch(call, operations, loop)
        self.finished += receives


@pytest.fixture
def receives(monkeypatch: pytest.MonkeyPatch) -> Receives:
    original = cygrpc.execute_batch
    counted = Receives(getattr(original, "_original", original))
    monkeypatch.setattr(cygrpc, "execute_batch", counted)
    finish_cancelled_receives()
    return counted


async def test_receives_of_calls_that_are_reset_before_their_message_are_finished(
    receives: Receives,
) -> None:
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "AuthorizePayment": grpc.unary_unary_rpc_method_handler(_answer)
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        attack = Attack(Orders(f"127.0.0.1:{port}", "key", 1, 0, 0))
        await attack.repeat("reset", CONNECTIONS)
        assert attack.statuses["reset"]["SURVIVED"] == CONNECTIONS * RESETS_OF_CONNECTION
        await eventually(lambda: receives.begun > 0, "a reset call is received")
        await eventually(lambda: receives.finished == receives.begun, "all are finished")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                f"/{SERVICE.full_name}/AuthorizePayment"
            )
            assert await call(b"request") == b"request"
    finally:
        await server.stop(0)


async def _receive(operations: tuple[Any, ...]) -> None:
    await cygrpc.execute_batch(None, operations, asyncio.get_running_loop())


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Future[None]]:
    """What receives wait for, which are none of grpc.aio's."""
    futures: list[asyncio.Future[None]] = []

    async def execute_batch(_call: object, _operations: object, loop: Any) -> None:
        futures.append(loop.create_future())
        await futures[-1]

    monkeypatch.setattr(cygrpc, "execute_batch", execute_batch)
    finish_cancelled_receives()
    return futures


async def test_a_calls_task_is_cancelled_after_its_receive(
    waiting: list[asyncio.Future[None]],
) -> None:
    operations = (cygrpc.ReceiveMessageOperation(0),)
    task = asyncio.create_task(_receive(operations), name=WAITS_FOR_EVER)
    await eventually(lambda: bool(waiting), "it is waited for")
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    waiting[0].set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_receive_that_does_not_end_is_given_up(
    waiting: list[asyncio.Future[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "_WAIT_S_MAX", 0.0)
    operations = (cygrpc.ReceiveMessageOperation(0),)
    task = asyncio.create_task(_receive(operations), name=WAITS_FOR_EVER)
    await eventually(lambda: bool(waiting), "it is waited for")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting[0].cancelled()


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("ours", cygrpc.ReceiveMessageOperation(0)),
        (WAITS_FOR_EVER, cygrpc.ReceiveCloseOnServerOperation(0)),
    ],
    ids=["a task of ours", "no receive"],
)
async def test_all_else_is_cancelled_at_once(
    waiting: list[asyncio.Future[None]], name: str, operation: Any
) -> None:
    task = asyncio.create_task(_receive((operation,)), name=name)
    await eventually(lambda: bool(waiting), "it is waited for")
    task.cancel()
    assert waiting[0].cancelled()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_what_is_wrapped_already_is_not_wrapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cygrpc, "execute_batch", cygrpc.execute_batch)
    finish_cancelled_receives()
    wrapped = cygrpc.execute_batch
    finish_cancelled_receives()
    assert cygrpc.execute_batch is wrapped


def test_a_grpcio_that_is_made_otherwise_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cygrpc, "execute_batch")
    finish_cancelled_receives()
    assert not hasattr(cygrpc, "execute_batch")
