"""Access tokens: what a right one proves, and that no wrong one proves anything."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
import warnings
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from gateway.application.accounts import MerchantInfo, Principal
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from gateway.rpc.auth import Authenticator, AuthLimits
from gateway.rpc.tokens import (
    ALGORITHMS,
    NAME_CHARACTERS_MAX,
    TOKEN_CHARACTERS_MAX,
    KeyLimits,
    SigningKeys,
    TokenClaims,
    TokenRules,
    TokenVerifier,
    read_key_set,
)
from tests.tokens import (
    AUDIENCE,
    ISSUER,
    SigningKey,
    claims,
    ec_key,
    ed_key,
    key_set,
    part,
    rsa_key,
    token,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RSA, EC = rsa_key("rsa-1"), ec_key("ec-1")
STRANGER = rsa_key("rsa-1")
"""Another's key under the same name."""
RULES = TokenRules(issuer=ISSUER, audience=AUDIENCE)
LIMITS = KeyLimits(life_s=100.0, pause_s=10.0, stale_s_max=1000.0, waiters_max=2)
DAY_S = 86_400


@dataclass
class Issuer:
    """A key set in memory that counts its readings and may be away, and a clock."""

    keys: tuple[SigningKey, ...] = (RSA, EC)
    body: bytes | None = None
    readings: int = 0
    away: bool = False
    at_s: float = 1000.0
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def __post_init__(self) -> None:
        self.answering.set()

    async def read(self) -> bytes:
        self.readings += 1
        self.reading.release()
        await self.answering.wait()
        if self.away:
            raise TimeoutError
        return key_set(*self.keys) if self.body is None else self.body

    def signing_keys(self, rules: TokenRules = RULES) -> SigningKeys:
        return SigningKeys(self.read, rules.algorithms, LIMITS, clock=lambda: self.at_s)

    def verifier(self, rules: TokenRules = RULES) -> TokenVerifier:
        return TokenVerifier(self.signing_keys(rules), rules)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


async def readings_ended() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)


async def refused(verifier: TokenVerifier, text: str) -> Reason:
    with pytest.raises(GatewayError) as caught:
        await verifier.verify(text)
    return caught.value.reason


# --- right tokens ---------------------------------------------------------------------------------


async def test_a_right_token_says_whom_it_speaks_for(issuer: Issuer) -> None:
    expires_at = int(time.time()) + 60
    text = token(RSA, exp=expires_at, mode="live", merchant_ids=["mer_1", "mer_2"])
    assert await issuer.verifier().verify(text) == TokenClaims(
        subject="shop-backend",
        organisation_id="org_1",
        merchant_ids=("mer_1", "mer_2"),
        scopes=frozenset({"payments:read", "payments:write"}),
        mode=Mode.LIVE,
        expires_at=datetime.fromtimestamp(expires_at, UTC) + timedelta(seconds=RULES.leeway_s),
    )


@pytest.mark.parametrize("type_", ["JWT", "at+jwt", "AT+JWT", "application/at+jwt"])
async def test_an_access_token_may_say_that_it_is_one(issuer: Issuer, type_: str) -> None:
    assert await issuer.verifier().verify(token(EC, {"typ": type_}))


async def test_every_algorithm_that_can_be_pinned_verifies() -> None:
    made = [ed_key("EdDSA"), *(ec_key(name, name) for name in ("ES256", "ES384", "ES512"))]
    made += [
        replace(RSA, kid=name, algorithm=name)
        for name, (kind, _) in ALGORITHMS.items()
        if kind == "RSA"
    ]
    assert {key.algorithm for key in made} == set(ALGORITHMS)
    verifier = Issuer(tuple(made)).verifier(replace(RULES, algorithms=frozenset(ALGORITHMS)))
    for key in made:
        assert await verifier.verify(token(key)), key.algorithm


async def test_audiences_may_be_several_and_merchants_none(issuer: Issuer) -> None:
    told = await issuer.verifier().verify(token(RSA, aud=["other", AUDIENCE], merchant_ids=[]))
    assert told is not None
    assert told.merchant_ids == ()


