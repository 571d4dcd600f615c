"""Routing rules in a real database: versions, what is in force, and who sees what; reattempts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.application.ports import AmountRule, Served, StoreUnavailable
from gateway.application.routing import Routing, RuleBook
from gateway.application.routing_administration import (
    Author,
    RoutingAdministration,
    check_accounts,
)
from gateway.domain import decisions
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_merchant_id
from gateway.domain.model import ConnectorAnswer, Delivery, Mode, Outcome, ResponseCode, Verdict
from gateway.routing.cascade import ReattemptLimit
from gateway.routing.rule_file import RulesInvalid, read_rules
from gateway.rpc.conversion import Caller, to_authorize
from storage.embedded import EmbeddedRedis
from storage.postgres import PostgresStore, RoutingRules
from storage.redis import Reattempts, RedisClient
from tests.harness import authorize_request
from tests.memory_store import CAPABLE, ManyRoutes, ScriptedConnector
from tests.servers import fetch
from tests.store_data import authorize, restarted, stored

pytestmark = pytest.mark.integration

RULES = 'format = 1\n[[rule]]\nname = "all"\ntargets = [{ account = "acc_a" }]\n'
OTHER = RULES.replace("acc_a", "acc_b")
WHY = Author("key_1", "The fees of the other are lower.", "req_1")


@pytest.fixture
async def merchant_id(store: PostgresStore) -> str:
    organisation_id = await store.accounts.create_organisation("o")
    return await store.accounts.create_merchant(organisation_id, "m")


@pytest.fixture
def rules(store: PostgresStore) -> RoutingRules:
    return store.routing_rules


@pytest.fixture
def router() -> ManyRoutes:
    return ManyRoutes(*(ScriptedConnector(CAPABLE, name) for name in "abc"))


@pytest.fixture
def administration(rules: RoutingRules, router: ManyRoutes) -> RoutingAdministration:
    return RoutingAdministration(rules, router, Routing(router))


async def refused(call: Coroutine[Any, Any, object]) -> Reason:
    with pytest.raises(GatewayError) as raised:
        await call
    return raised.value.reason


async def test_versions_are_numbered_and_the_same_file_is_the_same_version(
    rules: RoutingRules, merchant_id: str
) -> None:
    assert await rules.put(merchant_id, Mode.TEST, RULES, WHY) == 1
    assert await rules.put(merchant_id, Mode.TEST, RULES, WHY) == 1
    assert await rules.put(merchant_id, Mode.TEST, OTHER, WHY) == 2
    assert await rules.put(merchant_id, Mode.TEST, RULES, WHY) == 3
    assert await rules.put(merchant_id, Mode.LIVE, RULES, WHY) == 1
    found = await rules.versions(merchant_id, Mode.TEST, before_version=3, page_size=10)
    assert [(each.version, each.text, each.created_by) for each in found] == [
        (2, "", "key_1"),
        (1, "", "key_1"),
    ]
    second = await rules.find(merchant_id, Mode.TEST, 2)
    assert second is not None
    assert (second.text, second.reason, second.active) == (OTHER, WHY.reason, False)


async def test_rules_of_a_merchant_that_does_not_exist_are_refused(rules: RoutingRules) -> None:
    assert await refused(rules.put(new_merchant_id(), Mode.TEST, RULES, WHY)) is (
        Reason.INVALID_REQUEST
    )


async def test_versions_that_are_put_at_once_get_numbers_of_their_own(
    store: PostgresStore, dsn: str, merchant_id: str
) -> None:
    async def put(number: int) -> int:
        async with RoutingRules.connect(dsn) as own:
            return await own.put(merchant_id, Mode.TEST, f"{RULES}# {number}", WHY)

    assert sorted(await asyncio.gather(*map(put, range(4)))) == [1, 2, 3, 4]


async def test_what_is_in_force_is_recorded_and_read_by_every_gateway(
    administration: RoutingAdministration, rules: RoutingRules, merchant_id: str
) -> None:
    book = RuleBook(rules)
    await book.refresh()
    assert book.find(merchant_id, Mode.TEST) is None
    version, _ = await administration.put(merchant_id, Mode.TEST, RULES, WHY, activate=True)
    await book.refresh()
    found = book.find(merchant_id, Mode.TEST)
    assert found is not None
    assert (found[0], found[1].rules[0].name) == (version, "all")
    assert book.find(merchant_id, Mode.LIVE) is None

    again = Author("login:ann", "It was better before, ticket 2.")
    await administration.put(merchant_id, Mode.TEST, OTHER, WHY, activate=True)
    assert await administration.activate(merchant_id, Mode.TEST, 1, again) == 2
    # Repeated, it changes nothing.
    assert await administration.activate(merchant_id, Mode.TEST, 1, WHY) == 1
    first = await administration.get(merchant_id, Mode.TEST, 0)
    assert (first.version, first.active, first.activated_by) == (1, True, "login:ann")
    assert first.activation_reason == again.reason
    second = await administration.get(merchant_id, Mode.TEST, 2)
    assert (second.active, second.activated_by) == (False, "key_1")

    assert await administration.activate(merchant_id, Mode.TEST, 0, WHY) == 1
    await book.refresh()
    assert book.find(merchant_id, Mode.TEST) is None
    assert await refused(administration.get(merchant_id, Mode.TEST, 0)) is (
        Reason.ROUTING_RULES_NOT_FOUND
    )
    # One that starts anew reads the same.
    another = RuleBook(rules)
    await another.refresh()
    assert another.find(merchant_id, Mode.TEST) is None


async def test_an_activation_is_read_though_the_databases_clock_was_set_back(
    rules: RoutingRules, merchant_id: str, dsn: str
) -> None:
    for text in (RULES, OTHER):
        await rules.put(merchant_id, Mode.TEST, text, WHY)
    await rules.activate(merchant_id, Mode.TEST, 1, 0, WHY)
    ahead = "UPDATE routing_activations SET activated_at = now() + interval '1 hour' RETURNING 1"
    fetch(dsn, ahead)
    book = RuleBook(rules)
    await book.refresh()
    await rules.activate(merchant_id, Mode.TEST, 2, 1, WHY)
    await book.refresh()
    found = book.find(merchant_id, Mode.TEST)
    assert found is not None
    assert found[0] == 2


async def test_a_gateway_that_starts_with_rules_it_cannot_read_goes_by_those_before(
    rules: RoutingRules, merchant_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a rollback: without any rules payments would go to another account."""
    await rules.put(merchant_id, Mode.TEST, RULES, WHY)
    await rules.put(merchant_id, Mode.TEST, RULES.replace("format = 1", "format = 9"), WHY)
    await rules.activate(merchant_id, Mode.TEST, 1, 0, WHY)
    await rules.activate(merchant_id, Mode.TEST, 2, 1, WHY)
    book = RuleBook(rules)
    for _ in range(2):
        await book.refresh()
        found = book.find(merchant_id, Mode.TEST)
        assert found is not None
        assert found[0] == 1
    assert "cannot be read" in caplog.text
    await rules.activate(merchant_id, Mode.TEST, 0, 2, WHY)
    another = RuleBook(rules)
    for reader in (book, another):
        await reader.refresh()
        assert reader.find(merchant_id, Mode.TEST) is None


