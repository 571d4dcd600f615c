"""The connector against real simulators: what was sent, what may have been, what was answered."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from gateway.application.ports import Connector, ConnectorRequest
from gateway.connectors import http
from gateway.connectors.http import Limits
from gateway.connectors.simulator import connector as simulated
from gateway.connectors.simulator.connector import ProfileMismatch, SimulatorConnector
from gateway.connectors.simulator.journal import Record, standing_charges
from gateway.connectors.simulator.launch import SimulatorControl, SimulatorProcess
from gateway.connectors.simulator.outcomes import TOKENS, VISITS, Fault, Result
from gateway.connectors.simulator.profiles import PROFILES
from gateway.domain.errors import Reason
from gateway.domain.model import (
    SENT_KINDS,
    AvsResult,
    ConnectorAnswer,
    Delivery,
    OperationKind,
    Outcome,
    ResponseCode,
    Verdict,
)
from tests.servers import free_port
from tests.simulators import new_reference, running_simulator, standings_of

pytestmark = pytest.mark.integration

WAIT_S = 30.0
SHORT_TIMEOUT_S = 0.3
"""For outcomes that never answer: nothing but the connector's own time-out ends the wait."""

Simulators = Callable[[str], SimulatorProcess]


@pytest.fixture(scope="module")
def simulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulators]:
    """One simulator for each profile, shared by the tests; references keep them apart."""
    started: dict[str, SimulatorProcess] = {}
    with ExitStack() as stack:

        def start(profile: str) -> SimulatorProcess:
            if profile not in started:
                directory = tmp_path_factory.mktemp(profile)
                started[profile] = stack.enter_context(running_simulator(directory, profile))
            return started[profile]

        yield start


class Psp:
    """A simulator, connectors to it, and its journal."""

    def __init__(self, simulator: SimulatorProcess, profile: str, stack: AsyncExitStack) -> None:
        self.simulator = simulator
        self.profile = PROFILES[profile]
        self._stack = stack
        self.connector: Connector = self.connect()
        self.control = SimulatorControl(simulator.url)
        stack.push_async_callback(self.control.close)

    def connect(self, *, answer_timeout_s: float = WAIT_S, **limits: Any) -> SimulatorConnector:
        connector = SimulatorConnector(
            self.simulator.url,
            self.profile,
            answer_timeout_s=answer_timeout_s,
            limits=Limits(**limits),
        )
        self._stack.push_async_callback(connector.close)
        return connector

    def of(self, reference: str, type_: str = "received") -> list[Record]:
        return [
            record
            for record in self.simulator.records()
            if record.get("reference") == reference
            and record["type"] == type_
            and record.get("method", "send") in ("send", "settle")
        ]


@pytest_asyncio.fixture
async def psp_of(simulators: Simulators) -> AsyncIterator[Callable[[str], Psp]]:
    async with AsyncExitStack() as stack:
        yield lambda profile: Psp(simulators(profile), profile, stack)


@pytest_asyncio.fixture
async def psp(psp_of: Callable[[str], Psp], profile: str) -> Psp:
    return psp_of(profile)


@pytest.fixture
def profile() -> str:
    return "idempotent"


def request_of(
    kind: OperationKind = OperationKind.AUTHORIZE, amount_minor: int = 1000, **more: Any
) -> ConnectorRequest:
    if kind in (OperationKind.AUTHORIZE, OperationKind.VERIFY):
        more.setdefault("payment_method_token", "tok_visa")
    values: dict[str, Any] = {
        "kind": kind,
        "reference": new_reference(),
        "amount_minor": 0 if kind is OperationKind.VERIFY else amount_minor,
        "currency": "EUR",
        "connector_account_id": "acct_1",
        "payment_id": "pay_1",
        "fields": {},
    }
    return ConnectorRequest(**(values | more))


async def send(
    connector: Connector, request: ConnectorRequest, window_s: float = WAIT_S
) -> ConnectorAnswer:
    return await connector.send(request, time.monotonic() + window_s)


def outcome_of(answer: ConnectorAnswer | None) -> Outcome:
    assert answer is not None
    assert answer.outcome is not None
    return answer.outcome


