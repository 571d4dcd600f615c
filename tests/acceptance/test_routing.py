"""Routing from outside: rules are put and explained, payments follow them, cascades are told."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from click.testing import CliRunner, Result
from payments.v1 import outcome_pb2, payment_pb2, routing_service_pb2_grpc
from payments.v1 import routing_service_pb2 as pb

from gateway.cli import main
from storage.embedded import free_port
from storage.postgres import Accounts
from tests.connector_accounts import KEY, add_account
from tests.harness import (
    asyncio_run,
    authorize_request,
    bytes_without_replay,
    calling,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, System
    from tests.servers import PostgresForTests

TIMEOUT_S = 30.0
WHY = "Fees of the other are lower, ticket 1."


class Shop:
    """A merchant with three accounts: one whose acquirer declines softly, one that cannot be
    reached, and one that answers as the token says.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.declines, self.unreachable, self.answers = (
            self._add({"url": url, **more}, priority)
            for priority, url, more in (
                (1, system.simulator.url, {"token": "tok_declined_do_not_honor"}),
                (2, f"http://127.0.0.1:{free_port()}", {}),
                (3, system.simulator.url, {}),
            )
        )
        self.key = asyncio_run(lambda: self._key(("routing:read", "routing:write")))

    async def _key(self, scopes: tuple[str, ...]) -> str:
        async with Accounts.connect(self.system.dsn) as accounts:
            created = await accounts.create_key(
                self.system.shop.organisation_id, scopes=scopes, mode="test"
            )
            return created.text

    def _add(self, credentials: dict[str, str], priority: int) -> str:
        merchant_id = self.system.shop.merchant_id
        return asyncio_run(
            lambda: add_account(
                self.system.dsn, merchant_id, "simulator", credentials, priority=priority
            )
        )

    def rules(self, *accounts: str, name: str = "all", attempts_max: int = 3) -> str:
        """Accounts one after the other."""
        targets = ", ".join(
            f'{{ account = "{each}", priority = {n} }}' for n, each in enumerate(accounts, 1)
        )
        return (
            f'format = 1\n[[rule]]\nname = "{name}"\nattempts_max = {attempts_max}\n'
            f"targets = [{targets}]\n"
        )


@pytest.fixture(scope="module")
def shop(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[Shop]:
    with running_system(postgres, redis, connector_keys=KEY) as system:
        shop = Shop(system)
        system.start_gateway()
        yield shop


class Router:
    """A person with a key for routing."""

    def __init__(self, channel: grpc.aio.Channel, api_key: str) -> None:
        self._stub = routing_service_pb2_grpc.RoutingServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self._stub, method)(
            request, metadata=self._metadata, timeout=TIMEOUT_S
        )

    async def put(self, rules: str, **fields: Any) -> Any:
        request = pb.PutRoutingRulesRequest(rules_toml=rules, reason=WHY, activate=True, **fields)
        return await self.call("PutRoutingRules", request)


@asynccontextmanager
async def people(shop: Shop) -> AsyncIterator[tuple[Caller, Router]]:
    async with calling(shop.system.gateways[0], shop.system.shop.api_key) as caller:
        yield caller, Router(caller.channel, shop.key)