async def test_clocks_may_differ_by_the_leeway_and_no_more(issuer: Issuer) -> None:
    now = int(time.time())
    verifier = issuer.verifier()
    near, far = RULES.leeway_s - 10, RULES.leeway_s + 10
    for early, late in ((near, now - near), (far, now - far)):
        right = early == near
        assert bool(await verifier.verify(token(RSA, iat=late - 60, nbf=late, exp=late))) is right
        soon = int(now + early)
        assert bool(await verifier.verify(token(RSA, nbf=soon))) is right
        assert bool(await verifier.verify(token(RSA, iat=soon))) is right


# --- wrong tokens ---------------------------------------------------------------------------------


NOW = int(time.time())


@pytest.mark.parametrize(
    "wrong",
    [
        {"iss": "https://issuer.example"},
        {"iss": None},
        {"iss": [ISSUER]},
        {"aud": "another-service"},
        {"aud": AUDIENCE.upper()},
        {"aud": []},
        {"aud": None},
        {"exp": NOW - DAY_S, "iat": NOW - DAY_S - 60, "nbf": NOW - DAY_S - 60},
        {"exp": None},
        {"exp": "soon"},
        {"exp": True},
        {"exp": 1e308},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": NOW + DAY_S * 2},
        {"exp": NOW - 1, "iat": NOW},
        {"nbf": NOW + DAY_S // 2},
        {"nbf": None},
        {"iat": NOW + DAY_S // 2},
        {"iat": None},
        {"iat": -1e300},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * (NAME_CHARACTERS_MAX + 1)},
        {"sub": "line\nbreak"},
        {"organisation_id": None},
        {"organisation_id": ["org_1"]},
        {"merchant_ids": {"mer_1": 1}},
        {"merchant_ids": [1]},
        {"merchant_ids": [f"mer_{n}" for n in range(1001)]},
        {"mode": None},
        {"mode": "LIVE"},
        {"mode": ["live"]},
        {"scope": {"payments:read": True}},
        {"scope": " ".join(f"s{n}" for n in range(51))},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_a_token_with_a_wrong_claim_proves_nothing(
    issuer: Issuer, wrong: dict[str, Any]
) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    text = resigned(RSA, {"alg": "RS256", "typ": "JWT", "kid": "rsa-1"}, **wrong)
    assert await verifier.verify(text) is None


@pytest.mark.parametrize(
    "header",
    [
        {"typ": "logout+jwt"},
        {"typ": "JWE"},
        {"crit": ["exp"], "exp": 1},
        {"b64": False, "crit": ["b64"]},
        {"kid": ""},
        {"kid": "x" * (NAME_CHARACTERS_MAX + 1)},
        {"kid": "RSA-1"},
        {"kid": "rsa-1\u0000"},
    ],
    ids=str,
)
async def test_a_token_with_a_wrong_header_proves_nothing(
    issuer: Issuer, header: dict[str, Any]
) -> None:
    right = token(RSA)
    text = resigned(RSA, {"alg": "RS256", "typ": "JWT", "kid": "rsa-1", **header})
    verifier = issuer.verifier()
    assert await verifier.verify(right)
    assert await verifier.verify(text) is None


def resigned(key: SigningKey, header: dict[str, Any], **changes: object) -> str:
    """A token with exactly this header and these claims, really signed."""
    signed = f"{part(header)}.{part(claims(**changes))}"
    signature = get_default_algorithms()[key.algorithm].sign(signed.encode(), key.private)
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", "", None])
@pytest.mark.parametrize("signature", ["", "AA"])
async def test_an_unsigned_token_proves_nothing(
    issuer: Issuer, algorithm: str | None, signature: str
) -> None:
    header = {"alg": algorithm, "typ": "JWT", "kid": "rsa-1"}
    text = f"{part(header)}.{part(claims())}.{signature}"
    assert await issuer.verifier().verify(text) is None
    # Nor does a right one whose signature was cut off.
    assert await issuer.verifier().verify(token(RSA).rpartition(".")[0] + ".") is None


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_a_public_key_is_no_shared_secret(issuer: Issuer, algorithm: str) -> None:
    public = RSA.private.public_key()
    digest = getattr(hashlib, f"sha{algorithm[2:]}")
    secrets = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(RSA.jwk).encode(),
        b"",
    ]
    for secret in secrets:
        signed = f"{part({'alg': algorithm, 'kid': 'rsa-1'})}.{part(claims())}"
        mac = hmac.new(secret, signed.encode(), digest).digest()
        text = f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
        assert await issuer.verifier().verify(text) is None


async def test_only_the_pinned_algorithms_verify_and_each_key_with_its_own(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    for algorithm in ("RS512", "PS256"):
        assert await verifier.verify(token(replace(RSA, algorithm=algorithm))) is None
    # Pinned or not: a key for RS256 verifies no PS256.
    wider = issuer.verifier(replace(RULES, algorithms=frozenset({"RS256", "PS256"})))
    assert await wider.verify(token(RSA))
    assert await wider.verify(token(replace(RSA, algorithm="PS256"))) is None
    # Nor does a token find a key of another type under its own algorithm.
    assert await verifier.verify(token(replace(EC, kid="rsa-1"))) is None


async def test_a_key_that_the_token_brings_or_points_to_is_not_looked_at(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    certificate = base64.b64encode(b"certificate").decode()
    for header in (
        {"jwk": STRANGER.jwk},
        {"jku": "https://attacker.example/jwks.json"},
        {"x5u": "https://attacker.example/chain.pem"},
        {"x5c": [certificate]},
    ):
        assert await verifier.verify(token(STRANGER, header)) is None
        # They do no harm to a right one either.
        assert await verifier.verify(token(RSA, header))
    assert issuer.readings == 1


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/etc/passwd",
        "file:///dev/null",
        "https://attacker.example/jwks.json",
        "x' UNION SELECT 'secret' --",
        "rsa-1'; DROP TABLE merchants; --",
        "${jndi:ldap://attacker.example/a}",
        "rsa-1 ",
        "*",
    ],
)
async def test_the_name_of_a_key_is_only_compared(issuer: Issuer, kid: str) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    issuer.at_s += LIMITS.pause_s
    assert await verifier.verify(token(replace(STRANGER, kid=kid))) is None
    # At most, one of the ordinary readings was made for it.
    assert issuer.readings == 2


async def test_a_token_without_a_key_name_or_with_another_type_of_it_proves_nothing(
    issuer: Issuer,
) -> None:
    for kid in (None, 1, ["rsa-1"], {"": ""}):
        text = resigned(RSA, {"alg": "RS256", "kid": kid})
        assert await issuer.verifier().verify(text) is None
    assert await issuer.verifier().verify(resigned(RSA, {"alg": "RS256"})) is None


async def test_a_token_that_was_changed_or_cut_proves_nothing(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    text = token(RSA)
    header, payload, signature = text.split(".")
    forged = part(claims(sub="somebody else"))
    assert await verifier.verify(text)
    for wrong in (
        f"{header}.{forged}.{signature}",
        token(STRANGER),
        f"{header}.{payload}",
        f"{header}.{payload}.",
        f"{header}..{signature}",
        f".{payload}.{signature}",
        f"{text}.{signature}",
        f"{header}.{payload}.{signature[:-8]}",
        text[: len(text) // 2],
        text + "A",
        "..",
        "",
        "é" * 40 + ".a.b",
        f"{part([])}.{payload}.{signature}",
        f"{part('x')}.{payload}.{signature}",
        f"{base64.urlsafe_b64encode(b'[' * 900).decode()}.{payload}.{signature}",
    ):
        assert await verifier.verify(wrong) is None, wrong


async def test_a_huge_token_is_refused_before_anything_is_done(issuer: Issuer) -> None:
    big = token(RSA, filler="x" * TOKEN_CHARACTERS_MAX)
    assert len(big) > TOKEN_CHARACTERS_MAX
    assert await issuer.verifier().verify(big) is None
    # A deep nest in a payload of a right token is no crash, and a long header none either.
    deep = f"{part({'alg': 'RS256', 'kid': 'rsa-1', 'filler': 'x' * 3000})}.e30.AA"
    assert await issuer.verifier().verify(deep) is None
    assert issuer.readings == 0


# --- the issuer's keys ----------------------------------------------------------------------------


UNFIT: dict[str, object] = {
    "symmetric": {"kty": "oct", "k": "c2VjcmV0", "kid": "k", "alg": "HS256"},
    "symmetric in disguise": {"kty": "oct", "k": "c2VjcmV0", "kid": "rsa-1", "alg": "RS256"},
    "for encryption": {**RSA.jwk, "use": "enc"},
    "for encryption by its operations": {**RSA.jwk, "key_ops": ["encrypt"]},
    "with operations that are no list": {**RSA.jwk, "key_ops": None},
    "with operations in one text": {**RSA.jwk, "key_ops": "verify"},
    "private": {**RSA.jwk, "d": "AQAB"},
    "without a name": {**RSA.jwk, "kid": None},
    "too short": {**RSA.jwk, "n": "AQAB"},
    "damaged": {**RSA.jwk, "n": "?"},
    "not on the curve": {**EC.jwk, "x": "AA"},
    "another curve": {**EC.jwk, "crv": "secp256k1"},
    "not pinned": {**RSA.jwk, "alg": "RS512"},
    "no key": "key",
}


@pytest.mark.parametrize("why", UNFIT)
def test_a_key_that_is_not_fit_is_left_out_and_spoils_no_other(why: str) -> None:
    document = {"keys": [UNFIT[why], ec_key("fit").jwk]}
    found = read_key_set(json.dumps(document).encode(), RULES.algorithms)
    assert set(found) == {("fit", "ES256")}


def test_a_short_key_is_left_out_without_a_warning_of_the_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_key_set(key_set(rsa_key("short", 1024), RSA), RULES.algorithms)
    assert set(found) == {("rsa-1", "RS256")}


@pytest.mark.parametrize("body", [b"[]", b"\xff", b"[" * 100_000], ids=["list", "no text", "deep"])
def test_a_text_that_is_no_key_set_is_refused_as_a_value(body: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_key_set(body, RULES.algorithms)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"keys": {}}', b'{"keys": []}', b"<html>"])
async def test_a_key_set_without_a_key_changes_nothing(issuer: Issuer, body: bytes) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    issuer.body = body
    issuer.at_s += LIMITS.life_s
    for _ in range(2):
        assert await verifier.verify(token(RSA))
        await readings_ended()
    assert issuer.readings == 2


async def test_a_new_key_is_found_by_one_reading_and_an_old_one_goes_with_it(
    issuer: Issuer,
) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    new = ec_key("ec-2")
    issuer.keys = (new, EC)
    issuer.at_s += LIMITS.pause_s
    assert await verifier.verify(token(new))
    assert issuer.readings == 2
    assert await verifier.verify(token(RSA)) is None
    assert issuer.readings == 2


async def test_unknown_keys_cause_one_reading_in_a_pause_however_many_they_are(
    issuer: Issuer,
) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    for number in range(20):
        assert await verifier.verify(token(replace(STRANGER, kid=f"unknown-{number}"))) is None
    assert issuer.readings == 1
    issuer.at_s += LIMITS.pause_s
    for number in range(20):
        assert await verifier.verify(token(replace(STRANGER, kid=f"unknown-{number}"))) is None
    assert issuer.readings == 2
    assert await verifier.verify(token(RSA))


async def test_keys_are_read_anew_behind_the_calls_when_they_age(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    issuer.at_s += LIMITS.life_s
    issuer.answering.clear()
    await issuer.reading.acquire()
    for _ in range(3):
        assert await verifier.verify(token(RSA))
    await issuer.reading.acquire()
    assert issuer.readings == 2
    issuer.answering.set()
    await readings_ended()


async def test_after_a_long_quiet_a_key_that_was_withdrawn_is_not_believed_once_more(
    issuer: Issuer,
) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    issuer.keys = (EC,)
    issuer.at_s += 2 * LIMITS.life_s
    told = await asyncio.gather(*(verifier.verify(token(RSA)) for _ in range(LIMITS.waiters_max)))
    assert told == [None] * LIMITS.waiters_max
    assert issuer.readings == 2
    # Where the issuer is away, it is known to be from then on, and nobody waits for it again.
    issuer.away = True
    issuer.at_s += 2 * LIMITS.life_s
    assert await verifier.verify(token(EC))
    issuer.at_s += LIMITS.pause_s
    issuer.answering.clear()
    assert await verifier.verify(token(EC))
    issuer.answering.set()
    await readings_ended()


async def test_an_issuer_that_is_away_is_not_noticed_until_the_keys_are_stale(
    issuer: Issuer,
) -> None:
    verifier = issuer.verifier()
    assert await verifier.verify(token(RSA))
    issuer.away = True
    issuer.at_s += LIMITS.stale_s_max - 1
    assert await verifier.verify(token(RSA))
    await readings_ended()
    # What it would say of another key is not known, which is no verdict on the token.
    assert await refused(verifier, token(ec_key("new"))) is Reason.SIGNING_KEYS_UNAVAILABLE
    issuer.at_s += LIMITS.pause_s
    assert await refused(verifier, token(RSA)) is Reason.SIGNING_KEYS_UNAVAILABLE
    issuer.away = False
    issuer.at_s += LIMITS.pause_s
    assert await verifier.verify(token(RSA))


async def test_without_any_keys_yet_tokens_are_refused_for_now_only(issuer: Issuer) -> None:
    verifier = issuer.verifier()
    issuer.away = True
    for _ in range(5):
        assert await refused(verifier, token(RSA)) is Reason.SIGNING_KEYS_UNAVAILABLE
    assert issuer.readings == 1
    issuer.away = False
    issuer.at_s += LIMITS.pause_s
    assert await verifier.verify(token(RSA))


async def test_a_slow_issuer_holds_up_a_few_tokens_and_the_others_are_refused(
    issuer: Issuer,
) -> None:
    verifier = issuer.verifier()
    issuer.answering.clear()
    waiting = [asyncio.ensure_future(verifier.verify(token(RSA))) for _ in range(2)]
    await issuer.reading.acquire()
    assert await refused(verifier, token(RSA)) is Reason.OVERLOADED
    issuer.answering.set()
    assert all(await asyncio.gather(*waiting))
    assert issuer.readings == 1


async def test_closing_ends_a_reading_under_way(issuer: Issuer) -> None:
    keys = issuer.signing_keys()
    issuer.answering.clear()
    keys.refresh()
    await issuer.reading.acquire()
    await keys.close()
    await keys.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# --- tokens as credentials ------------------------------------------------------------------------


@dataclass
class CountingTokens:
    verifier: TokenVerifier
    verified: int = 0

    async def verify(self, text: str) -> TokenClaims | None:
        self.verified += 1
        return await self.verifier.verify(text)


@dataclass
class Door:
    """An authenticator of tokens, its clock, and the merchants of `org_1`."""

    issuer: Issuer
    tokens: CountingTokens
    authenticator: Authenticator
    key_reads: list[str]


@pytest.fixture
def door(issuer: Issuer) -> Door:
    key_reads: list[str] = []

    async def load_key(key_id: str) -> None:
        key_reads.append(key_id)

    async def load_merchants(
        organisation_id: str, merchant_ids: Sequence[str] | None
    ) -> dict[str, MerchantInfo]:
        have = {"org_1": ("mer_1", "mer_2")}.get(organisation_id, ())
        return {
            each: MerchantInfo(each)
            for each in have
            if merchant_ids is None or each in merchant_ids
        }

    tokens = CountingTokens(issuer.verifier())
    authenticator = Authenticator(
        load_key,
        AuthLimits(life_s=10.0, negative_life_s=4.0),
        tokens=tokens,
        load_merchants=load_merchants,
        clock=lambda: issuer.at_s,
    )
    return Door(issuer, tokens, authenticator, key_reads)


async def test_a_token_proves_a_principal_with_the_merchants_that_there_are(door: Door) -> None:
    bearer = f"Bearer {token(RSA, merchant_ids=['mer_2', 'mer_of_another'])}"
    assert await door.authenticator.authenticate(bearer) == Principal(
        "sub:shop-backend",
        "org_1",
        frozenset({"payments:read", "payments:write"}),
        Mode.TEST,
        {"mer_2": MerchantInfo("mer_2")},
    )
    all_of_it = await door.authenticator.authenticate(f"bearer {token(RSA)}")
    assert set(all_of_it.merchants) == {"mer_1", "mer_2"}
    nobodys = await door.authenticator.authenticate(f"Bearer {token(RSA, organisation_id='org_9')}")
    assert nobodys.merchants == {}
    assert door.key_reads == []


async def test_a_remembered_token_costs_no_signature(door: Door) -> None:
    bearer = f"Bearer {token(RSA)}"
    principal = await door.authenticator.authenticate(bearer)
    for _ in range(10):
        assert door.authenticator.remembered(bearer) is principal
        assert await door.authenticator.authenticate(bearer) is principal
    assert door.tokens.verified == 1


async def test_a_remembered_token_ends_when_it_expires(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    expires_at = int(time.time()) + 60
    bearer = f"Bearer {token(RSA, exp=expires_at)}"
    await door.authenticator.authenticate(bearer)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(expires_at + RULES.leeway_s, tz)

    monkeypatch.setattr("gateway.rpc.auth.datetime", Later)
    assert door.authenticator.remembered(bearer) is None
    assert await reason_of(door, bearer) is Reason.CREDENTIAL_INVALID


async def test_a_token_of_a_key_that_the_issuer_withdrew_ends_within_the_life(door: Door) -> None:
    bearer = f"Bearer {token(RSA)}"
    await door.authenticator.authenticate(bearer)
    door.issuer.keys = (EC,)
    door.issuer.at_s += LIMITS.life_s
    # The keys are read behind this call, and so is the token after it.
    await door.authenticator.authenticate(bearer)
    await readings_ended()
    door.issuer.at_s += 10.0
    assert await reason_of(door, bearer) is Reason.CREDENTIAL_INVALID


async def reason_of(door: Door, bearer: str) -> Reason:
    with pytest.raises(GatewayError) as caught:
        await door.authenticator.authenticate(bearer)
    return caught.value.reason


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: f"Basic {token(RSA)}",
        lambda: token(RSA),
        lambda: f"Bearer {token(STRANGER)}",
        lambda: f"Bearer gwk_{token(RSA)}",
        lambda: "Bearer ",
    ],
)
async def test_a_wrong_token_is_a_wrong_credential_and_is_not_looked_at_twice(
    door: Door, wrong: Callable[[], str]
) -> None:
    bearer = wrong()
    for _ in range(3):
        assert await reason_of(door, bearer) is Reason.CREDENTIAL_INVALID
    assert door.tokens.verified <= 1


async def test_no_part_of_a_token_is_kept_or_told(door: Door) -> None:
    bearer = f"Bearer {token(RSA)}"
    wrong = f"Bearer {token(STRANGER)}"
    await door.authenticator.authenticate(bearer)
    with pytest.raises(GatewayError) as caught:
        await door.authenticator.authenticate(wrong)
    kept = repr(vars(door.authenticator)) + caught.value.message
    for text in (*bearer.split("."), *wrong.split(".")):
        assert text.removeprefix("Bearer ") not in kept
