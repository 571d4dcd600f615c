"""API keys become principals; what is remembered of them is bounded in number and in age."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

import pytest

from gateway.application.accounts import (
    KEY_CHARACTERS_MAX,
    KeyRecord,
    MerchantInfo,
    Principal,
    Scope,
    new_key,
)
from gateway.application.ports import StoreUnavailable
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.model import Mode
from gateway.rpc import auth
from gateway.rpc.auth import (
    Authenticator,
    AuthLimits,
    find_merchant,
    require_scope,
    resolve_merchant,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import tzinfo

LIMITS = AuthLimits(life_s=10.0, negative_life_s=4.0, entries_max=3, loads_max=2)
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
STUCK_S = 10.0
"""What has not begun after so long never will."""


class WallClock(datetime):
    """The time of day, as a test sets it."""

    at = NOW

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls.fromtimestamp(cls.at.timestamp(), tz)


@dataclass
class Keys:
    """A store of keys that counts its reads, and may be slow or away, and a clock."""

    records: dict[str, KeyRecord] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    away: bool = False
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released once for each read that has begun."""
    read_takes_s: float = 0.0
    at_s: float = 1000.0

    def __post_init__(self) -> None:
        self.answering.set()

    def authenticator(self, limits: AuthLimits = LIMITS) -> Authenticator:
        return Authenticator(self.load, limits, clock=lambda: self.at_s)

    async def load(self, key_id: str) -> KeyRecord | None:
        self.reads.append(key_id)
        self.reading.release()
        record = self.records.get(key_id)
        await self.answering.wait()
        self.at_s += self.read_takes_s
        if self.away:
            raise StoreUnavailable("no answer")
        return record

    def add(self, mode: Mode = Mode.TEST, *merchant_ids: str) -> str:
        """A stored key, as the header carries it."""
        key = new_key(mode)
        self.records[key.key_id] = KeyRecord(
            key_id=key.key_id,
            secret_hash=key.secret_hash,
            organisation_id="org_1",
            scopes=frozenset({Scope.PAYMENTS_READ}),
            mode=mode,
            expires_at=None,
            revoked_at=None,
            merchants={each: MerchantInfo(each) for each in merchant_ids or ("mer_1",)},
        )
        return f"Bearer {key.text}"

    def change(self, header: str, **changes: object) -> None:
        key_id = f"key_{header.split('_')[2]}"
        self.records[key_id] = replace(self.records[key_id], **changes)  # type: ignore[arg-type]


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture(autouse=True)
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> type[WallClock]:
    monkeypatch.setattr(auth, "datetime", WallClock)
    monkeypatch.setattr(WallClock, "at", NOW)
    return WallClock


async def refused(call: Awaitable[Principal]) -> Reason:
    with pytest.raises(GatewayError) as caught:
        await call
    return caught.value.reason


async def is_valid(authenticator: Authenticator, header: str) -> bool:
    try:
        await authenticator.authenticate(header)
    except GatewayError as error:
        assert error.reason is Reason.CREDENTIAL_INVALID  # noqa: PT017 - nothing else is expected
        return False
    return True