async def test_a_payment_cascades_to_the_account_that_takes_it_and_tells_its_way(
    shop: Shop,
) -> None:
    async with people(shop) as (caller, router):
        put = await router.put(shop.rules(shop.declines, shop.unreachable, shop.answers))
        key = "cascade-1"
        answer = await caller.authorize(idempotency_key=key, capture_method="MANUAL")
        operation = answer.operation
        assert operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
        assert answer.payment.connector_account_id == shop.answers
        assert [
            (each.number, each.connector_account_id, each.delivery) for each in operation.attempts
        ] == [
            (1, shop.declines, payment_pb2.DELIVERY_ANSWERED),
            (2, shop.unreachable, payment_pb2.DELIVERY_NOT_SENT),
            (3, shop.answers, payment_pb2.DELIVERY_ANSWERED),
        ]
        first = operation.attempts[0]
        assert first.outcome.response_code == outcome_pb2.RESPONSE_CODE_DO_NOT_HONOR
        assert first.connector_reference == f"{operation.operation_id}-1"
        route = operation.route
        assert (route.rules_version, route.rule) == (put.version, "all")
        assert [each.connector_account_id for each in route.candidates] == [
            shop.declines,
            shop.unreachable,
            shop.answers,
        ]
        repeat = await caller.authorize(idempotency_key=key, capture_method="MANUAL")
        assert repeat.replay.replayed
        assert bytes_without_replay(repeat) == bytes_without_replay(answer)
        told = await caller.payment(answer.payment.payment_id)
        assert told.operations[0] == operation
        # What follows goes to the account that has the money.
        captured = await caller.capture(answer.payment.payment_id, 1000)
        assert captured.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
        assert captured.operation.attempts[0].connector_account_id == shop.answers
    [standing] = [
        each for each in shop.system.standing() if operation.operation_id in each.reference
    ]
    assert standing.reference == f"{operation.operation_id}-3"


async def test_an_advice_not_to_retry_and_a_hard_decline_end_a_cascade(shop: Shop) -> None:
    async with people(shop) as (caller, router):
        await router.put(shop.rules(shop.answers, shop.declines, name="hard"))
        for token in ("tok_advice_do_not_retry", "tok_declined_stolen_card"):
            answer = await caller.authorize(token=token)
            assert answer.operation.state == payment_pb2.OPERATION_STATE_DECLINED
            assert len(answer.operation.attempts) == 1, token


async def test_after_a_lost_answer_no_other_account_is_asked_and_recovery_finds_the_charge(
    shop: Shop,
) -> None:
    async with people(shop) as (caller, router):
        await router.put(shop.rules(shop.answers, shop.declines, name="lost"))
        answer = await caller.authorize(token="tok_garbage")
        assert answer.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
        assert len(answer.operation.attempts) == 1


