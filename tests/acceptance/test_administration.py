"""AdminService from outside: doubts are listed, ended once by a person, recorded, and audited."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from payments.v1 import admin_service_pb2 as pb
from payments.v1 import admin_service_pb2_grpc, payment_pb2

from gateway.domain.model import OperationState as S
from storage.postgres import Accounts
from tests.harness import (
    asyncio_run,
    calling,
    eventually,
    reason_of,
    running_system,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from storage.embedded import EmbeddedRedis
    from tests.harness import Caller, System
    from tests.nursery import Nursery
    from tests.servers import PostgresForTests

    Command: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

TIMEOUT_S = 30.0
REASON = "The PSP's support confirmed it, ticket 1."
# A published test number of Visa.
PAN = "4111111111111111"
TRANSPORTS = ("grpcio", "native")


@pytest.fixture(scope="module")
def system(postgres: PostgresForTests, redis: EmbeddedRedis) -> Iterator[System]:
    """A PSP that can neither be asked nor cancel, and a gateway on each transport."""
    with running_system(
        postgres, redis, profile="no_query", simulator_answer_timeout_s=0.5
    ) as running:
        for transport in TRANSPORTS:
            running.start_gateway(transport=transport, trusted_front=True)
        yield running


class Admin:
    """A person with a key."""

    def __init__(self, channel: grpc.aio.Channel, api_key: str) -> None:
        self._stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self._stub, method)(
            request, metadata=self._metadata, timeout=TIMEOUT_S
        )

    async def doubts(self, **fields: Any) -> list[pb.Doubt]:
        """All pages, one row each."""
        found: list[pb.Doubt] = []
        token = ""
        while True:
            request = pb.ListInDoubtRequest(page_size=1, page_token=token, **fields)
            page = await self.call("ListInDoubt", request)
            found += page.doubts
            token = page.next_page_token
            if not token:
                return found

    async def resolve(self, operation_id: str, outcome: str, **fields: Any) -> Any:
        request = pb.ResolveInDoubtRequest(
            operation_id=operation_id,
            attempt_number=fields.pop("attempt_number", 1),
            outcome=pb.DoubtOutcome.Value(f"DOUBT_OUTCOME_{outcome}"),
            reason=fields.pop("reason", REASON),
            **fields,
        )
        return await self.call("ResolveInDoubt", request)

    def begin_verify(self, timeout_s: float | None, **fields: Any) -> Any:
        return self._stub.VerifyInvariants(
            pb.VerifyInvariantsRequest(**fields), metadata=self._metadata, timeout=timeout_s
        )

    async def verify(self, **fields: Any) -> list[pb.VerifyInvariantsResponse]:
        return [each async for each in self.begin_verify(TIMEOUT_S, **fields)]


def admin_key(system: System, *, merchants: tuple[str, ...] | None = None) -> str:
    """A key of the shop's organisation with the scope, and what it reads."""

    async def create() -> str:
        async with Accounts.connect(system.dsn) as accounts:
            key = await accounts.create_key(
                system.shop.organisation_id,
                scopes=("payments:admin",),
                mode="test",
                merchant_ids=merchants,
            )
            return key.text

    return asyncio_run(create)


@asynccontextmanager
async def people(system: System, transport: str) -> AsyncIterator[tuple[Caller, Admin]]:
    """A caller, and a person with the scope."""
    gateway = system.gateways[TRANSPORTS.index(transport)]
    async with calling(gateway, system.shop.api_key) as caller:
        yield caller, Admin(caller.channel, admin_key(system))


