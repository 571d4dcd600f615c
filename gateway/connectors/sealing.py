"""Envelope encryption of credentials: AES-256-GCM (NIST SP 800-38D), a random data key for each.

The data key is wrapped by a key service. Both ciphertexts are bound to the account (as additional
authenticated data), so that nothing sealed for one account opens for another.
"""

import binascii
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Final

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.application.connector_accounts import KeyService, KeyServiceError, Sealed, WrappedKey

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
"""Random. A data key seals once; of a wrapping key NIST allows 2^32 random nonces."""
CREDENTIALS_BYTES_MAX: Final = 16 * 1024
KEYS_MAX: Final = 32
"""How many wrapping keys may be configured at once."""

_KEY = re.compile(r"([A-Za-z0-9_.-]{1,64}):([A-Za-z0-9+/]{43}=)")
_CREDENTIALS = b"credentials\0"
_DATA_KEY = b"data key\0"


class SealBroken(Exception):
    """The sealed credentials were changed, or belong to another account."""


async def seal(credentials: Mapping[str, str], context: bytes, keys: KeyService) -> Sealed:
    """Seal credentials for the account that `context` names. Raises KeyServiceError, and
    ValueError for credentials that are too long.
    """
    plain = orjson.dumps(dict(credentials))
    if len(plain) > CREDENTIALS_BYTES_MAX:
        raise ValueError("the credentials are too long")
    data_key = secrets.token_bytes(KEY_BYTES)
    ciphertext = _encrypt(data_key, plain, _CREDENTIALS + context)
    return Sealed(ciphertext, await keys.wrap(data_key, context))


async def unseal(sealed: Sealed, context: bytes, keys: KeyService) -> dict[str, str]:
    """The credentials. Raises KeyServiceError, and SealBroken."""
    data_key = await keys.unwrap(sealed.data_key, context)
    try:
        plain = _decrypt(data_key, sealed.ciphertext, _CREDENTIALS + context)
    except InvalidTag:
        raise SealBroken("the credentials were changed, or are another account's") from None
    credentials: dict[str, str] = orjson.loads(plain)
    return credentials


async def rewrap(sealed: Sealed, context: bytes, keys: KeyService) -> Sealed:
    """The same credentials under the current wrapping key; their ciphertext stays as it is."""
    data_key = await keys.unwrap(sealed.data_key, context)
    return Sealed(sealed.ciphertext, await keys.wrap(data_key, context))


class LocalKeys:
    """Wrapping keys that this process holds. Implements the KeyService port.

    The first wraps, all unwrap: a new key is put first, `gateway connectors rewrap` moves the
    accounts to it, then the old one is taken out.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Key ids to keys of 32 bytes. Raises ValueError for none, too many, or another length."""
        if not 0 < len(keys) <= KEYS_MAX:
            raise ValueError(f"there must be 1 to {KEYS_MAX} wrapping keys")
        if any(len(key) != KEY_BYTES for key in keys.values()):
            raise ValueError(f"a wrapping key has {KEY_BYTES} bytes")
        self._keys = dict(keys)
        self._current = next(iter(self._keys))

    @classmethod
    def parse(cls, text: str) -> "LocalKeys":
        """Keys as `id:base64`, one a line or separated by commas. Raises ValueError, whose text
        shows no part of a key.
        """
        keys: dict[str, bytes] = {}
        for number, entry in enumerate(re.split(r"[,\s]+", text.strip()), 1):
            match = _KEY.fullmatch(entry)
            if match is None:
                raise ValueError(f"wrapping key {number} is not `id:` and 32 bytes in base64")
            if match[1] in keys:
                raise ValueError(f"wrapping key {number} has the id of an earlier one")
            try:
                keys[match[1]] = b64decode(match[2], validate=True)
            except binascii.Error:
                raise ValueError(f"wrapping key {number} is not valid base64") from None
        return cls(keys)

    @property
    def current_key_id(self) -> str:
        """The id of the first key."""
        return self._current

    async def wrap(self, data_key: bytes, context: bytes) -> WrappedKey:
        """See the port."""
        ciphertext = _encrypt(self._keys[self._current], data_key, _DATA_KEY + context)
        return WrappedKey(self._current, ciphertext)

    async def unwrap(self, wrapped: WrappedKey, context: bytes) -> bytes:
        """See the port."""
        key = self._keys.get(wrapped.key_id)
        if key is None:
            raise KeyServiceError(f"there is no wrapping key {wrapped.key_id!r}")
        try:
            return _decrypt(key, wrapped.ciphertext, _DATA_KEY + context)
        except InvalidTag:
            raise KeyServiceError(
                f"the wrapping key {wrapped.key_id!r} is another one, or the data key was changed"
            ) from None


def new_wrapping_key(key_id: str) -> str:
    """A new random key as `LocalKeys.parse` takes it. Raises ValueError for an unfit id."""
    text = f"{key_id}:{b64encode(secrets.token_bytes(KEY_BYTES)).decode('ascii')}"
    LocalKeys.parse(text)
    return text


def _encrypt(key: bytes, plain: bytes, context: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, context)


def _decrypt(key: bytes, ciphertext: bytes, context: bytes) -> bytes:
    if len(ciphertext) <= NONCE_BYTES:
        raise InvalidTag
    return AESGCM(key).decrypt(ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:], context)
