"""A merchant's accounts at PSPs: what is stored of one, and the ports to the store and to a KMS."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol

from gateway.domain.model import Mode

PRIORITY_DEFAULT: Final = 100
PRIORITY_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key, encrypted by a wrapping key that never leaves the key service."""

    key_id: str
    """Of the wrapping key."""
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class Sealed:
    """Credentials, encrypted by a data key of their own."""

    ciphertext: bytes
    data_key: WrappedKey


@dataclass(frozen=True, slots=True)
class ConnectorAccount:
    """A merchant's account at a PSP."""

    merchant_id: str
    account_id: str
    mode: Mode
    connector: str
    sealed: Sealed = field(repr=False)
    priority: int = PRIORITY_DEFAULT
    """A new payment goes to the enabled account of the lowest number."""
    enabled: bool = True
    """Otherwise it takes no new payments; those that it has are served."""
    capabilities: Mapping[str, object] = field(default_factory=dict)
    """What this account can do where that differs from the connector's usual:
    see `gateway.connectors.kinds`."""
    version: int = 1
    """Plus one with each change but that of a wrapping key."""
    removed: bool = False
    updated_at: datetime | None = None

    @property
    def context(self) -> bytes:
        """What the credentials are bound to: sealed for one account, they open for no other."""
        parts = (self.merchant_id, self.account_id, self.mode.name, self.connector)
        return "\0".join(parts).encode("utf-8")


class KeyServiceError(Exception):
    """A data key could not be wrapped or unwrapped; the text says why and holds no key."""


class KeyService(Protocol):
    """Wraps data keys: keys from the settings, or a key management service."""

    @property
    def current_key_id(self) -> str:
        """Of the wrapping key that `wrap` uses."""

    async def wrap(self, data_key: bytes, context: bytes) -> WrappedKey:
        """Encrypt a data key. Raises KeyServiceError."""

    async def unwrap(self, wrapped: WrappedKey, context: bytes) -> bytes:
        """The data key, by whichever wrapping key it was wrapped with. Raises KeyServiceError."""


class AccountSource(Protocol):
    """Where the accounts are kept."""

    async def changed_since(self, since: datetime | None) -> Sequence[ConnectorAccount]:
        """The accounts that changed at or after `since`, removed ones too; None: those that are.

        What changed shortly before may be among them. Raises StoreUnavailable.
        """