PREPARED = {
    OperationKind.AUTHORIZE: (),
    OperationKind.VERIFY: (),
    OperationKind.CAPTURE: (OperationKind.AUTHORIZE,),
    OperationKind.VOID: (OperationKind.AUTHORIZE,),
    OperationKind.INCREMENT: (OperationKind.AUTHORIZE,),
    OperationKind.REVERSAL: (OperationKind.AUTHORIZE,),
    OperationKind.REFUND: (OperationKind.AUTHORIZE, OperationKind.CAPTURE),
}
KINDS = [kind for kind in PREPARED if kind is not OperationKind.REVERSAL]
"""The kinds that can be cancelled; a reversal is none itself."""


async def prepare(psp: Psp, kind: OperationKind, token: str = "tok_visa") -> ConnectorRequest:
    """A request of this kind, with all done that must come before."""
    request = request_of(OperationKind.AUTHORIZE, payment_method_token=token)
    target = ""
    for step in (*PREPARED[kind], kind):
        request = request_of(step, target_transaction_id=target)
        if step in (OperationKind.AUTHORIZE, OperationKind.VERIFY):
            request.payment_method_token = token
        if step is kind:
            return request
        answer = await send(psp.connector, request)
        assert answer.verdict is Verdict.APPROVED
        target = target or answer.connector_transaction_id
    return request


# --- conformance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SENT_KINDS))
@pytest.mark.parametrize("profile", PROFILES)
async def test_every_kind_of_operation_succeeds_and_is_journalled(
    psp: Psp, kind: OperationKind
) -> None:
    request = await prepare(psp, kind)
    answer = await send(psp.connector, request)
    assert (answer.delivery, answer.verdict) == (Delivery.ANSWERED, Verdict.APPROVED)
    outcome = outcome_of(answer)
    assert outcome.response_code is ResponseCode.APPROVED
    assert outcome.amount_reported_minor == request.amount_minor
    assert answer.currency == "EUR"
    assert answer.processing_ms == 0
    assert outcome.retrieval_reference_number
    assert outcome.system_trace_audit_number
    assert (answer.authorization_expires_at is not None) == (
        kind in (OperationKind.AUTHORIZE, OperationKind.INCREMENT)
    )
    (received,) = psp.of(request.reference)
    (effect,) = psp.of(request.reference, "effect")
    assert received["kind"] == effect["kind"] == kind.name.lower()
    assert effect["transaction_id"] == answer.connector_transaction_id


async def test_capture_with_the_authorization_is_one_charge(psp: Psp) -> None:
    request = request_of(capture=True)
    await send(psp.connector, request)
    (standing,) = standings_of(psp.simulator, request.reference)
    assert (standing.authorized_minor, standing.captured_minor) == (1000, 1000)
    assert standing.payment_id == "pay_1"


async def test_partial_captures_and_refunds_add_up(psp: Psp) -> None:
    request = request_of()
    target = (await send(psp.connector, request)).connector_transaction_id
    captures = []
    for part, final in ((300, False), (500, True)):
        capture = request_of(OperationKind.CAPTURE, part, target_transaction_id=target, final=final)
        captures.append(await send(psp.connector, capture))
    refund = request_of(
        OperationKind.REFUND, 200, target_transaction_id=captures[0].connector_transaction_id
    )
    await send(psp.connector, refund)
    (standing,) = standings_of(psp.simulator, request.reference)
    assert (standing.captured_minor, standing.voided_minor) == (800, 200)
    assert (standing.refunded_minor, standing.net_minor, standing.open_minor) == (200, 600, 0)


async def test_what_breaks_a_rule_of_the_psp_fails_as_rejected(psp: Psp) -> None:
    target = (await send(psp.connector, request_of())).connector_transaction_id
    capture = request_of(OperationKind.CAPTURE, 1001, target_transaction_id=target)
    answer = await send(psp.connector, capture)
    assert answer.verdict is Verdict.FAILED
    assert outcome_of(answer).response_code is ResponseCode.REJECTED_BY_CONNECTOR
    assert outcome_of(answer).connector_code == "amount_exceeds_authorized"
    assert psp.of(capture.reference, "effect") == []


