"""What tracing costs, off and on: `python -m loadtest.tracing_cost`, half a minute.

Off: rows through a lane as it is, against the same module without a word of tracing, which is made
from its own source; the gate is on their paired ratio. Not traced, traced: what a call through the
handler and four stages takes more than without tracing, in microseconds, with nothing but a turn of
the event loop in each stage; the sending of the spans is among it.
"""

import ast
import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import grpc

import storage.batching
from gateway.application.ports import ClaimOutcome, ClaimResult
from gateway.telemetry.tracing import Tracing, TracingOptions
from loadtest.bench.costs import Gate, cost_command, take_turns
from loadtest.bench.ratios import Measured, measured, paired

if TYPE_CHECKING:
    from collections.abc import Iterator

RATIO_MIN: Final = 0.95
"""The least that a lane may keep of its speed without a word of tracing."""
ROWS_PER_ROUND: Final = 30_000
ROWS_PER_BURST: Final = 100
CALLS_PER_ROUND: Final = 3_000

_SINK = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


# --- off ------------------------------------------------------------------------------------------


class _WithoutTracing(ast.NodeTransformer):
    """Takes every mention of a lane's tracer out of its module."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """`if self._tracer is not None:` goes, with what is in it."""
        return None if _asks(node.test) else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        """And where it is kept."""
        return None if ast.unparse(node.targets[0]) == "self._tracer" else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """And what it leaves with a row."""
        return None if ast.unparse(node.target) == "traced" else self.generic_visit(node)


def _asks(test: ast.expr) -> bool:
    return ast.unparse(test).startswith("self._tracer is")


def lanes_without_tracing() -> ModuleType:
    """storage.batching without tracing. Raises ValueError where some of it would be left."""
    source = Path(storage.batching.__file__).read_text(encoding="utf-8")
    tree = ast.fix_missing_locations(_WithoutTracing().visit(ast.parse(source)))
    text = ast.unparse(tree)
    if "_tracer" in text or ".traced" in text:
        raise ValueError("storage.batching mentions its tracer in a form that is not known here")
    module = ModuleType("batching_without_tracing")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(text, module.__name__, "exec"), module.__dict__)  # noqa: S102 - our own source
    return module


async def _echo(rows: Sequence[int]) -> Sequence[int]:
    return rows


async def rows_per_s(module: Any) -> float:
    """How many rows a lane of `module` takes in a second of CPU time, in bursts."""
    lane = module.Lane("cost", _echo, rows_max=ROWS_PER_BURST, queue_max=ROWS_PER_BURST)
    began = time.process_time()
    for _ in range(ROWS_PER_ROUND // ROWS_PER_BURST):
        await asyncio.gather(*[lane.submit(row) for row in range(ROWS_PER_BURST)])
    return ROWS_PER_ROUND / (time.process_time() - began)


# --- on -------------------------------------------------------------------------------------------


class _Stages:
    """The ports that a call goes through, each a turn of the event loop."""

    generation = None
    name = "cost"
    capabilities = None

    async def claim(self, *_: object) -> ClaimResult:
        await asyncio.sleep(0)
        return ClaimResult(ClaimOutcome.NEW)

    async def find_by_key(self, *_: object) -> None:
        await asyncio.sleep(0)

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *_: None


class _Context:
    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("user-agent", "cost"), ("authorization", "Bearer x"))


def _call(tracing: Tracing | None) -> Callable[[bytes, Any], Awaitable[bytes]]:
    stages: Any = _Stages()
    claims = stages if tracing is None else tracing.claims(stages)
    store = stages if tracing is None else tracing.store(stages)

    async def serve(data: bytes, _: Any) -> bytes:
        await claims.claim("merchant", "key", b"")
        for _stage in range(3):
            await store.find_by_key("merchant", "key")
        return data

    if tracing is None:
        return serve
    handlers = tracing.handlers(
        "test.v1.CostService", {"Cost": grpc.unary_unary_rpc_method_handler(serve)}
    )
    handler = handlers["Cost"].unary_unary
    assert handler is not None
    return handler


async def call_s(call: Callable[[bytes, Any], Awaitable[bytes]]) -> float:
    """A call's CPU time, each in a task of its own as the transports have it."""
    context = _Context()

    async def one() -> None:
        await call(b"", context)

    loop = asyncio.get_running_loop()
    began = time.process_time()
    for _ in range(CALLS_PER_ROUND):
        await loop.create_task(one())
    return (time.process_time() - began) / CALLS_PER_ROUND


@contextmanager
def _collector() -> "Iterator[str]":
    """A collector that takes everything and looks at nothing, in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", _SINK], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1/traces"
        finally:
            process.kill()


def _tracing(endpoint: str, sample_ratio: float) -> Tracing:
    options = TracingOptions(endpoint, sample_ratio, 1_000_000, "cost", 500)
    return Tracing(options)


# --- the measurement ------------------------------------------------------------------------------


async def measure(rounds: int) -> dict[str, Measured]:
    """The paired ratio of lanes, and what a call takes more, in microseconds."""
    with _collector() as endpoint:
        never, always = _tracing(endpoint, 0.0), _tracing(endpoint, 1.0)
        given = await take_turns(
            {
                "plain": partial(rows_per_s, lanes_without_tracing()),
                "as_is": partial(rows_per_s, storage.batching),
                "bare": partial(call_s, _call(None)),
                "not_traced": partial(call_s, _call(never)),
                "traced": partial(call_s, _call(always)),
            },
            rounds,
        )
        await never.close()
        await always.close()
    more_us = {
        f"{name}_us": [
            1e6 * (s - bare_s) for s, bare_s in zip(given[name], given["bare"], strict=True)
        ]
        for name in ("not_traced", "traced")
    }
    return {
        "off_ratio": paired(given["as_is"], given["plain"]),
        **{name: measured(values) for name, values in more_us.items()},
    }


main = cost_command(
    measure,
    Gate("off_ratio", least=RATIO_MIN),
    {
        "off_ratio": "off: rows a second through a lane, of those without a word of tracing",
        "not_traced_us": "on, not traced: microseconds more a call",
        "traced_us": "on, traced: microseconds more a call, five spans exported",
    },
    Path(".local/bench/tracing.json"),
)


if __name__ == "__main__":
    main()
