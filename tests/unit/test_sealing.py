"""Sealed credentials open for their own account, with a key that is there, unchanged."""

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.application.connector_accounts import KeyServiceError, Sealed, WrappedKey
from gateway.connectors.sealing import (
    CREDENTIALS_BYTES_MAX,
    LocalKeys,
    SealBroken,
    new_wrapping_key,
    rewrap,
    seal,
    unseal,
)

CONTEXT = b"mer_1\0acc_1\0TEST\0stripe"
CREDENTIALS = {"secret_key": "sk_test_0123456789"}
OLD, NEW = new_wrapping_key("old"), new_wrapping_key("new")


async def test_what_was_sealed_opens_and_does_not_show() -> None:
    keys = LocalKeys.parse(OLD)
    sealed = await seal(CREDENTIALS, CONTEXT, keys)
    assert await unseal(sealed, CONTEXT, keys) == CREDENTIALS
    assert b"sk_test" not in sealed.ciphertext + sealed.data_key.ciphertext
    again = await seal(CREDENTIALS, CONTEXT, keys)
    assert again.ciphertext != sealed.ciphertext
    assert again.data_key.ciphertext != sealed.data_key.ciphertext


@pytest.mark.parametrize("other", [b"", CONTEXT + b"x", CONTEXT.replace(b"mer_1", b"mer_2")])
async def test_what_was_sealed_for_one_account_opens_for_no_other(other: bytes) -> None:
    keys = LocalKeys.parse(OLD)
    sealed = await seal(CREDENTIALS, CONTEXT, keys)
    with pytest.raises(KeyServiceError):
        await unseal(sealed, other, keys)
    # Nor the credentials of one with the data key of the other.
    theirs = await seal({"secret_key": "theirs"}, other, keys)
    with pytest.raises(SealBroken):
        await unseal(Sealed(sealed.ciphertext, theirs.data_key), other, keys)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7), of_key=st.booleans())
async def test_any_changed_bit_is_found_out(position: int, bit: int, of_key: bool) -> None:
    keys = LocalKeys.parse(OLD)
    sealed = await seal(CREDENTIALS, CONTEXT, keys)
    text = bytearray(sealed.data_key.ciphertext if of_key else sealed.ciphertext)
    text[position % len(text)] ^= 1 << bit
    if of_key:
        changed = replace(sealed, data_key=WrappedKey("old", bytes(text)))
    else:
        changed = replace(sealed, ciphertext=bytes(text))
    with pytest.raises((KeyServiceError, SealBroken)):
        await unseal(changed, CONTEXT, keys)


async def test_cut_ciphertexts_are_found_out() -> None:
    keys = LocalKeys.parse(OLD)
    sealed = await seal(CREDENTIALS, CONTEXT, keys)
    for length in (0, 1, 12, 20):
        with pytest.raises(SealBroken):
            await unseal(replace(sealed, ciphertext=sealed.ciphertext[:length]), CONTEXT, keys)


async def test_the_first_key_wraps_and_all_unwrap_until_the_old_one_is_taken_out() -> None:
    sealed = await seal(CREDENTIALS, CONTEXT, LocalKeys.parse(OLD))
    both = LocalKeys.parse(f"{NEW}\n{OLD}\n")
    assert both.current_key_id == "new"
    assert await unseal(sealed, CONTEXT, both) == CREDENTIALS
    moved = await rewrap(sealed, CONTEXT, both)
    assert moved.ciphertext == sealed.ciphertext
    only_new = LocalKeys.parse(NEW)
    assert await unseal(moved, CONTEXT, only_new) == CREDENTIALS
    with pytest.raises(KeyServiceError, match="no wrapping key 'old'"):
        await unseal(sealed, CONTEXT, only_new)
    another = LocalKeys.parse(new_wrapping_key("new"))
    with pytest.raises(KeyServiceError, match="another one"):
        await unseal(moved, CONTEXT, another)


async def test_credentials_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        await seal({"x": "y" * CREDENTIALS_BYTES_MAX}, CONTEXT, LocalKeys.parse(OLD))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no-colon",
        "id:tooshort",
        "id:" + base64.b64encode(b"k" * 31).decode(),
        "id:" + base64.b64encode(b"k" * 33).decode(),
        "bad id:" + base64.b64encode(b"k" * 32).decode(),
        f"{OLD},{OLD}",
        f"{OLD},id:SECRETSECRETSECRETSECRETSECRETSECRETSECRET",
        "\n".join(new_wrapping_key(str(number)) for number in range(33)),
    ],
    # Not by their values, which are random: every process has to name the tests alike.
    ids=["none", "no colon", "no key", "short", "long", "bad id", "twice", "no base64", "too many"],
)
def test_keys_that_are_none_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ValueError, match="wrapping key") as caught:
        LocalKeys.parse(text)
    assert "SECRET" not in str(caught.value)
    assert OLD.partition(":")[2] not in str(caught.value)