async def test_rules_are_listed_explained_replaced_and_put_out_of_force(shop: Shop) -> None:
    async with people(shop) as (caller, router):
        first = await router.put(shop.rules(shop.answers, name="first"))
        second = await router.put(shop.rules(shop.declines, name="second"))
        got = await router.call("GetRoutingRules", pb.GetRoutingRulesRequest())
        assert (got.rules.version, got.rules.active, got.rules.reason) == (
            second.version,
            True,
            WHY,
        )
        assert 'name = "second"' in got.rules.rules_toml
        listed = await router.call(
            "ListRoutingRuleVersions", pb.ListRoutingRuleVersionsRequest(page_size=2)
        )
        assert [each.version for each in listed.versions] == [second.version, first.version]
        assert [each.active for each in listed.versions] == [True, False]

        payment = authorize_request()
        explained = await router.call("ExplainRoute", pb.ExplainRouteRequest(payment=payment))
        assert (explained.route.rule, explained.refusal_reason) == ("second", "")
        assert [each.connector_account_id for each in explained.route.candidates] == [shop.declines]
        assert outcome_pb2.RESPONSE_CODE_DO_NOT_HONOR in explained.cascade_on
        payment.three_ds.eci = "05"
        draft = shop.rules(shop.answers, name="draft")
        explained = await router.call(
            "ExplainRoute",
            pb.ExplainRouteRequest(payment=payment, rules_toml=draft, payment_id="pay_1"),
        )
        assert explained.refusal_reason == "FIELD_NOT_SUPPORTED"
        [candidate] = explained.route.candidates
        assert candidate.excluded_reason == "FIELD_NOT_SUPPORTED"

        activate = pb.ActivateRoutingRulesRequest(
            version=first.version, reason=WHY, expected_active_version=first.version
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await router.call("ActivateRoutingRules", activate)
        assert reason_of(raised.value) == "ROUTING_RULES_CHANGED"
        activate.expected_active_version = second.version
        replaced = await router.call("ActivateRoutingRules", activate)
        assert replaced.previous_version == second.version
        assert (await caller.authorize()).operation.route.rule == "first"

        none = pb.ActivateRoutingRulesRequest(version=0, reason=WHY)
        await router.call("ActivateRoutingRules", none)
        answer = await caller.authorize()
        assert not answer.operation.HasField("route")
        assert answer.payment.connector_account_id == shop.declines  # of the lowest number
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await router.call("GetRoutingRules", pb.GetRoutingRulesRequest())
        assert reason_of(raised.value) == "ROUTING_RULES_NOT_FOUND"


async def test_hints_of_the_card_choose_the_rule_and_a_bin_range_is_no_card_number(
    shop: Shop,
) -> None:
    rules = (
        shop.rules(shop.declines, name="visa").replace(
            "attempts_max", 'when = { scheme = "visa", bin = "41111100..41111149" }\nattempts_max'
        )
        + shop.rules(shop.answers, name="rest").partition("\n")[2]
    )
    async with people(shop) as (caller, router):
        await router.put(rules)
        request = authorize_request()
        request.payment_method.card_hints.scheme = "visa"
        request.payment_method.card_hints.bin = "41111111"
        answer = await caller.call("AuthorizePayment", request)
        assert answer.operation.route.rule == "visa"
        assert answer.payment.payment_method.card_hints.bin == "41111111"
        assert (await caller.authorize()).operation.route.rule == "rest"


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ("format = 1", "rules_toml.rule"),
        ("", "rules_toml"),
        (
            'format = 1\n[[rule]]\nname = "a"\ntargets = [{ account = "acc_of_another" }]',
            "rules_toml.rule[0].targets",
        ),
        (
            'format = 1\n[[rule]]\nname = "a"\nwheN = {}\ntargets = [{ connector = "simulator" }]',
            "rules_toml.rule[0].wheN",
        ),
        (f"format = 1\n{'k' * 60_000} = 1", "rules_toml.kkk"),
        (f"format = 1\n[[rule]]\nwhen.metadata.{'k' * 60_000} = 1", "rules_toml.rule[0].when"),
    ],
)
async def test_rules_that_cannot_be_used_are_refused_with_what_is_wrong(
    shop: Shop, rules: str, field: str
) -> None:
    async with people(shop) as (_, router):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await router.put(rules, validate_only=True)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in str(raised.value.trailing_metadata())


async def test_connectors_are_listed_with_what_they_can_do(shop: Shop) -> None:
    async with people(shop) as (_, router):
        listed = await router.call("ListConnectors", pb.ListConnectorsRequest())
    assert [each.connector_account_id for each in listed.accounts] == [
        shop.declines,
        shop.unreachable,
        shop.answers,
    ]
    capabilities = listed.accounts[0].capabilities
    assert payment_pb2.OPERATION_KIND_AUTHORIZE in capabilities.operations
    assert capabilities.all_currencies
    assert capabilities.query_by_reference
    assert "channel" in capabilities.supported_fields