async def reads_ended() -> None:
    """Let the reads in the background come to their ends: they wait for nothing but their turn."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)


# --- which keys are valid -------------------------------------------------------------------------


async def test_a_key_proves_the_principal_of_its_record(keys: Keys) -> None:
    header = keys.add(Mode.LIVE, "mer_1", "mer_2")
    (record,) = keys.records.values()
    assert await keys.authenticator().authenticate(header) == Principal(
        record.key_id, "org_1", record.scopes, Mode.LIVE, record.merchants
    )


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "Bearer  "])
async def test_the_scheme_is_read_in_any_case_and_spaces_do_not_count(
    keys: Keys, scheme: str
) -> None:
    header = keys.add().replace("Bearer ", scheme)
    assert await is_valid(keys.authenticator(), header)
    assert await is_valid(keys.authenticator(), header + " ")


@pytest.mark.parametrize("header", [None, ""])
async def test_a_call_without_a_key_is_told_so(keys: Keys, header: str | None) -> None:
    assert await refused(keys.authenticator().authenticate(header)) is Reason.CREDENTIAL_MISSING


@pytest.mark.parametrize(
    "wrong",
    [
        lambda header: header.removeprefix("Bearer "),
        lambda header: header.replace("Bearer", "Basic"),
        lambda header: "Bearer ",
        lambda header: header + "0",
        lambda header: header[:-1],
        lambda header: header + "0" * KEY_CHARACTERS_MAX,
        lambda header: header.upper(),
        lambda header: header.replace("gwk_test", "gwk_none"),
        lambda header: header[:-1] + "\u0660",
        lambda header: "Bearer " + "é" * 100,
    ],
)
async def test_what_has_not_the_form_of_a_key_is_refused_without_a_read(
    keys: Keys, wrong: Callable[[str], str]
) -> None:
    header = wrong(keys.add())
    assert await refused(keys.authenticator().authenticate(header)) is Reason.CREDENTIAL_INVALID
    assert keys.reads == []


async def test_unknown_wrong_revoked_expired_and_of_another_mode_are_told_alike(
    keys: Keys,
) -> None:
    headers = {name: keys.add() for name in ("wrong", "revoked", "expired", "mode", "ends now")}
    headers["wrong"] = headers["wrong"][:-1] + ("0" if headers["wrong"][-1] != "0" else "1")
    keys.change(headers["revoked"], revoked_at=NOW)
    keys.change(headers["expired"], expires_at=NOW - timedelta(seconds=1))
    keys.change(headers["ends now"], expires_at=NOW)
    headers["mode"] = headers["mode"].replace("gwk_test", "gwk_live")
    headers["unknown"] = f"Bearer {new_key(Mode.TEST).text}"
    texts: set[str] = set()
    for header in headers.values():
        with pytest.raises(GatewayError) as caught:
            await keys.authenticator().authenticate(header)
        assert caught.value.reason is Reason.CREDENTIAL_INVALID
        assert header.rpartition("_")[2] not in caught.value.message
        texts.add(caught.value.message)
    assert len(texts) == 1


async def test_a_database_that_is_away_refuses_nobody_for_good(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    keys.away = True
    assert await refused(authenticator.authenticate(header)) is Reason.STORE_UNAVAILABLE
    keys.away = False
    assert await is_valid(authenticator, header)


# --- what is remembered ---------------------------------------------------------------------------


async def test_a_remembered_key_costs_no_read_and_no_turn_of_the_loop(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    assert authenticator.remembered(header) is None
    assert authenticator.remembered(None) is None
    principal = await authenticator.authenticate(header)
    keys.at_s += LIMITS.life_s / 2 - 0.1
    assert authenticator.remembered(header) is principal
    assert await authenticator.authenticate(header) is principal
    assert len(keys.reads) == 1


async def test_nothing_that_was_presented_is_kept(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    await authenticator.authenticate(header)
    await refused(authenticator.authenticate(header + "0"))
    assert header.rpartition("_")[2] not in repr(vars(authenticator))


async def test_a_key_in_use_is_read_anew_behind_its_callers(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    await authenticator.authenticate(header)
    keys.change(header, scopes=frozenset({Scope.ADMIN}))
    keys.at_s += LIMITS.life_s / 2
    keys.answering.clear()
    for _ in range(3):
        before = authenticator.remembered(header)
        assert before is not None
        assert before.scopes == {Scope.PAYMENTS_READ}
    keys.answering.set()
    await reads_ended()
    after = authenticator.remembered(header)
    assert after is not None
    assert after.scopes == {Scope.ADMIN}
    assert len(keys.reads) == 2


@pytest.mark.parametrize("away", [False, True])
async def test_a_revocation_is_effective_within_the_life_whatever_the_database_does(
    keys: Keys, *, away: bool
) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    await authenticator.authenticate(header)
    keys.change(header, revoked_at=NOW)
    keys.away = away
    keys.at_s += LIMITS.life_s
    assert authenticator.remembered(header) is None
    expected = Reason.STORE_UNAVAILABLE if away else Reason.CREDENTIAL_INVALID
    assert await refused(authenticator.authenticate(header)) is expected


async def test_a_revocation_is_seen_in_half_of_the_life_by_a_key_in_use(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    await authenticator.authenticate(header)
    keys.change(header, revoked_at=NOW)
    keys.at_s += LIMITS.life_s / 2
    assert authenticator.remembered(header) is not None
    await reads_ended()
    assert authenticator.remembered(header) is None
    assert await refused(authenticator.authenticate(header)) is Reason.CREDENTIAL_INVALID


async def test_the_life_of_a_key_begins_with_its_read_not_with_a_slow_answer(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    keys.read_takes_s = LIMITS.life_s - 1.0
    await authenticator.authenticate(header)
    keys.change(header, revoked_at=NOW)
    keys.at_s += 1.0
    assert authenticator.remembered(header) is None


async def test_a_key_is_answered_through_a_short_absence_of_the_database_and_no_longer(
    keys: Keys,
) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    await authenticator.authenticate(header)
    keys.away = True
    reads = []
    for _ in range(9):
        keys.at_s += LIMITS.life_s / 9 - 0.01
        for _call in range(3):
            assert authenticator.remembered(header) is not None
            await reads_ended()
        reads.append(len(keys.reads))
    # From half of the life on the database is asked again, in vain, and not by every call.
    assert reads == [1, 1, 1, 1, 2, 3, 4, 5, 6]
    keys.at_s += 0.1
    assert authenticator.remembered(header) is None
    assert await refused(authenticator.authenticate(header)) is Reason.STORE_UNAVAILABLE


async def test_a_remembered_key_ends_when_it_expires(
    keys: Keys, wall_clock: type[WallClock]
) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    keys.change(header, expires_at=NOW + timedelta(seconds=1))
    await authenticator.authenticate(header)
    assert authenticator.remembered(header) is not None
    wall_clock.at = NOW + timedelta(seconds=1)
    assert authenticator.remembered(header) is None
    assert await refused(authenticator.authenticate(header)) is Reason.CREDENTIAL_INVALID


async def test_a_refused_key_is_not_read_again_for_its_own_shorter_life(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    keys.change(header, revoked_at=NOW)
    for _ in range(3):
        assert await refused(authenticator.authenticate(header)) is Reason.CREDENTIAL_INVALID
    assert len(keys.reads) == 1
    keys.change(header, revoked_at=None)
    keys.at_s += LIMITS.negative_life_s
    assert await is_valid(authenticator, header)


async def test_without_a_life_every_call_reads(keys: Keys) -> None:
    header = keys.add()
    authenticator = keys.authenticator(replace(LIMITS, life_s=0.0, negative_life_s=0.0))
    for _ in range(2):
        assert await is_valid(authenticator, header)
    keys.change(header, revoked_at=NOW)
    assert await refused(authenticator.authenticate(header)) is Reason.CREDENTIAL_INVALID
    keys.change(header, revoked_at=None)
    assert await is_valid(authenticator, header)


# --- bounds ---------------------------------------------------------------------------------------


async def test_concurrent_calls_with_one_key_share_one_read(keys: Keys) -> None:
    header, authenticator = keys.add(), keys.authenticator()
    keys.answering.clear()
    calls = [asyncio.ensure_future(authenticator.authenticate(header)) for _ in range(20)]
    await keys.reading.acquire()
    # One caller's end is not the others'.
    calls[0].cancel()
    await asyncio.wait(calls[:1])
    keys.answering.set()
    principals = await asyncio.gather(*calls[1:])
    assert len({id(each) for each in principals}) == 1
    assert len(keys.reads) == 1


async def test_keys_beyond_the_reads_at_once_are_overload_and_the_others_go_on(keys: Keys) -> None:
    authenticator = keys.authenticator()
    known = keys.add()
    await authenticator.authenticate(known)
    keys.answering.clear()
    reading = [keys.add() for _ in range(LIMITS.loads_max)]
    calls = [asyncio.ensure_future(authenticator.authenticate(each)) for each in reading]
    for _ in range(1 + LIMITS.loads_max):
        await keys.reading.acquire()
    assert await refused(authenticator.authenticate(keys.add())) is Reason.OVERLOADED
    # Neither is one that is remembered, nor one that is being read.
    keys.at_s += LIMITS.life_s / 2
    assert authenticator.remembered(known) is not None
    calls.append(asyncio.ensure_future(authenticator.authenticate(reading[0])))
    keys.answering.set()
    assert len(await asyncio.gather(*calls)) == LIMITS.loads_max + 1
    assert await is_valid(authenticator, keys.add())


@pytest.mark.parametrize("idle_s", [LIMITS.life_s / 2, 100 * LIMITS.life_s])
async def test_keys_that_nobody_knows_keep_no_key_that_was_good_before_from_being_read(
    keys: Keys, idle_s: float
) -> None:
    authenticator = keys.authenticator()
    known = keys.add()
    await authenticator.authenticate(known)
    keys.answering.clear()
    made_up = [f"Bearer {new_key(Mode.TEST).text}" for _ in range(LIMITS.loads_max)]
    calls = [asyncio.ensure_future(authenticator.authenticate(each)) for each in made_up]
    for _ in range(1 + LIMITS.loads_max):
        await keys.reading.acquire()
    keys.at_s += idle_s
    call = asyncio.ensure_future(authenticator.authenticate(known))
    async with asyncio.timeout(STUCK_S):
        await keys.reading.acquire()
    assert await refused(authenticator.authenticate(keys.add())) is Reason.OVERLOADED
    keys.answering.set()
    await call
    await asyncio.wait(calls)
    await reads_ended()
    assert authenticator.remembered(known) is not None


async def test_keys_that_were_good_before_are_read_at_once_in_a_number_too(keys: Keys) -> None:
    authenticator = keys.authenticator()
    known = [keys.add() for _ in range(LIMITS.loads_max + 1)]
    for each in known:
        await authenticator.authenticate(each)
    keys.answering.clear()
    keys.at_s += LIMITS.life_s
    *most, last = known
    calls = [asyncio.ensure_future(authenticator.authenticate(each)) for each in most]
    for _ in range(len(known) + len(most)):
        await keys.reading.acquire()
    assert await refused(authenticator.authenticate(last)) is Reason.OVERLOADED
    keys.answering.set()
    await asyncio.gather(*calls)
    assert await is_valid(authenticator, last)


async def test_as_many_keys_are_remembered_as_the_limit_says_the_oldest_forgotten_first(
    keys: Keys,
) -> None:
    authenticator = keys.authenticator()
    headers = [keys.add() for _ in range(LIMITS.entries_max + 1)]
    for header in headers:
        await authenticator.authenticate(header)
    remembered = [authenticator.remembered(header) is not None for header in headers]
    assert remembered == [False] + [True] * LIMITS.entries_max
    assert await is_valid(authenticator, headers[0])


async def test_one_key_is_remembered_once_however_it_is_spelled(keys: Keys) -> None:
    authenticator = keys.authenticator()
    other, key = keys.add(), keys.add()
    await authenticator.authenticate(other)
    for spaces in range(LIMITS.entries_max + 1):
        spelled = key.replace("Bearer", "bEARER" + " " * spaces)
        await authenticator.authenticate(spelled)
    assert len(keys.reads) == 2
    assert authenticator.remembered(other) is not None
    # What is no bearer's credential is none because it was one as such.
    assert await refused(authenticator.authenticate(key.replace("Bearer ", "Basic  "))) is (
        Reason.CREDENTIAL_INVALID
    )


async def test_as_many_refused_keys_are_remembered_and_they_displace_no_valid_one(
    keys: Keys,
) -> None:
    authenticator = keys.authenticator()
    valid = keys.add()
    await authenticator.authenticate(valid)
    wrong = [f"Bearer {new_key(Mode.TEST).text}" for _ in range(LIMITS.entries_max + 1)]
    for header in wrong:
        await refused(authenticator.authenticate(header))
    assert len(keys.reads) == 1 + len(wrong)
    for header in wrong[1:]:
        await refused(authenticator.authenticate(header))
    assert len(keys.reads) == 1 + len(wrong)
    await refused(authenticator.authenticate(wrong[0]))
    assert len(keys.reads) == 2 + len(wrong)
    assert authenticator.remembered(valid) is not None


# --- what a principal may do ----------------------------------------------------------------------


def principal(*merchant_ids: str) -> Principal:
    merchants = {each: MerchantInfo(each) for each in merchant_ids}
    return Principal("key_1", "org_1", frozenset({Scope.PAYMENTS_READ}), Mode.TEST, merchants)


def test_a_scope_includes_no_other() -> None:
    require_scope(principal(), Scope.PAYMENTS_READ)
    with pytest.raises(GatewayError) as caught:
        require_scope(principal(), Scope.PAYMENTS_WRITE)
    assert caught.value.reason is Reason.SCOPE_MISSING
    assert caught.value.metadata == {"scope": "payments:write"}


@pytest.mark.parametrize(
    ("of_the_key", "named", "expected"),
    [
        (("mer_1",), "", "mer_1"),
        (("mer_1", "mer_2"), "mer_2", "mer_2"),
        (("mer_1",), "mer_2", Reason.MERCHANT_NOT_FOUND),
        ((), "mer_2", Reason.MERCHANT_NOT_FOUND),
        (("mer_1", "mer_2"), "", Reason.MERCHANT_REQUIRED),
        ((), "", Reason.MERCHANT_REQUIRED),
    ],
)
def test_a_merchant_is_the_one_named_or_the_only_one(
    of_the_key: tuple[str, ...], named: str, expected: str | Reason
) -> None:
    caller = principal(*of_the_key)
    found = find_merchant(caller, named)
    if not isinstance(expected, Reason):
        assert resolve_merchant(caller, named) is found is caller.merchants[expected]
        return
    assert found is None
    with pytest.raises(GatewayError) as caught:
        resolve_merchant(caller, named)
    assert caught.value.reason is expected