async def test_rules_of_a_mode_that_only_a_newer_version_knows_hide_no_others(
    rules: RoutingRules, merchant_id: str, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    await rules.put(merchant_id, Mode.TEST, RULES, WHY)
    await rules.activate(merchant_id, Mode.TEST, 1, 0, WHY)
    newer = """
        INSERT INTO routing_activations
            (merchant_id, mode, number, version, reason, activated_by, request_id)
        SELECT merchant_id, 99, number, 0, reason, activated_by, request_id
        FROM routing_activations
        RETURNING 1
    """
    fetch(dsn, newer)
    book = RuleBook(rules)
    await book.refresh()
    assert book.find(merchant_id, Mode.TEST) is not None
    assert "routing rules cannot be read: 99 is not a valid Mode" in caplog.text


async def test_another_version_than_the_expected_one_is_not_replaced(
    administration: RoutingAdministration, merchant_id: str
) -> None:
    await administration.put(merchant_id, Mode.TEST, RULES, WHY, activate=True)
    version, _ = await administration.put(merchant_id, Mode.TEST, OTHER, WHY, activate=False)
    assert await refused(
        administration.activate(merchant_id, Mode.TEST, version, WHY, expected=0)
    ) is (Reason.ROUTING_RULES_CHANGED)
    assert await administration.activate(merchant_id, Mode.TEST, version, WHY, expected=1) == 1


async def test_a_past_payment_went_where_it_was_sent_first(
    store: PostgresStore, rules: RoutingRules, merchant_id: str, dsn: str
) -> None:
    """A simulation compares with the account that would be asked first, not the cascade's last; and
    looks at nothing of a payment that only a newer version may know.
    """
    straight = authorize(merchant_id)
    await store.write_intent(straight)
    cascaded = authorize(merchant_id)
    await store.write_intent(cascaded)
    operation, payment = await stored(store, cascaded.operation)
    answer = ConnectorAnswer(
        Delivery.ANSWERED, Verdict.DECLINED, Outcome(response_code=ResponseCode.DO_NOT_HONOR)
    )
    again = decisions.cascade(
        payment, operation, answer, connector="other", connector_account_id="acct_2"
    )
    change = restarted(operation, payment)
    await store.write_change(replace(change, operation=again.operation, payment=again.payment))
    newer = "UPDATE payments SET capture_method = 99 WHERE payment_id = $1 RETURNING 1"
    fetch(dsn, newer, straight.payment.payment_id)
    past = await rules.past_payments(merchant_id, Mode.TEST, days=1, payments_max=10)
    went = {each.payment_id: (each.connector, each.connector_account_id) for each in past}
    assert went == {
        straight.payment.payment_id: ("simulator", "acct_1"),
        cascaded.payment.payment_id: ("simulator", "acct_1"),
    }


@pytest.mark.parametrize(
    "error", [StoreUnavailable("away"), GatewayError(Reason.OVERLOADED, "Too much to do.")]
)
async def test_an_activation_that_is_stored_is_no_failure_where_it_cannot_be_read_back(
    rules: RoutingRules, router: ManyRoutes, merchant_id: str, error: Exception
) -> None:
    class Away(RuleBook):
        async def refresh(self) -> None:
            raise error

    administration = RoutingAdministration(rules, router, Routing(router), Away(rules))
    version, _ = await administration.put(merchant_id, Mode.TEST, RULES, WHY, activate=False)
    assert await administration.activate(merchant_id, Mode.TEST, version, WHY, expected=0) == 0
    assert await rules.active(merchant_id, Mode.TEST) == version


async def test_of_two_activations_at_once_one_sees_the_other(
    store: PostgresStore, rules: RoutingRules, merchant_id: str
) -> None:
    for text in (RULES, OTHER):
        await rules.put(merchant_id, Mode.TEST, text, WHY)
    won = await asyncio.gather(
        *(rules.activate(merchant_id, Mode.TEST, version, 0, WHY) for version in (1, 2))
    )
    assert sorted(won) == [False, True]


async def test_a_version_that_does_not_exist_is_not_put_into_force(
    administration: RoutingAdministration, merchant_id: str
) -> None:
    assert await refused(administration.activate(merchant_id, Mode.TEST, 7, WHY)) is (
        Reason.ROUTING_RULES_NOT_FOUND
    )


async def test_a_version_whose_account_has_gone_is_not_put_into_force(
    administration: RoutingAdministration, router: ManyRoutes, merchant_id: str
) -> None:
    version, _ = await administration.put(merchant_id, Mode.TEST, RULES, WHY, activate=False)
    del router.by_name["a"]
    assert await refused(administration.activate(merchant_id, Mode.TEST, version, WHY)) is (
        Reason.INVALID_REQUEST
    )


async def test_rules_of_which_an_account_has_gone_are_explained_as_payments_go_by_them(
    administration: RoutingAdministration, router: ManyRoutes, merchant_id: str
) -> None:
    text = RULES.replace('"acc_a" }', '"acc_a" }, { account = "acc_b" }')
    await administration.put(merchant_id, Mode.TEST, text, WHY, activate=True)
    del router.by_name["a"]
    command = to_authorize(authorize_request(), Caller("req_1", merchant_id, Mode.TEST))
    plan, _ = await administration.explain(command, "pay_1")
    decision = plan.decision
    considered = [*decision.candidates, *(each for each, _ in decision.excluded)]
    assert decision.rules_version == 1
    assert [each.connector_account_id for each in considered] == ["acc_b"]


# --- rules and accounts ---------------------------------------------------------------------------


def served(**currencies: list[str]) -> dict[str, Served]:
    """Accounts at connectors that take these currencies."""
    found: dict[str, Served] = {}
    for name, codes in currencies.items():
        amounts = {code: AmountRule(step_minor=10, amount_minor_max=1000) for code in codes}
        connector = ScriptedConnector(replace(CAPABLE, amounts=amounts), name)
        found[f"acc_{name}"] = Served(f"acc_{name}", name, 1, True, connector)
    return found


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ('targets = [{ account = "acc_x" }]', "rule[0].targets"),
        ('targets = [{ connector = "x" }]', "rule[0].targets"),
        ('targets = [{ account = "acc_a" }]\nwhen = { currency = "USD" }', "rule[0].when.currency"),
        (
            (
                'targets = [{ account = "acc_a" }]\n'
                'when = { currency = "EUR", amount_minor = { min = 1001 } }'
            ),
            "rule[0].when.amount_minor",
        ),
        (
            (
                'targets = [{ account = "acc_a" }]\n'
                'when = { currency = "EUR", amount_minor = { min = 11, max = 19 } }'
            ),
            "rule[0].when.amount_minor",
        ),
        ('targets = [{ account = "acc_a" }]\nwhen = { method = "ideal" }', "rule[0].when.method"),
    ],
)
def test_what_no_account_of_the_merchant_can_do_is_refused(rule: str, path: str) -> None:
    file = read_rules(f'format = 1\n[[rule]]\nname = "a"\n{rule}\n')
    with pytest.raises(RulesInvalid) as raised:
        check_accounts(file.rules, served(a=["EUR"], b=["GBP"]))
    assert [problem.path for problem in raised.value.problems] == [path]