async def test_a_key_without_the_scope_or_the_merchant_reaches_no_rules(shop: Shop) -> None:
    reader = asyncio_run(lambda: shop._key(("routing:read",)))
    async with people(shop) as (caller, _):
        for key, method, request in (
            (shop.system.shop.api_key, "ListConnectors", pb.ListConnectorsRequest()),
            (
                reader,
                "PutRoutingRules",
                pb.PutRoutingRulesRequest(rules_toml="format = 1", reason=WHY),
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await Router(caller.channel, key).call(method, request)
            assert reason_of(raised.value) == "SCOPE_MISSING"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await Router(caller.channel, shop.key).call(
                "GetRoutingRules", pb.GetRoutingRulesRequest(merchant_id="mer_" + "0" * 32)
            )
        assert reason_of(raised.value) == "MERCHANT_NOT_FOUND"


def test_the_command_line_checks_puts_explains_and_simulates(shop: Shop) -> None:
    who = ("--merchant", shop.system.shop.merchant_id, "--mode", "test")
    file = shop.system.directory / "rules.toml"

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["routing", *arguments], env=shop.system.settings)

    file.write_text(shop.rules(shop.answers, "acc_gone", name="cli"), "utf-8")
    assert run("validate", str(file)).exit_code == 0
    refused = run("put", str(file), *who, "--reason", WHY)
    assert refused.exit_code == 1
    assert "no account acc_gone" in refused.stderr
    file.write_text(shop.rules(shop.answers, name="cli"), "utf-8")
    put = run("put", str(file), *who, "--reason", WHY, "--activate")
    assert put.exit_code == 0, put.stderr
    version = put.stdout.strip()
    listed = run("list", *who).stdout
    assert listed.startswith(f"{version}  ")
    assert "in force since" in listed
    explained = run("explain", *who, "--amount-minor", "100", "--currency", "EUR").stdout
    assert '"rule": "cli"' in explained
    file.write_text(
        shop.rules(shop.answers, name="debit").replace(
            "attempts_max", 'when = { method = "card", card_type = "debit" }\nattempts_max'
        ),
        "utf-8",
    )
    amount = ("--amount-minor", "100", "--currency", "EUR", "--file", str(file))
    debit = run("explain", *who, *amount, "--card-type", "debit").stdout
    assert '"rule": "debit"' in debit
    for method in ("network_token", "ideal"):
        other = run("explain", *who, *amount, "--card-type", "debit", "--method", method)
        assert other.stdout.startswith("{"), other.stderr
        assert "debit" not in other.stdout
    assert "KEY=VALUE" in run("explain", *who, *amount, "--metadata", "tier").stderr
    file.write_text(shop.rules(shop.answers, name="cli"), "utf-8")
    simulated = run("simulate", str(file), *who).stdout
    assert "would go elsewhere" in simulated
    assert CliRunner().invoke(main, ["verify"], env=shop.system.settings).exit_code == 0
    activated = run("activate", "0", *who, "--reason", WHY).stdout
    assert activated == f"in force: none; before: {version}\n"


def test_a_reason_forges_no_line_of_the_list_and_commands_no_terminal(shop: Shop) -> None:
    reason = "the usual split\n1  2026-01-01T00:00:00Z  login:root  \x1b]0;title\x07\x9b2J"
    rules = shop.rules(shop.answers, name="forged")

    async def put() -> int:
        request = pb.PutRoutingRulesRequest(rules_toml=rules, reason=reason, activate=True)
        async with people(shop) as (_, router):
            answer = await router.call("PutRoutingRules", request)
            return int(answer.version)

    version = asyncio_run(put)
    who = ("--merchant", shop.system.shop.merchant_id, "--mode", "test")
    listed = CliRunner().invoke(main, ["routing", "list", *who], env=shop.system.settings).stdout
    newest, *earlier = listed.splitlines()
    assert newest.startswith(f"{version}  ")
    assert newest.count("the usual split\\n1  2026") == 2  # why it was put, and put into force
    assert [int(line.split()[0]) for line in earlier] == list(range(version - 1, 0, -1))
    assert all(character.isprintable() or character == "\n" for character in listed)


async def test_what_is_learnt_leaves_the_account_that_declines(shop: Shop) -> None:
    async with people(shop) as (caller, router):
        await router.put(shop.rules(shop.declines, attempts_max=1))
        taught = [(await caller.authorize()).operation.state for _ in range(5)]
        assert set(taught) == {payment_pb2.OPERATION_STATE_DECLINED}
        targets = ", ".join(f'{{ account = "{each}" }}' for each in (shop.declines, shop.answers))
        await router.put(
            'format = 1\n[[rule]]\nname = "best"\norder = "learned"\nattempts_max = 1\n'
            f"targets = [{targets}]\n"
        )
        asked = [
            (await caller.authorize()).operation.attempts[0].connector_account_id for _ in range(40)
        ]
    # At most every twentieth payment explores: more than 12 of 40 do once in 10 million runs.
    assert asked.count(shop.answers) >= 28
