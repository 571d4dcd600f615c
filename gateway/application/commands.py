"""What the use cases are asked for: calls authenticated, validated and free of card data."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.application.accounts import RateLimit
from gateway.application.ports import CARD
from gateway.domain.making import maker
from gateway.domain.model import CaptureMethod, Mode
from gateway.routing.rules import Facts


@dataclass(slots=True)
class Command:
    """What every money call has."""

    merchant_id: str
    mode: Mode
    idempotency_key: str
    fingerprint: bytes
    """Equal for equal payloads: see `gateway.rpc.fingerprint`."""
    request_id: str
    deadline: float | None
    """When the caller gives up, as a time of `time.monotonic()`; None where it waits for ever."""
    begun_at: float = field(default_factory=time.monotonic, compare=False, kw_only=True)
    """When the call was ready to begin, as a time of `time.monotonic()`."""
    rate_limit: RateLimit | None = field(default=None, compare=False, kw_only=True)
    """The merchant's."""
    item: bool = field(default=False, compare=False, kw_only=True)
    """It is one of a batch or a stream. It has a task of its own, which nobody cancels, and needs
    no second one; and it wants throughput: it waits for its neighbours."""
    executes: bool = field(default=False, compare=False, kw_only=True)
    """It has begun its operation, or another attempt of it: what comes of that is no repeat."""


@dataclass(slots=True)
class Authorize(Command):
    """Authorize (amount above zero) or verify (amount zero)."""

    amount_minor: int
    currency: str
    capture_method: CaptureMethod
    payment_method_token: str
    allow_partial_approval: bool
    merchant_order_id: str
    merchant_transaction_id: str
    details: bytes
    """The request in the contract's encoding, without key and merchant."""
    used_fields: frozenset[str]
    """The paths of the fields that a connector must support."""
    method: str = CARD
    """The payment method, as `Capabilities.methods` names it."""
    method_fields: frozenset[str] = frozenset()
    """The fields that the message of a method other than a token has."""
    customer_country: str = ""
    """As the method's message tells it."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """See ConnectorRequest."""
    facts: Callable[[], Facts] = field(default=Facts, compare=False)
    """What the request tells that routing looks at; read only where somebody asks."""


make_authorize = maker(Authorize)


@dataclass(slots=True)
class Capture(Command):
    """Capture an amount, or (None) all that is left."""

    payment_id: str
    amount_minor: int | None
    currency: str | None
    final: bool
    merchant_transaction_id: str = ""


@dataclass(slots=True)
class Void(Command):
    """Void a payment, named by its id or by the key of its authorization."""

    payment_id: str | None
    authorize_idempotency_key: str | None
    note: str = ""
    merchant_transaction_id: str = ""


@dataclass(slots=True)
class Refund(Command):
    """Refund an amount, or (None) all that is left; of one capture where it is named."""

    payment_id: str
    amount_minor: int | None
    currency: str | None
    capture_operation_id: str | None
    note: str = ""
    merchant_transaction_id: str = ""


@dataclass(slots=True)
class Increment(Command):
    """Raise the authorized amount."""

    payment_id: str
    amount_minor: int
    currency: str
    merchant_transaction_id: str = ""


@dataclass(slots=True)
class Answer:
    """The answer to a money call."""

    response: bytes
    """The response in the contract's encoding, without its `replay` field."""
    replayed: bool
    first_request_id: str
    """With `replayed`: the id of the request that was answered first."""
    payment_id: str
    """For the log; empty where the answer came from Redis."""
    frozen: bool = True
    """Whether every repeat will get these bytes."""
