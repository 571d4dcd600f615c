"""gateway.settings."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sentry_sdk.utils import BadDsn, Dsn

from gateway.rpc.tokens import ALGORITHMS
from gateway.settings import (
    PREFIX,
    Settings,
    SettingsError,
    algorithms_of,
    load_settings,
    settings_table,
    split_address,
    variable,
)

ROOT = Path(__file__).parents[2]
JWT = {
    "jwt_issuer": "https://issuer.example/",
    "jwt_audience": "payment-gateway",
    "jwt_jwks_url": "https://issuer.example/jwks.json",
}


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return caught.value.problems


def test_the_defaults_are_settings_that_start() -> None:
    settings = load_settings()
    assert settings.transport == "grpcio"
    assert settings.postgres_dsn.get_secret_value() == ""


def test_a_variable_sets_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BATCH_ROWS_MAX", "7")
    monkeypatch.setenv("GATEWAY_SEND_WINDOW_S", "2.5")
    monkeypatch.setenv("GATEWAY_RECOVERY_ENABLED", "false")
    monkeypatch.setenv("GATEWAY_POSTGRES_DSN", "postgresql://u:p@h/d")
    settings = load_settings()
    assert settings.batch_rows_max == 7
    assert settings.send_window_s == 2.5
    assert settings.recovery_enabled is False
    assert settings.postgres_dsn == SecretStr("postgresql://u:p@h/d")


def test_an_override_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_LISTEN_ADDRESS", "127.0.0.1:1")
    assert load_settings(listen_address="127.0.0.1:2").listen_address == "127.0.0.1:2"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().batch_rows_max = 1


def test_every_problem_is_told_at_once_with_variable_value_and_expectation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert problems(
        monkeypatch,
        GATEWAY_BATCH_ROWS_MAX="lots",
        GATEWAY_SEND_WINDOW_S="0",
        GATEWAY_TRANSPORT="http",
        GATEWAY_TRUSTED_FRONT="perhaps",
        GATEWAY_LISTEN_ADDRESS="localhost",
    ) == [
        "GATEWAY_LISTEN_ADDRESS: expected host:port with a port from 0 to 65535; got 'localhost'",
        "GATEWAY_TRANSPORT: expected `grpcio` or `native`; got 'http'",
        "GATEWAY_TRUSTED_FRONT: expected `true` or `false`; got 'perhaps'",
        "GATEWAY_BATCH_ROWS_MAX: expected integer from 1 to 10000; got 'lots'",
        "GATEWAY_SEND_WINDOW_S: expected number above 0 to 300; got '0'",
    ]


def test_the_error_is_a_list_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BATCH_ROWS_MAX", "0")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == (
        "The settings cannot be used:\n"
        "- GATEWAY_BATCH_ROWS_MAX: expected integer from 1 to 10000; got '0'"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "", "1e9", "ten"])
def test_a_number_out_of_bounds_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (problem,) = problems(monkeypatch, GATEWAY_WAIT_S_MAX=value)
    assert problem.startswith("GATEWAY_WAIT_S_MAX: expected number from 0 to 120")


@pytest.mark.parametrize(
    "name", ["GATEWAY_POSTGRES_DSN", "GATEWAY_REDIS_URL", "GATEWAY_SENTRY_DSN"]
)
def test_the_value_of_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "mysql://user:hunter2@host/db")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert name in str(caught.value)
    assert "********" in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in repr(error) + str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_secrets_are_masked_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_POSTGRES_DSN", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("GATEWAY_REDIS_URL", "redis://:hunter2@h/0")
    settings = load_settings()
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a_value_that_was_put_into_the_wrong_variable_is_redacted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (problem,) = problems(monkeypatch, GATEWAY_LISTEN_ADDRESS="postgresql://u:hunter2@h/d")
    assert "hunter2" not in problem


def test_an_unknown_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert problems(monkeypatch, GATEWAY_BATCH_ROW_MAX="5", GATEWAY_QQ="hunter2") == [
        "GATEWAY_BATCH_ROW_MAX: no such setting; did you mean GATEWAY_BATCH_ROWS_MAX?",
        "GATEWAY_QQ: no such setting",
    ]


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(SettingsError, match="nonsense: no such setting"):
        load_settings(nonsense=1)


def test_variables_that_kubernetes_adds_for_services_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "GATEWAY_SERVICE_HOST": "10.0.0.1",
        "GATEWAY_SERVICE_PORT": "50051",
        "GATEWAY_SERVICE_PORT_GRPC": "50051",
        "GATEWAY_PORT": "tcp://10.0.0.1:50051",
        "GATEWAY_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "GATEWAY_PORT_50051_TCP_ADDR": "10.0.0.1",
        "GATEWAY_PRIMARY_SERVICE_HOST": "10.0.0.1",
        "GATEWAY_PRIMARY_PORT": "tcp://10.0.0.1:50051",
    }.items():
        monkeypatch.setenv(name, value)
    load_settings()
    (problem,) = problems(monkeypatch, GATEWAY_PORT="50051")
    assert problem.startswith("GATEWAY_PORT: no such setting")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"tls_certificate_file": "c"}, ["tls_key_file"]),
        ({"tls_key_file": "k"}, ["tls_certificate_file"]),
        ({"tls_client_ca_file": "a"}, ["tls_client_ca_file"]),
        ({"transport": "native"}, ["trusted_front"]),
        (
            {"transport": "native", "trusted_front": "true", "listen_address": "0.0.0.0:1"},
            ["listen_address"],
        ),
        (
            {"transport": "native", "trusted_front": "true", "listen_address": "gateway:1"},
            ["listen_address"],
        ),
        (
            {"transport": "native", "trusted_front": "true", "connection_age_max_s": "60"},
            ["connection_age_max_s"],
        ),
        (
            {
                "transport": "native",
                "trusted_front": "true",
                "tls_certificate_file": "c",
                "tls_key_file": "k",
            },
            ["tls_certificate_file", "tls_key_file"],
        ),
        (
            {"recovery_backoff_s_min": "10", "recovery_backoff_s_max": "5"},
            ["recovery_backoff_s_min"],
        ),
        ({"wait_poll_ms_min": "10", "wait_poll_ms_max": "5"}, ["wait_poll_ms_min"]),
        ({"events_poll_ms_min": "10", "events_poll_ms_max": "5"}, ["events_poll_ms_min"]),
        (
            {"batch_rows_max": "10", "batch_queue_max": "5"},
            ["batch_rows_max", "admission_in_flight_max"],
        ),
        ({"admission_calls_min": "9", "admission_calls_max": "8"}, ["admission_calls_min"]),
        (
            {
                "admission_calls_max": "9",
                "admission_calls_min": "1",
                "admission_in_flight_max": "8",
            },
            ["admission_calls_max"],
        ),
        ({"admission_in_flight_max": "20001"}, ["admission_in_flight_max"]),
        ({"admission_bulk_target_ms": "10"}, ["admission_target_ms"]),
        ({"min_send_budget_s": "10", "send_window_s": "5"}, ["min_send_budget_s"]),
        (
            {"recovery_horizon_s": "10", "postgres_statement_timeout_s": "10"},
            ["recovery_horizon_s"],
        ),
        ({"recovery_horizon_s": "9", "postgres_statement_timeout_s": "10"}, ["recovery_horizon_s"]),
        ({"recovery_horizon_s": "20", "recovery_interval_ms": "20000"}, ["recovery_horizon_s"]),
        (
            {"recovery_horizon_s": "20", "recovery_search_interval_ms": "20000"},
            ["recovery_horizon_s"],
        ),
        (
            {"notifications_address": "127.0.0.1:7", "listen_address": "127.0.0.1:7"},
            ["listen_address"],
        ),
        ({"metrics_address": "[::]:7", "listen_address": "[::]:7"}, ["listen_address"]),
        ({"environment": "production"}, ["postgres_dsn", "redis_url"]),
        ({"client_identity": "certificate"}, ["tls_client_ca_file"]),
        ({"client_identity": "forwarded"}, ["trusted_front"]),
        (
            {
                "client_identity": "forwarded",
                "trusted_front": "true",
                "listen_address": "0.0.0.0:50051",
            },
            ["listen_address"],
        ),
        (
            {
                "client_identity": "forwarded",
                "trusted_front": "true",
                "transport": "native",
                "listen_address": "10.0.0.1:50051",
            },
            ["listen_address"],
        ),
        ({"jwt_issuer": "i"}, ["jwt_audience", "jwt_jwks_url"]),
        (JWT | {"jwt_jwks_file": "f"}, ["jwt_jwks_url"]),
        ({"jwt_audience": "a", "jwt_jwks_file": "f"}, ["jwt_audience", "jwt_jwks_file"]),
        (JWT | {"jwt_organisation_claim": ""}, ["jwt_organisation_claim"]),
        ({"jwt_jwks_pause_s": "400"}, ["jwt_jwks_pause_s"]),
        ({"jwt_jwks_stale_s_max": "200"}, ["jwt_jwks_life_s"]),
    ],
)
def test_values_that_are_wrong_together_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: list[str]
) -> None:
    found = problems(monkeypatch, **{variable(name): value for name, value in variables.items()})
    assert [line.split(":")[0] for line in found] == [variable(name) for name in named]


@pytest.mark.parametrize(
    "variables",
    [
        {"tls_certificate_file": "c", "tls_key_file": "k", "tls_client_ca_file": "a"},
        {
            "recovery_horizon_s": "10.1",
            "postgres_statement_timeout_s": "10",
            "recovery_interval_ms": "10000",
        },
        {"client_identity": "forwarded", "trusted_front": "true"},
        {"client_identity": "forwarded", "trusted_front": "true", "transport": "native"},
        JWT | {"jwt_algorithms": "PS256, EdDSA"},
        JWT | {"jwt_jwks_url": "http://127.0.0.1:8080/jwks.json"},
        {"transport": "native", "trusted_front": "true"},
        {"transport": "native", "trusted_front": "1", "listen_address": "[::1]:0"},
        {"transport": "native", "trusted_front": "true", "listen_address": "localhost:50051"},
        {"listen_address": "0.0.0.0:50051", "connection_age_max_s": "1800"},
        {
            "environment": "production",
            "postgres_dsn": "postgresql://u:p@h/d",
            "redis_url": "rediss://:p@h/0",
        },
    ],
)
def test_values_that_are_right_together_are_accepted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(variable(name), value)
    load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("jwt_algorithms", each) for each in ("none", "HS256", "RS256,HS256", "", ",", "rs256")),
        ("jwt_jwks_url", "http://issuer.example/jwks.json"),
        ("jwt_jwks_url", "http://localhost.example/jwks.json"),
        ("jwt_jwks_url", "https://user:password@issuer.example/jwks.json"),
        ("jwt_jwks_url", "file:///etc/passwd"),
    ],
)
def test_tokens_take_neither_shared_secrets_nor_keys_that_others_can_change(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    found = problems(
        monkeypatch, **{variable(key): each for key, each in (JWT | {name: value}).items()}
    )
    assert [line.split(":")[0] for line in found] == [variable(name)]


def test_every_algorithm_that_can_be_set_can_be_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    for algorithm in ALGORITHMS:
        assert algorithms_of(load_settings(jwt_algorithms=algorithm).jwt_algorithms) == {algorithm}
    with pytest.raises(SettingsError) as caught:
        load_settings(jwt_algorithms="HS256")
    assert all(each in str(caught.value) for each in ALGORITHMS)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::]:50051", ("::", 50051)),
        ("gateway.example:65535", ("gateway.example", 65535)),
    ],
)
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", ":1", "host", "host:", "host:65536", "::1:1", "h:1/x", "http://h:1", "h: 1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


def test_every_setting_is_documented_and_no_name_is_mistaken_for_a_service_link() -> None:
    for name, field in Settings.model_fields.items():
        assert (field.description or "").endswith((".", ")")), name
        assert not name.endswith(("service_host", "service_port")), name


def test_the_committed_table_is_the_one_of_the_code() -> None:
    committed = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert committed == settings_table(), "run `python -m gateway.settings > docs/settings.md`"


def test_the_module_prints_the_table() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gateway.settings"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert run.stdout.decode() == settings_table()


@pytest.mark.parametrize(
    ("name", "address"),
    [
        (name, f"{start}{login}{host}")
        for name, start, hosts in (
            (
                "postgres_dsn",
                "postgresql://",
                (
                    *("h/d", "h:5432/d?sslmode=verify-full&sslrootcert=/ca/a.pem", "[::1]:5432/d"),
                    *("h1:5432,h2:65535/d", "/d?host=/tmp/socket", "%2Ftmp%2Fsocket/d", "h"),
                    f"%2F{'a' * 64}/d",
                ),
            ),
            (
                "redis_url",
                "rediss://",
                ("h", "h:6379/0", "[fe80::1]:6379", "h?ssl_ca_certs=/a.pem"),
            ),
            ("redis_url", "unix://", ("/tmp/redis.sock?db=1",)),
        )
        for host in hosts
        for login in ("", "user@", "user:p%40%2F@", ":word!*()'@")
    ],
)
def test_an_address_that_its_client_can_split_is_taken(name: str, address: str) -> None:
    settings = load_settings(**{name: address})
    assert getattr(settings, name).get_secret_value() == address


@pytest.mark.parametrize(
    ("dsn", "right"),
    [
        ("https://key@host/1", True),
        ("https://key@host:8443/of/it/12", True),
        ("https://key@host/x1", False),
        ("https://key@host:99999/1", False),
        ("key@host/1", False),
    ],
)
def test_where_errors_are_reported_to_is_what_the_reporters_library_takes(
    monkeypatch: pytest.MonkeyPatch, dsn: str, right: bool
) -> None:
    with nullcontext() if right else pytest.raises((BadDsn, ValueError)):
        Dsn(dsn)
    monkeypatch.setenv("GATEWAY_SENTRY_DSN", dsn)
    with nullcontext() if right else pytest.raises(SettingsError):
        load_settings()


_NO_HOSTS = ("a..b", f"{'a' * 64}.example")


@pytest.mark.parametrize(
    ("name", "url"),
    [
        *(("simulator_url", f"http://h{rest}") for rest in (":65536", "/v1", "?a=b", "#a", ":x")),
        *(("stripe_url", f"https://h{rest}") for rest in (":65536", "?a=b", "#a")),
        ("adyen_test_url", "https://[::1"),
        ("connector_proxy_url", "http://user:password@h:65536"),
        ("tracing_endpoint", "http://h:65536/v1/traces"),
        ("jwt_jwks_url", "https://h:65536/jwks.json"),
        # No resolver takes them, and none says so by an OSError.
        *(
            (name, f"http://{host}")
            for name in ("simulator_url", "tracing_endpoint")
            for host in _NO_HOSTS
        ),
        *(("metrics_address", f"{host}:1") for host in _NO_HOSTS),
        *(("postgres_dsn", f"postgresql://user:word@h:1,{host}/d") for host in _NO_HOSTS),
        *(("redis_url", f"rediss://:word@{host}:6379/0") for host in _NO_HOSTS),
    ],
)
def test_an_address_that_nothing_can_be_sent_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    others = JWT if name == "jwt_jwks_url" else {}
    set_ = {variable(key): value for key, value in (others | {name: url}).items()}
    assert [line.split(":")[0] for line in problems(monkeypatch, **set_)] == [variable(name)]


@pytest.mark.parametrize("name", ["postgres_dsn", "redis_url"])
@pytest.mark.parametrize(
    "rest",
    [
        *("user:secret/word@h/d", "user:secret@word@h/d", "user:secret#word@h/d"),
        *("user:secret?word@h/d", "user:secret[word@h/d", "h:secret/d", "h:65536/d", "h:/d?x@y"),
        *("user:secret word@h/d", "h/d?secret", "user:secret:5432/word@h"),
    ],
)
def test_an_address_that_its_client_would_quote_in_an_error_is_refused_without_quoting(
    name: str, rest: str
) -> None:
    start = "postgresql://" if name == "postgres_dsn" else "redis://"
    with pytest.raises(SettingsError) as caught:
        load_settings(**{name: start + rest})
    assert "percent-encoded" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value).replace("password", "")
