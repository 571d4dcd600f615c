"""The composition root: the one place that opens connections and puts the parts together."""

import asyncio
import gc
import logging
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
import click
import uvloop

from gateway import __version__
from gateway.application import applying
from gateway.application.accounts import Scope, parse_key
from gateway.application.administration import Administration
from gateway.application.admission import Admission, AdmissionLimits, open_gates
from gateway.application.events import Events
from gateway.application.events import Schedule as EventSchedule
from gateway.application.notifications import Received
from gateway.application.ports import Connector, StoreUnavailable
from gateway.application.recovery import Recovery, Schedule
from gateway.application.refreshing import in_background, refresh_forever
from gateway.application.routing import Routing, RuleBook
from gateway.application.routing_administration import RoutingAdministration
from gateway.application.routing_controls import RoutingControls
from gateway.application.telling import Telling
from gateway.application.usecases import Limits, Payments
from gateway.application.verification import Audit
from gateway.connectors.accounts import AccountBook
from gateway.connectors.configured import (
    ConnectorsMisconfigured,
    configured_keys,
    configured_kinds,
    configured_sources,
)
from gateway.connectors.http import Limits as HttpLimits
from gateway.connectors.registry import ConnectorRegistry
from gateway.connectors.simulator.connector import ProfileMismatch, SimulatorConnector
from gateway.connectors.simulator.launch import SimulatorFailed
from gateway.connectors.simulator.profiles import PROFILES
from gateway.heap import share_one_heap
from gateway.jwks import read_jwks
from gateway.local import LocalServers, LocalState, LocalStateUnusable, write_state
from gateway.receiver import Receiver, ReceiverLimits
from gateway.routing.availability import AccountAvailability
from gateway.routing.breakers import BreakerLimits, Breakers
from gateway.routing.costs import CostBook
from gateway.routing.learning import LearningLimits, SuccessRanking
from gateway.rpc.admin import AdminService
from gateway.rpc.auth import Authenticator, AuthLimits
from gateway.rpc.conversion import ContractEncoder
from gateway.rpc.decoding import ContractDecoder
from gateway.rpc.events import EventService, StreamLimits
from gateway.rpc.peers import PeerIdentities
from gateway.rpc.routing import RoutingService
from gateway.rpc.server import GrpcServer, ServerOptions
from gateway.rpc.service import Observer, PaymentService, RpcLimits
from gateway.rpc.tokens import KeyLimits, SigningKeys, TokenRules, TokenVerifier
from gateway.settings import Settings, algorithms_of, load_settings
from gateway.telemetry.http import MetricsServer
from gateway.telemetry.logs import loop_exception_handler
from gateway.telemetry.loop import sample_lag
from gateway.telemetry.merging import Encode
from gateway.telemetry.metrics import MeasuredOccupancy, Metrics
from gateway.telemetry.observer import MerchantObserver, RpcObserver
from gateway.telemetry.setup import start_logging
from gateway.workers import WorkersFailed, run_workers
from storage.embedded import EmbeddedServerError
from storage.postgres import (
    Accounts,
    LaneLimits,
    NotDurable,
    PostgresStore,
    SchemaError,
    row_security,
)
from storage.postgres.migrate import MigrationBusy, MigrationChanged, migrate
from storage.postgres.store import NOTIFICATIONS
from storage.redis import Claims, Reattempts, RedisBreakers, RedisClient, RedisCounts

if TYPE_CHECKING:
    from gateway.telemetry.tracing import Tracing

EVENT_LAG_INTERVAL_S: Final = 10.0
"""How often the events' consumers are looked at."""
REDIS_LOOK_INTERVAL_S: Final = 10.0
"""How often Redis is looked at, which otherwise calls alone do."""
EVENT_CONSUMERS_SHOWN_MAX: Final = 100
"""So many consumers have metrics, those that have not acknowledged for longest."""
COUNT_INTERVALS: Final = 5
"""What waits in the database is counted so many times as seldom as readiness looks at it."""
CLOSE_S_MAX: Final = 3.0
"""How long the end of the gateway waits, after its graces, for what PostgreSQL has yet to take: a
part of `gateway.workers.STOP_MARGIN_S`. Outcomes alone would be tried for longer."""
LEARNING_INTERVALS: Final = 5
"""Counts of success are exchanged so many times as seldom as breakers' states."""
ROUTING_REDIS_TIMEOUT_MS: Final = 1000.0
"""How long Redis may take over what processes tell each other; nobody waits for it."""
FINGERPRINT_VERSION: Final = "f1"
"""Part of the claims' generation: another encoding of fingerprints is another cache."""