async def test_reversal_by_reference_needs_no_id_of_the_psp(psp: Psp) -> None:
    charged = request_of(capture=True)
    await send(psp.connector, charged)
    reversal = request_of(OperationKind.REVERSAL, target_reference=charged.reference)
    assert (await send(psp.connector, reversal)).verdict is Verdict.APPROVED
    (standing,) = standings_of(psp.simulator, charged.reference)
    assert not standing.stands


async def test_every_token_that_is_answered_gives_its_published_outcome(psp: Psp) -> None:
    expected = {
        Result.APPROVED: Verdict.APPROVED,
        Result.DECLINED: Verdict.DECLINED,
        Result.PENDING: Verdict.PENDING,
        Result.REQUIRES_ACTION: Verdict.REQUIRES_ACTION,
    }
    requests = {
        token: request_of(payment_method_token=token)
        for token, behaviour in TOKENS.items()
        if behaviour.fault is Fault.NONE
    }
    answers = dict(
        zip(
            requests,
            await asyncio.gather(*(send(psp.connector, one) for one in requests.values())),
            strict=True,
        )
    )
    for token, answer in answers.items():
        assert answer.delivery is Delivery.ANSWERED
        assert answer.verdict is expected[TOKENS[token].result], token
        made = psp.of(requests[token].reference, "effect")
        assert len(made) == (answer.verdict is Verdict.APPROVED), token
    assert outcome_of(answers["tok_wrong_amount"]).amount_reported_minor == 1001
    partial = outcome_of(answers["tok_partial_approval"])
    assert partial.response_code is ResponseCode.PARTIALLY_APPROVED
    assert partial.amount_reported_minor == 500
    action = answers["tok_requires_action"].next_action
    assert action is not None
    assert action.redirect_url.startswith("https://")
    assert (answers["tok_slow"].processing_ms or 0) >= TOKENS["tok_slow"].extra_ms


async def test_postal_code_chooses_the_avs_result(psp: Psp) -> None:
    fields = {"billing_address": {"postal_code": "AVS-N"}, "metadata": {"a": "b"}}
    answer = await send(psp.connector, request_of(fields=fields))
    assert outcome_of(answer).avs_result is AvsResult.NO_MATCH


# --- customers ------------------------------------------------------------------------------------


