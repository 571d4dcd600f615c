"""The main job on real input: gRPC from another process, real servers, a PSP in a third process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from payments.v1 import payment_pb2

from tests.harness import bytes_without_replay, calling, new_key, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests


@pytest.mark.parametrize("transport", ["grpcio", "native"])
async def test_a_payment_goes_from_the_contract_to_a_durable_commit(
    postgres: PostgresForTests, redis: EmbeddedRedis, transport: str
) -> None:
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway(transport=transport, trusted_front=True)
        async with calling(gateway, system.shop.api_key) as caller:
            key = new_key()
            first = await caller.authorize(idempotency_key=key)
            assert first.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
            assert not first.HasField("replay")
            again = await caller.authorize(idempotency_key=key)
            assert again.replay.replayed
            assert bytes_without_replay(again) == bytes_without_replay(first)

            payment_id = first.payment.payment_id
            captured = await caller.capture(payment_id, 600)
            assert captured.payment.state == payment_pb2.PAYMENT_STATE_PARTIALLY_CAPTURED
            refunded = await caller.refund(payment_id, 100)
            assert refunded.payment.amounts.refunded_minor == 100
            voided = await caller.void(payment_id)
            assert voided.payment.amounts.voided_minor == 400
            shown = await caller.payment(payment_id)
            kinds = [operation.kind for operation in shown.operations]
            assert kinds == [1, 2, 4, 3]

        [standing] = system.standing()
        assert (standing.captured_minor, standing.refunded_minor) == (600, 100)
        assert gateway.stop() == 0
        assert system.unfinished() == []
