"""README's first payment runs as it stands there, and prints what it says."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.domain.ids import is_payment_id
from tests.harness import running_system

if TYPE_CHECKING:
    from storage.embedded import EmbeddedRedis
    from tests.servers import PostgresForTests

README = Path(__file__).resolve().parents[2] / "README.md"


def _marked(kind: str) -> str:
    match = re.search(
        rf"<!-- {kind}: first-payment -->\n```\w*\n(.*?)```\n<!-- end",
        README.read_text(),
        re.DOTALL,
    )
    assert match is not None
    return match[1]


async def test_first_payment_of_the_readme_prints_what_the_readme_says(
    postgres: PostgresForTests, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    script = tmp_path / "first_payment.py"
    script.write_text(_marked("snippet"), encoding="utf-8")
    with running_system(postgres, redis) as system:
        gateway = system.start_gateway()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            env={
                **os.environ,
                "PAYMENTS_TARGET": gateway.address,
                "PAYMENTS_API_KEY": system.shop.api_key,
            },
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()
    assert process.returncode == 0
    ids = re.findall(r"pay_\w+", printed.decode())
    assert [is_payment_id(each) for each in ids] == [True]
    assert printed.decode().replace(ids[0], "pay_…") == _marked("output")