async def visit(url: str) -> tuple[int, str]:
    """What a page answers to a form's button, and where it leads to."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, allow_redirects=False) as answer,
    ):
        return answer.status, answer.headers.get("Location", "")


@pytest.mark.parametrize(
    ("method", "outcome", "verdicts"),
    [
        ("ideal", "approve", [Verdict.APPROVED]),
        ("ideal", "decline", [Verdict.DECLINED]),
        ("pix", "later", [Verdict.APPROVED]),
    ],
)
async def test_customer_pays_on_a_page_of_the_simulator(
    psp: Psp, method: str, outcome: str, verdicts: list[Verdict]
) -> None:
    request = request_of(
        payment_method_token="",
        capture=True,
        fields={
            "payment_method": {"redirect": {"method_type": method, "country_code": "NL"}},
            "return_url": "https://shop.example/back?order=1",
        },
    )
    answer = await send(psp.connector, request)
    assert answer.verdict is Verdict.REQUIRES_ACTION
    assert answer.next_action is not None
    assert answer.next_action.expires_at is not None
    code = answer.next_action.qr_code
    page = answer.next_action.redirect_url if code is None else code.data
    assert page.startswith(f"{psp.simulator.url}/pay/")
    assert (code is not None) == (method == "pix")
    async with aiohttp.ClientSession() as session, session.get(page) as shown:
        text = await shown.text()
    assert f"{method}: 1000 minor units of EUR" in text
    assert all(f"/{each}" in text for each in VISITS)
    found = await psp.connector.query(request.kind, request.reference)
    assert found is not None
    assert found.next_action == answer.next_action
    assert await visit(f"{page}/{outcome}") == (303, "https://shop.example/back?order=1")
    assert await visit(f"{page}/{outcome}") == (409, "")
    told = [await psp.connector.query(request.kind, request.reference) for _ in verdicts]
    assert [answer and answer.verdict for answer in told] == verdicts
    visits = [each["reference"] for each in psp.simulator.received("visit")]
    assert visits.count(request.reference) == 2
    charges = [
        standing.captured_minor for standing in standings_of(psp.simulator, request.reference)
    ]
    assert charges == ([1000] if verdicts[-1] is Verdict.APPROVED else [])


async def test_page_that_nobody_was_sent_to_does_not_exist(psp: Psp) -> None:
    request = request_of()
    answer = await send(psp.connector, request)
    for target in (answer.connector_transaction_id, "none"):
        assert (await visit(f"{psp.simulator.url}/pay/{target}/approve"))[0] == 404
    assert (await visit(f"{psp.simulator.url}/pay"))[0] == 404


async def test_network_token_is_approved_and_not_in_the_journal(psp: Psp) -> None:
    secrets = {"number": "4895370000000000003", "cryptogram": "AgAAAAAABk4DWZ4C28yUQAAAAAA="}
    request = request_of(
        payment_method_token="",
        fields={"payment_method": {"network_token": {"expiry_month": 12}}},
        secrets=secrets,
    )
    assert (await send(psp.connector, request)).verdict is Verdict.APPROVED
    journal = psp.simulator.journal.read_text()
    assert not any(secret in journal for secret in secrets.values())
    request = request_of(
        payment_method_token="",
        fields={"payment_method": {"network_token": {"expiry_month": 12}}},
    )
    assert (await send(psp.connector, request)).delivery is Delivery.MAY_HAVE_BEEN_SENT


# --- nothing was sent -----------------------------------------------------------------------------


async def test_past_send_before_nothing_is_written(psp: Psp) -> None:
    request = request_of()
    answer = await psp.connector.send(request, time.monotonic())
    assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.SEND_WINDOW_PASSED)
    # A later request over the same client shows that the earlier one is not merely on its way.
    await send(psp.connector, request_of())
    assert psp.of(request.reference) == []


@pytest.mark.parametrize("connected", [True, False])
async def test_window_that_passes_while_a_connection_is_made_ready_is_seen(
    psp: Psp, monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    """A process that was stopped between taking its connection and writing."""
    if connected:
        await send(psp.connector, request_of())
    now = time.monotonic()
    send_before = now + WAIT_S
    # Looks at the clock: for an idle connection, to make a new one, and before the write.
    looks = itertools.chain([now] if connected else [now, now], itertools.repeat(send_before))
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    request = request_of()
    answer = await psp.connector.send(request, send_before)
    monkeypatch.undo()
    assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.SEND_WINDOW_PASSED)
    await send(psp.connector, request_of())
    assert psp.of(request.reference) == []


async def test_busy_connector_sends_nothing_and_says_so(psp: Psp) -> None:
    connector = psp.connect(connections_max=1, waiters_max=1)
    first, second, third = request_of(), request_of(), request_of()
    await psp.control.hold(reference_prefix=first.reference)
    under_way = asyncio.create_task(send(connector, first))
    await psp.control.await_held()
    waiting = asyncio.create_task(send(connector, second, window_s=SHORT_TIMEOUT_S))
    await asyncio.sleep(0)  # one turn, in which it gets in line
    busy = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECTOR_BUSY)
    assert await send(connector, third) == busy
    assert await waiting == busy
    await psp.control.release()
    assert (await under_way).verdict is Verdict.APPROVED
    assert psp.of(second.reference) + psp.of(third.reference) == []
    assert (await send(connector, second)).verdict is Verdict.APPROVED


async def test_waiting_requests_share_few_connections(psp: Psp) -> None:
    connector = psp.connect(connections_max=3)
    requests = [request_of() for _ in range(60)]
    answers = await asyncio.gather(*(send(connector, one) for one in requests))
    assert {answer.verdict for answer in answers} == {Verdict.APPROVED}
    used = {psp.of(request.reference)[0]["connection"] for request in requests}
    assert len(used) <= 3


async def test_connect_failure_is_not_sent_but_leaves_query_and_cancel_open() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    connector = SimulatorConnector(url, PROFILES["idempotent"])
    request = request_of()
    answer = await send(connector, request)
    assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.CONNECT_FAILED)
    doubt = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.CONNECT_FAILED)
    assert await connector.query(request.kind, request.reference) == doubt
    assert await connector.cancel(request.kind, request.reference) == doubt
    assert await connector.check() is False
    await connector.close()


@pytest.mark.parametrize("field", ["three_ds", "unheard_of"])
async def test_field_that_the_psp_cannot_use_is_never_sent(psp: Psp, field: str) -> None:
    assert field not in psp.connector.capabilities.supported_fields
    request = request_of(fields={field: {"eci": "05"}})
    answer = await send(psp.connector, request)
    assert answer == ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.FIELD_NOT_SUPPORTED)
    assert psp.of(request.reference) == []


async def test_connection_that_the_psp_closed_while_idle_is_not_used_again(
    psp_of: Callable[[str], Psp],
) -> None:
    psp = psp_of("non_idempotent")
    connector = psp.connect()
    first, second = request_of(), request_of()
    await send(connector, first)
    await psp.control.close_idle()
    while connector._http._open:  # noqa: ASYNC110 until the end of the connection was read
        await asyncio.sleep(0)
    assert (await send(connector, second)).verdict is Verdict.APPROVED
    (before,), (after,) = psp.of(first.reference), psp.of(second.reference)
    assert before["connection"] != after["connection"]


# --- it may have been processed -------------------------------------------------------------------

FAULTS = [
    ("tok_timeout_before_charge", Reason.ANSWER_TIMED_OUT, False),
    ("tok_timeout_after_charge", Reason.ANSWER_TIMED_OUT, True),
    ("tok_reset_before_charge", Reason.CONNECTION_LOST, False),
    ("tok_reset_after_charge", Reason.CONNECTION_LOST, True),
    ("tok_reset_always", Reason.CONNECTION_LOST, True),
    ("tok_error_500_then_success", Reason.ANSWER_UNUSABLE, False),
    ("tok_error_500_after_charge", Reason.ANSWER_UNUSABLE, True),
    ("tok_error_500_always", Reason.ANSWER_UNUSABLE, False),
    ("tok_garbage", Reason.ANSWER_UNUSABLE, True),
    ("tok_oversized", Reason.ANSWER_UNUSABLE, True),
    ("tok_wrong_reference", Reason.ANSWER_UNUSABLE, True),
    ("tok_wrong_currency", Reason.ANSWER_UNUSABLE, True),
]


@pytest.mark.parametrize("profile", ["non_idempotent"])
@pytest.mark.parametrize(("token", "reason", "charged"), FAULTS)
async def test_request_without_a_usable_answer_is_in_doubt_and_not_sent_again(
    psp: Psp, token: str, reason: Reason, charged: bool
) -> None:
    timed_out = reason is Reason.ANSWER_TIMED_OUT
    connector = psp.connect(answer_timeout_s=SHORT_TIMEOUT_S if timed_out else WAIT_S)
    request = request_of(payment_method_token=token)
    answer = await send(connector, request)
    assert answer == ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=reason)
    assert len(psp.of(request.reference)) == 1
    assert len(psp.of(request.reference, "effect")) == charged
    found = await psp.connector.query(request.kind, request.reference)
    if charged:
        assert found is not None
        assert found.verdict is Verdict.APPROVED
    else:
        assert found is None


async def test_late_success_takes_effect_after_the_connector_gave_up(psp: Psp) -> None:
    connector = psp.connect(answer_timeout_s=SHORT_TIMEOUT_S)
    request = request_of(payment_method_token="tok_success_late")
    await psp.control.hold(reference_prefix=request.reference)
    answer = await send(connector, request)
    assert answer == ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)
    await psp.control.await_held()
    assert psp.of(request.reference, "effect") == []
    in_progress = await psp.connector.query(request.kind, request.reference)
    assert in_progress is not None
    assert in_progress.delivery is Delivery.MAY_HAVE_BEEN_SENT
    await psp.control.release()
    found = await psp.connector.query(request.kind, request.reference)
    assert found is not None
    assert found.verdict is Verdict.APPROVED
    assert len(psp.of(request.reference, "effect")) == 1


@pytest.mark.parametrize("profile", ["idempotent", "key_2s", "no_query"])
@pytest.mark.parametrize(
    ("token", "doubt"),
    [
        ("tok_reset_before_charge", None),
        ("tok_reset_after_charge", None),
        ("tok_error_500_then_success", None),
        ("tok_error_500_after_charge", None),
        ("tok_reset_always", Reason.CONNECTION_LOST),
        ("tok_error_500_always", Reason.ANSWER_UNUSABLE),
    ],
)
async def test_idempotent_psp_gets_a_lost_request_once_more(
    psp: Psp, token: str, doubt: Reason | None
) -> None:
    request = request_of(payment_method_token=token)
    answer = await send(psp.connector, request)
    if doubt is None:
        assert answer.verdict is Verdict.APPROVED
    else:
        assert answer == ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=doubt)
    assert len(psp.of(request.reference)) == 2
    assert len(psp.of(request.reference, "effect")) <= 1


async def test_lost_request_is_not_sent_again_past_send_before(
    psp: Psp, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(payment_method_token="tok_error_500_after_charge")
    await psp.control.hold("before_answer", reference_prefix=request.reference)
    send_before = time.monotonic() + WAIT_S / 2
    sending = asyncio.create_task(psp.connector.send(request, send_before))
    await psp.control.await_held()
    monkeypatch.setattr(simulated, "time", SimpleNamespace(monotonic=lambda: send_before))
    await psp.control.release()
    assert await sending == ConnectorAnswer(
        Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_UNUSABLE
    )
    assert len(psp.of(request.reference)) == 1


async def test_psp_that_dies_under_a_request_leaves_it_in_doubt(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_simulator(tmp_path_factory.mktemp("dying")) as simulator:
        async with AsyncExitStack() as stack:
            psp = Psp(simulator, "idempotent", stack)
            await psp.control.hold()
            sending = asyncio.create_task(send(psp.connector, request_of()))
            await psp.control.await_held()
            simulator.kill()
            assert await sending == ConnectorAnswer(
                Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.CONNECTION_LOST
            )


async def test_cancelled_caller_gets_no_other_callers_answer(psp: Psp) -> None:
    connector = psp.connect(connections_max=1)
    first, second = request_of(amount_minor=1), request_of(amount_minor=2)
    await psp.control.hold(reference_prefix=first.reference)
    sending = asyncio.create_task(send(connector, first))
    await psp.control.await_held()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    answering = asyncio.create_task(send(connector, second))
    await psp.control.release()
    assert outcome_of(await answering).amount_reported_minor == 2


# --- query and cancel -----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["idempotent", "non_idempotent"])
@pytest.mark.parametrize("kind", KINDS)
async def test_query_finds_an_operation_and_cancel_takes_it_back_for_good(
    psp: Psp, kind: OperationKind
) -> None:
    request = await prepare(psp, kind)
    before = standing_charges(psp.simulator.records())
    assert await psp.connector.query(kind, request.reference) is None
    answer = await send(psp.connector, request)

    found = await psp.connector.query(kind, request.reference)
    assert found is not None
    assert (found.delivery, found.verdict) == (Delivery.ANSWERED, Verdict.APPROVED)
    assert found.connector_transaction_id == answer.connector_transaction_id
    assert outcome_of(found) == outcome_of(answer)

    canceled = await psp.connector.cancel(kind, request.reference)
    assert (canceled.delivery, canceled.verdict) == (Delivery.ANSWERED, Verdict.CANCELED)
    assert canceled.connector_transaction_id == answer.connector_transaction_id
    assert await psp.connector.cancel(kind, request.reference) == canceled
    assert await psp.connector.query(kind, request.reference) == canceled

    again = await send(psp.connector, request)
    assert again.verdict is Verdict.CANCELED
    assert outcome_of(again).response_code is ResponseCode.REFERENCE_CANCELED
    assert len(psp.of(request.reference, "refused")) == 1
    after = standing_charges(psp.simulator.records())
    assert not any(one.stands for one in after if one.reference == request.reference)
    assert [one for one in after if one.reference != request.reference] == before


@pytest.mark.parametrize("kind", KINDS)
async def test_cancel_of_what_the_psp_never_got_keeps_it_from_ever_taking_effect(
    psp: Psp, kind: OperationKind
) -> None:
    request = await prepare(psp, kind)
    never = ConnectorAnswer(Delivery.NOT_SENT, reason=Reason.REFERENCE_CANCELED)
    assert await psp.connector.cancel(kind, request.reference) == never
    assert await psp.connector.cancel(kind, request.reference) == never
    assert await psp.connector.query(kind, request.reference) == never
    late = await send(psp.connector, request)
    assert (late.delivery, late.verdict) == (Delivery.ANSWERED, Verdict.CANCELED)
    assert outcome_of(late).response_code is ResponseCode.REFERENCE_CANCELED
    assert psp.of(request.reference, "effect") == []


async def test_cancel_of_a_declined_reference_says_that_it_was_declined(psp: Psp) -> None:
    request = request_of(payment_method_token="tok_declined_insufficient_funds")
    await send(psp.connector, request)
    for _ in range(2):
        answer = await psp.connector.cancel(request.kind, request.reference)
        assert answer.verdict is Verdict.DECLINED
        assert outcome_of(answer).response_code is ResponseCode.INSUFFICIENT_FUNDS
    again = await send(psp.connector, request)
    assert outcome_of(again).response_code is ResponseCode.REFERENCE_CANCELED


async def test_cancel_that_is_refused_says_that_the_operation_stands(psp: Psp) -> None:
    request = await prepare(psp, OperationKind.CAPTURE)
    captured = await send(psp.connector, request)
    refund = replace(
        request,
        kind=OperationKind.REFUND,
        reference=f"{request.reference}-refund",
        amount_minor=1,
        target_transaction_id=captured.connector_transaction_id,
    )
    assert (await send(psp.connector, refund)).verdict is Verdict.APPROVED
    stands = await psp.connector.cancel(request.kind, request.reference)
    assert (stands.delivery, stands.verdict) == (Delivery.ANSWERED, Verdict.APPROVED)
    assert stands.connector_transaction_id == captured.connector_transaction_id
    assert outcome_of(stands) == outcome_of(captured)


async def test_double_charge_is_reported_as_the_sum(psp_of: Callable[[str], Psp]) -> None:
    psp = psp_of("non_idempotent")
    request = request_of()
    for _ in range(2):
        await send(psp.connector, request)
    found = await psp.connector.query(request.kind, request.reference)
    assert outcome_of(found).amount_reported_minor == 2000
    canceled = await psp.connector.cancel(request.kind, request.reference)
    assert outcome_of(canceled).amount_reported_minor == 2000
    assert not any(one.stands for one in standings_of(psp.simulator, request.reference))


@pytest.mark.parametrize(
    ("token", "verdict"),
    [("tok_pending", Verdict.APPROVED), ("tok_pending_declined", Verdict.DECLINED)],
)
async def test_pending_outcome_is_settled_by_query(psp: Psp, token: str, verdict: Verdict) -> None:
    request = request_of(payment_method_token=token)
    assert (await send(psp.connector, request)).verdict is Verdict.PENDING
    looks = [await psp.connector.query(request.kind, request.reference) for _ in range(3)]
    assert [look and look.verdict for look in looks] == [Verdict.PENDING, verdict, verdict]


async def test_pending_outcome_is_settled_by_repeats_where_there_is_no_query(
    psp_of: Callable[[str], Psp],
) -> None:
    psp = psp_of("no_query")
    request = request_of(payment_method_token="tok_pending")
    verdicts = [(await send(psp.connector, request)).verdict for _ in range(3)]
    assert verdicts == [Verdict.PENDING, Verdict.PENDING, Verdict.APPROVED]
    assert len(psp.of(request.reference, "effect")) == 1


@pytest.mark.parametrize(
    "kind",
    [
        OperationKind.CAPTURE,
        OperationKind.VOID,
        OperationKind.REFUND,
        OperationKind.INCREMENT,
        OperationKind.REVERSAL,
    ],
)
async def test_follow_up_tokens_decline_and_lose_follow_ups(psp: Psp, kind: OperationKind) -> None:
    name = kind.name.lower()
    declined = await send(psp.connector, await prepare(psp, kind, f"tok_{name}_declined"))
    assert declined.verdict is Verdict.DECLINED
    connector = psp.connect(answer_timeout_s=SHORT_TIMEOUT_S)
    lost = await prepare(psp, kind, f"tok_{name}_timeout_after_charge")
    answer = await send(connector, lost)
    assert answer == ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_TIMED_OUT)
    found = await psp.connector.query(kind, lost.reference)
    assert found is not None
    assert found.verdict is Verdict.APPROVED


async def test_connector_without_query_and_cancel_asks_nothing(
    psp_of: Callable[[str], Psp],
) -> None:
    psp = psp_of("no_query")
    request = request_of()
    await send(psp.connector, request)
    doubt = ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=Reason.ANSWER_UNUSABLE)
    assert await psp.connector.query(request.kind, request.reference) == doubt
    assert await psp.connector.cancel(request.kind, request.reference) == doubt
    assert psp.simulator.received("query") + psp.simulator.received("cancel") == []


async def test_simulator_with_another_profile_is_found_out(psp: Psp) -> None:
    assert await psp.connect().check() is True
    other = SimulatorConnector(psp.simulator.url, PROFILES["key_2s"])
    with pytest.raises(ProfileMismatch, match="'idempotent'"):
        await other.check()
    await other.close()


# --- hostile HTTP ---------------------------------------------------------------------------------


@asynccontextmanager
async def server_that_says(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers every request with the same bytes and then closes."""
    seen: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