def test_what_one_of_the_targets_can_do_is_taken() -> None:
    file = read_rules(
        'format = 1\n[[rule]]\nname = "a"\nthen = "b"\n'
        'when = { currency = ["EUR", "GBP"], amount_minor = { min = 11, max = 20 } }\n'
        'targets = [{ account = "acc_a" }]\n'
        '[[rule]]\nname = "b"\ntargets = [{ connector = "b" }]\n'
    )
    assert check_accounts(file.rules, served(a=["EUR"], b=["GBP"])) == []


def test_a_target_that_takes_no_payments_now_is_warned_of() -> None:
    file = read_rules(RULES)
    disabled = {name: each._replace(enabled=False) for name, each in served(a=["EUR"]).items()}
    [warning] = check_accounts(file.rules, disabled)
    assert "takes no new payments" in warning.text


def test_an_account_that_is_named_by_its_connector_too_is_warned_of() -> None:
    file = read_rules(
        'format = 1\n[[rule]]\nname = "all"\n'
        'targets = [{ account = "acc_a", weight = 1 }, { connector = "a", weight = 9 }]\n'
    )
    [warning] = check_accounts(file.rules, served(a=["EUR"], b=["EUR"]))
    assert warning.text.startswith("acc_a is named, and a as well")
    apart = read_rules(RULES.replace("}]", '}, { connector = "b" }]'))
    assert check_accounts(apart.rules, served(a=["EUR"], b=["EUR"])) == []


