"""Kill switches, maintenance windows and costs, from the command line to a gateway's memory."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from gateway.application.connector_accounts import ConnectorAccount, Sealed, WrappedKey
from gateway.application.routing_controls import RoutingControls as Controls
from gateway.cli import main
from gateway.domain.errors import GatewayError, Reason
from gateway.domain.ids import new_connector_account_id
from gateway.domain.model import Mode
from gateway.routing.availability import AccountAvailability, SuspensionKind
from gateway.routing.costs import CostBook
from gateway.routing.model import Candidate, Exclusion
from storage.postgres import Accounts, ConnectorAccounts, RoutingControls
from tests.servers import fetch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WHY = "ticket 1234, the PSP asked for it"
SEALED = Sealed(b"sealed", WrappedKey("k1", b"wrapped"))


class _World:
    """A merchant with an account, and what a gateway knows."""

    def __init__(self, dsn: str, merchant_id: str, account_id: str) -> None:
        self.dsn = dsn
        self.merchant_id = merchant_id
        self.account_id = account_id
        self.candidate = Candidate("stripe", account_id)
        self.availability = AccountAvailability(None)
        self.costs = CostBook()

    async def refresh(self) -> None:
        async with RoutingControls.connect(self.dsn) as source:
            await Controls(source, self.availability, self.costs).refresh()

    def refusal(self, method: str = "card") -> Exclusion | None:
        return self.availability.admit(self.candidate, method)


@pytest.fixture
async def world(dsn: str) -> _World:
    async with Accounts.connect(dsn) as accounts:
        organisation_id = await accounts.create_organisation("one")
        merchant_id = await accounts.create_merchant(organisation_id, "shop")
    account = ConnectorAccount(merchant_id, new_connector_account_id(), Mode.TEST, "stripe", SEALED)
    async with ConnectorAccounts.connect(dsn) as accounts:
        await accounts.add(account)
    return _World(dsn, merchant_id, account.account_id)


async def test_a_killed_account_is_refused_until_it_is_revived(world: _World) -> None:
    async with RoutingControls.connect(world.dsn) as controls:
        killed = await controls.suspend(
            SuspensionKind.KILL,
            "stripe",
            merchant_id=world.merchant_id,
            account_id=world.account_id,
            reason=WHY,
            created_by="login:ann",
        )
        await world.refresh()
        assert world.refusal() is Exclusion.KILLED
        assert world.refusal("") is Exclusion.KILLED
        assert world.availability.refusal(Candidate("stripe", "acc_other"), "card") is None
        assert await controls.end_suspension(killed.suspension_id, reason=WHY, ended_by="login:ben")
        await world.refresh()
        assert world.refusal() is None
        again = await controls.end_suspension(
            killed.suspension_id, reason=WHY, ended_by="login:eve"
        )
        assert again is None
        (record,) = await controls.all_suspensions(10)
    assert (record.suspension.created_by, record.ended_by) == ("login:ann", "login:ben")
    assert record.ended_at is not None


async def test_a_suspension_of_a_kind_that_only_a_newer_version_knows_holds_as_a_kill_switch(
    world: _World, caplog: pytest.LogCaptureFixture
) -> None:
    async with RoutingControls.connect(world.dsn) as controls:
        of_account = await controls.suspend(
            SuspensionKind.KILL,
            "stripe",
            merchant_id=world.merchant_id,
            account_id=world.account_id,
            reason=WHY,
            created_by="login:ann",
        )
        fetch(world.dsn, "UPDATE connector_suspensions SET kind = 99 RETURNING 1")
        await controls.suspend(SuspensionKind.KILL, "adyen", reason=WHY, created_by="login:ann")
        source = Controls(controls, world.availability, world.costs)
        for _ in range(2):
            await source.refresh()
            assert world.refusal() is Exclusion.KILLED
            assert world.availability.refusal(Candidate("adyen", "acc"), "") is Exclusion.KILLED
        listed = {each.suspension_id: each.kind for each in await controls.suspensions()}
        assert listed[of_account.suspension_id] is SuspensionKind.UNKNOWN
        await controls.end_suspension(of_account.suspension_id, reason=WHY, ended_by="login:ann")
        await source.refresh()
    assert world.refusal() is None
    assert caplog.text.count("a suspension of an unknown kind") == 1


async def test_a_window_holds_from_its_beginning_to_its_end(world: _World) -> None:
    now = dt.datetime.now(dt.UTC)
    hour = dt.timedelta(hours=1)
    async with RoutingControls.connect(world.dsn) as controls:
        for begins_at, ends_at in ((now + hour, now + 2 * hour), (now - 2 * hour, now - hour)):
            await controls.suspend(
                SuspensionKind.MAINTENANCE,
                "stripe",
                begins_at=begins_at,
                ends_at=ends_at,
                reason=WHY,
                created_by="login:ann",
            )
        (coming,) = await controls.suspensions()  # the other one is over
    later = 0.0

    def clock() -> float:
        return later

    availability = AccountAvailability(None, clock)
    availability.suspend([coming], 0.0)
    assert availability.refusal(world.candidate, "card") is None
    assert availability.pause_s(world.candidate, "card") is None
    later = coming.begins_in_s + 1
    assert availability.refusal(world.candidate, "card") is Exclusion.MAINTENANCE
    assert coming.ends_in_s is not None
    assert availability.pause_s(world.candidate, "card") == coming.ends_in_s - later
    longer_s = coming.ends_in_s + 60
    longer = replace(coming, method="card", ends_in_s=longer_s)
    killed = replace(coming, method="ideal", kind=SuspensionKind.KILL, ends_in_s=None)
    availability.suspend([coming, longer, killed], 0.0)
    assert availability.pause_s(world.candidate, "") == coming.ends_in_s - later
    assert availability.pause_s(world.candidate, "card") == longer_s - later
    assert availability.pause_s(world.candidate, "ideal") is None
    later = longer_s
    assert availability.refusal(world.candidate, "card") is None


async def test_a_kill_switch_of_the_connector_is_told_before_a_window_of_the_account(
    world: _World,
) -> None:
    async with RoutingControls.connect(world.dsn) as controls:
        await controls.suspend(
            SuspensionKind.MAINTENANCE,
            "stripe",
            merchant_id=world.merchant_id,
            account_id=world.account_id,
            ends_at=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
            reason=WHY,
            created_by="login:ann",
        )
        await world.refresh()
        assert world.refusal() is Exclusion.MAINTENANCE
        await controls.suspend(SuspensionKind.KILL, "stripe", reason=WHY, created_by="login:ann")
    await world.refresh()
    assert world.refusal() is Exclusion.KILLED
    assert world.availability.refusal(world.candidate, "card") is Exclusion.KILLED
    assert world.availability.pause_s(world.candidate, "card") is None


async def test_a_switch_of_one_method_leaves_the_others(world: _World) -> None:
    async with RoutingControls.connect(world.dsn) as controls:
        await controls.suspend(
            SuspensionKind.KILL, "stripe", method="ideal", reason=WHY, created_by="login:ann"
        )
    await world.refresh()
    assert world.refusal("ideal") is Exclusion.KILLED
    assert world.refusal("card") is None
    assert world.refusal("") is None


async def test_an_account_of_another_merchant_cannot_be_suspended(world: _World) -> None:
    async with RoutingControls.connect(world.dsn) as controls:
        with pytest.raises(GatewayError) as refused:
            await controls.suspend(
                SuspensionKind.KILL,
                "stripe",
                merchant_id="mer_" + "0" * 32,
                account_id=world.account_id,
                reason=WHY,
                created_by="login:ann",
            )
    assert refused.value.reason is Reason.INVALID_REQUEST


async def test_the_latest_costs_count_and_all_versions_stay(world: _World) -> None:
    fee = '[[fee]]\naccount = "acc_1"\ncurrency = "EUR"\npercentage = "{}"\n'
    async with RoutingControls.connect(world.dsn) as controls:
        source = Controls(controls, world.availability, world.costs)
        for percentage in ("1", "2"):
            await controls.put_costs(
                world.merchant_id,
                fee.format(percentage),
                reason=WHY,
                created_by="login:ann",
            )
            await source.refresh()
        costs = world.costs.costs(world.merchant_id)
        assert costs is not None
        assert costs.fees["acc_1", "EUR"][0].ppm == 20_000
        await controls.put_costs(world.merchant_id, "", reason=WHY, created_by="login:ann")
        await source.refresh()
        assert world.costs.costs(world.merchant_id) is None
        versions = [row.version for row in await controls.costs_of(world.merchant_id, 10)]
        with pytest.raises(GatewayError) as refused:
            await controls.put_costs("mer_none", "", reason=WHY, created_by="login:ann")
    assert versions == [3, 2, 1]
    assert refused.value.reason is Reason.INVALID_REQUEST


async def test_costs_are_read_though_the_databases_clock_was_set_back(world: _World) -> None:
    fee = '[[fee]]\naccount = "acc_1"\ncurrency = "EUR"\npercentage = "1"\n'
    async with RoutingControls.connect(world.dsn) as controls:
        source = Controls(controls, world.availability, world.costs)
        await controls.put_costs(world.merchant_id, fee, reason=WHY, created_by="login:ann")
        ahead = "UPDATE routing_costs SET created_at = now() + interval '1 hour' RETURNING 1"
        fetch(world.dsn, ahead)
        await source.refresh()
        assert world.costs.costs(world.merchant_id) is not None
        await controls.put_costs(world.merchant_id, "", reason=WHY, created_by="login:ann")
        await source.refresh()
        assert world.costs.costs(world.merchant_id) is None


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def run(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("GATEWAY_POSTGRES_DSN", dsn)

    def call(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, ["connectors", *arguments])
        assert result.exit_code == status, result.output
        return result.output

    return call


def _merchant(dsn: str) -> tuple[str, str]:
    fetch(dsn, "INSERT INTO organisations (organisation_id, name) VALUES ('org_1', 'one')")
    fetch(
        dsn,
        "INSERT INTO merchants (merchant_id, organisation_id, name) VALUES ('mer_1','org_1','s')",
    )
    fetch(
        dsn,
        "INSERT INTO connector_accounts (merchant_id, account_id, mode, connector, priority,"
        " capabilities, credentials, wrapping_key_id, wrapped_data_key)"
        " VALUES ('mer_1', 'acc_1', 2, 'stripe', 100, '{}', 's', 'k1', 'w')",
    )
    return "mer_1", "acc_1"


def test_switches_are_thrown_and_audited_from_the_command_line(
    dsn: str, run: Callable[..., str]
) -> None:
    merchant_id, account_id = _merchant(dsn)
    of_account = ("--merchant", merchant_id, "--account", account_id)
    killed = run("kill", *of_account, "--reason", WHY).strip()
    window = run(
        "maintenance", "--connector", "stripe", "--until", "2999-01-01T00:00Z", "--reason", WHY
    ).strip()
    listed = run("suspensions")
    assert killed in listed
    assert window in listed
    before = dt.datetime.now(dt.UTC)
    run("revive", killed, "--reason", WHY)
    assert killed not in run("suspensions")
    told = run("suspensions", "--all")
    # A month may end meanwhile.
    assert any(f"ended {at:%Y-%m}" in told for at in (before, dt.datetime.now(dt.UTC)))
    for refused in (
        ("kill", "--connector", "stripe"),  # no reason
        ("kill", "--connector", "stripe", "--reason", "short"),
        ("kill", "--connector", "stripe", "--reason", "card 4111 1111 1111 1111"),
        ("kill", "--connector", "stripe", *of_account, "--reason", WHY),
        ("kill", "--connector", "Stripe", "--reason", WHY),
        ("kill", "--connector", "stripe", "--method", "Card", "--reason", WHY),
        ("kill", *of_account, "--method", "nosuch", "--reason", WHY),
        ("kill", "--merchant", merchant_id, "--reason", WHY),
        ("kill", "--merchant", "mer_2", "--account", account_id, "--reason", WHY),
        ("maintenance", "--connector", "stripe", "--until", "2020-01-01T00:00Z", "--reason", WHY),
        ("maintenance", "--connector", "stripe", "--until", "2999-01-01", "--reason", WHY),
        ("revive", killed, "--reason", WHY),
    ):
        result = CliRunner().invoke(main, ["connectors", *refused])
        assert result.exit_code in (1, 2), refused


def test_costs_are_checked_before_they_are_stored(
    dsn: str, run: Callable[..., str], tmp_path: Path
) -> None:
    merchant_id, account_id = _merchant(dsn)
    file = tmp_path / "costs.toml"
    put = ("costs", "put", "--merchant", merchant_id, str(file), "--reason", WHY)
    file.write_text('[[fee]]\naccount = "acc_1"\ncurrency = "EUR"\nfixed = 5\n')
    assert "there is no `fixed`" in run("costs", "validate", str(file), status=1)
    assert "there is no `fixed`" in run(*put, status=1)
    file.write_text('[[fee]]\naccount = "acc_2"\ncurrency = "EUR"\n')
    assert "has no account acc_2" in run(*put, status=1)
    text = f'[[fee]]\naccount = "{account_id}"\ncurrency = "EUR"\npercentage = "0.25"\n'
    file.write_text(text)
    run("costs", "validate", str(file))
    assert "version 1 " in run(*put)
    assert run("costs", "show", "--merchant", merchant_id) == text
    assert WHY in run("costs", "show", "--merchant", merchant_id, "--versions")