_GC_THRESHOLDS: Final = (20_000, 20, 50)
"""How many objects more than a while ago, and then how many younger collections, before each
generation is looked through. Python's own are 700, 10 and 10."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StartError(Exception):
    """The gateway cannot start; the text says why and what to do."""


class Gateway:
    """Everything that one process runs, from the stores to the door.

    `connectors` are served beside those that the settings name, and closed with the gateway.
    """

    def __init__(self, settings: Settings, connectors: Sequence[Connector] = ()) -> None:
        self.settings = settings
        self._given_connectors = connectors
        self.metrics = Metrics(_trace_id_source(settings))
        self.ready = False
        """Whether calls are served: started, not draining, and the database is there."""
        self.metrics.watch_readiness(lambda: self.ready)
        self._receiver: Receiver | None = None
        self._stack = AsyncExitStack()
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the stores, check them, and open the door. Raises StartError."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings, stack = self.settings, self._stack
        tracing = open_tracing(settings)
        if tracing is not None:
            stack.push_async_callback(tracing.close)  # after all that makes spans
        try:
            redis = RedisClient(
                settings.redis_url.get_secret_value(),
                timeout_ms=settings.redis_timeout_ms,
                connect_timeout_ms=settings.redis_connect_timeout_ms,
            )
        except ValueError as error:
            raise StartError(f"GATEWAY_REDIS_URL: {error}") from error
        stack.push_async_callback(redis.close)
        self.claims = Claims(
            redis,
            buckets=settings.redis_buckets,
            claim_life_ms=settings.claim_life_ms,
            cache_life_s=settings.replay_cache_life_s,
            cache_bytes_max=settings.replay_cache_bytes_max,
            timeout_ms=settings.redis_timeout_ms,
            retry_after_ms=settings.redis_retry_after_ms,
            linger_ms_max=self._linger_ms_max,
            metrics=self.metrics,
            tracer=tracing,
        )
        await self.claims.start()
        stack.push_async_callback(self.claims.close)

        await self._check_row_security()
        self.store = await stack.enter_async_context(self._open_store(tracing))
        self.metrics.watch_pools(self.store.pools)
        self.metrics.watch_queues({**self.claims.queues, **self.store.queues})
        await self._check_store()

        self.connector_accounts = await self._open_accounts(tracing)
        self.connectors = ConnectorRegistry(
            await self._open_connectors(tracing), self.connector_accounts
        )
        stack.push_async_callback(self.connectors.close)
        routing = await self._open_routing(redis)
        encoder = ContractEncoder()
        admission = open_gates(self._admission_limits())
        self.metrics.watch_admission(admission)
        self.payments = Payments(
            self.store if tracing is None else tracing.store(self.store),
            self.claims if tracing is None else tracing.claims(self.claims),
            self.connectors,
            encoder,
            self._limits(),
            self.metrics,
            MeasuredOccupancy(admission.payments, self.metrics),
            routing,
        )
        self.service = PaymentService(
            self.payments if tracing is None else tracing.use_cases(self.payments),
            Authenticator(
                self.store.accounts.load_key,
                AuthLimits(
                    life_s=settings.auth_cache_life_s,
                    negative_life_s=settings.auth_negative_life_s,
                    entries_max=settings.auth_cache_entries_max,
                ),
                tokens=self._open_tokens(),
                load_merchants=self.store.accounts.load_merchants,
                load_identity=self.store.accounts.load_identity,
            ),
            self._observer(tracing),
            RpcLimits(
                message_bytes_max=settings.message_bytes_max,
                batch_wait_s_max=settings.batch_wait_s_max,
                stream_window_items=settings.stream_window_items,
            ),
            admission,
            None
            if settings.client_identity == "none"
            else PeerIdentities(settings.client_identity),
        )
        self.recovery = Recovery(
            self.store,
            self.connectors,
            encoder,
            self.payments.outcomes,
            self._schedule(),
            self.metrics,
        )
        self.applier = self._open_applier(encoder)
        wrap = None if tracing is None else tracing.handlers
        admin = AdminService(
            self.service,
            admission.lists,
            Administration(self.store, self.payments.outcomes),
            lambda filter_: Audit(self.store.audit, ContractDecoder(), filter_),
        )
        routing_service = RoutingService(
            self.service,
            admission.lists,
            RoutingAdministration(self.store.routing_rules, self.connectors, routing, self.rules),
        )
        events = self._open_events(admission)
        self.server = GrpcServer(
            self.service, server_options(settings), wrap, admin, routing_service, events
        )
        try:
            if settings.workers == 1:  # of several workers, the supervisor serves them
                await self._serve_metrics()
            await self.server.start()
            stack.push_async_callback(self.server.drain, 0.0)  # where the rest does not start
            if settings.notifications_address:
                await self._take_notifications()
        except (OSError, RuntimeError) as error:
            raise StartError(f"The gateway cannot listen: {error}") from error
        self.ready = True
        for name, work in (*self._background_work(), *self._routing_work()):
            self._background.append(in_background(name, work))

    def _open_events(self, admission: Admission) -> EventService:
        """Streams of events; the tail that they share is read in the background."""
        settings = self.settings
        self.events = Events(
            self.store.events,
            self.store.events,
            ContractDecoder().mode_of_event,
            EventSchedule(
                poll_s_min=settings.events_poll_ms_min / 1000,
                poll_s_max=settings.events_poll_ms_max / 1000,
                heartbeat_s=settings.events_heartbeat_s,
                kept_bytes_max=settings.events_kept_bytes_max,
            ),
            self.metrics,
        )
        limits = StreamLimits(
            streams_max=settings.events_streams_max,
            of_organisation_max=settings.events_organisation_streams_max,
        )
        service = EventService(self.service, admission.lists, self.events, limits)
        self.metrics.watch_event_streams(lambda: service.streams)
        return service

    def _background_work(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """What goes on in the background, by its name."""
        settings = self.settings
        if settings.recovery_enabled:
            yield "recovery", self.recovery.run()
        if settings.applies_notifications:
            yield "notifications", self.applier.run()
            yield "telling", self.telling.run()
        yield "readiness", self._watch_readiness()
        yield "counts", self._count_what_waits()
        accounts_interval_s = settings.connector_accounts_interval_s
        yield "connector-accounts", self.connector_accounts.run(accounts_interval_s)
        yield "events", self.events.run()
        yield (
            "event-lag",
            refresh_forever("the events' consumers", self._look_at_events, EVENT_LAG_INTERVAL_S),
        )
        yield "redis", refresh_forever("Redis", self._look_at_redis, REDIS_LOOK_INTERVAL_S)
        yield "loop-lag", sample_lag(self.metrics.loop_lagged)

    def _open_applier(self, encoder: ContractEncoder) -> applying.Applier:
        settings = self.settings
        return applying.Applier(
            self.store.notifications,
            self.store,
            self.connectors,
            self.connector_accounts,
            encoder,
            self.payments.outcomes,
            applying.Schedule(
                interval_s=settings.notifications_interval_ms / 1000,
                lease_s=settings.recovery_lease_s,
                batch_max=settings.recovery_batch_max,
                concurrency_max=settings.recovery_concurrency,
                account_concurrency_max=settings.recovery_account_concurrency,
                backoff_s_min=settings.recovery_backoff_s_min,
                backoff_s_max=settings.recovery_backoff_s_max,
            ),
            self.metrics,
        )

    async def _keep(self, received: Sequence[Received]) -> int:
        new = await self.store.notifications.keep(received)
        if new:
            self.applier.wake()
        return new

    async def _take_notifications(self) -> None:
        """Open the door for what PSPs tell."""
        settings = self.settings
        receiver = Receiver(
            self.connector_accounts.notified,
            configured_sources(settings),
            self._keep,
            ReceiverLimits(
                body_bytes_max=settings.notifications_body_bytes_max,
                timeout_s=settings.notifications_timeout_s,
                connections_max=settings.notifications_connections_max,
                in_flight_max=settings.notifications_in_flight_max,
                per_s_max=settings.notifications_per_s_max,
                stop_s_max=settings.drain_grace_s,
            ),
            self.metrics,
            settings.notifications_address,
            share_port=settings.workers > 1,
        )
        await receiver.start()
        self._stack.push_async_callback(receiver.stop)
        _log.info("notifications are taken", extra={"port": receiver.port})
        self._receiver = receiver

    async def _open_routing(self, redis: RedisClient) -> Routing:
        """What new payments are routed by; all of it is kept up to date in the background."""
        settings = self.settings
        self.rules = await self._open_rules()
        self.breakers = Breakers(
            BreakerLimits(
                window_s=settings.breaker_window_s,
                calls_min=settings.breaker_calls_min,
                failure_share=settings.breaker_failure_percent / 100,
                slow_share=settings.breaker_slow_percent / 100,
                slow_factor=settings.breaker_slow_factor,
                slow_s_max=settings.breaker_slow_s_max,
                pause_s_min=settings.breaker_pause_s_min,
                pause_s_max=settings.breaker_pause_s_max,
                probes_max=settings.breaker_probes,
                probes_good=settings.breaker_probes,
            ),
            self.metrics,
        )
        self.metrics.watch_breakers(self.breakers)
        breakers = self.breakers if settings.breaker_enabled else None
        availability = AccountAvailability(breakers)
        costs = CostBook()
        self.ranking = SuccessRanking(
            LearningLimits(
                half_life_s=settings.learning_half_life_s,
                exploration_share=settings.learning_exploration_percent / 100,
                segments_max=settings.learning_segments_max,
            ),
            costs,
        )
        self.routing_controls = RoutingControls(self.store.routing_controls, availability, costs)
        try:
            await self.routing_controls.refresh()
        except StoreUnavailable as error:
            raise StartError(str(error)) from error
        return Routing(
            self.connectors,
            rules=self.rules,
            availability=availability,
            ranking=self.ranking,
            observer=breakers,
            learner=self.ranking,
            reattempts=Reattempts(redis, settings.redis_buckets),
        )

    def _routing_work(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """What goes on in the background for routing, by its name."""
        settings = self.settings
        # Not the claims' connection: there an answer that is late ends all that wait behind it.
        redis = RedisClient(
            settings.redis_url.get_secret_value(),
            timeout_ms=ROUTING_REDIS_TIMEOUT_MS,
            connect_timeout_ms=ROUTING_REDIS_TIMEOUT_MS,
        )
        self._stack.push_async_callback(redis.close)
        interval_s = settings.routing_exchange_interval_s
        yield "routing-rules", self.rules.run(settings.connector_accounts_interval_s)
        yield "routing-controls", self.routing_controls.run(settings.connector_accounts_interval_s)
        if settings.breaker_enabled:
            yield "breakers", self.breakers.run(RedisBreakers(redis), interval_s)
        learning_s = LEARNING_INTERVALS * interval_s
        yield "learning", self.ranking.run(RedisCounts(redis), learning_s)

    def _open_tokens(self) -> TokenVerifier | None:
        settings = self.settings
        if not settings.jwt_issuer:
            return None

        async def read() -> bytes:
            return await read_jwks(
                settings.jwt_jwks_url, settings.jwt_jwks_file, settings.jwt_jwks_timeout_s
            )

        rules = TokenRules(
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=algorithms_of(settings.jwt_algorithms),
            leeway_s=settings.jwt_leeway_s,
            life_s_max=settings.jwt_life_s_max,
            organisation_claim=settings.jwt_organisation_claim,
            merchants_claim=settings.jwt_merchants_claim,
            mode_claim=settings.jwt_mode_claim,
        )
        limits = KeyLimits(
            life_s=settings.jwt_jwks_life_s,
            pause_s=settings.jwt_jwks_pause_s,
            stale_s_max=settings.jwt_jwks_stale_s_max,
        )
        keys = SigningKeys(read, rules.algorithms, limits)
        self._stack.push_async_callback(keys.close)
        keys.refresh()  # the first token need not wait; an issuer that is away stops nothing
        return TokenVerifier(keys, rules)

    async def _serve_metrics(self) -> None:
        async def render(encode: Encode) -> bytes:
            return self.metrics.render(encode)

        async def ready() -> tuple[bool, str]:
            return self.ready, "ready" if self.ready else "not ready"

        http = MetricsServer(render, ready, self.settings.metrics_address)
        await http.start()
        self._stack.push_async_callback(http.stop)

    def _observer(self, tracing: "Tracing | None") -> Observer:
        settings = self.settings
        observer: Observer = RpcObserver(
            self.metrics,
            settings.log_successes_per_s_max,
            settings.log_refusals_per_s_max,
            trace_id=_trace_id_source(settings),
        )
        if settings.metrics_merchants_max:
            observer = MerchantObserver(observer, self.metrics, settings.metrics_merchants_max)
        return observer if tracing is None else tracing.observer(observer)

    @property
    def _linger_ms_max(self) -> float:
        return self.settings.batch_linger_ms_max if self.settings.transport == "grpcio" else 0.0

    @asynccontextmanager
    async def _open_store(self, tracing: "Tracing | None") -> AsyncIterator[PostgresStore]:
        settings = self.settings

        def lane(connections: int, retry_s_max: float = 1.0) -> LaneLimits:
            return LaneLimits(
                connections=connections,
                rows_max=settings.batch_rows_max,
                queue_max=settings.batch_queue_max,
                retry_s_max=retry_s_max,
                linger_ms_max=self._linger_ms_max,
            )

        store = PostgresStore(
            settings.postgres_dsn.get_secret_value(),
            intents=lane(settings.intent_connections),
            follow_ups=lane(1),
            changes=lane(settings.outcome_connections, settings.outcome_retry_s_max),
            reads=lane(settings.read_connections),
            notifications=replace(NOTIFICATIONS, queue_max=settings.notifications_queue_max)
            if settings.applies_notifications
            else None,
            connect_timeout_s=settings.postgres_connect_timeout_s,
            statement_timeout_s=settings.postgres_statement_timeout_s,
            recovery_horizon_s=settings.recovery_horizon_s,
            standby_required=settings.postgres_standby_required,
            row_security=settings.postgres_row_security,
            metrics=self.metrics,
            tracer=tracing,
            on_generation=self._set_generation,
        )
        await store.open()
        try:
            yield store
        finally:
            try:
                async with asyncio.timeout(CLOSE_S_MAX):
                    await store.close()
            except TimeoutError:
                _log.warning("what PostgreSQL has not taken by now is left to recovery")

    def _set_generation(self, generation: str) -> None:
        self.claims.set_generation(f"{generation}-{FINGERPRINT_VERSION}")

    async def _check_row_security(self) -> None:
        """Where the roles are missing, the store could not even connect, and would not say why."""
        if not self.settings.postgres_row_security:
            return
        try:
            problems = await row_security.problems(self.settings.postgres_dsn.get_secret_value())
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise StartError(
                f"PostgreSQL does not answer: {type(error).__name__}. See `python -m gateway"
                " doctor`."
            ) from error
        if problems:
            raise StartError(
                f"Row-level security does not hold: {'; '.join(problems)}. Run"
                " `gateway row-security enable` before the gateway."
            )

    async def _check_store(self) -> None:
        try:
            await self.store.check()
        except StoreUnavailable as error:
            raise StartError(
                f"PostgreSQL does not answer: {error}. See `python -m gateway doctor`."
            ) from error
        except (NotDurable, SchemaError) as error:
            raise StartError(str(error)) from error

    async def _open_accounts(self, tracing: "Tracing | None") -> AccountBook:
        self.telling = Telling(self._keep, self.settings.notifications_queue_max)
        self._stack.push_async_callback(self.telling.flush)  # after the connectors are closed
        try:
            book = AccountBook(
                self.store.connector_accounts,
                configured_kinds(self.settings, self.metrics.acquirer_event, self.telling.tell),
                configured_keys(self.settings),
                None if tracing is None else tracing.connector,
                configured_sources(self.settings),
            )
            self._stack.push_async_callback(book.close)
            await book.refresh()
        except (ConnectorsMisconfigured, StoreUnavailable) as error:
            raise StartError(str(error)) from error
        return book

    async def _open_rules(self) -> RuleBook:
        book = RuleBook(self.store.routing_rules)
        try:
            await book.refresh()
        except StoreUnavailable as error:
            raise StartError(str(error)) from error
        return book

    async def _open_connectors(self, tracing: "Tracing | None") -> list[Connector]:
        connectors = [*self._given_connectors]
        if self.settings.simulator_url:
            connectors.append(await self._open_simulator())
        if tracing is None:
            return connectors
        return [tracing.connector(connector) for connector in connectors]

    async def _open_simulator(self) -> Connector:
        settings = self.settings
        connector = SimulatorConnector(
            settings.simulator_url,
            PROFILES[settings.simulator_profile],
            answer_timeout_s=settings.simulator_answer_timeout_s,
            limits=HttpLimits(
                connections_max=settings.simulator_connections_max,
                connect_timeout_s=settings.simulator_connect_timeout_s,
            ),
            more_headers=_outgoing_headers(settings),
        )
        try:
            if not await connector.check():
                _log.warning("the PSP simulator does not answer yet")
        except ProfileMismatch as error:
            raise StartError(str(error)) from error
        return connector

    def _limits(self) -> Limits:
        settings = self.settings
        return Limits(
            send_window_s=settings.send_window_s,
            recover_margin_s=settings.recover_margin_s,
            min_send_budget_s=settings.min_send_budget_s,
            wait_s_max=settings.wait_s_max,
            wait_margin_s=settings.wait_margin_ms / 1000,
            wait_poll_s_min=settings.wait_poll_ms_min / 1000,
            wait_poll_s_max=settings.wait_poll_ms_max / 1000,
            waiters_per_key_max=settings.waiters_per_key_max,
            contention_tries_max=settings.contention_tries_max,
            first_check_s=settings.recovery_first_check_s,
            operations_per_payment_max=settings.operations_per_payment_max,
            attempts_per_operation_max=settings.attempts_per_operation_max,
            action_timeout_s=settings.action_timeout_s,
        )

    def _admission_limits(self) -> AdmissionLimits:
        settings = self.settings
        return AdmissionLimits(
            calls_max=settings.admission_calls_max,
            calls_min=settings.admission_calls_min,
            in_flight_max=settings.admission_in_flight_max,
            reads_max=settings.admission_reads_max,
            lists_max=settings.admission_lists_max,
            target_s=settings.admission_target_ms / 1000,
            bulk_target_s=settings.admission_bulk_target_ms / 1000,
            retry_after_s=settings.admission_retry_after_ms / 1000,
        )

    def _schedule(self) -> Schedule:
        settings = self.settings
        return Schedule(
            interval_s=settings.recovery_interval_ms / 1000,
            search_interval_s=settings.recovery_search_interval_ms / 1000,
            lease_s=settings.recovery_lease_s,
            batch_max=settings.recovery_batch_max,
            concurrency_max=settings.recovery_concurrency,
            account_concurrency_max=settings.recovery_account_concurrency,
            backoff_s_min=settings.recovery_backoff_s_min,
            backoff_s_max=settings.recovery_backoff_s_max,
            tries_max=settings.recovery_tries_max,
            person_interval_s=settings.recovery_person_interval_s,
            waiting_interval_s_max=settings.recovery_waiting_interval_s_max,
            action_margin_s=settings.recovery_action_margin_s,
        )

    async def _watch_readiness(self) -> None:
        """Serve only while the database can be served from.

        By nothing but the store's check: what else is asked of the database may be slow in all
        gateways at once, while each of them could serve.
        """
        while True:
            try:
                await self.store.check()
                self.ready = True
            except (StoreUnavailable, NotDurable, SchemaError) as error:
                _log.warning("not ready: %s", error)
                self.ready = False
            except Exception:  # noqa: BLE001 - or the last answer would stand, whatever becomes of the store
                _log.exception("not ready")
                self.ready = False
            await self.server.set_serving(self.ready)
            await asyncio.sleep(self.settings.readiness_interval_s)

    async def _count_what_waits(self) -> None:
        """Tell what waits in the database. A count that fails leaves its last values to stand."""
        while True:
            for what, count in self._counts():
                try:
                    await count()
                except Exception as error:  # noqa: BLE001 - no defect may end the other counts
                    self.metrics.count_failed(what)
                    known = isinstance(error, StoreUnavailable)
                    _log.warning("%s not counted: %s", what, error, exc_info=not known)
            await asyncio.sleep(COUNT_INTERVALS * self.settings.readiness_interval_s)

    def _counts(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """What is counted, by its name."""
        store, metrics = self.store, self.metrics

        async def doubts() -> None:
            metrics.operations_in_doubt(*await store.count_doubts())

        async def search() -> None:
            metrics.recovery_search_behind(await store.search_behind_s())

        async def outbox() -> None:
            metrics.outbox_rows(await store.estimate_outbox())

        async def notifications() -> None:
            metrics.notifications_pending(*await store.notifications.count_pending())

        yield "doubts", doubts
        yield "search", search
        yield "outbox", outbox
        yield "notifications", notifications  # also where nobody here applies them

    async def _look_at_events(self) -> None:
        """Tell how far the events' consumers are behind."""
        lag = self.store.event_lag
        consumers = await lag.consumers(None, None, EVENT_CONSUMERS_SHOWN_MAX)
        self.metrics.event_lag(consumers, await lag.held_back_s())

    async def _look_at_redis(self) -> None:
        """Find out whether Redis answers, also where no call asks it."""
        if self.claims.available:
            await self.claims.start()

    async def stop(self) -> None:
        """Drain: refuse new calls, finish what has begun, flush, close. Safe to repeat."""
        for task in self._background:
            task.cancel()
        self.ready = False
        await asyncio.gather(*self._background, return_exceptions=True)
        self._background.clear()
        closing = [self.server.drain(self.settings.drain_grace_s)]
        if self._receiver is not None:
            closing.append(self._receiver.stop())
        await asyncio.gather(*closing)
        try:
            async with asyncio.timeout(self.settings.drain_grace_s):
                await self.payments.drain()
        except TimeoutError:
            _log.warning("%d calls were left to recovery", self.payments.in_flight)
        await self._stack.aclose()