# --- reattempts -----------------------------------------------------------------------------------


@pytest.fixture
async def client(redis: EmbeddedRedis) -> AsyncIterator[RedisClient]:
    client = RedisClient(redis.url, timeout_ms=5000, connect_timeout_ms=5000)
    yield client
    await client.close()


async def test_a_card_is_tried_again_as_often_as_every_window_allows(client: RedisClient) -> None:
    reattempts = Reattempts(client, buckets=4)
    merchant = new_merchant_id()
    limits = (ReattemptLimit(60, 2), ReattemptLimit(3600, 3))
    assert [await reattempts.take(merchant, "tok_1", limits) for _ in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    # What was not allowed was not counted, and another card, or merchant, is its own.
    wider = (ReattemptLimit(3600, 3),)
    assert [await reattempts.take(merchant, "tok_1", wider) for _ in range(2)] == [True, False]
    assert await reattempts.take(merchant, "tok_2", limits)
    assert await reattempts.take(new_merchant_id(), "tok_1", limits)


async def test_reattempts_older_than_the_window_count_no_more(client: RedisClient) -> None:
    reattempts = Reattempts(client, buckets=1)
    merchant = new_merchant_id()
    limits = (ReattemptLimit(3600, 1),)
    assert await reattempts.take(merchant, "tok_1", limits)
    [key] = await client.execute("KEYS", f"*:reattempts:{merchant}:*")
    assert b"tok_1" not in key
    [member] = await client.execute("ZRANGE", key, "0", "-1")
    long_ago_ms = int(datetime.now(UTC).timestamp() * 1000) - 3_601_000
    await client.execute("ZADD", key, str(long_ago_ms), member)
    assert await reattempts.take(merchant, "tok_1", limits)
    assert await client.execute("ZCARD", key) == 1
    assert 0 < await client.execute("TTL", key) <= 3600


async def test_without_redis_no_card_is_tried_again() -> None:
    away = RedisClient("redis://127.0.0.1:1", timeout_ms=50, connect_timeout_ms=50)
    try:
        assert not await Reattempts(away, 1).take("mer_1", "tok_1", (ReattemptLimit(60, 5),))
    finally:
        await away.close()
