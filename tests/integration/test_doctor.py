"""What the doctor finds of servers that answer, and are not as they should be."""

from __future__ import annotations

import asyncpg
import pytest

from gateway import doctor
from gateway.doctor import examine
from gateway.local import LocalState
from gateway.settings import load_settings
from tests.servers import redis_server


async def _bad(redis_url: str) -> list[str]:
    findings = await examine(load_settings(redis_url=redis_url), LocalState())
    return [each.text for each in findings if not each.good and "Redis" in each.text]


async def test_a_redis_that_evicts_is_found_bad() -> None:
    with redis_server({"maxmemory": "8mb", "maxmemory-policy": "volatile-lru"}) as evicting:
        [bad] = await _bad(evicting.url)
    assert "maxmemory-policy is volatile-lru" in bad
    with redis_server({"maxmemory": "0", "maxmemory-policy": "volatile-lru"}) as unlimited:
        assert await _bad(unlimited.url) == []


async def test_a_redis_that_keeps_what_it_has_is_found_good() -> None:
    with redis_server({"maxmemory": "8mb", "maxmemory-policy": "noeviction"}) as keeping:
        assert await _bad(keeping.url) == []


async def test_a_database_that_stops_answering_is_found_bad_after_what_was_found_before(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECK_TIMEOUT_S", 1.0)
    holder = await asyncpg.connect(dsn)
    try:
        async with holder.transaction():
            await holder.execute("LOCK TABLE schema_migrations IN ACCESS EXCLUSIVE MODE")
            findings = await examine(load_settings(postgres_dsn=dsn), LocalState())
    finally:
        await holder.close()
    about_it = [each for each in findings if each.text.startswith("PostgreSQL")]
    assert [each.good for each in about_it] == [True, True, False]
    assert about_it[-1].text.startswith("PostgreSQL: TimeoutError")


async def test_an_address_that_this_host_does_not_have_is_not_said_to_be_taken() -> None:
    elsewhere = "192.0.2.1:50051"  # of no host (RFC 5737)
    findings = await examine(load_settings(listen_address=elsewhere), LocalState())
    [bad] = [each.text for each in findings if elsewhere in each.text and not each.good]
    assert bad == f"GATEWAY_LISTEN_ADDRESS {elsewhere}: Cannot assign requested address"