def open_tracing(settings: Settings) -> "Tracing | None":
    """What makes spans; None where nobody wants them, and then OpenTelemetry is not even loaded."""
    if not settings.tracing_endpoint:
        return None
    from gateway.telemetry.tracing import Tracing, TracingOptions  # noqa: PLC0415 - as it says

    return Tracing(
        TracingOptions(
            endpoint=settings.tracing_endpoint,
            sample_ratio=settings.tracing_sample_ratio,
            calls_per_s_max=settings.tracing_calls_per_s_max,
            service_name=settings.tracing_service_name,
            links_max=settings.batch_rows_max,
            merchant_id=settings.tracing_merchant_id,
        )
    )


def _trace_id_source(settings: Settings) -> Callable[[], str] | None:
    if not settings.tracing_endpoint:
        return None
    from gateway.telemetry.tracing import current_trace_id  # noqa: PLC0415 - as above

    return current_trace_id


def _outgoing_headers(settings: Settings) -> Callable[[], str] | None:
    if not settings.tracing_endpoint:
        return None
    from gateway.telemetry.tracing import outgoing_headers  # noqa: PLC0415 - as above

    return outgoing_headers


def server_options(settings: Settings) -> ServerOptions:
    """The door, as the settings say."""
    return ServerOptions(
        transport=settings.transport,
        listen_address=settings.listen_address,
        trusted_front=settings.trusted_front,
        tls_certificate_file=settings.tls_certificate_file,
        tls_key_file=settings.tls_key_file,
        tls_client_ca_file=settings.tls_client_ca_file,
        message_bytes_max=settings.message_bytes_max,
        metadata_bytes_max=settings.metadata_bytes_max,
        keepalive_time_s=settings.keepalive_time_s,
        keepalive_timeout_s=settings.keepalive_timeout_s,
        connection_age_max_s=settings.connection_age_max_s,
        connection_age_grace_s=settings.connection_age_grace_s,
        concurrent_streams_max=settings.concurrent_streams_max,
        share_port=settings.workers > 1,
    )


