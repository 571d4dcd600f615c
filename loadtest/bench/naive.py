"""The baseline: the same authorization without batching, as one would write it first.

Each request has its own round trips: it claims its key in Redis, writes its intent in a transaction
from a pool, asks the PSP, writes its outcome in another transaction and its answer to Redis. All
else is the gateway's own: the server on grpc.aio and uvloop, authentication, validation, decisions,
encoding, tables, metrics and logs. What the gateway does beyond that (waiting for a duplicate's
answer, recovery, admission) is left out, to the baseline's advantage. Only AuthorizePayment works.
"""

import asyncio
import logging
import signal
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from importlib import resources
from typing import Final, cast

import asyncpg
from redis.asyncio import Redis

from gateway.application.commands import Answer, Authorize
from gateway.application.ports import Connector, Encoder
from gateway.application.requests import connector_request
from gateway.composition import run_loop, server_options
from gateway.connectors.registry import ConnectorRegistry
from gateway.connectors.simulator.latency import Latency
from gateway.domain import decisions, ids
from gateway.domain.decisions import Begun, Origin
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import ConnectorAnswer
from gateway.rpc.auth import Authenticator, AuthLimits
from gateway.rpc.conversion import ContractEncoder
from gateway.rpc.server import GrpcServer
from gateway.rpc.service import PaymentService, RpcLimits, UseCases
from gateway.settings import Settings, load_settings
from gateway.telemetry.logs import configure_logging
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.observer import RpcObserver
from loadtest.bench.psp import InProcessPsp
from storage.postgres.accounts import Accounts
from storage.postgres.rows import outcome_json

POOL_SIZE: Final = 32
"""Connections to PostgreSQL: sixteen transactions at once for each of two cores."""
REDIS_CONNECTIONS_MAX: Final = 1000
"""One for each call under way; there are never so many."""

_log = logging.getLogger(__name__)


def _sql(name: str) -> str:
    return resources.files(__package__).joinpath("sql", f"{name}.sql").read_text("utf-8")


_INSERT_OPERATION = _sql("insert_operation")
_INSERT_PAYMENT = _sql("insert_payment")
_UPDATE_PAYMENT = _sql("update_payment")
_UPDATE_OPERATION = _sql("update_operation")
_INSERT_EVENT = _sql("insert_event")
_FIND_BY_KEY = _sql("find_by_key")


