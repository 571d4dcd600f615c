"""The gateway's settings: one frozen object, read from GATEWAY_* environment variables.

`python -m gateway.settings` prints the table of docs/settings.md.
"""

import difflib
import ipaddress
import os
import re
import sys
from typing import Any, Final, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gateway.telemetry.logs import redact

PREFIX: Final = "GATEWAY_"
WORKERS_MAX: Final = 64

# Kubernetes puts such variables into every pod of a namespace that has a Service named "gateway"
# or "gateway-…". They are nobody's spelling mistake.
_SERVICE_LINK = re.compile(
    r"GATEWAY_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)"
)
_SERVICE_LINK_PORT = re.compile(r"GATEWAY_(?:\w+_)?PORT=(?:tcp|udp|sctp)://.*")

# The names of gateway.rpc.tokens.ALGORITHMS, which the settings do not import; a test compares.
_JWT_ALGORITHMS: Final = frozenset(
    {"EdDSA", *(kind + bits for kind in ("RS", "PS", "ES") for bits in ("256", "384", "512"))}
)

# An address with a password, as the clients of PostgreSQL and Redis split it: what they cannot
# split, they would quote in an error, and with it the password.
_PORT = r"(?:[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_HOST = rf"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s/?#@:,\[\]]*)(?::{_PORT})?"
_LOGIN = r"(?:[^\s/?#@\[\]]*@)?"
_OPTIONS = r"(?:\?(?:\w+=[^\s&#]*(?:&\w+=[^\s&#]*)*)?)?"
_POSTGRES_DSN = re.compile(
    rf"postgres(?:ql)?://{_LOGIN}{_HOST}(?:,{_HOST})*(?:/[^\s?#@]*)?{_OPTIONS}"
)
_REDIS_URL = re.compile(
    rf"rediss?://{_LOGIN}{_HOST}(?:/[^\s?#@]*)?{_OPTIONS}|unix://{_LOGIN}/[^\s?#@]*{_OPTIONS}"
)
_ENCODED = "with what is not a letter or a digit of its password percent-encoded"

_MASK = "********"
_VALUE_CHARACTERS_MAX = 100


