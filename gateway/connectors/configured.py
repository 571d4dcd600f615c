"""The kinds of connectors and the wrapping keys that the settings ask for."""

from collections.abc import Callable
from pathlib import Path

from gateway.application.notifications import Received
from gateway.connectors.adyen.kind import AdyenKind
from gateway.connectors.adyen.notifications import AdyenNotifications
from gateway.connectors.braintree.kind import BraintreeKind
from gateway.connectors.braintree.notifications import BraintreeNotifications
from gateway.connectors.http import HttpClient, Limits
from gateway.connectors.iso8583.host import HostLimits
from gateway.connectors.iso8583.kind import Iso8583Kind, open_hosts
from gateway.connectors.kinds import ConnectorKind
from gateway.connectors.notifications import NotificationSource
from gateway.connectors.sealing import LocalKeys
from gateway.connectors.simulator.kind import SimulatorKind
from gateway.connectors.simulator.notifications import SimulatorNotifications
from gateway.connectors.stripe.kind import StripeKind
from gateway.connectors.stripe.notifications import StripeNotifications
from gateway.settings import Settings

STRIPE_BODY_BYTES_MAX = 2 * 1024 * 1024
"""A page of a hundred objects."""
BRAINTREE_BODY_BYTES_MAX = 2 * 1024 * 1024
"""A page of fifty Transactions, each with its history."""


class ConnectorsMisconfigured(ValueError):
    """The settings of the connectors cannot be used; the text holds no secret."""


def configured_kinds(
    settings: Settings,
    count_acquirer_event: Callable[[str, str], None] | None = None,
    tell: Callable[[Received], None] | None = None,
) -> list[ConnectorKind]:
    """Connects to nothing yet. Raises ConnectorsMisconfigured.

    `count_acquirer_event` gets the name of a host and of what happened on a connection to it;
    `tell` keeps what a connector finds out too late for an answer.
    """
    stripe_limits = Limits(
        connections_max=settings.stripe_connections_max,
        connect_timeout_s=settings.stripe_connect_timeout_s,
        body_bytes_max=STRIPE_BODY_BYTES_MAX,
    )
    adyen_limits = Limits(
        connections_max=settings.adyen_connections_max,
        connect_timeout_s=settings.adyen_connect_timeout_s,
    )
    braintree_limits = Limits(
        connections_max=settings.braintree_connections_max,
        connect_timeout_s=settings.braintree_connect_timeout_s,
        body_bytes_max=BRAINTREE_BODY_BYTES_MAX,
    )
    return [
        SimulatorKind(
            Limits(
                connections_max=settings.simulator_connections_max,
                connect_timeout_s=settings.simulator_connect_timeout_s,
            ),
            settings.simulator_answer_timeout_s,
        ),
        StripeKind(
            _pool(settings, "Stripe", settings.stripe_url, stripe_limits),
            url=settings.stripe_url,
            answer_timeout_s=settings.stripe_answer_timeout_s,
        ),
        AdyenKind(
            lambda url: _pool(settings, "Adyen", url, adyen_limits),
            test_url=settings.adyen_test_url,
            answer_timeout_s=settings.adyen_answer_timeout_s,
        ),
        BraintreeKind(
            lambda url: _pool(settings, "Braintree", url, braintree_limits),
            sandbox_url=settings.braintree_sandbox_url,
            answer_timeout_s=settings.braintree_answer_timeout_s,
        ),
        _iso8583(settings, count_acquirer_event, tell),
    ]


def _iso8583(
    settings: Settings,
    count_event: Callable[[str, str], None] | None,
    tell: Callable[[Received], None] | None,
) -> Iso8583Kind:
    """Connects to nothing yet. Raises ConnectorsMisconfigured."""
    limits = HostLimits(
        connections=settings.iso8583_connections,
        in_flight_max=settings.iso8583_in_flight_max,
        connect_timeout_s=settings.iso8583_connect_timeout_s,
        network_timeout_s=settings.iso8583_network_timeout_s,
        echo_interval_s=settings.iso8583_echo_interval_s,
        reconnect_s_max=settings.iso8583_reconnect_s_max,
    )
    try:
        return Iso8583Kind(
            open_hosts(
                settings.iso8583_hosts,
                limits,
                ca_file=settings.connector_ca_file,
                count_event=count_event,
            ),
            tell,
        )
    except (OSError, ValueError) as error:
        raise ConnectorsMisconfigured(f"An acquirer's host cannot be used: {error}") from error


def _pool(settings: Settings, name: str, url: str, limits: Limits) -> HttpClient:
    """Connects to nothing yet. Raises ConnectorsMisconfigured."""
    proxy_url = settings.connector_proxy_url.get_secret_value()
    try:
        return HttpClient(
            url,
            limits,
            ca_file=settings.connector_ca_file,
            proxy_url=proxy_url if url.startswith("https://") else "",
        )
    except (OSError, ValueError) as error:
        raise ConnectorsMisconfigured(f"{name} cannot be connected to: {error}") from error


def configured_keys(settings: Settings) -> LocalKeys | None:
    """The wrapping keys; None where none are set. Raises ConnectorsMisconfigured."""
    text = settings.connector_keys.get_secret_value()
    try:
        if settings.connector_keys_file:
            text = Path(settings.connector_keys_file).read_text("ascii")
        return LocalKeys.parse(text) if text else None
    except (OSError, ValueError) as error:
        raise ConnectorsMisconfigured(f"The wrapping keys cannot be used: {error}") from error


def configured_sources(settings: Settings) -> list[NotificationSource]:
    """Those whose notifications the gateway takes."""
    return [
        StripeNotifications(settings.notifications_tolerance_s),
        AdyenNotifications(),
        BraintreeNotifications(),
        SimulatorNotifications(settings.notifications_tolerance_s),
    ]
