"""The gateway dies while a customer is at the bank; the next one finds what the customer did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
from payments.v1 import payment_method_pb2, payment_pb2

from tests.faults.checker import settled
from tests.faults.transports import alternating
from tests.harness import authorize_request, bytes_without_replay, calling, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests


@alternating(outcome=("approve", "decline", "later"))
async def test_customer_who_pays_while_no_gateway_lives_is_found(
    postgres: PostgresForTests, redis: EmbeddedRedis, outcome: str, transport: str
) -> None:
    with running_system(postgres, redis, transport=transport, trusted_front=True) as system:
        first = system.start_gateway()
        request = authorize_request(
            capture_method="AUTOMATIC", return_url="https://shop.example/back"
        )
        request.payment_method.redirect.CopyFrom(
            payment_method_pb2.RedirectPaymentMethod(method_type="ideal")
        )
        async with calling(first, system.shop.api_key) as caller:
            answer = await caller.call("AuthorizePayment", request)
        assert answer.operation.state == payment_pb2.OPERATION_STATE_REQUIRES_ACTION
        first.kill()
        page = answer.operation.next_action.redirect_url
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{page}/{outcome}", allow_redirects=False) as pressed,
        ):
            assert pressed.status == 303
        async with calling(system.start_gateway(), system.shop.api_key) as caller:
            await settled(system)
            found = await caller.operation(operation_id=answer.operation.operation_id)
            repeated = await caller.call("AuthorizePayment", request)
        paid = outcome != "decline"
        assert found.operation.state == (
            payment_pb2.OPERATION_STATE_SUCCEEDED if paid else payment_pb2.OPERATION_STATE_DECLINED
        )
        # The repeat is answered as the first call was, and charges nothing.
        assert bytes_without_replay(repeated) == bytes_without_replay(answer)
        assert [each.captured_minor for each in system.standing()] == ([1000] if paid else [])