async def in_doubt(system: System, caller: Caller, token: str, **fields: Any) -> Any:
    """An authorization that recovery has looked at and could not settle."""
    answer = await caller.authorize(token=token, **fields)
    assert answer.operation.state == payment_pb2.OPERATION_STATE_IN_DOUBT
    await eventually(
        lambda: system.fetch(
            "SELECT 1 FROM doubts WHERE operation_id = $1 AND needs_person",
            answer.operation.operation_id,
        ),
        "recovery leaves it to a person",
    )
    return answer


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_doubt_is_listed_and_ended_once_by_what_a_person_found_out(
    system: System, transport: str
) -> None:
    async with people(system, transport) as (caller, admin):
        other = await in_doubt(system, caller, "tok_timeout_before_charge")
        answer = await in_doubt(system, caller, "tok_timeout_after_charge")
        operation_id = answer.operation.operation_id

        listed = await admin.doubts(needs_person_only=True)
        assert [each.operation.operation_id for each in listed] == [
            other.operation.operation_id,
            operation_id,
        ]
        doubt = listed[1]
        assert doubt.cause == pb.DOUBT_CAUSE_NO_MEANS
        assert doubt.needs_person
        assert doubt.tries >= 1
        assert doubt.operation.attempts[0].connector_reference == f"{operation_id}-1"
        assert doubt.next_check_at.ToNanoseconds() > doubt.since.ToNanoseconds()

        charged = {"connector_transaction_id": "psp-1"}
        first, second = await asyncio.gather(
            admin.resolve(operation_id, "TOOK_EFFECT", **charged),
            admin.resolve(operation_id, "TOOK_EFFECT", **charged),
        )
        assert {first.replayed, second.replayed} == {False, True}
        assert first.resolution == second.resolution
        assert first.operation.state == payment_pb2.OPERATION_STATE_SUCCEEDED
        assert first.operation.reason == "RESOLVED_BY_PERSON"
        assert first.payment.state == payment_pb2.PAYMENT_STATE_AUTHORIZED
        assert first.payment.connector_transaction_id == "psp-1"
        assert first.resolution.reason == REASON
        assert first.resolution.resolved_by.startswith("key_")
        assert first.resolution.state_before == payment_pb2.OPERATION_STATE_IN_DOUBT
        assert first.resolution.state_after == payment_pb2.OPERATION_STATE_SUCCEEDED

        assert await refusal(admin.resolve(operation_id, "DECLINED")) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "OPERATION_NOT_IN_DOUBT",
        )
        # Whoever owned it is fenced out, and a repeat of the call gets what was decided.
        read = await caller.operation(operation_id=operation_id)
        assert read.operation.epoch > doubt.operation.epoch

        gone = await admin.resolve(other.operation.operation_id, "NO_EFFECT")
        assert gone.operation.state == payment_pb2.OPERATION_STATE_NOT_SENT
        assert await admin.doubts() == []
        [record] = system.fetch(
            "SELECT * FROM resolutions WHERE operation_id = $1", other.operation.operation_id
        )
        assert (record["state_before"], record["state_after"]) == (S.IN_DOUBT, S.NOT_SENT)
        assert record["payment_version"] == gone.payment.version


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_is_no_decision_is_refused_and_changes_nothing(
    system: System, transport: str
) -> None:
    async with people(system, transport) as (caller, admin):
        answer = await in_doubt(system, caller, "tok_timeout_before_charge")
        operation_id = answer.operation.operation_id
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        for outcome, fields, expected in (
            ("TOOK_EFFECT", {}, (invalid, "INVALID_REQUEST")),
            ("UNSPECIFIED", {}, (invalid, "INVALID_REQUEST")),
            ("DECLINED", {"reason": ""}, (invalid, "INVALID_REQUEST")),
            ("DECLINED", {"reason": f"the card {PAN}"}, (invalid, "CARD_DATA_NOT_ALLOWED")),
            ("DECLINED", {"amount_reported_minor": 1}, (invalid, "INVALID_REQUEST")),
            (
                "DECLINED",
                {"attempt_number": 2},
                (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_IN_DOUBT"),
            ),
        ):
            assert await refusal(admin.resolve(operation_id, outcome, **fields)) == expected
        missing = admin.resolve("op_" + "0" * 32, "DECLINED")
        assert await refusal(missing) == (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
        payer = Admin(caller.channel, system.shop.api_key)
        for call in (payer.resolve(operation_id, "DECLINED"), payer.doubts(), payer.verify()):
            assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
        assert system.fetch("SELECT 1 FROM resolutions WHERE operation_id = $1", operation_id) == []
        await admin.resolve(operation_id, "DECLINED")


async def test_another_organisation_sees_and_decides_nothing(system: System) -> None:
    async def create() -> str:
        async with Accounts.connect(system.dsn) as accounts:
            organisation_id = await accounts.create_organisation("Others")
            await accounts.create_merchant(organisation_id, "Other shop")
            key = await accounts.create_key(
                organisation_id, scopes=("payments:admin",), mode="test"
            )
            return key.text

    async with people(system, "grpcio") as (caller, admin):
        answer = await in_doubt(system, caller, "tok_timeout_before_charge")
        operation_id = answer.operation.operation_id
        stranger = Admin(caller.channel, await asyncio.to_thread(asyncio_run, create))
        assert await stranger.doubts() == []
        not_found = grpc.StatusCode.NOT_FOUND
        theirs = {"merchant_id": system.shop.merchant_id}
        for call, reason in (
            (stranger.resolve(operation_id, "DECLINED"), "OPERATION_NOT_FOUND"),
            (stranger.resolve(operation_id, "DECLINED", **theirs), "MERCHANT_NOT_FOUND"),
            (stranger.doubts(**theirs), "MERCHANT_NOT_FOUND"),
            (stranger.verify(**theirs), "MERCHANT_NOT_FOUND"),
        ):
            assert await refusal(call) == (not_found, reason)
        told = await stranger.verify()
        assert told[-1].summary.payments == 0
        await admin.resolve(operation_id, "DECLINED")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_audit_streams_progress_findings_and_a_summary(
    system: System, transport: str
) -> None:
    async with people(system, transport) as (caller, admin):
        answer = await caller.authorize()
        told = await admin.verify()
        assert told[-1].summary.findings == 0
        assert told[-1].summary.payments == told[-2].progress.payments > 0
        payment_id = answer.payment.payment_id
        system.fetch(
            "UPDATE payments SET voided_minor = 1001 WHERE payment_id = $1 RETURNING 1", payment_id
        )
        told = await admin.verify()
        findings = [each.finding for each in told if each.WhichOneof("message") == "finding"]
        assert {(each.kind, each.payment_id) for each in findings} == {
            ("payment-state-differs", payment_id),
            ("amounts-out-of-bounds", payment_id),
        }
        assert dict(told[-1].summary.findings_by_kind) == {
            "payment-state-differs": 1,
            "amounts-out-of-bounds": 1,
        }
        system.fetch(
            "UPDATE payments SET voided_minor = 0 WHERE payment_id = $1 RETURNING 1", payment_id
        )


_ENDLESS_AUDIT = """
from gateway.application import verification
from gateway.cli import main
from gateway.domain.invariants import Finding, Kind
from gateway.rpc import admin

admin.AUDIT_READ_S_MAX = 0.5
audit = verification.Audit.run
runs = []

async def run(self):
    runs.append(self)
    while len(runs) == 1:
        yield Finding(Kind.ORPHAN, "mer_1", "", "", 1000 * "-")
    async for each in audit(self):
        yield each

verification.Audit.run = run
main(["serve"])
"""
"""A gateway whose first audit finds more than any window holds."""


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_audit_that_its_caller_does_not_read_ends_and_makes_room(
    system: System, transport: str
) -> None:
    more = {"trusted_front": True} if transport == "native" else {}
    gateway = system.start_program(_ENDLESS_AUDIT, transport=transport, **more)
    await gateway.serving()
    key = admin_key(system)
    async with (
        calling(gateway, system.shop.api_key) as idle,
        calling(gateway, system.shop.api_key) as caller,
    ):
        unread = Admin(idle.channel, key).begin_verify(None)
        admin = Admin(caller.channel, key)
        assert (await anext(aiter(unread))).finding.kind == "orphan"

        async def told() -> Any:
            try:
                return (await admin.verify())[-1]
            except grpc.aio.AioRpcError as error:
                if reason_of(error) != "OVERLOADED":
                    raise
                return None

        last = await eventually(told, "the audit that nobody reads has ended")
        assert last.WhichOneof("message") == "summary"
        unread.cancel()
    await asyncio.to_thread(gateway.stop)


async def test_what_a_psp_contradicted_is_listed(system: System) -> None:
    async with people(system, "native") as (caller, admin):
        answer = await in_doubt(system, caller, "tok_timeout_before_charge")
        operation_id = answer.operation.operation_id
        await admin.resolve(
            operation_id,
            "TOOK_EFFECT",
            connector_transaction_id="psp-2",
            amount_reported_minor=answer.operation.amount.amount_minor + 1,
        )
        listed = await admin.call("ListDiscrepancies", pb.ListDiscrepanciesRequest())
        [found] = [each for each in listed.discrepancies if each.operation_id == operation_id]
        assert (found.kind, found.reported) == ("authorized_amount", "1001")


@pytest.fixture
def command(nursery: Nursery, system: System) -> Command:
    """`gateway …` on the system's database."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return nursery.run(arguments, {"GATEWAY_POSTGRES_DSN": system.dsn}, system.directory)

    return run


async def test_the_command_line_lists_and_ends_doubts_and_audits(
    system: System, command: Command
) -> None:
    async with people(system, "grpcio") as (caller, admin):
        answer = await in_doubt(system, caller, "tok_timeout_after_charge")
        reference = answer.operation.attempts[0].connector_reference
        [line] = command("doubts", "list", "--needs-person").stdout.splitlines()
        assert reference in line
        assert "NO_MEANS" in line
        resolve = ["doubts", "resolve", reference, "--merchant", system.shop.merchant_id]
        refused = command(*resolve, "--outcome", "took-effect", "--reason", REASON)
        assert refused.returncode == 1
        assert "connector_transaction_id" in refused.stderr
        resolve += ["--connector-transaction-id", "psp-3"]
        took_effect = [*resolve, "--outcome", "took-effect", "--reason"]
        assert command(*took_effect, f"the card is {PAN}").returncode == 2
        done = command(*took_effect, REASON)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("is SUCCEEDED")
        assert command(*took_effect, REASON).stdout.startswith("decided before: ")
        declined = command(*resolve, "--outcome", "declined", "--reason", REASON)
        assert declined.returncode == 1
        assert command("doubts", "list").stdout == ""
        [record] = system.fetch(
            "SELECT resolved_by FROM resolutions WHERE operation_id = $1",
            answer.operation.operation_id,
        )
        assert record["resolved_by"].startswith("login:")
        # The person was right: each success has its charge, and the reverse.
        journal = str(system.directory / "journal.jsonl")
        told = command("verify", "--merchant", system.shop.merchant_id)
        assert told.returncode == 0, told.stdout
        assert "payments, 0 findings" in told.stderr
        # And wrong: the PSP has no such charge, which its journal alone can tell.
        answer = await in_doubt(system, caller, "tok_timeout_before_charge")
        charged = {"connector_transaction_id": "psp-4"}
        await admin.resolve(answer.operation.operation_id, "TOOK_EFFECT", **charged)
        told = command("verify", "--psp-journal", journal)
        assert told.returncode == 1
        assert f"success-without-charge  {system.shop.merchant_id}" in told.stdout
        assert answer.payment.payment_id in told.stdout