_JSON = b"Content-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", Reason.CONNECTION_LOST),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{", Reason.CONNECTION_LOST),
        (b"HTTP/1.1 200 OK\r\n" + _JSON + b"\r\n{}", Reason.ANSWER_UNUSABLE),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            Reason.ANSWER_UNUSABLE,
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
            Reason.ANSWER_UNUSABLE,
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}", Reason.ANSWER_UNUSABLE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n{}", Reason.ANSWER_UNUSABLE),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Reason.CONNECTION_LOST),
        (b'HTTP/1.0 200 OK\r\n\r\n{"cut": ', Reason.ANSWER_UNUSABLE),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, Reason.ANSWER_UNUSABLE),
        (b"SSH-2.0-OpenSSH\r\n\r\n", Reason.ANSWER_UNUSABLE),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}", Reason.ANSWER_UNUSABLE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Reason.ANSWER_UNUSABLE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", Reason.ANSWER_UNUSABLE),
    ],
)
async def test_answer_that_is_no_answer_leaves_the_request_in_doubt(
    answer: bytes, reason: Reason
) -> None:
    async with server_that_says(answer) as (url, seen):
        connector = SimulatorConnector(
            url, PROFILES["non_idempotent"], answer_timeout_s=WAIT_S, limits=Limits()
        )
        request = request_of()
        got = await send(connector, request)
        assert got == ConnectorAnswer(Delivery.MAY_HAVE_BEEN_SENT, reason=reason)
        assert len(seen) == 1
        for look in (connector.query, connector.cancel):
            told = await look(request.kind, request.reference)
            assert told is not None
            assert told.delivery is Delivery.MAY_HAVE_BEEN_SENT
        await connector.close()


def test_url_that_is_no_plain_http_address_is_refused() -> None:
    for url in ("https://u@psp.example", "http://psp.example/path", "psp.example", "ftp://x"):
        with pytest.raises(ValueError, match="the URL must be"):
            SimulatorConnector(url, PROFILES["idempotent"])