async def serve(
    settings: Settings,
    announce: Callable[[Gateway], None],
    stop: asyncio.Event,
    connectors: Sequence[Connector] = (),
) -> None:
    """Run a gateway until `stop`, SIGTERM or SIGINT, then drain. Raises StartError."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(loop_exception_handler)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gateway = Gateway(settings, connectors)
    await gateway.start()
    _spare_garbage_collection()
    try:
        announce(gateway)
        await stop.wait()
        _log.info("draining")
    finally:
        await gateway.stop()


def _spare_garbage_collection() -> None:
    """Look for cycles seldom, and not among what lives as long as the process.

    A call makes hundreds of objects and hardly any cycle: reference counting frees them. With
    Python's thresholds the collector takes a tenth of a busy server (docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def run_server(
    settings: Settings,
    prepare: Callable[[asyncio.AbstractEventLoop], None] | None = None,
    connectors: Sequence[Connector] = (),
) -> None:
    """`gateway serve`. `prepare` may set up the event loop before anything runs on it.

    `connectors` are served beside those that the settings name.
    """
    share_one_heap()
    start_logging(settings)

    def announce(gateway: Gateway) -> None:
        _log.info(
            "serving",
            extra={
                "version": __version__,
                "address": gateway.server.address,
                "transport": settings.transport,
            },
        )

    run_loop(serve(settings, announce, asyncio.Event(), connectors), prepare)


