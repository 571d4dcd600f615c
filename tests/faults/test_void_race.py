"""A void that two recoverers send at once: the refusal of one does not undo the other's success."""

from __future__ import annotations

from typing import TYPE_CHECKING

from payments.v1.payment_service_pb2 import VoidPaymentRequest

from gateway.domain.model import OperationState as S
from tests.faults.checker import Client, check, settled
from tests.faults.transports import start_on_both
from tests.harness import authorize_request, calling, new_key, running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests


async def test_a_void_refused_because_another_recoverer_has_sent_it_meanwhile_is_a_success(
    postgres: PostgresForTests, redis: EmbeddedRedis
) -> None:
    with running_system(
        postgres,
        redis,
        profile="non_idempotent",
        recovery_lease_s=1,
        simulator_answer_timeout_s=8,
        recovery_first_check_s=3,  # not before its requests are held
    ) as system:
        first, _ = start_on_both(system)
        async with calling(first, system.shop.api_key) as caller:
            client = Client(caller)
            authorized = await client.call(
                "AuthorizePayment", authorize_request(token="tok_void_reset_before_charge")
            )
            control = system.control
            void = VoidPaymentRequest(
                idempotency_key=new_key(), payment_id=authorized.payment.payment_id
            )
            await client.call("VoidPayment", void)  # in doubt, without effect
            await control.hold(kind="void")
            # The lease of the first recoverer runs out while its request is held.
            await control.await_held(2)
            await control.release()
            await control.close()
            await settled(system)
        [row] = system.fetch("SELECT state FROM operations WHERE kind = 3")
        assert S(row["state"]) is S.SUCCEEDED
        check(system, client)
