"""docs/clients.md: its program runs as it stands there, its service config is the published one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from gateway.domain.ids import is_payment_id
from gateway.rpc.server import ServerOptions
from gateway.settings import Settings
from tests.harness import new_key, running_system
from tests.servers import free_port

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "clients.md").read_text("utf-8")
CERTIFICATE = ROOT / "tests" / "data" / "localhost.pem"
KEY = ROOT / "tests" / "data" / "localhost.key"


def _marked(kind: str) -> str:
    match = re.search(rf"<!-- {kind}: client -->\n```\w*\n(.*?)```\n<!-- end", GUIDE, re.DOTALL)
    assert match is not None
    return match[1]


async def test_the_guides_program_pays_over_tls_through_a_restart_and_prints_what_the_guide_says(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(_marked("snippet"), encoding="utf-8")
    with running_system(postgres, redis) as system:
        # Nobody serves there yet: the program calls into nothing first, and repeats.
        address = f"127.0.0.1:{free_port()}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            env={
                **os.environ,
                "PAYMENTS_TARGET": f"dns:///localhost:{address.rpartition(':')[2]}",
                "PAYMENTS_API_KEY": system.shop.api_key,
                "PAYMENTS_CA_FILE": str(CERTIFICATE),
                "ORDER_KEY": new_key(),
            },
            stdout=asyncio.subprocess.PIPE,
        )
        gateway = system.start_gateway(
            listen_address=address, tls_certificate_file=CERTIFICATE, tls_key_file=KEY
        )
        await gateway.serving()
        printed, _ = await process.communicate()
    assert process.returncode == 0
    ids = re.findall(r"pay_\w+", printed.decode())
    assert [is_payment_id(each) for each in ids] == [True]
    assert printed.decode().replace(ids[0], "pay_…") == _marked("output")


@pytest.mark.parametrize(
    ("code", "asks", "calls"),
    [
        ("FAILED_PRECONDITION", True, 5),
        ("FAILED_PRECONDITION", False, 1),
        ("INVALID_ARGUMENT", False, 1),
        ("UNAVAILABLE", False, 5),
    ],
)
async def test_the_guides_program_repeats_what_the_guide_says(
    code: str, *, asks: bool, calls: int
) -> None:
    program: dict[str, Any] = {}
    exec(_marked("snippet").replace("\nasyncio.run(main())\n", "\n"), program)
    program["PAUSE_S"] = 0
    status = status_pb2.Status(code=grpc.StatusCode[code].value[0], message="no")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_NOW"))
    if asks:
        delay = Duration(nanos=1_000_000)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    details = ("grpc-status-details-bin", status.SerializeToString())
    error = grpc.aio.AioRpcError(
        grpc.StatusCode[code], grpc.aio.Metadata(), grpc.aio.Metadata(details), details="no"
    )
    assert program["refusal"](error) == ("NOT_NOW", 0.001 if asks else None)
    made = 0

    async def call(_request: object, **_: object) -> None:
        nonlocal made
        made += 1
        raise error

    if calls > 1:
        assert await program["pay"](call, None, None) is None
    else:
        with pytest.raises(grpc.aio.AioRpcError):
            await program["pay"](call, None, None)
    assert made == calls


def test_the_guide_shows_the_service_config_that_the_stubs_carry() -> None:
    shown = re.search(r"```json\n(.*?)```", GUIDE, re.DOTALL)
    assert shown is not None
    published = (files("payments.v1") / "service_config.json").read_text("utf-8")
    assert json.loads(shown[1]) == json.loads(published)


def test_the_guide_names_settings_that_exist_with_their_defaults() -> None:
    named = {name.lower() for name in re.findall(r"GATEWAY_([A-Z_]+)", GUIDE)}
    assert named <= set(Settings.model_fields)
    defaults = {name: Settings.model_fields[name].default for name in named}
    assert defaults["concurrent_streams_max"] == 1000
    assert defaults["simulator_answer_timeout_s"] == 10
    assert defaults["batch_wait_s_max"] == 30
    assert defaults["keepalive_time_s"] == 60
    assert ServerOptions().client_ping_interval_s_min == 10


def test_the_guide_has_a_row_for_every_status() -> None:
    table = GUIDE.partition("## What comes back")[2].partition("## Keepalive")[0]
    named = set(re.findall(r"\b[A-Z][A-Z_]+\b", table))
    # The gateway never answers these: docs/errors.md has every status that it does.
    never = {"OUT_OF_RANGE", "DATA_LOSS"}
    assert {code.name for code in grpc.StatusCode} - never <= named