class SettingsError(ValueError):
    """The settings cannot be used. The text lists every problem with its variable, one a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("The settings cannot be used:\n" + "\n".join(f"- {p}" for p in problems))
        self.problems = problems


def _field(
    default: object,
    meaning: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    unit: str = "",
) -> Any:
    # Each limit only where it is given: pydantic refuses bounds on text.
    rules: dict[str, Any] = {"ge": ge, "le": le, "gt": gt}
    rules = {name: value for name, value in rules.items() if value is not None}
    if isinstance(default, float):
        rules["allow_inf_nan"] = False
    if unit:
        rules["json_schema_extra"] = {"unit": unit}
    return Field(default, description=meaning, **rules)


class Settings(BaseSettings):
    """Everything that can be set. Names end in their unit; the descriptions are the documentation.

    Build it with `load_settings`, whose errors are written for the person who set the variables.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    environment: Literal["development", "production"] = _field(
        "development",
        "What the gateway runs for. `production` refuses the embedded PostgreSQL and Redis.",
    )

    # The door.
    listen_address: str = _field(
        "127.0.0.1:50051", "Where gRPC is served, as `host:port`; port 0 takes a free one."
    )
    transport: Literal["grpcio", "native"] = _field(
        "grpcio",
        "The gRPC server. `native` is faster and for trusted callers only: behind a proxy on"
        " loopback, without TLS of its own.",
    )
    trusted_front: bool = _field(
        False,
        "Declares that a proxy on this host stands before the gateway, which terminates TLS, bounds"
        " requests, ages connections and drains. `native` does not start without it.",
    )
    tls_certificate_file: str = _field(
        "", "The server's certificate chain in PEM. Empty: no TLS. grpcio only."
    )
    tls_key_file: str = _field("", "The private key of the certificate in PEM. grpcio only.")
    tls_client_ca_file: str = _field(
        "", "The CA of client certificates in PEM. Set: every client must show one (mutual TLS)."
    )
    client_identity: Literal["none", "certificate", "forwarded"] = _field(
        "none",
        "Whether a call without another credential is its certificate's (`gateway identities`):"
        " `certificate` by the server's own mutual TLS, `forwarded` by the header"
        " `x-forwarded-client-cert` of the trusted front, on loopback only.",
    )
    metrics_address: str = _field(
        "127.0.0.1:9464",
        "Where `/metrics`, `/livez` and `/readyz` are served over HTTP, as `host:port`; of several"
        " workers, those of all in one.",
    )
    workers: int = _field(
        1,
        "Processes that serve the port together, each with an event loop and connections of its"
        " own: limits hold for each. With several, a supervisor starts and watches them.",
        ge=1,
        le=WORKERS_MAX,
        unit="processes",
    )
    worker_silence_s_max: float = _field(
        30.0,
        "How long one of several workers may answer nothing to the supervisor before it is killed"
        " and replaced. 0: never.",
        ge=0,
        le=3600,
    )
    message_bytes_max: int = _field(
        2 * 1024 * 1024, "The largest request accepted.", ge=16 * 1024, le=64 * 1024 * 1024
    )
    metadata_bytes_max: int = _field(
        16 * 1024, "The largest metadata of one request accepted.", ge=4 * 1024, le=1024 * 1024
    )
    keepalive_time_s: float = _field(
        60.0, "The pause after which a silent connection is pinged.", ge=1, le=7200
    )
    keepalive_timeout_s: float = _field(
        20.0, "How long a ping may stay unanswered before the connection is closed.", ge=1, le=600
    )
    connection_age_max_s: float = _field(
        0.0,
        "The age at which a connection is asked to close, so that load spreads over new servers."
        " 0: unlimited. grpcio only.",
        ge=0,
        le=86400,
    )
    connection_age_grace_s: float = _field(
        30.0, "How long calls may still run on a connection that reached its age.", ge=0, le=3600
    )
    concurrent_streams_max: int = _field(
        1000, "Concurrent calls on one connection.", ge=1, le=100_000, unit="calls"
    )
    drain_grace_s: float = _field(
        30.0, "How long a shutdown waits for calls in flight.", ge=0, le=600
    )

    # PostgreSQL.
    postgres_dsn: SecretStr = _field(
        SecretStr(""),
        "PostgreSQL's address, `postgresql://…`. Several hosts, `host1:5432,host2:5432`, are asked"
        " at once, and the one that takes writes is used. Empty: the embedded one.",
    )
    postgres_standby_required: bool = _field(
        False,
        "Serve only while PostgreSQL names synchronous standbys, so that no commit is on one server"
        " alone (`docs/standby.md`).",
    )
    postgres_connect_timeout_s: float = _field(
        5.0, "How long opening a connection may take.", gt=0, le=60
    )
    postgres_statement_timeout_s: float = _field(
        10.0, "How long one statement may take.", ge=0.001, le=300
    )
    postgres_row_security: bool = _field(
        False,
        "Whether the lanes run as roles that PostgreSQL holds to the merchants of each batch, at a"
        " round trip more a batch. Needs `gateway row-security enable` first.",
    )
    outcome_retry_s_max: float = _field(
        30.0,
        "How long an outcome is written again and again while the database is away, before it is"
        " left to recovery.",
        ge=0,
        le=600,
    )
    embedded_dir: str = _field(
        ".local/embedded", "Where the embedded PostgreSQL and Redis keep their data."
    )
    readiness_interval_s: float = _field(
        2.0,
        "The pause between two looks whether the database can be served from; between two counts of"
        " what is in doubt and in the outbox it is five times as long.",
        ge=0.05,
        le=60,
    )

    # Redis.
    redis_url: SecretStr = _field(
        SecretStr(""), "Redis' address, `redis://…` or `rediss://…`. Empty: the embedded one."
    )
    redis_timeout_ms: float = _field(
        50.0, "How long one round trip may take before PostgreSQL decides.", ge=1, le=10_000
    )
    redis_connect_timeout_ms: float = _field(
        200.0, "How long opening a connection may take.", ge=1, le=10_000
    )
    redis_retry_after_ms: float = _field(
        250.0, "How long Redis is left alone after it failed.", ge=1, le=60_000
    )
    redis_buckets: int = _field(
        1,
        "Hash-tag buckets that merchants are spread over: 1 on one node, some 256 on a cluster."
        " The same on every gateway.",
        ge=1,
        le=16_384,
        unit="buckets",
    )
    claim_life_ms: int = _field(
        30_000, "How long the claim of an idempotency key lives.", ge=1, le=3_600_000
    )
    replay_cache_life_s: int = _field(
        900,
        "How long a frozen response stays cached in Redis, at 1.1 KB each; PostgreSQL keeps it for"
        " ever.",
        ge=1,
        le=2_592_000,
    )
    replay_cache_bytes_max: int = _field(
        65_536, "The largest response that is cached.", ge=0, le=1024 * 1024
    )

    # Batches.
    batch_rows_max: int = _field(
        500, "Rows of one batch to PostgreSQL.", ge=1, le=10_000, unit="rows"
    )
    batch_queue_max: int = _field(
        20_000, "Rows that may wait for a batch, in each lane.", ge=1, le=1_000_000, unit="rows"
    )
    batch_linger_ms_max: float = _field(
        20.0,
        "How long a batch waits for more rows on grpcio where the event loop works for 80 % of"
        " its time and more; in proportion less down to 60 %, not at all below it nor for a lone"
        " row. grpcio hands calls over one by one; those of native come in bursts and never wait."
        " 0: never.",
        ge=0,
        le=100,
    )
    intent_connections: int = _field(
        2, "Connections of the intents' lane.", ge=1, le=64, unit="connections"
    )
    outcome_connections: int = _field(
        2, "Connections of the outcomes' lane.", ge=1, le=64, unit="connections"
    )
    read_connections: int = _field(
        2, "Connections of the reads' lane.", ge=1, le=64, unit="connections"
    )

    # Calls.
    wait_s_max: float = _field(
        10.0, "How long a duplicate waits for the first call's answer.", ge=0, le=120
    )
    wait_margin_ms: float = _field(
        50.0, "How long before its deadline a waiting duplicate is answered.", ge=0, le=10_000
    )
    wait_poll_ms_min: float = _field(
        5.0, "The first pause between two looks at the first call's operation.", ge=1, le=10_000
    )
    wait_poll_ms_max: float = _field(
        250.0, "The longest pause between two looks; each is twice the one before.", ge=1, le=10_000
    )
    waiters_per_key_max: int = _field(
        100, "Duplicates of one key that may wait at once.", ge=1, le=10_000, unit="calls"
    )
    contention_tries_max: int = _field(
        100,
        "How often a call begins anew because its payment changed meanwhile.",
        ge=1,
        le=1000,
        unit="tries",
    )
    min_send_budget_s: float = _field(
        0.05, "Nothing is sent to a PSP when the caller's deadline is nearer.", ge=0, le=60
    )
    send_window_s: float = _field(
        5.0, "How long after its intent a request may still be sent to a PSP.", gt=0, le=300
    )
    recover_margin_s: float = _field(
        10.0,
        "What recovery adds to the send window and the PSP's answer time-out before it takes over"
        " an operation.",
        gt=0,
        le=3600,
    )
    operations_per_payment_max: int = _field(
        200, "Operations that one payment may have.", ge=1, le=10_000, unit="operations"
    )
    attempts_per_operation_max: int = _field(
        200,
        "Attempts that one operation may have, cascades' and those of repeats of what was NOT_SENT:"
        " each stands in all later answers and events.",
        ge=1,
        le=10_000,
        unit="attempts",
    )
    action_timeout_s: float = _field(
        3600.0,
        "How long a customer has to act on a payment that REQUIRES_ACTION, where the PSP does not"
        " say it. Afterwards it is cancelled at the PSP: see recovery_action_margin_s.",
        ge=1,
        le=2_592_000,
    )
    batch_wait_s_max: float = _field(
        30.0, "When a batch is answered at the latest, with what is done.", gt=0, le=300
    )
    stream_window_items: int = _field(
        256,
        "Items of one stream in flight before it is pushed back.",
        ge=1,
        le=10_000,
        unit="items",
    )

    # Admission. docs/decisions/0005-admission.md says how these bounds work together.
    admission_calls_max: int = _field(
        2000,
        "Money calls and items that the gateway itself works on at once, at most; those that wait"
        " for a PSP do not count. Under overload the limit is lower, and found by itself.",
        ge=1,
        le=100_000,
        unit="calls",
    )
    admission_calls_min: int = _field(
        32,
        "The least that this limit becomes: fewer are never refused.",
        ge=1,
        le=100_000,
        unit="calls",
    )
    admission_in_flight_max: int = _field(
        10_000,
        "Money calls and items at once, those that wait for a PSP included; each costs memory.",
        ge=1,
        le=1_000_000,
        unit="calls",
    )
    admission_reads_max: int = _field(
        1000, "Calls of GetPayment and GetOperation at once.", ge=1, le=100_000, unit="calls"
    )
    admission_lists_max: int = _field(
        64, "Calls of ListPayments at once.", ge=1, le=128, unit="calls"
    )
    admission_target_ms: float = _field(
        100.0,
        "By how much the gateway's own stages may take longer than twice their unhindered time"
        " before calls are refused.",
        gt=0,
        le=60_000,
    )
    admission_bulk_target_ms: float = _field(
        1000.0,
        "The same while only items of batches and streams come, which want throughput.",
        gt=0,
        le=60_000,
    )
    admission_retry_after_ms: float = _field(
        250.0,
        "The mean pause that a refused call is told, with jitter; it doubles, up to 64 times, as"
        " refusals come to outnumber the rest.",
        gt=0,
        le=60_000,
    )

    # Credentials.
    auth_cache_life_s: float = _field(
        5.0,
        "How long a credential is trusted without another look; so late a revocation acts.",
        ge=0,
        le=300,
    )
    auth_cache_entries_max: int = _field(
        10_000, "Credentials cached.", ge=1, le=1_000_000, unit="entries"
    )
    auth_negative_life_s: float = _field(
        2.0, "How long an unknown credential is refused without another look.", ge=0, le=60
    )

    # Access tokens. docs/security.md says what a token has to say.
    jwt_issuer: str = _field(
        "", "Whose access tokens (JWT) are accepted beside API keys: their `iss`. Empty: none are."
    )
    jwt_audience: str = _field("", "What must stand in a token's `aud`.")
    jwt_jwks_url: str = _field(
        "", "Where the issuer's public keys are read, `https://…`; redirects are not followed."
    )
    jwt_jwks_file: str = _field("", "The file with these keys (JWK Set), instead of an address.")
    jwt_algorithms: str = _field(
        "RS256,ES256",
        "The signatures that are accepted, with commas between: of RS, PS and ES with 256, 384 or"
        " 512, and EdDSA.",
    )
    jwt_leeway_s: float = _field(
        30.0, "How far the issuer's clock may differ from this one's.", ge=0, le=300
    )
    jwt_life_s_max: float = _field(
        86_400.0,
        "The longest time from a token's `iat` to its `exp`: a token cannot be revoked.",
        gt=0,
        le=31_536_000,
    )
    jwt_organisation_claim: str = _field(
        "organisation_id", "The claim with the organisation's id, `org_…`."
    )
    jwt_merchants_claim: str = _field(
        "merchant_ids",
        "The claim with the merchants' ids, a list; a token without it reaches all of its"
        " organisation.",
    )
    jwt_mode_claim: str = _field("mode", "The claim that says `test` or `live`.")
    jwt_jwks_life_s: float = _field(
        300.0, "The age at which the keys are read anew, behind the calls.", ge=1, le=86_400
    )
    jwt_jwks_pause_s: float = _field(
        10.0,
        "At least so long between two readings of the keys, however many tokens name unknown ones.",
        ge=0.1,
        le=3600,
    )
    jwt_jwks_stale_s_max: float = _field(
        86_400.0,
        "How long keys are used that could not be read anew.",
        ge=1,
        le=2_592_000,
    )
    jwt_jwks_timeout_s: float = _field(3.0, "How long one reading may take.", gt=0, le=60)

    # Recovery.
    recovery_enabled: bool = _field(True, "Whether this process finishes what others left.")
    recovery_interval_ms: float = _field(
        500.0, "The pause between two looks when there is nothing to do.", ge=1, le=60_000
    )
    recovery_search_interval_ms: float = _field(
        5000.0,
        "The pause between two searches for operations whose sender has died: each reads all"
        " operations of recovery_horizon_s. 0: as often as recovery_interval_ms says.",
        ge=0,
        le=600_000,
    )
    recovery_lease_s: float = _field(
        30.0, "For how long an operation is left to the recoverer that took it.", ge=1, le=3600
    )
    recovery_batch_max: int = _field(
        100,
        "Operations taken at once at most; recovery never takes more than it can begin with.",
        ge=1,
        le=10_000,
        unit="operations",
    )
    recovery_first_check_s: float = _field(
        1.0, "How soon an operation in doubt or pending is looked at.", ge=0, le=3600
    )
    recovery_backoff_s_min: float = _field(
        1.0, "The first pause between two looks at one operation.", gt=0, le=3600
    )
    recovery_backoff_s_max: float = _field(
        300.0, "The longest such pause; each is twice the one before.", gt=0, le=86_400
    )
    recovery_tries_max: int = _field(
        50,
        "Looks at an operation in doubt after which a person has to settle it: it stays IN_DOUBT,"
        " is listed as needing a person, and is looked at seldom.",
        ge=1,
        le=1_000_000,
        unit="looks",
    )
    recovery_person_interval_s: float = _field(
        3600.0,
        "The pause between two looks at an operation that needs a person.",
        gt=0,
        le=604_800,
    )
    recovery_waiting_interval_s_max: float = _field(
        1800.0,
        "The longest pause between two looks at an operation that waits for a customer, or that the"
        " PSP accepted and has not finished; pauses grow by a third each time.",
        gt=0,
        le=86_400,
    )
    recovery_action_margin_s: float = _field(
        300.0,
        "How long after the end of a customer's time a payment is cancelled at the PSP.",
        ge=0,
        le=604_800,
    )
    recovery_concurrency: int = _field(
        64, "Operations that recovery works on at once.", ge=1, le=1000, unit="operations"
    )
    recovery_account_concurrency: int = _field(
        16,
        "How many of these are of one connector account, so that a PSP that hangs leaves room to"
        " the others.",
        ge=1,
        le=1000,
        unit="operations",
    )
    recovery_horizon_s: float = _field(
        60.0,
        "Operations older than this are looked for in the table of doubts, not by their age. Longer"
        " than a statement may take and than the pauses between two looks and two searches.",
        ge=1,
        le=86_400,
    )

    # The simulator.
    simulator_url: str = _field(
        "", "The PSP simulator's address, `http://…`. Empty: none, or the embedded run's own."
    )
    simulator_profile: Literal[
        "idempotent", "non_idempotent", "key_2s", "no_query", "cancel_only"
    ] = _field("idempotent", "Which kind of PSP the simulator plays.")
    simulator_connect_timeout_s: float = _field(1.0, "How long connecting may take.", gt=0, le=60)
    simulator_answer_timeout_s: float = _field(
        10.0, "How long an answer may take before the operation is in doubt.", gt=0, le=120
    )
    simulator_connections_max: int = _field(
        2000, "Connections to the simulator.", ge=1, le=100_000, unit="connections"
    )

    # Merchants' accounts at PSPs.
    connector_keys: SecretStr = _field(
        SecretStr(""),
        "The keys that wrap the accounts' data keys, `id:base64` of 32 bytes each, separated by"
        " commas. The first wraps, all unwrap. `gateway connectors new-key` makes one.",
    )
    connector_keys_file: str = _field(
        "", "A file with these keys instead, one a line. Empty: none."
    )
    connector_accounts_interval_s: float = _field(
        5.0,
        "How often changed accounts are read; so late a change, or a rotation, acts.",
        gt=0,
        le=300,
    )
    connector_ca_file: str = _field(
        "",
        "The CAs, in PEM, that PSPs' certificates must come from. Empty: those of the system.",
    )
    connector_proxy_url: SecretStr = _field(
        SecretStr(""),
        "A proxy for HTTPS to PSPs, `http://[user:password@]host[:port]`. Empty: none.",
    )
    stripe_url: str = _field(
        "https://api.stripe.com",
        "Stripe's address. Live accounts are served at this default alone; another is for doubles.",
    )
    stripe_connect_timeout_s: float = _field(
        3.0, "How long connecting may take, the TLS handshake included.", gt=0, le=60
    )
    stripe_answer_timeout_s: float = _field(
        30.0, "How long an answer may take before the operation is in doubt.", gt=0, le=120
    )
    stripe_connections_max: int = _field(
        500,
        "Connections to Stripe, of all accounts together.",
        ge=1,
        le=100_000,
        unit="connections",
    )
    adyen_test_url: str = _field(
        "https://checkout-test.adyen.com",
        "Where Adyen's test accounts are served; another address is for doubles. Live accounts have"
        " an address of their own, which their prefix names.",
    )
    adyen_connect_timeout_s: float = _field(
        3.0, "How long connecting may take, the TLS handshake included.", gt=0, le=60
    )
    adyen_answer_timeout_s: float = _field(
        30.0, "How long an answer may take before the operation is in doubt.", gt=0, le=120
    )
    adyen_connections_max: int = _field(
        500,
        "Connections to one address of Adyen's, of all accounts there together.",
        ge=1,
        le=100_000,
        unit="connections",
    )
    braintree_sandbox_url: str = _field(
        "https://payments.sandbox.braintree-api.com",
        "Where Braintree's test accounts are; another is for doubles. Live accounts are served at"
        " Braintree's own address alone.",
    )
    braintree_connect_timeout_s: float = _field(
        3.0, "How long connecting may take, the TLS handshake included.", gt=0, le=60
    )
    braintree_answer_timeout_s: float = _field(
        60.0,
        "How long an answer may take before the operation is in doubt. Braintree works on a"
        " request for up to 60 s.",
        gt=0,
        le=120,
    )
    braintree_connections_max: int = _field(
        500,
        "Connections to each of Braintree's environments, of all accounts together.",
        ge=1,
        le=100_000,
        unit="connections",
    )

    # What PSPs tell.
    notifications_address: str = _field(
        "",
        "Where PSPs' notifications are taken over HTTP, as `host:port`; of several workers, they"
        " share it. Empty: none are taken, and those alone are applied that acquirers' hosts tell.",
    )
    notifications_body_bytes_max: int = _field(
        262_144, "The longest request that is read.", ge=1024, le=16_777_216
    )
    notifications_timeout_s: float = _field(
        10.0, "How long a request, or the wait for one, may take.", gt=0, le=120
    )
    notifications_connections_max: int = _field(
        256, "Connections held at once.", ge=1, le=100_000, unit="connections"
    )
    notifications_in_flight_max: int = _field(
        64, "Requests worked on at once; more get status 503.", ge=1, le=10_000, unit="requests"
    )
    notifications_per_s_max: int = _field(
        200,
        "Requests begun in a second; more get status 429, and PSPs send them again.",
        ge=1,
        le=100_000,
        unit="requests/s",
    )
    notifications_tolerance_s: float = _field(
        300.0,
        "How old, or how far ahead, the time in a signature may be.",
        gt=0,
        le=86_400,
    )
    notifications_interval_ms: float = _field(
        1000.0,
        "The pause between two looks for what is to be applied, where nothing has just come."
        " Leases, batches and longer pauses are recovery's.",
        ge=1,
        le=60_000,
    )
    notifications_queue_max: int = _field(
        1000,
        "Notifications that wait to be stored; more get status 503.",
        ge=1,
        le=1_000_000,
        unit="notifications",
    )

    # Streams of events.
    events_streams_max: int = _field(
        200,
        "Streams of events (EventService) at once; one more is refused.",
        ge=1,
        le=10_000,
        unit="streams",
    )
    events_organisation_streams_max: int = _field(
        50, "Of these, those of one organisation.", ge=1, le=10_000, unit="streams"
    )
    events_poll_ms_min: float = _field(
        25.0,
        "The pause between two looks for new events, while a stream is open and events come.",
        ge=1,
        le=10_000,
    )
    events_poll_ms_max: float = _field(500.0, "The same while none come.", ge=1, le=60_000)
    events_heartbeat_s: float = _field(
        10.0,
        "How often an idle stream gets a sign of life with its cursor, and a stream's credential is"
        " looked at again.",
        ge=0.05,
        le=300,
    )
    events_kept_bytes_max: int = _field(
        8 * 1024 * 1024,
        "The latest events, kept in memory for all streams together; a stream that is behind them"
        " reads the outbox itself.",
        ge=1024,
        le=1024**3,
    )

    # Routing: breakers, and what is learnt.
    breaker_enabled: bool = _field(
        True, "Whether an account whose calls fail or are far too slow is left alone for a while."
    )
    breaker_window_s: float = _field(
        30.0, "The time in which a breaker counts calls.", ge=1, le=3600
    )
    breaker_calls_min: int = _field(
        20, "Fewer calls in the window open no breaker.", ge=1, le=100_000, unit="calls"
    )
    breaker_failure_percent: float = _field(
        50.0, "So many failures among the window's calls open it.", gt=0, le=100, unit="percent"
    )
    breaker_slow_percent: float = _field(
        80.0, "So many slow calls in the window open it.", gt=0, le=100, unit="percent"
    )
    breaker_slow_factor: float = _field(
        10.0,
        "A call is slow that takes so many times the account's median; none below a second.",
        gt=1,
        le=1000,
        unit="times",
    )
    breaker_slow_s_max: float = _field(
        10.0,
        "Every call is slow that takes longer. It is waited for to its end all the same.",
        gt=0,
        le=120,
    )
    breaker_pause_s_min: float = _field(
        5.0,
        "How long a breaker stays open the first time; doubled with each opening in a row.",
        gt=0,
        le=3600,
    )
    breaker_pause_s_max: float = _field(
        60.0, "The longest that a breaker stays open before the PSP is tried.", gt=0, le=3600
    )
    breaker_probes: int = _field(
        3,
        "Calls that may try the PSP at once while its breaker is half-open; so many good ones close"
        " it.",
        ge=1,
        le=100,
        unit="calls",
    )
    routing_exchange_interval_s: float = _field(
        1.0,
        "How often processes tell each other of their breakers, through Redis; what they learn of"
        " success, five times as seldom.",
        ge=0.05,
        le=60,
    )
    learning_half_life_s: float = _field(
        1800.0,
        "After so long a payment counts half for what is learnt of success.",
        ge=60,
        le=2_592_000,
    )
    learning_exploration_percent: float = _field(
        5.0,
        "At most so many of the payments that are routed by what is learnt go to another account"
        " than the best one.",
        ge=0,
        le=50,
        unit="percent",
    )
    learning_segments_max: int = _field(
        100_000,
        "Kinds of payments that success is counted for.",
        ge=100,
        le=10_000_000,
        unit="segments",
    )
    iso8583_hosts: str = _field(
        "",
        "Acquirers' hosts that speak ISO 8583, separated by commas, each"
        " `NAME=tls://HOST:PORT?specification=NAME&mode=live`: `tcp` or `tls`, the name of a"
        " specification or the path of its `.toml` file, and `live` or `test`. Empty: none.",
    )
    iso8583_connections: int = _field(
        2, "Connections to each host, of each process.", ge=1, le=100, unit="connections"
    )
    iso8583_in_flight_max: int = _field(
        512, "Unanswered requests on one of them.", ge=1, le=100_000, unit="requests"
    )
    iso8583_connect_timeout_s: float = _field(
        3.0, "How long connecting to a host may take, the TLS handshake included.", gt=0, le=60
    )
    iso8583_network_timeout_s: float = _field(
        5.0,
        "How long a host's answer to a sign-on or an echo may take. A connection on which nothing"
        " came for so long to a request is tested by an echo.",
        gt=0,
        le=60,
    )
    iso8583_echo_interval_s: float = _field(
        30.0, "A connection on which nothing came for so long is tested by an echo.", gt=0, le=3600
    )
    iso8583_reconnect_s_max: float = _field(
        15.0, "The longest pause before a lost connection is made again.", gt=0, le=300
    )

    # Logs.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = _field(
        "INFO", "The lowest level that is logged."
    )
    log_successes_per_s_max: int = _field(
        50,
        "Successful calls that are logged in a second, at most; of the others only the number is.",
        ge=0,
        le=1_000_000,
        unit="calls/s",
    )
    log_refusals_per_s_max: int = _field(
        20,
        "Failed calls that are logged in a second, at most, of each merchant and of no known one;"
        " of the others only the number is. INTERNAL, UNKNOWN and DATA_LOSS always are.",
        ge=0,
        le=1_000_000,
        unit="calls/s",
    )

    # Traces, error reports, and what metrics tell of merchants.
    tracing_endpoint: str = _field(
        "",
        "Where traces are sent by OTLP over HTTP, as `http://collector:4318/v1/traces`. Empty:"
        " nothing is traced, and that costs nothing.",
    )
    tracing_sample_ratio: float = _field(
        0.01,
        "The part of the calls that is traced, of those whose caller does not say by `traceparent`"
        " whether to.",
        ge=0,
        le=1,
        unit="ratio",
    )
    tracing_calls_per_s_max: int = _field(
        100,
        "Calls that are traced in a second, at most, whoever decided it.",
        ge=1,
        le=1_000_000,
        unit="calls/s",
    )
    tracing_service_name: str = _field("payment-gateway", "The `service.name` of the spans.")
    tracing_merchant_id: bool = _field(False, "Whether a call's span tells its merchant's id.")
    sentry_dsn: SecretStr = _field(
        SecretStr(""),
        "Where unexpected exceptions are reported, scrubbed as the logs are: the DSN of a Sentry"
        " project. Empty: nowhere.",
    )
    metrics_merchants_max: int = _field(
        0,
        "How many merchants, those with the most calls, have a label of their own in"
        " `gateway_merchant_requests_total`, in each worker. 0: no merchant is told.",
        ge=0,
        le=50,
        unit="merchants",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """No files: to look through empty sources takes a third of the time of loading."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings

    @field_validator("listen_address", "metrics_address")
    @classmethod
    def _address(cls, value: str) -> str:
        split_address(value)
        return value

    @property
    def applies_notifications(self) -> bool:
        """Whether anybody tells: PSPs over HTTP, or acquirers' hosts by late answers."""
        return bool(self.notifications_address or self.iso8583_hosts)

    @field_validator("notifications_address")
    @classmethod
    def _optional_address(cls, value: str) -> str:
        return cls._address(value) if value else value

    @field_validator("stripe_url", "adyen_test_url", "braintree_sandbox_url")
    @classmethod
    def _psp(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#@]+/?", value) or not _has_port(value):
            raise ValueError("an http:// or https:// address without credentials and path")
        return value

    @field_validator("simulator_url")
    @classmethod
    def _simulator(cls, value: str) -> str:
        return cls._psp(value) if value else value

    @field_validator("connector_proxy_url")
    @classmethod
    def _proxy(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if not re.fullmatch(r"(?:http://[^\s/]+/?)?", url) or not _has_port(url):
            raise ValueError("an http:// address, or empty")
        return value

    @field_validator("tracing_endpoint")
    @classmethod
    def _http(cls, value: str) -> str:
        matches = re.fullmatch(r"(?:https?://[^\s/@]+(?:/\S*)?)?", value)
        if matches is None or not _has_port(value):
            raise ValueError("an http:// or https:// address without credentials, or empty")
        return value

    @field_validator("tracing_service_name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[\x21-\x7e]{1,128}", value):
            raise ValueError("1 to 128 visible ASCII characters")
        return value

    @field_validator("sentry_dsn")
    @classmethod
    def _sentry(cls, value: SecretStr) -> SecretStr:
        dsn = value.get_secret_value()
        # As Sentry's own library reads it: its project is a number, and the last part.
        matches = re.fullmatch(r"(?:https?://\w+(?::\w+)?@[^\s/@]+/(?:\S*/)?\d+)?", dsn)
        if matches is None or not _has_port(dsn):
            raise ValueError("a DSN as https://key@host/project, or empty")
        return value

    @field_validator("jwt_jwks_url")
    @classmethod
    def _https(cls, value: str) -> str:
        # Whoever can change the keys on their way can sign any token.
        match = re.fullmatch(r"(https?)://([^\s/@:]+|\[[^\s\]]+\])(?::\d+)?(?:/\S*)?", value)
        secure = match and (match[1] == "https" or _is_loopback(match[2].strip("[]")))
        if value and not (secure and _has_port(value)):
            raise ValueError("an https:// address without credentials, http:// on loopback only")
        return value

    @field_validator("jwt_algorithms")
    @classmethod
    def _asymmetric(cls, value: str) -> str:
        named = algorithms_of(value)
        if not named or not named <= _JWT_ALGORITHMS:
            raise ValueError(f"some of {', '.join(sorted(_JWT_ALGORITHMS))}, with commas between")
        return value

    @field_validator("postgres_dsn")
    @classmethod
    def _postgres(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if text and not (_POSTGRES_DSN.fullmatch(text) and _has_hosts(text)):
            raise ValueError(f"a postgresql:// address {_ENCODED}, or empty")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if text and not (_REDIS_URL.fullmatch(text) and _has_hosts(text)):
            raise ValueError(f"a redis://, rediss:// or unix:// address {_ENCODED}, or empty")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        problems = [
            *self._connector_problems(),
            *self._breaker_problems(),
            *self._tls_problems(),
            *self._native_problems(),
            *self._jwt_problems(),
            *self._order_problems(),
        ]
        if self.environment == "production":
            problems += [
                f"{variable(name)}: must be set when {variable('environment')} is production"
                for name in ("postgres_dsn", "redis_url")
                if not getattr(self, name).get_secret_value()
            ]
        if problems:
            raise SettingsConflict(problems)
        return self

    def _tls_problems(self) -> list[str]:
        certificate, key = variable("tls_certificate_file"), variable("tls_key_file")
        if self.tls_certificate_file and not self.tls_key_file:
            return [f"{key}: must be set together with {certificate}"]
        if self.tls_key_file and not self.tls_certificate_file:
            return [f"{certificate}: must be set together with {key}"]
        if self.tls_client_ca_file and not self.tls_certificate_file:
            return [f"{variable('tls_client_ca_file')}: needs {certificate} and {key}"]
        return self._identity_problems()

    def _identity_problems(self) -> list[str]:
        says = f"when {variable('client_identity')} is {self.client_identity}"
        if self.client_identity == "certificate" and not self.tls_client_ca_file:
            return [f"{variable('tls_client_ca_file')}: must be set {says}"]
        if self.client_identity != "forwarded" or self.transport == "native":
            return []  # native is held to the same by _native_problems
        problems = []
        if not self.trusted_front:
            problems.append(f"{variable('trusted_front')}: must be true {says}")
        if not _is_loopback(split_address(self.listen_address)[0]):
            # Whoever can connect can claim to be anyone.
            problems.append(f"{variable('listen_address')}: must be a loopback address {says}")
        return problems

    def _breaker_problems(self) -> list[str]:
        if self.breaker_pause_s_min > self.breaker_pause_s_max:
            shortest, longest = variable("breaker_pause_s_min"), variable("breaker_pause_s_max")
            return [f"{shortest} is at most {longest}"]
        return []

    def _connector_problems(self) -> list[str]:
        if self.connector_keys.get_secret_value() and self.connector_keys_file:
            keys, file = variable("connector_keys"), variable("connector_keys_file")
            return [f"{keys}: must be empty when {file} is set"]
        return []

    def _native_problems(self) -> list[str]:
        if self.transport != "native":
            return []
        native = f"{variable('transport')} is native"
        problems = [
            f"{variable(name)}: must be empty when {native}, which has no TLS"
            for name in ("tls_certificate_file", "tls_key_file", "tls_client_ca_file")
            if getattr(self, name)
        ]
        if self.connection_age_max_s:
            problems.append(
                f"{variable('connection_age_max_s')}: must be 0 when {native}, which cannot age"
                " connections"
            )
        if not self.trusted_front:
            problems.append(
                f"{variable('trusted_front')}: must be true when {native}: it is only for trusted"
                " callers behind a proxy on this host"
            )
        if not _is_loopback(split_address(self.listen_address)[0]):
            problems.append(
                f"{variable('listen_address')}: must be a loopback address when {native}"
            )
        return problems

    def _jwt_problems(self) -> list[str]:
        issuer = variable("jwt_issuer")
        url, file = variable("jwt_jwks_url"), variable("jwt_jwks_file")
        if not self.jwt_issuer:
            return [
                f"{variable(name)}: needs {issuer}"
                for name in ("jwt_audience", "jwt_jwks_url", "jwt_jwks_file")
                if getattr(self, name)
            ]
        problems = [
            f"{variable(name)}: must be set together with {issuer}"
            for name in (
                *("jwt_audience", "jwt_organisation_claim"),
                *("jwt_merchants_claim", "jwt_mode_claim"),
            )
            if not getattr(self, name)
        ]
        if bool(self.jwt_jwks_url) == bool(self.jwt_jwks_file):
            problems.append(f"{url}: either it or {file} must be set together with {issuer}")
        return problems

    def _order_problems(self) -> list[str]:
        problems = [
            f"{variable(low)}: must not be greater than {variable(high)}"
            for low, high in (
                ("recovery_backoff_s_min", "recovery_backoff_s_max"),
                ("recovery_backoff_s_min", "recovery_waiting_interval_s_max"),
                ("wait_poll_ms_min", "wait_poll_ms_max"),
                ("events_poll_ms_min", "events_poll_ms_max"),
                ("batch_rows_max", "batch_queue_max"),
                ("admission_calls_min", "admission_calls_max"),
                ("admission_calls_max", "admission_in_flight_max"),
                ("admission_in_flight_max", "batch_queue_max"),
                ("admission_target_ms", "admission_bulk_target_ms"),
                ("min_send_budget_s", "send_window_s"),
                ("jwt_jwks_pause_s", "jwt_jwks_life_s"),
                ("jwt_jwks_life_s", "jwt_jwks_stale_s_max"),
            )
            if getattr(self, low) > getattr(self, high)
        ]
        # No operation may appear behind the horizon: storage/postgres/sql/recovery.sql says why.
        problems += [
            f"{variable('recovery_horizon_s')}: must be longer than {variable(name)}"
            for name, duration_s in (
                ("postgres_statement_timeout_s", self.postgres_statement_timeout_s),
                ("recovery_interval_ms", self.recovery_interval_ms / 1000),
                ("recovery_search_interval_ms", self.recovery_search_interval_ms / 1000),
            )
            if self.recovery_horizon_s <= duration_s
        ]
        return problems + self._address_problems()

    def _address_problems(self) -> list[str]:
        # With several workers ports are shared, so that binding one twice fails nobody.
        names = ("listen_address", "metrics_address", "notifications_address")
        by_address: dict[str, list[str]] = {}
        for name in names:
            address = getattr(self, name)
            if address and split_address(address)[1]:
                by_address.setdefault(address, []).append(variable(name))
        return [
            f"{first}: must not be the same as {' and '.join(others)}"
            for first, *others in by_address.values()
            if others
        ]


def _has_port(url: str) -> bool:
    """Whether a URL has no port that cannot be one, and no host that cannot be asked for."""
    try:
        _ = urlsplit(url).port
    except ValueError:
        return False
    return _has_hosts(url)


def _has_hosts(url: str) -> bool:
    """Whether each host of an address can be asked for: what resolvers raise is no OSError."""
    place = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
    hosts = place.rpartition("@")[2].split(",")
    return all(_is_host(re.sub(r":\d*$", "", host)) for host in hosts)


def _is_host(host: str) -> bool:
    if host.upper().startswith("%2F"):  # the directory of a socket
        return True
    try:
        host.encode("idna")  # as the resolver does: no label is empty or of more than 63 characters
    except UnicodeError:
        return False
    return True


class SettingsConflict(ValueError):
    """Values that are right alone and wrong together; raised inside validation only."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def load_settings(**overrides: object) -> Settings:
    """The settings from the process's environment; `overrides` (by field name) win over it.

    Raises SettingsError with every problem at once: the variable, its value (masked where it is
    secret) and what is expected. A GATEWAY_* variable that does not exist is a problem too.
    """
    problems = _unknown_variables()
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]  # the model checks them
    except ValidationError as error:
        # Not chained: pydantic's text would repeat what is masked here.
        problems += [line for detail in error.errors() for line in _problem(detail)]
        settings = None
    if problems or settings is None:
        raise SettingsError(problems)
    return settings


def variable(name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + name.upper()


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port` as host without brackets, and port; ValueError otherwise."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/@]+)):([0-9]{1,5})", address)
    if match is None or int(match[3]) > 65_535 or not _is_host(match[1] or match[2]):
        raise ValueError("host:port with a port from 0 to 65535")
    return match[1] or match[2], int(match[3])


def algorithms_of(text: str) -> frozenset[str]:
    """The algorithms that `jwt_algorithms` names."""
    return frozenset(each.strip() for each in text.split(",") if each.strip())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _unknown_variables() -> list[str]:
    known = {variable(name) for name in Settings.model_fields}
    problems = []
    for name, value in sorted(os.environ.items()):
        upper = name.upper()
        if (
            not upper.startswith(PREFIX)
            or upper in known
            or _SERVICE_LINK.fullmatch(upper)
            or _SERVICE_LINK_PORT.fullmatch(f"{upper}={value}")
        ):
            continue
        # Without the prefix, which alone would make everything look alike.
        names = [each.removeprefix(PREFIX) for each in known]
        near = difflib.get_close_matches(upper.removeprefix(PREFIX), names, n=1)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        problems.append(f"{name}: no such setting{hint}")
    return problems


def _problem(detail: Any) -> list[str]:
    """One of pydantic's error details as lines for people."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, SettingsConflict):
        return cause.problems
    name = str(detail["loc"][0])
    if name not in Settings.model_fields:
        return [f"{name}: no such setting"]
    expected = str(cause) if isinstance(cause, ValueError) else _type_of(name)
    return [f"{variable(name)}: expected {expected}; got {_shown(name, detail['input'])}"]


def _shown(name: str, value: object) -> str:
    if Settings.model_fields[name].annotation is SecretStr:
        return _MASK
    text = redact(str(value))
    return repr(text if len(text) <= _VALUE_CHARACTERS_MAX else text[:_VALUE_CHARACTERS_MAX] + "…")


def _type_of(name: str) -> str:
    """The type and bounds of a field, for people: `integer from 1 to 500`."""
    field = Settings.model_fields[name]
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    bounds = {type(rule).__name__: rule for rule in field.metadata}
    text = _TYPES.get(annotation, "text")
    if "Gt" in bounds:
        text += f" above {_number(bounds['Gt'].gt)}"
    if "Ge" in bounds:
        text += f" from {_number(bounds['Ge'].ge)}"
    if "Le" in bounds:
        text += f" to {_number(bounds['Le'].le)}"
    return text


def _unit_of(name: str) -> str:
    extra = Settings.model_fields[name].json_schema_extra
    if isinstance(extra, dict) and "unit" in extra:
        return str(extra["unit"])
    words = name.split("_")
    return next((unit for word, unit in _UNITS.items() if word in words), "")


_TYPES: Final[dict[object, str]] = {
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    SecretStr: "text, secret",
}
_UNITS: Final = {"s": "seconds", "ms": "milliseconds", "bytes": "bytes"}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _default_of(name: str) -> str:
    default = Settings.model_fields[name].default
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, bool):
        text = str(default).lower()
    elif isinstance(default, (int, float)):
        text = _number(default)
    else:
        text = default
    return f"`{text}`" if text else "empty"


def settings_table() -> str:
    """The whole of docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Read once at start from the environment. A `GATEWAY_*` variable not listed is an error.",
        "Written by `python -m gateway.settings`; do not edit.",
        "",
        "| Variable | Type | Default | Unit | Meaning |",
        "|---|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        cells = (
            f"`{variable(name)}`",
            _type_of(name),
            _default_of(name),
            _unit_of(name),
            field.description or "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(settings_table())
