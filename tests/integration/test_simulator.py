"""The simulator as a process: durable, restartable, and steered by its control resources."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from aiohttp import web

from gateway.connectors.http import HttpClient, Limits, MaybeSent, NotSent
from gateway.connectors.simulator.journal import read_journal, standing_charges
from gateway.connectors.simulator.launch import (
    SimulatorControl,
    SimulatorFailed,
    SimulatorProcess,
)
from gateway.connectors.simulator.profiles import KEY_VALIDITY_S
from tests.harness import eventually
from tests.http_server import http_server
from tests.simulators import new_reference, running_simulator, standings_of

pytestmark = pytest.mark.integration

WAIT_S = 30.0


class Client:
    """A PSP's client that speaks plain HTTP."""

    def __init__(self, url: str) -> None:
        self.http = HttpClient(url, Limits(connections_max=64))

    async def ask(self, method: str, target: str, body: object = None) -> dict[str, Any]:
        response = await self.http.request(
            method,
            target,
            b"" if body is None else orjson.dumps(body),
            send_before=time.monotonic() + WAIT_S,
            answer_timeout_s=WAIT_S,
        )
        told: dict[str, Any] = orjson.loads(response.body)
        return told | {"status": response.status}

    async def authorize(self, reference: str, amount_minor: int = 1000, **more: object) -> Any:
        body = {"reference": reference, "amount_minor": amount_minor, "currency": "EUR"}
        return await self.ask(
            "POST", "/v1/operations/authorize", body | {"token": "tok_visa"} | more
        )


@pytest_asyncio.fixture
async def client(simulator: SimulatorProcess) -> AsyncIterator[Client]:
    made = Client(simulator.url)
    yield made
    await made.http.close()


@pytest_asyncio.fixture
async def control(simulator: SimulatorProcess) -> AsyncIterator[SimulatorControl]:
    made = SimulatorControl(simulator.url)
    yield made
    await made.close()


@pytest.fixture
def profile() -> str:
    return "idempotent"


@pytest.fixture
def simulator(tmp_path: Path, profile: str) -> Iterator[SimulatorProcess]:
    with running_simulator(tmp_path, profile) as running:
        yield running


# --- durability -----------------------------------------------------------------------------------


async def test_whatever_was_answered_survives_sigkill(
    simulator: SimulatorProcess, client: Client, tmp_path: Path
) -> None:
    answers: dict[str, dict[str, Any]] = {}

    async def pay(number: int) -> None:
        reference = new_reference()
        try:
            answers[reference] = await client.authorize(reference, payment_id=f"pay_{number}")
        except (MaybeSent, NotSent):
            return
        if len(answers) == 100:
            simulator.kill()

    await asyncio.gather(*(pay(number) for number in range(400)))
    assert len(answers) >= 100
    records = simulator.records()
    received: set[int] = set()
    for record in records:
        if record["type"] == "received":
            received.add(record["request"])
        elif record["type"] == "effect":
            assert record["request"] in received  # in this order in the file
    charges = {standing.reference: standing for standing in standing_charges(records)}
    for reference, answer in answers.items():
        assert charges[reference].authorization_id == answer["transaction_id"]

    with running_simulator(tmp_path) as again:
        after = Client(again.url)
        for reference, answer in answers.items():
            found = await after.ask("GET", f"/v1/operations/authorize/{reference}")
            assert found["transaction_id"] == answer["transaction_id"]
            repeated = await after.authorize(reference)
            assert repeated["transaction_id"] == answer["transaction_id"]
        new = await after.authorize(new_reference())
        assert new["transaction_id"] not in {one["transaction_id"] for one in answers.values()}
        await after.http.close()
        assert all(len(standings_of(again, reference)) == 1 for reference in answers)