def run_loop(
    main: Coroutine[Any, Any, T],
    prepare: Callable[[asyncio.AbstractEventLoop], None] | None = None,
) -> T:
    """Run a server's coroutine on the event loop, and with the limits, that servers have."""
    _raise_open_files_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if prepare is not None:
            prepare(runner.get_loop())
        return runner.run(main)


def _raise_open_files_limit() -> None:
    """Allow as many sockets as the system does: calls in flight to a PSP hold one each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_local(settings: Settings) -> None:
    """`gateway run`: embedded servers where the settings name none, and a demo merchant.

    Raises StartError, and LocalStateUnusable where the folder cannot be written to.
    """
    share_one_heap()
    start_logging(settings)
    folder = Path(settings.embedded_dir)
    dsn = settings.postgres_dsn.get_secret_value()
    redis_url = settings.redis_url.get_secret_value()
    servers = LocalServers(
        folder,
        postgres=not dsn,
        redis=not redis_url,
        simulator_profile="" if settings.simulator_url else settings.simulator_profile,
    )
    try:
        state = servers.start()
    except (LocalStateUnusable, EmbeddedServerError, SimulatorFailed, OSError) as error:
        servers.stop()
        raise StartError(str(error)) from error
    try:
        settings = load_settings(
            postgres_dsn=dsn or state.postgres_dsn,
            redis_url=redis_url or state.redis_url,
            simulator_url=settings.simulator_url or state.simulator_url,
            # An option of the command, of which the environment knows nothing.
            workers=settings.workers,
        )
        state = replace(state, listen_address=settings.listen_address)
        try:
            state = asyncio.run(_prepare_local(settings, state))
        except (MigrationBusy, MigrationChanged, StoreUnavailable) as error:
            raise StartError(str(error)) from error
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise StartError(
                f"PostgreSQL cannot be used: {type(error).__name__}: {error}. See `python -m"
                " gateway doctor`."
            ) from error
        write_state(folder, state)

        def announce(address: str) -> None:  # with the port that was free
            write_state(folder, replace(state, listen_address=address))
            _welcome(settings, address, state)

        _run_local(settings, announce)
    finally:
        servers.stop()


def _run_local(settings: Settings, welcome: Callable[[str], None]) -> None:
    if settings.workers == 1:
        run_loop(serve(settings, lambda gateway: welcome(gateway.server.address), asyncio.Event()))
        return
    try:
        run_workers(settings, welcome)
    except WorkersFailed as error:
        raise StartError(str(error)) from error


_DEMO_SCOPES: Final = tuple(set(Scope) - {Scope.EVENTS_READ_ALL, Scope.ADMIN})
"""What there is to try with the demo's key: all that a merchant's own key can open."""


async def _prepare_local(settings: Settings, state: LocalState) -> LocalState:
    dsn = settings.postgres_dsn.get_secret_value()
    await migrate(dsn)
    async with Accounts.connect(dsn) as accounts:
        presented = parse_key(state.api_key)
        known = None if presented is None else await accounts.load_key(presented.key_id)
        if known is not None and known.revoked_at is None:
            return state
        if known is not None and state.merchant_id in known.merchants:
            organisation_id, merchant_id = known.organisation_id, state.merchant_id
        else:
            organisation_id = await accounts.create_organisation("Demo")
            merchant_id = await accounts.create_merchant(organisation_id, "Demo shop")
        key = await accounts.create_key(
            organisation_id,
            scopes=_DEMO_SCOPES,
            mode="test",
            merchant_ids=(merchant_id,),
            name="demo",
        )
    return replace(state, merchant_id=merchant_id, api_key=key.text)


def _welcome(settings: Settings, address: str, state: LocalState) -> None:
    click.echo(
        f"""
payment gateway {__version__}
  gRPC      {address} ({settings.transport})
  metrics   http://{settings.metrics_address}/metrics
  PSP       simulator at {settings.simulator_url}, profile {settings.simulator_profile}
  data      {Path(settings.embedded_dir)}
  merchant  {state.merchant_id}
  API key   {state.api_key}

Authorize a first payment, in another terminal:

  {_relative(sys.executable)} -m gateway demo

Stop with Ctrl-C; calls in flight are finished first.
"""
    )


def _relative(program: str) -> str:
    path = Path(program)
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