class NaivePayments:
    """AuthorizePayment, one request at a time."""

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        redis: Redis,
        router: ConnectorRegistry,
        encoder: Encoder,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._pool = pool
        self._redis = redis
        self._router = router
        self._encoder = encoder
        self._metrics = metrics
        self._settings = settings
        self._begun: set[asyncio.Task[Answer]] = set()

    async def authorize(self, command: Authorize) -> Answer:
        """Authorize. Raises GatewayError where the call is refused.

        It ends whatever its caller does, as the gateway's calls do: each round ends with calls that
        are cancelled, and commands hung on redis-py's connections that a cancellation had met.
        """
        task = asyncio.get_running_loop().create_task(self._authorize(command))
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    async def _authorize(self, command: Authorize) -> Answer:
        name = f"idem:{command.merchant_id}:{command.idempotency_key}"
        claimed = await self._redis.set(name, b"", nx=True, px=self._settings.claim_life_ms)
        if not claimed:
            return await self._repeat(command)
        route = self._router.route(command.merchant_id, command.mode)
        if route is None:
            raise GatewayError(Reason.CONNECTOR_UNAVAILABLE, "No connector serves the merchant.")
        begun = decisions.begin_authorization(
            Origin(
                ids.new_operation_id(),
                command.idempotency_key,
                command.fingerprint,
                command.request_id,
                command.merchant_transaction_id,
            ),
            merchant_id=command.merchant_id,
            payment_id=ids.new_payment_id(),
            mode=command.mode,
            amount_minor=command.amount_minor,
            currency=command.currency,
            capture_method=command.capture_method,
            connector=route.connector.name,
            connector_account_id=route.connector_account_id,
            merchant_order_id=command.merchant_order_id,
            allow_partial_approval=command.allow_partial_approval,
            details=command.details,
        )
        if not await self._write_intent(begun, route.connector):
            return await self._repeat(command)
        answer = await self._send(begun, route.connector)
        response = await self._write_outcome(begun, answer)
        await self._redis.set(name, response, ex=self._settings.replay_cache_life_s)
        return Answer(response, False, "", begun.payment.payment_id)

    async def _repeat(self, command: Authorize) -> Answer:
        row = await self._pool.fetchrow(_FIND_BY_KEY, command.merchant_id, command.idempotency_key)
        if row is None or row["response"] is None:
            raise GatewayError(Reason.IDEMPOTENCY_KEY_IN_FLIGHT, "The call is in progress.")
        if row["fingerprint"] != command.fingerprint:
            raise GatewayError(Reason.IDEMPOTENCY_KEY_REUSED, "The key has another payload.")
        return Answer(row["response"], True, row["request_id"], row["payment_id"])

    async def _write_intent(self, begun: Begun, connector: Connector) -> bool:
        """Whether the key was free."""
        operation, payment, attempt = begun.operation, begun.payment, begun.operation.attempt
        recover_after_s = (
            self._settings.send_window_s
            + connector.capabilities.answer_timeout_s
            + self._settings.recover_margin_s
        )
        async with self._pool.acquire() as connection, connection.transaction():
            created_at = await connection.fetchval(
                _INSERT_OPERATION,
                operation.merchant_id,
                operation.operation_id,
                operation.payment_id,
                operation.kind,
                operation.origin,
                operation.state,
                operation.amount_minor,
                operation.currency,
                operation.epoch,
                operation.final,
                operation.idempotency_key,
                operation.fingerprint,
                operation.request_id,
                operation.merchant_transaction_id,
                attempt.number,
                attempt.connector,
                attempt.connector_account_id,
                attempt.delivery,
                recover_after_s,
            )
            if created_at is None:
                return False
            await connection.execute(
                _INSERT_PAYMENT,
                payment.merchant_id,
                payment.payment_id,
                payment.mode,
                payment.state,
                payment.currency,
                payment.capture_method,
                payment.requested_minor,
                payment.connector,
                payment.connector_account_id,
                payment.version,
                payment.merchant_order_id,
                payment.allow_partial_approval,
                payment.details,
            )
        operation.created_at = payment.created_at = created_at
        return True

    async def _send(self, begun: Begun, connector: Connector) -> ConnectorAnswer:
        sent = time.monotonic()
        request = connector_request(self._encoder, begun.operation, begun.payment, None)
        answer = await connector.send(request, sent + self._settings.send_window_s)
        self._metrics.connector_called(
            connector.name, begun.operation.kind, answer, time.monotonic() - sent
        )
        return answer

    async def _write_outcome(self, begun: Begun, answer: ConnectorAnswer) -> bytes:
        settled = decisions.settle(
            begun.payment, begun.operation, answer, datetime.now(UTC), ids.new_operation_id()
        )
        if settled is None:
            raise GatewayError(Reason.INTERNAL, "The answer does not fit the operation.")
        operation, payment, attempt = settled.operation, settled.payment, settled.operation.attempt
        event_id = ids.new_event_id()
        event_type = f"{operation.kind.name}.{operation.state.name}".lower()
        response, event = self._encoder.change(event_id, event_type, operation, payment)
        async with self._pool.acquire() as connection, connection.transaction():
            written = await connection.fetchval(
                _UPDATE_PAYMENT,
                payment.merchant_id,
                payment.payment_id,
                payment.version,
                payment.state,
                payment.authorized_minor,
                payment.captured_minor,
                payment.connector_transaction_id,
                payment.auth_code,
                payment.network_transaction_id,
                payment.authorization_expires_at,
                payment.updated_at,
            )
            changed = await connection.fetchval(
                _UPDATE_OPERATION,
                operation.merchant_id,
                operation.operation_id,
                operation.state,
                operation.reason,
                attempt.delivery,
                attempt.connector_transaction_id,
                outcome_json(attempt.outcome),
                attempt.processing_ms,
                response,
                operation.updated_at,
                begun.operation.epoch,
                begun.operation.state,
            )
            if written is None or changed is None:
                raise GatewayError(Reason.INTERNAL, "Somebody else changed the payment.")
            await connection.execute(
                _INSERT_EVENT,
                payment.merchant_id,
                payment.payment_id,
                payment.version,
                event_id,
                event_type,
                event,
            )
        return response


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    dsn = settings.postgres_dsn.get_secret_value()
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            asyncpg.create_pool(dsn, min_size=POOL_SIZE, max_size=POOL_SIZE)
        )
        redis: Redis = Redis.from_url(
            settings.redis_url.get_secret_value(), max_connections=REDIS_CONNECTIONS_MAX
        )
        stack.push_async_callback(redis.aclose)
        accounts = await stack.enter_async_context(Accounts.connect(dsn))
        metrics = Metrics()
        service = PaymentService(
            cast(
                "UseCases",
                NaivePayments(
                    pool,
                    redis,
                    ConnectorRegistry([InProcessPsp(Latency())]),
                    ContractEncoder(),
                    metrics,
                    settings,
                ),
            ),
            Authenticator(accounts.load_key, AuthLimits(life_s=settings.auth_cache_life_s)),
            RpcObserver(metrics, settings.log_successes_per_s_max, settings.log_refusals_per_s_max),
            RpcLimits(message_bytes_max=settings.message_bytes_max),
        )
        server = GrpcServer(service, server_options(settings))
        await server.start()
        _log.info("serving", extra={"address": server.address, "transport": settings.transport})
        await stop.wait()
        await server.drain(settings.drain_grace_s)


def main() -> None:
    """Serve, as the GATEWAY_* variables say."""
    settings = load_settings()
    configure_logging(settings.log_level)
    run_loop(_serve(settings))


if __name__ == "__main__":
    main()