async def test_request_is_recorded_before_its_effect(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    reference = new_reference()
    await control.hold("before_effect")
    paying = asyncio.create_task(client.authorize(reference))
    await control.await_held()
    assert [record["reference"] for record in simulator.received()] == [reference]
    assert simulator.effects() == []
    await control.release()
    assert (await paying)["result"] == "approved"
    assert len(simulator.effects()) == 1


async def test_effect_is_recorded_before_its_answer(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    await control.hold("before_answer")
    paying = asyncio.create_task(client.authorize(new_reference()))
    await control.await_held()
    assert len(simulator.effects()) == 1
    simulator.kill()
    with pytest.raises(MaybeSent):
        await paying


async def test_torn_last_line_is_cut_off_and_the_journal_goes_on(
    simulator: SimulatorProcess, client: Client, tmp_path: Path
) -> None:
    await client.authorize(new_reference())
    simulator.kill()
    whole = simulator.records()
    with simulator.journal.open("ab") as file:
        file.write(b'{"type":"received","reference":"op_')
    with running_simulator(tmp_path) as again:
        records = again.records()
    assert records[: len(whole)] == whole
    assert [record["type"] for record in records[len(whole) :]] == ["start"]
    assert records[-1]["run"] == 2


def test_second_simulator_on_the_same_journal_is_refused(
    simulator: SimulatorProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SimulatorFailed):
        SimulatorProcess.start(simulator.journal)
    assert "another simulator has this journal" in capfd.readouterr().err


async def test_sigterm_stops_it_cleanly_with_requests_under_way(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    await control.hold()
    paying = asyncio.create_task(client.authorize(new_reference()))
    await control.await_held()
    assert await asyncio.to_thread(simulator.stop) == 0
    with pytest.raises(MaybeSent):
        await paying
    assert read_journal(simulator.journal)[-1]["type"] == "received"


def test_it_ends_with_the_process_that_launched_it(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    program = (
        "import sys; from pathlib import Path\n"
        "from gateway.connectors.simulator.launch import SimulatorProcess\n"
        "simulator = SimulatorProcess.start(Path(sys.argv[1]))\n"
        "print(simulator.url, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(journal)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline().startswith(b"http://127.0.0.1:")
        launcher.send_signal(signal.SIGKILL)
        # The orphan holds the other end of no pipe of ours; its lock on the journal tells.
        launcher.wait()
    deadline = time.monotonic() + WAIT_S
    again: SimulatorProcess | None = None
    while again is None:
        try:
            again = SimulatorProcess.start(journal)
        except SimulatorFailed:
            assert time.monotonic() < deadline
    again.kill()


# --- profiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["non_idempotent"])
async def test_non_idempotent_psp_charges_a_second_send_again(
    simulator: SimulatorProcess, client: Client
) -> None:
    reference = new_reference()
    for _ in range(2):
        await client.authorize(reference, capture=True)
    found = await client.ask("GET", f"/v1/operations/authorize/{reference}")
    assert [one["amount_minor"] for one in found["transactions"]] == [1000, 1000]
    assert [standing.net_minor for standing in standings_of(simulator, reference)] == [1000, 1000]
    assert [record["deduplicated"] for record in simulator.received()] == [False, False]
    canceled = await client.ask("POST", f"/v1/operations/authorize/{reference}/cancel")
    assert (canceled["had"], canceled["amount_minor"]) == ("effect", 2000)
    assert not any(standing.stands for standing in standings_of(simulator, reference))


async def test_idempotent_psp_answers_a_second_send_as_the_first(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    reference = new_reference()
    first = await client.authorize(reference)
    await control.advance_clock(10 * 365 * 86_400)
    second = await client.authorize(reference)
    assert second == first
    assert [record["deduplicated"] for record in simulator.received()] == [False, True]
    assert len(simulator.effects()) == 1


async def test_duplicates_in_flight_have_one_effect_and_one_answer(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    reference = new_reference()
    await control.hold()
    first = asyncio.create_task(client.authorize(reference))
    await control.await_held()
    others = [asyncio.create_task(client.authorize(reference)) for _ in range(9)]
    await control.release()
    answers = await asyncio.gather(first, *others)
    assert len({answer["transaction_id"] for answer in answers}) == 1
    assert len(simulator.effects()) == 1
    assert [record["deduplicated"] for record in simulator.received()] == [False] + [True] * 9


@pytest.mark.parametrize("profile", ["key_2s"])
async def test_expired_key_charges_again(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    reference = new_reference()
    first = await client.authorize(reference)
    assert (await client.authorize(reference))["transaction_id"] == first["transaction_id"]
    await control.advance_clock(int(KEY_VALIDITY_S))
    assert (await client.authorize(reference))["transaction_id"] != first["transaction_id"]
    assert len(standings_of(simulator, reference)) == 2


@pytest.mark.parametrize("profile", ["no_query"])
async def test_profile_without_query_and_cancel_has_neither(client: Client) -> None:
    reference = new_reference()
    await client.authorize(reference)
    path = f"/v1/operations/authorize/{reference}"
    assert (await client.ask("GET", path))["status"] == 404
    assert (await client.ask("POST", f"{path}/cancel"))["status"] == 404
    assert (await client.ask("GET", "/v1/profile"))["profile"] == "no_query"


# --- requests and control -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"reference": ""},
        {"reference": "a/b"},
        {"amount_minor": -1},
        {"amount_minor": 0},
        {"amount_minor": 1.5},
        {"amount_minor": True},
        {"amount_minor": 10**12 + 1},
        {"currency": "eur"},
        {"capture": 1},
        {"fields": {"three_ds": {}}},
        {"fields": []},
        {"token": ["tok_visa"]},
    ],
)
async def test_malformed_request_is_refused_and_not_journalled(
    simulator: SimulatorProcess, client: Client, change: dict[str, Any]
) -> None:
    answer = await client.authorize(**{"reference": new_reference(), **change})
    assert (answer["status"], answer["error"]) == (400, "bad_request")
    assert simulator.received() == []


async def test_latency_is_drawn_by_the_seed_and_told(tmp_path: Path) -> None:
    drawn = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        with running_simulator(tmp_path / run, latency="1,5") as simulator:
            client = Client(simulator.url)
            answers = [await client.authorize(new_reference()) for _ in range(20)]
            drawn.append([answer["processing_ms"] for answer in answers])
            await client.http.close()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 10
    assert min(drawn[0]) > 0


async def test_answers_that_are_written_late_are_counted_as_late(tmp_path: Path) -> None:
    delay_ms, pause_s = 100.0, 0.5
    with running_simulator(tmp_path, latency=f"{delay_ms}") as simulator:
        client, control = Client(simulator.url), SimulatorControl(simulator.url)

        async def paused_ms_at_least() -> float:
            """Of a pause in which an answer was due; 0 where the answer was there before it."""
            before = len(simulator.received())
            paying = asyncio.create_task(client.authorize(new_reference()))
            await eventually(lambda: len(simulator.received()) > before, "the request is received")
            os.kill(simulator.pid, signal.SIGSTOP)
            paused_at = time.monotonic()
            try:
                await asyncio.sleep(pause_s)
                due = not paying.done()
            finally:
                os.kill(simulator.pid, signal.SIGCONT)
            paused_ms = 1000 * (time.monotonic() - paused_at)
            assert (await paying)["processing_ms"] == delay_ms
            return paused_ms if due else 0

        try:
            assert (await control.state())["lateness"]["count"] == 0
            while not (paused_ms := await paused_ms_at_least()):
                await control.reset_lateness()  # the machine was stalled
            lateness = (await control.state())["lateness"]
            assert lateness["count"] == 1
            assert lateness["max_ms"] >= paused_ms - delay_ms
            assert lateness["p50_ms"] >= paused_ms - delay_ms
            await control.reset_lateness()
            assert (await control.state())["lateness"] == dict.fromkeys(lateness, 0)
        finally:
            await client.http.close()
            await control.close()


async def test_no_lateness_is_measured_without_a_delay_a_first_request_or_beside_holds(
    tmp_path: Path,
) -> None:
    with running_simulator(tmp_path, latency="1") as simulator:
        client, control = Client(simulator.url), SimulatorControl(simulator.url)
        try:
            reference = new_reference()
            await client.authorize(reference)
            await client.authorize(reference)
            await control.hold("before_answer", kind="capture")
            await client.authorize(new_reference())
            await control.release()
            await control.latency(0, 0)
            await client.authorize(new_reference())
            assert (await control.state())["lateness"]["count"] == 1
        finally:
            await client.http.close()
            await control.close()


@pytest.mark.parametrize(("mode", "status"), [("down", 503), ("reset", None)])
async def test_psp_that_is_down_journals_requests_without_effect(
    simulator: SimulatorProcess,
    client: Client,
    control: SimulatorControl,
    mode: str,
    status: int | None,
) -> None:
    await control.mode(mode)
    reference = new_reference()
    if status is None:
        with pytest.raises(MaybeSent):
            await client.authorize(reference)
    else:
        assert (await client.authorize(reference))["status"] == status
    assert len(simulator.received()) == 1
    assert simulator.effects() == []
    await control.mode("up")
    assert (await client.authorize(reference))["result"] == "approved"


async def test_cancel_overtakes_a_request_that_is_being_worked_on(
    simulator: SimulatorProcess, client: Client, control: SimulatorControl
) -> None:
    reference = new_reference()
    await control.hold()
    paying = asyncio.create_task(client.authorize(reference))
    await control.await_held()
    path = f"/v1/operations/authorize/{reference}"
    assert (await client.ask("GET", path))["result"] == "in_progress"
    assert (await client.ask("POST", f"{path}/cancel"))["had"] == "nothing"
    await control.release()
    answer = await paying
    assert (answer["result"], answer["code"]) == ("refused", "reference_canceled")
    assert simulator.effects() == []
    refused = [record for record in simulator.records() if record["type"] == "refused"]
    assert [record["reference"] for record in refused] == [reference]


async def test_cancelled_reference_stays_unusable_after_a_restart(
    simulator: SimulatorProcess, client: Client, tmp_path: Path
) -> None:
    reference = new_reference()
    path = f"/v1/operations/authorize/{reference}"
    assert (await client.ask("POST", f"{path}/cancel"))["had"] == "nothing"
    simulator.kill()
    with running_simulator(tmp_path) as again:
        after = Client(again.url)
        assert (await after.authorize(reference))["code"] == "reference_canceled"
        assert again.effects() == []
        await after.http.close()


async def test_what_is_told_is_told_until_it_is_taken_and_twice_where_that_is_asked(
    client: Client, control: SimulatorControl
) -> None:
    account = "acc_" + 32 * "0"
    told: list[tuple[str, bytes]] = []
    taken = asyncio.Event()

    async def take(request: web.Request) -> web.Response:
        told.append((request.path, await request.read()))
        if len(told) < 3:
            return web.Response(status=503)
        if len(told) == 4:
            taken.set()
        return web.Response()

    async with http_server(take) as url:
        await client.authorize(new_reference(), account=account)  # of which nobody wants to know
        await control.notify(url, "secret", duplicate_percent=100)
        await client.authorize(new_reference(), account="terminal")  # which is no account's
        reference = new_reference()
        await client.authorize(reference, account=account)
        async with asyncio.timeout(WAIT_S):
            await taken.wait()
        await eventually(lambda: _nothing_waits(control), "both were taken")
        assert {path for path, _ in told} == {f"/v1/notifications/simulator/{account}"}
        [event] = {body for _, body in told}
        assert orjson.loads(event)["operation"]["reference"] == reference
        state = await control.state()
        assert state["notifications"] == {"waiting": 0, "told": 2, "dropped": 0}
        await control.notify("")
        await client.authorize(new_reference(), account=account)
        assert (await control.state())["notifications"]["waiting"] == 0


async def _nothing_waits(control: SimulatorControl) -> bool:
    return bool((await control.state())["notifications"]["waiting"] == 0)


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("notify", {"url": "ftp://nowhere", "secret": "s"}),
        ("notify", {"url": "http://127.0.0.1:1"}),
        ("operate", {"kind": "authorize", "reference": "op_1-1", "amount_minor": 1}),
        ("operate", {"kind": "refund", "reference": "op_of_nobody-1", "amount_minor": 1}),
        ("dispute", {"reference": "op_of_nobody-1", "amount_minor": 1}),
    ],
)
async def test_control_that_makes_no_sense_is_refused(
    client: Client, action: str, body: dict[str, object]
) -> None:
    assert (await client.ask("POST", f"/control/{action}", body))["status"] == 400


def test_host_with_other_codes_than_the_simulator_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulatorFailed):
        SimulatorProcess.start(tmp_path / "journal.jsonl", iso8583_specification="reference-1993")
