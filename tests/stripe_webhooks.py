"""A merchant's account at Stripe's double whose webhooks reach a gateway, for tests."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.connector_accounts import KEY, add_account, notifications_url
from tests.harness import (
    START_TIMEOUT_S,
    Caller,
    GatewayProcess,
    System,
    calling,
    running_system,
)
from tests.stripe_double import SECRET_KEY, StripePsp, stripe_psp
from tests.stripe_events import event_of, sign

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

SECRET = "whsec_0123456789abcdef"
OLD_SECRET = "whsec_fedcba9876543210"
CREDENTIALS = {"secret_key": SECRET_KEY, "webhook_secrets": f"{SECRET} {OLD_SECRET}"}


@dataclass
class Stripe:
    """Stripe's double, its webhooks' sender, and a merchant's account there."""

    psp: StripePsp
    system: System
    account_id: str
    url: str
    """Where the gateway takes what Stripe tells."""
    http: aiohttp.ClientSession

    async def tell(
        self, type_: str, told: dict[str, Any], event_id: str, *, secret: str = SECRET
    ) -> int:
        """Send an event; the status."""
        body = event_of(type_, told, event_id=event_id, at_s=int(time.time()))
        headers = {
            "Stripe-Signature": sign(body, secret, int(time.time())),
            "Content-Type": "application/json; charset=utf-8",
        }
        async with self.http.post(self.url, data=body, headers=headers) as answer:
            return answer.status

    def applied(self, event_id: str) -> list[Any]:
        """(payment's id, result) of an event that is done with."""
        return self.system.fetch(
            "SELECT payment_id, result FROM notifications"
            " WHERE event_id = $1 AND result IS NOT NULL",
            event_id,
        )


@asynccontextmanager
async def stripe(
    postgres: PostgresForTests, redis: EmbeddedRedis, **settings: Any
) -> AsyncIterator[tuple[Stripe, Caller, GatewayProcess]]:
    """A gateway whose payments go to Stripe's double, and which recovery leaves alone but for what
    is told."""
    async with stripe_psp() as psp:
        with running_system(
            postgres,
            redis,
            stripe_url=psp.way.url,
            connector_keys=KEY,
            notifications_address="127.0.0.1:0",
            recovery_first_check_s=3600,
            **settings,
        ) as system:
            account_id = await add_account(
                system.dsn, system.shop.merchant_id, "stripe", CREDENTIALS
            )
            gateway = await asyncio.to_thread(system.start_gateway)
            url = await notifications_url(gateway, "stripe", account_id)
            timeout = aiohttp.ClientTimeout(total=START_TIMEOUT_S)
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                calling(gateway, system.shop.api_key) as caller,
            ):
                yield Stripe(psp, system, account_id, url, http), caller, gateway
